"""What goes into a region and what stays outside, and in-place operators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from edgec.data import random_data
from edgec.frontend import load_model
from edgec.lowering.lower import lower_torch
from edgec.passbase import Context
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import shape_of
from tests import zoo
from tests.lowering.helpers import Stages, calls, errors, load, operators, samples
from tests.lowering.networks import MAP, Net, chain, conv

pytestmark = pytest.mark.pure

INF = math.inf
edgec = torch.ops.edgec


def region(net: nn.Module, name: str = "conv2d_nhwc") -> fx.Node:
    """The last call of a region operator."""
    return calls(Stages(load(net, MAP)).regions, name)[-1]


def epilogue(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args[-3:])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Identity(), ("none", 0.0, 0.0)),
        (nn.ReLU(), ("clip", 0.0, INF)),
        (nn.ReLU(inplace=True), ("clip", 0.0, INF)),
        (nn.ReLU6(), ("clip", 0.0, 6.0)),
        (nn.Hardtanh(), ("clip", -1.0, 1.0)),
        (nn.Hardtanh(-0.5, 2.0, inplace=True), ("clip", -0.5, 2.0)),
        (nn.Hardswish(), ("hardswish", 0.0, 0.0)),
        (nn.Hardsigmoid(inplace=True), ("hardsigmoid", 0.0, 0.0)),
        (nn.SiLU(inplace=True), ("silu", 0.0, 0.0)),
        (nn.Sigmoid(), ("sigmoid", 0.0, 0.0)),
        (nn.Tanh(), ("tanh", 0.0, 0.0)),
        (nn.GELU(), ("gelu", 0.0, 0.0)),
        (nn.GELU("tanh"), ("gelu_tanh", 0.0, 0.0)),
        (nn.Mish(), ("mish", 0.0, 0.0)),
        (nn.LeakyReLU(0.2), ("leaky_relu", 0.2, 0.0)),
        (nn.ELU(), ("none", 0.0, 0.0)),
        (nn.Softplus(), ("none", 0.0, 0.0)),
    ],
    ids=repr,
)
def test_activation(layer: nn.Module, expected: tuple[Any, ...]) -> None:
    assert epilogue(region(chain(conv(3, 4), layer))) == expected


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [(0.0, None, ("clip", 0.0, INF)), (None, 0.5, ("clip", -INF, 0.5)), (-1, 1, ("clip", -1.0, 1.0))],
)
def test_clamp(lo: float | None, hi: float | None, expected: tuple[Any, ...]) -> None:
    assert epilogue(region(Net(lambda m, x: m.conv(x).clamp(lo, hi), conv=conv(3, 4)))) == expected


def test_clamp_with_tensor_bounds_stays_outside() -> None:
    net = Net(lambda m, x: torch.clamp(m.conv(x), min=m.low), conv=conv(3, 4), low=nn.Parameter(torch.zeros(4, 1, 1)))
    assert epilogue(region(net))[0] == "none"


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (conv(3, 4), ([1, 1], [1, 1, 1, 1], [1, 1], 1)),
        (conv(3, 4, (3, 2), padding=(1, 0), stride=(2, 1)), ([2, 1], [1, 1, 0, 0], [1, 1], 1)),
        (conv(3, 6, 3, groups=3, dilation=2, padding=0), ([1, 1], [0, 0, 0, 0], [2, 2], 3)),
        (conv(3, 4, (2, 5), padding="same"), ([1, 1], [0, 1, 2, 2], [1, 1], 1)),
        (conv(3, 4, 4, padding="same", dilation=(1, 2)), ([1, 1], [1, 2, 3, 3], [1, 2], 1)),
        (conv(3, 4, 3, padding="valid"), ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
        (chain(nn.ZeroPad2d((1, 2, 0, 3)), conv(3, 4)), ([1, 1], [1, 4, 2, 3], [1, 1], 1)),
        (chain(nn.ZeroPad2d((1, 0)), conv(3, 4)), ([1, 1], [1, 1, 2, 1], [1, 1], 1)),
    ],
)
def test_geometry(layer: nn.Module, expected: tuple[Any, ...]) -> None:
    """(stride, padding as top, bottom, left, right, dilation, groups)."""
    assert tuple(region(layer).args[4:8]) == expected


def test_padding_that_others_read_stays() -> None:
    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(x, (1, 1, 1, 1))
        return m.conv(y).sum() + y.sum()

    counts = operators(Stages(load(Net(forward, conv=conv(3, 4)), MAP)).regions)
    assert counts["pad"] == 1 and counts["conv2d_nhwc"] == 1


def test_channel_padding_stays() -> None:
    counts = operators(Stages(load(chain(nn.ConstantPad3d((0, 0, 0, 0, 0, 1), 0.0), conv(4, 4)), MAP)).regions)
    assert counts["pad"] == 1


@pytest.mark.parametrize(
    ("forward", "fused"),
    [
        (lambda m, s: m.conv(s) + s, True),
        (lambda m, s: s + m.conv(s), True),
        (lambda m, s: m.conv(s).add_(s), True),
        (lambda m, s: m.conv(s) + s.mean((2, 3), keepdim=True), False),
        (lambda m, s: m.conv(s) + 1.0, False),
        (lambda m, s: torch.add(m.conv(s), s, alpha=2), False),
        (lambda m, s: m.conv(s) - s, False),
        (lambda m, s: m.conv(s) + m.full, False),
    ],
    ids=["after", "before", "in place", "broadcast", "number", "alpha", "sub", "weight"],
)
def test_residual(forward: Any, fused: bool) -> None:
    net = Net(
        lambda m, x: F.relu(forward(m, m.stem(x))),
        stem=conv(3, 4),
        conv=conv(4, 4),
        full=nn.Parameter(torch.ones(1, 4, 9, 7)),
    )
    last = region(net)
    assert (last.args[3] is not None) == fused
    assert epilogue(last) == (("clip", 0.0, INF) if fused else ("none", 0.0, 0.0))


def test_a_result_with_two_readers_is_not_fused() -> None:
    node = region(Net(lambda m, x: (lambda y: F.relu(y) + y.mean())(m.conv(x)), conv=conv(3, 4)))
    assert epilogue(node) == ("none", 0.0, 0.0)


def test_an_output_is_not_fused() -> None:
    """The graph returns the convolution's own result as well."""
    program = load(Net(lambda m, x: (lambda y: (y, F.relu(y)))(m.conv(x)), conv=conv(3, 4)), MAP)
    assert len(program.outputs) == 2
    (node,) = calls(Stages(program).regions, "conv2d_nhwc")
    assert epilogue(node) == ("none", 0.0, 0.0)


def test_the_activation_before_the_addition_ends_the_region() -> None:
    stages = Stages(load(Net(lambda m, x: F.relu(m.conv(x)) + x, conv=conv(3, 3)), MAP))
    (node,) = calls(stages.regions, "conv2d_nhwc")
    assert epilogue(node) == ("clip", 0.0, INF) and node.args[3] is None
    assert operators(stages.layout)["add"] == 1


def test_linear_residual_and_activation() -> None:
    net = Net(lambda m, x: F.relu(m.a(x) + m.b(x)), a=nn.Linear(7, 7), b=nn.Linear(7, 7, bias=False))
    second, first = calls(Stages(load(net, MAP)).regions, "linear_act")
    assert [second.args[3], epilogue(second)] == [None, ("none", 0.0, 0.0)]
    assert [first.args[3], epilogue(first)] == [second, ("clip", 0.0, INF)]


# -- int8 layers with a float result -----------------------------------------------------------------------------------


class Int8Block(nn.Module):
    """int8 matrix products as `quantize-int8` leaves them in a transformer; `forward` gets what lies between."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def buffer(name: str, value: torch.Tensor) -> None:
            self.register_buffer(name, value)

        for layer in "ab":
            buffer(f"{layer}_w", torch.randint(-127, 128, (7, 7), generator=generator, dtype=torch.int8))
            buffer(f"{layer}_bias", torch.randint(-999, 999, (7,), generator=generator, dtype=torch.int32))
            buffer(f"{layer}_scale", torch.rand(7, generator=generator) * 2e-4)
        self.between = forward

    def layer(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        parts = (getattr(self, f"{name}_{part}") for part in ("w", "bias", "scale"))
        return edgec.qlinear_float(codes, *parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self, x, edgec.quantize(x, 0.01, 3))


def int8_block(forward: Any) -> list[fx.Node]:
    program = load_model(Int8Block(forward).eval(), input_shape=(1, 5, 7))
    return calls(Stages(program).regions, "qlinear_act")


@pytest.mark.parametrize(
    ("forward", "residual", "act", "grid"),
    [
        (lambda m, x, q: m.layer("a", q), False, "none", (None, 0)),
        (lambda m, x, q: F.gelu(m.layer("a", q)), False, "gelu", (None, 0)),
        (lambda m, x, q: F.relu(m.layer("a", q) + x), True, "clip", (None, 0)),
        (lambda m, x, q: x + m.layer("a", q), True, "none", (None, 0)),
        (lambda m, x, q: F.silu(x + m.layer("a", q)).exp(), True, "silu", (None, 0)),
        (lambda m, x, q: m.layer("a", q).exp() + x, False, "none", (None, 0)),
    ],
    ids=["plain", "gelu", "residual_relu", "residual", "residual_silu", "other"],
)
def test_int8_linear_takes_what_follows(forward: Any, residual: bool, act: str, grid: Any) -> None:
    (node,) = int8_block(forward)
    assert (node.args[4] is not None, node.args[5], tuple(node.args[8:])) == (residual, act, grid)


@pytest.mark.parametrize("function", [F.gelu, lambda y: y], ids=["gelu", "nothing"])
def test_int8_linear_rounds_for_the_next_layer(function: Any) -> None:
    first, second = int8_block(lambda m, x, q: m.layer("b", edgec.quantize(function(m.layer("a", q)), 0.031, -7)))
    assert first.args[8:] == (0.031, -7) and first.meta["val"].dtype == torch.int8
    assert second.args[0] is first and second.args[8:] == (None, 0)


def test_int8_linear_with_two_readers_stays_float() -> None:
    """Two layers read the sum: one of them rounds it."""
    first, second = int8_block(lambda m, x, q: (lambda y: y + m.layer("b", edgec.quantize(y, 0.1, 0)))(m.layer("a", q)))
    assert first.args[8:] == (None, 0) and second.args[4] is first


def test_rounding_by_a_product_differs_from_a_quotient_by_ties_only() -> None:
    block = Int8Block(None)
    codes = torch.randint(-128, 128, (400, 7), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    real = block.layer("a", codes)
    for scale in (0.1, 0.0173, 3e-4):
        args = (codes, block.a_w, block.a_bias, block.a_scale, None, "none", 0.0, 0.0, scale, 5)
        difference = edgec.qlinear_act(*args).int() - edgec.quantize(real, scale, 5).int()
        assert difference.abs().max() <= 1 and difference.count_nonzero() <= 2


def test_int8_convolution_with_a_float_result_works_channels_last() -> None:
    torch.manual_seed(0)
    program = load_model(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5)).eval(), input_shape=(1, *MAP[1:]))
    data = random_data(program.inputs, 8, seed=1)
    stages = Stages(QuantizeInt8().run(program, Context(calibration=data)))
    assert operators(stages.regions)["qconv2d_float"] == 1
    (node,) = calls(stages.layout, "qconv2d_float")
    assert node.args[-1] == "NHWC" and shape_of(node)[-1] == 5
    assert operators(stages.layout)["permute"] == 2, "the input's and the output's"


def test_regions_of_an_int8_transformer() -> None:
    program = zoo.program("vit_block")
    after = QuantizeInt8().run(program, Context(calibration=zoo.calibration("vit_block")))
    stages = Stages(after)
    acts = calls(stages.layout, "qlinear_act")
    assert [n.args[5] for n in acts] == ["none", "none", "gelu", "none", "none"]
    assert [n.args[4] is not None for n in acts] == [False, True, False, True, False]
    assert [n.args[8] is not None for n in acts] == [False, False, True, False, False]
    assert not {"qlinear_float", "gelu"} & set(operators(stages.layout))


@pytest.mark.parametrize(
    ("layer", "fused"),
    [
        (nn.MaxPool2d(2), True),
        (nn.MaxPool2d((3, 2), (2, 1), (1, 0), (1, 2)), True),
        (nn.MaxPool2d(2, ceil_mode=True), True),
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), True),
        (nn.MaxPool2d(2, (3, 2), dilation=(1, 3), ceil_mode=True), True),
        (nn.AvgPool2d(3, 2, 1), True),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), False),
        (nn.AvgPool2d(3, count_include_pad=False), True),
        (nn.AvgPool2d(2, ceil_mode=True), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
    ],
    ids=repr,
)
def test_pools(layer: nn.Module, fused: bool) -> None:
    """Pools that the kernels do not compute exactly so stay with TVM's operators."""
    counts = operators(Stages(load(layer, MAP)).layout)
    kind = "max_pool2d" if isinstance(layer, nn.MaxPool2d) else "avg_pool2d"
    assert counts == ({f"{kind}_nhwc": 1, "permute": 2} if fused else {kind: 1})


def test_other_convolutions_stay() -> None:
    net = Net(
        lambda m, x: m.one(m.up(x).flatten(2)),
        up=nn.ConvTranspose2d(3, 4, 2, 2),
        one=nn.Conv1d(4, 4, 3),
    )
    assert operators(Stages(load(net, MAP)).layout) == {"conv_transpose2d": 1, "flatten": 1, "conv1d": 1}


# -- in-place operators ------------------------------------------------------------------------------------------------


def view_before(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    v = y[:, :2]
    y += 1.0
    return F.relu(m.last(y)) + v.sum()


def write_into_view(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y[:, 0] = 0.25
    return m.last(y)


def shared_flat(m: Net, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y.view(y.shape[0], -1).neg_()
    return m.last(y)


@pytest.mark.parametrize("forward", [view_before, write_into_view, shared_flat])
def test_writing_into_views_changes_the_tensor(forward: Any) -> None:
    net = Net(forward, conv=conv(3, 4), last=conv(4, 4))
    program = load(net, MAP)
    staged = lower_torch(program)
    assert operators(staged.module)["conv2d_nhwc"] == 2
    inputs = samples(program)
    assert errors(staged(*inputs), (net(*inputs).detach(),)) < 1e-6


def test_lower_torch_fuses_in_place_activations() -> None:
    staged = lower_torch(load(chain(conv(3, 4), nn.ReLU(inplace=True), conv(4, 4), nn.ReLU6(inplace=True)), MAP))
    assert operators(staged.module) == {"conv2d_nhwc": 2, "permute": 2}
