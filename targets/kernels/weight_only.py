"""Float layers whose weights are stored as codes of two to eight bits with one scale for each group of input channels.

Activations, sums and results are float32. The weights of a block of output channels are unpacked and scaled once,
into a buffer of the kernel, before all pixels read them; then the layer is the direct convolution of `conv2d`. A linear
layer of few rows unpacks in registers instead: the sum over each group is scaled, and groups are added in their order.

Codes are converted to float32 where `unpack` leaves them, at the top of their byte; stored scales are smaller by as
much, which is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.integer import dequantize_weight
from edgec.packing import FORMATS
from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import const, lanes_of, loop, parallel, param, pieces, ramp, round_up, splat, vec
from edgec.targets.kernels.conv2d import Blocking, Conv2D, either, store_channels
from edgec.targets.kernels.unpack import Packed
from edgec.targets.tir import T, tirx

# Codes that are unpacked together: a register of them, where a block has so many channels.
CODES = 16
# Rows of a linear layer below which each of them unpacks the weights anew, in registers.
ROWS = 8


@dataclass(frozen=True)
class CodedConv2D(Conv2D):
    """A convolution or linear layer (see `Conv2D`) with weight scale * (code - zero) in float32.

    group: input channels that share a scale. zeros: whether groups have zero points; without, they are zero.
    """

    group: int = 0
    zeros: bool = False

    name = "conv2d_w"

    @property
    def beside(self) -> tuple[str, ...]:
        return ("float32", "int8") if self.zeros else ("float32",)

    @property
    def scales(self) -> int:
        """Groups of input channels."""
        return -(-self.ci // self.group)

    def packed(self, device: Device) -> Packed:
        form = min((f for f in FORMATS.values() if self.bits <= f.bits), key=lambda f: (f.size(self.ci), -f.bits))
        rows = (
            math.prod(self.out) if self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding) else ROWS
        )
        whole = self.scales == 1 or self.group % form.fields == 0
        return Packed(form, self.ci, 8 - form.bits, hoisted=rows >= ROWS or not whole)

    def candidates(self, device: Device) -> list[Blocking]:
        if self.packed(device).hoisted:
            return super().candidates(device)
        rows = math.prod(self.out)
        # Sums of a group and of all of them, an input, and a few registers to unpack in.
        most = max(1, min(8, (device.registers - 4) // (2 * rows), -(-self.co // device.lanes)))
        return [Blocking(rows, vectors, True) for vectors in range(most, 0, -1)]

    def pack_products(  # type: ignore[override]
        self, w: np.ndarray, device: Device, block: int, scale: np.ndarray, zero: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Codes, and scales and zero points [outputs, groups], in blocks of output channels filled with zeros."""
        blocks = round_up(self.co, block) // block

        def blocked(values: np.ndarray) -> np.ndarray:
            """[outputs, ...] to [blocks, ..., block]."""
            full = np.zeros((blocks * block, *values.shape[1:]), values.dtype)
            full[: self.co] = values
            return np.ascontiguousarray(np.moveaxis(full.reshape(blocks, block, *values.shape[1:]), 1, -1))

        # b i j c o -> b i (j c) 1 o
        codes = blocked(w[0]).reshape(blocks, self.kernel[0], -1, 1, block)
        fraction = self.packed(device).fraction
        scale = np.ldexp(scale, -fraction).astype(np.float32)
        zero = None if zero is None else (zero << fraction).astype(np.int8)
        beside = [blocked(values) for values in (scale, zero) if values is not None]
        return self.packed(device).pack(codes)[..., 0, :], *beside

    def product_params(self, device: Device, blocks: int) -> list[Any]:
        packing, block = self.packed(device), self.blocking(device).vectors * device.lanes
        shape = (blocks, self.kernel[0], self.kernel[1] * packing.units, packing.form.nbytes * block)
        found = [param("w", shape, "int8")]
        return found + [param(f"beside{i}", (blocks, self.scales, block), t) for i, t in enumerate(self.beside)]

    def unpack(self, packing: Packed, products: list[Any], block: Any, target: Any, place: Any, elements: int) -> None:
        w, *beside = products
        _, kh, taps, vectors, lanes = (int(extent) for extent in target.shape)
        fields = packing.form.fields

        def unit(i: Any, j: Any, u: Any, count: int) -> None:
            for field in range(count):
                channel = u * fields + field
                group = tirx.floordiv(channel, self.group) if self.scales > 1 else 0
                row = j * packing.units + u
                values = self._values(packing, w, beside, (block, i, row), group, field, vectors, lanes)
                for v, value in enumerate(values):
                    scaled = value * beside[0][block, group, ramp(v * lanes, lanes)]
                    T.buffer_store(target, scaled, [place, i, j * packing.depth + channel, v, ramp(0, lanes)])

        def tap(i: Any, j: Any) -> None:
            whole, rest = divmod(packing.depth, fields)
            loop(whole, lambda u: unit(i, j, u, fields))
            if rest:
                unit(i, j, whole, rest)

        loop(kh, lambda i: loop(taps // packing.depth, lambda j: tap(i, j)))

    def _values(
        self,
        packing: Packed,
        w: Any,
        beside: list[Any],
        row: tuple[Any, Any, Any],
        group: Any,
        field: int,
        vectors: int,
        lanes: int,
    ) -> list[Any]:
        """code - zero of field `field` of a row of units, float32, as vectors of output channels."""
        channels = int(w.shape[3]) // packing.form.nbytes
        found = []
        for at, size in pieces(vectors * lanes, CODES):
            codes = packing.codes(
                lambda r, at=at, size=size: w[(*row, ramp(r * channels + at, size))],
                field,
                size,
            )
            for first in range(at, at + size, lanes):
                value = lanes_of([codes], size, first - at, lanes).astype(vec("int32", lanes))
                if self.zeros:
                    zero = beside[1][row[0], group, ramp(first, lanes)]
                    value = value - zero.astype(vec("int32", lanes))
                found.append(value.astype(vec("float32", lanes)))
        return found

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, packed codes, scales, [zero points], bias, [residual], y."""
        packing = self.packed(device)
        if packing.hoisted:
            return super().prim_func(device)
        shape, lanes, fields = self.blocking(device), device.lanes, packing.form.fields
        block, rows = shape.vectors * lanes, shape.pixels
        whole, rest = divmod(self.co, block)
        blocks = whole + bool(rest)
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (rows * self.ci,), "float32")
            w, *beside = self.product_params(device, blocks)
            bias = param("bias", (1, blocks * block), "float32")
            residual = param("residual", (rows * self.co,), "float32") if self.residual else None
            y = param("y", (rows * self.co,), "float32")
            sums, total = (T.alloc_buffer((rows, shape.vectors, lanes), "float32", scope="local") for _ in range(2))

            def body(b: Any, n: int) -> None:
                used = -(-n // lanes)
                each = [(p, v) for p in range(rows) for v in range(used)]

                def at(p: int, v: int) -> list[Any]:
                    return [p, v, ramp(0, lanes)]

                def group(g: Any, count: int) -> None:
                    for p, v in each:
                        T.buffer_store(sums, const(0.0, "float32", lanes), at(p, v))
                    first = g * (self.group // fields)

                    def unit(u: Any, some: int) -> None:
                        for field in range(some):
                            values = self._values(packing, w, beside, (b, 0, first + u), g, field, used, lanes)
                            for p in range(rows):
                                factor = splat(x[p * self.ci + (first + u) * fields + field], lanes)
                                for v in range(used):
                                    T.buffer_store(sums, sums[p, v, ramp(0, lanes)] + factor * values[v], at(p, v))

                    loop(count // fields, lambda u: unit(u, fields))
                    if count % fields:
                        unit(count // fields, count % fields)
                    for p, v in each:
                        scale = beside[0][b, g, ramp(v * lanes, lanes)]
                        value = total[p, v, ramp(0, lanes)] + sums[p, v, ramp(0, lanes)] * scale
                        T.buffer_store(total, value, at(p, v))

                for p, v in each:
                    T.buffer_store(total, bias[0, ramp(b * block + v * lanes, lanes)], at(p, v))
                full, last = divmod(self.ci, self.group)
                loop(full, lambda g: group(g, self.group))
                if last:
                    group(full, last)
                for p in range(rows):
                    values = [total[p, v, ramp(0, lanes)] for v in range(used)]
                    here = p * self.co + b * block
                    store_channels(values, lanes, n, [], b * block, residual, y, here, self, device)

            if rest:
                last = lambda: body(whole, rest)  # noqa: E731
                parallel(blocks, lambda b: either(b < whole, lambda: body(b, block), last))
            else:
                parallel(blocks, lambda b: body(b, block))
        return builder.get()

    def reference(  # type: ignore[override]
        self,
        x: np.ndarray,
        w: np.ndarray,
        bias: np.ndarray | None,
        scale: np.ndarray,
        zero: np.ndarray | None = None,
        residual: np.ndarray | None = None,
    ) -> np.ndarray:
        """NumPy meaning on codes OIHW: that of `Conv2D` on the weights they stand for."""
        return super().reference(x, dequantize_weight(w, scale, zero, self.group), bias, residual=residual)
