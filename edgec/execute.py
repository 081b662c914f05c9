"""Run a bundle on evaluation data: what `edgec run` does, as one function. Needs torch only for data without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgec.bundle import Bundle
from edgec.data import Dataset, Preprocess, load_data
from edgec.errors import EdgecError, GateFailed
from edgec.metrics import FRACTION, Evaluation, Metric, compare, default_metric, evaluate, parse_metric
from edgec.plan import Port

if TYPE_CHECKING:
    from edgec.program import TensorSpec

# One start of an emulator serves this many samples.
BATCH = 64


@dataclass(frozen=True)
class RunResult:
    """What the generated code gave.

    metric, unit, value: of the generated code on `n` samples; a fraction is 0..1. outputs: one array [n, ...] each.
    Of a microcontroller's board: instructions of one inference (the first sample), exact, and by layer; bytes of stack.
    """

    bundle: str
    target: str
    runner: str
    metric: str
    unit: str
    value: float
    n: int
    outputs: tuple[np.ndarray, ...]
    instructions: int | None = None
    stack_bytes: int | None = None
    layers: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        plain = ["bundle", "target", "runner", "metric", "unit", "value", "n"]
        plain += ["instructions", "stack_bytes", "layers"] if self.instructions is not None else []
        return {key: getattr(self, key) for key in plain}

    def text(self) -> str:
        """One line for a person."""
        percent = self.unit == FRACTION
        value = f"{100 * self.value:.2f} %" if percent else f"{self.value:.4g} {self.unit}"
        line = f"{self.bundle} on {self.target} ({self.runner}): {self.metric} {value}, n = {self.n:,}"
        if self.instructions is None:
            return line
        return f"{line}; {self.instructions:,} instructions an inference, {self.stack_bytes:,} bytes of stack"

    def rows(self) -> list[dict[str, Any]]:
        """Instructions of each layer as a table; empty where they were not counted."""
        return [
            {
                "layer": row["layer"] or "(model)",
                "op": row["op"],
                "instructions": f"{row['instructions']:,}",
                "MACs": f"{row['macs']:,}",
                "per MAC": f"{row['instructions'] / row['macs']:.2f}" if row["macs"] else "",
            }
            for row in self.layers
        ]


def run_bundle(
    bundle: Bundle,
    eval: Any,
    *,
    metric: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_scale: float | None = None,
    samples: int | None = None,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> RunResult:
    """Run the generated code, natively or in the emulator, on evaluation data and measure it.

    eval: see `edgec.data.load_data`. mean, std, input_scale: by default those of the compile.
    metric: by default top1 for labelled classes; without labels, fidelity to the final Program of the bundle.
    samples: at most so many, drawn by `seed`; default all.
    Raises EdgecError for data or a metric that does not suit the model, ToolchainMissing without the emulator.
    """
    tell = progress or (lambda stage, done: None)
    inputs, outputs = _ports(bundle, "inputs"), _ports(bundle, "outputs")
    dataset = load_data(eval, inputs, _preprocess(bundle, mean, std, input_scale))
    if samples is not None:
        dataset = dataset.limit(samples, seed)
    measure = parse_metric(metric) if metric else default_metric(dataset, outputs)
    stage = f"run on {bundle.manifest['target']}"
    # A model with a fixed batch takes that many samples at a time.
    fixed = inputs[0].shape[0]
    batch = fixed if fixed > 1 else BATCH
    got = evaluate(bundle.run, dataset, measure, batch=batch, progress=lambda done: tell(stage, done))
    value = got.value if got.value is not None else _against_program(bundle, dataset, measure, got)
    counted: dict[str, Any] = {}
    if bundle.emulate:
        measured = bundle.measure(*(a[:fixed] for a in dataset.read(slice(0, fixed))[0]))
        pairs = zip(bundle.manifest["steps"], measured.steps, strict=True)
        layers = tuple({**step, "instructions": count} for step, count in pairs)
        counted = {"instructions": measured.instructions, "stack_bytes": measured.stack_bytes, "layers": layers}
    return RunResult(
        bundle=bundle.name,
        target=bundle.manifest["target"],
        runner=bundle.runner,
        metric=measure.name,
        unit=measure.unit,
        value=value,
        n=got.n,
        outputs=got.outputs,
        **counted,
    )


def selftest(bundle: Bundle) -> None:
    """Run the built-in sample on the target. Raises GateFailed when the result is not the built-in one."""
    if not bundle.selftest():
        raise GateFailed(
            "self-test gives another result than the compiler did",
            where=f"bundle {bundle.name} on {bundle.manifest['target']}",
            hint="compile again for this CPU",
        )


def save_outputs(result: RunResult, path: str | Path, names: Sequence[str]) -> None:
    """Write the outputs as a `.npz` with one array [n, ...] per output. Raises EdgecError."""
    if Path(path).suffix != ".npz":
        raise EdgecError("is not a .npz file", where=str(path), hint="name it FILE.npz")
    try:
        with Path(path).open("wb") as file:
            np.savez(file, allow_pickle=False, **dict(zip(names, result.outputs, strict=True)))
    except OSError as error:
        raise EdgecError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _ports(bundle: Bundle, key: str) -> tuple[TensorSpec, ...]:
    # A Port has the fields of a TensorSpec and, unlike it, needs no torch.
    return cast(Any, tuple(Port(p["name"], tuple(p["shape"]), p["dtype"]) for p in bundle.manifest[key]))


def _preprocess(
    bundle: Bundle, mean: Sequence[float] | None, std: Sequence[float] | None, scale: float | None
) -> Preprocess:
    """What was given, and for the rest what the model was compiled with."""
    made = ((bundle.manifest.get("meta") or {}).get("evaluation") or {}).get("preprocess") or {}
    given = {"mean": mean, "std": std, "scale": scale}
    values = {key: made.get(key) if value is None else value for key, value in given.items()}
    return Preprocess(
        mean=None if values["mean"] is None else tuple(values["mean"]),
        std=None if values["std"] is None else tuple(values["std"]),
        scale=values["scale"],
    )


def _against_program(bundle: Bundle, dataset: Dataset, metric: Metric, got: Evaluation) -> float:
    """A metric without labels compares with the final Program, which the bundle carries."""
    from edgec.frontend import load_model

    reference = evaluate(load_model(str(bundle.path / "program.pt2"), name=bundle.name), dataset, metric)
    return compare(reference, got).value
