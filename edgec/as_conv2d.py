"""Convolutions of other forms as `conv2d`: 1-D ones on maps of height 1, transposed ones by output phase.

Quantisation and lowering know one form of convolution. The rewrites here give them that one, in terms of ATen, so that
a quantised Program remains a graph that PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgec.program import constant_of, get_weight, is_call, layer_of, origin_of, shape_of, weight_node
from edgec.sparsity import Carrier

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


def as_conv2d(module: fx.GraphModule, masks: Carrier | None = None) -> fx.GraphModule:
    """Rewrite 1-D and transposed convolutions of batches by stored weights, in place; returns `module`.

    Values that other operators read keep their shape: for 1-D ones a squeeze stands between them and the map of height
    1, on which element-wise operators, pools and concatenations behind the convolution work as well. New values carry
    `meta["val"]`.

    masks: the sparsity records; those of 1-D convolutions follow their weights.
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
            if masks is not None and is_call(node, aten.conv1d.default, aten.conv1d.padding):
                masks.move(str(node.args[1].target), str(args[1].target), lambda mask: mask.unsqueeze(2))
            new = module.graph.call_function(target, args, kwargs)
            _describe(new, node, node.meta["val"].unsqueeze(2))
            back = module.graph.call_function(aten.squeeze.dims, (new, [2]))
            _describe(back, node, node.meta["val"])
            back.meta["edgec_flat"] = True
        node.replace_all_uses_with(back)
        module.graph.erase_node(node)
    # Squeezes that nothing reads would count as readers.
    module.graph.eliminate_dead_code()
    for node in list(module.graph.nodes):
        if is_call(node, aten.conv_transpose2d.input) and len(shape_of(node)) == 4:
            _by_phase(module, node)
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


def _conv_transpose1d(module: fx.GraphModule, node: Any) -> Call:
    x, w, bias, stride, padding, extra, groups, dilation = _arguments(node)
    if constant_of(module, w) is None or not _is_line(x) or (bias is not None and constant_of(module, bias) is None):
        return None
    weight = weight_node(module, f"{w.target}_2d", get_weight(module, w).unsqueeze(2))
    geometry = ([1, _one(stride)], [0, _one(padding)], [0, _one(extra)], groups, [1, _one(dilation)])
    return aten.conv_transpose2d.input, (_map(module, x), weight, bias, *geometry), {}


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
    if not all(len(shape_of(x)) in (0, 3) for x in tensors):
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
    x, widths, *rest = node.args
    mode = rest[0] if rest else node.kwargs.get("mode", "constant")
    if node.target is aten.pad.default and mode != "constant":
        # Other modes take widths of all axes that a map has.
        widths = [*widths, 0, 0]
    return node.target, (_map(module, x), widths, *rest), dict(node.kwargs)


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
    aten.conv_transpose1d.default: _conv_transpose1d,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.max_pool1d.default: _max_pool,
    aten.avg_pool1d.default: _avg_pool,
    aten.adaptive_avg_pool1d.default: _adaptive_average,
    aten.mean.dim: _mean,
}


# -- transposed convolution --------------------------------------------------------------------------------------------

# Activations that are applied before the phases are interleaved, where a convolution takes them into its epilogue.
POINTWISE = UNARY[: UNARY.index(aten.neg.default)]
# All phases as one convolution, whose weights have zeros where a phase has no tap, instead of one each: where that adds
# at most this share of products, or where a phase has too few channels to fill a vector register by itself.
MOST_ZEROS = 0.3
FEW_CHANNELS = 4


@dataclass(frozen=True)
class Phases:
    """One axis of a transposed convolution as `stride` ordinary ones on the `size` inputs, with stride 1.

    Output o = stride * t + r reads input t + offset through kernel tap k for all (offset, k) in `taps[r]`:
    o + padding = stride * (t + offset) + k. Every phase has `count` outputs, of which the last may be beyond `out`.
    """

    size: int
    kernel: int
    stride: int
    padding: int
    extra: int

    @property
    def out(self) -> int:
        return (self.size - 1) * self.stride - 2 * self.padding + self.kernel + self.extra

    @property
    def count(self) -> int:
        return -(-self.out // self.stride)

    @property
    def taps(self) -> list[list[tuple[int, int]]]:
        found = []
        for r in range(self.stride):
            first, base = (r + self.padding) % self.stride, (r + self.padding) // self.stride
            found.append([(base - j, k) for j, k in enumerate(range(first, self.kernel, self.stride))])
        return found

    def window(self, phases: Sequence[int]) -> range:
        """Offsets of the inputs that any of these phases reads; one of them where there is none."""
        offsets = [offset for r in phases for offset, _ in self.taps[r]] or [0]
        return range(min(offsets), max(offsets) + 1)


def _by_phase(module: fx.GraphModule, node: Any) -> None:
    """A transposed convolution as ordinary ones, one for each phase of the output, whose results are interleaved."""
    x, w, bias, stride, padding, extra, groups, dilation = _arguments(node)
    if any(a is not None and constant_of(module, a) is None for a in (w, bias)) or constant_of(module, w) is None:
        return
    stride, padding, extra, dilation = (_two(v) for v in (stride, padding, extra, dilation))
    weight = get_weight(module, w)
    if dilation != [1, 1] or not all(isinstance(n, int) for n in shape_of(x)[1:]):
        return
    axes = tuple(Phases(shape_of(x)[2 + i], weight.shape[2 + i], stride[i], padding[i], extra[i]) for i in range(2))
    everything = [(a, b) for a in range(stride[0]) for b in range(stride[1])]
    inputs, channels = weight.shape[0] // groups, weight.shape[1] * groups
    # [groups, inputs, outputs, kh, kw] to OIHW
    kernel = (
        weight.reshape(groups, inputs, -1, *weight.shape[2:])
        .transpose(1, 2)
        .reshape(channels, inputs, *weight.shape[2:])
    )
    used = weight.shape[2] * weight.shape[3]
    joint = len(everything)
    for i in range(2):
        joint *= len(axes[i].window(range(stride[i])))
    together = groups == 1 and (joint <= used * (1 + MOST_ZEROS) or channels <= FEW_CHANNELS)
    last, act = node, None
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], *POINTWISE) and not any(isinstance(a, fx.Node) for a in users[0].args[1:]):
        last, act = users[0], users[0]

    def call(target: Any, *args: Any) -> fx.Node:
        new = module.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        _describe(new, last, target(*values))
        return new

    def convolve(phases: list[tuple[int, int]], name: str) -> fx.Node:
        windows = [axes[i].window(sorted({phase[i] for phase in phases})) for i in range(2)]
        full = kernel.new_zeros(len(phases), *kernel.shape[:2], *(len(window) for window in windows))
        for number, phase in enumerate(phases):
            for dy, ky in axes[0].taps[phase[0]]:
                for dx, kx in axes[1].taps[phase[1]]:
                    full[number, :, :, dy - windows[0].start, dx - windows[1].start] = kernel[:, :, ky, kx]
        stored = weight_node(module, f"{w.target}_{name}", full.reshape(-1, *full.shape[2:]))
        offset = bias
        if bias is not None and len(phases) > 1:
            offset = weight_node(module, f"{bias.target}_{name}", get_weight(module, bias).repeat(len(phases)))
        (top, bottom), (left, right) = (
            (-window.start, axis.count - 1 + window.stop - axis.size)
            for axis, window in zip(axes, windows, strict=True)
        )
        value = x
        for dim, before, after in ((2, top, bottom), (3, left, right)):
            if min(before, after) < 0:
                size = shape_of(value)[dim]
                value = call(aten.slice.Tensor, value, dim, max(0, -before), size - max(0, -after))
        pads = [max(0, v) for v in (left, right, top, bottom)]
        if pads[0] != pads[1] or pads[2] != pads[3]:
            value = call(aten.pad.default, value, pads)
            pads = [0] * 4
        result = call(aten.conv2d.default, value, stored, offset, [1, 1], [pads[2], pads[0]], [1, 1], groups)
        return result if act is None else call(act.target, result, *act.args[1:])

    with module.graph.inserting_before(last):
        if together:
            result = convolve(everything, "phases")
        else:
            parts = [convolve([phase], f"phase{phase[0]}{phase[1]}") for phase in everything]
            result = parts[0] if len(parts) == 1 else call(aten.cat.default, parts, 1)
        counts = [axis.count for axis in axes]
        if len(everything) > 1:
            result = call(aten.reshape.default, result, [-1, *stride, channels, *counts])
            result = call(aten.permute.default, result, [0, 3, 4, 1, 5, 2])
            result = call(
                aten.reshape.default, result, [-1, channels, *(n * s for n, s in zip(counts, stride, strict=True))]
            )
        for dim, axis in ((2, axes[0]), (3, axes[1])):
            if axis.out < axis.count * axis.stride:
                result = call(aten.slice.Tensor, result, dim, 0, axis.out)
    last.replace_all_uses_with(result)


def _two(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return [values[0], values[-1]]
