"""Softmax of real numbers: `c/softmax.h`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgec.targets.kernels.softmax import Softmax
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand


@dataclass(frozen=True)
class SoftmaxRows(McuKernel):
    """`Softmax`."""

    spec: Softmax

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        n = self.spec.rows * self.spec.columns
        return Operand(n, "float32"), Operand(n, "float32")

    def call(self) -> Call:
        fields = {"rows": self.spec.rows, "columns": self.spec.columns}
        return Call(f"ek_{self.spec.name}_f32", "softmax", "ek_softmax_t", fields)


RULES: dict[type, Callable[..., McuKernel | None]] = {Softmax: lambda spec, weights, device: SoftmaxRows(spec)}
