"""TIR without a GPU kernel: operators of TVM's library and templates of the CPU become launches, and give the same."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx
from tvm.s_tir import dlight

from edgec.errors import EdgecError
from edgec.plan import PlanBuilder
from edgec.targets import elementary
from edgec.targets.device import device_names, load_device
from edgec.targets.gpu import document
from edgec.targets.gpu.lower import LoweredGpu, lower_to_gpu
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.norm import GroupNorm, RMSNorm
from edgec.targets.kernels.softmax import Softmax
from edgec.targets.kernels.transpose import Transpose

APIS = [pytest.param("opencl", marks=pytest.mark.opencl), pytest.param("vulkan", marks=pytest.mark.vulkan)]
GPUS = [name for name in device_names() if load_device(name).is_gpu]


def run(function: Any, target: str, arrays: list[np.ndarray], shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """(the result of a PrimFunc on arrays, its launches)."""
    device = load_device(target)
    lowered = lower_to_gpu(tvm.IRModule({"net_f": function}), device)
    builder = PlanBuilder("net", 256)
    names = [builder.add_input(f"x{i}", a.shape, str(a.dtype)) for i, a in enumerate(arrays)]
    result = builder.add_temp(shape, dtype)
    builder.add_step("net_f", [*names, result], scratch=lowered.scratch["net_f"])
    builder.add_output("y", result, shape, dtype)
    plan = builder.finish()
    described = document.describe(plan, lowered, device)
    if device.api == "opencl":
        from edgec.targets.gpu.opencl import OpenCLRunner

        opened: Any = OpenCLRunner(described, document.program(lowered), b"")
    else:
        from edgec.targets.gpu.vulkan import VulkanRunner

        opened = VulkanRunner(described, document.modules(lowered), b"")
    got = np.zeros(shape, dtype)
    opened.run(arrays, [got])
    return got, described["launches"]


def library(*tensors: Any) -> Any:
    return te.create_prim_func(list(tensors))


def grouped_convolution() -> Any:
    """16 channels in 4 groups, 3x3, as Relax legalises it."""
    x = te.placeholder((1, 16, 10, 10), "float32", "x")
    w = te.placeholder((16, 4, 3, 3), "float32", "w")
    c, i, j = (te.reduce_axis((0, n), name) for n, name in ((4, "c"), (3, "i"), (3, "j")))
    y = te.compute(
        (1, 16, 8, 8),
        lambda n, o, h, v: te.sum(x[n, o // 4 * 4 + c, h + i, v + j] * w[o, c, i, j], axis=[c, i, j]),
        "y",
    )
    return library(x, w, y)


@pytest.mark.parametrize("api", APIS)
def test_library_operator_with_intermediate_memory(api: str) -> None:
    x = te.placeholder((5, 300), "float32", "x")
    k = te.reduce_axis((0, 300), "k")
    most = te.compute((5,), lambda i: te.max(x[i, k], axis=k), "most")
    y = te.compute((5, 300), lambda i, j: (x[i, j] - most[i]) * te.const(0.12345678, "float32"), "y")
    data = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    got, launches = run(library(x, y), api, [data], (5, 300))
    want = (data - data.max(1, keepdims=True)) * np.float32(0.12345678)
    # All digits of the constant: TVM prints seven.
    np.testing.assert_array_equal(got, want)
    assert len(launches) == 2 and launches[1]["grid"][0] * launches[1]["group"][0] >= 1500


@pytest.mark.parametrize("api", APIS)
def test_grouped_convolution_has_a_work_item_for_each_output(api: str) -> None:
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, 16, 10, 10), (16, 4, 3, 3)))
    got, launches = run(grouped_convolution(), api, [x, w], (1, 16, 8, 8))
    want = np.zeros((1, 16, 8, 8))
    for o in range(16):
        for i in range(3):
            for j in range(3):
                part = x[0, o // 4 * 4 : o // 4 * 4 + 4, i : i + 8, j : j + 8].astype(np.float64)
                want[0, o] += (part * w[o, :, i, j, None, None]).sum(0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    (launch,) = launches
    items = math.prod(launch["grid"]) * math.prod(launch["group"])
    assert 1024 <= items < 1024 + math.prod(launch["group"])


@pytest.mark.parametrize(
    "name", [pytest.param("mali-g78", marks=pytest.mark.opencl), pytest.param("vulkan", marks=pytest.mark.vulkan)]
)
@pytest.mark.parametrize("rule", ["Matmul", "Reduction"])
def test_schedules_with_shared_memory_keep_their_barriers(rule: str, name: str) -> None:
    """What benchmarks compare with: dlight's schedules stage operands in local memory, and reduce across work items."""
    rows, columns, depth = (196, 64, 48) if rule == "Matmul" else (1, 64, 384)
    a, b = te.placeholder((rows, depth), "float32", "a"), te.placeholder((columns, depth), "float32", "b")
    k = te.reduce_axis((0, depth), "k")
    y = te.compute((rows, columns), lambda i, j: te.sum(a[i, k] * b[j, k], axis=k), "y")
    target = tvm.target.Target(load_device(name).tvm_target())
    with target:
        scheduled: Any = dlight.ApplyDefaultSchedule(getattr(dlight.gpu, rule)())
        function = scheduled(tvm.IRModule({"net_f": library(a, b, y)}))["net_f"]
    assert "threadIdx" in function.script()
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(n).astype(np.float32) for n in ((rows, depth), (columns, depth))]
    got, _ = run(function.with_attr("global_symbol", "net_f"), name, data, (rows, columns))
    np.testing.assert_allclose(got, data[0] @ data[1].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GPUS)
def test_no_barriers_and_no_group_beyond_the_limit(name: str) -> None:
    device = load_device(name)
    lowered = lower_to_gpu(tvm.IRModule({"net_f": grouped_convolution()}), device)
    ((launch,),) = lowered.variants["net_f"]
    assert math.prod(launch.group) <= device.work_group
    assert not re.search(r"barrier|Barrier", launch.text)
    language = {"opencl": "__kernel void", "vulkan": "@compute", "metal": "kernel void"}[device.api]
    assert language in launch.text and "podArgs" not in launch.text


# (template, shape of operand and result, work items of its largest launch): one for each row, or all in one.
TEMPLATES = {
    "softmax": (Softmax(6, 37), (6, 37), 6),
    "log_softmax": (Softmax(6, 37, log=True), (6, 37), 6),
    "rms_norm": (RMSNorm(40, 12, 1e-5), (40, 12), 64),
    "group_norm": (GroupNorm(35, 12, 3, 1e-5), (35, 12), 1),
}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_run_as_tasks(api: str, name: str) -> None:
    spec, shape, items = TEMPLATES[name]
    device = load_device(api)
    with elementary.native():
        function = spec.prim_func(device)
    x = (3 * np.random.default_rng(2).standard_normal(shape)).astype(np.float32)
    # More than the rounding of an exponential whose argument was rounded by adding and subtracting a large number.
    got, launches = run(function, api, [x, *spec.pack(device)], shape)
    np.testing.assert_allclose(got, spec.reference(x), rtol=2e-5, atol=2e-6)
    assert max(math.prod(row["grid"]) * math.prod(row["group"]) for row in launches) == items


@pytest.mark.opencl
def test_integer_template_is_exact() -> None:
    from edgec.targets.kernels.common import Epilogue

    device = load_device("opencl")
    spec = Conv2D(
        6, 5, 7, 9, (3, 3), padding=(1, 1, 1, 1), dtype="int8", x_zp=3, epilogue=Epilogue(y_zp=-4, lo=-128, hi=127)
    )
    rng = np.random.default_rng(3)
    x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((6, 5, 7), (9, 7, 3, 3)))
    bias = rng.integers(-5000, 5000, 9).astype(np.int32)
    m, shift = rng.integers(1 << 29, 1 << 30, 9).astype(np.int32), rng.integers(37, 41, 9).astype(np.int32)
    got, _ = run(spec.prim_func(device), "opencl", [x, *spec.pack(device, w, bias, m, shift)], (6, 5, 9), "int8")
    want = spec.reference(x, w, bias, m, shift)
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(want)) > 50
    # Refused for WGSL, where its products of 64 bits would be cut.
    with pytest.raises(EdgecError, match="64-bit"):
        lower_to_gpu(tvm.IRModule({"net_f": spec.prim_func(load_device("vulkan"))}), load_device("vulkan"))


@pytest.mark.vulkan
def test_more_groups_than_one_direction_takes() -> None:
    size = 65535 * 256 + 1000
    x = te.placeholder((size,), "float32", "x")
    data = np.arange(size, dtype=np.float32)
    got, launches = run(library(x, te.compute((size,), lambda i: x[i] + 1.0, "y")), "vulkan", [data], (size,))
    np.testing.assert_array_equal(got, data + 1)
    assert launches[0]["grid"][0] == 65535 and launches[0]["grid"][2] > 1


def test_types_that_a_language_has_not_are_an_error() -> None:
    x = te.placeholder((8,), "int64", "x")
    function = library(x, te.compute((8,), lambda i: x[i] * x[i], "y"))
    assert "long" in lower_to_gpu(tvm.IRModule({"net_f": function}), load_device("opencl")).module
    with pytest.raises(EdgecError, match=r"TVM cannot write the kernels.*i64"):
        lower_to_gpu(tvm.IRModule({"net_f": function}), load_device("vulkan"))


def test_nothing_to_lower() -> None:
    assert lower_to_gpu(tvm.IRModule({}), load_device("opencl")) == LoweredGpu({}, {}, {})


def test_infinite_numbers_have_a_literal() -> None:
    x = te.placeholder((8,), "float32", "x")
    y = te.compute((8,), lambda i: tirx.if_then_else(x[i] > 0.0, te.const(-math.inf, "float32"), x[i]), "y")
    texts = {
        api: lower_to_gpu(tvm.IRModule({"net_f": library(x, y)}), load_device(api)).module
        for api in ("opencl", "vulkan")
    }
    assert "(-INFINITY)" in texts["opencl"] and "(-3.4028234663852886e+38f)" in texts["vulkan"]


# -- types of memory only ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_halves_need_no_extension_in_opencl(api: str) -> None:
    x = te.placeholder((6, 10), "float16", "x")
    k = te.reduce_axis((0, 10), "k")
    total = te.compute((6,), lambda i: te.sum(x[i, k].astype("float32"), axis=k), "total")
    y = te.compute((6, 10), lambda i, j: te.max(x[i, j] * te.const(0.3, "float16"), total[i].astype("float16")), "y")
    data = np.random.default_rng(5).standard_normal((6, 10)).astype(np.float16)
    got, _ = run(library(x, y), api, [data], (6, 10), "float16")
    wide = data.astype(np.float32)
    want = np.maximum(wide * np.float32(np.float16(0.3)), wide.sum(1, keepdims=True))
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=1e-3, atol=1e-4)
    lowered = lower_to_gpu(tvm.IRModule({"net_f": library(x, y)}), load_device(api))
    assert document._computes_in_half(lowered) == (api == "vulkan")


@pytest.mark.parametrize("api", APIS)
def test_bytes_of_one_word_are_written_by_different_items(api: str) -> None:
    size = 37
    x, z = (te.placeholder((size,), "int8", name) for name in "xz")
    # Sums of bytes wrap, products are taken in 32 bits; neighbours go to other places.
    y = te.compute((size,), lambda i: (x[size - 1 - i] + z[i]) - (x[i].astype("int32") * 3).astype("int8"), "y")
    rng = np.random.default_rng(6)
    a, b = (rng.integers(-128, 128, size).astype(np.int8) for _ in range(2))
    got, _ = run(library(x, z, y), api, [a, b], (size,), "int8")
    np.testing.assert_array_equal(got, a[::-1] + b - (a.astype(np.int32) * 3).astype(np.int8))


@pytest.mark.vulkan
def test_templates_of_codes_run_in_wgsl() -> None:
    device = load_device("vulkan")
    spec = Transpose((3, 7, 5), (1, 2, 0), "int8")
    x = np.random.default_rng(7).integers(-128, 128, (3, 7, 5)).astype(np.int8)
    got, _ = run(spec.prim_func(device), "vulkan", [x], (7, 5, 3), "int8")
    np.testing.assert_array_equal(got, x.transpose(1, 2, 0))
