"""Kernels of a GPU: launches of functions in OpenCL C, WGSL or Metal's language.

Four kinds of PrimFuncs come here. Those of `edgec.targets.gpu.kernels` carry their launches. Element-wise operators of
TVM's library are written anew by `edgec.targets.gpu.chains`. Others of that library are bound to threads by dlight's
plainest rule, one work item for each element of a result. Templates of `edgec.targets.kernels` without a GPU kernel are
scalar code whose marked loops become work items (see `edgec.targets.phases`): correct on every device, and slow.

Nothing here calls what crashes in TVM 0.27: no `tensorize` (the rules for matrix products on Metal), no
`ConvertLayout`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from edgec.errors import EdgecError
from edgec.targets import elementary
from edgec.targets.codegen import LoweredKernels, lower_kernels
from edgec.targets.device import Device
from edgec.targets.gpu.chains import chain
from edgec.targets.gpu.kernels.base import LAUNCHES, Launch, Size, launch_of
from edgec.targets.gpu.narrow import finish_bytes, widened
from edgec.targets.mcu.scalar import scalarise

# Work items of a group for templates, whose iterations are long.
TASK_GROUP = 32
# Memory of one iteration that stays with the work item; more than that is asked of the memory planner.
PRIVATE_BYTES = 4096
# Text of all kernels up to which further variants are added: drivers of phones take long to compile it.
SOURCE_BYTES = 190_000
MOST_VARIANTS = 4
# WGSL allows no more groups in one direction.
MOST_GROUPS = 65535
SECTION = re.compile(r"^(?://-+\n)?// Function: (\w+)\n", re.M)
FORWARD = re.compile(r"^__kernel [^\n{]*;\n", re.M)
UNIFORM = re.compile(
    r"^struct PODArgs \{\n.*?\n\}\n@group\(0\) @binding\(\d+\) var<uniform> podArgs : PODArgs;\n", re.M | re.S
)
PROLOGUE = re.compile(r"^#(?:if|ifdef|ifndef|else|elif|endif|pragma|error|define|undef)\b[^\n]*\n", re.M)
# Functions that stand for float numbers until the text is there: TVM prints seven digits of them.
NUMBER = re.compile(r"\bedgec_number_(float32|float16)_([0-9a-f]{8})\(\)")
ATTRIBUTES = {"calling_conv": 2, "tirx.is_global_func": True, "tirx.noalias": True}


@dataclass(frozen=True)
class LoweredGpu:
    """Kernels as the emitters of GPU bundles print them.

    variants: by symbol the ways to compute it, each of launches to be dispatched one after the other; the first one is
    what is used until a host has measured them. signature, scratch: as in `LoweredKernels`. chains: the symbols of
    TVM's operators that `edgec.targets.gpu.chains` has written.
    """

    variants: Mapping[str, tuple[tuple[Launch, ...], ...]]
    signature: Mapping[str, tuple[str, ...]]
    scratch: Mapping[str, tuple[int, ...]]
    chains: frozenset[str] = frozenset()

    @property
    def module(self) -> str:
        """All texts, for looking at."""
        return "\n".join([*self.helpers().values(), *self.texts().values()])

    def texts(self) -> dict[str, str]:
        """The text of each function, by name, in the order of the symbols.

        Raises AssertionError when one name stands for two texts: a bug of a kernel.
        """
        found: dict[str, str] = {}
        for launch in self._launches():
            if found.setdefault(launch.function, launch.text) != launch.text:
                raise AssertionError(f"two functions are called {launch.function}")
        return found

    def helpers(self, function: str | None = None) -> dict[str, str]:
        """The text of each function that kernels call, or that one of them calls, by name, in an order in which all are
        known where they are called. Raises AssertionError as `texts`."""
        found: dict[str, str] = {}
        for launch in self._launches():
            for name, text in launch.helpers if function in (None, launch.function) else ():
                if found.setdefault(name, text) != text:
                    raise AssertionError(f"two functions are called {name}")
        return found

    def _launches(self) -> Iterator[Launch]:
        return (launch for variants in self.variants.values() for launches in variants for launch in launches)

    def bytes_of_text(self, device: Device) -> int:
        """Bytes that a driver reads to compile all kernels: in OpenCL, where they are one program, with each helper
        once, elsewhere with those of each kernel."""
        return _bytes_of(self._launches(), device)


def lower_to_gpu(module: tvm.IRModule, device: Device) -> LoweredGpu:
    """The kernels of `module`; every function name is unique in a program of several.

    Raises EdgecError when an operator needs something that the device's language has not.
    """
    found = LoweredGpu({}, {}, {})
    library, templates = {}, {}
    macs: dict[str, int] = {}
    for var, function in sorted(module.functions.items(), key=lambda item: item[0].name_hint):
        if not isinstance(function, tirx.PrimFunc):
            continue
        symbol = var.name_hint
        if LAUNCHES in (function.attrs or {}):
            variants, scratch, macs[symbol] = json.loads(str(function.attrs[LAUNCHES]))
            made = tuple(tuple(map(launch_of, launches)) for launches in variants)
            _add(found, symbol, function, made, scratch)
        elif _has_blocks(function):
            library[symbol] = function
        else:
            templates[symbol] = function
    library = {symbol: _narrow(symbol, function) for symbol, function in library.items()}
    chains = {symbol: chain(function, device) for symbol, function in library.items() if device.api != "metal"}
    for symbol, launch in chains.items():
        if launch is not None:
            _add(found, symbol, library.pop(symbol), ((launch,),), ())
    kernels: dict[str, Any] = {}
    parts: dict[str, list[tuple[str, tuple[int, ...], Size, Size]]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for lowered in (_templates(templates, device), _library(library, device)):
        for symbol, (functions, launches, scratch) in lowered.items():
            kernels.update(functions)
            parts[symbol], sizes[symbol] = launches, scratch
    texts = _texts(kernels, device)
    for symbol, launches in parts.items():
        made = tuple(
            _spread(Launch(name, _unbounded(texts[name], grid, device), arguments, grid, group), device)
            for name, arguments, grid, group in launches
        )
        _add(found, symbol, module[symbol], (made,), sizes[symbol])
    for symbol, variants in found.variants.items():
        for launch in (launch for launches in variants for launch in launches):
            _check(symbol, launch, device)
    own = frozenset(symbol for symbol, launch in chains.items() if launch is not None)
    return replace(found, variants=_affordable(found.variants, macs, device), chains=own)


def _bytes_of(launches: Iterable[Launch], device: Device) -> int:
    """See `LoweredGpu.bytes_of_text`."""
    return sum(map(len, _pieces(launches, device).values()))


def _pieces(launches: Iterable[Launch], device: Device) -> dict[tuple[str, str], str]:
    """The texts of functions and of what they call: of the latter one for all, or one for each function."""
    found: dict[tuple[str, str], str] = {}
    for launch in launches:
        found["", launch.function] = launch.text
        found.update({("" if device.api == "opencl" else launch.function, n): text for n, text in launch.helpers})
    return found


def _affordable(
    variants: Mapping[str, tuple[tuple[Launch, ...], ...]], macs: Mapping[str, int], device: Device
) -> dict[str, tuple[tuple[Launch, ...], ...]]:
    """The first variant of each kernel, and further ones of those with most work as long as there is room for text.

    Where the first ones are too long together, kernels with least work begin with their shortest variant.
    """
    kept = {symbol: [each[0]] for symbol, each in variants.items()}

    def texts() -> dict[tuple[str, str], str]:
        return _pieces((launch for each in kept.values() for launches in each for launch in launches), device)

    order = sorted(variants, key=lambda s: (macs.get(s, 0), s))
    for symbol in order:
        if sum(map(len, texts().values())) > SOURCE_BYTES:
            kept[symbol] = [min(variants[symbol], key=lambda launches: sum(len(x.text) for x in launches))]
    found = texts()
    size = sum(map(len, found.values()))
    for symbol in reversed(order):
        others = [launches for launches in variants[symbol] if launches not in kept[symbol]]
        for launches in others[: MOST_VARIANTS - 1]:
            more = {key: text for key, text in _pieces(launches, device).items() if key not in found}
            added = sum(map(len, more.values()))
            if size + added <= SOURCE_BYTES:
                found |= more
                size += added
                kept[symbol].append(launches)
    return {symbol: tuple(each) for symbol, each in kept.items()}


def _add(
    found: LoweredGpu,
    symbol: str,
    function: Any,
    variants: tuple[tuple[Launch, ...], ...],
    scratch: Sequence[int],
) -> None:
    types = tuple(str(p.ty.dtype.dtype) for p in function.params)
    found.variants[symbol] = variants  # type: ignore[index]
    found.signature[symbol] = (*types, *(["uint8"] * len(scratch)))  # type: ignore[index]
    found.scratch[symbol] = tuple(scratch)  # type: ignore[index]


def _check(symbol: str, launch: Launch, device: Device) -> None:
    items = math.prod(launch.group)
    if items > device.work_group:
        raise EdgecError(
            f"{launch.function} has groups of {items} work items, {device.name} takes {device.work_group}",
            where=symbol,
            hint="this is a bug in edgec",
        )
    if device.api == "vulkan" and max(launch.grid) > MOST_GROUPS:
        raise EdgecError(f"{launch.function} needs {max(launch.grid)} groups in one direction", where=symbol)


def _target(device: Device) -> Any:
    return tvm.target.Target(device.tvm_target())


def _has_blocks(function: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, found.append)], order="pre")
    return bool(found)


# -- templates ---------------------------------------------------------------------------------------------------------

Part = tuple[dict[str, Any], list[tuple[str, tuple[int, ...], Size, Size]], tuple[int, ...]]


def _templates(functions: Mapping[str, Any], device: Device) -> dict[str, Part]:
    """One launch for each phase of a template, one work item for each of its tasks."""
    if not functions:
        return {}
    for symbol, function in functions.items():
        if device.api == "vulkan" and _computes_wide(function):
            # TVM would write integers of 32 bits.
            raise EdgecError(
                f"{symbol} needs 64-bit integers, which WGSL has not",
                where=f"code generation for {device.name}",
                hint="compile for an OpenCL target, or keep the layer in float",
            )
    scalar = tvm.IRModule({symbol: scalarise(function) for symbol, function in functions.items()})
    with elementary.native():
        lowered = lower_kernels(scalar, device, PRIVATE_BYTES)
    return {symbol: _phases(lowered, symbol, device) for symbol in functions}


def _computes_wide(function: Any) -> bool:
    """Whether numbers are widened to 64 bits."""
    found: list[Any] = []

    def on_cast(cast: Any) -> None:
        if str(cast.ty.dtype).startswith(("int64", "uint64")):
            found.append(cast)

    tvm_ffi.structural_walk(function.body, [(tirx.Cast, on_cast)], order="pre")
    return bool(found)


def _phases(lowered: LoweredKernels, symbol: str, device: Device) -> Part:
    functions, launches = {}, []
    for name, tasks in lowered.phases[symbol]:
        function = lowered.module[name]
        pointers = [p for p in function.params if isinstance(p.ty, tvm.ir.PointerType)]
        group = min(TASK_GROUP, max(1, tasks))
        grid = -(-max(1, tasks) // group)
        body = _private(function.body)
        block: Any = tirx.Var("block", "int32")
        item: Any = tirx.Var("item", "int32")
        if tasks:
            begin, end = function.params[-2:]
            task = block * group + item if grid > 1 else item
            known = {begin: task, end: task + 1}
            body = tvm_ffi.structural_map(body, [(tirx.Var, lambda v, known=known: known.get(v, v))], order="post")
            if grid * group != tasks:
                body = tirx.IfThenElse(task < tasks, body, None)
        for var, tag, extent in ((item, "threadIdx.x", group), (block, "blockIdx.x", grid)):
            nothing: Any = None
            axis = tirx.IterVar(nothing, var, tirx.IterVar.ThreadIndex, tag)
            body = tirx.AttrStmt(axis, "thread_extent", tirx.const(extent, "int32"), body)
        kernel = tirx.PrimFunc(pointers, body, ret_type=tvm.ir.TupleType([]), attrs=None)
        name = f"{name}_task"
        kernel = kernel.with_attr({**ATTRIBUTES, "global_symbol": name, "target": _target(device)})
        functions[name] = kernel.with_attr("tirx.kernel_launch_params", ["blockIdx.x", "threadIdx.x"])
        used = _used(functions[name])
        functions[name] = _with_params(functions[name], [pointers[i] for i in used])
        launches.append((name, tuple(used), (grid, 1, 1), (group, 1, 1)))
    return functions, launches, lowered.scratch[symbol]


def _private(body: Any) -> Any:
    """The body with its memory as variables of the work item."""
    plain: dict[Any, Any] = {}

    def on_allocation(statement: Any) -> None:
        buffer = statement.buffer
        if buffer.scope() != "local":
            shape = list(buffer.ty.shape)
            plain[buffer] = tirx.decl_buffer(shape, buffer.ty.dtype.dtype, buffer.name, scope="local")

    tvm_ffi.structural_walk(body, [(tirx.AllocBuffer, on_allocation)], order="pre")
    return tvm_ffi.structural_map(body, [(tvm.ir.Var, lambda v: plain.get(v, v))], order="post") if plain else body


def _used(function: Any) -> list[int]:
    """Positions of the pointers that the body declares buffers on and uses: a phase takes those of its kernel only
    where it needs them, as WGSL's pipelines do."""
    loads: list[Any] = []
    views: dict[Any, Any] = {}

    def on_view(declaration: Any) -> None:
        source = declaration.data
        source = source.args[0] if hasattr(source, "args") and len(source.args) else source
        views[declaration.buffer] = views.get(source, source)

    rules = [
        (tirx.DeclBuffer, on_view),
        (tvm.ir.TensorLoad, lambda load: loads.append(load.source)),
        (tirx.BufferStore, lambda store: loads.append(store.buffer)),
    ]
    tvm_ffi.structural_walk(function.body, rules, order="pre")
    roots = [views.get(buffer, buffer) for buffer in loads]
    return [i for i, p in enumerate(function.params) if any(p.same_as(root) for root in roots)]


def _with_params(function: Any, parameters: Sequence[Any]) -> Any:
    """The function with fewer parameters, and without the declarations of buffers on those that are gone."""
    gone = [p for p in function.params if not any(p.same_as(q) for q in parameters)]
    views: list[Any] = list(gone)

    def on_view(declaration: Any) -> Any:
        source = declaration.data
        source = source.args[0] if hasattr(source, "args") and len(source.args) else source
        if any(source.same_as(view) for view in views):
            views.append(declaration.buffer)
            return tirx.Evaluate(tirx.const(0, "int32"))
        return declaration

    body = tvm_ffi.structural_map(function.body, [(tirx.DeclBuffer, on_view)], order="post") if gone else function.body
    made = tirx.PrimFunc(list(parameters), body, ret_type=tvm.ir.TupleType([]), attrs=None)
    return made.with_attr(dict(function.attrs.items()))


# -- operators of TVM's library ----------------------------------------------------------------------------------------


def _library(functions: Mapping[str, Any], device: Device) -> dict[str, Part]:
    """Launches of scheduled operators: by dlight's fallback rule, never by those for reductions or products, which give
    a convolution with groups one work-group of barriers for each output."""
    if not functions:
        return {}
    target = _target(device).with_host(tvm.target.Target("c"))
    with target:
        rules: Any = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())
        module = rules(tvm.IRModule(dict(functions)))
        module = _split(tirx.transform.BindTarget(target)(module))
    convention = {name.name_hint: f.attrs.get("calling_conv", None) for name, f in module.functions.items()}
    found = {}
    for symbol in functions:
        calls, scratch = _launched(module[symbol])
        kernels = {name: module[name] for name, *_ in calls}
        assert all(convention[name] == ATTRIBUTES["calling_conv"] for name in kernels)
        found[symbol] = (kernels, calls, scratch)
    return found


def _narrow(symbol: str, function: Any) -> Any:
    """The function with indices of 32 bits, where it does not compute with 64."""
    module = tvm.IRModule({symbol: function.with_attr("global_symbol", symbol)})
    return (module if _wide(function) else tirx.transform.ForceNarrowIndexToInt32()(module))[symbol]


def _wide(function: Any) -> bool:
    """Whether a function computes with 64-bit integers, so that they cannot be narrowed."""
    kinds: set[str] = {str(p.ty.dtype) for p in function.params}
    tvm_ffi.structural_walk(function.body, [(tirx.BufferStore, lambda s: kinds.add(str(s.buffer.ty.dtype)))])
    return any("64" in kind for kind in kinds)


def _split(module: tvm.IRModule) -> tvm.IRModule:
    """TVM's pipeline for GPUs up to the split into host and device code."""
    s, x = s_tir.transform, tirx.transform
    return tvm.ir.transform.Sequential(
        [
            s.CanonicalizeLoop(),
            s.LowerCrossThreadReduction(),
            s.LowerInitBlock(),
            s.PlanAndUpdateBufferAllocationLocation(),
            s.ConvertBlocksToOpaque(),
            s.LiftThreadBinding(),
            s.CompactBufferAllocation(),
            s.UnifyThreadBinding(),
            s.LowerMatchBuffer(),
            s.StmtSimplify(),
            s.LowerOpaqueBlock(),
            x.FlattenBuffer(),
            x.NarrowDataType(32),
            s.LoopPartition(),
            x.VectorizeLoop(True),
            s.InjectVirtualThread(),
            x.StorageRewrite(),
            s.HoistIfThenElse(),
            x.UnrollLoop(),
            s.RenormalizeSplitPattern(),
            x.StmtSimplify(),
            x.RemoveNoOp(),
            s.RewriteUnsafeSelect(),
            x.CommonSubexprElim(),
            x.VerifyMemory(),
            x.AnnotateEntryFunc(),
            # Barriers around what work items share, and reductions across them. The plainest rule needs neither, but a
            # schedule that does would give wrong results without them, and no error.
            s.ThreadSync("shared"),
            s.ThreadSync("shared.dyn"),
            s.InferFragment(),
            s.LowerThreadAllreduce(),
            s.MergeSharedMemoryAllocations(),
            x.SplitHostDevice(),
        ]
    )(module)


def _launched(host: Any) -> tuple[list[tuple[str, tuple[int, ...], Size, Size]], tuple[int, ...]]:
    """(launches, bytes of scratch memory) of a host function, arguments by position: parameters, then scratch.

    The arguments of a kernel are not in the order of the parameters, so they are found by what they name.
    """
    places = {parameter: number for number, parameter in enumerate(host.params)}
    scratch: list[int] = []
    launches = []
    for statement in _statements(host.body):
        if isinstance(statement, tirx.AllocBuffer):
            places[statement.buffer] = len(host.params) + len(scratch)
            extents = [int(extent) for extent in statement.buffer.ty.shape]
            scratch.append(math.prod(extents) * np.dtype(_element(statement.buffer)).itemsize)
        elif isinstance(statement, tirx.DeclBuffer):
            places[statement.buffer] = _place(places, statement.data)
        elif isinstance(statement, tirx.Evaluate):
            call = statement.value
            if getattr(getattr(call, "op", None), "name", "") != "tirx.call_ffi_kernel":
                continue
            tags = [str(tag) for tag in call.attrs.launch_params]
            name, *arguments = call.args
            extents = arguments[len(arguments) - len(tags) :]
            known = dict(zip(tags, (int(e) for e in extents), strict=True))
            used = tuple(_place(places, a) for a in arguments[: len(arguments) - len(tags)])
            grid, group = (
                tuple(known.get(f"{kind}.{axis}", 1) for axis in "xyz") for kind in ("blockIdx", "threadIdx")
            )
            launches.append((str(name.value), used, grid, group))
        else:
            raise EdgecError(f"host code has a {type(statement).__name__}", where=str(host.attrs["global_symbol"]))
    return launches, tuple(scratch)


def _place(places: Mapping[Any, int], value: Any) -> int:
    source = value.args[0] if hasattr(value, "args") and len(value.args) else value
    return places[source]


def _element(buffer: Any) -> str:
    return str(buffer.ty.dtype.dtype).partition("x")[0]


def _statements(statement: Any) -> Iterator[Any]:
    if isinstance(statement, tirx.SeqStmt):
        for each in statement.seq:
            yield from _statements(each)
        return
    yield statement
    body = getattr(statement, "body", None)
    if body is not None:
        yield from _statements(body)


# -- text --------------------------------------------------------------------------------------------------------------


def _texts(kernels: Mapping[str, Any], device: Device) -> dict[str, str]:
    """The definition of each device function, by name."""
    if not kernels:
        return {}
    target = _target(device)
    passes = [tirx.transform.LowerWarpMemory(), tirx.transform.StmtSimplify(), tirx.transform.LowerIntrin()]
    functions, written = widened(kernels, device.api)
    printable = {name: _with_numbers(function) for name, function in functions.items()}
    with target:
        module = tvm.ir.transform.Sequential(passes)(tvm.IRModule(printable))
    try:
        built = tvm.get_global_func(f"target.build.{target.kind.name}")(module, target)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EdgecError(
            f"TVM cannot write the kernels: {lines[-1].strip()}",
            where=f"code generation for {device.name}",
            hint="an operator uses a type that the device's language has not, such as 64-bit integers in WGSL",
        ) from error
    found: dict[str, str] = {}
    pieces = SECTION.split(built.inspect_source())
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        text = FORWARD.sub("", text) if device.api == "opencl" else text
        text = NUMBER.sub(lambda m: _number(m.group(1), m.group(2), device.api), text)
        # A WGSL section is announced twice.
        found[name] = found.get(name, "") + (PROLOGUE.sub("", text) if device.api == "opencl" else text)
    missing = set(kernels) - set(found)
    if missing:
        raise EdgecError(f"no text for {', '.join(sorted(missing))}", where=f"code generation for {device.name}")
    if device.api == "vulkan":
        found = {n: finish_bytes(text, kernels[n], written[n]) if n in written else text for n, text in found.items()}
    return {name: text.strip() + "\n" for name, text in found.items()}


def _with_numbers(function: Any) -> Any:
    """Float numbers as calls that `_number` replaces."""

    def on_number(value: Any) -> Any:
        dtype = str(value.ty.dtype)
        plain = math.isfinite(value.value) and value.value == round(value.value) and abs(value.value) < 1e6
        if dtype not in ("float32", "float16") or plain:
            return value
        bits = struct.pack(">f", value.value).hex()
        return tirx.call_pure_extern(dtype, f"edgec_number_{dtype}_{bits}")

    return function.with_body(tvm_ffi.structural_map(function.body, [(tirx.FloatImm, on_number)], order="post"))


def _number(dtype: str, bits: str, api: str) -> str:
    """The literal of a float number given by the bits of its float32 value."""
    value = struct.unpack(">f", bytes.fromhex(bits))[0]
    if api == "vulkan":
        suffix = {"float32": "f", "float16": "h"}[dtype]
        if math.isinf(value) or math.isnan(value):
            # WGSL has no such literal, and refuses to compute one while it compiles.
            value = math.copysign(np.finfo(dtype).max, value)
        if dtype == "float16":
            value = float(np.float16(value))
        text = f"{np.format_float_scientific(np.dtype(dtype).type(value), trim='0')}{suffix}"
        return f"({text})" if value < 0 else text
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = f"{value.hex()}f" if api == "opencl" else f"{np.format_float_scientific(np.float32(value), trim='0')}f"
    text = f"({text})" if value < 0 else text
    return text if dtype == "float32" else f"((half){text})"


def _unbounded(text: str, grid: Size, device: Device) -> str:
    """WGSL without the parameter that holds the number of groups, which are known."""
    if device.api != "vulkan":
        return text
    return UNIFORM.sub("", text).replace("podArgs.packGridDimX", f"{grid[0] - 1}u")


def _spread(launch: Launch, device: Device) -> Launch:
    """A launch of TVM's WGSL with more groups in x than are allowed, with the rest in z, as its text expects."""
    x, y, z = launch.grid
    if device.api != "vulkan" or x <= MOST_GROUPS or z != 1:
        return launch
    return replace(launch, grid=(MOST_GROUPS, y, -(-x // MOST_GROUPS)))
