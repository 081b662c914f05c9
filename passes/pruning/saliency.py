"""How much each unit of a dependency group matters: one score per unit, higher is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgec.passes.pruning.groups import ChannelGroup, Member
from edgec.program import Program
from edgec.training import Trainable, is_classifier

if TYPE_CHECKING:
    from edgec.data import Dataset

CRITERIA = ("l1", "l2", "bn-scale", "taylor")
# Gradients are averaged over batches of this size; the square of each batch's mean is what counts.
TAYLOR_BATCH = 16


def scores(
    program: Program, groups: Sequence[ChannelGroup], criterion: str, data: Dataset | None = None
) -> list[np.ndarray]:
    """Saliency [units] of each group.

    l1, l2: norms of the weights that make a unit (filters) and of those that read it, each weight's norms divided by
    their mean over the units so that all weights count alike; mean over the weights. bn-scale: |factor| of the batch
    norms behind the unit, likewise; l1 where there is none. These are relative to the group: their mean is 1.
    taylor: E[(dL/da)^2] over batches of `data`, a a factor of the unit's outputs (sum of w dL/dw over its batch norms'
    factors and biases, else over its filters), L the cross entropy with the labels, or with the model's own
    decisions where there are none; comparable between groups as it is.

    Li et al., "Pruning Filters for Efficient ConvNets" (l1); Liu et al., "Learning Efficient Convolutional Networks
    through Network Slimming" (bn-scale); Molchanov et al., "Importance Estimation for Neural Network Pruning" (taylor).
    """
    weights = program.weights()
    if criterion == "taylor":
        assert data is not None
        return _taylor(program, groups, data)
    factors = _norm_factors(program) if criterion == "bn-scale" else frozenset()
    result = []
    for group in groups:
        chosen = [m for m in group.members if m.weight in factors]
        if not chosen:
            chosen = [m for m in group.members if m.role in ("out", "in")]
        order = 2 if criterion == "l2" else 1
        rows = [_per_unit(weights[m.weight].double().abs() ** order, m) ** (1 / order) for m in chosen]
        rows = [row / row.mean() for row in rows if row.mean() > 0]
        result.append(np.mean(rows, axis=0) if rows else np.ones(group.channels))
    return result


def _per_unit(values: torch.Tensor, member: Member) -> np.ndarray:
    """The sum of a weight's values over what belongs to each unit."""
    axes = [a for a in range(values.dim()) if a != member.axis]
    line = (values.sum(axes) if axes else values).numpy()
    return line[member.index].sum(1)


def _norm_factors(program: Program, *arguments: int) -> frozenset[str]:
    norm = torch.ops.aten.batch_norm.default
    norms = [n for n in program.graph.nodes if n.op == "call_function" and n.target is norm]
    found = (n.args[i] for n in norms for i in arguments or (1,))
    return frozenset(str(a.target) for a in found if isinstance(a, torch.fx.Node))


def _taylor(program: Program, groups: Sequence[ChannelGroup], data: Dataset) -> list[np.ndarray]:
    model = Trainable(program)
    model.train(False)
    weights = model.trainable()
    norms = _norm_factors(program, 1, 2)
    gates = []
    for group in groups:
        # The factor of an output is that of its norm; the filters before a norm would count it a second time.
        made = [m for m in group.members if m.role != "in" and m.weight in weights]
        gates.append([m for m in made if m.weight in norms] or made)
    totals = [np.zeros(group.channels) for group in groups]
    batches = range(0, len(data), TAYLOR_BATCH)
    for start in batches:
        arrays, targets = data.read(np.arange(start, min(start + TAYLOR_BATCH, len(data))))
        outputs = model(*(torch.from_numpy(a) for a in arrays))
        if is_classifier(outputs):
            labelled = targets is not None and targets.dtype.kind in "iu" and targets.ndim == 1
            labels = torch.from_numpy(targets).long() if labelled else outputs[0].argmax(1)  # type: ignore[arg-type]
            loss = torch.nn.functional.cross_entropy(outputs[0], labels)
        else:
            loss = torch.stack([y.square().mean() / y.detach().square().mean().clamp_min(1e-12) for y in outputs]).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        change = {
            path: (w.detach() * g).double()
            for (path, w), g in zip(weights.items(), gradients, strict=True)
            if g is not None
        }
        for total, gate in zip(totals, gates, strict=True):
            parts = [_per_unit(change[m.weight], m) for m in gate if m.weight in change]
            total += np.sum(parts, axis=0) ** 2 if parts else 0.0
    return [total / len(batches) for total in totals]
