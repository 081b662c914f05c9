"""Resize: every mode as index selections, or as products with matrices of weights, one axis at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from edgec.onnx.module import Node

HALF_PIXEL = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")


def resize_node(node: Node) -> torch.Tensor:
    """Resize of opset 10 (scales only) and of 11 and later."""
    x = node.x(0)
    mode = node.attr("mode", "nearest")
    if node.opset < 11:
        scales = node.static(1, "scales").tolist()
        sizes = [math.floor(n * s) for n, s in zip(x.shape[1:], scales[1:])]
        axes = list(range(1, x.dim()))
        return resize(node, x, axes, scales[1:], sizes, "asymmetric", mode, "floor")
    axes = [a % x.dim() for a in node.attr("axes") or range(x.dim())]
    if node.has(3) and tuple(node.value(3).shape) != (0,):
        wanted = node.ints(3, "sizes")
        pairs = [(a, s) for a, s in zip(axes, wanted) if not isinstance(s, torch.SymInt)]
        axes, sizes = [a for a, _ in pairs], [s for _, s in pairs]
        scales = [s / x.shape[a] for a, s in pairs if isinstance(x.shape[a], int)]
        policy = node.attr("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            common = (min if policy == "not_larger" else max)(scales)
            sizes = [math.floor(x.shape[a] * common + 0.5) for a in axes]
            scales = [common] * len(axes)
    else:
        scales = node.static(2, "scales").tolist()
        pairs = [(a, s) for a, s in zip(axes, scales) if isinstance(x.shape[a], int) or s != 1.0]
        axes, scales = [a for a, _ in pairs], [s for _, s in pairs]
        sizes = [math.floor(x.shape[a] * s) for a, s in pairs]
    coordinates = node.attr("coordinate_transformation_mode", "half_pixel")
    rounding = node.attr("nearest_mode", "round_prefer_floor")
    return resize(node, x, axes, scales, sizes, coordinates, mode, rounding)


def resize(
    node: Node,
    x: torch.Tensor,
    axes: Sequence[int],
    scales: Sequence[float],
    sizes: Sequence[int],
    coordinates: str,
    mode: str,
    rounding: str,
) -> torch.Tensor:
    """x resized along `axes` to `sizes`, whose ratios to the old sizes are about `scales`."""
    antialias = bool(node.attr("antialias", 0))
    fast = None if antialias else _interpolated(x, axes, scales, sizes, coordinates, mode, rounding)
    if fast is not None:
        return fast
    crop = coordinates == "tf_crop_and_resize"
    roi = node.static(1, "region").tolist() if crop else []
    kind, outside = x.dtype, []
    for i, (axis, scale, size) in enumerate(zip(axes, scales, sizes)):
        n = x.shape[axis]
        region = (roi[i], roi[i + len(roi) // 2]) if crop else (0.0, 1.0)
        if not crop and size == n and scale == 1.0:
            continue
        place = _places(n, size, scale, coordinates, region)
        if crop:
            outside.append((axis, (place < 0) | (place > n - 1)))
        name = f"resize_{axis}"
        if mode == "nearest":
            index = _nearest(place, rounding).clip(0, n - 1).astype(np.int64)
            x = torch.index_select(x, axis, node.weight(index, name))
            continue
        matrix = _matrix(
            place, n, scale, mode, node.attr("cubic_coeff_a", -0.75), antialias, bool(node.attr("exclude_outside", 0))
        )
        wide = x if kind.is_floating_point else x.to(torch.float32)
        weights = node.weight(matrix.astype(np.float32), name).to(wide.dtype)
        x = torch.matmul(wide.movedim(axis, -1), weights.t()).movedim(-1, axis)
    for axis, out in outside:
        if out.any():
            shape = [1] * x.dim()
            shape[axis] = -1
            mask = node.weight(out.reshape(shape), f"outside_{axis}")
            x = torch.where(mask, torch.full((), node.attr("extrapolation_value", 0.0), dtype=x.dtype), x)
    return x if x.dtype == kind else x.to(kind)


def _interpolated(
    x: torch.Tensor,
    axes: Sequence[int],
    scales: Sequence[float],
    sizes: Sequence[int],
    coordinates: str,
    mode: str,
    rounding: str,
) -> torch.Tensor | None:
    """`F.interpolate` where it means the same: passes and kernels know it."""
    moved = {a: (s, n) for a, s, n in zip(axes, scales, sizes) if n != x.shape[a] or s != 1.0}
    if x.dim() != 4 or not x.dtype.is_floating_point or not moved or min(moved) < 2:
        return None
    size = [moved[a][1] if a in moved else x.shape[a] for a in (2, 3)]
    exact = all(n == x.shape[a] * s for a, (s, n) in moved.items())
    whole = all(n % x.shape[a] == 0 for a, (_, n) in moved.items())
    if mode == "nearest" and exact and whole:
        # At whole factors these choose the same pixels.
        same = coordinates == "asymmetric" and rounding == "floor"
        same = same or (coordinates in HALF_PIXEL and rounding.startswith("round"))
        return F.interpolate(x, size=size, mode="nearest") if same else None
    if mode == "linear" and coordinates in HALF_PIXEL and exact and min(size) > 1:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    if mode == "linear" and coordinates == "align_corners" and exact:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return None


def _places(n: int, size: int, scale: float, coordinates: str, region: tuple[float, float]) -> np.ndarray:
    """Where each element of the result lies on the axis of n elements."""
    x = np.arange(size, dtype=np.float64)
    # The size that the scale gives, before it is rounded.
    exact = scale * n
    if coordinates == "align_corners":
        return np.zeros(size) if exact == 1 else x * (n - 1) / (exact - 1)
    if coordinates == "asymmetric":
        return x / scale
    if coordinates == "tf_crop_and_resize":
        start, end = region
        if size == 1:
            return np.full(1, 0.5 * (start + end) * (n - 1))
        return start * (n - 1) + x * (end - start) * (n - 1) / (size - 1)
    place = (x + 0.5) / scale - 0.5
    if coordinates == "pytorch_half_pixel" and size == 1:
        return np.full(1, -0.5)
    if coordinates == "half_pixel_symmetric":
        return n / 2 * (1 - size / exact) + place
    return place


def _nearest(place: np.ndarray, rounding: str) -> np.ndarray:
    if rounding == "floor":
        return np.floor(place)
    if rounding == "ceil":
        return np.ceil(place)
    if rounding == "round_prefer_ceil":
        return np.floor(place + 0.5)
    return np.ceil(place - 0.5)


def _matrix(place: np.ndarray, n: int, scale: float, mode: str, a: float, antialias: bool, exclude: bool) -> np.ndarray:
    """[size, n]: the weight of each element of the axis in each element of the result."""
    result = np.zeros((len(place), n))
    stretch = min(scale, 1.0) if antialias else 1.0
    reach = (1 if mode == "linear" else 2) / stretch
    for row, centre in enumerate(place):
        taps = np.arange(math.floor(centre - reach), math.ceil(centre + reach) + 1)
        weights = _kernel((taps - centre) * stretch, mode, a)
        if exclude:
            weights = np.where((taps >= 0) & (taps < n), weights, 0.0)
        if antialias or exclude:
            weights = weights / weights.sum()
        np.add.at(result[row], taps.clip(0, n - 1), weights)
    return result


def _kernel(t: np.ndarray, mode: str, a: float) -> np.ndarray:
    t = np.abs(t)
    if mode == "linear":
        return np.clip(1 - t, 0, None)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))
