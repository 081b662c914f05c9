"""Convolutions of other forms run as 2-D ones: which operators remain, and that the results are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import random_data
from edgec.passbase import Context
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import Program
from tests.lowering.helpers import Stages, compile_host, errors, load, operators, samples
from tests.lowering.networks import Net

LINE = (1, 3, 30)


def line(**layers: nn.Module) -> Callable[[Callable], nn.Module]:
    return lambda forward: Net(forward, **layers)


def quantised(program: Program) -> Program:
    return QuantizeInt8().run(program, Context(calibration=random_data(program.inputs, 8, seed=1)))


LINES: dict[str, tuple[nn.Module, set[str]]] = {
    "chain": (
        nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 6, 3, stride=2, dilation=2), nn.SiLU()),
        {"conv2d_nhwc", "unsqueeze", "permute", "squeeze"},
    ),
    "depthwise": (
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 4, padding="same", groups=8), nn.ReLU6()),
        {"conv2d_nhwc", "unsqueeze", "permute", "squeeze"},
    ),
    "residual": (
        line(a=nn.Conv1d(3, 8, 1), b=nn.Conv1d(8, 8, 3, padding=1))(lambda m, x: F.relu(m.b(m.a(x)) + m.a(x))),
        {"conv2d_nhwc", "unsqueeze", "permute", "squeeze"},
    ),
    "concat and pools": (
        line(a=nn.Conv1d(3, 8, 3, padding=1), b=nn.Conv1d(3, 5, 1))(
            lambda m, x: F.avg_pool1d(F.max_pool1d(torch.cat([m.a(x), m.b(x)], 1), 3, 2, 1), 2).mean(-1, keepdim=True)
        ),
        {"conv2d_nhwc", "unsqueeze", "permute", "squeeze", "cat", "max_pool2d_nhwc", "avg_pool2d_nhwc", "mean", "reshape"},
    ),
    "other readers": (
        line(a=nn.Conv1d(3, 8, 3), b=nn.Linear(28, 4))(lambda m, x: m.b(m.a(x)).transpose(1, 2)),
        {"conv2d_nhwc", "unsqueeze", "permute", "squeeze", "linear_act", "transpose"},
    ),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", LINES)
def test_one_dimension(name: str) -> None:
    net, expected = LINES[name]
    assert set(operators(Stages(load(net, LINE)).layout)) <= expected


@pytest.mark.pure
def test_without_a_batch_or_stored_weights_nothing_changes() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, m.w * 2.0)  # type: ignore[operator]

    computed = Net(forward, w=nn.Parameter(torch.zeros(4, 3, 2)))
    assert "conv1d" in operators(Stages(load(computed, LINE)).layout)


@pytest.mark.pure
def test_int8_lines_stay_torch_programs() -> None:
    """Both layers become int8; the Program computes with codes and stays near the float one."""
    program = load(nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 3, groups=8)), LINE)
    int8 = quantised(program)
    counts = operators(int8.edit())
    assert counts["qconv2d"] + counts["qconv2d_float"] == 2 and "conv1d" not in counts
    inputs = tuple(x.abs() for x in samples(program))
    assert errors(int8(*inputs), program(*inputs)) < 0.1


@pytest.mark.host
@pytest.mark.parametrize("int8", (False, True))
@pytest.mark.parametrize("name", LINES)
def test_compiled_lines(name: str, int8: bool, tmp_path: Path) -> None:
    program = load(LINES[name][0], LINE)
    compiled = compile_host(quantised(program) if int8 else program, tmp_path)
    assert compiled.error() < 1e-5
    assert not [skip for skip in compiled.lowered.fallbacks if "conv" in str(skip)]
