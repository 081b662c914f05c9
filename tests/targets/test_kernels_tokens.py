"""Kernels of token reduction: compiled code against the operators of `edgec.tokenops`, same tokens, same values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgec import tokenops
from edgec.targets.device import Device
from edgec.targets.kernels.attention import View
from edgec.targets.kernels.tokens import ClassScore, LogSizes, MergeSizes, MergeTokens, ReduceSlots, TomeSlots
from tests.targets.kernel_cases import floats
from tests.targets.kernel_runner import assert_close, run_calls, spec_call
from tests.targets.test_kernels_norm import DEVICES

Case = tuple[Any, list[np.ndarray], np.ndarray]


def small_integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Sums of products that float32 holds exactly, with many equal ones among them: ties wherever there can be any."""
    return rng.integers(-1, 2, shape).astype(np.float32)


def check(cases: list[Case], device: Device) -> None:
    calls = [spec_call(spec, device, arrays, y) for spec, arrays, y in cases]
    for (spec, arrays, expected), (got,) in zip(cases, run_calls(calls, device), strict=True):
        assert_close(got, expected)
        assert_close(spec.reference(*arrays), expected)


def keys(rng: np.random.Generator, make: Any, batch: int, heads: int, tokens: int, depth: int, joined: bool) -> tuple:
    """(view, tensor, [batch, heads, tokens, depth]): keys as a projection of all heads holds them, or by head."""
    if joined:
        x = make(rng, batch, tokens, 3, heads, depth)
        width = heads * depth
        view = View(x.size, width, (tokens * 3 * width, depth, 3 * width, 1))
        return view, x, x[:, :, 1].transpose(0, 2, 1, 3)
    x = make(rng, batch, heads, depth, tokens)
    view = View(x.size, 0, (heads * depth * tokens, depth * tokens, 1, tokens))
    return view, x, x.swapaxes(2, 3)


def tome(rng: np.random.Generator, make: Any, tokens: int, depth: int, r: int, prefix: int, **options: Any) -> Case:
    batch, heads, joined = (options.get(k, v) for k, v in (("batch", 1), ("heads", 2), ("joined", True)))
    distilled = options.get("distilled", False)
    view, x, k = keys(rng, make, batch, heads, tokens, depth, joined)
    y = tokenops.tome_slots(torch.from_numpy(np.ascontiguousarray(k)).mean(1), r, prefix, distilled)
    return TomeSlots(batch, heads, tokens, depth, view, r, prefix, distilled), [x], y.numpy()


def reduce(
    rng: np.random.Generator, make: Any, tokens: int, channels: int, prefix: int, keep: int, merge: int, batch: int = 1
) -> Case:
    x, score = make(rng, batch, tokens, channels), make(rng, batch, tokens - prefix)
    slots = tokenops.reduce_slots(torch.from_numpy(x), torch.from_numpy(score), prefix, keep, merge)
    operands = [x, score] if merge < keep else [score]
    return ReduceSlots(batch, tokens, channels, prefix, keep, merge), operands, slots.numpy()


def keep(rng: np.random.Generator, make: Any, tokens: int, prefix: int, count: int, batch: int = 1) -> Case:
    score = make(rng, batch, tokens - prefix)
    slots = tokenops.keep_slots(torch.from_numpy(score), prefix, count)
    return ReduceSlots(batch, tokens, 3, prefix, count, count, ordered=False), [score], slots.numpy()


@pytest.mark.parametrize("device", DEVICES)
def test_choice(device: Device) -> None:
    """The same tokens as the operators, to the last one, also where scores and similarities are equal."""
    rng = np.random.default_rng(0)
    cases: list[Case] = []
    for make in (floats, small_integers):
        cases += [
            tome(rng, make, 197, 64, 13, 1, heads=3),
            tome(rng, make, 50, 12, 8, 0, batch=2),
            tome(rng, make, 23, 8, 10, 2, distilled=True, joined=False),
            tome(rng, make, 38, 4, 16, 5, heads=1),
            tome(rng, make, 9, 1, 4, 1, joined=False),
            tome(rng, make, 3, 5, 1, 1, heads=4),
            tome(rng, make, 2, 5, 1, 0),
            reduce(rng, make, 197, 96, 1, 180, 163),
            reduce(rng, make, 37, 20, 2, 30, 11, batch=2),
            reduce(rng, make, 21, 7, 0, 21, 4),
            reduce(rng, make, 21, 7, 5, 17, 17),
            reduce(rng, make, 21, 7, 5, 5, 5),
            reduce(rng, make, 12, 3, 0, 12, 1),
            keep(rng, make, 197, 1, 120),
            keep(rng, make, 18, 0, 7, batch=3),
            keep(rng, make, 18, 5, 5),
        ]
    check(cases, device)


@pytest.mark.parametrize("device", DEVICES)
def test_values_that_are_no_numbers(device: Device) -> None:
    """Every row of the result is written, whatever the scores are."""
    x, score = np.full((1, 20, 6), np.nan, np.float32), np.full((1, 19), np.nan, np.float32)
    score[0, [3, 7, 8]] = np.inf, -np.inf, 2.0
    view = View(x.size, 0, (120, 120, 6, 1))
    slots = [
        tokenops.tome_slots(torch.from_numpy(x), 6, 1, False),
        tokenops.reduce_slots(torch.from_numpy(x), torch.from_numpy(score), 1, 15, 9),
    ]
    cases: list[Any] = [TomeSlots(1, 1, 20, 6, view, 6, 1, False), ReduceSlots(1, 20, 6, 1, 15, 9)]
    calls = [spec_call(s, device, a, y.numpy()) for s, a, y in zip(cases, ([x], [x, score]), slots, strict=True)]
    for (got,), expected in zip(run_calls(calls, device), slots, strict=True):
        np.testing.assert_array_equal(got, expected.numpy())
        rows = np.sort(got[got >= 0])
        np.testing.assert_array_equal(rows, np.arange(len(rows)))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_sizes(device: Device) -> None:
    rng = np.random.default_rng(1)
    cases: list[Case] = []
    for batch, tokens, channels, slots, rows in (
        (1, 197, 192, tome(rng, floats, 197, 16, 13, 1)[2], 184),
        (2, 23, 10, tome(rng, floats, 23, 8, 10, 2, distilled=True, batch=2)[2], 13),
        (1, 30, 70, reduce(rng, floats, 30, 4, 1, 25, 6)[2], 6),
        (2, 17, 3, keep(rng, floats, 17, 1, 9, batch=2)[2], 9),
    ):
        x, size = floats(rng, batch, tokens, channels), rng.integers(1, 9, (batch, tokens)).astype(np.float32)
        given = torch.from_numpy(x), torch.from_numpy(size)[:, :, None], torch.from_numpy(slots)
        for merges in (True, False) if slots.min() > tokenops.MERGED else (True,):
            for weighted in (True, False):
                y = tokenops.merge_tokens(*given, rows, weighted).numpy()
                spec = MergeTokens(batch, tokens, channels, rows, merges, weighted)
                cases.append((spec, [x, size, slots] if spec.sized else [x, slots], y))
        y = tokenops.merge_sizes(*given[1:], rows, None).numpy()[:, :, 0]
        cases.append((MergeSizes(batch, tokens, rows), [size, slots], y))
        y = tokenops.merge_sizes(*given[1:], rows, given[0]).numpy()[:, :, 0]
        cases.append((MergeSizes(batch, tokens, rows, channels), [size, slots, x], y))
    check(cases, device)


@pytest.mark.parametrize("device", DEVICES)
def test_scores(device: Device) -> None:
    rng = np.random.default_rng(2)
    cases: list[Case] = []
    for batch, heads, tokens, depth, prefix, joined in (
        (1, 3, 197, 64, 1, True),
        (2, 1, 19, 7, 2, False),
        (1, 2, 6, 1, 5, True),
    ):
        q_view, q, queries = keys(rng, floats, batch, heads, tokens, depth, joined)
        k_view, k, known = keys(rng, floats, batch, heads, tokens, depth, joined)
        size = rng.integers(1, 40, (batch, tokens)).astype(np.float32)
        for sizes in ([size], []):
            given = None if not sizes else torch.from_numpy(size)[:, :, None]
            left, right = (torch.from_numpy(np.ascontiguousarray(a)) for a in (queries, known))
            y = tokenops.class_score(left, right, given, 0.3, prefix).numpy()
            spec = ClassScore(batch, heads, tokens, depth, q_view, k_view, 0.3, prefix, bool(sizes))
            cases.append((spec, [q, k, *sizes], y))
    x = np.arange(1, 40, dtype=np.float32)
    cases.append((LogSizes(len(x)), [x], np.log(x)))
    check(cases, device)
