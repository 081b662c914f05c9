"""Pooling: compiled host code against its NumPy meaning, and that meaning against the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean, Requant
from tests.targets.kernel_cases import code_range, codes, floats, geometry, host
from tests.targets.kernel_runner import assert_close, run, run_calls, spec_call


@st.composite
def pools(draw: st.DrawFn, kind: type[AvgPool] | type[MaxPool], dtype: str, lanes: int) -> AvgPool | MaxPool:
    shape = geometry(draw)
    channels, seed = draw(st.integers(1, 2 * lanes + 1)), draw(st.integers(0, 2**31))
    spec = kind(c=channels, dtype=dtype, **shape)
    if isinstance(spec, AvgPool) and dtype == "int8":
        return replace(spec, requant=requant(np.random.default_rng(seed), spec.kernel[0] * spec.kernel[1]))
    return spec


def requant(rng: np.random.Generator, count: int) -> Requant:
    """Scales within a factor of four of each other, divided by the window's size."""
    m, shift = integer.quantize_multiplier(float(2.0 ** rng.uniform(-2, 2)) / count)
    x_zp, y_zp = (int(v) for v in rng.integers(-128, 128, 2))
    return Requant(m, shift, x_zp, y_zp, *code_range(rng))


@pytest.mark.host
@pytest.mark.parametrize("lanes", (4, 16))
@pytest.mark.parametrize("dtype", ("int8", "float32"))
@pytest.mark.parametrize("kind", (AvgPool, MaxPool))
def test_edge_sizes(kind: Any, dtype: str, lanes: int) -> None:
    device = host(lanes)

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(st.lists(pools(kind, dtype, lanes), min_size=1, max_size=8))
    def check(specs: list[AvgPool | MaxPool]) -> None:
        rng = np.random.default_rng(0)
        make = codes if dtype == "int8" else floats
        inputs = [make(rng, spec.h, spec.w, spec.c) for spec in specs]
        results = [spec.reference(x) for spec, x in zip(specs, inputs, strict=True)]
        calls = [spec_call(s, device, [x], y) for s, x, y in zip(specs, inputs, results, strict=True)]
        for (got,), expected in zip(run_calls(calls, device), results, strict=True):
            assert_close(got, expected)

    check()


@pytest.mark.host
@pytest.mark.parametrize(
    "shape", [(7, 7, 33), (1, 49, 5), (1, 1, 1), (1, 1, 40), (5, 9, 130), (1, 1030, 2), (1, 3000, 70), (2, 3, 1)]
)
@pytest.mark.parametrize("dtype", ("int8", "float32"))
def test_mean_over_the_map(dtype: str, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    q = requant(rng, shape[0] * shape[1]) if dtype == "int8" else None
    x = (codes if dtype == "int8" else floats)(rng, *shape)
    spec = Mean(*shape, dtype=dtype, requant=q)
    if q is None:
        expected = x.mean((0, 1), keepdims=True)
    else:
        expected = integer.qmean(x, (0, 1), True, q.m, q.shift, q.x_zp, q.y_zp, q.lo, q.hi)
    assert_close(run(spec_call(spec, host(), [x], expected), host()), expected)


@pytest.mark.host
@pytest.mark.parametrize("value", (-128, 127))
@pytest.mark.parametrize("shape", [(16, 16, 64), (1, 256, 3), (1, 257, 96), (1, 2049, 64), (1, 5000, 1)])
def test_sums_of_extreme_codes_fit(shape: tuple[int, int, int], value: int) -> None:
    """Sums are held in 16 bits for as many codes as fit."""
    x = np.full(shape, value, np.int8)
    m, shift = integer.quantize_multiplier(1.0 / (shape[0] * shape[1]))
    spec = Mean(*shape, dtype="int8", requant=Requant(m, shift, 0, 0, -128, 127))
    expected = spec.reference(x)
    np.testing.assert_array_equal(expected, value)
    np.testing.assert_array_equal(run(spec_call(spec, host(), [x], expected), host()), expected)


@pytest.mark.host
@pytest.mark.parametrize("kernel", [(3, 11), (17, 16), (20, 3), (1, 40)])
@pytest.mark.parametrize("kind", (AvgPool, MaxPool))
def test_large_windows(kind: Any, kernel: tuple[int, int]) -> None:
    """Windows whose columns are not unrolled, and those whose sums do not fit 16 bits."""
    rng = np.random.default_rng(0)
    padding = tuple(k // 3 for k in kernel for _ in range(2))
    cases: list[tuple[Any, np.ndarray]] = []
    for c in (3, 24, 40):
        window: dict[str, Any] = {"kernel": kernel, "stride": (2, 3), "padding": padding}
        cases.append((kind(20, 41, c, **window), floats(rng, 20, 41, c)))
        more = {"requant": requant(rng, kernel[0] * kernel[1])} if kind is AvgPool else {}
        cases.append((kind(20, 41, c, **window, dtype="int8", **more), codes(rng, 20, 41, c)))
    results = [spec.reference(x) for spec, x in cases]
    calls = [spec_call(spec, host(), [x], y) for (spec, x), y in zip(cases, results, strict=True)]
    for (got,), expected in zip(run_calls(calls, host()), results, strict=True):
        assert_close(got, expected)


@pytest.mark.pure
def test_references_are_the_definition() -> None:
    x = codes(np.random.default_rng(0), 9, 8, 5)
    q = requant(np.random.default_rng(1), 6)
    geometry = ((3, 2), (2, 1), (1, 0, 2, 1))
    average = AvgPool(9, 8, 5, *geometry, dtype="int8", requant=q)
    terms = (q.m, q.shift, q.x_zp, q.y_zp, q.lo, q.hi)
    defined = integer.qavg_pool2d(x[None], *geometry, *terms, layout="NHWC")
    np.testing.assert_array_equal(average.reference(x), defined[0])
    largest = MaxPool(9, 8, 5, *geometry, (1, 2), "int8")
    defined = integer.qmax_pool2d(x[None], *geometry, (1, 2), False, layout="NHWC")
    np.testing.assert_array_equal(largest.reference(x), defined[0])


@pytest.mark.host
def test_max_pool_keeps_infinities_and_padding_never_wins() -> None:
    x = np.full((2, 2, 3), -np.inf, np.float32)
    x[0, 0, 1], x[1, 1, 2] = np.inf, -1e38
    spec = MaxPool(2, 2, 3, (2, 2), (1, 1), (1, 1, 1, 1))
    expected = spec.reference(x)
    np.testing.assert_array_equal(run(spec_call(spec, host(), [x], expected), host()), expected)
