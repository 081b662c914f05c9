"""Batch norm statistics, or the biases of a model without batch norms, made right again after pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgec.errors import EdgecError
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.recovery.chunks import Chunks, chunked
from edgec.passes.recovery.dense import dense_program
from edgec.program import Program, constant_of, get_weight, is_call, layer_of, shape_of, weight_node
from edgec.sparsity import sparsities

aten = torch.ops.aten
LAYERS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.linear.default,
)
# Samples that are run at once where biases are corrected: statistics there need all of them, not large batches.
CHUNK = 64


@dataclass(frozen=True)
class RecalibrateBN(Pass):
    """Give batch norms the mean and variance that their inputs have now: after pruning, these are no longer the stored.

    The statistics are the plain average over batches of those of a batch, every layer reading what the recalibrated
    layers before it give for the same batch. Labels are not used. Run it before `fold-bn`. Where no batch norm is left,
    the pass does nothing, or, with `bias_correction`, moves the bias of each pruned layer and of those behind it so
    that the mean of each output channel is that of the original model.

    Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation" (the statistics); Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction" (the biases, empirical variant).
    """

    name: ClassVar[str] = "recalibrate-bn"
    needs: ClassVar[Needs] = Needs.CALIBRATION
    # a model whose stored statistics are not those of the data becomes another one
    faithful: ClassVar[bool] = False

    samples: int = option(2048, "at most this many samples are used", low=1)
    batch: int = option(128, "samples in a batch", low=64)
    bias_correction: bool = option(False, "correct biases where no batch norm is left and weights are pruned")

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with new statistics or biases; what cannot be done is reported.

        Raises EdgecError without data, and when the samples do not fill a fixed batch. Without batch norms and with
        `bias_correction`, raises EdgecError without a teacher.
        """
        data = context.training_data(self)
        norms = [n for n in program.graph.nodes if is_call(n, aten.batch_norm.default)]
        if norms:
            module = program.edit()
            for calls in recalibrated_batches(module, chunked(program, data, self.samples, self.batch, context.seed)):
                context.log(f"recalibrated on {calls} samples")
            return program.replace(module)
        if not self.bias_correction:
            context.skip(
                program.name,
                "batch norm statistics",
                "no batch norm is left: run this pass before fold-bn, or with bias_correction=true",
            )
            return program
        if not sparsities(program.annotations):
            context.skip(program.name, "biases not corrected", "no weight is pruned")
            return program
        try:
            dense = dense_program(program, context.teacher_of(self))
        except EdgecError as error:
            context.skip(program.name, "biases not corrected", str(error))
            return program
        calls = [c for batch in chunked(program, data, self.samples, CHUNK, context.seed) for c in batch]
        module = program.edit()
        correct_biases(module, dense.module, calls, context)
        return program.replace(module)


# -- batch norms -------------------------------------------------------------------------------------------------------


def recalibrated_batches(module: fx.GraphModule, batches: list[list[tuple[torch.Tensor, ...]]]):
    """Set the statistics of all batch norms of `module`, in place; yields the samples seen after each batch.

    A batch is a list of calls: its statistics are those of all its calls together, which is what models of a fixed
    batch of 1 need. The variance is the unbiased one, as in training.
    """
    norms = [n for n in module.graph.nodes if is_call(n, aten.batch_norm.default)]
    sums = {n: [torch.zeros(_channels(n), dtype=torch.float64) for _ in range(2)] for n in norms}
    seen = 0
    for calls in batches:
        run = Chunks(module, calls)
        for node in module.graph.nodes:
            if node not in sums:
                run.step(node)
                continue
            values = run.values[node.args[0]]
            moments = _moments(values)
            for total, moment in zip(sums[node], moments, strict=True):
                total += moment
            run.step(node)
            run.values[node] = [_normalised(module, node, x, moments) for x in values]
        seen += sum(len(c[0]) for c in calls)
        yield seen
    for node, totals in sums.items():
        for stored, total in zip(node.args[3:5], totals, strict=True):
            if isinstance(stored, fx.Node):
                get_weight(module, stored).copy_((total / len(batches)).to(torch.float32))


def _channels(node: fx.Node) -> int:
    return shape_of(node)[1]


def _moments(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, unbiased variance) per channel, float64, over all chunks."""
    rows = [x.movedim(1, 0).flatten(1).double() for x in values]
    count = sum(r.shape[1] for r in rows)
    mean = torch.stack([r.sum(1) for r in rows]).sum(0) / count
    square = torch.stack([(r - mean[:, None]).square().sum(1) for r in rows]).sum(0)
    return mean, square / max(1, count - 1)


def _normalised(module: fx.GraphModule, node: fx.Node, x: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor]):
    gamma, beta = (constant_of(module, a) for a in node.args[1:3])
    mean, variance = (m.to(x.dtype) for m in moments)
    return torch.batch_norm(x, gamma, beta, mean, variance, False, 0.0, float(node.args[7]), False)  # type: ignore[arg-type]


# -- biases ------------------------------------------------------------------------------------------------------------


def correct_biases(
    module: fx.GraphModule, dense: fx.GraphModule, calls: list[tuple[torch.Tensor, ...]], context: Context
) -> None:
    """b += mean(dense output - output) per channel, layer by layer, each on the outputs of corrected layers; in place.

    module and dense: the same graph with other weights. Layers whose bias is shared or computed are reported.
    """
    ours, theirs = Chunks(module, calls), Chunks(dense, calls)
    for node, twin in zip(list(module.graph.nodes), list(dense.graph.nodes), strict=True):
        theirs.step(twin)
        ours.step(node)
        if not is_call(node, *LAYERS):
            continue
        reason = _fixed_bias(module, node)
        if reason is not None:
            context.skip(layer_of(node), "bias not corrected", reason)
            continue
        axis = -1 if is_call(node, aten.linear.default) else 1
        shift = (_mean(theirs.values[twin], axis) - _mean(ours.values[node], axis)).to(torch.float32)
        if bool((shift == 0).all()):
            continue
        _add_bias(module, node, shift)
        shape = [1] * ours.values[node][0].dim()
        shape[axis] = len(shift)
        ours.values[node] = [y + shift.reshape(shape) for y in ours.values[node]]


def _mean(values: list[torch.Tensor], axis: int) -> torch.Tensor:
    rows = [y.movedim(axis, 0).flatten(1).double() for y in values]
    return torch.stack([r.sum(1) for r in rows]).sum(0) / sum(r.shape[1] for r in rows)


def _bias_of(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")


def _fixed_bias(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Why the bias of a layer cannot be changed, or None."""
    bias = _bias_of(node)
    if bias is None:
        return None
    if constant_of(module, bias) is None:
        return "it is computed, not stored"
    readers = [u for n in module.graph.nodes if n.op == "get_attr" and n.target == bias.target for u in n.users]
    return "it is shared with another layer" if len(readers) > 1 else None


def _add_bias(module: fx.GraphModule, node: fx.Node, shift: torch.Tensor) -> None:
    bias = _bias_of(node)
    if bias is not None:
        get_weight(module, bias).add_(shift)
        return
    path = str(node.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
    with module.graph.inserting_before(node):
        added = weight_node(module, f"{path}.corrected.bias", shift)
    node.args = (*node.args[:2], added, *node.args[3:])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
