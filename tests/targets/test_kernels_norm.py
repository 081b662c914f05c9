"""Norms and softmax: compiled code against the NumPy meaning, and that meaning against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgec.targets.device import Device, load_device
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.norm import GroupNorm, LayerNorm, RMSNorm
from edgec.targets.kernels.softmax import Softmax
from tests.targets.kernel_cases import floats, host
from tests.targets.kernel_runner import assert_close, run_calls, spec_call

# Below one vector, around it, around four vectors, and what transformers use.
COLUMNS = (1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 100, 192, 197, 259)
# (pixels, channels, groups)
GROUPS = ((1, 6, 3), (5, 1, 1), (9, 12, 4), (64, 32, 8), (70, 35, 7), (131, 67, 67), (7, 96, 1))
DEVICES = [
    pytest.param(host(4), marks=pytest.mark.host, id="host-4"),
    pytest.param(host(8), marks=pytest.mark.host, id="host-8"),
    pytest.param(host(), marks=pytest.mark.host, id="host"),
    pytest.param(load_device("cortex-a72"), marks=pytest.mark.qemu, id="cortex-a72"),
    pytest.param(load_device("cortex-a7"), marks=pytest.mark.qemu, id="cortex-a7"),
]


def affine(rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    return {"weight": floats(rng, size), "bias": floats(rng, size)}


def check(cases: Sequence[tuple[Any, np.ndarray, dict[str, np.ndarray]]], device: Device, inplace: bool) -> None:
    """Compile and run all cases in one program. Codes may differ by one where a value lies between two of them."""
    results = [spec.reference(x, **weights) for spec, x, weights in cases]
    calls = [
        spec_call(spec, device, [x], y, inplace=0 if inplace and spec.inplace else None, **weights)
        for (spec, x, weights), y in zip(cases, results, strict=True)
    ]
    for (got,), expected in zip(run_calls(calls, device), results, strict=True):
        if expected.dtype == np.int8:
            difference = np.abs(got.astype(int) - expected.astype(int))
            assert got.dtype == np.int8 and difference.max() <= 1 and (difference > 0).mean() < 0.01
        else:
            assert_close(got, expected)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("device", DEVICES)
def test_rows(device: Device, inplace: bool) -> None:
    rng = np.random.default_rng(0)
    cases: list[Any] = []
    for columns in COLUMNS:
        rows = int(rng.integers(1, 4))
        # A mean that is large beside the deviation: a single pass over squares would lose it.
        x = floats(rng, rows, columns) + np.float32(30.0)
        grid = (0.021, int(rng.integers(-128, 128)))
        weights = affine(rng, columns)
        # In float32 the mean of large numbers is known to 2e-6; a small eps would blow that up for single elements.
        eps = 1e-2 if columns < 4 else 1e-5
        cases += [
            (LayerNorm(rows, columns, eps), x, weights),
            (LayerNorm(rows, columns, eps), x, {}),
            (LayerNorm(rows, columns, eps, grid), x, weights),
            (RMSNorm(rows, columns, 1e-6), x, {"weight": weights["weight"]}),
            (RMSNorm(rows, columns, 1e-6, grid), x, {}),
            (Softmax(rows, columns), 4 * x, {}),
            (Softmax(rows, columns, log=True), 4 * x, {}),
        ]
    check(cases, device, inplace)


@pytest.mark.parametrize("device", DEVICES)
def test_groups(device: Device) -> None:
    rng = np.random.default_rng(1)
    cases: list[Any] = []
    for pixels, channels, groups in GROUPS:
        act = Epilogue(act=("none", "silu", "clip")[len(cases) % 3], lo=0.0)
        weights = affine(rng, channels)
        x = floats(rng, pixels, channels) + np.float32(3.0)
        cases += [
            (GroupNorm(pixels, channels, groups, 1e-3, "NHWC", act), x, weights),
            (GroupNorm(pixels, channels, groups, 1e-3, "NCHW", act), np.ascontiguousarray(x.T), weights),
            (GroupNorm(pixels, channels, groups, 1e-3), x, {}),
        ]
    for inplace in (False, True):
        check(cases, device, inplace)


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_of_extreme_rows(device: Device) -> None:
    """Masked elements get exactly nothing, and large differences neither overflow nor leave subnormal numbers."""
    x = np.array(
        [
            [0.0, -np.inf, 1.0, -np.inf, -np.inf],
            [3e38, -3e38, 0.0, 3e38, -np.inf],
            [-1e4, -1e4 - 87.0, -1e4 - 88.0, -1e4 - 90.0, -2e4],
            [0.0, np.nan, 0.0, 0.0, 0.0],
        ],
        np.float32,
    )
    spec = Softmax(*x.shape)
    with np.errstate(invalid="ignore"):
        expected = spec.reference(x)
    ((got,),) = run_calls([spec_call(spec, device, [x], expected)], device)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1.2e-38)
    assert np.all(got[:2][expected[:2] == 0] == 0)


@pytest.mark.pure
def test_references_equal_pytorch() -> None:
    rng = np.random.default_rng(2)
    x, w, b = (torch.from_numpy(floats(rng, *shape)) for shape in ((3, 50), (50,), (50,)))
    weights = {"weight": w.numpy(), "bias": b.numpy()}
    pairs = [
        (LayerNorm(3, 50, 1e-5).reference(x.numpy(), **weights), F.layer_norm(x, (50,), w, b, 1e-5)),
        (RMSNorm(3, 50, 1e-6).reference(x.numpy(), w.numpy()), F.rms_norm(x, (50,), w, 1e-6)),
        (Softmax(3, 50).reference(x.numpy()), x.softmax(-1)),
        (Softmax(3, 50, log=True).reference(x.numpy()), x.log_softmax(-1)),
        (
            GroupNorm(3, 50, 10, 1e-5, epilogue=Epilogue(act="silu")).reference(x.numpy(), **weights),
            F.silu(F.group_norm(x.T.unsqueeze(0), 10, w, b, 1e-5))[0].T,
        ),
    ]
    for got, want in pairs:
        assert_close(got, want.numpy())


@pytest.mark.pure
def test_impossible_groups() -> None:
    with pytest.raises(ValueError, match="10 channels in 3 groups"):
        GroupNorm(4, 10, 3, 1e-5)
