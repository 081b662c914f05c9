"""Running a bundle's runner program: on this machine or in an emulator."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing

TIMEOUT = 3600


def command_prefix(runner: str, qemu_cpu: str | None) -> list[str]:
    """What goes before the program: nothing on this machine, the emulator and its CPU otherwise."""
    if runner == "native":
        return []
    return [runner, *(["-cpu", qemu_cpu] if qemu_cpu else [])]


def run_samples(
    program: Path,
    prefix: Sequence[str],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    package: str | None = None,
) -> tuple[np.ndarray, ...]:
    """Run `program` on samples.

    inputs: one array [n, ...] per model input, in the model's dtype; outputs: (shape of one sample, dtype) of each.
    Returns one array [n, ...] per output. Raises EdgecError when the program or the emulator fails.
    """
    count = len(inputs[0])
    with tempfile.TemporaryDirectory(prefix="edgec-run-") as folder:
        source, target = Path(folder) / "in.bin", Path(folder) / "out.bin"
        with source.open("wb") as file:
            for i in range(count):
                for array in inputs:
                    file.write(np.ascontiguousarray(array[i]).tobytes())
        execute([*prefix, str(program.absolute()), str(source), str(target), str(count)], package)
        raw = np.fromfile(target, np.uint8)
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in outputs]
    rows = raw.reshape(count, sum(sizes))
    found, start = [], 0
    for (shape, dtype), size in zip(outputs, sizes, strict=True):
        part = np.ascontiguousarray(rows[:, start : start + size])
        found.append(part.view(dtype).reshape(count, *shape))
        start += size
    return tuple(found)


def execute(command: Sequence[str], package: str | None = None) -> str:
    """Run a command and return what it printed. Raises EdgecError with its last line when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise ToolchainMissing(
            f"'{command[0]}' is not installed", where="runner", hint=f"apt-get install {package or command[0]}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EdgecError(f"took more than {TIMEOUT} s", where=command[0]) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise EdgecError(
            f"ended with status {done.returncode}: {lines[-1] if lines else 'no message'}", where=Path(command[0]).name
        )
    return done.stdout
