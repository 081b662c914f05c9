"""The judge of masks: zero for none, recalibrated statistics, and the scan."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passes.pruning.sensitivity import Judge, scan
from edgec.training import kl
from tests import zoo

pytestmark = pytest.mark.pure


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def judged(model: nn.Module) -> tuple[Judge, torch.Tensor]:
    x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = load_model(model.eval(), input_shape=(1, 3, 8, 8))
    return Judge(program, load_data(x.numpy(), program.inputs)), x


def half(model: Net) -> torch.Tensor:
    mask = torch.ones_like(model.conv.weight, dtype=torch.bool)
    mask[:, 1] = False
    return mask


def test_the_loss_is_kl_with_the_statistics_of_the_masked_model() -> None:
    model = Net()
    judge, x = judged(model)
    mask = half(model)
    found = judge({"conv.weight": mask})
    with torch.no_grad():
        dense = model(x)
        model.conv.weight.mul_(mask)
        batches = [model.conv(part) for part in x.split(128)]
        model.bn.running_mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
        model.bn.running_var = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
        want = float(kl(dense, model(x)))
    assert found == pytest.approx(want, rel=1e-4) and found > 0
    assert judge({"conv.weight": mask}) == pytest.approx(found, rel=1e-6)  # nothing stays of the call before


def test_without_batch_norms_no_mask_is_no_loss() -> None:
    program = zoo.program("vit_block")
    judge = Judge(program, zoo.calibration("vit_block"))
    assert judge({}) == pytest.approx(0.0, abs=1e-6)
    masks = {"fc1.weight": torch.zeros(16, 8, dtype=torch.bool)}
    assert judge(masks) > 1e-4
    assert judge({}) == pytest.approx(0.0, abs=1e-6)


def test_the_scan_masks_one_layer_at_a_time() -> None:
    model = Net()
    judge, _ = judged(model)
    seen: list[tuple[str, float]] = []

    def mask_of(layer: str, rate: float) -> dict[str, torch.Tensor]:
        seen.append((layer, rate))
        mask = torch.ones_like(getattr(model, layer).weight, dtype=torch.bool)
        mask.view(-1)[: int(rate * mask.numel())] = False
        return {f"{layer}.weight": mask}

    found = scan(judge, ["conv", "fc"], mask_of, [0.0, 0.25, 0.9])
    assert seen == [("conv", 0.25), ("conv", 0.9), ("fc", 0.25), ("fc", 0.9)]
    assert all(f[0] == 0.0 < f[1] < f[2] for f in found.values())


def test_too_few_samples_for_a_fixed_batch_are_named() -> None:
    model = load_model(zoo.module("residual"), input_shape=(1, 4, 8, 8))
    fixed = type(model)(model.name, model.module, model.example_inputs, False)  # a batch of 2
    with pytest.raises(EdgecError, match="do not fill"):
        Judge(fixed, zoo.calibration("residual").limit(1))
