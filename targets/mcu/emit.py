"""From a Plan to the C files of a microcontroller bundle."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.errors import EdgecError
from edgec.plan import COPY, Plan, Port, Step
from edgec.targets.cpu.emit import CTYPES, SelfTest, addresses_of, c_names, check_name, comment
from edgec.targets.cpu.toolchain import binutil
from edgec.targets.device import Device
from edgec.targets.mcu import header
from edgec.targets.mcu.kernels.base import Call, Value
from edgec.targets.mcu.lower import LoweredC
from edgec.targets.templates import render

_render = functools.partial(render, "edgec.targets.mcu")
# Numbers in a line of an array.
PER_LINE = 24
MATH = re.compile(
    r"\b(INFINITY|NAN|(exp|log|pow|sqrt|tanh|sin|cos|erf|floor|ceil|round|rint|fma|trunc|fabs|nearbyint)f?\()"
)
AXES = {(0, 2, 3, 1): "channels last", (0, 2, 1): "channels last"}


@dataclass(frozen=True)
class _Pointer:
    """A C parameter; note: what a reader has to know about its layout."""

    c: str
    ctype: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    nbytes: int
    scale: float | None
    zero_point: int
    note: str


def emit(plan: Plan, kernels: LoweredC, device: Device, selftest: SelfTest | None, version: str) -> dict[str, bytes]:
    """All generated files by their place in the bundle. Deterministic: no time, no path of this machine.

    selftest: in the device's form. Raises EdgecError for a model name that no header may have.
    """
    check_name(plan.name)
    names = c_names([p.name for p in (*plan.inputs, *plan.outputs)])
    inputs = [_pointer(p, c) for p, c in zip(plan.inputs, names, strict=False)]
    outputs = [_pointer(p, c) for p, c in zip(plan.outputs, names[len(inputs) :], strict=True)]
    signature = [f"const {p.ctype} *{p.c}" for p in inputs] + [f"{p.ctype} *{p.c}" for p in outputs] + ["void *arena"]
    used = dict.fromkeys(s.symbol for s in plan.steps if s.symbol != COPY)
    sources = [kernels.sources[s] for s in used if s in kernels.sources]
    calls = {s: kernels.calls[s] for s in used if s in kernels.calls}
    weights_at = {name: _constant(plan, name) for name in plan.constants}
    addresses = addresses_of(plan, weights_at, [p.c for p in inputs], [p.c for p in outputs])
    constants = [_array(_constant(plan, c.name), c.array) for c in plan.constants.values()]
    text = "".join(sources)
    nn = header.header(call.part for call in calls.values())
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
        "math": "<math.h>" in nn or MATH.search(text) is not None,
        "calls": [{"text": _call(plan, s, kernels, addresses), "layer": comment(s.layer)} for s in plan.steps],
        "selftest": selftest is not None,
        "selftest_bytes": sum(p.nbytes for p in outputs),
        "tolerance": 0 if selftest is None or selftest.tolerance == 0 else repr(float(selftest.tolerance)),
        "cc": device.cc,
        "ar": binutil(device, "ar"),
        "cflags": "".join(f"{f} " for f in device.cflags),
    }
    files = {
        f"src/{plan.name}.h": _render("model.h.jinja", **common),
        f"src/{plan.name}.c": _render(
            "model.c.jinja",
            **common,
            sources=sources,
            parameters=[parameters(_struct(s), c)[0] for s, c in calls.items() if c.struct],
        ),
        f"src/{plan.name}_weights.h": _render(
            "weights.h.jinja", **common, constants=constants, bytes=plan.weight_bytes, align=plan.arena_align
        ),
        f"src/{header.NAME}": nn,
        "example/main.c": _render("main.c.jinja", **common),
        "Makefile": _render("Makefile.jinja", **common),
        "CMakeLists.txt": _render("CMakeLists.txt.jinja", **common),
        "zephyr/module.yml": _render("module.yml.jinja", **common),
        "zephyr/Kconfig": _render("Kconfig.jinja", **common),
        "library.properties": _render("library.properties.jinja", **common),
    }
    if selftest is not None:
        given = [_array(f"given_{p.c}", a) for p, a in zip(inputs, selftest.inputs, strict=True)]
        wanted = [_array(f"wanted_{p.c}", a) for p, a in zip(outputs, selftest.outputs, strict=True)]
        files[f"src/{plan.name}_selftest.c"] = _render(
            "selftest.c.jinja",
            **common,
            given=given,
            wanted=wanted,
            pairs=list(zip(outputs, wanted, strict=True)),
            arguments=", ".join([*(c["name"] for c in given), *(p.c for p in outputs)]),
        )
    return {place: text.encode() for place, text in files.items()}


def parameters(symbol: str, call: Call) -> tuple[str, str]:
    """(definition of the parameter struct, the argument that passes it); both empty when there is none."""
    if call.struct is None:
        return "", ""
    fields = ", ".join(f".{name} = {_literal(value)}" for name, value in call.fields.items())
    return f"static const {call.struct} {symbol} = {{{fields}}};\n", f"&{symbol}"


def _literal(value: Value) -> str:
    if isinstance(value, Sequence):
        return "{" + ", ".join(_literal(v) for v in value) + "}"
    if isinstance(value, float):
        return _float(value)
    if value == -(2**31):
        return "INT32_MIN"
    return f"({value})" if value < 0 else str(value)


def _float(value: float) -> str:
    """A float32 in C; hexadecimal, so that it is exact."""
    if not math.isfinite(value):
        raise EdgecError(f"{value} has no literal in C", where="code generation", hint="this is a bug in edgec")
    text = float(np.float32(value)).hex()
    return f"{text}f"


def _struct(symbol: str) -> str:
    return f"{symbol}_p"


def _pointer(port: Port, c: str) -> _Pointer:
    form = port.form
    note = ""
    if form is not None and form.axes is not None:
        note = f", {AXES.get(form.axes, 'axes ' + ', '.join(map(str, form.axes)) + ' of the model')}"
    return _Pointer(
        c,
        CTYPES[port.dtype],
        port.dtype,
        port.shape,
        math.prod(port.shape),
        port.nbytes,
        None if form is None or form.scale is None else float(np.float32(form.scale)),
        0 if form is None else form.zero_point,
        note,
    )


def _constant(plan: Plan, name: str) -> str:
    return f"{plan.name}_{name}"


def _call(plan: Plan, step: Step, kernels: LoweredC, addresses: Mapping[str, str]) -> str:
    """The statement that does a step."""
    if step.symbol == COPY:
        source, target = step.args
        return f"memcpy({addresses[target]}, {addresses[source]}, {plan.buffers[target].nbytes});"
    readonly = kernels.readonly[step.symbol]
    types = [
        f"{'const ' if i in readonly and step.symbol in kernels.calls else ''}{CTYPES[t]} *"
        for i, t in enumerate(kernels.signature[step.symbol])
    ]
    arguments = [f"({t})({addresses[a]})" for t, a in zip(types, step.args, strict=True)]
    call = kernels.calls.get(step.symbol)
    if call is not None:
        first = [f"&{_struct(step.symbol)}"] if call.struct is not None else []
        return f"{call.function}({', '.join([*first, *arguments])});"
    return " ".join(
        f"{name}({', '.join([*arguments, *(['0', str(tasks)] if tasks else [])])});"
        for name, tasks in kernels.phases[step.symbol]
    )


def _array(name: str, array: np.ndarray) -> dict[str, Any]:
    """A C array with the elements of `array`."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.kind == "f":
        words = [_float(float(v)) for v in flat]
    elif flat.dtype == np.int32:
        words = ["INT32_MIN" if v == -(2**31) else str(v) for v in flat.tolist()]
    else:
        words = [str(int(v)) for v in flat.tolist()]
    lines = [", ".join(words[i : i + PER_LINE]) for i in range(0, len(words), PER_LINE)]
    return {"name": name, "ctype": CTYPES[str(flat.dtype)], "elements": len(flat), "text": ",\n".join(lines)}
