"""Runs one GPU kernel on the packed operands: on PoCL by pyopencl, on lavapipe by wgpu."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edgec.targets.device import Device, load_device
from edgec.targets.gpu.kernels.base import GpuKernel

# Bytes behind each buffer that no kernel may write.
GUARD = 64
GUARD_BYTE = 0xA5
# Compiled kernels stay here from one run of the tests to the next.
os.environ.setdefault("POCL_CACHE_DIR", "/tmp/edgec-pocl-cache")

APIS = [pytest.param("opencl", marks=pytest.mark.opencl), pytest.param("vulkan", marks=pytest.mark.vulkan)]


def device_of(api: str) -> Device:
    return load_device(api)


@functools.cache
def opencl() -> Any:
    """(context, queue) of the first CPU device; skips the test without one."""
    cl = pytest.importorskip("pyopencl", reason="pyopencl is not installed")
    try:
        devices = [d for p in cl.get_platforms() for d in p.get_devices(cl.device_type.CPU)]
    except cl.LogicError:
        devices = []
    if not devices:
        pytest.skip("no OpenCL device: apt install pocl-opencl-icd")
    context = cl.Context(devices[:1])
    return context, cl.CommandQueue(context)


@functools.cache
def vulkan() -> Any:
    """A wgpu device of the first Vulkan adapter; skips the test without one."""
    os.environ["WGPU_BACKEND_TYPE"] = "Vulkan"
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    wgpu = pytest.importorskip("wgpu", reason="wgpu is not installed")
    adapters = [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] == "Vulkan"]
    if not adapters:
        pytest.skip("no Vulkan device: apt install mesa-vulkan-drivers")
    features = [f for f in ("shader-f16", "timestamp-query") if f in adapters[0].features]
    return adapters[0].request_device_sync(required_features=features, required_limits={})


def run(kernel: GpuKernel, device: Device, operands: Sequence[np.ndarray]) -> np.ndarray:
    """The output for operands in their order. Raises AssertionError as `prepare`, and where a guard is overwritten."""
    return prepare(kernel, device, operands)[0]


def prepare(kernel: GpuKernel, device: Device, operands: Sequence[np.ndarray]) -> tuple[np.ndarray, Callable[[], None]]:
    """(output of a first run, function that runs again and waits).

    Raises AssertionError where an operand has another size than declared, or the kernel writes beyond its output.
    """
    declared = kernel.operands()
    assert len(operands) == len(declared) - 1
    for operand, array in zip(declared, operands, strict=False):
        assert (operand.elements, operand.dtype) == (array.size, str(array.dtype)), (operand, array.shape, array.dtype)
    sizes = [o.elements * np.dtype(o.dtype).itemsize for o in declared] + list(kernel.scratch())
    images = [np.full(-(-n // 4) * 4 + GUARD, GUARD_BYTE, np.uint8) for n in sizes]
    for image, array in zip(images, operands, strict=False):
        image[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    number = len(declared) - 1
    start = _opencl if device.api == "opencl" else _vulkan
    result, again = start(kernel.launches(device), images, number)
    assert np.all(result[sizes[number] :] == GUARD_BYTE), "written beyond the output"
    return result[: sizes[number]].view(declared[number].dtype), again


def _opencl(launches: Any, images: list[np.ndarray], number: int) -> tuple[np.ndarray, Callable[[], None]]:
    import pyopencl as cl

    context, queue = opencl()
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
    buffers = [cl.Buffer(context, flags, hostbuf=image) for image in images]
    steps = []
    for launch in launches:
        kernel = cl.Kernel(_program(launch.whole("opencl")), launch.function)
        for position, argument in enumerate(launch.arguments):
            kernel.set_arg(position, buffers[argument])
        total = tuple(g * n for g, n in zip(launch.grid, launch.group, strict=True))
        # OpenCL does not keep the buffers of a kernel alive.
        steps.append((kernel, total, launch.group, buffers))

    def once() -> None:
        for kernel, total, group, _ in steps:
            cl.enqueue_nd_range_kernel(queue, kernel, total, group)
        queue.finish()

    once()
    result = np.empty_like(images[number])
    cl.enqueue_copy(queue, result, buffers[number])
    return result, once


@functools.cache
def _program(text: str) -> Any:
    import pyopencl as cl

    return cl.Program(opencl()[0], text).build()


def _vulkan(launches: Any, images: list[np.ndarray], number: int) -> tuple[np.ndarray, Callable[[], None]]:
    import wgpu

    device = vulkan()
    usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
    buffers = [device.create_buffer_with_data(data=image, usage=usage) for image in images]
    steps = []
    for launch in launches:
        module = device.create_shader_module(code=launch.whole("vulkan"))
        compute = {"module": module, "entry_point": launch.function}
        pipeline = device.create_compute_pipeline(layout="auto", compute=compute)
        entries = [
            {"binding": position, "resource": {"buffer": buffers[a], "offset": 0, "size": buffers[a].size}}
            for position, a in enumerate(launch.arguments)
        ]
        group = device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        steps.append((pipeline, group, launch.grid))

    def once() -> None:
        encoder = device.create_command_encoder()
        dispatch = encoder.begin_compute_pass()
        for pipeline, group, grid in steps:
            dispatch.set_pipeline(pipeline)
            dispatch.set_bind_group(0, group)
            dispatch.dispatch_workgroups(*grid)
        dispatch.end()
        device.queue.submit([encoder.finish()])
        # Waits for what was submitted.
        device.queue.read_buffer(buffers[number], 0, 4)

    once()
    return np.frombuffer(device.queue.read_buffer(buffers[number]), np.uint8), once
