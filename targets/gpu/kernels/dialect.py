"""One description of a kernel, two languages: OpenCL C and WGSL.

Expressions that both languages spell alike (arithmetic, comparisons, swizzles, calls of `min`, `exp`...) are written as
they are; `Code` writes what differs: types, declarations, loops, buffers, conversions. Arithmetic is done on "float4",
"int4", "float" and "int"; four int8 codes travel as one word of kind "uint". float16 is a type of memory, computed with
in float32: OpenCL's `vload_half` does that without any extension. Kernels that are asked to sum in float16 use "half4",
which is float4 on OpenCL devices without that extension.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.errors import EdgecError
from edgec.targets.gpu.kernels.base import Launch, Size

LANES = "xyzw"
# Work-groups of one dimension that every WebGPU device can start.
MOST_GROUPS = 65535
WGSL_KINDS = {
    "float": "f32",
    "float4": "vec4<f32>",
    "half4": "vec4<f16>",
    "int": "i32",
    "int4": "vec4<i32>",
    "uint": "u32",
    "uint4": "vec4<u32>",
    "bool": "bool",
}
# Types of memory by (element type, elements). int8 in words; OpenCL also has single codes, WGSL takes them out of words
# and puts them into words by atomic operations.
OPENCL_MEMORY = {
    ("float32", 1): "float",
    ("float32", 4): "float4",
    ("float16", 1): "half",
    ("float16", 4): "half",
    ("int32", 1): "int",
    ("int32", 4): "int4",
    ("int8", 1): "char",
    ("int8", 4): "uint",
    ("int8", 16): "uint4",
}
WGSL_MEMORY = {
    ("float32", 1): "f32",
    ("float32", 4): "vec4<f32>",
    ("float16", 1): "f16",
    ("float16", 4): "vec4<f16>",
    ("int32", 1): "i32",
    ("int32", 4): "vec4<i32>",
    ("int8", 1): "u32",
    ("int8", 4): "u32",
    ("int8", 16): "vec4<u32>",
}

# Shifts from here on need the high half of a product of 32 bits only.
FAR = 33
# Functions that kernels may need, by name. They stand before all OpenCL kernels of a model, once.
# erf: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_HORNER = "t * ({}f + t * ({}f + t * ({}f + t * ({}f + t * {}f))))".format(*_ERF)
OPENCL_HELPERS = {
    "erf": f"""\
static inline float4 edgec_erf(float4 x) {{
  const float4 a = fabs(x), t = 1.0f / (1.0f + 0.3275911f * a);
  const float4 y = 1.0f - {_HORNER} * exp(-a * a);
  return copysign(y, x);
}}
""",
    # Dot products of four int8 codes with those of four outputs, and sums: the built-ins of Arm, Khronos and Qualcomm,
    # or products of short numbers.
    # Qualcomm's multiplies signed by unsigned bytes: one operand moves up by 128, and the sum of the other comes off.
    "dots": """\
#if defined(cl_arm_integer_dot_product_accumulate_int8)
#pragma OPENCL EXTENSION cl_arm_integer_dot_product_accumulate_int8 : enable
#define edgec_dot4(a, b, c) arm_dot_acc(as_char4(a), as_char4(b), c)
#elif defined(cl_arm_integer_dot_product_int8)
#pragma OPENCL EXTENSION cl_arm_integer_dot_product_int8 : enable
#define edgec_dot4(a, b, c) (arm_dot(as_char4(a), as_char4(b)) + (c))
#elif defined(__opencl_c_integer_dot_product_input_4x8bit_packed)
#define edgec_dot4(a, b, c) (dot_4x8packed_ss_int(a, b) + (c))
#elif defined(cl_qcom_dot_product8)
#pragma OPENCL EXTENSION cl_qcom_dot_product8 : enable
static inline int edgec_dot4(uint a, uint b, int c) {
  return qcom_dot8_acc(b, a ^ 0x80808080u, c - 128 * qcom_dot8_acc(b, 0x01010101u, 0));
}
#else
static inline int edgec_dot4(uint a, uint b, int c) {
  const short4 p = convert_short4(as_char4(a)) * convert_short4(as_char4(b));
  return c + p.x + p.y + p.z + p.w;
}
#endif
static inline int4 edgec_dots(uint a, uint4 b, int4 c) {
  return (int4)(edgec_dot4(a, b.x, c.x), edgec_dot4(a, b.y, c.y), edgec_dot4(a, b.z, c.z), edgec_dot4(a, b.w, c.w));
}
""",
    # float16 where the device computes in it.
    "half4": """\
#ifdef cl_khr_fp16
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef half4 edgec_half4;
#define edgec_load_half4(i, p) vload4(i, p)
#define edgec_to_half4(x) convert_half4(x)
#else
typedef float4 edgec_half4;
#define edgec_load_half4(i, p) vloada_half4(i, p)
#define edgec_to_half4(x) (x)
#endif
""",
    "codes": """\
static inline float4 edgec_codes(uint word) {
  return convert_float4(as_char4(word));
}
""",
    # Specification 1.9, RQ1, for shifts from 33 on: neither the low half of the product nor an overflow matter.
    "rq1_far": """\
static inline int4 edgec_rq1_far(int4 acc, int4 m, int4 shift) {
  return (mul_hi(acc, m) + ((int4)(1) << (shift - 33))) >> (shift - 32);
}
""",
    # The same for all shifts, saturated to int32.
    "rq1": """\
static inline int4 edgec_rq1(int4 acc, int4 m, int4 shift) {
  const long4 bits = convert_long4(shift);
  return convert_int4_sat((convert_long4(acc) * convert_long4(m) + ((long4)(1) << (bits - 1))) >> bits);
}
""",
}
WGSL_HELPERS = {
    "erf": f"""\
fn edgec_erf(x: vec4<f32>) -> vec4<f32> {{
  let a = abs(x);
  let t = 1.0f / (1.0f + 0.3275911f * a);
  return sign(x) * (1.0f - {_HORNER} * exp(-a * a));
}}
""",
    "dots": """\
fn edgec_dots(a: u32, b: vec4<u32>, c: vec4<i32>) -> vec4<i32> {
  return c + vec4<i32>(dot4I8Packed(a, b.x), dot4I8Packed(a, b.y), dot4I8Packed(a, b.z), dot4I8Packed(a, b.w));
}
""",
    "codes": """\
fn edgec_codes(word: u32) -> vec4<f32> {
  return vec4<f32>(unpack4xI8(word));
}
""",
    # The high half of the product: H. S. Warren, Hacker's Delight, 2nd edition, figure 8-2.
    "rq1_far": """\
fn edgec_rq1_far(acc: vec4<i32>, m: vec4<i32>, shift: vec4<i32>) -> vec4<i32> {
  let word = vec4<i32>(65535);
  let low = acc & word;
  let bits = vec4<u32>(16u);
  let t = (acc >> bits) * (m & word) + vec4<i32>((vec4<u32>(low) * vec4<u32>(m & word)) >> bits);
  let high = (acc >> bits) * (m >> bits) + (t >> bits) + ((low * (m >> bits) + (t & word)) >> bits);
  return (high + (vec4<i32>(1) << vec4<u32>(shift - 33))) >> vec4<u32>(shift - 32);
}
""",
    # Without 64-bit integers: the magnitude of the product in two halves, its sign, the rounding and the shift.
    "rq1": """\
fn edgec_rq1_one(acc: i32, m: i32, shift: i32) -> i32 {
  let negative = acc < 0;
  let a = select(u32(acc), 0u - u32(acc), negative);
  let b = u32(m);
  let low = (a & 0xffffu) * (b & 0xffffu);
  let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
  let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
  var l = (other << 16u) | (low & 0xffffu);
  var h = (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
  if (negative) {
    l = ~l + 1u;
    h = ~h + select(0u, 1u, l == 0u);
  }
  let bit = u32(shift - 1);
  let half_low = select(0u, 1u << (bit & 31u), bit < 32u);
  let half_high = select(1u << (bit & 31u), 0u, bit < 32u);
  l += half_low;
  h += half_high + select(0u, 1u, l < half_low);
  let s = u32(shift);
  if (s >= 32u) {
    return bitcast<i32>(h) >> (s - 32u);
  }
  let high = bitcast<i32>(h) >> s;
  let kept = (l >> s) | (h << (32u - s));
  let fits = high == (bitcast<i32>(kept) >> 31u);
  return select(select(2147483647, -2147483647 - 1, high < 0), bitcast<i32>(kept), fits);
}
fn edgec_rq1(acc: vec4<i32>, m: vec4<i32>, shift: vec4<i32>) -> vec4<i32> {
  return vec4<i32>(edgec_rq1_one(acc.x, m.x, shift.x), edgec_rq1_one(acc.y, m.y, shift.y),
                   edgec_rq1_one(acc.z, m.z, shift.z), edgec_rq1_one(acc.w, m.w, shift.w));
}
""",
}


# Work items write codes of one word: each leaves those of the others as they are.
WGSL_PUT = """\
fn edgec_put_{0}(at: i32, value: i32) {{
  let shift = u32(at & 3) * 8u;
  atomicAnd(&{0}[at >> 2u], ~(255u << shift));
  atomicOr(&{0}[at >> 2u], (u32(value) & 255u) << shift);
}}
"""


@dataclass(frozen=True)
class Buffer:
    """A parameter of a kernel: `lanes` elements of `dtype` at a time.

    written: the kernel writes it. shared: its memory may be that of another buffer (OpenCL only): a work item then
    reads an element before it writes it, and no other one touches it.
    """

    name: str
    dtype: str
    lanes: int = 1
    written: bool = False
    shared: bool = False


def literal(value: float) -> str:
    """A float32 literal, which both languages read. Infinities have none: their place takes the largest float32."""
    largest = float(np.finfo(np.float32).max)
    text = repr(float(np.float32(min(max(value, -largest), largest))))
    number = text if "." in text or "e" in text else text + ".0"
    return f"({number}f)" if value < 0 else f"{number}f"


def groups_of(extents: Size, group: Size) -> Size:
    """Work-groups that cover `extents` work items."""
    return tuple(-(-n // g) for n, g in zip(extents, group, strict=True))  # type: ignore[return-value]


class Code:
    """The text of one kernel, line by line.

    api: "opencl", or "vulkan" and "metal", which take WGSL. extents: work items in x, y, z that have something to do;
    group: those of a work-group. Raises EdgecError for more work-groups than WebGPU starts.
    """

    def __init__(self, api: str, stem: str, buffers: Sequence[Buffer], extents: Size, group: Size) -> None:
        self.opencl, self.stem, self.buffers = api == "opencl", stem, tuple(buffers)
        self.group = group
        self.grid = groups_of(extents, group)
        self.extents = extents
        if not self.opencl and max(self.grid) > MOST_GROUPS:
            raise EdgecError(
                f"{stem} takes {' x '.join(map(str, self.grid))} work-groups; the most are {MOST_GROUPS}",
                where=f"target {api}",
                hint="compile for smaller inputs, or for OpenCL",
            )
        self._lines: list[str] = []
        self._shared: list[str] = []
        # Texts of the functions that are called, by name.
        self._functions: dict[str, str] = {}
        self._depth = 1
        self._where = {b.name: b for b in buffers}

    def add_buffer(self, position: int, buffer: Buffer) -> None:
        """One more parameter, before the one that is at `position` now."""
        self.buffers = (*self.buffers[:position], buffer, *self.buffers[position:])
        self._where[buffer.name] = buffer

    # -- statements ----------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self._lines.append("  " * self._depth + text)

    def type(self, kind: str) -> str:
        if self.opencl and kind == "half4":
            self._functions["half4"] = OPENCL_HELPERS["half4"]
            return "edgec_half4"
        return kind if self.opencl else WGSL_KINDS[kind]

    def let(self, kind: str, name: str, value: str) -> str:
        """A value that does not change. WGSL knows its type, and texts are short."""
        kind = self.type(kind) if self.opencl else kind
        self.line(f"const {kind} {name} = {value};" if self.opencl else f"let {name} = {value};")
        return name

    def var(self, kind: str, name: str, value: str) -> str:
        kind = self.type(kind) if self.opencl else kind
        self.line(f"{kind} {name} = {value};" if self.opencl else f"var {name} = {value};")
        return name

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(f"{head} {{".lstrip())
        self._depth += 1
        yield
        self._depth -= 1
        self.line("}")

    @contextmanager
    def loop(self, name: str, start: str | int, end: str | int, step: int = 1) -> Iterator[str]:
        """A loop over start, start + step, ... below end."""
        declared = f"int {name}" if self.opencl else f"var {name}: i32"
        with self.block(f"for ({declared} = {start}; {name} < {end}; {name} += {step})"):
            yield name

    @contextmanager
    def when(self, conditions: Sequence[str]) -> Iterator[None]:
        """Statements under all of the conditions; none: always."""
        if not conditions:
            yield
            return
        with self.block(f"if ({' && '.join(conditions)})"):
            yield

    def index(self, axis: int, name: str, guard: bool = True) -> str:
        """The number of the work item along an axis. guard: those beyond the extent leave."""
        value = f"(int)get_global_id({axis})" if self.opencl else f"i32(gid.{LANES[axis]})"
        if self.extents[axis] == 1:
            value = "0"
        self.let("int", name, value)
        if guard and self.extents[axis] % self.group[axis]:
            with self.block(f"if ({name} >= {self.extents[axis]})"):
                self.line("return;")
        return name

    def lane(self, axis: int, name: str) -> str:
        """The number of the work item in its work-group."""
        return self.let("int", name, f"(int)get_local_id({axis})" if self.opencl else f"i32(lid.{LANES[axis]})")

    def shared(self, kind: str, name: str, size: int) -> str:
        """An array that a work-group shares."""
        if self.opencl:
            self._shared.append(f"  __local {kind} {name}[{size}];")
        else:
            self._shared.append(f"var<workgroup> {name}: array<{self.type(kind)}, {size}>;")
        return name

    def barrier(self) -> None:
        self.line("barrier(CLK_LOCAL_MEM_FENCE);" if self.opencl else "workgroupBarrier();")

    # -- memory --------------------------------------------------------------------------------------------------------

    def load(self, name: str, index: str) -> str:
        """Element `index` of a buffer, in units of its lanes: float(4), int(4) or words of codes."""
        buffer = self._where[name]
        if buffer.dtype == "float16":
            if not self.opencl:
                return f"{WGSL_KINDS['float4' if buffer.lanes == 4 else 'float']}({name}[{index}])"
            return f"vloada_half4({index}, {name})" if buffer.lanes == 4 else f"vload_half({index}, {name})"
        if buffer.dtype == "int8" and buffer.lanes == 1:
            if self.opencl:
                return f"(int){name}[{index}]"
            return f"extractBits(bitcast<i32>({name}[({index}) >> 2u]), u32(({index}) & 3) * 8u, 8u)"
        return f"{name}[{index}]"

    def store(self, name: str, index: str, value: str) -> None:
        """Write what `load` reads; codes in single elements must be in -128..127, and not be read by the kernel."""
        buffer = self._where[name]
        if buffer.dtype == "float16":
            if self.opencl:
                call = "vstorea_half4_rte" if buffer.lanes == 4 else "vstore_half_rte"
                self.line(f"{call}({value}, {index}, {name});")
                return
            value = f"{'vec4<f16>' if buffer.lanes == 4 else 'f16'}({value})"
        elif buffer.dtype == "int8" and buffer.lanes == 1:
            if not self.opencl:
                self._functions[f"put_{name}"] = WGSL_PUT.format(name)
                self.line(f"edgec_put_{name}({index}, {value});")
                return
            value = f"(char)({value})"
        self.line(f"{name}[{index}] = {value};")

    def load4(self, name: str, index: str, count: int = 4, zero: str = "0") -> str:
        """Elements index .. index + count of a buffer of single elements as float4, int4 or a word; `zero` behind."""
        dtype = self._where[name].dtype
        if self.opencl and count == 4 and dtype != "int8":
            call = {"float32": "vload4", "float16": "vload_half4", "int32": "vload4"}[dtype]
            return f"{call}(0, {name} + {index})"
        parts = [self.load(name, f"{index} + {k}" if k else index) for k in range(count)] + [zero] * (4 - count)
        if dtype == "int8":
            return self.pack(self.vec("int4", parts))
        return self.vec("int4" if dtype == "int32" else "float4", parts)

    # -- expressions ---------------------------------------------------------------------------------------------------

    def vec(self, kind: str, parts: Sequence[str]) -> str:
        return f"({kind})({', '.join(parts)})" if self.opencl else f"{self.type(kind)}({', '.join(parts)})"

    def splat(self, kind: str, value: str) -> str:
        return self.vec(kind, [value])

    def constant(self, value: float) -> str:
        return self.splat("float4", literal(value))

    def pick(self, condition: str, then: str, otherwise: str) -> str:
        """`then` where the (scalar) condition holds. A read of `then` elsewhere is harmless, even beyond a buffer."""
        if not self.opencl:
            return f"select({otherwise}, {then}, {condition})"
        return f"(({condition}) ? {then} : {otherwise})"

    def load_half4(self, name: str, index: str) -> str:
        """Element `index` of a buffer of four halves as half4."""
        return f"edgec_load_half4({index}, {name})" if self.opencl else f"{name}[{index}]"

    def to_half4(self, value: str) -> str:
        """A float4 as half4."""
        return f"edgec_to_half4({value})" if self.opencl else f"vec4<f16>({value})"

    def floats(self, value: str) -> str:
        """int4 or half4 as float4."""
        return f"convert_float4({value})" if self.opencl else f"vec4<f32>({value})"

    def real(self, value: str) -> str:
        """An int as a float."""
        return f"(float){value}" if self.opencl else f"f32({value})"

    def truncated(self, value: str) -> str:
        """A float as an int, towards zero."""
        return f"(int){value}" if self.opencl else f"i32({value})"

    def ints(self, value: str) -> str:
        """Nearest integers, halves to even, of values within int32."""
        return f"convert_int4_rte({value})" if self.opencl else f"vec4<i32>(round({value}))"

    def unpack(self, word: str) -> str:
        """Four codes as int4."""
        return f"convert_int4(as_char4({word}))" if self.opencl else f"unpack4xI8({word})"

    def unpack_floats(self, word: str) -> str:
        """Four codes as float4."""
        return self.call("codes", word)

    def whole(self, value: str) -> str:
        """A float4 of integers within int32 as int4."""
        return f"convert_int4({value})" if self.opencl else f"vec4<i32>({value})"

    def pack(self, codes: str) -> str:
        """int4 of values in -128..127 as a word."""
        return f"as_uint(convert_char4({codes}))" if self.opencl else f"pack4xI8({codes})"

    def call(self, helper: str, *arguments: str) -> str:
        """A call of a function of OPENCL_HELPERS."""
        self._functions[helper] = (OPENCL_HELPERS if self.opencl else WGSL_HELPERS)[helper]
        return f"edgec_{helper}({', '.join(arguments)})"

    def define(
        self, stem: str, kind: str, parameters: Sequence[tuple[str, str]], body: Callable[[], str]
    ) -> Callable[..., str]:
        """A function for what a kernel does at many places: calls of the result are calls of it, as expressions.

        parameters: (kind, name); body writes statements and gives the result, of `kind`.
        """
        lines, depth, self._lines, self._depth = self._lines, self._depth, [], 1
        self.line(f"return {body()};")
        inner, self._lines, self._depth = "\n".join(self._lines), lines, depth
        if self.opencl:
            listed = ", ".join(f"{k} {n}" for k, n in parameters)
            head = f"static inline {kind} edgec_@@({listed}) {{\n"
        else:
            listed = ", ".join(f"{n}: {self.type(k)}" for k, n in parameters)
            head = f"fn edgec_@@({listed}) -> {self.type(kind)} {{\n"
        text = head + inner + "\n}\n"
        name = f"{stem}_{hashlib.sha1(text.encode()).hexdigest()[:8]}"
        self._functions[name] = text.replace("@@", name)
        return lambda *arguments: f"edgec_{name}({', '.join(arguments)})"

    def requantised(self, acc: str, m: str, shift: str, least: int) -> str:
        """RQ1 of int4, for factors below 2^31; least: no shift is below."""
        return self.call("rq1_far" if least >= FAR else "rq1", acc, m, shift)

    # -- the whole -----------------------------------------------------------------------------------------------------

    def launch(self, arguments: Sequence[int]) -> Launch:
        """The kernel and how to start it. arguments: operand of each buffer."""
        text = self._opencl_text() if self.opencl else self._wgsl_text()
        name = f"{self.stem}_{hashlib.sha1(text.encode()).hexdigest()[:10]}"
        text, helpers = text.replace("@NAME@", name), tuple(self._functions.items())
        return Launch(name, text, tuple(arguments), self.grid, self.group, helpers)

    def _opencl_text(self) -> str:
        pointers = []
        for b in self.buffers:
            const = "" if b.written else "const "
            restrict = "" if b.shared else "restrict "
            pointers.append(f"__global {const}{OPENCL_MEMORY[b.dtype, b.lanes]}* {restrict}{b.name}")
        size = ", ".join(map(str, self.group))
        head = f"__kernel __attribute__((reqd_work_group_size({size})))\nvoid @NAME@({', '.join(pointers)}) {{\n"
        return head + "\n".join([*self._shared, *self._lines]) + "\n}\n"

    def _wgsl_text(self) -> str:
        parts = []
        if any(b.dtype == "float16" for b in self.buffers):
            parts.append("enable f16;\n")
        for number, b in enumerate(self.buffers):
            access = "read_write" if b.written else "read"
            bytewise = b.written and (b.dtype, b.lanes) == ("int8", 1)
            element = "atomic<u32>" if bytewise else WGSL_MEMORY[b.dtype, b.lanes]
            parts.append(f"@group(0) @binding({number}) var<storage, {access}> {b.name}: array<{element}>;\n")
        parts += [line + "\n" for line in self._shared]
        size = ", ".join(map(str, self.group))
        builtins = [("gid", "global_invocation_id"), ("lid", "local_invocation_id")]
        body = "\n".join(self._lines)
        used = [f"@builtin({long}) {short}: vec3<u32>" for short, long in builtins if f"{short}." in body]
        head = f"@compute @workgroup_size({size})\nfn @NAME@({', '.join(used)}) {{\n"
        return "".join(parts) + head + body + "\n}\n"


def activated(c: Code, x: str, epilogue: Any) -> str:
    """The activation of an `Epilogue` as an expression on the float4 variable `x`."""

    def k(value: float) -> str:
        return c.constant(value)

    act = epilogue.act
    hard = f"clamp({x} + {k(3.0)}, {k(0.0)}, {k(6.0)}) * {literal(1 / 6)}"
    if act == "none":
        return x
    if act == "clip":
        value = x
        if epilogue.lo > -math.inf:
            value = f"max({value}, {k(epilogue.lo)})"
        if epilogue.hi < math.inf:
            value = f"min({value}, {k(epilogue.hi)})"
        return value
    if act == "hardswish":
        return f"{x} * {hard}"
    if act == "hardsigmoid":
        return hard
    if act == "sigmoid":
        return f"{k(1.0)} / ({k(1.0)} + exp(-{x}))"
    if act == "silu":
        return f"{x} / ({k(1.0)} + exp(-{x}))"
    if act == "tanh":
        # Vulkan defines tanh by hyperbolic functions, which overflow.
        return f"tanh(clamp({x}, {k(-15.0)}, {k(15.0)}))"
    if act == "gelu_tanh":
        cubic = f"({x} + {literal(0.044715)} * {x} * {x} * {x}) * {literal(-2.0 * math.sqrt(2.0 / math.pi))}"
        return f"{x} / ({k(1.0)} + exp({cubic}))"
    if act == "mish":
        e = c.let("float4", f"e_{x}", f"exp(min({x}, {k(20.0)}))")
        square = f"{e} * ({e} + {k(2.0)})"
        return f"{x} * ({square} / ({square} + {k(2.0)}))"
    if act == "leaky_relu":
        return f"max({x}, {k(0.0)}) + {literal(epilogue.lo)} * min({x}, {k(0.0)})"
    if act == "gelu":
        return f"{literal(0.5)} * {x} * ({k(1.0)} + {c.call('erf', f'{x} * {literal(math.sqrt(0.5))}')})"
    raise ValueError(f"no epilogue for activation {act}")
