"""Depthwise convolution on codes: parameters and packed weights of `c/depthwise.h`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.integer import HALF_SHIFT
from edgec.targets.device import Device
from edgec.targets.kernels.common import AddEpilogue
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand, Value

# Channels that are computed together.
GROUP = 4
# Bytes of a pointer on the largest machine that runs the code, and of a run's parameters there.
POINTER, RUN = 8, 56


def add_fields(add: AddEpilogue) -> dict[str, Value]:
    """`ek_add_t`."""
    return {
        "ma": add.m_self,
        "mb": add.m_other,
        "start": (1 << (add.f - 1)) - add.m_self * add.z_self - add.m_other * add.z_other,
        "f": add.f,
        "zero": add.z_y,
        "lo": add.lo,
        "hi": add.hi,
    }


@dataclass(frozen=True)
class DepthwiseCodes(McuKernel):
    """`Depthwise` on int8.

    half: in groups of four channels, for multipliers below one half (RQH); else one by one, for any multipliers and
    real results.
    """

    spec: Depthwise
    half: bool

    name = "depthwise"

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def inplace(self) -> tuple[int, ...]:
        """A pixel's residual is read when its codes are complete, right before the sum is written."""
        return (2,) if self.spec.epilogue.add else ()

    @property
    def taps(self) -> int:
        return self.spec.kernel[0] * self.spec.kernel[1]

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        oh, ow = spec.out
        pairs, odd = divmod(self.taps, 2)
        words = -(-spec.c // GROUP) * (8 + 4 * pairs + 2 * odd) if self.half else spec.c * (3 + pairs + odd)
        residual = (Operand(oh * ow * spec.c),) if spec.epilogue.add else ()
        out = Operand(oh * ow * spec.c, spec.out_type)
        return Operand(spec.h * spec.w * spec.c), Operand(words, "int32"), *residual, out

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The stream of constants: see `c/depthwise.h`."""
        spec = self.spec
        w, m = weights["w"], weights["m"]
        assert w is not None and m is not None
        taps = w.reshape(spec.c, self.taps).astype(np.int16)
        bias, shift = (_column(weights.get(name), spec.c) for name in ("bias", "shift"))
        factor = np.ascontiguousarray(m).view(np.int32)
        even = self.taps // 2 * 2
        if not self.half:
            rows = np.pad(taps, ((0, 0), (0, self.taps - even))).view(np.int32)
            return (np.concatenate([bias[:, None], factor[:, None], shift[:, None], rows], axis=1).reshape(-1),)
        start = np.minimum(np.arange(0, spec.c, GROUP), spec.c - GROUP)
        channels = start[:, None] + np.arange(GROUP)
        groups = taps[channels]
        pairs = groups[:, :, :even].reshape(len(start), GROUP, even // 2, 2).transpose(0, 2, 1, 3)
        last = groups[:, [0, 2, 1, 3], even:]
        words = [np.ascontiguousarray(v.reshape(len(v), -1)).view(np.int32) for v in (pairs, last)]
        return (np.concatenate([bias[channels], *words, factor[channels]], axis=1).reshape(-1),)

    def call(self) -> Call:
        spec, e = self.spec, self.spec.epilogue
        oh, ow = spec.out
        fields: dict[str, Value] = {"h": spec.h, "w": spec.w, "c": spec.c, "oh": oh, "ow": ow}
        fields |= dict(
            zip(("kh", "kw", "sy", "sx", "dy", "dx"), (*spec.kernel, *spec.stride, *spec.dilation), strict=True)
        )
        fields |= {"top": spec.padding[0], "left": spec.padding[2], "x_zp": spec.x_zp}
        scratch = RUN + POINTER * self.taps + spec.c + POINTER
        if spec.out_type == "float32":
            return Call("ek_depthwise_i8_f32", "depthwise", "ek_depthwise_t", fields, (scratch,))
        fields |= {"zero": e.y_zp, "lo": int(max(e.lo, -128)), "hi": int(min(e.hi, 127))}
        function = "ek_depthwise" if self.half else "ek_depthwise_any"
        if e.add is None:
            function += "9" if self.half and self.taps == 9 else ""
            return Call(f"{function}_i8", "depthwise", "ek_depthwise_t", fields, (scratch,))
        fields = {f"conv.{k}": v for k, v in fields.items()} | {f"add.{k}": v for k, v in add_fields(e.add).items()}
        # The codes of a pixel before the addition.
        return Call(f"{function}_add_i8", "depthwise", "ek_depthwise_add_t", fields, (scratch + spec.c,))


def _column(values: np.ndarray | None, size: int) -> np.ndarray:
    return np.zeros(size, np.int32) if values is None else values.astype(np.int32)


def _depthwise(spec: Depthwise, weights: Mapping[str, np.ndarray | None], device: Device) -> McuKernel | None:
    """None for float activations, and for real results with anything behind them."""
    e = spec.epilogue
    if spec.dtype != "int8" or e.requant == "RQF":
        return None
    if e.requant == "float":
        plain = e.act == "none" and not e.residual and e.y_scale is None
        return DepthwiseCodes(spec, False) if plain else None
    shift: Any = weights["shift"]
    return DepthwiseCodes(spec, spec.c >= GROUP and bool(np.all(shift == HALF_SHIFT)))


RULES: dict[type, Callable[..., McuKernel | None]] = {Depthwise: _depthwise}
