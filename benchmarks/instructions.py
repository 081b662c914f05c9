"""Sizes and instructions of one inference, as a table: what the generated code costs, whatever else the machine does.

    python -m benchmarks.instructions [MODEL ...]

Instructions are counted by valgrind (callgrind) around the call of the model, so the same code always gives the same
number. The code is compiled for x86-64-v3 on every machine, because valgrind knows no AVX-512. `digits` is the model of
the demo; other names are the shared models of `benchmarks/models.py`.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.models import CASES, shared_folder
from benchmarks.results import PASSES
from edgec.bundle import Bundle, build_bundle
from edgec.data import Dataset, Preprocess, load_data
from edgec.errors import EdgecError, ToolchainMissing
from edgec.frontend import load_model
from edgec.lowering.lower import lower
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program
from edgec.targets.device import Device, load_device

DEFAULT = ("digits", "mlperftiny_kws_dscnn", "mlperftiny_ic_resnet8", "cifar10_resnet20")
CALIBRATION_SAMPLES = 64


def machine() -> Device:
    """The host, held to instructions that valgrind knows."""
    return dataclasses.replace(load_device("host"), mcpu="x86-64-v3", features=(), vector_bytes=32, registers=16)


def load(name: str) -> tuple[Program, Dataset]:
    """A model and its calibration data. Raises EdgecError for a name that is not there."""
    if name == "digits":
        from edgec.demo import model, training_data

        network, example = model()
        program = load_model(network, input_shape=tuple(example.shape), name=name)
        return program, load_data(training_data(), program.inputs)
    cases = {case.model: case for case in CASES}
    shared = shared_folder()
    if name not in cases or cases[name].data is None:
        raise EdgecError("is not a model with calibration data", where=name, hint=f"use digits or {', '.join(cases)}")
    case = cases[name]
    program = load_model(case.path(shared))
    preprocess = Preprocess(case.mean, case.std, case.input_scale)
    return program, load_data(case.source(shared, case.data), program.inputs, preprocess)


def instructions(bundle: Bundle) -> int:
    """Instructions of one call of the model. Raises ToolchainMissing without valgrind."""
    if shutil.which("valgrind") is None:
        raise ToolchainMissing("'valgrind' is not installed", where="benchmark", hint="apt-get install valgrind")
    name, root = bundle.name, bundle.path.absolute()
    with tempfile.TemporaryDirectory() as folder:
        build = ["cc", "-O1", f"-I{root}/include", f"{root}/src/example.c", f"{root}/lib/lib{name}.a", "-lm"]
        subprocess.run([*build, "-o", "example"], cwd=folder, check=True, capture_output=True)
        count = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", f"--toggle-collect={name}_run"]
        done = subprocess.run([*count, "./example"], cwd=folder, check=True, capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None or int(found[1]) == 0:
        raise EdgecError("counted nothing", where=name, hint="look at what valgrind prints for src/example.c")
    return int(found[1])


def row(program: Program, calibration: Dataset, kind: str) -> str:
    """A line of the table."""
    device = machine()
    context = Context(device=device, calibration=calibration.limit(CALIBRATION_SAMPLES))
    for step in Pipeline.parse(PASSES[kind]):
        program = step.run(program, context)
    with tempfile.TemporaryDirectory() as folder:
        bundle = build_bundle(lower(program, device), device, Path(folder) / "bundle")
        m, count = bundle.manifest, instructions(bundle)
    per_mac = count / m["macs"]
    sizes = f"{m['weight_bytes']:,} | {m['code_bytes']:,} | {m['arena_bytes']:,}"
    return f"| {program.name} | {kind} | {m['macs']:,} | {count:,} | {per_mac:.3f} | {sizes} |"


def main(names: list[str]) -> int:
    """Print the table."""
    print("| model | type | MACs | instructions | per MAC | weights, bytes | code, bytes | arena, bytes |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names or DEFAULT:
        if not names and name != "digits" and not shared_folder().is_dir():
            continue
        try:
            program, calibration = load(name)
            for kind in PASSES:
                print(row(program, calibration, kind), flush=True)
        except EdgecError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
