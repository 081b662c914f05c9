"""The kernels by the template that they stand for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.gpu.kernels.base import GpuKernel

# Modules with a table RULES {template: function (spec, weights, device) -> GpuKernel or None}, asked in this order.
MODULES: tuple[str, ...] = ("winograd", "conv", "depthwise", "pool", "product", "rows", "elementwise")


def implement(spec: Any, weights: Mapping[str, np.ndarray | None], device: Device) -> GpuKernel | None:
    """The kernel for a template of `edgec.targets.kernels` with these weights, or None when there is none."""
    for name in MODULES:
        rule = importlib.import_module(f"{__name__}.{name}").RULES.get(type(spec))
        kernel = rule(spec, weights, device) if rule is not None else None
        if kernel is not None:
            return kernel
    return None
