"""Register tiles and image borders: which output pixels are computed together, and which taps they have.

A tile is a few neighbouring pixels of one output row. Taps that fall into the padding are left out where the code is
generated, so a padded convolution needs no padded copy of its input: rows by the bounds of the loop over kernel rows,
columns by separate code for the tiles at the two ends of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from edgec.targets.tir import tirx


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution window: `size` inputs, `out` outputs, padding `before` the first input."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    before: int

    def taps(self, position: int) -> tuple[int, ...]:
        """Taps of output `position` that fall on the input."""
        first = position * self.stride - self.before
        return tuple(k for k in range(self.kernel) if 0 <= first + k * self.dilation < self.size)

    @property
    def padded(self) -> bool:
        """Whether any tap of any output falls into padding."""
        return len(self.inner) < self.out

    def bounds(self, position: Any) -> tuple[Any, Any]:
        """(first tap, end) of output `position`, a TIR expression: the taps on the input are consecutive."""
        if not self.padded:
            return 0, self.kernel
        low = tirx.min(tirx.max(self._taps_before(self.before, position), 0), self.kernel)
        high = tirx.min(self._taps_before(self.size + self.before, position), self.kernel)
        return low, tirx.max(high, low)

    def _taps_before(self, end: int, position: Any) -> Any:
        """(end - position * stride) / dilation, rounded up: the taps before place `end` of the padded input.

        Written as a constant less a quotient that grows with the position. TVM 0.27 simplifies quotients that fall,
        such as (15 - p) // 8 * 8, to something else.
        """
        if self.dilation == 1:
            return end - position * self.stride
        whole = -(-end // self.dilation)
        return whole - tirx.floordiv(position * self.stride + (whole * self.dilation - end), self.dilation)

    def classes(self) -> list[tuple[int, ...]]:
        """The taps of each class of outputs: the first ones, all the inner ones as one, the last ones."""
        inner = self.inner
        return [self.taps(p) for p in (*range(inner.start), *inner[:1], *range(inner.stop, self.out))]

    def class_of(self, position: Any) -> Any:
        """Number in `classes` of output `position`, an int or a TIR expression."""
        inner = self.inner
        last = max(len(inner) - 1, 0)
        if len(inner) == self.out:
            return 0
        if isinstance(position, int):
            return min(position, inner.start) + max(position - inner.start - last, 0)
        return tirx.min(position, inner.start) + tirx.max(position - (inner.start + last), 0)

    @functools.cached_property
    def inner(self) -> range:
        """Outputs that have all their taps."""
        first = -(-self.before // self.stride)
        end = (self.size - 1 - (self.kernel - 1) * self.dilation + self.before) // self.stride + 1
        first, end = min(first, self.out), min(max(end, 0), self.out)
        return range(first, end) if first < end else range(self.out, self.out)


@dataclass(frozen=True)
class Run:
    """`repeat` tiles of `count` pixels each from pixel `start`; `inner` when all pixels have all taps."""

    start: int
    count: int
    repeat: int
    inner: bool


def tiles(axis: Axis, pixels: int) -> list[Run]:
    """The tiles of one row, at most `pixels` wide; equal neighbours are joined into one run."""
    sizes = [pixels] * (axis.out // pixels) + [axis.out % pixels] * bool(axis.out % pixels)
    found: list[Run] = []
    start = 0
    for count in sizes:
        inner = start in axis.inner and start + count - 1 in axis.inner
        last = found[-1] if found else None
        if last is not None and inner and last.inner and last.count == count:
            found[-1] = Run(last.start, count, last.repeat + 1, True)
        else:
            found.append(Run(start, count, 1, inner))
        start += count
    return found


def balanced(length: int, most: int) -> int:
    """The smallest tile width that needs no more tiles than width `most`."""
    return -(-length // -(-length // most))
