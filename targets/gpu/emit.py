"""The files of a GPU bundle: kernels, plan, weights, and for OpenCL a host in C."""

from __future__ import annotations

import functools
import json
import math
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from edgec.plan import Plan, Port
from edgec.targets.cpu.emit import CTYPES, SelfTest, c_names, check_name, comment
from edgec.targets.device import Device
from edgec.targets.gpu import document

if TYPE_CHECKING:
    from edgec.targets.gpu.lower import LoweredGpu

# Kernels of languages that are not one program, by the ending of their files.
ENDINGS = {"vulkan": "wgsl", "metal": "metal"}
PLAN, WEIGHTS, PROGRAM, SELFTEST = "plan.json", "weights.bin", "model.cl", "selftest.bin"


def emit(plan: Plan, kernels: LoweredGpu, device: Device, selftest: SelfTest | None, version: str) -> dict[str, bytes]:
    """All files by their place in the bundle. Deterministic: no time, no path of this machine.

    Raises EdgecError for a model name that no C library may have.
    """
    check_name(plan.name)
    described = document.describe(plan, kernels, device)
    files = {PLAN: _json(described).encode(), WEIGHTS: document.weights(plan)}
    if selftest is not None:
        arrays = (*selftest.inputs, *selftest.outputs)
        files[SELFTEST] = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    if device.api == "opencl":
        files[PROGRAM] = document.program(kernels).encode()
        files.update(_host(plan, described, device, selftest, version))
    else:
        texts = document.modules(kernels) if device.api == "vulkan" else kernels.texts()
        files.update({f"kernels/{name}.{ENDINGS[device.api]}": text.encode() for name, text in texts.items()})
    return files


def _json(value: dict[str, Any]) -> str:
    """Lists of rows with a row on each line."""
    parts = []
    for key, item in value.items():
        rows = isinstance(item, list) and item and isinstance(item[0], dict)
        body = "[\n  " + ",\n  ".join(map(json.dumps, item)) + "\n ]" if rows else json.dumps(item)
        parts.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _host(
    plan: Plan, described: dict[str, Any], device: Device, selftest: SelfTest | None, version: str
) -> dict[str, bytes]:
    """The C sources."""
    names = c_names([p.name for p in (*plan.inputs, *plan.outputs)])
    inputs = [_pointer(p, c) for p, c in zip(plan.inputs, names, strict=False)]
    outputs = [_pointer(p, c) for p, c in zip(plan.outputs, names[len(inputs) :], strict=True)]
    arguments: list[int] = []
    launches = []
    for row in described["launches"]:
        total = [g * n for g, n in zip(row["grid"], row["group"], strict=True)]
        launches.append({**row, "first": len(arguments), "total": total})
        arguments += row["args"]
    in_places, in_bytes = _places(plan.inputs)
    out_places, out_bytes = _places(plan.outputs)
    exact = selftest is None or selftest.tolerance == 0
    passed = [f"(const {p['ctype']} *)(const void *)(input + {at})" for p, at in zip(inputs, in_places, strict=True)]
    passed += [f"({p['ctype']} *)(void *)(output + {at})" for p, at in zip(outputs, out_places, strict=True)]
    compared = []
    for p, at in zip(outputs, out_places, strict=True):
        if exact or p["dtype"] not in ("float32", "float64"):
            compared.append(f"memcmp(output + {at}, want + {at}, {p['bytes']}) != 0")
        else:
            compared.append(f"differs_{p['dtype']}(output + {at}, want + {at}, {p['elements']})")
    parameters = [f"const {p['ctype']} *{p['c']}" for p in inputs] + [f"{p['ctype']} *{p['c']}" for p in outputs]
    values: dict[str, Any] = {
        "name": plan.name,
        "macro": plan.name.upper(),
        "version": version,
        "device": device.name,
        "inputs": inputs,
        "outputs": outputs,
        "signature": ", ".join(parameters),
        "arena_bytes": described["arena_bytes"],
        "pool_bytes": sum(described["pool"]),
        "weight_bytes": described["weight_bytes"],
        "align": described["align"],
        "selftest": selftest is not None,
        "tolerance": 0 if selftest is None or exact else repr(float(selftest.tolerance)),
        "half": described["half"],
        "buffers": described["buffers"],
        "pool": described["pool"],
        "functions": described["functions"],
        "arguments": arguments or [0],
        "launches": launches,
        "steps": [{**step, "layer": _quoted(step["layer"])} for step in described["steps"]],
        "input_buffers": described["inputs"],
        "output_buffers": described["outputs"],
    }
    runner = {
        **values,
        "input_bytes": in_bytes,
        "output_bytes": out_bytes,
        "arguments": ", ".join(passed),
        "comparisons": compared,
        "float_types": []
        if exact
        else sorted({(p["ctype"], p["dtype"]) for p in outputs if p["dtype"] in ("float32", "float64")}),
    }
    texts = {
        f"include/{plan.name}.h": _render("model.h.jinja", values),
        f"src/{plan.name}.c": _render("model.c.jinja", values),
        "src/runner.c": _render("runner.c.jinja", runner),
        "CMakeLists.txt": _render("CMakeLists.txt.jinja", values),
    }
    return {place: text.encode() for place, text in texts.items()}


def _pointer(port: Port, c: str) -> dict[str, Any]:
    return {
        "c": c,
        "ctype": CTYPES[port.dtype],
        "dtype": port.dtype,
        "shape": port.shape,
        "elements": math.prod(port.shape),
        "bytes": port.nbytes,
    }


def _places(ports: tuple[Port, ...]) -> tuple[list[int], int]:
    """Where each one starts when they lie one after the other, and how long they are together."""
    starts, end = [], 0
    for port in ports:
        starts.append(end)
        end += port.nbytes
    return starts, end


def _quoted(text: str) -> str:
    """`text` as it may stand in a C string."""
    return comment(text).replace('"', "'")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("edgec.targets.gpu"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _render(template: str, values: dict[str, Any]) -> str:
    return _environment().get_template(template).render(**values)
