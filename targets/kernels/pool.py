"""Pooling on NHWC: average, maximum, and the mean over the whole map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec import integer
from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, loop, parallel, param, ramp, requantise, vec
from edgec.targets.kernels.conv2d import pad_copy
from edgec.targets.tir import T, tirx


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
class _Pool:
    """Window geometry of one sample, NHWC; padding is [top, bottom, left, right]."""

    h: int
    w: int
    c: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: str = "float32"

    name = "pool"
    macs = 0
    inplace = ()

    @property
    def out(self) -> tuple[int, int]:
        size = (self.h, self.w)
        return tuple(  # type: ignore[return-value]
            (size[i] + self.padding[2 * i] + self.padding[2 * i + 1] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    def _build(
        self,
        device: Device,
        start: Callable[[int], Any],
        step: Callable[[Any, Any, int], Any],
        end: Callable[[Any, int], Any],
        acc_type: str,
        border: float | int,
    ) -> Any:
        """x, y: fold `step` over each window, one vector of channels at a time."""
        oh, ow = self.out
        top, bottom, left, right = self.padding
        with common.prim_func(self.name) as builder:
            x = param("x", (self.h, self.w, self.c), self.dtype)
            y = param("y", (oh, ow, self.c), self.dtype)
            source = x
            if any(self.padding):
                source = T.alloc_buffer((self.h + top + bottom, self.w + left + right, self.c), self.dtype)
                pad_copy(x, source, (self.h, self.w, self.c), self.padding, border, self.dtype)  # type: ignore[arg-type]
            width = device.lanes_of(self.dtype)
            acc = T.alloc_buffer((width,), acc_type, scope="local")

            def window(row: Any, column: Any, channel: Any, lanes: int) -> None:
                here = [ramp(0, lanes)]
                T.buffer_store(acc, start(lanes), here)

                def tap(i: Any, j: Any) -> None:
                    value = source[
                        row * self.stride[0] + i * self.dilation[0],
                        column * self.stride[1] + j * self.dilation[1],
                        ramp(channel, lanes),
                    ]
                    T.buffer_store(acc, step(acc[ramp(0, lanes)], value, lanes), here)

                loop(self.kernel[0], lambda i: loop(self.kernel[1], lambda j: tap(i, j)))
                T.buffer_store(y, end(acc[ramp(0, lanes)], lanes), [row, column, ramp(channel, lanes)])

            def pixel(row: Any, column: Any) -> None:
                whole, rest = divmod(self.c, width)
                loop(whole, lambda b: window(row, column, b * width, width))
                loop(rest, lambda r: window(row, column, whole * width + r, 1))

            parallel(oh, lambda row: parallel(ow, lambda column: pixel(row, column)))
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


@dataclass(frozen=True)
class AvgPool(_Pool):
    """Average over the full window, padding included. int8 needs `requant`, whose factor contains 1 / window size.

    Floats are summed in float32, float16 too: a map has more elements than float16 has digits.
    """

    requant: Requant | None = None
    name = "avg_pool"

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        q = self.requant
        if q is None:
            scale = 1.0 / (self.kernel[0] * self.kernel[1])
            return self._build(
                device,
                lambda n: const(0.0, "float32", n),
                lambda acc, value, n: acc + value.astype(vec("float32", n)),
                lambda acc, n: (acc * const(scale, "float32", n)).astype(vec(self.dtype, n)),
                "float32",
                0.0,
            )

        def end(acc: Any, lanes: int) -> Any:
            m, shift = const(q.m, "int32", lanes), const(q.shift, "int32", lanes)
            return requantise(acc, m, shift, q.y_zp, q.lo, q.hi, lanes, device).astype(vec("int8", lanes))

        return self._build(
            device,
            lambda n: const(0, "int32", n),
            lambda acc, value, n: acc + value.astype(vec("int32", n)) - const(q.x_zp, "int32", n),
            end,
            "int32",
            q.x_zp,
        )

    def reference(self, x: np.ndarray) -> np.ndarray:
        """NumPy meaning: x [h, w, c] to [oh, ow, c]."""
        q = self.requant
        if q is None:
            return self._windows(x, 0.0, np.float64).mean(0).astype(self.dtype)
        acc = (self._windows(x, q.x_zp, np.int64) - q.x_zp).sum(0)
        return np.clip(integer.rq1(acc, np.int64(q.m), np.int64(q.shift)) + q.y_zp, q.lo, q.hi).astype(np.int8)


@dataclass(frozen=True)
class MaxPool(_Pool):
    """Maximum over the window; padding never wins."""

    name = "max_pool"

    @property
    def _least(self) -> float | int:
        return -128 if self.dtype == "int8" else -math.inf

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        return self._build(
            device,
            lambda n: const(self._least, self.dtype, n),
            lambda acc, value, n: tirx.max(acc, value),
            lambda acc, n: acc,
            self.dtype,
            self._least,
        )

    def reference(self, x: np.ndarray) -> np.ndarray:
        """NumPy meaning: x [h, w, c] to [oh, ow, c]."""
        return self._windows(x, self._least, x.dtype).max(0)


def Mean(h: int, w: int, c: int, dtype: str = "float32", requant: Requant | None = None) -> AvgPool:
    """The mean over height and width: an average pool whose window is the whole map."""
    return AvgPool(h, w, c, (h, w), (1, 1), dtype=dtype, requant=requant)
