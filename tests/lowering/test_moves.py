"""What only moves elements: channels last on every device, kernels of its own on microcontrollers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.bundle import build_bundle
from edgec.data import random_data
from edgec.lowering.lower import kernel_bindings, lower, lower_torch
from edgec.passbase import Context
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import Program
from edgec.targets.device import load_device
from tests.lowering.helpers import calls, load, samples
from tests.lowering.networks import Net, conv

MOVES = ("transpose", "repeat", "pad", "slice", "concat")


def pyramid(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Two scales put together, and every kind of move between integer layers."""
    fine = net.a(x).relu()
    coarse = F.pad(net.b(fine).relu(), (1, 0, 0, 1))[:, :, 1:, 1:]
    both = torch.cat([fine[:, 2:], F.interpolate(coarse, scale_factor=2)], 1)
    return net.c(F.pad(both, (2, 1, 1, 0))[:, :, ::2]).mean((2, 3))


def quantized(shape: tuple[int, ...] = (1, 3, 10, 8)) -> Program:
    program = load(Net(pyramid, a=conv(3, 6), b=nn.Conv2d(6, 5, 2, 2), c=conv(9, 4)), shape)
    context = Context(device=load_device("host"), calibration=random_data(program.inputs, 8, seed=1))
    return QuantizeInt8().run(program, context)


@pytest.mark.pure
def test_upsampling_stays_channels_last() -> None:
    module = lower_torch(quantized()).edit()
    (expand,) = calls(module, "expand")
    assert list(expand.args[1]) == [1, 5, 2, 4, 2, 5]  # type: ignore[arg-type]


@pytest.mark.pure
def test_kernels_are_for_microcontrollers_only() -> None:
    program = quantized()
    names = Counter(b.spec.name for b in kernel_bindings(program, load_device("cortex-m3")) if b.spec.name in MOVES)
    assert names["repeat"] == names["concat"] == 1 and names["pad"] >= 1 and names["slice"] >= 2
    for device in (None, load_device("host")):
        assert not {"repeat", "concat", "pad", "slice"} & {b.spec.name for b in kernel_bindings(program, device)}


@pytest.mark.host
@pytest.mark.parametrize("name", ["host", pytest.param("cortex-m3", marks=pytest.mark.cross("cortex-m3"))])
def test_bundles_equal_the_program(name: str, tmp_path: Path) -> None:
    program, device = quantized(), load_device(name)
    bundle = build_bundle(lower(program, device), device, tmp_path / "bundle")
    inputs = samples(program)
    (want,) = program(*inputs)
    got = np.asarray(bundle.run(*(x.numpy() for x in inputs)))
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-6, atol=1e-6)
