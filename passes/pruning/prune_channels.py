"""Channel pruning: fewer channels, heads and groups, with every shape in the graph changed to match."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgec.cost import node_macs
from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.keep import check_patterns, fits, layer_names
from edgec.passes.pruning.groups import ChannelGroup, Channels
from edgec.passes.pruning.saliency import CRITERIA, scores
from edgec.passes.pruning.shift import add_shifts, removed_shifts
from edgec.program import Program
from edgec.sparsity import sparsities

# Multiple of channels where no device is known: two registers of NEON, one of AVX2.
DEFAULT_MULTIPLE = 8
# A group keeps at least this share of its units, whatever their scores.
MIN_SHARE = 0.125


@dataclass(frozen=True)
class ChannelReport:
    """Multiply-accumulates of one sample before the first and after the last run; units (kept, of) by group."""

    macs_before: int
    macs_after: int
    kept: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        return f"{self.macs_after / max(1, self.macs_before):.3f} of {self.macs_before} MACs"


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels until at most `macs` of the multiply-accumulates are left.

    `macs` is what remains: `prune-channels{macs=0.4}` removes 60 %. Channels that depend on each other (a residual
    stage, the two sides of a depthwise convolution, a head of attention) go together; a set that cannot be pruned is
    named with its reason. A second run counts from the model before the first, so that it changes nothing.

    What a removed channel would still contribute without its filter, act(beta - gamma mu / sigma) times the weights
    that read it, goes into the bias of its reader: exact but for the border of a zero-padded convolution, where the
    constant counts as if the padding had it too. Behind a LayerNorm there is no such constant.
    Run it before masks (`prune-1xn`) and quantisation, and recover with `recalibrate-bn` and `finetune`.

    Li et al., "Pruning Filters for Efficient ConvNets"; Fang et al., "DepGraph: Towards Any Structural Pruning".
    """

    name: ClassVar[str] = "prune-channels"
    faithful: ClassVar[bool] = False

    macs: float = option(0.5, "share of the multiply-accumulates that is left", low=0.01, high=1)
    criterion: str = option("l1", "what a channel's importance is; taylor needs --data", choices=CRITERIA)
    allocation: str = option(
        "uniform",
        "one share for all groups, or one threshold on the scores of all of them",
        choices=("uniform", "global"),
    )
    round_to: int = option(0, "multiple of channels that groups keep; 0: what the target's registers hold", low=0)
    min_channels: int = option(4, "least channels of a group", low=1)
    keep: tuple[str, ...] = option((), "layers whose channels stay")
    fold: bool = option(True, "put the constants of removed channels into the biases behind them")

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", layer_names(self.keep, f"{self.name}{{keep}}"))
        super().__post_init__()

    def run(self, program: Program, context: Context) -> Program:
        """Returns the smaller Program; annotation `prune-channels` holds the ChannelReport.

        Raises EdgecError when a weight has a mask already, for `keep` patterns that fit no layer, and for
        criterion=taylor without data.
        """
        check_patterns(program.module, self.keep, f"{self.name}{{keep}}")
        data = context.calibration_data(self) if self.criterion == "taylor" else None
        masked = sparsities(program.annotations)
        if masked:
            raise EdgecError(
                f"the weight '{next(iter(masked))}' has a mask already, which would not fit the smaller weight",
                where=f"pass {self.name}",
                hint="put prune-channels before the passes that prune with masks",
            )
        if self.macs >= 1:
            return program
        channels = Channels(program)
        groups = []
        for group in channels.groups:
            if any(fits(layer, self.keep) for layer in group.layers):
                continue
            if group.locked:
                context.skip(group.name, "channel pruning", group.locked)
            else:
                groups.append(group)
        if not groups:
            return program
        budget = Budget(program, channels, groups)
        before = program.annotations.get(self.name)
        base = before.macs_before if isinstance(before, ChannelReport) else budget.total
        target = int(self.macs * base)
        if budget.total <= target:
            return program
        found = scores(program, groups, self.criterion, data)
        steps = [self._step(group, self._multiple(context)) for group in groups]
        keep = allocate(groups, found, steps, budget, target, self.allocation, self.min_channels)
        macs = budget.macs([len(units) for units in keep.values()])
        if macs > target:
            context.skip(
                program.name, "channel pruning", f"{macs / base:.0%} of the MACs are left: no group can be less"
            )
        if macs == budget.total:
            return program
        context.log(
            f"{sum(len(k) < g.channels for g, k in keep.items())} groups pruned, {macs / base:.3f} of MACs left"
        )
        module = program.edit()
        shifts = []
        if self.fold:
            shifts, varying = removed_shifts(program, channels, keep)
            for layer in varying:
                context.skip(layer, "constant folding", "what removed channels leave behind depends on the input")
        channels.remove(module, keep)
        add_shifts(module, shifts)
        kept = tuple((group.name, len(units), group.channels) for group, units in keep.items())
        report = ChannelReport(base, macs, kept)
        return program.replace(module, {**program.annotations, self.name: report})

    def weaken(self, amount: float) -> PruneChannels:
        return dataclasses.replace(self, macs=1 - amount * (1 - self.macs) if amount < 1 else self.macs)

    def _multiple(self, context: Context) -> int:
        if self.round_to:
            return self.round_to
        return DEFAULT_MULTIPLE if context.device is None else max(4, context.device.lanes)

    def _step(self, group: ChannelGroup, multiple: int) -> int:
        """Units that are kept or removed at once, so that channel counts are multiples of `multiple`.

        Groups too small to leave a choice of four get a half, a quarter and so on of the multiple.
        """
        step = multiple // math.gcd(multiple, group.unit)
        while step > 1 and (4 * step > group.channels or group.channels % step):
            step //= 2
        return max(1, step)


class Budget:
    """Multiply-accumulates of the graph as a function of the units that each group keeps."""

    def __init__(self, program: Program, channels: Channels, groups: list[ChannelGroup]) -> None:
        nodes = {node.name: node for node in program.graph.nodes}
        macs = {name: node_macs(program, node) for name, node in nodes.items()}
        self.total = sum(macs.values())
        axes: dict[str, list[np.ndarray]] = {}
        for product in channels.products:
            if macs[product.node]:
                axes.setdefault(product.node, []).extend(product.axes)
        self.own = np.array([macs[name] for name in axes], dtype=np.float64)
        self.fixed = self.total - int(self.own.sum())
        # Positions along an axis belong to a group, or, in the last column, to none: they stay.
        owner = np.full(channels.labels + 1, len(groups))
        for number, group in enumerate(groups):
            owner[group.classes] = number
        rows = [
            np.bincount(owner[vector], minlength=len(groups) + 1) / vector.size
            for vectors in axes.values()
            for vector in vectors
        ]
        table = np.array(rows).reshape(-1, len(groups) + 1)
        self.per_unit = table[:, :-1] / np.array([group.channels for group in groups])
        self.stay = table[:, -1]
        self.starts = np.cumsum([0] + [len(vectors) for vectors in axes.values()])[:-1]

    def macs(self, numbers: Sequence[int]) -> int:
        """numbers: units kept by each group."""
        if not len(self.own):
            return self.fixed
        shares = self.per_unit @ np.asarray(numbers, dtype=np.float64) + self.stay
        return self.fixed + round(float(self.own @ np.multiply.reduceat(shares, self.starts)))


def allocate(
    groups: list[ChannelGroup],
    found: list[np.ndarray],
    steps: list[int],
    budget: Budget,
    target: int,
    allocation: str,
    min_channels: int,
) -> dict[ChannelGroup, np.ndarray]:
    """The units that each group keeps, sorted: as many as `target` multiply-accumulates allow.

    "uniform" keeps the same share of every group, "global" what scores above one threshold; counts are multiples of
    `steps`. What rounding leaves of the target is given back to the groups whose next units score highest.
    """
    orders = [np.argsort(-s, kind="stable") for s in found]
    least = []
    for group, step in zip(groups, steps, strict=True):
        floor = max(MIN_SHARE * group.channels, min_channels / group.unit)
        least.append(min(group.channels, max(step, math.ceil(floor / step - 1e-9) * step)))

    def counts(wanted: Callable[[int], float]) -> list[int]:
        result = []
        for i, (group, step) in enumerate(zip(groups, steps, strict=True)):
            n = math.floor(wanted(i) / step + 0.5) * step
            result.append(int(min(group.channels, max(least[i], n))))
        return result

    def units(numbers: list[int]) -> dict[ChannelGroup, np.ndarray]:
        return {g: np.sort(order[:n]) for g, order, n in zip(groups, orders, numbers, strict=True)}

    if allocation == "uniform":
        levels = np.linspace(0, 1, 257)
        at = [counts(lambda i, f=f: f * groups[i].channels) for f in levels]
    else:
        levels = np.unique(np.concatenate(found))[::-1]
        levels = levels[:: max(1, len(levels) // 512)]
        at = [counts(lambda i, t=t: float((found[i] > t).sum())) for t in levels]
    low, high = 0, len(at) - 1
    # Counts grow with the level, and so does the work.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if budget.macs(at[middle]) <= target else (low, middle - 1)
    numbers = at[low]
    while True:
        fuller = []
        for i, (group, step) in enumerate(zip(groups, steps, strict=True)):
            if numbers[i] < group.channels:
                more = min(group.channels, numbers[i] + step)
                value = float(found[i][orders[i][numbers[i] : more]].mean())
                share = numbers[i] / group.channels
                fuller.append((share if allocation == "uniform" else -value, i, more))
        for _, i, more in sorted(fuller):
            trial = [*numbers[:i], more, *numbers[i + 1 :]]
            if budget.macs(trial) <= target:
                numbers = trial
                break
        else:
            return units(numbers)
