"""SQuant's rounding: neighbours only, balanced sums, and what that buys on flat inputs."""

from __future__ import annotations

import numpy as np
import pytest

from edgec.passes.quantization.squant import squant_codes
from edgec.quantparams import quantize_weights, symmetric_scales

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (6, 1, 3, 3), (16, 40, 1, 1), (10, 64)])
def test_sums_balance_and_codes_are_neighbours(shape):
    weights = np.random.default_rng(0).normal(size=shape) ** 3
    scales = symmetric_scales(weights, per_channel=True)
    codes = squant_codes(weights, scales).astype(np.float64)
    steps = weights / scales.reshape(-1, *[1] * (len(shape) - 1))
    errors = codes - steps
    assert np.abs(codes).max() <= 127
    assert np.abs(errors).max() < 1.0 + 1e-9
    assert np.abs(errors.reshape(shape[0], -1).sum(axis=1)).max() <= 0.5 + 1e-9
    kernels = errors.reshape(shape[0], shape[1], -1).sum(axis=2)
    assert np.abs(kernels).max() <= 1.5 + 1e-9


def test_codes_that_balance_already_stay():
    weights = np.array([[127.0, -3.0, 5.0]])
    assert squant_codes(weights, [1.0]).tolist() == [[127, -3, 5]]


def test_largest_errors_move_first():
    weights = np.array([[127.0, 1.4, 2.4, 3.45, 0.0]])
    # Nearest gives errors -0.4, -0.4, -0.45, a sum of -1.25: one code goes up, the one with the largest error.
    assert squant_codes(weights, [1.0]).tolist() == [[127, 1, 2, 4, 0]]


def test_flat_inputs_come_out_right():
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(32, 16, 3, 3))
    scales = symmetric_scales(weights, per_channel=True)

    def error(codes: np.ndarray) -> float:
        """Of the response to a constant image."""
        return float(np.abs((codes * scales.reshape(-1, 1, 1, 1) - weights).sum(axis=(1, 2, 3))).mean())

    assert error(squant_codes(weights, scales)) < 0.2 * error(quantize_weights(weights, scales))
