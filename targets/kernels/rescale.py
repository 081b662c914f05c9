"""Requantisation by one constant factor, where the size of the accumulator is known: element-wise kernels and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgec.targets.device import Device
from edgec.targets.kernels.common import INT32_MAX, INT32_MIN, const, intrinsic, lanes_of, narrow, requantise, vec
from edgec.targets.tir import tirx


def rescale(acc: Any, largest: int, m: int, shift: int, lanes: int, device: Device) -> Any:
    """RQ1 (specification 1.9) of int32 vectors with |acc| <= `largest`, saturated to int32."""
    if device.is_x86 and lanes >= 4 and (largest * m + (1 << (shift - 1))) >> shift <= INT32_MAX:
        return _even_and_odd(acc, m, shift, lanes)
    if not device.is_arm64 or lanes != 4:
        return requantise(
            acc, const(m, "int32", lanes), const(shift, "int32", lanes), 0, INT32_MIN, INT32_MAX, lanes, device
        )

    def call(name: str, dtype: str, *arguments: Any) -> Any:
        return intrinsic(f"llvm.aarch64.neon.{name}", dtype, *arguments)

    # SQRDMULH is (a * m + 2^30) >> 31: the same rounding, with the missing part of the shift applied to `a` first.
    missing = 31 - shift
    if missing >= 0 and largest << missing <= INT32_MAX:
        if missing:
            acc = tirx.shift_left(acc, const(missing, "int32", lanes))
        return call("sqrdmulh.v4i32", "int32x4", acc, const(m, "int32", lanes))
    # Written with intrinsics: LLVM moves plain products behind the widening and is left with scalar 64-bit ones.
    halves = []
    for first in (0, 2):
        product = call("smull.v2i64", "int64x2", lanes_of([acc], 4, first, 2), const(m, "int32", 2))
        rounded = call("srshl.v2i64", "int64x2", product, const(-shift, "int64", 2))
        halves.append(call("sqxtn.v2i32", "int32x2", rounded))
    return tirx.Shuffle(halves, [const(k, "int32") for k in range(4)])


def _even_and_odd(acc: Any, m: int, shift: int, lanes: int) -> Any:
    """RQ1 that fits int32, on registers of half as many int64: PMULDQ reads the lower half of each in place."""
    wide = vec("int64", lanes // 2)

    def c(value: int) -> Any:
        return const(value, "int64", lanes // 2)

    both = tirx.reinterpret(wide, acc)
    odd = tirx.shift_right(both, c(32))
    even = tirx.shift_right(tirx.shift_left(both, c(32)), c(32))
    even, odd = (tirx.shift_right(half * c(m) + c(1 << (shift - 1)), c(shift)) for half in (even, odd))
    joined = tirx.bitwise_or(tirx.shift_left(odd, c(32)), tirx.bitwise_and(even, c(0xFFFFFFFF)))
    return tirx.reinterpret(vec("int32", lanes), joined)


def rescaled_codes(
    accs: Sequence[Any], largest: int, q: tuple[int, int], z: int, lo: int, hi: int, lanes: int, device: Device
) -> Any:
    """clamp(RQ1(acc) + z, lo, hi) of vectors of `lanes` as one int8 vector; q: (m, shift)."""
    return narrow([rescale(acc, largest, *q, lanes, device) for acc in accs], z, lo, hi, lanes, device)
