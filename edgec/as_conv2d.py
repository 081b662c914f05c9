"""Convolutions of other forms as `conv2d`: 1-D ones on maps of height 1, transposed ones by output phase.

Quantisation and lowering know one form of convolution. The rewrites here give them that one, in terms of ATen, so that
a quantised Program remains a graph that PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from edgec.program import constant_of, get_weight, is_call, layer_of, origin_of, weight_node

aten = torch.ops.aten

# 3-D axis -> axis of the map of height 1
AXIS = {0: 0, 1: 1, 2: 3}

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
    aten.leaky_relu.default,
    aten.elu.default,
    aten.neg.default,
    aten.exp.default,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    # Per channel, which is axis 1 in both forms.
    aten.prelu.default,
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
)
BINARY = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
)


def as_conv2d(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `conv1d` on batches with stored weights, and what follows it, on maps of height 1, in place.

    The values that other operators read keep their shape: a squeeze stands between them and the map. Returns `module`;
    new values carry `meta["val"]`.
    """
    for node in list(module.graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not _is_line(node):
            continue
        with module.graph.inserting_before(node):
            call = rule(module, node)
            if call is None:
                continue
            target, args, kwargs = call
            new = module.graph.call_function(target, args, kwargs)
            _describe(new, node, node.meta["val"].unsqueeze(2))
            back = module.graph.call_function(aten.squeeze.dims, (new, [2]))
            _describe(back, node, node.meta["val"])
            back.meta["edgec_flat"] = True
        node.replace_all_uses_with(back)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _describe(new: fx.Node, old: fx.Node, value: Any) -> None:
    new.meta.update({**old.meta, "val": value, "edgec_layer": layer_of(old), "edgec_origin": origin_of(old)})


def _is_line(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 3


def _flat(node: Any) -> bool:
    """Whether the 3-D value `node` exists as a map of height 1."""
    return is_call(node, aten.squeeze.dims) and bool(node.meta.get("edgec_flat"))


def _map(module: fx.GraphModule, node: Any) -> fx.Node:
    """The 3-D value `node` as a map of height 1."""
    if _flat(node):
        return node.args[0]
    for user in node.users:
        if is_call(user, aten.unsqueeze.default) and user.meta.get("edgec_flat"):
            return user
    # Directly behind its operand, so that every later user may share it.
    with module.graph.inserting_after(node):
        new = module.graph.call_function(aten.unsqueeze.default, (node, 2))
    _describe(new, node, node.meta["val"].unsqueeze(2))
    new.meta["edgec_flat"] = True
    return new


Call = tuple[Any, tuple[Any, ...], dict[str, Any]] | None


def _conv1d(module: fx.GraphModule, node: Any) -> Call:
    x, w, bias, stride, padding, dilation, groups = _arguments(node)
    if constant_of(module, w) is None or not _is_line(x) or (bias is not None and constant_of(module, bias) is None):
        return None
    weight = weight_node(module, f"{w.target}_2d", get_weight(module, w).unsqueeze(2))
    pads = padding if isinstance(padding, str) else [0, _one(padding)]
    target = aten.conv2d.padding if isinstance(padding, str) else aten.conv2d.default
    args = (_map(module, x), weight, bias, [1, _one(stride)], pads, [1, _one(dilation)], groups)
    return target, args, {}


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _arguments(node: Any) -> list[Any]:
    """All arguments in the order of the schema, defaults filled in."""
    entries = node.target._schema.arguments
    return [
        node.args[i] if i < len(node.args) else node.kwargs.get(entry.name, entry.default_value)
        for i, entry in enumerate(entries)
    ]


def _unary(module: fx.GraphModule, node: Any) -> Call:
    x = node.args[0]
    return (node.target, (_map(module, x), *node.args[1:]), dict(node.kwargs)) if _flat(x) else None


def _binary(module: fx.GraphModule, node: Any) -> Call:
    operands = node.args[:2]
    if not any(_flat(x) for x in operands):
        return None
    tensors = [x for x in operands if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)]
    if not all(_is_line(x) or x.meta["val"].dim() == 0 for x in tensors):
        return None
    args = [_map(module, x) if _is_line(x) else x for x in operands]
    return node.target, (*args, *node.args[2:]), dict(node.kwargs)


def _cat(module: fx.GraphModule, node: Any) -> Call:
    tensors, dim = _arguments(node)
    if not any(_flat(x) for x in tensors) or not all(_is_line(x) for x in tensors):
        return None
    return node.target, ([_map(module, x) for x in tensors], AXIS[int(dim) % 3]), {}


def _slice(module: fx.GraphModule, node: Any) -> Call:
    x, dim, *rest = _arguments(node)
    return (node.target, (_map(module, x), AXIS[int(dim) % 3], *rest), {}) if _flat(x) else None


def _pad(module: fx.GraphModule, node: Any) -> Call:
    """Padding of the last axis alone."""
    if not _flat(node.args[0]) or len(node.args[1]) > 2:
        return None
    return node.target, (_map(module, node.args[0]), *node.args[1:]), dict(node.kwargs)


def _max_pool(module: fx.GraphModule, node: Any) -> Call:
    x, kernel, stride, padding, dilation, ceil = _arguments(node)
    if not _flat(x):
        return None
    window = ([1, _one(kernel)], [1, _one(stride or kernel)], [0, _one(padding)], [1, _one(dilation)])
    return aten.max_pool2d.default, (_map(module, x), *window, ceil), {}


def _avg_pool(module: fx.GraphModule, node: Any) -> Call:
    x, kernel, stride, padding, ceil, counted = _arguments(node)
    if not _flat(x):
        return None
    window = ([1, _one(kernel)], [1, _one(stride or kernel)], [0, _one(padding)])
    return aten.avg_pool2d.default, (_map(module, x), *window, ceil, counted), {}


def _adaptive_average(module: fx.GraphModule, node: Any) -> Call:
    x, size = node.args
    return (aten.adaptive_avg_pool2d.default, (_map(module, x), [1, _one(size)]), {}) if _flat(x) else None


def _mean(module: fx.GraphModule, node: Any) -> Call:
    x, dims, keep, *_ = _arguments(node)
    if not _flat(x) or not keep or not dims or node.kwargs.get("dtype") is not None:
        return None
    return node.target, (_map(module, x), [AXIS[int(d) % 3] for d in dims], True), {}


RULES: dict[Any, Callable[[fx.GraphModule, Any], Call]] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    aten.conv1d.default: _conv1d,
    aten.conv1d.padding: _conv1d,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.max_pool1d.default: _max_pool,
    aten.avg_pool1d.default: _avg_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_average,
    aten.mean.dim: _mean,
}
