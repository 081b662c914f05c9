"""Deformable convolution and RoiAlign, as ONNX and torchvision define them, from operators that compile.

Both take values of a map between its pixels, which is what `grid_sample` does. Positions are given to it as it wants
them without `align_corners`: -1 and 1 are the outer edges of the map, (2 p + 1) / size - 1 is pixel p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def _grid(y: torch.Tensor, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.stack([(2.0 * x + 1.0) / width - 1.0, (2.0 * y + 1.0) / height - 1.0], -1)


def deform_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    offset_groups: int,
) -> torch.Tensor:
    """Dai et al., "Deformable Convolutional Networks"; with a mask, Zhu et al., "Deformable ConvNets v2".

    x: [n, c, h, w]. weight: [outputs, c / groups, kernel]. offset: [n, offset_groups * taps * 2, rows, columns], y
    before x. mask: [n, offset_groups * taps, rows, columns]. pads: (before y, before x); rows and columns are those of
    the offsets. Samples outside the map are zero.
    """
    channels, height, width = x.shape[1:]
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    rows, columns = offset.shape[2:]
    moved = offset.reshape(-1, taps, 2, rows, columns)
    starts = []
    for axis, count in enumerate((rows, columns)):
        shape = [1, 1, 1, 1]
        shape[2 + axis] = count
        first = (torch.arange(count, dtype=torch.float32) * stride[axis] - pads[axis]).reshape(shape)
        tap = torch.arange(taps)
        tap = torch.div(tap, kernel[1], rounding_mode="floor") if axis == 0 else tap % kernel[1]
        starts.append(first + (tap * dilation[axis]).to(torch.float32).reshape(1, taps, 1, 1))
    y, across = (moved.select(2, axis) + starts[axis] for axis in range(2))
    grid = _grid(y, across, height, width).reshape(-1, taps * rows, columns, 2)
    maps = x.reshape(-1, channels // offset_groups, height, width)
    samples = F.grid_sample(maps, grid, "bilinear", "zeros", False)
    samples = samples.reshape(-1, channels // offset_groups, taps, rows, columns)
    if mask is not None:
        samples = samples * mask.reshape(-1, 1, taps, rows, columns)
    flat = samples.reshape(-1, channels * taps, rows, columns)
    # Every sample is a channel now: what is left is a convolution of one by one.
    return F.conv2d(flat, weight.reshape(weight.shape[0], -1, 1, 1), bias, 1, 0, 1, groups)


def roi_align(
    x: torch.Tensor,
    boxes: torch.Tensor,
    image: torch.Tensor,
    scale: float,
    size: Sequence[int],
    samples: int,
    aligned: bool,
) -> torch.Tensor:
    """He et al., "Mask R-CNN": the mean of samples x samples values in each of the size[0] x size[1] parts of a box.

    x: [n, c, h, w]. boxes: [k, 4], as x1, y1, x2, y2 times 1 / scale. image: [k], which of the n a box is in. aligned:
    pixels are at half coordinates. Returns [k, c, *size].
    """
    n, channels, height, width = x.shape
    count = boxes.shape[0]
    corners = boxes * scale - (0.5 if aligned else 0.0)
    x1, y1, x2, y2 = (corners.select(1, i) for i in range(4))
    spans = [y2 - y1, x2 - x1]
    if not aligned:
        spans = [torch.clamp(span, min=1.0) for span in spans]
    places, inside = [], []
    for start, span, parts, extent in zip((y1, x1), spans, size, (height, width), strict=True):
        share = (torch.arange(parts * samples, dtype=torch.float32) + 0.5) / (parts * samples)
        place = start.unsqueeze(1) + span.unsqueeze(1) * share
        inside.append((place >= -1.0) & (place <= float(extent)))
        places.append(torch.clamp(place, 0.0, float(extent - 1)))
    y, across = places
    if n != 1:
        # The images below each other as one, in which no place is between two of them.
        y = y + (image * height).to(torch.float32).unsqueeze(1)
        x = x.transpose(0, 1).reshape(1, channels, n * height, width)
    down, right = size[0] * samples, size[1] * samples
    y = y.unsqueeze(2).expand(count, down, right)
    across = across.unsqueeze(1).expand(count, down, right)
    grid = _grid(y, across, n * height, width).reshape(1, count * down, right, 2)
    values = F.grid_sample(x, grid, "bilinear", "border", False)
    values = values.reshape(channels, count, down, right)
    known = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)
    values = torch.where(known, values, torch.zeros(()))
    values = values.reshape(channels, count, size[0], samples, size[1], samples).mean((3, 5))
    return values.transpose(0, 1)
