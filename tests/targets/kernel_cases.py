"""Random kernel templates and their operands, for property tests: sizes around the vector width, awkward geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from edgec.targets.device import Device, load_device
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from tests.targets.kernel_runner import Call, assert_close, run_calls, spec_call

FLOAT_ACTIVATIONS = (
    "none",
    "clip",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "silu",
    "gelu",
    "tanh",
    "gelu_tanh",
    "mish",
    "leaky_relu",
)


def host(lanes: int | None = None) -> Device:
    """The host, or a host whose templates pretend to have registers of `lanes` 32-bit elements."""
    device = load_device("host")
    return device if lanes is None else replace(device, vector_bytes=4 * lanes, registers=32 if lanes == 4 else 16)


def codes(rng: np.random.Generator, *shape: int, low: int = -128) -> np.ndarray:
    return rng.integers(low, 128, shape).astype(np.int8)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def halves(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small whole numbers, whose sums of products float16 holds exactly up to 2048."""
    return rng.integers(-2, 3, shape).astype(np.float16)


def code_range(rng: np.random.Generator) -> tuple[int, int]:
    """lo <= hi: half of the time the whole range, else a fused clamp."""
    if rng.random() < 0.5:
        return -128, 127
    lo, hi = sorted(int(v) for v in rng.integers(-128, 128, 2))
    return lo, hi


def add_epilogue(rng: np.random.Generator) -> AddEpilogue:
    """Multipliers near one, as `edgec.integer.add_parameters` gives them, with every fraction length it allows."""
    f = int(rng.integers(1, 22))
    limit = min(4 << f, (2**31 - (1 << (f - 1)) - 1) // (2 * 255))
    m_self, m_other = (int(v) for v in rng.integers(-limit, limit + 1, 2))
    z = [int(v) for v in rng.integers(-128, 128, 3)]
    return AddEpilogue(m_self, m_other, f, z[0], z[1], z[2], *code_range(rng))


def epilogue(rng: np.random.Generator, dtype: str, residual: bool, act: str) -> Epilogue:
    if dtype == "int8":
        lo, hi = code_range(rng)
        add = add_epilogue(rng) if residual else None
        requant = str(rng.choice(["RQ1", "RQF"]))
        bounded = requant == "RQF" and bool(rng.integers(2))
        zero = int(rng.integers(-128, 128))
        return Epilogue(y_zp=zero, lo=lo, hi=hi, add=add, requant=requant, bounded=bounded)
    lo, hi = [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0)][int(rng.integers(4))]
    return Epilogue(act=act, lo=0.2 if act == "leaky_relu" else lo, hi=hi, residual=residual)


def geometry(draw: st.DrawFn) -> dict[str, Any]:
    """Kernel, stride, padding, dilation and a map that is large enough for them."""
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = tuple(draw(st.sampled_from((0, 0, 1, 2))) for _ in range(4))
    size = []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1 - padding[2 * axis] - padding[2 * axis + 1]
        size.append(draw(st.integers(max(1, reach), max(1, reach) + 8)))
    return {
        "h": size[0],
        "w": size[1],
        "kernel": kernel,
        "stride": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": padding,
        "dilation": dilation,
    }


@st.composite
def convolutions(draw: st.DrawFn, dtype: str, lanes: int) -> tuple[Conv2D, int]:
    """A dense, pointwise or grouped convolution, and a seed for its operands."""
    shape = geometry(draw)
    if draw(st.integers(0, 3)) == 0:
        shape |= {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0, 0, 0)}
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    ci, co = draw(st.integers(1, 9)), draw(st.integers(1, 2 * lanes + 1))
    seed = draw(st.integers(0, 2**31))
    act, residual = draw(st.sampled_from(FLOAT_ACTIVATIONS)), draw(st.booleans())
    rng = np.random.default_rng(seed)
    fused = epilogue(rng, dtype, residual, act)
    x_zp = int(rng.integers(-128, 128)) if dtype == "int8" else 0
    return Conv2D(ci=ci * groups, co=co * groups, groups=groups, dtype=dtype, x_zp=x_zp, epilogue=fused, **shape), seed


@st.composite
def depthwise(draw: st.DrawFn, dtype: str, lanes: int) -> tuple[Depthwise, int]:
    shape = geometry(draw)
    c, seed = draw(st.integers(1, 2 * lanes + 1) | st.sampled_from((32, 48, 64, 72, 130))), draw(st.integers(0, 2**31))
    act, residual = draw(st.sampled_from(FLOAT_ACTIVATIONS)), draw(st.booleans())
    rng = np.random.default_rng(seed)
    fused = epilogue(rng, dtype, residual, act)
    x_zp = int(rng.integers(-128, 128)) if dtype == "int8" else 0
    return Depthwise(c=c, dtype=dtype, x_zp=x_zp, epilogue=fused, **shape), seed


def multipliers(rng: np.random.Generator, count: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(m, shift) that bring sums of `depth` products of codes into and a little beyond the code range."""
    m = rng.integers(2**30, 2**31, count).astype(np.int32)
    m[rng.random(count) < 0.05] = 0
    shift = rng.integers(36, 42, count) + int(math.log2(depth) / 2)
    return m, shift.astype(np.int32)


def operands(spec: Conv2D | Depthwise, seed: int) -> dict[str, Any]:
    """Arguments of `spec.reference` by name; `residual` is present only when the template has one."""
    rng = np.random.default_rng(seed + 1)
    ci, co = (spec.c, spec.c) if isinstance(spec, Depthwise) else (spec.ci, spec.co)
    weight = (co, ci // spec.groups, *spec.kernel)
    found: dict[str, Any] = {}
    if spec.dtype == "float16":
        found |= {"x": halves(rng, spec.h, spec.w, ci), "w": halves(rng, *weight)}
        found["bias"] = halves(rng, co) if rng.random() < 0.7 else None
    elif spec.dtype == "float32":
        found |= {"x": floats(rng, spec.h, spec.w, ci), "w": floats(rng, *weight)}
        found["bias"] = floats(rng, co) if rng.random() < 0.7 else None
    else:
        found |= {"x": codes(rng, spec.h, spec.w, ci), "w": codes(rng, *weight, low=-127)}
        bits = getattr(spec, "bits", 8)
        if bits < 8:
            found["w"] = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), weight).astype(np.int8)
        found["bias"] = rng.integers(-(2**15), 2**15, co).astype(np.int32)
        found["m"], found["shift"] = multipliers(rng, co, int(np.prod(weight[1:])))
        if spec.epilogue.requant != "RQ1":
            found["m"] = (found["m"] * 2.0 ** -found.pop("shift").astype(np.float64)).astype(np.float32)
    if spec.residual:
        make = {"int8": codes, "float16": halves, "float32": floats}[spec.dtype]
        found["residual"] = make(rng, *spec.out, co)
    return found


def layer_call(spec: Conv2D | Depthwise, seed: int, device: Device, inplace: bool = False) -> tuple[Call, np.ndarray]:
    """A call of the template with random operands, and its reference result."""
    values = operands(spec, seed)
    expected = spec.reference(**values)
    weights = {k: v for k, v in values.items() if k not in ("x", "residual")}
    after = [values["residual"]] if spec.residual else []
    position = spec.inplace[0] if inplace and spec.inplace else None
    return spec_call(spec, device, [values["x"]], expected, after, position, **weights), expected


def check_layers(specs: Sequence[tuple[Conv2D | Depthwise, int]], device: Device, inplace: bool) -> None:
    """Compile and run all templates in one program; integers must be equal, floats close."""
    cases = [layer_call(spec, seed, device, inplace) for spec, seed in specs]
    for (got,), (_, expected) in zip(run_calls([call for call, _ in cases], device), cases, strict=True):
        assert_close(got, expected)
