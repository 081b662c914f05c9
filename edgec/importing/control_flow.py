"""Loops and branches of torch.while_loop, torch.scan, torch.cond and map, written out.

A loop is unrolled when its number of turns follows from constants of the graph and the result is not too long. A branch
whose condition is constant is taken; else both are computed and the result is chosen, element by element.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from edgec.errors import EdgecError
from edgec.importing.pairs import has_pairs
from edgec.origin import place

hop = torch.ops.higher_order

# Nodes of all turns of a loop together: more make graphs that take minutes to compile.
MAX_NODES = 2000


class _Unknown:
    """What depends on the inputs of the model."""


UNKNOWN = _Unknown()


def trip_counts(module: fx.GraphModule, name: str) -> dict[fx.Node, Any]:
    """For each while_loop in a graph its number of turns, for each cond with a constant condition that condition.

    Everything that follows from weights and constants alone is computed; the rest is unknown. Raises EdgecError for a
    loop whose end depends on an input, or that is too long to be written out.
    """
    found: dict[fx.Node, Any] = {}
    targets = {n.target for part in module.modules() if isinstance(part, fx.GraphModule) for n in part.graph.nodes}
    if targets & {hop.while_loop, hop.cond}:
        with torch.no_grad():
            _Constants(module, found, name).run(*[UNKNOWN for n in module.graph.nodes if n.op == "placeholder"])
    return found


class _Constants(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, found: dict[fx.Node, Any], name: str) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False
        self.found, self.name = found, name
        self.node: Any = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is hop.while_loop:
            return self._loop(*args, **kwargs)
        if target is hop.cond:
            return self._branch(*args)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return UNKNOWN
        leaves = tree_leaves((args, kwargs))
        if target is operator.getitem and not isinstance(args[0], _Unknown):
            return args[0][args[1]]
        if any(isinstance(value, _Unknown) for value in leaves):
            value = self.node.meta.get("val")
            # The size of a tensor is known even where its elements are not.
            return value if isinstance(value, (int, float, bool)) else UNKNOWN
        mutable = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        mutable = mutable and target is not torch.ops.aten.detach_.default
        return UNKNOWN if mutable else super().call_function(target, args, kwargs)

    def _inner(self, module: fx.GraphModule, operands: Any) -> Any:
        result = _Constants(module, self.found, self.name).run(*operands)
        return result

    def _record(self, value: Any) -> None:
        if self.found.setdefault(self.node, value) != value:
            raise self._error("runs for another number of turns each time that the loop around it turns")

    def _error(self, what: str) -> EdgecError:
        return EdgecError(
            f"{self.node.target.name()} '{self.node.name}' {what}",
            where=f"{self.name} ({place(self.node)})",
            hint="give the loop a fixed number of turns, or write it in Python, where torch.export unrolls it",
        )

    def _loop(self, cond: Any, body: Any, carried: Any, extra: Any = ()) -> Any:
        state, turns, nodes = tuple(carried), 0, _size(body)
        while True:
            (go,) = tree_leaves(self._inner(cond, (*state, *extra)))
            if isinstance(go, _Unknown):
                raise self._error("has no fixed number of turns: when it ends depends on an input")
            if not bool(go):
                break
            turns += 1
            if turns * nodes > MAX_NODES:
                raise self._error(f"is too long to be written out: more than {MAX_NODES} operators")
            state = tuple(self._inner(body, (*state, *extra)))
        self._record(turns)
        return state

    def _branch(self, condition: Any, yes: Any, no: Any, operands: Any = ()) -> Any:
        if isinstance(condition, _Unknown):
            for part in (yes, no):
                self._inner(part, operands)
            return tuple(UNKNOWN for _ in self.node.meta["val"])
        self._record(bool(condition))
        return self._inner(yes if bool(condition) else no, operands)


def _size(module: fx.GraphModule) -> int:
    return max(1, sum(n.op == "call_function" for n in module.graph.nodes))


def _while_loop(run: Any, cond: Any, body: Any, carried: Any, extra: Any = ()) -> Any:
    state = tuple(carried)
    for _ in range(run.trips[run.node]):
        state = tuple(run.inner(body, *state, *extra))
    return state


def _cond(run: Any, condition: Any, yes: Any, no: Any, operands: Any = ()) -> Any:
    if run.node in run.trips:
        return run.inner(yes if run.trips[run.node] else no, *operands)
    first, second = (tuple(run.inner(part, *operands)) for part in (yes, no))
    if has_pairs((first, second)):
        raise run.error("torch.cond chooses between complex tensors", "choose between real and imaginary parts")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise run.error(
                f"torch.cond chooses between results of different form, {_form(a)} and {_form(b)}",
                "give both branches results of one shape and type",
            )
    return tuple(torch.where(condition, a, b) for a, b in zip(first, second, strict=True))


def _form(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _turns(run: Any, body: Any, xs: Any) -> int:
    turns = tree_leaves(xs)[0].shape[0]
    if not isinstance(turns, int):
        raise run.error(
            f"{run.node.target.name()} has no fixed number of turns: it walks over a dynamic axis",
            "export with a static size",
        )
    if turns * _size(body) > MAX_NODES:
        raise run.error(
            f"{run.node.target.name()} of {turns} turns is too long to be written out: more than {MAX_NODES} operators",
            "use a recurrent layer of PyTorch, or fewer and larger steps",
        )
    return turns


def _scan(run: Any, body: Any, init: Any, xs: Any, extra: Any = ()) -> Any:
    state, collected, count = tuple(init), [], len(init)
    for t in range(_turns(run, body, xs)):
        results = tuple(run.inner(body, *state, *[x[t] for x in xs], *extra))
        state = results[:count]
        collected.append(results[count:])
    return (*state, *[torch.stack(list(parts)) for parts in zip(*collected, strict=True)])


def _map(run: Any, body: Any, xs: Any, extra: Any = ()) -> Any:
    turns = [tree_flatten(run.inner(body, *[x[t] for x in xs], *extra)) for t in range(_turns(run, body, xs))]
    stacked = [torch.stack(list(parts)) for parts in zip(*[leaves for leaves, _ in turns], strict=True)]
    return tree_unflatten(stacked, turns[0][1])


def _without_gradients(run: Any, enabled: bool, body: Any, *operands: Any) -> Any:
    return run.inner(body, *operands)


RULES: Mapping[Any, Callable[..., Any]] = {
    hop.while_loop: _while_loop,
    hop.cond: _cond,
    hop.scan: _scan,
    hop.map_impl: _map,
    hop.wrap_with_set_grad_enabled: _without_gradients,
}
