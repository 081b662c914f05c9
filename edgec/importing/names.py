"""What torch.export leaves in a program that others trip over: names of weights, assertions, empty operands."""

from __future__ import annotations

import functools

import torch
from torch import fx, nn

aten = torch.ops.aten
PADS = (aten.pad.default, aten.constant_pad_nd.default)
ASSERTIONS = (
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


@functools.cache
def _taken() -> frozenset[str]:
    """Attributes of every graph module: no weight of the model itself can have such a name in one."""
    return frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


def rename_taken(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, with an underscore behind names such as `graph` and `code` of its parts; changed in place."""
    signature = exported.graph_signature
    known = {str(spec.target) for spec in (*signature.input_specs, *signature.output_specs) if spec.target}
    first = {path.partition(".")[0] for path in known}
    renamed: dict[str, str] = {}
    for name in first & _taken():
        new = f"{name}_"
        while new in first:
            new += "_"
        renamed.update({p: new + p[len(name) :] for p in known if p.partition(".")[0] == name})
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target in renamed:
            spec.target = renamed[spec.target]
    for table in (exported.state_dict, exported.constants):
        for name, new in renamed.items():
            if name in table:
                table[new] = table.pop(name)
    return exported


def drop_assertions(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without checks of sizes and values while it runs, which no device makes; changed in place.

    They also hold for the batches of the export only, and a batch of one is run later.
    """
    graph = exported.graph
    found = [n for n in graph.nodes if n.op == "call_function" and n.target in ASSERTIONS and not n.users]
    for node in found:
        graph.erase_node(node)
    if found:
        graph.eliminate_dead_code()
        exported.graph_module.recompile()
    return exported


def drop_empty(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with nothing joined to a tensor, and no border of width zero around one; changed in place.

    Caches begin as `torch.tensor([])`, which PyTorch takes as an operand of any concatenation; networks with options
    join what is in front of a token even if nothing is, and those that take maps of any size pad what fits already.
    """
    graph = exported.graph
    outputs = {n for o in graph.nodes if o.op == "output" for n in o.all_input_nodes}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.cat.default:
            parts = [x for x in node.args[0] if 0 not in [n for n in x.meta["val"].shape if isinstance(n, int)]]
            # The type of nothing takes part in that of the result.
            same = all(x.meta["val"].dtype == node.meta["val"].dtype for x in parts)
            if same and 0 < len(parts) < len(node.args[0]):
                node.args = (parts, *node.args[1:])
        elif node.target in PADS and not any(node.args[1]) and node not in outputs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return exported
