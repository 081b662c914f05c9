"""Ranges to scales, weight codes, and observers on distributions whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import EdgecError
from edgec.integer import quantize
from edgec.quantparams import (
    BINS,
    OBSERVERS,
    ChannelMinMax,
    Histogram,
    QParams,
    affine,
    affine_channels,
    make_observer,
    quantize_weights,
    symmetric_scales,
)

pytestmark = pytest.mark.pure
HISTOGRAMS = [name for name in OBSERVERS if name != "min-max"]


def observed(name: str, *batches: torch.Tensor, **options) -> tuple[float, float]:
    observer = make_observer(name, **options)
    for batch in batches:
        observer.update(batch)
    return observer.range()


def gaussian(n: int = 200_000, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


# -- ranges to scales --------------------------------------------------------------------------------------------------


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_affine_covers_the_range_and_has_an_exact_zero(a, b):
    low, high = min(a, b), max(a, b)
    params = affine(low, high)
    scale, zero = params.per_tensor
    assert np.float32(scale) == scale
    assert -128 <= zero <= 127
    smallest, largest = params.range
    # Rounding the zero point moves both ends by up to half a step.
    assert smallest <= min(low, 0) + 0.501 * scale
    assert largest >= max(high, 0) - 0.501 * scale
    assert int(quantize(np.float32(0.0), scale, zero)) == zero == (params.pad_code if high != low else zero)


def test_affine_examples():
    assert affine(0.0, 255.0).per_tensor == (1.0, -128)
    assert affine(-128.0, 127.0).per_tensor == (1.0, 0)
    assert affine(2.0, 4.0).per_tensor == (float(np.float32(4 / 255)), -128)
    assert affine(-4.0, -2.0).per_tensor == (float(np.float32(4 / 255)), 127)
    assert affine(0.0, 0.0).per_tensor == (float(np.float32(1e-8)), 0)


@pytest.mark.parametrize("low,high", [(math.nan, 1.0), (0.0, math.inf)])
def test_affine_refuses_what_is_not_finite(low, high):
    with pytest.raises(EdgecError, match=r"conv1: range .* is not finite; check the calibration data"):
        affine(low, high, "conv1")


def test_records():
    channels = affine_channels([0.0, -1.0], [1.0, 1.0], axis=1)
    assert channels.granularity == "channel" and channels.axis == 1
    assert channels.scale == (affine(0, 1).scale, affine(-1, 1).scale)
    with pytest.raises(EdgecError, match="one scale per tensor"):
        _ = channels.per_tensor
    codes = torch.tensor([[[-128, 127], [0, 127]]], dtype=torch.int8)
    reals = channels.reals(codes)
    assert reals[0, 0].tolist() == pytest.approx([0.0, 1.0])
    assert reals[0, 1].tolist() == pytest.approx([0.0, 1.0], abs=0.01)
    assert QParams(0.5, 3).reals(torch.tensor([5], dtype=torch.int8)).item() == 1.0


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weight_codes_use_the_restricted_range():
    weights = np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [-1e-3, 1e-3, 0.0]])
    scales = symmetric_scales(weights, per_channel=True)
    codes = quantize_weights(weights, scales)
    assert codes.dtype == np.int8
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0], [-127, 127, 0]]
    assert scales[1] == np.float32(1e-8)
    one = symmetric_scales(weights, per_channel=False)
    assert len(set(one)) == 1
    assert quantize_weights(weights, one).tolist() == [[64, -127, 32], [0, 0, 0], [0, 0, 0]]


# -- observers ---------------------------------------------------------------------------------------------------------


def test_min_max():
    assert observed("min-max", torch.tensor([1.0, -3.0]), torch.tensor([[2.0]])) == (-3.0, 2.0)
    assert observed("min-max") == (0.0, 0.0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_uniform_data_keep_their_extremes(name):
    low, high = observed(name, torch.linspace(-1, 3, 100_001), percentile=100)
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("name", OBSERVERS)
def test_zeros_and_nothing(name):
    assert observed(name, torch.zeros(10)) == (0.0, 0.0)
    assert observed(name, torch.zeros(0)) == (0.0, 0.0)


@pytest.mark.parametrize("name", OBSERVERS)
def test_data_of_one_sign_get_a_range_of_one_sign(name):
    low, high = observed(name, gaussian().abs() + 0.1)
    assert min(low, 0.0) == 0.0
    assert high > 3
    low, high = observed(name, -gaussian().abs() - 0.1)
    assert max(high, 0.0) == 0.0
    assert low < -3


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_reach_the_caller(name, bad):
    for batches in ([1.0, bad], [2.0]), ([2.0], [1.0, bad]), ([bad], [2.0]):
        low, high = observed(name, *[torch.tensor(b) for b in batches])
        with pytest.raises(EdgecError, match="not finite"):
            affine(low, high)


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_histograms_do_not_depend_on_batches(name):
    values = gaussian() * torch.logspace(-3, 1, 200_000)
    values[::7] = 0
    whole = observed(name, values)
    assert observed(name, *values.split(9_973)) == whole
    assert observed(name, *values.flip(0).split(50_000)) == whole


def test_histogram_counts_everything_once_in_bounded_memory():
    class Counting(Histogram):
        def search(self, low, high):
            return low, high

    histogram = Counting()
    for exponent in range(-20, 21, 4):
        histogram.update(gaussian(5_000, exponent) * 2.0**exponent)
        histogram.update(torch.zeros(100))
    assert histogram.counts.sum() + histogram.zeros == 11 * 5_100
    assert histogram.zeros == 1_100
    assert histogram.counts.shape == (2 * BINS,)
    assert BINS * histogram.width <= 4 * max(-histogram.low, histogram.high)


def test_percentile_of_a_gaussian():
    low, high = observed("percentile", gaussian(), percentile=99.0)
    assert low == pytest.approx(-2.326, abs=0.05)
    assert high == pytest.approx(2.326, abs=0.05)


def test_percentile_counts_zeros_as_values():
    values = torch.cat([torch.zeros(900_000), torch.linspace(0.001, 10, 100_000)])
    assert observed("percentile", values, percentile=99.0)[1] == pytest.approx(9.0, abs=0.05)


@pytest.mark.parametrize("name,largest", [("percentile", 6.0), ("mse", 80.0), ("kl", 10.0)])
def test_outliers_are_cut(name, largest):
    values = torch.cat([gaussian(1_000_000), torch.tensor([100.0, -100.0])])
    low, high = observed(name, values)
    assert 3 < high < largest
    assert -largest < low < -3


def test_mse_is_the_best_of_its_candidates():
    """Against a direct search over the samples, which the histogram stands for."""
    values = gaussian(50_000) ** 3
    low, high = observed("mse", values)

    def error(shrink: float) -> float:
        a, b = shrink * values.min().item(), shrink * values.max().item()
        scale = (b - a) / 255
        zero = round(-a / scale)
        codes = (torch.round(values / scale) + zero).clamp(0, 255)
        return ((codes - zero) * scale - values).abs().pow(2.4).mean().item()

    errors = {i: error(1 - 0.01 * i) for i in range(80)}
    chosen = round((1 - high / values.max().item()) * 100)
    assert low / values.min().item() == pytest.approx(high / values.max().item())
    assert chosen > 0
    assert errors[chosen] <= 1.02 * min(errors.values())


def test_extremes_of_channels():
    observer = ChannelMinMax(1)
    observer.update(torch.tensor([[[1.0, 2.0], [-1.0, 0.0]]]))
    observer.update(torch.tensor([[[0.5, 0.5], [-3.0, 4.0]]]))
    low, high = observer.range()
    assert low.tolist() == [0.5, -3.0]
    assert high.tolist() == [2.0, 4.0]
    with pytest.raises(EdgecError, match="no calibration sample"):
        ChannelMinMax(1).range()


def test_unknown_observer():
    with pytest.raises(EdgecError, match="'median' is not an observer; use one of min-max"):
        make_observer("median")
