"""Run a GPU bundle on a Vulkan device from Python, with wgpu."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing

HINT = "apt-get install mesa-vulkan-drivers, which runs Vulkan on the CPU, or install the driver of a GPU"
LIMITS = ("max-storage-buffers-per-shader-stage", "max-storage-buffer-binding-size", "max-buffer-size")
# Ticks of a time stamp are nanoseconds in wgpu.
TICK_MS = 1e-6


def adapters() -> list[Any]:
    """All Vulkan devices of this machine. Raises ToolchainMissing without wgpu."""
    # Else it says that there is no window system.
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")
    try:
        import wgpu
    except ImportError as error:
        raise ToolchainMissing("wgpu is not installed", where="Vulkan", hint="pip install 'edgec[gpu]'") from error
    return [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] == "Vulkan"]


class VulkanRunner:
    """One model on one device: its pipelines, buffers and queue.

    plan: as `edgec.targets.gpu.document.describe` gives it. modules: WGSL by function name. weights: the blob of
    constants. adapter: of wgpu; by default the first one for Vulkan. profile: measure each launch.

    Temporary tensors are in the buffers of the pool: WGSL does not let a kernel read and write parts of one buffer.

    Raises ToolchainMissing without a device; EdgecError when a kernel does not compile or the device cannot run it.
    """

    def __init__(
        self,
        plan: Mapping[str, Any],
        modules: Mapping[str, str],
        weights: bytes,
        *,
        adapter: Any = None,
        profile: bool = False,
    ) -> None:
        found = [adapter] if adapter is not None else adapters()
        if not found:
            raise ToolchainMissing("no Vulkan device", where=plan["name"], hint=HINT)
        import wgpu

        self.wgpu, self.plan = wgpu, plan
        adapter = found[0]
        self.name = adapter.info["device"]
        wanted = [name for name in ("shader-f16", "timestamp-query") if name in adapter.features]
        if any("enable f16;" in text for text in modules.values()) and "shader-f16" not in wanted:
            raise EdgecError("the device has no float16", where=f"{plan['name']} on {self.name}")
        limits = {name: adapter.limits[name] for name in LIMITS}
        with self._explained("device"):
            self.device = adapter.request_device_sync(required_features=wanted, required_limits=limits)
        # Milliseconds of each launch of the last run, with `profile`.
        self.times: list[float] = []
        self.profile = profile and "timestamp-query" in wanted
        self.buffers = self._allocate(weights)
        self.pipelines = {name: self._pipeline(name, text) for name, text in modules.items()}
        self.launches = [self._launch(launch) for launch in plan["launches"]]
        # The variant of each step.
        self.choices = [0] * len(plan["steps"])

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except self.wgpu.GPUError as error:
            raise EdgecError(f"{what}: {error}", where=f"{self.plan['name']} on {self.name}") from error

    def _allocate(self, weights: bytes) -> list[Any]:
        usage = self.wgpu.BufferUsage
        all_uses = usage.STORAGE | usage.COPY_DST | usage.COPY_SRC

        def new(size: int) -> Any:
            return self.device.create_buffer(size=max(4, -(-size // 4) * 4), usage=all_uses)

        with self._explained("memory"):
            pool = [new(size) for size in self.plan["pool"]]
            buffers = []
            for row in self.plan["buffers"]:
                size = row["bytes"]
                if row["kind"] == "temp":
                    buffers.append(pool[row["slot"]])
                elif row["kind"] == "constant":
                    data = weights[row["offset"] : row["offset"] + size]
                    data += bytes(-len(data) % 4 or (0 if data else 4))
                    buffers.append(self.device.create_buffer_with_data(data=data, usage=usage.STORAGE | usage.COPY_SRC))
                else:
                    buffers.append(new(size))
        return buffers

    def _pipeline(self, name: str, text: str) -> Any:
        with self._explained(f"kernel {name}"):
            module = self.device.create_shader_module(code=text)
            return self.device.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": name})

    def _launch(self, launch: Mapping[str, Any]) -> Any:
        """(pipeline, arguments, groups), or (None, (source, target), bytes) of a copy."""
        if launch["function"] < 0:
            source, target = launch["args"]
            size = -(-self.plan["buffers"][target]["bytes"] // 4) * 4
            return None, (self.buffers[source], self.buffers[target]), size
        name = self.plan["functions"][launch["function"]]
        pipeline = self.pipelines[name]
        entries = [
            {"binding": i, "resource": {"buffer": self.buffers[a], "offset": 0, "size": self.buffers[a].size}}
            for i, a in enumerate(launch["args"])
        ]
        with self._explained(f"arguments of {name}"):
            group = self.device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
        return pipeline, group, tuple(launch["grid"])

    def run(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """One inference: contiguous arrays of the model's inputs, and those that the results are put into."""
        queue = self.device.queue
        for number, array in zip(self.plan["inputs"], inputs, strict=True):
            data = array.tobytes()
            queue.write_buffer(self.buffers[number], 0, data + bytes(-len(data) % 4))
        chosen = [
            made
            for made, x in zip(self.launches, self.plan["launches"], strict=True)
            if x["variant"] == self.choices[x["step"]]
        ]
        with self._explained("run"):
            if self.profile:
                self.times = self._dispatch_timed(chosen)
            else:
                self._dispatch(chosen)
            for number, array in zip(self.plan["outputs"], outputs, strict=True):
                data = queue.read_buffer(self.buffers[number])
                flat = np.frombuffer(data, np.uint8, array.nbytes).view(array.dtype)
                np.copyto(array, flat.reshape(array.shape))

    def _dispatch(self, launches: Sequence[Any]) -> None:
        encoder = self.device.create_command_encoder()
        work = None
        for pipeline, group, size in launches:
            if pipeline is None:
                if work is not None:
                    work.end()
                    work = None
                encoder.copy_buffer_to_buffer(group[0], 0, group[1], 0, size)
                continue
            if work is None:
                work = encoder.begin_compute_pass()
            work.set_pipeline(pipeline)
            work.set_bind_group(0, group)
            work.dispatch_workgroups(*size)
        if work is not None:
            work.end()
        self.device.queue.submit([encoder.finish()])

    def _dispatch_timed(self, launches: Sequence[Any]) -> list[float]:
        """As `_dispatch`, every launch in a pass of its own, between two time stamps: milliseconds of each."""
        usage, count = self.wgpu.BufferUsage, 2 * len(launches)
        stamps = self.device.create_query_set(type="timestamp", count=count)
        result = self.device.create_buffer(size=8 * count, usage=usage.QUERY_RESOLVE | usage.COPY_SRC)
        encoder = self.device.create_command_encoder()
        for number, (pipeline, group, size) in enumerate(launches):
            marks = {
                "query_set": stamps,
                "beginning_of_pass_write_index": 2 * number,
                "end_of_pass_write_index": 2 * number + 1,
            }
            if pipeline is None:
                encoder.begin_compute_pass(timestamp_writes=marks).end()
                encoder.copy_buffer_to_buffer(group[0], 0, group[1], 0, size)
                continue
            work = encoder.begin_compute_pass(timestamp_writes=marks)
            work.set_pipeline(pipeline)
            work.set_bind_group(0, group)
            work.dispatch_workgroups(*size)
            work.end()
        encoder.resolve_query_set(stamps, 0, count, result, 0)
        self.device.queue.submit([encoder.finish()])
        ticks = np.frombuffer(self.device.queue.read_buffer(result), np.uint64).astype(np.int64).reshape(-1, 2)
        return [float(ms) for ms in (ticks[:, 1] - ticks[:, 0]) * TICK_MS]

    def tune(self, repeats: int = 5) -> list[int]:
        """Measure the variants of each step and use the fastest from now on. Needs `profile`; returns the choices."""
        assert self.profile, "times are not measured"
        for step, row in enumerate(self.plan["steps"]):
            times = []
            for variant in range(row["variants"] if row["variants"] > 1 else 0):
                those = [
                    made
                    for made, x in zip(self.launches, self.plan["launches"], strict=True)
                    if (x["step"], x["variant"]) == (step, variant)
                ]
                runs = [self._dispatch_timed(those) for _ in range(repeats)]
                times.append(min(map(sum, runs[1:] or runs)))
            if times:
                self.choices[step] = times.index(min(times))
        return self.choices
