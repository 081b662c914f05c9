"""The ledger: one record per step of a compile, as plain data for `report.json` and for tables.

Schema of `Ledger.to_json()`; keys always come in this order:

    {"stages": [{"name",
                 "metric": {"name", "unit", "value", "n", "reference", "drop", "ci95": [low, high] | null},
                 "fidelity": {"cosine", "sqnr_db", "agreement"},
                 "cost": {"params", "macs", "weight_bytes"[, "kept_params", "kept_macs"]},
                 "seconds"}],
     "skipped": [{"layer", "what", "reason"}],
     "device": null | {"target", "runner", "metric": null | {...}, "bit_exact", "max_abs_error", "arena_bytes",
                       "arena_lower_bound", "code_bytes", "weight_bytes"},
     "meta": {...}}

Units: metrics named with unit "fraction" are 0..1 and their drops are in percentage points; dB stays dB; sizes are
bytes. The costs `kept_...` leave out pruned elements and are there where some are. A number that is NaN or infinite is
null. `seconds` is wall-clock time and the only thing that may differ between two equal compiles:
`to_json(volatile=False)` leaves it out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgec.errors import EdgecError
from edgec.metrics import FRACTION, Comparison, Metric
from edgec.passbase import Skip

COST_KEYS = ("params", "macs", "weight_bytes")
KEPT_KEYS = ("kept_params", "kept_macs")
LADDER_HEADER = ("step", "metric", "drop", "95 % CI", "cosine", "SQNR", "agreement", "params", "MACs", "weights")


@dataclass(frozen=True)
class MetricRecord:
    """value and reference in `unit`; drop and ci95 in points (fractions) or in `unit`; positive drops are worse."""

    name: str
    unit: str
    value: float | None
    n: int
    reference: float | None
    drop: float | None
    ci95: tuple[float, float] | None

    @staticmethod
    def of(comparison: Comparison) -> MetricRecord:
        ci95 = comparison.ci95
        return MetricRecord(
            name=comparison.metric.name,
            unit=comparison.metric.unit,
            value=_number(comparison.value),
            n=int(comparison.n),
            reference=_number(comparison.reference),
            drop=_number(comparison.drop),
            ci95=None if ci95 is None else (float(ci95[0]), float(ci95[1])),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "value": self.value,
            "n": self.n,
            "reference": self.reference,
            "drop": self.drop,
            "ci95": None if self.ci95 is None else list(self.ci95),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> MetricRecord:
        fields = {key: data[key] for key in ("name", "unit", "value", "n", "reference", "drop")}
        ci95 = data["ci95"]
        return MetricRecord(**fields, ci95=None if ci95 is None else (ci95[0], ci95[1]))


@dataclass(frozen=True)
class StageRecord:
    """One step: the metric against the original model, fidelity to it, cost, and the wall-clock seconds it took.

    cosine (-1..1), sqnr_db (cut at 150 dB) and agreement (fraction, classifiers only) compare its outputs with those
    of the original model.
    """

    name: str
    metric: MetricRecord
    cosine: float | None
    sqnr_db: float | None
    agreement: float | None
    cost: Mapping[str, int]
    seconds: float = 0.0

    @staticmethod
    def of(
        name: str, metric: Metric, comparison: Comparison, cost: Mapping[str, int], seconds: float = 0.0
    ) -> StageRecord:
        """The record of `comparison`, which must be one of `metric`; `cost` has params, macs and weight_bytes."""
        if metric.name != comparison.metric.name:
            raise EdgecError(f"comparison of {comparison.metric.name}, not of {metric.name}", where=f"stage {name}")
        return StageRecord(
            name=name,
            metric=MetricRecord.of(comparison),
            cosine=_number(comparison.cosine),
            sqnr_db=_number(comparison.sqnr_db),
            agreement=_number(comparison.agreement),
            cost=_cost(cost),
            seconds=float(seconds),
        )

    def to_json(self, volatile: bool = True) -> dict[str, Any]:
        record = {
            "name": self.name,
            "metric": self.metric.to_json(),
            "fidelity": {"cosine": self.cosine, "sqnr_db": self.sqnr_db, "agreement": self.agreement},
            "cost": _cost(self.cost),
        }
        return {**record, "seconds": round(self.seconds, 3)} if volatile else record

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> StageRecord:
        fidelity = data["fidelity"]
        return StageRecord(
            name=data["name"],
            metric=MetricRecord.from_json(data["metric"]),
            cosine=fidelity["cosine"],
            sqnr_db=fidelity["sqnr_db"],
            agreement=fidelity["agreement"],
            cost=_cost(data["cost"]),
            seconds=data.get("seconds", 0.0),
        )


@dataclass(frozen=True)
class BoardRecord:
    """A microcontroller's code on QEMU's board `machine`: `board_samples` gave what the same code gives on the
    compiling machine, board_bit_exact: to the last bit of a float.

    instructions: of one inference, exact, no cycles. flash_bytes: what the model adds to a program. stack_bytes: the
    deepest
    use of the stack. steps: instructions of each call of the plan.
    """

    machine: str
    board_samples: int
    board_bit_exact: bool
    instructions: int
    instructions_per_mac: float
    flash_bytes: int
    stack_bytes: int
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class DeviceRecord:
    """The generated code: metric on the device against the original model, and what it occupies, in bytes.

    bit_exact: every output equals that of the Program; None when that was not measured. max_abs_error: largest
    difference of an output. arena_lower_bound: no memory plan can be smaller than this.
    """

    target: str
    runner: str
    metric: MetricRecord | None
    bit_exact: bool | None
    max_abs_error: float | None
    arena_bytes: int
    arena_lower_bound: int
    code_bytes: int
    weight_bytes: int
    board: BoardRecord | None = None

    @staticmethod
    def of(
        *,
        target: str,
        runner: str,
        metric: Metric,
        comparison: Comparison | None,
        bit_exact: bool | None,
        max_abs_error: float | None,
        arena_bytes: int,
        arena_lower_bound: int,
        code_bytes: int,
        weight_bytes: int,
        board: BoardRecord | None = None,
    ) -> DeviceRecord:
        """The record of `comparison`, which must be one of `metric`; None when nothing ran on the device."""
        if comparison is not None and metric.name != comparison.metric.name:
            raise EdgecError(f"comparison of {comparison.metric.name}, not of {metric.name}", where=f"device {target}")
        return DeviceRecord(
            target=target,
            runner=runner,
            metric=None if comparison is None else MetricRecord.of(comparison),
            bit_exact=None if bit_exact is None else bool(bit_exact),
            max_abs_error=_number(max_abs_error),
            arena_bytes=int(arena_bytes),
            arena_lower_bound=int(arena_lower_bound),
            code_bytes=int(code_bytes),
            weight_bytes=int(weight_bytes),
            board=board,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "runner": self.runner,
            "metric": None if self.metric is None else self.metric.to_json(),
            "bit_exact": self.bit_exact,
            "max_abs_error": _number(self.max_abs_error),
            "arena_bytes": self.arena_bytes,
            "arena_lower_bound": self.arena_lower_bound,
            "code_bytes": self.code_bytes,
            "weight_bytes": self.weight_bytes,
            # Only of microcontrollers.
            **({} if self.board is None else dataclasses.asdict(self.board) | {"steps": list(self.board.steps)}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DeviceRecord:
        plain = ("target", "runner", "bit_exact", "max_abs_error")
        sizes = ("arena_bytes", "arena_lower_bound", "code_bytes", "weight_bytes")
        metric, board = data["metric"], None
        if "flash_bytes" in data:
            names = [f.name for f in dataclasses.fields(BoardRecord) if f.name != "steps"]
            board = BoardRecord(**{key: data[key] for key in names}, steps=tuple(data["steps"]))
        return DeviceRecord(
            metric=None if metric is None else MetricRecord.from_json(metric),
            **{key: data[key] for key in plain + sizes},
            board=board,
        )


@dataclass
class Ledger:
    """What a compile did and measured. `meta` is plain data: model, target, pipeline, data, versions."""

    stages: list[StageRecord] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    device: DeviceRecord | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self, volatile: bool = True) -> dict[str, Any]:
        """Plain data in a stable order; without `volatile`, equal compiles give equal data."""
        return {
            "stages": [stage.to_json(volatile) for stage in self.stages],
            "skipped": [{"layer": s.layer, "what": s.what, "reason": s.reason} for s in self.skipped],
            "device": None if self.device is None else self.device.to_json(),
            "meta": self.meta,
        }

    def dumps(self, volatile: bool = True) -> str:
        """`to_json` as text with a final newline. Raises EdgecError when `meta` is not plain data."""
        try:
            return json.dumps(self.to_json(volatile), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise EdgecError(f"ledger cannot be written: {error}", where="report.json") from error

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "report.json") -> Ledger:
        """The ledger that `to_json` wrote. Raises EdgecError when a part is missing or of the wrong kind."""
        try:
            return Ledger(
                stages=[StageRecord.from_json(stage) for stage in data["stages"]],
                skipped=[Skip(s["layer"], s["what"], s["reason"]) for s in data["skipped"]],
                device=None if data["device"] is None else DeviceRecord.from_json(data["device"]),
                meta=dict(data["meta"]),
            )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise EdgecError(
                f"is not a report of edgec ({type(error).__name__}: {error})", where=where, hint="compile again"
            ) from error

    @staticmethod
    def loads(text: str, where: str = "report.json") -> Ledger:
        """The ledger that `dumps` wrote. Raises EdgecError when the text is not JSON or not a ledger."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise EdgecError(f"is not JSON ({error})", where=where, hint="compile again") from error
        return Ledger.from_json(data, where)

    def ladder(self) -> list[tuple[str, ...]]:
        """One row of text per step, under LADDER_HEADER; the generated code comes last when it was measured."""
        rows = [
            (
                stage.name,
                *_metric_cells(stage.metric),
                _format(stage.cosine, "{:.5f}"),
                _format(stage.sqnr_db, "{:.1f} dB"),
                _format(stage.agreement, "{:.2%}").replace("%", " %"),
                _count(stage.cost, "params"),
                _count(stage.cost, "macs"),
                format_bytes(stage.cost["weight_bytes"]),
            )
            for stage in self.stages
        ]
        if self.device is not None and self.device.metric is not None:
            cells = _metric_cells(self.device.metric)
            sizes = ("", "", "", "", "", format_bytes(self.device.weight_bytes))
            rows.append((f"device {self.device.target}", *cells, *sizes))
        return rows


def format_bytes(n: int) -> str:
    """`12 B`, `3.4 KiB`, `5.6 MiB`."""
    if n < 1024:
        return f"{n} B"
    for unit in ("KiB", "MiB"):
        n_unit = n / (1024 if unit == "KiB" else 1024**2)
        if n_unit < 1024:
            return f"{n_unit:.1f} {unit}"
    return f"{n / 1024**3:.1f} GiB"


def _metric_cells(metric: MetricRecord) -> tuple[str, str, str]:
    """Value, drop and interval; the interval in the unit of the drop."""
    fraction = metric.unit == FRACTION
    value = None if metric.value is None else metric.value * (100 if fraction else 1)
    interval = "" if metric.ci95 is None else f"{metric.ci95[0]:+.2f} … {metric.ci95[1]:+.2f}"
    return _format(value, "{:.2f} " + ("%" if fraction else metric.unit)), _format(metric.drop, "{:+.2f}"), interval


def _cost(given: Mapping[str, int]) -> dict[str, int]:
    """The costs in their order; without what is kept where that is everything."""
    cost = {key: int(given[key]) for key in COST_KEYS}
    kept = {key: int(given[key]) for key in KEPT_KEYS if key in given}
    return {**cost, **kept} if any(kept[k] != cost[k.removeprefix("kept_")] for k in kept) else cost


def _count(cost: Mapping[str, int], key: str) -> str:
    """`272,474`, or `272,474 (50 % kept)`."""
    kept = cost.get(f"kept_{key}", cost[key])
    return f"{cost[key]:,}" if kept == cost[key] else f"{cost[key]:,} ({kept / cost[key]:.0%} kept)".replace("%", " %")


def _format(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)


def _number(value: float | None) -> float | None:
    """A Python float, or None for what JSON cannot hold."""
    return float(value) if value is not None and math.isfinite(value) else None
