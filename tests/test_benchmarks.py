"""The benchmark programs run, count the same twice, and say the right thing about their figures."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import aarch64, cpu, instructions, layers, peers, sparse, timing, timm_models
from edgec.errors import EdgecError
from edgec.targets import loops, sparsity
from edgec.targets.device import load_device
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


# -- speed beside other engines ----------------------------------------------------------------------------------------


@pytest.mark.pure
def test_ratios_are_to_the_fastest_peer() -> None:
    times = {"edgec": 1.0, "slow": 4.0, "fast": 2.0, "broken": 0.5}
    assert timing.ratios(times, ["slow", "fast"]) == {"edgec": 0.5, "slow": 2.0, "fast": 1.0, "broken": 0.25}
    assert timing.ratios(times, []) == {}
    assert cpu.works({}) and cpu.works({"agreement": None}) and cpu.works({"agreement": 0.5})
    assert not cpu.works({"agreement": 0.49})


@pytest.mark.pure
def test_medians_of_the_rounds() -> None:
    found = timing.Timing.of([4e-6, 1e-6, 2e-6, 3e-6, 100e-6], [5e-6, 6e-6, 7e-6, 8e-6, 9e-6], 10)
    assert (found.cpu, found.cpu_min, found.wall, found.wall_min) == pytest.approx((3, 1, 7, 5))
    assert found.spread == pytest.approx((52 - 1.5) / 3)
    assert timing.Timing.of([2e-6], [3e-6], 1).spread == 0


@pytest.mark.pure
def test_contestants_take_turns() -> None:
    """Each once before its turn and so often in it; another begins every round."""
    called: list[str] = []
    found = timing.measure({name: lambda name=name: called.append(name) for name in "abc"}, rounds=3, burst=0.0)
    assert [(t.calls, t.rounds) for t in found.values()] == [(1, 3)] * 3
    turns = "".join(called)[9:]
    assert turns == "aabbcc" + "bbccaa" + "ccaabb"


@pytest.mark.pure
def test_rows_of_the_table() -> None:
    time = timing.Timing.of([2e-3, 2e-3], [3e-3, 3e-3], 1)
    full = cpu.Row("net", "int8", "edgec", None, time, 0.5, "top1", 0.875, "fraction", 0.96)
    assert full.cells() == ["net", "int8", "edgec", "2.000", "2.000", "3.000", "0.50", "top1", "87.5 %", "96.0 %"]
    decibels = cpu.Row("net", "fp32", "edgec", None, time, None, "psnr", 38.447, "dB")
    assert decibels.cells()[6:] == ["", "psnr", "38.45 dB", ""]
    absent = cpu.Row("net", "fp32", "peer", absent="not installed").cells()
    assert absent[:4] == ["net", "fp32", "peer", "absent: not installed"] and len(absent) == len(cpu.HEADER)
    assert timing.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


@pytest.mark.pure
def test_layers_against_the_machine() -> None:
    peak = layers.Peak(fp32=100.0, int8=400.0, memory=10.0)
    busy = layers.Layer("conv", "conv2d_i8", "int8", 10**8, 1000.0, 10**6)
    assert (busy.rate, busy.bandwidth, busy.intensity) == pytest.approx((200, 1, 200))
    assert busy.cells(peak) == ["conv", "conv2d_i8", "100.00", "1000.0", "200.0", "50", "1000", "1.0", "compute"]
    move = layers.Layer("", "transpose", "fp32", 0, 2.0, 4000)
    assert move.cells(peak) == ["-", "transpose", "", "2.0", "", "", "4", "2.0", "memory"]
    assert layers.totals([busy, busy, move]) == {"conv2d": (2, 2000.0), "transpose": (1, 2.0)}
    assert (
        layers.table([busy, move], peak).splitlines()[-1].startswith("| all | 2 calls | 100.00 | 1002.0 | 199.6 | 50")
    )


@pytest.mark.pure
def test_cores() -> None:
    assert cpu.chosen_cores(1, 0) == (0,)
    with pytest.raises(EdgecError, match=r"--core -1: the machine has cores 0 to"):
        cpu.chosen_cores(1, -1)
    with pytest.raises(EdgecError, match=r"--threads 2: there are 1 cores up to core 0"):
        cpu.chosen_cores(2, 0)


def command(*arguments: str) -> tuple[int, str]:
    """Exit status and what `python -m benchmarks.cpu` prints."""
    import typer

    app = typer.Typer()
    app.command()(cpu.main)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


@pytest.mark.pure
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet1000"), "error: --model: 'resnet1000' is not known; use digits, mobilenetv2_100, "),
        (("--kind", "int4"), "error: --kind: 'int4' is not known; use fp32, int8\n"),
        (("--peers", "tensorrt"), "error: --peers: 'tensorrt' is not known; use onnxruntime, "),
        (("--threads", "100000"), "error: --threads 100000: there are "),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    status, text = command(*arguments)
    assert status == 2 and text.startswith(message) and text.count("\n") == 1


@pytest.mark.pure
def test_a_missing_engine_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("openvino", "timm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peers.Absent, match=r"^openvino cannot be imported: "):
        peers.OpenVino().version()
    with pytest.raises(EdgecError, match=r"timm: cannot be imported .*; make peers"):
        timm_models.load("resnet18")


@pytest.mark.pure
def test_what_was_made_is_kept(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("model")
        path.with_name("weights").write_text("more")

    first = peers.cached(tmp_path, ("a", 1), ".onnx", make)
    assert peers.cached(tmp_path, ("a", 1), ".onnx", make) == first and len(made) == 1
    assert first.with_name("weights").read_text() == "more"
    assert peers.cached(tmp_path, ("a", 2), ".onnx", make) != first and len(made) == 2

    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError("no\nsuch  thing")

    with pytest.raises(peers.Absent, match=r"^ValueError: no such thing$"):
        peers.cached(tmp_path, ("b",), ".onnx", fail)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.host
def test_speed_of_the_demo_alone(tmp_path: Path) -> None:
    save = tmp_path / "speed.json"
    status, text = command("--model", "digits", "--peers", "", "--rounds", "3", "--core", "0", "--save", str(save))
    assert status == 0, text
    saved = json.loads(save.read_text())
    assert saved["machine"]["versions"].keys() == {"edgec"} and saved["machine"]["cores"] == [0]
    assert [(r["model"], r["kind"], r["contestant"], r["ratio"]) for r in saved["rows"]] == [
        ("digits", "fp32", "edgec", None),
        ("digits", "int8", "edgec", None),
    ]
    for row in saved["rows"]:
        assert 0 < row["timing"]["cpu_min"] <= row["timing"]["cpu"] < 10_000
        assert row["value"] > 0.95 and row["agreement"] > 0.98
    assert len(re.findall(r"^\| digits \| (?:fp32|int8) \| edgec \| 0\.\d{3} \|", text, re.M)) == 2


@pytest.mark.host
def test_layer_times_of_the_demo() -> None:
    """Every call of the plan is timed, and together they take what the model takes."""
    subject = cpu.load_subject("digits")
    inputs = subject.calibration.read(slice(0, 1))[0]
    with layers.compiled(cpu.transformed(subject, "fold-bn")) as hooked:
        calls = layers.profile(hooked, inputs, runs=5)
    assert [call.layer for call in calls[:2]] == ["stem", "block1.depthwise"]
    assert sum(call.macs for call in calls) == hooked.bundle.manifest["macs"] > 0
    assert all(0 <= call.us < 10_000 and call.nbytes > 0 for call in calls) and sum(call.us for call in calls) > 0


@pytest.mark.qemu("cortex-a72")
def test_sparse_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny case from the count to the table that the compiler reads."""
    monkeypatch.setattr(sparse, "SHAPES", {"1x1": Conv2D(1, 24, 16, 32)})
    monkeypatch.setattr(sparse, "DENSITIES", (1.0, 0.25))
    monkeypatch.setattr(sparse, "blocks", lambda device, dtype: [(16, 1)])
    monkeypatch.setattr(sparse.measure_kernels, "__defaults__", (sparse.DENSITIES, sparse.SHAPES))
    table = tmp_path / "sparsity.toml"
    table.write_text(Path(sparsity.__file__).with_name("sparsity.toml").read_text())
    save = tmp_path / "points.json"
    arguments = ["kernels", "--device", "cortex-a72", "--dtype", "float32", "--save", str(save), "--table", str(table)]
    assert sparse.main(arguments) == 0
    dense, quarter = json.loads(save.read_text())
    assert dense["unit"] == "instructions" and quarter["ratio"] < 0.6 < dense["ratio"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| cortex-a72 | float32 | 16x1 | 1x1 |" in line
    written = {tuple(s["devices"]): s for s in tomllib.loads(table.read_text())["kernel"]}
    section = written["cortex-a53", "cortex-a72"]
    row = next(r for r in section["rows"] if r["dtype"] == "float32")
    assert f"{row['break_even']:.2f} |" in line and 0.25 < row["break_even"] <= 1
    # The rows of the other type, and the other devices, are those of before.
    assert any(r["dtype"] == "int8" for r in section["rows"]) and "int8" in section["best"]
    assert ("cortex-x2",) in written


@pytest.mark.pure
def test_break_even() -> None:
    def line(*ratios: float) -> list[sparse.Point]:
        found = zip((1.0, 0.5, 0.25), ratios, strict=True)
        return [sparse.Point("d", "float32", (16, 1), "1x1", d, 1.0, r, "us") for d, r in found]

    assert sparse.break_even(line(1.5, 0.75, 0.4)) == 0.67
    assert sparse.break_even(line(0.98, 0.5, 0.3)) == 1.0
    assert sparse.break_even(line(3.0, 2.0, 1.2)) is None


@pytest.mark.host
def test_a_sparse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits network prunes, compiles and runs on this machine; its table says what it is."""
    monkeypatch.setattr(sparse, "ROUNDS", 2)
    device = load_device("host")
    if sparsity.best_block(device, "float32") is None:
        pytest.skip("nothing is known of block-sparse kernels on this machine")
    row = sparse.network("digits", "fp32", device, (0.5,))
    assert row["unit"] == "ms" and row["cost"]["1.0"] > 0 and set(row["speedup"]) == {"0.5"}
    assert "| digits | fp32 |" in sparse.network_table([row])
