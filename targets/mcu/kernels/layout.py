"""Elements in another order: `c/layout.h`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand

AXES = 4
SUFFIXES = {"int8": "i8", "float32": "f32"}


@dataclass(frozen=True)
class Permute(McuKernel):
    """`Transpose`."""

    spec: Transpose
    name = "transpose"

    def operands(self) -> tuple[Operand, ...]:
        operand = Operand(int(np.prod(self.spec.shape)), self.spec.dtype)
        return operand, operand

    def call(self) -> Call:
        shape, permutation = self.spec.merged()
        steps = [int(np.prod(shape[axis + 1 :])) for axis in permutation]
        sizes = [shape[axis] for axis in permutation]
        rest = AXES - len(sizes)
        fields = {"sizes": (1,) * rest + tuple(sizes), "steps": (0,) * rest + tuple(steps)}
        return Call(f"ek_transpose_{SUFFIXES[self.spec.dtype]}", "layout", "ek_transpose_t", fields)


def _transpose(spec: Transpose, weights: Any, device: Device) -> McuKernel | None:
    return Permute(spec) if spec.dtype in SUFFIXES and len(spec.merged()[0]) <= AXES else None


RULES: dict[type, Callable[..., McuKernel | None]] = {Transpose: _transpose}
