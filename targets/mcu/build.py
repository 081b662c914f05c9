"""The folder of a microcontroller bundle: sources, what they need on the chip, and programs to try them with."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path

from edgec.plan import Plan
from edgec.targets.cache import ObjectCache
from edgec.targets.cpu.emit import SelfTest
from edgec.targets.cpu.toolchain import require_toolchain, run_tool
from edgec.targets.device import Device
from edgec.targets.mcu.emit import emit
from edgec.targets.mcu.lower import LoweredC
from edgec.targets.mcu.runner import Tensor, build_runner, flash_bytes

FLAGS = ("-std=c99", "-O2", "-ffunction-sections", "-fdata-sections", "-Wall", "-Wextra", "-Wpedantic")
HOST = ("-shared", "-fPIC", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s")


def build(plan: Plan, kernels: LoweredC, device: Device, folder: Path, selftest: SelfTest | None, version: str) -> int:
    """Write the sources to `folder`, and make of them a program for QEMU; returns the bytes of flash that a model adds.

    Raises EdgecError when a compiler refuses them, ToolchainMissing without one.
    """
    require_toolchain(device)
    for place, data in emit(plan, kernels, device, selftest, version).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    inputs, outputs = ([Tensor(p.shape, p.dtype) for p in ports] for ports in (plan.inputs, plan.outputs))
    build_runner(folder, plan.name, inputs, outputs, selftest is not None, device)
    return flash_bytes(folder, plan.name, inputs, outputs, device)


def host_library(bundle: Path, name: str, *, cache: ObjectCache | None = None) -> bytes:
    """The model of a bundle as a shared library of this machine, whose portable C gives what the chip gives.

    Compiled on first use and kept with other compiled code of the user. Raises EdgecError, ToolchainMissing.
    """
    store = ObjectCache.of_user() if cache is None else cache
    digest = hashlib.sha256(json.dumps([*FLAGS, *HOST, platform.machine()]).encode())
    for path in sorted((bundle / "src").glob("*.[ch]")):
        digest.update(path.read_bytes())
    key = digest.hexdigest()
    library = store.get(key)
    if library is None:
        with tempfile.TemporaryDirectory(prefix="edgec-host-") as work:
            shutil.copytree(bundle / "src", Path(work) / "src")
            made = Path(work) / "model.so"
            run_tool(["cc", *FLAGS, *HOST, f"src/{name}.c", "-o", made.name, "-lm"], Path(work))
            library = made.read_bytes()
        store.put(key, library)
        store.trim()
    return library
