"""What a Program costs before code generation: parameters, multiply-accumulates and stored weight bytes.

After lowering the same figures are read from the Plan (`Plan.macs`, `Plan.weight_bytes`), which is the object that
is emitted; the two agree on multiply-accumulates (tested).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgec import qops as qops  # registers the operators looked up below
from edgec import tokenops as tokenops
from edgec.lowering.regions import CONV2D
from edgec.program import Program, layer_of, shape_of
from edgec.quantparams import QParams
from edgec.recurrentops import RECURRENT
from edgec.sparsity import Sparsity, sparsities

aten = torch.ops.aten
edgec = torch.ops.edgec

CONVOLUTIONS = (*CONV2D, aten.conv1d.default, aten.conv3d.default, edgec.qconv2d.default, edgec.qconv2d_float.default)
TRANSPOSED = (aten.conv_transpose2d.input, aten.conv_transpose1d.default)
LINEARS = (aten.linear.default, edgec.qlinear.default, edgec.qlinear_float.default)
MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Cost:
    """params: stored weight elements; macs: multiply-accumulates for one sample; weight_bytes: stored bytes.

    These count the shapes. kept_params, kept_macs: without pruned elements, which is what a sparse kernel stores and
    computes; whether one is used is the lowering's choice.
    """

    params: int
    macs: int
    weight_bytes: int
    kept_params: int
    kept_macs: int

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def program_cost(program: Program) -> Cost:
    """Cost of a Program for a batch of one."""
    weights, records = program.weights(), sparsities(program.annotations)
    macs, kept = [], []
    for node in program.graph.nodes:
        macs.append(node_macs(program, node))
        kept.append(macs[-1] * _density(node, records))
    return Cost(
        params=sum(w.numel() for w in weights.values()),
        macs=sum(macs),
        weight_bytes=sum(stored_bytes(program, path, w) for path, w in weights.items()),
        kept_params=sum(int(records[p].mask.sum()) if p in records else w.numel() for p, w in weights.items()),
        kept_macs=round(sum(kept)),
    )


def stored_bytes(program: Program, path: str, weight: torch.Tensor) -> int:
    """Bytes that a weight takes when it is stored; codes of fewer than 8 bits are counted as packed."""
    record = program.annotations.get(path)
    if isinstance(record, QParams) and weight.dtype == torch.int8:
        return -(-weight.numel() * record.bits // 8)
    return weight.numel() * weight.element_size()


def _density(node: fx.Node, records: Mapping[str, Sparsity]) -> float:
    """Share of the products of a matrix product whose weight is kept; every weight is used equally often."""
    if node.op != "call_function" or len(node.args) < 2:
        return 1.0
    record = records.get(str(node.args[1].target)) if isinstance(node.args[1], fx.Node) else None
    return 1.0 if record is None else record.density


def node_macs(program: Program, node: fx.Node) -> int:
    """Multiply-accumulates of one node for a batch of one; 0 for anything that is not a matrix product."""
    if node.op != "call_function":
        return 0
    batch = program.example_inputs[0].shape[0] if program.dynamic_batch else 1
    return _macs(node) // batch


def _macs(node: fx.Node) -> int:
    if node.target in CONVOLUTIONS:
        weight = shape_of(_node(node.args[1]))
        return math.prod(shape_of(node)) * math.prod(weight[1:])
    if node.target in TRANSPOSED:
        weight = shape_of(_node(node.args[1]))
        return math.prod(shape_of(_node(node.args[0]))) * math.prod(weight[1:])
    if node.target in LINEARS:
        return math.prod(shape_of(node)) * shape_of(_node(node.args[1]))[-1]
    if node.target in MATMULS:
        return math.prod(shape_of(node)) * shape_of(_node(node.args[0]))[-1]
    if node.target is aten.addmm.default:
        return math.prod(shape_of(node)) * shape_of(_node(node.args[1]))[-1]
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = shape_of(_node(node.args[0])), shape_of(_node(node.args[1]))
        return 2 * math.prod(query) * key[-2]
    if node.target in RECURRENT:
        samples, steps, _ = shape_of(_node(node.args[0]))
        weights = [node.args[1], *([node.args[3]] if node.target is edgec.lstm.default else [])]
        return samples * steps * sum(math.prod(shape_of(w)) for w in weights if isinstance(w, fx.Node))
    return _token_macs(node)


def _token_macs(node: fx.Node) -> int:
    """The matrix products of token reduction: similarities, and scores of the class token."""
    if node.target is edgec.tome_merge.default:
        batch, tokens, depth = shape_of(_node(node.args[2]))
        free = tokens - tokenops.tome_start(*map(int, (node.args[4], node.args[5])))  # type: ignore[call-overload]
        return batch * ((free + 1) // 2) * (free // 2) * depth
    if node.target is edgec.token_reduce.default:
        batch, _, channels = shape_of(_node(node.args[0]))
        prefix, keep, merge = (int(value) for value in node.args[3:6])  # type: ignore[arg-type]
        return batch * (keep - merge) * (merge - prefix) * channels
    if node.target is edgec.class_score.default:
        return math.prod(shape_of(_node(node.args[1])))
    return 0


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


@dataclass(frozen=True)
class LayerRow:
    """One row of `edgec inspect`: a graph node that computes something. density: kept share of its weight, 0..1."""

    layer: str
    op: str
    shape: tuple[int, ...]
    macs: int
    weight_bytes: int
    density: float = 1.0


def layer_rows(program: Program) -> list[LayerRow]:
    """One row per computing node, in graph order, for a batch of one."""
    weights, records = program.weights(), sparsities(program.annotations)
    rows = []
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        shape = shape_of(node)
        if program.dynamic_batch and shape and shape[0] == program.example_inputs[0].shape[0]:
            shape = (1, *shape[1:])
        stored = [str(a.target) for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        rows.append(
            LayerRow(
                layer=layer_of(node),
                op=op_name(node),
                shape=shape,
                macs=node_macs(program, node),
                weight_bytes=sum(stored_bytes(program, path, weights[path]) for path in stored),
                density=_density(node, records),
            )
        )
    return rows


def op_name(node: fx.Node) -> str:
    """Operator name without namespace and overload: `aten.conv2d.default` is `conv2d`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))
