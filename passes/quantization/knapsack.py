"""Multiple-choice knapsack: one option for each item, the least total penalty that a budget allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.errors import EdgecError

# Costs are rounded up to this share of the budget.
UNITS = 10_000


@dataclass(frozen=True)
class Choice:
    """One option of an item: what it costs, >= 0, and the harm that it does."""

    cost: float
    penalty: float


@dataclass(frozen=True)
class Group:
    """Items whose options depend on a common decision: cases[c][i] are the options of item i in case c; penalties[c] is
    added once. A lone item is a group of one case.
    """

    cases: Sequence[Sequence[Sequence[Choice]]]
    penalties: Sequence[float]


def solve(groups: Sequence[Group], budget: float, units: int = UNITS) -> list[tuple[int, tuple[int, ...]]]:
    """(case, option of each item) for each group: the least sum of penalties whose costs add up to at most `budget`.

    Exact for costs that are multiples of budget / units; others are rounded up, so that the budget holds. Raises
    EdgecError, naming the smallest budget there is, when even the cheapest options do not fit.

    Sinha and Zoltners, "The Multiple-Choice Knapsack Problem" (dynamic programming over the budget).
    """
    least = sum(min(sum(min(o.cost for o in item) for item in case) for case in group.cases) for group in groups)
    if least > budget * (1 + 1e-9):
        raise EdgecError(f"even the cheapest options cost {least:.6g}, more than {budget:.6g}")
    free = [_best(group) for group in groups]
    if _cost(groups, free) <= budget * (1 + 1e-9):
        return free  # which rounding up could miss
    unit = budget / units if budget > 0 else 1.0
    # best[u]: least penalty with costs of at most u units; the trace of decisions lies beside it.
    best = np.zeros(units + 1)
    traces: list[list[list[np.ndarray]]] = []
    decided: list[np.ndarray] = []
    for group in groups:
        tables, picks = [], []
        for case, penalty in zip(group.cases, group.penalties, strict=True):
            table, taken = best + penalty, []
            for item in case:
                table, pick = _add(table, item, unit, units)
                taken.append(pick)
            tables.append(table)
            picks.append(taken)
        best = np.min(tables, axis=0)
        decided.append(np.argmin(tables, axis=0))
        traces.append(picks)
    if not math.isfinite(best[units]):
        # Rounding up made it too tight: the cheapest options are the only ones that fit.
        return [_cheapest(group) for group in groups]
    left, answer = units, []
    for group, which, picks in zip(reversed(groups), reversed(decided), reversed(traces), strict=True):
        case = int(which[left])
        options = []
        for item, pick in zip(reversed(group.cases[case]), reversed(picks[case]), strict=True):
            option = int(pick[left])
            options.append(option)
            left -= _units(item[option].cost, unit)
        answer.append((case, tuple(reversed(options))))
    return answer[::-1]


def _add(table: np.ndarray, item: Sequence[Choice], unit: float, units: int) -> tuple[np.ndarray, np.ndarray]:
    """The table with one more item, and the option taken at each budget."""
    rows = np.full((len(item), units + 1), np.inf)
    for row, option in zip(rows, item, strict=True):
        cost = _units(option.cost, unit)
        if cost <= units:
            row[cost:] = table[: units + 1 - cost] + option.penalty
    return rows.min(axis=0), rows.argmin(axis=0)


def _units(cost: float, unit: float) -> int:
    return math.ceil(cost / unit - 1e-9)


def _best(group: Group) -> tuple[int, tuple[int, ...]]:
    """What a group takes when cost does not matter."""
    harm = [
        p + sum(min(o.penalty for o in item) for item in c) for c, p in zip(group.cases, group.penalties, strict=True)
    ]
    case = min(range(len(harm)), key=harm.__getitem__)
    return case, tuple(min(range(len(item)), key=lambda i: item[i].penalty) for item in group.cases[case])


def _cost(groups: Sequence[Group], answer: Sequence[tuple[int, tuple[int, ...]]]) -> float:
    return sum(
        item[option].cost
        for group, (case, options) in zip(groups, answer, strict=True)
        for item, option in zip(group.cases[case], options, strict=True)
    )


def _cheapest(group: Group) -> tuple[int, tuple[int, ...]]:
    def total(case: Any) -> float:
        return sum(min(o.cost for o in item) for item in case)

    case = min(range(len(group.cases)), key=lambda c: total(group.cases[c]))
    return case, tuple(min(range(len(item)), key=lambda i: item[i].cost) for item in group.cases[case])
