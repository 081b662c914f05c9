"""Small models with kernels written in C by hand, which stand for the code generator's: no torch and no TVM needed."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgec.bundle import Bundle, assemble
from edgec.plan import Plan, PlanBuilder
from edgec.targets.cpu.emit import SelfTest
from edgec.targets.device import Device, load_device

# The parameters in order: inputs, constants, output, scratch. `FAULT` is filled in by tests that want a kernel to fail.
SOURCE = """
#include <stdint.h>
#include <string.h>
void NAME_dense(const float *x, const float *w, const float *b, float *y, float *scratch) {
  for (int o = 0; o < 6; o++) {
    memcpy(scratch, x, 4 * sizeof(float));
    float sum = b[o];
    for (int i = 0; i < 4; i++) sum += scratch[i] * w[o * 4 + i];
    y[o] = sum;
  }
  FAULT;
}
void NAME_relu(const float *x, float *y) {
  for (int i = 0; i < 6; i++) y[i] = x[i] > 0 ? x[i] : 0;
}
void NAME_shift(const float *x, const int64_t *by, float *y, int32_t *index) {
  for (int i = 0; i < 6; i++) {
    y[i] = x[(i + by[0]) % 6];
    index[i] = (int32_t)((i + by[0]) % 6);
  }
}
"""


@dataclass(frozen=True)
class Kernels:
    """What the emitter reads of `LoweredKernels`."""

    signature: Mapping[str, tuple[str, ...]]
    readonly: Mapping[str, frozenset[int]]
    phases: Mapping[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True)
class Model:
    """plan, kernels and source of a hand-made model; `reference` computes its outputs for one run."""

    plan: Plan
    kernels: Kernels
    source: str
    inputs: tuple[np.ndarray, ...]
    reference: Callable[..., tuple[np.ndarray, ...]]

    def selftest(self, tolerance: float = 1e-6) -> SelfTest:
        return SelfTest(self.inputs, self.reference(*self.inputs), tolerance)


def _weights(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Other weights for every name."""
    rng = np.random.default_rng(sum(name.encode()))
    return rng.standard_normal((6, 4)).astype(np.float32), rng.standard_normal(6).astype(np.float32)


def dense_model(name: str = "net", fault: str = "(void)0", ports: tuple[str, str] = ("x", "y")) -> Model:
    """relu(w x + b): one input [1, 4], one output [1, 6], scratch memory and a relu in place."""
    w, b = _weights(name)
    builder = PlanBuilder(name)
    x = builder.add_input(ports[0], (1, 4), "float32")
    hidden, active, y = (builder.add_temp((1, 6), "float32") for _ in range(3))
    constants = [builder.add_constant(w), builder.add_constant(b)]
    builder.add_step(f"{name}_dense", [x, *constants, hidden], layer="fc", op="dense", macs=24, scratch=[16])
    builder.add_step(f"{name}_relu", [hidden, active], layer="act", inplace=(0,))
    builder.add_step(f"{name}_relu", [active, y], layer="again")
    builder.add_output(ports[1], y, (1, 6), "float32")

    def reference(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.maximum(x @ w.T + b, 0),)

    example = np.linspace(-1, 1, 4, dtype=np.float32)[None]
    return Model(builder.finish(), _kernels(name), _source(name, fault), (example,), reference)


def shift_model(name: str = "shift") -> Model:
    """Inputs x [1, 6] and by int64[1]; outputs the rotated x, its indices (int32) and x itself."""
    builder = PlanBuilder(name)
    x = builder.add_input("x", (1, 6), "float32")
    by = builder.add_input("by", (1,), "int64")
    y, index = builder.add_temp((1, 6), "float32"), builder.add_temp((1, 6), "int32")
    builder.add_step(f"{name}_shift", [x, by, y, index], outputs=2)
    builder.add_output("y", y, (1, 6), "float32")
    builder.add_output("index", index, (1, 6), "int32")
    builder.add_output("x", builder.alias(x, (6,)), (6,), "float32")

    def reference(x: np.ndarray, by: np.ndarray) -> tuple[np.ndarray, ...]:
        index = (np.arange(6, dtype=np.int32)[None] + by[:, None]) % 6
        return np.take_along_axis(x, index, 1), index.astype(np.int32), x.reshape(-1)

    inputs = (np.arange(6, dtype=np.float32)[None], np.array([2]))
    return Model(builder.finish(), _kernels(name), _source(name), inputs, reference)


def _kernels(name: str) -> Kernels:
    f = "float32"
    table = {
        "dense": ((f, f, f, f, f), {0, 1, 2}),
        "relu": ((f, f), {0}),
        "shift": ((f, "int64", f, "int32"), {0, 1}),
    }
    return Kernels(
        {f"{name}_{k}": types for k, (types, _) in table.items()},
        {f"{name}_{k}": frozenset(constant) for k, (_, constant) in table.items()},
        {f"{name}_{k}": ((f"{name}_{k}", 0),) for k in table},
    )


def _source(name: str, fault: str = "(void)0") -> str:
    return SOURCE.replace("NAME", name).replace("FAULT", fault)


@functools.cache
def compile_kernels(source: str, device: Device) -> bytes:
    """The object file of C source."""
    with tempfile.TemporaryDirectory(prefix="edgec-hand-") as folder:
        (Path(folder) / "kernels.c").write_text(source)
        command = [device.cc, *device.cflags, "-O1", "-fPIC", "-c", "kernels.c", "-o", "kernels.o"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return (Path(folder) / "kernels.o").read_bytes()


def build(model: Model, folder: Path, device: Device | None = None, **options: Any) -> Bundle:
    """The bundle of a hand-made model in `folder`, with its self-test unless `selftest` is given."""
    device = device or load_device("host")
    options.setdefault("selftest", model.selftest())
    return assemble(model.plan, model.kernels, [compile_kernels(model.source, device)], device, folder, **options)


# Compiled for each of these, and run there.
DEVICES = [
    pytest.param("host", marks=pytest.mark.host),
    pytest.param("cortex-a72", marks=pytest.mark.qemu("cortex-a72")),
    pytest.param("cortex-a7", marks=pytest.mark.qemu("cortex-a7")),
]
