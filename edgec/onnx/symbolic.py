"""Shape arithmetic on arrays of whole numbers among which are symbolic sizes of a dynamic batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto

if TYPE_CHECKING:
    from edgec.onnx.module import Node


def compute(node: Node) -> np.ndarray | None:
    """The result of a node on such arrays; None when it is none of the operators that compute shapes."""
    rule = RULES.get(node.op)
    if rule is None:
        return None
    try:
        return rule(node)
    except (TypeError, NotImplementedError):
        return None


def _array(node: Node, index: int) -> np.ndarray:
    return node.value(index).array


def _concrete(node: Node, index: int) -> np.ndarray:
    array = _array(node, index)
    if array.dtype == object:
        raise NotImplementedError
    return array


def _axes(node: Node, index: int = 1) -> list[int]:
    if node.has(index):
        return [int(i) for i in _concrete(node, index).reshape(-1)]
    return list(node.attr("axes", []))


def _elementwise(function: Callable[..., Any]) -> Callable[[Node], np.ndarray]:
    def rule(node: Node) -> np.ndarray:
        arrays = np.broadcast_arrays(*[v.array for v in node.inputs])
        flat = [function(*row) for row in zip(*[a.reshape(-1).tolist() for a in arrays])]
        return _objects(flat, arrays[0].shape)

    return rule


def _objects(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An array of type object, or of int64 where nothing is symbolic."""
    if not any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values):
        return np.array(values).reshape(shape)
    result = np.empty(len(values), dtype=object)
    result[:] = values
    return result.reshape(shape)


def _again(array: np.ndarray) -> np.ndarray:
    return _objects(array.reshape(-1).tolist(), array.shape) if array.dtype == object else array


def _gather(node: Node) -> np.ndarray:
    return _again(np.asarray(np.take(_array(node, 0), _concrete(node, 1), axis=node.attr("axis", 0)), dtype=object))


def _slice(node: Node) -> np.ndarray:
    x = _array(node, 0)
    if node.opset < 10:
        starts, ends = node.attr("starts"), node.attr("ends")
        axes, steps = node.attr("axes") or list(range(len(starts))), [1] * len(starts)
    else:
        starts, ends = (_concrete(node, i).tolist() for i in (1, 2))
        axes = _concrete(node, 3).tolist() if node.has(3) else list(range(len(starts)))
        steps = _concrete(node, 4).tolist() if node.has(4) else [1] * len(starts)
    index: list[slice] = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps):
        end = None if step < 0 and end < -x.shape[axis] else end
        index[axis] = slice(start, end, step)
    return _again(x[tuple(index)])


def _unsqueeze(node: Node) -> np.ndarray:
    x, axes = _array(node, 0), _axes(node)
    rank = x.ndim + len(axes)
    places = {a % rank for a in axes}
    sizes = iter(x.shape)
    return x.reshape([1 if i in places else next(sizes) for i in range(rank)])


def _squeeze(node: Node) -> np.ndarray:
    x = _array(node, 0)
    axes = _axes(node) or [i for i, n in enumerate(x.shape) if n == 1]
    return x.reshape([n for i, n in enumerate(x.shape) if i not in {a % x.ndim for a in axes}])


def _reshape(node: Node) -> np.ndarray:
    x, shape = _array(node, 0), [int(i) for i in _concrete(node, 1)]
    if not node.attr("allowzero", 0):
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def _product(node: Node) -> np.ndarray:
    x = _array(node, 0)
    if x.ndim != 1 or (_axes(node) or [0]) not in ([0], [-1]):
        raise NotImplementedError
    total = 1
    for value in x.tolist():
        total = total * value
    return _objects([total], (1,) if node.attr("keepdims", 1) else ())


def _cast(node: Node) -> np.ndarray:
    if node.attr("to") not in (TensorProto.INT32, TensorProto.INT64):
        raise NotImplementedError
    return _array(node, 0)


def _divide(a: Any, b: Any) -> Any:
    """Sizes are not negative, so that floor and truncation are the same."""
    return a // b


RULES: dict[str, Callable[[Node], np.ndarray]] = {
    "Identity": lambda node: _array(node, 0),
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": lambda node: _again(
        np.concatenate([np.asarray(v.array, dtype=object) for v in node.inputs], axis=node.attr("axis"))
    ),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _elementwise(_divide),
    "ReduceProd": _product,
}
