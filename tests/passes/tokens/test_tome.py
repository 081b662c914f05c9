"""ToMe against an eager reference written from the paper, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.tokens.rewrite import formula_macs, prepare
from edgec.passes.tokens.tome import ToMe, block_schedule, counts_after
from edgec.program import is_call
from tests.passes.tokens import vit

pytestmark = pytest.mark.pure
tome_merge = torch.ops.edgec.tome_merge.default


def merge(x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, r: int, prefix: int, distilled: bool) -> Any:
    """Bipartite soft matching as the authors write it: sort, gather, scatter_reduce."""
    start = 0 if prefix <= 1 or distilled else prefix
    front, x, front_size, size = x[:, :start], x[:, start:], size[:, :start], size[:, start:]
    metric = metric[:, start:]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    if start == 0 and prefix:
        scores[:, 0] = -torch.inf
    if distilled:
        scores[:, :, 0] = -torch.inf
    best, target = scores.max(-1)
    order = best.argsort(-1, descending=True)[..., None]
    unmerged, merged = order[:, r:].sort(1).values, order[:, :r]
    target = target[..., None].gather(1, merged)

    def apply(t: torch.Tensor) -> torch.Tensor:
        a, b = t[:, ::2], t[:, 1::2]
        c = t.shape[-1]
        kept = a.gather(1, unmerged.expand(-1, -1, c))
        b = b.scatter_reduce(1, target.expand(-1, -1, c), a.gather(1, merged.expand(-1, -1, c)), reduce="sum")
        if distilled:
            return torch.cat([kept[:, :1], b[:, :1], kept[:, 1:], b[:, 1:]], 1)
        return torch.cat([kept, b], 1)

    summed, sizes = apply(x * size), apply(size)
    return torch.cat([front, summed / sizes], 1), torch.cat([front_size, sizes], 1)


def eager(model: vit.ViT, x: torch.Tensor, schedule: list[int], proportional: bool = True) -> Any:
    distilled = model.pool == "dist"

    def reduce(x: Any, size: Any, q: Any, k: Any, v: Any, block: int) -> Any:
        r = min(schedule[block], (x.shape[1] - model.prefix) // 2)
        return (x, size) if r == 0 else merge(x, size, k.mean(1), r, model.prefix, distilled)

    return model.compressed(x, reduce, proportional)


@pytest.mark.parametrize(("kind", "dynamic"), [("fused", True), ("fused", False), ("split", True), ("softmax", True)])
def test_it_is_the_reference(kind: str, dynamic: bool) -> None:
    model = vit.model(kind=kind)
    after = vit.applied(ToMe(r=3), dynamic, kind=kind)
    want, _ = eager(model, vit.images(2), [3, 3, 3])
    torch.testing.assert_close(after(vit.images(2))[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"prefix": 2, "pool": "dist"}, {"prefix": 5}, {"prefix": 0, "pool": "mean"}, {"prefix": 1, "pool": "mean"}],
)
def test_prefixes_and_pooling_are_those_of_the_reference(options: dict[str, Any]) -> None:
    model, proportional = vit.model(**options), options["prefix"] != 5
    after = vit.applied(ToMe(r=2, proportional=proportional), **options)
    want, _ = eager(model, vit.images(), [2, 2, 2], proportional)
    torch.testing.assert_close(after(vit.images())[0], want, rtol=1e-5, atol=1e-5)


def test_nothing_to_merge_is_the_same_graph() -> None:
    program = vit.exported()
    assert ToMe(r=0).run(program, Context()) is program
    assert ToMe(r=0, schedule=(0, 0, 0)).run(program, Context()) is program
    assert ToMe(r=5).weaken(0.0).run(program, Context()) is program


def test_sizes_sum_to_the_patches_in_every_layer() -> None:
    after = vit.applied(ToMe(schedule=(4, 3, 2), class_rows=False))
    found = vit.sizes_of(after, vit.images())
    assert [s.shape[1] for s in found] == [13, 10, 8]
    for size in found:
        assert torch.equal(size.sum(1), torch.full((3, 1), 17.0)) and torch.equal(size, size.round())


@pytest.mark.parametrize("options", [{}, {"prefix": 2, "pool": "dist"}, {"prefix": 5}])
def test_prefix_rows_are_bit_identical(options: dict[str, Any]) -> None:
    after = vit.applied(ToMe(r=2, proportional=options.get("prefix") != 5), **options)
    prefix = options.get("prefix", 1)
    for node in [n for n in after.graph.nodes if is_call(n, tome_merge)]:
        before, (behind, sizes) = vit.values(after, vit.images(), [node.args[0].name, node.name])
        assert torch.equal(behind[:, :prefix], before[:, :prefix]) and bool((sizes[:, :prefix] == 1).all())
        assert not torch.equal(behind[:, prefix:], before[:, prefix : behind.shape[1]])


def test_a_merged_token_is_the_weighted_mean_of_its_sources() -> None:
    after = vit.applied(ToMe(schedule=(4, 3, 2), class_rows=False))
    for node in [n for n in after.graph.nodes if is_call(n, tome_merge)]:
        x, size, (y, grown) = vit.values(after, vit.images(), [node.args[0].name, node.args[1].name, node.name])
        # What each sample's tokens weigh in all does not change.
        torch.testing.assert_close((y * grown).sum(1), (x * size).sum(1), rtol=1e-5, atol=1e-5)
        assert bool((grown > 1).any())


def test_equal_images_of_a_batch_have_equal_rows() -> None:
    after = vit.applied(ToMe(r=3))
    a, b = vit.images(2)
    out = after(torch.stack([a, b, a, b]))[0]
    assert torch.equal(out[:2], out[2:]) and not torch.equal(out[0], out[1])
    torch.testing.assert_close(after(torch.stack([b]))[0], out[1:2], rtol=1e-5, atol=1e-5)


def test_equal_tokens_lose_nothing_with_proportional_attention() -> None:
    model = vit.model()
    model.position.data.copy_(model.position.data[:, 1:2].clone())
    x = torch.ones(1, 3, 16, 16)
    program = vit.program(model)
    want = program(x)[0]
    torch.testing.assert_close(ToMe(r=4).run(program, Context())(x)[0], want, rtol=1e-5, atol=1e-5)
    changed = ToMe(r=4, proportional=False).run(program, Context())(x)[0]
    assert float((changed - want).abs().max()) > 1e-3


def test_schedules_follow_the_reference() -> None:
    assert block_schedule("tome", (), 13, 0.0, 12) == [13] * 12
    assert block_schedule("tome", (), 8, -1.0, 5) == [16, 12, 8, 4, 0]
    assert block_schedule("tome", (), 8, 1.0, 5) == [0, 4, 8, 12, 16]
    assert counts_after(17, 1, [5, 100, 100]) == [12, 7, 4]


def test_a_schedule_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(EdgecError, match="2 entries for 3 blocks"):
        ToMe(schedule=(1, 2)).run(vit.exported(), Context())


def test_a_second_reduction_is_refused() -> None:
    once = vit.applied(ToMe(r=2))
    context = Context()
    assert ToMe(r=2).run(once, context) is once
    assert "already" in context.skipped[0].reason


def test_the_cost_model_is_the_papers() -> None:
    program = vit.exported(width=16)
    ready = prepare(program, Context(), class_rows=False)
    for after in ([17, 17, 17], [14, 12, 9]):
        arriving = [17, *after[:-1]]
        blocks = sum(formula_macs(n, 16, 0, 0, [m], 2) for n, m in zip(arriving, after, strict=True))
        want = formula_macs(16, 16, 4, 10, [], 2) + blocks
        assert ready.cost.macs(after) == pytest.approx(want)


def test_the_annotation_counts_tokens_and_work() -> None:
    from edgec.cost import program_cost

    program = vit.exported()
    after = vit.applied(ToMe(r=3))
    meta = after.annotations["tokens"]
    assert [(s.block, s.before, s.after) for s in meta.sites] == [(0, 17, 14), (1, 14, 11)]
    assert (meta.macs_before, meta.macs_after) == (program_cost(program).macs, program_cost(after).macs)
    assert meta.macs_after < meta.macs_before
