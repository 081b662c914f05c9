"""Find the places where a vision transformer can lose tokens: its global self-attentions, in the exported graph.

Nothing is known about classes or names. An attention is one call of scaled_dot_product_attention (products and a
softmax are rewritten to it first); a *site* is the residual addition behind it; the axis of tokens is followed from
there to what reads it. What cannot be followed is refused, with the reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edgec.lowering.attention import softmax_attention
from edgec.lowering.graph import argument, call, is_move
from edgec.passbase import Context
from edgec.passes.tokens.axes import (
    NORMS,
    SDPA,
    SOFTMAXES,
    Opaque,
    aligned,
    is_pointwise,
    part_shape,
    tensors_of,
    through,
)
from edgec.program import is_call, layer_of, origin_of, propagate, shape_of, weight_node

aten = torch.ops.aten

WHAT = "tokens not reduced"
# Operators that only token passes emit.
TOKEN_OPERATORS = ("edgec::tome_merge", "edgec::token_reduce", "edgec::token_keep")


@dataclass(frozen=True)
class Tag:
    """Where a tensor has its tokens: on `axis`, those from `start` on."""

    axis: int
    start: int = 0


@dataclass
class Flow:
    """What becomes of the tokens of one tensor.

    tags: every tensor (or tuple of tensors) with a token axis, the start included.
    attentions: those that read the tokens as keys, in graph order. pools: means over tokens.
    rows: 1 + the last prefix token that is selected, 0 when none is. selected: the prefix tokens that are.
    """

    tags: dict[fx.Node, Tag]
    attentions: list[fx.Node] = field(default_factory=list)
    pools: list[fx.Node] = field(default_factory=list)
    selected: set[int] = field(default_factory=set)

    @property
    def rows(self) -> int:
        return max(self.selected, default=-1) + 1


@dataclass(frozen=True, eq=False)
class Site:
    """A residual addition behind a global self-attention, where tokens may be merged or dropped.

    block: 0 for the first site of the model. attention: the scaled_dot_product_attention, its q, k and v
    [B, heads, N, depth]. add: the addition, [B, N, C]. stream: its operand that is not the attention's branch.
    """

    block: int
    layer: str
    attention: fx.Node
    add: fx.Node
    stream: fx.Node
    flow: Flow

    @property
    def tokens(self) -> int:
        return shape_of(self.add)[1]

    @property
    def q(self) -> fx.Node:
        return self.attention.args[0]  # type: ignore[return-value]

    @property
    def k(self) -> fx.Node:
        return self.attention.args[1]  # type: ignore[return-value]

    @property
    def v(self) -> fx.Node:
        return self.attention.args[2]  # type: ignore[return-value]

    @property
    def scale(self) -> float:
        given = self.attention.kwargs.get("scale")
        return shape_of(self.q)[-1] ** -0.5 if given is None else float(given)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A copy of a graph, its attentions rewritten to one form, and the sites found in it, first to last.

    prefix: learned tokens before the patches (class, distillation, registers). distilled: the second of two prefix
    tokens has a head of its own. readout: "class" (prefix tokens are selected), "mean", or "attention".
    """

    module: fx.GraphModule
    sites: tuple[Site, ...]
    prefix: int
    distilled: bool
    readout: str

    @property
    def tokens(self) -> int:
        """Tokens before the first site, prefix included."""
        return self.sites[0].tokens if self.sites else 0


# -- recognition -------------------------------------------------------------------------------------------------------


def find_sites(module: fx.GraphModule, context: Context, inputs: tuple[torch.Tensor, ...], name: str) -> TokenMap:
    """The sites of a graph that is free to change; reports each attention that is not one through `context.skip`."""
    if any(_schema(n) in TOKEN_OPERATORS for n in module.graph.nodes):
        context.skip(name, WHAT, "an earlier pass already reduces tokens")
        return TokenMap(module, (), 0, False, "class")
    canonicalise(module, inputs)
    found: list[Site] = []
    refused: dict[fx.Node, str] = {}
    prefix: int | None = None
    attentions = [n for n in module.graph.nodes if is_call(n, SDPA)]
    other = [n for n in module.graph.nodes if is_call(n, *SOFTMAXES[:2]) and len(shape_of(n)) >= 3]
    for softmax in other:
        context.skip(
            layer_of(softmax), WHAT, "its softmax is in no attention of a known form (talking heads, windows?)"
        )
    if not attentions and not other:
        context.skip(name, WHAT, "it has no attention")
    for attention in attentions:
        try:
            stream, add = _block_of(attention)
            if prefix is None:
                prefix = _prefix(stream)
            flow = follow(add, 1, prefix)
            found.append(Site(len(found), layer_of(attention), attention, add, stream, flow))
        except Opaque as reason:
            refused[attention] = str(reason)
    for attention, reason in refused.items():
        # Class attention and pooling behind the sites only read tokens: nothing was left alone.
        if not any(attention in site.flow.attentions and _asks_less(attention) for site in found):
            context.skip(layer_of(attention), WHAT, reason)
    flow = found[0].flow if found else Flow({})
    distilled = prefix == 2 and 1 in flow.selected
    readout = "mean" if flow.pools else "class" if flow.selected else "attention"
    return TokenMap(module, tuple(found), prefix or 0, distilled, readout)


def _asks_less(attention: fx.Node) -> bool:
    q, k = attention.args[:2]
    return shape_of(q)[2] < shape_of(k)[2]  # type: ignore[arg-type]


def canonicalise(module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
    """Rewrite softmax(scale * q k^T + mask) v to scaled_dot_product_attention, in place."""
    changed = False
    for node in list(module.graph.nodes):
        if not is_call(node, *SOFTMAXES):
            continue
        match = softmax_attention(module, node)
        if match is None or match.group != 1:
            continue
        if not len(shape_of(match.q)) == len(shape_of(match.keys)) == len(shape_of(match.v)) == 4:
            continue
        graph, last = module.graph, match.last
        with graph.inserting_before(last):
            k = call(graph, aten.transpose.int, (match.keys, -2, -1), last) if match.swapped else match.keys
            mask: Any = match.mask
            if match.constant_mask is not None:
                mask = weight_node(module, f"{layer_of(last)}.mask", match.constant_mask.contiguous())
            new = graph.call_function(SDPA, (match.q, k, match.v, mask, 0.0, match.causal), {"scale": match.scale})
        new.meta.update(val=last.meta["val"], edgec_layer=layer_of(last), edgec_origin=origin_of(last))
        last.replace_all_uses_with(new)
        graph.erase_node(last)
        changed = True
    if changed:
        # Dropout may draw random numbers, so to fx it is never dead; outside training it is.
        for node in reversed(list(module.graph.nodes)):
            if is_pointwise(node) and not node.users:
                module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        propagate(module, inputs)


def _schema(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _block_of(attention: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(stream, add) of a global self-attention. Raises Opaque."""
    q, k, v = attention.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    if not len(shape_of(q)) == len(shape_of(k)) == len(shape_of(v)) == 4:
        raise Opaque("queries, keys and values are not [batch, heads, tokens, depth] (windows or joined axes)")
    queries, keys = shape_of(q)[2], shape_of(k)[2]
    if queries < keys:
        raise Opaque("only some tokens ask (class attention or attention pooling)")
    if queries > keys:
        raise Opaque("there are fewer keys than queries (spatial reduction)")
    if argument(attention, 5, "is_causal", False):
        raise Opaque("the attention is causal")
    mask = argument(attention, 3, "attn_mask", None)
    if isinstance(mask, fx.Node) and shape_of(mask)[-1] != 1:
        raise Opaque("a mask or relative position bias has an entry per key, which would have to be gathered")
    add, branch = _residual(attention)
    (stream,) = [a for a in add.args[:2] if a is not branch] or [branch]
    assert isinstance(stream, fx.Node)
    if stream is branch or shape_of(add)[1] != queries:
        raise Opaque("its residual addition does not have one row per query (windows or a grid)")
    if shape_of(add)[0] != shape_of(q)[0]:
        raise Opaque("it runs inside windows, or over another axis joined with the batch")
    if add.meta["val"].dtype != torch.float32:
        raise Opaque(f"activations are {add.meta['val'].dtype}, not float32")
    within = _ancestors(attention)
    flow = follow(stream, 1, 0, within)
    for what, node in (("queries", q), ("keys", k), ("values", v)):
        if flow.tags.get(node) != Tag(2):
            raise Opaque(f"its {what} are not those of the residual stream, token by token")
    return stream, add


def _residual(attention: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(addition, its operand on the attention's side) down the chain of single users. Raises Opaque."""
    node = attention
    while True:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function":
            raise Opaque("its result is read in several places, or returned")
        user = users[0]
        if is_call(user, aten.add.Tensor, aten.add_.Tensor):
            a, b = user.args[:2]
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and shape_of(a) == shape_of(b):
                if len(shape_of(user)) != 3 or user.kwargs.get("alpha", 1) != 1:
                    raise Opaque("its residual addition is not of [batch, tokens, channels]")
                return user, node
        first = user.args[0] if user.args else None
        plain = is_move(user) or is_call(user, aten.linear.default, *NORMS)
        if not (plain and first is node) and not (is_pointwise(user) and _scales(user, node)):
            raise Opaque(f"the operator {user.target} stands between the attention and its residual addition")
        node = user


def _scales(user: fx.Node, node: fx.Node) -> bool:
    """Whether all other operands of a pointwise operator are learned."""
    return all(a is node or is_learned(a) for a in tensors_of(user))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, work = {node}, [node]
    while work:
        for operand in work.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                work.append(operand)
    return found


def is_learned(node: fx.Node) -> bool:
    """Whether a tensor depends on weights and on the size of the batch, but on no input."""
    found, work = {node}, [node]
    while work:
        at = work.pop()
        if at.op == "placeholder":
            return False
        if is_call(at, aten.sym_size.int):
            continue
        for operand in at.all_input_nodes:
            if operand not in found:
                found.add(operand)
                work.append(operand)
    return True


def _prefix(stream: fx.Node) -> int:
    """Learned tokens in front of the patches, from the concatenation that made the residual stream."""
    before = _ancestors(stream)
    shape = shape_of(stream)
    joins = []
    for node in stream.graph.nodes:
        if node not in before or not is_call(node, aten.cat.default) or len(shape_of(node)) != 3:
            continue
        if int(argument(node, 1, "dim", 0)) % 3 == 1 and shape_of(node)[1] == shape[1]:
            joins.append(node)
    if not joins:
        return 0
    operands = list(joins[-1].args[0])
    learned = [is_learned(a) for a in operands]
    if all(learned):
        raise Opaque("all its tokens are learned")
    count = learned.index(False)
    if any(learned[count:]):
        raise Opaque("learned tokens follow the patches")
    # Registers between the class token and the patches: the first operand is the class token, positions added.
    width = [shape_of(a)[1] for a in operands]
    taken = 0 if any(learned[:count]) or len(operands) == 1 else _class_slice(operands)
    return sum(width[:count]) + taken


def _class_slice(operands: list[fx.Node]) -> int:
    """Length of `x[:, :1]` and of what is learned behind it in cat([x[:, :1], registers, x[:, 1:]]), else 0."""
    first, last = operands[0], operands[-1]
    both = is_call(first, aten.slice.Tensor) and is_call(last, aten.slice.Tensor) and first.args[0] is last.args[0]
    if not both or not all(is_learned(a) for a in operands[1:-1]):
        return 0
    rows = shape_of(first)[1]
    if int(argument(last, 2, "start", 0)) != rows or _prefix(first.args[0]) < rows:  # type: ignore[arg-type]
        return 0
    return sum(shape_of(a)[1] for a in operands[:-1])


# -- the axis of tokens ------------------------------------------------------------------------------------------------


def follow(start: fx.Node, axis: int, prefix: int, within: set[fx.Node] | None = None) -> Flow:
    """Follow the tokens of `start` through all that reads them (or through `within` only). Raises Opaque."""
    flow = Flow({start: Tag(axis)})
    seen = False
    for node in start.graph.nodes:
        if node is start:
            seen = True
            continue
        if not seen or (within is not None and node not in within):
            continue
        if not any(operand in flow.tags for operand in node.all_input_nodes):
            continue
        try:
            tag = _step(node, flow, prefix)
        except Opaque as reason:
            raise Opaque(f"{reason} (at '{node.name}' of {layer_of(node)})") from None
        if tag is not None:
            flow.tags[node] = tag
    return flow


def _step(node: fx.Node, flow: Flow, prefix: int) -> Tag | None:
    """The tag of a node of which at least one operand has one; None where tokens end."""
    if node.op == "output":
        raise Opaque("the model returns tokens")
    if is_call(node, SDPA):
        return _attention(node, flow)
    tags = flow.tags
    if is_call(node, aten.sym_size.int):
        if int(node.args[1]) == tags[node.args[0]].axis:  # type: ignore[index, arg-type]
            raise Opaque("the number of tokens is computed with")
        return None
    if is_pointwise(node) and node.target is not operator.getitem:
        return _together(node, tags)
    if is_call(node, aten.cat.default, aten.stack.default):
        operands = list(node.args[0])  # type: ignore[arg-type]
        if any(a not in tags or tags[a] != tags[operands[0]] for a in operands):
            raise Opaque("tokens are concatenated with others")
        return Tag(through(node, tags[operands[0]].axis), tags[operands[0]].start)
    source = node.args[0]
    if source not in tags or any(a in tags for a in node.all_input_nodes if a is not source):
        raise Opaque(f"the operator {node.target} combines tokens in a way that is not known")
    tag = tags[source]  # type: ignore[index]
    rank = len(part_shape(source))  # type: ignore[arg-type]
    if is_call(node, aten.select.int) and int(node.args[1]) % rank == tag.axis:  # type: ignore[arg-type]
        index = int(node.args[2])  # type: ignore[arg-type]
        place = tag.start + (index if index >= 0 else index + part_shape(source)[tag.axis])  # type: ignore[arg-type]
        if place >= prefix:
            raise Opaque(f"patch token {place} is selected")
        flow.selected.add(place)
        return None
    if is_call(node, aten.slice.Tensor) and int(argument(node, 1, "dim", 0)) % rank == tag.axis:
        return _slice(node, tag, flow, prefix)
    if is_call(node, aten.mean.dim) and tag.axis in [int(d) % rank for d in node.args[1] or ()]:  # type: ignore[union-attr]
        if len(node.args[1]) != 1 or tag.start not in (0, prefix):  # type: ignore[arg-type]
            raise Opaque("a mean runs over tokens and another axis")
        flow.pools.append(node)
        return None
    return Tag(through(node, tag.axis), tag.start)


def _together(node: fx.Node, tags: dict[fx.Node, Tag]) -> Tag:
    """A pointwise operator: all operands with a row per token must be tagged, at the same place."""
    rank, found = len(shape_of(node)), set()
    for operand in tensors_of(node):
        if operand in tags:
            found.add(Tag(tags[operand].axis + rank - len(shape_of(operand)), tags[operand].start))
    if len(found) != 1:
        raise Opaque("tensors with different token axes are combined")
    (tag,) = found
    for operand in tensors_of(node):
        if operand not in tags and aligned(node, operand, tag.axis) is not None:
            what = "a learned or constant table" if is_learned(operand) else "a tensor from before the reduction"
            raise Opaque(f"{what} with an entry per token is combined with the tokens, which would need a gather")
    return tag


def _slice(node: fx.Node, tag: Tag, flow: Flow, prefix: int) -> Tag | None:
    length = part_shape(node.args[0])[tag.axis]  # type: ignore[arg-type]
    start, end = (argument(node, 2, "start", None) or 0), argument(node, 3, "end", None)
    end = length if end is None else end
    start, end = (min(x + length if x < 0 else x, length) for x in (start, end))
    if argument(node, 4, "step", 1) != 1:
        raise Opaque("every n-th token is taken")
    if end == length and tag.start + start <= prefix:
        if argument(node, 3, "end", None) not in (None, length) and argument(node, 3, "end", 0) < length:
            raise Opaque("tokens are counted from the end")
        return Tag(tag.axis, tag.start + start)
    if tag.start + end <= prefix:
        flow.selected.update(range(tag.start + start, tag.start + end))
        return None
    raise Opaque("part of the patch tokens is taken")


def _attention(node: fx.Node, flow: Flow) -> Tag | None:
    q, k, v = node.args[:3]
    mask = argument(node, 3, "attn_mask", None)
    given = [flow.tags.get(x) for x in (q, k, v)]  # type: ignore[arg-type]
    rank = len(shape_of(q))  # type: ignore[arg-type]
    if rank != 4 or any(tag not in (None, Tag(2)) for tag in given) or (given[1] is None) != (given[2] is None):
        raise Opaque("an attention runs inside windows, over channels, or over part of the tokens")
    if mask is not None and (mask in flow.tags or shape_of(mask)[-1] != 1):
        raise Opaque("a mask or relative position bias has an entry per key, which would have to be gathered")
    if argument(node, 5, "is_causal", False):
        raise Opaque("an attention is causal")
    if given[1] is None:
        return Tag(2)
    flow.attentions.append(node)
    if given[0] is None and shape_of(q)[2] >= shape_of(k)[2]:  # type: ignore[arg-type]
        raise Opaque("other tokens attend to the reduced ones (cross attention)")
    return given[0]
