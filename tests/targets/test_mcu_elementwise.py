"""Element-wise kernels of microcontrollers: portable C on this machine against `edgec.integer`, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.device import load_device
from edgec.targets.kernels.common import AddEpilogue
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.softmax import Softmax
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.mcu.kernels.scale import scale_fields
from tests.targets.kernel_cases import add_epilogue, code_range, codes, floats
from tests.targets.mcu_cases import Check, check_of, check_on_device, check_on_host

ALL_CODES = np.arange(-128, 128, dtype=np.int8)
SWEEP = settings(max_examples=3, deadline=None, derandomize=True)
SEEDS = st.lists(st.integers(0, 2**31), min_size=12, max_size=12, unique=True)
INPLACE = st.sampled_from((None, 0, 1))

# Scalars, channel vectors, per-sample channels, whole maps, operands that broadcast against each other.
SHAPES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1, 5, 7, 33), (1, 5, 7, 33)),
    ((1, 5, 7, 33), (1, 1, 1, 33)),
    ((1, 1, 1, 17), (1, 4, 3, 17)),
    ((1, 3, 3, 15), (1,)),
    ((2, 3, 1, 5), (3, 4, 1)),
    ((1,), (1,)),
    ((), (4,)),
    ((31,), (31,)),
    ((2, 1, 3, 7), (2, 5, 1, 1)),
    ((1, 1, 5, 1), (4, 3, 5, 9)),
)


def addition(seed: int, inplace: int | None = None) -> Check:
    rng = np.random.default_rng(seed)
    a, b = (codes(rng, *shape) for shape in SHAPES[seed % len(SHAPES)])
    e = add_epilogue(rng)
    expected = integer.qadd(a, b, e.m_self, e.m_other, e.f, e.z_self, e.z_other, e.z_y, e.lo, e.hi)
    return check_of(QAdd(a.shape, b.shape, e), [a, b], expected, inplace)


def product(seed: int, inplace: int | None = None) -> Check:
    rng = np.random.default_rng(seed)
    a, b = (codes(rng, *shape) for shape in SHAPES[seed % len(SHAPES)])
    m, shift = integer.quantize_multiplier(float(2.0 ** rng.uniform(-25, 12)))
    za, zb, zy = (int(v) for v in rng.integers(-128, 128, 3))
    lo, hi = code_range(rng)
    expected = integer.qmul(a, b, m, shift, za, zb, zy, lo, hi)
    return check_of(QMul(a.shape, b.shape, m, shift, za, zb, zy, lo, hi), [a, b], expected, inplace)


def rescaled(seed: int, inplace: int | None = None) -> Check:
    """All codes, and multipliers from the smallest to the largest legal one."""
    rng = np.random.default_rng(seed)
    m, shift = integer.quantize_multiplier(float(2.0 ** rng.uniform(-62, 29)))
    zx, zy = (int(v) for v in rng.integers(-128, 128, 2))
    lo, hi = code_range(rng)
    expected = integer.qrescale(ALL_CODES, m, shift, zx, zy, lo, hi)
    return check_of(QRescale(ALL_CODES.shape, m, shift, zx, zy, lo, hi), [ALL_CODES], expected, inplace)


def table(seed: int, inplace: int | None = None) -> Check:
    rng = np.random.default_rng(seed)
    shape, axis = [((1, 3, 5, 33), 3), ((1, 17, 4, 4), 1), ((6, 5), 0), ((7,), 0)][seed % 4]
    per_channel = bool(rng.integers(2))
    x, values = codes(rng, *shape), codes(rng, *([shape[axis], 256] if per_channel else [256]))
    spec = QLut(shape, per_channel, axis if per_channel else 0)
    return check_of(spec, [x], integer.qlut(x, values, axis), inplace, weights={"table": values})


def quantized(seed: int, inplace: int | None = None) -> Check:
    """A true division, ties to even: products of the scale and half codes, and their neighbours, decide it."""
    rng = np.random.default_rng(seed)
    scale, zero = float(np.float32(2.0 ** rng.uniform(-20, 5))), int(rng.integers(-128, 128))
    ties = (np.arange(-600, 600) * 0.5).astype(np.float32) * np.float32(scale)
    near = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    special = np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, 3e38, -3e38], np.float32)
    x = np.concatenate([*near, special, floats(rng, 400) * np.float32(50 * scale)])
    with np.errstate(over="ignore"):
        expected = integer.quantize(x, scale, zero)
    return check_of(Quantize(x.shape, scale, zero), [x], expected, inplace)


def dequantized(seed: int, inplace: int | None = None) -> Check:
    rng = np.random.default_rng(seed)
    scale, zero = float(2.0 ** rng.uniform(-20, 5)), int(rng.integers(-128, 128))
    return check_of(
        Dequantize(ALL_CODES.shape, scale, zero), [ALL_CODES], integer.dequantize(ALL_CODES, scale, zero), inplace
    )


def transposed(seed: int, inplace: int | None = None) -> Check:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 5)))
    order = tuple(int(axis) for axis in rng.permutation(len(shape)))
    x = codes(rng, *shape) if rng.integers(2) else floats(rng, *shape)
    spec = Transpose(shape, order, str(x.dtype))
    return check_of(spec, [x], spec.reference(x), inplace)


def softmax(seed: int, inplace: int | None = None) -> Check:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 70)))
    x = floats(rng, *shape) * np.float32(2.0 ** rng.uniform(-3, 7))
    spec = Softmax(*shape, log=bool(rng.integers(2)))
    return check_of(spec, [x], spec.reference(x), inplace, close=1e-6)


KINDS = (addition, product, rescaled, table, quantized, dequantized, transposed, softmax)


@pytest.mark.host
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_definition(kind: Callable[[int, int | None], Check]) -> None:
    @SWEEP
    @given(SEEDS, INPLACE)
    def check(seeds: list[int], inplace: int | None) -> None:
        check_on_host([kind(seed, inplace) for seed in seeds])

    check()


@pytest.mark.host
def test_addition_of_all_pairs_of_codes() -> None:
    """Multipliers from real scales, and operands that are both broadcast."""
    ma, mb, f = integer.add_parameters(0.0231, 0.0117, 0.0262)
    a, b = ALL_CODES[:, None], ALL_CODES[None, :]
    spec = QAdd(a.shape, b.shape, AddEpilogue(ma, mb, f, 3, -11, -5, -128, 127))
    check_on_host([check_of(spec, [a, b], integer.qadd(a, b, ma, mb, f, 3, -11, -5, -128, 127))])


@pytest.mark.host
def test_softmax_of_infinities() -> None:
    """As documented at the template: -inf has no weight, rows of nothing else and rows with NaN become NaN."""
    inf, nan = np.inf, np.nan
    x = np.array([[0, -inf, 1], [-inf, -inf, -inf], [0, nan, 1], [nan, 0, 1], [-1e30, 0, -90]], np.float32)
    for log in (False, True):
        spec = Softmax(*x.shape, log=log)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = spec.reference(x)
        check_on_host([check_of(spec, [x], expected, close=1e-6)])


@pytest.mark.pure
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 255 * 4096), st.integers(0, 2**31 - 1), st.integers(1, 62), st.integers(-128, 127), st.data())
def test_rescaling_is_the_definition(largest: int, m: int, shift: int, zero: int, data: st.DataObject) -> None:
    """The form of `c/scale.h`, for any multiplier and sum that it takes, within its 32 bits."""
    fields = scale_fields(m, shift, zero, -128, 127, largest)
    if fields is None:
        return
    values: dict[str, Any] = dict(fields)
    factor, unit, add, post = (values[k] for k in ("m", "unit", "add", "post"))
    some = data.draw(st.lists(st.integers(-largest, largest), max_size=20))
    acc = np.array([-largest, -1, 0, 1, largest, *some], np.int64)
    upper = (acc * unit * factor) >> 32
    assert np.all(np.abs(acc * unit) < 2**31) and np.all(np.abs(upper + add) < 2**31)
    found = np.clip((upper + add) >> post, -128, 127)
    np.testing.assert_array_equal(found, np.clip(integer.rq1(acc, m, shift) + zero, -128, 127))


@pytest.mark.pure
@pytest.mark.parametrize("exponent", range(-40, 12))
def test_usual_multipliers_have_a_rescaling(exponent: int) -> None:
    m, shift = integer.quantize_multiplier(1.3 * 2.0**exponent)
    assert scale_fields(m, shift, -128, -128, 127, 255 * 255) is not None


TARGETS = (("cortex-m4", ()), ("cortex-m4", ("-DEK_PORTABLE",)), ("cortex-m0plus", ()), ("rv32imc", ()))


@pytest.mark.parametrize(
    ("target", "flags"),
    [
        pytest.param(name, flags, marks=pytest.mark.qemu(name), id=name + "".join(flags))
        for name, flags in (
            ("cortex-m4", ()),
            ("cortex-m4", ("-DEK_PORTABLE",)),
            ("cortex-m0plus", ()),
            ("rv32imc", ()),
        )
    ],
)
def test_devices(target: str, flags: tuple[str, ...]) -> None:
    """Every kind, every shape of the additions and products."""
    seeds = range(3000, 3000 + len(SHAPES))
    checks = [kind(seed, (None, 0, 1)[seed % 3]) for seed in seeds for kind in KINDS]
    check_on_device(checks, load_device(target), flags)
