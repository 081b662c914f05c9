"""Convolutions, matrix products and fully connected layers on int8.

`c/conv.h`, `c/fc.h`; by weights of 4 bits `c/conv4.h`, `c/fc4.h`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgec.integer import HALF_SHIFT
from edgec.targets.device import Device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand, Value
from edgec.targets.mcu.kernels.depthwise import add_fields

# Weights of a unit: what one step of the inner loop takes along a column.
UNIT = 4
# Products of one row from which `FullyConnected` is worth its code; the convolution does the others in twice the time.
ROW_MACS = 4096
# Weights of a layer from which 4 bits for each save more than the code that takes them.
HALVED = 2048
# Bits of `act` in ek_real_t, by the epilogue's activation.
SLOPE, LOWER, UPPER = 1, 2, 4
ACTIVATIONS = ("none", "clip", "leaky_relu")


@dataclass(frozen=True)
class Conv(McuKernel):
    """`Conv2D` on int8: pointers x, weights, constants, [shifts], [residual], y, columns.

    rounding: "RQH", "RQ1" with any shifts, or "float", which gives real values. bits: of a stored weight, 4 or 8.
    Packing and scratch memory are the same for all cores: the code chooses its instructions by the core that it is
    compiled for, which need not be the one that it was generated for.
    """

    spec: Conv2D
    rounding: str
    bits: int = 8

    name: ClassVar[str] = "conv2d"
    # Output channels that the inner loop computes at a time.
    block: ClassVar[int] = 2

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def inplace(self) -> tuple[int, ...]:
        return (len(self.operands()) - 2,) if self.spec.inplace else ()

    @property
    def depth(self) -> int:
        return self.spec.ci // self.spec.groups

    @property
    def outputs(self) -> int:
        return self.spec.co // self.spec.groups

    @property
    def blocks(self) -> int:
        """Blocks of output channels in a group."""
        return -(-self.outputs // self.block)

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of a column and their length: what lies side by side in the input."""
        return self.spec.kernel[0], self.spec.kernel[1] * self.depth

    @property
    def units(self) -> int:
        """Units of a column: whole ones of its rows, then those of what the rows have beyond them."""
        rows, length = self.rows
        return rows * (length // UNIT) + -(-rows * (length % UNIT) // UNIT)

    @property
    def flat(self) -> bool:
        """Whether each column is the next stretch of the input, in whole units."""
        spec = self.spec
        pointwise = spec.kernel == (1, 1) and spec.stride == (1, 1) and not any(spec.padding)
        return pointwise and spec.groups == 1 and spec.ci % UNIT == 0

    @property
    def part(self) -> str:
        return "conv" if self.bits == 8 else "conv4"

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        rows, columns = spec.out
        size, channels = rows * columns * spec.co, spec.groups * self.blocks * self.block
        result = [
            Operand(spec.h * spec.w * spec.ci),
            Operand(channels * self.units * UNIT * self.bits // 8),
            Operand(2 * channels, "int32"),
        ]
        if self.rounding == "RQ1":
            result.append(Operand(channels))
        if spec.residual:
            result.append(Operand(size, spec.epilogue.residual_type("int8")))
        return (*result, Operand(size, spec.out_type))

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """w: OIHW codes; bias: int32, with the zero point folded in; m: one per channel; shift: not with real results.

        Bits of a float32 m stand in the int32 constants.
        """
        spec, w, m = self.spec, weights["w"], weights["m"]
        assert w is not None and m is not None
        kh, kw = spec.kernel
        taps = w.reshape(spec.groups, self.outputs, self.depth, kh, kw).transpose(0, 1, 3, 4, 2)
        taps = taps.reshape(spec.groups, self.outputs, *self.rows)
        whole, rest = np.split(taps, [self.rows[1] // UNIT * UNIT], axis=3)
        full = np.zeros((spec.groups, self.blocks * self.block, self.units * UNIT), np.int8)
        full[:, : self.outputs, : whole[0, 0].size] = whole.reshape(spec.groups, self.outputs, -1)
        full[:, : self.outputs, whole[0, 0].size :][..., : rest[0, 0].size] = rest.reshape(*rest.shape[:2], -1)
        packed = full.reshape(spec.groups, self.blocks, self.block, self.units, UNIT).transpose(0, 1, 3, 2, 4)
        if self.bits == 4:
            packed = (packed[..., ::2, :] << 4) | (packed[..., 1::2, :] & 15)
        factors = m.view(np.int32) if self.rounding == "float" else m.astype(np.int32)
        bias = weights.get("bias")
        columns = [np.zeros(spec.co, np.int32) if bias is None else bias.astype(np.int32), factors]
        constants = np.stack([self._channels(c).reshape(spec.groups, self.blocks, self.block) for c in columns], 2)
        result = [packed.ravel(), constants.ravel()]
        if self.rounding == "RQ1":
            shift = weights["shift"]
            assert shift is not None
            # Channels that fill up need a legal shift, too.
            result.append(np.maximum(self._channels(shift), 1).astype(np.int8).ravel())
        return tuple(np.ascontiguousarray(part) for part in result)

    def _channels(self, values: np.ndarray) -> np.ndarray:
        """[groups, channels filled up with zeros to whole blocks] of values [co]."""
        full = np.zeros((self.spec.groups, self.blocks * self.block), values.dtype)
        full[:, : self.outputs] = values.reshape(self.spec.groups, self.outputs)
        return full

    def call(self) -> Call:
        add, residual = self.spec.epilogue.add, self.spec.residual
        # Two columns of 16 bits, which DSP instructions take.
        scratch = (4 * self.units * UNIT,)
        plain = self._geometry()
        nested = {f"conv.{name}": value for name, value in plain.items()}
        infix = "_add" if residual else ""
        if self.rounding == "float":
            coded = "_s8" if self.spec.out_type == "int8" else ""
            fields = {**nested, **real_fields(self.spec.epilogue)}
            return Call(f"ek_{self.part}{infix}_f32{coded}", self.part, "ek_conv_f32_t", fields, scratch)
        stem = f"ek_{self.part}" if self.rounding == "RQH" else f"ek_{self.part}_rq1"
        if add is None:
            return Call(f"{stem}_s8", self.part, "ek_conv_t", plain, scratch)
        fields = {**nested, **{f"add.{name}": value for name, value in add_fields(add).items()}}
        return Call(f"{stem}_add_s8", self.part, "ek_conv_add_t", fields, scratch)

    def _geometry(self) -> dict[str, Value]:
        spec, epilogue = self.spec, self.spec.epilogue
        rows, columns = spec.out
        codes = epilogue.requant != "float"
        dense = spec.kernel[1] == 1 or (spec.groups == 1 and spec.dilation[1] == 1)
        return {
            "h": spec.h,
            "w": spec.w,
            "oh": rows,
            "ow": columns,
            "inner_h": spec.h - spec.dilation[0] * (spec.kernel[0] - 1),
            "inner_w": spec.w - spec.kernel[1] + 1 if dense else 0,
            "ci": spec.ci,
            "co": spec.co,
            "groups": spec.groups,
            "depth": self.depth,
            "outputs": self.outputs,
            "kh": spec.kernel[0],
            "kw": spec.kernel[1],
            "sh": spec.stride[0],
            "sw": spec.stride[1],
            "dh": spec.dilation[0],
            "dw": spec.dilation[1],
            "top": spec.padding[0],
            "left": spec.padding[2],
            "units": self.units,
            "row": self.rows[1] // UNIT,
            "rest": self.rows[1] % UNIT,
            "flat": int(self.flat),
            "x_zp": spec.x_zp,
            "zero": epilogue.y_zp,
            "lo": int(max(epilogue.lo, -128)) if codes else -128,
            "hi": int(min(epilogue.hi, 127)) if codes else 127,
        }


@dataclass(frozen=True)
class FullyConnected(Conv):
    """One row of a matrix product, in whole units of the input: pointers x, weights, constants, y. No RQ1."""

    name: ClassVar[str] = "fully_connected"
    block: ClassVar[int] = 4

    @property
    def rows(self) -> tuple[int, int]:
        return 1, self.spec.h * self.spec.w * self.spec.ci

    @property
    def part(self) -> str:
        return "fc" if self.bits == 8 else "fc4"

    def call(self) -> Call:
        plain = self._geometry()
        fields = {name: plain[name] for name in ("co", "units", "zero", "lo", "hi")}
        if self.rounding == "RQH":
            return Call(f"ek_{self.part}_s8", self.part, "ek_fc_t", fields)
        coded = "_s8" if self.spec.out_type == "int8" else ""
        fields = {**{f"fc.{name}": value for name, value in fields.items()}, **real_fields(self.spec.epilogue)}
        return Call(f"ek_{self.part}_f32{coded}", self.part, "ek_fc_f32_t", fields)


def real_fields(epilogue: Epilogue) -> dict[str, Value]:
    """Fields of `ek_real_t`, for the activations that the kernels compute."""
    act, slope, lo, hi = 0, 1.0, 0.0, 0.0
    if epilogue.act == "leaky_relu":
        act, slope = SLOPE, _float32(epilogue.lo)
    elif epilogue.act == "clip":
        # An infinity has no literal.
        if math.isfinite(epilogue.lo):
            act, lo = act | LOWER, _float32(epilogue.lo)
        if math.isfinite(epilogue.hi):
            act, hi = act | UPPER, _float32(epilogue.hi)
    scale = 1.0 if epilogue.y_scale is None else _float32(1 / epilogue.y_scale)
    return {"real.act": act, "real.slope": slope, "real.lo": lo, "real.hi": hi, "real.scale": scale}


def _float32(value: float) -> float:
    """The nearest float32, which repr() gives digits enough for."""
    return float(np.float32(value))


def _conv(spec: Conv2D, weights: Mapping[str, np.ndarray | None], device: Device) -> Conv | None:
    m = weights.get("m")
    if spec.dtype != "int8" or m is None:
        return None
    # Sizes that are int16 in the parameters.
    if max(spec.ci, spec.co, *spec.kernel, *spec.stride, *spec.dilation, *spec.padding) >= 2**15:
        return None
    epilogue = spec.epilogue
    if epilogue.requant == "float":
        if epilogue.act not in ACTIVATIONS:
            return None
        rounding = "float"
    elif epilogue.requant == "RQ1" and m.dtype != np.float32:
        shift = weights["shift"]
        assert shift is not None
        rounding = "RQH" if np.all(shift == HALF_SHIFT) else "RQ1"
    else:
        return None
    kind = FullyConnected if rounding != "RQ1" and _one_row(spec) else Conv
    w = weights["w"]
    assert w is not None
    kernel = kind(spec, rounding, 4 if spec.bits <= 4 and w.size >= HALVED else 8)
    return kernel if kernel.units < 2**15 else None


def _one_row(spec: Conv2D) -> bool:
    """Whether the kernel covers the input, which is one column as it lies in memory."""
    covers = spec.kernel == (spec.h, spec.w) and not any(spec.padding) and spec.dilation == (1, 1)
    whole = spec.groups == 1 and not spec.residual and spec.h * spec.w * spec.ci % UNIT == 0
    return covers and whole and spec.macs >= ROW_MACS


RULES: dict[type, Callable[..., McuKernel | None]] = {Conv2D: _conv}
