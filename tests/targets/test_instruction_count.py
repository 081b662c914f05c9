"""Instruction counts under QEMU: exact, by function, and the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgec.bundle import build_bundle
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.lowering.lower import lower
from edgec.targets.cpu.runner import run_samples
from edgec.targets.device import Device, load_device
from edgec.targets.qemu import counter

DEVICES = [pytest.param(name, marks=pytest.mark.qemu(name)) for name in ("cortex-a72", "neoverse-n1", "cortex-a7")]

# The first function is called once, the second in each of its n rounds.
SOURCE = r"""
int outer(int n);
#if defined(__aarch64__)
__asm__(".text\n.type inner,%function\n"
        "inner:\n add w0, w0, #1\n add w0, w0, #1\n ret\n.size inner, .-inner\n"
        ".global outer\n.type outer,%function\n"
        "outer:\n stp x29, x30, [sp, #-16]!\n mov w9, w0\n mov w0, #0\n"
        "1:\n bl inner\n subs w9, w9, #1\n b.ne 1b\n"
        "ldp x29, x30, [sp], #16\n ret\n.size outer, .-outer\n");
#else
__asm__(".text\n.syntax unified\n.arm\n.type inner,%function\n"
        "inner:\n add r0, r0, #1\n add r0, r0, #1\n bx lr\n.size inner, .-inner\n"
        ".global outer\n.type outer,%function\n"
        "outer:\n push {r4, lr}\n mov r4, r0\n mov r0, #0\n"
        "1:\n bl inner\n subs r4, r4, #1\n bne 1b\n"
        "pop {r4, lr}\n bx lr\n.size outer, .-outer\n");
#endif
int main(void) {
    int sum = 0;
    for (int i = 0; i < CALLS; i++) sum += outer(ROUNDS);
    return sum != 2 * CALLS * ROUNDS;
}
"""


def build(folder: Path, device: Device, calls: int, rounds: int) -> Path:
    (folder / "main.c").write_text(SOURCE)
    arguments = [f"-DCALLS={calls}", f"-DROUNDS={rounds}", str(folder / "main.c")]
    return counter.link(arguments, device, folder / "program")


@pytest.mark.parametrize("name", DEVICES)
def test_counts_are_exact(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    program = build(tmp_path, device, calls=3, rounds=1000)
    profile = counter.profile_program(program, "outer", device, tmp_path)
    assert profile.calls == 3
    assert profile.by_symbol == {"inner": 3 * 3 * 1000, "outer": 3 * (5 + 3 * 1000)}
    assert profile.total == 3 * (5 + 6 * 1000)
    address = counter.Symbols(program).address("inner")
    assert [profile.executions(address + offset) for offset in (0, 4, 8)] == [3000] * 3
    outer = counter.Symbols(program).address("outer")
    assert [profile.executions(outer + 4 * i) for i in range(8)] == [3] * 3 + [3000] * 3 + [3] * 2
    assert profile.executions(0) == profile.executions(outer + (1 << 30)) == 0
    assert counter.profile_program(program, "outer", device, tmp_path).blocks == profile.blocks


@pytest.mark.qemu("cortex-a72")
def test_what_cannot_be_counted(tmp_path: Path) -> None:
    device = load_device("cortex-a72")
    program = build(tmp_path, device, calls=0, rounds=1)
    with pytest.raises(EdgecError, match="counted function was never called"):
        counter.profile_program(program, "outer", device, tmp_path)
    with pytest.raises(EdgecError, match="has no function 'absent'"):
        counter.profile_program(program, "absent", device, tmp_path)
    (tmp_path / "fails.c").write_text("int main(void) { return 7; }")
    failing = counter.link([str(tmp_path / "fails.c")], device, tmp_path / "fails")
    with pytest.raises(EdgecError, match="ended with status 7"):
        counter.profile_program(failing, "main", device, tmp_path)
    with pytest.raises(EdgecError, match="has no emulator that counts"):
        counter.profile_program(program, "outer", load_device("host"), tmp_path)


LEAVE = r"""
.text
.global main
.type main, %%function
main:
    stp x29, x30, [sp, #-16]!
    mov w0, #0
    %s
    ldp x29, x30, [sp], #16
    ret
.size main, .-main
.type leave, %%function
leave:
    %s
.size leave, .-leave
"""


@pytest.mark.qemu("cortex-a72")
@pytest.mark.parametrize(
    ("main", "body", "message"),
    [
        ("bl leave", "b exit", "did not return behind its call"),
        ("b leave\nbehind: nop", "b behind", "was jumped to, not called"),
    ],
    ids=["exit", "jump"],
)
def test_a_function_without_call_or_return_is_an_error(main: str, body: str, message: str, tmp_path: Path) -> None:
    device = load_device("cortex-a72")
    (tmp_path / "main.s").write_text(LEAVE % (main, body))
    program = counter.link([str(tmp_path / "main.s")], device, tmp_path / "program")
    with pytest.raises(EdgecError, match=message):
        counter.profile_program(program, "leave", device, tmp_path)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.qemu("cortex-a72")
def test_one_inference_is_half_the_difference_of_three_and_one(tmp_path: Path) -> None:
    """The count between entry and return agrees with one that knows nothing of entry and return."""
    torch.manual_seed(0)
    device = load_device("cortex-a72")
    lowered = lower(load_model(Small(), input_shape=(1, 3, 9, 9), name="small"), device)
    bundle = build_bundle(lowered, device, tmp_path / "bundle")
    x = np.random.default_rng(0).normal(size=(1, 3, 9, 9)).astype(np.float32)
    total, symbols = counter.count(bundle, [x], device)
    assert total == sum(symbols.values())
    functions = {name for step in lowered.plan.steps for name, _ in lowered.kernels.phases[step.symbol]}
    assert functions < set(symbols) and "small_run" in symbols
    assert "main" not in symbols
    assert counter.count(bundle, [x], device) == (total, symbols)

    program = tmp_path / "whole" / "small"
    program.parent.mkdir()
    root = bundle.path
    counter.link([f"-I{root}/include", f"{root}/src/runner.c", f"{root}/lib/libsmall.a", "-lm"], device, program)
    whole = {}
    for repeat in (1, 3):
        report = tmp_path / f"{repeat}.counts"
        script = tmp_path / f"repeat{repeat}"
        # REPEAT comes after what run_samples gives.
        command = " ".join(f"'{word}'" for word in counter.emulator(device, report, None))
        script.write_text(f'#!/bin/sh\nexec {command} {program} "$1" "$2" "$3" {repeat}\n')
        script.chmod(0o755)
        run_samples(script, [], [x[None]], [((1, 5), "float32")])
        whole[repeat] = counter.read_report(report, program, whole=True).by_symbol
    difference = {name: n - whole[1].get(name, 0) for name, n in whole[3].items()}
    difference.pop("main")
    assert {name: n / 2 for name, n in difference.items() if n} == symbols

    with pytest.raises(EdgecError, match=r"has shape \(9, 9\), expected \(1, 3, 9, 9\)"):
        counter.count(bundle, [x[0, 0]], device)
