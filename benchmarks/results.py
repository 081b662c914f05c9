"""Compile the shared models in fp32 and int8 and print the tables of docs/results.md.

python -m benchmarks.results [--target host --target cortex-a72] [--model NAME ...] [--samples N] [--device-samples N]
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.models import CASES, Case, shared_folder

PASSES = {"fp32": "", "int8": "fold-bn, quantize-int8"}


def measure(
    case: Case, kind: str, target: str, shared: Path, device_samples: int | None, samples: int | None = None
) -> dict[str, object]:
    """Compile one model once and return a row of figures; an error becomes the row's text.

    samples: evaluate on the first so many only; device_samples: run so many of them through the generated code.
    """
    from edgec import EdgecError, compile_model

    with tempfile.TemporaryDirectory() as folder:
        try:
            result = compile_model(
                case.path(shared),
                target=target,
                passes=PASSES[kind],
                data=case.source(shared, case.data),
                eval=_first(case.source(shared, case.evaluation), samples),
                mean=case.mean,
                std=case.std,
                input_scale=case.input_scale,
                metric=case.metric,
                output=Path(folder) / "out",
                device_samples=device_samples,
            )
        except EdgecError as error:
            return {"model": case.model, "kind": kind, "target": target, "error": str(error)}
    ledger = result.ledger.to_json()
    last, device = ledger["stages"][-1], ledger["device"]
    return {
        "model": case.model,
        "kind": kind,
        "target": target,
        "metric": last["metric"]["name"],
        "original": last["metric"]["reference"],
        "value": last["metric"]["value"],
        "drop": last["metric"]["drop"],
        "ci95": last["metric"]["ci95"],
        "n": last["metric"]["n"],
        "sqnr_db": last["fidelity"]["sqnr_db"],
        "device_n": device["metric"]["n"],
        "device_drop": device["metric"]["drop"],
        "bit_exact": device["bit_exact"],
        "max_abs_error": device["max_abs_error"],
        "arena_bytes": device["arena_bytes"],
        "arena_lower_bound": device["arena_lower_bound"],
        "weight_bytes": device["weight_bytes"],
        "code_bytes": device["code_bytes"],
        "float_kept": sum(1 for s in ledger["skipped"] if s["what"] not in ("untuned kernel",)),
        "untuned": sum(1 for s in ledger["skipped"] if s["what"] == "untuned kernel"),
    }


def _first(source: str | None, samples: int | None) -> str | None:
    return source if source is None or samples is None else f"{source}[0:{samples}]"


def format_row(row: dict[str, object]) -> str:
    """A line of a Markdown table."""
    if "error" in row:
        return f"| {row['model']} | {row['kind']} | {row['target']} | {row['error']} | | | | | | | |"
    exact = "bit-equal" if row["bit_exact"] else f"{row['max_abs_error']:.2g}"
    interval = "" if row["ci95"] is None else " ({:.2f} to {:.2f})".format(*row["ci95"])  # type: ignore[misc]
    return (
        f"| {row['model']} | {row['kind']} | {row['target']} | {row['metric']} | {row['original']:.4f} | "
        f"{row['value']:.4f} | {row['drop']:.2f}{interval} | {row['n']} | {exact} on {row['device_n']} | "
        f"{row['arena_bytes']} / {row['arena_lower_bound']} | {row['weight_bytes']} |"
    )


COLUMNS = (
    "model",
    "type",
    "target",
    "metric",
    "original",
    "compiled",
    "drop in points (95 % CI)",
    "n",
    "code against program",
    "arena / bound, bytes",
    "weights, bytes",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def main(
    target: Annotated[list[str] | None, typer.Option(help="compile targets")] = None,
    model: Annotated[list[str] | None, typer.Option(help="only these models")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="fp32, int8")] = None,
    device_samples: Annotated[int | None, typer.Option(help="samples through the generated code")] = None,
    samples: Annotated[int | None, typer.Option(help="evaluate on the first N samples only")] = None,
    save: Annotated[Path | None, typer.Option(help="also write the rows as JSON lines")] = None,
) -> None:
    """Measure and print."""
    shared = shared_folder()
    if not (shared / "data").is_dir():
        typer.echo(f"no models under {shared}: set EDGEC_SHARED", err=True)
        raise typer.Exit(2)
    typer.echo(HEADER)
    for case in CASES:
        if model and case.model not in model:
            continue
        for which in kind or ["fp32", "int8"]:
            if which == "int8" and not case.integer:
                continue
            for name in target or ["host", "cortex-a72"]:
                row = measure(case, which, name, shared, device_samples, samples)
                typer.echo(format_row(row))
                if save is not None:
                    with save.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
