"""Loading data: every form that users have, every mistake by its message."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgec import readers
from edgec.data import Dataset, Preprocess, check_class_labels, load_data, random_data
from edgec.errors import EdgecError
from edgec.program import TensorSpec
from edgec.samples import match_layout

pytestmark = pytest.mark.pure

IMAGE = (TensorSpec("x", (1, 3, 8, 6), "float32"),)
GREY = (TensorSpec("x", (1, 1, 8, 6), "float32"),)
TOKENS = (TensorSpec("ids", (1, 5), "int64"),)
TWO = (TensorSpec("left", (1, 4), "float32"), TensorSpec("right", (1, 2), "float32"))
RNG = np.random.default_rng(0)


def images(n: int = 5, shape: tuple[int, ...] = (8, 6, 3)) -> np.ndarray:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def npz(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


def raises(message: str):
    return pytest.raises(EdgecError, match=re.escape(message))


# -- .npz --------------------------------------------------------------------------------------------------------------


def test_nhwc_uint8_becomes_scaled_nchw(tmp_path):
    x = images()
    data = load_data(npz(tmp_path, images=x, labels=np.arange(5)), IMAGE)
    got = data.inputs()
    assert got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_array_equal(got.numpy(), x.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(1 / 255))
    np.testing.assert_array_equal(data.labels, np.arange(5))
    assert data.labels.dtype == np.int64
    assert data.notes == ("samples transposed to the model's NCHW",)


def test_nchw_float_is_left_alone(tmp_path):
    x = RNG.normal(size=(5, 3, 8, 6)).astype(np.float32)
    data = load_data(npz(tmp_path, images=x), IMAGE)
    np.testing.assert_array_equal(data.inputs().numpy(), x)
    assert data.labels is None and data.notes == ()


def test_float64_is_read_as_float32(tmp_path):
    x = RNG.normal(size=(2, 3, 8, 6))
    np.testing.assert_array_equal(load_data(npz(tmp_path, x=x), IMAGE).inputs().numpy(), x.astype(np.float32))


def test_mean_and_std_apply_per_channel_after_scaling(tmp_path):
    x = images()
    pre = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    got = load_data(npz(tmp_path, images=x), IMAGE, pre).inputs().numpy()
    want = (x / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0]
    np.testing.assert_allclose(got, want.transpose(0, 3, 1, 2), atol=2e-6)


def test_scale_one_keeps_raw_values(tmp_path):
    x = images()
    got = load_data(npz(tmp_path, images=x), IMAGE, Preprocess(mean=(127.0,), std=(128.0,), scale=1.0)).inputs().numpy()
    np.testing.assert_allclose(got, (x.transpose(0, 3, 1, 2).astype(np.float64) - 127) / 128, atol=1e-6)


def test_an_nhwc_model_gets_nhwc(tmp_path):
    x = images(shape=(3, 8, 6))
    spec = (TensorSpec("x", (1, 8, 6, 3), "float32"),)
    got = load_data(npz(tmp_path, images=x), spec, Preprocess(mean=(0.1, 0.2, 0.3))).inputs().numpy()
    np.testing.assert_allclose(got, x.transpose(0, 2, 3, 1) / 255 - np.array([0.1, 0.2, 0.3]), atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 1), (1, 8, 6)])
def test_grey_images_fit_one_channel_and_are_repeated_for_three(tmp_path, shape):
    x = images(shape=shape)
    path = npz(tmp_path, images=x)
    plane = x.reshape(5, 1, 8, 6).astype(np.float32) * np.float32(1 / 255)
    np.testing.assert_array_equal(load_data(path, GREY).inputs().numpy(), plane)
    rgb = load_data(path, IMAGE)
    np.testing.assert_array_equal(rgb.inputs().numpy(), np.repeat(plane, 3, axis=1))
    assert rgb.notes == ("grey samples repeated to 3 channels",)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_rgb_becomes_grey_as_pillow_does_it(tmp_path, order):
    x = images()
    data = load_data(npz(tmp_path, images=x.transpose(0, *(axis + 1 for axis in order))), GREY, Preprocess(scale=1.0))
    want = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in x])
    np.testing.assert_array_equal(data.inputs().numpy()[:, 0], want.astype(np.float32))
    assert data.notes == ("RGB samples converted to grey",)


def test_float_rgb_becomes_grey_by_the_same_weights():
    x = RNG.random((2, 3, 8, 6), dtype=np.float32)
    want = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    np.testing.assert_allclose(load_data(x, GREY).inputs().numpy()[:, 0], want, atol=1e-6)


def test_int8_features_are_dequantised_and_get_their_channel_axis(tmp_path):
    q = RNG.integers(-128, 128, (4, 8, 6), dtype=np.int8)
    path = npz(tmp_path, features_int8=q, scale=np.float32(0.5), zero_point=np.int64(83), labels=np.zeros(4, int))
    got = load_data(path, GREY).inputs().numpy()
    np.testing.assert_array_equal(got, ((q.astype(np.float32) - 83) * 0.5)[:, None])


def test_int8_features_need_scale_and_zero_point(tmp_path):
    q = np.zeros((4, 8, 6), np.int8)
    with raises("d.npz: features_int8: needs 'zero_point' in the same file"):
        load_data(npz(tmp_path, features_int8=q, scale=np.float32(1)), GREY)
    with raises("'scale' is not one finite number"):
        load_data(npz(tmp_path, features_int8=q, scale=np.float32([1, 2]), zero_point=np.int64(0)), GREY)
    with raises("dtype is uint8, not int8"):
        load_data(npz(tmp_path, features_int8=q.astype(np.uint8), scale=np.float32(1), zero_point=np.int64(0)), GREY)


def test_integer_inputs_are_passed_through_and_never_scaled(tmp_path):
    x = RNG.integers(0, 1000, (3, 5)).astype(np.int32)
    got = load_data(npz(tmp_path, ids=x), TOKENS).inputs()
    assert got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy(), x)
    with raises("integer inputs only, which are not scaled"):
        load_data(npz(tmp_path, ids=x), TOKENS, Preprocess(mean=(1.0,)))
    with raises("dtype is float32, input 'ids' takes integers (int64)"):
        load_data(npz(tmp_path, ids=x.astype(np.float32)), TOKENS)
    narrow = load_data(npz(tmp_path, ids=x + 200), (TensorSpec("ids", (1, 5), "int8"),))
    with raises("input 'ids': values do not fit int8"):
        narrow.inputs()


def test_several_inputs_are_found_by_name(tmp_path):
    left, right = np.ones((3, 4), np.float32), np.zeros((3, 2), np.float32)
    data = load_data(npz(tmp_path, left=left, right=right, labels=np.arange(3)), TWO)
    (a, b), y = next(data.batches(2))
    assert a.shape == (2, 4) and b.shape == (2, 2) and y.tolist() == [0, 1]
    np.testing.assert_array_equal(data.inputs(which=1).numpy(), right)
    with raises("has no array for input right (found left float32(3, 4))"):
        load_data(npz(tmp_path, left=left), TWO)
    with raises("d.npz: right: has 2 samples, left has 3"):
        load_data(npz(tmp_path, left=left, right=right[:2]), TWO)


def test_targets_that_are_not_classes(tmp_path):
    x = images()
    column = load_data(npz(tmp_path, images=x, labels=np.arange(5, dtype=np.uint8)[:, None]), IMAGE)
    assert column.labels.tolist() == [0, 1, 2, 3, 4] and column.labels.dtype == np.int64
    dense = load_data(npz(tmp_path, images=x, targets=np.ones((5, 2, 2))), IMAGE)
    assert dense.labels.shape == (5, 2, 2) and dense.labels.dtype == np.float32
    with raises("d.npz: labels: dtype is <U1"):
        load_data(npz(tmp_path, images=x, labels=np.array(list("abcde"))), IMAGE)
    with raises("labels: sample 2 has NaN"):
        load_data(npz(tmp_path, images=x, labels=np.array([0, 1, np.nan, 0, 0])), IMAGE)
    with raises("labels: is a single number"):
        load_data(npz(tmp_path, images=x, labels=np.int64(3)), IMAGE)


def test_wrong_files(tmp_path):
    with raises("nowhere.npz: does not exist; use a .npz file, a folder of images or file.py:factory"):
        load_data("nowhere.npz", IMAGE)
    (tmp_path / "a.txt").write_text("x")
    with raises("a.txt: is not a form of data that can be read"):
        load_data(str(tmp_path / "a.txt"), IMAGE)
    for name, content in [("garbage", b"not a zip file"), ("empty", b""), ("half", None)]:
        path = tmp_path / f"{name}.npz"
        if content is None:
            content = Path(npz(tmp_path, images=images())).read_bytes()[:300]
        path.write_bytes(content)
        with raises(f"{name}.npz: is corrupt and cannot be read; write plain arrays with numpy.savez"):
            load_data(str(path), IMAGE)
    np.save(tmp_path / "plain.npy", images())
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    with raises("plain.npz: is not a .npz archive"):
        load_data(str(tmp_path / "plain.npz"), IMAGE)
    np.savez(tmp_path / "objects.npz", images=np.array([{}, []], dtype=object))
    with raises("objects.npz: contains Python objects and cannot be read"):
        load_data(str(tmp_path / "objects.npz"), IMAGE)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    path = npz(tmp_path, images=images())
    monkeypatch.setattr(np, "load", refuse)
    with raises("d.npz: cannot be read: Permission denied"):
        load_data(path, IMAGE)


def test_a_bit_flip_inside_the_archive_is_found(tmp_path):
    path = Path(npz(tmp_path, images=images()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with raises("d.npz: is corrupt"):
        load_data(str(path), IMAGE)


def test_wrong_contents(tmp_path):
    with raises("has no input array (found pictures uint8(5, 8, 6, 3)); name it one of x, images, inputs"):
        load_data(npz(tmp_path, pictures=images()), IMAGE)
    with raises(
        "d.npz: images: samples have shape (28, 28, 1), input 'x' of the model wants (3, 8, 6); store the data at"
    ):
        load_data(npz(tmp_path, images=images(shape=(28, 28, 1))), IMAGE)
    with raises("d.npz: images: dtype is int32, input 'x' takes uint8 or float32"):
        load_data(npz(tmp_path, images=images().astype(np.int32)), IMAGE)
    with raises("d.npz: images: has no samples"):
        load_data(npz(tmp_path, images=images(0)), IMAGE)
    with raises("d.npz: 4 labels for 5 samples"):
        load_data(npz(tmp_path, images=images(), labels=np.arange(4)), IMAGE)
    broken = np.zeros((5, 3, 8, 6), np.float32)
    broken[3, 1, 2, 2] = np.nan
    with raises("d.npz: images: sample 3 has NaN or infinite values"):
        load_data(npz(tmp_path, images=broken), IMAGE)


def test_slices(tmp_path):
    x = images(10)
    path = npz(tmp_path, images=x, labels=np.arange(10))
    part = load_data(path + "[3:7]", IMAGE)
    assert part.labels.tolist() == [3, 4, 5, 6] and part.name.endswith("d.npz[3:7]")
    assert load_data(path + "[:2]", IMAGE).labels.tolist() == [0, 1]
    assert load_data(path + "[8:]", IMAGE).labels.tolist() == [8, 9]
    for wrong in ("[3:11]", "[5:5]", "[7:3]", "[10:]"):
        with raises("does not lie in the 10 samples; use 0 <= start < stop <= 10"):
            load_data(path + wrong, IMAGE)
    for unreadable in ("[3]", "[a:b]", "[-2:]", "[::2]"):
        with raises(f"cannot read the slice '{unreadable}'; write name[start:stop]"):
            load_data(path + unreadable, IMAGE)


# -- the dataset -------------------------------------------------------------------------------------------------------


def test_batches_cover_everything_in_order(tmp_path):
    data = load_data(npz(tmp_path, images=images(7), labels=np.arange(7)), IMAGE)
    parts = list(data.batches(3))
    assert [len(y) for _, y in parts] == [3, 3, 1]
    np.testing.assert_array_equal(torch.cat([x for (x,), _ in parts]).numpy(), data.inputs().numpy())


def test_indexing_by_number_slice_list_and_mask(tmp_path):
    data = load_data(npz(tmp_path, images=images(7), labels=np.arange(7)), IMAGE)
    assert data.targets(2).tolist() == data.targets(np.int64(2)).tolist() == [2]
    assert data.inputs(2).shape == (1, 3, 8, 6)
    assert data.targets([6, 0]).tolist() == [6, 0]
    assert data.targets(np.arange(7) > 4).tolist() == [5, 6]
    part = data.take([5, 3, 1])
    assert part.take([2, 0]).labels.tolist() == [1, 5] and "3 samples" in repr(part)
    with raises("d.npz: has no samples"):
        data.take([False] * 7)


@settings(deadline=None)
@given(n=st.integers(1, 40), wanted=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_limit_is_a_repeatable_ordered_subset(n, wanted, seed):
    data = load_data((np.zeros((n, 4), np.float32), np.arange(n)), (TensorSpec("x", (1, 4), "float32"),))
    rows = data.limit(wanted, seed).labels
    assert len(rows) == min(n, wanted)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, data.limit(wanted, seed).labels)


def test_limit_depends_on_the_seed_and_refuses_zero():
    data = load_data((np.zeros((100, 4), np.float32), np.arange(100)), (TensorSpec("x", (1, 4), "float32"),))
    assert data.limit(10, 0).labels.tolist() != data.limit(10, 1).labels.tolist()
    with raises("arrays: 0 samples asked for; ask for at least 1"):
        data.limit(0)


def test_hash_follows_contents_only(tmp_path):
    x, y = images(300), np.arange(300)
    first = load_data(npz(tmp_path, images=x, labels=y), IMAGE)
    again = load_data((x, y), IMAGE, Preprocess(mean=(0.5,)))
    assert first.sha256() == again.sha256()
    other = x.copy()
    other[299, 0, 0, 0] ^= 1
    assert load_data((other, y), IMAGE).sha256() != first.sha256()
    assert load_data((x, y[::-1].copy()), IMAGE).sha256() != first.sha256()
    assert load_data(x, IMAGE).sha256() != first.sha256()
    assert first.take(slice(0, 299)).sha256() != first.sha256()


def test_describe_is_plain_data():
    data = load_data(images(), IMAGE, Preprocess(mean=(0.5,), std=(0.25,)))
    assert data.describe() == {
        "name": "arrays",
        "n": 5,
        "sha256": data.sha256(),
        "preprocess": {"mean": [0.5], "std": [0.25], "scale": None},
        "notes": ["samples transposed to the model's NCHW"],
    }


def test_labels_are_checked_against_the_classes():
    data = load_data((images(), np.array([0, 1, 9, 3, 2])), IMAGE)
    data.check_labels(10)
    with raises("arrays: labels are in 0..9, the model has 9 classes (0..8); renumber"):
        data.check_labels(9)
    with raises("labels are in -1..0, the model has 4 classes"):
        check_class_labels(np.array([-1, 0]), 4, "d")
    with raises("d: labels are float32 of shape (2, 3), not one class index per sample"):
        check_class_labels(np.zeros((2, 3), np.float32), 4, "d")
    with raises("arrays: has no labels; add an array 'labels'"):
        load_data(images(), IMAGE).check_labels(3)


def test_preprocess_is_validated():
    for wrong, message in [
        ({"std": (0.5, 0.0)}, "--std: '0.5,0.0' contains a value that is not positive"),
        ({"mean": (float("nan"),)}, "--mean: 'nan' is not a list of finite numbers"),
        ({"mean": ()}, "--mean: '' is not a list of finite numbers"),
        ({"scale": 0.0}, "--input-scale: '0.0' contains a value that is not positive"),
    ]:
        with raises(message):
            Preprocess(**wrong)
    with raises("--mean: 2 values for input 'x' of shape (3, 8, 6); give one value, or one per channel"):
        load_data(images(), IMAGE, Preprocess(mean=(0.5, 0.5)))
    assert Preprocess(mean=[0.5, 0.25], std=0.5) == Preprocess(mean=(0.5, 0.25), std=(0.5,))


def test_overflow_after_scaling_is_found():
    data = load_data(np.full((2, 3, 8, 6), 1e30, np.float32), IMAGE, Preprocess(scale=1e20))
    with raises("arrays: sample 1 of input 'x' has NaN or infinite values"):
        data.inputs(1)


def test_dtypes_that_numpy_lacks_are_refused():
    with raises("input 'x': dtype bfloat16 cannot be fed from data; export the model with float32 inputs"):
        load_data(images(), (TensorSpec("x", (1, 3, 8, 6), "bfloat16"),))


def test_random_data_repeats():
    specs = (*IMAGE, *TOKENS)
    a, b = random_data(specs, 6, 3), random_data(specs, 6, 3)
    assert len(a) == 6 and a.labels is None and a.sha256() == b.sha256()
    assert a.sha256() != random_data(specs, 6, 4).sha256()
    (x, ids), _ = next(a.batches(6))
    assert x.shape == (6, 3, 8, 6) and x.min() >= 0 and x.max() < 1 and x.std() > 0.2
    assert ids.dtype == torch.int64 and set(ids.unique().tolist()) <= {0, 1}


# -- layouts -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(c=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5))
def test_layout_keeps_every_value_of_hwc_and_chw(c, h, w):
    x = np.arange(2 * c * h * w).reshape(2, c, h, w)
    assert (match_layout((c, h, w), (c, h, w)).apply(x) == x).all()
    stored = x.transpose(0, 2, 3, 1)
    layout = match_layout((h, w, c), (c, h, w))
    if (h, w, c) != (c, h, w):  # where both readings fit, the model's own order wins
        assert sorted(layout.apply(stored).ravel()) == sorted(x.ravel())
    if len({c, h, w}) == 3:
        np.testing.assert_array_equal(layout.apply(stored), x)


def test_layouts_that_do_not_fit():
    assert match_layout((8, 6, 3), (3, 6, 8)) is None
    assert match_layout((8, 6, 2), (3, 8, 6)) is None
    assert match_layout((640,), (1, 641)) is None
    assert match_layout((), (2,)) is None


# -- folders of images -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, colour in [("dog", (255, 0, 0)), ("cat", (0, 255, 0))]:
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (12, 16), colour).save(tmp_path / name / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "dog" / ".hidden.png").write_text("not an image")
    return tmp_path


def test_class_folders_are_numbered_in_sorted_order(folder):
    data = load_data(str(folder), IMAGE)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1]
    x = data.inputs().numpy()
    assert x.shape == (4, 3, 8, 6)
    np.testing.assert_array_equal(x[0, :, 0, 0], [0, 1, 0])
    np.testing.assert_array_equal(x[3, :, 7, 5], [1, 0, 0])
    assert data.notes == ("images resized to 8x6 (bilinear), RGB",)
    assert load_data(f"{folder}[1:3]", IMAGE).labels.tolist() == [0, 1]


def test_images_are_resized_as_pillow_does_it(tmp_path):
    picture = images(1, (17, 31, 3))[0]
    (tmp_path / "a").mkdir()
    Image.fromarray(picture).save(tmp_path / "a" / "0.png")
    want = np.asarray(Image.fromarray(picture).resize((6, 8), Image.Resampling.BILINEAR))
    for spec, axes in ((IMAGE, (2, 0, 1)), ((TensorSpec("x", (1, 8, 6, 3), "float32"),), (0, 1, 2))):
        data = load_data(str(tmp_path), spec, Preprocess(scale=1.0))
        for _ in range(2):  # decoded, then from memory
            np.testing.assert_array_equal(data.inputs().numpy()[0], want.transpose(axes).astype(np.float32))


def test_a_grey_model_gets_grey_images(folder):
    data = load_data(str(folder), GREY, Preprocess(scale=1.0))
    assert data.inputs(0).shape == (1, 1, 8, 6)
    assert float(data.inputs(0)[0, 0, 0, 0]) == 150.0  # 0.587 * 255, rounded


def test_a_folder_of_loose_images_is_unlabelled(folder):
    data = load_data(str(folder / "dog"), IMAGE)
    assert len(data) == 2 and data.labels is None and data.class_names is None


def test_wrong_folders(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with raises(f"{empty}: has no images; known endings: .bmp"):
        load_data(str(empty), IMAGE)
    (empty / "a").mkdir()
    (empty / "b").mkdir()
    with raises(f"{empty}: has no images"):
        load_data(str(empty), IMAGE)
    (folder / "bird").mkdir()
    with raises("class folder 'bird' has no images; remove it"):
        load_data(str(folder), IMAGE)
    (folder / "bird").rmdir()
    with raises(f"{folder}: is a folder of images, but the model takes (4,), (2,)"):
        load_data(str(folder), TWO)
    with raises("of shape (2, 8, 6) has neither 1 nor 3 channels"):
        load_data(str(folder), (TensorSpec("x", (1, 2, 8, 6), "float32"),))
    (folder / "dog" / "1.png").write_bytes(b"no image")
    broken = load_data(str(folder), IMAGE)
    with raises("1.png: cannot be read as an image (UnidentifiedImageError); repair or remove the file"):
        broken.inputs()
    Image.new("RGB", (4, 4)).save(folder / "loose.png")
    with raises("has images (loose.png, …) beside class folders (cat, …)"):
        load_data(str(folder), IMAGE)


# -- PyTorch data and Python objects -----------------------------------------------------------------------------------


class Noisy(torch.utils.data.Dataset):
    """A map-style dataset with random augmentation in all three generators."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        import random

        shift = random.random() + np.random.rand() + float(torch.rand(()))
        return torch.full((3, 8, 6), index + 0.1 * shift), index % 3


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(np.full((8, 6, 3), i, np.uint8), i) for i in range(4)])


def test_a_map_style_dataset_is_read_when_needed_and_repeats():
    data = load_data(Noisy(), IMAGE)
    state = torch.random.get_rng_state()
    first = data.inputs([4, 2]).numpy()
    np.testing.assert_array_equal(first, data.inputs([4, 2]).numpy())
    assert 4 < first[0].max() < 4.3 and len(np.unique(first[:, 0, 0, 0] % 1)) == 2
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"batch_size": None}, {"batch_size": 1}])
def test_a_loader_is_read_once_and_its_shuffling_repeats(options):
    def read(seed: int) -> Dataset:
        shuffle = options["batch_size"] is not None
        loader = torch.utils.data.DataLoader(Noisy(), shuffle=shuffle, **options)
        return load_data(loader, IMAGE, seed=seed)

    first = read(1)
    assert len(first) == 6 and sorted(first.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert first.sha256() == read(1).sha256() != read(2).sha256()
    np.testing.assert_array_equal(np.floor(first.inputs().numpy()[:, 0, 0, 0]).astype(int) % 3, first.labels)


def test_iterables_of_samples_and_of_batches():
    stream = load_data(Stream(), IMAGE, Preprocess(scale=1.0))
    assert stream.labels.tolist() == [0, 1, 2, 3] and float(stream.inputs(3).max()) == 3
    x = images(6)
    batches = load_data([(x[:4], [0, 1, 2, 3]), (x[4:], torch.tensor([4, 5]))], IMAGE)
    np.testing.assert_array_equal(batches.inputs().numpy(), load_data(x, IMAGE).inputs().numpy())
    assert batches.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert load_data(iter(list(x)), IMAGE).sha256() == load_data(x, IMAGE).sha256()


def test_several_inputs_from_objects():
    left, right = np.ones((3, 4), np.float32), np.zeros((3, 2), np.float32)
    pair = load_data((left, right), TWO)
    assert pair.labels is None and len(pair) == 3
    labelled = load_data(((left, right), np.arange(3)), TWO)
    nested = load_data([((left[i], right[i]), i) for i in range(3)], TWO)
    flat = load_data([(left[i], right[i], i) for i in range(3)], TWO)
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(left), torch.from_numpy(right), torch.arange(3))
    assert labelled.sha256() == nested.sha256() == flat.sha256() == load_data(tensors, TWO).sha256()
    unlabelled = load_data([(left[i], right[i]) for i in range(3)], TWO)
    assert unlabelled.sha256() == pair.sha256()


def test_bfloat16_tensors_and_a_dataset_are_taken():
    x = torch.rand(2, 3, 8, 6).bfloat16()
    data = load_data(x, IMAGE)
    assert torch.equal(data.inputs(), x.float())
    assert load_data(data, IMAGE) is data
    with raises("was made for a model with inputs float32(3, 8, 6), this one wants float32(1, 8, 6)"):
        load_data(data, GREY)


def test_wrong_objects(monkeypatch):
    x = images()
    for value, message in [
        (42, "int: int is not data; give a DataLoader"),
        ({"x": x}, "dict: dict is not data"),
        ([], "list: has no samples"),
        ([{"image": x}], "list: yields dict; yield x or (x, y)"),
        ([(x[0], 1, 2)], "list: yields 3 values where the model has 1 input; yield x or (x, y)"),
        ([x[0], images(1, (4, 4, 3))[0]], "list: yields shapes (8, 6, 3) and (4, 4, 3)"),
        ([images(1, (4, 4, 3))[0]], "list: x: samples have shape (4, 4, 3), input 'x' of the model wants (3, 8, 6)"),
        ([(x, [1, 2])], "list: yields 2 labels with a batch of 5 samples"),
        ([(x[0], 1), x[1]], "list: 1 of 2 samples have no label"),
        ([(x[0], [1]), (x[1], [1, 2])], "list: has targets of different shapes ((1,), (2,))"),
        ((x, np.arange(4)), "arrays: 4 labels for 5 samples"),
        (np.ones(()), "arrays: x: has no samples"),
        (torch.utils.data.TensorDataset(torch.zeros(0, 3, 8, 6)), "TensorDataset: has no samples"),
        (torch.utils.data.TensorDataset(torch.zeros(1, 3, 4, 4)), "TensorDataset: samples have shape (3, 4, 4)"),
        (
            torch.utils.data.TensorDataset(torch.zeros(1, 3, 8, 6, dtype=torch.int32)),
            "TensorDataset, sample 0: dtype is int32, input 'x' takes uint8 or float32",
        ),
    ]:
        with raises(message):
            load_data(value, IMAGE)
    monkeypatch.setattr(readers, "MAX_READ_BYTES", 2 << 20)
    with raises("generator: yields more than 2 MiB; give fewer samples, or a map-style dataset"):
        load_data((images(1000) for _ in iter(int, 1)), IMAGE)


def test_a_map_style_dataset_with_a_bad_item():
    class Bad(Noisy):
        def __getitem__(self, index: int):
            if index == 3:
                raise RuntimeError("disk on fire")
            value = float("nan") if index == 4 else 0.0
            return torch.full((3, 8, 6 + (index == 5)), value), 0

    data = load_data(Bad(), IMAGE)
    with raises("Bad: raised RuntimeError: disk on fire (test_data.py, line"):
        data.inputs(3)
    with raises("Bad: sample 4 of input 'x' has NaN or infinite values"):
        data.inputs([1, 4])
    with raises("Bad: sample 5 has shape (3, 8, 7), sample 0 has (3, 8, 6)"):
        data.inputs(5)


def test_a_factory_is_run_with_its_folder_on_the_path(tmp_path):
    (tmp_path / "helper_of_the_factory.py").write_text("N = 4\n")
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom helper_of_the_factory import N\n"
        "def pair():\n    return np.zeros((N, 8, 6, 3), np.uint8), np.arange(N)\n"
        "def samples():\n    for i in range(N):\n        yield np.full((3, 8, 6), i, np.float32), i\n"
        "def fails():\n    return [][0]\n"
    )
    before = list(sys.path)
    data = load_data(f"{tmp_path}/mine.py:pair", IMAGE)
    assert len(data) == 4 and data.name.endswith("mine.py:pair")
    part = load_data(f"{tmp_path}/mine.py:samples[1:3]", IMAGE)
    assert part.labels.tolist() == [1, 2] and float(part.inputs(1).mean()) == 2
    assert sys.path == before
    (tmp_path / "ready.py").write_text(
        "from edgec.data import random_data\nfrom edgec.program import TensorSpec\n"
        "def noise():\n    return random_data([TensorSpec('x', (1, 3, 8, 6), 'float32')], 5)\n"
    )
    assert len(load_data(f"{tmp_path}/ready.py:noise[2:4]", IMAGE)) == 2
    with raises("mine.py:fails: raised IndexError: list index out of range (mine.py, line 9)"):
        load_data(f"{tmp_path}/mine.py:fails", IMAGE)
    with raises("mine.py: has no function 'pairs'; it has fails, pair, samples"):
        load_data(f"{tmp_path}/mine.py:pairs", IMAGE)


# -- torch stays outside -----------------------------------------------------------------------------------------------


def test_a_bundle_can_be_evaluated_without_torch(tmp_path):
    path = npz(tmp_path, images=images(), labels=np.arange(5) % 3)
    code = f"""
import sys
from types import SimpleNamespace
import edgec.checks, edgec.ledger, edgec.metrics
from edgec.data import load_data
data = load_data({path!r}, [SimpleNamespace(name="x", shape=(1, 3, 8, 6), dtype="float32")])
result = edgec.metrics.evaluate(lambda x: x.mean(axis=(2, 3)), data, "top1")
assert result.n == 5
assert not {{"torch", "tvm", "PIL"}} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
