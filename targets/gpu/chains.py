"""Element-wise TIR in the kernels' dialect: chains of steps, casts, padding, slices and concatenations.

TVM's library fuses such steps into one function. It is inlined into one expression of the output's indices, of which a
work item computes four neighbours: by vectors where they are neighbours in every operand, else one by one.
float16 is loaded and stored, and never computed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, sym, tirx

from edgec.errors import EdgecError
from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import Launch
from edgec.targets.gpu.kernels.dialect import Buffer, literal
from edgec.targets.gpu.kernels.elementwise import Walk, flat

# Kinds of values by element type; int8 is only moved and widened.
KINDS = {"float32": "float", "float16": "float", "int32": "int", "int8": "int", "bool": "bool"}
MEMORY = ("float32", "float16", "int32", "int8")
SIGNS = {"Add": "+", "Sub": "-", "Mul": "*"}
COMPARISONS = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!="}
LOGIC = {"And": "&&", "Or": "||"}
# Functions that both languages have under this name, for vectors too.
FUNCTIONS = frozenset(["exp", "log", "sqrt", "floor", "ceil", "sin", "cos"])


class Refused(Exception):
    """An expression that has no equal in the dialect."""


def chain(function: Any, device: Device) -> Launch | None:
    """The launch for a PrimFunc of element-wise steps with narrow indices, arguments as its parameters; None for all
    others: reductions, several outputs, types and functions that the dialect has not."""
    block = _inlined(function)
    if block is None:
        return None
    for vectors in (True, False):
        try:
            return _Chain(function, block, device, vectors).launch()
        except (Refused, EdgecError):
            # The latter: more work-groups than WGSL has.
            continue
    return None


def _inlined(function: Any) -> Any:
    """The only block that is left when all others are inlined, None where there is more."""
    found: list[Any] = []
    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, found.append)], order="pre")
    blocks = [b for b in found if b.name_hint != "root"]
    stored: list[Any] = []
    tvm_ffi.structural_walk(function.body, [(tirx.BufferStore, lambda s: stored.append(s.buffer))], order="pre")
    outputs = {p for p in function.params if any(p.same_as(b) for b in stored)}
    if len(outputs) != 1 or any(v.iter_type != tirx.IterVar.DataPar for b in blocks for v in b.iter_vars):
        return None
    if not stored or not any(stored[-1].same_as(p) for p in outputs):
        return None
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    try:
        children = schedule.get_child_blocks(schedule.get_sblock("root"))
        for child in children[:-1]:
            schedule.compute_inline(child)
    except tvm.error.TVMError:
        return None
    block: Any = schedule.get(children[-1])
    return block if isinstance(block.body, tirx.BufferStore) else None


class _Chain:
    """Text of the block of a function. vectors: whether operands may be read in vectors, and then in nothing else."""

    def __init__(self, function: Any, block: Any, device: Device, vectors: bool) -> None:
        self.parameters = list(function.params)
        self.types = [str(p.ty.dtype.dtype) for p in self.parameters]
        self.value, self.device = block.body.value, device
        self.output = self._position(block.body.buffer)
        if any(t not in MEMORY for t in self.types):
            raise Refused
        variables = [v.var for v in block.iter_vars]
        extents = [int(v.dom.extent) for v in block.iter_vars]
        if any(int(v.dom.min) for v in block.iter_vars):
            raise Refused
        self.analyzer: Any = sym.Analyzer()
        for variable, extent in zip(variables, extents, strict=True):
            self.analyzer.bind(variable, _range(extent))
        loads: list[Any] = []
        tvm_ffi.structural_walk(self.value, [(tvm.ir.TensorLoad, loads.append)], order="pre")
        self.at = self._flat(block.body.buffer, block.body.indices)
        order = sum((v * math.prod(extents[k + 1 :]) for k, v in enumerate(variables)), tirx.const(0, "int32"))
        if not self._equal(self.at, order):
            raise Refused
        # Whether all is one row: then indices are only the place itself.
        plain = all(self._equal(self._flat(x.source, x.indices), self.at) for x in loads if self._size(x.source) > 1)
        self.plain = plain and not self._conditions()
        kept = [k for k, n in enumerate(extents) if n > 1] or [len(extents) - 1]
        shape = flat((math.prod(extents),)) if self.plain or not extents else tuple(extents[k] for k in kept)
        kind = self.types[self.output]
        self.walk = Walk(device, "chain", shape, [], kind)
        self.c = self.walk.c
        # The last axis in fours, and what the others are called.
        self.last: Any = None
        self.column: Any = tirx.Var("column", "int32")
        self.analyzer.bind(self.column, _range(-(-shape[-1] // 4)))
        self.names: dict[Any, str] = {}
        self.fixed: dict[Any, Any] = {}
        if not self.plain and extents:
            self.last = variables[kept[-1]]
            self.names = {variables[k]: n for k, n in zip(kept[:-1], self.walk.indices, strict=True)}
            self.fixed = {v: tirx.const(0, "int32") for k, v in enumerate(variables) if k not in kept}
        self.names[self.column] = "column"
        self.lanes = self._lanes(loads if vectors else [])
        inputs = [i for i in range(len(self.parameters)) if i != self.output]
        for place, i in enumerate(inputs):
            self.c.add_buffer(place, Buffer(f"x{i}", self.types[i], self.lanes[i]))
        self.arguments = [*inputs, self.output]
        self.known: dict[str, str] = {}
        self.guarded = 0
        # Elements of the four that there are.
        self.count = 4

    def launch(self) -> Launch:
        def compute(count: int) -> str:
            # Values of one branch are not known in another.
            self.known.clear()
            self.count = count
            return self.vector(self.value)

        return self.walk.launch(compute, self.arguments)

    # -- indices -------------------------------------------------------------------------------------------------------

    def _position(self, buffer: Any) -> int:
        for i, p in enumerate(self.parameters):
            if p.same_as(buffer):
                return i
        raise Refused

    @staticmethod
    def _size(buffer: Any) -> int:
        return math.prod(int(n) for n in buffer.ty.shape)

    def _flat(self, buffer: Any, indices: Sequence[Any]) -> Any:
        shape = [int(n) for n in buffer.ty.shape]
        parts = [i * math.prod(shape[k + 1 :]) for k, i in enumerate(indices)]
        return self.analyzer.simplify(sum(parts, tirx.const(0, "int32")))

    def _equal(self, a: Any, b: Any) -> bool:
        return self._constant(self.analyzer.simplify(a - b)) == 0

    @staticmethod
    def _constant(e: Any) -> int | None:
        return int(e.value) if type(e).__name__ == "IntImm" else None

    def _conditions(self) -> bool:
        """Whether the value reads an index other than to find its operands."""
        found = False

        def on_var(v: Any) -> None:
            nonlocal found
            found = True

        def on_load(load: Any) -> Any:
            return tirx.const(0, str(load.ty.dtype))

        rest = tvm_ffi.structural_map(self.value, [(tvm.ir.TensorLoad, on_load)], order="post")
        tvm_ffi.structural_walk(rest, [(tirx.Var, on_var)], order="pre")
        return found

    def _lane(self, e: Any, lane: int) -> Any:
        """An index expression at element `lane` of the four."""
        known = dict(self.fixed)
        if self.last is not None:
            known[self.last] = self.column * 4 + lane
        at = tvm_ffi.structural_map(e, [(tirx.Var, lambda v: known.get(v, v))], order="post")
        return self.analyzer.simplify(at)

    def _step(self, place: Any) -> int | None:
        """What the place changes by from one of the four to the next, None where that is no number."""
        steps = {
            self._constant(self.analyzer.simplify(self._lane(place, k + 1) - self._lane(place, k))) for k in range(3)
        }
        return steps.pop() if len(steps) == 1 else None

    def _lanes(self, loads: Sequence[Any]) -> dict[int, int]:
        """4 for operands that are read in whole vectors, else 1."""
        found: dict[int, int] = {}
        for load in loads:
            i = self._position(load.source)
            place = self._flat(load.source, load.indices)
            if self.plain:
                whole = self._size(load.source) > 1
            else:
                start = self.analyzer.modular_set(self._lane(place, 0))
                whole = self._step(place) == 1 and start.coeff % 4 == 0 and start.base % 4 == 0
            whole = whole and self.walk.rest == 0
            found[i] = min(found.get(i, 4), 4 if whole else 1)
        return {i: found.get(i, 1) for i in range(len(self.parameters))}

    def index(self, e: Any) -> str:
        """The text of a simplified index or of a condition on indices."""
        name = type(e).__name__
        if name == "IntImm":
            return str(int(e.value)) if str(e.ty.dtype) != "bool" else ("true" if int(e.value) else "false")
        if name == "Var":
            if e not in self.names:
                raise Refused
            return self.names[e]
        if name in SIGNS or name in COMPARISONS or name in LOGIC:
            sign = {**SIGNS, **COMPARISONS, **LOGIC}[name]
            return f"({self.index(e.a)} {sign} {self.index(e.b)})"
        if name in ("Min", "Max"):
            return f"{name.lower()}({self.index(e.a)}, {self.index(e.b)})"
        divides = name in ("FloorDiv", "FloorMod") and (self._constant(e.b) or 0) > 0
        # Both languages divide as this does where nothing is negative.
        if divides and self.analyzer.const_int_bound(e.a).min_value >= 0:
            return f"({self.index(e.a)} {'/' if name == 'FloorDiv' else '%'} {self.index(e.b)})"
        if name == "Not":
            return f"!{self.index(e.a)}"
        raise Refused

    # -- values --------------------------------------------------------------------------------------------------------

    def _kind(self, e: Any) -> str:
        kind = KINDS.get(str(e.ty.dtype))
        if kind is None:
            raise Refused
        return kind

    def _kept(self, kind: str, text: str) -> str:
        """A variable with the value; text where it is part of what is not always computed."""
        if self.guarded:
            return text
        if text not in self.known:
            self.known[text] = self.c.let(kind, f"t{len(self.known)}_{self.count}", text)
        return self.known[text]

    def vector(self, e: Any) -> str:
        """Four elements as float4 or int4."""
        kind = f"{self._kind(e)}4"
        name = type(e).__name__
        if name in ("IntImm", "FloatImm"):
            return self.c.splat(kind, self._number(e))
        if name == "TensorLoad":
            return self._kept(kind, self._load(e))
        condition = self._condition(e)
        if condition is not None:
            return self._kept(kind, self._either(e, *condition))
        return self._kept(kind, self._apply(e, kind, self.vector))

    def _apply(self, e: Any, kind: str, part: Callable[[Any], str]) -> str:
        """An operation on four elements, or on one, whose operands `part` gives."""
        c, name, four = self.c, type(e).__name__, kind.endswith("4")

        def number(value: float) -> str:
            return c.constant(value) if four else literal(value)

        if str(e.ty.dtype) == "int8" and name != "Cast":
            raise Refused
        if name in SIGNS:
            return f"({part(e.a)} {SIGNS[name]} {part(e.b)})"
        if name == "Div" and kind.startswith("float"):
            return f"({part(e.a)} / {part(e.b)})"
        if name in ("Min", "Max"):
            return f"{name.lower()}({part(e.a)}, {part(e.b)})"
        if name == "Cast":
            return self._cast(e, kind, part)
        if name == "Call":
            function = str(getattr(e.op, "name", "")).rpartition(".")[2]
            if function == "likely":
                return part(e.args[0])
            if not kind.startswith("float"):
                raise Refused
            if function in FUNCTIONS:
                return f"{function}({part(e.args[0])})"
            if function == "fabs":
                return f"{'fabs' if c.opencl else 'abs'}({part(e.args[0])})"
            if function == "rsqrt":
                return f"({number(1.0)} / sqrt({part(e.args[0])}))"
            if function == "sigmoid":
                return f"({number(1.0)} / ({number(1.0)} + exp(-({part(e.args[0])}))))"
            if function == "tanh":
                # See `activated`.
                return f"tanh(clamp({part(e.args[0])}, {number(-15.0)}, {number(15.0)}))"
            if function == "erf":
                x = part(e.args[0])
                return c.call("erf", x) if four else f"{c.call('erf', c.splat('float4', x))}.x"
            if function in ("pow", "power"):
                return self._power(part(e.args[0]), e.args[1], number)
        raise Refused

    def _power(self, x: str, exponent: Any, number: Callable[[float], str]) -> str:
        """x to a constant power: WGSL's function has no negative numbers."""
        value = float(exponent.value) if type(exponent).__name__ == "FloatImm" else None
        if value in (1.0, 2.0, 3.0, 4.0):
            return f"({' * '.join([x] * int(value))})"
        if value == 0.5:
            return f"sqrt({x})"
        if value == -0.5:
            return f"({number(1.0)} / sqrt({x}))"
        if value == -1.0:
            return f"({number(1.0)} / {x})"
        raise Refused

    def _cast(self, e: Any, kind: str, part: Callable[[Any], str]) -> str:
        c, source, target = self.c, self._kind(e.value), kind.removesuffix("4")
        if str(e.ty.dtype) == "int8" and str(e.value.ty.dtype) != "int8":
            raise Refused
        if source == target:
            return part(e.value)
        four = kind.endswith("4")
        if (source, target) == ("int", "float"):
            return c.floats(part(e.value)) if four else c.real(f"({part(e.value)})")
        if (source, target) == ("float", "int"):
            # Towards zero.
            return (
                c.whole(part(e.value)) if four else (f"(int)({part(e.value)})" if c.opencl else f"i32({part(e.value)})")
            )
        raise Refused

    def _load(self, load: Any) -> str:
        i = self._position(load.source)
        c, name, dtype = self.c, f"x{i}", self.types[i]
        if self.plain and self._size(load.source) > 1:
            steps = [math.prod(self.walk.shape[k + 1 :]) for k in range(len(self.walk.shape))]
            unit = self.lanes[i]
            at = self.walk.at(steps, unit)
            if unit == 4:
                return epilogue.read(c, name, dtype, at)
            return self._gather(i, [f"{at} + {k}" if k else at for k in range(self.count)])
        place = self._flat(load.source, load.indices)
        if self.plain or self._step(place) == 0:
            kind = "int4" if self._kind(load) == "int" else "float4"
            return c.splat(kind, self._element(i, self.index(self._lane(place, 0))))
        if self.lanes[i] == 4:
            return epilogue.read(c, name, dtype, self.index(self.analyzer.simplify(self._lane(place, 0) // 4)))
        first = self.index(self._lane(place, 0))
        if self._step(place) == 1:
            return self._gather(i, [f"{first} + {k}" if k else first for k in range(self.count)])
        return self._gather(i, [self.index(self._lane(place, k)) for k in range(self.count)])

    def _element(self, i: int, at: str) -> str:
        """One element of an operand, wherever vectors of it are read, too."""
        if self.lanes[i] == 1:
            return self.c.load(f"x{i}", at)
        raise Refused

    def _gather(self, i: int, places: Sequence[str]) -> str:
        kind = "int4" if self.types[i].startswith("int") else "float4"
        zero = "0" if kind == "int4" else "0.0f"
        parts = [self._element(i, at) for at in places]
        return self.c.vec(kind, parts + [zero] * (4 - len(parts)))

    # -- choices -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _condition(e: Any) -> tuple[Any, Any, Any] | None:
        """(condition, value where it holds, value elsewhere) of a choice."""
        if type(e).__name__ == "Select":
            return e.condition, e.true_value, e.false_value
        if type(e).__name__ == "Call" and getattr(e.op, "name", "") == "prim.if_then_else":
            return tuple(e.args)  # type: ignore[return-value]
        return None

    def _either(self, e: Any, condition: Any, then: Any, other: Any) -> str:
        c = self.c
        if _has(condition, tvm.ir.TensorLoad):
            # Of values: both are there, as nothing but indices makes an operand end.
            if _has(e, tirx.Var, skipping=tvm.ir.TensorLoad):
                raise Refused
            return f"select({self.vector(other)}, {self.vector(then)}, {self._mask(condition)})"
        each = [self._lane(condition, k) for k in range(4)]
        known = [self._constant(x) for x in each]
        if all(value is not None for value in known[: self.count]) and len(set(known[: self.count])) == 1:
            return self.vector(then if known[0] else other)
        ends = tvm_ffi.structural_equal(each[0], each[3]) and not _has(condition, (tirx.EQ, tirx.NE))
        self.guarded += 1
        try:
            if ends:
                return c.pick(self.index(each[0]), self.vector(then), self.vector(other))
            parts = []
            for lane in range(self.count):
                chosen = then if known[lane] else other
                if known[lane] is not None:
                    parts.append(self.scalar(chosen, lane))
                    continue
                text = c.pick(self.index(each[lane]), self.scalar(then, lane), self.scalar(other, lane))
                parts.append(text)
            kind = self._kind(e)
            return c.vec(f"{kind}4", parts + ["0" if kind == "int" else "0.0f"] * (4 - self.count))
        finally:
            self.guarded -= 1

    def _mask(self, e: Any) -> str:
        """A comparison of four values."""
        name = type(e).__name__
        if name in COMPARISONS:
            if "bool" in (str(e.a.ty.dtype), str(e.b.ty.dtype)):
                raise Refused
            return f"({self.vector(e.a)} {COMPARISONS[name]} {self.vector(e.b)})"
        if name in LOGIC:
            return f"({self._mask(e.a)} {LOGIC[name][0]} {self._mask(e.b)})"
        if name == "Not":
            return f"!{self._mask(e.a)}"
        raise Refused

    def scalar(self, e: Any, lane: int) -> str:
        """Element `lane` of the four as float or int."""
        kind, name = self._kind(e), type(e).__name__
        if name in ("IntImm", "FloatImm"):
            return self._number(e)
        if name == "TensorLoad":
            i = self._position(e.source)
            return self._element(i, self.index(self._lane(self._flat(e.source, e.indices), lane)))
        condition = self._condition(e)
        if condition is None:
            return self._apply(e, kind, lambda part: self.scalar(part, lane))
        test, then, other = condition
        if _has(test, tvm.ir.TensorLoad):
            raise Refused
        at = self._lane(test, lane)
        if self._constant(at) is not None:
            return self.scalar(then if self._constant(at) else other, lane)
        return self.c.pick(self.index(at), self.scalar(then, lane), self.scalar(other, lane))

    def _number(self, e: Any) -> str:
        if self._kind(e) == "float":
            value = float(e.value)
            if math.isnan(value):
                raise Refused
            # WGSL has no such literal: see `literal`.
            if math.isinf(value) and self.c.opencl:
                return "INFINITY" if value > 0 else "(-INFINITY)"
            return literal(value)
        return str(int(e.value))


def _range(extent: int) -> Any:
    zero: Any = 0
    end: Any = extent
    return tvm.ir.Range(zero, end)


def _has(e: Any, kinds: Any, skipping: Any = None) -> bool:
    """Whether an expression has a part of these kinds, outside of parts of the kind `skipping`."""
    if skipping is not None:
        e = tvm_ffi.structural_map(e, [(skipping, lambda load: tirx.const(0, str(load.ty.dtype)))], order="post")
    found = False

    def on_part(part: Any) -> None:
        nonlocal found
        found = True

    each = kinds if isinstance(kinds, tuple) else (kinds,)
    tvm_ffi.structural_walk(e, [(kind, on_part) for kind in each], order="pre")
    return found
