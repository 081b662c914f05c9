"""ONNX forms of operators: each against the Program, in ONNX Runtime and where said in ONNX's own evaluator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgec import tokenops  # noqa: F401  (registers the operators)
from edgec.compile import arithmetic
from edgec.data import load_data
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
    found = [ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))]
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
