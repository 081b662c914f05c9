"""The push-down computes less and the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from edgec.cost import program_cost
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.tokens.class_rows import ClassRows
from edgec.program import Program, is_call, shape_of
from edgec.sparsity import Sparsity
from tests.passes.tokens import vit

pytestmark = pytest.mark.pure
aten = torch.ops.aten


def pushed(program: Program) -> tuple[Program, Context]:
    context = Context()
    return ClassRows().run(program, context), context


@pytest.mark.parametrize(
    ("kind", "dynamic", "options"),
    [
        ("fused", True, {}),
        ("fused", False, {}),
        ("split", True, {}),
        ("softmax", True, {}),
        ("fused", True, {"prefix": 2, "pool": "dist"}),
        ("softmax", False, {"prefix": 4}),
    ],
)
def test_the_output_is_equal_and_the_last_block_small(kind: str, dynamic: bool, options: dict) -> None:
    program = vit.exported(dynamic, kind=kind, **options)
    after, context = pushed(program)
    x = vit.images(2)
    torch.testing.assert_close(after(x)[0], program(x)[0], rtol=1e-5, atol=1e-5)
    rows, n, c = 2 if options.get("pool") == "dist" else 1, 16 + options.get("prefix", 1), 16
    # Queries, projection, MLP of ratio 2, and both products of attention.
    saved = (n - rows) * (c * c + c * c + 4 * c * c + 2 * n * c)
    # The cost of a fixed batch is that of all its samples.
    assert program_cost(program).macs - program_cost(after).macs == saved * (1 if dynamic else 2)
    assert not context.skipped


def test_only_the_last_block_is_cut() -> None:
    after, _ = pushed(vit.exported(blocks=4))
    attentions = [n for n in after.graph.nodes if is_call(n, aten.scaled_dot_product_attention.default)]
    assert [shape_of(n)[2] for n in attentions] == [17, 17, 17, 1]
    assert [shape_of(n.args[1])[2] for n in attentions] == [17] * 4


def test_a_mean_over_tokens_needs_all_rows() -> None:
    program = vit.exported(pool="mean")
    after, context = pushed(program)
    assert after is program and context.skipped


def test_a_second_run_finds_nothing() -> None:
    once, _ = pushed(vit.exported())
    twice, _ = pushed(once)
    assert program_cost(twice).macs == program_cost(once).macs
    x = vit.images()
    assert torch.equal(twice(x)[0], once(x)[0])


def test_a_pruned_projection_stays_whole() -> None:
    program = vit.exported(blocks=1)
    (path,) = [p for p in program.weights() if p.endswith("qkv.weight")]
    mask = torch.ones_like(program.weights()[path], dtype=torch.bool)
    program = dataclasses.replace(program, annotations={path: Sparsity("unstructured", (1, 1), mask)})
    after, context = pushed(program)
    assert path in after.weights() and after.annotations[path].mask.shape == mask.shape
    assert any("pruned" in skip.reason for skip in context.skipped)
    torch.testing.assert_close(after(vit.images())[0], program(vit.images())[0], rtol=1e-5, atol=1e-5)
    assert program_cost(after).macs < program_cost(program).macs


class TwoReaders(nn.Module):
    """The token rows are read whole as well: nothing may be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x)
        return self.b(y)[:, 0], y.sum((1, 2))


def test_rows_that_others_read_are_kept() -> None:
    program = load_model(TwoReaders().eval(), input_shape=(1, 5, 6), name="two")
    after, _ = pushed(program)
    x = torch.randn(2, 5, 6)
    for want, got in zip(program(x), after(x), strict=True):
        torch.testing.assert_close(got, want)
    # The first layer serves all five rows, the second one only.
    assert program_cost(after).macs == 5 * 48 + 32
