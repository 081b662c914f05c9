"""Recurrent kernels: compiled code against PyTorch's own layers and against the operators of `edgec.recurrentops`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgec import recurrentops
from edgec.targets.device import Device
from edgec.targets.kernels.recurrent import GATES, Recurrent
from tests.targets.kernel_cases import floats
from tests.targets.kernel_runner import assert_close, run_calls, spec_call
from tests.targets.test_kernels_norm import DEVICES

Case = tuple[Recurrent, list[np.ndarray], dict[str, Any], np.ndarray]


def case(rng: np.random.Generator, kind: str, batch: int, steps: int, hidden: int, **options: Any) -> Case:
    size = options.pop("size", hidden)
    spec = Recurrent(kind, batch, steps, hidden, size, projected=size != hidden, **options)
    x, w = 2 * floats(rng, batch, steps, spec.columns), floats(rng, spec.columns, size)
    bias = floats(rng, spec.columns) if batch == 1 else None
    projection = floats(rng, size, hidden) if spec.projected else None
    h0, c0 = (floats(rng, batch, n) if given else None for n, given in ((size, spec.h0), (hidden, spec.c0)))
    tensors = [None if a is None else torch.from_numpy(a) for a in (x, w, bias, projection, h0, c0)]
    if kind == "lstm":
        y = recurrentops.lstm(*tensors, spec.reverse, spec.cell)  # type: ignore[arg-type]
    elif kind == "gru":
        y = recurrentops.gru(*tensors[:3], tensors[4], spec.reverse)  # type: ignore[arg-type]
    else:
        y = recurrentops.rnn(*tensors[:3], tensors[4], spec.reverse, kind == "rnn_relu")  # type: ignore[arg-type]
    weights = {"w": w, "bias": bias, "projection": projection}
    return spec, [x, *[s for s in (h0, c0) if s is not None]], weights, y.numpy()


@pytest.mark.parametrize("device", DEVICES)
def test_recurrent(device: Device) -> None:
    rng = np.random.default_rng(0)
    cases = [case(rng, kind, batch, 5, hidden) for kind in GATES for batch, hidden in ((1, 17), (3, 8))]
    cases += [
        case(rng, "lstm", 2, 4, 13, size=6, h0=True, c0=True, reverse=True, cell=True),
        case(rng, "lstm", 1, 1, 1, h0=True, cell=True),
        case(rng, "gru", 2, 3, 33, h0=True, reverse=True),
        case(rng, "rnn_tanh", 9, 2, 3, h0=True),
        case(rng, "lstm", 1, 40, 4, reverse=True),
    ]
    calls = [spec_call(spec, device, arrays[:1], y, arrays[1:], **weights) for spec, arrays, weights, y in cases]
    for (spec, arrays, weights, expected), (got,) in zip(cases, run_calls(calls, device), strict=True):
        assert_close(got.reshape(expected.shape), expected)
        given = spec.reference(arrays[0], weights["w"], weights["bias"], weights["projection"], *arrays[1:])
        assert_close(given, expected)


@pytest.mark.pure
def test_macs_count_the_products() -> None:
    assert Recurrent("lstm", 1, 7, 8, 8).macs == 7 * 32 * 8
    assert Recurrent("lstm", 2, 7, 8, 3, projected=True).macs == 2 * 7 * (32 * 3 + 8 * 3)
    assert Recurrent("gru", 1, 7, 8, 8).macs == 7 * 24 * 8
