"""Torch-level legalisation: what TVM 0.27's ExportedProgram importer refuses or gets wrong is rewritten before it.

Two kinds of rules. Decompositions replace an operator by others that import correctly; FX rewrites repair arguments
that the importer misreads (a negative index becomes an out-of-bounds read there, without an error). What is still not
known to the importer is reported all at once, with the place in the model it came from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from edgec import regions as regions  # registers the operators that pass through
from edgec.lowering.decompositions import decompositions
from edgec.origin import module_path, source_line
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

# The importer has them, but they become calls of TVM's run time, which is not on the device, or something else.
UNLOWERED = frozenset(
    [
        "_upsample_bilinear2d_aa.default",
        "argsort.default",
        "bernoulli.p",
        "bucketize.Tensor",
        "cond",
        "cumprod.default",
        "as_strided.default",
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

SUGGESTIONS = {
    "cumprod": "it is written out up to 64 factors; take the exponential of a cumulative sum of logarithms",
    "median": "give it an axis",
    "nonzero": "use a mask and torch.where, which keep shapes",
    "masked_select": "use a mask and torch.where, which keep shapes",
    "as_strided": "use slices and reshapes",
}


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
        "full.default": _full,
        "grid_sampler_2d.default": _grid_sampler,
        "index.Tensor": _index,
        "index_select.default": _index_select,
        "select.int": _select,
    }


@dataclass(frozen=True)
class Unsupported:
    """An operator that nothing here compiles, where it stands in the user's model, and what to write instead."""

    op: str
    layer: str
    source: str
    suggestion: str = ""

    def __str__(self) -> str:
        place = ", ".join(p for p in (f"layer {self.layer}" if self.layer else "", self.source) if p)
        return (f"{self.op} ({place})" if place else self.op) + (f": {self.suggestion}" if self.suggestion else "")


def unsupported(exported: torch.export.ExportedProgram) -> list[Unsupported]:
    """Every operator of the legalised graph without a converter, once per layer, in graph order."""
    known = _importer_names() - UNLOWERED | set(convert_map())
    found: dict[Unsupported, None] = {}
    for node in exported.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") == "edgec":
            continue
        name = _importer_name(node)
        problem = _wrong_import(node)
        if name not in known or problem:
            label = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else name
            layer = node.meta.get("custom", {}).get("edgec_layer") or module_path(node)
            suggestion = problem or SUGGESTIONS.get(name.partition(".")[0].removesuffix("_"), "")
            found[Unsupported(label, layer, source_line(node), suggestion)] = None
    return list(found)


def _wrong_import(node: fx.Node) -> str:
    """Why a call of an operator that the importer has comes out wrong; empty for all others."""
    if any(isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 for v in tree_leaves(node.meta.get("val"))):
        return "kernels do not compute in bfloat16: convert the model with model.float()"
    pools = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
    if is_call(node, *pools) and any(user.args[1] == 1 for user in node.users):
        return "the positions of the maxima cannot be compiled"
    if is_call(node, aten.scatter.src, aten.scatter.value):
        x, dim, index = _val(node.args[0]), int(node.args[1]), _val(node.args[2])  # type: ignore[arg-type]
        if any(i != dim % x.dim() and index.shape[i] != x.shape[i] for i in range(x.dim())):
            return "the index must have the shape of the tensor but for the axis of the scatter"
    return ""


def _table() -> Any:
    table = torch.export.default_decompositions()
    for operator in KEEP:
        if operator in table:
            del table[operator]
    for operator, function in decompositions().items():
        table[operator] = function
    return table


# -- graph rewrites ----------------------------------------------------------------------------------------------------


# Operators of two operands that the importer builds with the type of the first one.
ARITHMETIC = (aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.remainder, aten.fmod)
COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
BOOLEAN: dict[Any, Any] = {aten.add.Tensor: aten.logical_or.default, aten.mul.Tensor: aten.logical_and.default}
DIVISIONS = (aten.floor_divide.default, aten.div.Tensor_mode)
LAYER_NORMS = (aten.layer_norm.default, aten.native_layer_norm.default)


def _rewrite(module: fx.GraphModule) -> None:
    """Repair the arguments that the importer misreads, and drop what it would copy for nothing."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_call(node, aten.expand.default) and _val(node).shape == _val(node.args[0]).shape:
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph.erase_node(node)
            continue
        if is_call(node, aten.ne.Tensor, aten.eq.Tensor) and node.args[0] is node.args[1]:
            _is_number(graph, node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.add, aten.sub, aten.rsub):
            _explicit_alpha(graph, node)
        if packet in ARITHMETIC or packet in COMPARISONS:
            _common_type(graph, node)
        if is_call(node, *DIVISIONS):
            _typed_divisor(graph, node)
        elif is_call(node, aten.index.Tensor):
            _legal_index(graph, node)
        elif is_call(node, aten.clamp.default):
            _both_limits(node)
        elif is_call(node, aten.cat.default):
            _one_type(graph, node)
        elif is_call(node, *LAYER_NORMS):
            _explicit_affine(graph, node)
    graph.lint()
    module.recompile()


def _is_number(graph: fx.Graph, node: fx.Node) -> None:
    """x != x asks whether it is NaN; TVM's arithmetic takes it for false, and x == x for true."""
    x = cast(fx.Node, node.args[0])
    if _val(x).dtype.is_floating_point:
        with graph.inserting_before(node):
            asked = _call(graph, aten.isnan.default, (x,))
            if is_call(node, aten.eq.Tensor):
                asked = _call(graph, aten.logical_not.default, (asked,))
        node.replace_all_uses_with(asked)


def _explicit_alpha(graph: fx.Graph, node: fx.Node) -> None:
    """x + alpha y: the importer leaves alpha out."""
    alpha: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    if alpha == 1:
        return
    x, y, *_ = cast(tuple[Any, ...], node.args)
    with graph.inserting_before(node):
        scaled = _call(graph, aten.mul.Tensor, (y, alpha)) if isinstance(y, fx.Node) else y * alpha  # type: ignore[operator]
    node.args = (x, scaled)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "alpha"}


def _common_type(graph: fx.Graph, node: fx.Node) -> None:
    """Integers with a fraction, and booleans: the importer rounds the number to the type of the tensor."""
    operands: list[Any] = [_val(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
    tensors = [isinstance(v, torch.Tensor) for v in operands]
    if len(operands) < 2 or not any(tensors) or not all(isinstance(v, (torch.Tensor, int, float)) for v in operands):
        return
    kind = torch.result_type(*operands)
    if kind == torch.bool and node.target in BOOLEAN:
        node.target = BOOLEAN[node.target]
        return
    if kind == torch.bool:
        kind = torch.int32
    elif is_call(node, aten.div.Tensor, aten.div.Scalar) and not kind.is_floating_point:
        kind = torch.float32
    with graph.inserting_before(node):
        for position in range(2):
            if tensors[position] and operands[position].dtype != kind:
                node.update_arg(position, _cast(graph, node.args[position], kind))


def _typed_divisor(graph: fx.Graph, node: fx.Node) -> None:
    """A number becomes a tensor of the dividend's type; the importer would take it for int32."""
    x: Any = node.args[0]
    y: Any = node.args[1]
    if isinstance(x, fx.Node) and isinstance(y, (int, float)):
        with graph.inserting_before(node):
            kind = torch.result_type(_val(x), y)
            if _val(x).dtype != kind:
                node.update_arg(0, _cast(graph, x, kind))
            node.update_arg(1, _call(graph, aten.full.default, ([], y), {"dtype": kind}))


def _one_type(graph: fx.Graph, node: fx.Node) -> None:
    """Tensors of several types in one concatenation."""
    parts: Any = list(node.args[0])  # type: ignore[arg-type]
    kind = _val(node).dtype
    if any(_val(part).dtype != kind for part in parts):
        with graph.inserting_before(node):
            parts = [part if _val(part).dtype == kind else _cast(graph, part, kind) for part in parts]
        node.update_arg(0, parts)


def _both_limits(node: fx.Node) -> None:
    """A limit that is missing would become an infinite integer."""
    kind = _val(node).dtype
    low, high = (node.args[i] if len(node.args) > i else node.kwargs.get(k) for i, k in ((1, "min"), (2, "max")))
    if not kind.is_floating_point:
        limits = torch.iinfo(kind)
        node.args = (node.args[0], limits.min if low is None else low, limits.max if high is None else high)
        node.kwargs = {}


def _cast(graph: fx.Graph, node: Any, kind: torch.dtype) -> fx.Node:
    return _call(graph, aten._to_copy.default, (node,), {"dtype": kind})


def _explicit_affine(graph: fx.Graph, node: fx.Node) -> None:
    """Layer norm without weight or bias: the importer wants both."""
    x, shape, weight, bias, *rest = (*node.args, *[None] * (4 - len(node.args)))
    with graph.inserting_before(node):
        if weight is None:
            weight = _call(graph, aten.full.default, (list(shape), 1.0))  # type: ignore[call-overload]
        if bias is None:
            bias = _call(graph, aten.full.default, (list(shape), 0.0))  # type: ignore[call-overload]
    node.args = (x, shape, weight, bias, *rest)


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


def _full(node: fx.Node, importer: Any) -> Any:
    """A number everywhere; TVM's own cannot take infinity."""
    import numpy as np
    from tvm import relax

    shape, value, *_ = cast(tuple[Any, ...], node.args)
    if not isinstance(value, float) or math.isfinite(value):
        return importer._full(node)
    number = relax.const(np.asarray(value, str(_val(node).dtype).removeprefix("torch.")))
    wide: Any = list(shape)
    return importer.block_builder.emit(relax.op.broadcast_to(number, wide)) if wide else number


@functools.cache
def _importer_names() -> frozenset[str]:
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return frozenset(str(name) for name in ExportedProgramImporter().convert_map)


def _importer_name(node: fx.Node) -> str:
    """The key under which TVM's importer looks an operator up."""
    return getattr(node.target, "__name__", str(node.target))
