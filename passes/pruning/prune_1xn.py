"""1xN pattern pruning: blocks of N consecutive output channels at one input channel, after rearranging the filters."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.keep import check_patterns, layer_names
from edgec.passes.pruning.allocation import removed
from edgec.passes.pruning.groups import ChannelGroup, Channels, Member, permute
from edgec.passes.pruning.masks import CONVS, Grain, Target, apply, prunable
from edgec.passes.pruning.plan import ALLOCATION_HELP, ALLOCATIONS, CRITERIA, Scored, rates_for, scored
from edgec.program import Program, get_weight, is_call, origin_of
from edgec.sparsity import Sparsity, sparsities
from edgec.targets.device import Device
from edgec.targets.sparsity import best_block, break_even

# Exchanging filters between blocks: passes over all pairs of blocks at most, and sums of columns in all.
SWEEPS = 10
EXCHANGE_WORK = 200_000_000
# Without a target, or where nothing pays and pruning is forced: the paper's block.
PLAIN = (4, 1)


@dataclass(frozen=True)
class Prune1xN(Pass):
    """Remove blocks of N output channels at one input channel, with all their taps, by their L1 norm.

    Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks". The filters are sorted by L1 norm first, or
    grouped so that a block holds those with large kernels at the same inputs, and physically reordered together with
    all that follows them (batch norms, depthwise layers, consumers): the function stays the same. In each layer the
    floor(sparsity x blocks) smallest blocks get zeros (balanced: of each group of N outputs), which the block-sparse
    kernels of the CPU targets skip. Accuracy comes back with `recalibrate-bn` and `finetune`.

    With a target, a layer whose kernel is slower than the dense one at its density stays dense, and a model without any
    other is refused.
    """

    name: ClassVar[str] = "prune-1xn"
    faithful: ClassVar[bool] = False

    n: int = option(0, "output channels of a block; 0: what pays on the target, 4 without one", low=0, high=64)
    sparsity: float = option(0.5, "share of the blocks that is removed", low=0, high=0.99)
    inputs: int = option(
        0, "input channels of a block; 0: as many as one instruction of the target sums up", low=0, high=16
    )
    dtype: str = option(
        "float32", "what the weights will be on the target, for n=0, inputs=0 and whether it pays",
        choices=("float32", "int8"),
    )  # fmt: skip
    allocation: str = option("uniform", ALLOCATION_HELP, choices=ALLOCATIONS)
    balanced: bool = option(True, "every group of N output channels keeps the same number of blocks")
    rearrange: bool = option(
        True, "reorder filters so that blocks hold similar ones, together with all layers they are tied to"
    )
    criterion: str = option("l1", "what goes first: the smallest L1 norms, or any (a baseline)", choices=CRITERIA)
    keep: tuple[str, ...] = option((), "layers to leave dense: names, or patterns such as blocks.3.*")
    force: bool = option(False, "prune although the target does not gain")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", layer_names(self.keep, f"{self.name}{{keep}}"))

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with masked, reordered weights and their Sparsity records.

        Raises EdgecError for a target on which nothing of it is faster than dense, and for an allocation that needs
        calibration data where there is none.
        """
        check_patterns(program.module, self.keep, f"{self.name}{{keep}}")
        if self.sparsity == 0:
            return program
        block = self.block(context.device)
        targets = self._fitting(program, block, context)
        grain = Grain("block", block)
        module = program.edit()
        if self.rearrange and self.criterion == "l1" and targets:
            rearrange(module, targets, grain, self.sparsity, self.balanced, context, sparsities(program.annotations))
        ordered = program.replace(module)
        targets = [_again(ordered.module, t) for t in targets]
        layers = scored(targets, grain, self.criterion, context.seed)
        rates = rates_for(self, context, ordered, layers, self.allocation, self.sparsity, self.balanced)
        chosen = self._paying(layers, rates, block, context)
        records: dict[str, Sparsity] = {}
        for layer, rate in chosen:
            mask = layer.mask(rate, self.balanced)
            if not bool(mask.all()):
                records[layer.target.path] = grain.record(mask, self.balanced)
        return apply(ordered, records) if records else program

    def block(self, device: Device | None) -> tuple[int, int]:
        """(output, input) channels of a block for this target. Raises EdgecError where the target gains from none."""
        best = None if device is None else best_block(device, self.dtype)
        if device is not None and best is None and 0 in (self.n, self.inputs) and not self.force:
            raise EdgecError(
                f"no block-sparse {self.dtype} kernel is known to pay on {device.name}",
                where=f"pass {self.name}",
                hint="use prune-channels, or force=true",
            )
        n, inputs = best or PLAIN
        if self.n:  # the instruction decides on the inputs, not on the outputs
            return self.n, self.inputs or (inputs if device is not None else 1)
        return n, self.inputs or inputs

    def _fitting(self, program: Program, block: tuple[int, int], context: Context) -> list[Target]:
        """The layers that have blocks of this size and none yet."""
        given, found = sparsities(program.annotations), []
        for target in prunable(program.module, self.keep, context):
            outputs, inputs = target.shape[:2]
            if target.path in given:
                context.skip(target.layer, "not pruned", "is pruned already")
            elif outputs < block[0] or inputs % block[1]:
                reason = f"{outputs} outputs and {inputs} inputs have no blocks of {block[0]}x{block[1]}"
                context.skip(target.layer, "not pruned", reason)
            else:
                found.append(target)
        return found

    def _paying(
        self, layers: Sequence[Scored], rates: Sequence[float], block: tuple[int, int], context: Context
    ) -> list[tuple[Scored, float]]:
        """The layers that are faster with blocks than dense at the density they get; the others are reported."""
        if context.device is None:
            return list(zip(layers, rates, strict=True))
        found, reasons = [], []
        for layer, rate in zip(layers, rates, strict=True):
            kernel = kernel_name(layer.target)
            even = break_even(context.device, self.dtype, block, kernel)
            density = 1 - rate
            if even is not None and density < even:
                found.append((layer, rate))
                continue
            where = f"{kernel} {self.dtype} blocks of {block[0]}x{block[1]} on {context.device.name}"
            limit = "never break even" if even is None else f"break even at a density of {even:.2f}"
            reasons.append(f"{where} {limit}, this is {density:.2f}")
            if self.force:
                found.append((layer, rate))
            context.skip(layer.target.layer, "will not be faster" if self.force else "not pruned", reasons[-1])
        if layers and not found:
            hint = "use n=0 and a higher sparsity, prune-channels, or force=true"
            raise EdgecError(reasons[0], where=f"pass {self.name}", hint=hint)
        return found

    def weaken(self, amount: float) -> Pass:
        return dataclasses.replace(self, sparsity=self.sparsity * amount)


def kernel_name(target: Target) -> str:
    """What the table of break-even densities calls the kernel of a layer: "1x1", also for linear, or "3x3"."""
    return "3x3" if is_call(target.node, *CONVS) and any(n > 1 for n in target.shape[2:]) else "1x1"


# -- rearrangement -----------------------------------------------------------------------------------------------------


def rearrange(
    module: fx.GraphModule,
    targets: Sequence[Target],
    grain: Grain,
    sparsity: float,
    balanced: bool,
    context: Context,
    pruned: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Reorder the channels of a graph so that the blocks of `targets` hold filters of similar L1 norm, in place.

    Each dependency group gets one order, ascending in the L1 norm summed over all of its layers that are pruned.
    Balanced blocks gain little from that, since groups of small filters keep as much as those of large ones: there,
    filters are also exchanged between blocks as long as that retains more. The order that retains the most L1 mass is
    applied, if that is more than without. Groups that cannot be reordered are reported.

    Returns the orders by name of the group: unit i is what unit order[i] was. The function of the graph stays the same
    up to the order of additions. pruned: paths of weights whose masks would have to move.
    """
    wanted, channels = {t.path: t for t in targets}, Channels(module)
    tensors = {str(n.target): get_weight(module, n) for n in module.graph.nodes if n.op == "get_attr"}
    orders: dict[str, np.ndarray] = {}
    for group in channels.groups:
        made = [m for m in group.members if m.role == "out" and m.axis == 0 and m.weight in wanted]
        if not made:
            continue
        reason = group.locked
        if reason is None and group.unit > 1:
            reason = f"its channels move in units of {group.unit}"
        if reason is None and any(m.weight in pruned for m in group.members):
            reason = "a layer with these channels is pruned already"
        if reason is not None:
            context.skip(group.name, "filters not rearranged", reason)
            continue
        layers = [wanted[m.weight] for m in made]
        saliency = np.zeros(group.channels)
        for member in made:
            norms = tensors[member.weight].abs().double().flatten(1).sum(1).numpy()
            saliency += norms[member.index].sum(1)
        candidates = [np.argsort(saliency, kind="stable")]
        if balanced:
            candidates += _clustered(tensors, made, grain, sparsity, candidates[0])
        gains = [_gain(tensors, group, o, layers, grain, sparsity, balanced) for o in candidates]
        order = candidates[int(np.argmax(gains))]
        if max(gains) > 0:
            permute(module, group, order)
            orders[group.name] = order
            for node in channels.nodes(group):
                # No longer channel by channel what the original computes there.
                node.meta["edgec_origin"] = f"{origin_of(node)}, rearranged"
    return orders


def _clustered(
    tensors: dict[str, torch.Tensor], made: Sequence[Member], grain: Grain, sparsity: float, ascending: np.ndarray
) -> list[np.ndarray]:
    """Orders in which filters whose large kernels lie at the same inputs share a block, found by exchanging pairs.

    Starts from the order there is and from `ascending`. Nothing where the blocks of the layers are not the same ones.
    """
    n = grain.block[0]
    slots = made[0].index[:, 0] // n
    places = np.argsort(slots, kind="stable")
    _, sizes = np.unique(slots, return_counts=True)
    same = all(m.index.shape[1] == 1 and np.array_equal(m.index[:, 0] // n, slots) for m in made)
    if not same or (sizes != n).any() or len(sizes) < 2:
        return []
    parts, kept = [], []
    for member in made:
        single = Grain("block", (1, grain.block[1])).table(tensors[member.weight]).numpy()
        parts.append(single[member.index[:, 0]])
        kept.append(single.shape[1] - removed(sparsity, single.shape[1]))
    found = []
    for start in (np.arange(len(slots)), ascending):
        order = np.empty(len(slots), np.int64)
        order[places] = exchange(parts, kept, start[places].reshape(-1, n)).reshape(-1)
        found.append(order)
    return found


def exchange(parts: Sequence[np.ndarray], kept: Sequence[int], groups: np.ndarray) -> np.ndarray:
    """Exchange members between groups while the retained mass grows: the best exchange of each pair of groups in turn.

    parts: for each layer the norms [filters, columns]. kept: for each layer, the columns that a group keeps. groups:
    [groups, n] numbers of filters. Returns groups of the same shape; a local maximum, or where the time for it is up.
    """
    groups = groups.copy()
    count, n = groups.shape
    work = count * (count - 1) * n * n * sum(p.shape[1] for p in parts)
    for _ in range(max(1, min(SWEEPS, EXCHANGE_WORK // max(1, work)))):
        changed = False
        for g in range(count):
            for h in range(g + 1, count):
                gain = np.zeros((n, n))
                for part, k in zip(parts, kept, strict=True):
                    first, second = part[groups[g]], part[groups[h]]
                    sums = np.stack([first.sum(0), second.sum(0)])
                    moved = second[None] - first[:, None]  # [member of g, member of h, columns]
                    after = _largest(sums[0] + moved, k) + _largest(sums[1] - moved, k)
                    gain += after - _largest(sums, k).sum()
                i, j = np.unravel_index(int(gain.argmax()), gain.shape)
                if gain[i, j] > 1e-9:
                    groups[g, i], groups[h, j] = groups[h, j], groups[g, i]
                    changed = True
        if not changed:
            break
    return groups


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Sum of the k largest along the last axis."""
    rest = values.shape[-1] - k
    return values.sum(-1) if rest <= 0 else np.partition(values, rest, axis=-1)[..., rest:].sum(-1)


def _gain(
    tensors: dict[str, torch.Tensor],
    group: ChannelGroup,
    order: np.ndarray,
    targets: Sequence[Target],
    grain: Grain,
    sparsity: float,
    balanced: bool,
) -> float:
    """L1 mass that is retained with the order over that without, summed over the layers whose filters move."""
    total = 0.0
    for path in dict.fromkeys(t.path for t in targets):
        weight, target = tensors[path], next(t for t in targets if t.path == path)
        rows = np.arange(len(weight))
        for member in group.members:
            if member.weight == path and member.axis == 0:
                rows[member.index.ravel()] = member.index[order].ravel()
        before = Scored(target, grain, grain.table(weight))
        after = Scored(target, grain, grain.table(weight[torch.from_numpy(rows)]))
        total += after.retained(sparsity, balanced) - before.retained(sparsity, balanced)
    return total


def _again(module: fx.GraphModule, target: Target) -> Target:
    """The same target in an edited copy of its graph."""
    (node,) = [n for n in module.graph.nodes if n.name == target.node.name]
    return Target(target.path, node, target.layer, get_weight(module, node.args[1]))
