"""Rows of any length in vectors: walks, sums and maxima, and codes of quantised results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgec import integer
from edgec.targets.elementary import ROUND
from edgec.targets.kernels.common import clamp, const, loop, param, ramp, vec
from edgec.targets.tir import T, tirx

# Vectors that one reduction keeps in flight: enough to hide the latency of an addition.
WAYS = 4
# A quantised result: (scale, zero point) of its int8 codes.
Grid = tuple[float, int]


def fitting(extent: int, lanes: int) -> int:
    """The largest power of two that is neither above `extent` nor above `lanes`."""
    while lanes > extent:
        lanes //= 2
    return lanes


def pieces(extent: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, width) of vectors that cover 0..extent: as many of `lanes` elements as fit, then halves of it."""
    found, offset = [], 0
    while offset < extent:
        lanes = fitting(extent - offset, lanes)
        found.append((offset, lanes))
        offset += lanes
    return found


def strip(extent: int, lanes: int, body: Callable[[Any, int], None], unroll: int = 1) -> None:
    """body(offset, width) for vectors that cover 0..extent: a loop, of `unroll` vectors a turn, then the rest."""
    step = lanes * unroll

    def turn(i: Any) -> None:
        for u in range(unroll):
            body(i * step + u * lanes, lanes)

    loop(extent // step, turn)
    done = extent // step * step
    for offset, width in pieces(extent - done, lanes):
        body(done + offset, width)


def across(value: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """`combine` over the elements of one float32 vector, by halves."""
    if lanes == 1:
        return value
    half = lanes // 2
    whole = tirx.Var("v", vec("float32", lanes))
    parts = [tirx.Shuffle([whole], [const(k + first, "int32") for k in range(half)]) for first in (0, half)]
    return tirx.Let(whole, value, across(combine(*parts), half, combine))


def add(a: Any, b: Any) -> Any:
    return a + b


class Reduction:
    """Folds of rows into scalars, with accumulators of its own; make it before the first loop of a kernel."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._vectors = T.alloc_buffer((WAYS, lanes), "float32", scope="local")

    def row(
        self,
        extent: int,
        value: Callable[[Any, int], Any],
        store: Callable[[Any], None],
        combine: Callable[[Any, Any], Any] = add,
        neutral: float = 0.0,
    ) -> None:
        """Fold value(offset, width) over 0..extent and hand the scalar to `store`.

        A rest shorter than a vector is read as the last whole vector, whose first elements count as `neutral`; so
        `value` may be asked for an element twice.
        """
        lanes = fitting(extent, self.lanes)
        whole, rest = divmod(extent, lanes)
        ways = min(WAYS, whole)

        def place(way: int) -> list[Any]:
            return [way, ramp(0, lanes)]

        def fold(way: int, vector: Any) -> None:
            T.buffer_store(self._vectors, combine(self._vectors[tuple(place(way))], vector), place(way))

        def turn(i: Any) -> None:
            for way in range(ways):
                fold(way, value((i + 1) * ways * lanes + way * lanes, lanes))

        for way in range(ways):
            T.buffer_store(self._vectors, value(way * lanes, lanes), place(way))
        loop(whole // ways - 1, turn)
        for way in range(whole % ways):
            fold(way, value((whole // ways * ways + way) * lanes, lanes))
        if rest:
            counted = tirx.Ramp(0, 1, lanes) >= const(lanes - rest, "int32", lanes)
            fold(0, tirx.Select(counted, value(extent - lanes, lanes), const(neutral, "float32", lanes)))
        total = self._vectors[tuple(place(0))]
        if ways == 2:
            total = combine(total, self._vectors[tuple(place(1))])
        elif ways == 3:
            total = combine(combine(total, self._vectors[tuple(place(1))]), self._vectors[tuple(place(2))])
        elif ways == 4:
            pairs = [combine(self._vectors[tuple(place(w))], self._vectors[tuple(place(w + 1))]) for w in (0, 2)]
            total = combine(*pairs)
        store(across(total, lanes, combine))


# -- transposition -----------------------------------------------------------------------------------------------------


def transpose(
    rows: int, columns: int, load: Callable[[Any, Any, int], Any], store: Callable[[Any, Any, int, Any], None]
) -> None:
    """Write a block of `rows` x `columns` elements the other way round, in squares of four by four.

    load(row, column, width): `width` neighbours of a row; store(column, row, width, value): neighbours of a column.
    """

    def square(i: Any, j: Any) -> None:
        lines = [load(i + r, j, 4) for r in range(4)]
        low, high = (0, 4, 1, 5), (2, 6, 3, 7)
        for half, order in enumerate((low, high)):
            first, second = (_shuffle(lines[r : r + 2], order) for r in (0, 2))
            store(j + 2 * half, i, 4, _shuffle([first, second], (0, 1, 4, 5)))
            store(j + 2 * half + 1, i, 4, _shuffle([first, second], (2, 3, 6, 7)))

    def single(i: Any, j: Any) -> None:
        store(j, i, 1, load(i, j, 1))

    high, wide = rows // 4 * 4, columns // 4 * 4
    loop(rows // 4, lambda i: loop(columns // 4, lambda j: square(i * 4, j * 4)))
    loop(columns - wide, lambda j: loop(high, lambda i: single(i, wide + j)))
    loop(rows - high, lambda i: loop(columns, lambda j: single(high + i, j)))


def _shuffle(vectors: list[Any], order: tuple[int, ...]) -> Any:
    return tirx.Shuffle(vectors, [const(k, "int32") for k in order])


# -- results -----------------------------------------------------------------------------------------------------------


def result(name: str, shape: tuple[int, ...], grid: Grid | None) -> Any:
    """The output parameter: float32, or int8 where codes are stored."""
    return param(name, shape, "float32" if grid is None else "int8")


def encode(value: Any, grid: Grid | None, lanes: int) -> Any:
    """float32, already divided by the scale of `grid`, to int8 codes: clamp(rne(value) + zero point)."""
    if grid is None:
        return value
    zero = grid[1]
    # The limits are whole numbers, so that clamping first changes nothing, and the sum below stays exact.
    inside = clamp(value, -128.0 - zero, 127.0 - zero, "float32", lanes) + const(ROUND, "float32", lanes)
    bits = int(np.float32(ROUND).view(np.int32))
    code = tirx.reinterpret(vec("int32", lanes), inside) - const(bits - zero, "int32", lanes)
    return code.astype(vec("int8", lanes))


def encode_reference(value: np.ndarray, grid: Grid | None) -> np.ndarray:
    """The float64 result as the kernel stores it: float32, or the codes that `edgec.integer` gives."""
    value = value.astype(np.float32)
    return value if grid is None else integer.quantize(value, *grid)
