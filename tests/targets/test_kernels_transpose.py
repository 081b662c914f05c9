"""Axis permutations: compiled host code against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.targets.kernels.transpose import Transpose
from tests.targets.kernel_cases import host
from tests.targets.kernel_runner import assert_close, run_calls, spec_call


@st.composite
def transposes(draw: st.DrawFn) -> Transpose:
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 5, 16, 17, 33)), min_size=1, max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    return Transpose(shape, order, draw(st.sampled_from(("int8", "float32", "int32", "int64"))))


@pytest.mark.host
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(transposes(), min_size=1, max_size=12))
def test_any_permutation(specs: list[Transpose]) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.integers(-128, 128, spec.shape).astype(spec.dtype) for spec in specs]
    results = [x.transpose(spec.permutation) for spec, x in zip(specs, inputs, strict=True)]
    calls = [spec_call(s, host(), [x], y) for s, x, y in zip(specs, inputs, results, strict=True)]
    for spec, x, (got,), expected in zip(specs, inputs, run_calls(calls, host()), results, strict=True):
        np.testing.assert_array_equal(spec.reference(x), expected)
        assert_close(got, expected)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("shape", "order", "merged"),
    [
        ((1, 3, 32, 32), (0, 2, 3, 1), ((3, 1024), (1, 0))),
        ((1, 32, 32, 3), (0, 3, 1, 2), ((1024, 3), (1, 0))),
        ((2, 3, 4, 5), (0, 1, 2, 3), ((120,), (0,))),
        ((2, 3, 4, 5), (2, 3, 0, 1), ((6, 20), (1, 0))),
        ((2, 1, 4, 5), (2, 1, 0, 3), ((2, 4, 5), (1, 0, 2))),
        ((1, 1), (1, 0), ((), ())),
    ],
)
def test_neighbouring_axes_are_joined(shape: tuple, order: tuple, merged: tuple) -> None:
    assert Transpose(shape, order).merged() == merged


@pytest.mark.pure
def test_not_a_permutation() -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        Transpose((2, 3), (0, 0))
