"""Sound and other signals in one dimension: keyword spotting, separation, heart beats, vibrations, causal networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.registry import add, model

KWS = "keyword spotting"
SIGNALS = "1-D signals"


# -- keyword spotting --------------------------------------------------------------------------------------------------


@model(KWS, (1, 1, 49, 10), int8=True)
class DsCnn(nn.Sequential):
    """Zhang et al. 2017; padding on one side more than on the other."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [
            nn.ZeroPad2d((1, 1, 5, 5)),
            nn.Conv2d(1, 64, (10, 4), 2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
        ]
        for _ in range(4):
            layers += [nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 12))


class TemporalBlock(nn.Module):
    """TC-ResNet's: 9 x 1 convolutions over time."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(i, o, 9, 2, 4, bias=False), nn.Conv1d(o, o, 9, 1, 4, bias=False)
        self.n1, self.n2 = nn.BatchNorm1d(o), nn.BatchNorm1d(o)
        self.skip = nn.Sequential(nn.Conv1d(i, o, 1, 2, bias=False), nn.BatchNorm1d(o), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.n2(self.b(F.relu(self.n1(self.a(x))))) + self.skip(x))


@model(KWS, (1, 40, 98), int8=True)
class TcResNet(nn.Module):
    """Choi et al. 2019: frequencies as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(40, 16, 3, padding=1, bias=False),
            TemporalBlock(16, 24),
            TemporalBlock(24, 32),
            TemporalBlock(32, 48),
            nn.AdaptiveAvgPool1d(1),
        )
        self.head = nn.Conv1d(48, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze(-1)


class Separable(nn.Module):
    def __init__(self, i: int, o: int, k: int, d: int = 1) -> None:
        super().__init__()
        self.depth, self.point = nn.Conv1d(i, i, k, padding=d * (k - 1) // 2, dilation=d, groups=i), nn.Conv1d(i, o, 1)
        self.norm = nn.BatchNorm1d(o, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.point(self.depth(x)))


@model(KWS, (1, 64, 64), int8=True)
class MatchboxNet(nn.Module):
    """Majumdar and Ginsburg 2020: separable convolutions in time, residual with a 1 x 1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(Separable(64, 32, 11), nn.ReLU())
        self.a, self.b, self.skip = (
            Separable(32, 24, 13),
            Separable(24, 24, 13),
            nn.Sequential(nn.Conv1d(32, 24, 1), nn.BatchNorm1d(24)),
        )
        self.tail = nn.Sequential(
            Separable(24, 32, 29, 2), nn.ReLU(), nn.Conv1d(32, 32, 1), nn.BatchNorm1d(32), nn.ReLU()
        )
        self.out = nn.Conv1d(32, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        x = F.relu(self.b(F.relu(self.a(x))) + self.skip(x))
        return F.adaptive_avg_pool1d(self.out(self.tail(x)), 1).flatten(1)


class SubSpectralNorm(nn.Module):
    """Chang et al. 2021: a batch norm for each band of frequencies."""

    def __init__(self, c: int, bands: int) -> None:
        super().__init__()
        self.bands, self.norm = bands, nn.BatchNorm2d(c * bands)

    def forward(self, x: Tensor) -> Tensor:
        n, c, f, t = x.size()
        return self.norm(x.view(n, c * self.bands, f // self.bands, t)).view(n, c, f, t)


class BroadcastBlock(nn.Module):
    """BC-ResNet's: a 2-D path over frequency and a 1-D path over time that is broadcast back."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.f2 = nn.Sequential(nn.Conv2d(c, c, (3, 1), padding=(1, 0), groups=c, bias=False), SubSpectralNorm(c, 5))
        self.f1 = nn.Sequential(
            nn.Conv2d(c, c, (1, 3), padding=(0, 2), dilation=(1, 2), groups=c, bias=False),
            nn.BatchNorm2d(c),
            nn.SiLU(),
            nn.Conv2d(c, c, 1, bias=False),
            nn.Dropout2d(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.f2(x)
        return F.relu(x + y + self.f1(y.mean(2, keepdim=True)))


@model(KWS, (1, 1, 40, 50), int8=True)
class BcResNet(nn.Module):
    """Kim et al. 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, 16, 5, stride=(2, 1), padding=2), nn.BatchNorm2d(16), nn.ReLU())
        self.body, self.out = nn.Sequential(BroadcastBlock(16), BroadcastBlock(16)), nn.Conv2d(16, 12, (5, 1), groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.body(self.head(x)))
        return y.mean(dim=(2, 3))


@model(KWS, (1, 1, 32, 40))
class Kwt(nn.Module):
    """Keyword transformer (Berg et al. 2021): each time step is a token; norm after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.cls, self.place = (
            nn.Linear(40, 24),
            nn.Parameter(torch.randn(1, 1, 24)),
            nn.Parameter(torch.randn(1, 33, 24)),
        )
        layer = nn.TransformerEncoderLayer(24, 2, 48, activation="gelu", batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.squeeze(1))
        x = torch.cat((self.cls.repeat(x.size(0), 1, 1), x), 1) + self.place
        return self.head(self.body(x)[:, 0])


@model(KWS, (1, 1600))
class RawKws(nn.Module):
    """M5 (Dai et al. 2017) on the waveform, after pre-emphasis and standardisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 16, 80, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.MaxPool1d(4),
            nn.Conv1d(16, 32, 3),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.MaxPool1d(4, ceil_mode=True),
        )
        self.head = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1], x[:, 1:] - 0.97 * x[:, :-1]], 1)
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        y = self.body(x.unsqueeze(1))
        return F.log_softmax(self.head(F.avg_pool1d(y, y.shape[-1]).permute(0, 2, 1)), dim=2).squeeze(1)


@model(KWS, (1, 1024))
class LogMel(nn.Module):
    """Features by framing, a window, DFT as two products, power, a mel filter bank, logarithm; then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        n = 128
        angle = 2 * math.pi * torch.outer(torch.arange(n).float(), torch.arange(n // 2 + 1).float()) / n
        self.register_buffer("window", torch.hann_window(n))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("mel", torch.rand(n // 2 + 1, 20))
        self.head = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.unfold(-1, 128, 64) * self.window
        power = (frames @ self.cos).square() + (frames @ self.sin).square()
        return self.head(torch.log(power @ self.mel + 1e-6).mean(1))


@model(KWS, (1, 24, 60))
class EcapaTdnn(nn.Module):
    """Speaker verification (Desplanques et al. 2020): Res2 convolutions, squeeze-excitation, attentive statistics."""

    def __init__(self) -> None:
        super().__init__()
        c = 32
        self.head = nn.Sequential(nn.Conv1d(24, c, 5, padding=2), nn.ReLU(), nn.BatchNorm1d(c))
        self.res = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=2, dilation=2) for _ in range(3))
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool1d(1), nn.Conv1d(c, 8, 1), nn.ReLU(), nn.Conv1d(8, c, 1), nn.Sigmoid()
        )
        self.attend = nn.Sequential(
            nn.Conv1d(3 * c, 16, 1), nn.ReLU(), nn.Tanh(), nn.Conv1d(16, c, 1), nn.Softmax(dim=2)
        )
        self.out = nn.Sequential(nn.BatchNorm1d(2 * c), nn.Linear(2 * c, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        parts = list(torch.split(x, 8, 1))
        for i, layer in enumerate(self.res):
            parts[i + 1] = F.relu(layer(parts[i + 1] + parts[i] if i else parts[i + 1]))
        y = torch.cat(parts, 1)
        x = x + y * self.se(y)
        t = x.size(-1)
        mean, std = (
            torch.mean(x, 2, keepdim=True).repeat(1, 1, t),
            torch.sqrt(torch.var(x, 2, keepdim=True).clamp(1e-4)).repeat(1, 1, t),
        )
        w = self.attend(torch.cat((x, mean, std), 1))
        mu = torch.sum(x * w, dim=2)
        sg = torch.sqrt((torch.sum((x**2) * w, dim=2) - mu**2).clamp(min=1e-4))
        return F.normalize(self.out(torch.cat((mu, sg), 1)))


# -- signals -----------------------------------------------------------------------------------------------------------


class CausalConv(nn.Conv1d):
    """Sees the past only: zeros on the left."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


@model(SIGNALS, (1, 1, 64), small=True)
class WaveNet(nn.Module):
    """Van den Oord et al. 2016: gated causal convolutions, dilation doubling, skips summed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = CausalConv(1, 12, 2)
        self.gates = nn.ModuleList(CausalConv(12, 24, 2, dilation=2**i) for i in range(4))
        self.skips, self.rests = (nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(4)) for _ in range(2))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(12, 16, 1), nn.ReLU(), nn.Conv1d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        total = torch.zeros_like(x)
        for gate, skip, rest in zip(self.gates, self.skips, self.rests):
            a, b = gate(x).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(y)
            x = x + rest(y)
        return self.out(total)


class Chomp(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.n].contiguous()


class TcnBlock(nn.Module):
    """Bai et al. 2018, with weight norm, which is computed when the network runs."""

    def __init__(self, i: int, o: int, d: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.net = nn.Sequential(
            norm(nn.Conv1d(i, o, 3, padding=2 * d, dilation=d)),
            Chomp(2 * d),
            nn.ReLU(),
            nn.Dropout(0.2),
            norm(nn.Conv1d(o, o, 3, padding=2 * d, dilation=d)),
            Chomp(2 * d),
            nn.ReLU(),
        )
        self.skip = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x) + (x if self.skip is None else self.skip(x)))


@model(SIGNALS, (1, 4, 48), int8=True)
class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Sequential(TcnBlock(4, 16, 1), TcnBlock(16, 16, 2), TcnBlock(16, 16, 4)),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, :, -1])


@model(SIGNALS, (1, 12, 256), int8=True)
class EcgResNet(nn.Module):
    """Twelve leads (Ribeiro et al. 2020): long kernels, max-pooled shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv1d(12, 16, 17, padding=8, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.a, self.n1 = nn.Conv1d(16, 32, 17, padding=8, bias=False), nn.BatchNorm1d(32)
        self.b, self.skip = (
            nn.Conv1d(32, 32, 17, 4, padding=7, bias=False),
            nn.Sequential(nn.MaxPool1d(4), nn.Conv1d(16, 32, 1)),
        )
        self.n2, self.out = nn.BatchNorm1d(32), nn.Linear(32 * 64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = self.b(F.relu(self.n1(self.a(x)))) + self.skip(x)
        return torch.sigmoid(self.out(F.relu(self.n2(y)).flatten(1)))


add(
    "har_cnn",
    SIGNALS,
    lambda: nn.Sequential(
        nn.Conv1d(6, 32, 5, padding="same"),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 32, 5, dilation=2, padding=4, groups=4),
        nn.BatchNorm1d(32),
        nn.GELU(),
        nn.AvgPool1d(2),
        nn.Conv1d(32, 64, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 6),
    ),
    (1, 6, 64),
    int8=True,
    small=True,
)
add(
    "vibration_autoencoder",
    SIGNALS,
    lambda: nn.Sequential(
        nn.Conv1d(3, 8, 8, 4, 2),
        nn.Tanh(),
        nn.Conv1d(8, 4, 4, 2, 1),
        nn.Tanh(),
        nn.ConvTranspose1d(4, 8, 4, 2, 1),
        nn.Tanh(),
        nn.ConvTranspose1d(8, 3, 8, 4, 2),
    ),
    (1, 3, 64),
)


class GlobalNorm(nn.Module):
    """Conv-TasNet's: over channels and time."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, c, 1)), nn.Parameter(torch.zeros(1, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        var = torch.pow(x - mean, 2).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        return self.gamma * (x - mean) / torch.pow(var + 1e-8, 0.5) + self.beta


@model(SIGNALS, (1, 320))
class ConvTasNet(nn.Module):
    """Luo and Mesgarani 2019: a learned transform, masks for two speakers, its inverse by transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.norm, self.enter = nn.Conv1d(1, 32, 16, 8, bias=False), GlobalNorm(32), nn.Conv1d(32, 16, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(16, 24, 1),
                nn.PReLU(),
                GlobalNorm(24),
                nn.Conv1d(24, 24, 3, padding=d, dilation=d, groups=24),
                nn.PReLU(),
                GlobalNorm(24),
                nn.Conv1d(24, 16, 1),
            )
            for d in (1, 2, 4)
        )
        self.mask, self.decode = nn.Conv1d(16, 64, 1), nn.ConvTranspose1d(32, 1, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = F.relu(self.encode(x.unsqueeze(1)))
        y = self.enter(self.norm(w))
        for block in self.blocks:
            y = y + block(y)
        n, _, t = y.shape
        mask = torch.sigmoid(self.mask(y)).view(n, 2, 32, t)
        parts = (w.unsqueeze(1) * mask).view(n * 2, 32, t)
        return self.decode(parts).view(n, 2, -1)


@model(SIGNALS, (1, 1, 256))
class Demucs(nn.Module):
    """Defossez et al. 2019 in small: gated linear units, an LSTM in the middle, cropped skips."""

    def __init__(self) -> None:
        super().__init__()
        self.e1 = nn.Sequential(nn.Conv1d(1, 8, 8, 4), nn.ReLU(), nn.Conv1d(8, 16, 1), nn.GLU(1))
        self.e2 = nn.Sequential(nn.Conv1d(8, 16, 8, 4), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.GLU(dim=1))
        self.lstm = nn.LSTM(16, 16, 1)
        self.d2, self.d1 = nn.ConvTranspose1d(16, 8, 8, 4), nn.ConvTranspose1d(8, 1, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.e1(x)
        b = self.e2(a)
        y, _ = self.lstm(b.permute(2, 0, 1))
        y = F.relu(self.d2(b + y.permute(1, 2, 0)))
        return self.d1(y + a[..., : y.shape[-1]])


@model(SIGNALS, (1, 3, 64), int8=True)
class InceptionTime(nn.Module):
    """Fawaz et al. 2020: kernels of several lengths side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv1d(3, 8, 1, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(8, 8, k, padding=k // 2, bias=False) for k in (9, 19, 39))
        self.pooled, self.norm, self.head = nn.Conv1d(3, 8, 1, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.squeeze(x)
        y = torch.cat([*(c(z) for c in self.convs), self.pooled(F.max_pool1d(x, 3, 1, 1))], 1)
        return self.head(F.relu(self.norm(y)).mean(-1))


@model(SIGNALS, (1, 1, 128), small=True)
class StreamingConv(nn.Module):
    """Kernels padded by `replicate`, `reflect` and `circular`, nearest and linear interpolation in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 8, 5, padding=2, padding_mode="replicate")
        self.b = nn.Conv1d(8, 8, 5, padding=2, padding_mode="reflect", stride=2)
        self.c = nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.silu(self.b(F.silu(self.a(x)))), scale_factor=2, mode="linear", align_corners=False)
        return F.interpolate(self.c(y), size=96, mode="nearest")


@model(SIGNALS, (1, 2, 200))
class SincNet(nn.Module):
    """Ravanelli and Bengio 2018: band-pass filters made from two learned frequencies each time the network runs."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.band = nn.Parameter(torch.rand(6, 1) * 0.2), nn.Parameter(torch.rand(6, 1) * 0.2 + 0.02)
        self.register_buffer("n", torch.arange(-12.0, 13).view(1, -1))
        self.register_buffer("window", torch.hamming_window(25, periodic=False))
        self.out = nn.Conv1d(12, 5, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low.abs()
        high = torch.clamp(low + self.band.abs(), max=0.5)
        filters = (2 * high * torch.sinc(2 * high * self.n) - 2 * low * torch.sinc(2 * low * self.n)) * self.window
        y = F.conv1d(x.reshape(-1, 1, x.shape[-1]), filters.unsqueeze(1), padding=12)
        return self.out(F.layer_norm(y.view(x.shape[0], 12, -1).abs(), (200,))).amax(-1)


@model(SIGNALS, (1, 8, 64))
class QuartzAttention(nn.Module):
    """Conformer's block (Gulati et al. 2020): half feed-forward, attention, a gated convolution, half feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        d = 16
        self.enter = nn.Conv1d(8, d, 3, 4, 1)
        self.f1, self.f2 = (
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 32), nn.SiLU(), nn.Linear(32, d)) for _ in range(2)
        )
        self.n1, self.attn, self.n2 = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True), nn.LayerNorm(d)
        self.conv = nn.Sequential(
            nn.Conv1d(d, 2 * d, 1),
            nn.GLU(1),
            nn.Conv1d(d, d, 7, padding=3, groups=d),
            nn.BatchNorm1d(d),
            nn.SiLU(),
            nn.Conv1d(d, d, 1),
        )
        self.out = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x).transpose(1, 2)
        x = x + 0.5 * self.f1(x)
        y = self.n1(x)
        y, weights = self.attn(y, y, y)
        x = x + y
        x = x + self.conv(self.n2(x).transpose(1, 2)).transpose(1, 2)
        return self.out(x + 0.5 * self.f2(x)), weights
