"""Where two Programs, or two bundles, part: layer by layer, on the same samples.

Layers are matched by the user's layer name (`layer_of`), which every pass keeps, so that a float convolution and the
integer convolution that replaced it are compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edgec.program import Program, code_grid, is_call, layer_of, output_nodes

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


def layer_outputs(program: Program, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The real-valued output of every layer, by layer name; integer codes are dequantised with their QParams.

    A layer made of several nodes (convolution, batch norm, activation have names of their own) keeps its last one.
    """
    recorder = _Recorder(program)
    recorder.run(*inputs)
    return recorder.found


def compare_layers(a: Program, b: Program, dataset: Dataset, samples: int = SAMPLES) -> list[LayerDifference]:
    """One row per layer that both Programs have, in the order of `a`, and one for the output."""
    inputs = sample_inputs(dataset, samples)
    return compare_outputs(layer_outputs(a, inputs), layer_outputs(b, inputs))


def sample_inputs(dataset: Dataset, samples: int = SAMPLES) -> tuple[torch.Tensor, ...]:
    """One batch of the first samples."""
    arrays, _ = dataset.read(slice(0, samples))
    return tuple(torch.from_numpy(x) for x in arrays)


def compare_outputs(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[LayerDifference]:
    """One row per layer that both sides have with the same shape, in the order of `left`."""
    rows = []
    for layer, want in left.items():
        got = right.get(layer)
        if got is not None and got.shape == want.shape:
            rows.append(LayerDifference(layer, *fidelity(want, got)))
    return rows


def worst_layers(a: Program, b: Program, dataset: Dataset) -> list[LayerDifference]:
    """Layers sorted by the SQNR they lose against the layer before: where error enters, not where it arrives."""
    rows = compare_layers(a, b, dataset)
    entering = []
    before = math.inf
    for row in rows:
        entering.append((row.sqnr_db - min(before, 100.0), row))
        before = row.sqnr_db
    return [row for _, row in sorted(entering, key=lambda item: item[0]) if row.layer != "output"]


def fidelity(want: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """(cosine, SQNR in dB); identical tensors have an SQNR of infinity."""
    w, g = want.double().flatten(), got.double().flatten()
    cosine = float(torch.nn.functional.cosine_similarity(w, g, dim=0)) if w.norm() and g.norm() else float(w.equal(g))
    error = float((w - g).square().sum())
    if error == 0.0:
        return cosine, math.inf
    return cosine, 10 * math.log10(max(float(w.square().sum()), 1e-300) / error)


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the last tensor of each layer."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.program = program
        self.results = set(output_nodes(program.module))
        self.found: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor):
            real = self._real(n, value)
            if real is not None:
                self.found[layer_of(n)] = real
                if n in self.results:
                    self.found["output"] = self.found.pop("output", real)
        return value

    def _real(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor | None:
        if value.dtype.is_floating_point:
            return None if is_call(node, edgec.dequantize.default) and node not in self.results else value
        grid = code_grid(self.program, node)
        if value.dtype == torch.int8 and grid is not None:
            return (value.to(torch.float32) - grid[1]) * grid[0]
        return None
