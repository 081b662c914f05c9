"""Element-wise TIR of TVM's library as kernels of the dialect, on PoCL and lavapipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from edgec.targets.device import load_device
from edgec.targets.gpu.chains import chain
from edgec.targets.gpu.lower import lower_to_gpu
from tests.targets.test_gpu_lower import APIS, library, run

Made = tuple[list[Any], Callable[..., np.ndarray]]


def _inputs(*shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    return [te.placeholder(s, dtype, f"x{i}") for i, s in enumerate(shapes)]


def scaled() -> Made:
    """A chain over channels: two steps, each with memory of its own before it is inlined."""
    x, a, b = _inputs((3, 5, 8), (8,), (8,))
    y: Any = te.compute(x.shape, lambda i, j, k: x[i, j, k] * a[k] + b[k])
    z = te.compute(x.shape, lambda i, j, k: y[i, j, k] * te.sigmoid(y[i, j, k]))
    return [x, a, b, z], lambda x, a, b: (x * a + b) / (1 + np.exp(-(x * a + b)))


def functions() -> Made:
    """Without any broadcast: one row, which does not fill the last vector."""
    x, y = _inputs((5, 11), (5, 11))

    def value(i: Any, j: Any) -> Any:
        root = te.rsqrt(tirx.abs(x[i, j]) + 1.5)
        return te.erf(x[i, j]) + te.tanh(y[i, j]) * root + te.max(te.exp(y[i, j]), 1.0) + te.power(x[i, j], 3.0)

    def want(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        from scipy.special import erf

        return erf(x) + np.tanh(y) / np.sqrt(np.abs(x) + 1.5) + np.maximum(np.exp(y), 1) + x**3

    return [x, y, te.compute(x.shape, value)], want


def padded() -> Made:
    """Three channels of four, around a border, as halves."""
    (x,) = _inputs((6, 7, 3))

    def value(i: Any, j: Any, k: Any) -> Any:
        inside = tirx.all(i >= 1, i < 7, j >= 2, j < 9, k < 3)
        return tirx.if_then_else(inside, x[i - 1, j - 2, k], 0.0).astype("float16")

    return [x, te.compute((8, 10, 4), value)], lambda x: np.pad(x, ((1, 1), (2, 1), (0, 1))).astype(np.float16)


def halves() -> Made:
    x, a = _inputs((2, 12), (12,), dtype="float16")
    y = te.compute(x.shape, lambda i, j: (x[i, j] * a[j]).astype("float32"))
    return [x, a, y], lambda x, a: x.astype(np.float32) * a


def joined() -> Made:
    """Operands of 6, 4 and 5 channels: vectors cross their ends."""
    a, b, c = _inputs((3, 6), (3, 4), (3, 5))

    def value(i: Any, j: Any) -> Any:
        rest = tirx.if_then_else(j >= 6, b[i, j - 6], a[i, j])
        return tirx.if_then_else(j >= 10, c[i, j - 10] * 2.0, rest)

    return [a, b, c, te.compute((3, 15), value)], lambda a, b, c: np.concatenate([a, b, 2 * c], 1)


def joined_whole() -> Made:
    """Operands of 8 and 4 channels: every vector is of one of them."""
    a, b = _inputs((3, 8), (3, 4))
    y = te.compute((3, 12), lambda i, j: tirx.if_then_else(j < 8, a[i, j], b[i, j - 8]))
    return [a, b, y], lambda a, b: np.concatenate([a, b], 1)


def moved() -> Made:
    """Other places: every second row, doubled columns, transposed."""
    (x,) = _inputs((9, 6))
    return [x, te.compute((12, 5), lambda i, j: x[j * 2, i // 2])], lambda x: x[::2].T.repeat(2, 0)


def chosen() -> Made:
    """By values, not by places."""
    x, y = _inputs((4, 8), (4, 8))
    z = te.compute(x.shape, lambda i, j: tirx.Select(tirx.all(x[i, j] > y[i, j], y[i, j] <= 0.5), x[i, j], -y[i, j]))
    return [x, y, z], lambda x, y: np.where((x > y) & (y <= 0.5), x, -y)


def widened() -> Made:
    (x,) = _inputs((3, 10), dtype="int8")
    return [x, te.compute(x.shape, lambda i, j: x[i, j].astype("float32") * 0.1)], lambda x: x * np.float32(0.1)


def bytes_moved() -> Made:
    (x,) = _inputs((5, 8), dtype="int8")
    y = te.compute((6, 8), lambda i, j: tirx.if_then_else(i < 5, x[i, j], tirx.const(-7, "int8")))
    return [x, y], lambda x: np.pad(x, ((0, 1), (0, 0)), constant_values=-7)


def bytes_joined() -> Made:
    """Bytes of one word from several work items."""
    x, y = _inputs((7, 5), (7, 6), dtype="int8")
    z = te.compute((7, 11), lambda i, j: tirx.if_then_else(j < 5, x[i, j], y[i, j - 5]))
    return [x, y, z], lambda x, y: np.concatenate([x, y], 1)


CASES = (scaled, functions, padded, halves, joined, joined_whole, moved, chosen, widened, bytes_moved, bytes_joined)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("case", CASES)
def test_chain(case: Callable[[], Made], api: str) -> None:
    tensors, meaning = case()
    *inputs, output = tensors
    rng = np.random.default_rng(1)
    arrays = []
    for x in inputs:
        shape = tuple(int(n) for n in x.shape)
        real = rng.standard_normal(shape)
        arrays.append(
            (real * 40).clip(-128, 127).astype(np.int8) if "int8" in str(x.dtype) else real.astype(str(x.dtype))
        )
    function = library(*tensors)
    lowered = lower_to_gpu(tvm.IRModule({"net_f": function}), load_device(api))
    (launch,) = lowered.variants["net_f"][0]
    assert lowered.chains == {"net_f"} and launch.function.startswith("chain_")
    got, _ = run(function, api, arrays, tuple(int(n) for n in output.shape), str(output.dtype))
    want = meaning(*arrays)
    assert want.shape == got.shape and len(np.unique(want)) > 10
    # Halves are rounded once, at the end; erf is a polynomial.
    tolerance = 2e-3 if "float16" in (str(output.dtype), str(inputs[0].dtype)) else 2e-6
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=1e-6)


@pytest.mark.pure
def test_vectors_are_read_whole_where_they_are() -> None:
    for case, buffers in ((scaled, 4), (halves, 2), (joined_whole, 2)):
        text = lower_to_gpu(tvm.IRModule({"net_f": library(*case()[0])}), load_device("vulkan")).module
        assert text.count("read> x") == text.count("read> x0: array<vec4") + text.count("read> x") - 1
        assert sum(f"x{i}: array<vec4" in text for i in range(4)) == buffers - (case is scaled), case


@pytest.mark.pure
def test_what_is_no_chain_is_left_to_tvm() -> None:
    (x,) = _inputs((5, 8))
    k = te.reduce_axis((0, 8), "k")
    total = te.compute((5,), lambda i: te.sum(x[i, k], axis=k))
    (wide,) = _inputs((8,), dtype="int64")
    (codes,) = _inputs((8,), dtype="int8")
    device = load_device("vulkan")
    for tensors in (
        [x, total],
        [wide, te.compute((8,), lambda i: wide[i] + wide[i])],
        # Sums of bytes wrap; a root of its own, and negative numbers to a fraction, are not in WGSL.
        [codes, te.compute((8,), lambda i: codes[i] + codes[i])],
        [x, te.compute((5, 8), lambda i, j: te.power(x[i, j], 1.7))],
    ):
        assert chain(library(*tensors), device) is None
