"""`compile_model`: the whole road, from a PyTorch model to a checked bundle, as one function.

Each stage is a function of its own that can be called alone; this module only puts them in order, evaluates after
every one of them and moves the bundle into place at the end, when all checks have passed.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.budget import Budget, check_stack, fitted
from edgec.errors import EdgecError, GateFailed
from edgec.lowering import STEPS
from edgec.passbase import Context, Needs, Pass, Skip
from edgec.pipeline import Pipeline
from edgec.stats import sqnr_db

if TYPE_CHECKING:
    from edgec.bundle import Bundle
    from edgec.checks import Check
    from edgec.data import Dataset
    from edgec.ledger import BoardRecord, Ledger
    from edgec.lowering.lower import Lowered
    from edgec.metrics import Comparison, Evaluation, Metric
    from edgec.program import Program
    from edgec.targets.device import Device

# float32 sums in another order, over networks of up to some hundred layers.
FLOAT_TOLERANCE = 1e-4
# A float value next to a rounding boundary may take the next code after a float island; more than that is a mistake.
MIXED_SQNR_DB = 30.0
# Code sums in float16 what PyTorch sums in float32, which leaves 32 dB on MobileNetV2; a mistake leaves next to none.
HALF_SQNR_DB = 20.0
# Where int8 numbers decide which tokens stay, such a code may decide otherwise, and what follows is computed for other
# tokens: 17 to 27 dB on ViT-Tiny, where the same network in float32 has 113 dB. The accuracy gate holds all the same.
CHOICES_SQNR_DB = 10.0
# Share of samples for which float code must choose the tokens that PyTorch chooses.
CHOSEN_ALIKE = 0.95
FOLLOWS = {"mixed": MIXED_SQNR_DB, "half": HALF_SQNR_DB, "choices": CHOICES_SQNR_DB}
# The self-test runs on hardware whose libm is not ours.
SELFTEST_TOLERANCE = 1e-3
HALF_SELFTEST_TOLERANCE = 0.1
CHOICES_SELFTEST_TOLERANCE = 0.5
# Samples for the checks when the user gives no data.
RANDOM_SAMPLES = 16
# Samples run through an emulator by default; natively all are run.
EMULATED_SAMPLES = 64
# Of a microcontroller's code, which runs on all of them compiled for this machine, as many also run on QEMU's board.
BOARD_SAMPLES = 32
BISECTION_STEPS = 4
# The pass that a model which comes quantised goes through first, and the passes that choose scales.
ADOPTS = "adopt-qdq"
QUANTISERS = "edgec.passes.quantization."
# Samples on which the ONNX model is compared with the Program.
ONNX_SAMPLES = 4
# Samples of the training data that the checks use when there is no evaluation data.
CHECK_SAMPLES = 256

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Options:
    """How a compile is checked. `max_drop` is in points of the metric against the original model; None: no gate."""

    max_drop: float | None = None
    on_fail: str = "error"
    seed: int = 0
    device_samples: int | None = None
    threads: int = 1


@dataclass
class CompileResult:
    """`bundle` is None when the compile stopped early on request."""

    ledger: Ledger
    bundle: Bundle | None = None
    program: Program | None = None


@dataclass
class _Run:
    """State of one compile: the reference evaluation, the records so far and whom to tell about progress."""

    dataset: Dataset
    metric: Metric
    check: Check
    options: Options
    ledger: Ledger
    context: Context
    original: Program
    reference: Evaluation
    progress: Progress
    last: Evaluation

    def evaluate(self, name: str, program: Program) -> Evaluation:
        from edgec.metrics import evaluate

        self.progress(f"check {name}", 0.0)
        return evaluate(program, self.dataset, self.metric, progress=lambda done: self.progress(f"check {name}", done))

    def record(self, name: str, evaluation: Evaluation, program: Program, seconds: float) -> Comparison:
        """Append one stage to the ledger; returns its comparison with the original model."""
        from edgec.cost import program_cost
        from edgec.ledger import StageRecord
        from edgec.metrics import compare

        comparison = compare(self.reference, evaluation)
        cost = program_cost(program)
        self.ledger.stages.append(StageRecord.of(name, self.metric, comparison, cost.to_json(), seconds))
        self.last = evaluation
        return comparison

    def apply(self, step: Pass, program: Program) -> Program:
        """Run one pass, check it, and do what `on_fail` says when it lost too much."""
        started = time.perf_counter()
        self.progress(f"pass {step.name}", 0.0)
        skipped = list(self.context.skipped)
        candidate = step.run(program, self.context)
        evaluation = self.evaluate(step.name, candidate)
        verdict = self.check.verdict(self._compare(evaluation))
        if not verdict.passed and self.check.on_fail != "error":
            self.context.skipped[:] = skipped
            label, candidate, evaluation = self._recover(step, program, verdict.message)
            self.record(label, evaluation, candidate, time.perf_counter() - started)
            return candidate
        self.record(step.name, evaluation, candidate, time.perf_counter() - started)
        if not verdict.passed:
            raise GateFailed(
                f"{verdict.message}; {self._blame(candidate)}", where=f"pass {step.name}", hint=_gate_hint(step)
            )
        return candidate

    def _recover(self, step: Pass, program: Program, message: str) -> tuple[str, Program, Evaluation]:
        """`revert`: go on without the pass. `relax`: the strongest weakened form that still passes, by bisection."""
        best: tuple[Pass, Program, Evaluation, list[Skip]] | None = None
        if self.check.on_fail == "relax" and step.weaken(0.5) is not None:
            low, high = 0.0, 1.0
            kept = list(self.context.skipped)
            for _ in range(BISECTION_STEPS):
                middle = (low + high) / 2
                weaker = step.weaken(middle)
                assert weaker is not None
                self.context.skipped[:] = kept
                candidate = weaker.run(program, self.context)
                evaluation = self.evaluate(weaker.name, candidate)
                if self.check.verdict(self._compare(evaluation)).passed:
                    low, best = middle, (weaker, candidate, evaluation, list(self.context.skipped))
                else:
                    high = middle
            self.context.skipped[:] = kept
        if best is not None:
            weaker, candidate, evaluation, self.context.skipped[:] = best
            spelling = Pipeline((weaker,)).spelling()
            self.context.skip(step.name, "pass weakened", f"{message}; applied as {spelling}")
            return f"{step.name} (relaxed)", candidate, evaluation
        self.context.skip(step.name, "pass reverted", message)
        return f"{step.name} (reverted)", program, self.last

    def _compare(self, evaluation: Evaluation) -> Comparison:
        from edgec.metrics import compare

        return compare(self.reference, evaluation)

    def _blame(self, candidate: Program) -> str:
        """The layers that hurt most and a ready-to-paste option, for the message of a failed gate."""
        from edgec.sensitivity import worst_layers

        worst = worst_layers(self.original, candidate, self.dataset)[:3]
        if not worst:
            return "no single layer stands out"
        ranking = ", ".join(f"{row.layer} ({row.sqnr_db:.1f} dB)" for row in worst)
        return f"worst layers: {ranking}; try keep_float=[{','.join(row.layer for row in worst)}]"


def compile_model(
    model: Any,
    *,
    target: str = "host",
    output: str | Path | None = None,
    passes: Pipeline | str | Sequence[Pass] = "",
    data: Any = None,
    eval: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_scale: float | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    on_fail: str = "error",
    name: str | None = None,
    input_shape: Sequence[int] | None = None,
    force: bool = False,
    seed: int = 0,
    calibration_samples: int = 256,
    device_samples: int | None = None,
    threads: int = 1,
    stop_after: str | None = None,
    dump: str | Path | None = None,
    tuning: str | Path | None = None,
    sram: str | None = None,
    flash: str | None = None,
    fit: bool = False,
    external_io: bool = False,
    onnx: bool = True,
    cross_check: bool = False,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile `model` for `target` into the folder `output`, checking accuracy after every step.

    model: nn.Module, Program, ExportedProgram, a `.pt2` or `.onnx` path, `file.py:factory` or
        `package.module:factory`.
    data / eval: calibration and evaluation data (see `edgec.data.load_data`); without `eval` the checks measure
        fidelity to the original model on `data`, and without both on random inputs.
    mean, std: per channel, applied after `input_scale` (default 1/255 for uint8 images).
    max_drop: largest allowed drop of the metric against the original, in points; None checks nothing.
    on_fail: "error", "revert" (drop the pass) or "relax" (weaken the pass by bisection).
    device_samples: how many evaluation samples run through the generated code (default: all natively, 64 emulated or
        on a GPU, 32 of a microcontroller's, whose code runs on all of them compiled for this machine too).
    threads: how many the bundle advises, and the checks of the generated code use; results do not depend on it.
    stop_after: a pass name or a lowering step; no bundle is written then.
    dump: folder that receives the text form after each step.
    tuning: a table of `edgec tune` with register tiles for the target (default: the file that EDGEC_TUNING names).

    sram, flash: for microcontrollers, what the model may take in all: "320KiB" (default: the board's memory); a model
        that does not fit is not compiled. fit: make it fit, by tiling, without changing a result.
    external_io: inputs and outputs lie in memory that does not count.
    onnx: put the result into the bundle as `model.onnx` too, compared by ONNX Runtime where that is installed.
    cross_check: import the model by a second route, through ONNX, and compare the two.

    Raises EdgecError (bad input), GateFailed (drop too large), ToolchainMissing. Nothing is left at `output` then.
    """
    from edgec.bundle import Bundle, install, refuse_existing, seal, staging
    from edgec.data import Preprocess
    from edgec.frontend import load_model
    from edgec.registry import get_device
    from edgec.tune import tuned_device

    tell = progress or (lambda stage, done: None)
    if threads < 1:
        raise EdgecError(f"{threads} is less than 1", where="--threads")
    pipeline = Pipeline.of(passes)
    if stop_after != ADOPTS:
        _known_stage(stop_after, pipeline)
    device = tuned_device(get_device(target), tuning)
    if threads > 1 and (device.is_mcu or device.is_gpu):
        what = "has one thread" if device.is_mcu else "is no CPU, whose threads could share the work"
        raise EdgecError(f"{device.name} {what}", where="--threads", hint="leave it out")
    budget = Budget.of(device, sram, flash, fit, external_io)
    destination = Path(output) if output is not None else None
    if destination is not None:
        refuse_existing(destination, force)
        _require(device)
    started = time.perf_counter()
    tell("load", 0.0)
    program = load_model(model, input_shape=input_shape, name=name)
    pipeline = _adopting(pipeline, program)
    _known_stage(stop_after, pipeline)
    preprocess = Preprocess(
        mean=None if mean is None else tuple(mean), std=None if std is None else tuple(std), scale=input_scale
    )
    writer = _dumper(dump)
    evaluation, training = _datasets(program, data, eval, preprocess, pipeline, seed)
    run = _start(
        program,
        evaluation,
        training,
        calibration_samples,
        metric,
        device,
        Options(max_drop, on_fail, seed, device_samples, threads),
        tell,
    )
    run.ledger.meta = {
        "model": program.name,
        "target": device.name,
        "passes": pipeline.spelling(),
        "evaluation": run.dataset.name,
        "samples": len(run.dataset),
        "seed": seed,
    }
    if program.notes:
        run.ledger.meta["import"] = "; ".join(program.notes)
    run.record("original", run.reference, program, time.perf_counter() - started)
    writer("0-original", program)
    if cross_check:
        _cross_check(run, model, program, input_shape)

    _import_check(run, program)
    original = program
    for number, step in enumerate(pipeline.passes, start=1):
        program = run.apply(step, program)
        if step.name == ADOPTS and ADOPTS in program.annotations:
            run.ledger.meta["quantised"] = str(program.annotations[ADOPTS])
        writer(f"{number}-{step.name}", program)
        if stop_after == step.name:
            return CompileResult(run.ledger, None, program)

    tell("lower", 0.0)
    lowered = _lower(run, program, device, budget, writer)
    for skip in lowered.fallbacks:
        run.context.skip(skip.layer, skip.what, skip.reason)
    if device.tuning and not lowered.tiles:
        run.context.skip(program.name, "tuning", "the table has none of the model's kernels")
    if destination is None or stop_after is not None:
        run.ledger.skipped = list(run.context.skipped)
        return CompileResult(run.ledger, None, program)

    with staging(destination) as folder:
        staged = folder / "bundle"
        tell("build", 0.0)
        bundle = _build(run, original, program, lowered, device, pipeline, staged)
        if budget.flash_bytes is not None:
            from edgec.fit import check_flash

            check_flash(lowered.plan, bundle.manifest["code_bytes"], budget.flash_bytes)
        tell("check", 0.0)
        if device.api == "metal":
            run.context.skip(program.name, "device check", "Metal source is not compiled or run here")
        else:
            _device_check(run, bundle, program, lowered, device)
        if run.ledger.device is not None and run.ledger.device.board is not None:
            check_stack(budget, lowered.plan, run.ledger.device.board.stack_bytes)
        written = _write_onnx(run, program, staged) if onnx else {}
        run.ledger.skipped = list(run.context.skipped)
        _write_reports(run, lowered, program, staged)
        # The reports hold times, so they differ between equal compiles; everything else is sealed by its digest.
        sealed = ["program.pt2", written["file"]] if "file" in written else ["program.pt2"]
        seal(staged, sealed, {"onnx": written} if written else None)
        install(staged, destination)
    tell("done", 1.0)
    return CompileResult(run.ledger, Bundle.load(destination), program)


def _require(device: Device) -> None:
    """Raise ToolchainMissing unless what builds and runs code for the device is there."""
    if device.is_gpu:
        from edgec.targets.gpu.runner import require_device

        require_device(device.api)
    else:
        from edgec.targets.cpu.toolchain import require_toolchain

        require_toolchain(device)


def _adopting(pipeline: Pipeline, program: Program) -> Pipeline:
    """The pipeline for a model that may come quantised: such a model keeps its scales.

    Raises EdgecError where a pass would quantise once more what is quantised.
    """
    from edgec.importing.quantized import comes_quantised
    from edgec.registry import load_pass

    if not comes_quantised(program) or any(step.name == ADOPTS for step in pipeline):
        return pipeline
    again = next((step for step in pipeline if type(step).__module__.startswith(QUANTISERS)), None)
    if again is not None:
        raise EdgecError(
            f"{program.name} comes quantised, with scales of its own",
            where=f"pass {again.name}",
            hint=f"leave {again.name} out: {ADOPTS} makes it integer with those scales; or give the float model",
        )
    return Pipeline((load_pass(ADOPTS)(), *pipeline))


def _known_stage(stop_after: str | None, pipeline: Pipeline) -> None:
    stages = dict.fromkeys([*(p.name for p in pipeline.passes), *STEPS])
    if stop_after is not None and stop_after not in stages:
        raise EdgecError(f"'{stop_after}' is not a stage", where="--stop-after", hint=f"use one of {', '.join(stages)}")


# -- stages ------------------------------------------------------------------------------------------------------------


def _datasets(
    program: Program,
    data: Any,
    eval: Any,
    preprocess: Any,
    pipeline: Pipeline,
    seed: int,
) -> tuple[Dataset, Dataset | None]:
    """(evaluation, training). Fails before any work when a pass needs data that is not there."""
    from edgec.data import load_data, random_data

    training = None if data is None else load_data(data, program.inputs, preprocess)
    for step in pipeline.passes:
        if Needs.CALIBRATION in step.needs and training is None:
            raise EdgecError("needs calibration data", where=f"pass {step.name}", hint="give --data FILE")
        if Needs.LABELS in step.needs and (training is None or training.labels is None):
            raise EdgecError("needs labelled data", where=f"pass {step.name}", hint="give --data FILE with labels")
    if eval is not None:
        return load_data(eval, program.inputs, preprocess), training
    if training is not None:
        return training.limit(CHECK_SAMPLES, seed), training
    return random_data(program.inputs, RANDOM_SAMPLES, seed, program.example_inputs), None


def _start(
    program: Program,
    dataset: Dataset,
    training: Dataset | None,
    calibration_samples: int,
    metric: str | None,
    device: Device,
    options: Options,
    progress: Progress,
) -> _Run:
    """Evaluate the original model and set up the ledger."""
    from edgec.checks import Check
    from edgec.ledger import Ledger
    from edgec.metrics import default_metric, evaluate, parse_metric

    measure = parse_metric(metric) if metric else default_metric(dataset, program.outputs)
    check = Check(metric=measure.name, max_drop=options.max_drop, on_fail=options.on_fail)
    progress("check original", 0.0)
    reference = evaluate(program, dataset, measure, progress=lambda done: progress("check original", done))
    context = Context(
        device=device,
        calibration=None if training is None else training.limit(calibration_samples, options.seed),
        training=training,
        teacher=program,
        seed=options.seed,
    )
    return _Run(dataset, measure, check, options, Ledger(), context, program, reference, progress, reference)


def _import_check(run: _Run, program: Program) -> None:
    """Compile the untouched model for this machine, run it on one sample, and compare it with PyTorch.

    Importers and code generators can be wrong without saying so; a model that fails here is never compiled.
    """
    from edgec.importing.quantized import QUANTIZED_SQNR_DB, comes_quantised
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    started = time.perf_counter()
    run.progress("import check", 0.0)
    host = load_device("host")
    inputs, want = _sample(run, program)
    with tempfile.TemporaryDirectory(prefix="edgec-import-") as folder:
        from edgec.bundle import build_bundle

        bundle = build_bundle(lower(program, host), host, Path(folder) / "bundle")
        got = bundle.run(*inputs)
        got = got if isinstance(got, tuple) else (got,)
    # A model that comes with codes in it follows like a quantised one.
    needed = QUANTIZED_SQNR_DB if comes_quantised(program) else FOLLOWS.get(arithmetic(program))
    for spec, a, b in zip(program.outputs, got, want, strict=True):
        error = relative_error(a, b)
        if not error <= FLOAT_TOLERANCE and (needed is None or not sqnr_db(a, b) >= needed):
            raise EdgecError(
                f"imported graph differs from PyTorch in output '{spec.name}' (relative error {error:.2g}, "
                f"allowed {FLOAT_TOLERANCE:g})",
                where=program.name,
                hint="this is a bug in edgec or TVM: please report the model; `edgec diff` shows the first wrong layer",
            )
    run.record("import", run.reference, program, time.perf_counter() - started)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|; NaN when either has one."""
    scale = float(np.abs(want).max(initial=0.0))
    return float(np.abs(got.astype(np.float64) - want).max(initial=0.0)) / (scale or 1.0)


def _cross_check(run: _Run, model: Any, program: Program, input_shape: Sequence[int] | None) -> None:
    """Import the model by way of ONNX too, and compare; what was found goes into the report."""
    from edgec.onnx.crosscheck import cross_check

    started = time.perf_counter()
    run.progress("cross-check", 0.0)
    inputs, _ = run.dataset.read(slice(0, program.inputs[0].shape[0]))
    run.ledger.meta["cross_check"] = cross_check(model, program, _tensors(inputs), input_shape)
    run.record("cross-check", run.reference, program, time.perf_counter() - started)


def _write_onnx(run: _Run, program: Program, staged: Path) -> dict[str, Any]:
    """model.onnx beside the code; what the manifest says of it."""
    from edgec.onnx.check import write_onnx

    run.progress("onnx", 0.0)
    first = program.inputs[0].shape
    samples = ONNX_SAMPLES if program.dynamic_batch else (first[0] if first else 1)
    inputs, _ = run.dataset.read(slice(0, min(samples, len(run.dataset))))
    written = write_onnx(program, staged, inputs, arithmetic(program))
    if "not_written" in written:
        run.context.skip(program.name, "onnx: not written", written["not_written"])
    elif written["engine"] is None:
        run.context.skip(program.name, "onnx: not checked", "ONNX Runtime is not installed")
    return written


def _dumper(folder: str | Path | None) -> Callable[[str, Any], None]:
    """Writes each stage as text, and Programs as `.pt2` as well, so that any two stages can be compared."""
    if folder is None:
        return lambda step, stage: None
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)

    def write(step: str, stage: Any) -> None:
        # A Program, or what makes the text of a step of lowering.
        whole = hasattr(stage, "save")
        (target / f"{step}.txt").write_text(stage.text() if whole else stage())
        if whole:
            stage.save(target / f"{step}.pt2")

    return write


def _gate_hint(step: Pass) -> str:
    return "allow more with --max-drop, weaken the pass, or use --on-fail revert"


def _lower(run: _Run, program: Program, device: Device, budget: Budget, writer: Callable[[str, Any], None]) -> Lowered:
    """Plan and kernels, within the budget."""
    from edgec.lowering.lower import lower_staged, stage

    staged, forms = stage(program, device, writer)
    lowered = lower_staged(staged, forms, device, writer)
    arena = budget.arena((*lowered.plan.inputs, *lowered.plan.outputs))
    if arena is not None and lowered.plan.arena_bytes > arena:
        run.progress("fit", 0.0)
        staged, measures = fitted(staged, lambda graph: lower_staged(graph, forms, device).plan, arena, budget.fit)
        for measure in measures:
            run.context.skip(program.name, "fitted", measure)
        lowered = lower_staged(staged, forms, device, writer)
    if budget.flash_bytes is not None:
        from edgec.fit import check_flash

        check_flash(lowered.plan, 0, budget.flash_bytes)
    return lowered


def _build(
    run: _Run,
    original: Program,
    program: Program,
    lowered: Lowered,
    device: Device,
    pipeline: Pipeline,
    staged: Path,
) -> Bundle:
    """Emit and build the bundle with a self-test vector taken from the evaluation data."""
    from edgec.bundle import build_bundle
    from edgec.targets.cpu.emit import SelfTest

    inputs, outputs = _sample(run, program)
    meta = {
        "name": program.name,
        "passes": pipeline.spelling(),
        "seed": run.options.seed,
        "evaluation": run.dataset.describe(),
        "calibration": None if run.context.calibration is None else run.context.calibration.describe(),
        "model": {"original": original.fingerprint(), "final": program.fingerprint()},
        "tuning": {key: dataclasses.asdict(tile) for key, tile in lowered.tiles.items()},
    }
    special = {"integer": 0.0, "half": HALF_SELFTEST_TOLERANCE, "choices": CHOICES_SELFTEST_TOLERANCE}
    tolerance = special.get(arithmetic(program), SELFTEST_TOLERANCE)
    selftest = SelfTest(inputs, outputs, tolerance)
    return build_bundle(lowered, device, staged, selftest=selftest, meta=meta, threads=run.options.threads)


def _sample(run: _Run, program: Program) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """One evaluation sample (as many as a fixed batch has) and what `program` gives for it."""
    inputs, _ = run.dataset.read(slice(0, program.inputs[0].shape[0]))
    return inputs, tuple(y.numpy() for y in program(*_tensors(inputs)))


def _device_check(run: _Run, bundle: Bundle, program: Program, lowered: Lowered, device: Device) -> None:
    """Run the generated code on the evaluation data and compare it with the last Program, sample by sample.

    Raises EdgecError when the code differs from the Program by more than it may, GateFailed when it loses too much.
    """
    from edgec.ledger import DeviceRecord
    from edgec.metrics import compare, evaluate

    here = device.runner == "native" or device.is_mcu or device.is_gpu
    samples = None if device.is_mcu else run.options.device_samples
    if samples is None:
        samples = len(run.dataset) if here and not device.is_gpu else EMULATED_SAMPLES
    total = len(run.dataset)
    order = np.random.default_rng(run.options.seed).permutation(total)
    rows = np.sort(order[: max(1, min(samples, total))])
    dataset, want = run.dataset.take(rows), run.last.take(rows)
    # An emulator is started once per call, so it gets all samples at once.
    batch = 1 if here else len(dataset)
    batch = max(1, batch // program.inputs[0].shape[0]) * program.inputs[0].shape[0]
    tell = lambda done: run.progress("check device", done)  # noqa: E731
    got = evaluate(bundle.run, dataset, run.metric, batch=batch, progress=tell)
    comparison = compare(run.reference.take(rows), got)
    pairs = list(zip(got.outputs, want.outputs, strict=True))
    exact = all(np.array_equal(a, b) for a, b in pairs)
    run.ledger.device = DeviceRecord.of(
        target=device.name,
        runner=device.runner,
        metric=run.metric,
        comparison=comparison,
        bit_exact=exact,
        max_abs_error=max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs),
        arena_bytes=lowered.plan.arena_bytes,
        arena_lower_bound=lowered.plan.arena_lower_bound,
        code_bytes=bundle.manifest["code_bytes"],
        weight_bytes=lowered.plan.weight_bytes,
        board=_board_check(run, bundle, dataset, got) if device.is_mcu else None,
    )
    if device.is_gpu and not bundle.selftest():
        raise EdgecError(
            "self-test of the bundle failed",
            where=f"{program.name} on {device.name}",
            hint="this is a bug in edgec: please report the model and the pipeline",
        )
    kind = arithmetic(program)
    error = max(relative_error(a, b) for a, b in pairs)
    if kind == "float" and chooses_tokens(program):
        # Two tokens that are equal but for rounding may change places in a few samples.
        scales = [float(np.abs(b).max(initial=0.0)) or 1.0 for _, b in pairs]
        each = [max(float(np.abs(a[i] - b[i]).max()) / s for (a, b), s in zip(pairs, scales)) for i in range(len(rows))]
        error = float(np.quantile(each, CHOSEN_ALIKE))
    if kind == "integer" and not exact:
        problem = f"is not bit-equal to the integer program (relative error {error:.2g})"
    elif kind == "float" and not error <= FLOAT_TOLERANCE:
        problem = f"differs from the program by {error:.2g} (allowed {FLOAT_TOLERANCE:g})"
    elif kind in FOLLOWS and not compare(want, got).sqnr_db >= FOLLOWS[kind]:
        problem = f"follows the program with {compare(want, got).sqnr_db:.1f} dB only ({FOLLOWS[kind]:g} dB needed)"
    else:
        problem = None
    if problem is not None:
        raise EdgecError(
            f"generated code {problem}",
            where=f"{program.name} on {device.name}",
            hint="this is a bug in edgec: please report the model and the pipeline",
        )
    # On a part of the samples one of them weighs too much for the gate: there the code is held against the Program.
    verdict = run.check.verdict(comparison if len(dataset) == len(run.dataset) else compare(want, got))
    if not verdict.passed:
        raise GateFailed(verdict.message, where=f"generated code on {device.name}", hint="see the report's device part")


def _board_check(run: _Run, bundle: Bundle, dataset: Dataset, want: Evaluation) -> BoardRecord:
    """Run some samples on QEMU's board, compare with the same code compiled for this machine, and measure one.

    Raises EdgecError when integers differ, or floats by more than libraries do.
    """
    from edgec.ledger import BoardRecord

    samples = BOARD_SAMPLES if run.options.device_samples is None else run.options.device_samples
    rows = np.arange(min(max(1, samples), len(dataset)))
    # As many as the model's batch has, if it has one.
    rows = rows[: max(1, len(rows) // run.original.inputs[0].shape[0]) * run.original.inputs[0].shape[0]]
    inputs, _ = dataset.read(rows)
    run.progress("check board", 0.0)
    bundle.emulate = True
    try:
        results = bundle.run(*inputs)
    finally:
        bundle.emulate = False
    results = results if isinstance(results, tuple) else (results,)
    for got, all_wanted in zip(results, want.outputs, strict=True):
        wanted = all_wanted[rows]
        error = relative_error(got, wanted)
        if not error <= FLOAT_TOLERANCE or (got.dtype.kind != "f" and not np.array_equal(got, wanted)):
            raise EdgecError(
                f"code on the board differs from the same code on this machine by {error:.2g}",
                where=f"{bundle.name} on {bundle.manifest['target']}",
                hint="this is a bug in edgec: please report the model and the pipeline",
            )
    exact = all(np.array_equal(got, all_wanted[rows]) for got, all_wanted in zip(results, want.outputs, strict=True))
    first = run.original.inputs[0].shape[0]
    measured = bundle.measure(*(a[:first] for a in inputs))
    return BoardRecord(
        machine=bundle.device().machine,
        board_samples=len(rows),
        board_bit_exact=exact,
        instructions=measured.instructions,
        instructions_per_mac=measured.instructions / max(1, bundle.manifest["macs"]),
        flash_bytes=bundle.manifest["flash_bytes"],
        stack_bytes=measured.stack_bytes,
        steps=tuple(measured.steps),
    )


def arithmetic(program: Program) -> str:
    """ "half" when anything is computed in float16; "integer" when all that is computed between quantised inputs and
    dequantised outputs is on integers, "float" when nothing is quantised, "choices" when tokens are chosen by quantised
    numbers, else "mixed"."""
    import torch

    ops = torch.ops.edgec
    # A layer with a float result scales an integer once, as exactly as a dequantisation does.
    edges = (ops.dequantize.default, ops.quantize.default, ops.qlinear_float.default, ops.qconv2d_float.default)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    if any(n.meta["val"].dtype == torch.float16 for n in calls):
        return "half"
    if not any(n.target in edges for n in calls):
        return "float"
    if chooses_tokens(program):
        return "choices"
    floats = [n for n in calls if n.meta["val"].dtype.is_floating_point and n.target not in edges]
    return "integer" if all(_only_moves(n) for n in floats) else "mixed"


def chooses_tokens(program: Program) -> bool:
    """Whether the program merges or drops tokens by what it computes."""
    import torch

    from edgec import tokenops as tokenops

    ops = torch.ops.edgec
    choices = (ops.tome_merge.default, ops.token_reduce.default, ops.token_keep.default)
    return any(n.target in choices for n in program.graph.nodes)


def _only_moves(node: Any) -> bool:
    """Operators that rearrange elements and compute nothing."""
    import torch

    aten = torch.ops.aten
    moves = (aten.view, aten.reshape, aten.flatten, aten.permute, aten.transpose, aten.squeeze, aten.unsqueeze)
    return getattr(node.target, "overloadpacket", None) in moves


def _tensors(arrays: Sequence[np.ndarray]) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(a) for a in arrays)


def _write_reports(run: _Run, lowered: Lowered, program: Program, staged: Path) -> None:
    """report.json, report.html and the final Program beside the code."""
    from edgec.report import write_report
    from edgec.sensitivity import compare_layers

    rows = [row.to_json() for row in compare_layers(run.original, program, run.dataset)]
    write_report(
        staged,
        run.ledger.to_json(),
        timeline=lowered.plan.timeline(),
        sensitivity=rows,
        meta=dict(run.ledger.meta),
    )
    program.save(staged / "program.pt2")
