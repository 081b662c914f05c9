"""Instructions and modelled cycles of one inference on 64-bit Arm cores, counted exactly under QEMU.

    python -m benchmarks.aarch64 --model imagenet_mobilenetv1_075_224 --kind int8 --device neoverse-n1 --layers
    python -m benchmarks.aarch64 --spec "Conv2D(1, 196, 96, 576)" --device cortex-a72 --asm

MODEL is a name of benchmarks/models.py or a part of one, `resnet18` (random weights) or `digits`. Instructions are not
time: a core may do two or four in a cycle, or wait for memory. Beside them stand the cycles that LLVM's model of the
core (llvm-mca 19) gives the kernels, every load hitting the first cache; the C library's memcpy and memset, which
kernels call for padding, have their own lines and no cycles. Both figures are the same on every run.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.models import CASES, IMAGENET, shared_folder
from edgec.bundle import build_bundle
from edgec.errors import EdgecError
from edgec.targets import loops
from edgec.targets.device import Device, load_device
from edgec.targets.kernels import common, conv2d, depthwise, eltwise, pool, transpose
from edgec.targets.loops import KernelReport, inspect_function
from edgec.targets.qemu.counter import profile_bundle
from edgec.targets.qemu.kernel import kernel_functions, profile_kernel

# A single kernel needs no torch, whose import would take longer than the measurement.
if TYPE_CHECKING:
    from edgec.data import Dataset
    from edgec.plan import Step
    from edgec.program import Program

PASSES = {"fp32": "fold-bn", "fp16": "fold-bn, cast-fp16", "int8": "fold-bn, quantize-int8"}
DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
DEVICES = ("cortex-a72", "neoverse-n1")
# Instructions do not depend on the quantisation parameters.
CALIBRATION_SAMPLES = 8
# Part of a kernel's instructions that makes a loop worth printing.
HOT = 0.1
# Kernels that sum over channels, so that lanes can be multiplied by element and dot products apply.
DENSE = ("conv2d", "gemm", "matmul", "linear")
KERNELS = {
    name: value
    for module in (common, conv2d, depthwise, eltwise, pool, transpose)
    for name, value in vars(module).items()
    if dataclasses.is_dataclass(value) and isinstance(value, type)
}


@dataclass(frozen=True)
class KernelRow:
    """One function of the generated code. layers: a name for each call of it in the model; macs, instructions: of one
    call; loops: None where not asked for."""

    symbol: str
    layers: tuple[str, ...]
    macs: int
    instructions: int
    loops: KernelReport | None = None

    @property
    def calls(self) -> int:
        return max(1, len(self.layers))

    @property
    def dense(self) -> bool:
        return any(word in self.symbol for word in DENSE)


@dataclass(frozen=True)
class Measurement:
    """One model, or one kernel, on one device. kernels: most instructions first; the C library's are among them."""

    model: str
    kind: str
    device: Device
    macs: int
    instructions: int
    kernels: tuple[KernelRow, ...]

    @property
    def cycles(self) -> float | None:
        """Modelled cycles of all kernels that were inspected; None when none was."""
        known = [k.loops.cycles * k.calls for k in self.kernels if k.loops is not None and k.loops.cycles is not None]
        return sum(known) if known else None

    def to_json(self) -> dict[str, Any]:
        rows = []
        for k in self.kernels:
            row = {"symbol": k.symbol, "layers": k.layers, "macs": k.macs, "instructions": k.instructions}
            row["per_mac"] = k.instructions / k.macs if k.macs else None
            if k.loops is not None:
                row["cycles"] = k.loops.cycles
                row["loops"] = [
                    {
                        **dataclasses.asdict(report),
                        "instructions": report.instructions,
                        "macs_per_cycle": report.macs_per_cycle,
                        "of_peak": report.of_peak,
                        "findings": report.findings(self.device, k.dense),
                    }
                    for report in k.loops.loops
                ]
            rows.append(row)
        return {
            "model": self.model,
            "kind": self.kind,
            "device": self.device.name,
            "macs": self.macs,
            "instructions": self.instructions,
            "per_mac": self.instructions / self.macs if self.macs else None,
            "cycles": self.cycles,
            "kernels": rows,
        }


# -- what is measured --------------------------------------------------------------------------------------------------


def load(name: str) -> tuple[Program, Dataset | None]:
    """A model and its calibration data, None where it has none. Raises EdgecError for a name that is not there."""
    from edgec.data import Preprocess, load_data
    from edgec.frontend import load_model

    shared = shared_folder()
    if name == "digits":
        from edgec.demo import model, training_data

        module, example = model()
        program = load_model(module, input_shape=tuple(example.shape), name=name)
        return program, load_data(training_data(), program.inputs)
    if name == "resnet18":
        from benchmarks.resnet import resnet18

        program = load_model(resnet18(), input_shape=(1, 3, 224, 224), name=name)
        images = shared / "data" / "datasets" / "imagenet_samples_calib.npz"
        return program, load_data(str(images), program.inputs, Preprocess(*IMAGENET))
    cases = {case.model: case for case in CASES}
    matches = [name] if name in cases else [n for n in cases if name in n]
    if len(matches) != 1:
        what = "is not a model" if not matches else f"could be {' or '.join(matches)}"
        raise EdgecError(what, where=f"--model {name}", hint=f"use digits, resnet18, {', '.join(cases)}")
    case = cases[matches[0]]
    program = load_model(case.path(shared))
    source = case.source(shared, case.data)
    if source is None:
        return program, None
    return program, load_data(source, program.inputs, Preprocess(case.mean, case.std, case.input_scale))


def prepare(program: Program, data: Dataset | None, kind: str, device: Device) -> Program:
    """The model after the passes of `kind`. Raises EdgecError."""
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline

    if kind == "int8" and data is None:
        raise EdgecError("has no calibration data for int8", where=program.name)
    context = Context(device=device, calibration=None if data is None else data.limit(CALIBRATION_SAMPLES))
    for step in Pipeline.parse(PASSES[kind]):
        program = step.run(program, context)
    return program


def measure(program: Program, kind: str, device: Device, inspect: bool) -> Measurement:
    """Compile `program` (after its passes) for the device and count one inference of random inputs.

    inspect: look into the loops as well. Raises EdgecError, ToolchainMissing.
    """
    from edgec.lowering.lower import lower

    with tempfile.TemporaryDirectory(prefix="edgec-aarch64-") as name:
        folder = Path(name)
        lowered = lower(program, device)
        bundle = build_bundle(lowered, device, folder / "bundle")
        profile = profile_bundle(bundle, random_inputs(bundle.manifest["inputs"]), device, folder)
        steps: dict[str, list[Step]] = {}
        for step in lowered.plan.steps:
            steps.setdefault(step.symbol, []).append(step)
        rows = []
        for symbol, instructions in profile.by_symbol.items():
            calls = steps.get(symbol, [])
            report = inspect_function(profile.program, symbol, device, profile) if inspect and calls else None
            rows.append(_row(symbol, calls, instructions, report))
        macs = bundle.manifest["macs"]
        return Measurement(program.name, kind, device, macs, profile.total, tuple(rows))


def _row(symbol: str, calls: Sequence[Step], instructions: int, report: KernelReport | None) -> KernelRow:
    """A kernel's work for one call. Its calls all do the same: kernels have no branches that depend on data."""
    n = max(1, len(calls))
    if report is not None and report.cycles is not None:
        report = dataclasses.replace(report, cycles=report.cycles / n)
    layers = tuple(step.layer or step.origin or step.op for step in calls)
    return KernelRow(symbol, layers, calls[0].macs if calls else 0, round(instructions / n), report)


def measure_kernel(spec: Any, device: Device, inspect: bool = True) -> Measurement:
    """Compile one kernel template for the device and count one call on zeros. Raises EdgecError, ToolchainMissing."""
    with tempfile.TemporaryDirectory(prefix="edgec-aarch64-") as name:
        profile = profile_kernel(spec, device, Path(name))
        functions = kernel_functions(profile)
        rows = []
        for function, instructions in profile.by_symbol.items():
            report = inspect_function(profile.program, function, device, profile) if function in functions else None
            macs = spec.macs if function == functions[0] else 0
            rows.append(KernelRow(function, (), macs, instructions, report if inspect else None))
        return Measurement(text_of(spec), kind_of(spec), device, spec.macs, profile.total, tuple(rows))


def kind_of(spec: Any) -> str:
    return KINDS[getattr(spec, "dtype", "float32")]


def parse_spec(text: str) -> Any:
    """A kernel template from its Python expression, e.g. `Depthwise(56, 56, 96, kernel=(3, 3), dtype="int8")`.

    Raises EdgecError for anything but templates, epilogues and literals.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KERNELS:
            named = {k.arg: value(k.value) for k in node.keywords if k.arg}
            return KERNELS[node.func.id](*map(value, node.args), **named)
        if isinstance(node, ast.Name) and node.id == "inf":
            return math.inf
        return ast.literal_eval(node)

    try:
        spec = value(ast.parse(text.strip(), mode="eval").body)
        if not hasattr(spec, "prim_func"):
            raise ValueError("no kernel template")
    except (SyntaxError, ValueError, TypeError) as error:
        names = sorted(name for name, kernel in KERNELS.items() if hasattr(kernel, "prim_func"))
        raise EdgecError(f"is no kernel: {error}", where=f"--spec '{text}'", hint=f"use {', '.join(names)}") from error
    return spec


def with_kind(spec: Any, kind: str) -> Any:
    """The template for another type, with the epilogue that type needs."""
    dtype = DTYPES[kind]
    changes: dict[str, Any] = {"dtype": dtype} if hasattr(spec, "dtype") else {}
    epilogue = getattr(spec, "epilogue", None)
    if epilogue is not None and dtype == "int8" and math.isinf(epilogue.lo):
        changes["epilogue"] = dataclasses.replace(epilogue, lo=-128, hi=127)
    return dataclasses.replace(spec, **changes)


def text_of(spec: Any) -> str:
    """The template's fields, without those that have their default value."""
    parts = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if made is dataclasses.MISSING:
            parts.append(repr(value))
        elif value != made:
            parts.append(f"{field.name}={text_of(value) if dataclasses.is_dataclass(value) else repr(value)}")
    return f"{type(spec).__name__}({', '.join(parts)})"


def random_inputs(ports: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """One seeded sample for each input of a bundle."""
    rng = np.random.default_rng(0)
    made = []
    for port in ports:
        dtype = np.dtype(port["dtype"])
        values = rng.normal(size=port["shape"]) if dtype.kind == "f" else rng.integers(0, 2, port["shape"])
        made.append(values.astype(dtype))
    return made


# -- tables ------------------------------------------------------------------------------------------------------------

HEADER = "| model | type | device | MACs | instructions | per MAC | model cycles | MAC/cycle |\n|" + "---|" * 8
KERNEL_HEADER = (
    "| kernel | layers | MACs | instructions | per MAC | share | model cycles | MAC/cycle | hot loop | findings |\n|"
    + "---|" * 10
)


def _ratio(a: float | None, b: float | None, digits: int = 3) -> str:
    return "" if not a or not b else f"{a / b:.{digits}f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def format_row(m: Measurement) -> str:
    """A line of the table of models."""
    per_mac, rate = _ratio(m.instructions, m.macs), _ratio(m.macs, m.cycles, 2)
    cells = (m.model, m.kind, m.device.name, _whole(m.macs), _whole(m.instructions), per_mac, _whole(m.cycles), rate)
    return f"| {' | '.join(cells)} |"


def format_kernels(m: Measurement) -> Iterator[str]:
    """The table of a model's kernels; figures are of one call, `share` of all calls."""
    prefix = f"{m.model}_"
    for k in m.kernels:
        hot = k.loops.loops[0] if k.loops is not None else None
        layers = k.layers[0] if k.layers else ""
        cycles = k.loops.cycles if k.loops is not None else None
        cells = (
            k.symbol.removeprefix(prefix),
            layers if k.calls < 2 else f"{layers} and {k.calls - 1} more",
            _whole(k.macs),
            _whole(k.instructions),
            _ratio(k.instructions, k.macs),
            f"{100 * k.instructions * k.calls / m.instructions:.1f} %",
            _whole(cycles),
            _ratio(k.macs, cycles, 2),
            hot.text() if hot else "",
            "; ".join(findings(k, m.device)),
        )
        yield f"| {' | '.join(cells)} |"


def findings(k: KernelRow, device: Device) -> list[str]:
    """What is wrong with the kernel's hot loops."""
    hot = [r for r in k.loops.loops if (r.share or 0) >= HOT] if k.loops is not None else []
    return list(dict.fromkeys(text for r in hot for text in r.findings(device, k.dense)))


def show(m: Measurement, layers: bool, asm: bool) -> None:
    """Print a measurement with its kernels."""
    if layers:
        typer.echo(f"\n{m.model}, {m.kind}, {m.device.name}\n\n{KERNEL_HEADER}")
        for line in format_kernels(m):
            typer.echo(line)
    if asm:
        for k in m.kernels:
            for report in k.loops.loops if k.loops is not None else ():
                if (report.share or 0) >= HOT:
                    typer.echo(f"\n{k.symbol}, {m.device.name}: {report.text()}")
                    typer.echo("\n".join(f"    {line}" for line in report.code))


def main(
    model: Annotated[list[str] | None, typer.Option(help="network, or a part of its name")] = None,
    spec: Annotated[list[str] | None, typer.Option(help='kernel, e.g. "Conv2D(1, 196, 96, 576)"')] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="fp32, fp16, int8; default those the core computes in, a kernel's own type")
    ] = None,
    device: Annotated[list[str] | None, typer.Option(help=f"cores; default {', '.join(DEVICES)}")] = None,
    layers: Annotated[bool, typer.Option(help="a line for each kernel, with its hot loop in llvm-mca")] = False,
    asm: Annotated[bool, typer.Option(help="print the instructions of the hot loops")] = False,
    save: Annotated[Path | None, typer.Option(help="also write everything as JSON lines")] = None,
) -> None:
    """Count and print."""
    try:
        results = []
        devices = [load_device(name) for name in device or DEVICES]
        for d in devices:
            if not d.triple.startswith("aarch64") or d.runner == "native":
                raise EdgecError("is no emulated 64-bit Arm core", where=f"--device {d.name}")
        for k in kind or ():
            if k not in PASSES:
                raise EdgecError("is no type", where=f"--kind {k}", hint=f"use {' or '.join(PASSES)}")
        if not model and not spec:
            raise EdgecError("nothing to measure", where="benchmark", hint="give --model or --spec")
        if (layers or asm or spec) and loops.mca() is None:
            typer.echo("llvm-mca 19 is not installed, so there are no cycles: apt-get install llvm-19", err=True)
        typer.echo(HEADER)
        for m in _measurements(model or [], spec or [], kind, devices, layers or asm):
            typer.echo(format_row(m))
            results.append(m)
        for m in results:
            show(m, layers or m.model.endswith(")"), asm)
        if save is not None:
            save.write_text("".join(json.dumps(m.to_json()) + "\n" for m in results))
    except EdgecError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


def _measurements(
    models: Sequence[str], specs: Sequence[str], kinds: Sequence[str] | None, devices: Sequence[Device], inspect: bool
) -> Iterator[Measurement]:
    for name in models:
        program, data = load(name)
        for kind in kinds or PASSES:
            for d in devices:
                if kinds is None and kind == "fp16" and not d.has_fp16:
                    continue
                yield measure(prepare(program, data, kind, d), kind, d, inspect)
    for text in specs:
        spec = parse_spec(text)
        for kind in kinds or [kind_of(spec)]:
            for d in devices:
                yield measure_kernel(with_kind(spec, kind), d)


if __name__ == "__main__":
    typer.run(main)
