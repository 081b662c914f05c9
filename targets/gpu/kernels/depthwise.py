"""Depthwise convolution: a work item computes a rectangle of output pixels of four channels.

Every input vector is read once and multiplied into all the pixels that see it. Weights are [taps][slices][4]. Products
of int8 codes are added as float32, which is exact for any window of up to `EXACT` taps and faster than integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch
from edgec.targets.gpu.kernels.conv import EXACT, Tile, balanced, fill, first_of, slices
from edgec.targets.gpu.kernels.dialect import Buffer, Code
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.tiling import Axis
from edgec.targets.mcu.kernels.base import Operand

# Taps up to this many have their weights in registers.
HELD = 9


@dataclass(frozen=True)
class DepthwiseConv(GpuKernel):
    """`Depthwise`. Operands: x, weights, bias, [m, [shift]], [residual], y. bias is float32 for float16, too.

    least: see `epilogue.finish`. half_sums: of float16.
    """

    spec: Depthwise
    tile: Tile
    least: int = 1
    half_sums: bool = False

    name: ClassVar[str] = "depthwise"

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def taps(self) -> int:
        return self.spec.kernel[0] * self.spec.kernel[1]

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        size, channels = math.prod(spec.out) * spec.c, slices(spec.c) * 4
        result = [
            Operand(spec.h * spec.w * spec.c, spec.dtype),
            Operand(self.taps * channels, spec.dtype),
            *epilogue.constant_operands(spec, channels),
        ]
        if spec.residual:
            result.append(Operand(size, spec.epilogue.residual_type(spec.dtype)))
        return (*result, Operand(size, spec.out_type))

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """w: [c, 1, kh, kw]; bias, m, shift: one per channel."""
        spec, w = self.spec, weights["w"]
        assert w is not None
        channels = slices(spec.c) * 4
        packed = np.zeros((self.taps, channels), spec.dtype)
        packed[:, : spec.c] = w.reshape(spec.c, self.taps).T
        return packed.reshape(-1), *epilogue.pack_constants(spec, weights, np.arange(spec.c), channels)

    @property
    def inplace(self) -> tuple[int, ...]:
        return (len(self.operands()) - 2,) if self.spec.inplace else ()

    def launches(self, device: Device) -> tuple[Launch, ...]:
        return (_Depthwise(self, device).launch(),)

    def with_half_sums(self) -> DepthwiseConv:
        return replace(self, half_sums=self.spec.dtype == "float16")

    def variants(self, device: Device) -> tuple[tuple[Launch, ...], ...]:
        return tuple(replace(self, tile=t).launches(device) for t in first_of(self.tile, tiles_of(self.spec, device)))


def reach(axis: Axis, count: int) -> dict[int, list[tuple[int, int]]]:
    """Places that `count` neighbouring outputs see, from the first one's first tap on: (output, tap) of each."""
    found: dict[int, list[tuple[int, int]]] = {}
    for p in range(count):
        for j in range(axis.kernel):
            found.setdefault(p * axis.stride + j * axis.dilation, []).append((p, j))
    return dict(sorted(found.items()))


def inside(c: Code, name: str, start: str, axis: Axis, count: int, places: list[int]) -> dict[int, str]:
    """Variables that say whether `start` + place is on the map, for places where it need not be."""
    tiles = -(-axis.out // count)
    last = (tiles - 1) * count * axis.stride - axis.before
    found = {}
    for n, place in enumerate(places):
        tests = [f"{start} + {place} >= 0"] if place < axis.before else []
        if last + place >= axis.size:
            tests.append(f"{start} + {place} < {axis.size}")
        if tests:
            found[place] = c.let("bool", f"{name}{n}", " && ".join(tests))
    return found


class _Depthwise:
    """Text of a `DepthwiseConv`."""

    def __init__(self, kernel: DepthwiseConv, device: Device) -> None:
        self.kernel, self.spec, self.tile = kernel, kernel.spec, kernel.tile
        spec, tile = self.spec, self.tile
        self.integer = spec.dtype == "int8"
        self.rows, self.columns = spec.axes
        self.whole, self.slices = spec.c % 4 == 0, slices(spec.c)
        units = 4 if self.whole else 1
        self.size = spec.c // units
        buffers = [
            Buffer("x", spec.dtype, units),
            Buffer("w", spec.dtype, 4),
            *epilogue.constant_buffers(spec),
        ]
        if spec.residual:
            kind = spec.epilogue.residual_type(spec.dtype)
            buffers.append(Buffer("r", kind, units, shared=bool(spec.inplace)))
        buffers.append(Buffer("y", spec.out_type, units, written=True, shared=bool(spec.inplace)))
        extents = (self.slices, -(-self.columns.out // tile.pixels), -(-self.rows.out // tile.rows))
        self.c = Code(device.api, "depthwise", buffers, extents, tile.group)

    def launch(self) -> Launch:
        c, tile, (rows, columns) = self.c, self.tile, (self.rows, self.columns)
        c.index(0, "slice")
        c.let("int", "ox", f"{c.index(1, 'column')} * {tile.pixels}")
        c.let("int", "oy", f"{c.index(2, 'row')} * {tile.rows}")
        c.let("int", "ix", f"ox * {columns.stride} - {columns.before}")
        c.let("int", "iy", f"oy * {rows.stride} - {rows.before}")
        if self.whole:
            self._body(4)
        else:
            if self.spec.c > 4:
                with c.block(f"if (slice < {self.slices - 1})"):
                    self._body(4)
                    c.line("return;")
            self._body(self.spec.c % 4)
        return c.launch(range(len(self.kernel.operands())))

    def _body(self, channels: int) -> None:
        """The whole work item, for a slice of so many channels."""
        c, spec, tile, (rows, columns) = self.c, self.spec, self.tile, (self.rows, self.columns)
        halves = self.kernel.half_sums
        kind = "half4" if halves else "float4"
        c.let("int4" if self.integer else "float4", "b", c.load("bias", "slice"))
        nothing = c.to_half4(c.constant(0.0)) if halves else c.constant(0.0)
        for q in range(tile.rows):
            for p in range(tile.pixels):
                c.var(kind, f"a{q}_{p}", nothing if self.integer or halves else "b")
        epilogue.read_numbers(c, spec)
        zero = c.constant(spec.x_zp) if self.integer else nothing
        if self.integer and spec.x_zp and epilogue.numbered(spec):
            zero = epilogue.read_padding(c, False)
        held = self.kernel.taps <= HELD
        if held:
            for tap in range(self.kernel.taps):
                c.let(kind, f"w{tap}", self._weight(tap))
        lines, places = reach(rows, tile.rows), reach(columns, tile.pixels)
        row_in = inside(c, "v", "iy", rows, tile.rows, list(lines))
        column_in = inside(c, "u", "ix", columns, tile.pixels, list(places))
        # The zero of floats adds nothing: rows outside are left out.
        skip = not self.integer or spec.x_zp == 0
        for line, row_users in lines.items():
            test = row_in.get(line)
            with c.when([test]) if test and skip else c.block(""):
                c.let("int", "line", f"((iy + {line}) * {columns.size} + ix) * {self.size} + slice{self._scaled}")
                for n, (place, users) in enumerate(places.items()):
                    index = f"line + {place * self.size}" if place else "line"
                    value = self._read("x", spec.dtype, index, channels, factor=True)
                    tests = [t for t in (column_in.get(place), None if skip else test) if t]
                    c.let(kind, f"x{n}", c.pick(" && ".join(tests), value, zero) if tests else value)
                    if held:
                        self._multiply(row_users, users, f"x{n}", None)
                if not held:
                    for i in {i for _, i in row_users}:
                        for j in range(columns.kernel):
                            c.let(kind, f"w{i}_{j}", self._weight(i * columns.kernel + j))
                    for n, users in enumerate(places.values()):
                        self._multiply(row_users, users, f"x{n}", "w")
        self._store(channels)

    @property
    def _scaled(self) -> str:
        return "" if self.whole else " * 4"

    def _weight(self, tap: int) -> str:
        index = f"slice + {tap * self.slices}" if tap else "slice"
        value = self.c.load_half4("w", index) if self.kernel.half_sums else self.c.load("w", index)
        return self.c.unpack_floats(value) if self.integer else value

    def _read(self, buffer: str, dtype: str, index: str, channels: int, factor: bool = False) -> str:
        """Four channels, as what is multiplied where they are a `factor`."""
        c, halves = self.c, factor and self.kernel.half_sums
        if self.whole and halves:
            return c.load_half4(buffer, index)
        if self.whole:
            value = c.load(buffer, index)
        else:
            value = c.load4(buffer, index, channels, "0" if dtype == "int8" else "0.0f")
        if dtype != "int8":
            return c.to_half4(value) if halves else value
        return c.unpack_floats(value) if factor else c.unpack(value)

    def _multiply(self, row_users: Any, users: Any, value: str, prefix: str | None) -> None:
        for q, i in row_users:
            for p, j in users:
                weight = f"{prefix}{i}_{j}" if prefix else f"w{i * self.columns.kernel + j}"
                self.c.line(f"a{q}_{p} += {value} * {weight};")

    def _store(self, channels: int) -> None:
        c, spec, tile = self.c, self.spec, self.tile
        factors = []
        for name, dtype in zip(epilogue.CONSTANT_NAMES[1:], spec.factors, strict=False):
            factors.append(c.let("int4" if dtype == "int32" else "float4", f"{name}_", c.load(name, "slice")))
        for q in range(tile.rows):
            ragged = self.rows.out % tile.rows != 0 and q > 0
            with c.when([f"oy + {q} < {self.rows.out}"] if ragged else []):
                for p in range(tile.pixels):
                    ragged = self.columns.out % tile.pixels != 0 and p > 0
                    with c.when([f"ox + {p} < {self.columns.out}"] if ragged else []):
                        pixel = f"(oy + {q}) * {self.columns.out} + ox + {p}"
                        at = c.let("int", f"o{q}_{p}", f"({pixel}) * {self.size} + slice{self._scaled}")
                        residual = None
                        if spec.residual:
                            residual = self._read("r", spec.epilogue.residual_type(spec.dtype), at, channels)
                        total = f"(b + {c.whole(f'a{q}_{p}')})" if self.integer else f"a{q}_{p}"
                        if self.kernel.half_sums:
                            total = f"(b + {c.floats(f'a{q}_{p}')})"
                        value = epilogue.finish(c, total, spec, factors, residual, self.kernel.least)
                        value = value if self.whole else c.let(epilogue.kind_of(spec), f"y{q}_{p}", value)
                        epilogue.write(c, "y", spec.out_type, at, value, channels, self.whole)


def tiles_of(spec: Depthwise, device: Device) -> list[Tile]:
    """Tiles of a depthwise convolution, the one to start with first."""
    rows, columns = spec.axes
    found = []
    for pixels, high in ((4, 2), (4, 1), (2, 2), (8, 1)):
        tile = Tile(balanced(columns.out, pixels), 1, (1, 1, 1), min(high, rows.out))
        extents = (slices(spec.c), -(-columns.out // tile.pixels), -(-rows.out // tile.rows))
        found.append(replace(tile, group=fill(extents, (16, 4, 4), 64)))
    return list(dict.fromkeys(found))


def _depthwise(spec: Depthwise, weights: Any, device: Device) -> DepthwiseConv | None:
    """None for huge windows, and for types without kernel."""
    if spec.dtype not in ("float32", "float16", "int8") or spec.kernel[0] * spec.kernel[1] > EXACT:
        return None
    return DepthwiseConv(spec, tiles_of(spec, device)[0], epilogue.least_shift(weights))


RULES: dict[type, Callable[..., GpuKernel | None]] = {Depthwise: _depthwise}
