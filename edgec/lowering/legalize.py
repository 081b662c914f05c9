"""Torch-level legalisation: what TVM 0.27's ExportedProgram importer refuses or gets wrong is rewritten before it.

Two kinds of rules. Decompositions replace an operator by others that import correctly; FX rewrites repair arguments
that the importer misreads (a negative index becomes an out-of-bounds read there, without an error). What is still not
known to the importer is reported all at once, with the place in the model it came from.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgec import regions as regions  # registers the operators that pass through
from edgec.program import is_call

aten = torch.ops.aten

# Kept whole: the importer has them, and their decompositions are many small kernels.
KEEP = (
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.gelu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
)

# The importer has them, but they become calls of TVM's run time, which is not on the device, or of nothing.
UNLOWERED = frozenset(
    [
        "argsort.default",
        "bernoulli.p",
        "bucketize.Tensor",
        "cond",
        "cumprod.default",
        "cumsum.default",
        "item.default",
        "masked_select.default",
        "median.default",
        "median.dim",
        "randn.default",
        "randn_like.default",
        "sort.default",
        "to_sparse.default",
        "topk.default",
    ]
)


def legalize(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An equal program that TVM imports correctly. Operators of the `edgec` namespace are not touched."""
    core = exported.run_decompositions(_table())
    _rewrite(core.graph_module)
    return core


def convert_map() -> dict[str, Callable[[fx.Node, Any], Any]]:
    """Importer functions for operators that TVM lacks, converts wrongly or with a warning."""
    return {
        "amax.default": _extreme("max"),
        "amin.default": _extreme("min"),
        "embedding.default": _embedding,
        "grid_sampler_2d.default": _grid_sampler,
        "index.Tensor": _index,
        "index_select.default": _index_select,
        "select.int": _select,
    }


@dataclass(frozen=True)
class Unsupported:
    """An operator that nothing here compiles, and where it stands in the user's model."""

    op: str
    layer: str
    source: str

    def __str__(self) -> str:
        place = ", ".join(p for p in (f"layer {self.layer}" if self.layer else "", self.source) if p)
        return f"{self.op} ({place})" if place else self.op


def unsupported(exported: torch.export.ExportedProgram) -> list[Unsupported]:
    """Every operator of the legalised graph without a converter, once per layer, in graph order."""
    known = _importer_names() - UNLOWERED | set(convert_map())
    found: dict[Unsupported, None] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") == "edgec":
            continue
        name = _importer_name(node)
        if name not in known:
            label = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
            layer = node.meta.get("custom", {}).get("edgec_layer") or _module_path(node)
            found[Unsupported(label, layer, _source(node))] = None
    return list(found)


# -- decompositions ----------------------------------------------------------------------------------------------------


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
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
        aten.scaled_dot_product_attention.default: _attention,
        aten.adaptive_max_pool2d.default: _adaptive_max_pool,
        aten.col2im.default: _fold,
        aten._cdist_forward.default: _cdist,
        aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantize,
        aten.fake_quantize_per_channel_affine_cachemask.default: _fake_quantize_channels,
        aten.scatter_reduce.two: _scatter_reduce,
    }


def _table() -> Any:
    table = torch.export.default_decompositions()
    for operator, function in _decompositions().items():
        table[operator] = function
    for operator in KEEP:
        if operator in table:
            del table[operator]
    return table


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
    height, width = x.shape[-2:]
    values, places = [], []
    for top, bottom in _windows(height, size[0]):
        for left, right in _windows(width, size[1]):
            flat = x[..., top:bottom, left:right].flatten(-2)
            values.append(torch.amax(flat, -1))
            at = torch.argmax(flat, -1)
            rows = torch.div(at, right - left, rounding_mode="floor")
            places.append(rows * (width - (right - left)) + at + top * width + left)
    shape = (*x.shape[:-2], *size)
    return torch.stack(values, -1).reshape(shape), torch.stack(places, -1).reshape(shape)


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
    return NotImplemented


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
    neutral = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": -math.inf, "amin": math.inf}[reduce]
    rest = [i for i in range(x.dim()) if i != dim % max(x.dim(), 1)]
    if reduce == "prod" or not x.dtype.is_floating_point or any(index.shape[i] != x.shape[i] for i in rest):
        return NotImplemented
    src = src[tuple(slice(0, n) for n in index.shape)]
    own, index, src = (t.movedim(dim, -1) for t in (x, index, src))
    hit = index.unsqueeze(-2) == torch.arange(own.shape[-1]).unsqueeze(-1)
    parts = torch.where(hit, src.unsqueeze(-2), torch.full((), neutral))
    count = hit.to(torch.float32).sum(-1)
    if reduce == "amax":
        result = torch.maximum(own, parts.amax(-1)) if include_self else parts.amax(-1)
    elif reduce == "amin":
        result = torch.minimum(own, parts.amin(-1)) if include_self else parts.amin(-1)
    else:
        result = own + parts.sum(-1) if include_self else parts.sum(-1)
        if reduce == "mean":
            result = result / (count + 1.0 if include_self else count.clamp(min=1.0))
    if not include_self:
        result = torch.where(count > 0.5, result, own)
    return result.movedim(-1, dim)


# -- graph rewrites ----------------------------------------------------------------------------------------------------


def _rewrite(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_call(node, aten.floor_divide.default, aten.div.Tensor_mode):
            # The importer reads a Python number as an int32.
            if isinstance(node.args[1], (int, float)):
                with graph.inserting_before(node):
                    dtype = {"dtype": _val(node.args[0]).dtype, "device": "cpu"}
                    node.update_arg(1, _call(graph, aten.full.default, ([], node.args[1]), dtype))
        elif is_call(node, aten.index.Tensor):
            _legal_index(graph, node)
    graph.lint()
    module.recompile()


def _legal_index(graph: fx.Graph, node: fx.Node) -> None:
    """Indices become non-negative, and several indices of different axes name the first axes of the tensor."""
    x, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    shape = _val(x).shape
    given = [i for i, index in enumerate(indices) if index is not None]
    with graph.inserting_before(node):
        for axis in given:
            index = indices[axis]
            if _val(index).dtype == torch.bool:
                return
            negative = _call(graph, aten.lt.Scalar, (index, 0))
            wrapped = _call(graph, aten.add.Tensor, (index, int(shape[axis])))
            indices[axis] = _call(graph, aten.where.self, (negative, wrapped, index))
        if len(given) > 1 and given != list(range(given[0], given[-1] + 1)):
            # Indices around a slice: the axes that they make come first.
            rest = [axis for axis in range(len(shape)) if axis not in given]
            node.update_arg(0, _call(graph, aten.permute.default, (x, [*given, *rest])))
            indices = [indices[axis] for axis in given]
        elif len(given) > 1 and given[0] > 0:
            rank = max(_val(indices[i]).dim() for i in given)
            for axis in range(given[0]):
                view = [1] * axis + [int(shape[axis])] + [1] * (given[0] - axis - 1) + [1] * rank
                every = _call(graph, aten.arange.start_step, (0, int(shape[axis]), 1), {"device": "cpu"})
                indices[axis] = _call(graph, aten.view.default, (every, view))
            indices = indices[: given[-1] + 1]
    node.update_arg(1, indices)


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A new call with its meta value, computed on the operands' fake tensors."""
    node = graph.call_function(target, args, kwargs or {})
    values = fx.map_arg((args, kwargs or {}), _val)
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _val(node: Any) -> Any:
    return node.meta["val"]


# -- converters and the report of what is missing ----------------------------------------------------------------------


def _grid_sampler(node: fx.Node, importer: Any) -> Any:
    """TVM takes the grid as [N, 2, H, W]; PyTorch's [N, H, W, 2] is imported as it is, which is wrong."""
    from tvm import relax

    x, grid, mode, padding, corners = importer.retrieve_args(node)
    moved = importer.block_builder.emit(relax.op.permute_dims(grid, [0, 3, 1, 2]))
    return importer.block_builder.emit(
        relax.op.image.grid_sample(
            x,
            moved,
            method=("bilinear", "nearest", "bicubic")[mode],
            layout="NCHW",
            padding_mode=("zeros", "border", "reflection")[padding],
            align_corners=corners,
        )
    )


def _extreme(name: str) -> Callable[[fx.Node, Any], Any]:
    def convert(node: fx.Node, importer: Any) -> Any:
        from tvm import relax

        x, dim, keepdim = (*node.args, *((), False)[len(node.args) - 1 :])
        axes = [dim] if isinstance(dim, int) else list(dim)  # type: ignore[arg-type]
        return importer.block_builder.emit(getattr(relax.op, name)(importer.env[x], axes or None, keepdim))

    return convert


def _select(node: fx.Node, importer: Any) -> Any:
    """One element of an axis, as a slice; TVM makes a gather of it, which reads beyond the end for a negative index."""
    from tvm import relax

    x, axis, index = node.args
    size: Any = _val(x).shape[axis]
    start: Any = index % size
    part = relax.op.strided_slice(importer.env[x], [axis], [start], [start + 1])  # type: ignore[arg-type]
    return importer.block_builder.emit(relax.op.squeeze(importer.block_builder.emit(part), [axis]))  # type: ignore


def _take(importer: Any, x: Any, index: Any, axis: int) -> Any:
    """Clamped indices: a wrong one must not read foreign memory."""
    from tvm import relax

    return importer.block_builder.emit(relax.op.take(x, index, axis=axis, mode="clip"))


def _index(node: fx.Node, importer: Any) -> Any:
    given = [(axis, index) for axis, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
    if len(given) != 1 or _val(given[0][1]).dtype == torch.bool:
        return importer._index_tensor(node)
    axis, index = given[0]
    return _take(importer, importer.env[node.args[0]], importer.env[index], axis)


def _index_select(node: fx.Node, importer: Any) -> Any:
    x, axis, index = node.args
    return _take(importer, importer.env[x], importer.env[index], axis % _val(x).dim())  # type: ignore[operator]


def _embedding(node: fx.Node, importer: Any) -> Any:
    return _take(importer, importer.env[node.args[0]], importer.env[node.args[1]], 0)


@functools.cache
def _importer_names() -> frozenset[str]:
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return frozenset(str(name) for name in ExportedProgramImporter().convert_map)


def _importer_name(node: fx.Node) -> str:
    """The key under which TVM's importer looks an operator up."""
    return getattr(node.target, "__name__", str(node.target))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _source(node: fx.Node) -> str:
    """`file.py:12` of the innermost line of the user's code."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    inside = ("/site-packages/torch/", "<eval", "/edgec/")
    outside = [p for p in places if not any(part in p[0] for part in inside)]
    return f"{outside[-1][0]}:{outside[-1][1]}" if outside else ""
