"""Torch graph to TVM: region operators become calls of our kernel templates, the rest goes through Relax.

The result is a Relax `main` made of `call_tir` bindings and reshapes only; `edgec.lowering.planner` reads it off.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from edgec.errors import EdgecError
from edgec.lowering.binding import RULES, Binding, bind
from edgec.lowering.legalize import convert_map
from edgec.targets.device import Device

# The relative order of a variable name survives every Relax pass used here, so a call finds its layer by name.
TAG = re.compile(r"^edgec_call_(\d+)")

# Same bytes in the same order: a name for memory, never a kernel.
VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")


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
    """`module`: Relax main over call_tir; `bindings`: our kernel calls by tag number."""

    module: tvm.IRModule
    bindings: dict[int, Binding]


def import_graph(exported: torch.export.ExportedProgram, device: Device) -> Imported:
    """Import a legalised ExportedProgram with static shapes.

    Raises EdgecError when TVM's importer fails; unsupported operators are reported earlier, by `legalize.unsupported`.
    """
    constants = _constants(exported)
    bindings: dict[int, Binding] = {}
    functions: dict[str, Any] = {}

    def convert(node: fx.Node, importer: Any) -> Any:
        binding = bind(node, constants)
        if binding is None:
            return importer.block_builder.emit(RELAX[node.target](node, importer))
        number = len(bindings)
        bindings[number] = binding
        key = binding.spec.key()
        if key not in functions:
            function = binding.spec.prim_func(device).with_attr("op_pattern", 8)
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
    table.update({target._schema.name.split("::")[1] + "." + target._overloadname: convert for target in RULES})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = from_exported_program(exported, run_ep_decomposition=False, custom_convert_map=table)
    except EdgecError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EdgecError(f"TVM's importer refused the graph: {lines[-1].strip()}", where="import") from error
    return Imported(module, bindings)


def bindings_of(exported: torch.export.ExportedProgram) -> list[Binding]:
    """The calls of our kernel templates that `import_graph` makes of a graph, in its order."""
    constants = _constants(exported)
    found = (bind(node, constants) for node in exported.graph.nodes)
    return [binding for binding in found if binding is not None]


def legalize_relax(module: tvm.IRModule, device: Device) -> tvm.IRModule:
    """Turn Relax operators into TIR kernels, fuse element-wise chains and fold constants."""
    transform = relax.transform
    with tvm.target.Target(device.llvm_target()):
        return tvm.ir.transform.Sequential(
            [
                transform.DecomposeOpsForInference(),
                transform.CanonicalizeBindings(),
                transform.LegalizeOps(skip_ops=list(VIEWS)),
                transform.AnnotateTIROpPattern(),
                transform.FoldConstant(),
                transform.FuseOps(),
                transform.FuseTIR(),
                transform.DeadCodeElimination(["main"]),
            ]
        )(module)


def _constants(exported: torch.export.ExportedProgram) -> dict[str, np.ndarray]:
    """Weights by the name of the placeholder that torch.export lifted them to."""
    signature = exported.graph_signature
    table = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {name: exported.state_dict.get(path, exported.constants.get(path)) for name, path in table.items()}
    lifted = {name: exported.constants[path] for name, path in signature.inputs_to_lifted_tensor_constants.items()}
    return {k: v.detach().contiguous().numpy() for k, v in {**found, **lifted}.items() if isinstance(v, torch.Tensor)}
