"""Programs on QEMU's microcontroller boards: built, run, counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edgec.errors import EdgecError
from edgec.targets.device import Device, device_names, load_device
from edgec.targets.mcu import machine
from edgec.targets.mcu.kernels.base import Call, McuKernel, Operand
from edgec.targets.qemu import counter
from tests.targets.mcu_runner import Case, run_cases_on_device

CORES = [n for n in device_names() if load_device(n).is_mcu and not load_device(n).core]
DEVICES = [pytest.param(name, marks=pytest.mark.qemu(name)) for name in CORES]

PROGRAM = r"""
#include "marks.h"
#include "semihost.h"
#include <math.h>
#include <string.h>

static int32_t start = 40;
static int32_t zero[2];
static const float table[3] = {0.25f, 1.0f, 2.25f};
int32_t counted(int32_t n);

#if defined(__riscv)
#define LOOP(n) __asm__ volatile("2: addi %0, %0, -1\n bnez %0, 2b" : "+r"(n))
#else
#define LOOP(n) __asm__ volatile(".syntax unified\n2: subs %0, %0, #1\n bne 2b" : "+r"(n) : : "cc")
#endif

/* Between its marks: two instructions a round, and what it takes to copy n. */
__attribute__((noinline)) int32_t counted(int32_t n) {
    int32_t a = n, b = n;
    EDGEC_MARK(3);
    LOOP(a);
    EDGEC_MARK(5);
    LOOP(b);
    EDGEC_MARK(3);
    return a + b;
}

static __attribute__((noinline)) void deep(uint32_t bytes) {
    volatile uint8_t room[1024];
    for (uint32_t i = 0; i < sizeof room; i++) room[i] = 1;
    if (bytes > sizeof room) deep(bytes - (uint32_t)sizeof room);
    room[0]++;
}

int main(void) {
    char line[128], *words[8];
    const int count = semihost_arguments(line, sizeof line, words, 8);
    if (count != 5) return 100 + count;
    if (start != 40 || zero[0] || zero[1]) return 1;
    const int in = semihost_open(words[1], 0), out = semihost_open(words[2], 1);
    if (in < 0 || out < 0 || semihost_open("absent", 0) >= 0) return 2;
    float x[3];
    if (semihost_read(in, x, sizeof x) || !semihost_read(in, x, 1)) return 3;
    for (int i = 0; i < 3; i++) x[i] = sqrtf(x[i]) + floorf(expf(table[i]));
    if (semihost_write(out, x, sizeof x)) return 4;
    semihost_close(out);
    const int32_t rounds = semihost_number(words[3]);
    if (counted(rounds) + counted(2 * rounds)) return 5;
    semihost_paint_stack();
    const uint32_t before = semihost_stack_used();
    deep((uint32_t)semihost_number(words[4]));
    semihost_print("stack ");
    semihost_print_unsigned(before);
    semihost_print(" ");
    semihost_print_unsigned(semihost_stack_used());
    semihost_print("\n");
    return start + 2;
}
"""


def build(text: str, device: Device, folder: Path, **options: object) -> Path:
    (folder / "main.c").write_text(text)
    return machine.build_program([folder / "main.c"], device, folder, name="program", **options)  # pyright: ignore


@pytest.mark.parametrize("name", DEVICES)
def test_a_program_runs_on_its_board(name: str, tmp_path: Path) -> None:
    """Data and bss, files, arguments, floats, exit status, counts and stack on each core."""
    device = load_device(name)
    program = build(PROGRAM, device, tmp_path, flags=["-Wall", "-Wextra", "-Wpedantic", "-Werror"])
    x = np.array([4, 9, 16], np.float32)
    (tmp_path / "in,put").write_bytes(x.tobytes())
    report = tmp_path / "counts"
    rounds, depth = 1000, 5 * 1024
    arguments = ["in,put", "output", str(rounds), str(depth)]
    done = machine.run_program(program, device, arguments, tmp_path, counts=report, function="counted")
    assert done.status == 42
    assert np.fromfile(tmp_path / "output", np.float32).tolist() == [3, 5, 13]

    profile = counter.read_report(report, program)
    assert profile.calls == 2
    assert profile.total == sum(r.instructions for r in profile.readings) == profile.by_symbol["counted"]
    assert [(r.call, r.mark) for r in profile.readings] == [(c, m) for c in (1, 2) for m in (-1, 3, 5, 3)]
    first, second = profile.readings[:4], profile.readings[4:]
    # The second call has twice the rounds, and the same instructions around them.
    assert [b.instructions - a.instructions for a, b in zip(first, second, strict=True)] == [0, 2000, 2000, 0]
    assert all(2 * rounds <= reading.instructions < 2 * rounds + 8 for reading in first[1:3])
    assert first[0].instructions + first[3].instructions < 16
    assert profile.by_mark[5] == first[2].instructions + second[2].instructions

    word, before, used = done.text.split()
    assert word == "stack" and int(before) <= 64
    assert depth <= int(used) <= depth + 512


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ('__asm__ volatile(".4byte 0\\n.4byte 0xffffffff");', "undefined instruction"),
        ("*(volatile uint32_t *)0xB0000004u = 1;", "does not exist"),
        ("deep((uint32_t)start * 1000);", "stack overflow"),
    ],
)
def test_a_fault_is_an_error(name: str, statement: str, reason: str, tmp_path: Path) -> None:
    device = load_device(name)
    # There is something at that address of one board.
    statement = statement.replace("0xB0000004u", "0x1FFF0004u") if device.machine == "mps3-an547" else statement
    text = PROGRAM[: PROGRAM.index("int main")] + f"int main(void) {{ deep(1); {statement} return (int)counted(1); }}"
    program = build(text, device, tmp_path, stack_bytes=8192)
    with pytest.raises(EdgecError, match=rf"program\.elf on {device.machine}: fault: .*{reason}"):
        machine.run_program(program, device, timeout=30)


@pytest.mark.qemu("cortex-m0plus")
def test_unaligned_access_faults_on_the_core_without(tmp_path: Path) -> None:
    """Though the board has a Cortex-M3."""
    text = """
    #include <stdint.h>
    static uint32_t words[2];
    int main(void) {
        uintptr_t place = (uintptr_t)words + 2;
        __asm__ volatile("" : "+r"(place));
        return (int)*(volatile uint32_t *)place;
    }
    """
    device = load_device("cortex-m0plus")
    with pytest.raises(EdgecError, match=r"fault: unaligned access, pc 0x\w+ in main"):
        machine.run_program(build(text, device, tmp_path), device, timeout=30)
    device = load_device("cortex-m3")
    assert machine.run_program(build(text, device, tmp_path), device, timeout=30).status == 0


@pytest.mark.qemu("rv32imc")
def test_flash_is_read_only_on_riscv(tmp_path: Path) -> None:
    text = """
    static const int table[2] = {3, 4};
    int main(void) {
        const int *place = table;
        __asm__ volatile("" : "+r"(place));
        *(int *)place = 5;
        return place[0];
    }
    """
    device = load_device("rv32imc")
    with pytest.raises(EdgecError, match=r"fault: write to memory that is read-only .* in main"):
        machine.run_program(build(text, device, tmp_path), device, timeout=30)


@pytest.mark.qemu("cortex-m4")
def test_what_goes_wrong(tmp_path: Path) -> None:
    device = load_device("cortex-m4")
    with pytest.raises(EdgecError, match=r"arm-none-eabi-gcc.*error.*nonsense"):
        build("int main(void) { return nonsense; }", device, tmp_path)
    with pytest.raises(EdgecError, match=r"failed with status 1: .*(overflow|will not fit)"):
        build("char big[5 << 20]; int main(void) { return big[*(volatile char *)big]; }", device, tmp_path)
    loop = build('int main(void) { for (;;) __asm__ volatile(""); }', device, tmp_path)
    with pytest.raises(EdgecError, match=r"program\.elf on mps2-an386: took more than 0\.5 s"):
        machine.run_program(loop, device, timeout=0.5)
    with pytest.raises(EdgecError, match="words with spaces"):
        machine.run_program(loop, device, ["two words"])
    with pytest.raises(EdgecError, match="ended with status 3"):
        machine.count_program(build("int main(void) { return 3; }", device, tmp_path), device)
    with pytest.raises(EdgecError, match="has no board in QEMU"):
        machine.board(load_device("cortex-a53"))


@dataclass(frozen=True)
class Add(McuKernel):
    """Output: the first operand plus constants. beyond: elements that it writes too many."""

    name: ClassVar[str] = "add"
    elements: int
    beyond: int = 0

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,)

    def operands(self) -> tuple[Operand, ...]:
        return (Operand(self.elements),) * 3

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        assert weights["w"] is not None
        return (weights["w"],)

    def call(self) -> Call:
        return Call("test_add", "base", "test_add_t", {"n": self.elements + self.beyond}, (4,))


ADD = """
#include <stdint.h>
typedef struct { int32_t n; } test_add_t;
static __attribute__((noinline, unused)) void test_add(const test_add_t *p, const int8_t *a, const int8_t *b, int8_t *c,
                                               int32_t *scratch) {
    volatile int32_t *const i = scratch;
    for (*i = 0; *i < p->n; *i += 1) c[*i] = (int8_t)(a[*i] + b[*i]);
}
"""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.qemu(n)) for n in ("cortex-m4", "rv32imc")])
def test_kernels_run_on_a_device(name: str, tmp_path: Path) -> None:
    """Outputs and counts of several calls in one program, in place and not; what a kernel must leave alone."""
    device = load_device(name)
    (tmp_path / "add.h").write_text(ADD)
    flags = ["-include", str(tmp_path / "add.h")]
    a = np.arange(10, dtype=np.int8)
    b = np.arange(10, 20, dtype=np.int8)

    def case(elements: int, beyond: int = 0, inplace: bool = False) -> Case:
        return Case(Add(elements, beyond), [a[:elements]], {"w": b[:elements]}, 1, inplace)

    found = run_cases_on_device([case(5), case(10), case(7, inplace=True), case(5)], device, flags)
    assert [output.tolist() for output, _ in found] == [(a + b)[:n].tolist() for n in (5, 10, 7, 5)]
    five, ten, seven, again = (count for _, count in found)
    assert five == again and ten > five > 0
    assert 5 * (seven - five) == 2 * (ten - five)
    with pytest.raises(AssertionError, match=r"case 1, .*beyond=1.*wrote beside the buffers"):
        run_cases_on_device([case(5), case(5, beyond=1)], device, flags)
