"""fold-bn: which batch norms go, the graph before and after, and equality of the function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgec.frontend import load_model
from edgec.passbase import Context, Skip
from edgec.passes.graph.fold_bn import FoldBN
from edgec.program import Program
from tests import zoo

pytestmark = pytest.mark.pure

TOLERANCE = 1e-5


def norms(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if n.target is torch.ops.aten.batch_norm.default]


def fold(module: nn.Module, *shape: int) -> tuple[Program, Program, list[Skip]]:
    zoo.set_weights(module, seed=0)
    program = load_model(module, input_shape=shape)
    context = Context()
    return program, FoldBN().run(program, context), context.skipped


def assert_equal(before: Program, after: Program) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(x.shape, generator=generator) for x in before.example_inputs)
    for want, got in zip(before(*inputs), after(*inputs), strict=True):
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


@pytest.mark.parametrize("name", ["conv_bn_relu", "mlp", "loose_norms"])
def test_graph_before_and_after(name: str, golden: Callable[[str, str], None]) -> None:
    program = zoo.program(name)
    context = Context()
    folded = FoldBN().run(program, context)
    skipped = "".join(f"skip {s.layer}: {s.what}: {s.reason}\n" for s in context.skipped)
    golden(f"fold_bn_{name}.txt", f"{program.text()}\n{folded.text()}\n{skipped}")


FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d without bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (1, 3, 6, 6)),
    "conv2d with bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (1, 3, 6, 6)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), (1, 4, 6, 6)),
    "grouped, same padding": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", groups=2), nn.BatchNorm2d(6)),
        (1, 4, 6, 6),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (1, 3, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (1, 2, 4, 4, 4)),
    "conv_transpose2d": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 3, 2), nn.BatchNorm2d(5)), (1, 3, 4, 4)),
    "conv_transpose2d, groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)),
        (1, 4, 4, 4),
    ),
    "conv_transpose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 5, 3, 2), nn.BatchNorm1d(5)), (1, 3, 7)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (1, 5)),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (1, 3, 6, 6)),
    "two in a row": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        (1, 3, 6, 6),
    ),
    "in place activation behind it": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        (1, 3, 6, 6),
    ),
    "before a convolution": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (1, 4, 6, 6)),
    "before a convolution without bias": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False)),
        (1, 4, 6, 6),
    ),
    "before a linear layer": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 6)), (1, 4)),
    "between two convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)),
        (1, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folds(name: str) -> None:
    make, shape = FOLDED[name]
    before, after, skipped = fold(make(), *shape)
    assert len(norms(before)) >= 1
    assert norms(after) == []
    assert skipped == []
    assert_equal(before, after)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class Tied(nn.Module):
    """One convolution, called twice, with a batch norm of its own behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.conv(torch.relu(self.a(self.conv(x)))))


class Computed(nn.Module):
    """A weight that is a function of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.raw, self.bn = nn.Parameter(torch.ones(4, 3, 3, 3)), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(torch.conv2d(x, self.raw * 2))


class ComputedNorm(nn.Module):
    """A batch norm whose scale is a function of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bn = self.bn
        return nn.functional.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight * 2, bn.bias)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 8), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.fc(x))


KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "another reader": (TwoReaders, (1, 3, 6, 6), "layer conv also feeds other layers"),
    "computed weight": (Computed, (1, 3, 6, 6), "the weight of the layer before it is computed, not stored"),
    "computed scale": (ComputedNorm, (1, 3, 6, 6), "its statistics are computed, not stored"),
    "tokens": (Tokens, (1, 5, 6), "its channel axis is not the linear layer's output axis"),
    "activation between": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        (1, 3, 6, 6),
        "it does not follow a convolution or linear layer",
    ),
    # The zeros around the map are not passed through the batch norm.
    "padding behind it": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
        (1, 3, 6, 6),
        "it does not follow a convolution or linear layer",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_keeps_and_says_why(name: str) -> None:
    make, shape, reason = KEPT[name]
    before, after, skipped = fold(make(), *shape)
    assert norms(after) == norms(before)
    (skip,) = skipped
    assert (skip.what, skip.reason) == ("batch norm not folded", reason)
    assert_equal(before, after)


def test_a_shared_convolution_gets_weights_of_its_own_at_each_call() -> None:
    before, after, skipped = fold(Tied(), 1, 3, 5, 5)
    assert norms(after) == [] and skipped == []
    assert len(after.weights()) == 4
    assert_equal(before, after)


def test_channels_of_extreme_statistics_survive() -> None:
    """Folding happens in float64: a variance of 1e-12 and one of 1e8 in one layer."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-12))
    zoo.set_weights(module, seed=0)
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
    norm.running_var.copy_(torch.tensor([1e-12, 1e8, 1.0, 1e-3]))
    program = load_model(module, input_shape=(1, 3, 6, 6))
    folded = FoldBN().run(program, Context())
    x = zoo.example("conv_bn_relu")[:, :, :6, :6]
    (want,), (got,) = program(x), folded(x)
    for channel in range(4):
        a, b = got[:, channel], want[:, channel]
        # Against its own spread: a channel that is small must not drown in one that is large.
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
