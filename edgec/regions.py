"""Torch meaning of the fused regions that lowering makes: one operator per kernel call, channels last.

Lowering rewrites a Program's graph into these operators, so that every step up to the import into TVM still runs in
PyTorch and can be compared with the step before. They never appear in a Program that a user or a pass sees.
Activations are NHWC, weights OIHW, padding is [top, bottom, left, right].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from edgec import qops as qops
from edgec.integer import QMAX, QMIN

ACTIVATIONS = {
    "none": lambda x: x,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


def _activate(x: torch.Tensor, act: str, lo: float, hi: float) -> torch.Tensor:
    if act == "clip":
        return x.clamp(lo, hi)
    return ACTIVATIONS[act](x)


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def conv_out(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Output size of a convolution or pooling window along one axis (floor mode)."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _pad(x: torch.Tensor, padding: list[int], value: float = 0.0) -> torch.Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), value=value)


@torch.library.custom_op("edgec::conv2d_nhwc", mutates_args=())
def conv2d_nhwc(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str,
    lo: float,
    hi: float,
) -> torch.Tensor:
    y = F.conv2d(_pad(to_nchw(x), padding), w, bias, stride, 0, dilation, groups)
    y = to_nhwc(y)
    return _activate(y if residual is None else y + residual, act, lo, hi).clone()


@conv2d_nhwc.register_fake
def _(x, w, bias, residual, stride, padding, dilation, groups, act, lo, hi):
    n, h, width, _ = x.shape
    o, _, kh, kw = w.shape
    oh = conv_out(h, kh, stride[0], padding[0], padding[1], dilation[0])
    ow = conv_out(width, kw, stride[1], padding[2], padding[3], dilation[1])
    return x.new_empty((n, oh, ow, o))


@torch.library.custom_op("edgec::linear_act", mutates_args=())
def linear_act(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
    lo: float,
    hi: float,
) -> torch.Tensor:
    y = F.linear(x, w, bias)
    return _activate(y if residual is None else y + residual, act, lo, hi).clone()


@linear_act.register_fake
def _(x, w, bias, residual, act, lo, hi):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@torch.library.custom_op("edgec::max_pool2d_nhwc", mutates_args=())
def max_pool2d_nhwc(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> torch.Tensor:
    y = _pad(to_nchw(x), padding, value=-math.inf)
    return to_nhwc(F.max_pool2d(y, kernel, stride, 0, dilation))


@max_pool2d_nhwc.register_fake
def _(x, kernel, stride, padding, dilation):
    n, h, w, c = x.shape
    oh = conv_out(h, kernel[0], stride[0], padding[0], padding[1], dilation[0])
    ow = conv_out(w, kernel[1], stride[1], padding[2], padding[3], dilation[1])
    return x.new_empty((n, oh, ow, c))


@torch.library.custom_op("edgec::avg_pool2d_nhwc", mutates_args=())
def avg_pool2d_nhwc(x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> torch.Tensor:
    """Average over the full window, padding included (PyTorch's default)."""
    return to_nhwc(F.avg_pool2d(_pad(to_nchw(x), padding), kernel, stride, 0))


@avg_pool2d_nhwc.register_fake
def _(x, kernel, stride, padding):
    n, h, w, c = x.shape
    oh = conv_out(h, kernel[0], stride[0], padding[0], padding[1], 1)
    ow = conv_out(w, kernel[1], stride[1], padding[2], padding[3], 1)
    return x.new_empty((n, oh, ow, c))


@torch.library.custom_op("edgec::qlinear_act", mutates_args=())
def qlinear_act(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    act: str,
    lo: float,
    hi: float,
    y_scale: float | None,
    y_zp: int,
) -> torch.Tensor:
    """v = act(float32(accumulator) * scale + residual), with the accumulator of `qlinear_float`.

    The result is v in float32 when `y_scale` is None, else the int8 codes clamp(rne(v * (1 / y_scale)) + y_zp). The
    factor is the float32 nearest to 1 / y_scale; `edgec::quantize` divides instead, which moves a few codes by one.
    """
    y = torch.ops.edgec.qlinear_float(x, w, bias, scale)
    y = _activate(y if residual is None else y + residual, act, lo, hi)
    if y_scale is None:
        return y.clone()
    factor = torch.tensor(1 / y_scale, dtype=torch.float32)
    return (y * factor).round_().add_(y_zp).clamp_(QMIN, QMAX).to(torch.int8)


@qlinear_act.register_fake
def _(x, w, bias, scale, residual, act, lo, hi, y_scale, y_zp):
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32 if y_scale is None else torch.int8)


@torch.library.custom_op("edgec::qconv2d_add", mutates_args=())
def qconv2d_add(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor,
    m: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_zp: int,
    y_zp: int,
    lo: int,
    hi: int,
    add: list[int],
) -> torch.Tensor:
    """`qconv2d` (NHWC) followed by `qadd`; `add` is [m_conv, m_residual, f, z_conv, z_residual, z_y, lo, hi].

    The integer addition is commutative, so one order of operands is enough.
    """
    y = torch.ops.edgec.qconv2d(x, w, bias, m, shift, stride, padding, dilation, groups, x_zp, y_zp, lo, hi, "NHWC")
    return torch.ops.edgec.qadd(y, residual, *add)


@qconv2d_add.register_fake
def _(x, w, bias, m, shift, residual, stride, padding, dilation, groups, x_zp, y_zp, lo, hi, add):
    return torch.empty_like(residual, memory_format=torch.contiguous_format)
