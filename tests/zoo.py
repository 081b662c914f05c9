"""Tiny models that between them contain every construction the compiler has a rule for.

Weights are small integers divided by powers of two, from NumPy's PCG64: the same bits on every machine, so that text
forms with content hashes can be golden. Batch norm statistics differ from channel to channel.

    program("residual")        the Program, exported once per process
    calibration("residual")    a Dataset of noise for it
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import Dataset, random_data
from edgec.frontend import load_model
from edgec.program import Program


@dataclass(frozen=True)
class Entry:
    """How to make a model and the shape of its input, batch included."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


ZOO: dict[str, Entry] = {}


def names() -> list[str]:
    return list(ZOO)


def module(name: str) -> nn.Module:
    """The model in evaluation mode, with its fixed weights."""
    made = ZOO[name].make()
    set_weights(made, seed=list(ZOO).index(name))
    return made.eval()


@functools.cache
def program(name: str) -> Program:
    return load_model(module(name), input_shape=ZOO[name].shape, name=name)


@functools.cache
def calibration(name: str, n: int = 64) -> Dataset:
    return random_data(program(name).inputs, n, seed=1)


def example(name: str, batch: int = 2, seed: int = 2) -> torch.Tensor:
    """Random input in -1..1."""
    return 2 * torch.rand(batch, *ZOO[name].shape[1:], generator=torch.Generator().manual_seed(seed)) - 1


def set_weights(model: nn.Module, seed: int) -> None:
    """Overwrite every weight with a fraction that is exact in float32."""
    rng = np.random.default_rng(seed)

    def fractions(shape: torch.Size, low: int, high: int, denominator: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high, tuple(shape)).astype(np.float32) / denominator)

    with torch.no_grad():
        for layer in model.modules():
            for key, value in layer.named_parameters(recurse=False):
                if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)) and key == "weight":
                    value.copy_(fractions(value.shape, 32, 97, 64))
                elif isinstance(layer, nn.PReLU):
                    value.copy_(fractions(value.shape, 1, 32, 64))
                else:
                    fan = max(1, value[0].numel() if value.dim() > 1 else 16)
                    value.copy_(fractions(value.shape, -63, 64, 32 * 2 ** round(np.log2(fan) / 2)))
            for key, value in layer.named_buffers(recurse=False):
                if key == "running_mean":
                    value.copy_(fractions(value.shape, -16, 17, 64))
                elif key == "running_var":
                    value.copy_(fractions(value.shape, 16, 65, 64))


def entry(*shape: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a model under its class name in snake case; `shape` includes the batch."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in make.__name__).lstrip("_")
        ZOO[name] = Entry(make, shape)
        return make

    return register


@entry(1, 3, 8, 8)
class ConvBnRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


@entry(1, 4, 8, 8)
class Residual(nn.Module):
    """Two convolutions, the sum with the input, a strided one with a projection shortcut, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        x = F.relu(self.bn3(self.conv3(x)) + self.shortcut(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@entry(1, 3, 8, 8)
class Concat(nn.Module):
    """Two branches of different range, joined along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 2, 3, padding=1)
        self.after = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.cat([F.relu(self.left(x)), 4 * torch.sigmoid(self.right(x))], 1))


@entry(1, 4, 10, 9)
class DepthwiseSeparable(nn.Module):
    """MobileNet's block with relu6, odd sizes and stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.dw, self.bn1 = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False), nn.BatchNorm2d(4)
        self.pw, self.bn2 = nn.Conv2d(4, 7, 1, bias=False), nn.BatchNorm2d(7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(self.bn2(self.pw(F.relu6(self.bn1(self.dw(x))))))


@entry(1, 6, 7, 7)
class GroupedConv(nn.Module):
    """Groups, dilation, a kernel that is not square and asymmetric padding."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2)
        self.wide = nn.Conv2d(8, 3, (1, 4), padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(F.leaky_relu(self.grouped(x), 0.1))


@entry(1, 4, 9, 9)
class Pools(nn.Module):
    """Max and average pooling with and without padding, and a global average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 3, 2, 1)
        x = F.avg_pool2d(x, 2, 1) + F.max_pool2d(x, 2, 1)
        return x.mean((2, 3))


@entry(1, 4, 6, 6)
class SqueezeExcite(nn.Module):
    """MobileNetV3: hard-swish, then channels scaled by a hard-sigmoid of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.bn(self.conv(x)))
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


@entry(1, 16)
class Mlp(nn.Module):
    """An autoencoder's half: linear layers with one-dimensional batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(16, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Linear(12, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.ReLU6(),
        )
        self.out = nn.Linear(4, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x))


@entry(1, 3, 8, 8)
class VitBlock(nn.Module):
    """Patches, a class token, positions, one block of attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


@entry(1, 1, 6, 6)
class SuperResolution(nn.Module):
    """FSRCNN's parts: parametric relu, a sub-pixel shuffle, and the input added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.PReLU(4)
        self.up = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.up(self.act(self.conv(x))), 2)


@entry(1, 4, 8, 8)
class PaddedShortcut(nn.Module):
    """ResNet on CIFAR, option A: the shortcut drops every second pixel and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


@entry(1, 3, 8, 8)
class TwoOutputs(nn.Module):
    """A detector's shape: one trunk, boxes from one head, scores from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.bn = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.boxes, self.scores = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.relu(self.bn(self.trunk(x)))
        return self.boxes(x).permute(0, 2, 3, 1).flatten(1, 2), self.scores(x).permute(0, 2, 3, 1).softmax(-1)


@entry(1, 4, 6, 6)
class LooseNorms(nn.Module):
    """Batch norms that nothing can take up: before a convolution, and after one that feeds two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(4)
        self.conv, self.after = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.up, self.last = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.before(x))
        return self.last(self.up(self.after(x) * x))
