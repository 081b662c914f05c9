"""Token reduction: which tokens are merged, pruned or kept, and what becomes of them.

The meaning is that of `edgec.tokenops`. Nothing is sorted: the place of a score is the number of scores before it,
which is a row of comparisons. What becomes of each token is an int32 slot: its row in the result, DROPPED, or
MERGED - t where it is added to row t. Rows are then copied, and sources added in the order of their indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.elementary import exp_of_nonpositive, log
from edgec.targets.kernels import common
from edgec.targets.kernels.attention import View
from edgec.targets.kernels.common import const, loop, param, ramp, round_up, splat
from edgec.targets.kernels.matmul import Tile, Widths, blocking, column_blocks, each_block, row_blocks, span
from edgec.targets.kernels.rows import Reduction, strip, transpose
from edgec.targets.kernels.softmax import maximum
from edgec.targets.tir import T, tirx

# As in `edgec.tokenops`, which needs torch.
NORM_EPS = 1e-6
LOWEST = -3.0e38
DROPPED = -1
MERGED = -2
# What is compared with an index that does not count.
BEHIND = 2.0**24


class _Kernel:
    """What all templates here share: no weights, and no result in the memory of an operand."""

    inplace = ()
    macs = 0

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()


def number(value: Any, lanes: int) -> Any:
    """At least LOWEST, which NaN becomes too: the comparison chooses its second operand where the first is NaN."""
    return tirx.max(value, const(LOWEST, "float32", lanes))


def _count(reduction: Reduction, extent: int, before: Callable[[Any, int], Any], store: Callable[[Any], None]) -> None:
    """How many of 0..extent a vector of conditions holds for; float32, as the reduction is."""
    one, zero = 1.0, 0.0
    reduction.row(
        extent,
        lambda offset, width: tirx.Select(
            before(offset, width), const(one, "float32", width), const(zero, "float32", width)
        ),
        store,
    )


class _Ranks:
    """Places of scores in falling order, equal ones by index; make it before the first loop of a kernel."""

    def __init__(self, device: Device, extent: int) -> None:
        self.extent, self.lanes = extent, device.lanes
        self.reduction = Reduction(device.lanes)
        self.score = T.alloc_buffer((extent,), "float32")
        self.index = T.alloc_buffer((extent,), "float32")
        self.place = T.alloc_buffer((extent,), "int32")
        loop(extent, lambda i: T.buffer_store(self.index, _int(i).astype("float32"), [i]))

    def find(self) -> None:
        """place[i] of all scores, which must be numbers."""

        def one(i: Any) -> None:
            def before(offset: Any, width: int) -> Any:
                other, mine = self.score[ramp(offset, width)], splat(self.score[i], width)
                equal = tirx.And(other == mine, self.index[ramp(offset, width)] < splat(self.index[i], width))
                return tirx.Or(other > mine, equal)

            _count(
                self.reduction,
                self.extent,
                before,
                lambda total: T.buffer_store(self.place, total.astype("int32"), [i]),
            )

        loop(self.extent, one)


class _Matching:
    """The most similar column for each row, by cosine; make it before the first loop of a kernel."""

    def __init__(self, device: Device, rows: int, columns: int, depth: int) -> None:
        self.device, self.lanes = device, device.lanes
        self.rows, self.columns, self.depth = rows, columns, depth
        self.height, vectors = blocking(device)
        self.blocks = column_blocks(columns, device.lanes, vectors)
        self.tile = Tile(device)
        self.reduction = Reduction(device.lanes)
        widest = max(span(widths) for _, _, widths in self.blocks)
        self.panel = T.alloc_buffer((depth, round_up(widest, device.lanes)), "float32")
        self.scores = T.alloc_buffer((rows, columns), "float32")
        self.norms = T.alloc_buffer((rows,), "float32"), T.alloc_buffer((columns,), "float32")
        self.index = T.alloc_buffer((columns,), "float32")
        self.best = T.alloc_buffer((rows,), "int32")
        self.largest = T.alloc_buffer((rows,), "float32")
        self.state = T.alloc_buffer((1,), "float32", scope="local")
        loop(columns, lambda j: T.buffer_store(self.index, _int(j).astype("float32"), [j]))

    def find(
        self, left: Callable[[Any, Any, int], Any], right: Callable[[Any, Any, int], Any], without_first: bool = False
    ) -> None:
        """best[i] and largest[i] for left and right(row, depth, neighbours); `without_first` leaves column 0 out."""
        for norms, count, read in ((self.norms[0], self.rows, left), (self.norms[1], self.columns, right)):
            loop(count, lambda i, norms=norms, read=read: self._norm(norms, i, read))

        def columns(first: Any, widths: Widths) -> None:
            transpose(
                span(widths),
                self.depth,
                lambda j, d, width: right(first + j, d, width),
                lambda d, j, width, value: T.buffer_store(self.panel, value, [d, ramp(j, width)]),
            )

            def block(row: Any, count: int) -> None:
                self.tile.multiply(
                    self.depth,
                    count,
                    widths,
                    lambda i, d, size: left(row + i, d, size),
                    lambda d, offset, size: self.panel[d, ramp(offset, size)],
                    "depth",
                )
                for i in range(count):
                    for v, (offset, size) in enumerate(widths):
                        here = ramp(first + offset, size)
                        cosine = self.tile.at(i, v, size) * splat(self.norms[0][row + i], size) * self.norms[1][here]
                        T.buffer_store(self.scores, number(cosine, size), [row + i, here])

            row_blocks(self.rows, self.height, block)

        each_block(self.blocks, columns)
        loop(self.rows, lambda i: self._choose(i, without_first))

    def _norm(self, norms: Any, i: Any, read: Callable[[Any, Any, int], Any]) -> None:
        def put(total: Any) -> None:
            one, eps = const(1.0, "float32"), const(NORM_EPS, "float32")
            T.buffer_store(norms, one / (tirx.sqrt(total) + eps), [i])

        self.reduction.row(self.depth, lambda d, width: read(i, d, width) * read(i, d, width), put)

    def _choose(self, i: Any, without_first: bool) -> None:
        if without_first:
            T.buffer_store(self.scores, const(-math.inf, "float32"), [i, 0])
        maximum(self.reduction, self.columns, lambda offset, width: self.scores[i, ramp(offset, width)], self.state)
        T.buffer_store(self.largest, self.state[0], [i])

        def index(offset: Any, width: int) -> Any:
            hit = self.scores[i, ramp(offset, width)] == splat(self.state[0], width)
            return tirx.Select(hit, self.index[ramp(offset, width)], const(BEHIND, "float32", width))

        self.reduction.row(
            self.columns,
            index,
            lambda value: T.buffer_store(self.best, value.astype("int32"), [i]),
            tirx.min,
            BEHIND,
        )


@dataclass(frozen=True)
class TomeSlots(_Kernel):
    """Slots [batch, tokens] of `edgec.tokenops.tome_slots`; metric: view [batch, heads, tokens, depth] of keys.

    Similarity is measured on the mean over heads.
    """

    batch: int
    heads: int
    tokens: int
    depth: int
    metric: View
    r: int
    prefix: int
    distilled: bool

    name = "tome_slots"

    @property
    def start(self) -> int:
        return 0 if self.prefix <= 1 or self.distilled else self.prefix

    @property
    def halves(self) -> tuple[int, int]:
        """Tokens that may be merged, and tokens that they may be merged into."""
        free = self.tokens - self.start
        return (free + 1) // 2, free // 2

    @property
    def macs(self) -> int:
        return self.batch * self.halves[0] * self.halves[1] * self.depth

    def prim_func(self, device: Device) -> Any:
        """Parameters: metric, y."""
        lanes, (first, second) = device.lanes, self.halves
        start, kept = self.start, self.halves[0] - self.r
        with common.prim_func(self.name, self.inplace) as builder:
            metric = param("metric", (self.metric.size,), "float32")
            y = param("y", (self.batch, self.tokens), "int32")
            sides = [T.alloc_buffer((count, self.depth), "float32") for count in (first, second)]
            matching = _Matching(device, first, second, self.depth)
            ranks = _Ranks(device, first)
            kept_so_far = T.alloc_buffer((1,), "int32", scope="local")

            def sample(b: Any) -> None:
                for side, buffer in enumerate(sides):
                    loop(halves[side], lambda i, side=side, buffer=buffer: gather(b, i, side, buffer))
                matching.find(
                    *(lambda i, d, width, s=side: s[i, ramp(d, width)] for side in sides),  # type: ignore[misc]
                    without_first=self.distilled,
                )
                loop(first, lambda i: T.buffer_store(ranks.score, matching.largest[i], [i]))
                if start == 0 and self.prefix > 0:
                    T.buffer_store(ranks.score, const(-math.inf, "float32"), [0])
                ranks.find()
                loop(start, lambda i: T.buffer_store(y, _int(i), [b, i]))
                T.buffer_store(kept_so_far, const(0, "int32"), [0])
                loop(first, lambda i: left(b, i))
                loop(second, lambda j: T.buffer_store(y, right(_int(j)), [b, start + 2 * j + 1]))

            halves = (first, second)

            def gather(b: Any, i: Any, side: int, buffer: Any) -> None:
                view = self.metric
                at = view.offset + b * view.strides[0] + (start + side + 2 * i) * view.strides[2]

                def vector(d: Any, width: int) -> None:
                    def key(h: int) -> Any:
                        where = at + h * view.strides[1] + d * view.strides[3]
                        return metric[ramp(where, width)]

                    total = key(0)
                    for h in range(1, self.heads):
                        total = total + key(h)
                    if self.heads > 1:
                        total = total / const(float(self.heads), "float32", width)
                    T.buffer_store(buffer, total, [i, ramp(d, width)])

                strip(self.depth, lanes if view.strides[3] == 1 or self.depth == 1 else 1, vector)

            def right(j: Any) -> Any:
                """Row of token j of the second set."""
                if self.distilled:
                    return tirx.Select(j > const(0, "int32"), j + const(kept, "int32"), const(1, "int32"))
                return j + const(start + kept, "int32")

            def left(b: Any, i: Any) -> None:
                here = [b, start + 2 * i]
                with T.If(ranks.place[i] < const(self.r, "int32")):
                    with T.Then():
                        T.buffer_store(y, const(MERGED, "int32") - right(matching.best[i]), here)
                    with T.Else():
                        row = kept_so_far[0]
                        if self.distilled:
                            # The distillation token comes second.
                            row = row + tirx.Select(row > const(0, "int32"), const(1, "int32"), const(0, "int32"))
                        T.buffer_store(y, row + const(start, "int32"), here)
                        T.buffer_store(kept_so_far, kept_so_far[0] + const(1, "int32"), [0])

            loop(self.batch, sample)
        return builder.get()

    def reference(self, metric: np.ndarray) -> np.ndarray:
        """NumPy meaning; `metric` is the tensor that the view looks at."""
        keys = self.metric.read(metric, (self.batch, self.heads, self.tokens, self.depth)).astype(np.float64).mean(1)
        start, (first, second) = self.start, self.halves
        y = np.empty((self.batch, self.tokens), np.int32)
        for b in range(self.batch):
            y[b, :start] = np.arange(start)
            similarity = _cosines(keys[b, start::2], keys[b, start + 1 :: 2])
            if start == 0 and self.prefix > 0:
                similarity[0] = -np.inf
            if self.distilled:
                similarity[:, 0] = -np.inf
            merged = set(np.argsort(-similarity.max(1), kind="stable")[: self.r].tolist())
            left = [start + 2 * i for i in range(first) if i not in merged]
            right = [start + 2 * j + 1 for j in range(second)]
            order = [*range(start), *left, *right]
            if self.distilled:
                order = [left[0], right[0], *left[1:], *right[1:]]
            for row, token in enumerate(order):
                y[b, token] = row
            for i in merged:
                y[b, start + 2 * i] = MERGED - y[b, start + 2 * similarity[i].argmax() + 1]
        return y


@dataclass(frozen=True)
class ReduceSlots(_Kernel):
    """Slots [batch, tokens] of `edgec.tokenops.reduce_slots`, or without `ordered` of `keep_slots` (merge = keep).

    x [batch, tokens, channels] is read only where tokens are merged (merge < keep); score [batch, tokens - prefix].
    """

    batch: int
    tokens: int
    channels: int
    prefix: int
    keep: int
    merge: int
    ordered: bool = True

    name = "reduce_slots"

    @property
    def merges(self) -> bool:
        return self.merge < self.keep

    @property
    def macs(self) -> int:
        return self.batch * (self.keep - self.merge) * (self.merge - self.prefix) * self.channels

    def prim_func(self, device: Device) -> Any:
        """Parameters: [x], score, y."""
        lanes, prefix = device.lanes, self.prefix
        free, kept, sources = self.tokens - prefix, self.merge - prefix, self.keep - self.merge
        with common.prim_func(self.name, self.inplace) as builder:
            x: Any = param("x", (self.batch, self.tokens, self.channels), "float32") if self.merges else None
            score = param("score", (self.batch, free), "float32")
            y = param("y", (self.batch, self.tokens), "int32")
            if free:
                ranks = _Ranks(device, free)
                position = T.alloc_buffer((1,), "int32", scope="local")
            if self.merges:
                matching = _Matching(device, sources, kept, self.channels)
                # Tokens in the order of their scores, as far as they are merged or merged into.
                order = T.alloc_buffer((kept + sources,), "int32")

            def sample(b: Any) -> None:
                loop(prefix, lambda i: T.buffer_store(y, _int(i), [b, i]))
                if not free:
                    return

                def copy(offset: Any, width: int) -> None:
                    here = ramp(offset, width)
                    T.buffer_store(ranks.score, number(score[b, here], width), [here])

                strip(free, lanes, copy)
                ranks.find()
                if not self.ordered:
                    T.buffer_store(position, const(prefix, "int32"), [0])
                loop(free, lambda i: (place if self.ordered else compact)(b, i))
                if x is None:
                    return

                def row(first: int) -> Callable[[Any, Any, int], Any]:
                    return lambda i, c, width: x[b, order[first + i], ramp(c, width)]

                matching.find(row(kept), row(0))
                loop(
                    sources,
                    lambda i: T.buffer_store(
                        y, const(MERGED - prefix, "int32") - matching.best[i], [b, order[kept + i]]
                    ),
                )

            def place(b: Any, i: Any) -> None:
                rank = ranks.place[i]
                slot = tirx.Select(rank < const(kept, "int32"), rank + const(prefix, "int32"), const(DROPPED, "int32"))
                T.buffer_store(y, slot, [b, prefix + i])
                if self.merges:
                    with T.If(rank < const(kept + sources, "int32")), T.Then():
                        T.buffer_store(order, _int(i) + const(prefix, "int32"), [rank])

            def compact(b: Any, i: Any) -> None:
                with T.If(ranks.place[i] < const(kept, "int32")):
                    with T.Then():
                        T.buffer_store(y, position[0], [b, prefix + i])
                        T.buffer_store(position, position[0] + const(1, "int32"), [0])
                    with T.Else():
                        T.buffer_store(y, const(DROPPED, "int32"), [b, prefix + i])

            loop(self.batch, sample)
        return builder.get()

    def reference(self, *operands: np.ndarray) -> np.ndarray:
        """NumPy meaning: [x], score."""
        score, kept = operands[-1], self.merge - self.prefix
        y = np.full((self.batch, self.tokens), DROPPED, np.int32)
        y[:, : self.prefix] = np.arange(self.prefix)
        for b in range(self.batch):
            order = np.argsort(-score[b].astype(np.float64), kind="stable")
            stay = order[:kept] if self.ordered else np.sort(order[:kept])
            y[b, self.prefix + stay] = self.prefix + np.arange(kept)
            if self.merges:
                x = operands[0][b, self.prefix :].astype(np.float64)
                sources = order[kept : self.keep - self.prefix]
                y[b, self.prefix + sources] = MERGED - (self.prefix + _cosines(x[sources], x[stay]).argmax(1))
        return y


@dataclass(frozen=True)
class MergeTokens(_Kernel):
    """y [batch, rows, channels]: x [batch, tokens, channels] moved to slots [batch, tokens], means where they merge.

    merges: whether any slot is that of a source. weighted: means are weighted with size [batch, tokens].
    """

    batch: int
    tokens: int
    channels: int
    rows: int
    merges: bool = True
    weighted: bool = True

    name = "merge_tokens"
    dtype = "float32"

    @property
    def sized(self) -> bool:
        """Whether sizes are read."""
        return self.merges and self.weighted

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, [size], slots, y."""
        channels = self.channels
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.batch, self.tokens, channels), "float32")
            size = param("size", (self.batch, self.tokens), "float32") if self.sized else None
            slots = param("slots", (self.batch, self.tokens), "int32")
            y = param("y", (self.batch, self.rows, channels), "float32")
            if self.merges:
                total = T.alloc_buffer((self.rows,), "float32")
                added = T.alloc_buffer((self.rows,), "int32")
                row = T.alloc_buffer((1,), "int32", scope="local")
                factor = T.alloc_buffer((1,), "float32", scope="local")

            def weight(b: Any, i: Any) -> Any:
                return const(1.0, "float32") if size is None else size[b, i]

            def own(b: Any, i: Any) -> None:
                with T.If(slots[b, i] >= const(0, "int32")), T.Then():
                    slot = slots[b, i]

                    def copy(c: Any, width: int) -> None:
                        T.buffer_store(y, x[b, i, ramp(c, width)], [b, slot, ramp(c, width)])

                    strip(channels, device.lanes, copy, 4)
                    if self.merges:
                        T.buffer_store(total, weight(b, i), [slot])
                        T.buffer_store(added, const(0, "int32"), [slot])

            def scale(b: Any, value: Any) -> None:
                """Row `row` times a number."""
                T.buffer_store(factor, value, [0])

                def vector(c: Any, width: int) -> None:
                    here = [b, row[0], ramp(c, width)]
                    T.buffer_store(y, y[tuple(here)] * splat(factor[0], width), here)

                strip(channels, device.lanes, vector, 4)

            def add(b: Any, i: Any) -> None:
                with T.If(slots[b, i] <= const(MERGED, "int32")), T.Then():
                    T.buffer_store(row, const(MERGED, "int32") - slots[b, i], [0])
                    target = row[0]
                    if size is not None:
                        with T.If(added[target] == const(0, "int32")), T.Then():
                            scale(b, total[target])
                        T.buffer_store(factor, size[b, i], [0])
                    T.buffer_store(added, const(1, "int32"), [target])
                    T.buffer_store(total, total[target] + weight(b, i), [target])

                    def vector(c: Any, width: int) -> None:
                        here = [b, row[0], ramp(c, width)]
                        value = x[b, i, ramp(c, width)]
                        if size is not None:
                            value = value * splat(factor[0], width)
                        T.buffer_store(y, y[tuple(here)] + value, here)

                    strip(channels, device.lanes, vector, 4)

            def divide(b: Any, t: Any) -> None:
                with T.If(added[t] > const(0, "int32")), T.Then():
                    T.buffer_store(row, _int(t), [0])
                    scale(b, const(1.0, "float32") / total[t])

            def sample(b: Any) -> None:
                loop(self.tokens, lambda i: own(b, i))
                if self.merges:
                    loop(self.tokens, lambda i: add(b, i))
                    loop(self.rows, lambda t: divide(b, t))

            loop(self.batch, sample)
        return builder.get()

    def reference(self, x: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        """NumPy meaning: x, [size], slots."""
        slots = rest[-1].reshape(self.batch, self.tokens)
        weight = (rest[0] if self.sized else np.ones(slots.shape)).reshape(slots.shape).astype(np.float64)
        y = np.zeros((self.batch, self.rows, self.channels))
        total = np.zeros((self.batch, self.rows))
        for b, i in np.ndindex(slots.shape):
            slot = slots[b, i]
            if slot != DROPPED:
                row = slot if slot >= 0 else MERGED - slot
                y[b, row] += weight[b, i] * x[b, i].astype(np.float64)
                total[b, row] += weight[b, i]
        return (y / total[:, :, None]).astype(np.float32)


@dataclass(frozen=True)
class MergeSizes(_Kernel):
    """y [batch, rows]: size [batch, tokens] summed by slots [batch, tokens].

    With `channels`, what a source adds is scaled by its cosine (at least 0) to its target in x [batch, tokens,
    channels].
    """

    batch: int
    tokens: int
    rows: int
    channels: int = 0

    name = "merge_sizes"
    dtype = "float32"

    def prim_func(self, device: Device) -> Any:
        """Parameters: size, slots, [x], y."""
        with common.prim_func(self.name, self.inplace) as builder:
            size = param("size", (self.batch, self.tokens), "float32")
            slots = param("slots", (self.batch, self.tokens), "int32")
            shape = (self.batch, self.tokens, self.channels)
            x: Any = param("x", shape, "float32") if self.channels else None
            y = param("y", (self.batch, self.rows), "float32")
            if self.channels:
                owner = T.alloc_buffer((self.rows,), "int32")
                reduction = Reduction(device.lanes)
                # Square norms of both tokens, then their product.
                sums = T.alloc_buffer((3,), "float32", scope="local")

            def own(b: Any, i: Any) -> None:
                with T.If(slots[b, i] >= const(0, "int32")), T.Then():
                    T.buffer_store(y, size[b, i], [b, slots[b, i]])
                    if x is not None:
                        T.buffer_store(owner, _int(i), [slots[b, i]])

            def share(b: Any, i: Any, target: Any) -> Any:
                if x is None:
                    return size[b, i]
                other = owner[target]
                for n, (first, second) in enumerate(((i, i), (other, other), (i, other))):
                    reduction.row(
                        self.channels,
                        lambda c, width, pair=(first, second): (
                            x[b, pair[0], ramp(c, width)] * x[b, pair[1], ramp(c, width)]
                        ),
                        lambda total, n=n: T.buffer_store(sums, total, [n]),
                    )
                one, eps = const(1.0, "float32"), const(NORM_EPS, "float32")
                norms = [one / (tirx.sqrt(sums[n]) + eps) for n in range(2)]
                cosine = sums[2] * norms[0] * norms[1]
                return tirx.max(cosine, const(0.0, "float32")) * size[b, i]

            def add(b: Any, i: Any) -> None:
                with T.If(slots[b, i] <= const(MERGED, "int32")), T.Then():
                    target = const(MERGED, "int32") - slots[b, i]
                    T.buffer_store(y, y[b, target] + share(b, i, target), [b, target])

            def sample(b: Any) -> None:
                loop(self.tokens, lambda i: own(b, i))
                loop(self.tokens, lambda i: add(b, i))

            loop(self.batch, sample)
        return builder.get()

    def reference(self, size: np.ndarray, slots: np.ndarray, x: np.ndarray | None = None) -> np.ndarray:
        """NumPy meaning."""
        y = np.zeros((self.batch, self.rows))
        slots, size = slots.reshape(self.batch, self.tokens), size.reshape(self.batch, self.tokens)
        for b, i in np.ndindex(slots.shape):
            slot, share = slots[b, i], float(size[b, i])
            if slot == DROPPED:
                continue
            row = slot if slot >= 0 else MERGED - slot
            if slot <= MERGED and x is not None:
                (j,) = np.nonzero(slots[b] == row)[0]
                share *= max(float(_cosines(x[b, i : i + 1], x[b, j : j + 1])[0, 0]), 0.0)
            y[b, row] += share
        return y.astype(np.float32)


@dataclass(frozen=True)
class ClassScore(_Kernel):
    """y [batch, tokens - prefix]: mean over heads of softmax(scale q_0 k^T + log size), without the prefix columns.

    q, k: views [batch, heads, tokens, depth], of which row 0 of q is read; size [batch, tokens] where `sized`.
    """

    batch: int
    heads: int
    tokens: int
    depth: int
    q: View
    k: View
    scale: float
    prefix: int
    sized: bool = True

    name = "class_score"
    dtype = "float32"

    @property
    def macs(self) -> int:
        return self.batch * self.heads * self.tokens * self.depth

    def prim_func(self, device: Device) -> Any:
        """Parameters: q, k, [size], y."""
        lanes, tokens = device.lanes, self.tokens
        with common.prim_func(self.name, self.inplace) as builder:
            q, k = (param(name, (view.size,), "float32") for name, view in (("q", self.q), ("k", self.k)))
            size: Any = param("size", (self.batch, tokens), "float32") if self.sized else None
            y = param("y", (self.batch, tokens - self.prefix), "float32")
            query = T.alloc_buffer((self.depth,), "float32")
            key = T.alloc_buffer((self.depth,), "float32") if self.k.strides[3] != 1 else None
            bias = T.alloc_buffer((tokens,), "float32") if self.sized else None
            score = T.alloc_buffer((tokens,), "float32")
            reduction = Reduction(lanes)
            state = T.alloc_buffer((2,), "float32", scope="local")

            def head(b: Any, h: Any) -> None:
                at = self.q.offset + b * self.q.strides[0] + h * self.q.strides[1]
                scale = const(self.scale, "float32")
                loop(self.depth, lambda d: T.buffer_store(query, q[at + d * self.q.strides[3]] * scale, [d]))
                first = self.k.offset + b * self.k.strides[0] + h * self.k.strides[1]

                def dot(j: Any) -> None:
                    row = first + j * self.k.strides[2]
                    if key is not None:
                        loop(self.depth, lambda d: T.buffer_store(key, k[row + d * self.k.strides[3]], [d]))

                    def product(d: Any, width: int) -> Any:
                        other = k[ramp(row + d, width)] if key is None else key[ramp(d, width)]
                        return query[ramp(d, width)] * other

                    def put(total: Any) -> None:
                        T.buffer_store(score, total if bias is None else total + bias[j], [j])

                    reduction.row(self.depth, product, put)

                loop(tokens, dot)
                maximum(reduction, tokens, lambda j, width: score[ramp(j, width)], state)

                def power(j: Any, width: int) -> None:
                    here = ramp(j, width)
                    value = exp_of_nonpositive(score[here] - splat(state[0], width), width)
                    T.buffer_store(score, value, [here])

                strip(tokens, lanes, power)
                share = const(1.0 / self.heads, "float32")
                reduction.row(
                    tokens,
                    lambda j, width: score[ramp(j, width)],
                    lambda total: T.buffer_store(state, share / total, [1]),
                )

                def add(j: Any, width: int) -> None:
                    here = [b, ramp(j, width)]
                    value = score[ramp(self.prefix + j, width)] * splat(state[1], width)
                    T.buffer_store(y, y[tuple(here)] + value, here)

                strip(tokens - self.prefix, lanes, add)

            def sample(b: Any) -> None:
                if size is not None and bias is not None:
                    strip(
                        tokens,
                        lanes,
                        lambda j, width: T.buffer_store(bias, log(size[b, ramp(j, width)], width), [ramp(j, width)]),
                    )
                strip(
                    tokens - self.prefix,
                    lanes,
                    lambda j, width: T.buffer_store(y, const(0.0, "float32", width), [b, ramp(j, width)]),
                )
                loop(self.heads, lambda h: head(b, h))

            loop(self.batch, sample)
        return builder.get()

    def reference(self, q: np.ndarray, k: np.ndarray, size: np.ndarray | None = None) -> np.ndarray:
        """NumPy meaning; q and k are the tensors that the views look at."""
        shape = (self.batch, self.heads, self.tokens, self.depth)
        query = self.q.read(q, shape).astype(np.float64)[:, :, :1]
        logits = (query @ self.k.read(k, shape).astype(np.float64).swapaxes(2, 3))[:, :, 0] * self.scale
        if size is not None:
            logits = logits + np.log(size.astype(np.float64)).reshape(self.batch, 1, self.tokens)
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return (powers / powers.sum(-1, keepdims=True)).mean(1)[:, self.prefix :].astype(np.float32)


@dataclass(frozen=True)
class LogSizes(_Kernel):
    """Natural logarithm of each element, what sizes add to the scores of attention."""

    count: int

    name = "log_sizes"
    dtype = "float32"
    inplace = (0,)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        with common.prim_func(self.name, self.inplace) as builder:
            x, y = (param(name, (self.count,), "float32") for name in "xy")
            strip(
                self.count,
                device.lanes,
                lambda i, width: T.buffer_store(y, log(x[ramp(i, width)], width), [ramp(i, width)]),
            )
        return builder.get()

    def reference(self, x: np.ndarray) -> np.ndarray:
        """NumPy meaning."""
        return np.log(x.astype(np.float64)).astype(np.float32)


def _int(value: Any) -> Any:
    return const(value, "int32") if isinstance(value, int) else value


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of a with each of b, rounded to float32 as the operators do."""
    left, right = (
        1.0 / (np.sqrt((m.astype(np.float64) ** 2).sum(1)).astype(np.float32) + np.float32(NORM_EPS)) for m in (a, b)
    )
    product = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
    return product * left.astype(np.float32)[:, None] * right.astype(np.float32)[None]
