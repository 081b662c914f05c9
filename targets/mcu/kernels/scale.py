"""Rescaling by one constant factor, where the size of the sums is known: `c/scale.h`."""

from __future__ import annotations

from edgec.targets.mcu.kernels.base import Value

INT32 = 2**31
# A factor of 2^9 takes every sum but 0 beyond all codes, and larger ones do the same.
LARGEST = (2**30, 21)


def scale_fields(m: int, shift: int, zero: int, lo: int, hi: int, largest: int) -> dict[str, Value] | None:
    """`ek_scale_t` for clamp(RQ1(acc) + zero, lo, hi) of |acc| <= `largest`; None when 32 bits do not hold it.

    m: 0..2^31-1, shift: 1..62, zero: a code.
    """
    if m >= 2**9 << shift:
        m, shift = LARGEST
    if largest * m < 1 << (shift - 1):
        # Every sum rounds to zero.
        m, shift = 0, 33
    before = max(33 - shift, 0)
    after = shift + before - 32
    add = (1 << (after - 1)) + (zero << after)
    most = (largest << before) * m >> 32
    if largest << before >= INT32 or most + 1 + abs(add) >= INT32:
        return None
    return {"m": m, "unit": 1 << before, "add": add, "post": after, "lo": lo, "hi": hi}
