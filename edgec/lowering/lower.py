"""The lowering: Program -> Lowered (Plan + TIR kernels), one readable line of named steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from edgec.errors import EdgecError
from edgec.lowering import STEPS as STEPS
from edgec.lowering.binding import Binding
from edgec.lowering.device_io import device_io
from edgec.lowering.importer import Imported, bindings_of, import_graph, legalize_relax
from edgec.lowering.layout import channels_last
from edgec.lowering.legalize import legalize, unsupported
from edgec.lowering.planner import make_plan
from edgec.lowering.regions import fuse_regions
from edgec.passbase import Skip
from edgec.plan import Form, Plan
from edgec.program import Program, origin_of, propagate
from edgec.targets.codegen import LoweredKernels
from edgec.targets.device import Device
from edgec.targets.gpu.lower import LoweredGpu
from edgec.targets.kernels.conv2d import Blocking
from edgec.targets.mcu.lower import LoweredC


@dataclass(frozen=True)
class Lowered:
    """What a target needs to emit code.

    plan: calls, constants and arena. kernels: TIR, ready for LLVM, C for a microcontroller, or a GPU's launches.
    fallbacks: what runs on an untuned kernel, and why.
    tiles: by `tuning_key`, the register tiles that came from the device's tuning table.
    """

    plan: Plan
    kernels: LoweredKernels | LoweredC | LoweredGpu
    fallbacks: tuple[Skip, ...]
    tiles: Mapping[str, Blocking] = field(default_factory=dict)


# Takes a step and what makes its text: printing all kernels takes a tenth of the time of lowering.
Show = Callable[[str, Callable[[], str]], None]


def _silent(step: str, text: Callable[[], str]) -> None:
    pass


def lower(program: Program, device: Device, *, dump: Callable[[str, str], None] | None = None) -> Lowered:
    """Lower `program` for `device` with a batch of one.

    `dump(step, text)` receives the text form after each of STEPS. Raises EdgecError naming every operator that cannot
    be compiled, with its layer.
    """
    show = (lambda step, text: dump(step, text())) if dump else _silent
    return lower_staged(*stage(program, device, show), device, show)


def stage(program: Program, device: Device, show: Show = _silent) -> tuple[Program, dict[str, Form]]:
    """The first half of `lower`: (graph of region operators, forms of its inputs and outputs on the device)."""
    staged = lower_torch(program, show)
    return device_io(staged) if device.is_mcu else (staged, {})


def lower_staged(
    staged: Program,
    forms: Mapping[str, Form],
    device: Device,
    show: Show = _silent,
) -> Lowered:
    """The second half of `lower`: of a graph of region operators, whose inputs and outputs have these forms."""
    imported = import_graph(_legalized(staged, show), device, staged.annotations)
    show("import", imported.module.script)
    try:
        return _finish(staged, forms, legalize_relax(imported, device), device, show)
    except (EdgecError, AssertionError):
        raise
    except Exception as error:
        # TVM's own errors: of what no check here knows.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise EdgecError(
            f"TVM does not lower the graph: {type(error).__name__}: {lines[-1]}",
            where=staged.name,
            hint="report this as an error of edgec, with the model; edgec compile --dump shows the steps before",
        ) from error


def kernel_bindings(program: Program, device: Device | None = None) -> list[Binding]:
    """The calls of our kernel templates that `lower` makes for a device. Raises EdgecError as `lower` does.

    Without one, those of any device: pruned layers are bound to dense kernels.
    """
    return bindings_of(_legalized(lower_torch(program)), device, program.annotations)


def _legalized(staged: Program, show: Show = _silent) -> torch.export.ExportedProgram:
    """The graph of operators that have a kernel or a converter. Raises EdgecError when one has neither."""
    exported = legalize(staged.export())
    show("legalize", lambda: str(exported.graph))
    missing = unsupported(exported)
    if missing:
        raise EdgecError(
            "unsupported operators: " + ", ".join(str(m) for m in missing),
            where=staged.name,
            hint="rewrite these operations in the model or register a converter",
        )
    return exported


def lower_torch(program: Program, show: Show = _silent) -> Program:
    """The torch half of the lowering: static batch of one, fused regions, channels-last layout."""
    inputs = program.batch_inputs(1)
    module = program.edit()
    propagate(module, inputs)
    for node in module.graph.nodes:
        node.meta["edgec_origin"] = origin_of(node)
    staged = dataclasses.replace(program, module=module, example_inputs=inputs, dynamic_batch=False)
    for step, rewrite in (("regions", fuse_regions), ("layout", channels_last)):
        rewrite(module)
        propagate(module, inputs)
        show(step, staged.text)
    return staged


def _finish(staged: Program, forms: Mapping[str, Form], imported: Imported, device: Device, show: Show) -> Lowered:
    plan, kernels, fallbacks = make_plan(staged, forms, imported, device)
    show("kernels", lambda: str(kernels.module))
    show("plan", plan.text)
    keys = {getattr(binding.spec, "tuning_key", None) for binding in imported.bindings.values()}
    tiles = {key: tile for key, tile in sorted(device.tuning.items()) if key in keys}
    return Lowered(plan, kernels, tuple(fallbacks), tiles)


def max_relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|, the measure of the import check."""
    scale = want.abs().max().item()
    return (got - want).abs().max().item() / (scale if scale > 0 else 1.0)
