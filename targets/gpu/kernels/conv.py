"""Convolutions and matrix products with stored weights: no local memory, no barriers, `float4` in registers.

A work item computes a few neighbouring pixels by a few slices of four output channels. Activations are NHWC; weights
are [slices of four outputs][taps][slices of four inputs][4 inputs][4 outputs], so that every tile reads the same ones,
in order. A fully connected layer is a 1x1 convolution over rows.

int8 has two forms. With an instruction for dot products weights are [...][4 outputs][4 inputs]. Without one, products
are added as float32, which every GPU multiplies fastest: exactly, up to `EXACT` of them, which then go to int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from edgec.integer import dequantize_weight
from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch, Size
from edgec.targets.gpu.kernels.dialect import LANES, Buffer, Code
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.tiling import Axis
from edgec.targets.kernels.weight_only import CodedConv2D
from edgec.targets.mcu.kernels.base import Operand

# Output slices are filled up to a multiple of this many, so that tiles need no guard around their weights.
MOST_VECTORS = 4
# Products of two codes whose sum float32 holds exactly: 2^24 / (128 * 128).
EXACT = 1024


@dataclass(frozen=True)
class Tile:
    """Work of one item: `pixels` neighbours along a row, `rows` of them, by `vectors` slices of four channels."""

    pixels: int
    vectors: int
    group: Size
    rows: int = 1


def slices(channels: int) -> int:
    return -(-channels // 4)


def first_of(tile: Tile, tiles: Sequence[Tile]) -> list[Tile]:
    """`tile`, and the others behind it."""
    return list(dict.fromkeys([tile, *tiles]))


@dataclass(frozen=True)
class Conv(GpuKernel):
    """`Conv2D`. Operands: x, weights, bias, [m, [shift]], [residual], y. bias is float32 for float16, too.

    dot: whether int8 is multiplied by dot products. least: see `epilogue.finish`. half_sums: of float16.
    """

    spec: Conv2D
    tile: Tile
    dot: bool = False
    least: int = 1
    half_sums: bool = False

    name: ClassVar[str] = "conv2d"

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def inputs(self) -> int:
        """Of a group."""
        return self.spec.ci // self.spec.groups

    @property
    def outputs(self) -> int:
        """Of a group."""
        return self.spec.co // self.spec.groups

    @property
    def output_slices(self) -> int:
        """Slices of a group's outputs as packed."""
        count = slices(self.outputs)
        return count if self.spec.groups > 1 else -(-count // MOST_VECTORS) * MOST_VECTORS

    @property
    def taps(self) -> int:
        return self.spec.kernel[0] * self.spec.kernel[1]

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        size = math.prod(spec.out) * spec.co
        channels = spec.groups * self.output_slices * 4
        result = [
            Operand(spec.h * spec.w * spec.ci, spec.dtype),
            Operand(channels * self.taps * slices(self.inputs) * 4, spec.dtype),
            *epilogue.constant_operands(spec, channels),
        ]
        if spec.residual:
            result.append(Operand(size, spec.epilogue.residual_type(spec.dtype)))
        return (*result, Operand(size, spec.out_type))

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """w: OIHW; bias, m, shift: one per channel."""
        spec, w = self.spec, weights["w"]
        assert w is not None
        count, depth = self.output_slices, slices(self.inputs)
        full = np.zeros((spec.groups, count * 4, self.taps, depth * 4), spec.dtype)
        rows = w.reshape(spec.groups, self.outputs, self.inputs, self.taps)
        full[:, : self.outputs, :, : self.inputs] = rows.transpose(0, 1, 3, 2)
        full = full.reshape(spec.groups, count, 4, self.taps, depth, 4)
        order = (0, 1, 3, 4, 2, 5) if self.dot else (0, 1, 3, 4, 5, 2)
        packed = np.ascontiguousarray(full.transpose(order)).reshape(-1)
        place = (np.arange(spec.groups)[:, None] * (count * 4) + np.arange(self.outputs)).reshape(-1)
        return packed, *epilogue.pack_constants(spec, weights, place, spec.groups * count * 4)

    @property
    def walk(self) -> tuple[Axis, Axis]:
        return self.spec.walk

    @property
    def inplace(self) -> tuple[int, ...]:
        return (len(self.operands()) - 2,) if self.spec.inplace else ()

    def launches(self, device: Device) -> tuple[Launch, ...]:
        return (_Conv(self, device).launch(),)

    def variants(self, device: Device) -> tuple[tuple[Launch, ...], ...]:
        return tuple(replace(self, tile=t).launches(device) for t in first_of(self.tile, tiles_of(self.spec, device)))

    def with_half_sums(self) -> Conv:
        return replace(self, half_sums=self.spec.dtype == "float16")


@dataclass(frozen=True)
class CodedConv(Conv):
    """`CodedConv2D`, with its weights as float32: they take the memory of a float layer on a GPU, and no more time."""

    spec: CodedConv2D

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """w: codes OIHW; scale, zero: [outputs, groups of inputs]; bias: one per channel."""
        w, scale = weights["w"], weights["scale"]
        assert w is not None and scale is not None
        values = dequantize_weight(w, scale, weights.get("zero"), self.spec.group)
        return super().pack(device, w=values, bias=weights.get("bias"))


class _Conv:
    """Text of a `Conv`."""

    def __init__(self, kernel: Conv, device: Device) -> None:
        self.kernel, self.spec, self.tile = kernel, kernel.spec, kernel.tile
        spec = self.spec
        self.integer, self.dot = spec.dtype == "int8", kernel.dot
        # int8 by float32 products: summed in f, and in a what f no longer holds exactly.
        self.floating = self.integer and not kernel.dot
        # What is multiplied, and float sums.
        self.real = "half4" if kernel.half_sums else "float4"
        self.rows, self.columns = kernel.walk
        self.depth = slices(kernel.inputs)
        # Whether slices of four channels are whole words of memory.
        self.whole_in, self.whole_out = kernel.inputs % 4 == 0, kernel.outputs % 4 == 0
        self.used = slices(kernel.outputs)
        self.blocks = -(-self.used // self.tile.vectors)
        buffers = [
            Buffer("x", spec.dtype, 4 if self.whole_in else 1),
            Buffer("w", spec.dtype, 16 if self.integer else 4),
            *epilogue.constant_buffers(spec),
        ]
        if spec.residual:
            kind = spec.epilogue.residual_type(spec.dtype)
            buffers.append(Buffer("r", kind, 4 if self.whole_out else 1, shared=bool(spec.inplace)))
        last = Buffer("y", spec.out_type, 4 if self.whole_out else 1, written=True, shared=bool(spec.inplace))
        buffers.append(last)
        extents = (spec.groups * self.blocks, -(-self.columns.out // self.tile.pixels), self.rows.out)
        self.c = Code(device.api, "conv", buffers, extents, self.tile.group)

    def launch(self) -> Launch:
        c, spec, tile, kernel = self.c, self.spec, self.tile, self.kernel
        block = c.index(0, "block")
        c.let("int", "ox", f"{c.index(1, 'column')} * {tile.pixels}")
        c.index(2, "oy")
        group = "0"
        if spec.groups > 1:
            group = c.let("int", "group", f"{block} / {self.blocks}")
            block = c.let("int", "part", f"{block} % {self.blocks}")
        c.let("int", "first", f"{block} * {tile.vectors}")
        count = kernel.output_slices
        c.let("int", "slice", f"{group} * {count} + first" if spec.groups > 1 else "first")
        epilogue.read_numbers(c, spec)
        kind = "int4" if self.integer else "float4"
        for v in range(tile.vectors):
            c.let(kind, f"b{v}", c.load("bias", self._plus("slice", v)))
            for p in range(tile.pixels):
                start = c.to_half4(c.constant(0.0)) if kernel.half_sums else f"b{v}"
                c.var("half4" if kernel.half_sums else kind, f"a{p}_{v}", start)
                if self.floating:
                    c.var("float4", f"f{p}_{v}", c.constant(0.0))
        self._inputs(group)
        if self.floating and self._at_once:
            self._flush(last=True)
        self._store(group)
        return c.launch(range(len(kernel.operands())))

    @property
    def _at_once(self) -> bool:
        """Whether all products of an output add up exactly in float32."""
        return self.kernel.taps * self.depth * 4 <= EXACT

    def _flush(self, last: bool = False) -> None:
        """Add what float32 has summed to the integers."""
        for v in range(self.tile.vectors):
            for p in range(self.tile.pixels):
                self.c.line(f"a{p}_{v} += {self.c.whole(f'f{p}_{v}')};")
                if not last:
                    self.c.line(f"f{p}_{v} = {self.c.constant(0.0)};")

    @staticmethod
    def _plus(name: str, k: int) -> str:
        return f"{name} + {k}" if k else name

    def _inputs(self, group: str) -> None:
        """Loops over the window and the channels of the input."""
        c, spec, (rows, columns) = self.c, self.spec, (self.rows, self.columns)
        taps, depth, units = self.kernel.taps, self.depth, 4 if self.whole_in else 1
        size = self.spec.ci // units
        # Places of the input columns that the pixels of the tile see, from that of the first pixel's first tap on.
        places = sorted(
            {p * columns.stride + j * columns.dilation for p in range(self.tile.pixels) for j in range(columns.kernel)}
        )
        c.let("int", "ix", f"ox * {columns.stride} - {columns.before}" if columns.before else f"ox * {columns.stride}")
        tiles = -(-columns.out // self.tile.pixels)
        last = (tiles - 1) * self.tile.pixels * columns.stride - columns.before
        plain = rows.before == 0 and (rows.out - 1) * rows.stride + (rows.kernel - 1) * rows.dilation < rows.size
        inside: dict[int, list[str]] = {}
        for n, place in enumerate(places):
            tests = [f"ix + {place} >= 0"] if place < columns.before else []
            if last + place >= columns.size:
                tests.append(f"ix + {place} < {columns.size}")
            inside[place] = tests
            if tests:
                c.let("bool", f"in{n}", " && ".join(tests))
        for v in range(self.tile.vectors):
            c.let("int", f"w{v}", f"({self._plus('slice', v)}) * {taps * depth * (1 if self.integer else 4)}")
        offset = f" + {group} * {self.kernel.inputs // units}" if group != "0" else ""
        zero = spec.x_zp if self.integer else 0
        if zero and epilogue.numbered(spec) and (any(inside.values()) or not plain):
            epilogue.read_padding(c, self.dot)

        def row(i: str) -> None:
            c.let("int", "iy", f"oy * {rows.stride} + {i} * {rows.dilation} - {rows.before}")
            valid = None
            skip: list[str] = []
            if not plain:
                test = f"iy >= 0 && iy < {rows.size}"
                # Rows of padding add nothing, unless zero has another code than 0.
                if zero:
                    valid = c.let("bool", "row", test)
                else:
                    skip = [test]
            with c.when(skip):
                c.let("int", "line", f"(iy * {columns.size} + ix) * {size}{offset}")
                self._channels(i, places, inside, valid, size, zero)

        if rows.kernel == 1:
            row("0")
        else:
            with c.loop("i", 0, rows.kernel):
                row("i")

    def _channels(
        self, i: str, places: list[int], inside: dict[int, list[str]], valid: str | None, size: int, zero: int
    ) -> None:
        c, depth = self.c, self.depth
        whole = depth if self.whole_in else self.kernel.inputs // 4
        rest = self.kernel.inputs - 4 * whole
        if whole == 1:
            self._slice(i, "0", 4, places, inside, valid, size, zero)
        elif whole:
            # A row of the window, or as many channels of it as float32 adds exactly.
            chunk = max(1, EXACT // (4 * self.columns.kernel)) if self.floating and not self._at_once else whole
            if chunk >= whole:
                with c.loop("k", 0, whole):
                    self._slice(i, "k", 4, places, inside, valid, size, zero)
            else:
                with c.loop("chunk", 0, whole, chunk):
                    with c.loop("k", "chunk", f"min(chunk + {chunk}, {whole})"):
                        self._slice(i, "k", 4, places, inside, valid, size, zero)
                    self._flush()
        if rest:
            with c.block(""):
                self._slice(i, str(whole), rest, places, inside, valid, size, zero)
        if self.floating and not self._at_once:
            self._flush()

    def _slice(
        self,
        i: str,
        k: str,
        lanes: int,
        places: list[int],
        inside: dict[int, list[str]],
        valid: str | None,
        size: int,
        zero: int,
    ) -> None:
        """The products of slice `k` of the input channels, of which `lanes` exist, in row `i` of the window."""
        c, spec, columns, tile = self.c, self.spec, self.columns, self.tile
        kind = "uint" if self.dot else self.real
        halves = self.kernel.half_sums
        padding = c.to_half4(c.constant(zero)) if halves else c.constant(zero)
        if epilogue.numbered(spec) and zero:
            padding = "pad"
        elif self.dot:
            padding = f"{(zero & 255) * 0x01010101}u"
        at = k if self.whole_in else f"{k} * 4"
        for n, place in enumerate(places):
            index = f"line + {place * size} + {at}" if place else f"line + {at}"
            if halves and self.whole_in:
                value = c.load_half4("x", index)
            elif self.whole_in:
                value = c.load("x", index)
            else:
                value = c.load4("x", index, lanes, "0" if self.integer else "0.0f")
                value = c.to_half4(value) if halves else value
            if self.floating:
                value = c.unpack_floats(value)
            tests = ([f"in{n}"] if inside[place] else []) + ([valid] if valid else [])
            if tests:
                value = c.pick(" && ".join(tests), value, padding)
            c.let(kind, f"x{n}", value)
        per = 1 if self.integer else 4
        for j in range(columns.kernel):
            tap = f"({i} * {columns.kernel} + {j})" if i != "0" else str(j)
            step = f"({tap} * {self.depth} + {k})" if self.kernel.taps > 1 else f"({k})"
            for v in range(tile.vectors):
                if self.integer:
                    c.let("uint4", f"w{j}_{v}", c.load("w", f"w{v} + {step}"))
                    for lane in range(0 if self.dot else lanes):
                        c.let("float4", f"w{j}_{v}_{lane}", c.unpack_floats(f"w{j}_{v}.{LANES[lane]}"))
                else:
                    for lane in range(lanes):
                        load = c.load_half4 if halves else c.load
                        c.let(self.real, f"w{j}_{v}_{lane}", load("w", self._plus(f"w{v} + {step} * {per}", lane)))
            for lane in range(1 if self.dot else lanes):
                for p in range(tile.pixels):
                    n = places.index(p * columns.stride + j * columns.dilation)
                    for v in range(tile.vectors):
                        acc = f"f{p}_{v}" if self.floating else f"a{p}_{v}"
                        if self.dot:
                            c.line(f"{acc} = {c.call('dots', f'x{n}', f'w{j}_{v}', acc)};")
                        else:
                            c.line(f"{acc} += x{n}.{LANES[lane]} * w{j}_{v}_{lane};")

    def _store(self, group: str) -> None:
        c, spec, tile = self.c, self.spec, self.tile
        names = epilogue.CONSTANT_NAMES[1 : 1 + len(spec.factors)]
        factors: list[list[str]] = []
        for v in range(tile.vectors):
            kinds = ["int4" if dtype == "int32" else "float4" for dtype in spec.factors]
            each = zip(names, kinds, strict=True)
            factors.append([c.let(k, f"{name}{v}", c.load(name, self._plus("slice", v))) for name, k in each])
        units = 4 if self.whole_out else 1
        channel = "first" if self.whole_out else "first * 4"
        if group != "0":
            channel = f"{group} * {self.kernel.outputs // units} + {channel}"
        # Of the last block, slices that fill it up have no place.
        ragged = self.used % tile.vectors != 0
        for p in range(tile.pixels):
            tail = self.columns.out % tile.pixels != 0 and p > 0
            with c.when([f"ox + {p} < {self.columns.out}"] if tail else []):
                pixel = f"(oy * {self.columns.out} + {self._plus('ox', p)})"
                at = c.let("int", f"o{p}", f"{pixel} * {spec.co // units} + {channel}")
                for v in range(tile.vectors):
                    with c.when([f"first + {v} < {self.used}"] if ragged and v else []):
                        place = self._plus(at, v if self.whole_out else 4 * v)
                        total = f"(b{v} + {c.floats(f'a{p}_{v}')})" if self.kernel.half_sums else f"a{p}_{v}"
                        self._element(total, f"{p}_{v}", place, v, factors[v])

    def _element(self, acc: str, name: str, at: str, v: int, factors: list[str]) -> None:
        c, spec, outputs = self.c, self.spec, self.kernel.outputs

        def put(count: int) -> None:
            residual = None
            if spec.residual:
                kind = spec.epilogue.residual_type(spec.dtype)
                residual = epilogue.read(c, "r", kind, at, count, self.whole_out)
            value = epilogue.finish(c, acc, spec, factors, residual, self.kernel.least)
            value = value if self.whole_out else c.let(epilogue.kind_of(spec), f"y{name}", value)
            epilogue.write(c, "y", spec.out_type, at, value, count, self.whole_out)

        rest = outputs % 4
        if not rest:
            put(4)
            return
        last = f"{self._plus('first', v)} == {self.used - 1}"
        with c.block(f"if ({last})"):
            put(rest)
        if self.used > 1:
            with c.block("else"):
                put(4)


def balanced(extent: int, most: int) -> int:
    """The largest tile up to `most` that leaves the fewest idle pixels in `extent`, at little cost in size."""
    return min(range(1, most + 1), key=lambda n: -(-extent // n) * (n + 1.5))


# (pixels, vectors) by measurement: on lavapipe, whose loads are dear, the more of them are shared the better.
SHAPES = {"opencl": ((4, 2), (4, 4), (8, 1), (8, 2)), "vulkan": ((8, 2), (4, 2), (8, 1), (4, 4))}


def tiles_of(spec: Conv2D, device: Device) -> list[Tile]:
    """Tiles of a convolution, the one to start with first: a host may choose another on the device."""
    _, columns = spec.walk
    used = slices(spec.co // spec.groups)
    found = []
    for pixels, most in SHAPES.get(device.api, SHAPES["vulkan"]):
        # Slices that fill up a block are work for nothing.
        vectors = max(v for v in (1, 2, 4) if v <= most and (used % v == 0 or (spec.groups == 1 and used > 4 * v)))
        tile = Tile(balanced(columns.out, pixels), vectors, (1, 1, 1))
        found.append(replace(tile, group=group_of(spec, tile)))
    return list(dict.fromkeys(found))


def group_of(spec: Conv2D, tile: Tile) -> Size:
    """Work-group of a tile, 64 items: output channels first, whose items read the same inputs."""
    rows, columns = spec.walk
    across = spec.groups * -(-slices(spec.co // spec.groups) // tile.vectors)
    return fill((across, -(-columns.out // tile.pixels), rows.out), (8, 8, 1), 64)


def fill(extents: Size, most: Size, items: int) -> Size:
    """A work-group of powers of two for these extents: within `most` first, then up to `items` where there is more."""
    group = [1, 1, 1]
    for limits in (most, (items, items, items)):
        for axis in range(3):
            limit = min(limits[axis], extents[axis])
            while group[axis] < limit and math.prod(group) * 2 <= items:
                group[axis] *= 2
    return tuple(group)  # type: ignore[return-value]


def _conv(spec: Conv2D, weights: Any, device: Device) -> Conv | None:
    """None for types without kernel."""
    if spec.dtype not in ("float32", "float16", "int8"):
        return None
    # WGSL has dot products of words; what they become is the driver's choice.
    dot = spec.dtype == "int8" and (device.api != "opencl" or bool(device.dot))
    return Conv(spec, tiles_of(spec, device)[0], dot, epilogue.least_shift(weights))


def _coded(spec: CodedConv2D, weights: Any, device: Device) -> CodedConv:
    return CodedConv(spec, tiles_of(spec, device)[0])


RULES: dict[type, Callable[..., GpuKernel | None]] = {Conv2D: _conv, CodedConv2D: _coded}
