"""Cross-layer equalisation: the function stays, the weight ranges meet, and what does not let factors through."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.passbase import Context
from edgec.passes.quantization.equalize import Equalize, find_pairs
from edgec.passes.quantization.operators import arguments
from edgec.program import get_weight, layer_of
from tests.passes.quantization.helpers import load_model, noise

pytestmark = pytest.mark.pure


def program(model: nn.Module, *shape: int):
    torch.manual_seed(0)
    for value in model.parameters():
        nn.init.normal_(value, std=0.3)
    # Channels of very different range, the reason to equalise.
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            with torch.no_grad():
                layer.weight.mul_(torch.exp(torch.randn(len(layer.weight))).view(-1, *[1] * (layer.weight.dim() - 1)))
    return load_model(model.eval(), input_shape=(1, *shape))


def pairs_of(before, reports: list | None = None) -> list[tuple[str, str]]:
    found = find_pairs(before.module, lambda *report: (reports if reports is not None else []).append(report))
    return [(layer_of(p.first), layer_of(p.second)) for p in found]


def equalised(before, x: torch.Tensor):
    """The equalised Program, after checking that its outputs are those of `before`."""
    context = Context()
    after = Equalize().run(before, context)
    for a, b in zip(before(x), after(x), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    return after, context


def ranges(program, pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest weight of each channel on both sides of a pair."""
    given, following = arguments(pair.first), arguments(pair.second)
    w1, w2 = (get_weight(program.module, g["weight"]) for g in (given, following))
    groups = following.get("groups", 1)
    r2 = w2.view(groups, w2.shape[0] // groups, w1.shape[0] // groups, -1).abs().amax((1, 3)).flatten()
    return w1.flatten(1).abs().amax(1), r2


class Plain(nn.Module):
    """Dense, depthwise, pointwise, grouped, then a classifier: four pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise, self.grouped = nn.Conv2d(8, 12, 1, bias=False), nn.Conv2d(12, 6, 3, groups=3)
        self.act, self.fc = nn.PReLU(12), nn.Linear(6 * 9, 5)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.dense(x))))
        x = self.grouped(F.pad(F.max_pool2d(self.act(self.pointwise(x)), 2), (1, 1, 1, 1)))
        return self.fc(self.before_classifier(F.leaky_relu(x)).flatten(1))

    def before_classifier(self, x):
        return x


class Flipped(Plain):
    def before_classifier(self, x):
        return x.flip(1)


def test_pairs_through_every_kind_of_layer():
    before = program(Plain(), 3, 6, 6)
    chain = ["dense", "depthwise", "pointwise", "grouped", "fc"]
    assert pairs_of(before) == list(itertools.pairwise(chain))
    after, context = equalised(before, noise(4, 3, 6, 6))
    assert context.skipped == []
    spread = 0.0
    for old, new in zip(find_pairs(before.module, print), find_pairs(after.module, print), strict=True):
        r1, r2 = ranges(before, old)
        spread = max(spread, float((r1 / r2).log().abs().max()))
        r1, r2 = ranges(after, new)
        assert (r1 / r2).log().abs().max() < 0.01
    assert spread > 1


def test_moved_channels_end_a_chain():
    before = program(Flipped(), 3, 6, 6)
    assert pairs_of(before)[-1] == ("pointwise", "grouped")
    equalised(before, noise(2, 3, 6, 6))


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.c(F.hardswish(self.b(F.relu6(self.a(x)))))


def test_relu6_is_skipped_and_reported():
    before = program(Clipped(), 2, 4, 4)
    _, context = equalised(before, 9 * noise(2, 2, 4, 4))
    assert [(s.layer, s.what, s.reason) for s in context.skipped] == [
        ("a", "equalize", "relu6 does not let a factor through")
    ]


class Branching(nn.Module):
    """A residual, a reused layer and a dead channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.twice, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.a(x)))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


def test_branches_shared_weights_and_dead_channels():
    model = Branching()
    before = program(model, 2, 4, 4)
    get_weight(before.module, next(n for n in before.graph.nodes if n.target == "a.weight"))[1] = 0
    assert pairs_of(before) == [("a", "b")]
    after, _ = equalised(before, noise(2, 2, 4, 4))
    weights = after.weights()
    assert torch.isfinite(weights["a.weight"]).all() and not weights["a.weight"][1].any()
    assert torch.equal(weights["twice.weight"], before.weights()["twice.weight"])


def test_mean_and_flatten_before_a_classifier():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(2, 4, 1), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).mean((2, 3)))))

    before = program(Head(), 2, 4, 4)
    assert pairs_of(before) == [("conv", "fc1"), ("fc1", "fc2")]
    equalised(before, noise(2, 2, 4, 4))


def test_nothing_to_do():
    before = program(nn.Sequential(nn.Conv2d(2, 3, 1)), 2, 4, 4)
    after, _ = equalised(before, noise(1, 2, 4, 4))
    assert after.text() == before.text()
