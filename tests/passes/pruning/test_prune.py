"""`prune`: counts, grains, allocation on a model, and the refusal on targets that gain nothing."""

from __future__ import annotations

import pytest
import torch

from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.pruning.allocation import removed
from edgec.passes.pruning.masks import achieved
from edgec.passes.pruning.plan import ALLOCATIONS
from edgec.passes.pruning.prune import Prune
from edgec.program import Program
from edgec.sparsity import sparsities
from edgec.targets.device import load_device
from tests import zoo

pytestmark = pytest.mark.pure
# conv1 is the first convolution, fc the classifier
TARGETS = ("conv2.weight", "conv3.weight", "shortcut.0.weight")


def prune(model: str = "residual", **options) -> tuple[Program, Context]:
    context = Context(calibration=zoo.calibration(model))
    return Prune(**options).run(zoo.program(model), context), context


@pytest.mark.parametrize("grain,size", [("weight", None), ("row", 3), ("kernel", 9), ("filter", 36)])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_whole_grains_go_by_the_floor_rule(grain: str, size: int | None, sparsity: float) -> None:
    after, _ = prune(grain=grain, sparsity=sparsity)
    mask = sparsities(after.annotations)["conv2.weight"].mask
    table = mask.reshape(-1, size or 1)
    assert bool((table.all(1) | ~table.any(1)).all())
    assert int((~table.any(1)).sum()) == removed(sparsity, len(table))
    before = zoo.program("residual").weights()
    for path, weight in after.weights().items():
        record = sparsities(after.annotations).get(path)
        kept = torch.ones_like(weight, dtype=torch.bool) if record is None else record.mask
        assert torch.equal(weight[kept], before[path][kept])


def test_nothing_is_nothing_and_twice_is_once() -> None:
    program = zoo.program("residual")
    assert prune(sparsity=0.0)[0] is program
    once, context = prune(sparsity=0.5)
    again = Context()
    assert Prune(sparsity=0.5).run(once, again).text() == once.text()
    assert {s.layer for s in again.skipped} > {s.layer for s in context.skipped}
    further = Prune(sparsity=0.75).run(once, Context())
    for path, record in sparsities(further.annotations).items():
        assert not (record.mask & ~sparsities(once.annotations)[path].mask).any()
    with pytest.raises(EdgecError, match="pruned already"):
        Prune(sparsity=0.5, grain="filter").run(once, Context())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_meets_the_rate_in_all(allocation: str) -> None:
    after, _ = prune(allocation=allocation, sparsity=0.5)
    records = sparsities(after.annotations)
    assert set(records) <= set(TARGETS)
    if allocation == "lagrangian":  # it counts products, which convolutions of stride 2 have fewer of
        weights = after.weights()
        positions = dict(zip(TARGETS, (64, 16, 16), strict=True))
        masks = {p: records[p].mask if p in records else torch.ones_like(weights[p]) for p in TARGETS}
        kept = sum(n * int(masks[p].sum()) for p, n in positions.items())
        assert kept <= 0.5 * sum(n * weights[p].numel() for p, n in positions.items()) + 64 * len(positions)
    else:
        gone = sum(int((~r.mask).sum()) for r in records.values())
        assert gone == pytest.approx(0.5 * sum(after.weights()[p].numel() for p in TARGETS), abs=len(TARGETS))


def test_allocations_that_measure_ask_for_data() -> None:
    for allocation in ("atp", "lagrangian"):
        with pytest.raises(EdgecError, match="needs calibration data"):
            Prune(allocation=allocation).run(zoo.program("residual"), Context())


def test_random_is_a_baseline_with_a_seed() -> None:
    program = zoo.program("residual")
    first, same, other = (Prune(criterion="random").run(program, Context(seed=s)).text() for s in (0, 0, 1))
    assert first == same != other
    left = {c: sum(float(w.abs().sum()) for w in prune(criterion=c)[0].weights().values()) for c in ("l1", "random")}
    assert left["l1"] > left["random"]


def test_a_target_without_a_kernel_refuses_unless_forced() -> None:
    program, device = zoo.program("residual"), load_device("cortex-a76")
    with pytest.raises(EdgecError, match="cortex-a76 skips blocks"):
        Prune().run(program, Context(device=device))
    context = Context(device=device)
    assert achieved(Prune(force=True).run(program, context))[0] == pytest.approx(0.5, abs=0.01)
    assert any(s.what == "will not be faster" for s in context.skipped)


def test_layers_are_kept_by_name() -> None:
    assert set(sparsities(prune(keep=("conv2", "short*"))[0].annotations)) == {"conv3.weight"}
    with pytest.raises(EdgecError, match="no layer is called"):
        prune(keep=("nothing",))


def test_weaker_removes_less() -> None:
    step = Prune(sparsity=0.8)
    assert step.weaken(0.5) == Prune(sparsity=0.4) and step.weaken(1.0) == step
