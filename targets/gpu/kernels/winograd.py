"""3x3 convolutions by Winograd's minimal filtering: fewer multiplications, more memory.

F(m, 3) computes m x m outputs from n x n inputs, n = m + 2, with n^2 products for each pair of channels where the
direct way takes 9 m^2: 36 instead of 144 for m = 4, 16 instead of 36 for m = 2 (Lavin and Gray, CVPR 2016). Three
launches: inputs to n^2 values a tile, a matrix product for each of the n^2 points, and back with the epilogue. What is
between them stands in scratch memory, as [points][tiles][slices of four channels][4].

The points are 0, infinity and +-h: h = 1 for m = 2, and h = sqrt(1/2), sqrt(2) for m = 4, which loses less than the
usual 1 and 2 (errors of points: Barabasz et al., ACM TOMS 46, 2020). A pair +-h shares its sums, so a work item takes
pair by pair and holds few values at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch
from edgec.targets.gpu.kernels.conv import Conv, Tile, balanced, fill, slices, tiles_of
from edgec.targets.gpu.kernels.depthwise import inside
from edgec.targets.gpu.kernels.dialect import LANES, Buffer, Code, literal
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.mcu.kernels.base import Operand

# The positive halves of the finite points other than 0, by m.
HALVES = {2: (1.0,), 4: (math.sqrt(0.5), math.sqrt(2.0))}


def points(m: int) -> list[float]:
    """The finite points in the order of the transforms; infinity is behind them."""
    return [0.0, *itertools.chain.from_iterable((h, -h) for h in HALVES[m])]


@functools.cache
def matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A^T [m, n], G [n, 3], B^T [n, n]) in float64: the correlation of d and g is A^T ((G g) * (B^T d)).

    Toom-Cook (S. Winograd, Arithmetic Complexity of Computations, 1980): rows of A^T and G are powers of the points,
    those of B^T the coefficients of the product of (x - p) over the other points p, and G takes the denominators.
    """
    finite = points(m)
    size = len(finite) + 1
    at, g, bt = np.zeros((m, size)), np.zeros((size, 3)), np.zeros((size, size))
    for i, p in enumerate(finite):
        others = [q for q in finite if q != p]
        at[:, i] = [p**r for r in range(m)]
        g[i] = np.array([p**r for r in range(3)]) / np.prod([p - q for q in others])
        bt[i, : size - 1] = np.poly(others)[::-1]
    at[m - 1, -1], g[-1, 2], bt[-1] = 1.0, 1.0, np.poly(finite)[::-1]
    return at, g, bt


@dataclass(frozen=True)
class Winograd(Conv):
    """`Conv2D` of 3x3 taps and stride 1, channels in whole slices. Operands: x, weights, transformed weights, bias,
    [residual], y: the weights of the direct way, too, which is among the variants.

    m: see above. tile: of the product: tiles by slices of outputs.
    """

    m: int = 4

    @property
    def size(self) -> int:
        return self.m + 2

    @property
    def across(self) -> tuple[int, int]:
        """Tiles along a column and along a row."""
        rows, columns = self.spec.axes
        return -(-rows.out // self.m), -(-columns.out // self.m)

    @property
    def tiles(self) -> int:
        return math.prod(self.across)

    @property
    def products(self) -> int:
        """Multiplications by weights; `macs` are those of the direct way, by which layers are compared."""
        return self.size**2 * self.tiles * self.spec.ci * self.spec.co

    @property
    def product_in_halves(self) -> bool:
        """F(4, 3) sums in float32 all the same: with halves it would lose 6 dB more than the direct way, which F(2, 3)
        does not."""
        return self.half_sums and self.m == 2

    @property
    def scale(self) -> float:
        """Of the transformed inputs, so that halves do not overflow before those of the activations do. Exact."""
        return 1.0 if self.spec.dtype == "float32" else {2: 1 / 4, 4: 1 / 16}[self.m]

    def operands(self) -> tuple[Operand, ...]:
        x, w, *rest = super().operands()
        transformed = self.size**2 * self.output_slices * slices(self.inputs) * 16
        return (x, w, Operand(transformed, self.spec.dtype), *rest)

    def scratch(self) -> tuple[int, ...]:
        each = np.dtype(self.spec.dtype).itemsize * self.size**2 * self.tiles * 4
        return each * slices(self.spec.ci), each * slices(self.spec.co)

    def pack(self, device: Device, **weights: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """w: OIHW; bias: one per channel."""
        plain, *rest = super().pack(device, **weights)
        w = weights["w"]
        assert w is not None
        _, g, _ = matrices(self.m)
        u = np.einsum("ai,ocij,bj->aboc", g, w.astype(np.float64), g) / self.scale
        full = np.zeros((self.size**2, self.output_slices * 4, self.inputs))
        full[:, : self.outputs] = u.reshape(self.size**2, self.outputs, self.inputs)
        full = full.reshape(self.size**2, self.output_slices, 4, slices(self.inputs), 4)
        transformed = np.ascontiguousarray(full.transpose(0, 1, 3, 4, 2)).astype(self.spec.dtype).reshape(-1)
        return plain, transformed, *rest

    def launches(self, device: Device) -> tuple[Launch, ...]:
        return _inputs(self, device), _product(self, device), _outputs(self, device)

    def variants(self, device: Device) -> tuple[tuple[Launch, ...], ...]:
        own = [replace(self, tile=t).launches(device) for t in product_tiles(self, device)]
        # The direct way has no transformed weights among its operands.
        direct = [
            tuple(replace(x, arguments=tuple(a + (a > 1) for a in x.arguments)) for x in launches)
            for launches in Conv(self.spec, tiles_of(self.spec, device)[0], half_sums=self.half_sums).variants(device)
        ]
        return (own[0], direct[0], *own[1:], *direct[1:])


def _combined(terms: Iterable[tuple[float, str]]) -> str:
    """The sum of factors times float4 variables."""
    text = ""
    for factor, name in terms:
        if factor:
            term = name if abs(factor) == 1 else f"{literal(abs(factor))} * {name}"
            text += (" - " if factor < 0 else " + ") + term if text else ("-" if factor < 0 else "") + term
    return text


def _rows_of(m: int) -> list[tuple[int, int]]:
    """Rows of B^T two by two: those of 0 and infinity, which share nothing, then those of each +-h."""
    return [(0, m + 1), *((1 + 2 * i, 2 + 2 * i) for i in range(len(HALVES[m])))]


def _pair(c: Code, m: int, pair: int, d: Sequence[str], name: str) -> tuple[str, str]:
    """Two rows of B^T times the variables d, as expressions. What they share becomes variables that begin by `name`."""
    _, _, bt = matrices(m)
    first, second = (bt[row] for row in _rows_of(m)[pair])
    if pair == 0:
        return _combined(zip(first, d, strict=True)), _combined(zip(second, d, strict=True))
    # Rows of +-h agree in even places and have opposite signs in odd ones.
    for part, kept in (("e", slice(0, None, 2)), ("o", slice(1, None, 2))):
        c.let("float4", f"{name}{part}", _combined(zip(first[kept], d[kept], strict=True)))
    return f"{name}e + {name}o", f"{name}e - {name}o"


def _inputs(kernel: Winograd, device: Device) -> Launch:
    """V = B^T d B for each tile of each slice of channels."""
    spec, m, n = kernel.spec, kernel.m, kernel.size
    rows, columns = spec.axes
    depth, (down, across) = slices(spec.ci), kernel.across
    _, _, bt = matrices(m)
    extents = (depth, across, down)
    buffers = [Buffer("x", spec.dtype, 4), Buffer("v", spec.dtype, 4, written=True)]
    c = Code(device.api, "winograd_in", buffers, extents, fill(extents, (8, 8, 1), 64))
    c.index(0, "slice")
    c.let("int", "ix", f"{c.index(1, 'tx')} * {m} - {columns.before}")
    c.let("int", "iy", f"{c.index(2, 'ty')} * {m} - {rows.before}")
    c.let("int", "at", f"(iy * {columns.size} + ix) * {depth} + slice")
    c.let("int", "to", f"(ty * {across} + tx) * {depth} + slice")
    row_in = inside(c, "v_", "iy", rows, m, list(range(n)))
    column_in = inside(c, "u_", "ix", columns, m, list(range(n)))
    for pair, found in enumerate(_rows_of(m)):
        needed = [r for r in range(n) if bt[found[0], r] or bt[found[1], r]]
        with c.block(""):
            for j in range(n):
                for r in needed:
                    value = c.load("x", f"at + {(r * columns.size + j) * depth}")
                    tests = [t for t in (row_in.get(r), column_in.get(j)) if t]
                    c.let("float4", f"d{r}_{j}", c.pick(" && ".join(tests), value, c.constant(0.0)) if tests else value)
                for k, value in enumerate(_pair(c, m, pair, [f"d{r}_{j}" for r in range(n)], f"h{j}")):
                    c.let("float4", f"t{k}_{j}", value)
            for k, row in enumerate(found):
                for other, columns_of in enumerate(_rows_of(m)):
                    values = _pair(c, m, other, [f"t{k}_{j}" for j in range(n)], f"r{k}_{other}")
                    for value, column in zip(values, columns_of, strict=True):
                        scaled = value if kernel.scale == 1 else f"({value}) * {literal(kernel.scale)}"
                        c.store("v", f"to + {(row * n + column) * kernel.tiles * depth}", scaled)
    return c.launch((0, len(kernel.operands())))


def _product(kernel: Winograd, device: Device) -> Launch:
    """M = V U for each point."""
    spec, tile = kernel.spec, kernel.tile
    depth, used, count = slices(spec.ci), slices(spec.co), kernel.output_slices
    tiles = kernel.tiles
    extents = (-(-used // tile.vectors), -(-tiles // tile.pixels), kernel.size**2)
    kind = spec.dtype
    buffers = [Buffer("v", kind, 4), Buffer("u", kind, 4), Buffer("y", kind, 4, written=True)]
    c = Code(device.api, "winograd", buffers, extents, tile.group)
    halves = kernel.product_in_halves
    real, load = ("half4", c.load_half4) if halves else ("float4", c.load)
    c.let("int", "first", f"{c.index(0, 'block')} * {tile.vectors}")
    c.let("int", "tile", f"{c.index(1, 'part')} * {tile.pixels}")
    c.index(2, "point")
    ragged = tiles % tile.pixels != 0
    for p in range(tile.pixels):
        # Items beyond the end repeat the last tile, and do not store it.
        place = f"min(tile + {p}, {tiles - 1})" if ragged and p else f"tile + {p}"
        c.let("int", f"v{p}", f"(point * {tiles} + {place}) * {depth}")
    for v in range(tile.vectors):
        c.let("int", f"u{v}", f"(point * {count} + first + {v}) * {depth * 4}")
        for p in range(tile.pixels):
            c.var(real, f"a{p}_{v}", c.to_half4(c.constant(0.0)) if halves else c.constant(0.0))
    with c.loop("k", 0, depth):
        for p in range(tile.pixels):
            c.let(real, f"x{p}", load("v", f"v{p} + k"))
        for v in range(tile.vectors):
            for lane in range(4):
                c.let(real, f"w{v}_{lane}", load("u", f"u{v} + k * 4 + {lane}"))
        for lane in range(4):
            for p in range(tile.pixels):
                for v in range(tile.vectors):
                    c.line(f"a{p}_{v} += x{p}.{LANES[lane]} * w{v}_{lane};")
    for v in range(tile.vectors):
        with c.when([f"first + {v} < {used}"] if used % tile.vectors and v else []):
            for p in range(tile.pixels):
                with c.when([f"tile + {p} < {tiles}"] if ragged and p else []):
                    total = c.floats(f"a{p}_{v}") if halves else f"a{p}_{v}"
                    c.store("y", f"(point * {tiles} + tile + {p}) * {used} + first + {v}", total)
    after = len(kernel.operands())
    return c.launch((after, 2, after + 1))


def _outputs(kernel: Winograd, device: Device) -> Launch:
    """Y = A^T M A for each tile of each slice of channels, and the epilogue."""
    spec, m = kernel.spec, kernel.m
    used, (down, across) = slices(spec.co), kernel.across
    extents = (used, across, down)
    buffers = [Buffer("s", spec.dtype, 4), *epilogue.constant_buffers(spec)]
    if spec.residual:
        kind = spec.epilogue.residual_type(spec.dtype)
        buffers.append(Buffer("r", kind, 4, shared=bool(spec.inplace)))
    buffers.append(Buffer("y", spec.out_type, 4, written=True, shared=bool(spec.inplace)))
    c = Code(device.api, "winograd_out", buffers, extents, fill(extents, (8, 8, 1), 64))
    c.index(0, "slice")
    c.let("int", "ox", f"{c.index(1, 'tx')} * {m}")
    c.let("int", "oy", f"{c.index(2, 'ty')} * {m}")
    c.let("int", "at", f"(ty * {across} + tx) * {used} + slice")
    c.let("float4", "b", c.load("bias", "slice"))
    for parity in (0, 1):
        with c.block(""):
            _half(c, kernel, parity)
    return c.launch((len(kernel.operands()) + 1, *range(3, len(kernel.operands()))))


def _half(c: Code, kernel: Winograd, parity: int) -> None:
    """The even or the odd rows of the tiles: rows of A^T have equal values for +h and -h in even places, and opposite
    ones in odd places."""
    m, n, halves = kernel.m, kernel.size, HALVES[kernel.m]
    used = slices(kernel.spec.co)
    those = range(parity, m, 2)

    def at(row: int, column: int) -> str:
        return c.load("s", f"at + {(row * n + column) * kernel.tiles * used}")

    for j in range(n):
        terms: dict[int, list[tuple[float, str]]] = {r: [] for r in those}
        for r, row in ((0, 0), (m - 1, n - 1)):
            if r in terms:
                terms[r].append((1.0, c.let("float4", f"p{row}_{j}", at(row, j))))
        for i, h in enumerate(halves):
            both = f"{at(1 + 2 * i, j)} {'-' if parity else '+'} {at(2 + 2 * i, j)}"
            name = c.let("float4", f"s{i}_{j}", both)
            for r in those:
                terms[r].append((h**r, name))
        for r in those:
            c.let("float4", f"t{r}_{j}", _combined(terms[r]))
    for r in those:
        for i in range(len(halves)):
            plus, minus = f"t{r}_{1 + 2 * i}", f"t{r}_{2 + 2 * i}"
            c.let("float4", f"e{r}_{i}", f"{plus} + {minus}")
            c.let("float4", f"o{r}_{i}", f"{plus} - {minus}")
        for q in range(m):
            parts = [(1.0, "b")] + [(h**q, f"{'o' if q % 2 else 'e'}{r}_{i}") for i, h in enumerate(halves)]
            if q == 0:
                parts.append((1.0, f"t{r}_0"))
            if q == m - 1:
                parts.append((1.0, f"t{r}_{n - 1}"))
            c.let("float4", f"a{r}_{q}", _combined(parts))
        _store_row(c, kernel, r)


def _store_row(c: Code, kernel: Winograd, r: int) -> None:
    spec, m = kernel.spec, kernel.m
    rows, columns = spec.axes
    with c.when([f"oy + {r} < {rows.out}"] if rows.out % m and r else []):
        for q in range(m):
            with c.when([f"ox + {q} < {columns.out}"] if columns.out % m and q else []):
                place = f"((oy + {r}) * {columns.out} + ox + {q}) * {slices(spec.co)} + slice"
                place = c.let("int", f"at{r}_{q}", place)
                residual = None
                if spec.residual:
                    residual = epilogue.read(c, "r", spec.epilogue.residual_type(spec.dtype), place)
                value = epilogue.finish(c, f"a{r}_{q}", spec, [], residual)
                epilogue.write(c, "y", spec.out_type, place, value)


# (tiles, slices of outputs) of a work item of the product.
PRODUCTS = {"opencl": ((4, 4), (4, 2)), "vulkan": ((8, 2), (8, 1))}


def product_tiles(kernel: Winograd, device: Device) -> list[Tile]:
    used = slices(kernel.spec.co)
    found = []
    for pixels, most in PRODUCTS.get(device.api, PRODUCTS["vulkan"]):
        vectors = max(v for v in (1, 2, 4) if v <= most and used % v == 0)
        tile = Tile(balanced(kernel.tiles, pixels), vectors, (1, 1, 1))
        extents = (used // vectors, -(-kernel.tiles // tile.pixels), kernel.size**2)
        found.append(replace(tile, group=fill(extents, (8, 8, 1), 64)))
    return list(dict.fromkeys(found))


def applies(spec: Conv2D) -> bool:
    """Whether the kernel computes this convolution."""
    plain = spec.kernel == (3, 3) and spec.stride == (1, 1) and spec.dilation == (1, 1) and spec.groups == 1
    return plain and spec.dtype in ("float32", "float16") and spec.ci % 4 == 0 and spec.co % 4 == 0


def make(spec: Conv2D, device: Device, m: int) -> Winograd:
    kernel = Winograd(spec, Tile(1, 1, (1, 1, 1)), m=m)
    return replace(kernel, tile=product_tiles(kernel, device)[0])


# What a GPU reaches of its peak in products, and what a launch costs: guesses, for the choice below alone.
REACHED = 0.5
LAUNCH_SECONDS = 10e-6
# (GFLOP/s, GB/s) of devices whose rates are not known: those of a Mali-G610.
TYPICAL = (512.0, 34.0)
# By how much it has to be faster on paper.
GAIN = 1.2
# Bytes that may stand between two launches (WebGPU binds 128 MiB), and of transformed weights: they come on top of
# those of the direct way, in the bundle and in memory.
MOST_SCRATCH, MOST_WEIGHTS = 64 << 20, 4 << 20


def seconds(spec: Conv2D, device: Device, m: int) -> float:
    """Time of a convolution on paper, by F(m, 3) or, for m = 0, the direct way: each launch is bound by its arithmetic
    or by its memory, which every launch reads and writes once."""
    gflops, gbps = (device.gflops, device.gbps) if device.gflops and device.gbps else TYPICAL
    flops, rate = gflops * 1e9 * REACHED, gbps * 1e9 / np.dtype(spec.dtype).itemsize
    x, y = spec.h * spec.w * spec.ci, math.prod(spec.out) * spec.co * (2 if spec.residual else 1)
    if m == 0:
        return max(2 * spec.macs / flops, (x + y + 9 * spec.ci * spec.co) / rate) + LAUNCH_SECONDS
    at, _, bt = (np.count_nonzero(matrix) for matrix in matrices(m))
    n, tiles = m + 2, math.prod(-(-size // m) for size in spec.out)
    v, s, u = (n * n * k for k in (tiles * spec.ci, tiles * spec.co, spec.ci * spec.co))
    launches = (
        (2 * n * bt * tiles * spec.ci, x + v),
        (2 * n * n * tiles * spec.ci * spec.co, v + u + s),
        ((n + m) * at * tiles * spec.co, s + y),
    )
    return sum(max(work / flops, moved / rate) + LAUNCH_SECONDS for work, moved in launches)


def chosen(spec: Conv2D, device: Device) -> int:
    """m of the way that is fastest on paper, 0 for the direct one."""
    if not applies(spec):
        return 0
    size = np.dtype(spec.dtype).itemsize
    fits = []
    for m in HALVES:
        tiles, points = math.prod(-(-k // m) for k in spec.out), (m + 2) ** 2 * size
        if points * tiles * max(spec.ci, spec.co) <= MOST_SCRATCH and points * spec.ci * spec.co <= MOST_WEIGHTS:
            fits.append(m)
    times = {m: seconds(spec, device, m) for m in fits}
    best = min(fits, key=lambda m: times[m], default=0)
    return best if best and times[best] * GAIN <= seconds(spec, device, 0) else 0


def _winograd(spec: Conv2D, weights: Any, device: Device) -> Winograd | None:
    m = chosen(spec, device)
    return make(spec, device, m) if m else None


RULES: dict[type, Callable[..., GpuKernel | None]] = {Conv2D: _winograd}
