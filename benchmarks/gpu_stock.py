"""Networks as TVM compiles them for a GPU without us: its operators, its fusion, dlight's default schedules."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.frontend.torch import from_exported_program
from tvm.s_tir import dlight

from edgec.errors import EdgecError
from edgec.plan import PlanBuilder
from edgec.program import Program
from edgec.targets.device import load_device
from edgec.targets.gpu import document
from edgec.targets.gpu.lower import lower_to_gpu
from edgec.targets.gpu.opencl import OpenCLRunner

# dlight has two sets of sizes for products, one of them for Adreno. Its groups have up to 256 work items.
DEVICES = {"mali": "mali-g78", "adreno": "adreno-640"}
ALIGN = 256
# What TVM calls a convolution with groups.
GROUPED = "group_conv2d"
PAD = "pad"
# TVM's OpPatternKind of what is not fused.
OPAQUE = 8
RULES = ("Matmul", "GEMV", "Reduction", "GeneralReduction")


def network(program: Program, recipe: str = "mali", *, profile: bool = False) -> OpenCLRunner:
    """The runner of a float32 program with a batch of one, on the first OpenCL device. recipe: of DEVICES.

    Convolutions with groups go to dlight's Fallback. Raises EdgecError for what is more than calls of kernels.
    """
    device = load_device(DEVICES[recipe])
    module = from_exported_program(_static(program))
    module = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            _pads_alone,
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )(module)
    main = module["main"]
    kernels = {v.name_hint: f for v, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    rules = [getattr(dlight.gpu, name)() for name in RULES]
    plain = {name: f for name, f in kernels.items() if GROUPED not in f.script()}
    target = tvm.target.Target({**device.tvm_target(), "device": recipe}).with_host(tvm.target.Target("c"))
    with target:
        apply: Any = dlight.ApplyDefaultSchedule(*rules)
        scheduled = apply(tvm.IRModule(plain))
    # What no rule took, and what has groups, gets Fallback there.
    ready = {name: scheduled[name] if name in plain else kernels[name] for name in kernels}
    lowered = lower_to_gpu(tvm.IRModule(ready), device)
    plan = _plan(main, lowered.scratch)
    described = document.describe(plan, lowered, device)
    return OpenCLRunner(described, document.program(lowered), document.weights(plan), profile=profile)


@tvm.transform.module_pass(opt_level=0)
def _pads_alone(module: Any, _context: Any) -> Any:
    """Padding as kernels of their own: dlight's rule for products raises an AssertionError where one is fused behind a
    convolution, as in networks with the asymmetric padding of TensorFlow."""
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and PAD in name.name_hint:
            module.update_func(name, function.with_attr("op_pattern", OPAQUE))
    return module


def _static(program: Program) -> Any:
    """The program with a batch of one, in operators that TVM's importer knows."""
    import torch

    example = tuple(torch.zeros(1, *tuple(spec.shape)[1:]) for spec in program.inputs)
    return torch.export.export(program.edit(), example).run_decompositions()


def _plan(main: Any, scratch: Any) -> Any:
    """The calls of a Relax function as a plan."""
    builder = PlanBuilder("stock", ALIGN)
    names: dict[Any, Any] = {}
    for p in main.params:
        names[p] = builder.add_input(p.name, *_typed(p))
    for block in main.body.blocks:
        for binding in block.bindings:
            value: Any = binding.value
            if not isinstance(value, relax.Call):
                names[binding.var] = _operand(value, names, builder)
                continue
            if getattr(value.op, "name", "") != "relax.call_tir":
                raise EdgecError(f"cannot be planned: {value}", where="stock")
            operands = [_operand(a, names, builder) for a in value.args[1].fields]
            result = builder.add_temp(*_typed(binding.var))
            symbol = value.args[0].name_hint
            builder.add_step(symbol, [*operands, result], layer=symbol, scratch=scratch[symbol])
            names[binding.var] = result
    found = _operand(main.body.body, names, builder)
    several = isinstance(found, tuple)
    types = main.body.body.ty.fields if several else [main.body.body.ty]
    for number, (buffer, each) in enumerate(zip(found if several else [found], types, strict=True)):
        builder.add_output(f"y{number}", buffer, *_tensor(each))
    return builder.finish()


def _operand(value: Any, names: Any, builder: PlanBuilder) -> Any:
    """The buffer or constant behind a Relax expression, a tuple of them for a tuple."""
    if isinstance(value, relax.Var):
        return names[value]
    if isinstance(value, relax.Tuple):
        return tuple(_operand(f, names, builder) for f in value.fields)
    if isinstance(value, relax.TupleGetItem):
        return _operand(value.tuple_value, names, builder)[value.index]
    if hasattr(value, "value") and hasattr(value.value, "numpy"):
        return builder.add_constant(value.value.numpy())
    raise EdgecError(f"cannot be planned: {value}", where="stock")


def _typed(var: Any) -> tuple[list[int], str]:
    """Shape and dtype of a Relax variable."""
    return _tensor(var.ty)


def _tensor(typed: Any) -> tuple[list[int], str]:
    """Shape and dtype of a Relax type."""
    return [int(n) for n in typed.shape.values], str(typed.dtype)
