"""Special functions and histograms from operators that every kernel has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

# Stirling's series, from x^-1 on in steps of x^-2: B_2k / (2k (2k - 1)), and its derivative's, B_2k / 2k from x^-2 on.
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680)
DERIVATIVE = (1 / 12, -1 / 120, 1 / 252, -1 / 240)
# From here on the series have more than the precision of float32.
LARGE = 8
# Giles, "Approximating the erfinv function" (2010), single precision: for w < 5, and else.
ERFINV = (
    (
        *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
        *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
    ),
    (
        *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
        *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
    ),
)


def _real(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype.is_floating_point else x.to(torch.float32)


def _series(terms: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """Horner's scheme, the last term first."""
    result: Any = terms[-1]
    for term in reversed(terms[:-1]):
        result = result * x + term
    return result


def _shifted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether a positive x is below what the series is for, x plus `LARGE` where it is)."""
    small = x < LARGE
    return small, torch.where(small, x + LARGE, x)


def lgamma(run: Any, x: torch.Tensor) -> torch.Tensor:
    """log |Gamma(x)|; negative numbers by reflection, small ones by Gamma(x + 1) = x Gamma(x)."""
    x = _real(x)
    mirrored = x < 0.5
    y = torch.where(mirrored, 1 - x, x)
    small, large = _shifted(y)
    rise = torch.where(small, y, torch.ones(()))
    for k in range(1, LARGE):
        rise = rise * torch.where(small, y + k, torch.ones(()))
    inverse = 1 / large
    result = (large - 0.5) * torch.log(large) - large + 0.5 * math.log(2 * math.pi)
    result = result + inverse * _series(STIRLING, inverse * inverse) - torch.log(rise)
    # Whole turns do not matter to the sine, and would cost it its precision.
    sine = torch.sin(math.pi * (x - torch.round(x))).abs()
    result = torch.where(mirrored, math.log(math.pi) - torch.log(sine) - result, result)
    return torch.where(x.abs() == math.inf, torch.full((), math.inf), result)


def _digamma(run: Any, x: torch.Tensor) -> torch.Tensor:
    x = _real(x)
    mirrored = x < 0
    y = torch.where(mirrored, 1 - x, x)
    small, large = _shifted(y)
    steps = torch.zeros_like(y)
    for k in range(LARGE):
        steps = steps + 1 / (y + k)
    inverse = 1 / large
    square = inverse * inverse
    result = torch.log(large) - 0.5 * inverse - square * _series(DERIVATIVE, square)
    result = result - torch.where(small, steps, torch.zeros(()))
    turn = math.pi * (x - torch.round(x))
    result = torch.where(mirrored, result - math.pi * torch.cos(turn) / torch.sin(turn), result)
    # At the poles: PyTorch gives -inf at zero and NaN at negative whole numbers.
    pole = torch.where(x == 0, torch.full((), -math.inf), torch.full((), math.nan))
    return torch.where((x <= 0) & (x == torch.round(x)), pole, result)


def _erfinv(run: Any, x: torch.Tensor) -> torch.Tensor:
    x = _real(x)
    w = -torch.log((1 - x) * (1 + x))
    near, far = (_polynomial(terms, v) for terms, v in zip(ERFINV, (w - 2.5, torch.sqrt(torch.clamp(w, min=0)) - 3)))
    result = torch.where(w < 5, near, far) * x
    return torch.where(x.abs() == 1, x * math.inf, result)


def _polynomial(terms: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    result: Any = terms[0]
    for term in terms[1:]:
        result = result * x + term
    return result


def _ndtri(run: Any, x: torch.Tensor) -> torch.Tensor:
    return math.sqrt(2) * _erfinv(run, 2 * _real(x) - 1)


def _histc(run: Any, x: torch.Tensor, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
    """How many elements are in each of `bins` equal parts of low..high, which without them are those of the data."""
    flat = x.reshape(-1)
    first: Any = low
    last: Any = high
    if low == high:
        first, last = (torch.amin(flat, 0), torch.amax(flat, 0)) if low == 0 else (low - 1.0, high + 1.0)
        if isinstance(first, torch.Tensor):
            same = first == last
            first, last = torch.where(same, first - 1, first), torch.where(same, last + 1, last)
    place = torch.floor((flat - first) * bins / (last - first))
    place = torch.where(flat == last, torch.full((), bins - 1.0), place)
    inside = (flat >= first) & (flat <= last)
    hit = (place == torch.arange(bins).to(torch.float32).unsqueeze(1)) & inside
    return hit.to(x.dtype).sum(1)


RULES: dict[Any, Callable[..., Any]] = {
    aten.lgamma.default: lgamma,
    aten.digamma.default: _digamma,
    aten.special_digamma.default: _digamma,
    aten.special_gammaln.default: lgamma,
    aten.erfinv.default: _erfinv,
    aten.special_erfinv.default: _erfinv,
    aten.special_ndtri.default: _ndtri,
    aten.histc.default: _histc,
}
