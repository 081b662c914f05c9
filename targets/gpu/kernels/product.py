"""Products of two activations: the batched matrix product, and attention with its scores in memory.

Operands are affine views [batch, head, row, depth]. A work item computes a few rows by a few columns in registers; it
reads both operands in vectors wherever four neighbours are one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch
from edgec.targets.gpu.kernels.conv import balanced, fill, slices
from edgec.targets.gpu.kernels.dialect import LANES, Buffer, Code, literal
from edgec.targets.gpu.kernels.rows import softmax
from edgec.targets.kernels.attention import Attention, View
from edgec.targets.kernels.matmul import MatMul
from edgec.targets.mcu.kernels.base import Operand

# What stands for a score that is not visible: a finite number, so that no difference of two is undefined.
LOWEST = -3.0e38
ROWS = 4


@dataclass(frozen=True)
class Grid4:
    """Extents of a product y[batch, head, rows, columns] = sum over depth."""

    batch: int
    heads: int
    rows: int
    columns: int
    depth: int


def _unit(view: View, extents: tuple[int, int, int, int]) -> int:
    """4 where every four neighbours along the last axis are one vector in memory, else 1."""
    steps = [s for s, n in zip(view.strides[:3], extents[:3], strict=True) if n > 1]
    fits = view.strides[3] == 1 and all(v % 4 == 0 for v in (view.size, view.offset, extents[3], *steps))
    return 4 if fits else 1


class _Operand:
    """Reads a view of the buffer `name`; rows of the view are [batch, head / shared, row]."""

    def __init__(self, c: Code, name: str, view: View, unit: int, shared: int = 1) -> None:
        self.c, self.name, self.view, self.unit = c, name, view, unit
        head = "head" if shared == 1 else f"head / {shared}"
        offset = view.offset // unit
        c.let("int", f"{name}_", f"{offset} + batch * {view.strides[0] // unit} + {head} * {view.strides[1] // unit}")

    def row(self, name: str, index: str) -> str:
        """A variable: where a row begins."""
        return self.c.let("int", name, f"{self.name}_ + {index} * {self.view.strides[2] // self.unit}")

    def four(self, row: str, k: str, count: int = 4) -> str:
        """Elements 4 k .. 4 k + count along the last axis as float4."""
        if self.unit == 4:
            return self.c.load(self.name, f"{row} + {k}")
        step = self.view.strides[3]
        if step == 1:
            return self.c.load4(self.name, f"{row} + {k} * 4", count, "0.0f")
        parts = [self.c.load(self.name, f"{row} + ({k} * 4 + {n}) * {step}") for n in range(count)]
        return self.c.vec("float4", parts + ["0.0f"] * (4 - count))


def _positions(c: Code, heads: int) -> None:
    z = c.index(2, "z")
    c.let("int", "batch", f"{z} / {heads}" if heads > 1 else z)
    c.let("int", "head", f"{z} % {heads}" if heads > 1 else "0")


def _steps(c: Code, depth: int, body: Callable[[str, int], None]) -> None:
    """body(slice of the depth, elements in it)."""
    if depth >= 4:
        with c.loop("k", 0, depth // 4):
            body("k", 4)
    if depth % 4:
        with c.block(""):
            body(str(depth // 4), depth % 4)


def rows_by_rows(
    device: Device,
    size: Grid4,
    q: View,
    k: View,
    arguments: tuple[int, ...],
    scale: float = 1.0,
    mask: View | None = None,
    causal: bool = False,
    shared: int = 1,
    filled: bool = False,
) -> Launch:
    """y[..., i, j] = scale * sum_d q[..., i, d] k[..., j, d] + mask[..., i, j], dense. Arguments: q, k, [mask], y.

    filled: rows of y are filled up to whole vectors with `LOWEST`.
    """
    units = [_unit(v, (size.batch, size.heads, n, size.depth)) for v, n in ((q, size.rows), (k, size.columns))]
    # Whether four columns of y are a vector, and whether all of them are columns of the product.
    whole, full = filled or size.columns % 4 == 0, size.columns % 4 == 0
    buffers = [Buffer("left", "float32", units[0]), Buffer("right", "float32", units[1])]
    mask_unit = 1
    if mask is not None:
        mask_unit = _unit(mask, (size.batch, size.heads, size.rows, size.columns))
        buffers.append(Buffer("mask", "float32", mask_unit))
    buffers.append(Buffer("y", "float32", 4 if whole else 1, written=True))
    rows = balanced(size.rows, ROWS)
    extents = (slices(size.columns), -(-size.rows // rows), size.batch * size.heads)
    c = Code(device.api, "product", buffers, extents, fill(extents, (8, 8, 1), 64))
    c.index(0, "column")
    c.let("int", "first", f"{c.index(1, 'tile')} * {rows}")
    _positions(c, size.heads)
    left, right = _Operand(c, "left", q, units[0]), _Operand(c, "right", k, units[1], shared)
    # Items beyond the end repeat the last row, and do not store it.
    for i in range(rows):
        index = f"first + {i}"
        left.row(f"q{i}", f"min({index}, {size.rows - 1})" if size.rows % rows else f"({index})")
    for j in range(4):
        right.row(f"k{j}", f"(column * 4 + {j})" if full else f"min(column * 4 + {j}, {size.columns - 1})")
    for i in range(rows):
        for j in range(4):
            c.var("float4", f"a{i}_{j}", c.constant(0.0))

    def step(at: str, count: int) -> None:
        for i in range(rows):
            c.let("float4", f"x{i}", left.four(f"q{i}", at, count))
        for j in range(4):
            c.let("float4", f"w{j}", right.four(f"k{j}", at, count))
        for i in range(rows):
            for j in range(4):
                c.line(f"a{i}_{j} += x{i} * w{j};")

    _steps(c, size.depth, step)
    if mask is not None:
        seen = _Operand(c, "mask", mask, mask_unit)
    for i in range(rows):
        with c.when([f"first + {i} < {size.rows}"] if size.rows % rows and i else []):
            sums = []
            for j in range(4):
                sums.append(" + ".join(f"a{i}_{j}.{lane}" for lane in LANES))
            c.var("float4", f"y{i}", f"{c.vec('float4', sums)} * {literal(scale)}")

            def store(count: int, i: int = i) -> None:
                if mask is not None:
                    seen.row(f"m{i}", f"(first + {i})")
                    # -inf would make no number of differences later on.
                    added = f"y{i} + {seen.four(f'm{i}', 'column', count)}"
                    c.line(f"y{i} = max({added}, {c.constant(LOWEST)});")
                if causal:
                    for j in range(count):
                        with c.when([f"column * 4 + {j} > first + {i}"]):
                            c.line(f"y{i}.{LANES[j]} = {literal(LOWEST)};")
                for j in range(count, 4 if filled else count):
                    c.line(f"y{i}.{LANES[j]} = {literal(LOWEST)};")
                line = f"(z * {size.rows} + first + {i}) * {slices(size.columns) if whole else size.columns}"
                at = f"{line} + column" if whole else f"{line} + column * 4"
                epilogue.write(c, "y", "float32", at, f"y{i}", count, whole)

            by_width(c, "column", size.columns, store)
    return c.launch(arguments)


def by_width(c: Code, name: str, extent: int, body: Callable[[int], None]) -> None:
    """body(elements) of slice `name` of an extent: four, and the rest of the last slice."""
    rest = extent % 4
    if not rest:
        body(4)
    elif extent < 4:
        body(rest)
    else:
        with c.block(f"if ({name} < {extent // 4})"):
            body(4)
        with c.block("else"):
            body(rest)


def rows_by_columns(
    device: Device,
    size: Grid4,
    p: View,
    v: View,
    y: View,
    arguments: tuple[int, ...],
    shared: int = 1,
    coded: bool = False,
    filled: bool = False,
) -> Launch:
    """y[..., i, :] = sum_j p[..., i, j] v[..., j, :], where rows of v and y are neighbours. Arguments: p, v, [grid], y.

    coded: y are codes, and there is their grid. filled: rows of p are filled up to whole vectors, with anything.
    """
    kind = "int8" if coded else "float32"
    unit = 4 if filled else _unit(p, (size.batch, size.heads, size.rows, size.depth))
    whole = all(_unit(w, (size.batch, size.heads, n, size.columns)) == 4 for w, n in ((v, size.depth), (y, size.rows)))
    lanes = 4 if whole else 1
    buffers = [Buffer("p", "float32", unit), Buffer("v", "float32", lanes)]
    buffers += [Buffer("grid", "float32", 4)] if coded else []
    buffers.append(Buffer("y", kind, lanes, written=True))
    rows = balanced(size.rows, ROWS)
    vectors = 2 if slices(size.columns) % 2 == 0 and whole else 1
    extents = (slices(size.columns) // vectors, -(-size.rows // rows), size.batch * size.heads)
    c = Code(device.api, "product", buffers, extents, fill(extents, (8, 8, 1), 64))
    c.let("int", "column", f"{c.index(0, 'block')} * {vectors}")
    c.let("int", "first", f"{c.index(1, 'tile')} * {rows}")
    _positions(c, size.heads)
    left, right = _Operand(c, "p", p, unit), _Operand(c, "v", v, lanes, shared)
    for i in range(rows):
        left.row(f"p{i}", f"min(first + {i}, {size.rows - 1})" if size.rows % rows else f"(first + {i})")
        for n in range(vectors):
            c.var("float4", f"a{i}_{n}", c.constant(0.0))

    def body(width: int) -> None:
        def step(at: str, count: int) -> None:
            for i in range(rows):
                c.let("float4", f"x{i}", left.four(f"p{i}", at, count))
            for lane in range(count):
                row = right.row(f"v{lane}", f"({at} * 4 + {lane})")
                for n in range(vectors):
                    place = f"column + {n}" if n else "column"
                    c.let("float4", f"w{lane}_{n}", right.four(row, place, width))
                    for i in range(rows):
                        c.line(f"a{i}_{n} += x{i}.{LANES[lane]} * w{lane}_{n};")

        _steps(c, size.depth, step)
        out = _Operand(c, "y", y, lanes)
        for i in range(rows):
            with c.when([f"first + {i} < {size.rows}"] if size.rows % rows and i else []):
                row = out.row(f"y{i}", f"(first + {i})")
                for n in range(vectors):
                    value = f"a{i}_{n}"
                    if coded:
                        value = c.let("int4", f"c{i}_{n}", epilogue.quantised(c, value, c.load("grid", "0")))
                    place = f"column + {n}" if n else "column"
                    at = f"{row} + {place}" if whole else f"{row} + ({place}) * 4"
                    epilogue.write(c, "y", kind, at, value, width, whole)

    if whole:
        body(4)
    else:
        by_width(c, "column", size.columns, body)
    return c.launch(arguments)


@dataclass(frozen=True)
class Product(GpuKernel):
    """`MatMul`. Operands: a, c, y."""

    spec: MatMul

    name: ClassVar[str] = "matmul"

    @property
    def macs(self) -> int:
        return self.spec.macs

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        sizes = (s.a_batch * s.m * s.k, s.c_batch * s.k * s.n, s.batch * s.m * s.n)
        return tuple(Operand(n, "float32") for n in sizes)

    def launches(self, device: Device) -> tuple[Launch, ...]:
        s = self.spec
        size = Grid4(s.batch, 1, s.m, s.n, s.k)
        a = View(s.a_batch * s.m * s.k, 0, (s.m * s.k if s.a_batch > 1 else 0, 0, s.k, 1))
        right = (s.n * s.k if s.c_batch > 1 else 0, 0)
        elements = s.c_batch * s.k * s.n
        if s.transposed:
            return (rows_by_rows(device, size, a, View(elements, 0, (*right, s.k, 1)), (0, 1, 2)),)
        y = View(s.batch * s.m * s.n, 0, (s.m * s.n, 0, s.n, 1))
        return (rows_by_columns(device, size, a, View(elements, 0, (*right, s.n, 1)), y, (0, 1, 2)),)


@dataclass(frozen=True)
class Heads(GpuKernel):
    """`Attention`: scores to scratch memory, softmax of their rows in place, weighted sums. Operands: q, k, v, [mask],
    [grid of the codes], y."""

    spec: Attention

    name: ClassVar[str] = "attention"

    @property
    def macs(self) -> int:
        return self.spec.macs

    @property
    def _row(self) -> int:
        """Elements of a row of scores: keys, filled up to whole vectors."""
        return slices(self.spec.keys) * 4

    @property
    def _scores(self) -> int:
        s = self.spec
        return s.batch * s.heads * s.queries * self._row

    def operands(self) -> tuple[Operand, ...]:
        s = self.spec
        views = [s.q, s.k, s.v] + ([] if s.mask is None else [s.mask])
        out = Operand(s.batch * s.queries * s.heads * s.value_depth, s.dtype)
        grid = [] if s.grid is None else [Operand(4, "float32")]
        return (*[Operand(view.size, "float32") for view in views], *grid, out)

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        return () if self.spec.grid is None else (epilogue.grid_of(*self.spec.grid),)

    def scratch(self) -> tuple[int, ...]:
        return (self._scores * 4,)

    def launches(self, device: Device) -> tuple[Launch, ...]:
        s = self.spec
        masked, coded = s.mask is not None, s.grid is not None
        out = 3 + masked + coded
        scores = out + 1
        first = rows_by_rows(
            device,
            Grid4(s.batch, s.heads, s.queries, s.keys, s.depth),
            s.q,
            s.k,
            (0, 1, 3, scores) if masked else (0, 1, scores),
            s.scale,
            s.mask,
            s.causal,
            s.group,
            filled=True,
        )
        # Rows that see nothing become zero, not equal shares.
        hidden = LOWEST if masked or s.causal else None
        second = softmax(device, s.batch * s.heads * s.queries, self._row, (scores,), hidden=hidden)
        row = s.heads * s.value_depth
        y = View(s.batch * s.queries * row, 0, (s.queries * row, s.value_depth, row, 1))
        p = View(self._scores, 0, (s.heads * s.queries * self._row, s.queries * self._row, self._row, 1))
        # Neighbours of one value each may have any stride.
        v = s.v if s.value_depth > 1 else View(s.v.size, s.v.offset, (*s.v.strides[:3], 1))
        size = Grid4(s.batch, s.heads, s.queries, s.value_depth, s.keys)
        arguments = (scores, 2, out - 1, out) if coded else (scores, 2, out)
        third = rows_by_columns(device, size, p, v, y, arguments, s.group, coded, filled=True)
        return first, second, third


RULES: dict[type, Callable[..., GpuKernel | None]] = {
    MatMul: lambda spec, weights, device: Product(spec),
    Attention: lambda spec, weights, device: Heads(spec),
}
