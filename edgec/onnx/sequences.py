"""Sequences and optional values of ONNX where they are known to the importer: lists in place of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgec.onnx.module import Node, Static, Value
from edgec.onnx.operators import _op

# Operators that take or return lists: never computed as constants are, which are arrays.
NAMES = frozenset(
    (
        *("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceAt", "SequenceLength"),
        *("SplitToSequence", "ConcatFromSequence", "Optional", "OptionalHasElement", "OptionalGetElement"),
    )
)


def _list(node: Node) -> list[Value]:
    value = node.value(0)
    if not isinstance(value, list):
        raise node.refuse("takes something else than a sequence", "check the model with onnx.checker")
    return value


def _place(node: Node, index: int, size: int) -> int:
    place = int(node.static(index, "position").reshape(-1)[0])
    return place + size if place < 0 else place


@_op("SequenceConstruct")
def _construct(node: Node) -> Any:
    return list(node.inputs)


@_op("SequenceEmpty")
def _empty(node: Node) -> Any:
    return []


@_op("SequenceInsert")
def _insert(node: Node) -> Any:
    items = list(_list(node))
    items.insert(_place(node, 2, len(items)) if node.has(2) else len(items), node.value(1))
    return items


@_op("SequenceErase")
def _erase(node: Node) -> Any:
    items = list(_list(node))
    del items[_place(node, 1, len(items)) if node.has(1) else -1]
    return items


@_op("SequenceAt")
def _at(node: Node) -> Any:
    items = _list(node)
    return items[_place(node, 1, len(items))]


@_op("SequenceLength")
def _length(node: Node) -> Any:
    return np.array(len(_list(node)))


@_op("SplitToSequence")
def _split(node: Node) -> Any:
    x, axis = node.x(0), node.attr("axis", 0)
    if not node.has(1):
        parts = torch.split(x, 1, axis)
        return [p if node.attr("keepdims", 1) else p.squeeze(axis) for p in parts]
    sizes = node.ints(1, "sizes")
    one = node.value(1).shape == ()
    return list(torch.split(x, sizes[0] if one else sizes, axis))


@_op("ConcatFromSequence")
def _concat(node: Node) -> Any:
    items, axis = _list(node), node.attr("axis")
    if not items:
        raise node.refuse("joins nothing", "check the model")
    if all(isinstance(v, Static) and v.concrete for v in items):
        join = np.stack if node.attr("new_axis", 0) else np.concatenate
        return join([v.array for v in items], axis)
    join = torch.stack if node.attr("new_axis", 0) else torch.cat
    return join([node.graph.tensor(v, node.path) for v in items], axis)


@_op("Optional", "OptionalGetElement")
def _element(node: Node) -> Any:
    return node.inputs[0] if node.inputs else None


@_op("OptionalHasElement")
def _has(node: Node) -> Any:
    return np.array(node.has(0))
