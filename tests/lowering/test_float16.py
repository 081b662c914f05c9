"""A float16 Program from the pass to code that runs under QEMU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.bundle import build_bundle, load_bundle
from edgec.cli import main
from edgec.frontend import load_model
from edgec.lowering.lower import lower
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program
from edgec.targets.device import Device, load_device
from tests.conftest import REPOSITORY

DEVICE = "cortex-a76"
PASSES = "fold-bn, cast-fp16"


class Mixed(nn.Module):
    """Every kind of operator that has a float16 form, and two that stay float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.point = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(32, 24, 3, padding=1, groups=2)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.deep(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.point(y * gate) + x
        a, b = y.chunk(2, 1)
        y = torch.cat([torch.tanh(a), b, y], 1)
        y = F.avg_pool2d(F.max_pool2d(F.silu(self.grouped(y)), 2), 2)
        return torch.softmax(self.head(self.norm(y.flatten(2).transpose(1, 2)).mean(1)), -1)


def mixed() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Mixed(), torch.rand(1, 3, 16, 16)


def half(device: Device) -> tuple[Program, Program]:
    module, example = mixed()
    before = load_model(module, input_shape=tuple(example.shape))
    after = before
    for step in Pipeline.parse(PASSES).passes:
        after = step.run(after, Context(device=device))
    return before, after


@pytest.mark.cross(DEVICE)
def test_layers_get_half_kernels_and_the_rest_does_not() -> None:
    device = load_device(DEVICE)
    plan = lower(half(device)[1], device).plan
    ops = [step.op for step in plan.steps]
    assert ops.count("conv2d_f16") == 6 and ops.count("depthwise_f16") == 1
    assert {"max_pool_f16", "avg_pool_f16"} <= set(ops)
    assert all(any(op.startswith(name) for op in ops) for name in ("layer_norm", "softmax")), ops
    assert "conv2d_f32" not in ops
    weights = sum(c.array.nbytes for c in plan.constants.values() if c.array.dtype == np.float16)
    assert weights > 0.9 * plan.weight_bytes


@pytest.mark.qemu(DEVICE)
def test_code_follows_the_float_model(tmp_path: Path) -> None:
    device = load_device(DEVICE)
    before, after = half(device)
    bundle = build_bundle(lower(after, device), device, tmp_path / "bundle")
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    want, got = before(x)[0].numpy(), bundle.run(x.numpy())
    assert got.dtype == np.float32
    # Seven layers of at most 144 products: errors of a few units of half precision, 2^-11 each.
    assert 1e-5 < np.linalg.norm(got - want) / np.linalg.norm(want) < 4 * 2.0**-11


@pytest.mark.qemu(DEVICE)
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{REPOSITORY / 'tests' / 'lowering' / 'test_float16.py'}:mixed"
    out = tmp_path / "out"
    arguments = ["compile", model, "--passes", PASSES, "-o", str(out)]
    assert main([*arguments, "--target", "cortex-a72"]) == 2
    assert "cortex-a72 has no float16 arithmetic; use it for cortex-a55" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--target", DEVICE]) == 0
    capsys.readouterr()
    assert load_bundle(out).selftest()
    samples = tmp_path / "x.npz"
    np.savez(samples, inputs=np.random.default_rng(0).random((4, 3, 16, 16), np.float32))
    # Without labels the code is compared with the bundle's own float16 Program.
    assert main(["run", str(out), "--eval", str(samples)]) == 0
    assert main(["diff", model, str(out), "--json"]) == 0
