"""Softmax and normalisation of rows: some work items share a row and what they find by one exchange each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch
from edgec.targets.gpu.kernels.dialect import Buffer, Code, activated, literal
from edgec.targets.kernels.norm import GroupNorm, LayerNorm, RMSNorm
from edgec.targets.kernels.softmax import Softmax
from edgec.targets.mcu.kernels.base import Operand

# Work items that share a row at most: what they exchange is read by each of them, one by one.
MOST_LANES = 16
LEAST_PER_LANE = 2
# From this many short rows on each has a work item of its own, and nothing is exchanged.
MANY_ROWS, SHORT = 4096, 16
# Work items that share one of the long rows of a group norm at most.
GROUP_LANES = 64
# Rows of a work-group.
MOST_ROWS = 4
LOWEST = -3.4028234e38


class Row:
    """Code on one row: `columns` elements of the buffers, as float4 where they fill whole ones."""

    def __init__(
        self,
        device: Device,
        stem: str,
        buffers: list[Buffer],
        rows: int,
        columns: int,
        whole: bool | None = None,
        most: int = MOST_LANES,
    ) -> None:
        self.whole = columns % 4 == 0 if whole is None else whole
        self.count = columns // 4 if self.whole else columns
        self.kind = "float4" if self.whole else "float"
        self.lanes = 1
        while (
            not (rows >= MANY_ROWS and self.count <= SHORT)
            and self.lanes < most
            and self.lanes * 2 * LEAST_PER_LANE <= self.count
        ):
            self.lanes *= 2
        # No item may leave before the exchanges: rows of a group are a divisor of all rows.
        together = max(n for n in (1, 2, MOST_ROWS) if rows % n == 0 and (n == 1 or n * self.lanes <= GROUP_LANES))
        if self.lanes == 1:
            together = 64 if rows >= 64 else 8
        extents = (self.lanes, rows, 1)
        self.c = c = Code(device.api, stem, buffers, extents, (self.lanes, together, 1))
        row = c.index(1, "row", guard=self.lanes == 1)
        if self.lanes > 1:
            c.lane(0, "lane")
            c.let("int", "place", f"{c.lane(1, 'other')} * {self.lanes}")
            self.exchanged = together * self.lanes
        else:
            c.let("int", "lane", "0")
        c.let("int", "first", f"{row} * {self.count}")

    def each(self, body: Callable[[], None]) -> None:
        """`body` for every `i`, a place in the row."""
        with self.c.loop("i", "lane", self.count, self.lanes):
            body()

    def zero(self, value: float) -> str:
        return self.c.constant(value) if self.whole else literal(value)

    def fold(self, name: str, start: float, value: str, largest: bool = False, kept: str = "") -> str:
        """The sum, or the maximum, of `value` over all `i`, known to every item of the row.

        kept: the buffer that the values are written to.
        """
        c = self.c

        def both(a: str, b: str) -> str:
            return f"max({a}, {b})" if largest else f"{a} + {b}"

        c.var(self.kind, f"{name}_part", self.zero(start))

        def step() -> None:
            one = value
            if kept:
                one = c.let(self.kind, "one", value)
                c.store(kept, "first + i", one)
            c.line(f"{name}_part = {both(f'{name}_part', one)};")

        self.each(step)
        one = f"{name}_part"
        if self.whole:
            one = both(both(f"{name}_part.x", f"{name}_part.y"), both(f"{name}_part.z", f"{name}_part.w"))
        if self.lanes == 1:
            return c.let("float", name, one)
        c.shared("float", f"{name}_all", self.exchanged)
        c.line(f"{name}_all[place + lane] = {one};")
        c.barrier()
        c.var("float", name, f"{name}_all[place]")
        with c.loop("j", 1, self.lanes):
            c.line(f"{name} = {both(name, f'{name}_all[place + j]')};")
        return name


def softmax(
    device: Device,
    rows: int,
    columns: int,
    arguments: tuple[int, ...],
    log: bool = False,
    hidden: float | None = None,
) -> Launch:
    """Softmax of rows; arguments: x, y, or one buffer that is both.

    hidden: rows with nothing but values up to this one become zero.
    """
    lanes = 4 if columns % 4 == 0 else 1
    buffers = [Buffer("x", "float32", lanes, shared=True)] if len(arguments) == 2 else []
    buffers.append(Buffer("y", "float32", lanes, written=True, shared=True))
    source = buffers[0].name
    row = Row(device, "softmax", buffers, rows, columns)
    c = row.c
    value = c.load(source, "first + i")
    most = row.fold("most", LOWEST, value, largest=True)
    most4 = c.splat("float4", most) if row.whole else most
    # The powers are where the result will be: a logarithm has no use for them.
    total = row.fold("total", 0.0, f"exp({value} - {most4})", kept="" if log else "y")
    if log:
        c.let("float", "shift", f"{most} + log({total})")
        result = f"{value} - {c.splat('float4', 'shift') if row.whole else 'shift'}"
    else:
        inverse = f"1.0f / {total}"
        if hidden is not None:
            inverse = c.pick(f"{most} <= {literal(hidden)}", "0.0f", inverse)
        c.let("float", "inverse", inverse)
        result = f"{c.load('y', 'first + i')} * inverse"
    row.each(lambda: c.store("y", "first + i", result))
    return c.launch(arguments)


@dataclass(frozen=True)
class SoftmaxRows(GpuKernel):
    """`Softmax`. Operands: x, y."""

    spec: Softmax

    @property
    def inplace(self) -> tuple[int, ...]:
        return (0,)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        n = self.spec.rows * self.spec.columns
        return Operand(n, "float32"), Operand(n, "float32")

    def launches(self, device: Device) -> tuple[Launch, ...]:
        return (softmax(device, self.spec.rows, self.spec.columns, (0, 1), self.spec.log),)


@dataclass(frozen=True)
class Norm(GpuKernel):
    """`LayerNorm` or `RMSNorm`. Operands: x, weight, bias, [grid of the codes], y.

    The variance is that of differences from the mean.
    """

    spec: LayerNorm | RMSNorm

    @property
    def inplace(self) -> tuple[int, ...]:
        return self.spec.inplace

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        n = s.rows * s.columns
        columns = Operand(s.columns, "float32")
        grid = [] if s.grid is None else [Operand(4, "float32")]
        return Operand(n, "float32"), columns, columns, *grid, Operand(n, s.dtype)

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """weight, bias: one per column, or None."""
        grid = [] if self.spec.grid is None else [epilogue.grid_of(*self.spec.grid)]
        return *_affine(self.spec.columns, weights), *grid

    def launches(self, device: Device) -> tuple[Launch, ...]:
        s = self.spec
        lanes = 4 if s.columns % 4 == 0 else 1
        both = bool(s.inplace)
        buffers = [Buffer("x", "float32", lanes, shared=both), Buffer("weight", "float32", lanes)]
        buffers += [Buffer("bias", "float32", lanes)] + ([] if s.grid is None else [Buffer("grid", "float32", 4)])
        buffers += [Buffer("y", s.dtype, lanes, written=True, shared=both)]
        row = Row(device, "norm", buffers, s.rows, s.columns)
        c, share = row.c, literal(1.0 / s.columns)
        value = c.load("x", "first + i")
        if s.centred:
            mean = c.let("float", "mean", f"{row.fold('sum', 0.0, value)} * {share}")
            value = f"({value} - {c.splat('float4', mean) if row.whole else mean})"
        squares = row.fold("squares", 0.0, f"{value} * {value}")
        c.let("float", "factor", f"1.0f / sqrt({squares} * {share} + {literal(s.eps)})")

        def put() -> None:
            kind = row.kind
            c.let(kind, "result", f"{value} * factor * {c.load('weight', 'i')} + {c.load('bias', 'i')}")
            if s.grid is None:
                c.store("y", "first + i", "result")
                return
            four = "result" if row.whole else c.splat("float4", "result")
            c.let("int4", "code", epilogue.quantised(c, four, c.load("grid", "0")))
            epilogue.write(c, "y", "int8", "first + i", "code", 4 if row.whole else 1, row.whole)

        row.each(put)
        return (c.launch(range(len(buffers))),)


@dataclass(frozen=True)
class GroupRows(GpuKernel):
    """`GroupNorm`: the elements of a group are a row. Operands: x, weight, bias, y."""

    spec: GroupNorm
    name = "group_norm"

    @property
    def inplace(self) -> tuple[int, ...]:
        return self.spec.inplace

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        whole, channels = Operand(s.pixels * s.channels, "float32"), Operand(s.channels, "float32")
        return whole, channels, channels, whole

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """weight, bias: one per channel, or None."""
        return _affine(self.spec.channels, weights)

    def launches(self, device: Device) -> tuple[Launch, ...]:
        s = self.spec
        size = s.channels // s.groups
        first = s.layout == "NCHW"
        whole = (s.pixels if first else size) % 4 == 0
        lanes = 4 if whole else 1
        # Four neighbours have one channel where channels come first, and four elsewhere.
        each = 1 if first else lanes
        buffers = [
            Buffer("x", "float32", lanes, shared=True),
            Buffer("weight", "float32", each),
            Buffer("bias", "float32", each),
            Buffer("y", "float32", lanes, written=True, shared=True),
        ]
        row = Row(device, "group_norm", buffers, s.groups, s.pixels * size, whole, GROUP_LANES)
        c, share = row.c, literal(1.0 / (s.pixels * size))
        if first:
            at, channel = "first + i", f"row * {size} + i / {s.pixels // lanes}"
        else:
            width = size // lanes
            at = f"(i / {width}) * {s.channels // lanes} + row * {width} + i % {width}"
            channel = f"row * {width} + i % {width}"
        value = c.load("x", at)
        mean = c.let("float", "mean", f"{row.fold('sum', 0.0, value)} * {share}")
        value = f"({value} - {c.splat('float4', mean) if whole else mean})"
        squares = row.fold("squares", 0.0, f"{value} * {value}")
        c.let("float", "factor", f"1.0f / sqrt({squares} * {share} + {literal(s.eps)})")

        def put() -> None:
            scale, shift = c.load("weight", channel), c.load("bias", channel)
            if not whole:
                result = c.splat("float4", f"{value} * factor * {scale} + {shift}")
            elif first:
                result = f"{value} * (factor * {scale}) + {c.splat('float4', shift)}"
            else:
                result = f"{value} * factor * {scale} + {shift}"
            c.let("float4", "result", result)
            final = activated(c, "result", s.epilogue)
            c.store("y", at, final if whole else f"({final}).x")

        row.each(put)
        return (c.launch((0, 1, 2, 3)),)


def _affine(columns: int, weights: Mapping[str, np.ndarray | None]) -> tuple[np.ndarray, ...]:
    """weight and bias, ones and zeros where there is none."""
    given = (weights.get("weight"), weights.get("bias"))
    return tuple(
        np.full(columns, fill, np.float32) if w is None else w.astype(np.float32).reshape(-1)
        for w, fill in zip(given, (1.0, 0.0), strict=True)
    )


RULES: dict[type, Callable[..., GpuKernel | None]] = {
    Softmax: lambda spec, weights, device: SoftmaxRows(spec),
    LayerNorm: lambda spec, weights, device: Norm(spec),
    RMSNorm: lambda spec, weights, device: Norm(spec),
    GroupNorm: lambda spec, weights, device: GroupRows(spec),
}
