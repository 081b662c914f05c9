"""Codes of attention probabilities: what codes mean, exact products, and that they fit rows of a softmax better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.errors import EdgecError
from edgec.probabilities import FLAG, SPLITS, STEPS, Log2, ProbabilityCode, Twin, Uniform, best_twin, softmax_codes

pytestmark = pytest.mark.pure
CODES: tuple[ProbabilityCode, ...] = (Uniform(), Twin(0), Twin(3), Twin(9), Log2(2), Log2(3), Log2(4))


def rows(seed: int, *shape: int, sharpness: float = 3.0) -> np.ndarray:
    """Softmax of normal scores."""
    scores = np.exp(np.random.default_rng(seed).standard_normal(shape) * sharpness)
    return scores / scores.sum(-1, keepdims=True)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_every_code_comes_back(code: ProbabilityCode) -> None:
    """Decoding and encoding again gives a code of the same number; encoding goes to a nearest one of its grid."""
    q = np.arange(256 if not isinstance(code, Log2) else code.zero + 1).astype(np.uint8)
    again = code.encode(code.decode(q))
    np.testing.assert_allclose(code.decode(again), code.decode(q), atol=1 / STEPS if isinstance(code, Twin) else 0)
    p = np.linspace(0, 1, 4001)
    assert np.all(np.diff(code.decode(code.encode(p))) >= -1e-12)


@pytest.mark.parametrize("split", (1, 2, 5, 7))
def test_twin_is_on_either_grid(split: int) -> None:
    """Errors of half a step of the grid that a number is on, also next to the split: no part of the other is added."""
    code, tau = Twin(split), 2.0**-split
    for low, high, step in ((0.0, tau * (1 - 1e-9), tau / STEPS), (tau, 1.0, 1 / STEPS)):
        p = np.linspace(low, high, 999)
        q = code.encode(p)
        assert np.all((q >= FLAG)[p > low + step] == (low > 0))
        assert np.abs(code.decode(q) - p).max() <= step / 2 + 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(CODES), st.integers(0, 2**20), st.integers(1, 70))
def test_products_are_exact(code: ProbabilityCode, seed: int, keys: int) -> None:
    rng = np.random.default_rng(seed)
    q = code.encode(rows(seed, 2, 3, keys))
    v = rng.integers(-128, 128, (2, keys, 5)).astype(np.int8)
    sums, scale = code.product(q, v)
    assert sums.dtype == np.int32
    np.testing.assert_allclose(sums * scale, code.decode(q) @ v.astype(np.float64), rtol=1e-12, atol=1e-9)


def test_search_never_loses_and_twin_beats_uniform() -> None:
    p = rows(0, 4, 50, 197)
    chosen = best_twin(p)

    def error(code: ProbabilityCode) -> float:
        return float(((code.decode(code.encode(p)) - p) ** 2).sum())

    assert error(chosen) == min(error(Twin(split)) for split in SPLITS)
    assert error(chosen) < 0.7 * error(Uniform())
    # Where only tiny numbers matter, the small grid gets finer.
    assert best_twin(p, weights=(p < 0.01).astype(float)).split > chosen.split


def test_integer_softmax() -> None:
    rng = np.random.default_rng(1)
    scores, scale = rng.integers(-128, 128, (20, 197)).astype(np.int8), 0.05
    real = np.exp(scores * scale)
    real /= real.sum(-1, keepdims=True)
    assert np.abs(softmax_codes(scores, scale) / 256 - real).max() <= 1 / 256
    assert softmax_codes(np.zeros((1, 1), np.int8), scale).item() == 255


def test_what_does_not_fit() -> None:
    with pytest.raises(EdgecError, match="split"):
        Twin(20)
    with pytest.raises(EdgecError, match="bits"):
        Log2(8)
    with pytest.raises(EdgecError, match="int32"):
        Twin(19).product(np.full((1, 999), 255, np.uint8), np.full((999, 1), 127, np.int8))
