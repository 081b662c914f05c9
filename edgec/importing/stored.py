"""Weights that a model computes from other weights every time it runs, computed once.

Weight normalisation, weight standardisation and parametrisations derive the weight of a layer from stored tensors. No
pass and no kernel knows such a weight; its values are all that matters when the model is not trained any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edgec.program import add_weight, get_weight

aten = torch.ops.aten

# Only these are no reason to store another tensor: kernels and rules look through them.
MOVES = frozenset(
    getattr(aten, name)
    for name in (
        *("view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "flatten"),
        *("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "clone", "contiguous", "detach", "alias"),
        *("to", "_to_copy", "numpy_T", "mT", "view_as", "expand_as", "reshape_as", "cat", "stack", "unflatten"),
    )
)
# Results are not larger than what they come from, or small: tables that grow are computed when the model is compiled.
SMALL = 4096


def stored_nodes(graph: fx.Graph, weights: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose values follow from `weights`, at least one of them, and constants of the graph alone."""
    found, fixed = set(weights), set(weights)
    for node in graph.nodes:
        if node.op != "call_function" or node in fixed:
            continue
        target = node.target
        plain = getattr(target, "namespace", "aten") == "aten" and not isinstance(
            target, torch._ops.HigherOrderOperator
        )
        if isinstance(target, torch._ops.OpOverload):
            random = torch.Tag.nondeterministic_seeded in target.tags and not _is_off(node)
            plain = plain and not target._schema.is_mutable and not random
        if plain and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
            if any(n in found for n in node.all_input_nodes):
                found.add(node)
    return found


def _is_off(node: fx.Node) -> bool:
    """Whether an operator that may be random is not: dropout outside training."""
    return any(value is False for value in (*node.args, *node.kwargs.values()))


def fold_stored(module: fx.GraphModule) -> None:
    """Store what is computed from weights alone, in place; only values that an operator on activations reads."""
    graph = module.graph
    weights = {n for n in graph.nodes if n.op == "get_attr" and isinstance(get_weight(module, n), torch.Tensor)}
    parameters = {n for n in weights if get_weight(module, n).dtype.is_floating_point}
    found = stored_nodes(graph, weights)
    roots: dict[fx.Node, set[fx.Node]] = {n: {n} for n in weights}
    computes: set[fx.Node] = set()
    for node in graph.nodes:
        if node in found and node not in weights:
            inputs = node.all_input_nodes
            roots[node] = set().union(*[roots.get(n, set()) for n in inputs])
            move = getattr(node.target, "overloadpacket", None) in MOVES or node.target.__class__.__name__ != "OpOverload"
            if not move or any(n in computes for n in inputs):
                computes.add(node)
    values: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node not in computes or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if all(user in computes for user in node.users) or not roots[node] & parameters:
            continue
        size = sum(get_weight(module, n).numel() for n in roots[node])
        if int(node.meta["val"].numel()) > max(size, SMALL):
            continue
        value = _value(module, node, values)
        first = max(roots[node] & parameters, key=lambda n: (get_weight(module, n).numel(), n.name))
        owner = str(first.target).rpartition(".")[0]
        path = add_weight(module, ".".join(p for p in (owner, "folded") if p), value)
        with graph.inserting_before(node):
            new = graph.get_attr(path)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _value(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a stored node computes."""
    waiting = [node]
    while waiting:
        here = waiting[-1]
        if here in values:
            waiting.pop()
        elif here.op == "get_attr":
            values[here] = get_weight(module, here)
        else:
            missing = [n for n in here.all_input_nodes if n not in values]
            if missing:
                waiting += missing
                continue
            args, kwargs = fx.map_arg((here.args, here.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[here] = here.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
