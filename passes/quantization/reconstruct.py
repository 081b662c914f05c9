"""Post-training quantisation to few bits: rounding and step sizes learned block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.integer import REQUANTS
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.keep import layer_names
from edgec.passes.quantization.calibrate import batches
from edgec.passes.quantization.convert import WeightRule
from edgec.passes.quantization.fakequant import (
    ActivationQuantizer,
    FakeQuantGraph,
    FixedWeight,
    Rounder,
    RoundingWeight,
    Values,
    WeightQuantizer,
    rounded,
)
from edgec.passes.quantization.operators import NONLINEAR, arguments
from edgec.passes.quantization.ptq import (
    Bits,
    LayerBits,
    Prepared,
    RangeFinder,
    activation_bits,
    choose_requant,
    convert,
    observe,
    prepare,
    uniform_bits,
)
from edgec.passes.quantization.units import GRANULARITY, Unit, find_units
from edgec.program import Program, get_weight, layer_of
from edgec.quantparams import mse_scales, quantize_weights, symmetric_scales

Weight = TypeVar("Weight", bound=WeightQuantizer)

METHODS = ("learned", "mse", "minmax")
# Iterations at most, for each sample: more would fit the samples and not the model.
STEPS_PER_SAMPLE = 1
# Share of the iterations before the penalty on undecided weights starts, and its exponent at the start and the end.
WARM_UP = 0.2
BETA = (20.0, 2.0)
# Learning rate of activation steps, as a share of the step.
STEP_RATE = 2e-3


@dataclass(frozen=True)
class UnitReport:
    """Mean squared error at the output of one unit, on all samples: rounded to nearest, and as learned.

    undecided: mean distance of the soft rounding from 0 or 1 at the end, 0..0.5. kept: False when the learned one was
    not better and nearest rounding stayed.
    """

    name: str
    layers: tuple[str, ...]
    nearest: float
    learned: float
    undecided: float
    kept: bool


@dataclass(frozen=True)
class LowBitSummary:
    """What a low-bit pass did. bits: (weights, input) by layer; units: only where rounding was learned."""

    method: str
    samples: int
    bits: Mapping[str, tuple[int, int]]
    units: tuple[UnitReport, ...] = ()


@dataclass(frozen=True)
class Learning:
    """How rounding is learned; the options of `reconstruct` of the same names."""

    granularity: str = "block"
    steps: int = 500
    batch: int = 32
    lr: float = 0.01
    regularise: float = 0.01
    drop: float = 0.5
    full_range: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Learn, on a few hundred unlabelled samples, which weights to round up, so that each block gives what it gave.

    Blocks are taken in order. A block reads what the quantised part before it computes, and its output is compared with
    the float block's: the loss is the squared error, plus a term that drives every weight to one of its two neighbours.
    Steps of activations of fewer than 8 bits are learned with it. Each activation value is rounded with probability
    `drop` only, and otherwise float, which keeps blocks from fitting the rounding of the samples (QDrop); 1 is plain
    reconstruction (BRECQ). What no iteration improves stays rounded to nearest and is reported. Weights have one scale
    per output channel, of least squared error. Run `fold-bn` first.

    First and last layers and depthwise convolutions have 8 bits; the sum of a residual block reads 8-bit codes.

    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization"; Li et al., "BRECQ: Pushing the Limit
    of Post-Training Quantization by Block Reconstruction"; Wei et al., "QDrop: Randomly Dropping Quantization for
    Extremely Low-bit Post-Training Quantization"; Esser et al., "Learned Step Size Quantization".
    """

    name: ClassVar[str] = "reconstruct"
    needs: ClassVar[Needs] = Needs.CALIBRATION
    faithful: ClassVar[bool] = False

    weights: int = option(4, "bits of weights", low=2, high=8)
    activations: int = option(4, "bits of what layers read", low=2, high=8)
    edges: int = option(8, "at least so many bits for the first and last layers", low=2, high=8)
    depthwise: int = option(8, "at least so many bits for depthwise convolutions", low=2, high=8)
    method: str = option(
        "learned",
        "learned rounding and steps; or nearest rounding, with ranges of least squared error or of the extremes",
        choices=METHODS,
    )
    granularity: str = option("block", "what is learned together", choices=GRANULARITY)
    steps: int = option(500, "iterations for each block, at most one for each sample", low=1)
    samples: int = option(512, "at most this many samples are used", low=1)
    batch: int = option(32, "samples in an iteration", low=1)
    lr: float = option(0.01, "learning rate of the rounding (Adam); the published 20,000 iterations use 0.001", low=0)
    regularise: float = option(0.01, "weight of the term that decides roundings; 0.1 with depthwise layers", low=0)
    drop: float = option(0.5, "probability that an activation value is rounded while learning", low=0, high=1)
    full_range: bool = option(False, "use the code -2^(bits-1) of weights too")
    requant: str = option("auto", "see quantize-int8", choices=("auto", *REQUANTS))
    nonlinear: str = option("auto", "see quantize-int8", choices=NONLINEAR)
    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep_float", layer_names(self.keep_float, f"{self.name}{{keep_float}}"))

    def run(self, program: Program, context: Context) -> Program:
        """Returns the integer Program; annotation `reconstruct` holds a LowBitSummary.

        Raises EdgecError when there is no data, or a loss is not finite.
        """
        samples = context.training_data(self).limit(self.samples, context.seed)
        prepared = prepare(
            program,
            context,
            samples,
            keep_float=self.keep_float,
            nonlinear=self.nonlinear,
            where=f"{self.name}{{keep_float}}",
        )
        if not prepared.layers:
            return program
        bits = uniform_bits(prepared, self.weights, self.activations, edges=self.edges, depthwise=self.depthwise)
        learning = Learning(
            self.granularity,
            self.steps,
            self.batch,
            self.lr,
            self.regularise,
            self.drop,
            self.full_range,
            context.seed,
        )
        return quantise(prepared, samples, context, self.name, bits, self.method, learning, self.requant)

    def weaken(self, amount: float) -> Reconstruct | None:
        """More bits: 8 for both at 0."""
        weights, activations = (round(8 - amount * (8 - b)) for b in (self.weights, self.activations))
        return dataclasses.replace(self, weights=weights, activations=activations)


def quantise(
    prepared: Prepared,
    samples: Dataset,
    context: Context,
    name: str,
    bits: Bits,
    method: str = "learned",
    learning: Learning = Learning(),
    requant: str = "auto",
) -> Program:
    """The integer Program of a prepared graph with these bits, by one of METHODS, annotated under `name`."""
    observer = "min-max" if method == "minmax" else "mse"
    observed = observe(prepared, samples, context, RangeFinder(observer), activation_bits(prepared, bits))
    full = learning.full_range
    summary = LowBitSummary(method, len(samples), {layer_of(n): (b.weights, b.activations) for n, b in bits.items()})
    if method == "minmax":
        integers = convert(prepared, observed, lambda n: minmax_rule(bits[n], full), choose_requant(requant, context))
        return integers.finish({name: summary})
    if method == "learned":
        weights = {n: make_weight(RoundingWeight, prepared, n, bits[n], full) for n in prepared.layers}
        graph = FakeQuantGraph(prepared, observed, weights)
        reports = Learner(prepared, graph, samples, context, learning).learn_all()
        summary = LowBitSummary(method, len(samples), summary.bits, tuple(reports))
        observed = graph.results()
        decided: Mapping[fx.Node, WeightQuantizer] = graph.weights
    else:
        decided = {n: make_weight(WeightQuantizer, prepared, n, bits[n], full) for n in prepared.layers}
    integers = convert(prepared, observed, lambda n: given_rule(decided[n]), choose_requant(requant, context))
    return integers.finish({name: summary})


# -- weights -----------------------------------------------------------------------------------------------------------


def minmax_rule(bits: LayerBits, full: bool = False) -> WeightRule:
    """Nearest rounding with scales that reach the largest weight of each channel: the baseline."""
    return WeightRule(
        lambda w: symmetric_scales(w, True, bits.weights),
        lambda w, scales: quantize_weights(w, scales, bits.weights, full),
        bits.weights,
        full,
        "max|w|",
    )


def given_rule(weight: WeightQuantizer) -> WeightRule:
    """The codes and scales of a quantizer. Channels whose scale has to change for their bias are rounded to nearest."""

    def rounding(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        same = (scales == weight.scales()).reshape(-1, *[1] * (weights.ndim - 1))
        nearest = quantize_weights(weight.weight.detach().numpy(), scales, weight.bits, weight.full)
        return np.where(same, weight.codes(), nearest)

    source = {FixedWeight: "learned rounding", WeightQuantizer: "mse"}.get(type(weight), "learned steps")
    return WeightRule(lambda _: weight.scales(), rounding, weight.bits, weight.full, source)


def make_weight(kind: type[Weight], prepared: Prepared, layer: fx.Node, bits: LayerBits, full: bool = False) -> Weight:
    """A quantizer of a layer's weights with scales of least squared error; pruned elements stay zero."""
    stored = arguments(layer)["weight"]
    weight = get_weight(prepared.module, stored)
    record = prepared.masks.records.get(str(stored.target))
    mask = None if record is None else record.mask
    return kind(weight, mse_scales(weight.numpy(), True, bits.weights, full), bits.weights, full, mask)


# -- learning ----------------------------------------------------------------------------------------------------------


def dropping(probability: float, generator: torch.Generator) -> Rounder:
    """Round each element with this probability, else leave it."""

    def rounder(value: torch.Tensor, quantizer: ActivationQuantizer) -> torch.Tensor:
        return torch.lerp(value, quantizer(value), _chosen(value, probability, generator))

    return rounder


def _chosen(like: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """1.0 for each element with this probability, rounded to 1/256, else 0.0; `lerp` with it takes values unchanged."""
    count = like.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int32).random_(-(1 << 31), (1 << 31) - 1, generator=generator)
    below = words.view(torch.uint8)[:count].to(torch.int16) < round(256 * probability)
    return below.view(like.shape).to(like.dtype)


class Learner:
    """Reconstructs the units of a graph in order. Each unit's inputs, in float and as the quantised part before it
    computes them, are kept for all samples.
    """

    def __init__(
        self, prepared: Prepared, graph: FakeQuantGraph, samples: Dataset, context: Context, learning: Learning
    ) -> None:
        self.graph, self.context, self.learning = graph, context, learning
        self.units = find_units(prepared, learning.granularity)
        chunks = list(batches(prepared.program, samples, learning.batch))
        if len(chunks) > 1 and len(chunks[-1][0]) < len(chunks[0][0]):
            chunks.pop()
        self.samples = sum(len(c[0]) for c in chunks)
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.exact: list[Values] = [dict(zip(inputs, chunk, strict=True)) for chunk in chunks]
        self.coded: list[Values] = [dict(values) for values in self.exact]
        self.finished: set[ActivationQuantizer] = set()

    def learn_all(self) -> list[UnitReport]:
        """Learn unit by unit; afterwards the graph's weights are decided and its activation steps are final."""
        reports = []
        for index, unit in enumerate(self.units):
            self._advance(self.exact, unit, quantised=False)
            if unit.layers:
                report = self._learn(unit, index)
                reports.append(report)
                self.context.log(f"{report.name}: error {report.nearest:.4g} nearest, {report.learned:.4g} learned")
                if not report.kept:
                    reason = f"error {report.learned:.3g} is not below that of nearest rounding, {report.nearest:.3g}"
                    self.context.skip(report.name, "learned rounding", reason)
            self._advance(self.coded, unit, quantised=True)
            self._forget(index)
        return reports

    def _advance(self, chunks: list[Values], unit: Unit, quantised: bool) -> None:
        with torch.no_grad():
            for values in chunks:
                made = {n: values[n] for n in unit.inputs}
                self.graph.run(unit.nodes, made, quantised=quantised)
                values.update({n: made[n] for n in unit.outputs})

    def _forget(self, index: int) -> None:
        """Drop what no later unit reads."""
        needed = {n for unit in self.units[index + 1 :] for n in unit.inputs}
        for values in (*self.exact, *self.coded):
            for node in [n for n in values if n not in needed]:
                del values[node]

    def _learn(self, unit: Unit, index: int) -> UnitReport:
        weights = [self.graph.weights[n] for n in unit.layers]
        soft = [w for w in weights if isinstance(w, RoundingWeight)]
        quantizers = self._quantizers(unit)
        plain = [FixedWeight(w, WeightQuantizer.codes(w)) for w in weights]
        nearest = self._error(unit, plain)
        self._set(unit, weights)
        self._optimise(unit, soft, quantizers, 1000 * self.learning.seed + index)
        undecided = sum(w.undecided() for w in soft) / len(soft)
        learned = self._error(unit, [FixedWeight(w, w.codes()) for w in weights])
        kept = learned < nearest
        if not kept:
            self._set(unit, plain)
            for quantizer in quantizers:
                quantizer.reset()
        self.finished.update(quantizers)
        return UnitReport(unit.name, tuple(layer_of(n) for n in unit.layers), nearest, learned, undecided, kept)

    def _optimise(
        self, unit: Unit, weights: list[RoundingWeight], quantizers: list[ActivationQuantizer], seed: int
    ) -> None:
        learning = self.learning
        steps = min(learning.steps, STEPS_PER_SAMPLE * self.samples)
        for quantizer in quantizers:
            quantizer.learn(True)
        optimizers = [torch.optim.Adam([w.v for w in weights], lr=learning.lr)]
        schedules = []
        if quantizers:
            optimizers.append(torch.optim.Adam([q.factor for q in quantizers], lr=STEP_RATE))
            schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[1], steps))
        picks, drops = (torch.Generator().manual_seed(s) for s in (seed, seed + 500))
        rounder = rounded if learning.drop == 1 else dropping(learning.drop, drops)
        data = _Batches(unit, self.exact, self.coded)
        for step in range(steps):
            exact, values, targets = data.draw(picks)
            if learning.drop < 1:
                values = _mixed(exact, values, learning.drop, drops)
            self.graph.run(unit.nodes, values, rounder=rounder)
            loss = distance(values, targets)
            progress = (step / steps - WARM_UP) / (1 - WARM_UP)
            if progress > 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * progress
                loss = loss + learning.regularise * torch.stack([w.penalty(beta) for w in weights]).sum()
            if not bool(torch.isfinite(loss)):
                raise EdgecError(f"loss is not finite in iteration {step}", where=unit.name, hint="use a smaller lr")
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for stepper in (*optimizers, *schedules):
                stepper.step()
        for quantizer in quantizers:
            quantizer.learn(False)

    def _quantizers(self, unit: Unit) -> list[ActivationQuantizer]:
        """The activation steps that are learned with a unit: of few bits, and not learned before."""
        graph = self.graph
        found = dict.fromkeys(graph.on_result[n] for n in unit.nodes if n in graph.on_result)
        found |= dict.fromkeys(graph.on_read[s] for n in unit.nodes for s in graph.reads(n))
        return [q for q in found if q.params.bits < 8 and q not in self.finished]

    def _set(self, unit: Unit, weights: Sequence[WeightQuantizer]) -> None:
        self.graph.weights.update(zip(unit.layers, weights, strict=True))

    def _error(self, unit: Unit, weights: Sequence[WeightQuantizer]) -> float:
        """Mean error of the unit on all samples, everything rounded; it keeps these weights."""
        self._set(unit, weights)
        total = 0.0
        with torch.no_grad():
            for exact, coded in zip(self.exact, self.coded, strict=True):
                values = {n: coded[n] for n in unit.inputs}
                self.graph.run(unit.nodes, values)
                total += float(distance(values, {n: exact[n] for n in unit.outputs}))
        return total / len(self.exact)


def distance(values: Values, targets: Values) -> torch.Tensor:
    """Squared error, summed over channels (axis 1 of images, else the last) and averaged over the rest, summed over
    all float tensors of `targets`.
    """
    parts = []
    for node, want in targets.items():
        if isinstance(want, torch.Tensor) and want.dtype.is_floating_point:
            channels = 1 if want.dim() == 4 else -1
            parts.append(F.mse_loss(values[node], want) * (want.shape[channels] if want.dim() else 1))
    return torch.stack(parts).sum()


def _mixed(exact: Values, coded: Values, probability: float, generator: torch.Generator) -> Values:
    """Each element of a unit's inputs from the quantised part with this probability, else from the float one."""
    result = {}
    for node, value in coded.items():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            value = torch.lerp(exact[node], value, _chosen(value, probability, generator))
        result[node] = value
    return result


class _Batches:
    """Draws batches of a unit's inputs and targets: any samples where all tensors have one row per sample, else one of
    the batches that were computed.
    """

    def __init__(self, unit: Unit, exact: Sequence[Values], coded: Sequence[Values]) -> None:
        sources = ((exact, unit.inputs), (coded, unit.inputs), (exact, unit.outputs))
        self.chunks = [[{n: c[n] for n in nodes} for c in chunks] for chunks, nodes in sources]
        values = [v for part in self.chunks for chunk in part for v in chunk.values()]
        self.rows = {len(v) if isinstance(v, torch.Tensor) and v.dim() else 0 for v in values}
        self.joined: list[Values] | None = None
        if len(self.rows) == 1 and 0 not in self.rows:
            self.joined = [{n: torch.cat([c[n] for c in part]) for n in part[0]} for part in self.chunks]

    def draw(self, generator: torch.Generator) -> tuple[Values, Values, Values]:
        """(inputs of the float graph, inputs of the quantised one, outputs of the float graph) of one batch."""
        if self.joined is None:
            index = int(torch.randint(len(self.chunks[0]), (), generator=generator))
            exact, coded, targets = (dict(part[index]) for part in self.chunks)
            return exact, coded, targets
        (rows,) = self.rows
        total = rows * len(self.chunks[0])
        chosen = torch.randperm(total, generator=generator)[:rows]
        exact, coded, targets = ({n: v[chosen] for n, v in part.items()} for part in self.joined)
        return exact, coded, targets
