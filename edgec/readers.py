"""Readers: from what users have (.npz files, folders of images, PyTorch data) to samples that fit a model."""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.errors import EdgecError
from edgec.samples import (
    ArraySource,
    ImageSource,
    Layout,
    MapSource,
    Samples,
    check_dtype,
    check_finite,
    clean_targets,
    fit_layout,
    is_array,
    layout_notes,
    match_layout,
    read_item,
    sample_shape,
    split_item,
    stack_targets,
    to_numpy,
)
from edgec.usercode import seeded, user_code

if TYPE_CHECKING:
    from edgec.program import TensorSpec

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Names under which a .npz may store the input of a model with one input, besides the name of the input itself.
INPUT_KEYS = ("images", "inputs", "features", "features_int8", "x")
LABEL_KEYS = ("labels", "targets")
# Loaders and iterables are read once, into memory.
MAX_READ_BYTES = 4 << 30


def from_arrays(
    name: str,
    arrays: Sequence[np.ndarray],
    keys: Sequence[str],
    labels: Any,
    specs: tuple[TensorSpec, ...],
    notes: tuple[str, ...] = (),
) -> Samples:
    """Samples in memory, after all the checks that can be made on them; `keys` name the arrays in messages."""
    n = len(arrays[0]) if arrays[0].ndim else 0
    layouts = []
    for array, key, spec in zip(arrays, keys, specs, strict=True):
        where = f"{name}: {key}"
        if array.ndim == 0 or len(array) == 0:
            raise EdgecError("has no samples", where=where)
        if len(array) != n:
            raise EdgecError(f"has {len(array)} samples, {keys[0]} has {n}", where=where)
        layouts.append(fit_layout(array.shape[1:], spec, where))
        check_dtype(array.dtype, spec, where)
        check_finite(array, where)
    targets = None if labels is None else clean_targets(np.asarray(labels), f"{name}: labels")
    if targets is not None and len(targets) != n:
        raise EdgecError(f"{len(targets)} labels for {n} samples", where=name)
    return Samples(ArraySource(tuple(arrays), tuple(layouts), targets), (*notes, *layout_notes(layouts)))


# -- .npz --------------------------------------------------------------------------------------------------------------


def read_npz(path: Path, specs: tuple[TensorSpec, ...]) -> Samples:
    """Samples of a `.npz` archive: see `edgec.data.load_data` for the names of its arrays."""
    stored = _read_archive(path)
    keys = _input_keys(stored, specs, path)
    arrays = []
    notes: tuple[str, ...] = ()
    for key in keys:
        array = stored[key]
        if key == "features_int8":
            array = _dequantize(stored, path)
            notes = ("features_int8 dequantised with the stored scale and zero point",)
        arrays.append(array)
    labels = next((stored[key] for key in LABEL_KEYS if key in stored), None)
    return from_arrays(str(path), arrays, keys, labels, specs, notes)


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    broken = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OSError, NotImplementedError)
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise EdgecError("is not a .npz archive", where=str(path), hint="write it with numpy.savez")
        with archive:
            return {key: archive[key] for key in archive.files}
    except broken as error:
        if isinstance(error, OSError) and error.strerror:
            raise EdgecError(f"cannot be read: {error.strerror}", where=str(path)) from error
        reason = "contains Python objects" if "pickle" in str(error) and zipfile.is_zipfile(path) else "is corrupt"
        raise EdgecError(
            f"{reason} and cannot be read", where=str(path), hint="write plain arrays with numpy.savez"
        ) from error


def _input_keys(stored: Mapping[str, np.ndarray], specs: tuple[TensorSpec, ...], path: Path) -> list[str]:
    found = ", ".join(f"{k} {v.dtype}{v.shape}" for k, v in stored.items()) or "nothing"
    if len(specs) == 1:
        names = (specs[0].name, *INPUT_KEYS)
        key = next((name for name in names if name in stored), None)
        if key is not None:
            return [key]
        raise EdgecError(
            f"has no input array (found {found})",
            where=str(path),
            hint=f"name it one of {', '.join(dict.fromkeys(names))}",
        )
    missing = [spec.name for spec in specs if spec.name not in stored]
    if missing:
        raise EdgecError(
            f"has no array for input {', '.join(missing)} (found {found})",
            where=str(path),
            hint="the model has several inputs; store one array per input under its name",
        )
    return [spec.name for spec in specs]


def _dequantize(stored: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """float32 (q - zero_point) * scale."""
    where = f"{path}: features_int8"
    codes = stored["features_int8"]
    if codes.dtype != np.int8:
        raise EdgecError(f"dtype is {codes.dtype}, not int8", where=where)
    for key in ("scale", "zero_point"):
        if key not in stored:
            raise EdgecError(f"needs '{key}' in the same file", where=where)
        if stored[key].size != 1 or stored[key].dtype.kind not in "iuf" or not np.isfinite(stored[key]).all():
            raise EdgecError(f"'{key}' is not one finite number", where=where)
    return (codes.astype(np.float32) - np.float32(stored["zero_point"].item())) * np.float32(stored["scale"].item())


# -- folders of images -------------------------------------------------------------------------------------------------


def read_folder(folder: Path, specs: tuple[TensorSpec, ...]) -> Samples:
    """Samples of a folder of class folders of images, or of unlabelled images; decoded when they are used."""
    if len(specs) != 1 or len(specs[0].shape) != 4:
        shapes = ", ".join(str(sample_shape(spec)) for spec in specs)
        raise EdgecError(f"is a folder of images, but the model takes {shapes}", where=str(folder))
    height, width, grey, layout = _image_shape(specs[0], folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if _is_image(entry)]
    if classes and loose:
        raise EdgecError(
            f"has images ({loose[0].name}, …) beside class folders ({classes[0].name}, …)",
            where=str(folder),
            hint="put every image into the folder of its class",
        )
    files, labels = loose, None
    if classes:
        groups = [sorted(file for file in entry.rglob("*") if _is_image(file)) for entry in classes]
        if any(groups):
            empty = [entry.name for entry, group in zip(classes, groups, strict=True) if not group]
            if empty:
                raise EdgecError(
                    f"class folder '{empty[0]}' has no images",
                    where=str(folder),
                    hint="remove it, or the class numbers would shift silently",
                )
        files = [file for group in groups for file in group]
        labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    if not files:
        raise EdgecError("has no images", where=str(folder), hint=f"known endings: {' '.join(IMAGE_SUFFIXES)}")
    source = ImageSource(tuple(files), labels, height, width, grey, layout)
    note = f"images resized to {height}x{width} (bilinear), {'grey' if grey else 'RGB'}"
    return Samples(source, (note,), tuple(entry.name for entry in classes) or None)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _image_shape(spec: TensorSpec, folder: Path) -> tuple[int, int, bool, Layout]:
    """Height, width, grey or not, and the layout from height x width x channels, of a model that takes images."""
    shape = sample_shape(spec)
    if shape[0] in (1, 3):
        return shape[1], shape[2], shape[0] == 1, Layout(shape, (2, 0, 1))
    if shape[2] in (1, 3):
        return shape[0], shape[1], shape[2] == 1, Layout(shape)
    raise EdgecError(
        f"holds images, but input '{spec.name}' of shape {shape} has neither 1 nor 3 channels", where=str(folder)
    )


# -- Python objects ----------------------------------------------------------------------------------------------------


def read_object(value: Any, name: str, specs: tuple[TensorSpec, ...], seed: int) -> Samples:
    """Samples of a PyTorch dataset or loader, an iterable or arrays: see `edgec.data.load_data`."""
    keys = [spec.name for spec in specs] if len(specs) > 1 else ["x"]
    if _are_inputs(value, len(specs)) and not isinstance(value, list):
        xs = value if isinstance(value, tuple) else (value,)
        return from_arrays(name, [to_numpy(x) for x in xs], keys, None, specs)
    if isinstance(value, tuple) and len(value) == 2 and is_array(value[1]) and _are_inputs(value[0], len(specs)):
        xs = value[0] if isinstance(value[0], (tuple, list)) else (value[0],)
        return from_arrays(name, [to_numpy(x) for x in xs], keys, to_numpy(value[1]), specs)
    if _is_map_style(value):
        return _load_map(value, name, specs)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return _load_iterable(value, name, specs, seed)
    raise EdgecError(
        f"{type(value).__name__} is not data",
        where=name,
        hint="give a DataLoader, a dataset, an iterable of (x, y), or arrays (x, y)",
    )


def _are_inputs(value: Any, count: int) -> bool:
    if count == 1 and is_array(value):
        return True
    return isinstance(value, (tuple, list)) and len(value) == count and all(is_array(x) for x in value)


def _is_map_style(value: Any) -> bool:
    # torch's IterableDataset inherits a __getitem__ that only raises.
    torch = sys.modules.get("torch")
    if isinstance(value, (list, tuple, Mapping)) or (
        torch is not None and isinstance(value, torch.utils.data.IterableDataset)
    ):
        return False
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _load_map(value: Any, name: str, specs: tuple[TensorSpec, ...]) -> Samples:
    if len(value) == 0:
        raise EdgecError("has no samples", where=name)
    xs, _ = read_item(value, 0, name, len(specs))
    layouts = tuple(fit_layout(x.shape, spec, name) for x, spec in zip(xs, specs, strict=True))
    source = MapSource(value, name, specs, layouts, tuple(x.shape for x in xs))
    source.read(np.array([0]))  # so that a wrong dtype or target is reported at once
    return Samples(source, layout_notes(layouts))


def _load_iterable(value: Iterable[Any], name: str, specs: tuple[TensorSpec, ...], seed: int) -> Samples:
    columns: list[list[np.ndarray]] = [[] for _ in specs]
    targets: list[Any] = []
    batched: bool | None = None
    size = 0
    # Seeded, so that shuffling and augmentation repeat exactly.
    with seeded(seed):
        for item in _iterate(value, name):
            xs, y = split_item(item, len(specs), name)
            if batched is None:
                batched = _is_batch(xs[0], specs[0], loader=_is_loader(value))
            for column, x in zip(columns, xs, strict=True):
                x = x if batched else x[None]
                if column and x.shape[1:] != column[0].shape[1:]:
                    raise EdgecError(f"yields shapes {column[0].shape[1:]} and {x.shape[1:]}", where=name)
                # A loader may reuse the memory of its batches.
                column.append(x.copy())
                size += x.nbytes
            targets.extend(_split_targets(y, len(xs[0]), name) if batched else [y])
            if size > MAX_READ_BYTES:
                raise EdgecError(
                    f"yields more than {MAX_READ_BYTES >> 20} MiB",
                    where=name,
                    hint="give fewer samples, or a map-style dataset, which is read when needed",
                )
    if not columns[0]:
        raise EdgecError("has no samples", where=name)
    keys = [spec.name for spec in specs] if len(specs) > 1 else ["x"]
    arrays = [np.concatenate(column) for column in columns]
    return from_arrays(name, arrays, keys, stack_targets(targets, name), specs)


def _iterate(value: Iterable[Any], name: str) -> Iterator[Any]:
    with user_code(name):
        iterator = iter(value)
    while True:
        with user_code(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _split_targets(y: Any, n: int, name: str) -> list[Any]:
    """The targets of a batch of `n` samples, one by one."""
    if y is None:
        return [None] * n
    y = to_numpy(y)
    if y.ndim == 0 or len(y) != n:
        raise EdgecError(f"yields {y.size} labels with a batch of {n} samples", where=name)
    return list(y)


def _is_loader(value: Any) -> bool:
    return hasattr(value, "batch_size") and value.batch_size is not None


def _is_batch(x: np.ndarray, spec: TensorSpec, *, loader: bool) -> bool:
    """Whether `x` is a batch rather than a sample; a loader with a batch size is believed first."""
    wanted = sample_shape(spec)
    sample = match_layout(x.shape, wanted) is not None
    batch = x.ndim > 0 and match_layout(x.shape[1:], wanted) is not None
    return batch and (loader or not sample)
