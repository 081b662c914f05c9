"""Images to images: super-resolution, segmentation, restoration, generators, depth, pose, optical flow."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.registry import add, model

SR = "super-resolution"
SEGMENTATION = "segmentation"
RESTORATION = "restoration and generation"
POSE = "depth, pose and flow"


def conv(i: int, o: int, k: int = 3, **options: int) -> nn.Conv2d:
    """Keeps the size at stride 1."""
    return nn.Conv2d(i, o, k, padding=options.pop("padding", k // 2 * options.get("dilation", 1)), **options)


def conv_bn(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(conv(i, o, k, **options), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


# -- super-resolution --------------------------------------------------------------------------------------------------


@model(SR, (1, 1, 24, 24), int8=True, small=True)
class Espcn(nn.Sequential):
    """Shi et al. 2016: sub-pixel convolution, factor 3."""

    def __init__(self) -> None:
        super().__init__(conv(1, 64, 5), nn.Tanh(), conv(64, 32), nn.Tanh(), conv(32, 9), nn.PixelShuffle(3))


@model(SR, (1, 1, 24, 24), int8=True)
class Fsrcnn(nn.Module):
    """Dong et al. 2016: shrink, map, expand, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(1, 56, 5), nn.PReLU(56), conv(56, 12, 1), nn.PReLU(12)]
        for _ in range(4):
            layers += [conv(12, 12), nn.PReLU(12)]
        self.body = nn.Sequential(*layers, conv(12, 56, 1), nn.PReLU(56))
        self.up = nn.ConvTranspose2d(56, 1, 9, stride=2, padding=4, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.body(x))


@model(SR, (1, 1, 24, 24), int8=True)
class Srcnn(nn.Module):
    """Dong et al. 2014: bicubic enlargement inside the network, three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 64, 9), nn.ReLU(), conv(64, 32, 1), nn.ReLU(), conv(32, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False))


class ResidualBlock(nn.Module):
    def __init__(self, c: int, scale: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(c, c), nn.ReLU(True), conv(c, c))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


@model(SR, (1, 3, 16, 16), int8=True)
class Edsr(nn.Module):
    """Lim et al. 2017: residual blocks without norms, mean subtracted and added again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))
        self.head = conv(3, 32)
        self.body = nn.Sequential(*[ResidualBlock(32) for _ in range(4)], conv(32, 32))
        self.tail = nn.Sequential(conv(32, 128), nn.PixelShuffle(2), conv(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        return self.tail(x + self.body(x)) + self.mean


def contrast(x: Tensor) -> Tensor:
    """Standard deviation plus mean of every channel."""
    mean = x.mean((2, 3), keepdim=True)
    return ((x - mean) ** 2).mean((2, 3), keepdim=True).sqrt() + mean


class Distillation(nn.Module):
    """IMDN's block: a quarter of the channels is split off after each convolution; contrast-aware attention."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.kept = c // 4
        rest = c - self.kept
        self.c1, self.c2, self.c3, self.c4 = conv(c, c), conv(rest, c), conv(rest, c), conv(rest, self.kept)
        self.attend = nn.Sequential(conv(c, c // 8, 1), nn.ReLU(), conv(c // 8, c, 1), nn.Sigmoid())
        self.join = conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, y = [], x
        for layer in (self.c1, self.c2, self.c3):
            y = F.leaky_relu(layer(y), 0.05)
            part, y = torch.split(y, (self.kept, y.shape[1] - self.kept), dim=1)
            kept.append(part)
        y = torch.cat([*kept, self.c4(y)], dim=1)
        return x + self.join(y * self.attend(contrast(y)))


@model(SR, (1, 3, 16, 16), int8=True)
class Imdn(nn.Module):
    """Hui et al. 2019: information multi-distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.head = conv(3, 32)
        self.blocks = nn.ModuleList(Distillation(32) for _ in range(3))
        self.join = nn.Sequential(conv(96, 32, 1), nn.LeakyReLU(0.05))
        self.up = nn.Sequential(conv(32, 12), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return self.up(first + self.join(torch.cat(found, 1)))


class EnhancedSpatialAttention(nn.Module):
    """RFDN's ESA: stride, a large max pool, convolutions, bilinear enlargement to the input's size, sigmoid."""

    def __init__(self, c: int) -> None:
        super().__init__()
        f = c // 4
        self.reduce, self.stride, self.mix = conv(c, f, 1), nn.Conv2d(f, f, 3, stride=2), conv(f, f)
        self.skip, self.expand = conv(f, f, 1), conv(f, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.reduce(x)
        y = F.max_pool2d(self.stride(f), kernel_size=7, stride=3)
        y = F.interpolate(self.mix(y), (x.shape[2], x.shape[3]), mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.expand(y + self.skip(f)))


class ResidualDistillation(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        half = c // 2
        self.distilled = nn.ModuleList(conv(c, half, 1) for _ in range(3))
        self.rest = nn.ModuleList(conv(c, c) for _ in range(3))
        self.last, self.join, self.attend = conv(c, half), conv(4 * half, c, 1), EnhancedSpatialAttention(c)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for d, r in zip(self.distilled, self.rest):
            parts.append(F.leaky_relu(d(x), 0.05))
            x = F.leaky_relu(r(x) + x, 0.05)
        parts.append(F.leaky_relu(self.last(x), 0.05))
        return self.attend(self.join(torch.cat(parts, 1)))


@model(SR, (1, 3, 24, 24), int8=True)
class Rfdn(nn.Module):
    """Liu et al. 2020: residual feature distillation."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.a, self.b = conv(3, 32), ResidualDistillation(32), ResidualDistillation(32)
        self.join, self.up = conv(64, 32, 1), nn.Sequential(conv(32, 48), nn.PixelShuffle(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        a = self.a(x)
        return self.up(x + self.join(torch.cat([a, self.b(a)], 1)))


@model(SR, (1, 3, 16, 16), int8=True)
class Carn(nn.Module):
    """Ahn et al. 2018: cascading blocks with grouped convolutions and shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = conv(3, 16)
        self.block = nn.Sequential(
            conv(16, 16, groups=4), nn.ReLU(), conv(16, 16, groups=4), nn.ReLU(), conv(16, 16, 1)
        )
        self.join = nn.ModuleList(conv(16 * (i + 2), 16, 1) for i in range(3))
        self.up = nn.Sequential(conv(16, 144), nn.ReLU(), nn.PixelShuffle(3), conv(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = cascade = self.head(x)
        for join in self.join:
            cascade = torch.cat([cascade, F.relu(self.block(x) + x)], 1)
            x = join(cascade)
        return self.up(x)


@model(SR, (1, 3, 16, 16), int8=True)
class Ecbsr(nn.Module):
    """Zhang et al. 2021, as deployed: plain convolutions, the input repeated and added before the shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.PReLU(16), conv(16, 16), nn.PReLU(16), conv(16, 12))

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.body(x) + torch.repeat_interleave(x, 4, dim=1), 2).clamp(-3, 3)


# -- segmentation ------------------------------------------------------------------------------------------------------


class DoubleConv(nn.Sequential):
    def __init__(self, i: int, o: int) -> None:
        super().__init__(conv_bn(i, o), conv_bn(o, o))


class UNet(nn.Module):
    """Ronneberger et al. 2015; enlargement by transposed convolution, or by interpolation and a 1 x 1 convolution."""

    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        sizes = (3, 8, 16, 32, 64)
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in itertools.pairwise(sizes))
        self.bilinear = bilinear
        pairs = [(64, 32), (32, 16), (16, 8)]
        self.up = nn.ModuleList(conv(a, b, 1) if bilinear else nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.join = nn.ModuleList(DoubleConv(a, b) for a, b in pairs)
        self.out = conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, down in enumerate(self.down):
            x = down(x)
            if i < 3:
                kept.append(x)
                x = F.max_pool2d(x, 2)
        for up, join, skip in zip(self.up, self.join, reversed(kept)):
            if self.bilinear:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = join(torch.cat([skip, up(x)], 1))
        return self.out(x)


add("unet", SEGMENTATION, UNet, (1, 3, 32, 32), int8=True)
add("unet_bilinear", SEGMENTATION, functools.partial(UNet, True), (1, 3, 32, 32), int8=True)


@model(SEGMENTATION, (1, 3, 36, 44), int8=True)
class UnetPlusPlus(nn.Module):
    """Zhou et al. 2018: nested skips; odd sizes, so that enlarged maps are padded to fit."""

    def __init__(self) -> None:
        super().__init__()
        c = (8, 16, 32)
        self.x00, self.x10, self.x20 = DoubleConv(3, c[0]), DoubleConv(c[0], c[1]), DoubleConv(c[1], c[2])
        self.x01, self.x11 = DoubleConv(c[0] + c[1], c[0]), DoubleConv(c[1] + c[2], c[1])
        self.x02 = DoubleConv(2 * c[0] + c[1], c[0])
        self.out = conv(c[0], 3, 1)

    @staticmethod
    def up(x: Tensor, like: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return F.pad(x, (0, like.shape[3] - x.shape[3], 0, like.shape[2] - x.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        x00 = self.x00(x)
        x10 = self.x10(F.max_pool2d(x00, 2))
        x20 = self.x20(F.max_pool2d(x10, 2, ceil_mode=True))
        x01 = self.x01(torch.cat([x00, self.up(x10, x00)], 1))
        x11 = self.x11(torch.cat([x10, F.interpolate(x20, x10.shape[2:], mode="nearest")], 1))
        return self.out(self.x02(torch.cat([x00, x01, self.up(x11, x00)], 1)))


class Backbone(nn.Module):
    """Strided convolutions; the maps at 1/4, 1/8 and 1/16."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, c, stride=2), conv_bn(c, c, stride=2))
        self.c3, self.c4 = conv_bn(c, 2 * c, stride=2), conv_bn(2 * c, 4 * c, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        y = self.c3(x)
        return x, y, self.c4(y)


class Aspp(nn.Module):
    """DeepLab's pyramid: dilated convolutions beside the mean of the whole image."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(i, o, 1), *(conv_bn(i, o, dilation=d) for d in (2, 4, 6))])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn(i, o, 1))
        self.join = nn.Sequential(conv_bn(5 * o, o, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        whole = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.join(torch.cat([*(b(x) for b in self.branches), whole], 1))


class DeepLab(nn.Module):
    """Chen et al. 2017 and 2018 (v3, and v3+ with the finer map)."""

    def __init__(self, plus: bool) -> None:
        super().__init__()
        self.backbone, self.aspp, self.plus = Backbone(), Aspp(64, 24), plus
        self.low = conv_bn(16, 8, 1)
        self.out = nn.Sequential(conv_bn(32 if plus else 24, 24), conv(24, 6, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low, _, high = self.backbone(x)
        y = self.aspp(high)
        if self.plus:
            y = F.interpolate(y, size=low.shape[-2:], mode="bilinear", align_corners=False)
            y = torch.cat([y, self.low(low)], 1)
        y = self.out(y)
        return {"out": F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)}


add("deeplabv3", SEGMENTATION, functools.partial(DeepLab, False), (1, 3, 64, 64), int8=True)
add("deeplabv3plus", SEGMENTATION, functools.partial(DeepLab, True), (1, 3, 64, 64), int8=True)


@model(SEGMENTATION, (1, 3, 64, 64), int8=True)
class Lraspp(nn.Module):
    """MobileNetV3's head: a gate from the mean of the coarse map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.cbr = conv_bn(64, 24, 1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 24, 1, bias=False), nn.Sigmoid())
        self.low, self.high = conv(32, 5, 1), conv(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, low, high = self.backbone(x)
        y = self.cbr(high) * self.scale(high)
        y = F.interpolate(y, size=low.shape[-2:], mode="bilinear", align_corners=False)
        y = self.low(low) + self.high(y)
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


@model(SEGMENTATION, (1, 3, 64, 64), int8=True)
class Fcn(nn.Module):
    """Long et al. 2015: FCN-8s, scores of three scales added, the class of each pixel and the auxiliary scores."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.s4, self.s8, self.s16 = conv(16, 5, 1), conv(32, 5, 1), conv(64, 5, 1)
        self.up = nn.ConvTranspose2d(5, 5, 4, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = self.backbone(x)
        y = self.up(self.up(self.s16(c)) + self.s8(b)) + self.s4(a)
        y = F.interpolate(y, scale_factor=4, mode="bilinear", align_corners=False)
        return y, y.argmax(1)


@model(SEGMENTATION, (1, 3, 48, 48), int8=True)
class SegNet(nn.Module):
    """Badrinarayanan et al. 2017: max pools whose indices place the values again."""

    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2, self.d2, self.d1 = conv_bn(3, 8), conv_bn(8, 16), conv_bn(16, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, i = F.max_pool2d(self.e1(x), 2, return_indices=True)
        x, j = F.max_pool2d(self.e2(x), 2, return_indices=True)
        return self.d1(F.max_unpool2d(self.d2(F.max_unpool2d(x, j, 2)), i, 2))


@model(SEGMENTATION, (1, 3, 48, 48), int8=True)
class PspNet(nn.Module):
    """Zhao et al. 2017: pyramid pooling to 1, 2, 3 and 6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.levels = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(s), conv_bn(32, 8, 1)) for s in (1, 2, 3, 6))
        self.out = nn.Sequential(conv_bn(64, 16), conv(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        size = x.shape[2:]
        maps = [F.interpolate(f(x), size, mode="bilinear", align_corners=True) for f in self.levels]
        return self.out(torch.cat([x, *maps], 1)).log_softmax(1)


class BottleneckEnet(nn.Module):
    """ENet's: asymmetric convolution, PReLU, and a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        m = c // 4
        self.body = nn.Sequential(
            conv(c, m, 1, bias=False),
            nn.BatchNorm2d(m),
            nn.PReLU(m),
            nn.Conv2d(m, m, (5, 1), padding=(2, 0), bias=False),
            nn.Conv2d(m, m, (1, 5), padding=(0, 2)),
            nn.BatchNorm2d(m),
            nn.PReLU(m),
            conv(m, c, 1, bias=False),
            nn.BatchNorm2d(c),
            nn.Dropout2d(0.1),
        )
        self.act = nn.PReLU(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


@model(SEGMENTATION, (1, 3, 32, 32), int8=True)
class Enet(nn.Module):
    """Paszke et al. 2016: initial block joins a strided convolution and a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = conv(3, 13, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(BottleneckEnet(16), BottleneckEnet(16))
        self.out = nn.ConvTranspose2d(16, 4, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.prelu(self.norm(torch.cat([self.initial(x), F.max_pool2d(x, 2)], 1)), torch.full((1,), 0.25))
        return self.out(self.blocks(x))


@model(SEGMENTATION, (1, 3, 64, 64), int8=True)
class BiSeNet(nn.Module):
    """Yu et al. 2018: a spatial and a context path, joined by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(conv_bn(3, 16, 7, stride=2), conv_bn(16, 16, stride=2), conv_bn(16, 32, stride=2))
        self.backbone = Backbone()
        self.gate = nn.Sequential(conv(64, 64, 1), nn.BatchNorm2d(64), nn.Sigmoid())
        self.join = conv_bn(96, 32, 1)
        self.attend = nn.Sequential(conv(32, 32, 1), nn.ReLU(), conv(32, 32, 1), nn.Sigmoid())
        self.out = conv(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = self.backbone(x)[2]
        context = context * self.gate(context.mean(dim=(2, 3), keepdim=True))
        y = self.join(torch.cat([self.spatial(x), F.interpolate(context, scale_factor=2.0)], 1))
        y = y + y * self.attend(torch.mean(y, dim=[2, 3], keepdim=True))
        return F.interpolate(self.out(y), scale_factor=8.0, mode="bilinear", align_corners=True)


@model(SEGMENTATION, (1, 1, 8, 16, 16))
class Unet3d(nn.Module):
    """Volumes, as in medical imaging: 3-D convolutions, instance norms, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.e1 = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.01))
        self.e2 = nn.Sequential(nn.Conv3d(4, 8, 3, stride=2, padding=1), nn.BatchNorm3d(8), nn.ReLU())
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2)
        self.out = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.e1(x)
        return self.out(torch.cat([a, self.up(F.max_pool3d(self.e2(a), 1))], 1))


# -- restoration and generation ----------------------------------------------------------------------------------------


@model(RESTORATION, (1, 1, 32, 32), int8=True)
class DnCnn(nn.Module):
    """Zhang et al. 2017: the noise is predicted and subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 32), nn.ReLU(), *[conv_bn(32, 32, bias=False) for _ in range(4)], conv(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


class LayerNorm2d(nn.Module):
    """Over the channels of each pixel."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight.view(1, -1, 1, 1) * (x - mean) / (var + 1e-6).sqrt() + self.bias.view(1, -1, 1, 1)


class NafBlock(nn.Module):
    """Chen et al. 2022: gates by multiplying halves, simplified channel attention."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.n1, self.n2 = LayerNorm2d(c), LayerNorm2d(c)
        self.c1, self.c2, self.c3 = conv(c, 2 * c, 1), conv(2 * c, 2 * c, groups=2 * c), conv(c, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(c, c, 1))
        self.f1, self.f2 = conv(c, 2 * c, 1), conv(c, c, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.c2(self.c1(self.n1(x))).chunk(2, dim=1)
        y = a * b
        x = x + self.c3(y * self.sca(y)) * self.beta
        a, b = self.f1(self.n2(x)).chunk(2, dim=1)
        return x + self.f2(a * b) * self.gamma


@model(RESTORATION, (1, 3, 32, 32))
class NafNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.b1, self.down = conv(3, 16), NafBlock(16), nn.Conv2d(16, 32, 2, stride=2)
        self.b2 = NafBlock(32)
        self.up = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.PixelShuffle(2))
        self.tail = conv(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b1(self.head(x))
        return x + self.tail(y + self.up(self.b2(self.down(y))))


class ReflectConv(nn.Sequential):
    """With instance norm, as in Johnson et al. 2016."""

    def __init__(self, i: int, o: int, k: int, stride: int = 1) -> None:
        super().__init__(nn.ReflectionPad2d(k // 2), nn.Conv2d(i, o, k, stride), nn.InstanceNorm2d(o, affine=True))


@model(RESTORATION, (1, 3, 32, 32), int8=True)
class StyleTransfer(nn.Module):
    """Johnson et al. 2016, with nearest enlargement."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ReflectConv(3, 8, 9), ReflectConv(8, 16, 3, 2)
        self.r1, self.r2 = ReflectConv(16, 16, 3), ReflectConv(16, 16, 3)
        self.u, self.out = ReflectConv(16, 8, 3), nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(8, 3, 9))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = x + self.r2(F.relu(self.r1(x)))
        return torch.sigmoid(self.out(F.relu(self.u(F.interpolate(x, scale_factor=2, mode="nearest")))))


@model(RESTORATION, (1, 3, 24, 24), (1, 3, 24, 24))
class AdaIn(nn.Module):
    """Huang and Belongie 2017: statistics of one image for the features of another."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv(3, 12, stride=2), nn.ReLU())
        self.decode = nn.Sequential(nn.ReplicationPad2d(1), nn.Conv2d(12, 12, 3), nn.ReLU(), nn.PixelShuffle(2))

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        c, s = self.encode(content), self.encode(style)
        cv, cm = torch.var_mean(c, dim=(2, 3), keepdim=True)
        return self.decode((c - cm) * torch.rsqrt(cv + 1e-5) * s.std((2, 3), keepdim=True) + s.mean((2, 3), True))


@model(RESTORATION, (1, 32))
class DcganGenerator(nn.Sequential):
    """Radford et al. 2016."""

    def __init__(self) -> None:
        up = functools.partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1, bias=False)
        super().__init__(
            nn.Unflatten(1, (32, 1, 1)),
            nn.ConvTranspose2d(32, 64, 4, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            up(64, 32),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            up(32, 16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            up(16, 3),
            nn.Tanh(),
        )


@model(RESTORATION, (1, 16), (1, 8, 4, 4))
class StyleGanBlock(nn.Module):
    """Karras et al. 2020: weights scaled by a style and normalised, computed for each input; blur; added noise."""

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(16, 8)
        self.weight = nn.Parameter(torch.randn(12, 8, 3, 3) * 0.2)
        blur = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", (torch.outer(blur, blur) / 64).view(1, 1, 4, 4))
        self.register_buffer("noise", torch.randn(8, 8))

    def forward(self, w: Tensor, x: Tensor) -> Tensor:
        s = self.style(w / torch.sqrt(w.square().mean(1, keepdim=True) + 1e-8)) + 1
        weight = self.weight.unsqueeze(0) * s.view(-1, 1, 8, 1, 1)
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        y = F.conv2d(x, weight[0], padding=1)
        y = F.conv2d(F.pad(y, (1, 2, 1, 2)), self.blur.expand(12, 1, 4, 4), groups=12)
        return F.leaky_relu(y + self.noise, 0.2) * 2**0.5


@model(RESTORATION, (1, 3, 32, 32), int8=True)
class Vae(nn.Module):
    """The code's mean as the code, as in inference; mean and log-variance are outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            conv_bn(3, 8, stride=2), conv_bn(8, 16, stride=2), nn.Flatten(), nn.Linear(1024, 32)
        )
        self.decode = nn.Sequential(
            nn.Linear(16, 1024),
            nn.Unflatten(1, (16, 8, 8)),
            nn.ConvTranspose2d(16, 8, 3, 2, 1, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 3, 2, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, 1)
        return self.decode(mean), mean, log_variance


@model(RESTORATION, (1, 3, 16, 16), small=True)
class VqVae(nn.Module):
    """Van den Oord et al. 2017: nearest entry of a code book, its index and the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv(3, 16, stride=2), nn.ReLU(), conv(16, 8, 1))
        self.book = nn.Embedding(24, 8)
        self.decode = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x).permute(0, 2, 3, 1)
        flat = z.reshape(-1, 8)
        far = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.book.weight.t() + self.book.weight.pow(2).sum(1)
        code = far.argmin(1)
        q = self.book(code).view(z.shape).permute(0, 3, 1, 2)
        return self.decode(q), code.view(z.shape[0], -1)


@model(RESTORATION, (1, 4, 16, 16), (1,))
class DiffusionUnet(nn.Module):
    """Ho et al. 2020 in small: a time embedded by sines, group norms, attention over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.head, self.down = conv(4, 16), conv(16, 32, stride=2)
        self.norm1, self.norm2 = nn.GroupNorm(4, 32), nn.GroupNorm(8, 32)
        self.qkv, self.proj = conv(32, 96, 1), conv(32, 32, 1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), conv(32, 16))
        self.tail = nn.Sequential(nn.GroupNorm(4, 32), nn.SiLU(), conv(32, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t.abs()[:, None] * 100 * torch.exp(-torch.arange(8, dtype=torch.float32))
        e = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        a = self.head(x)
        h = F.silu(self.norm1(self.down(a))) + e[:, :, None, None]
        q, k, v = self.qkv(self.norm2(h)).flatten(2).chunk(3, 1)
        w = torch.einsum("bci,bcj->bij", q, k).mul(32**-0.5).softmax(-1)
        h = h + self.proj(torch.einsum("bij,bcj->bci", w, v).view(h.shape))
        return self.tail(torch.cat([a, self.up(h)], 1))


@model(RESTORATION, (1, 3, 32, 32), int8=True)
class ZeroDce(nn.Module):
    """Guo et al. 2020: curves that brighten, applied again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 16), conv(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        curves = torch.tanh(self.c(torch.cat([a, F.relu(self.b(a))], 1)))
        for r in torch.split(curves, 3, dim=1):
            x = x + r * (torch.pow(x, 2) - x)
        return x


@model(RESTORATION, (1, 3, 32, 32), int8=True)
class PatchGan(nn.Sequential):
    """Isola et al. 2017: the discriminator of pix2pix."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 4, 2, 1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(16, 32, 4, 2, 1, bias=False),
            nn.InstanceNorm2d(32),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(32, 1, 4, 1, 1),
        )


# -- depth, pose and flow ----------------------------------------------------------------------------------------------


@model(POSE, (1, 3, 64, 64), int8=True)
class FastDepth(nn.Module):
    """Wofk et al. 2019: depthwise decoder, skips added; depth from a sigmoid disparity."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up = nn.ModuleList(nn.Sequential(conv_bn(c, c, 5, groups=c), conv_bn(c, c // 2, 1)) for c in (64, 32, 16))
        self.out = conv(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.backbone(x)
        for layer, skip in zip(self.up, (b, a, None)):
            c = F.interpolate(layer(c), scale_factor=2, mode="nearest")
            c = c if skip is None else c + skip
        return 1 / (0.1 + 9.9 * torch.sigmoid(self.out(c)))


@model(POSE, (1, 3, 64, 64), int8=True)
class Hourglass(nn.Module):
    """Newell et al. 2016: heat maps, and each joint's place as the expectation over its map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, 7, stride=2), nn.MaxPool2d(2))
        self.side, self.deep, self.out = (
            conv_bn(16, 16),
            nn.Sequential(conv_bn(16, 16), conv_bn(16, 16)),
            conv(16, 5, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.side(x) + F.interpolate(self.deep(F.max_pool2d(x, 2)), scale_factor=2, mode="nearest")
        maps = self.out(y)
        b, k, h, w = maps.shape
        p = maps.view(b, k, -1).softmax(-1).view(b, k, h, w)
        xs = (p.sum(2) * torch.linspace(0, 1, w)).sum(-1)
        ys = (p.sum(3) * torch.linspace(0, 1, h)).sum(-1)
        return maps, torch.stack([xs, ys], -1)


@model(POSE, (1, 3, 64, 64), int8=True)
class SimpleBaseline(nn.Module):
    """Xiao et al. 2018: transposed convolutions; the place and height of the maximum of each map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up = nn.Sequential(nn.ConvTranspose2d(64, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.out = conv(16, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.out(self.up(self.backbone(x)[2]))
        height, where = maps.flatten(2).max(-1)
        width = maps.shape[-1]
        return height, where % width, torch.div(where, width, rounding_mode="floor")


@model(POSE, (1, 3, 64, 64), int8=True)
class HighResolution(nn.Module):
    """HRNet in small (Sun et al. 2019): branches of two resolutions that exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.down, self.down2 = conv_bn(8, 16, stride=2), conv_bn(8, 16, stride=2)
        self.a, self.b = conv_bn(8, 8), conv_bn(16, 16)
        self.up = nn.Sequential(conv(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.out = conv(24, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.down(a)
        a, b = self.a(a), self.b(b)
        up = F.interpolate(self.up(b), size=a.shape[2:], mode="nearest")
        a, b = F.relu(a + up), F.relu(b + self.down2(a))
        return self.out(torch.cat([a, F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)], 1))


@model(POSE, (1, 3, 32, 32), (1, 3, 32, 32))
class FlowCorrelation(nn.Module):
    """FlowNetC (Dosovitskiy et al. 2015): correlation of two feature maps over shifts, then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16, stride=2), nn.LeakyReLU(0.1), conv(16, 16), nn.LeakyReLU(0.1))
        self.flow = nn.Sequential(conv(25, 16), nn.LeakyReLU(0.1), conv(16, 2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.features(a), F.pad(self.features(b), (2, 2, 2, 2))
        h, w = a.shape[2:]
        shifts = [(a * b[:, :, i : i + h, j : j + w]).mean(1, keepdim=True) for i in range(5) for j in range(5)]
        return self.flow(torch.cat(shifts, 1))


@model(POSE, (1, 3, 24, 24), (1, 3, 24, 24))
class RaftLookup(nn.Module):
    """RAFT in small (Teed and Deng 2020): all pairs, pyramid, lookup by sampling, a convolutional GRU, three rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 8, stride=2), nn.ReLU(), conv(8, 8))
        self.motion, self.z, self.q, self.flow = conv(11, 8), conv(16, 8), conv(16, 8), conv(8, 2)
        xs, ys = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="xy")
        self.register_buffer("places", torch.stack([xs, ys]))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        fa, fb = self.features(a), self.features(b)
        n, c, h, w = fa.shape
        pairs = torch.matmul(fa.flatten(2).transpose(1, 2), fb.flatten(2)).div(c**0.5).reshape(n * h * w, 1, h, w)
        state, flow = torch.tanh(fa), torch.zeros(n, 2, h, w)
        around = torch.stack(torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-1.0, 2), indexing="ij"), -1)
        for _ in range(3):
            where = (self.places + flow).permute(0, 2, 3, 1).reshape(n * h * w, 1, 1, 2) + around
            grid = 2 * where / torch.tensor([w - 1.0, h - 1.0]) - 1
            found = F.grid_sample(pairs, grid, align_corners=True).view(n, h, w, 9).permute(0, 3, 1, 2)
            x = F.relu(self.motion(torch.cat([found, flow], 1)))
            z = torch.sigmoid(self.z(torch.cat([state, x], 1)))
            state = (1 - z) * state + z * torch.tanh(self.q(torch.cat([state, x], 1)))
            flow = flow + self.flow(state)
        return flow


@model(POSE, (1, 3, 16, 32), (1, 3, 16, 32))
class StereoVolume(nn.Module):
    """GC-Net in small (Kendall et al. 2017): a volume of shifted features, 3-D convolutions, soft arg-min."""

    def __init__(self) -> None:
        super().__init__()
        self.features = conv(3, 8)
        self.volume = nn.Sequential(
            nn.Conv3d(16, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 1, 3, padding=1)
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.features(left), self.features(right)
        volume = a.new_zeros(a.shape[0], 16, 6, a.shape[2], a.shape[3])
        for d in range(6):
            volume[:, :8, d, :, d:] = a[:, :, :, d:]
            volume[:, 8:, d, :, d:] = b[:, :, :, : b.shape[3] - d]
        cost = self.volume(volume).squeeze(1)
        return (F.softmax(-cost, 1) * torch.arange(6.0).view(1, 6, 1, 1)).sum(1)
