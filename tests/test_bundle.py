"""Bundles of hand-made models: built, linked into C programs, run natively and in emulators, broken in many ways."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgec import bundle as bundle_module
from edgec.bundle import Bundle, build_bundle, load_bundle, seal, verify_freestanding
from edgec.errors import EdgecError, ToolchainMissing
from edgec.plan import PlanBuilder
from edgec.targets.cpu import toolchain
from edgec.targets.cpu.emit import SelfTest
from edgec.targets.device import load_device
from tests.hand_models import DEVICES, Model, build, dense_model, shift_model

FILES = (
    "bin/runner",
    "cmake/net-config.cmake",
    "include/net.h",
    "lib/libnet.a",
    "lib/libnet.so",
    "manifest.json",
    "src/example.c",
    "src/model.c",
    "src/runner.c",
    "src/threads.c",
    "weights.bin",
)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The dense model for this machine; tests do not change its folder."""
    return build(dense_model(), tmp_path_factory.mktemp("bundles") / "net", meta={"passes": "fold-bn"})


def copied(bundle: Bundle, folder: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(bundle.path, folder / "copy")
    return folder / "copy"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def compile_and_run(
    folder: Path, source: str, bundles: Sequence[Bundle], *, cc: str = "cc", flags: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A C program linked with the static libraries of `bundles`."""
    name = "program.cpp" if cc == "g++" else "program.c"
    (folder / name).write_text(source)
    includes = [f"-I{b.path / 'include'}" for b in bundles]
    libraries = [str(b.path / "lib" / f"lib{b.name}.a") for b in bundles]
    command = [cc, "-O1", "-Wall", "-Wextra", "-Werror", *flags, *includes, name, *libraries, "-lm", "-o", "program"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([folder / "program"], capture_output=True, text=True, timeout=60)


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_bundle_gives_what_the_model_gives(device: str, tmp_path: Path) -> None:
    model = dense_model()
    bundle = build(model, tmp_path / "net", load_device(device))
    assert files(tmp_path / "net") == list(FILES)
    batch = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    np.testing.assert_allclose(bundle.run(batch), model.reference(batch)[0], rtol=1e-5, atol=1e-6)
    assert bundle.selftest()
    assert load_bundle(tmp_path / "net").manifest == bundle.manifest


@pytest.mark.parametrize("device", DEVICES)
def test_several_inputs_and_outputs(device: str, tmp_path: Path) -> None:
    model = shift_model()
    bundle = build(model, tmp_path / "shift", load_device(device), selftest=model.selftest(0.0))
    x = np.random.default_rng(2).standard_normal((3, 6)).astype(np.float32)
    by = np.array([0, 5, 2])
    got = bundle.run(x, by)
    assert isinstance(got, tuple)
    for a, b in zip(got, model.reference(x, by), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert bundle.selftest()


@pytest.mark.host
def test_manifest(net: Bundle) -> None:
    manifest = json.loads((net.path / "manifest.json").read_text())
    assert manifest == net.manifest
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    assert manifest["inputs"] == [{"name": "x", "shape": [1, 4], "dtype": "float32"}]
    assert manifest["outputs"] == [{"name": "y", "shape": [1, 6], "dtype": "float32"}]
    assert (manifest["arena_bytes"], manifest["arena_lower_bound"], manifest["arena_align"]) == (128, 128, 64)
    assert (manifest["weight_bytes"], manifest["macs"]) == (6 * 4 * 4 + 6 * 4, 24)
    assert (manifest["target"], manifest["runner"]) == ("host", "native")
    assert manifest["selftest"] == {"tolerance": 1e-6}
    assert manifest["meta"] == {"passes": "fold-bn"}
    # What the pool of threads takes, which only the shared library always has in it.
    pool = {"clock_gettime", "getpid", "sched_getaffinity", "__sched_cpucount", "sigfillset", "sysconf"}
    found = {s for s in manifest["symbols"] if not s.startswith("pthread_")}
    assert found - pool <= {"memcpy", "memset", "memcmp"}
    assert manifest["threads"] == 1
    assert 100 < manifest["code_bytes"] < 10000


@pytest.mark.parametrize("device", DEVICES)
def test_equal_inputs_give_equal_bytes(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, model = load_device(device), dense_model()
    first = build(model, tmp_path / "one" / "net", target).path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    second = build(dense_model(), Path("a longer name") / "net", target).path
    assert files(first) == files(second) == list(FILES)
    for name in FILES:
        data = (first / name).read_bytes()
        assert data == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in data


@pytest.mark.host
def test_without_selftest(tmp_path: Path) -> None:
    bundle = build(dense_model(), tmp_path / "net", selftest=None)
    assert bundle.manifest["selftest"] is None
    assert bundle.run(np.zeros((1, 4), np.float32)).shape == (1, 6)
    with pytest.raises(EdgecError, match="bundle net: has no self-test"):
        bundle.selftest()


# -- where it goes -----------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    build(dense_model(), folder)
    before = {name: (folder / name).read_bytes() for name in FILES}
    with pytest.raises(EdgecError) as caught:
        build(dense_model(), folder)
    assert str(caught.value) == f"{folder}: output exists; choose another folder or give --force"
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.mark.host
def test_force_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    build(dense_model("first"), folder)
    assert build(dense_model("second"), folder, force=True).name == "second"
    assert not [name for name in files(folder) if "first" in name]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("precious")
    with pytest.raises(EdgecError, match="output exists and is not a bundle; --force only replaces bundles"):
        build(dense_model(), other, force=True)
    with pytest.raises(EdgecError, match="output exists and is not a bundle"):
        build(dense_model(), other / "chapter1.txt", force=True)
    assert files(tmp_path / "thesis") == ["chapter1.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def break_build(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(toolchain, "build_library", fail)


@pytest.mark.host
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(errno.ENOSPC, "No space left on device"), EdgecError, "no space left on the disk; free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), EdgecError, "no space left on the disk; free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), EdgecError, "cannot be written: Permission denied"),
        (EdgecError("does not compile"), EdgecError, "does not compile"),
    ],
)
@pytest.mark.parametrize("replacing", [False, True])
def test_a_failed_build_leaves_everything_as_it_was(
    error: BaseException,
    raised: type[BaseException],
    message: str,
    replacing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "new" / "folders" / "net"
    if replacing:
        build(dense_model(), folder)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    break_build(monkeypatch, error)
    with pytest.raises(raised, match=message) as caught:
        build(dense_model(), folder, force=True)
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert replacing or not list(tmp_path.iterdir())


@pytest.mark.host
def test_a_failed_move_brings_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "net"
    build(dense_model(), folder)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(EdgecError, match="cannot be written: Input/output error"):
        build(dense_model("other"), folder, force=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert Bundle.load(folder).selftest()


@pytest.mark.host
def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgecError, match="cannot be written"):
        build(dense_model(), tmp_path / "file" / "net")


@pytest.mark.pure
def test_a_missing_compiler_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    model = dense_model()
    with pytest.raises(ToolchainMissing, match="apt-get install gcc"):
        bundle_module.assemble(model.plan, model.kernels, [], load_device("host"), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.host
@pytest.mark.parametrize("name", ["model", "kernels", "runner", "selftest", "weights", "example", "obj", "main", "lib"])
def test_model_names_do_not_clash_with_files(name: str, tmp_path: Path) -> None:
    bundle = build(dense_model(name), tmp_path / "out")
    assert bundle.selftest()
    np.testing.assert_allclose(bundle.run(dense_model(name).inputs[0]), dense_model(name).selftest().outputs[0], 1e-5)


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("count", [0, 1, 2])
def test_any_number_of_samples(net: Bundle, count: int) -> None:
    assert net.run(np.zeros((count, 4), np.float32)).shape == (count, 6)


@pytest.mark.host
def test_arrays_of_another_layout(net: Bundle) -> None:
    x = np.random.default_rng(3).standard_normal((8, 4)).astype(np.float32)
    want = net.run(x)
    raw = np.zeros(x.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(x.tobytes(), np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(8, 4)
    assert not unaligned.flags.aligned
    for same in (np.asfortranarray(x), unaligned, x.astype(np.float64), x.astype(">f4"), x[::-1][::-1], x.tolist()):
        np.testing.assert_array_equal(net.run(same), want)
    np.testing.assert_array_equal(net.run(x[::2]), want[::2])
    (array,) = net._check([unaligned])
    assert array.flags.aligned


@pytest.mark.host
def test_plain_arrays_are_not_copied(net: Bundle) -> None:
    x = np.zeros((3, 4), np.float32)
    x.flags.writeable = False
    bundle = Bundle(net.path, net.manifest)
    real, seen = bundle._open(), []

    def spy(*pointers: int) -> int:
        seen.append(pointers)
        return real(*pointers)

    bundle._function = spy
    y = bundle.run(x)
    assert [p[0] for p in seen] == [x.ctypes.data + 16 * i for i in range(3)]
    assert [p[1] for p in seen] == [y.ctypes.data + 24 * i for i in range(3)]
    assert len({p[2] for p in seen}) == 1 and seen[0][2] % 64 == 0


@pytest.mark.host
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "bundle net: takes 1 inputs, got 0"),
        ((np.zeros((1, 4), np.float32),) * 2, "bundle net: takes 1 inputs, got 2"),
        ((np.zeros((1, 5), np.float32),), "input 'x' of bundle net: has shape (1, 5), expected (n, 4)"),
        ((np.zeros(4, np.float32),), "input 'x' of bundle net: has shape (4,), expected (n, 4)"),
        ((np.float32(1),), "input 'x' of bundle net: has shape (), expected (n, 4)"),
        ((np.zeros((1, 4), np.uint8),), "input 'x' of bundle net: has dtype uint8, expected float32; prepare the data"),
        ((np.zeros((1, 4), bool),), "input 'x' of bundle net: has dtype bool, expected float32"),
        ((np.zeros((1, 4), complex),), "input 'x' of bundle net: has dtype complex128, expected float32"),
        ((np.full((1, 4), "a"),), "input 'x' of bundle net: has dtype <U1, expected float32"),
    ],
)
def test_wrong_inputs(net: Bundle, inputs: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(EdgecError) as caught:
        net.run(*inputs)
    assert str(caught.value).startswith(message)


@pytest.mark.host
def test_inputs_of_different_lengths_and_integers(tmp_path: Path) -> None:
    bundle = build(shift_model(), tmp_path / "shift")
    x = np.zeros((2, 6), np.float32)
    with pytest.raises(EdgecError, match="bundle shift: inputs have different numbers of samples"):
        bundle.run(x, np.zeros(3, np.int64))
    with pytest.raises(EdgecError, match="input 'by' of bundle shift: has dtype float32, expected int64"):
        bundle.run(x, np.zeros(2, np.float32))
    for dtype in (np.int32, np.uint8, np.int64):
        np.testing.assert_array_equal(bundle.run(x, np.array([1, 0], dtype))[1][:, 0], [1, 0])
    with pytest.raises(EdgecError, match="has dtype uint64, expected int64"):
        bundle.run(x, np.zeros(2, np.uint64))


def fixed_batch_model(batch: int) -> Model:
    """The dense model's relu as a model of its own, for a batch that is part of the shape."""
    base = dense_model("batched")
    builder = PlanBuilder("batched")
    x = builder.add_input("x", (batch, 6 // batch), "float32")
    y = builder.add_temp((batch, 6 // batch), "float32")
    builder.add_step("batched_relu", [x, y])
    builder.add_output("y", y, (batch, 6 // batch), "float32")
    example = np.arange(-3, 3, dtype=np.float32).reshape(batch, -1)
    return Model(builder.finish(), base.kernels, base.source, (example,), lambda x: (np.maximum(x, 0),))


@pytest.mark.host
def test_a_model_with_a_fixed_batch(tmp_path: Path) -> None:
    bundle = build(fixed_batch_model(3), tmp_path / "batched")
    x = np.random.default_rng(4).standard_normal((9, 2)).astype(np.float32)
    np.testing.assert_array_equal(bundle.run(x), np.maximum(x, 0))
    with pytest.raises(EdgecError, match="has 4 samples, the model takes 3 at a time"):
        bundle.run(x[:4])


def scalar_model() -> Model:
    """A scalar in, the same scalar out."""
    builder = PlanBuilder("scalar")
    builder.add_output("y", builder.add_input("x", (), "float32"), (), "float32")
    base = dense_model()
    return Model(builder.finish(), base.kernels, base.source, (np.float32(3).reshape(()),), lambda x: (x,))


@pytest.mark.host
def test_scalars(tmp_path: Path) -> None:
    bundle = build(scalar_model(), tmp_path / "scalar")
    got = bundle.run(np.float32(2.5))
    assert got.shape == () and got == np.float32(2.5)
    with pytest.raises(EdgecError, match=r"has shape \(1,\), expected \(\)"):
        bundle.run(np.zeros(1, np.float32))


@pytest.mark.host
def test_threads_share_a_bundle(net: Bundle) -> None:
    model, bundle = dense_model(), Bundle(net.path, net.manifest)
    real, barrier = bundle._open(), threading.Barrier(4)
    arenas: dict[int, set[int]] = {}
    failures = []

    def spy(*pointers: int) -> int:
        arenas.setdefault(threading.get_ident(), set()).add(pointers[-1])
        return real(*pointers)

    def work(seed: int) -> None:
        barrier.wait()
        x = np.random.default_rng(seed).standard_normal((1000, 4)).astype(np.float32)
        if not np.allclose(bundle.run(x), model.reference(x)[0], rtol=1e-5, atol=1e-6):
            failures.append(seed)
        barrier.wait()

    bundle._function = spy
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [len(a) for a in arenas.values()] == [1] * 4 and len(set.union(*arenas.values())) == 4


@pytest.mark.host
def test_a_bundle_compiled_again_in_its_place_is_the_new_one(tmp_path: Path) -> None:
    """The dynamic loader would hand out the library it has loaded from that path before."""
    x = dense_model().inputs[0]
    model, twin = dense_model(), dense_model(fault="for (int o = 0; o < 6; o++) y[o] += 100")
    old = build(model, tmp_path / "net")
    first = old.run(x)
    build(twin, tmp_path / "net", force=True)
    w, b = (model.plan.constants[name].array for name in ("c0", "c1"))
    np.testing.assert_allclose(load_bundle(tmp_path / "net").run(x), x @ w.T + b + 100, 1e-5)
    np.testing.assert_array_equal(old.run(x), first)


@pytest.mark.host
def test_loading_needs_neither_torch_nor_tvm(net: Bundle) -> None:
    code = (
        "import sys, numpy, edgec\n"
        f"b = edgec.load_bundle({str(net.path)!r})\n"
        "assert b.run(numpy.zeros((2, 4), numpy.float32)).shape == (2, 6) and b.selftest()\n"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'jinja2', 'onnx', 'elftools'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.qemu("cortex-a72")
def test_a_crash_in_the_emulator_is_an_error(tmp_path: Path) -> None:
    model = dense_model(fault="*(volatile int *)8 = 0")
    bundle = build(model, tmp_path / "net", load_device("cortex-a72"))
    with pytest.raises(EdgecError, match=r"qemu-aarch64 -cpu cortex-a72 runner: ended with status -11: .*[Ss]eg"):
        bundle.run(model.inputs[0])
    with pytest.raises(EdgecError, match=r"self-test of bundle net: ended with status -11"):
        bundle.selftest()


@pytest.mark.qemu("cortex-a72")
def test_a_missing_emulator_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = build(dense_model(), tmp_path / "net", load_device("cortex-a72"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (bundle.selftest, lambda: bundle.run(dense_model().inputs[0])):
        with pytest.raises(ToolchainMissing, match="'qemu-aarch64' is not installed; apt-get install qemu-user"):
            call()


# -- loading broken bundles --------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "has a corrupt manifest.json; compile the model again"),
        ("manifest.json", "[]", "has a corrupt manifest.json; compile the model again"),
        ("manifest.json", "{}", "has a corrupt manifest.json; compile the model again"),
        ("manifest.json", '{"schema": 1}', "has a corrupt manifest.json (no name); compile the model again"),
        ("manifest.json", '{"schema": 9}', "has schema 9, this edgec reads 1; compile the model again"),
        ("manifest.json", None, "is not a bundle (no manifest.json); give a folder made by edgec compile"),
        ("lib/libnet.so", "", "file lib/libnet.so was changed after the compile; compile the model again"),
        ("bin/runner", None, "file bin/runner is missing; compile the model again"),
    ],
)
def test_broken_bundles(net: Bundle, name: str, content: str | None, message: str, tmp_path: Path) -> None:
    folder = copied(net, tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(EdgecError) as caught:
        Bundle.load(folder)
    assert str(caught.value) == f"{folder}: {message}"


@pytest.mark.pure
def test_not_a_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(EdgecError, match="nothing: does not exist; give a folder made by edgec compile"):
        load_bundle(tmp_path / "nothing")
    (tmp_path / "model.pt2").write_bytes(b"PK")
    with pytest.raises(EdgecError, match=r"model\.pt2: is a file, not a bundle"):
        load_bundle(tmp_path / "model.pt2")


@pytest.mark.host
def test_every_flipped_byte_is_noticed(net: Bundle, tmp_path: Path) -> None:
    folder = copied(net, tmp_path)
    for name in FILES:
        if name == "manifest.json":
            continue
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(EdgecError, match=f"file {name} was changed"):
            Bundle.load(folder)
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    Bundle.load(folder)


@pytest.mark.host
def test_sealed_files_are_part_of_the_bundle(net: Bundle, tmp_path: Path) -> None:
    folder = copied(net, tmp_path)
    (folder / "program.pt2").write_bytes(b"weights")
    seal(folder, ["program.pt2"])
    assert list(Bundle.load(folder).manifest["files"]) == sorted({*FILES, "program.pt2"} - {"manifest.json"})
    (folder / "program.pt2").write_bytes(b"others")
    with pytest.raises(EdgecError, match=r"file program\.pt2 was changed"):
        Bundle.load(folder)


@pytest.mark.host
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triple": "riscv64-linux-gnu"}, "bundle net: is compiled for riscv64, this machine is "),
        ({"cpu": "x86-64-v9"}, "bundle net: uses instructions of x86-64-v9, which this machine does not have; compile"),
        (
            {"features": ["+amx-fp64"]},
            "bundle net: uses instructions of +amx-fp64, which this machine does not have; compile",
        ),
    ],
)
def test_bundles_of_another_machine(net: Bundle, change: dict[str, str], message: str) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("levels of x86-64 are compared on x86-64 only")
    other = Bundle(net.path, {**net.manifest, **change})
    for call in (other.selftest, lambda: other.run(np.zeros((1, 4), np.float32))):
        with pytest.raises(EdgecError) as caught:
            call()
        assert str(caught.value).startswith(message)


@pytest.mark.host
def test_a_library_without_the_function(net: Bundle, tmp_path: Path) -> None:
    folder = copied(net, tmp_path)
    shutil.copy(build(dense_model("other"), tmp_path / "other").path / "lib" / "libother.so", folder / "lib/libnet.so")
    with pytest.raises(EdgecError, match=r"libnet\.so: does not load: .*net_run"):
        Bundle(folder, net.manifest).run(np.zeros((1, 4), np.float32))


# -- the C interface ---------------------------------------------------------------------------------------------------

CODES = """
#include <stdio.h>
#include <string.h>
#include "net.h"
static _Alignas(NET_ARENA_ALIGN) unsigned char arena[NET_SELFTEST_ARENA_BYTES + NET_ARENA_ALIGN];
int main(void) {
    float x[NET_X_SIZE] = {0}, y[NET_Y_SIZE] = {0};
    memset(arena, 0xff, sizeof arena);
    printf("%d %d %d %d ", net_run(x, y, arena), net_run(NULL, y, arena), net_run(x, NULL, arena), net_run(x, y, NULL));
    for (int i = 1; i < 64; i++) if (net_run(x, y, arena + i) != NET_MISALIGNED_ARENA) return 1;
    printf("%d %d %d", net_selftest(arena), net_selftest(NULL), net_selftest(arena + 4));
    for (int i = NET_SELFTEST_ARENA_BYTES; i < (int)sizeof arena; i++) if (arena[i] != 0xff) return 2;
    return 0;
}
"""


@pytest.mark.host
def test_error_codes(net: Bundle, tmp_path: Path) -> None:
    done = compile_and_run(tmp_path, CODES, [net], flags=["-std=c11"])
    assert (done.returncode, done.stdout) == (0, "0 -1 -1 -1 0 -1 -2")


def expected_plus(model: Model, delta: float) -> SelfTest:
    """A self-test whose expected output differs from the true one by `delta` of the largest value in one element."""
    inputs, (want,), _ = model.selftest()
    wrong = want.copy()
    wrong[0, 0] += np.float32(delta * np.abs(want).max())
    return SelfTest(inputs, (wrong,), 1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_selftest_tells_right_from_wrong(device: str, tmp_path: Path) -> None:
    model, target = dense_model(), load_device(device)
    for number, (delta, passes) in enumerate([(0.9e-3, True), (-0.9e-3, True), (1.1e-3, False), (-1.1e-3, False)]):
        bundle = build(model, tmp_path / str(number), target, selftest=expected_plus(model, delta))
        assert bundle.selftest() is passes, delta


@pytest.mark.host
def test_a_tampered_selftest_returns_its_code(tmp_path: Path) -> None:
    bundle = build(dense_model(), tmp_path / "net", selftest=expected_plus(dense_model(), 0.5))
    done = compile_and_run(tmp_path, CODES, [bundle], flags=["-std=c11"])
    assert (done.returncode, done.stdout) == (0, "0 -1 -1 -1 -3 -1 -2")
    library = ctypes.CDLL(str(bundle.path / "lib" / "libnet.so"))
    arena = np.empty(4096, np.uint8)
    assert library.net_selftest(ctypes.c_void_p(-(-arena.ctypes.data // 64) * 64)) == -3


@pytest.mark.host
@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "passes"),
    [
        (1.0, 1.0, 0.0, True),
        (1.0, np.nextafter(np.float32(1), np.float32(2)), 0.0, False),
        (np.inf, np.inf, 1e-3, True),
        (-np.inf, np.inf, 1e-3, False),
        (1.0, np.inf, 1e-3, False),
        (np.inf, 1.0, 1e-3, False),
        (np.nan, 1.0, 1e-3, False),
        (1.0, np.nan, 1e-3, False),
        (0.0, 0.0, 1e-3, True),
        (2e-3, 0.0, 1e-3, False),
        (5e-4, 0.0, 1e-3, True),
    ],
)
def test_selftest_of_special_values(
    given: float, expected: float, tolerance: float, passes: bool, tmp_path: Path
) -> None:
    values = [np.float32(v).reshape(()) for v in (given, expected)]
    bundle = build(scalar_model(), tmp_path / "scalar", selftest=SelfTest(values[:1], values[1:], tolerance))
    assert bundle.selftest() is passes


@pytest.mark.host
def test_an_infinity_does_not_hide_other_errors(tmp_path: Path) -> None:
    model = fixed_batch_model(1)
    x = np.array([[np.inf, 1, 2, 3, 4, 5]], np.float32)
    wrong = x.copy()
    wrong[0, 1] = 1.5
    assert not build(model, tmp_path / "wrong", selftest=SelfTest([x], [wrong], 1e-3)).selftest()
    assert build(model, tmp_path / "right", selftest=SelfTest([x], [x], 1e-3)).selftest()


TWO = """
#include <cstdio>
#include <thread>
#include "net.h"
#include "other.h"
alignas(64) static unsigned char a[NET_SELFTEST_ARENA_BYTES], b[NET_SELFTEST_ARENA_BYTES];
alignas(64) static unsigned char c[OTHER_SELFTEST_ARENA_BYTES];
static int failures[3];
int main() {
    std::thread one([] { for (int i = 0; i < 20000; i++) failures[0] += net_selftest(a) != NET_OK; });
    std::thread two([] { for (int i = 0; i < 20000; i++) failures[1] += net_selftest(b) != NET_OK; });
    for (int i = 0; i < 20000; i++) failures[2] += other_selftest(c) != OTHER_OK;
    one.join();
    two.join();
    std::printf("%d %d %d", failures[0], failures[1], failures[2]);
    return 0;
}
"""


@pytest.mark.host
def test_two_models_and_three_threads_in_one_cplusplus_program(net: Bundle, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    other = build(dense_model("other"), tmp_path / "other")
    done = compile_and_run(tmp_path, TWO, [net, other], cc="g++", flags=["-std=c++11", "-pthread"])
    assert (done.returncode, done.stdout) == (0, "0 0 0")


@pytest.mark.host
def test_example_compiles_with_the_command_it_names(net: Bundle, tmp_path: Path) -> None:
    folder = copied(net, tmp_path)
    (line,) = [x for x in (folder / "src" / "example.c").read_text().splitlines() if x.startswith(" *   cc ")]
    subprocess.run(line.removeprefix(" *   ").split(), cwd=folder, check=True)
    done = subprocess.run([folder / "example"], capture_output=True, text=True)
    expected = net.run(np.zeros((1, 4), np.float32))[0]
    lines = ["selftest: ok", *(f"y[{i}] = {value:g}" for i, value in enumerate(expected))]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines)


def symbols(*command: str) -> set[str]:
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if line and not line.endswith(":")}


@pytest.mark.parametrize("device", DEVICES)
def test_libraries_offer_the_interface_and_nothing_else(device: str, tmp_path: Path) -> None:
    target = load_device(device)
    bundle = build(dense_model(), tmp_path / "net", target)
    nm = toolchain.binutil(target, "nm")
    interface = {"net_run", "net_selftest", "net_set_threads", "net_set_parallel_for"}
    assert symbols(nm, "--defined-only", "--extern-only", str(bundle.path / "lib" / "libnet.a")) == interface
    assert symbols(nm, "--defined-only", "--dynamic", str(bundle.path / "lib" / "libnet.so")) == interface


@pytest.mark.host
def test_selftest_and_threads_are_left_out_of_programs_that_do_not_call_them(net: Bundle, tmp_path: Path) -> None:
    source = '#include "net.h"\nint main(void) { return net_run(NULL, NULL, NULL) != NET_NULL_POINTER; }\n'
    assert compile_and_run(tmp_path, source, [net]).returncode == 0
    found = symbols("nm", str(tmp_path / "program"))
    assert "net_dense" in found and not [name for name in found if "selftest" in name or "pthread" in name]
    assert "net_set_threads" not in found


CMAKE = """
cmake_minimum_required(VERSION 3.13)
project(app C)
find_package(net CONFIG REQUIRED)
find_package(net CONFIG REQUIRED)
foreach(kind static shared)
  add_executable(app_${kind} app.c)
  target_link_libraries(app_${kind} PRIVATE net::${kind})
endforeach()
"""


@pytest.mark.host
def test_cmake_package(net: Bundle, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed (apt-get install cmake)")
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    shutil.copy(net.path / "src" / "example.c", tmp_path / "app.c")
    for step in (["-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={net.path}"], ["--build", "build"]):
        done = subprocess.run(["cmake", *step], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    outputs = [
        subprocess.run([tmp_path / "build" / f"app_{kind}"], capture_output=True, text=True, check=True).stdout
        for kind in ("static", "shared")
    ]
    assert outputs[0] == outputs[1] and outputs[0].startswith("selftest: ok\n")
    needed = subprocess.run(["readelf", "-d", tmp_path / "build" / "app_shared"], capture_output=True, text=True).stdout
    assert "[libnet.so]" in needed


# -- the runner program ------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_runner_program(net: Bundle, tmp_path: Path) -> None:
    program = str(net.path / "bin" / "runner")
    x = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
    x.tofile(tmp_path / "in")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True)

    assert run("in", "out", "3").returncode == 0
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.float32).reshape(3, 6), net.run(x))
    assert run("in", "again", "2", "5").returncode == 0
    np.testing.assert_array_equal(np.fromfile(tmp_path / "again", np.float32).reshape(2, 6), net.run(x[:2]))
    for arguments, status, message in (
        (("in", "out", "4"), 5, "runner: in ends before sample 3\n"),
        (("none", "out", "1"), 5, "runner: cannot open none\n"),
        (("in", "no/out", "1"), 5, "runner: cannot open no/out\n"),
        (("in", "/dev/full", "3"), 5, "runner: cannot write /dev/full\n"),
        (("in", "out", "many"), 4, "runner: many is not a number from 0\n"),
        (("in", "out", "-1"), 4, "runner: -1 is not a number from 0\n"),
        (("in", "out", "1", "0"), 4, "runner: 0 is not a number from 1\n"),
        (("in", "out", "1", "1", "0"), 4, "runner: 0 is not a number from 1\n"),
        (("in",), 4, "usage: runner INPUT OUTPUT COUNT [REPEAT [THREADS]] | runner --selftest [THREADS]\n"),
        ((), 4, "usage: runner INPUT OUTPUT COUNT [REPEAT [THREADS]] | runner --selftest [THREADS]\n"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (status, message), arguments
    assert run("--selftest").stdout == run("--selftest", "2").stdout == "0\n"
    assert run("--selftest", "x").returncode == 4


# -- nothing of TVM ----------------------------------------------------------------------------------------------------


def shared_library(folder: Path, source: str, *flags: str) -> Path:
    (folder / "library.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "library.c", "-o", "library.so", *flags], cwd=folder, check=True)
    return folder / "library.so"


@pytest.mark.host
def test_libraries_take_functions_from_the_c_library_only(tmp_path: Path) -> None:
    math = "#include <math.h>\n#include <string.h>\nfloat f(float *x) { memcpy(x, x + 9, x[1]); return expf(*x); }\n"
    assert set(verify_freestanding(shared_library(tmp_path, math, "-lm"))) == {"expf", "memcpy"}
    runtime = "void TVMBackendAllocWorkspace(void); void f(void) { TVMBackendAllocWorkspace(); }\n"
    with pytest.raises(EdgecError, match="expects TVMBackendAllocWorkspace from nowhere; this is a bug in edgec"):
        verify_freestanding(shared_library(tmp_path, runtime))


@pytest.mark.host
def test_libraries_need_no_other_library(tmp_path: Path) -> None:
    other = shared_library(tmp_path, "void TVMThing(void) {}\n").rename(tmp_path / "libtvm.so")
    user = shared_library(tmp_path, "void TVMThing(void); void f(void) { TVMThing(); }\n", str(other.name))
    with pytest.raises(EdgecError, match=r"needs libtvm\.so; this is a bug in edgec"):
        verify_freestanding(user)


# -- with the real code generator --------------------------------------------------------------------------------------


@pytest.mark.host
def test_build_bundle_compiles_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build_bundle` is `assemble` with the object that the code generator makes."""
    import tvm

    from edgec.lowering.lower import Lowered
    from edgec.targets.codegen import lower_kernels
    from edgec.targets.kernels.transpose import Transpose

    device = load_device("host")
    spec = Transpose((1, 2, 3), (0, 2, 1), "float32")
    kernels = lower_kernels(tvm.IRModule({"turn_k0": spec.prim_func(device)}), device)
    builder = PlanBuilder("turn")
    x, y = builder.add_input("x", (1, 2, 3), "float32"), builder.add_temp((1, 3, 2), "float32")
    builder.add_step("turn_k0", [x, y], scratch=kernels.scratch["turn_k0"])
    builder.add_output("y", y, (1, 3, 2), "float32")
    array = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    selftest = SelfTest([array], [array.transpose(0, 2, 1)], 0.0)
    bundle = build_bundle(Lowered(builder.finish(), kernels, ()), device, tmp_path / "turn", selftest=selftest)
    np.testing.assert_array_equal(bundle.run(array), array.transpose(0, 2, 1))
    assert bundle.selftest()
