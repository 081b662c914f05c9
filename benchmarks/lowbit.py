"""Accuracy at few bits: the integer network of every scheme against float, image by image, over seeds.

python -m benchmarks.lowbit [--model cifar10_resnet20] [--rows W4A4] [--seeds 3] [--table]

Each cell, one pipeline with one seed, is stored as JSON under ~/.cache/edgec/benchmarks/lowbit when it is done, and a
second run starts where the first one stopped. All figures are those of the integer arithmetic. The test images are 502
lossless and 1,500 JPEG ones of CIFAR-10; calibration and training use other images.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.models import CASES, Case, shared_folder
from benchmarks.timing import markdown
from edgec.stats import paired_mean_ci

CACHE = Path.home() / ".cache" / "edgec" / "benchmarks" / "lowbit"
# Goes up when a pass changes so that stored cells are no longer what it gives.
VERSION = 1
TESTS = ("cifar10_test.npz", "cifar10_test_jpeg.npz")


@dataclass(frozen=True)
class Row:
    """One line of the table. baseline: the row that it is compared with, besides float."""

    bits: str
    scheme: str
    passes: str
    baseline: str | None = None

    @property
    def name(self) -> str:
        return f"{self.bits} {self.scheme}"


def _rows() -> list[Row]:
    rows = [Row("W8A8", "quantize-int8", "fold-bn, quantize-int8")]
    for w, a in ((4, 4), (3, 3), (2, 4)):
        bits, options = f"W{w}A{a}", f"weights={w} activations={a}"
        first = f"{bits} min-max"
        rows += [
            Row(bits, "min-max", f"fold-bn, reconstruct{{method=minmax {options}}}"),
            Row(bits, "MSE ranges", f"fold-bn, reconstruct{{method=mse {options}}}", first),
            Row(bits, "reconstruct", f"fold-bn, reconstruct{{{options}}}", first),
            Row(bits, "reconstruct, drop=1", f"fold-bn, reconstruct{{{options} drop=1}}", first),
            Row(bits, "reconstruct, by layer", f"fold-bn, reconstruct{{{options} granularity=layer}}", first),
            Row(bits, "qat", f"fold-bn, qat{{{options}}}", first),
        ]
    rows += [
        Row("W4A8", "min-max", "fold-bn, reconstruct{method=minmax activations=8}"),
        Row("W4A8", "MSE ranges", "fold-bn, reconstruct{method=mse activations=8}", "W4A8 min-max"),
        Row("W4A8", "reconstruct", "fold-bn, reconstruct{activations=8}", "W4A8 min-max"),
        Row("W4A8", "qat", "fold-bn, qat{weights=4 activations=8 steps=100}", "W4A8 min-max"),
    ]
    return rows


ROWS = _rows()
# What a run computes first: the rows that the documentation quotes.
FIRST = ("W4A4 reconstruct", "W4A8 qat", "W3A3 reconstruct")


@dataclass(frozen=True)
class Cell:
    """right: 0 or 1 per test image, by file. seconds: of all passes together."""

    right: Mapping[str, np.ndarray]
    weight_bytes: int
    seconds: float

    def all(self) -> np.ndarray:
        return np.concatenate([self.right[name] for name in TESTS])


def cell_path(case: Case, passes: str, seed: int) -> Path:
    key = hashlib.sha256(f"{VERSION} {case.model} {passes} {seed}".encode()).hexdigest()[:16]
    return CACHE / f"{case.model}-{key}.json"


def load(case: Case, passes: str, seed: int) -> Cell | None:
    path = cell_path(case, passes, seed)
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    right = {name: np.array([int(c) for c in text]) for name, text in stored["right"].items()}
    return Cell(right, stored["weight_bytes"], stored["seconds"])


def measure(case: Case, passes: str, seed: int, shared: Path) -> Cell:
    """Run the pipeline and the integer network on all test images; the result is stored."""
    from edgec.cost import program_cost
    from edgec.data import Preprocess, load_data
    from edgec.frontend import load_model
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline

    original = load_model(case.path(shared))
    prepare = Preprocess(case.mean, case.std, case.input_scale)

    def data(name: str) -> Any:
        return load_data(str(shared / "data" / "datasets" / name), original.inputs, prepare)

    assert case.data is not None
    training = data(case.data)
    context = Context(calibration=training.limit(512, seed), training=training, teacher=original, seed=seed)
    program, start = original, time.perf_counter()
    for step in Pipeline.parse(passes) if passes else ():
        program = step.run(program, context)
    seconds = time.perf_counter() - start
    right = {}
    for name in TESTS:
        found = [(program(*x)[0].argmax(1).numpy() == y).astype(int) for x, y in data(name).batches(250)]
        right[name] = np.concatenate(found)
    cell = Cell(right, program_cost(program).weight_bytes, seconds)
    path = cell_path(case, passes, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "model": case.model,
        "passes": passes,
        "seed": seed,
        "weight_bytes": cell.weight_bytes,
        "seconds": round(seconds, 1),
        "right": {name: "".join(map(str, values.tolist())) for name, values in right.items()},
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(stored, indent=1) + "\n")
    part.replace(path)
    return cell


def difference(cells: Sequence[Cell], against: Sequence[Cell]) -> str:
    """Mean accuracy of the first minus that of the others, in points, with the 95 % interval over test images.

    An image's value is the share of seeds that get it right, so the interval does not count one image several times.
    """
    ours, theirs = (np.mean([c.all() for c in group], axis=0) for group in (cells, against))
    low, high = paired_mean_ci(100 * (ours - theirs)) or (float("nan"), float("nan"))
    return f"{100 * (ours - theirs).mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def table(case: Case, rows: Sequence[Row], seeds: int) -> str:
    """Markdown of all rows that have a stored cell."""
    floats = load(case, "", 0)
    header = ("bits", "scheme", "lossless %", "JPEG %", "all %", "minus float", "minus min-max", "KB", "s", "seeds")
    lines = []
    stored = {row.name: [c for c in (load(case, row.passes, s) for s in range(seeds)) if c] for row in ROWS}
    if floats is not None:
        stored["float"] = [floats]
    for name in ("float", *(r.name for r in rows)):
        cells = stored.get(name, [])
        if not cells:
            continue
        row = next((r for r in ROWS if r.name == name), Row("fp32", "float", ""))
        each = [[100 * c.right[t].mean() for c in cells] for t in TESTS]
        total = [100 * c.all().mean() for c in cells]
        columns = [_spread(v) for v in (*each, total)]
        to_float = difference(cells, [floats]) if floats is not None and row.bits != "fp32" else ""
        other = stored.get(row.baseline or "", [])
        lines.append(
            (
                row.bits,
                row.scheme,
                *columns,
                to_float,
                difference(cells, other) if other else "",
                f"{cells[0].weight_bytes / 1000:.0f}",
                f"{np.median([c.seconds for c in cells]):.0f}",
                str(len(cells)),
            )
        )
    return markdown(header, lines, text=2)


def _spread(values: Sequence[float]) -> str:
    text = f"{np.mean(values):.1f}"
    return text if len(values) < 2 else f"{text} ({min(values):.1f}..{max(values):.1f})"


def main(
    model: Annotated[str, typer.Option(help="one of benchmarks.models that has CIFAR-10 data")] = "cifar10_resnet20",
    rows: Annotated[list[str] | None, typer.Option(help="only rows whose name contains one of these")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="so many seeds for each row")] = 3,
    only_table: Annotated[bool, typer.Option("--table", help="compute nothing, print what is stored")] = False,
) -> None:
    import torch

    torch.set_num_threads(1)
    case = next((c for c in CASES if c.model == model and c.evaluation in TESTS), None)
    if case is None:
        raise typer.BadParameter(f"'{model}' has no CIFAR-10 data", param_hint="--model")
    chosen = [r for r in ROWS if not rows or any(part in r.name for part in rows)]
    if not only_table:
        plain = {r.baseline for r in chosen}
        order = sorted(chosen, key=lambda r: r.name not in FIRST and r.name not in plain)
        first = [r for r in order if r.name in FIRST or r.name in plain]
        jobs = [("float", "", 0)]
        for part in (first, [r for r in order if r not in first]):
            jobs += [(r.name, r.passes, s) for s in range(seeds) for r in part]
        for name, passes, seed in jobs:
            if load(case, passes, seed) is None:
                cell = measure(case, passes, seed, shared_folder())
                typer.echo(f"{name}, seed {seed}: {100 * cell.all().mean():.2f} % in {cell.seconds:.0f} s", err=True)
    typer.echo(table(case, chosen, seeds))


if __name__ == "__main__":
    typer.run(main)
