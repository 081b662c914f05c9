"""Pooling windows on NHWC, vectorised over channels: average, maximum, and the mean over the whole map.

A tile of neighbouring output pixels is folded row by row of the window; every input vector is loaded once per row and
goes into all the pixels that see it. Padding is never stored: see `tiling`. int8 sums are held in 16 bits as long as
they fit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec import integer
from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, lanes_of, loop, parallel, param, ramp, splat, vec
from edgec.targets.kernels.conv2d import Window
from edgec.targets.kernels.rescale import rescaled_codes
from edgec.targets.kernels.tiling import Run, balanced, tiles
from edgec.targets.tir import T, tirx

# Window columns up to this many are unrolled.
UNROLLED = 8
# This many codes of any value add up to 16 bits.
FIT16 = 256


@dataclass(frozen=True)
class Requant:
    """Scalar requantisation: code = clamp(RQ1(sum of (q - x_zp)) + y_zp)."""

    m: int
    shift: int
    x_zp: int
    y_zp: int
    lo: int
    hi: int


@dataclass(frozen=True)
class _Pool(Window):
    """Window geometry of one sample, NHWC; padding is [top, bottom, left, right]."""

    c: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: str = "float32"

    name = "pool"
    macs = 0
    inplace = ()

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    @property
    def taps(self) -> int:
        """Elements of a window."""
        return self.kernel[0] * self.kernel[1]

    def _accumulator(self) -> str:
        raise NotImplementedError

    def _step(self, acc: Any, value: Any, lanes: int) -> Any:
        raise NotImplementedError

    def _start(self, lanes: int, acc_type: str) -> Any:
        return const(0, acc_type, lanes)

    def _end(self, acc: Any, count: Any, lanes: int, device: Device) -> list[Any]:
        """The result of `lanes` channels from the folded values under `count` taps."""
        raise NotImplementedError

    def _block(self, device: Device) -> int:
        """Channels per vector: a power of two, at most a register of what is read.

        The last vector overlaps the one before it. That costs little where the result is what was read; sums take
        several registers and requantisation, and rather use smaller vectors.
        """
        most = min(vector_elements(device, self.dtype), 1 << (self.c.bit_length() - 1))
        if self._accumulator() == self.dtype:
            return most
        options = [b for b in (most, most // 2, most // 4) if b >= min(most, device.lanes)]
        return min(options, key=lambda b: -(-self.c // b) * (b + device.lanes // 2))

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        rows, columns = self.axes
        acc_type = self._accumulator()
        block = self._block(device)
        held = max(1, block // vector_elements(device, acc_type))
        most = max(1, min(UNROLLED, (device.registers - 4) // held))
        wide = self.kernel[1] > UNROLLED
        pixels = 1 if wide else balanced(columns.out, most)
        with common.prim_func(self.name) as builder:
            x = param("x", (self.h * self.w * self.c,), self.dtype)
            y = param("y", (rows.out * columns.out * self.c,), self.dtype)
            acc = T.alloc_buffer((pixels, block), acc_type, scope="local")
            held_value = T.alloc_buffer((block,), self.dtype, scope="local")
            here = ramp(0, block)

            def add(p: int, value: Any) -> None:
                T.buffer_store(acc, self._step(acc[p, here], value, block), [p, here])

            def tile(row: Any, column: Any, run: Run, channel: Any) -> None:
                for p in range(run.count):
                    T.buffer_store(acc, self._start(block, acc_type), [p, here])
                there = {p: columns.taps(run.start + p) for p in range(run.count)}
                users: dict[int, list[int]] = {}
                for p, taps in there.items():
                    for j in taps:
                        users.setdefault(p * columns.stride + j * columns.dilation, []).append(p)
                left, right = columns.bounds(column)

                def kernel_row(i: Any) -> None:
                    line = (row * rows.stride + i * rows.dilation - rows.before) * self.w
                    first = line + column * columns.stride - columns.before

                    def tap(j: Any) -> None:
                        add(0, x[ramp((first + j * columns.dilation) * self.c + channel, block)])

                    if wide:
                        _between(left, right, tap)
                        return
                    for place, those in sorted(users.items()):
                        T.buffer_store(held_value, x[ramp((first + place) * self.c + channel, block)], [here])
                        for p in those:
                            add(p, held_value[here])

                low, high = rows.bounds(row)
                _between(low, high, kernel_row)
                for p in range(run.count):
                    count = (high - low) * (right - left if wide else len(there[p]))
                    place = (row * columns.out + column + p) * self.c + channel
                    _store(y, place, self._end(acc[p, here], count, block, device), block)

            def channels(row: Any, column: Any, run: Run) -> None:
                # The last vector of channels may overlap the one before it.
                blocks = -(-self.c // block)
                loop(blocks, lambda b: tile(row, column, run, overlapping(b, block, self.c)))

            def row_of_tiles(row: Any) -> None:
                # A wide window finds its own bounds: all its columns are alike.
                runs = [Run(0, 1, columns.out, True)] if wide else tiles(columns, pixels)
                for run in runs:
                    loop(run.repeat, lambda t, run=run: channels(row, run.start + t * run.count, run))

            parallel(rows.out, row_of_tiles)
        return builder.get()

    def _windows(self, x: np.ndarray, border: float | int, exact: Any) -> np.ndarray:
        """[kh * kw, oh, ow, c]: the values under each tap."""
        top, bottom, left, right = self.padding
        padded = np.pad(x.astype(exact), ((top, bottom), (left, right), (0, 0)), constant_values=border)
        oh, ow = self.out
        taps = []
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                y0, x0 = i * self.dilation[0], j * self.dilation[1]
                rows = padded[y0 : y0 + (oh - 1) * self.stride[0] + 1 : self.stride[0]]
                taps.append(rows[:, x0 : x0 + (ow - 1) * self.stride[1] + 1 : self.stride[1]])
        return np.stack(taps)


def vector_elements(device: Device, dtype: str) -> int:
    """Elements of one register."""
    return device.vector_bytes // np.dtype(dtype).itemsize


def overlapping(number: Any, block: int, size: int) -> Any:
    """Start of block `number` of 0 .. size, where the last one is moved back to end with it."""
    return number * block if size % block == 0 else tirx.min(number * block, size - block)


def _between(low: Any, high: Any, body: Callable[[Any], None]) -> None:
    if isinstance(high, int):
        loop(high, body)
        return
    with T.serial(low, high) as i:
        body(i)


def _store(y: Any, place: Any, parts: list[Any], size: int) -> None:
    """Store `size` elements that `parts` make up together."""
    width = size // len(parts)
    for k, part in enumerate(parts):
        T.buffer_store(y, part, [ramp(place + k * width, width)])


@dataclass(frozen=True)
class AvgPool(_Pool):
    """Average over the full window, padding included. int8 needs `requant`, whose factor contains 1 / window size.

    Floats are summed in float32, float16 too: a map has more elements than float16 has digits.
    """

    requant: Requant | None = None
    name = "avg_pool"

    def _accumulator(self) -> str:
        if self.dtype != "int8":
            return "float32"
        return "int16" if self.taps <= FIT16 else "int32"

    def _step(self, acc: Any, value: Any, lanes: int) -> Any:
        return acc + value.astype(vec(self._accumulator(), lanes))

    def _end(self, acc: Any, count: Any, lanes: int, device: Device) -> list[Any]:
        q = self.requant
        if q is None:
            return [(acc * const(1.0 / self.taps, "float32", lanes)).astype(vec(self.dtype, lanes))]
        total = acc.astype(vec("int32", lanes))
        if q.x_zp:
            total = total - splat(tirx.const(q.x_zp, "int32") * count, lanes)
        width = min(lanes, device.lanes)
        parts = [lanes_of([total], lanes, k, width) for k in range(0, lanes, width)]
        return [rescaled_codes(parts, 255 * self.taps, (q.m, q.shift), q.y_zp, q.lo, q.hi, width, device)]

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        whole = self.kernel == (self.h, self.w) and not any(self.padding) and self.dilation == (1, 1)
        return self._mean(device) if whole and self.taps > 1 else super().prim_func(device)

    def _mean(self, device: Device) -> Any:
        """The window is the whole map: one sum over all pixels, vectors of channels at a time.

        With few channels neighbouring pixels count as channels, and are added up at the end.
        """
        sums = "int32" if self.dtype == "int8" else "float32"
        vector = vector_elements(device, self.dtype)
        joined = 1 if self.c >= vector else min(self.taps, -(-vector // self.c))
        rows, columns = self.taps // joined, joined * self.c
        with common.prim_func(self.name) as builder:
            x = param("x", (self.taps * self.c,), self.dtype)
            y = param("y", (self.c,), self.dtype)
            total = T.alloc_buffer((columns,), sums) if joined > 1 else None
            one = T.alloc_buffer((1,), sums, scope="local")

            def emit(at: Any, value: Any, lanes: int) -> None:
                if total is None:
                    _store(y, at, self._end(value, self.taps, lanes, device), lanes)
                else:
                    T.buffer_store(total, value, [ramp(at, lanes)])

            def add(value: Any) -> None:
                T.buffer_store(one, one[0] + value.astype(sums), [0])

            def channel(c: Any) -> None:
                done = rows * joined
                T.buffer_store(one, const(0, sums), [0])
                loop(joined, lambda g: add(total[g * self.c + c]))  # type: ignore[index]
                loop(self.taps - done, lambda r: add(x[(r + done) * self.c + c]))
                _store(y, c, self._end(one[0], self.taps, 1, device), 1)

            _column_sums(x, rows, columns, self.dtype, device, emit)
            if total is not None:
                loop(self.c, channel)
        return builder.get()

    def reference(self, x: np.ndarray) -> np.ndarray:
        """NumPy meaning: x [h, w, c] to [oh, ow, c]."""
        q = self.requant
        if q is None:
            return self._windows(x, 0.0, np.float64).mean(0).astype(self.dtype)
        acc = (self._windows(x, q.x_zp, np.int64) - q.x_zp).sum(0)
        return np.clip(integer.rq1(acc, np.int64(q.m), np.int64(q.shift)) + q.y_zp, q.lo, q.hi).astype(np.int8)


def _column_sums(
    x: Any, rows: int, columns: int, dtype: str, device: Device, emit: Callable[[Any, Any, int], None]
) -> None:
    """Sums of the columns of a matrix, as float32 or int32 vectors of `lanes`: emit(first column, vector, lanes)."""
    integer_sums = dtype == "int8"
    lanes = min(vector_elements(device, dtype), 1 << (columns.bit_length() - 1))
    vectors = -(-columns // lanes)
    most = min(vectors, 4)
    # Additions wait for one another: rows take turns with accumulators when there are few vectors.
    turns = max(1, min(rows, 4 // most))
    once = rows if not integer_sums else min(rows, FIT16 * turns)
    total = "int32" if integer_sums else "float32"
    partial = "int16" if integer_sums else "float32"
    acc = T.alloc_buffer((turns, most, lanes), partial, scope="local")
    sums = T.alloc_buffer((most, lanes), total, scope="local")
    here = ramp(0, lanes)

    def group(first: Any, used: int) -> None:
        starts = [overlapping(first + v, lanes, columns) for v in range(used)]

        def add(u: int, row: Any) -> None:
            for v, start in enumerate(starts):
                value = x[ramp(row * columns + start, lanes)].astype(vec(partial, lanes))
                T.buffer_store(acc, acc[u, v, here] + value, [u, v, here])

        def stretch(row: Any, count: int) -> list[Any]:
            """Sums of `count` rows from `row`."""
            for u in range(turns):
                for v in range(used):
                    T.buffer_store(acc, const(0, partial, lanes), [u, v, here])
            whole = count // turns

            def some(t: Any) -> None:
                for u in range(turns):
                    add(u, row + t * turns + u)

            loop(whole, some)
            for u in range(count - whole * turns):
                add(u, row + whole * turns + u)
            wide = vec(total, lanes)
            parts = [[acc[u, v, here].astype(wide) for u in range(turns)] for v in range(used)]
            return [functools.reduce(lambda a, b: a + b, values) for values in parts]

        if once == rows:
            for start, value in zip(starts, stretch(0, rows), strict=True):
                emit(start, value, lanes)
            return

        def collect(row: Any, count: int) -> None:
            for v, value in enumerate(stretch(row, count)):
                T.buffer_store(sums, sums[v, here] + value, [v, here])

        for v in range(used):
            T.buffer_store(sums, const(0, "int32", lanes), [v, here])
        loop(rows // once, lambda k: collect(k * once, once))
        if rows % once:
            collect(rows // once * once, rows % once)
        for v, start in enumerate(starts):
            emit(start, sums[v, here], lanes)

    parallel(vectors // most, lambda g: group(g * most, most))
    if vectors % most:
        group(vectors // most * most, vectors % most)


@dataclass(frozen=True)
class MaxPool(_Pool):
    """Maximum over the window; padding never wins."""

    name = "max_pool"

    @property
    def _least(self) -> float | int:
        return -128 if self.dtype == "int8" else -math.inf

    def _accumulator(self) -> str:
        return self.dtype

    def _start(self, lanes: int, acc_type: str) -> Any:
        return const(self._least, self.dtype, lanes)

    def _step(self, acc: Any, value: Any, lanes: int) -> Any:
        return tirx.max(acc, value)

    def _end(self, acc: Any, count: Any, lanes: int, device: Device) -> list[Any]:
        return [acc]

    def reference(self, x: np.ndarray) -> np.ndarray:
        """NumPy meaning: x [h, w, c] to [oh, ow, c]."""
        return self._windows(x, self._least, x.dtype).max(0)


def Mean(h: int, w: int, c: int, dtype: str = "float32", requant: Requant | None = None) -> AvgPool:
    """The mean over height and width: an average pool whose window is the whole map."""
    return AvgPool(h, w, c, (h, w), (1, 1), dtype=dtype, requant=requant)
