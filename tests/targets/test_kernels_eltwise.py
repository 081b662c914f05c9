"""Element-wise integer kernels: compiled host code against `edgec.integer`, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.kernels.common import AddEpilogue
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from tests.targets.kernel_cases import add_epilogue, code_range, codes, host
from tests.targets.kernel_runner import run, run_calls, spec_call

pytestmark = pytest.mark.host
SWEEP = settings(max_examples=15, deadline=None, derandomize=True)
ALL_CODES = np.arange(-128, 128, dtype=np.int8)

# Scalars, channel vectors, per-sample channels, whole maps, and sizes around the vector width.
SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 5, 7, 33), (1, 5, 7, 33)),
    ((1, 5, 7, 33), (1, 1, 1, 33)),
    ((1, 1, 1, 17), (1, 4, 3, 17)),
    ((1, 3, 3, 15), (1,)),
    ((2, 3, 1, 5), (3, 4, 1)),
    ((1,), (1,)),
    ((), (4,)),
    ((31,), (31,)),
    ((2, 1, 3, 70), (2, 5, 1, 1)),
    ((1, 1, 5, 1), (4, 3, 5, 9)),
)


@SWEEP
@given(st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from((None, 0, 1)))
def test_qadd(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int, inplace: int | None) -> None:
    rng = np.random.default_rng(seed)
    a, b = (codes(rng, *shape) for shape in shapes)
    e = add_epilogue(rng)
    spec = QAdd(a.shape, b.shape, e)
    expected = integer.qadd(a, b, e.m_self, e.m_other, e.f, e.z_self, e.z_other, e.z_y, e.lo, e.hi)
    position = inplace if inplace in spec.inplace else None
    np.testing.assert_array_equal(run(spec_call(spec, host(), [a, b], expected, inplace=position)), expected)


def test_qadd_on_all_pairs_with_quantised_scales() -> None:
    """The specification's example: every pair of codes, multipliers from real scales."""
    ma, mb, f = integer.add_parameters(0.0231, 0.0117, 0.0262)
    a, b = ALL_CODES[:, None], ALL_CODES[None, :]
    spec = QAdd(a.shape, b.shape, AddEpilogue(ma, mb, f, 3, -11, -5, -128, 127))
    expected = integer.qadd(a, b, ma, mb, f, 3, -11, -5, -128, 127)
    np.testing.assert_array_equal(run(spec_call(spec, host(), [a, b], expected)), expected)


@SWEEP
@given(st.sampled_from(SHAPES), st.integers(0, 2**31), st.sampled_from((None, 0, 1)))
def test_qmul(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int, inplace: int | None) -> None:
    rng = np.random.default_rng(seed)
    a, b = (codes(rng, *shape) for shape in shapes)
    m, shift = integer.quantize_multiplier(float(2.0 ** rng.uniform(-12, -4)))
    zeros = [int(v) for v in rng.integers(-128, 128, 3)]
    lo, hi = code_range(rng)
    spec = QMul(a.shape, b.shape, m, shift, *zeros, lo, hi)
    expected = integer.qmul(a, b, m, shift, *zeros, lo, hi)
    position = inplace if inplace in spec.inplace else None
    np.testing.assert_array_equal(run(spec_call(spec, host(), [a, b], expected, inplace=position)), expected)


@SWEEP
@given(st.integers(0, 2**31), st.floats(-62, 29), st.booleans())
def test_qrescale(seed: int, exponent: float, inplace: bool) -> None:
    """All codes, and multipliers from the smallest to the largest legal one."""
    rng = np.random.default_rng(seed)
    m, shift = integer.quantize_multiplier(2.0**exponent)
    zx, zy = (int(v) for v in rng.integers(-128, 128, 2))
    lo, hi = code_range(rng)
    spec = QRescale(ALL_CODES.shape, m, shift, zx, zy, lo, hi)
    expected = integer.qrescale(ALL_CODES, m, shift, zx, zy, lo, hi)
    call = spec_call(spec, host(), [ALL_CODES], expected, inplace=0 if inplace else None)
    np.testing.assert_array_equal(run(call), expected)


@pytest.mark.parametrize(("shape", "axis"), [((1, 3, 5, 33), 3), ((1, 17, 4, 4), 1), ((6, 5), 0), ((7,), 0)])
def test_qlut(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    x, one, rows = codes(rng, *shape), codes(rng, 256), codes(rng, shape[axis], 256)
    cases = [(QLut(shape, False, axis), one), (QLut(shape, True, axis), rows)]
    calls = [spec_call(spec, host(), [x], x, table=table) for spec, table in cases]
    for (got,), (spec, table) in zip(run_calls(calls, host()), cases, strict=True):
        expected = integer.qlut(x, table, axis)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(spec.reference(x, table), expected)


@SWEEP
@given(st.floats(-20, 5), st.integers(-128, 127), st.integers(0, 2**31))
def test_quantize(exponent: float, zero_point: int, seed: int) -> None:
    """A true float32 division, ties to even: products of the scale and half codes, and their neighbours, decide it."""
    rng = np.random.default_rng(seed)
    scale = float(np.float32(2.0**exponent))
    ties = (np.arange(-600, 600) * 0.5).astype(np.float32) * np.float32(scale)
    near = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    special = np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, 3e38, -3e38], np.float32)
    noise = rng.standard_normal(400).astype(np.float32) * np.float32(50 * scale)
    x = np.concatenate([*near, special, noise])
    with np.errstate(over="ignore"):
        expected = integer.quantize(x, scale, zero_point)
    spec = Quantize(x.shape, scale, zero_point)
    np.testing.assert_array_equal(run(spec_call(spec, host(), [x], expected)), expected)


@SWEEP
@given(st.floats(-20, 5), st.integers(-128, 127))
def test_dequantize(exponent: float, zero_point: int) -> None:
    scale = 2.0**exponent
    expected = integer.dequantize(ALL_CODES, scale, zero_point)
    spec = Dequantize(ALL_CODES.shape, scale, zero_point)
    np.testing.assert_array_equal(run(spec_call(spec, host(), [ALL_CODES], expected)), expected)


@pytest.mark.parametrize(
    "spec",
    [
        QAdd((4,), (1,), AddEpilogue(1, 1, 1, 0, 0, 0, -128, 127)),
        QMul((2, 3), (3,), 2**30, 40, 1, 2, 3, -128, 127),
        QRescale((5,), 2**30, 31, 0, 0, -128, 127),
        QLut((5,), False, 0),
        Quantize((5,), 0.5, 0),
        Dequantize((5,), 0.5, 0),
    ],
)
def test_key_names_every_field(spec: Any) -> None:
    """Two kernels with the same key are the same kernel: lowering shares code by key."""
    for field, value in vars(spec).items():
        assert f"{field}={value!r}" in spec.key()
