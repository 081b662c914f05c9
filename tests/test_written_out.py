"""Operators that import or lowering write out: linear algebra, special functions, histograms, those of other libraries.

All are compiled as one model for this machine and compared with PyTorch, as in test_importing.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from edgec.errors import EdgecError
from edgec.frontend import export_module, load_model
from edgec.importing import linalg, special
from edgec.importing.library import define
from tests.lowering.helpers import compile_host, errors
from tests.test_importing import outputs, rand

for _name in ("torchvision::deform_conv2d", "torchvision::roi_align", "torchvision::nms"):
    define(_name)
define("transformers::grouped_mm_fallback")

SQUARE, PLACES = (1, 3, 3), torch.tensor([[[0, 2, 1, 1]]])


def definite(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT + torch.eye(x.shape[-1])


def deformable(x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    numbers = (2, 1, 1, 2, 1, 1, 2, 2)
    return torch.ops.torchvision.deform_conv2d(x, w, 3 * offset, mask, torch.zeros(6), *numbers, True)


def regions(x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    boxes = torch.cat([boxes[:, :1].round(), 4 * boxes[:, 1:3], 4 * boxes[:, 1:3] + 5 * boxes[:, 3:]], 1)
    run = torch.ops.torchvision.roi_align
    return torch.cat([run(x, boxes, 0.7, 3, 2, 2, False), run(x, boxes, 1.3, 3, 2, 2, True)])


def experts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w, torch.tensor([2, 2, 5], dtype=torch.int32))


class Function(nn.Module):
    """A function of some inputs and, perhaps, weights."""

    def __init__(self, function: Callable[..., Any], *weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.weights)


class Decoder(nn.Module):
    """nn.TransformerDecoder asks whether its mask is a causal one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.triu(torch.full((5, 5), float("-inf")), diagonal=1)
        return self.decoder(x, x.flip(1), tgt_mask=mask)


torch.manual_seed(0)
# name: (function, shapes of its inputs, or tensors that are constants)
CASES: dict[str, tuple[Any, ...]] = {
    "solve": (lambda x, y: torch.linalg.solve(x, y), SQUARE, (1, 3, 2)),
    "cholesky": (lambda x, y: torch.cholesky_solve(y, torch.linalg.cholesky(definite(x))), SQUARE, (1, 3, 2)),
    "special": (lambda x: (torch.lgamma(5 * x), torch.digamma(x.abs() + 0.1), torch.erfinv(x.tanh())), (1, 40)),
    "histc": (lambda x: torch.histc(x, 5, -1, 1), (1, 40)),
    "istft": (lambda x: torch.istft(torch.view_as_complex(x), 16, 4, window=torch.hann_window(16)), (1, 9, 12, 2)),
    "deformable": (deformable, (1, 4, 7, 8), (1, 36, 4, 10), (1, 18, 4, 10), rand(6, 2, 3, 3)),
    "regions": (regions, (2, 3, 8, 9), (5, 5)),
    "experts": (experts, (6, 4), rand(3, 4, 5)),
    "decoder": (Decoder().eval(), (1, 5, 8)),
    "types in a row": (lambda x: torch.cat([x, torch.arange(8).reshape(1, 8)]), (1, 8)),
    "rounded quotient": (lambda x: torch.ops.aten.div.Scalar_mode(x, -0.3, rounding_mode="floor"), (1, 8)),
    "distances of rows": (lambda x: F.pdist(x), (3, 8)),
    "put whole numbers": (
        lambda x: torch.arange(12).reshape(3, 4).index_put((torch.tensor([2, -3]),), (9 * x[0, :4]).to(torch.int64)),
        (1, 8),
    ),
    "masked scatter": (lambda x, y: x.masked_scatter(x > 0.5, y), (2, 8), (2, 8)),
    "a part of the sources": (lambda x, y: x.scatter(1, PLACES, y), (1, 3, 4), (1, 3, 4)),
    "shifts": (
        lambda x: (torch.arange(-3, 40, 7) << torch.arange(7), torch.arange(-400, 300, 100) >> 2, x + 1),
        (1, 2),
    ),
    "NaN": (lambda x: torch.where(x > 0.5, x, math.nan).nanmean(1), (1, 8)),
    "signs": (lambda x: torch.signbit(x - 0.5), (1, 8)),
    "not zero": (lambda x: torch.linalg.vector_norm(x.relu(), 0, 1), (1, 8)),
}


class All(nn.Module):
    """All cases as one model, so that they are compiled together."""

    def __init__(self) -> None:
        super().__init__()
        self.cases = nn.ModuleList(
            case[0] if isinstance(case[0], nn.Module) else Function(case[0], *[v for v in case[1:] if not shape(v)])
            for case in CASES.values()
        )

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        found = iter(inputs)
        given = [[next(found) for v in case[1:] if shape(v)] for case in CASES.values()]
        return [module(*xs) for module, xs in zip(self.cases, given, strict=True)]


def shape(value: Any) -> bool:
    return isinstance(value, tuple)


@pytest.mark.host
@pytest.mark.slow
def test_written_out_operators_equal_pytorch(tmp_path: Path) -> None:
    inputs = tuple(rand(*v) for case in CASES.values() for v in case[1:] if shape(v))
    model = All().eval()
    with torch.no_grad():
        want = model(*inputs)
        program = load_model(export_module(model, inputs, "cases", dynamic=False), name="cases")
    compiled = compile_host(program, tmp_path)
    got = iter(outputs(compiled.bundle.run(*[x.numpy() for x in inputs])))
    for name, expected in zip(CASES, want, strict=True):
        for y in [expected] if isinstance(expected, torch.Tensor) else expected:
            assert errors((next(got),), (y,)) < 2e-5, name
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [c for c in called if "torchvision" in c or "transformers" in c or "cholesky" in c or "istft" in c]


class Outside:
    """What rules ask of the run of a graph, where there is none."""

    def __init__(self) -> None:
        self.node = fx.Graph().call_function(torch.ops.aten.linalg_inv.default)

    def constant(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return make()


def rule(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """What the rule of an operator gives."""
    return linalg.RULES.get(function, special.RULES.get(function))(Outside(), *inputs, **options)  # type: ignore[misc]


@pytest.mark.pure
@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_linear_algebra_in_any_size(n: int, m: int, seed: int) -> None:
    aten = torch.ops.aten
    generator = torch.Generator().manual_seed(seed)
    # Well away from singular, with pivots that are not on the diagonal.
    q = torch.linalg.qr(torch.randn(2, n, n, generator=generator)).Q
    a = q * (1 + torch.rand(2, 1, n, generator=generator))
    b = torch.randn(2, n, m, generator=generator)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(rule(aten.linalg_inv.default, a), torch.linalg.inv(a))
    close(rule(aten.linalg_solve.default, a, b), torch.linalg.solve(a, b))
    close(rule(aten.linalg_solve.default, a, b[..., 0]), torch.linalg.solve(a, b[..., 0]))
    close(rule(aten.linalg_solve.default, a, b.mT, left=False), torch.linalg.solve(a, b.mT, left=False))
    close(rule(aten.linalg_det.default, a), torch.linalg.det(a))
    close(rule(aten.linalg_slogdet.default, a), tuple(torch.linalg.slogdet(a)))
    spd = a @ a.mT
    lower = torch.linalg.cholesky(spd)
    close(rule(aten.logdet.default, spd), torch.logdet(spd))
    close(rule(aten.linalg_cholesky.default, spd), lower)
    close(rule(aten.linalg_cholesky.default, spd, upper=True), lower.mT)
    close(rule(aten.cholesky_solve.default, b, lower), torch.cholesky_solve(b, lower))
    close(rule(aten.cholesky_inverse.default, lower), torch.cholesky_inverse(lower))
    triangle = torch.triu(a) + 2 * torch.eye(n)
    for left in (True, False):
        side = b if left else b.mT
        options: dict[str, bool] = {"upper": True, "left": left, "unitriangular": left}
        want = torch.linalg.solve_triangular(triangle, side, **options)
        close(rule(aten.linalg_solve_triangular.default, triangle, side, **options), want)
    for matrix in (b, b.mT):
        for mode in ("reduced", "complete"):
            close(rule(aten.linalg_qr.default, matrix, mode), tuple(torch.linalg.qr(matrix, mode=mode)))


@pytest.mark.pure
def test_special_functions_over_their_range() -> None:
    aten = torch.ops.aten
    wide = torch.cat([torch.linspace(-9.97, 40, 4001), torch.tensor([1e-20, 1e4, 1e30, math.inf, math.nan, 0.0, -3.0])])
    for name, x in (
        ("lgamma", wide),
        ("digamma", wide[wide.abs() < 1e5]),
        ("erfinv", torch.cat([torch.linspace(-1, 1, 2001), torch.tensor([0.9999999, 1.5, math.nan])])),
        ("special_ndtri", torch.linspace(0.001, 0.999, 999)),
    ):
        operator = getattr(aten, name).default
        got, want = rule(operator, x), operator(x)
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)
    for bins, low, high in ((5, 0, 1), (4, 0, 0), (3, 0.2, 0.4), (10, -2, 2)):
        x = torch.cat([rand(200), torch.tensor([0.0, 0.2, 0.4, 1.0, -2.0, 2.0])])
        assert torch.equal(rule(aten.histc.default, x, bins, low, high), torch.histc(x, bins, low, high))
    assert torch.equal(rule(aten.histc.default, torch.ones(4), 3), torch.histc(torch.ones(4), 3))


@pytest.mark.pure
def test_without_offsets_a_deformable_convolution_is_a_convolution() -> None:
    x, w = rand(2, 4, 7, 8), rand(6, 2, 3, 3)
    zero, one = torch.zeros(2, 36, 4, 10), torch.ones(2, 18, 4, 10)
    got = deformable(x, zero, one, w)
    torch.testing.assert_close(got, F.conv2d(x, w, None, (2, 1), (1, 2), 1, 2), rtol=1e-5, atol=1e-5)
    numbers = (2, 1, 1, 2, 1, 1, 2, 2)
    run = torch.ops.torchvision.deform_conv2d
    torch.testing.assert_close(run(x, w, zero, 0 * one, torch.zeros(6), *numbers, False), got)


@pytest.mark.pure
def test_experts_multiply_their_own_rows() -> None:
    """The rule against what transformers computes: one product per group."""
    x, w, offs = rand(6, 4), rand(3, 4, 5), torch.tensor([2, 2, 5])
    want = torch.zeros(6, 5)
    for group, (start, end) in enumerate(zip([0, 2, 2], offs.tolist())):
        want[start:end] = x[start:end] @ w[group]
    torch.testing.assert_close(torch.ops.transformers.grouped_mm_fallback(x, w, offs), want)


@pytest.mark.pure
def test_a_file_with_operators_of_torchvision_needs_no_torchvision(tmp_path: Path) -> None:
    x, boxes = rand(1, 3, 8, 9), rand(5, 5)
    exported = torch.export.export(Function(regions).eval(), (x, boxes))
    torch.export.save(exported, tmp_path / "regions.pt2")
    program = load_model(tmp_path / "regions.pt2")
    assert errors(program(x, boxes), (regions(x, boxes),)) < 1e-5


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "nms": (
        lambda x: x[torch.ops.torchvision.nms(x, x[:, 0], 0.5)],
        "the number of boxes that nms leaves depends on their values; end the model before it",
    ),
    "adaptive samples": (
        lambda x: torch.ops.torchvision.roi_align(x.reshape(1, 1, 4, 4), x[:, :1].repeat(1, 5), 1.0, 2, 2, 0, False),
        "roi_align takes as many samples as a box is large; give it a sampling_ratio",
    ),
    "a large matrix": (
        lambda x: torch.linalg.inv(x.repeat(9, 9)),
        "a matrix of 36 rows is too large to be written out: more than 32",
    ),
    "random choice": (lambda x: torch.multinomial(x, 2), "multinomial.default gives random values"),
    "unique": (lambda x: torch.unique(x), "depends on the values of its input"),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_out_is_refused_in_one_line(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(EdgecError, match=message) as caught:
        load_model(Function(function).eval(), input_shape=(4, 4), name="model")
    assert "\n" not in str(caught.value)
    assert "test_written_out.py:" in str(caught.value)
