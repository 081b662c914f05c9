"""Take the few input channels whose values are far larger than all others out of an int8 matrix product.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale": such channels are multiplied in
float, all others in int8 with a range of their own. Trained transformers have them where one hidden unit of an MLP
carries a constant to the residual stream (Sun et al., "Massive Activations in Large Language Models"): in ViT-Tiny one
of 768 channels reaches 215 where the others end at 8, and one scale for all leaves the others five bits.

The hidden units are computed a second time, on their own, so that everything else stays one kernel; that is cheap
because they are few. The float graph keeps its meaning:

    linear(f(linear(x, w1)), w2) = linear(f(linear(x, w1 without rows c)), w2 without columns c)
                                   + linear(f(linear(x, rows c of w1)), columns c of w2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from edgec.passes.quantization.operators import (
    CLIPS,
    FUNCTIONS,
    IDENTITIES,
    arguments,
    aten,
    clip_limits,
    is_float,
    operand,
    owns_weights,
    weight_readers,
)
from edgec.program import constant_of, is_call, layer_of, origin_of, shape_of, weight_node
from edgec.quantparams import ChannelMinMax
from edgec.sparsity import Carrier

# Channels are taken out if the largest value of the others is smaller by this factor: a bit of precision gained.
GAIN = 2.0
# What is left of a pattern in the few channels that are taken out.
SINGLE = ("unstructured", (1, 1))
# At most one input channel in so many.
RARE = 64


@dataclass(frozen=True)
class Outliers:
    """channels: those that are taken out. reach: their largest |value| in the calibration data; rest: that of the
    others.
    """

    channels: tuple[int, ...]
    reach: float
    rest: float


def find_layers(module: fx.GraphModule) -> list[fx.Node]:
    """The linear layers whose input channels can be taken out: they alone read what linear layers before them compute
    channel by channel.
    """
    readers = weight_readers(module)
    return [
        node
        for node in module.graph.nodes
        if is_call(node, aten.linear.default)
        and owns_weights(module, node, readers)
        and not is_call(node.args[0], aten.linear.default)
        and _by_channel(module, operand(node), readers)
    ]


def find_outliers(seen: ChannelMinMax) -> Outliers | None:
    """The outliers among the channels of a layer's input, by their extremes."""
    low, high = seen.range()
    reach: NDArray[np.float64] = np.maximum(np.abs(low), np.abs(high))
    order = np.argsort(-reach, kind="stable")
    for count in range(1, max(1, len(reach) // RARE) + 1):
        rest = reach[order[count]] if count < len(reach) else 0.0
        if reach[order[0]] >= GAIN * rest > 0.0:
            return Outliers(tuple(sorted(int(c) for c in order[:count])), float(reach[order[0]]), float(rest))
    return None


def separate(
    module: fx.GraphModule, layer: fx.Node, channels: tuple[int, ...], masks: Carrier | None = None
) -> fx.Node:
    """Rewrite a layer of `find_layers`, in place; returns the new float layer that multiplies `channels`.

    New nodes have no meta["val"]: propagate shapes before reading them. Sparsity records of the weights that are split
    in two are split with them, the small part without a pattern.
    """
    graph, index = module.graph, torch.tensor(channels)
    source = operand(layer)
    weight = constant_of(module, layer.args[1])
    assert weight is not None
    user = _sum_behind(layer)
    with graph.inserting_before(layer.next if user is None else user):
        few = _rows(module, source, index, f"{layer_of(layer)}.outliers", masks)
        whole = str(getattr(layer.args[1], "target", ""))
        columns = weight_node(module, f"{whole}_outliers", weight[:, index].contiguous())
        if masks is not None:
            masks.move(whole, str(columns.target), lambda mask: mask[:, index], SINGLE)
        side = graph.call_function(aten.linear.default, (few, columns))
        _describe(side, layer, f"{layer_of(layer)}.outliers", "outliers")
        if user is None:
            total = graph.call_function(aten.add.Tensor, (layer, side))
            total.meta.update(edgec_layer=layer_of(layer), edgec_origin=origin_of(layer))
        else:  # together with the residual, so that either layer adds once
            other = next(a for a in user.args[:2] if a is not layer)
            inner = graph.call_function(aten.add.Tensor, (other, side))
            _describe(inner, user, layer_of(user), "with outliers only")
    if user is None:
        layer.replace_all_uses_with(total, delete_user_cb=lambda reader: reader is not total)
    else:
        user.args = (inner, layer)
    weight[:, index] = 0
    _silence(module, source, index)
    layer.meta["edgec_origin"] = f"{origin_of(layer)}, without outliers"
    return side


def _by_channel(module: fx.GraphModule, node: fx.Node, readers: Mapping[str, int]) -> bool:
    """True when channel c (of the last axis) of `node` depends on row c of linear layers only, and has one reader."""
    if len(node.users) != 1 or not is_float(node):
        return False
    if is_call(node, aten.linear.default):
        return owns_weights(module, node, readers)
    return _operands(node) != [] and all(_by_channel(module, n, readers) for n in _operands(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors of an element-wise call that has nothing per channel of its own, else nothing."""
    if is_call(node, *FUNCTIONS, *IDENTITIES) and not is_call(node, aten.prelu.default):
        return [operand(node)]
    if is_call(node, *CLIPS):
        return [operand(node)] if clip_limits(node) is not None else []
    if is_call(node, aten.mul.Tensor, aten.add.Tensor):
        tensors = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        same = len(set(tensors)) == 2 and all(shape_of(a) == shape_of(node) for a in tensors)
        return tensors if same else []
    return []


def _rows(module: fx.GraphModule, node: fx.Node, index: torch.Tensor, layer: str, masks: Carrier | None) -> fx.Node:
    """The channels `index` of `node`, computed on their own."""
    if is_call(node, aten.linear.default):
        given = arguments(node)
        parts = []
        for stored in (given["weight"], given["bias"]):
            tensor = constant_of(module, stored)
            part = None if tensor is None else weight_node(module, f"{stored.target}_outliers", tensor[index])
            if part is not None and masks is not None:
                masks.move(str(stored.target), str(part.target), lambda mask: mask[index], SINGLE)
            parts.append(part)
        made = module.graph.call_function(aten.linear.default, (given["input"], *parts))
    else:
        few = {n: _rows(module, n, index, layer, masks) for n in _operands(node)}
        made = module.graph.node_copy(node, lambda n: few[n])
    _describe(made, node, layer, "outliers")
    return made


def _silence(module: fx.GraphModule, node: fx.Node, index: torch.Tensor) -> None:
    """Make the channels `index` of `node` those of a zero input, so that they do not widen its range."""
    if is_call(node, aten.linear.default):
        given = arguments(node)
        for stored in (given["weight"], given["bias"]):
            tensor = constant_of(module, stored)
            if tensor is not None:
                tensor[index] = 0
    for source in _operands(node):
        _silence(module, source, index)
    node.meta["edgec_origin"] = f"{origin_of(node)}, without outliers"


def _sum_behind(layer: fx.Node) -> fx.Node | None:
    """The residual addition that alone reads `layer`."""
    users = list(layer.users)
    if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or users[0].kwargs.get("alpha", 1) != 1:
        return None
    others = [a for a in users[0].args[:2] if isinstance(a, fx.Node) and a is not layer]
    fits = len(others) == 1 and is_float(others[0]) and shape_of(others[0]) == shape_of(layer)
    return users[0] if fits else None


def _describe(made: fx.Node, like: fx.Node, layer: str, what: str) -> None:
    made.meta = {"edgec_layer": layer, "edgec_origin": f"{origin_of(like)}, {what}"}
