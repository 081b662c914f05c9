"""Kernels in float16, run under QEMU: exact on whole numbers, and as close as half precision is on others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgec.errors import EdgecError
from edgec.targets.codegen import build_objects, lower_kernels, undefined_symbols
from edgec.targets.device import load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.loops import inspect_function
from tests.targets.kernel_cases import FLOAT_ACTIVATIONS, convolutions, depthwise, halves, layer_call
from tests.targets.kernel_runner import run, run_calls, spec_call

DEVICE = "cortex-a76"
LANES = 8
# Relative error of one rounding to float16.
UNIT = 2.0**-11
BATCH = settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.mark.qemu(DEVICE)
@pytest.mark.parametrize("kind", (convolutions, depthwise))
def test_sums_of_whole_numbers_are_exact(kind: Any) -> None:
    """All geometries and channel counts around the vector width; curves are computed in float32 and rounded once."""

    @BATCH
    @given(st.lists(kind("float16", LANES), min_size=16, max_size=16), st.booleans())
    def batch(specs: list[tuple[Any, int]], inplace: bool) -> None:
        cases = [layer_call(spec, seed, load_device(DEVICE), inplace) for spec, seed in specs]
        results = run_calls([call for call, _ in cases], load_device(DEVICE))
        for (spec, _), (got,), (_, expected) in zip(specs, results, cases, strict=True):
            assert got.dtype == expected.dtype == np.float16
            if spec.epilogue.act in ("none", "clip"):
                np.testing.assert_array_equal(got, expected)
            else:
                np.testing.assert_allclose(got, expected, rtol=2 * UNIT, atol=1e-5)

    batch()


@pytest.mark.qemu(DEVICE)
@pytest.mark.parametrize(
    "spec", [Conv2D(1, 24, 384, 40, dtype="float16"), Conv2D(6, 5, 32, 16, (3, 3), dtype="float16")]
)
def test_real_numbers(spec: Conv2D) -> None:
    """n sums one behind the other, each rounded: sqrt(n) units by the square root rule (Higham and Mary 2019)."""
    rng = np.random.default_rng(0)
    x, w = (
        rng.standard_normal(s).astype(np.float16) for s in ((spec.h, spec.w, spec.ci), (spec.co, spec.ci, *spec.kernel))
    )
    bias = rng.standard_normal(spec.co).astype(np.float16)
    exact = replace(spec, dtype="float32").reference(x.astype(np.float32), w, bias)
    got = run(spec_call(spec, load_device(DEVICE), [x], exact.astype(np.float16), w=w, bias=bias), load_device(DEVICE))
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    terms = spec.ci * spec.kernel[0] * spec.kernel[1]
    assert UNIT / 4 < error < np.sqrt(terms) * UNIT


@pytest.mark.qemu(DEVICE)
def test_a_large_bias_costs_one_rounding() -> None:
    """It is added to the finished sum: had the sum begun with it, every product would be rounded to its size."""
    spec = Conv2D(1, 1, 512, 8, dtype="float16")
    x, w = np.full((1, 1, 512), 0.25, np.float16), np.ones((8, 512, 1, 1), np.float16)
    bias = np.full(8, 1024, np.float16)
    expected = np.full((1, 1, 8), 1152, np.float16)
    call = spec_call(spec, load_device(DEVICE), [x], expected, w=w, bias=bias)
    np.testing.assert_array_equal(run(call, load_device(DEVICE)), expected)
    spec = Depthwise(4, 4, 8, (4, 4), dtype="float16")
    x, w, expected = np.full((4, 4, 8), 0.25, np.float16), np.ones((8, 1, 4, 4), np.float16), np.full((1, 1, 8), 1028)
    call = spec_call(spec, load_device(DEVICE), [x], expected.astype(np.float16), w=w, bias=bias)
    np.testing.assert_array_equal(run(call, load_device(DEVICE)), expected)


@pytest.mark.qemu(DEVICE)
def test_pools_and_transposes() -> None:
    rng = np.random.default_rng(0)
    cases: list[tuple[Any, np.ndarray]] = []
    for c in (1, 7, 8, 13):
        x = halves(rng, 6, 5, c)
        window = ((3, 2), (2, 1), (1, 1, 0, 1))
        cases += [
            (MaxPool(6, 5, c, *window, dtype="float16"), x),
            (AvgPool(6, 5, c, *window, dtype="float16"), x),
            (Transpose(x.shape, (2, 0, 1), "float16"), x),
        ]
    # 4096 ones: a sum in float16 would stop at 2048.
    cases.append((Mean(64, 64, 9, "float16"), np.ones((64, 64, 9), np.float16)))
    results = [spec.reference(x) for spec, x in cases]
    calls = [spec_call(spec, load_device(DEVICE), [x], y) for (spec, x), y in zip(cases, results, strict=True)]
    for (got,), expected in zip(run_calls(calls, load_device(DEVICE)), results, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.cross(DEVICE)
def test_code_multiplies_by_element_and_calls_nothing() -> None:
    """Eight lanes by one element of a register; curves without a library; conversions by the core."""
    import tvm

    device = load_device(DEVICE)
    specs = [Conv2D(1, 14, 64, 24, dtype="float16", epilogue=Epilogue(act)) for act in FLOAT_ACTIVATIONS]
    functions = {f"k{i}": s.prim_func(device).with_attr("global_symbol", f"k{i}") for i, s in enumerate(specs)}
    objects = build_objects(lower_kernels(tvm.IRModule(functions), device), device)
    assert {symbol for data in objects.values() for symbol in undefined_symbols(data)} <= {"memcpy", "memset"}
    loops = inspect_function(objects["k0"], "k0").loops
    assert loops[0].kind == "float16" and loops[0].by_element * 8 == loops[0].macs and not loops[0].vector_spills


@pytest.mark.pure
@pytest.mark.parametrize("spec", [Conv2D(1, 4, 8, 8, dtype="float16"), Depthwise(3, 3, 8, (3, 3), dtype="float16")])
def test_other_cores_are_refused(spec: Any) -> None:
    with pytest.raises(EdgecError, match="cortex-a72: has no float16 arithmetic"):
        spec.prim_func(load_device("cortex-a72"))
