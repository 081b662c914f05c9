"""Graphs written anew without what no pass and no kernel knows: PyTorch's recurrent layers, complex numbers, loops.

The graph is run by an interpreter while torch.export looks on. Ordinary operators are called as they are; a node with a
rule is what its rule calls instead. Values of complex tensors are pairs of real ones on the way (`Pair`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback as fx_traceback
from torch.utils._pytree import tree_leaves, tree_unflatten

from edgec.errors import EdgecError
from edgec.importing import control_flow, library, linalg, recurrent, sampling, special
from edgec.importing.pairs import TRANSFORMS, Pair, call_pairs, has_pairs, makes_pairs
from edgec.importing.standin import StandIn
from edgec.origin import first_line, layer_name, place, source_line
from edgec.program import MAX_BATCH, integer_example, placeholders

Rule = Callable[..., Any]
RULES: Mapping[Any, Rule] = {
    **recurrent.RULES,
    **control_flow.RULES,
    **sampling.RULES,
    **linalg.RULES,
    **special.RULES,
}


def rewrite(exported: torch.export.ExportedProgram, name: str) -> torch.export.ExportedProgram:
    """An equal program in which no operator with a rule is left; the program itself when it has none.

    Inputs keep their names, and become positional. Raises EdgecError that names the operator and its place.
    """
    if not any(_needs_rule(node) for graph in graphs(exported.graph_module) for node in graph.nodes):
        return exported
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())
    (out,) = [n for n in module.graph.nodes if n.op == "output"]
    out.args = (tuple(tree_leaves(out.args[0])),)
    trips = control_flow.trip_counts(module, name)
    inputs, shapes = _examples(exported, module, name)
    wrapper = _stand_in(module, exported.call_spec.out_spec, trips, name)
    with torch.no_grad():
        # The first run makes the constants that rules need; export then finds them registered.
        wrapper(*inputs)
        try:
            return torch.export.export(wrapper, inputs, dynamic_shapes=shapes)
        except EdgecError:
            raise
        except Exception as error:
            hint = "export it with a static batch of one" if shapes else "report this as an error of edgec"
            raise EdgecError(f"does not export: {first_line(error)}", where=name, hint=hint) from error


def _stand_in(module: fx.GraphModule, out: Any, trips: Mapping[fx.Node, int], name: str) -> nn.Module:
    """The module of a graph, run by rules. It has the same weights under the same names."""
    parts = copy.copy(module)
    # Graphs of loops and branches are written out by the rules.
    parts._modules = {n: m for n, m in module._modules.items() if not isinstance(m, fx.GraphModule)}

    def run(*inputs: torch.Tensor) -> Any:
        with fx_traceback.preserve_node_meta():
            results = Rewriter(module, wrapper, trips, name).run(*inputs)
        return tree_unflatten(list(results), out)

    wrapper = StandIn(parts, [n.name for n in placeholders(module)], run)
    return wrapper


def graphs(module: fx.GraphModule) -> Iterator[fx.Graph]:
    """The graph of a module, and those of the loops and branches in it."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield part.graph


def _needs_rule(node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr", "call_function"):
        values = [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
        if any(v.is_complex() for v in values) and not (node.op == "placeholder" and node.users == {}):
            return True
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        # `_functional` of the front end takes these away too.
        return False
    if node.op != "call_function":
        return False
    tables = (RULES, TRANSFORMS, recurrent.REFUSED)
    return any(node.target in table for table in tables) or library.rule_of(node.target) is not None


def _examples(
    exported: torch.export.ExportedProgram, module: fx.GraphModule, name: str
) -> tuple[tuple[torch.Tensor, ...], Any]:
    """(inputs of the shapes that the graph was exported with, their dynamic shapes)."""
    inputs, shapes = [], []
    dim = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    for position, node in enumerate(placeholders(module)):
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            raise EdgecError(
                f"input is a {type(value).__name__}, not a tensor",
                where=f"input '{node.name}' of {name}",
                hint="export the model with tensor inputs only",
            )
        if value.is_complex():
            raise EdgecError(
                f"is {value.dtype}",
                where=f"input '{node.name}' of {name}",
                hint="take real and imaginary parts as two inputs, or as an axis of two with torch.view_as_complex",
            )
        dynamic = [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)]
        sizes = [2 if axis in dynamic else int(size) for axis, size in enumerate(value.shape)]
        real = value.dtype.is_floating_point
        whole = integer_example(exported, position, sizes, value.dtype)
        inputs.append(torch.rand(sizes, dtype=value.dtype) if real else whole)
        shapes.append({0: dim} if dynamic == [0] else dict.fromkeys(dynamic, torch.export.Dim.AUTO))
    return tuple(inputs), tuple(shapes) if any(shapes) else None


class Rewriter(fx.Interpreter):
    """Runs a graph by rules; `owner` keeps the constants that they make. trips: the counts of the loops in it."""

    def __init__(self, module: fx.GraphModule, owner: nn.Module, trips: Mapping[fx.Node, int], model: str) -> None:
        super().__init__(module, garbage_collect_values=True)
        # An error is one line; the interpreter would add the node and its traceback.
        self.extra_traceback = False
        self.owner, self.trips, self.model = owner, trips, model
        self.node: Any = None

    def error(self, what: str, hint: str) -> EdgecError:
        return EdgecError(what, where=f"{self.model} ({place(self.node)})", hint=hint)

    def inner(self, module: fx.GraphModule, *operands: Any) -> Any:
        """The results of the graph of a loop or branch, by the same rules."""
        return Rewriter(module, self.owner, self.trips, self.model).run(*operands)

    def constant(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor that is computed once and stored with the model."""
        if name not in self.owner._buffers:
            self.owner.register_buffer(name, make())
        return self.owner._buffers[name]  # type: ignore[return-value]

    @contextlib.contextmanager
    def layer(self, suffix: str = "") -> Iterator[None]:
        """Nodes made in here belong to the layer of the node at hand, or to a part of it."""
        known = layer_name(self.node)
        path = ".".join(p for p in (known, suffix) if p)
        marks = {"edgec_layer": path, "edgec_source": source_line(self.node)}
        before = fx_traceback.current_meta
        fx_traceback.current_meta = {**before, "custom": {k: v for k, v in marks.items() if v}}
        try:
            yield
        finally:
            fx_traceback.current_meta = before

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        if n.op not in ("call_function", "get_attr"):
            return super().run_node(n)
        with self.layer():
            return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, torch.Tensor) and value.is_complex():
            name = str(target).replace(".", "_")
            parts = [
                self.constant(f"{name}_{part}", lambda part=part: getattr(value, part).detach().clone())
                for part in ("real", "imag")
            ]
            return Pair(*parts)
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in recurrent.REFUSED:
            raise self.error(*recurrent.REFUSED[target])
        rule = RULES.get(target) or library.rule_of(target)
        if rule is not None:
            return rule(self, *args, **kwargs)
        if has_pairs((args, kwargs)) or makes_pairs(target, self.node):
            return call_pairs(self, target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        if has_pairs(args):
            raise self.error("returns a complex tensor", "return torch.view_as_real of it")
        return super().output(target, args, kwargs)
