"""The tool chain: what is missing is named, compilers' messages reach the user, and nothing hangs."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from edgec.errors import EXIT_TOOLCHAIN, EdgecError, ToolchainMissing
from edgec.targets.cpu import toolchain
from edgec.targets.cpu.emit import emit, members
from edgec.targets.cpu.toolchain import build_library, has_toolchain, require_toolchain
from edgec.targets.device import Device, load_device
from tests.hand_models import compile_kernels, dense_model

INSTALLED = {
    "cortex-a72": ("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-ar", "aarch64-linux-gnu-objcopy", "qemu-aarch64"),
    "cortex-a7": ("arm-linux-gnueabihf-gcc", "arm-linux-gnueabihf-ar", "arm-linux-gnueabihf-objcopy", "qemu-arm"),
    "host": ("cc", "ar", "objcopy"),
}
PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-ar": "binutils-aarch64-linux-gnu",
    "arm-linux-gnueabihf-gcc": "gcc-arm-linux-gnueabihf",
    "arm-linux-gnueabihf-objcopy": "binutils-arm-linux-gnueabihf",
    "qemu-aarch64": "qemu-user",
    "qemu-arm": "qemu-user",
    "cc": "gcc",
    "ar": "binutils",
    "objcopy": "binutils",
}


def program(folder: Path, name: str, script: str) -> Path:
    """An executable shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.pure
@pytest.mark.parametrize("device", sorted(INSTALLED))
def test_every_missing_program_is_named_with_its_package(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    target = load_device(device)
    for name in INSTALLED[device]:
        with pytest.raises(ToolchainMissing) as caught:
            require_toolchain(target)
        assert f"'{name}' is not installed" in str(caught.value)
        if name in PACKAGES:
            assert caught.value.hint == f"apt-get install {PACKAGES[name]}"
        assert caught.value.exit_code == EXIT_TOOLCHAIN
        assert has_toolchain(target) == str(caught.value)
        program(tmp_path, name, "exit 0")
    require_toolchain(target)
    assert has_toolchain(target) is None


def build_folder(folder: Path, fault: str = "(void)0") -> tuple[Path, Device]:
    """The emitted files of a small model, ready for `build_library`."""
    model, host = dense_model(fault=fault), load_device("host")
    (folder / "obj").mkdir()
    for name, data in emit(model.plan, model.kernels, host, None, "1").items():
        (folder / name).write_bytes(data)
    (folder / "obj" / "kernels.o").write_bytes(compile_kernels(model.source, host))
    return folder, host


@pytest.mark.host
def test_compiler_error_reaches_the_user(tmp_path: Path) -> None:
    folder, host = build_folder(tmp_path)
    (folder / "model.c").write_text("int net_run(void) { return no_such_name; }\n")
    with pytest.raises(EdgecError, match=r"^cc .*failed with status 1: model\.c:1:.*'no_such_name' undeclared"):
        build_library(folder, "net", host, members("net", False))


@pytest.mark.host
def test_a_kernel_that_needs_a_runtime_does_not_link(tmp_path: Path) -> None:
    folder, host = build_folder(
        tmp_path, fault="extern void TVMBackendAllocWorkspace(void); TVMBackendAllocWorkspace()"
    )
    with pytest.raises(EdgecError, match="undefined reference to `TVMBackendAllocWorkspace'"):
        build_library(folder, "net", host, members("net", False))


@pytest.mark.pure
@pytest.mark.parametrize(
    ("cc", "message", "package"),
    [
        ("cc", "model.h:12:10: fatal error: stddef.h: No such file or directory", "libc6-dev"),
        ("aarch64-linux-gnu-gcc", "fatal error: string.h: No such file or directory", "libc6-dev-arm64-cross"),
        ("arm-linux-gnueabihf-gcc", "/usr/bin/ld: cannot find -lm: No such file or directory", "libc6-dev-armhf-cross"),
        ("arm-linux-gnueabihf-gcc", "ld: cannot find crt1.o: No such file or directory", "libc6-dev-armhf-cross"),
    ],
)
def test_a_compiler_without_c_library_is_a_missing_package(
    cc: str, message: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, cc, f"echo '{message}' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    device = dataclasses.replace(load_device("host"), cc=cc)
    with pytest.raises(ToolchainMissing) as caught:
        build_library(tmp_path, "net", device, members("net", False))
    assert str(caught.value) == f"{cc}: has no C library; apt-get install {package}"


@pytest.mark.pure
def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "cc", "echo 'cc1: fatal error: error writing to model.s: No space left on device' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(OSError) as caught:
        build_library(tmp_path, "net", load_device("host"), members("net", False))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.pure
def test_a_compiler_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "cc", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(toolchain, "TIMEOUT", 0.2)
    with pytest.raises(EdgecError, match=r"cc: took more than 0\.2 s"):
        build_library(tmp_path, "net", load_device("host"), members("net", False))


@pytest.mark.pure
def test_temporary_files_of_the_compiler_stay_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "cc", 'echo "error: $TMPDIR $LC_ALL" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(EdgecError, match=f"error: {tmp_path} C"):
        build_library(tmp_path, "net", load_device("host"), members("net", False))
