"""Element-wise kernels on integer codes, and the two ends of an integer region: quantise and dequantise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgec import integer
from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import (
    AddEpilogue,
    add_codes,
    clamp,
    const,
    intrinsic,
    lanes_of,
    loop,
    narrow,
    nearest,
    parallel,
    param,
    pieces,
    ramp,
    splat,
    vec,
)
from edgec.targets.kernels.rescale import rescaled_codes
from edgec.targets.tir import T, tirx

Shape = tuple[int, ...]


def broadcast_shape(a: Shape, b: Shape) -> Shape:
    return tuple(np.broadcast_shapes(a, b))


@dataclass(frozen=True)
class _Elementwise:
    """Common to all: no weights to pack, one output element from one element of each input."""

    macs = 0

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()


def _build(
    name: str,
    device: Device,
    inputs: Sequence[tuple[Shape, str, int]],
    output: tuple[Shape, str],
    compute: Callable[[list[list[Any]], int], list[Any]],
    inplace: Sequence[int] = (),
) -> Any:
    """Loops over the output shape; inputs broadcast as in NumPy.

    Written as vectors, because an output that may share memory with an input keeps LLVM from making them. inputs:
    shape, element type and, for codes, the zero point, which `compute` finds taken off. compute: vectors of `lanes`
    values, a list of them for each input, int32 for codes, to vectors that together make up the result.
    """
    shape, sources = merged_axes(output[0], [s for s, *_ in inputs])
    most = 4 * device.lanes
    with common.prim_func(name, inplace) as builder:
        x = [
            param(f"x{i}", (int(np.prod(s)),), t) for i, (s, (_, t, _)) in enumerate(zip(sources, inputs, strict=True))
        ]
        y = param("y", (int(np.prod(shape)),), output[1])
        strides = [_strides(s) for s in sources]
        to = _strides(shape)

        def place(index: Sequence[Any], steps: Sequence[int]) -> Any:
            total: Any = 0
            for i, step in zip(index, steps, strict=True):
                total = total + i * step if step else total
            return total

        def piece(index: list[Any], start: Any, size: int) -> None:
            at = [*index, start]
            lanes = min(size, device.lanes)
            values = []
            for source, steps, (_, dtype, zero) in zip(x, strides, inputs, strict=True):
                base = place(at, steps)
                if not steps[-1]:
                    value = source[base]
                    value = value.astype("int32") - zero if dtype == "int8" else value
                    values.append([splat(value, lanes)] * (size // lanes))
                elif dtype == "int8" and device.is_arm64 and size >= 8:
                    values.append(_widened(source[ramp(base, size)], zero, size))
                else:
                    parts = [source[ramp(base + k, lanes)] for k in range(0, size, lanes)]
                    if dtype == "int8":
                        parts = [v.astype(vec("int32", lanes)) - const(zero, "int32", lanes) for v in parts]
                    values.append(parts)
            results = compute(values, lanes)
            here, width = place(at, to), size // len(results)
            for k, result in enumerate(results):
                T.buffer_store(y, result, [ramp(here + k * width, width)])

        def walk(index: list[Any]) -> None:
            if len(index) < len(shape) - 1:
                parallel(shape[len(index)], lambda i: walk([*index, i]))
                return
            whole, rest = divmod(shape[-1], most)
            parallel(whole, lambda b: piece(index, b * most, most))
            for start, size in pieces(rest, most):
                piece(index, whole * most + start, size)

        walk([])
    return builder.get()


def _widened(codes: Any, zero: int, size: int) -> list[Any]:
    """int8 codes on NEON less their zero point, as int32x4, by way of int16.

    The subtraction is an intrinsic because LLVM would take the two widenings apart and join them badly.
    """
    found = []
    for start in range(0, size, 8):
        half = lanes_of([codes], size, start, 8).astype("int16x8")
        half = intrinsic("llvm.aarch64.neon.sqsub.v8i16", "int16x8", half, const(zero, "int16", 8))
        found += [lanes_of([half], 8, k, 4).astype("int32x4") for k in (0, 4)]
    return found


def merged_axes(shape: Shape, inputs: Sequence[Shape]) -> tuple[Shape, list[Shape]]:
    """The same broadcast in fewest axes: neighbours that no input, or the same ones, broadcast over become one."""
    rank = len(shape)
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in inputs]
    groups: list[tuple[int, tuple[bool, ...]]] = []
    for axis, extent in enumerate(shape):
        if extent == 1:
            continue
        full = tuple(s[axis] != 1 for s in padded)
        if groups and groups[-1][1] == full:
            groups[-1] = (groups[-1][0] * extent, full)
        else:
            groups.append((extent, full))
    groups = groups or [(1, (True,) * len(inputs))]
    return tuple(n for n, _ in groups), [tuple(n if f[i] else 1 for n, f in groups) for i in range(len(inputs))]


def _strides(shape: Shape) -> list[int]:
    """Elements between neighbours along each axis; 0 where there are none."""
    steps = [int(np.prod(shape[k + 1 :])) for k in range(len(shape))]
    return [0 if extent == 1 else step for extent, step in zip(shape, steps, strict=True)]


@dataclass(frozen=True)
class QAdd(_Elementwise):
    """Integer addition of two quantised tensors (specification 1.9, Add), broadcasting."""

    a: Shape
    b: Shape
    add: AddEpilogue
    name = "qadd"

    @property
    def inplace(self) -> tuple[int, ...]:
        out = broadcast_shape(self.a, self.b)
        return tuple(i for i, shape in enumerate((self.a, self.b)) if shape == out)

    def prim_func(self, device: Device) -> Any:
        """Parameters: a, b, y."""
        e = self.add
        # Zero points are taken off where codes are read, and added where they are written.
        plain = replace(e, z_self=0, z_other=0, z_y=0, lo=common.INT32_MIN, hi=common.INT32_MAX)

        def compute(values: list[list[Any]], lanes: int) -> list[Any]:
            codes = [add_codes(a, b, plain, lanes) for a, b in zip(*values, strict=True)]
            return [narrow(codes, e.z_y, e.lo, e.hi, lanes, device)]

        inputs = [(self.a, "int8", e.z_self), (self.b, "int8", e.z_other)]
        out = (broadcast_shape(self.a, self.b), "int8")
        return _build(self.name, device, inputs, out, compute, self.inplace)

    def reference(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        e = self.add
        return integer.qadd(a, b, e.m_self, e.m_other, e.f, e.z_self, e.z_other, e.z_y, e.lo, e.hi)


@dataclass(frozen=True)
class QMul(_Elementwise):
    """Integer product of two quantised tensors, broadcasting: RQ1 of (a - za)(b - zb)."""

    a: Shape
    b: Shape
    m: int
    shift: int
    za: int
    zb: int
    zy: int
    lo: int
    hi: int
    name = "qmul"

    @property
    def inplace(self) -> tuple[int, ...]:
        out = broadcast_shape(self.a, self.b)
        return tuple(i for i, shape in enumerate((self.a, self.b)) if shape == out)

    def prim_func(self, device: Device) -> Any:
        """Parameters: a, b, y."""

        def compute(values: list[list[Any]], lanes: int) -> list[Any]:
            accs = [a * b for a, b in zip(*values, strict=True)]
            q, largest = (self.m, self.shift), 255 * 255
            return [rescaled_codes(accs, largest, q, self.zy, self.lo, self.hi, lanes, device)]

        inputs = [(self.a, "int8", self.za), (self.b, "int8", self.zb)]
        out = (broadcast_shape(self.a, self.b), "int8")
        return _build(self.name, device, inputs, out, compute, self.inplace)

    def reference(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return integer.qmul(a, b, self.m, self.shift, self.za, self.zb, self.zy, self.lo, self.hi)


@dataclass(frozen=True)
class QRescale(_Elementwise):
    """The same real value on another grid: RQ1 of (x - zx)."""

    shape: Shape
    m: int
    shift: int
    zx: int
    zy: int
    lo: int
    hi: int
    name = "qrescale"
    inplace = (0,)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""

        def compute(values: list[list[Any]], lanes: int) -> list[Any]:
            q = (self.m, self.shift)
            return [rescaled_codes(values[0], 255, q, self.zy, self.lo, self.hi, lanes, device)]

        return _build(self.name, device, [(self.shape, "int8", self.zx)], (self.shape, "int8"), compute, self.inplace)

    def reference(self, x: np.ndarray) -> np.ndarray:
        return integer.qrescale(x, self.m, self.shift, self.zx, self.zy, self.lo, self.hi)


@dataclass(frozen=True)
class QLut(_Elementwise):
    """y = table[x + 128]; with `per_channel` the table has one row per index of `axis`."""

    shape: Shape
    per_channel: bool
    axis: int
    name = "qlut"

    def pack(self, device: Device, table: np.ndarray) -> tuple[np.ndarray, ...]:  # type: ignore[override]
        return (np.ascontiguousarray(table),)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, table, y."""
        outer = int(np.prod(self.shape[: self.axis])) if self.per_channel else 1
        channels = self.shape[self.axis] if self.per_channel else 1
        inner = int(np.prod(self.shape)) // (outer * channels)
        with common.prim_func(self.name) as builder:
            x = param("x", (outer, channels, inner), "int8")
            table = param("table", (channels, 256), "int8")
            y = param("y", (outer, channels, inner), "int8")

            def element(i: Any, c: Any, j: Any) -> None:
                T.buffer_store(y, table[c, x[i, c, j].astype("int32") + 128], [i, c, j])

            def row(i: Any, c: Any) -> None:
                # Sixteen at a time, where the instruction set has a lookup in registers.
                whole = inner // 16 if device.is_arm64 else 0
                loop(whole, lambda b: sixteen(i, c, b * 16))
                loop(inner - whole * 16, lambda j: element(i, c, whole * 16 + j))

            def sixteen(i: Any, c: Any, j: Any) -> None:
                index = tirx.bitwise_xor(x[i, c, ramp(j, 16)], const(-128, "int8", 16))
                found = const(0, "int8", 16)
                for quarter in range(4):
                    part = [table[c, ramp(64 * quarter + 16 * k, 16)] for k in range(4)]
                    here = index - const(((64 * quarter + 128) % 256) - 128, "int8", 16) if quarter else index
                    found = intrinsic("llvm.aarch64.neon.tbx4.v16i8", "int8x16", found, *part, here)
                T.buffer_store(y, found, [i, c, ramp(j, 16)])

            parallel(outer, lambda i: parallel(channels, lambda c: row(i, c)))
        return builder.get()

    inplace = ()

    def reference(self, x: np.ndarray, table: np.ndarray) -> np.ndarray:
        index = x.astype(np.int64) + 128
        if not self.per_channel:
            return table.reshape(256)[index]
        rows = np.arange(x.shape[self.axis]).reshape([-1 if i == self.axis else 1 for i in range(x.ndim)])
        return table[rows, index]


def quantised(values: Sequence[Any], scale: float, zero_point: int, lanes: int, device: Device) -> Any:
    """clamp(rne(x / scale) + zero_point) of float32 vectors of `lanes` as one int8 vector."""
    lo, hi = float(-128 - zero_point), float(127 - zero_point)

    def code(x: Any) -> Any:
        ratio = _divided(x, scale, lanes) if device.is_arm64 and lanes == 4 else x / const(scale, "float32", lanes)
        # The clamp comes before the conversion: converting an out-of-range float to an integer is undefined, except
        # on NEON, which saturates.
        exact = device.is_arm64 and lanes == 4
        return nearest(ratio if exact else clamp(ratio, lo, hi, "float32", lanes), lanes, device)

    return narrow([code(x) for x in values], zero_point, -128, 127, lanes, device)


def _divided(x: Any, scale: float, lanes: int) -> Any:
    """x / scale, correctly rounded wherever it decides the code, by products: division is slow and not pipelined.

    Two steps of Markstein's division (P. Markstein, IBM J. Res. Dev. 34, 1990): with the correctly rounded reciprocal,
    a quotient within one unit in the last place, which the first step gives, is correctly rounded by the second.
    """
    limit = 512.0 * scale
    reciprocal, divisor = (const(float(np.float32(v)), "float32", lanes) for v in (1.0 / scale, -scale))
    # Keeps infinities out of the remainders; the code saturates long before.
    x = clamp(x, -limit, limit, "float32", lanes)
    q = x * reciprocal
    for _ in range(2):
        remainder = intrinsic("llvm.fma", vec("float32", lanes), q, divisor, x)
        q = intrinsic("llvm.fma", vec("float32", lanes), remainder, reciprocal, q)
    return q


@dataclass(frozen=True)
class Quantize(_Elementwise):
    """float32 to codes: clamp(rne(x / scale) + zero_point); the division is a float32 division (specification 1.1)."""

    shape: Shape
    scale: float
    zero_point: int
    name = "quantize"
    inplace = ()

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""

        def compute(values: list[list[Any]], lanes: int) -> list[Any]:
            return [quantised(values[0], self.scale, self.zero_point, lanes, device)]

        return _build(self.name, device, [(self.shape, "float32", 0)], (self.shape, "int8"), compute)

    def reference(self, x: np.ndarray) -> np.ndarray:
        return integer.quantize(x, self.scale, self.zero_point)


@dataclass(frozen=True)
class Dequantize(_Elementwise):
    """Codes to float32: scale * (q - zero_point)."""

    shape: Shape
    scale: float
    zero_point: int
    name = "dequantize"
    inplace = ()

    def prim_func(self, device: Device) -> Any:
        """Parameters: q, y."""

        def compute(values: list[list[Any]], lanes: int) -> list[Any]:
            scale = const(self.scale, "float32", lanes)
            return [q.astype(vec("float32", lanes)) * scale for q in values[0]]

        return _build(self.name, device, [(self.shape, "int8", self.zero_point)], (self.shape, "float32"), compute)

    def reference(self, q: np.ndarray) -> np.ndarray:
        return integer.dequantize(q, self.scale, self.zero_point)
