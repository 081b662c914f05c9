"""`fold-constants`: what weights alone decide is computed once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.reparam.fold_constants import FoldConstants
from edgec.sparsity import Sparsity
from tests.passes.reparam import networks as nets

pytestmark = pytest.mark.pure


def ops(program: object) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]  # type: ignore[attr-defined]


def test_kernels_assembled_in_the_graph_become_weights() -> None:
    before = load_model(nets.DifferenceConv(4).eval(), input_shape=(1, 4, 7, 7))
    after = FoldConstants().run(before, Context())
    assert set(ops(after)) == {"aten.conv2d.default", "aten.add.Tensor", "aten.relu.default"} or all(
        name.startswith(("aten.conv2d", "aten.add", "aten.relu")) for name in ops(after)
    )
    x = torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(x), before(x), rtol=1e-6, atol=1e-6)
    assert FoldConstants().run(after, Context()) is after


def test_weight_normalisation() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))
    before = load_model(nn.Sequential(layer, nn.ReLU()).eval(), input_shape=(1, 3, 8, 8))
    after = FoldConstants().run(before, Context())
    assert len(ops(after)) == 2 < len(ops(before))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(x), before(x), rtol=1e-6, atol=1e-6)


class Expanded(nn.Module):
    """A constant that is cheap to make and large to store."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x * self.row[None, None, :].expand(64, 64, 64))


def test_a_table_that_would_grow_too_much_stays() -> None:
    before = load_model(Expanded().eval(), input_shape=(1, 64, 64, 64))
    after = FoldConstants().run(before, Context())
    assert max(w.numel() for w in after.weights().values()) <= 65536
    x = torch.randn(1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after(x), before(x))


def test_what_a_pruned_weight_feeds_stays_and_is_reported() -> None:
    before = load_model(nets.DifferenceConv(4).eval(), input_shape=(1, 4, 7, 7))
    path = next(p for p, w in before.weights().items() if w.shape == (4, 4, 9))
    masked = before.replace(annotations={path: Sparsity("unstructured", (1, 1), torch.ones(4, 4, 9) > 0)})
    context = Context()
    after = FoldConstants().run(masked, context)
    assert path in after.weights()
    assert any("pruned weight" in s.reason for s in context.skipped)
