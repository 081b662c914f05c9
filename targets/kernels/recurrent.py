"""Recurrent layers: a loop over time of one product with the last hidden state and the gates.

The input products of all steps come in as a matrix. The recurrent weight is packed in panels of columns, so that each
step reads it once from first to last. The meaning is that of `edgec.recurrentops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.elementary import sigmoid, tanh
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, loop, param, ramp
from edgec.targets.kernels.matmul import Tile, Widths, blocking, by_element, column_blocks, row_blocks, span
from edgec.targets.kernels.rows import strip
from edgec.targets.tir import T, tirx

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Recurrent:
    """y [batch, steps, size] from x [batch, steps, gates * hidden], see `edgec.recurrentops`.

    kind: "lstm", "gru", "rnn_tanh" or "rnn_relu". size: of the hidden state, which is `hidden` without a projection.
    h0, c0: whether these states are given; else they are zero. cell: y is [batch, steps * size + hidden] with the last
    cell state behind the hidden states.
    """

    kind: str
    batch: int
    steps: int
    hidden: int
    size: int
    projected: bool = False
    h0: bool = False
    c0: bool = False
    reverse: bool = False
    cell: bool = False

    name = "recurrent"
    dtype = "float32"
    inplace = ()

    @property
    def columns(self) -> int:
        return GATES[self.kind] * self.hidden

    @property
    def macs(self) -> int:
        each = self.columns * self.size + (self.hidden * self.size if self.projected else 0)
        return self.batch * self.steps * each

    def key(self) -> str:
        return repr(self)

    def pack(
        self, device: Device, w: np.ndarray, bias: np.ndarray | None, projection: np.ndarray | None
    ) -> tuple[np.ndarray, ...]:
        """w [columns, size] and projection [size, hidden] in panels; bias [columns], zero where there is none."""
        full = np.zeros(self.columns, np.float32) if bias is None else np.ascontiguousarray(bias, np.float32)
        found = [_panels(w, device, self.batch), full]
        return (*found, _panels(projection, device, self.batch)) if projection is not None else tuple(found)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, w, bias, [projection], [h0], [c0], y."""
        batch, steps, hidden, size = self.batch, self.steps, self.hidden, self.size
        lstm = self.kind == "lstm"
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (batch, steps, self.columns), "float32")
            w = param("w", (_packed(self.columns, size, device, batch),), "float32")
            bias = param("bias", (self.columns,), "float32")
            extra = (_packed(size, hidden, device, batch),)
            projection: Any = param("projection", extra, "float32") if self.projected else None
            h0 = param("h0", (batch, size), "float32") if self.h0 else None
            c0 = param("c0", (batch, hidden), "float32") if self.c0 else None
            y = param("y", (batch, steps * size + (hidden if self.cell else 0)), "float32")
            tile = _Tile(device, batch)
            h = T.alloc_buffer((batch, size), "float32")
            c: Any = T.alloc_buffer((batch, hidden), "float32") if lstm else None
            # The recurrent product of a step, and what the projection takes.
            product = T.alloc_buffer((batch, self.columns), "float32")
            wide: Any = T.alloc_buffer((batch, hidden), "float32") if self.projected else None

            def start(state: Any, given: Any, extent: int) -> None:
                def row(b: Any) -> None:
                    def vector(j: Any, width: int) -> None:
                        here = (b, ramp(j, width))
                        T.buffer_store(state, const(0.0, "float32", width) if given is None else given[here], [*here])

                    strip(extent, device.lanes, vector)

                loop(batch, row)

            def step(i: Any) -> None:
                t = (steps - 1 - i) if self.reverse else i
                _multiply(device, tile, h, w, batch, size, self.columns, lambda b, j, width, v: put(b, j, width, v))
                loop(batch, lambda b: gates(b, t))
                if self.projected:
                    _multiply(device, tile, wide, projection, batch, hidden, size, lambda *a: state(t, *a))

            def put(b: Any, j: Any, width: int, value: Any) -> None:
                T.buffer_store(product, value + bias[ramp(j, width)], [b, ramp(j, width)])

            def state(t: Any, b: Any, j: Any, width: int, value: Any) -> None:
                """A hidden state that leaves the step."""
                T.buffer_store(h, value, [b, ramp(j, width)])
                T.buffer_store(y, h[b, ramp(j, width)], [b, ramp(t * size + j, width)])

            def gates(b: Any, t: Any) -> None:
                def vector(j: Any, width: int) -> None:
                    def own(gate: int) -> Any:
                        return x[b, t, ramp(gate * hidden + j, width)]

                    def other(gate: int) -> Any:
                        return product[b, ramp(gate * hidden + j, width)]

                    here = (b, ramp(j, width))
                    if lstm:
                        i, f, g, o = (own(k) + other(k) for k in range(4))
                        new = sigmoid(f, width) * c[here] + sigmoid(i, width) * tanh(g, width)
                        T.buffer_store(c, new, [*here])
                        value = sigmoid(o, width) * tanh(c[here], width)
                    elif self.kind == "gru":
                        # The gate r takes the place of the product that it is computed from.
                        T.buffer_store(product, sigmoid(own(0) + other(0), width), [*here])
                        n = tanh(own(2) + product[here] * other(2), width)
                        T.buffer_store(product, n, [*here])
                        z = sigmoid(own(1) + other(1), width)
                        value = product[here] + z * (h[here] - product[here])
                    elif self.kind == "rnn_tanh":
                        value = tanh(own(0) + other(0), width)
                    else:
                        value = tirx.max(own(0) + other(0), const(0.0, "float32", width))
                    if self.projected:
                        T.buffer_store(wide, value, [*here])
                    else:
                        state(t, b, j, width, value)

                strip(hidden, device.lanes, vector)

            start(h, h0, size)
            if lstm:
                start(c, c0, hidden)
            loop(steps, step)
            if self.cell:

                def last(b: Any) -> None:
                    def vector(j: Any, width: int) -> None:
                        T.buffer_store(y, c[b, ramp(j, width)], [b, ramp(steps * size + j, width)])

                    strip(hidden, device.lanes, vector)

                loop(batch, last)
        return builder.get()

    def reference(
        self, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None, projection: np.ndarray | None, *states: np.ndarray
    ) -> np.ndarray:
        """NumPy meaning, in float64."""
        given = list(states)
        x = x.astype(np.float64).reshape(self.batch, self.steps, self.columns)
        h = given.pop(0).astype(np.float64) if self.h0 else np.zeros((self.batch, self.size))
        c = given.pop(0).astype(np.float64) if self.c0 else np.zeros((self.batch, self.hidden))
        y = np.zeros((self.batch, self.steps, self.size))
        add = 0.0 if bias is None else bias.astype(np.float64)

        def logistic(v: np.ndarray) -> np.ndarray:
            return 1.0 / (1.0 + np.exp(-v))

        for i in range(self.steps):
            t = self.steps - 1 - i if self.reverse else i
            own = np.split(x[:, t], GATES[self.kind], 1)
            other = np.split(h @ w.astype(np.float64).T + add, GATES[self.kind], 1)
            if self.kind == "lstm":
                a = [p + q for p, q in zip(own, other, strict=True)]
                c = logistic(a[1]) * c + logistic(a[0]) * np.tanh(a[2])
                h = logistic(a[3]) * np.tanh(c)
                h = h if projection is None else h @ projection.astype(np.float64).T
            elif self.kind == "gru":
                z = logistic(own[1] + other[1])
                n = np.tanh(own[2] + logistic(own[0] + other[0]) * other[2])
                h = n + z * (h - n)
            else:
                h = own[0] + other[0]
                h = np.tanh(h) if self.kind == "rnn_tanh" else np.maximum(h, 0.0)
            y[:, t] = h
        flat = y.reshape(self.batch, -1)
        return (np.concatenate([flat, c], 1) if self.cell else y).astype(np.float32)


class _Tile(Tile):
    """A tile for the samples of a batch; one sample has a row of accumulators, as many as hide their latency."""

    def __init__(self, device: Device, batch: int) -> None:
        self.rows, self.vectors = shape(device, batch)
        self.lanes, self.by_element = device.lanes, by_element(device)
        self._acc = T.alloc_buffer((self.rows, self.vectors * self.lanes), "float32", scope="local")


def shape(device: Device, batch: int) -> tuple[int, int]:
    """(rows, vectors) of the tile."""
    return blocking(device) if batch > 1 else (1, 8 if device.registers >= 32 else 4)


def _blocks(columns: int, device: Device, batch: int) -> list[tuple[int, int, Widths]]:
    return column_blocks(columns, device.lanes, shape(device, batch)[1])


def _packed(columns: int, depth: int, device: Device, batch: int) -> int:
    """Elements of a packed matrix: vectors that overlap are stored twice."""
    return sum(count * span(widths) for _, count, widths in _blocks(columns, device, batch)) * depth


def _panels(w: np.ndarray, device: Device, batch: int) -> np.ndarray:
    """[columns, depth] as one [depth, block] after the other."""
    found = [
        np.ascontiguousarray(w[first + i * span(widths) : first + (i + 1) * span(widths)].T, np.float32).ravel()
        for first, count, widths in _blocks(w.shape[0], device, batch)
        for i in range(count)
    ]
    return np.concatenate(found)


def _multiply(
    device: Device,
    tile: _Tile,
    left: Any,
    panels: Any,
    rows: int,
    depth: int,
    columns: int,
    store: Callable[[Any, Any, int, Any], None],
) -> None:
    """store(row, column, width, value) for the product of left [rows, depth] and a packed matrix."""
    base = 0
    for first, count, widths in _blocks(columns, device, rows):
        step = span(widths)

        def block(i: Any, first: int = first, base: int = base, step: int = step, widths: Widths = widths) -> None:
            def some(row: Any, height: int) -> None:
                tile.multiply(
                    depth,
                    height,
                    widths,
                    lambda r, k, size: left[row + r, ramp(k, size)],
                    lambda k, offset, size: panels[ramp(base + (i * depth + k) * step + offset, size)],
                    "depth",
                )
                for r in range(height):
                    for v, (offset, size) in enumerate(widths):
                        store(row + r, first + i * step + offset, size, tile.at(r, v, size))

            row_blocks(rows, tile.rows, some)

        loop(count, block)
        base += count * step * depth
