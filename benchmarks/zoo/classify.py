"""Classifiers for small devices with rare parts: shuffles, splits, branches, mixers, dynamic convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.dense import conv, conv_bn
from benchmarks.zoo.registry import add, model, uniform

FAMILY = "small classifiers"


class Pooled(nn.Module):
    """A body, the mean over pixels, a linear layer."""

    def __init__(self, body: nn.Module, c: int, classes: int = 10) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's (Ma et al. 2018)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        h = c // 2
        self.branch = nn.Sequential(conv_bn(h, h, 1), conv(h, h, groups=h), nn.BatchNorm2d(h), conv_bn(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


add(
    "shuffle_net_v2",
    FAMILY,
    lambda: Pooled(nn.Sequential(conv_bn(3, 16, stride=2), *[ShuffleUnit(16) for _ in range(3)]), 16),
    (1, 3, 32, 32),
    int8=True,
)
add(
    "shuffle_net_v1",
    FAMILY,
    lambda: Pooled(
        nn.Sequential(conv(3, 24, stride=2), conv(24, 24, 1, groups=3), nn.ChannelShuffle(3), conv(24, 24, groups=24)),
        24,
    ),
    (1, 3, 32, 32),
    int8=True,
)


class Fire(nn.Module):
    """SqueezeNet's (Iandola et al. 2016)."""

    def __init__(self, i: int, s: int, e: int) -> None:
        super().__init__()
        self.squeeze, self.e1, self.e3 = conv(i, s, 1), conv(s, e, 1), conv(s, e)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.e1(x)), F.relu(self.e3(x))], 1)


add(
    "squeeze_net",
    FAMILY,
    lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(16, 8, 16),
        Fire(32, 8, 16),
        nn.Dropout(),
        conv(32, 10, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    ),
    (1, 3, 48, 48),
    int8=True,
)
add(
    "lenet",
    FAMILY,
    lambda: nn.Sequential(
        conv(1, 6, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
        nn.LogSoftmax(1),
    ),
    (1, 1, 28, 28),
    int8=True,
    small=True,
)
add(
    "alex_net",
    FAMILY,
    lambda: nn.Sequential(
        nn.Conv2d(3, 16, 11, 4, 2),
        nn.ReLU(),
        nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0),
        nn.MaxPool2d(3, 2),
        conv(16, 24, 5, groups=2),
        nn.ReLU(),
        nn.LocalResponseNorm(4),
        nn.AdaptiveAvgPool2d((3, 3)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(216, 10),
        nn.Softmax(-1),
    ),
    (1, 3, 96, 96),
    int8=True,
)


class DynamicConv(nn.Module):
    """CondConv (Yang et al. 2019): the kernel is a mixture that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route = conv_bn(3, 16, stride=2), nn.Linear(16, 4)
        self.kernels = nn.Parameter(torch.randn(4, 16, 16, 3, 3) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        r = torch.sigmoid(self.route(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        kernel = (r @ self.kernels.view(4, -1)).view(n * 16, c, 3, 3)
        return F.conv2d(x.reshape(1, n * c, h, w), kernel, padding=1, groups=n).view(n, 16, h, w)


add("dynamic_conv", FAMILY, lambda: Pooled(DynamicConv(), 16), (1, 3, 24, 24))


class Involution(nn.Module):
    """Li et al. 2021: a kernel for each pixel, made from the pixel; neighbourhoods by unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.span = conv_bn(3, 16, stride=2), conv_bn(16, 4, 1), conv(4, 9 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        kernel = self.span(self.reduce(x)).view(n, 4, 9, h, w).unsqueeze(2)
        patches = F.unfold(x, 3, padding=1).view(n, 4, c // 4, 9, h, w)
        return (kernel * patches).sum(3).view(n, c, h, w)


add("involution", FAMILY, lambda: Pooled(Involution(), 16), (1, 3, 24, 24))


class Cbam(nn.Module):
    """Woo et al. 2018: attention over channels and over pixels, from means and maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spatial = conv_bn(3, 16, stride=2), conv(2, 1, 7)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.mlp(F.avg_pool2d(x, x.shape[2:])) + self.mlp(F.max_pool2d(x, x.shape[2:]))
        x = x * torch.sigmoid(gate)[:, :, None, None].expand_as(x)
        both = torch.cat([x.amax(1, keepdim=True), torch.mean(x, 1).unsqueeze(1)], 1)
        return x * torch.sigmoid(self.spatial(both))


add("cbam", FAMILY, lambda: Pooled(Cbam(), 16), (1, 3, 32, 32), int8=True)


class CoordAttention(nn.Module):
    """Hou et al. 2021: means along rows and along columns, joined and split again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.join = (
            conv_bn(3, 16, stride=2),
            nn.Sequential(conv(16, 8, 1), nn.BatchNorm2d(8), nn.Hardswish()),
        )
        self.h, self.w = conv(8, 16, 1), conv(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        _, _, h, w = x.size()
        rows, columns = F.adaptive_avg_pool2d(x, (h, 1)), F.adaptive_avg_pool2d(x, (1, w)).permute(0, 1, 3, 2)
        y = self.join(torch.cat([rows, columns], 2))
        a, b = torch.split(y, [h, w], dim=2)
        return x * self.h(a).sigmoid() * self.w(b.permute(0, 1, 3, 2)).sigmoid()


add("coord_attention", FAMILY, lambda: Pooled(CoordAttention(), 16), (1, 3, 32, 32), int8=True)


class Octave(nn.Module):
    """Chen et al. 2019: two frequencies that exchange; a stride-2 pool, nearest enlargement."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.hh, self.hl, self.lh, self.ll = conv(12, 12), conv(12, 4), conv(4, 12), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        high, low = x[:, :12], F.avg_pool2d(x[:, 12:], 2)
        a = self.hh(high) + F.interpolate(self.lh(low), scale_factor=2)
        b = self.ll(low) + self.hl(F.avg_pool2d(high, 2))
        return torch.cat([F.avg_pool2d(F.relu(a), 2), F.relu(b)], 1)


add("octave", FAMILY, lambda: Pooled(Octave(), 16), (1, 3, 32, 32), int8=True)


@model(FAMILY, (1, 3, 32, 32), int8=True)
class FractalNet(nn.Module):
    """Branches averaged with stack and mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 8), conv_bn(3, 8), conv_bn(8, 8)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.c(self.b(x))]).mean(0)
        return self.head(torch.flatten(F.adaptive_max_pool2d(y, 4), 1))


@model(FAMILY, (1, 3, 32, 32), int8=True)
class LegacyActs(nn.Module):
    """One of each activation and padding, and means that are powers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 16, 3),
            nn.InstanceNorm2d(16, affine=True),
            nn.PReLU(16),
            nn.Conv2d(16, 16, 3),
            nn.InstanceNorm2d(16, track_running_stats=True),
            nn.LeakyReLU(0.1),
            nn.LocalResponseNorm(3),
            nn.Mish(),
            nn.ReflectionPad2d(2),
            nn.Conv2d(16, 8, 3, padding_mode="circular", padding=1),
            nn.ReplicationPad2d(1),
            nn.CELU(0.5),
            nn.SELU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Hardsigmoid(),
            nn.ELU(),
            nn.Softplus(2, 10),
            nn.Softsign(),
            nn.LPPool2d(2, 2),
            nn.Hardtanh(-0.5, 0.7),
            nn.Softshrink(0.1),
            nn.Tanhshrink(),
            nn.LogSigmoid(),
            nn.Threshold(-0.7, 0.2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@model(FAMILY, uniform(1, 3, 32, 32), int8=True)
class GemRetrieval(nn.Module):
    """Generalised mean pooling (Radenovic et al. 2018) and a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.p = conv_bn(3, 24, stride=2), nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).clamp(min=1e-6).pow(self.p)
        return F.normalize(F.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1.0 / self.p).flatten(1), p=2.0, dim=1)


@model(FAMILY, (1, 3, 32, 32), int8=True)
class BilinearPool(nn.Module):
    """Lin et al. 2015: outer products of features, signed square roots."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_bn(3, 12, stride=4), nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(2)
        z = torch.bmm(y, y.transpose(1, 2)).div(y.shape[-1]).flatten(1)
        return self.head(F.normalize(torch.sign(z) * torch.sqrt(z.abs() + 1e-8)))


@model(FAMILY, (1, 1, 28, 28))
class CapsuleNet(nn.Module):
    """Sabour et al. 2017: squashing and three rounds of routing by agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.primary = nn.Conv2d(1, 16, 9), nn.Conv2d(16, 16, 9, stride=2)
        self.weight = nn.Parameter(torch.randn(1, 36 * 2, 5, 6, 8) * 0.3)

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        n = (x**2).sum(-1, keepdim=True)
        return n / (1 + n) * x / torch.sqrt(n + 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        u = self.primary(F.relu(self.a(x)))
        u = self.squash(u.reshape(x.shape[0], -1, 8))
        votes = (self.weight @ u[:, :, None, :, None]).squeeze(-1)
        b = torch.zeros(x.shape[0], votes.shape[1], 5, 1)
        v = votes.sum(1)
        for _ in range(3):
            v = self.squash((F.softmax(b, dim=2) * votes).sum(1))
            b = b + (votes * v.unsqueeze(1)).sum(-1, keepdim=True)
        return v.norm(dim=-1)


@model(FAMILY, (1, 3, 32, 32), int8=True)
class EarlyExit(nn.Module):
    """Both classifiers as outputs, and the one to believe chosen by confidence with torch.where."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8, stride=2), conv_bn(8, 16, stride=2)
        self.first, self.last = nn.Linear(8, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        early = self.first(x.mean((-1, -2)))
        late = self.last(self.b(x).mean((-1, -2)))
        sure = early.softmax(-1).max(-1, keepdim=True)[0] > 0.5
        return torch.where(sure, early, late), sure.squeeze(-1)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, c: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.token = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channel = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(approximate="tanh"), nn.Linear(2 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token(self.n1(x).transpose(-1, -2)).transpose(-1, -2)
        return x + self.channel(self.n2(x))


@model(FAMILY, (1, 3, 32, 32), int8=True)
class MlpMixer(nn.Module):
    """Tolstikhin et al. 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.body, self.norm, self.head = (
            nn.Conv2d(3, 24, 8, 8),
            nn.Sequential(MixerBlock(16, 24), MixerBlock(16, 24)),
            nn.LayerNorm(24),
            nn.Linear(24, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.patch(x).flatten(2).transpose(1, 2))).mean(dim=1))


@model(FAMILY, (1, 3, 32, 32), int8=True)
class WindowVit(nn.Module):
    """Swin's parts: windows, a cyclic shift by torch.roll, a table of relative places, patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.qkv, self.proj = (
            nn.Conv2d(3, 16, 4, 4),
            nn.LayerNorm(16),
            nn.Linear(16, 48),
            nn.Linear(16, 16),
        )
        self.table = nn.Parameter(torch.randn(49, 2) * 0.1)
        c = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        d = (c[:, :, None] - c[:, None, :]) + 3
        self.register_buffer("index", d[0] * 7 + d[1])
        self.merge, self.head = nn.Linear(64, 24, bias=False), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
        a = (q * (c // 2) ** -0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((a @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(y, shifts=(2, 2), dims=(1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


@model(FAMILY, (1, 3, 32, 32), int8=True)
class TokenMerging(nn.Module):
    """ToMe in a ViT block (Bolya et al. 2022), hand-written: matching by cosine, scatter_reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, 16, 4, 4), MixerBlock(56, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        m = x / x.norm(dim=-1, keepdim=True)
        a, b = m[:, ::2], m[:, 1::2]
        best, where = (a @ b.transpose(-1, -2)).max(-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        drop, keep = order[:, :8], order[:, 8:]
        to = where[..., None].gather(-2, drop)
        n, c = x.shape[0], x.shape[-1]
        src, dst = x[:, ::2], x[:, 1::2]
        kept = src.gather(-2, keep.expand(n, keep.shape[1], c))
        dst = dst.scatter_reduce(-2, to.expand(n, 8, c), src.gather(-2, drop.expand(n, 8, c)), reduce="mean")
        return self.head(self.block(torch.cat([kept, dst], 1)).mean(1))


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@model(FAMILY, (1, 3, 32, 32), int8=True)
class RegisterVit(nn.Module):
    """nn.MultiheadAttention, register tokens, layer scale, SwiGLU, a class token at the end."""

    def __init__(self) -> None:
        super().__init__()
        c = 24
        self.patch, self.cls = nn.Conv2d(3, c, 8, 8), nn.Parameter(torch.randn(1, 3, c))
        self.norm, self.attn = nn.LayerNorm(c), nn.MultiheadAttention(c, 3, batch_first=True)
        self.g1, self.g2 = nn.Parameter(1e-5 * torch.ones(c)), nn.Parameter(1e-5 * torch.ones(c))
        self.rms, self.gate, self.out, self.act = nn.RMSNorm(c), nn.Linear(c, 96), nn.Linear(48, c), QuickGelu()
        self.head = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([x, self.cls.expand(x.shape[0], -1, -1)], 1)
        y = self.norm(x)
        x = x + self.g1 * self.attn(y, y, y, need_weights=False)[0]
        a, b = self.gate(self.rms(x)).chunk(2, -1)
        x = x + self.g2 * self.out(self.act(a) * b)
        return self.head(x[:, -1])
