"""Windows without weights: averages, maxima, and the mean of a whole map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgec.targets.device import Device
from edgec.targets.gpu.kernels import epilogue
from edgec.targets.gpu.kernels.base import GpuKernel, Launch
from edgec.targets.gpu.kernels.conv import fill, slices
from edgec.targets.gpu.kernels.dialect import Buffer, Code, literal
from edgec.targets.kernels.pool import AvgPool, MaxPool
from edgec.targets.mcu.kernels.base import Operand

# A mean over more pixels than this is summed in parts.
SERIAL = 64
LEAST = {"int8": -128, "float32": -math.inf, "float16": -math.inf}


@dataclass(frozen=True)
class Pool(GpuKernel):
    """`AvgPool` or `MaxPool`. Operands: x, y. A work item computes four channels of a pixel."""

    spec: AvgPool | MaxPool

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.spec.name

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        return Operand(spec.h * spec.w * spec.c, spec.dtype), Operand(math.prod(spec.out) * spec.c, spec.dtype)

    def launches(self, device: Device) -> tuple[Launch, ...]:
        spec = self.spec
        whole, integer = spec.c % 4 == 0, spec.dtype == "int8"
        units = 4 if whole else 1
        buffers = [Buffer("x", spec.dtype, units), Buffer("y", spec.dtype, units, written=True)]
        rows, columns = spec.axes
        extents = (slices(spec.c), columns.out, rows.out)
        c = Code(device.api, spec.name, buffers, extents, fill(extents, (16, 4, 4), 64))
        c.index(0, "slice")
        c.index(1, "ox")
        c.index(2, "oy")
        size, kind = spec.c // units, "int4" if integer else "float4"
        for name, axis in (("y", rows), ("x", columns)):
            c.let("int", f"i{name}", f"o{name} * {axis.stride} - {axis.before}")
        largest = isinstance(spec, MaxPool)
        start = LEAST[spec.dtype] if largest else 0

        def body(channels: int) -> None:
            c.var(kind, "a", c.splat(kind, str(start)) if integer else c.constant(start))
            c.var("int", "taps", "0")
            with c.loop("i", 0, rows.kernel):
                c.let("int", "y_", f"iy + i * {rows.dilation}")
                with c.when([f"y_ >= 0 && y_ < {rows.size}"]), c.loop("j", 0, columns.kernel):
                    c.let("int", "x_", f"ix + j * {columns.dilation}")
                    with c.when([f"x_ >= 0 && x_ < {columns.size}"]):
                        index = f"(y_ * {columns.size} + x_) * {size} + slice{'' if whole else ' * 4'}"
                        value = epilogue.read(c, "x", spec.dtype, index, channels, whole)
                        c.line(f"a = {f'max(a, {value})' if largest else f'a + {value}'};")
                        c.line("taps += 1;")
            at = f"(oy * {columns.out} + ox) * {size} + slice{'' if whole else ' * 4'}"
            value = "a" if largest else averaged(c, spec, "a", "taps")
            epilogue.write(c, "y", spec.dtype, at, c.let(kind, "result", value), channels, whole)

        widths(c, spec.c, body)
        return (c.launch((0, 1)),)


def widths(c: Code, channels: int, body: Callable[[int], None]) -> None:
    """`body` of a slice of four channels, and of the last one where it has fewer."""
    rest = channels % 4
    if rest and channels > 4:
        with c.block(f"if (slice < {channels // 4})"):
            body(4)
            c.line("return;")
    body(rest or 4)


def averaged(c: Code, spec: Any, total: str, taps: str) -> str:
    """The average of an `AvgPool` from the sum of `taps` values."""
    q = spec.requant
    if q is None:
        return f"{total} * {literal(1.0 / spec.taps)}"
    less = f"{total} - {c.splat('int4', f'{taps} * {q.x_zp}')}" if q.x_zp else total
    scaled = c.requantised(less, c.splat("int4", str(q.m)), c.splat("int4", str(q.shift)), q.shift)
    return epilogue.clamped(c, scaled, q.y_zp, q.lo, q.hi)


@dataclass(frozen=True)
class GlobalMean(GpuKernel):
    """`AvgPool` over a whole map. Operands: x, y. Sums of parts of a large map first, then those of the parts."""

    spec: AvgPool
    name = "avg_pool"

    @property
    def parts(self) -> int:
        pixels = self.spec.taps
        return 1 if pixels <= SERIAL else min(64, math.isqrt(pixels))

    def operands(self) -> tuple[Operand, ...]:
        spec = self.spec
        return Operand(spec.taps * spec.c, spec.dtype), Operand(spec.c, spec.dtype)

    def scratch(self) -> tuple[int, ...]:
        return (self.parts * slices(self.spec.c) * 16,) if self.parts > 1 else ()

    def launches(self, device: Device) -> tuple[Launch, ...]:
        if self.parts == 1:
            return (self._sum(device, "x", self.spec.taps, 1, True, (0, 1)),)
        share = -(-self.spec.taps // self.parts)
        return (
            self._sum(device, "x", share, self.parts, False, (0, 2)),
            self._sum(device, "s", self.parts, 1, True, (2, 1)),
        )

    def _sum(self, device: Device, source: str, share: int, parts: int, last: bool, arguments: Any) -> Launch:
        """Sums of `share` rows of memory each, `parts` of them. last: they make the result."""
        spec, integer, count = self.spec, self.spec.dtype == "int8", slices(self.spec.c)
        kind, sums = ("int4", "int32") if integer else ("float4", "float32")
        whole = spec.c % 4 == 0
        units = 4 if whole else 1
        first = source == "x"
        total = spec.taps if first else parts * share
        buffers = [
            Buffer("x", spec.dtype, units) if first else Buffer("x", sums, 4),
            Buffer("y", spec.dtype, units, written=True) if last else Buffer("y", sums, 4, written=True),
        ]
        extents = (count, parts, 1)
        c = Code(device.api, "mean", buffers, extents, fill(extents, (32, 8, 1), 64))
        c.index(0, "slice")
        part = c.index(1, "part")
        end = f"{part} * {share} + {share}"
        c.let("int", "end", f"min({end}, {total})" if total % share else end)
        stride = (spec.c // units) if first else count
        scaled = " * 4" if first and not whole else ""

        def body(channels: int) -> None:
            c.var(kind, "a", c.splat(kind, "0") if integer else c.constant(0.0))
            with c.loop("p", f"{part} * {share}", "end"):
                index = f"p * {stride} + slice{scaled}"
                value = epilogue.read(c, "x", spec.dtype, index, channels, whole) if first else c.load("x", index)
                c.line(f"a += {value};")
            if not last:
                c.store("y", f"part * {count} + slice", "a")
                return
            result = c.let(kind, "result", averaged(c, spec, "a", str(spec.taps)))
            at = "slice" if whole else "slice * 4"
            epilogue.write(c, "y", spec.dtype, at, result, channels, whole)

        widths(c, spec.c, body)
        return c.launch(arguments)


def _pool(spec: AvgPool | MaxPool, weights: Any, device: Device) -> GpuKernel | None:
    """None for types without kernel."""
    if spec.dtype not in LEAST:
        return None
    whole = spec.kernel == (spec.h, spec.w) and not any(spec.padding) and spec.dilation == (1, 1)
    return GlobalMean(spec) if whole and isinstance(spec, AvgPool) else Pool(spec)


RULES: dict[type, Callable[..., GpuKernel | None]] = {AvgPool: _pool, MaxPool: _pool}
