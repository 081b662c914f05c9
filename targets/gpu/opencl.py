"""Run a GPU bundle on an OpenCL device from Python, with pyopencl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing

HINT = "apt-get install pocl-opencl-icd, which runs OpenCL on the CPU, or install the driver of a GPU"
BUILD = "-cl-std=CL1.2"


def devices() -> list[Any]:
    """All OpenCL devices of this machine. Raises ToolchainMissing without pyopencl."""
    try:
        import pyopencl as cl
    except ImportError as error:
        raise ToolchainMissing("pyopencl is not installed", where="OpenCL", hint="pip install 'edgec[gpu]'") from error
    try:
        platforms = cl.get_platforms()
    except cl.Error:
        # What the loader says where no driver is installed.
        return []
    return [device for each in platforms for device in each.get_devices()]


class OpenCLRunner:
    """One model on one device: its program, buffers and queue.

    plan: as `edgec.targets.gpu.document.describe` gives it. source: OpenCL C. weights: the blob of constants. device:
    a pyopencl device; by default the first one. profile: measure each launch. split: buffers of the pool instead of
    parts of one arena, which is what devices get that ask for larger alignment. prelude: text before the program, for
    tests.

    Raises ToolchainMissing without a device; EdgecError when the program does not compile or a kernel asks for more
    work items than the device gives it.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        source: str,
        weights: bytes,
        *,
        device: Any = None,
        profile: bool = False,
        split: bool = False,
        prelude: str = "",
    ) -> None:
        found = [device] if device is not None else devices()
        if not found:
            raise ToolchainMissing("no OpenCL device", where=plan["name"], hint=HINT)
        import pyopencl as cl

        self.cl, self.plan, self.device = cl, plan, found[0]
        self.context = cl.Context([self.device])
        properties: Any = cl.command_queue_properties.PROFILING_ENABLE if profile else 0
        self.queue = cl.CommandQueue(self.context, properties=properties)
        self.profile = profile
        # Milliseconds of each launch of the last run, with `profile`.
        self.times: list[float] = []
        try:
            self.program = cl.Program(self.context, prelude + source).build(options=[BUILD])
        except cl.Error as error:
            raise EdgecError(
                f"the program does not compile: {error}", where=f"{plan['name']} on {self.device.name}"
            ) from error
        self.split = split or self.device.mem_base_addr_align // 8 > plan["align"]
        self.buffers = self._allocate(weights)
        self.kernels = [self._kernel(launch) for launch in plan["launches"]]
        # The variant of each step.
        self.choices = [0] * len(plan["steps"])

    def _allocate(self, weights: bytes) -> list[Any]:
        cl, flags = self.cl, self.cl.mem_flags
        plan = self.plan

        def new(size: int) -> Any:
            return cl.Buffer(self.context, flags.READ_WRITE, max(4, size))

        self._owners = [] if self.split else [new(plan["arena_bytes"])]
        if self.split:
            self._owners = [new(size) for size in plan["pool"]]
        blob = cl.Buffer(
            self.context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=np.frombuffer(weights or b"\0\0\0\0", np.uint8)
        )
        self._owners.append(blob)
        buffers = []
        for row in plan["buffers"]:
            kind, size = row["kind"], row["bytes"]
            if kind == "temp":
                part = (
                    self._owners[row["slot"]]
                    if self.split
                    else self._owners[0].get_sub_region(row["offset"], max(4, size))
                )
            elif kind != "constant":
                part = new(size)
            elif self.split:
                piece = np.frombuffer(weights, np.uint8, size, row["offset"])
                part = cl.Buffer(self.context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=piece)
            else:
                part = blob.get_sub_region(row["offset"], max(1, size))
            buffers.append(part)
        return buffers

    def _kernel(self, launch: Mapping[str, Any]) -> Any:
        if launch["function"] < 0:
            return None
        name = self.plan["functions"][launch["function"]]
        kernel = self.cl.Kernel(self.program, name)
        kernel.set_args(*(self.buffers[i] for i in launch["args"]))
        most = kernel.get_work_group_info(self.cl.kernel_work_group_info.WORK_GROUP_SIZE, self.device)
        items = math.prod(launch["group"])
        if items > most:
            raise EdgecError(
                f"{name} needs groups of {items} work items, the device gives it {most}",
                where=f"{self.plan['name']} on {self.device.name}",
                hint="compile the model for target opencl, which asks for small groups",
            )
        return kernel

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """One inference: contiguous arrays of the model's inputs, and those that the results are put into."""
        cl, plan = self.cl, self.plan
        for number, array in zip(plan["inputs"], inputs, strict=True):
            cl.enqueue_copy(self.queue, self.buffers[number], array, is_blocking=False)
        chosen = [n for n, x in enumerate(plan["launches"]) if x["variant"] == self.choices[x["step"]]]
        events = [self._enqueue(number) for number in chosen]
        for number, array in zip(plan["outputs"], outputs, strict=True):
            cl.enqueue_copy(self.queue, array, self.buffers[number], is_blocking=False)
        self.queue.finish()
        if self.profile:
            self.times = [_milliseconds(event) for event in events]

    def _enqueue(self, number: int) -> Any:
        launch, kernel = self.plan["launches"][number], self.kernels[number]
        if kernel is None:
            source, target = launch["args"]
            size = self.plan["buffers"][target]["bytes"]
            return self.cl.enqueue_copy(self.queue, self.buffers[target], self.buffers[source], byte_count=size)
        total = [g * n for g, n in zip(launch["grid"], launch["group"], strict=True)]
        return self.cl.enqueue_nd_range_kernel(self.queue, kernel, total, launch["group"])

    def tune(self, repeats: int = 5) -> list[int]:
        """Measure the variants of each step and use the fastest from now on. Needs `profile`; returns the choices.

        The values in the buffers are those of the last run, or none: kernels take the same time on any.
        """
        assert self.profile, "times are not measured"
        for step, row in enumerate(self.plan["steps"]):
            times = []
            for variant in range(row["variants"] if row["variants"] > 1 else 0):
                those = [n for n, x in enumerate(self.plan["launches"]) if (x["step"], x["variant"]) == (step, variant)]
                runs = [[self._enqueue(n) for n in those] for _ in range(repeats)]
                self.queue.finish()
                # The first one may compile.
                times.append(min(sum(map(_milliseconds, events)) for events in runs[1:] or runs))
            if times:
                self.choices[step] = times.index(min(times))
        return self.choices


def _milliseconds(event: Any) -> float:
    return (event.profile.end - event.profile.start) / 1e6
