"""Training a Program for minutes on a CPU: the machinery of fine-tuning, QAT, mask search and schedule learning.

`Trainable` is a Program's graph with gradients, its masks held; `fit` is the loop: distillation from a teacher, with
labels where there are some, the best state on held-out samples kept, and nothing kept that is worse than the start.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from edgec.errors import EdgecError
from edgec.program import Program, get_weight, is_call
from edgec.sparsity import sparsities

if TYPE_CHECKING:
    from edgec.data import Dataset

aten = torch.ops.aten

# Share of the samples that choose the best state and are not trained on.
HELD_OUT = 0.1
MOST_HELD_OUT = 512
EVALUATIONS = 8
CROP_PADDING = 1 / 8


class Model(Protocol):
    """What `fit` trains: a callable with a state, that may have to be brought back to what is allowed."""

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: dict[str, torch.Tensor]) -> None: ...

    def train(self, mode: bool) -> None: ...

    def project(self) -> None: ...


class Trainable:
    """A copy of a Program with gradients: floating-point weights are trainable, pruned elements stay zero.

    `train(True)` makes batch norms use and update the statistics of the batch, `train(False)` their stored ones.
    """

    def __init__(self, program: Program, momentum: float = 0.1) -> None:
        self.source = program
        self.module: fx.GraphModule = program.edit()
        self.norms = [n for n in self.module.graph.nodes if is_call(n, aten.batch_norm.default)]
        self.momentum = momentum
        self._statistics = {str(a.target) for n in self.norms for a in n.args[3:5] if isinstance(a, fx.Node)}
        self.masks = {path: record.mask for path, record in sparsities(program.annotations).items()}
        self.weights = {path: self._tensor(path) for path in program.weights()}
        for path, weight in self.weights.items():
            weight.requires_grad_(path not in self._statistics and weight.dtype.is_floating_point)

    def _tensor(self, path: str) -> torch.Tensor:
        value: Any = self.module
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.module(*inputs)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def trainable(self) -> dict[str, torch.Tensor]:
        """The weights that get gradients, by path."""
        return {path: w for path, w in self.weights.items() if w.requires_grad}

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: weight decay on matrices and kernels, none on biases and norms."""
        weights = list(self.trainable().values())
        return [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": weight_decay},
            {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
        ]

    def train(self, mode: bool) -> None:
        for norm in self.norms:
            args = list(norm.args)
            args[5], args[6] = mode, self.momentum
            norm.args = tuple(args)
        if self.norms:
            self.module.recompile()

    def project(self) -> None:
        """Put zeros back where weights are pruned."""
        with torch.no_grad():
            for path, mask in self.masks.items():
                self.weights[path].mul_(mask)

    def state(self) -> dict[str, torch.Tensor]:
        return {path: weight.detach().clone() for path, weight in self.weights.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for path, weight in self.weights.items():
                weight.copy_(state[path])

    def program(self) -> Program:
        """The Program with the weights as they are now."""
        self.project()
        self.train(False)
        module = self.source.edit()
        with torch.no_grad():
            for node in module.graph.nodes:
                if node.op == "get_attr":
                    # `+ 0.0` makes -0.0 of a masked element +0.0
                    get_weight(module, node).copy_(self.weights[str(node.target)].detach() + 0)
        return self.source.replace(module)


# -- losses ------------------------------------------------------------------------------------------------------------


def is_classifier(outputs: Sequence[torch.Tensor]) -> bool:
    """One output of scores [N, classes]."""
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1


def kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(teacher/T) || softmax(student/T)) of scores [N, classes], mean over samples."""
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def distillation_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    labels: torch.Tensor | None = None,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
) -> torch.Tensor:
    """(1 - alpha) CE(labels) + alpha T^2 KL(teacher || student) for a classifier; alpha is 1 without labels.

    Other outputs: squared error relative to the teacher's energy, summed over outputs.
    Hinton et al., "Distilling the Knowledge in a Neural Network".
    """
    if not is_classifier(student):
        pairs = zip(student, teacher, strict=True)
        return torch.stack([F.mse_loss(s, t) / t.square().mean().clamp_min(1e-12) for s, t in pairs]).sum()
    loss = kl(teacher[0], student[0], temperature) * temperature**2
    if labels is None or alpha == 1.0:
        return loss
    return (1 - alpha) * F.cross_entropy(student[0], labels) + alpha * loss


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains; lr falls to 0 by a cosine.

    augment: "none", "flip", or "flip-crop" for images [N, C, H, W].
    """

    steps: int = 300
    batch: int = 128
    lr: float = 0.01
    weight_decay: float = 1e-4
    optimizer: str = "sgd"
    alpha: float = 0.9
    temperature: float = 4.0
    augment: str = "none"
    clip: float | None = None
    use_labels: bool = True
    seed: int = 0


@dataclass(frozen=True)
class FitReport:
    """Held-out loss before and after, and the step whose state was kept (0: nothing was better than the start)."""

    before: float
    after: float
    best_step: int
    samples: int


def fit(
    model: Model,
    groups: Iterable[dict[str, Any]],
    teacher: Callable[..., Sequence[torch.Tensor]],
    data: Dataset,
    recipe: Recipe,
    *,
    penalty: Callable[[int], torch.Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
    accept_worse: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> FitReport:
    """Train `model` to follow `teacher` and leave it, in evaluation mode, in its best state on held-out samples.

    groups: torch optimizer groups. penalty(step): an extra term of the loss. after_step(step): runs after `project`.
    accept_worse: keep the last state even if the start was better (schedules that must end somewhere).
    Raises EdgecError when there are fewer than 8 samples or the loss is not finite.
    """
    if len(data) < 8:
        raise EdgecError(f"{len(data)} samples are too few to train on", where=data.name, hint="give at least 8")
    order = np.random.default_rng(recipe.seed).permutation(len(data))
    held = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(data))))
    kept_out, train = np.sort(order[:held]), order[held:]
    generator = torch.Generator().manual_seed(recipe.seed)
    batch = min(recipe.batch, len(train))
    optimizer = _optimizer(groups, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    best_loss = before = _held_out_loss(model, teacher, data, kept_out, batch, recipe)
    best, best_step = copy.deepcopy(model.state()), 0
    batches = _endless(train, batch, recipe.seed)
    every = max(1, math.ceil(recipe.steps / EVALUATIONS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for step in range(1, recipe.steps + 1):
            inputs, labels = _read(data, next(batches), recipe)
            inputs = tuple(_augment(x, recipe.augment, generator) for x in inputs)
            with torch.no_grad():
                wanted = tuple(teacher(*inputs))
            model.train(True)
            loss = distillation_loss(model(*inputs), wanted, labels, alpha=recipe.alpha, temperature=recipe.temperature)
            if penalty is not None:
                loss = loss + penalty(step)
            if not bool(torch.isfinite(loss)):
                raise EdgecError(f"loss is not finite at step {step}", where=data.name, hint="use a smaller lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.clip)
            optimizer.step()
            schedule.step()
            model.project()
            if after_step is not None:
                after_step(step)
            if step % every == 0 or step == recipe.steps:
                held_loss = _held_out_loss(model, teacher, data, kept_out, batch, recipe)
                log(f"step {step}/{recipe.steps}: held-out loss {held_loss:.4g} (start {before:.4g})")
                if held_loss < best_loss or (accept_worse and step == recipe.steps and best_step == 0):
                    best, best_loss, best_step = copy.deepcopy(model.state()), held_loss, step
    model.load(best)
    model.train(False)
    return FitReport(before, best_loss, best_step, len(train))


def _optimizer(groups: Iterable[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    groups = [g for g in groups if g["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)


def _endless(rows: np.ndarray, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Shuffled batches of full size, epoch after epoch."""
    generator = np.random.default_rng(seed + 1)
    while True:
        shuffled = generator.permutation(rows)
        for start in range(0, len(shuffled) - batch + 1, batch):
            yield shuffled[start : start + batch]


def _read(data: Dataset, rows: np.ndarray, recipe: Recipe) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    arrays, targets = data.read(rows)
    classes = recipe.use_labels and targets is not None and targets.dtype.kind in "iu" and targets.ndim == 1
    return tuple(torch.from_numpy(a) for a in arrays), torch.from_numpy(targets) if classes else None  # type: ignore[arg-type]


def _held_out_loss(
    model: Model,
    teacher: Callable[..., Sequence[torch.Tensor]],
    data: Dataset,
    rows: np.ndarray,
    batch: int,
    recipe: Recipe,
) -> float:
    """Mean loss against the teacher alone, T = 1: comparable between recipes and free of labels."""
    model.train(False)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            inputs, _ = _read(data, part, recipe)
            loss = distillation_loss(tuple(model(*inputs)), tuple(teacher(*inputs)), alpha=1.0, temperature=1.0)
            total += float(loss) * len(part)
    return total / len(rows)


def _augment(x: torch.Tensor, how: str, generator: torch.Generator) -> torch.Tensor:
    """Mirror half of the images; with "flip-crop" also shift them by up to an eighth, one shift per image."""
    if how == "none" or x.dim() != 4:
        return x
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if how != "flip-crop":
        return x
    reach = [max(1, round(size * CROP_PADDING)) for size in x.shape[-2:]]
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]))
    rows = torch.randint(0, 2 * reach[0] + 1, (len(x),), generator=generator)
    columns = torch.randint(0, 2 * reach[1] + 1, (len(x),), generator=generator)
    h, w = x.shape[-2:]
    return torch.stack([p[:, r : r + h, c : c + w] for p, r, c in zip(padded, rows.tolist(), columns.tolist())])
