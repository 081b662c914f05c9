"""Training a Program for minutes on a CPU: the machinery of fine-tuning, QAT, mask search and schedule learning.

`Trainable` is a Program's graph with gradients, its masks held; `fit` is the loop: distillation from a teacher, with
labels where there are some, the best state on held-out samples kept, and nothing kept that is worse than the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from edgec.data import check_class_labels
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
# Crops move an image by up to this share of its size.
CROP_REACH = 1 / 8
# Smaller things with four axes (spectrograms, MFCCs) are not taken for images.
SMALLEST_IMAGE = 16
AUGMENT = ("auto", "none", "flip", "flip-crop", "mix")
# A batch is at most this share of the samples, so that steps of a small set differ from each other.
LARGEST_BATCH = 0.25
# With fewer samples in a call, batch norms keep their stored statistics: those of the batch are too noisy.
FEWEST_FOR_STATISTICS = 8
# Teacher outputs are stored when the samples are not augmented and the outputs of all take no more than this.
CACHE_BYTES = 256 << 20
# Smallest probability of a model that ends in a softmax.
SMALLEST = 1e-8


class Model(Protocol):
    """What `fit` trains: a callable with a state, that may have to be brought back to what is allowed.

    `state` is a copy; `project` is called after every optimizer step.
    """

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: dict[str, torch.Tensor]) -> None: ...

    def train(self, mode: bool) -> None: ...

    def project(self) -> None: ...


class Trainable:
    """A copy of a Program with gradients: floating-point parameters are trainable, pruned elements stay zero.

    Buffers (anchors, attention masks, statistics) and integer weights stay as they are. `train(True)` makes batch
    norms use the statistics of the batch and update the stored ones, `train(False)` makes them use the stored ones;
    with `frozen_norms` they use those always. Pruned elements get no gradient.

    Weights and maps lie channels last where the graph runs so: a step of a convolutional network takes 0.7 of the time.
    """

    def __init__(self, program: Program, momentum: float = 0.1, frozen_norms: bool = False) -> None:
        self.source = program
        self.module: fx.GraphModule = program.edit()
        norms = [n for n in self.module.graph.nodes if is_call(n, aten.batch_norm.default)]
        self.norms = [] if frozen_norms else norms
        self.momentum = momentum
        self.training = False
        statistics = {str(a.target) for n in norms for a in n.args[3:5] if isinstance(a, fx.Node)}
        self.masks = {path: record.mask for path, record in sparsities(program.annotations).items()}
        self.weights = {path: self._tensor(path) for path in program.weights()}
        for path, weight in self.weights.items():
            parameter = isinstance(weight, torch.nn.Parameter) and weight.dtype.is_floating_point
            weight.requires_grad_(parameter and path not in statistics)
            if weight.requires_grad and path in self.masks:
                weight.register_hook(self.masks[path].__mul__)
        self._layout = torch.contiguous_format
        self._try_channels_last()

    def _try_channels_last(self) -> None:
        """Views that join axes of a map need it channels first."""
        maps = [w for w in self.weights.values() if w.dim() == 4]
        if not maps:
            return
        self._store(maps, torch.channels_last)
        try:
            with torch.no_grad():
                self(*self.source.batch_inputs(2))
        except RuntimeError:
            self._store(maps, torch.contiguous_format)

    def _store(self, maps: Sequence[torch.Tensor], layout: torch.memory_format) -> None:
        self._layout = layout
        for weight in maps:
            weight.data = weight.data.contiguous(memory_format=layout)

    def _tensor(self, path: str) -> torch.Tensor:
        value: Any = self.module
        for part in path.split("."):
            value = getattr(value, part)
        return value

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.module(*(x.contiguous(memory_format=self._layout) if x.dim() == 4 else x for x in inputs))
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
        if mode == self.training:
            return
        self.training = mode
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
    """One output of scores [N, classes], or [N, classes, 1, ...]."""
    return len(outputs) == 1 and outputs[0].dim() >= 2 and outputs[0].shape[1] > 1 and outputs[0][0, 0].numel() == 1


def kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(softmax(teacher/T) || softmax(student/T)) of scores [N, classes], mean over samples.

    Where the teacher gives probabilities (its graph ends in a softmax), their logarithms are the scores of both.
    """
    if _are_probabilities(teacher):
        teacher, student = (x.clamp_min(SMALLEST).log() for x in (teacher, student))
    log_q = F.log_softmax(student / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    # not F.kl_div: the gradient is exactly zero where the two are equal
    return (log_p.exp() * (log_p - log_q)).sum() / len(teacher)


def _are_probabilities(scores: torch.Tensor) -> bool:
    return bool((scores >= 0).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all())


def distillation_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    labels: torch.Tensor | None = None,
    *,
    alpha: float = 0.9,
    temperature: float = 4.0,
    scores: bool | None = None,
) -> torch.Tensor:
    """(1 - alpha) CE(labels) + alpha T^2 KL(teacher || student) for a classifier; alpha is 1 without labels.

    Other outputs: squared error relative to the teacher's energy, summed over outputs.
    scores: whether the output is one of class scores; by default, whether `is_classifier` says so.
    Hinton et al., "Distilling the Knowledge in a Neural Network".
    """
    if not (is_classifier(teacher) if scores is None else scores):
        pairs = zip(student, teacher, strict=True)
        return torch.stack([F.mse_loss(s, t) / t.square().mean().clamp_min(1e-12) for s, t in pairs]).sum()
    ours, theirs = student[0].flatten(1), teacher[0].flatten(1)
    loss = kl(theirs, ours, temperature) * temperature**2
    if labels is None or alpha == 1.0:
        return loss
    if _are_probabilities(theirs):
        ours = ours.clamp_min(SMALLEST).log()
    return (1 - alpha) * F.cross_entropy(ours, labels) + alpha * loss


# -- the loop ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains; lr falls to 0 by a cosine.

    batch: samples in a step, at most a quarter of all. augment: for images, [N, C, H, W] or [N, H, W, C] with 1, 3 or 4
    channels and at least 16 pixels on each side: "none", "flip" (mirror half of them), "flip-crop" (also shift them),
    "mix" (also add another image of the batch, in random shares that sum to one; the teacher says what the mixture is,
    labels are not used), or "auto", "flip-crop" for 3 channels and "none" else, since digits and spectrograms must not
    be mirrored. Mixtures: Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022.
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
    When the teacher is a Program of a fixed batch, both get batches of that size and gradients add up over a step.
    Raises EdgecError when there are fewer than 8 samples, labels do not fit the classes, the model has no gradient, or
    the loss is not finite.
    """
    if len(data) < 8:
        raise EdgecError(f"{len(data)} samples are too few to train on", where=data.name, hint="give at least 8")
    order = np.random.default_rng(recipe.seed).permutation(len(data))
    held = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(data))))
    kept_out, train = np.sort(order[:held]), order[held:]
    batch = max(1, min(recipe.batch, len(train), max(FEWEST_FOR_STATISTICS, int(LARGEST_BATCH * len(train)))))
    source = _Teacher(teacher, data, recipe)
    if source.fixed is not None:
        batch = max(source.fixed, batch - batch % source.fixed)
        if batch > len(train):
            raise EdgecError(
                f"{len(data)} samples do not fill the model's batch of {batch}",
                where=data.name,
                hint="give more samples, or export the model with a dynamic batch",
            )
    optimizer = _optimizer(groups, recipe)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    best_loss = before = _held_out_loss(model, source, kept_out, batch)
    if not math.isfinite(before):
        raise EdgecError("the model's outputs are not finite before training", where=data.name)
    best, best_step = model.state(), 0
    batches = _endless(train, batch, recipe.seed)
    every = max(1, math.ceil(recipe.steps / EVALUATIONS))
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for step in range(1, recipe.steps + 1):
            model.train(True)
            optimizer.zero_grad(set_to_none=True)
            _backward(model, source, next(batches), generator, penalty, step)
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], recipe.clip)
            optimizer.step()
            schedule.step()
            model.project()
            if after_step is not None:
                after_step(step)
            if step % every == 0 or step == recipe.steps:
                held_loss = _held_out_loss(model, source, kept_out, batch)
                log(f"step {step}/{recipe.steps}: held-out loss {held_loss:.4g} (start {before:.4g})")
                if held_loss < best_loss or (accept_worse and step == recipe.steps and best_step == 0):
                    best, best_loss, best_step = model.state(), held_loss, step
    model.load(best)
    model.train(False)
    return FitReport(before, best_loss, best_step, len(train))


class _Teacher:
    """The samples with what the teacher makes of them; outputs are stored where they come again and fit in memory.

    fixed: the batch that model and teacher must be called with, or None. scores: the output is one of class scores.
    """

    def __init__(self, function: Callable[..., Sequence[torch.Tensor]], data: Dataset, recipe: Recipe) -> None:
        self.function, self.data, self.recipe = function, data, recipe
        self.fixed = fixed_batch(function) if isinstance(function, Program) else None
        size = self.fixed or 1
        arrays, targets = data.read(np.arange(size) % len(data))
        outputs = self(*(torch.from_numpy(a) for a in arrays))
        classes = targets is not None and targets.dtype.kind in "iu" and targets.ndim == 1
        # an autoencoder's outputs look like scores
        same = any(a.shape[1:] == tuple(outputs[0].shape[1:]) for a in arrays)
        self.scores = is_classifier(outputs) and (classes or (targets is None and not same))
        self.labels = self.scores and classes and recipe.use_labels and recipe.alpha < 1
        if self.labels:
            labels = data.targets()
            assert labels is not None
            check_class_labels(labels, outputs[0].shape[1], data.name)
        self.how = [augmentation(recipe.augment, a.shape) for a in arrays]
        self.augmented = any(how != "none" for how, _ in self.how)
        numbers = sum(y.numel() for y in outputs) // size
        self.stored: dict[int, list[torch.Tensor]] | None = {} if 4 * numbers * len(data) <= CACHE_BYTES else None

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return tuple(self.function(*inputs))

    def read(
        self, rows: np.ndarray, generator: torch.Generator | None = None
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor | None]:
        """(inputs, the teacher's outputs, labels or None) of samples, augmented if there is a generator."""
        arrays, targets = self.data.read(rows)
        inputs = tuple(torch.from_numpy(a) for a in arrays)
        labels = torch.from_numpy(np.asarray(targets, np.int64)) if self.labels else None
        if generator is not None and self.augmented:
            inputs = augment(inputs, self.how, generator)
            mixed = any(how == "mix" for how, _ in self.how)
            return inputs, self(*inputs), None if mixed else labels
        if self.stored is None:
            return inputs, self(*inputs), labels
        if any(int(row) not in self.stored for row in rows):
            outputs = self(*inputs)
            if any(y.dim() == 0 or len(y) != len(rows) for y in outputs):  # an output without a batch axis
                self.stored = None
                return inputs, outputs, labels
            for index, row in enumerate(rows):
                self.stored[int(row)] = [y[index].clone() for y in outputs]
        kept = [self.stored[int(row)] for row in rows]
        return inputs, tuple(torch.stack(y) for y in zip(*kept, strict=True)), labels


def fixed_batch(program: Program) -> int | None:
    """The batch size that the graph is made for, or None when any will do."""
    return None if program.dynamic_batch else int(program.example_inputs[0].shape[0])


def _backward(
    model: Model,
    source: _Teacher,
    rows: np.ndarray,
    generator: torch.Generator,
    penalty: Callable[[int], torch.Tensor] | None,
    step: int,
) -> None:
    """Gradients of one step, in as many calls as the model needs."""
    size = source.fixed or len(rows)
    for start in range(0, len(rows), size):
        inputs, wanted, labels = source.read(rows[start : start + size], generator)
        outputs = tuple(model(*inputs))
        _check_outputs(outputs, wanted, source.data.name)
        recipe = source.recipe
        loss = distillation_loss(
            outputs, wanted, labels, alpha=recipe.alpha, temperature=recipe.temperature, scores=source.scores
        )
        loss = loss * (size / len(rows))
        if penalty is not None and start == 0:
            loss = loss + penalty(step)
        if not bool(torch.isfinite(loss)):
            raise EdgecError(f"loss is not finite at step {step}", where=source.data.name, hint="use a smaller lr")
        try:
            loss.backward()
        except RuntimeError as error:
            # the graph has operators of edgec without a gradient between all weights and the outputs
            raise EdgecError(
                f"has no gradient: {str(error).splitlines()[0]}", where="training", hint="train before quantising"
            ) from error


def _check_outputs(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], where: str) -> None:
    shapes = [[tuple(y.shape) for y in side] for side in (outputs, wanted)]
    if shapes[0] != shapes[1]:
        raise EdgecError(f"outputs have shapes {shapes[0]}, the teacher's {shapes[1]}", where=where)


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


def _held_out_loss(model: Model, source: _Teacher, rows: np.ndarray, batch: int) -> float:
    """Mean loss against the teacher alone, T = 1: comparable between recipes and free of labels."""
    model.train(False)
    total = 0.0
    size = source.fixed or batch
    with torch.no_grad():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            # a fixed batch is filled up by going round; what is too much is not counted
            full = np.resize(part, source.fixed) if source.fixed else part
            inputs, wanted, _ = source.read(full)
            outputs = tuple(model(*inputs))
            _check_outputs(outputs, wanted, source.data.name)
            if len(full) != len(part):
                outputs, wanted = (tuple(y[: len(part)] for y in side) for side in (outputs, wanted))
            loss = distillation_loss(outputs, wanted, alpha=1.0, temperature=1.0, scores=source.scores)
            total += float(loss) * len(part)
    return total / len(rows)


# -- augmentation ------------------------------------------------------------------------------------------------------


def augmentation(how: str, shape: Sequence[int]) -> tuple[str, int]:
    """(what to do with inputs of this shape, one of AUGMENT but "auto"; their channel axis, 1 or 3)."""
    axis = next((a for a in (1, 3) if len(shape) == 4 and shape[a] in (1, 3, 4)), None)
    if axis is None or min(n for a, n in enumerate(shape) if a not in (0, axis)) < SMALLEST_IMAGE:
        return "none", 1
    if how == "auto":
        how = "flip-crop" if shape[axis] == 3 else "none"
    return how, axis


def augment(
    inputs: Sequence[torch.Tensor], how: Sequence[tuple[str, int]], generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Mirror half of the images and shift them by up to an eighth, all inputs of a sample alike; edges are mirrored.

    "mix": then add the image before, in shares that are drawn for each sample.
    """
    n = len(inputs[0])
    mirrored = torch.rand(n, generator=generator) < 0.5
    shifts = torch.rand(2, n, generator=generator)
    mixing = any(what == "mix" for what, _ in how)
    shares = torch.rand(n, 1, 1, 1, generator=generator) if mixing else None
    result = []
    for x, (what, axis) in zip(inputs, how, strict=True):
        if what == "none":
            result.append(x)
            continue
        x = x.movedim(axis, 1)
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if what in ("flip-crop", "mix"):
            h, w = x.shape[-2:]
            down, right = (max(1, round(size * CROP_REACH)) for size in (h, w))
            padded = F.pad(x, (right, right, down, down), mode="reflect")
            rows, columns = (
                (shift * (2 * reach + 1)).long().clamp_max(2 * reach).tolist()
                for shift, reach in zip(shifts, (down, right), strict=True)
            )
            x = torch.stack([p[:, r : r + h, c : c + w] for p, r, c in zip(padded, rows, columns, strict=True)])
        if what == "mix" and shares is not None:
            x = shares * x + (1 - shares) * x.roll(1, 0)
        result.append(x.movedim(1, axis).contiguous())
    return tuple(result)
