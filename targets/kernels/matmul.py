"""Products of two activations: the register tile that attention shares, and the batched matrix product.

A tile of `rows` by a few vectors of columns stays in registers while the depth is walked: each step loads one row of
the right operand in vectors and multiplies it with one element of every row of the left operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, loop, parallel, param, ramp, splat
from edgec.targets.kernels.rows import pieces, transpose
from edgec.targets.tir import T, tirx

# (offset, width) of the vectors in a block of columns.
Widths = Sequence[tuple[int, int]]
# Parallel iterations that a kernel offers where it may choose: enough for the cores of an edge device.
TASKS = 4


def blocking(device: Device) -> tuple[int, int]:
    """(rows, vectors) of the tile: accumulators, one row of the right operand and what is multiplied fit registers."""
    if device.registers >= 32:
        return (6, 4) if device.lanes > 4 else (8, 2)
    return (4, 2) if device.lanes == 4 else (6, 2)


def by_element(device: Device) -> bool:
    """Whether to read the left operand as vectors along the depth: AArch64 multiplies by one element of a vector."""
    return device.lanes == 4 and device.registers >= 32


def balanced(extent: int, most: int) -> int:
    """A block height, `most` or up to a third less, with which blocks cover `extent` in least time.

    A block costs its rows and, for what its rows share, about one more.
    """
    if extent <= most:
        return extent
    return min(range(most, most * 2 // 3 - 1, -1), key=lambda size: -(-extent // size) * (size + 1))


def vectors_of(extent: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, width) of vectors that cover 0..extent: the last whole one begins earlier where it would not fit."""
    if extent < lanes:
        return pieces(extent, lanes)
    return [(min(offset, extent - lanes), lanes) for offset in range(0, extent, lanes)]


def column_blocks(extent: int, lanes: int, most: int) -> list[tuple[int, int, Widths]]:
    """(first column, repetitions, vectors): blocks of nearly equal numbers of vectors, at most `most` of them.

    Equal neighbours are one entry; the offsets of the vectors count from the first column of the block.
    """
    parts = vectors_of(extent, lanes)
    count = -(-len(parts) // most)
    short, longer = divmod(len(parts), count)
    found: list[tuple[int, int, Widths]] = []
    start = 0
    for block in range(count):
        size = short + (block < longer)
        first = parts[start][0]
        widths = [(offset - first, width) for offset, width in parts[start : start + size]]
        regular = found and found[-1][2] == widths and first == found[-1][0] + found[-1][1] * span(widths)
        if regular:
            found[-1] = (found[-1][0], found[-1][1] + 1, widths)
        else:
            found.append((first, 1, widths))
        start += size
    return found


def span(widths: Widths) -> int:
    """Columns of a block."""
    return widths[-1][0] + widths[-1][1]


def each_block(blocks: Sequence[tuple[int, int, Widths]], body: Callable[[Any, Widths], None]) -> None:
    """body(first column, vectors) for the entries of `column_blocks`."""
    for first, count, widths in blocks:
        step = span(widths)
        loop(count, lambda i, first=first, step=step, widths=widths: body(first + i * step, widths))


class Tile:
    """Accumulators of one tile; make it before the first loop of a kernel."""

    def __init__(self, device: Device) -> None:
        self.rows, self.vectors = blocking(device)
        self.lanes, self.by_element = device.lanes, by_element(device)
        self._acc = T.alloc_buffer((self.rows, self.vectors * self.lanes), "float32", scope="local")

    def at(self, row: int, vector: int, width: int) -> Any:
        return self._acc[row, ramp(vector * self.lanes, width)]

    def put(self, row: int, vector: int, width: int, value: Any) -> None:
        T.buffer_store(self._acc, value, [row, ramp(vector * self.lanes, width)])

    def multiply(
        self,
        depth: Any,
        rows: int,
        widths: Widths,
        left: Callable[[int, Any, int], Any],
        right: Callable[[Any, int, int], Any],
        along: str = "",
    ) -> None:
        """Set each accumulator to the sum over k of left(row, k) times the columns of right(k).

        left(row, k, n): n neighbours from there on along the "depth" or along the "rows", as `along` says; one where it
        is empty. right(k, offset, width): one vector of row k. `depth` may be an expression unless along the depth.
        """
        for row in range(rows):
            for v, (_, width) in enumerate(widths):
                self.put(row, v, width, const(0.0, "float32", width))

        def step(k: Any, factors: Sequence[Any]) -> None:
            vectors = [right(k, offset, width) for offset, width in widths]
            for row in range(rows):
                for v, (_, width) in enumerate(widths):
                    self.put(row, v, width, self.at(row, v, width) + splat(factors[row], width) * vectors[v])

        def element(vector: Any, j: int) -> Any:
            return tirx.Shuffle([vector], [const(j, "int32")])

        def one(k: Any) -> None:
            factors: list[Any] = []
            if self.by_element and along == "rows":
                for row in range(0, rows // self.lanes * self.lanes, self.lanes):
                    vector = left(row, k, self.lanes)
                    factors += [element(vector, j) for j in range(self.lanes)]
            step(k, factors + [left(row, k, 1) for row in range(len(factors), rows)])

        def several(i: Any) -> None:
            vectors = [left(row, i * self.lanes, self.lanes) for row in range(rows)]
            for j in range(self.lanes):
                step(i * self.lanes + j, [element(vector, j) for vector in vectors])

        done = 0
        if self.by_element and along == "depth":
            done = depth // self.lanes * self.lanes
            loop(depth // self.lanes, several)
        if isinstance(depth, int):
            loop(depth - done, lambda k: one(done + k))
        else:
            with T.serial(0, depth) as k:
                one(k)


def row_blocks(extent: int, most: int, body: Callable[[Any, int], None], part: Any = 0, parts: int = 1) -> None:
    """body(row, rows) for blocks of equal height that cover 0..extent: the last one begins earlier where it must.

    Rows in two blocks are computed twice, to the same values. Of several `parts`, only the blocks of one.
    """
    size = balanced(extent, most)
    count = -(-extent // size)

    def block(i: Any) -> None:
        body(i * size if count * size == extent else tirx.min(i * size, extent - size), size)

    shares(part, parts, count, block)


def shares(task: Any, tasks: int, total: int, body: Callable[[Any], None]) -> None:
    """body(i) for the part of 0..total that belongs to `task`, one of `tasks`; the parts differ by one at most."""
    if tasks == total:
        body(task)
    elif tasks == 1:
        loop(total, body)
    else:
        first = tirx.floordiv(task * total, tasks)
        with T.serial(first, tirx.floordiv((task + 1) * total, tasks)) as i:
            body(i)


@dataclass(frozen=True)
class MatMul:
    """y[b] = a[b] c[b] for float32 activations: a [batch, m, k], c [batch, k, n] or, `transposed`, [batch, n, k].

    One of the operands may have a batch of one, which all products share (`a_batch`, `c_batch`).
    """

    a_batch: int
    c_batch: int
    m: int
    k: int
    n: int
    transposed: bool = False

    name = "matmul"
    dtype = "float32"
    inplace = ()

    def __post_init__(self) -> None:
        if self.a_batch != self.c_batch and 1 not in (self.a_batch, self.c_batch):
            raise ValueError(f"no product of batches of {self.a_batch} and {self.c_batch}")

    @property
    def batch(self) -> int:
        return max(self.a_batch, self.c_batch)

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.k * self.n

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    def prim_func(self, device: Device) -> Any:
        """Parameters: a, c, y."""
        m, k, n, lanes = self.m, self.k, self.n, device.lanes
        rows, vectors = blocking(device)
        blocks = column_blocks(n, lanes, vectors)
        tasks = min(TASKS, self.batch)
        # Few products are shared by rows; each part transposes the right operand for itself, so it needs some rows.
        parts = max(1, min(TASKS // self.batch, m // (4 * rows)))
        with common.prim_func(self.name, self.inplace) as builder:
            a = param("a", (self.a_batch, m, k), "float32")
            c = param("c", (self.c_batch, n, k) if self.transposed else (self.c_batch, k, n), "float32")
            y = param("y", (self.batch, m, n), "float32")
            tile = Tile(device)
            panel = None
            if self.transposed:
                panel = T.alloc_buffer((tasks * parts, k, max(span(widths) for _, _, widths in blocks)), "float32")

            def one(task: Any, b: Any, part: Any) -> None:
                ab, cb = (0 if count == 1 else b for count in (self.a_batch, self.c_batch))

                def columns(first: Any, widths: Widths) -> None:
                    if panel is not None:
                        transpose(
                            span(widths),
                            k,
                            lambda i, j, width: c[cb, first + i, ramp(j, width)],
                            lambda j, i, width, value: T.buffer_store(panel, value, [task, j, ramp(i, width)]),
                        )

                    def right(d: Any, offset: int, size: int) -> Any:
                        if panel is not None:
                            return panel[task, d, ramp(offset, size)]
                        return c[cb, d, ramp(first + offset, size)]

                    def block(row: Any, count: int) -> None:
                        tile.multiply(
                            k, count, widths, lambda i, d, size: a[ab, row + i, ramp(d, size)], right, "depth"
                        )
                        for i in range(count):
                            for v, (offset, size) in enumerate(widths):
                                T.buffer_store(y, tile.at(i, v, size), [b, row + i, ramp(first + offset, size)])

                    row_blocks(m, rows, block, part, parts)

                each_block(blocks, columns)

            def run(task: Any) -> None:
                if parts == 1:
                    shares(task, tasks, self.batch, lambda b: one(task, b, 0))
                else:
                    one(task, tirx.floordiv(task, parts), tirx.floormod(task, parts))

            parallel(tasks * parts, run)
        return builder.get()

    def reference(self, a: np.ndarray, c: np.ndarray) -> np.ndarray:
        """NumPy meaning: a [a_batch, m, k], c [c_batch, k, n] or [c_batch, n, k]."""
        right = c.astype(np.float64)
        return (a.astype(np.float64) @ (right.swapaxes(1, 2) if self.transposed else right)).astype(np.float32)
