"""Compilers, linkers and emulators: finding them, running them, and saying which package provides them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.device import Device

TIMEOUT = 300
# C99 with the GNU extensions that posix_memalign needs in example and runner.
FLAGS = ("-std=gnu99", "-O2", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra")


def require_toolchain(device: Device) -> None:
    """Raise ToolchainMissing, naming the package, unless compiler, archiver and runner of the device are installed."""
    for program, package in _programs(device):
        if shutil.which(program) is None:
            raise ToolchainMissing(
                f"'{program}' is not installed", where=f"target {device.name}", hint=f"apt-get install {package}"
            )


def has_toolchain(device: Device) -> str | None:
    """None when `require_toolchain` would pass, else what is missing."""
    try:
        require_toolchain(device)
    except ToolchainMissing as error:
        return str(error)
    return None


def build_library(folder: Path, name: str, device: Device) -> None:
    """Compile the emitted files in `folder` into lib<name>.a, lib<name>.so and the program `runner`.

    All paths are relative to `folder` and no build identifier is written, so equal inputs give equal files.
    Raises EdgecError with the compiler's message.
    """
    cc = device.cc
    sources = [f"{name}.c", "selftest.c", "weights.S", "selftest_data.S"]
    objects = ["kernels.o"]
    for source in sources:
        out = f"{Path(source).stem}.o"
        _run([cc, *device.cflags, *FLAGS, "-c", source, "-o", out], folder)
        objects.append(out)
    _run([archiver(device), "rcsD", f"lib{name}.a", *objects], folder)
    shared = [cc, *device.cflags, "-shared", "-Wl,--build-id=none", "-Wl,--version-script=exports.map"]
    _run([*shared, f"-Wl,-soname,lib{name}.so", "-s", "-o", f"lib{name}.so", *objects, "-lm"], folder)
    static = [] if device.runner == "native" else ["-static"]
    flags = [*device.cflags, *FLAGS, *static, "-Wl,--build-id=none", "-s"]
    _run([cc, *flags, "runner.c", f"lib{name}.a", "-lm", "-o", "runner"], folder)


def archiver(device: Device) -> str:
    """`ar` of the compiler's tool chain."""
    return f"{device.cc.removesuffix('gcc')}ar" if device.cc.endswith("-gcc") else "ar"


def _programs(device: Device) -> list[tuple[str, str]]:
    wanted = [(device.cc, device.package), (archiver(device), "binutils")]
    if device.runner != "native":
        wanted.append((device.runner, device.runner_package or device.runner))
    return wanted


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise EdgecError(f"took more than {TIMEOUT} s", where=command[0]) from error
    except FileNotFoundError as error:
        raise ToolchainMissing(f"'{command[0]}' is not installed", where="tool chain") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = next((line for line in lines if "error" in line or "No space" in line), lines[-1] if lines else "")
        raise EdgecError(f"failed with status {done.returncode}: {reason}", where=" ".join(command[:1] + [command[-1]]))
