"""The algebra of linear maps against PyTorch's convolutions, in float64, borders included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.passes.reparam.linear_map import LinearMap, add, compact, compose, convolution, identity, scale

pytestmark = pytest.mark.pure


def run(m: LinearMap, x: torch.Tensor) -> torch.Tensor:
    """The map by its definition: explicit zero padding, then a convolution without any."""
    (top, bottom), (left, right) = m.pads
    return F.conv2d(F.pad(x, (left, right, top, bottom)), m.weight, m.bias, m.stride, groups=m.groups)


def draw_map(draw: st.DrawFn, inputs: int, outputs: int, stride: int, *, padded: bool = True) -> LinearMap:
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if inputs % g == 0 and outputs % g == 0]))
    kernel = draw(st.sampled_from([1, 2, 3, 5]))
    dilation = draw(st.sampled_from([1, 2]))
    pad = draw(st.integers(0, 3)) if padded else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(outputs, inputs // groups, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    pads = ((pad, pad), (pad, pad))
    return convolution(weight, bias, (stride, stride), pads, (dilation, dilation), groups)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-10 * (1 + b.abs().max()))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_sum_is_the_sum(data: st.DataObject) -> None:
    stride = data.draw(st.sampled_from([1, 2, 3]))
    a, b = (draw_map(data.draw, 4, 4, stride) for _ in range(2))
    x = torch.randn(2, 4, 11, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if min(min(a.size((11, 9))), min(b.size((11, 9)))) < 1:
        return
    joined = add(a, b, (11, 9))
    if joined is None:
        assert a.size((11, 9)) != b.size((11, 9)) or any(p != q for p, q in zip(a.pads, b.pads, strict=True))
    else:
        assert close(run(joined, x), run(a, x) + run(b, x))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_chain_is_the_chain_or_refused(data: st.DataObject) -> None:
    inner = draw_map(data.draw, 4, 8, data.draw(st.sampled_from([1, 2])))
    outer = draw_map(data.draw, 8, 4, data.draw(st.sampled_from([1, 2])))
    x = torch.randn(2, 4, 17, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if min(inner.size((17, 15))) < 1 or min(outer.size(inner.size((17, 15)))) < 1:
        return
    made = compose(outer, inner)
    if made is None:
        assert outer.is_padded
    else:
        assert close(run(made, x), run(outer, run(inner, x)))


def test_a_padded_layer_behind_a_pointwise_one_needs_a_bias_of_zero() -> None:
    weight = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    kernel = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    outer = convolution(kernel, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    flat = ((0, 0), (0, 0))
    assert compose(outer, convolution(weight, torch.ones(3), (1, 1), flat, (1, 1), 1)) is None
    inner = convolution(weight, None, (1, 1), flat, (1, 1), 1)
    made = compose(outer, inner)
    assert made is not None
    x = torch.randn(1, 3, 7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert close(run(made, x), run(outer, run(inner, x)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_compact_keeps_the_function_and_finds_the_dilation(data: st.DataObject) -> None:
    m = draw_map(data.draw, 4, 4, 1)
    x = torch.randn(1, 4, 13, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if min(m.size((13, 12))) < 1:
        return
    small, dilation = compact(m)
    pads = [first for first, last in small.pads if first == last]
    assert len(pads) == 2
    got = F.conv2d(x, small.weight, small.bias, small.stride, pads, dilation, small.groups)
    assert close(got, run(m, x))
    assert small.weight.numel() <= m.weight.numel()


def test_compact_gathers_dilated_taps() -> None:
    weight = torch.ones(1, 1, 3, 3)
    m = convolution(weight, None, (1, 1), ((2, 2), (2, 2)), (2, 2), 1)
    small, dilation = compact(m)
    assert m.taps == (5, 5) and small.taps == (3, 3) and dilation == (2, 2)


def test_identity_and_scale() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor, shift = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    assert close(run(identity(3, 2), x), x)
    assert close(run(scale(identity(3, 2), factor, shift), x), x * factor[:, None, None] + shift[:, None, None])
