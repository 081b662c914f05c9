"""MobileNetV2 in int8 in less and less memory: what tiling costs, as a table.

    python -m benchmarks.fit [--core cortex-m4] [--model 0.35@144:80,48 ...] [--count] [--patches]

Each line is one budget for the arena in KiB: its size, multiplications, calls and code against those of the network
that is computed layer by layer, and with `--count` the instructions of one inference on QEMU's board. The result of
every line is compared with that of PyTorch, bit for bit. `--patches` leaves row streaming out. Weights are random.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

if TYPE_CHECKING:
    from edgec.program import Program

MODELS = ("0.35@144:80,66,48", "1.0@224:320,256")
HEAD = "| model | budget KiB | arena | MACs | calls | code | instructions | equal | measures |"


def rows(program: Program, core: str, budgets: list[float], methods: tuple[str, ...], count: bool) -> Iterator[str]:
    """A line for the network as it is, and one for each budget. Raises EdgecError."""
    import torch

    from benchmarks.mcu import quantized, random_data
    from edgec.bundle import build_bundle
    from edgec.fit import fit_memory
    from edgec.lowering.device_io import device_io
    from edgec.lowering.lower import lower_staged, lower_torch
    from edgec.plan import Plan
    from edgec.program import Program as Graph
    from edgec.targets.device import load_device

    device, data = load_device(core), random_data(program)
    integers = quantized(program, data.limit(4))
    staged, forms = device_io(lower_torch(integers))

    def plan_of(graph: Graph) -> Plan:
        return lower_staged(graph, forms, device).plan

    x = np.random.default_rng(1).uniform(-1, 1, program.inputs[0].shape).astype(np.float32)
    want = integers(torch.from_numpy(x))[0].numpy()
    first = 0
    for budget in (None, *budgets):
        fitted, measures = staged, ["layer by layer"]
        if budget is not None:
            fitted, measures = fit_memory(staged, plan_of, int(budget * 1024), methods)
        lowered = lower_staged(fitted, forms, device)
        plan = lowered.plan
        first = first or plan.macs
        with tempfile.TemporaryDirectory(prefix="edgec-fit-") as folder:
            bundle = build_bundle(lowered, device, Path(folder) / "bundle")
            equal = np.array_equal(bundle.run(x), want)
            counted = f"{bundle.measure(x).instructions:,}" if count else ""
            code = bundle.manifest["code_bytes"]
        sizes = f"{plan.arena_bytes:,} | {plan.macs / first:.3f} | {len(plan.steps)} | {code:,} | {counted}"
        yield f"| {program.name} | {budget or ''} | {sizes} | {'yes' if equal else 'NO'} | {'; '.join(measures)} |"


def main(
    core: Annotated[str, typer.Option(help="A core.")] = "cortex-m4",
    model: Annotated[list[str] | None, typer.Option(help="WIDTH@SIZE:BUDGETS, budgets in KiB.")] = None,
    count: Annotated[bool, typer.Option("--count", help="Count instructions under QEMU.")] = False,
    patches: Annotated[bool, typer.Option("--patches", help="Patches only.")] = False,
) -> None:
    """Print the table."""
    from benchmarks.mobilenet import create
    from edgec.errors import EdgecError

    print(HEAD)
    print("|---" * 9 + "|")
    try:
        for text in model or MODELS:
            name, _, budgets = text.partition(":")
            width, _, size = name.partition("@")
            methods = ("patches",) if patches else ("strips", "patches")
            program = create(float(width), int(size))
            for line in rows(program, core, [float(b) for b in budgets.split(",")], methods, count):
                print(line, flush=True)
    except EdgecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
