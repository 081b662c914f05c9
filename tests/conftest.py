"""Fixtures that all tests share, and the tiers of tests that need a compiler or an emulator."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgec.targets.device import Device, load_device

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"

# What a marker without arguments stands for: one device of each family of cross compilers.
CROSS_DEVICES = ("cortex-a72", "cortex-a7")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the code gives now")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, a test whose tier needs a program that is not installed.

    `cross` and `qemu` take device names: `@pytest.mark.qemu("cortex-a7")`. Without one, any device will do: the test
    chooses among several and skips those it cannot have.
    """
    if item.get_closest_marker("host") and missing(load_device("host"), emulator=False):
        pytest.skip(missing(load_device("host"), emulator=False))
    for tier in ("cross", "qemu"):
        marker = item.get_closest_marker(tier)
        if marker is None:
            continue
        reasons = [missing(load_device(n), emulator=tier == "qemu") for n in marker.args or CROSS_DEVICES]
        if (any if marker.args else all)(reasons):
            pytest.skip(", ".join(dict.fromkeys(r for r in reasons if r)))

    for api in ("opencl", "vulkan"):
        if item.get_closest_marker(api) and no_gpu(api):
            pytest.skip(no_gpu(api))


@functools.cache
def no_gpu(api: str) -> str:
    """Why nothing here runs kernels of an API; empty when something does."""
    from edgec.errors import ToolchainMissing
    from edgec.targets.gpu.runner import require_device

    try:
        require_device(api)
    except ToolchainMissing as error:
        return str(error)
    return ""


def missing(device: Device, *, emulator: bool) -> str:
    """Why code for this device cannot be built (and run, with `emulator`) here; empty when it can."""
    wanted = {device.cc: device.package}
    if emulator and device.runner != "native":
        wanted[device.runner] = device.runner_package or device.runner
    absent = [
        f"{program} is not installed (apt-get install {p})"
        for program, p in wanted.items()
        if not shutil.which(program)
    ]
    return ", ".join(absent)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data: EDGEC_SHARED, or `../shared` beside the repository."""
    folder = Path(os.environ.get("EDGEC_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "data" / "models").is_dir():
        pytest.skip(f"no models and data at {folder}; set EDGEC_SHARED")
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden("fold_bn.txt", text)` compares with tests/golden/fold_bn.txt, or rewrites it with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
            return
        assert path.exists(), f"{path} does not exist; make it with --update-golden and review it"
        assert text == path.read_text(), f"differs from {path}; if that is wanted, --update-golden"

    return compare
