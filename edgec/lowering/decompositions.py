"""Operators that TVM's importer lacks or converts wrongly, written with operators that it converts correctly.

Each function has the signature of its operator; one that returns NotImplemented leaves the operator as it is. All are
exact up to the order of float32 sums, and none needs TVM's run time, which is not on the device.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from edgec.importing import special

aten = torch.ops.aten

# Products along an axis are written out up to this length.
MAX_FACTORS = 64
# Elements of which each looks at all before it.
MAX_ELEMENTS = 4096
# Klambauer et al., "Self-Normalizing Neural Networks"; TVM's constants are shorter.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    return {
        aten.max.dim: lambda x, dim, keepdim=False: (torch.amax(x, dim, keepdim), torch.argmax(x, dim, keepdim)),
        aten.min.dim: lambda x, dim, keepdim=False: (torch.amin(x, dim, keepdim), torch.argmin(x, dim, keepdim)),
        aten.any.default: lambda x: _any(x, list(range(x.dim()))),
        aten.any.dim: _any,
        aten.any.dims: lambda x, dim=None, keepdim=False: _any(x, dim or list(range(x.dim())), keepdim),
        aten.sort.default: lambda x, dim=-1, descending=False: _smallest(x, x.shape[dim], dim, descending),
        aten.sort.stable: lambda x, *, stable, dim=-1, descending=False: _smallest(x, x.shape[dim], dim, descending),
        aten.topk.default: lambda x, k, dim=-1, largest=True, sorted=True: _smallest(x, k, dim, largest),
        aten.cumsum.default: _cumsum,
        aten.cumprod.default: _cumprod,
        aten.logcumsumexp.default: _logcumsumexp,
        aten.cummax.default: lambda x, dim: _running_extreme(x, dim, largest=True),
        aten.cummin.default: lambda x, dim: _running_extreme(x, dim, largest=False),
        aten.as_strided.default: _as_strided,
        aten._embedding_bag.default: _embedding_bag,
        aten._embedding_bag_forward_only.default: _embedding_bag,
        aten.scatter.src: _scatter,
        aten.scatter.value: _scatter,
        aten.grid_sampler_3d.default: _grid_sampler_3d,
        aten._adaptive_avg_pool3d.default: _adaptive_average,
        aten.adaptive_avg_pool1d.default: _adaptive_average,
        aten.addmv.default: lambda c, a, b, *, beta=1, alpha=1: beta * c + alpha * (a @ b),
        aten.index_fill.int_Scalar: _index_fill,
        aten.index_fill.int_Tensor: _index_fill,
        aten.put.default: lambda x, i, v, accumulate=False: torch.index_put(
            x.reshape(-1), (i.reshape(-1),), v.reshape(-1), accumulate
        ).reshape(x.shape),
        aten.adaptive_max_pool3d.default: _adaptive_max_pool,
        aten.convolution.default: _convolution,
        aten.bilinear.default: _bilinear,
        aten.addbmm.default: lambda c, a, b, *, beta=1, alpha=1: beta * c + alpha * (a @ b).sum(0),
        aten.copysign.Tensor: lambda x, y: torch.where(y < 0, -x.abs(), x.abs()),
        aten.ldexp.Tensor: lambda x, y: x * torch.exp(y.to(torch.float32) * math.log(2.0)),
        aten.angle.default: lambda x: torch.where(x < 0, torch.full((), math.pi), torch.zeros(())),
        aten.heaviside.default: lambda x, y: torch.where(x == 0, y.to(x.dtype) + 0 * x, (x > 0).to(x.dtype)),
        aten.erfc.default: lambda x: 1 - torch.erf(x),
        aten.special_erfc.default: lambda x: 1 - torch.erf(x),
        aten.bitwise_left_shift.Tensor: lambda x, n: x * _power_of_two(n).to(x.dtype),
        aten.bitwise_right_shift.Tensor: lambda x, n: torch.div(x, _power_of_two(n).to(x.dtype), rounding_mode="floor"),
        aten.__lshift__.Tensor: lambda x, n: x * _power_of_two(n).to(x.dtype),
        aten.__rshift__.Tensor: lambda x, n: torch.div(x, _power_of_two(n).to(x.dtype), rounding_mode="floor"),
        aten.__lshift__.Scalar: lambda x, n: x * 2**n,
        aten.__rshift__.Scalar: lambda x, n: torch.div(x, 2**n, rounding_mode="floor"),
        aten.bitwise_left_shift.Tensor_Scalar: lambda x, n: x * 2**n,
        aten.bitwise_right_shift.Tensor_Scalar: lambda x, n: torch.div(x, 2**n, rounding_mode="floor"),
        aten.scaled_dot_product_attention.default: _attention,
        aten.adaptive_max_pool2d.default: _adaptive_max_pool,
        aten.col2im.default: _fold,
        aten._cdist_forward.default: _cdist,
        aten._pdist_forward.default: _pdist,
        aten.div.Scalar_mode: lambda x, y, *, rounding_mode: torch.div(
            x, torch.full((), y, dtype=torch.result_type(x, y)), rounding_mode=rounding_mode
        ),
        aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantize,
        aten.fake_quantize_per_channel_affine_cachemask.default: _fake_quantize_channels,
        aten.scatter_reduce.two: _scatter_reduce,
        aten.scatter_add.default: lambda x, dim, index, src: _scatter_reduce(x, dim, index, src, "sum"),
        aten.index_add.default: _index_add,
        aten.index_copy.default: _index_copy,
        aten.index_put.default: _index_put,
        aten.masked_scatter.default: _masked_scatter,
        aten._unsafe_index_put.default: _index_put,
        aten.unfold.default: _unfold,
        aten.median.dim: lambda x, dim, keepdim=False: _kth_value(x, (x.shape[dim] + 1) // 2, dim, keepdim),
        aten.kthvalue.default: _kth_value,
        aten.one_hot.default: _one_hot,
        aten.bucketize.Tensor: _bucketize,
        aten.searchsorted.Tensor: _searchsorted,
        aten.prod.dim_int: _product,
        aten.var_mean.correction: _var_mean,
        aten.avg_pool2d.default: _avg_pool,
        aten.native_group_norm.default: _group_norm,
        aten.upsample_nearest2d.vec: _upsample_nearest,
        aten.upsample_bilinear2d.vec: _upsample_bilinear,
        aten.upsample_bicubic2d.vec: _upsample_bicubic,
        aten.index_reduce.default: _index_reduce,
        aten.selu.default: lambda x: SELU_SCALE * torch.where(x > 0, x, SELU_ALPHA * torch.expm1(x)),
        aten.rrelu_with_noise_functional.default: _rrelu,
        aten.signbit.default: lambda x: (x < 0) | (1 / x == -math.inf) if x.dtype.is_floating_point else x < 0,
        aten.fmax.default: lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))),
        aten.fmin.default: lambda x, y: torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y))),
        # What import writes out, where it comes from inside of another operator.
        aten.lgamma.default: functools.partial(special.lgamma, None),
        aten.linalg_vector_norm.default: _vector_norm,
        aten.hypot.default: lambda x, y: torch.sqrt(x * x + y * y),
        aten.exp2.default: lambda x: torch.exp(x * math.log(2.0)),
        aten.dist.default: lambda x, y, p=2: torch.linalg.vector_norm(x - y, float(p)),
    }


def _power_of_two(n: torch.Tensor) -> torch.Tensor:
    """2^n for n in 0..62, in int64."""
    result: Any = 1
    for bit in range(6):
        factor = torch.where(
            (n & 2**bit) != 0, torch.full((), 2 ** (2**bit), dtype=torch.int64), torch.ones((), dtype=torch.int64)
        )
        result = factor * result
    return result


def _any(x: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    flag = x if x.dtype == torch.bool else x != 0
    return torch.amax(flag.to(torch.float32), dim, keepdim) > 0.5


def _smallest(x: torch.Tensor, k: int, dim: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest (or largest) values in order, and where they are: TVM's own sort is a function of its run time.

    The rank of an element is the number of elements that come before it.
    """
    if x.dim() == 0:
        return x, torch.zeros_like(x, dtype=torch.int64)
    x = x.movedim(dim, -1)
    here, other = x.unsqueeze(-1), x.unsqueeze(-2)
    place = torch.arange(x.shape[-1])
    earlier = (other == here) & (place < place.unsqueeze(-1))
    rank = ((other > here if largest else other < here) | earlier).to(torch.float32).sum(-1)
    hit = rank.unsqueeze(-2) == torch.arange(k).unsqueeze(-1)
    order = torch.argmax(hit.to(torch.float32), -1)
    return torch.gather(x, -1, order).movedim(-1, dim), order.movedim(-1, dim)


def _kth_value(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = (t.narrow(dim, k - 1, 1) for t in _smallest(x, k, dim, largest=False))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def _one_hot(x: torch.Tensor, classes: int = -1) -> torch.Tensor:
    return NotImplemented if classes < 1 else (x.unsqueeze(-1) == torch.arange(classes)).to(torch.int64)


def _cumsum(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Every sum over its own prefix: TVM's scan needs its run time."""
    if dtype is None:
        dtype = x.dtype if x.dtype.is_floating_point else torch.int64
    if x.dim() == 0:
        return x.to(dtype)
    x = x.to(dtype).movedim(dim, -1)
    place = torch.arange(x.shape[-1])
    prefix = torch.where(place <= place.unsqueeze(-1), x.unsqueeze(-2), torch.zeros((), dtype=dtype))
    return prefix.sum(-1, dtype=dtype).movedim(-1, dim)


def _prefixes(x: torch.Tensor, neutral: Any) -> torch.Tensor:
    """[..., n, n]: for each element of the last axis those up to it, and `neutral` behind it."""
    place = torch.arange(x.shape[-1])
    return torch.where(place <= place.unsqueeze(-1), x.unsqueeze(-2), torch.full((), neutral, dtype=x.dtype))


def _cumprod(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One factor after the other, as PyTorch multiplies them."""
    if dtype is None:
        dtype = x.dtype if x.dtype.is_floating_point else torch.int64
    if x.dim() == 0:
        return x.to(dtype)
    if x.shape[dim] > MAX_FACTORS:
        return NotImplemented
    return torch.cat(list(itertools.accumulate(x.to(dtype).split(1, dim), torch.mul)), dim)


def _logcumsumexp(x: torch.Tensor, dim: int) -> torch.Tensor:
    if x.dim() == 0:
        return x
    return torch.logsumexp(_prefixes(x.movedim(dim, -1), -math.inf), -1).movedim(-1, dim)


def _running_extreme(x: torch.Tensor, dim: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest or smallest element so far, place of the last one that equals it)."""
    if x.dim() == 0:
        return x, torch.zeros_like(x, dtype=torch.int64)
    limit = math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).max
    neutral = -limit if largest else limit
    prefixes = _prefixes(x.movedim(dim, -1), neutral)
    values = torch.amax(prefixes, -1) if largest else torch.amin(prefixes, -1)
    n = x.shape[dim]
    place = torch.arange(n)
    hit = (prefixes == values.unsqueeze(-1)) & (place <= place.unsqueeze(-1))
    last = torch.where(hit, place, torch.full((), -1, dtype=torch.int64)).amax(-1)
    return values.movedim(-1, dim), last.movedim(-1, dim)


def _as_strided(x: torch.Tensor, size: Any, stride: Any, offset: int | None = None) -> torch.Tensor:
    """Elements by their place in memory, which is that of a contiguous tensor."""
    if not x.is_contiguous() or not all(isinstance(n, int) for n in (*size, *stride, offset or 0)):
        return NotImplemented
    place = torch.full((1,) * max(len(size), 1), offset or 0, dtype=torch.int64)
    for axis, (count, step) in enumerate(zip(size, stride, strict=True)):
        shape = [1] * len(size)
        shape[axis] = count
        place = place + (torch.arange(count) * step).reshape(shape)
    return torch.index_select(x.reshape(-1), 0, place.reshape(-1)).reshape(size)


def _embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum, mean or maximum over each bag: a product with the matrix of which index is in which bag.

    Only the first result is for use outside training; the others have their types and sizes.
    """
    count = indices.shape[0]
    bags = offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]
    first = offsets[:bags].to(torch.int64)
    rest = offsets[1 : bags + 1].to(torch.int64) if include_last_offset else offsets[1:].to(torch.int64)
    end = rest if include_last_offset else torch.cat([rest, torch.full((1,), count, dtype=torch.int64)])
    place = torch.arange(count)
    inside = (place >= first.unsqueeze(-1)) & (place < end.unsqueeze(-1))
    if padding_idx >= 0:
        inside = inside & (indices != padding_idx)
    rows = torch.nn.functional.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    share = inside.to(weight.dtype)
    number = share.sum(-1, keepdim=True)
    if mode == 2:
        masked = torch.where(inside.unsqueeze(-1), rows, torch.full((), -math.inf))
        result = torch.where(number > 0.5, masked.amax(1), torch.zeros(()))
    else:
        result = share @ rows
        result = result / number.clamp(min=1.0) if mode == 1 else result
    size = number.squeeze(-1).to(indices.dtype)
    largest = torch.zeros((bags, weight.shape[1]) if mode == 2 else (bags,), dtype=indices.dtype)
    return result, torch.zeros_like(indices), size, largest


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention of any rank, mask and scale: TVM's takes rank 4 and float masks, and ignores the scale."""
    if enable_gqa:
        key, value = (_repeat_heads(x, query.shape[-3]) for x in (key, value))
    if is_causal:
        rows, columns = (torch.arange(x.shape[-2]) for x in (query, key))
        attn_mask = columns <= rows.unsqueeze(-1)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if attn_mask is None:
        return torch.softmax(scores, -1) @ value
    if attn_mask.dtype != torch.bool:
        return torch.softmax(scores + attn_mask, -1) @ value
    # Large rather than infinite: the weights of a row that is masked completely are zero, not NaN.
    weights = torch.softmax(torch.where(attn_mask, scores, torch.full((), -1e30)), -1)
    return torch.where(attn_mask, weights, torch.zeros(())) @ value


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    shape = list(x.shape)
    groups = heads // shape[-3]
    wide = x.unsqueeze(-3).expand(*shape[:-2], groups, *shape[-2:])
    return wide.reshape(*shape[:-3], heads, *shape[-2:])


def _adaptive_max_pool(x: torch.Tensor, size: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, positions in the flat map), one window at a time."""
    rank = len(size)
    extents = x.shape[-rank:]
    values, places = [], []
    for window in itertools.product(*[_windows(n, count) for n, count in zip(extents, size, strict=True)]):
        flat = x[(..., *(slice(*ends) for ends in window))].flatten(-rank)
        values.append(torch.amax(flat, -1))
        rest: Any = torch.argmax(flat, -1)
        place, stride = 0, 1
        for (first, end), n in reversed(list(zip(window, extents, strict=True))):
            line = torch.div(rest, end - first, rounding_mode="floor")
            place = place + (rest - line * (end - first) + first) * stride
            rest, stride = line, stride * n
        places.append(place)
    shape = (*x.shape[:-rank], *size)
    return torch.stack(values, -1).reshape(shape), torch.stack(places, -1).reshape(shape)


def _adaptive_average(x: torch.Tensor, size: Any) -> torch.Tensor:
    """Along each axis a product with the matrix of its windows, which may overlap."""
    for axis, count in enumerate(size, -len(size)):
        n = x.shape[axis]
        if count == n:
            continue
        number, place = torch.arange(count), torch.arange(n).unsqueeze(-1)
        first = torch.div(number * n, count, rounding_mode="floor")
        end = torch.div((number + 1) * n + (count - 1), count, rounding_mode="floor")
        inside = ((place >= first) & (place < end)).to(x.dtype)
        x = (x.movedim(axis, -1) @ (inside / inside.sum(0))).movedim(-1, axis)
    return x


def _scatter(x: torch.Tensor, dim: int, index: torch.Tensor, value: Any) -> torch.Tensor:
    """Where the index covers a part of the tensor: each element looks for the last source that goes to it."""
    dim = dim % max(x.dim(), 1)
    if x.dim() == 0 or all(i == dim or index.shape[i] == x.shape[i] for i in range(x.dim())):
        if not isinstance(value, torch.Tensor) or value.shape == index.shape:
            return NotImplemented
        # TVM wants no more sources than there are indices.
        return torch.scatter(x, dim, index, value[tuple(slice(0, n) for n in index.shape)])
    if isinstance(value, torch.Tensor):
        src = value[tuple(slice(0, n) for n in index.shape)]
    else:
        src = torch.full(index.shape, value, dtype=x.dtype)
    missing = []
    for axis in reversed(range(x.dim())):
        missing += [0, 0 if axis == dim else x.shape[axis] - index.shape[axis]]
    index = torch.nn.functional.pad(index, missing, value=-1).movedim(dim, -1)
    src = torch.nn.functional.pad(src, missing).movedim(dim, -1)
    own = x.movedim(dim, -1)
    number = torch.arange(1, src.shape[-1] + 1)
    hit = index.unsqueeze(-2) == torch.arange(own.shape[-1]).unsqueeze(-1)
    last = torch.where(hit, number, torch.zeros((), dtype=torch.int64)).amax(-1)
    found = torch.gather(src, -1, (last - 1).clamp(min=0))
    return torch.where(last > 0, found, own).movedim(-1, dim)


def _grid_sampler_3d(x: torch.Tensor, grid: torch.Tensor, mode: int, padding: int, corners: bool) -> torch.Tensor:
    """Samples [N, C, D', H', W'] of x [N, C, D, H, W] at grid [N, D', H', W', 3], which holds x, y, z in -1..1."""
    n, channels = x.shape[:2]
    extents = list(x.shape[2:])
    places = [_source(grid[..., 2 - axis], size, padding, corners) for axis, size in enumerate(extents)]
    if mode == 1:
        corner_sets = [[(torch.round(place), None)] for place in places]
    elif mode == 0:
        corner_sets = []
        for place in places:
            low = torch.floor(place)
            corner_sets.append([(low, low + 1 - place), (low + 1, place - low)])
    else:
        return NotImplemented
    flat = x.reshape(n, channels, -1)
    result: Any = 0.0
    for corner in itertools.product(*corner_sets):
        index, inside, weight = 0, None, None
        for (place, share), size in zip(corner, extents, strict=True):
            within = (place >= 0) & (place <= size - 1)
            inside = within if inside is None else inside & within
            weight = share if weight is None else weight * share
            index = index * size + place.clamp(0, size - 1).to(torch.int64)
        here = torch.as_tensor(index).reshape(n, 1, -1).expand(n, channels, -1)
        value = torch.gather(flat, 2, here).reshape(n, channels, *grid.shape[1:4])
        assert inside is not None
        factor = inside.to(x.dtype) if weight is None else weight * inside.to(x.dtype)
        result = result + value * factor.unsqueeze(1)
    return result


def _source(place: torch.Tensor, size: int, padding: int, corners: bool) -> torch.Tensor:
    """Coordinates -1..1 in elements of an axis, after padding: 0 zeros, 1 border, 2 reflection."""
    place = (place + 1) / 2 * (size - 1) if corners else ((place + 1) * size - 1) / 2
    if padding == 2:
        low, span = (0.0, size - 1.0) if corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(place)
        distance = (place - low).abs()
        turns = torch.floor(distance / span)
        rest = distance - turns * span
        odd = turns - 2 * torch.floor(turns / 2)
        place = torch.where(odd > 0.5, span - rest, rest) + low
    return place if padding == 0 else place.clamp(0, size - 1)


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> torch.Tensor:
    """Transposed in three dimensions: a convolution of the input with zeros between its elements."""
    if not transposed or x.dim() != 5:
        return NotImplemented
    pads: list[int] = []
    for axis in (4, 3, 2):
        n, step = x.shape[axis], stride[axis - 2]
        if step > 1:
            wide = torch.nn.functional.pad(x.unsqueeze(axis + 1), [0, 0] * (4 - axis) + [0, step - 1])
            x = wide.flatten(axis, axis + 1).narrow(axis, 0, (n - 1) * step + 1)
        reach = dilation[axis - 2] * (weight.shape[axis] - 1) - padding[axis - 2]
        pads += [reach, reach + output_padding[axis - 2]]
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    kernel = weight.shape[2:]
    own = weight.flip(2, 3, 4).reshape(groups, inputs, outputs, *kernel).transpose(1, 2)
    own = own.reshape(groups * outputs, inputs, *kernel)
    return torch.nn.functional.conv3d(torch.nn.functional.pad(x, pads), own, bias, 1, 0, dilation, groups)


def _bilinear(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """sum over i, j of a_i W_kij b_j."""
    outputs, left, right = weight.shape
    rows = a.reshape(-1, left) @ weight.permute(1, 0, 2).reshape(left, outputs * right)
    y = (rows.reshape(-1, outputs, right) * b.reshape(-1, 1, right)).sum(-1).reshape(*a.shape[:-1], outputs)
    return y if bias is None else y + bias


def _windows(size: int, count: int) -> list[tuple[int, int]]:
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _fold(x: torch.Tensor, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> torch.Tensor:
    """Columns to image: a transposed convolution that puts every element at its place in the window."""
    window = kernel[0] * kernel[1]
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    grid = [(size[i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in range(2)]
    rest = [size[i] + 2 * padding[i] - reach[i] - (grid[i] - 1) * stride[i] for i in range(2)]
    channels = x.shape[-2] // window
    maps = x.reshape(-1, channels * window, *grid)
    weight = torch.eye(window).reshape(window, 1, *kernel).repeat(channels, 1, 1, 1)
    image = torch.conv_transpose2d(maps, weight, None, stride, padding, rest, channels, dilation)
    return image.reshape(*x.shape[:-2], channels, *size)


def _cdist(a: torch.Tensor, b: torch.Tensor, p: float, mode: int | None = None) -> torch.Tensor:
    difference = a.unsqueeze(-2) - b.unsqueeze(-3)
    if p == 1:
        return difference.abs().sum(-1)
    if p == 2:
        return difference.square().sum(-1).sqrt()
    if p == math.inf:
        return difference.abs().amax(-1)
    if p == 0:
        return (difference != 0).to(a.dtype).sum(-1)
    return difference.abs().pow(p).sum(-1).pow(1 / p)


def _pdist(x: torch.Tensor, p: float = 2) -> torch.Tensor:
    """The distances of all pairs of rows, the first row's first."""
    n = x.shape[0]
    if not isinstance(n, int) or not 1 < n <= MAX_FACTORS:
        return NotImplemented
    rows = [_cdist(x.narrow(0, i, 1), x.narrow(0, i + 1, n - 1 - i), p).reshape(-1) for i in range(n - 1)]
    return torch.cat(rows)


def _vector_norm(
    x: torch.Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The number of elements that are not zero; the others are TVM's."""
    if order != 0 or dtype is not None:
        return NotImplemented
    return (x != 0).to(x.dtype).sum(list(range(x.dim())) if dim is None else dim, keepdim)


def _fake_quantize(x: torch.Tensor, scale: float, zero: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.round(x * (1.0 / scale)) + zero
    return (torch.clamp(q, lo, hi) - zero) * scale, (q >= lo) & (q <= hi)


def _fake_quantize_channels(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, axis: int, lo: int, hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
    scale, zero = scale.reshape(shape), zero.reshape(shape).to(x.dtype)
    q = torch.round(x * (1.0 / scale)) + zero
    return (torch.clamp(q, lo, hi) - zero) * scale, (q >= lo) & (q <= hi)


def _scatter_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor, reduce: str, include_self: bool = True
) -> torch.Tensor:
    """Every element of the result over all sources: there are no atomic updates to rely on."""
    real = x.dtype.is_floating_point
    limit: Any = math.inf if real else torch.iinfo(x.dtype).max
    neutral = {"sum": 0, "mean": 0, "prod": 1, "amax": -limit, "amin": limit}[reduce]
    rest = [i for i in range(x.dim()) if i != dim % max(x.dim(), 1)]
    if (reduce == "mean" and not real) or any(index.shape[i] != x.shape[i] for i in rest):
        return NotImplemented
    if reduce == "prod" and index.shape[dim] > MAX_FACTORS:
        return NotImplemented
    src = src[tuple(slice(0, n) for n in index.shape)]
    own, index, src = (t.movedim(dim, -1) for t in (x, index, src))
    hit = index.unsqueeze(-2) == torch.arange(own.shape[-1]).unsqueeze(-1)
    parts = torch.where(hit, src.unsqueeze(-2), torch.full((), neutral, dtype=x.dtype))
    count = hit.to(torch.float32).sum(-1)
    if reduce == "amax":
        result = torch.maximum(own, parts.amax(-1)) if include_self else parts.amax(-1)
    elif reduce == "amin":
        result = torch.minimum(own, parts.amin(-1)) if include_self else parts.amin(-1)
    elif reduce == "prod":
        result = own * parts.prod(-1) if include_self else parts.prod(-1)
    else:
        total = parts.sum(-1, dtype=x.dtype)
        result = own + total if include_self else total
        if reduce == "mean":
            result = result / (count + 1.0 if include_self else count.clamp(min=1.0))
    if not include_self:
        result = torch.where(count > 0.5, result, own)
    return result.movedim(-1, dim)


def _index_add(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, *, alpha: float = 1
) -> torch.Tensor:
    if not x.dtype.is_floating_point:
        return NotImplemented
    hit = (index == torch.arange(x.shape[dim]).unsqueeze(-1)).to(x.dtype)
    added = source.movedim(dim, -1) @ hit.transpose(0, 1)
    return x + alpha * added.movedim(-1, dim)


def _index_copy(x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if not x.dtype.is_floating_point:
        return NotImplemented
    hit = (index == torch.arange(x.shape[dim]).unsqueeze(-1)).to(x.dtype)
    moved = source.movedim(dim, -1) @ hit.transpose(0, 1)
    return torch.where(hit.sum(-1) > 0.5, moved, x.movedim(dim, -1)).movedim(-1, dim)


def _index_fill(x: torch.Tensor, dim: int, index: torch.Tensor, value: Any) -> torch.Tensor:
    place = torch.arange(x.shape[dim]).unsqueeze(-1)
    hit = ((index == place) | (index + x.shape[dim] == place)).to(torch.float32).sum(-1) > 0.5
    shape = [1] * x.dim()
    shape[dim] = -1
    new = value.to(x.dtype) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=x.dtype)
    return torch.where(hit.reshape(shape), new, x)


def _index_put(
    x: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False, unsafe: bool = False
) -> torch.Tensor:
    """One boolean mask: a choice. Integer indices: TVM wants one for every axis; here each element looks for its value.

    Where several values go to one element and are not added up, the last one wins.
    """
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) == 1 and indices[given[0]].dtype == torch.bool:
        mask = indices[given[0]]
        if accumulate or values.numel() != 1:
            return NotImplemented
        mask = mask.reshape(*[1] * given[0], *mask.shape, *[1] * (x.dim() - given[0] - mask.dim()))
        return torch.where(mask, values.reshape(()).to(x.dtype), x)
    real = x.dtype.is_floating_point
    if (accumulate and not real) or any(indices[i].dtype == torch.bool for i in given):
        return NotImplemented
    order = [*given, *[i for i in range(x.dim()) if i not in given]]
    shape = torch.broadcast_shapes(*[indices[i].shape for i in given])
    rows, place = 1, torch.zeros(shape, dtype=torch.int64)
    for axis in given:
        size = x.shape[axis]
        index = indices[axis].to(torch.int64)
        place = place * size + torch.where(index < 0, index + size, index)
        rows *= size
    moved = x.permute(order)
    rest = list(moved.shape[len(given) :])
    together = given == list(range(given[0], given[-1] + 1))
    if together and given[0] > 0:
        # The axes of the indices stand where the first indexed axis was: bring those of `values` to the front.
        whole = [*x.shape[: given[0]], *shape, *x.shape[given[-1] + 1 :]]
        axes = range(given[0], given[0] + len(shape))
        values = values.expand(whole).movedim(list(axes), list(range(len(shape))))
    flat = values.expand(*shape, *rest).reshape(place.numel(), -1)
    own = moved.reshape(rows, -1)
    hit = place.reshape(1, -1) == torch.arange(rows).unsqueeze(-1)
    if accumulate:
        new = own + hit.to(x.dtype) @ flat
    else:
        number = torch.arange(1, place.numel() + 1)
        last = torch.where(hit, number, torch.zeros((), dtype=torch.int64)).amax(-1, keepdim=True)
        if real:
            found = (last == number).to(x.dtype) @ flat
        else:
            found = torch.index_select(flat, 0, (last - 1).clamp(min=0).reshape(-1))
        new = torch.where(last > 0, found, own)
    back = [order.index(i) for i in range(x.dim())]
    return new.reshape(moved.shape).permute(back)


def _masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Where the mask is set, the elements of the source in order: as many as are set before the place."""
    if x.numel() > MAX_ELEMENTS:
        return NotImplemented
    flat = mask.expand(x.shape).reshape(-1)
    place = (_cumsum(flat, 0) - 1).clamp(0, source.numel() - 1)
    found = torch.index_select(source.reshape(-1), 0, place).reshape(x.shape)
    return torch.where(mask, found, x)


def _unfold(x: torch.Tensor, dim: int, size: int, step: int) -> torch.Tensor:
    """Windows of an axis, as one more axis at the end."""
    dim = dim % x.dim()
    count = (x.shape[dim] - size) // step + 1
    place = (torch.arange(count).unsqueeze(-1) * step + torch.arange(size)).reshape(-1)
    parts = torch.index_select(x, dim, place)
    return parts.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :]).movedim(dim + 1, -1)


def _bucketize(
    x: torch.Tensor, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False
) -> torch.Tensor:
    """The number of boundaries below x, or not above it."""
    below = boundaries <= x.unsqueeze(-1) if right else boundaries < x.unsqueeze(-1)
    return below.to(torch.float32).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _searchsorted(
    boundaries: torch.Tensor,
    x: torch.Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    if sorter is not None:
        return NotImplemented
    return _bucketize(x, boundaries.unsqueeze(-2), out_int32=out_int32, right=right or side == "right")


def _product(x: torch.Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    if x.dim() == 0 or x.shape[dim] > MAX_FACTORS:
        return NotImplemented
    if dtype is None:
        dtype = x.dtype if x.dtype.is_floating_point else torch.int64
    first, *rest = x.to(dtype).split(1, dim)
    result = functools.reduce(torch.mul, rest, first)
    return result if keepdim else result.squeeze(dim)


def _var_mean(
    x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    axes = list(range(x.dim())) if dim is None else dim
    correction = 1 if correction is None else correction
    return torch.var(x, axes, correction=correction, keepdim=keepdim), torch.mean(x, axes, keepdim)


def _avg_pool(
    x: torch.Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """TVM does not look at the divisor."""
    if divisor_override is None or ceil_mode:
        return NotImplemented
    area = kernel[0] * kernel[-1]
    return torch.nn.functional.avg_pool2d(x, kernel, stride or kernel, padding) * (area / divisor_override)


def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    c: int,
    area: int,
    groups: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = x.reshape(n, groups, c // groups * area)
    mean = flat.mean(-1, keepdim=True)
    centred = flat - mean
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    shape = [c, *[1] * (x.dim() - 2)]
    result = (centred * scale).reshape(x.shape)
    if weight is not None:
        result = result * weight.reshape(shape)
    if bias is not None:
        result = result + bias.reshape(shape)
    return result, mean.squeeze(-1), scale.squeeze(-1)


def _upsample_nearest(x: torch.Tensor, size: Any, factors: Any) -> torch.Tensor:
    """TVM's resize agrees with PyTorch for whole factors; else rows and columns are picked one by one."""
    height, width = size or [math.floor(x.shape[2 + i] * factors[i]) for i in range(2)]
    if height % x.shape[2] == 0 and width % x.shape[3] == 0:
        return NotImplemented
    for axis, count in ((2, height), (3, width)):
        ratio = 1 / factors[axis - 2] if factors else x.shape[axis] / count
        place = (torch.arange(count, dtype=torch.float32) * ratio).to(torch.int64).clamp(max=x.shape[axis] - 1)
        x = torch.index_select(x, axis, place)
    return x


def _upsample_bilinear(x: torch.Tensor, size: Any, corners: bool, factors: Any) -> torch.Tensor:
    """TVM takes the ratio of the sizes; PyTorch the factor that was given, which differs when sizes are rounded.

    With aligned corners TVM divides by the size less one.
    """
    height, width = size or [math.floor(x.shape[2 + i] * factors[i]) for i in range(2)]
    rounded = factors and (x.shape[2] * factors[0] != height or x.shape[3] * factors[1] != width)
    if not (1 in (height, width) if corners else rounded):
        return NotImplemented
    for axis, count in ((2, height), (3, width)):
        n = x.shape[axis]
        place = torch.arange(count, dtype=torch.float32)
        if corners:
            place = place * ((n - 1) / max(count - 1, 1))
        else:
            place = ((place + 0.5) * (1 / factors[axis - 2]) - 0.5).clamp(min=0.0)
        low = place.to(torch.int64).clamp(max=n - 1)
        weight = (place - low).reshape(-1, *[1] * (3 - axis))
        first, second = (torch.index_select(x, axis, i) for i in (low, (low + 1).clamp(max=n - 1)))
        x = first + (second - first) * weight
    return x


def _upsample_bicubic(x: torch.Tensor, size: Any, corners: bool, factors: Any) -> torch.Tensor:
    """Four taps along each axis (Keys, 1981, with a = -3/4): TVM's expression of all sixteen compiles for minutes."""
    a = -0.75

    def near(t: torch.Tensor) -> torch.Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: torch.Tensor) -> torch.Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    counts = size or [math.floor(x.shape[2 + i] * factors[i]) for i in range(2)]
    for axis, count in enumerate(counts, 2):
        n = x.shape[axis]
        place = torch.arange(count, dtype=torch.float32)
        if corners:
            place = place * ((n - 1) / (count - 1) if count > 1 else 0.0)
        else:
            place = (place + 0.5) * (1 / factors[axis - 2] if factors else n / count) - 0.5
        low = torch.floor(place)
        t = place - low
        result: Any = 0.0
        for tap, weight in enumerate((far(t + 1), near(t), near(1 - t), far(2 - t)), -1):
            rows = torch.index_select(x, axis, (low + tap).clamp(0, n - 1).to(torch.int64))
            result = result + rows * weight.reshape(-1, *[1] * (3 - axis))
        x = result
    return x


def _index_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> torch.Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return _scatter_reduce(x, dim, index.reshape(shape).expand(source.shape), source, reduce, include_self)


def _rrelu(
    x: torch.Tensor,
    noise: Any,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outside training the slope is the middle of its range."""
    return torch.where(x > 0, x, x * ((lower + upper) / 2)), noise
