"""What every pass promises, for each registered pass on each model of the zoo; a new pass needs no edit here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from edgec.cost import program_cost
from edgec.errors import EdgecError
from edgec.passbase import Context, Needs, Pass
from edgec.pipeline import Pipeline, spell_pass
from edgec.program import Program
from edgec.registry import load_pass, pass_entries
from tests import zoo

pytestmark = pytest.mark.pure

PASSES = sorted(pass_entries())
# Of the outputs of all samples together. One int8 layer after another costs a few per mille; a wrong graph far more.
MIN_COSINE = 0.98
# Training for longer is not another contract.
FEW = {"steps": 6, "epochs": 1}


def context(model: str) -> Context:
    return Context(calibration=zoo.calibration(model), teacher=zoo.program(model), seed=0)


def quick(name: str) -> Pass:
    """The pass with its default options, but few steps of training."""
    cls = load_pass(name)
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{option: value for option, value in FEW.items() if option in names})


@functools.cache
def applied(name: str, model: str) -> tuple[Program, Context]:
    """The pass on a model of the zoo."""
    given = context(model)
    return quick(name).run(zoo.program(model), given), given


def assert_same_weights(a: Program, b: Program) -> None:
    left, right = a.weights(), b.weights()
    assert list(left) == list(right)
    for path in left:
        assert left[path].dtype == right[path].dtype and torch.equal(left[path], right[path]), path


@pytest.mark.parametrize("model", zoo.names())
@pytest.mark.parametrize("name", PASSES)
class TestEveryPassOnEveryModel:
    def test_the_result_verifies_and_keeps_the_signature(self, name: str, model: str) -> None:
        before, (after, _) = zoo.program(model), applied(name, model)
        again = after.replace(after.edit())
        assert again.text() == after.text()
        assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
        assert (after.name, after.dynamic_batch) == (before.name, before.dynamic_batch)

    def test_the_function_stays_close(self, name: str, model: str) -> None:
        before, (after, _) = zoo.program(model), applied(name, model)
        for batch in (1, 16):
            x = torch.rand(batch, *zoo.ZOO[model].shape[1:], generator=torch.Generator().manual_seed(3))
            for want, got in zip(before(x), after(x), strict=True):
                assert got.shape == want.shape and bool(torch.isfinite(got).all())
                cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
                assert cosine > MIN_COSINE or not load_pass(name).faithful

    def test_the_input_is_not_touched(self, name: str, model: str) -> None:
        program = zoo.program(model)
        text, annotations = program.text(), dict(program.annotations)
        weights = {path: weight.clone() for path, weight in program.weights().items()}
        after, _ = applied(name, model)
        quick(name).run(program, context(model))
        assert program.text() == text
        assert dict(program.annotations) == annotations
        for path, weight in program.weights().items():
            assert torch.equal(weight, weights[path]), path
        shared = {w.data_ptr() for w in program.weights().values()}
        changed = {w.data_ptr() for w in after.weights().values()}
        assert after is program or not shared & changed

    def test_the_result_is_deterministic(self, name: str, model: str) -> None:
        (first, seen), again = applied(name, model), context(model)
        second = quick(name).run(zoo.program(model), again)
        assert second.text() == first.text()
        assert second.annotations == first.annotations
        assert_same_weights(second, first)
        assert again.skipped == seen.skipped

    def test_nothing_is_skipped_in_silence(self, name: str, model: str) -> None:
        _, seen = applied(name, model)
        for skip in seen.skipped:
            assert skip.layer and skip.what and skip.reason

    def test_it_makes_no_more_work(self, name: str, model: str) -> None:
        before, (after, _) = zoo.program(model), applied(name, model)
        assert program_cost(after).macs <= program_cost(before).macs

    def test_a_second_run_is_refused_or_works(self, name: str, model: str) -> None:
        once, _ = applied(name, model)
        try:
            twice = quick(name).run(once, context(model))
        except EdgecError:
            return
        assert (twice.inputs, twice.outputs) == (once.inputs, once.outputs)


def variants(cls: type[Pass]) -> list[Pass]:
    """The pass with its defaults, and with each option at each of its choices and limits."""
    found = [cls()]
    for field in dataclasses.fields(cls):
        meta = field.metadata
        values: list[Any] = list(meta.get("choices") or ())
        values += [type(field.default)(meta[end]) for end in ("low", "high") if meta.get(end) is not None]
        values += [not field.default] if isinstance(field.default, bool) else []
        found += [cls(**{field.name: value}) for value in values]
    return found


@pytest.mark.parametrize("name", PASSES)
def test_the_spelling_round_trips(name: str) -> None:
    for step in variants(load_pass(name)):
        assert Pipeline.parse(spell_pass(step)) == Pipeline((step,))


@pytest.mark.parametrize("name", PASSES)
def test_options_beyond_their_limits_are_refused(name: str) -> None:
    cls = load_pass(name)
    for field in dataclasses.fields(cls):
        for end, step in (("low", -1), ("high", 1)):
            if field.metadata.get(end) is not None:
                with pytest.raises(EdgecError, match=field.name):
                    cls(**{field.name: field.metadata[end] + step})
        if field.metadata.get("choices"):
            with pytest.raises(EdgecError, match="is not a choice"):
                cls(**{field.name: "no such choice"})


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_immutable_and_comparable(name: str) -> None:
    cls = load_pass(name)
    assert cls() == cls() and hash(cls()) == hash(cls())
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), field.name, field.default)


@pytest.mark.parametrize("name", [n for n in PASSES if Needs.CALIBRATION in load_pass(n).needs])
def test_missing_calibration_data_is_named(name: str) -> None:
    with pytest.raises(EdgecError, match="needs calibration data"):
        load_pass(name)().run(zoo.program("conv_bn_relu"), Context())


@pytest.mark.parametrize("name", PASSES)
def test_weaken_goes_from_nothing_to_the_pass_itself(name: str) -> None:
    step = load_pass(name)()
    if step.weaken(0.5) is None:
        return
    assert step.weaken(1.0) == step
    for amount in (0.0, 0.25, 0.5):
        assert isinstance(step.weaken(amount), type(step))
