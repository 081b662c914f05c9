"""Compilers, linkers and emulators: finding them, running them, and saying which package provides them."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.cpu.emit import Member
from edgec.targets.device import Device

TIMEOUT = 300
FLAGS = ("-std=c99", "-O2", "-fPIC", "-Wall", "-Wextra")
LINK = ("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,--as-needed", "-s")
# C libraries that Debian's compilers only recommend.
LIBC = {
    "aarch64": "libc6-dev-arm64-cross",
    "arm-none": "libnewlib-arm-none-eabi",
    "arm": "libc6-dev-armhf-cross",
    "riscv64-unknown": "picolibc-riscv64-unknown-elf",
}
NO_LIBC = re.compile(
    r"fatal error: \w+\.h: No such file|cannot find (-lc|-lm|crt1\.o|Scrt1\.o|crti\.o)|cannot read spec file"
)
REASON = re.compile(r"error(?!: ld returned)|undefined|will not fit|overflowed")


def require_toolchain(device: Device) -> None:
    """Raise ToolchainMissing, naming the package, unless compiler, binutils and runner of the device are installed."""
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


def build_library(folder: Path, name: str, device: Device, members: Sequence[Member]) -> None:
    """Compile the emitted files in `folder`, and its `obj/kernel*.o`, into lib<name>.a, lib<name>.so and `runner`.

    Both libraries offer what their members export and nothing else: the parts of a member are linked into one object
    whose other symbols are made local, so any number of models can share a program. The kernels go into the first one.
    All paths are relative to `folder` and no build identifier is written: equal inputs give equal files. Raises
    EdgecError with the compiler's message, OSError when the disk is full.
    """
    parts = sorted(f"obj/{path.name}" for path in (folder / "obj").glob("kernel*.o"))
    files = []
    for member in members:
        objects = [_compile(source, folder, device) for source in member.sources] + parts
        files.append(f"{member.name}.o")
        run_tool([device.cc, *device.cflags, "-r", "-nostdlib", "-o", files[-1], *objects], folder)
        kept = [f"--keep-global-symbol={symbol}" for symbol in member.exports]
        run_tool([binutil(device, "objcopy"), *kept, files[-1]], folder)
        parts = []
    run_tool([binutil(device, "ar"), "rcsD", f"lib{name}.a", *files], folder)
    shared = [device.cc, *device.cflags, "-shared", *LINK, "-Wl,-z,defs", f"-Wl,-soname,lib{name}.so"]
    run_tool([*shared, "-o", f"lib{name}.so", *files, "-lm", "-pthread"], folder)
    static = [] if device.runner == "native" else ["-static"]
    flags = [*device.cflags, *FLAGS, *static, *LINK]
    run_tool([device.cc, *flags, "runner.c", f"lib{name}.a", "-lm", "-pthread", "-o", "runner"], folder)


def _compile(source: str, folder: Path, device: Device) -> str:
    """The object file of a C or assembler source."""
    target = f"obj/{Path(source).stem}.o"
    run_tool([device.cc, *device.cflags, *FLAGS, "-c", source, "-o", target], folder)
    return target


def binutil(device: Device, tool: str) -> str:
    """`ar` or `objcopy` of the compiler's tool chain."""
    return f"{device.cc.removesuffix('gcc')}{tool}" if device.cc.endswith("-gcc") else tool


def _programs(device: Device) -> list[tuple[str, str]]:
    package = device.package.replace("gcc", "binutils", 1) if device.package.startswith("gcc-") else "binutils"
    wanted = [(device.cc, device.package), (binutil(device, "ar"), package), (binutil(device, "objcopy"), package)]
    if device.runner != "native":
        wanted.append((device.runner, device.runner_package or device.runner))
    return wanted


def run_tool(command: Sequence[str], folder: Path) -> None:
    """Run a compiler or another part of a tool chain in `folder`.

    Raises EdgecError with its first error, ToolchainMissing when it or its C library is absent, OSError when the disk
    is full.
    """
    # The compiler's own temporary files go where they are cleaned up; messages are read below.
    environment = {**os.environ, "TMPDIR": str(folder.absolute()), "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EdgecError(f"took more than {TIMEOUT} s", where=command[0]) from error
    except FileNotFoundError as error:
        raise ToolchainMissing(f"'{command[0]}' is not installed", where="tool chain") from error
    if done.returncode == 0:
        return
    text = (done.stderr or done.stdout).strip()
    if "No space left on device" in text:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    if NO_LIBC.search(text):
        package = next((p for prefix, p in LIBC.items() if command[0].startswith(f"{prefix}-")), "libc6-dev")
        raise ToolchainMissing("has no C library", where=command[0], hint=f"apt-get install {package}")
    lines = text.splitlines()
    reason = next((line for line in lines if REASON.search(line)), lines[-1] if lines else "")
    raise EdgecError(f"failed with status {done.returncode}: {reason}", where=f"{command[0]} {command[-1]}")
