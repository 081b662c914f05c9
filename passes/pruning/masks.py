"""What pruning passes share: which weights they may prune, scores of grains, masks, and applying them.

A grain is what is kept or removed as one; a `Grain` divides a weight [O, I, *window] into a table of grains whose
scores are the L1 norms of their elements. The functions on tables are pure; a pass puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.keep import fits
from edgec.program import Program, constant_of, get_weight, is_call, layer_of
from edgec.sparsity import Sparsity, sparsities

aten = torch.ops.aten

CONVS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
LAYERS = (*CONVS, aten.linear.default)


@dataclass(frozen=True)
class Target:
    """A weight that may be pruned: its path, the layer that reads it, and the layer's name."""

    path: str
    node: fx.Node
    layer: str
    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


# -- which weights -----------------------------------------------------------------------------------------------------


def prunable(module: fx.GraphModule, keep: Sequence[str] = (), context: Context | None = None) -> list[Target]:
    """Weights of convolutions without groups and of linear layers, in graph order, that have one reader.

    Left out: the first convolution that reads an input of the model with at most 4 channels (few weights, the most
    sensitive ones), the classifier (a linear layer, or a convolution, whose result reaches the output through no other
    layer), depthwise and grouped convolutions, weights that are shared or computed, and layers that fit `keep`.
    context: gets a Skip, with the reason, for each layer left out.
    """
    readers: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    layers = [n for n in module.graph.nodes if is_call(n, *LAYERS)]
    last = _classifiers(module) if len(layers) > 1 else set()
    found = []
    for node in layers:
        reason = _reason(module, node, readers, last, keep)
        if reason is None:
            path = str(node.args[1].target)
            found.append(Target(path, node, layer_of(node), get_weight(module, node.args[1])))
        elif context is not None:
            context.skip(layer_of(node), "not pruned", reason)
    return found


def _reason(
    module: fx.GraphModule, node: fx.Node, readers: Mapping[str, int], last: set[fx.Node], keep: Sequence[str]
) -> str | None:
    """Why a layer is not pruned, or None."""
    if fits(layer_of(node), keep):
        return "is kept by option"
    weight = constant_of(module, node.args[1])
    if weight is None:
        return "its weight is computed, not stored"
    if not weight.dtype.is_floating_point:
        return "its weight is quantised"
    if readers[str(node.args[1].target)] > 1:  # type: ignore[union-attr]
        return "its weight is shared with another layer"
    if is_call(node, *CONVS):
        if groups_of(node) > 1:
            return "is a depthwise or grouped convolution"
        source = node.args[0]
        if isinstance(source, fx.Node) and weight.shape[1] <= 4 and _from_input(source):
            return "is the first convolution"
    return "is the classifier" if node in last else None


def groups_of(node: fx.Node) -> int:
    """Groups of a convolution call; 1 for a linear layer."""
    if not is_call(node, *CONVS):
        return 1
    return int(node.args[6]) if len(node.args) > 6 else int(node.kwargs.get("groups", 1))  # type: ignore[arg-type]


def _from_input(node: fx.Node) -> bool:
    """True when no layer stands between an input of the model and `node`."""
    while node.op == "call_function" and not is_call(node, *LAYERS):
        sources = [a for a in node.all_input_nodes if a.op != "get_attr"]
        if len(sources) != 1:
            return False
        node = sources[0]
    return node.op == "placeholder"


def _classifiers(module: fx.GraphModule) -> set[fx.Node]:
    """Linear layers that feed the output of the graph with no layer behind them and a result without positions.

    The last convolution of a network of images is no classifier: its result has a height and a width.
    """
    (out,) = [n for n in module.graph.nodes if n.op == "output"]
    found, seen, queue = set(), set(), list(out.all_input_nodes)
    while queue:
        node = queue.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_call(node, *LAYERS):
            size = node.meta["val"].shape
            if len(size) == 2 or all(n == 1 for n in size[2:]):
                found.add(node)
        else:
            queue += node.all_input_nodes
    return found


# -- grains ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grain:
    """How a weight [O, I, *window] is divided.

    kind: "weight" (0-D), "row" (1-D, a row of a kernel), "kernel" (2-D, all taps of one output and input channel),
    "filter" (3-D, one output channel), or "block": `block` = (output channels, input channels) with all their taps.
    A block never straddles: where the output channels are no multiple of `block[0]`, the last ones form a block of
    their own, as if the weight were padded with zeros.
    """

    kind: str
    block: tuple[int, int] = (1, 1)

    def table(self, weight: torch.Tensor) -> torch.Tensor:
        """L1 norm of every grain: [outputs or groups of them, grains of one of them], float64.

        Raises EdgecError where the input channels are no multiple of `block[1]`.
        """
        size = weight.abs().double()
        if self.kind == "weight":
            return size.reshape(len(size), -1)
        if self.kind == "row":
            return (size.sum(-1) if size.dim() > 2 else size).reshape(len(size), -1)
        if self.kind == "filter":
            return size.reshape(len(size), -1).sum(1, keepdim=True)
        out, inside = self.block
        if size.shape[1] % inside:
            raise EdgecError(f"{size.shape[1]} input channels are not a multiple of {inside}", where="pruning")
        kernels = size.flatten(2).sum(2) if size.dim() > 2 else size
        groups = -(-len(kernels) // out)
        padded = torch.cat([kernels, kernels.new_zeros(groups * out - len(kernels), kernels.shape[1])])
        return padded.reshape(groups, out, -1, inside).sum((1, 3))

    def elements(self, shape: Sequence[int]) -> int:
        """Weights in one (whole) grain of a weight of this shape."""
        taps = 1
        for n in shape[2:]:
            taps *= n
        if self.kind == "weight":
            return 1
        if self.kind == "row":
            return shape[-1] if len(shape) > 2 else 1
        return shape[1] * taps if self.kind == "filter" else self.block[0] * self.block[1] * taps

    def expand(self, kept: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The mask of a weight of this shape for a table of what is kept."""
        mask = torch.ones(tuple(shape), dtype=torch.bool)
        if self.kind == "weight":
            return kept.reshape(tuple(shape)).clone()
        if self.kind == "row":
            return (kept.reshape(*shape[:-1], 1) if len(shape) > 2 else kept.reshape(tuple(shape))) & mask
        trailing = [1] * (len(shape) - 2)
        if self.kind == "filter":
            return kept.reshape(-1, 1, *trailing) & mask
        out, inside = self.block
        wide = kept.repeat_interleave(out, 0).repeat_interleave(inside, 1)[: shape[0]]
        return wide.reshape(*wide.shape, *trailing) & mask

    def record(self, mask: torch.Tensor, balanced: bool) -> Sparsity:
        """The annotation for a mask of this grain: a row is a pattern that no kernel of ours walks in blocks."""
        if self.kind in ("weight", "row"):
            return Sparsity("unstructured", (1, 1), mask)
        block = {"kernel": (1, 1), "filter": (1, mask.shape[1])}.get(self.kind, self.block)
        return Sparsity("block", block, mask, balanced)


def choose(scores: torch.Tensor, removed: int, balanced: bool = False) -> torch.Tensor:
    """The table of what is kept when the `removed` lowest grains go; of equal ones, the first goes first.

    scores: [groups, grains of a group]. balanced: every group loses the same number, floor(removed / groups); what is
    left of `removed` over that is kept, so that all groups stay equal.
    """
    if not 0 <= removed <= scores.numel():
        raise EdgecError(f"{removed} of {scores.numel()} grains cannot be removed", where="pruning")
    kept = torch.ones_like(scores, dtype=torch.bool)
    if balanced:
        each = removed // max(1, len(scores))
        order = scores.argsort(dim=1, stable=True)[:, :each]
        return kept.scatter(1, order, torch.zeros_like(order, dtype=torch.bool))
    kept.view(-1)[scores.reshape(-1).argsort(stable=True)[:removed]] = False
    return kept


# -- applying ----------------------------------------------------------------------------------------------------------


def apply(program: Program, records: Mapping[str, Sparsity]) -> Program:
    """The Program with zeros where `records` (by weight path) prune, and the records as annotations.

    Raises EdgecError for a weight that is not there, has another shape, or already has a record whose pruned elements
    would come back.
    """
    module, given = program.edit(), sparsities(program.annotations)
    weights = program.weights()
    for path, record in records.items():
        if path not in weights or weights[path].shape != record.mask.shape:
            raise EdgecError(f"no weight '{path}' of shape {tuple(record.mask.shape)}", where=program.name)
        if path in given and bool((record.mask & ~given[path].mask).any()):
            raise EdgecError(
                f"'{path}' is pruned already, with another mask", where=program.name, hint="use one pruning pass"
            )
    done = set()
    for node in module.graph.nodes:
        path = str(node.target)
        if node.op == "get_attr" and path in records and path not in done:
            done.add(path)
            get_weight(module, node).masked_fill_(~records[path].mask, 0.0)
    return program.replace(module, {**program.annotations, **records})


def achieved(program: Program) -> tuple[float, float]:
    """(share removed of the weights that have a record, share removed of all weights), each 0..1."""
    records = sparsities(program.annotations)
    removed = sum(int((~r.mask).sum()) for r in records.values())
    within = sum(r.mask.numel() for r in records.values())
    total = sum(w.numel() for w in program.weights().values())
    return removed / max(1, within), removed / max(1, total)
