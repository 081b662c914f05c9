"""adopt-qdq: the codes, scales and zero points of quantised models survive, and their layers become integer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgec.cli import main
from edgec.compile import compile_model
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.importing.quantized import StoredCodes, comes_quantised, stored_codes
from edgec.onnx.importer import import_onnx
from edgec.onnx.writer import to_onnx
from edgec.passbase import Context
from edgec.passes.quantization.adopt_qdq import AdoptQdq, find_codes
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.pipeline import Pipeline
from edgec.program import Program, get_weight
from edgec.quantparams import QParams
from edgec.stats import sqnr_db
from tests import zoo
from tests.passes.quantization.helpers import by_definition, noise, quantised, records

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec
importlib.import_module("torch.ao.quantization.fx._decomposed")
decomposed = torch.ops.quantized_decomposed

KINDS: dict[str, Any] = {"int8": np.int8, "uint8": np.uint8}


# -- models in ONNX ----------------------------------------------------------------------------------------------------


class Graph:
    """An ONNX graph on the way: each method appends a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def quantize(self, x: str, scale: float, zero: int, kind: str = "int8") -> str:
        return self.add("QuantizeLinear", x, self.const(scale), self.const(zero, KINDS[kind]))

    def dequantize(self, x: str, scale: float, zero: int, kind: str = "int8") -> str:
        return self.add("DequantizeLinear", x, self.const(scale), self.const(zero, KINDS[kind]))

    def pair(self, x: str, scale: float, zero: int, kind: str = "int8") -> str:
        return self.dequantize(self.quantize(x, scale, zero, kind), scale, zero, kind)

    def weight(self, codes: np.ndarray, scale: Any, zero: Any = 0, axis: int = 0) -> str:
        scale = np.array(scale, np.float32)
        zeros = np.broadcast_to(np.array(zero), scale.shape).astype(codes.dtype)
        inputs = (self.const(codes, codes.dtype), self.const(scale), self.const(zeros, codes.dtype))
        return self.add("DequantizeLinear", *inputs, axis=axis)

    def program(self, path: Path, result: str, *shape: int, opset: int = 19, kind: int = TensorProto.FLOAT) -> Program:
        last = [n for n in self.nodes if result in n.output]
        last[0].output[0] = "y"
        for node in self.nodes:
            for i, name in enumerate(node.input):
                node.input[i] = "y" if name == result else name
        ports = [helper.make_tensor_value_info("x", kind, ["batch", *shape])]
        outputs = [helper.make_tensor_value_info("y", kind, None)]
        graph = helper.make_graph(self.nodes, "g", ports, outputs, self.constants)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
        return import_onnx(path)


def adopted(program: Program, **options: Any) -> tuple[Program, Context]:
    context = Context()
    return AdoptQdq(**options).run(program, context), context


def operators(program: Program) -> list[str]:
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return [getattr(t, "__name__", str(t)).partition(".")[0] for t in calls]


def weight_codes(program: Program) -> dict[str, tuple[torch.Tensor, QParams]]:
    """The weights of integer layers and their records."""
    layers = (edgec.qconv2d.default, edgec.qconv2d_float.default, edgec.qlinear.default, edgec.qlinear_float.default)
    nodes = [n.args[1] for n in program.graph.nodes if n.target in layers]
    known = records(program)
    return {str(n.target): (get_weight(program.module, n), known[str(n.target)]) for n in nodes}


# -- exactness ---------------------------------------------------------------------------------------------------------

scales = st.floats(0.001, 0.1).map(lambda value: float(np.float32(value)))


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["int8", "uint8"]),
    channels=st.booleans(),
    x_scale=scales,
    y_scale=scales,
    zero=st.integers(-128, 127),
)
def test_codes_scales_and_zero_points_survive(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    kind: str,
    channels: bool,
    x_scale: float,
    y_scale: float,
    zero: int,
) -> None:
    """A convolution, its clip, and a matrix that the importer transposes; codes against exact arithmetic."""
    rng, shift = np.random.default_rng(seed), 128 if kind == "uint8" else 0
    w = rng.integers(-127, 128, (5, 3, 3, 3)).astype(np.int8)
    m = rng.integers(-127, 128, (5, 4)).astype(np.int8)
    ws = rng.uniform(1e-4, 1e-2, 5 if channels else ()).astype(np.float32)
    ms = rng.uniform(1e-3, 1e-2, 4 if channels else ()).astype(np.float32)
    b = rng.integers(-5000, 5000, 5).astype(np.int32)
    g = Graph()
    x = g.pair("x", x_scale, zero + shift, kind)
    bias = g.add(
        "DequantizeLinear", g.const(b, np.int32), g.const(np.broadcast_to(np.float32(x_scale) * ws, 5)), axis=0
    )
    y = g.add("Relu", g.add("Conv", x, g.weight(w, ws), bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    y = g.pair(y, y_scale, -128 + shift, kind)
    y = g.pair(g.add("GlobalAveragePool", y), y_scale, -128 + shift, kind)
    y = g.add("MatMul", g.add("Flatten", y), g.weight(m, ms, axis=1))
    program = g.program(tmp_path_factory.mktemp("onnx") / "m.onnx", y, 3, 5, 4)
    after, context = adopted(program)

    assert context.skipped == []
    assert operators(after) == ["quantize", "qconv2d", "qmean", "flatten", "qlinear_float"] or operators(after) == [
        "quantize",
        "qconv2d",
        "qavg_pool2d",
        "flatten",
        "qlinear_float",
    ]
    (conv, conv_record), (linear, linear_record) = weight_codes(after).values()
    assert np.array_equal(conv.numpy(), w) and np.array_equal(linear.numpy(), m.T)
    assert conv_record.scale == tuple(float(s) for s in np.broadcast_to(ws, 5))
    assert linear_record.scale == tuple(float(s) for s in np.broadcast_to(ms, 4))
    known = records(after)
    by_name = {str(n.target).split(".")[1]: known.get(n.name) for n in after.graph.nodes if n.op == "call_function"}
    first, second = by_name["quantize"], by_name["qconv2d"]
    assert first is not None and second is not None
    assert first.per_tensor == (x_scale, zero) and second.per_tensor == (y_scale, -128)

    real = noise(2, 3, 5, 4, seed=seed)
    for got, want in zip(after(real), by_definition(after, real), strict=True):
        assert torch.equal(got, want)
    codes = torch.clamp(torch.round(real / x_scale) + zero, -128, 127).double() - zero
    sums = F.conv2d(codes, torch.from_numpy(w).double(), torch.from_numpy(b).double(), padding=1)
    steps = sums * (np.float64(x_scale) * torch.from_numpy(np.broadcast_to(ws, 5).copy()).double()).view(-1, 1, 1)
    want = torch.clamp(torch.round(steps / y_scale) - 128, -128, 127)
    node = next(n for n in after.graph.nodes if n.target is edgec.qconv2d.default)
    got = values_of(after, node, real)
    assert (got.double() - want).abs().max() <= 1 and (got.double() == want).double().mean() > 0.98


def values_of(program: Program, node: torch.fx.Node, x: torch.Tensor) -> torch.Tensor:
    found = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Keeping(program.module).run(x)
    return found[node]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.permutations([0, 1, 2]))
def test_codes_are_found_in_any_order(seed: int, channels: bool, order: list[int]) -> None:
    """Transposed and reshaped weights among the scales of others, some of which are multiples of theirs."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (6, 4, 3))
    scale = np.float32(rng.uniform(1e-4, 1e-1, 6 if channels else ()))
    others = [StoredCodes.of(rng.integers(-127, 128, (6, 4)), np.float32(scale * f)) for f in (0.5, 2.0, 1.01)]
    record = StoredCodes.of(codes, scale)
    weight = codes.astype(np.float32) * scale.reshape(-1, 1, 1)
    inner = tuple(1 + i for i in np.argsort(order[:2]))
    found = find_codes(np.ascontiguousarray(weight.transpose(0, *inner)), (*others, record))
    assert found is not None
    assert np.array_equal(found.steps, codes.transpose(0, *inner))
    assert np.array_equal(found.scales, np.broadcast_to(scale.astype(np.float64), 6))
    assert find_codes(weight * np.float32(1.003), (*others, record)) is None


ROUND_TRIPS = (
    "residual",
    "concat",
    "grouped_conv",
    "pools",
    "squeeze_excite",
    "mlp",
    "super_resolution",
    "loose_norms",
)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_there_and_back_is_the_same_program(name: str, tmp_path: Path) -> None:
    """quantize-int8, written as ONNX, read and adopted: every output is equal to the last bit, and so are the codes."""
    first = quantised(zoo.program(name), noise(16, *zoo.ZOO[name].shape[1:])).after
    (tmp_path / "m.onnx").write_bytes(to_onnx(first).SerializeToString())
    again, _ = adopted(import_onnx(tmp_path / "m.onnx"))
    x = noise(4, *zoo.ZOO[name].shape[1:], seed=9)
    for want, got in zip(first(x), again(x), strict=True):
        assert torch.equal(got, want)
    work = [[o for o in operators(p) if o.startswith("q") and o != "qrescale"] for p in (first, again)]
    assert work[1] == work[0]
    codes = [w for w, _ in weight_codes(first).values()]
    assert all(torch.equal(a, b) for a, (b, _) in zip(codes, weight_codes(again).values(), strict=True))


# -- operators that work on codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        ("residual", "QUInt8", "QDQ"),
        ("residual", "QInt8", "QOperator"),
        ("pools", "QUInt8", "QOperator"),
        ("squeeze_excite", "QInt8", "QDQ"),
        ("concat", "QUInt8", "QOperator"),
        ("mlp", "QUInt8", "QOperator"),
        ("vit_block", "QUInt8", "QDQ"),
    ],
)
def test_what_onnx_runtime_quantises(name: str, kind: str, form: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    program = Pipeline.of("fold-bn").passes[0].run(zoo.program(name), Context())
    (tmp_path / "f.onnx").write_bytes(to_onnx(program).SerializeToString())
    shape = zoo.ZOO[name].shape[1:]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(noise(8, *shape).split(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {program.inputs[0].name: row.numpy()}

    quantization.quantize_static(
        str(tmp_path / "f.onnx"),
        str(tmp_path / "q.onnx"),
        Reader(),
        quant_format=getattr(quantization.QuantFormat, form),
        activation_type=getattr(quantization.QuantType, kind),
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )
    imported = import_onnx(tmp_path / "q.onnx")
    after, context = adopted(imported)
    summary = after.annotations["adopt-qdq"]
    assert summary.kept_float == () and len(summary.quantised) == sum(
        "conv" in o or "linear" in o for o in operators(after)
    )
    floats = {s.what for s in context.skipped}
    assert not floats & {"conv2d", "linear", "add"} and (floats <= {"mean"} or name == "vit_block")
    x = noise(4, *shape, seed=5)
    for got, want in zip(after(x), imported(x), strict=True):
        assert sqnr_db(got.numpy(), want.numpy()) > 25
    if form == "QOperator":
        assert comes_quantised(imported) and stored_codes(imported)


def test_uint8_codes_are_moved_as_codes(tmp_path: Path) -> None:
    """Between quantisation and dequantisation the file reshapes, pools and joins uint8 codes."""
    g = Graph()
    w = np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)
    x = g.add("Conv", g.pair("x", 0.01, 128, "uint8"), g.weight(w, 0.01), kernel_shape=[1, 1])
    codes = g.quantize(x, 0.02, 120, "uint8")
    codes = g.add("MaxPool", codes, kernel_shape=[2, 2], strides=[2, 2])
    codes = g.add("Concat", codes, codes, axis=1)
    codes = g.add("Transpose", codes, perm=[0, 2, 3, 1])
    y = g.add(
        "Conv",
        g.add("Transpose", g.dequantize(codes, 0.02, 120, "uint8"), perm=[0, 3, 1, 2]),
        g.weight(np.ones((2, 8, 1, 1), np.int8), 0.5),
    )
    program = g.program(tmp_path / "m.onnx", y, 3, 6, 6)
    after, context = adopted(program)
    assert operators(after) == ["quantize", "qconv2d", "qmax_pool2d", "cat", "permute", "permute", "qconv2d_float"]
    assert context.skipped == []
    x = noise(2, 3, 6, 6)
    assert sqnr_db(after(x)[0].numpy(), program(x)[0].numpy()) > 40


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_inputs_and_outputs_that_are_codes(kind: str, tmp_path: Path) -> None:
    """As converters of TFLite files write them: no real number comes in or goes out."""
    g, shift = Graph(), 128 if kind == "uint8" else 0
    w = np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)
    y = g.add("Conv", g.dequantize("x", 0.01, 5 + shift, kind), g.weight(w, 0.01), kernel_shape=[1, 1])
    y = g.quantize(y, 0.02, -7 + shift, kind)
    port = getattr(TensorProto, kind.upper())
    program = g.program(tmp_path / "m.onnx", y, 3, 4, 4, kind=port)
    after, context = adopted(program)
    assert context.skipped == []
    wanted = ["qconv2d"] if kind == "int8" else ["to", "sub", "to", "qconv2d", "to", "add", "to"]
    assert operators(after) == wanted
    x = torch.from_numpy(np.random.default_rng(1).integers(0, 100, (2, 3, 4, 4)).astype(KINDS[kind]))
    difference = after(x)[0].int() - program(x)[0].int()
    assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.97


# -- PyTorch -----------------------------------------------------------------------------------------------------------


class Pt2e(nn.Module):
    """What PT2E makes of two convolutions and a linear layer; the second one's weight has one scale."""

    def __init__(self, low: int, high: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.low, self.high, self.dtype = low, high, dtype
        rng = np.random.default_rng(3)
        for name, shape in {"first": (8, 3, 3, 3), "second": (8, 1, 3, 3), "last": (5, 8)}.items():
            self.register_buffer(name, torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8)))
        self.register_buffer("scales", torch.from_numpy(rng.uniform(0.001, 0.01, 8).astype(np.float32)))
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 8))

    def pair(self, x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
        grid = (scale, zero + self.low + 128, self.low, self.high, self.dtype)
        return decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *grid), *grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = decomposed.dequantize_per_channel(self.first, self.scales, self.zeros, 0, -127, 127, torch.int8)
        second = decomposed.dequantize_per_tensor(self.second, 0.004, 0, -127, 127, torch.int8)
        x = self.pair(F.relu(F.conv2d(self.pair(x, 0.0123, -5), first, self.bias, padding=1)), 0.02, -128)
        y = self.pair(F.relu(F.conv2d(x, second, None, padding=1, groups=8)), 0.03, -128)
        x = self.pair(F.adaptive_avg_pool2d(self.pair(x + y, 0.05, -128), 1), 0.04, -128)
        return F.linear(x.flatten(1), decomposed.dequantize_per_tensor(self.last, 0.01, 0, -127, 127, torch.int8))


@pytest.mark.parametrize("grid", [(-128, 127, torch.int8), (0, 255, torch.uint8), (-128, -1, torch.int8)])
def test_pt2e_graphs_from_a_file(grid: tuple[int, int, torch.dtype], tmp_path: Path) -> None:
    model = Pt2e(*grid).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(model, (noise(2, 3, 6, 6),), dynamic_shapes=dynamic), tmp_path / "m.pt2")
    program = load_model(str(tmp_path / "m.pt2"))
    after, context = adopted(program)
    assert context.skipped == []
    calls = [o for o in operators(after) if o.startswith("q")]
    assert calls == ["quantize", "qconv2d", "qconv2d", "qadd", "qmean", "qlinear_float"]
    for (codes, record), want, scale in zip(
        weight_codes(after).values(), (model.first, model.second, model.last), (model.scales, 0.004, 0.01), strict=True
    ):
        assert torch.equal(codes, want)
        assert np.allclose(record.scale, scale.numpy() if isinstance(scale, torch.Tensor) else scale, rtol=1e-6)
    if grid[1] == -1:  # codes of seven bits
        assert [r.p for r in records(after).values() if r.granularity == "tensor"].count(-1) >= 3
    x = noise(4, 3, 6, 6, seed=1)
    assert sqnr_db(after(x)[0].numpy(), model(x).detach().numpy()) > 35


class Fake(nn.Module):
    """A network at the end of quantisation-aware training; `steps` are its ranges."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        self.register_buffer("scale", self.conv.weight.detach().abs().amax((1, 2, 3)) / 127)
        self.register_buffer("zero", torch.zeros(6, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)
        w = torch.fake_quantize_per_channel_affine(self.conv.weight, self.scale, self.zero, 0, -127, 127)
        x = torch.fake_quantize_per_tensor_affine(F.relu(F.conv2d(x, w, self.conv.bias)), 0.01, 0, 0, 255)
        w = torch.fake_quantize_per_tensor_affine(self.fc.weight, 0.004, 0, -128, 127)
        return F.linear(torch.fake_quantize_per_tensor_affine(x.mean((2, 3)), 0.005, 0, 0, 255), w, self.fc.bias)


def test_fake_quantisation_is_adopted() -> None:
    model = Fake().eval()
    after, context = adopted(load_model(model, input_shape=(2, 3, 6, 6)))
    assert context.skipped == []
    assert operators(after) == ["quantize", "qconv2d", "qmean", "qlinear_float"]
    (codes, record), (last, _) = weight_codes(after).values()
    assert np.array_equal(np.float32(record.scale), model.scale.numpy())
    want = torch.clamp(torch.round(model.conv.weight * (1 / model.scale).view(-1, 1, 1, 1)), -127, 127)
    assert torch.equal(codes.float(), want.detach())
    assert torch.equal(last.float(), torch.clamp(torch.round(model.fc.weight * (1 / 0.004)), -128, 127).detach())
    x = noise(4, 3, 6, 6, seed=1)
    assert sqnr_db(after(x)[0].numpy(), model(x).detach().numpy()) > 35


class FakeNorm(nn.Module):
    """A layer in training with quantisation whose batch norm is still there; one of its factors is negative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        zoo.set_weights(self, 3)
        self.bn.weight.data[1] *= -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)
        w = torch.fake_quantize_per_tensor_affine(self.conv.weight, 2 / 127, 0, -127, 127)
        y = F.relu(self.bn(F.conv2d(x, w, padding=1)))
        return torch.fake_quantize_per_tensor_affine(y, 0.02, 0, 0, 255)


def test_batch_norms_change_scales_and_no_codes() -> None:
    model = FakeNorm().eval()
    after, context = adopted(load_model(model, input_shape=(2, 3, 6, 6)))
    assert context.skipped == []
    assert operators(after) == ["quantize", "qconv2d", "dequantize"]
    ((codes, record),) = weight_codes(after).values()
    want = torch.round(model.conv.weight.detach() * (127 / 2)).to(torch.int8)
    want[1] *= -1
    assert torch.equal(codes, want)
    factor = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
    assert np.allclose(record.scale, 2 / 127 * factor.abs().detach().numpy(), rtol=1e-6)
    x = noise(4, 3, 6, 6, seed=1)
    assert sqnr_db(after(x)[0].numpy(), model(x).detach().numpy()) > 40


def test_sixteen_bits_stay_real_numbers() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grid = (0.001, 0, -32768, 32767, torch.int16)
            return F.relu(decomposed.dequantize_per_tensor(decomposed.quantize_per_tensor(x, *grid), *grid))

    program = load_model(Wide(), input_shape=(2, 8))
    assert not comes_quantised(program) and program.dynamic_batch
    assert operators(program) == ["mul", "round", "add", "clamp", "sub", "mul", "relu"]


# -- what the file does not give ---------------------------------------------------------------------------------------


def island(softmax: bool) -> Graph:
    """Two convolutions; between them a softmax on its own grids, or nothing that says what the codes mean."""
    g = Graph()
    rng = np.random.default_rng(0)
    first, second = (rng.integers(-127, 128, (3, 3, 1, 1)).astype(np.int8) for _ in range(2))
    y = g.add("Conv", g.pair("x", 0.01, 0), g.weight(first, 0.01), kernel_shape=[1, 1])
    y = g.pair(g.add("Softmax", g.pair(y, 0.02, 3), axis=1), 1 / 255, -128) if softmax else g.add("Relu", y)
    g.add("Conv", y, g.weight(second, 0.01), kernel_shape=[1, 1])
    return g


def test_an_island_of_floats_between_integer_layers(tmp_path: Path) -> None:
    g = island(softmax=True)
    program = g.program(tmp_path / "m.onnx", g.nodes[-1].output[0], 3, 4, 4)
    after, context = adopted(program)
    assert operators(after) == ["quantize", "qconv2d", "dequantize", "softmax", "quantize", "qconv2d_float"]
    assert [(s.what, s.reason) for s in context.skipped] == [("softmax", "has no int8 form")]
    x = noise(2, 3, 4, 4)
    assert sqnr_db(after(x)[0].numpy(), program(x)[0].numpy()) > 35


def test_a_pair_that_is_missing_leaves_the_next_layer_float(tmp_path: Path) -> None:
    g = island(softmax=False)
    program = g.program(tmp_path / "m.onnx", g.nodes[-1].output[0], 3, 4, 4)
    after, context = adopted(program)
    assert "qconv2d_float" in operators(after) and "conv2d" in operators(after)
    reasons = {s.what: s.reason for s in context.skipped}
    assert reasons["conv2d"] == "the file gives no scale for what it reads"
    summary = after.annotations["adopt-qdq"]
    assert (len(summary.quantised), len(summary.kept_float)) == (1, 1)
    sentence = "came quantised: its own scales make 1 of 2 layers integer, the weights of 1 more stay codes"
    assert str(summary) == sentence


def test_a_range_that_stands_for_a_relu_still_cuts_off(tmp_path: Path) -> None:
    """Quantisers drop a ReLU in front of codes that begin at zero; the layer in front of this one has float weights."""
    g = Graph()
    weight = g.const(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))
    y = g.add("Softmax", g.pair(g.add("Conv", "x", weight, kernel_shape=[1, 1]), 0.01, -128), axis=1)
    program = g.program(tmp_path / "m.onnx", y, 3, 2, 2)
    after, _ = adopted(program)
    x = noise(2, 3, 2, 2)
    assert torch.allclose(after(x)[0], torch.softmax(x.clamp(0, 2.55), 1), atol=1e-6)


def test_codes_of_one_grid_become_codes_of_another(tmp_path: Path) -> None:
    """A pair behind a pair, and a ReLU with a scale of its own behind a layer with codes."""
    g = Graph()
    w = np.random.default_rng(0).integers(-127, 128, (3, 3, 1, 1)).astype(np.int8)
    y = g.pair(g.add("Conv", g.pair("x", 0.01, 0), g.weight(w, 0.01), kernel_shape=[1, 1]), 0.02, -3)
    y = g.pair(g.add("Relu", y), 0.013, -128)
    y = g.pair(y, 0.017, 5)
    program = g.program(tmp_path / "m.onnx", g.add("MaxPool", y, kernel_shape=[2, 2]), 3, 4, 4)
    after, context = adopted(program)
    assert operators(after) == ["quantize", "qconv2d", "qlut", "qlut", "qmax_pool2d", "dequantize"]
    assert context.skipped == []
    x = noise(4, 3, 4, 4)
    got, want = after(x)[0], program(x)[0]
    assert ((got - want).abs() <= 0.0171).all() and (got == want).float().mean() > 0.97


def test_constants_have_their_own_scales(tmp_path: Path) -> None:
    g = Graph()
    codes = np.arange(-60, 60, 10).astype(np.int8).reshape(1, 3, 2, 2)
    x = g.pair("x", 0.01, 0)
    y = g.pair(g.add("Add", x, g.weight(codes, 0.02, 7)), 0.03, 1)
    program = g.program(tmp_path / "m.onnx", y, 3, 2, 2)
    after, _ = adopted(program)
    assert operators(after) == ["quantize", "qadd", "dequantize"]
    (stored,) = after.weights().values()
    assert np.array_equal(stored.numpy(), codes)
    x = noise(4, 3, 2, 2)
    assert ((after(x)[0] - program(x)[0]).abs() < 0.0301).all()


def uint8_weights(tmp_path: Path, zero: int) -> Program:
    g = Graph()
    w = np.random.default_rng(0).integers(0, 256, (4, 3, 1, 1)).astype(np.uint8)
    w[0] = np.uint8(zero)
    w[1, :, 0, 0] = (zero - 100, zero + 50, zero - 1)
    y = g.add("Conv", g.pair("x", 0.01, 0), g.weight(w, 0.01, zero), kernel_shape=[1, 1])
    return g.program(tmp_path / "m.onnx", y, 3, 4, 4)


def test_uint8_weights_become_integer_where_they_fit(tmp_path: Path) -> None:
    program = uint8_weights(tmp_path, 140)
    after, context = adopted(program)
    assert operators(after)[-2:] == ["dequantize_weight", "conv2d"]
    assert after.annotations["adopt-qdq"].packed == after.annotations["adopt-qdq"].kept_float
    reason = "its weights are more than 127 steps from their zero point (recode=true rounds them)"
    assert [(s.what, s.reason) for s in context.skipped] == [("conv2d", reason)]
    rounded, _ = adopted(program, recode=True)
    assert operators(rounded) == ["quantize", "qconv2d_float"]
    ((codes, _),) = weight_codes(rounded).values()
    assert codes[1].flatten().tolist() == [-100, 50, -1]
    x = noise(4, 3, 4, 4)
    assert torch.allclose(after(x)[0], program(x)[0], atol=0.02)
    assert sqnr_db(rounded(x)[0].numpy(), program(x)[0].numpy()) > 35


@pytest.mark.parametrize(
    "options", ["bits=8", "bits=8 group=0", "bits=4 group=4", "bits=4 group=4 asymmetric=true", "bits=3 group=0"]
)
def test_weights_of_few_bits_come_back_as_codes(options: str, tmp_path: Path) -> None:
    """quantize-weights, written as ONNX and read again: no activation has a scale, every weight has its codes."""
    first = Pipeline.of(f"quantize-weights{{{options}}}").passes[0].run(zoo.program("mlp"), Context())
    (tmp_path / "m.onnx").write_bytes(to_onnx(first).SerializeToString())
    again, _ = adopted(import_onnx(tmp_path / "m.onnx"))
    assert len(again.annotations["adopt-qdq"].packed) == 3
    before, after = ([w for w in p.weights().values() if w.dtype == torch.int8] for p in (first, again))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    bits = [[r.bits for r in records(p).values() if r.granularity == "group"] for p in (first, again)]
    assert bits[1] == bits[0]
    x = noise(4, 16)
    assert torch.allclose(again(x)[0], first(x)[0], rtol=1e-5, atol=1e-6)


def test_four_bits_without_sign(tmp_path: Path) -> None:
    """uint4 codes in blocks of a matrix that the importer transposes, each block with its zero point."""
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (8, 6)), rng.integers(0, 16, (2, 6))
    block = rng.uniform(0.01, 0.1, (2, 6)).astype(np.float32)
    tensors = [
        helper.make_tensor("w", TensorProto.UINT4, codes.shape, codes.reshape(-1)),
        numpy_helper.from_array(block, "s"),
        helper.make_tensor("z", TensorProto.UINT4, zeros.shape, zeros.reshape(-1)),
    ]
    g = Graph()
    g.constants += tensors
    y = g.add("MatMul", "x", g.add("DequantizeLinear", "w", "s", "z", axis=0, block_size=4))
    program = g.program(tmp_path / "m.onnx", y, 8, opset=21)
    after, _ = adopted(program)
    assert operators(after) == ["dequantize_weight", "linear"]
    (record,) = (r for r in records(after).values() if r.granularity == "group")
    assert (record.bits, record.group, record.storage) == (4, 4, "pack4")
    assert torch.equal(after(noise(3, 8))[0], program(noise(3, 8))[0])


def test_layers_are_kept_float_by_name(tmp_path: Path) -> None:
    g = island(softmax=True)
    program = g.program(tmp_path / "m.onnx", g.nodes[-1].output[0], 3, 4, 4)
    first = adopted(program)[0].annotations["adopt-qdq"].quantised[0]
    after, context = adopted(program, keep_float=(first,))
    assert after.annotations["adopt-qdq"].kept_float == (first,)
    assert "kept float by keep_float" in {s.reason for s in context.skipped}


def test_a_float_model_is_left_alone() -> None:
    program = zoo.program("residual")
    after, context = adopted(program)
    assert after is program
    assert [s.reason for s in context.skipped] == ["the model does not come quantised: it has no scales of its own"]


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    first = quantised(zoo.program("residual"), noise(16, *zoo.ZOO["residual"].shape[1:])).after
    path = tmp_path / "net.onnx"
    path.write_bytes(to_onnx(first).SerializeToString())
    return path


@pytest.mark.host
def test_a_quantised_file_compiles_to_integer_code_by_itself(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", str(file), "-o", str(tmp_path / "out"), "--no-onnx"]) == 0
    out = capsys.readouterr().out
    assert "model   came quantised: its own scales make 5 of 5 layers integer\n" in out
    assert "bit-exact" in out and "\n adopt-qdq " in out


def test_passes_that_quantise_again_are_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(file.parent / "d.npz", x=noise(4, *zoo.ZOO["residual"].shape[1:]).numpy())
    with pytest.raises(EdgecError) as caught:
        compile_model(str(file), passes="fold-bn, quantize-int8", data=str(file.parent / "d.npz"))
    assert str(caught.value) == (
        "pass quantize-int8: net comes quantised, with scales of its own; leave quantize-int8 out: adopt-qdq makes it "
        "integer with those scales; or give the float model"
    )


@pytest.mark.host
def test_it_runs_where_the_pass_list_has_it(file: Path) -> None:
    result = compile_model(str(file), passes="fold-bn, adopt-qdq", stop_after="adopt-qdq")
    assert [s.name for s in result.ledger.stages] == ["original", "import", "fold-bn", "adopt-qdq"]
    assert result.ledger.meta["passes"] == "fold-bn, adopt-qdq"


def test_quantize_int8_takes_what_the_file_left_float(tmp_path: Path) -> None:
    """adopt-qdq, then another quantiser: its layers and those of the file are integer."""
    g = island(softmax=False)
    program = g.program(tmp_path / "m.onnx", g.nodes[-1].output[0], 3, 4, 4)
    from edgec.data import load_data

    data = load_data(noise(8, 3, 4, 4).numpy(), program.inputs)
    after = QuantizeInt8().run(adopted(program, pack=False)[0], Context(calibration=data))
    assert sum("conv2d" in o for o in operators(after)) == sum("qconv2d" in o for o in operators(after)) == 2
    x = noise(8, 3, 4, 4)
    assert sqnr_db(after(x)[0].numpy(), program(x)[0].numpy()) > 30
