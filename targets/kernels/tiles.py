"""Cutting tiles out of maps and putting them back, for networks that compute their first layers tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import loop, param
from edgec.targets.tir import T


@dataclass(frozen=True)
class _Move:
    """Window (top, left, rows, columns) of `planes` maps of h x w positions with c elements each."""

    planes: int
    h: int
    w: int
    c: int
    top: int
    left: int
    rows: int
    columns: int
    dtype: str = "int8"

    name = "move"
    macs = 0

    def __post_init__(self) -> None:
        inside = 0 <= self.top <= self.h - self.rows and 0 <= self.left <= self.w - self.columns
        if not inside or min(self.rows, self.columns) < 1:
            raise ValueError(f"{self} reaches beyond the map")

    @property
    def inplace(self) -> tuple[int, ...]:
        return ()

    def key(self) -> str:
        return repr(self)

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return ()

    def walk(self, element: Any) -> None:
        """Call element(position in the map, position in the window) for every element of the window."""
        run = self.columns * self.c

        def row(plane: Any, y: Any) -> None:
            at = ((plane * self.h + self.top + y) * self.w + self.left) * self.c
            own = (plane * self.rows + y) * run
            loop(run, lambda i: element(at + i, own + i))

        loop(self.planes, lambda plane: loop(self.rows, lambda y: row(plane, y)))


@dataclass(frozen=True)
class Crop(_Move):
    """y = the window of x."""

    name = "crop"

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, y."""
        with common.prim_func(self.name) as builder:
            x = param("x", (self.planes * self.h * self.w * self.c,), self.dtype)
            y = param("y", (self.planes * self.rows * self.columns * self.c,), self.dtype)
            self.walk(lambda at, own: T.buffer_store(y, x[at], [own]))
        return builder.get()

    def reference(self, x: np.ndarray) -> np.ndarray:
        maps = x.reshape(self.planes, self.h, self.w, self.c)
        return maps[:, self.top : self.top + self.rows, self.left : self.left + self.columns].copy()


@dataclass(frozen=True)
class Place(_Move):
    """y = the canvas with the tile in its window; without a canvas, y is arbitrary outside of the window.

    The result may take over the memory of the canvas; it is copied where it does not.
    """

    canvas: bool = True
    name = "place"

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,) if self.canvas else ()

    def prim_func(self, device: Device) -> Any:
        """Parameters: the canvas if there is one, tile, y."""
        whole = self.planes * self.h * self.w * self.c
        with common.prim_func(self.name, self.inplace) as builder:
            canvas = param("canvas", (whole,), self.dtype) if self.canvas else None
            tile = param("tile", (self.planes * self.rows * self.columns * self.c,), self.dtype)
            y = param("y", (whole,), self.dtype)
            if canvas is not None:
                loop(whole, lambda i: T.buffer_store(y, canvas[i], [i]))
            self.walk(lambda at, own: T.buffer_store(y, tile[own], [at]))
        return builder.get()

    def reference(self, canvas: np.ndarray | None, tile: np.ndarray) -> np.ndarray:
        shape = (self.planes, self.h, self.w, self.c)
        y = np.zeros(shape, tile.dtype) if canvas is None else canvas.reshape(shape).copy()
        y[:, self.top : self.top + self.rows, self.left : self.left + self.columns] = tile.reshape(
            self.planes, self.rows, self.columns, self.c
        )
        return y
