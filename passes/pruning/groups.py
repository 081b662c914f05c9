"""Dependency groups: which channels of a graph must be removed, or reordered, together.

Every element of every tensor gets a label, and labels are equal where the elements belong to one channel. Most labels
need no rule: an operator that only moves data (a view, a transpose, a concatenation, a channel shuffle) moves the
labels of its input by being run on them. The others join labels: an addition joins those of its operands, a matrix
product those of the axis it sums over, a convolution binds them to an axis of its weight. What stays joined at the end
is a *unit*, the least that can be removed: one channel of a whole residual stage, a head of attention, a group of a
grouped convolution. Units that occur in the same places form a `ChannelGroup`.

    channels = Channels(program)
    for group in channels.groups:
        ...                                  # group.members: the weights that score a unit
    module = program.edit()
    channels.remove(module, {group: keep})   # keep: indices of the units that stay
    program.replace(module)

After Fang et al., "DepGraph: Towards Any Structural Pruning"; the label propagation is our own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec.errors import EdgecError
from edgec.program import Program, get_weight, layer_of, output_nodes

aten = torch.ops.aten

# A grouped convolution of fewer groups loses the same channels in each of them, one of more loses whole groups.
WHOLE_GROUPS = 4
# Elements of a weight that is not the weight of a layer (position embeddings, bias tables), each with its own label.
MAX_LABELLED = 4_000_000

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)
SAME = frozenset(
    (
        "dropout", "dropout_", "alpha_dropout", "feature_dropout", "clone", "contiguous", "_to_copy", "to", "detach",
        "detach_", "alias", "lift_fresh_copy", "hardswish", "hardsigmoid", "hardtanh", "relu6", "relu", "selu", "celu",
        "elu", "leaky_relu", "mish", "silu", "gelu", "softplus", "sigmoid", "tanh", "log_sigmoid", "zeros_like",
        "ones_like", "full_like", "type_as",
    )
)  # fmt: skip
SPATIAL = frozenset(
    (
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool2d_with_indices",
        "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
        "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "instance_norm",
    )
)  # fmt: skip
MOVES = frozenset(
    (
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "squeeze",
        "unsqueeze", "expand", "expand_as", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind",
        "cat", "concat", "stack", "roll", "flip", "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle",
        "channel_shuffle", "swapaxes", "index", "index_select", "view_as", "numpy_T", "mT",
    )
)  # fmt: skip
REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm"))
SOFTMAX = frozenset(("softmax", "log_softmax", "_softmax", "cumsum"))


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a weight that a group's units occupy.

    weight: attribute path. axis: of the weight. index: [units, n] positions along the axis, in ascending order.
    role: "out" of the layer that makes the channels, "in" of a layer that reads them, else "other" (norms, biases).
    """

    weight: str
    axis: int
    index: np.ndarray
    role: str


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units that occur in the same places of the graph: any subset of them can be removed, any order is as good.

    name: the first layer that makes the channels. channels: number of units. unit: channels of the first layer that
    belong to one unit. layers: the layers that make the channels. locked: why nothing may be removed, or None.
    """

    name: str
    channels: int
    unit: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    locked: str | None
    classes: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product: its multiply-accumulates shrink with the units along each of the `axes`."""

    node: str
    axes: tuple[np.ndarray, ...]


def channel_groups(source: Program | fx.GraphModule) -> list[ChannelGroup]:
    """The groups of a Program, or of a GraphModule whose nodes carry shapes, in graph order."""
    return Channels(source).groups


def permute(module: fx.GraphModule, group: ChannelGroup, order: Sequence[int] | np.ndarray) -> None:
    """Reorder the units of a group in all its weights: unit i becomes what unit `order[i]` was.

    The function stays the same up to the order of additions. Raises EdgecError for a locked group and for an `order`
    that is no permutation.
    """
    order = np.asarray(order)
    if group.locked:
        raise EdgecError(f"channels cannot be reordered: {group.locked}", where=group.name)
    if sorted(order.tolist()) != list(range(group.channels)):
        raise EdgecError(f"order is not a permutation of {group.channels} units", where=group.name)
    weights = {str(n.target): get_weight(module, n) for n in module.graph.nodes if n.op == "get_attr"}
    with torch.no_grad():
        for member in group.members:
            weight = weights[member.weight]
            index = np.arange(weight.shape[member.axis])
            index[member.index.ravel()] = member.index[order].ravel()
            weight.copy_(weight.index_select(member.axis, torch.from_numpy(index)))


def remove(module: fx.GraphModule, group: ChannelGroup, keep: Sequence[int] | np.ndarray) -> None:
    """Remove all units of a group but `keep` from the weights and from the sizes written in the graph.

    To remove from several groups use `Channels.remove`, which does all at once: after it, groups are out of date.
    """
    Channels(module).remove(module, {group: keep})


class Channels:
    """The analysis of one graph. `groups` is the result; locked ones are among them, with their reason."""

    def __init__(self, source: Program | fx.GraphModule) -> None:
        self.module = source.module if isinstance(source, Program) else source
        self._labels: dict[fx.Node, Any] = {}
        self._weights: dict[str, list[tuple[torch.Tensor, str]]] = {}
        self._makers: list[tuple[str, torch.Tensor]] = []
        self._same: list[torch.Tensor] = []
        self._tied: list[torch.Tensor] = []
        self._locks: list[tuple[torch.Tensor, str]] = []
        self._fixed_axes: list[tuple[torch.Tensor, int, str]] = []
        self._grouped: dict[fx.Node, str] = {}
        self._products: list[tuple[fx.Node, list[torch.Tensor]]] = []
        self._count = 0
        for node in self.module.graph.nodes:
            self._visit(node)
        self._resolve()
        self.groups = self._collect()
        self.products = [
            Product(node.name, tuple(self._vector(labels)[1] for labels in axes)) for node, axes in self._products
        ]

    # -- labels ----------------------------------------------------------------------------------------------------

    def _fresh(self, count: int) -> torch.Tensor:
        labels = torch.arange(self._count, self._count + count)
        self._count += count
        return labels

    def _join(self, a: torch.Tensor, b: torch.Tensor, *, tie: bool = False) -> None:
        """Labels that are removed together: `tie` for different channels, else they are one channel."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        known = (pairs >= 0).all(0)
        (self._tied if tie else self._same).append(pairs[:, known & (pairs[0] != pairs[1])])

    def _lock(self, labels: torch.Tensor | None, reason: str) -> None:
        if labels is not None:
            found = labels[labels >= 0]
            if found.numel():
                self._locks.append((found.reshape(-1), reason))

    def _bind(self, node: Any, labels: torch.Tensor | None, axis: int, role: str) -> None:
        """The labels [n] belong to an axis of the weight behind `node`."""
        if isinstance(node, fx.Node) and labels is not None:
            rank = get_weight(self.module, node).dim()
            shape = [1] * rank
            shape[axis] = -1
            self._bind_all(node, labels.reshape(shape), role)

    def _bind_all(self, node: fx.Node, labels: torch.Tensor, role: str) -> None:
        entries = self._weights.setdefault(str(node.target), [])
        for other, _ in entries:
            if other.shape == labels.shape:
                self._join(other, labels)
                return
        entries.append((labels, role))

    def _of(self, value: Any) -> torch.Tensor | None:
        """Labels of an argument: those of a node, or new ones for a weight that is used like a tensor."""
        if not isinstance(value, fx.Node):
            return None
        if value.op == "get_attr" and value not in self._labels:
            weight = get_weight(self.module, value)
            usable = isinstance(weight, torch.Tensor) and weight.is_floating_point()
            if usable and 1 < weight.numel() <= MAX_LABELLED:
                labels = self._fresh(weight.numel()).reshape(weight.shape)
                self._labels[value] = labels
                self._bind_all(value, labels, "other")
        found = self._labels.get(value)
        return found if isinstance(found, torch.Tensor) else None

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            for result in output_nodes(self.module):
                self._lock(self._of(result), "its channels are an output of the model")
        elif node.op == "call_function":
            name = _op_name(node)
            if name == "getitem":
                parts = self._labels.get(node.args[0])  # type: ignore[arg-type]
                self._labels[node] = parts[int(node.args[1])] if isinstance(parts, list) else parts  # type: ignore[call-overload]
                return
            rule: Callable[[fx.Node], Any] | None = getattr(self, f"_op_{name}", None)
            if node.target in CONVOLUTIONS:
                labels = self._convolution(node)
            elif node.target in TRANSPOSED:
                labels = self._transposed(node)
            elif rule is not None:
                labels = rule(node)
            elif name in SAME:
                labels = self._of(node.args[0])
            elif name in MOVES:
                labels = self._move(node, name)
            elif name in SPATIAL:
                labels = self._spatial(node)
            elif name in REDUCTIONS:
                labels = self._reduce(node, name)
            elif name in SOFTMAX:
                labels = self._of(node.args[0])
                if labels is not None:
                    self._fix(labels, node.args[1], node, f"{name} runs over the channels")
            elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
                labels = self._pointwise(node)
            else:
                labels = self._unknown(node)
            self._labels[node] = labels

    def _fix(self, labels: torch.Tensor, axis: Any, node: fx.Node, what: str) -> None:
        """Nothing may be removed along an axis; judged when all labels are joined."""
        self._fixed_axes.append((labels, int(axis) % labels.dim(), f"{what} in layer '{layer_of(node)}'"))

    def _unknown(self, node: fx.Node) -> None:
        for argument in node.all_input_nodes:
            labels = self._labels.get(argument)
            for part in labels if isinstance(labels, list) else [labels]:
                self._lock(
                    part, f"no rule says what operator {_op_name(node)} of layer '{layer_of(node)}' does to channels"
                )

    # -- rules -----------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, inputs: torch.Tensor | None, outputs: torch.Tensor) -> None:
        self._makers.append((layer_of(node), outputs))
        axes = [outputs] if inputs is None else [outputs, inputs]
        self._products.append((node, axes))

    def _channels_of(self, node: Any, axis: int) -> torch.Tensor | None:
        """The labels [n] of a tensor along one axis; labels that differ along another are joined."""
        labels = self._of(node)
        if labels is None:
            return None
        axis %= labels.dim()
        flat = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
        if flat.shape[0] > 1:
            self._join(flat, flat[:1])
        size = int(node.meta["val"].shape[axis])
        if flat.shape[1] != size:
            self._lock(flat[0], "its channels lie along another axis than the layer after it reads")
            return None
        return flat[0]

    def _convolution(self, node: fx.Node) -> torch.Tensor | None:
        weight = node.args[1]
        rank = len(node.meta["val"].shape)
        channel = rank - len(node.meta["val"].shape[2:]) - 1
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            return self._unknown(node)
        tensor = get_weight(self.module, weight)
        groups = int(_argument(node, "groups", 6, 1))
        inputs = self._channels_of(node.args[0], channel)
        bias = _argument(node, "bias", 2, None)
        if groups == 1:
            outputs = self._fresh(tensor.shape[0])
            self._bind(weight, inputs, 1, "in")
            self._layer(node, inputs, outputs)
        else:
            outputs = self._grouped_convolution(node, inputs, groups, tensor, weight)
            if outputs is None:
                return None
        self._bind(weight, outputs, 0, "out")
        self._bind(bias, outputs, 0, "other")
        return outputs.reshape([-1 if a == channel else 1 for a in range(rank)])

    def _grouped_convolution(
        self, node: fx.Node, inputs: torch.Tensor | None, groups: int, tensor: torch.Tensor, weight: fx.Node
    ) -> torch.Tensor | None:
        width, made = tensor.shape[1], tensor.shape[0] // groups
        if width > 1 and groups < WHOLE_GROUPS:
            # the same channels go in every group
            self._grouped[node] = "inside"
            outputs = self._fresh(tensor.shape[0])
            by_group = outputs.reshape(groups, made)
            self._join(by_group, by_group[:1], tie=True)
            kept = None
            if inputs is not None:
                by_group = inputs.reshape(groups, width)
                if bool((by_group < 0).any()):
                    self._lock(by_group, f"layer '{layer_of(node)}' reads it together with channels that stay")
                else:
                    self._join(by_group, by_group[:1], tie=True)
                    kept = by_group[0]
                    self._bind(weight, kept, 1, "in")
            self._layer(node, kept, outputs)
            return outputs
        self._grouped[node] = "whole"
        if inputs is None:
            return None
        by_group = inputs.reshape(groups, width)
        fixed = (by_group < 0).any(1)
        if width == 1 and made == 1 and not bool(fixed.any()):
            outputs = inputs
        else:
            outputs = self._fresh(tensor.shape[0])
            self._join(by_group, by_group[:, :1], tie=True)
            self._join(by_group[:, :1], outputs.reshape(groups, made), tie=True)
            reason = f"layer '{layer_of(node)}' reads it together with channels that stay"
            self._lock(by_group[fixed], reason)
            self._lock(outputs.reshape(groups, made)[fixed], reason)
        self._products.append((node, [outputs]))
        if width > 1:
            self._makers.append((layer_of(node), outputs))
        return outputs

    def _transposed(self, node: fx.Node) -> torch.Tensor | None:
        weight = node.args[1]
        groups = int(_argument(node, "groups", 6, 1))
        if groups != 1 or not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            return self._unknown(node)
        inputs = self._channels_of(node.args[0], 1)
        outputs = self._fresh(get_weight(self.module, weight).shape[1])
        self._bind(weight, inputs, 0, "in")
        self._bind(weight, outputs, 1, "out")
        self._bind(_argument(node, "bias", 2, None), outputs, 0, "other")
        self._layer(node, inputs, outputs)
        return outputs.reshape([1, -1] + [1] * (len(node.meta["val"].shape) - 2))

    def _op_linear(self, node: fx.Node) -> torch.Tensor | None:
        weight = node.args[1]
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            return self._unknown(node)
        labels = self._of(node.args[0])
        outputs = self._fresh(get_weight(self.module, weight).shape[0])
        if labels is not None and labels.shape[-1] == 1 and labels.numel() > 1:
            # It works along another axis, as the token mixers of MLP-Mixer do, and on each channel alike.
            self._bind(weight, outputs, 0, "out")
            self._makers.append((layer_of(node), outputs))
            self._lock(outputs, "the layer works along another axis than that of the channels")
            self._products.append((node, [labels]))
            return labels
        inputs = self._channels_of(node.args[0], -1)
        self._bind(weight, inputs, 1, "in")
        self._bind(weight, outputs, 0, "out")
        self._bind(_argument(node, "bias", 2, None), outputs, 0, "other")
        self._layer(node, inputs, outputs)
        return outputs.reshape([1] * (len(node.meta["val"].shape) - 1) + [-1])

    def _op_embedding(self, node: fx.Node) -> torch.Tensor | None:
        weight = node.args[0]
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            return self._unknown(node)
        outputs = self._fresh(get_weight(self.module, weight).shape[1])
        self._bind(weight, outputs, 1, "out")
        self._makers.append((layer_of(node), outputs))
        return outputs.reshape([1] * (len(node.meta["val"].shape) - 1) + [-1])

    def _op_batch_norm(self, node: fx.Node) -> torch.Tensor | None:
        inputs = self._channels_of(node.args[0], 1)
        for argument in node.args[1:5]:
            self._bind(argument, inputs, 0, "other")
        return self._of(node.args[0])

    def _op_prelu(self, node: fx.Node) -> torch.Tensor | None:
        weight = node.args[1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and get_weight(self.module, weight).numel() > 1:
            self._bind(weight, self._channels_of(node.args[0], 1), 0, "other")
        return self._of(node.args[0])

    def _op_group_norm(self, node: fx.Node) -> torch.Tensor | None:
        inputs, groups = self._channels_of(node.args[0], 1), int(node.args[1])  # type: ignore[arg-type]
        if inputs is None:
            return None
        if groups > 1:
            by_group = inputs.reshape(groups, -1)
            self._join(by_group, by_group[:, :1], tie=True)
            self._lock(by_group[(by_group < 0).any(1)], f"layer '{layer_of(node)}' normalises it with others that stay")
        for index, key in ((2, "weight"), (3, "bias")):
            self._bind(_argument(node, key, index, None), inputs, 0, "other")
        return self._of(node.args[0])

    def _op_layer_norm(self, node: fx.Node) -> torch.Tensor | None:
        labels = self._of(node.args[0])
        if labels is None:
            return None
        width = len(node.args[1])  # type: ignore[arg-type]
        if width != 1:
            for axis in range(-width, 0):
                self._fix(labels, axis, node, "a layer norm over several axes includes the channels")
            return labels
        if labels.shape[-1] > 1:
            inputs = self._channels_of(node.args[0], -1)
            for index, key in ((2, "weight"), (3, "bias")):
                self._bind(_argument(node, key, index, None), inputs, 0, "other")
        return labels

    _op_rms_norm = _op_layer_norm

    def _op_glu(self, node: fx.Node) -> torch.Tensor | None:
        labels = self._of(node.args[0])
        axis = int(_argument(node, "dim", 1, -1))
        if labels is None or labels.shape[axis] == 1:
            return labels
        half = labels.shape[axis] // 2
        a, b = labels.narrow(axis, 0, half), labels.narrow(axis, half, half)
        self._join(a, b)
        return a

    def _op_scaled_dot_product_attention(self, node: fx.Node) -> torch.Tensor | None:
        query, key, value = (self._of(a) for a in node.args[:3])
        where = f"attention of layer '{layer_of(node)}'"
        found = [x for x in (query, key, value) if x is not None]
        axes = [a for x in found for a in range(x.dim() - 2) if x.shape[a] > 1]
        if len(found) != 3 or not axes:
            for labels in found:
                self._lock(labels, f"{where} has no axis of heads")
            return None
        assert query is not None and key is not None and value is not None
        self._join(query, key)
        heads = query[..., :1, :1]
        for labels in (query, key, value):
            self._join(labels, heads, tie=True)
        mask = self._of(_argument(node, "attn_mask", 3, None))
        if mask is not None and mask.dim() == heads.dim():
            self._join(mask, heads, tie=True)
        self._products.append((node, [heads]))
        return value

    def _op_matmul(self, node: fx.Node) -> torch.Tensor | None:
        left, right = (self._of(a) for a in node.args[:2])
        if left is None and right is None:
            return None
        rank = len(node.meta["val"].shape)
        ranks = [len(a.meta["val"].shape) for a in node.args[:2]]  # type: ignore[union-attr]
        if min(ranks) < 2 or any(isinstance(a, fx.Node) and a.op == "get_attr" for a in node.args[:2]):
            return self._unknown(node)
        none = torch.full([1] * rank, -1)
        a, b = (none if x is None else x.reshape([1] * (rank - x.dim()) + list(x.shape)) for x in (left, right))
        where = f"the matrix product in layer '{layer_of(node)}'"
        if any(x.shape[axis] > 1 for x in (a, b) for axis in range(rank - 2)):
            # heads, or other groups that are computed side by side: a group goes as a whole
            if a.shape[-1] > 1 and b.shape[-2] > 1:
                self._join(a, b.transpose(-1, -2))
            heads = a[..., :1, :1] if any(a.shape[axis] > 1 for axis in range(rank - 2)) else b[..., :1, :1]
            for side, x in (("left", left), ("right", right)):
                if x is None:
                    self._fix(heads, _varying(heads), node, f"the {side} side of the matrix product is fixed")
            self._join(a, heads, tie=True)
            self._join(b, heads, tie=True)
            self._products.append((node, [heads]))
            rows, columns = a.shape[-2] > 1, b.shape[-1] > 1
            if rows == columns:
                return heads
            return a[..., :1] if rows else b[..., :1, :]
        if a.shape[-1] > 1 or b.shape[-2] > 1:
            if a.shape[-1] == b.shape[-2]:
                self._join(a[..., :1, :], b[..., :, :1].transpose(-1, -2))
                self._products.append((node, [a[..., 0, :]]))
            else:
                self._lock(a if a.shape[-1] > 1 else b, f"{where} sums over it against a fixed tensor")
        rows, columns = a.shape[-2] > 1, b.shape[-1] > 1
        if rows and columns:
            self._lock(a, f"{where} makes a map of channels by channels")
            self._lock(b, f"{where} makes a map of channels by channels")
            return None
        if not rows and not columns:
            return None
        labels = a[..., :1] if rows else b[..., :1, :]
        self._products.append((node, [labels]))
        return labels

    _op_bmm = _op_matmul
    _op_mm = _op_matmul

    def _spatial(self, node: fx.Node) -> torch.Tensor | None:
        labels = self._of(node.args[0])
        if labels is None or any(n is not node.args[0] for n in node.all_input_nodes):
            return None if labels is None else self._unknown(node)
        value = node.meta["val"]
        after = (value[0] if isinstance(value, (tuple, list)) else value).shape
        before = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        for axis, (old, new) in enumerate(zip(before, after, strict=True)):
            if axis > 1 or old != new:
                self._fix(labels, axis, node, f"{_op_name(node)} runs along the channels")
        return labels if not isinstance(value, (tuple, list)) else None

    def _op_pad(self, node: fx.Node) -> torch.Tensor | None:
        """Padding along the channels makes channels of its own, constants, that follow what they are added to."""
        labels = self._of(node.args[0])
        if labels is None:
            return None
        pads: list[int] = list(node.args[1])  # type: ignore[call-overload]
        constant = _op_name(node) == "constant_pad_nd" or _argument(node, "mode", 2, "constant") == "constant"
        rank = labels.dim()
        for axis in range(rank):
            place = 2 * (rank - 1 - axis)
            if place + 1 >= len(pads) or labels.shape[axis] == 1 or not any(pads[place : place + 2]):
                continue
            low, high = pads[place : place + 2]
            if not constant or low < 0 or high < 0 or labels.numel() != labels.shape[axis]:
                self._lock(labels, f"it is padded along the channels in layer '{layer_of(node)}'")
                return None
            shape = [1] * rank
            shape[axis] = -1
            parts = [self._fresh(low).reshape(shape), labels, self._fresh(high).reshape(shape)]
            labels = torch.cat(parts, dim=axis)
        return labels

    _op_constant_pad_nd = _op_pad

    def _reduce(self, node: fx.Node, name: str) -> torch.Tensor | None:
        labels = self._of(node.args[0])
        if labels is None:
            return None
        dims = _argument(node, "dim", 2 if name in ("norm", "linalg_vector_norm") else 1, None)
        axes = range(labels.dim()) if dims is None else [dims] if isinstance(dims, int) else list(dims) or []
        axes = sorted({int(a) % labels.dim() for a in axes}) or list(range(labels.dim()))
        keep = len(node.meta["val"].shape) == labels.dim()
        for axis in axes:
            if labels.shape[axis] > 1 and name != "sum":
                self._fix(labels, axis, node, f"{name} runs over the channels")
        for axis in axes:
            if labels.shape[axis] > 1:
                first = labels.narrow(axis, 0, 1)
                if labels.numel() > labels.shape[axis]:
                    self._join(labels, first)
                    labels = first
                else:
                    return None
        shape = [d for a, d in enumerate(labels.shape) if keep or a not in axes]
        return _compressed(labels.reshape(shape))

    def _move(self, node: fx.Node, name: str) -> Any:
        """An operator that only moves data: run it on the labels."""
        if all(self._labels_of_any(a) is None for a in node.all_input_nodes):
            return None
        if name in (
            "select",
            "roll",
            "flip",
            "index",
            "index_select",
            "unbind",
            "repeat",
            "stack",
            "repeat_interleave",
        ):
            self._fix_moved(node, name)
        if name == "slice" and _argument(node, "step", 4, 1) != 1:
            source = self._of(node.args[0])
            if source is not None:
                self._fix(source, _argument(node, "dim", 1, 0), node, "a slice with a step takes some of the channels")
        try:
            moved = node.target(*fx.map_arg(node.args, self._full), **fx.map_arg(node.kwargs, self._full))  # type: ignore[operator]
        except (RuntimeError, TypeError):
            return self._unknown(node)
        if isinstance(moved, torch.Tensor):
            return _compressed(moved)
        return [_compressed(part) for part in moved]

    def _labels_of_any(self, node: fx.Node) -> Any:
        return self._of(node) if node.op == "get_attr" else self._labels.get(node)

    def _full(self, node: fx.Node) -> Any:
        """What a data-moving operator is run on: labels of full shape, index weights and sizes as they are."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return int(value)  # type: ignore[arg-type]
        labels = self._of(node)
        if node.op == "get_attr" and labels is None and not value.is_floating_point():
            return get_weight(self.module, node)
        shape = tuple(int(d) for d in value.shape)
        return torch.full(shape, -1) if labels is None else labels.expand(shape)

    def _fix_moved(self, node: fx.Node, name: str) -> None:
        source = node.args[0]
        labels = self._of(source)
        if labels is None:
            return
        what = f"{name} picks or repeats single channels"
        if name in ("select", "unbind", "index_select"):
            self._fix(labels, _argument(node, "dim", 1, 0), node, what)
        elif name in ("roll", "flip"):
            dims = _argument(node, "dims", 2 if name == "roll" else 1, range(labels.dim()))
            for axis in [dims] if isinstance(dims, int) else dims:
                self._fix(labels, axis, node, what)
        elif name == "index":
            for axis, index in enumerate(node.args[1]):  # type: ignore[arg-type]
                if index is not None:
                    self._fix(labels, axis, node, what)
        elif name == "repeat_interleave":
            self._lock(labels, f"{what} in layer '{layer_of(node)}'")

    def _pointwise(self, node: fx.Node) -> torch.Tensor | None:
        operands = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
        shape = tuple(int(d) for d in node.meta["val"].shape)
        found: list[tuple[fx.Node, torch.Tensor]] = []
        for operand in operands:
            labels = self._of(operand)
            if labels is not None:
                found.append((operand, labels.reshape([1] * (len(shape) - labels.dim()) + list(labels.shape))))
        if not found:
            return None
        found.sort(key=lambda pair: pair[1].numel())
        result = found[0][1]
        for _, labels in found[1:]:
            a, b = torch.broadcast_tensors(result, labels)
            self._join(a, b)
            result = torch.where(a >= 0, a, b)
        result = result.broadcast_to(torch.broadcast_shapes(*(x.shape for _, x in found)))
        for operand in operands:
            labels = next((x for n, x in found if n is operand), None)
            self._hold(operand, labels, result, shape, node)
        return _compressed(result)

    def _hold(
        self, operand: fx.Node, labels: torch.Tensor | None, result: torch.Tensor, shape: tuple[int, ...], node: fx.Node
    ) -> None:
        """Lock what is combined element by element with a tensor whose channels stay."""
        own = [1] * (len(shape) - operand.meta["val"].dim()) + [int(d) for d in operand.meta["val"].shape]
        reason = f"{_op_name(node)} in layer '{layer_of(node)}' combines it with '{layer_of(operand)}', which stays"
        mine = torch.full([1] * len(shape), -1) if labels is None else labels
        fixed = (mine < 0) & torch.ones(result.shape, dtype=torch.bool)
        for axis in range(len(shape)):
            # along an axis of size 1 the operand is stretched and holds nothing
            if own[axis] > 1 and result.shape[axis] > 1 and mine.shape[axis] == 1 and mine.numel() > 1:
                varies = (result != result.narrow(axis, 0, 1)).any()
                if bool(varies):
                    self._fix(result, axis, node, f"'{layer_of(operand)}' has its own values")
        if labels is None:
            for axis in range(len(shape)):
                if own[axis] > 1 and result.shape[axis] > 1:
                    self._lock(result, reason)
            return
        stretched = all(own[a] == 1 for a in range(len(shape)) if result.shape[a] > 1)
        if not stretched and bool(fixed.any()):
            self._lock(result[fixed], reason)

    # -- resolution ------------------------------------------------------------------------------------------------

    def _arrays(self) -> Iterable[torch.Tensor]:
        """The label tensors of all nodes and weights, each once."""
        seen: set[bytes] = set()
        tensors = [x for labels in self._labels.values() for x in (labels if isinstance(labels, list) else [labels])]
        tensors += [labels for entries in self._weights.values() for labels, _ in entries]
        for labels in tensors:
            if labels is None:
                continue
            key = str(tuple(labels.shape)).encode() + labels.contiguous().numpy().tobytes()
            if key not in seen:
                seen.add(key)
                yield labels

    def _resolve(self) -> None:
        """Join labels until every set of units leaves rectangular tensors; then find what is locked."""
        arrays = list(self._arrays())
        fine = _components(self._count, self._same)
        while True:
            self._roots = _components(self._count, [*self._same, *self._tied])
            before = len(self._tied)
            for labels in arrays:
                classes = self._classes(labels)
                varying = [a for a in range(labels.dim()) if _varies(classes, a)]
                if len(varying) <= 1:
                    continue
                if bool((labels < 0).any()):
                    self._lock(labels, "its channels are mixed with others that stay")
                    labels = torch.where(labels < 0, labels.max(), labels)
                # the axis with most units stays divisible, the others go with it
                axis = max(varying, key=lambda a: len(np.unique(_line(classes, a))))
                first = labels
                for other in varying:
                    if other != axis:
                        first = first.narrow(other, 0, 1)
                self._join(labels, first, tie=True)
            if len(self._tied) == before:
                break
        self._fine = fine
        self._reasons: dict[int, str] = {}
        held: list[tuple[torch.Tensor, str]] = []
        for labels, axis, reason in self._fixed_axes:
            classes = self._classes(labels)
            if _varies(classes, axis):
                held.append((labels[labels >= 0].reshape(-1), reason))
        # First what holds a whole axis: one reason for all of its units.
        for labels, reason in held + self._locks:
            for root in np.unique(self._roots[labels.numpy()]).tolist():
                self._reasons.setdefault(root, reason)

    def _classes(self, labels: torch.Tensor) -> np.ndarray:
        plain = labels.numpy()
        return np.where(plain >= 0, self._roots[np.maximum(plain, 0)], -1) if self._count else plain

    def _vector(self, labels: torch.Tensor) -> tuple[int, np.ndarray]:
        """(axis, units along it) of a resolved tensor; -1 for elements that stay."""
        classes = self._classes(labels)
        axis = next((a for a in range(labels.dim()) if _varies(classes, a)), None)
        if axis is None:
            # all elements are one unit, or there is one element: the longest axis stands for all
            axis = max(range(labels.dim()), key=lambda a: labels.shape[a]) if labels.dim() else 0
        return axis, _line(classes, axis)

    def _collect(self) -> list[ChannelGroup]:
        """Units by the places where they occur: tensors, and positions of their channels within the unit."""
        ranks = self._ranks()
        places: dict[int, list[tuple[int, bytes]]] = {}
        for number, labels in enumerate(self._arrays()):
            axis, vector = self._vector(labels)
            rank = ranks[_line(np.maximum(labels.numpy(), 0), axis)]
            for root, positions in _positions(vector).items():
                places.setdefault(root, []).append((number, rank[positions].tobytes()))
        sets: dict[tuple[Any, ...], list[int]] = {}
        for root in sorted(places):
            sets.setdefault((tuple(places[root]), self._reasons.get(root)), []).append(root)
        makers: dict[int, list[str]] = {}
        for layer, labels in self._makers:
            for root in np.unique(self._roots[labels[labels >= 0].numpy()]).tolist():
                makers.setdefault(root, []).append(layer)
        groups = []
        weights = [
            (path, *self._vector(labels), role) for path, entries in self._weights.items() for labels, role in entries
        ]
        located = [(path, axis, _positions(vector), role) for path, axis, vector, role in weights]
        for (_, reason), roots in sets.items():
            if roots[0] not in makers:
                continue
            members = tuple(
                Member(path, axis, np.stack([found[root] for root in roots]), role)
                for path, axis, found, role in located
                if roots[0] in found
            )
            layers = tuple(dict.fromkeys(makers[roots[0]]))
            unit = next((m.index.shape[1] for m in members if m.role == "out"), 1)
            if reason is None and len(roots) == 1:
                reason = "its channels are all tied together and can only go as a whole"
            groups.append(ChannelGroup(layers[0], len(roots), unit, members, layers, reason, np.array(roots)))
        return groups

    def nodes(self, group: ChannelGroup) -> list[fx.Node]:
        """The nodes whose results have channels of the group, in graph order."""
        found = []
        for node, labels in self._labels.items():
            parts = [x for x in (labels if isinstance(labels, list) else [labels]) if x is not None]
            if any(bool(np.isin(self._classes(part), group.classes).any()) for part in parts):
                found.append(node)
        return found

    def _ranks(self) -> np.ndarray:
        """Number of each label's channel within its unit."""
        channels = np.unique(self._fine)
        order = channels[np.argsort(self._roots[channels], kind="stable")]
        owner = self._roots[order]
        starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]]) if len(owner) else np.zeros(0, int)
        number = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        by_channel = np.zeros(max(1, self._count), dtype=np.int64)
        by_channel[order] = number
        return by_channel[self._fine] if self._count else by_channel

    @property
    def labels(self) -> int:
        """How many labels there are; `classes` and `Product.axes` are labels."""
        return self._count

    # -- removal ---------------------------------------------------------------------------------------------------

    def kept_of(self, keep: Mapping[ChannelGroup, Sequence[int] | np.ndarray]) -> np.ndarray:
        """bool [labels]: which units stay, indexed like `Product.axes` and `ChannelGroup.classes`; -1 always stays."""
        kept = np.ones(self._count + 1, dtype=bool)
        for group, units in keep.items():
            units = np.asarray(units, dtype=np.int64)
            if len(units) == group.channels:
                continue
            if group.locked:
                raise EdgecError(f"channels cannot be removed: {group.locked}", where=group.name)
            if not len(units):
                raise EdgecError("no channel would be left", where=group.name, hint="keep at least one")
            kept[group.classes] = False
            kept[group.classes[units]] = True
        return kept

    def remove(self, module: fx.GraphModule, keep: Mapping[ChannelGroup, Sequence[int] | np.ndarray]) -> None:
        """Remove all units but `keep` of the groups given, from the weights and the sizes written in the graph.

        module: a copy of the analysed graph. Raises EdgecError for a locked group and when no unit would be left.
        """
        kept = self.kept_of(keep)
        nodes = {node.name: node for node in module.graph.nodes}
        for path, entries in self._weights.items():
            *parents, leaf = path.split(".")
            owner: Any = module
            for part in parents:
                owner = getattr(owner, part)
            tensor = getattr(owner, leaf)
            value = tensor.detach()
            for labels, _ in entries:
                axis, vector = self._vector(labels)
                if not kept[vector].all():
                    value = value.index_select(axis, torch.from_numpy(np.flatnonzero(kept[vector])))
            if value.shape != tensor.shape:
                if isinstance(tensor, torch.nn.Parameter):
                    setattr(owner, leaf, torch.nn.Parameter(value.clone(), requires_grad=False))
                else:
                    setattr(owner, leaf, value.clone())
        for node, labels in self._labels.items():
            if node.op == "call_function" and labels is not None:
                self._resize(nodes[node.name], node, labels, kept)

    def _masks(self, labels: torch.Tensor | None, shape: Sequence[int], kept: np.ndarray) -> list[np.ndarray]:
        """Which positions stay along each axis of a tensor."""
        masks = [np.ones(int(d), dtype=bool) for d in shape]
        if labels is not None:
            axis, vector = self._vector(labels)
            if labels.shape[axis] == masks[axis].size:
                masks[axis] = kept[vector]
        return masks

    def _resize(self, node: fx.Node, source: fx.Node, labels: Any, kept: np.ndarray) -> None:
        """Change the sizes in a node's arguments. `source` is its counterpart in the analysed graph."""
        name = _op_name(node)
        inputs = source.args[0]
        before = None
        if isinstance(inputs, fx.Node) and isinstance(inputs.meta.get("val"), torch.Tensor):
            before = self._masks(self._of(inputs), inputs.meta["val"].shape, kept)
        changed = before is not None and not all(m.all() for m in before)
        if isinstance(labels, torch.Tensor):
            after = self._masks(labels, source.meta["val"].shape, kept)
            changed = changed or not all(m.all() for m in after)
        else:
            after = []
        if not changed:
            return
        sizes = [int(m.sum()) for m in after]
        if name in ("view", "reshape", "_unsafe_view", "expand"):
            _set(node, 1, "size", _resized(node.args[1], source.meta["val"].shape, sizes))
        elif name == "unflatten":
            axis = int(node.args[1]) % len(before or ())  # type: ignore[arg-type]
            old: Sequence[Any] = node.args[2]  # type: ignore[assignment]
            shape = source.meta["val"].shape[axis : axis + len(old)]
            _set(node, 2, "sizes", _resized(old, shape, sizes[axis : axis + len(old)]))
        elif name in ("split", "split_with_sizes", "chunk"):
            axis = int(_argument(node, "dim", 2, 0)) % len(before or ())
            ends = np.cumsum([0] + [int(part.shape[axis]) for part in source.meta["val"]])
            assert before is not None
            parts = [int(before[axis][a:b].sum()) for a, b in itertools.pairwise(ends)]
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], parts, axis), {}
        elif name == "slice" and before is not None:
            axis = int(_argument(node, "dim", 1, 0)) % len(before)
            size = before[axis].size
            if not before[axis].all():
                start, stop, _ = slice(_argument(node, "start", 2, None), _argument(node, "end", 3, None)).indices(size)
                node.args = (node.args[0], axis, int(before[axis][:start].sum()), int(before[axis][:stop].sum()))
                node.kwargs = {}
        elif name == "narrow" and before is not None:
            axis, start, length = (int(a) for a in node.args[1:4])  # type: ignore[arg-type]
            mask = before[axis]
            node.args = (node.args[0], axis, int(mask[:start].sum()), int(mask[start : start + length].sum()))
        elif name in ("pad", "constant_pad_nd"):
            self._resize_pad(node, after)
        elif name == "layer_norm" or name == "rms_norm":
            _set(node, 1, "normalized_shape", [sizes[-1]])
        elif name == "group_norm" and before is not None:
            groups = int(node.args[1])  # type: ignore[arg-type]
            if groups > 1:
                _set(node, 1, "num_groups", groups * int(before[1].sum()) // before[1].size)
        elif self._grouped.get(source) == "whole" and before is not None:
            groups = int(_argument(node, "groups", 6, 1))
            _set(node, 6, "groups", groups * int(before[-len(sizes) + 1].sum()) // before[-len(sizes) + 1].size)

    def _resize_pad(self, node: fx.Node, after: list[np.ndarray]) -> None:
        pads: list[int] = list(node.args[1])  # type: ignore[call-overload]
        for axis, mask in enumerate(after):
            place = 2 * (len(after) - 1 - axis)
            if place + 1 < len(pads) and not mask.all():
                low, high = pads[place : place + 2]
                pads[place] = int(mask[:low].sum())
                pads[place + 1] = int(mask[mask.size - high :].sum()) if high else 0
        _set(node, 1, "pad", pads)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        space, _, name = target._schema.name.partition("::")
        return name if space == "aten" else f"{space}_{name}"
    return getattr(target, "__name__", str(target))


def _argument(node: fx.Node, name: str, index: int, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[index] if len(node.args) > index else default


def _set(node: fx.Node, index: int, name: str, value: Any) -> None:
    if name in node.kwargs or len(node.args) <= index:
        node.kwargs = {**node.kwargs, name: value}
    else:
        node.update_arg(index, value)


def _resized(written: Any, shape: Sequence[int], sizes: list[int]) -> list[Any]:
    """Sizes as written (numbers, -1, nodes) with the numbers that changed replaced."""
    offset = len(sizes) - len(written)
    return [
        new if isinstance(value, int) and value != -1 and new != int(old) else value
        for value, old, new in zip(written, shape[offset:], sizes[offset:], strict=True)
    ]


def _compressed(labels: torch.Tensor) -> torch.Tensor | None:
    """Labels with every axis along which they do not change cut to 1; None where all elements stay."""
    for axis in range(labels.dim()):
        first = labels.narrow(axis, 0, 1) if labels.shape[axis] else labels
        if labels.shape[axis] > 1 and bool((labels == first).all()):
            labels = first
    return None if bool((labels < 0).all()) else labels.contiguous()


def _varies(classes: np.ndarray, axis: int) -> bool:
    return classes.shape[axis] > 1 and bool((classes != classes.take([0], axis)).any())


def _varying(labels: torch.Tensor) -> int:
    return max(range(labels.dim()), key=lambda a: labels.shape[a])


def _line(values: np.ndarray, axis: int) -> np.ndarray:
    """The values along one axis, at index 0 of the others."""
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 0] if values.ndim else values.reshape(1)


def _positions(vector: np.ndarray) -> dict[int, np.ndarray]:
    """Positions of each unit in a vector of units, ascending."""
    order = np.argsort(vector, kind="stable")
    roots, starts = np.unique(vector[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(root): part for root, part in zip(roots, parts, strict=True) if root >= 0}


def _components(count: int, pairs: list[torch.Tensor]) -> np.ndarray:
    """The least label of each label's connected component."""
    parent = np.arange(count)
    edges = torch.cat(pairs, dim=1).numpy() if pairs else np.zeros((2, 0), dtype=np.int64)
    a, b = edges
    while True:
        left, right = parent[a], parent[b]
        apart = left != right
        if not apart.any():
            return parent
        a, b, left, right = a[apart], b[apart], left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while True:
            higher = parent[parent]
            if np.array_equal(higher, parent):
                break
            parent = higher
