"""Magnitude pruning at any granularity: the baselines that structured patterns are compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.keep import check_patterns, layer_names
from edgec.passes.pruning.masks import Grain, apply, prunable
from edgec.passes.pruning.plan import ALLOCATION_HELP, ALLOCATIONS, CRITERIA, rates_for, scored
from edgec.program import Program
from edgec.sparsity import Sparsity, sparsities
from edgec.targets.device import Device


@dataclass(frozen=True)
class Prune(Pass):
    """Remove the grains with the smallest L1 norm: weights (0-D), rows of kernels (1-D), kernels (2-D), filters (3-D).

    Mao et al., "Exploring the Regularity of Sparse Structure in Convolutional Neural Networks". Weights get zeros,
    shapes stay: no CPU target has a kernel for these patterns, so with a target the pass refuses unless it is forced.
    `prune-1xn` and `prune-channels` are the patterns that pay. Follow it with `recalibrate-bn` or `finetune`.
    """

    name: ClassVar[str] = "prune"
    faithful: ClassVar[bool] = False

    grain: str = option(
        "weight", "what is removed as one (of a 1x1 kernel, row and kernel are one weight)",
        choices=("weight", "row", "kernel", "filter"),
    )  # fmt: skip
    sparsity: float = option(0.5, "share of the grains that is removed", low=0, high=0.99)
    allocation: str = option("uniform", ALLOCATION_HELP, choices=ALLOCATIONS)
    criterion: str = option("l1", "what goes first: the smallest L1 norms, or any (a baseline)", choices=CRITERIA)
    keep: tuple[str, ...] = option((), "layers to leave dense: names, or patterns such as blocks.3.*")
    force: bool = option(False, "prune although the target does not gain")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", layer_names(self.keep, f"{self.name}{{keep}}"))

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with masked weights and their Sparsity records. Raises EdgecError for a target that does
        not gain, and for an allocation that needs calibration data where there is none."""
        check_patterns(program.module, self.keep, f"{self.name}{{keep}}")
        if context.device is not None and self.sparsity > 0:
            self._refuse(context.device, context)
        targets = prunable(program.module, self.keep, context)
        grain = Grain(self.grain)
        layers = scored(targets, grain, self.criterion, context.seed)
        rates = rates_for(self, context, program, layers, self.allocation, self.sparsity)
        given, records = sparsities(program.annotations), dict[str, Sparsity]()
        for layer, rate in zip(layers, rates, strict=True):
            mask = layer.mask(rate)
            known = given.get(layer.target.path)
            if known is not None and not bool((known.mask & ~mask).any()):
                context.skip(layer.target.layer, "not pruned", "is pruned at least as far already")
            elif not bool(mask.all()):
                records[layer.target.path] = grain.record(mask, False)
        return apply(program, records) if records else program

    def _refuse(self, device: Device, context: Context) -> None:
        instead = "prune-channels" if self.grain == "filter" else "prune-1xn"
        reason = f"{device.name} skips blocks of output channels, few of which vanish with single {self.grain}s"
        if not self.force:
            raise EdgecError(
                reason, where=f"pass {self.name}", hint=f"use {instead}, or force=true for the accuracy alone"
            )
        context.skip(self.grain, "will not be faster", reason)

    def weaken(self, amount: float) -> Pass:
        return dataclasses.replace(self, sparsity=self.sparsity * amount)
