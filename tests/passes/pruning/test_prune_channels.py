"""`prune-channels`: the budget, what is kept, the constants of removed channels, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgec.cost import program_cost
from edgec.data import random_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.pruning.groups import Channels
from edgec.passes.pruning.prune_channels import ChannelReport, PruneChannels
from edgec.passes.pruning.shift import add_shifts, removed_shifts
from edgec.program import Program
from edgec.sparsity import Sparsity
from tests import zoo
from tests.passes.pruning import structures
from tests.passes.pruning.structures import conv

pytestmark = pytest.mark.pure


def prune(program: Program, **options: object) -> Program:
    return PruneChannels(**{"round_to": 1, "min_channels": 1, **options}).run(program, Context())  # type: ignore[arg-type]


def report(program: Program) -> ChannelReport:
    found = program.annotations[PruneChannels.name]
    assert isinstance(found, ChannelReport)
    return found


@pytest.mark.parametrize("name", structures.MAKE)
def test_half_of_the_work_is_left_at_most(name: str) -> None:
    program = structures.program(name)
    small = prune(program, macs=0.6)
    assert program_cost(small).macs == report(small).macs_after <= 0.6 * program_cost(program).macs
    assert program_cost(small).macs > 0.3 * program_cost(program).macs


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("criterion", ["l1", "l2", "bn-scale", "taylor"])
def test_every_criterion_and_allocation_meets_the_budget(criterion: str, allocation: str) -> None:
    program = structures.program("residual")
    step = PruneChannels(macs=0.5, criterion=criterion, allocation=allocation, round_to=1, min_channels=1)
    small = step.run(program, Context(calibration=random_data(program.inputs, 32)))
    assert 0.3 < program_cost(small).macs / program_cost(program).macs <= 0.5


def test_everything_left_is_the_identity() -> None:
    program = structures.program("dense")
    assert prune(program, macs=1.0) is program
    assert PruneChannels(macs=0.3).weaken(0.0).run(program, Context()) is program


def test_a_second_run_changes_nothing() -> None:
    once = prune(structures.program("inverted"))
    assert prune(once) is once
    assert report(prune(once, macs=0.3)).macs_before == report(once).macs_before


def test_a_smaller_share_is_less_work() -> None:
    work = [program_cost(prune(structures.program("dense"), macs=m)).macs for m in (0.9, 0.6, 0.3)]
    assert work == sorted(work, reverse=True) and len(set(work)) == 3


def test_counts_are_multiples_for_the_target() -> None:
    model = nn.Sequential(conv(3, 64), conv(64, 64), conv(64, 32), structures.Head(conv(32, 32), 32)).eval()
    program = load_model(model, input_shape=structures.IMAGE)
    for multiple in (4, 8, 16):
        kept = report(prune(program, round_to=multiple)).kept
        assert any(k < n for _, k, n in kept)
        assert all(k % min(multiple, n // 4) == 0 for _, k, n in kept)


def test_the_weakest_filters_go() -> None:
    program = structures.program("plain")
    module = program.edit()
    weight = module.get_parameter("body.0.0.weight")
    with torch.no_grad():
        weight[::2] *= 1e-3
        module.get_parameter("body.2.0.weight")[:, ::2] *= 1e-3
    strong = weight.detach()[1::2].clone()
    # The layer after it stays: the first one alone must give way.
    small = prune(program.replace(module), macs=0.55, keep=("body.2",), fold=False)
    left = small.weights()["body.0.0.weight"]
    assert 0 < len(left) <= 9
    assert sum(any(torch.equal(row, s) for s in strong) for row in left) >= min(8, len(left))


def test_layers_named_by_keep_stay() -> None:
    small = prune(structures.program("residual"), keep=("body.stem",), macs=0.6)
    assert small.weights()["body.stem.0.weight"].shape[0] == 16
    assert small.weights()["body.a.0.weight"].shape[0] < 8
    with pytest.raises(EdgecError, match="no layer is called"):
        prune(structures.program("residual"), keep=("body.stemm",))


class Unpadded(nn.Module):
    """No zero padding anywhere: what removed channels leave behind is a constant everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.bare, self.second = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 16, 3, bias=False)
        self.behind, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(torch.nn.functional.hardswish(self.norm(self.stem(x))))
        x = x + torch.sigmoid(self.bare(x))
        return self.fc(torch.relu(self.behind(self.second(x))).mean((2, 3)))


def test_constants_are_folded_exactly_without_padding() -> None:
    made = Unpadded()
    zoo.set_weights(made, seed=5)
    program = load_model(made.eval(), input_shape=structures.IMAGE)
    channels = Channels(program)
    keep = {g: np.arange(0, g.channels, 2) for g in channels.groups if not g.locked}
    zeroed, removed, bare = program.edit(), program.edit(), program.edit()
    with torch.no_grad():
        for group in keep:
            for member in group.members:
                if member.role == "out":
                    index = torch.from_numpy(member.index[1::2].ravel())
                    zeroed.get_parameter(member.weight).index_fill_(member.axis, index, 0.0)
    shifts, varying = removed_shifts(program, channels, keep)
    assert not varying
    channels.remove(removed, keep)
    add_shifts(removed, shifts)
    channels.remove(bare, keep)
    x = structures.example()
    (want,), (got,), (without,) = (program.replace(m)(x) for m in (zeroed, removed, bare))
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * scale
    assert (without - want).abs().max() > 1e-2 * scale


def test_heads_go_whole() -> None:
    small = prune(structures.program("attention"), macs=0.4)
    heads, rest = divmod(small.weights()["qkv.0.weight"].shape[0], 12)
    assert rest == 0 and 1 <= heads < 4
    assert small.weights()["proj.weight"].shape[1] == 4 * heads


def test_masked_weights_are_refused() -> None:
    program = structures.program("plain")
    weight = program.weights()["body.2.0.weight"]
    masked = program.replace(
        annotations={"body.2.0.weight": Sparsity("unstructured", (1, 1), torch.ones_like(weight, dtype=torch.bool))}
    )
    with pytest.raises(EdgecError, match=r"body\.2\.0\.weight.*has a mask"):
        prune(masked)


def test_what_stays_is_named_with_its_reason() -> None:
    context = Context()
    PruneChannels().run(structures.program("mixer"), context)
    reasons = {s.layer: s.reason for s in context.skipped if s.what == "channel pruning"}
    assert "output of the model" in reasons["head"]
    assert "along another axis" in reasons["tokens"]


def test_what_cannot_be_reached_is_said() -> None:
    context = Context()
    small = PruneChannels(macs=0.01).run(structures.program("plain"), context)
    assert report(small).macs_after > 0.01 * report(small).macs_before
    assert any("no group can be less" in s.reason for s in context.skipped)


def test_taylor_needs_data() -> None:
    with pytest.raises(EdgecError, match="needs calibration data"):
        prune(structures.program("plain"), criterion="taylor")


def test_weak_channels_matter_less_than_strong_ones_in_a_real_network() -> None:
    """The digits network of the demo: pruned by l1 it follows the original more closely than the strongest removed."""
    from edgec import demo
    from edgec.data import load_data

    network, sample = demo.model()
    program = load_model(network, input_shape=tuple(sample.shape), name="digits")
    data = load_data(demo.test_data(), program.inputs)
    x, labels = data.inputs(slice(0, 300)), data.targets(slice(0, 300))
    channels = Channels(program)
    from edgec.passes.pruning.saliency import scores

    groups = [g for g in channels.groups if not g.locked]
    found = scores(program, groups, "l1")
    right = []
    for sign in (-1, 1):
        keep = {
            g: np.sort(np.argsort(sign * s)[: max(1, 3 * g.channels // 4)]) for g, s in zip(groups, found, strict=True)
        }
        module = program.edit()
        shifts, _ = removed_shifts(program, channels, keep)
        channels.remove(module, keep)
        add_shifts(module, shifts)
        right.append(float((program.replace(module)(x)[0].argmax(1).numpy() == labels).mean()))
    assert right[0] > right[1] + 0.1
