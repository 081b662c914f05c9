"""ATen and `edgec::` operators in ONNX: one function each, by the operator's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import fx

from edgec.onnx.writer import ELEMENTS, Emitter, Sym, _Writer

# An fx.Node; its arguments have a type that says nothing.
Call = Any

EMITTERS: dict[str, Emitter] = {}


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    """Register a function as the ONNX form of operators."""

    def register(emitter: Emitter) -> Emitter:
        for name in names:
            EMITTERS[name] = emitter
        return emitter

    return register


# -- elementwise -------------------------------------------------------------------------------------------------------

UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "abs": "Abs",
    "neg": "Neg",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "erf": "Erf",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "sign": "Sign",
    "reciprocal": "Reciprocal",
    "mish": "Mish",
    "hardswish": "HardSwish",
    "isnan": "IsNaN",
    "isinf": "IsInf",
    "asinh": "Asinh",
    "acosh": "Acosh",
    "atanh": "Atanh",
    "softsign": "Softsign",
}
for _name, _op in UNARY.items():
    EMITTERS[f"aten.{_name}.default"] = lambda w, n, op=_op: w.emit(op, [w.x(n.args[0])])

for _name in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "detach_", "dropout", "feature_dropout"):
    EMITTERS[f"aten.{_name}.default"] = lambda w, n: w.x(n.args[0])
EMITTERS["aten._assert_tensor_metadata.default"] = lambda w, n: None


@emits("aten.relu6.default")
def _relu6(w: _Writer, node: Call) -> Any:
    return _clip(w, w.x(node.args[0]), 0.0, 6.0, node)


def _clip(w: _Writer, x: str, low: Any, high: Any, node: Call) -> str:
    kind = node.meta["val"].dtype
    limits = ["" if v is None else w.x(v, kind) for v in (low, high)]
    return w.emit("Clip", [x, *limits] if limits[1] else [x, limits[0]])


@emits("aten.hardtanh.default", "aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def _clamp(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    return _clip(w, w.x(a["self"], node.meta["val"].dtype), low, high, node)


@emits("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor")
def _clamp_tensor(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    x = w.x(a["self"], kind)
    x = x if a.get("min") is None else w.emit("Max", [x, w.x(a["min"], kind)])
    return x if a.get("max") is None else w.emit("Min", [x, w.x(a["max"], kind)])


@emits("aten.leaky_relu.default")
def _leaky(w: _Writer, node: Call) -> Any:
    return w.emit("LeakyRelu", [w.x(node.args[0])], alpha=float(w.args(node)["negative_slope"]))


@emits("aten.elu.default")
def _elu(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise w.refuse(node, "it has scales")
    return w.emit("Elu", [w.x(node.args[0])], alpha=float(a["alpha"]))


@emits("aten.celu.default")
def _celu(w: _Writer, node: Call) -> Any:
    return w.emit("Celu", [w.x(node.args[0])], alpha=float(w.args(node)["alpha"]))


@emits("aten.selu.default")
def _selu(w: _Writer, node: Call) -> Any:
    return w.emit("Selu", [w.x(node.args[0])])


@emits("aten.hardsigmoid.default")
def _hardsigmoid(w: _Writer, node: Call) -> Any:
    return w.emit("HardSigmoid", [w.x(node.args[0])], alpha=1 / 6, beta=0.5)


@emits("aten.silu.default")
def _silu(w: _Writer, node: Call) -> Any:
    x = w.x(node.args[0])
    return w.emit("Mul", [x, w.emit("Sigmoid", [x])])


@emits("aten.gelu.default")
def _gelu(w: _Writer, node: Call) -> Any:
    return w.emit("Gelu", [w.x(node.args[0])], approximate=w.args(node)["approximate"])


@emits("aten.log_sigmoid.default")
def _log_sigmoid(w: _Writer, node: Call) -> Any:
    return w.emit("Neg", [w.emit("Softplus", [w.emit("Neg", [w.x(node.args[0])])])])


@emits("aten.softplus.default")
def _softplus(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    if a["beta"] != 1:
        raise w.refuse(node, "its beta is not 1")
    return w.emit("Softplus", [w.x(node.args[0])])


@emits("aten.prelu.default")
def _prelu(w: _Writer, node: Call) -> Any:
    x, slope = node.args[:2]
    rank = w.meta(x).dim()
    if isinstance(slope, fx.Node) and slope.op == "get_attr":
        array = w.array(slope)
        shape = [-1] + [1] * (rank - 2) if array.size > 1 else [1]
        return w.emit("PRelu", [w.x(x), w.weight(slope, array.reshape(shape))])
    if w.meta(slope).numel() > 1:
        slope = w.emit("Reshape", [w.x(slope), w.ints([-1] + [1] * (rank - 2))])
    return w.emit("PRelu", [w.x(x), slope if isinstance(slope, str) else w.x(slope)])


@emits("aten.log2.default", "aten.log10.default")
def _log_of_base(w: _Writer, node: Call) -> Any:
    # In float64: what rounds a logarithm counts on those of powers of the base.
    base = 2.0 if "log2" in str(node.target) else 10.0
    x = w.emit("Log", [w.x(node.args[0], torch.float64)])
    return w.cast(w.emit("Div", [x, w.const(np.float64(math.log(base)))]), node.meta["val"].dtype)


@emits("aten.trunc.default")
def _trunc(w: _Writer, node: Call) -> Any:
    x = w.x(node.args[0])
    return w.emit("Mul", [w.emit("Floor", [w.emit("Abs", [x])]), w.emit("Sign", [x])])


@emits("aten.round.decimals")
def _round(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    places = a["decimals"]
    factor = w.x(10.0 ** abs(places), kind)
    up, down = ("Mul", "Div") if places > 0 else ("Div", "Mul")
    return w.emit(down, [w.emit("Round", [w.emit(up, [w.x(a["self"]), factor])]), factor])


@emits("aten.signbit.default")
def _signbit(w: _Writer, node: Call) -> Any:
    # -0.0 is less than nothing only by its reciprocal.
    x = w.x(node.args[0], torch.float32)
    zero = w.const(np.float32(0.0))
    turned = w.emit("Less", [w.emit("Reciprocal", [x]), zero])
    return w.emit("Or", [w.emit("Less", [x, zero]), w.emit("And", [w.emit("Equal", [x, zero]), turned])])


@emits("aten.isfinite.default")
def _isfinite(w: _Writer, node: Call) -> Any:
    x = w.x(node.args[0], torch.float32)
    return w.emit("Not", [w.emit("Or", [w.emit("IsNaN", [x]), w.emit("IsInf", [x])])])


@emits("aten.atan2.default")
def _atan2(w: _Writer, node: Call) -> Any:
    y, x = _operands(w, node)
    kind = node.meta["val"].dtype
    zero, half, whole = (w.x(v, kind) for v in (0.0, math.pi / 2, math.pi))
    signed = w.emit("Where", [w.emit("Less", [y, zero]), w.emit("Neg", [whole]), whole])
    angle = w.emit("Atan", [w.emit("Div", [y, x])])
    angle = w.emit("Where", [w.emit("Less", [x, zero]), w.emit("Add", [angle, signed]), angle])
    upright = w.emit("Mul", [w.emit("Sign", [y]), half])
    return w.emit("Where", [w.emit("Equal", [x, zero]), upright, angle])


@emits("aten.fmod.Scalar", "aten.fmod.Tensor")
def _fmod(w: _Writer, node: Call) -> Any:
    return w.emit("Mod", list(_operands(w, node)), fmod=1)


@emits("aten.fmax.default", "aten.fmin.default")
def _fmax(w: _Writer, node: Call) -> Any:
    """NaN only where both are."""
    a, b = _operands(w, node)
    better = w.emit("Max" if "fmax" in str(node.target) else "Min", [a, b])
    return w.emit("Where", [w.emit("IsNaN", [a]), b, w.emit("Where", [w.emit("IsNaN", [b]), a, better])])


@emits("aten.logaddexp.default")
def _logaddexp(w: _Writer, node: Call) -> Any:
    a, b = _operands(w, node)
    least = w.emit("Neg", [w.emit("Abs", [w.emit("Sub", [a, b])])])
    rest = w.emit("Log", [w.emit("Add", [w.emit("Exp", [least]), w.x(1.0, node.meta["val"].dtype)])])
    # Two equal infinities have no difference.
    rest = w.emit("Where", [w.emit("Equal", [a, b]), w.x(math.log(2.0), node.meta["val"].dtype), rest])
    return w.emit("Add", [w.emit("Max", [a, b]), rest])


@emits("aten.rsqrt.default")
def _rsqrt(w: _Writer, node: Call) -> Any:
    return w.emit("Reciprocal", [w.emit("Sqrt", [w.x(node.args[0])])])


@emits("aten.square.default")
def _square(w: _Writer, node: Call) -> Any:
    x = w.x(node.args[0])
    return w.emit("Mul", [x, x])


@emits("aten.expm1.default")
def _expm1(w: _Writer, node: Call) -> Any:
    kind = node.meta["val"].dtype
    return w.emit("Sub", [w.emit("Exp", [w.x(node.args[0], kind)]), w.x(1.0, kind)])


@emits("aten.log1p.default")
def _log1p(w: _Writer, node: Call) -> Any:
    kind = node.meta["val"].dtype
    return w.emit("Log", [w.emit("Add", [w.x(node.args[0], kind), w.x(1.0, kind)])])


def _operands(w: _Writer, node: Call, compares: bool = False) -> tuple[str, str]:
    """Both operands in the type in which the operator computes."""
    a, b = node.args[:2]
    kind = node.meta["val"].dtype
    if compares:
        kind = torch.result_type(
            *[w.meta(v) if isinstance(v, fx.Node) and _is_tensor(v) else _number(v) for v in (a, b)]
        )
    return w.x(a, kind), w.x(b, kind)


def _is_tensor(value: fx.Node) -> bool:
    return value.op == "get_attr" or isinstance(value.meta.get("val"), torch.Tensor)


def _number(value: Any) -> Any:
    return 1 if isinstance(value, fx.Node) else value


def _binary(op: str, compares: bool = False) -> Emitter:
    def emitter(w: _Writer, node: Call) -> Any:
        a, b = _operands(w, node, compares)
        if node.meta["val"].dtype == torch.bool and op in ("Mul", "Add"):
            return w.emit("And" if op == "Mul" else "Or", [a, b])
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 and op in ("Add", "Sub") else 1)
        if alpha != 1:
            b = w.emit("Mul", [b, w.x(alpha, node.meta["val"].dtype)])
        return w.emit(op, [a, b])

    return emitter


for _name, _op in {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}.items():
    for _kind in ("Tensor", "Scalar"):
        EMITTERS[f"aten.{_name}.{_kind}"] = _binary(_op)
for _name, _op in {"eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual"}.items():
    for _kind in ("Tensor", "Scalar"):
        EMITTERS[f"aten.{_name}.{_kind}"] = _binary(_op, True)
for _name, _op in {"maximum": "Max", "minimum": "Min"}.items():
    EMITTERS[f"aten.{_name}.default"] = _binary(_op)


def _logical(w: _Writer, node: Call) -> Any:
    op = {"and": "And", "or": "Or", "xor": "Xor"}[str(node.target).split(".")[1].strip("_").split("_")[-1]]
    if node.meta["val"].dtype != torch.bool:
        return w.emit(f"Bitwise{op}", list(_operands(w, node)))
    return w.emit(op, [w.x(v, torch.bool) for v in node.args[:2]])


for _name in (
    "logical_and.default",
    "logical_or.default",
    "logical_xor.default",
    "bitwise_and.Tensor",
    "bitwise_or.Tensor",
    "bitwise_xor.Tensor",
    "bitwise_and.Scalar",
    "bitwise_or.Scalar",
    "bitwise_xor.Scalar",
    "__and__.Tensor",
    "__or__.Tensor",
    "__xor__.Tensor",
    "__and__.Scalar",
    "__or__.Scalar",
    "__xor__.Scalar",
):
    EMITTERS[f"aten.{_name}"] = _logical
EMITTERS["aten.logical_not.default"] = lambda w, n: w.emit("Not", [w.x(n.args[0], torch.bool)])


@emits("aten.bitwise_not.default")
def _bitwise_not(w: _Writer, node: Call) -> Any:
    return w.emit("Not" if node.meta["val"].dtype == torch.bool else "BitwiseNot", [w.x(node.args[0])])


@emits("aten.ne.Tensor", "aten.ne.Scalar")
def _not_equal(w: _Writer, node: Call) -> Any:
    return w.emit("Not", [w.emit("Equal", _operands(w, node, True))])


@emits("aten.rsub.Scalar", "aten.rsub.Tensor")
def _rsub(w: _Writer, node: Call) -> Any:
    a, b = _operands(w, node)
    return w.emit("Sub", [b, a])


@emits("aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.floor_divide.default")
def _div_mode(w: _Writer, node: Call) -> Any:
    a, b = _operands(w, node)
    mode = node.kwargs.get("rounding_mode", "floor")
    if not node.meta["val"].dtype.is_floating_point:
        quotient = w.emit("Div", [a, b])
        if mode == "trunc":
            return quotient
        # ONNX's quotient is rounded towards zero, its remainder has the sign of the divisor.
        rest = w.emit("Mod", [a, b])
        return w.emit("Div", [w.emit("Sub", [a, rest]), b])
    quotient = w.emit("Div", [a, b])
    if mode == "floor":
        return w.emit("Floor", [quotient])
    if mode is None:
        return quotient
    return w.emit("Mul", [w.emit("Floor", [w.emit("Abs", [quotient])]), w.emit("Sign", [quotient])])


@emits("aten.remainder.Scalar", "aten.remainder.Tensor")
def _remainder(w: _Writer, node: Call) -> Any:
    a, b = _operands(w, node)
    if not node.meta["val"].dtype.is_floating_point:
        return w.emit("Mod", [a, b])
    return w.emit("Sub", [a, w.emit("Mul", [b, w.emit("Floor", [w.emit("Div", [a, b])])])])


@emits("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def _pow(w: _Writer, node: Call) -> Any:
    base, exponent = node.args[:2]
    if exponent == 2 and isinstance(base, fx.Node):
        x = w.x(base, node.meta["val"].dtype)
        return w.emit("Mul", [x, x])
    return w.emit("Pow", _operands(w, node))


@emits("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def _where(w: _Writer, node: Call) -> Any:
    kind = node.meta["val"].dtype
    return w.emit("Where", [w.x(node.args[0], torch.bool), w.x(node.args[1], kind), w.x(node.args[2], kind)])


@emits("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(w: _Writer, node: Call) -> Any:
    x, mask, value = node.args
    kind = node.meta["val"].dtype
    return w.emit("Where", [w.x(mask), w.x(value, kind), w.x(x)])


@emits("aten.addcmul.default")
def _addcmul(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    product = w.emit("Mul", [w.x(a["tensor1"]), w.x(a["tensor2"])])
    if a["value"] != 1:
        product = w.emit("Mul", [product, w.x(float(a["value"]), node.meta["val"].dtype)])
    return w.emit("Add", [w.x(a["self"]), product])


@emits("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.type_as.default", "aten.to.other")
def _to(w: _Writer, node: Call) -> Any:
    source, kind = node.args[0], node.meta["val"].dtype
    return w.x(source) if w.meta(source).dtype == kind else w.x(source, kind)


for _name in ("float", "half", "int", "long", "bool"):
    EMITTERS[f"aten.{_name}.default"] = _to


# -- constants ---------------------------------------------------------------------------------------------------------


def _filled(w: _Writer, node: Call, value: Any) -> Any:
    """A tensor of one value: a number where it may be, since everything broadcasts; else of its shape."""
    kind = node.meta["val"].dtype
    sizes = node.args[0] if isinstance(node.args[0], (list, tuple)) else w.args(node).get("size")
    if sizes is None:
        sizes = list(node.meta["val"].shape)
        if isinstance(node.args[0], fx.Node) and w.program.dynamic_batch:
            like = w.emit("Shape", [w.x(node.args[0])])
            tensor = helper.make_tensor("value", ELEMENTS[kind], [1], [value])
            return w.emit("ConstantOfShape", [like], value=tensor)
    if all(isinstance(s, int) for s in sizes):
        return w.const(np.full(sizes, value, torch.empty(0, dtype=kind).numpy().dtype))
    tensor = helper.make_tensor("value", ELEMENTS[kind], [1], [value])
    return w.emit("ConstantOfShape", [w.shape(sizes, infer=False)], value=tensor)


@emits("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default")
def _empty(w: _Writer, node: Call) -> Any:
    return _filled(w, node, 0)


@emits("aten.full.default", "aten.full_like.default", "aten.new_full.default")
def _full(w: _Writer, node: Call) -> Any:
    return _filled(w, node, w.args(node)["fill_value"])


for _name, _value in {"zeros": 0, "ones": 1}.items():
    for _kind in (f"{_name}.default", f"{_name}_like.default", f"new_{_name}.default"):
        EMITTERS[f"aten.{_kind}"] = lambda w, n, v=_value: _filled(w, n, v)


@emits("aten.scalar_tensor.default")
def _scalar_tensor(w: _Writer, node: Call) -> Any:
    return w.x(node.args[0], node.meta["val"].dtype)


@emits("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def _arange(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    start, end, step = a.get("start", 0), a["end"], a.get("step", 1)
    if any(isinstance(v, fx.Node) for v in (start, end, step)):
        scalars = [w.emit("Squeeze", [w.size(v)]) if isinstance(v, fx.Node) else w.x(v) for v in (start, end, step)]
        counted = w.emit("Range", [w.cast(v, torch.int64) for v in scalars])
        return counted if kind == torch.int64 else w.cast(counted, kind)
    return w.const(torch.arange(start, end, step, dtype=kind).numpy())


# -- shapes ------------------------------------------------------------------------------------------------------------


@emits("aten.histc.default")
def _histogram(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    low, high, bins = float(a["min"]), float(a["max"]), a["bins"]
    if low >= high:
        raise w.refuse(node, "its limits are those of the values")
    x = w.emit("Reshape", [w.x(a["self"], torch.float64), w.ints([-1, 1])])
    lowest, highest = w.const(np.float64(low)), w.const(np.float64(high))
    place = w.emit("Mul", [w.emit("Sub", [x, lowest]), w.const(np.float64(bins / (high - low)))])
    # The last one holds its upper limit, too.
    place = w.emit("Min", [w.emit("Floor", [place]), w.const(np.float64(bins - 1))])
    inside = w.emit("And", [w.emit("GreaterOrEqual", [x, lowest]), w.emit("LessOrEqual", [x, highest])])
    here = w.emit("And", [w.emit("Equal", [place, w.const(np.arange(bins, dtype=np.float64))]), inside])
    return w.emit("ReduceSum", [w.cast(here, kind), w.ints([0])], keepdims=0)


@emits("aten.sym_numel.default")
def _sym_numel(w: _Writer, node: Call) -> Any:
    return Sym(w.emit("Reshape", [w.emit("Size", [w.x(node.args[0])]), w.ints([1])]))


@emits("aten.copy.default")
def _copy(w: _Writer, node: Call) -> Any:
    """The second operand in shape and type of the first."""
    like, x = node.args[:2]
    kind = node.meta["val"].dtype
    name = w.x(x) if w.meta(x).dtype == kind else w.x(x, kind)
    return name if w.meta(x).shape == w.meta(like).shape else w.emit("Expand", [name, w.emit("Shape", [w.x(like)])])


@emits("aten.sym_size.int")
def _sym_size(w: _Writer, node: Call) -> Any:
    x, dim = node.args[:2]
    dim = dim % w.meta(x).dim()
    return Sym(w.emit("Shape", [w.x(x)], start=dim, end=dim + 1))


@emits("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.view_copy.default")
def _reshape(w: _Writer, node: Call) -> Any:
    x, sizes = node.args[:2]
    return w.emit("Reshape", [w.x(x), _batch_first(w, node, sizes)])


def _batch_first(w: _Writer, node: Call, sizes: Sequence[Any]) -> str:
    """The sizes of a reshape, in which a batch is left to be found."""
    shape = list(node.meta["val"].shape)
    plain = [s for s in sizes if not isinstance(s, int)]
    if len(plain) == 1 and -1 in sizes:
        # The one that is to be found is known, but for the batch.
        sizes = [shape[i] if s == -1 else s for i, s in enumerate(sizes)]
        if w.program.dynamic_batch and any(not isinstance(s, (int, fx.Node)) for s in sizes):
            raise w.refuse(node, "its sizes are computed")
    return w.shape(sizes)


@emits("aten.flatten.using_ints")
def _flatten(w: _Writer, node: Call) -> Any:
    a, x = w.args(node), node.args[0]
    rank = w.meta(x).dim()
    start, end = a["start_dim"] % max(rank, 1), a["end_dim"] % max(rank, 1)
    if rank == 0:
        return w.emit("Reshape", [w.x(x), w.ints([1])])
    if start == 1 and end == rank - 1:
        return w.emit("Flatten", [w.x(x)], axis=1)
    shape = [int(n) for n in w.meta(x).shape]
    # A zero copies the size at its place.
    sizes = [0] * start + [-1] + shape[end + 1 :]
    return w.emit("Reshape", [w.x(x), w.ints(sizes)])


@emits("aten.unflatten.int")
def _unflatten(w: _Writer, node: Call) -> Any:
    x, dim, sizes = node.args[:3]
    shape = [int(n) for n in w.meta(x).shape]
    dim = dim % len(shape)
    parts = [int(n) for n in node.meta["val"].shape[dim : dim + len(sizes)]]
    front = [0] * dim
    if dim == 0:
        return w.emit("Reshape", [w.x(x), w.shape([*sizes, *shape[1:]])])
    rest = shape[dim + 1 :]
    return w.emit("Reshape", [w.x(x), w.ints([*front, *parts, *rest])])


@emits("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def _squeeze(w: _Writer, node: Call) -> Any:
    x = node.args[0]
    shape = w.meta(x).shape
    dims = w.args(node).get("dim", [i for i, n in enumerate(shape) if n == 1])
    dims = [d % len(shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    dims = [d for d in dims if shape[d] == 1]
    return w.emit("Squeeze", [w.x(x), w.ints(dims)]) if dims else w.x(x)


@emits("aten.unsqueeze.default")
def _unsqueeze(w: _Writer, node: Call) -> Any:
    x, dim = node.args[:2]
    return w.emit("Unsqueeze", [w.x(x), w.ints([dim % node.meta["val"].dim()])])


@emits("aten.permute.default", "aten.permute_copy.default")
def _permute(w: _Writer, node: Call) -> Any:
    x, order = node.args[:2]
    return w.emit("Transpose", [w.x(x)], perm=[d % len(order) for d in order])


@emits("aten.transpose.int", "aten.t.default", "aten.swapaxes.default")
def _transpose(w: _Writer, node: Call) -> Any:
    rank = node.meta["val"].dim()
    a, b = node.args[1:3] if len(node.args) > 2 else (0, 1)
    order = list(range(rank))
    if rank > 1:
        order[a % rank], order[b % rank] = b % rank, a % rank
    return w.emit("Transpose", [w.x(node.args[0])], perm=order)


@emits("aten.expand.default")
def _expand(w: _Writer, node: Call) -> Any:
    x, sizes = node.args[:2]
    own = list(w.meta(x).shape)
    own = [1] * (len(sizes) - len(own)) + own
    # Expand leaves axes as they are where its size is one.
    wanted = [1 if isinstance(s, int) and s in (-1, o) else s for s, o in zip(sizes, own)]
    if w.program.dynamic_batch and isinstance(wanted[0], fx.Node) and own[0] == node.meta["val"].shape[0]:
        wanted[0] = 1
    if all(s == 1 for s in wanted) and len(sizes) == w.meta(x).dim():
        return w.x(x)
    return w.emit("Expand", [w.x(x), w.shape(wanted, infer=False)])


@emits("aten.repeat.default")
def _repeat(w: _Writer, node: Call) -> Any:
    x, times = node.args[:2]
    name = w.x(x)
    lead = len(times) - w.meta(x).dim()
    if lead:
        name = w.emit("Unsqueeze", [name, w.ints(list(range(lead)))])
    return w.emit("Tile", [name, w.shape(times, infer=False)])


@emits("aten.cat.default")
def _cat(w: _Writer, node: Call) -> Any:
    kind, dim, rank = node.meta["val"].dtype, w.args(node)["dim"], node.meta["val"].dim()
    # PyTorch lets empty rows join anything.
    parts = [x for x in node.args[0] if rank == 1 or tuple(w.meta(x).shape) != (0,)]
    return w.emit("Concat", [w.x(x, kind) for x in parts], axis=dim % rank)


@emits("aten.stack.default")
def _stack(w: _Writer, node: Call) -> Any:
    dim, kind = w.args(node)["dim"] % node.meta["val"].dim(), node.meta["val"].dtype
    parts = [w.emit("Unsqueeze", [w.x(x, kind), w.ints([dim])]) for x in node.args[0]]
    return w.emit("Concat", parts, axis=dim)


@emits("aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default", "aten.split.sizes")
def _split(w: _Writer, node: Call) -> Any:
    dim = w.args(node)["dim"] % w.meta(node.args[0]).dim()
    sizes = [int(v.shape[dim]) for v in node.meta["val"]]
    parts = w.emit("Split", [w.x(node.args[0]), w.ints(sizes)], len(sizes), axis=dim)
    return parts if isinstance(parts, tuple) else (parts,)


@emits("aten.unbind.int")
def _unbind(w: _Writer, node: Call) -> Any:
    x, dim = w.x(node.args[0]), w.args(node)["dim"] % w.meta(node.args[0]).dim()
    used = {u.args[1] for u in node.users}
    return {i: w.emit("Gather", [x, w.const(np.int64(i))], axis=dim) for i in range(len(node.meta["val"])) if i in used}


@emits("aten.select.int")
def _select(w: _Writer, node: Call) -> Any:
    x, dim, index = node.args[:3]
    if isinstance(index, fx.Node):
        raise w.refuse(node, "its index is computed")
    return w.emit("Gather", [w.x(x), w.const(np.int64(index))], axis=dim % w.meta(x).dim())


@emits("aten.slice.Tensor")
def _slice(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, dim = a["self"], a["dim"] % w.meta(a["self"]).dim()
    start, end = a["start"] or 0, a["end"]
    if start == 0 and (end is None or (isinstance(end, int) and end > 2**62)) and a["step"] == 1:
        return w.x(x)
    operands = [w.size(start), w.size(2**63 - 1 if end is None else end), w.ints([dim]), w.ints([a["step"]])]
    return w.emit("Slice", [w.x(x), *operands])


@emits("aten.narrow.int")
def _narrow(w: _Writer, node: Call) -> Any:
    x, dim, start, length = node.args
    return w.emit("Slice", [w.x(x), w.ints([start]), w.ints([start + length]), w.ints([dim])])


@emits("aten.flip.default")
def _flip(w: _Writer, node: Call) -> Any:
    x, dims = node.args[:2]
    lowest = [-(2**63) + 1] * len(dims)
    rank = w.meta(x).dim()
    operands = [w.ints([-1] * len(dims)), w.ints(lowest), w.ints([d % rank for d in dims]), w.ints([-1] * len(dims))]
    return w.emit("Slice", [w.x(x), *operands])


@emits("aten.roll.default")
def _roll(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, rank = w.x(a["self"]), w.meta(a["self"]).dim()
    if not a["dims"]:
        raise w.refuse(node, "it has no axes")
    for shift, dim in zip(a["shifts"], a["dims"]):
        dim, size = dim % rank, int(w.meta(a["self"]).shape[dim])
        if shift % size:
            cut = size - shift % size
            back, front = w.emit("Split", [x, w.ints([cut, size - cut])], 2, axis=dim)
            x = w.emit("Concat", [front, back], axis=dim)
    return x


@emits("aten.index_select.default")
def _index_select(w: _Writer, node: Call) -> Any:
    x, dim, index = node.args[:3]
    return w.emit("Gather", [w.x(x), w.x(index)], axis=dim % w.meta(x).dim())


@emits("aten.embedding.default")
def _embedding(w: _Writer, node: Call) -> Any:
    return w.emit("Gather", [w.x(node.args[0]), w.x(node.args[1])], axis=0)


@emits("aten._embedding_bag_forward_only.default", "aten._embedding_bag.default")
def _embedding_bag(w: _Writer, node: Call) -> Any:
    """Sums, means or maxima of rows of a table: a bag is a run of the indices, from its offset to the next one."""
    a, kind = w.args(node), node.meta["val"][0].dtype
    if any(user.args[1] and user.users for user in node.users):
        raise w.refuse(node, "more than its first result is used")
    index, offsets = w.x(a["indices"], torch.int64), w.x(a["offsets"], torch.int64)
    count = w.emit("Shape", [index])
    if a["include_last_offset"]:
        starts = w.emit("Slice", [offsets, w.ints([0]), w.ints([-1])])
        ends = w.emit("Slice", [offsets, w.ints([1]), w.ints([2**63 - 1])])
    else:
        starts = offsets
        ends = w.emit("Concat", [w.emit("Slice", [offsets, w.ints([1]), w.ints([2**63 - 1])]), count], axis=0)
    place = w.emit("Range", [w.const(np.int64(0)), w.emit("Squeeze", [count]), w.const(np.int64(1))])
    starts, ends = (w.emit("Unsqueeze", [v, w.ints([1])]) for v in (starts, ends))
    # [bags, indices]
    inside = w.emit("And", [w.emit("LessOrEqual", [starts, place]), w.emit("Less", [place, ends])])
    if a["padding_idx"] >= 0:
        real = w.emit("Not", [w.emit("Equal", [index, w.const(np.int64(a["padding_idx"]))])])
        inside = w.emit("And", [inside, real])
    rows = w.emit("Gather", [w.x(a["weight"]), index], axis=0)
    if a["mode"] == 2:
        shown = w.emit("Unsqueeze", [inside, w.ints([2])])
        best = w.emit("ReduceMax", [w.emit("Where", [shown, rows, w.x(-math.inf, kind)]), w.ints([1])], keepdims=0)
        return {0: w.emit("Where", [w.emit("IsInf", [best]), w.x(0.0, kind), best])}
    share = w.cast(inside, kind)
    if a["per_sample_weights"] is not None:
        share = w.emit("Mul", [share, w.x(a["per_sample_weights"], kind)])
    y = w.emit("MatMul", [share, rows])
    if a["mode"] == 1:
        sizes = w.emit("ReduceSum", [w.cast(inside, kind), w.ints([1])], keepdims=1)
        y = w.emit("Div", [y, w.emit("Max", [sizes, w.x(1.0, kind)])])
    return {0: y}


@emits("aten.gather.default")
def _gather(w: _Writer, node: Call) -> Any:
    x, dim, index = node.args[:3]
    return w.emit("GatherElements", [w.x(x), w.x(index)], axis=dim % w.meta(x).dim())


@emits("aten.index.Tensor")
def _index(w: _Writer, node: Call) -> Any:
    x, indices = node.args[:2]
    given = [(i, v) for i, v in enumerate(indices) if v is not None]
    if any(w.meta(v).dtype == torch.bool for _, v in given):
        raise w.refuse(node, "it is indexed by booleans")
    if len(given) == 1:
        axis, index = given[0]
        return w.emit("Gather", [w.x(x), w.x(index, torch.int64)], axis=axis)
    names, rank = _index_names(w, [v for _, v in given])
    return _gathered(w, w.x(x), w.meta(x).dim(), [i for i, _ in given], names, rank)


def _index_names(w: _Writer, given: Sequence[Any]) -> tuple[list[str], int]:
    """Indices in one shape, and its rank."""
    names = [w.x(v, torch.int64) for v in given]
    shapes = [w.meta(v).shape for v in given]
    rank = len(torch.broadcast_shapes(*shapes))
    if any(shape != shapes[0] for shape in shapes):
        # The batch may be among their sizes: the shape is that of their sum.
        whole = names[0]
        for name in names[1:]:
            whole = w.emit("Add", [whole, name])
        whole = w.emit("Shape", [whole])
        names = [w.emit("Expand", [name, whole]) for name in names]
    return names, rank


def _gathered(w: _Writer, x: str, rank: int, axes: Sequence[int], names: Sequence[str], depth: int) -> str:
    """x [rank] at indices of equal shape [depth] on several axes; the new axes stand as PyTorch places them."""
    rest = [d for d in range(rank) if d not in axes]
    order = [*axes, *rest]
    if order != list(range(rank)):
        x = w.emit("Transpose", [x], perm=order)
    parts = [w.emit("Unsqueeze", [name, w.ints([depth])]) for name in names]
    y = w.emit("GatherND", [x, parts[0] if len(parts) == 1 else w.emit("Concat", parts, axis=depth)])
    first = axes[0]
    if first == 0 or list(axes) != list(range(first, first + len(axes))):
        return y
    ahead = list(range(depth, depth + first))
    return w.emit("Transpose", [y], perm=[*ahead, *range(depth), *range(depth + first, depth + len(rest))])


@emits("aten.diagonal_scatter.default")
def _diagonal_scatter(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    rank = node.meta["val"].dim()
    dims = [a["dim1"] % rank, a["dim2"] % rank]
    count = int(w.meta(a["src"]).shape[-1])
    index = np.stack([np.arange(count) + shift for shift in (max(0, -a["offset"]), max(0, a["offset"]))], 1)
    order = [*dims, *(d for d in range(rank) if d not in dims)]
    x = w.emit("Transpose", [w.x(a["self"])], perm=order)
    source = w.emit("Transpose", [w.x(a["src"], kind)], perm=[rank - 2, *range(rank - 2)])
    y = w.emit("ScatterND", [x, w.const(index), source])
    return w.emit("Transpose", [y], perm=[order.index(d) for d in range(rank)])


@emits("aten.im2col.default")
def _im2col(w: _Writer, node: Call) -> Any:
    """What each tap of a window sees, by slices."""
    x, kernel, dilation, padding, stride = node.args
    _, channels, height, width = (int(n) for n in w.meta(x).shape)
    name = w.x(x)
    if any(padding):
        name = w.emit("Pad", [name, w.ints([0, 0, *padding, 0, 0, *padding])])
    counts = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, kernel, stride)
    ]
    parts = []
    for tap in np.ndindex(*kernel):
        start = [int(t) * d for t, d in zip(tap, dilation)]
        end = [b + (n - 1) * s + 1 for b, n, s in zip(start, counts, stride)]
        part = w.emit("Slice", [name, w.ints(start), w.ints(end), w.ints([2, 3]), w.ints(list(stride))])
        parts.append(w.emit("Reshape", [part, w.ints([0, channels, 1, math.prod(counts)])]))
    taps = parts[0] if len(parts) == 1 else w.emit("Concat", parts, axis=2)
    return w.emit("Reshape", [taps, w.ints([0, channels * len(parts), math.prod(counts)])])


@emits("aten.col2im.default")
def _col2im(w: _Writer, node: Call) -> Any:
    x, size, kernel, dilation, padding, stride = node.args
    return w.emit(
        "Col2Im",
        [w.x(x), w.ints(size), w.ints(kernel)],
        dilations=list(dilation),
        pads=_pads(padding),
        strides=list(stride),
    )


@emits("aten.diagonal.default")
def _diagonal(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    rank = w.meta(a["self"]).dim()
    dims = [a["dim1"] % rank, a["dim2"] % rank]
    count = int(node.meta["val"].shape[-1])
    places = [w.const(np.arange(count) + shift) for shift in (max(0, -a["offset"]), max(0, a["offset"]))]
    # The diagonal comes last.
    rest = [d for d in range(rank) if d not in dims]
    x = w.emit("Transpose", [w.x(a["self"])], perm=[*dims, *rest])
    y = _gathered(w, x, rank, [0, 1], places, 1)
    return w.emit("Transpose", [y], perm=[*range(1, rank - 1), 0])


@emits("aten.index_put.default", "aten._unsafe_index_put.default")
def _index_put(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    x, rank = w.x(a["self"]), node.meta["val"].dim()
    given = [(i, v) for i, v in enumerate(a["indices"]) if v is not None]
    values = w.x(a["values"], kind)
    if w.meta(given[0][1]).dtype == torch.bool:
        mask = w.meta(given[0][1])
        if len(given) > 1 or given[0][0] or w.meta(a["values"]).numel() != 1 or a["accumulate"]:
            raise w.refuse(node, "it is indexed by booleans")
        shown = w.x(given[0][1])
        if mask.dim() < rank:
            shown = w.emit("Unsqueeze", [shown, w.ints(list(range(mask.dim(), rank)))])
        return w.emit("Where", [shown, w.emit("Reshape", [values, w.ints([1])]), x])
    axes = [i for i, _ in given]
    names, depth = _index_names(w, [v for _, v in given])
    rest = [d for d in range(rank) if d not in axes]
    order = [*axes, *rest]
    turned = x if order == list(range(rank)) else w.emit("Transpose", [x], perm=order)
    parts = [w.emit("Unsqueeze", [name, w.ints([depth])]) for name in names]
    index = parts[0] if len(parts) == 1 else w.emit("Concat", parts, axis=depth)
    # As the values stand where they are read.
    there = _gathered(w, x, rank, axes, names, depth)
    values = w.emit("Expand", [values, w.emit("Shape", [there])])
    first = axes[0]
    if first and axes == list(range(first, first + len(axes))):
        values = w.emit(
            "Transpose",
            [values],
            perm=[*range(first, first + depth), *range(first), *range(first + depth, depth + len(rest))],
        )
    reduction = "add" if a["accumulate"] else None
    narrow = kind == torch.float16 and reduction
    operands = [w.cast(v, torch.float32) if narrow else v for v in (turned, values)]
    y = w.emit("ScatterND", [operands[0], index, operands[1]], reduction=reduction)
    y = w.cast(y, kind) if narrow else y
    return y if turned == x else w.emit("Transpose", [y], perm=[order.index(d) for d in range(rank)])


def _scattered(w: _Writer, node: Call, x: str, dim: int, index: str, updates: str, reduction: str | None) -> str:
    """ScatterElements; float16 is reduced in float32, as not all engines do."""
    kind, rank = node.meta["val"].dtype, max(node.meta["val"].dim(), 1)
    wide = kind == torch.float16 and reduction is not None
    operands = [w.cast(v, torch.float32) if wide else v for v in (x, updates)]
    y = w.emit("ScatterElements", [operands[0], index, operands[1]], axis=dim % rank, reduction=reduction)
    return w.cast(y, kind) if wide else y


def _updates(w: _Writer, source: Any, index: Any, kind: torch.dtype) -> str:
    """What is scattered: as much of the source as the index has places for."""
    name, have, want = w.x(source, kind), w.meta(source).shape, w.meta(index).shape
    axes = [d for d, (n, m) in enumerate(zip(have, want)) if n != m]
    if axes:
        ends = w.ints([int(want[d]) for d in axes])
        name = w.emit("Slice", [name, w.ints([0] * len(axes)), ends, w.ints(axes)])
    return name


@emits("aten.scatter.src", "aten.scatter_add.default")
def _scatter(w: _Writer, node: Call) -> Any:
    x, dim, index, source = node.args[:4]
    reduction = "add" if "scatter_add" in str(node.target) else None
    updates = _updates(w, source, index, node.meta["val"].dtype)
    return _scattered(w, node, w.x(x), dim, w.x(index), updates, reduction)


@emits("aten.scatter.value")
def _scatter_value(w: _Writer, node: Call) -> Any:
    x, dim, index, value = node.args[:4]
    places = w.x(index)
    updates = w.emit("Expand", [w.x(value, node.meta["val"].dtype), w.emit("Shape", [places])])
    return _scattered(w, node, w.x(x), dim, places, updates, None)


@emits("aten.scatter_reduce.two")
def _scatter_reduce(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    how, dim = a["reduce"], a["dim"]
    if not kind.is_floating_point and (how == "mean" or not a["include_self"]):
        raise w.refuse(node, "it is a mean of whole numbers, or without what was there")
    x, index = w.x(a["self"]), w.x(a["index"])
    updates = _updates(w, a["src"], a["index"], kind)
    op, neutral = {
        "sum": ("add", 0.0),
        "mean": ("add", 0.0),
        "prod": ("mul", 1.0),
        "amax": ("max", -math.inf),
        "amin": ("min", math.inf),
    }[how]
    count, start = "", x
    if how == "mean" or not a["include_self"]:
        zeros = _zeros_like(w, x, kind)
        ones = w.emit("Expand", [w.x(1.0, kind), w.emit("Shape", [index])])
        count = _scattered(w, node, zeros, dim, index, ones, "add")
    untouched = w.emit("Equal", [count, w.x(0.0, kind)]) if count else ""
    if not a["include_self"]:
        start = w.emit("Where", [untouched, x, w.x(neutral, kind)])
    y = _scattered(w, node, start, dim, index, updates, op)
    if how == "mean":
        own = w.x(1.0, kind) if a["include_self"] else w.cast(untouched, kind)
        y = w.emit("Div", [y, w.emit("Add", [count, own])])
    return y


def _zeros_like(w: _Writer, x: str, kind: torch.dtype) -> str:
    return w.emit("Expand", [w.x(0.0, kind), w.emit("Shape", [x])])


@emits("aten.index_add.default", "aten.index_copy.default")
def _index_add(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    source, rank = w.x(a["source"], kind), node.meta["val"].dim()
    adds = "index_add" in str(node.target)
    if adds and a["alpha"] != 1:
        source = w.emit("Mul", [source, w.x(a["alpha"], kind)])
    dim = a["dim"] % max(rank, 1)
    places = w.emit("Reshape", [w.x(a["index"], torch.int64), w.ints([-1 if d == dim else 1 for d in range(rank)])])
    places = w.emit("Expand", [places, w.emit("Shape", [source])])
    return _scattered(w, node, w.x(a["self"]), dim, places, source, "add" if adds else None)


@emits("aten.slice_scatter.default", "aten.select_scatter.default")
def _put(w: _Writer, node: Call) -> Any:
    """A tensor with some places along one axis from another."""
    a, kind = w.args(node), node.meta["val"].dtype
    x, dim = w.x(a["self"]), a["dim"] % node.meta["val"].dim()
    size, source = int(node.meta["val"].shape[dim]), w.x(a["src"], kind)
    if "select" in str(node.target):
        source = w.emit("Unsqueeze", [source, w.ints([dim])])
        places = range(size)[a["index"] :][:1]
    else:
        if any(isinstance(a[k], fx.Node) for k in ("start", "end", "step")):
            raise w.refuse(node, "its limits are computed")
        places = range(size)[a["start"] : a["end"] : a["step"]]
    if len(places) == size:
        return source
    if not places:
        return x
    if places.step == 1:
        start, end = places[0], places[-1] + 1
        parts = [source]
        if start:
            parts.insert(0, w.emit("Slice", [x, w.ints([0]), w.ints([start]), w.ints([dim])]))
        if end < size:
            parts.append(w.emit("Slice", [x, w.ints([end]), w.ints([size]), w.ints([dim])]))
        return w.emit("Concat", parts, axis=dim)
    chosen = np.isin(np.arange(size), places)
    spread = w.emit("Gather", [source, w.const(np.maximum(np.cumsum(chosen) - 1, 0))], axis=dim)
    mask = chosen.reshape([-1 if i == dim else 1 for i in range(node.meta["val"].dim())])
    return w.emit("Where", [w.const(mask), spread, x])


@emits("aten.pad.default", "aten.constant_pad_nd.default")
def _pad(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    return _padded(w, node, a["self"], a["pad"], a.get("mode", "constant"), a["value"])


@emits("aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.reflection_pad3d.default")
def _reflection(w: _Writer, node: Call) -> Any:
    return _padded(w, node, node.args[0], node.args[1], "reflect", None)


@emits("aten.replication_pad1d.default", "aten.replication_pad2d.default", "aten.replication_pad3d.default")
def _replication(w: _Writer, node: Call) -> Any:
    return _padded(w, node, node.args[0], node.args[1], "replicate", None)


def _padded(w: _Writer, node: Call, x: Any, pads: Sequence[int], mode: str, value: Any) -> str:
    rank, kind = w.meta(x).dim(), w.meta(x).dtype
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    form = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    operands = [w.x(x), w.ints([*before, *after])]
    if form == "constant" and value:
        operands.append(w.x(value, kind))
    return w.emit("Pad", operands, mode=form)


@emits("aten.pixel_shuffle.default")
def _pixel_shuffle(w: _Writer, node: Call) -> Any:
    return w.emit("DepthToSpace", [w.x(node.args[0])], blocksize=node.args[1], mode="CRD")


@emits("aten.tril.default", "aten.triu.default")
def _triangle(w: _Writer, node: Call) -> Any:
    upper = int("triu" in str(node.target))
    return w.emit("Trilu", [w.x(node.args[0]), w.const(np.int64(w.args(node)["diagonal"]))], upper=upper)


@emits("aten.cumsum.default")
def _cumsum(w: _Writer, node: Call) -> Any:
    return w.emit("CumSum", [w.x(node.args[0], node.meta["val"].dtype), w.const(np.int64(node.args[1]))])


@emits("aten.topk.default", "aten.sort.default", "aten.sort.stable")
def _topk(w: _Writer, node: Call) -> Any:
    a, dim = w.args(node), w.args(node)["dim"]
    largest = int(a["largest"] if "largest" in a else a["descending"])
    count = int(node.meta["val"][0].shape[dim])
    return w.emit("TopK", [w.x(a["self"]), w.ints([count])], 2, axis=dim, largest=largest)


# -- reductions --------------------------------------------------------------------------------------------------------


def _reduce(op: str) -> Emitter:
    def emitter(w: _Writer, node: Call) -> Any:
        a = w.args(node)
        dims = a.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(w.meta(a["self"]).dim()))
        rank = w.meta(a["self"]).dim()
        operands = [w.x(a["self"], node.meta["val"].dtype)]
        operands += [w.ints([d % rank for d in dims])] if rank else []
        return w.emit(op, operands, keepdims=int(bool(a.get("keepdim"))))

    return emitter


for _name, _op in {
    "mean.dim": "ReduceMean",
    "mean.default": "ReduceMean",
    "sum.dim_IntList": "ReduceSum",
    "sum.default": "ReduceSum",
    "amax.default": "ReduceMax",
    "amin.default": "ReduceMin",
    "prod.dim_int": "ReduceProd",
    "logsumexp.default": "ReduceLogSumExp",
}.items():
    EMITTERS[f"aten.{_name}"] = _reduce(_op)


@emits("aten.max.default", "aten.min.default")
def _extreme(w: _Writer, node: Call) -> Any:
    op = "ReduceMax" if ".max." in str(node.target) else "ReduceMin"
    return w.emit(op, [w.x(node.args[0])], keepdims=0)


@emits("aten.linalg_vector_norm.default")
def _vector_norm(w: _Writer, node: Call) -> Any:
    a, kind = w.args(node), node.meta["val"].dtype
    order, x, rank = float(a["ord"]), w.x(a["self"], kind), w.meta(a["self"]).dim()
    dims = [a["dim"]] if isinstance(a["dim"], int) else list(a["dim"] or range(rank))
    axes, keep = [w.ints([d % rank for d in dims])], int(a["keepdim"])
    if not math.isfinite(order):
        return w.emit("ReduceMax" if order > 0 else "ReduceMin", [w.emit("Abs", [x]), *axes], keepdims=keep)
    if order in (1.0, 2.0):
        return w.emit("ReduceL1" if order == 1 else "ReduceL2", [x, *axes], keepdims=keep)
    if order == 0:
        other = w.emit("Not", [w.emit("Equal", [x, w.x(0.0, kind)])])
        return w.emit("ReduceSum", [w.cast(other, kind), *axes], keepdims=keep)
    powers = w.emit("Pow", [w.emit("Abs", [x]), w.x(order, kind)])
    return w.emit("Pow", [w.emit("ReduceSum", [powers, *axes], keepdims=keep), w.x(1 / order, kind)])


@emits("aten.argmax.default", "aten.argmin.default")
def _arg(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    op = "ArgMax" if "argmax" in str(node.target) else "ArgMin"
    if a["dim"] is None:
        flat = w.emit("Reshape", [w.x(a["self"]), w.ints([-1])])
        return w.emit(op, [flat], axis=0, keepdims=0)
    return w.emit(op, [w.x(a["self"])], axis=a["dim"], keepdims=int(a["keepdim"]))


@emits("aten.max.dim", "aten.min.dim")
def _max_dim(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    value, place = ("ReduceMax", "ArgMax") if ".max." in str(node.target) else ("ReduceMin", "ArgMin")
    x, keep = w.x(a["self"]), int(a["keepdim"])
    dim = a["dim"] % w.meta(a["self"]).dim()
    return (
        w.emit(value, [x, w.ints([dim])], keepdims=keep),
        w.emit(place, [x], axis=dim, keepdims=keep),
    )


@emits("aten.var.correction", "aten.var.dim", "aten.var_mean.correction", "aten.std.correction")
def _variance(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, shape = w.x(a["self"]), w.meta(a["self"]).shape
    dims = [d % len(shape) for d in (a["dim"] or range(len(shape)))]
    count = math.prod(int(shape[d]) for d in dims)
    correction = a.get("correction", 1 if a.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    mean = w.emit("ReduceMean", [x, w.ints(dims)], keepdims=1)
    centred = w.emit("Sub", [x, mean])
    keep = int(bool(a.get("keepdim")))
    var = w.emit("ReduceMean", [w.emit("Mul", [centred, centred]), w.ints(dims)], keepdims=keep)
    if correction:
        var = w.emit("Mul", [var, w.x(count / (count - correction), w.meta(a["self"]).dtype)])
    if "std" in str(node.target):
        return w.emit("Sqrt", [var])
    if "var_mean" in str(node.target):
        return var, mean if keep else w.emit("Squeeze", [mean, w.ints(dims)])
    return var


@emits("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int", "aten._log_softmax.default")
def _softmax(w: _Writer, node: Call) -> Any:
    op = "LogSoftmax" if "log_softmax" in str(node.target) else "Softmax"
    return w.emit(op, [w.x(node.args[0], node.meta["val"].dtype)], axis=node.args[1])


# -- layers ------------------------------------------------------------------------------------------------------------


def _pads(before: Sequence[int], after: Sequence[int] | None = None) -> list[int]:
    return [*before, *(before if after is None else after)]


def _all(values: Any, rank: int) -> list[int]:
    """A list of `rank` numbers, where one stands for all."""
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return values * rank if len(values) == 1 else values


@emits("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
@emits("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")
def _conv(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    rank = w.meta(a["input"]).dim() - 2
    stride, dilation = _all(a["stride"], rank), _all(a["dilation"], rank)
    if isinstance(a["padding"], str):
        kernel = w.meta(a["weight"]).shape[2:]
        total = [d * (int(k) - 1) if a["padding"] == "same" else 0 for k, d in zip(kernel, dilation)]
        pads = _pads([t // 2 for t in total], [t - t // 2 for t in total])
    else:
        pads = _pads(_all(a["padding"], rank))
    if not isinstance(a["groups"], int):
        return _conv_of_samples(w, node, a, stride, dilation, pads)
    operands = [w.x(a["input"]), w.x(a["weight"])] + ([w.x(a["bias"])] if a["bias"] is not None else [])
    return w.emit(
        "Conv", operands, strides=stride, dilations=dilation, pads=pads, group=a["groups"], kernel_shape=_kernel(w, a)
    )


@emits("aten.convolution.default")
def _convolution(w: _Writer, node: Call) -> Any:
    return (_conv_transpose if w.args(node)["transposed"] else _conv)(w, node)


def _conv_of_samples(
    w: _Writer, node: Call, a: dict[str, Any], stride: list[int], dilation: list[int], pads: list[int]
) -> str:
    """A convolution whose groups are samples, each with weights of its own: as products of what each tap sees.

    ONNX's Conv has a number of groups that is written in the file.
    """
    shape, kernel = [int(n) for n in w.meta(a["input"]).shape], _kernel(w, a)
    if shape[0] != 1 or a["bias"] is not None:
        raise w.refuse(node, "its number of groups is computed")
    rank, channels = len(kernel), int(w.meta(a["weight"]).shape[1])
    out = [int(n) for n in node.meta["val"].shape]
    # [1, G C, ...] -> [G, C, ...]
    x = w.emit("Reshape", [w.x(a["input"]), w.ints([-1, channels, *shape[2:]])])
    if any(pads):
        x = w.emit("Pad", [x, w.ints([0, 0, *pads[:rank], 0, 0, *pads[rank:]])])
    seen = []
    axes = w.ints(list(range(2, rank + 2)))
    for tap in np.ndindex(*kernel):
        start = [t * d for t, d in zip(tap, dilation)]
        end = [s + (n - 1) * step + 1 for s, n, step in zip(start, out[2:], stride)]
        part = w.emit("Slice", [x, w.ints(start), w.ints(end), axes, w.ints(stride)])
        seen.append(w.emit("Reshape", [part, w.ints([0, channels, math.prod(out[2:])])]))
    columns = seen[0] if len(seen) == 1 else w.emit("Concat", seen, axis=1)
    groups = shape[1] // channels
    # [G O, C, taps] -> [G, O, taps C]
    filters = int(w.meta(a["weight"]).shape[0]) // groups
    weight = w.emit("Reshape", [w.x(a["weight"]), w.ints([-1, filters, channels, len(seen)])])
    weight = w.emit("Transpose", [weight], perm=[0, 1, 3, 2])
    weight = w.emit("Reshape", [weight, w.ints([0, 0, channels * len(seen)])])
    return w.emit("Reshape", [w.emit("MatMul", [weight, columns]), w.ints([1, -1, *out[2:]])])


def _kernel(w: _Writer, a: dict[str, Any]) -> list[int]:
    return [int(n) for n in w.meta(a["weight"]).shape[2:]]


@emits("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def _conv_transpose(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    rank = w.meta(a["input"]).dim() - 2
    operands = [w.x(a["input"]), w.x(a["weight"])] + ([w.x(a["bias"])] if a["bias"] is not None else [])
    return w.emit(
        "ConvTranspose",
        operands,
        strides=_all(a["stride"], rank),
        dilations=_all(a["dilation"], rank),
        pads=_pads(_all(a["padding"], rank)),
        output_padding=_all(a["output_padding"], rank),
        group=a["groups"],
        kernel_shape=_kernel(w, a),
    )


@emits("aten.linear.default")
def _linear(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    if w.meta(x).dim() == 2:
        operands = [w.x(x), w.x(weight)] + ([w.x(bias)] if bias is not None else [])
        return w.emit("Gemm", operands, transB=1)
    if weight.op == "get_attr":
        turned = w.weight(weight, np.ascontiguousarray(w.array(weight).T))
    else:
        turned = w.emit("Transpose", [w.x(weight)], perm=[1, 0])
    y = w.emit("MatMul", [w.x(x), turned])
    return y if bias is None else w.emit("Add", [y, w.x(bias)])


@emits("aten.addmm.default")
def _addmm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    operands = [w.x(a[k]) for k in ("mat1", "mat2", "self")]
    return w.emit("Gemm", operands, alpha=float(a["alpha"]), beta=float(a["beta"]))


for _name in ("mm", "bmm", "matmul"):
    EMITTERS[f"aten.{_name}.default"] = lambda w, n: w.emit("MatMul", [w.x(n.args[0]), w.x(n.args[1])])


@emits("aten.einsum.default")
def _einsum(w: _Writer, node: Call) -> Any:
    return w.emit("Einsum", [w.x(x) for x in node.args[1]], equation=str(node.args[0]).replace(" ", ""))


@emits("aten.batch_norm.default")
def _batch_norm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    channels, kind = int(w.meta(a["input"]).shape[1]), w.meta(a["input"]).dtype
    ones, zeros = (np.full(channels, v, torch.empty(0, dtype=kind).numpy().dtype) for v in (1, 0))
    weight = w.const(ones) if a["weight"] is None else w.x(a["weight"])
    bias = w.const(zeros) if a["bias"] is None else w.x(a["bias"])
    operands = [w.x(a["input"]), weight, bias, w.x(a["running_mean"]), w.x(a["running_var"])]
    return w.emit("BatchNormalization", operands, epsilon=float(a["eps"]))


@emits("aten.layer_norm.default")
def _layer_norm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    shape, kind = list(a["normalized_shape"]), node.meta["val"].dtype
    weight = a["weight"]
    scale = w.const(np.ones(shape, torch.empty(0, dtype=kind).numpy().dtype)) if weight is None else w.x(weight)
    operands = [w.x(a["input"]), scale] + ([w.x(a["bias"])] if a["bias"] is not None else [])
    return w.emit("LayerNormalization", operands, axis=-len(shape), epsilon=float(a["eps"]))


@emits("aten.rms_norm.default")
def _rms_norm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, kind = w.x(a["input"]), node.meta["val"].dtype
    dims = w.ints([-i - 1 for i in range(len(a["normalized_shape"]))][::-1])
    eps = a["eps"] if a["eps"] is not None else torch.finfo(kind).eps
    mean = w.emit("ReduceMean", [w.emit("Mul", [x, x]), dims], keepdims=1)
    y = w.emit("Div", [x, w.emit("Sqrt", [w.emit("Add", [mean, w.x(float(eps), kind)])])])
    return y if a["weight"] is None else w.emit("Mul", [y, w.x(a["weight"])])


@emits("aten.group_norm.default")
def _group_norm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    return _groups(w, a["input"], a["num_groups"], a["weight"], a["bias"], a["eps"])


@emits("aten.instance_norm.default")
def _instance_norm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    if not a["use_input_stats"]:
        return _batch_norm(w, node)
    return _groups(w, a["input"], int(w.meta(a["input"]).shape[1]), a["weight"], a["bias"], a["eps"])


def _groups(w: _Writer, x: Call, groups: int, weight: Any, bias: Any, eps: float) -> str:
    channels, kind = int(w.meta(x).shape[1]), torch.empty(0, dtype=w.meta(x).dtype).numpy().dtype
    scale = w.const(np.ones(channels, kind)) if weight is None else w.x(weight)
    offset = w.const(np.zeros(channels, kind)) if bias is None else w.x(bias)
    return w.emit("GroupNormalization", [w.x(x), scale, offset], num_groups=groups, epsilon=float(eps))


@emits("aten.scaled_dot_product_attention.default")
def _attention(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    query, key, value = a["query"], a["key"], a["value"]
    kind, rank = node.meta["val"].dtype, w.meta(query).dim()
    if a["is_causal"] or a["enable_gqa"]:
        raise w.refuse(node, "it is causal or shares keys among heads")
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(int(w.meta(query).shape[-1]))
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = w.emit(
        "MatMul", [w.emit("Mul", [w.x(query), w.x(float(scale), kind)]), w.emit("Transpose", [w.x(key)], perm=order)]
    )
    mask = a["attn_mask"]
    if mask is not None:
        if w.meta(mask).dtype == torch.bool:
            lowest = w.x(float(torch.finfo(kind).min), kind)
            scores = w.emit("Where", [w.x(mask), scores, lowest])
        else:
            scores = w.emit("Add", [scores, w.x(mask)])
    return w.emit("MatMul", [w.emit("Softmax", [scores], axis=-1), w.x(value)])


@emits("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default")
def _max_pool(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    rank = w.meta(a["self"]).dim() - 2
    kernel = _all(a["kernel_size"], rank)
    return w.emit(
        "MaxPool",
        [w.x(a["self"])],
        kernel_shape=kernel,
        strides=_all(a["stride"] or kernel, rank),
        pads=_pads(_all(a["padding"], rank)),
        dilations=_all(a["dilation"], rank),
        ceil_mode=int(a["ceil_mode"]),
    )


@emits("aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default")
def _max_pool_places(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    sizes = [int(n) for n in w.meta(a["self"]).shape[2:]]
    kernel = _all(a["kernel_size"], len(sizes))
    y, places = w.emit(
        "MaxPool",
        [w.x(a["self"])],
        2,
        kernel_shape=kernel,
        strides=_all(a["stride"] or kernel, len(sizes)),
        pads=_pads(_all(a["padding"], len(sizes))),
        dilations=_all(a["dilation"], len(sizes)),
        ceil_mode=int(a["ceil_mode"]),
    )
    # ONNX counts through all samples and channels.
    return y, w.emit("Mod", [places, w.const(np.int64(math.prod(sizes)))])


@emits("aten.adaptive_max_pool1d.default", "aten.adaptive_max_pool2d.default", "aten.adaptive_max_pool3d.default")
def _adaptive_max_pool(w: _Writer, node: Call) -> Any:
    x, size = node.args[:2]
    if any(user.args[1] and user.users for user in node.users):
        raise w.refuse(node, "its places are used")
    old = [int(n) for n in w.meta(x).shape[2:]]
    return {0: _uneven_windows(w, w.x(x), old, _all(size, len(old)), "ReduceMax")}


@emits("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def _avg_pool(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    rank = w.meta(a["self"]).dim() - 2
    kernel = _all(a["kernel_size"], rank)
    y = w.emit(
        "AveragePool",
        [w.x(a["self"])],
        kernel_shape=kernel,
        strides=_all(a["stride"] or kernel, rank),
        pads=_pads(_all(a["padding"], rank)),
        ceil_mode=int(a["ceil_mode"]),
        count_include_pad=int(a["count_include_pad"] or bool(a.get("divisor_override"))),
    )
    divisor = a.get("divisor_override")
    if divisor:
        if a["ceil_mode"]:
            raise w.refuse(node, "it has a divisor and windows that reach out of the pads")
        y = w.emit("Mul", [y, w.x(math.prod(kernel) / divisor, node.meta["val"].dtype)])
    return y


@emits("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default", "aten.adaptive_avg_pool3d.default")
@emits("aten._adaptive_avg_pool2d.default")
def _adaptive_avg_pool(w: _Writer, node: Call) -> Any:
    x, size = node.args[:2]
    old = [int(n) for n in w.meta(x).shape[2:]]
    new = [o if s is None else s for s, o in zip(_all(size, len(old)), old)]
    if all(n == 1 for n in new):
        return w.emit("GlobalAveragePool", [w.x(x)])
    if any(o % n for o, n in zip(old, new)):
        return _uneven_windows(w, w.x(x), old, new, "ReduceMean")
    kernel = [o // n for o, n in zip(old, new)]
    return w.emit("AveragePool", [w.x(x)], kernel_shape=kernel, strides=kernel)


def _uneven_windows(w: _Writer, x: str, old: Sequence[int], new: Sequence[int], op: str) -> str:
    """Means or maxima over windows of different sizes, axis by axis."""
    for axis, (n, count) in enumerate(zip(old, new), 2):
        if n == count:
            continue
        parts = []
        for i in range(count):
            start, end = i * n // count, -(-(i + 1) * n // count)
            part = w.emit("Slice", [x, w.ints([start]), w.ints([end]), w.ints([axis])])
            parts.append(w.emit(op, [part, w.ints([axis])], keepdims=1))
        x = w.emit("Concat", parts, axis=axis)
    return x


@emits("aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default")
@emits("aten.upsample_bilinear2d.vec", "aten.upsample_bilinear2d.default", "aten.upsample_linear1d.vec")
@emits("aten.upsample_bicubic2d.vec", "aten.upsample_nearest3d.vec", "aten.upsample_trilinear3d.vec")
def _upsample(w: _Writer, node: Call) -> Any:
    a, x, name = w.args(node), node.args[0], str(node.target)
    old, new = [int(n) for n in w.meta(x).shape[2:]], [int(n) for n in node.meta["val"].shape[2:]]
    factors = a.get("scale_factors")
    factors = [1.0, 1.0, *factors] if factors else None
    if factors and any(math.floor(o * f) != o * f for o, f in zip(old, factors[2:])):
        raise w.refuse(node, "its factors give rounded sizes")
    scales = w.const(np.array([1.0, 1.0, *(n / o for n, o in zip(new, old))], np.float32))
    exact = all(np.float32(n / o) * o == n for n, o in zip(new, old))
    operands = [w.x(x), "", scales]
    if not exact:
        batch = w.emit("Shape", [w.x(x)], start=0, end=2)
        operands = [w.x(x), "", "", w.emit("Concat", [batch, w.ints(new)], axis=0)]
    if "nearest" in name:
        return w.emit(
            "Resize", operands, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
        )
    corners = "align_corners" if a["align_corners"] else "half_pixel"
    mode = "cubic" if "bicubic" in name else "linear"
    return w.emit("Resize", operands, mode=mode, coordinate_transformation_mode=corners, cubic_coeff_a=-0.75)


@emits("aten.grid_sampler.default", "aten.grid_sampler_2d.default")
def _grid_sampler(w: _Writer, node: Call) -> Any:
    x, grid, mode, padding, corners = node.args[:5]
    return w.emit(
        "GridSample",
        [w.x(x), w.x(grid)],
        mode=("linear", "nearest", "cubic")[mode],
        padding_mode=("zeros", "border", "reflection")[padding],
        align_corners=int(corners),
    )


# -- int8 --------------------------------------------------------------------------------------------------------------


def _multiplier(m: np.ndarray | int, shift: np.ndarray | int) -> np.ndarray:
    """The real multipliers that (m, shift) stand for."""
    factor = np.asarray(m)
    if factor.dtype == np.float32:
        return factor.astype(np.float64)
    return factor.astype(np.float64) * 2.0 ** -np.asarray(shift, np.float64)


def _quantized_weight(w: _Writer, node: Call, codes: np.ndarray, scale: np.ndarray, axis: int) -> str:
    """A weight of codes with one scale per output channel, as DequantizeLinear of int8."""
    # A channel whose multiplier is zero is constant: any scale will do that makes it small.
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
    return w.emit("DequantizeLinear", [w.weight(node, codes), w.const(scale)], axis=axis)


def _quantized_bias(w: _Writer, node: Call, a: dict[str, Any], x_zp: int, scale: np.ndarray) -> str:
    """The bias without the share of the zero point, at the scale of the sums."""
    codes, weight = w.array(a["bias"]).astype(np.int64), w.array(a["w"]).astype(np.int64)
    own = codes + x_zp * weight.reshape(len(weight), -1).sum(1)
    if np.abs(own).max(initial=0) >= 2**31:
        raise w.refuse(node, "its bias leaves int32")
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
    return w.emit("DequantizeLinear", [w.weight(a["bias"], own.astype(np.int32)), w.const(scale)], axis=0)


def _nchw(w: _Writer, node: Call, a: dict[str, Any]) -> None:
    if a.get("layout", "NCHW") != "NCHW":
        raise w.refuse(node, "its channels are last")


@emits("edgec.quantize.default")
def _quantize(w: _Writer, node: Call) -> Any:
    x, scale, zero = node.args
    return w.codes(w.x(x), scale, zero)


@emits("edgec.dequantize.default")
def _dequantize(w: _Writer, node: Call) -> Any:
    x, scale, zero = node.args
    return w.real(x, scale, zero)


@emits("edgec.qconv2d.default", "edgec.qconv2d_float.default")
def _qconv(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    _nchw(w, node, a)
    codes = "m" in a
    sx, sy = w.scale(a["x"]), w.scale(node)
    whole = _multiplier(w.array(a["m"]), w.array(a["shift"])) * sy if codes else w.array(a["scale"]).astype(np.float64)
    weight = _quantized_weight(w, a["w"], w.array(a["w"]), whole / sx, 0)
    bias = _quantized_bias(w, node, a, a["x_zp"], whole)
    top, bottom, left, right = a["padding"]
    y = w.emit(
        "Conv",
        [w.real(a["x"], sx, a["x_zp"]), weight, bias],
        strides=a["stride"],
        dilations=a["dilation"],
        pads=[top, left, bottom, right],
        group=a["groups"],
        kernel_shape=list(w.array(a["w"]).shape[2:]),
    )
    return w.codes(y, sy, a["y_zp"], a["lo"], a["hi"]) if codes else y


@emits("edgec.qlinear.default", "edgec.qlinear_float.default")
def _qlinear(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    grid = w.grid(a["x"])
    sx, x_zp = grid
    codes, sy = "m" in a, w.scale(node)
    whole = _multiplier(w.array(a["m"]), w.array(a["shift"])) * sy if codes else w.array(a["scale"]).astype(np.float64)
    x = w.real(a["x"], sx, x_zp)
    bias = _quantized_bias(w, node, a, x_zp, whole)
    if w.meta(a["x"]).dim() == 2:
        weight = _quantized_weight(w, a["w"], w.array(a["w"]), whole / sx, 0)
        y = w.emit("Gemm", [x, weight, bias], transB=1)
    else:
        weight = _quantized_weight(w, a["w"], np.ascontiguousarray(w.array(a["w"]).T), whole / sx, 1)
        y = w.emit("Add", [w.emit("MatMul", [x, weight]), bias])
    return w.codes(y, sy, a["y_zp"], a["lo"], a["hi"]) if codes else y


@emits("edgec.qadd.default")
def _qadd(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    sy = w.scale(node)
    sa, sb = (v * 2.0 ** -a["f"] * sy for v in (a["ma"], a["mb"]))
    left = w.real(a["a"], w.scale(a["a"], abs(sa)), a["za"])
    right = w.real(a["b"], w.scale(a["b"], abs(sb)), a["zb"])
    left = w.emit("Neg", [left]) if sa < 0 else left
    y = w.emit("Sub" if sb < 0 else "Add", [left, right])
    return w.codes(y, sy, a["zy"], a["lo"], a["hi"])


@emits("edgec.qmul.default")
def _qmul(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    sy = w.scale(node)
    product = float(_multiplier(a["m"], a["shift"])) * sy
    sa = w.scale(a["a"])
    sb = w.scale(a["b"], product / sa)
    y = w.emit("Mul", [w.real(a["a"], sa, a["za"]), w.real(a["b"], sb, a["zb"])])
    return w.codes(y, sy, a["zy"], a["lo"], a["hi"])


def _rescaled(w: _Writer, node: Call, a: dict[str, Any], elements: int, emit: Callable[[str], str]) -> str:
    """An operator on real numbers between codes whose multiplier is `scale of x / scale of y / elements`."""
    sy = w.scale(node)
    sx = w.scale(a["x"], float(_multiplier(a["m"], a["shift"])) * sy * elements)
    return w.codes(emit(w.real(a["x"], sx, a["zx"])), sy, a["zy"], a["lo"], a["hi"])


@emits("edgec.qrescale.default")
def _qrescale(w: _Writer, node: Call) -> Any:
    return _rescaled(w, node, w.args(node), 1, lambda x: x)


@emits("edgec.qavg_pool2d.default")
def _qavg_pool(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    _nchw(w, node, a)
    top, bottom, left, right = a["padding"]
    form = {"kernel_shape": a["kernel"], "strides": a["stride"], "pads": [top, left, bottom, right]}
    count = math.prod(a["kernel"])
    return _rescaled(w, node, a, count, lambda x: w.emit("AveragePool", [x], count_include_pad=1, **form))


@emits("edgec.qmean.default")
def _qmean(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    shape = w.meta(a["x"]).shape
    dims = [d % len(shape) for d in a["dim"]]
    count, keep = math.prod(int(shape[d]) for d in dims), int(a["keepdim"])
    return _rescaled(w, node, a, count, lambda x: w.emit("ReduceMean", [x, w.ints(dims)], keepdims=keep))


@emits("edgec.qmax_pool2d.default")
def _qmax_pool(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    _nchw(w, node, a)
    top, bottom, left, right = a["padding"]
    return w.emit(
        "MaxPool",
        [w.x(a["x"])],
        kernel_shape=a["kernel"],
        strides=a["stride"],
        pads=[top, left, bottom, right],
        dilations=a["dilation"],
        ceil_mode=int(a["ceil_mode"]),
    )


@emits("edgec.qlut.default")
def _qlut(w: _Writer, node: Call) -> Any:
    x, table, axis = node.args
    values = w.array(table)
    index = w.emit("Add", [w.emit("Cast", [w.x(x)], to=TensorProto.INT32), w.const(np.int32(128))])
    if values.ndim == 2:
        shape = [-1 if i == axis % w.meta(x).dim() else 1 for i in range(w.meta(x).dim())]
        offset = (np.arange(len(values), dtype=np.int32) * values.shape[1]).reshape(shape)
        index = w.emit("Add", [index, w.const(offset)])
    return w.emit("Gather", [w.weight(table, values.reshape(-1)), index], axis=0)


@emits("edgec.dequantize_weight.default")
def _dequantize_weight(w: _Writer, node: Call) -> Any:
    """Codes of few bits: as 4-bit integers where they fit, with one scale per channel or per block."""
    a: dict[str, Any] = w.args(node)
    codes, scale, group = w.array(a["codes"]), w.array(a["scale"]), a["group"]
    zero = None if a["zero"] is None else w.array(a["zero"])
    if scale.shape[1] == 1:
        operands = [w.weight(a["codes"], codes), w.weight(a["scale"], scale[:, 0])]
        operands += [] if zero is None else [w.weight(a["zero"], zero[:, 0])]
        return w.emit("DequantizeLinear", operands, axis=0)
    if codes.ndim == 2 and codes.shape[1] % group == 0:
        operands = [w.weight(a["codes"], codes), w.weight(a["scale"], scale)]
        operands += [] if zero is None else [w.weight(a["zero"], zero)]
        return w.emit("DequantizeLinear", operands, axis=1, block_size=group)
    spread = np.arange(codes.shape[1]) // group
    shape = [*codes.shape[:2], *[1] * (codes.ndim - 2)]
    real = w.emit("Cast", [w.weight(a["codes"], codes)], to=TensorProto.FLOAT)
    if zero is not None:
        real = w.emit("Sub", [real, w.const(zero[:, spread].reshape(shape).astype(np.float32))])
    return w.emit("Mul", [real, w.const(scale[:, spread].reshape(shape))])
