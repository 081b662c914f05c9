"""Element types that a GPU's language has in memory only: float16 in OpenCL C without extension, int8 in WGSL.

A kernel that reads or writes such tensors is rewritten to compute in float32 or int32, and to go to memory by
functions: `vload_half` and `vstore_half`, which every OpenCL device has, and for bytes of WGSL, whose memory is made of
words, functions that are written beside the kernel. Sums in float32 round less often than those in float16 that they
stand for; int8 values are the same, for what is stored as int8 is wrapped to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm.ir import PointerType, PrimType
from tvm.ir.prim.expr import BinaryOpExpr

from edgec.errors import EdgecError
from edgec.targets.tir import tirx

# By API: the type in memory, and the one that takes its place in registers.
NARROW = {"opencl": ("float16", "float32"), "vulkan": ("int8", "int32")}
BINDING = re.compile(r"@group\(0\) @binding\((\d+)\) var<storage, \w+> (\w+) : array<u32>;")
BYTE_READ = """\
fn edgec_get_{0}(at: i32) -> i32 {{
  return extractBits(bitcast<i32>({0}[at >> 2u]), u32(at & 3) * 8u, 8u);
}}
"""
# Work items write bytes of one word: each must leave those of the others as they are.
BYTE_WRITTEN = """\
fn edgec_get_{0}(at: i32) -> i32 {{
  return extractBits(bitcast<i32>(atomicLoad(&{0}[at >> 2u])), u32(at & 3) * 8u, 8u);
}}
fn edgec_put_{0}(at: i32, value: i32) {{
  let shift = u32(at & 3) * 8u;
  atomicAnd(&{0}[at >> 2u], ~(255u << shift));
  atomicOr(&{0}[at >> 2u], (u32(value) & 255u) << shift);
}}
"""


def has_narrow(function: Any, api: str) -> bool:
    """Whether a device function has parameters or values of the API's narrow type."""
    if api not in NARROW:
        return False
    narrow = NARROW[api][0]
    found = any(_pointee(p) == narrow for p in function.params)

    def on_value(value: Any) -> None:
        nonlocal found
        found = found or str(getattr(value.ty, "dtype", "")) == narrow

    tvm_ffi.structural_walk(function.body, [(tirx.Cast, on_value), (tvm.ir.TensorLoad, on_value)], order="pre")
    return found


def widen(function: Any, api: str) -> tuple[Any, tuple[int, ...]]:
    """(the function rewritten for the API, positions of narrow parameters that it writes).

    Raises EdgecError for what has no meaning in the wider type: vectors, and the bits of a narrow number.
    """
    return _Widening(function, api).result()


def finish_bytes(text: str, function: Any, written: Sequence[int]) -> str:
    """WGSL of a widened function with the functions for its bytes, and its words as they need to be declared.

    function: as it was before, whose parameters are the bindings in order.
    """
    helpers = []

    def declared(match: re.Match[str]) -> str:
        number, name = int(match.group(1)), match.group(2)
        if _pointee(function.params[number]) != "int8":
            return match.group(0)
        stored = number in written
        helpers.append((BYTE_WRITTEN if stored else BYTE_READ).format(name))
        placeholder[f"edgec_p{number}_"] = name
        access, element = ("read_write", "atomic<u32>") if stored else ("read", "u32")
        return f"@group(0) @binding({number}) var<storage, {access}> {name} : array<{element}>;"

    placeholder: dict[str, str] = {}
    text = BINDING.sub(declared, text)
    for stem, name in placeholder.items():
        text = re.sub(rf"\b{stem}(get|put)\b", rf"edgec_\1_{name}", text)
    head, mark, tail = text.partition("@compute")
    return head + "".join(helpers) + mark + tail


def _pointee(parameter: Any) -> str:
    element = getattr(parameter.ty, "element_type", None)
    return "" if element is None else str(element.dtype)


class _Widening:
    def __init__(self, function: Any, api: str) -> None:
        self.function, self.api = function, api
        self.narrow, self.wide = NARROW[api]
        # Parameters and views of them, by the position of the parameter.
        self.memory: dict[Any, int] = {}
        self.named: dict[Any, Any] = {}
        self.written: set[int] = set()
        self.params = list(function.params)
        for number, parameter in enumerate(function.params):
            if _pointee(parameter) == self.narrow:
                self.memory[parameter] = number
                if api == "vulkan":
                    self.params[number] = tirx.Var(parameter.name, PointerType(PrimType("uint32"), "global"))

    def result(self) -> tuple[Any, tuple[int, ...]]:
        body = self._statement(self.function.body)
        made = tirx.PrimFunc(self.params, body, ret_type=tvm.ir.TupleType([]), attrs=None)
        return made.with_attr(dict(self.function.attrs.items())), tuple(sorted(self.written))

    def _refuse(self, what: str) -> EdgecError:
        name = str(self.function.attrs["global_symbol"])
        return EdgecError(f"cannot compute {what} of {self.narrow} in {self.wide}", where=name)

    # -- statements ----------------------------------------------------------------------------------------------------

    def _statement(self, s: Any) -> Any:
        if isinstance(s, tirx.SeqStmt):
            return tirx.SeqStmt([self._statement(each) for each in s.seq])
        if isinstance(s, tirx.DeclBuffer):
            source = s.data.args[0] if hasattr(s.data, "args") and len(s.data.args) else s.data
            if source in self.memory:
                self.memory[s.buffer] = self.memory[source]
                return tirx.Evaluate(tirx.const(0, "int32"))
            if str(s.buffer.ty.dtype.dtype) == self.narrow:
                raise self._refuse("a view")
            return s
        if isinstance(s, tirx.AllocBuffer):
            buffer = s.buffer
            if str(buffer.ty.dtype.dtype) != self.narrow:
                return s
            wide = tirx.decl_buffer(list(buffer.ty.shape), self.wide, buffer.name, scope=buffer.scope())
            self.named[buffer] = wide
            return tirx.AllocBuffer(wide)
        if isinstance(s, tirx.Bind):
            value = self._value(s.value)
            if self._is_narrow(s.var):
                self.named[s.var] = tirx.Var(s.var.name, self.wide)
            return tirx.Bind(self.named.get(s.var, s.var), value)
        if isinstance(s, tirx.BufferStore):
            return self._store(s)
        if isinstance(s, tirx.For):
            extent, least = self._value(s.extent), self._value(s.min)
            body = self._statement(s.body)
            return tirx.For(s.loop_var, least, extent, s.kind, body, s.thread_binding, s.annotations, step=s.step)
        if isinstance(s, tirx.IfThenElse):
            other = None if s.else_case is None else self._statement(s.else_case)
            return tirx.IfThenElse(self._value(s.condition), self._statement(s.then_case), other)
        if isinstance(s, tirx.AttrStmt):
            return tirx.AttrStmt(s.node, s.attr_key, s.value, self._statement(s.body))
        if isinstance(s, tirx.Evaluate):
            return tirx.Evaluate(self._value(s.value))
        raise self._refuse(type(s).__name__)

    def _store(self, s: Any) -> Any:
        value, indices = self._value(s.value), [self._value(i) for i in s.indices]
        if s.buffer not in self.memory:
            return tirx.BufferStore(self.named.get(s.buffer, s.buffer), value, indices)
        number = self.memory[s.buffer]
        self.written.add(number)
        if self.api == "opencl":
            call = tirx.call_extern("int32", "vstore_half", value, indices[0], self.params[number])
        else:
            call = tirx.call_extern("int32", f"edgec_p{number}_put", indices[0], value)
        return tirx.Evaluate(call)

    # -- values --------------------------------------------------------------------------------------------------------

    def _is_narrow(self, value: Any) -> bool:
        return str(getattr(value.ty, "dtype", "")) == self.narrow

    def _wrapped(self, value: Any) -> Any:
        """A wide integer as what it is in a byte."""
        if self.narrow != "int8":
            return value
        bits = tirx.const(24, "int32")
        return tirx.shift_right(tirx.shift_left(value, bits), bits)

    def _value(self, v: Any) -> Any:
        if not isinstance(v, tvm.ir.Expr) or not hasattr(v, "ty"):
            return v
        if str(getattr(v.ty, "dtype", "")).startswith(f"{self.narrow}x"):
            raise self._refuse("vectors")
        if isinstance(v, tvm.ir.TensorLoad):
            return self._load(v)
        if isinstance(v, tirx.Cast):
            return self._cast(v)
        if isinstance(v, (tirx.IntImm, tirx.FloatImm)):
            return tirx.const(v.value, self.wide) if self._is_narrow(v) else v
        if isinstance(v, tvm.ir.Call):
            if getattr(v.op, "name", "") == "tirx.reinterpret" and any(map(self._is_narrow, (v, *v.args))):
                raise self._refuse("the bits")
            dtype = self.wide if self._is_narrow(v) else str(v.ty.dtype) if hasattr(v.ty, "dtype") else None
            arguments = [self._value(a) for a in v.args]
            if dtype is None or (
                all(a is b for a, b in zip(arguments, v.args, strict=True)) and not self._is_narrow(v)
            ):
                return v
            return tirx.call_intrin(dtype, v.op, *arguments)
        if isinstance(v, tirx.Select):
            return tirx.Select(*(self._value(p) for p in (v.condition, v.true_value, v.false_value)))
        if isinstance(v, tirx.Let):
            value = self._value(v.value)
            if self._is_narrow(v.var):
                self.named[v.var] = tirx.Var(v.var.name, self.wide)
            return tirx.Let(self.named.get(v.var, v.var), value, self._value(v.body))
        if isinstance(v, tirx.Not):
            return tirx.Not(self._value(v.a))
        if isinstance(v, BinaryOpExpr) or (hasattr(v, "a") and hasattr(v, "b")):
            kind: Any = type(v)
            made = kind(self._value(v.a), self._value(v.b))
            overflows = type(v).__name__ in ("Add", "Sub", "Mul")
            return self._wrapped(made) if self._is_narrow(v) and overflows else made
        if isinstance(v, tvm.ir.Var):
            return self.named.get(v, v)
        return v

    def _load(self, v: Any) -> Any:
        indices = [self._value(i) for i in v.indices]
        if v.source not in self.memory:
            return tirx.BufferLoad(self.named.get(v.source, v.source), indices)
        number = self.memory[v.source]
        if self.api == "opencl":
            return tirx.call_pure_extern(self.wide, "vload_half", indices[0], self.params[number])
        return tirx.call_pure_extern(self.wide, f"edgec_p{number}_get", indices[0])

    def _cast(self, v: Any) -> Any:
        value = self._value(v.value)
        if not self._is_narrow(v):
            target = str(v.ty.dtype)
            return value if str(value.ty.dtype) == target else tirx.Cast(target, value)
        same = str(value.ty.dtype) == self.wide
        value = value if same else tirx.Cast(self.wide, value)
        return value if self._is_narrow(v.value) or str(v.value.ty.dtype) == "bool" else self._wrapped(value)


def widened(kernels: Mapping[str, Any], api: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(device functions that the API's language can express, for each that was rewritten the parameters it writes)."""
    functions, written = {}, {}
    for name, function in kernels.items():
        functions[name] = function
        if has_narrow(function, api):
            functions[name], written[name] = widen(function, api)
    return functions, written
