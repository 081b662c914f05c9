"""The kernel header: all parts together are one file that compilers accept without a warning."""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path

import pytest

from edgec.targets.device import load_device
from edgec.targets.mcu.header import header
from tests.targets.mcu_runner import WARNINGS


def compile_all(command: list[str], folder: Path) -> None:
    parts = [path.name.removesuffix(".h") for path in resources.files("edgec.targets.mcu").joinpath("c").iterdir()]
    (folder / "all.c").write_text(header(parts) + "\nint nothing;\n")
    done = subprocess.run([*command, *WARNINGS, "-c", "all.c"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.host
def test_parts_agree_with_each_other(tmp_path: Path) -> None:
    compile_all(["cc"], tmp_path)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.cross(n)) for n in ("cortex-m0plus", "cortex-m4", "cortex-m55", "rv32imc")],
)
def test_parts_agree_for_devices(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    library = ["--specs=picolibc.specs"] if device.triple.startswith("riscv") else []
    compile_all([device.cc, *device.cflags, *library], tmp_path)
