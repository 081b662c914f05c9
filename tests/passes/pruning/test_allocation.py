"""Allocation formulas: their definitions, their means, their guards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import EdgecError
from edgec.passes.pruning.allocation import (
    LayerGrains,
    atp,
    best_slope,
    check_mean,
    erk,
    global_magnitude,
    lagrangian,
    lamp,
    lamp_scores,
    largest_beta,
    mean_rate,
    removed,
    slopes,
    uniform,
)

pytestmark = pytest.mark.pure


def layer(o: int, i: int, k: int = 3, seed: int = 0, scale: float = 1.0, size: int = 1, least: int = 1) -> LayerGrains:
    count = o * i * k * k // size
    scores = scale * np.random.default_rng(seed).random(count)
    return LayerGrains(f"l{seed}", scores, size, (o, i, k, k), least)


LAYERS = [layer(8, 4, seed=0), layer(16, 8, seed=1, scale=0.1), layer(32, 16, 1, seed=2, scale=3.0)]
SHAPES = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from([1, 3])), min_size=1, max_size=6)


def made(shapes: list[tuple[int, int, int]]) -> list[LayerGrains]:
    return [layer(o, i, k, seed) for seed, (o, i, k) in enumerate(shapes)]


@pytest.mark.parametrize("rate,count,want", [(0.5, 5, 2), (0.29, 100, 29), (0.7, 10, 7), (0.0, 9, 0), (1.0, 9, 9)])
def test_counts_are_the_floor(rate: float, count: int, want: int) -> None:
    assert removed(rate, count) == want


def test_global_is_one_threshold() -> None:
    rates = global_magnitude(LAYERS, 0.5)
    gone = [np.sort(x.scores)[: removed(r, x.count)] for x, r in zip(LAYERS, rates)]
    left = [np.sort(x.scores)[removed(r, x.count) :] for x, r in zip(LAYERS, rates)]
    free = [i for i, x in enumerate(LAYERS) if len(left[i]) > math.ceil(0.02 * x.count)]
    assert max(g.max(initial=0) for g in gone) <= min(left[i].min() for i in free)
    assert mean_rate(LAYERS, rates) == pytest.approx(0.5, abs=1 / sum(x.weights for x in LAYERS))


def test_global_leaves_every_layer_something() -> None:
    tiny = [layer(8, 8, seed=0, scale=1e-6, least=8), layer(64, 64, 1, seed=1), layer(16, 64, seed=2, scale=1e-6)]
    for allocation in (global_magnitude, lamp):
        rates = allocation(tiny, 0.9)
        kept = [x.count - removed(r, x.count) for x, r in zip(tiny, rates)]
        assert kept[0] >= 12 and kept[2] >= math.ceil(0.02 * tiny[2].count)  # 2 % of 576 are 12
    assert global_magnitude([layer(8, 2, 1, seed=0, scale=1e-6, least=8), tiny[1]], 0.9)[0] == 0.5
    # counts that fit into the budget exactly, whatever the size of a grain
    mixed = [layer(16, 16, seed=0, size=4), layer(16, 16, seed=1, size=9)]
    assert mean_rate(mixed, global_magnitude(mixed, 0.5)) == pytest.approx(0.5, abs=9 / 4608)


def test_lamp_scores_by_definition() -> None:
    scores = np.array([3.0, 1.0, 2.0, 0.0])
    assert lamp_scores(scores) == pytest.approx([9 / 9, 1 / 14, 4 / 13, 0.0])
    assert lamp_scores(np.zeros(3)) == pytest.approx(np.zeros(3))


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_lamp_scores_keep_the_order_and_end_in_one(values: list[float]) -> None:
    found = lamp_scores(np.array(values))
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all() and found[order][-1] == pytest.approx(1.0)


def test_lamp_does_not_care_for_the_scale_of_a_layer() -> None:
    scaled = [LayerGrains(x.name, x.scores * f, x.size, x.shape) for x, f in zip(LAYERS, (100, 1, 0.01))]
    assert lamp(scaled, 0.7) == pytest.approx(lamp(LAYERS, 0.7))


@given(SHAPES, st.floats(0.05, 0.95))
def test_erk_has_the_mean_and_the_proportions(shapes: list[tuple[int, int, int]], sparsity: float) -> None:
    layers = made(shapes)
    rates = erk(layers, sparsity)
    assert mean_rate(layers, rates) == pytest.approx(sparsity, abs=1e-9)
    scales = [(1 - r) / (sum(x.shape) / math.prod(x.shape)) for r, x in zip(rates, layers)]
    partial = [s for s, r in zip(scales, rates) if r > 0]
    assert max(partial) == pytest.approx(min(partial))
    assert all(s <= partial[0] * (1 + 1e-9) for s, r in zip(scales, rates) if r == 0)


def test_erk_by_hand() -> None:
    small, large = layer(2, 2, 1), layer(20, 20, 1)  # ratios 6/4 and 42/400
    assert erk([small, large], 0.5) == pytest.approx([0.0, 1 - (202 - 4) / 400])


@given(SHAPES, st.floats(0.05, 0.95), st.floats(-1, 1))
def test_atp_rises_evenly_and_has_the_weighted_mean(shapes, sparsity: float, share: float) -> None:
    layers = made(shapes)
    reach = slopes(layers, sparsity)
    beta = share * (reach[-1] if share > 0 else -reach[0]) * 0.999
    rates = atp(layers, sparsity, beta)
    assert mean_rate(layers, rates) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= r <= 1 for r in rates)
    assert np.diff(rates) == pytest.approx(np.full(len(rates) - 1, beta), abs=1e-9)


def test_atp_without_a_slope_is_uniform_bit_for_bit() -> None:
    assert atp(LAYERS, 0.7, 0.0) == uniform(LAYERS, 0.7) == [0.7] * 3


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_the_limit_of_equal_layers_is_that_of_the_paper(sparsity: float) -> None:
    layers = [layer(8, 8, seed=i) for i in range(6)]
    limit = min(2 * sparsity / 5, 2 * (1 - sparsity) / 5)
    assert largest_beta(layers, sparsity) == pytest.approx(limit)
    atp(layers, sparsity, 0.999 * limit)
    with pytest.raises(EdgecError, match=r"is not in 0\.\.1"):
        atp(layers, sparsity, 1.01 * limit)


def test_layers_of_a_block_share_their_rate() -> None:
    rates = atp(LAYERS, 0.5, 0.05, units=[0, 0, 1])
    assert rates[0] == rates[1] == pytest.approx(rates[2] - 0.05)


def test_an_unweighted_progression_is_refused() -> None:
    plain = [0.5 - 0.1, 0.5, 0.5 + 0.1]
    with pytest.raises(EdgecError, match="weight their mean by the parameters"):
        check_mean(LAYERS, plain, 0.5)
    check_mean(LAYERS, atp(LAYERS, 0.5, 0.1), 0.5)


def test_the_search_tries_both_signs_and_zero_and_takes_the_best() -> None:
    tried = slopes(LAYERS, 0.5)
    assert 0.0 in tried and min(tried) < 0 < max(tried) and len(tried) >= 10
    for wanted in (min(tried), 0.0, max(tried)):
        beta, rates = best_slope(LAYERS, 0.5, lambda r, w=wanted: abs(r[1] - r[0] - w))
        assert beta == pytest.approx(wanted, abs=1e-8) and rates == atp(LAYERS, 0.5, beta * (1 - 1e-9))
    assert best_slope(LAYERS, 0.5, lambda r: 1.0)[0] == 0.0  # of equal ones the flattest


@given(st.integers(0, 2**31), st.floats(0.1, 1.0))
def test_the_budget_is_kept_and_what_it_buys_is_within_the_bound(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.random((3, 4)), axis=1)
    damage = np.sort(rng.random((3, 4)), axis=1)[:, ::-1]
    budget = cost.min(1).sum() + share * (cost.max(1).sum() - cost.min(1).sum())
    choice, multiplier = lagrangian(damage.tolist(), cost.tolist(), budget)
    spent = sum(cost[i, k] for i, k in enumerate(choice))
    assert spent <= budget * (1 + 1e-9) and multiplier >= 0
    best = min(
        sum(damage[i, k] for i, k in enumerate(c))
        for c in itertools.product(range(4), repeat=3)
        if sum(cost[i, k] for i, k in enumerate(c)) <= budget
    )
    found = sum(damage[i, k] for i, k in enumerate(choice))
    # Everett's bound: no choice beats argmin(damage + multiplier * cost) by more than the price of what that leaves
    plain = (damage + multiplier * cost).argmin(1)
    left = budget - cost[range(3), plain].sum()
    assert left >= -1e-9
    assert best <= found + 1e-12 and found - best <= multiplier * left + 1e-9


def test_the_multiplier_finds_the_hull() -> None:
    # convex curves: marginal damage per cost decides
    damage, cost = [[0.0, 1.0, 5.0], [0.0, 2.0, 9.0]], [[10.0, 5.0, 0.0], [10.0, 5.0, 0.0]]
    assert lagrangian(damage, cost, 20)[0] == [0, 0]
    assert lagrangian(damage, cost, 15)[0] == [1, 0]
    assert lagrangian(damage, cost, 10)[0] == [1, 1]
    assert lagrangian(damage, cost, 5)[0] == [2, 1]
    with pytest.raises(EdgecError, match="least possible cost"):
        lagrangian(damage, [[2.0, 1.0, 1.0]] * 2, 1.5)


def test_what_the_hull_leaves_is_spent() -> None:
    # the middle candidate is off the hull: no multiplier chooses it
    assert lagrangian([[0.0, 9.0, 10.0]], [[10.0, 5.0, 0.0]], 6)[0] == [1]
