"""Post-training int8 quantisation with integer-only arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from edgec.data import Dataset
from edgec.integer import REQUANTS
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.keep import layer_names
from edgec.passes.quantization.bias_correction import correct_biases
from edgec.passes.quantization.calibrate import ChannelMean, batches, calibrate
from edgec.passes.quantization.convert import int8_rule
from edgec.passes.quantization.equalize import equalize_module
from edgec.passes.quantization.operators import CONV2D, NONLINEAR
from edgec.passes.quantization.ptq import Prepared, RangeFinder, choose_requant, convert, observe, prepare
from edgec.passes.quantization.squant import squant_codes
from edgec.program import Program, is_call, layer_of
from edgec.quantparams import OBSERVERS, quantize_weights

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
        prepared = prepare(
            program,
            context,
            samples,
            keep_float=self.keep_float,
            nonlinear=self.nonlinear,
            outliers=self.outliers,
            where=f"{self.name}{{keep_float}}",
        )
        summary = self._summary(prepared, len(samples))
        if not summary.quantised:
            return program
        if self.equalize:
            equalize_module(prepared.module, context.skip)
        observed = observe(prepared, samples, context, RangeFinder(self.observer, self.percentile))
        subset = samples.limit(CORRECTION_SAMPLES, context.seed)
        means = self._layer_means(prepared, subset) if self.bias_correction else {}
        rule = int8_rule(self.per_channel, squant_codes if self.rounding == "squant" else quantize_weights)
        integers = convert(prepared, observed, lambda layer: rule, choose_requant(self.requant, context))
        if means:
            targets = {layer.name: means[node].mean for layer, node in integers.layers.items()}
            correct_biases(prepared.module, integers.records, targets, batches(program, subset))
        return integers.finish({self.name: summary})

    def _summary(self, prepared: Prepared, samples: int) -> Int8Summary:
        quantised = tuple(layer_of(n) for n in prepared.layers)
        kept = [layer for layer, what, _ in prepared.annotation.skipped if what in ("conv2d", "linear")]
        return Int8Summary(self.observer, samples, quantised, tuple(kept))

    def _layer_means(self, prepared: Prepared, samples: Dataset) -> dict[fx.Node, ChannelMean]:
        """Mean output per channel of every layer that becomes int8, before its clip."""
        means = {n: ChannelMean(1 if is_call(n, *CONV2D) else -1) for n in prepared.layers}
        calibrate(prepared.module, batches(prepared.program, samples), {n: [m] for n, m in means.items()})
        return means
