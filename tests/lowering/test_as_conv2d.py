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
        {
            "conv2d_nhwc",
            "unsqueeze",
            "permute",
            "squeeze",
            "cat",
            "max_pool2d_nhwc",
            "avg_pool2d_nhwc",
            "mean",
            "reshape",
        },
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
        return F.conv1d(x, m.w * x.amax())  # type: ignore[operator]

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


MAP = (1, 4, 6, 7)
UP = nn.ConvTranspose2d
# Joint phases: one output channel, or no zeros to speak of. Separate ones: many channels, groups.
TRANSPOSED: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "fsrcnn": (UP(4, 1, 9, 2, 4, 1), MAP, 1),
    "unet": (UP(4, 6, 2, 2), MAP, 1),
    "dcgan": (UP(4, 6, 4, 2, 1), MAP, 4),
    "3x3": (nn.Sequential(UP(4, 6, 3, 2, 1, 1), nn.ReLU()), MAP, 4),
    "cropped": (UP(4, 5, (5, 3), (3, 2), (1, 2), bias=False), MAP, 6),
    "few taps": (UP(4, 6, 1, 2), MAP, 4),
    "depthwise": (UP(4, 4, 4, 2, 1, groups=4), MAP, 4),
    "groups": (UP(4, 6, 3, 2, groups=2), MAP, 4),
    "stride 1": (nn.Sequential(UP(4, 6, 3, 1, 1), nn.Sigmoid()), MAP, 1),
    "a lot of padding": (UP(4, 6, 3, 1, 3), MAP, 1),
    "1-D": (nn.Sequential(nn.ConvTranspose1d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv1d(8, 4, 3)), LINE, 3),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name: str) -> None:
    net, shape, convolutions = TRANSPOSED[name]
    counts = operators(Stages(load(net, shape)).layout)
    assert counts["conv2d_nhwc"] == convolutions
    assert not {"conv_transpose2d", "conv_transpose1d", "relu", "sigmoid", "constant_pad_nd", "pad"} & set(counts)


@pytest.mark.pure
@pytest.mark.parametrize("name", TRANSPOSED)
def test_int8_transposed_is_a_torch_program(name: str) -> None:
    net, shape, _ = TRANSPOSED[name]
    program = load(net, shape)
    int8 = quantised(program)
    counts = operators(int8.edit())
    assert "conv_transpose2d" not in counts and "conv2d" not in counts
    inputs = tuple(x.abs() for x in samples(program))
    assert errors(int8(*inputs), program(*inputs)) < 0.1


@pytest.mark.pure
def test_dilated_transposed_convolutions_are_left_alone() -> None:
    counts = operators(Stages(load(UP(4, 6, 3, 2, dilation=2), MAP)).layout)
    assert "conv_transpose2d" in counts or "convolution" in counts


@pytest.mark.host
@pytest.mark.parametrize("int8", (False, True))
@pytest.mark.parametrize("name", ("fsrcnn", "unet", "3x3", "depthwise", "1-D"))
def test_compiled_transposed(name: str, int8: bool, tmp_path: Path) -> None:
    net, shape, _ = TRANSPOSED[name]
    program = load(net, shape)
    compiled = compile_host(quantised(program) if int8 else program, tmp_path)
    assert compiled.error() < 1e-5
