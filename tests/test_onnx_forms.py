"""ONNX forms of operators: each against the Program, in ONNX Runtime and where said in ONNX's own evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgec import tokenops  # noqa: F401  (registers the operators)
from edgec.compile import arithmetic
from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.onnx.check import agrees, compare, run_onnx
from edgec.onnx.writer import to_onnx
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program
from edgec.targets.device import load_device
from tests.passes.tokens import vit

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def exported(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool = True) -> Program:
    module = function if isinstance(function, nn.Module) else Call(function)
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = tuple(x[:2] for x in inputs) if dynamic else inputs
    shapes = ((dict.fromkeys([0], batch),) * len(inputs),) if isinstance(module, Call) else ({0: batch},) * len(inputs)
    made = torch.export.export(module.eval(), example, dynamic_shapes=shapes if dynamic else None)
    return Program.from_exported(made, "m")


def engines(program: Program, inputs: tuple[torch.Tensor, ...]) -> list[list[np.ndarray]]:
    """Results of ONNX's evaluator and of ONNX Runtime, where that is installed."""
    model, arrays = to_onnx(program), [x.numpy() for x in inputs]
    names = [spec.name for spec in model.graph.input]
    evaluated: Any = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    found: list[list[np.ndarray]] = [evaluated]
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return found
    return [*found, run_onnx(model.SerializeToString(), arrays)]


# -- token reduction ---------------------------------------------------------------------------------------------------

# Few different values: many similarities and scores are equal.
SHAPES = (3, 12, 5)
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "tome": lambda x, s, m, score: edgec.tome_merge(x, s, m, 4, 1, False),
    "tome_without_prefix": lambda x, s, m, score: edgec.tome_merge(x, s, m, 6, 0, False),
    "tome_distilled": lambda x, s, m, score: edgec.tome_merge(x, s, m, 3, 2, True),
    "tome_registers": lambda x, s, m, score: edgec.tome_merge(x, s, m, 2, 3, False),
    "tome_of_none": lambda x, s, m, score: edgec.tome_merge(x, s, m, 0, 1, False),
    "reduce": lambda x, s, m, score: edgec.token_reduce(x, s, score, 1, 9, 6, False, False),
    "reduce_weighted": lambda x, s, m, score: edgec.token_reduce(x, s, score, 1, 10, 4, True, False),
    "reduce_true_size": lambda x, s, m, score: edgec.token_reduce(x, s, score, 1, 12, 7, True, True),
    "reduce_pruning_only": lambda x, s, m, score: edgec.token_reduce(x, s, score, 1, 8, 8, False, False),
    "keep": lambda x, s, m, score: edgec.token_keep(x, s, score, 1, 5),
    "keep_without_prefix": lambda x, s, m, score: edgec.token_keep(x, s, score[:, :1] + x[:, :, 0], 0, 3),
}


def tokens(case: str, seed: int) -> tuple[torch.Tensor, ...]:
    """x, size, metric, score: integers of a small range (ties), or floats, or those with NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        if case == "ties":
            return torch.randint(-1, 2, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    x, metric, score = drawn(*SHAPES), drawn(3, 12, 4), drawn(3, 11)
    size = torch.randint(1, 5, (3, 12, 1), generator=generator).float()
    if case == "not numbers":
        metric[0, 3], metric[1, 4:8], score[0, 2], score[1, :6] = torch.nan, torch.inf, torch.nan, -torch.inf
        x[2, 5, 1] = torch.nan
    return x, size, metric, score


@pytest.mark.parametrize("name", REDUCTIONS)
def test_token_reduction(name: str) -> None:
    program = exported(REDUCTIONS[name], *tokens("ties", 0))
    assert program.dynamic_batch
    assert to_onnx(program).graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for seed, case in enumerate(("ties", "ties", "floats", "not numbers")):
        inputs = tokens(case, seed)
        wanted = [y.numpy() for y in program(*inputs)]
        for got in engines(program, inputs):
            for a, b in zip(got, wanted, strict=True):
                assert a.shape == b.shape
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_of_the_class_token(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(3, 2, 7, 4, generator=generator) for _ in range(2))
    size = torch.randint(1, 5, (3, 7, 1), generator=generator).float()
    program = exported(
        lambda q, k, s: edgec.class_score(q, k, s if weighted else None, 0.5, 2) + s[:, 2:, 0], q, k, size
    )
    wanted = program(q, k, size)[0].numpy()
    for got in engines(program, (q, k, size)):
        np.testing.assert_allclose(got[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("passes", "after"),
    [
        ("tome{r=4}", ""),
        ("diffrate{macs=0.6}", ""),
        ("drop-tokens", ""),
        ("tome{r=4}", "quantize-int8"),
        ("diffrate{macs=0.6}", "cast-fp16"),
    ],
)
def test_vision_transformers_with_fewer_tokens(passes: str, after: str) -> None:
    pytest.importorskip("onnxruntime")
    program, data = vit.exported(), vit.images(4)
    context = Context(
        device=load_device("cortex-a76"), calibration=load_data(data.numpy(), program.inputs), teacher=program, seed=0
    )
    for step in Pipeline.of(", ".join(p for p in (passes, after) if p)).passes:
        program = step.run(program, context)
    assert any(str(n.target).startswith("edgec.to") for n in program.graph.nodes)
    inputs = [vit.images(3).numpy()]
    found = compare(program, inputs, run_onnx(to_onnx(program).SerializeToString(), inputs))
    assert not agrees(found, arithmetic(program)), found
    if not after:
        assert found["relative_error"] < 1e-5


# -- other operators ---------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(7))


ROW, ROWS, IMAGE, VOLUME = drawn(3, 12), drawn(3, 4, 12), drawn(3, 4, 6, 8), drawn(3, 2, 4, 6, 6)
TIES = (2 * ROW).round()
SPECIAL = torch.cat([ROW, torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan]]).expand(3, 5)], 1)
PLACES = torch.tensor([1, 5, 1])

# Functions of the same inputs, which become one model.
GROUPS: dict[str, tuple[tuple[torch.Tensor, ...], list[Callable[..., Any]]]] = {
    "scatter": (
        (ROW, whole(12, 3, 7), drawn(3, 9)),
        [
            lambda x, i, s: x.scatter(1, i[:, :1], 2.5),
            lambda x, i, s: x.scatter_add(1, i, s),
            lambda x, i, s: x.scatter_reduce(1, i, s, "mean"),
            lambda x, i, s: x.scatter_reduce(1, i, s, "mean", include_self=False),
            lambda x, i, s: x.scatter_reduce(1, i, s, "amax", include_self=False),
            lambda x, i, s: x.scatter_reduce(1, i, s, "amin"),
            lambda x, i, s: x.scatter_reduce(1, i, s, "prod"),
            lambda x, i, s: x.scatter_reduce(1, i, s, "sum", include_self=False),
            lambda x, i, s: x.index_add(1, PLACES, s[:, :3], alpha=2),
            lambda x, i, s: x.index_copy(1, PLACES[:2], s[:, :2]),
            lambda x, i, s: torch.ops.aten.index_put(x, [x > 0], torch.tensor(2.0)),
            lambda x, i, s: torch.ops.aten.index_put(x, [None, PLACES], s[:, :3], True),
        ],
    ),
    "index": (
        (IMAGE, whole(4, 3, 2)),
        [
            lambda x, i: x[:, :, torch.tensor([[0, 1], [2, 3]]), torch.tensor([1, 2])],
            lambda x, i: x[:, PLACES[:2] % 4, :, PLACES[:2]],
            lambda x, i: x[torch.arange(x.shape[0])[:, None], i],
            lambda x, i: x.diagonal(1, 2, 3),
            lambda x, i: torch.diagonal_scatter(x, torch.zeros_like(x[:, :, :, 0]), 0, 2, 3),
            lambda x, i: torch.slice_scatter(x, torch.zeros_like(x[:, :, :, :4]), 3, 1, 8, 2),
            lambda x, i: torch.slice_scatter(x, torch.zeros_like(x[:, :, :, :4]), 3, 2, 6),
            lambda x, i: torch.select_scatter(x, x[:, :, 0], 2, 3),
            lambda x, i: torch.ops.aten.index_put(x, [None, None, PLACES, PLACES], x[:, :, 0, :3]),
            lambda x, i: torch.arange(x.shape[0])[:, None, None, None] + x,
        ],
    ),
    "special values": (
        (SPECIAL,),
        [
            torch.isfinite,
            torch.signbit,
            lambda x: torch.fmax(x, x.flip(1)),
            lambda x: torch.logaddexp(x[:, :12], x[:, :12].flip(1)),
            lambda x: torch.trunc(x[:, :14]),
        ],
    ),
    "elementwise": (
        (ROW,),
        [
            lambda x: x.abs().log2(),
            lambda x: x.abs().log10(),
            lambda x: torch.atan2(x, x.flip(1)),
            lambda x: torch.atan2(x.relu(), x.flip(1).relu()),
            lambda x: torch.fmod(x, 0.7),
            lambda x: x.round(decimals=1),
            lambda x: (30 * x).round(decimals=-1),
            lambda x: F.logsigmoid(30 * x),
            lambda x: F.elu(x, 0.5),
            lambda x: F.softplus(x, 2.0, 3.0),
            lambda x: (x > 0) ^ (x > 1),
            lambda x: torch.asinh(x),
            lambda x: F.prelu(x, x[0, :1].abs()),
        ],
    ),
    "bits": ((whole(50, 3, 6),), [lambda i: i & 5, lambda i: i | 5, lambda i: i ^ 5, lambda i: torch.fmod(i - 9, 5)]),
    "norms": (
        (ROWS,),
        [
            lambda x: F.normalize(x, dim=1),
            lambda x: x.norm(3, 1),
            lambda x: torch.linalg.vector_norm(x, float("-inf"), 1),
            lambda x: torch.linalg.vector_norm(x, 0, 2, keepdim=True),
            lambda x: x - x.max(),
            lambda x: torch.histc(2 * x, 5, -2, 2) + x[:, 0, :5],
            lambda x: torch.cat([torch.zeros(0), x], 2),
            lambda x: torch.std_mean(x, 1),
            lambda x: torch.aminmax(x, dim=1),
            lambda x: F.cosine_similarity(x, x.flip(1)),
        ],
    ),
    "order": (
        (TIES,),
        [lambda x: torch.sort(x, stable=True, dim=1, descending=True), lambda x: x.cummax(1), lambda x: x.cumsum(1)],
    ),
    "resizing": (
        (IMAGE,),
        [
            lambda x: F.interpolate(x, size=(9, 11), mode="bicubic", align_corners=True),
            lambda x: F.interpolate(x, size=(3, 5), mode="bicubic"),
            lambda x: F.interpolate(x, size=(9, 11), mode="nearest-exact"),
            lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
        ],
    ),
    "windows": (
        (IMAGE,),
        [
            lambda x: F.unfold(x, 3, padding=1, stride=2, dilation=2),
            lambda x: F.fold(F.unfold(x, (3, 2), padding=1), (6, 8), (3, 2), padding=1),
            lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
            lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False, divisor_override=5),
            lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
            lambda x: F.adaptive_max_pool2d(x, (4, 5)),
        ],
    ),
    "volumes": (
        (VOLUME,),
        [lambda x: F.interpolate(x, size=(5, 7, 9), mode="trilinear"), lambda x: F.adaptive_avg_pool3d(x, (2, 4, 4))],
    ),
    "bags": (
        (whole(12, 3, 7),),
        [
            lambda i: F.embedding_bag(i, torch.arange(24.0).reshape(12, 2), mode="mean", padding_idx=3),
            lambda i: F.embedding_bag(i, torch.arange(24.0).reshape(12, 2), mode="max"),
            lambda i: F.embedding_bag(i, torch.arange(24.0).reshape(12, 2), mode="sum"),
        ],
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_operators(name: str) -> None:
    pytest.importorskip("onnxruntime")
    inputs, functions = GROUPS[name]
    program = exported(lambda *x: [f(*x) for f in functions], *inputs)
    assert program.dynamic_batch
    # Three samples of a Program that was exported with two.
    got = run_onnx(to_onnx(program).SerializeToString(), [x.numpy() for x in inputs])
    for place, (a, b) in enumerate(zip(got, program(*inputs), strict=True)):
        assert (a.shape, str(a.dtype)) == (tuple(b.shape), str(b.dtype).removeprefix("torch.")), place
        np.testing.assert_allclose(a, b.numpy(), rtol=2e-6, atol=2e-6, err_msg=str(place))


class PerSample(nn.Module):
    """A convolution whose weights are computed, for each sample its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(4, 6 * 4 * 3 * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        weight = self.weights(x.mean((2, 3))).reshape(n * 6, 4, 3, 3)
        y = F.conv2d(x.reshape(1, n * 4, 6, 8), weight, None, (2, 1), (1, 2), (1, 2), n)
        return y.reshape(n, 6, *y.shape[2:])


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True),
    "lstm_projected": lambda: nn.LSTM(6, 5, proj_size=3, batch_first=True),
    "gru": lambda: nn.GRU(6, 5, bidirectional=True, batch_first=True, bias=False),
    "rnn": lambda: nn.RNN(6, 5, nonlinearity="relu", batch_first=True),
}


class States(nn.Module):
    """All results of a recurrent layer; with a state of the first step made of the input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        layer: Any = self.layer
        directions = 2 if layer.bidirectional else 1
        size = layer.proj_size or layer.hidden_size
        count = directions * layer.num_layers
        h, c = (x[:, i, :n].expand(count, -1, -1).contiguous() for i, n in ((0, size), (1, 5)))
        y, states = layer(x, (h, c) if isinstance(layer, nn.LSTM) else h)
        states = states if isinstance(states, tuple) else (states,)
        return y, [s.transpose(0, 1) for s in states], layer(x)[0]


class Sequence(nn.Module):
    """The results of a recurrent layer at all steps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("name", [*RECURRENT, "weights of each sample"])
def test_layers(name: str) -> None:
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = States(RECURRENT[name]()) if name in RECURRENT else PerSample()
    x = drawn(3, 4, 6, 8) if name not in RECURRENT else drawn(3, 7, 6)
    program = load_model(made.eval(), input_shape=(1, *x.shape[1:]))
    assert program.dynamic_batch
    model = to_onnx(program)
    if name in ("lstm", "gru", "rnn"):
        layers = [n for n in model.graph.node if n.op_type == name.upper()]
        assert len(layers) == {"lstm": 8, "gru": 4, "rnn": 2}[name]
        # The product with the input is the layer's own again.
        assert not any(n.op_type in ("Gemm", "MatMul") for n in model.graph.node)
    got = run_onnx(model.SerializeToString(), [x.numpy()])
    for a, b in zip(got, program(x), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)


def test_recurrent_layers_behind_a_quantised_product() -> None:
    """A product that is not a plain linear layer stays, and the layer gets its results."""
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        program = load_model(Sequence(nn.GRU(6, 5, batch_first=True)).eval(), input_shape=(1, 7, 6))
    data = drawn(8, 7, 6)
    context = Context(calibration=load_data(data.numpy(), program.inputs))
    for step in Pipeline.of("quantize-int8").passes:
        program = step.run(program, context)
    assert any("qlinear" in str(n.target) for n in program.graph.nodes)
    found = compare(program, [data.numpy()], run_onnx(to_onnx(program).SerializeToString(), [data.numpy()]))
    assert not agrees(found, arithmetic(program)), found


def test_a_result_that_is_called_like_an_input_gets_a_number() -> None:
    class Same(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y + 1

    model = to_onnx(load_model(Same(), input_shape=(1, 3)))
    assert [v.name for v in model.graph.input] == ["y"]
    assert [v.name for v in model.graph.output] == ["y_2"]


def test_a_definition_for_one_batch_size_is_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken apart must hold for any batch, or the file would be wrong for all but one."""
    rules = {torch.ops.aten.lgamma.default: lambda x: x * torch.ones(int(x.shape[0]), 1)}
    monkeypatch.setattr("edgec.onnx.expand.definitions", lambda: rules)
    program = exported(torch.lgamma, ROW)
    with pytest.raises(EdgecError, match=r"aten\.lgamma\.default of layer lgamma .* one size of the batch only"):
        to_onnx(program)
