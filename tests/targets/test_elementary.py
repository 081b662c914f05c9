"""Vectorised elementary functions against float64, over their whole range and at its ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm

from edgec.targets.codegen import build_objects, lower_kernels, undefined_symbols
from edgec.targets.device import load_device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import param, ramp
from edgec.targets.tir import T, tirx
from tests.targets.kernel_runner import Call, require, run_calls

VALUES = np.concatenate(
    [
        np.linspace(-110, 110, 3001),
        np.linspace(-5, 5, 3001),
        10.0 ** np.linspace(-30, 0, 61),
        [0.0, -0.0, 88.722, 88.723, -86.9, -87.0, -87.336, -87.337, np.inf, -np.inf, np.nan],
    ]
).astype(np.float32)

# Meaning in float64, relative and absolute tolerance.
FUNCTIONS: dict[str, tuple[Any, float, float]] = {
    "exp": (np.exp, 3e-7, 1.7e-38),
    "log": (np.log, 2e-7, 2e-7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 4e-7, 1.2e-38),
    "tanh": (np.tanh, 1e-6, 0.0),
    "erf": (np.vectorize(math.erf), 6e-7, 0.0),
}


def kernel(name: str, lanes: int) -> Any:
    size = len(VALUES) // lanes * lanes
    with common.prim_func(name) as builder:
        x, y = param("x", (size,), "float32"), param("y", (size,), "float32")
        with T.serial(0, size // lanes) as i:
            here = ramp(i * lanes, lanes)
            T.buffer_store(y, getattr(tirx, name)(x[here]), [here])
    return builder.get()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("host", marks=pytest.mark.host),
        pytest.param("cortex-a72", marks=pytest.mark.qemu),
        pytest.param("cortex-a7", marks=pytest.mark.qemu),
    ],
)
@pytest.mark.parametrize("lanes", (1, 4))
def test_values(name: str, lanes: int) -> None:
    device = load_device(name)
    require(device)
    size = len(VALUES) // lanes * lanes
    # From the end, so that a whole number of vectors keeps the special values.
    x = VALUES[-size:]
    calls = [Call(kernel(function, lanes), (x,), (((size,), "float32"),)) for function in FUNCTIONS]
    for (got,), (meaning, relative, absolute) in zip(run_calls(calls, device), FUNCTIONS.values(), strict=True):
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            expected = meaning(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(got, expected, rtol=relative, atol=absolute)


@pytest.mark.pure
@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a7"))
def test_no_library_calls(name: str) -> None:
    device = load_device(name)
    functions = {function: kernel(function, 4) for function in FUNCTIONS}
    objects = build_objects(lower_kernels(tvm.IRModule(functions), device), device)
    assert {symbol: undefined_symbols(data) for symbol, data in objects.items()} == {f: set() for f in functions}
