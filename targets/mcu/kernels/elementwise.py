"""Element by element on codes, and between codes and real numbers: `c/elementwise.h`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
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
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand, Value
from edgec.targets.mcu.kernels.depthwise import add_fields
from edgec.targets.mcu.kernels.scale import scale_fields

PART = "elementwise"
# Axes of rows of a broadcast.
OUTER = 3
CODE_SPAN = 255


def nested(name: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    """Fields of a struct within a struct."""
    return {f"{name}.{key}": value for key, value in fields.items()}


def _elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


@dataclass(frozen=True)
class _Pair(McuKernel):
    """Two operands that broadcast as in NumPy. Subclasses have `spec`, a template with shapes `a` and `b`."""

    @property
    def inplace(self) -> tuple[int, ...]:
        spec: Any = self.spec  # type: ignore[attr-defined]
        return spec.inplace

    def operands(self) -> tuple[Operand, ...]:
        spec: Any = self.spec  # type: ignore[attr-defined]
        out = broadcast_shape(spec.a, spec.b)
        return Operand(_elements(spec.a)), Operand(_elements(spec.b)), Operand(_elements(out))

    def pair_call(self, name: str, fields: Mapping[str, Value]) -> Call:
        spec: Any = self.spec  # type: ignore[attr-defined]
        shape, sources = merged_axes(broadcast_shape(spec.a, spec.b), [spec.a, spec.b])
        if len(shape) == 1 and sources[0] == sources[1]:
            return Call(f"ek_{name}_i8", PART, f"ek_{name}_t", {**fields, "n": shape[0]})
        rows = (1,) * (OUTER + 1 - len(shape)) + shape
        steps = [(0,) * (OUTER + 1 - len(shape)) + _steps(s) for s in sources]
        inner: dict[str, Value] = {"n": rows[-1], "sa": steps[0][-1], "sb": steps[1][-1]}
        inner |= {"rows": rows[:-1], "a": steps[0][:-1], "b": steps[1][:-1]}
        fields = {**fields, **nested("shape", inner)}
        return Call(f"ek_{name}_broadcast_i8", PART, f"ek_{name}_broadcast_t", fields)


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each axis; 0 along those that are broadcast."""
    return tuple(0 if n == 1 else _elements(shape[k + 1 :]) for k, n in enumerate(shape))


def _too_deep(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(merged_axes(broadcast_shape(tuple(a), tuple(b)), [tuple(a), tuple(b)])[0]) > OUTER + 1


@dataclass(frozen=True)
class AddCodes(_Pair):
    """`QAdd`."""

    spec: QAdd
    name = "qadd"

    def call(self) -> Call:
        return self.pair_call(self.name, nested("add", add_fields(self.spec.add)))


@dataclass(frozen=True)
class MulCodes(_Pair):
    """`QMul`."""

    spec: QMul
    name = "qmul"

    def scale(self) -> dict[str, Value] | None:
        s = self.spec
        return scale_fields(s.m, s.shift, s.zy, s.lo, s.hi, CODE_SPAN**2)

    def call(self) -> Call:
        fields: dict[str, Value] = {"za": self.spec.za, "zb": self.spec.zb}
        fields = nested("scale", self.scale() or {}) | fields
        return self.pair_call(self.name, nested("product", fields))


@dataclass(frozen=True)
class RescaleCodes(McuKernel):
    """`QRescale`."""

    spec: QRescale
    name = "qrescale"

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,)

    def operands(self) -> tuple[Operand, ...]:
        n = _elements(self.spec.shape)
        return Operand(n), Operand(n)

    def scale(self) -> dict[str, Value] | None:
        s = self.spec
        return scale_fields(s.m, s.shift, s.zy, s.lo, s.hi, CODE_SPAN)

    def call(self) -> Call:
        fields: dict[str, Value] = {"zero": self.spec.zx, "n": _elements(self.spec.shape)}
        return Call("ek_qrescale_i8", PART, "ek_qrescale_t", nested("scale", self.scale() or {}) | fields)


@dataclass(frozen=True)
class LookUp(McuKernel):
    """`QLut`."""

    spec: QLut
    name = "qlut"

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(outer, channels, inner): elements before, along and behind the axis of the tables."""
        spec = self.spec
        if not spec.per_channel:
            return 1, 1, _elements(spec.shape)
        return _elements(spec.shape[: spec.axis]), spec.shape[spec.axis], _elements(spec.shape[spec.axis + 1 :])

    def operands(self) -> tuple[Operand, ...]:
        n = _elements(self.spec.shape)
        return Operand(n), Operand(256 * self.sizes[1]), Operand(n)

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The tables, one behind the other."""
        table = weights["table"]
        assert table is not None
        return (np.ascontiguousarray(table).reshape(-1),)

    def call(self) -> Call:
        return Call("ek_qlut_i8", PART, "ek_qlut_t", dict(zip(("outer", "channels", "inner"), self.sizes, strict=True)))


@dataclass(frozen=True)
class GridStep(McuKernel):
    """`Quantize` or `Dequantize`."""

    spec: Quantize | Dequantize

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        n = _elements(self.spec.shape)
        types = ("float32", "int8") if isinstance(self.spec, Quantize) else ("int8", "float32")
        return Operand(n, types[0]), Operand(n, types[1])

    def call(self) -> Call:
        spec = self.spec
        fields: dict[str, Value] = {
            "scale": float(np.float32(spec.scale)),
            "zero": spec.zero_point,
            "n": _elements(spec.shape),
        }
        return Call(f"ek_{spec.name}_i8", PART, "ek_grid_t", fields)


def _add(spec: QAdd, weights: Any, device: Device) -> McuKernel | None:
    return None if _too_deep(spec.a, spec.b) else AddCodes(spec)


def _mul(spec: QMul, weights: Any, device: Device) -> McuKernel | None:
    kernel = MulCodes(spec)
    return None if kernel.scale() is None or _too_deep(spec.a, spec.b) else kernel


def _rescale(spec: QRescale, weights: Any, device: Device) -> McuKernel | None:
    kernel = RescaleCodes(spec)
    return None if kernel.scale() is None else kernel


RULES: dict[type, Callable[..., McuKernel | None]] = {
    QAdd: _add,
    QMul: _mul,
    QRescale: _rescale,
    QLut: lambda spec, weights, device: LookUp(spec),
    Quantize: lambda spec, weights, device: GridStep(spec),
    Dequantize: lambda spec, weights, device: GridStep(spec),
}
