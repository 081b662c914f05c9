"""Exact counts of one call of one kernel template, without a model around it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tvm

from edgec.targets.codegen import build_objects, lower_kernels
from edgec.targets.device import Device
from edgec.targets.qemu.counter import Profile, link, profile_program


def kernel_symbol(spec: Any) -> str:
    """The name of a template's function in the program that `profile_kernel` makes."""
    return f"kernel_{spec.name}"


def profile_kernel(spec: Any, device: Device, folder: Path) -> Profile:
    """What runs in one call of a kernel template on zeros; the program stays in `folder`.

    Raises EdgecError, ToolchainMissing.
    """
    symbol = kernel_symbol(spec)
    function = spec.prim_func(device).with_attr("global_symbol", symbol)
    lowered = lower_kernels(tvm.IRModule({symbol: function}), device)
    sizes = [math.prod(int(e) for e in p.ty.shape) * p.ty.dtype.dtype.itemsize for p in function.params]
    sizes += lowered.scratch[symbol]
    arrays = "".join(f"static char a{i}[{max(1, n)}] __attribute__((aligned(64)));\n" for i, n in enumerate(sizes))
    types = ", ".join("void *" for _ in sizes)
    arguments = ", ".join(f"a{i}" for i in range(len(sizes)))
    main = f"{arrays}void {symbol}({types});\nint main(void) {{\n    {symbol}({arguments});\n    return 0;\n}}\n"
    (folder / "main.c").write_text(main)
    (folder / "kernel.o").write_bytes(build_objects(lowered, device)[symbol])
    program = link([str(folder / "main.c"), str(folder / "kernel.o"), "-lm"], device, folder / "kernel")
    return profile_program(program, symbol, device, folder)
