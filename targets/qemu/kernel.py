"""Exact counts of one call of one kernel template, without a model around it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tvm

from edgec.targets.codegen import build_objects, c_calls, lower_kernels
from edgec.targets.device import Device
from edgec.targets.qemu.counter import Profile, link, profile_program

PREFIX = "kernel_"


def kernel_functions(profile: Profile) -> list[str]:
    """The kernel's own functions in what `profile_kernel` counted, most instructions first: one for each phase."""
    return [name for name in profile.by_symbol if name.startswith(PREFIX)]


def profile_kernel(spec: Any, device: Device, folder: Path) -> Profile:
    """What runs in one call of a kernel template on zeros; the program stays in `folder`.

    Raises EdgecError, ToolchainMissing.
    """
    symbol = f"{PREFIX}{spec.name}"
    function = spec.prim_func(device).with_attr("global_symbol", symbol)
    lowered = lower_kernels(tvm.IRModule({symbol: function}), device)
    sizes = [math.prod(int(e) for e in p.ty.shape) * p.ty.dtype.dtype.itemsize for p in function.params]
    sizes += lowered.scratch[symbol]
    arrays = "".join(f"static char a{i}[{max(1, n)}] __attribute__((aligned(64)));\n" for i, n in enumerate(sizes))
    declared, calls = c_calls(lowered, symbol, [f"a{i}" for i in range(len(sizes))])
    counted = f"__attribute__((noinline)) void counted(void) {{\n    {calls}\n}}\n"
    main = f"#include <stdint.h>\n{arrays}{declared}{counted}int main(void) {{\n    counted();\n    return 0;\n}}\n"
    (folder / "main.c").write_text(main)
    paths = []
    for name, data in build_objects(lowered, device).items():
        paths.append(folder / f"{name}.o")
        paths[-1].write_bytes(data)
    program = link([str(folder / "main.c"), *map(str, paths), "-lm"], device, folder / "kernel")
    return profile_program(program, "counted", device, folder)
