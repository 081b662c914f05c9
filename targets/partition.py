"""Loops cut where a condition on their variable changes.

TVM writes a concatenation or a padding as one loop that asks for every element where it comes from. Here each part
becomes a loop of its own, which only copies or fills.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import sym

from edgec.targets.tir import tirx

# A loop is cut into so many parts at most: each has a copy of the body.
PARTS = 32
# A nest is copied so often at most for what is asked before a loop.
HOISTS = 3
COMPARISONS: dict[Any, Callable[[Any, int], Any]] = {
    tirx.LT: operator.lt,
    tirx.LE: operator.le,
    tirx.GT: operator.gt,
    tirx.GE: operator.ge,
    tirx.EQ: operator.eq,
    tirx.NE: operator.ne,
}


def partition(statement: Any, hoists: int = HOISTS) -> Any:
    """An equal statement in which no comparison of a loop variable with a number is left, where that is possible.

    Serial loops are cut in parts, and what a whole loop need not ask each time is asked before it. A parallel loop
    stays whole, as threads share it, and chooses in each iteration.
    """
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([partition(s, hoists) for s in statement.seq])
    if not isinstance(statement, tirx.For):
        return statement
    condition = _invariant(statement) if hoists and statement.kind == tirx.ForKind.SERIAL else None
    if condition is not None:
        yes, no = (
            _loop(
                statement,
                statement.loop_var,
                statement.min,
                statement.extent,
                _folded(statement.body, [(condition, v)]),
            )
            for v in (True, False)
        )
        return tirx.IfThenElse(condition, partition(_fresh(yes), hoists - 1), partition(_fresh(no), hoists - 1))
    parts = _parts(statement)
    if statement.kind == tirx.ForKind.PARALLEL:
        *before, (_, _, body) = parts
        chosen = partition(body, hoists)
        for _, end, body in reversed(before):
            chosen = tirx.IfThenElse(statement.loop_var < end, partition(body, hoists), chosen)
        return _loop(statement, statement.loop_var, statement.min, statement.extent, chosen)
    loops = []
    for begin, end, body in parts:
        loop = _fresh(_loop(statement, statement.loop_var, begin, end - begin, body))
        loops.append(_loop(loop, loop.loop_var, loop.min, loop.extent, partition(loop.body, hoists)))
    return loops[0] if len(loops) == 1 else tirx.SeqStmt(loops)


def _loop(like: Any, variable: Any, begin: Any, extent: Any, body: Any) -> Any:
    return tirx.For(variable, begin, extent, like.kind, body, like.thread_binding, like.annotations, like.step)


def _fresh(loop: Any) -> Any:
    """The loop with another variable: one has one loop."""
    variable = tirx.Var(loop.loop_var.name, loop.loop_var.ty)
    body = _replaced(loop.body, [(tirx.Var, lambda v: variable if v.same_as(loop.loop_var) else v)])
    return _loop(loop, variable, loop.min, loop.extent, body)


def _invariant(loop: Any) -> Any:
    """A comparison inside a loop that is the same in all iterations, or None."""
    inside: list[Any] = [loop.loop_var]
    rules = [(tirx.For, lambda inner: inside.append(inner.loop_var)), (tirx.Bind, lambda b: inside.append(b.var))]
    tvm_ffi.structural_walk(loop.body, rules, order="pre")
    found: list[Any] = []

    def on_comparison(comparison: Any) -> None:
        used: list[Any] = []
        tvm_ffi.structural_walk(comparison, [(tirx.Var, used.append), (tvm.ir.TensorLoad, used.append)], order="pre")
        if used and not any(isinstance(v, tvm.ir.TensorLoad) or any(v.same_as(i) for i in inside) for v in used):
            found.append(comparison)

    tvm_ffi.structural_walk(loop.body, [(kind, on_comparison) for kind in COMPARISONS], order="pre")
    return found[0] if found else None


def _parts(loop: Any) -> list[tuple[Any, Any, Any]]:
    """(begin, end, body) of each part, with the comparisons of the loop's variable replaced by their values in it."""
    whole = [(loop.min, loop.min + loop.extent, loop.body)]
    fixed = isinstance(loop.min, tirx.IntImm) and isinstance(loop.extent, tirx.IntImm) and loop.step is None
    if not fixed or loop.kind not in (tirx.ForKind.SERIAL, tirx.ForKind.PARALLEL):
        return whole
    values = np.arange(int(loop.min), int(loop.min) + int(loop.extent))
    truths = _truths(loop, values)
    if not truths:
        return whole
    changes = np.any([np.diff(t) for _, t in truths], axis=0)
    cuts = [0, *(int(i) + 1 for i in np.flatnonzero(changes)), len(values)]
    if len(cuts) - 1 > PARTS:
        return whole
    kind = str(loop.loop_var.ty.dtype)
    parts = []
    for first, last in itertools.pairwise(cuts):
        known = [(comparison, bool(truth[first])) for comparison, truth in truths]
        begin, end = (tirx.const(int(values[0]) + i, kind) for i in (first, last))
        parts.append((begin, end, _folded(loop.body, known)))
    return parts


def _truths(loop: Any, values: np.ndarray) -> list[tuple[Any, np.ndarray]]:
    """The comparisons in a loop that depend on its variable alone, with their truth for each of its values."""
    found: list[tuple[Any, np.ndarray]] = []

    def on_comparison(comparison: Any) -> None:
        if not str(getattr(comparison.a.ty, "dtype", "")).startswith("int"):
            return
        difference = sym.Analyzer().simplify(comparison.a - comparison.b)
        linear = sym.detect_linear_equation(difference, [loop.loop_var])
        if len(linear) == 2 and all(isinstance(x, tirx.IntImm) for x in linear) and int(linear[0]) != 0:
            truth = COMPARISONS[type(comparison)](values * int(linear[0]) + int(linear[1]), 0)
            found.append((comparison, truth))

    tvm_ffi.structural_walk(loop.body, [(kind, on_comparison) for kind in COMPARISONS], order="pre")
    return found


def _folded(body: Any, known: list[tuple[Any, bool]]) -> Any:
    """`body` with comparisons replaced by their truth, and what is chosen by them alone chosen."""

    def on_comparison(node: Any) -> Any:
        value = next((v for comparison, v in known if comparison.same_as(node)), None)
        return node if value is None else tirx.const(value, "bool")

    def on_and(node: Any) -> Any:
        return _connect(node, stops=False)

    def on_or(node: Any) -> Any:
        return _connect(node, stops=True)

    def on_not(node: Any) -> Any:
        value = _truth(node.a)
        return node if value is None else tirx.const(not value, "bool")

    def on_call(node: Any) -> Any:
        if getattr(node.op, "name", "") != "tirx.if_then_else":
            return node
        value = _truth(node.args[0])
        return node if value is None else node.args[1 if value else 2]

    def on_select(node: Any) -> Any:
        value = _truth(node.condition)
        return node if value is None else node.true_value if value else node.false_value

    def on_if(node: Any) -> Any:
        value = _truth(node.condition)
        if value is None or (not value and node.else_case is None):
            return node
        return node.then_case if value else node.else_case

    return _replaced(
        body,
        [
            *((kind, on_comparison) for kind in COMPARISONS),
            (tirx.And, on_and),
            (tirx.Or, on_or),
            (tirx.Not, on_not),
            (tvm.ir.Call, on_call),
            (tirx.Select, on_select),
            (tirx.IfThenElse, on_if),
        ],
    )


def _connect(node: Any, stops: bool) -> Any:
    """a and b, or a or b, where one operand may be known; `stops`: the value that decides alone."""
    for known, other in ((_truth(node.a), node.b), (_truth(node.b), node.a)):
        if known is not None:
            return tirx.const(stops, "bool") if known == stops else other
    return node


def _truth(condition: Any) -> bool | None:
    return bool(condition.value) if isinstance(condition, tirx.IntImm) else None


def _replaced(statement: Any, rules: list[tuple[Any, Callable[[Any], Any]]]) -> Any:
    return tvm_ffi.structural_map(statement, rules, order="post")
