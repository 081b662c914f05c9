"""Weight-only quantisation: the numbers, what the pass does to a graph, and what reaches the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgec import integer
from edgec.cost import program_cost
from edgec.data import Preprocess, load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.lowering.lower import lower
from edgec.packing import FORMATS
from edgec.passbase import Context
from edgec.passes.quantization.quantize_weights import QuantizeWeights, quantize_groups, relative_error
from edgec.program import Program, is_call
from edgec.quantparams import QParams, code_range, quantize_weights, symmetric_scales
from edgec.sparsity import Sparsity
from edgec.targets.device import load_device
from tests.lowering.helpers import compile_host, load

edgec = torch.ops.edgec
# Of squared errors: the search compares them in float32.
SLACK = 1e-3
SWEEP = settings(max_examples=20, deadline=None, derandomize=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """(weights, bits, group): linear and convolution weights, dead channels and outliers among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    taps = draw(st.sampled_from(((), (1, 1), (3, 2))))
    weights = rng.standard_normal((draw(st.integers(1, 6)), draw(st.integers(1, 40)), *taps)).astype(np.float32)
    weights[rng.random(len(weights)) < 0.2] = 0
    weights[rng.random(weights.shape) < 0.02] *= 30
    return weights, draw(st.sampled_from(tuple(FORMATS))), draw(st.integers(1, weights.shape[1]))


# -- numbers -----------------------------------------------------------------------------------------------------------


@SWEEP
@given(cases(), st.booleans(), st.booleans())
def test_codes_fit_and_errors_are_half_a_step(case: tuple, asymmetric: bool, search: bool) -> None:
    weights, bits, group = case
    found = quantize_groups(weights, bits, group, asymmetric, search)
    low, high = code_range(bits)
    assert found.codes.shape == weights.shape and found.codes.min() >= low and found.codes.max() <= high
    assert found.scale.shape == (len(weights), -(-weights.shape[1] // group)) and np.all(found.scale != 0)
    stored = integer.dequantize_weight(found.codes, found.scale, found.zero, group)
    if not search:
        spread = np.arange(weights.shape[1]) // group
        steps = found.scale[:, spread].reshape(*weights.shape[:2], *[1] * (weights.ndim - 2))
        # A zero point is rounded too, which may cut half a step off either end.
        assert np.all(np.abs(stored - weights) <= steps * (1.001 if asymmetric else 0.5001))


@SWEEP
@given(cases())
def test_the_operator_is_its_definition(case: tuple) -> None:
    weights, bits, group = case
    for asymmetric in (False, True):
        found = quantize_groups(weights, bits, group, asymmetric)
        zero = None if found.zero is None else torch.from_numpy(found.zero)
        got = edgec.dequantize_weight(torch.from_numpy(found.codes), torch.from_numpy(found.scale), zero, group)
        np.testing.assert_array_equal(got, integer.dequantize_weight(found.codes, found.scale, found.zero, group))
        # One weight at a time, by the formula.
        o, i = len(weights) - 1, weights.shape[1] - 1
        code = found.codes[o, i].flat[-1].astype(np.float32) if weights.ndim > 2 else np.float32(found.codes[o, i])
        offset = 0 if found.zero is None else found.zero[o, i // group]
        assert got[o, i].flatten()[-1] == found.scale[o, i // group] * (code - np.float32(offset))


@SWEEP
@given(cases())
def test_a_group_of_all_channels_is_quantisation_per_channel(case: tuple) -> None:
    """Bit for bit that of `quantize-int8` with rounding to nearest."""
    weights, bits, _ = case
    found = quantize_groups(weights, bits, weights.shape[1], search=False)
    scales = symmetric_scales(weights, True, bits)
    np.testing.assert_array_equal(found.scale[:, 0], scales.astype(np.float32))
    np.testing.assert_array_equal(found.codes, quantize_weights(weights, scales, bits))


@SWEEP
@given(cases())
def test_the_search_is_never_worse_and_groups_neither(case: tuple) -> None:
    weights, bits, group = case

    def error(size: int, **options: bool) -> float:
        return relative_error(weights, quantize_groups(weights, bits, size, **options), size)

    row = error(weights.shape[1])
    assert error(group) <= row * (1 + SLACK)
    assert row <= error(weights.shape[1], search=False) * (1 + SLACK)
    assert error(group, asymmetric=True) <= error(group, asymmetric=True, search=False) * (1 + SLACK)


def test_the_odd_code_goes_to_the_larger_side() -> None:
    """2 bits have codes -2..1: with a negative scale the large weight is positive and exact."""
    found = quantize_groups(np.array([[2.0, -1.0, 0.0, 1.0]], np.float32), 2, 4)
    assert found.scale[0, 0] == -1.0
    np.testing.assert_array_equal(found.codes[0], [-2, 1, 0, -1])


# -- the pass ----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """An encoder of convolutions, one of them grouped, and a head of two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 20, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(20, 40, 3, groups=4), nn.Conv2d(40, 33, 1)
        )
        self.head = nn.Sequential(nn.Linear(33, 33), nn.GELU(), nn.Linear(33, 33), nn.Linear(33, 7))
        self.head[2].weight = self.head[0].weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.encoder(x)
        return y, self.head(y.mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Program:
    torch.manual_seed(0)
    return load_model(Network().eval(), input_shape=(1, 3, 12, 12))


def run(program: Program, **options: object) -> tuple[Program, Context]:
    context = Context()
    return QuantizeWeights(**options).run(program, context), context  # type: ignore[arg-type]


def test_layers_read_codes(network: Program) -> None:
    after, context = run(network, group=16)
    assert list(after.annotations["quantize-weights"].bits) == ["encoder.0", "encoder.3", "head.0", "head.3"]
    (skip,) = context.skipped
    assert skip.layer == "encoder.2" and "grouped" in skip.reason
    stored = [n for n in after.graph.nodes if is_call(n, edgec.dequantize_weight.default)]
    assert len(stored) == 4  # head.0 and head.2 share one
    for node in stored:
        record = after.annotations[str(node.args[0].target)]
        assert isinstance(record, QParams)
        assert (record.bits, record.granularity, record.storage) == (4, "group", "pack4")
        assert record.group == min(16, node.meta["val"].shape[1])
    codes = 20 * 3 * 9 + 33 * 40 + 33 * 33 + 7 * 33
    scales = 20 * 1 + 33 * 3 + 33 * 3 + 7 * 3
    kept = 40 * 5 * 9 + (20 + 40 + 33 + 33 + 33 + 7)
    halves = sum(-(-n // 2) for n in (20 * 3 * 9, 33 * 40, 33 * 33, 7 * 33))
    assert program_cost(after).weight_bytes == halves + 4 * scales + 4 * kept
    assert program_cost(after).params == codes + scales + kept


def test_policies_by_name(network: Program) -> None:
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    after, _ = run(network, bits=2, keep_float=("encoder",), keep_int8=("head.3",))
    summary = after.annotations["quantize-weights"]
    assert summary.bits == {"head.0": 2, "head.3": 8}
    assert summary.kept_float == ("encoder.0", "encoder.2", "encoder.3")
    for got, want, same in zip(after(x), network(x), (True, False), strict=True):
        assert torch.equal(got, want) == same
    with pytest.raises(EdgecError, match="no layer is called 'heads'"):
        run(network, keep_float=("heads",))
    assert QuantizeWeights(bits=2).weaken(0).bits == 8  # type: ignore[union-attr]
    assert QuantizeWeights(bits=2).weaken(1) == QuantizeWeights(bits=2)


def test_twice_is_once(network: Program) -> None:
    after, _ = run(network)
    again, context = run(after, bits=2)
    assert again is after
    assert all("computed" in s.reason for s in context.skipped if s.layer != "encoder.2")


def test_pruned_weights_stay_pruned(network: Program) -> None:
    module = network.edit()
    weight = network.weights()["head.3.weight"].clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    mask[:, ::3] = False
    dict(module.named_parameters())["head.3.weight"].data.copy_(weight * mask)
    record = Sparsity("unstructured", (1, 1), mask)
    pruned = network.replace(module, {**network.annotations, "head.3.weight": record})
    after, _ = run(pruned, asymmetric=True)
    assert after.annotations["head.3.weight_q"].bits == 4
    assert "head.3.weight_q_zero" not in after.weights() and "head.2.weight_q_zero" in after.weights()
    assert not after.weights()["head.3.weight_q"][~mask].any()


def test_survives_saving(network: Program, tmp_path: Path) -> None:
    after, _ = run(network, bits=3, asymmetric=True)
    after.save(tmp_path / "model.pt2")
    loaded = Program.from_exported(torch.export.load(tmp_path / "model.pt2"), "loaded")
    x = torch.rand(1, 3, 12, 12)
    for got, want in zip(loaded(x), after(x), strict=True):
        assert torch.equal(got, want)


# -- the device --------------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize(("bits", "asymmetric"), [(4, False), (3, True)])
def test_compiled_code_follows_the_program(network: Program, tmp_path: Path, bits: int, asymmetric: bool) -> None:
    after, _ = run(network, bits=bits, group=16, asymmetric=asymmetric)
    compiled = compile_host(after, tmp_path)
    assert compiled.error() < 1e-5
    kernels = [step.op for step in compiled.lowered.plan.steps]
    assert kernels.count("conv2d_w_f32") == 5 and not any("dequantize" in op for op in kernels)


def test_what_other_operators_read_is_a_constant() -> None:
    """A weight that no layer of ours reads as codes is expanded when the graph is lowered."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.fc.weight.sum(0)

    after, _ = run(load(Tied(), (2, 12)))
    assert sum(is_call(n, edgec.dequantize_weight.default) for n in after.graph.nodes) == 1
    module = after.edit()
    (node,) = [n for n in module.graph.nodes if is_call(n, edgec.dequantize_weight.default)]
    for reader in [n for n in module.graph.nodes if is_call(n, torch.ops.aten.sum.dim_IntList)]:
        reader.update_arg(0, node)
    module.graph.eliminate_dead_code()
    mixed = after.replace(module)
    assert "conv2d_w_f32" in [step.op for step in lower(mixed, load_device("host")).plan.steps]


@pytest.mark.parametrize("name", ("host", "cortex-a76"))
@pytest.mark.parametrize("bits", (2, 4))
def test_bytes_on_the_device(name: str, bits: int) -> None:
    """Codes take their bits, a group four bytes more; outputs are filled up to whole tiles, and that is all."""
    program = load(nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 64)), (40, 256))
    after, _ = run(program, bits=bits, group=64)
    device = load_device(name)
    plan = lower(after, device).plan
    codes = [c.array for c in plan.constants.values() if c.array.dtype == np.int8]
    scales = [c.array for c in plan.constants.values() if c.array.ndim == 3 and c.array.dtype == np.float32]
    outputs = [a.shape[0] * a.shape[2] for a in scales]
    assert all(0 <= got - want < 8 * device.lanes for got, want in zip(outputs, (192, 64), strict=True))
    assert [a.nbytes for a in codes] == [o * k * bits // 8 for o, k in zip(outputs, (256, 192), strict=True)]
    assert [a.size for a in scales] == [o * k // 64 for o, k in zip(outputs, (256, 192), strict=True)]
    assert plan.weight_bytes == sum(a.nbytes for a in codes + scales) + 4 * sum(outputs)


def test_a_real_transformer_keeps_its_predictions(shared: Path) -> None:
    """CIFAR-10 ViT: 4 bits in groups of 128 agree on 9 of 10 images (measured: 94.6 % of 502), at a sixth of the bytes;
    in no layer is such a group worse than a row."""
    program = load_model(str(shared / "data" / "models" / "cifar10_vit_d128l4.pt2"))
    preprocess = Preprocess((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    images = load_data(str(shared / "data" / "datasets" / "cifar10_test.npz"), program.inputs, preprocess).limit(100)
    after, _ = run(program, group=128)
    x = images.inputs()
    agreement = (after(x)[0].argmax(-1) == program(x)[0].argmax(-1)).float().mean()
    assert agreement >= 0.9
    assert program_cost(after).weight_bytes < program_cost(program).weight_bytes / 6
    rows, _ = run(program, group=-1)
    grouped, whole = (p.annotations["quantize-weights"].error for p in (after, rows))
    assert all(grouped[layer] <= whole[layer] for layer in whole)
