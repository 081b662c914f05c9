"""Recognise norms, written as one operator or as arithmetic, and the quantisation behind them."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from edgec import regions as region_ops  # noqa: F401  (registers the operators)
from edgec.lowering.graph import argument, folded, is_tensor, only_user
from edgec.program import is_call, layer_of, origin_of, shape_of

aten = torch.ops.aten
edgec = torch.ops.edgec


def fuse_norms(module: fx.GraphModule) -> None:
    """Replace layer norms and RMS norms with stored weights by regions, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if is_call(node, aten.layer_norm.default, aten.native_layer_norm.default):
            _layer_norm(graph, node)
        elif is_call(node, aten.rms_norm.default):
            x, shape, weight, eps = (*node.args, None, None)[:4]  # type: ignore[misc]
            if is_tensor(x) and _stored(weight):
                epsilon = torch.finfo(torch.float32).eps if eps is None else float(eps)  # type: ignore[arg-type]
                _emit(graph, node, edgec.rms_norm.default, (x, weight, math.prod(shape), epsilon))  # type: ignore[arg-type]
        elif is_call(node, aten.rsqrt.default):
            _composed_rms_norm(module, node)
    graph.eliminate_dead_code()


def _stored(*weights: Any) -> bool:
    return all(w is None or w.op == "get_attr" for w in weights)


def _layer_norm(graph: fx.Graph, node: Any) -> None:
    x, shape, weight, bias, *_ = (*node.args, None, None)
    eps = argument(node, 4, "eps", 1e-5)
    if not is_tensor(x) or not _stored(weight, bias) or 0 in shape_of(x):
        return
    last: Any = node
    if is_call(node, aten.native_layer_norm.default):
        # (result, mean, 1 / deviation), of which only the first may be read.
        if len(node.users) != 1 or not is_call(only_user(node), operator.getitem) or only_user(node).args[1] != 0:  # type: ignore[union-attr]
            return
        last = only_user(node)
    _emit(graph, last, edgec.layer_norm.default, (x, weight, bias, math.prod(shape), float(eps)))


def _composed_rms_norm(module: fx.GraphModule, root: Any) -> None:
    """x * rsqrt(mean(x^2) + eps), times a weight of the last axis where one follows."""
    total = root.args[0]
    if not is_call(total, aten.add.Tensor) or not isinstance(total.args[1], (int, float)):
        return
    mean, eps = total.args[:2]
    if not is_call(mean, aten.mean.dim) or not argument(mean, 2, "keepdim", False):
        return
    square = mean.args[0]
    if (
        (is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2)
        or is_call(square, aten.square.default)
        or (is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1])
    ):
        x = square.args[0]
    else:
        return
    rank = len(shape_of(x))
    if [int(axis) % rank for axis in mean.args[1]] != [rank - 1] or not is_tensor(x):
        return
    if any(len(n.users) != 1 for n in (square, mean, total, root)):
        return
    last = only_user(root)
    if not is_call(last, aten.mul.Tensor) or set(last.args) != {x, root}:  # type: ignore[union-attr]
        return
    weight, product = None, only_user(last)  # type: ignore[arg-type]
    if is_call(product, aten.mul.Tensor):
        other = next((a for a in product.args if a is not last), None)  # type: ignore[union-attr]
        value = folded(module, other)
        if value is not None and other.op == "get_attr" and value.numel() == value.shape[-1] == shape_of(x)[-1]:  # type: ignore[union-attr]
            weight, last = other, product
    _emit(module.graph, last, edgec.rms_norm.default, (x, weight, shape_of(x)[-1], float(eps)))  # type: ignore[arg-type]


def _emit(graph: fx.Graph, last: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """The region in the place of `last`, or of the quantisation that is its only reader."""
    grid: tuple[float | None, int] = (None, 0)
    follower = only_user(last)
    layer = layer_of(last)
    if follower is not None and is_call(follower, edgec.quantize.default):
        grid = (follower.args[1], follower.args[2])  # type: ignore[assignment]
        last = follower
    with graph.inserting_before(last):
        new = graph.call_function(target, (*args, *grid))
    value = last.meta["val"]
    new.meta.update(val=value.new_empty(value.shape), edgec_layer=layer, edgec_origin=origin_of(last))
    last.replace_all_uses_with(new)
