"""Models with kernels written by hand in OpenCL C and WGSL: no torch, no TVM, and compiled in no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edgec.plan import Plan, PlanBuilder
from edgec.targets.cpu.emit import SelfTest
from edgec.targets.device import Device
from edgec.targets.gpu.emit import emit
from edgec.targets.gpu.kernels.base import Launch
from edgec.targets.gpu.lower import LoweredGpu

SIZE = 12
WEIGHT = np.arange(1, SIZE + 1, dtype=np.float32)

OPENCL = """\
__kernel void NAME(__global const float *a, __global const float *b, __global float *y) {
  const int i = get_global_id(0);
  if (i < 12) y[i] = EXPRESSION;
}
"""
WGSL = """\
@group(0) @binding(0) var<storage, read> a : array<f32>;
@group(0) @binding(1) var<storage, read> b : array<f32>;
@group(0) @binding(2) var<storage, read_write> y : array<f32>;
@compute @workgroup_size(GROUP, 1, 1)
fn NAME(@builtin(global_invocation_id) id : vec3<u32>) {
  let i = i32(id.x);
  if (i < 12) { y[i] = EXPRESSION; }
}
"""


def kernel(api: str, name: str, expression: str, arguments: tuple[int, int, int], group: int = 4) -> Launch:
    """y[i] = expression of a[i] and b[i], for SIZE elements."""
    text = (OPENCL if api == "opencl" else WGSL).replace("NAME", name).replace("EXPRESSION", expression)
    text = text.replace("GROUP", str(group))
    return Launch(name, text, arguments, (-(-SIZE // group), 1, 1), (group, 1, 1))


def model(api: str) -> tuple[Plan, LoweredGpu]:
    """y = (x * w + x) * (x * w), and x itself: two outputs, scratch memory, and two ways to multiply."""
    builder = PlanBuilder("net", 256)
    x = builder.add_input("x", (3, 4), "float32")
    w = builder.add_constant(WEIGHT)
    product, total, result = (builder.add_temp((3, 4), "float32") for _ in range(3))
    builder.add_step("net_scale", [x, w, product], layer="first", macs=SIZE)
    builder.add_step("net_sum", [product, x, total], layer="second")
    builder.add_step("net_join", [total, product, result], layer="third", scratch=[4 * SIZE])
    builder.add_output("y", result, (3, 4), "float32")
    builder.add_output("same", x, (3, 4), "float32")
    variants = {
        "net_scale": (
            (kernel(api, "scale", "a[i] * b[i]", (0, 1, 2)),),
            (kernel(api, "turn", "b[i] * a[i]", (0, 1, 2), 2),),
        ),
        "net_sum": ((kernel(api, "add", "a[i] + b[i]", (1, 0, 2)),),),
        # Operands 0 and 1, output 2, scratch 3.
        "net_join": (
            (kernel(api, "copy", "a[i] + 0.0f * b[i]", (0, 1, 3)), kernel(api, "join", "a[i] * b[i]", (3, 1, 2))),
        ),
    }
    signature = dict.fromkeys(variants, ("float32",) * 3)
    scratch = {"net_scale": (), "net_sum": (), "net_join": (4 * SIZE,)}
    return builder.finish(), LoweredGpu(variants, signature, scratch)


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    product = x * WEIGHT.reshape(x.shape)
    return (product + x) * product, x


def sample(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 4)).astype(np.float32)


def written(folder: Path, device: Device, plan: Plan, kernels: LoweredGpu, tolerance: float = 1e-6) -> Path:
    """The files of a bundle, without its manifest, and with a self-test."""
    x = sample(9)
    for place, data in emit(plan, kernels, device, SelfTest([x], reference(x), tolerance), "0").items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    return folder


def changed(kernels: LoweredGpu, symbol: str, **fields: object) -> LoweredGpu:
    """The kernels with other fields in the only launch of a symbol."""
    ((launch,),) = kernels.variants[symbol]
    return replace(kernels, variants={**kernels.variants, symbol: ((replace(launch, **fields),),)})  # type: ignore[arg-type]
