"""Reading graphs: arguments, users, and what nodes that only move elements around do to them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from edgec.program import constant_of, is_call, layer_of, origin_of, shape_of

aten = torch.ops.aten

# Operators whose result holds elements of their first operand, unchanged.
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
MOVES = (
    *RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.select.int,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.expand.default,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    operator.getitem,
)
# Index tensors and folded constants above this many elements are not computed.
MOST_ELEMENTS = 1 << 24
MOST_CONSTANTS = 1 << 22


def argument(node: Any, position: int, name: str, default: Any) -> Any:
    """Argument of a call by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def is_tensor(node: Any, dtype: torch.dtype | None = torch.float32) -> bool:
    """Whether the node is a tensor of this type (of any, for None)."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and dtype in (None, value.dtype)


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A new call at the insertion point, with its meta value; layer and origin are those of `like`."""
    node = graph.call_function(target, args)
    value = target(*fx.map_arg(args, lambda a: a.meta["val"]))
    node.meta.update(val=value, edgec_layer=layer_of(like), edgec_origin=origin_of(like))
    return node


def is_identity(node: Any) -> bool:
    """Whether a call returns its operand: dropout outside training, and copies, which only graphs with writes need."""
    if is_call(node, aten.dropout.default):
        return argument(node, 2, "train", True) is False
    return is_call(node, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)


def is_move(node: Any) -> bool:
    return is_call(node, *MOVES) or is_identity(node)


def moves_ones(node: Any) -> bool:
    """Whether a permutation moves nothing but axes of one element."""
    if is_call(node, aten.permute.default):
        order = [int(axis) % len(node.args[1]) for axis in node.args[1]]
    elif is_call(node, aten.transpose.int):
        order = list(range(len(shape_of(node))))
        a, b = (int(axis) % len(order) for axis in node.args[1:])
        order[a], order[b] = order[b], order[a]
    else:
        return False
    shape = shape_of(node.args[0])
    kept = [axis for axis in order if shape[axis] != 1]
    return kept == sorted(kept)


# -- where elements go -------------------------------------------------------------------------------------------------


def moved(node: Any, index: Any) -> Any:
    """What the move `node` makes of `index`, which stands for its operand."""
    if is_identity(node):
        return index
    rest = fx.map_arg(node.args[1:], lambda a: a.meta["val"])
    kwargs = fx.map_arg(dict(node.kwargs), lambda a: a.meta["val"])
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return index.reshape(*rest)
    return node.target(index, *rest, **kwargs)


def places(node: fx.Node) -> torch.Tensor:
    """The flat position of each element of a node, in its own shape."""
    return torch.arange(node.meta["val"].numel()).reshape(shape_of(node))


def affine(index: torch.Tensor) -> tuple[int, list[int]] | None:
    """(offset, strides) with index[i, j, ...] = offset + i * strides[0] + ..., or None. Single elements: stride 0."""
    offset = int(index.flatten()[0])
    strides = []
    made = torch.full((), offset, dtype=index.dtype)
    for axis, size in enumerate(index.shape):
        line = index[tuple(slice(0, None) if i == axis else 0 for i in range(index.dim()))]
        stride = int(line[1] - line[0]) if size > 1 else 0
        strides.append(stride)
        shape = [-1 if i == axis else 1 for i in range(index.dim())]
        made = made + (torch.arange(size) * stride).reshape(shape)
    return (offset, strides) if torch.equal(made.expand(index.shape), index) else None


def view_of(node: fx.Node, shape: tuple[int, ...], expand: bool = False) -> tuple[fx.Node, int, list[int]]:
    """(tensor, offset, strides): `node`, reshaped or expanded to `shape`, as an affine view of a dense tensor.

    The tensor is the farthest one that `node` is such a view of; it may be `node` itself.
    """
    path = [node]
    while is_move(path[-1]) and isinstance(path[-1].args[0], fx.Node):
        path.append(path[-1].args[0])
    for start in range(len(path) - 1, -1, -1):
        base = path[start]
        if not is_tensor(base, None) or base.meta["val"].numel() > MOST_ELEMENTS:
            continue
        index: Any = places(base)
        for step in reversed(path[:start]):
            index = moved(step, index)
        found = affine(index.expand(shape) if expand else index.reshape(shape))
        if found is not None:
            return base, *found
    raise ValueError(f"{node} cannot be expanded to {shape}")


def cancel_moves(graph: fx.Graph, source: fx.Node) -> None:
    """Replace moves of `source` that leave every element where it was by `source` itself or one reshape of it."""
    own = places(source)
    work: list[tuple[fx.Node, Any]] = [(source, own)]
    while work:
        node, index = work.pop()
        for user in list(node.users):
            if not is_move(user) or user.args[0] is not node:
                continue
            after = moved(user, index)
            in_order = isinstance(after, torch.Tensor) and torch.equal(after.flatten(), own.flatten())
            if in_order and shape_of(user) == shape_of(source):
                user.replace_all_uses_with(source)
                graph.erase_node(user)
                # The users of `user` are now users of `source`.
                work.append((source, own))
            elif in_order and not (node is source and is_call(user, aten.reshape.default)):
                with graph.inserting_before(user):
                    new = call(graph, aten.reshape.default, (source, list(shape_of(user))), user)
                user.replace_all_uses_with(new)
                graph.erase_node(user)
                work.append((new, after))
            else:
                work.append((user, after))


# -- constants ---------------------------------------------------------------------------------------------------------


def folded(module: fx.GraphModule, node: Any, depth: int = 64) -> torch.Tensor | None:
    """The value of a node that depends on weights only, computed now; None for all others and for large results."""
    stored = constant_of(module, node)
    if stored is not None:
        return stored
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth == 0:
        return None
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.numel() > MOST_CONSTANTS:
        return None
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    operands: dict[fx.Node, Any] = {}
    for operand in node.all_input_nodes:
        known = operand.meta.get("val")
        result = known if isinstance(known, (int, float)) else folded(module, operand, depth - 1)
        if result is None:
            return None
        operands[operand] = result
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda a: operands[a])
    with torch.no_grad():
        return node.target(*args, **kwargs)
