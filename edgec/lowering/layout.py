"""Channels-last layout: push the permutations that `fuse_regions` left downwards until they cancel.

A value is *held* channels last when its node is the permutation of an NHWC value to NCHW. An operator whose spatial
inputs are held that way, and that has a rule here, is rebuilt on the NHWC values and followed by such a permutation;
any other operator simply keeps the permuted input. Nothing depends on the order of rules, and a graph without
convolutions passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from edgec.lowering.regions import PADS, TO_NCHW, TO_NHWC, argument, nchw, nhwc, pad_value
from edgec.program import constant_of, get_weight, is_call, layer_of, origin_of, shape_of, weight_node

aten = torch.ops.aten
edgec = torch.ops.edgec

# NCHW axis -> NHWC axis
AXIS = {0: 0, 1: 3, 2: 1, 3: 2}

UNARY = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.exp.default,
    aten.neg.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.mish.default,
    aten.softplus.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten._to_copy.default,
    edgec.quantize.default,
    edgec.dequantize.default,
    edgec.qrescale.default,
)
BINARY = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    edgec.qadd.default,
    edgec.qmul.default,
)
CONSTANT_VIEWS = (aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.squeeze.dims)
INTERLEAVE = [0, 3, 4, 1, 5, 2]
RESHAPES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.squeeze.dims)


def channels_last(module: fx.GraphModule) -> fx.GraphModule:
    """Apply the rules to every node in graph order, in place; returns `module`."""
    graph = module.graph
    for node in list(graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        with graph.inserting_before(node):
            new = rule(module, node)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if is_call(node, edgec.qmean.default):
            _first_axes(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _first_axes(graph: fx.Graph, node: fx.Node) -> None:
    """Move the axes of an integer mean to the front, where its kernel wants them, unless only ones are before them."""
    x, dims, _, *rest = node.args
    shape = shape_of(x)  # type: ignore[arg-type]
    axes = sorted(int(d) % len(shape) for d in dims)  # type: ignore[union-attr]
    if axes == list(range(axes[0], axes[-1] + 1)) and all(n == 1 for n in shape[: axes[0]]):
        return
    order = [*axes, *(i for i in range(len(shape)) if i not in axes)]
    with graph.inserting_before(node):
        moved = graph.call_function(aten.permute.default, (x, order))
        mean = graph.call_function(node.target, (moved, list(range(len(axes))), False, *rest))  # type: ignore[arg-type]
        new = graph.call_function(aten.reshape.default, (mean, list(shape_of(node))))
    value = x.meta["val"].permute(order)  # type: ignore[union-attr]
    for made, result in ((moved, value), (mean, value.sum(list(range(len(axes))))), (new, node.meta["val"])):
        made.meta.update(val=result, edgec_layer=layer_of(node))
    node.replace_all_uses_with(new)


def held(node: Any) -> bool:
    """True when `node` is the NCHW view of a value that exists in NHWC."""
    return is_call(node, aten.permute.default) and list(node.args[1]) == TO_NCHW and len(shape_of(node)) == 4


def _emit(
    module: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict | None = None
) -> fx.Node:
    """Call on NHWC values whose NCHW view takes the place of `node`."""
    new = module.graph.call_function(target, args, kwargs or {})
    new.meta.update(val=node.meta["val"].permute(TO_NHWC), edgec_layer=layer_of(node), edgec_origin=origin_of(node))
    return nchw(module.graph, new)


def _unary(module: fx.GraphModule, node: Any) -> fx.Node | None:
    if not held(node.args[0]):
        return None
    return _emit(module, node, node.target, (nhwc(module.graph, node.args[0]), *node.args[1:]), dict(node.kwargs))


def _binary(module: fx.GraphModule, node: Any) -> fx.Node | None:
    operands = node.args[:2]
    if not any(held(a) for a in operands) or len(shape_of(node)) != 4:
        return None
    converted = []
    for operand in operands:
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            converted.append(operand)
            continue
        rank = len(shape_of(operand))
        constant = _constant(module, operand)
        if rank == 4 and constant is None:
            converted.append(nhwc(module.graph, operand))
        elif constant is not None:
            path, tensor = constant
            full = tensor.reshape((1,) * (4 - rank) + tuple(tensor.shape)).permute(TO_NHWC).contiguous()
            converted.append(weight_node(module, f"{path}_nhwc", full))
        elif rank == 0:
            converted.append(operand)
        else:
            return None
    return _emit(module, node, node.target, (*converted, *node.args[2:]), dict(node.kwargs))


def _constant(module: fx.GraphModule, node: Any) -> tuple[str, torch.Tensor] | None:
    """(path, value) of a weight, also seen through reshapes; None for what is computed."""
    value = constant_of(module, node)
    if value is not None:
        return str(node.target), value
    if not is_call(node, *CONSTANT_VIEWS):
        return None
    inner = _constant(module, node.args[0])
    return None if inner is None else (inner[0], inner[1].reshape(shape_of(node)))


def _qlut(module: fx.GraphModule, node: Any) -> fx.Node | None:
    x, table, axis = node.args
    if not held(x):
        return None
    return _emit(module, node, node.target, (nhwc(module.graph, x), table, AXIS[int(axis) % 4]))


def _batch_norm(module: fx.GraphModule, node: Any) -> fx.Node | None:
    """Inference batch norm as one multiplication and one addition per channel."""
    if not held(node.args[0]) or node.args[5]:
        return None
    gamma, beta = (None if a is None else get_weight(module, a).double() for a in node.args[1:3])
    mean, var = (get_weight(module, a).double() for a in node.args[3:5])
    scale = torch.rsqrt(var + float(node.args[7])) * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale
    name = str(node.args[3].target).rpartition(".")[0] or node.name
    x = nhwc(module.graph, node.args[0])
    product = module.graph.call_function(aten.mul.Tensor, (x, weight_node(module, f"{name}.scale_nhwc", scale.float())))
    product.meta.update(val=x.meta["val"], edgec_layer=layer_of(node))
    return _emit(module, node, aten.add.Tensor, (product, weight_node(module, f"{name}.shift_nhwc", shift.float())))


def _prelu(module: fx.GraphModule, node: Any) -> fx.Node | None:
    """relu(x) - slope * relu(-x), with the slope along the last axis."""
    x, slope = node.args
    weight = constant_of(module, slope)
    if not held(x) or weight is None:
        return None
    graph, x = module.graph, nhwc(module.graph, x)

    def call(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        new.meta.update(val=x.meta["val"], edgec_layer=layer_of(node))
        return new

    positive = call(aten.relu.default, x)
    negative = call(aten.relu.default, call(aten.neg.default, x))
    return _emit(module, node, aten.sub.Tensor, (positive, call(aten.mul.Tensor, negative, slope)))


def _cat(module: fx.GraphModule, node: Any) -> fx.Node | None:
    tensors = list(node.args[0])
    if len(shape_of(node)) != 4 or not any(held(t) for t in tensors):
        return None
    axis = AXIS[int(argument(node, 1, "dim", 0)) % 4]
    return _emit(module, node, node.target, ([nhwc(module.graph, t) for t in tensors], axis))


def _pad(module: fx.GraphModule, node: Any) -> fx.Node | None:
    x, widths = node.args[0], list(node.args[1])
    value = pad_value(node)
    if not held(x) or value is None:
        return None
    widths += [0] * (8 - len(widths))
    by_axis = {AXIS[3 - i]: widths[2 * i : 2 * i + 2] for i in range(4)}
    flat = [w for axis in (3, 2, 1, 0) for w in by_axis[axis]]
    while flat and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return _emit(module, node, aten.constant_pad_nd.default, (nhwc(module.graph, x), flat, value))


def _slice(module: fx.GraphModule, node: Any) -> fx.Node | None:
    x = node.args[0]
    if not held(x):
        return None
    axis = AXIS[int(argument(node, 1, "dim", 0)) % 4]
    return _emit(module, node, node.target, (nhwc(module.graph, x), axis, *node.args[2:]))


def _mean(module: fx.GraphModule, node: Any) -> fx.Node | None:
    """`mean.dim` and `qmean`; without keepdim only the spatial mean has the same result in both layouts."""
    x, dims = node.args[0], argument(node, 1, "dim", None)
    if not held(x) or dims is None:
        return None
    axes = sorted(AXIS[int(d) % 4] for d in dims)
    keep = bool(argument(node, 2, "keepdim", False))
    rest = node.args[3:]
    if keep:
        return _emit(module, node, node.target, (nhwc(module.graph, x), axes, True, *rest), dict(node.kwargs))
    if axes != [1, 2]:
        return None
    new = module.graph.call_function(node.target, (nhwc(module.graph, x), axes, False, *rest), dict(node.kwargs))
    new.meta.update(val=node.meta["val"], edgec_layer=layer_of(node), edgec_origin=origin_of(node))
    return new


def _adaptive_average(module: fx.GraphModule, node: Any) -> fx.Node | None:
    x = node.args[0]
    size = node.args[1]
    if not held(x) or tuple(size) != (1, 1):  # type: ignore[arg-type]
        return None
    return _emit(module, node, aten.mean.dim, (nhwc(module.graph, x), [1, 2], True))


def _permute(module: fx.GraphModule, node: Any) -> fx.Node | None:
    """An NCHW-to-NHWC permutation of a held value, ours or the model's own, is that value."""
    x, order = node.args
    if not held(x) or [int(d) % 4 for d in order] != TO_NHWC:
        return None
    return nhwc(module.graph, x)


def _reshape(module: fx.GraphModule, node: Any) -> fx.Node | None:
    """A 1x1 map has the same memory order in both layouts; flatten(2).transpose(1, 2) is a reshape of NHWC."""
    x = node.args[0]
    if is_call(x, aten.permute.default) and list(x.args[1]) == INTERLEAVE:  # type: ignore[arg-type]
        return _interleave(module, node, x)
    if is_call(x, aten.expand.default):
        return _repeat(module, node, x)
    if not held(x):
        return None
    n, c, h, w = shape_of(x)
    graph = module.graph
    if h == w == 1:
        new = graph.call_function(aten.reshape.default, (nhwc(graph, x), list(shape_of(node))))
        new.meta.update(val=node.meta["val"], edgec_layer=layer_of(node), edgec_origin=origin_of(node))
        return new
    if shape_of(node) == (n, c, h * w):
        users = list(node.users)
        if users and all(is_call(u, aten.transpose.int) and {int(a) % 3 for a in u.args[1:]} == {1, 2} for u in users):
            new = graph.call_function(aten.reshape.default, (nhwc(graph, x), [n, h * w, c]))
            new.meta.update(val=node.meta["val"].transpose(1, 2), edgec_layer=layer_of(node))
            back = graph.call_function(aten.transpose.int, (new, 1, 2))
            back.meta.update(val=node.meta["val"], edgec_layer=layer_of(node))
            return back
    return None


def _interleave(module: fx.GraphModule, node: Any, moved: Any) -> fx.Node | None:
    """[N, a, b, C, H, W] to [N, C, H, a, W, b] to a map: phases of a transposed convolution, put next to each other.

    In NHWC the same is a move of whole runs of b * C elements, and none at all when a is 1.
    """
    split = moved.args[0]
    if not is_call(split, aten.reshape.default) or not held(split.args[0]) or len(shape_of(split)) != 6:
        return None
    n, a, b, c, h, w = shape_of(split)
    if shape_of(split.args[0]) != (n, a * b * c, h, w) or shape_of(node) != (n, c, h * a, w * b):
        return None
    graph = module.graph
    x = nhwc(graph, split.args[0])
    if a > 1:
        order = [0, 1, 3, 2, 4]
        value = x.meta["val"].reshape(n, h, w, a, b * c)
        x = graph.call_function(aten.reshape.default, (x, list(value.shape)))
        x.meta.update(val=value, edgec_layer=layer_of(node))
        x = graph.call_function(aten.permute.default, (x, order))
        x.meta.update(val=value.permute(order), edgec_layer=layer_of(node))
    return _emit(module, node, aten.reshape.default, (x, [n, h * a, w * b, c]))


def _repeat(module: fx.GraphModule, node: Any, repeated: Any) -> fx.Node | None:
    """[N, C, H, 1, W, 1] to [N, C, H, a, W, b] to a map: upsampling that repeats rows and columns."""
    wide = repeated.args[0]
    if not is_call(wide, aten.unsqueeze.default) or not is_call(wide.args[0], aten.unsqueeze.default):
        return None
    tall = wide.args[0]
    if not held(tall.args[0]) or shape_of(wide) != (*shape_of(tall.args[0])[:3], 1, shape_of(tall.args[0])[3], 1):
        return None
    n, c, h, a, w, b = shape_of(repeated)
    if shape_of(node) != (n, c, h * a, w * b):
        return None
    graph = module.graph
    x = nhwc(graph, tall.args[0])
    for target, size in ((aten.reshape.default, [n, h, 1, w, 1, c]), (aten.expand.default, [n, h, a, w, b, c])):
        value = x.meta["val"]
        value = value.reshape(size) if target is aten.reshape.default else value.expand(size)
        x = graph.call_function(target, (x, size))
        x.meta.update(val=value, edgec_layer=layer_of(node), edgec_origin=origin_of(node))
    return _emit(module, node, aten.reshape.default, (x, [n, h * a, w * b, c]))


def _transpose(module: fx.GraphModule, node: Any) -> fx.Node | None:
    """Two transpositions of the same axes cancel."""
    x = node.args[0]
    if not is_call(x, aten.transpose.int) or {int(a) % 3 for a in node.args[1:]} != {1, 2}:
        return None
    if len(shape_of(node)) != 3 or {int(a) % 3 for a in x.args[1:]} != {1, 2}:  # type: ignore[union-attr]
        return None
    return x.args[0]  # type: ignore[union-attr,return-value]


RULES: dict[Any, Callable[[fx.GraphModule, Any], fx.Node | None]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys(RESHAPES, _reshape),
    edgec.qlut.default: _qlut,
    edgec.qmean.default: _mean,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive_average,
    aten.batch_norm.default: _batch_norm,
    aten.prelu.default: _prelu,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
}
