"""Quantised operators of ONNX, in floating point, in the form that the pass `adopt-qdq` makes integers of.

int8 and uint8 codes of one scale use `edgec::quantize` and `edgec::dequantize`, with the same rounding as ONNX: half to
even. Weights are the real numbers that their codes stand for, and the module keeps a record of their scales. The
operators that work on codes (`QLinearConv` and its like) become dequantisation, the operator on real numbers and
quantisation, where scales and zero points are constants. Else codes are whole numbers in floating point, whose sums of
products are exact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

import edgec.qops  # noqa: F401  registers edgec::quantize
from edgec.importing.quantized import UNSIGNED, StoredCodes
from edgec.integer import LEVELS
from edgec.onnx.fewbits import other_codes
from edgec.onnx.module import Codes, Many, Node, Static
from edgec.onnx.operators import _op, as_type, convolve, handler_of

LIMITS = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**31), 2**31 - 1),
}
CODES = {TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8, TensorProto.INT16: torch.int16}
FOUR_BITS = {
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.INT2: (-2, 1),
    TensorProto.UINT2: (0, 3),
}


def _spread(node: Node, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A scale or zero point in a shape that broadcasts to x: one number, one per place on an axis, or one per block."""
    if value.numel() == 1:
        return value.reshape(())
    axis = node.attr("axis", 1) % x.dim()
    block = node.attr("block_size", 0)
    if block:
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return value.reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _as_codes(node: Node, real: torch.Tensor, scale: int, zero: int, kind: torch.dtype) -> Any:
    """`edgec::quantize` of real numbers, where scale and zero point are one constant each; None where they are not."""
    one = (
        node.is_static(scale) and node.value(scale).shape in ((), (1,)) and (not node.has(zero) or node.is_static(zero))
    )
    if not one or node.folding or kind not in (torch.int8, torch.uint8) or real.dtype != torch.float32:
        return None
    place = int(node.static(zero, "zero point").reshape(-1)[0]) if node.has(zero) else 0
    shift = UNSIGNED if kind == torch.uint8 else 0
    codes = torch.ops.edgec.quantize(real, float(node.static(scale, "scale").reshape(-1)[0]), place - shift)
    return Codes(codes) if shift else codes


@_op("QuantizeLinear")
def _quantize(node: Node) -> Any:
    x, scale = node.x(0), node.x(1)
    other = other_codes(node)
    if other is not None and x.dtype == torch.float32:
        low, high, kind = other
        steps = torch.round(x / _spread(node, scale, x))
        steps = steps + as_type(_spread(node, node.x(2), x), torch.float32) if node.has(2) else steps
        return as_type(torch.clamp(steps, low, high), kind)
    code = node.attr("output_dtype", 0)
    kind = CODES.get(code) if code else (node.x(2).dtype if node.has(2) else torch.uint8)
    if kind not in LIMITS or x.dtype != torch.float32:
        raise node.refuse("to this type of codes is not supported", "quantise to int8 or uint8")
    codes = _as_codes(node, x, 1, 2, kind)
    if codes is not None:
        return codes
    low, high = LIMITS[kind]
    steps = torch.round(x / _spread(node, scale, x))
    if node.has(2):
        steps = steps + as_type(_spread(node, node.x(2), x), torch.float32)
    return as_type(torch.clamp(steps, low, high), kind)


@_op("DequantizeLinear")
def _dequantize(node: Node) -> Any:
    real = None if node.folding or node.is_static(0) else _as_reals(node, 0, 1, 2)
    if real is not None:
        return real
    x = node.x(0)
    wide = as_type(x, torch.int32)
    if node.has(2):
        wide = wide - as_type(_spread(node, node.x(2), x), torch.int32)
    if node.folding and x.dtype in (torch.int8, torch.uint8) and node.x(1).dtype == torch.float32:
        zeros = node.x(2).reshape(-1) if node.has(2) else torch.zeros(1, dtype=x.dtype)
        _remember(node, wide.numpy(), node.x(1).numpy(), zeros.numpy(), node.attr("block_size", 0))
    return as_type(wide, torch.float32) * _spread(node, node.x(1), x)


def _remember(node: Node, steps: np.ndarray, scale: np.ndarray, zeros: np.ndarray, block: int = 0) -> None:
    """Keep a record of codes, less their zero points, that become real numbers."""
    shift = UNSIGNED if zeros.dtype == np.uint8 else 0
    scale = scale if block else scale.reshape(-1)
    node.graph.stored.append(StoredCodes.of(steps, scale, zeros.astype(np.int64) - shift, block))


def _constants(node: Node, *indices: int) -> bool:
    """Whether these inputs are constants, or missing."""
    return all(node.is_static(i) for i in indices if node.has(i))


def _as_reals(node: Node, index: int, scale: int, zero: int) -> Any:
    """`edgec::dequantize` of codes, where scale and zero point are one constant each; None where they are not."""
    if node.folding or not _constants(node, scale, zero) or node.value(scale).shape not in ((), (1,)):
        return None
    value = node.value(index)
    signed = value.tensor if isinstance(value, Codes) else node.x(index)
    shift = UNSIGNED if isinstance(value, Codes) or signed.dtype == torch.uint8 else 0
    if signed.dtype == torch.uint8:
        signed = (signed.to(torch.int16) - UNSIGNED).to(torch.int8)
    if signed.dtype != torch.int8 or node.static(scale, "scale").dtype != np.float32:
        return None
    place = int(node.static(zero, "zero point").reshape(-1)[0]) if node.has(zero) else 0
    return torch.ops.edgec.dequantize(signed, float(node.static(scale, "scale").reshape(-1)[0]), place - shift)


def _as_weight(node: Node, index: int, axis: int = 0, turned: bool = False) -> Any:
    """The real numbers of a constant, of which scale and zero point follow it; None where any of them is computed.

    axis: that of scales and zero points, if there are several. turned: transpose the result.
    """
    if node.folding or not (node.is_static(index) and _constants(node, index + 1, index + 2)):
        return None
    codes, scale = node.value(index).array, node.static(index + 1, "scale")
    zeros = node.static(index + 2, "zero point") if node.has(index + 2) else np.zeros((), codes.dtype)
    if codes.dtype not in (np.int8, np.uint8) or scale.dtype != np.float32:
        return None
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    wide = [v if v.size == 1 else v.reshape(shape) for v in (zeros.astype(np.int32), scale)]
    steps = codes.astype(np.int32) - wide[0].reshape(() if wide[0].size == 1 else wide[0].shape)
    _remember(node, steps, scale.reshape(-1), zeros.reshape(-1))
    real = steps.astype(np.float32) * wide[1].reshape(() if wide[1].size == 1 else wide[1].shape)
    real = np.ascontiguousarray(real.T) if turned else real
    return node.graph.tensor(Static(real, node.value(index).path), node.path, "weight")


def _as_bias(node: Node, index: int, x_scale: int, w_scale: int) -> Any:
    """The real numbers of an int32 bias: its scale is the product of the other two. None where there is no bias."""
    if not node.has(index):
        return None
    scale = node.static(x_scale, "scale").reshape(-1) * node.static(w_scale, "scale").reshape(-1)
    real = (node.value(index).array.reshape(-1).astype(np.float64) * scale).astype(np.float32)
    return node.graph.tensor(Static(real, node.value(index).path), node.path, "bias")


@_op("DynamicQuantizeLinear")
def _dynamic(node: Node) -> Any:
    x = node.x(0)
    zero = torch.zeros((), dtype=torch.float32)
    low, high = torch.minimum(torch.amin(x), zero), torch.maximum(torch.amax(x), zero)
    scale = (high - low) / 255.0
    place = torch.clamp(torch.round(-low / scale), 0, 255)
    codes = torch.clamp(torch.round(x / scale) + place, 0, 255)
    return Many([codes.to(torch.uint8), scale, place.to(torch.uint8)])


def _centred(node: Node, index: int, zero: int, axis: int | None = None) -> torch.Tensor:
    """Codes minus their zero point, in float32, which holds them exactly."""
    value = node.value(index)
    x = value.tensor.to(torch.float32) + UNSIGNED if isinstance(value, Codes) else as_type(node.x(index), torch.float32)
    if not node.has(zero):
        return x
    offset = as_type(node.x(zero), torch.float32)
    if offset.numel() == 1:
        return x - offset.reshape(())
    if axis is None:
        return x - offset
    return x - offset.reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _exact(products: int, node: Node) -> torch.dtype:
    """float32 where it holds every sum of so many products of codes, else float64."""
    return torch.float32 if products * 255 * 255 < 2**24 else torch.float64


def _sums(node: Node, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    kind = _exact(math.prod(w.shape[1:]), node)
    return convolve(node, as_type(x, kind), as_type(w, kind), None)


@_op("ConvInteger")
def _conv_integer(node: Node) -> Any:
    return _sums(node, _centred(node, 0, 2), _centred(node, 1, 3, 0)).to(torch.int32)


@_op("MatMulInteger")
def _matmul_integer(node: Node) -> Any:
    a, b = _rows(node, 0, 2), _columns(node, 1, 3)
    kind = _exact(a.shape[-1], node)
    return torch.matmul(as_type(a, kind), as_type(b, kind)).to(torch.int32)


def _rows(node: Node, index: int, zero: int) -> torch.Tensor:
    x = as_type(node.x(index), torch.float32)
    offset = as_type(node.x(zero), torch.float32) if node.has(zero) else None
    if offset is None:
        return x
    return x - (offset.unsqueeze(-1) if offset.dim() == 1 and offset.numel() > 1 else offset)


def _columns(node: Node, index: int, zero: int) -> torch.Tensor:
    x = as_type(node.x(index), torch.float32)
    return x - as_type(node.x(zero), torch.float32) if node.has(zero) else x


def _requantized(node: Node, real: torch.Tensor, scale: int, zero: int) -> Any:
    """real / scale as codes, of the type of the zero point."""
    kind = node.x(zero).dtype if node.has(zero) else torch.uint8
    codes = _as_codes(node, real, scale, zero, kind)
    if codes is not None:
        return codes
    low, high = LIMITS[kind]
    steps = torch.round(real / as_type(node.x(scale), real.dtype))
    steps = steps + as_type(node.x(zero), real.dtype) if node.has(zero) else steps
    return torch.clamp(steps, low, high).to(kind)


@_op("QLinearConv")
def _qlinear_conv(node: Node) -> Any:
    x = _as_reals(node, 0, 1, 2) if _constants(node, 6, 7, 8) else None
    weight = None if x is None else _as_weight(node, 3)
    if x is not None and weight is not None:
        return _requantized(node, convolve(node, x, weight, _as_bias(node, 8, 1, 4)), 6, 7)
    total = _sums(node, _centred(node, 0, 2), _centred(node, 3, 5, 0))
    rank = total.dim() - 2
    if node.has(8):
        total = total + as_type(node.x(8), total.dtype).reshape(-1, *[1] * rank)
    factor = node.x(1) * node.x(4)
    factor = factor.reshape(-1, *[1] * rank) if factor.numel() > 1 else factor.reshape(())
    return _requantized(node, as_type(total, torch.float32) * factor, 6, 7)


@_op("QLinearMatMul")
def _qlinear_matmul(node: Node) -> Any:
    x = _as_reals(node, 0, 1, 2) if _constants(node, 6, 7) else None
    if x is not None and x.dim() > 1:
        if node.is_static(3) and node.value(3).array.ndim == 2:
            weight = _as_weight(node, 3, 1, turned=True)
            if weight is not None:
                return _requantized(node, F.linear(x, weight), 6, 7)
        other = None if node.is_static(3) else _as_reals(node, 3, 4, 5)
        if other is not None:
            return _requantized(node, torch.matmul(x, other), 6, 7)
    a, b = _rows(node, 0, 2), _columns(node, 3, 5)
    kind = _exact(a.shape[-1], node)
    total = torch.matmul(as_type(a, kind), as_type(b, kind)).to(torch.float32)
    left, right = node.x(1), node.x(4)
    left = left.unsqueeze(-1) if left.dim() == 1 and left.numel() > 1 else left
    return _requantized(node, total * (left * right), 6, 7)


# -- tables ------------------------------------------------------------------------------------------------------------


def join_tables(graph: onnx.GraphProto) -> None:
    """Make one node of a function of int8 codes as edgec writes it, in place: Cast, Add of 128 (and of the beginning of
    each channel's table), Gather."""
    known = {t.name: t for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def addend(name: str) -> tuple[str, np.ndarray] | None:
        """(what a constant is added to, the constant), where an Add made `name`."""
        node = makers.get(name)
        if node is None or node.op_type != "Add" or node.input[1] not in known:
            return None
        return node.input[0], numpy_helper.to_array(known[node.input[1]])

    for node in graph.node:
        table = known.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != TensorProto.INT8 or len(table.dims) != 1 or table.dims[0] % LEVELS:
            continue
        first, channels, axis = addend(node.input[1]), table.dims[0] // LEVELS, 0
        if first is not None and first[1].size == channels > 1:
            starts = first[1]
            axis = int(np.argmax(starts.shape))
            if starts.shape[axis] != channels or not np.array_equal(starts.reshape(-1), LEVELS * np.arange(channels)):
                continue
            first = addend(first[0])
        elif channels > 1:
            continue
        cast = makers.get(first[0]) if first is not None and first[1].size == 1 and int(first[1]) == UNSIGNED else None
        if cast is None or cast.op_type != "Cast":
            continue
        inputs, name = [cast.input[0], node.input[0]], node.name
        result = node.output[0]
        node.CopyFrom(helper.make_node("Table", inputs, [result], name=name, domain="edgec", axis=axis))


@_op("Table", domain="edgec")
def _table(node: Node) -> Any:
    x, table = node.x(0), node.static(1, "table")
    if x.dtype == torch.int8:
        rows = table if table.size == LEVELS else table.reshape(-1, LEVELS)
        stored = node.graph.tensor(Static(np.ascontiguousarray(rows), node.value(1).path), node.path, "table")
        return torch.ops.edgec.qlut(x, stored, node.attr("axis"))
    index = as_type(x, torch.int64) + UNSIGNED
    if table.size > LEVELS:
        starts = torch.arange(0, table.size, LEVELS)
        index = index + starts.reshape([-1 if i == node.attr("axis") else 1 for i in range(x.dim())])
    return node.x(1)[index]


# -- ONNX Runtime's own, which its quantiser writes --------------------------------------------------------------------


def _real(node: Node, index: int) -> torch.Tensor:
    """The real numbers that inputs `index`, its scale and its zero point stand for."""
    both = (index, index + 1, index + 2)
    constant = _constants(node, *both) and not node.folding and node.value(index + 1).shape in ((), (1,))
    real = _as_weight(node, index) if constant else _as_reals(node, *both)
    if real is not None:
        return real
    return _centred(node, index, index + 2) * node.x(index + 1)


@_op("QLinearAdd", domain="com.microsoft")
def _qlinear_add(node: Node) -> Any:
    return _requantized(node, _real(node, 0) + _real(node, 3), 6, 7)


@_op("QLinearMul", domain="com.microsoft")
def _qlinear_mul(node: Node) -> Any:
    return _requantized(node, _real(node, 0) * _real(node, 3), 6, 7)


@_op("QLinearSigmoid", domain="com.microsoft")
def _qlinear_sigmoid(node: Node) -> Any:
    return _requantized(node, torch.sigmoid(_real(node, 0)), 3, 4)


@_op("QLinearLeakyRelu", domain="com.microsoft")
def _qlinear_leaky(node: Node) -> Any:
    x = _real(node, 0)
    return _requantized(node, torch.nn.functional.leaky_relu(x, node.attr("alpha", 0.01)), 3, 4)


@_op("QLinearGlobalAveragePool", domain="com.microsoft")
def _qlinear_mean(node: Node) -> Any:
    if node.attr("channels_last", 0):
        raise node.refuse("with channels last")
    return _requantized(node, torch.mean(_real(node, 0), (2, 3), True), 3, 4)


@_op("QLinearConcat", domain="com.microsoft")
def _qlinear_concat(node: Node) -> Any:
    parts = [_real(node, i) for i in range(2, len(node.inputs), 3)]
    return _requantized(node, torch.cat(parts, node.attr("axis")), 0, 1)


def _inner(node: Node, op: str, real: torch.Tensor, opset: int) -> Any:
    """What an operator of ONNX gives for real numbers, with the attributes of `node`."""
    inner = Node(node.graph, node.proto, node.name, node.path, [real])
    inner.op, inner.opset = op, opset
    handler = handler_of("", op)
    assert handler is not None
    return handler(inner)


@_op("QLinearAveragePool", domain="com.microsoft")
def _qlinear_average(node: Node) -> Any:
    if node.attr("channels_last", 0):
        raise node.refuse("with channels last")
    return _requantized(node, _inner(node, "AveragePool", _real(node, 0), node.graph.opset), 3, 4)


@_op("QLinearSoftmax", domain="com.microsoft")
def _qlinear_softmax(node: Node) -> Any:
    return _requantized(node, _inner(node, "Softmax", _real(node, 0), node.attr("opset", 13)), 3, 4)


@_op("QGemm", domain="com.microsoft")
def _qgemm(node: Node) -> Any:
    plain = not node.attr("transA", 0) and node.attr("alpha", 1.0) == 1.0 and _constants(node, 6, 7, 8)
    x = _as_reals(node, 0, 1, 2) if plain else None
    if x is not None and node.is_static(3):
        rows = bool(node.attr("transB", 0))
        weight = _as_weight(node, 3, 0 if rows else 1, turned=not rows)
        outputs = None if weight is None else weight.shape[0]
        if weight is not None and (not node.has(6) or node.value(6).array.size == outputs):
            y = F.linear(x, weight, _as_bias(node, 6, 1, 4))
            return _requantized(node, y, 7, 8) if node.has(7) else y
    a, b = _rows(node, 0, 2), as_type(node.x(3), torch.float32)
    turned = bool(node.attr("transB", 0))
    if node.has(5):
        zero = as_type(node.x(5), torch.float32)
        b = b - (zero.unsqueeze(-1) if turned and zero.dim() == 1 and zero.numel() > 1 else zero)
    a, b = a.t() if node.attr("transA", 0) else a, b.t() if turned else b
    kind = _exact(a.shape[-1], node)
    total = torch.matmul(as_type(a, kind), as_type(b, kind))
    total = total + as_type(node.x(6), kind) if node.has(6) else total
    real = as_type(total, torch.float32) * (node.x(1) * node.x(4) * node.attr("alpha", 1.0))
    return _requantized(node, real, 7, 8) if node.has(7) else real
