"""What memory a model may take on a microcontroller, and whether it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.plan import Plan, Port
    from edgec.program import Program
    from edgec.targets.device import Device

UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000_000, "kib": 1 << 10, "mib": 1 << 20}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.I)
# Stack for the model's function until it is measured: the deepest of ours take about 500 bytes.
STACK_BYTES = 1024


def parse_size(text: str, where: str) -> int:
    """Bytes of "320KiB", "80kB", "1MiB" or a plain number. Raises EdgecError."""
    match = SIZE.fullmatch(text)
    factor = UNITS.get(match.group(2).lower()) if match else None
    if match is None or factor is None or float(match.group(1)) == 0:
        raise EdgecError(f"'{text}' is not a size", where=where, hint="write it like 320KiB, 80kB or 1MiB")
    return int(float(match.group(1)) * factor)


@dataclass(frozen=True)
class Budget:
    """sram_bytes, flash_bytes: of the whole chip, None for no limit. fit: change the plan until it fits.
    external_io: inputs and outputs lie in memory that is not counted, as a camera's frame buffer."""

    sram_bytes: int | None = None
    flash_bytes: int | None = None
    fit: bool = False
    external_io: bool = False

    @staticmethod
    def of(device: Device, sram: str | None, flash: str | None, fit: bool, external_io: bool) -> Budget:
        """The limits given, else those of the board. Raises EdgecError for sizes that are none, and when there is
        nothing to keep to."""
        if not device.is_mcu:
            if sram is not None or flash is not None or fit or external_io:
                option = "--sram" if sram is not None else "--flash" if flash is not None else "--fit"
                option = option if sram or flash or fit else "--external-io"
                raise EdgecError("is for microcontrollers", where=option, hint="see `edgec targets`")
            return Budget()
        sram_bytes = parse_size(sram, "--sram") if sram is not None else device.sram_kb and device.sram_kb << 10
        flash_bytes = parse_size(flash, "--flash") if flash is not None else device.flash_kb and device.flash_kb << 10
        if fit and sram_bytes is None:
            raise EdgecError("has nothing to fit into", where="--fit", hint="give --sram SIZE, or a board as --target")
        return Budget(sram_bytes, flash_bytes, fit, external_io)

    def io_bytes(self, ports: Sequence[Port]) -> int:
        """SRAM for inputs and outputs."""
        return 0 if self.external_io else sum(p.nbytes for p in ports)

    def arena(self, ports: Sequence[Port]) -> int | None:
        """Bytes that are left for the arena. Raises EdgecError when that is nothing."""
        if self.sram_bytes is None:
            return None
        io = self.io_bytes(ports)
        left = self.sram_bytes - io - STACK_BYTES
        if left <= 0:
            raise EdgecError(
                f"{self.sram_bytes:,} bytes do not hold inputs and outputs ({io:,}) and {STACK_BYTES:,} of stack",
                where="--sram",
                hint="use a smaller input, or --external-io when they lie elsewhere",
            )
        return left


def fitted(
    staged: Program, plan_of: Callable[[Program], Plan], arena_bytes: int, fit: bool
) -> tuple[Program, list[str]]:
    """(a graph whose arena has at most `arena_bytes`, a line for each measure taken), see `edgec.fit.fit_memory`.

    Raises EdgecError when there is none; without `fit`, also when a measure would be needed, and names it.
    """
    from edgec.fit import fit_memory, too_large

    candidate, lines = fit_memory(staged, plan_of, arena_bytes)
    if lines and not fit:
        raise too_large(plan_of(staged), arena_bytes, f"--fit makes it fit: {'; '.join(lines)}")
    return candidate, lines


def check_stack(budget: Budget, plan: Plan, stack_bytes: int) -> None:
    """Raise EdgecError when arena, inputs, outputs and the stack that was measured exceed the SRAM."""
    if budget.sram_bytes is None:
        return
    io = budget.io_bytes((*plan.inputs, *plan.outputs))
    needed = plan.arena_bytes + io + stack_bytes
    if needed > budget.sram_bytes:
        raise EdgecError(
            f"needs {needed:,} bytes of SRAM (arena {plan.arena_bytes:,}, inputs and outputs {io:,}, "
            f"stack {stack_bytes:,}), {budget.sram_bytes:,} are there",
            where=f"SRAM of {plan.name}",
            hint="give --fit, or a smaller --sram to --fit",
        )
