"""Softmax and its logarithm over the last axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.elementary import exp_of_nonpositive
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, parallel, param, ramp, splat
from edgec.targets.kernels.rows import Reduction, strip
from edgec.targets.tir import T, tirx


@dataclass(frozen=True)
class Softmax:
    """x [rows, columns] to y of the same shape; log: log_softmax. Rows of -inf only, and rows with NaN, become NaN."""

    rows: int
    columns: int
    log: bool = False

    dtype = "float32"
    macs = 0
    inplace = (0,)

    @property
    def name(self) -> str:
        return "log_softmax" if self.log else "softmax"

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.rows, self.columns), "float32")
            y = param("y", (self.rows, self.columns), "float32")
            reduction = Reduction(device.lanes)
            # Maximum, and what the exponentials are multiplied with, or the whole subtrahend of the logarithm.
            state = T.alloc_buffer((2,), "float32", scope="local")

            def row(r: Any) -> None:
                def power(offset: Any, width: int) -> Any:
                    return exp_of_nonpositive(x[r, ramp(offset, width)] - splat(state[0], width), width)

                def put(offset: Any, width: int, value: Any) -> None:
                    T.buffer_store(y, value, [r, ramp(offset, width)])

                maximum(reduction, self.columns, lambda offset, width: x[r, ramp(offset, width)], state)
                if self.log:
                    total = reduction.row
                    total(
                        self.columns,
                        power,
                        lambda value: T.buffer_store(state, state[0] + tirx.log(value), [1]),
                    )
                    strip(
                        self.columns,
                        device.lanes,
                        lambda offset, width: put(offset, width, x[r, ramp(offset, width)] - splat(state[1], width)),
                    )
                    return
                strip(self.columns, device.lanes, lambda offset, width: put(offset, width, power(offset, width)), 2)
                reduction.row(
                    self.columns,
                    lambda offset, width: y[r, ramp(offset, width)],
                    lambda value: T.buffer_store(state, const(1.0, "float32") / value, [1]),
                )
                strip(
                    self.columns,
                    device.lanes,
                    lambda offset, width: put(offset, width, y[r, ramp(offset, width)] * splat(state[1], width)),
                )

            parallel(self.rows, row)
        return builder.get()

    def reference(self, x: np.ndarray) -> np.ndarray:
        """NumPy meaning: x [rows, columns]."""
        value = x.astype(np.float64)
        value = value - value.max(-1, keepdims=True)
        total = np.exp(value).sum(-1, keepdims=True)
        return (value - np.log(total) if self.log else np.exp(value) / total).astype(np.float32)


def maximum(reduction: Reduction, columns: int, value: Any, state: Any) -> None:
    """state[0] = max of value(offset, width) over 0..columns."""
    reduction.row(columns, value, lambda most: T.buffer_store(state, most, [0]), tirx.max, -math.inf)
