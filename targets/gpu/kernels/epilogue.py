"""From accumulators to what is stored: requantise, add, activate. The meaning is `common.finish_reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgec.targets.gpu.kernels.dialect import FAR, LANES, Buffer, Code, activated, literal
from edgec.targets.kernels.common import Epilogue
from edgec.targets.mcu.kernels.base import Operand

QMIN, QMAX = -128, 127


CONSTANT_NAMES = ("bias", "m", "shift")
# Vectors of numbers of a layer of codes, which layers do not share: with them in memory its kernel is shared.
NUMBERS = 3


def constants(spec: Any) -> list[str]:
    """Types of the vectors of one value per output channel: bias, and factors of int8."""
    return ["int32" if spec.dtype == "int8" else "float32", *spec.factors]


def numbers_type(spec: Any) -> str:
    """The type of the numbers of a layer of codes that are in memory, "" for a layer without."""
    if spec.dtype != "int8":
        return ""
    if spec.epilogue.requant != "float":
        return "int32"
    return "" if spec.epilogue.y_scale is None else "float32"


def numbered(spec: Any) -> bool:
    """Whether what follows the accumulator is a matter of integers, which are in memory."""
    return numbers_type(spec) == "int32"


def constant_operands(spec: Any, channels: int) -> list[Operand]:
    kind = numbers_type(spec)
    numbers = [Operand(len(numbers_of(spec)), kind)] if kind else []
    return [*(Operand(channels, dtype) for dtype in constants(spec)), *numbers]


def constant_buffers(spec: Any) -> list[Buffer]:
    kind = numbers_type(spec)
    numbers = [Buffer("e", kind, 4)] if kind else []
    return [*(Buffer(n, dtype, 4) for n, dtype in zip(CONSTANT_NAMES, constants(spec), strict=False)), *numbers]


def numbers_of(spec: Any) -> np.ndarray:
    """What the kernel reads as e0, e1 and e2. e0: the least and the largest code less the zero point, that zero point,
    and the one of the input. Of an addition e1: zero point and factor of the code, and of the residual; e2: bits of the
    fraction, zero point, and the least and the largest code less the zero point.

    Of a layer with real results e0 alone: the inverse of their scale, the zero point, and the least and the largest
    code less that."""
    epilogue: Epilogue = spec.epilogue
    if not numbered(spec):
        z = epilogue.y_zp
        return np.array([1.0 / epilogue.y_scale, z, QMIN - z, QMAX - z], np.float32)  # type: ignore[operator]
    lo, hi, z = int(max(epilogue.lo, QMIN)), int(min(epilogue.hi, QMAX)), epilogue.y_zp
    result = [lo - z, hi - z, z, spec.x_zp]
    add = epilogue.add
    if add is not None:
        result += [add.z_self, add.m_self, add.z_other, add.m_other]
        result += [add.f, add.z_y, add.lo - add.z_y, add.hi - add.z_y]
    return np.array(result + [0] * (NUMBERS * 4 - len(result)), np.int32)


def read_numbers(c: Code, spec: Any) -> None:
    """Declare e0, e1 and e2, before `finish`."""
    for n in range(_numbers(spec)):
        c.let(_number_kind(spec), f"e{n}", c.load("e", str(n)))


def _number_kind(spec: Any) -> str:
    return "int4" if numbered(spec) else "float4"


def pack_constants(
    spec: Any, weights: dict[str, np.ndarray | None], place: np.ndarray, channels: int
) -> list[np.ndarray]:
    """The vectors with output channel i at place[i] of `channels`. Places between them get zeros, and legal shifts."""
    result = []
    for name, dtype in zip(CONSTANT_NAMES, constants(spec), strict=False):
        values = weights.get(name)
        full = np.full(channels, FAR if name == "shift" else 0, dtype)
        if values is not None:
            full[place] = values
        result.append(full)
    return [*result, numbers_of(spec)] if numbers_type(spec) else result


def read_padding(c: Code, dot: bool) -> str:
    """Declare pad, the input's zero point as a word of four codes, or as float4, behind `read_numbers`."""
    if dot:
        return c.let("uint", "pad", c.pack(c.splat("int4", "e0.w")))
    return c.let("float4", "pad", c.splat("float4", c.real("e0.w")))


def least_shift(weights: Mapping[str, np.ndarray | None]) -> int:
    """FAR where no shift of a layer is below, else 1, so that few kernels differ by it."""
    shifts = weights.get("shift")
    return 1 if shifts is None or int(np.min(shifts)) < FAR else FAR


def _numbers(spec: Any) -> int:
    """Vectors of numbers that the kernel needs."""
    if not numbers_type(spec):
        return 0
    return NUMBERS if spec.epilogue.add is not None else 1


def codes_of(c: Code, value: str, z: int, lo: int, hi: int) -> str:
    """clamp(nearest(value) + z, lo, hi) of a float4 as int4."""
    inside = f"clamp({value}, {c.constant(lo - z)}, {c.constant(hi - z)})"
    code = c.ints(inside)
    return f"{code} + {c.splat('int4', str(z))}" if z else code


def clamped(c: Code, code: str, z: int, lo: int, hi: int) -> str:
    """clamp(code + z, lo, hi) of an int4 of any values."""
    inside = f"clamp({code}, {c.splat('int4', str(lo - z))}, {c.splat('int4', str(hi - z))})"
    return f"{inside} + {c.splat('int4', str(z))}" if z else inside


def kind_of(spec: Any) -> str:
    """The kind of the values that a layer stores."""
    epilogue: Epilogue = spec.epilogue
    real = spec.dtype != "int8" or (epilogue.requant == "float" and epilogue.y_scale is None)
    return "float4" if real else "int4"


def finish(c: Code, acc: str, spec: Any, factors: Sequence[str], residual: str | None, least: int = 1) -> str:
    """The value that is stored, of kind `kind_of`, for an accumulator, behind `read_numbers`.

    factors: m and shift of the four channels; residual: what `Code.load` reads, unpacked to int4 for int8 codes.
    least: of all shifts.
    """
    epilogue: Epilogue = spec.epilogue
    real = spec.dtype != "int8"
    if real and epilogue.act in ("none", "clip"):
        return activated(c, acc if residual is None else f"{acc} + {residual}", epilogue)
    # All pixels of all kernels that end alike share a function.
    parameters = [("float4" if real else "int4", "acc")]
    for factor, dtype in zip(CONSTANT_NAMES[1:], spec.factors, strict=False):
        parameters.append(("int4" if dtype == "int32" else "float4", factor))
    arguments = [acc, *factors]
    numbers = [f"e{n}" for n in range(_numbers(spec))]
    parameters += [(_number_kind(spec), n) for n in numbers]
    arguments += numbers
    if residual is not None:
        parameters.append(("float4" if real or epilogue.residual_type(spec.dtype) != "int8" else "int4", "r"))
        arguments.append(residual)
    return c.define("end", kind_of(spec), parameters, lambda: _end(c, spec, residual is not None, least))(*arguments)


def _end(c: Code, spec: Any, residual: bool, least: int) -> str:
    """The result of `finish` for the parameters acc, m, shift and r of its function."""
    epilogue: Epilogue = spec.epilogue
    real = spec.dtype != "int8"
    if real or epilogue.requant == "float":
        value = "acc" if real else f"{c.floats('acc')} * m"
        if not real or residual:
            value = c.let("float4", "sum", f"{value} + r" if residual else value)
        value = activated(c, value, epilogue)
        if real or epilogue.y_scale is None:
            return value
        low, high = (c.splat("float4", f"e0.{lane}") for lane in "zw")
        return f"{c.ints(f'clamp(({value}) * e0.x, {low}, {high})')} + {c.splat('int4', c.truncated('e0.y'))}"
    if epilogue.requant == "RQ1":
        code = c.requantised("acc", "m", "shift", least)
    else:
        # Limits are exact in float32, and no float32 beyond int32 is converted.
        low, high = (c.splat("float4", c.real(f"e0.{lane}")) for lane in "xy")
        code = c.ints(f"clamp({c.floats('acc')} * m, {low}, {high})")

    def limited(value: str, numbers: str, lanes: str) -> str:
        lo, hi, z = (c.splat("int4", f"{numbers}.{lane}") for lane in lanes)
        return f"clamp({value}, {lo}, {hi}) + {z}"

    code = limited(code, "e0", "xyz") if epilogue.requant == "RQ1" else f"{code} + {c.splat('int4', 'e0.z')}"
    if epilogue.add is None:
        return code
    c.let("int4", "code", code)
    z, m, other_z, other_m = (c.splat("int4", f"e1.{lane}") for lane in LANES)
    # WGSL shifts by unsigned numbers.
    bit, by = ("e2.x - 1", c.splat("int4", "e2.x")) if c.opencl else ("u32(e2.x - 1)", "vec4<u32>(u32(e2.x))")
    c.let("int4", "sum", f"(code - {z}) * {m} + (r - {other_z}) * {other_m} + {c.splat('int4', f'1 << ({bit})')}")
    return limited(f"(sum >> {by})", "e2", "zwy")


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


def grid_of(scale: float, zero_point: int) -> np.ndarray:
    """What `quantised` takes as its grid."""
    return np.array([scale, 1.0 / scale, 512.0 * scale, zero_point], np.float32)


def quantised(c: Code, value: str, grid: str) -> str:
    """clamp(nearest(value / scale) + zero_point) of a float4 as int4, as `edgec.integer.quantize`; grid: a float4.

    The quotient is correctly rounded wherever it decides the code, by Markstein's division (P. Markstein, IBM J. Res.
    Dev. 34, 1990): GPUs divide less exactly.
    """

    def body() -> str:
        less, inverse, limit = (c.splat("float4", part) for part in ("-g.x", "g.y", "g.z"))
        c.let("float4", "x", f"clamp(value, -{limit}, {limit})")
        c.var("float4", "q", "x * g.y")
        for _ in range(2):
            c.line(f"q = fma(fma(q, {less}, x), {inverse}, q);")
        low, high = (c.splat("float4", f"{literal(float(end))} - g.w") for end in (QMIN, QMAX))
        return f"{c.ints(f'clamp(q, {low}, {high})')} + {c.splat('int4', c.truncated('g.w'))}"

    return c.define("quantised", "int4", [("float4", "value"), ("float4", "g")], body)(value, grid)
