"""From a Plan to C: the header, the sequence of calls, the weights blob, the self-test, example and runner."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
import numpy as np

from edgec.plan import COPY, Plan, Port, Step
from edgec.targets.device import Device

CTYPES = {
    "float32": "float",
    "float64": "double",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "uint32": "uint32_t",
    "int64": "int64_t",
    "uint64": "uint64_t",
    "bool": "uint8_t",
}
RESERVED = frozenset(
    "arena a w auto break case char const continue default do double else enum extern float for goto if inline int long "
    "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while "
    "class new delete template this namespace operator private public virtual".split()
)


class Kernels(Protocol):
    """What the emitter reads of `LoweredKernels`."""

    signature: dict[str, tuple[str, ...]]
    readonly: dict[str, frozenset[int]]


@dataclass(frozen=True)
class SelfTest:
    """One sample and what the model must give for it; tolerance 0 means bit for bit, else relative to the largest."""

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    tolerance: float


@dataclass(frozen=True)
class _Pointer:
    """A C parameter."""

    c: str
    ctype: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int


def c_name(name: str) -> str:
    """A C identifier for an input or output."""
    cleaned = re.sub(r"\W", "_", name)
    return f"{cleaned}_" if cleaned in RESERVED or not re.match(r"[A-Za-z_]", cleaned) else cleaned


def layout_constants(plan: Plan) -> tuple[dict[str, int], bytes]:
    """Offsets of the constants in the weights blob, each on a cache line, and the blob."""
    offsets, parts, size = {}, [], 0
    for name, constant in plan.constants.items():
        padding = -size % plan.arena_align
        parts.append(b"\0" * padding)
        offsets[name] = size + padding
        data = np.ascontiguousarray(constant.array).tobytes()
        parts.append(data)
        size += padding + len(data)
    return offsets, b"".join(parts) or b"\0"


def emit(plan: Plan, kernels: Kernels, device: Device, selftest: SelfTest, version: str) -> dict[str, bytes]:
    """All generated files by name. Deterministic: no time, no path of this machine."""
    offsets, weights = layout_constants(plan)
    inputs = [_pointer(p) for p in plan.inputs]
    outputs = [_pointer(p) for p in plan.outputs]
    signature = [f"const {p.ctype} *{p.c}" for p in inputs] + [f"{p.ctype} *{p.c}" for p in outputs] + ["void *arena"]
    data_offsets, data = _selftest_data(plan, selftest)
    results_offset = _align(plan.arena_bytes, plan.arena_align)
    result_offsets, room = _consecutive([p.nbytes for p in outputs], plan.arena_align)
    exact = selftest.tolerance == 0
    common: dict[str, Any] = {
        "name": plan.name,
        "macro": plan.name.upper(),
        "version": version,
        "device": device.name,
        "inputs": inputs,
        "outputs": outputs,
        "signature": ", ".join(signature),
        "names": ", ".join(p.c for p in inputs + outputs),
        "arena_bytes": plan.arena_bytes,
        "arena_align": plan.arena_align,
        "selftest_bytes": results_offset + room,
        "tolerance": 0 if exact else repr(selftest.tolerance),
    }
    input_places, input_bytes = _consecutive([p.nbytes for p in inputs], 1)
    output_places, output_bytes = _consecutive([p.nbytes for p in outputs], 1)
    run_arguments = [f"(const {p.ctype} *)(input + {o})" for p, o in zip(inputs, input_places, strict=True)]
    run_arguments += [f"({p.ctype} *)(output + {o})" for p, o in zip(outputs, output_places, strict=True)]
    test_arguments = [f"(const {p.ctype} *)(data + {o})" for p, o in zip(inputs, data_offsets, strict=False)]
    test_arguments += [f"({p.ctype} *)(results + {o})" for p, o in zip(outputs, result_offsets, strict=True)]
    expected = data_offsets[len(inputs) :]
    comparisons = []
    for p, got, want in zip(outputs, result_offsets, expected, strict=True):
        if exact or not p.dtype.startswith("float"):
            comparisons.append(f"memcmp(results + {got}, data + {want}, {p.nbytes}) != 0")
        else:
            pointers = f"(const {p.ctype} *)(results + {got}), (const {p.ctype} *)(data + {want})"
            comparisons.append(f"differs_{p.dtype}({pointers}, {p.elements})")
    float_types = [] if exact else sorted({p.dtype for p in outputs if p.dtype.startswith("float")})
    calls = [{"text": _call(plan, step, kernels, offsets), "layer": _comment(step.layer)} for step in plan.steps]
    used = sorted({s.symbol for s in plan.steps if s.symbol != COPY})
    prototypes = [{"symbol": s, "parameters": _parameters(kernels, s)} for s in used]
    texts = {
        f"{plan.name}.h": _render("model.h.jinja", **common),
        f"{plan.name}.c": _render("model.c.jinja", **common, kernels=prototypes, calls=calls),
        "selftest.c": _render(
            "selftest.c.jinja",
            **common,
            ctypes=CTYPES,
            float_types=float_types,
            results_offset=results_offset,
            arguments=", ".join(test_arguments),
            results=comparisons,
        ),
        "weights.S": _render(
            "blob.S.jinja", symbol=f"{plan.name}_weights", file="weights.bin", align=plan.arena_align
        ),
        "selftest_data.S": _render(
            "blob.S.jinja", symbol=f"{plan.name}_selftest_data", file="selftest.bin", align=plan.arena_align
        ),
        "example.c": _render(
            "example.c.jinja", **common, cc=device.cc, cflags="".join(f"{f} " for f in device.cflags)
        ),
        "runner.c": _render(
            "runner.c.jinja",
            **common,
            arguments=", ".join(run_arguments),
            input_bytes=input_bytes,
            output_bytes=output_bytes,
        ),
        f"{plan.name}-config.cmake": _render("config.cmake.jinja", **common),
        "exports.map": f"{{ global: {plan.name}_run; {plan.name}_selftest; local: *; }};\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    return {**files, "weights.bin": weights, "selftest.bin": data}


def _pointer(port: Port) -> _Pointer:
    elements = int(np.prod(port.shape)) if port.shape else 1
    return _Pointer(c_name(port.name), CTYPES[port.dtype], port.dtype, port.shape, elements, port.nbytes)


def _call(plan: Plan, step: Step, kernels: Kernels, offsets: Mapping[str, int]) -> str:
    if step.symbol == COPY:
        source, target = (_address(plan, name, offsets) for name in step.args)
        return f"memcpy({target}, {source}, {plan.buffers[step.args[1]].nbytes});"
    types = kernels.signature[step.symbol]
    constant = kernels.readonly[step.symbol]
    arguments = []
    for position, (name, dtype) in enumerate(zip(step.args, types, strict=True)):
        cast = f"const {CTYPES[dtype]} *" if position in constant else f"{CTYPES[dtype]} *"
        arguments.append(f"({cast})({_address(plan, name, offsets)})")
    return f"{step.symbol}({', '.join(arguments)});"


def _address(plan: Plan, name: str, offsets: Mapping[str, int]) -> str:
    if name in offsets:
        return f"w + {offsets[name]}"
    buffer = plan.buffers[name]
    root = buffer.alias_of or name
    if plan.buffers[root].offset is None:
        return c_name(plan.pointers[root])
    return f"a + {plan.buffers[root].offset}"


def _parameters(kernels: Kernels, symbol: str) -> str:
    constant = kernels.readonly[symbol]
    return ", ".join(
        f"{'const ' if i in constant else ''}{CTYPES[t]} *" for i, t in enumerate(kernels.signature[symbol])
    )


def _comment(layer: str) -> str:
    return layer.replace("*/", "").replace("/*", "")


def _selftest_data(plan: Plan, selftest: SelfTest) -> tuple[list[int], bytes]:
    """Inputs, then expected outputs, each aligned."""
    ports = [*plan.inputs, *plan.outputs]
    arrays = [
        np.ascontiguousarray(a, dtype=p.dtype)
        for a, p in zip((*selftest.inputs, *selftest.outputs), ports, strict=True)
    ]
    offsets, size = _consecutive([a.nbytes for a in arrays], plan.arena_align)
    data = bytearray(size)
    for offset, array in zip(offsets, arrays, strict=True):
        data[offset : offset + array.nbytes] = array.tobytes()
    return offsets, bytes(data)


def _consecutive(sizes: Sequence[int], align: int) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(_align(end, align))
        end = offsets[-1] + size
    return offsets, _align(end, align)


def _align(value: int, align: int) -> int:
    return -(-value // align) * align


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("edgec.targets.cpu"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)
