"""Pooling on microcontrollers: portable C on this machine against the templates' meaning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.device import load_device
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean, Requant
from tests.targets.kernel_cases import code_range, codes, floats, geometry
from tests.targets.mcu_cases import Check, check_of, check_on_device, check_on_host


@st.composite
def pools(draw: st.DrawFn, kind: type[AvgPool] | type[MaxPool], dtype: str) -> Check:
    spec = kind(c=draw(st.integers(1, 11)), dtype=dtype, **geometry(draw))
    return pool_case(spec, draw(st.integers(0, 2**31)))


def pool_case(spec: AvgPool | MaxPool, seed: int) -> Check:
    rng = np.random.default_rng(seed)
    make = codes if spec.dtype == "int8" else floats
    if isinstance(spec, AvgPool) and spec.dtype == "int8":
        spec = replace(spec, requant=requant(rng, spec.taps))
    x = make(rng, spec.h, spec.w, spec.c)
    close = 1e-6 if isinstance(spec, AvgPool) and spec.dtype == "float32" else 0.0
    return check_of(spec, [x], spec.reference(x), close=close)


def requant(rng: np.random.Generator, count: int) -> Requant:
    """Scales within a factor of four of each other, divided by the window's size."""
    m, shift = integer.quantize_multiplier(float(2.0 ** rng.uniform(-2, 2)) / count)
    x_zp, y_zp = (int(v) for v in rng.integers(-128, 128, 2))
    return Requant(m, shift, x_zp, y_zp, *code_range(rng))


@pytest.mark.host
@pytest.mark.parametrize("dtype", ("int8", "float32"))
@pytest.mark.parametrize("kind", (AvgPool, MaxPool))
def test_any_window(kind: Any, dtype: str) -> None:
    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(st.lists(pools(kind, dtype), min_size=12, max_size=12, unique_by=lambda check: check.case.kernel))
    def check(cases: list[Check]) -> None:
        check_on_host(cases)

    check()


@pytest.mark.host
@pytest.mark.parametrize("dtype", ("int8", "float32"))
def test_mean_over_the_map(dtype: str) -> None:
    shapes = [(7, 7, 33), (1, 49, 5), (1, 1, 1), (1, 1, 40), (5, 9, 13), (1, 1030, 2), (2, 3, 1)]
    q = Requant(1, 1, 0, 0, -128, 127) if dtype == "int8" else None
    check_on_host([pool_case(Mean(*shape, dtype, q), seed) for seed, shape in enumerate(shapes)])


@pytest.mark.host
@pytest.mark.parametrize("value", (-128, 127))
def test_sums_of_extreme_codes_fit(value: int) -> None:
    cases = []
    for shape in [(16, 16, 6), (1, 256, 3), (1, 257, 9), (1, 2049, 4), (1, 5000, 1)]:
        x = np.full(shape, value, np.int8)
        m, shift = integer.quantize_multiplier(1.0 / (shape[0] * shape[1]))
        spec = Mean(*shape, "int8", Requant(m, shift, -value, 3, -128, 127))
        cases.append(check_of(spec, [x], spec.reference(x)))
    check_on_host(cases)


@pytest.mark.host
def test_max_pool_keeps_infinities_and_padding_never_wins() -> None:
    x = np.full((2, 2, 3), -np.inf, np.float32)
    x[0, 0, 1], x[1, 1, 2] = np.inf, -1.0
    spec = MaxPool(2, 2, 3, (2, 2), (1, 1), (1, 1, 1, 1))
    check_on_host([check_of(spec, [x], spec.reference(x))])


WINDOWS: tuple[dict[str, Any], ...] = (
    {"h": 6, "w": 8, "c": 8, "kernel": (2, 2), "stride": (2, 2)},
    {"h": 7, "w": 5, "c": 13, "kernel": (3, 3), "stride": (2, 1), "padding": (1, 1, 1, 1)},
    {"h": 7, "w": 5, "c": 6, "kernel": (3, 2), "stride": (1, 2), "padding": (0, 2, 1, 0), "dilation": (2, 2)},
    {"h": 5, "w": 9, "c": 3, "kernel": (2, 4), "stride": (3, 1)},
    {"h": 1, "w": 700, "c": 5, "kernel": (1, 600), "stride": (1, 30)},
    {"h": 25, "w": 5, "c": 16, "kernel": (25, 5), "stride": (1, 1)},
)


@pytest.mark.parametrize(
    ("target", "flags"),
    [
        pytest.param(name, flags, marks=pytest.mark.qemu(name), id=name + "".join(flags))
        for name, flags in (("cortex-m4", ()), ("cortex-m4", ("-DEK_PORTABLE",)), ("cortex-m3", ()), ("rv32imc", ()))
    ],
)
def test_devices(target: str, flags: tuple[str, ...]) -> None:
    kinds = [(kind, dtype) for kind in (AvgPool, MaxPool) for dtype in ("int8", "float32")]
    checks = [
        pool_case(kind(dtype=dtype, **shape), seed) for seed, shape in enumerate(WINDOWS) for kind, dtype in kinds
    ]
    check_on_device(checks, load_device(target), flags)
