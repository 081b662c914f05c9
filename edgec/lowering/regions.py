"""Fuse convolutions, pools and linear layers with what follows them into one region each.

A region is one kernel call: bias, residual addition and activation happen while the result is still in registers.
Spatial regions work on NHWC tensors; each one is put between two permutations, which the layout step then cancels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from edgec import regions as region_ops  # noqa: F401  (registers the operators)
from edgec.as_conv2d import as_conv2d
from edgec.lowering.attention import fuse_attention, fuse_products
from edgec.lowering.graph import argument, is_tensor, only_user
from edgec.lowering.norms import fuse_norms
from edgec.lowering.tokens import fuse_tokens
from edgec.program import dtype_of, is_call, layer_of, origin_of, shape_of

aten = torch.ops.aten
edgec = torch.ops.edgec

TO_NHWC = [0, 2, 3, 1]
TO_NCHW = [0, 3, 1, 2]
PADS = (aten.pad.default, aten.constant_pad_nd.default)
SMOOTH = {
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.mish.default: "mish",
    aten.tanh.default: "tanh",
}
MOVES = (
    aten.permute.default,
    aten.transpose.int,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
)
CONV2D = (aten.conv2d.default, aten.conv2d.padding)


def pair(value: Any) -> list[int]:
    """An int or a list of one or two ints as two ints, as PyTorch reads kernel sizes and strides."""
    if isinstance(value, int):
        return [value, value]
    return [int(value[0]), int(value[-1])]


def conv_geometry(node: Any) -> tuple[list[int], list[int], list[int], int]:
    """(stride, padding as [top, bottom, left, right], dilation, groups) of an `aten.conv2d` call."""
    stride = pair(argument(node, 3, "stride", 1))
    padding = argument(node, 4, "padding", 0)
    dilation = pair(argument(node, 5, "dilation", 1))
    groups = int(argument(node, 6, "groups", 1))
    if padding == "valid":
        padding = 0
    if padding == "same":
        kernel = shape_of(node.args[1])[2:]
        total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        # PyTorch puts the odd element of 'same' padding at the end.
        top, left = total[0] // 2, total[1] // 2
        return stride, [top, total[0] - top, left, total[1] - left], dilation, groups
    top, left = pair(padding)
    return stride, [top, top, left, left], dilation, groups


def activation_of(node: Any) -> tuple[str, float, float] | None:
    """(act, lo, hi) when the node is an activation that kernels apply in their epilogue."""
    if is_call(node, aten.relu.default):
        return "clip", 0.0, math.inf
    if is_call(node, aten.relu6.default):
        return "clip", 0.0, 6.0
    if is_call(node, aten.hardtanh.default):
        return "clip", float(argument(node, 1, "min_val", -1.0)), float(argument(node, 2, "max_val", 1.0))
    if is_call(node, aten.clamp.default):
        lo, hi = argument(node, 1, "min", None), argument(node, 2, "max", None)
        if isinstance(lo, fx.Node) or isinstance(hi, fx.Node):
            return None
        return "clip", -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi)
    if is_call(node, aten.gelu.default):
        exact = argument(node, 1, "approximate", "none") == "none"
        return ("gelu" if exact else "gelu_tanh", 0.0, 0.0)
    if is_call(node, aten.leaky_relu.default):
        return "leaky_relu", float(argument(node, 1, "negative_slope", 0.01)), 0.0
    name = SMOOTH.get(node.target)
    return (name, 0.0, 0.0) if name is not None else None


def fuse_regions(module: fx.GraphModule) -> fx.GraphModule:
    """Replace convolutions, linear, pools and their quantised forms by region operators, in place; returns `module`.

    Programs have no in-place operators (see `edgec.frontend`).
    """
    graph = module.graph
    as_conv2d(module)
    _sink_quantize(graph)
    for node in list(graph.nodes):
        if is_call(node, aten.view.default, aten._unsafe_view.default):
            # A view refuses a tensor in another memory order, which its operand is about to have.
            node.target = aten.reshape.default
        elif is_call(node, *CONV2D) and _packable(node):
            x, geometry = absorb_padding(node.args[0], conv_geometry(node))
            w, bias = node.args[1], argument(node, 2, "bias", None)
            last, residual, act = _follow(node)
            with graph.inserting_before(last):
                around = None if residual is None else nhwc(graph, residual)
                args = (nhwc(graph, x), w, bias, around, *geometry, *act)
                _replace(graph, edgec.conv2d_nhwc.default, args, node, last, residual=3)
        elif is_call(node, edgec.qconv2d.default) and argument(node, 13, "layout", "NCHW") == "NCHW":
            _fuse_qconv(graph, node)
        elif is_call(node, edgec.qconv2d_float.default) and argument(node, 9, "layout", "NCHW") == "NCHW":
            with graph.inserting_before(node):
                args = (nhwc(graph, node.args[0]), *node.args[1:9], "NHWC")
                _replace(graph, node.target, args, node, node)
        elif is_call(node, edgec.qlinear_float.default):
            _fuse_qlinear(graph, node)
        elif is_call(node, edgec.qavg_pool2d.default) and argument(node, 10, "layout", "NCHW") == "NCHW":
            with graph.inserting_before(node):
                args = (nhwc(graph, node.args[0]), *node.args[1:10], "NHWC")
                _replace(graph, node.target, args, node, node)
        elif is_call(node, edgec.qmax_pool2d.default) and argument(node, 6, "layout", "NCHW") == "NCHW":
            kernel, stride, padding, dilation = node.args[1:5]
            padding = ceil_padding(node, kernel, stride, padding, dilation)
            with graph.inserting_before(node):
                args = (nhwc(graph, node.args[0]), kernel, stride, padding, dilation, False, "NHWC")
                _replace(graph, node.target, args, node, node)
        elif is_call(node, aten.max_pool2d.default) and _is_map(node):
            kernel = pair(node.args[1])
            stride = pair(argument(node, 2, "stride", None) or kernel)
            top, left = pair(argument(node, 3, "padding", 0))
            dilation = pair(argument(node, 4, "dilation", 1))
            padding = ceil_padding(node, kernel, stride, [top, top, left, left], dilation)
            with graph.inserting_before(node):
                args = (nhwc(graph, node.args[0]), kernel, stride, padding, dilation)
                _replace(graph, edgec.max_pool2d_nhwc.default, args, node, node)
        elif is_call(node, aten.avg_pool2d.default) and _is_map(node) and _plain_average(node):
            kernel = pair(node.args[1])
            stride = pair(argument(node, 2, "stride", None) or kernel)
            top, left = pair(argument(node, 3, "padding", 0))
            with graph.inserting_before(node):
                args = (nhwc(graph, node.args[0]), kernel, stride, [top, top, left, left])
                _replace(graph, edgec.avg_pool2d_nhwc.default, args, node, node)
        elif is_call(node, aten.group_norm.default, aten.instance_norm.default):
            _fuse_group_norm(graph, node)
    # Behind the convolutions, whose results they read channels last; before the linear layers, which they move.
    fuse_attention(module)
    fuse_tokens(module)
    fuse_products(module)
    fuse_norms(module)
    for node in list(graph.nodes):
        if is_call(node, aten.linear.default) and _packable(node):
            x, w, bias = node.args[0], node.args[1], argument(node, 2, "bias", None)
            last, residual, act = _follow(node)
            with graph.inserting_before(last):
                new = graph.call_function(edgec.linear_act.default, (x, w, bias, residual, *act))
            new.meta.update(val=last.meta["val"], edgec_layer=layer_of(node), edgec_origin=origin_of(last))
            last.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _sink_quantize(graph: fx.Graph) -> None:
    """Round behind operations that only move data, where the kernel in front of them can take both up."""
    for node in list(graph.nodes):
        reader = only_user(node)
        while is_call(node, edgec.quantize.default) and reader is not None and is_call(reader, *MOVES):
            x: Any
            x, scale, zero_point = node.args
            reader.replace_input_with(node, x)
            codes, reader.meta["val"] = reader.meta["val"], reader.meta["val"].to(torch.float32)
            with graph.inserting_after(reader):
                moved = graph.call_function(edgec.quantize.default, (reader, scale, zero_point))
            reader.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
            moved.meta.update(reader.meta, val=codes)
            # Its value is now that of the tensor before rounding, which the Program does not have in this form.
            reader.meta["edgec_origin"] = f"{origin_of(reader)}, real"
            node, reader = moved, only_user(moved)
    graph.eliminate_dead_code()


def _fuse_group_norm(graph: fx.Graph, node: Any) -> None:
    """Group norm, and instance norm with a group per channel, on maps or on [1, C, ...], with its activation."""
    if is_call(node, aten.group_norm.default):
        x, groups = node.args[:2]
        weight, bias = (argument(node, i, name, None) for i, name in ((2, "weight"), (3, "bias")))
        eps = float(argument(node, 4, "eps", 1e-5))
    else:
        x, weight, bias, _, _, measured, _, eps = node.args[:8]
        groups = shape_of(x)[1]
        if not measured:
            return
    stored = all(w is None or w.op == "get_attr" for w in (weight, bias))
    if not stored or not is_tensor(x) or len(shape_of(x)) < 3 or 0 in shape_of(x):
        return
    follower = only_user(node)
    act = None if follower is None else activation_of(follower)
    last: Any = node if act is None else follower
    rest = (weight, bias, int(groups), eps, *(act or ("none", 0.0, 0.0)))
    with graph.inserting_before(last):
        if _is_map(node):
            _replace(graph, edgec.group_norm.default, (nhwc(graph, x), *rest, "NHWC"), node, last)
        elif shape_of(x)[0] == 1:
            new = graph.call_function(edgec.group_norm.default, (x, *rest, "NCHW"))
            new.meta.update(val=last.meta["val"], edgec_layer=layer_of(node), edgec_origin=origin_of(last))
            last.replace_all_uses_with(new)


def _packable(node: Any) -> bool:
    """True when weight and bias are stored, so that they can be packed now, and a convolution's input has a batch."""
    weight = node.args[1]
    if is_call(weight, edgec.dequantize_weight.default):
        weight = weight.args[0]
    given = (weight, argument(node, 2, "bias", None))
    stored = all(value is None or value.op == "get_attr" for value in given)
    return stored and (is_call(node, aten.linear.default) or _is_map(node))


def _is_map(node: fx.Node) -> bool:
    """True for [N, C, H, W]; PyTorch takes maps without a batch as well."""
    return len(shape_of(node)) == 4


def pad_value(node: Any) -> float | int | None:
    """The constant that an `aten.pad` call fills in; None for other modes and computed widths."""
    if not all(isinstance(width, int) for width in node.args[1]):
        return None
    if node.target is aten.constant_pad_nd.default:
        return argument(node, 2, "value", 0)
    if argument(node, 2, "mode", "constant") != "constant":
        return None
    return argument(node, 3, "value", None) or 0


def ceil_padding(node: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Padding of a max pool with which every window of the result fits: more at the end when `ceil_mode` rounded up."""
    merged = list(padding)
    for axis in range(2):
        size, out = shape_of(node.args[0])[2 + axis], shape_of(node)[2 + axis]  # type: ignore[arg-type]
        reach = (out - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        merged[2 * axis + 1] = max(merged[2 * axis + 1], reach - size - merged[2 * axis])
    return merged


def absorb_padding(x: Any, geometry: tuple[list[int], list[int], list[int], int]) -> tuple[Any, Any]:
    """Merge a zero padding of height and width in front of a convolution into the convolution's own."""
    stride, padding, dilation, groups = geometry
    if not is_call(x, *PADS) or pad_value(x) != 0 or len(shape_of(x)) != 4:
        return x, geometry
    left, right, top, bottom, *rest = [*x.args[1], 0, 0, 0, 0][: max(4, len(x.args[1]))]
    if any(rest) or min(left, right, top, bottom) < 0:
        return x, geometry
    merged = [a + b for a, b in zip(padding, (top, bottom, left, right), strict=True)]
    return x.args[0], (stride, merged, dilation, groups)


def nhwc(graph: fx.Graph, node: Any) -> fx.Node:
    """NHWC form of an NCHW value; cancels an NHWC-to-NCHW permutation."""
    if is_call(node, aten.permute.default) and list(node.args[1]) == TO_NCHW:
        return node.args[0]
    return _permute(graph, node, TO_NHWC)


def nchw(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """NCHW form of an NHWC value."""
    return _permute(graph, node, TO_NCHW)


def _permute(graph: fx.Graph, node: fx.Node, order: list[int]) -> fx.Node:
    same: tuple[Any, ...] = (node, order)
    for user in node.users:
        if is_call(user, aten.permute.default) and user.args == same and user.meta.get("edgec_layout"):
            return user
    # Directly behind its operand, so that every later user may share it.
    with graph.inserting_after(node):
        new = graph.call_function(aten.permute.default, (node, order))
    new.meta.update(
        val=node.meta["val"].permute(order),
        edgec_layer=layer_of(node),
        edgec_origin=f"{origin_of(node)}, permuted",
        edgec_layout=True,
    )
    return new


def _replace(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], first: fx.Node, last: fx.Node, residual: int = 0
) -> None:
    """Emit an NHWC call in the place of the NCHW nodes `first` .. `last`; `residual` is the place of that operand.

    Kernels take one sample: a larger batch, which a static model or a reshape makes, is computed one by one.
    """
    value = last.meta["val"].permute(TO_NHWC)

    def call(operator: Any, arguments: tuple[Any, ...], result: Any) -> fx.Node:
        new = graph.call_function(operator, arguments)
        new.meta.update(val=result, edgec_layer=layer_of(first), edgec_origin=origin_of(last))
        return new

    if value.shape[0] == 1:
        new = call(target, args, value)
    else:
        parts = []
        for i in range(value.shape[0]):
            one = list(args)
            for place in sorted({0, residual}):
                if args[place] is not None:
                    sample = args[place].meta["val"][i : i + 1]
                    one[place] = call(aten.slice.Tensor, (args[place], 0, i, i + 1), sample)
            parts.append(call(target, tuple(one), value[i : i + 1]))
        new = call(aten.cat.default, (parts, 0), value)
    last.replace_all_uses_with(nchw(graph, new))


def _plain_average(node: fx.Node) -> bool:
    """True when every window is divided by its full size, which is what the kernel does."""
    padded = any(pair(argument(node, 3, "padding", 0)))
    return (
        not argument(node, 4, "ceil_mode", False)
        and argument(node, 6, "divisor_override", None) is None
        and (argument(node, 5, "count_include_pad", True) or not padded)
    )


def _fuse_qconv(graph: fx.Graph, node: Any) -> None:
    """`qconv2d`, with the `qadd` that is its only user when the other operand has the same shape."""
    x, *rest = node.args[:13]
    add = only_user(node)
    if add is not None and is_call(add, edgec.qadd.default):
        a, b, ma, mb, f, za, zb, zy, lo, hi = add.args
        other = b if a is node else a
        if a is not b and isinstance(other, fx.Node) and shape_of(other) == shape_of(node):
            if b is node:
                ma, mb, za, zb = mb, ma, zb, za
            with graph.inserting_before(add):
                weights, geometry = rest[:4], rest[4:]
                args = (nhwc(graph, x), *weights, nhwc(graph, other), *geometry, [ma, mb, f, za, zb, zy, lo, hi])
                _replace(graph, edgec.qconv2d_add.default, args, node, add, residual=5)
            return
    with graph.inserting_before(node):
        _replace(graph, node.target, (nhwc(graph, x), *rest, "NHWC"), node, node)


def _fuse_qlinear(graph: fx.Graph, node: Any) -> None:
    """`qlinear_float` with the float operations on its result, and with the rounding for the layer behind them."""
    last, residual, act = _follow(node)
    follower = only_user(last)
    y_scale: Any = None
    y_zp: Any = 0
    if follower is not None and is_call(follower, edgec.quantize.default):
        last, (_, y_scale, y_zp) = follower, follower.args
    with graph.inserting_before(last):
        new = graph.call_function(edgec.qlinear_act.default, (*node.args, residual, *act, y_scale, y_zp))
    new.meta.update(val=last.meta["val"], edgec_layer=layer_of(node), edgec_origin=origin_of(last))
    last.replace_all_uses_with(new)


def _follow(node: Any) -> tuple[fx.Node, fx.Node | None, tuple[str, float, float]]:
    """The last node of the region that starts at `node`, its residual operand and its activation."""
    last: fx.Node = node
    residual: fx.Node | None = None
    follower = only_user(last)
    if follower is not None and is_call(follower, aten.add.Tensor):
        a, b = follower.args[0], follower.args[1]
        other = b if a is last else a
        if (
            isinstance(other, fx.Node)
            and other is not last
            and "val" in other.meta
            and follower.kwargs.get("alpha", 1) == 1
            and shape_of(other) == shape_of(last)
            and dtype_of(other) == dtype_of(last)
            and other.op != "get_attr"
        ):
            last, residual = follower, other
            follower = only_user(last)
    act = activation_of(follower) if follower is not None else None
    if act is not None and follower is not None:
        return follower, residual, act
    return last, residual, ("none", 0.0, 0.0)
