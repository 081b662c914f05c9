"""Depthwise convolution on microcontrollers against `edgec.integer`: portable C on this machine, devices in QEMU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.device import load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.mcu.kernels import implement
from tests.targets import kernel_cases
from tests.targets.mcu_cases import Check, check_of, check_on_device, check_on_host

# Multipliers below one half; tiny ones by other shifts; up to 2^3 and up to 2^12 among others; real results.
ROUNDINGS = ("half", "small", "large", "huge", "float")
LARGEST = {"large": 3, "huge": 12}


@st.composite
def layers(draw: st.DrawFn) -> Check:
    spec, seed = draw(kernel_cases.depthwise("int8", 4))
    return layer(spec, seed, draw(st.sampled_from(ROUNDINGS)), draw(st.booleans()))


def layer(spec: Depthwise, seed: int, rounding: str, inplace: bool = False) -> Check:
    """A layer with random operands, and multipliers of one of ROUNDINGS."""
    e = spec.epilogue
    if rounding == "float":
        spec = replace(spec, epilogue=replace(e, requant="float", add=None))
    else:
        spec = replace(spec, epilogue=replace(e, requant="RQ1", bounded=False))
    values = kernel_cases.operands(spec, seed)
    if rounding == "half":
        # Sums of a few products of codes come into the code range and a little beyond.
        values["m"] = np.random.default_rng(seed).integers(0, 2**24, spec.c).astype(np.int32)
        values["shift"] = np.full(spec.c, 32, np.int32)
    if rounding in LARGEST:
        exponents = np.random.default_rng(seed).uniform(-34, LARGEST[rounding], spec.c)
        values["m"], values["shift"] = integer.quantize_multipliers(2.0**exponents)
    weights = {k: values.get(k) for k in ("w", "bias", "m", "shift")}
    activations = [values["x"]] + ([values["residual"]] if spec.residual else [])
    return check_of(spec, activations, spec.reference(**values), 2 if inplace else None, weights=weights)


@pytest.mark.host
def test_any_shape() -> None:
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.lists(layers(), min_size=12, max_size=12, unique_by=lambda check: check.case.kernel))
    def check(checks: list[Check]) -> None:
        check_on_host(checks)

    check()


SAME = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
# Whole groups of channels, overlapping ones, too few for one; even and odd counts of taps; borders on all sides.
ODD = (
    {"h": 9, "w": 7, "c": 8, **SAME},
    {"h": 8, "w": 9, "c": 13, **SAME, "stride": (2, 2), "padding": (0, 1, 0, 1)},
    {"h": 6, "w": 5, "c": 3, **SAME},
    {"h": 7, "w": 8, "c": 6, "kernel": (2, 3), "padding": (1, 0, 2, 1), "dilation": (2, 1)},
    {"h": 11, "w": 3, "c": 4, "kernel": (10, 1), "padding": (4, 5, 0, 0), "stride": (2, 1)},
    {"h": 1, "w": 5, "c": 5, "kernel": (1, 1)},
    {"h": 2, "w": 2, "c": 9, "kernel": (5, 5), "padding": (2, 2, 2, 2)},
)


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
    checks = []
    for seed, shape in enumerate(ODD):
        for number, rounding in enumerate(ROUNDINGS):
            rng = np.random.default_rng(seed)
            epilogue = kernel_cases.epilogue(rng, "int8", seed % 2 == 0, "none")
            spec = Depthwise(dtype="int8", x_zp=int(rng.integers(-128, 128)), epilogue=epilogue, **shape)
            checks.append(layer(spec, 3 * seed + number, rounding, inplace=seed % 4 == 0))
    check_on_device(checks, load_device(target), flags)


@pytest.mark.qemu("cortex-m4")
def test_extreme_sums_on_the_dsp() -> None:
    """Every product of the largest size and of one sign, 25 times: nothing saturates on the way."""
    checks = []
    for code, weight in ((-128, -127), (-128, 127), (127, 127)):
        epilogue = Epilogue(y_zp=-128, lo=-128, hi=127)
        spec = Depthwise(6, 6, 4, (5, 5), padding=(2, 2, 2, 2), dtype="int8", x_zp=code, epilogue=epilogue)
        values = {
            "x": np.full((6, 6, 4), code, np.int8),
            "w": np.full((4, 1, 5, 5), weight, np.int8),
            "bias": np.full(4, 25 * code * weight, np.int32),
            "m": np.array([0, 2**10, 2**14, 2**31 - 1], np.int32),
            "shift": np.full(4, 32, np.int32),
        }
        weights = {k: v for k, v in values.items() if k != "x"}
        checks.append(check_of(spec, [values["x"]], spec.reference(**values), weights=weights))
    check_on_device(checks, load_device("cortex-m4"))


@pytest.mark.pure
def test_each_rounding_has_its_form() -> None:
    """Groups wherever there are four channels and the weights of a channel with a large multiplier stay int16."""
    spec = Depthwise(5, 5, 6, (3, 3), dtype="int8", epilogue=Epilogue(lo=-128, hi=127))
    functions = {name: layer(spec, 1, name).case.kernel.call().function for name in ROUNDINGS}
    assert functions == {
        "half": "ek_depthwise9_i8",
        "small": "ek_depthwise_any_i8",
        "large": "ek_depthwise_any_i8",
        "huge": "ek_depthwise_each_i8",
        "float": "ek_depthwise_i8_f32",
    }


@pytest.mark.pure
def test_declines_what_it_cannot_do() -> None:
    weights: dict[str, Any] = {"shift": np.full(4, 32, np.int32)}
    device = load_device("cortex-m4")
    for dtype, epilogue in (
        ("float32", Epilogue()),
        ("int8", Epilogue(requant="RQF")),
        ("int8", Epilogue(act="clip", requant="float")),
    ):
        assert implement(Depthwise(5, 5, 4, (3, 3), dtype=dtype, epilogue=epilogue), weights, device) is None
