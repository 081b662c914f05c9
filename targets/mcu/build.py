"""The folder of a microcontroller bundle: sources, what they need on the chip, and programs to try them with."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

from edgec.plan import Plan
from edgec.targets.cache import ObjectCache
from edgec.targets.cpu.emit import SelfTest
from edgec.targets.cpu.toolchain import require_toolchain, run_tool
from edgec.targets.device import Device
from edgec.targets.mcu.emit import emit
from edgec.targets.mcu.lower import LoweredC

FLAGS = ("-std=c99", "-O2", "-ffunction-sections", "-fdata-sections", "-Wall", "-Wextra", "-Wpedantic")
HOST = ("-shared", "-fPIC", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s")
# Section flags of ELF: takes memory; is executed; is written to.
ALLOCATED, EXECUTED, WRITTEN = 0x2, 0x4, 0x1


class Sizes(NamedTuple):
    """Bytes of a model's object file on the chip: code, constants, and what is copied to SRAM at the start."""

    code: int
    constants: int
    data: int

    @property
    def flash(self) -> int:
        return self.code + self.constants + self.data


def build(
    plan: Plan, kernels: LoweredC, device: Device, folder: Path, selftest: SelfTest | None, version: str
) -> Sizes:
    """Write the sources to `folder`, and compile them for the device to see that they do and what they take.

    Raises EdgecError when a compiler refuses them, ToolchainMissing without one.
    """
    require_toolchain(device)
    for place, data in emit(plan, kernels, device, selftest, version).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    source, made = f"src/{plan.name}.c", f"{plan.name}.o"
    run_tool([device.cc, *device.cflags, *FLAGS, *specs(device), "-c", source, "-o", made], folder)
    sizes = object_sizes(folder / made)
    (folder / made).unlink()
    return sizes


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


def specs(device: Device) -> tuple[str, ...]:
    """What finds the C library."""
    return ("--specs=picolibc.specs",) if device.triple.startswith("riscv") else ()


def object_sizes(path: Path) -> Sizes:
    """What an object file or a program takes in flash."""
    code = constants = data = 0
    with path.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            flags, size = section["sh_flags"], section["sh_size"]
            if not flags & ALLOCATED or section["sh_type"] == "SHT_NOBITS" or section["sh_type"] in ("SHT_ARM_EXIDX",):
                continue
            if flags & EXECUTED:
                code += size
            elif flags & WRITTEN:
                data += size
            else:
                constants += size
    return Sizes(code, constants, data)
