"""`prune-1xn`: blocks, counts, rearrangement, what pays on a target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.pruning import prune_1xn
from edgec.passes.pruning.allocation import removed
from edgec.passes.pruning.masks import Grain, achieved, prunable
from edgec.passes.pruning.plan import scored
from edgec.passes.pruning.prune import Prune
from edgec.passes.pruning.prune_1xn import Prune1xN, exchange, rearrange
from edgec.program import Program, origin_of
from edgec.sparsity import sparsities
from edgec.targets.device import load_device
from tests import zoo

pytestmark = pytest.mark.pure


class Stage(nn.Module):
    """A stem, a residual block, a depthwise-separable layer whose pointwise half widens, and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn0 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.dw, self.bn3 = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.pw, self.fc = nn.Conv2d(width, 2 * width, 1), nn.Linear(2 * width, 10)
        for norm in (self.bn0, self.bn1, self.bn2, self.bn3):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_()
            norm.running_mean, norm.running_var = torch.randn(width), 0.5 + torch.rand(width)
        for layer in (self.a, self.b, self.pw):  # filters of different size, in no order
            layer.weight.data *= torch.rand(len(layer.weight)).reshape(-1, 1, 1, 1) + 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(self.bn2(self.b(F.relu(self.bn1(self.a(x))))) + x)
        return self.fc(F.relu(self.pw(F.relu(self.bn3(self.dw(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def stage() -> Program:
    return load_model(Stage().eval(), input_shape=(1, 3, 8, 8))


def check_blocks(mask: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[groups, blocks]: what is kept; asserts that every block is all or none."""
    n, c = block
    table = mask.reshape(len(mask) // n, n, mask.shape[1] // c, c, -1)
    some, every = table.any(4).any(3).any(1), table.all(4).all(3).all(1)
    assert torch.equal(some, every)
    return every


def outputs_agree(a: Program, b: Program, rtol: float = 1e-5) -> None:
    x = torch.rand(4, *a.inputs[0].shape[1:], generator=torch.Generator().manual_seed(1))
    for want, got in zip(a(x), b(x), strict=True):
        assert float((want - got).abs().max()) <= rtol * float(want.abs().max())


@pytest.mark.parametrize("block,sparsity", [((4, 1), 0.5), ((2, 1), 0.3), ((8, 1), 0.75), ((4, 4), 0.6)])
@pytest.mark.parametrize("balanced", [False, True])
def test_blocks_go_whole_and_by_the_floor_rule(stage: Program, block, sparsity: float, balanced: bool) -> None:
    step = Prune1xN(n=block[0], inputs=block[1], sparsity=sparsity, balanced=balanced)
    after = step.run(stage, Context())
    records = sparsities(after.annotations)
    assert set(records) == {"a.weight", "b.weight", "pw.weight"}
    for path, record in records.items():
        table = check_blocks(record.mask, block)
        if balanced:
            each = table.shape[1] - removed(sparsity, table.shape[1])
            assert table.sum(1).tolist() == [each] * len(table), path
        else:
            assert int((~table).sum()) == removed(sparsity, table.numel()), path
        assert (record.pattern, record.block, record.balanced) == ("block", block, balanced)
        assert not after.weights()[path][~record.mask].view(torch.int32).any()


def test_the_lowest_blocks_of_the_rearranged_weight_go(stage: Program) -> None:
    after = Prune1xN(n=4, balanced=False).run(stage, Context())
    module = stage.edit()
    rearrange(module, prunable(module), Grain("block", (4, 1)), 0.5, False, Context())
    for path, record in sparsities(after.annotations).items():
        weight = stage.replace(module).weights()[path]
        scores = Grain("block", (4, 1)).table(weight)
        kept = check_blocks(record.mask, (4, 1))
        assert float(scores[~kept].max()) <= float(scores[kept].min())
        assert torch.equal(after.weights()[path][record.mask], weight[record.mask])


def test_rearranging_keeps_the_function_and_sorts_the_filters(stage: Program) -> None:
    module, context = stage.edit(), Context()
    orders = rearrange(module, prunable(module), Grain("block", (4, 1)), 0.5, False, context)
    after = stage.replace(module)
    assert set(orders) == {"stem", "a", "pw"}
    outputs_agree(stage, after)
    old, new = stage.weights(), after.weights()
    assert torch.equal(new["a.weight"], old["a.weight"][orders["a"]][:, orders["stem"]])
    assert torch.equal(new["dw.weight"], old["dw.weight"][orders["stem"]])  # depthwise rows follow
    assert torch.equal(new["stem.weight"], old["stem.weight"][orders["stem"]])  # not pruned, but tied to b
    assert torch.equal(new["bn1.running_var"], old["bn1.running_var"][orders["a"]])
    assert torch.equal(new["fc.weight"], old["fc.weight"][:, orders["pw"]])
    norms = new["a.weight"].abs().sum((1, 2, 3))
    assert bool((norms.diff() >= -1e-5).all())
    moved = {origin_of(n) for n in after.graph.nodes if "rearranged" in origin_of(n)}
    kept = {n.name for n in after.graph.nodes if origin_of(n) == n.name}
    assert any(m.startswith("conv2d_1,") for m in moved) and "linear" in kept


def test_the_order_of_a_stage_is_that_of_the_sum_of_its_pruned_producers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.stem = nn.Conv2d(3, 8, 1)
            self.a, self.b, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.fc((self.a(x) + self.b(x)).mean((2, 3)))

    program = load_model(Two().eval(), input_shape=(1, 3, 4, 4))
    module = program.edit()
    orders = rearrange(module, prunable(module), Grain("block", (2, 1)), 0.5, False, Context())
    total = torch.stack([program.weights()[p].abs().sum((1, 2, 3)) for p in ("a.weight", "b.weight")]).sum(0)
    if orders:  # only where it retains more
        assert orders["a"].tolist() == total.argsort(stable=True).tolist()
    assert "stem" not in orders  # nothing that is pruned makes these channels


@given(st.integers(2, 4), st.sampled_from([2, 4]), st.integers(1, 8), st.integers(0, 2**31))
def test_exchanges_retain_more_until_no_pair_helps(groups: int, n: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts, kept = [rng.random((groups * n, columns)), rng.random((groups * n, 6)) ** 4], [(columns + 1) // 2, 3]

    def mass(sets: np.ndarray) -> float:
        return sum(float(np.sort(p[s].sum(0))[-k:].sum()) for s in sets for p, k in zip(parts, kept))

    start = rng.permutation(groups * n).reshape(groups, n)
    found = exchange(parts, kept, start)
    assert sorted(found.reshape(-1)) == list(range(groups * n))
    assert mass(found) >= mass(start) - 1e-9
    if np.array_equal(exchange(parts, kept, found), found):
        for a, b in itertools.combinations(range(groups * n), 2):
            flat = found.reshape(-1).copy()
            flat[[a, b]] = flat[[b, a]]
            assert mass(flat.reshape(groups, n)) <= mass(found) + 1e-6


def test_filters_that_look_at_the_same_inputs_share_a_block() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.fc = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 3)
            with torch.no_grad():  # even filters read the first half of the inputs, odd ones the second
                self.second.weight[0::2, 4:] *= 0.001
                self.second.weight[1::2, :4] *= 0.001

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))

    program = load_model(Mixed().eval(), input_shape=(1, 8, 4, 4))
    after = Prune1xN(n=4, keep=("first",)).run(program, Context())
    weights = [p.weights()["second.weight"].abs().sum() for p in (program, after)]
    assert float(weights[1]) > 0.99 * float(weights[0])
    outputs_agree(program, after, 0.01)


@pytest.mark.parametrize(
    "model",
    [
        "residual",
        "concat",
        "depthwise_separable",
        "grouped_conv",
        "squeeze_excite",
        "mlp",
        "vit_block",
        "padded_shortcut",
    ],
)
def test_rearranging_keeps_the_function_of_every_model(model: str) -> None:
    program = zoo.program(model)
    module = program.edit()
    rearrange(module, prunable(module), Grain("block", (2, 1)), 0.5, True, Context())
    outputs_agree(program, program.replace(module))


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("balanced", [False, True])
def test_rearranging_retains_at_least_as_much(stage: Program, n: int, balanced: bool) -> None:
    module, grain = stage.edit(), Grain("block", (n, 1))
    plain = sum(s.retained(0.5, balanced) for s in scored(prunable(module), grain, "l1", 0))
    rearrange(module, prunable(module), grain, 0.5, balanced, Context())
    assert sum(s.retained(0.5, balanced) for s in scored(prunable(module), grain, "l1", 0)) > plain


def test_nothing_is_nothing_and_twice_is_once(stage: Program) -> None:
    assert Prune1xN(sparsity=0).run(stage, Context()) is stage
    once = Prune1xN(n=4).run(stage, Context())
    context = Context()
    assert Prune1xN(n=4).run(once, context) is once
    assert {s.reason for s in context.skipped if s.layer in ("a", "b", "pw")} == {"is pruned already"}


def test_a_group_with_a_pruned_layer_keeps_its_order(stage: Program) -> None:
    first = Prune(grain="kernel", keep=("a", "pw")).run(stage, Context())
    assert set(sparsities(first.annotations)) == {"b.weight"}
    context = Context()
    after = Prune1xN(n=4).run(first, context)
    assert sparsities(after.annotations)["b.weight"] == sparsities(first.annotations)["b.weight"]
    assert ("a", "a layer with these channels is pruned already") in {(s.layer, s.reason) for s in context.skipped}
    assert set(sparsities(after.annotations)) == {"a.weight", "b.weight", "pw.weight"}


def test_masks_survive_folding_because_it_scales_filters(stage: Program) -> None:
    before = Prune1xN(n=4).run(stage, Context())
    after = FoldBN().run(before, Context())
    assert sorted(map(repr, sparsities(after.annotations).values())) == sorted(
        map(repr, sparsities(before.annotations).values())
    )
    outputs_agree(before, after, 1e-4)


def test_layers_without_such_blocks_are_named(stage: Program) -> None:
    context = Context()
    after = Prune1xN(n=32).run(stage, context)
    assert set(sparsities(after.annotations)) == {"pw.weight"}
    reasons = {s.layer: s.reason for s in context.skipped}
    assert reasons["a"] == "16 outputs and 16 inputs have no blocks of 32x1"


def test_random_blocks_are_a_baseline_with_a_seed(stage: Program) -> None:
    runs = [Prune1xN(n=4, criterion="random").run(stage, Context(seed=s)) for s in (0, 0, 1)]
    assert runs[0].text() == runs[1].text() != runs[2].text()
    l1 = Prune1xN(n=4, rearrange=False).run(stage, Context())
    mass = [sum(float(p.weights()[k].abs().sum()) for k in ("a.weight", "b.weight")) for p in (l1, *runs)]
    assert mass[0] > 1.05 * max(mass[1:])
    for record in sparsities(runs[0].annotations).values():
        assert check_blocks(record.mask, (4, 1)).sum(1).unique().numel() == 1


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """A device on which blocks of 8x1 pay below a density of 0.6 in 1x1 and 0.4 in 3x3 kernels."""
    even = {"1x1": 0.6, "3x3": 0.4}
    monkeypatch.setattr(prune_1xn, "best_block", lambda device, dtype: (8, 1) if dtype == "float32" else None)
    monkeypatch.setattr(prune_1xn, "break_even", lambda d, t, b, kernel: even[kernel] if b == (8, 1) else None)
    return load_device("cortex-a76")


def test_n_is_what_pays_on_the_target(stage: Program, table) -> None:
    assert Prune1xN().block(None) == (4, 1)
    assert Prune1xN().block(table) == (8, 1)
    assert Prune1xN(n=16).block(table) == (16, 1)
    assert Prune1xN(n=16, inputs=4).block(table) == (16, 4)
    after = Prune1xN(sparsity=0.75).run(stage, Context(device=table))
    assert {r.block for r in sparsities(after.annotations).values()} == {(8, 1)}


def test_layers_that_would_be_slower_stay_dense(stage: Program, table) -> None:
    context = Context(device=table)
    after = Prune1xN(sparsity=0.5).run(stage, context)
    assert set(sparsities(after.annotations)) == {"pw.weight"}
    reason = {s.layer: s.reason for s in context.skipped}["a"]
    assert reason.endswith("8x1 on cortex-a76 break even at a density of 0.40, this is 0.50")


def test_a_model_that_gains_nowhere_is_refused_unless_forced(stage: Program, table) -> None:
    with pytest.raises(EdgecError, match=r"break even at a density of 0\.60, this is 0\.70"):
        Prune1xN(sparsity=0.3, keep=("a", "b")).run(stage, Context(device=table))
    with pytest.raises(EdgecError, match="never break even"):
        Prune1xN(n=2).run(stage, Context(device=table))
    with pytest.raises(EdgecError, match="no block-sparse int8 kernel is known to pay"):
        Prune1xN(dtype="int8").run(stage, Context(device=table))
    context = Context(device=table)
    after = Prune1xN(n=2, force=True).run(stage, context)
    assert achieved(after)[0] == 0.5
    assert {s.layer for s in context.skipped if s.what == "will not be faster"} == {"a", "b", "pw"}


def test_int8_weights_get_blocks_of_several_inputs() -> None:
    device = load_device("cortex-a76")
    n, inputs = Prune1xN(dtype="int8").block(device)
    assert n >= 8 and inputs % 4 == 0  # sdot adds up four


def test_weaker_removes_less() -> None:
    step = Prune1xN(n=4, sparsity=0.8)
    assert step.weaken(0.5) == Prune1xN(n=4, sparsity=0.4) and step.weaken(1.0) == step


# -- real data ---------------------------------------------------------------------------------------------------------


def test_resnet20_retains_more_mass_rearranged(shared) -> None:
    program = load_model(str(shared / "data/models/cifar10_resnet20.pt2"))
    module, context = program.edit(), Context()
    targets, grain = prunable(module, (), context), Grain("block", (4, 1))
    assert len(targets) == 18 and {s.layer for s in context.skipped} == {"conv1", "linear"}
    mass = {b: sum(s.retained(0.5, b) for s in scored(targets, grain, "l1", 0)) for b in (False, True)}
    orders = rearrange(module, targets, grain, 0.5, False, context)
    assert len(orders) >= 9 and len(context.skipped) == 2  # channels of zero-padded shortcuts can be reordered too
    after = sum(s.retained(0.5) for s in scored(targets, grain, "l1", 0))
    assert after > 1.01 * mass[False]
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))
    with torch.no_grad():
        want, got = program(x)[0], module(x)[0]
    assert float((want - got).abs().max()) <= 1e-5 * float(want.abs().max())
