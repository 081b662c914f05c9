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

    float32: `act` ("none", "clip" to lo..hi, "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh",
    "mish", "tanh", "leaky_relu" with slope `lo`) after the optional residual. int8: requantise, add `y_zp`, clamp to
    lo..hi, then the optional `add`.

    `requant` says what turns an int32 accumulator into the next value (specification 1.9): "RQ1", an integer factor
    and a shift per channel; "RQF", a float32 factor; "float", a float32 factor that gives real values, to which
    residual and activation apply as for float32, and which are stored as float32, or as int8 where `y_scale` is set.
    `bounded`: no rounded value of RQF can leave int32, which saves a clamp.
    """

    act: str = "none"
    lo: float = -math.inf
    hi: float = math.inf
    y_zp: int = 0
    residual: bool = False
    add: AddEpilogue | None = None
    requant: str = "RQ1"
    y_scale: float | None = None
    bounded: bool = False

    def out_type(self, dtype: str) -> str:
        """Element type of the result of a kernel on elements of `dtype`."""
        return "float32" if dtype == "int8" and self.requant == "float" and self.y_scale is None else dtype

    def residual_type(self, dtype: str) -> str:
        return "float32" if dtype == "int8" and self.requant == "float" else dtype


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


def intrinsic(name: str, dtype: str, *arguments: Any) -> Any:
    """Call of an LLVM intrinsic without side effects."""
    return T.call_llvm_pure_intrin(dtype, T.llvm_lookup_intrinsic_id(name), *arguments)


def lanes_of(values: Sequence[Any], width: int, start: int, count: int) -> Any:
    """Lanes start .. start + count of the row that `values`, vectors of `width` lanes, make."""
    first, offset = divmod(start, width)
    if offset == 0 and count == width:
        return values[first]
    last = (start + count - 1) // width
    return tirx.Shuffle(list(values[first : last + 1]), [const(offset + k, "int32") for k in range(count)])


def pieces(count: int, most: int) -> list[tuple[int, int]]:
    """(start, size) of powers of two, at most `most`, that cover 0 .. count, each aligned to its size."""
    found, start = [], 0
    while start < count:
        size = min(most, 1 << ((count - start).bit_length() - 1))
        found.append((start, size))
        start += size
    return found


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
        return intrinsic(f"llvm.arm.neon.{name}", dtype, *arguments)

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


MASKED_CVT = "llvm.x86.avx512.mask.cvtps2dq.512"


def nearest(x: Any, lanes: int, device: Device) -> Any:
    """float32 to int32, halves to even. x must be within int32, except on NEON, which saturates."""
    if device.is_arm64 and lanes == 4:
        return intrinsic("llvm.aarch64.neon.fcvtns.v4i32.v4f32", "int32x4", x)
    if device.is_x86 and lanes == 16:
        # The current rounding mode, which is to nearest even in any C program that does not change it.
        return intrinsic(MASKED_CVT, "int32x16", x, const(0, "int32", 16), const(-1, "int16"), const(4, "int32"))
    if device.is_x86 and lanes in (4, 8) and lanes <= device.lanes:
        name = "llvm.x86.avx.cvt.ps2dq.256" if lanes == 8 else "llvm.x86.sse2.cvtps2dq"
        return intrinsic(name, f"int32x{lanes}", x)
    return tirx.nearbyint(x).astype(vec("int32", lanes))


def concat(parts: Sequence[Any], width: int) -> Any:
    """One vector of all parts, each of `width` lanes."""
    if len(parts) == 1:
        return parts[0]
    return tirx.Shuffle(list(parts), [const(k, "int32") for k in range(width * len(parts))])


def narrow(codes: Sequence[Any], z: int, lo: int, hi: int, lanes: int, device: Device) -> Any:
    """clamp(code + z, lo, hi) as one int8 vector, for any int32 codes in vectors of `lanes`."""
    if device.is_x86 and lanes == 16 and len(codes) in (2, 4):
        return _narrow_x86(codes, z, lo, hi)
    if not device.is_arm64 or lanes != 4 or len(codes) == 1:
        inside = [clamp(code, lo - z, hi - z, "int32", lanes) + const(z, "int32", lanes) for code in codes]
        return concat([code.astype(vec("int8", lanes)) for code in inside], lanes)
    # Saturating narrowing does the clamp to int8 on the way.
    halves = [intrinsic("llvm.aarch64.neon.sqxtn.v4i16", "int16x4", code) for code in codes]
    eights = [concat(halves[i : i + 2], 4) for i in range(0, len(halves), 2)]
    if z:
        eights = [intrinsic("llvm.aarch64.neon.sqadd.v8i16", "int16x8", e, const(z, "int16", 8)) for e in eights]
    result = concat([intrinsic("llvm.aarch64.neon.sqxtn.v8i8", "int8x8", e) for e in eights], 8)
    return clamp_codes(result, lo, hi, lanes * len(codes))


def _narrow_x86(codes: Sequence[Any], z: int, lo: int, hi: int) -> Any:
    """`narrow` of two or four AVX-512 vectors by saturating packs, which work within 128 bits: a last shuffle sorts."""
    words = pack_words(codes, 16)
    if len(codes) == 4:
        order = [4 * k + v for v in range(4) for k in range(4)]
    else:
        words = [words[0], words[0]]
        order = [4 * k + v for v in range(2) for k in range(4)]
    packed = tirx.reinterpret("int32x16", pack_bytes(words, z, 16))
    sorted_words = tirx.Shuffle([packed], [const(k, "int32") for k in order])
    result = tirx.reinterpret(f"int8x{16 * len(codes)}", sorted_words)
    return clamp_codes(result, lo, hi, 16 * len(codes))


def pack_words(codes: Sequence[Any], lanes: int) -> list[Any]:
    """Neighbouring x86 int32 vectors to int16 with saturation; in 128 bits four of the first, four of the second."""
    name = {4: "llvm.x86.sse2.packssdw.128", 8: "llvm.x86.avx2.packssdw", 16: "llvm.x86.avx512.packssdw.512"}[lanes]
    return [intrinsic(name, f"int16x{2 * lanes}", *codes[i : i + 2]) for i in range(0, len(codes), 2)]


def pack_bytes(words: Sequence[Any], z: int, lanes: int) -> Any:
    """Two x86 int16 vectors plus z to int8, all with saturation, within 128 bits."""
    name = {4: "llvm.x86.sse2.packsswb.128", 8: "llvm.x86.avx2.packsswb", 16: "llvm.x86.avx512.packsswb.512"}[lanes]
    if z:
        kind = f"int16x{2 * lanes}"
        words = [intrinsic("llvm.sadd.sat", kind, word, const(z, "int16", 2 * lanes)) for word in words]
    return intrinsic(name, f"int8x{4 * lanes}", *words)


def clamp_codes(codes: Any, lo: int, hi: int, lanes: int) -> Any:
    """int8 codes limited to lo .. hi, where that is less than all of int8."""
    return clamp(codes, lo if lo > -128 else -math.inf, hi if hi < 127 else math.inf, "int8", lanes)


def finish(
    accs: Sequence[Any],
    factors: Sequence[Sequence[Any]],
    residuals: Sequence[Any],
    epilogue: Epilogue,
    dtype: str,
    lanes: int,
    device: Device,
) -> Any:
    """Accumulators, vectors of `lanes`, to one vector of the values that are stored.

    factors: for each accumulator m, and shift for RQ1. residuals: one for each accumulator, or none at all.
    """
    if dtype != "int8":
        values = [acc + r for acc, r in zip(accs, residuals, strict=True)] if residuals else accs
        if dtype == "float16":
            return concat([activate_half(value, epilogue, lanes) for value in values], lanes)
        return concat([activate(value, epilogue, lanes) for value in values], lanes)
    lo, hi, z = int(max(epilogue.lo, -128)), int(min(epilogue.hi, 127)), epilogue.y_zp

    def real(acc: Any, factor: Sequence[Any]) -> Any:
        return acc.astype(vec("float32", lanes)) * factor[0]

    def whole(value: Any, lo: int, hi: int) -> Any:
        # The conversion to an integer is defined for values in range only; NEON's is for all.
        exact = (device.is_arm64 and lanes == 4) or (epilogue.bounded and epilogue.requant == "RQF")
        return nearest(value if exact else clamp(value, lo - z, hi - z, "float32", lanes), lanes, device)

    if epilogue.requant == "float":
        values = [real(acc, factor) for acc, factor in zip(accs, factors, strict=True)]
        values = [value + r for value, r in zip(values, residuals, strict=True)] if residuals else values
        values = [activate(value, epilogue, lanes) for value in values]
        if epilogue.y_scale is None:
            return concat(values, lanes)
        inverse = const(1.0 / epilogue.y_scale, "float32", lanes)
        return narrow([whole(value * inverse, -128, 127) for value in values], z, -128, 127, lanes, device)
    if epilogue.requant == "RQ1":
        codes = [requantise(acc, *factor, z, lo, hi, lanes, device) for acc, factor in zip(accs, factors, strict=True)]
        z, lo, hi = 0, -128, 127
    else:
        codes = [whole(real(acc, factor), lo, hi) for acc, factor in zip(accs, factors, strict=True)]
    add = epilogue.add
    if add is not None:
        codes = [clamp(code, lo - z, hi - z, "int32", lanes) + const(z, "int32", lanes) for code in codes]
        wide = [r.astype(vec("int32", lanes)) for r in residuals]
        codes = [add_codes(code, r, add, lanes) for code, r in zip(codes, wide, strict=True)]
        z, lo, hi = 0, -128, 127
    return narrow(codes, z, lo, hi, lanes, device)


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
    if act == "gelu_tanh":
        cubic = (x + c(0.044715) * x * x * x) * c(-2.0 * math.sqrt(2.0 / math.pi))
        return x / (c(1.0) + tirx.exp(cubic))
    if act == "mish":
        # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), which is 1 long before e overflows.
        e = tirx.exp(tirx.min(x, c(20.0)))
        return x * (e * (e + c(2.0)) / (e * (e + c(2.0)) + c(2.0)))
    if act == "leaky_relu":
        return tirx.Select(x > c(0.0), x, x * c(epilogue.lo))
    if act == "gelu":
        half = c(0.5) * x
        return half + half * tirx.erf(x * c(math.sqrt(0.5)))
    raise ValueError(f"no epilogue for activation {act}")


def activate_half(x: Any, epilogue: Epilogue, lanes: int) -> Any:
    """The activation on float16 vectors: clips as they are, curves by way of float32."""
    if epilogue.act == "none":
        return x
    if epilogue.act == "clip":
        return clamp(x, epilogue.lo, epilogue.hi, "float16", lanes)
    return activate(x.astype(vec("float32", lanes)), epilogue, lanes).astype(vec("float16", lanes))


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
        "gelu_tanh": lambda: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
        "mish": lambda: x * np.tanh(np.log1p(np.exp(x))),
        "leaky_relu": lambda: np.where(x > 0, x, x * epilogue.lo),
        "gelu": lambda: 0.5 * x * (1.0 + np.vectorize(math.erf)(x * math.sqrt(0.5))),
    }
    return table[epilogue.act]()


def finish_reference(
    acc: np.ndarray,
    bias: np.ndarray | None,
    m: np.ndarray | None,
    shift: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    dtype: str,
) -> np.ndarray:
    """NumPy meaning of bias and epilogue, by the functions that define integer arithmetic (`edgec.integer`)."""
    if bias is not None:
        acc = acc + bias
    if dtype != "int8":
        acc = acc if residual is None else acc + residual
        return activate_reference(acc, epilogue).astype(dtype)
    assert m is not None
    if epilogue.requant == "float":
        real = acc.astype(np.float64) * m
        real = activate_reference(real if residual is None else real + residual, epilogue)
        if epilogue.y_scale is None:
            return real.astype(np.float32)
        return np.clip(np.rint(real / epilogue.y_scale) + epilogue.y_zp, -128, 127).astype(np.int8)
    codes = integer.rqf(acc, m) if epilogue.requant == "RQF" else integer.rq1(acc, m, shift)
    code = np.clip(codes + epilogue.y_zp, int(epilogue.lo), int(epilogue.hi)).astype(np.int8)
    add = epilogue.add
    if add is None:
        return code
    assert residual is not None
    return integer.qadd(
        code, residual, add.m_self, add.m_other, add.f, add.z_self, add.z_other, add.z_y, add.lo, add.hi
    )
