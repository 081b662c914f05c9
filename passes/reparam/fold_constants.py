"""Constant folding: what a graph computes from its weights alone is computed once, here."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgec.passbase import Context, Pass
from edgec.program import Program, get_weight, layer_of, shape_of, weight_node
from edgec.sparsity import Sparsity

# A folded tensor may be this many times larger than what it is computed from (positions to kernels: 17x17 taps from
# some dozens), or have this many elements: a mask or a table of zeros is cheaper to make than to store.
GROWTH = 64
FREE_ELEMENTS = 65536


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace subgraphs that depend on weights only by their value: weight normalisation, kernels assembled from
    differences, positions or factors, position tables that are added up.

    The generic part under every exact re-parameterisation: Chen et al., "DEA-Net: Single image dehazing based on
    detail-enhanced convolution and content-guided attention"; Khalfaoui-Hassani et al., "Dilated convolution with
    learnable spacings".
    """

    name: ClassVar[str] = "fold-constants"

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with the subgraphs replaced, or `program` itself when there are none."""
        module = program.edit()
        folded = fold_constants(module, program, context)
        return program.replace(module) if folded else program


def fold_constants(module: fx.GraphModule, program: Program, context: Context) -> int:
    """Fold in place; returns the number of new weights.

    What pruned weights feed is left alone and reported, because the masks would lose their weights.
    """
    masked = {path for path, record in program.annotations.items() if isinstance(record, Sparsity)}
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in masked:
            values[node] = get_weight(module, node)
        elif _is_pure(node) and all(a in values for a in node.all_input_nodes):
            values[node] = _evaluate(node, values)
        elif _is_pure(node) and all(a.op == "get_attr" or a in values for a in node.all_input_nodes):
            context.skip(layer_of(node), "constant not folded", "it depends on a pruned weight")
    count = 0
    for node, value in values.items():
        used = any(user not in values for user in node.users)
        if node.op == "get_attr" or not used or not _worth_storing(node, value):
            continue
        with module.graph.inserting_before(node):
            made = weight_node(module, _path(node), value.contiguous())
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in values)
        count += 1
    module.graph.eliminate_dead_code()
    return count


def _is_pure(node: fx.Node) -> bool:
    """A call whose result depends on its arguments only, and changes none of them."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in ("aten", "prims") and not target._schema.is_mutable and not random


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[misc]
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    # Views share their memory with a weight.
    return result.clone() if isinstance(result, torch.Tensor) else result


def _worth_storing(node: fx.Node, value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    sources = sum(_numel(a) for a in _leaves(node))
    return value.numel() <= max(FREE_ELEMENTS, GROWTH * sources)


def _leaves(node: fx.Node) -> set[fx.Node]:
    """The weights under a node."""
    found: set[fx.Node] = set()
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        if current.op == "get_attr":
            found.add(current)
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return found


def _numel(node: fx.Node) -> int:
    count = 1
    for size in shape_of(node):
        count *= size
    return count


def _path(node: fx.Node) -> str:
    """A name beside the first weight under the node, so that users know where it belongs."""
    owner = min((str(leaf.target).rpartition(".")[0] for leaf in _leaves(node)), default="")
    return f"{owner}.{node.name}_folded" if owner else f"{node.name}_folded"
