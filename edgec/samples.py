"""Stored samples and how they fit a model: layouts, and the sources that samples are read from.

No torch here: tensors are recognised only when torch is loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgec.errors import EdgecError
from edgec.usercode import seeded, user_code

if TYPE_CHECKING:
    from edgec.program import TensorSpec

# Decoded image files are kept in memory up to this bound.
MAX_CACHE_BYTES = 1 << 30


def sample_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of one sample: without dimension 0, the batch."""
    return tuple(spec.shape[1:])


def numpy_dtype(spec: TensorSpec) -> np.dtype[Any]:
    """Raises EdgecError for a dtype that NumPy lacks (bfloat16)."""
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError:
        dtype = None
    # Once ml_dtypes is loaded, which onnx and TVM do, NumPy knows the name.
    if dtype is None or dtype.isbuiltin != 1:
        raise EdgecError(
            f"dtype {spec.dtype} cannot be fed from data",
            where=f"input '{spec.name}'",
            hint="export the model with float32 inputs",
        )
    return dtype


# -- layouts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a stored sample becomes a sample of the model: transpose by `axes`, reshape to `shape`, change channels.

    channels: "keep", "repeat" (grey to RGB) or "luma" (RGB to grey, ITU-R BT.601 weights, as Pillow's "L").
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    channels: str = "keep"

    @property
    def note(self) -> str | None:
        """One line for the report, or None when nothing but a unit axis changes."""
        if self.channels == "repeat":
            return "grey samples repeated to 3 channels"
        if self.channels == "luma":
            return "RGB samples converted to grey"
        if self.axes is not None:
            return "samples transposed to the model's " + ("NCHW" if self.axes == (2, 0, 1) else "NHWC")
        return None

    def apply(self, batch: np.ndarray) -> np.ndarray:
        """`batch` [n, *stored] as [n, *model]."""
        if self.axes is not None:
            batch = batch.transpose(0, *(axis + 1 for axis in self.axes))
        batch = batch.reshape(len(batch), *self.shape)
        if self.channels == "repeat":
            return np.repeat(batch, 3, axis=1)
        if self.channels == "luma":
            return _luma(batch)
        return batch


def _luma(batch: np.ndarray) -> np.ndarray:
    """[n, 3, h, w] to [n, 1, h, w]; integers are rounded as Pillow rounds them (16-bit fixed point)."""
    if batch.dtype == np.uint8:
        weights = np.array([19595, 38470, 7471], np.int64)
        grey = (np.tensordot(batch.astype(np.int64), weights, axes=([1], [0])) + 0x8000) >> 16
        return grey.astype(np.uint8)[:, None]
    weights = np.array([0.299, 0.587, 0.114], batch.dtype)
    return np.tensordot(batch, weights, axes=([1], [0]))[:, None]


def match_layout(stored: tuple[int, ...], wanted: tuple[int, ...]) -> Layout | None:
    """How samples of shape `stored` fit a model that wants samples of shape `wanted`, or None.

    Tried in this order: as they are; HWC for CHW and the reverse; unit axes added or removed; grey for RGB and the
    reverse (models in CHW only).
    """
    if stored == wanted:
        return Layout(wanted)
    if len(stored) == len(wanted) == 3:
        for axes in ((2, 0, 1), (1, 2, 0)):
            if tuple(stored[axis] for axis in axes) == wanted:
                return Layout(wanted, axes)
    if _without_ones(stored) == _without_ones(wanted):
        return Layout(wanted)
    if len(wanted) != 3:
        return None
    channels, *plane = wanted
    if channels == 3 and _without_ones(stored) == _without_ones(tuple(plane)):
        return Layout((1, *plane), channels="repeat")
    if channels == 1 and stored == (3, *plane):
        return Layout((3, *plane), channels="luma")
    if channels == 1 and stored == (*plane, 3):
        return Layout((3, *plane), (2, 0, 1), channels="luma")
    return None


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d in shape if d != 1)


def fit_layout(stored: tuple[int, ...], spec: TensorSpec, where: str) -> Layout:
    layout = match_layout(stored, sample_shape(spec))
    if layout is None:
        raise EdgecError(
            f"samples have shape {stored}, input '{spec.name}' of the model wants {sample_shape(spec)}",
            where=where,
            hint="store the data at the model's size (a folder of images is resized when read)",
        )
    return layout


def layout_notes(layouts: Sequence[Layout]) -> tuple[str, ...]:
    """The conversions worth reporting, each once."""
    return tuple(dict.fromkeys(layout.note for layout in layouts if layout.note))


def check_dtype(dtype: np.dtype[Any], spec: TensorSpec, where: str) -> None:
    wanted = numpy_dtype(spec)
    if wanted.kind == "f":
        fits, expected = dtype == np.uint8 or dtype.kind == "f", "uint8 or float32"
    else:
        fits, expected = dtype.kind in "iub" and np.can_cast(dtype, wanted, "same_kind"), f"integers ({spec.dtype})"
    if not fits:
        raise EdgecError(f"dtype is {dtype}, input '{spec.name}' takes {expected}", where=where)


# -- sources -----------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where samples come from: arrays in the model's layout but with stored values."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """One array [n, *sample] per input, and targets [n, ...] or None."""
        ...

    def targets(self, indices: np.ndarray) -> np.ndarray | None:
        """Targets alone, without the cost of the inputs where that is possible."""
        ...


@dataclass(frozen=True, eq=False)
class Samples:
    """What a reader found. notes: conversions for the report; class_names: the folders of classes, or None."""

    source: Source
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Arrays in memory; `arrays[i]` is [n, *stored]."""

    arrays: tuple[np.ndarray, ...]
    layouts: tuple[Layout, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.arrays[0])

    def read(self, indices: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        parts = (layout.apply(array[indices]) for array, layout in zip(self.arrays, self.layouts, strict=True))
        return tuple(parts), self.targets(indices)

    def targets(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.labels is None else self.labels[indices]


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Image files, decoded when they are read, resized (bilinear, with antialiasing) to height x width."""

    files: tuple[Path, ...]
    labels: np.ndarray | None
    height: int
    width: int
    grey: bool
    layout: Layout
    _cache: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        images = np.stack([self._image(int(index)) for index in indices])
        return (self.layout.apply(images),), self.targets(indices)

    def targets(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.labels is None else self.labels[indices]

    def _image(self, index: int) -> np.ndarray:
        if index in self._cache:
            return self._cache[index]
        from PIL import Image

        try:
            with Image.open(self.files[index]) as file:
                image = file.convert("L" if self.grey else "RGB")
                image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise EdgecError(
                f"cannot be read as an image ({type(error).__name__})",
                where=str(self.files[index]),
                hint="repair or remove the file",
            ) from error
        array = np.asarray(image, np.uint8).reshape(self.height, self.width, 1 if self.grey else 3)
        if (len(self._cache) + 1) * array.nbytes <= MAX_CACHE_BYTES:
            self._cache[index] = array
        return array


@dataclass(frozen=True, eq=False)
class MapSource:
    """A PyTorch map-style dataset, read item by item.

    Random augmentation would make two evaluations see different samples, so the generators of Python, NumPy and
    torch are seeded with the index around each item.
    """

    items: Any
    name: str
    specs: tuple[TensorSpec, ...]
    layouts: tuple[Layout, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, indices: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        inputs: list[list[np.ndarray]] = [[] for _ in self.specs]
        targets = []
        for index in indices:
            xs, y = self._item(int(index))
            for column, x in zip(inputs, xs, strict=True):
                column.append(x)
            targets.append(y)
        batches = (layout.apply(np.stack(c)) for layout, c in zip(self.layouts, inputs, strict=True))
        return tuple(batches), stack_targets(targets, self.name)

    def targets(self, indices: np.ndarray) -> np.ndarray | None:
        return stack_targets([self._item(int(index))[1] for index in indices], self.name)

    def _item(self, index: int) -> tuple[tuple[np.ndarray, ...], Any]:
        xs, y = read_item(self.items, index, self.name, len(self.specs))
        for x, spec, shape in zip(xs, self.specs, self.shapes, strict=True):
            if x.shape != shape:
                raise EdgecError(f"sample {index} has shape {x.shape}, sample 0 has {shape}", where=self.name)
            check_dtype(x.dtype, spec, f"{self.name}, sample {index}")
        return xs, y


def read_item(items: Any, index: int, name: str, inputs: int) -> tuple[tuple[np.ndarray, ...], Any]:
    with user_code(name), seeded(index):
        item = items[index]
    return split_item(item, inputs, name)


# -- values and targets ------------------------------------------------------------------------------------------------


def is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_tensor(value: Any) -> bool:
    # An object can only be a tensor when torch is loaded already.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_numpy(value: Any) -> np.ndarray:
    """A tensor, array, image, list or number as an array; bfloat16, which NumPy lacks, as float32."""
    if is_tensor(value):
        value = value.detach().cpu()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value)


def split_item(item: Any, inputs: int, name: str) -> tuple[tuple[np.ndarray, ...], Any]:
    """(inputs, target or None) of one element of a dataset or loader."""
    if isinstance(item, (str, bytes, Mapping)) or item is None:
        raise EdgecError(
            f"yields {type(item).__name__}", where=name, hint="yield x or (x, y), x being an array or a tuple of arrays"
        )
    xs, y = item, None
    if isinstance(item, (tuple, list)):
        if len(item) == 2 and (inputs == 1 or (isinstance(item[0], (tuple, list)) and len(item[0]) == inputs)):
            xs, y = item
        elif len(item) == inputs + 1:
            xs, y = item[:-1], item[-1]
    if not isinstance(xs, (tuple, list)):
        xs = (xs,)
    if len(xs) != inputs:
        raise EdgecError(
            f"yields {len(xs)} values where the model has {inputs} input{'s' if inputs > 1 else ''}",
            where=name,
            hint="yield x or (x, y), x being an array or a tuple of arrays",
        )
    return tuple(to_numpy(x) for x in xs), y


def stack_targets(targets: list[Any], name: str) -> np.ndarray | None:
    """One array [n, ...] of the targets of n samples, or None when no sample has one."""
    missing = sum(y is None for y in targets)
    if missing == len(targets):
        return None
    if missing:
        raise EdgecError(f"{missing} of {len(targets)} samples have no label", where=name)
    try:
        stacked = np.stack([to_numpy(y) for y in targets])
    except ValueError:
        shapes = sorted({str(to_numpy(y).shape) for y in targets})
        raise EdgecError(f"has targets of different shapes ({', '.join(shapes)})", where=name) from None
    return clean_targets(stacked, f"{name}: labels")


def check_finite(array: np.ndarray, where: str) -> None:
    """Raise EdgecError naming the first of the samples [n, ...] with a NaN or an infinite value."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
        raise EdgecError(f"sample {bad} has NaN or infinite values", where=where, hint="remove or repair the sample")


def clean_targets(targets: np.ndarray, where: str) -> np.ndarray:
    """Class indices as int64 [n], floats as float32 [n, ...], maps of integers [n, ...] as stored."""
    if targets.ndim == 0:
        raise EdgecError("is a single number, not one target per sample", where=where)
    if targets.dtype.kind in "iub":
        targets = targets[:, 0] if targets.ndim == 2 and targets.shape[1] == 1 else targets
        return targets.astype(np.int64) if targets.ndim == 1 else targets
    if targets.dtype.kind != "f":
        raise EdgecError(f"dtype is {targets.dtype}", where=where, hint="store class indices or float targets")
    targets = targets.astype(np.float32)
    check_finite(targets, where)
    return targets
