"""Every rule of the torch-level legalisation: a tiny model through TVM's importer and virtual machine, against torch.

Many of these models compile without the rule as well, to code that is wrong: only the comparison counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.frontend import load_model
from edgec.lowering.legalize import convert_map, legalize, unsupported
from edgec.passbase import Context
from edgec.registry import load_pass
from tests import zoo

pytestmark = pytest.mark.pure

TOLERANCE = 1e-4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=generator(seed)) - 1


class Wrap(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def export(function: Callable[..., Any], *inputs: torch.Tensor) -> torch.export.ExportedProgram:
    module = function if isinstance(function, nn.Module) else Wrap(function)
    with torch.no_grad():
        return torch.export.export(module.eval(), inputs)


def run_tvm(exported: torch.export.ExportedProgram, *inputs: torch.Tensor) -> list[np.ndarray]:
    """Import, compile with TVM's default pipeline for this machine, run in the virtual machine."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    module = from_exported_program(exported, run_ep_decomposition=False, custom_convert_map=convert_map())
    executable = tvm.compile(module, target=tvm.target.Target("llvm"))
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*[tvm.runtime.tensor(x.numpy()) for x in inputs])
    return [
        x.numpy() for x in (result if isinstance(result, (list, tuple)) or hasattr(result, "__len__") else [result])
    ]


def check(function: Callable[..., Any], *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        want = function(*inputs)
    want = list(want) if isinstance(want, (tuple, list)) else [want]
    exported = export(function, *inputs)
    legal = legalize(exported)
    assert unsupported(legal) == []
    got = run_tvm(legal, *inputs)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        b = b.numpy()
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.dtype.kind == "f":
            assert np.abs(a - b).max() <= TOLERANCE * max(np.abs(b).max(), 1e-6)
        else:
            np.testing.assert_array_equal(a, b)


INDEX = torch.tensor([[0, -1], [2, -3]])
X = rand(2, 5, 6)
IMAGE = rand(1, 3, 6, 5)

SELECTION: dict[str, tuple[Callable[..., Any], ...]] = {}

CASES: dict[str, tuple[Any, ...]] = {
    "select negative": (lambda x: x[:, -1], X),
    "select negative of the last axis": (lambda x: x.select(-1, -2), X),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1]), X),
    "index with negative entries": (lambda x: x[:, INDEX[0]], X),
    "index with a list": (lambda x: x[:, [-1, 0]], X),
    "index computed": (lambda x, i: x[i], X, torch.tensor([-1, 0, -2])),
    "index of two axes": (lambda x: x[torch.tensor([0, -1]), torch.tensor([-2, 3])], X),
    "index behind a full slice": (lambda x: x[:, INDEX, INDEX.T], X),
    "index around a slice": (lambda x: x[INDEX.clamp(-1, 1)[:, :1], :, INDEX[:1]], X),
    "index with a mask that is constant": (lambda x: torch.where(x[:, :, :1] > 0, x, -x), X),
    "unfold": (lambda x: F.unfold(x, 2, padding=1), IMAGE),
    "fold": (lambda x: F.fold(F.unfold(x, 3, padding=1), (6, 5), 3, padding=1), IMAGE),
    "grid sample": (
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        IMAGE,
        rand(1, 4, 7, 2, seed=1),
    ),
    "grid sample nearest border": (
        lambda x, g: F.grid_sample(x, g, mode="nearest", padding_mode="border", align_corners=True),
        IMAGE,
        rand(1, 4, 7, 2, seed=2),
    ),
    "floor divide": (lambda x: (8 * x) // 3, X),
    "divide rounding down": (lambda x: torch.div(8 * x, 3, rounding_mode="floor"), X),
    "divide rounding to zero": (lambda x: torch.div(8 * x, 3, rounding_mode="trunc"), X),
    "floor divide tensors": (lambda x, y: torch.floor_divide(8 * x, y), X, rand(2, 5, 6, seed=3)),
    "integer division": (lambda x: (torch.arange(6) // 4) + 0 * x.long(), X),
    "remainder": (lambda x: torch.remainder(8 * x, 3), X),
    "amax": (lambda x: x.amax((0, 2)), X),
    "amin": (lambda x: x.amin(-1, keepdim=True), X),
    "amax of everything": (lambda x: x.amax(), X),
    "max and argmax": (lambda x: x.max(1), X),
    "cdist 1": (lambda a, b: torch.cdist(a, b, 1), X, rand(2, 3, 6, seed=4)),
    "cdist 2": (lambda a, b: torch.cdist(a, b), X, rand(2, 3, 6, seed=4)),
    "cdist inf": (lambda a, b: torch.cdist(a, b, float("inf")), X, rand(2, 3, 6, seed=4)),
    "any": (lambda x: (x > 0.9).any(1), X),
    "any of everything": (lambda x: (x > 0.9).any(), X),
    "any of two axes": (lambda x: (x > 0.9).any((0, 2)), X),
    "all": (lambda x: (x > -0.9).all(-1), X),
    "bool cumsum": (lambda x: (x > 0).cumsum(1), X),
    "float cumsum": (lambda x: x.cumsum(-1), X),
    "fake quantize": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.03, 5, -20, 20), X),
    "fake quantize per channel": (
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.full((5,), 0.03), torch.zeros(5, dtype=torch.int32), 1, -20, 20
        ),
        X,
    ),
    "scatter reduce sum": (
        lambda x, s, i: x.scatter_reduce(1, i[..., None].expand(-1, -1, 6), s, "sum"),
        X,
        rand(2, 3, 6, seed=5),
        torch.tensor([[0, 4, 0], [2, 2, 2]]),
    ),
    "scatter reduce mean": (
        lambda x, s, i: x.scatter_reduce(1, i[..., None].expand(-1, -1, 6), s, "mean"),
        X,
        rand(2, 3, 6, seed=5),
        torch.tensor([[0, 4, 0], [2, 2, 2]]),
    ),
    "scatter reduce mean without self": (
        lambda x, s, i: x.scatter_reduce(1, i[..., None].expand(-1, -1, 6), s, "mean", include_self=False),
        X,
        rand(2, 3, 6, seed=5),
        torch.tensor([[0, 4, 0], [2, 2, 2]]),
    ),
    "scatter reduce with an index per element": (
        lambda x, s, i: x.scatter_reduce(1, i, s, "sum"),
        X,
        rand(2, 3, 6, seed=5),
        torch.randint(0, 5, (2, 3, 6), generator=generator()),
    ),
}

Q, K, V = (rand(2, 3, 5, 4, seed=s) for s in (1, 2, 3))
FLAGS = rand(5, 5, seed=4) > -0.3
EMPTY_ROW = torch.ones(5, 5, dtype=torch.bool)
EMPTY_ROW[2] = False

ATTENTION: dict[str, tuple[Any, ...]] = {
    "plain": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), Q, K, V),
    "scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.7), Q, K, V),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), Q, K, V),
    "causal, longer keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :3], k, v, is_causal=True),
        Q,
        K,
        V,
    ),
    "boolean mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=FLAGS), Q, K, V),
    "boolean mask with an empty row": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=EMPTY_ROW),
        Q,
        K,
        V,
    ),
    "boolean mask per head": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > 0),
        Q,
        K,
        V,
        rand(2, 3, 5, 5, seed=6),
    ),
    "float mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        Q,
        K,
        V,
        rand(1, 1, 5, 5, seed=6),
    ),
    "float mask of rank 2": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        Q,
        K,
        V,
        rand(5, 5, seed=6),
    ),
    "rank 3": (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), Q, K, V),
    "rank 2": (lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), Q, K, V),
    "rank 5": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]),
        Q,
        K,
        V,
    ),
    "rank 5, boolean mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=FLAGS),
        Q,
        K,
        V,
    ),
    "rank 5, mask per batch": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=m),
        Q,
        K,
        V,
        rand(2, 1, 1, 5, 5, seed=6),
    ),
    "keys of another length": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :2], k, v), Q, K, V),
    "values of another width": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :3]),
        Q,
        K,
        V,
    ),
    "grouped queries": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        Q,
        K,
        V,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    check(*CASES[name])


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    check(*ATTENTION[name])


# -- what legalisation leaves alone ------------------------------------------------------------------------------------


def called(exported: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(str(n.target) for n in exported.graph.nodes if n.op == "call_function")


def test_operators_of_edgec_pass_through() -> None:
    context = Context(calibration=zoo.calibration("residual"))
    folded = load_pass("fold-bn")().run(zoo.program("residual"), context)
    exported = load_pass("quantize-int8")().run(folded, context).export(batch=1)
    ours = {name: n for name, n in called(exported).items() if name.startswith("edgec.")}
    assert ours["edgec.qconv2d.default"] == 4
    legal = called(legalize(exported))
    assert {name: n for name, n in legal.items() if name.startswith("edgec.")} == ours


def test_composite_operators_that_import_well_are_kept_whole() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(F.gelu(x), (6,), torch.ones(6), torch.zeros(6))
        return F.hardswish(F.softmax(F.silu(x), -1))

    legal = called(legalize(export(model, X)))
    kept = ("layer_norm", "gelu", "hardswish", "silu", "softmax")
    assert all(any(f"aten.{name}." in target or f"aten._{name}." in target for target in legal) for name in kept)


def test_expansions_to_the_same_shape_are_dropped() -> None:
    """They would be copies: batched matrix products are full of them."""
    core = legalize(export(lambda x, y: x @ y.expand(2, 3, 4), rand(2, 5, 3), rand(1, 3, 4)))
    (expand,) = [n for n in core.graph.nodes if "expand" in str(n.target)]
    assert expand.meta["val"].shape == (2, 3, 4) and expand.args[0].meta["val"].shape == (1, 3, 4)
    again = legalize(export(lambda x: x.expand(2, 5), rand(2, 5)))
    assert not [n for n in again.graph.nodes if n.op == "call_function"]


def test_the_exported_program_is_not_edited() -> None:
    exported = export(lambda x: x[:, -1] + torch.add(x, x, alpha=2).amax(), X)
    text = str(exported.graph)
    legalize(exported)
    assert str(exported.graph) == text


def test_all_unsupported_operators_are_reported_at_once_with_their_places() -> None:
    class Middle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.median(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Middle(), nn.Identity()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](x) + torch.i0(x)

    program = load_model(torch.export.export(Model(), (X,)), name="net")
    found = unsupported(legalize(program.export()))
    assert [(u.op, u.layer) for u in found] == [("aten.median.default", "blocks.0"), ("aten.i0.default", "i0")]
    assert all(re.search(r"test_legalize\.py:\d+$", u.source) for u in found)
    assert "give it an axis" in str(found[0])
