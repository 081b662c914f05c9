"""Fake quantisation: values, gradients of LSQ, soft rounding, and that the graph is what the integers compute."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edgec.passes.quantization.fakequant import (
    ActivationQuantizer,
    FakeQuantGraph,
    LearnedStepWeight,
    RoundingWeight,
    WeightQuantizer,
    fake_quantize,
    step_gain,
)
from edgec.passes.quantization.ptq import LayerBits, RangeFinder, activation_bits, convert, observe, uniform_bits
from edgec.passes.quantization.reconstruct import given_rule, make_weight
from edgec.quantparams import affine, mse_scales, quantize_weights, weight_range
from tests.passes.quantization import lowbit

pytestmark = pytest.mark.pure


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_values_are_those_of_the_integers():
    x, params = 3 * values(1000), affine(-2.0, 5.0, bits=4)
    scale, zero = params.per_tensor
    codes = np.clip(np.rint(x.numpy() / np.float32(scale)) + zero, -8, 7)
    want = (codes - zero).astype(np.float32) * np.float32(scale)
    assert np.array_equal(ActivationQuantizer(params)(x).numpy(), want)
    assert len(np.unique(codes)) == 16


@pytest.mark.parametrize("zero", [-8, -3, 0])
def test_gradients_are_those_of_lsq(zero: int):
    """Written out with `where` for one scale, on values inside, below and above the range."""
    x, s = (4 * values(4000)).requires_grad_(True), torch.tensor(0.37, requires_grad=True)
    grad, (low, high), gain = values(4000, seed=1), (-8, 7), 0.25
    fake_quantize(x, s, torch.tensor(float(zero)), low, high, gain).backward(grad)
    v = (x / s).detach()
    inside = (v + zero >= low) & (v + zero <= high)
    slope = torch.where(inside, torch.round(v) - v, torch.where(v + zero < low, low - zero, high - zero).float())
    assert inside.any() and (v + zero > high).any() and (v + zero < low).any()
    assert x.grad is not None and s.grad is not None
    assert torch.equal(x.grad, grad * inside)
    assert torch.allclose(s.grad, gain * (grad * slope).sum(), rtol=1e-4)


def test_gradients_of_steps_per_channel():
    w = values(3, 4, 2, 2)
    together = LearnedStepWeight(w, [0.3, 0.2, 0.5], 3)
    grad = values(3, 4, 2, 2, seed=2)
    together().backward(grad)
    assert together.factor.grad is not None
    for i, scale in enumerate((0.3, 0.2, 0.5)):
        alone = torch.tensor(scale, requires_grad=True)
        fake_quantize(w[i], alone, torch.tensor(0.0), -3, 3, step_gain(16, 3)).backward(grad[i])
        assert alone.grad is not None  # the factor is relative to the step: chain rule
        assert torch.allclose(together.factor.grad[i].squeeze(), alone.grad * scale, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("full", [False, True])
def test_soft_rounding_starts_at_the_weights_and_ends_on_a_neighbour(bits: int, full: bool):
    w = values(6, 5, 3, 3)
    scales = mse_scales(w.numpy(), True, bits, full)
    soft = RoundingWeight(w, scales, bits, full)
    low, high = weight_range(bits, full)
    steps = w / soft.scale
    clipped = steps.clamp(low, high) * soft.scale
    assert torch.allclose(soft(), clipped, atol=1e-5)
    nearest = quantize_weights(w.numpy(), scales, bits, full)
    assert (soft.codes() == nearest).mean() > 0.999  # ties at one half may go either way
    with torch.no_grad():
        soft.v.copy_(values(6, 5, 3, 3, seed=3))
    codes = soft.codes()
    within = ((steps > low) & (steps < high)).numpy()
    assert np.abs(codes.astype(int) - nearest)[within].max() == 1
    assert codes.min() >= low and codes.max() <= high
    decided = torch.where(soft.v >= 0, 1e3, -1e3)
    with torch.no_grad():
        soft.v.copy_(decided)
    assert torch.equal(soft(), torch.from_numpy(codes).float() * soft.scale)
    assert soft.penalty(2.0).item() == 0.0 and soft.undecided() == 0.0


def test_pruned_weights_stay_zero():
    w, mask = values(4, 4, 3, 3), values(4, 4, 3, 3, seed=4) > 0
    w = w * mask
    soft = RoundingWeight(w, [0.1] * 4, 4, mask=mask)
    with torch.no_grad():
        soft.v.fill_(5.0)
    assert not soft.codes()[~mask.numpy()].any() and soft.codes()[mask.numpy()].any()
    assert not soft()[~mask].any()


def test_the_graph_computes_what_the_integers_do():
    """Output by output, but for the few codes that fall on the other side of a half."""
    prepared = lowbit.prepared()
    bits = uniform_bits(prepared, 4, 8)
    context = lowbit.context()
    observed = observe(prepared, lowbit.data(), context, RangeFinder(), activation_bits(prepared, bits))
    weights = {n: make_weight(WeightQuantizer, prepared, n, bits[n]) for n in prepared.layers}
    graph = FakeQuantGraph(prepared, observed, weights)
    x = lowbit.images(32, seed=7)
    with torch.no_grad():
        (fake,), (real,) = graph(x), graph(x, quantised=False)
    integers = convert(prepared, observed, lambda n: given_rule(weights[n]), "RQ1").finish({})
    (got,) = integers(x)
    assert torch.allclose(real, lowbit.program()(x)[0], atol=1e-5)
    assert (got - fake).square().mean().sqrt() < 0.1 * (fake - real).square().mean().sqrt()


def test_learned_steps_reach_the_record():
    quantizer = ActivationQuantizer(affine(0.0, 4.0, "relu", bits=4))
    assert quantizer.result() is quantizer.params
    quantizer.factor = torch.tensor(0.5)
    changed = quantizer.result()
    assert changed.scale == pytest.approx(quantizer.params.per_tensor[0] / 2)
    assert (
        dataclasses.replace(changed, scale=quantizer.params.scale, source=quantizer.params.source) == quantizer.params
    )
    quantizer.reset()
    assert quantizer.result() is quantizer.params


def test_bits_of_layers_and_tensors():
    """8 bits at both ends and for depthwise layers; a residual sum reads 8-bit codes and gives what its reader asks."""
    prepared = lowbit.prepared()
    bits = uniform_bits(prepared, 3, 4)
    by_name = {name: bits[lowbit.layer(prepared, name)] for name in ("stem", "conv1", "depthwise", "pointwise", "fc")}
    few, full = LayerBits(3, 4), LayerBits(8, 8)
    assert by_name == {"stem": full, "conv1": few, "depthwise": full, "pointwise": few, "fc": full}
    found = {n.name: b for n, b in activation_bits(prepared, bits).items()}
    assert found == {"x": 8, "relu": 4, "relu_1": 4, "conv2d_2": 8, "relu_2": 8, "relu_3": 4, "relu_4": 8, "mean": 8}
    low = uniform_bits(prepared, 3, 4, edges=2, depthwise=5)
    assert low[lowbit.layer(prepared, "stem")] == few
    assert low[lowbit.layer(prepared, "depthwise")] == LayerBits(5, 5)
