"""Kernels (pool)."""

from __future__ import annotations

from collections.abc import Callable

from edgec.targets.mcu.kernels.base import McuKernel

RULES: dict[type, Callable[..., McuKernel | None]] = {}
