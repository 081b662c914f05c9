"""Vectors of a kernel's TIR taken apart, for C, which has none.

The templates of `edgec.targets.kernels` write vectors as ramps, broadcasts and shuffles. A store of n lanes becomes n
stores; where the value reads the buffer that they change, all lanes are computed first.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm.ir.prim.expr import BinaryOpExpr

from edgec.targets.tir import tirx


def scalarise(function: Any) -> Any:
    """The function with scalars only; a bound vector becomes a variable for each lane."""
    bound: dict[Any, list[Any]] = {}

    def on_bind(statement: Any) -> Any:
        count = lanes(statement.value)
        if count == 1:
            return statement
        values = [lane(statement.value, i, bound) for i in range(count)]
        names = [tirx.Var(f"{statement.var.name}_{i}", str(v.ty.dtype)) for i, v in enumerate(values)]
        bound[statement.var] = names
        return tirx.SeqStmt([tirx.Bind(n, v) for n, v in zip(names, values, strict=True)])

    def on_store(statement: Any) -> Any:
        count = max(lanes(statement.value), *(lanes(k) for k in statement.indices))
        if count == 1:
            value = lane(statement.value, 0, bound)
            return tirx.BufferStore(statement.buffer, value, statement.indices)
        values = [lane(statement.value, i, bound) for i in range(count)]
        places = [[lane(k, i, bound) for k in statement.indices] for i in range(count)]
        before = []
        if _reads(statement.value, statement.buffer):
            names = [tirx.Var(f"lane{i}", str(v.ty.dtype)) for i, v in enumerate(values)]
            before = [tirx.Bind(n, v) for n, v in zip(names, values, strict=True)]
            values = names
        stores = [tirx.BufferStore(statement.buffer, v, p) for v, p in zip(values, places, strict=True)]
        return tirx.SeqStmt([*before, *stores])

    body = tvm_ffi.structural_map(function.body, [(tirx.Bind, on_bind), (tirx.BufferStore, on_store)], order="post")
    return function.with_body(body)


def lanes(value: Any) -> int:
    """Lanes of an expression; 1 for a scalar."""
    return int(getattr(value.ty.dtype, "lanes", 1))


def lane(value: Any, i: int, bound: dict[Any, Any]) -> Any:
    """The scalar in lane `i` of an expression, without vectors inside. bound: what stands for a vector variable: its
    lanes, or its value."""
    down = lambda v: lane(v, i, bound)  # noqa: E731
    if isinstance(value, tirx.Broadcast):
        return lane(value.value, 0, bound)
    if isinstance(value, tirx.Ramp):
        return lane(value.base, 0, bound) + value.stride * i
    if isinstance(value, tirx.Shuffle):
        place = int(value.indices[i])
        for vector in value.vectors:
            if place < lanes(vector):
                return lane(vector, place, bound)
            place -= lanes(vector)
        raise ValueError(f"shuffle takes lane {value.indices[i]} of {len(value.vectors)} vectors")
    if isinstance(value, tirx.Let):
        if lanes(value.value) > 1:
            return lane(value.body, i, {**bound, value.var: value.value})
        return tirx.Let(value.var, lane(value.value, 0, bound), down(value.body))
    if isinstance(value, tvm.ir.Var):
        known = bound.get(value)
        if known is None:
            return value
        return known[i] if isinstance(known, list) else lane(known, i, bound)
    if isinstance(value, tvm.ir.TensorLoad):
        return tirx.BufferLoad(value.source, [lane(k, i if lanes(k) > 1 else 0, bound) for k in value.indices])
    if isinstance(value, BinaryOpExpr) or (hasattr(value, "a") and hasattr(value, "b")):
        return type(value)(down(value.a), down(value.b))
    if isinstance(value, tirx.Not):
        return tirx.Not(down(value.a))
    if isinstance(value, tirx.Cast):
        return tirx.Cast(str(value.ty.dtype).partition("x")[0], down(value.value))
    if isinstance(value, tirx.Select):
        return tirx.Select(down(value.condition), down(value.true_value), down(value.false_value))
    if isinstance(value, tvm.ir.Call):
        arguments = [down(a) if isinstance(a, tvm.ir.Expr) and not _is_text(a) else a for a in value.args]
        return tirx.call_intrin(str(value.ty.dtype).partition("x")[0], value.op, *arguments)
    return value


def _is_text(value: Any) -> bool:
    return not hasattr(value, "ty") or not hasattr(value.ty, "dtype")


def _reads(value: Any, buffer: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, [(tvm.ir.TensorLoad, lambda load: found.append(load.source))], order="pre")
    return any(b.same_as(buffer) for b in found)
