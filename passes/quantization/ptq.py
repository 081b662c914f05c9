"""What every quantisation pass does around its own idea: prepare the graph, choose bits, find ranges, write integers.

A pass prepares a copy of the graph (`prepare`), says how many bits each layer's weights and inputs have (`LayerBits`),
observes the ranges of the tensors between layers (`observe`), and hands weights (`WeightRule`) and ranges (`QParams`),
some of which it may have learned, to `convert`, which writes the integer graph. There is one kind of integer graph:
layers of few bits use the operators of int8 layers, with codes from a smaller set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edgec.as_conv2d import as_conv2d
from edgec.data import Dataset
from edgec.passbase import Context
from edgec.passes.keep import check_patterns, fits
from edgec.passes.quantization.annotate import Annotation, annotate, operand_nodes
from edgec.passes.quantization.calibrate import Watcher, batches, calibrate, calibrate_by_gradients
from edgec.passes.quantization.convert import Converter, WeightRule
from edgec.passes.quantization.operators import (
    CONV2D,
    SATURATION,
    Kind,
    conv_geometry,
    make_functional,
    op_name,
    operand,
)
from edgec.passes.quantization.outliers import find_layers, find_outliers, separate
from edgec.program import Program, is_call, layer_of, output_nodes, propagate, shape_of, weight_paths
from edgec.quantparams import (
    ChannelMinMax,
    Hessian,
    MinMax,
    Observer,
    QParams,
    affine,
    affine_channels,
    make_observer,
)
from edgec.sparsity import Carrier

# Samples at a time where gradients are taken, which needs all values of a batch at once.
GRADIENT_BATCH = 16
# Range of a tensor that was zero for every calibration sample.
DEAD_RANGE = (-1.0, 1.0)


@dataclass(frozen=True)
class Prepared:
    """A copy of a Program's graph that is about to be quantised, what will be integer in it, and its masks."""

    program: Program
    module: fx.GraphModule
    annotation: Annotation
    masks: Carrier

    @property
    def layers(self) -> list[fx.Node]:
        """The convolutions and linear layers that become integer, in graph order."""
        return [n for n in self.module.graph.nodes if self.annotation.kinds.get(n) is Kind.LAYER]


def prepare(
    program: Program,
    context: Context,
    samples: Dataset,
    *,
    keep_float: tuple[str, ...] = (),
    nonlinear: str = "auto",
    outliers: bool = True,
    where: str = "",
) -> Prepared:
    """Bring a copy of the graph into the form that is quantised and annotate it; what stays float is reported.

    where: the option's name for errors about `keep_float`. Raises EdgecError for a pattern that fits no layer.
    """
    module, masks = editable(program)
    as_conv2d(module, masks)
    check_patterns(module, keep_float, where)

    def keeps(layer: str) -> bool:
        return fits(layer, keep_float)

    apart = outliers and nonlinear != "integer"
    held = _separate_outliers(program, module, samples, keeps, masks) if apart else {}
    annotation = annotate(module, keeps, nonlinear, held)
    for skip in annotation.skipped:
        context.skip(*skip)
    return Prepared(program, module, annotation, masks)


def editable(program: Program) -> tuple[fx.GraphModule, Carrier]:
    """(a copy of the graph without dead nodes and calls that work in place, the Program's masks)."""
    module = program.edit()
    module.graph.eliminate_dead_code()
    make_functional(module)
    return module, Carrier(program.annotations)


def _separate_outliers(
    program: Program, module: fx.GraphModule, samples: Dataset, keeps: Callable[[str], bool], masks: Carrier
) -> dict[fx.Node, str]:
    """Rewrite the layers whose input has outlier channels; returns the layers that stay float, and why."""
    layers = {n: ChannelMinMax(-1) for n in find_layers(module) if not keeps(layer_of(n))}
    if not layers:
        return {}
    calibrate(module, batches(program, samples), {operand(n): [seen] for n, seen in layers.items()})
    held = {}
    for layer, seen in layers.items():
        found = find_outliers(seen)
        if found is not None:
            reason = (
                f"multiplies {len(found.channels)} of {len(seen)} input channels in float: they reach "
                f"{found.reach:.3g}, the others {found.rest:.3g}"
            )
            held[separate(module, layer, found.channels, masks)] = reason
            # The next layer may read what this one made.
            propagate(module, program.example_inputs)
    return held


# -- bits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerBits:
    """Bits, 2..8, of a layer's weights and of the tensor that it reads."""

    weights: int = 8
    activations: int = 8


Bits = Mapping[fx.Node, LayerBits]


def uniform_bits(
    prepared: Prepared, weights: int, activations: int, *, edges: int = 8, depthwise: int = 8
) -> dict[fx.Node, LayerBits]:
    """The same bits for every layer but the first and last ones (`edges`) and depthwise convolutions (`depthwise`)."""
    outer = edge_layers(prepared)
    found = {}
    for layer in prepared.layers:
        least = max(edges if layer in outer else 0, depthwise if is_depthwise(layer) else 0)
        found[layer] = LayerBits(max(weights, least), max(activations, least))
    return found


def edge_layers(prepared: Prepared) -> set[fx.Node]:
    """The layers that no other layer comes before, or none after."""
    layers = set(prepared.layers)
    nodes = list(prepared.module.graph.nodes)
    return (layers - _reached(layers, nodes, lambda n: n.users)) | (
        layers - _reached(layers, reversed(nodes), lambda n: n.all_input_nodes)
    )


def _reached(
    layers: set[fx.Node], nodes: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """The nodes that a path from a layer leads to; `nodes` in the order of the paths."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node in layers or node in found:
            found.update(following(node))
    return found


def is_depthwise(layer: fx.Node) -> bool:
    """True for a convolution of one input channel per group, if there are several."""
    if not is_call(layer, *CONV2D):
        return False
    return conv_geometry(layer)[3] > 1 and shape_of(layer.args[1])[1] == 1  # type: ignore[arg-type]


def activation_bits(prepared: Prepared, bits: Bits) -> dict[fx.Node, int]:
    """Bits of each tensor of `Annotation.ranged`: the most that a layer reading it asks for, 8 where none reads it.

    So what flows from a convolution into a residual sum has 8 bits, and the sum as many as the next layer wants.
    """
    annotation = prepared.annotation
    found: dict[fx.Node, int] = {}
    for layer in prepared.layers:
        source = annotation.observed(operand_nodes(layer)[0])
        found[source] = max(found.get(source, 0), bits[layer].activations)
    return {node: found.get(node, 8) for node in annotation.ranged(prepared.module.graph)}


# -- ranges ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RangeFinder:
    """How ranges of activations are found: one of OBSERVERS, and the share of values (%) that "percentile" keeps."""

    observer: str = "mse"
    percentile: float = 99.99


def observe(
    prepared: Prepared,
    samples: Dataset,
    context: Context,
    finder: RangeFinder,
    bits: Mapping[fx.Node, int] | None = None,
) -> dict[fx.Node, QParams]:
    """Run the float graph on the samples; the parameters of every tensor whose range matters, in as many bits as
    `bits` says, else 8.
    """
    program, module, annotation = prepared.program, prepared.module, prepared.annotation
    count = bits or {}
    exact = set(output_nodes(module))
    observers: dict[fx.Node, Observer] = {}
    channels: dict[fx.Node, ChannelMinMax] = {}
    for node in annotation.ranged(module.graph):
        axis = annotation.channel_axis(node)
        if axis is not None:
            channels[node] = ChannelMinMax(axis)
            continue
        # At 8 bits the extremes of an input cost nothing; with few levels they do.
        plain = node in exact or (node.op == "placeholder" and count.get(node, 8) == 8)
        observer = MinMax() if plain else make_observer(finder.observer, finder.percentile, count.get(node, 8))
        limits = _useful_range(node, annotation)
        observers[node] = observer if limits is None else _Saturating(observer, *limits)
    watched: dict[fx.Node, list[Watcher]] = {n: [o] for n, o in {**observers, **channels}.items()}
    if finder.observer == Hessian.name:
        weighed = {n: o for n, o in observers.items() if isinstance(o, (Hessian, _Saturating)) and o.weighs}
        calibrate_by_gradients(module, batches(program, samples, GRADIENT_BATCH), weighed, context.seed)
        watched = {n: each for n, each in watched.items() if n not in weighed}
    if watched:
        calibrate(module, batches(program, samples), watched)
    found = {node: _params(node, observer, context, count.get(node, 8)) for node, observer in observers.items()}
    for node, extremes in channels.items():
        source = f"{layer_of(node)}: min-max per channel"
        found[node] = affine_channels(*extremes.range(), extremes.axis, source, count.get(node, 8))
    return found


def _params(node: fx.Node, observer: Observer, context: Context, bits: int) -> QParams:
    source = f"{layer_of(node)}: {observer.name}"
    low, high = observer.range()
    if low == high == 0.0:
        context.skip(layer_of(node), op_name(node), "was zero for every calibration sample: its codes carry nothing")
        low, high = DEAD_RANGE
    return affine(low, high, source, bits)


class _Saturating(Observer):
    """Feeds another observer with values limited to where they make a difference."""

    def __init__(self, inner: Observer, low: float, high: float) -> None:
        self.inner, self.low, self.high = inner, low, high
        self.name = inner.name

    @property
    def weighs(self) -> bool:
        """Whether the other observer wants to know how much values matter."""
        return isinstance(self.inner, Hessian)

    def update(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        inside = values.clamp(self.low, self.high)
        if weights is None:
            self.inner.update(inside)
        else:
            assert isinstance(self.inner, Hessian)
            self.inner.update(inside, weights)

    def range(self) -> tuple[float, float]:
        return self.inner.range()


def _useful_range(node: fx.Node, annotation: Annotation) -> tuple[float, float] | None:
    """The inputs that its only reader tells apart, if that is a saturating function."""
    readers = list(node.users)
    if len(readers) == 1 and annotation.kinds.get(readers[0]) is Kind.TABLE:
        return SATURATION.get(readers[0].target)
    return None


# -- integers ----------------------------------------------------------------------------------------------------------


def choose_requant(requant: str, context: Context) -> str:
    """RQ1 or RQF for an option that may say auto: as is fastest on the target."""
    if requant != "auto":
        return requant
    return "RQ1" if context.device is None else context.device.requant


@dataclass
class Integers:
    """The integer graph on its way to a Program. records: QParams by name; layers: integer layer -> its float layer."""

    prepared: Prepared
    records: dict[str, QParams]
    layers: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def finish(self, annotations: Mapping[str, Any]) -> Program:
        """The Program, verified, with the records and `annotations` of the pass; those of gone nodes are dropped."""
        program, module = self.prepared.program, self.prepared.module
        names = {str(n.target) if n.op == "get_attr" else n.name for n in module.graph.nodes}
        kept = {k: v for k, v in {**program.annotations, **self.records}.items() if k in names}
        kept = self.prepared.masks.annotations(kept, weight_paths(module))
        return program.replace(module, {**kept, **annotations})


def convert(
    prepared: Prepared,
    observed: Mapping[fx.Node, QParams],
    rule: Callable[[fx.Node], WeightRule],
    requant: str,
) -> Integers:
    """Rewrite the prepared graph, in place, with integer operators; see `Converter`."""
    converter = Converter(prepared.module, prepared.annotation, observed, rule, requant, prepared.masks)
    records = converter.convert()
    prepared.module.graph.eliminate_dead_code()
    return Integers(prepared, records, converter.layers)
