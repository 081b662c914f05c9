"""The model of the peak against the planner, and orders against all orders."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgec import regions as regions
from edgec.lowering import memory
from edgec.lowering.memory import Item, best_order, profile, reorder, reordered
from edgec.plan import ALIGN, PlanBuilder
from tests.lowering.test_tiles import Builder

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec


def random_items(seed: int, count: int) -> list[Item]:
    r = random.Random(seed)
    items = [Item(0, given=True)]
    for i in range(1, count):
        reads = tuple(sorted(r.sample(range(i), min(i, r.randint(1, 2)))))
        inplace = tuple(r.sample(reads, r.randint(0, 1)))
        items.append(Item(ALIGN * r.randint(1, 4), reads, inplace, ALIGN * r.choice((0, 0, 1))))
    return items


def planned(items: list[Item]) -> int:
    """What the planner needs at least for the same calls."""
    builder = PlanBuilder("net")
    names = []
    for item in items:
        if item.given:
            names.append(builder.add_input("x", (1,), "int8"))
            continue
        names.append(builder.add_temp((item.nbytes,), "int8"))
        inplace = [item.reads.index(i) for i in item.inplace]
        scratch = [item.scratch] if item.scratch else []
        builder.add_step("k", [*(names[r] for r in item.reads), names[-1]], inplace=inplace, scratch=scratch)
    return builder.finish().arena_lower_bound


@given(st.integers(0, 2**32), st.integers(2, 14))
@settings(max_examples=60, deadline=None)
def test_the_model_is_the_lower_bound_of_the_planner(seed: int, count: int) -> None:
    items = random_items(seed, count)
    assert max(profile(items)) == planned(items)


def smallest(items: list[Item]) -> int:
    """The smallest peak of all orders."""
    found = max(profile(items))
    for order in itertools.permutations(range(len(items))):
        place = {old: new for new, old in enumerate(order)}
        if all(place[r] < place[i] for i in range(len(items)) for r in items[i].reads):
            found = min(found, max(profile(*reordered(items, order, ()))))
    return found


@given(st.integers(0, 2**32), st.integers(2, 7))
@example(17863, 5)  # a value read on both sides of a cut
@example(55, 5)  # two results of one value
@settings(max_examples=40, deadline=None)
def test_no_order_is_better(seed: int, count: int) -> None:
    items = random_items(seed, count)
    order = best_order(items)
    assert sorted(order) == list(range(count))
    assert max(profile(*reordered(items, order, ()))) == smallest(items)
    assert best_order(items) == order


def test_the_beam_keeps_to_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_STATES", 1)
    monkeypatch.setattr(memory, "BEAM", 2)
    for seed in range(20):
        items = random_items(seed, 16)
        order = best_order(items)
        place = {old: new for new, old in enumerate(order)}
        assert all(place[r] < place[i] for i in range(len(items)) for r in items[i].reads)
        assert max(profile(*reordered(items, order, ()))) <= max(profile(items))


def test_branches_are_computed_one_after_the_other() -> None:
    """All wide maps first, then their reductions: in the given order three wide maps are alive together."""
    b = Builder(0, (1, 8, 8, 4))
    wide = [b.conv(b.x, 16, (1, 1), (1, 1), [0] * 4, (1, 1)) for _ in range(3)]
    narrow = [b.conv(w, 2, (1, 1), (1, 1), [0] * 4, (1, 1)) for w in wide]
    rest = (600, 500, 10, 1, 2, 3, -128, 127)
    both = b.call(edgec.qadd.default, narrow[0], narrow[1], *rest)
    b.call(edgec.qadd.default, both, narrow[2], *rest)
    module, x = b.module(), b.example
    want = module(x)[0]
    before, after = reorder(module)
    assert before == 3 * 1024 + 128
    assert after == 1024 + 2 * 128
    assert torch.equal(module(x)[0], want)
    assert reorder(module) == (after, after)
