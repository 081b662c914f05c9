"""The program in a microcontroller bundle: samples in and out, self-test, counts, stack, overruns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgec.bundle import Bundle
from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.device import Device, load_device
from edgec.targets.mcu import machine, runner
from edgec.targets.mcu.runner import Tensor

DEVICES = [pytest.param(n, marks=pytest.mark.qemu(n)) for n in ("cortex-m0plus", "cortex-m33", "cortex-m55", "rv32imc")]

HEADER = """
#include <stddef.h>
#include <stdint.h>
#define TOY_ARENA_BYTES 12
#define TOY_ARENA_ALIGN 4
int toy_run(const int8_t *codes, const float *factor, float *products, int8_t *odd, void *arena);
int toy_selftest(void *arena);
"""
# Two steps: the codes into the arena; products and the first three codes. WRONG is written there by some tests.
SOURCE = """
#include "toy.h"
#ifndef EDGEC_STEP
#define EDGEC_STEP(i)
#endif
static const int8_t weights[16] = {1, 2, 3, 4, 5};

static __attribute__((noinline)) void copy(const int8_t *x, int8_t *y) {
    for (int i = 0; i < 5; i++) y[i] = (int8_t)(x[i] + weights[i]);
}

static __attribute__((noinline)) void multiply(const int8_t *x, const float *f, float *y, int8_t *odd) {
    volatile int8_t room[256];
    for (int i = 0; i < 256; i++) room[i] = x[i % 5];
    for (int i = 0; i < 5; i++) y[i] = *f * (float)room[i];
    for (int i = 0; i < 3; i++) odd[i] = room[i];
}

int toy_run(const int8_t *codes, const float *factor, float *products, int8_t *odd, void *arena) {
    EDGEC_STEP(0) copy(codes, (int8_t *)arena);
    EDGEC_STEP(1) multiply((int8_t *)arena, factor, products, odd);
    WRONG
    EDGEC_STEP(2)
    return 0;
}
"""
SELFTEST = """
#include "toy.h"
int toy_selftest(void *arena) {
    const int8_t codes[5] = {1, 1, 1, 1, 1};
    const float factor = 2;
    float products[5];
    int8_t odd[3];
    const int status = toy_run(codes, &factor, products, odd, arena);
    return status ? status : products[4] == EXPECTED ? 0 : -3;
}
"""
INPUTS = (Tensor((5,), "int8"), Tensor((1,), "float32"))
OUTPUTS = (Tensor((5,), "float32"), Tensor((3,), "int8"))


def build(root: Path, device: Device, wrong: str = "", expected: str = "12.0f") -> Path:
    (root / "src").mkdir(parents=True)
    (root / "src" / "toy.h").write_text(HEADER)
    (root / "src" / "toy.c").write_text(SOURCE.replace("WRONG", wrong))
    (root / "src" / "toy_selftest.c").write_text(SELFTEST.replace("EXPECTED", expected))
    return runner.build_runner(root, "toy", INPUTS, OUTPUTS, True, device)


def samples(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(-100, 100, (count, 5)).astype(np.int8), random.random((count, 1), np.float32)]


@pytest.mark.parametrize("name", DEVICES)
def test_samples_go_through_the_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = load_device(name)
    program = build(tmp_path, device)
    codes, factor = samples(7)
    # Several files: three samples of 9 bytes each.
    monkeypatch.setattr("edgec.targets.cpu.runner.CHUNK_BYTES", 3 * 23)
    outputs = [(t.shape, t.dtype) for t in OUTPUTS]
    products, odd = runner.run_samples(program, device, [codes, factor], outputs)
    wanted = codes + np.array([1, 2, 3, 4, 5], np.int8)
    assert np.array_equal(odd, wanted[:, :3])
    assert np.array_equal(products, factor * wanted.astype(np.float32))
    assert runner.selftest(program, device)


@pytest.mark.parametrize("name", DEVICES)
def test_measurements(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    build(tmp_path, device)
    specs = [{"name": n, "shape": t.shape, "dtype": t.dtype} for n, t in zip(("codes", "factor"), INPUTS, strict=True)]
    bundle = Bundle(tmp_path, {"name": "toy", "inputs": specs})
    codes, factor = samples(1)
    measured = runner.measure(bundle, [codes[0], factor[0]], device)
    assert measured == runner.measure(bundle, [codes[0], factor[0]], device)
    assert measured.instructions == sum(measured.functions.values())
    copied, multiplied = measured.steps
    around = measured.functions["toy_run"]
    # A step is its function, what that calls, and the call.
    assert 0 < copied - measured.functions["copy"] < around
    assert measured.functions["multiply"] < multiplied and multiplied > 256 * 3
    assert 0 < measured.instructions - copied - multiplied < 40
    assert measured.arena_bytes == 5
    assert 256 <= measured.stack_bytes < 600
    with pytest.raises(EdgecError, match=r"input of bundle toy: has shape \(1, 5\), expected \(5\)"):
        runner.measure(bundle, [codes, factor[0]], device)


@pytest.mark.parametrize("name", DEVICES)
def test_a_clock_counts_where_the_counter_cannot_be_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = load_device(name)
    build(tmp_path, device)
    specs = [{"name": n, "shape": t.shape, "dtype": t.dtype} for n, t in zip(("codes", "factor"), INPUTS, strict=True)]
    bundle = Bundle(tmp_path, {"name": "toy", "inputs": specs})
    codes, factor = samples(1)
    exact = runner.measure(bundle, [codes[0], factor[0]], device)

    def missing(*_: object) -> Path:
        raise ToolchainMissing("'cc' is not installed")

    monkeypatch.setattr("edgec.targets.qemu.counter.build_plugin", missing)
    clocked = runner.measure(bundle, [codes[0], factor[0]], device)
    assert 0 < clocked.tolerance <= 100 and clocked.steps == () and clocked.functions == {}
    assert abs(clocked.instructions - exact.instructions) <= clocked.tolerance
    assert (clocked.stack_bytes, clocked.arena_bytes) == (exact.stack_bytes, exact.arena_bytes)


@pytest.mark.qemu("cortex-m4")
def test_the_program_is_the_same_wherever_it_is_built(tmp_path: Path) -> None:
    device = load_device("cortex-m4")
    first, second = (build(tmp_path / place, device) for place in ("a", "some/where/else"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.qemu("cortex-m4")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("((int8_t *)arena)[TOY_ARENA_BYTES] = 1;", "wrote beside the arena"),
        ("((int8_t *)arena)[-1] = 1;", "wrote beside the arena"),
        ("((int8_t *)(uintptr_t)codes)[5] = 1;", "wrote beside input 0"),
        ("odd[3] = 1;", "wrote beside output 1"),
        ("return -2;", "ended with status 2: toy_run gave an error"),
    ],
)
def test_a_program_that_fails(wrong: str, message: str, tmp_path: Path) -> None:
    device = load_device("cortex-m4")
    program = build(tmp_path, device, wrong)
    with pytest.raises(EdgecError, match=rf"toy\.elf on mps2-an386: .*{message}"):
        runner.run_samples(program, device, samples(1), [(t.shape, t.dtype) for t in OUTPUTS])


@pytest.mark.qemu("cortex-m4")
def test_a_self_test_that_fails(tmp_path: Path) -> None:
    device = load_device("cortex-m4")
    assert not runner.selftest(build(tmp_path / "a", device, expected="13.0f"), device)
    with pytest.raises(EdgecError, match="ended with status 6: toy_run wrote beside the arena"):
        runner.selftest(build(tmp_path / "b", device, "((int8_t *)arena)[TOY_ARENA_BYTES] = 1;"), device)
    with pytest.raises(EdgecError, match="bundle toy: has no program for QEMU"):
        runner.program_of(Bundle(tmp_path, {"name": "toy"}))


@pytest.mark.qemu("cortex-m4")
def test_flash_of_a_model(tmp_path: Path) -> None:
    """Its code, its constants, and not the program around it."""
    device = load_device("cortex-m4")
    build(tmp_path, device)
    small = runner.flash_bytes(tmp_path, "toy", INPUTS, OUTPUTS, device)
    source = tmp_path / "src" / "toy.c"
    source.write_text(source.read_text().replace("weights[16]", "weights[1016]"))
    assert runner.flash_bytes(tmp_path, "toy", INPUTS, OUTPUTS, device) - small == 1000
    symbols = machine.counter.Symbols(tmp_path / "qemu" / "toy.elf")
    assert {"copy", "multiply"} < set(symbols.names)
    assert 100 < small < 400
