"""What a removed channel leaves behind: the constant it becomes without its filter, for its readers' biases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from edgec.passes.pruning.groups import CONVOLUTIONS, ChannelGroup, Channels
from edgec.program import Program, constant_of, get_weight, is_call, layer_of, weight_node

aten = torch.ops.aten

# A value is a constant when it differs less than this, relative to its size, between samples and places.
CONSTANT = 1e-5


@dataclass(frozen=True)
class Shift:
    """What to add to the outputs of the layer at `node`, all that it had before; `kept` are those that stay."""

    node: str
    delta: torch.Tensor
    kept: np.ndarray


def removed_shifts(
    program: Program, channels: Channels, keep: dict[ChannelGroup, np.ndarray]
) -> tuple[list[Shift], list[str]]:
    """The contribution of removed channels to each layer that reads them, and layers where it is no constant.

    A channel whose filters are zero is a constant, act(beta - gamma mu / sigma) behind a batch norm and an activation,
    and adds it times the sum of its weights to each output of a reader. The constants are not derived but measured: the
    graph is run with the filters at zero, which follows them through any operators. Exact without zero padding in the
    reader; with padding exact but at the border, where fewer taps see the constant.
    """
    module = program.edit()
    kept = channels.kept_of(keep)
    weights = {str(n.target): get_weight(module, n) for n in module.graph.nodes if n.op == "get_attr"}
    with torch.no_grad():
        for group, units in keep.items():
            gone = np.setdiff1d(np.arange(group.channels), units)
            for member in group.members:
                if member.role == "out":
                    weights[member.weight].index_fill_(
                        member.axis, torch.from_numpy(member.index[gone].ravel().astype(np.int64)), 0.0
                    )
    inputs = program.batch_inputs(max(2, program.example_inputs[0].shape[0]))
    recorder = _Inputs(module, {p.node for p in channels.products})
    with torch.no_grad():
        recorder.run(*inputs)
    nodes = {node.name: node for node in program.graph.nodes}
    shifts, varying = [], []
    for product in channels.products:
        value, node = recorder.seen.get(product.node), nodes[product.node]
        if value is None or len(product.axes) != 2 or kept[product.axes[1]].all():
            continue
        weight = get_weight(program.module, node.args[1])  # type: ignore[arg-type]
        axis = value.dim() - 1 if is_call(node, aten.linear.default) else value.dim() - weight.dim() + 1
        lines = value.movedim(axis, 0).flatten(1)
        groups = len(lines) // weight.shape[1]
        gone = torch.from_numpy(np.tile(~kept[product.axes[1]], groups))
        low, high = lines.amin(1), lines.amax(1)
        constant = (high - low) <= CONSTANT * torch.maximum(low.abs(), high.abs()).clamp_min(1e-6)
        if not bool(constant[gone].all()):
            varying.append(layer_of(node))
        values = torch.where(gone & constant, (low + high) / 2, 0.0).reshape(groups, 1, -1)
        sums = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        delta = (sums.reshape(groups, -1, weight.shape[1]) * values).sum(2).reshape(-1)
        if bool((delta != 0).any()):
            shifts.append(Shift(product.node, delta, kept[product.axes[0]]))
    return shifts, varying


def add_shifts(module: fx.GraphModule, shifts: list[Shift]) -> None:
    """Add each shift to its layer's bias, or take it off the running mean of the batch norm behind it."""
    nodes = {node.name: node for node in module.graph.nodes}
    for shift in shifts:
        node = nodes[shift.node]
        delta = shift.delta[torch.from_numpy(shift.kept)]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        owner = constant_of(module, bias)
        users = list(node.users)
        if owner is None and len(users) == 1 and is_call(users[0], aten.batch_norm.default):
            owner, delta, bias = constant_of(module, users[0].args[3]), -delta, users[0].args[3]
        if owner is not None and isinstance(bias, fx.Node) and _reads(module, str(bias.target)) == 1:
            with torch.no_grad():
                owner.add_(delta)
            continue
        with module.graph.inserting_before(node):
            value = delta if owner is None else owner + delta
            path = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
            added = weight_node(module, f"{path}.shift" if path else "shift", value)
        if len(node.args) > 2:
            node.update_arg(2, added)
        else:
            node.kwargs = {**node.kwargs, "bias": added}


def _reads(module: fx.GraphModule, path: str) -> int:
    return sum(len(n.users) for n in module.graph.nodes if n.op == "get_attr" and n.target == path)


class _Inputs(fx.Interpreter):
    """Runs a graph and keeps the first input of the convolutions and linear layers named."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.names = names
        self.seen: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.name in self.names and is_call(n, *CONVOLUTIONS, aten.linear.default):
            source = n.args[0]
            while is_call(source, aten.pad.default, aten.constant_pad_nd.default):
                # Zeros at the border that are an operator of their own are the reader's padding all the same.
                if self.env[source].shape[1] != self.env[source.args[0]].shape[1]:  # type: ignore[index, union-attr]
                    break
                source = source.args[0]  # type: ignore[union-attr]
            self.seen[n.name] = self.env[source]  # type: ignore[index]
        return super().run_node(n)
