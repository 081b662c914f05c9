"""A small residual network and its data, for the passes of few bits."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgec.data import Dataset, load_data
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.quantization.ptq import Prepared, prepare
from edgec.program import Program, layer_of
from edgec.quantparams import QParams


class Net(nn.Module):
    """Stem, a residual block of two convolutions, a depthwise and a pointwise one, classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, stride=2, groups=8, padding=1), nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        x = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        return 8 * self.fc(x.mean((2, 3)))


@functools.cache
def program() -> Program:
    return load_model(Net().eval(), input_shape=(1, 2, 9, 7))


def images(n: int, seed: int = 0) -> torch.Tensor:
    """Smooth, so that channels differ: noise blurred over 3x3, with an offset per image."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 2, 11, 9, generator=generator) + torch.randn(n, 2, 1, 1, generator=generator)
    return F.avg_pool2d(noise, 3, 1) * 2


@functools.cache
def data(n: int = 256) -> Dataset:
    return load_data(images(n).numpy(), program().inputs)


def context(n: int = 256, seed: int = 0) -> Context:
    return Context(calibration=data(n), teacher=program(), seed=seed)


def prepared(of: Program | None = None) -> Prepared:
    return prepare(of or program(), Context(), data())


def layer(given: Prepared, name: str) -> fx.Node:
    (found,) = [n for n in given.layers if layer_of(n) == name]
    return found


def weight_codes(made: Program) -> dict[str, tuple[torch.Tensor, QParams]]:
    """(codes, record) of each layer's weights, by the name of the layer."""
    found = {}
    for path, weight in made.weights().items():
        record = made.annotations.get(path)
        if isinstance(record, QParams):
            found[path.rpartition(".weight")[0]] = (weight, record)
    return found


def code_values(made: Program, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, QParams]]:
    """(codes, record) of every activation tensor that has a record, by node name."""
    seen: dict[str, tuple[torch.Tensor, QParams]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node):
            value = super().run_node(n)
            record = made.annotations.get(n.name)
            if n.op == "call_function" and isinstance(record, QParams):
                seen[n.name] = (value, record)
            return value

    with torch.no_grad():
        Recorder(made.module).run(x)
    return seen


def float_error(a: Program, b: Program, x: torch.Tensor) -> float:
    """Root mean square difference of the outputs, relative to those of `a`."""
    (want,), (got,) = a(x), b(x)
    return float((want - got).square().mean().sqrt() / want.square().mean().sqrt())
