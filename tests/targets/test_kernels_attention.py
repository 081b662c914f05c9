"""Attention and products of activations: compiled code against the NumPy meaning, and that against PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm

from edgec.targets.codegen import lower_kernels
from edgec.targets.device import Device, load_device
from edgec.targets.kernels.attention import Attention, View
from edgec.targets.kernels.matmul import MatMul, balanced, column_blocks, span
from tests.targets.kernel_cases import floats
from tests.targets.kernel_runner import assert_close, run_calls, spec_call
from tests.targets.test_kernels_norm import DEVICES

Case = tuple[Any, list[np.ndarray]]


def projection(rng: np.random.Generator, heads: int, tokens: int, depth: int, **options: Any) -> Case:
    """Queries, keys and values side by side in one tensor [tokens, 3, heads, depth], as transformers project them."""
    width = heads * depth
    x = floats(rng, tokens, 3 * width)
    views = [View(x.size, i * width, (0, depth, 3 * width, 1)) for i in range(3)]
    spec = Attention(1, heads, tokens, tokens, depth, depth, *views, scale=1 / math.sqrt(depth), **options)
    return spec, [x, x, x]


def separate(
    rng: np.random.Generator, batch: int, heads: int, queries: int, keys: int, depth: int, value_depth: int, **more: Any
) -> Case:
    """Three dense tensors [batch, heads, tokens, depth]; k has heads / group heads."""
    shared = heads // more.get("group", 1)
    shapes = ((batch, heads, queries, depth), (batch, shared, keys, depth), (batch, shared, keys, value_depth))
    arrays = [floats(rng, *shape) for shape in shapes]
    views = [View(a.size, 0, dense(a.shape)) for a in arrays]
    return Attention(batch, heads, queries, keys, depth, value_depth, *views, scale=0.3, **more), arrays


def dense(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(4)]
    return tuple(1 if n == 1 else s for n, s in zip(shape, strides, strict=True))  # type: ignore[return-value]


def check(cases: list[Case], device: Device) -> None:
    results = [spec.reference(*arrays) for spec, arrays in cases]
    calls = [spec_call(spec, device, arrays, y) for (spec, arrays), y in zip(cases, results, strict=True)]
    for (got,), expected in zip(run_calls(calls, device), results, strict=True):
        if expected.dtype == np.int8:
            assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1
        else:
            assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_attention(device: Device) -> None:
    rng = np.random.default_rng(0)
    check(
        [
            projection(rng, 3, 197, 64),
            projection(rng, 4, 65, 32),
            projection(rng, 1, 1, 16),
            projection(rng, 2, 5, 4),
            projection(rng, 5, 17, 7),
            projection(rng, 2, 33, 20, causal=True),
            projection(rng, 2, 50, 16, grid=(0.01, -7)),
            separate(rng, 3, 2, 49, 49, 8, 8),
            separate(rng, 5, 1, 3, 70, 1, 1),
            separate(rng, 1, 2, 1, 37, 16, 24),
            separate(rng, 2, 4, 21, 10, 12, 5, group=2),
        ],
        device,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_masks(device: Device) -> None:
    """Masks of numbers along every axis, hidden keys, and rows that see nothing."""
    rng = np.random.default_rng(1)
    cases: list[Case] = []
    for queries, keys, strides in (
        (20, 30, (0, 0, 30, 1)),
        (18, 18, (0, 18 * 18, 18, 1)),
        (7, 12, (12, 0, 0, 1)),
        (35, 9, (0, 0, 1, 0)),
    ):
        size = 1 + sum((n - 1) * stride for n, stride in zip((2, 3, queries, keys), strides, strict=True))
        mask = floats(rng, size)
        mask[rng.random(size) < 0.3] = -np.inf
        mask[:: max(1, size // 3)] = 0.0
        if strides[2] == keys:
            mask[:keys] = -np.inf
        spec, arrays = separate(rng, 2, 3, queries, keys, 6, 6, mask=View(size, 0, strides))
        cases.append((spec, [*arrays, mask]))
    assert any(not np.any(spec.reference(*arrays)[0, 0]) for spec, arrays in cases)
    check(cases, device)


@pytest.mark.parametrize("device", DEVICES)
def test_channels_before_tokens(device: Device) -> None:
    """Queries and keys [batch, heads, depth, tokens], as a convolution over a map projects them."""
    rng = np.random.default_rng(2)
    batch, heads, tokens, depth = 1, 2, 23, 9
    q, k = floats(rng, batch, heads, depth, tokens), floats(rng, batch, heads, depth, tokens)
    v = floats(rng, batch, heads, tokens, depth)
    across = View(q.size, 0, (heads * depth * tokens, depth * tokens, 1, tokens))
    spec = Attention(batch, heads, tokens, tokens, depth, depth, across, across, View(v.size, 0, dense(v.shape)), 0.5)
    check([(spec, [q, k, v])], device)


@pytest.mark.parametrize("device", DEVICES)
def test_products(device: Device) -> None:
    rng = np.random.default_rng(3)
    cases: list[Case] = []
    for batches, m, k, n in (
        ((1, 1), 1, 1, 1),
        ((2, 2), 3, 5, 7),
        ((5, 1), 9, 4, 16),
        ((1, 6), 13, 17, 33),
        ((3, 3), 7, 64, 65),
        ((7, 7), 2, 3, 130),
        ((1, 1), 25, 50, 20),
    ):
        for transposed in (False, True):
            c = floats(rng, batches[1], n, k) if transposed else floats(rng, batches[1], k, n)
            cases.append((MatMul(*batches, m, k, n, transposed), [floats(rng, batches[0], m, k), c]))
    check(cases, device)


@pytest.mark.pure
def test_threads_can_share_the_work() -> None:
    rng = np.random.default_rng(5)
    specs = {
        "attention": projection(rng, 3, 197, 64)[0],
        "single": projection(rng, 1, 20, 8)[0],
        "batched": MatMul(9, 9, 5, 6, 7),
        "tall": MatMul(1, 1, 197, 6, 7, True),
        "small": MatMul(1, 1, 5, 6, 7),
    }
    for name in ("host", "cortex-a72"):
        device = load_device(name)
        functions = {n: s.prim_func(device).with_attr("global_symbol", n) for n, s in specs.items()}
        phases = lower_kernels(tvm.IRModule(functions), device).phases
        assert {n: [tasks for _, tasks in phases[n]] for n in specs} == {
            "attention": [4],
            # Too little work for two threads: a part of its scratch memory is small enough for the stack.
            "single": [0],
            "batched": [4],
            "tall": [4],
            "small": [0],
        }


@pytest.mark.pure
@pytest.mark.parametrize("causal", (False, True))
def test_reference_equals_pytorch(causal: bool) -> None:
    spec, (x, *_) = projection(np.random.default_rng(4), 3, 11, 8, causal=causal)
    q, k, v = torch.from_numpy(x).reshape(1, 11, 3, 3, 8).permute(2, 0, 3, 1, 4)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(1, 11, 24)
    assert_close(spec.reference(x, x, x), want.numpy())


@pytest.mark.pure
def test_blocks_cover_everything_once_or_overlap() -> None:
    for extent in range(1, 200):
        for lanes in (4, 16):
            for most in (2, 4):
                seen: set[int] = set()
                for first, count, widths in column_blocks(extent, lanes, most):
                    assert len(widths) <= most
                    for i in range(count):
                        for offset, width in widths:
                            start = first + i * span(widths) + offset
                            assert start + width <= extent
                            seen |= set(range(start, start + width))
                assert seen == set(range(extent))
        assert 4 <= balanced(extent + 6, 6) <= 6


@pytest.mark.pure
def test_impossible_shapes() -> None:
    view = View(8, 0, (0, 0, 1, 2))
    with pytest.raises(ValueError, match="neighbours"):
        Attention(1, 1, 2, 2, 2, 2, view, view, view, 1.0)
    with pytest.raises(ValueError, match="batches of 2 and 3"):
        MatMul(2, 3, 1, 1, 1)
