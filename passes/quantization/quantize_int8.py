"""Post-training int8 quantisation with integer-only arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgec.as_conv2d import as_conv2d
from edgec.data import Dataset
from edgec.integer import REQUANTS
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.keep import check_patterns, fits, layer_names
from edgec.passes.quantization.annotate import Annotation, annotate
from edgec.passes.quantization.bias_correction import correct_biases
from edgec.passes.quantization.calibrate import ChannelMean, Watcher, batches, calibrate
from edgec.passes.quantization.convert import Converter
from edgec.passes.quantization.equalize import equalize_module
from edgec.passes.quantization.operators import CONV2D, NONLINEAR, SATURATION, Kind, make_functional, op_name, operand
from edgec.passes.quantization.outliers import find_layers, find_outliers, separate
from edgec.passes.quantization.squant import squant_codes
from edgec.program import Program, is_call, layer_of, output_nodes, propagate, weight_paths
from edgec.quantparams import (
    OBSERVERS,
    ChannelMinMax,
    MinMax,
    Observer,
    QParams,
    affine,
    affine_channels,
    make_observer,
    quantize_weights,
)
from edgec.sparsity import Carrier

# Range of a tensor that was zero for every calibration sample.
DEAD_RANGE = (-1.0, 1.0)
# Bias correction keeps the tensors between two layers in memory for this many samples.
CORRECTION_SAMPLES = 64


@dataclass(frozen=True)
class Int8Summary:
    """What the pass did: layers (convolutions and linear) by name, and how the ranges were found."""

    observer: str
    samples: int
    quantised: tuple[str, ...]
    kept_float: tuple[str, ...]


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """int8 weights and activations, int32 accumulators, requantisation by one multiplier per channel.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference";
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper".

    Weights are symmetric, per output channel; activations asymmetric, per tensor. Ranges come from one run over the
    calibration samples. Inputs and outputs of the model stay float32. Run `fold-bn` first.
    """

    name: ClassVar[str] = "quantize-int8"
    needs: ClassVar[Needs] = Needs.CALIBRATION

    observer: str = option("mse", "how the range of an activation is chosen", choices=OBSERVERS)
    percentile: float = option(
        99.99, "share of values inside the range, for observer=percentile", unit="%", low=50, high=100
    )
    rounding: str = option(
        "squant",
        "weights to the nearest code, or balanced so that errors cancel (SQuant)",
        choices=("squant", "nearest"),
    )
    per_channel: bool = option(True, "one weight scale per output channel instead of one per layer")
    equalize: bool = option(False, "cross-layer equalisation before calibration")
    bias_correction: bool = option(False, "remove the mean error of every layer on the calibration samples")
    requant: str = option(
        "auto",
        "how layers round: RQ1 with integers, RQF with a float32 product; auto: as is fastest on the target",
        choices=("auto", *REQUANTS),
    )
    nonlinear: str = option(
        "auto",
        "what is computed in float between layers: auto, GELU and SiLU behind linear layers, sums with float operands "
        "and what reaches no layer; integer, as little as possible; float, every curved function",
        choices=NONLINEAR,
    )
    outliers: bool = option(
        True, "multiply hidden channels of an MLP in float if their values are far larger than all others (rare)"
    )
    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")
    calibration_samples: int = option(256, "at most this many calibration samples are used", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep_float", layer_names(self.keep_float, f"{self.name}{{keep_float}}"))

    def run(self, program: Program, context: Context) -> Program:
        samples = context.calibration_data(self).limit(self.calibration_samples, context.seed)
        module = program.edit()
        module.graph.eliminate_dead_code()
        make_functional(module)
        masks = Carrier(program.annotations)
        as_conv2d(module, masks)
        check_patterns(module, self.keep_float, f"{self.name}{{keep_float}}")
        apart = self.outliers and self.nonlinear != "integer"
        held = self._separate_outliers(program, module, samples, masks) if apart else {}
        annotation = annotate(module, self._keeps, self.nonlinear, held)
        for skip in annotation.skipped:
            context.skip(*skip)
        summary = self._summary(module, annotation, len(samples))
        if not summary.quantised:
            return program
        if self.equalize:
            equalize_module(module, context.skip)
        observed = self._observe(program, module, annotation, samples, context)
        subset = samples.limit(CORRECTION_SAMPLES, context.seed)
        means = self._layer_means(program, module, annotation, subset) if self.bias_correction else {}
        rounding = squant_codes if self.rounding == "squant" else quantize_weights
        requant = self.requant
        if requant == "auto":
            requant = "RQ1" if context.device is None else context.device.requant
        converter = Converter(module, annotation, observed, self.per_channel, rounding, requant, masks)
        records = converter.convert()
        module.graph.eliminate_dead_code()
        if means:
            targets = {layer.name: means[node].mean for layer, node in converter.layers.items()}
            correct_biases(module, records, targets, batches(program, subset))
        names = {str(n.target) if n.op == "get_attr" else n.name for n in module.graph.nodes}
        kept = {k: v for k, v in {**program.annotations, **records}.items() if k in names}
        kept = masks.annotations(kept, weight_paths(module))
        return program.replace(module, {**kept, self.name: summary})

    def _separate_outliers(
        self, program: Program, module: fx.GraphModule, samples: Dataset, masks: Carrier
    ) -> dict[fx.Node, str]:
        """Rewrite the layers whose input has outlier channels; returns the layers that stay float, and why."""
        layers = {n: ChannelMinMax(-1) for n in find_layers(module) if not self._keeps(layer_of(n))}
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
        if held:
            propagate(module, program.example_inputs)
        return held

    def _keeps(self, layer: str) -> bool:
        return fits(layer, self.keep_float)

    def _summary(self, module: fx.GraphModule, annotation: Annotation, samples: int) -> Int8Summary:
        quantised = [layer_of(n) for n, kind in annotation.kinds.items() if kind is Kind.LAYER]
        kept = [layer for layer, what, _ in annotation.skipped if what in ("conv2d", "linear")]
        return Int8Summary(self.observer, samples, tuple(quantised), tuple(kept))

    def _observe(
        self,
        program: Program,
        module: fx.GraphModule,
        annotation: Annotation,
        samples: Dataset,
        context: Context,
    ) -> dict[fx.Node, QParams]:
        """Run the calibration samples; the parameters of every tensor whose range matters."""
        exact = set(output_nodes(module))
        observers: dict[fx.Node, Observer] = {}
        channels: dict[fx.Node, ChannelMinMax] = {}
        for node in annotation.ranged(module.graph):
            axis = annotation.channel_axis(node)
            if axis is not None:
                channels[node] = ChannelMinMax(axis)
                continue
            plain = node.op == "placeholder" or node in exact
            observer = MinMax() if plain else make_observer(self.observer, self.percentile)
            limits = _useful_range(node, annotation)
            observers[node] = observer if limits is None else _Saturating(observer, *limits)
        watched: dict[fx.Node, list[Watcher]] = {n: [o] for n, o in {**observers, **channels}.items()}
        calibrate(module, batches(program, samples), watched)
        found = {node: self._params(node, observer, context) for node, observer in observers.items()}
        for node, extremes in channels.items():
            found[node] = affine_channels(*extremes.range(), extremes.axis, f"{layer_of(node)}: min-max per channel")
        return found

    def _layer_means(
        self, program: Program, module: fx.GraphModule, annotation: Annotation, samples: Dataset
    ) -> dict[fx.Node, ChannelMean]:
        """Mean output per channel of every layer that becomes int8, before its clip."""
        layers = [n for n, kind in annotation.kinds.items() if kind is Kind.LAYER]
        means = {n: ChannelMean(1 if is_call(n, *CONV2D) else -1) for n in layers}
        calibrate(module, batches(program, samples), {n: [m] for n, m in means.items()})
        return means

    def _params(self, node: fx.Node, observer: Observer, context: Context) -> QParams:
        source = f"{layer_of(node)}: {observer.name}"
        low, high = observer.range()
        if low == high == 0.0:
            context.skip(
                layer_of(node), op_name(node), "was zero for every calibration sample: its codes carry nothing"
            )
            low, high = DEAD_RANGE
        return affine(low, high, source)


class _Saturating(Observer):
    """Feeds another observer with values limited to where they make a difference."""

    def __init__(self, inner: Observer, low: float, high: float) -> None:
        self.inner, self.low, self.high = inner, low, high
        self.name = inner.name

    def update(self, values: torch.Tensor) -> None:
        self.inner.update(values.clamp(self.low, self.high))

    def range(self) -> tuple[float, float]:
        return self.inner.range()


def _useful_range(node: fx.Node, annotation: Annotation) -> tuple[float, float] | None:
    """The inputs that its only reader tells apart, if that is a saturating function."""
    readers = list(node.users)
    if len(readers) == 1 and annotation.kinds.get(readers[0]) is Kind.TABLE:
        return SATURATION.get(readers[0].target)
    return None
