"""The report of one compilation: `report.json` for machines, `report.html` for people.

The page is one self-contained file: no script, no external resource. The same inputs give the same bytes; run times
are only in the JSON.

Units: accuracies and agreement are fractions 0..1, drops are points (percentage points, dB for PSNR), sizes bytes,
SQNR dB with None where the two tensors are identical. A confidence interval is one of the drop.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from edgec.errors import EdgecError

Row = dict[str, Any]

WORST_LAYERS = 10
PEAK_ROWS = 8
FLAT_SKIPPED = 12
MEMORY_HEIGHT = 320  # CSS pixels
DASH = "–"
MINUS = "−"


def write_report(
    directory: Path,
    ledger: Row,
    *,
    timeline: list[Row],
    sensitivity: list[Row],
    meta: Row | None = None,
) -> None:
    """Write `report.json` and `report.html` into `directory`, which is made if needed.

    report.json is the ledger plus "sensitivity" and "memory" (the rows of `Plan.timeline()`), keys in the order given.
    Neither file is ever half-written.
    """
    document = _plain({**ledger, "sensitivity": sensitivity, "memory": timeline})
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_html(ledger, timeline, sensitivity, meta)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "report.json", text)
        _write(directory / "report.html", page)
    except OSError as error:
        raise EdgecError(
            f"cannot write the report: {error.strerror or error}",
            where=str(directory),
            hint="check that the folder is writable and the disk is not full",
        ) from error


def read_report(bundle: str | Path) -> Row:
    """What `write_report` put into the `report.json` of a bundle. Raises EdgecError when it is not there or broken."""
    path = Path(bundle) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgecError(
            f"cannot be read: {error.strerror}", where=str(path), hint="give the folder that edgec compile wrote"
        ) from error
    except ValueError as error:
        raise EdgecError(f"is not JSON ({error})", where=str(path), hint="compile again") from error
    if not isinstance(report, dict):
        raise EdgecError("is not a report of edgec", where=str(path), hint="compile again")
    return report


def render_html(
    ledger: Row, timeline: Sequence[Row], sensitivity: Sequence[Row], meta: Mapping[str, Any] | None = None
) -> str:
    """The page as text. `meta` has "name", "target", "passes" (text or list); its other entries go into the footer."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    view = _view(_plain(ledger), _plain(list(timeline)), _plain(list(sensitivity)), _plain(dict(meta or {})))
    page = environment.get_template("report.html.jinja").render(**view)
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _plain(value: Any) -> Any:
    """`value` as JSON types: NumPy scalars and arrays become numbers and lists, infinities and NaN become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


# Numbers for people


def _number(value: float | None, digits: int = 2) -> str:
    """A fixed-point number with a real minus sign; never a negative zero."""
    if value is None:
        return DASH
    text = f"{value:,.{digits}f}"
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.,") else MINUS + text[1:]
    return text


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """Three significant digits and a unit."""
    power = 0
    while power + 1 < len(units) and round(value, 0 if power == 0 else 2) >= base:
        value /= base
        power += 1
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {units[power]}".rstrip()


def _bytes(value: float | None) -> str:
    return DASH if value is None else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB"))


def _count(value: float | None) -> str:
    return DASH if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T"))


def _sqnr(value: float | None) -> str:
    return "identical" if value is None else f"{_number(value, 1)} dB"


class _Scale:
    """How one metric is printed; `values` are all its values in the report."""

    def __init__(self, name: str, values: Iterable[float | None]) -> None:
        lowered = name.lower()
        known = [v for v in values if v is not None]
        if "psnr" in lowered or "sqnr" in lowered:
            self.kind = "db"
        elif "cosine" not in lowered and known and all(0 <= v <= 1 for v in known):
            self.kind = "fraction"
        else:
            self.kind = "plain"
        self.unit = {"db": "dB", "fraction": "pt", "plain": ""}[self.kind]
        self.unit_name = {"db": "dB", "fraction": "percentage points", "plain": "points"}[self.kind]

    def value(self, value: float | None) -> str:
        if value is None:
            return DASH
        if self.kind == "fraction":
            return f"{_number(100 * value)} %"
        return f"{_number(value)} dB" if self.kind == "db" else _number(value, 4)

    def drop(self, value: float | None) -> str:
        return DASH if value is None else f"{_number(value, 2 if self.unit else 4)} {self.unit}".rstrip()

    def interval(self, ci: Sequence[float | None] | None) -> str:
        ends = _ends(ci)
        if ends is None:
            return ""
        digits = 2 if self.unit else 4
        return f"{_number(ends[0], digits)} … {_number(ends[1], digits)} {self.unit}".rstrip()


def _ends(ci: Sequence[float | None] | None) -> tuple[float, float] | None:
    if ci is None or len(ci) != 2 or ci[0] is None or ci[1] is None:
        return None
    return float(ci[0]), float(ci[1])


def _breakable(text: str) -> Markup:
    """A line may break after the punctuation of a spelling or path."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[(,.=/])(?=.)", str(text)))


def _percent(value: float) -> str:
    """A coordinate or length for CSS and SVG."""
    return f"{100 * value:.3f}".rstrip("0").rstrip(".") + "%"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round values in [low, high]."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


# What the template prints


def _view(ledger: Row, timeline: list[Row], sensitivity: list[Row], meta: Row) -> Row:
    stages: list[Row] = ledger.get("stages") or []
    device: Row | None = ledger.get("device")
    metrics = [m for m in (*(s.get("metric") for s in stages), (device or {}).get("metric")) if m]
    metric_name = str(metrics[0].get("name") or "metric") if metrics else "metric"
    scale = _Scale(metric_name, [m.get(key) for m in metrics for key in ("value", "reference")])
    memory = _memory(timeline, device)
    return {
        "title": str(meta.get("name") or meta.get("model") or "model"),
        "target": str(meta.get("target") or (device or {}).get("target") or ""),
        "passes": _passes(meta.get("passes"), stages),
        "metric_name": metric_name,
        "drop_unit": scale.unit_name,
        "tiles": _tiles(stages, device, scale, metric_name, memory),
        "ladder": _ladder(stages, device, scale),
        "cost": _cost(stages),
        "layers": _layers(sensitivity),
        "memory": memory,
        "skipped": _skipped(ledger.get("skipped") or []),
        "device": _device(device, scale),
        "footer": [
            (key, _inline(value))
            for key, value in meta.items()
            if key not in ("name", "model", "target", "passes")
            and "seconds" not in key
            and value not in (None, "", [], {})
        ],
    }


def _passes(passes: Any, stages: Sequence[Row]) -> str:
    if isinstance(passes, str):
        return passes
    names = passes if isinstance(passes, list) else [stage["name"] for stage in stages[1:]]
    return ", ".join(map(str, names))


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    return ", ".join(map(_inline, value)) if isinstance(value, list) else str(value)


def _tile(label: str, before: str | None, after: str, *notes: str, state: str = "") -> Row:
    return {"label": label, "before": before, "after": after, "notes": [n for n in notes if n], "state": state}


def _tiles(stages: Sequence[Row], device: Row | None, scale: _Scale, metric_name: str, memory: Row) -> list[Row]:
    """The headline numbers."""
    tiles = []
    measured = [s for s in stages if (s.get("metric") or {}).get("value") is not None]
    original = measured[0]["metric"] if measured else {}
    on_device = (device or {}).get("metric") or {}
    last = on_device if on_device.get("value") is not None else measured[-1]["metric"] if measured else {}
    part = last is on_device and bool(measured) and last.get("n") != original.get("n")
    # Equal bits mean equal accuracy: then the figure on all samples says more than that on some.
    equal = part and bool(device and device.get("bit_exact"))
    if equal:
        last = measured[-1]["metric"]
    if last:
        before, notes = original.get("value"), [_drop_note(last, scale)]
        if last.get("n") is not None:
            notes.append(f"on {last['n']:,} samples")
        if equal:
            notes.append(f"device: the same bits on {on_device['n']:,} of them")
        elif part:
            # A device run on part of the data is compared on that part.
            before = last.get("reference")
            whole = measured[-1]
            count = "" if whole["metric"].get("n") is None else f" on {whole['metric']['n']:,}"
            step = str(whole["name"]).partition("(")[0]
            notes.append(f"after {step}: {scale.value(whole['metric']['value'])}{count}")
        changed = last is on_device or len(measured) > 1
        where = "float → device" if last is on_device or equal else "float → last stage" if changed else "original"
        tiles.append(
            _tile(
                f"{metric_name}, {where}",
                scale.value(before) if changed and before is not None else None,
                scale.value(last["value"]),
                *notes,
                state=_state(last),
            )
        )
    sizes = [s["cost"]["weight_bytes"] for s in stages if (s.get("cost") or {}).get("weight_bytes") is not None]
    if device and device.get("weight_bytes") is not None:
        sizes.append(device["weight_bytes"])
    if sizes:
        first, final = sizes[0], sizes[-1]
        ratio = ""
        if final and first != final:
            ratio = f"{first / final:.2f}× smaller" if first > final else f"{final / first:.2f}× larger"
        code = f"plus {_bytes(device['code_bytes'])} of code" if device and device.get("code_bytes") is not None else ""
        tiles.append(_tile("weights", _bytes(first) if len(sizes) > 1 else None, _bytes(final), ratio, code))
    if memory["arena"]:
        tiles.append(_tile("arena (RAM)", None, memory["arena_text"], memory["verdict"]))
    if device:
        exact = device.get("bit_exact")
        error = device.get("max_abs_error")
        tiles.append(
            _tile(
                "device against the compiler",
                None,
                "not compared" if exact is None else "bit-exact" if exact else "not bit-exact",
                "" if error is None else f"largest difference {error:.3g}",
                str(device.get("runner") or ""),
                state="" if exact is None else "good" if exact else "warn",
            )
        )
    return tiles


def _drop_note(metric: Row, scale: _Scale) -> str:
    if metric.get("drop") is None:
        return ""
    interval = scale.interval(metric.get("ci95"))
    return f"drop {scale.drop(metric['drop'])}" + (f" (95 % CI {interval})" if interval else "")


def _state(metric: Row) -> str:
    """The CSS class of a drop: "bad" where even the low end of the interval is a loss."""
    ends = _ends(metric.get("ci95"))
    return "bad" if ends is not None and ends[0] > 0 else ""


def _ladder(stages: Sequence[Row], device: Row | None, scale: _Scale) -> Row:
    entries = [(s["name"], s.get("metric") or {}, s.get("fidelity"), False) for s in stages]
    if device:
        label = f"device: {device.get('target') or ''}".removesuffix(": ")
        entries.append((label, device.get("metric") or {}, None, True))
    low = high = 0.0
    for _, metric, _, _ in entries:
        known = [v for v in (metric.get("drop"), *(_ends(metric.get("ci95")) or ())) if v is not None]
        low, high = min([low, *known]), max([high, *known])
    if high - low < 1e-9:
        low, high = -1.0, 1.0
    margin = 0.08 * (high - low)
    low, high = low - margin, high + margin

    def at(value: float) -> str:
        return _percent((value - low) / (high - low))

    rows = []
    for index, (name, metric, fidelity, on_device) in enumerate(entries):
        ends, drop = _ends(metric.get("ci95")), metric.get("drop")
        n = metric.get("n")
        fidelity = fidelity or {}
        described = fidelity.get("cosine") is not None and index > 0
        agreement = fidelity.get("agreement")
        rows.append(
            {
                "name": name,
                "value": scale.value(metric.get("value")),
                "drop": scale.drop(drop),
                "interval": scale.interval(ends),
                "n": DASH if n is None else f"{n:,}",
                "x": None if drop is None else at(drop),
                "bar": None if ends is None else (at(ends[0]), at(ends[1])),
                "state": _state(metric),
                "device": on_device,
                "sqnr": _sqnr(fidelity.get("sqnr_db")) if described else DASH,
                "cosine": _number(fidelity["cosine"], 5) if described else DASH,
                "agreement": f"{_number(100 * agreement)} %" if agreement is not None and index > 0 else DASH,
            }
        )
    digits = max(0, -math.floor(math.log10((high - low) / 3)))
    ticks = [{"x": at(t), "label": _number(t, digits)} for t in _ticks(low, high, 4)]
    return {"rows": rows, "zero": at(0.0), "ticks": ticks}


def _cost(stages: Sequence[Row]) -> list[Row]:
    columns = (("params", "parameters", _count), ("macs", "MACs", _count), ("weight_bytes", "weights", _bytes))
    top = {key: max([(s.get("cost") or {}).get(key) or 0 for s in stages], default=0) for key, _, _ in columns}
    return [
        {
            "name": stage["name"],
            "cells": [
                {
                    "label": label,
                    "text": form((stage.get("cost") or {}).get(key)) + _kept(stage.get("cost") or {}, key),
                    "width": _percent(((stage.get("cost") or {}).get(key) or 0) / top[key]) if top[key] else "0%",
                }
                for key, label, form in columns
            ],
        }
        for stage in stages
    ]


def _kept(cost: Row, key: str) -> str:
    """What is left of a cost without pruned elements, where some are."""
    kept, whole = cost.get(f"kept_{key}"), cost.get(key)
    return "" if not whole or kept is None or kept == whole else f" ({_number(100 * kept / whole, 0)} % kept)"


def _layers(sensitivity: Sequence[Row]) -> Row:
    """The worst layers first; the bar is the error's share of the signal (RMS), so a longer one is worse."""
    losing = [row for row in sensitivity if row.get("sqnr_db") is not None]
    losing.sort(key=lambda row: row["sqnr_db"])
    identical = [row for row in sensitivity if row.get("sqnr_db") is None]

    def line(row: Row, top: float) -> Row:
        share = None if row.get("sqnr_db") is None else 10 ** (-row["sqnr_db"] / 20)
        return {
            "layer": row["layer"],
            "sqnr": _sqnr(row.get("sqnr_db")),
            "cosine": _number(row.get("cosine"), 5),
            "error": "0 %" if share is None else f"{100 * share:.3g} %",
            "width": "0%" if share is None else _percent(share / top),
        }

    top = 10 ** (-losing[0]["sqnr_db"] / 20) if losing else 1.0
    return {
        "worst": [line(row, top) for row in losing[:WORST_LAYERS]],
        "all": [line(row, top) for row in (*losing, *identical)],
        "identical": len(identical),
    }


def _memory(timeline: Sequence[Row], device: Row | None) -> Row:
    """The arena over time. Coordinates are percentages of the plot, so that text keeps its size on a phone."""
    rows = [row for row in timeline if row.get("offset") is not None]
    rows.sort(key=lambda row: (row["first"], row["offset"], row["name"]))
    steps = max([row["last"] + 1 for row in rows], default=0)
    alive = [0] * (steps + 1)
    for row in rows:
        alive[row["first"]] += row["nbytes"]
        alive[row["last"] + 1] -= row["nbytes"]
    for step in range(1, len(alive)):
        alive[step] += alive[step - 1]
    peak_step = max(range(steps), key=lambda step: alive[step], default=0)
    arena = (device or {}).get("arena_bytes")
    if arena is None:
        arena = max([row["offset"] + row["nbytes"] for row in rows], default=0)
    bound = (device or {}).get("arena_lower_bound")
    if bound is None:
        bound = max(alive, default=0)
    top = max([arena, bound, 1, *(row["offset"] + row["nbytes"] for row in rows)])
    scale = 0.94 / top

    boxes = []
    for row in rows:
        width, height = (row["last"] - row["first"] + 1) / steps, row["nbytes"] * scale
        full = row["first"] <= peak_step <= row["last"]
        label = str(row.get("layer") or row["name"])
        letters = int((width * 900 - 8) / 6.4)
        span = f"step {row['first']}" if row["first"] == row["last"] else f"steps {row['first']}–{row['last']}"
        boxes.append(
            {
                "x": _percent(row["first"] / steps),
                "y": _percent(1 - (row["offset"] + row["nbytes"]) * scale),
                "width": _percent(width),
                "height": _percent(height),
                "kind": "scratch" if row.get("kind") == "scratch" else "peak" if full else "temp",
                "title": f"{row['name']} · {row.get('layer') or ''} · {row.get('kind') or ''} · "
                f"{_bytes(row['nbytes'])} at offset {row['offset']:,} · {span}",
                "label": _tail(label, letters) if letters >= 6 and height * MEMORY_HEIGHT >= 16 else "",
            }
        )
    at_peak = sorted((r for r in rows if r["first"] <= peak_step <= r["last"]), key=lambda r: (-r["nbytes"], r["name"]))
    verdict = ""
    if bound:
        over = 100 * (arena / bound - 1)
        verdict = "at the lower bound: no plan is smaller" if arena <= bound else f"{over:.1f} % above the lower bound"
    tick = 2 ** math.ceil(math.log2(top / 5)) if top >= 5 else 1
    return {
        "boxes": boxes,
        "height": MEMORY_HEIGHT,
        "steps": steps,
        "arena": arena,
        "arena_text": _bytes(arena),
        "arena_y": _percent(1 - arena * scale),
        "bound_text": _bytes(bound),
        "bound_y": _percent(1 - bound * scale),
        "verdict": verdict,
        "peak_step": peak_step,
        "peak_text": _bytes(alive[peak_step]),
        "peak_x": _percent((peak_step + 0.5) / steps) if steps else "0%",
        "peak_rows": [
            {"name": r["name"], "layer": r.get("layer") or "", "size": _bytes(r["nbytes"])} for r in at_peak[:PEAK_ROWS]
        ],
        "peak_more": max(0, len(at_peak) - PEAK_ROWS),
        "y_ticks": [
            {"y": _percent(1 - k * tick * scale), "label": re.sub(r"\.0+ ", " ", _bytes(k * tick))}
            for k in range(top // tick + 1)
        ],
        "x_ticks": [
            {"x": _percent((step + 0.5) / steps), "label": str(int(step))}
            for step in (_ticks(0, max(steps - 1, 1), 6) if steps else [])
            if step == int(step) and step < steps
        ],
    }


def _tail(text: str, letters: int) -> str:
    """The end of a layer's path says most."""
    return text if len(text) <= letters else "…" + text[len(text) - letters + 1 :]


def _skipped(skipped: Sequence[Row]) -> Row:
    groups: dict[tuple[str, str], list[str]] = {}
    for row in skipped:
        groups.setdefault((str(row.get("what") or ""), str(row.get("reason") or "")), []).append(
            str(row.get("layer") or DASH)
        )
    grouped = len(skipped) > FLAT_SKIPPED
    return {
        "count": len(skipped),
        "grouped": grouped,
        "rows": [
            {"what": what, "reason": reason, "layers": layers}
            for (what, reason), layers in sorted(groups.items(), key=lambda item: -len(item[1]))
        ]
        if grouped
        else [
            {"what": row.get("what") or "", "reason": row.get("reason") or "", "layers": [row.get("layer") or DASH]}
            for row in skipped
        ],
    }


def _device(device: Row | None, scale: _Scale) -> list[tuple[str, str]]:
    if not device:
        return []
    metric = device.get("metric") or {}
    error = device.get("max_abs_error")
    value = scale.value(metric.get("value"))
    if metric.get("n") is not None:
        value += f" on {metric['n']:,} samples"
    if metric.get("reference") is not None:
        value += f", reference {scale.value(metric['reference'])}"
    board: list[tuple[str, str]] = []
    if device.get("instructions") is not None:
        bits = "the same bits" if device["board_bit_exact"] else "the same to float rounding"
        board = [
            ("Board", f"{device['machine']}: {bits} as on this machine for {device['board_samples']} samples"),
            ("Instructions", f"{device['instructions']:,} ({device['instructions_per_mac']:.3f} per MAC)"),
            ("Flash", _bytes(device["flash_bytes"])),
            ("Stack", _bytes(device["stack_bytes"])),
        ]
    return [
        ("Target", str(device.get("target") or DASH)),
        ("Runner", str(device.get("runner") or DASH)),
        (str(metric.get("name") or "Metric"), value),
        ("Drop", _drop_note(metric, scale).removeprefix("drop ") or DASH),
        ("Bit-exact", DASH if device.get("bit_exact") is None else "yes" if device["bit_exact"] else "no"),
        ("Largest absolute difference", DASH if error is None else f"{error:.3g}"),
        ("Weights", _bytes(device.get("weight_bytes"))),
        ("Code", _bytes(device.get("code_bytes"))),
        ("Arena", _bytes(device.get("arena_bytes"))),
        ("Arena lower bound", _bytes(device.get("arena_lower_bound"))),
        *board,
    ]
