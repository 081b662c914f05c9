"""Weights of few bits on the shared models: accuracy by bits and group, and what they cost on a device.

    python -m benchmarks.weights accuracy [MODEL ...] [--samples N]
    taskset -c 1 python -m benchmarks.weights device [MODEL ...] [--core cortex-a76]

`accuracy` stores weights only in few bits (`quantize-weights`), in groups of a whole row, 128, 64 and 32 input
channels, and compares predictions with those of the float model on the same images. `device` compares float, weights of
4 bits with float activations, W8A8 and W4A8 (`reconstruct{method=mse}`: rounding to nearest) in generated code: bytes
of all constants, host time interleaved on one core, instructions on an Arm core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from benchmarks import timing
from benchmarks.models import CASES, Case, shared_folder

if TYPE_CHECKING:
    from edgec.data import Dataset
    from edgec.passbase import Context
    from edgec.program import Program

VITS = ("cifar10_vit_d128l4", "imagenet_vit_tiny_p16_224")
MODELS = ("cifar10_resnet20", *VITS)
BITS = (8, 4, 3, 2)
GROUPS = (-1, 128, 64, 32)
# What `device` compares: name and pipeline.
KINDS = {
    "float32": "fold-bn",
    "W4 g64, float": "fold-bn, quantize-weights{bits=4 group=64}",
    "W8A8": "fold-bn, quantize-int8",
    "W4A8": "fold-bn, reconstruct{weights=4 activations=8 method=mse}",
}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Score:
    """Top-1 and share of images with the float model's class, in percent."""

    top1: float
    agreement: float


def case_of(name: str) -> Case:
    """Raises EdgecError for a name that is not in the table."""
    from edgec.errors import EdgecError

    for case in CASES:
        if case.model == name:
            return case
    raise EdgecError("is not a shared model", where=name, hint=f"use {', '.join(c.model for c in CASES)}")


def load(case: Case, samples: int | None = None) -> tuple[Program, Dataset, Context]:
    """(program, evaluation images, context with calibration data) of a shared model."""
    from edgec.data import Preprocess, load_data
    from edgec.frontend import load_model
    from edgec.passbase import Context
    from edgec.targets.device import load_device

    shared = shared_folder()
    program = load_model(case.path(shared), name=case.model)
    preprocess = Preprocess(case.mean, case.std, case.input_scale)
    images = load_data(case.source(shared, case.evaluation), program.inputs, preprocess)
    calibration = load_data(case.source(shared, case.data), program.inputs, preprocess).limit(256)
    images = images if samples is None else images.limit(samples)
    return program, images, Context(load_device("host"), calibration, teacher=program)


def predictions(program: Program, images: Dataset) -> np.ndarray:
    """The predicted class of every image."""
    return np.concatenate([program(*x)[0].argmax(-1).numpy() for x, _ in images.batches(25)])


def score(found: np.ndarray, reference: np.ndarray, images: Dataset) -> Score:
    return Score(100 * float(np.mean(found == images.labels)), 100 * float(np.mean(found == reference)))


def accuracy_rows(name: str, samples: int | None, asymmetric: bool) -> Iterator[list[str]]:
    """Lines of the accuracy table of one model, the float model first."""
    from edgec.cost import program_cost
    from edgec.passes.quantization.quantize_weights import QuantizeWeights

    program, images, context = load(case_of(name), samples)
    reference = predictions(program, images)
    first = score(reference, reference, images)
    yield [name, "float32", "", f"{program_cost(program).weight_bytes:,}", f"{first.top1:.1f}", "", "", ""]
    rows: dict[int, dict[str, float]] = {}
    for bits in BITS:
        for group in GROUPS:
            for kind in (False, True)[: 1 + asymmetric]:
                step = QuantizeWeights(bits=bits, group=group, asymmetric=kind)
                stored = step.run(program, context)
                summary = stored.annotations[step.name]
                rows[group] = summary.error if not kind else rows[group]
                got = score(predictions(stored, images), reference, images)
                worse = sum(summary.error[layer] > rows[-1][layer] for layer in summary.error)
                yield [
                    name,
                    f"W{bits}{' asymmetric' if kind else ''}",
                    "row" if group < 0 else str(group),
                    f"{program_cost(stored).weight_bytes:,}",
                    f"{got.top1:.1f}",
                    f"{got.agreement:.1f}",
                    f"{np.mean(list(summary.error.values())):.2e}",
                    "" if kind else f"{worse} of {len(summary.error)}",
                ]


@app.command()
def accuracy(
    models: Annotated[list[str] | None, typer.Argument(help="default: the two vision transformers")] = None,
    samples: Annotated[int | None, typer.Option(help="first so many images only")] = None,
    asymmetric: Annotated[bool, typer.Option(help="with zero points as well")] = True,
) -> None:
    """Print top-1 and agreement by bits and group."""
    header = ("model", "weights", "group", "bytes", "top-1", "agreement", "error", "layers worse than row")
    rows = [row for name in models or VITS for row in accuracy_rows(name, samples, asymmetric)]
    print(timing.markdown(header, rows, text=3))


def device_rows(name: str, core: str, samples: int | None) -> list[list[str]]:
    """Lines of the device table of one model."""
    from benchmarks.sidebyside import compare
    from edgec.pipeline import Pipeline

    program, images, context = load(case_of(name), samples)
    made: dict[str, Program] = {}
    for kind, passes in KINDS.items():
        made[kind] = program
        for step in Pipeline.parse(passes):
            made[kind] = step.run(made[kind], context)
    reference = predictions(program, images)
    scores = {kind: score(predictions(p, images), reference, images) for kind, p in made.items()}
    sides = compare(made, (core,))
    base = sides["W8A8"]
    return [
        [
            name,
            kind,
            f"{side.weight_bytes:,}",
            f"{scores[kind].top1:.1f}",
            f"{scores[kind].agreement:.1f}",
            f"{side.host_us:,.0f}",
            f"{side.host_us / base.host_us:.2f}",
            f"{side.instructions[core] / 1e6:,.1f}",
            f"{side.instructions[core] / base.instructions[core]:.2f}",
        ]
        for kind, side in sides.items()
    ]


@app.command()
def device(
    models: Annotated[list[str] | None, typer.Argument(help="default: ResNet-20 and the two transformers")] = None,
    core: Annotated[str, typer.Option(help="Arm core for the instruction counts")] = "cortex-a76",
    samples: Annotated[int | None, typer.Option(help="first so many images only, for the accuracy")] = None,
) -> None:
    """Print bytes, accuracy, host time and instructions; ratios are to W8A8."""
    header = ("model", "kind", "bytes", "top-1", "agreement", "host, us", "ratio", f"{core}, M instructions", "ratio")
    rows = [row for name in models or MODELS for row in device_rows(name, core, samples)]
    print(timing.markdown(header, rows, text=2))


if __name__ == "__main__":
    import sys
    import warnings

    from edgec.errors import EdgecError

    warnings.simplefilter("ignore")
    try:
        app()
    except EdgecError as error:
        sys.exit(f"error: {error}")
