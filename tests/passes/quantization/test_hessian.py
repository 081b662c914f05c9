"""observer=hessian: squared gradients are those of the prediction's divergence, and ranges fit what matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgec import regions as regions
from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.quantization.calibrate import calibrate_by_gradients
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import Program, is_call, placeholders
from edgec.quantparams import Hessian, make_observer
from tests import zoo

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec


def gaussian(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


class Kept:
    """A watcher that remembers everything."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def update(self, values: torch.Tensor, weights: torch.Tensor) -> None:
        self.values.append(values)
        self.weights.append(weights)


# -- the observer ------------------------------------------------------------------------------------------------------


def weighted_error(values: torch.Tensor, weights: torch.Tensor, low: float, high: float) -> float:
    scale = max((high - low) / 255, 1e-9)
    codes = (values.double() / scale).round().clamp(round(low / scale), round(low / scale) + 255)
    return float((weights * (codes * scale - values) ** 2).sum())


def test_no_worse_than_the_extremes_and_ignores_what_does_not_matter() -> None:
    values, weights = gaussian(50_000, 0), gaussian(50_000, 1).square()
    values[:50] *= 30
    weights[:50] = 0
    observer = Hessian()
    for part, weight in zip(values.split(7_000), weights.split(7_000), strict=True):
        observer.update(part, weight)
    low, high = observer.range()
    extremes = float(values.min()), float(values.max())
    assert weighted_error(values, weights, low, high) < 0.1 * weighted_error(values, weights, *extremes)
    # As wide as what matters, in steps of 1 % of the extremes.
    assert high - low < 0.5 * (extremes[1] - extremes[0])
    assert max(-low, high) > 0.9 * float(values[50:].abs().max())


def test_outliers_that_matter_stay_inside() -> None:
    values, weights = gaussian(50_000, 0), torch.ones(50_000)
    values[:5] *= 30
    weights[:5] = 1e9
    observer = Hessian()
    observer.update(values, weights)
    assert observer.range() == pytest.approx((float(values.min()), float(values.max())), rel=0.02)


def test_without_weights_all_values_count_alike() -> None:
    values = gaussian(20_000, 2)
    plain, zeros, ones = Hessian(), Hessian(), Hessian()
    plain.update(values)
    zeros.update(values, torch.zeros_like(values))
    ones.update(values, torch.ones_like(values))
    assert plain.range() == zeros.range() == ones.range()
    assert isinstance(make_observer("hessian", bits=4), Hessian)


def test_batches_and_their_order_do_not_matter() -> None:
    """Also where a later batch is wider, so that bins are merged."""
    values, weights = gaussian(6_000, 3), gaussian(6_000, 4).square()
    values[4_000:] *= 9
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        observer = Hessian()
        for i in order:
            observer.update(values[2_000 * i : 2_000 * (i + 1)], weights[2_000 * i : 2_000 * (i + 1)])
        found.append((observer.range(), observer.weighted))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-12)


# -- squared gradients -------------------------------------------------------------------------------------------------


def squared_gradients(program: Program, inputs: torch.Tensor, seed: int = 0) -> torch.Tensor:
    module = program.edit()
    (source,) = placeholders(module)
    kept = Kept()
    calibrate_by_gradients(module, [(inputs,)], {source: kept}, seed)
    assert torch.equal(kept.values[0], inputs)
    return kept.weights[0]


def test_squared_gradients_of_a_classifier_are_the_second_derivative_of_the_divergence() -> None:
    layer = nn.Linear(5, 4)
    program = load_model(layer, input_shape=(1, 5))
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = layer(x).softmax(0)

    def divergence(point: torch.Tensor) -> torch.Tensor:
        return (target * (target.log() - layer(point).log_softmax(0))).sum()

    exact = torch.autograd.functional.hessian(divergence, x).diagonal()
    drawn = squared_gradients(program, x.expand(20_000, 5).contiguous()).mean(0)
    torch.testing.assert_close(drawn, exact, rtol=0.05, atol=1e-3)


def test_squared_gradients_of_other_outputs() -> None:
    """Of |J dx|^2: the sums of squares of the Jacobian's columns."""
    layer = nn.Linear(5, 6)
    program = load_model(nn.Sequential(layer, nn.Unflatten(1, (2, 3))), input_shape=(1, 5))
    drawn = squared_gradients(program, torch.zeros(20_000, 5)).mean(0)
    torch.testing.assert_close(drawn, layer.weight.detach().square().sum(0), rtol=0.05, atol=1e-3)


def test_each_sample_has_its_own_gradient_and_seeds_decide() -> None:
    program = load_model(nn.Linear(5, 4), input_shape=(1, 5))
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(squared_gradients(program, x), squared_gradients(program, x))
    assert not torch.equal(squared_gradients(program, x), squared_gradients(program, x, seed=1))


@pytest.mark.parametrize(
    "function", (lambda x: edgec.log_sizes(x + 9), lambda x: edgec.dequantize(edgec.quantize(x, 0.1, 0), 0.1, 0))
)
def test_operators_without_gradient(function: Any) -> None:
    program = load_model(Applied(function), input_shape=(1, 4))
    with pytest.raises(EdgecError, match=r"observer=hessian.*without gradient"):
        squared_gradients(program, torch.zeros(2, 4))


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


# -- the pass ----------------------------------------------------------------------------------------------------------


class Indifferent(nn.Module):
    """The second layer reads two of four channels; the others are a hundred times larger and reach nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4) * torch.tensor([1.0, 1.0, 100.0, 100.0]))
            self.first.bias.zero_()
            self.second.weight[:, 2:] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_ranges_follow_the_prediction() -> None:
    program = load_model(Indifferent(), input_shape=(1, 4))
    data = load_data(np.random.default_rng(0).uniform(-1, 1, (64, 4)).astype(np.float32), program.inputs)
    x = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    errors = {}
    for observer in ("min-max", "mse", "hessian"):
        coded = QuantizeInt8(observer=observer, outliers=False).run(program, Context(calibration=data))
        errors[observer] = float((coded(x)[0] - program(x)[0]).square().mean())
    assert errors["hessian"] < 0.2 * min(errors["mse"], errors["min-max"])


@pytest.mark.parametrize("name", ("residual", "vit_block"))
def test_is_deterministic_and_as_close_as_others(name: str) -> None:
    program = zoo.program(name)
    data, x = zoo.calibration(name, 32), zoo.example(name, batch=8)

    def error(observer: str) -> float:
        made = [QuantizeInt8(observer=observer).run(program, Context(calibration=data)) for _ in range(2)]
        assert made[0].fingerprint() == made[1].fingerprint()
        assert any(is_call(n, edgec.quantize.default) for n in made[0].graph.nodes)
        return float((made[0](x)[0] - program(x)[0]).norm())

    assert error("hessian") < 1.1 * error("mse")
