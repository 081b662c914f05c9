"""TIR kernels to object files with plain C functions.

The kernels are lowered without TVM's calling convention: every buffer becomes a pointer parameter, internal buffers
that are too large for the stack become further pointer parameters (the memory planner gives them room in the arena),
and nothing refers to the TVM runtime. The objects link into any C program.

Each kernel is compiled on its own, several at a time, and kept on disk by content (`edgec.targets.cache`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx.buffer import is_buffer_var

from edgec.errors import EdgecError
from edgec.targets import elementary
from edgec.targets.cache import ObjectCache
from edgec.targets.device import Device
from edgec.targets.elf import rename_symbol
from edgec.targets.elf import text_bytes as text_bytes
from edgec.targets.elf import undefined_symbols as undefined_symbols
from edgec.targets.partition import partition
from edgec.targets.lets import flatten_lets
from edgec.targets.phases import Phase, accesses, divide, passed_on, serial
from edgec.targets.schedule import LIBRARY, schedule

# What kernels are called while they are compiled, so that equal ones of different models are found in the cache.
CANONICAL = "edgec_kernel"
# Part of every key of the cache: raise it when equal TIR becomes other machine code.
GENERATION = 1
RUNTIME_SYMBOL = re.compile(r"TVM|tvm|__tvm")
UNWANTED_IR = (
    (re.compile(r'^define weak [^\n]*section "\.text\.tvm\.fp16\.conv"[^\n]*\{\n.*?^\}\n', re.M | re.S), ""),
    (re.compile(r"^ +#dbg_.*\n", re.M), ""),
    (re.compile(r",? !(dbg|tbaa) !\d+"), ""),
    (re.compile(r"^!llvm\.dbg\.cu = .*\n", re.M), ""),
    (re.compile(r"^define dllexport ", re.M), "define hidden "),
)


@dataclass(frozen=True)
class LoweredKernels:
    """Kernels ready for LLVM.

    module: the C functions.
    signature: C element type (numpy dtype name) of each pointer parameter, scratch included, by symbol.
    scratch: bytes of each scratch parameter; they follow the declared parameters.
    readonly: indices of parameters that the kernel never stores to.
    phases: by symbol the C functions that make up a kernel, to be called one after the other, each with its number of
        tasks. One with tasks has two more parameters, `int32_t begin, int32_t end`, and does those of its tasks, which
        threads may share; 0 tasks: it is called once, with the pointers alone.
    """

    module: Any
    signature: dict[str, tuple[str, ...]]
    scratch: dict[str, tuple[int, ...]]
    readonly: dict[str, frozenset[int]]
    phases: dict[str, tuple[tuple[str, int], ...]]


def c_calls(lowered: LoweredKernels, symbol: str, arguments: Sequence[str]) -> tuple[str, str]:
    """C text: declarations of a kernel's functions, and what one thread calls to do all of it with these pointers."""
    declarations, calls = [], []
    for name, tasks in lowered.phases[symbol]:
        types = ["void *"] * len(arguments) + ["int32_t"] * (2 if tasks else 0)
        declarations.append(f"void {name}({', '.join(types)});")
        calls.append(f"{name}({', '.join([*arguments, *(['0', str(tasks)] if tasks else [])])});")
    return "\n".join(declarations) + "\n", " ".join(calls)


def lower_kernels(module: tvm.IRModule, device: Device, min_scratch: int = 256) -> LoweredKernels:
    """Lower every PrimFunc of `module`; the function's name becomes the C symbol.

    Internal buffers of `min_scratch` bytes or more become scratch parameters, smaller ones stay on the C stack.
    """
    target = tvm.target.Target(device.tvm_target())
    functions = {
        var.name_hint: schedule(_plain(f), device).with_attr("global_symbol", var.name_hint)
        for var, f in module.functions.items()
        if isinstance(f, tirx.PrimFunc)
    }
    low = _lower(tvm.IRModule(functions), target)

    lowered: dict[str, Any] = {}
    result = LoweredKernels(None, {}, {}, {}, {})
    for var, function in sorted(low.functions.items(), key=lambda item: item[0].name_hint):
        symbol = var.name_hint
        scratch = _scratch(function.body, min_scratch)
        phases = divide(function.body, scratch, in_place="edgec.inplace" in (function.attrs or {}))
        names = [symbol] if len(phases) == 1 else [f"{symbol}_{number}" for number in range(len(phases))]
        result.phases[symbol] = tuple(zip(names, (phase.tasks for phase in phases), strict=True))
        for name, phase in zip(names, phases, strict=True):
            lowered[name], types, sizes = _raw_signature(function, phase, name, target, scratch)
            # The same for all: every phase has all pointers of the kernel, whichever it uses.
            result.signature[symbol], result.scratch[symbol] = types, sizes
        stored = accesses(function.body).stored
        result.readonly[symbol] = frozenset(i for i, p in enumerate(function.params) if p not in stored)
    final = tirx.transform.LowerIntrin()(tvm.IRModule(lowered))
    return replace(result, module=final)


def build_objects(
    lowered: LoweredKernels, device: Device, *, cache: ObjectCache | None = None, workers: int | None = None
) -> dict[str, bytes]:
    """Compile each kernel to a position-independent ELF object, by symbol in sorted order.

    The kernels are hidden symbols: code linked into the same program or library calls them, nothing else sees them.
    Equal kernels give equal bytes, whatever `cache` (default: the user's) holds and however many `workers` (default:
    as many threads as this process may use CPUs) compile at the same time. Raises EdgecError when a kernel needs the
    TVM runtime, which a device does not have.
    """
    store = ObjectCache.of_user() if cache is None else cache
    functions = {var.name_hint: f.with_attr("global_symbol", CANONICAL) for var, f in lowered.module.functions.items()}
    symbols = sorted(functions)
    keys = {symbol: _key(functions[symbol], device) for symbol in symbols}
    objects = {key: store.get(key) for key in keys.values()}
    missing = {keys[symbol]: functions[symbol] for symbol in symbols if objects[keys[symbol]] is None}
    if missing:
        target = tvm.target.Target(device.tvm_target())
        # TVM lets go of the interpreter while it works, so threads are enough.
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            try:
                done = list(pool.map(lambda function: _compile(function, target), missing.values()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        compiled = dict(zip(missing, done, strict=True))
        runtime = sorted({s for data in compiled.values() for s in undefined_symbols(data) if RUNTIME_SYMBOL.match(s)})
        if runtime:
            raise EdgecError(
                f"kernels need the TVM runtime: {', '.join(runtime)}",
                where="code generation",
                hint="rewrite the operator in the model; sorting, random numbers and data-dependent shapes have no "
                "kernel",
            )
        for key, data in compiled.items():
            store.put(key, data)
        store.trim()
        objects.update(compiled)
    return {symbol: rename_symbol(objects[keys[symbol]] or b"", CANONICAL, symbol) for symbol in symbols}


def _key(function: Any, device: Device) -> str:
    """The name in the cache of what `_compile` makes of a lowered kernel. TIR prints with all digits of its numbers."""
    llvm = tvm.get_global_func("target.llvm_version_major")()
    parts = (GENERATION, tvm.__version__, llvm, repr(UNWANTED_IR), device.tvm_target(), function.script())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compile(function: Any, target: Any) -> bytes:
    """The object of one kernel, called `CANONICAL`."""
    built = tvm.get_global_func("target.build.llvm")(tvm.IRModule({CANONICAL: function}), target)
    with tempfile.TemporaryDirectory(prefix="edgec-object-") as folder:
        source, path = Path(folder) / "kernel.ll", Path(folder) / "kernel.o"
        source.write_text(_plain_ir(built.inspect_source("ll")))
        tvm.get_global_func("ffi.Module.load_from_file.ll")(str(source), "ll").write_to_file(str(path), "o")
        return path.read_bytes()


def _plain_ir(text: str) -> str:
    """LLVM IR with nothing but our functions.

    Left out: TVM's own half-precision helpers, which have the names of libgcc's functions but on some machines another
    calling convention, so that they would break a program that uses both; debug information, which describes TVM's
    syntax tree; and type-based alias information, which is named after addresses and denies that an in-place output
    shares the memory of its input.
    """
    for pattern, replacement in UNWANTED_IR:
        text = pattern.sub(replacement, text)
    return text


def _plain(function: Any) -> Any:
    """A PrimFunc without the hints of TVM's operator library; of its parallel loops only the outermost ones stay so."""

    def on_attribute(statement: Any) -> Any:
        return statement.body if statement.attr_key.startswith("pragma_") else statement

    body = tvm_ffi.structural_map(function.body, [(tirx.AttrStmt, on_attribute)], order="post")
    return function.with_body(serial(body, outermost=False))


def _lower(module: tvm.IRModule, target: Any) -> tvm.IRModule:
    """TVM's TIR pipeline without the passes that produce its packed calling convention."""
    s, x, sequential = s_tir.transform, tirx.transform, tvm.ir.transform.Sequential
    flat = sequential(
        [
            x.BindTarget(target.with_host(target)),
            s.CanonicalizeLoop(),
            s.LowerInitBlock(),
            s.PlanAndUpdateBufferAllocationLocation(),
            s.ConvertBlocksToOpaque(),
            s.CompactBufferAllocation(),
            s.LowerMatchBuffer(),
            s.StmtSimplify(),
            s.LowerOpaqueBlock(),
            x.FlattenBuffer(),
            x.NarrowDataType(32),
            s.StmtSimplify(),
        ]
    )(module)
    for var, function in flat.functions.items():
        if function.attrs is not None and LIBRARY in function.attrs:
            flat.update_func(var, function.with_body(partition(function.body)))
    return sequential(
        [
            s.LoopPartition(),
            x.VectorizeLoop(True),
            x.StorageRewrite(),
            s.HoistIfThenElse(),
            x.UnrollLoop(),
            s.RenormalizeSplitPattern(),
            x.StmtSimplify(),
            x.RemoveNoOp(),
            s.RewriteUnsafeSelect(),
            x.CommonSubexprElim(),
        ]
    )(flat)


def _raw_signature(
    function: Any, phase: Phase, symbol: str, target: Any, scratch: Sequence[Any]
) -> tuple[Any, tuple[str, ...], tuple[int, ...]]:
    """The C function of a phase: buffer parameters of the kernel become pointers, then its scratch memory.

    Returns it with the types of the pointers and the bytes of the scratch memory.
    """
    buffers = [*function.params]
    memory = {b: tirx.Var(f"{b.name}_ws", _pointer(b)) for b in scratch}
    pointers = [tirx.Var(b.name, _pointer(b)) for b in buffers]
    declarations = [tirx.DeclBuffer(b, data=pointer) for b, pointer in zip(buffers, pointers, strict=True)]
    begin, end = tirx.Var("begin", "int32"), tirx.Var("end", "int32")

    def on_allocation(statement: Any) -> Any:
        pointer = memory.get(statement.buffer)
        return statement if pointer is None else tirx.DeclBuffer(statement.buffer, data=pointer)

    body = tvm_ffi.structural_map(phase.body(begin, end), [(tirx.AllocBuffer, on_allocation)], order="post")
    body = flatten_lets(tvm_ffi.structural_map(body, [(tvm.ir.Call, elementary.expand)], order="post"))
    # TVM's operator library leaves the place of data behind a pointer open; ours always starts at the pointer.
    offsets = [b.elem_offset for b in buffers if isinstance(b.elem_offset, tirx.Var)]
    if offsets:
        zero = {offset: tirx.const(0, str(offset.ty.dtype)) for offset in offsets}
        body = tvm_ffi.structural_map(body, [(tirx.Var, lambda v: zero.get(v, v))], order="post")
    # An output that may share memory with an input must not be promised to be unaliased.
    aliased = function.attrs is not None and "edgec.inplace" in function.attrs
    parameters = [*pointers, *memory.values(), *([begin, end] if phase.tasks else [])]
    raw = tirx.PrimFunc(parameters, tirx.SeqStmt([*declarations, body]), ret_type=tvm.ir.TupleType([]), attrs=None)
    raw = raw.with_attr("global_symbol", symbol).with_attr("target", target)
    if not aliased:
        raw = raw.with_attr("tirx.noalias", True)
    # TVM makes scratch memory that is only read and written in vectors a buffer of vectors.
    types = tuple(_dtype(b).partition("x")[0] for b in (*buffers, *scratch))
    return raw, types, tuple(_bytes(b) for b in scratch)


def _scratch(body: Any, least: int) -> list[Any]:
    """Allocated buffers of `least` bytes or more, or that go from one thread to another, and are not to stay local."""
    shared = passed_on(body)
    found: list[Any] = []
    tvm_ffi.structural_walk(body, [(tirx.AllocBuffer, lambda a: found.append(a.buffer))], order="pre")
    return [b for b in dict.fromkeys(found) if b.scope() != "local" and (_bytes(b) >= least or b in shared)]


def _pointer(buffer: Any) -> Any:
    return PointerType(PrimType(_dtype(buffer)), "global")


def _dtype(buffer: Any) -> str:
    return str(buffer.ty.dtype.dtype) if is_buffer_var(buffer) else str(buffer.dtype)


def _bytes(buffer: Any) -> int:
    size = 1
    for extent in buffer.ty.shape:
        size *= int(extent)
    return size * buffer.ty.dtype.dtype.itemsize
