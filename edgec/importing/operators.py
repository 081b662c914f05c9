"""PyTorch's operators by name."""

from __future__ import annotations

from typing import Any

import torch


def by_overload(table: dict[str, Any]) -> dict[Any, Any]:
    """A table by overload, of names `packet` or `packet.overload` of aten; what PyTorch does not have is left out."""
    found = {}
    for name, rule in table.items():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operator is not None:
            found[operator] = rule
    return found
