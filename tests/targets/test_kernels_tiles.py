"""Crops and places: templates compiled for this machine and microcontroller kernels against NumPy."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edgec.targets.kernels.tiles import Crop, Place
from tests.targets.kernel_cases import host
from tests.targets.kernel_runner import run_calls, spec_call
from tests.targets.mcu_runner import kernel_of, run_on_host


def window(seed: int, columns: bool = True) -> dict:
    """A random window; without `columns` one of whole rows."""
    r = random.Random(seed)
    h, w = r.randint(1, 9), r.randint(1, 9)
    rows, across = r.randint(1, h), r.randint(1, w) if columns else w
    place = {"top": r.randint(0, h - rows), "left": r.randint(0, w - across), "rows": rows, "columns": across}
    return {"planes": r.randint(1, 3), "h": h, "w": w, "c": r.randint(1, 5), **place}


def data(spec: Crop | Place, whole: bool, seed: int) -> np.ndarray:
    positions = spec.h * spec.w if whole else spec.rows * spec.columns
    codes = np.random.default_rng(seed).integers(-128, 128, spec.planes * positions * spec.c)
    return codes.astype(spec.dtype)


def expected(spec: Crop | Place, arrays: list[np.ndarray]) -> np.ndarray:
    """By index, element for element."""
    maps = (spec.planes, spec.h, spec.w, spec.c)
    inside = np.zeros(maps[1:3], bool)
    inside[spec.top : spec.top + spec.rows, spec.left : spec.left + spec.columns] = True
    if isinstance(spec, Crop):
        return arrays[0].reshape(maps)[:, inside].reshape(-1)
    y = arrays[0].reshape(maps).copy() if spec.canvas else np.zeros(maps, spec.dtype)
    y[:, inside] = arrays[-1].reshape(spec.planes, -1, spec.c)
    return y.reshape(-1)


def specs(seed: int) -> list[Crop | Place]:
    dtype = ("int8", "float32", "int32")[seed % 3]
    place = window(seed, columns=seed % 4 > 0)
    return [Crop(**place, dtype=dtype), Place(**place, dtype=dtype)]


def arguments(spec: Crop | Place, seed: int) -> list[np.ndarray]:
    if isinstance(spec, Crop):
        return [data(spec, True, seed)]
    return [data(spec, True, seed), data(spec, False, seed + 1)]


@pytest.mark.host
def test_templates() -> None:
    cases = [(spec, arguments(spec, seed)) for seed in range(12) for spec in specs(seed)]
    calls = [spec_call(spec, host(), arrays, expected(spec, arrays)) for spec, arrays in cases]
    for (spec, arrays), (got,) in zip(cases, run_calls(calls, host()), strict=True):
        np.testing.assert_array_equal(got, expected(spec, arrays), err_msg=str(spec))
        np.testing.assert_array_equal(spec.reference(*arrays).reshape(-1), expected(spec, arrays))


@pytest.mark.host
@pytest.mark.parametrize("seed", range(5))
def test_kernels_of_microcontrollers(seed: int) -> None:
    for spec in specs(seed):
        arrays = arguments(spec, seed)
        kernel = kernel_of(spec, {})
        assert kernel.inplace == spec.inplace
        for inplace in {False, bool(kernel.inplace)}:
            found = run_on_host(kernel, arrays, inplace=inplace)
            np.testing.assert_array_equal(found, expected(spec, arrays), err_msg=f"{spec} {inplace}")


@pytest.mark.host
def test_the_first_tile_leaves_the_rest_of_the_memory_alone() -> None:
    spec = Place(2, 4, 5, 3, 1, 2, 2, 3, "int8", canvas=False)
    tile = data(spec, False, 0)
    found = run_on_host(kernel_of(spec, {}), [tile])
    # The runner fills results with this.
    garbage = np.full(2 * 4 * 5 * 3, 0xA5, np.uint8).view(np.int8)
    with_canvas = Place(2, 4, 5, 3, 1, 2, 2, 3, "int8")
    np.testing.assert_array_equal(found, expected(with_canvas, [garbage, tile]))


@pytest.mark.pure
@pytest.mark.parametrize("place", [(0, 0, 5, 5), (3, 0, 2, 1), (-1, 0, 2, 2), (0, 4, 1, 2), (0, 0, 0, 1)])
def test_windows_lie_inside(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="beyond the map"):
        Crop(1, 4, 5, 2, *place)
