"""Cells of benchmarks.gpu: crashes are rows, finished ones are kept; what its tables say."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from edgec.errors import EdgecError

pytestmark = pytest.mark.pure


def counted(file: str) -> gpu.Cell:
    with Path(file).open("a") as log:
        log.write("x")
    return {"value": 1.5}


def refused(file: str) -> gpu.Cell:
    counted(file)
    raise EdgecError("cannot", where="here")


def wrong(file: str) -> gpu.Cell:
    counted(file)
    raise ValueError("oops")


def killed(file: str) -> gpu.Cell:
    counted(file)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def slow(file: str) -> gpu.Cell:
    counted(file)
    time.sleep(60)
    return {}


@pytest.mark.parametrize(
    ("measured", "limit", "wanted", "times"),
    [
        (counted, 30, {"value": 1.5}, 1),
        (refused, 30, {"error": "here: cannot"}, 1),
        (wrong, 30, {"error": "ValueError: oops"}, 2),
        (killed, 30, {"error": "ended with status -9"}, 2),
        (slow, 1, {"error": "not done after 1 s, in slow of test_benchmarks_gpu.py"}, 2),
    ],
)
def test_a_cell_is_kept_when_it_is_finished(
    measured: Any, limit: float, wanted: gpu.Cell, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = tmp_path / "log"
    for _ in range(2):
        assert gpu.cell(measured, {"file": str(log)}, limit, "digest") == wanted
    assert len(log.read_text()) == times
    gpu.cell(measured, {"file": str(log)}, limit, "other sources")
    assert len(log.read_text()) == times + 1


def test_compiled_code_of_drivers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = dict(os.environ)
    found = gpu.cell(environment, {}, 30, "")
    assert found["POCL_CACHE_DIR"] != here.get("POCL_CACHE_DIR") and found["MESA_SHADER_CACHE_DISABLE"] == "true"
    assert dict(os.environ) == here


def environment() -> gpu.Cell:
    return {name: os.environ[name] for name in ("POCL_CACHE_DIR", "MESA_SHADER_CACHE_DISABLE")}


def test_what_bounds_a_step() -> None:
    step = {"op": "conv", "layer": "a|b", "macs": 1_000_000, "bytes": 100_000, "launches": 1}
    # 2 M operations at 10 GFLOP/s are 200 us, 100 kB at 1 GB/s are 100 us.
    assert gpu.roofline_row(step, 10, 1) == ["conv: a/b", "1", "1.00", "97.7", "20.00", "arithmetic", "200.0"]
    assert gpu.roofline_row(step, 100, 1)[5:] == ["memory", "100.0"]
    assert gpu.roofline_row(step, 0, 1)[4:] == ["20.00", "", ""]


def test_what_is_moved() -> None:
    """In place is read and written; further variants are not made; Winograd's way multiplies less."""
    sizes = (100, 20, 30)
    launches = [(0, 0, [0, 1, 2, 2]), (0, 1, [0, 1, 2]), (1, 0, [0, 1]), (1, 0, [1, 2]), (1, 0, [2, 0])]
    plan = {
        "buffers": [{"bytes": n} for n in sizes],
        "steps": [{"layer": name, "op": "conv2d", "macs": 9000} for name in ("a", "b")],
        "launches": [{"step": s, "variant": v, "args": args} for s, v, args in launches],
    }
    first, second = gpu.moved(plan, {"a": 4000, "b": 4000})
    assert (first["bytes"], first["launches"], first["macs"]) == (180, 1, 9000)
    assert (second["bytes"], second["launches"], second["macs"]) == (300, 3, 4000)


def test_signal_to_noise() -> None:
    want = np.array([3.0, 4.0], np.float32)
    assert gpu._sqnr(want, want) == 999
    assert gpu._sqnr(want + np.float32(0.25), want) == pytest.approx(10 * np.log10(25 / 0.125))


def test_a_wrong_result_is_seen_in_its_row() -> None:
    good = {"samples": 4, "error": 0.5, "sqnr": 6.0, "same": 3, "bits": True, "texts": 1, "weights": 2, "library": []}
    cells: gpu.Cell = {**good, "compile": 1.0, "first": 2.0, "next": 0.1}
    assert gpu.correct_row("m", "d", "int8", cells)[6:8] == ["3 of 4", "yes"]
    assert gpu.correct_row("m", "d", "int8", {**cells, "bits": False})[7] == "**no**"
    row = gpu.correct_row("m", "d", "int8", {"error": "ended with status -9"})
    assert "ended with status -9" in row and len(row) == len(gpu.CORRECT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["correct", "--model", "resnet1000"], "--model: 'resnet1000' is not known"),
        (["correct", "--device", "cortex-m4"], "'cortex-m4' is not a GPU whose code runs here"),
        (["roofline", "--device", "metal"], "'metal' is not a GPU whose code runs here"),
        (["ncnn", "--kind", "int8"], "--kind: 'int8' is not known"),
    ],
)
def test_unknown_names_are_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(gpu.app, arguments)
    assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1


def test_a_wrong_contestant_is_not_timed() -> None:
    gpu._right({"edgec": 1e-6, "ncnn": 1e-4})
    for error in (0.5, float("nan")):
        with pytest.raises(gpu.Absent, match="ncnn gives a wrong result"):
            gpu._right({"edgec": 1e-6, "ncnn": error})


def test_rows_of_contestants() -> None:
    def timing(wall: float) -> dict[str, float]:
        return gpu.Timing(wall, wall, wall, wall, 0.0, 1, 3).to_json()

    found: gpu.Cell = {
        "times": {"edgec": timing(1000.0), "a": timing(4000.0), "b": timing(5000.0)},
        "errors": {"edgec": 1e-7, "a": 2e-7, "b": 0.0},
    }
    rows = list(gpu.time_rows("m", "fp32", found))
    assert [row[2] for row in rows] == ["edgec", "a", "b"]
    assert [row[6] for row in rows] == ["0.25, 0.20", "4.00", "5.00"]
    assert all(len(row) == len(gpu.TIMES) for row in [*rows, *gpu.time_rows("m", "fp32", {"error": "gone"})])


def test_row_of_a_layer() -> None:
    row = gpu.layer_row((16, 96, 10, 10), {"kernel_ms": {"edgec": 0.5, "mali": 3.0, "adreno": 2.0}})
    assert row == ["16 to 96, 10x10", "0.2", "0.500", "3.000", "2.000", "4.0"]
    assert len(gpu.layer_row((1, 1, 1, 1), {"error": "gone"})) == len(gpu.LAYER_TIMES)


def test_row_of_both_ways() -> None:
    found: gpu.Cell = {
        "macs": 2_000_000,
        "layers": 1,
        "ms": {"winograd": 2.0, "direct": 5.0},
        "errors": {"winograd": 1e-6, "direct": 2e-7},
    }
    row = gpu.ways_row("n", "vulkan", "fp32", found)
    assert row == ["n", "vulkan", "fp32", "2.0", "1", "2.00", "5.00", "2.50", "1e-06, 2e-07"]
    rows = [row, gpu.ways_row("n", "d", "fp32", {**found, "layers": 0}), gpu.ways_row("n", "d", "fp32", {"error": "x"})]
    assert all(len(row) == len(gpu.WAYS) for row in rows) and rows[1][5] == ""
