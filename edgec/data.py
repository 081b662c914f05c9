"""Data for calibration and for checks: one `Dataset`, many places it can come from.

A Dataset holds raw samples (as stored) and hands out batches as the model wants them: its layout, its dtype, scaled
and normalised. It is read in NumPy; torch is imported only when tensors are asked for, so that a bundle can be
evaluated on a machine without torch.

`load_data` reads `.npz` files, folders of images, PyTorch datasets and loaders, and in-memory arrays. Every
conversion that it makes on the way is listed in `Dataset.notes`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.errors import EdgecError
from edgec.readers import read_folder, read_npz, read_object
from edgec.samples import ArraySource, Layout, Samples, is_array, numpy_dtype, sample_shape
from edgec.usercode import load_function, user_code

if TYPE_CHECKING:
    import torch

    from edgec.program import TensorSpec

HASH_CHUNK = 256

Indices = int | slice | Sequence[int] | np.ndarray


# -- preprocessing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """What happens to a stored value x before the model sees it: (x * scale - mean) / std, in float32.

    mean, std: one number for everything or one per channel, in units of the scaled values.
    scale: None means 1/255 for uint8 data and 1 for floating-point data; 1.0 keeps uint8 images at 0..255.
    Raises EdgecError for values that are not finite and for values of `std` and `scale` that are not positive.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std), ("input-scale", self.scale)):
            if values is None:
                continue
            numbers = tuple(values) if isinstance(values, (tuple, list)) else (values,)
            if name != "input-scale":
                object.__setattr__(self, name, numbers)
            text = ",".join(str(v) for v in numbers)
            if not numbers or not all(math.isfinite(v) for v in numbers):
                raise EdgecError(f"'{text}' is not a list of finite numbers", where=f"--{name}")
            if name != "mean" and any(v <= 0 for v in numbers):
                raise EdgecError(f"'{text}' contains a value that is not positive", where=f"--{name}")

    def apply(self, raw: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """The batch `raw` [n, *sample], already in the model's layout, as the model wants it.

        Raises EdgecError when the input is an integer one and a value does not fit its dtype.
        """
        dtype = numpy_dtype(spec)
        if dtype.kind != "f":
            cast = raw.astype(dtype)
            if not np.array_equal(cast, raw):
                raise EdgecError(f"values do not fit {spec.dtype}", where=f"input '{spec.name}'")
            return cast
        scale = self.scale if self.scale is not None else (1 / 255 if raw.dtype == np.uint8 else 1.0)
        # Overflow gives infinities, which the Dataset reports with the number of the sample.
        with np.errstate(over="ignore"):
            x = raw.astype(np.float32)
            if scale != 1.0:
                x *= np.float32(scale)
            if self.mean is not None:
                x -= self._per_channel(self.mean, spec)
            if self.std is not None:
                x /= self._per_channel(self.std, spec)
            return x.astype(dtype, copy=False)

    def check(self, spec: TensorSpec) -> None:
        """Raise EdgecError when `mean` or `std` does not fit the channels of this input."""
        if numpy_dtype(spec).kind != "f":
            return
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) > 1 and _channel_axis(len(values), spec) is None:
                raise EdgecError(
                    f"{len(values)} values for input '{spec.name}' of shape {sample_shape(spec)}",
                    where=f"--{name}",
                    hint="give one value, or one per channel",
                )

    @staticmethod
    def _per_channel(values: tuple[float, ...], spec: TensorSpec) -> np.ndarray:
        if len(values) == 1:
            return np.asarray(values, np.float32)
        axis = _channel_axis(len(values), spec)
        assert axis is not None, "check() was not called"
        shape = [1] * len(spec.shape)
        shape[axis] = len(values)
        return np.asarray(values, np.float32).reshape(shape)

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "scale": self.scale,
        }


def _channel_axis(channels: int, spec: TensorSpec) -> int | None:
    """The axis of the batched shape that has this many channels: the first after the batch, else the last."""
    for axis in (1, len(spec.shape) - 1):
        if 1 <= axis < len(spec.shape) and spec.shape[axis] == channels:
            return axis
    return None


# -- the dataset -------------------------------------------------------------------------------------------------------


class Dataset:
    """Samples for one model. Deterministic: the same index always gives the same sample.

    name: what the user wrote. specs: the model's inputs. class_names: from a folder of classes, else None.
    notes: conversions made on the way to the model, for the report.
    """

    def __init__(
        self,
        name: str,
        samples: Samples,
        specs: Sequence[TensorSpec],
        preprocess: Preprocess | None = None,
        indices: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self.specs = tuple(specs)
        self.preprocess = preprocess or Preprocess()
        self.class_names = samples.class_names
        self.notes = samples.notes
        self._samples = samples
        self._source = samples.source
        self._indices = np.arange(len(samples.source)) if indices is None else indices
        if self.preprocess != Preprocess() and all(numpy_dtype(spec).kind != "f" for spec in self.specs):
            raise EdgecError(
                "the model has integer inputs only, which are not scaled", where="--mean, --std, --input-scale"
            )
        for spec in self.specs:
            self.preprocess.check(spec)
        if len(self._indices) == 0:
            raise EdgecError("has no samples", where=name)

    def __len__(self) -> int:
        return len(self._indices)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} samples)"

    def read(self, indices: Indices = slice(None)) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """(one array [n, *sample] per model input, targets [n, ...] or None) for these samples.

        Raises EdgecError when a value is NaN or infinite, and when a file or item cannot be read.
        """
        rows = self._rows(indices)
        raw, targets = self._source.read(rows)
        arrays = []
        for batch, spec in zip(raw, self.specs, strict=True):
            x = np.ascontiguousarray(self.preprocess.apply(batch, spec))
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                bad = int(np.argmin(np.isfinite(x.reshape(len(x), -1)).all(axis=1)))
                raise EdgecError(
                    f"sample {rows[bad]} of input '{spec.name}' has NaN or infinite values",
                    where=self.name,
                    hint="remove the sample, or check --mean, --std and --input-scale",
                )
            arrays.append(x)
        return tuple(arrays), targets

    def inputs(self, indices: Indices = slice(None), which: int = 0) -> torch.Tensor:
        """The batch of samples for model input number `which`, as a tensor."""
        import torch

        return torch.from_numpy(self.read(indices)[0][which])

    def targets(self, indices: Indices = slice(None)) -> np.ndarray | None:
        """int64 class indices [n], or float targets [n, ...], or None."""
        return self._source.targets(self._rows(indices))

    @property
    def labels(self) -> np.ndarray | None:
        """All targets. For a PyTorch dataset this reads every item."""
        return self.targets()

    def batches(self, size: int) -> Iterator[tuple[tuple[torch.Tensor, ...], np.ndarray | None]]:
        """Yield (tensors, targets) in order; the last batch may be smaller."""
        import torch

        for start in range(0, len(self), size):
            arrays, targets = self.read(slice(start, start + size))
            yield tuple(torch.from_numpy(x) for x in arrays), targets

    def take(self, indices: Indices) -> Dataset:
        """The dataset of these samples, in this order."""
        return Dataset(self.name, self._samples, self.specs, self.preprocess, self._rows(indices))

    def limit(self, n: int, seed: int = 0) -> Dataset:
        """At most `n` samples, drawn without replacement by `seed`, in their original order."""
        if n < 1:
            raise EdgecError(f"{n} samples asked for", where=self.name, hint="ask for at least 1")
        if n >= len(self):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[:n]
        return self.take(np.sort(chosen))

    def check_labels(self, classes: int) -> None:
        """Raise EdgecError unless the targets are class indices in 0..classes-1."""
        labels = self.labels
        if labels is None:
            raise EdgecError("has no labels", where=self.name, hint="add an array 'labels'")
        check_class_labels(labels, classes, self.name)

    def sha256(self) -> str:
        """Hex digest of the samples (stored values in the model's layout) and the targets; not of the preprocessing."""
        digest = hashlib.sha256()
        for start in range(0, len(self), HASH_CHUNK):
            inputs, targets = self._source.read(self._indices[start : start + HASH_CHUNK])
            for array in (*inputs, *([] if targets is None else [targets])):
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain data for a manifest: name, number of samples, content hash, preprocessing, conversions."""
        return {
            "name": self.name,
            "n": len(self),
            "sha256": self.sha256(),
            "preprocess": self.preprocess.to_json(),
            "notes": list(self.notes),
        }

    def _rows(self, indices: Indices) -> np.ndarray:
        return self._indices[indices if isinstance(indices, slice) else np.atleast_1d(np.asarray(indices))]


def check_class_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Raise EdgecError unless `labels` [n] are integers in 0..classes-1."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise EdgecError(
            f"labels are {labels.dtype} of shape {labels.shape}, not one class index per sample",
            where=where,
            hint="store integers, or choose another metric",
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= classes:
        raise EdgecError(
            f"labels are in {low}..{high}, the model has {classes} classes (0..{classes - 1})",
            where=where,
            hint="renumber the labels or check that data and model belong together",
        )


# -- loading -----------------------------------------------------------------------------------------------------------

FORMS = "use a .npz file, a folder of images or file.py:factory"


def load_data(
    spec: Any, input_specs: Sequence[TensorSpec], preprocess: Preprocess | None = None, *, seed: int = 0
) -> Dataset:
    """The data that `spec` names, fitted to a model with these inputs.

    spec, as text (any of them may end in a slice, `test.npz[100:356]`):
        `file.npz` with `images` (uint8 or float32; NHWC, NCHW or without the channel axis), or `inputs`, `features`,
            `x`, or the name of the model input; or `features_int8` with `scale` and `zero_point`, which becomes
            (q - zero_point) * scale; optionally `labels` or `targets`. A model with several inputs wants one array
            per input, by name.
        a folder with one sub-folder of images per class, classes numbered in sorted order; or a folder of images,
            unlabelled. Images are resized to the model's height and width.
        `file.py:factory` or `package.module:factory`, a function without arguments that returns one of the following.
    or an object: a Dataset of edgec; a pair of arrays (x, y); an array x; a PyTorch DataLoader; a PyTorch map-style
        dataset, read item by item when needed; an iterable of samples or batches, (x, y) or x. Loaders and iterables
        are read once, into memory, with the random generators seeded by `seed`.

    Raises EdgecError when the data is missing, empty, corrupt, of the wrong shape or dtype, contains NaN, or has
    another number of labels than of samples.
    """
    specs = tuple(input_specs)
    preprocess = preprocess or Preprocess()
    if isinstance(spec, (str, Path)):
        return _load_text(str(spec), specs, preprocess, seed)
    if isinstance(spec, Dataset):
        return _fitting(spec, specs)
    name = "arrays" if isinstance(spec, tuple) or is_array(spec) else type(spec).__name__
    return Dataset(name, read_object(spec, name, specs, seed), specs, preprocess)


def random_data(
    input_specs: Sequence[TensorSpec], n: int, seed: int = 0, examples: Sequence[np.ndarray | Any] | None = None
) -> Dataset:
    """`n` samples of noise: uniform in 0..1 for floating-point inputs, 0 or 1 for integer inputs.

    examples: one for each input; integers are drawn from those in it, where any is not zero: a model takes no others
    for granted.
    """
    generator = np.random.default_rng(seed)
    arrays = []
    for position, spec in enumerate(input_specs):
        shape = (n, *sample_shape(spec))
        known = np.asarray([] if examples is None else examples[position])
        if numpy_dtype(spec).kind == "f":
            arrays.append(generator.random(shape, dtype=np.float32))
        elif known.any():
            arrays.append(generator.choice(known.reshape(-1), shape).astype(numpy_dtype(spec)))
        else:
            arrays.append(generator.integers(0, 2, shape).astype(numpy_dtype(spec)))
    layouts = tuple(Layout(sample_shape(spec)) for spec in input_specs)
    return Dataset("random noise", Samples(ArraySource(tuple(arrays), layouts, None)), input_specs)


def _load_text(text: str, specs: tuple[TensorSpec, ...], preprocess: Preprocess, seed: int) -> Dataset:
    path, part = _split_slice(text)
    if re.fullmatch(r".+:[A-Za-z_]\w*", path) and not Path(path).exists():
        function = load_function(path)
        with user_code(path):
            made = function()
        if isinstance(made, Dataset):
            return _cut(_fitting(made, specs), part, text)
        samples = read_object(made, path, specs, seed)
    elif not Path(path).exists():
        raise EdgecError("does not exist", where=path, hint=FORMS)
    elif Path(path).is_dir():
        samples = read_folder(Path(path), specs)
    elif Path(path).suffix == ".npz":
        samples = read_npz(Path(path), specs)
    else:
        raise EdgecError("is not a form of data that can be read", where=path, hint=FORMS)
    return _cut(Dataset(text, samples, specs, preprocess), part, text)


def _fitting(dataset: Dataset, specs: tuple[TensorSpec, ...]) -> Dataset:
    """`dataset` itself, if it was made for a model with these inputs."""
    made, want = (", ".join(f"{s.dtype}{sample_shape(s)}" for s in side) for side in (dataset.specs, specs))
    if made != want:
        raise EdgecError(f"was made for a model with inputs {made}, this one wants {want}", where=dataset.name)
    return dataset


def _split_slice(text: str) -> tuple[str, tuple[int | None, int | None] | None]:
    """`file.npz[10:20]` is ("file.npz", (10, 20)); a name that exists as written is never split."""
    if not text.endswith("]") or "[" not in text or Path(text).exists():
        return text, None
    path, _, inside = text[:-1].rpartition("[")
    match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", inside)
    if match is None:
        raise EdgecError(f"cannot read the slice '[{inside}]'", where=text, hint="write name[start:stop]")
    start, stop = (int(g) if g else None for g in match.groups())
    return path, (start, stop)


def _cut(dataset: Dataset, part: tuple[int | None, int | None] | None, text: str) -> Dataset:
    if part is None:
        return dataset
    start = part[0] or 0
    stop = len(dataset) if part[1] is None else part[1]
    if stop > len(dataset) or start >= stop:
        raise EdgecError(
            f"slice {start}:{stop} does not lie in the {len(dataset)} samples",
            where=text,
            hint=f"use 0 <= start < stop <= {len(dataset)}",
        )
    return dataset.take(slice(start, stop))
