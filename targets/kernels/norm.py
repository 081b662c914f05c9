"""Normalisation: each row to zero mean and unit variance (layer norm), unit mean square (RMS norm), groups of channels.

Mean and variance are two passes over a row that the first one brought into the cache; each is a sum of several
vectors, which is more accurate than one running sum and needs no update formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import (
    Epilogue,
    activate,
    activate_reference,
    loop,
    parallel,
    param,
    ramp,
    splat,
)
from edgec.targets.kernels.rows import Grid, Reduction, encode, encode_reference, pieces, result, strip
from edgec.targets.tir import T, tirx

# Pixels whose sum is kept in registers before it is added to the sum of the map: long float32 sums lose digits.
PIXELS = 64
# Vectors of channels that walk over a map together.
BLOCK = 4


@dataclass(frozen=True)
class _RowNorm:
    """Rows of `columns` elements: x [rows, columns] to y of the same shape; `grid` makes int8 codes of y."""

    rows: int
    columns: int
    eps: float
    grid: Grid | None = None

    name = "norm"
    centred = True
    macs = 0

    @property
    def dtype(self) -> str:
        return "float32" if self.grid is None else "int8"

    @property
    def inplace(self) -> tuple[int, ...]:
        """The output may overwrite the input: a row is read completely before it is written."""
        return (0,) if self.grid is None else ()

    def key(self) -> str:
        return repr(self)

    def pack(
        self, device: Device, weight: np.ndarray | None = None, bias: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Weight and bias [columns], divided by the scale of the codes."""
        scale = 1.0 if self.grid is None else self.grid[0]
        given = [np.ones(self.columns) if weight is None else weight.astype(np.float64)]
        if self.centred:
            given.append(np.zeros(self.columns) if bias is None else bias.astype(np.float64))
        return tuple((values.reshape(self.columns) / scale).astype(np.float32) for values in given)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, weight, [bias], y."""
        columns = self.columns
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.rows, columns), "float32")
            weight = param("weight", (columns,), "float32")
            bias = param("bias", (columns,), "float32") if self.centred else None
            y = result("y", (self.rows, columns), self.grid)
            reduction = Reduction(device.lanes)
            moments = T.alloc_buffer((2,), "float32", scope="local")

            def row(r: Any) -> None:
                def shifted(offset: Any, width: int) -> Any:
                    value = x[r, ramp(offset, width)]
                    return value - splat(moments[0], width) if self.centred else value

                def finish(offset: Any, width: int) -> None:
                    here = ramp(offset, width)
                    value = shifted(offset, width) * splat(moments[1], width) * weight[here]
                    if bias is not None:
                        value = value + bias[here]
                    T.buffer_store(y, encode(value, self.grid, width), [r, here])

                if self.centred:
                    reduction.row(
                        columns,
                        lambda offset, width: x[r, ramp(offset, width)],
                        lambda total: T.buffer_store(moments, total * common.const(1.0 / columns, "float32"), [0]),
                    )
                reduction.row(
                    columns,
                    lambda offset, width: shifted(offset, width) * shifted(offset, width),
                    lambda total: T.buffer_store(moments, _inverse_root(total, columns, self.eps), [1]),
                )
                strip(columns, device.lanes, finish)

            parallel(self.rows, row)
        return builder.get()

    def reference(self, x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
        """NumPy meaning: x [rows, columns]."""
        value = x.astype(np.float64)
        if self.centred:
            value = value - value.mean(-1, keepdims=True)
        value = value / np.sqrt((value * value).mean(-1, keepdims=True) + self.eps)
        if weight is not None:
            value = value * weight
        if bias is not None:
            value = value + bias
        return encode_reference(value, self.grid)


@dataclass(frozen=True)
class LayerNorm(_RowNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias."""

    name = "layer_norm"


@dataclass(frozen=True)
class RMSNorm(_RowNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    name = "rms_norm"
    centred = False


@dataclass(frozen=True)
class GroupNorm:
    """Group norm of one sample: mean and variance over all pixels of `channels / groups` neighbouring channels.

    layout "NHWC": x [pixels, channels]; "NCHW": x [channels, pixels]. The epilogue's activation is applied.
    """

    pixels: int
    channels: int
    groups: int
    eps: float
    layout: str = "NHWC"
    epilogue: Epilogue = field(default_factory=Epilogue)

    name = "group_norm"
    dtype = "float32"
    macs = 0
    inplace = (0,)

    def __post_init__(self) -> None:
        if self.channels % self.groups or self.layout not in ("NHWC", "NCHW"):
            raise ValueError(f"no group norm of {self.channels} channels in {self.groups} groups, {self.layout}")

    def key(self) -> str:
        return repr(self)

    def pack(
        self, device: Device, weight: np.ndarray | None = None, bias: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Weight and bias [channels]."""
        full = ((np.ones, weight), (np.zeros, bias))
        return tuple(
            make(self.channels, np.float32) if values is None else np.ascontiguousarray(values, np.float32)
            for make, values in full
        )

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, weight, bias, y."""
        planar = self.layout == "NCHW"
        shape = (self.channels, self.pixels) if planar else (self.pixels, self.channels)
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", shape, "float32")
            weight = param("weight", (self.channels,), "float32")
            bias = param("bias", (self.channels,), "float32")
            y = param("y", shape, "float32")
            (self._planes if planar else self._pixels)(device, x, weight, bias, y)
        return builder.get()

    def _planes(self, device: Device, x: Any, weight: Any, bias: Any, y: Any) -> None:
        """NCHW: a channel is a row, and a group the sum of its rows."""
        size = self.channels // self.groups
        reduction = Reduction(device.lanes)
        # Mean, inverse deviation, running sum; scale and shift of the channel at hand.
        moments = T.alloc_buffer((3,), "float32", scope="local")
        affine = T.alloc_buffer((2,), "float32", scope="local")

        def group(g: Any) -> None:
            def total(value: Any) -> None:
                T.buffer_store(moments, common.const(0.0, "float32"), [2])
                loop(
                    size,
                    lambda i: reduction.row(
                        self.pixels,
                        lambda offset, width: value(g * size + i, offset, width),
                        lambda part: T.buffer_store(moments, moments[2] + part, [2]),
                    ),
                )

            def squared(channel: Any, offset: Any, width: int) -> Any:
                difference = x[channel, ramp(offset, width)] - splat(moments[0], width)
                return difference * difference

            def channel(i: Any) -> None:
                c = g * size + i
                T.buffer_store(affine, moments[1] * weight[c], [0])
                T.buffer_store(affine, bias[c] - moments[0] * affine[0], [1])

                def finish(offset: Any, width: int) -> None:
                    here = ramp(offset, width)
                    value = x[c, here] * splat(affine[0], width) + splat(affine[1], width)
                    T.buffer_store(y, activate(value, self.epilogue, width), [c, here])

                strip(self.pixels, device.lanes, finish)

            count = size * self.pixels
            total(lambda channel, offset, width: x[channel, ramp(offset, width)])
            T.buffer_store(moments, moments[2] * common.const(1.0 / count, "float32"), [0])
            total(squared)
            T.buffer_store(moments, _inverse_root(moments[2], count, self.eps), [1])
            loop(size, channel)

        parallel(self.groups, group)

    def _pixels(self, device: Device, x: Any, weight: Any, bias: Any, y: Any) -> None:
        """NHWC: sums per channel, then per group; mean, scale and shift are vectors along the channels again."""
        channels, size = self.channels, self.channels // self.groups
        sums = T.alloc_buffer((channels,), "float32")
        scale = T.alloc_buffer((channels,), "float32")
        shift = T.alloc_buffer((channels,), "float32")
        block = T.alloc_buffer((BLOCK, device.lanes), "float32", scope="local")
        moments = T.alloc_buffer((2,), "float32", scope="local")
        zero = common.const(0.0, "float32")

        def total(value: Any) -> None:
            """sums[c]: value(pixel, channel, width) over all pixels."""

            def columns(first: Any, widths: list[tuple[int, int]]) -> None:
                def run(pixel: Any, count: int) -> None:
                    for v, (_, width) in enumerate(widths):
                        T.buffer_store(block, splat(zero, width), [v, ramp(0, width)])

                    def step(i: Any) -> None:
                        for v, (offset, width) in enumerate(widths):
                            here = [v, ramp(0, width)]
                            added = block[v, ramp(0, width)] + value(pixel + i, first + offset, width)
                            T.buffer_store(block, added, here)

                    loop(count, step)
                    for v, (offset, width) in enumerate(widths):
                        here = ramp(first + offset, width)
                        T.buffer_store(sums, sums[here] + block[v, ramp(0, width)], [here])

                for offset, width in widths:
                    T.buffer_store(sums, splat(zero, width), [ramp(first + offset, width)])
                whole, rest = divmod(self.pixels, PIXELS)
                loop(whole, lambda i: run(i * PIXELS, PIXELS))
                if rest:
                    run(whole * PIXELS, rest)

            most = BLOCK * device.lanes
            whole, rest = divmod(channels, most)
            loop(whole, lambda i: columns(i * most, pieces(most, device.lanes)))
            tail = pieces(rest, device.lanes)
            for first in range(0, len(tail), BLOCK):
                base = tail[first][0]
                columns(whole * most + base, [(offset - base, width) for offset, width in tail[first : first + BLOCK]])

        def gather(g: Any) -> None:
            T.buffer_store(moments, zero, [0])
            loop(size, lambda i: T.buffer_store(moments, moments[0] + sums[g * size + i], [0]))

        def means(g: Any) -> None:
            gather(g)
            mean = moments[0] * common.const(1.0 / count, "float32")
            T.buffer_store(moments, mean, [1])
            loop(size, lambda i: T.buffer_store(shift, moments[1], [g * size + i]))

        def factors(g: Any) -> None:
            gather(g)
            T.buffer_store(moments, _inverse_root(moments[0], count, self.eps), [1])
            loop(size, lambda i: channel(g * size + i))

        def channel(c: Any) -> None:
            # Both vectors hold the mean's place in turn: it is read before it is overwritten.
            T.buffer_store(scale, moments[1] * weight[c], [c])
            T.buffer_store(shift, bias[c] - shift[c] * scale[c], [c])

        def squared(pixel: Any, first: Any, width: int) -> Any:
            difference = x[pixel, ramp(first, width)] - shift[ramp(first, width)]
            return difference * difference

        def finish(pixel: Any) -> None:
            def vector(first: Any, width: int) -> None:
                here = ramp(first, width)
                value = x[pixel, here] * scale[here] + shift[here]
                T.buffer_store(y, activate(value, self.epilogue, width), [pixel, here])

            strip(channels, device.lanes, vector)

        count = size * self.pixels
        total(lambda pixel, first, width: x[pixel, ramp(first, width)])
        loop(self.groups, means)
        total(squared)
        loop(self.groups, factors)
        loop(self.pixels, finish)

    def reference(self, x: np.ndarray, weight: np.ndarray | None = None, bias: np.ndarray | None = None) -> np.ndarray:
        """NumPy meaning, in the layout of the template."""
        value = x.astype(np.float64)
        value = value if self.layout == "NCHW" else value.T
        grouped = value.reshape(self.groups, -1)
        grouped = grouped - grouped.mean(1, keepdims=True)
        grouped = grouped / np.sqrt((grouped * grouped).mean(1, keepdims=True) + self.eps)
        value = grouped.reshape(self.channels, self.pixels)
        if weight is not None:
            value = value * weight[:, None]
        if bias is not None:
            value = value + bias[:, None]
        value = activate_reference(value, self.epilogue).astype(np.float32)
        return np.ascontiguousarray(value if self.layout == "NCHW" else value.T)


def _inverse_root(total: Any, count: int, eps: float) -> Any:
    """1 / sqrt(total / count + eps)."""
    variance = total * common.const(1.0 / count, "float32") + common.const(eps, "float32")
    return common.const(1.0, "float32") / tirx.sqrt(variance)
