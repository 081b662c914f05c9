"""Elements in other places: `c/layout.h`.

Transpositions stand for a template. The other kernels have none: on other devices TVM's operators do what they do, and
`edgec.lowering.binding` makes them for microcontrollers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand, Value

AXES = 4
PARTS = (2, 3, 4)
SUFFIXES = {"int8": "i8", "float32": "f32"}


@dataclass(frozen=True)
class Permute(McuKernel):
    """`Transpose`."""

    spec: Transpose
    name = "transpose"

    def operands(self) -> tuple[Operand, ...]:
        operand = Operand(math.prod(self.spec.shape), self.spec.dtype)
        return operand, operand

    def call(self) -> Call:
        shape, permutation = self.spec.merged()
        steps = [math.prod(shape[axis + 1 :]) for axis in permutation]
        sizes = [shape[axis] for axis in permutation]
        rest = AXES - len(sizes)
        fields = {"sizes": (1,) * rest + tuple(sizes), "steps": (0,) * rest + tuple(steps)}
        return Call(f"ek_transpose_{SUFFIXES[self.spec.dtype]}", "layout", "ek_transpose_t", fields)


@dataclass(frozen=True)
class Move(McuKernel):
    """y[start + i * to] = x[first + i * from_] for all i in 0 .. sizes, in elements; the rest of y, if any, is `fill`.

    elements: of x and y. A step `from_` of 0 repeats. Raises ValueError when more than four axes are left after
    neighbours that are alike are joined: see `runs`.
    """

    name: str  # type: ignore[misc]
    elements: tuple[int, int]
    sizes: tuple[int, ...]
    from_: tuple[int, ...]
    to: tuple[int, ...]
    first: int = 0
    start: int = 0
    fill: int = 0
    dtype: str = "int8"

    def __post_init__(self) -> None:
        if len(self.runs()[0]) > AXES:
            raise ValueError(f"moves along {self.sizes} from {self.from_} to {self.to} have more than {AXES} axes")

    def operands(self) -> tuple[Operand, ...]:
        return Operand(self.elements[0], self.dtype), Operand(self.elements[1], self.dtype)

    def runs(self) -> tuple[list[tuple[int, int, int]], int]:
        """([(size, from, to) of each axis], elements of a run), with as few axes as possible."""
        axes: list[tuple[int, int, int]] = []
        for size, here, there in zip(self.sizes, self.from_, self.to, strict=True):
            if size == 1:
                continue
            if axes and axes[-1][1:] == (here * size, there * size):
                axes[-1] = (axes[-1][0] * size, here, there)
            else:
                axes.append((size, here, there))
        run = axes.pop()[0] if axes and axes[-1][1:] == (1, 1) else 1
        return axes, run

    def call(self) -> Call:
        axes, run = self.runs()
        width = np.dtype(self.dtype).itemsize
        axes = [(1, 0, 0)] * (AXES - len(axes)) + axes
        fields: dict[str, Value] = {"sizes": tuple(size for size, *_ in axes)}
        fields |= {"from": tuple(width * step for _, step, _ in axes), "to": tuple(width * step for *_, step in axes)}
        fields |= {"first": width * self.first, "start": width * self.start, "run": width * run}
        if math.prod(self.sizes) < self.elements[1]:
            fields |= {"filled": width * self.elements[1], "fill": self.fill}
        return Call("ek_move", "layout", "ek_move_t", fields)


@dataclass(frozen=True)
class Concat(McuKernel):
    """Two to four tensors as one: `rows` times parts[0] elements of the first one, parts[1] of the second, ..."""

    rows: int
    parts: tuple[int, ...]
    dtype: str = "int8"
    name = "concat"

    def operands(self) -> tuple[Operand, ...]:
        sizes = [self.rows * part for part in self.parts]
        return tuple(Operand(size, self.dtype) for size in (*sizes, sum(sizes)))

    def call(self) -> Call:
        width = np.dtype(self.dtype).itemsize
        fields = {"rows": self.rows, "bytes": tuple(width * part for part in self.parts)}
        return Call(f"ek_concat{len(self.parts)}", "layout", "ek_concat_t", fields)


def steps_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each axis."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def repeated(shape: Sequence[int], out: Sequence[int], dtype: str = "int8") -> McuKernel | None:
    """`shape` broadcast to `out`, as in NumPy; None for more axes or another type than `Move` takes."""
    padded = (1,) * (len(out) - len(shape)) + tuple(shape)
    steps = [0 if n == 1 else step for n, step in zip(padded, steps_of(padded), strict=True)]
    return _move("repeat", math.prod(shape), out, out, tuple(steps), dtype=dtype)


def padded(
    shape: Sequence[int], before: Sequence[int], after: Sequence[int], value: float, dtype: str = "int8"
) -> McuKernel | None:
    """A tensor with a border. None when a float value is not 0, for cuts, and for what `Move` does not take."""
    if min(*before, *after) < 0 or (dtype != "int8" and value != 0):
        return None
    out = [n + b + a for n, b, a in zip(shape, before, after, strict=True)]
    start = sum(b * step for b, step in zip(before, steps_of(out), strict=True))
    return _move("pad", math.prod(shape), out, shape, steps_of(shape), start=start, fill=int(value), dtype=dtype)


def part(shape: Sequence[int], axis: int, first: int, count: int, step: int, dtype: str = "int8") -> McuKernel | None:
    """x[..., first : first + count * step : step, ...] along `axis`; None for what `Move` does not take."""
    out = list(shape)
    out[axis] = count
    steps = list(steps_of(shape))
    first *= steps[axis]
    steps[axis] *= step
    return _move("slice", math.prod(shape), out, out, tuple(steps), first=first, dtype=dtype)


def _move(
    name: str,
    elements: int,
    out: Sequence[int],
    sizes: Sequence[int],
    steps: tuple[int, ...],
    **rest: Any,
) -> McuKernel | None:
    if rest["dtype"] not in SUFFIXES or 0 in (*out, *sizes):
        return None
    try:
        return Move(name, (elements, math.prod(out)), tuple(sizes), steps, steps_of(out), **rest)
    except ValueError:
        return None


def concatenated(shapes: Sequence[Sequence[int]], axis: int, dtype: str = "int8") -> McuKernel | None:
    """Tensors behind each other along `axis`; None for other numbers of tensors than two to four, and other types."""
    if len(shapes) not in PARTS or dtype not in SUFFIXES:
        return None
    rows = math.prod(shapes[0][:axis])
    parts = tuple(math.prod(shape[axis:]) for shape in shapes)
    return None if 0 in (rows, *parts) else Concat(rows, parts, dtype)


def _transpose(spec: Transpose, weights: Any, device: Device) -> McuKernel | None:
    shape, permutation = spec.merged()
    if spec.dtype not in SUFFIXES or len(shape) > AXES:
        return None
    if permutation and permutation[-1] != len(shape) - 1:
        return Permute(spec)
    # Whole runs of neighbours move.
    sizes, steps = zip(*((shape[a], steps_of(shape)[a]) for a in permutation), strict=True) if shape else ((1,), (1,))
    elements = math.prod(spec.shape)
    return Move(spec.name, (elements, elements), sizes, steps, steps_of(sizes), dtype=spec.dtype)


RULES: dict[type, Callable[..., McuKernel | None]] = {Transpose: _transpose}
