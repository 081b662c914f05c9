"""Where the time of one inference goes: every kernel call of edgec's code against what the machine can do at most.

The model's C code has a hook before every call (EDGEC_STEP, empty unless defined); here it notes the time, so the calls
run in their order, on the data and the caches that they find in the real model.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers import Absent, OrtSession
from benchmarks.timing import markdown
from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.bundle import Bundle
    from edgec.plan import Plan, Step
    from edgec.program import Program

# Compiled in front of every C file of the bundle. The times follow the arena, of which the caller knows the size.
HOOK = """
#if !defined(__ASSEMBLER__) && !defined(EDGEC_HOOK)
#define EDGEC_HOOK
#define _POSIX_C_SOURCE 200112L
#include <stdint.h>
#include <time.h>
static inline void edgec_note(uint8_t *arena, int i) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    ((int64_t *)(arena + EDGEC_TIMES))[i] = t.tv_sec * 1000000000ll + t.tv_nsec;
}
#define EDGEC_STEP(i) edgec_note(_a, i);
#endif
"""
RUNS, WARM_UP = 30, 3
PEAK_SOURCE = Path(__file__).with_name("peak.c")
HEADER = ("layer", "kernel", "M MACs", "us", "GFLOP/s", "% of peak", "kB", "GB/s", "bound")
INTEGER = ("int8", "uint8")


@dataclass(frozen=True)
class Peak:
    """GFLOP/s of fp32, GOP/s of int8 (0: no dot-product instruction) and GB/s of reads that miss the last cache."""

    fp32: float
    int8: float
    memory: float

    def __str__(self) -> str:
        return f"{self.fp32:.0f} GFLOP/s fp32, {self.int8:.0f} GOP/s int8, {self.memory:.0f} GB/s from memory"

    def of(self, kind: str) -> float:
        return self.int8 if kind == "int8" and self.int8 else self.fp32


@dataclass(frozen=True)
class Layer:
    """One kernel call. kind: the arithmetic; us: median over the runs; nbytes: of weights, inputs and outputs."""

    layer: str
    kernel: str
    kind: str
    macs: int
    us: float
    nbytes: int

    @property
    def rate(self) -> float:
        """GFLOP/s, or 10^9 integer operations a second; a multiply-add is two."""
        return 2e-3 * self.macs / self.us if self.us else 0.0

    @property
    def bandwidth(self) -> float:
        """GB/s."""
        return 1e-3 * self.nbytes / self.us if self.us else 0.0

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return 2 * self.macs / self.nbytes if self.nbytes else 0.0

    def bound(self, peak: Peak) -> str:
        """What limits this call on a perfect machine whose caches are cold."""
        return "compute" if 2 * self.macs / peak.of(self.kind) > self.nbytes / peak.memory else "memory"

    def cells(self, peak: Peak) -> list[str]:
        numbers = (self.macs / 1e6, self.us, self.rate, 100 * self.rate / peak.of(self.kind), self.nbytes / 1e3)
        texts = [f"{x:.{digits}f}" for x, digits in zip(numbers, (2, 1, 1, 0, 0), strict=True)]
        if not self.macs:
            texts[0] = texts[2] = texts[3] = ""
        return [self.layer or "-", self.kernel, *texts, f"{self.bandwidth:.1f}", self.bound(peak)]


@dataclass(frozen=True)
class Hooked:
    """A bundle that notes the time before every call of `plan` and after the last, `times` bytes into its arena."""

    bundle: Bundle
    plan: Plan
    times: int


@contextlib.contextmanager
def compiled(program: Program) -> Iterator[Hooked]:
    """Compile `program` for this machine with the hook, into a folder that goes in the end. Raises EdgecError."""
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    device = load_device("host")
    lowered = lower(program, device)
    times = -(-lowered.plan.arena_bytes // 64) * 64
    with tempfile.TemporaryDirectory(prefix="edgec-layers-") as folder:
        hook = Path(folder) / "hook.h"
        hook.write_text(HOOK)
        flags = (*device.cflags, "-include", str(hook), f"-DEDGEC_TIMES={times}")
        bundle = build_bundle(lowered, dataclasses.replace(device, cflags=flags), Path(folder) / "bundle")
        yield Hooked(bundle, lowered.plan, times)


def profile(hooked: Hooked, inputs: Sequence[np.ndarray], runs: int = RUNS) -> list[Layer]:
    """The calls in order, on one sample; the time of each is the median over `runs`, after some to warm up.

    Raises EdgecError when the model does not run.
    """
    plan, name = hooked.plan, hooked.bundle.name
    run = ctypes.CDLL(str((hooked.bundle.path / "lib" / f"lib{name}.so").absolute()))[f"{name}_run"]
    outputs = [np.empty(p.shape, p.dtype) for p in plan.outputs]
    memory = np.zeros(hooked.times + 8 * (len(plan.steps) + 1) + plan.arena_align, np.uint8)
    arena = memory[-memory.ctypes.data % plan.arena_align :]
    notes = arena[hooked.times :][: 8 * (len(plan.steps) + 1)].view(np.int64)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*inputs, *outputs, arena)]
    found = []
    for _ in range(WARM_UP + runs):
        status = run(*pointers)
        if status:
            raise EdgecError(f"returned {status}", where=f"{name}_run")
        found.append(np.diff(notes))
    middle = np.median(np.stack(found[WARM_UP:]), axis=0) / 1e3
    return [_layer(plan, step, float(us)) for step, us in zip(plan.steps, middle, strict=True)]


def _layer(plan: Plan, step: Step, us: float) -> Layer:
    arrays = [plan.constants[name].array for name in step.args if name in plan.constants]
    buffers = [plan.buffers[name] for name in step.args if name not in plan.constants]
    buffers = [buffer for buffer in buffers if buffer.kind != "scratch"]
    nbytes = sum(a.nbytes for a in arrays) + sum(b.nbytes for b in buffers)
    integer = any(str(a.dtype) in INTEGER for a in arrays) or any(b.dtype in INTEGER for b in buffers)
    return Layer(step.layer, step.op, "int8" if integer else "fp32", step.macs, us, nbytes)


# -- the machine -------------------------------------------------------------------------------------------------------


def measure_peak() -> Peak:
    """Compile and run `peak.c`: the best of several rounds of a few milliseconds each. Raises Absent without cc."""
    with tempfile.TemporaryDirectory(prefix="edgec-peak-") as folder:
        target = Path(folder) / "peak.so"
        command = ["cc", "-O2", "-march=native", "-shared", "-fPIC", str(PEAK_SOURCE), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Absent(f"the peak of the machine is not known: {error}") from error
        library = ctypes.CDLL(str(target))
    data = np.zeros((256 << 20) + 64, np.uint8)
    address, size = data.ctypes.data + -data.ctypes.data % 64, 256 << 20
    for name in ("peak_fp32", "peak_int8", "peak_read"):
        getattr(library, name).restype = ctypes.c_double
    read = lambda: library.peak_read(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_long(1))  # noqa: E731
    count = ctypes.c_long(1_000_000)
    fp32 = _best(lambda: library.peak_fp32(count))
    return Peak(2 * fp32, 2 * _best(lambda: library.peak_int8(count)), _best(read, rounds=3))


def _best(function: Callable[[], float], rounds: int = 9) -> float:
    """The most that `function` did in a nanosecond of CPU time."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        done = function()
        found.append(done / (time.thread_time() - start) / 1e9)
    return max(found)


# -- ONNX Runtime's own account ----------------------------------------------------------------------------------------


def onnxruntime_profile(file: Path, inputs: Sequence[np.ndarray], runs: int = RUNS) -> dict[str, tuple[int, float]]:
    """By operator type: how many nodes ran in one inference, and their microseconds (median over the runs)."""
    with tempfile.TemporaryDirectory(prefix="edgec-ort-") as folder:
        session = OrtSession(file, 1, str(Path(folder) / "profile"))
        call = session.bind(*inputs)
        for _ in range(WARM_UP + runs):
            call()
        events = json.loads(Path(session.session.end_profiling()).read_text())
    nodes: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault(event["name"], []).append(float(event["dur"]))
            kinds[event["name"]] = event["args"]["op_name"]
    totals: dict[str, tuple[int, float]] = {}
    for name, durations in nodes.items():
        count, us = totals.get(kinds[name], (0, 0.0))
        totals[kinds[name]] = count + 1, us + statistics.median(durations[WARM_UP:])
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


# -- what is printed and drawn -----------------------------------------------------------------------------------------


def totals(layers: Sequence[Layer]) -> dict[str, tuple[int, float]]:
    """By kind of kernel (its name without the type): how many calls, and their microseconds together."""
    found: dict[str, tuple[int, float]] = {}
    for layer in layers:
        kind = re.sub(r"_[a-z]\d+$", "", layer.kernel)
        count, us = found.get(kind, (0, 0.0))
        found[kind] = count + 1, us + layer.us
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def table(layers: Sequence[Layer], peak: Peak) -> str:
    """One line per call, and their sum."""
    rows = [layer.cells(peak) for layer in layers]
    kind = "int8" if any(x.kind == "int8" and x.macs for x in layers) else "fp32"
    macs, us, nbytes = (sum(values) for values in zip(*((x.macs, x.us, x.nbytes) for x in layers), strict=True))
    rows.append([*Layer("all", f"{len(layers)} calls", kind, macs, us, nbytes).cells(peak)[:-1], ""])
    return markdown(HEADER, rows, text=2)


def totals_table(ours: dict[str, tuple[int, float]], peer: dict[str, tuple[int, float]]) -> str:
    """edgec's kernels and ONNX Runtime's operators side by side, each by falling time."""
    rows = []
    left, right = list(ours.items()), list(peer.items())
    for i in range(max(len(left), len(right))):
        cells = []
        for side in (left, right):
            name, (count, us) = side[i] if i < len(side) else ("", (0, 0.0))
            cells += [name, str(count) if name else "", f"{us:.0f}" if name else ""]
        rows.append(cells)
    return markdown(("edgec kernel", "calls", "us", "onnxruntime operator", "nodes", "us"), rows)


def draw(layers: Sequence[Layer], peak: Peak, title: str, target: Path) -> None:
    """A roofline plot as `target` (.png or .svg). Raises EdgecError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise EdgecError("matplotlib is not installed", where="--plot", hint="pip install matplotlib") from error
    figure, axes = pyplot.subplots(figsize=(8, 5))
    known = [x for x in layers if x.macs and x.us]
    x = np.geomspace(0.25, max([4.0, *(layer.intensity for layer in known)]) * 2, 100)
    for kind, colour in (("fp32", "C0"), ("int8", "C1")):
        points = [layer for layer in known if layer.kind == kind]
        if not points:
            continue
        axes.plot(
            x,
            np.minimum(peak.of(kind), x * peak.memory),
            color=colour,
            label=f"{kind} roof, memory {peak.memory:.0f} GB/s",
        )
        sizes = [20 + 400 * layer.us / sum(y.us for y in layers) for layer in points]
        axes.scatter([p.intensity for p in points], [p.rate for p in points], s=sizes, color=colour, alpha=0.5)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s (GOP/s)", title=title)
    axes.legend(loc="lower right")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)
