"""Nested `let` expressions as statements.

Elementary functions name their intermediate values. Where one is applied to the result of another, as in a chain of
activations that was fused into one kernel, names stand inside the values of names. TVM's analysis puts the values in
the place of the names and takes several times as long for each level: ten `tanh` in a row would not compile in hours.
So the values are stored to and read from local memory, which it does not look into, and which LLVM keeps in registers.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi

from edgec.targets.tir import tirx

# Levels that are left as they are: one function, or one inside another.
LEVELS = 2


def flatten_lets(statement: Any) -> Any:
    """An equal statement in which values nested more than LEVELS deep are computed before the store that uses them."""

    def one(store: Any) -> Any:
        if _depth(store.value, {}) <= LEVELS or _is_conditional(store.value):
            return store
        found: dict[Any, Any] = {}

        def lift(let: Any) -> Any:
            found.setdefault(let.var, let.value)
            return let.body

        value = tvm_ffi.structural_map(store.value, [(tirx.Let, lift)], order="post")
        memory = {var: _memory(var) for var in found}

        def read(expression: Any) -> Any:
            return tvm_ffi.structural_map(
                expression, [(tirx.Var, lambda var: memory[var][1] if var in memory else var)], order="post"
            )

        steps: list[Any] = [tirx.AllocBuffer(buffer) for buffer, _ in memory.values()]
        for var in _ordered(found):
            buffer, load = memory[var]
            steps.append(tirx.BufferStore(buffer, read(found[var]), load.indices))
        return tirx.SeqStmt([*steps, tirx.BufferStore(store.buffer, read(value), store.indices)])

    return tvm_ffi.structural_map(statement, [(tirx.BufferStore, one)], order="post")


def _memory(var: Any) -> tuple[Any, Any]:
    """(local buffer for a value of the variable's type, load of all of it)."""
    kind, _, lanes = str(var.ty.dtype).partition("x")
    count = int(lanes or 1)
    buffer = tirx.decl_buffer((count,), kind, name=f"{var.name}_value", scope="local")
    zero = tirx.const(0, "int32")
    return buffer, tirx.BufferLoad(buffer, [tirx.Ramp(zero, 1, count) if count > 1 else zero])


def _depth(value: Any, known: dict[Any, int]) -> int:
    """How many lets stand inside each other's values."""
    inner: list[Any] = []
    tvm_ffi.structural_walk(value, [(tirx.Let, inner.append)], order="pre")
    deepest = 0
    for let in reversed(inner):
        if let.var not in known:
            known[let.var] = 1 + _depth(let.value, known)
        deepest = max(deepest, known[let.var])
    return deepest


def _is_conditional(value: Any) -> bool:
    """Whether a part of it is computed only where a condition holds, and may not be computed otherwise."""
    found: list[Any] = []

    def look(call: Any) -> None:
        if getattr(call.op, "name", "") == "tirx.if_then_else":
            found.append(call)

    tvm_ffi.structural_walk(value, [(tvm.ir.Call, look)], order="pre")
    return bool(found)


def _ordered(found: dict[Any, Any]) -> list[Any]:
    """The variables, each behind those that its value reads."""
    order: dict[Any, None] = {}

    def visit(var: Any) -> None:
        if var in order:
            return
        used: list[Any] = []
        tvm_ffi.structural_walk(found[var], [(tirx.Var, used.append)], order="pre")
        for other in used:
            if other in found and other is not var:
                visit(other)
        order[var] = None

    for var in found:
        visit(var)
    return list(order)
