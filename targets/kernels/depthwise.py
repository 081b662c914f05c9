"""Depthwise convolution on NHWC: one filter per channel, vectorised over channels.

A tile of neighbouring output pixels is accumulated row by row of the window; every input vector is loaded once per
row and multiplied into all the pixels that see it. Padding is never stored: see `tiling`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common, depthwise_dot
from edgec.targets.kernels.common import Epilogue, const, loop, parallel, param, pieces, ramp, vec
from edgec.targets.kernels.conv2d import Blocking, Weighted, accumulate, store_channels
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
    # Whether a tile says in which order its loops run.
    reorders = False

    @property
    def groups(self) -> int:
        return self.c

    @property
    def macs(self) -> int:
        oh, ow = self.out
        return oh * ow * self.c * self.kernel[0] * self.kernel[1]

    def blocking(self, device: Device) -> tuple[int, int]:
        """(channels per block, pixels per tile): from the device's table or the largest that fits registers."""
        tile = device.tuning.get(self.tuning_key) or self.candidates(device)[0]
        return tile.vectors * device.lanes_of(self.dtype), tile.pixels

    def candidates(self, device: Device) -> list[Blocking]:
        """Register tiles that fit, the default first, then those with most pixels."""
        if depthwise_dot.applies(self, device):
            counts = (depthwise_dot.PIXELS, *range(depthwise_dot.PIXELS + 1, 0, -1))
            return list(dict.fromkeys(Blocking(balanced(self.out[1], n), 1, True) for n in counts))
        registers, lanes = device.registers, device.lanes_of(self.dtype)
        channels = lanes if lanes >= 16 else 2 * lanes
        if self.dtype == "int8":
            channels = max(8, lanes)

        # A row of weights, an input and a spare share the registers with the accumulators.
        def pixels(used: int) -> int:
            return min(max(1, (registers - used * (min(self.kernel[1], 5) + 2)) // used), 14)

        first = channels // lanes
        # Bytes are worked on eight or sixteen at a time, whatever the width of a register.
        others = [first] if self.dtype == "int8" else [v for v in (1, 2, 3, 4) if v == 1 or (v - 1) * lanes < self.c]
        found = [Blocking(balanced(self.out[1], pixels(first)), first, True)]
        for used in others:
            found += [Blocking(balanced(self.out[1], n), used, True) for n in range(pixels(used), 0, -1)]
        return list(dict.fromkeys(found))

    def pack(
        self,
        device: Device,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Weights [c, 1, kh, kw] to [kh, kw, c]; vectors as they are."""
        if depthwise_dot.applies(self, device):
            assert m is not None
            return depthwise_dot.pack(self, device, w, bias, m)
        packed = np.ascontiguousarray(w[:, 0].transpose(1, 2, 0))
        if self.dtype != "int8":
            return packed, np.zeros(self.c, self.dtype) if bias is None else bias
        start = np.zeros(self.c, np.int32) if bias is None else bias
        assert m is not None
        if self.epilogue.requant == "RQ1":
            assert shift is not None
            return packed, start, m, shift
        return packed, start, m

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, packed weights, bias, [m, [shift]], [residual], y."""
        if depthwise_dot.applies(self, device):
            return depthwise_dot.prim_func(self, device)
        block, pixels = self.blocking(device)
        rows, columns = self.axes
        acc_type = "int32" if self.dtype == "int8" else self.dtype
        # int8 is multiplied as int16.
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

            def widen(value: Any, lanes: int) -> Any:
                return value.astype(vec("int16", lanes)) if self.dtype == "int8" else value

            def tile(row: Any, column: Any, run: Run, channel: Any, lanes: int) -> None:
                there = {p: columns.taps(run.start + p) for p in range(run.count)}
                # As in `Dot.start`.
                late = self.dtype == "float16"
                for p in there:
                    start = const(0, acc_type, lanes) if late else bias[ramp(channel, lanes)]
                    T.buffer_store(acc, start, [p, ramp(0, lanes)])
                # Input columns, from the first pixel's tap 0, and who multiplies them; None is the border's code.
                users: dict[int | None, list[tuple[int, int]]] = {}
                for p, taps in there.items():
                    for j in taps:
                        users.setdefault(p * columns.stride + j * columns.dilation, []).append((p, j))
                    if self.x_zp:
                        users.setdefault(None, []).extend((p, j) for j in range(columns.kernel) if j not in taps)

                def load_weights(i: Any) -> None:
                    for j in sorted({j for taps in users.values() for _, j in taps}):
                        T.buffer_store(weights, widen(w[i, j, ramp(channel, lanes)], lanes), [j, ramp(0, lanes)])

                def multiply(value: Any, taps: list[tuple[int, int]]) -> None:
                    T.buffer_store(held, value, [ramp(0, lanes)])
                    for p, j in taps:
                        a = held[ramp(0, lanes)].astype(vec(acc_type, lanes))
                        b = weights[j, ramp(0, lanes)].astype(vec(acc_type, lanes))
                        T.buffer_store(acc, acc[p, ramp(0, lanes)] + a * b, [p, ramp(0, lanes)])

                border = const(self.x_zp, wide, lanes)

                def kernel_row(i: Any) -> None:
                    load_weights(i)
                    line = (row * rows.stride + i * rows.dilation - rows.before) * self.w
                    first = line + column * columns.stride - columns.before
                    for place, taps in users.items():
                        if place is None:
                            multiply(border, taps)
                        else:
                            multiply(widen(x[ramp((first + place) * self.c + channel, lanes)], lanes), taps)

                def outside(i: Any) -> None:
                    """A kernel row above or below the image, where every code is that of zero."""
                    load_weights(i)
                    multiply(border, [(p, j) for p in there for j in range(columns.kernel)])

                low, high = rows.bounds(row)
                if isinstance(high, int):
                    loop(high, kernel_row)
                else:
                    edges = ((0, low, outside), (high, rows.kernel, outside)) if self.x_zp else ()
                    for begin, end, body in ((low, high, kernel_row), *edges):
                        with T.serial(begin, end) as i:
                            body(i)
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
