"""The benchmark programs run, and count the same twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import aarch64, instructions
from edgec.errors import EdgecError
from edgec.targets import loops
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D

pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed (apt-get install valgrind)")
def test_instruction_counts(capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for _ in range(2):
        assert instructions.main(["digits"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[0].splitlines()[2:]]
    assert [row[1] for row in rows] == ["fp32", "int8"]
    assert all(int(cell.replace(",", "")) > 1000 for row in rows for cell in (row[2], row[3], *row[5:]))


@pytest.mark.pure
def test_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions.main(["resnet1000"]) == 2
    assert capsys.readouterr().err.startswith("error: resnet1000: is not a model with calibration data; use digits or ")


def arm(*arguments: str) -> tuple[int, str]:
    """Exit status and output of benchmarks.aarch64."""
    app = typer.Typer()
    app.command()(aarch64.main)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


@pytest.mark.qemu("cortex-a72")
def test_a_kernel_on_arm_cores(tmp_path: Path) -> None:
    save = tmp_path / "kernels.json"
    spec = "Conv2D(1, 24, 16, 32)"
    status, text = arm("--spec", spec, "--kind", "fp32", "--kind", "int8", "--asm", "--save", str(save))
    assert status == 0, text
    rows = [json.loads(line) for line in save.read_text().splitlines()]
    assert [(r["kind"], r["device"]) for r in rows] == [
        ("fp32", "cortex-a72"),
        ("fp32", "neoverse-n1"),
        ("int8", "cortex-a72"),
        ("int8", "neoverse-n1"),
    ]
    for row in rows:
        kernel = next(k for k in row["kernels"] if k["symbol"] == "kernel_conv2d")
        hot = kernel["loops"][0]
        assert row["macs"] == kernel["macs"] == 24 * 16 * 32
        assert row["instructions"] >= kernel["instructions"] > row["macs"] / 32
        # The loop runs as often as its MACs need, tails aside, and takes a good part of the kernel.
        assert 0.4 * row["macs"] < hot["macs"] * hot["iterations"] <= 1.5 * row["macs"]
        assert 0.4 < hot["share"] <= 1 and hot["instructions"] == len(hot["code"])
        assert (hot["kind"], hot["is_loop"]) == ({"fp32": "float32", "int8": "int8"}[row["kind"]], True)
        assert (row["cycles"] is None) == (loops.mca() is None)
        assert f"{row['instructions']:,}" in text and hot["code"][0] in text


@pytest.mark.qemu("cortex-a72")
@pytest.mark.slow
def test_a_network_on_arm_cores(tmp_path: Path) -> None:
    saved = []
    for _ in range(2):
        save = tmp_path / "digits.json"
        status, text = arm("--model", "digits", "--device", "cortex-a72", "--layers", "--save", str(save))
        assert status == 0, text
        saved.append(save.read_text())
    assert saved[0] == saved[1]
    rows = [json.loads(line) for line in saved[0].splitlines()]
    assert [row["kind"] for row in rows] == ["fp32", "int8"]
    for row in rows:
        kernels = row["kernels"]
        assert sum(k["instructions"] * max(1, len(k["layers"])) for k in kernels) == pytest.approx(row["instructions"])
        assert sum(k["macs"] * len(k["layers"]) for k in kernels) == row["macs"]
        assert {"stem", "classifier"} <= {layer for k in kernels for layer in k["layers"]}
        assert all("loops" in k for k in kernels if k["layers"])


@pytest.mark.pure
def test_kernel_expressions() -> None:
    spec = aarch64.parse_spec('Conv2D(1, 8, 3, 4, dtype="int8", epilogue=Epilogue(lo=-128, hi=127, y_zp=-3))')
    assert spec == Conv2D(1, 8, 3, 4, dtype="int8", epilogue=Epilogue(lo=-128, hi=127, y_zp=-3))
    assert aarch64.parse_spec(aarch64.text_of(spec)) == spec
    assert aarch64.parse_spec("Conv2D(1, 8, 3, 4, epilogue=Epilogue('clip', 0, inf))").epilogue.hi == float("inf")
    changed = aarch64.with_kind(Conv2D(1, 8, 3, 4), "int8")
    assert (changed.dtype, changed.epilogue.lo, changed.epilogue.hi) == ("int8", -128, 127)
    for text in ("Conv2D(", "Epilogue()", "__import__('os')", "Conv2D(1)", "3"):
        with pytest.raises(EdgecError, match=re.escape(f"--spec '{text}': is no kernel: ")):
            aarch64.parse_spec(text)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: benchmark: nothing to measure"),
        (["--model", "resnet1000"], "error: --model resnet1000: is not a model"),
        (["--model", "mobilenet"], "error: --model mobilenet: could be imagenet_mobilenetv1"),
        (["--spec", "Conv2D(1, 8, 8, 8)", "--device", "host"], "error: --device host: is no emulated 64-bit Arm core"),
        (["--spec", "Conv2D(1, 8, 8, 8)", "--device", "cortex-a7"], "error: --device cortex-a7: is no emulated"),
        (["--spec", "Conv2D(1, 8, 8, 8)", "--kind", "int4"], "error: --kind int4: is no type"),
    ],
)
def test_errors_of_the_arm_benchmark(arguments: list[str], message: str) -> None:
    status, text = arm(*arguments)
    assert status == 2 and message in text and "Traceback" not in text
