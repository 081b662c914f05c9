"""Recognise attention and products of activations; make one region of each.

Attention is `F.scaled_dot_product_attention` or a product, a softmax and a product. Queries, keys and values are read
through the views that led to them, and the result is written as the next layer reads it: [batch, tokens, heads *
depth]; the moves around become reshapes or disappear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgec import regions as region_ops  # noqa: F401  (registers the operators)
from edgec.lowering.graph import (
    RESHAPES,
    argument,
    call,
    cancel_moves,
    folded,
    is_identity,
    is_tensor,
    moves_ones,
    only_user,
    view_of,
)
from edgec.program import is_call, layer_of, origin_of, shape_of, weight_node

aten = torch.ops.aten
edgec = torch.ops.edgec

SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
ARITHMETIC = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor)
HIDING = (aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther)
# Scores down here weigh nothing beside any other: e^-10000 is 0 in float32.
HIDDEN = -1e4


@dataclass
class Match:
    """softmax(scale * q keys + mask) v. keys: k, or k with the last two axes exchanged where `swapped`."""

    last: fx.Node
    q: fx.Node
    keys: fx.Node
    v: fx.Node
    scale: float = 1.0
    swapped: bool = False
    mask: fx.Node | None = None
    constant_mask: torch.Tensor | None = None
    causal: bool = False
    group: int = 1


def fuse_attention(module: fx.GraphModule) -> None:
    """Replace every attention that the kernel computes by `edgec.attention`, in place."""
    graph = module.graph
    found = False
    for node in list(graph.nodes):
        if is_call(node, aten.scaled_dot_product_attention.default):
            match = _whole(module, node)
        elif is_call(node, *SOFTMAX):
            match = softmax_attention(module, node)
        else:
            continue
        if match is not None:
            found = _replace(module, match) or found
    if found:
        _flatten_linears(graph)
        _clean(graph)


def fuse_products(module: fx.GraphModule) -> None:
    """Replace products of activations, batched or not, by `edgec.matmul`, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if not is_call(node, *PRODUCTS, aten.mm.default) or not all(is_tensor(a) for a in node.args[:2]):
            continue
        a, b = node.args[:2]
        if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
            continue
        transposed = _exchanged(b)
        weight = folded(module, b) if len(shape_of(b)) == 2 else None
        if weight is not None:
            _linear(module, node, a, weight)
            continue
        if transposed:
            b = b.args[0]
        lead = [tuple(shape_of(x)[:-2]) for x in (a, b)]
        counts = [math.prod(x) for x in lead]
        same = [n for n in lead[0] if n != 1] == [n for n in lead[1] if n != 1] and counts[0] == counts[1]
        if not (same or 1 in counts) or 0 in shape_of(node):
            continue
        with graph.inserting_before(node):
            (m, k), n = shape_of(a)[-2:], shape_of(node)[-1]
            # A right operand that all products share makes one tall product of them.
            rows = counts[0] * m if counts[1] == 1 else m
            left = call(graph, aten.reshape.default, (a, [counts[0] * m // rows, rows, k]), node)
            right = call(graph, aten.reshape.default, (b, [counts[1], *((n, k) if transposed else (k, n))]), node)
            product = call(graph, edgec.matmul.default, (left, right, transposed), node)
            new = call(graph, aten.reshape.default, (product, list(shape_of(node))), node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _linear(module: fx.GraphModule, node: fx.Node, x: fx.Node, weight: torch.Tensor) -> None:
    """A product with a stored matrix is a linear layer."""
    with module.graph.inserting_before(node):
        stored = weight_node(module, f"{layer_of(node)}.weight", weight.t().contiguous())
        new = call(module.graph, aten.linear.default, (x, stored), node)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _exchanged(node: Any) -> bool:
    """Whether the node is its operand with the last two axes exchanged."""
    if is_call(node, aten.transpose.int):
        rank = len(shape_of(node))
        return {int(axis) % rank for axis in node.args[1:]} == {rank - 1, rank - 2}
    if is_call(node, aten.permute.default):
        rank = len(shape_of(node))
        return [int(axis) % rank for axis in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]
    return False


# -- recognition -------------------------------------------------------------------------------------------------------


def _whole(module: fx.GraphModule, node: Any) -> Match | None:
    q, k, v = node.args[:3]
    mask, dropout = argument(node, 3, "attn_mask", None), argument(node, 4, "dropout_p", 0.0)
    causal, scale = bool(argument(node, 5, "is_causal", False)), node.kwargs.get("scale")
    group = 1
    if node.kwargs.get("enable_gqa", False):
        group = shape_of(q)[-3] // shape_of(k)[-3]
    if dropout or not all(is_tensor(x) for x in (q, k, v)):
        return None
    scale = 1 / math.sqrt(shape_of(q)[-1]) if scale is None else float(scale)
    match = Match(node, q, k, v, scale, causal=causal, group=group)
    return match if mask is None or _add_mask(module, match, mask) else None


def softmax_attention(module: fx.GraphModule, softmax: Any) -> Match | None:
    """From the softmax down to the second product and up to the first one."""
    if int(softmax.args[1]) not in (-1, len(shape_of(softmax)) - 1) or not is_tensor(softmax.args[0]):
        return None
    weights, last = softmax, only_user(softmax)
    while last is not None and (is_identity(last) or _same_view(last)):
        weights, last = last, only_user(last)
    if not is_call(last, *PRODUCTS) or last.args[0] is not weights or not is_tensor(last.args[1]):  # type: ignore[union-attr]
        return None
    assert last is not None
    match = Match(last, softmax, softmax, last.args[1], swapped=True)  # type: ignore[arg-type]
    node: Any = softmax.args[0]
    while not is_call(node, *PRODUCTS):
        step = _score_step(module, match, node)
        if step is None or len(node.users) != 1:
            return None
        node = step
    if len(node.users) != 1 or not all(is_tensor(a) for a in node.args[:2]):
        return None
    match.q, match.keys = node.args[:2]
    scaled = _scaled(module, match.q)
    if scaled is not None:
        match.q, factor = scaled
        match.scale *= factor
    scaled = _scaled(module, match.keys)
    if scaled is not None:
        match.keys, factor = scaled
        match.scale *= factor
    return match


def _score_step(module: fx.GraphModule, match: Match, node: Any) -> fx.Node | None:
    """Take one operation between the first product and the softmax into the match; its operand, or None."""
    if is_identity(node) or _same_view(node):
        return node.args[0]
    if is_call(node, *HIDING):
        return _hidden(module, match, node)
    scaled = _scaled(module, node)
    if scaled is not None:
        match.scale *= scaled[1]
        return scaled[0]
    # A number that is added before a later scale would have to be scaled as well.
    if is_call(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1 and match.scale == 1.0:
        for x, mask in (node.args[:2], node.args[1::-1]):
            if not isinstance(x, fx.Node) or not isinstance(mask, fx.Node) or shape_of(x) != shape_of(node):
                continue
            if _leads_to_product(x) and _add_mask(module, match, mask):
                return x
    return None


def _hidden(module: fx.GraphModule, match: Match, node: Any) -> fx.Node | None:
    """masked_fill, and where in either order, with a constant mask and a number that hides."""
    if is_call(node, aten.masked_fill.Scalar):
        x, cover, value = node.args
        visible = folded(module, cover)
        visible = None if visible is None else ~visible
    else:
        cover, x, value = node.args
        visible = folded(module, cover)
    if isinstance(value, fx.Node):
        filler = folded(module, value)
        if filler is None or filler.numel() != 1:
            return None
        value = float(filler)
    if visible is None or visible.dtype != torch.bool or value > HIDDEN or not isinstance(x, fx.Node):
        return None
    # A row without visible keys weighs all of them alike where the number is finite.
    if value > -math.inf and not visible.any(-1).all():
        return None
    return x if _add_constant(match, _numbers(visible)) else None


def _leads_to_product(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_call(node, *PRODUCTS):
            return True
        if not (is_call(node, *ARITHMETIC, *HIDING) or is_identity(node) or _same_view(node)):
            return False
        node = node.args[1] if is_call(node, *HIDING[1:]) else node.args[0]
    return False


def _same_view(node: Any) -> bool:
    return is_call(node, *RESHAPES, aten.expand.default) and shape_of(node) == shape_of(node.args[0])


def _scaled(module: fx.GraphModule, node: Any) -> tuple[fx.Node, float] | None:
    """(x, factor) for x * factor and x / divisor with a positive number."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2:
        return None
    x, number = node.args
    if isinstance(number, fx.Node):
        value = folded(module, number) if math.prod(shape_of(number)) == 1 else None
        number = None if value is None else float(value)
    if not isinstance(number, (int, float)) or not isinstance(x, fx.Node) or not number > 0:
        return None
    return x, float(number) if is_call(node, aten.mul.Tensor) else 1.0 / float(number)


def _numbers(visible: torch.Tensor) -> torch.Tensor:
    """What a mask of truth values adds to scores."""
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)


def _add_mask(module: fx.GraphModule, match: Match, mask: Any) -> bool:
    """Take a mask into the match; False where it cannot be."""
    constant = folded(module, mask)
    if constant is not None:
        if constant.dtype == torch.bool:
            constant = _numbers(constant)
        return constant.dtype == torch.float32 and _add_constant(match, constant)
    if not is_tensor(mask) or match.mask is not None or match.constant_mask is not None:
        return False
    match.mask = mask
    return True


def _add_constant(match: Match, values: torch.Tensor) -> bool:
    """Constant masks add up; the triangle of causal attention is a flag."""
    if match.mask is not None:
        return False
    size = values.shape[-1]
    if values.dim() >= 2 and values.shape[-2] == size and values.numel() == size * size and size > 1:
        triangle = _numbers(torch.ones(size, size, dtype=torch.bool).tril())
        if torch.equal(values.reshape(size, size), triangle):
            match.causal = True
            return True
    match.constant_mask = values if match.constant_mask is None else match.constant_mask + values
    return True


# -- replacement -------------------------------------------------------------------------------------------------------


def _replace(module: fx.GraphModule, match: Match) -> bool:
    """Emit the region. False, with the graph as it was, where shapes do not suit the kernel."""
    graph, last = module.graph, match.last
    *lead, queries, value_depth = shape_of(last)
    depth = shape_of(match.q)[-1]
    keys = shape_of(match.v)[-2]
    heads = lead[-1] if lead else 1
    batch = math.prod(lead[:-1])
    if 0 in shape_of(last) or not math.isfinite(match.scale) or heads % match.group or keys == 0:
        return False
    shared = heads // match.group
    if any(math.prod(shape_of(x)[:-2]) != batch * n for x, n in ((match.q, heads), (match.v, shared))):
        return False
    if math.prod(shape_of(match.keys)[:-2]) != batch * shared:
        return False
    q = view_of(match.q, (batch, heads, queries, depth))
    v = view_of(match.v, (batch, shared, keys, value_depth))
    if match.swapped:
        source, offset, (b, h, d, n) = view_of(match.keys, (batch, shared, depth, keys))
        k = (source, offset, [b, h, n, d])
    else:
        k = view_of(match.keys, (batch, shared, keys, depth))
    if v[2][3] != 1 and value_depth > 1:
        v = (match.v, 0, _dense((batch, shared, keys, value_depth)))
    mask: Any = match.mask
    seen: tuple[int, list[int]] | None = None
    try:
        if match.constant_mask is not None:
            constant = match.constant_mask.contiguous()
            seen = 0, list(constant.expand(*lead, queries, keys).stride())
        elif mask is not None:
            mask, start, strides = view_of(mask, (*lead, queries, keys), expand=True)
            seen = start, strides
    except (RuntimeError, ValueError):
        return False
    if seen is not None and len(seen[1]) > 4:
        return False
    with graph.inserting_before(last):
        if match.constant_mask is not None:
            mask = weight_node(module, f"{layer_of(last)}.mask", match.constant_mask.contiguous())
        shape = [batch, heads, queries, keys, depth, value_depth, match.group]
        new = graph.call_function(
            edgec.attention.default,
            (
                q[0],
                k[0],
                v[0],
                mask,
                shape,
                [q[1], *q[2]],
                [k[1], *k[2]],
                [v[1], *v[2]],
                [] if seen is None else [seen[0], *[0] * (4 - len(seen[1])), *seen[1]],
                match.scale,
                match.causal,
                None,
                0,
            ),
        )
        value = match.q.meta["val"].new_empty((batch, queries, heads * value_depth))
        new.meta.update(val=value, edgec_layer=layer_of(last), edgec_origin=origin_of(last))
        split = call(graph, aten.reshape.default, (new, [batch, queries, heads, value_depth]), last)
        back = call(graph, aten.permute.default, (split, [0, 2, 1, 3]), last)
        back = call(graph, aten.reshape.default, (back, list(shape_of(last))), last)
    last.replace_all_uses_with(back)
    graph.erase_node(last)
    cancel_moves(graph, new)
    _clean(graph)
    _quantized(graph, new)
    return True


def _clean(graph: fx.Graph) -> None:
    """Erase what nothing reads; to fx, operators that may draw random numbers are never dead."""
    for node in reversed(list(graph.nodes)):
        if is_identity(node) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _dense(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _quantized(graph: fx.Graph, node: fx.Node) -> None:
    """Let the kernel write codes where its only reader quantises."""
    path = [node]
    while is_call(only_user(path[-1]), aten.reshape.default):
        path.append(only_user(path[-1]))  # type: ignore[arg-type]
    quantize = only_user(path[-1])
    if not is_call(quantize, edgec.quantize.default):
        return
    assert quantize is not None
    _, scale, zero_point = quantize.args
    node.args = (*node.args[:-2], scale, zero_point)
    node.meta["edgec_origin"] = origin_of(quantize)
    for step in path:
        step.meta["val"] = step.meta["val"].to(torch.int8)
    quantize.replace_all_uses_with(path[-1])


def _flatten_linears(graph: fx.Graph) -> None:
    """A linear layer works on the last axis: reshapes of the others go behind it, where they meet and cancel."""
    for node in list(graph.nodes):
        if not node.users:
            # Erased on the way.
            continue
        if is_identity(node) and is_call(node, aten.dropout.default):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
            continue
        if not is_call(node, aten.linear.default):
            continue
        source = node.args[0]
        while is_call(source, *RESHAPES) or moves_ones(source):
            source = source.args[0]
        if source is node.args[0] or not is_tensor(source) or shape_of(source)[-1:] != shape_of(node.args[0])[-1:]:
            continue
        with graph.inserting_before(node):
            new = call(graph, aten.linear.default, (source, *node.args[1:]), node)
            back = call(graph, aten.reshape.default, (new, list(shape_of(node))), node)
        node.replace_all_uses_with(back)
        cancel_moves(graph, new)
