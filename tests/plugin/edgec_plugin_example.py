"""What a third party writes: one pass and one target, without a change to edgec."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from edgec.passbase import Context, Pass, option
from edgec.program import Program
from edgec.targets.device import Device, load_device


@dataclass(frozen=True)
class DropSmall(Pass):
    """Set weights of small magnitude to zero."""

    name: ClassVar[str] = "drop-small"
    threshold: float = option(0.01, "weights below this magnitude become zero", low=0.0)

    def run(self, program: Program, context: Context) -> Program:
        module = program.edit()
        with torch.no_grad():
            for weight in module.parameters():
                weight[weight.abs() < self.threshold] = 0.0
        return program.replace(module)


def my_board() -> Device:
    """A board with this machine's CPU."""
    return dataclasses.replace(load_device("host"), name="my-board", summary="a board of mine", l2_kb=256)
