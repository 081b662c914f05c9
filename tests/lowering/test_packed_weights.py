"""Integer layers of few bits from a Program to the device: packed constants, and the emulator's bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgec.data import random_data
from edgec.lowering.lower import kernel_bindings, lower
from edgec.passbase import Context
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import Program
from edgec.targets.device import load_device
from tests.lowering.helpers import compile_host, load


def few_bits(bits: int) -> Program:
    """A quantised network of a 3x3, a 1x1 and a linear layer whose weight codes are cut to `bits` bits."""
    network = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    program = load(network, (1, 16, 9, 7))
    context = Context(load_device("host"), random_data(program.inputs, 16))
    coded = QuantizeInt8(nonlinear="integer").run(program, context)
    module = coded.edit()
    for path, tensor in module.named_buffers():
        if path.endswith("weight_q"):
            tensor.copy_(tensor >> (8 - bits))
    return coded.replace(module)


@pytest.mark.host
@pytest.mark.parametrize("bits", (2, 4))
def test_results_are_those_of_the_program(bits: int, tmp_path: Path) -> None:
    compiled = compile_host(few_bits(bits), tmp_path)
    assert compiled.error() == 0.0
    layers = [b.spec.bits for b in kernel_bindings(compiled.program) if b.spec.name == "conv2d"]
    assert layers == [bits] * 3


@pytest.mark.parametrize("name", ("host", "cortex-a72", "cortex-x2"))
def test_constants_have_the_bytes_of_the_bits(name: str) -> None:
    """Codes take half a byte, outputs filled up to whole tiles; what is beside them is declared in the plan too."""
    device, program = load_device(name), few_bits(4)
    constants = [c.array for c in lower(program, device).plan.constants.values()]
    codes = sorted(a.nbytes for a in constants if a.dtype == np.int8 and a.ndim == 5)
    want = []
    for spec in (b.spec for b in kernel_bindings(program) if b.spec.name == "conv2d"):
        block = spec.blocking(device).vectors * device.lanes
        want.append(-(-spec.co // block) * block * spec.ci * spec.kernel[0] * spec.kernel[1] // 2)
    assert codes == sorted(want)


def test_eight_bits_stay_bytes() -> None:
    specs = [b.spec for b in kernel_bindings(few_bits(8)) if b.spec.name == "conv2d"]
    assert [spec.bits for spec in specs] == [8, 8, 8]
    assert all(spec.packed(load_device("cortex-a72")) is None for spec in specs)
    assert torch.equal(*(few_bits(8)(torch.ones(1, 16, 9, 7))[0] for _ in range(2)))
