"""Depthwise convolution: compiled host code against its NumPy meaning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from tests.targets.kernel_cases import check_layers, depthwise, host, operands


@pytest.mark.host
@pytest.mark.parametrize("lanes", (4, 16))
@pytest.mark.parametrize("dtype", ("int8", "float32"))
def test_edge_sizes(dtype: str, lanes: int) -> None:
    device = host(lanes)

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.lists(depthwise(dtype, lanes), min_size=1, max_size=8), st.booleans())
    def check(specs: list[tuple[Depthwise, int]], inplace: bool) -> None:
        check_layers(specs, device, inplace)

    check()


@pytest.mark.pure
def test_means_a_grouped_convolution() -> None:
    epilogue = Epilogue(y_zp=3, lo=-100, hi=101)
    geometry = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0, 1, 2), "x_zp": 9, "dtype": "int8"}
    spec = Depthwise(7, 6, 5, epilogue=epilogue, **geometry)
    same = Conv2D(7, 6, 5, 5, groups=5, epilogue=epilogue, **geometry)
    values = operands(spec, 0)
    np.testing.assert_array_equal(spec.reference(**values), same.reference(**values))
    assert spec.macs == same.macs == 3 * 8 * 5 * 6
