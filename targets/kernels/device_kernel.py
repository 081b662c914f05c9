"""What stands in a `Binding` in the place of a CPU template on devices with kernels in a language of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.tir import T


@dataclass(frozen=True)
class Operand:
    """A pointer parameter: so many elements of a NumPy type."""

    elements: int
    dtype: str = "int8"


@dataclass(frozen=True)
class DeviceKernel:
    """Base of the kernels. Subclasses are frozen dataclasses whose fields decide the code, and nothing else does.

    Its PrimFunc has no body: it carries, as the attribute `attribute`, the text that the device's lowering reads,
    through Relax to the memory planner. name: the operation, in reports. macs: multiplications of one call. inplace:
    positions of operands whose memory the output may take over.
    """

    name: ClassVar[str]
    attribute: ClassVar[str]

    @property
    def macs(self) -> int:
        return 0

    @property
    def inplace(self) -> tuple[int, ...]:
        return ()

    def key(self) -> str:
        return repr(self)

    def operands(self) -> tuple[Operand, ...]:
        """Pointers in the order of the call: activations, packed weights, further activations, output."""
        raise NotImplementedError

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The constants among the operands. weights: as in `edgec.lowering.binding.Binding`."""
        return ()

    def text(self, device: Device) -> str:
        """What the device's lowering reads."""
        raise NotImplementedError

    def prim_func(self, device: Device) -> Any:
        """A PrimFunc with these operands that carries `text`."""
        with common.prim_func(self.name, self.inplace) as builder:
            for number, operand in enumerate(self.operands()):
                common.param(f"p{number}", (operand.elements,), operand.dtype)
            T.evaluate(0)
        return builder.get().with_attr(self.attribute, self.text(device))
