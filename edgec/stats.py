"""The numbers behind metrics: energies, cosines, decibels, and confidence intervals of paired differences."""

from __future__ import annotations

import math

import numpy as np

# Signal-to-noise ratios are cut at +-CAP_DB, so that identical outputs have a finite one. Rounding to float32 alone
# costs about this much: an error of 2^-25 of the value is 150 dB below it.
CAP_DB = 150.0
Z_95 = 1.959963984540054
# 97.5 % quantiles of Student's t with 1, 2, … degrees of freedom.
T_975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
# Samples whose float64 copies are held at once while energies are summed.
CHUNK = 512


def output_fidelity(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, float]:
    """(cosine, SQNR in dB) of two arrays [n, ...] of the same shape, over all samples together.

    SQNR is cut at +-CAP_DB; both are NaN when an array has a NaN or an infinity.
    """
    dot, ours, theirs = (part.sum(keepdims=True) for part in products(reference, candidate))
    noise = energy(reference, candidate).sum(keepdims=True)
    return float(cosine_of(dot, ours, theirs)[0]), float(decibel(ours, noise)[0])


def paired_proportions_ci(lost: int, won: int, n: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions: Wald with the Laplace adjustment of Bonett and Price.

    `lost` samples were right before and are wrong now, `won` the reverse, of `n`; the difference (lost - won) / n is
    in -1..1. One sample is added to each of the two, so that the interval keeps a width of about 2.8 / n on either
    side when no sample changed.

    Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired
    Data", Journal of Educational and Behavioral Statistics 37 (2012); recommended by Fagerland, Lydersen and Laake,
    Statistics in Medicine 33 (2014).
    """
    p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = Z_95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(p - q - half, -1.0), min(p - q + half, 1.0)


def paired_mean_ci(losses: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences (Student's t); None for fewer than two, or with NaN."""
    if len(losses) < 2 or not np.isfinite(losses).all():
        return None
    half = t_975(len(losses) - 1) * float(losses.std(ddof=1)) / math.sqrt(len(losses))
    mean = float(losses.mean())
    return mean - half, mean + half


def t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, for 1 degree of freedom or more, to 1e-5.

    Tabled where the expansion in 1 / freedom is too coarse: Abramowitz and Stegun, "Handbook of Mathematical
    Functions", 26.7.5.
    """
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def sample_rows(array: np.ndarray, start: int) -> np.ndarray:
    part = array[start : start + CHUNK].astype(np.float64)
    return part.reshape(len(part), -1)


def energy(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """float64 [n]: the sum over each sample of a^2, or of (a - b)^2; NaN for samples that are not finite."""
    parts = []
    for start in range(0, len(a), CHUNK):
        with np.errstate(invalid="ignore", over="ignore"):
            x = sample_rows(a, start) if b is None else sample_rows(a, start) - sample_rows(b, start)
            total = np.einsum("nk,nk->n", x, x)
        parts.append(np.where(np.isfinite(total), total, np.nan))
    return np.concatenate(parts)


def products(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [n] each: a·b, a·a, b·b of every sample."""
    parts = []
    for start in range(0, len(a), CHUNK):
        with np.errstate(invalid="ignore", over="ignore"):
            parts.append(np.einsum("nk,nk->n", sample_rows(a, start), sample_rows(b, start)))
    return np.concatenate(parts), energy(a), energy(b)


def cosine_of(dot: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norm = np.sqrt(a) * np.sqrt(b)
    cosine = np.divide(dot, norm, out=np.where((a == 0) & (b == 0), 1.0, 0.0), where=norm != 0)
    return np.where(np.isfinite(norm), np.clip(cosine, -1.0, 1.0), np.nan)


def decibel(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """10 log10(signal / noise), cut at +-CAP_DB; no noise is CAP_DB, noise without signal -CAP_DB."""
    limit = 10 ** (CAP_DB / 10)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(noise == 0, limit, signal / noise)
    ratio = np.where(np.isnan(signal) | np.isnan(noise), np.nan, np.clip(ratio, 1 / limit, limit))
    return 10 * np.log10(ratio)


def sqnr_db(got: np.ndarray, want: np.ndarray) -> float:
    """10 log10 of signal over error energy of whole arrays, not cut: infinity for equal ones, NaN where one has any."""
    signal, error = (float((x.astype(np.float64) ** 2).sum()) for x in (want, got.astype(np.float64) - want))
    return 10 * float(np.log10(max(signal, 1e-300) / error)) if error else math.inf
