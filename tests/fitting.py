"""A planner for region graphs that needs no kernels: the memory of the network's values alone."""

from __future__ import annotations

from torch import fx

from edgec.lowering.memory import inplace_operands, is_view
from edgec.plan import Plan, PlanBuilder
from edgec.program import Program, layer_of, origin_of, output_nodes, shape_of


def plan_of(program: Program) -> Plan:
    """The Plan of a graph in which every call is a kernel without scratch memory."""
    builder = PlanBuilder("net")
    names: dict[fx.Node, str] = {}
    for spec, node in zip(program.inputs, [n for n in program.graph.nodes if n.op == "placeholder"], strict=True):
        names[node] = builder.add_input(spec.name, spec.shape, spec.dtype)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        read = [a for a in node.all_input_nodes if a in names]
        if is_view(node):
            names[node] = builder.alias(names[read[0]], shape_of(node))
            continue
        names[node] = builder.add_temp(shape_of(node), str(node.meta["val"].dtype).removeprefix("torch."))
        builder.add_step(
            str(node.target),
            [*(names[a] for a in read), names[node]],
            layer=layer_of(node),
            origin=origin_of(node),
            inplace=[read.index(a) for a in inplace_operands(node) if a in read],
        )
    for spec, node in zip(program.outputs, output_nodes(program.module), strict=True):
        builder.add_output(spec.name, names[node], spec.shape, spec.dtype)
    return builder.finish()
