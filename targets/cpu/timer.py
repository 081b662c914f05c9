"""Times of compiled kernels on this machine: one thread, processor time of that thread, best of several short runs."""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from edgec.errors import EdgecError
from edgec.targets.codegen import LoweredKernels, build_objects, c_calls, lower_kernels
from edgec.targets.cpu.runner import execute
from edgec.targets.device import Device

ALIGN = 64
# Position of the weights among the parameters.
WEIGHTS = 1
# Seconds of one run: long against the clock's step, short against an interruption.
RUN = 2e-3
# Bytes above which more weights change nothing: they come from memory.
MOST_WEIGHTS = 32 << 20

SOURCE = """
#define _POSIX_C_SOURCE 200112L
#include <stdint.h>
#include <time.h>
typedef void *P;
typedef int64_t I;
{prototypes}
static I now(void) {{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}}
/* Nanoseconds of `runs` calls of kernel `k`; call r reads copy r % copies of the weights. */
I time_kernel(I k, P *a, I copies, I step, I runs) {{
    char *weights = a[1];
    I start = now();
    for (I r = 0; r < runs; r++) {{
        a[1] = weights + r % copies * step;
        switch (k) {{
{cases}
        }}
    }}
    a[1] = weights;
    return now() - start;
}}
"""


class KernelTimer:
    """Compiled kernels with parameters x, weights and others, all with the same meaning, on made-up operands.

    device: one whose code this machine runs. weights: bytes of all weights of the model that the kernels belong to: so
    much is read between two reads of the same weights, as in the model itself.
    """

    def __init__(self, device: Device, weights: int = 0) -> None:
        self.device = device
        self._weights = min(weights, MOST_WEIGHTS)
        self._operands: list[np.ndarray] = []
        self._kernels: list[_Kernel] = []

    def add(self, functions: Sequence[Any]) -> range:
        """Compile PrimFuncs, several at a time; returns their numbers. Raises EdgecError, ToolchainMissing."""
        named = {f"k{i}": f.with_attr("global_symbol", f"k{i}") for i, f in enumerate(functions)}
        lowered = lower_kernels(tvm.IRModule(named), self.device)
        run = _load(lowered, list(named), self.device)
        first = len(self._kernels)
        for number, (name, function) in enumerate(named.items()):
            sizes = [(_dtype(p), _elements(p)) for p in function.params]
            sizes += [("uint8", size) for size in lowered.scratch[name]]
            copies, step = self._reserve(sizes)
            self._kernels.append(_Kernel(run, number, len(sizes), copies, step))
        return range(first, len(self._kernels))

    def put(self, position: int, values: np.ndarray) -> None:
        """Give operand `position` these values in place of made-up ones, where time depends on them; after `add`."""
        self._operands[position].view(np.uint8)[: values.nbytes] = (
            np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        )

    def run(self, number: int) -> float:
        """Seconds per call of a kernel, over one short run of calls."""
        kernel = self._kernels[number]
        places = [a.ctypes.data for a in self._operands[: kernel.arguments]]
        while True:
            pointers = (ctypes.c_void_p * len(places))(*places)
            numbers = (ctypes.c_int64(v) for v in (kernel.copies, kernel.step, kernel.runs))
            seconds = kernel.function(ctypes.c_int64(kernel.number), pointers, *numbers) * 1e-9
            if seconds >= RUN / 2:
                return seconds / kernel.runs
            kernel.runs = max(2 * kernel.runs, round(kernel.runs * RUN / max(seconds, RUN / 100)))

    def best(self, numbers: Sequence[int], rounds: int) -> dict[int, float]:
        """The shortest of `rounds` runs of each kernel, in seconds per call; they take turns, so that whatever else the
        machine does slows all of them."""
        found = {n: self.run(n) for n in numbers}
        for _ in range(rounds - 1):
            for n in numbers:
                found[n] = min(found[n], self.run(n))
        return found

    def _reserve(self, sizes: Sequence[tuple[str, int]]) -> tuple[int, int]:
        """Make room for operands of these types and numbers of elements; how often the weights fit, and the step."""
        copies, step = 1, 0
        for position, (dtype, count) in enumerate(sizes):
            nbytes = count * np.dtype(dtype).itemsize
            if position == WEIGHTS:
                step = -(-nbytes // ALIGN) * ALIGN
                copies = max(1, self._weights // step)
                nbytes = copies * step
            if position == len(self._operands):
                self._operands.append(_memory(dtype, nbytes))
            elif self._operands[position].nbytes < nbytes:
                self._operands[position] = _memory(dtype, nbytes)
        return copies, step


@dataclass
class _Kernel:
    """function: `time_kernel` of the library that has the kernel as number `number`; runs: calls in one run."""

    function: Any
    number: int
    arguments: int
    copies: int
    step: int
    runs: int = 1


def _load(lowered: LoweredKernels, names: Sequence[str], device: Device) -> Any:
    """`time_kernel` of a library with these kernels."""
    objects = build_objects(lowered, device)
    prototypes, cases = "", ""
    for number, name in enumerate(names):
        arguments = [f"a[{k}]" for k in range(len(lowered.signature[name]))]
        declared, calls = c_calls(lowered, name, arguments)
        prototypes += declared
        cases += f"        case {number}: {calls} break;\n"
    with tempfile.TemporaryDirectory(prefix="edgec-timer-") as name:
        folder = Path(name)
        (folder / "timer.c").write_text(SOURCE.format(prototypes=prototypes, cases=cases))
        for symbol, data in objects.items():
            (folder / f"{symbol}.o").write_bytes(data)
        sources = [str(folder / "timer.c"), *(str(folder / f"{symbol}.o") for symbol in objects)]
        library = folder / "timer.so"
        flags = [*device.cflags, "-std=c99", "-O1", "-shared", "-fPIC"]
        status, text = execute([device.cc, *flags, *sources, "-o", str(library), "-lm"], device.package)
        if status:
            raise EdgecError(f"failed with status {status}: {text}", where=device.cc)
        # The library stays loaded after its file has gone.
        function = ctypes.CDLL(str(library)).time_kernel
    function.restype = ctypes.c_int64
    return function


def _memory(dtype: str, nbytes: int) -> np.ndarray:
    """Aligned values that no operation is slow on: no subnormals, shifts by one."""
    rng = np.random.default_rng(0)
    count = -(-nbytes // np.dtype(dtype).itemsize)
    if dtype == "int8":
        values = rng.integers(-127, 128, count, np.int8)
    elif dtype.startswith("float"):
        values = rng.uniform(0.5, 1.0, count).astype(dtype)
    else:
        values = np.ones(count, dtype)
    memory = np.zeros(values.nbytes + ALIGN, np.uint8)
    start = -memory.ctypes.data % ALIGN
    place = memory[start : start + values.nbytes]
    place[:] = values.view(np.uint8)
    return place


def _dtype(parameter: Any) -> str:
    return str(parameter.ty.dtype.dtype)


def _elements(parameter: Any) -> int:
    return math.prod(int(extent) for extent in parameter.ty.shape)
