"""Weights of two to four bits in kernels: stored packed, unpacked in registers between the load and the product.

A register of packed weights holds the codes of several groups of input channels, one after the other in the depth, at
the same places: unpacking is one shift and one mask for a whole register, with nothing moved across it. A code is left
at the top of its byte, 2^(8 - bits) times too large, which saves extending its sign; sums are shifted back once. Where
that would overflow what a product is summed in, the sign is extended after all (`Packed.fraction` is 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgec.integer import ACCUMULATOR_LIMIT, CODE_SPAN
from edgec.packing import FORMATS, Format, code_bits, pack
from edgec.targets.device import Device
from edgec.targets.kernels.common import const, loop, ramp, round_up
from edgec.targets.kernels.dot import Dot, Smull, Vnni
from edgec.targets.tir import T, tirx

# Pixels from which on the weights of a layer are unpacked once for all of them.
HOIST = 32


@dataclass(frozen=True)
class Packed:
    """How the weights of one kernel are stored. depth: groups of input channels of one tap.

    fraction: how many bits too far up unpacked codes are. hoisted: unpacked to memory before all pixels of a block of
    output channels, rather than in registers for each tile of pixels.
    """

    form: Format
    depth: int
    fraction: int
    hoisted: bool = False

    @property
    def units(self) -> int:
        """Units of one tap, each of `form.nbytes` registers; the last one may be partly filled."""
        return -(-self.depth // self.form.fields)

    @property
    def seamless(self) -> bool:
        """Whether a tap ends with a full unit, so that the next one continues it."""
        return self.depth % self.form.fields == 0

    @property
    def cost(self) -> float:
        """Instructions for a register of codes: its part of the loads, shifts and masks, the extension of signs."""
        moves = {4: 1.0, 3: 2.1, 2: 1.5}[self.form.bits]
        return 0.5 * self.form.nbytes / self.form.fields + moves + (not self.fraction)

    def spare(self, device: Device, pixels: int, vectors: int) -> int:
        """Registers of a tile to leave free: packed weights or, on x86, the inputs of all pixels.

        Those LLVM loads at once where it could do so one by one, and then, for want of one register behind the code
        that unpacks, keeps all sums in memory (measured: 3.6 times slower).
        """
        if not self.hoisted:
            return vectors
        return pixels if device.is_x86 else 0

    def unit(self, start: Any, k: Any, more: int) -> Any:
        """Number of the unit of group start + k + more in its kernel row, where `start` is the first of a tap."""
        fields = self.form.fields
        tap = start // self.depth if isinstance(start, int) else tirx.floordiv(start, self.depth)
        inside = k // fields if isinstance(k, int) else tirx.floordiv(k, fields)
        return tap * self.units + inside + more // fields

    def repeat(self, wide: int, times: int) -> int:
        """At least `times` steps of `wide` groups that end with a unit."""
        least = self.form.fields // math.gcd(self.form.fields, wide)
        return round_up(times, least)

    def pack(self, w: np.ndarray) -> np.ndarray:
        """[blocks, kh, kw * depth, vectors, elements] to [blocks, kh, kw * units, vectors, nbytes * elements]."""
        blocks, kh, groups, vectors, elements = w.shape
        taps = w.reshape(blocks, kh, groups // self.depth, self.depth, vectors, elements)
        made = pack(np.moveaxis(taps, 3, -1), self.form.bits)
        made = made.reshape(*made.shape[:-1], self.units, self.form.nbytes)
        # b i j v e u r -> b i j u v r e
        made = made.transpose(0, 1, 2, 5, 3, 6, 4)
        return np.ascontiguousarray(made).view(np.int8).reshape(blocks, kh, -1, vectors, self.form.nbytes * elements)

    def codes(self, load: Callable[[int], Any], field: int, elements: int) -> Any:
        """Codes number `field` of a unit, times 2^fraction, as int8; load(r): register `r` of the unit."""

        def c(value: int) -> Any:
            return const(value, "int8", elements)

        def top(x: Any, first: int, bits: int) -> Any:
            """Bits first .. first + bits - 1 of each byte moved to its top, zeros below."""
            up = 8 - bits - first
            shifted = tirx.shift_left(x, c(up)) if up else x
            return shifted if first == 0 else tirx.bitwise_and(shifted, c(-(1 << (8 - bits))))

        bits = self.form.bits
        if bits == 3 and field >= 6:
            low = tirx.bitwise_and(tirx.shift_right(load(2), c(field - 5)), c(1 << 5))
            found = tirx.bitwise_or(top(load(field - 6), 6, 2), low)
        elif bits == 3:
            found = top(load(field // 2), 3 * (field % 2), 3)
        else:
            found = top(load(0), bits * field, bits)
        return found if self.fraction else tirx.shift_right(found, c(8 - bits))

    def copy(self, w: Any, index: Any, target: Any, place: Any, elements: int) -> None:
        """Unpack block `index` of parameter `w` to block `place` of a buffer with a byte for each weight."""
        _, kh, groups, vectors, _ = (int(extent) for extent in target.shape)

        def unit(i: Any, j: Any, u: Any, v: Any, fields: int) -> None:
            for field in range(fields):
                codes = self.codes(
                    lambda r: w[index, i, j * self.units + u, v, ramp(r * elements, elements)], field, elements
                )
                group = j * self.depth + u * self.form.fields + field
                T.buffer_store(target, codes, [place, i, group, v, ramp(0, elements)])

        def tap(i: Any, j: Any) -> None:
            whole, rest = divmod(self.depth, self.form.fields)
            loop(whole, lambda u: loop(vectors, lambda v: unit(i, j, u, v, self.form.fields)))
            if rest:
                loop(vectors, lambda v: unit(i, j, whole, v, rest))

        loop(kh, lambda i: loop(groups // self.depth, lambda j: tap(i, j)))


def packed(how: Dot, bits: int, depth: int, pixels: int = 1) -> Packed | None:
    """The storage that takes least memory for codes of `bits` bits; None where that is a byte for each.

    pixels: outputs that read the same weights.
    """
    form = min((f for f in FORMATS.values() if bits <= f.bits), key=lambda f: (f.size(depth), -f.bits))
    if form.bits == 8:
        return None
    # VPDPBUSD leaves slots for shifts and masks; elsewhere a copy pays from a few tiles of pixels on (measured).
    hoisted = pixels >= HOIST and not isinstance(how, Vnni)
    # SMULL adds two products of bytes in 16 bits, which has no room for -128 times -128.
    fraction = 0 if hoisted or isinstance(how, Smull) else 8 - form.bits
    return Packed(form, depth, fraction, hoisted)


def weight_bits(w: np.ndarray) -> int:
    """Bits that a layer's int8 weights [outputs, ...] need; 8 where sums of shifted codes could overflow int32."""
    bits = code_bits(w)
    largest = int(np.abs(w.astype(np.int64)).reshape(len(w), -1).sum(1).max(initial=0))
    return bits if CODE_SPAN * (largest << 6) < ACCUMULATOR_LIMIT else 8
