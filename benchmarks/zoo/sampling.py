"""Sampling at computed places, deformable convolution, filters of frequencies, adder networks, few bits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.dense import conv, conv_bn
from benchmarks.zoo.registry import add, model

SAMPLING = "sampling and deformation"
FREQUENCY = "frequency filters"
ADDERS = "adders and few bits"


@model(SAMPLING, (1, 3, 16, 16), small=True)
class GridSample(nn.Module):
    """Offsets from a convolution, added to a regular grid."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.conv = conv(3, 2), conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        move = torch.tanh(self.offset(x)).permute(0, 2, 3, 1) * 0.1
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        grid = torch.stack([xs, ys], -1).unsqueeze(0) + move
        return self.conv(F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False))


class Sampler(nn.Module):
    """grid_sample with one set of its options, at places that lie partly outside."""

    def __init__(self, mode: str, padding: str, corners: bool) -> None:
        super().__init__()
        self.mode, self.padding, self.corners = mode, padding, corners
        self.where = conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.where(x).permute(0, 2, 3, 1)
        return F.grid_sample(x, grid, mode=self.mode, padding_mode=self.padding, align_corners=self.corners)


for _mode, _padding, _corners in (
    ("bilinear", "border", True),
    ("nearest", "zeros", False),
    ("bilinear", "reflection", False),
    ("bicubic", "zeros", True),
):
    add(
        f"grid_{_mode}_{_padding}",
        SAMPLING,
        lambda m=_mode, p=_padding, c=_corners: Sampler(m, p, c),
        (1, 3, 12, 10),
    )


@model(SAMPLING, (1, 1, 28, 28))
class SpatialTransformer(nn.Module):
    """Jaderberg et al. 2015: affine_grid and grid_sample before a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(
            nn.Conv2d(1, 8, 7), nn.MaxPool2d(2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(968, 6)
        )
        self.body, self.head = nn.Sequential(nn.Conv2d(1, 10, 5, stride=2), nn.ReLU()), nn.Linear(1440, 10)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x).view(-1, 2, 3) * 0.3 + torch.eye(2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        return self.head(self.body(F.grid_sample(x, grid, align_corners=False)).flatten(1))


@model(SAMPLING, (1, 3, 12, 12))
class DeformableGrid(nn.Module):
    """Deformable convolution (v2) by one grid_sample for each tap."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.mask = conv(3, 18), conv(3, 9)
        self.weight = nn.Parameter(torch.randn(8, 3, 9) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        offset, mask = self.offset(x).view(n, 9, 2, h, w) * 0.5, torch.sigmoid(self.mask(x))
        ys, xs = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
        y = torch.zeros(n, 8, h, w)
        for k in range(9):
            py, px = ys + k // 3 - 1 + offset[:, k, 0], xs + k % 3 - 1 + offset[:, k, 1]
            grid = torch.stack([2 * px / (w - 1) - 1, 2 * py / (h - 1) - 1], -1)
            tap = F.grid_sample(x, grid, align_corners=True) * mask[:, k : k + 1]
            y = y + torch.einsum("oc,nchw->nohw", self.weight[:, :, k], tap)
        return y


@model(SAMPLING, (1, 3, 10, 12))
class DeformableGather(nn.Module):
    """The same by floor, clamp and gather of the four neighbours, as before there was an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.conv = conv(3, 18), nn.Conv2d(3, 6, 3, stride=3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        offset = self.offset(x) * 0.5
        ky, kx = torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")
        y0, x0 = torch.meshgrid(torch.arange(1, h + 1), torch.arange(1, w + 1), indexing="ij")
        p = torch.cat([ky.flatten().view(1, 9, 1, 1) + y0, kx.flatten().view(1, 9, 1, 1) + x0], 1).float() + offset
        p = p.permute(0, 2, 3, 1)
        padded = F.pad(x, (1, 1, 1, 1))
        height, width = h + 2, w + 2
        top = p.detach().floor()
        low = torch.cat([top[..., :9].clamp(0, height - 1), top[..., 9:].clamp(0, width - 1)], -1).long()
        high = torch.cat([(top[..., :9] + 1).clamp(0, height - 1), (top[..., 9:] + 1).clamp(0, width - 1)], -1).long()
        p = torch.cat([p[..., :9].clamp(0, height - 1), p[..., 9:].clamp(0, width - 1)], -1)

        def taken(qy: Tensor, qx: Tensor) -> Tensor:
            index = (qy * width + qx).unsqueeze(1).expand(-1, c, -1, -1, -1).reshape(n, c, -1)
            return padded.flatten(2).gather(-1, index).view(n, c, h, w, 9)

        total = torch.zeros(n, c, h, w, 9)
        for qy in (low, high):
            for qx in (low, high):
                a, b = qy[..., :9], qx[..., 9:]
                g = (1 - (p[..., :9] - a).abs()).clamp(min=0) * (1 - (p[..., 9:] - b).abs()).clamp(min=0)
                total = total + g.unsqueeze(1) * taken(a, b)
        total = torch.cat([total[..., s : s + 3].contiguous().view(n, c, h, w * 3) for s in range(0, 9, 3)], -1)
        return self.conv(total.contiguous().view(n, c, h * 3, w * 3))


@model(SAMPLING, (1, 3, 16, 16))
class SteppedWarp(nn.Module):
    """A flow enlarged with scale, then backward warping of features twice."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.flow = conv(3, 6), conv(6, 2, stride=2)
        xs, ys = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="xy")
        self.register_buffer("base", torch.stack((xs, ys), 0).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        f = self.features(x)
        for _ in range(2):
            flow = F.interpolate(self.flow(f), size=(16, 16), mode="bilinear", align_corners=True) * 2
            grid = (self.base + flow).clone()
            grid[:, 0] = 2.0 * grid[:, 0] / 15 - 1
            grid[:, 1] = 2.0 * grid[:, 1] / 15 - 1
            f = F.grid_sample(f, grid.permute(0, 2, 3, 1), padding_mode="border", align_corners=True)
        return f


@model(SAMPLING, (1, 16, 12), (1, 6, 2))
class DeformableAttention(nn.Module):
    """Zhu et al. 2021: a few places for each query, sampled from a map and weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.offset, self.weight, self.query = (
            nn.Linear(12, 12),
            nn.Linear(12, 16),
            nn.Linear(12, 8),
            nn.Embedding(6, 12),
        )

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        n, q = x.shape[0], self.query.weight.unsqueeze(0)
        v = self.value(x).view(n, 16, 2, 6).permute(0, 2, 3, 1).reshape(n * 2, 6, 4, 4)
        where = torch.sigmoid(reference)[:, :, None, None] + self.offset(q).view(1, 6, 2, 4, 2) * 0.1
        grid = (2 * where - 1).permute(0, 2, 1, 3, 4).flatten(0, 1)
        w = self.weight(q).view(1, 6, 2, 4).softmax(-1).permute(0, 2, 1, 3).reshape(2, 1, 6, 4)
        y = F.grid_sample(v, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return (y * w.repeat(n, 1, 1, 1)).sum(-1).view(n, 12, 6).transpose(1, 2)


# -- filters of frequencies --------------------------------------------------------------------------------------------


@model(FREQUENCY, (1, 3, 16, 16))
class GlobalFilter(nn.Module):
    """GFNet (Rao et al. 2021): a product in the frequencies of two dimensions, norm "ortho"."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.weight = conv(3, 8, 1), nn.Parameter(torch.randn(16, 9, 8, 2) * 0.1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(self.weight)
        x = x + torch.fft.irfft2(y, s=(16, 16), dim=(1, 2), norm="ortho")
        return self.head(self.norm(x).mean((1, 2)))


@model(FREQUENCY, (1, 8, 16, 16))
class FftFilter(nn.Module):
    """The prototype's: default norm, weights per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.c = nn.Parameter(torch.randn(1, 8, 16, 9, 2) * 0.1), conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(self.c(x)) * torch.view_as_complex(self.w), s=(16, 16))


@model(FREQUENCY, (1, 8, 8, 8))
class Afno(nn.Module):
    """Guibas et al. 2021: block-diagonal complex MLP on frequencies, soft shrinkage."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(2, 2, 4, 4) * 0.3), nn.Parameter(torch.randn(2, 2, 4, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").reshape(n, h, w // 2 + 1, 2, 4)
        mul = lambda a, b: torch.einsum("...bi,bio->...bo", a, b)  # noqa: E731
        re = F.relu(mul(y.real, self.w1[0]) - mul(y.imag, self.w1[1]))
        im = F.relu(mul(y.imag, self.w1[0]) + mul(y.real, self.w1[1]))
        z = torch.stack([mul(re, self.w2[0]) - mul(im, self.w2[1]), mul(im, self.w2[0]) + mul(re, self.w2[1])], -1)
        z = torch.view_as_complex(F.softshrink(z, lambd=0.01)).reshape(n, h, w // 2 + 1, c)
        return torch.fft.irfft2(z, s=(h, w), dim=(1, 2), norm="ortho") + x


class SpectralConv(nn.Module):
    """FNO's (Li et al. 2021): low frequencies times complex weights, the others zero."""

    def __init__(self, c: int, modes: int) -> None:
        super().__init__()
        self.modes, self.weight = modes, nn.Parameter(torch.rand(c, c, modes, 2) / c)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft(x)
        out = torch.zeros(*x.shape[:2], y.shape[-1], dtype=torch.cfloat)
        out[:, :, : self.modes] = torch.einsum(
            "bix,iox->box", y[:, :, : self.modes], torch.view_as_complex(self.weight)
        )
        return torch.fft.irfft(out, n=x.shape[-1])


@model(FREQUENCY, (1, 32, 2))
class Fno(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.spectral, self.skip, self.down = (
            nn.Linear(2, 8),
            SpectralConv(8, 5),
            nn.Conv1d(8, 8, 1),
            nn.Linear(8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).permute(0, 2, 1)
        return self.down(F.gelu(self.spectral(y) + self.skip(y)).permute(0, 2, 1))


@model(FREQUENCY, (1, 12, 16))
class FourierMix(nn.Module):
    """FNet (Lee-Thorp et al. 2021): the real part of a complex transform over tokens and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real))


@model(FREQUENCY, (1, 512))
class StftMagnitude(nn.Module):
    """torch.stft with a window, magnitude and phase; then a network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(64))
        self.conv = nn.Conv1d(33, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.stft(x, 64, 32, window=self.window, center=True, return_complex=True)
        return self.conv(torch.log1p(s.abs()))


@model(FREQUENCY, (1, 3, 16, 16))
class FocalFrequency(nn.Module):
    """FFC (Chi et al. 2020): real and imaginary parts as channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        y = self.conv(torch.cat([y.real, y.imag], 1))
        return torch.fft.irfftn(torch.complex(y[:, :4], y[:, 4:]), s=x.shape[-2:], dim=(-2, -1), norm="ortho")


@model(FREQUENCY, (1, 1, 16, 16), small=True)
class HaarWavelet(nn.Module):
    """A wavelet transform as strided slices, a network, its inverse as a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = x[:, :, 0::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2], x[:, :, 1::2, 1::2]
        y = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2
        return F.pixel_shuffle(y + torch.tanh(self.conv(y)), 2) + F.pixel_unshuffle(F.pad(x, (8, 8, 8, 8)), 2).mean(
            1, True
        )


@model(FREQUENCY, (1, 1, 32, 32), int8=True)
class DctBlocks(nn.Module):
    """JPEG's transform as a strided convolution with fixed weights, attention on frequencies (FcaNet)."""

    def __init__(self) -> None:
        super().__init__()
        k = torch.arange(8.0)
        basis = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / 8) * math.sqrt(2 / 8)
        basis[0] /= math.sqrt(2)
        self.register_buffer("dct", torch.einsum("ux,vy->uvxy", basis, basis).reshape(64, 1, 8, 8))
        self.gate, self.out = (
            nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64), nn.Sigmoid()),
            conv(64, 10, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.dct, stride=8)
        return self.out(y * self.gate(y.abs().mean((2, 3)))[:, :, None, None]).amax((2, 3))


# -- adders and few bits -----------------------------------------------------------------------------------------------


class Adder(nn.Module):
    """AdderNet (Chen et al. 2020): minus the sum of absolute differences, by cdist or by broadcasting."""

    def __init__(self, i: int, o: int, cdist: bool) -> None:
        super().__init__()
        self.weight, self.norm, self.cdist = nn.Parameter(torch.randn(o, i * 9)), nn.BatchNorm2d(o), cdist

    def forward(self, x: Tensor) -> Tensor:
        u = F.unfold(x, 3, padding=1).transpose(1, 2)
        if self.cdist:
            y = -torch.cdist(u, self.weight.unsqueeze(0).expand(u.shape[0], -1, -1), p=1.0)
        else:
            y = -(u.unsqueeze(2) - self.weight).abs().sum(-1)
        return F.relu(self.norm(y.transpose(1, 2).reshape(x.shape[0], -1, x.shape[2], x.shape[3])))


def _adder(cdist: bool) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8),
        Adder(8, 8, cdist),
        nn.MaxPool2d(2),
        Adder(8, 16, cdist),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


add("adder_cdist", ADDERS, lambda: _adder(True), (1, 3, 12, 12))
add("adder_abs", ADDERS, lambda: _adder(False), (1, 3, 12, 12))


@model(ADDERS, (1, 3, 16, 16), int8=True, small=True)
class BinaryConv(nn.Module):
    """XNOR-Net (Rastegari et al. 2016): signs of inputs and weights, scales by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.norm = conv(3, 8), nn.Parameter(torch.randn(8, 8, 3, 3)), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.hardtanh(self.norm(F.conv2d(torch.sign(x), torch.sign(self.weight) * scale, padding=1)) + x)


@model(ADDERS, (1, 3, 16, 16))
class FakeQuant(nn.Module):
    """Quantisation as PyTorch simulates it, and by round and clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(self.a(x), 0.05, 3, -128, 127)
        return torch.round(self.b(x) * 4).clamp(-8, 7) / 4


@model(ADDERS, (1, 3, 12, 12))
class ShiftConv(nn.Module):
    """Wu et al. 2018: channels moved by a pixel in eight directions, 1 x 1 convolutions; weights as powers of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = conv(3, 16, 1), nn.Parameter(torch.randn(12, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.a(x), (1, 1, 1, 1))
        h, w = x.shape[2] - 2, x.shape[3] - 2
        moved = [x[:, 2 * i : 2 * i + 2, i % 3 : i % 3 + h, i // 3 : i // 3 + w] for i in range(8)]
        weight = torch.sign(self.weight) * 2 ** torch.round(torch.log2(self.weight.abs() + 1e-3))
        return F.conv2d(torch.cat(moved, 1), weight)
