"""Run compiled kernels: natively or under QEMU, many calls per process, with guarded memory.

Kernels are linked with one small C driver. The driver places every array so that it ends at an inaccessible page,
makes inputs read-only and checks the bytes in front of outputs: a kernel that reads or writes out of bounds, or
stores to a parameter reported as read-only, fails the call instead of passing by luck. Kernels that threads may share
are called for two ranges of their tasks, the last tasks first.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from edgec.targets.codegen import LoweredKernels, build_objects, lower_kernels
from edgec.targets.device import Device, load_device

EMULATORS = {"native": (), "qemu-aarch64": ("qemu-aarch64", "-cpu"), "qemu-arm": ("qemu-arm", "-cpu")}

DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#define PAGE 65536u
typedef void *P;
extern void (*const table[])(P *);
static void fail(const char *what, int call) { fprintf(stderr, "call %d: %s\n", call, what); exit(9); }
static void get(FILE *f, void *to, size_t n) { if (n && fread(to, 1, n, f) != n) fail("short input", -1); }
/* Arguments: kind 0 input, 1 output, 2 scratch, 3 output that shares the memory of an earlier argument. */
int main(int argc, char **argv) {
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  int32_t calls, head[2], arg[3];
  if (argc != 3 || !in || !out) return 8;
  get(in, &calls, 4);
  for (int call = 0; call < calls; call++) {
    P pointer[16]; char *base[16]; size_t slack[16], span[16]; int32_t args[16][3];
    get(in, head, 8);
    if (head[1] > 16) fail("too many arguments", call);
    for (int i = 0; i < head[1]; i++) {
      get(in, arg, 12);
      memcpy(args[i], arg, 12);
      if (arg[0] == 3) { pointer[i] = pointer[arg[2]]; continue; }
      size_t n = (size_t)arg[1], room = (n + PAGE - 1) / PAGE * PAGE + PAGE;
      char *p = mmap(NULL, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED || mprotect(p + room, PAGE, PROT_NONE)) fail("no memory", call);
      base[i] = p; span[i] = room + PAGE; slack[i] = room - n;
      memset(p, 0xA5, room);
      pointer[i] = p + slack[i];
      if (arg[0] == 0) {
        get(in, pointer[i], n);
        if (arg[2] == 0 && mprotect(p, room, PROT_READ)) fail("cannot protect", call);
      }
    }
    table[head[0]](pointer);
    for (int i = 0; i < head[1]; i++)
      if (args[i][0] == 1 || args[i][0] == 3) fwrite(pointer[i], 1, (size_t)args[i][1], out);
    for (int i = 0; i < head[1]; i++) {
      if (args[i][0] == 3) continue;
      for (size_t b = 0; b < slack[i]; b++)
        if ((unsigned char)base[i][b] != 0xA5) fail("wrote in front of an array", call);
      munmap(base[i], span[i]);
    }
  }
  return fclose(out) != 0;
}
"""


@dataclass(frozen=True)
class Call:
    """One kernel call. inputs: arrays in parameter order, packed constants included; outputs: (shape, dtype) each.

    inplace: index of the input whose memory the only output shares, or None.
    """

    function: Any
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    inplace: int | None = None


def spec_call(
    spec: Any,
    device: Device,
    before: Sequence[np.ndarray],
    expected: np.ndarray,
    after: Sequence[np.ndarray] = (),
    inplace: int | None = None,
    **weights: Any,
) -> Call:
    """The call of a kernel template whose result is like `expected`; `weights` are packed by the template."""
    inputs = (*before, *spec.pack(device, **weights), *after)
    return Call(spec.prim_func(device), inputs, ((expected.shape, str(expected.dtype)),), inplace)


def require(device: Device) -> None:
    """Skip the test, with the reason, when the device's compiler or emulator is not installed."""
    for tool in (device.cc, *EMULATORS[device.runner][:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def run_calls(calls: Sequence[Call], device: Device, min_scratch: int = 256) -> list[list[np.ndarray]]:
    """Outputs of each call, compiled for `device` and run in one process."""
    require(device)
    module = tvm.IRModule({f"k{i}": c.function.with_attr("global_symbol", f"k{i}") for i, c in enumerate(calls)})
    lowered = lower_kernels(module, device, min_scratch)
    with tempfile.TemporaryDirectory(prefix="edgec-kernels-") as name:
        folder = Path(name)
        objects = {folder / f"{symbol}.o": data for symbol, data in build_objects(lowered, device).items()}
        for path, data in objects.items():
            path.write_bytes(data)
        program = link(folder, list(objects), len(calls), device, lowered)
        (folder / "in.bin").write_bytes(_encode(calls, lowered))
        emulator = EMULATORS[device.runner]
        prefix = (*emulator, str(device.qemu_cpu)) if emulator else ()
        command = [*prefix, str(program), str(folder / "in.bin"), str(folder / "out.bin")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"kernel failed with exit status {done.returncode}: {done.stderr}"
        return _decode(calls, (folder / "out.bin").read_bytes())


def run(call: Call, device: Device | None = None) -> np.ndarray:
    """The only output of one call; on the host when no device is given."""
    return run_calls([call], device or load_device("host"))[0][0]


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Integers must be equal; floats within `tolerance` of the largest expected magnitude."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(got, expected)
        return
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)) or 1.0
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale)


def link(folder: Path, objects: Sequence[Path], count: int, device: Device, lowered: LoweredKernels) -> Path:
    """The static test program: driver, kernels k0..k<count - 1>, and the C library."""
    text = "#include <stdint.h>\n"
    for name in (f"k{i}" for i in range(count)):
        pointers = len(lowered.signature[name])
        calls = []
        for symbol, number in lowered.phases[name]:
            text += f"void {symbol}({', '.join(['void *'] * pointers + ['int32_t'] * 2 * bool(number))});\n"
            half = -(-number // 2)
            for extra in [f", {half}, {number}", f", 0, {half}"] if number else [""]:
                calls.append(f"{symbol}({', '.join(f'p[{i}]' for i in range(pointers))}{extra});")
        text += f"static void call_{name}(void **p) {{ {' '.join(calls)} }}\n"
    table = folder / "table.c"
    table.write_text(f"{text}void (*const table[])(void **) = {{{', '.join(f'call_k{i}' for i in range(count))}}};\n")
    program = folder / "program"
    driver = folder / "driver.o"
    driver.write_bytes(_driver_object(device))
    command = [device.cc, *device.cflags, "-static", "-fno-builtin", str(table), str(driver), *map(str, objects)]
    subprocess.run([*command, "-o", str(program), "-lm"], check=True, capture_output=True, text=True)
    return program


@functools.cache
def _driver_object(device: Device) -> bytes:
    with tempfile.TemporaryDirectory(prefix="edgec-driver-") as name:
        source, target = Path(name) / "driver.c", Path(name) / "driver.o"
        source.write_text(DRIVER)
        command = [device.cc, *device.cflags, "-O1", "-Wall", "-Werror", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target.read_bytes()


def _encode(calls: Sequence[Call], lowered: LoweredKernels) -> bytes:
    parts = [struct.pack("<i", len(calls))]
    for number, call in enumerate(calls):
        symbol = f"k{number}"
        signature, scratch = lowered.signature[symbol], lowered.scratch[symbol]
        declared = [str(a.dtype) for a in call.inputs] + [dtype for _, dtype in call.outputs]
        assert list(signature[: len(declared)]) == declared, (signature, declared)
        assert len(signature) == len(declared) + len(scratch)
        parts.append(struct.pack("<ii", number, len(signature)))
        for i, array in enumerate(call.inputs):
            parts.append(
                struct.pack("<iii", 0, array.nbytes, int(call.inplace == i or i not in lowered.readonly[symbol]))
            )
            parts.append(np.ascontiguousarray(array).tobytes())
        for shape, dtype in call.outputs:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            kind = (1, 0) if call.inplace is None else (3, call.inplace)
            parts.append(struct.pack("<iii", kind[0], size, kind[1]))
        parts += [struct.pack("<iii", 2, size, 0) for size in scratch]
    return b"".join(parts)


def _decode(calls: Sequence[Call], data: bytes) -> list[list[np.ndarray]]:
    found, offset = [], 0
    for call in calls:
        arrays = []
        for shape, dtype in call.outputs:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(data, dtype, count, offset).reshape(shape))
            offset += count * np.dtype(dtype).itemsize
        found.append(arrays)
    assert offset == len(data)
    return found
