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
from edgec.program import is_call, layer_of

aten = torch.ops.aten

# Kept whole: the importer has them, and their decompositions are many small kernels.
KEEP = (
    aten.scaled_dot_product_attention.default,
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


def legalize(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An equal program that TVM imports correctly. Operators of the `edgec` namespace are not touched."""
    _before_decomposition(exported.graph_module)
    core = exported.run_decompositions(_table())
    _after_decomposition(core.graph_module)
    return core


def convert_map() -> dict[str, Callable[[fx.Node, Any], Any]]:
    """Importer functions for operators that TVM converts wrongly."""
    return {"grid_sampler_2d.default": _grid_sampler}


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
    known = _importer_names() | set(convert_map())
    found: dict[Unsupported, None] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") == "edgec":
            continue
        name = _importer_name(node)
        if name not in known:
            label = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
            layer = layer_of(node) if "edgec_layer" in node.meta else _module_path(node)
            found[Unsupported(label, layer, _source(node))] = None
    return list(found)


# -- decompositions ----------------------------------------------------------------------------------------------------


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    return {
        aten.amax.default: _amax,
        aten.amin.default: lambda x, dim=(), keepdim=False: -_amax(-x, dim, keepdim),
        aten._cdist_forward.default: _cdist,
        aten.any.dim: lambda x, dim, keepdim=False: torch.max(x.to(torch.float32), dim, keepdim)[0] > 0.5,
        aten.fake_quantize_per_tensor_affine_cachemask.default: _fake_quantize,
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


def _amax(x: torch.Tensor, dim: Any = (), keepdim: bool = False) -> torch.Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim) or list(range(x.dim()))
    for d in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.max(x, d, keepdim)[0]
    return x


def _cdist(a: torch.Tensor, b: torch.Tensor, p: float, mode: int | None = None) -> torch.Tensor:
    difference = a.unsqueeze(-2) - b.unsqueeze(-3)
    if p == 1:
        return difference.abs().sum(-1)
    if p == 2:
        return difference.square().sum(-1).sqrt()
    return NotImplemented


def _fake_quantize(x: torch.Tensor, scale: float, zero: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.round(x * (1.0 / scale)) + zero
    return (torch.clamp(q, lo, hi) - zero) * scale, (q >= lo) & (q <= hi)


def _scatter_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor, reduce: str, include_self: bool = True
) -> torch.Tensor:
    """Token merging's form, [N, T, C] along axis 1 with one index per token, as a product with a one-hot matrix."""
    if not include_self or reduce not in ("sum", "mean") or x.dim() != 3 or dim % 3 != 1:
        return NotImplemented
    columns = index[:, :, 0].unsqueeze(1)
    onehot = (columns == torch.arange(x.shape[1]).view(1, -1, 1)).to(x.dtype)
    total = x + onehot @ src
    return total if reduce == "sum" else total / (1 + onehot.sum(-1, keepdim=True))


# -- graph rewrites ----------------------------------------------------------------------------------------------------


def _before_decomposition(module: fx.GraphModule) -> None:
    """Attention: a boolean mask becomes an additive one, and batches of more than one axis are flattened."""
    graph = module.graph
    for node in list(graph.nodes):
        if not is_call(node, aten.scaled_dot_product_attention.default):
            continue
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node) and _val(mask).dtype == torch.bool:
            with graph.inserting_before(node):
                flag = _call(graph, aten._to_copy.default, (mask,), {"dtype": torch.float32})
                # Large rather than infinite: a row that is masked completely must not become NaN.
                mask = _call(graph, aten.mul.Tensor, (_call(graph, aten.sub.Tensor, (flag, 1.0)), 1e9))
            node.args = (*node.args[:3], mask, *node.args[4:])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        if _val(node.args[0]).dim() > 4 and mask is None:
            _flatten_attention(graph, node)
    graph.eliminate_dead_code()
    module.recompile()


def _flatten_attention(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        flat = []
        for operand in node.args[:3]:
            shape = list(_val(operand).shape)
            flat.append(_call(graph, aten.reshape.default, (operand, [math.prod(shape[:-3]), *shape[-3:]])))
        inner = _call(graph, node.target, (*flat, *node.args[3:]), dict(node.kwargs))
        outer = _call(graph, aten.reshape.default, (inner, list(_val(node).shape)))
    node.replace_all_uses_with(outer)
    graph.erase_node(node)


def _after_decomposition(module: fx.GraphModule) -> None:
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_call(node, aten.select.int) and isinstance(node.args[2], int) and node.args[2] < 0:
            size = _val(node.args[0]).shape[node.args[1]]
            node.update_arg(2, node.args[2] + size)
        elif is_call(node, aten.floor_divide.default, aten.div.Tensor_mode):
            if isinstance(node.args[1], int) and _val(node.args[0]).dtype.is_floating_point:
                node.update_arg(1, float(node.args[1]))
        elif is_call(node, aten.cumsum.default) and _val(node.args[0]).dtype == torch.bool:
            with graph.inserting_before(node):
                wide = _call(graph, aten._to_copy.default, (node.args[0],), {"dtype": torch.int64})
            node.update_arg(0, wide)
        elif is_call(node, aten.index.Tensor):
            _legal_index(graph, node)
    graph.lint()
    module.recompile()


def _legal_index(graph: fx.Graph, node: fx.Node) -> None:
    """Indices become non-negative, and leading full slices before several indices become index ranges."""
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
        if len(given) > 1 and given[0] > 0 and given == list(range(given[0], len(indices))):
            rank = max(_val(indices[i]).dim() for i in given)
            for axis in range(given[0]):
                view = [1] * axis + [int(shape[axis])] + [1] * (given[0] - axis - 1) + [1] * rank
                every = _call(graph, aten.arange.start_step, (0, int(shape[axis]), 1), {"device": "cpu"})
                indices[axis] = _call(graph, aten.view.default, (every, view))
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
