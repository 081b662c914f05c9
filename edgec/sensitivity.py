"""Where two Programs, or two bundles, part: layer by layer, on the same samples.

Values are matched by the node of the original model that they stand for (`origin_of`), which every pass keeps: an int8
convolution with batch norm and activation inside it is compared with the result of the float activation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edgec.program import Program, code_grid, is_call, layer_of, origin_of, output_nodes

if TYPE_CHECKING:
    from edgec.data import Dataset

edgec = torch.ops.edgec
SAMPLES = 32


@dataclass(frozen=True)
class LayerDifference:
    """`sqnr_db`: 10 log10 of signal over error energy at the layer's output; `cosine` of the flattened outputs."""

    layer: str
    cosine: float
    sqnr_db: float

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,
        }


@dataclass(frozen=True)
class LayerValue:
    """The real value of one node, and the user's name of the layer that computes it."""

    layer: str
    value: torch.Tensor


# Key of a model's first output, whatever node it stands for.
OUTPUT = "output"


def layer_outputs(program: Program, inputs: tuple[torch.Tensor, ...]) -> dict[str, LayerValue]:
    """The real value of every node, by origin, in graph order; integer codes are read with their grid."""
    recorder = _Recorder(program)
    recorder.run(*inputs)
    return recorder.found


def compare_layers(a: Program, b: Program, dataset: Dataset, samples: int = SAMPLES) -> list[LayerDifference]:
    """One row per value that both Programs have, in the order of `a`, and one for the output."""
    inputs = sample_inputs(a, dataset, samples)
    left = layer_outputs(a, inputs)
    return compare_outputs(left, left if a is b else layer_outputs(b, inputs))


def sample_inputs(program: Program, dataset: Dataset, samples: int = SAMPLES) -> tuple[torch.Tensor, ...]:
    """One batch of the first samples: `samples` of them, or as many as a fixed batch has."""
    count = samples if program.dynamic_batch else program.inputs[0].shape[0]
    arrays, _ = dataset.read(slice(0, count))
    return tuple(torch.from_numpy(x) for x in arrays)


def compare_outputs(left: Mapping[str, LayerValue], right: Mapping[str, LayerValue]) -> list[LayerDifference]:
    """One row per value that both sides have in the same shape, in the order of `left`, named by `right`."""
    rows = []
    for origin, want in left.items():
        got = right.get(origin)
        if got is not None and got.value.shape == want.value.shape:
            rows.append(LayerDifference(got.layer, *fidelity(want.value, got.value)))
    return rows


def worst_layers(a: Program, b: Program, dataset: Dataset) -> list[LayerDifference]:
    """Layers sorted by the SQNR they lose against the layer before: where error enters, not where it arrives."""
    rows = compare_layers(a, b, dataset)
    entering = []
    before = math.inf
    for row in rows:
        entering.append((row.sqnr_db - min(before, 100.0), row))
        before = row.sqnr_db
    return [row for _, row in sorted(entering, key=lambda item: item[0]) if row.layer != OUTPUT]


def fidelity(want: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """(cosine, SQNR in dB); identical tensors have an SQNR of infinity."""
    if want.equal(got):
        return 1.0, math.inf
    w, g = want.double().flatten(), got.double().flatten()
    signal, size, product = (float(a.dot(b)) for a, b in ((w, w), (g, g), (w, g)))
    difference = w - g
    error = float(difference.dot(difference))
    cosine = product / math.sqrt(signal) / math.sqrt(size) if signal and size else 0.0
    return cosine, 10 * math.log10(max(signal, 1e-300) / error) if error else math.inf


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the real value of each node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.program = program
        self.result = output_nodes(program.module)[0]
        self.found: dict[str, LayerValue] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor):
            real = self._real(n, value)
            if real is not None:
                self.found[origin_of(n)] = LayerValue(layer_of(n), real)
            if n is self.result and value.dtype.is_floating_point:
                self.found[OUTPUT] = LayerValue(OUTPUT, value)
        return value

    def _real(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        if value.dtype.is_floating_point:
            return None if is_call(node, edgec.dequantize.default) else value
        grid = code_grid(self.program, node)
        if value.dtype == torch.int8 and grid is not None:
            return (value.to(torch.float32) - grid[1]) * grid[0]
        return None
