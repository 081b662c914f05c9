"""Float layers whose weights are stored as codes of two to eight bits with one scale for each group of input channels.

Activations, sums and results are float32. The weights of a block of output channels are unpacked and scaled once,
into a buffer of the kernel, before all pixels read them; then the layer is the direct convolution of `conv2d`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.integer import dequantize_weight
from edgec.packing import FORMATS
from edgec.targets.device import Device
from edgec.targets.kernels.common import lanes_of, loop, param, pieces, ramp, round_up, vec
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.unpack import Packed
from edgec.targets.tir import T, tirx

# Codes that are unpacked together: a register of them, where a block has so many channels.
CODES = 16


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
        return Packed(form, self.ci, 0, hoisted=True)

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
        channels, fields = vectors * lanes, packing.form.fields

        def unit(i: Any, j: Any, u: Any, count: int) -> None:
            for field in range(count):
                channel = u * fields + field
                group = tirx.floordiv(channel, self.group) if self.scales > 1 else 0
                for at, size in pieces(channels, CODES):
                    codes = packing.codes(
                        lambda r, at=at, size=size: w[block, i, j * packing.units + u, ramp(r * channels + at, size)],
                        field,
                        size,
                    )
                    for first in range(at, at + size, lanes):
                        here = ramp(first, lanes)
                        value = lanes_of([codes], size, first - at, lanes).astype(vec("int32", lanes))
                        if self.zeros:
                            value = value - beside[1][block, group, here].astype(vec("int32", lanes))
                        value = value.astype(vec("float32", lanes)) * beside[0][block, group, here]
                        place_of = [place, i, j * packing.depth + channel, first // lanes, ramp(0, lanes)]
                        T.buffer_store(target, value, place_of)

        def tap(i: Any, j: Any) -> None:
            whole, rest = divmod(packing.depth, fields)
            loop(whole, lambda u: unit(i, j, u, fields))
            if rest:
                unit(i, j, whole, rest)

        loop(kh, lambda i: loop(taps // packing.depth, lambda j: tap(i, j)))

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
