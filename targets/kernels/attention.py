"""Attention: softmax(q k^T * scale + mask) v per head, a block of queries at a time.

The scores of a block are stored keys x queries, so that maxima, powers and sums run over vectors of queries, and fit
the caches; the N x N matrix is never stored. Queries, keys and values are read where they are: each is an affine view
of a tensor, such as the projection that holds all three. Only the queries of a block are copied, the other way round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.elementary import exp_of_nonpositive
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, loop, parallel, param, ramp, splat
from edgec.targets.kernels.matmul import (
    TASKS,
    Tile,
    Widths,
    blocking,
    column_blocks,
    each_block,
    row_blocks,
    shares,
)
from edgec.targets.kernels.rows import Grid, encode, encode_reference, result, strip, transpose
from edgec.targets.tir import T, tirx

# Vectors of queries in a block: their scores and powers should stay in the caches.
BLOCK = 4


@dataclass(frozen=True)
class View:
    """Element [batch, head, row, column] of a tensor of `size` elements is at offset + the sum of index x stride."""

    size: int
    offset: int
    strides: tuple[int, int, int, int]

    def read(self, values: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
        """The view of `values` as an array."""
        flat = np.ascontiguousarray(values).reshape(-1)
        assert flat.size == self.size
        index = self.offset + sum(
            np.arange(n).reshape([-1 if i == axis else 1 for i in range(4)]) * stride
            for axis, (n, stride) in enumerate(zip(shape, self.strides, strict=True))
        )
        return flat[np.broadcast_to(index, shape)]


@dataclass(frozen=True)
class Attention:
    """q, k, v: views [batch, heads, queries or keys, depth]; y [batch, queries, heads * value_depth], dense.

    k and v have heads / group heads. The last axis of v has stride 1. mask: view [batch, heads, queries, keys] of
    numbers that are added to the scores; causal: query i sees keys 0..i. A row without any visible key is zero.
    grid: int8 codes of y.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    depth: int
    value_depth: int
    q: View
    k: View
    v: View
    scale: float
    mask: View | None = None
    causal: bool = False
    group: int = 1
    grid: Grid | None = None

    name = "attention"
    inplace = ()

    def __post_init__(self) -> None:
        if self.v.strides[3] != 1 and self.value_depth > 1:
            raise ValueError("the values of a key must be neighbours")
        if self.heads % self.group:
            raise ValueError(f"{self.heads} heads cannot share keys in groups of {self.group}")

    @property
    def dtype(self) -> str:
        return "float32" if self.grid is None else "int8"

    @property
    def macs(self) -> int:
        return self.batch * self.heads * self.queries * self.keys * (self.depth + self.value_depth)

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    def blocks(self, lanes: int) -> tuple[int, int, int]:
        """(blocks per head, vectors of queries in a short block, number of blocks with one vector more)."""
        vectors = -(-self.queries // lanes)
        count = -(-vectors // BLOCK)
        return count, vectors // count, vectors % count

    def prim_func(self, device: Device) -> Any:
        """Parameters: q, k, v, [mask], y."""
        lanes, (rows, vectors) = device.lanes, blocking(device)
        count, short, longer = self.blocks(lanes)
        units = self.batch * self.heads * count
        tasks = min(TASKS, units)
        widest = (short + (longer > 0)) * lanes
        with common.prim_func(self.name, self.inplace) as builder:
            q, k, v = (
                param(name, (view.size,), "float32") for name, view in (("q", self.q), ("k", self.k), ("v", self.v))
            )
            mask = None if self.mask is None else param("mask", (self.mask.size,), "float32")
            y = result("y", (self.batch, self.queries, self.heads * self.value_depth), self.grid)
            panel = T.alloc_buffer((tasks, self.depth * widest), "float32")
            scores = T.alloc_buffer((tasks, self.keys * widest), "float32")
            inverse = T.alloc_buffer((tasks, widest), "float32")
            tile = Tile(device)
            most = T.alloc_buffer((widest,), "float32", scope="local")
            total = T.alloc_buffer((widest,), "float32", scope="local")

            def block(task: Any, b: Any, h: Any, first: Any, width: int) -> None:
                """`width` queries, of which the last ones may be padding where a head has no more."""
                used = min(width, self.queries)
                shared = tirx.floordiv(h, self.group) if self.group > 1 else h
                queries, keys, values = (
                    view.offset + b * view.strides[0] + head * view.strides[1]
                    for view, head in ((self.q, h), (self.k, shared), (self.v, shared))
                )
                every = range(0, width, lanes)
                self._copy_queries(q, panel, task, queries + first * self.q.strides[2], used, width, lanes)

                def masked(value: Any, key: Any, column: Any) -> Any:
                    if mask is not None and self.mask is not None:
                        at, step = self.mask, self.mask.strides[2]
                        origin = at.offset + b * at.strides[0] + h * at.strides[1] + key * at.strides[3]
                        if step == 0:
                            value = value + splat(mask[origin], lanes)
                        else:
                            # Padding queries read the mask of the last one.
                            index = splat(first + column, lanes) + tirx.Ramp(0, 1, lanes)
                            if used < width:
                                index = tirx.min(index, const(used - 1, "int32", lanes))
                            value = value + mask[splat(origin, lanes) + index * const(step, "int32", lanes)]
                    if self.causal:
                        later = splat(key - first - column, lanes) > tirx.Ramp(0, 1, lanes)
                        value = tirx.Select(later, const(-math.inf, "float32", lanes), value)
                    return value

                def score(key: Any, number: int) -> None:
                    def columns(column: Any, widths: Widths) -> None:
                        def left(i: int, d: Any, size: int) -> Any:
                            at = keys + (key + i) * self.k.strides[2]
                            return k[ramp(at + d, size)] if size > 1 else k[at + d * self.k.strides[3]]

                        def right(d: Any, offset: int, size: int) -> Any:
                            return panel[task, ramp(d * width + column + offset, size)]

                        along = "depth" if self.k.strides[3] == 1 else ""
                        tile.multiply(self.depth, number, widths, left, right, along)
                        for vector, (offset, size) in enumerate(widths):
                            here = ramp(column + offset, size)
                            largest = most[here]
                            for i in range(number):
                                value = masked(tile.at(i, vector, size), key + i, column + offset)
                                T.buffer_store(scores, value, [task, ramp((key + i) * width + column + offset, size)])
                                largest = tirx.max(largest, value)
                            T.buffer_store(most, largest, [here])

                    each_block(column_blocks(width, lanes, vectors), columns)

                def power(key: Any) -> None:
                    for column in every:
                        here = ramp(column, lanes)
                        at = [task, ramp(key * width + column, lanes)]
                        value = exp_of_nonpositive(scores[tuple(at)] - most[here], lanes)
                        T.buffer_store(scores, value, at)
                        T.buffer_store(total, total[here] + scores[tuple(at)], [here])

                def invert(column: int) -> None:
                    here = ramp(column, lanes)
                    T.buffer_store(inverse, const(scale, "float32", lanes) / total[here], [task, here])

                scale = 1.0 if self.grid is None else 1.0 / self.grid[0]
                for column in every:
                    T.buffer_store(most, const(-math.inf, "float32", lanes), [ramp(column, lanes)])
                    T.buffer_store(total, const(0.0, "float32", lanes), [ramp(column, lanes)])
                row_blocks(self.keys, rows, score)
                if mask is not None:
                    # Without any visible key the largest score is -inf: a finite one makes every power zero.
                    for column in every:
                        here = ramp(column, lanes)
                        T.buffer_store(most, tirx.max(most[here], const(-3e38, "float32", lanes)), [here])
                loop(self.keys, power)
                for column in every:
                    if mask is not None:
                        here = ramp(column, lanes)
                        T.buffer_store(total, tirx.max(total[here], const(1e-30, "float32", lanes)), [here])
                    invert(column)

                def combine(column: Any, widths: Widths) -> None:
                    def tokens(row: Any, number: int) -> None:
                        def left(i: int, key: Any, size: int) -> Any:
                            return scores[task, ramp(key * width + row + i, size)]

                        def right(key: Any, offset: int, size: int) -> Any:
                            return v[ramp(values + key * self.v.strides[2] + column + offset, size)]

                        tile.multiply(self.keys, number, widths, left, right, "rows")
                        for i in range(number):
                            factor = inverse[task, row + i]
                            for vector, (offset, size) in enumerate(widths):
                                value = encode(tile.at(i, vector, size) * splat(factor, size), self.grid, size)
                                at = ramp(h * self.value_depth + column + offset, size)
                                T.buffer_store(y, value, [b, first + row + i, at])

                    row_blocks(used, rows, tokens)

                each_block(column_blocks(self.value_depth, lanes, vectors), combine)

            def unit(task: Any, number: Any) -> None:
                head, j = (tirx.floordiv(number, count), tirx.floormod(number, count)) if count > 1 else (number, 0)
                b, h = tirx.floordiv(head, self.heads), tirx.floormod(head, self.heads)
                if self.batch == 1:
                    b, h = 0, head
                elif self.heads == 1:
                    b, h = head, 0
                wide, narrow = (short + 1) * lanes, short * lanes
                # The last block begins earlier where it would not fit.
                last = max(0, self.queries - narrow)
                if not longer:
                    block(task, b, h, tirx.min(j * narrow, last), narrow)
                    return
                with T.If(j < longer):
                    with T.Then():
                        block(task, b, h, j * wide, wide)
                    with T.Else():
                        block(task, b, h, tirx.min(j * narrow + longer * lanes, last), narrow)

            parallel(tasks, lambda task: shares(task, tasks, units, lambda number: unit(task, number)))
        return builder.get()

    def _copy_queries(self, q: Any, panel: Any, task: Any, first: Any, used: int, width: int, lanes: int) -> None:
        """panel [depth, width]: the queries of a block times the scale; zeros where there are none."""
        step, inner = self.q.strides[2:]

        def put(d: Any, column: Any, size: int, value: Any) -> None:
            scaled = value * const(self.scale, "float32", size)
            T.buffer_store(panel, scaled, [task, ramp(d * width + column, size)])

        def line(d: Any) -> None:
            def copy(column: Any, size: int) -> None:
                at = first + d * inner + column * step
                put(d, column, size, q[ramp(at, size)] if size > 1 else q[at])

            strip(used, lanes if step == 1 else 1, copy)

        if inner == 1 and self.depth > 1:
            transpose(used, self.depth, lambda i, d, size: q[ramp(first + i * step + d, size)], put)
        else:
            loop(self.depth, line)
        if used < width:
            zero = const(0.0, "float32")
            loop(
                self.depth,
                lambda d: loop(width - used, lambda j: T.buffer_store(panel, zero, [task, d * width + (used + j)])),
            )

    def reference(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """NumPy meaning; the arrays are the tensors that the views look at."""
        shared = self.heads // self.group
        queries = self.q.read(q, (self.batch, self.heads, self.queries, self.depth)).astype(np.float64)
        keys = self.k.read(k, (self.batch, shared, self.keys, self.depth)).astype(np.float64)
        values = self.v.read(v, (self.batch, shared, self.keys, self.value_depth)).astype(np.float64)
        scores = queries @ keys.repeat(self.group, 1).swapaxes(2, 3) * self.scale
        if mask is not None and self.mask is not None:
            scores = scores + self.mask.read(mask, (self.batch, self.heads, self.queries, self.keys))
        if self.causal:
            later = np.arange(self.keys) > np.arange(self.queries)[:, None]
            scores = np.where(later, -np.inf, scores)
        most = scores.max(-1, keepdims=True)
        powers = np.exp(scores - np.where(np.isfinite(most), most, 0.0))
        total = powers.sum(-1, keepdims=True)
        y = powers / np.where(total > 0, total, 1.0) @ values.repeat(self.group, 1)
        y = y.transpose(0, 2, 1, 3).reshape(self.batch, self.queries, -1)
        return encode_reference(y, self.grid)
