"""The original model in the order of channels of a pruned one: where the values of removed weights are found.

Pruning leaves zeros where it removes, and `prune-1xn` reorders channels first. `dense_program` reorders the original
model in the same way and proves it: every kept element must be bit-equal in both.
"""

from __future__ import annotations

import numpy as np
import torch

from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.pruning.groups import ChannelGroup, Channels, permute
from edgec.program import Program
from edgec.sparsity import sparsities


def dense_program(program: Program, teacher: Program) -> Program:
    """The model before pruning, with the graph, weight paths and channel order of `program`.

    teacher: the original model; batch norms of it are folded where those of `program` are. The order of the channels
    of each dependency group is that in which its biases and batch norm parameters are found in `program`.

    Raises EdgecError when the two do not have the same layers, or a weight that was kept has changed since pruning.
    """
    for start in (teacher, _folded(teacher)):
        if _same_shapes(program, start):
            return _proved(program, _reordered(program, start))
    raise EdgecError(
        "the layers are not those of the original model, so that the values of removed weights are not known",
        where=program.name,
        hint="run this pass directly behind the pruning pass",
    )


def _folded(teacher: Program) -> Program:
    return FoldBN().run(teacher, Context())


def _same_shapes(program: Program, other: Program) -> bool:
    ours, theirs = program.weights(), other.weights()
    names = [[n.name for n in p.graph.nodes] for p in (program, other)]
    return names[0] == names[1] and {p: w.shape for p, w in ours.items()} == {p: w.shape for p, w in theirs.items()}


def _proved(program: Program, dense: Program) -> Program:
    given, masks = dense.weights(), sparsities(program.annotations)
    for path, weight in program.weights().items():
        kept = masks[path].mask if path in masks else torch.ones_like(weight, dtype=torch.bool)
        if path in masks and not torch.equal(weight[kept], given[path][kept]):
            raise EdgecError(
                f"'{path}' has changed since it was pruned, so that the values of removed weights do not fit it",
                where=program.name,
                hint="run this pass directly behind the pruning pass",
            )
    return dense


def _reordered(program: Program, teacher: Program) -> Program:
    """`teacher` with the channels of each group in the order that they have in `program`."""
    ours, theirs = program.weights(), teacher.weights()
    masks = sparsities(program.annotations)
    if all(torch.equal(theirs[p][r.mask], ours[p][r.mask]) for p, r in masks.items()):
        return teacher
    module = teacher.edit()
    for group in Channels(module).groups:
        order = _order(group, ours, theirs) if group.locked is None else None
        if order is not None and (order != np.arange(len(order))).any():
            permute(module, group, order)
    return teacher.replace(module)


def _order(group: ChannelGroup, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> np.ndarray | None:
    """Unit i of the group in `ours` is unit order[i] of `theirs`; None when its vectors do not say."""
    # recalibrated statistics say nothing: they are not a reordering of what they were
    vectors = [
        m
        for m in group.members
        if ours[m.weight].dim() == 1 and torch.equal(ours[m.weight].sort().values, theirs[m.weight].sort().values)
    ]
    if not vectors:
        return None
    columns = [
        [side[m.weight].numpy()[m.index].reshape(group.channels, -1) for m in vectors] for side in (theirs, ours)
    ]
    before, after = (np.concatenate(c, axis=1) for c in columns)
    places: dict[bytes, list[int]] = {}
    for index, row in enumerate(before):
        places.setdefault(row.tobytes(), []).append(index)
    order = []
    for row in after:
        found = places.get(row.tobytes())
        if not found:
            return None
        order.append(found.pop(0))
    return np.asarray(order)
