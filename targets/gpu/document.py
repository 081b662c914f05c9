"""The plan of a GPU bundle as plain data, which the C host and the Python runners read.

Buffers have both an offset in one arena, for devices on which parts of a buffer may begin there, and the number of a
buffer of a pool, for all others: buffers of the pool are shared by tensors that are not alive together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.plan import COPY, Plan

if TYPE_CHECKING:
    # What runs bundles reads this module too, and needs no TVM.
    from edgec.targets.device import Device
    from edgec.targets.gpu.kernels.base import Size
    from edgec.targets.gpu.lower import LoweredGpu

SCHEMA = 1
# Sizes of buffers and copies are multiples of this in Vulkan.
WORD = 4
# Halves of OpenCL C otherwise than behind a pointer, and WGSL's.
HALF = re.compile(r"\bhalf\d*\b(?!\s*\*)|\bf16\b")
PRELUDE = "#pragma OPENCL EXTENSION cl_khr_fp16 : enable\n"


def describe(plan: Plan, kernels: LoweredGpu, device: Device) -> dict[str, Any]:
    """A JSON value with these keys.

    buffers: kind ("input", "output", "temp" or "constant") and bytes; constants have an offset in the blob of weights,
    temps an offset in the arena and a slot of the pool. inputs, outputs: numbers of buffers, in the order of the model.
    arena_bytes, align: size of the arena and what its offsets and those of the weights are multiples of. pool: bytes
    of each slot. functions: names, in the order of their texts. launches, in order: function (-1: copy the first
    argument to the second), args (numbers of buffers), grid, group, step, variant: of each step the launches of one
    variant are made. steps: layer, op and macs of each kernel call of the model, and how many variants there are.
    half: whether the kernels compute in float16, which OpenCL devices may lack.
    """
    numbers: dict[str, int] = {}
    buffers: list[dict[str, Any]] = []
    ports = {port.name: number for number, port in enumerate(plan.inputs)}
    results = {port.name: number for number, port in enumerate(plan.outputs)}
    inputs, outputs = [-1] * len(ports), [-1] * len(results)
    slots, pool = pooled(plan)

    def add(name: str, row: dict[str, Any]) -> int:
        numbers[name] = len(buffers)
        buffers.append(row)
        return numbers[name]

    for port in plan.inputs:
        inputs[ports[port.name]] = add(f"in_{port.name}", {"kind": "input", "bytes": port.nbytes})
    for name, buffer in plan.buffers.items():
        if buffer.alias_of is not None or name in numbers:
            continue
        if buffer.kind == "output":
            outputs[results[plan.pointers[name]]] = add(name, {"kind": "output", "bytes": buffer.nbytes})
        else:
            place = {"offset": buffer.offset, "slot": slots[name]}
            add(name, {"kind": "temp", "bytes": buffer.nbytes, **place})
    start = 0
    for name, constant in plan.constants.items():
        add(name, {"kind": "constant", "bytes": constant.array.nbytes, "offset": start})
        start += -(-constant.array.nbytes // plan.arena_align) * plan.arena_align
    for name, buffer in plan.buffers.items():
        if buffer.alias_of is not None:
            numbers[name] = numbers[buffer.alias_of]
    functions = {name: number for number, name in enumerate(kernels.texts())}
    launches = []
    for number, step in enumerate(plan.steps):
        args = [numbers[a] for a in step.args]
        if step.symbol == COPY:
            launches.append(_row(-1, args, (1, 1, 1), (1, 1, 1), number, 0))
            continue
        for variant, made in enumerate(kernels.variants[step.symbol]):
            for launch in made:
                chosen = [args[i] for i in launch.arguments]
                function = functions[launch.function]
                launches.append(_row(function, chosen, launch.grid, launch.group, number, variant))
    return {
        "schema": SCHEMA,
        "name": plan.name,
        "api": device.api,
        "arena_bytes": plan.arena_bytes,
        "align": plan.arena_align,
        "pool": pool,
        "weight_bytes": start,
        "buffers": buffers,
        "inputs": inputs,
        "outputs": outputs,
        "functions": list(functions),
        "launches": launches,
        "steps": [
            {
                "layer": step.layer,
                "op": step.op,
                "macs": step.macs,
                "variants": 1 if step.symbol == COPY else len(kernels.variants[step.symbol]),
            }
            for step in plan.steps
        ],
        "half": _computes_in_half(kernels),
    }


def _row(function: int, args: list[int], grid: Size, group: Size, step: int, variant: int) -> dict[str, Any]:
    return {
        "function": function,
        "args": args,
        "grid": list(grid),
        "group": list(group),
        "step": step,
        "variant": variant,
    }


def _computes_in_half(kernels: LoweredGpu) -> bool:
    """Whether values are halves: pointers to them and `vload_half` need no extension, WGSL's f16 does."""
    return any(HALF.search(text) for text in kernels.texts().values())


def pooled(plan: Plan) -> tuple[dict[str, int], list[int]]:
    """(slot of each buffer in memory of its own, bytes of each slot): the largest first, each into the first slot whose
    buffers are never alive with it."""
    owners = [b for b in plan.buffers.values() if b.alias_of is None and b.offset is not None]
    owners.sort(key=lambda b: (-b.nbytes, b.first, b.name))
    slots: dict[str, int] = {}
    sizes: list[int] = []
    spans: list[list[tuple[int, int]]] = []
    for buffer in owners:
        free = (i for i, used in enumerate(spans) if all(buffer.last < a or b < buffer.first for a, b in used))
        slot = next(free, len(sizes))
        if slot == len(sizes):
            sizes.append(-(-max(1, buffer.nbytes) // WORD) * WORD)
            spans.append([])
        spans[slot].append((buffer.first, buffer.last))
        slots[buffer.name] = slot
    return slots, sizes


def weights(plan: Plan) -> bytes:
    """All constants, each at its offset."""
    blob = bytearray()
    for constant in plan.constants.values():
        blob += np.ascontiguousarray(constant.array).tobytes()
        blob += bytes(-len(blob) % plan.arena_align)
    return bytes(blob)


def program(kernels: LoweredGpu) -> str:
    """OpenCL C of all functions, in one program."""
    return (PRELUDE if _computes_in_half(kernels) else "") + kernels.module


def modules(kernels: LoweredGpu) -> Mapping[str, str]:
    """WGSL by function name, one module for each."""
    found = {}
    for name, kernel in kernels.texts().items():
        text = kernel + "".join(kernels.helpers(name).values())
        half = re.search(r"\bf16\b", text) and not re.search(r"^enable f16;", text, re.M)
        found[name] = ("enable f16;\n" if half else "") + text
    return found
