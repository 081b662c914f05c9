"""Elementary functions of float32 as arithmetic that LLVM can keep in vector registers.

LLVM turns `exp`, `log`, `tanh` and `erf` of a vector into one C library call per element. These expansions are
straight-line code, work on scalars and vectors alike, and give the same values on every device up to fused
multiplication. float64 keeps the C library.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

from edgec.targets.tir import tirx

_NATIVE = contextvars.ContextVar("native", default=False)
# Adding and subtracting it rounds a small float32 to an integer, which then stands in the low bits of the sum: 32-bit
# Arm has no vector instruction for rounding.
ROUND = 1.5 * 2.0**23
LOG2_E = 1.0 / math.log(2.0)
# ln 2 in two parts, the first with few enough bits that n * LN2_HIGH is exact for every exponent n.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# Outside these, 2 (e^r) 2^(n-1) is infinite and zero by itself.
EXP_MAX, EXP_MIN = 89.0, -87.6
# e^r on |r| <= ln(2) / 2, highest power first: minimax polynomial of the relative error (9e-8) with constant term 1.
EXP_P = (8.290272206e-3, 4.189816117e-2, 1.666763872e-1, 4.999914765e-1, 9.999997020e-1, 1.0)

# log(1 + f) = f - f^2 / 2 + f^3 P(f) for 1 + f between sqrt(1/2) and sqrt(2): Cephes logf, highest power first.
LOG_P = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
SQRT_HALF_BITS = 0x3F3504F3
LEAST_NORMAL = 2.0**-126

# tanh(x) = c P(c^2) / Q(c^2), c = clamp(x, -TANH_MAX, TANH_MAX): the rational function of Eigen's vectorised tanh.
TANH_MAX = 7.90531110763549805
TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

# erf(x) = c P(2 c^2 / ERF_MAX^2 - 1), c = clamp(x, -ERF_MAX, ERF_MAX), highest power first: minimax polynomial of the
# relative error (1.2e-7) on an argument in -1..1, where its coefficients are small. A division would keep an in-order
# core waiting for longer than all of this takes.
ERF_MAX = 3.6
ERF_P = (
    -1.053190130e-3,
    2.698298819e-3,
    -2.600154007e-3,
    4.393998496e-3,
    -1.188172461e-2,
    2.142219676e-2,
    -3.242568580e-2,
    4.821449507e-2,
    -6.805804488e-2,
    8.982738506e-2,
    -1.137913226e-1,
    1.438098336e-1,
    -1.954905743e-1,
    3.927121362e-1,
)


@contextlib.contextmanager
def native() -> Iterator[None]:
    """Leaves exponential and logarithm as calls, for GPUs: they have instructions for them, and their compilers may
    cancel the sum and the difference by which the expansions round."""
    token = _NATIVE.set(True)
    try:
        yield
    finally:
        _NATIVE.reset(token)


def expand(call: Any) -> Any:
    """The expansion of a TIR call to one of RULES on float32 scalars or vectors, else the call itself.

    float16 goes by way of float32.
    """
    rule = RULES.get(getattr(call.op, "name", ""))
    if rule is None or (_NATIVE.get() and rule in (exp, log)):
        return call
    kind, _, lanes = str(call.args[0].ty.dtype).partition("x")
    count = int(lanes or 1)
    if kind == "float16":
        return rule(call.args[0].astype(_kind("float32", count)), count).astype(_kind("float16", count))
    return rule(call.args[0], count) if kind == "float32" else call


def exp(x: Any, lanes: int) -> Any:
    """e^x to 2.5e-7 relative. Results below 2^-125.5 are 0, those beyond float32 infinite; NaN stays NaN.

    2^n is written into the exponent field as 2^(n-1), and the polynomial doubled: n reaches 128, which one field
    cannot hold.
    """
    if _NATIVE.get():
        return tirx.exp(x)
    # The operand that may be NaN comes second in the comparison, which then chooses it.
    inside = tirx.max(_c(EXP_MIN, lanes), tirx.min(_c(EXP_MAX, lanes), x))
    return _scaled_exp(inside, 2.0, 126, lanes)


def exp_of_nonpositive(x: Any, lanes: int) -> Any:
    """e^x for x <= 0, -inf included, to 2.5e-7 relative: one limit instead of two. Results below 2^-126.5 are 0."""
    inside = tirx.max(_c(-88.3, lanes), x)
    return tirx.exp(inside) if _NATIVE.get() else _scaled_exp(inside, 1.0, 127, lanes)


def _scaled_exp(x: Any, factor: float, bias: int, lanes: int) -> Any:
    """factor * e^r * 2^(n + bias - 127) for x = n ln(2) + r; the power is 0 where its exponent field is 0."""
    real, whole = _kind("float32", lanes), _kind("int32", lanes)

    def body(x: Any) -> Any:
        def scaled(shifted: Any) -> Any:
            n = shifted - _c(ROUND + bias, lanes)
            power = tirx.reinterpret(real, tirx.shift_left(tirx.reinterpret(whole, shifted), _i(23, lanes)))
            rest = _let(n, real, lambda n: x - n * _c(LN2_HIGH, lanes) - n * _c(LN2_LOW, lanes))
            series = tuple(factor * c for c in EXP_P)
            return _let(rest, real, lambda r: _horner(r, series, lanes) * power)

        # Low bits: n + bias, the exponent field of the power; the shift drops everything above them.
        return _let(x * _c(LOG2_E, lanes) + _c(ROUND + bias, lanes), real, scaled)

    return _let(x, real, body)


def log(x: Any, lanes: int) -> Any:
    """Natural logarithm to 1.5e-7 relative or absolute, whichever is larger. Subnormal numbers count as 2^-126."""
    if _NATIVE.get():
        return tirx.log(x)
    real, whole = _kind("float32", lanes), _kind("int32", lanes)

    def body(x: Any) -> Any:
        bits = tirx.reinterpret(whole, tirx.max(_c(LEAST_NORMAL, lanes), x))

        def split(bits: Any) -> Any:
            exponent = tirx.shift_right(bits - _i(SQRT_HALF_BITS, lanes), _i(23, lanes))
            return _let(exponent, whole, lambda e: _let(mantissa(bits, e), real, lambda f: series(f, e.astype(real))))

        def mantissa(bits: Any, e: Any) -> Any:
            return tirx.reinterpret(real, bits - tirx.shift_left(e, _i(23, lanes))) - _c(1.0, lanes)

        def series(f: Any, e: Any) -> Any:
            square = f * f
            small = f * square * _horner(f, LOG_P, lanes) + e * _c(LN2_LOW, lanes) - _c(0.5, lanes) * square
            return f + small + e * _c(LN2_HIGH, lanes)

        # Infinity, zero, and what has no logarithm.
        value = _let(bits, whole, split)
        value = tirx.Select(x < _c(math.inf, lanes), value, x)
        value = tirx.Select(x > _c(0.0, lanes), value, _c(-math.inf, lanes))
        return tirx.Select(x >= _c(0.0, lanes), value, _c(math.nan, lanes))

    return _let(x, real, body)


def sigmoid(x: Any, lanes: int) -> Any:
    return _c(1.0, lanes) / (_c(1.0, lanes) + exp(_c(0.0, lanes) - x, lanes))


def tanh(x: Any, lanes: int) -> Any:
    """tanh to 3e-7 absolute."""
    return _odd_ratio(x, TANH_MAX, TANH_P, TANH_Q, lanes)


def erf(x: Any, lanes: int) -> Any:
    """The error function to 5e-7 relative."""
    kind = _kind("float32", lanes)

    def body(c: Any) -> Any:
        square = c * c * _c(2.0 / ERF_MAX**2, lanes) - _c(1.0, lanes)

        def halves(z: Any) -> Any:
            # Even and odd powers on their own: each waits for a product half as often.
            return _let(z * z, kind, lambda w: _horner(w, ERF_P[1::2], lanes) + z * _horner(w, ERF_P[::2], lanes))

        return c * _let(square, kind, halves)

    # The operand that may be NaN comes second in the comparison, which then chooses it.
    return _let(tirx.max(_c(-ERF_MAX, lanes), tirx.min(_c(ERF_MAX, lanes), x)), kind, body)


RULES = {"tirx.exp": exp, "tirx.log": log, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf}


def _odd_ratio(x: Any, limit: float, top: tuple[float, ...], bottom: tuple[float, ...], lanes: int) -> Any:
    def body(c: Any) -> Any:
        return _let(c * c, kind, lambda z: c * _horner(z, top, lanes) / _horner(z, bottom, lanes))

    def inside(x: Any) -> Any:
        # Comparisons written so that NaN passes.
        above = tirx.Select(x > _c(limit, lanes), _c(limit, lanes), x)
        return _let(tirx.Select(x < _c(-limit, lanes), _c(-limit, lanes), above), kind, body)

    kind = _kind("float32", lanes)
    # Named, because x may be a whole chain of such functions, which would be written out three times.
    return _let(x, kind, inside)


def _horner(x: Any, coefficients: tuple[float, ...], lanes: int) -> Any:
    result = _c(coefficients[0], lanes)
    for value in coefficients[1:]:
        result = result * x + _c(value, lanes)
    return result


def _let(value: Any, kind: str, body: Any) -> Any:
    variable = tirx.Var("t", kind)
    return tirx.Let(variable, value, body(variable))


def _kind(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _c(value: float, lanes: int) -> Any:
    scalar = tirx.const(value, "float32")
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar


def _i(value: int, lanes: int) -> Any:
    scalar = tirx.const(value, "int32")
    return tirx.Broadcast(scalar, lanes) if lanes > 1 else scalar
