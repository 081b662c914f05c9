"""The multiple-choice knapsack against all combinations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgec.errors import EdgecError
from edgec.passes.quantization.knapsack import Choice, Group, solve

pytestmark = pytest.mark.pure


def value(groups: list[Group], answer) -> tuple[float, float]:
    """(cost, penalty) of an answer."""
    cost = penalty = 0.0
    for group, (case, options) in zip(groups, answer, strict=True):
        penalty += group.penalties[case]
        for item, option in zip(group.cases[case], options, strict=True):
            cost += item[option].cost
            penalty += item[option].penalty
    return cost, penalty


def every(groups: list[Group]):
    parts = []
    for group in groups:
        found = []
        for case, items in enumerate(group.cases):
            found += [(case, options) for options in itertools.product(*[range(len(item)) for item in items])]
        parts.append(found)
    return itertools.product(*parts)


@pytest.mark.parametrize("seed", range(20))
def test_it_finds_the_best_of_all_combinations(seed: int):
    rng = np.random.default_rng(seed)

    def item() -> list[Choice]:
        return [Choice(float(rng.integers(0, 40)), float(rng.random())) for _ in range(rng.integers(1, 4))]

    groups = []
    for _ in range(3):
        count, cases = rng.integers(1, 3), rng.integers(1, 3)
        groups.append(Group([[item() for _ in range(count)] for _ in range(cases)], rng.random(cases).tolist()))
    values = [value(groups, answer) for answer in every(groups)]
    costs = sorted({cost for cost, _ in values})
    for budget in {costs[0], costs[len(costs) // 3], costs[len(costs) // 2], costs[-1]} - {0.0}:
        # costs and budgets are whole numbers, and so are multiples of the unit
        cost, penalty = value(groups, solve(groups, budget, units=int(budget)))
        assert cost <= budget
        assert penalty == pytest.approx(min(p for c, p in values if c <= budget))


def test_the_budget_holds_for_costs_between_the_units():
    rng = np.random.default_rng(1)
    groups = [Group([[[Choice(rng.random(), rng.random()) for _ in range(4)]]], [0.0]) for _ in range(12)]
    previous = np.inf
    for budget in (3.5, 4.0, 6.0, 12.0):
        cost, penalty = value(groups, solve(groups, budget, units=100))
        assert cost <= budget and penalty <= previous
        previous = penalty


def test_the_cheapest_are_found_when_rounding_up_leaves_nothing_else():
    groups = [Group([[[Choice(1 / 3, 1.0), Choice(1.0, 0.0)]]], [0.0]) for _ in range(3)]
    assert solve(groups, 1.0, units=10) == [(0, (0,))] * 3


def test_a_budget_below_the_cheapest_is_refused():
    with pytest.raises(EdgecError, match="cheapest options cost 5, more than 4"):
        solve([Group([[[Choice(5.0, 0.0), Choice(9.0, 0.0)]]], [0.0])], 4.0)
