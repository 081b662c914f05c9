"""The kernel header as a whole: all parts in one file, for every core."""

from __future__ import annotations

import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from edgec.targets.device import load_device
from edgec.targets.mcu.header import header

PARTS = sorted(Path(str(p)).stem for p in resources.files("edgec.targets.mcu").joinpath("c").iterdir())
STRICT = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-c", "-x", "c", "-", "-o", "/dev/null"]
UNIT = "int unit;\n"


def compiles(command: list[str], text: str) -> str:
    done = subprocess.run([*command, *STRICT], input=text, capture_output=True, text=True, check=False)
    return done.stderr


def test_each_part_stands_once_and_behind_what_it_needs():
    text = header(PARTS)
    assert text.count("#ifndef EDGEC_NN_H") == 1
    assert text.index("ek_rqh(") < text.index("ek_conv_s8(")
    assert "needs:" not in text


@pytest.mark.host
def test_all_parts_compile_together_on_this_machine():
    assert compiles(["cc"], header(PARTS) + UNIT) == ""


@pytest.mark.host
@pytest.mark.parametrize("part", PARTS)
def test_each_part_compiles_with_what_it_needs(part: str):
    assert compiles(["cc"], header([part]) + UNIT) == ""


@pytest.mark.cross
@pytest.mark.parametrize("name", ["cortex-m0plus", "cortex-m3", "cortex-m4", "cortex-m33", "cortex-m55", "rv32imc"])
def test_all_parts_compile_together_for_a_core(name: str):
    device = load_device(name)
    if shutil.which(device.cc) is None:
        pytest.skip(f"{device.cc} is not installed: apt-get install {device.package}")
    library = ["--specs=picolibc.specs"] if name == "rv32imc" else []
    assert compiles([device.cc, *device.cflags, *library], header(PARTS) + UNIT) == ""


def test_cplusplus_can_include_the_parts():
    # Arduino sketches are C++; the model's own file stays C, so only the model's header has to be both.
    assert 'extern "C"' in resources.files("edgec.targets.mcu").joinpath("templates", "model.h.jinja").read_text()
