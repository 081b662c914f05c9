"""DiffRate: prune unimportant tokens, then merge, with counts that are learned or transferred."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgec.cost import program_cost
from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.tokens.rates import Counts, Learning, fitted, learn, nearest_profile, published, reduced_macs
from edgec.passes.tokens.rewrite import Emitter, Prepared, prepare, reduce_tokens
from edgec.program import Program, shape_of


@dataclass(frozen=True)
class DiffRate(Pass):
    """Sort tokens by the class token's attention, drop the least, merge the next into similar ones, in every block.

    How many is constant. By default a published schedule (DeiT of the nearest width) is stretched over the model's
    depth and tokens and fitted to `macs`; `learn` finds one by gradient from unlabelled samples in minutes, following
    the uncompressed model; `prune` and `merge` give one. Block 0 is not reduced by learned and published schedules.
    Merged tokens are plain means and sizes grow by size times similarity, as in the authors' code; `merge_mean` and
    `true_size` change that. Class, distillation and register tokens stay. Models without a class token are left alone:
    nothing ranks their tokens.

    Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV 2023: DeiT-S 79.8
    -> 79.54 % at 2.9 of 4.6 GMACs without fine-tuning.
    """

    name: ClassVar[str] = "diffrate"
    faithful: ClassVar[bool] = False

    macs: float = option(0.6, "share of the multiply-accumulates to keep", low=0.05, high=1)
    prune: tuple[int, ...] = option((), "tokens that pruning keeps in each block, prefix included", unit="tokens")
    merge: tuple[int, ...] = option((), "tokens behind each block, prefix included", unit="tokens")
    profile: str = option(
        "auto", "the published schedule; auto: of the nearest width", choices=("auto", "deit-t", "deit-s", "deit-b")
    )
    learn: bool = option(False, "learn the counts from calibration samples")
    steps: int = option(200, "steps of learning", low=1)
    batch: int = option(16, "samples in a step of learning", low=1)
    lr: float = option(0.05, "learning rate at the start", low=0)
    granularity: int = option(4, "step between the counts that learning chooses from", unit="tokens", low=1)
    merge_mean: str = option("plain", "mean of merged tokens: plain, or by size", choices=("plain", "weighted"))
    true_size: bool = option(False, "sizes count patches, instead of patches times similarity")
    proportional: bool = option(True, "attention weighs keys by the sizes of their tokens")
    class_rows: bool = option(True, "first compute only the rows of the last block that are read out")

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with fewer tokens; the same Program where `macs` is 1. Annotation `tokens`: the counts.

        Raises EdgecError when `learn` has no data, and for `prune` and `merge` that do not fit the model.
        """
        if self.macs == 1.0 and not self.merge and not self.prune:
            return program
        ready = prepare(program, context, self.class_rows)
        if not ready.blocks:
            return program
        found = ready.map
        if found.prefix == 0:
            context.skip(program.name, "tokens not reduced", "it has no class token whose attention could rank them")
            return program
        counts = self._counts(ready, context).clipped(found.tokens, found.prefix)
        if not counts.merge or counts.merge[-1] == found.tokens:
            if self.prune or self.merge or not self.class_rows:
                return program
            made = program.replace(found.module)
            share = program_cost(made).macs / program_cost(program).macs
            context.skip(program.name, "tokens not reduced", f"class rows alone leave {share:.2f} of the MACs")
            return made
        steps = {s.add: (p, m) for s, p, m in zip(found.sites, counts.prune, counts.merge, strict=True)}

        def reduce(at: Emitter) -> tuple[fx.Node, fx.Node, int]:
            kept, merged = steps[at.site.add]
            score = at.class_score(size=self.proportional)
            given = (at.x, at.size, score, at.prefix, kept, merged, self.merge_mean == "weighted", self.true_size)
            return *at.pair(torch.ops.edgec.token_reduce.default, *given), kept

        return reduce_tokens(ready, counts.merge, reduce, scheme=self.name, sized=True, proportional=self.proportional)

    def _counts(self, ready: Prepared, context: Context) -> Counts:
        sites, blocks = len(ready.map.sites), ready.blocks
        if self.prune or self.merge:
            merge = self.merge or self.prune
            prune = self.prune or self.merge
            for key, given in (("prune", prune), ("merge", merge)):
                if len(given) != blocks or min(given) <= ready.map.prefix:
                    raise EdgecError(
                        f"{list(given)} does not fit {blocks} blocks with {ready.map.prefix} prefix tokens",
                        where=f"{self.name}{{{key}}}",
                        hint=f"give {blocks} counts above {ready.map.prefix}",
                    )
            return Counts(tuple(prune[:sites]), tuple(merge[:sites]))
        target = self.macs * program_cost(ready.program).macs
        if not self.learn or not sites:
            width = shape_of(ready.map.sites[0].add)[2] if sites else 0
            profile = nearest_profile(width) if self.profile == "auto" and sites else self.profile
            shares = published(profile, ready) if sites else ([], [])
            counts = fitted(*shares, ready, target)
        else:
            options = Learning(self.steps, self.batch, self.lr, self.granularity, context.seed)
            counts = learn(
                ready,
                target,
                context.calibration_data(self),
                options,
                proportional=self.proportional,
                weighted=self.merge_mean == "weighted",
                true_size=self.true_size,
                log=context.log,
            )
        reached = reduced_macs(ready, counts)
        if reached > target:
            share = reached / program_cost(ready.program).macs
            context.skip(ready.program.name, "wanted MACs not reached", f"{share:.2f} is the least that can be had")
        return counts

    def weaken(self, amount: float) -> DiffRate | None:
        """The share of MACs removed times `amount`; None for a given schedule."""
        if self.prune or self.merge:
            return None
        return dataclasses.replace(self, macs=1 - (1 - self.macs) * amount if amount < 1 else self.macs)
