"""Training at few bits: it helps, steps freeze, integers are what was trained."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.quantization.fakequant import FakeQuantGraph, LearnedStepWeight
from edgec.passes.quantization.ptq import RangeFinder, activation_bits, convert, observe, uniform_bits
from edgec.passes.quantization.qat import Qat, QatSummary, Student
from edgec.passes.quantization.reconstruct import Reconstruct, given_rule, make_weight
from edgec.program import Program
from edgec.quantparams import mse_scales
from tests.passes.quantization import lowbit

pytestmark = pytest.mark.pure
QUICK = Qat(weights=2, activations=4, steps=150, lr=2e-3, augment="none")


@functools.cache
def made(step: Qat) -> Program:
    return step.run(lowbit.program(), lowbit.context())


def summary(program: Program) -> QatSummary:
    return program.annotations["qat"]


def test_training_beats_rounding():
    x = lowbit.images(256, seed=9)
    trained = made(QUICK)
    start = Reconstruct(weights=2, activations=4, method="mse").run(lowbit.program(), lowbit.context())
    report = summary(trained).fit
    assert report.after < 0.5 * report.before and report.best_step > 0
    assert lowbit.float_error(lowbit.program(), trained, x) < 0.8 * lowbit.float_error(lowbit.program(), start, x)
    assert summary(trained).bits["conv1"] == (2, 4) and summary(trained).bits["fc"] == (8, 8)
    for codes, record in lowbit.weight_codes(trained).values():
        assert record.n <= int(codes.min()) and int(codes.max()) <= record.p
    for codes, record in lowbit.code_values(trained, x).values():
        assert record.n <= int(codes.min()) and int(codes.max()) <= record.p


def test_frozen_steps_do_not_move():
    floats = lowbit.program().weights()
    frozen = made(dataclasses.replace(QUICK, freeze=0.0, steps=30))
    learned = made(dataclasses.replace(QUICK, freeze=1.0, steps=30))
    for name, (_, record) in lowbit.weight_codes(frozen).items():
        scales = mse_scales(floats[f"{name}.weight"].numpy(), True, record.bits)
        assert list(record.scale) == scales.tolist()  # type: ignore[arg-type]
        other = lowbit.weight_codes(learned)[name][1]
        assert other.scale != record.scale
    x = lowbit.images(4)
    few = {n: r for n, (_, r) in lowbit.code_values(frozen, x).items() if r.bits == 4}
    assert len(few) == 3
    for name, record in few.items():
        other = learned.annotations[name]
        assert other.scale != record.scale and "learned" in other.source and "learned" not in record.source


def test_without_a_better_step_the_start_is_exported():
    """A rate of zero: nothing moves, which is plain rounding with ranges of least squared error."""
    context = lowbit.context()
    program = dataclasses.replace(QUICK, lr=0.0, steps=3).run(lowbit.program(), context)
    assert summary(program).fit.best_step == 0
    assert [s.reason for s in context.skipped if s.what == "training"]
    start = Reconstruct(weights=2, activations=4, method="mse").run(lowbit.program(), lowbit.context())

    def graph(p: Program) -> list[str]:
        return [line for line in p.text().splitlines() if not line.startswith("  #")]

    assert graph(program) == graph(start)


def student(weights: int = 3, activations: int = 4) -> Student:
    prepared = lowbit.prepared()
    given = uniform_bits(prepared, weights, activations)
    observed = observe(prepared, lowbit.data(), Context(), RangeFinder(), activation_bits(prepared, given))
    learned = {n: make_weight(LearnedStepWeight, prepared, n, given[n]) for n in prepared.layers}
    return Student(FakeQuantGraph(prepared, observed, learned), learned)


def test_the_state_of_a_student_is_all_that_it_trains():
    one, other, x = student(), student(), lowbit.images(8)
    with torch.no_grad():
        for group in one.groups(0.1):
            for tensor in group["params"]:
                tensor.mul_(1.1)
        before = other(x)[0].clone()
        other.load(one.state())
        assert torch.equal(one(x)[0], other(x)[0]) and not torch.equal(before, other(x)[0])
    trained = {id(t) for g in one.groups(0.1) for t in g["params"]}
    assert len(trained) == len(one.state())
    one.freeze_steps()
    kept = sum(len(g["params"]) for g in one.groups(0.1))
    assert kept == 12  # weights and biases of six layers


def test_the_integers_are_what_was_trained():
    """The student's outputs and those of its integer network differ by far less than those of student and teacher."""
    trained, x = student(activations=8), lowbit.images(64, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in trained.groups(0.1):
            for tensor in group["params"]:
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))
        (fake,) = trained(x)
    trained.write_biases()
    graph = trained.graph
    made = convert(graph.prepared, graph.results(), lambda n: given_rule(trained.weights[n]), "RQ1").finish({})
    (got,), (teacher,) = made(x), lowbit.program()(x)
    assert (got - fake).square().mean() < 0.01 * (fake - teacher).square().mean()


def test_labels_matter_where_there_are_some():
    images = lowbit.images(64)
    labels = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(0))
    labelled = load_data((images.numpy(), labels.numpy()), lowbit.program().inputs)
    step = dataclasses.replace(QUICK, steps=16, alpha=0.1, freeze=1.0)
    results = []
    for use in (True, False):
        context = Context(training=labelled, calibration=labelled, teacher=lowbit.program())
        results.append(dataclasses.replace(step, labels=use).run(lowbit.program(), context).text())
    assert results[0] != results[1]


def test_a_teacher_is_needed():
    with pytest.raises(EdgecError, match="pass qat: needs a teacher"):
        Qat().run(lowbit.program(), Context(calibration=lowbit.data()))


def test_weakening_ends_at_eight_bits():
    assert Qat(weights=4, activations=6).weaken(0.0) == Qat(weights=8, activations=8)
    assert Qat(weights=4, activations=6).weaken(1.0) == Qat(weights=4, activations=6)
