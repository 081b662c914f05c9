"""Kernels for Helium (Armv8.1-M MVE): int8 layers and what goes with them.

They are asked first and answer for devices of isa "mve" only; what they decline goes to the kernels for all cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgec.integer import ACCUMULATOR_LIMIT, CODE_SPAN, HALF_SHIFT
from edgec.targets.device import Device
from edgec.targets.kernels.common import AddEpilogue, Epilogue, round_up
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize, broadcast_shape, merged_axes
from edgec.targets.kernels.pool import AvgPool, MaxPool
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand, Value
from edgec.targets.mcu.kernels.conv import ACTIVATIONS, real_fields

Weights = Mapping[str, np.ndarray | None]

# int8 elements in a vector.
LANES = 16
# Output channels that the matrix product takes at a time.
BLOCK = 4
# Scratch memory for columns, where two pixels do not need more.
COLUMNS = 576


def add_fields(add: AddEpilogue | None) -> tuple[int, ...]:
    """Values of `ek_mve_add_t`: with rounding and zero points of both operands in one number, modulo 2^32."""
    if add is None:
        return (0,) * 7
    start = (1 << (add.f - 1)) - add.m_self * add.z_self - add.m_other * add.z_other
    wrapped = (start + 2**31) % 2**32 - 2**31
    return add.m_self, add.m_other, wrapped, add.f, add.z_y, add.lo, add.hi


@dataclass(frozen=True)
class MveConv(McuKernel):
    """A dense int8 convolution by columns of multiples of 16 bytes."""

    spec: Conv2D

    name = "conv2d"

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def inplace(self) -> tuple[int, ...]:
        return (2,) if self.spec.inplace else ()

    @property
    def depth(self) -> int:
        """Products of one sum."""
        return math.prod(self.spec.kernel) * self.spec.ci

    @property
    def steps(self) -> int:
        """Vectors in a column."""
        return -(-self.depth // LANES)

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        size = math.prod(s.out) * s.co
        packed = -(-s.co // BLOCK) * (2 * 4 * BLOCK + self.steps * LANES * BLOCK)
        residual = [Operand(size, s.epilogue.residual_type("int8"))] if s.residual else []
        return (Operand(s.h * s.w * s.ci), Operand(packed), *residual, Operand(size, s.out_type))

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Per 4 channels: weights by 16 places of the column, biases, multipliers."""
        w, m, bias = weights["w"], weights["m"], weights.get("bias")
        assert w is not None and m is not None
        outputs, blocks = self.spec.co, -(-self.spec.co // BLOCK)
        rows = np.zeros((blocks * BLOCK, self.steps * LANES), np.int8)
        rows[:outputs, : self.depth] = w.transpose(0, 3, 2, 1).reshape(outputs, -1)
        rows = rows.reshape(blocks, BLOCK, self.steps, LANES).transpose(0, 2, 1, 3).reshape(blocks, -1)
        tails = np.zeros((2, blocks * BLOCK), np.int32)
        tails[0, :outputs] = 0 if bias is None else bias
        tails[1, :outputs] = m.view(np.int32)
        tails = tails.reshape(2, blocks, BLOCK).transpose(1, 0, 2).reshape(blocks, -1)
        return (np.concatenate([rows, little_endian(tails)], axis=1).reshape(-1),)

    @property
    def pointwise(self) -> bool:
        """Whether columns are the pixels of the input themselves."""
        s = self.spec
        return s.kernel == (1, 1) and s.stride == (1, 1) and not any(s.padding)

    @property
    def shared(self) -> bool:
        """Whether the columns of neighbouring pixels overlap in memory."""
        s = self.spec
        return s.dilation[1] == 1 and s.stride[1] <= s.kernel[1]

    @property
    def direct(self) -> int:
        """Pixels of a pointwise convolution whose columns end within the input, read in whole vectors."""
        s = self.spec
        spare = s.h * s.w * s.ci - self.steps * LANES
        return spare // s.ci + 1 if self.pointwise and spare >= 0 else 0

    def columns(self, pixels: int) -> int:
        """Bytes read as columns of so many neighbours."""
        s = self.spec
        step = s.ci if self.pointwise else s.kernel[0] * s.ci * (s.stride[1] if self.shared else s.kernel[1])
        return (pixels - 1) * step + self.steps * LANES

    @property
    def pixels(self) -> int:
        """Pixels worked on at a time: pairs, as many as columns fit into `COLUMNS` bytes."""
        most = range(2, max(self.spec.out[1], 2) + 1, 2)
        return max([n for n in most if self.columns(n) <= COLUMNS], default=2)

    @property
    def scratch(self) -> int:
        """Bytes of the columns that are put together at a time."""
        s = self.spec
        return max(LANES, self.columns(s.h * s.w - self.direct if self.pointwise else min(self.pixels, s.out[1])))

    def call(self) -> Call:
        add = self.spec.epilogue.add
        fields = {**self.geometry(), "add": add_fields(add)}
        return Call(f"ek_mve_conv{'_add' if add else ''}_s8", "mve_conv", "ek_mve_conv_t", fields, (self.scratch,))

    def geometry(self) -> dict[str, Value]:
        """Fields of `ek_mve_conv_t` but for the addition."""
        s, e = self.spec, self.spec.epilogue
        fields: dict[str, Value] = {"ih": s.h, "iw": s.w, "ci": s.ci, "oh": s.out[0], "ow": s.out[1], "co": s.co}
        fields |= window_fields(s) | {"steps": self.steps, "pixels": self.pixels, "shared": int(self.shared)}
        fields |= {"pointwise": int(self.pointwise), "direct": self.direct, "x_zero": s.x_zp}
        return fields | {"y_zero": e.y_zp, **code_range(e)}


@dataclass(frozen=True)
class MveRq1Conv(MveConv):
    """`MveConv` with multipliers of one half and more: a shift for every channel, behind the weights."""

    @property
    def inplace(self) -> tuple[int, ...]:
        return (3,) if self.spec.inplace else ()

    def operands(self) -> tuple[Operand, ...]:
        x, w, *rest = super().operands()
        return (x, w, Operand(self.spec.co), *rest)

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """As `MveConv`, and the shifts."""
        shift = weights["shift"]
        assert shift is not None
        return (*super().pack(device, **weights), shift.astype(np.int8))

    def call(self) -> Call:
        add = self.spec.epilogue.add
        fields = {**self.geometry(), "add": add_fields(add)}
        return Call(f"ek_mve_conv_rq1{'_add' if add else ''}_s8", "mve_rq1", "ek_mve_conv_t", fields, (self.scratch,))


@dataclass(frozen=True)
class MveRealConv(MveConv):
    """`MveConv` with real results, as float32 or as codes of them; the residual is float32."""

    def call(self) -> Call:
        fields: dict[str, Value] = {f"conv.{name}": value for name, value in self.geometry().items()}
        fields |= {**real_fields(self.spec.epilogue), "coded": int(self.spec.out_type == "int8")}
        function = f"ek_mve_conv{'_add' if self.spec.residual else ''}_f32"
        return Call(function, "mve_real", "ek_mve_real_t", fields, (self.scratch,))


@dataclass(frozen=True)
class MveDepthwise(McuKernel):
    """A depthwise int8 convolution, 16 channels of a pixel at a time."""

    spec: Depthwise

    name = "depthwise"

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def taps(self) -> int:
        """Taps of the window, made odd."""
        return math.prod(self.spec.kernel) | 1

    @property
    def padded(self) -> bool:
        """Whether a tap may lie beside the input, or is the one that makes their number odd."""
        padding = any(p > 0 for p in self.spec.padding)
        return padding or self.taps != math.prod(self.spec.kernel)

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        packed = -(-s.c // LANES) * LANES * (2 * 4 + self.taps)
        return Operand(s.h * s.w * s.c), Operand(packed), Operand(math.prod(s.out) * s.c)

    @property
    def joined(self) -> bool:
        """Whether neighbouring pixels are taken as one with 16 channels: the taps of all then lie in the input."""
        s = self.spec
        return s.c < LANES and LANES % s.c == 0 and s.stride[1] == 1 and math.prod(s.kernel) == self.taps

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """Per 16 channels: biases, weights of each tap, multipliers; first and last in the order of the sums."""
        w, m, bias = weights["w"], weights["m"], weights.get("bias")
        assert w is not None and m is not None
        c, blocks = self.spec.c, -(-self.spec.c // LANES)
        filters = np.zeros((self.taps, blocks * LANES), np.int8)
        filters[: math.prod(self.spec.kernel), :c] = w.reshape(c, -1).T
        heads = np.zeros((2, blocks * LANES), np.int32)
        heads[0, :c] = 0 if bias is None else bias
        heads[1, :c] = m
        if self.joined:
            filters, heads = (np.tile(v[:, :c], LANES // c) for v in (filters, heads))
        filters = filters.reshape(self.taps, blocks, LANES).transpose(1, 0, 2).reshape(blocks, -1)
        # Lane k of sum 2 i + j holds channel 4 k + 2 j + i.
        sums = heads.reshape(2, blocks, 4, 2, 2).transpose(0, 1, 4, 3, 2).reshape(2, blocks, -1)
        first, last = (little_endian(values) for values in sums)
        return (np.concatenate([first, filters, last], axis=1).reshape(-1),)

    def call(self) -> Call:
        s, e = self.spec, self.spec.epilogue
        fields: dict[str, Value] = {"ih": s.h, "iw": s.w, "c": s.c, "oh": s.out[0], "ow": s.out[1]}
        fields |= window_fields(s) | {"taps": self.taps, "padded": int(self.padded), "joined": int(self.joined)}
        fields |= {"x_zero": s.x_zp, "y_zero": e.y_zp, **code_range(e)}
        scratch = 12 * self.taps + (round_up(s.c, LANES) if self.padded else 0)
        return Call("ek_mve_depthwise_s8", "mve_depthwise", "ek_mve_depthwise_t", fields, (scratch,))


@dataclass(frozen=True)
class MveAdd(McuKernel):
    """Addition of two int8 tensors, neither of which is repeated."""

    spec: QAdd

    name = "qadd"

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0, 1)

    def operands(self) -> tuple[Operand, ...]:
        return (Operand(math.prod(self.spec.a)),) * 3

    def call(self) -> Call:
        fields: dict[str, Value] = {"n": math.prod(self.spec.a), "add": add_fields(self.spec.add)}
        return Call("ek_mve_qadd_s8", "mve_elementwise", "ek_mve_qadd_t", fields)


@dataclass(frozen=True)
class MveMul(McuKernel):
    """Product of two int8 tensors: elements of one shape, or rows of the first with all of the second."""

    spec: QMul

    name = "qmul"

    @property
    def inplace(self) -> tuple[int, ...]:
        return self.spec.inplace

    def operands(self) -> tuple[Operand, ...]:
        a, b = (Operand(math.prod(shape)) for shape in (self.spec.a, self.spec.b))
        return a, b, a

    def call(self) -> Call:
        s = self.spec
        n = math.prod(s.b)
        rows = math.prod(s.a) // n
        fields: dict[str, Value] = {"rows": rows, "n": n, "again": int(rows > 1), "za": s.za, "zb": s.zb}
        fields |= rescale_fields(s.m, s.shift, s.zy, s.lo, s.hi)
        return Call("ek_mve_qmul_s8", "mve_elementwise", "ek_mve_qmul_t", fields)


@dataclass(frozen=True)
class MveRescale(McuKernel):
    """Codes of the same values on another grid."""

    spec: QRescale

    name = "qrescale"

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,)

    def operands(self) -> tuple[Operand, ...]:
        return (Operand(math.prod(self.spec.shape)),) * 2

    def call(self) -> Call:
        s = self.spec
        fields: dict[str, Value] = {"n": math.prod(s.shape), "zero": s.zx}
        fields |= rescale_fields(s.m, s.shift, s.zy, s.lo, s.hi)
        return Call("ek_mve_qrescale_s8", "mve_elementwise", "ek_mve_qrescale_t", fields)


@dataclass(frozen=True)
class MveLut(McuKernel):
    """One table for all codes, read 16 at a time."""

    spec: QLut

    name = "qlut"

    def operands(self) -> tuple[Operand, ...]:
        n = Operand(math.prod(self.spec.shape))
        return n, Operand(256), n

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The table as it is."""
        table = weights["table"]
        assert table is not None
        return (np.ascontiguousarray(table).reshape(-1),)

    def call(self) -> Call:
        return Call("ek_mve_lut_s8", "mve_elementwise", "ek_mve_lut_t", {"n": math.prod(self.spec.shape)})


@dataclass(frozen=True)
class MvePool(McuKernel):
    """Average or maximum of int8 windows."""

    spec: AvgPool | MaxPool

    name = "pool"

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        return Operand(s.h * s.w * s.c), Operand(math.prod(s.out) * s.c)

    def call(self) -> Call:
        s = self.spec
        fields: dict[str, Value] = {"ih": s.h, "iw": s.w, "c": s.c, "oh": s.out[0], "ow": s.out[1]}
        fields |= window_fields(s)
        if isinstance(s, MaxPool):
            return Call("ek_mve_max_pool_s8", "mve_elementwise", "ek_mve_pool_t", fields)
        q = s.requant
        assert q is not None
        fields |= {"x_zero": q.x_zp, **rescale_fields(q.m, q.shift, q.y_zp, q.lo, q.hi)}
        return Call("ek_mve_avg_pool_s8", "mve_elementwise", "ek_mve_pool_t", fields)


@dataclass(frozen=True)
class MveQuantize(McuKernel):
    """float32 to int8 codes."""

    spec: Quantize

    name = "quantize"

    def operands(self) -> tuple[Operand, ...]:
        n = math.prod(self.spec.shape)
        return Operand(n, "float32"), Operand(n)

    def call(self) -> Call:
        fields = grid_fields(self.spec)
        return Call("ek_mve_quantize_f32", "mve_elementwise", "ek_mve_grid_t", fields)


@dataclass(frozen=True)
class MveDequantize(McuKernel):
    """int8 codes to float32."""

    spec: Dequantize

    name = "dequantize"

    def operands(self) -> tuple[Operand, ...]:
        n = math.prod(self.spec.shape)
        return Operand(n), Operand(n, "float32")

    def call(self) -> Call:
        fields = grid_fields(self.spec)
        return Call("ek_mve_dequantize_s8", "mve_elementwise", "ek_mve_grid_t", fields)


def grid_fields(spec: Quantize | Dequantize) -> dict[str, Value]:
    """Values of `ek_mve_grid_t`, all float32."""
    scale = np.float32(spec.scale)
    values = (scale, np.float32(1.0) / scale, np.float32(512.0) * scale)
    fields: dict[str, Value] = {"n": math.prod(spec.shape)}
    fields |= dict(zip(("scale", "inverse", "limit"), map(float, values), strict=True))
    return fields | {"zero": spec.zero_point}


def growth(shift: int) -> int:
    """Bits that an accumulator of RQ1 is shifted left, so that more than 32 bits of its product are shifted out.

    The upper half of a product is then all that decides: with k = shift - 32 > 0, (p + 2^(shift-1)) >> shift is
    ((p >> 32) + 2^(k-1)) >> k.
    """
    return max(0, HALF_SHIFT + 1 - shift)


def rescale_fields(m: int, shift: int, zero: int, lo: int, hi: int) -> dict[str, Value]:
    """Values of `ek_mve_rescale_t`, a field `to`."""
    grow = growth(shift)
    return {"to": (m, grow, shift + grow - HALF_SHIFT, zero, lo, hi)}


def fits(largest: int, shift: int) -> bool:
    """Whether integers up to `largest` can be shifted left as RQ1 with this shift needs it."""
    return largest << growth(shift) < ACCUMULATOR_LIMIT


def little_endian(values: np.ndarray) -> np.ndarray:
    """int32 [n, k] as bytes [n, 4 k]."""
    return np.ascontiguousarray(values, dtype="<i4").view(np.int8)


def window_fields(spec: Conv2D | Depthwise | AvgPool | MaxPool) -> dict[str, Value]:
    """Kernel, stride, dilation, and padding above and on the left."""
    names = ("kh", "kw", "sh", "sw", "dh", "dw", "top", "left")
    return dict(zip(names, (*spec.kernel, *spec.stride, *spec.dilation, *spec.padding[::2]), strict=True))


def code_range(epilogue: Epilogue) -> dict[str, Value]:
    """lo and hi of an int8 epilogue, which are infinite by default; all codes where results are real."""
    if epilogue.requant == "float":
        return {"lo": -128, "hi": 127}
    return {"lo": int(max(epilogue.lo, -128)), "hi": int(min(epilogue.hi, 127))}


def takes(epilogue: Epilogue, dtype: str, weights: Weights, device: Device) -> bool:
    """Whether a layer has int8 results by integer multipliers (RQ1)."""
    plain = epilogue.requant == "RQ1" and epilogue.act == "none" and not epilogue.residual
    m = weights.get("m")
    return device.isa == "mve" and dtype == "int8" and plain and m is not None and m.dtype == np.int32


def half(weights: Weights) -> bool:
    """Whether all multipliers are below one half: RQH, one instruction."""
    shift = weights["shift"]
    return shift is not None and bool(np.all(shift == HALF_SHIFT))


def _conv(spec: Conv2D, weights: Weights, device: Device) -> McuKernel | None:
    if spec.groups != 1 or device.isa != "mve":
        return None
    if spec.dtype == "int8" and spec.epilogue.requant == "float":
        return MveRealConv(spec) if spec.epilogue.act in ACTIVATIONS else None
    if not takes(spec.epilogue, spec.dtype, weights, device):
        return None
    return MveConv(spec) if half(weights) else MveRq1Conv(spec)


def _depthwise(spec: Depthwise, weights: Weights, device: Device) -> McuKernel | None:
    if spec.epilogue.add is not None or not takes(spec.epilogue, spec.dtype, weights, device):
        return None
    return MveDepthwise(spec) if half(weights) else None


def _add(spec: QAdd, weights: Weights, device: Device) -> McuKernel | None:
    sizes = {math.prod(shape) for shape in (spec.a, spec.b, broadcast_shape(spec.a, spec.b))}
    return MveAdd(spec) if device.isa == "mve" and len(sizes) == 1 else None


def _mul(spec: QMul, weights: Weights, device: Device) -> McuKernel | None:
    if device.isa != "mve" or not fits(CODE_SPAN**2, spec.shift):
        return None
    out = broadcast_shape(spec.a, spec.b)
    shape, (a, b) = merged_axes(out, [spec.a, spec.b])
    return MveMul(spec) if a == shape and b in (shape, (1, *shape[1:])) and len(shape) < 3 else None


def _rescale(spec: QRescale, weights: Weights, device: Device) -> McuKernel | None:
    return MveRescale(spec) if device.isa == "mve" and fits(CODE_SPAN, spec.shift) else None


def _lut(spec: QLut, weights: Weights, device: Device) -> McuKernel | None:
    return MveLut(spec) if device.isa == "mve" and not spec.per_channel else None


def _average(spec: AvgPool, weights: Weights, device: Device) -> McuKernel | None:
    q = spec.requant
    if device.isa != "mve" or spec.dtype != "int8" or q is None:
        return None
    return MvePool(spec) if fits(CODE_SPAN * spec.taps, q.shift) else None


def _maximum(spec: MaxPool, weights: Weights, device: Device) -> McuKernel | None:
    return MvePool(spec) if device.isa == "mve" and spec.dtype == "int8" else None


def _exact(scale: float) -> bool:
    """Whether no intermediate value of a step is subnormal, which vectors take for zero, or infinite."""
    return 2.0**-60 <= scale <= 2.0**60


def _quantize(spec: Quantize, weights: Weights, device: Device) -> McuKernel | None:
    return MveQuantize(spec) if device.isa == "mve" and _exact(spec.scale) else None


def _dequantize(spec: Dequantize, weights: Weights, device: Device) -> McuKernel | None:
    return MveDequantize(spec) if device.isa == "mve" and _exact(spec.scale) else None


RULES: dict[type, Callable[..., McuKernel | None]] = {
    Conv2D: _conv,
    Depthwise: _depthwise,
    QAdd: _add,
    QMul: _mul,
    QRescale: _rescale,
    QLut: _lut,
    AvgPool: _average,
    MaxPool: _maximum,
    Quantize: _quantize,
    Dequantize: _dequantize,
}
