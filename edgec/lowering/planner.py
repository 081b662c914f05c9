"""Read the Relax `main` off into a Plan, and lower the kernels it calls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import relax, tirx

from edgec.errors import EdgecError
from edgec.lowering.binding import Binding
from edgec.lowering.importer import TAG, VIEWS, Imported
from edgec.passbase import Skip
from edgec.plan import ALIGN, Form, Plan, PlanBuilder
from edgec.program import Program
from edgec.targets.codegen import LoweredKernels, lower_kernels
from edgec.targets.device import Device
from edgec.targets.gpu.lower import LoweredGpu, lower_to_gpu
from edgec.targets.kernels.device_kernel import DeviceKernel
from edgec.targets.mcu.lower import LoweredC, lower_to_c

# Words of a microcontroller are aligned; nothing gains from more.
MCU_ALIGN = 8
# Buffers of a GPU begin where any device allows: most OpenCL devices ask for 128 bytes, Vulkan for up to 256.
GPU_ALIGN = 256
Lowerings = LoweredKernels | LoweredC | LoweredGpu


def make_plan(
    program: Program, forms: Mapping[str, Form], imported: Imported, device: Device
) -> tuple[Plan, Lowerings, list[Skip]]:
    """(plan, kernels, fallbacks). `imported.module` is legalised: `main` calls TIR and makes views, nothing else.

    forms: of inputs and outputs, by name.
    """
    module = imported.module
    prefix = symbol_prefix(program.name)
    renamed = {
        var.name_hint: function for var, function in module.functions.items() if isinstance(function, tirx.PrimFunc)
    }
    lower = lower_to_c if device.is_mcu else lower_to_gpu if device.is_gpu else lower_kernels
    kernels = lower(tvm.IRModule({f"{prefix}_{n}": f for n, f in renamed.items()}), device)
    align = MCU_ALIGN if device.is_mcu else GPU_ALIGN if device.is_gpu else ALIGN
    reader = _Reader(program, forms, imported, kernels, prefix, align, device)
    plan = reader.read(module["main"])
    return plan, kernels, reader.fallbacks


def symbol_prefix(name: str) -> str:
    """A C identifier from a model's name."""
    cleaned = re.sub(r"[^0-9A-Za-z_]", "_", name)
    return cleaned if cleaned[:1].isalpha() else f"m_{cleaned}"


class _Reader:
    """Walks the bindings of `main` in order."""

    def __init__(
        self,
        program: Program,
        forms: Mapping[str, Form],
        imported: Imported,
        kernels: Lowerings,
        prefix: str,
        align: int,
        device: Device,
    ) -> None:
        self.program = program
        self.forms = forms
        self.imported = imported
        self.kernels = kernels
        self.prefix = prefix
        self.device = device
        self.builder = PlanBuilder(symbol_prefix(program.name), align)
        # Relax variable names are not unique: the objects are the keys.
        self.names: dict[Any, Any] = {}
        self.fallbacks: list[Skip] = []
        self.layers = iter(imported.layers)
        # Operators of TVM's library that the target has written kernels for.
        self.written = kernels.chains if isinstance(kernels, LoweredGpu) else frozenset[str]()

    def read(self, main: Any) -> Plan:
        for spec, variable in zip(self.program.inputs, main.params, strict=True):
            self.names[variable] = self.builder.add_input(spec.name, spec.shape, spec.dtype, self.forms.get(spec.name))
        for block in main.body.blocks:
            for binding in block.bindings:
                self.names[binding.var] = self._value(binding.var, binding.value)
        result = self._operand(main.body.body)
        results = result if isinstance(result, tuple) else (result,)
        for spec, buffer in zip(self.program.outputs, results, strict=True):
            self.builder.add_output(spec.name, buffer, spec.shape, spec.dtype, self.forms.get(spec.name))
        return self.builder.finish()

    def _operand(self, value: Any) -> Any:
        """The buffer or constant (a tuple of them for a tuple) behind a Relax expression."""
        if isinstance(value, relax.Var):
            return self.names[value]
        if isinstance(value, relax.Tuple):
            return tuple(self._operand(f) for f in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._operand(value.tuple_value)[value.index]
        if hasattr(value, "value") and hasattr(value.value, "numpy"):
            return self.builder.add_constant(value.value.numpy())
        raise EdgecError(f"cannot plan {type(value).__name__}", where=self.program.name)

    def _value(self, variable: Any, value: Any) -> Any:
        if not isinstance(value, relax.Call):
            return self._operand(value)
        operator = getattr(value.op, "name", "")
        if operator in VIEWS:
            return self.builder.alias(self._operand(value.args[0]), _shape(variable.ty))
        if operator != "relax.call_tir":
            raise EdgecError(
                f"operator {operator} was not lowered", where=self.program.name, hint="this is a bug in edgec"
            )
        return self._call(variable, value)

    def _call(self, variable: Any, call: Any) -> Any:
        kernel = call.args[0].name_hint
        symbol = f"{self.prefix}_{kernel}"
        arguments = [self._operand(a) for a in call.args[1].fields]
        out_type = call.ty_args[0]
        tuple_out = isinstance(out_type, tvm.ir.TupleType)
        types = list(out_type.fields) if tuple_out else [out_type]
        outputs = [self.builder.add_temp(_shape(t), str(t.dtype)) for t in types]
        match = TAG.match(variable.name)
        ours = self.imported.bindings.get(int(match.group(1))) if match else None
        layer = next(self.layers, "")
        if ours is not None:
            layer = ours.layer
            if ours.dense:
                self.fallbacks.append(Skip(layer, "zeros multiplied", ours.dense))
            if not self._tuned(ours):
                self.fallbacks.append(Skip(layer, "untuned kernel", f"no kernel of the target's own for {ours.symbol}"))
        elif symbol not in self.written:
            operator = kernel.rstrip("0123456789")
            self.fallbacks.append(Skip(layer or kernel, "untuned kernel", f"no template for {operator}"))
        self.builder.add_step(
            symbol,
            [*arguments, *outputs],
            layer=layer,
            op=ours.symbol if ours else kernel,
            macs=ours.spec.macs if ours else 0,
            tuned=symbol in self.written if ours is None else self._tuned(ours),
            inplace=self._inplace(ours.spec) if ours else (),
            scratch=self.kernels.scratch[symbol],
            outputs=len(outputs),
            origin=ours.origin if ours else "",
        )
        return tuple(outputs) if tuple_out else outputs[0]

    def _inplace(self, spec: Any) -> tuple[int, ...]:
        """Operands whose memory the result may take. Vulkan does not let one dispatch read and write one buffer, and
        templates written as OpenCL C promise the compiler that it does not happen."""
        own = not self.device.is_gpu or (self.device.api == "opencl" and isinstance(spec, DeviceKernel))
        return spec.inplace if own else ()

    def _tuned(self, ours: Binding) -> bool:
        """Whether a template runs as it is written for: those of CPUs run elsewhere too, but not fast."""
        return isinstance(ours.spec, DeviceKernel) or not (self.device.is_mcu or self.device.is_gpu)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in value.shape.values)
