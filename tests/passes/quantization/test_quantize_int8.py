"""quantize-int8: exact invariants on every model of the zoo, patterns on tiny models, errors, and real networks."""

from __future__ import annotations

import copy
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import Preprocess, load_data, random_data
from edgec.errors import EdgecError
from edgec.passbase import Context, Needs
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.convert import Converter
from edgec.passes.quantization.operators import arguments
from edgec.passes.quantization.quantize_int8 import Int8Summary, QuantizeInt8
from edgec.program import Program, get_weight, is_call, layer_of, origin_of
from edgec.targets.device import load_device
from tests import zoo
from tests.passes.quantization.helpers import (
    Result,
    by_definition,
    differences,
    edgec,
    is_layer,
    noise,
    quantised,
    records,
)

pytestmark = pytest.mark.pure
aten = torch.ops.aten

# Of models without a layer that can be int8.


@pytest.fixture(scope="module", params=zoo.names())
def result(request: pytest.FixtureRequest) -> Result:
    return quantised(zoo.program(request.param), noise(16, *zoo.ZOO[request.param].shape[1:]))


# -- exact invariants (specs/quantization.md 1.13) ---------------------------------------------------------------------


def test_equals_the_definition(result: Result):
    for size in (1, 3):
        x = noise(size, *result.samples.shape[1:], seed=5)
        for got, want in zip(result.after(x), by_definition(result.after, x), strict=True):
            assert torch.equal(got, want)


def test_each_layer_equals_real_arithmetic_on_the_same_codes(result: Result):
    found = differences(result.after, noise(5, *result.samples.shape[1:], seed=6))
    for name, difference in found.items():
        assert difference.max() <= 1, name
        assert (difference == 0).mean() >= 0.99, name


def test_is_close_to_the_float_model(result: Result):
    assert result.error < 0.05
    assert [(s.shape, s.dtype) for s in result.after.inputs] == [(s.shape, s.dtype) for s in result.before.inputs]
    assert [(s.shape, s.dtype) for s in result.after.outputs] == [(s.shape, s.dtype) for s in result.before.outputs]


def test_every_integer_tensor_is_described(result: Result):
    found = records(result.after)
    for node in result.after.graph.nodes:
        if node.op == "call_function":
            assert node.meta["edgec_layer"]
            if isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].dtype == torch.int8:
                assert found[node.name].storage == "i8"
                assert origin_of(node) in {origin_of(n) for n in result.before.graph.nodes}
    for path, tensor in result.after.weights().items():
        if path in found and found[path].granularity == "channel":
            assert tensor.dtype == torch.int8
            assert tensor.min() >= -127
            assert len(found[path].scale) == len(tensor)  # type: ignore[arg-type]


def test_is_deterministic(result: Result):
    again = QuantizeInt8().run(result.before, Context(calibration=result.context.calibration))
    assert again.text() == result.after.text()


def test_leaves_its_input_alone(result: Result):
    text = result.before.text()
    QuantizeInt8(equalize=True, bias_correction=True).run(result.before, copy.copy(result.context))
    assert result.before.text() == text


def test_survives_saving(result: Result, tmp_path):
    result.after.save(tmp_path / "model.pt2")
    loaded = Program.from_exported(torch.export.load(tmp_path / "model.pt2"), "loaded")
    for got, want in zip(loaded(result.samples), result.after(result.samples), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{"equalize": True}, {"bias_correction": True}, {"rounding": "nearest"}])
def test_options_keep_the_model_close(result: Result, options):
    other = quantised(result.before, result.samples, fold=False, **options)
    assert other.error < 0.05
    assert other.operators == result.operators


def test_rounding_follows_the_target(result: Result):
    """RQF where the target says so; its codes are those of RQ1, except that a few are the neighbours."""
    calibration = result.context.calibration
    cores = {name: Context(device=load_device(name), calibration=calibration) for name in ("cortex-a72", "cortex-a7")}
    by_name = {name: QuantizeInt8().run(result.before, context) for name, context in cores.items()}
    assert by_name["cortex-a7"].text() == result.after.text()
    floats = QuantizeInt8(requant="RQF").run(result.before, cores["cortex-a7"])
    assert floats.text() == by_name["cortex-a72"].text()
    layers = [n for n in floats.graph.nodes if is_call(n, edgec.qconv2d.default, edgec.qlinear.default)]
    for node in layers:
        m, shift = (get_weight(floats.module, a) for a in node.args[3:5])
        assert (m.dtype, shift.dtype) == (torch.float32, torch.int32) and not shift.any()
        assert records(floats)[node.name].requant == "RQF"
    assert all(records(result.after)[n.name].requant == "RQ1" for n in layers)
    for got, want in zip(floats(result.samples), by_definition(floats, result.samples), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(floats(result.samples), result.after(result.samples), strict=True):
        assert (got - want).norm() <= 0.03 * want.norm()


def test_weights_and_tables_are_all_that_is_stored(result: Result):
    """Int8 weights take a byte each; beside them a layer has three int32 values per output channel, or two values where
    its result is float."""
    layers = [n for n in result.after.graph.nodes if is_layer(n)]
    assert layers
    for node in layers:
        real = node.meta["val"].dtype == torch.float32
        w, *per_channel = (get_weight(result.after.module, a) for a in node.args[1 : 4 if real else 5])
        assert w.dtype == torch.int8
        assert all(v.shape == (len(w),) for v in per_channel)
        assert [v.dtype for v in per_channel] == [torch.int32, *([torch.float32] if real else [torch.int32] * 2)]
    summary = result.after.annotations["quantize-int8"]
    assert isinstance(summary, Int8Summary)
    assert len(summary.quantised) == len(layers)


# -- patterns ----------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """A function between two 1x1 convolutions, which make it worth int8."""

    def __init__(self, function, channels: int = 4, out: int = 4, parameters: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, channels, 1), nn.Conv2d(out, 2, 1)
        self.function, self.parts = function, parameters

    def forward(self, x):
        x = self.first(x)
        return self.last(self.function(x) if self.parts is None else self.function(x, self.parts))


def around(function, size: int = 8, fold: bool = True, **options) -> Result:
    return quantised(Around(function, **options), 2 * noise(8, 3, size, size), fold)


def inside(result: Result) -> list[str]:
    """The operators between the two convolutions."""
    convolutions = [i for i, name in enumerate(result.operators) if name.startswith("qconv2d")]
    return result.operators[convolutions[0] + 1 : convolutions[-1]]


MOVES = {
    "flatten": (lambda x: x.flatten(2).unflatten(2, (8, 8)), ["flatten", "unflatten"]),
    "view": (lambda x: x.reshape(x.shape[0], 4, 64).view(-1, 4, 8, 8), ["reshape", "reshape"]),
    "permute": (lambda x: x.permute(0, 1, 3, 2).transpose(2, 3), ["permute", "transpose"]),
    "slice": (lambda x: x[:, :, ::2, 1:], ["slice", "slice"]),
    "select": (lambda x: x[:, :, 3].unsqueeze(2).expand(-1, -1, 5, -1), ["select", "unsqueeze", "expand"]),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), ["unsqueeze", "squeeze"]),
    "flip": (lambda x: x.flip(1).roll(1, 2).repeat(1, 1, 2, 1), ["flip", "roll", "repeat"]),
    "shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), ["pixel_shuffle", "pixel_unshuffle"]),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), ["channel_shuffle"]),
    "max_pool": (lambda x: F.max_pool2d(x, 3, 2, 1), ["qmax_pool2d"]),
    "max_pool_ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), ["qmax_pool2d"]),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), ["unsqueeze", "unsqueeze", "expand", "reshape"]),
    "channel_pad": (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), ["pad"]),
    "crop": (lambda x: F.pad(x, (-1, 1, 0, 0)), ["pad"]),
    "wider_clip": (lambda x: F.relu(F.relu6(x)), []),
    "narrower_clip": (lambda x: F.hardtanh(F.relu(x), 0.0, 0.05), []),
    "dropout": (lambda x: F.dropout(x, training=False).contiguous().clone(), []),
    "relu_of_pool": (lambda x: F.relu(F.max_pool2d(x, 2)), ["qmax_pool2d", "clamp"]),
    "scaled": (lambda x: (x * 3.0) / 0.5, []),
}


@pytest.mark.parametrize("case", MOVES)
def test_moves_share_the_codes(case: str):
    """Every value that comes out of a move went in; there is no rounding between the two layers."""
    function, expected = MOVES[case]
    result = around(function)
    assert [name.replace("constant_pad_nd", "pad") for name in inside(result)] == expected
    assert result.error < 0.03
    found = records(result.after)
    if case != "scaled":
        scales = {
            found[n.name].per_tensor for n in result.after.graph.nodes if n.name in found and "conv" not in n.name
        }
        first = next(n for n in result.after.graph.nodes if is_call(n, edgec.qconv2d.default))
        moved = scales - {found["x_q"].per_tensor}
        assert moved <= {found[first.name].per_tensor}


def test_a_clip_of_what_others_read_stays_apart():
    def both(x: torch.Tensor) -> torch.Tensor:
        wide = F.relu(x)
        return F.hardtanh(wide, 0.0, 0.05) + wide

    result = around(both)
    assert inside(result) == ["clamp", "qadd"]
    assert result.error < 0.03


TABLES = {
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "plus": lambda x: x + 0.7,
    "minus": lambda x: 1.0 - x,
    "negative": lambda x: x * -2.0,
    "abs": torch.abs,
    "cube": lambda x: x**3,
}


@pytest.mark.parametrize("case", TABLES)
def test_functions_become_tables(case: str):
    result = around(TABLES[case])
    assert inside(result) == ["qlut"]
    assert result.error < 0.04
    (node,) = [n for n in result.after.graph.nodes if is_call(n, edgec.qlut.default)]
    table = get_weight(result.after.module, node.args[1]).double()
    x, y = (records(result.after)[n] for n in (node.args[0].name, node.name))
    reals = (torch.arange(-128, 128) - x.zero_point).double() * x.scale
    want = (TABLES[case](reals) / y.scale).round() + y.zero_point
    assert torch.equal(table, want.clamp(-128, 127))


def test_prelu_undoes_scales_per_channel():
    torch.manual_seed(0)
    act = nn.PReLU(4)
    with torch.no_grad():
        act.weight.copy_(torch.tensor([0.0, 0.25, -0.5, 1.5]))
    model = Around(lambda x, parts: parts(x), parameters=act)
    with torch.no_grad():
        model.first.weight[1] *= 0.001
        model.first.bias[1] *= 0.001
    result = quantised(model, 2 * noise(8, 3, 8, 8))
    assert inside(result) == ["qlut"]
    lookup = next(n for n in result.after.graph.nodes if is_call(n, edgec.qlut.default))
    assert get_weight(result.after.module, lookup.args[1]).shape == (4, 256)
    before = records(result.after)[lookup.args[0].name]
    assert before.granularity == "channel" and before.axis == 1
    assert before.scale[1] < 0.01 * before.scale[0]  # type: ignore[index]
    assert result.error < 0.02


def test_prelu_with_one_slope_and_batch_norm_after_a_sum():
    result = around(lambda x, parts: parts(x), parameters=nn.PReLU())
    lookup = next(n for n in result.after.graph.nodes if is_call(n, edgec.qlut.default))
    assert get_weight(result.after.module, lookup.args[1]).shape == (256,)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.copy_(torch.tensor([0.5, -0.5, 0.0, 1.0]))  # type: ignore[union-attr]
    norm.running_var.copy_(torch.tensor([0.2, 1.0, 3.0, 0.5]))  # type: ignore[union-attr]
    result = around(lambda x, parts: parts(F.max_pool2d(x, 2) + F.max_pool2d(-x, 2)), fold=False, parameters=norm)
    assert inside(result) == ["qmax_pool2d", "qlut", "qmax_pool2d", "qadd", "qlut"]
    assert result.error < 0.04


SUMS = {
    "add": (lambda x: x + F.max_pool2d(x, 3, 1, 1), ["qmax_pool2d", "qadd"]),
    "add_relu": (lambda x: F.relu(x + F.max_pool2d(x, 3, 1, 1)), ["qmax_pool2d", "qadd"]),
    "sub": (lambda x: x - F.max_pool2d(x, 3, 1, 1), ["qmax_pool2d", "qadd"]),
    "alpha": (lambda x: torch.add(x, F.max_pool2d(x, 3, 1, 1), alpha=-3), ["qmax_pool2d", "qadd"]),
    "double": (lambda x: x + x, ["qadd"]),
    "mul": (lambda x: x * F.max_pool2d(x, 3, 1, 1), ["qmax_pool2d", "qmul"]),
    "square": (lambda x: x * x, ["qmul"]),
    "gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), ["qmean", "qlut", "qmul"]),
    "average": (lambda x: F.avg_pool2d(x, 2), ["qavg_pool2d"]),
    "average_padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), ["qavg_pool2d"]),
    "average_divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), ["qavg_pool2d"]),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (4, 2)), ["qavg_pool2d"]),
    "global": (lambda x: F.relu6(F.adaptive_avg_pool2d(x, 1)), ["qmean"]),
    "mean": (lambda x: x.mean((-1, 2), keepdim=True), ["qmean"]),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_products_and_averages(case: str):
    function, expected = SUMS[case]
    result = around(function)
    assert inside(result) == expected
    assert result.error < 0.04
    found = differences(result.after, noise(4, 3, 8, 8, seed=8))
    assert all(d.max() <= 1 for d in found.values())


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.linspace(-1, 2, 4).view(1, 4, 1, 1))


@pytest.mark.parametrize("function,name", [(torch.mul, "qmul"), (torch.add, "qadd"), (torch.sub, "qadd")])
@pytest.mark.parametrize("first", [False, True])
def test_stored_operands(function, name: str, first: bool):
    result = around(
        lambda x, parts: function(parts.value, x) if first else function(x, parts.value), parameters=Constant()
    )
    assert inside(result) == [name]
    assert result.after.weights()["parts.value_q"].dtype == torch.int8
    assert result.error < 0.03
    assert all(d.max() <= 1 for d in differences(result.after, noise(4, 3, 8, 8, seed=8)).values())


STAY_FLOAT = {
    "softmax": (lambda x: x.softmax(1), "softmax", "has no int8 form"),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "pad", "pads by reflect"),
    "pad_one": (lambda x: F.pad(x, (1, 1), value=1.0), "pad", "pads with a value other than zero"),
    "ceil": (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), "avg_pool2d", "uses ceil_mode"),
    "valid_taps": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "avg_pool2d",
        "leaves padding out of the average",
    ),
    "uneven": (lambda x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d", "windows have different sizes"),
    "bilinear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        "upsample_bilinear2d",
        "has no int8 form",
    ),
    "nearest": (lambda x: F.interpolate(x, size=(9, 9)), "upsample_nearest2d", "factor is not a whole number"),
    "div": (lambda x: x / (x * x + 1.0), "div", "divides tensors"),
    "norm": (lambda x: F.layer_norm(x, (8, 8)), "layer_norm", "has no int8 form"),
    "residual_stream": (
        lambda x: F.layer_norm(x + F.max_pool2d(x, 3, 1, 1), (8, 8)),
        "add",
        "is normalised afterwards: one scale does not serve a residual stream",
    ),
}


@pytest.mark.parametrize("case", STAY_FLOAT)
def test_float_islands_are_reported(case: str):
    function, what, reason = STAY_FLOAT[case]
    result = around(function)
    assert (what, reason) in [(s.what, s.reason) for s in result.context.skipped]
    assert [name for name in result.operators if "conv" in name] == ["qconv2d_float"] * 2
    assert what in inside(result)
    assert result.error < 0.05


def test_clips_end_up_in_the_codes(monkeypatch: pytest.MonkeyPatch):
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))

        def forward(self, x):
            for layer, clip in zip(self.layers, (F.relu, F.relu6, F.hardtanh, lambda v: v.clamp(-0.5)), strict=True):
                x = clip(8 * layer(x))
            return x

    result = quantised(Clips(), noise(8, 4, 6, 6), observer="min-max")
    # A number times codes is another scale: the clip behind it is one of the same codes.
    assert result.operators == ["quantize", *["qconv2d"] * 3, "qconv2d_float", "mul", "clamp"]
    with monkeypatch.context() as patch:
        patch.setattr(Converter, "_clips_itself", lambda self, codes: False)
        apart = quantised(Clips(), noise(8, 4, 6, 6), observer="min-max")
    assert apart.operators.count("clamp") == 4
    x = noise(5, 4, 6, 6)
    assert torch.equal(result.after(x)[0], apart.after(x)[0])
    layers = [nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1), nn.Hardtanh(-0.1, 0.2), nn.Conv2d(4, 4, 1), nn.ReLU()]
    fused = quantised(nn.Sequential(*layers), noise(8, 4, 6, 6))
    assert fused.operators == ["quantize", "qconv2d", "qconv2d", "qconv2d_float", "relu"]
    limits = [(n, n.args[11:13]) for n in fused.after.graph.nodes if is_call(n, edgec.qconv2d.default)]
    for (node, (lo, hi)), (low, high) in zip(limits, ((0.0, 6.0), (-0.1, 0.2)), strict=True):
        scale, zero = records(fused.after)[node.name].per_tensor
        assert lo == max(-128, zero + round(low / scale))
        assert hi == min(127, zero + round(high / scale))


def test_concatenation_ties_producers_or_rescales_them():
    class Branches(nn.Module):
        def __init__(self, reused: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
            self.again, self.reused = nn.Conv2d(4, 8, 1), reused

        def forward(self, x):
            a, b = F.relu(self.a(x)), 0.1 * F.hardswish(self.b(x))
            y = torch.cat([a, b], 1)
            return self.last(y + self.again(a)) if self.reused else self.last(y)

    tied = quantised(Branches(False), noise(8, 3, 6, 6))
    assert tied.operators == ["quantize", "qconv2d", "qconv2d", "qlut", "qrescale", "cat", "qconv2d_float"]
    found = records(tied.after)
    (cat,) = [n for n in tied.after.graph.nodes if is_call(n, aten.cat.default)]
    assert {found[n.name].per_tensor for n in cat.args[0]} == {found[cat.name].per_tensor}
    assert found["conv2d_q"].per_tensor == found[cat.name].per_tensor
    reused = quantised(Branches(True), noise(8, 3, 6, 6))
    assert reused.operators.count("qrescale") == 2
    assert max(tied.error, reused.error) < 0.03


def test_concatenation_with_a_constant_and_with_the_input():
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
            self.token = nn.Parameter(torch.randn(8, 2, 6))

        def forward(self, x):
            y = self.first(x)
            return self.last(torch.cat([self.token, y, 3 * y], 1))

    model = Constants().eval()
    x = noise(8, 5, 4)
    program = Program.from_exported(torch.export.export(model, (x,)), "constants")
    result = quantised(program, x)
    assert result.operators == ["quantize", "qlinear", "qrescale", "qrescale", "cat", "qlinear_float"]
    assert result.after.weights()["token_q"].dtype == torch.int8
    assert result.error < 0.03


def test_zero_pads_fold_into_convolutions():
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, padding=(0, 1)), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = F.pad(F.relu(self.a(F.pad(x, (0, 1, 0, 1)))), (1, 1, 1, 1))
            return self.b(x) + self.c(F.pad(x, (1, 1)))

    result = quantised(Pads(), noise(8, 3, 9, 9, low=0.5))
    assert "constant_pad_nd" in result.operators, "the second pad of c cannot fold: only one is looked through"
    padding = [arguments(n)["padding"] for n in result.after.graph.nodes if is_layer(n)]
    assert padding == [[0, 1, 0, 1], [1, 1, 2, 2], [0, 0, 1, 1]]
    assert result.error < 0.02


def test_splits_and_gates():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            a, b = self.first(x).chunk(2, 1)
            c, d = (a * torch.sigmoid(b)).split([1, 3], 1)
            e, f = torch.stack([d, d], 1).unbind(1) if False else (d, d)
            return self.last(torch.cat([e[:, :2], c, f], 1))

    result = quantised(Gated(), 2 * noise(8, 3, 6, 6))
    assert "dequantize" not in result.operators
    assert operator.getitem in {n.target for n in result.after.graph.nodes}
    assert "qmul" in result.operators and "qlut" in result.operators
    assert result.error < 0.03


def transformer(**options) -> list[str]:
    """The operators of a transformer block after quantisation."""
    return quantised(zoo.program("vit_block"), noise(8, *zoo.ZOO["vit_block"].shape[1:]), **options).operators


def test_moves_before_layers_carry_codes():
    """Attention's output is reshaped as int8, what reaches attention is not rounded."""
    names = transformer()
    attention = names.index("scaled_dot_product_attention")
    assert names[attention + 1 : attention + 5] == ["quantize", "transpose", "reshape", "qlinear_float"]
    assert "dequantize" not in names
    assert "linear" not in names and "conv2d" not in names


def test_only_the_inputs_of_layers_are_codes_in_a_transformer():
    block = ["layer_norm", "quantize", "qlinear_float", "gelu", "quantize", "qlinear_float", "add"]
    names = transformer()
    start = len(names) - 1 - names[::-1].index("layer_norm")
    assert names[start:] == [*block, "select", "quantize", "qlinear_float"], "only the class token is rounded"
    assert not {"qlut", "qadd", "qlinear", "qconv2d"} & set(names)


def test_integer_only_transformers_have_tables_and_no_float_layers():
    names = transformer(nonlinear="integer")
    assert names.count("qlut") == 1 and "gelu" not in names
    assert not {"qlinear_float", "qconv2d_float"} & set(names)
    assert names[-2:] == ["qlinear", "dequantize"]


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.mish])
def test_functions_with_outliers_stay_float_behind_linear_layers(function):
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.last = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 5)
            self.gated = False

        def forward(self, x):
            y = function(self.a(x))
            return self.last(y * self.b(x) if self.gated else y)

    model = Mlp()
    plain = quantised(model, 3 * noise(8, 6))
    assert plain.operators == ["quantize", "qlinear_float", function.__name__, "quantize", "qlinear_float"]
    assert (function.__name__, "is computed in float before the result is rounded") in [
        (s.what, s.reason) for s in plain.context.skipped
    ]
    model.gated = True
    gated = quantised(model, 3 * noise(8, 6))
    assert gated.operators.count("quantize") == 2 and "qmul" not in gated.operators
    tables = quantised(model, 3 * noise(8, 6), nonlinear="integer")
    assert tables.operators == ["quantize", "qlinear", "qlut", "qlinear", "qmul", "qlinear", "dequantize"]
    assert plain.error < 0.02 and gated.error < tables.error


def test_functions_behind_convolutions_are_tables_unless_told_otherwise():
    assert inside(around(F.silu)) == ["qlut"]
    result = quantised(Around(F.silu), 2 * noise(8, 3, 8, 8), nonlinear="float")
    assert inside(result) == ["silu", "quantize"]
    assert inside(quantised(Around(F.hardswish), 2 * noise(8, 3, 8, 8), nonlinear="float")) == ["qlut"]


def test_sums_that_a_written_out_norm_reads_stay_float():
    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x + self.a(x)
            return self.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    result = quantised(Rms(), noise(8, 6))
    assert result.operators[:3] == ["quantize", "qlinear_float", "add"]
    assert result.operators[-2:] == ["quantize", "qlinear_float"]


def test_a_layer_with_an_int8_and_a_float_reader_gives_codes():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y), y.flatten(2)

    result = quantised(Both(), noise(8, 3, 4, 4))
    assert result.operators == ["quantize", "qconv2d", "qconv2d_float", "flatten", "dequantize"]


def test_sums_with_a_float_operand_are_float():
    """One grid, that of the sum, instead of three."""
    result = around(lambda x: x + F.interpolate(x[:, :, ::2, ::2], scale_factor=2, mode="bilinear"))
    names = inside(result)
    assert names.index("add") == len(names) - 2 and names[-1] == "quantize"


def test_sums_between_float_islands_stay_float():
    class Islands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return (self.fc(x).softmax(-1) + x.sin()) * x.cos()

    result = quantised(Islands(), noise(8, 6))
    assert result.operators == ["quantize", "qlinear_float", "softmax", "sin", "add", "cos", "mul"]


def test_a_sum_with_the_input_at_the_end_does_not_round_the_input():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x):
            return x + self.b(F.relu(self.a(x)))

    result = quantised(Skip(), noise(8, 1, 8, 8))
    assert result.operators == ["quantize", "qconv2d", "qconv2d_float", "add"]
    integers = quantised(Skip(), noise(8, 1, 8, 8), nonlinear="integer")
    assert integers.operators == ["quantize", "qconv2d", "qconv2d", "qadd", "dequantize"]
    assert result.error < 0.7 * integers.error


def test_in_place_calls():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = F.relu_(self.a(x))
            z = self.b(y)
            z += y
            w = self.c(F.hardswish(z, inplace=True))
            w[:, 1:3] *= 2
            return w

    result = quantised(InPlace(), 2 * noise(8, 3, 6, 6))
    assert result.operators[:5] == ["quantize", "qconv2d", "qconv2d", "qadd", "qlut"]
    assert result.error < 0.03


def test_static_batches_and_two_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x, y):
            return F.relu(self.a(x)).view(2, -1), self.b(y) + self.a(x)

    inputs = noise(2, 3, 5, 5, low=0), noise(2, 2, 5, 5, low=0)
    program = Program.from_exported(torch.export.export(Two().eval(), inputs), "two")
    assert not program.dynamic_batch
    after = QuantizeInt8().run(program, Context(calibration=random_data(program.inputs, 5)))
    for got, want in zip(after(*inputs), program(*inputs), strict=True):
        assert (got - want).abs().max() < 0.1 * want.abs().max()
    with pytest.raises(EdgecError, match="1 calibration samples do not fill the model's batch of 2"):
        QuantizeInt8().run(program, Context(calibration=random_data(program.inputs, 1)))


# -- degenerate layers -------------------------------------------------------------------------------------------------


def test_dead_channels_and_dead_layers():
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            with torch.no_grad():
                self.a.weight[0] = 0
                self.a.bias[0] = 5.0
                self.a.weight[1] *= 1e-9
                self.a.bias[1] = -3.0
                self.b.weight.zero_()
                self.b.bias.fill_(-1.0)

        def forward(self, x):
            x = self.a(x)
            return self.c(x + F.relu(self.b(x)))

    result = quantised(Dead(), noise(8, 3, 6, 6))
    assert result.error < 0.02
    reasons = [(s.layer, s.reason) for s in result.context.skipped]
    assert any("was zero for every calibration sample" in reason for _, reason in reasons)
    for got, want in zip(result.after(result.samples), by_definition(result.after, result.samples), strict=True):
        assert torch.equal(got, want)


def test_values_that_are_not_finite_name_the_layer():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(torch.log(self.a(x) - 10))

    with pytest.raises(EdgecError, match=r"^log: mse: range \[nan, nan\] is not finite; check the calibration data"):
        quantised(Root(), noise(2, 3, 6, 6))


def test_batch_norms_left_by_the_user():
    result = quantised(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        noise(4, 3, 6, 6),
        fold=False,
    )
    assert result.operators == ["conv2d", "batch_norm", "relu", "quantize", "qconv2d_float"]
    assert ("0", "conv2d", "a batch norm follows: run fold-bn first") in [
        (s.layer, s.what, s.reason) for s in result.context.skipped
    ]


# -- options -----------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(3))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.parametrize(
    "patterns,kept",
    [
        (("stem",), ["stem"]),
        (["blocks.1"], ["blocks.1.0", "blocks.1.2"]),
        (("blocks.*.0", "head"), ["blocks.0.0", "blocks.1.0", "blocks.2.0", "head"]),
        ((), []),
    ],
)
def test_keep_float(patterns, kept):
    result = quantised(Named(), noise(8, 3, 6, 6), keep_float=patterns)
    layers = [layer_of(n) for n in result.after.graph.nodes if is_call(n, aten.conv2d.default)]
    assert layers == kept
    assert list(result.after.annotations["quantize-int8"].kept_float) == kept
    reported = [
        s.layer for s in result.context.skipped if s.reason == "kept float by keep_float" and s.what == "conv2d"
    ]
    assert reported == kept
    assert result.error < 0.03


def test_keep_float_reduces_the_error():
    whole = quantised(Named(), noise(8, 3, 6, 6))
    part = quantised(Named(), noise(8, 3, 6, 6), keep_float=("blocks",))
    assert part.error < whole.error


@pytest.mark.parametrize(
    "options,message",
    [
        ({"keep_float": ("steam",)}, "quantize-int8{keep_float}: no layer is called 'steam'; did you mean 'stem'?"),
        ({"keep_float": ("x.y.z",)}, "quantize-int8{keep_float}: no layer is called 'x.y.z'; layers are"),
        ({"keep_float": "stem"}, "'stem' is not a list of layer names; write keep_float=[conv1,fc]"),
        ({"observer": "median"}, "quantize-int8{observer}: 'median' is not a choice; use one of min-max, percentile"),
        ({"rounding": "up"}, "quantize-int8{rounding}: 'up' is not a choice"),
        ({"percentile": 101.0}, "quantize-int8{percentile}: 101.0 is above 100"),
        ({"calibration_samples": 0}, "quantize-int8{calibration_samples}: 0 is below 1"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(EdgecError) as caught:
        quantised(Named(), noise(4, 3, 6, 6), **options)
    assert str(caught.value).find(message) >= 0, str(caught.value)


def test_needs_calibration_data():
    assert Needs.CALIBRATION in QuantizeInt8.needs
    with pytest.raises(EdgecError, match=r"pass quantize-int8: needs calibration data; give --data"):
        QuantizeInt8().run(zoo.program("residual"), Context())


def test_number_of_samples_and_observers():
    result = quantised(Named(), noise(40, 3, 6, 6), calibration_samples=3, observer="min-max")
    assert result.after.annotations["quantize-int8"].samples == 3
    scales = {
        quantised(Named(), noise(40, 3, 6, 6), observer=o).after.text() for o in ("min-max", "mse", "kl", "percentile")
    }
    assert len(scales) == 4


# -- trained networks --------------------------------------------------------------------------------------------------


class DigitsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.depthwise = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise, self.fc = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.pointwise(F.relu(self.depthwise(F.relu(self.dense(x))))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def digits():
    """A small network trained on 8x8 digits, then made awkward: channels differ e-fold and more between layers.

    specs/quantization.md 1.14: the function is unchanged, but one scale per tensor no longer serves all channels.
    """
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:1000], order[1000:]
    torch.manual_seed(0)
    model = DigitsNet()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 100)
    for _ in range(100):
        for batch in train[torch.randperm(len(train))].split(100):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        for first, second in ((model.dense, model.depthwise), (model.depthwise, model.pointwise)):
            factor = torch.exp(1.2 * torch.randn(16)).view(16, 1, 1, 1)
            first.weight.mul_(factor)
            first.bias.mul_(factor.flatten())
            second.weight.div_(factor if second is model.depthwise else factor.view(1, 16, 1, 1))
    return model, x[train][:256], x[test], y[test]


def accuracy(program: Program, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((program(x)[0].argmax(1) == y).float().mean())


@pytest.mark.slow
def test_per_channel_and_equalisation_beat_per_tensor(digits):
    model, samples, x, y = digits

    def top1(**options) -> float:
        return accuracy(quantised(model, samples, **options).after, x, y)

    original = accuracy(quantised(model, samples).before, x, y)
    per_tensor = top1(per_channel=False, rounding="nearest", observer="min-max")
    per_channel = top1(rounding="nearest", observer="min-max")
    equalised = top1(per_channel=False, rounding="nearest", observer="min-max", equalize=True)
    assert original > 0.85
    assert per_channel > per_tensor + 0.08
    assert equalised > per_tensor + 0.30
    assert original - equalised <= 0.01


CIFAR = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def resnet20(shared):
    exported = torch.export.load(shared / "data/models/cifar10_resnet20.pt2")
    before = FoldBN().run(Program.from_exported(exported, "resnet20"), Context())
    data = {
        part: load_data(str(shared / f"data/datasets/cifar10_{part}.npz"), before.inputs, CIFAR)
        for part in ("train5k", "test")
    }
    context = Context(calibration=data["train5k"])
    return before, QuantizeInt8().run(before, context), context, data["test"]


def correct(program: Program, data) -> np.ndarray:
    predictions = [program(*x)[0].argmax(1).numpy() for x, _ in data.batches(128)]
    return np.concatenate(predictions) == data.labels


@pytest.mark.slow
def test_resnet20_loses_at_most_one_point(resnet20):
    before, after, context, data = resnet20
    float_correct, int8_correct = correct(before, data), correct(after, data)
    assert float_correct.mean() > 0.91
    assert float_correct.mean() - int8_correct.mean() <= 0.010
    assert (float_correct != int8_correct).mean() <= 0.02
    assert context.skipped == []


@pytest.mark.slow
def test_resnet20_is_integer_throughout_and_equals_the_definition(resnet20):
    _, after, _, data = resnet20
    x = data.inputs(slice(0, 2))
    (got,), (want,) = after(x), by_definition(after, x)
    assert torch.equal(got, want)
    floats = [n for n in after.graph.nodes if n.op == "call_function" and n.meta["val"].dtype == torch.float32]
    assert [n.target for n in floats] == [edgec.qlinear_float.default]
    assert all(d.max() <= 1 and (d == 0).mean() > 0.99 for d in differences(after, x).values())
