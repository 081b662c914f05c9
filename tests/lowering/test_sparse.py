"""From the Sparsity annotation of a Program to block-sparse kernels, and the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgec.data import random_data
from edgec.lowering.lower import kernel_bindings, lower
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import Program, get_weight
from edgec.sparsity import Sparsity, sparsities
from edgec.targets.device import Device, load_device
from edgec.targets.sparsity import best_block
from tests.lowering.helpers import Compiled, compile_host, load
from tests.lowering.networks import Net

DEVICES = ("host", "cortex-a72", "neoverse-n1")


def network() -> nn.Module:
    """3x3 with stride and residual, 1x1, depthwise, and a linear layer on tokens."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.stem(x))
        x = torch.relu(m.wide(x) + x)
        x = torch.relu(m.point(torch.relu(m.depth(m.down(x)))))
        return m.linear(x.flatten(2).transpose(1, 2))

    return Net(
        forward,
        stem=nn.Conv2d(3, 64, 3, padding=1),
        wide=nn.Conv2d(64, 64, 3, padding=1),
        down=nn.Conv2d(64, 72, 3, stride=2, padding=1),
        depth=nn.Conv2d(72, 72, 3, padding=1, groups=72),
        point=nn.Conv2d(72, 96, 1),
        linear=nn.Linear(96, 64),
    )


PRUNED = {"wide", "down", "point", "linear"}


def prune(program: Program, block: tuple[int, int], density: float, pattern: str = "block") -> Program:
    """Random blocks of the named layers, as many for each group of output channels."""
    module, annotations = program.edit(), dict(program.annotations)
    generator = torch.Generator().manual_seed(0)
    for node in module.graph.nodes:
        if node.op != "get_attr" or str(node.target).split(".")[0] not in PRUNED or "weight" not in str(node.target):
            continue
        weight = get_weight(module, node)
        outputs, inputs = weight.shape[0], weight.shape[1] // block[1]
        kept = torch.zeros(-(-outputs // block[0]), inputs, dtype=torch.bool)
        for row in kept:
            row[torch.randperm(inputs, generator=generator)[: round(density * inputs)]] = True
        mask = kept.repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)
        mask = mask.reshape(*mask.shape, *[1] * (weight.dim() - 2)).expand(weight.shape).contiguous()
        weight.data.mul_(mask)
        annotations[str(node.target)] = Sparsity(pattern, block, mask, balanced=True)
    return program.replace(module, annotations)


def prune_weights(program: Program, density: float) -> Program:
    """Random single weights of the named layers."""
    module, annotations = program.edit(), dict(program.annotations)
    generator = torch.Generator().manual_seed(0)
    for path in sparsities(program.annotations):
        weight = module.get_parameter(path)
        mask = torch.rand(weight.shape, generator=generator) < density
        weight.data.mul_(mask)
        annotations[path] = Sparsity("unstructured", (1, 1), mask)
    return program.replace(module, annotations)


def program(dtype: str, device: Device, density: float = 0.25, pattern: str = "block") -> Program:
    """The network, pruned in the blocks that are best on the device, then quantised where asked to."""
    block = best_block(device, dtype)
    if block is None:
        pytest.skip(f"nothing is known of block-sparse {dtype} on {device.mcpu}")
    made = prune(load(network(), (1, 3, 13, 11)), block, density, pattern)
    context = Context(device=device, calibration=random_data(made.inputs, 8, seed=1))
    for step in (FoldBN(), QuantizeInt8()) if dtype == "int8" else ():
        made = step.run(made, context)
    return made


def kernels(compiled: Compiled) -> Counter[str]:
    return Counter(step.op.rsplit("_", 1)[0] for step in compiled.lowered.plan.steps if "conv2d" in step.op)


@pytest.mark.host
@pytest.mark.parametrize("dtype", ("float32", "int8"))
def test_pruned_layers_run_on_sparse_kernels(dtype: str, tmp_path: Path) -> None:
    made = program(dtype, load_device("host"))
    compiled = compile_host(made, tmp_path)
    assert kernels(compiled) == {"conv2d": 1, "conv2d_sparse": 4}
    for seed in (1, 2):
        assert compiled.error(seed) <= (0.0 if dtype == "int8" else 1e-5)
    sparse = {step.layer: step.macs for step in compiled.lowered.plan.steps if "sparse" in step.op}
    # A quarter of the blocks: 9 taps of 64 inputs and 64 outputs on 13 x 11 pixels.
    assert sparse["wide"] == 13 * 11 * 9 * 64 * 16


@pytest.mark.host
def test_blocks_are_found_under_any_name(tmp_path: Path) -> None:
    compiled = compile_host(program("float32", load_device("host"), pattern="unstructured"), tmp_path)
    assert kernels(compiled) == {"conv2d": 1, "conv2d_sparse": 4}
    assert compiled.lowered.fallbacks == ()


@pytest.mark.host
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_dense_kernels_where_nothing_is_won(density: float, tmp_path: Path) -> None:
    """Everything is kept, or single weights without a pattern are pruned: then the zeros are reported."""
    device = load_device("host")
    made = (
        program("float32", device, 1.0) if density == 1.0 else prune_weights(program("float32", device, 1.0), density)
    )
    compiled = compile_host(made, tmp_path)
    assert kernels(compiled) == {"conv2d": 5}
    assert compiled.error() <= 1e-5
    reported = {skip.layer for skip in compiled.lowered.fallbacks if skip.what == "zeros multiplied"}
    assert reported == (set() if density == 1.0 else PRUNED)


@pytest.mark.pure
@pytest.mark.parametrize("name", DEVICES)
def test_every_measured_device_uses_them(name: str) -> None:
    device = load_device(name)
    for dtype in ("float32", "int8"):
        made = program(dtype, device)
        names = Counter(binding.spec.name for binding in kernel_bindings(made, device))
        assert names["conv2d_sparse"] == len(PRUNED), (dtype, names)
        assert Counter(binding.spec.name for binding in kernel_bindings(made))["conv2d_sparse"] == 0


@pytest.mark.pure
def test_weights_are_stored_without_the_pruned_blocks() -> None:
    device = load_device("cortex-a72")
    full, pruned = (lower(program("float32", device, density), device).plan for density in (1.0, 0.25))
    sizes = [sum(c.array.nbytes for c in plan.constants.values()) for plan in (full, pruned)]
    assert sizes[1] < 0.35 * sizes[0]
