"""Weight rounding whose errors cancel within every kernel and every output channel.

Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation". Rounding each weight to the
nearest code leaves sums of rounding errors that grow with the kernel; on inputs that are alike across a kernel, such as
flat parts of an image, these sums are what reaches the output. Rounding a few weights the other way removes them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgec.quantparams import weight_range


def squant_codes(weights: ArrayLike, scales: ArrayLike, bits: int = 8) -> NDArray[np.int8]:
    """Symmetric codes of so many bits of weights [out, in, *kernel] whose axis 0 has one scale each.

    Weights are rounded to the nearest code; then, per kernel and after that per output channel, as few as possible are
    moved to the neighbour on their other side until the sum of the errors is at most half a code.

    Weights that are zero, pruned ones among them, have code 0: they have no error, and the errors of one sign, none
    larger than one code, are always enough to move.
    """
    values = np.asarray(weights, np.float64)
    steps = values / np.asarray(scales, np.float64).reshape(-1, *[1] * (values.ndim - 1))
    codes = np.rint(steps)
    depth = int(np.prod(values.shape[1:]))
    kernel = int(np.prod(values.shape[2:]))
    for size in (kernel, depth):
        codes = _balance(steps.reshape(-1, size), codes.reshape(-1, size))
    return np.clip(codes, *weight_range(bits)).reshape(values.shape).astype(np.int8)


def _balance(steps: NDArray[np.float64], codes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move, in each row, the codes with the largest error of the row's sign until the sum is at most one half."""
    errors = codes - steps
    total = errors.sum(axis=1, keepdims=True)
    sign, count = np.sign(total), np.rint(np.abs(total))
    rank = np.argsort(np.argsort(-errors * sign, axis=1, kind="stable"), axis=1, kind="stable")
    return codes - sign * (rank < count)
