"""`edgec tune`: measure the register tiles of a model's kernels, and use the fastest in later compiles.

Convolutions and linear layers pick their tile with a cost model (`Conv2D.blocking`). Here the tiles that fit registers
are tried, the cheapest modelled first, for as long as the user allows: on this machine by the clock, on an emulated
device by the cycles that llvm-mca gives the exactly counted instructions. What is found goes into a JSON file:

    {"edgec_tuning": 1, "devices": {DEVICE: {"unit": "us", "kernels": {KERNEL: {"pixels": 6, "vectors": 4,
     "rows_first": true, "cost": 81.2, "default_cost": 90.7}}}}}

DEVICE is `device_key`, KERNEL the template's `tuning_key`. Tiles change no result of an integer kernel, and of a float
kernel none either: sums are always in the same order.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.lowering.binding import Binding
    from edgec.passbase import Pass
    from edgec.pipeline import Pipeline
    from edgec.program import Program
    from edgec.targets.device import Device
    from edgec.targets.kernels.conv2d import Blocking

# The file that compiles read when they are not told otherwise.
VARIABLE = "EDGEC_TUNING"
SCHEMA = 1
# Part of the time for a kernel that goes into tiles; the rest is for the other order of loops and for the finals.
SEARCH = 0.7
ROUNDS, FINAL_ROUNDS, FINALISTS = 3, 10, 4
# A tile that is not faster than this part of the default's time may be so by chance.
CHANCE = 0.98
# Tiles of one kernel on an emulated device: each is compiled, linked and run in the emulator.
EMULATED = 8
MOST = {"pixels": 64, "vectors": 16}
# Quantisation with noise for calibration gives the kernels, though not the accuracy, that data would give.
NOISE_SAMPLES = 8

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Tuned:
    """The best tile found for one kernel. cost, default_cost: of one call, with it and with the modelled tile."""

    pixels: int
    vectors: int
    rows_first: bool
    cost: float
    default_cost: float

    @property
    def blocking(self) -> Blocking:
        from edgec.targets.kernels.conv2d import Blocking

        return Blocking(self.pixels, self.vectors, self.rows_first)


@dataclass(frozen=True)
class Section:
    """What a table holds for one device, by `tuning_key`. unit: of all costs; "us", "cycles" or "instructions"."""

    unit: str
    kernels: Mapping[str, Tuned]


@dataclass(frozen=True)
class TuneResult:
    """The kernels of one model. calls: how many of its layers each kernel runs; tried: tiles measured."""

    model: str
    device: str
    section: Section
    calls: Mapping[str, int]
    tried: Mapping[str, int]

    @property
    def costs(self) -> tuple[float, float]:
        """(tuned, default) cost of all calls together."""
        pairs = [(self.calls[k], t) for k, t in self.section.kernels.items()]
        return sum(n * t.cost for n, t in pairs), sum(n * t.default_cost for n, t in pairs)

    def rows(self) -> list[dict[str, Any]]:
        """One row per kernel, for people."""
        unit = self.section.unit
        return [
            {
                "kernel": key,
                "calls": self.calls[key],
                "tried": self.tried[key],
                "tile": f"{tuned.pixels}x{tuned.vectors}",
                "order": "rows" if tuned.rows_first else "channels",
                unit: f"{tuned.cost:.1f}",
                f"default {unit}": f"{tuned.default_cost:.1f}",
                "gain": f"{tuned.default_cost / tuned.cost:.2f}x",
            }
            for key, tuned in self.section.kernels.items()
        ]

    def text(self) -> str:
        """All calls together, in one line."""
        tuned, default = self.costs
        unit = self.section.unit
        return f"total   {tuned:,.0f} {unit}, {default:,.0f} {unit} by default: {default / tuned:.2f} times as fast"

    def to_json(self) -> dict[str, Any]:
        tuned, default = self.costs
        section = {"unit": self.section.unit, "kernels": {k: dataclasses.asdict(t) for k, t in self._sorted()}}
        return {"model": self.model, "device": self.device, **section, "cost": tuned, "default_cost": default}

    def _sorted(self) -> list[tuple[str, Tuned]]:
        return sorted(self.section.kernels.items())


# -- the table ---------------------------------------------------------------------------------------------------------


def device_key(device: Device) -> str:
    """What a table calls a device: its name and what code for it may use."""
    features = "".join(f" {f}" for f in device.features)
    vectors = f"{device.registers} vectors of {device.vector_bytes} bytes"
    return f"{device.name}: {device.triple} {device.mcpu}{features}, {vectors}"


def read_table(path: str | Path, where: str | None = None) -> dict[str, Section]:
    """The table in a file, by `device_key`. Raises EdgecError, with `where` (default: the path), for anything else."""
    where = where or str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text"
        raise EdgecError(f"cannot be read: {reason}", where=where) from error
    try:
        document = json.loads(text)
        if document["edgec_tuning"] != SCHEMA:
            raise ValueError(f"version {document['edgec_tuning']} of the format is not known")
        return {
            device: Section(str(section["unit"]), {k: _tuned(k, t) for k, t in section["kernels"].items()})
            for device, section in document["devices"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else "wrong structure"
        hint = "give a file that `edgec tune -o` wrote"
        raise EdgecError(f"is not a tuning table: {reason}", where=where, hint=hint) from error


def _tuned(key: str, record: Mapping[str, Any]) -> Tuned:
    """One entry. Raises ValueError for a tile that no kernel can have."""
    for name, most in MOST.items():
        value = record[name]
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} of '{key}' is {value!r}, not a number in 1..{most}")
    if type(record["rows_first"]) is not bool:
        raise ValueError(f"rows_first of '{key}' is {record['rows_first']!r}")
    return Tuned(
        record["pixels"],
        record["vectors"],
        record["rows_first"],
        float(record["cost"]),
        float(record["default_cost"]),
    )


def write_table(path: str | Path, table: Mapping[str, Section]) -> None:
    """Write a table in a stable order; the file appears complete or not at all. Raises OSError."""
    document = {
        "edgec_tuning": SCHEMA,
        "devices": {
            device: {
                "unit": section.unit,
                "kernels": {k: dataclasses.asdict(t) for k, t in sorted(section.kernels.items())},
            }
            for device, section in sorted(table.items())
        },
    }
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=1) + "\n")
        # mkstemp's files are for their owner only.
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def merged(table: Mapping[str, Section], device: str, section: Section) -> dict[str, Section]:
    """The table with the kernels of `section` added or replaced. Kernels in another unit are dropped."""
    old = table.get(device)
    kept = old.kernels if old is not None and old.unit == section.unit else {}
    return {**table, device: Section(section.unit, {**kept, **section.kernels})}


def tuned_device(device: Device, path: str | Path | None = None) -> Device:
    """`device` with the tiles that the file `path`, or else the one that EDGEC_TUNING names, has for it.

    Without either it is `device` itself. Raises EdgecError when the file is no table or has nothing for this device.
    """
    given = os.environ.get(VARIABLE) if path is None else path
    if not given:
        return device
    where = f"{VARIABLE}={given}" if path is None else str(given)
    table, key = read_table(given, where), device_key(device)
    if key not in table:
        known = "; ".join(sorted(table)) or "nothing"
        raise EdgecError(
            f"has no tiles for '{key}', only for '{known}'", where=where, hint=f"edgec tune --target {device.name}"
        )
    return dataclasses.replace(device, tuning={k: t.blocking for k, t in table[key].kernels.items()})


# -- the search --------------------------------------------------------------------------------------------------------


def tune_model(
    model: Any,
    *,
    target: str = "host",
    passes: Pipeline | str | Sequence[Pass] = "",
    data: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_scale: float | None = None,
    input_shape: Sequence[int] | None = None,
    seconds_per_op: float = 2.0,
    output: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TuneResult:
    """Measure the register tiles of every distinct kernel of `model`, lowered for `target` after `passes`.

    data: calibration data (see `edgec.data.load_data`); random inputs where a pass needs some and none are given, for
        tiles depend on shapes and types only.
    seconds_per_op: time for one kernel, compiling included. At least one batch of tiles is measured.
    output: file to write; a table that is there keeps its other kernels and devices.

    Raises EdgecError, ToolchainMissing.
    """
    from edgec.frontend import load_model
    from edgec.lowering.lower import kernel_bindings
    from edgec.registry import get_device
    from edgec.targets.cpu.toolchain import require_toolchain

    if not seconds_per_op > 0:
        raise EdgecError(f"must be positive, not {seconds_per_op:g}", where="--seconds-per-op")
    device = get_device(target)
    if device.family not in ("host", "cpu"):
        raise EdgecError("has no register tiles to tune", where=f"target {device.name}", hint="tune for a CPU")
    require_toolchain(device)
    table = _existing(output)
    program = load_model(model, input_shape=input_shape)
    program = _transformed(program, passes, data, (mean, std, input_scale), device, seed)
    bindings = [b for b in kernel_bindings(program, device) if hasattr(b.spec, "candidates")]
    if not bindings:
        raise EdgecError("has no convolution or linear layer to tune", where=program.name)
    specs: dict[str, Any] = {}
    calls: dict[str, int] = {}
    for binding in bindings:
        key = binding.spec.tuning_key
        specs.setdefault(key, binding.spec)
        calls[key] = calls.get(key, 0) + 1
    weights = sum(_weight_bytes(b) for b in bindings)
    kernels, tried = {}, {}
    for number, (key, spec) in enumerate(specs.items()):
        if progress is not None:
            progress("tune", number / len(specs))
        kernels[key], tried[key] = tune_kernel(spec, device, seconds_per_op, weights)
    name, section = device_key(device), Section(unit_of(device), kernels)
    if output is not None:
        write_table(output, merged(table, name, section))
    return TuneResult(program.name, name, section, calls, tried)


def unit_of(device: Device) -> str:
    """What tiles are compared by on a device."""
    from edgec.targets.loops import mca

    if device.runner == "native":
        return "us"
    return "cycles" if device.is_arm64 and mca() is not None else "instructions"


def tune_kernel(spec: Any, device: Device, seconds: float, weights: int = 0) -> tuple[Tuned, int]:
    """The best tile of a kernel template, and how many were measured.

    weights: bytes of all weights of the model around it. Raises EdgecError, ToolchainMissing.
    """
    device = dataclasses.replace(device, tuning={})
    search = _time_tiles if device.runner == "native" else _count_tiles
    costs = search(spec, device, seconds, weights)
    default = spec.candidates(device)[0]
    best = min(costs, key=lambda tile: costs[tile])
    if costs[best] > CHANCE * costs[default]:
        best = default
    tuned = Tuned(best.pixels, best.vectors, best.rows_first, round(costs[best], 3), round(costs[default], 3))
    return tuned, len(costs)


def _with_tile(spec: Any, device: Device, tile: Blocking) -> Device:
    return dataclasses.replace(device, tuning={spec.tuning_key: tile})


def _time_tiles(spec: Any, device: Device, seconds: float, weights: int) -> dict[Blocking, float]:
    """Microseconds of one call, by tile; the default's is among them."""
    from edgec.targets.cpu.timer import KernelTimer

    started = time.monotonic()
    timer = KernelTimer(device, weights)
    numbers: dict[Blocking, int] = {}
    costs: dict[Blocking, float] = {}

    def compete(tiles: Sequence[Blocking], rounds: int) -> None:
        new = [t for t in tiles if t not in numbers]
        functions = [spec.prim_func(_with_tile(spec, device, t)) for t in new]
        numbers.update(zip(new, timer.add(functions), strict=True))
        found = timer.best([numbers[t] for t in tiles], rounds)
        for t in tiles:
            costs[t] = min(costs.get(t, float("inf")), 1e6 * found[numbers[t]])

    candidates = spec.candidates(device)
    batch = 2 * len(os.sched_getaffinity(0))
    for start in range(0, len(candidates), batch):
        compete(candidates[start : start + batch], ROUNDS)
        batches = start // batch + 1
        if (time.monotonic() - started) * (batches + 1) / batches > SEARCH * seconds:
            break
    if spec.reorders:
        leaders = sorted(costs, key=lambda t: costs[t])[:2]
        compete([dataclasses.replace(t, rows_first=not t.rows_first) for t in leaders], ROUNDS)
    finalists = [t for t in sorted(costs, key=lambda t: costs[t])[:FINALISTS] if t != candidates[0]]
    compete([candidates[0], *finalists], FINAL_ROUNDS)
    return costs


def _count_tiles(spec: Any, device: Device, seconds: float, weights: int) -> dict[Blocking, float]:
    """Cycles in llvm-mca's model, or instructions, of one call, by tile; the default's is among them.

    The order of the loops stays: the model knows no caches.
    """
    from edgec.targets.loops import inspect_function
    from edgec.targets.qemu.kernel import kernel_functions, profile_kernel

    started = time.monotonic()
    costs: dict[Blocking, float] = {}
    for tile in spec.candidates(device)[:EMULATED]:
        with tempfile.TemporaryDirectory(prefix="edgec-tune-") as folder:
            profile = profile_kernel(spec, _with_tile(spec, device, tile), Path(folder))
            costs[tile] = float(profile.total)
            if unit_of(device) == "cycles":
                reports = (inspect_function(profile.program, f, device, profile) for f in kernel_functions(profile))
                costs[tile] = sum(report.cycles or 0.0 for report in reports)
        elapsed = time.monotonic() - started
        if len(costs) > 1 and elapsed * (len(costs) + 1) / len(costs) > seconds:
            break
    return costs


def _existing(output: str | Path | None) -> dict[str, Section]:
    """The table at `output`, which is read, and found writable, before the search and not after it."""
    if output is None:
        return {}
    target = Path(output)
    if not target.parent.is_dir():
        raise EdgecError("folder does not exist", where=str(target.parent))
    return read_table(target) if target.exists() else {}


def _transformed(
    program: Program,
    passes: Pipeline | str | Sequence[Pass],
    data: Any,
    preprocessing: tuple[Sequence[float] | None, Sequence[float] | None, float | None],
    device: Device,
    seed: int,
) -> Program:
    """The model after the pipeline."""
    from edgec.data import Preprocess, load_data, random_data
    from edgec.passbase import Context, Needs
    from edgec.pipeline import Pipeline

    pipeline = Pipeline.of(passes)
    calibration = None
    if data is not None:
        mean, std, scale = preprocessing
        means, stds = (None if v is None else tuple(v) for v in (mean, std))
        calibration = load_data(data, program.inputs, Preprocess(means, stds, scale)).limit(NOISE_SAMPLES, seed)
    elif any(Needs.CALIBRATION in step.needs for step in pipeline):
        calibration = random_data(program.inputs, NOISE_SAMPLES, seed, program.example_inputs)
    context = Context(device=device, calibration=calibration, seed=seed)
    for step in pipeline:
        program = step.run(program, context)
    return program


def _weight_bytes(binding: Binding) -> int:
    return sum(a.nbytes for a in binding.weights.values() if a is not None)
