"""Layer by layer comparison: equal things are compared, in Programs and in generated code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgec.compile import compile_model
from edgec.diff import diff
from edgec.errors import EdgecError


class Net(nn.Module):
    """Convolutions whose batch norm and activation end up inside them, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bundle`, compiled for this machine, and `dump` with the stages before it."""
    torch.manual_seed(0)
    model = Net()
    for norm in (model.bn1, model.bn2):
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2.0)
    folder = tmp_path_factory.mktemp("diff")
    data = np.random.default_rng(0).random((16, 3, 8, 8), dtype=np.float32)
    np.savez(folder / "data.npz", images=data)
    compile_model(
        model,
        passes="fold-bn, quantize-int8",
        data=data,
        input_shape=(1, 3, 8, 8),
        output=folder / "bundle",
        dump=folder / "dump",
        name="net",
    )
    return folder


@pytest.mark.host
def test_folded_and_fused_layers_are_compared_with_what_they_compute(stages: Path) -> None:
    rows = diff(stages / "dump" / "0-original.pt2", stages / "dump" / "2-quantize-int8.pt2", str(stages / "data.npz"))
    found = {row.layer: row.sqnr_db for row in rows}
    # Before batch norm or activation the values are unrelated: a few dB, not dozens.
    assert {"conv1", "conv2", "fc", "output"} <= set(found)
    assert min(found.values()) > 20


@pytest.mark.host
def test_generated_integer_code_is_its_program_layer_by_layer(stages: Path) -> None:
    rows = diff(stages / "bundle" / "program.pt2", stages / "bundle", str(stages / "data.npz"))
    assert {"conv1", "conv2", "fc", "output"} <= {row.layer for row in rows}
    assert all(math.isinf(row.sqnr_db) for row in rows)


@pytest.mark.host
def test_rows_come_worst_first(stages: Path) -> None:
    rows = diff(stages / "dump" / "0-original.pt2", stages / "bundle", str(stages / "data.npz"))
    assert [row.sqnr_db for row in rows] == sorted(row.sqnr_db for row in rows)
    assert rows[0].sqnr_db < rows[-1].sqnr_db < math.inf


@pytest.mark.host
def test_models_of_other_inputs_are_refused(stages: Path) -> None:
    with pytest.raises(EdgecError, match="inputs differ"):
        diff(stages / "bundle", nn.Linear(4, 2), input_shape=(1, 4))
