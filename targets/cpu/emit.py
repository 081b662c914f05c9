"""From a Plan to C: the header, the sequence of calls, the weights blob, the self-test, example and runner."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgec.errors import EdgecError
from edgec.plan import COPY, Plan, Port, Step
from edgec.targets.device import Device
from edgec.targets.templates import render

_render = functools.partial(render, "edgec.targets.cpu")
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
    # Only ever passed on between kernels: C has no portable half type.
    "float16": "uint16_t",
}
# A kernel that takes less time than this is not worth waking threads for; in microseconds, at the work a slow core does
# in one. Handing out a kernel takes one to five.
WORTH_SHARING = 20
MACS_PER_US, BYTES_PER_US = 5000, 4000
# What a C or C++ parameter may not be called; the last line is what the generated code uses itself.
_RESERVED = """
    auto break case char const continue default do double else enum extern float for goto if inline int long register
    restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
    alignas alignof and and_eq asm bitand bitor bool catch class compl concept constexpr const_cast decltype delete
    dynamic_cast explicit export false friend mutable namespace new noexcept not not_eq nullptr operator or or_eq
    private protected public reinterpret_cast requires static_assert static_cast template this thread_local throw true
    try typeid typename using virtual wchar_t xor xor_eq linux unix NULL EOF errno stdin stdout stderr
    arena i check status main memcpy printf fprintf calloc free posix_memalign
"""
RESERVED = frozenset(_RESERVED.split())
# A header or library of these names would stand in for the system's.
_SYSTEM = """
    assert complex ctype errno fenv float inttypes iso646 limits locale math setjmp signal stdalign stdarg stdatomic
    stdbool stddef stdint stdio stdlib stdnoreturn string tgmath threads time uchar wchar wctype alloca endian features
    c dl gcc m pthread rt util
"""
SYSTEM_NAMES = frozenset(_SYSTEM.split())


class Kernels(Protocol):
    """What the emitter reads of `LoweredKernels`."""

    @property
    def signature(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def readonly(self) -> Mapping[str, frozenset[int]]: ...

    @property
    def phases(self) -> Mapping[str, tuple[tuple[str, int], ...]]: ...


class SelfTest(NamedTuple):
    """One sample and what the model must give for it.

    tolerance: 0 means bit for bit; else |error| <= tolerance * largest |expected|, for float outputs.
    """

    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]
    tolerance: float


class Member(NamedTuple):
    """An object in a library: a program gets it when it calls one of its functions, and sees nothing else of it."""

    name: str
    sources: tuple[str, ...]
    exports: tuple[str, ...]


@dataclass(frozen=True)
class _Pointer:
    """A C parameter."""

    c: str
    ctype: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int


def check_name(name: str) -> None:
    """Raise EdgecError unless a header and a library can be called `name`."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise EdgecError("is not a C identifier", where=f"model name '{name}'", hint="give another one with --name")
    if name in SYSTEM_NAMES:
        raise EdgecError(
            "is the name of a system header or library",
            where=f"model name '{name}'",
            hint="give another one with --name",
        )


def c_names(names: Sequence[str]) -> list[str]:
    """A C identifier for each input and output; different ones, in upper case as well."""
    taken: set[str] = set()
    found = []
    for name in names:
        cleaned = re.sub(r"[^0-9A-Za-z_]", "_", name)
        # The generated code's own variables start with an underscore, types end in _t.
        cleaned = cleaned if re.match(r"[A-Za-z]", cleaned) else f"x{cleaned}"
        cleaned = f"{cleaned}_" if cleaned in RESERVED or cleaned.endswith("_t") else cleaned
        unique, number = cleaned, 2
        while unique.upper() in taken:
            unique, number = f"{cleaned}_{number}", number + 1
        taken.add(unique.upper())
        found.append(unique)
    return found


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


def emit(
    plan: Plan, kernels: Kernels, device: Device, selftest: SelfTest | None, version: str, threads: int = 1
) -> dict[str, bytes]:
    """All generated files by name. Deterministic: no time, no path of this machine.

    Without `selftest` there is no self-test function. threads: the number that the header advises and the example uses;
    the library starts with one, whatever it is. Raises EdgecError for a model name that no library may have and
    for a self-test that does not fit the model.
    """
    check_name(plan.name)
    offsets, weights = layout_constants(plan)
    names = c_names([p.name for p in (*plan.inputs, *plan.outputs)])
    inputs = [_pointer(p, c) for p, c in zip(plan.inputs, names, strict=False)]
    outputs = [_pointer(p, c) for p, c in zip(plan.outputs, names[len(inputs) :], strict=True)]
    signature = [f"const {p.ctype} *{p.c}" for p in inputs] + [f"{p.ctype} *{p.c}" for p in outputs] + ["void *arena"]
    results_offset = _align(plan.arena_bytes, plan.arena_align)
    result_offsets, room = _consecutive([p.nbytes for p in outputs], plan.arena_align)
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
        "threads": threads,
        "selftest": selftest is not None,
        "selftest_bytes": results_offset + room,
        "tolerance": 0 if selftest is None or selftest.tolerance == 0 else repr(float(selftest.tolerance)),
    }
    input_places, input_bytes = _consecutive([p.nbytes for p in inputs], 1)
    output_places, output_bytes = _consecutive([p.nbytes for p in outputs], 1)
    run_arguments = [f"(const {p.ctype} *)(input + {o})" for p, o in zip(inputs, input_places, strict=True)]
    run_arguments += [f"({p.ctype} *)(output + {o})" for p, o in zip(outputs, output_places, strict=True)]
    weights_at = {name: f"_w + {offset}" for name, offset in offsets.items()}
    addresses = addresses_of(plan, weights_at, [p.c for p in inputs], [p.c for p in outputs])
    calls = [{"text": _call(plan, step, kernels, addresses), "layer": comment(step.layer)} for step in plan.steps]
    used = sorted({s.symbol for s in plan.steps if s.symbol != COPY})
    prototypes = [p for symbol in used for p in _prototypes(kernels, symbol)]
    large = sorted({s.symbol for s in plan.steps if _worth_sharing(plan, s, kernels)})
    shared = [
        {"symbol": c, "arguments": ", ".join(f"({t})p[{i}]" for i, t in enumerate(_pointers(kernels, symbol)))}
        for symbol in large
        for c, tasks in kernels.phases[symbol]
        if tasks
    ]
    texts = {
        f"{plan.name}.h": _render("model.h.jinja", **common),
        "model.c": _render("model.c.jinja", **common, kernels=prototypes, shared=shared, calls=calls),
        "threads.c": _render("threads.c.jinja", **common),
        "weights.S": _blob(f"{plan.name}_weights", "weights.bin", plan.arena_align),
        "example.c": _render("example.c.jinja", **common, cc=device.cc, cflags="".join(f"{f} " for f in device.cflags)),
        "runner.c": _render(
            "runner.c.jinja",
            **common,
            arguments=", ".join(run_arguments),
            input_bytes=input_bytes,
            output_bytes=output_bytes,
        ),
        f"{plan.name}-config.cmake": _render("config.cmake.jinja", **common),
    }
    data = {"weights.bin": weights}
    if selftest is not None:
        places, data["selftest.bin"] = _selftest_data(plan, selftest)
        arguments = [f"(const {p.ctype} *)(data + {o})" for p, o in zip(inputs, places, strict=False)]
        arguments += [f"({p.ctype} *)(results + {o})" for p, o in zip(outputs, result_offsets, strict=True)]
        exact = selftest.tolerance == 0
        texts["selftest.c"] = _render(
            "selftest.c.jinja",
            **common,
            ctypes=CTYPES,
            float_types=[] if exact else sorted({p.dtype for p in outputs} & {"float32", "float64"}),
            results_offset=results_offset,
            arguments=", ".join(arguments),
            results=_comparisons(outputs, result_offsets, places[len(inputs) :], exact),
        )
        texts["selftest_data.S"] = _blob(f"{plan.name}_selftest_data", "selftest.bin", plan.arena_align)
    return {**{name: text.encode() for name, text in texts.items()}, **data}


def members(name: str, selftest: bool) -> list[Member]:
    """The parts of a library, the one with the kernels first."""
    parts = [
        Member(name, ("model.c", "weights.S"), (f"{name}_run", f"{name}_set_parallel_for")),
        Member(f"{name}_threads", ("threads.c",), (f"{name}_set_threads",)),
        Member(f"{name}_selftest", ("selftest.c", "selftest_data.S"), (f"{name}_selftest",)),
    ]
    return parts if selftest else parts[:-1]


def _pointer(port: Port, c: str) -> _Pointer:
    return _Pointer(c, CTYPES[port.dtype], port.dtype, port.shape, math.prod(port.shape), port.nbytes)


def addresses_of(
    plan: Plan, constants: Mapping[str, str], inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, str]:
    """The C expression for the memory of every constant and buffer.

    constants: those of the constants. inputs, outputs: the parameters. The arena is `_a`.
    """
    callers = {f"in_{p.name}": c for p, c in zip(plan.inputs, inputs, strict=True)}
    results = {p.name: c for p, c in zip(plan.outputs, outputs, strict=True)}
    callers.update({root: results[port] for root, port in plan.pointers.items() if root not in callers})
    found = dict(constants)
    for name, buffer in plan.buffers.items():
        root = plan.buffers[buffer.alias_of or name]
        found[name] = callers[root.name] if root.offset is None else f"_a + {root.offset}"
    return found


def _call(plan: Plan, step: Step, kernels: Kernels, addresses: Mapping[str, str]) -> str:
    """The statement that does a step."""
    if step.symbol == COPY:
        source, target = step.args
        return f"memcpy({addresses[target]}, {addresses[source]}, {plan.buffers[target].nbytes});"
    readonly = kernels.readonly[step.symbol]
    for position, name in enumerate(step.args):
        if position not in readonly and (name in plan.constants or plan.buffers[name].kind == "input"):
            raise AssertionError(f"{step.symbol} writes to {name}, which is read-only")
    types = _pointers(kernels, step.symbol)
    arguments = ", ".join(f"({t})({addresses[a]})" for t, a in zip(types, step.args, strict=True))
    phases = kernels.phases[step.symbol]
    if not _worth_sharing(plan, step, kernels):
        calls = [f"{c}({arguments}, 0, {tasks});" if tasks else f"{c}({arguments});" for c, tasks in phases]
        return calls[0] if len(calls) == 1 else f"{{ {' '.join(calls)} }}"
    lines = [f"const void *const _p[] = {{{', '.join(addresses[a] for a in step.args)}}};"]
    for c, tasks in phases:
        lines.append(f"{plan.name}_share({tasks}, {c}_range, _p);" if tasks else f"{c}({arguments});")
    return "\n        ".join(["{", *lines]) + "\n    }"


def _worth_sharing(plan: Plan, step: Step, kernels: Kernels) -> bool:
    """Whether threads would make a step faster."""
    if step.symbol == COPY or not any(tasks > 1 for _, tasks in kernels.phases[step.symbol]):
        return False
    memory = sum(
        plan.constants[name].array.nbytes if name in plan.constants else plan.buffers[name].nbytes for name in step.args
    )
    return step.macs / MACS_PER_US + memory / BYTES_PER_US >= WORTH_SHARING


def _prototypes(kernels: Kernels, symbol: str) -> list[dict[str, str]]:
    """The declarations of a kernel's functions."""
    pointers = ", ".join(_pointers(kernels, symbol))
    return [
        {"symbol": c, "parameters": f"{pointers}, int32_t begin, int32_t end" if tasks else pointers}
        for c, tasks in kernels.phases[symbol]
    ]


def _pointers(kernels: Kernels, symbol: str) -> list[str]:
    """The C types of a kernel's pointers."""
    constant = kernels.readonly[symbol]
    return [f"{'const ' if i in constant else ''}{CTYPES[t]} *" for i, t in enumerate(kernels.signature[symbol])]


def comment(text: str) -> str:
    """`text` as it may stand in a C comment."""
    return re.sub(r"[^ -~]|\\", "?", text).replace("*/", "* /").replace("/*", "/ *")


def _blob(symbol: str, file: str, align: int) -> str:
    return _render("blob.S.jinja", symbol=symbol, file=file, align=align)


def _comparisons(outputs: Sequence[_Pointer], got: Sequence[int], want: Sequence[int], exact: bool) -> list[str]:
    """C conditions that are true when an output differs from what is expected."""
    conditions = []
    for p, a, b in zip(outputs, got, want, strict=True):
        if exact or p.dtype not in ("float32", "float64"):
            conditions.append(f"memcmp(results + {a}, data + {b}, {p.nbytes}) != 0")
        else:
            pointers = f"(const {p.ctype} *)(results + {a}), (const {p.ctype} *)(data + {b})"
            conditions.append(f"differs_{p.dtype}({pointers}, {p.elements})")
    return conditions


def _selftest_data(plan: Plan, selftest: SelfTest) -> tuple[list[int], bytes]:
    """Inputs, then expected outputs, each aligned. Raises EdgecError when they do not fit the model."""
    ports = [*plan.inputs, *plan.outputs]
    given = [np.asarray(a) for a in (*selftest.inputs, *selftest.outputs)]
    if [(a.shape, str(a.dtype)) for a in given] != [(p.shape, p.dtype) for p in ports]:
        found = ", ".join(f"{a.dtype}{list(a.shape)}" for a in given)
        wanted = ", ".join(f"{p.name}: {p.dtype}{list(p.shape)}" for p in ports)
        raise EdgecError(f"has arrays {found}, expected {wanted}", where=f"self-test of {plan.name}")
    offsets, size = _consecutive([a.nbytes for a in given], plan.arena_align)
    data = bytearray(size)
    for offset, array in zip(offsets, given, strict=True):
        data[offset : offset + array.nbytes] = np.ascontiguousarray(array).tobytes()
    return offsets, bytes(data)


def _consecutive(sizes: Sequence[int], align: int) -> tuple[list[int], int]:
    offsets, end = [], 0
    for size in sizes:
        offsets.append(_align(end, align))
        end = offsets[-1] + size
    return offsets, _align(end, align)


def _align(value: int, align: int) -> int:
    return -(-value // align) * align
