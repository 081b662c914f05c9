"""GPU kernels on PoCL and lavapipe against the NumPy meaning of their templates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from edgec.errors import EdgecError
from edgec.targets.device import Device, load_device
from edgec.targets.gpu.kernels import conv, depthwise, implement, winograd
from edgec.targets.gpu.kernels.base import GpuKernel, Launch, Operand
from edgec.targets.gpu.kernels.conv import Tile
from edgec.targets.kernels.attention import Attention, View
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.matmul import MatMul
from edgec.targets.kernels.norm import GroupNorm, LayerNorm, RMSNorm
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean, Requant
from edgec.targets.kernels.softmax import Softmax
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.kernels.weight_only import CodedConv2D
from tests.targets.gpu_runner import APIS, device_of, run

# Relative to the largest value: sums of products in another order, and halves of 11 bits.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3}
CLIP = Epilogue("clip", 0.0, 6.0)
SAME = (1, 1, 1, 1)


def _name(spec: Any) -> str:
    return f"{spec.name}-{getattr(spec, 'dtype', '')}"


def _weighted(spec: Any, seed: int) -> tuple[list[np.ndarray | None], dict[str, np.ndarray | None]]:
    """([x, residual], weights) of a convolution."""
    rng = np.random.default_rng(seed)
    inputs, outputs = (spec.c, spec.c) if isinstance(spec, Depthwise) else (spec.ci, spec.co)
    shape = (outputs, inputs // spec.groups, *spec.kernel)
    size = (*spec.out, outputs)
    if spec.dtype != "int8":
        fan = np.sqrt(np.prod(shape[1:]))
        arrays = [rng.standard_normal((spec.h, spec.w, inputs)), rng.standard_normal(size) if spec.residual else None]
        w = (rng.standard_normal(shape) / fan).astype(spec.dtype)
        data = [None if a is None else a.astype(spec.dtype) for a in arrays]
        return data, {"w": w, "bias": rng.standard_normal(outputs).astype(np.float32)}
    x = rng.integers(-128, 128, (spec.h, spec.w, inputs)).astype(np.int8)
    w = rng.integers(-127, 128, shape).astype(np.int8)
    # Accumulators of a few thousands to a few hundreds of codes, so that clamps work, too.
    real = rng.uniform(0.2, 2.0, outputs) * 100 / (74 * 74 * np.sqrt(np.prod(shape[1:])))
    weights: dict[str, np.ndarray | None] = {"w": w, "bias": rng.integers(-9999, 9999, outputs).astype(np.int32)}
    if spec.epilogue.requant == "RQ1":
        shift = rng.integers(28, 40, outputs).astype(np.int32)
        weights |= {"m": np.rint(real * 2.0**shift).clip(0, 2**31 - 1).astype(np.int32), "shift": shift}
    else:
        weights["m"] = real.astype(np.float32)
    residual = None
    if spec.epilogue.residual:
        residual = rng.standard_normal(size).astype(np.float32)
    elif spec.residual:
        residual = rng.integers(-128, 128, size).astype(np.int8)
    return [x, residual], weights


def _check_weighted(spec: Any, api: str, tile: Tile | None = None, dot: bool = False) -> None:
    device = device_of(api)
    (x, residual), weights = _weighted(spec, 1)
    kernel: Any = implement(spec, weights, device)
    assert kernel is not None
    if tile is not None:
        kernel = replace(kernel, tile=tile)
    if dot:
        kernel = replace(kernel, dot=True)
    after = [] if residual is None else [residual]
    assert x is not None
    found = run(kernel, device, [x, *kernel.pack(device, **weights), *after])
    factors = (weights.get("m"), weights.get("shift"))
    expected = spec.reference(x, weights["w"], weights["bias"], *factors, residual)
    _compare(found, expected, spec)


def _compare(found: np.ndarray, expected: np.ndarray, spec: Any) -> None:
    assert found.dtype == expected.dtype
    found = found.reshape(expected.shape)
    if expected.dtype == np.int8:
        # A product with the inverse of y_scale may round a tie the other way than the division.
        slack = 1 if getattr(getattr(spec, "epilogue", None), "requant", "") == "float" else 0
        assert len(np.unique(expected)) > 3
        assert np.abs(found.astype(int) - expected).max() <= slack
        return
    error = np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[getattr(spec, "dtype", "float32") if found.dtype == np.float16 else "float32"]


CONVOLUTIONS = [
    Conv2D(7, 7, 16, 24, epilogue=replace(CLIP, residual=True)),
    Conv2D(5, 7, 8, 10, epilogue=Epilogue("gelu")),
    Conv2D(1, 1, 41, 10),
    Conv2D(9, 11, 3, 16, (3, 3), (2, 2), SAME, epilogue=Epilogue("hardswish")),
    Conv2D(9, 11, 8, 12, (3, 3), (1, 1), SAME, epilogue=Epilogue("mish")),
    Conv2D(9, 11, 10, 6, (3, 3), (1, 2), (2, 1, 1, 2), (2, 1), epilogue=Epilogue("silu")),
    Conv2D(6, 5, 16, 16, (3, 3), (1, 1), SAME, groups=2, epilogue=Epilogue("leaky_relu", 0.1)),
    Conv2D(6, 5, 6, 10, (3, 3), (1, 1), SAME, groups=2, epilogue=Epilogue("gelu_tanh")),
]
DEPTHWISE = [
    Depthwise(9, 11, 16, (3, 3), (1, 1), SAME, epilogue=CLIP),
    Depthwise(9, 11, 12, (5, 5), (2, 2), (2, 2, 2, 2), epilogue=Epilogue("tanh", residual=True)),
    Depthwise(9, 11, 10, (3, 3), (2, 2), (0, 1, 0, 1), epilogue=Epilogue("sigmoid")),
    Depthwise(7, 6, 8, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), epilogue=Epilogue("hardsigmoid")),
]
POOLS = [
    AvgPool(9, 11, 12, (3, 3), (2, 2), SAME),
    MaxPool(9, 11, 10, (3, 3), (2, 2), SAME),
    MaxPool(9, 11, 8, (2, 2), (2, 2), dilation=(2, 1)),
    Mean(7, 7, 24),
    Mean(16, 17, 10),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", CONVOLUTIONS + DEPTHWISE, ids=_name)
def test_float_convolution(spec: Any, dtype: str, api: str) -> None:
    _check_weighted(replace(spec, dtype=dtype), api)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", [CONVOLUTIONS[0], *CONVOLUTIONS[2:4], CONVOLUTIONS[6], *DEPTHWISE[:3]], ids=_name)
def test_half_sums(spec: Any, api: str) -> None:
    spec, device = replace(spec, dtype="float16"), device_of(api)
    (x, residual), weights = _weighted(spec, 1)
    plain = implement(spec, weights, device)
    assert plain is not None
    kernel: Any = plain.with_half_sums()
    rest: list[Any] = [] if residual is None else [residual]
    got, wide = (run(k, device, [x, *k.pack(device, **weights), *rest]) for k in (kernel, plain))  # type: ignore[list-item]
    want = spec.reference(x, weights["w"], weights["bias"], None, None, residual)
    error = np.abs(got.reshape(want.shape).astype(float) - want).max() / np.abs(want).max()
    # Sums of up to 72 products with 11 bits each. PoCL has no float16: there the same text sums in float32.
    assert error < (TOLERANCE["float16"] if api == "opencl" else 1e-2)
    assert api == "opencl" or not np.array_equal(got, wide)


@pytest.mark.pure
def test_half_sums_are_of_float16_alone() -> None:
    for spec in (CONVOLUTIONS[0], DEPTHWISE[0]):
        kernel: Any = implement(spec, _weighted(spec, 1)[1], device_of("vulkan"))
        assert kernel.with_half_sums() == kernel
        halves: Any = implement(replace(spec, dtype="float16"), _weighted(spec, 1)[1], device_of("opencl"))
        (launch,) = halves.with_half_sums().launches(device_of("opencl"))
        assert "half4" in dict(launch.helpers) and "edgec_half4 a0_0" in launch.text
        assert "edgec_half4" not in halves.launches(device_of("opencl"))[0].text


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("tile", [Tile(8, 2, (4, 2, 1)), Tile(4, 4, (1, 2, 4)), Tile(2, 1, (8, 1, 1))], ids=str)
def test_other_tiles_of_a_convolution_give_the_same(tile: Tile, api: str) -> None:
    # Nine slices of outputs and nine columns fill no block.
    _check_weighted(Conv2D(5, 9, 12, 36, (3, 3), (1, 1), SAME, epilogue=CLIP), api, tile)


@pytest.mark.parametrize("api", APIS)
def test_other_tiles_of_a_depthwise_convolution_give_the_same(api: str) -> None:
    spec = Depthwise(9, 11, 16, (3, 3), (1, 1), SAME)
    for tile in depthwise.tiles_of(spec, device_of(api))[1:]:
        _check_weighted(spec, api, tile)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", POOLS, ids=_name)
def test_float_pool(spec: Any, dtype: str, api: str) -> None:
    spec = replace(spec, dtype=dtype)
    device = device_of(api)
    x = np.random.default_rng(2).standard_normal((spec.h, spec.w, spec.c)).astype(dtype)
    kernel = implement(spec, {}, device)
    assert kernel is not None
    _compare(run(kernel, device, [x]), spec.reference(x), spec)


RQ1 = Epilogue(lo=-128, hi=127, y_zp=-5)
RQF = replace(RQ1, requant="RQF", lo=-100)
FUSED = AddEpilogue(700_000, 900_000, 20, -5, 7, 3, -128, 127)
ADD = replace(RQF, add=FUSED)
REAL = Epilogue("gelu", requant="float", residual=True)
CODED = Epilogue("hardswish", y_zp=4, requant="float", y_scale=0.02)
INTEGER = [
    Conv2D(7, 7, 16, 24, epilogue=RQ1),
    Conv2D(7, 7, 16, 24, epilogue=ADD),
    Conv2D(7, 6, 8, 12, epilogue=REAL),
    Conv2D(7, 6, 8, 12, epilogue=CODED),
    Conv2D(9, 11, 3, 16, (3, 3), (2, 2), SAME, x_zp=-7, epilogue=RQF),
    Conv2D(9, 7, 8, 12, (3, 3), (1, 1), SAME, x_zp=-7, epilogue=replace(RQ1, add=ADD.add)),
    Depthwise(9, 11, 16, (3, 3), (1, 1), SAME, x_zp=3, epilogue=RQ1),
    Depthwise(9, 11, 12, (5, 5), (2, 2), (2, 2, 2, 2), epilogue=ADD),
]
# Codes that are not four to a word, which WGSL writes one by one.
ODD = [
    Conv2D(5, 7, 9, 10, epilogue=RQF),
    Conv2D(6, 5, 6, 10, (3, 3), (1, 1), SAME, groups=2, epilogue=ADD),
    Depthwise(9, 11, 10, (3, 3), (2, 2), (0, 1, 0, 1), x_zp=5, epilogue=RQ1),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", INTEGER, ids=_name)
def test_integer_convolution_is_exact(spec: Any, api: str) -> None:
    spec = replace(spec, dtype="int8")
    _check_weighted(spec, api)


@pytest.mark.opencl
@pytest.mark.parametrize("spec", [s for s in INTEGER if isinstance(s, Conv2D)], ids=_name)
def test_integer_convolution_by_dot_products_is_exact(spec: Any) -> None:
    """The order of weights that the instructions take, with products that any device has."""
    _check_weighted(replace(spec, dtype="int8"), "opencl", dot=True)


_BYTES = "for (int i = 0; i < 4; ++i) c += (int)((A)(a >> 8 * i)) * (int)((B)(b >> 8 * i)); return c;"
# The built-ins of extensions that PoCL has not, as their specifications define them.
BUILT_INS = {
    "arm": """\
#define cl_arm_integer_dot_product_int8 1
int arm_dot(char4 a, char4 b) { const int4 p = convert_int4(a) * convert_int4(b); return p.x + p.y + p.z + p.w; }
""",
    "arm with sums": """\
#define cl_arm_integer_dot_product_accumulate_int8 1
int arm_dot_acc(char4 a, char4 b, int c) { for (int i = 0; i < 4; ++i) c += a[i] * b[i]; return c; }
""",
    "khr": f"""\
#define __opencl_c_integer_dot_product_input_4x8bit_packed 1
int dot_4x8packed_ss_int(uint a, uint b) {{ int c = 0; {_BYTES.replace("(A)", "(char)").replace("(B)", "(char)")} }}
""",
    "qcom": f"""\
#define cl_qcom_dot_product8 1
int qcom_dot8_acc(uint a, uint b, int c) {{ {_BYTES.replace("(A)", "(char)").replace("(B)", "(uchar)")} }}
""",
}


@pytest.mark.opencl
@pytest.mark.parametrize("extension", BUILT_INS)
def test_every_dot_product_gives_the_same(extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = conv._Conv.launch

    def with_built_ins(self: Any) -> Any:
        made = launch(self)
        return replace(made, helpers=(("built_ins", BUILT_INS[extension]), *made.helpers))

    monkeypatch.setattr(conv._Conv, "launch", with_built_ins)
    _check_weighted(Conv2D(3, 3, 8, 8, dtype="int8", epilogue=RQF), "opencl", dot=True)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("least", [1, 33])
def test_requantisation_is_exact_to_the_ends_of_int32(api: str, least: int) -> None:
    channels, rng = 512, np.random.default_rng(least)
    spec = Conv2D(1, 3, 4, channels, dtype="int8", epilogue=Epilogue(y_zp=3, lo=-128, hi=127))
    shift = rng.integers(least, 63, channels).astype(np.int32)
    shift[:2] = least, 62
    bias = rng.integers(-(2**31) + 70_000, 2**31 - 70_000, channels).astype(np.int32)
    # Factors that give codes, as far as they are below 2^31, and the largest one.
    wanted = rng.uniform(0.3, 160, channels)
    m = np.clip(wanted / np.abs(bias.astype(float)) * 2.0**shift, 0, 2**31 - 1).astype(np.int32)
    m[::16] = 2**31 - 1
    weights = {"w": rng.integers(-127, 128, (channels, 4, 1, 1)).astype(np.int8), "bias": bias, "m": m, "shift": shift}
    x = rng.integers(-128, 128, (1, 3, 4)).astype(np.int8)
    device = device_of(api)
    kernel = implement(spec, weights, device)
    assert kernel is not None
    names = [name for name, _ in kernel.launches(device)[0].helpers]
    assert ("rq1_far" in names, "rq1" in names) == (least == 33, least == 1)
    got = run(kernel, device, [x, *kernel.pack(device, **weights)])
    want = spec.reference(x, *weights.values())
    np.testing.assert_array_equal(got, want.reshape(-1))
    assert len(np.unique(want)) > 100


@pytest.mark.opencl
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_many_products_of_extreme_codes_are_exact(kernel: tuple[int, int]) -> None:
    # More of the largest product than float32 adds exactly: 128 * 128 * 1040 and 9 * 128 * 128 * 260.
    channels = 1040 if kernel == (1, 1) else 260
    spec = Conv2D(4, 3, channels, 4, kernel, dtype="int8", epilogue=Epilogue(requant="float"))
    x = np.full((4, 3, channels), -128, np.int8)
    w = np.full((4, channels, *kernel), -128, np.int8)
    w[1:, ::7] = 127
    w[2, 0, 0, 0] = -127
    w[3, 5, 0, 0] = 13
    # Real results show the sums themselves.
    weights = {"w": w, "bias": np.array([1, -1, 3, 0], np.int32), "m": np.full(4, 2.0**-8, np.float32)}
    device = device_of("opencl")
    kernel_ = implement(spec, weights, device)
    assert kernel_ is not None
    found = run(kernel_, device, [x, *kernel_.pack(device, **weights)])
    sums = spec.reference(x, w, weights["bias"], weights["m"])
    assert np.array_equal(found.reshape(sums.shape), sums)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", ODD, ids=_name)
def test_integer_convolution_of_odd_channels(spec: Any, api: str) -> None:
    _check_weighted(replace(spec, dtype="int8"), api)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", POOLS, ids=_name)
def test_integer_pool_is_exact(spec: Any, api: str) -> None:
    requant = Requant(int(2.0**38 * 1.5 / (spec.taps * 2**7)), 31, 3, -4, -120, 127)
    fields = {"requant": requant} if isinstance(spec, AvgPool) else {}
    spec = replace(spec, dtype="int8", c=spec.c + (-spec.c % 4 if api == "vulkan" else 0), **fields)
    device = device_of(api)
    x = np.random.default_rng(3).integers(-128, 128, (spec.h, spec.w, spec.c)).astype(np.int8)
    kernel = implement(spec, {}, device)
    assert kernel is not None
    _compare(run(kernel, device, [x]), spec.reference(x), spec)


def _check(
    spec: Any, api: str, inputs: list[np.ndarray], weights: dict[str, Any] | None = None, before: int = 1
) -> None:
    """The kernel of a template on activations; its packed weights are behind the first `before` of them."""
    device, weights = device_of(api), weights or {}
    kernel = implement(spec, weights, device)
    assert kernel is not None
    packed = kernel.pack(device, **weights)
    found = run(kernel, device, [*inputs[:before], *packed, *inputs[before:]])
    _compare(found, spec.reference(*inputs, **weights), spec)


def _normal(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PRODUCTS = [
    MatMul(2, 2, 9, 16, 20, True),
    MatMul(1, 3, 5, 7, 9, True),
    MatMul(3, 1, 5, 8, 12),
    MatMul(2, 2, 6, 7, 9),
    MatMul(1, 1, 1, 3, 3),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", PRODUCTS, ids=str)
def test_matrix_product(spec: MatMul, api: str) -> None:
    right = (spec.n, spec.k) if spec.transposed else (spec.k, spec.n)
    _check(spec, api, [_normal(spec.a_batch, spec.m, spec.k), _normal(spec.c_batch, *right, seed=6)])


def _attention(queries: int, keys: int, depth: int, heads: int = 2, **fields: Any) -> Attention:
    """Views of one projection that holds queries, keys and values side by side, or of three dense maps."""
    width = heads * depth
    if queries == keys:
        row = 3 * width
        views = [View(keys * row, n * width, (keys * row, depth, row, 1)) for n in range(3)]
    else:
        views = [View(n * width, 0, (n * width, depth, width, 1)) for n in (queries, keys, keys)]
    return Attention(1, heads, queries, keys, depth, depth, *views, scale=depth**-0.5, **fields)


ATTENTION = [
    _attention(17, 17, 8),
    _attention(6, 9, 5),
    _attention(12, 12, 8, causal=True),
    _attention(5, 8, 8, mask=View(40, 0, (0, 0, 8, 1))),
    _attention(5, 8, 8, grid=(0.02, 3)),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", ATTENTION, ids=range(len(ATTENTION)))
def test_attention(spec: Attention, api: str) -> None:
    inputs = [_normal(view.size, seed=n) for n, view in enumerate((spec.q, spec.k, spec.v))]
    if spec.mask is not None:
        mask = np.where(np.arange(40).reshape(5, 8) % 3 == 1, -np.inf, 0.5).astype(np.float32)
        # The query that sees nothing gives zeros.
        mask[2] = -np.inf
        inputs.append(mask)
    _check(spec, api, inputs, before=len(inputs))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("rows, columns, log", [(6, 40, False), (70, 10, False), (5, 1000, True), (4100, 12, False)])
def test_softmax(rows: int, columns: int, log: bool, api: str) -> None:
    _check(Softmax(rows, columns, log), api, [30 * _normal(rows, columns)])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    "spec", [LayerNorm(6, 64, 1e-6), LayerNorm(9, 31, 1e-5), LayerNorm(4, 24, 1e-5, (0.03, -4)), RMSNorm(5, 48, 1e-6)]
)
def test_norm(spec: Any, api: str) -> None:
    x = _normal(spec.rows, spec.columns) + 3
    weights = {"weight": _normal(spec.columns, seed=7)}
    if spec.centred:
        weights["bias"] = _normal(spec.columns, seed=8)
    _check(spec, api, [x], weights)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("pixels, channels, groups", [(20, 16, 2), (9, 6, 3)])
def test_group_norm(pixels: int, channels: int, groups: int, layout: str, api: str) -> None:
    spec = GroupNorm(pixels, channels, groups, 1e-5, layout, Epilogue("silu"))
    x = _normal(pixels, channels) * 2 + 1
    weights = {"weight": _normal(channels, seed=7), "bias": _normal(channels, seed=8)}
    _check(spec, api, [x.T.copy() if layout == "NCHW" else x], weights)


@pytest.mark.parametrize("api", APIS)
def test_convolution_of_stored_codes(api: str) -> None:
    spec = CodedConv2D(1, 6, 24, 12, bits=4, group=8, zeros=True, epilogue=Epilogue("silu"))
    rng = np.random.default_rng(12)
    codes, zero = (rng.integers(-8, 8, shape).astype(np.int8) for shape in ((12, 24, 1, 1), (12, 3)))
    scale = rng.uniform(0.01, 0.1, (12, 3)).astype(np.float32)
    bias = _normal(12)
    device, x = device_of(api), _normal(1, 6, 24)
    weights: dict[str, Any] = {"w": codes, "bias": bias, "scale": scale, "zero": zero}
    kernel = implement(spec, weights, device)
    assert kernel is not None
    found = run(kernel, device, [x, *kernel.pack(device, **weights)])
    _compare(found, spec.reference(x, codes, bias, scale, zero), spec)


def _codes(shape: tuple[int, ...], seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


PAIRS = [
    QAdd((4, 6, 8), (4, 6, 8), FUSED),
    QAdd((4, 6, 8), (8,), FUSED),
    QAdd((4, 6, 8), (4, 1, 1), FUSED),
    QMul((3, 5, 4), (3, 1, 4), 1_500_000_000, 37, 3, -9, 5, -128, 127),
    QMul((2, 3, 5, 8), (2, 1, 5, 1), 1_500_000_000, 37, 3, -9, 5, -100, 100),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", PAIRS, ids=str)
def test_codes_with_codes(spec: Any, api: str) -> None:
    _check(spec, api, [_codes(spec.a), _codes(spec.b, seed=10)])


@pytest.mark.parametrize("api", APIS)
def test_grids(api: str) -> None:
    values = 3 * _normal(4, 6)
    # Halves of a step, and what leaves the codes.
    values[0] = np.array([0.05, 0.15, -0.25, 1e9, -1e9, 0.35], np.float32)
    _check(Quantize((4, 6), 0.1, -3), api, [values])
    _check(Dequantize((4, 6), 0.1, -3), api, [_codes((4, 6))])
    _check(Dequantize((5, 2), 0.1, -3), api, [_codes((5, 2))])
    _check(QRescale((4, 6), 1_200_000_000, 31, 4, -7, -128, 120), api, [_codes((4, 6))])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("spec", [QLut((5, 8), False, 0), QLut((5, 8), True, 1), QLut((3, 5, 4), True, 1)], ids=str)
def test_table(spec: QLut, api: str) -> None:
    tables = (spec.shape[spec.axis], 256) if spec.per_channel else (256,)
    _check(spec, api, [_codes(spec.shape)], {"table": _codes(tables, seed=11)})


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_transpose(dtype: str, api: str) -> None:
    for shape, order in (((5, 6, 8), (0, 2, 1)), ((4, 3, 8), (1, 0, 2)), ((2, 4, 3, 4), (3, 1, 0, 2))):
        spec = Transpose(shape, order, dtype)
        x = _codes(shape).astype(dtype)
        device = device_of(api)
        kernel = implement(spec, {}, device)
        assert kernel is not None
        assert np.array_equal(run(kernel, device, [x]).reshape(spec.out), spec.reference(x))


def test_too_many_groups_for_webgpu_are_named() -> None:
    spec = Softmax(2_000_000, 400)
    kernel = implement(spec, {}, device_of("vulkan"))
    assert kernel is not None
    with pytest.raises(EdgecError, match="softmax takes 1 x 500000 x 1 work-groups"):
        kernel.launches(device_of("vulkan"))
    kernel.launches(device_of("opencl"))


@pytest.mark.parametrize("device", ["opencl", "mali-g52", "adreno-640", "vulkan"])
def test_groups_fit_every_device(device: str) -> None:
    """The variants of a kernel are different, and none asks for larger groups than the device has."""
    device_ = load_device(device)
    for spec in CONVOLUTIONS + DEPTHWISE:
        kernel: Any = implement(spec, {}, device_)
        variants = kernel.variants(device_)
        assert variants[0] == kernel.launches(device_)
        assert len({launches[0].function for launches in variants}) == len(variants) <= 4
        for launch in (launch for launches in variants for launch in launches):
            assert np.prod(launch.group) <= device_.work_group


# Maps that fill no whole tiles, padding on some sides only, slices that fill no block, an output smaller than a tile.
WINOGRAD = [
    (Conv2D(9, 14, 16, 20, (3, 3), (1, 1), SAME, epilogue=Epilogue("leaky_relu", 0.1, residual=True)), 4),
    (Conv2D(7, 11, 12, 8, (3, 3), padding=(0, 2, 1, 0), dtype="float16", epilogue=CLIP), 4),
    (Conv2D(5, 6, 8, 8, (3, 3), (1, 1), SAME), 2),
    (Conv2D(3, 4, 4, 4, (3, 3), dtype="float16"), 2),
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(("spec", "m"), WINOGRAD, ids=range(len(WINOGRAD)))
def test_winograd(spec: Conv2D, m: int, api: str) -> None:
    """The first variant is the transformed way, the second one the direct way on the same operands."""
    device = device_of(api)
    (x, residual), weights = _weighted(spec, 3)
    assert x is not None and weights["w"] is not None
    kernel = winograd.make(spec, device, m)
    operands = [x, *kernel.pack(device, **weights), *([] if residual is None else [residual])]
    expected = spec.reference(x, weights["w"], weights["bias"], residual=residual).astype(np.float64)
    assert [len(launches) for launches in kernel.variants(device)[:2]] == [3, 1]
    found = [run(Chosen(kernel, number), device, operands).reshape(expected.shape) for number in range(2)]
    for each in found:
        assert np.abs(each - expected).max() <= 2 * TOLERANCE[spec.dtype] * np.abs(expected).max()
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("api", APIS)
def test_winograd_with_half_sums(api: str) -> None:
    """F(2, 3) sums in halves, as the direct way does; F(4, 3) does not."""
    device, spec = device_of(api), WINOGRAD[3][0]
    (x, _), weights = _weighted(spec, 3)
    assert x is not None and weights["w"] is not None
    wide, kernel = winograd.make(spec, device, 2), winograd.make(spec, device, 2).with_half_sums()
    got, other = (run(k, device, [x, *k.pack(device, **weights)]) for k in (kernel, wide))
    expected = spec.reference(x, weights["w"], weights["bias"]).astype(np.float64)
    assert np.abs(got.reshape(expected.shape) - expected).max() <= 1e-2 * np.abs(expected).max()
    assert api == "opencl" or not np.array_equal(got, other)
    assert kernel.variants(device)[1] != wide.variants(device)[1]
    four = winograd.make(spec, device, 4)
    assert four.with_half_sums().launches(device) == four.launches(device)


@dataclass(frozen=True)
class Chosen(GpuKernel):
    """A kernel by one of its variants."""

    kernel: GpuKernel
    number: int

    def operands(self) -> tuple[Operand, ...]:
        return self.kernel.operands()

    def scratch(self) -> tuple[int, ...]:
        return self.kernel.scratch()

    def launches(self, device: Device) -> tuple[Launch, ...]:
        return self.kernel.variants(device)[self.number]


@pytest.mark.parametrize("m", [2, 4])
def test_matrices_of_winograd_give_the_correlation(m: int) -> None:
    at, g, bt = winograd.matrices(m)
    rng = np.random.default_rng(m)
    d, w = rng.standard_normal(m + 2), rng.standard_normal(3)
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ d)), np.correlate(d, w, "valid"), rtol=1e-12)


def test_where_winograd_pays() -> None:
    """By the rates in the device's profile: 64 channels of 56x56 everywhere, few channels where arithmetic is dear,
    never what it does not compute."""
    large = Conv2D(56, 56, 64, 64, (3, 3), padding=SAME)
    small = Conv2D(32, 32, 16, 16, (3, 3), padding=SAME)
    slow, fast = load_device("mali-g52"), load_device("mali-g78")
    assert [winograd.chosen(large, d) for d in (slow, fast, load_device("vulkan"))] == [4, 4, 4]
    assert [winograd.chosen(small, d) for d in (slow, fast)] == [4, 0]
    other = [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}, {"dtype": "int8"}, {"ci": 66}, {"kernel": (5, 5)}]
    assert not any(winograd.chosen(replace(large, **change), slow) for change in other)  # type: ignore[arg-type]
    # Transformed weights of 64 MiB, and what stands between the launches.
    assert winograd.chosen(replace(large, h=7, w=7, ci=1024, co=1024), slow) == 0
    assert winograd.chosen(replace(large, h=1024, w=1024), slow) == 0
