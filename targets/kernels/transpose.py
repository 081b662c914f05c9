"""Permutation of axes: NCHW to NHWC and back, and any other order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import loop, parallel, param
from edgec.targets.tir import T

# Elements per side of the square that is read along one axis and written along the other: both sides then use whole
# cache lines several times before they are evicted.
TILE = 16


@dataclass(frozen=True)
class Transpose:
    """y[i_permutation] = x[i]: axis k of the result is axis `permutation[k]` of the input, as in NumPy.

    Raises ValueError when `permutation` does not name every axis once.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    dtype: str = "float32"

    name = "transpose"
    macs = 0
    inplace = ()

    def __post_init__(self) -> None:
        if sorted(self.permutation) != list(range(len(self.shape))):
            raise ValueError(f"{self.permutation} is not a permutation of the axes of {self.shape}")

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.permutation)

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    def merged(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The same permutation in fewest axes: axes of extent 1 dropped, axes that stay neighbours joined."""
        kept = [axis for axis in self.permutation if self.shape[axis] != 1]
        groups: list[list[int]] = []
        for axis in kept:
            joins = groups and all(self.shape[between] == 1 for between in range(groups[-1][-1] + 1, axis))
            if joins and axis > groups[-1][-1]:
                groups[-1].append(axis)
            else:
                groups.append([axis])
        order = sorted(groups)
        shape = tuple(int(np.prod([self.shape[axis] for axis in group])) for group in order)
        return shape, tuple(order.index(group) for group in groups)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        shape, permutation = self.merged()
        if not shape:
            shape, permutation = (1,), (0,)
        rank = len(shape)
        out = tuple(shape[axis] for axis in permutation)
        # In the result's axes: the last one is written in order, `fast` is the one that is read in order.
        last, fast = rank - 1, permutation.index(rank - 1)
        with common.prim_func(self.name) as builder:
            x, y = param("x", shape, self.dtype), param("y", out, self.dtype)

            def element(index: dict[int, Any]) -> None:
                source = [index[permutation.index(axis)] for axis in range(rank)]
                T.buffer_store(y, x[tuple(source)], [index[k] for k in range(rank)])

            def square(index: dict[int, Any], row: Any, column: Any, rows: int, columns: int) -> None:
                loop(rows, lambda i: loop(columns, lambda j: element({**index, fast: row + i, last: column + j})))

            def plane(index: dict[int, Any]) -> None:
                def strip(row: Any, rows: int) -> None:
                    whole, rest = divmod(out[last], TILE)
                    loop(whole, lambda t: square(index, row, t * TILE, rows, TILE))
                    if rest:
                        square(index, row, whole * TILE, rows, rest)

                whole, rest = divmod(out[fast], TILE)
                parallel(whole, lambda t: strip(t * TILE, TILE))
                if rest:
                    strip(whole * TILE, rest)

            def walk(axes: list[int], index: dict[int, Any]) -> None:
                if axes:
                    parallel(out[axes[0]], lambda i: walk(axes[1:], {**index, axes[0]: i}))
                elif fast == last:
                    loop(out[last], lambda i: element({**index, last: i}))
                else:
                    plane(index)

            walk([k for k in range(rank) if k not in (fast, last)], {})
        return builder.get()

    def reference(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.transpose(self.permutation))
