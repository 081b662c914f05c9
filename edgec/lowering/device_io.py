"""What a microcontroller model takes and gives: codes, channels last, as cameras and microphones deliver them.

The quantisation of an input and the change of its layout are work and memory that a device can save: sensors give
bytes. So they are taken out of the graph and become facts of the input, which the bundle's Python side follows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from edgec.lowering.graph import moves_ones
from edgec.plan import Form
from edgec.program import Program, is_call, output_nodes, placeholders, shape_of

aten = torch.ops.aten
edgec = torch.ops.edgec


def device_io(staged: Program) -> tuple[Program, dict[str, Form]]:
    """(program on the device's own inputs and outputs, what these are, by name).

    staged: a graph of region operators, static. Inputs and outputs that are used as the model has them have no Form.
    """
    module = staged.edit()
    forms: dict[str, Form] = {}
    inputs = list(staged.example_inputs)
    for number, node in enumerate(placeholders(module)):
        form = Form(shape_of(node), _dtype(node))
        while (user := _only(node)) is not None and _absorbs(user, form):
            form = _with(form, user)
            step: Any = user.target
            inputs[number] = step(inputs[number], *user.args[1:])
            node.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(node)
            module.graph.erase_node(user)
        if form.axes is not None or form.scale is not None:
            forms[node.name] = form
    names = [spec.name for spec in staged.outputs]
    found: list[Any] = list(output_nodes(module))
    for number, node in enumerate(found):
        form = Form(shape_of(node), _dtype(node))
        source = node
        while _gives(source, form) and found.count(source) == 1:
            form = _with(form, source, inverse=True)
            source = source.args[0]
        if source is not node and source.op == "call_function":
            forms[names[number]] = form
            found[number] = source
    output = next(n for n in module.graph.nodes if n.op == "output")
    output.args = (tuple(found),) if isinstance(output.args[0], (tuple, list)) else (found[0],)
    module.graph.eliminate_dead_code()
    module.recompile()
    return dataclasses.replace(staged, module=module, example_inputs=tuple(inputs), dynamic_batch=False), forms


def _only(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _absorbs(user: fx.Node, form: Form) -> bool:
    """Whether the step behind an input can be the caller's."""
    if is_call(user, edgec.quantize.default):
        return form.scale is None
    return is_call(user, aten.permute.default) and form.axes is None and not moves_ones(user)


def _gives(node: Any, form: Form) -> bool:
    """Whether the step in front of an output can be the caller's: nothing else may read what it reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if is_call(node, edgec.dequantize.default):
        return form.scale is None
    return is_call(node, aten.permute.default) and form.axes is None and not moves_ones(node)


def _with(form: Form, step: Any, inverse: bool = False) -> Form:
    """The form with a step between model and device taken in; inverse: the step leads from the device to the model."""
    if is_call(step, aten.permute.default):
        order = [int(a) % len(form.shape) for a in step.args[1]]
        return form.permuted(tuple(order.index(a) for a in range(len(order))) if inverse else tuple(order))
    scale, zero_point = step.args[1:3]
    return form.coded(float(scale), int(zero_point))


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")
