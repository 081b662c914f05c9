"""Stored tensors that need work before they are weights of a Program: standardised weights, masks with infinities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from edgec.program import add_weight, get_weight, layer_of, weight_node


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


def prepare_stored(module: fx.GraphModule) -> None:
    """Both, in place."""
    put_infinities(module)
    fold_standardised(module)


def fold_standardised(module: fx.GraphModule) -> None:
    """Store the weights that come out of batch norms in training mode, in place.

    Over activations such a batch norm depends on the batch and is refused; over weights its value is always the same
    (Qiao et al., "Weight standardization", 2019). What else follows from weights alone is left to the
    pass `fold-constants`.
    """
    graph = module.graph
    weights = {n for n in graph.nodes if n.op == "get_attr" and isinstance(get_weight(module, n), torch.Tensor)}
    stored = stored_nodes(graph, weights)
    standardised: set[fx.Node] = set()
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node not in stored or node in weights:
            continue
        if "batch_norm" in str(node.target) or any(n in standardised for n in node.all_input_nodes):
            standardised.add(node)
        if node in standardised and any(user not in stored for user in node.users):
            with graph.inserting_before(node):
                path = add_weight(module, f"{layer_of(node)}.standardised", _value(module, node, values))
                new = graph.get_attr(path)
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in stored)
    graph.eliminate_dead_code()


def put_infinities(module: fx.GraphModule) -> None:
    """Let the graph put in the infinities of constants and buffers, as masks have them, in place: weights are finite.

    A parameter with an infinity is a broken one, and stays as it is, as does what has NaN.
    """
    graph, parameters = module.graph, dict(module.named_parameters(remove_duplicate=False))
    for node in list(graph.nodes):
        if node.op != "get_attr" or str(node.target) in parameters or not node.users:
            continue
        tensor = get_weight(module, node)
        if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
            continue
        endless = tensor.isinf()
        if not bool(endless.any()) or bool(tensor.isnan().any()):
            continue
        with graph.inserting_after(node):
            last = weight_node(module, f"{node.target}_finite", tensor.masked_fill(endless, 0.0))
        for sign, name in ((-math.inf, "below"), (math.inf, "above")):
            places = tensor == sign
            if not bool(places.any()):
                continue
            with graph.inserting_after(last):
                where = weight_node(module, f"{node.target}_{name}", places)
            with graph.inserting_after(where):
                made = graph.call_function(torch.ops.aten.masked_fill.Scalar, (last, where, sign))
            made.meta.update({**node.meta, "edgec_layer": layer_of(node)})
            last = made
        node.replace_all_uses_with(last)
        graph.erase_node(node)


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
