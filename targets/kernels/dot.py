"""How each instruction set multiplies: products of packed weights with input channels, summed per output channel.

One `Dot` covers one way of doing it. Weights are packed in vectors of `lanes` output channels with `group`
consecutive input channels each; an input load covers `wide` groups of one pixel, because some instructions take one
element out of a longer register for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels.common import const, intrinsic, splat, vec
from edgec.targets.tir import tirx


@dataclass(frozen=True)
class Dot:
    """Products of float32, one input channel at a time: the input is broadcast.

    group: input channels per output channel in a weight vector. wide: groups per input load. sums: accumulators per
    weight vector. offset: what is added to input codes before they are multiplied; the bias takes it off again.
    pixels: neighbours that are multiplied together, and share the accumulators.
    """

    lanes: int
    group: int = 1
    wide: int = 1
    sums: int = 1
    offset: int = 0
    pixels: int = 1
    dtype: str = "float32"

    @property
    def acc_type(self) -> str:
        return "int32" if self.dtype == "int8" else self.dtype

    @property
    def weight_elements(self) -> int:
        """Elements of a weight vector."""
        return self.lanes * self.group

    @property
    def held(self) -> tuple[int, str]:
        """(elements, type) of what `hold` returns for `wide` groups."""
        return self.lanes, self.dtype

    def hold(self, x: Any) -> Any:
        """An input load of one group in the form that `multiply` takes; x has `group` elements."""
        return splat(x, self.lanes)

    def load(self, inputs: list[Any], groups: int) -> Any:
        """Input loads of `groups` groups (one or `wide`) for each of `pixels` neighbours, as `multiply` takes them."""
        return self.hold(inputs[0]) if groups == 1 else inputs[0]

    def start(self, bias: list[Any]) -> list[Any]:
        """What accumulators begin with, given the bias of each pixel: the bias, or nothing where `total` adds it.

        In float16 every product that is added to the bias would be rounded to the size of the bias.
        """
        return [const(0, self.dtype, self.lanes)] if self.dtype == "float16" else bias

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        """`acc` plus w times input group `lane` of a wide load, or the only group when `lane` is None."""
        return [acc[0] + x * w]

    def total(self, acc: list[Any], bias: Any, pixel: int) -> Any:
        """The sums per output channel of one of the pixels."""
        return acc[0] + bias if self.dtype == "float16" else acc[0]


@dataclass(frozen=True)
class Lane(Dot):
    """NEON multiplies by one element of a register: a load of input channels serves several (FMLA by element).

    A register holds four float32 or eight float16, which are then summed in float16, as XNNPACK does.
    """

    wide: int = 4

    @property
    def held(self) -> tuple[int, str]:
        return self.wide, self.dtype

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        value = x if lane is None else splat(tirx.Shuffle([x], [const(lane, "int32")]), self.lanes)
        return [acc[0] + value * w]


@dataclass(frozen=True)
class Widening(Dot):
    """int8 by way of int16 products, for instruction sets without anything better."""

    dtype: str = "int8"

    @property
    def held(self) -> tuple[int, str]:
        return self.lanes, "int16"

    def hold(self, x: Any) -> Any:
        return splat(x.astype("int16"), self.lanes)

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        wide = vec("int32", self.lanes)
        return [acc[0] + x.astype(wide) * w.astype(vec("int16", self.lanes)).astype(wide)]


@dataclass(frozen=True)
class Pairs(Dot):
    """x86 PMADDWD: two int16 products per 32-bit lane."""

    group: int = 2
    dtype: str = "int8"

    @property
    def held(self) -> tuple[int, str]:
        return 2 * self.lanes, "int16"

    def hold(self, x: Any) -> Any:
        both = tirx.reinterpret("int32", x.astype("int16x2"))
        return tirx.reinterpret(f"int16x{2 * self.lanes}", splat(both, self.lanes))

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        name = "llvm.x86.avx2.pmadd.wd" if self.lanes == 8 else "llvm.x86.sse2.pmadd.wd"
        product = intrinsic(name, f"int32x{self.lanes}", x, w.astype(f"int16x{2 * self.lanes}"))
        return [acc[0] + product]


@dataclass(frozen=True)
class Vnni(Dot):
    """AVX-512 VPDPBUSD: four products of unsigned and signed bytes per lane.

    Input codes become unsigned by flipping their top bit, which adds 128. flipped: they are already.
    """

    group: int = 4
    offset: int = 128
    dtype: str = "int8"
    flipped: bool = False

    @property
    def held(self) -> tuple[int, str]:
        return 4 * self.lanes, "int8"

    def hold(self, x: Any) -> Any:
        codes = tirx.reinterpret(f"int8x{4 * self.lanes}", splat(tirx.reinterpret("int32", x), self.lanes))
        return codes if self.flipped else tirx.bitwise_xor(codes, const(-128, "int8", 4 * self.lanes))

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        return [intrinsic("llvm.x86.avx512.vpdpbusd.512", f"int32x{self.lanes}", acc[0], x, w)]


@dataclass(frozen=True)
class Sdot(Dot):
    """Armv8.2 SDOT by element: four signed products per lane, sixteen input channels per load (or eight: `wide` 2)."""

    group: int = 4
    wide: int = 4
    dtype: str = "int8"

    @property
    def held(self) -> tuple[int, str]:
        return 8 if self.wide == 2 else 16, "int8"

    def hold(self, x: Any) -> Any:
        return tirx.reinterpret("int8x16", splat(tirx.reinterpret("int32", x), 4))

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        value = x
        if lane is not None:
            words = tirx.reinterpret(f"int32x{self.held[0] // 4}", x)
            one = tirx.Shuffle([words], [const(lane, "int32")])
            value = tirx.reinterpret("int8x16", splat(one, 4))
        return [intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", "int32x4", acc[0], w, value)]


@dataclass(frozen=True)
class Smull(Dot):
    """Armv8.0: SMULL and SMLAL to int16, then SADALP to int32.

    Two products of codes fit int16 because weights are never -128. A weight vector holds eight input channels of four
    output channels as two registers of four by four; the two accumulators hold two output channels each, in halves.
    """

    group: int = 8
    wide: int = 2
    sums: int = 2
    dtype: str = "int8"

    @property
    def held(self) -> tuple[int, str]:
        return 16, "int8"

    def hold(self, x: Any) -> Any:
        """One group in the low half; the high half repeats it."""
        return tirx.Shuffle([x, x], [const(k, "int32") for k in range(16)])

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        words = tirx.reinterpret("int32x4", x)

        def word(number: int) -> Any:
            one = tirx.Shuffle([words], [const(number, "int32")])
            return tirx.reinterpret("int8x8", splat(one, 2))

        first = 2 * (lane or 0)
        result = []
        for half in range(2):
            low, high = (
                intrinsic("llvm.aarch64.neon.smull.v8i16", "int16x8", _part(w, 16 * k + 8 * half, 8), word(first + k))
                for k in range(2)
            )
            pairs = intrinsic("llvm.aarch64.neon.saddlp.v4i32.v8i16", "int32x4", low + high)
            result.append(acc[half] + pairs)
        return result

    def start(self, bias: list[Any]) -> list[Any]:
        return [const(0, "int32", 4)] * 2

    def total(self, acc: list[Any], bias: Any, pixel: int) -> Any:
        return intrinsic("llvm.aarch64.neon.addp.v4i32", "int32x4", *acc) + bias


@dataclass(frozen=True)
class Smmla(Dot):
    """Armv8.6 SMMLA: 2x2 sums of eight products, of two pixels and two output channels.

    Two input loads of sixteen channels are joined to two registers of two pixels by eight channels (ZIP). A weight
    vector is two registers of two output channels by eight inputs; the accumulators hold [pixel, channel] of these.
    """

    group: int = 8
    wide: int = 2
    sums: int = 2
    pixels: int = 2
    dtype: str = "int8"

    @property
    def held(self) -> tuple[int, str]:
        return 32, "int8"

    def load(self, inputs: list[Any], groups: int) -> Any:
        size = 8 * groups
        rows = [list(range(8 * g, 8 * g + 8)) + list(range(size + 8 * g, size + 8 * g + 8)) for g in range(groups)]
        order = [k for row in rows * (2 // groups) for k in row]
        # A shuffle's result may not be longer than its operands.
        return tirx.Shuffle(inputs * (2 // groups), [const(k, "int32") for k in order])

    def start(self, bias: list[Any]) -> list[Any]:
        return [tirx.Shuffle(bias, [const(k + 2 * s, "int32") for k in (0, 1, 4, 5)]) for s in range(2)]

    def multiply(self, acc: list[Any], w: Any, x: Any, lane: int | None) -> list[Any]:
        name, codes = "llvm.aarch64.neon.smmla.v4i32.v16i8", _part(x, 16 * (lane or 0), 16)
        return [intrinsic(name, "int32x4", acc[s], codes, _part(w, 16 * s, 16)) for s in range(2)]

    def total(self, acc: list[Any], bias: Any, pixel: int) -> Any:
        return tirx.Shuffle(acc, [const(k + 2 * pixel, "int32") for k in (0, 1, 4, 5)])


def _part(x: Any, first: int, count: int) -> Any:
    return tirx.Shuffle([x], [const(first + k, "int32") for k in range(count)])


def dot(device: Device, dtype: str, inputs: int = 1, pixels: int = 1) -> Dot:
    """The way of multiplying for a device, an element type ("float32", "float16" or "int8") and a layer of these sizes.

    Raises EdgecError for float16 on a device that does not compute in it.
    """
    if dtype == "float16":
        lanes = device.lanes_of(dtype)
        return Lane(lanes, wide=lanes, dtype=dtype)
    if dtype != "int8":
        return Lane(device.lanes, dtype=dtype) if device.is_arm64 else Dot(device.lanes, dtype=dtype)
    # A group of eight inputs and a pair of pixels must not be mostly filling.
    if device.is_arm64 and device.has_i8mm and -(-inputs // 4) % 2 == 0 and pixels > 1:
        return Smmla(4)
    if device.is_arm64:
        if device.has_dot:
            return Sdot(4)
        # Images of one to four channels would fill at most half of a group of eight.
        return Smull(4) if inputs > 4 else Widening(4)
    if device.is_x86 and device.lanes == 16 and device.has_vnni:
        return Vnni(16)
    if device.is_x86 and device.lanes in (4, 8):
        return Pairs(device.lanes)
    return Widening(device.lanes)


def pack_weights(w: np.ndarray, how: Dot, block: int) -> np.ndarray:
    """[groups, outputs, kh, kw, inputs] to [groups * blocks, kh, kw * inputs / group, vectors, lanes * group].

    Outputs are padded to whole blocks of `block` channels and inputs to whole groups, with zeros.
    """
    groups, outputs, kh, kw, inputs = w.shape
    padded_outputs, padded_inputs = -(-outputs // block) * block, -(-inputs // how.group) * how.group
    full = np.zeros((groups, padded_outputs, kh, kw, padded_inputs), w.dtype)
    full[:, :outputs, :, :, :inputs] = w
    blocks, vectors = padded_outputs // block, block // how.lanes
    full = full.reshape(groups, blocks, vectors, how.lanes, kh, kw * padded_inputs // how.group, how.group)
    # g b v l h k c -> g b h k v l c
    full = full.transpose(0, 1, 4, 5, 2, 3, 6)
    if isinstance(how, Smull):
        # Two registers, each with four input channels of all four output channels.
        full = full.reshape(*full.shape[:-1], 2, 4).swapaxes(-2, -3)
    return np.ascontiguousarray(full).reshape(groups * blocks, kh, -1, vectors, how.weight_elements)
