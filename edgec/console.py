"""What the command line prints: tables and JSON to stdout, progress to stderr. Nothing is decided here."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from edgec.ledger import Ledger

# Wide enough for every table when nobody looks at it: a pipe never wraps lines.
PIPE_WIDTH = 240
# Blanks between two columns of a table.
COLUMN_GAP = 3
# What the ladder does without first; all of it is in the report.
LADDER_EXPENDABLE = ("params", "MACs", "cosine", "agreement", "SQNR")


def console() -> Console:
    """A console on stdout: colours on a terminal, plain unwrapped text in a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(data: Any) -> None:
    """`data` as JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def print_line(text: str = "") -> None:
    """Text without markup on stdout."""
    sys.stdout.write(text + "\n")


def print_rows(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """A table with one column per key of the first row: numbers to the right, `*_bytes` in readable units."""
    if not rows:
        print_line(f"{title}: none" if title else "none")
        return
    columns = list(rows[0])
    cells = [[_cell(key, row.get(key)) for key in columns] for row in rows]
    print_table([_title(key) for key in columns], cells, title)


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    expendable: Sequence[str] = (),
) -> None:
    """A table of ready texts; a column of numbers is set to the right, an empty column is left out.

    expendable: columns that a narrow terminal does without, the first one first.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if title:
        print_line(title)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out = console()
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    for name in expendable:
        if sum(max(len(header[i]), *(len(row[i]) for row in rows)) + COLUMN_GAP for i in shown) > out.width:
            shown = [i for i in shown if header[i] != name]
    for i in shown:
        number = i > 0 and all(not row[i] or row[i] == "-" or row[i][0] in "+-0123456789" for row in rows)
        table.add_column(header[i], justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    with out.capture() as captured:
        out.print(table)
    # Rich pads every line to the width of the table, and the table with empty lines.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    sys.stdout.write("\n".join(lines).strip("\n") + "\n\n")


def print_ledger(ledger: Ledger) -> None:
    """The accuracy ladder, what was left alone, and the figures of the generated code."""
    from edgec.ledger import LADDER_HEADER, format_bytes

    metric = ledger.stages[0].metric.name if ledger.stages else LADDER_HEADER[1]
    # Named after its metric, in a way that no other column is.
    header = [metric if name == "metric" and metric not in LADDER_HEADER else name for name in LADDER_HEADER]
    print_table(header, ledger.ladder(), expendable=LADDER_EXPENDABLE)
    if ledger.stages:
        print_line(f"metric  {metric} on {ledger.stages[0].metric.n:,} samples")
    if "quantised" in ledger.meta:
        print_line(f"model   {ledger.meta['quantised']}")
    groups: dict[tuple[str, str], list[str]] = {}
    for skip in ledger.skipped:
        groups.setdefault((skip.what, skip.reason), []).append(skip.layer)
    if groups:
        rows = [[what, reason, _few(layers)] for (what, reason), layers in groups.items()]
        print_table(("left alone", "reason", "layers"), rows)
    if ledger.device is not None:
        d = ledger.device
        error = "" if d.max_abs_error is None else f"largest difference {d.max_abs_error:.3g}"
        exact = "bit-exact" if d.bit_exact else error
        sizes = f"code {format_bytes(d.code_bytes)}, weights {format_bytes(d.weight_bytes)}"
        arena = f"arena {format_bytes(d.arena_bytes)} (lower bound {format_bytes(d.arena_lower_bound)})"
        parts = (f"{d.target} ({d.runner})", exact, sizes, arena)
        print_line("device  " + ", ".join(part for part in parts if part))


def print_summary(summary: Mapping[str, Any]) -> None:
    """What `edgec inspect` found: one row per layer, then the totals."""
    print_rows(summary["layers"], summary["name"])
    for kind in ("inputs", "outputs"):
        ports = (f"{p['name']} {p['dtype']} {'x'.join(map(str, p['shape']))}" for p in summary[kind])
        print_line(f"{kind:8}{', '.join(ports)}")
    cost = ", ".join(f"{_title(key)} {_cell(key, value)}" for key, value in summary["cost"].items())
    print_line(f"{'total':8}{cost}")


def print_pass(record: Mapping[str, Any]) -> None:
    """A pass as `edgec passes NAME` shows it."""
    print_line(record["name"])
    print_line()
    print_line(record["doc"])
    needs = ", ".join(record["needs"])
    if needs:
        print_line(f"\nNeeds {needs} data.")
    if record["options"]:
        print_line()
        print_rows([{k: "" if v is None else spell(v) for k, v in row.items()} for row in record["options"]])


def print_record(record: Mapping[str, Any]) -> None:
    """One line per entry; what is empty is left out."""
    width = max(len(key) for key in record) + 2
    for key, value in record.items():
        if value not in (None, "", (), []):
            print_line(f"{key:{width}}{_cell('', value)}")


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Infinities and NaN as None, which JSON can hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A function (stage, fraction done) that draws one bar per stage on stderr; silent in CI and in a pipe."""
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield lambda stage, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: float) -> None:
            if stage not in tasks:
                for other in tasks.values():
                    bars.update(other, visible=False)
                tasks[stage] = bars.add_task(stage, total=1.0)
            # A stage that cannot tell how far it is gets a moving bar.
            bars.update(tasks[stage], completed=done, total=1.0 if done > 0 else None, visible=True)

        yield show


def _few(layers: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(layers[:most]) + rest


def spell(value: Any) -> str:
    """An option's value as it is written in a pipeline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(str(v) for v in value) + "]"
    return str(value)


def _title(key: str) -> str:
    return "SQNR dB" if key == "sqnr_db" else key.removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        from edgec.ledger import format_bytes

        return format_bytes(value) if key.endswith("bytes") else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.1f}" if key.endswith("_db") else f"{value:.5f}"
    if isinstance(value, (list, tuple)):
        return "x".join(str(v) for v in value) if key.endswith("shape") else ", ".join(str(v) for v in value)
    return str(value)
