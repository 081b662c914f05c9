"""`Sparsity`: which elements of a weight are pruned. The mask is the truth; zeros in the weight are not.

A kept element may be zero and stays kept, so that training can revive it; a pruned element is exactly +0.0, or code 0.
A pass that changes a pruned weight carries its record along with `carry`; `Program.replace` refuses a graph in which a
record has lost its weight or a pruned element is no longer zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgec.errors import EdgecError

PATTERNS = ("unstructured", "block", "nm")


@dataclass(frozen=True, eq=False)
class Sparsity:
    """What is pruned of one weight. Annotation of a Program, keyed by the weight's attribute path.

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
    return {path: record for path, record in annotations.items() if isinstance(record, Sparsity)}


def carry(
    annotations: Mapping[str, Any],
    moves: Mapping[str, str],
    reorder: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Annotations whose sparsity records follow their weights: `moves` maps old to new paths.

    `reorder` maps a mask to the new weight's shape, for passes that transpose or reshape.
    """
    result = dict(annotations)
    for old, new in moves.items():
        record = annotations.get(old)
        if isinstance(record, Sparsity):
            result.pop(old, None)
            result[new] = record if reorder is None else record.with_mask(reorder(record.mask))
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
