"""What a pass is: a frozen dataclass whose fields are its options and whose `run` maps a Program to a Program."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.data import Dataset
    from edgec.program import Program
    from edgec.targets.device import Device


class Needs(enum.Flag):
    """What a pass needs besides the model."""

    NOTHING = 0
    CALIBRATION = enum.auto()
    LABELS = enum.auto()


@dataclass(frozen=True)
class Skip:
    """Something a pass or the lowering left alone: shown in the report, because silence is the enemy."""

    layer: str
    what: str
    reason: str


@dataclass
class Context:
    """What the pipeline hands to each pass.

    device: the compile target, or None when a pass is used on its own.
    calibration: a few hundred samples for passes that declare `Needs.CALIBRATION`; their labels are not used.
    training: all samples of `--data` for passes that train, with labels where there are some.
    teacher: the model before the first pass, which recovery passes distil from.
    skipped: passes append what they left alone.
    """

    device: Device | None = None
    calibration: Dataset | None = None
    training: Dataset | None = None
    teacher: Program | None = None
    seed: int = 0
    skipped: list[Skip] = field(default_factory=list)
    log: Callable[[str], None] = lambda message: None

    def calibration_data(self, step: Pass) -> Dataset:
        """The calibration samples. Raises EdgecError, naming the pass, when there are none."""
        if self.calibration is None:
            raise EdgecError("needs calibration data", where=f"pass {step.name}", hint="give --data FILE")
        return self.calibration

    def training_data(self, step: Pass) -> Dataset:
        """The samples to train on: all of `--data`, else the calibration samples. Raises EdgecError likewise."""
        return self.calibration_data(step) if self.training is None else self.training

    def teacher_of(self, step: Pass) -> Program:
        """The model to distil from. Raises EdgecError when a pass is used on its own without one."""
        if self.teacher is None:
            raise EdgecError("needs a teacher", where=f"pass {step.name}", hint="give Context(teacher=...)")
        return self.teacher

    def skip(self, layer: str, what: str, reason: str) -> None:
        entry = Skip(layer, what, reason)
        if entry not in self.skipped:
            self.skipped.append(entry)


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A pass option: a dataclass field with the text, unit and range that help, validation and search read."""
    metadata = {"help": help, "unit": unit, "low": low, "high": high, "choices": tuple(choices) if choices else None}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    `name` is the spelling in a pipeline. `run` never edits its input. A subclass is a frozen dataclass; its fields
    are made with `option(...)`, so that help, validation and documentation come from one place.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[Needs] = Needs.NOTHING
    # False for passes that trade accuracy for cost (pruning, few bits, fewer tokens) and count on recovery after them.
    faithful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            self._validate(entry, getattr(self, entry.name))

    def _validate(self, entry: dataclasses.Field[Any], value: Any) -> None:
        where = f"{self.name}{{{entry.name}}}"
        choices = entry.metadata.get("choices")
        if choices and value not in choices:
            raise EdgecError(f"'{value}' is not a choice", where=where, hint=f"use one of {', '.join(choices)}")
        low, high = entry.metadata.get("low"), entry.metadata.get("high")
        hint = f"use a value in {'' if low is None else low}..{'' if high is None else high}"
        if low is not None and value < low:
            raise EdgecError(f"{value} is below {low}", where=where, hint=hint)
        if high is not None and value > high:
            raise EdgecError(f"{value} is above {high}", where=where, hint=hint)

    def run(self, program: Program, context: Context) -> Program:
        """Apply the pass; returns a new Program and leaves `program` as it was."""
        raise NotImplementedError

    def weaken(self, amount: float) -> Pass | None:
        """The same pass with its strength reduced to `amount` (0 no effect .. 1 as written), or None if it has none.

        Used by `--on-fail relax`, which bisects `amount`.
        """
        return None
