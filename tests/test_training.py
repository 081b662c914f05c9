"""The training loop: losses, masks, the best state, fixed batches, and what is augmented."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import Dataset, load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.program import Program
from edgec.sparsity import Sparsity
from edgec.training import Recipe, Trainable, augment, augmentation, distillation_loss, fit, fixed_batch, kl
from tests import zoo

pytestmark = pytest.mark.pure


class Net(nn.Module):
    """A small classifier with a batch norm and a buffer that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("anchor", torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).amax((2, 3)) + self.anchor)


def teacher(seed: int = 0, batch: int | None = None) -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Net()
        made.fc.weight.data *= 4
        made.bn.momentum = None
        made.train()(torch.randn(64, 3, 16, 16))
        made.eval()
    if batch is None:
        return load_model(made, input_shape=(1, 3, 16, 16), name="net")
    exported = torch.export.export(made, (torch.rand(batch, 3, 16, 16),))
    return Program.from_exported(exported, "net")


def samples(program: Program, n: int = 48, targets: np.ndarray | None = None) -> Dataset:
    x = np.random.default_rng(0).standard_normal((n, *program.inputs[0].shape[1:])).astype(np.float32)
    return load_data(x if targets is None else (x, targets), program.inputs)


def pruned(program: Program, path: str = "conv.weight") -> Program:
    """Every second element of a weight removed."""
    mask = torch.arange(program.weights()[path].numel()).reshape(program.weights()[path].shape) % 2 == 0
    module = program.edit()
    with torch.no_grad():
        module.get_parameter(path).masked_fill_(~mask, 0.0)
    return program.replace(module, {path: Sparsity("unstructured", (1, 1), mask)})


def train(program: Program, model: Any = None, data: Dataset | None = None, given: Any = None, **options: Any):
    """(student, report) after some steps from a pruned `program` back to it."""
    student = Trainable(pruned(program)) if model is None else model
    recipe = Recipe(**{"steps": 12, "batch": 16, "lr": 0.05, **options})
    report = fit(student, student.groups(1e-4), given or program, data or samples(program), recipe)
    return student, report


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(temperature: float) -> None:
    scores = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)) * 5
    student = scores.clone().requires_grad_(True)
    loss = distillation_loss([student], [scores], torch.zeros(8, dtype=torch.long), alpha=1.0, temperature=temperature)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-7


def test_the_gradient_at_temperature_1_is_the_difference_of_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    distillation_loss([ours], [theirs], alpha=1.0, temperature=1.0).backward()
    want = (ours.detach().softmax(1) - theirs.softmax(1)) / 6
    torch.testing.assert_close(ours.grad, want)


def test_the_loss_with_labels_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    ours, theirs = torch.randn(2, 6, 5, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    got = distillation_loss([ours], [theirs], labels, alpha=0.7, temperature=3.0)
    p, q = (theirs / 3).softmax(1), (ours / 3).softmax(1)
    want = 0.3 * F.cross_entropy(ours, labels) + 0.7 * 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(got, want)


def test_scores_with_trailing_axes_and_probabilities_are_class_scores() -> None:
    generator = torch.Generator().manual_seed(3)
    ours, theirs = torch.randn(2, 6, 5, generator=generator)
    want = distillation_loss([ours], [theirs], alpha=1.0, temperature=2.0)
    wide = distillation_loss([ours[..., None, None]], [theirs[..., None, None]], alpha=1.0, temperature=2.0)
    soft = distillation_loss([ours.softmax(1)], [theirs.softmax(1)], alpha=1.0, temperature=2.0)
    torch.testing.assert_close(wide, want)
    torch.testing.assert_close(soft, want)


def test_other_outputs_have_a_relative_squared_error() -> None:
    image, boxes = torch.rand(4, 1, 8, 8), torch.rand(4, 20, 4)
    got = distillation_loss([image * 1.1, boxes * 0.8], [image, boxes])
    assert float(got) == pytest.approx(0.01 + 0.04, rel=1e-4)
    assert float(kl(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))) == 0.0


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_masks_hold_after_every_step_and_zeros_are_positive() -> None:
    program = teacher()
    student = Trainable(pruned(program))
    mask, seen = student.masks["conv.weight"], []

    def look(step: int) -> None:
        seen.append(float(student.weights["conv.weight"].detach()[~mask].abs().max()))
        grad = student.weights["conv.weight"].grad
        assert grad is not None and float(grad[~mask].abs().max()) == 0.0 and float(grad[mask].abs().max()) > 0

    recipe = Recipe(steps=6, batch=16, lr=0.05, clip=1.0)
    report = fit(student, student.groups(1e-2), program, samples(program), recipe, after_step=look)
    assert seen == [0.0] * 6 and report.best_step > 0
    stored = student.program().weights()["conv.weight"]
    assert bool((stored[~mask] == 0).all()) and not bool(torch.signbit(stored[~mask]).any())
    assert bool((stored[mask] != 0).all())


def test_the_loss_falls_and_the_report_is_of_the_state_that_is_kept() -> None:
    program = teacher()
    student, report = train(program, steps=24)
    assert report.after < 0.5 * report.before
    again = fit(student, student.groups(0.0), program, samples(program), Recipe(steps=1, batch=16, lr=0.0))
    assert again.before == pytest.approx(report.after, rel=1e-5)


def test_a_worse_state_is_never_kept() -> None:
    program = teacher()
    start = Trainable(pruned(program)).state()
    student, report = train(program, lr=1e4, steps=3, optimizer="adamw")
    assert report.best_step == 0 and report.after == report.before
    assert all(torch.equal(student.state()[path], value) for path, value in start.items())


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    program = teacher()
    first, second, other = (train(program, seed=seed, augment="flip-crop")[0].state() for seed in (3, 3, 4))
    assert all(torch.equal(first[path], second[path]) for path in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])


def test_buffers_are_constants_and_statistics_follow_the_batches() -> None:
    program = teacher()
    student, _ = train(program)
    before, after = program.weights(), student.state()
    assert torch.equal(after["anchor"], before["anchor"])
    assert not torch.equal(after["bn.running_mean"], before["bn.running_mean"])
    assert not torch.equal(after["bn.weight"], before["bn.weight"])
    frozen, _ = train(program, Trainable(pruned(program), frozen_norms=True), lr=1e-3)
    assert torch.equal(frozen.state()["bn.running_mean"], before["bn.running_mean"])


@pytest.mark.parametrize("batch", [1, 5])
def test_a_fixed_batch_adds_up_the_same_gradients(batch: int) -> None:
    free, fixed = teacher(), teacher(batch=batch)
    assert (fixed_batch(free), fixed_batch(fixed)) == (None, batch)
    data = samples(free, 40)
    states = [
        train(p, Trainable(pruned(p), frozen_norms=True), data, steps=4, batch=5)[0].state() for p in (free, fixed)
    ]
    for path in states[0]:
        torch.testing.assert_close(states[0][path], states[1][path], rtol=1e-4, atol=1e-6)


def test_a_fixed_batch_that_the_samples_do_not_fill_is_refused() -> None:
    fixed = teacher(batch=16)
    with pytest.raises(EdgecError, match="do not fill the model's batch of 16"):
        train(fixed, data=samples(fixed, 12))


def test_too_few_samples_wrong_labels_and_a_wrong_teacher_are_refused() -> None:
    program = teacher()
    with pytest.raises(EdgecError, match="too few"):
        train(program, data=samples(program, 7))
    with pytest.raises(EdgecError, match="4 classes"):
        train(program, data=samples(program, 16, np.full(16, 9)))
    with pytest.raises(EdgecError, match="the teacher's"):
        train(program, given=lambda x: (x.new_zeros(len(x), 6),))
    with pytest.raises(EdgecError, match="not finite"):
        train(program, given=lambda x: (x.new_full((len(x), 4), float("nan")),))


def test_eight_samples_are_enough() -> None:
    program = teacher()
    _, report = train(program, data=samples(program, 8), steps=2)
    assert report.samples == 7


def test_only_class_labels_are_used_as_labels() -> None:
    program = teacher()
    labels = np.arange(48) % 4
    none, same = (train(program, use_labels=use)[0].state() for use in (True, False))
    assert torch.equal(none["fc.weight"], same["fc.weight"])
    used, unused = (
        train(program, data=samples(program, 48, labels), use_labels=use)[0].state() for use in (True, False)
    )
    assert not torch.equal(used["fc.weight"], unused["fc.weight"])
    assert torch.equal(unused["fc.weight"], none["fc.weight"])


def test_targets_that_are_no_classes_mean_values() -> None:
    """Scores of a regression, and outputs like the inputs (an autoencoder), get the squared error."""
    program = teacher()
    data = samples(program, 48, np.zeros((48, 4), np.float32))
    student = Trainable(pruned(program))
    report = fit(student, student.groups(0.0), program, data, Recipe(steps=1, batch=16, lr=0.0))
    x = data.inputs()
    order = np.sort(np.random.default_rng(0).permutation(48)[:5])
    want = distillation_loss(pruned(program)(x[order]), program(x[order]), scores=False)
    assert report.before == pytest.approx(float(want), rel=1e-5)
    net = zoo.program("mlp")
    encoder = Trainable(net)
    given = fit(encoder, encoder.groups(0.0), lambda x: (2 * net(x)[0],), zoo.calibration("mlp"), Recipe(1, lr=0.0))
    assert given.before == pytest.approx(0.25, rel=1e-4)


def test_stored_teacher_outputs_give_what_computing_them_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    program, calls = teacher(), []

    def counting(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(len(x))
        return program(x)

    cached, _ = train(program, given=counting, steps=20)
    few = sum(calls)
    monkeypatch.setattr("edgec.training.CACHE_BYTES", 0)
    computed, _ = train(program, given=counting, steps=20)
    assert few < 0.5 * (sum(calls) - few)
    for path, value in cached.state().items():
        torch.testing.assert_close(value, computed.state()[path], rtol=1e-4, atol=1e-6)


def test_operators_without_a_gradient_are_named() -> None:
    program = teacher()
    student = Trainable(pruned(program))
    for weight in student.weights.values():
        weight.requires_grad_(False)
    with pytest.raises(EdgecError, match="no gradient"):
        spare = torch.zeros(1, requires_grad=True)
        fit(student, [{"params": [spare]}], program, samples(program), Recipe(steps=1, batch=8))


# -- augmentation ------------------------------------------------------------------------------------------------------


def test_only_images_are_augmented() -> None:
    assert augmentation("auto", (8, 3, 32, 32)) == ("flip-crop", 1)
    assert augmentation("auto", (8, 32, 32, 3)) == ("flip-crop", 3)
    assert augmentation("auto", (8, 1, 28, 28))[0] == "none"
    assert augmentation("flip", (8, 1, 28, 28))[0] == "flip"
    for shape in ((8, 1, 49, 10), (8, 640), (8, 197, 192), (8, 64, 32, 32)):
        assert augmentation("flip-crop", shape)[0] == "none"


def test_inputs_of_a_sample_move_together_and_values_stay_values() -> None:
    x = torch.arange(6 * 3 * 16 * 16, dtype=torch.float32).reshape(6, 3, 16, 16)
    last = x.movedim(1, 3).contiguous()
    how = [("flip-crop", 1), ("flip-crop", 3), ("none", 1)]
    a, b, c = augment((x, last, x), how, torch.Generator().manual_seed(0))
    assert torch.equal(a, b.movedim(3, 1)) and c is x
    assert a.shape == x.shape and set(a.unique().tolist()) <= set(x.unique().tolist())
    moved = [not torch.equal(before, after) for before, after in zip(x, a, strict=True)]
    assert sum(moved) >= 4
    for before, after in zip(x, a, strict=True):
        assert set(after.unique().tolist()) <= set(before.unique().tolist())


def test_mixtures_lie_between_two_images() -> None:
    # Each image has one value of its own, which mirroring and shifting leave.
    x = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()
    (y,) = augment((x,), [("mix", 1)], torch.Generator().manual_seed(0))
    values, before = y[:, 0, 0, 0], torch.arange(8.0).roll(1)
    assert torch.equal(y, values.reshape(8, 1, 1, 1).expand_as(y))
    low, high = torch.minimum(torch.arange(8.0), before), torch.maximum(torch.arange(8.0), before)
    assert bool(((values > low) & (values < high)).all())


def test_half_of_the_images_are_mirrored() -> None:
    x = torch.rand(200, 3, 16, 16)
    (y,) = augment((x,), [("flip", 1)], torch.Generator().manual_seed(0))
    same = [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, y, strict=True)]
    assert all(s or m for s, m in zip(same, mirrored, strict=True)) and 70 < sum(mirrored) < 130


def test_a_recipe_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 1  # type: ignore[misc]
