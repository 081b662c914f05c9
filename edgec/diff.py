"""`edgec diff`: the layers in which two models part, generated code included."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from edgec.bundle import Bundle, build_bundle
from edgec.data import Dataset, Preprocess, load_data, random_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.lowering.lower import lower
from edgec.program import Program, code_grid, origin_of
from edgec.registry import get_device
from edgec.sensitivity import OUTPUT, LayerDifference, LayerValue, compare_outputs, layer_outputs, sample_inputs

SAMPLES = 8


def diff(
    a: Any,
    b: Any,
    data: Any = None,
    *,
    preprocess: Preprocess | None = None,
    samples: int = SAMPLES,
    input_shape: tuple[int, ...] | None = None,
) -> list[LayerDifference]:
    """Layer by layer difference between two sides, worst first.

    a, b: a model in any form `load_model` takes, a stage written by `--dump` (`.pt2`), or a bundle folder. A bundle
        stands for its generated code, run natively or in the emulator; its last Program is `bundle/program.pt2`.
    data: samples to run (default: random inputs); at most `samples` of them.

    Raises EdgecError when the sides have no layer in common.
    """
    left, right = _side(a, input_shape), _side(b, input_shape)
    if [s.shape for s in left.program.inputs] != [s.shape for s in right.program.inputs]:
        raise EdgecError(
            f"inputs differ: {left.program.inputs[0]} and {right.program.inputs[0]}",
            where="diff",
            hint="compare stages of one model",
        )
    specs = left.program.inputs
    dataset: Dataset = (
        random_data(specs, samples, examples=left.program.example_inputs)
        if data is None
        else load_data(data, specs, preprocess)
    )
    inputs = sample_inputs(left.program, dataset, min(samples, len(dataset)))
    rows = compare_outputs(left.outputs(inputs), right.outputs(inputs))
    if not rows:
        raise EdgecError("no layer in common", where="diff", hint="compare stages of one model")
    return sorted(rows, key=lambda row: row.sqnr_db)


@dataclasses.dataclass(frozen=True)
class _Side:
    """A Program, and the bundle whose code runs it where one was given."""

    program: Program
    bundle: Bundle | None = None

    def outputs(self, inputs: tuple[torch.Tensor, ...]) -> dict[str, LayerValue]:
        if self.bundle is None:
            return layer_outputs(self.program, inputs)
        return device_outputs(self.program, self.bundle.manifest["target"], inputs)


def _side(spec: Any, input_shape: tuple[int, ...] | None) -> _Side:
    if isinstance(spec, (str, Path)) and Path(spec).is_dir():
        bundle = Bundle.load(spec)
        return _Side(load_model(str(Path(spec) / "program.pt2"), name=bundle.name), bundle)
    return _Side(load_model(spec, input_shape=input_shape))


def device_outputs(program: Program, target: str, inputs: tuple[torch.Tensor, ...]) -> dict[str, LayerValue]:
    """The real value of each kernel call of the generated code, by origin.

    The code is built again from the Program with a copy of every result; kernels, memory plan and order are those of
    the bundle. Integer results are read with the grid of the Program's node.
    """
    device = get_device(target)
    lowered = lower(program, device)
    grids = _grids(program)
    traced = dataclasses.replace(lowered, plan=lowered.plan.traced())
    with tempfile.TemporaryDirectory(prefix="edgec-diff-") as folder:
        bundle = build_bundle(traced, device, Path(folder) / "bundle")
        results = bundle.run(*[x.numpy() for x in inputs])
    names = [p.name for p in traced.plan.outputs]
    by_name = dict(zip(names, results, strict=True))
    tensors = [n for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    shapes = {origin_of(n): tuple(n.meta["val"].shape[1:]) for n in tensors}
    found: dict[str, LayerValue] = {}
    for number, step in enumerate(lowered.plan.steps):
        values = torch.from_numpy(by_name[f"step{number}"])
        if values.dtype == torch.int8:
            if step.origin not in grids:
                continue
            scale, zero = grids[step.origin]
            values = (values.to(torch.float32) - zero) * scale
        # Kernels on maps work channels last.
        if values.dim() == 4 and tuple(values.permute(0, 3, 1, 2).shape[1:]) == shapes.get(step.origin):
            values = values.permute(0, 3, 1, 2)
        found[step.origin] = LayerValue(step.layer, values)
    found[OUTPUT] = LayerValue(OUTPUT, torch.from_numpy(by_name[names[0]]))
    return found


def _grids(program: Program) -> dict[str, tuple[float, int]]:
    """Scale and zero point of every integer value."""
    found = {}
    for node in program.graph.nodes:
        grid = code_grid(program, node)
        value = node.meta.get("val")
        if grid is not None and isinstance(value, torch.Tensor) and value.dtype == torch.int8:
            found[origin_of(node)] = grid
    return found
