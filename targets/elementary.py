"""Elementary functions of float32 as arithmetic that LLVM can keep in vector registers.

LLVM turns `exp`, `tanh` and `erf` of a vector into one C library call per element. These expansions are straight-line
code, work on scalars and vectors alike, and give the same values on every device up to fused multiplication. float64
keeps the C library.
"""

from __future__ import annotations

import math
from typing import Any

from edgec.targets.tir import tirx

# Adding and subtracting it rounds a small float32 to an integer: 32-bit Arm has no vector instruction for that.
ROUND = 1.5 * 2.0**23
LOG2_E = 1.0 / math.log(2.0)
# ln 2 in two parts, the first with few enough bits that n * LN2_HIGH is exact for every exponent n.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# exp(x) overflows above and is below the smallest normal number under these.
EXP_MAX, EXP_MIN = 88.72283, -87.33654
# exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2) / 2: Cephes expf, highest power first.
EXP_P = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)

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
    """The expansion of a TIR call to exp, sigmoid, tanh or erf on float32 scalars or vectors, else the call itself."""
    rule = RULES.get(getattr(call.op, "name", ""))
    if rule is None:
        return call
    kind, _, lanes = str(call.args[0].ty.dtype).partition("x")
    return rule(call.args[0], int(lanes or 1)) if kind == "float32" else call


def exp(x: Any, lanes: int) -> Any:
    """e^x to 2e-7 relative. Results below the smallest normal number are 0; NaN stays NaN."""

    def body(x: Any) -> Any:
        inside = tirx.min(tirx.max(x, _c(EXP_MIN, lanes)), _c(EXP_MAX, lanes))
        steps = inside * _c(LOG2_E, lanes) + _c(ROUND, lanes) - _c(ROUND, lanes)

        def scaled(n: Any) -> Any:
            # r is taken from x itself: an infinite or undefined x must not be hidden by the clamp.
            def series(r: Any) -> Any:
                value = r * r * _horner(r, EXP_P, lanes) + r + _c(1.0, lanes)
                # 2^n in two factors: n reaches 128, which one exponent field cannot hold.
                half = tirx.shift_right(n.astype(_kind("int32", lanes)), _i(1, lanes))
                return _let(
                    half,
                    _kind("int32", lanes),
                    lambda a: value * _power(a, lanes) * _power(n.astype(_kind("int32", lanes)) - a, lanes),
                )

            rest = x - n * _c(LN2_HIGH, lanes) - n * _c(LN2_LOW, lanes)
            return _let(rest, _kind("float32", lanes), series)

        value = _let(steps, _kind("float32", lanes), scaled)
        value = tirx.Select(x > _c(EXP_MAX, lanes), _c(math.inf, lanes), value)
        return tirx.Select(x < _c(EXP_MIN, lanes), _c(0.0, lanes), value)

    return _let(x, _kind("float32", lanes), body)


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


def _power(n: Any, lanes: int) -> Any:
    """2^n for integers -126 <= n <= 127, by writing the exponent field."""
    bits = tirx.shift_left(n + _i(127, lanes), _i(23, lanes))
    return tirx.reinterpret(_kind("float32", lanes), bits)


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
