"""Small pruned models that the tests of recovery share."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import Dataset, load_data
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program


class Residual(nn.Module):
    """A stem, two residual blocks and a classifier: what the pruning passes reorder and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        for i in (0, 2):
            y = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.fc(x.mean((2, 3)))


def network(fixed: bool = False) -> Program:
    """The model with random weights and the statistics of its batch norms on `samples`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual()
        for norm in (model.bn, *model.norms):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            norm.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(images()))
    if fixed:
        return Program.from_exported(torch.export.export(model.eval(), (torch.rand(1, 3, 8, 8),)), "residual")
    return load_model(model.eval(), input_shape=(1, 3, 8, 8), name="residual")


def images(n: int = 128) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((n, 3, 8, 8)).astype(np.float32)


def samples(program: Program, n: int = 128) -> Dataset:
    return load_data(images(n), program.inputs)


def context(program: Program, n: int = 128, seed: int = 0) -> Context:
    return Context(calibration=samples(program, n), teacher=program, seed=seed)


def run(passes: str, program: Program, given: Context) -> Program:
    for step in Pipeline.parse(passes).passes:
        program = step.run(program, given)
    return program


def distance(program: Program, original: Program) -> float:
    """Mean KL of the class scores on the samples."""
    x = torch.from_numpy(images())
    log_p, log_q = (p(x)[0].log_softmax(1) for p in (original, program))
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())
