"""What every GPU kernel is: launches of functions in the device's language, and its packed weights.

The launches go with its PrimFunc to `edgec.targets.gpu.lower`, see `DeviceKernel`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

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
    items in each. Equal texts have equal names: the name is derived from the text. helpers: (name, text) of the
    functions that the text calls, each behind those that it calls itself; kernels share them.
    """

    function: str
    text: str
    arguments: tuple[int, ...]
    grid: Size
    group: Size
    helpers: tuple[tuple[str, str], ...] = ()

    def whole(self, api: str) -> str:
        """The text with those of the helpers: a program of its own."""
        helpers = "".join(text for _, text in self.helpers)
        # WGSL begins with what it enables, and knows functions before they are there.
        return helpers + self.text if api == "opencl" else self.text + helpers

    def plain(self) -> list[Any]:
        """As JSON has it; `launch_of` is the way back."""
        return [self.function, self.text, self.arguments, self.grid, self.group, self.helpers]


def launch_of(plain: list[Any]) -> Launch:
    function, text, arguments, grid, group, helpers = plain
    called = tuple((name, helper) for name, helper in helpers)
    return Launch(function, text, tuple(arguments), tuple(grid), tuple(group), called)


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

    def with_half_sums(self) -> GpuKernel:
        """The kernel with products of float16 summed in float16, where the device computes in it; itself where it has
        none."""
        return self

    def text(self, device: Device) -> str:
        plain = [[launch.plain() for launch in launches] for launches in self.variants(device)]
        return json.dumps([plain, self.scratch(), self.macs])
