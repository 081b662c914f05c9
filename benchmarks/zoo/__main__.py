"""Models that nobody here wrote: which of them compile, whether results are PyTorch's, and in what time.

    python -m benchmarks.zoo [--model NAME ...] [--family TEXT ...] [--stage STAGE ...] [--limit SECONDS]
                             [--jobs N] [--json FILE] [--fresh] [--list] [--failures]

Every model has random weights with norm statistics of trained-like spread, and is imported (with edgec's own check
against PyTorch), compiled for this machine in float32, run on inputs that it was not exported with, and compared with
PyTorch. CNNs and ViTs are also quantised to int8 with `fold-bn, quantize-int8` and compared with the integer program.
Stages `onnx` and `onnx-int8` write the imported and the quantised program as ONNX, and compare ONNX Runtime with the
program.

`right`: largest error below 1e-3 of the largest value (int8: equal bits, or as close as its float layers allow).
`refused`: one line of an EdgecError. `WRONG`: compiled, and the result is another one. `crashed`: anything else that
ends. `timeout`: not done in --limit seconds. Only changed models and stages are measured again, see `measure`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import importlib
import json
import os
import statistics
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

# Before torch and NumPy are loaded: no threads, as measurements are forks of this process.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer  # noqa: E402

from benchmarks.peers import add_peers_to_path, hushed  # noqa: E402
from benchmarks.timing import markdown  # noqa: E402
from edgec.errors import EdgecError  # noqa: E402

OUTCOMES = ("right", "refused", "WRONG", "crashed", "timeout")
# Weights, bytes, from which on the memory of import says something about them.
LARGE = 10 << 20
COLUMNS = (
    "model",
    "family",
    "parameters",
    "nodes",
    "import s",
    "compile s",
    "fp32",
    "error",
    "int8",
    "int8 bits",
    "reason",
)

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def main(
    model: Annotated[list[str] | None, typer.Option(help="only these models")] = None,
    family: Annotated[list[str] | None, typer.Option(help="only families whose name contains this")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="import, fp32, int8, onnx, onnx-int8; default: fp32 and int8")
    ] = None,
    limit: Annotated[float, typer.Option(help="seconds for a model and stage")] = 300,
    jobs: Annotated[int, typer.Option(help="models at a time")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write all records here")] = None,
    fresh: Annotated[bool, typer.Option(help="measure again what is known")] = False,
    list_: Annotated[bool, typer.Option("--list", help="list the models and their families")] = False,
    failures: Annotated[bool, typer.Option(help="print only what is not right")] = False,
) -> None:
    """Measure models and print a table."""
    from benchmarks.zoo import measure

    add_peers_to_path()
    warnings.simplefilter("ignore")
    try:
        chosen = measure.known(model or (), family or ())
        stages = stage or ["fp32", "int8"]
        for each in stages:
            if each not in measure.STAGES:
                raise EdgecError("is no stage", where=f"--stage {each}", hint=f"use {', '.join(measure.STAGES)}")
        if list_:
            for entry in chosen:
                print(f"{entry.name:40} {entry.family}{', int8' if entry.int8 else ''}")
            print(f"{len(chosen)} models")
            return
        with hushed():
            _warm([e.source for e in chosen])
    except EdgecError as error:
        print(f"edgec: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    wanted = [(e, s) for e in chosen for s in stages if s not in measure.INTEGER or e.int8]
    records: list[measure.Record] = []
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        futures = [pool.submit(measure.record, e, s, limit, fresh=fresh) for e, s in wanted]
        for done, future in enumerate(futures, 1):
            found = future.result()
            records.append(found)
            if not failures or found["outcome"] != "right":
                print(f"{done:4}/{len(wanted)} {line(found)}", file=sys.stderr, flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps([{k: v for k, v in r.items() if k != "trace"} for r in records], indent=1))
    print(markdown(COLUMNS, rows(records, failures), text=2))
    print()
    print(summary(records))


def _warm(sources: Iterable[str]) -> None:
    """Import what measurements need, once for all of them."""
    for name in ("edgec.frontend", "edgec.lowering.lower", "edgec.bundle", "edgec.compile", "edgec.pipeline"):
        importlib.import_module(name)
    _go_through()
    found = set(sources)
    if "benchmarks.zoo.timm_nets" in found:
        from benchmarks.timm_models import import_timm

        import_timm()
    if "benchmarks.zoo.hf" in found:
        importlib.import_module("benchmarks.zoo.hf").import_transformers()


def _go_through() -> None:
    """Export and lower something small: torch and TVM import much of themselves at the first use."""
    from torch import nn

    from edgec.frontend import load_model
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    lower(load_model(small, input_shape=(1, 1, 4, 4)), load_device("host"))


def line(found: dict[str, Any]) -> str:
    """One record on one line."""
    note = found["reason"] if found.get("reason") else _error(found)
    return f"{found['name']:34} {found['stage']:6} {found['outcome']:8} {found['wall']:6.1f} s  {short(note)}"


def _error(found: dict[str, Any]) -> str:
    return f"error {found['error']:.1e}" if found.get("error") is not None else ""


def short(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]


def rows(records: Sequence[dict[str, Any]], failures: bool) -> list[list[str]]:
    """One row per model, with both of its stages."""
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for found in records:
        models.setdefault(found["name"], {})[found["stage"]] = found
    table = []
    for name, stages in models.items():
        if failures and all(s["outcome"] == "right" for s in stages.values()):
            continue
        first = stages.get("fp32") or stages.get("import") or stages.get("onnx") or next(iter(stages.values()))
        int8 = stages.get("int8", {})
        seconds = first["seconds"]
        built = [seconds[s] for s in ("lower", "compile") if s in seconds]
        bits = "" if "exact" not in int8 else "equal" if int8["exact"] else f"{int8['sqnr']:.0f} dB"
        table.append(
            [
                name,
                first["family"],
                f"{first['parameters']:,}" if "parameters" in first else "",
                str(first.get("nodes", "")),
                f"{seconds['import']:.1f}" if "import" in seconds else "",
                f"{sum(built):.1f}" if built else "",
                first["outcome"] if first["stage"] not in ("int8", "onnx-int8") else "",
                f"{first['error']:.1e}" if first.get("error") is not None and first["stage"] == "fp32" else "",
                int8.get("outcome", ""),
                bits,
                "; ".join(short(s["reason"]) for s in stages.values() if s.get("reason")),
            ]
        )
    return table


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Outcomes by family and stage, and the times and memory of import."""
    stages = [s for s in ("import", "fp32", "int8", "onnx", "onnx-int8") if any(r["stage"] == s for r in records)]
    parts = []
    for stage in stages:
        chosen = [r for r in records if r["stage"] == stage]
        table = []
        for family in [*dict.fromkeys(r["family"] for r in chosen), None]:
            own = [r for r in chosen if family in (None, r["family"])]
            counts = collections.Counter(r["outcome"] for r in own)
            table.append([family or "**all**", stage, str(len(own)), *(str(counts[o]) for o in OUTCOMES)])
        parts.append(markdown(("family", "stage", "models", *OUTCOMES), table, text=2))
    times = [r["seconds"]["import"] for r in records if "import" in r["seconds"]]
    if times:
        parts.append(f"Import: median {statistics.median(times):.1f} s, longest {max(times):.1f} s.")
    large = [r for r in records if r.get("weights", 0) >= LARGE and r.get("import_bytes")]
    if large:
        worst = max(large, key=lambda r: r["import_bytes"] / r["weights"])
        factor = worst["import_bytes"] / worst["weights"]
        parts.append(
            f"Memory of import, where weights take {LARGE >> 20} MiB or more: at most {factor:.1f} times the weights "
            f"({worst['name']})."
        )
    refused = [r for r in records if r["outcome"] == "refused"]
    if refused:
        named = sum(bool(r.get("named")) for r in refused)
        parts.append(f"Refused: {len(refused)}, of which {named} name a line of the model's source.")
    return "\n\n".join(parts)


if __name__ == "__main__":
    app()
