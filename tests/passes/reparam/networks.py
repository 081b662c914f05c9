"""Small branched networks in the forms of the papers, with batch norm statistics that differ between channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def trained_like(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, its norms with statistics and factors that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_(0, 0.3, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(part, (nn.Conv2d, nn.Linear)):
                part.weight.normal_(0, part.weight[0].numel() ** -0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0, 0.3, generator=generator)
    return network.eval()


class ConvNorm(nn.Sequential):
    def __init__(self, c: int, o: int, k: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> None:
        conv = nn.Conv2d(c, o, k, stride, (k - 1) * dilation // 2, dilation, groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(o))


class RepVGGBlock(nn.Module):
    """Ding et al.: 3x3, 1x1 and identity, each with its batch norm."""

    def __init__(self, c: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.main, self.point = ConvNorm(c, o, 3, stride), ConvNorm(c, o, 1, stride)
        self.skip = nn.BatchNorm2d(c) if c == o and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.main(x) + self.point(x)
        return F.relu(y if self.skip is None else y + self.skip(x))


class MobileOneBlock(nn.Module):
    """Vasu et al.: several depthwise branches, a 1x1 scale branch and a skip; then pointwise branches and a skip."""

    def __init__(self, c: int, o: int, branches: int = 3) -> None:
        super().__init__()
        self.depth = nn.ModuleList([ConvNorm(c, c, 3, 1, c) for _ in range(branches)])
        self.scale, self.skip = ConvNorm(c, c, 1, 1, c), nn.BatchNorm2d(c)
        self.point = nn.ModuleList([ConvNorm(c, o, 1) for _ in range(branches)])
        self.gate = nn.Conv2d(c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.scale(x) + self.skip(x)
        for branch in self.depth:
            y = y + branch(x)
        y = F.relu(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))
        return F.relu(sum(branch(y) for branch in self.point))


class GhostModule(nn.Module):
    """Liu et al., GhostNetV3: branched 1x1 and branched depthwise 3x3, concatenated; a gating path that must stay."""

    def __init__(self, c: int, o: int) -> None:
        super().__init__()
        half = o // 2
        self.primary = nn.ModuleList([ConvNorm(c, half, 1) for _ in range(3)])
        self.cheap = nn.ModuleList([ConvNorm(half, half, 3, 1, half) for _ in range(3)])
        self.point, self.skip = ConvNorm(half, half, 1, 1, half), nn.BatchNorm2d(half)
        self.gate = nn.Sequential(ConvNorm(c, o, 1), GatePart(o, (1, 5)), GatePart(o, (5, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(sum(branch(x) for branch in self.primary))
        b = self.skip(a) + self.point(a)
        for branch in self.cheap:
            b = b + branch(a)
        return torch.cat([a, F.relu(b)], 1) * torch.sigmoid(self.gate(x))


class GatePart(nn.Sequential):
    def __init__(self, c: int, kernel: tuple[int, int]) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2)
        super().__init__(nn.Conv2d(c, c, kernel, 1, padding, groups=c, bias=False), nn.BatchNorm2d(c))


class DilatedBranches(nn.Module):
    """Ding et al., UniRepLKNet: a 13x13 depthwise kernel beside dilated small ones."""

    SMALL = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))

    def __init__(self, c: int) -> None:
        super().__init__()
        self.large = ConvNorm(c, c, 13, 1, c)
        self.small = nn.ModuleList([ConvNorm(c, c, k, 1, c, r) for k, r in self.SMALL])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.large(x)
        for branch in self.small:
            y = y + branch(x)
        return F.relu(y)


class SESR(nn.Module):
    """Bhardwaj et al.: collapsible linear blocks with two long residuals; luma input minus 0.5."""

    def __init__(self, blocks: int = 2, wide: int = 64) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, wide, 5, padding=2), nn.Conv2d(wide, 16, 1))
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(16, wide, 3, padding=1), nn.Conv2d(wide, 16, 1)) for _ in range(blocks)]
        )
        self.acts = nn.ModuleList([nn.PReLU(16) for _ in range(blocks + 1)])
        self.last = nn.Sequential(nn.Conv2d(16, wide, 5, padding=2), nn.Conv2d(wide, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - 0.5
        h = self.acts[0](self.first(x))
        long = h
        for block, act in zip(self.blocks, list(self.acts)[1:], strict=True):
            h = act(block(h) + h)
        return F.pixel_shuffle(self.last(h + long) + x, 2)


class DifferenceConv(nn.Module):
    """Chen et al., DEA-Net: vanilla, central, angular, horizontal and vertical difference kernels, assembled in the
    graph."""

    TURNED = (3, 0, 1, 6, 4, 2, 7, 8, 5)

    def __init__(self, c: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        shapes = [(c, c, 9), (c, c, 9), (c, c, 9), (c, c, 3), (c, c, 3)]
        self.kernels = nn.ParameterList([nn.Parameter(0.2 * torch.randn(s, generator=generator)) for s in shapes])
        self.biases = nn.ParameterList([nn.Parameter(torch.randn(c, generator=generator)) for _ in shapes])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain, central, angular, horizontal, vertical = self.kernels
        middle = (central[:, :, 4] - central.sum(2))[:, :, None]
        zero = torch.zeros_like(horizontal)
        kernels = (
            plain,
            torch.cat([central[:, :, :4], middle, central[:, :, 5:]], 2),
            angular - angular[:, :, list(self.TURNED)],
            torch.stack([horizontal, zero, -horizontal], 3).flatten(2),
            torch.cat([vertical, zero, -vertical], 2),
        )
        maps = [
            F.conv2d(x, k.reshape(*k.shape[:2], 3, 3), b, padding=1) for k, b in zip(kernels, self.biases, strict=True)
        ]
        return F.relu(sum(maps))


class SpacedConv(nn.Module):
    """Khalfaoui-Hassani et al., DCLS v1: a depthwise kernel of few taps at learned, fractional positions."""

    def __init__(self, c: int, size: int = 9, taps: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(c, 1, taps, generator=generator))
        self.place = nn.Parameter(2.5 * torch.randn(2, c, 1, taps, generator=generator))
        self.size = size

    def kernel(self) -> torch.Tensor:
        grid = torch.arange(self.size, dtype=torch.float32)
        place = (self.place + self.size // 2).clamp(0, self.size - 1)
        near = [F.relu(1 - (grid[:, None] - p[:, :, None, :]).abs()) for p in place]  # [c, 1, size, taps]
        taps = near[0][:, :, :, None] * near[1][:, :, None]
        taps = taps / (taps.sum((2, 3), keepdim=True) + 1e-7)
        return (taps * self.weight[:, :, None, None]).sum(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel()
        return F.relu(F.conv2d(x, kernel, None, 1, self.size // 2, groups=kernel.shape[0]))


class LinearChain(nn.Module):
    """Two linear layers that collapse, a layer scale, and a low-rank pair that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 16)
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, 16))
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.b(self.a(x)) * self.gamma)
        return self.up(self.down(h)) + h
