"""Element-wise kernels on integer codes, and the two ends of an integer region: quantise and dequantise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec import integer
from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import AddEpilogue, add_codes, const, loop, parallel, param, requantise
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
    inputs: Sequence[tuple[Shape, str]],
    output: tuple[Shape, str],
    compute: Callable[..., Any],
    inplace: Sequence[int] = (),
) -> Any:
    """Loops over the output shape; inputs broadcast as in NumPy. Equal shapes are walked as one long row."""
    shape, dtype = output
    size = int(np.prod(shape)) if shape else 1
    if all(s == shape for s, _ in inputs):
        inputs, shape = [((size,), t) for _, t in inputs], (size,)
    rank = len(shape)
    padded = [((1,) * (rank - len(s)) + tuple(s), t) for s, t in inputs]
    with common.prim_func(name, inplace) as builder:
        sources = [param(f"x{i}", s, t) for i, (s, t) in enumerate(padded)]
        y = param("y", shape, dtype)

        def walk(index: list[Any]) -> None:
            if len(index) < rank:
                parallel(shape[len(index)], lambda i: walk([*index, i]))
                return
            values = [
                source[tuple(0 if extent == 1 else i for extent, i in zip(s, index, strict=True))]
                for source, (s, _) in zip(sources, padded, strict=True)
            ]
            T.buffer_store(y, compute(*values), index)

        walk([])
    return builder.get()


def _wide(value: Any) -> Any:
    return value.astype("int32")


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
        return _build(
            self.name,
            [(self.a, "int8"), (self.b, "int8")],
            (broadcast_shape(self.a, self.b), "int8"),
            lambda a, b: add_codes(_wide(a), _wide(b), self.add, 1).astype("int8"),
            self.inplace,
        )

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

        def compute(a: Any, b: Any) -> Any:
            acc = (_wide(a) - self.za) * (_wide(b) - self.zb)
            code = requantise(
                acc, const(self.m, "int32"), const(self.shift, "int32"), self.zy, self.lo, self.hi, 1, device
            )
            return code.astype("int8")

        shapes = [(self.a, "int8"), (self.b, "int8")]
        return _build(self.name, shapes, (broadcast_shape(self.a, self.b), "int8"), compute, self.inplace)

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

        def compute(x: Any) -> Any:
            m, shift = const(self.m, "int32"), const(self.shift, "int32")
            return requantise(_wide(x) - self.zx, m, shift, self.zy, self.lo, self.hi, 1, device).astype("int8")

        return _build(self.name, [(self.shape, "int8")], (self.shape, "int8"), compute, self.inplace)

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
                T.buffer_store(y, table[c, _wide(x[i, c, j]) + 128], [i, c, j])

            parallel(outer, lambda i: parallel(channels, lambda c: loop(inner, lambda j: element(i, c, j))))
        return builder.get()

    inplace = ()

    def reference(self, x: np.ndarray, table: np.ndarray) -> np.ndarray:
        index = x.astype(np.int64) + 128
        if not self.per_channel:
            return table.reshape(256)[index]
        rows = np.arange(x.shape[self.axis]).reshape([-1 if i == self.axis else 1 for i in range(x.ndim)])
        return table[rows, index]


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

        def compute(x: Any) -> Any:
            # The clamp comes before the conversion: converting an out-of-range float to an integer is undefined.
            code = tirx.nearbyint(x / tirx.const(self.scale, "float32"))
            lo, hi = float(-128 - self.zero_point), float(127 - self.zero_point)
            code = tirx.max(tirx.min(code, tirx.const(hi, "float32")), tirx.const(lo, "float32"))
            return (code.astype("int32") + self.zero_point).astype("int8")

        return _build(self.name, [(self.shape, "float32")], (self.shape, "int8"), compute)

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
        return _build(
            self.name,
            [(self.shape, "int8")],
            (self.shape, "float32"),
            lambda q: (_wide(q) - self.zero_point).astype("float32") * tirx.const(self.scale, "float32"),
        )

    def reference(self, q: np.ndarray) -> np.ndarray:
        return integer.dequantize(q, self.scale, self.zero_point)
