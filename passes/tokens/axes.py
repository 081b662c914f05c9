"""Where the axis of tokens goes: one operator at a time, forwards, backwards, and into the literal shapes of views.

Positions decide, never values: a model may have as many tokens as channels.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from edgec.lowering.graph import argument, is_identity
from edgec.program import is_call, shape_of

aten = torch.ops.aten

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
PARTS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.glu.default)
SUMS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
SDPA = aten.scaled_dot_product_attention.default
# Element by element, though torch does not tag them so.
COPIES = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.dropout_.default)


class Opaque(Exception):
    """The axis of tokens cannot be followed any further; the message says why."""


def is_pointwise(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or is_identity(node) or is_call(node, *COPIES)


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The operands that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def part_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node, or of its parts where it is a tuple of tensors (which may differ along the split axis only)."""
    value = node.meta["val"]
    return tuple(int(d) for d in (value if isinstance(value, torch.Tensor) else value[0]).shape)


def through(node: fx.Node, axis: int) -> int:
    """The axis of the result that is axis `axis` of the first operand, entry by entry.

    Raises Opaque where the operator mixes or drops entries of that axis, and for operators that are not known.
    """
    source = node.args[0]
    if isinstance(source, (list, tuple)):
        source = source[0]
    assert isinstance(source, fx.Node)
    before, rank = part_shape(source), len(part_shape(source))
    if node.target is operator.getitem:
        return axis
    if is_pointwise(node):
        return axis + len(shape_of(node)) - rank
    if is_call(node, aten.linear.default):
        return _kept(axis, axis != rank - 1, "a linear layer works across tokens (token mixing)")
    if is_call(node, aten.matmul.default, aten.mm.default):
        right = node.args[1]
        plain = isinstance(right, fx.Node) and len(shape_of(right)) == 2 and axis != rank - 1
        return _kept(axis, plain, "a product of matrices mixes tokens")
    if is_call(node, *NORMS):
        return _kept(axis, axis < rank - len(node.args[1]), "a normalisation runs over tokens")  # type: ignore[arg-type]
    if is_call(node, aten.batch_norm.default):
        return _kept(axis, axis != 1, "a batch norm has one statistic per token")
    if is_call(node, *SOFTMAXES):
        dim = int(argument(node, 1, "dim", -1)) % rank
        return _kept(axis, axis != dim, "a softmax over tokens that is no attention the compiler knows")
    if is_call(node, *SUMS):
        over = [int(d) % rank for d in _dims(argument(node, 1, "dim", ()), rank)]
        if axis in over:
            raise Opaque("a reduction over tokens")
        return axis if argument(node, 2, "keepdim", False) else axis - sum(d < axis for d in over)
    return _moved(node, axis, before)


def _dims(value: Any, rank: int) -> list[int]:
    if isinstance(value, int):
        return [value]
    return list(value) if value else list(range(rank))


def _kept(axis: int, kept: bool, reason: str) -> int:
    if not kept:
        raise Opaque(reason)
    return axis


def _moved(node: fx.Node, axis: int, before: tuple[int, ...]) -> int:
    """`through` for operators that only move elements."""
    rank = len(before)
    if is_call(node, *VIEWS, aten.flatten.using_ints, aten.unflatten.int):
        return reshaped(before, shape_of(node), axis)
    if is_call(node, aten.permute.default):
        return [int(a) % rank for a in node.args[1]].index(axis)  # type: ignore[union-attr]
    if is_call(node, aten.transpose.int, aten.t.default):
        a, b = (int(x) % rank for x in node.args[1:]) if node.target is aten.transpose.int else (0, rank - 1)  # type: ignore[arg-type]
        return {a: b, b: a}.get(axis, axis)
    if is_call(node, aten.expand.default):
        return axis + len(shape_of(node)) - rank
    if is_call(node, aten.unsqueeze.default):
        dim = int(node.args[1]) % (rank + 1)  # type: ignore[arg-type]
        return axis + (dim <= axis)
    if is_call(node, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default):
        dims = _dims(argument(node, 1, "dim", None), rank)
        gone = [d % rank for d in dims if before[d % rank] == 1]
        return _kept(axis - sum(d < axis for d in gone), axis not in gone, "a squeeze of the only token")
    if is_call(node, aten.slice.Tensor, aten.narrow.default):
        dim = int(argument(node, 1, "dim", 0)) % rank
        return _kept(axis, dim != axis, "part of the tokens is taken")
    if is_call(node, aten.select.int):
        dim = int(node.args[1]) % rank  # type: ignore[arg-type]
        return _kept(axis - (dim < axis), dim != axis, "one token is taken")
    if is_call(node, *PARTS):
        dim = int(argument(node, 2, "dim", 0) if node.target is not aten.unbind.int else argument(node, 1, "dim", 0))
        dim %= rank
        after = axis - (dim < axis) if node.target is aten.unbind.int else axis
        return _kept(after, dim != axis, "tokens are split into parts")
    if is_call(node, aten.cat.default):
        dim = int(argument(node, 1, "dim", 0)) % rank
        return _kept(axis, dim != axis, "tokens are concatenated with others")
    if is_call(node, aten.stack.default):
        dim = int(argument(node, 1, "dim", 0)) % (rank + 1)
        return axis + (dim <= axis)
    raise Opaque(f"the operator {node.target} is not known to treat tokens alike")


def reshaped(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int:
    """Axis of `after` that holds axis `axis` of `before` whole. Raises Opaque when it is split or joined."""
    ahead = math.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == ahead:
            return place
    raise Opaque("a reshape splits the tokens or joins them with another axis (a grid of patches, or windows)")


def backwards(node: fx.Node, axis: int) -> int | None:
    """The axis of the first operand that becomes axis `axis` of the result; None when there is none."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    for candidate in range(len(part_shape(source))):
        try:
            if through(node, candidate) == axis and part_shape(source)[candidate] == part_shape(node)[axis]:
                return candidate
        except Opaque:
            continue
    return None


def aligned(node: fx.Node, operand: fx.Node, axis: int) -> int | None:
    """Axis of a pointwise operand under axis `axis` of the result; None where it broadcasts there."""
    place = axis - len(shape_of(node)) + len(shape_of(operand))
    return place if place >= 0 and shape_of(operand)[place] != 1 else None


def set_length(node: fx.Node, axis: int, length: int) -> None:
    """Write `length` at the place of `axis` in the literal shape of a view, reshape or expand; others have none."""
    if is_call(node, *VIEWS, aten.expand.default):
        sizes = list(node.args[1])  # type: ignore[arg-type]
        if isinstance(sizes[axis], int) and sizes[axis] != -1:
            sizes[axis] = length
            node.args = (node.args[0], sizes, *node.args[2:])
    elif is_call(node, aten.unflatten.int):
        rank = len(part_shape(node.args[0]))  # type: ignore[arg-type]
        dim, sizes = int(node.args[1]) % rank, list(node.args[2])  # type: ignore[arg-type]
        if dim <= axis < dim + len(sizes) and sizes[axis - dim] != -1:
            sizes[axis - dim] = length
            node.args = (node.args[0], dim, sizes)
