"""Token reduction in compiled models: which kernels run, that keys and sizes are read in place, and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec import tokenops as tokenops
from edgec.bundle import build_bundle
from edgec.cost import program_cost
from edgec.data import load_data
from edgec.lowering.lower import lower
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.targets.device import load_device
from tests.lowering.helpers import Stages, compile_host, errors, load, operators, samples
from tests.targets.kernel_runner import require

edgec = torch.ops.edgec
TOKENS = (1, 21, 24)
HEADS, DEPTH = 3, 8


class Reducing(nn.Module):
    """Two transformer blocks; `reduce(x, size, q, k)` stands between attention and MLP of both."""

    ones: torch.Tensor

    def __init__(self, reduce: Any) -> None:
        super().__init__()
        self.reduce = reduce
        self.norms = nn.ModuleList([nn.LayerNorm(24) for _ in range(4)])
        self.qkvs = nn.ModuleList([nn.Linear(24, 72) for _ in range(2)])
        self.projections = nn.ModuleList([nn.Linear(24, 24) for _ in range(2)])
        self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(2)])
        self.head = nn.Linear(24, 5)
        self.register_buffer("ones", torch.ones(1, 21, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.ones.expand(x.shape[0], -1, -1)
        for i in range(2):
            b, n, c = x.shape
            parts = self.qkvs[i](self.norms[2 * i](x)).reshape(b, n, 3, HEADS, DEPTH)
            q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
            mask = size.log().transpose(1, 2).unsqueeze(1) if i else None
            y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, c)
            x = x + self.projections[i](y)
            x, size = self.reduce(x, size, q, k)
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


def tome(x: Any, size: Any, q: Any, k: Any) -> Any:
    return edgec.tome_merge(x, size, k.mean(1), 5, 1, False)


def diffrate(x: Any, size: Any, q: Any, k: Any) -> Any:
    n = x.shape[1]
    return edgec.token_reduce(x, size, edgec.class_score(q, k, size, 0.3, 1), 1, n - 2, n - 5, False, False)


def weighted(x: Any, size: Any, q: Any, k: Any) -> Any:
    n = x.shape[1]
    return edgec.token_reduce(x, size, edgec.class_score(q, k, None, 0.3, 1), 1, n - 2, n - 5, True, True)


def drop(x: Any, size: Any, q: Any, k: Any) -> Any:
    return edgec.token_keep(x, size, edgec.class_score(q, k, None, 0.3, 1), 1, x.shape[1] - 6)


def by_tokens(x: Any, size: Any, q: Any, k: Any) -> Any:
    """Another metric than keys, and scores from elsewhere."""
    x, size = edgec.tome_merge(x, size, x, 3, 1, False)
    return edgec.token_keep(x, size, x[:, 1:].abs().mean(2), 1, x.shape[1] - 2)


# What a block adds to the kernels, and the multiply-accumulates that choosing costs in both blocks.
CASES = {
    tome: ({"tome_slots": 2, "merge_tokens": 2, "merge_sizes": 1}, 11 * 10 * 8 + 8 * 8 * 8),
    diffrate: (
        {"class_scores": 2, "reduce_slots": 2, "merge_tokens": 2, "merge_sizes": 1},
        (21 + 16) * 24 + 3 * (15 + 10) * 24,
    ),
    weighted: (
        {"class_scores": 2, "reduce_slots": 2, "merge_tokens": 2, "merge_sizes": 1},
        (21 + 16) * 24 + 3 * (15 + 10) * 24,
    ),
    drop: ({"class_scores": 2, "reduce_slots": 2, "merge_tokens": 2, "merge_sizes": 1}, (21 + 15) * 24),
}


@pytest.mark.pure
@pytest.mark.parametrize("reduce", CASES, ids=lambda f: f.__name__)
def test_regions(reduce: Any) -> None:
    """Keys are read where the projection left them; the last sizes, which nobody reads, are not computed."""
    found = operators(Stages(load(Reducing(reduce), TOKENS)).layout)
    expected, _ = CASES[reduce]
    for name, count in {**expected, "log_sizes": 1, "attention": 2}.items():
        assert found[name] == count, (name, found)
    assert not {"mean", "log", "tome_merge", "token_reduce", "token_keep", "class_score", "permute"} & set(found)


@pytest.mark.host
@pytest.mark.parametrize("reduce", [tome, diffrate, drop, by_tokens], ids=lambda f: f.__name__)
def test_compiled_equals_pytorch(reduce: Any, tmp_path: Path) -> None:
    program = load(Reducing(reduce), TOKENS)
    compiled = compile_host(program, tmp_path)
    assert max(compiled.error(seed) for seed in range(1, 6)) < 1e-5
    steps = {step.op for step in compiled.lowered.plan.steps if step.tuned}
    assert "merge_tokens_f32" in steps
    if reduce in CASES:
        slow = [s for s in compiled.lowered.fallbacks if "strided_slice" not in s.reason]
        assert not slow, slow
        macs = sum(s.macs for s in compiled.lowered.plan.steps if s.op.startswith(("tome", "reduce", "class")))
        assert macs == CASES[reduce][1]
        assert compiled.lowered.plan.macs == program_cost(program).macs


@pytest.mark.qemu
def test_compiled_for_arm(tmp_path: Path) -> None:
    device = load_device("cortex-a72")
    require(device)
    for reduce in (tome, diffrate):
        program = load(Reducing(reduce), TOKENS)
        bundle = build_bundle(lower(program, device), device, tmp_path / reduce.__name__)
        inputs = samples(program)
        got = torch.from_numpy(np.array(bundle.run(*[x.numpy() for x in inputs])))
        assert errors((got.reshape(1, 5),), program(*inputs)) < 1e-5


@pytest.mark.host
def test_reduction_between_integer_layers(tmp_path: Path) -> None:
    """Linear layers become integer; tokens are chosen and merged in float32, by the same rule as before."""
    program = load(Reducing(tome), TOKENS)
    data = load_data(np.random.default_rng(0).uniform(-1, 1, (16, 21, 24)).astype(np.float32), program.inputs)
    for step in Pipeline.parse("quantize-int8"):
        program = step.run(program, Context(calibration=data))
    found = operators(program.module)
    assert found["tome_merge"] == 2
    # What tokens are chosen by is no reason to round queries, keys and values.
    assert not {"qmean", "qavg_pool2d", "dequantize"} & set(found), found
    compiled = compile_host(program, tmp_path)
    assert any(step.op.endswith("_i8") for step in compiled.lowered.plan.steps)
    assert compiled.error() < 1e-5
