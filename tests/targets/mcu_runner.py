"""Running one microcontroller kernel: compiled for this machine (portable C), or for a device in QEMU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgec.targets.device import Device, load_device
from edgec.targets.mcu.emit import parameters
from edgec.targets.mcu.header import header
from edgec.targets.mcu.kernels import implement
from edgec.targets.mcu.kernels.base import McuKernel

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
    function: Any = None,
) -> np.ndarray:
    """The flat output of a kernel in portable C. activations: `before` of them (default: all) stand before the weights.

    inplace: the output shares the memory of the operand that `kernel.inplace` names. Fails when a kernel writes beside
    its output and its scratch memory. function: of `compiled`, when many kernels are compiled at once.
    """
    arrays, outputs = memory(kernel, activations, weights or {}, before, device or load_device("cortex-m3"), inplace)
    function = function or compiled([kernel])[0]
    blocks = []
    for array in arrays:
        block = np.full(array.nbytes + 2 * GUARD + 8, 0x5A, np.uint8)
        start = GUARD + -(block.ctypes.data + GUARD) % 8
        block[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        blocks.append((block, start, array.nbytes))
    shared = kernel.inplace[0] if inplace else None
    pointers = []
    for number, (block, start, _) in enumerate(blocks):
        if number == outputs and shared is not None:
            block, start, _ = blocks[shared]
        pointers.append(block.ctypes.data + start)
    function((ctypes.c_void_p * len(pointers))(*pointers))
    for number, (block, start, size) in enumerate(blocks):
        inside = np.arange(len(block))
        outside = block[(inside < start) | (inside >= start + size)]
        assert np.all(outside == 0x5A), f"operand {number}: wrote beside the buffer"
        if number < outputs and number != shared:
            assert block[start : start + size].tobytes() == arrays[number].tobytes(), f"operand {number} was changed"
    block, start, size = blocks[outputs if shared is None else shared]
    return np.frombuffer(block[start : start + size].tobytes(), kernel.operands()[outputs].dtype)


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


def compiled(kernels: Sequence[McuKernel]) -> list[Any]:
    """Functions of one library, each for one kernel."""
    library = _library(c_text(*kernels))
    functions = [getattr(library, f"kernel_under_test{i or ''}") for i in range(len(kernels))]
    for function in functions:
        function.restype = None
    return functions


def c_text(*kernels: McuKernel) -> str:
    """C file with the header's parts and `kernel_under_test<number>(void **pointers)` (no number for the first)."""
    calls = [kernel.call() for kernel in kernels]
    texts = [header(call.part for call in calls)]
    for number, (kernel, call) in enumerate(zip(kernels, calls, strict=True)):
        definition, first = parameters(f"P{number}", call)
        pointers = [f"p[{i}]" for i in range(len(kernel.operands()) + len(call.scratch))]
        arguments = ", ".join([*([first] if first else []), *pointers])
        name = f"kernel_under_test{number or ''}"
        texts.append(
            f"{definition}\nvoid {name}(void **p);\nvoid {name}(void **p) {{ {call.function}({arguments}); }}\n"
        )
    return "\n".join(texts)


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
