"""Bundles of GPUs as they are written: the plan as data, the runners of Python, and the C host on PoCL."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgec.errors import EdgecError
from edgec.targets.device import load_device
from edgec.targets.gpu import document, runner
from edgec.targets.gpu.opencl import OpenCLRunner
from tests.targets.gpu_models import SIZE, WEIGHT, changed, model, reference, sample, written

APIS = [pytest.param("opencl", marks=pytest.mark.opencl), pytest.param("vulkan", marks=pytest.mark.vulkan)]
WARNINGS = ("-std=c99", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.pure
def test_arguments_of_launches_are_buffers_by_number() -> None:
    plan, kernels = model("opencl")
    described = document.describe(plan, kernels, load_device("opencl"))
    buffers, launches = described["buffers"], described["launches"]
    (x,), (y, same) = described["inputs"], described["outputs"]
    names = [described["functions"][row["function"]] if row["function"] >= 0 else "" for row in launches]
    assert names == ["scale", "turn", "add", "copy", "join", ""]
    assert [(row["step"], row["variant"]) for row in launches] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 0), (3, 0)]
    scale, turn, add, copy, join, last = (row["args"] for row in launches)
    assert scale == turn and scale[0] == x and buffers[scale[1]]["kind"] == "constant"
    # The launch takes the operands in another order than the call.
    assert add == [x, scale[2], add[2]]
    scratch = copy[2]
    assert copy[:2] == [add[2], scale[2]] and buffers[scratch] | {"slot": 0, "offset": 0} == {
        "kind": "temp",
        "bytes": 4 * SIZE,
        "slot": 0,
        "offset": 0,
    }
    assert join == [scratch, scale[2], y] and last == [x, same]
    assert launches[0]["grid"] == [3, 1, 1] and launches[1]["group"] == [2, 1, 1]
    assert described["steps"][0] == {"layer": "first", "op": "net_scale", "macs": SIZE, "variants": 2}
    weights = document.weights(plan)
    assert len(weights) == described["weight_bytes"] == 256
    assert np.array_equal(np.frombuffer(weights, np.float32, SIZE), WEIGHT) and not any(weights[4 * SIZE :])


@pytest.mark.pure
def test_pool_never_shares_what_is_alive_together() -> None:
    plan, _ = model("opencl")
    slots, sizes = document.pooled(plan)
    owners = [b for b in plan.buffers.values() if b.offset is not None and b.alias_of is None]
    assert set(slots) == {b.name for b in owners} and len(sizes) == 3
    for a in owners:
        assert sizes[slots[a.name]] >= a.nbytes
        for b in owners:
            if a is not b and a.first <= b.last and b.first <= a.last:
                assert slots[a.name] != slots[b.name]


@pytest.mark.pure
def test_halves_are_seen_where_they_are_values() -> None:
    plan, kernels = model("opencl")
    behind = "__kernel void add(__global const half *a) { float v = vload_half(0, a); vstore_half(v, 0, a); }"
    device = load_device("opencl")
    pointers = changed(kernels, "net_sum", text=behind)
    assert not document.describe(plan, pointers, device)["half"] and "pragma" not in document.program(pointers)
    values = changed(kernels, "net_sum", text=behind.replace("float v", "half v"))
    assert document.describe(plan, values, device)["half"] and "cl_khr_fp16 : enable" in document.program(values)
    narrow = changed(kernels, "net_sum", text="var<storage, read> a : array<f16>;")
    assert document.modules(narrow)["add"].startswith("enable f16;\n")


@pytest.mark.pure
def test_two_texts_of_one_name_are_a_bug() -> None:
    _, kernels = model("opencl")
    with pytest.raises(AssertionError, match="two functions are called scale"):
        changed(kernels, "net_sum", function="scale").texts()


# -- runners of Python -------------------------------------------------------------------------------------------------


def run(opened: object, x: np.ndarray) -> list[np.ndarray]:
    outputs = [np.zeros((3, 4), np.float32) for _ in range(2)]
    opened.run([x], outputs)  # type: ignore[attr-defined]
    return outputs


@pytest.mark.parametrize("api", APIS)
def test_runner(api: str, tmp_path: Path) -> None:
    folder = written(tmp_path, load_device(api), *model(api))
    opened = runner.open_runner(folder, api)
    for seed in range(2):
        x = sample(seed)
        for got, want in zip(run(opened, x), reference(x), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)
    assert opened.times == []


@pytest.mark.parametrize("api", APIS)
def test_runner_measures_and_chooses_variants(api: str, tmp_path: Path) -> None:
    folder = written(tmp_path, load_device(api), *model(api))
    opened = runner.open_runner(folder, api, profile=True)
    x = sample()
    before = run(opened, x)
    assert len(opened.times) == 5 and min(opened.times) >= 0
    opened.choices[0] = 1
    for got, want in zip(run(opened, x), before, strict=True):
        np.testing.assert_array_equal(got, want)
    choices = opened.tune(repeats=2)
    assert choices[0] in (0, 1) and choices[1:] == [0, 0, 0]
    np.testing.assert_array_equal(run(opened, x)[0], before[0])


@pytest.mark.opencl
def test_separate_buffers_give_the_same(tmp_path: Path) -> None:
    folder = written(tmp_path, load_device("opencl"), *model("opencl"))
    split = runner.open_runner(folder, "opencl", split=True)
    assert split.split and not runner.open_runner(folder, "opencl").split
    x = sample()
    np.testing.assert_array_equal(run(split, x)[0], run(runner.open_runner(folder, "opencl"), x)[0])


@pytest.mark.opencl
def test_opencl_says_why_a_program_is_refused(tmp_path: Path) -> None:
    plan, kernels = model("opencl")
    device = load_device("opencl")

    def opened(kernels: object) -> OpenCLRunner:
        described = document.describe(plan, kernels, device)  # type: ignore[arg-type]
        return OpenCLRunner(described, document.program(kernels), document.weights(plan))  # type: ignore[arg-type]

    with pytest.raises(EdgecError, match=r"does not compile.*nothing_of_the_kind"):
        opened(changed(kernels, "net_sum", text="__kernel void add(void) { nothing_of_the_kind(); }\n"))
    with pytest.raises(EdgecError, match="add needs groups of 1048576 work items"):
        opened(changed(kernels, "net_sum", group=(1 << 20, 1, 1)))


@pytest.mark.vulkan
def test_vulkan_says_why_a_kernel_is_refused(tmp_path: Path) -> None:
    plan, kernels = model("vulkan")
    folder = written(tmp_path, load_device("vulkan"), plan, changed(kernels, "net_sum", text="fn add() { nothing(); }"))
    with pytest.raises(EdgecError, match=r"kernel add: .*nothing"):
        runner.open_runner(folder, "vulkan")


def test_metal_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(EdgecError, match="not compiled or run here"):
        runner.open_runner(tmp_path, "metal")


# -- the C host --------------------------------------------------------------------------------------------------------


def build(folder: Path, *sources: str, output: str = "runner") -> Path:
    command = ["cc", *WARNINGS, "-Iinclude", "src/net.c", *sources, "-lOpenCL", "-o", output]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / output


def call(program: Path, *arguments: object) -> tuple[int, str]:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runner in the folder of its bundle, which tests do not change."""
    folder = written(tmp_path_factory.mktemp("host"), load_device("opencl"), *model("opencl"))
    return build(folder, "src/runner.c")


@pytest.mark.opencl
@pytest.mark.parametrize("option", ["", "--pool", "--tune", "--profile"])
def test_host_runs_samples(host: Path, option: str, tmp_path: Path) -> None:
    x = np.stack([sample(seed) for seed in range(3)])
    (tmp_path / "in").write_bytes(x.tobytes())
    status, text = call(host, *option.split(), tmp_path / "in", tmp_path / "out", 3, 2)
    assert status == 0, text
    got = np.frombuffer((tmp_path / "out").read_bytes(), np.float32).reshape(3, 2, 3, 4)
    for values, row in zip(x, got, strict=True):
        np.testing.assert_allclose(row[0], reference(values)[0], rtol=1e-6)
        np.testing.assert_array_equal(row[1], values)
    lines = [line.split() for line in text.splitlines()]
    if option == "--profile":
        assert [line[1:] for line in lines] == [
            ["scale", "first"],
            ["add", "second"],
            ["copy", "third"],
            ["join", "third"],
            ["copy"],
        ]
        assert all(float(line[0]) >= 0 for line in lines)


@pytest.mark.opencl
def test_host_selftest_fails_when_weights_differ(host: Path, tmp_path: Path) -> None:
    assert call(host, "--selftest") == (0, "ok\n")
    folder = written(tmp_path, load_device("opencl"), *model("opencl"))
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[3] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    assert call(host, "--folder", folder, "--selftest") == (3, "results differ\n")
    (folder / "weights.bin").write_bytes(weights[:-1])
    status, text = call(host, "--folder", folder, "--selftest")
    assert status == 6 and "the weights have 255 bytes, not 256" in text


@pytest.mark.opencl
def test_host_caches_the_program_and_the_choices(host: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, load_device("opencl"), *model("opencl"))
    cache = tmp_path / "cache"
    options = ("--folder", folder, "--cache", cache, "--selftest")
    assert call(host, *options)[0] == 0
    first = cache.read_bytes()
    assert call(host, *options)[0] == 0 and cache.read_bytes() == first
    # Byte 32 on: the choices of four steps. 1 is the second variant of the first one, which the cache now asks for.
    assert first[:8] == b"edgecl1\0" and first[24:32] == bytes(8)
    cache.write_bytes(first[:32] + b"\1" + first[33:])
    status, text = call(host, "--profile", *options)
    assert status == 0 and "turn" in text and "scale" not in text
    # Choices that there are not, another program, and a file cut short are no harm.
    cache.write_bytes(first[:32] + b"\7" + first[33:])
    assert "scale" in call(host, "--profile", *options)[1]
    cache.write_bytes(first[:100])
    assert call(host, *options)[0] == 0 and cache.read_bytes() == first
    source = (folder / "model.cl").read_text()
    (folder / "model.cl").write_text(source.replace("a[i] + b[i]", "a[i] + b[i] + 1.0f"))
    assert call(host, *options) == (3, "results differ\n")
    assert cache.read_bytes()[8:16] != first[8:16]
    assert call(host, "--tune", *options)[0] == 3 and cache.read_bytes()[24] == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("cache")) == ["cache"]


@pytest.mark.opencl
def test_host_names_what_failed(host: Path, tmp_path: Path) -> None:
    status, text = call(host, "--folder", tmp_path / "absent", "--selftest")
    assert status == 6 and f"cannot read {tmp_path}/absent/model.cl" in text
    folder = written(tmp_path, load_device("opencl"), *model("opencl"))
    source = (folder / "model.cl").read_text()
    (folder / "model.cl").write_text(source.replace("a[i] + b[i]", "a[i] + nothing"))
    status, text = call(host, "--folder", folder, "--selftest")
    assert status == 6 and "clBuildProgram: CL_BUILD_PROGRAM_FAILURE (-11)" in text and "nothing" in text
    (folder / "model.cl").write_text(source.replace("void add(", "void other("))
    status, text = call(host, "--folder", folder, "--selftest")
    assert status == 6 and "clCreateKernel: CL_INVALID_KERNEL_NAME (-46)" in text
    assert call(host)[0] == call(host, "in", "out")[0] == 4


@pytest.mark.opencl
def test_host_refuses_groups_that_the_device_does_not_take(tmp_path: Path) -> None:
    plan, kernels = model("opencl")
    large = changed(kernels, "net_sum", group=(1 << 20, 1, 1))
    program = build(written(tmp_path, load_device("opencl"), plan, large), "src/runner.c")
    status, text = call(program, "--selftest")
    assert status == 6 and "kernel add needs groups of 1048576 work items, the device gives it" in text


@pytest.mark.opencl
def test_host_refuses_half_precision_where_there_is_none(tmp_path: Path) -> None:
    from edgec.targets.gpu.opencl import devices

    if "cl_khr_fp16" in devices()[0].extensions:
        pytest.skip("the device has half precision")
    plan, kernels = model("opencl")
    text = kernels.variants["net_sum"][0][0].text
    half = changed(kernels, "net_sum", text=text.replace("a[i] + b[i]", "(float)(half)(a[i] + b[i])"))
    program = build(written(tmp_path, load_device("opencl"), plan, half), "src/runner.c")
    status, text = call(program, "--selftest")
    assert status == 6 and "does not compute in half precision" in text


CALLER = r"""
#include "net.h"
#include <stdio.h>
#include <string.h>

#define CHECK(x) do { if (!(x)) { printf("line %d: %s\n", __LINE__, m ? net_message(m) : ""); return 1; } } while (0)

int main(void) {
    net_options o;
    net_model *m = NULL, *second = NULL;
    cl_platform_id platform;
    cl_device_id device;
    cl_context context;
    cl_command_queue queue, loose;
    cl_uint before, during, after;
    cl_int code;
    float x[NET_X_SIZE], y[NET_Y_SIZE], same[NET_SAME_SIZE], again[NET_Y_SIZE];
    int i;
    for (i = 0; i < NET_X_SIZE; i++) x[i] = (float)i - 3;
    CHECK(clGetPlatformIDs(1, &platform, NULL) == CL_SUCCESS);
    CHECK(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL) == CL_SUCCESS);
    context = clCreateContext(NULL, 1, &device, NULL, NULL, &code);
    CHECK(code == CL_SUCCESS);
    queue = clCreateCommandQueue(context, device, 0, &code);
    CHECK(code == CL_SUCCESS);
    clGetContextInfo(context, CL_CONTEXT_REFERENCE_COUNT, sizeof before, &before, NULL);

    memset(&o, 0, sizeof o);
    o.context = context;
    CHECK(net_create(&o, &m) == NET_BAD_ARGUMENT && strstr(net_message(m), "a context needs a device"));
    net_destroy(m);
    o.device = device;
    o.queue = queue;
    o.profile = 1;
    CHECK(net_create(&o, &m) == NET_BAD_ARGUMENT && strstr(net_message(m), "does not measure"));
    CHECK(net_run(m, x, y, same) == NET_BAD_ARGUMENT && net_launches(m) == 0);
    net_destroy(m);
    o.profile = 0;
    loose = clCreateCommandQueue(context, device, CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE, &code);
    if (code == CL_SUCCESS) {
        o.queue = loose;
        CHECK(net_create(&o, &m) == NET_BAD_ARGUMENT && strstr(net_message(m), "not in order"));
        net_destroy(m);
        clReleaseCommandQueue(loose);
        o.queue = queue;
    }
    o.source = "__kernel void none(void) {}";
    o.source_bytes = strlen(o.source);
    CHECK(net_create(&o, &m) == NET_OPENCL && strstr(net_message(m), "clCreateKernel"));
    net_destroy(m);
    o.source = NULL;
    CHECK(net_create(&o, NULL) == NET_BAD_ARGUMENT);

    /* Two models on one queue. */
    CHECK(net_create(&o, &m) == NET_OK && !*net_message(m));
    CHECK(net_create(&o, &second) == NET_OK);
    CHECK(net_run(m, x, y, same) == NET_OK && net_run(second, x, again, same) == NET_OK);
    CHECK(!memcmp(y, again, sizeof y) && !memcmp(x, same, sizeof x));
    CHECK(net_run(m, NULL, y, same) == NET_BAD_ARGUMENT && !strcmp(net_message(m), "an input is NULL"));
    CHECK(net_run(m, x, y, NULL) == NET_BAD_ARGUMENT && !strcmp(net_message(m), "an output is NULL"));
    CHECK(net_launch_ms(m, 0) == -1 && net_launches(m) == 5 && !strcmp(net_launch_layer(m, 1), "second"));

    /* Data that stays on the device. */
    memset(again, 0, sizeof again);
    for (i = 0; i < NET_X_SIZE; i++) x[i] = 2;
    CHECK(!net_input(m, 1) && !net_output(m, -1) && net_output(m, 1));
    CHECK(clEnqueueWriteBuffer(queue, net_input(m, 0), CL_FALSE, 0, sizeof x, x, 0, NULL, NULL) == CL_SUCCESS);
    CHECK(net_enqueue(m) == NET_OK);
    CHECK(clEnqueueReadBuffer(queue, net_output(m, 0), CL_TRUE, 0, sizeof again, again, 0, NULL, NULL) == CL_SUCCESS);
    for (i = 0; i < NET_Y_SIZE; i++) CHECK(again[i] == 2.0f * (float)((2 * i + 4) * (i + 1)));

    clGetContextInfo(context, CL_CONTEXT_REFERENCE_COUNT, sizeof during, &during, NULL);
    net_destroy(second);
    net_destroy(m);
    net_destroy(NULL);
    m = NULL;
    clFinish(queue);
    clGetContextInfo(context, CL_CONTEXT_REFERENCE_COUNT, sizeof after, &after, NULL);
    CHECK(during > before && after == before);
    CHECK(clReleaseCommandQueue(queue) == CL_SUCCESS && clReleaseContext(context) == CL_SUCCESS);
    printf("done\n");
    return 0;
}
"""


@pytest.mark.opencl
def test_host_in_a_program_with_its_own_context(tmp_path: Path) -> None:
    folder = written(tmp_path, load_device("opencl"), *model("opencl"))
    (folder / "src" / "caller.c").write_text(CALLER)
    assert call(build(folder, "src/caller.c", output="caller")) == (0, "done\n")


@pytest.mark.opencl
def test_header_is_fit_for_cpp_and_sources_for_cmake(host: Path, tmp_path: Path) -> None:
    command = ["c++", "-fsyntax-only", "-Wall", "-Werror", "-Iinclude", "-x", "c++", "include/net.h"]
    done = subprocess.run(command, cwd=host.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for step in (["cmake", "-S", str(host.parent), "-B", str(tmp_path)], ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert call(tmp_path / "net_runner", "--folder", host.parent, "--selftest")[0] == 0


@pytest.mark.pure
def test_variants_are_added_where_there_is_room() -> None:
    from edgec.targets.gpu import lower

    _, kernels = model("opencl")
    kept = lower._affordable(kernels.variants, {"net_scale": SIZE}, load_device("opencl"))
    assert len(kept["net_scale"]) == 2 and len(kept["net_join"]) == 1
    long = replace(kernels.variants["net_scale"][1][0], text="/" * lower.SOURCE_BYTES)
    crowded = {**kernels.variants, "net_scale": (kernels.variants["net_scale"][0], (long,))}
    assert lower._affordable(crowded, {}, load_device("opencl"))["net_scale"] == crowded["net_scale"][:1]
