"""The loop order given to operators without a template: same values, result's last axis innermost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tvm.relax import op as R

from edgec.targets.device import load_device
from edgec.targets.kernels.conv2d import Conv2D, accumulate
from edgec.targets.schedule import schedule
from tests.targets.kernel_runner import Call, assert_close, run_calls
from tests.targets.test_codegen import softmax, tir

HOST = load_device("host")


def planar(x: np.ndarray, w: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """3 x 3 convolution in NCHW with padding 1."""
    _, c, h, width = x.shape
    spec = Conv2D(h, width, c, len(w), (3, 3), (stride, stride), (1, 1, 1, 1), groups=groups)
    return accumulate(x[0].transpose(1, 2, 0), w, spec).transpose(2, 0, 1)[None].astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def convolution(stride: int, groups: int) -> tuple[Any, Any]:
    return (
        lambda x, w: R.nn.conv2d(x, w, strides=[stride, stride], padding=[1, 1], groups=groups),
        lambda x, w: planar(x, w, stride, groups),
    )


# operator, meaning, shapes, whether the loop order changes, whether vectors are written out
CASES: dict[str, tuple[Any, Any, tuple[tuple[int, ...], ...], bool, bool]] = {
    "odd product": (R.matmul, np.matmul, ((3, 19, 7), (3, 7, 197)), True, False),
    "whole vectors": (R.matmul, np.matmul, ((2, 5, 33), (2, 33, 128)), True, True),
    "with bias and gelu": (
        lambda x, y, b: R.nn.gelu(R.add(R.matmul(x, y), b)),
        lambda x, y, b: gelu(x @ y + b),
        ((4, 9), (9, 64), (64,)),
        True,
        True,
    ),
    "planar convolution": (*convolution(1, 1), ((1, 6, 7, 16), (5, 6, 3, 3)), True, True),
    "grouped": (*convolution(1, 2), ((1, 6, 7, 11), (4, 3, 3, 3)), True, False),
    "strided": (*convolution(2, 1), ((1, 6, 7, 11), (5, 6, 3, 3)), False, False),
    "softmax": (lambda x: R.nn.softmax(x, -1), softmax, ((5, 33),), False, False),
    "sum over the middle": (lambda x: R.sum(x, [1]), lambda x: x.sum(1), ((3, 17, 64),), True, True),
}


@pytest.mark.host
@pytest.mark.parametrize("name", CASES)
def test_values_and_order(name: str) -> None:
    build, meaning, shapes, changes, vectors = CASES[name]
    function = tir(build, *shapes)
    result = schedule(function, HOST)
    assert (not result.same_as(function)) == changes
    assert ("T.vectorized" in str(result)) == vectors
    rng = np.random.default_rng(0)
    inputs = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    expected = np.ascontiguousarray(meaning(*inputs)).astype(np.float32)
    call = Call(function, inputs, ((expected.shape, "float32"),))
    assert_close(run_calls([call], HOST)[0][0], expected)


@pytest.mark.pure
def test_dot_products_of_rows_stay() -> None:
    """With the second operand transposed, the result's last axis is not read in order: left alone."""
    function = tir(lambda x, y: R.einsum((x, y), "ik,jk->ij"), (5, 32), (64, 32))
    assert schedule(function, HOST).same_as(function)


@pytest.mark.pure
def test_templates_stay() -> None:
    function = Conv2D(4, 4, 4, 4).prim_func(HOST)
    assert schedule(function, HOST).same_as(function)
