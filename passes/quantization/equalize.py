"""Cross-layer equalisation: share out the weight range of consecutive layers channel by channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgec.passbase import Context, Pass
from edgec.passes.quantization.operators import (
    CLIPS,
    CONV2D,
    IDENTITIES,
    LAYERS,
    arguments,
    aten,
    clip_limits,
    make_functional,
    op_name,
    operand,
    owns_weights,
    spatial_padding,
    weight_readers,
)
from edgec.program import Program, constant_of, is_call, layer_of, origin_of, shape_of

SWEEPS = 40
CONVERGED = 1e-3

Report = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale channels between consecutive layers so that both use their weight range evenly; the function is unchanged.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction". For two layers joined by an
    activation with f(s x) = s f(x), channel i of the first is divided by s_i = sqrt(r1_i / r2_i) and that of the second
    multiplied, r being the largest weight of the channel. Helps per-tensor weights; per-channel int8 rarely needs it.
    Run `fold-bn` first.
    """

    name: ClassVar[str] = "equalize"

    def run(self, program: Program, context: Context) -> Program:
        module = program.edit()
        module.graph.eliminate_dead_code()
        make_functional(module)
        equalize_module(module, context.skip)
        return program.replace(module)


@dataclass(frozen=True)
class Pair:
    """Two layers where channel i of `first` is read by nothing but channel i of `second`.

    Behind a flatten, several inputs of `second` in a row belong to one channel.
    """

    first: fx.Node
    second: fx.Node


def equalize_module(module: fx.GraphModule, report: Report) -> list[Pair]:
    """Equalise all pairs of a graph, in place, until no factor moves by more than 1e-3, 40 sweeps at most.

    report(layer, operator, reason) is told about layers that are joined by something that does not let factors through.
    """
    pairs = list(find_pairs(module, report))
    for pair in pairs:
        # What flows between the two layers is scaled: it no longer stands for a value of the original.
        for node in _between(pair):
            node.meta["edgec_origin"] = f"{origin_of(node)}, equalised"
    for _ in range(SWEEPS):
        if not max((_equalize(module, pair) for pair in pairs), default=0.0) > CONVERGED:
            break
    return pairs


def find_pairs(module: fx.GraphModule, report: Report) -> Iterator[Pair]:
    """The pairs of layers that can be equalised, in graph order."""
    readers = weight_readers(module)
    for first in module.graph.nodes:
        if not is_call(first, *LAYERS) or not owns_weights(module, first, readers):
            continue
        if is_call(first, aten.linear.default) and len(shape_of(first)) != 2:
            continue
        found = _follow(first)
        if isinstance(found, Pair) and owns_weights(module, found.second, readers):
            yield found
        elif isinstance(found, str):
            report(layer_of(first), "equalize", found)


def _follow(first: fx.Node) -> Pair | str | None:
    """The pair that starts at `first`; a reason when a clip stands in between; None when nothing joins two layers."""
    node = first
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_call(user, *LAYERS):
            return Pair(first, user) if arguments(user)["input"] is node else None
        if is_call(user, *CLIPS) and clip_limits(user) != (0.0, float("inf")):
            return f"{op_name(user)} does not let a factor through"
        if not _lets_factors_through(user):
            return None
        node = user
    return None


def _lets_factors_through(node: fx.Node) -> bool:
    """True for f with f(s x) = s f(x), s > 0 per channel."""
    if is_call(node, *CLIPS, *IDENTITIES, aten.leaky_relu.default, aten.prelu.default):
        return True
    if is_call(node, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default):
        return True
    if is_call(node, aten.flatten.using_ints):
        return arguments(node)["start_dim"] == 1 and len(shape_of(node)) == 2
    if is_call(node, aten.mean.dim):
        rank = len(shape_of(operand(node)))
        return rank == 4 and sorted(d % rank for d in arguments(node)["dim"]) == [2, 3]
    return spatial_padding(node) is not None


def _between(pair: Pair) -> Iterator[fx.Node]:
    """The first layer and everything up to the second one."""
    node = pair.first
    while node is not pair.second:
        yield node
        node = next(iter(node.users))


def _equalize(module: fx.GraphModule, pair: Pair) -> float:
    """One step for one pair; returns how far the largest factor is from 1."""
    given, following = arguments(pair.first), arguments(pair.second)
    first, second = _stored(module, given["weight"]), _stored(module, following["weight"])
    groups = int(following["groups"]) if is_call(pair.second, *CONV2D) else 1
    channels = first.shape[0]
    # Inputs of the second layer by channel: [group, out, channel in group, everything else].
    view = second.view(groups, second.shape[0] // groups, channels // groups, -1)
    r1 = first.flatten(1).abs().amax(1)
    r2 = view.abs().amax((1, 3)).flatten()
    scale = torch.where((r1 > 0) & (r2 > 0), torch.sqrt(r1.double() / r2.double()), 1.0)
    factor = scale.to(torch.float32)
    first.div_(factor.view(-1, *[1] * (first.dim() - 1)))
    if given["bias"] is not None:
        _stored(module, given["bias"]).div_(factor)
    view.mul_(factor.view(groups, 1, -1, 1))
    return float((scale - 1).abs().max())


def _stored(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    tensor = constant_of(module, node)
    assert tensor is not None
    return tensor
