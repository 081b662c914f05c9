"""One small network for each structure that ties channels together."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from edgec.frontend import load_model
from edgec.program import Program
from tests import zoo

IMAGE = (2, 3, 8, 8)


def conv(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    """The features of `body`, averaged and classified."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 16), conv(16, 8), conv(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return F.relu(x + self.b(self.a(x)))


class PaddedShortcut(nn.Module):
    """Option A of ResNets for CIFAR: the shortcut grows by channels of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 16, stride=2), conv(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.b(self.a(x)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3, 8), conv(8, 4), conv(12, 4), conv(16, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(x)], 1)
        return self.c(torch.cat([self.b(x), x], 1))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depthwise = conv(3, 8), conv(8, 24, 1), conv(24, 24, groups=24)
        self.reduce, self.excite, self.project = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1), conv(24, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.project(y)


class Ghost(nn.Module):
    """A depthwise convolution with two outputs for each input, and the input beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cheap, self.out = conv(3, 8), conv(8, 16, groups=8), conv(24, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.out(torch.cat([x, self.cheap(x)], 1))


class Shuffle(nn.Module):
    """ShuffleNet V2: half of the channels go through, then the halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.out = conv(3, 16), conv(8, 8), conv(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return self.out(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = conv(3, 8), conv(8, 16, stride=2)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), conv(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        return self.out(torch.cat([x, self.up(self.deep(x))], 1))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.out = conv(3, 8), nn.Conv2d(8, 32, 3, padding=1), conv(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.pixel_shuffle(self.up(self.stem(x)), 2))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = conv(3, 8, stride=2), nn.Linear(128, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(self.conv(x).flatten(1))))


class Attention(nn.Module):
    """A block of a vision transformer; `fused` q, k, v in one layer, `explicit` products and softmax."""

    def __init__(self, fused: bool, explicit: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 5, 16))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv = nn.ModuleList([nn.Linear(16, 48)] if fused else [nn.Linear(16, 16) for _ in range(3)])
        self.proj, self.fc1, self.fc2, self.head = (nn.Linear(*s) for s in ((16, 16), (16, 32), (32, 16), (16, 5)))
        self.explicit = explicit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm1(x)
        b, n, _ = y.shape
        if len(self.qkv) == 1:
            q, k, v = self.qkv[0](y).reshape(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(y).view(b, n, 4, 4).transpose(1, 2) for layer in self.qkv)
        if self.explicit:
            y = ((q @ k.transpose(-2, -1)) * 0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, 16))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class Mixer(nn.Module):
    """A layer that works along the tokens, on each channel alike."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.tokens = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(4, 4)
        self.fc1, self.fc2, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2)
        x = (x + self.tokens(x)).transpose(1, 2)
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


def norm_groups() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.PReLU(16), nn.Conv2d(16, 8, 3))
    return Head(body, 8)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Head(nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 8)), 8),
    "residual": lambda: Head(Residual(), 16),
    "padded_shortcut": lambda: Head(PaddedShortcut(), 16),
    "dense": lambda: Head(Dense(), 16),
    "inverted": lambda: Head(Inverted(), 8),
    "ghost": lambda: Head(Ghost(), 8),
    "shuffle": lambda: Head(Shuffle(), 8),
    "unet": lambda: Head(UNet(), 8),
    "pixel_shuffle": lambda: Head(PixelShuffle(), 8),
    "flatten": Flatten,
    "two_groups": lambda: Head(nn.Sequential(conv(3, 16), conv(16, 16, groups=2), conv(16, 8)), 8),
    "many_groups": lambda: Head(nn.Sequential(conv(3, 16), conv(16, 16, groups=8), conv(16, 8)), 8),
    "norm_groups": norm_groups,
    "attention": lambda: Attention(fused=True, explicit=False),
    "attention_separate": lambda: Attention(fused=False, explicit=True),
    "mixer": Mixer,
}


@functools.cache
def program(name: str) -> Program:
    made = MAKE[name]()
    zoo.set_weights(made, seed=list(MAKE).index(name))
    return load_model(made.eval(), input_shape=IMAGE, name=name)


def example(seed: int = 0) -> torch.Tensor:
    return torch.rand(IMAGE, generator=torch.Generator().manual_seed(seed))
