"""Meaning of every int8 operator, in NumPy int64. This module is the definition; everything else equals it bit for bit.

Activations are int8 codes in [-128, 127] with a scale and a zero point, weights symmetric int8 codes in [-127, 127],
accumulators int32. Nothing here is tuned: the torch operators (`edgec.qops`) and the generated kernels are the fast
forms, and tests compare them with these functions. The arithmetic is that of Jacob et al., "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference". Layers scale their accumulators to codes by one of
two roundings: RQ1, a 64-bit product and a shift, when their multipliers `m` are int32; RQF, a float32 product, which
devices with float vectors compute in fewer instructions, when they are float32. All other scaling is RQ1. RQH is RQ1
with a shift of 32 everywhere: the upper half of the product, one instruction (SMMULR, VRMULH) on microcontrollers.

Conventions: `padding` is [top, bottom, left, right]; weights are [out, in / groups, kh, kw]; `layout` is "NCHW" or
"NHWC" and concerns activations only; a real number is `scale * (code - zero_point)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgec.errors import EdgecError

QMIN, QMAX = -128, 127
WEIGHT_MAX = 127
LEVELS = 256
ACCUMULATOR_LIMIT = 2**31
# 255 is the largest |code - zero_point|; kernels that shift codes to unsigned reach it as a plain operand too.
CODE_SPAN = 255
MIN_SHIFT, MAX_SHIFT = 1, 62
MAX_ADD_SHIFT = 22

REQUANTS = ("RQ1", "RQF", "RQH")
# The shift of RQH, which is what says that a layer rounds so.
HALF_SHIFT = 32
# No int32 accumulator times a smaller multiplier reaches half a code.
SMALLEST_MULTIPLIER = 2.0**-32

Codes = NDArray[np.int8]
Integers = NDArray[np.int64]


# -- scaling -----------------------------------------------------------------------------------------------------------


def rq1(accumulator: ArrayLike, m: ArrayLike, shift: ArrayLike) -> Integers:
    """Requantise: (accumulator * m + 2^(shift-1)) >> shift, one rounding, half up.

    accumulator: int32 values; m: 0..2^31-1; shift: 1..62. Arrays broadcast. The 64-bit product cannot overflow.
    """
    wide, factor, bits = (np.asarray(v, np.int64) for v in (accumulator, m, shift))
    return (wide * factor + (np.int64(1) << (bits - 1))) >> bits


def rqf(accumulator: ArrayLike, m: ArrayLike) -> Integers:
    """Requantise: rne(float32(accumulator) * m), each step in float32, half to even.

    accumulator: int32 values, of which those beyond 2^24 lose their last bits; m: finite float32 below 2^30. Arrays
    broadcast. The result may exceed int32: clamp before narrowing.
    """
    return np.rint(np.asarray(accumulator, np.int64).astype(np.float32) * np.asarray(m, np.float32)).astype(np.int64)


def requantize(accumulator: ArrayLike, m: ArrayLike, shift: ArrayLike) -> Integers:
    """`rqf` for float32 multipliers, which make no use of `shift`; else `rq1`."""
    factor = np.asarray(m)
    return rqf(accumulator, factor) if factor.dtype == np.float32 else rq1(accumulator, factor, shift)


def multipliers(scales: ArrayLike, requant: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """(m, shift) of positive real multipliers for a rounding of REQUANTS.

    RQH: m = rne(scale * 2^32) and a shift of 32, when all of a layer's are below one half; else as for RQ1.
    """
    if requant == "RQF":
        return float_multipliers(scales)
    if requant == "RQH":
        m = np.rint(_checked_multipliers(scales) * 2.0**HALF_SHIFT)
        if np.all(m < 2.0**31):
            return m.astype(np.int32), np.full(m.shape, HALF_SHIFT, np.int32)
    return quantize_multipliers(scales)


def quantize_multipliers(scales: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Fixed-point form (m, shift) of positive real multipliers, each `m * 2^-shift`, for `rq1`.

    A multiplier below 2^-32 cannot move any int32 accumulator by half a code and becomes m = 0.
    Raises EdgecError for negative, non-finite or too large (2^30 and more) multipliers.
    """
    values = _checked_multipliers(scales)
    fraction, exponent = np.frexp(values)
    m = np.rint(fraction * 2.0**31).astype(np.int64)
    carried = m == 2**31
    m = np.where(carried, 2**30, m)
    shift = 31 - (exponent.astype(np.int64) + carried)
    negligible = (shift > MAX_SHIFT) | (m == 0)
    m, shift = np.where(negligible, 0, m), np.where(negligible, MAX_SHIFT, shift)
    if np.any(shift < MIN_SHIFT):
        raise _too_large(values)
    return m.astype(np.int32), shift.astype(np.int32)


def quantize_multiplier(scale: float) -> tuple[int, int]:
    """(m, shift) of one positive real multiplier; see `quantize_multipliers`."""
    m, shift = quantize_multipliers(scale)
    return int(m), int(shift)


def float_multipliers(scales: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Float form (m, shift) of positive real multipliers for `rqf`: float32 values, and zeros for the shifts.

    A multiplier below 2^-32 becomes an exact 0, so that no device meets a subnormal number. Raises EdgecError as
    `quantize_multipliers` does.
    """
    values = _checked_multipliers(scales)
    if np.any(values >= 2.0**30):
        raise _too_large(values)
    m = np.where(values < SMALLEST_MULTIPLIER, 0.0, values).astype(np.float32)
    return m, np.zeros(m.shape, np.int32)


def add_parameters(scale_a: float, scale_b: float, scale_y: float) -> tuple[int, int, int]:
    """(ma, mb, f) of `qadd`: integer multipliers scale_a / scale_y and scale_b / scale_y at 2^f, rounded half up.

    f is the largest value up to 22 for which no sum of two code differences overflows int32. A negative scale
    subtracts. Raises EdgecError when the output scale is more than about 2^22 times finer than the inputs.
    """
    for f in range(MAX_ADD_SHIFT, 0, -1):
        ma, mb = (int(np.floor(s / scale_y * 2.0**f + 0.5)) for s in (scale_a, scale_b))
        if CODE_SPAN * (abs(ma) + abs(mb)) < ACCUMULATOR_LIMIT - (1 << (f - 1)):
            return ma, mb, f
    raise EdgecError(
        f"cannot add scales {scale_a:.3g} and {scale_b:.3g} into {scale_y:.3g}",
        hint="the sum's range is far too small for its operands: calibrate with more data or keep the layer float",
    )


def clip_codes(low: float, high: float, scale: float, zero_point: int) -> tuple[int, int]:
    """Codes of a fused clip to [low, high] (real numbers, infinities allowed), within [-128, 127]."""
    lo = QMIN if np.isneginf(low) else zero_point + int(np.rint(low / scale))
    hi = QMAX if np.isposinf(high) else zero_point + int(np.rint(high / scale))
    return min(max(lo, QMIN), QMAX), min(max(hi, QMIN), QMAX)


def bias_codes(
    bias: ArrayLike, weights: ArrayLike, scale_x: float, zero_x: int, scale_w: ArrayLike
) -> NDArray[np.int32]:
    """int32 bias of a convolution or linear layer, with `-zero_x * sum(weights)` folded in.

    bias: real, one per output channel; weights: int8 codes, output channel first; scale_w: one per channel or scalar.
    Raises EdgecError when an accumulator could leave int32.
    """
    codes = np.asarray(weights, np.int64)
    sums = codes.reshape(len(codes), -1).sum(axis=1)
    exact = np.rint(np.asarray(bias, np.float64) / (scale_x * np.asarray(scale_w, np.float64)))
    if not np.all(np.abs(exact) < ACCUMULATOR_LIMIT):
        raise EdgecError("bias does not fit int32 at the layer's scale", hint="keep the layer float")
    folded = exact.astype(np.int64) - zero_x * sums
    check_accumulator(codes, folded)
    return folded.astype(np.int32)


def check_accumulator(weights: ArrayLike, bias: ArrayLike) -> None:
    """Raise EdgecError unless, for all inputs and in any order of summation, every partial sum fits int32.

    The bound is 255 * sum|w| + |bias| < 2^31 per channel; any layer with 255 * 127 * K + |bias| < 2^31 satisfies it.
    """
    codes = np.asarray(weights, np.int64)
    reach = CODE_SPAN * np.abs(codes).reshape(len(codes), -1).sum(axis=1) + np.abs(np.asarray(bias, np.int64))
    if np.any(reach >= ACCUMULATOR_LIMIT):
        depth = codes[0].size
        raise EdgecError(
            f"int32 accumulator could overflow (channel {int(reach.argmax())}, {depth} products, "
            f"bound {int(reach.max())} >= 2^31)",
            hint="keep the layer float or split it",
        )


# -- border of the integer domain --------------------------------------------------------------------------------------


def quantize(x: ArrayLike, scale: float, zero_point: int) -> Codes:
    """clamp(rne(x / scale) + zero_point); float32 division, half to even. NaN has no defined code."""
    steps = np.rint(np.asarray(x, np.float32) / np.float32(scale)) + np.float32(zero_point)
    return np.clip(steps, QMIN, QMAX).astype(np.int8)


def dequantize(q: ArrayLike, scale: float, zero_point: int) -> NDArray[np.float32]:
    """scale * (q - zero_point) in float32."""
    return np.float32(scale) * (np.asarray(q, np.int32) - zero_point).astype(np.float32)


def dequantize_weight(codes: Codes, scale: NDArray[np.float32], zero: Codes | None, group: int) -> NDArray[np.float32]:
    """scale * (code - zero) in float32, where `group` input channels of an output channel share scale and zero.

    codes: int8 [outputs, inputs, ...]; scale, zero: [outputs, ceil(inputs / group)]. The difference is exact and the
    product rounded once.
    """
    shape = (*codes.shape[:2], *[1] * (codes.ndim - 2))
    spread = np.arange(codes.shape[1]) // group
    wide = codes.astype(np.int32)
    if zero is not None:
        wide = wide - zero.astype(np.int32)[:, spread].reshape(shape)
    return wide.astype(np.float32) * scale[:, spread].reshape(shape)


# -- layers ------------------------------------------------------------------------------------------------------------


def qconv2d(
    x: Codes,
    w: Codes,
    bias: NDArray[np.int32],
    m: NDArray[Any],
    shift: NDArray[np.int32],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zp: int,
    y_zp: int,
    lo: int,
    hi: int,
    layout: str = "NCHW",
) -> Codes:
    """Convolution of codes; padding holds code `x_zp`, `bias` contains -x_zp * sum(w) already.

    m, shift: one per output channel, see `requantize`.
    """
    accumulator = _conv_sums(x, w, bias, stride, padding, dilation, groups, x_zp, layout)
    per_channel = (1, -1, 1, 1)
    y = _finish(accumulator, m.reshape(per_channel), shift.reshape(per_channel), y_zp, lo, hi)
    return _from_nchw(y, layout)


def qconv2d_float(
    x: Codes,
    w: Codes,
    bias: NDArray[np.int32],
    scale: NDArray[np.float32],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zp: int,
    layout: str = "NCHW",
) -> NDArray[np.float32]:
    """`qconv2d` with a real result: float32(accumulator) * scale, with one float32 scale per output channel."""
    accumulator = _conv_sums(x, w, bias, stride, padding, dilation, groups, x_zp, layout)
    return _from_nchw(_real(accumulator, scale.reshape(1, -1, 1, 1)), layout)


def _conv_sums(
    x: Codes,
    w: Codes,
    bias: NDArray[np.int32],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zp: int,
    layout: str,
) -> Integers:
    """Accumulators [n, out, rows, columns] of a convolution."""
    padded = _spatial_pad(_to_nchw(x, layout), padding, x_zp)
    n, channels, _, _ = padded.shape
    outputs, depth, kh, kw = w.shape
    if channels != depth * groups:
        raise EdgecError(f"{channels} input channels do not match weights for {groups} groups of {depth}")
    rows = _out_size(padded.shape[2], kh, stride[0], dilation[0])
    columns = _out_size(padded.shape[3], kw, stride[1], dilation[1])
    accumulator = np.zeros((n, outputs, rows, columns), np.int64)
    per_group = outputs // groups
    for group in range(groups):
        source = padded[:, group * depth : (group + 1) * depth]
        out = slice(group * per_group, (group + 1) * per_group)
        for i in range(kh):
            for j in range(kw):
                tap = _taps(source, i * dilation[0], j * dilation[1], rows, columns, stride)
                kernel = w[out, :, i, j].astype(np.int64)
                accumulator[:, out] += np.einsum("nchw,oc->nohw", tap, kernel)
    return accumulator + bias.astype(np.int64).reshape(1, -1, 1, 1)


def qlinear(
    x: Codes,
    w: Codes,
    bias: NDArray[np.int32],
    m: NDArray[Any],
    shift: NDArray[np.int32],
    y_zp: int,
    lo: int,
    hi: int,
) -> Codes:
    """x[..., K] times w[O, K] transposed; `bias` contains -x_zp * sum(w) already."""
    accumulator = np.einsum("...k,ok->...o", x.astype(np.int64), w.astype(np.int64)) + bias.astype(np.int64)
    return _finish(accumulator, m, shift, y_zp, lo, hi)


def qlinear_float(x: Codes, w: Codes, bias: NDArray[np.int32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """`qlinear` with a real result: float32(accumulator) * scale, with one float32 scale per output channel."""
    accumulator = np.einsum("...k,ok->...o", x.astype(np.int64), w.astype(np.int64)) + bias.astype(np.int64)
    return _real(accumulator, scale)


def qadd(a: Codes, b: Codes, ma: int, mb: int, f: int, za: int, zb: int, zy: int, lo: int, hi: int) -> Codes:
    """((ma (a - za) + mb (b - zb) + 2^(f-1)) >> f) + zy, clamped; operands broadcast."""
    total = ma * (a.astype(np.int64) - za) + mb * (b.astype(np.int64) - zb)
    return _clamp(((total + (1 << (f - 1))) >> f) + zy, lo, hi)


def qmul(a: Codes, b: Codes, m: int, shift: int, za: int, zb: int, zy: int, lo: int, hi: int) -> Codes:
    """RQ1((a - za)(b - zb)) + zy, clamped; operands broadcast."""
    return _finish((a.astype(np.int64) - za) * (b.astype(np.int64) - zb), m, shift, zy, lo, hi)


def qrescale(x: Codes, m: int, shift: int, zx: int, zy: int, lo: int, hi: int) -> Codes:
    """The same real values with another scale and zero point."""
    return _finish(x.astype(np.int64) - zx, m, shift, zy, lo, hi)


def qlut(x: Codes, table: Codes, axis: int) -> Codes:
    """table[code + 128]; a table [C, 256] is indexed by the position along `axis` too."""
    index = x.astype(np.int64) - QMIN
    if table.ndim == 1:
        return table[index]
    shape = [1] * x.ndim
    shape[axis] = -1
    return table[np.arange(len(table)).reshape(shape), index]


def lut_table(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    scale_x: ArrayLike,
    zero_x: ArrayLike,
    scale_y: float,
    zero_y: int,
) -> Codes:
    """Table of a real function for `qlut`, computed in float64 over all 256 input codes.

    scale_x, zero_x: numbers, or one per channel [C]. function: maps the real inputs, [256] or [C, 256], to outputs of
    shape [256] or [C, 256]. Raises EdgecError when an output is NaN.
    """
    scale, zero = np.asarray(scale_x, np.float64)[..., None], np.asarray(zero_x, np.float64)[..., None]
    inputs = scale * (np.arange(QMIN, QMAX + 1, dtype=np.float64) - zero)
    outputs = np.asarray(function(inputs), np.float64)
    if np.any(np.isnan(outputs)):
        raise EdgecError(
            "function is not a number for some input codes",
            hint="keep the layer float: its input range leaves the function's domain",
        )
    return np.clip(np.rint(outputs / scale_y) + zero_y, QMIN, QMAX).astype(np.int8)


def qavg_pool2d(
    x: Codes,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    m: int,
    shift: int,
    zx: int,
    zy: int,
    lo: int,
    hi: int,
    layout: str = "NCHW",
) -> Codes:
    """RQ1 of the window sum of (x - zx), where the multiplier contains 1/n; padding counts as real zero."""
    padded = _spatial_pad(_to_nchw(x, layout), padding, zx).astype(np.int64) - zx
    total = _windows(padded, kernel, stride, (1, 1)).sum(axis=0)
    return _from_nchw(_finish(total, m, shift, zy, lo, hi), layout)


def qmean(x: Codes, dim: Sequence[int], keepdim: bool, m: int, shift: int, zx: int, zy: int, lo: int, hi: int) -> Codes:
    """RQ1 of the sum of (x - zx) over the axes `dim`, where the multiplier contains 1/n."""
    total = (x.astype(np.int64) - zx).sum(axis=tuple(dim), keepdims=keepdim)
    return _finish(total, m, shift, zy, lo, hi)


def qmax_pool2d(
    x: Codes,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    layout: str = "NCHW",
) -> Codes:
    """Largest code of each window; padding holds -128. `ceil_mode` keeps a last window that starts inside the input."""
    nchw = _to_nchw(x, layout)
    padded = _spatial_pad(nchw, padding, QMIN)
    if ceil_mode:
        extra = []
        for axis in (0, 1):
            before, after = padding[2 * axis], padding[2 * axis + 1]
            out = pool_out_size(nchw.shape[2 + axis], kernel[axis], stride[axis], before, after, dilation[axis], True)
            needed = (out - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
            extra += [0, max(0, needed - padded.shape[2 + axis])]
        padded = _spatial_pad(padded, extra, QMIN)
    return _from_nchw(_windows(padded, kernel, stride, dilation).max(axis=0), layout)


def pool_out_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil_mode: bool) -> int:
    """Output size of a pooling window along one axis, by PyTorch's rule.

    With `ceil_mode` a partial window at the end counts if it starts inside the input or the leading padding.
    """
    span = size + before + after - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    out = (span + stride - 1) // stride + 1
    return out - 1 if (out - 1) * stride >= size + before else out


# -- shared steps ------------------------------------------------------------------------------------------------------


def _checked_multipliers(scales: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scales, np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise EdgecError(
            f"requantisation multiplier is negative or not finite: {values.ravel()[:4]}",
            hint="check the calibration data for NaN or infinity",
        )
    return values


def _too_large(values: NDArray[np.float64]) -> EdgecError:
    return EdgecError(
        f"requantisation multiplier {values.max():.3g} is 2^30 or more",
        hint="the output range is far too small for its inputs: calibrate with more data or keep the layer float",
    )


def _finish(accumulator: Integers, m: ArrayLike, shift: ArrayLike, zero_point: int, lo: int, hi: int) -> Codes:
    _check_sums(accumulator)
    return _clamp(requantize(accumulator, m, shift) + zero_point, lo, hi)


def _real(accumulator: Integers, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    _check_sums(accumulator)
    return accumulator.astype(np.float32) * scale


def _check_sums(accumulator: Integers) -> None:
    if accumulator.size and (accumulator.min() < -ACCUMULATOR_LIMIT or accumulator.max() >= ACCUMULATOR_LIMIT):
        raise EdgecError("accumulator left int32", hint="build the bias with `bias_codes`, which checks the bound")


def _clamp(values: Integers, lo: int, hi: int) -> Codes:
    return np.clip(values, lo, hi).astype(np.int8)


def _to_nchw(x: NDArray[Any], layout: str) -> NDArray[Any]:
    return x.transpose(0, 3, 1, 2) if layout == "NHWC" else x


def _from_nchw(y: NDArray[Any], layout: str) -> NDArray[Any]:
    return np.ascontiguousarray(y.transpose(0, 2, 3, 1)) if layout == "NHWC" else y


def _spatial_pad(x: Codes, padding: Sequence[int], code: int) -> Codes:
    top, bottom, left, right = padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=code)


def _out_size(padded: int, kernel: int, stride: int, dilation: int) -> int:
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


def _taps(x: NDArray, top: int, left: int, rows: int, columns: int, stride: Sequence[int]) -> Integers:
    """The input element under one kernel tap, for every output position."""
    bottom, right = top + stride[0] * (rows - 1) + 1, left + stride[1] * (columns - 1) + 1
    return x[:, :, top : bottom : stride[0], left : right : stride[1]].astype(np.int64)


def _windows(x: NDArray, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> NDArray:
    """All kernel taps stacked on a new first axis, in the dtype of x."""
    rows = _out_size(x.shape[2], kernel[0], stride[0], dilation[0])
    columns = _out_size(x.shape[3], kernel[1], stride[1], dilation[1])
    taps = [
        _taps(x, i * dilation[0], j * dilation[1], rows, columns, stride)
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return np.stack(taps).astype(x.dtype)
