"""The loop order given to operators without a template: same values, result's last axis innermost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from edgec.targets.codegen import lower_kernels
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


# operator, meaning, shapes, whether vectors are written out
CASES: dict[str, tuple[Any, Any, tuple[tuple[int, ...], ...], bool]] = {
    "odd product": (R.matmul, np.matmul, ((3, 19, 7), (3, 7, 197)), False),
    "whole vectors": (R.matmul, np.matmul, ((2, 5, 33), (2, 33, 128)), True),
    "with bias and gelu": (
        lambda x, y, b: R.nn.gelu(R.add(R.matmul(x, y), b)),
        lambda x, y, b: gelu(x @ y + b),
        ((4, 9), (9, 64), (64,)),
        True,
    ),
    "planar convolution": (*convolution(1, 1), ((1, 6, 7, 16), (5, 6, 3, 3)), True),
    "grouped": (*convolution(1, 2), ((1, 6, 7, 11), (4, 3, 3, 3)), False),
    "strided": (*convolution(2, 1), ((1, 6, 7, 11), (5, 6, 3, 3)), False),
    "softmax": (lambda x: R.nn.softmax(x, -1), softmax, ((5, 33),), False),
    "softmax of whole vectors": (lambda x: R.nn.softmax(x, -1), softmax, ((5, 64),), True),
    "dot products": (
        lambda x, y: R.einsum((x, y), "ik,jk->ij"),
        lambda x, y: x @ y.T,
        ((5, 160), (64, 160)),
        True,
    ),
    "one vector": (lambda x: R.sum(x, [1]), lambda x: x.sum(1), ((3, 16),), True),
    "sum over the middle": (lambda x: R.sum(x, [1]), lambda x: x.sum(1), ((3, 17, 64),), True),
}


@pytest.mark.host
@pytest.mark.parametrize("name", CASES)
def test_values_and_order(name: str) -> None:
    build, meaning, shapes, vectors = CASES[name]
    function = tir(build, *shapes)
    result = schedule(function, HOST)
    assert ("T.vectorized" in str(result)) == vectors
    rng = np.random.default_rng(0)
    inputs = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    expected = np.ascontiguousarray(meaning(*inputs)).astype(np.float32)
    call = Call(function, inputs, ((expected.shape, "float32"),))
    assert_close(run_calls([call], HOST)[0][0], expected)


def halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x[:, 9:] * 2, x[:, :9] + 1], 1)


# Operators that move elements: operator, meaning, shapes.
MOVES: dict[str, tuple[Any, Any, tuple[tuple[int, ...], ...]]] = {
    "last axis": (
        lambda x, y, z: R.concat([x, y, z], -1),
        lambda *x: np.concatenate(x, -1),
        ((3, 5, 24), (3, 5, 1), (3, 5, 16)),
    ),
    "first axis": (lambda x, y: R.concat([x, y], 0), lambda *x: np.concatenate(x, 0), ((17, 5), (2, 5))),
    "middle axis": (lambda x, y: R.concat([x, y], 1), lambda *x: np.concatenate(x, 1), ((2, 3, 4, 5), (2, 9, 4, 5))),
    "border": (
        lambda x: R.nn.pad(x, [0, 0, 1, 2, 3, 4]),
        lambda x: np.pad(x, ((0, 0), (1, 2), (3, 4))),
        ((20, 5, 7),),
    ),
    "border of the first axis": (lambda x: R.nn.pad(x, [2, 3, 0, 0]), lambda x: np.pad(x, ((2, 3), (0, 0))), ((5, 7),)),
    "swapped halves": (
        lambda x: R.concat(
            [
                R.multiply(R.strided_slice(x, [1], [9], [18]), relax.const(2.0)),
                R.add(R.strided_slice(x, [1], [0], [9]), relax.const(1.0)),
            ],
            1,
        ),
        halves,
        ((4, 18, 6),),
    ),
}


@pytest.mark.host
@pytest.mark.parametrize("name", MOVES)
def test_loops_that_only_move_ask_nothing(name: str) -> None:
    """One pass over the result, without a condition for each element."""
    build, meaning, shapes = MOVES[name]
    function = tir(build, *shapes)
    lowered = lower_kernels(tvm.IRModule({"k": function}), HOST)
    text = str(lowered.module["k"].script())
    assert "if_then_else" not in text and "Select" not in text and not lowered.scratch["k"]
    assert [tasks > 1 for _, tasks in lowered.phases["k"]] == [True]
    rng = np.random.default_rng(0)
    inputs = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    expected = np.ascontiguousarray(meaning(*inputs))
    call = Call(function, inputs, ((expected.shape, "float32"),))
    np.testing.assert_array_equal(run_calls([call], HOST)[0][0], expected)


@pytest.mark.pure
def test_templates_stay() -> None:
    function = Conv2D(4, 4, 4, 4).prim_func(HOST)
    assert schedule(function, HOST).same_as(function)
