"""Outlier channels: what is found, that the float function stays, and what it is worth in int8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.frontend import load_model
from edgec.passes.quantization.outliers import find_layers, find_outliers, separate
from edgec.program import layer_of, propagate
from edgec.quantparams import ChannelMinMax
from tests.passes.quantization.helpers import by_definition, noise, quantised

pytestmark = pytest.mark.pure
HIDDEN = 128


class Block(nn.Module):
    """A residual MLP on tokens whose hidden unit 5 carries a large constant, as in trained transformers."""

    def __init__(self, function=F.gelu, gated: bool = False, residual: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.gate = nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, 8), nn.Linear(8, HIDDEN)
        self.norm, self.function, self.gated, self.residual = nn.LayerNorm(8), function, gated, residual
        with torch.no_grad():
            self.fc1.bias[5] = 120.0
            self.fc2.weight[:, 5] *= 0.01
            self.gate.bias[5] = 1.0

    def forward(self, x):
        y = self.function(self.fc1(self.norm(x)))
        y = self.fc2(y * self.gate(x) if self.gated else y)
        return self.norm(x + y if self.residual else y).flatten(1)


def samples(seed: int = 0) -> torch.Tensor:
    return noise(8, 6, 8, seed=seed)


def seen(*columns: list[float]) -> ChannelMinMax:
    extremes = ChannelMinMax(-1)
    extremes.update(torch.tensor(columns).T[None])
    return extremes


@pytest.mark.parametrize(
    "reach,expected",
    [
        ([1.0, -9.0, 4.0] + [1.0] * 61, (1,)),
        ([1.0, 9.0, 5.0] + [1.0] * 61, None),  # one of 64 may go, and the next is more than half of it
        ([1.0, 9.0, 5.0] + [1.0] * 125, (1, 2)),
        ([9.0] + [0.0] * 63, None),
        ([0.0] * 64, None),
        ([9.0, 1.0], (0,)),
        ([3.0], None),
    ],
)
def test_outliers_are_rare_and_far_from_the_rest(reach, expected):
    found = find_outliers(seen(*([v, 0.5 * v] for v in reach)))
    assert (None if found is None else found.channels) == expected
    if found is not None:
        assert found.reach == 9.0 and found.rest <= 4.5


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_float_function_stays(gated: bool, residual: bool):
    program = load_model(Block(gated=gated, residual=residual).eval(), input_shape=(1, 6, 8))
    module = program.edit()
    (layer,) = find_layers(module)
    assert layer_of(layer) == "fc2"
    side = separate(module, layer, (5, 77))
    propagate(module, program.example_inputs)
    module.graph.lint()
    module.recompile()
    (got,), (want,) = program.replace(module)(samples()), program(samples())
    assert (got - want).abs().max() < 1e-5
    assert layer_of(side) == "fc2.outliers" and side.args[0].meta["val"].shape[-1] == 2  # type: ignore[union-attr]
    values = program.replace(module).weights()
    assert not values["fc2.weight"][:, [5, 77]].any() and not values["fc1.weight"][[5, 77]].any()
    assert program.weights()["fc1.bias"][5] == 120.0, "the program that was given is another one"


def test_int8_with_an_outlier_is_as_good_as_without():
    apart = quantised(Block(), samples())
    together = quantised(Block(), samples(), outliers=False)
    assert apart.error < 0.02 < 3 * 0.02 < together.error
    (reason,) = [s.reason for s in apart.context.skipped if (s.layer, s.what) == ("fc2.outliers", "linear")]
    assert reason.startswith("multiplies 1 of 128 input channels in float: they reach 12")
    assert "fc2.outliers" in apart.after.annotations["quantize-int8"].kept_float  # type: ignore[attr-defined]
    # The hidden units are computed by int8 layers; what they are multiplied with is stored in float.
    assert apart.operators.count("qlinear_float") == 3 and apart.operators.count("linear") == 1
    assert apart.after.weights()["fc2.weight_outliers"].shape == (8, 1)
    for got, want in zip(apart.after(samples(3)), by_definition(apart.after, samples(3)), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_layers_kept_float_and_integer_programs_are_left_alone():
    assert "linear" not in quantised(Block(), samples(), nonlinear="integer").operators
    kept = quantised(Block(), samples(), keep_float=("fc2",))
    assert kept.operators.count("linear") == 1 and "fc2.weight_outliers" not in kept.after.weights()


class Shared(nn.Module):
    """Nothing here can be taken apart: what fc2 reads has another reader, mixes channels or is no linear layer's."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.case = nn.Linear(8, 8), nn.Linear(8, 8), case

    def forward(self, x):
        y = F.gelu(self.fc1(x))
        if self.case == "second reader":
            return self.fc2(y) + y.sum(-1, keepdim=True)
        if self.case == "mixed":
            return self.fc2(F.layer_norm(y, (8,)))
        if self.case == "moved":
            return self.fc2(y.flip(-1))
        if self.case == "tied":
            return self.fc1(y)
        if self.case == "input":
            return self.fc2(F.gelu(x)) + y
        return self.fc2(self.fc1(x))


@pytest.mark.parametrize("case", ["second reader", "mixed", "moved", "tied", "input", "no function"])
def test_what_cannot_be_taken_apart(case: str):
    assert find_layers(load_model(Shared(case).eval(), input_shape=(1, 8)).edit()) == []
