"""If, Loop and Scan of ONNX, written out as `edgec.importing.control_flow` does it for PyTorch's loops and branches.

A branch whose condition is known is taken; else both are computed and the result is chosen. A loop is unrolled when its
number of turns is known, or at most known: turns after its end then leave the state as it is. Turns may compute with
constants alone, as loops over shapes do; those leave no trace in the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch

from edgec.importing.control_flow import MAX_NODES
from edgec.onnx.module import Node, Static, Value
from edgec.onnx.reader import array_of


def results_of(node: Node, values: dict[str, Value], depth: int) -> list[Value] | None:
    """The results of a node that runs graphs of its own; None for all other operators.

    values: those of the graph around it, which inner graphs may read.
    """
    rule = RULES.get(node.op) if node.proto.domain in ("", "ai.onnx") else None
    return None if rule is None else rule(node, values, depth)


def _run(
    node: Node, body: onnx.GraphProto, given: Sequence[Value], values: dict[str, Value], depth: int
) -> list[Value]:
    inner = {**values, **{t.name: Static(array_of(t), t.name) for t in body.initializer}}
    inner.update({port.name: value for port, value in zip(body.input, given, strict=True)})
    node.graph.run_graph(body, inner, f"{node.path or node.name}/", depth + 1)
    return [inner[output.name] for output in body.output]


def _size(body: onnx.GraphProto) -> int:
    """Nodes of a graph and of those in it."""
    return sum(1 + sum(_size(a.g) for a in n.attribute if a.HasField("g")) for n in body.node)


def _check_turns(node: Node, body: onnx.GraphProto, turns: int) -> None:
    if turns * max(1, _size(body)) > MAX_NODES:
        raise node.refuse(
            f"of {turns} turns is too long to be written out: more than {MAX_NODES} operators",
            "use a recurrent operator of ONNX, or fewer and larger steps",
        )


# -- If ----------------------------------------------------------------------------------------------------------------


def _if(node: Node, values: dict[str, Value], depth: int) -> list[Value]:
    branches = [node.attr("then_branch"), node.attr("else_branch")]
    if node.is_static(0):
        chosen = branches[0 if bool(node.static(0, "condition").reshape(-1)[0]) else 1]
        return _run(node, chosen, (), values, depth)
    condition = node.x(0).reshape(())
    both = [_run(node, branch, (), values, depth) for branch in branches]
    return [_chosen(node, condition, a, b) for a, b in zip(*both, strict=True)]


def _chosen(node: Node, condition: torch.Tensor, yes: Value, no: Value) -> Value:
    a, b = _tensor(node, yes), _tensor(node, no)
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        raise node.refuse(
            f"chooses between results of different form, {_form(a)} and {_form(b)}",
            "give both branches results of one shape and type, or fix the condition when exporting",
        )
    return torch.where(condition, a, b)


def _tensor(node: Node, value: Value) -> torch.Tensor:
    if isinstance(value, list) or value is None:
        raise node.refuse("returns sequences", "return tensors only")
    return node.graph.tensor(value, node.path)


def _form(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


# -- Loop --------------------------------------------------------------------------------------------------------------


def _loop(node: Node, values: dict[str, Value], depth: int) -> list[Value]:
    body: Any = node.attr("body")
    if node.has(0) and not node.is_static(0):
        node.static(0, "number of turns")
    most = int(node.static(0, "number of turns").reshape(-1)[0]) if node.has(0) else None
    go: Value = node.inputs[1] if node.has(1) else Static(np.array(True))
    state, collected = list(node.inputs[2:]), []
    turn = 0
    if most is not None and not _ends_early(body):
        _check_turns(node, body, most)
    while most is None or turn < most:
        known = isinstance(go, Static)
        if known and not bool(go.array.reshape(-1)[0]):
            break
        if not known and (most is None or most * _size(body) > MAX_NODES):
            raise node.refuse(
                "has no fixed number of turns: when it ends depends on an input",
                "give the loop a small number of turns when exporting",
            )
        turn += 1
        _check_turns(node, body, turn)
        # Inside a turn the condition is true.
        results = _run(node, body, [Static(np.array(turn - 1)), Static(np.array(True)), *state], values, depth)
        new = results[1 : 1 + len(state)]
        if known:
            state, go = new, results[0]
        else:
            if len(results) > 1 + len(state):
                node.static(1, "condition, since it collects the results of all turns")
                raise node.refuse(
                    "collects results until a condition on an input ends it", "give it a fixed number of turns"
                )
            running = node.graph.tensor(go, node.path).reshape(())
            state = [_chosen(node, running, a, b) for a, b in zip(new, state, strict=True)]
            go = running & node.graph.tensor(results[0], node.path).reshape(())
        collected.append(results[1 + len(new) :])
    scans = len(body.output) - 1 - len(state)
    if not collected and scans:
        kinds = [output.type.tensor_type for output in body.output[1 + len(state) :]]
        return [*state, *[_empty(node, kind) for kind in kinds]]
    return [*state, *[_stacked(node, [row[i] for row in collected], 0) for i in range(scans)]]


def _ends_early(body: onnx.GraphProto) -> bool:
    """Whether a turn computes its own condition, so that the number of turns is an upper limit only."""
    name = body.output[0].name
    maker = next((n for n in body.node if name in n.output), None)
    while maker is not None and maker.op_type == "Identity":
        name = maker.input[0]
        maker = next((n for n in body.node if name in n.output), None)
    return maker is not None and maker.op_type != "Constant"


def _empty(node: Node, kind: Any) -> Static:
    sizes = [d.dim_value for d in kind.shape.dim]
    if any(not d.HasField("dim_value") for d in kind.shape.dim):
        raise node.refuse("runs no turn, and its results have no shape", "remove the loop when exporting")
    return Static(np.zeros((0, *sizes), onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def _stacked(node: Node, parts: Sequence[Value], axis: int) -> Value:
    if all(isinstance(p, Static) and p.concrete for p in parts):
        return Static(np.stack([p.array for p in parts], axis))
    return torch.stack([_tensor(node, p) for p in parts], axis)


# -- Scan --------------------------------------------------------------------------------------------------------------


def _scan(node: Node, values: dict[str, Value], depth: int) -> list[Value]:
    if node.opset < 9:
        return _scan_of_batches(node, values, depth)
    body: Any = node.attr("body")
    count = int(node.attr("num_scan_inputs"))
    states = len(node.inputs) - count
    outputs = len(body.output) - states
    axes = node.attr("scan_input_axes") or [0] * count
    backwards = node.attr("scan_input_directions") or [0] * count
    return _walk(
        node,
        body,
        (node.inputs[:states], node.inputs[states:]),
        (axes, backwards),
        (node.attr("scan_output_axes") or [0] * outputs, node.attr("scan_output_directions") or [0] * outputs),
        values,
        depth,
    )


def _walk(
    node: Node,
    body: onnx.GraphProto,
    given: tuple[Sequence[Value], Sequence[Value]],
    reading: tuple[Sequence[int], Sequence[int]],
    writing: tuple[Sequence[int], Sequence[int]],
    values: dict[str, Value],
    depth: int,
) -> list[Value]:
    """(states at the end, collected results). given: (states, sequences); reading and writing: (axes, whether from the
    end) of the sequences and of the collected results."""
    state, sequences = list(given[0]), given[1]
    turns = sequences[0].shape[reading[0][0]] if sequences else 0
    if not isinstance(turns, int):
        raise node.refuse("walks over a dynamic axis", "export the model with a static size")
    _check_turns(node, body, turns)
    collected = []
    for t in range(turns):
        steps = [
            _step(node, x, axis, turns - 1 - t if reverse else t)
            for x, axis, reverse in zip(sequences, *reading, strict=True)
        ]
        results = _run(node, body, [*state, *steps], values, depth)
        state = results[: len(state)]
        collected.append(results[len(state) :])
    made = []
    for i, (axis, reverse) in enumerate(zip(*writing, strict=True)):
        column = [row[i] for row in collected]
        made.append(_stacked(node, column[::-1] if reverse else column, axis))
    return [*state, *made]


def _step(node: Node, x: Value, axis: int, place: int) -> Value:
    if isinstance(x, Static):
        return Static(np.take(x.array, place, axis), x.path and f"{x.path}_{place}")
    return _tensor(node, x).select(axis, place)


def _scan_of_batches(node: Node, values: dict[str, Value], depth: int) -> list[Value]:
    """Operator set 8: every operand has the batch first and its sequence second, and the body works on one sample."""
    body: Any = node.attr("body")
    operands = node.inputs[1:]
    count = int(node.attr("num_scan_inputs"))
    states = len(operands) - count
    batch = operands[0].shape[0]
    if node.has(0) or not isinstance(batch, int):
        raise node.refuse("with sequences of several lengths, or a dynamic batch", "export it with operator set 9")
    outputs = len(body.output) - states
    rows = []
    for b in range(batch):
        own = [_step(node, x, 0, b) for x in operands]
        reading = ([0] * count, node.attr("directions") or [0] * count)
        writing = ([0] * outputs, [0] * outputs)
        rows.append(_walk(node, body, (own[:states], own[states:]), reading, writing, values, depth))
    return [_stacked(node, column, 0) for column in zip(*rows, strict=True)]


RULES = {"If": _if, "Loop": _loop, "Scan": _scan}
