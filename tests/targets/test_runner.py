"""Running a program on samples by way of files; the programs here are scripts, so no compiler is needed."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from edgec.errors import EXIT_TOOLCHAIN, EdgecError, ToolchainMissing
from edgec.targets.cpu import runner
from edgec.targets.cpu.runner import command_prefix, execute, run_samples

pytestmark = pytest.mark.pure

OUTPUTS = [((2, 3), "float32"), ((), "int32")]


def script(folder: Path, body: str) -> Path:
    """An executable that sees `source`, `target` and `count`."""
    path = folder / "program"
    head = "import sys\nsource, target, count = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
    path.write_text(f"#!{sys.executable}\n{head}{textwrap.dedent(body)}")
    path.chmod(0o755)
    return path


# Takes samples of int8[2] and float32[2, 3]; gives the float32[2, 3] and the number of the sample in this call.
ECHO = """
    import struct
    data = open(source, "rb").read()
    assert len(data) == 26 * count, (len(data), count)
    out = open(target, "wb")
    for i in range(count):
        out.write(data[26 * i + 2 : 26 * i + 26] + struct.pack("<i", i + data[26 * i]))
"""


def samples(count: int) -> tuple[np.ndarray, np.ndarray]:
    small = np.arange(2 * count, dtype=np.int8).reshape(count, 2)
    return small, np.random.default_rng(0).standard_normal((count, 3, 2)).astype(np.float32).transpose(0, 2, 1)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_samples_are_their_inputs_one_after_the_other(count: int, tmp_path: Path) -> None:
    small, large = samples(count)
    first, second = run_samples(script(tmp_path, ECHO), [], [small, large], OUTPUTS)
    np.testing.assert_array_equal(first, large)
    np.testing.assert_array_equal(second, np.arange(count) + small[:, 0])
    assert (first.dtype, second.dtype) == (np.float32, np.int32)
    assert first.flags.c_contiguous and second.shape == (count,)


def test_many_samples_go_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK_BYTES", 100)
    small, large = samples(8)
    first, second = run_samples(script(tmp_path, ECHO), [], [small, large], OUTPUTS)
    np.testing.assert_array_equal(first, large)
    np.testing.assert_array_equal(second, np.arange(8) % 3 + small[:, 0])


def test_arguments_of_an_emulator() -> None:
    assert command_prefix("native", None) == []
    assert command_prefix("qemu-arm", "cortex-a7") == ["qemu-arm", "-cpu", "cortex-a7"]
    assert command_prefix("qemu-aarch64", None) == ["qemu-aarch64"]


def test_a_crash_is_told_with_its_last_line(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import os, signal\nprint('bad kernel', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 11)"
    )
    with pytest.raises(EdgecError, match=r"^program: ended with status -11: bad kernel$"):
        run_samples(path, [], samples(1), OUTPUTS)


def test_an_emulator_is_named_in_the_message(tmp_path: Path) -> None:
    path = script(tmp_path, "sys.exit('no such instruction')")
    with pytest.raises(EdgecError, match=r"python\S* program: ended with status 1: no such instruction$"):
        run_samples(path, [sys.executable], samples(1), OUTPUTS)


def test_too_few_results_are_refused(tmp_path: Path) -> None:
    path = script(tmp_path, "open(target, 'wb').write(b'0' * 28)")
    with pytest.raises(EdgecError, match="program: gave 1 results for 2 samples"):
        run_samples(path, [], samples(2), OUTPUTS)


def test_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgecError, match="program: samples cannot be exchanged: No such file"):
        run_samples(script(tmp_path, "pass"), [], samples(2), OUTPUTS)


def test_a_missing_emulator_is_a_missing_package(tmp_path: Path) -> None:
    with pytest.raises(ToolchainMissing) as caught:
        run_samples(script(tmp_path, ECHO), ["qemu-none"], samples(1), OUTPUTS, "qemu-user")
    assert str(caught.value) == "runner: 'qemu-none' is not installed; apt-get install qemu-user"
    assert caught.value.exit_code == EXIT_TOOLCHAIN


def test_a_program_that_may_not_be_run(tmp_path: Path) -> None:
    path = script(tmp_path, ECHO)
    path.chmod(0o644)
    with pytest.raises(EdgecError, match="cannot be run: Permission denied"):
        run_samples(path, [], samples(1), OUTPUTS)


def test_a_program_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TIMEOUT", 0.2)
    with pytest.raises(EdgecError, match=r"sleep: took more than 0\.2 s"):
        execute(["sleep", "60"])


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run_samples(script(tmp_path, ECHO), [], samples(3), OUTPUTS)
    with pytest.raises(EdgecError):
        run_samples(script(tmp_path, "sys.exit(1)"), [], samples(3), OUTPUTS)
    assert not list(temporary.iterdir())
