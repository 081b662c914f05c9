"""Dropping tokens by a score: the simple schemes that merging is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgec.passbase import Context, Pass, option
from edgec.passes.tokens.rewrite import Emitter, prepare, reduce_tokens
from edgec.passes.tokens.tome import block_schedule, counts_after
from edgec.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class DropTokens(Pass):
    """Drop the r tokens of lowest score in every block, between attention and MLP; the others keep their order.

    score: "class-attention" is the attention of the class token, mean over heads; "sigma" that times the norm of the
    token's value (Fayyaz et al., "Adaptive Token Sampling", with a fixed number); "random" a fixed choice by the seed.
    Cheaper than merging and, at equal cost, worse: use `tome` or `diffrate` unless tokens must stay what they are.
    """

    name: ClassVar[str] = "drop-tokens"
    faithful: ClassVar[bool] = False

    r: int = option(13, "tokens dropped in a block", unit="tokens", low=0)
    inflect: float = option(0.0, "how r goes with depth: -1 falls, 0 constant, 1 rises", low=-1, high=1)
    schedule: tuple[int, ...] = option((), "tokens dropped in each block, instead of r and inflect", unit="tokens")
    score: str = option("class-attention", "what is kept", choices=("class-attention", "sigma", "random"))
    class_rows: bool = option(True, "first compute only the rows of the last block that are read out")

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with fewer tokens; the same Program where r is 0. Annotation `tokens` holds the counts.

        Raises EdgecError when `schedule` does not have one entry per block, or has negative ones.
        """
        if self.r == 0 and not any(self.schedule):
            return program
        ready = prepare(program, context, self.class_rows)
        if not ready.blocks:
            return program
        if ready.map.prefix == 0 and self.score != "random":
            context.skip(program.name, "tokens not dropped", "it has no class token whose attention could rank them")
            return program
        wanted = block_schedule(self.name, self.schedule, self.r, self.inflect, ready.blocks)
        after = counts_after(ready.map.tokens, ready.map.prefix, wanted[: len(ready.map.sites)])
        if not after or after[-1] == ready.map.tokens:
            return program
        keep = dict(zip([site.add for site in ready.map.sites], after, strict=True))
        generator = torch.Generator().manual_seed(context.seed)

        def drop(at: Emitter) -> tuple[fx.Node, fx.Node, int]:
            if self.score == "random":
                score = at.rows(torch.rand(1, at.tokens - at.prefix, generator=generator))
            else:
                score = at.class_score(size=False)
            if self.score == "sigma":
                squares = at.node(aten.sum.dim_IntList, at.node(aten.mul.Tensor, at.site.v, at.site.v), [1, 3])
                norms = at.node(aten.sqrt.default, at.node(aten.slice.Tensor, squares, 1, at.prefix, 2**63 - 1))
                score = at.node(aten.mul.Tensor, score, norms)
            count = keep[at.site.add]
            return *at.pair(torch.ops.edgec.token_keep.default, at.x, at.size, score, at.prefix, count), count

        return reduce_tokens(ready, after, drop, scheme=self.name, sized=False, proportional=False)

    def weaken(self, amount: float) -> DropTokens:
        """r, or each entry of the schedule, times `amount`."""
        schedule = tuple(round(r * amount) for r in self.schedule)
        return dataclasses.replace(self, r=round(self.r * amount), schedule=schedule)
