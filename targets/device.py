"""The device table: what code generation, tool chain and runner need to know about one compile target."""

from __future__ import annotations

import difflib
import functools
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.targets.kernels.conv2d import Blocking

CPUINFO = Path("/proc/cpuinfo")
_V2 = frozenset(["cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
# Levels of the x86-64 psABI, best first: LLVM name, Linux names of the features, vector bytes, vector registers.
X86_LEVELS = (
    ("x86-64-v4", _V4, 64, 32),
    ("x86-64-v3", _V3, 32, 16),
    ("x86-64-v2", _V2, 16, 16),
    ("x86-64", frozenset(), 16, 16),
)


@dataclass(frozen=True)
class Device:
    """One row of `devices.toml`.

    triple, mcpu, features: what LLVM is given. vector_bytes: SIMD register width in bytes; registers: how many.
    l1_kb, l2_kb: data caches in KiB. runner: "native", "qemu-aarch64" or "qemu-arm"; qemu_cpu: its `-cpu`.
    cc: C compiler of the tool chain; cflags: architecture flags for it. package, runner_package: Debian packages that
    provide them. requant: how int8 layers round here, see `edgec.integer`: RQF
    on cores whose vector units follow IEEE 754, RQ1 (integers only) on all others. tuning: measured register tiles by
    `tuning_key` of a kernel, which go before modelled ones (see `edgec.tune`); no property of the device.
    Microcontrollers (family "mcu"): isa is "c" (portable C), "dsp" or "mve" (with "dsp"); core: the row of the core,
    for a board; flash_kb, sram_kb: memory in KiB, None for a core, which has as much as its maker gave it; machine:
    QEMU's `-M`.
    GPUs (family "gpu"): api is "opencl", "vulkan" (WGSL) or "metal"; work_group: most work items of a group, and
    warp: how many of them go together; vector: 32-bit elements that one item loads and computes at a time; local_kb:
    memory of a group in KiB that is not the cache under another name, 0 for none; images: whether weights are read
    faster as images; dot: extension that multiplies four int8 pairs and adds, "" for none, "arm", "khr", "qcom";
    gflops, gbps: peak float32 arithmetic and memory bandwidth as published, for estimates. vector_bytes and registers
    are those of one work item, in which templates without GPU kernel are scalar code.
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
    has_vnni: bool = False
    isa: str = ""
    core: str = ""
    flash_kb: int | None = None
    sram_kb: int | None = None
    machine: str = ""
    api: str = ""
    work_group: int = 256
    warp: int = 1
    vector: int = 4
    local_kb: int = 0
    images: bool = False
    dot: str = ""
    gflops: float = 0.0
    gbps: float = 0.0
    tuning: Mapping[str, Blocking] = field(default_factory=dict, repr=False, compare=False)

    def tvm_target(self) -> dict[str, Any]:
        """The target description for TVM: LLVM, C for a microcontroller, or the language of a GPU."""
        if self.is_mcu:
            return {"kind": "c"}
        if self.is_gpu:
            kind = {"opencl": "opencl", "vulkan": "webgpu", "metal": "metal"}[self.api]
            # TVM knows no other limit for WGSL than the one that every implementation has.
            limits = {} if kind == "webgpu" else {"max_threads_per_block": self.work_group}
            return {"kind": kind, "max_num_threads": self.work_group, **limits}
        target: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu}
        if self.features:
            target["mattr"] = list(self.features)
        if self.float_abi:
            target["mfloat-abi"] = self.float_abi
        return target

    @property
    def is_mcu(self) -> bool:
        return self.family == "mcu"

    @property
    def is_gpu(self) -> bool:
        return self.family == "gpu"

    @property
    def is_arm32(self) -> bool:
        """Whether the code is 32-bit Arm with NEON."""
        return self.triple.startswith("armv7")

    @property
    def is_arm64(self) -> bool:
        """Whether the code is 64-bit Arm."""
        return self.triple.startswith("aarch64")

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith("x86_64")

    @property
    def lanes(self) -> int:
        """32-bit elements in one SIMD register."""
        return self.vector_bytes // 4

    def lanes_of(self, dtype: str) -> int:
        """Sums in one SIMD register when elements of `dtype` are added: bytes are summed in 32 bits.

        Raises EdgecError for float16 on a core that does not compute in it.
        """
        if dtype == "float16" and not self.has_fp16:
            raise EdgecError("has no float16 arithmetic", where=f"target {self.name}", hint="compile it in float32")
        return self.vector_bytes // 2 if dtype == "float16" else self.lanes


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
    if "core" in row:
        row = {**table[row["core"]], **row}
    if name == "host":
        row.update(host_row())
    for key in ("features", "cflags"):
        row[key] = tuple(row.get(key, ()))
    return Device(name=name, **row)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("edgec.targets").joinpath("devices.toml").read_text())


@functools.cache
def host_row() -> dict[str, Any]:
    """CPU name, vector width and registers of the machine we run on, from its own feature flags.

    Raises EdgecError on a machine that is neither x86-64 nor 64-bit Arm.
    """
    machine = platform.machine()
    if machine in ("aarch64", "arm64"):
        return {"triple": "aarch64-unknown-linux-gnu", "mcpu": "generic", "vector_bytes": 16, "registers": 32}
    if machine != "x86_64":
        raise EdgecError(f"no settings for a {machine} machine", where="--target host", hint="name a device instead")
    flags = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    mcpu, _, vector_bytes, registers = next(level for level in X86_LEVELS if level[1] <= flags)
    row = {"triple": "x86_64-unknown-linux-gnu", "mcpu": mcpu, "vector_bytes": vector_bytes, "registers": registers}
    if mcpu == "x86-64-v4" and "avx512_vnni" in flags:
        row |= {"features": ("+avx512vnni",), "has_vnni": True}
    return row
