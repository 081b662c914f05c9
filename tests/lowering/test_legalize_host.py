"""Operators outside the regions, compiled for this machine and compared with PyTorch.

`test_legalize.py` runs the rules in TVM's virtual machine; here the result also has to be free of TVM's run time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.lowering.helpers import compile_host, load
from tests.lowering.networks import Net, conv

pytestmark = pytest.mark.host

Module = Callable[[], nn.Module]


def net(forward: Callable[..., Any], **layers: Any) -> Module:
    return lambda: Net(forward, **layers)


def merge_tokens(m: Net, x: torch.Tensor) -> torch.Tensor:
    """3 of 7 tokens are averaged with others; two of them meet."""
    kept, gone = x[:, :4], x[:, 4:]
    index = torch.tensor([0, 2, 2]).view(1, 3, 1).expand(x.shape[0], 3, 5)
    return kept.scatter_reduce(1, index, gone, reduce="mean")


def sequence(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Several axes selected, cut and put together."""
    a, b, c = x.chunk(3, 1)
    first, *rest = b.unbind(1)
    return torch.cat([a[:, -1:], first.unsqueeze(1), *(r.unsqueeze(1) for r in rest), c], 1).roll((1, -2), (1, 2))


def attention(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Boolean mask, float mask, causal, scale, two ranks."""
    tri = torch.ones(7, 7).tril()
    y = F.scaled_dot_product_attention(x, x * 0.5, x + 1.0, tri.bool())
    y = F.scaled_dot_product_attention(y, x, y, tri.log(), scale=0.7)
    return F.scaled_dot_product_attention(y[:, 0], x[:, 1], y[:, 0], is_causal=True)


CASES: dict[str, tuple[Module, tuple[tuple[int, ...], ...]]] = {
    "sequence": (net(sequence), ((1, 8, 6),)),
    "index": (net(lambda m, x: x[:, torch.tensor([0, -1]), :, torch.tensor([1, 2])]), ((1, 3, 4, 6),)),
    "grid sample": (
        net(lambda m, x, g: F.grid_sample(x, g, "nearest", "border", True) + F.grid_sample(x, g, align_corners=False)),
        ((1, 2, 5, 4), (1, 3, 6, 2)),
    ),
    "extremes": (
        net(lambda m, x: x.max(1)[0] + x.amin((1, 2), keepdim=True)[:, 0] + (x > 0.8).any(1) + x.logsumexp(1)),
        ((1, 4, 6),),
    ),
    "argmax": (net(lambda m, x: x.max(1)[1] + x.argmin(2)[:, :1]), ((1, 4, 6),)),
    "sort": (
        net(lambda m, x: torch.cat([x.sort(1)[0], x.topk(3, 1)[0], x.topk(2, 1, largest=False)[0]], 1)),
        ((1, 8, 4),),
    ),
    "topk places": (
        net(lambda m, x: (lambda v, i: v + i.float() + torch.gather(x, 1, x.argsort(1))[:, :3])(*x.topk(3, 1))),
        ((1, 8, 4),),
    ),
    "cumsum": (net(lambda m, x: x.cumsum(1) + (x > 0).cumsum(-1)), ((1, 6, 4),)),
    "attention": (net(attention), ((1, 2, 7, 8),)),
    "merge tokens": (net(merge_tokens), ((1, 7, 5),)),
    "fold": (net(lambda m, x: F.fold(F.unfold(x, 3, padding=1), (6, 8), 3, padding=1)), ((1, 3, 6, 8),)),
    "lstm": (
        net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(5, 6, batch_first=True), fc=nn.Linear(6, 3)),
        ((1, 3, 5),),
    ),
    "gru": (net(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.GRU(5, 6, batch_first=True)), ((1, 3, 5),)),
    "embedding": (net(lambda m, x: m.e((x * 10.0).abs().long()), e=nn.Embedding(11, 4)), ((1, 6),)),
    "adaptive pools": (
        net(lambda m, x: F.adaptive_max_pool2d(m.conv(x), (2, 3)) + F.adaptive_avg_pool2d(x, (2, 3)), conv=conv(3, 3)),
        ((1, 3, 7, 8),),
    ),
    "gelu tanh": (net(lambda m, x: F.gelu(m.fc(x), approximate="tanh"), fc=nn.Linear(6, 8)), ((1, 6),)),
    "norms": (net(lambda m, x: m.ln(m.gn(x)), gn=nn.GroupNorm(2, 4), ln=nn.LayerNorm(6)), ((1, 4, 5, 6),)),
    "upsample": (
        net(lambda m, x: F.interpolate(m.conv(x), scale_factor=2, mode="bilinear"), conv=conv(3, 3)),
        ((1, 3, 5, 4),),
    ),
    "multihead": (
        net(lambda m, x: m.attn(x, x, x, need_weights=False)[0], attn=nn.MultiheadAttention(8, 2, batch_first=True)),
        ((1, 5, 8),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_pytorch(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, shapes = CASES[name]
    compiled = compile_host(load(make(), *shapes), tmp_path)
    assert compiled.error() < 1e-4
    assert capfd.readouterr().err == ""
