"""Direct convolution on NHWC: also the matrix product (a 1x1 convolution over rows) and grouped convolution.

A register tile of `pixels` output pixels by `block` output channels is accumulated over kernel window and input
channels; weights are packed to [groups * blocks, kh, kw, ci / groups, block] so that the inner loop reads them in
order. Spatial padding is a padded copy of the input in scratch memory, which keeps the inner loop free of branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import Epilogue, loop, parallel, param, ramp, round_up, splat, vec
from edgec.targets.tir import T, tirx


@dataclass(frozen=True)
class Conv2D:
    """One sample, NHWC. padding is [top, bottom, left, right]; `x_zp` is the code in padded places (int8)."""

    h: int
    w: int
    ci: int
    co: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "float32"
    x_zp: int = 0
    epilogue: Epilogue = field(default_factory=Epilogue)

    name = "conv2d"

    @property
    def out(self) -> tuple[int, int]:
        size = (self.h, self.w)
        return tuple(  # type: ignore[return-value]
            (size[i] + self.padding[2 * i] + self.padding[2 * i + 1] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )

    @property
    def macs(self) -> int:
        oh, ow = self.out
        return oh * ow * self.co * self.kernel[0] * self.kernel[1] * (self.ci // self.groups)

    @property
    def residual(self) -> bool:
        return self.epilogue.residual or self.epilogue.add is not None

    @property
    def inplace(self) -> tuple[int, ...]:
        """The output may overwrite the residual: every element is read right before it is written."""
        return (self.parameters - 2,) if self.residual else ()

    @property
    def parameters(self) -> int:
        return 4 + (2 if self.dtype == "int8" else 0) + self.residual

    def key(self) -> str:
        return repr(self)

    def blocking(self, device: Device) -> tuple[int, int, int]:
        """(lanes, channels per block, pixels per tile): accumulators fill about two thirds of the registers."""
        lanes = device.lanes
        vectors = 2 if self.co // self.groups > lanes else 1
        accumulators = 12 if device.registers >= 32 else 8 if device.registers >= 16 else 4
        most = max(1, accumulators // vectors)
        _, ow = self._walk()
        tiles = -(-ow // most)
        return lanes, vectors * lanes, -(-ow // tiles)

    def _walk(self) -> tuple[int, int]:
        """Output rows and columns as walked: a pointwise convolution without padding is one long row."""
        oh, ow = self.out
        plain = self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)
        return (1, oh * ow) if plain else (oh, ow)

    def pack(
        self,
        device: Device,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
    ) -> tuple[np.ndarray, ...]:
        """Weights OIHW and per-channel vectors to the order of the kernel's parameters, padded to whole blocks."""
        _, block, _ = self.blocking(device)
        per_group = self.co // self.groups
        padded = round_up(per_group, block)
        kh, kw = self.kernel
        grouped = np.zeros((self.groups, padded, self.ci // self.groups, kh, kw), w.dtype)
        grouped[:, :per_group] = w.reshape(self.groups, per_group, self.ci // self.groups, kh, kw)
        packed = grouped.reshape(self.groups * (padded // block), block, self.ci // self.groups, kh, kw)
        packed = np.ascontiguousarray(packed.transpose(0, 3, 4, 2, 1))

        def channels(values: np.ndarray | None, dtype: str, fill: int = 0) -> np.ndarray:
            full = np.full((self.groups, padded), fill, dtype)
            if values is not None:
                full[:, :per_group] = values.reshape(self.groups, per_group)
            return full.reshape(-1)

        if self.dtype == "float32":
            return packed, channels(bias, "float32")
        return packed, channels(bias, "int32"), channels(m, "int32"), channels(shift, "int32", 1)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, packed weights, bias, [m, shift], [residual], y."""
        lanes, block, pixels = self.blocking(device)
        kh, kw = self.kernel
        cig = self.ci // self.groups
        blocks = round_up(self.co // self.groups, block) // block
        oh, ow = self.out
        rows, columns = self._walk()
        acc_type = "int32" if self.dtype == "int8" else "float32"
        flat = (rows, columns) != (oh, ow)
        top, bottom, left, right = self.padding
        hp, wp = self.h + top + bottom, self.w + left + right
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.h * self.w, self.ci) if flat else (self.h, self.w, self.ci), self.dtype)
            w = param("w", (self.groups * blocks, kh, kw, cig, block), self.dtype)
            bias = param("bias", (self.groups * blocks * block,), acc_type)
            m = shift = None
            if self.dtype == "int8":
                m = param("m", (self.groups * blocks * block,), "int32")
                shift = param("shift", (self.groups * blocks * block,), "int32")
            residual = param("residual", (rows, columns, self.co), self.dtype) if self.residual else None
            y = param("y", (rows, columns, self.co), self.dtype)
            source = x
            if any(self.padding):
                source = T.alloc_buffer((hp, wp, self.ci), self.dtype)
                pad_copy(x, source, (self.h, self.w, self.ci), self.padding, self.x_zp, self.dtype)
            acc = T.alloc_buffer((pixels, block), acc_type, scope="local")
            tail = T.alloc_buffer((lanes,), self.dtype, scope="local")

            def pixel(row: Any, column: Any, i: Any, j: Any, channel: Any) -> Any:
                if flat:
                    return source[column, channel]
                return source[
                    row * self.stride[0] + i * self.dilation[0], column * self.stride[1] + j * self.dilation[1], channel
                ]

            def tile(group: Any, number: Any, row: Any, column: Any, count: int, channels: int) -> None:
                index = group * blocks + number
                offset = index * block
                used = -(-channels // lanes)
                for p in range(count):
                    for v in range(used):
                        T.buffer_store(acc, bias[ramp(offset + v * lanes, lanes)], [p, ramp(v * lanes, lanes)])

                def step(i: Any, j: Any, k: Any) -> None:
                    # Weights first: one vector load serves all pixels of the tile.
                    values = [w[index, i, j, k, ramp(v * lanes, lanes)] for v in range(used)]
                    for p in range(count):
                        xv = pixel(row, column + p, i, j, group * cig + k)
                        for v in range(used):
                            here = [p, ramp(v * lanes, lanes)]
                            product = multiply(xv, values[v], self.dtype, lanes)
                            T.buffer_store(acc, acc[p, ramp(v * lanes, lanes)] + product, here)

                loop(kh, lambda i: loop(kw, lambda j: loop(cig, lambda k: step(i, j, k))))
                first = group * (self.co // self.groups) + number * block
                for p in range(count):
                    for v in range(used):
                        store_vector(
                            acc[p, ramp(v * lanes, lanes)],
                            (m, shift, offset + v * lanes),
                            residual,
                            y,
                            (row, column + p, first + v * lanes),
                            (lanes, min(lanes, channels - v * lanes)),
                            tail,
                            self,
                            device,
                        )

            def row_of_tiles(group: Any, number: Any, row: Any, channels: int) -> None:
                full, rest = divmod(columns, pixels)
                loop(full, lambda t: tile(group, number, row, t * pixels, pixels, channels))
                if rest:
                    tile(group, number, row, full * pixels, rest, channels)

            def group_body(group: Any) -> None:
                whole, rest = divmod(self.co // self.groups, block)
                parallel(whole, lambda b: parallel(rows, lambda r: row_of_tiles(group, b, r, block)))
                if rest:
                    parallel(rows, lambda r: row_of_tiles(group, whole, r, rest))

            parallel(self.groups, group_body)
        return builder.get()

    def reference(
        self,
        x: np.ndarray,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
        residual: np.ndarray | None = None,
    ) -> np.ndarray:
        """NumPy meaning on unpacked weights: x [h, w, ci], w OIHW, result [oh, ow, co]."""
        acc = accumulate(x, w, self)
        return finish(acc, bias, m, shift, residual, self.epilogue, self.dtype)


def multiply(x: Any, w: Any, dtype: str, lanes: int) -> Any:
    """Broadcast x times the vector w. int8 goes through int16, which is what NEON's widening multiply takes."""
    if dtype == "float32":
        return splat(x, lanes) * w
    wide = splat(x.astype("int16").astype("int32"), lanes)
    return wide * w.astype(vec("int16", lanes)).astype(vec("int32", lanes))


def pad_copy(x: Any, padded: Any, shape: tuple[int, int, int], padding: Sequence[int], value: int, dtype: str) -> None:
    """Copy an NHWC map into the middle of a larger one and fill the border."""
    h, w, c = shape
    top, bottom, left, right = padding
    wp = w + left + right
    fill = tirx.const(value, dtype)

    def border(row: Any, first: int, count: int) -> None:
        loop(count, lambda j: loop(c, lambda k: T.buffer_store(padded, fill, [row, first + j, k])))

    def row(i: Any) -> None:
        border(i + top, 0, left)
        loop(w, lambda j: loop(c, lambda k: T.buffer_store(padded, x[i, j, k], [i + top, j + left, k])))
        border(i + top, left + w, right)

    loop(top, lambda i: border(i, 0, wp))
    loop(h, row)
    loop(bottom, lambda i: border(i + (top + h), 0, wp))


def store_vector(
    value: Any,
    scale: tuple[Any, Any, Any],
    residual: Any,
    y: Any,
    at: tuple[Any, Any, Any],
    size: tuple[int, int],
    tail: Any,
    spec: Any,
    device: Device,
) -> None:
    """Apply `spec`'s epilogue and store `size[1]` of `size[0]` lanes; a partial vector goes through `tail`, by lane."""
    lanes, valid = size
    m, shift, offset = scale
    row, column, channel = at
    here = [row, column, ramp(channel, lanes)]
    other = None
    if residual is not None:
        if valid == lanes:
            other = residual[row, column, ramp(channel, lanes)]
        else:
            for lane in range(lanes):
                source = residual[row, column, channel + lane] if lane < valid else tirx.const(0, spec.dtype)
                T.buffer_store(tail, source, [lane])
            other = tail[ramp(0, lanes)]
    if spec.dtype == "int8":
        here_m, here_shift = m[ramp(offset, lanes)], shift[ramp(offset, lanes)]
        result = common.store_code(value, here_m, here_shift, other, spec.epilogue, lanes, device)
    else:
        result = common.activate(value if other is None else value + other, spec.epilogue, lanes)
    if valid == lanes:
        T.buffer_store(y, result, here)
        return
    T.buffer_store(tail, result, [ramp(0, lanes)])
    for lane in range(valid):
        T.buffer_store(y, tail[lane], [row, column, channel + lane])


def accumulate(x: np.ndarray, w: np.ndarray, spec: Any) -> np.ndarray:
    """Exact sums of products [oh, ow, co]: int64 for integers, float64 for floats. Padding holds `x_zp`."""
    exact = np.int64 if spec.dtype == "int8" else np.float64
    top, bottom, left, right = spec.padding
    padded = np.pad(x.astype(exact), ((top, bottom), (left, right), (0, 0)), constant_values=spec.x_zp)
    oh, ow = spec.out
    co, cig, kh, kw = w.shape
    groups = spec.groups
    acc = np.zeros((oh, ow, co), exact)
    for i in range(kh):
        for j in range(kw):
            y0, x0 = i * spec.dilation[0], j * spec.dilation[1]
            window = padded[y0 : y0 + (oh - 1) * spec.stride[0] + 1 : spec.stride[0]]
            window = window[:, x0 : x0 + (ow - 1) * spec.stride[1] + 1 : spec.stride[1]]
            window = window.reshape(oh, ow, groups, cig)
            taps = w[:, :, i, j].astype(exact).reshape(groups, co // groups, cig)
            acc += np.einsum("hwgc,goc->hwgo", window, taps).reshape(oh, ow, co)
    return acc


def finish(
    acc: np.ndarray,
    bias: np.ndarray | None,
    m: np.ndarray | None,
    shift: np.ndarray | None,
    residual: np.ndarray | None,
    epilogue: Epilogue,
    dtype: str,
) -> np.ndarray:
    """Bias and epilogue in NumPy."""
    if bias is not None:
        acc = acc + bias
    if dtype == "int8":
        assert m is not None and shift is not None
        return common.code_reference(acc, m, shift, residual, epilogue)
    if residual is not None:
        acc = acc + residual
    return common.activate_reference(acc, epilogue).astype(np.float32)
