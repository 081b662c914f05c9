"""MobileNetV2 (Sandler et al. 2018) at any width: the network whose first blocks need the most memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.timm_models import randomise
from edgec.frontend import load_model
from edgec.program import Program

# Expansion, channels at width 1, blocks, stride of the first one.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
HEAD = 1280
SEED = 0


def channels(count: float) -> int:
    """The multiple of 8 next to a number of channels, at least 90 % of it."""
    rounded = max(8, int(count + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * count else rounded


def _layer(c: int, k: int, size: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(k)]
    return [*layers, nn.ReLU6()] if act else layers


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project."""

    def __init__(self, c: int, k: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = c * expansion
        expand = _layer(c, wide) if expansion > 1 else []
        self.body = nn.Sequential(*expand, *_layer(wide, wide, 3, stride, wide), *_layer(wide, k, act=False))
        self.residual = stride == 1 and c == k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """width: factor of the channels. blocks: only so many inverted residuals, and no head behind them; None: all."""

    def __init__(self, width: float = 1.0, classes: int = 1000, blocks: int | None = None) -> None:
        super().__init__()
        c = channels(32 * width)
        layers = _layer(3, c, 3, 2)
        made = 0
        for expansion, k, count, stride in STAGES:
            for i in range(count):
                if blocks is None or made < blocks:
                    layers.append(Block(c, channels(k * width), expansion, stride if i == 0 else 1))
                    c = channels(k * width)
                made += 1
        if blocks is None:
            layers += _layer(c, max(HEAD, int(HEAD * width)))
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(max(HEAD, int(HEAD * width)), classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def create(width: float, size: int, **options: Any) -> Program:
    """The network with weights drawn from SEED, and batch normalisations of trained-like spread; [1, 3, size, size]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = MobileNetV2(width, **options).eval()
    generator = torch.Generator().manual_seed(SEED)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module, generator)
    name = f"mobilenetv2_{width:.2f}_{size}".replace(".", "")
    return load_model(network, input_shape=(1, 3, size, size), name=name)
