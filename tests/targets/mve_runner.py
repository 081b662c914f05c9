"""Running many kernels for Helium in one program on QEMU's Cortex-M55 board.

Every array ends where a memory of the board ends, so that a kernel that reads or writes behind one faults; the bytes in
front of outputs and scratch memory are checked, and that other arrays stay as they were.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgec.targets.device import load_device
from edgec.targets.mcu.emit import parameters
from edgec.targets.mcu.header import header
from edgec.targets.mcu.kernels.base import McuKernel
from tests.targets.mcu_runner import WARNINGS, memory

DEVICE = load_device("cortex-m55")

SCRIPT = """
MEMORY { CODE (rx) : ORIGIN = 0x00000000, LENGTH = 256K
         RAM (rw) : ORIGIN = 0x20000000, LENGTH = 256K }
ENTRY(start)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > CODE
  .ARM.exidx : { *(.ARM.exidx*) } > CODE
  .bss (NOLOAD) : { *(.data*) *(.bss*) *(COMMON) } > RAM
}
"""

DRIVER = r"""
typedef void (*kernel_t)(void **);
extern const kernel_t table[];
static int32_t semihost(int32_t op, const void *arguments) {
    register int32_t r0 __asm__("r0") = op;
    register const void *r1 __asm__("r1") = arguments;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}
static void leave(uint32_t status) { uint32_t a[2] = {0x20026, status}; for (;;) semihost(0x20, a); }
static void fault(void) { leave(3); }
static uint32_t open_file(const char *name, uint32_t mode) {
    uint32_t a[3] = {(uint32_t)name, mode, strlen(name)};
    return (uint32_t)semihost(1, a);
}
static void transfer(int32_t op, uint32_t handle, const void *data, uint32_t size) {
    uint32_t a[3] = {handle, (uint32_t)data, size};
    if (size && semihost(op, a)) leave(4);
}
/* Where memories of the board end; a fifth array, which is scratch memory, is followed by bytes that are checked. */
static const uint32_t ENDS[] = {0x00080000, 0x20080000, 0x31400000, 0x11200000, 0x31200000};
__attribute__((noinline, used)) static void run_case_end(void) { __asm__ volatile(""); }
__attribute__((noinline, used)) static void run_case(kernel_t kernel, void **pointers) { kernel(pointers); }
__attribute__((used)) static void start(void) {
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20;
    __asm__ volatile("dsb\nisb" ::: "memory");
    uint32_t in = open_file("in.bin", 1), out = open_file("out.bin", 5), head[2], spec[8][2];
    for (;;) {
        void *pointers[8];
        transfer(6, in, head, 8);
        if (!head[1]) break;
        transfer(6, in, spec, 8 * head[1]);
        for (uint32_t i = 0; i < head[1]; i++) {
            uint8_t *p = (uint8_t *)(ENDS[spec[i][1]] - spec[i][0]);
            if (spec[i][0] > 0x30000) leave(5);
            memset(p - 64, 0x5A, 64);
            if (i == 4) memset((void *)ENDS[i], 0x5A, 64);
            transfer(6, in, p, spec[i][0]);
            pointers[i] = p;
        }
        run_case(table[head[0]], pointers);
        run_case_end();
        for (uint32_t i = 0; i < head[1]; i++) {
            uint8_t *p = (uint8_t *)(ENDS[spec[i][1]] - spec[i][0]);
            for (int k = 1; k <= 64; k++) if (p[-k] != 0x5A || (i == 4 && ((uint8_t *)ENDS[i])[k - 1] != 0x5A)) leave(6);
            transfer(5, out, p, spec[i][0]);
        }
    }
    leave(0);
}
#define F (uintptr_t) fault
__attribute__((section(".vectors"), used)) static const uintptr_t vectors[16] = {
    0x20040000, (uintptr_t)start, F, F, F, F, F, F, F, F, F, F, F, F, F, F};
"""


class Case(NamedTuple):
    """A call of a kernel. activations: `before` of them (default: all) stand before the weights."""

    kernel: McuKernel
    activations: Sequence[np.ndarray]
    weights: Mapping[str, np.ndarray | None] = {}
    before: int | None = None
    inplace: bool = False


def run_cases(cases: Sequence[Case], plugin: Path | None = None) -> tuple[list[np.ndarray], str]:
    """(the flat outputs, what QEMU printed) of all cases, run in one program."""
    parts = sorted({c.kernel.call().part for c in cases})
    text = [header(parts), DRIVER]
    data, layout = b"", []
    for number, case in enumerate(cases):
        call = case.kernel.call()
        arrays, output = memory(case.kernel, case.activations, case.weights, case.before, DEVICE, case.inplace)
        shared = case.kernel.inplace[0] if case.inplace else None
        kept = [i for i in range(len(arrays)) if not (i == output and shared is not None)]
        assert len(kept) <= 5, "more arrays than memories"
        places = [kept.index(i) if i in kept else kept.index(shared) for i in range(len(arrays))]
        definition, first = parameters(f"P{number}", call)
        arguments = ", ".join([*([first] if first else []), *(f"p[{i}]" for i in places)])
        text.append(f"{definition}static void call{number}(void **p) {{ {call.function}({arguments}); }}")
        data += np.array([number, len(kept)], "<u4").tobytes()
        data += np.array([[arrays[i].nbytes, k] for k, i in enumerate(kept)], "<u4").tobytes()
        data += b"".join(arrays[i].tobytes() for i in kept)
        layout.append((arrays, kept, output if shared is None else shared, output))
    data += bytes(8)
    text.append(f"const kernel_t table[] = {{{', '.join(f'call{i}' for i in range(len(cases)))}}};\n")
    with tempfile.TemporaryDirectory(prefix="edgec-mve-test-") as name:
        folder = Path(name)
        (folder / "cases.c").write_text("\n".join(text))
        (folder / "script.ld").write_text(SCRIPT)
        (folder / "in.bin").write_bytes(data)
        command = [
            DEVICE.cc,
            *DEVICE.cflags,
            *WARNINGS,
            "cases.c",
            "-nostartfiles",
            "-T",
            "script.ld",
            "-o",
            "cases.elf",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        command = [DEVICE.runner, "-M", DEVICE.machine, "-nographic", "-monitor", "none", "-serial", "none"]
        command += ["-semihosting-config", "enable=on,target=native", "-kernel", "cases.elf"]
        command += ["-plugin", str(plugin)] if plugin else []
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
        back = (folder / "out.bin").read_bytes() if (folder / "out.bin").exists() else b""
        results, at = [], 0
        for number, (arrays, kept, result, output) in enumerate(layout):
            where = f"case {number} ({cases[number].kernel})"
            assert at + sum(arrays[i].nbytes for i in kept) <= len(back), f"{where}: status {done.returncode}"
            for i in kept:
                got = back[at : at + arrays[i].nbytes]
                at += arrays[i].nbytes
                if i == result:
                    results.append(np.frombuffer(got, cases[number].kernel.operands()[output].dtype))
                elif i < output:
                    assert got == arrays[i].tobytes(), f"{where}: operand {i} was changed"
        assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
        return results, done.stderr
