"""Helium kernels on QEMU's Cortex-M55, and their portable form on this machine, against `edgec.integer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgec.integer import quantize_multiplier
from edgec.targets.device import load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.pool import AvgPool, MaxPool, Requant
from edgec.targets.mcu.kernels import mve
from tests.targets.kernel_cases import add_epilogue, code_range, codes, convolutions, depthwise, operands
from tests.targets.mcu_runner import Case, run_cases_on_device, run_on_host
from tests.targets.mve_runner import DEVICE, run_at_ends
from tests.targets.test_mcu_conv import case as random_operands
from tests.targets.test_mcu_conv import definition, some_epilogue

ON_DEVICE = pytest.mark.qemu("cortex-m55")
# One example is a whole program: shrinking would compile each time.
BATCH = settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])


def rule(spec: Any, weights: dict[str, Any], target: str = "cortex-m55") -> Any:
    found = mve.RULES[type(spec)]
    return found(spec, weights, load_device(target))


def layer(spec: Any, seed: int, inplace: bool = False) -> tuple[Case, np.ndarray]:
    """A convolution as integer layers have it (RQ1 with a shift of 32), with random operands, and its result."""
    rng = np.random.default_rng(seed)
    added = add_epilogue(rng) if spec.epilogue.add else None
    spec = replace(spec, epilogue=replace(spec.epilogue, requant="RQ1", add=added))
    values = operands(spec, seed)
    values["m"] = (values["m"] >> rng.integers(3, 9)).astype(np.int32)
    values["shift"][:] = 32
    expected = spec.reference(**values)
    weights = {k: values[k] for k in ("w", "bias", "m", "shift")}
    after = [values["residual"].reshape(-1)] if spec.residual else []
    kernel = rule(spec, weights)
    return Case(kernel, [values["x"].reshape(-1), *after], weights, 1, inplace and spec.residual), expected.reshape(-1)


def check(cases: Sequence[tuple[Case, np.ndarray]]) -> None:
    results = run_at_ends([case for case, _ in cases])
    for (case, expected), got in zip(cases, results, strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=str(case.kernel))


def check_on_host(cases: Sequence[tuple[Case, np.ndarray]]) -> None:
    for case, expected in cases:
        got = run_on_host(case.kernel, case.activations, case.weights, case.before, DEVICE, case.inplace)
        np.testing.assert_array_equal(got, expected, err_msg=str(case.kernel))


PLAIN: dict[str, Any] = {"dtype": "int8", "x_zp": -7, "epilogue": Epilogue(y_zp=3, lo=-100, hi=127)}
ADDED: dict[str, Any] = {**PLAIN, "epilogue": replace(PLAIN["epilogue"], add=add_epilogue(np.random.default_rng(1)))}
CONVOLUTIONS = [
    Conv2D(1, 1, 640, 7, **PLAIN),
    Conv2D(3, 5, 33, 18, **ADDED),
    Conv2D(5, 3, 16, 16, **PLAIN),
    Conv2D(1, 9, 7, 1, **PLAIN),
    Conv2D(7, 6, 3, 16, (3, 3), (1, 1), (1, 1, 1, 1), **PLAIN),
    Conv2D(9, 7, 16, 5, (3, 3), (2, 2), (0, 1, 0, 1), **ADDED),
    Conv2D(25, 7, 1, 8, (10, 4), (2, 2), (4, 5, 1, 1), **PLAIN),
    Conv2D(8, 8, 5, 6, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), **PLAIN),
    # A window wider than the map, and one that sees nothing but padding.
    Conv2D(2, 2, 4, 4, (5, 5), (1, 1), (3, 3, 3, 3), **PLAIN),
    Conv2D(1, 1, 3, 4, (1, 1), (1, 1), (1, 1, 1, 1), **PLAIN),
    Conv2D(6, 6, 20, 9, (1, 1), (2, 2), **PLAIN),
]
DEPTHWISE = [
    Depthwise(9, 5, 64, (3, 3), (1, 1), (1, 1, 1, 1), **PLAIN),
    Depthwise(8, 7, 8, (3, 3), (2, 2), (0, 1, 0, 1), **PLAIN),
    Depthwise(7, 9, 37, (5, 5), (1, 1), (2, 2, 2, 2), **PLAIN),
    Depthwise(5, 5, 16, (3, 3), **PLAIN),
    Depthwise(6, 7, 17, (2, 2), (2, 2), **PLAIN),
    # Neighbours as channels, and an even number of taps, with which they are not.
    Depthwise(3, 40, 8, (3, 3), (2, 1), (1, 1, 1, 1), **PLAIN),
    Depthwise(4, 30, 2, (1, 5), **PLAIN),
    Depthwise(4, 30, 4, (2, 2), **PLAIN),
    Depthwise(4, 4, 1, (1, 1), **PLAIN),
    Depthwise(9, 9, 20, (3, 2), (1, 2), (2, 2, 3, 1), (2, 3), **PLAIN),
    # A window larger than the map, and one that sees nothing but padding.
    Depthwise(2, 3, 5, (7, 7), (1, 1), (3, 3, 3, 3), **PLAIN),
    Depthwise(1, 1, 3, (1, 1), (1, 1), (1, 1, 1, 1), **PLAIN),
]


@ON_DEVICE
def test_depthwise() -> None:
    check([layer(spec, k) for k, spec in enumerate(DEPTHWISE)])


@ON_DEVICE
def test_depthwise_sums_of_extreme_products() -> None:
    """Codes of -128 times weights of -127 and 127: sums of two products come close to the ends of 16 bits."""
    cases = []
    for sign in (-127, 127):
        spec = Depthwise(5, 5, 18, (5, 5), **PLAIN)
        case, _ = layer(spec, 0)
        weights = {k: np.array(v) for k, v in case.weights.items()}
        weights["w"][:] = sign
        x = np.full((5, 5, 18), -128, np.int8)
        expected = spec.reference(x=x, **weights)
        cases.append((case._replace(activations=[x.reshape(-1)], weights=weights), expected.reshape(-1)))
    check(cases)


@ON_DEVICE
@pytest.mark.parametrize("inplace", (False, True))
def test_convolutions(inplace: bool) -> None:
    check([layer(spec, k, inplace) for k, spec in enumerate(CONVOLUTIONS)])


@ON_DEVICE
def test_random_convolutions() -> None:
    @BATCH
    @given(st.lists(convolutions("int8", 8), min_size=16, max_size=16))
    def batch(specs: list[tuple[Conv2D, int]]) -> None:
        check([layer(spec, seed, bool(seed % 2)) for spec, seed in specs if spec.groups == 1])

    batch()


@ON_DEVICE
def test_random_depthwise() -> None:
    @BATCH
    @given(st.lists(depthwise("int8", 8), min_size=16, max_size=16))
    def batch(specs: list[tuple[Depthwise, int]]) -> None:
        plain = [(replace(spec, epilogue=replace(spec.epilogue, add=None)), seed) for spec, seed in specs]
        check([layer(spec, seed) for spec, seed in plain])

    batch()


def simple(spec: Any, *activations: np.ndarray, inplace: bool = False) -> tuple[Case, np.ndarray]:
    """A template without weights."""
    expected = spec.reference(*activations)
    flat = [a.reshape(-1) for a in activations]
    return Case(rule(spec, {}), flat, {}, None, inplace), expected.reshape(-1)


def scaled(rng: np.random.Generator, n: int) -> list[tuple[Case, np.ndarray]]:
    """Products, other grids and a table."""
    found = []
    za, zb, zy = (int(v) for v in rng.integers(-128, 128, 3))
    lo, hi = code_range(rng)
    m, shift = quantize_multiplier(float(rng.uniform(0.001, 0.1)))
    for rows in (1, 3):
        product = QMul((rows, n), (n,), m, shift, za, zb, zy, lo, hi)
        found.append(simple(product, codes(rng, rows, n), codes(rng, n), inplace=bool(n % 2)))
    m, shift = quantize_multiplier(float(rng.uniform(0.2, 3.0)))
    found.append(simple(QRescale((n,), m, shift, za, zy, lo, hi), codes(rng, n), inplace=bool(n % 2)))
    x, table = codes(rng, n), codes(rng, 256)
    spec = QLut((n,), False, 0)
    found.append((Case(rule(spec, {}), [x], {"table": table}, 1), spec.reference(x, table)))
    return found


def others(rng: np.random.Generator) -> list[tuple[Case, np.ndarray]]:
    """Additions, pools and both ends of an integer region, with odd sizes."""
    found = []
    for n in (1, 3, 4, 37, 130, 4099):
        spec = QAdd((1, n), (1, n), add_epilogue(rng))
        found.append(simple(spec, codes(rng, 1, n), codes(rng, 1, n), inplace=bool(n % 2)))
        found += scaled(rng, n)
        scale, zero = float(np.float32(rng.uniform(0.001, 0.2))), int(rng.integers(-128, 128))
        found.append(simple(Dequantize((n,), scale, zero), codes(rng, n)))
        # Among them halves of codes, and values far beyond the range.
        x = (rng.integers(-600, 600, n) / 2 * np.float32(scale)).astype(np.float32)
        x[::3] *= rng.choice(np.array([1.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24, 1e30], np.float32), len(x[::3]))
        x[0] = rng.choice(np.array([-np.inf, np.inf], np.float32))
        found.append(simple(Quantize((n,), scale, zero), x))
    for window in POOLS:
        h, w, c, *_ = window
        m, shift = quantize_multiplier(float(rng.uniform(0.3, 3.0)) / (window[3][0] * window[3][1]))
        lo, hi = code_range(rng)
        q = Requant(m, shift, int(rng.integers(-128, 128)), int(rng.integers(-128, 128)), lo, hi)
        found.append(simple(AvgPool(*window, dtype="int8", requant=q), codes(rng, h, w, c)))
        found.append(simple(MaxPool(*window, dtype="int8"), codes(rng, h, w, c)))
    return found


POOLS: list[Any] = [
    (8, 8, 64, (8, 8), (1, 1)),
    (25, 5, 7, (25, 5), (1, 1)),
    (7, 9, 18, (3, 3), (2, 2), (1, 1, 1, 1)),
    (6, 5, 33, (2, 2), (2, 2), (0, 0, 0, 1)),
    (3, 3, 2, (2, 3), (1, 2), (1, 1, 2, 2)),
    (1, 4, 16, (1, 1), (1, 3)),
]


@ON_DEVICE
@pytest.mark.parametrize("seed", (0, 1))
def test_elementwise(seed: int) -> None:
    check(others(np.random.default_rng(seed)))


def test_elementwise_in_portable_c() -> None:
    check_on_host(others(np.random.default_rng(2))[::4])


@ON_DEVICE
def test_dilated_maximum() -> None:
    rng = np.random.default_rng(3)
    spec = MaxPool(9, 7, 19, (3, 2), (1, 2), (2, 1, 1, 0), (2, 3), "int8")
    check([simple(spec, codes(rng, 9, 7, 19))])


@ON_DEVICE
@pytest.mark.parametrize("shift", (20, 31, 32, 33, 34, 45, 62))
def test_every_shift_of_an_average(shift: int) -> None:
    """Halves of a code are what roundings differ in."""
    rng = np.random.default_rng(shift)
    m = {20: 2**19, 31: 2**30, 32: 2**31 - 1, 33: 2**31 - 1}.get(shift, 2**30)
    spec = AvgPool(2, 300, 5, (2, 2), (1, 1), dtype="int8", requant=Requant(m, shift, 3, -4, -128, 127))
    check([simple(spec, codes(rng, 2, 300, 5))])


def steep_layers(seed: int) -> list[tuple[Case, np.ndarray]]:
    """Every shape with a multiplier of more than one half, with and without a fused addition."""
    rng, found = np.random.default_rng(seed), []
    for k, plain in enumerate(CONVOLUTIONS):
        spec = replace(plain, epilogue=some_epilogue(rng, "RQ1", bool((k + seed) % 2)))
        x, weights, other = random_operands(spec, "RQ1", seed)
        kernel = rule(spec, weights)
        assert isinstance(kernel, mve.MveRq1Conv)
        given = [x] if other is None else [x, other]
        # With an array more than `run_at_ends` has memories, the output takes the residual's.
        found.append((Case(kernel, given, weights, 1, bool(kernel.inplace)), definition(spec, x, weights, other)))
    return found


@ON_DEVICE
@pytest.mark.parametrize("seed", (0, 1))
def test_multipliers_above_one_half(seed: int) -> None:
    check(steep_layers(seed))


def test_multipliers_above_one_half_in_portable_c() -> None:
    check_on_host(steep_layers(2)[::3])


def real_layers(seed: int) -> list[tuple[Case, np.ndarray]]:
    """Every shape with real results or their codes, with and without a residual, whose memory the output takes."""
    rng, found = np.random.default_rng(seed), []
    for k, plain in enumerate(CONVOLUTIONS):
        rounding, residual = ("float", "codes")[(k + seed) % 2], bool((k + seed) // 2 % 2)
        spec = replace(plain, epilogue=some_epilogue(rng, rounding, residual))
        x, weights, other = random_operands(spec, rounding, seed)
        kernel = rule(spec, weights)
        assert isinstance(kernel, mve.MveRealConv)
        given = [x] if other is None else [x, other]
        found.append((Case(kernel, given, weights, 1, bool(kernel.inplace)), definition(spec, x, weights, other)))
    return found


@ON_DEVICE
@pytest.mark.parametrize("seed", (0, 1))
def test_real_results(seed: int) -> None:
    check(real_layers(seed))


def test_real_results_in_portable_c() -> None:
    check_on_host(real_layers(2)[::3])


@pytest.mark.parametrize("specs", (CONVOLUTIONS[::2], DEPTHWISE[1::2]))
def test_in_portable_c(specs: list[Any]) -> None:
    check_on_host([layer(spec, k, bool(k % 2)) for k, spec in enumerate(specs)])


# Instructions per multiplication: at most, and what CMSIS-NN takes (99f736a6, -Ofast, the same QEMU and core).
LIMITS: list[tuple[Any, float, float]] = [
    (Conv2D(32, 32, 16, 16, (3, 3), (1, 1), (1, 1, 1, 1), **PLAIN), 0.18, 0.39),
    (Conv2D(16, 16, 32, 64, (3, 3), (2, 2), (0, 1, 0, 1), **PLAIN), 0.15, 0.24),
    (Conv2D(25, 5, 64, 64, **PLAIN), 0.185, 0.40),
    (Conv2D(1, 1, 640, 128, **PLAIN), 0.17, 0.49),
    (Conv2D(32, 32, 3, 16, (3, 3), (1, 1), (1, 1, 1, 1), **PLAIN), 0.37, 1.36),
    (Depthwise(25, 5, 64, (3, 3), (1, 1), (1, 1, 1, 1), **PLAIN), 0.915, 2.32),
    (Depthwise(48, 48, 64, (3, 3), (1, 1), (1, 1, 1, 1), **PLAIN), 0.865, 2.30),
    # CMSIS-NN does not fuse additions.
    (Conv2D(32, 32, 16, 16, (3, 3), (1, 1), (1, 1, 1, 1), **ADDED), 0.20, 0.39),
]


@ON_DEVICE
def test_instructions() -> None:
    """Counts are exact; `pytest -rP` shows the table."""
    cases = [layer(spec, k) for k, (spec, *_) in enumerate(LIMITS)]
    measured = run_cases_on_device([case for case, _ in cases], DEVICE)
    for (spec, limit, other), (got, count), (_, expected) in zip(LIMITS, measured, cases, strict=True):
        np.testing.assert_array_equal(got, expected)
        what = f"{spec.name} {spec.h}x{spec.w}, {case_channels(spec)}, kernel {spec.kernel}, stride {spec.stride}"
        print(f"{what}: {count / spec.macs:.3f} ({count}); CMSIS-NN {other}")
        assert count <= limit * spec.macs, what


@ON_DEVICE
def test_without_optimisation() -> None:
    """Assembler gets its registers at -O0 too."""
    rng = np.random.default_rng(6)
    cases = [layer(spec, k) for k, spec in enumerate((CONVOLUTIONS[4], DEPTHWISE[0], DEPTHWISE[2]))]
    cases += [real_layers(0)[1], steep_layers(1)[1], *others(rng)]
    measured = run_cases_on_device([case for case, _ in cases], DEVICE, flags=["-O0"])
    for (case, expected), (got, _) in zip(cases, measured, strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=str(case.kernel))


def case_channels(spec: Conv2D | Depthwise) -> str:
    if isinstance(spec, Depthwise):
        return f"{spec.c} channels"
    return f"{spec.ci} to {spec.co} channels{', with addition' if spec.epilogue.add else ''}"


def test_what_is_left_to_other_kernels() -> None:
    spec = CONVOLUTIONS[0]
    case, _ = layer(spec, 0)
    weights = dict(case.weights)
    assert rule(spec, weights) is not None
    assert rule(spec, weights, "cortex-m85") is not None
    assert rule(spec, weights, "cortex-m4") is None
    assert rule(spec, {**weights, "m": np.ones(7, np.float32)}) is None
    assert rule(replace(spec, epilogue=Epilogue(act="gelu", requant="float")), weights) is None
    assert rule(replace(spec, ci=2, groups=2), weights) is None
    add = add_epilogue(np.random.default_rng(0))
    assert rule(replace(DEPTHWISE[0], epilogue=Epilogue(add=add)), weights) is None
    assert rule(DEPTHWISE[0], {**weights, "shift": np.array([32] * 6 + [31], np.int32)}) is None
    assert rule(QAdd((1, 5), (3, 5), add), {}) is None
    assert rule(QAdd((5,), (1, 5), add), {}) is not None
    # The sum of a window does not fit 32 bits where it must be shifted far left.
    assert rule(AvgPool(4, 4, 1, (4, 4), (1, 1), dtype="int8", requant=Requant(1, 8, 0, 0, 0, 1)), {}) is None
    assert rule(QMul((1, 5), (3, 5), 1, 40, 0, 0, 0, 0, 1), {}) is None
    assert rule(QMul((3, 5), (3, 1), 1, 40, 0, 0, 0, 0, 1), {}) is None
    assert rule(QMul((2, 3, 5), (2, 1, 5), 1, 40, 0, 0, 0, 0, 1), {}) is None
    assert rule(QMul((3, 5), (1, 5), 1, 10, 0, 0, 0, 0, 1), {}) is None
    assert rule(QRescale((5,), 1, 5, 0, 0, 0, 1), {}) is None
    assert rule(QLut((5,), True, 0), {}) is None
    assert rule(Quantize((1,), 1e-30, 0), {}) is None
    assert rule(Dequantize((1,), 1e-30, 0), {}) is None
