"""What every microcontroller kernel is: a function of the kernel header, its parameters, and its packed weights.

A kernel stands in a `Binding` in the place of the template that the CPU targets use. Its PrimFunc has no body: it
carries the call, which `edgec.targets.mcu.lower` reads, through Relax to the memory planner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.tir import T

# Attribute of a PrimFunc that stands for a function of the kernel header.
CALL = "edgec.mcu_call"
# A C literal, or an array of them.
Value = int | float | Sequence[int]


@dataclass(frozen=True)
class Operand:
    """A pointer parameter: so many elements of a NumPy type."""

    elements: int
    dtype: str = "int8"


@dataclass(frozen=True)
class Call:
    """A call `function(&parameters, pointers...)`.

    part: the file of `targets/mcu/c` (without .h) that defines it. struct: the C type of the parameters, whose fields
    are given by name; None: the function takes pointers only. scratch: bytes of each pointer behind the output.
    """

    function: str
    part: str
    struct: str | None = None
    fields: Mapping[str, Value] = field(default_factory=dict)
    scratch: tuple[int, ...] = ()

    def to_json(self) -> str:
        plain = {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in self.fields.items()}
        return json.dumps([self.function, self.part, self.struct, plain, list(self.scratch)])

    @staticmethod
    def from_json(text: str) -> Call:
        function, part, struct, fields, scratch = json.loads(text)
        return Call(function, part, struct, fields, tuple(scratch))


@dataclass(frozen=True)
class McuKernel:
    """Base of the kernels. Subclasses are frozen dataclasses whose fields decide the call, and nothing else does.

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
        """Pointers in the order of the C parameters: activations, packed weights, further activations, output."""
        raise NotImplementedError

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """The constants among the operands. weights: as in `edgec.lowering.binding.Binding`."""
        return ()

    def call(self) -> Call:
        raise NotImplementedError

    def prim_func(self, device: Device) -> Any:
        """A PrimFunc with these operands that says what to call."""
        with common.prim_func(self.name, self.inplace) as builder:
            for number, operand in enumerate(self.operands()):
                common.param(f"p{number}", (operand.elements,), operand.dtype)
            T.evaluate(0)
        return builder.get().with_attr(CALL, self.call().to_json())
