"""A check: how much of a metric a step may lose, and what happens when it loses more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgec.errors import EdgecError
from edgec.metrics import FRACTION, Comparison, parse_metric

ON_FAIL = ("error", "revert", "relax")
# Drops are means of float64 values: 1 point of 500 samples must not exceed a limit of 1 by a rounding error.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Verdict:
    """`message` is one line with the figures, whether the check passed or not."""

    passed: bool
    message: str


@dataclass(frozen=True)
class Check:
    """The gate after each step.

    metric: spelling of the metric. max_drop: largest drop against the original model, in percentage points for
    fractions (1.0 allows 91.4 % to become 90.4 %) and in the metric's unit otherwise, >= 0; None sets no limit.
    on_fail: "error" stops the compile, "revert" drops the step, "relax" weakens it.
    Raises EdgecError for other values.
    """

    metric: str
    max_drop: float | None = None
    on_fail: str = "error"

    def __post_init__(self) -> None:
        # Spelled as the metric spells itself; a function is not loaded for that.
        if ":" not in self.metric:
            object.__setattr__(self, "metric", parse_metric(self.metric).name)
        if self.max_drop is not None and not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise EdgecError(
                f"{self.max_drop} is not a drop", where="--max-drop", hint="give points, 0 or more; 1.0 is one point"
            )
        if self.on_fail not in ON_FAIL:
            raise EdgecError(
                f"'{self.on_fail}' is not a choice", where="--on-fail", hint=f"use one of {', '.join(ON_FAIL)}"
            )

    def verdict(self, comparison: Comparison) -> Verdict:
        """Whether the candidate may stay. Outputs that are not finite never pass, even without a limit.

        The limit holds for the measured drop, not for the ends of its confidence interval.
        Raises EdgecError when the comparison was made with another metric.
        """
        if comparison.metric.name != self.metric:
            raise EdgecError(f"check of {self.metric} got a comparison of {comparison.metric.name}", where="check")
        if comparison.nonfinite:
            message = f"{comparison.nonfinite} of {comparison.n} samples give NaN or infinite outputs"
            if comparison.reference_nonfinite:
                message += f" (with the original model: {comparison.reference_nonfinite})"
            return Verdict(False, message)
        figures = describe(comparison)
        if math.isnan(comparison.drop):
            return Verdict(False, f"{figures}: the drop cannot be computed")
        if self.max_drop is None:
            return Verdict(True, figures)
        passed = comparison.drop <= self.max_drop + ROUNDING
        allowed = f"{self.max_drop:g} {_unit(comparison)} allowed"
        return Verdict(passed, f"{figures}; {allowed}")


def describe(comparison: Comparison) -> str:
    """`top1 91.43 % -> 90.04 % (drop 1.39 points, 95 % CI 0.21 to 2.58, n=502)`."""
    fraction = comparison.metric.unit == FRACTION
    scale, unit = (100, "%") if fraction else (1, comparison.metric.unit)
    before, after = (f"{scale * v:.2f} {unit}" for v in (comparison.reference, comparison.value))
    interval = ""
    if comparison.ci95 is not None:
        interval = f", 95 % CI {comparison.ci95[0]:.2f} to {comparison.ci95[1]:.2f}"
    drop = f"drop {comparison.drop:.2f} {_unit(comparison)}"
    return f"{comparison.metric.name} {before} -> {after} ({drop}{interval}, n={comparison.n})"


def _unit(comparison: Comparison) -> str:
    return "points" if comparison.metric.unit == FRACTION else comparison.metric.unit
