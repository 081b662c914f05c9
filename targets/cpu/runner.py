"""Running a bundle's runner program: on this machine or in an emulator."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgec.errors import EdgecError, ToolchainMissing

# Seconds for one chunk of samples, and how much of them goes into a file at once.
TIMEOUT = 3600
CHUNK_BYTES = 64 << 20


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
    threads: int = 1,
) -> tuple[np.ndarray, ...]:
    """Run `program` on samples, each on `threads` threads.

    inputs: one array [n, ...] per model input, in the model's dtype; outputs: (shape of one sample, dtype) of each.
    Returns one array [n, ...] per output. Raises EdgecError when the program or the emulator fails.
    """
    name = " ".join([*prefix, program.name])

    def run(source: Path, target: Path, count: int) -> None:
        command = [*prefix, str(program.absolute()), str(source), str(target), str(count)]
        if threads > 1:
            command += ["1", str(threads)]
        status, text = execute(command, package)
        if status:
            raise EdgecError(f"ended with status {status}: {text}", where=name)

    return stream(run, inputs, outputs, name)


def stream(
    run: Callable[[Path, Path, int], None],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    name: str,
) -> tuple[np.ndarray, ...]:
    """Samples to a program and results back, by way of two files in one temporary folder.

    run: reads so many samples from the first file and writes their results into the second; a sample is its inputs one
    after the other, a result its outputs. name: the program, in messages. inputs, outputs, result: as in `run_samples`.
    """
    count = len(inputs[0])
    # Records that look in memory like a sample in the file: the arrays one after the other.
    taken = np.dtype([(f"{i}", a.dtype, a.shape[1:]) for i, a in enumerate(inputs)])
    given = np.dtype([(f"{i}", dtype, shape) for i, (shape, dtype) in enumerate(outputs)])
    step = max(1, CHUNK_BYTES // max(1, taken.itemsize, given.itemsize))
    parts = []
    for start in range(0, max(1, count), step):
        chunk = [a[start : start + step] for a in inputs]
        samples = np.empty(len(chunk[0]), taken)
        for i, array in enumerate(chunk):
            samples[f"{i}"] = array
        try:
            with tempfile.TemporaryDirectory(prefix="edgec-run-") as folder:
                source, target = Path(folder) / "in.bin", Path(folder) / "out.bin"
                source.write_bytes(samples.tobytes())
                run(source, target, len(samples))
                results = np.frombuffer(target.read_bytes(), given)
        except OSError as error:
            raise EdgecError(f"samples cannot be exchanged: {error.strerror or error}", where=name) from error
        if len(results) != len(samples):
            raise EdgecError(f"gave {len(results)} results for {len(samples)} samples", where=name)
        parts.append(results)
    results = np.concatenate(parts)
    return tuple(np.ascontiguousarray(results[f"{i}"]) for i in range(len(outputs)))


def execute(command: Sequence[str], package: str | None = None) -> tuple[int, str]:
    """Run a command; returns its exit status (negative: killed by that signal) and the last line it printed.

    Raises ToolchainMissing, naming the Debian package, when the command does not exist, and EdgecError when it takes
    too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise ToolchainMissing(
            f"'{command[0]}' is not installed", where="runner", hint=f"apt-get install {package or command[0]}"
        ) from error
    except OSError as error:
        raise EdgecError(f"cannot be run: {error.strerror}", where=command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise EdgecError(f"took more than {TIMEOUT} s", where=command[0]) from error
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.returncode, lines[-1] if lines else "no message"
