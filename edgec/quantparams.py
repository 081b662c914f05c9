"""How real numbers map to int8 codes: the `QParams` record, ranges to scales, and the observers that find ranges.

Importing this module does not import torch; observers accept torch tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgec.errors import EdgecError
from edgec.integer import QMAX, QMIN

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = 1e-8
# Histogram bins on each side of zero; the longer side of the data fills at least half of its bins.
BINS = 4096
SMALLEST_WIDTH = 2.0**-100
# Elements counted at a time; the work arrays then fit the cache.
CHUNK = 1 << 20


@dataclass(frozen=True)
class QParams:
    """What the integers of one tensor mean: real = scale * (code - zero_point).

    granularity: "tensor" (scale and zero_point are numbers), "channel" (tuples along `axis`) or "group" (a weight whose
    `group` neighbours along `axis` share a scale; scales are operands of `edgec::dequantize_weight`, not here).
    requant: how the layer that computes the codes rounds, see `edgec.integer`. bits: 2..8; codes of fewer than 8 bits
    are int8 numbers all the same, of which fewer occur; lowering packs weights by the codes that do.
    n, p: smallest and largest code, p - n < 2^bits. pad_code: code that spatial padding holds. source: who chose the
    range, from what.
    """

    scale: float | tuple[float, ...]
    zero_point: int | tuple[int, ...] = 0
    kind: str = "affine"
    bits: int = 8
    n: int = QMIN
    p: int = QMAX
    storage: str = "i8"
    granularity: str = "tensor"
    axis: int | None = None
    group: int | None = None
    requant: str = "RQ1"
    pad_code: int | None = None
    source: str = ""

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest real number that a per-tensor code can express."""
        scale, zero = self.per_tensor
        return scale * (self.n - zero), scale * (self.p - zero)

    @property
    def per_tensor(self) -> tuple[float, int]:
        """(scale, zero_point) of a per-tensor record. Raises EdgecError for a per-channel one."""
        if not isinstance(self.scale, float) or not isinstance(self.zero_point, int):
            raise EdgecError(
                f"expected one scale per tensor, got one per {self.granularity}", where=self.source or None
            )
        return self.scale, self.zero_point

    def reals(self, codes: torch.Tensor) -> torch.Tensor:
        """The real numbers, float32, that an integer tensor of this record stands for."""
        import torch

        scale = torch.as_tensor(self.scale, dtype=torch.float32)
        zero = torch.as_tensor(self.zero_point, dtype=torch.float32)
        if self.axis is not None:
            shape = [1] * codes.dim()
            shape[self.axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        return (codes.to(torch.float32) - zero) * scale


# -- ranges to scales --------------------------------------------------------------------------------------------------


def code_range(bits: int) -> tuple[int, int]:
    """(smallest, largest) code of an activation: -2^(bits-1) and 2^(bits-1) - 1. bits: 1..8."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def weight_range(bits: int, full: bool = False) -> tuple[int, int]:
    """(smallest, largest) code of a weight, symmetric unless `full`: -7..7 or -8..7 for 4 bits. bits: 2..8."""
    low, high = code_range(bits)
    return (low if full else -high), high


def affine(low: float, high: float, source: str = "", bits: int = 8) -> QParams:
    """Asymmetric parameters for the range [low, high], widened to contain zero, which gets an exact code.

    scale = (high - low) / (2^bits - 1) in float32, zero_point = n - rne(low / scale), clamped to [n, p]: -128..127 for
    8 bits, -8..7 for 4. A range without width gives the smallest scale. Raises EdgecError when a bound is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise EdgecError(
            f"range [{low}, {high}] is not finite",
            where=source or None,
            hint="check the calibration data and the model",
        )
    low, high = min(low, 0.0), max(high, 0.0)
    n, p = code_range(bits)
    scale = float(np.float32(max((high - low) / (p - n), SMALLEST_SCALE)))
    zero = 0 if high == low else min(max(n - int(np.rint(low / scale)), n), p)
    return QParams(scale, zero, bits=bits, n=n, p=p, pad_code=zero, source=source)


def affine_channels(lows: ArrayLike, highs: ArrayLike, axis: int, source: str = "", bits: int = 8) -> QParams:
    """Asymmetric parameters for one range per index of `axis`; see `affine`."""
    bounds = zip(np.ravel(lows), np.ravel(highs), strict=True)
    each = [affine(float(low), float(high), source, bits) for low, high in bounds]
    scales, zeros = zip(*(p.per_tensor for p in each), strict=True)
    n, p = code_range(bits)
    return QParams(scales, zeros, bits=bits, n=n, p=p, granularity="channel", axis=axis, source=source)


def symmetric_scales(weights: ArrayLike, per_channel: bool, bits: int = 8) -> NDArray[np.float64]:
    """One scale per output channel (axis 0): max|w| / (2^(bits-1) - 1). Per tensor: the same value repeated."""
    magnitude = np.abs(np.asarray(weights, np.float64))
    largest = magnitude.reshape(len(magnitude), -1).max(axis=1, initial=0.0)
    if not per_channel:
        largest = np.full_like(largest, largest.max(initial=0.0))
    return np.maximum(largest / weight_range(bits)[1], SMALLEST_SCALE).astype(np.float32).astype(np.float64)


def mse_scales(weights: ArrayLike, per_channel: bool, bits: int, full: bool = False) -> NDArray[np.float64]:
    """Like `symmetric_scales`, shrunk in steps of 1 % to the least mean |w - quantised(w)|^2.4 per channel.

    full: use code -2^(bits-1) too, see `weight_range`. The search of Li et al., "BRECQ: Pushing the Limit of
    Post-Training Quantization by Block Reconstruction".
    """
    values = np.asarray(weights, np.float64)
    values = values.reshape(len(values), -1)
    start = symmetric_scales(values, per_channel, bits)
    low, high = weight_range(bits, full)
    best, least = start.copy(), np.full(len(start), np.inf)
    for step in range(MeanSquare.steps):
        scales = np.maximum(start * (1 - 0.01 * step), SMALLEST_SCALE).astype(np.float32).astype(np.float64)
        reals = np.clip(np.rint(values / scales[:, None]), low, high) * scales[:, None]
        error = (np.abs(reals - values) ** MeanSquare.power).sum(axis=1)
        error = error if per_channel else np.full_like(error, error.sum())
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


def quantize_weights(weights: ArrayLike, scales: ArrayLike, bits: int = 8, full: bool = False) -> NDArray[np.int8]:
    """Codes in `weight_range` of weights whose axis 0 has one scale each; rounds half to even."""
    values = np.asarray(weights, np.float64)
    per_channel = np.asarray(scales, np.float64).reshape(-1, *[1] * (values.ndim - 1))
    return np.clip(np.rint(values / per_channel), *weight_range(bits, full)).astype(np.int8)


# -- observers ---------------------------------------------------------------------------------------------------------


class Observer:
    """Sees a tensor batch by batch in constant memory and then proposes a range."""

    name: str = ""

    def update(self, values: torch.Tensor) -> None:
        """Add the elements of a floating-point tensor of any shape."""
        raise NotImplementedError

    def range(self) -> tuple[float, float]:
        """(low, high), before widening to zero. (0, 0) when nothing but zeros was seen."""
        raise NotImplementedError


class MinMax(Observer):
    """The extremes of everything seen."""

    name = "min-max"

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, values: torch.Tensor) -> None:
        if values.numel():
            low, high = (bound.item() for bound in values.aminmax())
            if math.isnan(low) or math.isnan(self.low):
                self.low = self.high = math.nan  # stays, so that the caller hears of it
            else:
                self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.low > self.high else (self.low, self.high)


class ChannelMinMax:
    """The extremes of every index of one axis; `range` gives two arrays."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.low is None else len(self.low)

    def update(self, values: torch.Tensor) -> None:
        rows = values.movedim(self.axis, 0).flatten(1)
        low, high = rows.aminmax(dim=1)
        self.low = low if self.low is None else self.low.minimum(low)
        self.high = high if self.high is None else self.high.maximum(high)

    def range(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self.low is None or self.high is None:
            raise EdgecError("no calibration sample was seen")
        return self.low.numpy().astype(np.float64), self.high.numpy().astype(np.float64)


class Histogram(MinMax):
    """Base of the observers that weigh how often a value occurs.

    Bin edges are multiples of a power-of-two width and zeros are counted apart (every range represents them exactly),
    so the histogram does not depend on the order or the size of the batches. A value outside doubles the width.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(2 * BINS, np.int64)
        self.zeros = 0
        self.width = 0.0

    def update(self, values: torch.Tensor) -> None:
        import torch

        super().update(values)
        largest = max(abs(self.low), abs(self.high)) if values.numel() else 0.0
        if not math.isfinite(largest):
            return  # `affine` reports it with the tensor's name
        if self.width == 0.0 and largest > 0.0:
            self.width = max(2.0 ** math.ceil(math.log2(largest / BINS)), SMALLEST_WIDTH)
        while largest >= BINS * self.width > 0.0:
            self._double()
        for part in values.detach().to(torch.float32).flatten().split(CHUNK):
            zeros = int((part == 0).sum())
            self.zeros += zeros
            if zeros < part.numel():
                index = (part * (1 / self.width)).floor_().to(torch.int32).add_(BINS)
                self.counts += torch.bincount(index, minlength=2 * BINS).numpy()
                self.counts[BINS] -= zeros

    def _double(self) -> None:
        """Merge pairs of bins. Zero stays an edge, because the number of bins on each side is even."""
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(2 * BINS, np.int64)
        self.counts[BINS // 2 : BINS + BINS // 2] = merged
        self.width *= 2

    @property
    def centres(self) -> NDArray[np.float64]:
        return (np.arange(-BINS, BINS, dtype=np.float64) + 0.5) * self.width

    def range(self) -> tuple[float, float]:
        low, high = super().range()
        if not (self.counts.any() and math.isfinite(low) and math.isfinite(high)):
            return low, high
        chosen_low, chosen_high = self.search(low, high)
        return max(low, chosen_low), min(high, chosen_high)

    def search(self, low: float, high: float) -> tuple[float, float]:
        """Choose a range given the extremes and a histogram with at least one non-zero value."""
        raise NotImplementedError


class Percentile(Histogram):
    """Cut the given tail on either side; zeros count as values. `percentile` is in percent, above 50 up to 100."""

    name = "percentile"

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    def search(self, low: float, high: float) -> tuple[float, float]:
        counts = self.counts.copy()
        counts[BINS] += self.zeros
        tail = (1 - self.percentile / 100) * counts.sum()
        upper = len(counts) - int(np.searchsorted(np.cumsum(counts[::-1]), tail, side="right")) - BINS
        lower = int(np.searchsorted(np.cumsum(counts), tail, side="right")) - BINS
        return min(lower * self.width, 0.0), max(upper * self.width, 0.0)


class MeanSquare(Histogram):
    """Shrink the extremes together in steps of 1 % and keep the range of least mean |x - quantised(x)|^2.4.

    Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (its range search).
    """

    name = "mse"
    steps: ClassVar[int] = 80
    power: ClassVar[float] = 2.4

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.span = (1 << bits) - 1

    @property
    def importance(self) -> NDArray[np.float64]:
        """What the errors of the values in each bin count."""
        return self.counts.astype(np.float64)

    def search(self, low: float, high: float) -> tuple[float, float]:
        importance = self.importance
        used = np.flatnonzero(importance)
        values, counts = self.centres[used], importance[used]
        shrink = 1 - 0.01 * np.arange(self.steps)
        lows, highs = np.minimum(low * shrink, 0.0)[:, None], np.maximum(high * shrink, 0.0)[:, None]
        scales = np.maximum((highs - lows) / self.span, SMALLEST_SCALE)
        zeros = np.rint(-lows / scales)
        codes = np.clip(np.rint(values / scales) + zeros, 0, self.span)
        error = (np.abs((codes - zeros) * scales - values) ** self.power) @ counts
        best = int(error.argmin())
        return float(lows[best, 0]), float(highs[best, 0])


class Hessian(MeanSquare):
    """Like `MeanSquare`, but keep the range of least sum of g^2 (x - quantised(x))^2, where g^2 says how much the
    prediction depends on the value: a diagonal estimate of the second derivative of its divergence from the float one.

    Yuan et al., "PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization", ECCV
    2022; Shu et al., "TinySAM: Pushing the Envelope for Efficient Segment Anything Model". Without g^2 all values count
    alike.
    """

    name = "hessian"
    power: ClassVar[float] = 2.0
    weighs: ClassVar[bool] = True

    def __init__(self, bits: int = 8) -> None:
        super().__init__(bits)
        self.weighted = np.zeros(2 * BINS)

    def update(self, values: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """weights: g^2 of each value, in the same shape."""
        import torch

        super().update(values)
        if weights is None or not (math.isfinite(self.low) and math.isfinite(self.high)) or self.width == 0.0:
            return
        pairs = (x.detach().to(torch.float32).flatten().split(CHUNK) for x in (values, weights))
        for part, weight in zip(*pairs, strict=True):
            index = (part * (1 / self.width)).floor_().to(torch.int32).add_(BINS)
            # Zeros have no error in any range.
            weight = torch.where(part == 0, 0.0, weight).double()
            self.weighted += torch.bincount(index, weight, minlength=2 * BINS).numpy()

    def _double(self) -> None:
        super()._double()
        merged = self.weighted.reshape(-1, 2).sum(axis=1)
        self.weighted = np.zeros(2 * BINS)
        self.weighted[BINS // 2 : BINS + BINS // 2] = merged

    @property
    def importance(self) -> NDArray[np.float64]:
        return self.weighted if self.weighted.any() else super().importance


class Entropy(Histogram):
    """The threshold on |x| whose quantised distribution has least Kullback-Leibler divergence from the true one.

    Migacz, "8-bit Inference with TensorRT" (2017). The levels are those of one sign: 2^bits for data without negative
    values, half as many otherwise.
    """

    name = "kl"
    bins: ClassVar[int] = 2048
    smallest: ClassVar[float] = 1e-4

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits

    def search(self, low: float, high: float) -> tuple[float, float]:
        magnitudes, width = (self.counts[BINS:] + self.counts[:BINS][::-1]).astype(np.float64), self.width
        magnitudes = magnitudes[: np.flatnonzero(magnitudes)[-1] + 1]
        while len(magnitudes) > self.bins:
            magnitudes = np.append(magnitudes, np.zeros(len(magnitudes) % 2)).reshape(-1, 2).sum(axis=1)
            width *= 2
        levels = 1 << (self.bits if low >= 0 or high <= 0 else self.bits - 1)
        if len(magnitudes) <= levels:
            return low, high
        sizes = range(levels, len(magnitudes) + 1)
        scores = [self._divergence(magnitudes, size, levels) for size in sizes]
        threshold = (sizes[int(np.argmin(scores))] + 0.5) * width
        return -threshold, threshold

    def _divergence(self, magnitudes: NDArray[np.float64], size: int, levels: int) -> float:
        kept = magnitudes[:size]
        reference = kept.copy()
        reference[-1] += magnitudes[size:].sum()
        starts = np.arange(levels) * size // levels
        occupied = kept > 0
        numbers = np.add.reduceat(occupied.astype(np.float64), starts)
        means = np.divide(np.add.reduceat(kept, starts), numbers, out=np.zeros(levels), where=numbers > 0)
        quantised = np.repeat(means, np.diff(np.append(starts, size))) * occupied
        if quantised.sum() == 0:
            return math.inf
        p = np.maximum(reference / reference.sum(), self.smallest / size)
        q = np.maximum(quantised / quantised.sum(), self.smallest / size)
        return float(np.sum(p * np.log(p / q)))


OBSERVERS: tuple[str, ...] = (MinMax.name, Percentile.name, MeanSquare.name, Entropy.name, Hessian.name)


def make_observer(name: str, percentile: float = 99.99, bits: int = 8) -> Observer:
    """A new observer by name (one of OBSERVERS) of ranges for codes of so many bits.

    `percentile` is read by "percentile" only.
    """
    if name == Percentile.name:
        return Percentile(percentile)
    if name == MinMax.name:
        return MinMax()
    for kind in (MeanSquare, Entropy, Hessian):
        if kind.name == name:
            return kind(bits)
    raise EdgecError(f"'{name}' is not an observer", hint=f"use one of {', '.join(OBSERVERS)}")
