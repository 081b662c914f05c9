"""Attention, norms and products: what becomes one kernel, in which layout, and that results stay those of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec import qops as qops
from edgec.bundle import build_bundle
from edgec.lowering.graph import affine, moves_ones, view_of
from edgec.lowering.lower import lower, lower_torch
from edgec.targets.device import load_device
from tests.lowering.helpers import Stages, calls, compile_host, errors, load, operators, samples
from tests.lowering.networks import Net, chain, conv
from tests.targets.kernel_runner import require

TOKENS = (1, 21, 24)
MOVES = ("permute", "transpose", "clone", "contiguous", "expand", "select", "slice", "unbind", "split")


class Block(nn.Module):
    """A block of timm's VisionTransformer; `attend` is the attention on (q, k, v)."""

    def __init__(self, attend: Callable[..., torch.Tensor] | None = None, heads: int = 3, act: Any = nn.GELU) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend or F.scaled_dot_product_attention
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 40), act(), nn.Dropout(0.1), nn.Linear(40, 24), nn.Dropout(0.1))
        self.register_buffer("seen", torch.ones(21, 21).tril().bool())
        self.bias = nn.Parameter(torch.zeros(heads, 21, 21))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(self.attend(q, k, v, self).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


def fused(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    """As timm writes it without fused attention."""
    return F.dropout((q * 0.3 @ k.transpose(-2, -1)).softmax(-1), 0.1, m.training) @ v


def divided(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    return torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(8), -1) @ v


def masked(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    """As minGPT masks the future."""
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(8))
    return scores.masked_fill(~m.seen[None, None], float("-inf")).softmax(-1) @ v


def chosen(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    """As transformers' GPT-2 masks the future."""
    scores = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], 8**0.5)
    least = torch.full([], torch.finfo(torch.float32).min)
    return torch.where(m.seen[None, None], scores, least).softmax(-1) @ v


def biased(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    """A learned bias per head, as Swin and BEiT have it."""
    return (q * 0.3 @ k.transpose(-2, -1) + m.bias.unsqueeze(0)).softmax(-1) @ v


def causal(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


def banded(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    """Local attention: a constant mask of truth values that is no triangle, and tokens that see nothing."""
    place = torch.arange(21)
    near = ((place - place.unsqueeze(1)).abs() < 4) & (place.unsqueeze(1) != 5)
    return F.scaled_dot_product_attention(q, k, v, near)


ATTENTIONS = (fused, written_out, divided, masked, chosen, biased, causal, banded)


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, torch.Generator().manual_seed(parameter.numel()))
    return module


def window_attention(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Swin: windows of 4 x 4 in the batch, a relative position bias from a table, a mask between shifted windows."""
    h, w, c = 8, 8, 16
    x = x.transpose(1, 2).reshape(1, h, w, c) if x.shape[1] == c else x.reshape(1, h, w, c)
    x = x.reshape(1, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(4, 16, c)
    q, k, v = m.qkv(x).reshape(4, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
    place = torch.arange(16)
    index = ((place.unsqueeze(1) - place) % 7).reshape(-1)
    bias = m.table.weight[index].reshape(16, 16, 2).permute(2, 0, 1).unsqueeze(0)
    window = torch.arange(4).reshape(4, 1, 1, 1)
    apart = torch.zeros(4, 1, 16, 16).masked_fill((window == 3) & (place.unsqueeze(1) // 8 != place // 8), -100.0)
    y = F.scaled_dot_product_attention(q, k, v, bias + apart)
    y = m.proj(y.transpose(1, 2).reshape(4, 16, c))
    return y.reshape(1, 2, 2, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(1, 64, c)


def cross_attention(m: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Keys and values of another sequence, side by side in one projection."""
    q = m.q(x).unflatten(-1, (4, 6)).transpose(1, 2)
    k, v = m.kv(y).unflatten(-1, (2, 4, 6)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def grouped_queries(m: Net, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (m.q, m.k, m.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


def class_attention(m: Net, x: torch.Tensor) -> torch.Tensor:
    """One query, and a mask that comes with the input, as a padding mask does."""
    q, k, v = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (m.q, m.k, m.v))
    penalty = (x[:, None, None, :, 0] * 4.0).clamp(max=0.0)
    return F.scaled_dot_product_attention(q[:, :, :1], k, v, penalty).transpose(1, 2).reshape(1, 1, 24)


def map_attention(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Attention over the pixels of a map, heads split from channels [N, C, H W]."""
    x = m.stem(x)
    q, k, v = m.qkv(x).flatten(2).unflatten(1, (3, 2, 4)).transpose(-1, -2).unbind(1)
    return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape))


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(24, 3, 40, activation="gelu", **options)


def tokens_first(m: Net, x: torch.Tensor) -> torch.Tensor:
    """The layout of PyTorch's own transformers, with weights that somebody might have asked for."""
    x = x.transpose(0, 1)
    return (x + m.attn(x, x, x)[0]).transpose(0, 1)


def linears(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


# Module, input shapes, attention kernels, operators that move elements.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int, int]] = {
    **{f.__name__: (lambda f=f: Block(f), (TOKENS,), 1, 0) for f in ATTENTIONS},
    "encoder, batch first": (lambda: encoder_layer(batch_first=True), (TOKENS,), 1, 0),
    "encoder, norm first": (lambda: encoder_layer(batch_first=True, norm_first=True), (TOKENS,), 1, 0),
    "tokens first": (lambda: Net(tokens_first, attn=nn.MultiheadAttention(24, 3)), (TOKENS,), 1, 0),
    "windows": (
        lambda: Net(window_attention, **linears(qkv=(16, 48), proj=(16, 16)), table=nn.Embedding(7, 2)),
        ((1, 64, 16),),
        1,
        2,
    ),
    "cross attention": (
        lambda: Net(cross_attention, **linears(q=(24, 24), kv=(24, 48))),
        (TOKENS, (1, 13, 24)),
        1,
        0,
    ),
    "grouped queries": (
        lambda: Net(grouped_queries, **linears(q=(24, 24), k=(24, 12), v=(24, 12))),
        (TOKENS,),
        1,
        0,
    ),
    "class attention": (
        lambda: Net(class_attention, **linears(q=(24, 24), k=(24, 24), v=(24, 24))),
        (TOKENS,),
        1,
        1,
    ),
    "map attention": (
        lambda: Net(map_attention, stem=conv(3, 8), qkv=conv(8, 24, 1), proj=conv(8, 4, 1)),
        ((1, 3, 5, 6),),
        1,
        2,
    ),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_is_one_region(name: str) -> None:
    make, shapes, attentions, moves = NETWORKS[name]
    module = Stages(load(randomized(make()), *shapes)).layout
    found = operators(module)
    assert found["attention"] == attentions
    moved = [n for move in MOVES for n in calls(module, move) if not moves_ones(n)]
    assert len(moved) == moves, moved
    assert not {"softmax", "matmul", "bmm", "scaled_dot_product_attention", "layer_norm.default"} & set(found)


@pytest.mark.host
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_equals_pytorch(name: str, tmp_path: Path) -> None:
    make, shapes, *_ = NETWORKS[name]
    compiled = compile_host(load(randomized(make()), *shapes), tmp_path)
    assert compiled.error() < 1e-5
    if name in {f.__name__ for f in ATTENTIONS} or name.startswith("encoder"):
        assert compiled.lowered.fallbacks == ()


@pytest.mark.qemu
@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a7"))
def test_compiled_for_arm(name: str, tmp_path: Path) -> None:
    program, device = load(randomized(Block(biased, act=nn.SiLU)), TOKENS), load_device(name)
    require(device)
    inputs = samples(program)
    bundle = build_bundle(lower(program, device), device, tmp_path / "bundle")
    got = torch.from_numpy(bundle.run(*[x.numpy() for x in inputs]))
    assert errors((got,), program(*inputs)) < 1e-5


@pytest.mark.pure
def test_residuals_and_activations_join_the_layers_of_an_encoder() -> None:
    layers = calls(Stages(load(encoder_layer(batch_first=True), TOKENS)).layout, "linear_act")
    assert [(n.args[3] is not None, n.args[4]) for n in layers] == [
        (False, "none"),
        (True, "none"),
        (False, "gelu"),
        (True, "none"),
    ]


def weights_returned(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def over_queries(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def shifted_twice(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    """The bias is scaled as well: taking it for a mask would be wrong."""
    return ((q @ k.transpose(-2, -1) + m.bias) * 0.3).softmax(-1) @ v


def hidden_by_input(q: Any, k: Any, v: Any, m: Block) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, q.sum((1, 3))[:, None, None, :] > -3.0)


@pytest.mark.parametrize("attend", (weights_returned, over_queries, shifted_twice, hidden_by_input))
@pytest.mark.host
def test_what_the_kernel_cannot_do_stays_outside(attend: Any, tmp_path: Path) -> None:
    program = load(randomized(Block(attend)), TOKENS)
    assert operators(Stages(program).layout)["attention"] == 0
    assert compile_host(program, tmp_path).error() < 1e-5


# -- norms -------------------------------------------------------------------------------------------------------------


def llama_norm(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.fc(m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


class Weighted(Net):
    def __init__(self, forward: Any, **layers: Any) -> None:
        super().__init__(forward, **layers)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 24))


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "layer norm": (lambda: nn.LayerNorm(24), TOKENS, "layer_norm"),
    "without affine": (lambda: nn.LayerNorm((21, 24), elementwise_affine=False), TOKENS, "layer_norm"),
    "without bias": (lambda: nn.LayerNorm(24, bias=False), TOKENS, "layer_norm"),
    "rms norm": (lambda: nn.RMSNorm(24, eps=1e-5), TOKENS, "rms_norm"),
    "rms norm, default eps": (lambda: nn.RMSNorm(24), TOKENS, "rms_norm"),
    "rms norm written out": (lambda: Weighted(llama_norm, fc=nn.Linear(24, 5)), TOKENS, "rms_norm"),
    "group norm": (lambda: chain(conv(3, 8), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 4)), (1, 3, 7, 6), "group_norm"),
    "instance norm": (lambda: chain(conv(3, 8), nn.InstanceNorm2d(8, affine=True)), (1, 3, 7, 6), "group_norm"),
    "group norm of a sequence": (lambda: nn.GroupNorm(3, 24), (1, 24, 10), "group_norm"),
}


@pytest.mark.host
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, tmp_path: Path) -> None:
    make, shape, operator = NORMS[name]
    program = load(make(), shape)
    assert operators(Stages(program).layout)[operator] == 1
    compiled = compile_host(program, tmp_path)
    assert compiled.error() < 1e-5 and compiled.lowered.fallbacks == ()


@pytest.mark.pure
def test_an_activation_joins_a_group_norm() -> None:
    net = nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 4))
    (node,) = calls(Stages(load(net, (1, 3, 7, 6))).layout, "group_norm")
    assert node.args[5] == "silu" and node.args[8] == "NHWC"


@pytest.mark.pure
def test_computed_weights_of_a_norm_stay_outside() -> None:
    net = Net(lambda m, x: F.layer_norm(x, (24,), m.fc(x).mean((0, 1))), fc=nn.Linear(24, 24))
    assert operators(Stages(load(net, TOKENS)).layout)["edgec.layer_norm"] == 0


# -- codes -------------------------------------------------------------------------------------------------------------


def quantized_ends(m: Net, x: torch.Tensor) -> torch.Tensor:
    """A norm and an attention whose results are codes, as in an integer transformer."""
    codes = torch.ops.edgec.quantize(m.norm(x), 0.02, 3)
    q, k, v = m.qkv(torch.ops.edgec.dequantize(codes, 0.02, 3)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    return torch.ops.edgec.dequantize(torch.ops.edgec.quantize(y, 0.01, -4), 0.01, -4)


@pytest.mark.host
def test_codes_are_written_by_the_kernels(tmp_path: Path) -> None:
    program = load(Net(quantized_ends, norm=nn.LayerNorm(24), qkv=nn.Linear(24, 72)), TOKENS)
    found = operators(Stages(program).layout)
    assert found["quantize"] == 0 and found["layer_norm"] == found["attention"] == 1
    compiled = compile_host(program, tmp_path)
    steps = {s.op for s in compiled.lowered.plan.steps}
    assert {"layer_norm_i8", "attention_i8"} <= steps
    inputs = samples(program)
    got = torch.from_numpy(compiled.bundle.run(*[x.numpy() for x in inputs]))
    # A code may be one off where a value lies between two.
    assert (got - program(*inputs)[0]).abs().max() < 0.0101


# -- products ----------------------------------------------------------------------------------------------------------


def products(m: Net, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched, transposed, shared and plain products of activations, and one with a stored matrix."""
    y = torch.bmm(a, b.transpose(1, 2)) + a[0] @ b[0].t() + torch.matmul(a.unsqueeze(0), b[:1].mT)[0]
    return torch.matmul(y, m.fc.weight.t())


@pytest.mark.host
def test_products(tmp_path: Path) -> None:
    make = lambda: Net(products, fc=nn.Linear(11, 6))  # noqa: E731
    program = load(make(), (3, 5, 8), (3, 11, 8))
    found = operators(Stages(program).layout)
    assert found["matmul"] == 3 and found["linear_act"] == 1
    assert compile_host(program, tmp_path).error() < 1e-5


@pytest.mark.host
@pytest.mark.parametrize("axis", (-1, 1))
@pytest.mark.parametrize("log", (False, True))
def test_softmax(axis: int, log: bool, tmp_path: Path) -> None:
    program = load(nn.LogSoftmax(axis) if log else nn.Softmax(axis), (1, 19, 3))
    compiled = compile_host(program, tmp_path)
    assert compiled.error() < 1e-5
    assert (compiled.lowered.fallbacks == ()) == (axis == -1)


# -- views -------------------------------------------------------------------------------------------------------------


@pytest.mark.pure
def test_affine() -> None:
    index = torch.arange(60).reshape(3, 4, 5)
    assert affine(index.transpose(0, 2)[:, 1:, ::2]) == (5, [1, 5, 40])
    assert affine(index[:1]) == (0, [0, 5, 1])
    assert affine(index.roll(1, 2)) is None
    assert affine(index.transpose(1, 2).reshape(3, 20)) is None


@pytest.mark.pure
def test_a_view_ends_where_elements_are_shuffled() -> None:
    """A reshape of transposed heads is not affine: the farthest tensor of which it is a view is in between."""
    net = Net(
        lambda m, x: m.fc(x).unflatten(-1, (4, 6)).transpose(1, 2).reshape(1, 24, 21)[:, 2:] * 2.0, fc=nn.Linear(24, 24)
    )
    module = lower_torch(load(net, TOKENS)).module
    (node,) = calls(module, "mul")
    base, offset, strides = view_of(node.args[0], (1, 1, 22, 21))  # type: ignore[arg-type]
    assert base.target is torch.ops.aten.transpose.int and (offset, strides) == (42, [0, 0, 21, 1])


@pytest.mark.pure
def test_one_projection_is_read_three_times() -> None:
    module = lower_torch(load(Block(fused), TOKENS)).module
    (node,) = calls(module, "attention")
    assert node.args[0] is node.args[1] is node.args[2]
    assert node.args[5:8] == ([0, 0, 8, 72, 1], [24, 0, 8, 72, 1], [48, 0, 8, 72, 1])
