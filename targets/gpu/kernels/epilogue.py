"""From accumulators to what is stored: requantise, add, activate. The meaning is `common.finish_reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgec.targets.gpu.kernels.dialect import LANES, Buffer, Code, activated, literal
from edgec.targets.kernels.common import Epilogue
from edgec.targets.mcu.kernels.base import Operand

QMIN, QMAX = -128, 127


def constants(spec: Any) -> list[str]:
    """Types of the vectors of one value per output channel: bias, and factors of int8."""
    return ["int32" if spec.dtype == "int8" else "float32", *spec.factors]


CONSTANT_NAMES = ("bias", "m", "shift")


def constant_operands(spec: Any, channels: int) -> list[Operand]:
    return [Operand(channels, dtype) for dtype in constants(spec)]


def constant_buffers(spec: Any) -> list[Buffer]:
    return [Buffer(name, dtype, 4) for name, dtype in zip(CONSTANT_NAMES, constants(spec), strict=False)]


def pack_constants(
    spec: Any, weights: dict[str, np.ndarray | None], place: np.ndarray, channels: int
) -> list[np.ndarray]:
    """The vectors with output channel i at place[i] of `channels`. Places between them get zeros, and legal shifts."""
    result = []
    for name, dtype in zip(CONSTANT_NAMES, constants(spec), strict=False):
        values = weights.get(name)
        full = np.full(channels, 1 if name == "shift" else 0, dtype)
        if values is not None:
            full[place] = values
        result.append(full)
    return result


def codes_of(c: Code, value: str, z: int, lo: int, hi: int) -> str:
    """clamp(nearest(value) + z, lo, hi) of a float4 as int4."""
    inside = f"clamp({value}, {c.constant(lo - z)}, {c.constant(hi - z)})"
    code = c.ints(inside)
    return f"{code} + {c.splat('int4', str(z))}" if z else code


def clamped(c: Code, code: str, z: int, lo: int, hi: int) -> str:
    """clamp(code + z, lo, hi) of an int4 of any values."""
    inside = f"clamp({code}, {c.splat('int4', str(lo - z))}, {c.splat('int4', str(hi - z))})"
    return f"{inside} + {c.splat('int4', str(z))}" if z else inside


def finish(c: Code, name: str, acc: str, spec: Any, factors: Sequence[str], residual: str | None) -> str:
    """The float4 or int4 that is stored, as a variable `name`, for an accumulator.

    factors: m and shift of the four channels; residual: what `Code.load` reads, unpacked to int4 for int8 codes.
    """
    epilogue: Epilogue = spec.epilogue
    real = spec.dtype != "int8"
    if real or epilogue.requant == "float":
        value = acc if real else f"{c.floats(acc)} * {factors[0]}"
        value = c.let("float4", f"{name}_sum", value if residual is None else f"{value} + {residual}")
        value = activated(c, value, epilogue)
        if real or epilogue.y_scale is None:
            return c.let("float4", name, value)
        scaled = f"({value}) * {literal(1.0 / epilogue.y_scale)}"
        return c.let("int4", name, codes_of(c, scaled, epilogue.y_zp, QMIN, QMAX))
    lo, hi, z = int(max(epilogue.lo, QMIN)), int(min(epilogue.hi, QMAX)), epilogue.y_zp
    if epilogue.requant == "RQ1":
        code = clamped(c, c.call("rq1", acc, *factors), z, lo, hi)
    else:
        code = codes_of(c, f"{c.floats(acc)} * {factors[0]}", z, lo, hi)
    if epilogue.add is None:
        return c.let("int4", name, code)
    assert residual is not None
    c.let("int4", f"{name}_code", code)
    return c.let("int4", name, added(c, f"{name}_code", residual, epilogue.add))


def added(c: Code, a: str, b: str, add: Any) -> str:
    """The fused integer addition of two int4 of codes."""

    def k(value: int) -> str:
        return c.splat("int4", str(value))

    total = f"({a} - {k(add.z_self)}) * {k(add.m_self)} + ({b} - {k(add.z_other)}) * {k(add.m_other)}"
    # WGSL shifts by unsigned numbers.
    by = c.splat("int4", str(add.f)) if c.opencl else f"vec4<u32>({add.f}u)"
    return f"clamp((({total} + {k(1 << (add.f - 1))}) >> {by}) + {k(add.z_y)}, {k(add.lo)}, {k(add.hi)})"


def read(c: Code, buffer: str, dtype: str, index: str, count: int = 4, whole: bool = True) -> str:
    """Four neighbours at element `index` (in fours where `whole`) as float4, or int4 for int8."""
    value = c.load(buffer, index) if whole else c.load4(buffer, index, count)
    return c.unpack(value) if dtype == "int8" else value


def write(c: Code, buffer: str, dtype: str, index: str, value: str, count: int = 4, whole: bool = True) -> None:
    """The first `count` of a float4, or of an int4 of codes, to where `read` reads."""
    if whole:
        c.store(buffer, index, c.pack(value) if dtype == "int8" else value)
        return
    for k in range(count):
        c.store(buffer, f"{index} + {k}" if k else index, f"{value}.{LANES[k]}")


def quantised(c: Code, name: str, value: str, scale: float, zero_point: int) -> str:
    """clamp(nearest(value / scale) + zero_point) of a float4 as an int4 variable, as `edgec.integer.quantize`.

    The quotient is correctly rounded wherever it decides the code, by Markstein's division (P. Markstein, IBM J. Res.
    Dev. 34, 1990): GPUs divide less exactly.
    """
    limit, inverse, less = (c.constant(v) for v in (512.0 * scale, 1.0 / scale, -scale))
    c.let("float4", f"{name}_x", f"clamp({value}, -{limit}, {limit})")
    c.var("float4", f"{name}_q", f"{name}_x * {inverse}")
    for _ in range(2):
        c.line(f"{name}_q = fma(fma({name}_q, {less}, {name}_x), {inverse}, {name}_q);")
    return c.let("int4", name, codes_of(c, f"{name}_q", zero_point, QMIN, QMAX))
