"""What becomes of one model: imported, compiled for this machine, run, and compared with PyTorch.

Each measurement is a fork of the caller with a time limit. It writes what it knows after every step, so that a crash or
a time-out says how far it got. Finished records are kept under ~/.cache/edgec/benchmarks/zoo, under a name made of the
model's source and of the sources of edgec that the stage runs through.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import functools
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks.models import ROOT
from benchmarks.peers import default_cache, hushed, place_of_stack
from benchmarks.zoo.registry import Entry, build, entries
from edgec.errors import EdgecError
from edgec.stats import sqnr_db

if TYPE_CHECKING:
    from edgec.program import Program
    from edgec.targets.device import Device

Record = dict[str, Any]

STAGES = ("import", "fp32", "int8", "onnx", "onnx-int8")
# Those that quantise.
INTEGER = ("int8", "onnx-int8")
# To be raised when records mean something else.
SCHEMA = 1
# Above this |error| / max |reference| a result is wrong.
LARGEST_ERROR = 1e-3
PASSES = "fold-bn, quantize-int8"
CALIBRATION_SAMPLES = 8
# A process that asks for more is a runaway.
MEMORY = 12 << 30
# Files of edgec/ that no stage runs through.
UNRELATED = frozenset(
    (
        "__main__.py",
        "budget.py",
        "cli.py",
        "console.py",
        "demo.py",
        "diff.py",
        "docs.py",
        "fit.py",
        "inspect.py",
        "ledger.py",
        "listing.py",
        "packing.py",
        "recommend.py",
        "report.py",
        "search.py",
        "sensitivity.py",
        "stats.py",
        "training.py",
        "tune.py",
    )
)
SOURCES = {
    "import": ("edgec/*.py", "edgec/importing", "edgec/lowering"),
    "fp32": (
        "edgec/*.py",
        "edgec/importing",
        "edgec/lowering",
        "targets/*.py",
        "targets/*.toml",
        "targets/kernels",
        "targets/cpu",
    ),
}
SOURCES["int8"] = (*SOURCES["fp32"], "passes")
SOURCES["onnx"] = (*SOURCES["import"], "edgec/onnx")
SOURCES["onnx-int8"] = (*SOURCES["onnx"], "passes")


# -- records in processes of their own ---------------------------------------------------------------------------------


def digest(entry: Entry, stage: str) -> str:
    """Of the model and of the sources that the stage runs through."""
    parts = (SCHEMA, torch.__version__, entry.name, _definition(entry), _sources(stage))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def _sources(stage: str) -> str:
    found = hashlib.sha256()
    for pattern in SOURCES[stage]:
        places = sorted(ROOT.glob(pattern))
        files = [f for p in places for f in ([p] if p.is_file() else sorted(p.rglob("*"))) if f.is_file()]
        for file in files:
            if file.suffix != ".pyc" and not (file.parent.name == "edgec" and file.name in UNRELATED):
                found.update(file.read_bytes())
    return found.hexdigest()


def _definition(entry: Entry) -> str:
    """What makes the model what it is: for one written here its classes and all functions of the file."""
    shapes = [(tuple(x.shape), x.dtype) for x in entry.draw()]
    if entry.library:
        package = importlib.metadata.version(entry.library)
        return repr((shapes, getattr(entry.make, "args", ()), package))
    network, _ = build(entry.name)
    classes = {c for m in network.modules() for c in type(m).__mro__ if c.__module__.startswith("benchmarks.zoo")}
    functions = inspect.getmembers(sys.modules[entry.source], inspect.isfunction)
    own = [f for _, f in functions if f.__module__ == entry.source]
    # As syntax: neither comments nor formatting change a model.
    trees = [ast.dump(ast.parse(textwrap.dedent(inspect.getsource(each)))) for each in (*classes, *own)]
    return repr((shapes, repr(network), sorted(trees)))


def record(entry: Entry, stage: str, limit: float, *, fresh: bool = False) -> Record:
    """The record of a model at a stage, from the cache where nothing it depends on has changed.

    limit: seconds. Keys: outcome, reason, step (where it ended), seconds by step, and what the steps found out.
    """
    folder = default_cache() / "zoo"
    key = digest(entry, stage)
    file = folder / f"{entry.name}.{stage}.{key}.json"
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(file.read_text())
        # A process that ran out of time may have more of it now.
        if not fresh and (kept["outcome"] != "timeout" or kept["limit"] >= limit):
            return kept
    found = {**_forked(entry, stage, limit), "limit": limit}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    return found


def _forked(entry: Entry, stage: str, limit: float) -> Record:
    with tempfile.TemporaryDirectory(prefix="edgec-zoo-") as folder:
        notes = Path(folder) / "notes.json"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=_child, args=(entry, stage, limit, Path(folder)))
        start = time.monotonic()
        process.start()
        process.join(limit)
        alive = process.is_alive()
        if alive and process.pid is not None:
            # It leads a group of its own: compilers that it started end with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        found: Record = {"name": entry.name, "family": entry.family, "stage": stage, "step": "start", "seconds": {}}
        if notes.is_file():
            found.update(json.loads(notes.read_text()))
        found["wall"] = round(time.monotonic() - start, 2)
        if "outcome" not in found:
            stack = place_of_stack(Path(folder) / "stack")
            if alive:
                found.update(outcome="timeout", reason=f"not done after {limit:.0f} s, at step {found['step']}{stack}")
            else:
                code = process.exitcode or 0
                what = signal.Signals(-code).name if code < 0 else f"status {code}"
                found.update(outcome="crashed", reason=f"{what} at step {found['step']}{stack}")
        return found


class Notes:
    """What a measurement found out so far, on disk."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: Record = {"seconds": {}}

    def put(self, **facts: Any) -> None:
        self.found.update(facts)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.found))
        part.replace(self.file)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.put(step=name)
        start = time.perf_counter()
        yield
        self.found["seconds"][name] = round(time.perf_counter() - start, 3)


def _child(entry: Entry, stage: str, limit: float, folder: Path) -> None:
    os.setsid()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    stack = (folder / "stack").open("w")
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(0.95 * limit, file=stack)
    notes = Notes(folder / "notes.json")
    try:
        with hushed():
            measure(entry, stage, notes, folder)
    except EdgecError as error:
        text = str(error)
        notes.put(outcome="refused", reason=text, named=names_place(text))
    except BaseException as error:  # Whatever it is, it is a row of the table.
        trace = "".join(traceback.format_exception(error))
        notes.put(outcome="crashed", reason=f"{type(error).__name__}: {error}"[:2000], trace=trace[-4000:])
    # No destructors of half-built compilers, which may crash.
    os._exit(0)


def names_place(text: str) -> bool:
    """Whether a refusal names a source line, or the path of a module, as far as the line can tell."""
    return bool(re.search(r"[\w-]+\.py:\d+", text))


# -- steps -------------------------------------------------------------------------------------------------------------

_current: tuple[nn.Module, tuple[torch.Tensor, ...]] | None = None


def current() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The factory that `load_model` calls: the module and the example inputs of the model being measured."""
    assert _current is not None
    return _current


def measure(entry: Entry, stage: str, notes: Notes, folder: Path) -> None:
    """All steps of a stage; puts "outcome" where it comes to the end. Raises EdgecError where edgec refuses."""
    global _current
    from edgec.frontend import load_model
    from edgec.lowering.lower import kernel_bindings
    from edgec.targets.device import load_device

    with notes.step("build"):
        network, examples = build(entry.name)
        with torch.no_grad():
            reference = leaves(network(*[x.clone() for x in examples]))
        _check_reference(entry, reference)
        weights = sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
        notes.put(weights=weights, parameters=sum(p.numel() for p in network.parameters()))
    _current = network, examples
    with notes.step("import"), exports_timed() as spent, peak_memory() as memory:
        program = load_model("benchmarks.zoo.measure:current", name=entry.name)
    notes.found["seconds"]["export"] = round(spent[0], 3)
    calls = sum(n.op == "call_function" for n in program.graph.nodes)
    notes.put(nodes=calls, dynamic=program.dynamic_batch, import_bytes=memory[0])
    host = load_device("host")
    if stage == "import":
        with notes.step("operators"):
            kernel_bindings(program, host)
        notes.put(outcome="right", step="done")
        return
    if stage.startswith("onnx"):
        if stage in INTEGER:
            with notes.step("quantise"):
                program = _quantised(entry, program, host)
        # Not as many as the program was exported with, so that a batch that is written into the file shows.
        draws = [entry.draw(seed) for seed in ((1, 2, 3) if program.dynamic_batch else (1,))]
        _judge_onnx(program, [torch.cat(each).numpy() for each in zip(*draws, strict=True)], notes)
        notes.put(step="done")
        return
    inputs, wanted = samples(entry, network, program)
    if stage == "fp32":
        got = _compiled(program, host, inputs, notes, folder)
        error = largest_error(got, wanted)
        right = error <= LARGEST_ERROR
        text = f"relative error {error:.2g}" if np.isfinite(error) else mismatch(got, wanted)
        notes.put(outcome="right" if right else "WRONG", error=_number(error), reason="" if right else text)
    else:
        with notes.step("quantise"):
            quantised = _quantised(entry, program, host)
            wanted = [y.numpy() for y in quantised(*[torch.from_numpy(x) for x in inputs])]
        got = _compiled(quantised, host, inputs, notes, folder)
        _judge_int8(quantised, got, wanted, notes)
    notes.put(step="done")


def _check_reference(entry: Entry, reference: Sequence[np.ndarray]) -> None:
    """A model whose result says nothing about its weights is a mistake in the zoo. Raises AssertionError."""
    assert reference, f"{entry.name} has no outputs"
    floats = [y for y in reference if y.dtype.kind == "f" and y.size]
    assert all(np.isfinite(y).all() for y in floats), f"{entry.name} gives values that are not finite"
    assert all(float(np.abs(y).max()) > 1e-6 for y in floats), f"{entry.name} gives zeros"


def samples(entry: Entry, network: nn.Module, program: Program) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(inputs, what the module gives for them). Two samples where the batch is dynamic, which the module sees alone."""
    draws = [entry.draw(seed) for seed in ((1, 2) if program.dynamic_batch else (1,))]
    with torch.no_grad():
        results = [leaves(network(*[x.clone() for x in each])) for each in draws]
    if len(draws) == 1:
        return [x.numpy() for x in draws[0]], results[0]
    inputs = [torch.cat(each).numpy() for each in zip(*draws, strict=True)]
    return inputs, [np.concatenate(each) for each in zip(*results, strict=True)]


def _compiled(
    program: Program, device: Device, inputs: Sequence[np.ndarray], notes: Notes, folder: Path
) -> list[np.ndarray]:
    """What the generated code gives for the inputs."""
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower

    with notes.step("lower"):
        lowered = lower(program, device)
    with notes.step("compile"):
        bundle = build_bundle(lowered, device, folder / "bundle")
    notes.put(
        arena=lowered.plan.arena_bytes,
        library=[f"{f.layer}: {f.what}" for f in lowered.fallbacks][:20],
        code=bundle.manifest["code_bytes"],
    )
    with notes.step("run"):
        results = bundle.run(*inputs)
    return list(results) if isinstance(results, tuple) else [results]


def _quantised(entry: Entry, program: Program, device: Device) -> Program:
    from edgec.data import load_data
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline

    draws = [entry.draw(100 + i) for i in range(CALIBRATION_SAMPLES)]
    arrays = tuple(torch.cat(each).numpy() for each in zip(*draws, strict=True))
    context = Context(device=device, calibration=load_data(arrays[0] if len(arrays) == 1 else arrays, program.inputs))
    for step in Pipeline.parse(PASSES):
        program = step.run(program, context)
    return program


def _judge_int8(program: Program, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], notes: Notes) -> None:
    """Integers must be the same bits; a float island may move a value by one code, which later layers carry on."""
    from edgec.compile import FLOAT_TOLERANCE, FOLLOWS, arithmetic

    kind = arithmetic(program)
    exact = len(got) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
    error = largest_error(got, wanted)
    follows = min((sqnr(a, b) for a, b in zip(got, wanted)), default=0.0)
    right = exact or (kind == "float" and error <= FLOAT_TOLERANCE) or (kind in FOLLOWS and follows >= FOLLOWS[kind])
    facts = {"arithmetic": kind, "exact": exact, "sqnr": round(follows, 1), "error": _number(error)}
    reason = "" if right else f"{kind} code follows the program with {follows:.1f} dB"
    notes.put(outcome="right" if right else "WRONG", reason=reason, **facts)


def _judge_onnx(program: Program, inputs: Sequence[np.ndarray], notes: Notes) -> None:
    """The ONNX form of a Program in ONNX Runtime against the Program, by the limits of `edgec.onnx.check`."""
    from edgec.compile import arithmetic
    from edgec.onnx.check import agrees, compare, run_onnx
    from edgec.onnx.writer import to_onnx

    kind = arithmetic(program)
    with notes.step("write"):
        model = to_onnx(program)
    with notes.step("run"):
        got = run_onnx(model.SerializeToString(deterministic=True), inputs)
    found = compare(program, inputs, got)
    why = agrees(found, kind)
    error = found["relative_error"]
    notes.put(outcome="WRONG" if why else "right", reason=why, arithmetic=kind, error=_number(error), onnx=found)


# -- numbers -----------------------------------------------------------------------------------------------------------


def leaves(results: Any) -> list[np.ndarray]:
    """The tensors of a model's result, flattened as torch.export does, as arrays."""
    from torch.utils._pytree import tree_leaves

    return [y.detach().numpy() for y in tree_leaves(results) if isinstance(y, torch.Tensor)]


def largest_error(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """max |error| / max |reference|, the worst of the outputs; infinite for other numbers, shapes or types."""
    if len(got) != len(wanted):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        scale = float(np.abs(b.astype(np.float64)).max(initial=0.0))
        error = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))
        worst = max(worst, error / (scale or 1.0))
    return worst


def mismatch(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> str:
    """Why an error is infinite."""
    kinds = [", ".join(f"{y.dtype}{list(y.shape)}" for y in each) for each in (got, wanted)]
    return f"gives {kinds[0]}, PyTorch {kinds[1]}" if kinds[0] != kinds[1] else "gives values that are not finite"


def sqnr(got: np.ndarray, wanted: np.ndarray) -> float:
    """Signal by error in dB, 999 without any error."""
    if got.shape != wanted.shape:
        return 0.0
    return min(sqnr_db(got, wanted), 999.0)


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


@contextlib.contextmanager
def exports_timed() -> Iterator[list[float]]:
    """[seconds inside torch.export.export], as there may be several calls."""
    spent = [0.0]
    original = torch.export.export

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **options)
        finally:
            spent[0] += time.perf_counter() - start

    with mock.patch.object(torch.export, "export", timed):
        yield spent


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """[bytes by which the resident memory of this process rose at most]; 0 where the kernel does not say."""
    found = [0]
    before = 0
    with contextlib.suppress(OSError):
        # Sets the high-water mark to the present size.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    yield found
    found[0] = max(0, _status("VmHWM") - before) if before else 0


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024


def known(names: Sequence[str], families: Sequence[str]) -> list[Entry]:
    """Entries with these names, or of these families; all without either. Raises EdgecError for unknown ones."""
    everything = entries()
    for name in names:
        if name not in everything:
            raise EdgecError("is not in the zoo", where=f"--model {name}", hint="list the names with --list")
    kinds = sorted({e.family for e in everything.values()})
    for family in families:
        if not any(family in k for k in kinds):
            raise EdgecError("is no family", where=f"--family {family}", hint=f"use {'; '.join(kinds)}")
    chosen = [e for e in everything.values() if e.name in names or any(f in e.family for f in families)]
    return chosen if names or families else list(everything.values())
