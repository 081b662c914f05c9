"""The torch operators equal the NumPy definitions bit for bit, export with a symbolic batch and survive saving."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer, qops
from edgec.errors import EdgecError

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec
CODES = st.integers(-128, 127)


def codes(rng: np.random.Generator, *shape: int, low: int = -128) -> np.ndarray:
    return rng.integers(low, 128, shape).astype(np.int8)


def tensors(*values):
    return [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in values]


def same(operator, definition, *args) -> np.ndarray:
    """Run both forms on the same arguments; returns the result after asserting equality of values and layout."""
    want = definition(*args)
    got = operator(*tensors(*args))
    assert got.is_contiguous()
    assert got.dtype == torch.from_numpy(want).dtype
    np.testing.assert_array_equal(got.numpy(), want)
    return want


def requantisation(
    rng: np.random.Generator, channels: int, reach: float, requant: str = "RQ1"
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers that spread accumulators of about `reach` over the int8 range, with one dead channel."""
    m, shift = integer.multipliers(rng.uniform(20, 400, channels) / reach, requant)
    m[0] = 0
    return m, shift


CONVS = [
    # n, h, w, ci, co, kernel, stride, padding, dilation, groups
    (2, 7, 9, 3, 8, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (1, 8, 8, 5, 7, (3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1),
    (1, 9, 6, 6, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 6),
    (2, 9, 9, 6, 12, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 6),
    (1, 11, 11, 4, 6, (3, 2), (1, 2), (2, 1, 0, 3), (2, 1), 2),
    (3, 5, 5, 17, 33, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (17, 8, 8, 16, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("requant", integer.REQUANTS)
@pytest.mark.parametrize("case", CONVS)
def test_qconv2d(case, requant, layout):
    n, h, w, ci, co, kernel, stride, padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x = codes(rng, *((n, ci, h, w) if layout == "NCHW" else (n, h, w, ci)))
    weights = codes(rng, co, ci // groups, *kernel, low=-127)
    bias = rng.integers(-5000, 5000, co).astype(np.int32)
    m, shift = requantisation(rng, co, 127 * 70 * np.sqrt(weights[0].size), requant)
    args = (x, weights, bias, m, shift, stride, padding, dilation, groups, -11, 5, -100, 90, layout)
    y = same(edgec.qconv2d, integer.qconv2d, *args)
    assert np.unique(y).size > 20
    assert y.min() >= -100 and y.max() <= 90


@pytest.mark.parametrize("requant", integer.REQUANTS)
@pytest.mark.parametrize("depth", [9, 1033, 20_000, 60_000])
def test_qlinear_is_exact_at_every_depth(depth, requant):
    """Worst-case operands, so that float32 alone would round: depth 1,033 is the first that needs split weights."""
    rng = np.random.default_rng(depth)
    x = np.concatenate([np.full((1, depth), -128, np.int8), codes(rng, 3, depth)])
    weights = np.concatenate([np.full((1, depth), 127, np.int8), codes(rng, 4, depth, low=-127)])
    weights[0, 0] = 126
    bias = rng.integers(-9, 9, 5).astype(np.int32)
    m, shift = integer.multipliers(np.full(5, 0.99), requant)
    acc = np.einsum("nk,ok->no", x.astype(np.int64), weights.astype(np.int64)) + bias
    got = qops._exact_sums(
        lambda w: torch.nn.functional.linear(torch.from_numpy(x).to(w.dtype), w), torch.from_numpy(weights)
    )
    np.testing.assert_array_equal((got + torch.from_numpy(bias)).numpy(), acc)
    same(edgec.qlinear, integer.qlinear, x, weights, bias, m, shift, 3, -128, 127)


def test_qlinear_keeps_leading_axes():
    rng = np.random.default_rng(1)
    m, shift = requantisation(rng, 6, 127 * 70 * 4)
    args = (codes(rng, 2, 3, 5, 16), codes(rng, 6, 16, low=-127), np.arange(6, dtype=np.int32), m, shift, 0, -128, 127)
    assert same(edgec.qlinear, integer.qlinear, *args).shape == (2, 3, 5, 6)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("case", CONVS)
def test_qconv2d_float(case, layout):
    n, h, w, ci, co, kernel, stride, padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x = codes(rng, *((n, ci, h, w) if layout == "NCHW" else (n, h, w, ci)))
    weights = codes(rng, co, ci // groups, *kernel, low=-127)
    bias = rng.integers(-(2**31) + 2**24, 2**31 - 2**24, co).astype(np.int32)
    scale = rng.uniform(1e-6, 1e-2, co).astype(np.float32)
    same(
        edgec.qconv2d_float,
        integer.qconv2d_float,
        x,
        weights,
        bias,
        scale,
        stride,
        padding,
        dilation,
        groups,
        -11,
        layout,
    )


def test_qlinear_float_rounds_twice_in_float32():
    rng = np.random.default_rng(1)
    x, w = codes(rng, 2, 3, 5, 16), codes(rng, 6, 16, low=-127)
    bias = np.array([0, 1, -7, 2**30 + 1, -(2**30) - 3, 2**24 + 1], np.int32)
    scale = rng.uniform(1e-6, 1e-2, 6).astype(np.float32)
    y = same(edgec.qlinear_float, integer.qlinear_float, x, w, bias, scale)
    assert y.shape == (2, 3, 5, 6) and y.dtype == np.float32
    exact = (np.einsum("...k,ok->...o", x.astype(float), w.astype(float)) + bias) * scale
    assert np.abs(y / exact - 1).max() < 2.0**-22
    with pytest.raises(EdgecError, match="left int32"):
        integer.qlinear_float(x, w, np.full(6, 2**31 - 1, np.int32), scale)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-12, 5e8), min_size=1, max_size=9), CODES)
def test_requantisation_by_floats_at_any_scale(scales, zero_point):
    """Accumulators up to the ends of int32, as biases of a layer with zero weights; ties by powers of two."""
    rng = np.random.default_rng(0)
    channels = 64 * len(scales)
    m, shift = integer.float_multipliers(np.repeat([*scales[:-1], 2.0 ** np.rint(np.log2(scales[-1]))], 64))
    bias = (rng.uniform(-1, 1, channels) * 2.0 ** rng.uniform(0, 31, channels)).astype(np.int32)
    bias[0], bias[-1] = -(2**31), 2**31 - 1
    w = np.zeros((channels, 1), np.int8)
    same(edgec.qlinear, integer.qlinear, codes(rng, 1, 1), w, bias, m, shift, zero_point, -128, 127)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 10), st.floats(1e-6, 10), st.floats(1e-3, 10), CODES, CODES, CODES, st.booleans())
def test_qadd(sa, sb, sy, za, zb, zy, subtract):
    rng = np.random.default_rng(0)
    a, b = codes(rng, 2, 4, 5, 5), codes(rng, 4, 1, 1)
    ma, mb, f = integer.add_parameters(sa, -sb if subtract else sb, sy)
    same(edgec.qadd, integer.qadd, a, b, ma, mb, f, za, zb, zy, -128, 127)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 100), CODES, CODES, CODES)
def test_qmul_and_qrescale(scale, za, zb, zy):
    rng = np.random.default_rng(0)
    m, shift = integer.quantize_multiplier(scale)
    a, b = codes(rng, 2, 4, 5, 5), codes(rng, 2, 4, 1, 1)
    same(edgec.qmul, integer.qmul, a, b, m, shift, za, zb, zy, -128, 127)
    same(edgec.qrescale, integer.qrescale, a, m, shift, za, zy, -120, 100)


def test_qlut():
    rng = np.random.default_rng(0)
    x = codes(rng, 2, 5, 4, 3)
    same(edgec.qlut, integer.qlut, x, codes(rng, 256), 0)
    for axis in range(4):
        same(edgec.qlut, integer.qlut, x, codes(rng, x.shape[axis], 256), axis)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kernel,stride,padding", [((2, 2), (2, 2), (0, 0, 0, 0)), ((3, 2), (1, 3), (1, 1, 0, 1))])
def test_qavg_pool2d(kernel, stride, padding, layout):
    rng = np.random.default_rng(0)
    m, shift = integer.quantize_multiplier(1.3 / (kernel[0] * kernel[1]))
    same(
        edgec.qavg_pool2d,
        integer.qavg_pool2d,
        codes(rng, 2, 7, 8, 9),
        kernel,
        stride,
        padding,
        m,
        shift,
        -7,
        4,
        -128,
        127,
        layout,
    )


@pytest.mark.parametrize("dim,keepdim", [((2, 3), True), ((-1, -2), False), ((1,), False)])
def test_qmean(dim, keepdim):
    rng = np.random.default_rng(0)
    m, shift = integer.quantize_multiplier(0.9 / 20)
    same(edgec.qmean, integer.qmean, codes(rng, 2, 6, 4, 5), dim, keepdim, m, shift, -128, -128, -128, 127)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    "kernel,stride,padding,dilation",
    [
        ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
        ((2, 3), (3, 2), (0, 1, 1, 0), (2, 1)),
    ],
)
def test_qmax_pool2d(kernel, stride, padding, dilation, ceil_mode, layout):
    rng = np.random.default_rng(0)
    args = (codes(rng, 2, 9, 7, 8), kernel, stride, padding, dilation, ceil_mode, layout)
    y = same(edgec.qmax_pool2d, integer.qmax_pool2d, *args)
    if layout == "NCHW" and padding[0] == padding[1] and padding[2] == padding[3]:
        x = torch.from_numpy(args[0]).float()
        want = torch.nn.functional.max_pool2d(x, kernel, stride, (padding[0], padding[2]), dilation, ceil_mode)
        np.testing.assert_array_equal(y, want.numpy().astype(np.int8))


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 10), CODES)
def test_quantize_and_dequantize(scale, zero_point):
    rng = np.random.default_rng(0)
    x = (rng.normal(0, 100 * scale, (3, 50))).astype(np.float32)
    x[0, :2] = np.inf, -np.inf
    x[1] = (np.arange(50) + 0.5) * np.float32(scale)  # ties
    q = same(edgec.quantize, integer.quantize, x, scale, zero_point)
    same(edgec.dequantize, integer.dequantize, q, scale, zero_point)


class Everything(torch.nn.Module):
    """Each operator once."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        m, shift = requantisation(rng, 8, 50_000)
        linear_m, linear_shift = integer.float_multipliers(np.full(5, 0.01))
        values = {
            "w": codes(rng, 8, 3, 3, 3, low=-127),
            "bias": np.arange(8, dtype=np.int32),
            "m": m,
            "shift": shift,
            "table": codes(rng, 8, 256),
            "lw": codes(rng, 5, 8, low=-127),
            "lbias": np.arange(5, dtype=np.int32),
            "lm": linear_m,
            "lshift": linear_shift,
            "scale": np.linspace(0.001, 0.002, 5, dtype=np.float32),
            "fw": codes(rng, 5, 5, 1, 1, low=-127),
        }
        for name, value in values.items():
            self.register_buffer(name, torch.from_numpy(value))

    def forward(self, x):
        q = edgec.quantize(x, 0.02, 3)
        q = edgec.qconv2d(q, self.w, self.bias, self.m, self.shift, [1, 1], [1, 1, 1, 1], [1, 1], 1, 3, -4, -128, 127)
        q = edgec.qlut(q, self.table, 1)
        q = edgec.qmax_pool2d(q, [2, 2], [2, 2], [0, 0, 0, 0], [1, 1], False)
        q = edgec.qavg_pool2d(q, [2, 2], [2, 2], [0, 0, 0, 0], 1 << 30, 32, 0, 0, -128, 127)
        gate = edgec.qmean(q, [2, 3], True, 1 << 30, 32, 0, 0, -128, 127)
        q = edgec.qmul(q, gate, 1 << 30, 36, 0, 0, 0, -128, 127)
        q = edgec.qadd(q, q, 1 << 19, 1 << 19, 20, 0, 0, 0, -128, 127)
        q = edgec.qrescale(q, 1 << 30, 30, 0, 1, -128, 127)
        q = q.permute(0, 2, 3, 1)
        real = edgec.qlinear_float(q, self.lw, self.lbias, self.scale)
        q = edgec.qlinear(q, self.lw, self.lbias, self.lm, self.lshift, 0, -128, 127)
        y = edgec.qconv2d_float(q, self.fw, self.lbias, self.scale, [2, 1], [1, 0, 0, 1], [1, 1], 1, 3, "NHWC")
        return edgec.dequantize(q, 0.5, 0) + real + y.sum()


def test_export_with_symbolic_batch_and_saving(tmp_path):
    module = Everything()
    example = torch.randn(2, 3, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    again = torch.export.export(loaded, (example,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        x = torch.randn(size, 3, 16, 16)
        want = module(x)
        assert want.unique().numel() > 20
        assert torch.equal(loaded(x), want)
        assert torch.equal(again(x), want)


def test_shape_kernels_agree_with_the_operators():
    x = torch.randn(2, 3, 17, 19)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Everything()(mode.from_tensor(x))
    real = Everything()(x)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_importing_twice_keeps_the_operators():
    # In a process of its own: the operators that other modules hold would not be those of the second import.
    code = (
        "import importlib, torch; from edgec import qops; importlib.reload(qops);"
        "print(torch.ops.edgec.quantize(torch.tensor([0.5, 1.5, -300.0]), 1.0, 0).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 2, -128]"
