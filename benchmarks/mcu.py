"""int8 networks on microcontrollers, as tables: exact instructions, stack, arena and flash of one inference.

    python -m benchmarks.mcu [--target cortex-m4 ...] [--model NAME ...] [--samples N] [--steps]
    python -m benchmarks.mcu --layers [--target cortex-m4 ...]

Counted by a QEMU plugin on QEMU's board for the core, from the call of the model's function to its return; the C
library's functions count. Counts, not cycles: a load of several registers is one instruction and several cycles.
`--samples` runs so many inputs on the board and on this machine, compiled as portable C, and says how many give the
same bits. `--steps` prints every step of the networks. `--layers` prints single layers instead, beside CMSIS-NN's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer

from benchmarks.models import CASES, shared_folder

if TYPE_CHECKING:
    from torch import nn

    from edgec.data import Dataset
    from edgec.lowering.lower import Lowered
    from edgec.program import Program
    from edgec.targets.mcu.runner import Measurement

CORES = ("cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55", "rv32imc")
MODELS = (
    "mlperftiny_ic_resnet8",
    "mlperftiny_kws_dscnn",
    "mlperftiny_vww_mobilenetv1_025_96",
    "mlperftiny_ad_autoencoder",
)
PASSES = "fold-bn, quantize-int8"
SAMPLES = 64
HEAD = "| model | core | MACs | instructions | per MAC | stack | arena | flash | weights | same bits |"
# What others take for ResNet-8. CMSIS-NN (commit 99f736a6, -Ofast): convolutions and additions only, counted the same
# way (`shared/notes/mcu.md`, section 3). ST: published for STM32Cube.AI 3.0.0 in ST's model zoo at commit 7f3764d5,
# image_classification/resnet/README: activations 62.51 and runtime 1.26 KiB, weights 76.9 and code 36.08 KiB.
OTHERS = {
    "mlperftiny_ic_resnet8": (
        ("CMSIS-NN, cortex-m4", "29.8 M", "2.39", "", ""),
        ("CMSIS-NN, cortex-m7", "30.2 M", "2.42", "", ""),
        ("CMSIS-NN, cortex-m55", "4.8 M", "0.38", "", ""),
        ("ST, STM32H7 (published)", "", "", "65,300", "115,692"),
    )
}


@dataclass(frozen=True)
class Layer:
    """A single layer. cmsis: instructions per MAC of CMSIS-NN's function by core, from `shared/notes/mcu.md`."""

    name: str
    shape: tuple[int, ...]
    cmsis: dict[str, float]
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    def module(self) -> nn.Module:
        """The layer and, as the last layer of a network gives float32, one behind it."""
        import torch
        from torch import nn

        torch.manual_seed(0)
        if len(self.shape) == 2:
            return nn.Sequential(nn.Linear(self.inputs, self.outputs), nn.ReLU(), nn.Linear(self.outputs, 1))
        padding = self.kernel // 2
        layer = nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, padding, groups=self.groups)
        return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(self.outputs, 1, 1))


def _cmsis(m4: float, m7: float, m33: float, m55: float) -> dict[str, float]:
    return {"cortex-m4": m4, "cortex-m7": m7, "cortex-m33": m33, "cortex-m55": m55}


LAYERS = (
    Layer("conv 3x3, 16 to 16, 32x32", (1, 16, 32, 32), _cmsis(2.33, 2.38, 2.36, 0.39), 16, 16, 3),
    Layer("conv 3x3, 32 to 64, 16x16, stride 2", (1, 32, 16, 16), _cmsis(1.86, 1.86, 1.86, 0.24), 32, 64, 3, 2),
    Layer("depthwise 3x3, 64, 25x5", (1, 64, 25, 5), _cmsis(8.33, 8.25, 8.25, 2.32), 64, 64, 3, groups=64),
    Layer("depthwise 3x3, 64, 48x48", (1, 64, 48, 48), _cmsis(8.79, 8.64, 8.64, 2.30), 64, 64, 3, groups=64),
    Layer("pointwise, 64 to 64, 25x5", (1, 64, 25, 5), _cmsis(2.09, 2.05, 2.08, 0.40), 64, 64),
    Layer("fully connected, 640 to 128", (1, 640), _cmsis(1.95, 1.95, 1.95, 0.49), 640, 128),
    Layer("conv 3x3, 3 to 16, 32x32", (1, 3, 32, 32), _cmsis(4.82, 4.95, 4.89, 1.36), 3, 16, 3),
)


def load(name: str) -> tuple[Program, Dataset]:
    """A shared model and its calibration data; random data where none is shared. Raises EdgecError."""
    from edgec.data import Preprocess, load_data
    from edgec.errors import EdgecError
    from edgec.frontend import load_model

    case = next((c for c in CASES if c.model == name), None)
    if case is None:
        raise EdgecError("is not a shared model", where=name, hint=f"use one of {', '.join(c.model for c in CASES)}")
    program = load_model(case.path(shared_folder()))
    if case.data is None:
        return program, random_data(program)
    preprocess = Preprocess(case.mean, case.std, case.input_scale)
    return program, load_data(case.source(shared_folder(), case.data), program.inputs, preprocess)


def random_data(program: Program) -> Dataset:
    from edgec.data import load_data

    random = np.random.default_rng(0)
    shape = tuple(program.inputs[0].shape)[1:]
    return load_data([random.normal(size=shape).astype(np.float32) for _ in range(SAMPLES)], program.inputs)


def quantized(program: Program, data: Dataset) -> Program:
    """In int8, as all microcontroller targets round."""
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline
    from edgec.targets.device import load_device

    context = Context(device=load_device(CORES[0]), calibration=data.limit(SAMPLES))
    for step in Pipeline.parse(PASSES):
        program = step.run(program, context)
    return program


class Measured(NamedTuple):
    """A compiled program, the manifest of its bundle, what one inference took, how many samples gave the same bits."""

    lowered: Lowered
    manifest: dict[str, Any]
    found: Measurement
    same: int


def measure(program: Program, core: str, samples: Sequence[np.ndarray] = ()) -> Measured:
    """Compile for a core and run: one inference counted, and `samples`, an array for each input. Raises EdgecError."""
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    device = load_device(core)
    lowered = lower(program, device)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="edgec-mcu-") as folder:
        bundle = build_bundle(lowered, device, Path(folder) / "bundle")
        inputs = [random.normal(size=p["shape"]).astype(p["dtype"]) for p in bundle.manifest["inputs"]]
        found = bundle.measure(*inputs)
        same = 0
        if len(samples):
            here = bundle.run(*samples)
            bundle.emulate = True
            there = bundle.run(*samples)
            same = sum(np.array_equal(a, b) for a, b in zip(here, there, strict=True))
        return Measured(lowered, dict(bundle.manifest), found, same)


def model_rows(name: str, cores: Sequence[str], count: int, steps: bool) -> Iterator[str]:
    """The lines of a model. count: samples that run on the board; there are no more than the calibration data has."""
    original, data = load(name)
    program = quantized(original, data)
    samples: Sequence[np.ndarray] = data.limit(count).read()[0] if count else []
    for core in cores:
        lowered, m, found, same = measure(program, core, samples)
        sizes = f"{found.stack_bytes:,} | {m['arena_bytes']:,} | {m['flash_bytes']:,} | {m['weight_bytes']:,}"
        per_mac = found.instructions / m["macs"]
        bits = f"{same} of {len(samples[0])}" if count else ""
        yield f"| {name} | {core} | {m['macs']:,} | {found.instructions:,} | {per_mac:.3f} | {sizes} | {bits} |"
        if steps:
            yield from step_rows(lowered, found)
    for who, instructions, per_mac, arena, flash in OTHERS.get(name, ()):
        yield f"| {name} | {who} | {m['macs']:,} | {instructions} | {per_mac} | | {arena} | {flash} | | |"


def step_rows(lowered: Lowered, found: Measurement) -> Iterator[str]:
    """A line for each step of the plan."""
    for step, count in zip(lowered.plan.steps, found.steps, strict=True):
        per_mac = f"{count / step.macs:.3f}" if step.macs else ""
        yield f"| - {step.op}: {step.layer} | | {step.macs:,} | {count:,} | {per_mac} | | | | | |"


def layer_row(layer: Layer, cores: Sequence[str]) -> str:
    """Instructions per MAC of a layer on each core, and CMSIS-NN's."""
    from edgec.frontend import load_model

    program = load_model(layer.module().eval(), input_shape=layer.shape, name="layer")
    program = quantized(program, random_data(program))
    cells = []
    for core in cores:
        lowered, _, found, _ = measure(program, core)
        cells.append(f"{found.steps[0] / lowered.plan.steps[0].macs:.2f} | {layer.cmsis.get(core, '')}")
    return f"| {layer.name} | {' | '.join(cells)} |"


def main(
    target: Annotated[list[str] | None, typer.Option(help="A core; may be given several times.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A shared model; may be given several times.")] = None,
    samples: Annotated[int, typer.Option(help="Inputs to run on the board.")] = 0,
    steps: Annotated[bool, typer.Option("--steps", help="Print every step.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Print single layers beside CMSIS-NN's.")] = False,
) -> None:
    """Print the table."""
    from edgec.errors import EdgecError

    cores = target or list(CORES)
    try:
        if layers:
            print(f"| layer | {' | '.join(f'{core} | CMSIS-NN' for core in cores)} |")
            print("|---" * (1 + 2 * len(cores)) + "|")
            for layer in LAYERS:
                print(layer_row(layer, cores), flush=True)
            return
        print(HEAD)
        print("|---" * 10 + "|")
        for name in model or MODELS:
            for line in model_rows(name, cores, samples, steps):
                print(line, flush=True)
    except EdgecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
