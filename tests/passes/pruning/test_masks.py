"""Grains, scores, choices and which weights may be pruned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.pruning.masks import Grain, achieved, apply, choose, prunable
from edgec.sparsity import Sparsity
from tests import zoo

pytestmark = pytest.mark.pure
GRAINS = [
    *(Grain(kind) for kind in ("weight", "row", "kernel", "filter")),
    *(Grain("block", b) for b in ((2, 1), (4, 1), (4, 2))),
]


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 4, 1, 1), (8, 4, 3), (8, 4), (7, 6, 3, 3)], ids=str)
def test_tables_and_masks_fit_together(grain: Grain, shape: tuple[int, ...]) -> None:
    w = weight(*shape)
    table = grain.table(w)
    kept = choose(table, table.numel() // 2)
    mask = grain.expand(kept, shape)
    assert mask.shape == w.shape and mask.dtype == torch.bool
    # the mass of a table is that of the weight, in all and in what is kept
    assert float(table.sum()) == pytest.approx(float(w.abs().sum()), rel=1e-5)
    assert float(table[kept].sum()) == pytest.approx(float(w[mask].abs().sum()), rel=1e-5)
    if shape[0] % 4 == 0:
        assert table.numel() * grain.elements(shape) == w.numel()
    # a second look at the masked weight chooses the same
    assert torch.equal(choose(grain.table(w * mask), table.numel() // 2), kept)


def test_a_block_is_n_consecutive_outputs_at_one_input_with_all_taps() -> None:
    w = weight(8, 3, 3, 3)
    table = Grain("block", (4, 1)).table(w)
    assert table.shape == (2, 3)
    assert float(table[1, 2]) == pytest.approx(float(w[4:8, 2].abs().sum()), rel=1e-6)
    kept = torch.ones(2, 3, dtype=torch.bool)
    kept[1, 2] = False
    mask = Grain("block", (4, 1)).expand(kept, w.shape)
    assert not mask[4:, 2].any() and int((~mask).sum()) == 36


def test_blocks_do_not_straddle_where_n_does_not_divide_the_outputs() -> None:
    w, grain = weight(6, 3, 3, 3), Grain("block", (4, 1))
    table = grain.table(w)
    assert table.shape == (2, 3)
    assert float(table[1, 0]) == pytest.approx(float(w[4:, 0].abs().sum()), rel=1e-6)  # the last two, alone
    with pytest.raises(EdgecError, match="not a multiple"):
        Grain("block", (4, 2)).table(w)


def test_kinds_by_hand() -> None:
    w = torch.arange(1.0, 13.0).reshape(2, 1, 2, 3)
    assert Grain("row").table(w).tolist() == [[6, 15], [24, 33]]
    assert Grain("kernel").table(w).tolist() == [[21], [57]]
    assert Grain("filter").table(w).tolist() == [[21], [57]]
    assert Grain("weight").table(w).shape == (2, 6)


@given(st.integers(1, 5), st.integers(1, 12), st.floats(0, 0.99), st.booleans(), st.integers(0, 2**31))
def test_the_lowest_go_and_the_count_is_exact(groups: int, columns: int, rate: float, balanced: bool, seed: int):
    scores = torch.rand(groups, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    removed = int(rate * scores.numel())
    kept = choose(scores, removed, balanced)
    if balanced:
        each = removed // groups
        assert (~kept).sum(1).tolist() == [each] * groups
        rows = zip(scores, kept)
    else:
        assert int((~kept).sum()) == removed
        rows = [(scores.reshape(-1), kept.reshape(-1))]
    for values, stay in rows:
        if stay.any() and not stay.all():
            assert values[~stay].max() <= values[stay].min()


def test_nothing_beyond_all_can_go() -> None:
    with pytest.raises(EdgecError, match="5 of 4"):
        choose(torch.ones(2, 2), 5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pw, self.shared = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.hidden, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.pw(F.relu(self.dw(F.relu(self.stem(x))))))
        x = self.shared(F.relu(self.shared(x))).mean((2, 3))
        return self.fc(F.relu(self.hidden(x)))


def test_what_is_left_out_is_named() -> None:
    context = Context()
    module = load_model(Net().eval(), input_shape=(1, 3, 8, 8)).module
    assert [t.layer for t in prunable(module, (), context)] == ["pw", "hidden"]
    assert {s.layer: s.reason for s in context.skipped} == {
        "stem": "is the first convolution",
        "dw": "is a depthwise or grouped convolution",
        "shared": "its weight is shared with another layer",
        "fc": "is the classifier",
    }
    assert [t.layer for t in prunable(module, ("p*",))] == ["hidden"]


def test_the_last_convolution_of_an_image_network_is_no_classifier() -> None:
    module = zoo.program("concat").module
    assert "after" in [t.layer for t in prunable(module)]


def test_applying_masks_and_what_they_amount_to() -> None:
    program = zoo.program("residual")
    mask = torch.ones(4, 4, 3, 3, dtype=torch.bool)
    mask[:2] = False
    after = apply(program, {"conv2.weight": Sparsity("block", (2, 1), mask)})
    removed, total = achieved(after)
    assert removed == 0.5 and total == 72 / sum(w.numel() for w in program.weights().values())
    old, new = program.weights()["conv2.weight"], after.weights()["conv2.weight"]
    assert torch.equal(new[mask], old[mask]) and not new[~mask].view(torch.int32).any()
