"""Depthwise convolution on NHWC: one filter per channel, vectorised over channels.

A tile of neighbouring output pixels is accumulated row by row of the window; every input vector is loaded once per
row and multiplied into all the pixels that see it. Padding is never stored: see `tiling`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import Epilogue, const, loop, parallel, param, pieces, ramp, vec
from edgec.targets.kernels.conv2d import Weighted, accumulate, store_channels
from edgec.targets.kernels.tiling import Run, balanced, tiles
from edgec.targets.tir import T


@dataclass(frozen=True)
class Depthwise(Weighted):
    """One sample, NHWC, `c` channels in and out. padding is [top, bottom, left, right]."""

    c: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: str = "float32"
    x_zp: int = 0
    epilogue: Epilogue = field(default_factory=Epilogue)

    name = "depthwise"

    @property
    def groups(self) -> int:
        return self.c

    @property
    def macs(self) -> int:
        oh, ow = self.out
        return oh * ow * self.c * self.kernel[0] * self.kernel[1]

    def blocking(self, device: Device) -> tuple[int, int]:
        """(channels per block, pixels per tile)."""
        registers, lanes = device.registers, device.lanes_of(self.dtype)
        channels = lanes if lanes >= 16 else 2 * lanes
        if self.dtype == "int8":
            channels = 16
        # A row of weights, an input and a spare share the registers with the accumulators.
        used = channels // lanes
        most = max(1, (registers - used * (min(self.kernel[1], 5) + 2)) // used)
        return channels, balanced(self.out[1], min(most, 14))

    def pack(
        self,
        device: Device,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Weights [c, 1, kh, kw] to [kh, kw, c]; vectors as they are."""
        packed = np.ascontiguousarray(w[:, 0].transpose(1, 2, 0))
        if self.dtype != "int8":
            return packed, np.zeros(self.c, self.dtype) if bias is None else bias
        # Every tap sees the difference to the zero point here, which the bias counts on the other side.
        folded = self.x_zp * w.astype(np.int64).sum((1, 2, 3))
        start = ((0 if bias is None else bias) + folded).astype(np.int32)
        assert m is not None
        if self.epilogue.requant == "RQ1":
            assert shift is not None
            return packed, start, m, shift
        return packed, start, m

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, packed weights, bias, [m, [shift]], [residual], y."""
        block, pixels = self.blocking(device)
        rows, columns = self.axes
        acc_type = "int32" if self.dtype == "int8" else self.dtype
        # int8 is multiplied as int16, which the zero point of the input is taken off from.
        wide = "int16" if self.dtype == "int8" else self.dtype
        size = rows.out * columns.out * self.c
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.h * self.w * self.c,), self.dtype)
            w = param("w", (*self.kernel, self.c), self.dtype)
            bias = param("bias", (self.c,), acc_type)
            factors = [param(f"factor{i}", (self.c,), t) for i, t in enumerate(self.factors)]
            other = self.epilogue.residual_type(self.dtype)
            residual = param("residual", (size,), other) if self.residual else None
            y = param("y", (size,), self.out_type)
            acc = T.alloc_buffer((pixels, block), acc_type, scope="local")
            held = T.alloc_buffer((block,), wide, scope="local")
            weights = T.alloc_buffer((self.kernel[1], block), wide, scope="local")

            def widen(value: Any, lanes: int, zero: int) -> Any:
                if self.dtype != "int8":
                    return value
                value = value.astype(vec("int16", lanes))
                return value - const(zero, "int16", lanes) if zero else value

            def tile(row: Any, column: Any, run: Run, channel: Any, lanes: int) -> None:
                there = {p: columns.taps(run.start + p) for p in range(run.count)}
                # As in `Dot.bias_last`.
                late = self.dtype == "float16"
                for p in there:
                    start = const(0, acc_type, lanes) if late else bias[ramp(channel, lanes)]
                    T.buffer_store(acc, start, [p, ramp(0, lanes)])
                # Input columns, from the first pixel's tap 0, and who multiplies them.
                users: dict[int, list[tuple[int, int]]] = {}
                for p, taps in there.items():
                    for j in taps:
                        users.setdefault(p * columns.stride + j * columns.dilation, []).append((p, j))

                def kernel_row(i: Any) -> None:
                    for j in sorted({j for taps in there.values() for j in taps}):
                        value = widen(w[i, j, ramp(channel, lanes)], lanes, 0)
                        T.buffer_store(weights, value, [j, ramp(0, lanes)])
                    line = (row * rows.stride + i * rows.dilation - rows.before) * self.w
                    first = line + column * columns.stride - columns.before
                    for place, taps in sorted(users.items()):
                        value = x[ramp((first + place) * self.c + channel, lanes)]
                        T.buffer_store(held, widen(value, lanes, self.x_zp), [ramp(0, lanes)])
                        for p, j in taps:
                            a = held[ramp(0, lanes)].astype(vec(acc_type, lanes))
                            b = weights[j, ramp(0, lanes)].astype(vec(acc_type, lanes))
                            T.buffer_store(acc, acc[p, ramp(0, lanes)] + a * b, [p, ramp(0, lanes)])

                low, high = rows.bounds(row)
                if isinstance(high, int):
                    loop(high, kernel_row)
                else:
                    with T.serial(low, high) as i:
                        kernel_row(i)
                here = (row * columns.out + column) * self.c + channel
                width = min(lanes, device.lanes_of(self.dtype))
                for p in there:
                    values = [acc[p, ramp(at, width)] for at in range(0, lanes, width)]
                    if late:
                        values = [value + bias[ramp(channel + width * k, width)] for k, value in enumerate(values)]
                    store_channels(values, width, lanes, factors, channel, residual, y, here + p * self.c, self, device)

            def channels(row: Any, column: Any, run: Run) -> None:
                whole, rest = divmod(self.c, block)
                loop(whole, lambda b: tile(row, column, run, b * block, block))
                for start, lanes in pieces(rest, block):
                    tile(row, column, run, whole * block + start, lanes)

            def row_of_tiles(row: Any) -> None:
                for run in tiles(columns, pixels):
                    loop(run.repeat, lambda t, run=run: channels(row, run.start + t * run.count, run))

            parallel(rows.out, row_of_tiles)
        return builder.get()

    def reference(
        self,
        x: np.ndarray,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
        residual: np.ndarray | None = None,
    ) -> np.ndarray:
        """NumPy meaning on unpacked weights: x [h, w, c], w [c, 1, kh, kw], result [oh, ow, c]."""
        acc = accumulate(x, w, self)
        return common.finish_reference(acc, bias, m, shift, residual, self.epilogue, self.dtype)
