"""Element-wise operations on codes, the two ends of an integer region, and permuted axes: four elements an item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch
from edgec.targets.gpu.kernels.conv import fill, slices
from edgec.targets.gpu.kernels.dialect import MOST_GROUPS, Buffer, Code, literal
from edgec.targets.kernels.eltwise import (
    Dequantize,
    QAdd,
    QLut,
    QMul,
    QRescale,
    Quantize,
    broadcast_shape,
    merged_axes,
)
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.mcu.kernels.base import Operand

Shape = tuple[int, ...]
# Elements of one dispatch along its first axis.
MOST_ELEMENTS = MOST_GROUPS * 64 * 4


def elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape))


def steps_of(shape: Sequence[int]) -> list[int]:
    """Elements between neighbours along each axis; 0 along those that are broadcast."""
    return [0 if n == 1 else elements(shape[k + 1 :]) for k, n in enumerate(shape)]


class Walk:
    """Code that visits an output of `shape`, four neighbours along its last axis at a time.

    sources: what is read, by its steps along those axes, in single elements. Vectors where all is whole.
    """

    def __init__(
        self,
        device: Device,
        stem: str,
        shape: Shape,
        inputs: Sequence[tuple[str, list[int], str]],
        out: str,
        inplace: Sequence[int] = (),
    ) -> None:
        self.shape, self.rest, self.out = shape, shape[-1] % 4, out
        self.steps = {name: steps for name, steps, _ in inputs}
        self.types = {name: dtype for name, _, dtype in inputs}
        self.units: dict[str, int] = {}
        buffers = []
        for number, (name, steps, dtype) in enumerate(inputs):
            # Four neighbours are one vector, or there is one element for all.
            whole = self.rest == 0 and steps[-1] == 1 and all(s % 4 == 0 for s in steps[:-1])
            self.units[name] = 4 if whole else 1
            buffers.append(Buffer(name, dtype, self.units[name], shared=number in inplace))
        self.lanes = 1 if self.rest else 4
        buffers.append(Buffer("y", out, self.lanes, written=True, shared=bool(inplace)))
        outer = shape[:-1]
        middle = outer[-1] if outer else 1
        extents = (slices(shape[-1]), middle, elements(outer[:-1]))
        self.c = c = Code(device.api, stem, buffers, extents, fill(extents, (16, 4, 4), 64))
        c.index(0, "column")
        c.index(1, "row")
        c.index(2, "z")
        # The index along each axis but the last.
        self.indices = ["row"] if outer else []
        left = "z"
        for axis in range(len(outer) - 2, -1, -1):
            if axis == 0:
                self.indices.insert(0, left)
            else:
                self.indices.insert(0, c.let("int", f"i{axis}", f"{left} % {outer[axis]}"))
                left = c.let("int", f"z{axis}", f"{left} / {outer[axis]}")

    def at(self, steps: Sequence[int], unit: int) -> str:
        """The place of the first of the four elements, in units."""
        parts = [f"{i} * {s // unit}" for i, s in zip(self.indices, steps, strict=False) if s]
        last = steps[-1] * 4 // unit
        return " + ".join(parts + ([f"column * {last}"] if last else [])) or "0"

    def read(self, name: str, count: int) -> str:
        """Four elements as float4 or int4."""
        c, dtype, unit, steps = self.c, self.types[name], self.units[name], self.steps[name]
        place = self.at(steps, unit)
        if unit == 4:
            return epilogue.read(c, name, dtype, place)
        kind = "int4" if dtype in ("int8", "int32") else "float4"
        if steps[-1] == 0:
            return c.splat(kind, c.load(name, place))
        step = steps[-1]
        parts = [c.load(name, f"{place} + {n * step}" if n else place) for n in range(count)]
        return c.vec(kind, parts + ["0" if kind == "int4" else "0.0f"] * (4 - count))

    def launch(self, compute: Callable[[int], str], arguments: Sequence[int]) -> Launch:
        """compute(elements of the four that exist) gives a float4, or int4 of codes."""
        c = self.c
        steps = [elements(self.shape[k + 1 :]) for k in range(len(self.shape))]

        def body(count: int) -> None:
            value = c.let("int4" if self.out == "int8" else "float4", "result", compute(count))
            epilogue.write(c, "y", self.out, self.at(steps, self.lanes), value, count, self.lanes == 4)

        if self.rest and self.shape[-1] > 4:
            with c.block(f"if (column < {self.shape[-1] // 4})"):
                body(4)
                c.line("return;")
        body(self.rest or 4)
        return c.launch(arguments)


def flat(shape: Shape) -> Shape:
    """All elements as one axis, or two where one dispatch's first axis does not hold them."""
    n = elements(shape)
    if n <= MOST_ELEMENTS:
        return (n,)
    rows = next(r for r in range(2, n + 1) if n % r == 0 and n // r <= MOST_ELEMENTS)
    return rows, n // rows


@dataclass(frozen=True)
class Pair(GpuKernel):
    """`QAdd` or `QMul`, whose operands broadcast as in NumPy. Operands: a, b, y."""

    spec: QAdd | QMul

    @property
    def inplace(self) -> tuple[int, ...]:
        return self.spec.inplace

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        return tuple(Operand(elements(shape), "int8") for shape in (s.a, s.b, broadcast_shape(s.a, s.b)))

    def launches(self, device: Device) -> tuple[Launch, ...]:
        s = self.spec
        shape, sources = merged_axes(broadcast_shape(s.a, s.b), [s.a, s.b])
        if len(shape) == 1 and sources[0] == sources[1]:
            shape = flat(shape)
            sources = [shape, shape]
        inputs = [(name, steps_of(source), "int8") for name, source in zip("ab", sources, strict=True)]
        walk = Walk(device, s.name, shape, inputs, "int8", self.inplace)
        c = walk.c

        def compute(count: int) -> str:
            a, b = (c.let("int4", f"{name}4", walk.read(name, count)) for name in "ab")
            if isinstance(s, QAdd):
                return epilogue.added(c, a, b, s.add)
            product = f"({a} - {c.splat('int4', str(s.za))}) * ({b} - {c.splat('int4', str(s.zb))})"
            return rescaled(c, product, s)

        return (walk.launch(compute, (0, 1, 2)),)


def rescaled(c: Code, acc: str, spec: Any) -> str:
    """clamp(RQ1(acc) + zy, lo, hi)."""
    code = c.requantised(acc, c.splat("int4", str(spec.m)), c.splat("int4", str(spec.shift)), spec.shift)
    return epilogue.clamped(c, code, spec.zy, spec.lo, spec.hi)


@dataclass(frozen=True)
class Single(GpuKernel):
    """`QRescale`, `Quantize` or `Dequantize`. Operands: x, y."""

    spec: QRescale | Quantize | Dequantize

    @property
    def inplace(self) -> tuple[int, ...]:
        return self.spec.inplace

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    @property
    def _types(self) -> tuple[str, str]:
        kinds = {Quantize: ("float32", "int8"), Dequantize: ("int8", "float32"), QRescale: ("int8", "int8")}
        return kinds[type(self.spec)]

    def operands(self) -> tuple[Operand, ...]:
        return tuple(Operand(elements(self.spec.shape), dtype) for dtype in self._types)

    def launches(self, device: Device) -> tuple[Launch, ...]:
        s = self.spec
        shape = flat(s.shape)
        source, target = self._types
        walk = Walk(device, s.name, shape, [("x", steps_of(shape), source)], target, self.inplace)
        c = walk.c

        def compute(count: int) -> str:
            value = walk.read("x", count)
            if isinstance(s, Quantize):
                numbers = [literal(float(n)) for n in epilogue.grid_of(s.scale, s.zero_point)]
                return epilogue.quantised(c, value, c.let("float4", "grid", c.vec("float4", numbers)))
            zero = s.zx if isinstance(s, QRescale) else s.zero_point
            less = f"{value} - {c.splat('int4', str(zero))}"
            return rescaled(c, less, s) if isinstance(s, QRescale) else f"{literal(s.scale)} * {c.floats(less)}"

        return (walk.launch(compute, (0, 1)),)


@dataclass(frozen=True)
class LookUp(GpuKernel):
    """`QLut`. Operands: x, table, y."""

    spec: QLut

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Elements before, along and behind the axis of the tables."""
        s = self.spec
        if not s.per_channel:
            return 1, 1, elements(s.shape)
        return elements(s.shape[: s.axis]), s.shape[s.axis], elements(s.shape[s.axis + 1 :])

    def operands(self) -> tuple[Operand, ...]:
        n = elements(self.spec.shape)
        return Operand(n, "int8"), Operand(256 * self._sizes[1], "int8"), Operand(n, "int8")

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The tables, one behind the other."""
        table = weights["table"]
        assert table is not None
        return (np.ascontiguousarray(table).reshape(-1),)

    def launches(self, device: Device) -> tuple[Launch, ...]:
        outer, channels, inner = self._sizes
        # Channels are the last axis of activations in most networks.
        shape = (outer, channels) if inner == 1 else (outer, channels, inner)
        shape = flat(self.spec.shape) if channels == 1 else shape
        walk = Walk(device, "lut", shape, [("x", steps_of_all(shape), "int8")], "int8")
        # The walk declares buffers for what it reads by its index; the table is read by value.
        c = walk.c
        c.add_buffer(1, Buffer("table", "int8", 1))

        def compute(count: int) -> str:
            c.let("int4", "x4", f"{walk.read('x', count)} + {c.splat('int4', '128')}")
            parts = []
            for n, lane in enumerate("xyzw"):
                row = "0"
                if channels > 1:
                    row = f"(column * 4 + {n})" if inner == 1 else "row"
                # Elements that fill up the last four have no table of their own.
                parts.append(c.load("table", f"{row} * 256 + x4.{lane}") if n < count else "0")
            return c.vec("int4", parts)

        return (walk.launch(compute, (0, 1, 2)),)


def steps_of_all(shape: Shape) -> list[int]:
    """`steps_of` of a tensor that is not broadcast, axes of one element included."""
    return [elements(shape[k + 1 :]) for k in range(len(shape))]


@dataclass(frozen=True)
class Permute(GpuKernel):
    """`Transpose`. Operands: x, y."""

    spec: Transpose
    name = "transpose"

    def operands(self) -> tuple[Operand, ...]:
        operand = Operand(elements(self.spec.shape), self.spec.dtype)
        return operand, operand

    def launches(self, device: Device) -> tuple[Launch, ...]:
        shape, permutation = self.spec.merged()
        shape, permutation = (shape, permutation) if shape else ((1,), (0,))
        all_steps = steps_of_all(shape)
        out = tuple(shape[axis] for axis in permutation)
        walk = Walk(
            device, "permute", out, [("x", [all_steps[axis] for axis in permutation], self.spec.dtype)], self.spec.dtype
        )
        return (walk.launch(lambda count: walk.read("x", count), (0, 1)),)


def _permute(spec: Transpose, weights: Any, device: Device) -> Permute | None:
    return Permute(spec) if spec.dtype in ("int8", "float32", "float16") else None


RULES: dict[type, Callable[..., GpuKernel | None]] = {
    QAdd: lambda spec, weights, device: Pair(spec),
    QMul: lambda spec, weights, device: Pair(spec),
    QRescale: lambda spec, weights, device: Single(spec),
    Quantize: lambda spec, weights, device: Single(spec),
    Dequantize: lambda spec, weights, device: Single(spec),
    QLut: lambda spec, weights, device: LookUp(spec),
    Transpose: _permute,
}
