"""`edgec tune`: the table, the search on this machine and in the emulator, and that compiles use what was found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgec import tune
from edgec.bundle import load_bundle
from edgec.cli import main
from edgec.compile import compile_model
from edgec.errors import EdgecError
from edgec.listing import describe_target
from edgec.targets.cpu.timer import KernelTimer
from edgec.targets.device import load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Blocking, Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.tune import Section, Tuned, TuneResult
from tests.targets.kernel_cases import layer_call
from tests.targets.kernel_runner import run_calls

SOURCE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU(),
        nn.Conv2d(24, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 1), nn.Flatten(),
        nn.Linear(40 * 81, 5))
    return layers, torch.rand(1, 3, 9, 9)

def silent():
    return nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(1, 3, 4)
"""
PASSES = "fold-bn, quantize-int8"
FIRST = "conv2d float32 h=9 w=9 ci=3 co=24 kernel=3x3 padding=1x1x1x1"
TILE = Tuned(3, 2, False, 1.5, 2.25)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "net.py").write_text(SOURCE)
    yield f"{folder}/net.py:net"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


# -- the table ---------------------------------------------------------------------------------------------------------


def test_round_trip_and_merge(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    a72, a53 = (tune.device_key(load_device(name)) for name in ("cortex-a72", "cortex-a53"))
    first = tune.merged({}, a72, Section("cycles", {"one": TILE, "two": TILE}))
    better = replace(TILE, pixels=4)
    second = tune.merged(first, a72, Section("cycles", {"two": better}))
    second = tune.merged(second, a53, Section("instructions", {"one": TILE}))
    tune.write_table(path, second)
    assert tune.read_table(path) == second
    assert second[a72].kernels == {"one": TILE, "two": better}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    # Costs in another unit compare with nothing.
    assert tune.merged(second, a72, Section("instructions", {"two": TILE}))[a72].kernels == {"two": TILE}


def test_a_device_takes_its_own_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, device = tmp_path / "table.json", load_device("cortex-a72")
    tune.write_table(path, {tune.device_key(device): Section("cycles", {"k": TILE})})
    tuned = tune.tuned_device(device, path)
    assert dict(tuned.tuning) == {"k": Blocking(3, 2, False)}
    assert tuned == device and hash(tuned) == hash(device) and repr(tuned) == repr(device)
    monkeypatch.setenv("EDGEC_TUNING", str(path))
    assert dict(tune.tuned_device(device).tuning) == {"k": Blocking(3, 2, False)}
    with pytest.raises(
        EdgecError, match=r"EDGEC_TUNING=.*table\.json: has no tiles for 'cortex-a53: .*only for 'corte"
    ):
        tune.tuned_device(load_device("cortex-a53"))
    # The same name with other instructions is another device.
    with pytest.raises(EdgecError, match=r"has no tiles for"):
        tune.tuned_device(replace(device, features=("+dotprod",)), path)
    monkeypatch.setenv("EDGEC_TUNING", "")
    assert tune.tuned_device(device) is device
    assert "tuning" not in describe_target("cortex-a72")


GOOD = {"pixels": 1, "vectors": 1, "rows_first": True, "cost": 1, "default_cost": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a tuning table"),
        ("[]", "wrong structure"),
        ("{}", "wrong structure"),
        ('{"edgec_tuning": 2}', "version 2 of the format is not known"),
        ('{"edgec_tuning": 1, "devices": {"d": []}}', "wrong structure"),
        ({**GOOD, "pixels": 0}, "pixels of 'k' is 0"),
        ({**GOOD, "vectors": 17}, "vectors of 'k' is 17"),
        ({**GOOD, "vectors": True}, "vectors of 'k' is True"),
        ({**GOOD, "rows_first": 1}, "rows_first of 'k' is 1"),
        ({**GOOD, "cost": None}, "wrong structure"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str | dict[str, object], message: str) -> None:
    path = tmp_path / "table.json"
    if isinstance(text, dict):
        text = json.dumps({"edgec_tuning": 1, "devices": {"d": {"unit": "us", "kernels": {"k": text}}}})
    path.write_text(text)
    with pytest.raises(EdgecError, match=message):
        tune.read_table(path)


def test_the_key_is_what_tiles_depend_on() -> None:
    spec = Conv2D(9, 9, 3, 24, (3, 3), padding=(1, 1, 1, 1))
    assert spec.tuning_key == FIRST
    assert replace(spec, epilogue=Epilogue("clip", 0, 6)).tuning_key == FIRST
    assert replace(spec, epilogue=Epilogue(residual=True)).tuning_key == f"{FIRST} residual"
    coded = replace(spec, dtype="int8", x_zp=7, epilogue=Epilogue(y_zp=-7, lo=-128, hi=127, requant="RQF"))
    assert coded.tuning_key == f"{FIRST.replace('float32', 'int8')} RQF"
    keys = {replace(spec, **change).tuning_key for change in ({"h": 8}, {"stride": (2, 1)}, {"groups": 3}, {"co": 3})}
    assert len(keys | {FIRST}) == 5


# -- any tile gives the same result ------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("dtype", ("float32", "int8"))
def test_results_do_not_depend_on_the_tile(dtype: str) -> None:
    device = load_device("host")
    fused = Epilogue(lo=-128, hi=127, y_zp=3, requant="RQF") if dtype == "int8" else Epilogue()
    specs = [
        Conv2D(1, 37, 20, 50, dtype=dtype, epilogue=fused),
        Conv2D(7, 9, 3, 20, (3, 3), (1, 1), (1, 1, 1, 1), dtype=dtype, epilogue=fused),
        # Padding and a number of channels that is no multiple of anything: packed for one walk, computed on another.
        Conv2D(5, 6, 7, 90, (1, 1), (1, 1), (1, 0, 2, 1), dtype=dtype, epilogue=fused),
        Depthwise(7, 9, 80, (3, 3), padding=(1, 1, 1, 1), dtype=dtype, epilogue=fused),
    ]
    for spec in specs:
        tiles = spec.candidates(device)
        chosen = [tiles[0], tiles[len(tiles) // 2], tiles[-1]]
        if spec.reorders:
            chosen += [replace(tiles[0], rows_first=not tiles[0].rows_first), Blocking(29, 1, True)]
        devices = [replace(device, tuning={spec.tuning_key: tile}) for tile in chosen]
        results = run_calls([layer_call(spec, 5, d)[0] for d in devices], device)
        for tile, (got,) in zip(chosen, results, strict=True):
            np.testing.assert_array_equal(got, results[0][0], err_msg=f"{spec.tuning_key} {tile}")


def test_candidates_hold_the_default_first() -> None:
    for name in ("cortex-a72", "cortex-a76", "cortex-a7"):
        device = load_device(name)
        for dtype in ("float32", "int8"):
            spec = Conv2D(14, 14, 64, 96, dtype=dtype, epilogue=Epilogue(lo=-128, hi=127))
            tiles = spec.candidates(device)
            assert len(set(tiles)) == len(tiles) > 3 and spec.blocking(device) == tiles[0]
            depthwise = Depthwise(14, 14, 64, (3, 3), dtype=dtype, epilogue=Epilogue(lo=-128, hi=127))
            first = depthwise.candidates(device)[0]
            assert depthwise.blocking(device) == (first.vectors * device.lanes, first.pixels)


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_timer_sees_work() -> None:
    device = load_device("host")
    small, large = (Conv2D(1, pixels, 64, 64) for pixels in (16, 512))
    timer = KernelTimer(device, weights=1 << 20)
    first = timer.add([small.prim_func(device)])
    second = timer.add([large.prim_func(device)])
    times = timer.best([*first, *second], 5)
    assert (*first, *second) == (0, 1)
    assert 8 < times[1] / times[0] < 128


@pytest.mark.host
def test_the_fastest_tile_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the modelled default and one that is really good, with a model that is turned round."""
    device, spec = load_device("host"), Conv2D(1, 196, 64, 128)
    candidates = spec.candidates(device)
    bad = Blocking(1, 1, True)
    monkeypatch.setattr(Conv2D, "candidates", lambda self, device: [bad, candidates[0]])
    tuned, tried = tune.tune_kernel(spec, device, 0.1)
    assert tuned.blocking in (candidates[0], replace(candidates[0], rows_first=not candidates[0].rows_first))
    assert tuned.cost < tuned.default_cost / 1.5 and tried == 4


@pytest.mark.host
@pytest.mark.slow
def test_tune_then_compile(
    model: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    code, out, err = run("tune", model, "--passes", PASSES, "--seconds-per-op", "0.05", "-o", str(table), "--json")
    assert code == 0 and not err
    shown, section = json.loads(out), next(iter(tune.read_table(table).values()))
    assert shown["unit"] == section.unit == "us"
    # Two equal pointwise layers are one kernel.
    assert len(section.kernels) == len(shown["kernels"]) == 5
    assert all(0 < t.cost <= t.default_cost for t in section.kernels.values())
    code, out, err = run("tune", model, "--seconds-per-op", "0.01", "-o", str(table))
    assert code == 0 and FIRST in out and f"table   {table}" in out
    assert len(next(iter(tune.read_table(table).values())).kernels) == 10

    # Tiles that no model would choose, so that their use shows.
    (key, found), *_ = tune.read_table(table).items()
    odd = {k: replace(t, pixels=2, vectors=1, rows_first=False) for k, t in found.kernels.items()}
    tune.write_table(table, {key: Section("us", odd)})
    common = {"passes": PASSES, "data": np.random.default_rng(0).random((6, 3, 9, 9), np.float32)}
    plain = compile_model(model, output=tmp_path / "plain", **common).bundle
    tuned = compile_model(model, output=tmp_path / "tuned", tuning=table, **common).bundle
    assert plain is not None and tuned is not None
    assert plain.manifest["meta"]["tuning"] == {}
    recorded = tuned.manifest["meta"]["tuning"]
    assert len(recorded) == 5 and {"pixels": 2, "vectors": 1, "rows_first": False} in recorded.values()
    libraries = [next((b.path / "lib").glob("*.so")).read_bytes() for b in (plain, tuned)]
    assert libraries[0] != libraries[1]
    x = np.random.default_rng(1).random((3, 3, 9, 9), np.float32)
    np.testing.assert_array_equal(plain.run(x), tuned.run(x))

    monkeypatch.setenv("EDGEC_TUNING", str(table))
    code, _, err = run("compile", model, "--passes", "fold-bn", "-o", str(tmp_path / "float"))
    assert code == 0, err
    assert FIRST in load_bundle(tmp_path / "float").manifest["meta"]["tuning"]


@pytest.mark.qemu("cortex-a72")
def test_emulated_devices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    device, spec = load_device("cortex-a72"), Conv2D(1, 24, 32, 64)
    tuned, tried = tune.tune_kernel(spec, device, 1e-6)
    assert tried == 2 and 0 < tuned.cost <= tuned.default_cost
    # Without llvm-mca the same search compares instructions, and the counts are exact.
    monkeypatch.setattr("edgec.targets.loops.mca", lambda: None)
    assert tune.unit_of(device) == "instructions"
    counted = [tune.tune_kernel(spec, device, 1e-6)[0] for _ in range(2)]
    assert counted[0] == counted[1] and counted[0].cost == int(counted[0].cost)
    assert counted[0].cost > 24 * 32 * 64 / 4


@pytest.mark.host
def test_errors(model: str, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    other = tmp_path / "other.json"
    tune.write_table(other, {tune.device_key(load_device("cortex-a72")): Section("cycles", {FIRST: TILE})})
    (tmp_path / "bad.json").write_text("no table")
    out = ["-o", str(tmp_path / "out")]
    cases = {
        ("tune", model, "--target", "cortex-a73"): "--target: unknown target 'cortex-a73'",
        ("tune", model, "--seconds-per-op", "0"): "seconds-per-op",
        ("tune", model, "-o", f"{tmp_path}/bad.json"): "bad.json: is not a tuning table",
        ("tune", model, "-o", f"{tmp_path}/none/t.json"): "none: folder does not exist",
        ("tune", model.replace(":net", ":silent")): "no convolution or linear layer to tune",
        ("compile", model, *out, "--tuning", f"{tmp_path}/bad.json"): "bad.json: is not a tuning table",
        ("compile", model, *out, "--tuning", f"{tmp_path}/none.json"): "none.json: cannot be read: No such file",
        ("compile", model, *out, "--tuning", str(other)): "has no tiles for 'host: ",
    }
    for arguments, message in cases.items():
        code, _, err = run(*arguments)
        assert code == 2 and err.count("\n") == 1 and message in err, (arguments, err)
    assert not (tmp_path / "out").exists()


def test_totals_count_calls() -> None:
    result = TuneResult("m", "d", Section("us", {"a": TILE, "b": TILE}), {"a": 1, "b": 3}, {"a": 2, "b": 2})
    assert result.costs == (6.0, 9.0)
    assert "1.50 times as fast" in result.text()
