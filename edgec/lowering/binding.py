"""Which kernel template runs which region operator: the table between the torch graph and `edgec.targets.kernels`.

Each rule reads one node and gives the template, the activations it takes and the weights it packs. Nothing here knows
TVM; `edgec.lowering.importer` turns a `Binding` into a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec.program import dtype_of, layer_of, shape_of
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean
from edgec.targets.kernels.transpose import Transpose

edgec = torch.ops.edgec
aten = torch.ops.aten

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Binding:
    """A kernel call: `spec` with `inputs` (graph nodes) and the constants that `spec.pack(device, **weights)` packs."""

    spec: Any
    inputs: tuple[fx.Node, ...]
    layer: str
    op: str
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    output_shape: tuple[int, ...] = ()


def bind(node: fx.Node, constants: Weights) -> Binding | None:
    """The kernel for `node`, or None when TVM's own operators implement it. `constants` maps node names to arrays."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    return rule(node, constants) if rule is not None else None
