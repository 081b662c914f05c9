"""From weights to masks: the steps that every pass which masks by score has in common.

Scores of the grains of each layer, a rate for each layer by the allocation asked for, and the table of what is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgec.cost import node_macs
from edgec.passbase import Context, Pass
from edgec.passes.pruning import allocation as alloc
from edgec.passes.pruning.allocation import LayerGrains
from edgec.passes.pruning.masks import Grain, Target, choose
from edgec.passes.pruning.sensitivity import RATES, Judge, scan
from edgec.program import Program

ALLOCATIONS = ("uniform", "global", "erk", "lamp", "atp", "lagrangian")
ALLOCATION_HELP = (
    "rate of each layer: the same, by one ranking of all grains (global, lamp), by its shape (erk), rising with depth "
    "(atp) or by measured sensitivity per MAC (lagrangian); the last two need calibration data"
)
CRITERIA = ("l1", "random")


@dataclass(frozen=True)
class Scored:
    """A layer with the scores of its grains: [groups, grains of a group]."""

    target: Target
    grain: Grain
    scores: torch.Tensor

    @property
    def grains(self) -> LayerGrains:
        shape = self.target.shape
        values: np.ndarray = self.scores.reshape(-1).numpy()
        return LayerGrains(
            self.target.layer, values, self.grain.elements(shape), shape, min(len(self.scores), shape[0])
        )

    def kept(self, rate: float, balanced: bool = False) -> torch.Tensor:
        """The table of grains that stay at this rate."""
        return choose(self.scores, alloc.removed(rate, self.scores.numel()), balanced)

    def mask(self, rate: float, balanced: bool = False) -> torch.Tensor:
        """What stays of the weight at this rate, bool, of its shape."""
        return self.grain.expand(self.kept(rate, balanced), self.target.shape)

    def retained(self, rate: float, balanced: bool = False) -> float:
        """The sum of scores that stays at this rate: with L1 scores, the L1 mass of the pruned weight."""
        return float(self.scores[self.kept(rate, balanced)].sum())


def scored(targets: Sequence[Target], grain: Grain, criterion: str, seed: int) -> list[Scored]:
    """The layers with their scores: L1 norms, or noise for the baseline `random`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for target in targets:
        scores = grain.table(target.weight)
        if criterion == "random":
            scores = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
        found.append(Scored(target, grain, scores))
    return found


def rates_for(
    step: Pass,
    context: Context,
    program: Program,
    layers: Sequence[Scored],
    allocation: str,
    sparsity: float,
    balanced: bool = False,
) -> list[float]:
    """The rate of each layer. Raises EdgecError where the allocation needs calibration data and there is none."""
    grains = [layer.grains for layer in layers]
    if allocation in ("atp", "lagrangian") and layers:
        judge = Judge(program, context.calibration_data(step), seed=context.seed)
        if allocation == "lagrangian":
            return _by_sensitivity(judge, program, layers, sparsity, balanced)

        def loss(rates: list[float]) -> float:
            return judge({s.target.path: s.mask(r, balanced) for s, r in zip(layers, rates, strict=True)})

        beta, rates = alloc.best_slope(grains, sparsity, loss)
        context.log(f"{step.name}: rates rise by {beta:.4f} from layer to layer")
        return rates
    functions = {
        "uniform": alloc.uniform,
        "global": alloc.global_magnitude,
        "erk": alloc.erk,
        "lamp": alloc.lamp,
    }
    return functions[allocation](grains, sparsity)


def _by_sensitivity(
    judge: Judge, program: Program, layers: Sequence[Scored], sparsity: float, balanced: bool
) -> list[float]:
    """Least KL, summed over layers as if each were pruned alone, for the MACs that the uniform rate would leave."""
    rates = sorted({0.0, sparsity, *RATES})
    by_path = {s.target.path: s for s in layers}

    def mask_of(path: str, rate: float) -> Mapping[str, torch.Tensor]:
        return {path: by_path[path].mask(rate, balanced)}

    damage = scan(judge, list(by_path), mask_of, rates)
    macs = [node_macs(program, s.target.node) for s in layers]
    cost = [[m * (1 - rate) for rate in rates] for m in macs]
    choice, _ = alloc.lagrangian([damage[path] for path in by_path], cost, (1 - sparsity) * sum(macs))
    return [rates[k] for k in choice]
