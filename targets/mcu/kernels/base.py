"""What every microcontroller kernel is: a function of the kernel header, its parameters, and its packed weights.

The call goes with its PrimFunc to `edgec.targets.mcu.lower`, see `DeviceKernel`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgec.targets.device import Device
from edgec.targets.kernels.device_kernel import DeviceKernel
from edgec.targets.kernels.device_kernel import Operand as Operand

# Attribute of a PrimFunc that stands for a function of the kernel header.
CALL = "edgec.mcu_call"
# A C literal, or an array of them.
Value = int | float | Sequence[int]


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
class McuKernel(DeviceKernel):
    """Base of the kernels of microcontrollers."""

    attribute = CALL

    def call(self) -> Call:
        raise NotImplementedError

    def text(self, device: Device) -> str:
        return self.call().to_json()
