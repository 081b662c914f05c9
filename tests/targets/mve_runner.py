"""Running many kernels for Helium in one program on QEMU's Cortex-M55 board, with arrays at the ends of its memories.

A kernel that reads or writes behind an array faults; the bytes in front of every array are checked, and that operands
stay as they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgec.targets.device import load_device
from edgec.targets.mcu.emit import parameters
from edgec.targets.mcu.header import header
from edgec.targets.mcu.machine import build_program, run_program
from tests.targets.mcu_runner import WARNINGS, Case, memory

DEVICE = load_device("cortex-m55")

DRIVER = r"""
#include "semihost.h"
typedef void (*kernel_t)(void **);
extern const kernel_t table[];
/* Where memories of the board end. A fifth array, which is scratch memory, is followed by bytes that are checked. */
static const uint32_t ENDS[] = {0x00080000, 0x20080000, 0x31400000, 0x11200000, 0x31200000};
enum { GUARD = 64, MOST = 0x30000, BETWEEN = 4 };
static int guarded(const uint8_t *from) {
    for (int k = 0; k < GUARD; k++) {
        if (from[k] != 0x5A) return 0;
    }
    return 1;
}
int main(void) {
    uint32_t head[2], sizes[5];
    const int in = semihost_open("in.bin", 0), out = semihost_open("out.bin", 1);
    for (;;) {
        void *pointers[5];
        if (semihost_read(in, head, 8)) return 3;
        if (!head[1]) return 0;
        if (head[1] > 5 || semihost_read(in, sizes, 4 * head[1])) return 4;
        for (uint32_t i = 0; i < head[1]; i++) {
            uint8_t *p = (uint8_t *)(ENDS[i] - sizes[i]);
            if (sizes[i] > MOST) return 5;
            memset(p - GUARD, 0x5A, GUARD);
            if (i == BETWEEN) memset((void *)ENDS[i], 0x5A, GUARD);
            if (sizes[i] && semihost_read(in, p, sizes[i])) return 6;
            pointers[i] = p;
        }
        table[head[0]](pointers);
        for (uint32_t i = 0; i < head[1]; i++) {
            uint8_t *p = (uint8_t *)(ENDS[i] - sizes[i]);
            if (!guarded(p - GUARD) || (i == BETWEEN && !guarded((uint8_t *)ENDS[i]))) return 7;
            if (sizes[i] && semihost_write(out, p, sizes[i])) return 8;
        }
    }
}
"""


def run_at_ends(cases: Sequence[Case]) -> list[np.ndarray]:
    """The flat outputs of all cases, each of at most five arrays, run in one program."""
    parts = sorted({c.kernel.call().part for c in cases})
    text, data, layout = [header(parts), DRIVER], b"", []
    for number, case in enumerate(cases):
        call = case.kernel.call()
        arrays, output = memory(case.kernel, case.activations, case.weights, case.before, DEVICE, case.inplace)
        result = case.kernel.inplace[0] if case.inplace else output
        kept = [i for i in range(len(arrays)) if i != output or i == result]
        places = [kept.index(result if i == output else i) for i in range(len(arrays))]
        definition, first = parameters(f"P{number}", call)
        arguments = ", ".join([*([first] if first else []), *(f"p[{i}]" for i in places)])
        text.append(f"{definition}static void call{number}(void **p) {{ {call.function}({arguments}); }}")
        data += np.array([number, len(kept), *(arrays[i].nbytes for i in kept)], "<u4").tobytes()
        data += b"".join(arrays[i].tobytes() for i in kept)
        layout.append((arrays, kept, result, output))
    text.append(f"const kernel_t table[] = {{{', '.join(f'call{i}' for i in range(len(cases)))}}};\n")
    with tempfile.TemporaryDirectory(prefix="edgec-mve-test-") as name:
        folder = Path(name)
        (folder / "cases.c").write_text("\n".join(text))
        (folder / "in.bin").write_bytes(data + bytes(8))
        program = build_program([folder / "cases.c"], DEVICE, folder, name="cases", flags=WARNINGS[2:])
        done = run_program(program, DEVICE, cwd=folder)
        back = (folder / "out.bin").read_bytes()
    results, at = [], 0
    for number, (arrays, kept, result, output) in enumerate(layout):
        where = f"case {number} ({cases[number].kernel})"
        assert at + sum(arrays[i].nbytes for i in kept) <= len(back), f"{where}: status {done.status}: {done.text}"
        for i in kept:
            got = back[at : at + arrays[i].nbytes]
            at += arrays[i].nbytes
            if i == result:
                results.append(np.frombuffer(got, cases[number].kernel.operands()[output].dtype))
            elif i < output:
                assert got == arrays[i].tobytes(), f"{where}: operand {i} was changed"
    assert done.status == 0, f"status {done.status}: {done.text}"
    return results
