"""Operators without an ONNX form of their own, taken apart into others where they stand in the graph."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from edgec.program import Program, add_weight, get_weight, layer_of, origin_of
from edgec.quiet import quiet

# Under it the nodes that an operator became have the names of the operators that they came from.
CAME_FROM = "edgec_onnx_from"


class Expander:
    """Takes nodes of one graph apart. The batch of a dynamic Program stays a symbol while it does."""

    def __init__(self, program: Program, module: fx.GraphModule) -> None:
        self.program, self.module = program, module
        self.values: dict[fx.Node, Any] = {}
        self.mode: FakeTensorMode | None = None
        self.batch: Any = None

    def expand(self, node: fx.Node) -> fx.Node | None:
        """Replace a call by what its definition calls, and return the first of these; None where it has none."""
        ancestors = (*node.meta.get(CAME_FROM, ()), str(node.target))
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        with quiet(), torch.no_grad():
            self._propagate()
            traced = self._trace(node)
        if self.batch is not None and self.batch.node.maybe_as_int() is not None:
            raise NotImplementedError("its definition holds for one size of the batch only")
        calls = [n for n in traced.graph.nodes if n.op == "call_function"]
        if any(str(n.target) in ancestors for n in calls):
            return None
        return self._inline(node, traced, ancestors)

    def _propagate(self) -> None:
        """Values of all nodes with the batch as a symbol."""
        if self.mode is not None:
            return
        self.mode = mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        batch: Any = None
        inputs = []
        for x in self.program.example_inputs:
            if not self.program.dynamic_batch:
                inputs.append(mode.from_tensor(x))
            elif batch is None:
                kinds = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (x.dim() - 1)]
                context = StatelessSymbolicContext(dynamic_sizes=kinds, constraint_sizes=[None] * x.dim())
                inputs.append(mode.from_tensor(x, symbolic_context=context))
                batch = inputs[0].shape[0]
            else:
                with mode:
                    inputs.append(torch.empty((batch, *x.shape[1:]), dtype=x.dtype))
        self.batch = batch
        keep = _Keep(self.module, mode, self.values)
        with enable_python_dispatcher():
            keep.propagate_dont_convert_inputs(*inputs)

    def _trace(self, node: fx.Node) -> fx.GraphModule:
        """The node's definition as a graph: one placeholder for each tensor and symbol among its arguments."""
        mode = self.mode
        assert mode is not None
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
        values = [self._value(leaves[i]) for i in places]
        target: Any = node.target
        rule = definitions().get(target)

        def run(*given: Any) -> Any:
            filled = list(leaves)
            for place, value in zip(places, given, strict=True):
                filled[place] = value
            args, kwargs = pytree.tree_unflatten(filled, spec)
            if rule is not None:
                found = rule(*args, **kwargs)
                if found is not NotImplemented:
                    return found
            return target(*args, **kwargs)

        with mode, enable_python_dispatcher():
            traced = make_fx(run)(*values)
            if any(_writes(n) for n in traced.graph.nodes):
                traced = make_fx(torch.func.functionalize(run, remove="mutations"))(*values)
        for made in traced.graph.nodes:
            # Whoever writes to what it made itself ends with copies into its inputs, which nothing reads.
            if made.target is torch.ops.aten.copy_.default:
                made.target = torch.ops.aten.copy.default
        traced.graph.eliminate_dead_code()
        return traced

    def _value(self, node: fx.Node) -> Any:
        value = self.values[node]
        if isinstance(value, torch.Tensor) and node.op == "get_attr":
            assert self.mode is not None
            value = self.mode.from_tensor(get_weight(self.module, node), static_shapes=True)
        return value

    def _inline(self, node: fx.Node, traced: fx.GraphModule, ancestors: tuple[str, ...]) -> fx.Node | None:
        graph = self.module.graph
        operands = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
        names: dict[fx.Node, Any] = dict(
            zip((n for n in traced.graph.nodes if n.op == "placeholder"), operands, strict=True)
        )
        first: fx.Node | None = None
        result: Any = None
        with graph.inserting_before(node):
            for old in traced.graph.nodes:
                if old.op == "output":
                    result = fx.map_arg(old.args[0], lambda n: names[n])
                elif old.op == "get_attr":
                    constant = getattr(traced, str(old.target))
                    new = graph.get_attr(add_weight(self.module, "onnx.constant", constant))
                    self.values[new] = new.meta["val"] = constant
                    names[old], first = new, first or new
                elif isinstance(old.target, type):
                    # A tuple with names.
                    parts = old.args[0] if isinstance(old.args[0], (list, tuple)) else old.args
                    names[old] = fx.map_arg(tuple(parts), lambda n: names[n])
                elif old.target is operator.getitem and isinstance(names[old.args[0]], tuple):
                    names[old] = names[old.args[0]][old.args[1]]
                elif old.op == "call_function":
                    new = graph.node_copy(old, lambda n: names[n])
                    self.values[new] = old.meta.get("val")
                    new.meta = {
                        "val": _concrete(old.meta.get("val")),
                        "edgec_layer": layer_of(node),
                        "edgec_origin": origin_of(node),
                        CAME_FROM: ancestors,
                    }
                    names[old], first = new, first or new
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):
                if isinstance(user.args[1], int) and isinstance(result[user.args[1]], fx.Node):
                    user.replace_all_uses_with(result[user.args[1]])
                    graph.erase_node(user)
        following = node.next
        graph.erase_node(node)
        return first or following


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Keep(FakeTensorProp):
    """Keeps values beside the graph, whose own are of a number as the batch."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, values: dict[fx.Node, Any]) -> None:
        super().__init__(module, mode)
        self.values = values

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = value = fx.Interpreter.run_node(self, n)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_function(target, args, kwargs)
        except UnsupportedOperatorException:
            rule = definitions().get(target)
            if rule is None:
                raise
            with self._mode:
                return rule(*args, **kwargs)


def _concrete(value: Any) -> Any:
    """A value with numbers for symbols, as `Program` keeps them."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            with FakeTensorMode(allow_non_fake_inputs=True):
                return torch.empty([_hint(n) for n in leaf.shape], dtype=leaf.dtype)
        return _hint(leaf) if isinstance(leaf, torch.SymInt) else leaf

    return pytree.tree_map(one, value)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


@functools.cache
def definitions() -> dict[Any, Callable[..., Any]]:
    """Rules by operator: this compiler's where it has one, else torch's. Composite operators need none."""
    from torch._decomp import core_aten_decompositions

    from edgec import recurrentops
    from edgec.lowering.decompositions import decompositions

    own = decompositions()
    aten = torch.ops.aten
    # torch's own go by way of operators that have no fake tensors.
    fakes = {
        getattr(aten, name).default: functools.partial(_first, own[getattr(aten, f"{name}_cachemask").default])
        for name in ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine")
    }
    known = dict(core_aten_decompositions().items())
    loops = {getattr(torch.ops.edgec, n).default: getattr(recurrentops, f"_plain_{n}") for n in ("lstm", "gru", "rnn")}
    return {**known, **own, **loops, **fakes}


def _first(rule: Callable[..., Any], *arguments: Any) -> Any:
    return rule(*arguments)[0]
