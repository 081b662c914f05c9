"""Mask search over frozen weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.pruning.masks import apply
from edgec.passes.recovery.search_mask import SearchMask, Table, swapped
from edgec.program import Program
from edgec.sparsity import Sparsity, sparsities
from tests.passes.recovery.cases import context, distance, network, run, samples

pytestmark = pytest.mark.pure
SHORT = SearchMask(steps=60, batch=32, lr=0.3)
CONVS = [f"convs.{i}.weight" for i in range(4)]


def n_of_m(program: Program, n: int = 1, m: int = 4) -> Program:
    """The n largest of m consecutive input channels at every tap."""
    records = {}
    for path in CONVS:
        weight = program.weights()[path]
        groups = weight.abs().movedim(1, -1).reshape(-1, m)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter(1, groups.topk(n, 1).indices, True)
        outputs, inputs, *window = weight.shape
        mask = kept.reshape(outputs, *window, inputs).movedim(-1, 1).contiguous()
        records[path] = Sparsity("nm", (n, m), mask)
    return apply(program, records)


MASKS = {
    "unstructured": "prune{sparsity=0.8}",
    "blocks": "prune-1xn{n=4 sparsity=0.6 balanced=false rearrange=false}",
    "balanced": "prune-1xn{n=4 sparsity=0.6}",
    "n of m": "",
}


def masked(name: str, given: Context, dense: Program) -> Program:
    pruned = n_of_m(dense) if name == "n of m" else run(MASKS[name], dense, given)
    return run("recalibrate-bn", pruned, given)


@pytest.mark.parametrize("name", MASKS)
def test_the_pattern_stays_the_weights_stay_and_the_model_gets_better(name: str) -> None:
    dense = network()
    given = context(dense)
    pruned = masked(name, given, dense)
    found = SHORT.run(pruned, given)
    assert distance(run("recalibrate-bn", found, given), dense) < distance(pruned, dense)
    before, after = sparsities(pruned.annotations), sparsities(found.annotations)
    assert before.keys() == after.keys() and found.annotations["search-mask"].swaps > 0
    values = {v for w in dense.weights().values() for v in w.flatten().tolist()}
    for path, record in after.items():
        assert (record.pattern, record.block, record.balanced) == (
            before[path].pattern, before[path].block, before[path].balanced,
        )  # fmt: skip
        assert int(record.mask.sum()) == int(before[path].mask.sum())
        table = Table(record)  # raises where a block is cut
        assert torch.equal(table.kept.sum(1), Table(before[path]).kept.sum(1))
        weight, both = found.weights()[path], record.mask & before[path].mask
        assert torch.equal(weight[both], pruned.weights()[path][both])
        assert set(weight[record.mask].tolist()) <= values
        assert bool((weight[~record.mask] == 0).all()) and not bool(torch.signbit(weight[~record.mask]).any())
    for path, weight in found.weights().items():
        if path not in after and "running" not in path:
            assert torch.equal(weight, pruned.weights()[path])


def test_tables_and_masks_are_inverse_also_where_blocks_do_not_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, block in (((10, 7, 3, 3), (4, 1)), ((8, 8), (4, 2)), ((6, 9, 1, 1), (4, 4)), ((4, 6, 3, 3), (1, 6))):
        out, inside = block
        whole = (shape[0] // out, shape[1] // inside)
        kept = torch.rand(whole, generator=generator) < 0.5
        for balanced in (False, True):
            mask = torch.ones(shape, dtype=torch.bool)
            part = kept.repeat_interleave(out, 0).repeat_interleave(inside, 1)
            mask[: part.shape[0], : part.shape[1]] = part.reshape(*part.shape, *[1] * (len(shape) - 2))
            table = Table(Sparsity("block", block, mask, balanced))
            assert torch.equal(table.kept.flatten(), kept.flatten())
            assert table.kept.shape == (whole if balanced else (1, kept.numel()))
            assert torch.equal(table.mask(table.kept), mask)
            none = table.mask(torch.zeros_like(table.kept))
            assert not none[: part.shape[0], : part.shape[1]].any() and bool(none[part.shape[0] :].all())


def test_sums_over_grains() -> None:
    values = torch.arange(4 * 4 * 2, dtype=torch.float32).reshape(4, 4, 2, 1)
    every = torch.ones(4, 4, 2, 1, dtype=torch.bool)
    blocks = Table(Sparsity("block", (2, 1), every, True)).grains(values)
    assert torch.equal(blocks, values.sum((2, 3)).reshape(2, 2, 4).sum(1))
    groups = Table(Sparsity("nm", (4, 4), every)).grains(values)
    assert torch.equal(groups[0], values[0, :, 0, 0]) and torch.equal(groups[1], values[0, :, 1, 0])
    assert torch.equal(Table(Sparsity("unstructured", (1, 1), every)).grains(values), values.reshape(1, -1))


def test_the_best_swaps_are_made_first_and_only_inside_a_group() -> None:
    scores = torch.tensor([[5.0, 1.0, 2.0, 0.0], [0.5, 3.0, 0.4, 9.0]])
    kept = torch.tensor([[False, True, True, False], [False, True, True, False]])
    every, n = swapped(scores, kept, 1.0)
    assert n == 2
    assert every.tolist() == [[True, False, True, False], [False, True, False, True]]
    first, n = swapped(scores, kept, 0.5)
    assert n == 1 and first.tolist() == [[False, True, True, False], [False, True, False, True]]
    same, n = swapped(scores, kept, 0.0)
    assert n == 0 and torch.equal(same, kept)
    assert torch.equal(swapped(scores, every, 1.0)[0], every)


def test_the_number_of_swaps_falls_with_the_search() -> None:
    """r = (1 - t)^4 without rounding up: the published code's ceil makes it 1 until the end."""
    scores, kept = torch.arange(200.0)[None], torch.arange(200)[None] < 100
    counts = [swapped(scores, kept, (1 - t) ** 4)[1] for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert counts == [math.ceil(100 * (1 - t) ** 4) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == [100, 32, 7, 1, 0]


def test_the_gradient_of_a_score_is_weight_times_gradient_over_its_grain() -> None:
    from edgec.passes.recovery.search_mask import MaskedStudent

    dense = network()
    given = context(dense)
    pruned = run("prune-1xn{n=4 sparsity=0.5 rearrange=false}", dense, given)
    records = sparsities(pruned.annotations)
    student = MaskedStudent(pruned, {p: Table(r) for p, r in records.items()}, dense.weights(), True)
    x = samples(dense, 8).inputs()
    student(x)[0].square().sum().backward()
    path = "convs.1.weight"
    block = student.scores[path].grad[1, 3]  # type: ignore[index]

    def loss(amount: float) -> float:
        module = pruned.edit()
        with torch.no_grad():
            module.get_parameter(path)[4:8, 3] = amount * dense.weights()[path][4:8, 3]
            return float(module(x)[0].double().square().sum())

    at = float(records[path].mask[4, 3, 0, 0])
    assert float(block) == pytest.approx((loss(at + 0.05) - loss(at - 0.05)) / 0.1, rel=0.05, abs=1e-3)


def test_it_is_deterministic_and_uses_no_labels() -> None:
    dense = network()
    x, labels = samples(dense).inputs().numpy(), np.arange(128) % 4
    pruned = masked("balanced", context(dense), dense)
    with_labels = Context(calibration=load_data((x, labels), dense.inputs), teacher=dense)
    assert SHORT.run(pruned, with_labels).text() == SHORT.run(pruned, context(dense)).text()


def test_what_cannot_be_searched_is_said() -> None:
    dense = network()
    given = context(dense)
    assert SHORT.run(dense, given) is dense
    assert "behind a pruning pass" in given.skipped[-1].reason
    with pytest.raises(EdgecError, match="directly behind the pruning pass"):
        SHORT.run(run("prune{sparsity=0.5}, finetune{steps=3 batch=16}", dense, given), given)
    with pytest.raises(EdgecError, match="search before quantising"):
        SHORT.run(run("prune{sparsity=0.5}, fold-bn, quantize-int8", dense, given), given)
    with pytest.raises(EdgecError, match="has no blocks"):
        Table(Sparsity("block", (4, 1), torch.rand(8, 8) < 0.5))
