"""A survey of the operators that models are made of: each one through legalisation, TVM's importer and virtual machine.

One model per family has all of its operators as outputs, so that a family costs one compilation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from edgec.lowering.legalize import legalize, unsupported
from tests.lowering.test_legalize import IMAGE, TOLERANCE, X, export, rand, run_tvm

pytestmark = [pytest.mark.pure, pytest.mark.slow]

Case = tuple[Any, ...]

# For the layers below.
torch.manual_seed(0)

GRID = rand(1, 3, 4, 5, 3, seed=4)
VOLUME = rand(1, 4, 4, 6, 6)
PART = torch.tensor([[[1, 0], [4, 2]]])

OPERATORS: dict[str, dict[str, Case]] = {
    "running": {
        "cumprod": (lambda x: x.cumprod(1), X),
        "cumprod int": (lambda i: i.cumprod(1), torch.tensor([[3, -2, 5]])),
        "logcumsumexp": (lambda x: x.logcumsumexp(1), X),
        "cummax": (lambda x: torch.cummax(x.round(decimals=1), 1), X),
        "cummin": (lambda x: torch.cummin(x, -1), X),
        "full inf": (lambda x: torch.maximum(x, torch.full((6,), -math.inf)), X),
        "as_strided": (lambda x: (2 * x).as_strided((1, 3, 3, 3, 4, 3), (90, 30, 5, 1, 5, 1)), IMAGE),
        "as_strided offset": (lambda x: torch.as_strided(2 * x, (1, 4, 4), (30, 7, 1), 2), X),
        "scatter of a part": (lambda x, i: x.scatter(1, i, 0.5), X, PART),
        "scatter src of a part": (lambda x, i: x.scatter(2, i, 2 * x), X, PART),
        "scatter prod": (
            lambda x, i: x.scatter_reduce(1, i, x, "prod"),
            X,
            torch.tensor([2, 2, 0, 1, 4] * 12).view(2, 5, 6),
        ),
        "scatter amax": (
            lambda x, i: x.scatter_reduce(1, i, x, "amax", include_self=False),
            X,
            torch.tensor([2, 2, 0, 1, 4] * 12).view(2, 5, 6),
        ),
        "scatter_add int": (
            lambda i: torch.zeros(2, 5, dtype=torch.int64).scatter_add(1, i, i),
            torch.tensor([[1, 4, 1]] * 2),
        ),
        "index_reduce": (
            lambda x, i: x.index_reduce(1, i, x[:, :3] * 2, "amax"),
            X,
            torch.tensor([4, 0, 4]),
        ),
        "shifts": (lambda i: (i << 2, i >> 1), torch.tensor([5, -5, 0])),
        "copysign": (lambda x: torch.copysign(x, x.flip(1)), X),
        "heaviside": (lambda x: torch.heaviside(x, torch.tensor(0.5)), X),
        "angle": (lambda x: x.angle(), X),
        "erfc": (lambda x: torch.special.erfc(x), X),
        "addbmm": (lambda c, a, b: torch.addbmm(c, a, b, beta=0.5), rand(5, 3), X, rand(2, 6, 3, seed=5)),
    },
    "volumes and bags": {
        "grid 3d": (lambda x, g: F.grid_sample(x, 1.2 * g, align_corners=False), VOLUME, GRID),
        "grid 3d border": (
            lambda x, g: F.grid_sample(x, 2 * g, padding_mode="border", align_corners=True),
            VOLUME,
            GRID,
        ),
        "grid 3d reflection": (
            lambda x, g: F.grid_sample(x, 3 * g, padding_mode="reflection", align_corners=False),
            VOLUME,
            GRID,
        ),
        "grid 3d nearest": (lambda x, g: F.grid_sample(x, g, mode="nearest", align_corners=False), VOLUME, GRID),
        "adap 3d": (lambda x: F.adaptive_avg_pool3d(x, (2, 3, 5)), VOLUME),
        "adapmax 3d": (lambda x: F.adaptive_max_pool3d(x, (2, 4, 3), return_indices=True), VOLUME),
        "convt 3d": (nn.ConvTranspose3d(4, 6, 3, (2, 1, 3), 1, output_padding=(1, 0, 2), groups=2), VOLUME),
        "convt 3d dil": (nn.ConvTranspose3d(4, 3, 2, 1, 2, dilation=2), VOLUME),
        "bag sum": (nn.EmbeddingBag(9, 4, mode="sum"), torch.tensor([[1, 8, 0], [3, 3, 2]])),
        "bag mean": (nn.EmbeddingBag(9, 4, mode="mean", padding_idx=3), torch.tensor([[1, 8, 0], [3, 3, 2]])),
        "bag max": (nn.EmbeddingBag(9, 4, mode="max"), torch.tensor([[1, 8, 0], [3, 3, 2]])),
        "bag offsets": (
            lambda i, o: F.embedding_bag(i, torch.eye(9), o, mode="sum"),
            torch.tensor([1, 8, 0, 3]),
            torch.tensor([0, 1, 1]),
        ),
        "bilinear": (nn.Bilinear(6, 5, 4), rand(2, 6), rand(2, 5, seed=1)),
    },
    "arithmetic": {
        "add alpha": (lambda x, y: torch.add(x, y, alpha=2.5), X, rand(2, 5, 6, seed=9)),
        "sub alpha": (lambda x, y: torch.sub(x, y, alpha=2.5), X, rand(2, 5, 6, seed=9)),
        "rsub alpha": (lambda x, y: torch.rsub(x, y, alpha=2.5), X, rand(2, 5, 6, seed=9)),
        "rsub": (lambda x: 1 - x, X),
        "rdiv": (lambda x: 1 / (x + 2), X),
        "rpow": (lambda x: 2**x, X),
        "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.3), X, rand(2, 5, 6, seed=9)),
        "addcdiv": (lambda x, y: torch.addcdiv(x, x, y + 3, value=0.3), X, rand(2, 5, 6, seed=9)),
        "lerp": (lambda x, y: torch.lerp(x, y, 0.3), X, rand(2, 5, 6, seed=9)),
        "addmm": (
            lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2.0),
            rand(4, 5),
            rand(4, 3, seed=1),
            rand(3, 5, seed=2),
        ),
        "baddbmm": (
            lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2.0),
            rand(2, 4, 5),
            rand(2, 4, 3, seed=1),
            rand(2, 3, 5, seed=2),
        ),
        "fmod": (lambda x: torch.fmod(8 * x, 3), X),
        "remainder t": (lambda x, y: torch.remainder(8 * x, y), X, rand(2, 5, 6, seed=9)),
        "pow": (lambda x: x**2, X),
        "pow3": (lambda x: x**3, X),
        "powhalf": (lambda x: x.abs() ** 0.5, X),
        "pow neg": (lambda x: (x.abs() + 1) ** -1.5, X),
        "pow t": (lambda x, y: torch.pow(x.abs() + 0.1, y), X, rand(2, 5, 6, seed=9)),
        "sqrt": (lambda x: x.abs().sqrt(), X),
        "rsqrt": (lambda x: (x.abs() + 0.1).rsqrt(), X),
        "log1p": (lambda x: x.abs().log1p(), X),
        "expm1": (lambda x: x.expm1(), X),
        "erf": (lambda x: torch.erf(2 * x), X),
        "atan2": (lambda x, y: torch.atan2(x, y), X, rand(2, 5, 6, seed=9)),
        "hypot": (lambda x, y: torch.hypot(x, y), X, rand(2, 5, 6, seed=9)),
        "exp2": (lambda x: x.exp2(), X),
        "log2": (lambda x: (x + 2).log2(), X),
        "sinc": (lambda x: torch.sinc(x), X),
        "maximum": (lambda x, y: torch.maximum(x, y), X, rand(2, 5, 6, seed=9)),
        "round": (lambda x: torch.round(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.0]) + 0 * x[0, 0]), X),
        "round dec": (lambda x: torch.round(x, decimals=1), X),
        "frac": (lambda x: torch.frac(5 * x), X),
        "trunc": (lambda x: torch.trunc(5 * x), X),
        "sign": (lambda x: torch.sign(x), X),
        "diff": (lambda x: x.diff(dim=1), X),
        "dist": (lambda x, y: torch.dist(x, y), X, rand(2, 5, 6, seed=9)),
        "pdist": (lambda x: F.pairwise_distance(x, x.flip(1)), X),
        "trapz": (lambda x: torch.trapezoid(x, dim=-1), X),
    },
    "types": {
        "int add float": (lambda x: x + torch.arange(6), X),
        "int*scalar": (lambda x: (torch.arange(6) * 1.5) + x, X),
        "bool mul": (lambda x: (x > 0) * x, X),
        "bool sum": (lambda x: (x > 0).sum(1), X),
        "bool mean": (lambda x: (x > 0).float().mean(), X),
        "int sum": (lambda i: i.sum(1), torch.arange(12).reshape(3, 4).int()),
        "int remainder": (lambda i: i % 3, torch.arange(-6, 6)),
        "int fmod": (lambda i: torch.fmod(i, 3), torch.arange(-6, 6)),
        "int floordiv": (lambda i: i // 4, torch.arange(-6, 6)),
        "int floordiv t": (lambda i: torch.floor_divide(i, torch.tensor([4, -4, 3] * 4)), torch.arange(-6, 6)),
        "int truediv": (lambda i: i / 4, torch.arange(-6, 6)),
        "int divtrunc": (lambda i: torch.div(i, 4, rounding_mode="trunc"), torch.arange(-6, 6)),
        "clamp int": (lambda i: i.clamp(-2, 3), torch.arange(-6, 6)),
        "clamp bound int": (lambda i: i.clamp(max=3), torch.arange(-6, 6)),
        "logical": (lambda x: (x > 0) & ~(x > 0.5) | (x < -0.5), X),
        "xor": (lambda x: (x > 0) ^ (x > 0.5), X),
        "logical_not": (lambda x: torch.logical_not(x > 0), X),
        "bitwise_not": (lambda i: ~i, torch.arange(-6, 6)),
        "isnan log": (lambda x: torch.isnan(x.log()), X),
        "isinf log": (lambda x: torch.isinf((x * 0).log()), X),
        "nan_to_num": (lambda x: torch.nan_to_num(x.log()), X),
        "where scalar": (lambda x: torch.where(x > 0, 1.0, x), X),
        "where int": (lambda x: torch.where(x > 0, 1, 0), X),
        "isclose": (lambda x: torch.isclose(x, x + 1e-9), X),
        "nonzero count": (lambda x: torch.count_nonzero(x > 0, 1), X),
        "to int": (lambda x: (5 * x).to(torch.int32), X),
        "to uint8": (lambda x: (5 * x.abs()).to(torch.uint8).float(), X),
        "to bool": (lambda x: x.round().bool(), X),
        "to half": (lambda x: x.half().float(), X),
        "to double": (lambda x: x.double() * 2, X),
        "type_as": (lambda x, i: i.type_as(x) + x, X, torch.arange(6)),
        "int8": (lambda x: (100 * x).round().clamp(-128, 127).to(torch.int8), X),
        "isin": (lambda i: torch.isin(i, torch.tensor([1, 3])), torch.arange(6)),
        "bucketize": (lambda x: torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5])), X),
        "searchsorted": (lambda x: torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5]), x), X),
        "one_hot": (lambda i: F.one_hot(i, 6), torch.tensor([[1, 0], [4, 2]])),
    },
    "reductions": {
        "mean keep": (lambda x: x.mean((0, 2), keepdim=True), X),
        "std": (lambda x: x.std(1), X),
        "std0": (lambda x: x.std((1, 2), unbiased=False), X),
        "var": (lambda x: x.var(1, keepdim=True), X),
        "var_mean": (lambda x: torch.var_mean(x, 1), X),
        "norm2": (lambda x: x.norm(dim=1), X),
        "norm1": (lambda x: x.norm(p=1, dim=(1, 2)), X),
        "norminf": (lambda x: x.norm(p=float("inf"), dim=1), X),
        "normfro": (lambda x: x.norm(), X),
        "normalize": (lambda x: F.normalize(x, dim=1), X),
        "cos": (lambda x, y: F.cosine_similarity(x, y, dim=2), X, rand(2, 5, 6, seed=9)),
        "prod": (lambda x: x.prod(1), X),
        "prod all": (lambda x: x.prod(), X),
        "logsumexp": (lambda x: x.logsumexp(1), X),
        "softmax": (lambda x: x.softmax(1), X),
        "logsoftmax": (lambda x: x.log_softmax(-1), X),
        "max": (lambda x: x.max(), X),
        "min dim": (lambda x: x.min(1), X),
        "min": (lambda x: x.min(), X),
        "argmin": (lambda x: x.argmin(-1), X),
        "argmax all": (lambda x: x.argmax(), X),
        "argmax keep": (lambda x: x.argmax(1, keepdim=True), X),
        "topk": (lambda x: x.topk(3, -1), X),
        "topk smallest": (lambda x: x.topk(2, 1, largest=False), X),
        "sort": (lambda x: x.sort(1, descending=True), X),
        "argsort": (lambda x: x.argsort(-1), X),
        "median": (lambda x: x[:, :, :5].median(-1)[0], X),
        "kthvalue": (lambda x: x.kthvalue(2, -1)[0], X),
    },
    "activations": {
        "softplus": (lambda x: F.softplus(30 * x, beta=2, threshold=10), X),
        "softshrink": (lambda x: F.softshrink(x, 0.3), X),
        "hardshrink": (lambda x: F.hardshrink(x, 0.3), X),
        "tanhshrink": (lambda x: F.tanhshrink(x), X),
        "elu": (lambda x: F.elu(x, 0.7), X),
        "celu": (lambda x: F.celu(x, 0.7), X),
        "selu": (lambda x: F.selu(x), X),
        "mish": (lambda x: F.mish(x), X),
        "gelu tanh": (lambda x: F.gelu(3 * x, approximate="tanh"), X),
        "gelu": (lambda x: F.gelu(3 * x), X),
        "silu": (lambda x: F.silu(x), X),
        "hardsigmoid": (lambda x: F.hardsigmoid(5 * x), X),
        "hardswish": (lambda x: F.hardswish(5 * x), X),
        "hardtanh": (lambda x: F.hardtanh(3 * x, -0.5, 1.5), X),
        "relu6": (lambda x: F.relu6(9 * x), X),
        "logsigmoid": (lambda x: F.logsigmoid(x), X),
        "softsign": (lambda x: F.softsign(x), X),
        "threshold": (lambda x: F.threshold(x, 0.2, -3.0), X),
        "rrelu": (lambda x: F.rrelu(x), X),
        "leaky": (lambda x: F.leaky_relu(x, 0.2), X),
        "glu": (lambda x: F.glu(x, 2), X),
        "prelu 3d": (lambda x, w: F.prelu(x, w), X, rand(5, seed=1)),
        "prelu 1": (lambda x, w: F.prelu(x, w), X, rand(1, seed=1)),
        "prelu 2d": (lambda x, w: F.prelu(x, w), X[0], rand(6, seed=1)),
        "clamp": (lambda x: x.clamp(-0.3, 0.4), X),
        "clamp min": (lambda x: x.clamp(min=0.1), X),
        "clamp max": (lambda x: x.clamp(max=0.1), X),
        "clamp t": (lambda x, a: torch.clamp(x, a, a + 0.2), X, rand(6)),
        "masked_fill": (lambda x: x.masked_fill(x > 0, -5.0), X),
        "masked_fill inf": (lambda x: x.masked_fill(x > 0, float("-inf")).softmax(-1), X),
    },
    "indexing": {
        "gather": (lambda x, i: x.gather(1, i[..., None].expand(-1, -1, 6)), X, torch.tensor([[1, 0], [4, 2]])),
        "take_along": (lambda x, i: torch.take_along_dim(x, i[..., None], 1), X, torch.tensor([[1, 0], [4, 2]])),
        "index_select": (lambda x, i: x.index_select(1, i), X, torch.tensor([1, 0, 4])),
        "embedding": (lambda i, w: F.embedding(i, w), torch.tensor([[1, 0], [4, 2]]), rand(6, 3)),
        "embedding pad": (nn.Embedding(6, 3, padding_idx=0), torch.tensor([[1, 0], [4, 2]])),
        "scatter": (lambda x, i: x.scatter(1, i[..., None].expand(-1, -1, 6), 0.5), X, torch.tensor([[1, 0], [4, 2]])),
        "scatter src": (
            lambda x, i, s: x.scatter(1, i[..., None].expand(-1, -1, 6), s),
            X,
            torch.tensor([[1, 0], [4, 2]]),
            rand(2, 2, 6, seed=5),
        ),
        "scatter_add": (
            lambda x, i, s: x.scatter_add(1, i[..., None].expand(-1, -1, 6), s),
            X,
            torch.tensor([[1, 1], [4, 2]]),
            rand(2, 2, 6, seed=5),
        ),
        "index_add": (lambda x, i, s: x.index_add(1, i, s), X, torch.tensor([1, 1, 3]), rand(2, 3, 6, seed=5)),
        "index_copy": (lambda x, i, s: x.index_copy(1, i, s), X, torch.tensor([1, 0, 3]), rand(2, 3, 6, seed=5)),
        "index_put": (
            lambda x, v: torch.index_put(x, (torch.tensor([0, 1]), torch.tensor([1, -1])), v),
            X,
            rand(2, 6, seed=2),
        ),
        "index_put acc": (
            lambda x, v: torch.index_put(x, (torch.tensor([0, 0]), torch.tensor([1, 1])), v, accumulate=True),
            X,
            rand(2, 6, seed=2),
        ),
        "mask put": (lambda x: torch.index_put(x, (x > 0,), torch.tensor(3.0)), X),
        "index last two": (lambda x: x[..., torch.tensor([0, -1]), torch.tensor([2, 3])], X),
        "index orth": (lambda x: x[:, torch.tensor([[0], [1]]), torch.tensor([2, 3])], X),
        "index first": (lambda x: x[torch.tensor([1, 0, 1])], X),
        "index split": (lambda x: x[torch.tensor([1, 0]), :, torch.tensor([1, 0])], X),
        "slice neg": (lambda x: x[:, -3:, :-1], X),
        "slice step": (lambda x: x[:, ::2, 1::3], X),
    },
    "shapes": {
        "flip": (lambda x: x.flip(1, 2), X),
        "roll": (lambda x: x.roll((1, -2), (1, 2)), X),
        "roll flat": (lambda x: x.roll(3), X),
        "tile": (lambda x: x.tile(1, 2, 1), X),
        "repeat": (lambda x: x.repeat(2, 1, 3), X),
        "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), X),
        "expand": (lambda x: x[:, :1].expand(-1, 4, -1) + 0, X),
        "tril": (lambda x: x.tril(-1), X),
        "triu": (lambda x: x.triu(1), X),
        "diag": (lambda x: x.diagonal(0, 1, 2), X),
        "diag emb": (lambda x: torch.diag_embed(x[0]), X),
        "eye": (lambda x: x[:, :, :5] + torch.eye(5), X),
        "movedim": (lambda x: x.movedim(0, -1), X),
        "unflatten": (lambda x: x.unflatten(-1, (2, 3)), X),
        "swap": (lambda x: x.mT, X),
        "squeeze": (lambda x: x[:1, :, :1].squeeze(), X),
        "stack": (lambda x: torch.stack([x, x + 1], -1), X),
        "cat": (lambda x: torch.cat([x, x[:, :2]], 1), X),
        "chunk": (lambda x: x.chunk(2, 1)[1], X),
        "split": (lambda x: x.split([1, 4], 1), X),
        "tensor_split": (lambda x: x.tensor_split(3, 2)[1], X),
        "meshgrid": (lambda x: torch.meshgrid(x[0, 0], x[0, :, 0], indexing="ij"), X),
        "linspace": (lambda x: x + torch.linspace(0, 1, 6), X),
        "arange f": (lambda x: x + torch.arange(0, 3, 0.5), X),
        "full": (lambda x: torch.full_like(x, 2) + x, X),
        "unfold t": (lambda x: x.unfold(2, 3, 2), X),
        "shuffle": (lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), IMAGE),
        "unshuffle": (lambda x: F.pixel_unshuffle(x[:, :, :, :4], 2), IMAGE),
        "chshuffle": (lambda x: F.channel_shuffle(x.repeat(1, 2, 1, 1), 3), IMAGE),
    },
    "products": {
        "outer": (lambda x: torch.outer(x[0, 0], x[0, :, 0]), X),
        "einsum": (lambda x, y: torch.einsum("bij,bkj->bik", x, y), X, rand(2, 3, 6, seed=1)),
        "einsum2": (lambda x, y: torch.einsum("bij,kj->kbi", x, y), X, rand(3, 6, seed=1)),
        "matmul vec": (lambda x, v: x @ v, X, rand(6)),
        "vecmat": (lambda x, v: v @ x, X, rand(5)),
        "dot": (lambda x: torch.dot(x[0, 0], x[0, 1]), X),
        "bmm": (lambda x: x.bmm(x.mT), X),
        "matmul b": (lambda x, y: x[:, None] @ y, X, rand(4, 6, 2)),
        "linear": (nn.Linear(6, 4), X),
        "linear nb": (nn.Linear(6, 4, bias=False), X[0, 0]),
        "kron": (lambda x: torch.kron(x[0, :2, :2], x[1, :2, :2]), X),
        "cross": (lambda x: torch.linalg.cross(x[:, :, :3], x[:, :, 3:]), X),
        "trace": (lambda x: torch.trace(x[0, :5, :5]), X),
    },
    "convolutions": {
        "conv": (nn.Conv2d(3, 4, 3, 2, 1, 1), IMAGE),
        "conv same": (nn.Conv2d(3, 4, 4, padding="same"), IMAGE),
        "conv circ": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), IMAGE),
        "conv refl": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
        "conv repl": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), IMAGE),
        "dw": (nn.Conv2d(3, 6, 3, groups=3, dilation=(1, 2)), IMAGE),
        "conv1d": (nn.Conv1d(5, 4, 3, padding=1, groups=1), X),
        "conv1d same": (nn.Conv1d(5, 4, 4, padding="same"), X),
        "convt": (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), IMAGE),
        "convt g": (nn.ConvTranspose2d(3, 6, 2, 2, groups=3), IMAGE),
        "convt dil": (nn.ConvTranspose2d(3, 4, 3, 2, 1, 0, dilation=2), IMAGE),
        "convt1": (nn.ConvTranspose1d(5, 4, 3, 2, 1, 1), X),
        "conv3": (nn.Conv3d(1, 2, 2), rand(1, 1, 3, 4, 4)),
    },
    "pools": {
        "maxpool": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
        "maxpool ceil": (lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), IMAGE),
        "maxpool ceil2": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), rand(1, 3, 8, 8)),
        "maxpool dil": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), IMAGE),
        "maxpool1": (lambda x: F.max_pool1d(x, 2, 2), X),
        "avgpool": (lambda x: F.avg_pool2d(x, 3, 2, 1), IMAGE),
        "avgpool nopad": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE),
        "avgpool ceil": (lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True), IMAGE),
        "avgpool ceil pad": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), rand(1, 3, 8, 8)),
        "avgpool div": (lambda x: F.avg_pool2d(x, 2, 2, divisor_override=3), IMAGE),
        "avgpool1": (lambda x: F.avg_pool1d(x, 3, 2, 1), X),
        "adap": (lambda x: F.adaptive_avg_pool2d(x, 1), IMAGE),
        "adap 32": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), IMAGE),
        "adap 4": (lambda x: F.adaptive_avg_pool2d(x, (4, 4)), IMAGE),
        "adap up": (lambda x: F.adaptive_avg_pool2d(x, (7, 7)), IMAGE),
        "adapmax": (lambda x: F.adaptive_max_pool2d(x, (3, 2)), IMAGE),
        "adapmax1": (lambda x: F.adaptive_max_pool2d(x, 1), IMAGE),
        "lppool": (lambda x: F.lp_pool2d(x, 2, 2), IMAGE),
        "adap1d": (lambda x: F.adaptive_avg_pool1d(x, 2), X),
    },
    "resizing": {
        "up nearest": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
        "up near 1.5": (lambda x: F.interpolate(x, scale_factor=1.5), IMAGE),
        "up near size": (lambda x: F.interpolate(x, size=(9, 7)), IMAGE),
        "up near down": (lambda x: F.interpolate(x, size=(4, 3)), IMAGE),
        "up exact": (lambda x: F.interpolate(x, size=(9, 7), mode="nearest-exact"), IMAGE),
        "up bil": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), IMAGE),
        "up bil ac": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), IMAGE),
        "up bil ac one": (
            lambda x: F.interpolate(x, size=(1, 5), mode="bilinear", align_corners=True),
            IMAGE,
        ),
        "up bil size": (lambda x: F.interpolate(x, size=(9, 7), mode="bilinear"), IMAGE),
        "up bil 1.5": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), IMAGE),
        "up bil 1.7 recompute": (
            lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
            IMAGE,
        ),
        "up bic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE),
        "up bic factor": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bicubic"), IMAGE),
        "up bic down": (lambda x: F.interpolate(x, size=(4, 3), mode="bicubic"), IMAGE),
        "up bic ac": (lambda x: F.interpolate(x, size=(9, 7), mode="bicubic", align_corners=True), IMAGE),
        "up lin": (lambda x: F.interpolate(x, size=9, mode="linear"), X),
        "up near1": (lambda x: F.interpolate(x, size=9), X),
        "up area": (lambda x: F.interpolate(x, size=(3, 2), mode="area"), IMAGE),
        "affine_grid": (
            lambda t, x: F.grid_sample(x, F.affine_grid(t, (1, 3, 5, 5), align_corners=False), align_corners=False),
            rand(1, 2, 3),
            IMAGE,
        ),
    },
    "padding": {
        "pad": (lambda x: F.pad(x, (1, 2, 0, 3), value=0.5), IMAGE),
        "pad neg": (lambda x: F.pad(x, (-1, 2, 0, -2)), IMAGE),
        "pad refl": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), IMAGE),
        "pad repl": (lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"), IMAGE),
        "pad circ": (lambda x: F.pad(x, (1, 2, 2, 1), mode="circular"), IMAGE),
        "pad refl1": (lambda x: F.pad(x, (1, 2), mode="reflect"), X),
        "pad repl1": (lambda x: F.pad(x, (1, 2), mode="replicate"), X),
    },
    "norms": {
        "bn": (nn.BatchNorm2d(3), IMAGE),
        "bn noaff": (nn.BatchNorm2d(3, affine=False), IMAGE),
        "bn1d": (nn.BatchNorm1d(5), X),
        "bn1d2": (nn.BatchNorm1d(6), X[0]),
        "in": (nn.InstanceNorm2d(3), IMAGE),
        "in aff": (nn.InstanceNorm2d(3, affine=True), IMAGE),
        "in track": (nn.InstanceNorm2d(3, track_running_stats=True), IMAGE),
        "gn": (nn.GroupNorm(1, 3), IMAGE),
        "gn3": (nn.GroupNorm(3, 3, affine=False), IMAGE),
        "ln": (nn.LayerNorm(6), X),
        "ln2": (nn.LayerNorm((5, 6)), X),
        "ln noaff": (nn.LayerNorm(6, elementwise_affine=False), X),
        "ln nobias": (nn.LayerNorm(6, bias=False), X),
        "rms": (nn.RMSNorm(6), X),
        "lrn": (nn.LocalResponseNorm(3), IMAGE),
    },
    "attention and recurrence": {
        "mha": (nn.MultiheadAttention(6, 2, batch_first=True), X, X, X),
        "enc": (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), X),
        "lstm": (nn.LSTM(6, 3, batch_first=True), X),
        "gru": (nn.GRU(6, 3, batch_first=True), X),
        "gru tm": (nn.GRU(6, 3), X),
        "rnn": (nn.RNN(6, 3, batch_first=True), X),
        "rnn relu": (nn.RNN(6, 3, nonlinearity="relu"), X),
        "lstmcell": (nn.LSTMCell(6, 3), X[0]),
        "grucell": (nn.GRUCell(6, 3), X[0]),
    },
}


class Family(nn.Module):
    """All operators of a family, each on its own inputs."""

    def __init__(self, cases: dict[str, Case]) -> None:
        super().__init__()
        self.functions = [case[0] for case in cases.values()]
        self.layers = nn.ModuleList(f for f in self.functions if isinstance(f, nn.Module))
        self.counts = [len(case) - 1 for case in cases.values()]

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        results, start = [], 0
        for function, count in zip(self.functions, self.counts, strict=True):
            results.append(function(*inputs[start : start + count]))
            start += count
        return results


@pytest.mark.parametrize("family", OPERATORS)
def test_operators_equal_pytorch(family: str) -> None:
    cases = OPERATORS[family]
    model = Family(cases).eval()
    # No input twice: TVM wants a name for each.
    inputs = tuple(x.clone() for case in cases.values() for x in case[1:])
    with torch.no_grad():
        results = model(*inputs)
    names = [name for name, result in zip(cases, results, strict=True) for _ in tree_leaves(result)]
    legal = legalize(export(model, *inputs))
    assert unsupported(legal) == []
    wrong = [
        name
        for name, got, want in zip(names, run_tvm(legal, *inputs), tree_leaves(results), strict=True)
        if not equal(got, want.numpy())
    ]
    assert wrong == []


def equal(got: np.ndarray, want: np.ndarray) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if want.dtype.kind != "f":
        return np.array_equal(got, want)
    finite = np.isfinite(want)
    error = np.abs(got - want)[finite].max(initial=0)
    same = np.array_equal(got[~finite], want[~finite], equal_nan=True)
    return same and error <= TOLERANCE * np.abs(want[finite]).max(initial=1e-6)


REFUSED: dict[str, Case] = {
    "positions of maxima": (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], IMAGE),
    "a long cumprod": (lambda x: x.repeat(1, 20, 1).cumprod(1), X),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_comes_out_wrong_is_refused(name: str) -> None:
    """TVM's importer takes all of these, and computes something else or calls its run time."""
    function, *inputs = REFUSED[name]
    (found,) = unsupported(legalize(export(function, *inputs)))
    assert found.suggestion
    # The innermost line of a `forward`, here that of the wrapper.
    assert "test_legalize.py:" in found.source
