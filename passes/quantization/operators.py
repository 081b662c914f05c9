"""Which ATen calls have an int8 form, and of which kind.

This is the table that int8 quantisation is built on: `classify` looks at one node alone; `edgec.passes.quantization.
annotate` decides from the whole graph which of the candidates become int8.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from edgec.program import constant_of, is_call, shape_of

aten = torch.ops.aten


class Kind(enum.Enum):
    """How an int8 node gets its codes from those of its operands."""

    LAYER = "layer"  # convolution or linear: weights, int32 accumulator, requantisation
    POOL = "pool"  # average over a window or over axes
    TABLE = "table"  # any function of one code
    PAIR = "pair"  # sum, difference or product of two tensors
    CONCAT = "concat"  # operands brought to one scale
    CLIP = "clip"  # limits on the codes; part of its producer where possible
    SHARE = "share"  # codes moved, repeated or dropped; scale and zero point stay
    SCALE = "scale"  # same codes, another scale


CONV2D = (aten.conv2d.default, aten.conv2d.padding)
LAYERS = (*CONV2D, aten.linear.default)

FUNCTIONS = (
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.elu.default,
    aten.selu.default,
    aten.celu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.abs.default,
    aten.neg.default,
    aten.rsub.Scalar,
    aten.pow.Tensor_Scalar,
)

# Functions that stay float behind a linear layer: their inputs have outliers, which one scale per tensor cannot serve,
# and the layer can apply them before it rounds.
FLOAT_BEHIND_LINEAR = (aten.gelu.default, aten.silu.default, aten.mish.default)
# Functions that are not made of straight lines.
CURVED = (
    *FLOAT_BEHIND_LINEAR,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.elu.default,
    aten.selu.default,
    aten.celu.default,
    aten.softplus.default,
)
# What `quantize-int8` does with functions, sums and results of layers; see `edgec.passes.quantization.annotate`.
NONLINEAR = ("auto", "integer", "float")

# Inputs outside these limits give the limit's value, within 1/1000 of the output range: their codes may saturate.
SATURATION: dict[Any, tuple[float, float]] = {
    aten.hardswish.default: (-3.0, math.inf),
    aten.hardsigmoid.default: (-3.0, 3.0),
    aten.sigmoid.default: (-7.0, 7.0),
    aten.silu.default: (-10.0, math.inf),
    aten.gelu.default: (-5.0, math.inf),
    aten.tanh.default: (-4.0, 4.0),
    aten.mish.default: (-10.0, math.inf),
    aten.elu.default: (-8.0, math.inf),
}

CLIPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default)

# Results of these calls are lists, read by `getitem`.
SPLITTERS = (aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)

# Calls that return their operand's elements unchanged in evaluation mode; int8 graphs leave them out.
IDENTITIES = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)

MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    operator.getitem,
)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by their schema names, defaults filled in."""
    target: Any = node.target
    found = {}
    for position, entry in enumerate(target._schema.arguments):
        if position < len(node.args):
            found[entry.name] = node.args[position]
        else:
            found[entry.name] = node.kwargs.get(entry.name, entry.default_value)
    return found


def pair(value: Any) -> tuple[int, int]:
    """An int or a list of one or two ints as two ints, as PyTorch reads kernel sizes and strides."""
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])


def operand(node: fx.Node) -> fx.Node:
    """The tensor that a one-operand call works on."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def op_name(node: fx.Node) -> str:
    """`conv2d` for `aten.conv2d.default`: the operator as users know it."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def is_float(node: Any) -> bool:
    """True for a node that produces one float32 tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def scalar_of(module: fx.GraphModule, value: Any) -> float | None:
    """A number given as such or as a stored tensor of one element, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = constant_of(module, value)
    return float(tensor.reshape(-1)[0]) if tensor is not None and tensor.numel() == 1 else None


def weight_readers(module: fx.GraphModule) -> dict[str, int]:
    """How many calls read each stored tensor, by path."""
    counts: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            counts[str(node.target)] = counts.get(str(node.target), 0) + len(node.users)
    return counts


def owns_weights(module: fx.GraphModule, layer: fx.Node, readers: Mapping[str, int]) -> bool:
    """True when weight and bias of a layer (or norm) are stored and nobody else reads them; see `weight_readers`."""
    given = arguments(layer)
    stored = [given[name] for name in ("weight", "bias") if given[name] is not None]
    return all(constant_of(module, n) is not None and readers[str(n.target)] == 1 for n in stored)


# -- classification ----------------------------------------------------------------------------------------------------


def classify(module: fx.GraphModule, node: fx.Node) -> tuple[Kind | None, str]:
    """(kind, "") when the call has an int8 form, else (None, the reason why not)."""
    if node.op != "call_function":
        return None, "is not a call"
    if is_call(node, *LAYERS):
        return _layer(module, node)
    if is_call(node, *CLIPS):
        limits = clip_limits(node)
        return (Kind.CLIP, "") if limits is not None else (None, "limits are computed")
    if is_call(node, *FUNCTIONS):
        return _function(module, node)
    if is_call(node, aten.batch_norm.default):
        return _batch_norm(module, node)
    if is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        return _arithmetic(module, node)
    if is_call(node, aten.cat.default):
        tensors = node.args[0]
        assert isinstance(tensors, (list, tuple))
        return (Kind.CONCAT, "") if all(is_float(t) for t in tensors) else (None, "operands are not all float32")
    if is_call(node, aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default):
        return _average(node)
    if is_call(node, *SPLITTERS):
        return Kind.SHARE, ""
    if is_call(node, operator.getitem) and not is_call(node.args[0], *SPLITTERS):
        return None, "has no int8 form"
    if is_call(node, aten.dropout.default, aten.feature_dropout.default) and node.args[2]:
        return None, "is in training mode"
    if is_call(node, *IDENTITIES, *MOVES, aten.max_pool2d.default):
        return (Kind.SHARE, "") if is_float(node) else (None, "does not work on float32")
    if is_call(node, aten.pad.default):
        return _pad(node)
    if is_call(node, aten.upsample_nearest2d.vec):
        return (Kind.SHARE, "") if upsample_factors(node) else (None, "factor is not a whole number")
    return None, "has no int8 form"


def _layer(module: fx.GraphModule, node: fx.Node) -> tuple[Kind | None, str]:
    given = arguments(node)
    weight, bias = constant_of(module, given["weight"]), given["bias"]
    if weight is None:
        return None, "weights are computed, not stored"
    if bias is not None and constant_of(module, bias) is None:
        return None, "bias is computed, not stored"
    if not is_float(given["input"]) or weight.dtype != torch.float32:
        return None, "is not float32"
    rank = len(shape_of(given["input"]))
    if is_call(node, *CONV2D) and rank != 4:
        return None, f"input has {rank} axes instead of 4"
    if is_call(node, aten.linear.default) and rank < 2:
        return None, "input has no batch"
    if weight.numel() == 0:
        return None, "has no weights"
    return Kind.LAYER, ""


def conv_geometry(node: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """(stride, padding as [top, bottom, left, right], dilation, groups) of a conv2d call."""
    given = arguments(node)
    stride, dilation, groups = pair(given["stride"]), pair(given["dilation"]), int(given["groups"])
    padding = given["padding"]
    if padding == "same":
        kernel = shape_of(given["weight"])[2:]
        total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        # PyTorch puts the odd element at the end.
        sides = [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
        return list(stride), sides, list(dilation), groups
    top, left = (0, 0) if padding == "valid" else pair(padding)
    return list(stride), [top, top, left, left], list(dilation), groups


def clip_limits(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of a clip, infinities included, or None when they are tensors."""
    if is_call(node, aten.relu.default):
        return 0.0, math.inf
    if is_call(node, aten.relu6.default):
        return 0.0, 6.0
    given = arguments(node)
    low, high = (given["min_val"], given["max_val"]) if "min_val" in given else (given["min"], given["max"])
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _function(module: fx.GraphModule, node: fx.Node) -> tuple[Kind | None, str]:
    if not is_float(operand(node)):
        return None, "is not float32"
    if is_call(node, aten.prelu.default) and constant_of(module, node.args[1]) is None:
        return None, "slopes are computed, not stored"
    return Kind.TABLE, ""


def has_channel_tables(node: fx.Node) -> bool:
    """True when the function of one code differs along axis 1."""
    if is_call(node, aten.prelu.default):
        slopes = node.args[1]
        return isinstance(slopes, fx.Node) and slopes.meta["val"].numel() > 1
    return is_call(node, aten.batch_norm.default)


def _batch_norm(module: fx.GraphModule, node: fx.Node) -> tuple[Kind | None, str]:
    given = arguments(node)
    if given["training"]:
        return None, "is in training mode"
    if is_call(given["input"], *CONV2D):
        return None, "follows a convolution: run fold-bn first"
    stored = ("weight", "bias", "running_mean", "running_var")
    if any(given[k] is not None and constant_of(module, given[k]) is None for k in stored):
        return None, "statistics are computed, not stored"
    return Kind.TABLE, ""


def _arithmetic(module: fx.GraphModule, node: fx.Node) -> tuple[Kind | None, str]:
    a, b = node.args[0], node.args[1]
    if not is_float(node):
        return None, "is not float32"
    number = scalar_of(module, b)
    if number is not None and is_float(a):
        scales = is_call(node, aten.mul.Tensor, aten.div.Tensor)
        return (Kind.SCALE if scales and 0 < number < math.inf else Kind.TABLE), ""
    if scalar_of(module, a) is not None and is_float(b):
        return Kind.TABLE, ""
    if is_call(node, aten.div.Tensor):
        return None, "divides tensors"
    if not (is_float(a) and is_float(b)):
        return None, "operands are not both float32"
    return Kind.PAIR, ""


def _average(node: fx.Node) -> tuple[Kind | None, str]:
    if not is_float(node):
        return None, "is not float32"
    source = shape_of(operand(node))
    given = arguments(node)
    if is_call(node, aten.mean.dim):
        dims = [d % len(source) for d in given["dim"] or range(len(source))]
        return (None, "averages over the batch") if 0 in dims else (Kind.POOL, "")
    if len(source) != 4:
        return None, f"input has {len(source)} axes instead of 4"
    if is_call(node, aten.adaptive_avg_pool2d.default):
        out = shape_of(node)[2:]
        divides = all(source[2 + i] % out[i] == 0 for i in range(2))
        return (Kind.POOL, "") if divides else (None, "windows have different sizes")
    if given["ceil_mode"]:
        return None, "uses ceil_mode"
    if any(pair(given["padding"])) and not given["count_include_pad"] and given["divisor_override"] is None:
        return None, "leaves padding out of the average"
    return Kind.POOL, ""


def _pad(node: fx.Node) -> tuple[Kind | None, str]:
    given = arguments(node)
    if given["mode"] != "constant":
        return None, f"pads by {given['mode']}"
    if given["value"] not in (None, 0, 0.0):
        return None, "pads with a value other than zero"
    return (Kind.SHARE, "") if is_float(node) else (None, "is not float32")


def spatial_padding(node: Any) -> list[int] | None:
    """[top, bottom, left, right] of a zero pad of the last two of four axes, none of them negative, else None."""
    if not is_call(node, aten.pad.default) or _pad(node)[0] is None or len(shape_of(node)) != 4:
        return None
    amounts = [int(p) for p in node.args[1]] + [0] * 8
    left, right, top, bottom = amounts[:4]
    return [top, bottom, left, right] if not any(amounts[4:]) and min(amounts) >= 0 else None


def upsample_factors(node: fx.Node) -> tuple[int, int] | None:
    """(vertical, horizontal) factor of a nearest-neighbour upsampling by whole numbers, else None."""
    before, after = shape_of(operand(node)), shape_of(node)
    if len(before) != 4 or any(after[i] % before[i] for i in (2, 3)):
        return None
    return after[2] // before[2], after[3] // before[3]


# -- in-place calls ----------------------------------------------------------------------------------------------------

IN_PLACE = {
    aten.relu_.default: aten.relu.default,
    aten.relu6_.default: aten.relu6.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.clamp_.default: aten.clamp.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.silu_.default: aten.silu.default,
    aten.tanh_.default: aten.tanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.selu_.default: aten.selu.default,
    aten.mish_.default: aten.mish.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.dropout_.default: aten.dropout.default,
}


def make_functional(module: fx.GraphModule) -> None:
    """Replace in-place calls whose effect only their own result shows by calls that return a new tensor, in place.

    The others stay as they are: someone may read the change through their operand or a view of it.
    """
    views = (*MOVES, *IDENTITIES)
    for node in module.graph.nodes:
        if is_call(node, *IN_PLACE) and node.users:
            changed = operand(node)
            if changed.op == "call_function" and len(changed.users) == 1 and not is_call(changed, *views):
                node.target = IN_PLACE[node.target]


def changes_in_place(node: fx.Node, tensor: fx.Node) -> bool:
    """True when the call `node` writes into its argument `tensor`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    entries = node.target._schema.arguments
    return any(
        entry.alias_info is not None and entry.alias_info.is_write and value is tensor
        for entry, value in zip(entries, node.args, strict=False)
    )
