"""Running and measuring a microcontroller bundle on QEMU's board for its core.

A bundle has C sources in `src` and, made from them by `build_runner`, a program in `qemu` that reads samples from a
file and writes results to another.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.cpu.emit import CTYPES
from edgec.targets.cpu.runner import stream
from edgec.targets.device import Device
from edgec.targets.mcu import machine
from edgec.targets.mcu.machine import build_program, run_program
from edgec.targets.qemu import counter
from edgec.targets.templates import render

if TYPE_CHECKING:
    from edgec.bundle import Bundle

FOLDER = "qemu"
# Seconds for one chunk of samples.
TIMEOUT = 3600
USAGE = re.compile(r"^edgec: samples (\d+) stack_bytes (\d+) arena_bytes (\d+) ticks (\d+)$", re.M)
# Instructions between the readings of the clock that are not the model's, at most.
CLOCK_READING = 40
# Every step of the model becomes a mark of the counter, which costs no instruction.
MARKS = ("-include", "marks.h", "-DEDGEC_STEP(i)=EDGEC_MARK(i);")


class Tensor(NamedTuple):
    """An input or output of a model, as its C function takes it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Measurement:
    """One inference. instructions: executed in all, from the call of the model's function to its return.

    steps: of each step of the plan, in its order; their sum is less than `instructions` by entry and return.
    functions: by C function, most first. stack_bytes: of the model's function and all that it calls. arena_bytes: up to
    the last byte of the arena that was written to. tolerance: 0, or by how much `instructions` may be off, which an
    emulated clock gave where the counter cannot be compiled; there are no steps and functions then.
    """

    instructions: int
    steps: tuple[int, ...]
    functions: dict[str, int]
    stack_bytes: int
    arena_bytes: int
    tolerance: int = 0


class _Usage(NamedTuple):
    """What a run reports."""

    stack_bytes: int
    arena_bytes: int
    ticks: int


def build_runner(
    root: Path, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], selftest: bool, device: Device
) -> Path:
    """Make `qemu`/`name`.elf in a bundle folder, beside its sources, from `src`.

    The same sources give the same bytes, in any folder. Raises EdgecError with the compiler's message, ToolchainMissing
    with the package.
    """
    from edgec import __version__

    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    text = render(
        "edgec.targets.mcu",
        "runner.c.jinja",
        name=name,
        macro=name.upper(),
        version=__version__,
        inputs=[_buffer(t) for t in inputs],
        outputs=[_buffer(t) for t in outputs],
        selftest=selftest,
    )
    (folder / "runner.c").write_text(text)
    sources = [folder / "runner.c", root / "src" / f"{name}.c"]
    sources += [root / "src" / f"{name}_selftest.c"] if selftest else []
    flags = [f"-I{(root / 'src').absolute()}", *MARKS]
    # The self-test has its results on the stack.
    stack = machine.STACK_BYTES + (sum(t.nbytes for t in outputs) if selftest else 0)
    return build_program(sources, device, folder, name=name, flags=flags, stack_bytes=stack)


def run_samples(
    program: Path, device: Device, inputs: Sequence[np.ndarray], outputs: Sequence[tuple[tuple[int, ...], str]]
) -> tuple[np.ndarray, ...]:
    """Run a program of `build_runner` on samples.

    inputs: one array [n, ...] per model input, in the model's dtype and layout. outputs: (shape of one sample, dtype)
    of each. Returns one array [n, ...] per output. Raises EdgecError when the program fails or writes beside its
    memory.
    """

    def run(source: Path, target: Path, count: int) -> None:
        _check(_run(program, device, [source.name, target.name, str(count)], source.parent), program, device)

    return stream(run, inputs, outputs, f"{program.name} on {device.machine}")


def selftest(program: Path, device: Device) -> bool:
    """Whether the built-in sample gives the built-in result. Raises EdgecError when the program fails otherwise."""
    done = _run(program, device, ["--selftest"], None)
    if done.status not in (0, 3):
        _check(done, program, device)
    return done.status == 0


def measure(bundle: Bundle, inputs: Sequence[np.ndarray], device: Device) -> Measurement:
    """Exact counts of one inference under QEMU, and the memory it used.

    inputs: one array for each input, as the device takes it: see `edgec.bundle.Bundle.measure`. Raises EdgecError when
    there is no program or it fails, ToolchainMissing without emulator. Without a compiler for this machine, which the
    counter needs, an emulated clock counts, for less than some 600 million instructions.
    """
    name = bundle.name
    specs = [s.get("device") or s for s in bundle.manifest["inputs"]]
    arrays = [np.ascontiguousarray(a, np.dtype(s["dtype"])) for a, s in zip(inputs, specs, strict=True)]
    for array, spec in zip(arrays, specs, strict=True):
        if array.shape != tuple(spec["shape"]):
            expected = ", ".join(map(str, spec["shape"]))
            raise EdgecError(f"has shape {array.shape}, expected ({expected})", where=f"input of bundle {name}")
    program = program_of(bundle)
    with tempfile.TemporaryDirectory(prefix="edgec-count-") as work:
        folder = Path(work)
        (folder / "in.bin").write_bytes(b"".join(a.tobytes() for a in arrays))
        arguments = ["in.bin", "out.bin", "1"]
        report = folder / "counts"
        try:
            counter.build_plugin(device.runner, device.runner_package)
        except ToolchainMissing:
            used = _check(_run(program, device, arguments, folder, clocked=True), program, device)
            tick = machine.instructions_per_tick(device)
            return Measurement(round(used.ticks * tick), (), {}, *used[:2], tolerance=round(tick) + CLOCK_READING)
        done = _run(program, device, arguments, folder, counts=report, function=f"{name}_run")
        used = _check(done, program, device)
        profile = counter.read_report(report, program)
    marks = profile.by_mark
    # The last mark stands behind the last step.
    steps = tuple(marks.get(i, 0) for i in range(max(marks)))
    return Measurement(profile.total, steps, profile.by_symbol, *used[:2])


def program_of(bundle: Bundle) -> Path:
    """The program in a bundle. Raises EdgecError when it has none."""
    program = bundle.path / FOLDER / f"{bundle.name}.elf"
    if not program.is_file():
        raise EdgecError("has no program for QEMU", where=f"bundle {bundle.name}", hint="compile it again with one")
    return program


def _run(program: Path, device: Device, arguments: Sequence[str], cwd: Path | None, **counting: Any) -> machine.Run:
    return run_program(program, device, arguments, cwd, timeout=TIMEOUT, **counting)


def _check(done: machine.Run, program: Path, device: Device) -> _Usage:
    """What a run reports; raises EdgecError when it failed."""
    where = f"{program.name} on {device.machine}"
    found = USAGE.search(done.text)
    if done.status or not found:
        lines = done.text.strip().splitlines() or ["no message"]
        raise EdgecError(f"ended with status {done.status}: {lines[-1]}", where=where)
    return _Usage(int(found[2]), int(found[3]), int(found[4]))


def flash_bytes(root: Path, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], device: Device) -> int:
    """Bytes of flash that a model adds to a program: code, constants, and what it needs of the C library.

    root: as in `build_runner`. Raises EdgecError, ToolchainMissing.
    """
    arguments = ", ".join([f"p[{i}]" for i in range(len(inputs) + len(outputs) + 1)])
    call = f'#include "{name}.h"\nint call(void **p);\nint call(void **p) {{ return {name}_run({arguments}); }}\n'
    nothing = "int call(void **p);\nint call(void **p) { (void)p; return 0; }\n"
    main = "int call(void **p);\nvoid *volatile *volatile memory;\nint main(void) { return call((void **)memory); }\n"
    sizes = []
    with tempfile.TemporaryDirectory(prefix="edgec-size-") as work:
        folder = Path(work)
        (folder / "main.c").write_text(main)
        (folder / "call.c").write_text(call)
        (folder / "nothing.c").write_text(nothing)
        source = root / "src" / f"{name}.c"
        for sources in ([folder / "nothing.c"], [folder / "call.c", source]):
            flags = [f"-I{source.parent.absolute()}"]
            program = build_program([folder / "main.c", *sources], device, folder, name="size", flags=flags)
            sizes.append(machine.flash_bytes(program))
    return sizes[1] - sizes[0]


def _buffer(tensor: Tensor) -> dict[str, Any]:
    """What the template needs; kernels want pointers that are multiples of 4."""
    align = max(4, np.dtype(tensor.dtype).itemsize)
    return {"ctype": CTYPES[tensor.dtype], "nbytes": tensor.nbytes, "guard": 64 + align}
