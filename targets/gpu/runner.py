"""Run the GPU bundles that `edgec.targets.gpu.emit` writes, on a device of this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.cache import ObjectCache
from edgec.targets.cpu.runner import execute
from edgec.targets.cpu.toolchain import run_tool
from edgec.targets.gpu.emit import PLAN, PROGRAM, WEIGHTS
from edgec.targets.gpu.opencl import OpenCLRunner
from edgec.targets.gpu.opencl import devices as opencl_devices
from edgec.targets.gpu.vulkan import VulkanRunner, adapters

FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Iinclude")
LIBRARIES = ("-lOpenCL",)


def require_device(api: str) -> None:
    """Raise ToolchainMissing, naming the package, unless this machine runs bundles of an API; none is needed for
    "metal", which nothing here runs."""
    if api == "opencl" and not opencl_devices():
        raise ToolchainMissing("no OpenCL device", where="target", hint="apt-get install pocl-opencl-icd")
    if api == "vulkan" and not adapters():
        raise ToolchainMissing("no Vulkan device", where="target", hint="apt-get install mesa-vulkan-drivers")


def has_device(api: str) -> str | None:
    """None when `require_device` would pass, else what is missing."""
    try:
        require_device(api)
    except ToolchainMissing as error:
        return str(error)
    return None


def open_runner(bundle: Path, api: str, *, profile: bool = False, split: bool = False) -> Any:
    """The runner of the bundle in a folder: see `OpenCLRunner` and `VulkanRunner`. split: of the former.

    Raises EdgecError for a Metal bundle, and what the runners raise.
    """
    if api == "metal":
        raise EdgecError(
            "holds Metal source, which is not compiled or run here",
            where=f"bundle {bundle.name}",
            hint="compile for vulkan: wgpu runs its kernels on Apple's GPUs too",
        )
    plan = json.loads((bundle / PLAN).read_text())
    weights = (bundle / WEIGHTS).read_bytes()
    if api == "opencl":
        return OpenCLRunner(plan, (bundle / PROGRAM).read_text(), weights, profile=profile, split=split)
    modules = {name: (bundle / "kernels" / f"{name}.wgsl").read_text() for name in plan["functions"]}
    return VulkanRunner(plan, modules, weights, profile=profile)


def run_samples(
    runner: Any, inputs: Sequence[np.ndarray], results: Sequence[tuple[tuple[int, ...], str]]
) -> tuple[np.ndarray, ...]:
    """inputs: arrays [runs, *shape]; results: (shape, dtype) of each output. One array [runs, *shape] each."""
    count = len(inputs[0])
    outputs = tuple(np.empty((count, *shape), dtype) for shape, dtype in results)
    for i in range(count):
        # A slice of no axes would be a number.
        runner.run([np.ascontiguousarray(a[i]) for a in inputs], [o[i, ...] for o in outputs])
    return outputs


def program_of(bundle: Path, name: str, *, cache: ObjectCache | None = None) -> bytes:
    """The C host of an OpenCL bundle and its runner as a program of this machine.

    Compiled on first use and kept with other compiled code of the user. Raises EdgecError; ToolchainMissing without a
    compiler, OpenCL's headers or its library.
    """
    store = ObjectCache.of_user() if cache is None else cache
    digest = hashlib.sha256(json.dumps([*FLAGS, *LIBRARIES]).encode())
    sources = [bundle / "include" / f"{name}.h", bundle / "src" / f"{name}.c", bundle / "src" / "runner.c"]
    for path in sources:
        digest.update(path.read_bytes())
    key = digest.hexdigest()
    program = store.get(key)
    if program is None:
        with tempfile.TemporaryDirectory(prefix="edgec-host-") as work:
            for folder in ("include", "src"):
                shutil.copytree(bundle / folder, Path(work) / folder)
            command = ["cc", *FLAGS, f"src/{name}.c", "src/runner.c", *LIBRARIES, "-o", "runner"]
            try:
                run_tool(command, Path(work))
            except EdgecError as error:
                if "CL/cl.h" in str(error) or "-lOpenCL" in str(error):
                    raise ToolchainMissing(
                        "OpenCL's headers or library are not installed",
                        where="cc",
                        hint="apt-get install ocl-icd-opencl-dev opencl-headers",
                    ) from error
                raise
            program = (Path(work) / "runner").read_bytes()
        store.put(key, program)
        store.trim()
    return program


def host_selftest(bundle: Path, name: str) -> bool:
    """Run the self-test by the bundle's own C host. Raises EdgecError when the host does not run to its end,
    ToolchainMissing as `program_of`."""
    with tempfile.TemporaryDirectory(prefix="edgec-runner-") as work:
        program = Path(work) / "runner"
        program.write_bytes(program_of(bundle, name))
        program.chmod(0o755)
        status, text = execute([str(program), "--folder", str(bundle.absolute()), "--selftest"], None)
    if status not in (0, 3):
        raise EdgecError(f"ended with status {status}: {text}", where=f"self-test of bundle {name}")
    return status == 0
