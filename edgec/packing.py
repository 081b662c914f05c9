"""Codes of two, three or four bits as bytes: the storage formats, without torch and TVM.

pack4: two codes in a byte, the first in the low nibble. pack2: four, the first in bits 0 and 1. pack3: eight codes in
three bytes: codes 2r and 2r + 1 in bits 0..2 and 3..5 of byte r; bits 6 and 7 of bytes 0, 1 and 2 hold the upper two
bits of code 6, those of code 7, and the lowest bits of both. All are two's complement.

Ten codes in a word of four bytes need 3.2 bits each and fields that straddle bytes; three planes of bits need a
shift, a mask and two insertions for every code. pack3 needs exactly 3 bits, and six codes in eight are one shift and
one mask away from the top of their byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgec.errors import EdgecError

WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Format:
    """A storage format: `fields` codes of `bits` bits in `nbytes` bytes."""

    bits: int
    fields: int
    nbytes: int

    def size(self, count: int) -> int:
        """Bytes of `count` codes in whole units."""
        return -(-count // self.fields) * self.nbytes


FORMATS = {2: Format(2, 4, 1), 3: Format(3, 8, 3), 4: Format(4, 2, 1), 8: Format(8, 1, 1)}


def code_bits(codes: ArrayLike) -> int:
    """The least of WIDTHS in which all codes fit as two's complement. Raises EdgecError beyond int8."""
    values = np.asarray(codes)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for bits in WIDTHS:
        if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1):
            return bits
    raise EdgecError(f"codes {low}..{high} do not fit 8 bits", where="packing")


def pack(codes: ArrayLike, bits: int) -> NDArray[np.uint8]:
    """Codes [..., n] as bytes [..., size]; the last unit is filled with zeros.

    Raises EdgecError for another width than WIDTHS and for codes that do not fit it.
    """
    if bits not in FORMATS:
        raise EdgecError(f"{bits} bits have no storage format", where="packing", hint=f"use one of {WIDTHS}")
    values = np.asarray(codes, np.int8)
    if code_bits(values) > bits:
        raise EdgecError(f"codes {values.min()}..{values.max()} do not fit {bits} bits", where="packing")
    how = FORMATS[bits]
    missing = -values.shape[-1] % how.fields
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]).view(np.uint8)
    parts = padded.reshape(*values.shape[:-1], -1, how.fields) & ((1 << bits) - 1)
    if bits == 3:
        first = [parts[..., 2 * r] | parts[..., 2 * r + 1] << 3 for r in range(3)]
        six, seven = parts[..., 6], parts[..., 7]
        above = (six >> 1, seven >> 1, (six & 1) | (seven & 1) << 1)
        unit = np.stack([byte | top << 6 for byte, top in zip(first, above, strict=True)], -1)
    else:
        unit = np.zeros((*parts.shape[:-1], 1), np.uint8)
        for field in range(how.fields):
            unit[..., 0] |= parts[..., field] << (bits * field)
    return np.ascontiguousarray(unit.reshape(*values.shape[:-1], -1).astype(np.uint8))


def unpack(data: ArrayLike, bits: int, count: int) -> NDArray[np.int8]:
    """The first `count` codes of bytes [..., size] made by `pack`."""
    how = FORMATS[bits]
    unit = np.asarray(data, np.uint8)
    unit = unit.reshape(*unit.shape[:-1], -1, how.nbytes)
    if bits == 3:
        parts = [unit[..., r // 2] >> (3 * (r % 2)) for r in range(6)]
        parts += [(unit[..., r] >> 6) << 1 | unit[..., 2] >> (6 + r) & 1 for r in range(2)]
    else:
        parts = [unit[..., 0] >> (bits * field) for field in range(how.fields)]
    stacked = np.stack(parts, -1).astype(np.uint8)
    codes = (stacked << (8 - bits)).astype(np.uint8).view(np.int8) >> (8 - bits)
    return codes.reshape(*codes.shape[:-2], -1)[..., :count].astype(np.int8)
