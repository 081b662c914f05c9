"""What every GPU kernel is: launches of functions in the device's language, and its packed weights.

The launches go with its PrimFunc to `edgec.targets.gpu.lower`, see `DeviceKernel`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from edgec.targets.device import Device
from edgec.targets.kernels.device_kernel import DeviceKernel
from edgec.targets.kernels.device_kernel import Operand as Operand

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
class GpuKernel(DeviceKernel):
    """Base of the kernels of GPUs."""

    attribute = LAUNCHES

    def scratch(self) -> tuple[int, ...]:
        """Bytes of each buffer behind the output that the launches need between them."""
        return ()

    def launches(self, device: Device) -> tuple[Launch, ...]:
        """What to dispatch, one after the other, in the device's language (`device.api`)."""
        raise NotImplementedError

    def variants(self, device: Device) -> tuple[tuple[Launch, ...], ...]:
        """`launches`, and other ones that compute the same from the same operands and scratch: a host measures them on
        the device and keeps the fastest."""
        return (self.launches(device),)

    def text(self, device: Device) -> str:
        plain = [
            [[x.function, x.text, x.arguments, x.grid, x.group] for x in launches] for launches in self.variants(device)
        ]
        return json.dumps([plain, self.scratch(), self.macs])
