"""Bits per layer, by measured sensitivity under a budget."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from edgec.cost import node_macs
from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.integer import REQUANTS
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.keep import layer_names
from edgec.passes.quantization.annotate import operand_nodes
from edgec.passes.quantization.calibrate import batches
from edgec.passes.quantization.fakequant import ActivationQuantizer, FakeQuantGraph, Values, WeightQuantizer
from edgec.passes.quantization.knapsack import Choice, Group, solve
from edgec.passes.quantization.operators import NONLINEAR, arguments
from edgec.passes.quantization.ptq import (
    LayerBits,
    Prepared,
    RangeFinder,
    edge_layers,
    is_depthwise,
    observe,
    prepare,
)
from edgec.passes.quantization.reconstruct import METHODS, Learning, make_weight, quantise
from edgec.passes.quantization.units import GRANULARITY
from edgec.program import Program, get_weight, layer_of, output_nodes, shape_of
from edgec.training import distillation_loss

# Values of the float graph that are kept while sensitivities are measured, in elements.
MEMORY = 1 << 26
# (layer, bits of weights, bits of its input) -> cost; any unit, but the same for all
CostModel = Callable[[fx.Node, int, int], float]


@dataclass(frozen=True)
class MixedSummary:
    """What was chosen and why.

    bits: (weights, input) by layer. weight_loss: divergence of the outputs when only this layer's weights have so many
    bits, by layer; input_loss: when only this layer's input has; KL of the scores for a classifier, else squared error
    relative to the output. predicted: sum of the chosen ones. measured: that of the final integer network, on the same
    samples. spent, budget: in the unit of the cost.
    """

    budget: float
    spent: float
    predicted: float
    measured: float
    bits: Mapping[str, tuple[int, int]]
    weight_loss: Mapping[str, Mapping[int, float]]
    input_loss: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class QuantizeMixed(Pass):
    """Give each layer as many bits as its sensitivity asks for and a budget allows.

    The sensitivity of a layer is how far the outputs move (KL of the scores) when it alone has few bits; the same for
    each tensor that layers read, where several widths of activations are allowed, so that layers which share a tensor
    share its width. A multiple-choice knapsack then minimises the sum. Sums are a guess, since errors of layers do not
    add up: the summary holds the divergence of the final integer network beside it. First and last layers and depthwise
    convolutions keep 8 bits. Rounding is learned as `reconstruct` does. Run `fold-bn` first.

    The budget is one of: `bytes`, of the stored weights; `bitops`, multiply-accumulates times bits of weight times bits
    of activation; `cost`, of a table measured on the target. Each is a share of what the 8-bit network has.

    Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks" (the allocation problem);
    Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework" (KL as sensitivity).
    """

    name: ClassVar[str] = "quantize-mixed"
    needs: ClassVar[Needs] = Needs.CALIBRATION
    faithful: ClassVar[bool] = False

    bytes: float = option(0.5, "weight bytes that may be used; not read where another budget is given", low=0, high=1)
    bitops: float = option(0.0, "MACs x bits x bits that may be used; 0 for no limit", low=0, high=1)
    cost: float = option(0.0, "cost by `table` that may be used; 0 for no limit", low=0, high=1)
    table: str = option(
        "", "JSON file, for cost: layer -> {bits: cost}; bits of weights and input, 4x8, or of weights alone, 4"
    )
    choices: tuple[int, ...] = option((2, 3, 4, 8), "bits of weights to choose from")
    activations: tuple[int, ...] = option((8,), "bits of activations to choose from")
    edges: int = option(8, "at least so many bits for the first and last layers", low=2, high=8)
    depthwise: int = option(8, "at least so many bits for depthwise convolutions", low=2, high=8)
    samples: int = option(512, "at most this many samples give ranges and learned rounding", low=1)
    sensitivity_samples: int = option(256, "at most this many samples measure sensitivities", low=1)
    method: str = option("learned", "see reconstruct", choices=METHODS)
    granularity: str = option("block", "see reconstruct", choices=GRANULARITY)
    steps: int = option(500, "see reconstruct", low=1)
    drop: float = option(0.5, "see reconstruct", low=0, high=1)
    requant: str = option("auto", "see quantize-int8", choices=("auto", *REQUANTS))
    nonlinear: str = option("auto", "see quantize-int8", choices=NONLINEAR)
    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep_float", layer_names(self.keep_float, f"{self.name}{{keep_float}}"))
        for key in ("choices", "activations"):
            values = tuple(sorted(set(getattr(self, key))))
            if not values or values[0] < 2 or values[-1] > 8:
                raise EdgecError(f"{list(values)} are not widths", where=f"{self.name}{{{key}}}", hint="2..8 bits")
            object.__setattr__(self, key, values)
        if self.bitops and self.cost:
            raise EdgecError("two budgets", where=f"{self.name}{{bitops, cost}}", hint="give one of them")

    def run(self, program: Program, context: Context) -> Program:
        """Returns the integer Program; annotation `quantize-mixed` holds a MixedSummary, `reconstruct` a
        LowBitSummary.

        A budget below the least that is allowed is reported and the least is taken. Raises EdgecError for a cost
        without a table, and for a table that lacks a layer.
        """
        if bool(self.cost) != bool(self.table):
            raise EdgecError("cost and table go together", where=f"{self.name}{{cost}}", hint="give both or none")
        samples = context.training_data(self).limit(self.samples, context.seed)
        where = f"{self.name}{{keep_float}}"
        prepared = prepare(program, context, samples, keep_float=self.keep_float, nonlinear=self.nonlinear, where=where)
        if not prepared.layers:
            return program
        model, share, which = self._cost_model(prepared)
        whole = sum(model(n, 8, 8) for n in prepared.layers)
        budget = share * whole
        weights, inputs = self._widths(prepared)
        few = samples.limit(self.sensitivity_samples, context.seed)
        found = measure_sensitivity(prepared, few, context, weights, inputs)
        least = least_cost(found, model)
        if least > budget:
            reason = f"{which}={share:g} cannot be met: with the fewest bits that are allowed it is {least / whole:.3g}"
            context.skip(program.name, self.name, reason)
        bits, predicted = choose_bits(found, model, max(budget, least))
        for layer in prepared.layers:
            context.log(f"{layer_of(layer)}: {bits[layer].weights} bits, input {bits[layer].activations}")
        spent = sum(model(n, b.weights, b.activations) for n, b in bits.items())
        learning = Learning(self.granularity, self.steps, drop=self.drop, seed=context.seed)
        made = quantise(prepared, samples, context, "reconstruct", bits, self.method, learning, self.requant)
        summary = MixedSummary(
            budget,
            spent,
            predicted,
            divergence(program, made, few),
            {layer_of(n): (b.weights, b.activations) for n, b in bits.items()},
            {layer_of(n): losses for n, losses in found.weights.items()},
            {layer_of(n): found.inputs[found.source[n]] for n in found.weights},
        )
        return made.replace(annotations={**made.annotations, self.name: summary})

    def weaken(self, amount: float) -> QuantizeMixed | None:
        """A larger budget: everything at 0."""
        key = "bitops" if self.bitops else "cost" if self.cost else "bytes"
        return dataclasses.replace(self, **{key: 1 - amount * (1 - getattr(self, key))})

    def _widths(self, prepared: Prepared) -> tuple[dict[fx.Node, tuple[int, ...]], dict[fx.Node, tuple[int, ...]]]:
        """The choices for each layer's weights and for its input."""
        outer = edge_layers(prepared)
        weights, inputs = {}, {}
        for layer in prepared.layers:
            least = max(self.edges if layer in outer else 0, self.depthwise if is_depthwise(layer) else 0)
            weights[layer] = tuple(b for b in self.choices if b >= least) or (least,)
            inputs[layer] = tuple(b for b in self.activations if b >= least) or (least,)
        return weights, inputs

    def _cost_model(self, prepared: Prepared) -> tuple[CostModel, float, str]:
        """(cost, share of the 8-bit network's, name of the option)."""
        if self.cost:
            return table_cost(self.table), self.cost, "cost"
        if self.bitops:
            return bit_operations(prepared), self.bitops, "bitops"
        return weight_bytes(prepared), self.bytes, "bytes"


# -- costs -------------------------------------------------------------------------------------------------------------


def weight_bytes(prepared: Prepared) -> CostModel:
    """Bytes of packed weights."""
    return lambda layer, weights, _: math.ceil(_weight(prepared, layer).numel() * weights / 8)


def bit_operations(prepared: Prepared) -> CostModel:
    """Multiply-accumulates of one sample times bits of weights times bits of activations."""
    macs = {n: node_macs(prepared.program, n) for n in prepared.layers}
    return lambda layer, weights, activations: float(macs[layer] * weights * activations)


def table_cost(path: str) -> CostModel:
    """Costs measured on the target, from a JSON file. Raises EdgecError when it cannot be read or lacks an entry."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EdgecError(f"cannot be read: {error}", where=path) from error

    def cost(layer: fx.Node, weights: int, activations: int) -> float:
        row = table.get(layer_of(layer), {}) if isinstance(table, dict) else {}
        for key in (f"{weights}x{activations}", str(weights)):
            if isinstance(row, dict) and isinstance(row.get(key), (int, float)):
                return float(row[key])
        raise EdgecError(f"has no cost of layer '{layer_of(layer)}' with {weights} bits", where=path)

    return cost


def _weight(prepared: Prepared, layer: fx.Node) -> torch.Tensor:
    return get_weight(prepared.module, arguments(layer)["weight"])


# -- sensitivity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """Divergence of the outputs by bits: of each layer's weights, and of each tensor that layers read.

    source: the tensor (`Annotation.observed`) that a layer reads.
    """

    weights: Mapping[fx.Node, Mapping[int, float]]
    inputs: Mapping[fx.Node, Mapping[int, float]]
    source: Mapping[fx.Node, fx.Node]

    def readers(self) -> dict[fx.Node, list[fx.Node]]:
        """The layers that read each tensor."""
        return {t: [n for n, source in self.source.items() if source is t] for t in self.inputs}


def measure_sensitivity(
    prepared: Prepared,
    samples: Dataset,
    context: Context,
    weights: Mapping[fx.Node, Iterable[int]],
    inputs: Mapping[fx.Node, Iterable[int]],
) -> Sensitivity:
    """Run the network once for each layer and width, with that layer's weights rounded and everything else float; and
    once for each tensor and width. A tensor has the widths that all layers reading it allow; one width needs no run.
    """
    annotation = prepared.annotation
    source = {n: annotation.observed(operand_nodes(n)[0]) for n in prepared.layers}
    widths: dict[fx.Node, tuple[int, ...]] = {}
    for layer, tensor in source.items():
        allowed = tuple(inputs[layer])
        widths[tensor] = tuple(b for b in widths.get(tensor, allowed) if b in allowed) or (max(allowed),)
    params = {
        b: observe(prepared, samples, Context(seed=context.seed), RangeFinder(), dict.fromkeys(widths, b))
        for b in sorted({b for found in widths.values() if len(found) > 1 for b in found})
    }
    plain = FakeQuantGraph(prepared, {}, {})
    of_weights = {n: dict.fromkeys(weights[n], 0.0) for n in prepared.layers}
    of_inputs = {t: dict.fromkeys(found, 0.0) for t, found in widths.items()}
    quantizers = {
        (n, b): make_weight(WeightQuantizer, prepared, n, LayerBits(b))
        for n, found in of_weights.items()
        for b in found
    }
    behind = {n: _behind(prepared, n) for n in {*of_weights, *of_inputs}}
    results = output_nodes(prepared.module)
    count = 0
    with torch.no_grad():
        for chunk in batches(prepared.program, samples, _batch(prepared)):
            values: Values = dict(zip([n for n in plain.nodes if n.op == "placeholder"], chunk, strict=True))
            plain.run(plain.nodes, values, quantised=False)
            want = tuple(values[n] for n in results)
            rows = len(chunk[0])
            count += rows
            for layer, losses in of_weights.items():
                for b in losses:
                    plain.weights = {layer: quantizers[layer, b]}
                    losses[b] += rows * _loss(plain, (layer, *behind[layer]), values, results, want)
            plain.weights = {}
            for tensor, losses in of_inputs.items():
                for b in losses if len(losses) > 1 else ():
                    moved = {**values, tensor: ActivationQuantizer(params[b][tensor])(values[tensor])}
                    losses[b] += rows * _loss(plain, behind[tensor], moved, results, want)
    for table in (*of_weights.values(), *of_inputs.values()):
        for b in table:
            table[b] /= count
    return Sensitivity(of_weights, of_inputs, source)


def _loss(
    graph: FakeQuantGraph,
    nodes: Iterable[fx.Node],
    values: Values,
    results: list[fx.Node],
    want: tuple[torch.Tensor, ...],
) -> float:
    """Divergence of the outputs when `nodes` are computed again; everything else keeps its float value."""
    moved = dict(values)
    graph.run(nodes, moved)
    return float(distillation_loss([moved[n] for n in results], want, alpha=1.0, temperature=1.0))


def _behind(prepared: Prepared, node: fx.Node) -> tuple[fx.Node, ...]:
    """The calls that depend on `node`, in graph order."""
    found = {node}
    order = []
    for other in prepared.module.graph.nodes:
        if other.op == "call_function" and any(n in found for n in other.all_input_nodes):
            found.add(other)
            order.append(other)
    return tuple(order)


def _batch(prepared: Prepared) -> int:
    """Samples whose values of all nodes fit the memory that is set aside."""
    shapes = [shape_of(n) for n in prepared.module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    rows = prepared.program.example_inputs[0].shape[0]
    return max(1, min(32, MEMORY * rows // max(1, sum(math.prod(s) for s in shapes))))


def divergence(original: Program, made: Program, samples: Dataset) -> float:
    """Mean over samples of the divergence of the outputs of two Programs; see `MixedSummary`."""
    total, count = 0.0, 0
    for chunk in batches(original, samples):
        loss = distillation_loss(made(*chunk), original(*chunk), alpha=1.0, temperature=1.0)
        total += len(chunk[0]) * float(loss)
        count += len(chunk[0])
    return total / count


# -- allocation --------------------------------------------------------------------------------------------------------


def least_cost(found: Sensitivity, cost: CostModel) -> float:
    """Cost of the cheapest bits."""
    total = 0.0
    for tensor, layers in found.readers().items():
        widths = found.inputs[tensor]
        total += min(sum(min(cost(n, b, a) for b in found.weights[n]) for n in layers) for a in widths)
    return total


def choose_bits(found: Sensitivity, cost: CostModel, budget: float) -> tuple[dict[fx.Node, LayerBits], float]:
    """Bits for every layer with the least sum of divergences at a cost of at most `budget`, and that sum.

    Raises EdgecError when even the cheapest bits cost more, activations included.
    """
    tensors, readers, groups = list(found.inputs), found.readers(), []
    for tensor in tensors:
        cases = [
            [[Choice(cost(n, b, a), loss) for b, loss in found.weights[n].items()] for n in readers[tensor]]
            for a in found.inputs[tensor]
        ]
        groups.append(Group(cases, list(found.inputs[tensor].values())))
    bits: dict[fx.Node, LayerBits] = {}
    total = 0.0
    for tensor, (case, options) in zip(tensors, solve(groups, budget), strict=True):
        activations = list(found.inputs[tensor])[case]
        total += found.inputs[tensor][activations]
        for layer, index in zip(readers[tensor], options, strict=True):
            weights = list(found.weights[layer])[index]
            bits[layer] = LayerBits(weights, activations)
            total += found.weights[layer][weights]
    return bits, total
