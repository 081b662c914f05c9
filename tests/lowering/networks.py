"""Tiny modules, one construction each, with the graph that the torch half of the lowering must make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Forward = Callable[..., torch.Tensor]


class Net(nn.Module):
    """`forward(net, x)` over named layers: `Net(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 3))`."""

    def __init__(self, run: Forward, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(self, *inputs)


def conv(c: int, k: int, size: int | tuple[int, int] = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of the map, unless `padding` or `stride` say otherwise."""
    if isinstance(size, int):
        options.setdefault("padding", size // 2)
    return nn.Conv2d(c, k, size, **options)


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def residual_relu(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return F.relu(m.conv(x) + x)


def shortcut_a(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Option A of the CIFAR ResNets: every second row and column, zero channels added."""
    x = m.stem(x)
    return F.relu(m.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def squeeze_excite(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return m.conv(x * F.hardsigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))))


def tokens(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.conv(x).flatten(2).transpose(1, 2))


def detector_heads(m: Net, x: torch.Tensor) -> torch.Tensor:
    a = m.first(x)
    b = m.second(a)
    heads = [h(f).permute(0, 2, 3, 1).reshape(f.shape[0], -1, 5) for h, f in ((m.head_a, a), (m.head_b, b))]
    return torch.cat(heads, 1)


def pixel_shuffle(m: Net, x: torch.Tensor) -> torch.Tensor:
    return F.pixel_shuffle(m.conv(x), 2)


def unsqueezed_constants(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x) * m.scale.unsqueeze(1).unsqueeze(1) + m.shift.view(1, 4, 1, 1)


def used_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    return F.relu(y) * y


def inplace_used_twice(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    z = y + 1.0
    F.relu_(y)
    return y * z


def inplace_into_residual(m: Net, x: torch.Tensor) -> torch.Tensor:
    """The addition writes its left operand, which is read again."""
    y = m.stem(x)
    keep = y
    y += m.conv(y)
    return F.relu(y) * keep


def two_residuals(m: Net, x: torch.Tensor) -> torch.Tensor:
    """The two convolutions could both take the addition in; one does."""
    return F.relu(m.a(x) + m.b(x))


def scaled_residual(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return torch.add(x, m.conv(x), alpha=0.5)


def broadcast_residual(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return m.conv(x) + x.mean((2, 3), keepdim=True)


def double(m: Net, x: torch.Tensor) -> torch.Tensor:
    """x + x is no residual."""
    y = m.conv(x)
    return y + y


def classifier(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.fc(torch.flatten(m.pool(m.conv(x)), 1))


def flatten_map(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.fc(torch.flatten(m.conv(x), 1))


def mean_classifier(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.fc(m.conv(x).mean((2, 3)))


def patches(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Four samples out of one."""
    y = x.reshape(x.shape[0] * 4, 3, 4, 4)
    y = m.stem(y)
    return m.pool(F.relu(m.conv(y) + y)).reshape(x.shape[0], -1)


def dense_block(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    z = torch.cat([y, m.b(y)], 1)
    return m.c(F.relu(m.norm(z)))


def split_shuffle(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    return torch.cat([x[:, :4], m.conv(x[:, 4:])], dim=1)


# Expected after channels_last. "permute" counts what is left of all permutations.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {}


def _add(name: str, shape: tuple[int, ...], make: Callable[[], nn.Module], **expected: int) -> None:
    CASES[name] = (make, shape, expected)


MAP = (1, 3, 9, 7)

_add("conv", MAP, lambda: conv(3, 4), conv2d_nhwc=1, permute=2)
_add("conv_relu_conv", MAP, lambda: chain(conv(3, 4), nn.ReLU(), conv(4, 4)), conv2d_nhwc=2, permute=2)
_add("residual_relu", MAP, lambda: Net(residual_relu, stem=conv(3, 4), conv=conv(4, 4)), conv2d_nhwc=2, permute=2)
_add("two_residuals", MAP, lambda: Net(two_residuals, a=conv(3, 4), b=conv(3, 4, 1)), conv2d_nhwc=2, permute=2)
_add(
    "scaled_residual",
    MAP,
    lambda: Net(scaled_residual, stem=conv(3, 4), conv=conv(4, 4)),
    conv2d_nhwc=2,
    add=1,
    permute=2,
)
_add(
    "broadcast_residual",
    MAP,
    lambda: Net(broadcast_residual, stem=conv(3, 4), conv=conv(4, 4)),
    conv2d_nhwc=2,
    mean=1,
    add=1,
    permute=2,
)
_add("double", MAP, lambda: Net(double, conv=conv(3, 4)), conv2d_nhwc=1, add=1, permute=2)
_add("used_twice", MAP, lambda: Net(used_twice, conv=conv(3, 4)), conv2d_nhwc=1, relu=1, mul=1, permute=2)
_add(
    "inplace_used_twice",
    MAP,
    lambda: Net(inplace_used_twice, conv=conv(3, 4)),
    conv2d_nhwc=1,
    relu=1,
    add=1,
    mul=1,
    permute=2,
)
_add(
    "inplace_into_residual",
    MAP,
    lambda: Net(inplace_into_residual, stem=conv(3, 4), conv=conv(4, 4)),
    conv2d_nhwc=2,
    relu=1,
    mul=1,
    permute=2,
)
_add("pad_conv", MAP, lambda: chain(nn.ZeroPad2d((1, 2, 0, 1)), conv(3, 4, 3, padding=1)), conv2d_nhwc=1, permute=2)
_add(
    "pad_value",
    MAP,
    lambda: chain(conv(3, 4), nn.ConstantPad2d(1, 0.5), conv(4, 4)),
    conv2d_nhwc=2,
    constant_pad_nd=1,
    permute=2,
)
_add(
    "pad_negative",
    MAP,
    lambda: chain(conv(3, 4), nn.ZeroPad2d((-1, 0, -1, 1)), conv(4, 4)),
    conv2d_nhwc=2,
    constant_pad_nd=1,
    permute=2,
)
_add(
    "pad_reflect",
    MAP,
    lambda: chain(conv(3, 4), nn.ReflectionPad2d(1), conv(4, 4, 3, padding=0)),
    conv2d_nhwc=2,
    pad=1,
    permute=4,
)
_add("same_padding", MAP, lambda: conv(3, 4, 4, padding="same", dilation=(1, 2)), conv2d_nhwc=1, permute=2)
_add("valid_padding", MAP, lambda: conv(3, 4, 3, padding="valid", stride=(2, 1)), conv2d_nhwc=1, permute=2)
_add(
    "depthwise",
    MAP,
    lambda: chain(conv(3, 4), conv(4, 4, groups=4), nn.ReLU6(), conv(4, 2, 1)),
    conv2d_nhwc=3,
    permute=2,
)
_add("dilated_groups", MAP, lambda: conv(3, 6, 3, dilation=2, groups=3, padding=2), conv2d_nhwc=1, permute=2)
_add(
    "max_pool",
    MAP,
    lambda: chain(conv(3, 4), nn.MaxPool2d(3, 2, 1), conv(4, 4)),
    conv2d_nhwc=2,
    max_pool2d_nhwc=1,
    permute=2,
)
_add("max_pool_negative", MAP, lambda: nn.MaxPool2d((2, 3), padding=1, dilation=(2, 1)), max_pool2d_nhwc=1, permute=2)
_add(
    "max_pool_ceil",
    MAP,
    lambda: chain(conv(3, 4), nn.MaxPool2d(2, ceil_mode=True), conv(4, 4)),
    conv2d_nhwc=2,
    max_pool2d_nhwc=1,
    permute=2,
)
_add(
    "avg_pool", MAP, lambda: chain(conv(3, 4), nn.AvgPool2d(2), conv(4, 4)), conv2d_nhwc=2, avg_pool2d_nhwc=1, permute=2
)
_add("avg_pool_padded", MAP, lambda: nn.AvgPool2d(3, 1, 1), avg_pool2d_nhwc=1, permute=2)
_add(
    "avg_pool_uncounted",
    MAP,
    lambda: chain(conv(3, 4), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    conv2d_nhwc=1,
    avg_pool2d=1,
    permute=2,
)
_add(
    "batch_norm",
    MAP,
    lambda: chain(conv(3, 4), nn.ReLU(), nn.BatchNorm2d(4), conv(4, 4)),
    conv2d_nhwc=2,
    mul=1,
    add=1,
    permute=2,
)
_add(
    "batch_norm_plain",
    MAP,
    lambda: chain(conv(3, 4), nn.ReLU(), nn.BatchNorm2d(4, affine=False)),
    conv2d_nhwc=1,
    mul=1,
    add=1,
    permute=2,
)
_add(
    "prelu",
    MAP,
    lambda: chain(conv(3, 4), nn.PReLU(4), conv(4, 4)),
    conv2d_nhwc=2,
    relu=2,
    neg=1,
    mul=1,
    sub=1,
    permute=2,
)
_add(
    "prelu_shared",
    MAP,
    lambda: chain(conv(3, 4), nn.PReLU(), conv(4, 4)),
    conv2d_nhwc=2,
    relu=2,
    neg=1,
    mul=1,
    sub=1,
    permute=2,
)
_add(
    "activations",
    MAP,
    lambda: chain(*[m for a in (nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh) for m in (conv(3, 3), a())]),
    conv2d_nhwc=5,
    permute=2,
)
_add(
    "leaky",
    MAP,
    lambda: chain(conv(3, 4), nn.LeakyReLU(0.2), conv(4, 4), nn.ELU()),
    conv2d_nhwc=2,
    elu=1,
    permute=2,
)
_add("gelu_tanh", MAP, lambda: chain(conv(3, 4), nn.GELU("tanh"), conv(4, 4)), conv2d_nhwc=2, permute=2)
_add(
    "dense_block",
    MAP,
    lambda: Net(dense_block, a=conv(3, 4), b=conv(4, 4), c=conv(8, 4), norm=nn.BatchNorm2d(8)),
    conv2d_nhwc=3,
    cat=1,
    mul=1,
    add=1,
    relu=1,
    permute=2,
)
_add(
    "cat_with_input",
    MAP,
    lambda: Net(lambda m, x: m.b(torch.cat((x, m.a(x)), -3)), a=conv(3, 4), b=conv(7, 4)),
    conv2d_nhwc=2,
    cat=1,
    permute=2,
)
_add(
    "split_shuffle",
    MAP,
    lambda: Net(split_shuffle, stem=conv(3, 8), conv=conv(4, 4)),
    conv2d_nhwc=2,
    slice=2,
    cat=1,
    permute=2,
)
_add(
    "shortcut_a",
    (1, 3, 8, 8),
    lambda: Net(shortcut_a, stem=conv(3, 4), conv=conv(4, 8, stride=2)),
    conv2d_nhwc=2,
    slice=2,
    constant_pad_nd=1,
    permute=2,
)
_add(
    "squeeze_excite",
    MAP,
    lambda: Net(squeeze_excite, stem=conv(3, 8), down=conv(8, 2, 1), up=conv(2, 8, 1), conv=conv(8, 4, 1)),
    conv2d_nhwc=4,
    mean=1,
    mul=1,
    permute=2,
)
_add("pixel_shuffle", MAP, lambda: Net(pixel_shuffle, conv=conv(3, 8)), conv2d_nhwc=1, pixel_shuffle=1, permute=2)
_add(
    "classifier",
    MAP,
    lambda: Net(classifier, conv=conv(3, 4), pool=nn.AdaptiveAvgPool2d(1), fc=nn.Linear(4, 5)),
    conv2d_nhwc=1,
    mean=1,
    reshape=1,
    linear_act=1,
    permute=1,
)
_add(
    "mean_classifier",
    MAP,
    lambda: Net(mean_classifier, conv=conv(3, 4), fc=nn.Linear(4, 5)),
    conv2d_nhwc=1,
    mean=1,
    linear_act=1,
    permute=1,
)
_add(
    "flatten_map",
    MAP,
    lambda: Net(flatten_map, conv=conv(3, 2), fc=nn.Linear(126, 5)),
    conv2d_nhwc=1,
    flatten=1,
    linear_act=1,
    permute=2,
)
_add(
    "view_map",
    MAP,
    lambda: Net(lambda m, x: m.fc(m.conv(x).view(x.size(0), -1)), conv=conv(3, 2), fc=nn.Linear(126, 5)),
    conv2d_nhwc=1,
    reshape=1,
    linear_act=1,
    permute=2,
)
_add(
    "patches",
    (1, 3, 8, 8),
    lambda: Net(patches, stem=conv(3, 4), conv=conv(4, 4, groups=4), pool=nn.MaxPool2d(2)),
    conv2d_nhwc=8,
    max_pool2d_nhwc=4,
    slice=16,
    cat=3,
    reshape=2,
    permute=2,
)
_add(
    "tokens",
    MAP,
    lambda: Net(tokens, conv=conv(3, 4), norm=nn.LayerNorm(4)),
    conv2d_nhwc=1,
    reshape=1,
    layer_norm=1,
    permute=1,
)
_add(
    "detector_heads",
    MAP,
    lambda: Net(
        detector_heads, first=conv(3, 4), second=conv(4, 4, stride=2), head_a=conv(4, 10, 1), head_b=conv(4, 5, 1)
    ),
    conv2d_nhwc=4,
    reshape=2,
    cat=1,
    permute=1,
)
_add(
    "conv_transpose",
    MAP,
    lambda: chain(conv(3, 4), nn.ConvTranspose2d(4, 2, 2, 2), conv(2, 4)),
    conv2d_nhwc=3,
    reshape=2,
    permute=3,
)
_add(
    "unsqueezed_constants",
    MAP,
    lambda: Net(
        unsqueezed_constants, conv=conv(3, 4), scale=nn.Parameter(torch.ones(4)), shift=nn.Parameter(torch.ones(4))
    ),
    conv2d_nhwc=1,
    mul=1,
    add=1,
    permute=2,
)
_add("mlp", (1, 6), lambda: chain(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), linear_act=2)
_add("linear_residual", (1, 5, 6), lambda: Net(lambda m, x: F.relu(x + m.fc(x)), fc=nn.Linear(6, 6)), linear_act=1)
_add(
    "linear_no_bias",
    (1, 5, 6),
    lambda: Net(lambda m, x: m.fc(x).clamp(max=0.25), fc=nn.Linear(6, 6, bias=False)),
    linear_act=1,
)
_add("no_convolution", MAP, lambda: Net(lambda m, x: F.relu(x).permute(0, 2, 3, 1) + 1.0), relu=1, add=1, permute=1)
