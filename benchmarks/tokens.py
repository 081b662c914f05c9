"""Token compression of ViT-Tiny at 60 % of its multiply-accumulates: what it costs in accuracy and saves in time.

    python -m benchmarks.tokens accuracy     # KL to the dense model, agreement and top-1 on the 250 images
    python -m benchmarks.tokens learned      # DiffRate's counts learned from the 125 calibration images, per seed
    python -m benchmarks.tokens time         # host latency of the generated code, dense and compressed in turns
    python -m benchmarks.tokens count        # aarch64 instructions under QEMU
    python -m benchmarks.tokens table        # print what is known

Each step adds to the JSON file and leaves alone what is there: it can be stopped and run again. Figures of one image
are kept, so that schemes are compared in pairs. KL is KL(dense || compressed), nats; MACs include the choice of tokens.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.models import CASES, Case, shared_folder
from benchmarks.timing import markdown, measure
from edgec.cost import program_cost
from edgec.data import Dataset, Preprocess, load_data
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program
from edgec.stats import paired_mean_ci

MODEL = "imagenet_vit_tiny_p16_224"
# At most 60 % of the dense model's multiply-accumulates, but for the first three.
SCHEMES = {
    "class rows": "class-rows",
    "ToMe increasing, 71 %": "tome{r=14 inflect=1}",
    "ToMe, 73 %": "tome{r=7}",
    "random": "drop-tokens{r=12 score=random}",
    "class attention": "drop-tokens{r=12 score=class-attention}",
    "sigma": "drop-tokens{r=12 score=sigma}",
    "ToMe": "tome{r=12}",
    "ToMe, plain attention": "tome{r=12 proportional=false}",
    "ToMe increasing": "tome{r=22 inflect=1.0}",
    "DiffRate": "diffrate{macs=0.6}",
    "DiffRate, true sizes": "diffrate{macs=0.6 true_size=true}",
    "DiffRate, weighted mean": "diffrate{macs=0.6 merge_mean=weighted}",
    "DiffRate, plain attention": "diffrate{macs=0.6 proportional=false}",
}
LEARNED = "diffrate{macs=0.6 learn=true}"
SEEDS = (0, 1, 2)
# From the worst to the best, as the papers have it.
ORDER = ("random", "class attention", "ToMe", "DiffRate")
TIMED = ("dense", "class rows", "ToMe", "DiffRate", "class attention")
BATCH = 25
DEVICES = ("cortex-a72", "neoverse-n1")


def case_of(model: str) -> Case:
    (case,) = [c for c in CASES if c.model == model]
    return case


def load(which: str) -> Dataset:
    """The images of the model, "data" (calibration) or "evaluation"."""
    case, shared = case_of(MODEL), shared_folder()
    program = load_model(case.path(shared))
    source = case.source(shared, getattr(case, which))
    return load_data(source, program.inputs, Preprocess(case.mean, case.std, case.input_scale))


def dense() -> Program:
    return load_model(case_of(MODEL).path(shared_folder()), name=MODEL)


def compress(program: Program, spelling: str, context: Context | None = None) -> Program:
    for step in Pipeline.parse(spelling):
        program = step.run(program, context or Context())
    return program


def logits(program: Program, data: Dataset) -> torch.Tensor:
    parts = [program(*inputs)[0] for inputs, _ in data.batches(BATCH)]
    return torch.cat(parts)


def figures(program: Program, want: torch.Tensor, data: Dataset) -> dict[str, Any]:
    """What is stored of one compressed model. want: the dense model's logits."""
    got, labels = logits(program, data), torch.from_numpy(data.labels)  # type: ignore[arg-type]
    p, q = want.log_softmax(1), got.log_softmax(1)
    meta = program.annotations.get("tokens")
    return {
        "macs": program_cost(program).macs,
        "kl": (p.exp() * (p - q)).sum(1).tolist(),
        "agree": float((got.argmax(1) == want.argmax(1)).float().mean()),
        "right": (got.argmax(1) == labels).tolist(),
        "max_error": float((got - want).abs().max()),
        "kept": [] if meta is None else [site.kept for site in meta.sites],
        "after": [] if meta is None else [site.after for site in meta.sites],
    }


def accuracy(known: dict[str, Any], path: Path) -> None:
    data, program = load("evaluation"), dense()
    want = logits(program, data)
    known.setdefault("accuracy", {})["dense"] = figures(program, want, data)
    for name, spelling in SCHEMES.items():
        if name not in known["accuracy"]:
            known["accuracy"][name] = figures(compress(program, spelling), want, data)
            save(known, path)
            typer.echo(row(name, known["accuracy"][name]))


def learned(known: dict[str, Any], path: Path) -> None:
    data, program = load("evaluation"), dense()
    want, calibration = logits(program, data), load("data")
    for seed in SEEDS:
        name = f"DiffRate learned, seed {seed}"
        if name in known.setdefault("accuracy", {}):
            continue
        context = Context(calibration=calibration, seed=seed, log=typer.echo)
        known["accuracy"][name] = figures(compress(program, LEARNED, context), want, data)
        save(known, path)
        typer.echo(row(name, known["accuracy"][name]))


def latency(known: dict[str, Any], path: Path, rounds: int) -> None:
    """Bundles are built first, unhurried; then they take turns for well under a minute."""
    from benchmarks.cpu import NativeBundle
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    device, program = load_device("host"), dense()
    x = np.ascontiguousarray(load("evaluation").inputs(slice(0, 1)).numpy())
    with tempfile.TemporaryDirectory(prefix="edgec-tokens-") as folder:
        contestants = {}
        for number, name in enumerate(TIMED):
            made = program if name == "dense" else compress(program, SCHEMES[name])
            where = Path(folder) / f"bundle{number}"
            build_bundle(lower(made, device), device, where)
            contestants[name] = NativeBundle(where).bind(x)
        with Quiet():
            found = measure(contestants, rounds)
    known["time"] = {name: timing.to_json() for name, timing in found.items()}
    save(known, path)


class Quiet:
    """Alone on one core while timing: the lock and the core are those that all measurements here share."""

    LOCK, CORE = Path("/tmp/core1.lock"), 1

    def __enter__(self) -> None:
        import fcntl
        import os

        self.file = self.LOCK.open("a")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.cores = os.sched_getaffinity(0)
        if self.CORE in self.cores:
            os.sched_setaffinity(0, {self.CORE})

    def __exit__(self, *_: object) -> None:
        import os

        os.sched_setaffinity(0, self.cores)
        self.file.close()


def count(known: dict[str, Any], path: Path) -> None:
    from benchmarks import aarch64
    from edgec.targets.device import load_device

    program = dense()
    for device in DEVICES:
        for name in ("dense", "class rows", "ToMe", "DiffRate"):
            key = f"{name} on {device}"
            if key in known.setdefault("count", {}):
                continue
            made = program if name == "dense" else compress(program, SCHEMES[name])
            found = aarch64.measure(made, "fp32", load_device(device), inspect=False)
            known["count"][key] = {"instructions": found.instructions, "macs": found.macs}
            save(known, path)
            typer.echo(f"{key}: {found.instructions:,}")


# -- what is printed ---------------------------------------------------------------------------------------------------


def row(name: str, f: dict[str, Any], total: int | None = None) -> str:
    kl = np.array(f["kl"])
    error = kl.std(ddof=1) / len(kl) ** 0.5
    share = "" if total is None else f" ({f['macs'] / total:.3f})"
    text = f"{name} | {f['macs'] / 1e9:.3f}{share} | {kl.mean():.4f} ± {error:.4f} | {np.median(kl):.4f} | "
    return text + f"{100 * f['agree']:.1f} | {100 * np.mean(f['right']):.1f} | {f['after']}"


def table(known: dict[str, Any]) -> str:
    parts = []
    found = known.get("accuracy", {})
    if found:
        total = found["dense"]["macs"] if "dense" in found else None
        rows = [row(name, f, total).split(" | ") for name, f in found.items()]
        header = ("scheme", "GMACs (share)", "KL, mean ± s.e.", "median", "agreement, %", "top-1, %", "tokens behind")
        parts.append(markdown(header, rows))
        pairs = list(itertools.pairwise(ORDER))
        pairs += [
            ("ToMe, 73 %", "ToMe increasing, 71 %"),
            ("ToMe", "ToMe increasing"),
            ("ToMe increasing", "DiffRate"),
            ("ToMe, plain attention", "ToMe"),
        ]
        pairs += [(other, name) for name in found if "learned" in name for other in ("ToMe", "DiffRate")]
        rows = []
        for worse, better in pairs:
            if worse in found and better in found:
                difference = np.array(found[worse]["kl"]) - np.array(found[better]["kl"])
                interval = paired_mean_ci(difference)
                assert interval is not None
                wins = f"{100 * (difference > 0).mean():.0f}"
                rows.append(
                    [f"{worse} − {better}", f"{difference.mean():.4f}", "{:.4f}…{:.4f}".format(*interval), wins]
                )
        parts.append(markdown(("KL difference, in pairs", "mean", "95 % interval", "images won, %"), rows))
    if "time" in known:
        # CPU time of the process: on a machine that others use too, wall-clock time is theirs as well.
        whole = known["time"]["dense"]["cpu"]
        rows = [
            [name, f"{t['cpu'] / 1e3:.2f}", f"{t['cpu'] / whole:.3f}", f"{100 * t['spread']:.1f}"]
            for name, t in known["time"].items()
        ]
        parts.append(markdown(("host, one thread", "CPU ms, median", "of dense", "spread, %"), rows))
    if "count" in known:
        rows = []
        for name, f in known["count"].items():
            whole = known["count"][f"dense on {name.rpartition(' on ')[2]}"]["instructions"]
            rows.append([name, f"{f['instructions'] / 1e6:.1f}", f"{f['instructions'] / whole:.3f}"])
        parts.append(markdown(("aarch64", "million instructions", "of dense"), rows))
    return "\n\n".join(parts)


def save(known: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known))


def main(
    step: Annotated[str, typer.Argument(help="accuracy, learned, time, count or table")] = "table",
    file: Annotated[Path, typer.Option(help="where results are kept")] = Path("build/tokens.json"),
    rounds: Annotated[int, typer.Option(help="turns of each contestant in `time`")] = 40,
) -> None:
    """Measure one thing, then print what is known."""
    if not (shared_folder() / "data").is_dir():
        typer.echo(f"no models under {shared_folder()}: set EDGEC_SHARED", err=True)
        raise typer.Exit(2)
    known = json.loads(file.read_text()) if file.exists() else {}
    steps = {"accuracy": accuracy, "learned": learned, "count": count}
    if step in steps:
        steps[step](known, file)
    elif step == "time":
        latency(known, file, rounds)
    elif step != "table":
        typer.echo(f"'{step}' is not a step: use accuracy, learned, time, count or table", err=True)
        raise typer.Exit(2)
    typer.echo(table(known))


if __name__ == "__main__":
    typer.run(main)
