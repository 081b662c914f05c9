"""Token reduction in kernels: each operator of `edgec.tokenops` becomes a choice of slots and what moves by it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edgec import regions as region_ops  # noqa: F401  (registers the operators)
from edgec import tokenops as token_ops  # noqa: F401
from edgec.lowering.graph import RESHAPES, argument, call, is_tensor, view_of
from edgec.program import is_call, origin_of, shape_of

aten = torch.ops.aten
edgec = torch.ops.edgec

REDUCTIONS = (edgec.tome_merge.default, edgec.token_reduce.default, edgec.token_keep.default)


def fuse_tokens(module: fx.GraphModule) -> None:
    """Replace operators of token reduction, and logarithms of the sizes they give, by region operators, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if is_call(node, *REDUCTIONS):
            with graph.inserting_before(node):
                x, size = _reduction(graph, node)
            _results(graph, node, (x, size))
        elif is_call(node, edgec.class_score.default):
            _score(graph, node)
    for node in list(graph.nodes):
        if is_call(node, aten.log.default) and is_tensor(node.args[0]) and _is_size(node.args[0]):
            with graph.inserting_before(node):
                new = call(graph, edgec.log_sizes.default, (node.args[0],), node)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _reduction(graph: fx.Graph, node: Any) -> tuple[fx.Node, fx.Node]:
    """New nodes for both results."""
    x, size = node.args[:2]
    rows = node.meta["val"][0].shape[1]

    def made(target: Any, *args: Any) -> fx.Node:
        return call(graph, target, args, node)

    shares, weighted, merges = None, True, True
    if is_call(node, edgec.tome_merge.default):
        metric, r, prefix, distilled = node.args[2:]
        if r == 0:
            return x, size
        source, shape, view = _keys(metric)
        slots = made(edgec.tome_slots.default, source, shape, view, r, prefix, distilled)
    elif is_call(node, edgec.token_reduce.default):
        score, prefix, keep, merge, weighted, true_size = node.args[2:]
        merges = merge < keep
        slots = made(edgec.reduce_slots.default, x if merges else None, score, prefix, keep, merge, True)
        shares = x if merges and not true_size else None
    else:
        score, prefix, keep = node.args[2:]
        merges = False
        slots = made(edgec.reduce_slots.default, None, score, prefix, keep, keep, False)
    weight = size if weighted and merges else None
    return (
        made(edgec.merge_tokens.default, x, weight, slots, rows, merges),
        made(edgec.merge_sizes.default, size, slots, shares, rows),
    )


def _keys(metric: Any) -> tuple[fx.Node, list[int], list[int]]:
    """(tensor, [batch, heads, tokens, depth], [offset, strides]) of a metric: the mean over heads of that view."""
    batch, tokens, depth = shape_of(metric)
    if is_call(metric, aten.mean.dim) and len(shape_of(metric.args[0])) == 4:
        keys, dims = metric.args[:2]
        keep = bool(argument(metric, 2, "keepdim", False))
        if [int(d) % 4 for d in dims] == [1] and not keep and is_tensor(keys):
            shape = tuple(shape_of(keys))
            source, view = _view(keys)
            return source, list(shape), view
    source, (offset, of_batch, of_token, of_depth) = _view(metric)
    return source, [batch, 1, tokens, depth], [offset, of_batch, 0, of_token, of_depth]


def _view(node: Any) -> tuple[fx.Node, list[int]]:
    """(tensor, [offset, strides]) of a node that may be seen through views."""
    source, offset, strides = view_of(node, tuple(shape_of(node)))
    return source, [offset, *strides]


def _score(graph: fx.Graph, node: Any) -> None:
    q, k, size, scale, prefix = node.args
    with graph.inserting_before(node):
        (q_source, q_view), (k_source, k_view) = (_view(x) for x in (q, k))
        new = call(
            graph,
            edgec.class_scores.default,
            (q_source, k_source, size, list(shape_of(k)), q_view, k_view, scale, prefix),
            node,
        )
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _results(graph: fx.Graph, node: Any, results: tuple[fx.Node, fx.Node]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem
        new = results[user.args[1]]
        if "edgec_origin" not in new.meta or is_call(new, edgec.merge_tokens.default, edgec.merge_sizes.default):
            # The values of the original graph stand under the names of its items.
            new.meta["edgec_origin"] = origin_of(user)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)


def _is_size(node: Any) -> bool:
    """Whether these are sizes of tokens, perhaps reshaped."""
    while is_call(node, *RESHAPES):
        node = node.args[0]
    return is_call(node, edgec.merge_sizes.default)
