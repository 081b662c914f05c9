"""Fourier transforms and mel filters of audio front ends.

Import writes complex numbers as pairs of real ones and the transforms as products (`edgec.importing.pairs`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import helper

from edgec.onnx.module import Node
from edgec.onnx.operators import _op


def _number(node: Node, index: int, what: str) -> int:
    return int(node.static(index, what).reshape(-1)[0])


def _complex(x: torch.Tensor) -> torch.Tensor:
    """[..., 1] or [..., 2] as a real or complex tensor without that axis."""
    return x.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())


@_op("DFT")
def _dft(node: Node) -> Any:
    x = node.x(0)
    if node.opset >= 20:
        axis = _number(node, 2, "axis") if node.has(2) else -2
    else:
        axis = node.attr("axis", 1)
    axis, inverse, half = axis % x.dim(), bool(node.attr("inverse", 0)), bool(node.attr("onesided", 0))
    size = _number(node, 1, "length") if node.has(1) else None
    signal = _complex(x)
    if inverse and half:
        return torch.fft.irfft(signal, size, axis).unsqueeze(-1)
    if half:
        real = signal.real if signal.is_complex() else signal
        return torch.view_as_real(torch.fft.rfft(real, size, axis))
    return torch.view_as_real((torch.fft.ifft if inverse else torch.fft.fft)(signal, size, axis))


@_op("STFT")
def _stft(node: Node) -> Any:
    x, step = node.x(0), _number(node, 1, "step")
    if node.has(3):
        length = _number(node, 3, "frame length")
    else:
        length = node.value(2).shape[0] if node.has(2) else x.shape[1]
    half = bool(node.attr("onesided", 1))
    if x.dim() == 3:
        x = _complex(x)
    frames = x.unfold(1, length, step)
    if node.has(2):
        frames = frames * node.x(2)
    if half and frames.is_complex():
        raise node.refuse("gives half the spectrum of a complex signal", "set onesided to 0")
    return torch.view_as_real((torch.fft.rfft if half else torch.fft.fft)(frames, length, -1))


@_op("MelWeightMatrix")
def _mel(node: Node) -> Any:
    """Triangles between the FFT bins that are evenly spaced on the mel scale."""
    bins, length, rate = (_number(node, i, "sizes") for i in range(3))
    low, high = (2595 * math.log10(1 + float(node.static(i, "edges").reshape(-1)[0]) / 700) for i in (3, 4))
    mels = np.arange(bins + 2) * ((high - low) / (bins + 2)) + low
    places = (((length + 1) * 700 * np.expm1(mels * (math.log(10) / 2595))) // rate).astype(int)
    table = np.zeros((length // 2 + 1, bins))
    for i in range(bins):
        left, middle, right = places[i : i + 3]
        if left == middle:
            table[middle, i] = 1
        else:
            table[left : middle + 1, i] = np.arange(middle - left + 1) / (middle - left)
        if right > middle:
            table[middle:right, i] = np.arange(right - middle, 0, -1) / (right - middle)
    kind = node.attr("output_datatype", 1)
    return table.astype(helper.tensor_dtype_to_np_dtype(kind))
