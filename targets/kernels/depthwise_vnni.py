"""int8 depthwise convolution with VPDPBUSD, which sums four products: four taps of one channel at a time.

The codes of four neighbouring taps are interleaved by two rounds of unpacking, which work within 128 bits and leave the
channels in another order; weights, bias and factors are packed in that order, and the saturating packs of the epilogue
undo it.
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
PIXELS = 5
DOT = {
    16: "llvm.x86.avx512.vpdpbusd.128",
    32: "llvm.x86.avx512.vpdpbusd.256",
    64: "llvm.x86.avx512.vpdpbusd.512",
}


def width(spec: Depthwise, device: Device) -> int:
    """Channels per block; 0 where this way does not apply."""
    plain = spec.dtype == "int8" and spec.epilogue.requant == "RQF" and not spec.residual
    if not (plain and device.has_vnni and device.lanes == 16 and spec.c >= 16):
        return 0
    return 64 if spec.c >= 64 else 32 if spec.c >= 32 else 16


def starts(channels: int, size: int) -> list[int]:
    """First channels of the blocks. The last one may repeat channels of the one before it."""
    return [*range(0, channels - size, size), channels - size]


def _order(size: int) -> np.ndarray:
    """[4, size / 4]: the channels of each accumulator."""
    quads = np.arange(size).reshape(size // 16, 4, 4)
    return quads.transpose(1, 0, 2).reshape(4, size // 4)


def pack(
    spec: Depthwise, device: Device, w: np.ndarray, bias: np.ndarray | None, m: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Weights [c, 1, kh, kw] to [blocks, kh, groups of taps, 4, size]; vectors to [blocks, 4, size / 4]."""
    size = width(spec, device)
    groups = -(-spec.kernel[1] // TAPS)
    taps = np.zeros((spec.c, spec.kernel[0], groups * TAPS), np.int8)
    taps[:, :, : spec.kernel[1]] = w[:, 0]
    # Codes are multiplied as code + 128.
    start = (0 if bias is None else bias) - 128 * w.astype(np.int64).sum((1, 2, 3))
    channels = np.stack([first + _order(size) for first in starts(spec.c, size)])
    packed = taps.reshape(spec.c, spec.kernel[0], groups, TAPS)[channels]
    # blocks, 4, size / 4, kh, groups, taps -> blocks, kh, groups, 4, size / 4, taps
    packed = np.ascontiguousarray(packed.transpose(0, 3, 4, 1, 2, 5))
    packed = packed.reshape(len(channels), spec.kernel[0], groups, 4, size)
    return packed, start.astype(np.int32)[channels], m[channels]


def prim_func(spec: Depthwise, device: Device) -> Any:
    """Parameters: x, packed weights, bias, m, y."""
    size = width(spec, device)
    lanes = size // 4
    rows, columns = spec.axes
    blocks = starts(spec.c, size)
    groups = -(-spec.kernel[1] // TAPS)
    _, pixels = spec.blocking(device)
    with common.prim_func(spec.name) as builder:
        x = param("x", (spec.h * spec.w * spec.c,), "int8")
        w = param("w", (len(blocks), *spec.kernel[:1], groups, 4, size), "int8")
        bias = param("bias", (len(blocks), 4, lanes), "int32")
        m = param("factor0", (len(blocks), 4, lanes), "float32")
        y = param("y", (rows.out * columns.out * spec.c,), "int8")
        acc = T.alloc_buffer((pixels, 4, lanes), "int32", scope="local")
        weights = T.alloc_buffer((4, size), "int8", scope="local")
        flip = const(-128, "int8", size)

        def unpack(a: Any, b: Any, unit: int) -> tuple[Any, Any]:
            """Units of `unit` bytes of the low and the high halves of every 128 bits, in turns."""
            halves = []
            for half in range(2):
                order = []
                for lane in range(0, size, 16):
                    for k in range(0, 8, unit):
                        first = lane + 8 * half + k
                        order += [first + e for e in range(unit)] + [size + first + e for e in range(unit)]
                halves.append(tirx.Shuffle([a, b], [const(k, "int32") for k in order]))
            return halves[0], halves[1]

        def add(p: int, codes: list[Any]) -> None:
            for k, value in enumerate(codes):
                product = intrinsic(
                    DOT[size], f"int32x{lanes}", acc[p, k, ramp(0, lanes)], value, weights[k, ramp(0, size)]
                )
                T.buffer_store(acc, product, [p, k, ramp(0, lanes)])

        def tile(row: Any, column: Any, run: Run, number: Any, channel: Any) -> None:
            for p in range(run.count):
                for k in range(4):
                    T.buffer_store(acc, bias[number, k, ramp(0, lanes)], [p, k, ramp(0, lanes)])
            border = const(spec.x_zp, "int8", size) ^ flip

            def load_weights(i: Any, group: int) -> None:
                for k in range(4):
                    T.buffer_store(weights, w[number, i, group, k, ramp(0, size)], [k, ramp(0, size)])

            def outside(i: Any) -> None:
                """A kernel row above or below the image, where all codes are zero's."""
                for group in range(groups):
                    load_weights(i, group)
                    for p in range(run.count):
                        add(p, [border] * 4)

            def kernel_row(i: Any) -> None:
                line = (row * rows.stride + i * rows.dilation - rows.before) * spec.w
                first = line + column * columns.stride - columns.before

                def code(p: int, j: int) -> Any:
                    if j >= spec.kernel[1]:
                        return const(0, "int8", size)
                    if j not in columns.taps(run.start + p):
                        return border
                    place = first + p * columns.stride + j * columns.dilation
                    return x[ramp(place * spec.c + channel, size)] ^ flip

                for group in range(groups):
                    load_weights(i, group)
                    for p in range(run.count):
                        a, b, c, d = (code(p, group * TAPS + t) for t in range(TAPS))
                        (low, high), (low2, high2) = unpack(a, b, 1), unpack(c, d, 1)
                        add(p, [*unpack(low, low2, 2), *unpack(high, high2, 2)])

            low, high = rows.bounds(row)
            if isinstance(high, int):
                loop(high, kernel_row)
            else:
                with T.serial(0, low) as i:
                    outside(i)
                with T.serial(low, high) as i:
                    kernel_row(i)
                with T.serial(high, spec.kernel[0]) as i:
                    outside(i)
            here = (row * columns.out + column) * spec.c + channel
            for p in range(run.count):
                T.buffer_store(y, _codes(acc, m, p, number), [ramp(here + p * spec.c, size)])

        def _codes(acc: Any, m: Any, p: int, number: Any) -> Any:
            e = spec.epilogue
            lo, hi = int(max(e.lo, -128)), int(min(e.hi, 127))
            rounded = []
            for k in range(4):
                real = acc[p, k, ramp(0, lanes)].astype(f"float32x{lanes}") * m[number, k, ramp(0, lanes)]
                if not e.bounded:
                    real = common.clamp(real, lo - e.y_zp, hi - e.y_zp, "float32", lanes)
                rounded.append(common.nearest(real, lanes, device))
            packed = common.pack_bytes(common.pack_words(rounded, lanes), e.y_zp, lanes)
            return common.clamp_codes(packed, lo, hi, size)

        def channels(row: Any, column: Any, run: Run) -> None:
            whole = len(blocks) - 1
            loop(whole, lambda b: tile(row, column, run, b, b * size))
            tile(row, column, run, whole, blocks[-1])

        def row_of_tiles(row: Any) -> None:
            for run in tiles(columns, pixels):
                loop(run.repeat, lambda t, run=run: channels(row, run.start + t * run.count, run))

        parallel(rows.out, row_of_tiles)
    return builder.get()
