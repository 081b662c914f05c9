"""Options that name layers: `keep_float=[conv1, blocks.3.*]`."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import fx

from edgec.errors import EdgecError
from edgec.program import layer_of


def layer_names(value: Any, where: str) -> tuple[str, ...]:
    """The option's value as a tuple. Raises EdgecError for one text and for anything but texts."""
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        raise EdgecError(
            f"{value!r} is not a list of layer names",
            where=where,
            hint="write keep_float=[conv1,fc] or, in Python, keep_float=('conv1', 'fc')",
        )
    return tuple(value)


def check_patterns(module: fx.GraphModule, patterns: Sequence[str], where: str) -> None:
    """Raise EdgecError for a pattern that no layer fits."""
    layers = sorted({layer_of(n) for n in module.graph.nodes if n.op == "call_function"})
    for pattern in patterns:
        if not any(fits(layer, (pattern,)) for layer in layers):
            near = difflib.get_close_matches(pattern, layers, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"layers are {', '.join(layers[:5])}, ..."
            raise EdgecError(f"no layer is called '{pattern}'", where=where, hint=hint)


def fits(layer: str, patterns: Sequence[str]) -> bool:
    """True for a layer that is named, one inside it, and one that fits a pattern."""
    return any(layer == p or layer.startswith(f"{p}.") or fnmatch.fnmatchcase(layer, p) for p in patterns)
