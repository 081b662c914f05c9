"""Single microcontroller kernels beside convolution, as a table: exact instructions per product or per element.

    python -m benchmarks.mcu_kernels [--target cortex-m4 ...] [--portable]

One call of each kernel on random operands on QEMU's board for the core, checked bit for bit. Depthwise convolutions
count per multiplication, pools per element of a window, the others per element of the result. `--portable` leaves out
what is written for an instruction set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import typer

from edgec import integer
from edgec.targets.device import load_device
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean, Requant
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.mcu.kernels import implement
from edgec.targets.mcu.kernels.layout import concatenated, repeated
from tests.targets.mcu_runner import Case, run_cases_on_device

CORES = ("cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55", "cortex-m3", "cortex-m0plus", "rv32imc")
PLAIN = (-128, 127)
ELEMENTS = (8, 8, 64)


@dataclass(frozen=True)
class Row:
    """A kernel call. work: what its instructions are divided by. spec: a template, or a kernel without one."""

    name: str
    spec: Any
    operands: list[np.ndarray]
    expected: np.ndarray
    work: int
    weights: dict[str, np.ndarray] | None = None

    def case(self, core: str) -> Case:
        kernel = self.spec
        if not hasattr(kernel, "call"):
            kernel = implement(self.spec, self.weights or {}, load_device(core))
            assert kernel is not None, self.name
        return Case(kernel, self.operands, self.weights or {}, 1 if self.weights else None)


def _codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def depthwise(name: str, h: int, w: int, c: int, shift: int = 32, **geometry: Any) -> Row:
    """shift: 32, or another one for the general rounding."""
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1, 1, 1), **geometry}
    spec = Depthwise(h, w, c, dtype="int8", x_zp=-128, epilogue=Epilogue(y_zp=-7, lo=-128, hi=127), **fields)
    weights = {
        "w": rng.integers(-127, 128, (c, 1, *spec.kernel)).astype(np.int8),
        "bias": rng.integers(-(2**15), 2**15, c).astype(np.int32),
        "m": rng.integers(2**21, 2**24, c).astype(np.int32),
        "shift": np.full(c, shift, np.int32),
    }
    x = _codes(rng, h, w, c)
    return Row(f"depthwise {name}", spec, [x], spec.reference(x, **weights), spec.macs, weights)


def pool(name: str, spec: AvgPool | MaxPool) -> Row:
    if isinstance(spec, AvgPool):
        m, shift = integer.quantize_multiplier(0.9 / spec.taps)
        spec = replace(spec, requant=Requant(m, shift, -128, -100, *PLAIN))
    x = _codes(np.random.default_rng(0), spec.h, spec.w, spec.c)
    expected = spec.reference(x)
    return Row(name, spec, [x], expected, expected.size * spec.taps)


def rows() -> Iterator[Row]:
    yield depthwise("3x3, 64, 25x5", 25, 5, 64)
    yield depthwise("3x3, 64, 48x48", 48, 48, 64)
    yield depthwise("3x3, 8, 48x48", 48, 48, 8)
    yield depthwise("3x3, 16, 48x48, stride 2", 48, 48, 16, stride=(2, 2))
    yield depthwise("3x3, 256, 3x3", 3, 3, 256)
    yield depthwise("3x3, 30, 12x12", 12, 12, 30)
    yield depthwise("5x5, 32, 24x24", 24, 24, 32, kernel=(5, 5), padding=(2, 2, 2, 2))
    yield depthwise("9x1, 64, 49x1", 49, 1, 64, kernel=(9, 1), padding=(4, 4, 0, 0))
    yield depthwise("3x3, 64, 25x5, any multiplier", 25, 5, 64, shift=31)
    rng = np.random.default_rng(0)
    n = int(np.prod(ELEMENTS))
    a, b, channels, numbers = _codes(rng, *ELEMENTS), _codes(rng, *ELEMENTS), _codes(rng, 64), rng.standard_normal(n)
    numbers = (3 * numbers).astype(np.float32)
    add = (*integer.add_parameters(0.0231, 0.0117, 0.0262), 3, -11, -5, *PLAIN)
    for name, other in (("add", b), ("add, per channel", channels)):
        yield Row(name, QAdd(a.shape, other.shape, AddEpilogue(*add)), [a, other], integer.qadd(a, other, *add), n)
    m, shift = integer.quantize_multiplier(0.003)
    for name, other in (("mul", b), ("mul, per channel", channels)):
        spec = QMul(a.shape, other.shape, m, shift, 3, 4, 5, *PLAIN)
        yield Row(name, spec, [a, other], spec.reference(a, other), n)
    m, shift = integer.quantize_multiplier(0.73)
    spec = QRescale(a.shape, m, shift, 3, 4, *PLAIN)
    yield Row("rescale", spec, [a], spec.reference(a), n)
    table = _codes(rng, 256)
    yield Row("table", QLut(a.shape, False, 0), [a], integer.qlut(a, table, 0), n, {"table": table})
    yield Row("quantize", Quantize((n,), 0.02, 3), [numbers], integer.quantize(numbers, 0.02, 3), n)
    yield Row("dequantize", Dequantize(a.shape, 0.02, 3), [a], integer.dequantize(a, 0.02, 3), n)
    yield pool("mean, 64, 25x5", Mean(1, 125, 64, "int8"))
    yield pool("average 2x2, 32, 16x16", AvgPool(16, 16, 32, (2, 2), (2, 2), dtype="int8"))
    yield pool("maximum 2x2, 32, 16x16", MaxPool(16, 16, 32, (2, 2), (2, 2), dtype="int8"))
    yield pool("maximum 3x3, 30, 15x15", MaxPool(15, 15, 30, (3, 3), (2, 2), (1, 1, 1, 1), dtype="int8"))
    image = _codes(rng, 3, 32, 32)
    order = Transpose(image.shape, (1, 2, 0), "int8")
    yield Row("transpose to NHWC", order, [image], order.reference(image), image.size)
    small, large = (8, 1, 8, 1, 16), (8, 2, 8, 2, 16)
    x = _codes(rng, *small)
    up = np.broadcast_to(x, large)
    yield Row("upsample 2x2, 16 channels", repeated(small, large), [x], up, up.size)
    both = np.concatenate([a, b], 2)
    yield Row("concatenate, 64 and 64", concatenated([a.shape, b.shape], 2), [a, b], both, both.size)


def main(
    target: Annotated[list[str] | None, typer.Option(help="Core; repeat for several.")] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Portable C only.")] = False,
) -> None:
    """Instructions of single microcontroller kernels beside convolution."""
    cores, table = target or list(CORES), list(rows())
    counts: dict[str, list[float]] = {}
    for core in cores:
        cases = [row.case(core) for row in table]
        flags = ("-DEK_PORTABLE",) if portable else ()
        results = run_cases_on_device(cases, load_device(core), flags)
        for row, (found, instructions) in zip(table, results, strict=True):
            np.testing.assert_array_equal(found, row.expected.reshape(-1), err_msg=f"{row.name} on {core}")
            counts.setdefault(row.name, []).append(instructions / row.work)
    print(f"| kernel | {' | '.join(cores)} |\n|---|{'---|' * len(cores)}")
    for name, values in counts.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(main)
