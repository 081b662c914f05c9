"""Sequences and tables: state-space blocks, time series, tabular networks, recommenders, experts, KAN."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.registry import Draw, add, flags, ids, model

SSM = "state space"
SERIES = "time series"
TABLES = "tables and recommendation"
OTHER = "other transformers and MLPs"


def lengths(most: int, *shape: int) -> Draw:
    """Whole numbers in 1..most."""
    return lambda generator: torch.randint(1, most + 1, shape, generator=generator)


# -- state space -------------------------------------------------------------------------------------------------------


class Mamba(nn.Module):
    """Gu and Dao 2023: selective scan as a loop over steps, or by cumulated sums of logarithms."""

    def __init__(self, loop: bool, d: int = 16, n: int = 4) -> None:
        super().__init__()
        e = 2 * d
        self.norm, self.enter, self.conv = (
            nn.RMSNorm(d),
            nn.Linear(d, 2 * e, bias=False),
            nn.Conv1d(e, e, 4, groups=e, padding=3),
        )
        self.x, self.dt, self.out = nn.Linear(e, 2 * n + 4, bias=False), nn.Linear(4, e), nn.Linear(e, d, bias=False)
        self.a_log = nn.Parameter(torch.log(torch.arange(1, n + 1).float()).repeat(e, 1))
        self.d, self.n, self.loop = nn.Parameter(torch.ones(e)), n, loop

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        u, z = self.enter(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :steps]).transpose(1, 2)
        dt, b, c = self.x(u).split([4, self.n, self.n], -1)
        dt, a = F.softplus(self.dt(dt)), -torch.exp(self.a_log)
        grow = dt.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
        if self.loop:
            decay = torch.exp(dt.unsqueeze(-1) * a)
            h, found = torch.zeros_like(decay[:, 0]), []
            for t in range(steps):
                h = decay[:, t] * h + grow[:, t]
                found.append((h * c[:, t].unsqueeze(1)).sum(-1))
            y = torch.stack(found, 1)
        else:
            s = torch.cumsum(0.05 * dt.unsqueeze(-1) * a, 1)
            y = (torch.exp(s) * torch.cumsum(grow * torch.exp(-s), 1) * c.unsqueeze(2)).sum(-1)
        return x + self.out((y + u * self.d) * F.silu(z))


add("mamba_loop", SSM, lambda: Mamba(True), (1, 12, 16))
add("mamba_cumsum", SSM, lambda: Mamba(False), (1, 12, 16), small=True)


@model(SSM, (1, 32, 8))
class S4d(nn.Module):
    """Gu et al. 2022: the kernel of a diagonal state space, complex numbers as two real ones; convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.log_dt, self.re, self.im = (
            nn.Parameter(torch.randn(8) * 0.3 - 2),
            nn.Parameter(torch.zeros(8, 6)),
            nn.Parameter(torch.rand(8, 6) * 3),
        )
        self.c, self.d, self.out = nn.Parameter(torch.randn(8, 6, 2)), nn.Parameter(torch.randn(8)), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        dt = self.log_dt.exp()[:, None]
        k = torch.arange(n)
        size = torch.exp(-torch.exp(self.re)[..., None] * dt[..., None] * k)
        turn = (self.im * dt)[..., None] * k
        kernel = 2 * (size * (self.c[..., 0, None] * turn.cos() - self.c[..., 1, None] * turn.sin())).sum(1)
        u = x.transpose(1, 2)
        y = F.conv1d(F.pad(u, (n - 1, 0)), kernel.flip(-1).unsqueeze(1), groups=8) + u * self.d[:, None]
        return F.glu(self.out(F.gelu(y).transpose(1, 2)), dim=-1)


@model(SSM, (1, 32, 8))
class S4dFft(nn.Module):
    """The same convolution by way of the frequencies, with complex numbers, as the authors write it."""

    def __init__(self) -> None:
        super().__init__()
        self.log_dt, self.re, self.im = (
            nn.Parameter(torch.randn(8) * 0.3 - 2),
            nn.Parameter(torch.zeros(8, 6)),
            nn.Parameter(torch.rand(8, 6) * 3),
        )
        self.c, self.d = nn.Parameter(torch.randn(8, 6, 2)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        a = torch.complex(-torch.exp(self.re), self.im) * self.log_dt.exp()[:, None]
        kernel = (
            2
            * torch.einsum("hn,hnl->hl", torch.view_as_complex(self.c), torch.exp(a[..., None] * torch.arange(n))).real
        )
        u = x.transpose(1, 2)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)[..., :n]
        return (y + u * self.d[:, None]).transpose(1, 2)


@model(SSM, (1, 12, 16))
class RetNet(nn.Module):
    """Sun et al. 2023: retention in its parallel form, group norm of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvg, self.out, self.norm = nn.Linear(16, 64), nn.Linear(16, 16), nn.GroupNorm(4, 16)
        self.register_buffer("decay", 1 - 2.0 ** (-3 - torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v, g = self.qkvg(x).split(d, -1)
        q, k, v = (z.view(b, t, 4, d // 4).transpose(1, 2) for z in (q, k, v))
        i = torch.arange(t)
        far = (i[:, None] - i[None]).clamp(min=0)
        mask = torch.tril(self.decay.view(-1, 1, 1) ** far)
        y = ((q @ k.mT) * mask @ v).transpose(1, 2).reshape(b * t, d)
        return self.out(F.silu(g) * self.norm(y).view(b, t, d))


@model(SSM, (1, 10, 16))
class RwkvMix(nn.Module):
    """Peng et al. 2023: shift by a step, numerically stable recurrence with running maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix, self.w, self.u = (
            nn.Parameter(torch.rand(3, 16)),
            nn.Parameter(torch.rand(16)),
            nn.Parameter(torch.rand(16)),
        )
        self.k, self.v, self.r, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        last = self.shift(x)
        k, v, r = (f(x * m + last * (1 - m)) for f, m in zip((self.k, self.v, self.r), self.mix))
        n, d = torch.zeros(x.shape[0], 16), torch.zeros(x.shape[0], 16)
        top, w, found = torch.full((x.shape[0], 16), -1e38), -torch.exp(self.w), []
        for t in range(x.shape[1]):
            q = torch.maximum(top, self.u + k[:, t])
            e1, e2 = torch.exp(top - q), torch.exp(self.u + k[:, t] - q)
            found.append((e1 * n + e2 * v[:, t]) / (e1 * d + e2))
            q = torch.maximum(top + w, k[:, t])
            e1, e2 = torch.exp(top + w - q), torch.exp(k[:, t] - q)
            n, d, top = e1 * n + e2 * v[:, t], e1 * d + e2, q
        return self.out(torch.sigmoid(r) * torch.stack(found, 1))


@model(SSM, (1, 12, 16))
class LinearAttention(nn.Module):
    """Katharopoulos et al. 2020, causal, by cumulated sums of outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("btd,bte->btde", k, v).cumsum(1)
        z = 1 / (torch.einsum("btd,btd->bt", q, k.cumsum(1)) + 1e-6)
        return self.out(torch.einsum("btd,btde,bt->bte", q, kv, z))


# -- time series -------------------------------------------------------------------------------------------------------


@model(SERIES, (1, 48, 5))
class Informer(nn.Module):
    """Distilling between encoder layers: convolution, ELU, max pool; periods of day and year from sines."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Conv1d(5, 16, 3, padding=1, padding_mode="circular", bias=False)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=F.gelu)
        self.a, self.b = layer, nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.distil, self.norm, self.out = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.Linear(24 * 16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.value(x.permute(0, 2, 1)).transpose(1, 2))
        x = F.max_pool1d(F.elu(self.norm(self.distil(x.permute(0, 2, 1)))), 3, 2, 1).transpose(1, 2)
        return self.out(self.b(x).flatten(1))


@model(SERIES, (1, 48, 5), small=True)
class DLinear(nn.Module):
    """Zeng et al. 2023: a moving average of the padded series is the trend."""

    def __init__(self) -> None:
        super().__init__()
        self.season, self.trend = nn.Linear(48, 12), nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        front, end = x[:, 0:1].repeat(1, 12, 1), x[:, -1:].repeat(1, 12, 1)
        trend = F.avg_pool1d(torch.cat([front, x, end], 1).permute(0, 2, 1), 25, 1)
        rest = x.permute(0, 2, 1) - trend
        return (self.season(rest) + self.trend(trend)).permute(0, 2, 1)


@model(SERIES, (1, 48), small=True)
class NBeats(nn.Module):
    """Oreshkin et al. 2020: blocks subtract what they explain and add what they forecast."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 60)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 12)
        for block in self.blocks:
            back, ahead = torch.split(block(x), [48, 12], -1)
            x, y = x - back, y + ahead
        return y


@model(SERIES, (1, 40, 4))
class PatchTst(nn.Module):
    """Nie et al. 2023: channels apart, patches by unfold, reversible instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.place = nn.Linear(8, 16), nn.Parameter(torch.randn(9, 16))
        self.body, self.out = (
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True),
            nn.Linear(144, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True).detach()
        std = torch.sqrt(torch.var(x, 1, keepdim=True, unbiased=False) + 1e-5)
        z = ((x - mean) / std).transpose(1, 2).unfold(-1, 8, 4)
        b, c, n, p = z.shape
        y = self.body(self.enter(z.reshape(b * c, n, p)) + self.place)
        return self.out(y.reshape(b, c, -1)).transpose(1, 2) * std + mean


@model(SERIES, (1, 32, 6))
class TimesNet(nn.Module):
    """Wu et al. 2023: the series folded into two dimensions by fixed periods, 2-D convolutions, weights by softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.weight = (
            nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 6, 3, padding=1)),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        found = []
        for period in (4, 7, 12):
            n = -(-t // period)
            y = F.pad(x, (0, 0, 0, n * period - t)).reshape(b, n, period, c).permute(0, 3, 1, 2)
            found.append(self.conv(y).permute(0, 2, 3, 1).reshape(b, -1, c)[:, :t])
        w = self.weight(x.mean(1)).softmax(-1)
        return (torch.stack(found, -1) * w[:, None, None]).sum(-1) + x


@model(SERIES, (1, 32, 4))
class AutoCorrelation(nn.Module):
    """Autoformer (Wu et al. 2021): correlation by FFT, the best delays, the series rolled by them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).transpose(1, 2) for f in (self.q, self.k, self.v))
        corr = torch.fft.irfft(torch.fft.rfft(q, dim=-1) * torch.conj(torch.fft.rfft(k, dim=-1)), n=q.shape[-1])
        mean = corr.mean(1)
        weights, delays = torch.topk(mean, 3, dim=-1)
        weights = torch.softmax(weights, -1)
        index = torch.arange(q.shape[-1]).view(1, 1, -1)
        y = torch.zeros_like(v)
        for i in range(3):
            at = (index + delays[:, i].view(-1, 1, 1)) % q.shape[-1]
            y = y + torch.gather(v, -1, at.expand_as(v)) * weights[:, i].view(-1, 1, 1)
        return y.transpose(1, 2)


@model(SERIES, (1, 12, 6), lengths(12, 1))
class MaskedMean(nn.Module):
    """Lengths of sequences as an input: a mask from arange, a masked softmax and mean, the last valid step."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.out = nn.Linear(6, 1), nn.Linear(18, 4)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        valid = torch.arange(x.shape[1])[None] < length[:, None]
        w = self.score(x).squeeze(-1).masked_fill(~valid, float("-inf")).softmax(-1)
        mean = (x * valid.unsqueeze(-1)).sum(1) / length.unsqueeze(1)
        last = x.gather(1, (length - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)
        return self.out(torch.cat([torch.bmm(w.unsqueeze(1), x).squeeze(1), mean, last], -1))


# -- tables and recommendation -----------------------------------------------------------------------------------------


@model(TABLES, ids(10, 1, 4), (1, 5))
class TabTransformer(nn.Module):
    """Huang et al. 2020: columns of categories as tokens, offsets added to their codes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, 16), nn.LayerNorm(5)
        self.register_buffer("offset", torch.arange(4) * 10)
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        )
        self.out = nn.Sequential(nn.Linear(69, 16), nn.SELU(), nn.Linear(16, 1))

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        y = self.body(self.embed(codes + self.offset)).flatten(1)
        return torch.sigmoid(self.out(torch.cat([y, self.norm(numbers)], 1))).squeeze(-1)


@model(TABLES, ids(10, 1, 3), (1, 4))
class FtTransformer(nn.Module):
    """Gorishniy et al. 2021: numbers become tokens too; ReGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.weight, self.bias = (
            nn.Embedding(10, 16),
            nn.Parameter(torch.randn(4, 16)),
            nn.Parameter(torch.randn(4, 16)),
        )
        self.cls, self.attn, self.n1, self.n2 = (
            nn.Parameter(torch.randn(16)),
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.LayerNorm(16),
            nn.LayerNorm(16),
        )
        self.up, self.down, self.out = nn.Linear(16, 48), nn.Linear(24, 16), nn.Linear(16, 2)

    def forward(self, codes: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat(
            [self.cls.expand(codes.shape[0], 1, 16), numbers[..., None] * self.weight + self.bias, self.embed(codes)], 1
        )
        y = self.n1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        a, b = self.up(self.n2(x)).chunk(2, -1)
        x = x + self.down(a * F.relu(b))
        return self.out(x[:, 0])


@model(TABLES, (1, 4), ids(20, 1, 6), ids(20, 1, 3))
class Dlrm(nn.Module):
    """Naumov et al. 2019: embedding bags, dot products of all pairs, MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.EmbeddingBag(20, 8, mode="sum"), nn.EmbeddingBag(20, 8, mode="mean")
        self.bottom, self.top = (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
            nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 1)),
        )

    def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = self.bottom(x)
        z = torch.stack([x, self.a(a), self.b(b)], 1)
        pairs = torch.bmm(z, z.transpose(1, 2))
        i, j = torch.tril_indices(3, 3, offset=-1)
        return torch.sigmoid(self.top(torch.cat([x, pairs[:, i, j]], 1)))


@model(TABLES, ids(30, 1, 8, dtype=torch.int32), small=True)
class DeepFm(nn.Module):
    """Guo et al. 2017: factorisation machine beside an MLP; 32-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.embed, self.mlp = (
            nn.Embedding(30, 1),
            nn.Embedding(30, 6),
            nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x)
        pairs = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        return torch.sigmoid(self.first(x).sum(1) + pairs + self.mlp(e.flatten(1)))


@model(TABLES, ids(25, 1, 10), ids(25, 1))
class DinAttention(nn.Module):
    """Zhou et al. 2018: what was clicked, weighed by what is offered; zero is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(25, 8, padding_idx=0)
        self.score, self.out = nn.Sequential(nn.Linear(32, 12), nn.PReLU(), nn.Linear(12, 1)), nn.Linear(16, 1)

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        h, q = self.embed(history), self.embed(item)
        e = q.unsqueeze(1).expand_as(h)
        s = self.score(torch.cat([h, e, h - e, h * e], -1)).squeeze(-1)
        s = torch.where(history == 0, torch.full_like(s, -1e9), s)
        return self.out(torch.cat([(s.softmax(-1).unsqueeze(-1) * h).sum(1), q], -1))


@model(TABLES, (1, 12))
class TabNet(nn.Module):
    """Arik and Pfister 2021: sequential masks by sparsemax, which sorts and cumulates; ghost norms as plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.masks = (
            nn.BatchNorm1d(12),
            nn.ModuleList(nn.Sequential(nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12)) for _ in range(2)),
        )
        self.steps, self.out = (
            nn.ModuleList(nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.GLU()) for _ in range(3)),
            nn.Linear(8, 3),
        )

    @staticmethod
    def sparsemax(z: Tensor) -> Tensor:
        z = z - z.max(-1, keepdim=True)[0]
        s, _ = torch.sort(z, descending=True, dim=-1)
        k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
        total = s.cumsum(-1)
        size = (1 + k * s > total).sum(-1, keepdim=True)
        tau = (total.gather(-1, size - 1) - 1) / size.to(z.dtype)
        return torch.clamp(z - tau, min=0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        prior, total, y = torch.ones_like(x), torch.zeros(x.shape[0], 8), self.steps[0](x)[:, 8:]
        for mask, step in zip(self.masks, list(self.steps)[1:]):
            m = self.sparsemax(prior * mask(y))
            prior = prior * (1.3 - m)
            d, y = step(m * x).chunk(2, -1)
            total = total + F.relu(d)
        return self.out(total)


# -- other -------------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Every expert runs; the gates of all but the best two are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(16, 4),
            nn.Parameter(torch.randn(4, 16, 24) * 0.2),
            nn.Parameter(torch.randn(4, 24, 16) * 0.2),
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).topk(2, -1)
        gates = torch.zeros(*x.shape[:-1], 4).scatter(-1, index, weights.softmax(-1))
        h = F.gelu(torch.einsum("btd,edf->btef", x, self.up))
        return torch.einsum("btef,efd,bte->btd", h, self.down, gates)


add("mixture_of_experts", OTHER, Experts, (1, 6, 16))


@model(OTHER, (1, 5, 16))
class SwitchExperts(nn.Module):
    """Fedus et al. 2021: the weights of one expert are gathered for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.w = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 16) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        p, e = self.gate(x).softmax(-1).max(-1)
        return torch.matmul(x.unsqueeze(-2), self.w[e]).squeeze(-2) * p.unsqueeze(-1)


@model(OTHER, (1, 6))
class Kan(nn.Module):
    """Liu et al. 2024: B-splines on each edge by the recursion of Cox and de Boor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2.2, 2.2, 12).expand(6, 12).contiguous())
        self.base, self.spline = nn.Linear(6, 4, bias=False), nn.Parameter(torch.randn(4, 6, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y, g = x.clamp(-1.2, 1.2).unsqueeze(-1), self.grid
        b = ((y >= g[:, :-1]) & (y < g[:, 1:])).to(x.dtype)
        for k in range(1, 4):
            low = (y - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)])
            high = (g[:, k + 1 :] - y) / (g[:, k + 1 :] - g[:, 1:(-k)])
            b = low * b[:, :, :-1] + high * b[:, :, 1:]
        return self.base(F.silu(x)) + F.linear(b.flatten(1), self.spline.flatten(1))


@model(OTHER, (1, 32, 3), small=True)
class Nerf(nn.Module):
    """Mildenhall et al. 2020: sines and cosines of places, a skip, density and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(27, 32), nn.Linear(59, 32)
        self.density, self.colour = nn.Linear(32, 1), nn.Sequential(nn.Linear(32, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        angle = (x[..., None] * 2.0 ** torch.arange(4)).flatten(-2)
        x = torch.cat([x, torch.sin(angle), torch.cos(angle)], -1)
        h = F.relu(self.b(torch.cat([F.relu(self.a(x)), x], -1)))
        return torch.cat([self.colour(h), F.softplus(self.density(h) - 1)], -1)


@model(OTHER, (1, 64, 2))
class Siren(nn.Module):
    """Sitzmann et al. 2020: sines as activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = torch.sin(3 * layer(x))
        return self.layers[-1](x)


@model(OTHER, (1, 16, 2), (1, 16, 3))
class VolumeRender(nn.Module):
    """The sum along a ray: transmittance by cumprod of what is left, with exclusive shift."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 4)

    def forward(self, places: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(torch.cat([places, views], -1))
        alpha = 1 - torch.exp(-F.relu(y[..., 3]) * 0.5)
        left = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha + 1e-10], -1), -1)[:, :-1]
        w = alpha * left
        return (w[..., None] * torch.sigmoid(y[..., :3])).sum(1), (w * torch.linspace(0, 1, 16)).sum(-1)


@model(OTHER, (1, 12, 16), flags(1, 12))
class RotaryBlock(nn.Module):
    """Rotary places by halves, grouped-query attention, a mask of truth values, SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        f = torch.outer(torch.arange(12.0), 1e4 ** -(torch.arange(0, 4, 2) / 4))
        self.register_buffer("cos", torch.cat([f, f], -1).cos())
        self.register_buffer("sin", torch.cat([f, f], -1).sin())

    def turn(self, x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.turn(self.q(x).view(b, t, 4, 4).transpose(1, 2))
        k, v = self.kv(x).view(b, t, 4, 4).transpose(1, 2).chunk(2, 1)
        k, v = self.turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


@model(OTHER, (1, 10, 16), (1, 2, 4, 6), (1, 2, 4, 6))
class CachedAttention(nn.Module):
    """A step of decoding in chunks: causal SDPA over a cache that is an input, and the grown cache as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 36), nn.Linear(12, 16)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, a, b = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 6).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([k, a], 2), torch.cat([v, b], 2)
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2)), k, v


@model(OTHER, (1, 16, 12))
class Performer(nn.Module):
    """Choromanski et al. 2021: random positive features."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.register_buffer("random", torch.randn(12, 10))

    def feature(self, x: Tensor) -> Tensor:
        y = x @ self.random - x.square().sum(-1, keepdim=True) / 2
        return torch.exp(y - y.amax((-1, -2), keepdim=True)) + 1e-4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z / 12**0.25 for z in self.qkv(x).chunk(3, -1))
        q, k = self.feature(q), self.feature(k)
        return q @ (k.transpose(1, 2) @ v) / (q @ k.sum(1).unsqueeze(-1))


@model(OTHER, (1, 32, 8))
class Perceiver(nn.Module):
    """Jaegle et al. 2021: learned latents attend to the input and to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 16))
        self.cross, self.own = (
            nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True),
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        )
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        return self.out(self.own(y + self.cross(y, x, x)[0]).mean(1))


@model(OTHER, (1, 10, 8), flags(1, 10), small=True)
class SetTransformer(nn.Module):
    """Pooling by attention with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.seed, self.attn, self.out = (
            nn.Linear(8, 12),
            nn.Parameter(torch.randn(1, 2, 12)),
            nn.MultiheadAttention(12, 3, batch_first=True),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        y, _ = self.attn(self.seed.expand(x.shape[0], 2, 12), x, x, key_padding_mask=~valid)
        return self.out(y.flatten(1))


@model(OTHER, (1, 64))
class HyperNetwork(nn.Module):
    """Weights of a layer made from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.bias = nn.Linear(32, 32 * 6), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x, z = x.tensor_split(2, dim=-1)
        return torch.baddbmm(
            self.bias(z).unsqueeze(1), x.unsqueeze(1), self.make(z).view(-1, 32, 6) / math.sqrt(32)
        ).squeeze(1)


@model(OTHER, (1, 20), (1, 20))
class SiameseText(nn.Module):
    """Two inputs through one tower: cosine, distance, and a comparison as truth value and whole number."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a, b = self.tower(a), self.tower(b)
        cosine = F.cosine_similarity(a, b)
        return cosine, F.pairwise_distance(a, b), cosine > 0.5, (a > b).sum(-1)
