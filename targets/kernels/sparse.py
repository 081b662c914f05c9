"""Convolution with pruned blocks of weights (1xN and N by 4k): the dense kernel's tile, over the blocks that are kept.

A block is N consecutive output channels at a few consecutive input channels, with all taps; N is a multiple of the
output channels that one register tile computes, so all sums of a tile want the same inputs. Instead of the next group
of input channels, the inner loop takes the one that a table of offsets names: no branches, weights in order. The table
holds one or two bytes for each block and column of the window.

Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks", TPAMI 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from edgec.targets import sparsity
from edgec.targets.device import Device
from edgec.targets.kernels.common import const, loop, parallel, param, pieces, ramp
from edgec.targets.kernels.conv2d import Conv2D, Tile
from edgec.targets.kernels.dot import Dot, Lane, Sdot, Smmla, Vnni, Widening, dot, pack_weights
from edgec.targets.kernels.unpack import Packed
from edgec.targets.tir import T, tirx

# Where groups keep different numbers of blocks, zeros fill them up if this makes the layer larger by no more.
FILLING = 1.03
# Vectors of codes that one task of a parallel loop flips.
FLIPPED = 64
# Rows and columns of outputs from which a copy with a border pays on 64-bit Arm: 5 to 10 % fewer instructions at 16 and
# 32, but 3 % more at 8, where products of the border weigh more than the loops that it saves.
COPIED = 16


@dataclass(frozen=True)
class SparseConv2D(Conv2D):
    """A convolution without groups whose weights are zero outside some blocks.

    block: (output channels, input channels). kept: most blocks that a group of block[0] output channels keeps. nnz:
    blocks kept in all; kept times the number of groups where the loops run equally long for all groups.
    """

    block: tuple[int, int] = (1, 1)
    kept: int = 1
    nnz: int = 1

    name = "conv2d_sparse"

    @property
    def tile(self) -> type[Tile]:
        return _SparseTile

    @property
    def macs(self) -> int:
        """Multiplications that are left."""
        oh, ow = self.out
        return oh * ow * math.prod(self.kernel) * self.block[1] * self.nnz * self.co // self.output_groups

    @property
    def output_groups(self) -> int:
        return -(-self.co // self.block[0])

    @property
    def balanced(self) -> bool:
        return self.nnz == self.kept * self.output_groups

    @property
    def parameters(self) -> int:
        return super().parameters + 1 + (not self.balanced)

    def dot(self, device: Device) -> Dot:
        return sparse_dot(device, self.dtype, self.block[1], math.prod(self.out))

    def packed(self, device: Device) -> Packed | None:
        return None  # codes of few bits keep a byte each: the blocks that are gone have taken more

    def prepared(self, x: Any, device: Device) -> Any:
        """VNNI takes unsigned codes. One vector of sums uses an input once, so flipping it there would cost as much as
        the product: all inputs are flipped before."""
        how = self.dot(device)
        if not (isinstance(how, Vnni) and how.flipped):
            return x
        size = self.h * self.w * self.ci
        y = T.alloc_buffer((size,), self.dtype)

        def flip(start: Any, count: int) -> None:
            at = ramp(start, count)
            T.buffer_store(y, tirx.bitwise_xor(x[at], const(-128, "int8", count)), [at])

        vector, task = 4 * how.lanes, FLIPPED * 4 * how.lanes
        parallel(size // task, lambda i: loop(FLIPPED, lambda j: flip(i * task + j * vector, vector)))
        done = size // task * task
        loop((size - done) // vector, lambda j: flip(done + j * vector, vector))
        done += (size - done) // vector * vector
        for start, count in pieces(size - done, vector):
            flip(done + start, count)
        return y

    def expanded(self, device: Device) -> Conv2D:
        """Of a copy with its padding where that was measured to pay: all tiles then walk whole rows of the window, in
        loops whose bounds are known. Elsewhere a border tile has a short loop for each column."""
        wide = self.kernel == (3, 3) and self.stride == (1, 1) and min(self.out) >= COPIED
        if not (device.is_arm64 and self.dtype == "float32" and wide and any(self.padding)):
            return super().expanded(device)
        top, bottom, left, right = self.padding
        return replace(self, h=self.h + top + bottom, w=self.w + left + right, padding=(0, 0, 0, 0))

    def depth(self, device: Device) -> int:
        return self.kept * (self.block[1] // self.dot(device).group)

    def divides(self, block: int) -> bool:
        return self.block[0] % block == 0

    @property
    def offset_type(self) -> str:
        most = ((self.kernel[1] - 1) * self.dilation[1] + 1) * self.ci // self.block[1]
        return "uint8" if most <= 1 << 8 else "uint16" if most <= 1 << 16 else "int32"

    def product_params(self, device: Device, blocks: int) -> list[Any]:
        table = (self.output_groups, self.kernel[1] * self.kept)
        params = [*super().product_params(device, blocks), param("offsets", table, self.offset_type)]
        return params if self.balanced else [*params, param("counts", (self.output_groups,), "int32")]

    def pack_products(self, w: np.ndarray, device: Device, block: int, mask: np.ndarray | None = None) -> tuple:
        """Weights, offsets in units of block[1] elements for each group, column and kept block, and counts.

        mask: [groups of outputs, blocks of inputs], what is kept. Groups that keep less than `kept` end in zeros.
        """
        assert mask is not None, "a sparse convolution is packed with its mask"
        (outputs, inputs), how = self.block, self.dot(device)
        counts = mask.sum(1).astype(np.int32)
        table = np.zeros((len(mask), self.kernel[1] * self.kept), self.offset_type)
        packed = []
        for g, row in enumerate(mask):
            # A balanced group that keeps less multiplies its first blocks by zero.
            count = self.kept if self.balanced else int(counts[g])
            there = np.flatnonzero(row)
            number = np.concatenate([there, np.zeros(count - len(there), np.int64)])
            columns = np.arange(self.kernel[1])[:, None] * (self.dilation[1] * self.ci // inputs)
            table[g, : self.kernel[1] * count] = (columns + number).reshape(-1)
            ours = w[:, g * outputs : (g + 1) * outputs]
            ours = ours.reshape(*ours.shape[:-1], -1, inputs)[..., there, :]
            full = np.zeros((*ours.shape[:-2], count, inputs), w.dtype)
            full[..., : len(there), :] = ours
            part = pack_weights(full.reshape(*full.shape[:-2], -1), how, block)
            filled = np.zeros(
                (*part.shape[:2], self.kernel[1] * self.kept * inputs // how.group, *part.shape[3:]), w.dtype
            )
            filled[:, :, : part.shape[2]] = part
            packed.append(filled)
        return (np.concatenate(packed), table, *([] if self.balanced else [counts]))

    def reference(self, x: np.ndarray, w: np.ndarray, *rest: Any, mask: Any = None, **named: Any) -> np.ndarray:
        """As `Conv2D.reference`: weights outside the mask are zero."""
        return super().reference(x, w, *rest, **named)


class _SparseTile(Tile):
    """The tile of a convolution that walks blocks by their offsets."""

    spec: SparseConv2D

    @property
    def whole_rows(self) -> bool:
        return True

    def _group(self, index: Any) -> Any:
        """The group of output channels that block `index` belongs to."""
        ratio = self.spec.block[0] // self.block
        return index if ratio == 1 else index // ratio if isinstance(index, int) else tirx.floordiv(index, ratio)

    def depth(self, index: Any) -> Any:
        per_block = self.spec.block[1] // self.how.group
        return (self.spec.kept if self.spec.balanced else self.extra[1][self._group(index)]) * per_block

    def place(self, index: Any, k: Any) -> Any:
        group, inputs = self.how.group, self.spec.block[1]
        per_block = inputs // group
        if isinstance(k, int):
            number, rest = divmod(k, per_block)
        else:
            number, rest = tirx.floordiv(k, per_block), tirx.floormod(k, per_block)
        return self.extra[0][self._group(index), number].astype("int32") * inputs + rest * group


def sparse_dot(device: Device, dtype: str, inputs: int, pixels: int) -> Dot:
    """How blocks of `inputs` input channels are multiplied: as dense ones, with loads that do not leave the block."""
    how = dot(device, dtype, inputs, pixels)
    if isinstance(how, Smmla) and inputs % how.group:
        how = Sdot(4)
    if inputs % how.group:
        return Widening(device.lanes)
    if isinstance(how, Vnni):
        return replace(how, flipped=True)
    if inputs % (how.group * how.wide) == 0:
        return how
    if isinstance(how, Sdot) and inputs % 8 == 0:
        return replace(how, wide=2)
    return Dot(how.lanes, dtype=dtype) if isinstance(how, Lane) else replace(how, wide=1)


def blocks_of(mask: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """[groups, blocks]: which blocks of `block` (outputs, inputs) have a kept element of mask [o, i, ...]."""
    outputs, inputs = block
    flat: np.ndarray = mask.reshape(*mask.shape[:2], -1).max(2)
    full = np.zeros((-(-len(flat) // outputs) * outputs, flat.shape[1]), bool)
    full[: len(flat)] = flat
    return full.reshape(-1, outputs, flat.shape[1] // inputs, inputs).max((1, 3))


def options(device: Device, outputs: int, inputs: int) -> Iterator[tuple[int, int]]:
    """Blocks that the kernel can walk in a layer of these sizes."""
    for c in (1, 2, 4, 8, 16):
        if inputs % c == 0:
            yield from ((n, c) for n in range(device.lanes, 64 + 1, device.lanes) if n < outputs + device.lanes)


def sparse(spec: Conv2D, mask: np.ndarray, block: tuple[int, int]) -> tuple[SparseConv2D, np.ndarray]:
    """`spec` over the blocks that have a kept element, and which they are, for `pack`.

    block: (output channels, a multiple of a register's; input channels, a divisor of the layer's).
    """
    there = blocks_of(mask, block)
    counts = there.sum(1)
    kept, nnz = max(1, int(counts.max())), int(counts.sum())
    if kept * len(there) <= FILLING * nnz or nnz == 0:
        nnz = kept * len(there)
    same = {f.name: getattr(spec, f.name) for f in fields(Conv2D)}
    return SparseConv2D(**same, block=block, kept=kept, nnz=nnz), there


def fastest(spec: Conv2D, mask: np.ndarray, device: Device) -> tuple[Conv2D, np.ndarray | None]:
    """The sparse kernel for a pruned layer and its blocks, or `spec` and None where the dense one is faster.

    Whatever pattern the mask has, it is walked in the blocks that `edgec.targets.sparsity` expects most of: an estimate
    of the time against the dense kernel is the density of the blocks over the density at which both are equal.
    """
    if spec.groups > 1:
        return spec, None
    kernel = "1x1" if spec.kernel == (1, 1) else "3x3"
    best, chosen = 1.0, None
    for block in options(device, spec.co, spec.ci):
        even = sparsity.break_even(device, spec.dtype, block, kernel)
        if even is None:
            continue
        cost = float(blocks_of(mask, block).mean()) / even
        if cost < best:
            best, chosen = cost, block
    return (spec, None) if chosen is None else sparse(spec, mask, chosen)
