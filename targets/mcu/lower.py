"""Kernels of a microcontroller: calls of the kernel header, and C text for what has no function there."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from edgec.targets.codegen import LoweredKernels, lower_kernels
from edgec.targets.device import Device
from edgec.targets.mcu.kernels.base import CALL, Call
from edgec.targets.mcu.scalar import scalarise

# What TVM's C has around the functions.
PREPROCESSOR = re.compile(
    r'^#ifdef __cplusplus\nextern "C"\n#endif\n|^#[^\n]*\n|^//[^\n]*\n|^void\* __tvm\w+ = NULL;\n', re.M
)
# Functions that stand for float numbers until the text is there: TVM prints seven digits of them.
NUMBER = re.compile(r"\bek_number_(f|d)_([0-9a-f]+)\(\)")
# Of `targets/mcu/c/base.h`: TVM prints a cast of pointers, which C does not allow.
BITS = {"float32": "ek_float_of", "int32": "ek_bits_of"}
DEFINITION = re.compile(r"^TVM_DLL void \w+\((.*)\) \{$", re.M)
DECLARATION = re.compile(r"^TVM_DLL [^\n]*\);\n", re.M)


@dataclass(frozen=True)
class LoweredC:
    """Kernels as the emitter of microcontroller bundles prints them.

    calls: functions of the kernel header, by symbol. sources: C definitions of all other symbols. The rest is as in
    `LoweredKernels`; every symbol is one phase that is not divided.
    """

    module: Any
    signature: Mapping[str, tuple[str, ...]]
    scratch: Mapping[str, tuple[int, ...]]
    readonly: Mapping[str, frozenset[int]]
    phases: Mapping[str, tuple[tuple[str, int], ...]]
    calls: Mapping[str, Call]
    sources: Mapping[str, str]


def lower_to_c(module: tvm.IRModule, device: Device) -> LoweredC:
    """The kernels of `module`; the function's name becomes the C symbol."""
    ours: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            if CALL in (function.attrs or {}):
                ours[var.name_hint] = function
            else:
                rest[var.name_hint] = scalarise(function)
    other = lower_kernels(tvm.IRModule(rest), device) if rest else LoweredKernels(None, {}, {}, {}, {})
    calls = {symbol: Call.from_json(str(function.attrs[CALL])) for symbol, function in sorted(ours.items())}
    found = LoweredC(
        other.module,
        dict(other.signature),
        dict(other.scratch),
        dict(other.readonly),
        dict(other.phases),
        calls,
        {symbol: _c_text(other, symbol, device) for symbol in other.signature},
    )
    signature, scratch, readonly, phases = ({}, {}, {}, {})
    for symbol, call in calls.items():
        types = tuple(str(p.ty.dtype.dtype) for p in ours[symbol].params)
        signature[symbol] = (*types, *(["uint8"] * len(call.scratch)))
        scratch[symbol] = call.scratch
        readonly[symbol] = frozenset(range(len(types) - 1))
        phases[symbol] = ((symbol, 0),)
    return replace(
        found,
        signature={**found.signature, **signature},
        scratch={**found.scratch, **scratch},
        readonly={**found.readonly, **readonly},
        phases={**found.phases, **phases},
    )


def _c_text(lowered: LoweredKernels, symbol: str, device: Device) -> str:
    """The C functions of one kernel, static."""
    names = [name for name, _ in lowered.phases[symbol]]
    functions = {var: _printable(f) for var, f in lowered.module.functions.items() if var.name_hint in names}
    target = tvm.target.Target(device.tvm_target())
    built = tvm.get_global_func("target.build.c")(tvm.IRModule(functions), target)
    text = DECLARATION.sub("", PREPROCESSOR.sub("", built.inspect_source()))
    text = NUMBER.sub(lambda m: _number(m.group(1), m.group(2)), text)
    return DEFINITION.sub(_definition, text).strip() + "\n"


def _definition(match: re.Match[str]) -> str:
    """The head of a function: a phase of a kernel has all of its parameters and need not read each."""
    names = [parameter.split()[-1].lstrip("*") for parameter in match.group(1).split(", ")]
    return f"{match.group(0).replace('TVM_DLL', 'static')}\n  {' '.join(f'(void){n};' for n in names)}"


def _number(kind: str, bits: str) -> str:
    """The literal of a float number given by its bits; hexadecimal, so that it is exact."""
    value = struct.unpack(">f" if kind == "f" else ">d", bytes.fromhex(bits))[0]
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = value.hex() + ("f" if kind == "f" else "")
    return f"({text})" if value < 0 else text


def _printable(function: Any) -> Any:
    """A function as TVM's C code generator prints it right: no local buffers but arrays, of which it knows no other
    scope, numbers with all their digits, and bits of numbers read by a function."""
    plain: dict[Any, Any] = {}

    def on_allocation(statement: Any) -> None:
        buffer = statement.buffer
        if buffer.scope() != "global":
            plain[buffer] = tirx.decl_buffer(list(buffer.ty.shape), buffer.ty.dtype.dtype, buffer.name)

    def on_number(value: Any) -> Any:
        kind = {"float32": "f", "float64": "d"}.get(str(value.ty.dtype))
        if kind is None:
            return value
        bits = struct.pack(f">{kind}", value.value).hex()
        return tirx.call_pure_extern(str(value.ty.dtype), f"ek_number_{kind}_{bits}")

    def on_call(value: Any) -> Any:
        dtype = str(value.ty.dtype) if hasattr(value.ty, "dtype") else ""
        if getattr(value.op, "name", "") == "tirx.reinterpret" and dtype in BITS:
            return tirx.call_pure_extern(dtype, BITS[dtype], *value.args)
        return value

    tvm_ffi.structural_walk(function.body, [(tirx.AllocBuffer, on_allocation)], order="pre")
    rules = [
        (tvm.ir.Var, lambda v: plain.get(v, v)),
        (tirx.FloatImm, on_number),
        (tvm.ir.Call, on_call),
    ]
    return function.with_body(tvm_ffi.structural_map(function.body, rules, order="post"))
