"""Integer layers whose weights are stored in two to four bits: formats, sizes, and compiled code against NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgec.errors import EdgecError
from edgec.packing import FORMATS, code_bits, pack, unpack
from edgec.targets.device import Device, load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.weight_only import CodedConv2D
from tests.targets.kernel_cases import check_layers, convolutions, host, operands
from tests.targets.kernel_runner import Call, assert_close, require, run_calls, spec_call

BITS = (2, 3, 4)


# -- formats -----------------------------------------------------------------------------------------------------------


def test_bytes_of_the_formats() -> None:
    """The first code is in the lowest bits; negative ones are two's complement."""
    np.testing.assert_array_equal(pack([1, -1, -8, 7, 5], 4), [0xF1, 0x78, 0x05])
    np.testing.assert_array_equal(pack([1, -1, -2, 0, 1], 2), [0b00_10_11_01, 0b01])
    # Codes 6 and 7 are 0b011 and 0b101: upper bits 01 and 10, lowest bits 1 and 1.
    np.testing.assert_array_equal(pack([1, 2, 3, -4, -3, -1, 3, -3], 3), [0b01_010_001, 0b10_100_011, 0b11_111_101])


@settings(deadline=None, derandomize=True)
@given(st.data(), st.sampled_from((2, 3, 4, 8)))
def test_round_trip(data: st.DataObject, bits: int) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 35)))
    codes = data.draw(arrays(np.int8, shape, elements=st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)))
    stored = pack(codes, bits)
    assert stored.shape == (shape[0], FORMATS[bits].size(shape[1])) and stored.dtype == np.uint8
    np.testing.assert_array_equal(unpack(stored, bits, shape[1]), codes)
    assert code_bits(codes) <= bits


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EdgecError, match="do not fit 4 bits"):
        pack([8], 4)
    with pytest.raises(EdgecError, match="5 bits have no storage format"):
        pack([1], 5)


# -- kernels -----------------------------------------------------------------------------------------------------------


def layers() -> list[Conv2D]:
    """Pointwise, windowed, strided, grouped and linear layers; depths that leave units of weights partly filled."""
    shape: dict[str, Any] = {"dtype": "int8", "x_zp": -7, "epilogue": Epilogue(y_zp=3, lo=-100, hi=127, requant="RQF")}
    return [
        Conv2D(1, 13, 40, 29, **shape),
        Conv2D(1, 1, 192, 10, **shape),
        Conv2D(5, 7, 64, 20, (3, 3), (1, 1), (1, 1, 1, 1), **shape),
        Conv2D(7, 9, 13, 70, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), **shape),
        Conv2D(5, 5, 48, 36, (3, 3), (1, 1), (1, 1, 1, 1), groups=2, **shape),
        Conv2D(6, 5, 128, 12, (1, 1), (2, 2), **{**shape, "epilogue": replace(shape["epilogue"], requant="RQ1")}),
        Conv2D(6, 5, 3, 12, (3, 3), (2, 2), (0, 1, 0, 1), **shape),
    ]


def mixed() -> list[tuple[Conv2D, int]]:
    """Every layer with 4 bits, every second one with 3 or with 2, and seeds."""
    specs = [replace(spec, bits=4) for spec in layers()]
    specs += [replace(spec, bits=2 + number % 2) for number, spec in enumerate(layers())]
    return [(spec, seed) for seed, spec in enumerate(specs)]


@pytest.mark.host
@pytest.mark.parametrize("lanes", (4, 8, 16))
def test_on_the_host(lanes: int) -> None:
    check_layers(mixed(), host(lanes), inplace=False)


@pytest.mark.host
@pytest.mark.parametrize("lanes", (8, 16))
def test_random_layers_on_the_host(lanes: int) -> None:
    @settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(st.lists(st.tuples(convolutions("int8", lanes), st.sampled_from(BITS)), min_size=8, max_size=8))
    def check(cases: list[Any]) -> None:
        check_layers([(replace(spec, bits=bits), seed) for (spec, seed), bits in cases], host(lanes), inplace=True)

    check()


@pytest.mark.qemu
@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a76", "cortex-x2", "cortex-a7"))
def test_on_arm(name: str) -> None:
    device = load_device(name)
    require(device)
    check_layers(mixed(), device, inplace=False)


@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a76", "cortex-x2"))
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_of_the_codes_and_the_tile(bits: int, name: str) -> None:
    """A weight takes its bits and nothing else, apart from filling outputs up to whole tiles."""
    device = load_device(name)
    spec = Conv2D(8, 8, 128, 64, (3, 3), (1, 1), (1, 1, 1, 1), dtype="int8", bits=bits)
    values = operands(spec, 0)
    weights = {k: values[k] for k in ("w", "bias", "m", "shift")}
    block = spec.blocking(device).vectors * device.lanes
    outputs = -(-64 // block) * block
    assert spec.pack(device, **weights)[0].nbytes == outputs * 3 * 3 * 128 * bits // 8


# -- float layers with coded weights -----------------------------------------------------------------------------------


def coded_call(spec: CodedConv2D, seed: int, device: Device) -> tuple[Call, np.ndarray]:
    """A call with random codes, scales and zero points, and its reference result."""
    rng = np.random.default_rng(seed)
    shape, groups = (spec.co, spec.ci, *spec.kernel), (spec.co, spec.scales)
    low, high = -(1 << (spec.bits - 1)), 1 << (spec.bits - 1)
    weights: dict[str, Any] = {
        "w": rng.integers(low, high, shape).astype(np.int8),
        "bias": rng.standard_normal(spec.co).astype(np.float32),
        "scale": rng.uniform(0.01, 0.1, groups).astype(np.float32),
    }
    if spec.zeros:
        weights["zero"] = rng.integers(low, high, groups).astype(np.int8)
    x = rng.standard_normal((spec.h, spec.w, spec.ci)).astype(np.float32)
    residual = [rng.standard_normal((*spec.out, spec.co)).astype(np.float32)] if spec.residual else []
    expected = spec.reference(x, **weights, residual=residual[0] if residual else None)
    return spec_call(spec, device, [x], expected, residual, **weights), expected


def coded_layers(bits: int) -> list[CodedConv2D]:
    """Groups of a few channels, of all of them, and with a shorter last one; blocks of one vector and of many."""
    fused = Epilogue("gelu", residual=True)
    return [
        CodedConv2D(1, 13, 40, 29, bits=bits, group=16),
        CodedConv2D(1, 40, 33, 70, bits=bits, group=33, zeros=True),
        CodedConv2D(1, 1, 130, 10, bits=bits, group=32, epilogue=fused),
        CodedConv2D(5, 7, 20, 20, (3, 3), (1, 1), (1, 1, 1, 1), bits=bits, group=8, zeros=True, epilogue=fused),
        CodedConv2D(7, 9, 13, 9, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), bits=bits, group=5),
    ]


def check_coded(specs: list[CodedConv2D], device: Device) -> None:
    cases = [coded_call(spec, seed, device) for seed, spec in enumerate(specs)]
    for (got,), (_, expected) in zip(run_calls([call for call, _ in cases], device), cases, strict=True):
        assert_close(got, expected)


def mixed_codes() -> list[CodedConv2D]:
    """Every layer with 4 bits, and with 2, 3 or 8."""
    return coded_layers(4) + [coded_layers(bits)[number] for number, bits in enumerate((2, 3, 3, 2, 8))]


@pytest.mark.host
@pytest.mark.parametrize("lanes", (8, 16))
def test_coded_weights_on_the_host(lanes: int) -> None:
    check_coded(mixed_codes(), host(lanes))


@pytest.mark.qemu
@pytest.mark.parametrize("name", ("cortex-a72",))
def test_coded_weights_on_arm(name: str) -> None:
    device = load_device(name)
    require(device)
    check_coded(mixed_codes(), device)
