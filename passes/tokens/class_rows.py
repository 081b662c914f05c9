"""Compute only the rows that the read-out selects: behind the last attention of a classifier, the class token."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgec.lowering.graph import argument, call, is_move, moved
from edgec.passbase import Context, Pass
from edgec.passes.tokens.axes import (
    SDPA,
    aligned,
    backwards,
    is_pointwise,
    part_shape,
    set_length,
    tensors_of,
)
from edgec.passes.tokens.sites import canonicalise
from edgec.program import Program, constant_of, is_call, layer_of, propagate, weight_node
from edgec.sparsity import Sparsity

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """The first `count` entries of `axis` are needed."""

    axis: int
    count: int


ALL = "all"
Demand = Rows | str


@dataclass(frozen=True)
class ClassRows(Pass):
    """Move the selection of prefix tokens up through everything that treats tokens one by one.

    A slice moves up through linear layers, norms, activations and residual additions; at an attention it goes on into
    the queries alone, because keys and values of all tokens are needed. A fused projection is taken apart for it. In a
    vision transformer that reads out its class token the last block then computes queries, projection and MLP of that
    one token: about 10 N C^2 + 2 N^2 C of its 12 N C^2 + 2 N^2 C multiply-accumulates are saved. The output is equal.

    Described for class attention in Touvron et al., "Going deeper with Image Transformers"; as a rewrite, our own.
    """

    name: ClassVar[str] = "class-rows"

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with less work and the same function; the same Program where nothing is selected."""
        module = program.edit()
        canonicalise(module, program.example_inputs)
        if not push_rows(module, program, context):
            context.skip(program.name, "class rows", "no output depends on some of the tokens only")
            return program
        return program.replace(module)


def push_rows(module: fx.GraphModule, program: Program, context: Context) -> bool:
    """Push selections up in a graph that is free to change; False when there was nothing to gain."""
    demands = _demands(module)
    fused = False
    for attention in [n for n in module.graph.nodes if is_call(n, SDPA)]:
        if isinstance(demands.get(attention), Rows):
            fused = _take_apart(module, program, attention, context) or fused
    if fused:
        module.graph.eliminate_dead_code()
        propagate(module, program.example_inputs)
        demands = _demands(module)
    restricted = {n: d for n, d in demands.items() if isinstance(d, Rows) and d.count < part_shape(n)[d.axis]}
    if not any(is_call(n, aten.linear.default, SDPA) for n in restricted):
        return False
    for node in [n for n in module.graph.nodes if n in restricted]:
        _restrict(module, node, restricted)
    propagate(module, program.example_inputs)
    return True


# -- who needs what ----------------------------------------------------------------------------------------------------


def _demands(module: fx.GraphModule) -> dict[fx.Node, Demand]:
    """What of each tensor is needed, from the outputs backwards."""
    demands: dict[fx.Node, Demand] = {}
    for node in reversed(list(module.graph.nodes)):
        if node.op == "output":
            wanted: Demand = ALL
        elif node in demands:
            wanted = demands[node]
        else:
            continue
        for operand, demand in _operand_demands(node, wanted).items():
            demands[operand] = _union(demands.get(operand), demand)
    return demands


def _union(a: Demand | None, b: Demand) -> Demand:
    if a is None or a == b:
        return b
    if isinstance(a, Rows) and isinstance(b, Rows) and a.axis == b.axis:
        return Rows(a.axis, max(a.count, b.count))
    return ALL


def _operand_demands(node: fx.Node, wanted: Demand) -> dict[fx.Node, Demand]:
    """What a node needs of its operands when `wanted` is needed of it."""
    found: dict[fx.Node, Demand] = dict.fromkeys(node.all_input_nodes, ALL)
    if node.op != "call_function":
        return found
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if wanted == ALL:
        taken = _taken(node)
        if taken is not None and first is not None:
            found[first] = taken
        return found
    assert isinstance(wanted, Rows)
    for operand, place in _row_operands(node, wanted.axis).items():
        found[operand] = Rows(place, wanted.count)
    return found


def _taken(node: fx.Node) -> Rows | None:
    """The leading entries that a select or slice takes."""
    if not is_call(node, aten.select.int, aten.slice.Tensor):
        return None
    shape = part_shape(node.args[0])  # type: ignore[arg-type]
    axis = int(argument(node, 1, "dim", 0)) % len(shape)
    if axis == 0:
        return None
    if is_call(node, aten.select.int):
        index = int(node.args[2])  # type: ignore[arg-type]
        return Rows(axis, index + 1) if index >= 0 else None
    start, end = argument(node, 2, "start", None) or 0, argument(node, 3, "end", None)
    if end is None or not isinstance(end, int) or end <= 0 or start < 0 or argument(node, 4, "step", 1) != 1:
        return None
    return Rows(axis, end) if end < shape[axis] else None


def _row_operands(node: fx.Node, axis: int) -> dict[fx.Node, int]:
    """Operands, with their axis, of which the node needs the same entries as are needed of it on `axis`.

    Empty for operators that need all of their operands.
    """
    if is_call(node, SDPA):
        q, mask = node.args[0], argument(node, 3, "attn_mask", None)
        rank = len(part_shape(node))
        if axis != rank - 2 or argument(node, 5, "is_causal", False) or not isinstance(q, fx.Node):
            return {}
        found = {q: axis} if q not in node.args[1:3] else {}
        if found and isinstance(mask, fx.Node) and (place := aligned(node, mask, axis)) is not None:
            found[mask] = place
        return found
    if node.target is operator.getitem:
        # All parts of a tuple would have to be needed alike; the tuple itself is never restricted.
        return {}
    if is_pointwise(node):
        places = {a: aligned(node, a, axis) for a in tensors_of(node)}
        return {a: place for a, place in places.items() if place is not None}
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or sum(a is first for a in node.all_input_nodes) != 1:
        return {}
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return {}
    place = backwards(node, axis)
    return {} if place is None else {first: place}


# -- doing with less ---------------------------------------------------------------------------------------------------


def _restrict(module: fx.GraphModule, node: fx.Node, restricted: dict[fx.Node, Rows]) -> None:
    """Let a node compute its first rows only, from the first rows of its operands."""
    need = restricted[node]
    places = _row_operands(node, need.axis)
    # A node without such operands stays whole; its users take the rows.
    if not places:
        del restricted[node]
        return
    for operand, place in places.items():
        have = restricted.get(operand)
        if have is not None and have == Rows(place, need.count):
            continue
        with module.graph.inserting_before(node):
            part = module.graph.call_function(aten.slice.Tensor, (operand, place, 0, need.count))
        value = operand.meta["val"]
        part.meta.update(val=value.narrow(place, 0, need.count), edgec_layer=layer_of(node))
        node.replace_input_with(operand, part)
    set_length(node, need.axis, need.count)


def _take_apart(module: fx.GraphModule, program: Program, attention: fx.Node, context: Context) -> bool:
    """Give queries, keys and values of a fused projection a linear layer each; False where that is not needed."""
    linear = _projection(attention.args[0])
    if linear is None:
        return False
    leaves = _leaves(linear)
    rows = {leaf: _channels(linear, leaf) for leaf in leaves}
    if len(leaves) < 2 or any(found is None for found in rows.values()):
        return False
    weight, bias = constant_of(module, linear.args[1]), constant_of(module, argument(linear, 2, "bias", None))
    path = str(getattr(linear.args[1], "target", ""))
    if weight is None or (bias is None and argument(linear, 2, "bias", None) is not None):
        return False
    if isinstance(program.annotations.get(path), Sparsity):
        context.skip(layer_of(linear), "queries of all tokens", "the fused projection is pruned; run class-rows before")
        return False
    for leaf, name in zip(leaves, "qkv" if len(leaves) == 3 else [f"part{i}" for i in range(len(leaves))]):
        token, channels = rows[leaf]  # type: ignore[misc]
        with module.graph.inserting_before(linear):
            owner = layer_of(linear)
            chosen = weight_node(module, f"{owner}.{name}_weight", weight[channels.flatten()])
            args: tuple[Any, ...] = (linear.args[0], chosen)
            if bias is not None:
                args += (weight_node(module, f"{owner}.{name}_bias", bias[channels.flatten()]),)
            new = call(module.graph, aten.linear.default, args, linear)
            if channels.dim() > 1:
                new = call(module.graph, aten.unflatten.int, (new, 2, list(channels.shape)), leaf)
            # [batch, tokens, ...] to the layout of the leaf
            order = [0, *range(2, token + 1), 1, *range(token + 1, channels.dim() + 2)]
            if order != sorted(order):
                new = call(module.graph, aten.permute.default, (new, order), leaf)
        leaf.replace_all_uses_with(new)
    return True


def _projection(node: Any) -> fx.Node | None:
    """The linear layer that makes the queries, up through moves and what works token by token."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_call(node, aten.linear.default):
            return node
        node = node.args[0]
    return None


def _leaves(linear: fx.Node) -> list[fx.Node]:
    """The parts that moves behind a linear layer take its result apart into; one, the layer itself, if they do not."""
    leaves: list[fx.Node] = []

    def descend(node: fx.Node) -> None:
        if not node.users or any(not is_move(user) or user.args[0] is not node for user in node.users):
            leaves.append(node)
            return
        for user in node.users:
            if user.target is operator.getitem or is_call(user, aten.select.int, aten.slice.Tensor):
                leaves.append(user)
            else:
                descend(user)

    descend(linear)
    return leaves


def _channels(linear: fx.Node, leaf: fx.Node) -> tuple[int, torch.Tensor] | None:
    """(token axis, channel of each entry over the axes behind batch and tokens) of a part of a linear layer's result.

    None where a part is more than a choice of channels of every token.
    """
    path = []
    node = leaf
    while node is not linear:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    shape = part_shape(linear)
    if len(shape) != 3 or not path:
        return None
    index: Any = torch.arange(math.prod(shape)).reshape(shape)
    for step in reversed(path):
        index = moved(step, index)
    batch, tokens, width = shape
    if index.dim() < 3 or index.shape[0] != batch:
        return None
    for axis in range(1, index.dim()):
        if index.shape[axis] != tokens:
            continue
        channels = index.select(axis, 0)[0]
        if channels.numel() and int(channels.max()) >= width:
            continue
        view = [1] * index.dim()
        view[axis] = tokens
        token = torch.arange(tokens).reshape(view) * width
        sample = torch.arange(batch).reshape(-1, *[1] * (index.dim() - 1)) * tokens * width
        if torch.equal(channels.unsqueeze(0).unsqueeze(axis) + token + sample, index):
            return axis, channels
    return None
