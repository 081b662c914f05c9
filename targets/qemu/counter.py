"""Exact instruction counts of emulated code, by function and by address.

QEMU, which emulates a process or a whole board, runs the program with a plugin of ours (`insn_count.c`) that notes how
often each block of guest code ran between a function's entry and its return. The same code and data always give the
same counts.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.cpu.runner import command_prefix, execute, run_samples
from edgec.targets.cpu.toolchain import require_toolchain
from edgec.targets.device import Device

if TYPE_CHECKING:
    from edgec.bundle import Bundle

SOURCE = "insn_count.c"
VENEER = "call it directly: no tail call, no linker's veneer"


@dataclass(frozen=True)
class Block:
    """Guest code that runs from its first to its last instruction. address, nbytes: where it lies."""

    address: int
    nbytes: int
    instructions: int
    executions: int


class Reading(NamedTuple):
    """Instructions from a mark to the next, or to the end of the call. call: from 1. mark: -1 before the first."""

    call: int
    mark: int
    instructions: int


@dataclass(frozen=True)
class Profile:
    """What ran of the ELF file `program`.

    calls: how often the counted function was entered. readings: in the order of time, see `marks`.
    """

    program: Path
    blocks: tuple[Block, ...]
    calls: int
    readings: tuple[Reading, ...] = ()

    @functools.cached_property
    def by_mark(self) -> dict[int, int]:
        """Instructions from each mark to whatever mark or return came next, all calls together; -1: before any."""
        found: dict[int, int] = {}
        for reading in self.readings:
            found[reading.mark] = found.get(reading.mark, 0) + reading.instructions
        return found

    @property
    def total(self) -> int:
        """Instructions executed, all calls together."""
        return sum(b.instructions * b.executions for b in self.blocks)

    @functools.cached_property
    def by_symbol(self) -> dict[str, int]:
        """Instructions executed in each function, most first."""
        names = Symbols(self.program)
        found: dict[str, int] = {}
        for block in self.blocks:
            name = names.at(block.address)
            found[name] = found.get(name, 0) + block.instructions * block.executions
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def executions(self, address: int) -> int:
        """How often the instruction at `address` ran."""
        places, counts = self._steps
        return counts[bisect.bisect_right(places, address)]

    @functools.cached_property
    def _steps(self) -> tuple[list[int], list[int]]:
        """Addresses where the number of executions changes, and the numbers before, between and behind them."""
        change: dict[int, int] = {}
        for b in self.blocks:
            change[b.address] = change.get(b.address, 0) + b.executions
            change[b.address + b.nbytes] = change.get(b.address + b.nbytes, 0) - b.executions
        places = sorted(change)
        return places, [0, *itertools.accumulate(change[p] for p in places)]


class Symbols:
    """The functions of an ELF file."""

    def __init__(self, program: Path) -> None:
        from elftools.elf.elffile import ELFFile
        from elftools.elf.sections import SymbolTableSection

        with program.open("rb") as file:
            elf = ELFFile(file)
            # Bit 0 of an Arm function's address says that it is Thumb code.
            mask = ~1 if elf["e_machine"] == "EM_ARM" else ~0
            # Linkage tables have no symbols; they go by the names of their sections.
            found = {s["sh_addr"]: s.name for s in elf.iter_sections() if s["sh_addr"]}
            functions: dict[int, str] = {}
            for section in elf.iter_sections():
                for symbol in section.iter_symbols() if isinstance(section, SymbolTableSection) else ():
                    kind = symbol["st_info"]["type"]
                    if kind in ("STT_FUNC", "STT_GNU_IFUNC") and symbol["st_shndx"] != "SHN_UNDEF":
                        address = symbol["st_value"] & mask
                        # Of several names the plainest: exp rather than __exp_finite.
                        functions[address] = min(symbol.name, functions.get(address, symbol.name), key=_plainness)
        found.update(functions)
        self.addresses = sorted(found)
        self.names = [found[a] for a in self.addresses]

    def at(self, address: int) -> str:
        """The function that holds `address`: the last that starts at or before it, or a section without functions."""
        place = bisect.bisect_right(self.addresses, address)
        return self.names[place - 1] if place else "?"

    def address(self, name: str) -> int:
        """Where a function starts. Raises EdgecError when there is none of that name."""
        if name not in self.names:
            raise EdgecError(f"has no function '{name}'", where="counted program")
        return self.addresses[self.names.index(name)]


def _plainness(name: str) -> tuple[int, int, str]:
    return len(name) - len(name.lstrip("_")), len(name), name


def count(bundle: Bundle, inputs: Sequence[np.ndarray], device: Device) -> tuple[int, dict[str, int]]:
    """Instructions of one inference, in all and by function (kernels, the C library's, the model's own).

    inputs: one array for each input of the model, with its shape. device: what the bundle was compiled for; one that
    runs in QEMU. Raises EdgecError for other devices and inputs, ToolchainMissing without compiler or emulator.
    """
    with tempfile.TemporaryDirectory(prefix="edgec-count-") as folder:
        profile = profile_bundle(bundle, inputs, device, Path(folder))
        return profile.total, dict(profile.by_symbol)


def profile_bundle(bundle: Bundle, inputs: Sequence[np.ndarray], device: Device, folder: Path) -> Profile:
    """`count` with the counts of every address; the program stays in `folder`."""
    name, root = bundle.name, bundle.path.absolute()
    specs = bundle.manifest["inputs"]
    arrays = [np.ascontiguousarray(a, np.dtype(s["dtype"])) for a, s in zip(inputs, specs, strict=True)]
    for array, spec in zip(arrays, specs, strict=True):
        if array.shape != tuple(spec["shape"]):
            expected = ", ".join(map(str, spec["shape"]))
            raise EdgecError(
                f"has shape {array.shape}, expected ({expected})", where=f"input '{spec['name']}' of bundle {name}"
            )
    # The bundle's own runner has no symbols any more.
    sources = [f"-I{root}/include", f"{root}/src/runner.c", f"{root}/lib/lib{name}.a", "-lm"]
    program = link(sources, device, folder / name)
    report = folder / f"{name}.counts"
    prefix = emulator(device, report, start=Symbols(program).address(f"{name}_run"))
    outputs = [(tuple(o["shape"]), o["dtype"]) for o in bundle.manifest["outputs"]]
    run_samples(program, prefix, [a[None] for a in arrays], outputs, device.runner_package)
    return read_report(report, program)


def profile_program(program: Path, function: str, device: Device, folder: Path) -> Profile:
    """Run `program`, which takes no arguments, and count from entry to return of `function`.

    Raises EdgecError when the program fails.
    """
    report = folder / f"{program.name}.counts"
    prefix = emulator(device, report, start=Symbols(program).address(function))
    status, text = execute([*prefix, str(program.absolute())], device.runner_package)
    if status:
        raise EdgecError(f"ended with status {status}: {text}", where=program.name)
    return read_report(report, program)


def link(arguments: Sequence[str], device: Device, program: Path) -> Path:
    """Build a static program that keeps its symbols. Raises EdgecError, ToolchainMissing."""
    require_toolchain(device)
    command = [device.cc, *device.cflags, "-std=c99", "-O1", "-static", *arguments, "-o", str(program)]
    status, text = execute(command, device.package)
    if status:
        raise EdgecError(f"failed with status {status}: {text}", where=device.cc)
    return program


def emulator(device: Device, report: Path, start: int | None) -> list[str]:
    """What goes before a program: the emulator, counting into `report` from entry to return of the code at `start`.

    With None it counts the whole program, start-up included. Raises EdgecError for a device that has no emulator,
    ToolchainMissing when it is not installed.
    """
    if device.runner == "native":
        raise EdgecError("has no emulator that counts", where=f"target {device.name}", hint="use valgrind on this one")
    return [*command_prefix(device.runner, device.qemu_cpu), *plugin_options(device, report, start)]


def plugin_options(device: Device, report: Path, start: int | None, marks: Sequence[tuple[int, int]] = ()) -> list[str]:
    """QEMU's options for counting into `report`. marks: (address, number), see `marks`; they lie beside `report`."""
    plugin = build_plugin(device.runner, device.runner_package)
    # A comma separates options; two of them stand for one.
    options = f"{_quoted(plugin)},out={_quoted(report)}" + ("" if start is None else f",start={start:#x}")
    if marks:
        table = report.with_name(f"{report.name}.marks")
        table.write_text("".join(f"{address} {number}\n" for address, number in marks))
        options += f",marks={_quoted(table)}"
    return ["-plugin", options]


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace(",", ",,")


def marks(program: Path) -> list[tuple[int, int]]:
    """(address, number) of the places in the code that EDGEC_MARK marked: section `.edgec_marks` of an ELF file."""
    from elftools.elf.elffile import ELFFile

    with program.open("rb") as file:
        elf = ELFFile(file)
        section = elf.get_section_by_name(".edgec_marks")
        data = section.data() if section is not None else b""
        mask = ~1 if elf["e_machine"] == "EM_ARM" else ~0
        pairs = struct.iter_unpack("<Ii", data)
        return [(address & mask, number) for address, number in pairs]


def read_report(report: Path, program: Path, *, whole: bool = False) -> Profile:
    """What the plugin wrote. whole: no function was named. Raises EdgecError when it is incomplete or without calls."""
    try:
        *rows, end = [line.split() for line in report.read_text().splitlines()]
        readings = tuple(Reading(*map(int, row[1:])) for row in rows if row[0] == "reading")
        counts = [row for row in rows if row[0] != "reading"]
        blocks = tuple(Block(*map(int, row)) for row in sorted(counts, key=lambda row: int(row[0])))
        word, calls, active, stop = end
    except (OSError, ValueError) as error:
        raise EdgecError("has no complete instruction counts", where=program.name) from error
    if word != "end" or (not whole and (active != "0" or calls == "0")):
        what = "was never called" if calls == "0" else "did not return behind its call"
        raise EdgecError(f"counted function {what}", where=program.name, hint=VENEER)
    if not whole and not _follows_call(program, int(stop)):
        raise EdgecError("counted function was jumped to, not called", where=program.name, hint=VENEER)
    return Profile(program, blocks, int(calls), readings)


def _follows_call(program: Path, address: int) -> bool:
    """Whether the instruction in front of `address` is a call: only then is that where a function returns to."""
    from elftools.elf.elffile import ELFFile

    with program.open("rb") as file:
        elf = ELFFile(file)
        offset = next(iter(elf.address_offsets(address - 4, 4)), None)
        if offset is None:
            return False
        file.seek(offset)
        data = file.read(4)
    word = int.from_bytes(data, "little")
    first, second = word & 0xFFFF, word >> 16
    if elf["e_machine"] == "EM_AARCH64":
        return word >> 26 == 0b100101 or word & 0xFFFFFC1F == 0xD63F0000
    if elf["e_machine"] == "EM_RISCV":
        # jal and jalr that link in ra, and their compressed forms (c.jal of RV32, c.jalr).
        long = word & 0xFFF in (0x0EF, 0x0E7)
        return long or second & 0xE003 == 0x2001 or (second & 0xF07F == 0x9002 and second & 0xF80 != 0)
    arm = (word >> 25 & 7 == 0b101 and (word >> 24 & 1 or word >> 28 == 15)) or word & 0x0FFFFFF0 == 0x012FFF30
    thumb = (first & 0xF800 == 0xF000 and second & 0xC000 == 0xC000) or second & 0xFF87 == 0x4780
    return bool(arm or thumb)


def build_plugin(runner: str = "qemu-aarch64", package: str | None = None) -> Path:
    """The counting plugin, compiled for this machine on first use and kept in the user's cache folder.

    Raises ToolchainMissing without C compiler or emulator, EdgecError when the emulator cannot load plugins.
    """
    version = _plugin_version(runner, package)
    source = resources.files("edgec.targets.qemu").joinpath(SOURCE).read_bytes()
    digest = hashlib.sha256(source + str(version).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgec"
    target = folder / f"insn_count-{digest}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / SOURCE).write_bytes(source)
            made = Path(work) / target.name
            flags = ["-std=c99", "-D_POSIX_C_SOURCE=200809L", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
            command = ["cc", *flags, f"-DPLUGIN_VERSION={version}", str(Path(work) / SOURCE), "-o", str(made)]
            status, text = execute(command, "gcc")
            if status:
                raise EdgecError(f"failed with status {status}: {text}", where="cc insn_count.c")
            made.replace(target)
    except OSError as error:
        raise EdgecError(
            f"cannot be written: {error.strerror}", where=str(folder), hint="set XDG_CACHE_HOME"
        ) from error
    return target


@functools.cache
def _plugin_version(runner: str, package: str | None) -> int:
    """The version of the plugin API to declare: QEMU refuses one that is older or newer than it supports."""
    try:
        done = subprocess.run([runner, "--version"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ToolchainMissing(
            f"'{runner}' is not installed", where="instruction counter", hint=f"apt-get install {package or runner}"
        ) from error
    found = re.search(r"version (\d+)\.", done.stdout)
    if found is None or int(found[1]) < 6:
        raise EdgecError("is too old to count instructions", where=runner, hint="QEMU 6.0 or later has plugins")
    return 1 if int(found[1]) < 9 else 2
