"""`Sparsity`: which elements of a weight are pruned. The mask is the truth; zeros in the weight are not.

A kept element may be zero and stays kept, so that training can revive it; a pruned element is exactly +0.0, or code 0.
A pass that changes a pruned weight carries its record along with `carry`; `Program.replace` refuses a graph in which a
record has lost its weight or a pruned element is no longer zero.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgec.errors import EdgecError

PATTERNS = ("unstructured", "block", "nm")
# Key of the record of a weight that has another annotation under its own path: int8 weights have their scales there.
BESIDE = "#mask"


@dataclass(frozen=True, eq=False)
class Sparsity:
    """What is pruned of one weight. Annotation of a Program, keyed by the weight's attribute path (see `BESIDE`).

    pattern: "block": blocks of `block` = (output channels, input channels), each with all its taps, are kept or removed
        as one; (N, 1) is 1xN. "nm": `block` = (N, M), N of M consecutive input channels are kept at every tap.
        "unstructured": single elements, `block` = (1, 1).
    mask: bool, shape of the weight, output channels first; True is kept.
    balanced: every group of `block[0]` output channels keeps the same number of blocks.
    """

    pattern: str
    block: tuple[int, int]
    mask: torch.Tensor
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise EdgecError(f"'{self.pattern}' is not a pattern", where="Sparsity", hint=f"one of {PATTERNS}")
        if self.mask.dtype != torch.bool:
            raise EdgecError(f"mask is {self.mask.dtype}", where="Sparsity", hint="give a bool tensor")

    @property
    def density(self) -> float:
        """Share of kept elements, 0..1."""
        return float(self.mask.sum()) / max(1, self.mask.numel())

    def with_mask(self, mask: torch.Tensor) -> Sparsity:
        """The same pattern for a weight of another shape or order."""
        return dataclasses.replace(self, mask=mask)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a `.pt2` file: the mask as base64 of its zlib-compressed bits."""
        bits = np.packbits(self.mask.contiguous().numpy().reshape(-1))
        return {
            "pattern": self.pattern,
            "block": list(self.block),
            "balanced": self.balanced,
            "shape": list(self.mask.shape),
            "mask": base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Sparsity:
        """Inverse of `to_json`. Raises EdgecError for anything else."""
        try:
            shape = tuple(int(n) for n in data["shape"])
            count = math.prod(shape)
            unpacker = zlib.decompressobj()
            packed = unpacker.decompress(base64.b64decode(data["mask"], validate=True), -(-count // 8) + 1)
            bits = np.unpackbits(np.frombuffer(packed, np.uint8))
            if len(packed) != -(-count // 8):
                raise ValueError(f"{len(packed)} bytes for {count} elements")
            mask = torch.from_numpy(bits[:count].astype(bool)).reshape(shape)
            first, second = data["block"]
            return Sparsity(str(data["pattern"]), (int(first), int(second)), mask, bool(data["balanced"]))
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise EdgecError(
                f"damaged sparsity record ({type(error).__name__}: {error})", where="Sparsity", hint="prune again"
            ) from error

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sparsity)
            and (self.pattern, self.block, self.balanced) == (other.pattern, other.block, other.balanced)
            and torch.equal(self.mask, other.mask)
        )

    def __hash__(self) -> int:
        return hash((self.pattern, self.block, self.balanced, self.mask.shape))

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.mask.contiguous().numpy().tobytes()).hexdigest()[:8]
        balanced = " balanced" if self.balanced else ""
        return f"Sparsity({self.pattern} {self.block[0]}x{self.block[1]}{balanced} {self.density:.4f} #{digest})"


def sparsities(annotations: Mapping[str, Any]) -> dict[str, Sparsity]:
    """The sparsity records among annotations, by weight path."""
    found = {}
    for key, record in annotations.items():
        if isinstance(record, Sparsity):
            found[key.removesuffix(BESIDE)] = record
    return found


def carry(
    annotations: Mapping[str, Any],
    moves: Mapping[str, str],
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Annotations whose sparsity records follow their weights: `moves` maps old to new paths.

    `reorder` maps a mask to the new weight's shape, for passes that transpose or reshape. For passes that store some
    weights twice or in parts, see `Carrier`.
    """
    carrier = Carrier(annotations)
    for old, new in moves.items():
        carrier.move(old, new, reorder)
        carrier.records.pop(old, None)
    return carrier.annotations(annotations)


class Carrier:
    """The sparsity records on their way through a pass that stores weights under new paths.

    `records` holds them by weight path, old and new: `move` adds one for a new weight that was made from another.
    """

    def __init__(self, annotations: Mapping[str, Any]) -> None:
        self.records = sparsities(annotations)
        self._moved: set[str] = set()

    def move(
        self,
        old: str,
        new: str,
        reorder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        pattern: tuple[str, tuple[int, int]] | None = None,
    ) -> None:
        """The weight `new` was made from `old`, element by element; nothing happens where `old` has no record.

        reorder: mask of the old weight to that of the new one. pattern: (pattern, block) where the new weight no
        longer has that of the old one.
        """
        record = self.records.get(old)
        if record is None:
            return
        mask = record.mask if reorder is None else reorder(record.mask).clone()
        if pattern is not None:
            record = dataclasses.replace(record, pattern=pattern[0], block=pattern[1], balanced=False)
        self.records[new] = record.with_mask(mask)
        self._moved.add(old)

    def annotations(self, others: Mapping[str, Any], weights: Collection[str] | None = None) -> dict[str, Any]:
        """`others` with the records of `weights` (of all, where that is None) instead of those it had.

        A record whose weight is gone without having moved is kept, so that `Program.replace` refuses the graph.
        """
        result = {key: value for key, value in others.items() if not isinstance(value, Sparsity)}
        for path, record in self.records.items():
            if weights is None or path in weights or path not in self._moved:
                result[path if path not in result else f"{path}{BESIDE}"] = record
        return result


def check_sparsity(weights: Mapping[str, torch.Tensor], annotations: Mapping[str, Any], where: str) -> None:
    """Raise EdgecError unless every record has its weight, of its shape, with zeros in all pruned places."""
    for path, record in sparsities(annotations).items():
        weight = weights.get(path)
        if weight is None:
            raise EdgecError(
                f"the pruned weight '{path}' is gone and its mask was not carried along",
                where=where,
                hint="run this pass before the pruning pass",
            )
        if weight.shape != record.mask.shape:
            raise EdgecError(
                f"the pruned weight '{path}' has shape {tuple(weight.shape)}, its mask {tuple(record.mask.shape)}",
                where=where,
                hint="run this pass before the pruning pass",
            )
        if bool((weight[~record.mask] != 0).any()):
            raise EdgecError(
                f"pruned elements of '{path}' are no longer zero", where=where, hint="run this pass before pruning"
            )
