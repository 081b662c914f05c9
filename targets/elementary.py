"""Elementary functions of float32 as arithmetic that LLVM can keep in vector registers.

LLVM turns `exp`, `tanh` and `erf` of a vector into one C library call per element. These expansions are straight-line
code, work on scalars and vectors alike, and give the same values on every device up to fused multiplication. float64
keeps the C library.
"""

from __future__ import annotations

import math
from typing import Any

from edgec.targets.tir import tirx

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

# erf(x) = c P(c^2) / Q(c^2), c = clamp(x, -4, 4): the rational function of Eigen's vectorised erf.
ERF_MAX = 4.0
ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def expand(call: Any) -> Any:
    """The expansion of a TIR call to exp, sigmoid, tanh or erf on float32 scalars or vectors, else the call itself.

    float16 goes by way of float32.
    """
    rule = RULES.get(getattr(call.op, "name", ""))
    if rule is None:
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
    # The operand that may be NaN comes second in the comparison, which then chooses it.
    inside = tirx.max(_c(EXP_MIN, lanes), tirx.min(_c(EXP_MAX, lanes), x))
    return _scaled_exp(inside, 2.0, 126, lanes)


def exp_of_nonpositive(x: Any, lanes: int) -> Any:
    """e^x for x <= 0, -inf included, to 2.5e-7 relative: one limit instead of two. Results below 2^-126.5 are 0."""
    return _scaled_exp(tirx.max(_c(-88.3, lanes), x), 1.0, 127, lanes)


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


def sigmoid(x: Any, lanes: int) -> Any:
    return _c(1.0, lanes) / (_c(1.0, lanes) + exp(_c(0.0, lanes) - x, lanes))


def tanh(x: Any, lanes: int) -> Any:
    """tanh to 3e-7 absolute."""
    return _odd_ratio(x, TANH_MAX, TANH_P, TANH_Q, lanes)


def erf(x: Any, lanes: int) -> Any:
    """The error function to 5e-7 absolute."""
    return _odd_ratio(x, ERF_MAX, ERF_P, ERF_Q, lanes)


RULES = {"tirx.exp": exp, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf}


def _odd_ratio(x: Any, limit: float, top: tuple[float, ...], bottom: tuple[float, ...], lanes: int) -> Any:
    def body(c: Any) -> Any:
        return _let(c * c, kind, lambda z: c * _horner(z, top, lanes) / _horner(z, bottom, lanes))

    kind = _kind("float32", lanes)
    # Comparisons written so that NaN passes.
    above = tirx.Select(x > _c(limit, lanes), _c(limit, lanes), x)
    return _let(tirx.Select(x < _c(-limit, lanes), _c(-limit, lanes), above), kind, body)


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
