"""Windows without weights: `c/pool.h`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels.pool import AvgPool, MaxPool
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand, Value
from edgec.targets.mcu.kernels.depthwise import WINDOW
from edgec.targets.mcu.kernels.elementwise import CODE_SPAN, nested
from edgec.targets.mcu.kernels.scale import scale_fields

SUFFIXES = {"int8": "i8", "float32": "f32"}


@dataclass(frozen=True)
class Pool(McuKernel):
    """`AvgPool`, of which `Mean` is one, or `MaxPool`."""

    spec: AvgPool | MaxPool

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        oh, ow = spec.out
        return Operand(spec.h * spec.w * spec.c, spec.dtype), Operand(oh * ow * spec.c, spec.dtype)

    def scale(self) -> dict[str, Value] | None:
        """Of int8 averages."""
        q = getattr(self.spec, "requant", None)
        if q is None:
            return None
        return scale_fields(q.m, q.shift, q.y_zp, q.lo, q.hi, CODE_SPAN * self.spec.taps)

    def call(self) -> Call:
        spec = self.spec
        whole = spec.kernel == (spec.h, spec.w) and not any(spec.padding) and spec.dilation == (1, 1)
        if whole and spec.taps < WINDOW:
            # Over the whole map, which is one row of memory.
            spec = replace(spec, h=1, w=spec.taps, kernel=(1, spec.taps), stride=(1, 1))
        oh, ow = spec.out
        window: dict[str, Value] = {"h": spec.h, "w": spec.w, "c": spec.c, "oh": oh, "ow": ow}
        sizes = (*spec.kernel, *spec.stride, *spec.dilation, spec.padding[0], spec.padding[2])
        window |= dict(zip(("kh", "kw", "sy", "sx", "dy", "dx", "top", "left"), sizes, strict=True))
        function = f"ek_{spec.name}_{SUFFIXES[spec.dtype]}"
        if isinstance(spec, MaxPool):
            return Call(function, "pool", "ek_pool_t", window)
        if spec.requant is None:
            share = {"share": float(np.float32(1.0 / spec.taps))}
            return Call(function, "pool", "ek_avg_pool_f32_t", nested("window", window) | share)
        fields = nested("window", window) | nested("scale", self.scale() or {})
        return Call(function, "pool", "ek_avg_pool_t", fields | {"zero": spec.requant.x_zp})


def _pool(spec: AvgPool | MaxPool, weights: Any, device: Device) -> McuKernel | None:
    """None for other types, and for int8 averages whose sums 32 bits do not rescale."""
    kernel = Pool(spec)
    if spec.dtype not in SUFFIXES or max(*spec.kernel, *spec.stride, *spec.padding, *spec.dilation) >= WINDOW:
        return None
    scaled = isinstance(spec, AvgPool) and spec.dtype == "int8"
    return None if scaled and kernel.scale() is None else kernel


RULES: dict[type, Callable[..., McuKernel | None]] = {AvgPool: _pool, MaxPool: _pool}
