"""Direct convolution on NHWC: also the matrix product (a 1x1 convolution over rows) and grouped convolution.

A register tile of a few output pixels by a few vectors of output channels is accumulated over kernel window and input
channels; weights are packed so that the inner loop reads them in order. Padding is never stored: see `tiling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.kernels import common
from edgec.targets.kernels.common import Epilogue, const, lanes_of, loop, parallel, param, pieces, ramp, round_up
from edgec.targets.kernels.dot import Dot, Lane, Sdot, Smmla, Smull, dot, pack_weights
from edgec.targets.kernels.matmul import TASKS, shares
from edgec.targets.kernels.tiling import Axis, Run, balanced, tiles
from edgec.targets.kernels.unpack import Packed, packed
from edgec.targets.tir import T, tirx

# An inner loop of at most this many multiplications is unrolled.
UNROLLED = 96


@dataclass(frozen=True)
class Blocking:
    """Register tile: `pixels` by `vectors` vectors of output channels. `rows_first`: all channels of a tile of pixels
    before the next one, which reads inputs once and weights often, instead of the other way round."""

    pixels: int
    vectors: int
    rows_first: bool


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or a pool of one sample, NHWC. padding is [top, bottom, left, right]."""

    h: int
    w: int

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The vertical and the horizontal axis."""
        spec: Any = self
        size = (self.h, self.w)
        return tuple(  # type: ignore[return-value]
            Axis(
                size[i],
                (size[i] + spec.padding[2 * i] + spec.padding[2 * i + 1] - spec.dilation[i] * (spec.kernel[i] - 1) - 1)
                // spec.stride[i]
                + 1,
                spec.kernel[i],
                spec.stride[i],
                spec.dilation[i],
                spec.padding[2 * i],
            )
            for i in range(2)
        )

    @property
    def out(self) -> tuple[int, int]:
        return tuple(axis.out for axis in self.axes)  # type: ignore[return-value]

    def key(self) -> str:
        return repr(self)


@dataclass(frozen=True)
class Weighted(Window):
    """What convolutions with weights share: the order of parameters and the epilogue."""

    @property
    def tuning_key(self) -> str:
        """What the choice of a register tile depends on, as text: no values of the epilogue, no defaults."""
        spec: Any = self
        parts = [spec.name, spec.dtype]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("dtype", "x_zp", "epilogue") and value != f.default:
                parts.append(f"{f.name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}")
        if spec.dtype == "int8":
            parts.append(spec.epilogue.requant)
        return " ".join(parts + ["residual"] * self.residual)

    @property
    def residual(self) -> bool:
        spec: Any = self
        return spec.epilogue.residual or spec.epilogue.add is not None

    @property
    def factors(self) -> tuple[str, ...]:
        """Types of the per-channel vectors behind the bias: m and, for RQ1, shift."""
        spec: Any = self
        if spec.dtype != "int8":
            return ()
        return ("int32", "int32") if spec.epilogue.requant == "RQ1" else ("float32",)

    @property
    def parameters(self) -> int:
        return 4 + len(self.factors) + len(self.beside) + self.residual

    @property
    def beside(self) -> tuple[str, ...]:
        """Types of what unpacking reads beside the weights, parameters right behind them."""
        return ()

    @property
    def out_type(self) -> str:
        spec: Any = self
        return spec.epilogue.out_type(spec.dtype)

    @property
    def inplace(self) -> tuple[int, ...]:
        """The output may overwrite the residual: every element is read right before it is written."""
        spec: Any = self
        same = self.residual and spec.epilogue.residual_type(spec.dtype) == self.out_type
        return (self.parameters - 2,) if same else ()


@dataclass(frozen=True)
class Conv2D(Weighted):
    """One sample, NHWC. padding is [top, bottom, left, right]; `x_zp` is the code in padded places (int8).

    bits: what the codes of int8 weights need; fewer than 8 are stored packed (see `unpack`).
    """

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
    bits: int = 8

    name = "conv2d"
    # Whether a tile says in which order its loops run.
    reorders = True

    @property
    def tile(self) -> type[Tile]:
        """The code of its register tiles."""
        return Tile

    @property
    def macs(self) -> int:
        oh, ow = self.out
        return oh * ow * self.co * self.kernel[0] * self.kernel[1] * (self.ci // self.groups)

    def dot(self, device: Device) -> Dot:
        """How inputs and weights are multiplied; the same for `expanded`."""
        return dot(device, self.dtype, self.ci // self.groups, math.prod(self.out))

    def packed(self, device: Device) -> Packed | None:
        """How weights of fewer than 8 bits are stored; None where each has a byte."""
        how, pixels = self.dot(device), math.prod(self.out) if self.groups == 1 else 1
        return packed(how, self.bits, -(-(self.ci // self.groups) // how.group), pixels)

    @property
    def walk(self) -> tuple[Axis, Axis]:
        """The axes as walked: a pointwise convolution without stride or padding is one long row."""
        if self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding):
            pixels = self.h * self.w
            return Axis(1, 1, 1, 1, 1, 0), Axis(pixels, pixels, 1, 1, 1, 0)
        return self.axes

    def prepared(self, x: Any, device: Device) -> Any:
        """The input in the form that tiles read; emits what makes it."""
        return x

    def expanded(self, device: Device) -> Conv2D:
        """The convolution that the tiles compute: of a padded copy, when input channels do not fill whole groups."""
        group = self.dot(device).group
        inputs = self.ci // self.groups
        if inputs % group == 0:
            return self
        top, bottom, left, right = self.padding
        return replace(
            self,
            h=self.h + top + bottom,
            w=self.w + left + right,
            ci=self.groups * round_up(inputs, group),
            padding=(0, 0, 0, 0),
        )

    def blocking(self, device: Device) -> Blocking:
        """The register tile, and the order of the loops around it: from the device's table or the cheapest modelled."""
        return device.tuning.get(self.tuning_key) or self.candidates(device)[0]

    def candidates(self, device: Device) -> list[Blocking]:
        """All register tiles that fit, lowest modelled cost first."""
        how = self.dot(device)
        outputs = self.co // self.groups
        rows, columns = self.expanded(device).walk
        depth = self.depth(device) * self.kernel[0] * self.kernel[1]
        weights = outputs * depth * how.group * np.dtype(self.dtype).itemsize
        rows_first = weights <= device.l2_kb * 1024 // 2
        packing = self.packed(device)
        inline = None if packing is None or packing.hoisted else packing
        options: dict[Blocking, float] = {}
        for vectors in range(1, 9):
            if (vectors - 1) * how.lanes >= outputs:
                break
            if not self.divides(vectors * how.lanes):
                continue
            for most in range(1, 29):
                spare = 0 if packing is None else packing.spare(device, most, vectors)
                if not fits(how, device, most, vectors, spare):
                    break
                pixels = round_up(balanced(columns.out, most), how.pixels)
                cost = rows.out * tile_cost(how, columns.out, pixels, outputs, vectors, depth, inline)
                options.setdefault(Blocking(pixels, vectors, rows_first), cost)
        return sorted(options, key=lambda option: options[option])

    def depth(self, device: Device) -> int:
        """Groups of input channels that are multiplied under one tap."""
        return -(-(self.ci // self.groups) // self.dot(device).group)

    def divides(self, block: int) -> bool:
        """Whether output channels may be taken in blocks of this many."""
        return True

    def pack(
        self,
        device: Device,
        w: np.ndarray,
        bias: np.ndarray | None,
        m: np.ndarray | None = None,
        shift: np.ndarray | None = None,
        **products: Any,
    ) -> tuple[np.ndarray, ...]:
        """Weights OIHW and per-channel vectors to the order of the kernel's parameters, padded to whole blocks.

        An int8 bias has one row for each set of taps that the border leaves, with what the missing ones would add.
        """
        how = self.dot(device)
        block = self.blocking(device).vectors * how.lanes
        per_group = self.co // self.groups
        padded = round_up(per_group, block)
        grouped = w.reshape(self.groups, per_group, self.ci // self.groups, *self.kernel).transpose(0, 1, 3, 4, 2)
        stored = self.pack_products(grouped, device, block, **products)

        def channels(values: np.ndarray | None, dtype: str, fill: int = 0) -> np.ndarray:
            lead = values.shape[:-1] if values is not None else ()
            full = np.full((*lead, self.groups, padded), fill, dtype)
            if values is not None:
                full[..., :per_group] = values.reshape(*lead, self.groups, per_group)
            return full.reshape(*lead, -1)

        if self.dtype != "int8":
            return *stored, channels(np.zeros((1, self.co), self.dtype) if bias is None else bias[None], self.dtype)
        extra = (channels(m, "int32"), channels(shift, "int32", 1))
        if self.epilogue.requant != "RQ1":
            extra = (channels(m, "float32"),)
        whole = self.expanded(device)
        rows = [self._border_bias(w, bias, how, i, j) for i in whole._row_classes() for j in whole._column_classes()]
        return *stored, channels(np.stack(rows), "int32"), *extra

    def pack_products(self, w: np.ndarray, device: Device, block: int) -> tuple[np.ndarray, ...]:
        """What a tile multiplies with, for `product_params`: weights [groups, outputs, kh, kw, inputs] in its order."""
        stored, packing = pack_weights(w, self.dot(device), block), self.packed(device)
        return (stored if packing is None else packing.pack(stored),)

    def product_params(self, device: Device, blocks: int) -> list[Any]:
        """Parameters of the kernel for what `pack_products` makes; `blocks` blocks of output channels in all."""
        how, packing = self.dot(device), self.packed(device)
        units, registers = (self.depth(device), 1) if packing is None else (packing.units, packing.form.nbytes)
        vectors = self.blocking(device).vectors
        shape = (blocks, self.kernel[0], self.kernel[1] * units, vectors, registers * how.weight_elements)
        return [param("w", shape, self.dtype)]

    def unpack(self, packing: Packed, products: list[Any], block: Any, target: Any, place: Any, elements: int) -> None:
        """Write the weights of a block, one by one, to block `place` of the buffer `target`."""
        packing.copy(products[0], block, target, place, elements)

    def _row_classes(self) -> list[tuple[int, ...]]:
        return self.axes[0].classes() if self._bordered else [tuple(range(self.kernel[0]))]

    def _column_classes(self) -> list[tuple[int, ...]]:
        return self.axes[1].classes() if self._bordered else [tuple(range(self.kernel[1]))]

    @property
    def _bordered(self) -> bool:
        return self.dtype == "int8" and any(axis.padded for axis in self.walk)

    def _border_bias(
        self, w: np.ndarray, bias: np.ndarray | None, how: Dot, rows: tuple[int, ...], columns: tuple[int, ...]
    ) -> np.ndarray:
        """Bias [co] of outputs that have these taps. The taps left out see the code of zero; the others `offset`."""
        sums = w.astype(np.int64).sum(1)
        there = sums[:, list(rows)][:, :, list(columns)].sum((1, 2))
        total = (0 if bias is None else bias.astype(np.int64)) + self.x_zp * (sums.sum((1, 2)) - there)
        return (total - how.offset * there).astype(np.int32)

    def prim_func(self, device: Device) -> Any:
        """Parameters: x, packed weights, [what is beside them], bias, [m, [shift]], [residual], y."""
        how = self.dot(device)
        inner = self.expanded(device)
        shape = self.blocking(device)
        block = shape.vectors * how.lanes
        per_group = self.co // self.groups
        blocks = round_up(per_group, block) // block
        rows, columns = inner.walk
        packing = self.packed(device)
        classes = len(inner._row_classes()) * len(inner._column_classes())
        channels = self.groups * blocks * block
        with common.prim_func(self.name, self.inplace) as builder:
            x = param("x", (self.h * self.w * self.ci,), self.dtype)
            products = self.product_params(device, self.groups * blocks)
            bias = param("bias", (classes, channels), how.acc_type)
            factors = [param(f"factor{i}", (channels,), t) for i, t in enumerate(self.factors)]
            size = rows.out * columns.out * self.co
            other = self.epilogue.residual_type(self.dtype)
            residual = param("residual", (size,), other) if self.residual else None
            y = param("y", (size,), self.out_type)
            source = x
            if inner is not self:
                source = T.alloc_buffer((inner.h * inner.w * inner.ci,), self.dtype)
                expand_copy(x, source, self, inner.ci)
            source = inner.prepared(source, device)
            tile = self.tile(inner, device, shape, source, products, bias, factors, residual, y)
            runs = tiles(columns, shape.pixels)
            whole, rest = divmod(per_group, block)

            def all_blocks(body: Callable[[Any, int], None]) -> None:
                loop(whole, lambda b: body(b, block))
                if rest:
                    body(whole, rest)

            def across(row: Any, body: Callable[[Run, Any], None]) -> None:
                """All tiles of a row."""
                for run in runs:
                    loop(run.repeat, lambda t, run=run: body(run, run.start + t * run.count))

            def pixels_first(group: Any) -> None:
                def at(row: Any, run: Run, column: Any) -> None:
                    all_blocks(lambda b, n: tile.emit(group, b, row, column, run, n))

                if rows.out > 1:
                    parallel(rows.out, lambda row: across(row, lambda run, column: at(row, run, column)))
                else:
                    # One long row: its tiles are the parallel loop.
                    steps = sum(run.repeat for run in runs)
                    parallel(steps, lambda t: _pick(t, runs, lambda run, i: at(0, run, run.start + i * run.count)))

            def channels_first(group: Any) -> None:
                def body(b: Any, n: int) -> None:
                    loop(
                        rows.out,
                        lambda row: across(row, lambda run, column: tile.emit(group, b, row, column, run, n)),
                    )

                if rest:
                    last = lambda: body(whole, rest)  # noqa: E731
                    parallel(whole + 1, lambda b: either(b < whole, lambda: body(b, block), last))
                else:
                    parallel(whole, lambda b: body(b, block))

            def unpacked_first(task: Any) -> None:
                """All pixels of a block's channels, from a copy of its weights, one by one."""

                def body(b: Any, n: int) -> None:
                    assert packing is not None
                    self.unpack(packing, products, b, tile.w, task, how.weight_elements)
                    loop(
                        rows.out,
                        lambda row: across(row, lambda run, column: tile.emit(0, b, row, column, run, n, task)),
                    )

                shares(task, tasks, whole, lambda b: body(b, block))
                if rest:
                    either(task == tasks - 1, lambda: body(whole, rest), lambda: None)

            if packing is not None and packing.hoisted:
                tasks = max(1, min(TASKS, whole))
                groups = self.kernel[1] * self.depth(device)
                copied = (tasks, self.kernel[0], groups, shape.vectors, how.weight_elements)
                tile.w = T.alloc_buffer(copied, self.dtype)
                parallel(tasks, unpacked_first)
            else:
                parallel(self.groups, pixels_first if shape.rows_first else channels_first)
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
        return common.finish_reference(acc, bias, m, shift, residual, self.epilogue, self.dtype)


def fits(how: Dot, device: Device, pixels: int, vectors: int, spare: int = 0) -> bool:
    """Whether a register tile leaves room for its operands: no more, or LLVM spills in the inner loop.

    spare: registers that unpacking weights takes.
    """
    registers = device.registers - spare
    if isinstance(how, Smull):
        return pixels * vectors <= 8 and vectors <= 2
    if isinstance(how, Smmla):
        return round_up(pixels, 2) * (vectors + 1) + 2 <= registers
    if device.is_arm64 and how.wide == 1 and (type(how) is Dot or isinstance(how, Sdot)):
        # Inputs are loaded one by one, the fewer ahead of their products the more products each has.
        return pixels * vectors + vectors + (pixels if vectors in (2, 3) else 4) <= registers
    if isinstance(how, Lane | Sdot):
        return pixels * vectors + pixels + vectors < registers
    return pixels * vectors + vectors + 1 + (how.dtype == "int8") <= registers


def tile_cost(
    how: Dot, columns: int, pixels: int, outputs: int, vectors: int, depth: int, packing: Packed | None = None
) -> float:
    """Modelled instructions of one row of tiles; `depth` groups are summed. packing: of weights unpacked on the way.

    Counted: multiplications, or what the latency of too few accumulators takes; input and weight loads, of which
    neighbours pair up; the loop's own; and the epilogue.
    """

    weights = 0.5 if packing is None else packing.cost

    def tile(count: int, used: int) -> float:
        count = round_up(count, how.pixels)
        busy = max(count * used * (3 if isinstance(how, Smull) else 1), 8) * how.wide
        extra = count * (5 if isinstance(how, Smull) else 2 if isinstance(how, Smmla) else 1)
        epilogue = count * used * 2.5
        if how.dtype == "int8":
            # Whole registers of codes are stored with fewer instructions than parts of them.
            epilogue = count * sum(8 + 1.5 * size for _, size in pieces(used * how.lanes, 4 * how.lanes))
        return depth / how.wide * (busy + extra + weights * used * how.wide + 4) + epilogue + 20

    full, rest = divmod(columns, pixels)
    whole, tail = divmod(-(-outputs // how.lanes), vectors)
    total = 0.0
    for count, repeat in ((pixels, full), (rest, 1)):
        if count and repeat:
            total += repeat * (whole * tile(count, vectors) + (tile(count, tail) if tail else 0.0))
    return total


class Tile:
    """Code of one register tile of a convolution. products: the parameters that `Conv2D.product_params` made."""

    def __init__(
        self,
        spec: Conv2D,
        device: Device,
        shape: Blocking,
        x: Any,
        products: list[Any],
        bias: Any,
        factors: list[Any],
        residual: Any,
        y: Any,
    ) -> None:
        self.spec, self.device, self.how, self.packing = spec, device, spec.dot(device), spec.packed(device)
        if self.packing is not None and self.packing.hoisted:
            self.packing = None
        self.w, *self.extra = products
        self.x, self.bias, self.factors, self.residual, self.y = x, bias, factors, residual, y
        self.rows, self.columns = spec.walk
        how = self.how
        self.block = shape.vectors * how.lanes
        elements, held = how.held
        units = -(-shape.pixels // how.pixels)
        self.acc = T.alloc_buffer((units, shape.vectors, how.sums, how.lanes), how.acc_type, scope="local")
        self.held = T.alloc_buffer((units, elements), held, scope="local")
        self.weights = T.alloc_buffer((shape.vectors, how.weight_elements), spec.dtype, scope="local")

    def emit(
        self, group: Any, number: Any, row: Any, column: Any, run: Run, channels: int, weights: Any = None
    ) -> None:
        """Pixels column .. column + run.count of `row`, `channels` channels of block `number` of `group`.

        weights: the block of `w` to read, where that is another one.
        """
        spec, how, rows, columns = self.spec, self.how, self.rows, self.columns
        inputs, per_group = spec.ci // spec.groups, spec.co // spec.groups
        index = group * (round_up(per_group, self.block) // self.block) + number
        weights = index if weights is None else weights
        used = -(-channels // how.lanes)
        depth = self.depth(index)
        offset = index * self.block
        # Where pixels go in pairs, the last one goes with itself when it has no neighbour.
        members = [min(p, run.count - 1) for p in range(round_up(run.count, how.pixels))]
        bias_rows = [self._bias_row(row, run.start + p) for p in members]
        for p in range(0, len(members), how.pixels):
            for v in range(used):
                ours = bias_rows[p : p + how.pixels]
                bias = [self._early(self._bias(r, offset, v)) for r in ours]
                for s, start in enumerate(how.start(bias)):
                    T.buffer_store(self.acc, start, [p // how.pixels, v, s, ramp(0, how.lanes)])

        def first(i: Any, j: Any, p: int) -> Any:
            """Place in x of the first channel under tap (i, j) of a pixel."""
            line = row * rows.stride + i * rows.dilation - rows.before
            place = (column + members[p]) * columns.stride + j * columns.dilation - columns.before
            return (line * spec.w + place) * spec.ci + group * inputs

        def kernel_row(i: Any) -> None:
            everyone = list(range(len(members)))
            if run.inner and self.whole_rows:
                self._products(weights, i, 0, columns.kernel * depth, everyone, used, lambda p: first(i, 0, p))
            elif run.inner:
                loop(
                    columns.kernel,
                    lambda j: self._products(weights, i, j * depth, depth, everyone, used, lambda p: first(i, j, p)),
                )
            else:
                for j in range(columns.kernel):
                    there = [p for p in everyone if j in columns.taps(run.start + members[p])]
                    if there:
                        self._products(weights, i, j * depth, depth, there, used, lambda p, j=j: first(i, j, p))

        low, high = rows.bounds(row)
        if isinstance(high, int):
            loop(high, kernel_row)
        else:
            with T.serial(low, high) as i:
                kernel_row(i)
        here = (row * columns.out + column) * spec.co + group * per_group + number * self.block
        for p in range(run.count):
            self._store(p, used, channels, offset, here + p * spec.co, bias_rows[p])

    @property
    def whole_rows(self) -> bool:
        """Whether a row of the window is walked in one loop: it is one stretch of memory."""
        seamless = self.packing is None or self.packing.seamless
        return self.columns.dilation == 1 and self.spec.groups == 1 and seamless

    def depth(self, index: Any) -> Any:
        """Groups under one tap for block `index` of output channels, an int or a TIR expression."""
        return self.spec.ci // self.spec.groups // self.how.group

    def place(self, index: Any, k: Any) -> Any:
        """Where group `k` of a row of the window, or of a tap, lies from its first group on."""
        return k * self.how.group

    def _bias(self, row: Any, offset: Any, v: int) -> Any:
        return self.bias[row, ramp(offset + v * self.how.lanes, self.how.lanes)]

    def _early(self, bias: Any) -> Any:
        """The bias that is summed with the products: none where these are shifted afterwards."""
        shifted = self.packing is not None and self.packing.fraction
        return const(0, self.how.acc_type, self.how.lanes) if shifted else bias

    def _bias_row(self, row: Any, pixel: int) -> Any:
        if not self.spec._bordered:
            return 0
        return self.rows.class_of(row) * len(self.columns.classes()) + self.columns.class_of(pixel)

    def _products(
        self,
        index: Any,
        i: Any,
        start: Any,
        count: Any,
        pixels: list[int],
        used: int,
        first: Callable[[int], Any],
    ) -> None:
        """Add the products of `count` groups from group `start` of kernel row `i`; `first` is where a pixel's lie."""
        how = self.how
        units = sorted({p // how.pixels for p in pixels})

        def load(k: Any, unit: int, groups: int) -> Any:
            """The inputs of the pixels that go together; zeros for one that does not have this tap."""
            size = how.group * groups
            members = range(unit * how.pixels, (unit + 1) * how.pixels)
            nothing = const(0, self.spec.dtype, size)
            at = self.place(index, k)
            inputs = [self.x[ramp(first(p) + at, size)] if p in pixels else nothing for p in members]
            return how.load(inputs, groups)

        def load_weights(k: Any, more: int, v: int) -> None:
            """Weights of group k + more; k is a multiple of the groups that a unit of packed weights holds."""
            size, packing = how.weight_elements, self.packing
            value = None
            if packing is None:
                value = self.w[index, i, start + k + more, v, ramp(0, size)]
            else:
                unit = packing.unit(start, k, more)
                value = packing.codes(
                    lambda r: self.w[index, i, unit, v, ramp(r * size, size)], more % packing.form.fields, size
                )
            T.buffer_store(self.weights, value, [v, ramp(0, size)])

        def multiply(unit: int, v: int, lane: int | None) -> None:
            acc = [self.acc[unit, v, s, ramp(0, how.lanes)] for s in range(how.sums)]
            weights = self.weights[v, ramp(0, how.weight_elements)]
            x = self.held[unit, ramp(0, how.held[0])]
            for s, value in enumerate(how.multiply(acc, weights, x, lane)):
                T.buffer_store(self.acc, value, [unit, v, s, ramp(0, how.lanes)])

        def step(k: Any, more: int, groups: int) -> None:
            """The products of groups k + more .. k + more + groups."""
            for unit in units:
                T.buffer_store(self.held, load(k + more, unit, groups), [unit, ramp(0, how.held[0])])
            for g in range(groups):
                lane = g if groups > 1 else None
                if how.pixels > 1:
                    # Its many weight registers live for a short time each.
                    for v in range(used):
                        load_weights(k, more + g, v)
                        for unit in units:
                            multiply(unit, v, lane)
                    continue
                for v in range(used):
                    load_weights(k, more + g, v)
                for unit in units:
                    for v in range(used):
                        multiply(unit, v, lane)

        repeat = max(1, min(8, UNROLLED // (2 * len(pixels) * used))) if how.wide == 1 else 1
        if self.packing is not None:
            repeat = self.packing.repeat(how.wide, repeat)

        def several(k: Any, first: int, times: int) -> None:
            for t in range(times):
                step(k, first + t * how.wide, how.wide)

        if not isinstance(count, int):
            stride = how.wide * repeat
            with T.serial(0, tirx.floordiv(count, stride)) as k:
                several(k * stride, 0, repeat)
            if repeat > 1:
                with T.serial(tirx.floordiv(count, stride) * repeat, tirx.floordiv(count, how.wide)) as k:
                    step(k * how.wide, 0, how.wide)
            return
        whole = count // (how.wide * repeat)
        loop(whole, lambda k: several(k * (how.wide * repeat), 0, repeat))
        done = whole * how.wide * repeat
        rest = (count - done) // how.wide
        several(done, 0, rest)
        for k in range(rest * how.wide, count - done):
            step(done, k, 1)

    def _store(self, p: int, used: int, channels: int, offset: Any, here: Any, bias_row: Any) -> None:
        spec, how = self.spec, self.how
        values = []
        for v in range(used):
            unit, pixel = divmod(p, how.pixels)
            acc = [self.acc[unit, v, s, ramp(0, how.lanes)] for s in range(how.sums)]
            bias = self._bias(bias_row, offset, v)
            value = how.total(acc, self._early(bias), pixel)
            if self.packing is not None and self.packing.fraction:
                value = tirx.shift_right(value, const(self.packing.fraction, how.acc_type, how.lanes)) + bias
            values.append(value)
        store_channels(
            values, how.lanes, channels, self.factors, offset, self.residual, self.y, here, spec, self.device
        )


def store_channels(
    values: list[Any],
    lanes: int,
    channels: int,
    factors: list[Any],
    offset: Any,
    residual: Any,
    y: Any,
    here: Any,
    spec: Any,
    device: Device,
) -> None:
    """Apply the epilogue of `spec` to the first `channels` lanes of `values` and store them from y[here].

    Per-channel factors are read from `offset`. Bytes are stored in whole registers where they fill them.
    """
    most = max(16, 4 * lanes if lanes == 16 else lanes) if spec.out_type == "int8" else lanes
    for start, size in pieces(channels, most):
        width = min(size, lanes)
        parts = range(start, start + size, width)
        T.buffer_store(
            y,
            common.finish(
                [lanes_of(values, lanes, at, width) for at in parts],
                [[f[ramp(offset + at, width)] for f in factors] for at in parts],
                [] if residual is None else [residual[ramp(here + at, width)] for at in parts],
                spec.epilogue,
                spec.dtype,
                width,
                device,
            ),
            [ramp(here + start, size)],
        )


def _pick(t: Any, runs: Sequence[Run], body: Callable[[Run, Any], None]) -> None:
    """`body` of the run that step `t` falls in, and the tile's number in it."""
    first, *others = runs
    if not others:
        body(first, t)
        return
    either(t < first.repeat, lambda: body(first, t), lambda: _pick(t - first.repeat, others, body))


def either(condition: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Code of `then` or of `otherwise`, by a condition that may be known now."""
    if isinstance(condition, bool):
        (then if condition else otherwise)()
        return
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def expand_copy(x: Any, padded: Any, spec: Conv2D, channels: int) -> None:
    """Copy the input of `spec` into a larger map: its padding around it, `channels` channels in all, zeros behind."""
    top, bottom, left, right = spec.padding
    width = spec.w + left + right
    inputs, outputs = spec.ci // spec.groups, channels // spec.groups
    border, zero = const(spec.x_zp, spec.dtype), const(0, spec.dtype)

    def fill(row: Any, first: int, count: int) -> None:
        start = (row * width + first) * channels
        loop(count * channels, lambda k: T.buffer_store(padded, border, [start + k]))

    def pixel(row: Any, column: Any) -> None:
        source, target = (row * spec.w + column) * spec.ci, ((row + top) * width + column + left) * channels

        def group(g: Any) -> None:
            for k in range(outputs) if outputs <= 16 else ():
                value = x[source + g * inputs + k] if k < inputs else zero
                T.buffer_store(padded, value, [target + g * outputs + k])
            if outputs > 16:
                loop(inputs, lambda k: T.buffer_store(padded, x[source + g * inputs + k], [target + g * outputs + k]))
                for k in range(inputs, outputs):
                    T.buffer_store(padded, zero, [target + g * outputs + k])

        loop(spec.groups, group)

    def line(row: Any) -> None:
        fill(row + top, 0, left)
        loop(spec.w, lambda column: pixel(row, column))
        fill(row + top, left + spec.w, right)

    loop(top, lambda row: fill(row, 0, width))
    loop(spec.h, line)
    loop(bottom, lambda row: fill(row + (top + spec.h), 0, width))


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
