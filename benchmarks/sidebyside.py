"""Several Programs of one model side by side: host time, interleaved on one core, and exact instructions on Arm."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import timing

if TYPE_CHECKING:
    from edgec.program import Program

ROUNDS = 15


@dataclass(frozen=True)
class Side:
    """One Program: kernels it calls, bytes of code and weights, host microseconds (median), instructions by device."""

    kernels: int
    code_bytes: int
    weight_bytes: int
    host_us: float
    instructions: Mapping[str, int]


def compare(programs: Mapping[str, Program], devices: Sequence[str] = (), rounds: int = ROUNDS) -> dict[str, Side]:
    """Compile every Program for the host and time them turn by turn on one thread; count it on `devices` under QEMU.

    The caller pins the process to a core. Raises EdgecError, ToolchainMissing.
    """
    from benchmarks.aarch64 import measure, random_inputs
    from benchmarks.cpu import NativeBundle
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    host = load_device("host")
    with tempfile.TemporaryDirectory(prefix="edgec-sides-") as folder:
        lowered = {name: lower(program, host) for name, program in programs.items()}
        bundles = {name: build_bundle(plan, host, Path(folder) / name) for name, plan in lowered.items()}
        inputs = random_inputs(next(iter(bundles.values())).manifest["inputs"])
        turns = {name: NativeBundle(bundle.path).bind(*inputs) for name, bundle in bundles.items()}
        times = timing.measure(turns, rounds)
        return {
            name: Side(
                kernels=len(lowered[name].plan.steps),
                code_bytes=bundles[name].manifest["code_bytes"],
                weight_bytes=lowered[name].plan.weight_bytes,
                host_us=times[name].cpu,
                instructions={d: measure(program, "", load_device(d), False).instructions for d in devices},
            )
            for name, program in programs.items()
        }
