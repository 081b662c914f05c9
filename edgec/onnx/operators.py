"""ONNX operators in PyTorch, with the meaning that the ONNX specification gives them, from opset 7 on.

A handler takes a `Node` and returns a tensor, an array (a constant) or `Many` of them. What is not here and is a
function in ONNX's own definition is run as that function. Sizes of windows, pads and axes are known when compiling; a
node that needs an input for them refuses inputs that are not constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto

from edgec import qops as qops  # registers edgec::qmax_pool2d
from edgec.importing.vision import deform_conv2d, roi_align
from edgec.onnx.module import Handler, Many, Node
from edgec.onnx.reader import array_of

TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
# Recurrent layers that PyTorch has no operator for are written out up to this length.
MAX_STEPS = 256
# What the numbers of one-dimensional windows are called in messages.
PADS = {"constant", "reflect", "edge", "wrap"}

_table: dict[tuple[str, str], Handler] = {}


def handler_of(domain: str, op: str) -> Handler | None:
    return _table.get(("" if domain == "ai.onnx" else domain, op))


def supported() -> list[str]:
    """The operators that are read, those of other domains with their domain."""
    return sorted(f"{domain}.{op}" if domain else op for domain, op in _table)


def _op(*names: str, domain: str = "") -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            _table[domain, name] = handler
        return handler

    return register


# -- elementwise -------------------------------------------------------------------------------------------------------


def as_type(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """`x.to(kind)`, without a trace in the graph where it is of that type."""
    return x if x.dtype == kind else x.to(kind)


def _unary(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    _table["", name] = lambda node: function(node.x(0))


def _round(x: torch.Tensor) -> torch.Tensor:
    return torch.round(x) if x.dtype.is_floating_point else x


for _name, _function in {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": _round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Not": torch.logical_not,
    "BitwiseNot": torch.bitwise_not,
    "IsNaN": torch.isnan,
    "Softsign": lambda x: x / (1 + x.abs()),
    "Mish": F.mish,
    "HardSwish": F.hardswish,
}.items():
    _unary(_name, _function)


@_op("Identity")
def _identity(node: Node) -> Any:
    return node.value(0)


@_op("Softplus")
def _softplus(node: Node) -> Any:
    x = node.x(0)
    # F.softplus leaves the formula above its threshold of 20, where float32 has no room for the difference.
    return F.softplus(x) if x.dtype == torch.float32 else torch.log1p(torch.exp(x))


def _binary(name: str, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    _table["", name] = lambda node: function(node.x(0), node.x(1))


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


for _name, _pair in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": _divide,
    "Pow": lambda a, b: as_type(torch.pow(a, b), a.dtype),
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": torch.eq,
    "Less": torch.lt,
    "Greater": torch.gt,
    "LessOrEqual": torch.le,
    "GreaterOrEqual": torch.ge,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}.items():
    _binary(_name, _pair)


@_op("Mod")
def _mod(node: Node) -> Any:
    return (torch.fmod if node.attr("fmod", 0) else torch.remainder)(node.x(0), node.x(1))


@_op("BitShift")
def _shift(node: Node) -> Any:
    function = torch.bitwise_left_shift if node.attr("direction") == "LEFT" else torch.bitwise_right_shift
    return function(node.x(0), node.x(1))


def _variadic(name: str, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    def handler(node: Node) -> Any:
        result = node.x(0)
        for i in range(1, len(node.inputs)):
            result = function(result, node.x(i))
        return result

    _table["", name] = handler


for _name, _pair in {"Sum": torch.add, "Max": torch.maximum, "Min": torch.minimum}.items():
    _variadic(_name, _pair)


@_op("Mean")
def _mean_of(node: Node) -> Any:
    return _table["", "Sum"](node) / len(node.inputs)


@_op("Where")
def _where(node: Node) -> Any:
    return torch.where(node.x(0), node.x(1), node.x(2))


@_op("Clip")
def _clip(node: Node) -> Any:
    x = node.x(0)
    if node.opset < 11:
        low, high = node.attr("min"), node.attr("max")
        return torch.clamp(x, low, high) if low is not None or high is not None else x
    limits = [_scalar(node, i) for i in (1, 2)]
    if all(v is None or isinstance(v, (int, float)) for v in limits):
        if limits == [None, None]:
            return x
        low, high = limits
        if low is not None and high is not None and low > high:
            return torch.full_like(x, high)
        return torch.clamp(x, *limits)
    low, high = node.optional(1), node.optional(2)
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _scalar(node: Node, index: int) -> Any:
    """A constant scalar input as a number, None where it is missing; anything else as a tensor."""
    if not node.has(index):
        return None
    return node.static(index, "limit").reshape(-1)[0].item() if node.is_static(index) else node.x(index)


@_op("LeakyRelu")
def _leaky(node: Node) -> Any:
    return F.leaky_relu(node.x(0), node.attr("alpha", 0.01))


@_op("Elu")
def _elu(node: Node) -> Any:
    return F.elu(node.x(0), node.attr("alpha", 1.0))


@_op("Celu")
def _celu(node: Node) -> Any:
    return F.celu(node.x(0), node.attr("alpha", 1.0))


@_op("Selu")
def _selu(node: Node) -> Any:
    x = node.x(0)
    alpha, gamma = node.attr("alpha", 1.67326319217681884765625), node.attr("gamma", 1.05070102214813232421875)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-6) and math.isclose(gamma, 1.050701, rel_tol=1e-6):
        return F.selu(x)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x))


@_op("ThresholdedRelu")
def _thresholded(node: Node) -> Any:
    x = node.x(0)
    return torch.where(x > node.attr("alpha", 1.0), x, torch.zeros((), dtype=x.dtype))


@_op("HardSigmoid")
def _hard_sigmoid(node: Node) -> Any:
    x, alpha, beta = node.x(0), node.attr("alpha", 0.2), node.attr("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0.0, 1.0)


@_op("Shrink")
def _shrink(node: Node) -> Any:
    x, bias, lambd = node.x(0), node.attr("bias", 0.0), node.attr("lambd", 0.5)
    zero = torch.zeros((), dtype=x.dtype)
    wide = as_type(x, torch.float32)
    return as_type(torch.where(wide < -lambd, wide + bias, torch.where(wide > lambd, wide - bias, zero)), x.dtype)


@_op("PRelu")
def _prelu(node: Node) -> Any:
    x, slope = node.x(0), node.x(1)
    channels = x.dim() > 1 and tuple(slope.shape) == (x.shape[1], *[1] * (x.dim() - 2))
    if x.dtype.is_floating_point and (slope.numel() == 1 or channels) and node.is_static(1):
        flat = node.weight(node.static(1, "slope").reshape(-1), "weight")
        return F.prelu(x, flat)
    return torch.where(x < 0, x * slope, x)


@_op("Gelu")
def _gelu(node: Node) -> Any:
    return F.gelu(node.x(0), approximate=node.attr("approximate", "none"))


_table["com.microsoft", "Gelu"] = lambda node: F.gelu(node.x(0))


@_op("FastGelu", domain="com.microsoft")
def _fast_gelu(node: Node) -> Any:
    return F.gelu(node.x(0) + node.x(1) if node.has(1) else node.x(0), approximate="tanh")


@_op("BiasGelu", domain="com.microsoft")
def _bias_gelu(node: Node) -> Any:
    return F.gelu(node.x(0) + node.x(1))


@_op("QuickGelu", domain="com.microsoft")
def _quick_gelu(node: Node) -> Any:
    x = node.x(0)
    return x * torch.sigmoid(node.attr("alpha", 1.702) * x)


@_op("Swish")
def _swish(node: Node) -> Any:
    x, alpha = node.x(0), node.attr("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@_op("IsInf")
def _isinf(node: Node) -> Any:
    x = node.x(0)
    both = [x == math.inf] * node.attr("detect_positive", 1) + [x == -math.inf] * node.attr("detect_negative", 1)
    if not both:
        return torch.zeros_like(x, dtype=torch.bool)
    return both[0] if len(both) == 1 else both[0] | both[1]


@_op("Cast")
def _cast(node: Node) -> Any:
    return _to(node, node.x(0), node.attr("to"))


@_op("CastLike")
def _cast_like(node: Node) -> Any:
    return as_type(node.x(0), node.x(1).dtype)


def _to(node: Node, x: torch.Tensor, code: Any) -> torch.Tensor:
    if code not in TYPES:
        name = TensorProto.DataType.Name(code).lower() if code in TensorProto.DataType.values() else str(code)
        raise node.refuse(f"to {name} is not supported", "use float32, integers or booleans")
    return as_type(x, TYPES[code])


@_op("Dropout")
def _dropout(node: Node) -> Any:
    if node.opset >= 12 and node.has(2) and bool(node.static(2, "training mode").reshape(-1)[0]):
        share = float(node.static(1, "ratio").reshape(-1)[0]) if node.has(1) else 0.5
        if share != 0.0:
            raise node.refuse("is in training mode", "export the model in evaluation mode")
    x = node.value(0)
    if not node.wants(1):
        return x
    return Many([x, torch.ones_like(node.x(0), dtype=torch.bool)])


# -- shapes ------------------------------------------------------------------------------------------------------------


@_op("Constant")
def _constant(node: Node) -> Any:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        value = node.attr(name)
        if value is None:
            continue
        if name == "value":
            return array_of(value)
        return np.array(value, np.float32 if "float" in name else np.int64)
    raise node.refuse("holds text or a sparse tensor", "export the model without it")


@_op("ConstantOfShape")
def _constant_of_shape(node: Node) -> Any:
    value = node.attr("value")
    filled = np.zeros(1, np.float32) if value is None else array_of(value)
    sizes = node.ints(0, "shape")
    if all(isinstance(n, int) for n in sizes):
        return np.full(sizes, filled.reshape(-1)[0], filled.dtype)
    kind = getattr(torch, filled.dtype.name)
    return torch.full(sizes, filled.reshape(-1)[0].item(), dtype=kind)


@_op("Shape")
def _shape(node: Node) -> Any:
    from edgec.onnx.symbolic import _objects

    sizes = list(node.value(0).shape)
    sizes = sizes[slice(node.attr("start", 0), node.attr("end"))] if node.opset >= 15 else sizes
    return _objects(sizes, (len(sizes),)).astype(object if _symbolic(sizes) else np.int64)


@_op("Size")
def _size(node: Node) -> Any:
    from edgec.onnx.symbolic import _objects

    total: Any = 1
    for n in node.value(0).shape:
        total = total * n
    return _objects([total], ()).astype(object if _symbolic([total]) else np.int64)


def _symbolic(sizes: Sequence[Any]) -> bool:
    return any(isinstance(n, torch.SymInt) for n in sizes)


@_op("Range")
def _range(node: Node) -> Any:
    if any(node.has(i) and not node.is_static(i) for i in range(3)):
        start, limit, delta = (node.ints(i, "limits")[0] for i in range(3))
        return torch.arange(start, limit, delta)
    start, limit, delta = (node.static(i, "limits").reshape(-1)[0] for i in range(3))
    return np.arange(start, limit, delta, dtype=start.dtype)


@_op("Reshape")
def _reshape(node: Node) -> Any:
    x = node.x(0)
    sizes = node.attr("shape") if node.opset < 5 else node.ints(1, "shape")
    if not node.attr("allowzero", 0):
        sizes = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(node.graph.with_batch(x, sizes))


@_op("Flatten")
def _flatten(node: Node) -> Any:
    x, axis = node.x(0), node.attr("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


def _axes(node: Node, index: int = 1, opset: int = 13) -> list[int] | None:
    """Axes that are an attribute before `opset` and an input from then on; None where they are missing."""
    if node.opset < opset:
        return node.attr("axes")
    return node.ints(index, "axes") if node.has(index) else None


@_op("Squeeze")
def _squeeze(node: Node) -> Any:
    x, axes = node.x(0), _axes(node)
    places = [i for i, n in enumerate(x.shape) if isinstance(n, int) and n == 1] if axes is None else axes
    places = {a % max(x.dim(), 1) for a in places}
    for axis in places:
        if x.shape[axis] != 1:
            raise node.refuse(f"of axis {axis}, which has {x.shape[axis]} elements", "check the model")
    return x.squeeze(tuple(sorted(places))) if places else x


@_op("Unsqueeze")
def _unsqueeze(node: Node) -> Any:
    x, axes = node.x(0), _axes(node) or []
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@_op("Transpose")
def _transpose(node: Node) -> Any:
    x = node.x(0)
    return x.permute(node.attr("perm") or list(reversed(range(x.dim()))))


@_op("Concat")
def _concat(node: Node) -> Any:
    parts = [node.x(i) for i in range(len(node.inputs))]
    axis = node.attr("axis", 1)
    batch = next((p.shape[0] for p in parts if isinstance(p.shape[0], torch.SymInt)), None)
    if node.graph.free_batch and batch is not None and axis % parts[0].dim() != 0:
        # Class tokens and the like, which the file has for its batch of one.
        parts = [p if isinstance(p.shape[0], torch.SymInt) else p.expand(batch, *p.shape[1:]) for p in parts]
    return torch.cat(parts, axis)


@_op("Split")
def _split(node: Node) -> Any:
    x, axis = node.x(0), node.attr("axis", 0)
    sizes = node.attr("split") if node.opset < 13 else (node.ints(1, "sizes") if node.has(1) else None)
    if sizes is None:
        count = node.attr("num_outputs") or node.outputs
        step = -(-x.shape[axis] // count)
        sizes = [min(step, x.shape[axis] - i * step) for i in range(count)]
    return Many(list(torch.split(x, sizes, axis)))


@_op("Slice")
def _slice(node: Node) -> Any:
    x = node.x(0)
    if node.opset < 10:
        starts, ends = node.attr("starts"), node.attr("ends")
        axes, steps = node.attr("axes") or list(range(len(starts))), [1] * len(starts)
    else:
        starts, ends = node.ints(1, "starts"), node.ints(2, "ends")
        axes = node.ints(3, "axes") if node.has(3) else list(range(len(starts)))
        steps = node.ints(4, "steps") if node.has(4) else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps):
        axis = axis % x.dim()
        size = x.shape[axis]
        if isinstance(size, torch.SymInt) or isinstance(start, torch.SymInt) or isinstance(end, torch.SymInt):
            if step < 1:
                raise node.refuse("runs backwards along the batch", "export the model with a fixed batch")
            x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
            continue
        first, last, step = slice(start, end, step).indices(size) if start >= -size or step > 0 else (-1, -1, step)
        if step > 0:
            x = (
                x
                if (first, last, step) == (0, size, 1)
                else torch.ops.aten.slice.Tensor(x, axis, first, max(first, last), step)
            )
        else:
            count = max(0, -(-(first - last) // -step))
            low = first + step * (count - 1) if count else 0
            part = torch.ops.aten.slice.Tensor(x, axis, low, low + (count - 1) * -step + 1 if count else low, -step)
            x = torch.flip(part, [axis])
    return x


@_op("Expand")
def _expand(node: Node) -> Any:
    x, sizes = node.x(0), node.ints(1, "shape")
    sizes = [1] * (x.dim() - len(sizes)) + sizes
    own = [1] * (len(sizes) - x.dim()) + list(x.shape)
    return x.expand([o if isinstance(n, int) and n == 1 else n for o, n in zip(own, sizes)])


@_op("Tile")
def _tile(node: Node) -> Any:
    return node.x(0).repeat(node.ints(1, "repeats"))


@_op("Pad")
def _pad(node: Node) -> Any:
    x, mode = node.x(0), node.attr("mode", "constant")
    pads = node.attr("pads") if node.opset < 11 else node.ints(1, "pads")
    axes = [a % x.dim() for a in node.ints(3, "axes")] if node.has(3) else list(range(x.dim()))
    before, after = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    if mode == "constant":
        value = node.attr("value", 0.0) if node.opset < 11 else 0
        if node.opset >= 11 and node.has(2):
            value = node.static(2, "value").reshape(-1)[0].item()
        flat = [n for axis in reversed(range(x.dim())) for n in (before[axis], after[axis])]
        while len(flat) > 2 and flat[-2:] == [0, 0]:
            flat = flat[:-2]
        return F.pad(x, flat, value=value)
    for axis in range(x.dim()):
        if before[axis] or after[axis]:
            place = _padded_places(x.shape[axis], before[axis], after[axis], mode)
            x = torch.index_select(x, axis, node.graph.tensor(node.graph.known(place), node.path, f"pad_{axis}"))
    return x


def _padded_places(size: int, before: int, after: int, mode: str) -> np.ndarray:
    places = np.arange(-before, size + after)
    if mode == "edge":
        return places.clip(0, size - 1)
    if mode == "wrap":
        return places % size
    if size == 1:
        return np.zeros_like(places)
    period = 2 * (size - 1)
    places = places % period
    return np.where(places < size, places, period - places)


@_op("DepthToSpace")
def _depth_to_space(node: Node) -> Any:
    x, block = node.x(0), node.attr("blocksize")
    if node.attr("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // block**2, h * block, w * block)


@_op("SpaceToDepth")
def _space_to_depth(node: Node) -> Any:
    x, block = node.x(0), node.attr("blocksize")
    if node.attr("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * block**2, h // block, w // block)


@_op("Trilu")
def _trilu(node: Node) -> Any:
    k = int(node.static(1, "diagonal").reshape(-1)[0]) if node.has(1) else 0
    return (torch.triu if node.attr("upper", 1) else torch.tril)(node.x(0), k)


@_op("EyeLike")
def _eye(node: Node) -> Any:
    rows, columns = node.value(0).shape
    kind = TYPES.get(node.attr("dtype"), node.x(0).dtype)
    return np.eye(rows, columns, node.attr("k", 0), dtype=str(kind).removeprefix("torch."))


@_op("OneHot")
def _one_hot(node: Node) -> Any:
    index, axis = node.x(0), node.attr("axis", -1)
    depth = int(node.static(1, "depth").reshape(-1)[0])
    values = node.x(2)
    index = as_type(index, torch.int64)
    index = torch.where(index < 0, index + depth, index)
    axis = axis % (index.dim() + 1)
    shape = [1] * (index.dim() + 1)
    shape[axis] = depth
    hit = index.unsqueeze(axis) == torch.arange(depth).reshape(shape)
    return torch.where(hit, values[1], values[0])


# -- indexing ----------------------------------------------------------------------------------------------------------


@_op("Gather")
def _gather(node: Node) -> Any:
    x, axis = node.x(0), node.attr("axis", 0)
    axis = axis % x.dim()
    if node.is_static(1):
        index = node.static(1, "indices")
        if index.ndim == 0:
            return x.select(axis, int(index))
        if isinstance(x.shape[axis], int):
            index = np.where(index < 0, index + x.shape[axis], index).astype(np.int64)
        place = node.graph.tensor(node.graph.known(index.reshape(-1)), node.path, "indices")
        if index.ndim == 1:
            return torch.index_select(x, axis, place)
        picked = torch.index_select(x, axis, place)
        return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    index = _from_end(node.x(1), x.shape[axis])
    if axis == 0 and x.dim() == 2 and x.dtype.is_floating_point:
        return F.embedding(index, x)
    picked = torch.index_select(x, axis, index.reshape(-1))
    return picked.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _from_end(index: torch.Tensor, size: Any) -> torch.Tensor:
    """Indices with negative ones counted from the end."""
    index = as_type(index, torch.int64)
    return torch.where(index < 0, index + size, index)


@_op("GatherElements")
def _gather_elements(node: Node) -> Any:
    x, axis = node.x(0), node.attr("axis", 0)
    return torch.gather(x, axis, _from_end(node.x(1), x.shape[axis]))


@_op("GatherND")
def _gather_nd(node: Node) -> Any:
    x, index, batch = node.x(0), as_type(node.x(1), torch.int64), node.attr("batch_dims", 0)
    depth = index.shape[-1]
    sizes = x.shape[batch : batch + depth]
    flat = _flat_index(index, sizes)
    lead, rest = list(x.shape[:batch]), list(x.shape[batch + depth :])
    rows = math.prod(lead)
    source = x.reshape(rows, math.prod(sizes), -1) if rest else x.reshape(rows, math.prod(sizes), 1)
    place = flat.reshape(rows, -1)
    picked = torch.gather(source, 1, place.unsqueeze(-1).expand(-1, -1, source.shape[-1]))
    return picked.reshape([*index.shape[:-1], *rest])


def _flat_index(index: torch.Tensor, sizes: Sequence[Any]) -> torch.Tensor:
    """Rows of indices [..., k] into an array of these sizes, as places in it; negative ones count from the end."""
    flat = torch.zeros(index.shape[:-1], dtype=torch.int64)
    for i, size in enumerate(sizes):
        flat = flat * size + _from_end(index[..., i], size)
    return flat


REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@_op("ScatterElements", "Scatter")
def _scatter_elements(node: Node) -> Any:
    x, axis, reduction = node.x(0), node.attr("axis", 0), node.attr("reduction", "none")
    index, updates = _from_end(node.x(1), x.shape[axis]), node.x(2)
    if reduction == "none":
        return torch.scatter(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, REDUCTIONS[reduction], include_self=True)


@_op("ScatterND")
def _scatter_nd(node: Node) -> Any:
    x, index, updates = node.x(0), as_type(node.x(1), torch.int64), node.x(2)
    reduction, depth = node.attr("reduction", "none"), index.shape[-1]
    sizes, rest = x.shape[:depth], list(x.shape[depth:])
    flat = _flat_index(index, sizes).reshape(-1)
    rows = x.reshape(math.prod(sizes), -1)
    values = updates.reshape(flat.shape[0], -1)
    place = flat.unsqueeze(-1).expand(-1, rows.shape[1])
    if reduction == "none":
        return torch.scatter(rows, 0, place, values).reshape([*sizes, *rest])
    result = torch.scatter_reduce(rows, 0, place, values, REDUCTIONS[reduction], include_self=True)
    return result.reshape([*sizes, *rest])


@_op("Compress")
def _compress(node: Node) -> Any:
    x, keep = node.x(0), np.flatnonzero(node.static(1, "condition"))
    axis = node.attr("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return torch.index_select(x, axis, node.graph.tensor(node.graph.known(keep), node.path, "kept"))


@_op("TopK")
def _top_k(node: Node) -> Any:
    x, axis = node.x(0), node.attr("axis", -1)
    k = node.attr("k") if node.opset < 10 else int(node.static(1, "count").reshape(-1)[0])
    # Of equal elements the first one comes first, which torch.topk does not promise.
    values, places = torch.sort(x, dim=axis, descending=bool(node.attr("largest", 1)), stable=True)
    return Many([values.narrow(axis, 0, k), places.narrow(axis, 0, k)])


@_op("ReverseSequence")
def _reverse_sequence(node: Node) -> Any:
    x, lengths = node.x(0), node.x(1)
    time, batch = node.attr("time_axis", 0), node.attr("batch_axis", 1)
    steps = torch.arange(x.shape[time])
    shape = [1] * x.dim()
    shape[time], size = -1, [1] * x.dim()
    size[batch] = -1
    steps, lengths = steps.reshape(shape), lengths.reshape(size)
    place = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return torch.gather(x, time, place.expand(x.shape))


@_op("CumSum")
def _cumsum(node: Node) -> Any:
    return _running(node, torch.cumsum, 0)


@_op("CumProd")
def _cumprod(node: Node) -> Any:
    return _running(node, torch.cumprod, 1)


def _running(node: Node, function: Callable[..., torch.Tensor], neutral: int) -> torch.Tensor:
    x, axis = node.x(0), int(node.static(1, "axis").reshape(-1)[0])
    if node.attr("reverse", 0):
        x = torch.flip(x, [axis])
    y = as_type(function(x, axis), x.dtype)
    if node.attr("exclusive", 0):
        first = torch.full_like(y.narrow(axis, 0, 1), neutral)
        y = torch.cat([first, y.narrow(axis, 0, y.shape[axis] - 1)], axis)
    return torch.flip(y, [axis]) if node.attr("reverse", 0) else y


# -- reductions --------------------------------------------------------------------------------------------------------


def _reduction(name: str, function: Callable[[torch.Tensor, list[int], bool], torch.Tensor], opset: int = 18) -> None:
    def handler(node: Node) -> Any:
        x = node.x(0)
        axes = _axes(node, 1, opset)
        if not axes:
            if node.attr("noop_with_empty_axes", 0):
                return function(x.unsqueeze(-1), [x.dim()], False)
            axes = list(range(x.dim()))
        if not axes:
            return function(x.reshape(1), [0], False)
        return function(x, [a % x.dim() for a in axes], bool(node.attr("keepdims", 1)))

    _table["", name] = handler


def _sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if x.dtype.is_floating_point:
        return torch.mean(x, axes, keep)
    return torch.div(_sum(x, axes, keep), math.prod(x.shape[a] for a in axes), rounding_mode="trunc").to(x.dtype)


def _extreme(
    function: Callable[..., torch.Tensor], empty: float
) -> Callable[[torch.Tensor, list[int], bool], torch.Tensor]:
    def run(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
        if any(isinstance(x.shape[a], int) and x.shape[a] == 0 for a in axes):
            value = empty > 0 if x.dtype == torch.bool else empty
            return torch.full(torch.sum(x, axes, keep).shape, value, dtype=x.dtype)
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), axes, keep).to(torch.bool)
        return function(x, axes, keep)

    return run


_reduction("ReduceSum", _sum, 13)
_reduction("ReduceMean", _mean)
_reduction("ReduceMax", _extreme(torch.amax, -math.inf))
_reduction("ReduceMin", _extreme(torch.amin, math.inf))
_reduction("ReduceProd", _prod)
_reduction("ReduceSumSquare", lambda x, axes, keep: _sum(x * x, axes, keep))
_reduction("ReduceL1", lambda x, axes, keep: _sum(x.abs(), axes, keep))
_reduction(
    "ReduceL2", lambda x, axes, keep: as_type(torch.sqrt(as_type(_sum(x * x, axes, keep), torch.float32)), x.dtype)
)
_reduction("ReduceLogSum", lambda x, axes, keep: torch.log(_sum(x, axes, keep)))
_reduction("ReduceLogSumExp", lambda x, axes, keep: torch.logsumexp(x, axes, keep))


def _arg(name: str, function: Callable[..., torch.Tensor]) -> None:
    def handler(node: Node) -> Any:
        x, axis, keep = node.x(0), node.attr("axis", 0), bool(node.attr("keepdims", 1))
        if node.attr("select_last_index", 0):
            return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, keep)
        return function(x, axis, keep)

    _table["", name] = handler


_arg("ArgMax", torch.argmax)
_arg("ArgMin", torch.argmin)


# -- products ----------------------------------------------------------------------------------------------------------


@_op("MatMul")
def _matmul(node: Node) -> Any:
    a = node.x(0)
    if node.is_static(1) and node.value(1).array.ndim == 2 and a.dim() > 1 and a.dtype.is_floating_point:
        return F.linear(a, _transposed(node, 1))
    return torch.matmul(a, node.x(1))


def _transposed(node: Node, index: int) -> torch.Tensor:
    """A constant matrix, transposed, under the name it had."""
    value = node.value(index)
    turned = node.graph.known(np.ascontiguousarray(value.array.T), value.path)
    return node.graph.tensor(turned, node.path, "weight")


@_op("Linear", domain="edgec")
def _linear(node: Node) -> Any:
    """MatMul by a constant matrix, and Add of a constant vector."""
    return F.linear(node.x(0), _transposed(node, 1), _vector(node, 2))


def _vector(node: Node, index: int) -> torch.Tensor:
    value = node.value(index)
    return node.graph.tensor(node.graph.known(value.array.reshape(-1), value.path), node.path, "bias")


@_op("FusedMatMul", domain="com.microsoft")
def _fused_matmul(node: Node) -> Any:
    if node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        raise node.refuse("transposes the batch")
    a, b = node.x(0), node.x(1)
    a = a.transpose(-1, -2) if node.attr("transA", 0) else a
    b = b.transpose(-1, -2) if node.attr("transB", 0) else b
    return torch.matmul(a, b) * node.attr("alpha", 1.0)


@_op("Gemm")
def _gemm(node: Node) -> Any:
    a = node.x(0)
    a = a.t() if node.attr("transA", 0) else a
    alpha, beta = node.attr("alpha", 1.0), node.attr("beta", 1.0)
    constant = node.is_static(1) and alpha == 1.0 and a.dtype.is_floating_point
    rows = not node.has(2) or (node.is_static(2) and beta == 1.0 and _is_row(node, node.value(2).array))
    if constant and rows:
        weight = node.x(1) if node.attr("transB", 0) else _transposed(node, 1)
        return F.linear(a, weight, _vector(node, 2) if node.has(2) else None)
    b = node.x(1)
    y = torch.matmul(a, b.t() if node.attr("transB", 0) else b)
    y = y if alpha == 1.0 else as_type(y * alpha, y.dtype)
    if not node.has(2):
        return y
    c = node.x(2)
    return y + (c if beta == 1.0 else as_type(c * beta, c.dtype))


def _is_row(node: Node, bias: np.ndarray) -> bool:
    outputs = node.value(1).array.shape[0 if node.attr("transB", 0) else 1]
    return bias.size == outputs and bias.shape[-1:] == (outputs,)


@_op("Einsum")
def _einsum(node: Node) -> Any:
    return torch.einsum(node.attr("equation").replace(" ", ""), *[node.x(i) for i in range(len(node.inputs))])


@_op("Det")
def _det(node: Node) -> Any:
    return torch.linalg.det(node.x(0))


# -- convolution and pooling -------------------------------------------------------------------------------------------


def window_pads(
    node: Node, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(before, after) of each spatial axis, from `pads` or `auto_pad`."""
    rank, auto = len(kernel), node.attr("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for n, k, s, d in zip(sizes, kernel, stride, dilation):
            total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            small, large = total // 2, total - total // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
        return before, after
    pads = node.attr("pads") if auto == "NOTSET" else None
    pads = pads or [0] * (2 * rank)
    return list(pads[:rank]), list(pads[rank:])


def _padded(x: torch.Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> torch.Tensor:
    flat = [n for pair in reversed(list(zip(before, after))) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _spatial(node: Node, x: torch.Tensor) -> int:
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise node.refuse(f"of {rank} spatial dimensions", "use one, two or three")
    return rank


def convolve(node: Node, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rank = _spatial(node, x)
    stride, dilation = node.attr("strides") or [1] * rank, node.attr("dilations") or [1] * rank
    before, after = window_pads(node, x.shape[2:], w.shape[2:], stride, dilation)
    padding = before
    if before != after or min(before) < 0:
        x, padding = _padded(x, before, after), [0] * rank
    return CONVOLUTIONS[rank - 1](x, w, bias, stride, padding, dilation, node.attr("group", 1))


@_op("Conv")
def _conv(node: Node) -> Any:
    return convolve(node, node.x(0), node.x(1), node.optional(2))


@_op("FusedConv", domain="com.microsoft")
def _fused_conv(node: Node) -> Any:
    y = convolve(node, node.x(0), node.x(1), node.optional(2))
    y = y + node.x(3) if node.has(3) else y
    kind, numbers = node.attr("activation", ""), node.attr("activation_params") or []
    known = {"": lambda v: v, "Relu": torch.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid}
    if kind == "LeakyRelu":
        return F.leaky_relu(y, numbers[0])
    if kind == "Clip":
        return torch.clamp(y, numbers[0], numbers[1])
    if kind not in known:
        raise node.refuse(f"with activation {kind}")
    return known[kind](y)


@_op("ConvTranspose")
def _conv_transpose(node: Node) -> Any:
    x, w = node.x(0), node.x(1)
    rank = _spatial(node, x)
    stride, dilation = node.attr("strides") or [1] * rank, node.attr("dilations") or [1] * rank
    extra = node.attr("output_padding") or [0] * rank
    kernel, sizes, auto = list(w.shape[2:]), list(x.shape[2:]), node.attr("auto_pad", "NOTSET")
    full = [(n - 1) * s + (k - 1) * d + 1 + e for n, s, k, d, e in zip(sizes, stride, kernel, dilation, extra)]
    wanted = node.attr("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(sizes, stride)]
    if wanted is not None:
        wanted = list(wanted)[-rank:]
        total = [f - n for f, n in zip(full, wanted)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
        if auto == "NOTSET":
            before, after = large, small
    else:
        pads = (node.attr("pads") if auto == "NOTSET" else None) or [0] * (2 * rank)
        before, after = list(pads[:rank]), list(pads[rank:])
    run = TRANSPOSED[rank - 1]
    bias, group = node.optional(2), node.attr("group", 1)
    if before == after and min(before) >= 0 and all(e < max(s, d) for e, s, d in zip(extra, stride, dilation)):
        return run(x, w, bias, stride, before, extra, group, dilation)
    y = run(x, w, None, stride, 0, 0, group, dilation)
    # Crop what is padded, and append zeros where the result is to be larger.
    y = _padded(y, [-b for b in before], [e - a for e, a in zip(extra, after)])
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def _pool_windows(
    node: Node, x: torch.Tensor
) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """(kernel, stride, dilation, before, after, count of windows) of each spatial axis."""
    rank = _spatial(node, x)
    kernel = node.attr("kernel_shape")
    stride, dilation = node.attr("strides") or [1] * rank, node.attr("dilations") or [1] * rank
    sizes = list(x.shape[2:])
    before, after = window_pads(node, sizes, kernel, stride, dilation)
    counts = []
    for n, k, s, d, b, a in zip(sizes, kernel, stride, dilation, before, after):
        room = n + b + a - d * (k - 1) - 1
        count = room // s + 1
        if node.attr("ceil_mode", 0):
            count = -(-room // s) + 1
            # No window begins behind the last element.
            if (count - 1) * s >= n + b:
                count -= 1
        counts.append(count)
    return list(kernel), list(stride), list(dilation), before, after, counts


MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


@_op("MaxPool")
def _max_pool(node: Node) -> Any:
    x = node.x(0)
    kernel, stride, dilation, before, after, counts = _pool_windows(node, x)
    kind, rank, pool = x.dtype, len(kernel), MAX_POOLS[len(kernel) - 1]
    if kind == torch.int8 and rank == 2 and not node.wants(1) and not node.folding:
        reach = [(c - 1) * s + d * (k - 1) + 1 for c, s, d, k in zip(counts, stride, dilation, kernel)]
        ends = [r - n - b for r, n, b in zip(reach, x.shape[2:], before)]
        pads = [before[0], max(ends[0], 0), before[1], max(ends[1], 0)]
        return torch.ops.edgec.qmax_pool2d(x, kernel, stride, pads, dilation, False)
    wide = x if kind.is_floating_point else x.to(torch.float32)
    plain = before == after and all(2 * b <= k for b, k in zip(before, kernel)) and not node.attr("ceil_mode", 0)
    if plain and not node.wants(1):
        return as_type(pool(wide, kernel, stride, before, dilation), kind)
    reach = [(c - 1) * s + d * (k - 1) + 1 for c, s, d, k in zip(counts, stride, dilation, kernel)]
    behind = [r - n - b for r, n, b in zip(reach, x.shape[2:], before)]
    filled = _padded(wide, before, behind, -math.inf)
    if not node.wants(1):
        return as_type(pool(filled, kernel, stride, 0, dilation), kind)
    y, places = pool(filled, kernel, stride, 0, dilation, return_indices=True)
    sizes, padded = list(x.shape[2:]), list(filled.shape[2:])
    parts: list[torch.Tensor] = []
    for n, b in zip(reversed(padded), reversed(before)):
        parts.insert(0, places % n - b)
        places = torch.div(places, n, rounding_mode="floor")
    order = range(rank) if not node.attr("storage_order", 0) else reversed(range(rank))
    flat = torch.zeros_like(parts[0])
    for i in order:
        flat = flat * sizes[i] + parts[i]
    n, c = x.shape[:2]
    lead = torch.arange(n * c).reshape(n, c, *[1] * rank) * math.prod(sizes)
    return Many([as_type(y, kind), flat + lead])


AVERAGES: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


@_op("AveragePool")
def _average_pool(node: Node) -> Any:
    x = node.x(0)
    kernel, stride, dilation, before, after, counts = _pool_windows(node, x)
    include, rank = bool(node.attr("count_include_pad", 0)), len(kernel)
    simple = before == after and all(2 * b <= k for b, k in zip(before, kernel)) and not node.attr("ceil_mode", 0)
    if simple and max(dilation) == 1:
        return AVERAGES[rank - 1](x, kernel, stride, before, False, include)
    total = _window_sums(x, kernel, stride, dilation, before, counts)
    share = np.ones([1] * rank, np.float64)
    for axis in range(rank):
        n = x.shape[2 + axis]
        taps = np.arange(counts[axis])[:, None] * stride[axis] + np.arange(kernel[axis]) * dilation[axis]
        low, high = (0, before[axis] + n + after[axis]) if include else (before[axis], before[axis] + n)
        inside = ((taps >= low) & (taps < high)).sum(1)
        share = share * inside.reshape([-1 if i == axis else 1 for i in range(rank)])
    with np.errstate(divide="ignore"):
        factor = (1.0 / share).astype(np.float32)
    return total * node.graph.tensor(node.graph.known(factor[None, None]), node.path, "share")


def _window_sums(
    x: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    before: list[int],
    counts: list[int],
) -> torch.Tensor:
    rank = len(kernel)
    reach = [(c - 1) * s + d * (k - 1) + 1 for c, s, d, k in zip(counts, stride, dilation, kernel)]
    behind = [r - n - b for r, n, b in zip(reach, x.shape[2:], before)]
    x = _padded(x, before, behind)
    if max(dilation) == 1:
        if rank == 2:
            return F.avg_pool2d(x, kernel, stride, 0, divisor_override=1)
        return AVERAGES[rank - 1](x, kernel, stride) * float(math.prod(kernel))
    total: torch.Tensor | None = None
    for taps in np.ndindex(*kernel):
        part = x
        for axis, tap in enumerate(taps):
            start = tap * dilation[axis]
            end = start + (counts[axis] - 1) * stride[axis] + 1
            part = torch.ops.aten.slice.Tensor(part, 2 + axis, start, end, stride[axis])
        total = part if total is None else total + part
    assert total is not None
    return total


@_op("LpPool")
def _lp_pool(node: Node) -> Any:
    x, p = node.x(0), node.attr("p", 2)
    kernel, stride, dilation, before, _, counts = _pool_windows(node, x)
    return _window_sums(x.abs() ** p, kernel, stride, dilation, before, counts) ** (1.0 / p)


def _global_axes(x: torch.Tensor) -> list[int]:
    return list(range(2, x.dim()))


@_op("GlobalAveragePool")
def _global_average(node: Node) -> Any:
    x = node.x(0)
    if x.dim() == 4:
        return F.adaptive_avg_pool2d(x, 1)
    return torch.mean(x, _global_axes(x), True)


@_op("GlobalMaxPool")
def _global_max(node: Node) -> Any:
    x = node.x(0)
    return torch.amax(x, _global_axes(x), True)


@_op("GlobalLpPool")
def _global_lp(node: Node) -> Any:
    x, p = node.x(0), node.attr("p", 2)
    return torch.sum(x.abs() ** p, _global_axes(x), True) ** (1.0 / p)


# -- normalisation -----------------------------------------------------------------------------------------------------


@_op("BatchNormalization")
def _batch_norm(node: Node) -> Any:
    if node.attr("training_mode", 0):
        raise node.refuse("is in training mode", "export the model in evaluation mode")
    x, weight, bias, mean, var = (node.x(i) for i in range(5))
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, node.attr("epsilon", 1e-5))


@_op("InstanceNormalization")
def _instance_norm(node: Node) -> Any:
    x = node.x(0)
    return F.group_norm(x, x.shape[1], node.x(1), node.x(2), node.attr("epsilon", 1e-5))


@_op("GroupNormalization")
def _group_norm(node: Node) -> Any:
    x, groups = node.x(0), node.attr("num_groups")
    weight, bias = node.x(1), node.x(2)
    if node.opset < 21:
        repeat = x.shape[1] // groups
        weight, bias = weight.repeat_interleave(repeat), bias.repeat_interleave(repeat)
    return F.group_norm(x, groups, weight, bias, node.attr("epsilon", 1e-5))


@_op("LayerNormalization")
def _layer_norm(node: Node) -> Any:
    x, eps = node.x(0), node.attr("epsilon", 1e-5)
    axis = node.attr("axis", -1) % x.dim()
    weight, bias = node.x(1), node.optional(2)
    shape = list(x.shape[axis:])
    if list(weight.shape) == shape and (bias is None or list(bias.shape) == shape):
        y = F.layer_norm(x, shape, weight, bias, eps)
    else:
        y = F.layer_norm(x, shape, None, None, eps) * weight
        y = y if bias is None else y + bias
    if not node.wants(1) and not node.wants(2):
        return y
    axes = list(range(axis, x.dim()))
    mean = torch.mean(x, axes, True)
    return Many([y, mean, torch.rsqrt(torch.mean((x - mean) ** 2, axes, True) + eps)])


@_op("SkipLayerNormalization", domain="com.microsoft")
def _skip_layer_norm(node: Node) -> Any:
    x = node.x(0) + node.x(1)
    x = x + node.x(4) if node.has(4) else x
    y = F.layer_norm(x, [x.shape[-1]], node.x(2), node.optional(3), node.attr("epsilon", 1e-12))
    if node.wants(1) or node.wants(2):
        raise node.refuse("returns statistics")
    return Many([y, None, None, x])


@_op("RMSNormalization")
def _rms_norm(node: Node) -> Any:
    x = node.x(0)
    axes = list(range(node.attr("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt(torch.mean(x * x, axes, True) + node.attr("epsilon", 1e-5)) * node.x(1)


@_op("LRN")
def _lrn(node: Node) -> Any:
    x, size = node.x(0), node.attr("size")
    squares = F.pad(x * x, [*[0, 0] * (x.dim() - 2), (size - 1) // 2, size // 2])
    total = squares.narrow(1, 0, x.shape[1])
    for i in range(1, size):
        total = total + squares.narrow(1, i, x.shape[1])
    alpha, beta, bias = node.attr("alpha", 1e-4), node.attr("beta", 0.75), node.attr("bias", 1.0)
    return x / (bias + alpha / size * total) ** beta


@_op("LpNormalization")
def _lp_norm(node: Node) -> Any:
    x, axis, p = node.x(0), node.attr("axis", -1), node.attr("p", 2)
    size = torch.sum(x.abs(), axis, True) if p == 1 else torch.sqrt(torch.sum(x * x, axis, True))
    return torch.where(size == 0, torch.zeros((), dtype=x.dtype), x / size)


@_op("MeanVarianceNormalization")
def _mvn(node: Node) -> Any:
    x, axes = node.x(0), node.attr("axes") or [0, 2, 3]
    mean = torch.mean(x, axes, True)
    return (x - mean) / (torch.sqrt(torch.mean(x * x, axes, True) - mean * mean) + 1e-9)


def _by_axis(name: str, function: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Before opset 13 all axes from `axis` on count as one."""

    def handler(node: Node) -> Any:
        x = node.x(0)
        axis = node.attr("axis", -1 if node.opset >= 13 else 1)
        if node.opset >= 13 or axis % x.dim() == x.dim() - 1:
            return function(x, axis)
        return function(x.flatten(axis % x.dim()), -1).reshape(x.shape)

    _table["", name] = handler


def _hardmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    place = torch.argmax(x, axis, True)
    shape = [1] * x.dim()
    shape[axis] = -1
    return (torch.arange(x.shape[axis]).reshape(shape) == place).to(x.dtype)


_by_axis("Softmax", lambda x, axis: torch.softmax(x, axis))
_by_axis("LogSoftmax", lambda x, axis: torch.log_softmax(x, axis))
_by_axis("Hardmax", _hardmax)


# -- images ------------------------------------------------------------------------------------------------------------


@_op("GridSample")
def _grid_sample(node: Node) -> Any:
    mode = str(node.attr("mode", "linear"))
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    padding = node.attr("padding_mode", "zeros")
    return F.grid_sample(node.x(0), node.x(1), mode, padding, bool(node.attr("align_corners", 0)))


@_op("AffineGrid")
def _affine_grid(node: Node) -> Any:
    return F.affine_grid(node.x(0), node.ints(1, "size"), bool(node.attr("align_corners", 0)))


@_op("Col2Im")
def _col2im(node: Node) -> Any:
    x, image, block = node.x(0), node.ints(1, "image shape"), node.ints(2, "block shape")
    rank = len(image)
    stride, dilation = node.attr("strides") or [1] * rank, node.attr("dilations") or [1] * rank
    pads = node.attr("pads") or [0] * (2 * rank)
    before, after = pads[:rank], pads[rank:]
    if rank == 2 and before == after:
        return F.fold(x, *(tuple(v) for v in (image, block, dilation, before, stride)))
    if not 1 <= rank <= 3:
        raise node.refuse(f"of {rank} dimensions", "use one, two or three")
    # A transposed convolution that puts every element at its place in the window, then the pads cut off.
    taps, wide = math.prod(block), [n + b + a for n, b, a in zip(image, before, after)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, block)]
    grid = [(w - r) // s + 1 for w, r, s in zip(wide, reach, stride)]
    rest = [w - r - (g - 1) * s for w, r, g, s in zip(wide, reach, grid, stride)]
    channels = x.shape[1] // taps
    weight = torch.eye(taps).reshape(taps, 1, *block).repeat(channels, *[1] * (rank + 1))
    maps = x.reshape(-1, channels * taps, *grid)
    y = TRANSPOSED[rank - 1](maps, weight, None, stride, 0, 0, channels, dilation)
    return _padded(y, [-b for b in before], [r - a for r, a in zip(rest, after)])


@_op("Upsample")
def _upsample(node: Node) -> Any:
    from edgec.onnx.resize import resize

    scales = node.attr("scales") if node.opset < 9 else node.static(1, "scales").tolist()
    x = node.x(0)
    sizes = [math.floor(n * s) for n, s in zip(x.shape[2:], scales[2:])]
    return resize(
        node, x, list(range(2, x.dim())), scales[2:], sizes, "asymmetric", node.attr("mode", "nearest"), "floor"
    )


@_op("Resize")
def _resize(node: Node) -> Any:
    from edgec.onnx.resize import resize_node

    return resize_node(node)


@_op("CenterCropPad")
def _center_crop_pad(node: Node) -> Any:
    x, wanted = node.x(0), node.ints(1, "shape")
    axes = [a % x.dim() for a in node.attr("axes") or range(x.dim())]
    for axis, size in zip(axes, wanted):
        own = x.shape[axis]
        if own > size:
            x = x.narrow(axis, (own - size) // 2, size)
        elif own < size:
            before = (size - own) // 2
            flat = [0, 0] * (x.dim() - 1 - axis) + [before, size - own - before]
            x = F.pad(x, flat)
    return x


@_op("DeformConv")
def _deform_conv(node: Node) -> Any:
    x, w, offset = node.x(0), node.x(1), node.x(2)
    if x.dim() != 4:
        raise node.refuse(f"of {x.dim() - 2} spatial dimensions", "use two")
    pads = node.attr("pads") or [0] * 4
    stride, dilation = node.attr("strides") or [1, 1], node.attr("dilations") or [1, 1]
    groups = (node.attr("group", 1), node.attr("offset_group", 1))
    return deform_conv2d(x, w, offset, node.optional(4), node.optional(3), stride, pads[:2], dilation, *groups)


@_op("RoiAlign")
def _roi_align(node: Node) -> Any:
    if node.attr("mode", "avg") != "avg":
        raise node.refuse("takes maxima", "use mode avg")
    samples = node.attr("sampling_ratio", 0)
    if samples < 1:
        raise node.refuse("takes as many samples as a box is large", "set sampling_ratio, to 2 for example")
    # Before operator set 16 there was no other mode.
    mode = node.attr("coordinate_transformation_mode", "half_pixel" if node.opset >= 16 else "output_half_pixel")
    size = (node.attr("output_height", 1), node.attr("output_width", 1))
    image = as_type(node.x(2), torch.int64)
    return roi_align(node.x(0), node.x(1), image, node.attr("spatial_scale", 1.0), size, samples, mode == "half_pixel")


@_op("MaxUnpool")
def _max_unpool(node: Node) -> Any:
    x, index, kernel = node.x(0), node.x(1), node.attr("kernel_shape")
    rank = len(kernel)
    stride, pads = node.attr("strides") or [1] * rank, node.attr("pads") or [0] * (2 * rank)
    # The indices count in the map that a pool with these windows had; another size that is asked for is around it.
    sizes = [(x.shape[2 + i] - 1) * stride[i] - pads[i] - pads[rank + i] + kernel[i] for i in range(rank)]
    area = math.prod(sizes)
    index = as_type(index, torch.int64)
    if stride == list(kernel) and not any(pads) and _of_such_a_pool(node, kernel):
        # Windows side by side: each place asks its own window, where one scatter would ask all.
        place = torch.arange(area).reshape(sizes)
        for axis, factor in enumerate(kernel, 2):
            x, index = (t.repeat_interleave(factor, axis) for t in (x, index))
        y = torch.where(index % area == place, x, torch.zeros((), dtype=x.dtype))
    else:
        flat, places = (t.reshape(*x.shape[:2], -1) for t in (x, index % area))
        empty = torch.zeros((*x.shape[:2], area), dtype=x.dtype)
        y = torch.scatter(empty, 2, places, flat).reshape(*x.shape[:2], *sizes)
    if not node.has(2):
        return y
    wanted = node.ints(2, "shape")[2:]
    return _padded(y, [0] * rank, [n - own for n, own in zip(wanted, sizes)])


def _of_such_a_pool(node: Node, kernel: list[int]) -> bool:
    """Whether the indices are those of a MaxPool with these windows, side by side."""
    name = node.proto.input[1]
    maker = next((n for n in node.graph.root.node if name in n.output), None)
    if maker is None or maker.op_type != "MaxPool":
        return False
    found = {a.name: onnx.helper.get_attribute_value(a) for a in maker.attribute}
    plain = not any(found.get("pads", ())) and not found.get("ceil_mode", 0) and not found.get("storage_order", 0)
    plain = plain and found.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    windows = list(found["kernel_shape"]) == list(kernel) == list(found.get("strides", ()))
    return plain and windows and set(found.get("dilations", (1,))) == {1}


# -- states of models that are run step by step ------------------------------------------------------------------------


@_op("CausalConvWithState")
def _causal_conv(node: Node) -> Any:
    x, w = node.x(0), node.x(1)
    reach = w.shape[2] - 1
    past = node.x(3) if node.has(3) else None
    wide = F.pad(x, (reach, 0)) if past is None else torch.cat([past, x], 2)
    y = F.conv1d(wide, w, node.optional(2), groups=w.shape[0])
    y = F.silu(y) if node.attr("activation", "none") in ("silu", "swish") else y
    return Many([y, wide.narrow(2, wide.shape[2] - reach, reach)])


@_op("TensorScatter")
def _tensor_scatter(node: Node) -> Any:
    """A cache with new rows from a place on that each sample has for itself."""
    cache, update, axis = node.x(0), node.x(1), node.attr("axis", -2)
    axis = axis % cache.dim()
    size, count = cache.shape[axis], update.shape[axis]
    shape = [1] * cache.dim()
    shape[axis] = size
    place = torch.arange(size).reshape(shape)
    if node.has(2):
        place = place - as_type(node.x(2), torch.int64).reshape(-1, *[1] * (cache.dim() - 1))
    place = torch.remainder(place, size) if node.attr("mode", "linear") == "circular" else place
    new = (place >= 0) & (place < count)
    wanted = [*cache.shape]
    row = torch.clamp(place, 0, count - 1).expand(wanted)
    return torch.where(new, torch.gather(update, axis, row), cache)


@_op("BitCast")
def _bit_cast(node: Node) -> Any:
    x, code = node.x(0), node.attr("to")
    kind = TYPES.get(code)
    if kind == x.dtype:
        return x
    if node.folding and kind is not None and kind.itemsize == x.dtype.itemsize:
        return x.view(kind)
    if x.dtype == torch.int8 and kind == torch.uint8:
        return (x.to(torch.int16) & 255).to(torch.uint8)
    if x.dtype == torch.uint8 and kind == torch.int8:
        wide = x.to(torch.int16)
        return torch.where(wide > 127, wide - 256, wide).to(torch.int8)
    if x.dtype == torch.bool and kind == torch.uint8:
        return x.to(torch.uint8)
    raise node.refuse("of other than bytes is not supported", "cast the values, or leave the bits as they are")


@_op("Binarizer", domain="ai.onnx.ml")
def _binarizer(node: Node) -> Any:
    x = node.x(0)
    return (x > node.attr("threshold", 0.0)).to(x.dtype)


@_op("ArrayFeatureExtractor", domain="ai.onnx.ml")
def _features(node: Node) -> Any:
    x = node.x(0)
    return torch.index_select(x, x.dim() - 1, node.x(1).reshape(-1))


from edgec.onnx import fewbits, quantized, recurrent, sequences, signals  # noqa: E402, F401  they register their operators
