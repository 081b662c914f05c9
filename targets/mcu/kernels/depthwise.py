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
from edgec.targets.mcu.kernels.scale import scale_fields

# Channels that are computed together.
GROUP = 4
# Sizes of windows are int16.
WINDOW = 2**15
# Words of a group's stream beside the weights.
WORDS = {"half": 8, "any": 16}
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

    rounding: "half", in groups of four channels with multipliers below one half (RQH); "any", in groups with others;
    "each", channel by channel with any multipliers; "real", channel by channel with real results.
    """

    spec: Depthwise
    rounding: str

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
        if self.rounding in WORDS:
            words = -(-spec.c // GROUP) * (WORDS[self.rounding] + 4 * pairs + 2 * odd)
        else:
            words = spec.c * (3 + pairs + odd)
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
        if self.rounding not in WORDS:
            rows = np.pad(taps, ((0, 0), (0, self.taps - even))).view(np.int32)
            return (np.concatenate([bias[:, None], factor[:, None], shift[:, None], rows], axis=1).reshape(-1),)
        start = np.minimum(np.arange(0, spec.c, GROUP), spec.c - GROUP)
        channels = start[:, None] + np.arange(GROUP)
        rounding = factor[channels]
        if self.rounding == "any":
            scales = channel_scales(spec, weights)
            assert scales is not None
            units, *columns = (np.array([s[k] for s in scales], np.int32) for k in ("unit", "m", "add", "post"))
            taps, bias = (taps * units[:, None]).astype(np.int16), bias * units
            # Of two channels each: m, add, post.
            rounding = np.stack([c[channels].reshape(-1, 2, 2) for c in columns], 2).reshape(len(start), 3 * GROUP)
        groups = taps[channels]
        pairs = groups[:, :, :even].reshape(len(start), GROUP, even // 2, 2).transpose(0, 2, 1, 3)
        last = groups[:, [0, 2, 1, 3], even:]
        words = [np.ascontiguousarray(v.reshape(len(v), -1)).view(np.int32) for v in (pairs, last)]
        return (np.concatenate([bias[channels], *words, rounding], axis=1).reshape(-1),)

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
        function = "ek_depthwise" + ("" if self.rounding == "half" else f"_{self.rounding}")
        if e.add is None:
            function += "9" if self.rounding == "half" and self.taps == 9 else ""
            return Call(f"{function}_i8", "depthwise", "ek_depthwise_t", fields, (scratch,))
        fields = {f"conv.{k}": v for k, v in fields.items()} | {f"add.{k}": v for k, v in add_fields(e.add).items()}
        # The codes of a pixel before the addition.
        return Call(f"{function}_add_i8", "depthwise", "ek_depthwise_add_t", fields, (scratch + spec.c,))


def _column(values: np.ndarray | None, size: int) -> np.ndarray:
    return np.zeros(size, np.int32) if values is None else values.astype(np.int32)


def channel_scales(spec: Depthwise, weights: Mapping[str, np.ndarray | None]) -> list[dict[str, Any]] | None:
    """`ek_scale_t` of each channel; None when one has none, or weights times its unit leave int16."""
    w, m, shift = (weights[name] for name in ("w", "m", "shift"))
    assert w is not None and m is not None and shift is not None
    bias, e = _column(weights.get("bias"), spec.c), spec.epilogue
    sums = np.abs(w.astype(np.int64)).reshape(spec.c, -1)
    # Of any codes, and on the way there.
    largest = 128 * sums.sum(1) + np.abs(bias.astype(np.int64))
    found = []
    for c in range(spec.c):
        fields = scale_fields(int(m[c]), int(shift[c]), e.y_zp, -128, 127, int(largest[c]))
        if fields is None or sums[c].max() * fields["unit"] >= 2**15:  # type: ignore[operator]
            return None
        found.append(fields)
    return found


def _depthwise(spec: Depthwise, weights: Mapping[str, np.ndarray | None], device: Device) -> McuKernel | None:
    """None for float activations, for real results with anything behind them, and for windows beyond int16 fields."""
    e = spec.epilogue
    window = (*spec.kernel, *spec.stride, *spec.padding, *spec.dilation)
    if spec.dtype != "int8" or e.requant == "RQF" or max(window) >= WINDOW:
        return None
    if e.requant == "float":
        plain = e.act == "none" and not e.residual and e.y_scale is None
        return DepthwiseCodes(spec, "real") if plain else None
    shift: Any = weights["shift"]
    if spec.c < GROUP:
        return DepthwiseCodes(spec, "each")
    if np.all(shift == HALF_SHIFT):
        return DepthwiseCodes(spec, "half")
    return DepthwiseCodes(spec, "each" if channel_scales(spec, weights) is None else "any")


RULES: dict[type, Callable[..., McuKernel | None]] = {Depthwise: _depthwise}
