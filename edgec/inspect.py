"""`edgec inspect`: what a model is made of, and what will become integer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgec.cost import Cost, LayerRow, layer_rows, op_name, program_cost
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.annotate import annotate
from edgec.passes.quantization.operators import make_functional
from edgec.program import Program, TensorSpec, layer_of


@dataclass(frozen=True)
class ModelSummary:
    """inputs and outputs, cost for one sample, one row per computing node, and what quantise-int8 would do to it.

    integer: see `integer_rows`.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cost: Cost
    rows: tuple[LayerRow, ...]
    integer: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is kept of pruned weights is there where some are."""
        cost, layers = self.cost.to_json(), [asdict(r) for r in self.rows]
        if self.cost.kept_params == self.cost.params:
            cost = {key: value for key, value in cost.items() if not key.startswith("kept_")}
            layers = [{key: value for key, value in row.items() if key != "density"} for row in layers]
        return {
            "name": self.name,
            "inputs": [asdict(s) for s in self.inputs],
            "outputs": [asdict(s) for s in self.outputs],
            "cost": cost,
            "layers": [{**r, "integer": i} for r, i in zip(layers, self.integer, strict=True)],
        }


def inspect_model(model: Any, *, input_shape: tuple[int, ...] | None = None) -> ModelSummary:
    """Read a model and summarise it; nothing is compiled. Raises EdgecError for bad input."""
    program = load_model(model, input_shape=input_shape)
    rows = tuple(layer_rows(program))
    return ModelSummary(
        program.name, program.inputs, program.outputs, program_cost(program), rows, integer_rows(program)
    )


def integer_rows(program: Program) -> tuple[str, ...]:
    """For each row of `layer_rows`, what `fold-bn, quantize-int8` turns it into on this model: "int8", "folded" or
    "float: reason"."""
    folded = FoldBN().run(program, Context())
    module = folded.edit()
    make_functional(module)
    annotation = annotate(module, lambda layer: False)
    left = {(layer_of(n), op_name(n)) for n in module.graph.nodes if n.op == "call_function"}
    integer = {(layer_of(n), op_name(n)) for n in annotation.kinds}
    reasons = {(layer, op): reason for layer, op, reason in annotation.skipped}
    found = []
    for row in layer_rows(program):
        key = (row.layer, row.op.rstrip("_"))
        if key in integer:
            found.append("int8")
        elif row.op == "batch_norm" and key not in left:
            found.append("folded")
        else:
            found.append(f"float: {reasons[key]}" if key in reasons else "float")
    return tuple(found)
