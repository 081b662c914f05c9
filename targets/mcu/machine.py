"""Programs for microcontrollers on QEMU's boards: linking, running by semihosting, counting.

A program is C: its sources, `semihost.c` and the start-up code of the core. QEMU's boards have more memory than the
chips; whether a model fits its chip is decided when it is compiled. Instruction counts are exact and always the same,
and say nothing of cycles: QEMU has no model of those.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.cpu.toolchain import require_toolchain, run_tool
from edgec.targets.device import Device
from edgec.targets.qemu import counter
from edgec.targets.templates import render

# Seconds that one run may take.
TIMEOUT = 600
STACK_BYTES = 64 << 10
FLAGS = ("-std=c99", "-O2", "-ffunction-sections", "-fdata-sections")
# SEMIHOST_FAULT of semihost.h.
FAULT = 125
RUNTIME = ("semihost.h", "semihost.c", "marks.h")


@dataclass(frozen=True)
class Board:
    """Memory of one of QEMU's boards as (address, bytes).

    code: where the core starts. ram: stack and data. flash: the constants, where the code's memory is small. mhz: of
    the core's clock in QEMU, which does not say how fast it is; 0 where the clock counts instructions.
    """

    code: tuple[int, int]
    ram: tuple[int, int]
    flash: tuple[int, int] | None = None
    mhz: int = 0
    options: tuple[str, ...] = ()


# From QEMU's hw/arm/mps2.c and mps2-tz.c, whose addresses are those of the secure state in which the core starts, and
# hw/riscv/virt.c. Constants lie in the boards' PSRAM and DDR: code memory is too small for a large model.
BOARDS = {
    "mps2-an385": Board((0x00000000, 4 << 20), (0x20000000, 4 << 20), (0x21000000, 16 << 20), 25),
    "mps2-an386": Board((0x00000000, 4 << 20), (0x20000000, 4 << 20), (0x21000000, 16 << 20), 25),
    "mps2-an500": Board((0x00000000, 4 << 20), (0x20000000, 4 << 20), (0x60000000, 16 << 20), 25),
    "mps2-an505": Board((0x10000000, 4 << 20), (0x38000000, 4 << 20), (0x80000000, 16 << 20), 20),
    "mps3-an547": Board((0x00000000, 512 << 10), (0x31000000, 4 << 20), (0x70000000, 64 << 20), 32),
    "virt": Board((0x80000000, 64 << 20), (0x84000000, 64 << 20), options=("-bios", "none")),
}


class Run(NamedTuple):
    """How a program ended, and what it printed."""

    status: int
    text: str


def board(device: Device) -> Board:
    """The board that runs code for `device`. Raises EdgecError when there is none."""
    if device.machine not in BOARDS:
        raise EdgecError("has no board in QEMU", where=f"target {device.name}")
    return BOARDS[device.machine]


def build_program(
    sources: Sequence[Path],
    device: Device,
    folder: Path,
    *,
    name: str,
    flags: Sequence[str] = (),
    stack_bytes: int = STACK_BYTES,
) -> Path:
    """Compile and link C and assembler sources with the start-up code: `folder`/`name`.elf, with its symbols.

    sources may include `semihost.h`; `main(void)` gives the exit status. flags: further ones for the compiler, like
    -I and -D. `folder` exists and receives the runtime's sources too. C library: newlib, on RISC-V picolibc. Raises
    EdgecError with the compiler's message, ToolchainMissing with the package.
    """
    require_toolchain(device)
    start = f"start_{_core(device)}.c"
    for file in (*RUNTIME, start):
        (folder / file).write_bytes(_template(file))
    script = f"{name}.ld"
    (folder / script).write_text(linker_script(device, stack_bytes))
    program = folder / f"{name}.elf"
    library = ("--specs=picolibc.specs",) if _core(device) == "riscv" else ()
    command = [device.cc, *device.cflags, *library, *FLAGS, f"-I{folder.absolute()}", *flags]
    command += [str(p.absolute()) for p in sources]
    command += ["semihost.c", start, "-nostartfiles", "-T", script, "-Wl,--gc-sections,--build-id=none"]
    run_tool([*command, "-lm", "-o", program.name], folder)
    return program


def linker_script(device: Device, stack_bytes: int = STACK_BYTES) -> str:
    """The linker script of a device's board. stack_bytes: a multiple of 16."""
    memory = board(device)
    return render(
        "edgec.targets.mcu",
        "program.ld.jinja",
        board=device.machine,
        code=memory.code,
        flash=memory.flash,
        ram=memory.ram,
        stack_bytes=-(-stack_bytes // 16) * 16,
    )


def run_program(
    elf: Path,
    device: Device,
    arguments: Sequence[str] = (),
    cwd: Path | None = None,
    *,
    counts: Path | None = None,
    function: str = "main",
    clocked: bool = False,
    timeout: float = TIMEOUT,
) -> Run:
    """Run a program of `build_program` on the device's board.

    arguments: words without spaces. cwd: the folder in which the program finds its files. counts: where the counter
    writes what ran from entry to return of `function`; `counter.read_report` reads it. clocked: `semihost_clock`
    follows the instructions, see `instructions_per_tick`. Raises EdgecError when the program faults, with reason and
    place, when it takes more than `timeout` seconds, and for what else QEMU complains of; ToolchainMissing when QEMU
    or, for counts, the host's compiler is not installed.
    """
    memory = board(device)
    words = [elf.name, *arguments]
    if any(not w or re.search(r"\s", w) for w in words):
        raise EdgecError("has words with spaces", where=f"command line of {elf.name}", hint="use names without")
    # A comma separates options; two of them stand for one.
    semihosting = "".join(f",arg={w.replace(',', ',,')}" for w in words)
    command = [
        device.runner,
        "-M",
        device.machine,
        *memory.options,
        "-nographic",
        "-monitor",
        "none",
        "-serial",
        "none",
    ]
    command += ["-semihosting-config", f"enable=on,target=native{semihosting}", "-kernel", str(elf.absolute())]
    if clocked:
        command += ["-icount", "shift=0"]
    if counts is not None:
        address = counter.Symbols(elf).address(function)
        command += counter.plugin_options(device, counts, address, counter.marks(elf))
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EdgecError(f"took more than {timeout:g} s", where=f"{elf.name} on {device.machine}") from error
    except FileNotFoundError as error:
        raise ToolchainMissing(
            f"'{device.runner}' is not installed",
            where=f"target {device.name}",
            hint=f"apt-get install {device.runner_package}",
        ) from error
    where = f"{elf.name} on {device.machine}"
    if done.returncode == FAULT:
        raise EdgecError(_fault(done.stdout, elf), where=where)
    if done.returncode < 0 or (done.returncode and "qemu" in done.stderr):
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise EdgecError(f"{device.runner} ended with status {done.returncode}: {lines[-1]}", where=where)
    return Run(done.returncode, done.stdout)


def instructions_per_tick(device: Device) -> float:
    """Of `semihost_clock` in a clocked run: QEMU lets an instruction take 1 ns then."""
    return 1000 / board(device).mhz if board(device).mhz else 1.0


def count_program(
    elf: Path, device: Device, arguments: Sequence[str] = (), cwd: Path | None = None, *, function: str = "main"
) -> counter.Profile:
    """`run_program` with exact instruction counts of `function`. Raises EdgecError for an exit status too."""
    report = elf.with_suffix(".counts")
    done = run_program(elf, device, arguments, cwd, counts=report, function=function)
    if done.status:
        lines = done.text.strip().splitlines() or ["no message"]
        raise EdgecError(f"ended with status {done.status}: {lines[-1]}", where=f"{elf.name} on {device.machine}")
    return counter.read_report(report, elf)


def _core(device: Device) -> str:
    return "riscv" if device.triple.startswith("riscv") else "arm"


@functools.cache
def _template(name: str) -> bytes:
    return resources.files("edgec.targets.mcu").joinpath("templates", name).read_bytes()


def _fault(text: str, elf: Path) -> str:
    """The fault handler's line, with the name of the function if it was in one."""
    line = next((line for line in reversed(text.splitlines()) if line.startswith("fault: ")), "fault: no message")
    found = re.search(r"pc (0x[0-9a-f]+)", line)
    name = counter.Symbols(elf).at(int(found[1], 16)) if found else "."
    return line if name.startswith(".") else f"{line} in {name}"


def flash_bytes(elf: Path) -> int:
    """Bytes of code, constants and initial values of data in a program."""
    from elftools.elf.constants import SH_FLAGS
    from elftools.elf.elffile import ELFFile

    with elf.open("rb") as file:
        sections = ELFFile(file).iter_sections()
        return sum(
            s["sh_size"] for s in sections if s["sh_flags"] & SH_FLAGS.SHF_ALLOC and s["sh_type"] != "SHT_NOBITS"
        )
