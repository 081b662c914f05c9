"""Speed and accuracy of edgec's code for this machine beside other inference engines, in turns in one process.

    python -m benchmarks.cpu [--model NAME ...] [--kind fp32|int8|both] [--threads N] [--rounds N] [--save FILE.json]

Models are those of `benchmarks/models.py` by name, `digits`, and networks of timm with random weights. Every contestant
is compiled, quantised and evaluated first; then the process is pinned and only inference with a batch of one is timed,
all contestants taking turns. A contestant that cannot take part is reported with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Before torch and NumPy are loaded: their threads would run beside the one that is measured.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import typer  # noqa: E402

from benchmarks import layers, timm_models  # noqa: E402
from benchmarks.models import CASES, Case, shared_folder  # noqa: E402
from benchmarks.peers import (  # noqa: E402
    ENGINES,
    KINDS,
    Absent,
    Engine,
    Loaded,
    OnnxRuntime,
    Subject,
    add_peers_to_path,
    default_cache,
    hushed,
)
from benchmarks.timing import Timing, markdown, measure, pin, ratios  # noqa: E402
from edgec.errors import EdgecError  # noqa: E402

if TYPE_CHECKING:
    from edgec.program import Program

PASSES = {"fp32": "fold-bn", "int8": "fold-bn, quantize-int8"}
OURS = "edgec"
CALIBRATION_SAMPLES = 100
# A peer that finds the float network's class less often than this is not compared with.
LEAST_AGREEMENT = 0.5
SHARED_MODELS = (
    "imagenet_mobilenetv1_075_224",
    "imagenet_mobilenetv2_100_224_dq",
    "imagenet_vit_tiny_p16_224",
    "sr_vdsr_x2_y224",
    "mlperftiny_ic_resnet8",
    "cifar10_resnet20",
)
DEFAULT_MODELS = (*SHARED_MODELS, *timm_models.MODELS)
HEADER = ("model", "type", "contestant", "CPU ms", "min", "wall ms", "to fastest peer", "metric", "value", "same top-1")


@dataclass(frozen=True)
class Row:
    """One contestant on one model. `timing` and what follows are None where `absent` says why."""

    model: str
    kind: str
    contestant: str
    absent: str | None = None
    timing: Timing | None = None
    ratio: float | None = None
    metric: str | None = None
    value: float | None = None
    unit: str | None = None
    agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "timing": None if self.timing is None else self.timing.to_json()}

    def cells(self) -> list[str]:
        """The row of the table."""
        named = [self.model, self.kind, self.contestant]
        if self.timing is None:
            return [*named, f"absent: {self.absent}", *[""] * (len(HEADER) - 4)]
        percent = self.unit == "fraction"
        value = (
            "" if self.value is None else f"{100 * self.value:.1f} %" if percent else f"{self.value:.2f} {self.unit}"
        )
        return [
            *named,
            f"{self.timing.cpu / 1e3:.3f}",
            f"{self.timing.cpu_min / 1e3:.3f}",
            f"{self.timing.wall / 1e3:.3f}",
            "" if self.ratio is None else f"{self.ratio:.2f}",
            self.metric or "",
            value,
            "" if self.agreement is None else f"{100 * self.agreement:.1f} %",
        ]


# -- models ------------------------------------------------------------------------------------------------------------


def known_models() -> dict[str, Case | None]:
    """Names that `load_subject` takes; shared models with their data."""
    shared = {case.model: case for case in CASES if case.data is not None}
    return {**dict.fromkeys(("digits", *timm_models.MODELS)), **shared}


def load_subject(name: str) -> Subject:
    """The network called `name`, one of `known_models`, with its data. Raises EdgecError for what is not installed."""
    from edgec.data import Preprocess, load_data, random_data
    from edgec.frontend import load_model

    if name == "digits":
        from edgec import demo

        network, example = demo.model()
        program = load_model(network, input_shape=tuple(example.shape), name=name)
        calibration, evaluation = (load_data(x, program.inputs) for x in (demo.training_data(), demo.test_data()))
        return Subject(program, calibration.limit(CALIBRATION_SAMPLES), evaluation, None, False)
    if name in timm_models.MODELS:
        add_peers_to_path()
        program = load_model(timm_models.load(name), input_shape=timm_models.INPUT, name=name)
        noise = random_data(program.inputs, CALIBRATION_SAMPLES)
        return Subject(program, noise, None, None, _has_attention(program))
    case, shared = known_models()[name], shared_folder()
    assert case is not None
    program = load_model(case.path(shared))
    preprocess = Preprocess(case.mean, case.std, case.input_scale)
    calibration = load_data(case.source(shared, case.data), program.inputs, preprocess)
    evaluation = load_data(case.source(shared, case.evaluation), program.inputs, preprocess)
    limited = calibration.limit(CALIBRATION_SAMPLES)
    labelled = evaluation if evaluation.targets(slice(0, 1)) is not None else None
    return Subject(program, limited, labelled, case.metric, _has_attention(program))


def _has_attention(program: Any) -> bool:
    return any(
        "scaled_dot_product_attention" in str(n.target) or "softmax" in str(n.target) for n in program.graph.nodes
    )


# -- edgec as a contestant ---------------------------------------------------------------------------------------------


class Edgec:
    """The compiler of this project. `prepare` compiles anew each time, into a folder of its own under `folder`."""

    name = OURS

    def __init__(self, folder: Path, passes: Mapping[str, str] = PASSES) -> None:
        self.folder, self.passes = folder, passes

    def suits(self, subject: Subject, kind: str) -> bool:
        return True

    def version(self) -> str:
        from edgec import __version__

        return __version__

    def prepare(self, subject: Subject, kind: str, cache: Path) -> Path:
        from edgec.bundle import build_bundle
        from edgec.lowering.lower import lower
        from edgec.targets.device import load_device

        device = load_device("host")
        try:
            lowered = lower(transformed(subject, self.passes[kind]), device)
            return build_bundle(lowered, device, Path(tempfile.mkdtemp(dir=self.folder)) / "bundle").path
        except EdgecError as error:
            raise Absent(error) from error

    def load(self, file: Path, threads: int) -> Loaded:
        return NativeBundle(file, threads)


def transformed(subject: Subject, passes: str) -> Program:
    """The network after a pipeline. Raises EdgecError."""
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline
    from edgec.targets.device import load_device

    program, context = subject.program, Context(device=load_device("host"), calibration=subject.calibration)
    for step in Pipeline.parse(passes).passes:
        program = step.run(program, context)
    return program


class NativeBundle:
    """A bundle's C function, called with pointers that are computed beforehand."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        from edgec.bundle import load_bundle

        self.bundle = load_bundle(path)
        manifest, name = self.bundle.manifest, self.bundle.name
        library = ctypes.CDLL(str((path / "lib" / f"lib{name}.so").absolute()))
        if threads > 1 and hasattr(library, f"{name}_set_threads"):
            library[f"{name}_set_threads"](threads)
        self.function = library[f"{name}_run"]
        self.function.argtypes = [ctypes.c_void_p] * (len(manifest["inputs"]) + len(manifest["outputs"]) + 1)
        align = manifest["arena_align"]
        self.memory = np.zeros(manifest["arena_bytes"] + align, np.uint8)
        self.arena = -(-self.memory.ctypes.data // align) * align

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = self.bundle.run(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def bind(self, *inputs: np.ndarray) -> Callable[[], object]:
        outputs = [np.empty(o["shape"], o["dtype"]) for o in self.bundle.manifest["outputs"]]
        arrays = (*inputs, *outputs)
        pointers = [*(ctypes.c_void_p(a.ctypes.data) for a in arrays), ctypes.c_void_p(self.arena)]
        function = self.function

        def run(keep: Any = arrays) -> None:
            if function(*pointers):
                raise RuntimeError(f"{self.bundle.name}_run failed")

        return run


# -- the benchmark -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How to measure: so many threads and rounds on these cores, holding the file `lock` meanwhile.

    samples: of the evaluation; None: all, 0: none. passes: edgec's pipeline for each kind.
    """

    threads: int
    rounds: int
    cores: tuple[int, ...]
    samples: int | None = None
    lock: Path | None = None
    passes: Mapping[str, str] = field(default_factory=lambda: PASSES)


def contest(
    subject: Subject, kind: str, engines: Sequence[Engine], scorer: Scorer, setup: Setup, cache: Path
) -> list[Row]:
    """Prepare, evaluate and time all engines on one network."""
    absent: dict[str, str] = {}
    files: dict[Engine, Path] = {}
    scores: dict[str, dict[str, Any]] = {}
    engines = [engine for engine in engines if engine.suits(subject, kind)]
    for engine in engines:
        try:
            files[engine] = engine.prepare(subject, kind, cache)
            with hushed():
                contestant = engine.load(files[engine], setup.threads)
            scores[engine.name] = scorer(contestant)
        except Exception as reason:
            # Of other engines nothing is expected; an error of our own that is not an EdgecError is a bug.
            if engine.name == OURS and not isinstance(reason, Absent):
                raise
            files.pop(engine, None)
            absent[engine.name] = str(Absent(reason))
    inputs = subject.calibration.read(slice(0, 1))[0]
    with _locked(setup.lock), _pinned(setup.cores):
        timings = in_new_process(time_files, files, inputs, setup.threads, setup.rounds)
    times = {name: t.cpu if setup.threads == 1 else t.wall for name, t in timings.items()}
    relative = ratios(times, [name for name in times if name != OURS and works(scores[name])])
    rows = []
    for name in (engine.name for engine in engines):
        if name in absent:
            rows.append(Row(subject.name, kind, name, absent=absent[name]))
        else:
            rows.append(Row(subject.name, kind, name, None, timings[name], relative.get(name), **scores[name]))
    return rows


def works(scores: Mapping[str, Any]) -> bool:
    """Whether speed counts: an engine whose quantisation has ruined the network is no measure."""
    agreement = scores.get("agreement")
    return agreement is None or agreement >= LEAST_AGREEMENT


def time_files(
    files: Mapping[Engine, Path], inputs: Sequence[np.ndarray], threads: int, rounds: int
) -> dict[str, Timing]:
    """Open the prepared files and let them take turns."""
    add_peers_to_path()
    with hushed():
        ready = {engine.name: engine.load(file, threads) for engine, file in files.items()}
    return measure({name: contestant.bind(*inputs) for name, contestant in ready.items()}, rounds)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` in a fresh Python, on the cores of this thread.

    OpenVINO puts the threads that call it back on the cores that they had when it was first used, and engines keep the
    threads that they have once started: in a process that has run them, nothing can be pinned any more.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Scorer:
    """Scores contestants on the evaluation data of one network; the float network is the reference, run once."""

    def __init__(self, subject: Subject, samples: int | None) -> None:
        """samples: at most so many; None: all of them."""
        from edgec.metrics import default_metric, evaluate, parse_metric

        self.data = None if samples == 0 else subject.evaluation
        if self.data is None:
            return
        self.data = self.data if samples is None else self.data.limit(samples)
        outputs = subject.program.outputs
        self.metric = parse_metric(subject.metric) if subject.metric else default_metric(self.data, outputs)
        self.reference = evaluate(subject.program, self.data, self.metric, batch=25)

    def __call__(self, contestant: Loaded) -> dict[str, Any]:
        """Fields of a Row: the metric, and how often the largest class is the reference's. Nothing without data."""
        from edgec.metrics import compare, evaluate

        if self.data is None:
            return {}
        found = compare(self.reference, evaluate(contestant, self.data, self.metric))
        unit = self.metric.unit
        return {"metric": self.metric.name, "unit": unit, "value": found.value, "agreement": found.agreement}


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    pin(cores)
    try:
        yield
    finally:
        pin(sorted(before))


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Hold `path` as flock(1) does, so that other measurements on this machine wait."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def chosen_cores(threads: int, core: int | None) -> tuple[int, ...]:
    """`threads` cores up to and including `core`, by default the last of the machine. Raises EdgecError."""
    count = os.cpu_count() or 1
    last = count - 1 if core is None else core
    if not 0 <= last < count:
        raise EdgecError(f"the machine has cores 0 to {count - 1}", where=f"--core {core}")
    if not 1 <= threads <= last + 1:
        raise EdgecError(
            f"there are {last + 1} cores up to core {last}", where=f"--threads {threads}", hint="ask for fewer threads"
        )
    return tuple(range(last - threads + 1, last + 1))


def show_layers(subject: Subject, kind: str, setup: Setup, cache: Path, plot: Path | None) -> dict[str, Any]:
    """Print the kernel calls of one network beside the machine's peak; returns them as plain data. Raises Absent."""
    program, inputs = transformed(subject, setup.passes[kind]), subject.calibration.read(slice(0, 1))[0]
    runtime = OnnxRuntime()
    try:
        file: Path | None = runtime.prepare(subject, kind, cache)
    except Absent:
        file = None
    with layers.compiled(program) as bundle, _locked(setup.lock), _pinned(setup.cores):
        peak = layers.measure_peak()
        calls = layers.profile(bundle, inputs)
        theirs = {} if file is None else layers.onnxruntime_profile(file, inputs)
    print(f"\n{subject.name} {kind}, one core of at most {peak}\n\n{layers.table(calls, peak)}\n")
    print(layers.totals_table(layers.totals(calls), theirs), flush=True)
    if plot is not None:
        target = plot.with_name(f"{plot.stem}-{subject.name}-{kind}{plot.suffix}")
        layers.draw(calls, peak, f"{subject.name}, {kind}, one core", target)
    return {
        "model": subject.name,
        "kind": kind,
        "peak": asdict(peak),
        "layers": [asdict(call) for call in calls],
        "onnxruntime": theirs,
    }


def _chosen(names: Collection[str], known: Collection[str], option: str) -> list[str]:
    """`names` in the order of `known`. Raises EdgecError for one that is not there."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise EdgecError(f"'{unknown[0]}' is not known", where=option, hint=f"use {', '.join(known)}")
    return [name for name in known if name in names]


def machine(engines: Sequence[Engine]) -> dict[str, Any]:
    """What was measured on, and with which versions."""
    from edgec.targets.device import load_device

    versions = {}
    for engine in engines:
        try:
            versions[engine.name] = engine.version()
        except Absent as reason:
            versions[engine.name] = f"absent: {reason}"
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    device = load_device("host")
    return {"processor": processor, "cpu": device.mcpu, "machine_cores": os.cpu_count(), "versions": versions}


def run(
    models: Sequence[str],
    kinds: Sequence[str],
    peers: Sequence[str],
    setup: Setup,
    *,
    cache: Path | None = None,
    save: Path | None = None,
) -> list[Row]:
    """Measure and print; `save` is rewritten after every model."""
    cache = cache or default_cache()
    add_peers_to_path()
    rows: list[Row] = []
    print(markdown(HEADER, [], text=3), flush=True)
    with tempfile.TemporaryDirectory(prefix="edgec-bench-") as folder:
        engines: list[Engine] = [
            Edgec(Path(folder), setup.passes),
            *(engine for engine in ENGINES if engine.name in peers),
        ]
        about = {**machine(engines), "threads": setup.threads, "cores": list(setup.cores), "rounds": setup.rounds}
        about["passes"] = dict(setup.passes)
        for name in models:
            try:
                subject = load_subject(name)
                scorer = Scorer(subject, setup.samples)
            except EdgecError as reason:
                rows.append(Row(name, "", "", absent=str(reason)))
                print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
                continue
            for kind in kinds:
                found = contest(subject, kind, engines, scorer, setup, cache)
                for row in found:
                    print(f"| {' | '.join(row.cells())} |", flush=True)
                rows += found
                if save is not None:
                    text = json.dumps({"machine": about, "rows": [row.to_json() for row in rows]}, indent=2)
                    save.write_text(text + "\n")
    return rows


def run_layers(
    models: Sequence[str],
    kinds: Sequence[str],
    setup: Setup,
    *,
    cache: Path | None = None,
    save: Path | None = None,
    plot: Path | None = None,
) -> None:
    """`show_layers` for all; a model that does not compile is named with the reason."""
    add_peers_to_path()
    found = []
    for name in models:
        for kind in kinds:
            try:
                found.append(show_layers(load_subject(name), kind, setup, cache or default_cache(), plot))
            except (EdgecError, Absent) as reason:
                print(f"\n{name} {kind}: absent: {reason}", flush=True)
            if save is not None:
                save.write_text(json.dumps(found, indent=2) + "\n")


def main(
    model: Annotated[list[str] | None, typer.Option(help="only these models")] = None,
    kind: Annotated[str, typer.Option(help="fp32, int8 or both")] = "both",
    threads: Annotated[int, typer.Option(help="threads of every contestant")] = 1,
    core: Annotated[int | None, typer.Option(help="core to pin to; default: the last")] = None,
    rounds: Annotated[int, typer.Option(help="turns of each contestant")] = 21,
    samples: Annotated[int | None, typer.Option(help="evaluate on so many samples; 0: not at all")] = None,
    peers: Annotated[str, typer.Option(help="engines to compare with, by commas; empty: none")] = ",".join(
        engine.name for engine in ENGINES
    ),
    passes: Annotated[str, typer.Option(help="edgec's pipeline for int8")] = PASSES["int8"],
    save: Annotated[Path | None, typer.Option(help="also write everything as JSON")] = None,
    by_layer: Annotated[bool, typer.Option("--layers", help="times of edgec's kernel calls instead")] = False,
    plot: Annotated[Path | None, typer.Option(help="with --layers: rooflines as NAME-MODEL-TYPE.png or .svg")] = None,
    lock: Annotated[Path | None, typer.Option(help="lock file to hold while timing")] = None,
) -> None:
    """Measure and print a Markdown table."""
    try:
        kinds = KINDS if kind == "both" else _chosen([kind], KINDS, "--kind")
        wanted = _chosen([p for p in peers.split(",") if p], [engine.name for engine in ENGINES], "--peers")
        setup = Setup(threads, rounds, chosen_cores(threads, core), samples, lock, {**PASSES, "int8": passes})
        models = _chosen(model, known_models(), "--model") if model else DEFAULT_MODELS
        if by_layer:
            run_layers(models, kinds, setup, save=save, plot=plot)
        else:
            run(models, kinds, wanted, setup, save=save)
    except EdgecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
