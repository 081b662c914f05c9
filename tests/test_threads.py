"""Threads that share a kernel: the generated pool, the caller's hook, and that neither changes a bit of the result."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from edgec.bundle import Bundle, build_bundle, load_bundle
from edgec.errors import EdgecError
from edgec.lowering.lower import lower
from edgec.plan import PlanBuilder
from edgec.targets.cpu.emit import emit
from edgec.targets.device import Device, load_device
from tests import zoo
from tests.hand_models import DEVICES, Kernels, Model, build

ROWS, COLUMNS = 37, 500
# Phase 0 leaves the first element of x in memory that all threads see; phase 1 has a task for each row.
SOURCE = """
#include <stdint.h>
void rows_mix_0(const float *x, float *y, float *scratch) { (void)y; scratch[0] = x[0]; }
void rows_mix_1(const float *x, float *y, float *scratch, int32_t begin, int32_t end) {
  for (int i = begin; i < end; i++)
    for (int j = 0; j < 500; j++) y[i * 500 + j] = x[i * 500 + j] * (float)(i + 1) + scratch[0];
}
void rows_small(const float *x, float *y, int32_t begin, int32_t end) {
  for (; begin < end; begin++) y[begin] = x[begin];
}
"""


def rows_model() -> Model:
    """y = x times the number of its row, plus x[0, 0]; and z, the first values of y, which is too little to share."""
    builder = PlanBuilder("rows")
    x = builder.add_input("x", (ROWS, COLUMNS), "float32")
    y, z = builder.add_temp((ROWS, COLUMNS), "float32"), builder.add_temp((4,), "float32")
    builder.add_step("rows_mix", [x, y], layer="mix", scratch=[4])
    builder.add_step("rows_small", [builder.alias(y, (4,)), z], layer="small")
    builder.add_output("y", y, (ROWS, COLUMNS), "float32")
    builder.add_output("z", z, (4,), "float32")
    f = "float32"
    kernels = Kernels(
        {"rows_mix": (f, f, f), "rows_small": (f, f)},
        {"rows_mix": frozenset({0}), "rows_small": frozenset({0})},
        {"rows_mix": (("rows_mix_0", 0), ("rows_mix_1", ROWS)), "rows_small": (("rows_small", 4),)},
    )

    def reference(x: np.ndarray) -> tuple[np.ndarray, ...]:
        y = x * np.arange(1, ROWS + 1, dtype=np.float32)[:, None] + x[0, 0]
        return y, y.ravel()[:4]

    example = np.random.default_rng(0).integers(-100, 100, (ROWS, COLUMNS)).astype(np.float32)
    return Model(builder.finish(), kernels, SOURCE, (example,), reference)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(rows_model(), tmp_path_factory.mktemp("threads") / "rows", threads=2)


# -- generated code ----------------------------------------------------------------------------------------------------


@pytest.mark.pure
def test_only_kernels_with_enough_work_are_shared() -> None:
    model = rows_model()
    text = emit(model.plan, model.kernels, load_device("host"), None, "1", 3)
    calls = text["model.c"].decode().partition("(void)_w;\n")[2]
    assert calls == (
        "    {\n"
        "        const void *const _p[] = {x, y, _a + 0};\n"
        "        rows_mix_0((const float *)(x), (float *)(y), (float *)(_a + 0));\n"
        "        rows_share(37, rows_mix_1_range, _p);\n"
        "    } /* mix */\n"
        "    rows_small((const float *)(y), (float *)(z), 0, 4); /* small */\n"
        "    return ROWS_OK;\n}\n"
    )
    assert "#define ROWS_THREADS 3\n" in text["rows.h"].decode()
    assert "rows_set_threads(ROWS_THREADS)" in text["example.c"].decode()
    assert "pthread" not in text["model.c"].decode() + text["runner.c"].decode()


# -- from Python -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_any_number_of_threads_gives_the_same(device: str, tmp_path: Path) -> None:
    model = rows_model()
    bundle = build(model, tmp_path / "rows", load_device(device), threads=2)
    assert bundle.manifest["threads"] == bundle.threads == load_bundle(bundle.path).threads == 2
    (x,) = model.inputs
    want = model.reference(x)
    for threads in (2, 1, 3, 1000, 1):
        bundle.use_threads(threads)
        for a, b in zip(bundle.run(np.concatenate([x, x])), want, strict=True):
            np.testing.assert_array_equal(a, np.concatenate([b, b]))
    assert bundle.selftest()
    with pytest.raises(EdgecError, match="cannot run on 0 threads"):
        bundle.use_threads(0)


BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, BODY, ctypes.c_void_p)


class Hooked:
    """The library of a bundle, whose kernels are done by a hook of ours in `parts` ranges, the last one first."""

    def __init__(self, bundle: Bundle, parts: int) -> None:
        self.calls: list[tuple[int | None, int]] = []
        self.parts = parts
        self.hook = HOOK(self._all)
        bundle._open()
        library = bundle._library
        assert library is not None
        assert library[f"{bundle.name}_set_parallel_for"](self.hook, ctypes.c_void_p(77)) == 0

    def _all(self, user: int | None, tasks: int, body: object, arg: int | None) -> None:
        self.calls.append((user, tasks))
        cuts = [tasks * part // self.parts for part in range(self.parts + 1)]
        for begin, end in reversed(list(itertools.pairwise(cuts))):
            body(arg, begin, end)  # type: ignore[operator]


@pytest.mark.host
def test_a_hook_is_given_all_tasks(tmp_path: Path) -> None:
    model = rows_model()
    bundle = build(model, tmp_path / "rows")
    hooked = Hooked(bundle, 5)
    for a, b in zip(bundle.run(*model.inputs), model.reference(*model.inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert hooked.calls == [(77, ROWS)]
    bundle.use_threads(1)
    bundle.run(*model.inputs)
    assert len(hooked.calls) == 1, "another choice of threads replaces the hook"


@pytest.mark.host
@pytest.mark.parametrize("name", ["conv_bn_relu", "squeeze_excite", "vit_block"])
def test_compiled_networks_give_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that can be shared is, in 1, 2 and 3 parts."""
    monkeypatch.setattr("edgec.targets.cpu.emit.WORTH_SHARING", 0)
    program, device = zoo.program(name), load_device("host")
    bundle = build_bundle(lower(program, device), device, tmp_path / "bundle")
    x = torch.rand(2, *program.inputs[0].shape[1:], generator=torch.Generator().manual_seed(0)).numpy()
    alone = bundle.run(x)
    for parts in (1, 2, 3):
        hooked = Hooked(bundle, parts)
        np.testing.assert_array_equal(bundle.run(x), alone)
        assert hooked.calls
    for threads in (2, 3):
        bundle.use_threads(threads)
        np.testing.assert_array_equal(bundle.run(x), alone)


# -- the pool, in C ----------------------------------------------------------------------------------------------------

PROGRAM = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "rows.h"
#ifdef SANITIZE
const uint8_t rows_weights[64];
#endif
static float x[ROWS_X_SIZE], want[ROWS_Y_SIZE];
typedef struct { _Alignas(64) unsigned char arena[ROWS_ARENA_BYTES]; float y[ROWS_Y_SIZE], z[ROWS_Z_SIZE]; } Memory;
static int wrong(Memory *m) {
  memset(m->y, 0, sizeof m->y);
  return rows_run(x, m->y, m->z, m->arena) || memcmp(m->y, want, sizeof want) != 0;
}
static void *many(void *memory) {
  intptr_t failures = 0;
  for (int i = 0; i < 300; i++) failures += wrong((Memory *)memory);
  return (void *)failures;
}
int main(void) {
  static Memory a, b;
  for (int i = 0; i < ROWS_X_SIZE; i++) x[i] = (float)(i % 91 - 40);
  if (rows_run(x, want, a.z, a.arena)) return 1;
  if (rows_set_threads(0) != ROWS_BAD_THREADS || rows_set_threads(-1) != ROWS_BAD_THREADS) return 2;
  const int numbers[] = {1, 2, 4, 3, 3, 100, 1, 2};
  for (int i = 0; i < (int)(sizeof numbers / sizeof *numbers); i++) {
    if (rows_set_threads(numbers[i]) != EXPECT(numbers[i])) return 3;
    for (int k = 0; k < 200; k++) {
      if (wrong(&a)) return 4;
      if (k % 40 == 0) usleep(300); /* longer than the workers spin */
    }
  }
  /* Two runs at the same time: one has the workers. */
  pthread_t other;
  void *failures;
  if (pthread_create(&other, NULL, many, &b) || many(&a)) return 5;
  if (pthread_join(other, &failures) || failures) return 6;
#ifndef SANITIZE
  const pid_t child = fork();
  if (child == 0) {
    if (many(&a)) _exit(7);
    _exit(rows_set_threads(2) == EXPECT(2) && !many(&a) ? 0 : 8);
  }
  int status;
  if (waitpid(child, &status, 0) != child || status) return 9;
#endif
  if (many(&a) || rows_set_threads(1) || many(&a)) return 10;
  printf("ok");
  return 0;
}
"""


def compile_and_run(
    folder: Path, sources: list[str], flags: list[str], bundle: Bundle
) -> subprocess.CompletedProcess[str]:
    (folder / "program.c").write_text(PROGRAM)
    (folder / "kernels.c").write_text(SOURCE)
    command = ["cc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *flags, f"-I{bundle.path / 'include'}"]
    command += ["program.c", *sources, "-lm", "-pthread", "-o", "program"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run([folder / "program"], capture_output=True, text=True, timeout=240)


@pytest.mark.host
def test_the_pool(rows: Bundle, tmp_path: Path) -> None:
    """With more threads than this machine may have CPUs."""
    sources = [str(rows.path / "src" / "threads.c"), str(rows.path / "lib" / "librows.a")]
    done = compile_and_run(tmp_path, sources, ["-DEDGEC_CPUS=4", "-DEXPECT(n)=0"], rows)
    assert (done.returncode, done.stdout) == (0, "ok")


@pytest.mark.host
def test_the_pool_of_the_library(rows: Bundle, tmp_path: Path) -> None:
    done = compile_and_run(tmp_path, [str(rows.path / "lib" / "librows.a")], ["-DEXPECT(n)=0"], rows)
    assert (done.returncode, done.stdout) == (0, "ok")


@pytest.mark.host
def test_without_threads(rows: Bundle, tmp_path: Path) -> None:
    """All of it works, on one thread."""
    sources = [str(rows.path / "src" / "threads.c"), str(rows.path / "lib" / "librows.a")]
    flags = ["-DEDGEC_NO_THREADS", "-DEXPECT(n)=((n) > 1 ? ROWS_NO_THREADS : 0)"]
    done = compile_and_run(tmp_path, sources, flags, rows)
    assert (done.returncode, done.stdout) == (0, "ok")


@pytest.mark.host
@pytest.mark.slow
def test_the_pool_has_no_data_races(rows: Bundle, tmp_path: Path) -> None:
    """All but the weights compiled for ThreadSanitizer."""
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = ["cc", "-fsanitize=thread", str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True).returncode or subprocess.run([tmp_path / "probe"]).returncode:
        pytest.skip("no ThreadSanitizer here")
    sources = [str(rows.path / "src" / "threads.c"), str(rows.path / "src" / "model.c"), "kernels.c"]
    flags = ["-fsanitize=thread", "-DSANITIZE", "-DEDGEC_CPUS=3", "-DEXPECT(n)=0"]
    done = compile_and_run(tmp_path, sources, flags, rows)
    assert (done.returncode, done.stdout) == (0, "ok"), done.stderr


@pytest.mark.pure
@pytest.mark.parametrize("standard", ["c99", "gnu17"])
def test_the_pool_compiles_without_warnings_for_every_compiler(standard: str, tmp_path: Path) -> None:
    model = rows_model()
    devices: list[Device] = [load_device(name) for name in ("host", "cortex-a72", "cortex-a7")]
    for device in (d for d in devices if shutil.which(d.cc)):
        for name, data in emit(model.plan, model.kernels, device, None, "1").items():
            (tmp_path / name).write_bytes(data)
        for macro in ([], ["-DEDGEC_NO_THREADS"]):
            strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wstrict-prototypes", "-Werror"]
            command = [device.cc, *device.cflags, f"-std={standard}", "-O2", *strict, *macro, "-c"]
            done = subprocess.run([*command, "threads.c", "model.c"], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
