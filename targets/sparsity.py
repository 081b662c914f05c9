"""When pruned blocks pay on a device: measured break-even densities, for the lowering and for the defaults of passes.

The figures are those of `sparsity.toml`, which `python -m benchmarks.sparse` measures.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from edgec.targets.device import Device

Block = tuple[int, int]


@dataclass(frozen=True)
class Measured:
    """What one device, or several alike, were found to do. rows: break-even density by (dtype, block, kernel)."""

    rows: Mapping[tuple[str, Block, str], float]
    best: Mapping[str, Block]


def break_even(device: Device, dtype: str, block: Block, kernel: str) -> float | None:
    """The density, 0..1, below which the block-sparse kernel is faster than the tuned dense one.

    dtype: "float32" or "int8". block: (output channels, input channels). kernel: "1x1", also for linear layers, or
    "3x3", for every larger window. A block of a multiple of the output channels measured runs as that one. None where
    nothing was measured or sparsity never pays.
    """
    found = _table().get(core(device))
    if found is None:
        return None
    kernel = kernel if kernel == "1x1" else "3x3"
    measured = [b for (kind, b, k) in found.rows if (kind, k) == (dtype, kernel)]
    fitting = [b for b in measured if b[1] == block[1] and block[0] % b[0] == 0]
    return found.rows[dtype, max(fitting), kernel] if fitting else None


def best_block(device: Device, dtype: str) -> Block | None:
    """The smallest block whose kernel runs near the speed of the dense one on this device; None: nothing pays."""
    found = _table().get(core(device))
    return None if found is None else found.best.get(dtype)


def core(device: Device) -> str:
    """What the table calls a device."""
    return device.mcpu + "".join(device.features) if device.name == "host" else device.name


@functools.cache
def _table() -> dict[str, Measured]:
    text = resources.files("edgec.targets").joinpath("sparsity.toml").read_text()
    found: dict[str, Measured] = {}
    for section in tomllib.loads(text)["kernel"]:
        rows = {(r["dtype"], (r["block"][0], r["block"][1]), r["kernel"]): r["break_even"] for r in section["rows"]}
        measured = Measured(rows, {dtype: (b[0], b[1]) for dtype, b in section["best"].items()})
        found.update(dict.fromkeys(section["devices"], measured))
    return found
