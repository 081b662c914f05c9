"""Accuracy of pruned networks after minutes of recovery: 1xN against filters, random blocks and single weights.

python -m benchmarks.pruning [--model NAME ...] [--pattern NAME ...] [--sparsity P ...] [--recovery NAME ...]
python -m benchmarks.pruning --table

Every cell (model, pattern, sparsity, recovery, seed) is stored when it is finished, under
~/.cache/edgec/benchmarks/pruning, and not computed again. Recovery sees training images only, and its steps were chosen
on a held-out part of them (the KL to the dense model); accuracy is that on test images, image by image beside dense.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.models import CASES, shared_folder
from edgec.data import Dataset, Preprocess, load_data
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program
from edgec.sparsity import sparsities
from edgec.stats import paired_mean_ci

FOLDER = Path.home() / ".cache" / "edgec" / "benchmarks" / "pruning"
BATCH = 100


@dataclass(frozen=True)
class Setting:
    """A model with its test sets, and the passes that stand for `finetune`, `ebft` and `search-mask`.

    At most 10 minutes on two cores each; `seconds` of a cell is CPU time, so at most 1200.
    """

    model: str
    tests: tuple[str, ...]
    finetune: str
    ebft: str
    search: str
    recalibrate: str = "recalibrate-bn{samples=2048}"
    longer: str = "finetune{steps=1500 batch=64 temperature=2}"


SETTINGS = (
    Setting(
        "cifar10_resnet20",
        ("cifar10_test", "cifar10_test_jpeg"),
        "finetune{steps=500 batch=64 temperature=2}",
        "ebft{samples=1024 epochs=5}",
        "search-mask{steps=300}",
    ),
    Setting(
        "cifar10_resnet44",
        ("cifar10_test", "cifar10_test_jpeg"),
        "finetune{steps=250 batch=64 temperature=2}",
        "ebft{samples=1024 epochs=5}",
        "search-mask{steps=150}",
        longer="finetune{steps=800 batch=64 temperature=2}",
    ),
    Setting(
        "imagenet_mobilenetv1_075_224",
        ("imagenet_samples_eval",),
        "finetune{steps=100 batch=28 temperature=2 labels=false}",
        "ebft{samples=125 epochs=10}",
        "search-mask{steps=100 batch=28}",
        "recalibrate-bn{samples=125}",
    ),
)
PATTERNS = {
    "1x4": "prune-1xn{{n=4 sparsity={p}}}",
    "filter": "prune{{grain=filter sparsity={p}}}",
    "1x4 random": "prune-1xn{{n=4 sparsity={p} criterion=random}}",
    "weight": "prune{{grain=weight sparsity={p}}}",
}
RECOVERIES = ("finetune", "finetune, longer", "recalibrate", "ebft", "search-mask")
# What to do first: the comparisons at 50 % on the small network.
ORDER = (
    (("cifar10_resnet20",), ("1x4", "filter", "1x4 random"), (0.5,), ("recalibrate", "finetune")),
    (("cifar10_resnet44",), ("1x4", "filter", "1x4 random"), (0.5,), ("recalibrate", "finetune")),
    (("imagenet_mobilenetv1_075_224",), ("1x4", "filter", "1x4 random"), (0.5,), ("recalibrate", "finetune")),
    (("cifar10_resnet20",), ("1x4",), (0.5,), ("finetune, longer",)),
    (("cifar10_resnet20",), ("weight",), (0.5,), ("recalibrate", "finetune")),
    (("cifar10_resnet20",), ("1x4",), (0.5,), ("ebft", "search-mask")),
    (("cifar10_resnet20",), ("1x4", "filter", "1x4 random", "weight"), (0.75,), ("recalibrate", "finetune")),
    (("cifar10_resnet20",), ("1x4",), (0.75,), ("ebft", "search-mask")),
    (("cifar10_resnet44",), ("weight",), (0.5,), ("recalibrate", "finetune")),
    (("cifar10_resnet44",), ("1x4",), (0.75,), ("recalibrate", "finetune")),
)


@dataclass(frozen=True)
class Cell:
    """One experiment."""

    model: str
    pattern: str
    sparsity: float
    recovery: str
    seed: int

    @property
    def path(self) -> Path:
        name = f"{self.model} {self.pattern} {self.sparsity:g} {self.recovery} {self.seed}"
        return FOLDER / f"{name.replace(' ', '-')}.json"

    @property
    def setting(self) -> Setting:
        return next(s for s in SETTINGS if s.model == self.model)

    def pipeline(self) -> str:
        """The passes: mask, statistics, recovery; a mask search is followed by statistics once more."""
        setting, prune = self.setting, PATTERNS[self.pattern].format(p=self.sparsity)
        steps = {
            "finetune": [setting.recalibrate, setting.finetune],
            "finetune, longer": [setting.recalibrate, setting.longer],
            "recalibrate": [setting.recalibrate],
            "ebft": [setting.recalibrate, setting.ebft],
            "search-mask": [setting.recalibrate, setting.search, setting.recalibrate],
        }
        return ", ".join([prune, *steps[self.recovery]])


def load(model: str) -> tuple[Program, Dataset, dict[str, Dataset]]:
    """(model, training samples, test sets by name)."""
    shared = shared_folder()
    case = next(c for c in CASES if c.model == model)
    program = load_model(case.path(shared))
    preprocess = Preprocess(case.mean, case.std, case.input_scale)
    assert case.data is not None

    def read(name: str) -> Dataset:
        return load_data(case.source(shared, name), program.inputs, preprocess)

    setting = next(s for s in SETTINGS if s.model == model)
    return program, read(case.data), {t: read(f"{t}.npz") for t in setting.tests}


def correct(program: Program, data: Dataset) -> list[int]:
    """1 for each sample whose largest score is that of its label, else 0."""
    hits: list[int] = []
    for inputs, targets in data.batches(BATCH):
        (scores,) = program(*inputs)
        assert targets is not None
        hits += (scores.argmax(1).numpy() == targets).astype(int).tolist()
    return hits


def measure(cell: Cell) -> dict[str, Any]:
    """Run one cell; the row has the accuracy's bits, the density and the time."""
    program, train, tests = load(cell.model)
    context = Context(calibration=train, training=train, teacher=program, seed=cell.seed, log=typer.echo)
    pruned, cpu, wall = program, time.process_time(), time.monotonic()
    for step in Pipeline.parse(cell.pipeline()).passes:
        pruned = step.run(pruned, context)
    seconds, wall = time.process_time() - cpu, time.monotonic() - wall
    records = sparsities(pruned.annotations)
    kept = sum(int(r.mask.sum()) for r in records.values())
    report = pruned.annotations.get("finetune")
    return {
        **{k: getattr(cell, k) for k in ("model", "pattern", "sparsity", "recovery", "seed")},
        "pipeline": cell.pipeline(),
        "density": kept / max(1, sum(r.mask.numel() for r in records.values())),
        "layers": len(records),
        "cpu_seconds": seconds,
        "wall_seconds": wall,
        "held_out_kl": None if report is None else report.after,
        "best_step": None if report is None else report.best_step,
        "skipped": sorted({f"{s.layer}: {s.what}: {s.reason}" for s in context.skipped}),
        "correct": {name: correct(pruned, data) for name, data in tests.items()},
    }


def dense(model: str) -> dict[str, list[int]]:
    """The bits of the dense model, stored like a cell."""
    path = FOLDER / f"{model}-dense.json"
    if not path.exists():
        program, _, tests = load(model)
        save(path, {name: correct(program, data) for name, data in tests.items()})
    return json.loads(path.read_text())


def save(path: Path, row: dict[str, Any]) -> None:
    """Write a file so that it is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row))
    part.replace(path)


def cells(
    models: list[str] | None,
    patterns: list[str] | None,
    rates: list[float] | None,
    recoveries: list[str] | None,
    seeds: Iterable[int],
) -> list[Cell]:
    """The cells of ORDER that are asked for, seed after seed."""
    found: dict[Cell, None] = {}
    for group in ORDER:
        given = [
            [x for x in values if wanted is None or x in wanted]
            for values, wanted in zip(group, (models, patterns, rates, recoveries), strict=True)
        ]
        for seed, model, rate, recovery, pattern in itertools.product(seeds, given[0], given[2], given[3], given[1]):
            found[Cell(str(model), str(pattern), float(rate), str(recovery), seed)] = None
    return list(found)


# -- the table ---------------------------------------------------------------------------------------------------------


def points(hits: np.ndarray) -> str:
    """Mean over seeds in percent, and the range; hits [seeds, images]."""
    each = 100 * hits.mean(1)
    spread = "" if len(each) == 1 else f" ({each.min():.1f}–{each.max():.1f})"
    return f"{each.mean():.1f}{spread}"


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Mean of `ours - theirs` in points with its 95 % interval: images are paired, seeds averaged first."""
    lost = 100 * (ours.mean(0) - theirs.mean(0))
    interval = paired_mean_ci(lost)
    return f"{lost.mean():+.1f}" + ("" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})")


def table() -> str:
    """All finished cells as Markdown."""
    rows = [json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json")) if not p.name.endswith("-dense.json")]
    lines = []
    for setting in SETTINGS:
        mine = [r for r in rows if r["model"] == setting.model]
        if not mine:
            continue
        reference = dense(setting.model)
        for test in setting.tests:
            n = len(reference[test])
            lines += [
                f"\n{setting.model}, {test} ({n} images), dense {100 * np.mean(reference[test]):.1f} %\n",
                "| sparsity | recovery | pattern | density | seeds | accuracy (range), % | against dense (95 %) "
                "| 1x4 against it (95 %) | CPU s |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            lines += table_rows(mine, test, np.asarray(reference[test]))
    return "\n".join(lines)


def table_rows(rows: list[dict[str, Any]], test: str, reference: np.ndarray) -> list[str]:
    """One line for each pattern of each recovery at each sparsity."""
    lines = []
    for rate, recovery in itertools.product(sorted({r["sparsity"] for r in rows}), RECOVERIES):
        group = [r for r in rows if (r["sparsity"], r["recovery"]) == (rate, recovery)]
        blocks = [r for r in group if r["pattern"] == "1x4"]
        for pattern in PATTERNS:
            same = [r for r in group if r["pattern"] == pattern]
            if not same:
                continue
            hits = np.asarray([r["correct"][test] for r in same])
            against = ""
            if blocks and pattern != "1x4":
                seeds = {r["seed"] for r in same} & {r["seed"] for r in blocks}
                ours, theirs = (
                    np.asarray([r["correct"][test] for r in side if r["seed"] in seeds]) for side in (blocks, same)
                )
                against = difference(ours, theirs) if seeds else ""
            lines.append(
                f"| {100 * rate:g} % | {recovery} | {pattern} | {same[0]['density']:.3f} | {len(same)} "
                f"| {points(hits)} | {difference(hits, reference[None])} | {against} "
                f"| {np.mean([r['cpu_seconds'] for r in same]):.0f} |"
            )
    return lines


def main(
    model: Annotated[list[str] | None, typer.Option(help="only these models")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="only these patterns")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="only these")] = None,
    recovery: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(RECOVERIES)}")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="by default 0, 1, 2")] = None,
    threads: Annotated[int, typer.Option(help="threads of torch")] = 1,
    show: Annotated[bool, typer.Option("--table", help="print what is there and compute nothing")] = False,
) -> None:
    """Run the cells that are not there yet, in order of importance, and print the table."""
    torch.set_num_threads(threads)
    if not (shared_folder() / "data").is_dir():
        typer.echo(f"no models under {shared_folder()}: set EDGEC_SHARED", err=True)
        raise typer.Exit(2)
    for cell in [] if show else cells(model, pattern, sparsity, recovery, seed or [0, 1, 2]):
        if cell.path.exists():
            continue
        dense(cell.model)
        typer.echo(f"{time.strftime('%H:%M:%S')} {cell}")
        try:
            save(cell.path, measure(cell))
        except Exception as error:
            # a night of runs does not stop at one cell; it is tried again by the next call
            typer.echo(f"failed: {type(error).__name__}: {error}", err=True)
    typer.echo(table())


if __name__ == "__main__":
    typer.run(main)
