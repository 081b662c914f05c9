"""Operators of ONNX that are written out on import: loops, transforms, deformable windows, states. See test_onnx.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from tests.lowering.helpers import compile_host
from tests.test_onnx import IMAGE, ROW, check, node_cases, refusal, save, values

pytestmark = pytest.mark.pure


def written(path: Path, text: str, opset: int = 21) -> Path:
    """A model in ONNX's own text."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    path.write_bytes(model.SerializeToString())
    return path


FAMILIES = {
    "Scan": "scan",
    "Scan in LinearAttention": "linear_attention_gated_delta_gqa",
    "Loop": "loop11",
    "Loop in Range": "range_float_type_positive_delta_expanded",
    "If": "if",
    "DFT": "dft",
    "STFT": "stft",
    "mel": "melweightmatrix",
    "windows": "hannwindow",
    "DeformConv": "deform_conv",
    "DeformConv basic": "basic_deform_conv",
    "RoiAlign": "roialign_aligned",
    "MaxUnpool": "maxunpool",
    "Col2Im": "col2im",
    "CausalConvWithState": "causal_conv_with_state",
    "TensorScatter": "tensorscatter",
    "FlexAttention": "flexattention_score_mod",
    "bits": "bitcast_int8_to_uint8",
    "constants": "shape_",
    "Optional": "optional_get_element_tensor",
}
REFUSED = ("if_opt", "if_seq")


@pytest.mark.parametrize("family", FAMILIES)
def test_node_tests(family: str) -> None:
    from benchmarks.onnx_nodes import run_case

    chosen = [c for n, c in node_cases().items() if n.startswith(f"test_{FAMILIES[family]}")]
    chosen = [c for c in chosen if c.name.removeprefix("test_") not in REFUSED]
    assert chosen
    results = {c.name: run_case(c) for c in chosen}
    assert {n: r for n, r in results.items() if r[0] != "right"} == {}


SCAN = """
g (float[4, 1, 3] x, float[1, 5] h) => (float[4, 1, 5] y, float[1, 5] last)
<float[3, 5] w = {0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7, -0.8, 0.9, 1.0, -1.1, 1.2, 0.2, 0.1, 0.4}>
{
  last, y = Scan <num_scan_inputs = 1, scan_input_directions = [1], scan_output_directions = [1],
    body = step (float[1, 5] before, float[1, 3] row) => (float[1, 5] after, float[1, 5] out)
    { p = MatMul (row, w)  s = Add (p, before)  after = Tanh (s)  out = Identity (after) }> (h, x)
}"""
WHILE = """
g (float[1, 4] x) => (float[1, 4] y)
<int64 most = {6}, bool true = {1}, float limit = {10.0}>
{
  y = Loop <body = turn (int64 i, bool go, float[1, 4] v) => (bool again, float[1, 4] w)
    { w = Add (v, v)  s = ReduceSum <keepdims = 0> (w)  again = Less (s, limit) }> (most, true, x)
}"""
BRANCH = """
g (float[1, 4] x, bool flag) => (float[1, 4] y)
<float[4] c = {1.0, 2.0, 3.0, 4.0}>
{
  y = If <then_branch = a () => (float[1, 4] u) { u = Mul (x, c) },
          else_branch = b () => (float[1, 4] v) { v = Neg (x) }> (flag)
}"""
LISTS = """
g (float[1, 6] x) => (float[3, 1, 2] y, int64 n)
<int64 two = {2}, int64 last = {-1}>
{
  parts = SplitToSequence <axis = 1> (x, two)
  end = SequenceAt (parts, last)
  r = Relu (end)
  none = SequenceEmpty ()
  one = SequenceInsert (none, r)
  first = SequenceErase (parts, last)
  count = SequenceLength (parts)
  n = Identity (count)
  a = ConcatFromSequence <axis = 1> (first)
  b = ConcatFromSequence <axis = 1> (one)
  c = Concat <axis = 1> (a, b)
  again = SplitToSequence <axis = 1> (c, two)
  y = ConcatFromSequence <axis = 0, new_axis = 1> (again)
}"""


def test_loops_branches_and_sequences(tmp_path: Path) -> None:
    check(written(tmp_path / "scan.onnx", SCAN), {"x": values(4, 1, 3), "h": values(1, 5, seed=1)})
    for size in (0.1, 3.0):
        x = np.abs(values(1, 4)) * np.float32(size)
        check(written(tmp_path / "while.onnx", WHILE), {"x": x})
    branch = written(tmp_path / "if.onnx", BRANCH)
    for flag in (False, True):
        check(branch, {"x": values(1, 4), "flag": np.array(flag)})
    check(written(tmp_path / "lists.onnx", LISTS), {"x": values(1, 6)})


def test_loops_that_cannot_be_written_out_are_refused(tmp_path: Path) -> None:
    endless = WHILE.replace("(most, true, x)", '("", true, x)')
    text = refusal(written(tmp_path / "w.onnx", endless))
    assert "Loop has no fixed number of turns: when it ends depends on an input; give the loop" in text
    long = WHILE.replace("{6}", "{5000}").replace("again = Less (s, limit)", "again = Identity (go)")
    assert "Loop of 5000 turns is too long to be written out" in refusal(written(tmp_path / "l.onnx", long))
    given = WHILE.replace("(float[1, 4] x)", "(float[1, 4] x, int64 most)", 1).replace("int64 most = {6}, ", "")
    assert "Loop needs a constant for its number of turns" in refusal(written(tmp_path / "g.onnx", given))
    form = BRANCH.replace("v = Neg (x)", "z = Neg (x)  v = Concat <axis = 1> (z, z)").replace("[1, 4] v", "[1, 8] v")
    text = refusal(written(tmp_path / "f.onnx", form))
    assert "If chooses between results of different form, float32[1, 4] and float32[1, 8]" in text


def test_audio_front_end(tmp_path: Path) -> None:
    """Frames, spectrum, mel filters, logarithm: all tables are computed on import."""
    text = """
g (float[1, 400] signal) => (float[1, 13, 12] y)
<int64 step = {20}, int64 size = {160}, int64 mels = {12}, int64 rate = {8000},
 int64[1] axis = {-1}, float small = {0.001}, float low = {80.0}, float high = {3800.0}>
{
  w = HannWindow (size)
  s = STFT (signal, step, w)
  p = ReduceSumSquare <keepdims = 0> (s, axis)
  m = MelWeightMatrix (mels, size, rate, low, high)
  e = MatMul (p, m)
  f = Add (e, small)
  y = Log (f)
}"""
    path = written(tmp_path / "front.onnx", text)
    program = check(path, {"signal": values(1, 400)}, 1e-4)
    assert compile_host(program, tmp_path).error() < 1e-4


def test_unpooling_after_a_pool_asks_only_its_own_window(tmp_path: Path) -> None:
    def nodes(stride: int) -> list[onnx.NodeProto]:
        windows: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [stride, stride]}
        pool = helper.make_node("MaxPool", ["x"], ["p", "i"], **windows)
        return [pool, helper.make_node("MaxUnpool", ["p", "i"], ["y"], **windows)]

    for stride in (1, 2):
        program = check(save(tmp_path / f"{stride}.onnx", nodes(stride), {"x": IMAGE[..., :8]}), {"x": IMAGE[..., :8]})
        scatters = [n for n in program.graph.nodes if "scatter" in str(n.target)]
        assert len(scatters) == (stride == 1)


def test_results_that_follow_from_constants_are_stored(tmp_path: Path) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Relu", ["x"], ["y"])]
    program = check(save(tmp_path / "sizes.onnx", nodes, {"x": ROW}, None, ["s", "y"]), {"x": ROW})
    compiled = compile_host(program, tmp_path)
    size, y = compiled.bundle.run(ROW)
    np.testing.assert_array_equal(size, ROW.shape)
    np.testing.assert_array_equal(y, np.maximum(ROW, 0))


def test_recurrent_layers_that_pytorch_does_not_have(tmp_path: Path) -> None:
    """Peepholes, clipping, other activations, and sequences of several lengths, known or not."""
    x, lengths = values(5, 2, 3), np.array([5, 2], np.int32)
    layers: dict[str, tuple[int, dict[str, Any]]] = {
        "LSTM": (4, {"direction": "bidirectional", "clip": 0.5}),
        "GRU": (3, {"direction": "reverse", "activations": ["HardSigmoid", "Softsign"], "activation_alpha": [0.3]}),
        "RNN": (1, {"activations": ["LeakyRelu"], "activation_alpha": [0.2]}),
    }
    for op, (gates, attributes) in layers.items():
        d = 1 + (attributes.get("direction") == "bidirectional")
        held = {"w": values(d, gates * 4, 3), "r": values(d, gates * 4, 4, seed=1), "b": values(d, gates * 8, seed=2)}
        names = ["x", *held, "n"] + (["", "", "p"] if op == "LSTM" else [])
        held |= {"p": values(d, 12, seed=3)} if op == "LSTM" else {}
        node = helper.make_node(op, names, ["y", "h"], name="rnn", hidden_size=4, **attributes)
        check(save(tmp_path / f"{op}.onnx", [node], {"x": x}, {**held, "n": lengths}, ["y", "h"]), {"x": x})
        feed = {"x": x, "n": lengths}
        check(save(tmp_path / f"{op}_n.onnx", [node], feed, held, ["y", "h"]), feed)


def typed(name: str, kind: int, array: np.ndarray) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())


def test_weights_and_codes_of_few_bits(tmp_path: Path) -> None:
    """int4 in blocks as weights, as codes on the way, and as ONNX Runtime's MatMulNBits; 16 bits without a sign."""
    rng = np.random.default_rng(0)
    x = (3 * values(2, 64)).astype(np.float32)
    scales = rng.random((2, 24)).astype(np.float32)
    for kind, low in ((TensorProto.INT4, -8), (TensorProto.UINT4, 0)):
        inside = [typed("w", kind, rng.integers(low, low + 16, (64, 24))), typed("z", kind, np.full((2, 24), low + 9))]
        blocks = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0, block_size=32)
        path = save(
            tmp_path / "w4.onnx", [blocks, helper.make_node("MatMul", ["x", "d"], ["y"])], {"x": x}, {}, opset=21
        )
        model = onnx.load(path)
        model.graph.initializer.extend([*inside, numpy_helper.from_array(scales, "s")])
        path.write_bytes(model.SerializeToString())
        program = check(path, {"x": x})
        assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.linear.default"]
    for kind, zero, scale in (
        (TensorProto.UINT4, 7, 0.3),
        (TensorProto.INT4, -1, 0.3),
        (TensorProto.UINT16, 32768, 1e-4),
    ):
        names = [["x", "s", "z"], ["q", "s", "z"]]
        nodes = [helper.make_node(op, n, o) for op, n, o in zip(("QuantizeLinear", "DequantizeLinear"), names, "qy")]
        path = save(tmp_path / "a.onnx", nodes, {"x": x}, {"s": np.array(scale, np.float32)}, opset=21)
        model = onnx.load(path)
        model.graph.initializer.append(typed("z", kind, np.array(zero)))
        path.write_bytes(model.SerializeToString())
        check(path, {"x": x})
    for bits in (4, 8):
        sizes: dict[str, Any] = {"K": 64, "N": 24, "bits": bits, "block_size": 32}
        held = {
            "w": rng.integers(0, 256, (24, 2, 4 * bits)).astype(np.uint8),
            "s": rng.random((24, 2)).astype(np.float32),
            "z": rng.integers(0, 256, (24, bits // 4)).astype(np.uint8),
        }
        node = helper.make_node("MatMulNBits", ["x", *held], ["y"], domain="com.microsoft", **sizes)
        path = save(tmp_path / "n.onnx", [node], {"x": x}, held)
        model = onnx.load(path)
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 24]))
        path.write_bytes(model.SerializeToString())
        check(path, {"x": x})
