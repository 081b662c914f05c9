"""What all kernel templates share: the builder, epilogues and vector helpers.

TIR is written with TVM's IRBuilder from ordinary Python functions: a Python loop unrolls, a `T.serial` loop stays a
loop. Vectors are written as ramps and broadcasts, so what is emitted is what is written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import IRBuilder

from edgec import integer
from edgec.targets.device import Device
from edgec.targets.tir import T, tirx

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class AddEpilogue:
    """Fused integer addition of a residual (specification 1.9, Add) on the kernel's own int8 code.

    m_self, m_other: fixed-point factors with `f` fraction bits of the kernel's result and of the residual.
    """

    m_self: int
    m_other: int
    f: int
    z_self: int
    z_other: int
    z_y: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator before it is stored.

    float32: `act` ("none", "clip" to lo..hi, "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh") after the
    optional residual. int8: requantise, add `y_zp`, clamp to lo..hi, then the optional `add`.
    """

    act: str = "none"
    lo: float = -math.inf
    hi: float = math.inf
    y_zp: int = 0
    residual: bool = False
    add: AddEpilogue | None = None


@contextmanager
def prim_func(name: str, inplace: Sequence[int] = ()) -> Any:
    """Build a PrimFunc; the builder's result is read with `.get()` afterwards."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        attributes: dict[str, Any] = {"tirx.noalias": True}
        if inplace:
            attributes["edgec.inplace"] = list(inplace)
        T.func_attr(attributes)
        yield builder


def param(name: str, shape: Sequence[int], dtype: str) -> Any:
    return T.arg(name, T.buffer(tuple(shape), dtype))


def const(value: float | int, dtype: str, lanes: int = 1) -> Any:
    scalar = tirx.const(value, dtype)
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def vec(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def ramp(base: Any, lanes: int) -> Any:
    return tirx.Ramp(base, 1, lanes) if lanes > 1 else base


def splat(value: Any, lanes: int) -> Any:
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def loop(extent: int, body: Callable[[Any], None]) -> None:
    """A serial loop, or the body alone for a single iteration."""
    if extent == 1:
        body(0)
    elif extent > 1:
        with T.serial(0, extent) as i:
            body(i)


def parallel(extent: int, body: Callable[[Any], None]) -> None:
    """A kernel's outermost loop, whose iterations may run on several threads and in any order; at most `extent` do.

    An iteration may read what loops before this one wrote and may write what no other iteration touches. Memory that it
    needs for itself has scope "local", which is the stack of its thread, or is its own part of a buffer of the kernel:
    buffer[i, ...]. A loop whose iterations write and read the same elements stays serial. A kernel may have several
    such loops, one after the other; the threads meet in between. A loop inside another is serial.
    """
    if extent == 1:
        body(0)
    elif extent > 1:
        with T.parallel(0, extent) as i:
            body(i)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# -- integer epilogue --------------------------------------------------------------------------------------------------


def requantise(acc: Any, m: Any, shift: Any, y_zp: int, lo: int, hi: int, lanes: int, device: Device) -> Any:
    """clamp(RQ1(acc) + y_zp, lo, hi) on int32 vectors, where RQ1 is (int64(acc) * m + 2^(shift-1)) >> shift.

    The result is exact for every int32 accumulator and legal (m, shift): multipliers above one may leave int32, so the
    narrowing saturates (one instruction on NEON and AVX-512) and the clamp comes before the zero point is added.
    """
    if device.is_arm32 and lanes == 4:
        code = _rescale_arm32(acc, m, shift)
    else:
        wide = vec("int64", lanes)
        one = const(1, "int64", lanes)
        amount = shift.astype(wide)
        rounded = acc.astype(wide) * m.astype(wide) + tirx.shift_left(one, amount - one)
        code = clamp(tirx.shift_right(rounded, amount), INT32_MIN, INT32_MAX, "int64", lanes)
        code = code.astype(vec("int32", lanes))
    return clamp(code, lo - y_zp, hi - y_zp, "int32", lanes) + const(y_zp, "int32", lanes)


def _rescale_arm32(acc: Any, m: Any, shift: Any) -> Any:
    """Saturated RQ1 of four int32: multiply long, rounding shift, saturating narrow.

    Written with intrinsics because LLVM has no 64-bit vector minimum here and falls back to scalar code.
    """

    def call(name: str, dtype: str, *arguments: Any) -> Any:
        return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(f"llvm.arm.neon.{name}"), *arguments)

    halves = []
    for first in (0, 2):
        a, factor, right = (tirx.Shuffle([v], [const(first + k, "int32") for k in range(2)]) for v in (acc, m, shift))
        product = call("vmulls.v2i64", "int64x2", a, factor)
        left = const(0, "int64", 2) - right.astype("int64x2")
        halves.append(call("vqmovns.v2i32", "int32x2", call("vrshifts.v2i64", "int64x2", product, left)))
    return tirx.Shuffle(halves, [const(k, "int32") for k in range(4)])


def clamp(value: Any, lo: float, hi: float, dtype: str, lanes: int) -> Any:
    if lo > -math.inf:
        value = tirx.max(value, const(lo, dtype, lanes))
    if hi < math.inf:
        value = tirx.min(value, const(hi, dtype, lanes))
    return value


def store_code(acc: Any, m: Any, shift: Any, residual: Any, epilogue: Epilogue, lanes: int, device: Device) -> Any:
    """int32 accumulator -> int8 code (as an int8 vector)."""
    code = requantise(acc, m, shift, epilogue.y_zp, int(epilogue.lo), int(epilogue.hi), lanes, device)
    add = epilogue.add
    if add is not None:
        code = add_codes(code, residual.astype(vec("int32", lanes)), add, lanes)
    return code.astype(vec("int8", lanes))


def add_codes(a: Any, b: Any, add: AddEpilogue, lanes: int) -> Any:
    """int32 codes -> int32 code of the sum. The products fit 32 bits by the choice of `f` (specification 1.9)."""

    def c(value: int) -> Any:
        return const(value, "int32", lanes)

    total = (a - c(add.z_self)) * c(add.m_self) + (b - c(add.z_other)) * c(add.m_other) + c(1 << (add.f - 1))
    code = tirx.shift_right(total, c(add.f)) + c(add.z_y)
    return clamp(code, add.lo, add.hi, "int32", lanes)


# -- float epilogue ----------------------------------------------------------------------------------------------------


def activate(x: Any, epilogue: Epilogue, lanes: int) -> Any:
    """The activation as a TIR expression on float32 vectors."""

    def c(value: float) -> Any:
        return const(value, "float32", lanes)

    def hard_sigmoid(v: Any) -> Any:
        return tirx.max(tirx.min(v + c(3.0), c(6.0)), c(0.0)) * c(1.0 / 6.0)

    act = epilogue.act
    if act == "none":
        return x
    if act == "clip":
        return clamp(x, epilogue.lo, epilogue.hi, "float32", lanes)
    if act == "hardswish":
        return x * hard_sigmoid(x)
    if act == "hardsigmoid":
        return hard_sigmoid(x)
    if act == "sigmoid":
        return c(1.0) / (c(1.0) + tirx.exp(c(0.0) - x))
    if act == "silu":
        return x / (c(1.0) + tirx.exp(c(0.0) - x))
    if act == "tanh":
        return tirx.tanh(x)
    if act == "gelu":
        return c(0.5) * x * (c(1.0) + tirx.erf(x * c(math.sqrt(0.5))))
    raise ValueError(f"no epilogue for activation {act}")


def activate_reference(x: np.ndarray, epilogue: Epilogue) -> np.ndarray:
    """NumPy meaning of `activate`, in float64."""
    x = x.astype(np.float64)
    hard = np.clip(x + 3.0, 0.0, 6.0) / 6.0
    table: dict[str, Callable[[], np.ndarray]] = {
        "none": lambda: x,
        "clip": lambda: np.clip(x, epilogue.lo, epilogue.hi),
        "hardswish": lambda: x * hard,
        "hardsigmoid": lambda: hard,
        "sigmoid": lambda: 1.0 / (1.0 + np.exp(-x)),
        "silu": lambda: x / (1.0 + np.exp(-x)),
        "tanh": lambda: np.tanh(x),
        "gelu": lambda: 0.5 * x * (1.0 + np.vectorize(math.erf)(x * math.sqrt(0.5))),
    }
    return table[epilogue.act]()


def code_reference(
    acc: np.ndarray, m: np.ndarray, shift: np.ndarray, residual: np.ndarray | None, epilogue: Epilogue
) -> np.ndarray:
    """NumPy meaning of `store_code`, by the functions that define integer arithmetic (`edgec.integer`)."""
    code = np.clip(integer.rq1(acc, m, shift) + epilogue.y_zp, int(epilogue.lo), int(epilogue.hi)).astype(np.int8)
    add = epilogue.add
    if add is None:
        return code
    assert residual is not None
    return integer.qadd(
        code, residual, add.m_self, add.m_other, add.f, add.z_self, add.z_other, add.z_y, add.lo, add.hi
    )
