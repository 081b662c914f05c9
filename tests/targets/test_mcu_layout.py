"""Kernels of microcontrollers that only move elements, against NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.targets.device import load_device
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.mcu.kernels.base import McuKernel
from edgec.targets.mcu.kernels.layout import Move, concatenated, padded, part, repeated
from tests.targets.kernel_cases import codes, floats
from tests.targets.mcu_cases import Check, check_of, check_on_device, check_on_host
from tests.targets.mcu_runner import Case


def tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return codes(rng, *shape) if rng.integers(2) else floats(rng, *shape)


def some_shape(rng: np.random.Generator, most: int = 4) -> tuple[int, ...]:
    return tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, most + 1)))


def checked(kernel: McuKernel | None, sources: list[np.ndarray], expected: np.ndarray) -> Check:
    assert kernel is not None
    return Check(Case(kernel, sources), np.ascontiguousarray(expected))


def transposition(seed: int) -> Check:
    rng = np.random.default_rng(seed)
    shape = some_shape(rng)
    x = tensor(rng, shape)
    spec = Transpose(shape, tuple(int(axis) for axis in rng.permutation(len(shape))), str(x.dtype))
    return check_of(spec, [x], spec.reference(x))


def upsampling(seed: int) -> Check:
    """Rows and columns of a map, NHWC, and other axes that NumPy would broadcast."""
    rng = np.random.default_rng(seed)
    h, w, c, a, b = (int(n) for n in rng.integers(1, 6, 5))
    x = tensor(rng, (h, 1, w, 1, c))
    out = (1, h, a, w, b, c)
    return checked(repeated(x.shape, out, str(x.dtype)), [x], np.broadcast_to(x, out))


def border(seed: int) -> Check:
    rng = np.random.default_rng(seed)
    x = tensor(rng, some_shape(rng))
    widths = [tuple(int(n) for n in rng.integers(0, 4, 2)) for _ in x.shape]
    value = int(rng.integers(-128, 128)) if x.dtype == np.int8 else 0
    before, after = zip(*widths, strict=True)
    kernel = padded(x.shape, before, after, value, str(x.dtype))
    return checked(kernel, [x], np.pad(x, widths, constant_values=value))


def selection(seed: int) -> Check:
    rng = np.random.default_rng(seed)
    x = tensor(rng, some_shape(rng))
    axis = int(rng.integers(x.ndim))
    first, step = int(rng.integers(x.shape[axis])), int(rng.integers(1, 4))
    expected = x[(slice(None),) * axis + (slice(first, None, step),)]
    return checked(part(x.shape, axis, first, expected.shape[axis], step, str(x.dtype)), [x], expected)


def concatenation(seed: int) -> Check:
    rng = np.random.default_rng(seed)
    shape, kind = some_shape(rng), int(rng.integers(2))
    axis = int(rng.integers(len(shape)))
    sources = []
    for size in rng.integers(1, 40, rng.integers(2, 5)):
        here = (*shape[:axis], int(size), *shape[axis + 1 :])
        sources.append(codes(rng, *here) if kind else floats(rng, *here))
    kernel = concatenated([x.shape for x in sources], axis, str(sources[0].dtype))
    return checked(kernel, sources, np.concatenate(sources, axis))


KINDS = (transposition, upsampling, border, selection, concatenation)


@pytest.mark.host
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_numpy(kind: Callable[[int], Check]) -> None:
    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(st.lists(st.integers(0, 2**31), min_size=15, max_size=15, unique=True))
    def check(seeds: list[int]) -> None:
        check_on_host([kind(seed) for seed in seeds])

    check()


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=pytest.mark.qemu(name)) for name in ("cortex-m0plus", "cortex-m4", "rv32imc")]
)
def test_devices(target: str) -> None:
    check_on_device([kind(seed) for kind in KINDS for seed in range(8)], load_device(target))


@pytest.mark.pure
def test_axes_are_joined() -> None:
    """Upsampling is one copy of a pixel's channels for each result; a border along rows is one copy in all."""
    upsampled = repeated((5, 1, 6, 1, 16), (5, 2, 6, 2, 16))
    below = padded((1, 5, 6, 16), (0, 1, 0, 0), (0, 2, 0, 0), 7)
    assert isinstance(upsampled, Move) and isinstance(below, Move)
    assert upsampled.runs() == ([(5, 96, 384), (2, 0, 192), (6, 16, 32), (2, 0, 16)], 16)
    assert below.runs() == ([], 480)


@pytest.mark.pure
def test_declines_what_it_cannot_do() -> None:
    assert repeated((2, 1, 2, 1, 2, 1, 2), (2, 3, 2, 3, 2, 3, 2)) is None
    assert repeated((2, 1), (2, 3), "int64") is None
    assert padded((4, 4), (0, -1), (0, 0), 0) is None
    assert padded((4, 4), (0, 1), (0, 0), 1.5, "float32") is None
    assert concatenated([(1, 2)] * 5, 1) is None
