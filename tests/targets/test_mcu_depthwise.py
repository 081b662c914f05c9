"""Depthwise convolution on microcontrollers: portable C on this machine against `edgec.integer`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.targets.device import load_device
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.mcu.kernels import depthwise as rules
from edgec.targets.mcu.kernels.base import McuKernel
from tests.targets import kernel_cases
from tests.targets.mcu_runner import compiled, run_on_host

ROUNDINGS = ("half", "any", "float")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Depthwise, dict[str, Any]]:
    """A template and the arguments of its `reference`, with one of the three forms of multipliers."""
    spec, seed = draw(kernel_cases.depthwise("int8", 4))
    return case(spec, seed, draw(st.sampled_from(ROUNDINGS)))


def case(spec: Depthwise, seed: int, rounding: str) -> tuple[Depthwise, dict[str, Any]]:
    e = spec.epilogue
    if rounding == "float":
        spec = replace(spec, epilogue=replace(e, requant="float", add=None))
    else:
        spec = replace(spec, epilogue=replace(e, requant="RQ1", bounded=False))
    values = kernel_cases.operands(spec, seed)
    if rounding == "half":
        # Sums of a few products of codes come into the code range and a little beyond.
        rng = np.random.default_rng(seed)
        values["m"] = rng.integers(0, 2**24, spec.c).astype(np.int32)
        values["shift"] = np.full(spec.c, 32, np.int32)
    return spec, values


def kernel_for(spec: Depthwise, values: dict[str, Any]) -> tuple[McuKernel, list[np.ndarray], dict[str, Any]]:
    """(kernel, activations, weights)."""
    weights = {k: values.get(k) for k in ("w", "bias", "m", "shift")}
    kernel = rules.RULES[Depthwise](spec, weights, load_device("cortex-m3"))
    assert kernel is not None
    activations = [values["x"]] + ([values["residual"]] if spec.residual else [])
    return kernel, activations, weights


@pytest.mark.host
def test_any_shape() -> None:
    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(st.lists(cases(), min_size=12, max_size=12), st.booleans())
    def check(drawn: list[tuple[Depthwise, dict[str, Any]]], inplace: bool) -> None:
        kernels = [kernel_for(*one) for one in drawn]
        functions = compiled([kernel for kernel, *_ in kernels])
        for (spec, values), (kernel, activations, weights), function in zip(drawn, kernels, functions, strict=True):
            shared = inplace and bool(kernel.inplace)
            found = run_on_host(kernel, activations, weights, 1, inplace=shared, function=function)
            expected = spec.reference(**values)
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected.reshape(-1), err_msg=str(spec))

    check()
