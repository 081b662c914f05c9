"""Every kernel kind, cross-compiled and run under QEMU: many cases per process, on each family of cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.codegen import build_objects, lower_kernels
from edgec.targets.device import load_device
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Blocking, Conv2D
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.loops import inspect_kernel
from tests.targets.kernel_cases import check_layers, codes, convolutions, depthwise, floats
from tests.targets.kernel_runner import assert_close, require, run_calls, spec_call
from tests.targets.test_kernels_pool import requant

pytestmark = pytest.mark.qemu
# Armv8.0 with and without dot product beside it, Armv9 features, and 32-bit Arm.
DEVICES = ("cortex-a53", "cortex-a72", "cortex-x2", "cortex-a7")
LANES = 4
# One example is a whole batch, so shrinking would recompile everything each time. The first example is all minimal.
BATCH = settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dtype", ("int8", "float32"))
@pytest.mark.parametrize("kind", (convolutions, depthwise))
def test_convolutions(kind: Any, dtype: str, name: str) -> None:
    require(load_device(name))

    @BATCH
    @given(st.lists(kind(dtype, LANES), min_size=16, max_size=16))
    def batch(specs: list[tuple[Any, int]]) -> None:
        check_layers(specs[::2], load_device(name), inplace=True)
        check_layers(specs[1::2], load_device(name), inplace=False)

    batch()


@pytest.mark.parametrize("name", ("cortex-a76", "cortex-x2"))
def test_dot_products_of_pairs_and_groups(name: str) -> None:
    """SMMLA takes pixels in pairs, SDOT one by one: odd rows, borders of one pixel, depths of one and a half loads."""
    device = load_device(name)
    require(device)
    fused = Epilogue(y_zp=3, lo=-100, hi=127, requant="RQF")
    shape: dict[str, Any] = {"dtype": "int8", "x_zp": -7, "epilogue": fused}
    added = replace(fused, add=AddEpilogue(*integer.add_parameters(0.0231, 0.0117, 0.0262), 3, -11, -5, -100, 127))
    specs = [
        Conv2D(1, 13, 40, 29, **shape),
        Conv2D(1, 2, 8, 5, **shape),
        Conv2D(1, 1, 64, 10, **shape),
        Conv2D(5, 7, 24, 20, (3, 3), (1, 1), (1, 1, 1, 1), **shape),
        Conv2D(7, 9, 13, 9, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), **shape),
        Conv2D(5, 5, 32, 36, (3, 3), (1, 1), (1, 1, 1, 1), groups=2, **shape),
        Conv2D(6, 5, 16, 12, (1, 1), (2, 2), **{**shape, "epilogue": added}),
        Conv2D(6, 5, 3, 12, (3, 3), (2, 2), (0, 1, 0, 1), **shape),
    ]
    ways = {type(spec.dot(device)).__name__ for spec in specs}
    assert ways == ({"Sdot", "Smmla"} if device.has_i8mm else {"Sdot"})
    for spec in specs:
        # What pack and prim_func see must be one thing.
        assert spec.dot(device) == spec.expanded(device).dot(device)
    check_layers([(spec, seed) for seed, spec in enumerate(specs)], device, inplace=False)
    tiles = {spec.tuning_key: Blocking(pixels, 3, False) for spec, pixels in zip(specs, (5, 2, 1, 3, 4, 7, 3, 6))}
    check_layers([(spec, seed) for seed, spec in enumerate(specs)], replace(device, tuning=tiles), inplace=False)


@pytest.mark.parametrize("shape", ((1, 196, 96, 576), (28, 28, 64, 64, (3, 3))))
def test_inner_loop_is_smmla_without_spills(shape: tuple[Any, ...]) -> None:
    device = load_device("cortex-x2")
    require(device)
    spec = Conv2D(*shape, dtype="int8", epilogue=Epilogue(lo=-128, hi=127, requant="RQF"))
    function = spec.prim_func(device).with_attr("global_symbol", "kernel")
    lowered = lower_kernels(tvm.IRModule({"kernel": function}), device)
    report = inspect_kernel(build_objects(lowered, device)["kernel"], "kernel", device)
    assert not report.findings(device, dense=True), report.findings(device, dense=True)
    # 32 products each; SDOT's best loop has 13.3 for each of its instructions.
    assert report.macs / report.instructions > 21


@pytest.mark.parametrize("name", DEVICES)
def test_pools_elementwise_and_transposes(name: str) -> None:
    device = load_device(name)
    rng = np.random.default_rng(0)
    m, shift = integer.quantize_multiplier(0.37)
    cases: list[tuple[Any, list[np.ndarray], dict[str, np.ndarray]]] = []
    for c in (1, 4, 7, 9, 40):
        x, q = codes(rng, 6, 5, c), floats(rng, 6, 5, c)
        window = ((3, 2), (2, 1), (1, 1, 0, 1))
        cases += [
            (MaxPool(6, 5, c, *window, dtype="int8"), [x], {}),
            (MaxPool(6, 5, c, *window), [q], {}),
            (AvgPool(6, 5, c, *window, dtype="int8", requant=requant(rng, 6)), [x], {}),
            (AvgPool(6, 5, c, *window), [q], {}),
            (Mean(6, 5, c, "int8", requant(rng, 30)), [x], {}),
            (Mean(6, 5, c), [q], {}),
            (QLut(x.shape, True, 2), [x], {"table": codes(rng, c, 256)}),
            (Transpose(x.shape, (2, 0, 1), "int8"), [x], {}),
            (Transpose(q.shape, (2, 0, 1)), [q], {}),
        ]
    a, b, ties = codes(rng, 1, 3, 5, 19), codes(rng, 1, 1, 1, 19), (np.arange(-600, 600) / 2).astype(np.float32)
    add = AddEpilogue(*integer.add_parameters(0.0231, 0.0117, 0.0262), 3, -11, -5, -100, 127)
    cases += [
        (QAdd(a.shape, a.shape, add), [a, codes(rng, *a.shape)], {}),
        (QAdd(a.shape, b.shape, add), [a, b], {}),
        (QMul(a.shape, b.shape, m, shift + 7, 4, -5, 6, -128, 127), [a, b], {}),
        (QRescale(a.shape, m, shift, 7, -8, -128, 100), [a], {}),
        (QRescale(a.shape, 2**31 - 1, 1, 7, -8, -128, 127), [a], {}),
        (QMul(a.shape, (1,), m, shift + 7, 4, -5, 6, -128, 127), [a, codes(rng, 1)], {}),
        (QRescale(a.shape, m, 31, -128, 9, -128, 127), [a], {}),
        (QLut((3, 37), False, 0), [codes(rng, 3, 37)], {"table": codes(rng, 256)}),
        (Dequantize(a.shape, 0.0231, 3), [a], {}),
    ]
    # Arm cores divide by products (see `eltwise._divided`): codes and half codes, and their neighbours, decide it.
    special = np.array([0.0, -0.0, 1e-45, np.inf, -np.inf, 3e37], np.float32)
    for scale in (0.0231, 2.0**-12, *np.exp(rng.uniform(-12, 3, 6)), float(np.nextafter(np.float32(2), np.float32(1)))):
        near = ties * np.float32(scale)
        up, down = (np.nextafter(near, np.float32(to * np.inf)) for to in (1, -1))
        x = np.concatenate([near, up, down, special])
        cases.append((Quantize(x.shape, float(scale), 3), [x], {}))
    results = [spec.reference(*inputs, **weights) for spec, inputs, weights in cases]
    calls = [spec_call(c[0], device, c[1], expected, **c[2]) for c, expected in zip(cases, results, strict=True)]
    for (got,), expected in zip(run_calls(calls, device), results, strict=True):
        assert_close(got, expected)
