"""The device table: what code generation, tool chain and runner need to know about one compile target."""

from __future__ import annotations

import difflib
import functools
import platform
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from edgec.errors import EdgecError


@dataclass(frozen=True)
class Device:
    """One row of `devices.toml`.

    triple, mcpu, features: what LLVM is given. vector_bytes: SIMD register width in bytes; registers: how many.
    l1_kb, l2_kb: data caches in KiB. runner: "native", "qemu-aarch64" or "qemu-arm"; qemu_cpu: its `-cpu`.
    cc: C compiler of the tool chain; cflags: architecture flags for it. package, runner_package: Debian packages that
    provide them. requant: rounding of integer requantisation (RQ1: one rounding, half up).
    """

    name: str
    summary: str
    family: str
    triple: str
    mcpu: str
    cc: str
    runner: str
    vector_bytes: int
    registers: int
    features: tuple[str, ...] = ()
    cflags: tuple[str, ...] = ()
    float_abi: str | None = None
    qemu_cpu: str | None = None
    package: str = "gcc"
    runner_package: str | None = None
    l1_kb: int = 32
    l2_kb: int = 512
    requant: str = "RQ1"
    has_dot: bool = False
    has_i8mm: bool = False
    has_fp16: bool = False

    def llvm_target(self) -> dict[str, Any]:
        """The target description for TVM."""
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu}
        if self.features:
            target["mattr"] = list(self.features)
        if self.float_abi:
            target["mfloat-abi"] = self.float_abi
        return target

    @property
    def lanes(self) -> int:
        """32-bit elements in one SIMD register."""
        return self.vector_bytes // 4


def device_names() -> list[str]:
    """Names of the built-in devices, in the order of the table."""
    return list(_table())


def load_device(name: str) -> Device:
    """The built-in device `name`. Raises EdgecError for a name that is not in the table."""
    table = _table()
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(table)}"
        raise EdgecError(f"unknown target '{name}'", where="--target", hint=hint)
    row = dict(table[name])
    if name == "host":
        row.update(_host())
    for key in ("features", "cflags"):
        row[key] = tuple(row.get(key, ()))
    return Device(name=name, **row)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("edgec.targets").joinpath("devices.toml").read_text())


@functools.cache
def _host() -> dict[str, Any]:
    """Vector width and CPU name of the machine we run on, from its own feature flags."""
    machine = platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
    except OSError:
        flags = set()
    if machine in ("aarch64", "arm64"):
        return {"triple": "aarch64-linux-gnu", "mcpu": "generic", "vector_bytes": 16, "registers": 32}
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"} <= flags:
        return {"triple": "x86_64-linux-gnu", "mcpu": "x86-64-v4", "vector_bytes": 64, "registers": 32}
    if {"avx2", "fma"} <= flags:
        return {"triple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "vector_bytes": 32, "registers": 16}
    return {"triple": "x86_64-linux-gnu", "mcpu": "x86-64-v2", "vector_bytes": 16, "registers": 16}
