"""A survey of PyTorch's operators: one small module for each, compiled for this machine and compared with PyTorch.

    python -m benchmarks.core_aten [--only NAME] [--json FILE]

The first table holds every operator that PyTorch calls core (`torch.Tag.core`) but for those of training, of sizes and
of random numbers; the second holds functions that networks call beside them. "right": the compiled code equals PyTorch
to 1e-4; "refused": one line says why; "wrong" and "crashed" are defects.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

TOLERANCE = 1e-4
aten: Any = torch.ops.aten
Case = tuple[Any, ...]
FURTHER: dict[str, list[Case]] = {}


def _rand(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


X, Y, SMALL, POSITIVE = (
    _rand(2, 3, 4),
    _rand(2, 3, 4, seed=1),
    _rand(2, 3, 4, low=-0.9, high=0.9),
    _rand(2, 3, 4, low=0.2),
)
ABOVE = POSITIVE.abs() + 1.0
HALVES = torch.tensor([[-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.0]])
ODD = torch.tensor([[1.0, -math.inf, math.inf, math.nan, 0.0, -0.0]])
I, J = torch.tensor([[5, -3, 0], [7, 2, -8]]), torch.tensor([[2, 2, -3], [-2, 5, 3]])
B, C = torch.tensor([[True, False, True, False]]), torch.tensor([[True, True, False, False]])
MAP, CUBE, LINE = _rand(1, 4, 6, 8), _rand(1, 2, 4, 6, 5), _rand(1, 4, 9)
M, N = _rand(3, 5), _rand(5, 4, seed=2)
SQUARE = _rand(2, 4, 4) + 4 * torch.eye(4)
SPD = SQUARE @ SQUARE.mT
PLACES = torch.tensor([[[0, 2, 1, 1]], [[2, 0, 0, 1]]])

UNARY: dict[str, list[torch.Tensor]] = {
    **dict.fromkeys("abs neg relu sigmoid tanh exp expm1 sin cos tan sinh cosh asinh atan erf".split(), [X]),
    **dict.fromkeys("ceil floor round trunc sign".split(), [HALVES]),
    **dict.fromkeys("asin acos atanh".split(), [SMALL]),
    **dict.fromkeys("sqrt rsqrt log log2 log10 log1p reciprocal".split(), [POSITIVE.abs()]),
    "acosh": [ABOVE],
    **dict.fromkeys("isnan isinf".split(), [ODD]),
    **dict.fromkeys("bitwise_not logical_not".split(), [I, B]),
    **dict.fromkeys("gelu elu leaky_relu hardtanh".split(), [X]),
    **dict.fromkeys("alias clone prod mean argmax argmin any".split(), [X]),
}
# Operators of two tensors, and of a tensor and a number.
BINARY: dict[str, list[Case]] = {
    **dict.fromkeys("add sub mul div eq ne lt le gt ge".split(), [(X, Y), (I, J), (X, X[:, :1])]),
    **dict.fromkeys("fmod remainder".split(), [(X, Y), (I, J)]),
    **dict.fromkeys("bitwise_and bitwise_or bitwise_xor".split(), [(I, J), (B, C)]),
}


def core() -> dict[str, list[Case]]:
    cases: dict[str, list[Case]] = {}
    for name, tensors in UNARY.items():
        cases[f"{name}.default"] = [(getattr(aten, name).default, x) for x in tensors]
    for name, pairs in BINARY.items():
        cases[f"{name}.Tensor"] = [(getattr(aten, name).Tensor, *pair) for pair in pairs]
        run = getattr(aten, name).Scalar
        cases[f"{name}.Scalar"] = [(lambda x, run=run: run(x, 2), x) for x in (X, I)] if "bit" not in name else []
        cases[f"{name}.Scalar"] += [(lambda x, run=run: run(x, -3), I)]
    for name in ("logical_and", "logical_or", "logical_xor"):
        cases[f"{name}.default"] = [(getattr(aten, name).default, B, C), (getattr(aten, name).default, X, Y)]
    for name in ("maximum", "minimum", "atan2"):
        cases[f"{name}.default"] = [(getattr(aten, name).default, X, Y)]
    for name in (
        "amax",
        "amin",
        "sum.dim_IntList",
        "mean.dim",
        "any.dims",
        "any.dim",
        "prod.dim_int",
        "max.dim",
        "min.dim",
    ):
        packet, _, overload = name.partition(".")
        run = getattr(getattr(aten, packet), overload or "default")
        axes: Any = [1] if packet in ("amax", "amin", "sum", "mean") or name == "any.dims" else 1
        cases[f"{packet}.{overload or 'default'}"] = [
            (lambda x, run=run, a=axes: run(x, a), X),
            (lambda x, run=run, a=axes: run(x, a, True), X),
        ]
    more: dict[str, list[Case]] = {
        "argmax.default": [(lambda x: aten.argmax(x, -1), X)],
        "argmin.default": [(lambda x: aten.argmin(x, 1, True), X)],
        "var.correction": [(lambda x: aten.var.correction(x, [1, 2], correction=0), X), (aten.var.correction, X)],
        "var.dim": [(lambda x: aten.var.dim(x, [2], True, True), X)],
        "div.Tensor_mode": [
            (lambda x, y, m=m: aten.div.Tensor_mode(x, y, rounding_mode=m), *p)
            for m in ("floor", "trunc")
            for p in ((X, Y), (I, J))
        ],
        "div.Scalar_mode": [
            (lambda x: aten.div.Scalar_mode(x, -2, rounding_mode="floor"), I),
            (lambda x: aten.div.Scalar_mode(x, 0.3, rounding_mode="trunc"), X),
        ],
        "pow.Tensor_Tensor": [(torch.pow, POSITIVE.abs(), Y)],
        "pow.Tensor_Scalar": [(lambda x: x**3, X), (lambda x: x**2, I), (lambda x: x**-0.5, ABOVE)],
        "pow.Scalar": [(lambda x: 2**x, X)],
        "clamp.default": [(lambda x: x.clamp(-1, 0.5), X), (lambda x: x.clamp(min=1), I)],
        "clamp.Tensor": [(lambda x, y: torch.clamp(x, y, y + 1), X, Y)],
        "softmax": [(lambda x: aten._softmax(x, 1, False), X)],
        "_log_softmax.default": [(lambda x: aten._log_softmax(x, -1, False), X)],
        "_to_copy.default": [
            (lambda x: x.to(torch.int32), HALVES),
            (lambda x: x.to(torch.bool), I),
            (lambda x: x.float(), B),
            (lambda x: x.to(torch.uint8), I.abs()),
        ],
        "addmm.default": [(lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), _rand(4), M, N)],
        "mm.default": [(torch.mm, M, N)],
        "bmm.default": [(torch.bmm, X, Y.mT)],
        "arange.start_step": [(lambda x: x + torch.arange(3, 11, 2), X)],
        "as_strided.default": [(lambda x: (2 * x).as_strided((2, 5), (12, 2), 1), X)],
        "_adaptive_avg_pool2d.default": [(lambda x: F.adaptive_avg_pool2d(x, (4, 3)), MAP)],
        "_adaptive_avg_pool3d.default": [(lambda x: F.adaptive_avg_pool3d(x, (2, 4, 3)), CUBE)],
        "avg_pool2d.default": [
            (lambda x: F.avg_pool2d(x, 3, 2, 1), MAP),
            (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), MAP),
        ],
        "avg_pool3d.default": [
            (lambda x: F.avg_pool3d(x, 2, 2), CUBE),
            (lambda x: F.avg_pool3d(x, 3, 2, 1, True, False), CUBE),
        ],
        "max_pool2d_with_indices.default": [
            (lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), MAP),
            (lambda x: F.max_pool2d(x, 2, ceil_mode=True, dilation=2), MAP),
        ],
        "max_pool3d_with_indices.default": [(lambda x: F.max_pool3d(x, 2, return_indices=True), CUBE)],
        "_cdist_forward.default": [(lambda x, y, p=p: torch.cdist(x, y, p), X, Y) for p in (1.0, 2.0, 3.0, math.inf)],
        "_pdist_forward.default": [(lambda x, p=p: F.pdist(x, p), M) for p in (1.0, 2.0)],
        "_embedding_bag.default": [
            (lambda i, w: F.embedding_bag(i, w, mode="mean"), torch.tensor([[1, 0], [4, 2]]), N)
        ],
        "embedding.default": [(F.embedding, torch.tensor([[1, 0], [4, 2]]), N)],
        "_fft_r2c.default": [(lambda x: torch.view_as_real(torch.fft.rfft(x)), X)],
        "_fft_c2r.default": [(lambda x: torch.fft.irfft(torch.view_as_complex(x)), _rand(2, 5, 2))],
        "_native_batch_norm_legit_no_training.default": [(nn.BatchNorm2d(4).eval(), MAP)],
        "native_layer_norm.default": [(nn.LayerNorm(4), X), (lambda x: F.layer_norm(x, (3, 4)), X)],
        "native_group_norm.default": [(nn.GroupNorm(2, 4), MAP)],
        "native_dropout.default": [(lambda x: F.dropout(x, 0.5, False), X)],
        "cat.default": [
            (lambda x, y: torch.cat([x, y], -1), X, Y),
            (lambda x, i: torch.cat([x, i]), X[0], I[:, :1].expand(2, 4)),
        ],
        "col2im.default": [(lambda x: F.fold(x, (5, 6), 2, padding=1, stride=2), _rand(1, 8, 12))],
        "constant_pad_nd.default": [(lambda x: F.pad(x, (1, 2, -1, 1), value=0.5), X)],
        "convolution.default": [
            (nn.Conv1d(4, 6, 3, 2, 1), LINE),
            (nn.Conv2d(4, 8, 3, groups=2, dilation=2), MAP),
            (nn.Conv3d(2, 3, 2), CUBE),
            (nn.ConvTranspose1d(4, 2, 3, 2), LINE),
            (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2), MAP),
            (nn.ConvTranspose3d(2, 3, 2, 2), CUBE),
        ],
        "copy.default": [(aten.copy.default, X, Y[:1])],
        "cumsum.default": [(lambda x: x.cumsum(1), X), (lambda x: x.cumsum(1), I), (lambda x: x.cumsum(1), B)],
        "diagonal.default": [(lambda x: x.diagonal(1, 1, 2) * 1, X), (lambda x: x.diagonal(-1, 0, 2) + 0, X)],
        "empty.memory_format": [(lambda x: torch.empty(2, 3, 4).copy_(x), X)],
        "expand.default": [(lambda x: x[:1].expand(4, -1, -1) * 1, X)],
        "fill.Scalar": [(lambda x: torch.fill(x, 3) + x, X)],
        "flip.default": [(lambda x: x.flip(0, 2), X)],
        "full.default": [(lambda x: x + torch.full((3, 4), 2.5), X)],
        "full_like.default": [(lambda x: x + torch.full_like(x, 2), X)],
        "gather.default": [(lambda x, i: x.gather(1, i), X, PLACES)],
        "grid_sampler_2d.default": [
            (lambda x, g, m=m, p=p, c=c: F.grid_sample(x, g, m, p, c), MAP, _rand(1, 3, 5, 2))
            for m, p, c in (("bilinear", "zeros", False), ("nearest", "border", True), ("bicubic", "reflection", False))
        ],
        "index.Tensor": [
            (lambda x, i: x[:, i], X, torch.tensor([2, -1])),
            (lambda x, i: x[i, :, i], X, torch.tensor([1, -2])),
            (lambda x, i: x[:, i, i], X, torch.tensor([[1, 2]])),
        ],
        "index_put.default": [
            (lambda x, i: x.index_put((i,), torch.tensor(9.0)), X, torch.tensor([1])),
            (lambda x, m: x.masked_fill(m, 5), X, B),
            (lambda i, j: i.index_put((j,), torch.tensor([[4, 5, 6]])), I, torch.tensor([1])),
        ],
        "index_select.default": [(lambda x, i: x.index_select(1, i), X, torch.tensor([2, 0, 0]))],
        "masked_scatter.default": [(lambda x, m, y: x.masked_scatter(m, y), X, B, Y)],
        "nonzero.default": [(lambda x: x.nonzero(), B)],
        "permute.default": [(lambda x: x.permute(2, 0, 1) * 1, X)],
        **{
            f"reflection_pad{d}d.default": [(lambda x, d=d: F.pad(x, (1, 2) * d, "reflect"), x)]
            for d, x in ((1, LINE), (2, MAP), (3, CUBE))
        },
        **{
            f"replication_pad{d}d.default": [(lambda x, d=d: F.pad(x, (1, 2) * d, "replicate"), x)]
            for d, x in ((2, MAP), (3, CUBE))
        },
        "repeat.default": [(lambda x: x.repeat(2, 1, 3), X)],
        "scalar_tensor.default": [(lambda x: x + aten.scalar_tensor(2.5), X)],
        "scatter.src": [(lambda x, i, y: x.scatter(1, i, y), X, PLACES, Y)],
        "scatter.value": [(lambda x, i: x.scatter(1, i, 0.5), X, PLACES)],
        "scatter_add.default": [(lambda x, i, y: x.scatter_add(1, i, y), X, PLACES, Y)],
        "scatter_reduce.two": [
            (lambda x, i, y, r=r: x.scatter_reduce(1, i, y, r), X, PLACES, Y) for r in ("mean", "amax")
        ],
        "select.int": [(lambda x: x.select(1, -1) * 1, X)],
        "select_scatter.default": [(lambda x, y: x.select_scatter(y, 1, -1), X, Y[:, 0])],
        "slice.Tensor": [(lambda x: x[:, 1:, ::2] * 1, X), (lambda x: x[..., -3:-1] * 1, X)],
        "slice_scatter.default": [(lambda x, y: x.slice_scatter(y, 2, 0, 4, 2), X, Y[..., :2])],
        "sort.default": [(lambda x: x.sort(-1), X), (lambda x: x.sort(1, descending=True), I)],
        "split_with_sizes.default": [(lambda x: x.split([1, 3], 2), X)],
        "squeeze.dim": [(lambda x: x[:, :1].squeeze(1) * 1, X)],
        "topk.default": [(lambda x: x.topk(2, 1), X), (lambda x: x.topk(2, 1, False), X)],
        "unsqueeze.default": [(lambda x: x.unsqueeze(-1) * 1, X)],
        "upsample_bilinear2d.vec": [
            (lambda x, c=c: F.interpolate(x, (9, 5), mode="bilinear", align_corners=c), MAP) for c in (False, True)
        ],
        "upsample_nearest2d.vec": [(lambda x: F.interpolate(x, (9, 5)), MAP)],
        "view.default": [(lambda x: x.view(3, 8) * 1, X)],
        "where.self": [(lambda m, x, y: torch.where(m, x, y), B, X, Y)],
    }
    for name, rows in more.items():
        cases[name] = cases.get(name, []) + rows
    return cases


class Cases(nn.Module):
    """All cases of an operator, each with inputs of its own."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.functions = [case[0] for case in cases]
        self.layers = nn.ModuleList(f for f in self.functions if isinstance(f, nn.Module))
        self.counts = [len(case) - 1 for case in cases]

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        results, start = [], 0
        for function, count in zip(self.functions, self.counts, strict=True):
            results += tree_leaves(function(*inputs[start : start + count]))
            start += count
        return results


def run(cases: list[Case]) -> tuple[str, str]:
    """("right" | "refused" | "wrong" | "crashed", why)."""
    from edgec.bundle import build_bundle
    from edgec.errors import EdgecError
    from edgec.frontend import load_model
    from edgec.lowering.lower import lower
    from edgec.quiet import quiet
    from edgec.targets.device import load_device

    inputs = tuple(x.clone() for case in cases for x in case[1:])
    module, device = Cases(cases).eval(), load_device("host")
    try:
        with torch.no_grad(), quiet():
            want = module(*[x.clone() for x in inputs])
            try:
                exported = torch.export.export(module, inputs)
            except Exception as error:
                return "refused", f"torch.export: {' '.join(str(error).split())[:100]}"
        program = load_model(exported, name="operator")
        with tempfile.TemporaryDirectory() as folder:
            bundle = build_bundle(lower(program, device), device, Path(folder) / "bundle")
            got: Any = bundle.run(*[x.numpy() for x in inputs])
    except EdgecError as error:
        return "refused", str(error)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    got = got if isinstance(got, tuple) else (got,)
    for a, b in zip(got, want, strict=True):
        why = _difference(np.asarray(a), b.numpy())
        if why:
            return "wrong", why
    return "right", ""


def _difference(got: np.ndarray, want: np.ndarray) -> str:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype}{list(got.shape)}, wanted {want.dtype}{list(want.shape)}"
    if want.dtype.kind != "f":
        return "" if np.array_equal(got, want) else f"{got.reshape(-1)[:6]}, wanted {want.reshape(-1)[:6]}"
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
        return "other values are infinite or NaN"
    error = float(np.abs(got - want)[finite].max(initial=0)) / float(np.abs(want[finite]).max(initial=1e-6))
    return "" if error <= TOLERANCE else f"relative error {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, started = [], time.perf_counter()
    for table, cases in (("core", core()), ("further", FURTHER)):
        for name, own in cases.items():
            if options.only is None or options.only in name:
                status, why = run(own)
                rows.append({"table": table, "operator": name, "status": status, "why": why})
                if status != "right":
                    print(f"{status:8} {table:8} {name}: {why}", flush=True)
    for table in ("core", "further"):
        print(table, dict(Counter(r["status"] for r in rows if r["table"] == table)))
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
