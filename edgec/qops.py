"""The int8 operators as PyTorch custom operators `edgec::q*`, so that a quantised Program is an ordinary graph.

Importing this module registers them; they can be exported, re-exported and saved in `.pt2` files (import this module
before loading such a file). `edgec.integer` defines their meaning and conventions, and results equal it bit for bit:
integer sums are taken in floating point only where every partial sum, in any order, is exactly representable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from edgec.integer import ACCUMULATOR_LIMIT, CODE_SPAN, QMAX, QMIN, pool_out_size

FLOAT32_EXACT = 2**24
LARGEST_CODE = 128
# When sums are too long for float32, weights are split into SPLIT * high + low with |high|, |low| <= SPLIT / 2.
SPLIT = 16


# -- border of the integer domain --------------------------------------------------------------------------------------


@torch.library.custom_op("edgec::quantize", mutates_args=(), schema="(Tensor x, float scale, int zero_point) -> Tensor")
def quantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """float32 to int8 codes; see `edgec.integer.quantize`."""
    divisor = torch.tensor(scale, dtype=torch.float32, device=x.device)
    return _int8((x / divisor).round_().add_(zero_point).clamp_(QMIN, QMAX))


@quantize.register_fake
def _(x, scale, zero_point):
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op(
    "edgec::dequantize", mutates_args=(), schema="(Tensor q, float scale, int zero_point) -> Tensor"
)
def dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """int8 codes to float32; see `edgec.integer.dequantize`."""
    factor = torch.tensor(scale, dtype=torch.float32, device=q.device)
    return q.to(torch.float32).sub_(zero_point).mul_(factor).contiguous()


@dequantize.register_fake
def _(q, scale, zero_point):
    return q.new_empty(q.shape, dtype=torch.float32)


@torch.library.custom_op(
    "edgec::dequantize_weight",
    mutates_args=(),
    schema="(Tensor codes, Tensor scale, Tensor? zero, int group) -> Tensor",
)
def dequantize_weight(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int) -> torch.Tensor:
    """float32 weights of a layer that stores codes: `scale` per group; see `edgec.integer.dequantize_weight`."""
    shape = (*codes.shape[:2], *[1] * (codes.dim() - 2))
    spread = torch.arange(codes.shape[1], device=codes.device) // group
    wide = codes.to(torch.int32)
    if zero is not None:
        wide = wide - zero.to(torch.int32)[:, spread].reshape(shape)
    return wide.to(torch.float32) * scale[:, spread].reshape(shape)


@dequantize_weight.register_fake
def _(codes, scale, zero, group):
    return codes.new_empty(codes.shape, dtype=torch.float32)


# -- layers ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "edgec::qconv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor bias, Tensor m, Tensor shift, int[] stride, int[] padding, int[] dilation, "
    'int groups, int x_zp, int y_zp, int lo, int hi, str layout="NCHW") -> Tensor',
)
def qconv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    m: torch.Tensor,
    shift: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_zp: int,
    y_zp: int,
    lo: int,
    hi: int,
    layout: str = "NCHW",
) -> torch.Tensor:
    """Convolution of codes; see `edgec.integer.qconv2d`."""
    accumulator = _conv_sums(_to_nchw(x, layout), w, bias, stride, padding, dilation, groups, x_zp)
    return _from_nchw(_finish(accumulator, m.view(-1, 1, 1), shift.view(-1, 1, 1), y_zp, lo, hi), layout)


@qconv2d.register_fake
def _(x, w, bias, m, shift, stride, padding, dilation, groups, x_zp, y_zp, lo, hi, layout="NCHW"):
    return x.new_empty(_conv_shape(x, w, stride, padding, dilation, layout))


@torch.library.custom_op(
    "edgec::qconv2d_float",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor bias, Tensor scale, int[] stride, int[] padding, int[] dilation, int groups, "
    'int x_zp, str layout="NCHW") -> Tensor',
)
def qconv2d_float(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_zp: int,
    layout: str = "NCHW",
) -> torch.Tensor:
    """Convolution of codes with a real result; see `edgec.integer.qconv2d_float`."""
    accumulator = _conv_sums(_to_nchw(x, layout), w, bias, stride, padding, dilation, groups, x_zp)
    return _from_nchw(accumulator.to(torch.float32).mul_(scale.view(-1, 1, 1)), layout)


@qconv2d_float.register_fake
def _(x, w, bias, scale, stride, padding, dilation, groups, x_zp, layout="NCHW"):
    return x.new_empty(_conv_shape(x, w, stride, padding, dilation, layout), dtype=torch.float32)


@torch.library.custom_op(
    "edgec::qlinear",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor bias, Tensor m, Tensor shift, int y_zp, int lo, int hi) -> Tensor",
)
def qlinear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    m: torch.Tensor,
    shift: torch.Tensor,
    y_zp: int,
    lo: int,
    hi: int,
) -> torch.Tensor:
    """x[..., K] times w[O, K] transposed; see `edgec.integer.qlinear`."""
    accumulator = _exact_sums(lambda weights: F.linear(x.to(weights.dtype), weights), w).add_(bias)
    return _finish(accumulator, m, shift, y_zp, lo, hi)


@qlinear.register_fake
def _(x, w, bias, m, shift, y_zp, lo, hi):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@torch.library.custom_op(
    "edgec::qlinear_float", mutates_args=(), schema="(Tensor x, Tensor w, Tensor bias, Tensor scale) -> Tensor"
)
def qlinear_float(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x[..., K] times w[O, K] transposed with a real result; see `edgec.integer.qlinear_float`."""
    accumulator = _exact_sums(lambda weights: F.linear(x.to(weights.dtype), weights), w).add_(bias)
    return accumulator.to(torch.float32).mul_(scale).contiguous()


@qlinear_float.register_fake
def _(x, w, bias, scale):
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "edgec::qadd",
    mutates_args=(),
    schema="(Tensor a, Tensor b, int ma, int mb, int f, int za, int zb, int zy, int lo, int hi) -> Tensor",
)
def qadd(
    a: torch.Tensor, b: torch.Tensor, ma: int, mb: int, f: int, za: int, zb: int, zy: int, lo: int, hi: int
) -> torch.Tensor:
    """Sum of codes of different scales; see `edgec.integer.qadd`."""
    fits = CODE_SPAN * (abs(ma) + abs(mb)) + (1 << (f - 1)) < ACCUMULATOR_LIMIT
    wide = torch.int32 if fits else torch.int64
    total = a.to(wide).sub_(za).mul_(ma) + b.to(wide).sub_(zb).mul_(mb)
    total.add_(1 << (f - 1)).bitwise_right_shift_(f)
    return _int8(total.add_(zy).clamp_(lo, hi))


@qadd.register_fake
def _(a, b, ma, mb, f, za, zb, zy, lo, hi):
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape))


@torch.library.custom_op(
    "edgec::qmul",
    mutates_args=(),
    schema="(Tensor a, Tensor b, int m, int shift, int za, int zb, int zy, int lo, int hi) -> Tensor",
)
def qmul(
    a: torch.Tensor, b: torch.Tensor, m: int, shift: int, za: int, zb: int, zy: int, lo: int, hi: int
) -> torch.Tensor:
    """Product of codes; see `edgec.integer.qmul`."""
    return _finish(a.to(torch.int64).sub_(za) * b.to(torch.int64).sub_(zb), m, shift, zy, lo, hi)


@qmul.register_fake
def _(a, b, m, shift, za, zb, zy, lo, hi):
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape))


@torch.library.custom_op(
    "edgec::qrescale",
    mutates_args=(),
    schema="(Tensor x, int m, int shift, int zx, int zy, int lo, int hi) -> Tensor",
)
def qrescale(x: torch.Tensor, m: int, shift: int, zx: int, zy: int, lo: int, hi: int) -> torch.Tensor:
    """The same real values with another scale and zero point; see `edgec.integer.qrescale`."""
    return _finish(x.to(torch.int64).sub_(zx), m, shift, zy, lo, hi)


@qrescale.register_fake
def _(x, m, shift, zx, zy, lo, hi):
    return x.new_empty(x.shape)


@torch.library.custom_op("edgec::qlut", mutates_args=(), schema="(Tensor x, Tensor table, int axis) -> Tensor")
def qlut(x: torch.Tensor, table: torch.Tensor, axis: int) -> torch.Tensor:
    """A function of one code by table; see `edgec.integer.qlut`."""
    index = x.to(torch.int32).sub_(QMIN)
    if table.dim() == 2:
        shape = [1] * x.dim()
        shape[axis] = -1
        index = index + torch.arange(table.shape[0], dtype=torch.int32, device=x.device).mul_(table.shape[1]).view(
            shape
        )
    return table.flatten()[index].contiguous()


@qlut.register_fake
def _(x, table, axis):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "edgec::qavg_pool2d",
    mutates_args=(),
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding, int m, int shift, int zx, int zy, int lo, int hi, "
    'str layout="NCHW") -> Tensor',
)
def qavg_pool2d(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    m: int,
    shift: int,
    zx: int,
    zy: int,
    lo: int,
    hi: int,
    layout: str = "NCHW",
) -> torch.Tensor:
    """Window average over the full window, padding included; see `edgec.integer.qavg_pool2d`."""
    nchw = _to_nchw(x, layout)
    padded = _spatial_pad(nchw, padding, zx).to(torch.float32).sub_(zx)
    # Window sums of integers up to 255: float32 is exact up to 65,793 elements, the divisor 1 keeps them integers.
    exact = kernel[0] * kernel[1] * CODE_SPAN <= FLOAT32_EXACT
    padded = padded if exact else padded.to(torch.float64)
    total = F.avg_pool2d(padded, kernel, stride, 0, divisor_override=1).to(torch.int64)
    return _from_nchw(_finish(total, m, shift, zy, lo, hi), layout)


@qavg_pool2d.register_fake
def _(x, kernel, stride, padding, m, shift, zx, zy, lo, hi, layout="NCHW"):
    n, channels, rows, columns = _to_nchw(x, layout).shape
    rows = pool_out_size(rows, kernel[0], stride[0], padding[0], padding[1], 1, False)
    columns = pool_out_size(columns, kernel[1], stride[1], padding[2], padding[3], 1, False)
    return x.new_empty(_shape(n, channels, rows, columns, layout))


@torch.library.custom_op(
    "edgec::qmean",
    mutates_args=(),
    schema="(Tensor x, int[] dim, bool keepdim, int m, int shift, int zx, int zy, int lo, int hi) -> Tensor",
)
def qmean(
    x: torch.Tensor, dim: list[int], keepdim: bool, m: int, shift: int, zx: int, zy: int, lo: int, hi: int
) -> torch.Tensor:
    """Mean over axes; see `edgec.integer.qmean`."""
    total = x.to(torch.int64).sub_(zx).sum(dim=list(dim), keepdim=keepdim)
    return _finish(total, m, shift, zy, lo, hi)


@qmean.register_fake
def _(x, dim, keepdim, m, shift, zx, zy, lo, hi):
    return x.new_empty(x.sum(dim=list(dim), keepdim=keepdim, dtype=torch.int32).shape)


@torch.library.custom_op(
    "edgec::qmax_pool2d",
    mutates_args=(),
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    'str layout="NCHW") -> Tensor',
)
def qmax_pool2d(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    layout: str = "NCHW",
) -> torch.Tensor:
    """Largest code of each window; see `edgec.integer.qmax_pool2d`."""
    nchw = _to_nchw(x, layout)
    after = []
    for axis in (0, 1):
        size, before, end = nchw.shape[2 + axis], padding[2 * axis], padding[2 * axis + 1]
        out = pool_out_size(size, kernel[axis], stride[axis], before, end, dilation[axis], ceil_mode)
        needed = (out - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        after.append(max(end, needed - size - before))
    padded = _spatial_pad(nchw, [padding[0], after[0], padding[2], after[1]], QMIN).to(torch.float32)
    return _from_nchw(_int8(F.max_pool2d(padded, kernel, stride, 0, dilation)), layout)


@qmax_pool2d.register_fake
def _(x, kernel, stride, padding, dilation, ceil_mode, layout="NCHW"):
    n, channels, rows, columns = _to_nchw(x, layout).shape
    rows = pool_out_size(rows, kernel[0], stride[0], padding[0], padding[1], dilation[0], ceil_mode)
    columns = pool_out_size(columns, kernel[1], stride[1], padding[2], padding[3], dilation[1], ceil_mode)
    return x.new_empty(_shape(n, channels, rows, columns, layout))


# -- shared steps ------------------------------------------------------------------------------------------------------


def _conv_sums(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_zp: int,
) -> torch.Tensor:
    """int64 accumulators [n, out, rows, columns] of a convolution of NCHW codes."""
    padded = _spatial_pad(x, padding, x_zp).to(torch.float32)

    def convolve(weights: torch.Tensor) -> torch.Tensor:
        with torch.backends.nnpack.flags(enabled=False):  # its Winograd transform does not keep integers
            return F.conv2d(padded.to(weights.dtype), weights, None, stride, 0, dilation, groups)

    return _exact_sums(convolve, w).add_(bias.view(-1, 1, 1))


def _conv_shape(x, w, stride, padding, dilation, layout: str):
    n, _, rows, columns = _to_nchw(x, layout).shape
    rows = pool_out_size(rows, w.shape[2], stride[0], padding[0], padding[1], dilation[0], False)
    columns = pool_out_size(columns, w.shape[3], stride[1], padding[2], padding[3], dilation[1], False)
    return _shape(n, w.shape[0], rows, columns, layout)


def _exact_sums(product: Callable[[torch.Tensor], torch.Tensor], w: torch.Tensor) -> torch.Tensor:
    """int64 sums of code times weight, where `product(weights)` computes them in the weights' floating type.

    |code| <= 128, so no partial sum exceeds 128 * sum|w| of its channel; up to 2^24 float32 holds it exactly. Longer
    sums are computed from the two halves of each weight, and beyond that in float64, exact up to 2^53.
    """
    if _reach(w) <= FLOAT32_EXACT:
        return product(w.to(torch.float32)).to(torch.int64)
    high = (w.to(torch.int16) + SPLIT // 2) >> (SPLIT.bit_length() - 1)
    low = w.to(torch.int16) - high * SPLIT
    if max(_reach(high), _reach(low)) <= FLOAT32_EXACT:
        upper, lower = (product(part.to(torch.float32)).to(torch.int64) for part in (high, low))
        return upper.mul_(SPLIT).add_(lower)
    return product(w.to(torch.float64)).to(torch.int64)


def _reach(w: torch.Tensor) -> int:
    """Largest |sum of code times weight| over the output channels."""
    return LARGEST_CODE * int(w.to(torch.int64).abs().flatten(1).sum(1).max())


def _finish(
    accumulator: torch.Tensor, m: torch.Tensor | int, shift: torch.Tensor | int, zero_point: int, lo: int, hi: int
) -> torch.Tensor:
    """An int64 accumulator (overwritten) to codes: scaling, zero point and clamp; see `edgec.integer.requantize`."""
    device = accumulator.device
    if isinstance(m, torch.Tensor) and m.dtype == torch.float32:
        # Beyond 2^24 the sum with the zero point may round, but then it is far outside the clamp.
        return _int8(accumulator.to(torch.float32).mul_(m).round_().add_(zero_point).clamp_(lo, hi))
    factor, bits = (torch.as_tensor(v, dtype=torch.int64, device=device) for v in (m, shift))
    accumulator.mul_(factor).add_(torch.ones_like(bits) << (bits - 1)).bitwise_right_shift_(bits)
    return _int8(accumulator.add_(zero_point).clamp_(lo, hi))


def _int8(values: torch.Tensor) -> torch.Tensor:
    """Contiguous int8 copy, which is the layout that the operators declare for their results."""
    return values.to(torch.int8).contiguous()


def _spatial_pad(x: torch.Tensor, padding: list[int], code: int) -> torch.Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), value=code) if any(padding) else x


def _to_nchw(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if layout == "NHWC" else x


def _from_nchw(y: torch.Tensor, layout: str) -> torch.Tensor:
    return (y.permute(0, 2, 3, 1) if layout == "NHWC" else y).contiguous()


def _shape(n, channels, rows, columns, layout: str):  # sizes may be symbolic
    return (n, rows, columns, channels) if layout == "NHWC" else (n, channels, rows, columns)
