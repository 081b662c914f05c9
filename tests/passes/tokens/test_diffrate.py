"""DiffRate against an eager reference, its schedules, and learning of the counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgec.cost import program_cost
from edgec.data import Dataset, random_data
from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.tokens.diffrate import DiffRate
from edgec.passes.tokens.rates import PUBLISHED, Counts, Learning, MaskedTokens, Rates, fitted, learn, published
from edgec.passes.tokens.rewrite import formula_macs, prepare
from edgec.passes.tokens.tome import ToMe
from edgec.program import is_call
from tests.passes.tokens import vit

pytestmark = pytest.mark.pure
PRUNE, MERGE = (15, 12, 9), (13, 9, 9)


def eager(model: vit.ViT, x: torch.Tensor, weighted: bool, true_size: bool) -> Any:
    """The paper's inference: sort by class attention, cut, merge the tail by scatter."""
    p = model.prefix

    def reduce(x: Any, size: Any, q: Any, k: Any, v: Any, block: int) -> Any:
        keep, left = PRUNE[block], MERGE[block]
        logits = q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + size.log()[:, None, None, :, 0]
        score = logits.softmax(-1)[:, :, 0, p:].mean(1)
        order = score.argsort(dim=1, descending=True, stable=True)[:, : keep - p] + p
        order = torch.cat([torch.arange(p).expand(len(x), p), order], 1)[..., None]
        x, size = x.gather(1, order.expand(-1, -1, x.shape[2])), size.gather(1, order)
        if left == keep:
            return x, size
        unit = torch.nn.functional.normalize(x, dim=-1)
        best, target = (unit[:, left:] @ unit[:, p:left].transpose(1, 2)).max(-1)
        for b in range(len(x)):
            sums, count, grown = x[b, :left].clone(), torch.ones(left, 1), size[b, :left].clone()
            if weighted:
                sums, count = sums * size[b, :left], size[b, :left].clone()
            for u in range(keep - left):
                j, weight = int(target[b, u]) + p, size[b, left + u] if weighted else torch.ones(1)
                sums[j] += weight * x[b, left + u]
                count[j] += weight
                grown[j] += size[b, left + u] * (1 if true_size else best[b, u].clamp_min(0))
            x[b, :left], size[b, :left] = sums / count, grown
        return x[:, :left], size[:, :left]

    return model.compressed(x, reduce)[0]


@pytest.mark.parametrize(
    ("options", "mean", "true_size"),
    [({}, "plain", False), ({"kind": "split"}, "weighted", True), ({"prefix": 2, "pool": "dist"}, "plain", True)],
)
def test_it_is_the_reference(options: dict[str, Any], mean: str, true_size: bool) -> None:
    step = DiffRate(prune=PRUNE, merge=MERGE, merge_mean=mean, true_size=true_size)
    after = step.run(vit.exported(**options), Context())
    want = eager(vit.model(**options), vit.images(), mean == "weighted", true_size)
    torch.testing.assert_close(after(vit.images())[0], want, rtol=1e-5, atol=1e-5)
    sites = after.annotations["tokens"].sites
    # The last block has class rows only.
    assert [(s.kept, s.after) for s in sites] == list(zip(PRUNE, MERGE, strict=True))[:2]


def test_counts_follow_the_schedule_and_the_class_row_is_untouched() -> None:
    after = DiffRate(prune=PRUNE, merge=MERGE, class_rows=False).run(vit.exported(), Context())
    nodes = [n for n in after.graph.nodes if is_call(n, torch.ops.edgec.token_reduce.default)]
    assert len(nodes) == 2, "the third keeps what arrives"
    for node, count in zip(nodes, MERGE):
        x, (y, size) = vit.values(after, vit.images(), [node.args[0].name, node.name])
        assert y.shape == (3, count, 16) and torch.equal(y[:, 0], x[:, 0])
        assert bool((size.sum(1) < 17).all()), "pruned tokens and similarities below one count for less"


def test_sizes_sum_to_the_patches_with_true_sizes_and_no_pruning() -> None:
    program, prune, merge = vit.exported(), (17, 17, 17), (14, 10, 8)
    exact = vit.sizes_of(DiffRate(true_size=True, prune=prune, merge=merge).run(program, Context()), vit.images())
    scaled = vit.sizes_of(DiffRate(prune=prune, merge=merge).run(program, Context()), vit.images())
    assert all(torch.equal(s.sum(1), torch.full((3, 1), 17.0)) for s in exact)
    assert all(bool((s.sum(1) < 17).all()) for s in scaled)


def test_keeping_all_is_the_same_graph() -> None:
    program = vit.exported()
    assert DiffRate(macs=1.0).run(program, Context()) is program
    assert DiffRate(prune=(17,) * 3, merge=(99,) * 3).run(program, Context()) is program
    assert DiffRate(macs=0.6).weaken(0.0).run(program, Context()) is program  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_share_of_work_is_met_from_below(share: float) -> None:
    program = vit.exported(blocks=5)
    after = DiffRate(macs=share).run(program, Context())
    got = program_cost(after).macs / program_cost(program).macs
    assert share - 0.03 < got <= share


def test_what_cannot_be_reached_is_said() -> None:
    context = Context()
    after = DiffRate(macs=0.05).run(vit.exported(), context)
    assert any("least that can be had" in skip.reason for skip in context.skipped)
    assert program_cost(after).macs < 0.7 * program_cost(vit.exported()).macs


def test_without_a_class_token_nothing_is_done() -> None:
    program, context = vit.exported(prefix=0, pool="mean"), Context()
    assert DiffRate().run(program, context) is program
    assert "no class token" in context.skipped[0].reason


@pytest.mark.parametrize("counts", [{"prune": (9, 9)}, {"merge": (9, 9, 1)}])
def test_counts_that_do_not_fit_are_refused(counts: dict[str, Any]) -> None:
    with pytest.raises(EdgecError, match="does not fit 3 blocks"):
        DiffRate(**counts).run(vit.exported(), Context())


def test_published_schedules_have_the_published_cost() -> None:
    want = {"deit-t": (192, 0.8), "deit-s": (384, 2.9), "deit-b": (768, 11.5)}
    for name, (width, giga) in want.items():
        assert formula_macs(197, width, 16, 1000, PUBLISHED[name][1]) / 1e9 == pytest.approx(giga, rel=0.02)


def test_a_published_schedule_of_its_own_shape_is_not_changed() -> None:
    program = vit.exported(blocks=12)
    ready = prepare(program, Context(), class_rows=False)
    prune, merge = published("deit-t", ready)
    assert [round(1 + f * 196) for f in prune] == list(PUBLISHED["deit-t"][0])
    assert [round(1 + f * 196) for f in merge] == list(PUBLISHED["deit-t"][1])


# -- learning ----------------------------------------------------------------------------------------------------------


def test_training_mode_is_the_compressed_graph_when_only_pruning() -> None:
    program = vit.exported()
    for class_rows in (True, False):
        ready = prepare(program, Context(), class_rows)
        sites = len(ready.map.sites)
        counts = torch.tensor([[17, 17], [12, 12], [7, 7]][:sites], dtype=torch.float32)
        masks = (torch.arange(17) < counts[..., None]).float()
        got = MaskedTokens(ready.map, True, False, False).forward((vit.images(),), counts, masks)[0]
        kept = (17, 12, 7)
        want = DiffRate(prune=kept, merge=kept, class_rows=class_rows).run(program, Context())(vit.images())[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_training_mode_with_merging_is_near() -> None:
    program = vit.exported()
    ready = prepare(program, Context(), class_rows=True)
    counts = torch.tensor([[17.0, 17.0], [15.0, 12.0]])
    masks = (torch.arange(17) < counts[..., None]).float()
    got = MaskedTokens(ready.map, True, False, True).forward((vit.images(),), counts, masks)[0]
    want = DiffRate(prune=(17, 15, 17), merge=(17, 12, 17), true_size=True).run(program, Context())(vit.images())[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_gradients_reach_both_counts_of_every_site_but_the_first() -> None:
    rates = Rates(tokens=17, prefix=1, sites=3, granularity=2, free=1)
    ready = prepare(vit.exported(), Context(), class_rows=False)
    counts = rates.counts()
    assert counts[0].tolist() == [17, 17]
    ready.cost.macs(rates.behind(counts)).backward()
    gradient = rates.logits.grad
    assert gradient is not None and bool((gradient[0] == 0).all())
    assert bool((gradient[1:].abs().sum(-1) > 0).all())
    # More weight on the largest candidate costs more.
    assert bool((gradient[1:, :, 0] > 0).all())


def test_masks_are_hard_and_carry_the_probability() -> None:
    rates = Rates(tokens=9, prefix=1, sites=2, granularity=4, free=1)
    masks = rates.masks(rates.counts())
    # Candidates 8 and 4, each with probability one half: 6 + 1 are kept.
    assert masks[1, 0].tolist() == [1.0] * 7 + [0.0] * 2
    masks[1, 0, 8].backward()
    assert rates.logits.grad is not None and rates.logits.grad[1, 0].tolist() == [0.25, -0.25]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return random_data(vit.exported().inputs, 32, seed=3)


def test_learning_meets_the_cost_and_beats_uniform_pruning_of_important_tokens(data: Dataset) -> None:
    program = vit.exported(blocks=4)
    whole = program_cost(program).macs
    ready = prepare(program, Context(), class_rows=True)
    options = Learning(steps=30, batch=8, granularity=2)
    found = learn(ready, 0.6 * whole, data, options, proportional=True, weighted=False, true_size=False)
    again = learn(ready, 0.6 * whole, data, options, proportional=True, weighted=False, true_size=False)
    assert found == again
    assert ready.cost.macs(found.merge) <= 0.6 * whole
    assert found.merge[0] == 17 and sorted(found.merge, reverse=True) == list(found.merge)


def test_the_pass_learns(data: Dataset) -> None:
    program = vit.exported()
    step = DiffRate(macs=0.65, learn=True, steps=4, batch=8, granularity=2)
    after = step.run(program, Context(calibration=data))
    assert program_cost(after).macs <= 0.65 * program_cost(program).macs
    with pytest.raises(EdgecError, match="needs calibration data"):
        step.run(program, Context())
    with pytest.raises(EdgecError, match="less than a batch"):
        DiffRate(macs=0.65, learn=True, batch=64).run(program, Context(calibration=data))


def test_counts_are_clipped() -> None:
    assert Counts((20, 9, 12), (15, 12, 1)).clipped(17, 2) == Counts((17, 9, 9), (15, 9, 3))


def test_fitting_is_monotone() -> None:
    ready = prepare(vit.exported(blocks=6), Context(), class_rows=True)
    whole = program_cost(ready.program).macs
    shares = published("deit-t", ready)
    found = [sum(fitted(*shares, ready, share * whole).merge) for share in (0.4, 0.5, 0.6, 0.7)]
    assert found == sorted(found) and found[0] < found[-1]


def test_merging_keeps_more_than_pruning_alone(data: Dataset) -> None:
    """The point of the scheme: at equal counts the merged tail carries what pruning loses."""
    program = vit.exported(blocks=4)
    x = data.inputs()
    want = program(x)[0].log_softmax(1)
    loss = []
    for prune in ((17, 13, 9, 9), (17, 17, 13, 9)):
        got = DiffRate(prune=prune, merge=(17, 13, 9, 9)).run(program, Context())(x)[0].log_softmax(1)
        loss.append(float((want.exp() * (want - got)).sum(1).mean()))
    assert loss[1] < loss[0]


def test_tome_and_diffrate_do_not_follow_each_other() -> None:
    once, context = vit.applied(ToMe(r=2)), Context()
    assert DiffRate().run(once, context) is once and context.skipped
