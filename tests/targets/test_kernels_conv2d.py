"""Direct convolution: compiled host code against its NumPy meaning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import integer
from edgec.targets.kernels.common import Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from tests.targets.kernel_cases import check_layers, convolutions, epilogue, floats, host, operands
from tests.targets.kernel_runner import assert_close, run, spec_call

pytestmark = pytest.mark.host
SWEEP = settings(max_examples=6, deadline=None, derandomize=True)


@pytest.mark.parametrize("lanes", (4, 8, 16))
@pytest.mark.parametrize("dtype", ("int8", "float32"))
def test_edge_sizes(dtype: str, lanes: int) -> None:
    device = host(lanes)

    @SWEEP
    @given(st.lists(convolutions(dtype, lanes), min_size=1, max_size=8), st.booleans())
    def check(specs: list[tuple[Conv2D, int]], inplace: bool) -> None:
        check_layers(specs, device, inplace)

    check()


@pytest.mark.parametrize("dtype", ("int8", "float32"))
def test_dilation_as_large_as_the_map(dtype: str) -> None:
    """All outputs have the middle row of taps only, which lets TVM rewrite the loop over rows."""
    rng = np.random.default_rng(0)
    shapes = [{"h": d, "w": d, "kernel": (3, 3), "padding": (d,) * 4, "dilation": (d, d)} for d in (2, 3, 4, 8)]
    shapes.append({"h": 4, "w": 6, "kernel": (5, 3), "padding": (8, 8, 4, 4), "dilation": (4, 4), "stride": (1, 2)})
    fused = epilogue(rng, dtype, False, "none")
    specs: list[tuple[Conv2D | Depthwise, int]] = [
        *((Conv2D(ci=16, co=24, dtype=dtype, epilogue=fused, **shape), 1) for shape in shapes),
        *((Depthwise(c=24, dtype=dtype, epilogue=fused, **shape), 2) for shape in shapes),
    ]
    check_layers(specs, host(), False)


@pytest.mark.parametrize(
    ("m", "shift"), [(2**31 - 1, 1), (2**30, 1), (2**31 - 1, 20), (2**30, 31), (2**30, 62), (0, 62)]
)
def test_extreme_multipliers(m: int, shift: int) -> None:
    """Requantised values far outside int32 saturate instead of wrapping."""
    spec = Conv2D(1, 5, 3, 4, dtype="int8", epilogue=Epilogue(y_zp=-7, lo=-128, hi=127))
    x = np.array([[[0, 0, 0], [1, 0, 0], [-1, 0, 0], [127, 127, 127], [-128, -128, -128]]], np.int8)
    weights = {
        "w": np.array([[1, 0, 0], [127, 127, 127], [-127, -127, -127], [0, 0, 0]], np.int8)[:, :, None, None],
        "bias": np.array([0, 2**30, -(2**30), -1], np.int32),
        "m": np.full(4, m, np.int32),
        "shift": np.full(4, shift, np.int32),
    }
    expected = spec.reference(x, **weights)
    np.testing.assert_array_equal(run(spec_call(spec, host(), [x], expected, **weights), host()), expected)


def test_reference_is_the_definition() -> None:
    """The template's NumPy meaning equals `edgec.integer.qconv2d`, which defines the operator."""
    epilogue = Epilogue(y_zp=3, lo=-50, hi=100)
    spec = Conv2D(6, 5, 4, 6, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2, "int8", x_zp=-9, epilogue=epilogue)
    values = operands(spec, 0)
    weights = (values["w"], values["bias"], values["m"], values["shift"])
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups)
    defined = integer.qconv2d(values["x"][None], *weights, *geometry, -9, 3, -50, 100, layout="NHWC")[0]
    np.testing.assert_array_equal(spec.reference(**values), defined)


def test_matrix_product_is_a_row_of_pixels() -> None:
    """Linear layers use the template with h = 1: the reference is the ordinary product."""
    rng = np.random.default_rng(0)
    x, w, bias = floats(rng, 1, 5, 33), floats(rng, 10, 33), floats(rng, 10)
    spec = Conv2D(1, 5, 33, 10, epilogue=Epilogue("clip", lo=0.0))
    expected = np.maximum(x @ w.T + bias, 0.0)
    call = spec_call(spec, host(), [x], expected, w=w[:, :, None, None], bias=bias)
    assert_close(run(call, host()), expected)
    assert spec.macs == 5 * 33 * 10
