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
from edgec import tokenops
from edgec.integer import QMAX, QMIN

ACTIVATIONS = {
    "none": lambda x: x,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "tanh": torch.tanh,
}


def _activate(x: torch.Tensor, act: str, lo: float, hi: float) -> torch.Tensor:
    if act == "clip":
        return x.clamp(lo, hi)
    if act == "leaky_relu":
        return F.leaky_relu(x, lo)
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


# -- transformers ------------------------------------------------------------------------------------------------------


def _encode(y: torch.Tensor, scale: float | None, zero_point: int) -> torch.Tensor:
    """The result of a region, or its int8 codes where it has a scale."""
    return y.clone() if scale is None else torch.ops.edgec.quantize(y, scale, zero_point)


def _encoded(y: torch.Tensor, scale: float | None) -> torch.Tensor:
    return y if scale is None else y.to(torch.int8)


@torch.library.custom_op("edgec::layer_norm", mutates_args=())
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    columns: int,
    eps: float,
    scale: float | None,
    zero_point: int,
) -> torch.Tensor:
    """Layer norm over the last axes, `columns` elements together; with a scale, int8 codes of the result."""
    rows = x.reshape(-1, columns)
    gain, shift = (None if v is None else v.reshape(columns) for v in (weight, bias))
    return _encode(F.layer_norm(rows, (columns,), gain, shift, eps).reshape(x.shape), scale, zero_point)


@layer_norm.register_fake
def _(x, weight, bias, columns, eps, scale, zero_point):
    return _encoded(x.new_empty(x.shape), scale)


@torch.library.custom_op("edgec::rms_norm", mutates_args=())
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, columns: int, eps: float, scale: float | None, zero_point: int
) -> torch.Tensor:
    """RMS norm over the last axes, `columns` elements together; with a scale, int8 codes of the result."""
    flat = None if weight is None else weight.reshape(columns)
    return _encode(F.rms_norm(x.reshape(-1, columns), (columns,), flat, eps).reshape(x.shape), scale, zero_point)


@rms_norm.register_fake
def _(x, weight, columns, eps, scale, zero_point):
    return _encoded(x.new_empty(x.shape), scale)


@torch.library.custom_op("edgec::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    act: str,
    lo: float,
    hi: float,
    layout: str,
) -> torch.Tensor:
    """Group norm and an activation; layout "NHWC" for maps, "NCHW" for [N, C, ...]."""
    if layout == "NCHW":
        return _activate(F.group_norm(x, groups, weight, bias, eps), act, lo, hi).clone()
    return to_nhwc(_activate(F.group_norm(to_nchw(x), groups, weight, bias, eps), act, lo, hi)).clone()


@group_norm.register_fake
def _(x, weight, bias, groups, eps, act, lo, hi, layout):
    return x.new_empty(x.shape)


@torch.library.custom_op("edgec::matmul", mutates_args=())
def matmul(a: torch.Tensor, b: torch.Tensor, transposed: bool) -> torch.Tensor:
    """a [batch or 1, m, k] times b [batch or 1, k, n], or [batch or 1, n, k] when it is stored transposed."""
    return torch.matmul(a, b.transpose(1, 2) if transposed else b)


@matmul.register_fake
def _(a, b, transposed):
    return a.new_empty((max(a.shape[0], b.shape[0]), a.shape[1], b.shape[1 if transposed else 2]))


@torch.library.custom_op("edgec::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    shape: list[int],
    q_view: list[int],
    k_view: list[int],
    v_view: list[int],
    mask_view: list[int],
    factor: float,
    causal: bool,
    scale: float | None,
    zero_point: int,
) -> torch.Tensor:
    """softmax(factor q k^T + mask) v, [batch, queries, heads * value depth]; with a scale, int8 codes of it.

    shape: [batch, heads, queries, keys, depth, value depth, heads that share keys]. A view is [offset, strides of
    batch, head, row, column] into the elements of its tensor. A row that sees no key is zero.
    """
    batch, heads, queries, keys, depth, value_depth, group = shape
    shared = heads // group

    def view(x: torch.Tensor, at: list[int], count: int, rows: int, columns: int) -> torch.Tensor:
        return x.contiguous().as_strided((batch, count, rows, columns), at[1:], at[0])

    queried = view(q, q_view, heads, queries, depth) * factor
    known = view(k, k_view, shared, keys, depth).repeat_interleave(group, 1)
    scores = queried @ known.transpose(2, 3)
    if mask is not None:
        scores = scores + view(mask, mask_view, heads, queries, keys)
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).tril().logical_not(), -math.inf)
    seen = (scores > -math.inf).any(-1, keepdim=True)
    weights = torch.where(seen, torch.softmax(scores, -1), 0.0)
    y = weights @ view(v, v_view, shared, keys, value_depth).repeat_interleave(group, 1)
    return _encode(y.transpose(1, 2).reshape(batch, queries, heads * value_depth), scale, zero_point)


@attention.register_fake
def _(q, k, v, mask, shape, q_view, k_view, v_view, mask_view, factor, causal, scale, zero_point):
    return _encoded(q.new_empty((shape[0], shape[2], shape[1] * shape[5])), scale)


# -- token reduction, see `edgec.tokenops` -----------------------------------------------------------------------------


@torch.library.custom_op("edgec::tome_slots", mutates_args=())
def tome_slots(
    metric: torch.Tensor, shape: list[int], view: list[int], r: int, prefix: int, distilled: bool
) -> torch.Tensor:
    """int32 slots [batch, tokens] of `tokenops.tome_merge`; metric: mean over heads of a view of a tensor.

    shape: [batch, heads, tokens, depth]; view: [offset, strides] into the elements of the tensor.
    """
    keys = metric.contiguous().as_strided(shape, view[1:], view[0])
    return tokenops.tome_slots(keys.mean(1), r, prefix, distilled)


@tome_slots.register_fake
def _(metric, shape, view, r, prefix, distilled):
    return metric.new_empty((shape[0], shape[2]), dtype=torch.int32)


@torch.library.custom_op("edgec::reduce_slots", mutates_args=())
def reduce_slots(
    x: torch.Tensor | None, score: torch.Tensor, prefix: int, keep: int, merge: int, ordered: bool
) -> torch.Tensor:
    """int32 slots [batch, tokens] of `tokenops.token_reduce`, or of `token_keep` without `ordered`.

    x is given where tokens are merged (merge < keep).
    """
    if not ordered:
        return tokenops.keep_slots(score, prefix, keep)
    if x is None:
        x = score.new_empty((score.shape[0], score.shape[1] + prefix, 1))
    return tokenops.reduce_slots(x, score, prefix, keep, merge)


@reduce_slots.register_fake
def _(x, score, prefix, keep, merge, ordered):
    return score.new_empty((score.shape[0], score.shape[1] + prefix), dtype=torch.int32)


@torch.library.custom_op("edgec::merge_tokens", mutates_args=())
def merge_tokens(
    x: torch.Tensor, size: torch.Tensor | None, slots: torch.Tensor, rows: int, merges: bool
) -> torch.Tensor:
    """Rows of x [batch, tokens, C] in their slots, means where they merge: weighted where sizes are given."""
    weight = torch.ones_like(x[:, :, :1]) if size is None else size
    return tokenops.merge_tokens(x, weight, slots, rows, True)


@merge_tokens.register_fake
def _(x, size, slots, rows, merges):
    return x.new_empty((x.shape[0], rows, x.shape[2]))


@torch.library.custom_op("edgec::merge_sizes", mutates_args=())
def merge_sizes(size: torch.Tensor, slots: torch.Tensor, x: torch.Tensor | None, rows: int) -> torch.Tensor:
    """Sizes [batch, tokens, 1] summed by slots; with x, those of sources scaled by their cosines."""
    return tokenops.merge_sizes(size.contiguous(), slots, rows, x)


@merge_sizes.register_fake
def _(size, slots, x, rows):
    return size.new_empty((size.shape[0], rows, 1))


@torch.library.custom_op("edgec::class_scores", mutates_args=())
def class_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    size: torch.Tensor | None,
    shape: list[int],
    q_view: list[int],
    k_view: list[int],
    scale: float,
    prefix: int,
) -> torch.Tensor:
    """`tokenops.class_score` of views [offset, strides] of tensors; shape: [batch, heads, tokens, depth]."""
    first = q.contiguous().as_strided((*shape[:2], 1, shape[3]), q_view[1:], q_view[0])
    known = k.contiguous().as_strided(shape, k_view[1:], k_view[0])
    return tokenops.class_score(first, known, size, scale, prefix)


@class_scores.register_fake
def _(q, k, size, shape, q_view, k_view, scale, prefix):
    return k.new_empty((shape[0], shape[2] - prefix))


@torch.library.custom_op("edgec::log_sizes", mutates_args=())
def log_sizes(size: torch.Tensor) -> torch.Tensor:
    """Natural logarithm."""
    return size.log().contiguous()


@log_sizes.register_fake
def _(size):
    return size.new_empty(size.shape)


# -- tiles of maps, see `edgec.lowering.tiles` -------------------------------------------------------------------------


@torch.library.custom_op("edgec::crop_nhwc", mutates_args=())
def crop_nhwc(x: torch.Tensor, top: int, left: int, height: int, width: int, layout: str = "NHWC") -> torch.Tensor:
    """Rows top .. top + height and columns left .. left + width of a map; layout "NCHW" for inputs of the network."""
    rows, columns = slice(top, top + height), slice(left, left + width)
    return (x[:, rows, columns] if layout == "NHWC" else x[:, :, rows, columns]).clone(
        memory_format=torch.contiguous_format
    )


@crop_nhwc.register_fake
def _(x, top, left, height, width, layout="NHWC"):
    n = x.shape[0]
    return x.new_empty((n, height, width, x.shape[3]) if layout == "NHWC" else (n, x.shape[1], height, width))


@torch.library.custom_op("edgec::place_nhwc", mutates_args=())
def place_nhwc(
    canvas: torch.Tensor | None, tile: torch.Tensor, top: int, left: int, height: int, width: int
) -> torch.Tensor:
    """A map of height x width with `tile` at (top, left), and elsewhere the contents of `canvas`, a map of that size.

    Kernels write into the memory of the canvas. Without one, what is outside of the tile is zero here and arbitrary
    there: a map is complete when tiles have been placed on all of it.
    """
    n, rows, columns, channels = tile.shape
    result = tile.new_zeros((n, height, width, channels)) if canvas is None else canvas.clone()
    result[:, top : top + rows, left : left + columns] = tile
    return result


@place_nhwc.register_fake
def _(canvas, tile, top, left, height, width):
    return tile.new_empty((tile.shape[0], height, width, tile.shape[3]))
