"""Energies, decibels and confidence intervals against independent computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgec import stats
from edgec.stats import (
    CAP_DB,
    cosine_of,
    decibel,
    energy,
    output_fidelity,
    paired_mean_ci,
    paired_proportions_ci,
    products,
    t_975,
)

pytestmark = pytest.mark.pure

PAIRS = hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-100, 100, width=32))


@settings(deadline=None)
@given(PAIRS)
def test_energy_and_products_are_those_of_numpy(pair):
    a, b = pair.astype(np.float64)
    np.testing.assert_allclose(energy(pair[0], pair[1]), ((a - b) ** 2).sum(axis=1), rtol=1e-12)
    dot, aa, bb = products(pair[0], pair[1])
    np.testing.assert_allclose(dot, (a * b).sum(axis=1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(aa, (a**2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(bb, (b**2).sum(axis=1), rtol=1e-12)


def test_chunks_join(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 11, 2, 3))
    whole = [energy(x, y), *products(x, y)]
    monkeypatch.setattr(stats, "CHUNK", 4)
    for a, b in zip(whole, [energy(x, y), *products(x, y)], strict=True):
        np.testing.assert_array_equal(a, b)


@settings(deadline=None)
@given(PAIRS)
def test_fidelity_is_bounded_and_perfect_only_for_equals(pair):
    cosine, sqnr = output_fidelity(pair[0], pair[1])
    assert -1 <= cosine <= 1 and -CAP_DB <= sqnr <= CAP_DB
    same = output_fidelity(pair[0], pair[0])
    assert same[0] == pytest.approx(1.0) and same[1] == CAP_DB


def test_fidelity_of_known_values():
    signal = np.array([[3.0, 4.0]])
    cosine, sqnr = output_fidelity(signal, np.array([[3.0, 4.5]]))
    assert sqnr == pytest.approx(20.0)  # 25 / 0.25
    assert cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert output_fidelity(signal, -signal) == (pytest.approx(-1.0), pytest.approx(-20 * math.log10(2)))
    assert output_fidelity(np.zeros((1, 2)), signal) == (0.0, -CAP_DB)


def test_fidelity_of_nan_and_infinity_is_nan():
    x = np.ones((2, 2), np.float32)
    for bad in (np.nan, np.inf):
        y = x.copy()
        y[1, 0] = bad
        assert all(math.isnan(v) for v in output_fidelity(x, y))
    assert np.isnan(decibel(np.array([1.0]), np.array([np.nan]))).all()
    assert np.isnan(cosine_of(np.array([np.nan]), np.array([np.nan]), np.array([1.0]))).all()


def test_student_quantiles_are_those_of_scipy():
    t = pytest.importorskip("scipy.stats").t
    for freedom in [*range(1, 60), 100, 499, 501, 10**4, 10**6]:
        assert t_975(freedom) == pytest.approx(t.ppf(0.975, freedom), abs=1e-5)


def test_mean_interval_is_that_of_scipy():
    scipy = pytest.importorskip("scipy.stats")
    losses = np.random.default_rng(1).normal(0.3, 0.1, 5)
    want = scipy.t.interval(0.95, 4, losses.mean(), scipy.sem(losses))
    assert paired_mean_ci(losses) == pytest.approx(want, abs=1e-5)
    assert paired_mean_ci(np.array([1.0])) is None
    assert paired_mean_ci(np.array([1.0, np.nan])) is None
    assert paired_mean_ci(np.zeros(4)) == (0.0, 0.0)


def test_proportion_interval_by_hand():
    # 21 pairs, 7 lost and 1 won: p = 8/23, q = 2/23.
    low, high = paired_proportions_ci(7, 1, 21)
    half = 1.959964 * math.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert (low, high) == (pytest.approx(6 / 23 - half), pytest.approx(6 / 23 + half))


@settings(deadline=None)
@given(n=st.integers(1, 2000), data=st.data())
def test_proportion_interval_holds_the_estimate_and_is_symmetric(n, data):
    lost = data.draw(st.integers(0, n))
    won = data.draw(st.integers(0, n - lost))
    low, high = paired_proportions_ci(lost, won, n)
    assert -1 <= low < high <= 1
    assert low - 1e-12 <= (lost - won) / n <= high + 1e-12
    assert paired_proportions_ci(won, lost, n) == (pytest.approx(-high), pytest.approx(-low))


def test_no_discordant_pair_still_leaves_room():
    low, high = paired_proportions_ci(0, 0, 500)
    assert high == -low == pytest.approx(1.96 * math.sqrt(2) / 502, rel=1e-3)


@pytest.mark.parametrize("truth", [(0.0, 0.0), (0.02, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.1), (0.5, 0.45)])
def test_proportion_interval_covers_the_truth(truth):
    """Exact coverage: summed over all outcomes of 50 pairs, it stays near or above 95 %."""
    n, (p, q) = 50, truth
    coverage = 0.0
    for lost in range(n + 1):
        for won in range(n + 1 - lost):
            same = n - lost - won
            if (p == 0 and lost) or (q == 0 and won):
                continue
            ways = math.lgamma(n + 1) - math.lgamma(lost + 1) - math.lgamma(won + 1) - math.lgamma(same + 1)
            rest = sum(count * math.log(chance) for count, chance in ((lost, p), (won, q), (same, 1 - p - q)) if count)
            low, high = paired_proportions_ci(lost, won, n)
            coverage += math.exp(ways + rest) * (low <= p - q <= high)
    assert 0.94 <= coverage <= 1 + 1e-9
