"""Torch graph to TVM: region operators become calls of our kernel templates, the rest goes through Relax.

The result is a Relax `main` made of `call_tir` bindings and reshapes only; `edgec.lowering.planner` reads it off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from edgec.errors import EdgecError
from edgec.lowering.binding import Binding, bind, rules, weight_of
from edgec.lowering.legalize import convert_map
from edgec.program import layer_of
from edgec.sparsity import sparsities
from edgec.targets import elementary
from edgec.targets.device import Device

# The relative order of a variable name survives every Relax pass used here, so a call finds its layer by name.
TAG = re.compile(r"^edgec_call_(\d+)")

# Operators of TVM's library are named after the node they stand for, for the report.
NODE = re.compile(r"^edgec_node_(\d+)_")

# Same bytes in the same order: a name for memory, never a kernel.
VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")
# "op_pattern" of kernels that are bound on import: opaque, nothing is fused into them.
BOUND = 8


def _permute(node: Any, importer: Any) -> Any:
    x, order = node.args
    shape: Any = [int(d) for d in node.meta["val"].shape]
    moved = [axis for axis in order if int(x.meta["val"].shape[axis]) != 1]
    if moved == sorted(moved):
        return relax.op.reshape(importer.env[x], shape)
    return relax.op.permute_dims(importer.env[x], list(order))


def _mean(node: Any, importer: Any) -> Any:
    x, dims = importer.env[node.args[0]], node.args[1]
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    if node.meta["val"].dtype != torch.float16:
        return relax.op.mean(x, dims, keepdims=keep)
    # A sum over a map has more digits than float16.
    wide = importer.block_builder.emit(relax.op.astype(x, "float32"))
    mean = importer.block_builder.emit(relax.op.mean(wide, dims, keepdims=keep))
    return relax.op.astype(mean, "float16")


def _softmax(node: Any, importer: Any) -> Any:
    return relax.op.nn.softmax(importer.env[node.args[0]], int(node.args[1]))


def _log_softmax(node: Any, importer: Any) -> Any:
    return relax.op.nn.log_softmax(importer.env[node.args[0]], int(node.args[1]))


def _product(node: Any, importer: Any) -> Any:
    return relax.op.matmul(importer.env[node.args[0]], importer.env[node.args[1]])


# What operators with a kernel of ours become where the kernel does not fit.
RELAX: dict[Any, Callable[[Any, Any], Any]] = {
    torch.ops.aten.permute.default: _permute,
    torch.ops.aten.mean.dim: _mean,
    torch.ops.aten.softmax.int: _softmax,
    torch.ops.aten._softmax.default: _softmax,
    torch.ops.aten._log_softmax.default: _log_softmax,
    torch.ops.aten.bmm.default: _product,
    torch.ops.aten.mm.default: _product,
}


@dataclass(frozen=True)
class Imported:
    """`module`: Relax main; `bindings`: our kernel calls by tag number.

    nodes: the layer of each node of the graph. layers: after `legalize_relax` that of each kernel call of main, in
    order; empty where it is not known.
    """

    module: tvm.IRModule
    bindings: dict[int, Binding]
    nodes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


class _Importer(ExportedProgramImporter):
    """TVM's importer, naming what it emits after the number of the node. library: its own converters."""

    def update_convert_map(self, custom_convert_map: Any) -> None:
        self.library = dict(self.convert_map)
        super().update_convert_map(custom_convert_map)

    def _translate_fx_graph(self, graph_module: Any, nodes: Any, *rest: Any, **options: Any) -> Any:
        emit, current = self.block_builder.emit, 0

        def named(expression: Any, name_hint: str = "") -> Any:
            return emit(expression, name_hint or f"edgec_node_{current}_")

        def counted() -> Iterator[fx.Node]:
            nonlocal current
            for number, node in enumerate(nodes):
                current = number
                yield node

        self.block_builder.emit = named  # type: ignore[method-assign]
        return super()._translate_fx_graph(graph_module, counted(), *rest, **options)  # type: ignore[arg-type]


def import_graph(
    exported: torch.export.ExportedProgram, device: Device, annotations: Mapping[str, Any] | None = None
) -> Imported:
    """Import a legalised ExportedProgram with static shapes.

    annotations: of the Program; weights that they say are pruned go to block-sparse kernels where those are
    faster on the device, and `cast-fp16` may have asked for sums in float16.

    Raises EdgecError when TVM's importer fails; unsupported operators are reported earlier, by `legalize.unsupported`.
    """
    constants, masks = _constants(exported), _masks(exported, annotations or {})
    halves = _half_sums(annotations or {})
    bindings: dict[int, Binding] = {}
    functions: dict[str, Any] = {}

    def convert(node: fx.Node, importer: Any) -> Any:
        binding = bind(node, constants, masks, device, halves)
        if node.target is torch.ops.edgec.dequantize_weight.default:
            # Layers read the codes themselves; what else reads such a weight gets its values, computed now.
            return relax.const(weight_of(node, constants), "float32")
        if binding is None and node.target not in RELAX:
            return importer.library[_converter(node.target)](node)
        if binding is None:
            return importer.block_builder.emit(RELAX[node.target](node, importer))
        number, binding = len(bindings), binding.on(device)
        bindings[number] = binding
        key = binding.spec.key()
        if key not in functions:
            with elementary.native() if device.is_gpu else contextlib.nullcontext():
                function = binding.spec.prim_func(device).with_attr("op_pattern", BOUND)
            name = f"k{len(functions)}_{binding.symbol}"
            functions[key] = importer.block_builder.add_func(function.with_attr("global_symbol", name), name)
        packed = [relax.const(np.ascontiguousarray(a), str(a.dtype)) for a in binding.pack(device)]
        arguments: Any = [importer.env[n] for n in binding.before] + packed + [importer.env[n] for n in binding.after]
        value = node.meta["val"]
        shape: Any = [int(d) for d in value.shape]
        out = relax.TensorType(shape, str(value.dtype).removeprefix("torch."))
        call = relax.call_tir(functions[key], arguments, out)
        return importer.block_builder.emit(call, name_hint=f"edgec_call_{number}")

    table: dict[str, Callable[..., Any]] = dict(convert_map())
    table.update({_converter(target): convert for target in rules(device)})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = _Importer().from_exported_program(exported, False, False, False, table)
    except EdgecError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EdgecError(f"TVM's importer refused the graph: {lines[-1].strip()}", where="import") from error
    nodes = tuple(layer_of(n) if n.op == "call_function" else "" for n in exported.graph.nodes)
    return Imported(module, bindings, nodes)


def _converter(target: Any) -> str:
    """The name of an operator among TVM's converters."""
    return target._schema.name.split("::")[1] + "." + target._overloadname


def bindings_of(
    exported: torch.export.ExportedProgram, device: Device | None = None, annotations: Mapping[str, Any] | None = None
) -> list[Binding]:
    """The calls of our kernel templates that `import_graph` makes of a graph, in its order.

    Without a device, pruned layers are bound to dense kernels.
    """
    constants, masks = _constants(exported), _masks(exported, annotations or {})
    halves = _half_sums(annotations or {})
    found = [bind(node, constants, masks, device, halves) for node in exported.graph.nodes]
    return [binding if device is None else binding.on(device) for binding in found if binding is not None]


def legalize_relax(imported: Imported, device: Device) -> Imported:
    """Turn Relax operators into TIR kernels, fuse element-wise chains and fold constants."""
    transform, sequential = relax.transform, tvm.ir.transform.Sequential
    with tvm.target.Target(device.tvm_target()):
        simple = transform.DecomposeOpsForInference()(imported.module)
        kernels = sequential(
            [
                transform.CanonicalizeBindings(),
                transform.LegalizeOps(skip_ops=list(VIEWS)),
                transform.AnnotateTIROpPattern(),
            ]
        )(simple)
        kernels = _fold_constants(kernels, imported.module)
        fused = transform.FuseOps()(kernels)
        module = sequential([transform.FuseTIR(), transform.DeadCodeElimination(["main"])])(fused)
    layers = _layers(_origins(simple["main"], imported.nodes), kernels, fused)
    known = len(layers) == len(_kernel_calls(module["main"]))
    return dataclasses.replace(imported, module=module, layers=layers if known else ())


def _fold_constants(module: tvm.IRModule, imported: tvm.IRModule) -> tvm.IRModule:
    """TVM's folding, which runs kernels whose operands are all known: without those that were bound on import.

    Their parameters are flat views of the tensors that they are called with, which TVM does not run.
    """
    bound = {
        name.name_hint
        for name, function in imported.functions.items()
        if function.attrs is not None and function.attrs.get("op_pattern", None) == BOUND
    }
    others = tvm.IRModule(
        {name: f for name, f in module.functions.items() if name.name_hint not in bound}, attrs=module.attrs
    )
    folded = relax.transform.FoldConstant()(others)
    folded.update({name: f for name, f in module.functions.items() if name.name_hint in bound})
    return folded


def _origins(main: Any, nodes: Sequence[str]) -> dict[str, str]:
    """The layer of each variable. Those of an operator that was taken apart come before the one it was bound to."""
    found: dict[str, str] = {}
    unnamed: list[str] = []
    for block in main.body.blocks:
        for binding in block.bindings:
            match = NODE.match(binding.var.name)
            unnamed.append(binding.var.name)
            if match or TAG.match(binding.var.name):
                layer = nodes[int(match.group(1))] if match else ""
                found.update({name: layer for name in unnamed if name not in found})
                unnamed = []
    return found


def _layers(origins: Mapping[str, str], before: tvm.IRModule, fused: tvm.IRModule) -> tuple[str, ...]:
    """The layer of each call in the main function of `fused`: that of the last operator in it.

    A fused call has lost its name. The operators in it are taken to be the first ones with their kernels that no call
    before it has; equal groups follow each other in the order of the graph.
    """
    kept = {binding.var.name for binding, _ in _kernel_calls(fused["main"])}
    waiting: dict[str, list[str]] = {}
    for binding, kernel in _kernel_calls(before["main"]):
        if binding.var.name not in kept:
            waiting.setdefault(kernel, []).append(binding.var.name)
    layers = []
    for binding in _calls(fused["main"]):
        names = [binding.var.name]
        if isinstance(binding.value.op, tvm.ir.GlobalVar):
            inside = [kernel for _, kernel in _kernel_calls(fused[binding.value.op])]
            names = [waiting[kernel].pop(0) for kernel in inside if waiting.get(kernel)]
        elif binding.value.op.name != "relax.call_tir":
            continue
        layers.append(origins.get(names[-1], "") if names else "")
    return tuple(layers)


def _calls(function: Any) -> list[Any]:
    """The bindings of a Relax function that call something."""
    return [b for block in function.body.blocks for b in block.bindings if isinstance(b.value, relax.Call)]


def _kernel_calls(function: Any) -> list[tuple[Any, str]]:
    """The bindings of a Relax function that call kernels, with the kernel's name."""
    calls = [b for b in _calls(function) if getattr(b.value.op, "name", "") == "relax.call_tir"]
    return [(b, b.value.args[0].name_hint) for b in calls]


def _masks(exported: torch.export.ExportedProgram, annotations: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is kept of pruned weights, by the names of `_constants`."""
    signature = exported.graph_signature
    paths = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    records = sparsities(annotations)
    found = {name: records[path] for name, path in paths.items() if path in records}
    return {name: record.mask.numpy() for name, record in found.items() if record.density < 1}


def _half_sums(annotations: Mapping[str, Any]) -> bool:
    """Whether GPUs are to sum float16 in float16."""
    return getattr(annotations.get("cast-fp16"), "accumulate", "fp32") == "fp16"


def _constants(exported: torch.export.ExportedProgram) -> dict[str, np.ndarray]:
    """Weights by the name of the placeholder that torch.export lifted them to."""
    signature = exported.graph_signature
    table = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {name: exported.state_dict.get(path, exported.constants.get(path)) for name, path in table.items()}
    lifted = {name: exported.constants[path] for name, path in signature.inputs_to_lifted_tensor_constants.items()}
    return {k: v.detach().contiguous().numpy() for k, v in {**found, **lifted}.items() if isinstance(v, torch.Tensor)}
