"""Block-wise fine-tuning on unlabelled samples: each block learns to give what the dense block gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from edgec.errors import EdgecError
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.recovery.blocks import Block, find_blocks
from edgec.passes.recovery.chunks import chunked
from edgec.passes.recovery.dense import dense_program
from edgec.program import Program
from edgec.training import Trainable

Values = dict[str, Any]
# An epoch that lowers the error by less than this share is the last one of its block.
LEAST_GAIN = 0.005
CLIP = 1.0


@dataclass(frozen=True)
class BlockReport:
    """Error of a block's outputs against the dense block's on the same inputs, relative to their energy, on all
    samples: before and after. epochs: 0 where nothing was better than the start.
    """

    name: str
    before: float
    after: float
    epochs: int


@dataclass(frozen=True)
class Ebft(Pass):
    """Train one block after the other so that it gives what the dense block gives; pruned elements stay zero.

    A block reads what the trained, pruned blocks before it compute, and its target is what the original block makes of
    the same inputs: squared error, Adam, the rate falling linearly, gradients clipped to a norm of 1. Norms keep their
    statistics. A block ends early when an epoch gains less than 0.5 %, and keeps its best epoch, the start included.
    Labels are not used, and memory is that of one block. Where the whole model can be trained, `finetune` gets further.
    Do not recalibrate batch norms behind this pass.

    Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs".
    """

    name: ClassVar[str] = "ebft"
    needs: ClassVar[Needs] = Needs.CALIBRATION

    samples: int = option(1024, "at most this many samples are used", low=1)
    epochs: int = option(5, "at most this many passes over the samples for each block", low=1)
    batch: int = option(64, "samples in a step", low=1)
    lr: float = option(1e-3, "learning rate at the start (Adam); 2e-4 for transformers", low=0)
    layers: int = option(2, "layers of a block where the graph does not branch", low=1, high=64)

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with trained weights; annotation `ebft` holds a BlockReport for each block.

        Raises EdgecError without data or a teacher, when weights that were kept have changed since pruning, when the
        weights are integers, and when the error is not finite.
        """
        data, teacher = context.training_data(self), context.teacher_of(self)
        student = Trainable(program, frozen_norms=True)
        if not student.trainable():
            raise EdgecError(
                "has no floating-point weights to train", where=program.name, hint="train before quantising"
            )
        dense = dense_program(program, teacher)
        calls = [c for b in chunked(program, data, self.samples, self.batch, context.seed) for c in b]
        names = [n.name for n in program.graph.nodes if n.op == "placeholder"]
        chunks: list[Values] = [dict(zip(names, c, strict=True)) for c in calls]
        blocks = find_blocks(program.module, self.layers)
        reports = []
        for index, block in enumerate(blocks):
            report = self._train(block, student, dense.module, chunks, program.dynamic_batch, context.seed + index)
            if report is not None:
                reports.append(report)
                context.log(f"{block.name}: error {report.before:.3g} before, {report.after:.3g} after")
                if report.epochs == 0:
                    reason = "it gives what the dense block gives" if report.before == 0 else "no epoch was better"
                    context.skip(block.name, "block not trained", reason)
            later = {name for b in blocks[index + 1 :] for name in b.inputs}
            with torch.no_grad():
                for values in chunks:
                    block.run(student.module, values)
                    for name in [n for n in values if n not in later]:
                        del values[name]
        if not any(r.epochs for r in reports):
            return program
        trained = student.program()
        return trained.replace(annotations={**trained.annotations, self.name: tuple(reports)})

    def _train(
        self, block: Block, student: Trainable, dense: fx.GraphModule, chunks: list[Values], free: bool, seed: int
    ) -> BlockReport | None:
        """Train one block in place; None for a block without weights to train."""
        weights = {p: w for p, w in student.trainable().items() if p in block.weights}
        if not weights or not block.outputs:
            return None
        targets = [_outputs(block, dense, values) for values in chunks]
        before = _error(block, student.module, chunks, targets)
        if not np.isfinite(before):
            raise EdgecError("the error of the block is not finite", where=block.name, hint="check the data")
        if before == 0:
            return BlockReport(block.name, before, before, 0)
        optimizer = torch.optim.Adam(weights.values(), lr=self.lr, betas=(0.9, 0.95))
        total = self.epochs * len(chunks)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        best, best_error, best_epoch, last = _copies(weights), before, 0, before
        picks = np.random.default_rng(seed)
        for epoch in range(1, self.epochs + 1):
            for values, wanted in _shuffled(block, chunks, targets, free, picks):
                loss = _distance(_outputs(block, student.module, values, gradients=True), wanted)
                if not bool(torch.isfinite(loss)):
                    raise EdgecError("the error is not finite", where=block.name, hint="use a smaller lr")
                if not loss.requires_grad:
                    return BlockReport(block.name, before, before, 0)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
                optimizer.step()
                schedule.step()
                student.project()
            error = _error(block, student.module, chunks, targets)
            if error < best_error:
                best, best_error, best_epoch = _copies(weights), error, epoch
            if error > (1 - LEAST_GAIN) * last:
                break
            last = error
        with torch.no_grad():
            for path, weight in weights.items():
                weight.copy_(best[path])
                weight.grad = None
        return BlockReport(block.name, before, best_error, best_epoch)


def _copies(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {path: w.detach().clone() for path, w in weights.items()}


def _outputs(block: Block, module: fx.GraphModule, given: Values, gradients: bool = False) -> list[torch.Tensor]:
    """The floating-point outputs of a block."""
    values = {name: given[name] for name in block.inputs}
    with torch.set_grad_enabled(gradients):
        block.run(module, values)
    made = [values[name] for name in block.outputs]
    return [y for y in made if isinstance(y, torch.Tensor) and y.dtype.is_floating_point]


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    """Squared error relative to the energy of the target, mean over outputs."""
    parts = [F.mse_loss(y, t) / t.square().mean().clamp_min(1e-12) for y, t in zip(ours, theirs, strict=True)]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def _error(block: Block, module: fx.GraphModule, chunks: list[Values], targets: list[list[torch.Tensor]]) -> float:
    parts = [float(_distance(_outputs(block, module, v), t)) for v, t in zip(chunks, targets, strict=True)]
    return sum(parts) / len(parts)


def _shuffled(
    block: Block, chunks: list[Values], targets: list[list[torch.Tensor]], free: bool, picks: np.random.Generator
) -> Iterator[tuple[Values, list[torch.Tensor]]]:
    """The samples in another order: rows, where the batch is free and every tensor has one for each sample, else the
    batches as they are.
    """
    first = chunks[0]
    sizes = {len(v) if isinstance(v, torch.Tensor) and v.dim() else 0 for v in (first[n] for n in block.inputs)}
    sizes |= {len(t) if t.dim() else 0 for t in targets[0]}
    if not free or len(sizes) != 1 or 0 in sizes:
        for index in picks.permutation(len(chunks)):
            yield chunks[index], targets[index]
        return
    (rows,) = sizes
    order = picks.permutation(rows * len(chunks))
    for start in range(0, len(order), rows):
        chosen = [divmod(int(i), rows) for i in order[start : start + rows]]
        yield (
            {n: torch.stack([chunks[c][n][r] for c, r in chosen]) for n in block.inputs},
            [torch.stack([targets[c][i][r] for c, r in chosen]) for i in range(len(targets[0]))],
        )
