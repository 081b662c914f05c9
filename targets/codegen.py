"""TIR kernels to an object file with plain C functions.

The kernels are lowered without TVM's calling convention: every buffer becomes a pointer parameter, internal buffers
that are too large for the stack become further pointer parameters (the memory planner gives them room in the arena),
and nothing refers to the TVM runtime. The object links into any C program.
"""

from __future__ import annotations

import io
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType
from tvm.tirx.buffer import is_buffer_var

from edgec.errors import EdgecError
from edgec.targets import elementary
from edgec.targets.device import Device
from edgec.targets.schedule import schedule

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

    signature: C element type (numpy dtype name) of each pointer parameter, scratch included, by symbol.
    scratch: bytes of each scratch parameter; they follow the declared parameters.
    readonly: indices of parameters that the kernel never stores to.
    """

    module: Any
    signature: dict[str, tuple[str, ...]]
    scratch: dict[str, tuple[int, ...]]
    readonly: dict[str, frozenset[int]]


def lower_kernels(module: tvm.IRModule, device: Device, min_scratch: int = 256) -> LoweredKernels:
    """Lower every PrimFunc of `module`; the function's name becomes the C symbol.

    Internal buffers of `min_scratch` bytes or more become scratch parameters, smaller ones stay on the C stack.
    """
    target = tvm.target.Target(device.llvm_target())
    functions = {
        var.name_hint: schedule(_sequential(f), device).with_attr("global_symbol", var.name_hint)
        for var, f in module.functions.items()
        if isinstance(f, tirx.PrimFunc)
    }
    low = _passes(target)(tvm.IRModule(functions))
    lowered, signature, scratch, readonly = {}, {}, {}, {}
    for var, function in sorted(low.functions.items(), key=lambda item: item[0].name_hint):
        symbol = var.name_hint
        raw, types, sizes, constant = _raw_signature(function, symbol, target, min_scratch)
        lowered[symbol] = raw
        signature[symbol], scratch[symbol], readonly[symbol] = types, sizes, constant
    final = tirx.transform.LowerIntrin()(tvm.IRModule(lowered))
    return LoweredKernels(final, signature, scratch, readonly)


def build_object(lowered: LoweredKernels, device: Device) -> bytes:
    """Compile to one position-independent ELF object. The same kernels give the same bytes.

    The kernels are hidden symbols: code linked into the same program or library calls them, nothing else sees them.
    Raises EdgecError when a kernel needs the TVM runtime, which a device does not have.
    """
    target = tvm.target.Target(device.llvm_target())
    built = tvm.get_global_func("target.build.llvm")(lowered.module, target)
    with tempfile.TemporaryDirectory(prefix="edgec-object-") as folder:
        source, path = Path(folder) / "kernels.ll", Path(folder) / "kernels.o"
        source.write_text(_plain_ir(built.inspect_source("ll")))
        tvm.get_global_func("ffi.Module.load_from_file.ll")(str(source), "ll").write_to_file(str(path), "o")
        data = path.read_bytes()
    runtime = sorted(s for s in undefined_symbols(data) if RUNTIME_SYMBOL.match(s))
    if runtime:
        raise EdgecError(
            f"kernels need the TVM runtime: {', '.join(runtime)}",
            where="code generation",
            hint="rewrite the operator in the model; sorting, random numbers and data-dependent shapes have no kernel",
        )
    return data


def text_bytes(data: bytes) -> int:
    """Bytes of machine code and read-only tables in an ELF object or shared library."""
    from elftools.elf.constants import SH_FLAGS
    from elftools.elf.elffile import ELFFile

    loaded = (s for s in ELFFile(io.BytesIO(data)).iter_sections() if s["sh_flags"] & SH_FLAGS.SHF_ALLOC)
    return sum(s["sh_size"] for s in loaded if not s["sh_flags"] & SH_FLAGS.SHF_WRITE)


def undefined_symbols(data: bytes) -> set[str]:
    """Names an ELF object or shared library expects from elsewhere."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    found = set()
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if isinstance(section, SymbolTableSection):
            found |= {s.name for s in section.iter_symbols() if s["st_shndx"] == "SHN_UNDEF" and s.name}
    return found


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


def _sequential(function: Any) -> Any:
    """A PrimFunc as TVM's operator library writes it, reduced to what one thread with plain pointers runs.

    Parallel loops become serial, hints of the operator library are dropped and buffers start at their pointer.
    """

    def on_loop(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    def on_attribute(statement: Any) -> Any:
        return statement.body if statement.attr_key.startswith("pragma_") else statement

    body = tvm_ffi.structural_map(function.body, [(tirx.For, on_loop), (tirx.AttrStmt, on_attribute)], order="post")
    return function.with_body(body)


def _passes(target: Any) -> Any:
    """TVM's TIR pipeline without the passes that produce its packed calling convention."""
    s, x = s_tir.transform, tirx.transform
    return tvm.ir.transform.Sequential(
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
    )


def _raw_signature(
    function: Any, symbol: str, target: Any, min_scratch: int
) -> tuple[Any, tuple[str, ...], tuple[int, ...], frozenset[int]]:
    """Buffer parameters become pointers, large allocations become parameters."""
    pointers, declarations, types, buffers = [], [], [], []
    for parameter in function.params:
        dtype = _dtype(parameter)
        pointer = tirx.Var(parameter.name, PointerType(PrimType(dtype), "global"))
        pointers.append(pointer)
        types.append(dtype)
        buffers.append(parameter)
        declarations.append(tirx.DeclBuffer(parameter, data=pointer))
    sizes: list[int] = []

    def on_allocation(statement: Any) -> Any:
        buffer = statement.buffer
        size = _bytes(buffer)
        if buffer.scope() == "local" or size < min_scratch:
            return statement
        pointer = tirx.Var(f"{buffer.name}_ws", PointerType(PrimType(_dtype(buffer)), "global"))
        pointers.append(pointer)
        types.append(_dtype(buffer))
        sizes.append(size)
        return tirx.DeclBuffer(buffer, data=pointer)

    body = tvm_ffi.structural_map(function.body, [(tirx.AllocBuffer, on_allocation)], order="post")
    body = tvm_ffi.structural_map(body, [(tvm.ir.Call, elementary.expand)], order="post")
    # TVM's operator library leaves the place of data behind a pointer open; ours always starts at the pointer.
    offsets = [b.elem_offset for b in buffers if isinstance(b.elem_offset, tirx.Var)]
    if offsets:
        zero = {offset: tirx.const(0, str(offset.ty.dtype)) for offset in offsets}
        body = tvm_ffi.structural_map(body, [(tirx.Var, lambda v: zero.get(v, v))], order="post")
    # An output that may share memory with an input must not be promised to be unaliased.
    aliased = function.attrs is not None and "edgec.inplace" in function.attrs
    raw = tirx.PrimFunc(pointers, tirx.SeqStmt([*declarations, body]), ret_type=tvm.ir.TupleType([]), attrs=None)
    raw = raw.with_attr("global_symbol", symbol).with_attr("target", target)
    if not aliased:
        raw = raw.with_attr("tirx.noalias", True)
    stored = _stored(function.body)
    constant = frozenset(i for i, p in enumerate(buffers) if not any(p.same_as(b) for b in stored))
    return raw, tuple(types), tuple(sizes), constant


def _stored(body: Any) -> list[Any]:
    """Buffers that are written, looked up through the declarations that rename them."""
    renamed: dict[Any, Any] = {}
    stores: list[Any] = []

    def on_declaration(statement: Any) -> None:
        source = statement.data
        renamed[statement.buffer] = source.args[0] if hasattr(source, "args") and len(source.args) else source

    tvm_ffi.structural_walk(body, [(tirx.DeclBuffer, on_declaration)], order="pre")
    tvm_ffi.structural_walk(body, [(tirx.BufferStore, lambda s: stores.append(s.buffer))], order="pre")
    found = []
    for buffer in stores:
        while buffer in renamed:
            buffer = renamed[buffer]
        found.append(buffer)
    return found


def _dtype(buffer: Any) -> str:
    return str(buffer.ty.dtype.dtype) if is_buffer_var(buffer) else str(buffer.dtype)


def _bytes(buffer: Any) -> int:
    size = 1
    for extent in buffer.ty.shape:
        size *= int(extent)
    return size * buffer.ty.dtype.dtype.itemsize
