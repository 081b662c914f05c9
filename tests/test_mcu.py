"""Microcontroller bundles: whole networks as C, their memory, their budgets, and the layouts that users build with."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgec.budget import Budget, parse_size
from edgec.bundle import Bundle, build_bundle, load_bundle
from edgec.cli import main
from edgec.compile import arithmetic, relative_error
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.lowering.lower import lower, stage
from edgec.passbase import Context
from edgec.pipeline import Pipeline
from edgec.program import Program
from edgec.registry import get_device
from edgec.targets.cpu.emit import SelfTest
from edgec.targets.device import load_device
from edgec.targets.mcu.emit import emit
from tests import zoo

M4 = load_device("cortex-m4")
STRICT = ["cc", "-std=c99", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def quantised(name: str) -> Program:
    """A model of the zoo in int8, as a Cortex-M4 rounds."""
    program = zoo.program(name)
    context = Context(calibration=zoo.calibration(name), device=M4)
    for step in Pipeline.parse("fold-bn, quantize-int8").passes:
        program = step.run(program, context)
    return program


def sources(program: Program, folder: Path, selftest: bool = True) -> Path:
    """The generated files of a program for a Cortex-M4 in a folder."""
    lowered = lower(program, M4)
    test = None
    if selftest:
        given = [np.zeros(p.shape, p.dtype) for p in lowered.plan.inputs]
        wanted = [np.zeros(p.shape, p.dtype) for p in lowered.plan.outputs]
        test = SelfTest(given, wanted, 1.0)
    for place, data in emit(lowered.plan, lowered.kernels, M4, test, "0").items():  # type: ignore[arg-type]
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    return folder


def bundle_of(program: Program, folder: Path) -> Bundle:
    """A bundle without a program for QEMU, so that tests need no cross compiler."""
    from edgec.bundle import _manifest

    lowered = lower(program, M4)
    for place, data in emit(lowered.plan, lowered.kernels, M4, None, "0").items():  # type: ignore[arg-type]
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    return Bundle(folder, _manifest(lowered.plan, M4, None, None, folder, {"flash_bytes": 0, "code_bytes": 0}))


# -- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_generated_c_gives_what_the_program_gives(name: str, kind: str, tmp_path: Path):
    program = zoo.program(name) if kind == "float" else quantised(name)
    bundle = bundle_of(program, tmp_path)
    done = subprocess.run(
        [*STRICT, "-c", f"src/{bundle.name}.c", "-o", "model.o"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    x = zoo.example(name, batch=3)
    got = bundle.run(x.numpy())
    got = got if isinstance(got, tuple) else (got,)
    for a, b in zip(got, program(x), strict=True):
        if arithmetic(program) == "integer":
            assert np.array_equal(a, b.numpy())
        else:
            # A code beside a rounding boundary may differ after a float island.
            assert relative_error(a, b.numpy()) < (1e-4 if kind == "float" else 0.1)


@pytest.mark.qemu("cortex-m4")
def test_the_board_gives_the_same_bits(tmp_path: Path):
    program = quantised("residual")
    bundle = build_bundle(lower(program, M4), M4, tmp_path / "out")
    x = zoo.example("residual", batch=4)
    here = bundle.run(x.numpy())
    bundle.use_board()
    assert bundle.runner == "qemu-system-arm"
    assert np.array_equal(bundle.run(x.numpy()), here)
    measured = bundle.measure(x[:1].numpy())
    assert len(measured.steps) == len(bundle.manifest["steps"])
    assert 0.9 * measured.instructions < sum(measured.steps) <= measured.instructions
    assert measured.arena_bytes <= bundle.manifest["arena_bytes"]
    assert bundle.manifest["weight_bytes"] < bundle.manifest["flash_bytes"] < bundle.manifest["weight_bytes"] + 20_000


@pytest.mark.qemu("cortex-m4")
def test_equal_programs_give_equal_bytes(tmp_path: Path):
    program = quantised("residual")
    folders = [tmp_path / "a", tmp_path / "somewhere" / "else"]
    for folder in folders:
        build_bundle(lower(program, M4), M4, folder)
    first, second = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert first.keys() == second.keys()
    assert [k for k in first if first[k] != second[k]] == []


# -- inputs and outputs ------------------------------------------------------------------------------------------------


def test_codes_and_channels_last_become_the_callers():
    program = quantised("residual")
    staged, forms = stage(program, M4)
    (spec,) = staged.inputs
    n, c, h, w = program.inputs[0].shape
    assert (spec.shape, spec.dtype) == ((n, h, w, c), "int8")
    form = forms[spec.name]
    assert form.axes == (0, 2, 3, 1) and form.scale is not None
    x = zoo.example("residual", batch=1)
    codes = form.to_device(x.numpy())
    assert codes.dtype == np.int8 and codes.shape == spec.shape
    back = form.to_model(codes)
    assert np.abs(back - np.clip(x.numpy(), back.min(), back.max())).max() <= form.scale / 2 + 1e-6


def test_float_networks_take_and_give_floats():
    staged, forms = stage(zoo.program("residual"), M4)
    assert staged.inputs[0].dtype == "float32"
    assert all(f.scale is None for f in forms.values())


def test_an_input_with_two_readers_stays_as_it_is():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + x.mean((1, 2, 3), keepdim=True)

    program = load_model(Twice().eval(), input_shape=(1, 4, 6, 6))
    staged, forms = stage(program, M4)
    assert staged.inputs[0].shape == (1, 4, 6, 6) and "x" not in forms


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("320KiB", 327_680), ("80kB", 80_000), ("1MiB", 1 << 20), ("4096", 4096), ("0.5 MiB", 1 << 19)]
)
def test_sizes(text: str, size: int):
    assert parse_size(text, "--sram") == size


@pytest.mark.parametrize("text", ["", "KiB", "12 parsecs", "-3", "0"])
def test_sizes_that_are_none(text: str):
    with pytest.raises(EdgecError, match="is not a size"):
        parse_size(text, "--sram")


def test_a_board_has_its_memory_and_options_go_before_it():
    board = get_device("stm32f746-disco")
    assert Budget.of(board, None, None, False, False) == Budget(320 << 10, 1 << 20)
    assert Budget.of(board, "64KiB", None, True, True) == Budget(64 << 10, 1 << 20, True, True)
    assert Budget.of(M4, None, None, False, False) == Budget()
    with pytest.raises(EdgecError, match="nothing to fit into"):
        Budget.of(M4, None, None, True, False)
    with pytest.raises(EdgecError, match=r"--sram: is for microcontrollers"):
        Budget.of(load_device("cortex-a72"), "1MiB", None, False, False)


class Tall(nn.Module):
    """A stem that needs ten times the memory of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model file, data file)."""
    folder = tmp_path_factory.mktemp("tall")
    torch.manual_seed(0)
    program = load_model(Tall().eval(), input_shape=(1, 3, 32, 32), name="tall")
    program.save(folder / "tall.pt2")
    samples = np.random.default_rng(0).normal(size=(32, 3, 32, 32)).astype(np.float32)
    np.savez(folder / "data.npz", images=samples)
    return str(folder / "tall.pt2"), str(folder / "data.npz")


def compiled(tall: tuple[str, str], output: Path, *options: str) -> tuple[int, str]:
    """(exit status, all that was printed) of a command line."""
    arguments = ["compile", tall[0], "--data", tall[1], "--passes", "quantize-int8", "-o", str(output), *options]
    return called(*arguments)


def called(*arguments: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue() + err.getvalue()


@pytest.mark.qemu("cortex-m4")
def test_a_model_that_does_not_fit_is_not_compiled(tall: tuple[str, str], tmp_path: Path):
    code, text = compiled(tall, tmp_path / "out", "--target", "cortex-m4", "--sram", "10KiB", "--external-io")
    text = " ".join(text.split())
    assert code == 2 and not (tmp_path / "out").exists()
    assert "may take 9,216" in text and "layers.0 8,192" in text and "--fit makes it fit" in text
    assert "Traceback" not in text


@pytest.mark.qemu("cortex-m4")
def test_fit_makes_it_fit_with_the_same_bits(tall: tuple[str, str], tmp_path: Path):
    options = ("--target", "cortex-m4", "--external-io")
    assert compiled(tall, tmp_path / "whole", *options)[0] == 0
    code, text = compiled(tall, tmp_path / "fitted", *options, "--sram", "8KiB", "--fit")
    assert code == 0, text
    whole, fitted = load_bundle(tmp_path / "whole"), load_bundle(tmp_path / "fitted")
    assert fitted.manifest["arena_bytes"] <= 8192 - 1024 < whole.manifest["arena_bytes"]
    x = np.random.default_rng(1).normal(size=(4, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(whole.run(x), fitted.run(x))
    skipped = json.loads((tmp_path / "fitted" / "report.json").read_text())["skipped"]
    assert any(s["what"] == "fitted" for s in skipped)


@pytest.mark.qemu("cortex-m4")
def test_weights_that_exceed_the_flash_are_refused(tall: tuple[str, str], tmp_path: Path):
    code, text = compiled(tall, tmp_path / "out", "--target", "cortex-m4", "--flash", "1KiB")
    assert code == 2 and "exceed 1,024" in text and not (tmp_path / "out").exists()


def test_options_of_other_targets_are_refused(tall: tuple[str, str], tmp_path: Path):
    code, text = compiled(tall, tmp_path / "out", "--target", "cortex-m4", "--threads", "2")
    assert code == 2 and "--threads: cortex-m4 has one thread" in " ".join(text.split())
    code, text = called("tune", tall[0], "--target", "cortex-m4")
    assert code == 2 and "has no register tiles to tune" in text


# -- what users do with the folder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tall: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled bundle."""
    output = tmp_path_factory.mktemp("made") / "out"
    code, text = compiled(tall, output, "--target", "nrf52840")
    assert code == 0, text
    return output


@pytest.mark.qemu("cortex-m4")
def test_the_report_has_what_the_chip_needs(made: Path):
    device = json.loads((made / "report.json").read_text())["device"]
    manifest = json.loads((made / "manifest.json").read_text())
    assert device["machine"] == "mps2-an386" and device["board_samples"] == 32 and device["board_bit_exact"]
    assert device["bit_exact"] and device["instructions"] > 0 and 0 < device["stack_bytes"] < 1024
    assert device["instructions_per_mac"] == device["instructions"] / manifest["macs"]
    assert device["flash_bytes"] == manifest["flash_bytes"]
    assert "per MAC" in (made / "report.html").read_text()


@pytest.mark.qemu("cortex-m4")
def test_run_on_the_board_counts_by_layer(made: Path, tall: tuple[str, str]):
    code, text = called("run", str(made), "--eval", tall[1], "--on-board", "--samples", "4")
    assert code == 0 and "layers.0" in text and "instructions an inference" in text
    plain = json.loads(called("run", str(made), "--eval", tall[1], "--on-board", "--json")[1])
    assert sum(row["instructions"] for row in plain["layers"]) <= plain["instructions"]
    assert "(native)" in called("run", str(made), "--eval", tall[1])[1]
    assert "self-test passed" in called("run", str(made))[1]


@pytest.mark.qemu("cortex-m4")
def test_make_builds_a_library_for_the_chip(made: Path, tmp_path: Path):
    folder = shutil.copytree(made, tmp_path / "copy")
    subprocess.run(["make"], cwd=folder, check=True, capture_output=True)
    symbols = subprocess.run(["arm-none-eabi-nm", "libtall.a"], cwd=folder, check=True, capture_output=True, text=True)
    # Nothing but memory functions is taken from elsewhere, and nothing else is offered.
    assert set(re.findall(r" U (\w+)", symbols.stdout)) <= {"memcpy", "memset", "memcmp", "tall_run"}
    assert set(re.findall(r" T (\w+)", symbols.stdout)) == {"tall_run", "tall_selftest"}


@pytest.mark.qemu("cortex-m4")
@pytest.mark.host
def test_the_example_passes_its_self_test_here(made: Path, tmp_path: Path):
    folder = shutil.copytree(made, tmp_path / "copy")
    subprocess.run(["make", "example"], cwd=folder, check=True, capture_output=True)
    done = subprocess.run(["./tall_example"], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout == "self-test: ok\n"


@pytest.mark.qemu("cortex-m4")
@pytest.mark.host
def test_a_static_arena_stands_for_null(made: Path, tmp_path: Path):
    program = (
        '#include "tall.h"\n#include <stdio.h>\n'
        "int main(void) { static int8_t x[TALL_X_SIZE]; static float y[TALL_Y_SIZE];\n"
        'printf("%d\\n", tall_run(x, y, NULL)); return 0; }\n'
    )
    (tmp_path / "main.c").write_text(program)
    for flags, status in (["-DTALL_STATIC_ARENA"], "0"), ([], "-1"):
        command = [*STRICT, *flags, f"-I{made}/src", "main.c", f"{made}/src/tall.c", "-o", "main", "-lm"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert (
            subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
            == status
        )


@pytest.mark.qemu("cortex-m4")
@pytest.mark.host
def test_cmake_builds_it_as_a_subfolder(made: Path, tmp_path: Path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed (apt-get install cmake)")
    shutil.copytree(made, tmp_path / "tall")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(app C)\nadd_subdirectory(tall)\n"
        "add_executable(app tall/example/main.c)\ntarget_link_libraries(app tall)\n"
    )
    subprocess.run(["cmake", "-B", "build", "-S", "."], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", "build"], cwd=tmp_path, check=True, capture_output=True)
    assert subprocess.run(["build/app"], cwd=tmp_path, check=True, capture_output=True).stdout == b"self-test: ok\n"


@pytest.mark.host
def test_an_arduino_library_and_a_zephyr_module(tmp_path: Path):
    folder = sources(quantised("residual"), tmp_path)
    properties = dict(line.split("=", 1) for line in (folder / "library.properties").read_text().splitlines())
    assert properties["name"] == "residual" and properties["includes"] == "residual.h"
    assert not list((folder / "src").glob("main*"))
    module = dict(re.findall(r"^ *(\w+): (\S+)$", (folder / "zephyr" / "module.yml").read_text(), re.M))
    assert (folder / module["cmake"] / "CMakeLists.txt").is_file()
    assert "config RESIDUAL" in (folder / module["kconfig"]).read_text()
