"""Codes of attention probabilities, and their exact integer products with values: the emulator.

A row of a softmax has a few large and many tiny numbers, which one uniform grid serves badly. Three codes of 8 bits or
fewer are defined here, with the meaning of each code and of P V in integers; int32 holds every sum (checked).

* `Uniform`: p = q / 255.
* `Twin`: seven bits and a flag. Numbers below 2^-split are steps of 2^-split / 127, all others steps of 1 / 127: two
  sums, the second shifted by `split` bits, make the product. Yuan et al., "PTQ4ViT: Post-Training Quantization for
  Vision Transformers with Twin Uniform Quantization", ECCV 2022; Shu et al., "TinySAM". A number is on either grid,
  never the sum of parts on both.
* `Log2`: p = 2^-q, the last code is 0: products are shifts. Lin et al., "FQ-ViT: Post-Training Quantization for Fully
  Quantized Vision Transformer", IJCAI 2022.

NumPy only; probabilities are float arrays in 0..1 of any shape, codes are uint8 arrays of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgec.errors import EdgecError

Codes = NDArray[np.uint8]
Reals = NDArray[np.floating]

# Of twin codes: the flag of the larger grid, and the largest number beside it.
FLAG, STEPS = 0x80, 127
# Splits that a search tries: 2^-19 is below what a row of any length in use needs.
SPLITS = range(20)
# Bits behind the point that sums of `Log2` keep.
FRACTION = 15
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Uniform:
    """p = q / 255."""

    name = "uniform"

    def encode(self, p: Reals) -> Codes:
        return np.clip(np.rint(np.asarray(p, np.float64) * 255), 0, 255).astype(np.uint8)

    def decode(self, q: Codes) -> NDArray[np.float64]:
        return q.astype(np.float64) / 255

    def product(self, q: Codes, v: NDArray[np.int8]) -> tuple[NDArray[np.int32], float]:
        """(sums, scale) of P V for codes q [..., m, n] and values v [..., n, d]: P V = sums * scale * scale of v."""
        return _sums(q.astype(np.int64) @ v.astype(np.int64)), 1 / 255


@dataclass(frozen=True)
class Twin:
    """Steps of 2^-split / 127 below 2^-split, of 1 / 127 from there on. split: 0..19."""

    split: int

    name = "twin"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise EdgecError(f"is {self.split}", where="split of a twin quantiser", hint="use 0 to 19")

    def encode(self, p: Reals) -> Codes:
        values = np.clip(np.asarray(p, np.float64), 0.0, 1.0)
        small = np.rint(values * STEPS * 2.0**self.split)
        large = np.rint(values * STEPS)
        tau = 2.0**-self.split
        # Just above 2^-split the end of the small grid may be nearer; with large splits the other choice would be 0.
        chosen = (values < tau) | (np.abs(large / STEPS - values) > np.abs(tau - values))
        return np.where(chosen, np.minimum(small, STEPS), large + FLAG).astype(np.uint8)

    def decode(self, q: Codes) -> NDArray[np.float64]:
        number = (q & STEPS).astype(np.float64) / STEPS
        return np.where(q & FLAG, number, number * 2.0**-self.split)

    def product(self, q: Codes, v: NDArray[np.int8]) -> tuple[NDArray[np.int32], float]:
        """(sums, scale) of P V for codes q [..., m, n] and values v [..., n, d]: P V = sums * scale * scale of v."""
        number, large, values = (q & STEPS).astype(np.int64), q >= FLAG, v.astype(np.int64)
        small_sums, large_sums = _sums(np.where(large, 0, number) @ values), _sums(np.where(large, number, 0) @ values)
        # Both sums fit int32 whatever the codes; the shifted one does where probabilities add up to 1.
        total = small_sums.astype(np.int64) + (large_sums.astype(np.int64) << self.split)
        return _sums(total), 2.0**-self.split / STEPS


@dataclass(frozen=True)
class Log2:
    """p = 2^-q for q below 2^bits - 1; that last code is 0. bits: 2..4: products keep 15 bits behind the point."""

    bits: int = 4

    name = "log2"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 5):
            raise EdgecError(f"is {self.bits}", where="bits of a log2 quantiser", hint="use 2 to 4")

    @property
    def zero(self) -> int:
        """The code of 0."""
        return (1 << self.bits) - 1

    def encode(self, p: Reals) -> Codes:
        values = np.asarray(p, np.float64)
        with np.errstate(divide="ignore"):
            exponent = np.rint(-np.log2(values))
        return np.where(exponent < self.zero, np.maximum(exponent, 0), self.zero).astype(np.uint8)

    def decode(self, q: Codes) -> NDArray[np.float64]:
        return np.where(q == self.zero, 0.0, 2.0 ** -q.astype(np.float64))

    def product(self, q: Codes, v: NDArray[np.int8]) -> tuple[NDArray[np.int32], float]:
        """(sums, scale) of P V for codes q [..., m, n] and values v [..., n, d]: P V = sums * scale * scale of v."""
        factors = np.where(q == self.zero, 0, 1 << (FRACTION - q.astype(np.int64)))
        return _sums(factors @ v.astype(np.int64)), 2.0**-FRACTION


ProbabilityCode = Uniform | Twin | Log2


def best_twin(p: Reals, weights: Reals | None = None, splits: Sequence[int] = SPLITS) -> Twin:
    """The twin code of least sum of weights * (p - decoded)^2; weights: how much each element matters, default alike.

    Equal errors: the smaller split, which needs fewer bits in sums.
    """
    values = np.asarray(p, np.float64)
    importance = 1.0 if weights is None else np.asarray(weights, np.float64)
    codes = [Twin(split) for split in splits]
    errors = [float((importance * (code.decode(code.encode(values)) - values) ** 2).sum()) for code in codes]
    return codes[int(np.argmin(errors))]


def softmax_codes(scores: NDArray[np.int8], scale: float) -> Codes:
    """Integer softmax over the last axis: codes of 1/256, at most 255, of int8 scores worth `scale` each.

    With d = max(q) - q, e = E[d] and E[k] = rne(2^15 exp(-scale k)): min(255, (256 e + floor(S / 2)) div S), S = sum of
    e. Integers only, apart from the table of 256 entries, which is made at compile time.
    """
    table = np.rint(2.0**15 * np.exp(-scale * np.arange(256))).astype(np.int64)
    wide = scores.astype(np.int64)
    powers = table[wide.max(-1, keepdims=True) - wide]
    total = powers.sum(-1, keepdims=True)
    return np.minimum((256 * powers + total // 2) // total, 255).astype(np.uint8)


def _sums(total: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 sums. Raises EdgecError where one does not fit."""
    if total.size and int(np.abs(total).max()) > INT32_MAX:
        raise EdgecError(
            "a sum leaves int32", where="product of attention probabilities", hint="use a smaller split or fewer keys"
        )
    return total.astype(np.int32)
