"""The command line: what it prints, its exit codes, and one clear line for each kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgec import console
from edgec.cli import main

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(nn.functional.avg_pool2d(x, 2).flatten(1))

def net():
    torch.manual_seed(0)
    return Net(), torch.rand(1, 1, 8, 8)

def bare():
    return Net()

def poisoned():
    made, example = net()
    with torch.no_grad():
        made.conv.weight[0] = float("nan")
    return made, example

class Branch(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)

def branching():
    return Branch(), torch.rand(1, 1, 8, 8)

def failing():
    raise ValueError("no weights here")

def metric(outputs, targets):
    return (outputs.argmax(1) == targets).astype(float)
"""

HARD = """fold-bn, quantize-int8{keep_float=[fc]}"""


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model file, data of every bad kind, and good data whose labels the model gives itself."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "net.py").write_text(SOURCE)
    rng = np.random.default_rng(0)
    images = rng.random((48, 1, 8, 8), dtype=np.float32)
    labels = rng.integers(0, 3, 48)
    np.savez(folder / "good.npz", images=images, labels=labels)
    np.savez(folder / "shape.npz", images=images[:, :, :7], labels=labels)
    np.savez(folder / "dtype.npz", images=images.astype(np.complex64), labels=labels)
    np.savez(folder / "labels.npz", images=images, labels=labels + 7)
    np.savez(folder / "nan.npz", images=np.where(images > 0.99, np.nan, images), labels=labels)
    np.savez(folder / "empty.npz", images=images[:0], labels=labels[:0])
    (folder / "corrupt.npz").write_bytes(b"PK\x03\x04 not an archive")
    (folder / "corrupt.pt2").write_bytes(b"PK\x03\x04 not an archive")
    (folder / "text.pt2").write_text("hello")
    (folder / "recipe.toml").write_text('[[pass]]\nname = "fold-bn"\n')
    (folder / "broken.toml").write_text("[[pass]\n")
    return folder


@pytest.fixture(scope="session")
def bundle(work: Path) -> Path:
    """A host bundle, compiled once."""
    path = work / "bundle"
    arguments = ["compile", f"{work}/net.py:net", "--eval", f"{work}/good.npz", "--passes", "fold-bn", "-o", str(path)]
    assert main(arguments) == 0
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in the folder of data; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(work)

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def one_line(err: str) -> str:
    """The error of a run that printed one line and nothing else."""
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err.removeprefix("error: ").rstrip("\n")


# -- help, listing, start ----------------------------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["passes"], ["targets"], ["--version"]])
def test_starts_without_torch_and_tvm(arguments: list[str]) -> None:
    code = (
        "import sys; from edgec.cli import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'tvm', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stderr == ""


@pytest.mark.pure
def test_nothing_to_do_prints_the_commands(run: Run) -> None:
    code, out, err = run()
    assert code == 0 and err == ""
    for command in ("compile", "run", "inspect", "passes", "targets", "diff", "report"):
        assert f"\n  {command}" in out


@pytest.mark.pure
def test_passes_and_targets_by_name(run: Run) -> None:
    _, out, _ = run("passes", "--json")
    assert {
        "name": "fold-bn",
        "summary": "fold batch norms into the layer before them",
        "source": "edgec",
    } in json.loads(out)
    _, out, _ = run("targets", "--json")
    names = [row["name"] for row in json.loads(out)]
    assert names[0] == "host" and "cortex-a72" in names
    code, out, _ = run("targets", "cortex-a72", "--json")
    assert code == 0 and json.loads(out)["mcpu"] == "cortex-a72"
    code, out, _ = run("targets", "cortex-a72")
    assert code == 0 and "aarch64-linux-gnu-gcc" in out


@pytest.mark.pure
def test_a_pass_is_described_with_its_options_and_paper(run: Run) -> None:
    code, out, _ = run("passes", "quantize-int8", "--json")
    record = json.loads(out)
    assert code == 0 and record["needs"] == ["calibration"] and "Jacob" in record["doc"]
    observer = next(row for row in record["options"] if row["name"] == "observer")
    assert observer["default"] in observer["range"].split(" | ") and observer["help"]
    _, out, _ = run("passes", "quantize-int8")
    assert "keep_float" in out and "min-max | percentile" in out


@pytest.mark.pure
def test_missing_emulator_shows_in_the_list(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    _, out, _ = run("targets", "--json")
    ready = {row["name"]: row["ready"] for row in json.loads(out)}
    assert ready["cortex-a7"] == "apt-get install gcc-arm-linux-gnueabihf"


@pytest.mark.pure
def test_completion_script_and_values() -> None:
    environment = {**os.environ, "_EDGEC_COMPLETE": "complete_bash", "COMP_WORDS": "edgec compile --target cortex-a7"}
    environment["COMP_CWORD"] = "3"
    done = subprocess.run([sys.executable, "-m", "edgec"], env=environment, capture_output=True, text=True, check=False)
    assert {"cortex-a72", "cortex-a76", "cortex-a7"} == set(done.stdout.split())


# -- bad input: exit code 2 and one line -------------------------------------------------------------------------------

COMPILE = ("compile", "net.py:net", "-o", "never")
BAD = {
    "no such model": (("compile", "no.pt2", "-o", "never"), "no.pt2: does not exist"),
    "no such factory": (("compile", "net.py:other", "-o", "never"), "has no function 'other'"),
    "no such factory file": (("compile", "no.py:net", "-o", "never"), "no.py"),
    "corrupt pt2": (("compile", "corrupt.pt2", "-o", "never"), "corrupt.pt2: is not a readable .pt2 file"),
    "text as pt2": (("compile", "text.pt2", "-o", "never"), "text.pt2: is not a readable .pt2 file"),
    "factory raises": (("compile", "net.py:failing", "-o", "never"), "ValueError: no weights here"),
    "no example input": (("compile", "net.py:bare", "-o", "never"), "--input-shape"),
    "bad input shape": (("compile", "net.py:bare", "--input-shape", "1,a", "-o", "never"), "--input-shape: '1,a'"),
    "does not export": (("compile", "net.py:branching", "-o", "never"), "does not export"),
    "NaN in weights": (("compile", "net.py:poisoned", "-o", "never"), "has NaN or infinite values"),
    "no output": (("compile", "net.py:net"), "--output: is missing"),
    "unknown pass": ((*COMPILE, "--passes", "fold-bm"), "unknown pass 'fold-bm'; did you mean 'fold-bn'?"),
    "unknown pass option": (
        (*COMPILE, "--passes", "quantize-int8{observr=mse}"),
        "pass quantize-int8: unknown option 'observr'",
    ),
    "bad pass option": ((*COMPILE, "--passes", "quantize-int8{observer=x}"), "'x' is not a choice; use one of min-max"),
    "broken pipeline": ((*COMPILE, "--passes", "fold-bn{"), "pipeline, column 9: "),
    "two pipelines": ((*COMPILE, "--passes", "fold-bn", "--recipe", "recipe.toml"), "--recipe: given together"),
    "broken recipe": ((*COMPILE, "--recipe", "broken.toml"), "broken.toml: is not TOML"),
    "no such recipe": ((*COMPILE, "--recipe", "no.toml"), "no.toml: cannot be read"),
    "unknown target": ((*COMPILE, "--target", "cortex-a71"), "unknown target 'cortex-a71'; did you mean 'cortex-a7"),
    "pass without data": ((*COMPILE, "--passes", "quantize-int8"), "needs calibration data; give --data"),
    "no such data": ((*COMPILE, "--eval", "no.npz"), "no.npz: does not exist"),
    "corrupt data": ((*COMPILE, "--eval", "corrupt.npz"), "corrupt.npz: is corrupt"),
    "empty data": ((*COMPILE, "--eval", "empty.npz"), "has no samples"),
    "wrong shape": ((*COMPILE, "--eval", "shape.npz"), "samples have shape (1, 7, 8)"),
    "wrong dtype": ((*COMPILE, "--eval", "dtype.npz"), "dtype is complex64"),
    "labels out of range": ((*COMPILE, "--eval", "labels.npz"), "labels.npz: label"),
    "NaN in data": ((*COMPILE, "--eval", "nan.npz"), "has NaN or infinite values"),
    "mean of 3 channels": ((*COMPILE, "--eval", "good.npz", "--mean", "0,0,0"), "--mean: 3 values for input"),
    "mean not numbers": ((*COMPILE, "--eval", "good.npz", "--mean", "a,b"), "--mean: 'a,b' is not a list of numbers"),
    "std of zero": ((*COMPILE, "--eval", "good.npz", "--std", "0"), "--std: '0.0' contains a value"),
    "unknown metric": ((*COMPILE, "--eval", "good.npz", "--metric", "top7x"), "top7x"),
    "negative gate": ((*COMPILE, "--eval", "good.npz", "--max-drop", "-1"), "--max-drop: -1.0 is not a drop"),
    "unknown stage": ((*COMPILE, "--stop-after", "nowhere"), "'nowhere' is not a stage"),
    "unknown option": ((*COMPILE, "--bogus"), "No such option: --bogus; see edgec compile --help"),
    "bad choice": ((*COMPILE, "--on-fail", "pray"), "pray"),
    "not a number": ((*COMPILE, "--seed", "x"), "--seed"),
    "no threads": ((*COMPILE, "--threads", "0"), "--threads"),
    "zero samples": ((*COMPILE, "--device-samples", "0"), "--device-samples"),
    "unknown command": (("compyle",), "compyle"),
    "missing model": (("compile",), "see edgec compile --help"),
    "run no bundle": (("run", "nowhere"), "nowhere: does not exist; give a folder made by edgec compile"),
    "report no bundle": (("report", "nowhere"), "report.json: cannot be read"),
    "report broken": (("report", "broken"), "is not JSON"),
    "passes unknown": (("passes", "fold"), "unknown pass 'fold'"),
    "targets unknown": (("targets", "x86"), "unknown target 'x86'"),
    "diff no model": (("diff", "no.pt2", "net.py:net"), "no.pt2"),
    "inspect no model": (("inspect", "net.py"), "net.py"),
}


@pytest.mark.host
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(case: str, run: Run, work: Path) -> None:
    (work / "broken").mkdir(exist_ok=True)
    (work / "broken" / "report.json").write_text("{")
    arguments, message = BAD[case]
    code, out, err = run(*arguments)
    assert message in one_line(err)
    assert code == 2 and out == ""
    assert not (work / "never").exists() and not list(work.glob(".never-*"))


@pytest.mark.host
def test_existing_output_is_refused_and_kept(run: Run, bundle: Path) -> None:
    before = (bundle / "manifest.json").read_text()
    code, _, err = run("compile", "net.py:net", "-o", str(bundle))
    assert code == 2 and "output exists" in one_line(err) and "--force" in err
    assert (bundle / "manifest.json").read_text() == before


@pytest.mark.host
def test_force_replaces_bundles_only(run: Run, work: Path) -> None:
    precious = work / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    code, _, err = run("compile", "net.py:net", "-o", str(precious), "--force")
    assert code == 2 and "only replaces bundles" in one_line(err)
    assert (precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.host
def test_threads(run: Run, work: Path, bundle: Path) -> None:
    path = work / "threaded"
    code, _, _ = run(
        "compile", "net.py:net", "--eval", "good.npz", "--passes", "fold-bn", "--threads", "2", "-o", str(path)
    )
    assert code == 0
    assert [json.loads((p / "manifest.json").read_text())["threads"] for p in (bundle, path)] == [1, 2]
    outputs = []
    for number, (folder, *threads) in enumerate(
        ((bundle,), (path,), (path, "--threads", "3"), (bundle, "--threads", "2"))
    ):
        assert run("run", str(folder), "--eval", "good.npz", "-o", f"y{number}.npz", *threads)[0] == 0
        outputs.append(np.load(work / f"y{number}.npz")["y"])
        assert run("run", str(folder), *threads)[0] == 0
    assert all(np.array_equal(outputs[0], y) for y in outputs)


@pytest.mark.host
def test_wrong_data_for_a_bundle(run: Run, bundle: Path) -> None:
    code, _, err = run("run", str(bundle), "--eval", "shape.npz")
    assert code == 2 and "samples have shape (1, 7, 8)" in one_line(err)
    code, _, err = run("run", str(bundle), "-o", "y.npz")
    assert code == 2 and one_line(err) == "--output: needs --eval; give the data to run"
    code, _, err = run("run", str(bundle), "--eval", "good.npz", "-o", "y.txt")
    assert code == 2 and "y.txt: is not a .npz file" in one_line(err)


@pytest.mark.host
def test_changed_bundle_is_refused(run: Run, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    library = next((copy / "lib").glob("*.so"))
    library.write_bytes(library.read_bytes() + b"!")
    code, _, err = run("run", str(copy))
    assert code == 2 and "was changed after the compile" in one_line(err)


# -- gate, tool chain, disk, signals, bugs -----------------------------------------------------------------------------


@pytest.mark.host
def test_gate_is_exit_1_and_says_what_to_try(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgec.passes.graph.fold_bn import FoldBN

    def ruin(self: FoldBN, program, context):  # a pass that loses everything
        module = program.edit()
        with __import__("torch").no_grad():
            for parameter in module.parameters():
                parameter.mul_(-3.0)
        return program.replace(module)

    monkeypatch.setattr(FoldBN, "run", ruin)
    gated = ("compile", "net.py:net", "--data", "good.npz", "--metric", "agreement", "--max-drop", "0.5")
    code, out, err = run(*gated, "--passes", "fold-bn", "-o", "never")
    line = one_line(err)
    assert code == 1 and out == "" and not (work / "never").exists()
    assert line.startswith("pass fold-bn: agreement 100.00 % -> ") and "0.5 points allowed" in line
    assert "keep_float=[" in line and "--max-drop" in line

    code, out, err = run(*gated, "--passes", "fold-bn", "--on-fail", "revert", "-o", "reverted", "--json")
    assert code == 0 and err == ""
    report = json.loads(out)
    assert report["stages"][-1]["name"] == "fold-bn (reverted)" and report["stages"][-1]["metric"]["drop"] == 0
    assert [s["what"] for s in report["skipped"]][:1] == ["pass reverted"]


@pytest.mark.pure
@pytest.mark.parametrize(
    "target,package",
    [("host", "gcc"), ("cortex-a72", "gcc-aarch64-linux-gnu"), ("cortex-a7", "gcc-arm-linux-gnueabihf")],
)
def test_missing_toolchain_is_exit_3_with_the_package(
    target: str, package: str, run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, err = run("compile", "net.py:net", "--target", target, "-o", "never")
    assert code == 3 and one_line(err).endswith(f"is not installed; apt-get install {package}")
    assert not (work / "never").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "edgec-test", str(disk)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.host
@pytest.mark.skipif(shutil.which("mount") is None, reason="mount is not installed")
def test_full_disk_is_one_line_and_leaves_nothing(run: Run, tiny_disk: Path) -> None:
    code, _, err = run("compile", "net.py:net", "-o", str(tiny_disk / "out"))
    assert code == 2 and "no space left" in one_line(err).lower()
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.host
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_leaves_nothing(number: signal.Signals, work: Path, tmp_path: Path) -> None:
    # The factory says when the compile is under way.
    (tmp_path / "slow.py").write_text(
        f"import sys; sys.path.insert(0, {str(work)!r})\n"
        "import pathlib, time, net\n"
        "def load():\n    pathlib.Path('started').touch()\n    time.sleep(60)\n    return net.net()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "edgec", "compile", "slow.py:load", "-o", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, one_line(err)) == (128 + number, "", "interrupted, nothing was written")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["slow.py", "started"]


@pytest.mark.host
def test_stopped_while_the_bundle_is_built_leaves_nothing(
    run: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgec import compile as road

    def interrupted(*arguments: object) -> None:
        assert list(work.glob(".never-*")), "the staging folder is there by now"
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(road, "_device_check", interrupted)
    code, _, err = run("compile", "net.py:net", "-o", "never")
    assert code == 130 and one_line(err) == "interrupted, nothing was written"
    assert not (work / "never").exists() and not list(work.glob(".never-*"))


@pytest.mark.pure
def test_a_bug_is_one_line_exit_70_and_a_traceback_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgec import listing

    def broken() -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(listing, "list_passes", broken)
    code, _, err = run("passes")
    assert code == 70 and one_line(err).startswith("internal error: ZeroDivisionError: division by zero; ")
    monkeypatch.setenv("EDGEC_DEBUG", "1")
    _, _, err = run("passes")
    assert "Traceback" in err and "in broken" in err


@pytest.mark.pure
def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgec", "targets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) in (0, 128 + signal.SIGPIPE)


# -- good input --------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_compile_reports_each_step(run: Run, work: Path) -> None:
    code, out, err = run("compile", "net.py:net", "--eval", "good.npz", "--recipe", "recipe.toml", "-o", "printed")
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].split() == [
        *("step", "top1", "drop", "95", "%", "CI", "cosine", "SQNR", "agreement", "params", "MACs", "weights")
    ]
    assert [line.split()[0] for line in lines[2:6]] == ["original", "import", "fold-bn", "device"]
    assert lines[-2:] == ["bundle  printed", f"report  {Path('printed/report.html')}"]
    assert (work / "printed" / "report.html").exists()


@pytest.mark.host
def test_compile_as_json_is_the_report(run: Run, work: Path) -> None:
    code, out, err = run("compile", "net.py:net", "--eval", "good.npz", "--passes", "fold-bn", "-o", "json", "--json")
    assert code == 0 and err == ""
    printed, written = json.loads(out), json.loads((work / "json" / "report.json").read_text())
    assert printed.pop("bundle") == "json"
    assert {key: written[key] for key in printed} == printed
    assert set(printed) >= {"stages", "skipped", "device"}
    assert printed["device"]["target"] == "host" and printed["stages"][0]["metric"]["n"] == 48


@pytest.mark.host
def test_stop_after_and_dump(run: Run, work: Path) -> None:
    code, _, _ = run("compile", "net.py:net", "--passes", "fold-bn", "--stop-after", "fold-bn", "--dump", "stages")
    assert code == 0
    names = sorted(p.name for p in (work / "stages").glob("*.txt"))
    assert names == ["0-original.txt", "1-fold-bn.txt"]
    assert "batch_norm" in (work / "stages" / names[0]).read_text()
    assert "batch_norm" not in (work / "stages" / names[1]).read_text()


@pytest.mark.host
def test_run_gives_the_metric_and_the_outputs(run: Run, work: Path, bundle: Path) -> None:
    code, out, _ = run("run", str(bundle), "--eval", "good.npz", "--json", "-o", "y.npz")
    result = json.loads(out)
    assert code == 0 and result["metric"] == "top1" and result["n"] == 48
    with np.load(work / "y.npz") as stored:
        (outputs,) = (stored[key] for key in stored.files)
    labels = np.load(work / "good.npz")["labels"]
    assert outputs.shape == (48, 3)
    assert result["value"] == pytest.approx((outputs.argmax(1) == labels).mean())
    code, out, _ = run("run", str(bundle), "--eval", "good.npz[0:10]", "--metric", "net.py:metric")
    assert code == 0 and out.rstrip().endswith("n = 10")
    code, out, _ = run("run", str(bundle), "--eval", "good.npz", "--samples", "5", "--json")
    assert json.loads(out)["n"] == 5


@pytest.mark.host
def test_run_without_labels_compares_with_the_program(run: Run, bundle: Path) -> None:
    code, out, _ = run("run", str(bundle), "--eval", "good.npz", "--metric", "cosine", "--json")
    assert code == 0 and json.loads(out)["value"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.host
def test_run_without_data_is_the_self_test(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgec.bundle import Bundle

    code, out, _ = run("run", str(bundle))
    assert code == 0 and out.endswith("on host: self-test passed\n")
    monkeypatch.setattr(Bundle, "selftest", lambda self: False)
    code, _, err = run("run", str(bundle))
    assert code == 1 and "self-test" in one_line(err)


@pytest.mark.host
def test_run_uses_the_preprocessing_of_the_compile(run: Run, work: Path) -> None:
    scaled = ("--input-scale", "0.5", "--mean", "0.1", "--std", "2")
    assert run("compile", "net.py:net", "--eval", "good.npz", *scaled, "-o", "scaled")[0] == 0
    outputs = {}
    for name, options in {"default": (), "same": scaled, "other": ("--mean", "0.5")}.items():
        assert run("run", "scaled", "--eval", "good.npz", *options, "-o", f"{name}.npz")[0] == 0
        with np.load(work / f"{name}.npz") as stored:
            outputs[name] = stored[stored.files[0]]
    assert np.array_equal(outputs["default"], outputs["same"])
    assert not np.array_equal(outputs["default"], outputs["other"])


@pytest.mark.host
def test_inspect_diff_and_report(run: Run, bundle: Path) -> None:
    code, out, _ = run("inspect", "net.py:net", "--json")
    layers = json.loads(out)["layers"]
    assert code == 0 and layers[0]["op"] == "conv2d" and layers[0]["macs"] == 4 * 9 * 64
    assert {row["integer"] for row in layers} >= {"int8", "folded"}
    code, out, _ = run("inspect", "net.py:net")
    assert code == 0 and "conv2d" in out and out.splitlines()[-1].startswith("total")

    code, out, _ = run("diff", "net.py:net", str(bundle), "--data", "good.npz", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["layer"] for row in rows} >= {"fc", "output"}
    assert all(set(row) == {"layer", "cosine", "sqnr_db"} for row in rows)
    assert run("diff", "net.py:net", "net.py:net")[0] == 0

    code, out, _ = run("report", str(bundle))
    assert code == 0 and "fold-bn" in out and "device  host (native)" in out
    code, out, _ = run("report", str(bundle), "--json")
    assert code == 0 and json.loads(out) == json.loads((bundle / "report.json").read_text())


@pytest.mark.pure
def test_progress_is_silent_in_ci_and_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("CI", "true")
    with console.progress() as progress:
        progress("load", 0.5)
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("CI")
    with console.progress() as progress:
        progress("load", 0.5)
        progress("check", 0.0)
    assert "check" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with console.progress() as progress:
        progress("load", 0.5)
    assert capsys.readouterr() == ("", "")
