"""Dropping tokens: the chosen ones are those of largest score, in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgec.passbase import Context
from edgec.passes.tokens.drop_tokens import DropTokens
from edgec.program import is_call
from tests.passes.tokens import vit

pytestmark = pytest.mark.pure
SCHEDULE = (4, 3, 2)


@pytest.mark.parametrize(("score", "prefix"), [("class-attention", 1), ("sigma", 2), ("sigma", 1)])
def test_it_is_the_reference(score: str, prefix: int) -> None:
    model = vit.model(prefix=prefix)

    def reduce(x: Any, size: Any, q: Any, k: Any, v: Any, block: int) -> Any:
        found = (q[:, :, :1] @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0].mean(1)
        if score == "sigma":
            found = found * v.transpose(1, 2).flatten(2).norm(dim=-1)
        kept = found[:, prefix:].topk(x.shape[1] - prefix - SCHEDULE[block], dim=1).indices.sort(1).values + prefix
        rows = torch.cat([torch.arange(prefix).expand(len(x), prefix), kept], 1)[..., None]
        return x.gather(1, rows.expand(-1, -1, x.shape[2])), size.gather(1, rows)

    after = DropTokens(schedule=SCHEDULE, score=score).run(vit.exported(prefix=prefix), Context())
    want, _ = model.compressed(vit.images(), reduce)
    torch.testing.assert_close(after(vit.images())[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_random_tokens_depend_on_the_seed_alone(dynamic: bool) -> None:
    program = vit.exported(dynamic)
    a, again, b = (DropTokens(score="random").run(program, Context(seed=s)) for s in (0, 0, 1))
    x = vit.images(2)
    assert torch.equal(a(x)[0], again(x)[0]) and not torch.equal(a(x)[0], b(x)[0])
    for node in [n for n in a.graph.nodes if is_call(n, torch.ops.edgec.token_keep.default)]:
        before, (after, _) = vit.values(a, x, [node.args[0].name, node.name])
        # Every kept row is one that came in, and the class token comes first.
        assert torch.equal(after[:, 0], before[:, 0])
        assert bool((after[:, :, None] == before[:, None]).all(-1).any(-1).all())


def test_models_without_a_class_token_have_random_dropping_only() -> None:
    program, context = vit.exported(prefix=0, pool="mean"), Context()
    assert DropTokens(score="class-attention").run(program, context) is program
    assert "no class token" in context.skipped[0].reason
    after = DropTokens(r=3, score="random").run(program, Context())
    assert [s.after for s in after.annotations["tokens"].sites] == [13, 10, 7]


def test_nothing_to_drop_is_the_same_graph() -> None:
    program = vit.exported()
    assert DropTokens(r=0).run(program, Context()) is program
    assert DropTokens(r=3).weaken(0.0).run(program, Context()) is program
