"""The integer definitions: golden vectors, bounds, and each operator against a loop over single elements."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.errors import EdgecError

pytestmark = pytest.mark.pure
CODES = st.integers(-128, 127)
SCALES = st.floats(1e-5, 10.0)


def half_up(value: float) -> int:
    return math.floor(value + 0.5)


# -- scaling -----------------------------------------------------------------------------------------------------------

GOLDEN = [
    # multiplier, m, e, accumulators -> RQ1 (specs/quantization.md 1.14)
    (0.0007345, 1615182581, -10, {681: 1, -681: -1, 2042: 1, -2042: -1, 123456: 91}),
    (0.5, 1073741824, 0, {1: 1, -1: 0, 3: 2, -3: -1}),
    (0.0123, 1690499128, -6, {-19959: -245, -19797: -244, 19634: 241}),
    (1.75, 1879048192, 1, {4: 7, -3: -5}),
]


@pytest.mark.parametrize("multiplier,m,exponent,pairs", GOLDEN)
def test_golden_requantisation(multiplier, m, exponent, pairs):
    assert integer.quantize_multiplier(multiplier) == (m, 31 - exponent)
    for accumulator, want in pairs.items():
        assert int(integer.rq1(accumulator, m, 31 - exponent)) == want


@given(st.integers(-(2**31), 2**31 - 1), st.integers(2**30, 2**31 - 1), st.integers(1, 62))
def test_rq1_is_exact_rounding_half_up(accumulator, m, shift):
    exact = (2 * accumulator * m + (1 << shift)) // (1 << (shift + 1))
    assert int(integer.rq1(accumulator, m, shift)) == exact


@given(st.floats(2.0**-32, 2.0**29))
def test_multiplier_is_normalised_and_close(scale):
    m, shift = integer.quantize_multiplier(scale)
    assert 2**30 <= m < 2**31
    assert 1 <= shift <= 62
    assert m * 2.0**-shift == pytest.approx(scale, rel=2.0**-31)


def test_multiplier_carries_when_rounding_reaches_two_to_the_31():
    assert integer.quantize_multiplier(np.nextafter(1.0, 0.0)) == (2**30, 30)


def test_tiny_multiplier_is_an_exact_zero():
    m, shift = integer.quantize_multiplier(2.0**-33)
    assert (m, shift) == (0, 62)
    assert list(integer.rq1(np.array([-(2**31), 2**31 - 1]), m, shift)) == [0, 0]
    assert integer.quantize_multiplier(0.0) == (0, 62)


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf, 2.0**30])
def test_impossible_multiplier(scale):
    with pytest.raises(EdgecError, match="requantisation multiplier"):
        integer.quantize_multiplier(scale)
    with pytest.raises(EdgecError, match="requantisation multiplier"):
        integer.float_multipliers([scale])


@given(st.integers(-(2**31), 2**31 - 1), st.floats(2.0**-32, 2.0**29, width=32))
def test_rqf_is_two_float32_roundings_and_one_half_to_even(accumulator, m):
    """Against exact rational arithmetic: the conversion and the product round to 24 bits, then to an integer."""

    def float32(value: Fraction) -> Fraction:
        """Half to even; all values here are far inside the normal range."""
        if value == 0:
            return value
        exponent = math.floor(math.log2(abs(value))) - 23
        step = Fraction(2) ** exponent
        if abs(value) / step >= 2**24:  # log2 rounds up just below a power of two
            step *= 2
        elif abs(value) / step < 2**23:
            step /= 2
        return round(value / step) * step

    exact = round(float32(float32(Fraction(accumulator)) * Fraction(m)))
    assert int(integer.rqf(accumulator, np.float32(m))) == exact


def test_rqf_ties_and_lost_bits():
    half = np.float32(0.5)
    assert integer.rqf([1, 3, 5, -1, -3], half).tolist() == [0, 2, 2, 0, -2]
    assert integer.rqf([2**24 + 1, 2**24 + 3], np.float32(1)).tolist() == [2**24, 2**24 + 4]
    assert integer.rqf(2**31 - 1, np.float32(2.0**29)) == 2**60


def test_the_dtype_of_the_multiplier_chooses_the_rounding():
    assert integer.requantize(1, *integer.quantize_multipliers(0.5)) == 1
    assert integer.requantize(1, *integer.float_multipliers(0.5)) == 0
    m, shift = integer.multipliers([0.25, 3.0], "RQF")
    assert (m.dtype, shift.dtype) == (np.float32, np.int32)
    assert m.tolist() == [0.25, 3.0] and shift.tolist() == [0, 0]
    assert integer.multipliers([0.25], "RQ1")[0].dtype == np.int32


def test_tiny_float_multiplier_is_an_exact_zero():
    """Subnormal numbers are where devices differ."""
    m, _ = integer.float_multipliers([0.0, 1e-40, np.nextafter(2.0**-32, 0), 2.0**-32])
    assert m.tolist() == [0.0, 0.0, 0.0, 2.0**-32]
    assert integer.rqf([-(2**31), 2**31 - 1], m[3]).tolist() == [0, 0]


@settings(max_examples=300)
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3), st.floats(1e-3, 1e3))
def test_add_parameters_never_overflow_and_use_all_bits(sa, sb, sy):
    ma, mb, f = integer.add_parameters(sa, sb, sy)
    worst = 255 * (ma + mb) + 2 ** (f - 1)
    assert worst < 2**31
    assert f == 22 or 255 * (sa + sb) / sy * 2.0 ** (f + 1) > 2**31 - 2**f - 2 * 255


def test_add_against_real_rounding():
    """specs/quantization.md 1.9: at f = 20, 65,371 of the 65,536 pairs equal exact rounding, the rest differ by 1."""
    a, b = (v.ravel().astype(np.int8) for v in np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)))
    sa, sb, sy, za, zb, zy = 0.0231, 0.0117, 0.0262, 3, -11, -5
    ma, mb = (half_up(s / sy * 2**20) for s in (sa, sb))
    exact = np.floor((sa * (a.astype(float) - za) + sb * (b.astype(float) - zb)) / sy + 0.5) + zy
    got = integer.qadd(a, b, ma, mb, 20, za, zb, zy, -128, 127).astype(float)
    exact = np.clip(exact, -128, 127)
    inside = (exact > -128) & (exact < 127)
    assert np.abs(got - exact).max() <= 1
    assert (got != exact).sum() <= 65_536 - 65_371
    assert inside.sum() > 20_000


def test_impossible_addition():
    with pytest.raises(EdgecError, match="cannot add scales"):
        integer.add_parameters(1.0, 1.0, 1e-9)


def test_subtraction_has_a_negative_multiplier():
    ma, mb, f = integer.add_parameters(0.5, -0.25, 0.5)
    assert (ma, mb) == (2**f, -(2 ** (f - 1)))
    y = integer.qadd(np.array([10], np.int8), np.array([8], np.int8), ma, mb, f, 0, 0, 0, -128, 127)
    assert y.tolist() == [6]


def test_clip_codes():
    inf = math.inf
    assert integer.clip_codes(0.0, inf, 0.1, -20) == (-20, 127)
    assert integer.clip_codes(0.0, 6.0, 0.05, -128) == (-128, -8)
    assert integer.clip_codes(0.0, 6.0, 0.01, -128) == (-128, 127)
    assert integer.clip_codes(-inf, inf, 0.1, 0) == (-128, 127)
    assert integer.clip_codes(-1.0, 1.0, 0.5, 7) == (5, 9)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_accumulator_bound_is_sharp():
    weights = np.full((2, 66_000), 127, np.int8)
    integer.check_accumulator(weights, np.zeros(2, np.int64))
    room = 2**31 - 1 - 255 * 127 * 66_000
    integer.check_accumulator(weights, np.array([room, -room]))
    with pytest.raises(EdgecError, match=r"accumulator could overflow.*channel 1"):
        integer.check_accumulator(weights, np.array([room, -room - 1]))


def test_bias_folds_the_zero_point():
    weights = np.array([[1, 2, 3], [-4, 0, 5]], np.int8)
    bias = integer.bias_codes([0.5, -1.0], weights, 0.1, -7, [0.5, 0.25])
    assert bias.dtype == np.int32
    assert bias.tolist() == [10 + 7 * 6, -40 + 7 * 1]


def test_bias_too_large_for_int32():
    with pytest.raises(EdgecError, match="bias does not fit"):
        integer.bias_codes([1.0], np.array([[1]], np.int8), 1e-5, 0, 1e-8)


def test_accumulator_outside_int32_is_refused():
    x, w = np.full((1, 140_000), 127, np.int8), np.full((1, 140_000), 127, np.int8)
    with pytest.raises(EdgecError, match="left int32"):
        integer.qlinear(x, w, np.zeros(1, np.int32), np.int32(2**30), np.int32(31), 0, -128, 127)


# -- border ------------------------------------------------------------------------------------------------------------


@given(SCALES, CODES)
def test_quantize_inverts_dequantize_for_every_code(scale, zero_point):
    every = np.arange(-128, 128).astype(np.int8)
    np.testing.assert_array_equal(
        integer.quantize(integer.dequantize(every, scale, zero_point), scale, zero_point), every
    )


def test_quantize_rounds_half_to_even_and_saturates():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, np.inf], np.float32)
    assert integer.quantize(x, 1.0, 0).tolist() == [0, 2, 2, 0, -2, 127, -128, 127]
    assert integer.quantize(x[:2], 1.0, 10).tolist() == [10, 12]


# -- operators against loops -------------------------------------------------------------------------------------------


def codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def requantised(accumulator: int, m: int, shift: int, zero_point: int, lo: int, hi: int) -> int:
    return min(max((accumulator * int(m) + (1 << (int(shift) - 1)) >> int(shift)) + zero_point, lo), hi)


@pytest.mark.parametrize(
    "groups,stride,padding,dilation",
    [(1, (1, 1), (1, 1, 1, 1), (1, 1)), (4, (2, 1), (0, 2, 1, 0), (1, 2)), (2, (1, 2), (0, 0, 0, 0), (2, 1))],
)
def test_qconv2d_against_loops(groups, stride, padding, dilation):
    rng = np.random.default_rng(groups)
    x, w = codes(rng, 2, 4, 7, 8), np.maximum(codes(rng, 8, 4 // groups, 3, 2), -127)
    bias = rng.integers(-3000, 3000, 8).astype(np.int32)
    m, shift = integer.quantize_multipliers(rng.uniform(0.0005, 0.005, 8))
    x_zp, y_zp, lo, hi = -9, 4, -120, 110
    got = integer.qconv2d(x, w, bias, m, shift, stride, padding, dilation, groups, x_zp, y_zp, lo, hi)
    nhwc = integer.qconv2d(
        x.transpose(0, 2, 3, 1), w, bias, m, shift, stride, padding, dilation, groups, x_zp, y_zp, lo, hi, "NHWC"
    )
    np.testing.assert_array_equal(nhwc.transpose(0, 3, 1, 2), got)
    n, o, rows, columns = got.shape
    assert rows == (7 + padding[0] + padding[1] - 2 * dilation[0] - 1) // stride[0] + 1
    assert columns == (8 + padding[2] + padding[3] - dilation[1] - 1) // stride[1] + 1
    for b, c, i, j in itertools.product(range(n), range(o), range(rows), range(columns)):
        total = int(bias[c])
        for k, u, v in itertools.product(range(4 // groups), range(3), range(2)):
            r, s = i * stride[0] + u * dilation[0] - padding[0], j * stride[1] + v * dilation[1] - padding[2]
            channel = (c // (8 // groups)) * (4 // groups) + k
            value = int(x[b, channel, r, s]) if 0 <= r < 7 and 0 <= s < 8 else x_zp
            total += value * int(w[c, k, u, v])
        assert got[b, c, i, j] == requantised(total, m[c], shift[c], y_zp, lo, hi)


def test_qconv2d_equals_the_real_convolution():
    """With the bias of `bias_codes` and zero-point padding, the result is the real convolution within one code."""
    rng = np.random.default_rng(0)
    x, w = codes(rng, 1, 3, 6, 6), np.maximum(codes(rng, 5, 3, 3, 3), -127)
    sx, zx, sw, sy, zy = 0.03, 20, rng.uniform(0.001, 0.01, 5), 0.2, -6
    bias = rng.normal(0, 1, 5)
    codes32 = integer.bias_codes(bias, w, sx, zx, sw)
    m, shift = integer.quantize_multipliers(sx * sw / sy)
    got = integer.qconv2d(x, w, codes32, m, shift, (1, 1), (1, 1, 1, 1), (1, 1), 1, zx, zy, -128, 127)
    real_x = np.pad(sx * (x.astype(float) - zx), ((0, 0), (0, 0), (1, 1), (1, 1)))
    want = np.zeros((1, 5, 6, 6))
    for i, j in itertools.product(range(3), range(3)):
        tap = real_x[:, :, i : i + 6, j : j + 6]
        want += np.einsum("nchw,oc->nohw", tap, w[:, :, i, j] * sw[:, None])
    want = np.clip((want + bias.reshape(1, 5, 1, 1)) / sy + zy, -128, 127)
    assert np.abs(got - want).max() <= 0.51
    assert np.unique(got).size > 40


def test_qlinear_against_loops():
    rng = np.random.default_rng(0)
    x, w = codes(rng, 2, 3, 10), np.maximum(codes(rng, 4, 10), -127)
    bias = rng.integers(-3000, 3000, 4).astype(np.int32)
    m, shift = integer.quantize_multipliers(rng.uniform(0.001, 0.01, 4))
    got = integer.qlinear(x, w, bias, m, shift, 7, -128, 127)
    for b, t, o in itertools.product(range(2), range(3), range(4)):
        total = sum(int(x[b, t, k]) * int(w[o, k]) for k in range(10)) + int(bias[o])
        assert got[b, t, o] == requantised(total, m[o], shift[o], 7, -128, 127)


def test_elementwise_against_loops():
    rng = np.random.default_rng(0)
    a, b = codes(rng, 3, 4), codes(rng, 3, 1)
    m, shift = integer.quantize_multiplier(0.013)
    product = integer.qmul(a, b, m, shift, 3, -2, 5, -100, 100)
    scaled = integer.qrescale(a, *integer.quantize_multiplier(1.7), -8, 2, -128, 127)
    ma, mb, f = integer.add_parameters(0.02, 0.05, 0.06)
    total = integer.qadd(a, b, ma, mb, f, 3, -2, 5, -100, 100)
    for i, j in itertools.product(range(3), range(4)):
        p, q = int(a[i, j]), int(b[i, 0])
        assert product[i, j] == requantised((p - 3) * (q + 2), m, shift, 5, -100, 100)
        assert scaled[i, j] == requantised(p + 8, *integer.quantize_multiplier(1.7), 2, -128, 127)
        assert total[i, j] == min(max((ma * (p - 3) + mb * (q + 2) + (1 << (f - 1)) >> f) + 5, -100), 100)


def test_pools_against_loops():
    rng = np.random.default_rng(0)
    x = codes(rng, 1, 2, 6, 7)
    m, shift = integer.quantize_multiplier(0.8 / 6)
    average = integer.qavg_pool2d(x, (3, 2), (2, 3), (1, 0, 0, 1), m, shift, -4, 6, -128, 127)
    largest = integer.qmax_pool2d(x, (3, 2), (2, 3), (1, 0, 0, 1), (1, 1), False)
    assert average.shape == largest.shape == (1, 2, 3, 3)
    for c, i, j in itertools.product(range(2), range(3), range(3)):
        window = [
            int(x[0, c, r, s]) if 0 <= r < 6 and 0 <= s < 7 else None
            for r in range(2 * i - 1, 2 * i + 2)
            for s in range(3 * j, 3 * j + 2)
        ]
        inside = [v for v in window if v is not None]
        assert average[0, c, i, j] == requantised(sum(v + 4 for v in inside), m, shift, 6, -128, 127)
        assert largest[0, c, i, j] == max(inside)
    mean = integer.qmean(x, (2, 3), False, *integer.quantize_multiplier(1 / 42), -4, 6, -128, 127)
    for c in range(2):
        want = requantised(int((x[0, c].astype(int) + 4).sum()), *integer.quantize_multiplier(1 / 42), 6, -128, 127)
        assert mean[0, c] == want


def test_ceil_mode_follows_pytorchs_rule():
    assert integer.pool_out_size(6, 3, 2, 0, 0, 1, False) == 2
    assert integer.pool_out_size(6, 3, 2, 0, 0, 1, True) == 3
    # A window that would start in the trailing padding is dropped.
    assert integer.pool_out_size(5, 2, 3, 1, 1, 1, True) == 2


def test_lut():
    table = integer.lut_table(np.tanh, 0.05, 10, 1 / 128, 0)
    for code in range(-128, 128):
        exact = np.clip(np.rint(np.tanh(0.05 * (code - 10)) * 128), -128, 127)
        assert table[code + 128] == exact
    x = np.array([[-128, 0], [5, 127]], np.int8)
    np.testing.assert_array_equal(integer.qlut(x, table, 0), table[x.astype(int) + 128])
    slopes = np.array([[0.1], [0.5]])
    per_channel = integer.lut_table(lambda v: np.where(v > 0, v, slopes * v), 0.1, 0, 0.1, 0)
    np.testing.assert_array_equal(integer.qlut(x, per_channel, 0), [[-13, 0], [5, 127]])
    np.testing.assert_array_equal(integer.qlut(x, per_channel, 1), [[-13, 0], [5, 127]])
    with pytest.raises(EdgecError, match="not a number"):
        integer.lut_table(lambda v: np.where(v < 0, np.nan, v), 0.1, 0, 0.1, 0)
