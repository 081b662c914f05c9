"""int8 depthwise convolution with dot products, VPDPBUSD or SDOT: four taps of one channel are summed at a time.

The codes of four neighbouring taps are interleaved by two rounds of unpacking (UNPCK, ZIP), which work within 128 bits
and leave longer registers' channels in another order; weights, bias and factors are packed in that order, and the
saturating packs of the epilogue undo it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, intrinsic, loop, parallel, param, ramp
from edgec.targets.kernels.tiling import Run, tiles
from edgec.targets.tir import T, tirx

if TYPE_CHECKING:
    from edgec.targets.kernels.depthwise import Depthwise

TAPS = 4
# Pixels of a tile, each with four accumulators.
PIXELS = 4
DOT = {
    16: "llvm.x86.avx512.vpdpbusd.128",
    32: "llvm.x86.avx512.vpdpbusd.256",
    64: "llvm.x86.avx512.vpdpbusd.512",
}
SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"
PIXELS = 4


def applies(spec: Depthwise, device: Device) -> bool:
    """Whether the kernel is compiled this way."""
    plain = spec.dtype == "int8" and spec.epilogue.requant == "RQF" and not spec.residual and spec.c >= 16
    return plain and (offset(device) > 0 or (device.is_arm64 and device.has_dot))


def offset(device: Device) -> int:
    """What is added to codes before they are multiplied: VPDPBUSD takes unsigned ones."""
    return 128 if device.has_vnni and device.lanes == 16 else 0


def blocks(channels: int, device: Device) -> list[tuple[int, int]]:
    """(first channel, size) of all blocks. The last one may repeat channels of the one before it."""
    size = next(s for s in (64, 32, 16) if s <= min(channels, device.vector_bytes))
    rest = channels % size
    tail = next(s for s in (16, 32, 64) if s >= rest) if rest else 0
    return [(first, size) for first in range(0, channels - rest, size)] + [(channels - tail, tail)] * bool(tail)


def _order(size: int) -> np.ndarray:
    """[4, size / 4]: the channels of each accumulator."""
    quads = np.arange(size).reshape(size // 16, 4, 4)
    return quads.transpose(1, 0, 2).reshape(4, size // 4)


def pack(
    spec: Depthwise, device: Device, w: np.ndarray, bias: np.ndarray | None, m: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Flat, block by block: weights [c, 1, kh, kw] as [kh, groups of taps, 4, size], vectors as [4, size / 4]."""
    groups = -(-spec.kernel[1] // TAPS)
    taps = np.zeros((spec.c, spec.kernel[0], groups * TAPS), np.int8)
    taps[:, :, : spec.kernel[1]] = w[:, 0]
    taps = taps.reshape(spec.c, spec.kernel[0], groups, TAPS)
    start = (0 if bias is None else bias) - offset(device) * w.astype(np.int64).sum((1, 2, 3))
    channels = [first + _order(size) for first, size in blocks(spec.c, device)]
    # 4, size / 4, kh, groups, taps -> kh, groups, 4, size / 4, taps
    packed = np.concatenate([taps[c].transpose(2, 3, 0, 1, 4).ravel() for c in channels])
    order = np.concatenate([c.ravel() for c in channels])
    return packed, start.astype(np.int32)[order], m[order]


def prim_func(spec: Depthwise, device: Device) -> Any:
    """Parameters: x, packed weights, bias, m, y."""
    rows, columns = spec.axes
    parts = blocks(spec.c, device)
    groups = -(-spec.kernel[1] // TAPS)
    _, pixels = spec.blocking(device)
    channels = sum(size for _, size in parts)
    with common.prim_func(spec.name) as builder:
        x = param("x", (spec.h * spec.w * spec.c,), "int8")
        w = param("w", (channels * spec.kernel[0] * groups * TAPS,), "int8")
        bias = param("bias", (channels,), "int32")
        m = param("factor0", (channels,), "float32")
        y = param("y", (rows.out * columns.out * spec.c,), "int8")
        code = _Block(spec, device, pixels, groups, x, w, bias, m, y)
        main = [part for part in parts if part[1] == parts[0][1]]

        def all_channels(row: Any, column: Any, run: Run) -> None:
            size = main[0][1]
            whole = sum(first == i * size for i, (first, _) in enumerate(main))
            loop(whole, lambda b: code.tile(row, column, run, b * size, b * size, size))
            for i, (first, size) in enumerate(parts[whole:], whole):
                code.tile(row, column, run, sum(s for _, s in parts[:i]), first, size)

        def row_of_tiles(row: Any) -> None:
            for run in tiles(columns, pixels):
                loop(run.repeat, lambda t, run=run: all_channels(row, run.start + t * run.count, run))

        parallel(rows.out, row_of_tiles)
    return builder.get()


class _Block:
    """Code of a tile of pixels by a block of channels."""

    def __init__(
        self, spec: Depthwise, device: Device, pixels: int, groups: int, x: Any, w: Any, bias: Any, m: Any, y: Any
    ) -> None:
        self.spec, self.device, self.groups = spec, device, groups
        self.x, self.w, self.bias, self.m, self.y = x, w, bias, m, y
        sizes = sorted({size for _, size in blocks(spec.c, device)})
        self.acc = {s: T.alloc_buffer((pixels, 4, s // 4), "int32", scope="local") for s in sizes}
        self.weights = {s: T.alloc_buffer((4, s), "int8", scope="local") for s in sizes}

    def tile(self, row: Any, column: Any, run: Run, place: Any, channel: Any, size: int) -> None:
        """Channels channel .. channel + size, whose weights and vectors start at `place` of the packed order."""
        spec, x = self.spec, self.x
        rows, columns = spec.axes
        lanes = size // 4
        acc, weights = self.acc[size], self.weights[size]
        depth = spec.kernel[0] * self.groups * TAPS
        zero = const(0, "int8", size)

        def shifted(codes: Any) -> Any:
            return codes ^ const(-128, "int8", size) if offset(self.device) else codes

        border = shifted(const(spec.x_zp, "int8", size))
        for p in range(run.count):
            for k in range(4):
                T.buffer_store(acc, self.bias[ramp(place + k * lanes, lanes)], [p, k, ramp(0, lanes)])

        def load_weights(i: Any, group: int) -> None:
            for k in range(4):
                here = place * depth + ((i * self.groups + group) * 4 + k) * size
                T.buffer_store(weights, self.w[ramp(here, size)], [k, ramp(0, size)])

        def add(p: int, codes: list[Any]) -> None:
            for k, value in enumerate(codes):
                operands = acc[p, k, ramp(0, lanes)], value, weights[k, ramp(0, size)]
                name = DOT[size] if offset(self.device) else SDOT
                T.buffer_store(acc, intrinsic(name, f"int32x{lanes}", *operands), [p, k, ramp(0, lanes)])

        def outside(i: Any) -> None:
            """A kernel row above or below the image, where every code is that of zero."""
            for group in range(self.groups):
                load_weights(i, group)
                for p in range(run.count):
                    add(p, [border] * 4)

        def kernel_row(i: Any) -> None:
            line = (row * rows.stride + i * rows.dilation - rows.before) * spec.w
            first = line + column * columns.stride - columns.before

            there = {
                p * columns.stride + j * columns.dilation for p in range(run.count) for j in columns.taps(run.start + p)
            }

            def code(p: int, j: int) -> Any:
                place = p * columns.stride + j * columns.dilation
                if j < spec.kernel[1] and j not in columns.taps(run.start + p):
                    return border
                # A tap that fills up four has no weight: it is what a neighbour loads, so that they share an unpacking.
                return shifted(x[ramp((first + place) * spec.c + channel, size)]) if place in there else zero

            for group in range(self.groups):
                load_weights(i, group)
                for p in range(run.count):
                    a, b, c, d = (code(p, group * TAPS + t) for t in range(TAPS))
                    (low, high), (low2, high2) = unpack(a, b, 1, size), unpack(c, d, 1, size)
                    add(p, [*unpack(low, low2, 2, size), *unpack(high, high2, 2, size)])

        low, high = rows.bounds(row)
        if isinstance(high, int):
            loop(high, kernel_row)
        else:
            for begin, end, body in ((0, low, outside), (low, high, kernel_row), (high, spec.kernel[0], outside)):
                with T.serial(begin, end) as i:
                    body(i)
        here = (row * columns.out + column) * spec.c + channel
        for p in range(run.count):
            T.buffer_store(self.y, self._codes(p, place, size), [ramp(here + p * spec.c, size)])

    def _codes(self, p: int, place: Any, size: int) -> Any:
        e, lanes = self.spec.epilogue, size // 4
        sums = [self.acc[size][p, k, ramp(0, lanes)] for k in range(4)]
        factors = [self.m[ramp(place + k * lanes, lanes)] for k in range(4)]
        if not offset(self.device):
            return common.finish(sums, [[f] for f in factors], [], e, "int8", lanes, self.device)
        lo, hi = int(max(e.lo, -128)), int(min(e.hi, 127))
        rounded = []
        for acc, factor in zip(sums, factors, strict=True):
            real = acc.astype(f"float32x{lanes}") * factor
            if not e.bounded:
                real = common.clamp(real, lo - e.y_zp, hi - e.y_zp, "float32", lanes)
            rounded.append(common.nearest(real, lanes, self.device))
        packed = common.pack_bytes(common.pack_words(rounded, lanes), e.y_zp, lanes)
        return common.clamp_codes(packed, lo, hi, size)


def unpack(a: Any, b: Any, unit: int, size: int) -> tuple[Any, Any]:
    """Units of `unit` bytes of a and b in turns, from the low and from the high half of every 128 bits."""
    halves = []
    for half in range(2):
        order = []
        for lane in range(0, size, 16):
            for k in range(0, 8, unit):
                first = lane + 8 * half + k
                order += [first + e for e in range(unit)] + [size + first + e for e in range(unit)]
        halves.append(tirx.Shuffle([a, b], [const(k, "int32") for k in order]))
    return halves[0], halves[1]
