"""ToMe: token merging."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.tokens.rewrite import Emitter, prepare, reduce_tokens
from edgec.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ToMe(Pass):
    """Merge r pairs of similar tokens in every block, between attention and MLP.

    Tokens are split alternately into two sets; each of the first has a most similar one in the second, by cosine of
    the keys' mean over heads; the r most similar pairs become one token each, their mean weighted with the patches
    they stand for. No weights change and no data is needed. Attention behind weighs keys by log(patches)
    (`proportional`), and a mean over tokens becomes one over patches. Class, distillation and register tokens are
    never merged. Sites that cannot lose tokens are left alone and named.

    r_l = int(min + (max - min) l / (L - 1)) with min = int(r (1 - inflect)) and max = 2r - min: `inflect` 0 is
    constant, -1 decreases to 0 and 1 increases from 0. At most half of the tokens merge at once.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023: ViT-S 81.41 -> 79.30 %, ViT-B 84.57 -> 82.60 % at
    r = 13 without training.
    """

    name: ClassVar[str] = "tome"
    faithful: ClassVar[bool] = False

    r: int = option(13, "tokens merged in a block", unit="tokens", low=0)
    inflect: float = option(0.0, "how r goes with depth: -1 falls, 0 constant, 1 rises", low=-1, high=1)
    schedule: tuple[int, ...] = option((), "tokens merged in each block, instead of r and inflect", unit="tokens")
    proportional: bool = option(True, "attention weighs keys by the patches they stand for (off for MAE models)")
    class_rows: bool = option(True, "first compute only the rows of the last block that are read out")

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with merging; the same Program where r is 0. Annotation `tokens` holds the counts.

        Raises EdgecError when `schedule` does not have one entry per block, or has negative ones.
        """
        if self.r == 0 and not any(self.schedule):
            return program
        ready = prepare(program, context, self.class_rows)
        if not ready.blocks:
            return program
        wanted = block_schedule(self.name, self.schedule, self.r, self.inflect, ready.blocks)
        after = counts_after(ready.map.tokens, ready.map.prefix, wanted[: len(ready.map.sites)])
        if not after or after[-1] == ready.map.tokens:
            return program
        steps = dict(zip([site.add for site in ready.map.sites], after, strict=True))

        def merge(at: Emitter) -> tuple[fx.Node, fx.Node, int]:
            metric = at.node(aten.mean.dim, at.site.k, [1])
            r = at.tokens - steps[at.site.add]
            merged = at.pair(torch.ops.edgec.tome_merge.default, at.x, at.size, metric, r, at.prefix, at.distilled)
            return *merged, at.tokens

        return reduce_tokens(ready, after, merge, scheme=self.name, sized=True, proportional=self.proportional)

    def weaken(self, amount: float) -> ToMe:
        """r, or each entry of the schedule, times `amount`."""
        schedule = tuple(round(r * amount) for r in self.schedule)
        return dataclasses.replace(self, r=round(self.r * amount), schedule=schedule)


def block_schedule(name: str, schedule: tuple[int, ...], r: int, inflect: float, blocks: int) -> list[int]:
    """Tokens to remove in each block, by the reference's rule. Raises EdgecError for a list that does not fit."""
    if schedule:
        if len(schedule) != blocks or min(schedule) < 0:
            raise EdgecError(
                f"has {len(schedule)} entries for {blocks} blocks",
                where=f"{name}{{schedule}}",
                hint="give one number >= 0 per block",
            )
        return list(schedule)
    least = int(r * (1 - inflect))
    most = 2 * r - least
    return [int(least + (most - least) * block / max(1, blocks - 1)) for block in range(blocks)]


def counts_after(tokens: int, prefix: int, removed: list[int]) -> list[int]:
    """Tokens behind each site; no site loses more than half of what is not prefix."""
    after = []
    for r in removed:
        tokens -= min(r, (tokens - prefix) // 2)
        after.append(tokens)
    return after
