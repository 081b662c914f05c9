"""Microcontroller convolutions equal the definition of integer arithmetic bit for bit, for any geometry."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.device import load_device
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.mcu.kernels import implement
from edgec.targets.mcu.kernels.base import McuKernel
from edgec.targets.mcu.kernels.conv import ROW_MACS, Conv, FullyConnected
from tests.targets.mcu_runner import Case, kernel_of, run_cases_on_device, run_on_host

Weights = dict[str, np.ndarray]
ROUNDINGS = ("RQH", "RQ1", "float", "codes")


def codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def weights_of(spec: Conv2D, rng: np.random.Generator, rounding: str) -> Weights:
    """Weights, bias and multipliers whose results spread over the codes and a little beyond."""
    depth = spec.ci // spec.groups
    low, high = (-127, 128) if spec.bits == 8 else (-8, 8)
    w = rng.integers(low, high, (spec.co, depth, *spec.kernel)).astype(np.int8)
    folded = -spec.x_zp * w.astype(np.int64).reshape(spec.co, -1).sum(1)
    bias = (folded + rng.integers(-20000, 20000, spec.co)).astype(np.int32)
    scale = rng.uniform(0.2, 2.0, spec.co) / (0.57 * high * math.sqrt(depth * math.prod(spec.kernel)))
    if rounding in ("float", "codes"):
        return {"w": w, "bias": bias, "m": scale.astype(np.float32)}
    if rounding == "RQ1":
        scale[rng.integers(spec.co)] = rng.uniform(0.5, 40.0)
    m, shift = integer.multipliers(scale, "RQH")
    return {"w": w, "bias": bias, "m": m, "shift": shift}


def definition(spec: Conv2D, x: np.ndarray, weights: Weights, residual: np.ndarray | None) -> np.ndarray:
    """The output [pixels, channels] by `edgec.integer`."""
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.x_zp)
    image, epilogue = x.reshape(1, spec.h, spec.w, spec.ci), spec.epilogue
    w, bias, m = weights["w"], weights["bias"], weights["m"]
    if epilogue.requant == "float":
        real = integer.qconv2d_float(image, w, bias, m, *geometry, "NHWC").reshape(-1)
        real = real if residual is None else real + residual
        if epilogue.act == "clip":
            real = np.clip(real, np.float32(epilogue.lo), np.float32(epilogue.hi))
        elif epilogue.act == "leaky_relu":
            real = np.where(real > 0, real, real * np.float32(epilogue.lo))
        if epilogue.y_scale is None:
            return real
        return np.clip(np.rint(real * np.float32(1 / epilogue.y_scale)) + epilogue.y_zp, -128, 127).astype(np.int8)
    lo, hi = int(max(epilogue.lo, -128)), int(min(epilogue.hi, 127))
    y = integer.qconv2d(image, w, bias, m, weights["shift"], *geometry, epilogue.y_zp, lo, hi, "NHWC").reshape(-1)
    add = epilogue.add
    if add is None:
        return y
    assert residual is not None
    return integer.qadd(y, residual, add.m_self, add.m_other, add.f, add.z_self, add.z_other, add.z_y, add.lo, add.hi)


def some_epilogue(rng: np.random.Generator, rounding: str, residual: bool) -> Epilogue:
    def span() -> tuple[int, int]:
        lo, hi = sorted(int(v) for v in rng.integers(-128, 128, 2))
        return (lo, hi) if rng.random() < 0.5 else (-128, 127)

    zero = lambda: int(rng.integers(-128, 128))  # noqa: E731
    if rounding in ("float", "codes"):
        act = str(rng.choice(["none", "clip", "leaky_relu"]))
        lo, hi = {"none": (-math.inf, math.inf), "clip": (-0.3, [0.9, math.inf][rng.integers(2)])}.get(act, (0.1, 0.0))
        scale = 0.013 if rounding == "codes" else None
        return Epilogue(act, lo, hi, zero(), residual, requant="float", y_scale=scale)
    add = None
    if residual:
        scale_self, scale_other, scale_y = rng.uniform(0.1, 1.0, 3)
        m_self, m_other, f = integer.add_parameters(scale_self, scale_other, scale_y)
        if rng.random() < 0.3:
            m_other = -m_other
        add = AddEpilogue(m_self, m_other, f, zero(), zero(), zero(), *span())
    lo, hi = span()
    return Epilogue(lo=lo, hi=hi, y_zp=zero(), add=add)


@st.composite
def convolutions(draw: Any) -> tuple[Conv2D, str, int]:
    """(spec, rounding, seed): any geometry with an output."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    depth, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    h, w = max(1, reach[0] - padding[0] - padding[1]), max(1, reach[1] - padding[2] - padding[3])
    h, w = draw(st.integers(h, h + 6)), draw(st.integers(w, w + 8))
    spec = Conv2D(
        h,
        w,
        depth * groups,
        outputs * groups,
        kernel,
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding,
        dilation,
        groups,
        "int8",
        draw(st.integers(-128, 127)),
        bits=draw(st.sampled_from([4, 8])),
    )
    rounding, seed = draw(st.sampled_from(ROUNDINGS)), draw(st.integers(0, 2**31))
    residual = draw(st.booleans())
    return replace(spec, epilogue=some_epilogue(np.random.default_rng(seed), rounding, residual)), rounding, seed


def case(spec: Conv2D, rounding: str, seed: int) -> tuple[np.ndarray, Weights, np.ndarray | None]:
    """(input, weights, residual) of a random layer."""
    rng = np.random.default_rng(seed + 1)
    size = math.prod(spec.out) * spec.co
    residual = None
    if spec.residual:
        residual = codes(rng, size)
        if spec.epilogue.requant == "float":
            residual = rng.standard_normal(size).astype(np.float32)
    return codes(rng, spec.h * spec.w * spec.ci), weights_of(spec, rng, rounding), residual


def kernel_for(spec: Conv2D, weights: Weights, target: str) -> McuKernel:
    """The kernel; by weights of 4 bits also for layers that are too small to gain from them."""
    kernel = kernel_of(spec, weights, target)
    return replace(kernel, bits=spec.bits) if isinstance(kernel, Conv) else kernel


def check(spec: Conv2D, rounding: str, seed: int, target: str = "cortex-m3") -> None:
    x, weights, residual = case(spec, rounding, seed)
    kernel = kernel_for(spec, weights, target)
    given = [x] if residual is None else [x, residual]
    expected = definition(spec, x, weights, residual)
    for inplace in (False, True) if kernel.inplace else (False,):
        actual = run_on_host(kernel, given, weights, 1, load_device(target), inplace)
        np.testing.assert_array_equal(actual, expected)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_any_geometry(drawn: tuple[Conv2D, str, int]) -> None:
    check(*drawn)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from(ROUNDINGS),
    st.booleans(),
    st.sampled_from([4, 8]),
    st.integers(0, 99),
)
@example(1, 1, 1, "RQH", False, 8, 0)
@example(1, 640, 17, "RQH", False, 8, 0)
def test_matrix_products(rows: int, ci: int, co: int, rounding: str, residual: bool, bits: int, seed: int) -> None:
    """Pointwise and fully connected layers; more channels than wait on the stack at a time."""
    epilogue = some_epilogue(np.random.default_rng(seed), rounding, residual)
    check(Conv2D(1, rows, ci, co, dtype="int8", x_zp=-7, epilogue=epilogue, bits=bits), rounding, seed)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 7), (2, 3)]),
    st.integers(1, 7),
    st.integers(1, 9),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([4, 8]),
    st.integers(0, 99),
)
def test_fully_connected(size: tuple[int, int], quarter: int, co: int, rounding: str, bits: int, seed: int) -> None:
    """One row of enough products for the kernel of its own, which reads the input where it lies."""
    ci = 4 * quarter
    co += -(-ROW_MACS // (ci * math.prod(size)))
    epilogue = some_epilogue(np.random.default_rng(seed), rounding, False)
    spec = Conv2D(*size, ci, co, size, (2, 3), dtype="int8", x_zp=9, epilogue=epilogue, bits=bits)
    kernel = kernel_of(spec, case(spec, rounding, seed)[1])
    assert isinstance(kernel, FullyConnected) == (rounding != "RQ1")
    check(spec, rounding, seed)


def test_weights_of_4_bits_take_half_the_memory() -> None:
    spec = Conv2D(4, 4, 32, 9, (3, 3), dtype="int8", bits=4)
    weights = weights_of(spec, np.random.default_rng(0), "RQH")
    stored = [kernel_of(replace(spec, bits=bits), weights).operands()[1].elements for bits in (3, 4, 8)]
    assert stored == [10 * 32 * 9 // 2, 10 * 32 * 9 // 2, 10 * 32 * 9]
    small = replace(spec, co=2)
    assert kernel_of(small, weights_of(small, np.random.default_rng(0), "RQH")).operands()[1].elements == 2 * 32 * 9


def test_declines_what_it_cannot_do() -> None:
    spec = Conv2D(4, 4, 3, 5, dtype="int8", epilogue=Epilogue(act="gelu", requant="float"))
    weights = weights_of(spec, np.random.default_rng(0), "float")
    device = load_device("cortex-m4")
    assert implement(spec, weights, device) is None
    assert implement(replace(spec, dtype="float32"), {"w": weights["w"], "bias": None}, device) is None
    assert implement(replace(spec, epilogue=Epilogue(requant="RQF")), weights, device) is None


# Layers for real cores: each path of the columns, of the tiles and of what follows them.
PLAIN = Epilogue(lo=-128, hi=127, y_zp=-128)
ODD = [
    (Conv2D(6, 7, 5, 6, (3, 3), (1, 1), (1, 1, 1, 1)), "RQH", False),
    (Conv2D(7, 9, 10, 6, (3, 5), (1, 2), (2, 1, 3, 0), (1, 2), 2), "RQH", False),
    (Conv2D(5, 6, 12, 19, (2, 3), (2, 1), (0, 1, 1, 1)), "RQH", True),
    (Conv2D(9, 5, 1, 8, (10, 4), (2, 2), (4, 5, 1, 1)), "RQ1", True),
    (Conv2D(1, 5, 36, 18), "RQH", False),
    (Conv2D(1, 3, 13, 7), "float", True),
    (Conv2D(1, 1, 24, 171), "RQH", False),
    (Conv2D(1, 1, 100, 42), "float", False),
    (Conv2D(1, 4, 8, 3), "codes", True),
    (Conv2D(5, 6, 12, 19, (2, 3), (2, 1), (0, 1, 1, 1), bits=4), "RQH", True),
    (Conv2D(1, 5, 36, 18, bits=4), "RQ1", False),
    (Conv2D(1, 1, 24, 171, bits=4), "RQH", False),
    (Conv2D(1, 1, 100, 42, bits=4), "codes", False),
]


def run_on(name: str, drawn: list[tuple[Conv2D, str, int]], flags: tuple[str, ...] = ()) -> None:
    """Run all layers in one program for a core and compare; outputs take over residuals where they may."""
    cases, expected = [], []
    for spec, rounding, seed in drawn:
        x, weights, residual = case(spec, rounding, seed)
        kernel = kernel_for(spec, weights, name)
        given = [x] if residual is None else [x, residual]
        cases.append(Case(kernel, given, weights, 1, bool(kernel.inplace)))
        expected.append(definition(spec, x, weights, residual))
    found = run_cases_on_device(cases, load_device(name), flags)
    for (actual, _), wanted, one in zip(found, expected, cases, strict=True):
        np.testing.assert_array_equal(actual, wanted, err_msg=str(one.kernel))


def odd_layers() -> list[tuple[Conv2D, str, int]]:
    rng = np.random.default_rng(5)
    found = []
    for seed, (spec, rounding, residual) in enumerate(ODD):
        found.append((replace(spec, dtype="int8", epilogue=some_epilogue(rng, rounding, residual)), rounding, seed))
    return found


CORES = ("cortex-m0plus", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55", "rv32imc")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.qemu(name)) for name in CORES])
def test_cores(name: str) -> None:
    run_on(name, odd_layers())


@pytest.mark.qemu("cortex-m4")
@pytest.mark.parametrize("flags", [("-O0",), ("-Os",), ("-O3", "-std=gnu99"), ("-DEK_PORTABLE",)])
def test_compiler_options(flags: tuple[str, ...]) -> None:
    """Also those that let the compiler contract products and sums of floats."""
    run_on("cortex-m4", odd_layers(), flags)


@pytest.mark.qemu("cortex-m4")
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(convolutions(), min_size=40, max_size=40))
def test_any_geometry_by_dsp_instructions(drawn: list[tuple[Conv2D, str, int]]) -> None:
    run_on("cortex-m4", drawn)


# Instructions per multiplication on a core with DSP instructions, measured and a little more.
BUDGETS = [
    (Conv2D(32, 32, 16, 16, (3, 3), (1, 1), (1, 1, 1, 1)), 1.1),
    (Conv2D(16, 16, 32, 64, (3, 3), (2, 2), (0, 1, 0, 1)), 0.98),
    (Conv2D(1, 125, 64, 64), 1.07),
    (Conv2D(1, 1, 640, 128), 1.32),
]


@pytest.mark.qemu("cortex-m4")
def test_instruction_counts() -> None:
    cases = []
    for spec, _ in BUDGETS:
        spec = replace(spec, dtype="int8", x_zp=-3, epilogue=PLAIN)
        x, weights, _ = case(spec, "RQH", 3)
        cases.append(Case(kernel_of(spec, weights, "cortex-m4"), [x], weights, 1))
    for (_, count), one, (_, most) in zip(
        run_cases_on_device(cases, load_device("cortex-m4")), cases, BUDGETS, strict=True
    ):
        assert count <= most * one.kernel.macs, f"{count / one.kernel.macs:.3f} for {one.kernel}"
