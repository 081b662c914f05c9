"""Tiles of maps: copies of rows, for every element type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgec.targets.kernels.tiles import Crop, Place
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand

FUNCTIONS = {"crop": "ek_crop_bytes", "place": "ek_place_bytes", "place_on": "ek_place_on_bytes"}


@dataclass(frozen=True)
class Window(McuKernel):
    """kind: of FUNCTIONS. The window has `rows` x `columns` of the h x w positions of `planes` maps."""

    kind: str
    planes: int
    h: int
    w: int
    c: int
    top: int
    left: int
    rows: int
    columns: int
    dtype: str
    name = "window"

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,) if self.kind == "place_on" else ()

    def operands(self) -> tuple[Operand, ...]:
        whole = Operand(self.planes * self.h * self.w * self.c, self.dtype)
        tile = Operand(self.planes * self.rows * self.columns * self.c, self.dtype)
        return {"crop": (whole, tile), "place": (tile, whole), "place_on": (whole, tile, whole)}[self.kind]

    def call(self) -> Call:
        position = self.c * np.dtype(self.dtype).itemsize
        stride, planes, rows, run = self.w * position, self.planes, self.rows, self.columns * position
        offset = self.top * stride + self.left * position
        fields = {"planes": planes, "map": self.h * stride, "stride": stride, "offset": offset, "rows": rows}
        if run == stride:
            # Whole rows lie behind each other.
            fields.update(rows=1, stride=stride * rows)
            run *= rows
        return Call(FUNCTIONS[self.kind], "tiles", "ek_crop_t", {**fields, "run": run})


def _window(spec: Crop | Place, weights: object, device: object) -> Window:
    kind = "crop" if isinstance(spec, Crop) else "place_on" if spec.canvas else "place"
    shape = (spec.planes, spec.h, spec.w, spec.c, spec.top, spec.left, spec.rows, spec.columns, spec.dtype)
    return Window(kind, *shape)


RULES: dict[type, Callable[..., McuKernel | None]] = {Crop: _window, Place: _window}
