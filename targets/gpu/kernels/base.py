"""What every GPU kernel is: launches of functions in the device's language, and its packed weights.

A kernel stands in a `Binding` in the place of the template that the CPU targets use. Its PrimFunc has no body: it
carries the launches, which `edgec.targets.gpu.lower` reads, through Relax to the memory planner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.mcu.kernels.base import Operand
from edgec.targets.tir import T

# Attribute of a PrimFunc that stands for launches.
LAUNCHES = "edgec.gpu_launches"
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One dispatch of `function`, which `text` defines in the device's language (OpenCL C or WGSL).

    arguments: which pointers it takes, as positions: operands, then scratch. grid: work-groups in x, y, z; group: work
    items in each. Equal texts have equal names: the name is derived from the text by `named`.
    """

    function: str
    text: str
    arguments: tuple[int, ...]
    grid: Size
    group: Size


@dataclass(frozen=True)
class GpuKernel:
    """Base of the kernels. Subclasses are frozen dataclasses whose fields decide the launches, and nothing else does.

    name: the operation, in reports. macs: multiplications of one call. inplace: positions of operands whose memory
    the output may take over.
    """

    name: ClassVar[str]

    @property
    def macs(self) -> int:
        return 0

    @property
    def inplace(self) -> tuple[int, ...]:
        return ()

    def key(self) -> str:
        return repr(self)

    def operands(self) -> tuple[Operand, ...]:
        """Buffers in the order of the call: activations, packed weights, further activations, output."""
        raise NotImplementedError

    def scratch(self) -> tuple[int, ...]:
        """Bytes of each buffer behind the output that the launches need between them."""
        return ()

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The constants among the operands. weights: as in `edgec.lowering.binding.Binding`."""
        return ()

    def launches(self, device: Device) -> tuple[Launch, ...]:
        """What to dispatch, one after the other, in the device's language (`device.api`)."""
        raise NotImplementedError

    def variants(self, device: Device) -> tuple[tuple[Launch, ...], ...]:
        """`launches`, and other ones that compute the same from the same operands and scratch: a host measures them on
        the device and keeps the fastest."""
        return (self.launches(device),)

    def prim_func(self, device: Device) -> Any:
        """A PrimFunc with these operands that says what to launch."""
        with common.prim_func(self.name, self.inplace) as builder:
            for number, operand in enumerate(self.operands()):
                common.param(f"p{number}", (operand.elements,), operand.dtype)
            T.evaluate(0)
        plain = [
            [[x.function, x.text, x.arguments, x.grid, x.group] for x in launches] for launches in self.variants(device)
        ]
        return builder.get().with_attr(LAUNCHES, json.dumps([plain, self.scratch(), self.macs]))
