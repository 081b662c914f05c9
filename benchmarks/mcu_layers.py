"""Instructions per multiplication of convolution kernels on microcontroller cores under QEMU, layer by layer.

python -m benchmarks.mcu_layers [--cores cortex-m4,cortex-m7] [--layers resnet8,vww] [--bits 4]; results are checked.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.timing import markdown
from edgec.errors import EdgecError
from edgec.integer import multipliers
from edgec.targets.device import load_device
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.mcu.kernels import implement

# A rectified result, one that is not, and one with a residual.
RELU, LINEAR = Epilogue(lo=-128, hi=127, y_zp=-128), Epilogue(lo=-128, hi=127, y_zp=5)
SUM = Epilogue(lo=-128, hi=127, y_zp=5, add=AddEpilogue(150000, 200000, 18, 5, -128, -128, -128, 127))
SAME, HALF, NONE = (1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0)


def conv(
    size: tuple[int, int],
    ci: int,
    co: int,
    kernel: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: tuple[int, int, int, int] = SAME,
    epilogue: Epilogue = RELU,
) -> Conv2D:
    return Conv2D(*size, ci, co, kernel, (stride, stride), padding, dtype="int8", x_zp=-3, epilogue=epilogue)


def product(rows: int, ci: int, co: int, epilogue: Epilogue = RELU) -> Conv2D:
    return Conv2D(1, rows, ci, co, dtype="int8", x_zp=-3, epilogue=epilogue)


# The convolutions of MLPerf Tiny's models, each shape once with how often it occurs.
MODELS: dict[str, list[tuple[Conv2D, int]]] = {
    "resnet8": [
        (conv((32, 32), 3, 16), 1),
        (conv((32, 32), 16, 16), 1),
        (conv((32, 32), 16, 16, epilogue=SUM), 1),
        (conv((32, 32), 16, 32, stride=2, padding=HALF), 1),
        (conv((16, 16), 32, 32, epilogue=SUM), 1),
        (conv((32, 32), 16, 32, (1, 1), 2, NONE, LINEAR), 1),
        (conv((16, 16), 32, 64, stride=2, padding=HALF), 1),
        (conv((8, 8), 64, 64, epilogue=SUM), 1),
        (conv((16, 16), 32, 64, (1, 1), 2, NONE, LINEAR), 1),
        (product(1, 64, 10, LINEAR), 1),
    ],
    "dscnn": [
        (conv((49, 10), 1, 64, (10, 4), 2, (4, 5, 1, 1)), 1),
        (product(125, 64, 64), 4),
        (product(1, 64, 12, LINEAR), 1),
    ],
    "vww": [
        (conv((96, 96), 3, 8, stride=2, padding=HALF), 1),
        (product(48 * 48, 8, 16), 1),
        (product(24 * 24, 16, 32), 1),
        (product(24 * 24, 32, 32), 1),
        (product(12 * 12, 32, 64), 1),
        (product(12 * 12, 64, 64), 1),
        (product(6 * 6, 64, 128), 1),
        (product(6 * 6, 128, 128), 5),
        (product(3 * 3, 128, 256), 1),
        (product(3 * 3, 256, 256), 1),
        (product(1, 256, 2, LINEAR), 1),
    ],
    "autoencoder": [
        (product(1, 640, 128), 1),
        (product(1, 128, 128), 6),
        (product(1, 128, 8), 1),
        (product(1, 8, 128), 1),
        (product(1, 128, 640, LINEAR), 1),
    ],
}


def operands(spec: Conv2D, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray], list[np.ndarray]]:
    """(input, weights, residual if any) at random."""
    most = (1 << (spec.bits - 1)) - 1
    w = rng.integers(-most, most + 1, (spec.co, spec.ci, *spec.kernel)).astype(np.int8)
    bias = rng.integers(-9999, 9999, spec.co).astype(np.int32)
    m, shift = multipliers(np.full(spec.co, 1 / (0.57 * most * math.sqrt(spec.ci * math.prod(spec.kernel)))), "RQH")
    x = rng.integers(-128, 128, spec.h * spec.w * spec.ci).astype(np.int8)
    size = math.prod(spec.out) * spec.co
    residual = [rng.integers(-128, 128, size).astype(np.int8)] if spec.residual else []
    return x, {"w": w, "bias": bias, "m": m, "shift": shift}, residual


def instructions(specs: Sequence[Conv2D], core: str) -> list[int]:
    """Instructions of each layer on a core. Raises EdgecError where a result is wrong."""
    from tests.targets.mcu_runner import Case, run_cases_on_device

    device, rng = load_device(core), np.random.default_rng(1)
    cases, expected = [], []
    for spec in specs:
        x, weights, residual = operands(spec, rng)
        kernel = implement(spec, weights, device)
        assert kernel is not None
        cases.append(Case(kernel, [x, *residual], weights, 1))
        image = x.reshape(spec.h, spec.w, spec.ci)
        other = residual[0].reshape(*spec.out, spec.co) if residual else None
        expected.append(spec.reference(image, **weights, residual=other))
    found = run_cases_on_device(cases, device)
    for spec, (actual, _), wanted in zip(specs, found, expected, strict=True):
        if not np.array_equal(actual, wanted.reshape(-1)):
            raise EdgecError(f"wrong result of {spec}", where=f"target {core}")
    return [count for _, count in found]


def describe(spec: Conv2D) -> str:
    size, kernel = f"{spec.h}x{spec.w}", "x".join(map(str, spec.kernel))
    stride = f" /{spec.stride[0]}" if spec.stride != (1, 1) else ""
    return f"{kernel}{stride} {spec.ci}->{spec.co}, {size}" + (", add" if spec.residual else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", default="cortex-m4,cortex-m7,cortex-m33,cortex-m3,rv32imc")
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8), help="of each weight")
    parser.add_argument("--layers", default=",".join(MODELS))
    options = parser.parse_args()
    cores = options.cores.split(",")
    for name in options.layers.split(","):
        layers = [(replace(spec, bits=options.bits), times) for spec, times in MODELS[name]]
        counts = {core: instructions([spec for spec, _ in layers], core) for core in cores}
        rows = []
        for i, (spec, _) in enumerate(layers):
            rows.append([describe(spec), f"{spec.macs:,}", *(f"{counts[c][i] / spec.macs:.2f}" for c in cores)])
        macs = sum(spec.macs * times for spec, times in layers)
        sums = [sum(n * times for n, (_, times) in zip(counts[c], layers, strict=True)) / macs for c in cores]
        rows.append([f"all of {name}", f"{macs:,}", *(f"{total:.3f}" for total in sums)])
        print(markdown(("layer", "MAC", *cores), rows) + "\n")


if __name__ == "__main__":
    main()
