"""Search for a better mask over frozen weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from edgec.errors import EdgecError
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.recovery.dense import dense_program
from edgec.program import Program
from edgec.sparsity import BESIDE, Sparsity, sparsities
from edgec.training import AUGMENT, FEWEST_FOR_STATISTICS, Recipe, Trainable, fit, fixed_batch

# Score of what is removed at the start; what is kept has 1.
BELOW = 0.99


@dataclass(frozen=True)
class SearchReport:
    """Held-out loss before and after, the step whose mask was kept (0: the mask is what it was), the swaps made on the
    way and, by weight path, the grains that are kept now and were not before.
    """

    before: float
    after: float
    best_step: int
    swaps: int
    changed: dict[str, int]


@dataclass(frozen=True)
class SearchMask(Pass):
    """Move the zeros of a pruned model, without changing any weight, until it follows the original model best.

    Every grain (a weight, a block, a place of an N:M group) has a score, whose gradient is the sum of weight times
    gradient over the grain; the weights stay what the original model has. After each step, removed grains whose score
    has risen above that of kept ones change places with them, only inside a group of a balanced or N:M pattern, so that
    pattern and number of zeros stay. Of n possible swaps the ceil(n r) with the largest gain are made, r = (1 - t)^4
    falling over the search. The loss is KL to the original model; labels are not used. The mask with the lowest
    held-out loss is kept.

    The values of removed weights are taken from the original model, so the pass stands directly behind the pruning pass
    (or `recalibrate-bn`). Recalibrate batch norms behind it.

    Zhang et al., "Lottery Jackpots Exist in Pre-trained Models".
    """

    name: ClassVar[str] = "search-mask"
    needs: ClassVar[Needs] = Needs.CALIBRATION

    steps: int = option(300, "optimizer steps", low=1)
    batch: int = option(128, "samples in a step, at most a quarter of all", low=1)
    lr: float = option(0.1, "learning rate of the scores at the start (SGD)", low=0)
    weight_decay: float = option(5e-4, "on scores", low=0)
    temperature: float = option(4.0, "softens the distributions of teacher and student", low=0.1, high=100)
    augment: str = option("auto", "for image inputs; auto is flip-crop for colour images", choices=AUGMENT)

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with other masks and batch norm statistics; annotation `search-mask` is a SearchReport.

        Raises EdgecError without data or a teacher, when weights that were kept have changed since pruning, when a mask
        does not have the pattern of its record, and when the loss is not finite.
        """
        data, teacher = context.training_data(self), context.teacher_of(self)
        records = sparsities(program.annotations)
        if not records:
            context.skip(program.name, "mask search", "no weight is pruned: run it behind a pruning pass")
            return program
        integers = [path for path in records if not program.weights()[path].dtype.is_floating_point]
        if integers:
            raise EdgecError(f"'{integers[0]}' is quantised", where=program.name, hint="search before quantising")
        dense = dense_program(program, teacher).weights()
        batch = min(fixed_batch(program) or self.batch, self.batch)
        tables = {path: Table(record) for path, record in records.items()}
        student = MaskedStudent(program, tables, {path: dense[path] for path in records}, batch < FEWEST_FOR_STATISTICS)
        recipe = Recipe(
            self.steps,
            self.batch,
            self.lr,
            self.weight_decay,
            alpha=1.0,
            temperature=self.temperature,
            augment=self.augment,
            use_labels=False,
            seed=context.seed,
        )

        def swap(step: int) -> None:
            student.swap((1 - step / self.steps) ** 4)

        groups = [{"params": list(student.scores.values()), "weight_decay": self.weight_decay}]
        report = fit(student, groups, teacher, data, recipe, after_step=swap, log=context.log)
        changed = {p: int((student.kept[p] & ~tables[p].kept).sum()) for p in tables}
        if report.best_step == 0 or not any(changed.values()):
            context.skip(program.name, "mask search", f"no mask was better than the start ({report.before:.3g})")
            return program
        return student.finish(
            self.name, SearchReport(report.before, report.after, report.best_step, student.swaps, changed)
        )


class Table:
    """The grains of a weight as [groups, grains]: swaps happen inside a group. Elements outside any whole grain (where
    the block does not divide the channels) are not in the table and stay as they are.
    """

    def __init__(self, record: Sparsity) -> None:
        """Raises EdgecError when a block is neither kept nor removed as a whole."""
        self.record, shape = record, tuple(record.mask.shape)
        whole = self.grains(record.mask.to(torch.float64))
        size = self.elements
        if bool(((whole != 0) & (whole != size)).any()):
            raise EdgecError(f"the mask of shape {shape} has no blocks of {record.block}", where="search-mask")
        self.kept = whole == size

    @property
    def elements(self) -> int:
        """Weights in one grain."""
        if self.record.pattern != "block":
            return 1
        return self.record.block[0] * self.record.block[1] * math.prod(self.record.mask.shape[2:])

    def _split(self) -> tuple[int, int, int, int, int]:
        """(output groups, outputs of one, input groups, inputs of one, taps) of whole blocks."""
        outputs, inputs, *window = self.record.mask.shape
        out, inside = self.record.block if self.record.pattern == "block" else (1, self.record.block[1])
        return outputs // out, out, inputs // inside, inside, math.prod(window)

    def grains(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over grains of a tensor of the weight's shape: [groups, grains of a group]."""
        if self.record.pattern == "unstructured":
            return values.reshape(1, -1)
        a, out, b, inside, taps = self._split()
        whole = values.reshape(*values.shape[:2], taps)[: a * out, : b * inside].reshape(a, out, b, inside, taps)
        if self.record.pattern == "nm":
            return whole.permute(0, 1, 2, 4, 3).reshape(-1, inside)
        sums = whole.sum((1, 3, 4))
        return sums if self.record.balanced else sums.reshape(1, -1)

    def mask(self, kept: torch.Tensor) -> torch.Tensor:
        """The weight's mask for a table of kept grains."""
        shape = self.record.mask.shape
        if self.record.pattern == "unstructured":
            return kept.reshape(shape)
        a, out, b, inside, taps = self._split()
        if self.record.pattern == "nm":
            whole = kept.reshape(a, out, b, taps, inside).permute(0, 1, 2, 4, 3)
        else:
            whole = kept.reshape(a, 1, b, 1, 1).expand(a, out, b, inside, taps)
        mask = self.record.mask.clone().reshape(*shape[:2], taps)
        mask[: a * out, : b * inside] = whole.reshape(a * out, b * inside, taps)
        return mask.reshape(shape)


def swapped(scores: torch.Tensor, kept: torch.Tensor, share: float) -> tuple[torch.Tensor, int]:
    """(kept grains after the best swaps, their number): scores float and kept bool, both [groups, grains].

    In each group, the removed grain that has risen most is paired with the kept one that has fallen most, and so on as
    long as the former's score is larger; of all n pairs the ceil(n share) with the largest difference are swapped.
    """
    low, high = -math.inf, math.inf
    risen, entering = torch.where(kept, low, scores).sort(dim=1, descending=True, stable=True)
    fallen, leaving = torch.where(kept, scores, high).sort(dim=1, stable=True)
    gain = torch.where(risen > fallen, risen - fallen, low)
    n = int((gain > 0).sum())
    count = math.ceil(n * share)
    if count == 0:
        return kept, 0
    chosen = gain.reshape(-1).argsort(descending=True, stable=True)[:count]
    rows = chosen // scores.shape[1]
    result = kept.clone()
    result[rows, entering.reshape(-1)[chosen]] = True
    result[rows, leaving.reshape(-1)[chosen]] = False
    return result, count


class MaskedStudent(Trainable):
    """A pruned Program for `fit` whose masks are searched: only the scores of grains are trained.

    `dense` holds the values of the masked weights; `kept` the masks of now, as tables.
    """

    def __init__(
        self, program: Program, tables: dict[str, Table], dense: dict[str, torch.Tensor], frozen_norms: bool
    ) -> None:
        others = {k: v for k, v in program.annotations.items() if not isinstance(v, Sparsity)}
        super().__init__(program.replace(annotations=others), frozen_norms=frozen_norms)
        self.pruned, self.tables, self.dense = program, tables, dense
        self.kept = {path: table.kept for path, table in tables.items()}
        self.swaps = 0
        self.scores: dict[str, torch.Tensor] = {}
        for path, weight in self.weights.items():
            weight.requires_grad_(path in tables)
            if path in tables:
                start = torch.where(self.kept[path], 1.0, BELOW)
                self.scores[path] = start.requires_grad_(True)
                weight.register_post_accumulate_grad_hook(self._hook(path))

    def _hook(self, path: str) -> Any:
        """Turns the gradient of a weight into that of its scores."""

        def give(weight: torch.Tensor) -> None:
            gradient = self.tables[path].grains(weight.grad * self.dense[path])  # type: ignore[operator]
            given, weight.grad = self.scores[path].grad, None
            self.scores[path].grad = gradient.clone() if given is None else given + gradient

        return give

    def swap(self, share: float) -> None:
        """Make the best share of the swaps that the scores ask for, layer by layer."""
        for path, table in self.tables.items():
            kept, count = swapped(self.scores[path].detach(), self.kept[path], share)
            if count:
                self.kept[path] = kept
                self.swaps += count
                self._write(path, table)

    def _write(self, path: str, table: Table) -> None:
        with torch.no_grad():
            # `+ 0.0` makes -0.0 of a masked element +0.0
            self.weights[path].copy_(self.dense[path] * table.mask(self.kept[path]) + 0.0)

    def project(self) -> None:
        """Weights do not change."""

    def state(self) -> dict[str, torch.Tensor]:
        others = {path: w.detach().clone() for path, w in self.weights.items() if path not in self.tables}
        return others | {f"{path}{BESIDE}": kept.clone() for path, kept in self.kept.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for path, weight in self.weights.items():
                if path not in self.tables:
                    weight.copy_(state[path])
        for path, table in self.tables.items():
            self.kept[path] = state[f"{path}{BESIDE}"]
            self._write(path, table)

    def finish(self, name: str, report: SearchReport) -> Program:
        """The Program with the masks of now and the report as annotation `name`."""
        records = {path: table.record.with_mask(table.mask(self.kept[path])) for path, table in self.tables.items()}
        annotations = {k: v for k, v in self.pruned.annotations.items() if not isinstance(v, Sparsity)}
        return self.program().replace(annotations={**annotations, **records, name: report})
