"""Running one microcontroller kernel: compiled for this machine (portable C), or for a device in QEMU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgec.targets.device import Device, load_device
from edgec.targets.mcu.emit import parameters
from edgec.targets.mcu.header import header
from edgec.targets.mcu.kernels import implement
from edgec.targets.mcu.kernels.base import McuKernel, Value
from edgec.targets.mcu.machine import build_program, count_program

WARNINGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
# Bytes around every buffer that a kernel must leave alone.
GUARD = 64


def kernel_of(spec: Any, weights: Mapping[str, np.ndarray | None], target: str = "cortex-m3") -> McuKernel:
    """The kernel of a template; fails when there is none."""
    kernel = implement(spec, weights, load_device(target))
    assert kernel is not None, f"no kernel for {spec}"
    return kernel


def run_on_host(
    kernel: McuKernel,
    activations: Sequence[np.ndarray],
    weights: Mapping[str, np.ndarray | None] | None = None,
    before: int | None = None,
    device: Device | None = None,
    inplace: bool = False,
) -> np.ndarray:
    """The flat output of a kernel in portable C. activations: `before` of them (default: all) stand before the weights.

    inplace: the output shares the memory of the operand that `kernel.inplace` names. Fails when a kernel writes beside
    its output and its scratch memory.
    """
    arrays, outputs = memory(kernel, activations, weights or {}, before, device or load_device("cortex-m3"), inplace)
    library = _library(c_text(kernel))
    function = library.kernel_under_test
    function.restype = None
    image = Image(arrays, kernel.inplace[0] if inplace else None, outputs)
    room = np.zeros(len(image.data) + 16, np.uint8)
    start = -room.ctypes.data % 16
    room[start : start + len(image.data)] = image.data
    pointers = [room.ctypes.data + start + offset for offset in image.offsets]
    fields = [float(part) for value in kernel.call().fields.values() for part in _parts(value)]
    function((ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_double * len(fields))(*fields))
    return image.result(room[start : start + len(image.data)], kernel.operands()[outputs].dtype)


class Case(NamedTuple):
    """A call of a kernel, as `run_on_host` takes it."""

    kernel: McuKernel
    activations: Sequence[np.ndarray]
    weights: Mapping[str, np.ndarray | None] = {}
    before: int | None = None
    inplace: bool = False


def run_on_device(
    kernel: McuKernel,
    activations: Sequence[np.ndarray],
    weights: Mapping[str, np.ndarray | None] | None = None,
    before: int | None = None,
    device: Device | None = None,
    inplace: bool = False,
) -> tuple[np.ndarray, int]:
    """(the flat output, instructions of the call) of a kernel on QEMU's board for a device; else as `run_on_host`."""
    case = Case(kernel, activations, weights or {}, before, inplace)
    return run_cases_on_device([case], device or load_device("cortex-m3"))[0]


def run_cases_on_device(
    cases: Sequence[Case], device: Device, flags: Sequence[str] = (), checked: bool = True
) -> list[tuple[np.ndarray, int]]:
    """`run_on_device` for many cases: one program, one start of the emulator.

    flags: further ones for the compiler, like -DEK_PORTABLE. checked: compile with warnings as errors.
    """
    with tempfile.TemporaryDirectory(prefix="edgec-mcu-test-") as name:
        folder = Path(name)
        images = []
        outputs = []
        for case in cases:
            arrays, output = memory(case.kernel, case.activations, case.weights, case.before, device, case.inplace)
            images.append(Image(arrays, case.kernel.inplace[0] if case.inplace else None, output))
            outputs.append(output)
        (folder / "in.bin").write_bytes(b"".join(image.data.tobytes() for image in images))
        (folder / "cases.c").write_text(_device_text(cases, images))
        warnings = WARNINGS[2:] if checked else ()
        program = build_program([folder / "cases.c"], device, folder, name="cases", flags=[*warnings, *flags])
        profile = count_program(program, device, ["in.bin", "out.bin"], folder, function="run_case")
        data = np.frombuffer((folder / "out.bin").read_bytes(), np.uint8)
        starts = np.cumsum([0, *(len(image.data) for image in images)])
        assert len(data) == starts[-1], f"{len(data)} bytes for {starts[-1]}"
        # Mark 1 stands before the call, 2 behind it.
        counts = [reading.instructions for reading in profile.readings if reading.mark == 1]
        found = []
        for i, (case, image) in enumerate(zip(cases, images, strict=True)):
            dtype = case.kernel.operands()[outputs[i]].dtype
            try:
                found.append((image.result(data[starts[i] : starts[i + 1]], dtype), counts[i]))
            except AssertionError as error:
                raise AssertionError(f"case {i}, {case.kernel}: {error}") from error
        return found


class Image:
    """The memory of a call: its operands one after the other, with guards around them.

    Memory that starts at a multiple of 16 gives each of them an address that is a multiple of 4 and not of 8: kernels
    may rely on no more. data: the bytes. offsets: of each pointer; that of the output is that of operand `shared` if
    there is one.
    """

    def __init__(self, arrays: Sequence[np.ndarray], shared: int | None, output: int) -> None:
        self.arrays, self.shared, self.output = arrays, shared, output
        self.offsets = []
        end = GUARD + 4
        for array in arrays:
            self.offsets.append(end)
            end += -(-array.nbytes // 16) * 16 + GUARD
        end += -end % 16
        self.data = np.full(end, 0x5A, np.uint8)
        for offset, array in zip(self.offsets, arrays, strict=True):
            self.data[offset : offset + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        if shared is not None:
            self.offsets[output] = self.offsets[shared]

    def result(self, data: np.ndarray, dtype: str) -> np.ndarray:
        """The flat output in the memory after the call; fails when anything else but scratch memory changed."""
        changed = data != self.data
        for number, (offset, array) in enumerate(zip(self.offsets, self.arrays, strict=True)):
            inside = changed[offset : offset + array.nbytes]
            if number < self.output and number != self.shared:
                assert not inside.any(), f"operand {number} was changed"
            inside[:] = False
        places = np.flatnonzero(changed)
        assert not len(places), f"wrote beside the buffers, at {places[0]}; pointers at {self.offsets}"
        offset = self.offsets[self.output]
        return np.frombuffer(data[offset : offset + self.arrays[self.output].nbytes].tobytes(), dtype)


def memory(
    kernel: McuKernel,
    activations: Sequence[np.ndarray],
    weights: Mapping[str, np.ndarray | None],
    before: int | None,
    device: Device,
    inplace: bool,
) -> tuple[list[np.ndarray], int]:
    """(contents of all pointers in order, position of the output); output and scratch hold garbage."""
    split = len(activations) if before is None else before
    given = [*activations[:split], *kernel.pack(device, **weights), *activations[split:]]
    operands = kernel.operands()
    assert len(given) == len(operands) - 1, f"{len(given)} arrays for {len(operands) - 1} operands"
    for number, (array, operand) in enumerate(zip(given, operands, strict=False)):
        assert (array.size, str(array.dtype)) == (operand.elements, operand.dtype), f"operand {number}: {array.dtype}"
    out = operands[-1]
    arrays = [np.ascontiguousarray(a) for a in given]
    arrays.append(np.full(out.elements * np.dtype(out.dtype).itemsize, 0xA5, np.uint8))
    arrays += [np.full(size, 0xA5, np.uint8) for size in kernel.call().scratch]
    return arrays, len(given)


def c_text(kernel: McuKernel) -> str:
    """C file with the header's parts and `kernel_under_test(void **pointers, const double *fields)`.

    Fields of the parameters come in at run time: kernels that call the same function share a library.
    """
    call, fields, count = kernel.call(), [], 0
    for name, value in call.fields.items():
        places = [f"v[{count + i}]" for i in range(len(_parts(value)))]
        count += len(places)
        fields.append(f".{name} = " + (f"{{{', '.join(places)}}}" if isinstance(value, Sequence) else places[0]))
    definition = f"const {call.struct} q = {{{', '.join(fields)}}};" if call.struct else "(void)v;"
    pointers = [f"p[{i}]" for i in range(len(kernel.operands()) + len(call.scratch))]
    arguments = ", ".join([*(["&q"] if call.struct else []), *pointers])
    head = "void kernel_under_test(void **p, const double *v)"
    return f"{header([call.part])}\n{head};\n{head} {{\n    {definition}\n    {call.function}({arguments});\n}}\n"


def _parts(value: Value) -> Sequence[float]:
    return value if isinstance(value, Sequence) else (value,)


def _device_text(cases: Sequence[Case], images: Sequence[Image]) -> str:
    """C program that reads the images one by one, does each call, and writes back what the memory holds then."""
    calls = [case.kernel.call() for case in cases]
    functions, rows = [], []
    for i, (call, image) in enumerate(zip(calls, images, strict=True)):
        definition, first = parameters(f"P{i}", call)
        table = ", ".join(f"memory + {offset}" for offset in image.offsets)
        # The compiler must not make a function of its own for these parameters: a bundle has many layers.
        hidden = f"    const {call.struct} *parameters = {first};\n    HIDE(parameters);\n" if first else ""
        arguments = ", ".join([*(["parameters"] if first else []), *(f"p[{k}]" for k in range(len(image.offsets)))])
        functions.append(
            f"{definition}static void *const pointers_{i}[] = {{{table}}};\n"
            f"static void case_{i}(void) {{\n    void *const *p = pointers_{i};\n    HIDE(p);\n{hidden}"
            f"    EDGEC_MARK(1);\n    {call.function}({arguments});\n    EDGEC_MARK(2);\n}}\n"
        )
        rows.append(f"    {{case_{i}, {len(image.data)}}},\n")
    return DEVICE_PROGRAM.format(
        header=header(call.part for call in calls),
        room=max(len(image.data) for image in images),
        functions="\n".join(functions),
        rows="".join(rows),
    )


DEVICE_PROGRAM = """{header}
#include "marks.h"
#include "semihost.h"

#define HIDE(pointer) __asm__ volatile("" : "+r"(pointer) : : "memory")
static uint8_t memory[{room}] __attribute__((aligned(16)));

{functions}
static const struct {{
    void (*call)(void);
    size_t bytes;
}} CASES[] = {{
{rows}}};

void run_case(size_t number);
__attribute__((noinline)) void run_case(size_t number) {{
    CASES[number].call();
    __asm__ volatile("" ::: "memory");
}}

int main(void) {{
    char line[64], *words[4];
    if (semihost_arguments(line, sizeof line, words, 4) != 3) return 4;
    const int in = semihost_open(words[1], 0), out = semihost_open(words[2], 1);
    if (in < 0 || out < 0) return 5;
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {{
        if (semihost_read(in, memory, CASES[i].bytes)) return 6;
        run_case(i);
        if (semihost_write(out, memory, CASES[i].bytes)) return 7;
    }}
    semihost_close(out);
    return 0;
}}
"""


@functools.cache
def _library(text: str) -> ctypes.CDLL:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="edgec-mcu-test-") as folder:
        source, target = Path(folder) / "kernel.c", Path(folder) / f"{digest}.so"
        source.write_text(text)
        command = ["cc", *WARNINGS, "-shared", "-fPIC", "-fsanitize=undefined", "-fno-sanitize-recover", str(source)]
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))
