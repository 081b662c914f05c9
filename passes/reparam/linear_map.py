"""`LinearMap`: an affine function of one tensor as the kernel of one convolution, and the algebra that merges them.

Rules of exact folding: parallel maps of one tensor add up after their taps are aligned and their groups joined; a map
of a map is one map, unless the outer one reads zero padding that the inner one would have turned into something else.
Everything is computed in float64.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again"; Bhardwaj et al., "Collapsible Linear Blocks for
Super-Efficient Super Resolution"; Ding et al., "UniRepLKNet".
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LinearMap:
    """y[o] = bias[o] + sum over i, t of weight[o, i, t] x[i, stride * position - before + t]; x is zero outside.

    weight: float64 [O, I / groups, *taps], without dilation; no taps for a linear layer on the last axis.
    pads: (before, after) for every spatial axis.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    stride: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    groups: int = 1

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def taps(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def is_padded(self) -> bool:
        return any(side for pair in self.pads for side in pair)

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one position, with the empty taps left out that `compact` leaves out."""
        compacted, _ = compact(self)
        return compacted.weight.numel()

    def size(self, extent: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial extent of the result for an input of spatial extent `extent`."""
        return tuple(
            (n + sum(p) - k) // s + 1 for n, p, k, s in zip(extent, self.pads, self.taps, self.stride, strict=True)
        )


def identity(channels: int, axes: int) -> LinearMap:
    """x itself, as a depthwise kernel of one tap."""
    weight = torch.ones(channels, 1, *[1] * axes, dtype=torch.float64)
    zeros = torch.zeros(channels, dtype=torch.float64)
    return LinearMap(weight, zeros, (1,) * axes, ((0, 0),) * axes, channels)


def convolution(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> LinearMap:
    """A convolution with a stored kernel [O, I / groups, *taps]; dilated taps are spread out."""
    weight = weight.double()
    for axis, step in enumerate(dilation):
        weight = _spread(weight, axis + 2, step)
    zeros = torch.zeros(weight.shape[0], dtype=torch.float64)
    return LinearMap(weight, zeros if bias is None else bias.double(), stride, pads, groups)


def scale(inner: LinearMap, factor: torch.Tensor | float, shift: torch.Tensor | float = 0.0) -> LinearMap:
    """factor * inner + shift, per output channel."""
    factors = torch.as_tensor(factor, dtype=torch.float64).expand(inner.outputs)
    weight = inner.weight * factors.reshape(-1, *[1] * (inner.weight.dim() - 1))
    return dataclasses.replace(inner, weight=weight, bias=inner.bias * factors + shift)


def add(a: LinearMap, b: LinearMap, extent: tuple[int, ...]) -> LinearMap | None:
    """a + b for an input of spatial extent `extent`, or None when no single kernel does the same."""
    if a.stride != b.stride or a.outputs != b.outputs or a.inputs != b.inputs or a.size(extent) != b.size(extent):
        return None
    groups = math.gcd(a.groups, b.groups)
    before = [max(p[0], q[0]) for p, q in zip(a.pads, b.pads, strict=True)]
    ends = [
        max(front - p[0] + k, front - q[0] + n)
        for front, p, k, q, n in zip(before, a.pads, a.taps, b.pads, b.taps, strict=True)
    ]
    weight = _aligned(a, groups, before, ends) + _aligned(b, groups, before, ends)
    pads = []
    for front, end, (first, last), k in zip(before, ends, a.pads, a.taps, strict=True):
        after = first + last - k + end - front  # keeps the extent of the result
        if after < 0:
            return None
        pads.append((front, after))
    return LinearMap(weight, a.bias + b.bias, a.stride, tuple(pads), groups)


def compose(outer: LinearMap, inner: LinearMap) -> LinearMap | None:
    """outer(inner(x)), or None where the zeros that `outer` pads would not be zeros of `x`."""
    if outer.inputs != inner.outputs:
        return None
    pointwise = all(k == 1 for k in inner.taps) and not inner.is_padded
    if outer.is_padded and not (pointwise and not inner.bias.any()):
        return None
    groups = math.gcd(outer.groups, inner.groups)
    first, second = _regroup(inner, groups), _regroup(outer, groups)
    steps = inner.stride
    taps = [(k - 1) * s + n for k, s, n in zip(outer.taps, steps, inner.taps, strict=True)]
    # [groups, outputs, middle, taps] x [groups, middle, inputs, taps]
    left = second.reshape(groups, -1, *second.shape[1:])
    right = first.reshape(groups, -1, *first.shape[1:])
    result = torch.zeros(groups, left.shape[1], right.shape[2], *taps, dtype=torch.float64)
    for tap in itertools.product(*(range(k) for k in outer.taps)):
        window = tuple(slice(t * s, t * s + n) for t, s, n in zip(tap, steps, inner.taps, strict=True))
        result[(..., *window)] += torch.einsum("gom,gmi...->goi...", left[(..., *tap)], right)
    over_taps = outer.weight.flatten(2).sum(2) if outer.taps else outer.weight
    per_group = inner.bias.reshape(outer.groups, -1)
    bias = torch.einsum("gom,gm->go", over_taps.reshape(outer.groups, -1, per_group.shape[1]), per_group).reshape(-1)
    pads = tuple((p[0] * s + q[0], p[1] * s + q[1]) for p, s, q in zip(outer.pads, steps, inner.pads, strict=True))
    stride = tuple(s * t for s, t in zip(outer.stride, steps, strict=True))
    return LinearMap(result.flatten(0, 1), bias + outer.bias, stride, pads, groups)


def compact(m: LinearMap) -> tuple[LinearMap, tuple[int, ...]]:
    """The same function with the fewest taps: empty borders cut, taps at even distance as a dilated kernel.

    Returns the map, its taps gathered, and the dilation. Padding is as much before as after wherever the kernel can be
    extended by zeros to that end, because convolutions in PyTorch know no other.
    """
    weight, pads, dilations = m.weight, list(m.pads), []
    for axis in range(len(m.taps)):
        used = weight.movedim(axis + 2, 0).flatten(1).any(1).nonzero().flatten().tolist() or [m.taps[axis] // 2]
        before, after = pads[axis]
        front, back = min(used[0], before), min(weight.shape[axis + 2] - 1 - used[-1], after)
        weight = weight.narrow(axis + 2, front, weight.shape[axis + 2] - front - back)
        before, after = before - front, after - back
        width = max(before, after)
        weight = _extended(weight, axis + 2, width - before, width - after)
        pads[axis] = (width, width)
        positions = [u - front + width - before for u in used]
        ends = (positions[0], weight.shape[axis + 2] - 1 - positions[-1])
        step = math.gcd(*(p - positions[0] for p in positions))
        if step > 1 and ends == (0, 0):
            weight = weight.index_select(axis + 2, torch.arange(0, weight.shape[axis + 2], step))
            dilations.append(step)
        else:
            dilations.append(1)
    return dataclasses.replace(m, weight=weight, pads=tuple(pads)), tuple(dilations)


def _regroup(m: LinearMap, groups: int) -> torch.Tensor:
    """The kernel [O, I / groups, *taps] with fewer groups; connections that were not there are zero."""
    if groups == m.groups:
        return m.weight
    joined = m.groups // groups
    rows, per_group = m.outputs // m.groups, m.weight.shape[1]
    old = m.weight.reshape(groups, joined, rows, per_group, *m.taps)
    new = torch.zeros(groups, joined, rows, joined, per_group, *m.taps, dtype=torch.float64)
    for part in range(joined):
        new[:, part, :, part] = old[:, part]
    return new.reshape(m.outputs, joined * per_group, *m.taps)


def _aligned(m: LinearMap, groups: int, before: list[int], ends: list[int]) -> torch.Tensor:
    """The kernel with zero taps around it, so that its first tap lies `before` positions ahead of the output's."""
    weight = _regroup(m, groups)
    for axis, (front, end) in enumerate(zip(before, ends, strict=True)):
        shift = front - m.pads[axis][0]
        weight = _extended(weight, axis + 2, shift, end - shift - m.taps[axis])
    return weight


def _spread(weight: torch.Tensor, axis: int, step: int) -> torch.Tensor:
    """Zeros between taps."""
    if step == 1:
        return weight
    shape = list(weight.shape)
    shape[axis] = (shape[axis] - 1) * step + 1
    result = torch.zeros(shape, dtype=weight.dtype)
    result.index_copy_(axis, torch.arange(0, shape[axis], step), weight)
    return result


def _extended(weight: torch.Tensor, axis: int, front: int, back: int) -> torch.Tensor:
    """Zero taps in front and behind."""
    if not front and not back:
        return weight
    shape = list(weight.shape)
    shape[axis] += front + back
    result = torch.zeros(shape, dtype=weight.dtype)
    result.narrow(axis, front, weight.shape[axis]).copy_(weight)
    return result
