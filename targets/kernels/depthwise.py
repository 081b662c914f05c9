"""Depthwise convolution on NHWC: one filter per channel, vectorised over channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import Epilogue, loop, parallel, param, ramp, round_up, vec
from edgec.targets.kernels.conv2d import accumulate, finish, pad_copy, store_vector
from edgec.targets.tir import T


@dataclass(frozen=True)
class Depthwise:
    """One sample, NHWC, `c` channels in and out. padding is [top, bottom, left, right]."""

    h: int
    w: int
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
    def out(self) -> tuple[int, int]:
        size = (self.h, self.w)
        return tuple(  # type: ignore[return-value]
            (size[i] + self.padding[2 * i] + self.padding[2 * i + 1] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )

    @property
    def macs(self) -> int:
        oh, ow = self.out
        return oh * ow * self.c * self.kernel[0] * self.kernel[1]

    @property
    def residual(self) -> bool:
        return self.epilogue.residual or self.epilogue.add is not None

    @property
    def inplace(self) -> tuple[int, ...]:
        return (self.parameters - 2,) if self.residual else ()

    @property
    def parameters(self) -> int:
        return 4 + (2 if self.dtype == "int8" else 0) + self.residual

    def key(self) -> str:
        return repr(self)

    def blocking(self, device: Device) -> tuple[int, int]:
        """(lanes, pixels per tile)."""
        most = 12 if device.registers >= 32 else 6
        ow = self.out[1]
        return device.lanes, -(-ow // -(-ow // most))

    def pack(
        self,
        device: Device,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Weights [c, 1, kh, kw] to [kh, kw, c padded to whole vectors]."""
        padded = round_up(self.c, device.lanes)
        packed = np.zeros((*self.kernel, padded), w.dtype)
        packed[:, :, : self.c] = w[:, 0].transpose(1, 2, 0)

        def channels(values: np.ndarray | None, dtype: str, fill: int = 0) -> np.ndarray:
            full = np.full(padded, fill, dtype)
            if values is not None:
                full[: self.c] = values
            return full

        if self.dtype == "float32":
            return packed, channels(bias, "float32")
        return packed, channels(bias, "int32"), channels(m, "int32"), channels(shift, "int32", 1)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, packed weights, bias, [m, shift], [residual], y."""
        lanes, pixels = self.blocking(device)
        kh, kw = self.kernel
        oh, ow = self.out
        padded = round_up(self.c, lanes)
        acc_type = "int32" if self.dtype == "int8" else "float32"
        top, bottom, left, right = self.padding
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.h, self.w, self.c), self.dtype)
            w = param("w", (kh, kw, padded), self.dtype)
            bias = param("bias", (padded,), acc_type)
            m = shift = None
            if self.dtype == "int8":
                m, shift = param("m", (padded,), "int32"), param("shift", (padded,), "int32")
            residual = param("residual", (oh, ow, self.c), self.dtype) if self.residual else None
            y = param("y", (oh, ow, self.c), self.dtype)
            source = x
            if any(self.padding):
                source = T.alloc_buffer((self.h + top + bottom, self.w + left + right, self.c), self.dtype)
                pad_copy(x, source, (self.h, self.w, self.c), self.padding, self.x_zp, self.dtype)
            acc = T.alloc_buffer((pixels, lanes), acc_type, scope="local")
            tail = T.alloc_buffer((lanes,), self.dtype, scope="local")

            def tile(row: Any, column: Any, count: int, channel: Any, width: int) -> None:
                # The last channels of a row are done one at a time: a whole vector would read the next pixel.
                vector = [0] if width == lanes else list(range(width))
                for lane in vector:
                    size = lanes if width == lanes else 1
                    at = channel + lane
                    for p in range(count):
                        T.buffer_store(acc, bias[ramp(at, size)], [p, ramp(lane, size)])

                    def tap(i: Any, j: Any, at: Any = at, size: int = size, lane: int = lane) -> None:
                        weight = w[i, j, ramp(at, size)]
                        for p in range(count):
                            value = source[
                                row * self.stride[0] + i * self.dilation[0],
                                (column + p) * self.stride[1] + j * self.dilation[1],
                                ramp(at, size),
                            ]
                            product = _product(value, weight, self.dtype, size)
                            T.buffer_store(acc, acc[p, ramp(lane, size)] + product, [p, ramp(lane, size)])

                    loop(kh, lambda i, tap=tap: loop(kw, lambda j: tap(i, j)))
                    for p in range(count):
                        store_vector(
                            acc[p, ramp(lane, size)],
                            (m, shift, at),
                            residual,
                            y,
                            (row, column + p, at),
                            (size, size),
                            tail,
                            self,
                            device,
                        )

            def channels(row: Any, column: Any, count: int) -> None:
                whole, rest = divmod(self.c, lanes)
                loop(whole, lambda b: tile(row, column, count, b * lanes, lanes))
                if rest:
                    loop(rest, lambda r: tile(row, column, count, whole * lanes + r, 1))

            def row_of_tiles(row: Any) -> None:
                full, rest = divmod(ow, pixels)
                loop(full, lambda t: channels(row, t * pixels, pixels))
                if rest:
                    channels(row, full * pixels, rest)

            parallel(oh, row_of_tiles)
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
        return finish(accumulate(x, w, self), bias, m, shift, residual, self.epilogue, self.dtype)


def _product(value: Any, weight: Any, dtype: str, lanes: int) -> Any:
    if dtype == "float32":
        return value * weight

    def wide(codes: Any) -> Any:
        return codes.astype(vec("int16", lanes)).astype(vec("int32", lanes))

    return wide(value) * wide(weight)
