"""Positions of maxima, resizing with antialiasing, places in triangles: what import writes with ordinary operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from edgec.importing.operators import by_overload


def _many(value: Any, count: int) -> list[int]:
    """An int or a list as PyTorch's pools take it."""
    given = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (given * count if len(given) == 1 else given)]


def _max_pool(rank: int) -> Callable[..., Any]:
    """(maxima, their positions in the flat map); of equal ones the first in the window, as PyTorch chooses."""
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]

    def rule(
        run: Any, x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
    ) -> Any:
        values = pool(x, kernel, stride or kernel, padding, dilation, ceil_mode)
        if not any(user.args[1] == 1 and user.users for user in run.node.users):
            return values, None
        kernel, padding, dilation = (_many(v, rank) for v in (kernel, padding, dilation))
        stride = _many(stride, rank) if stride else kernel
        sizes, counts = x.shape[-rank:], values.shape[-rank:]
        pads: list[int] = []
        for i in reversed(range(rank)):
            reach = (counts[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
            pads += [padding[i], max(reach - sizes[i] - padding[i], 0)]
        padded = F.pad(x, pads, value=-math.inf) if any(pads) else x
        taps = []
        for offsets in itertools.product(*[range(k) for k in kernel]):
            part = padded
            for i in range(rank):
                start = offsets[i] * dilation[i]
                part = part[
                    (
                        ...,
                        slice(start, start + (counts[i] - 1) * stride[i] + 1, stride[i]),
                        *[slice(None)] * (rank - 1 - i),
                    )
                ]
            taps.append(part)
        tap: Any = torch.argmax(torch.stack(taps, -1), -1)
        place, step = 0, 1
        for i in reversed(range(rank)):
            line = torch.div(tap, kernel[i], rounding_mode="floor")
            shape = [1] * rank
            shape[i] = counts[i]
            first = (torch.arange(counts[i]) * stride[i] - padding[i]).reshape(shape)
            place = place + ((tap - line * kernel[i]) * dilation[i] + first) * step
            tap, step = line, step * sizes[i]
        return values, place

    return rule


def _antialiased(cubic: bool) -> Callable[..., Any]:
    """Along each axis a product with the matrix of weights: the filter is as wide as the reduction."""

    def rule(run: Any, x: Any, size: Any, corners: bool, *scales: Any) -> Any:
        if scales and isinstance(scales[0], (list, tuple)):
            scales = tuple(scales[0])
        if size is None:
            size = [math.floor(x.shape[2 + i] * scales[i]) for i in range(2)]
        for i, count in enumerate(size):
            n = int(x.shape[2 + i])
            scale = scales[i] if i < len(scales) else None
            kind = "cubic" if cubic else "linear"
            name = (
                f"resize_{kind}_{n}_to_{count}"
                + "_corners" * corners
                + f"_{scale}".replace(".", "_") * (scale is not None)
            )
            weights = run.constant(
                name, lambda n=n, count=count, scale=scale: _weights(n, count, cubic, corners, scale)
            )
            x = (x.transpose(2 + i, 3) @ weights).transpose(2 + i, 3) if i == 0 else x @ weights
        return x

    return rule


def _weights(n: int, count: int, cubic: bool, corners: bool, factor: float | None) -> torch.Tensor:
    """[n, count] in float32, by PyTorch's rule (UpSampleKernel.cpp, _compute_indices_weights_aa)."""
    if corners:
        scale = (n - 1) / (count - 1) if count > 1 else 0.0
    else:
        scale = 1.0 / factor if factor is not None and factor > 0 else n / count
    reach = 2.0 if cubic else 1.0
    support = reach * scale if scale >= 1.0 else reach
    table = torch.zeros(n, count, dtype=torch.float64)
    for k in range(count):
        center = scale * (k + 0.5)
        first = max(int(center - support + 0.5), 0)
        end = min(int(center + support + 0.5), n)
        inverse = 1.0 / scale if scale >= 1.0 else 1.0
        values = [_filter((j - center + 0.5) * inverse, cubic) for j in range(first, end)]
        total = sum(values)
        for j, value in zip(range(first, end), values, strict=True):
            table[j, k] = value / total if total else 0.0
    return table.to(torch.float32)


def _filter(x: float, cubic: bool) -> float:
    x = abs(x)
    if not cubic:
        return max(1.0 - x, 0.0)
    a = -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _triangle(lower: bool) -> Callable[..., Any]:
    """[2, count]: the places on and below (above) a diagonal, in the order of rows."""
    indices = torch.tril_indices if lower else torch.triu_indices

    def rule(run: Any, rows: int, columns: int, offset: int = 0, **_: Any) -> Any:
        name = f"{indices.__name__}_{rows}_{columns}_{offset}".replace("-", "minus_")
        return run.constant(name, lambda: indices(rows, columns, offset=offset))

    return rule


RULES: dict[Any, Callable[..., Any]] = by_overload(
    {
        "max_pool1d_with_indices": _max_pool(1),
        "max_pool2d_with_indices": _max_pool(2),
        "max_pool3d_with_indices": _max_pool(3),
        "tril_indices": _triangle(True),
        "triu_indices": _triangle(False),
        "_upsample_bilinear2d_aa": _antialiased(False),
        "_upsample_bilinear2d_aa.vec": _antialiased(False),
        "_upsample_bicubic2d_aa": _antialiased(True),
        "_upsample_bicubic2d_aa.vec": _antialiased(True),
    }
)
