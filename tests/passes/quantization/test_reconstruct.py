"""Learned rounding: what codes may be, that it pays, and that the baselines are what they say."""

from __future__ import annotations

import functools

import pytest
import torch

from edgec.cost import program_cost
from edgec.errors import EdgecError
from edgec.passbase import Context, Pass
from edgec.passes.quantization import reconstruct
from edgec.passes.quantization.fakequant import ActivationQuantizer, rounded
from edgec.passes.quantization.qat import Qat
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.passes.quantization.reconstruct import LowBitSummary, Reconstruct, dropping
from edgec.passes.quantization.units import find_units
from edgec.program import Program, layer_of
from edgec.quantparams import affine, mse_scales, quantize_weights
from edgec.sparsity import Sparsity, sparsities
from tests import zoo
from tests.passes.quantization import lowbit

pytestmark = pytest.mark.pure


@functools.cache
def made(**options) -> Program:
    return Reconstruct(**options).run(lowbit.program(), lowbit.context())


def summary(program: Program) -> LowBitSummary:
    return program.annotations["reconstruct"]


@pytest.mark.parametrize(("bits", "full"), [(2, False), (3, True), (4, False)])
def test_codes_are_neighbours_of_the_weights(bits: int, full: bool):
    program = made(weights=bits, activations=4, full_range=full, steps=60)
    floats = lowbit.program().weights()
    moved = 0
    for name, (codes, record) in lowbit.weight_codes(program).items():
        low, high = (-(1 << (record.bits - 1)), (1 << (record.bits - 1)) - 1)
        low = low if full else -high
        assert (record.n, record.p) == (low, high) and int(codes.min()) >= low and int(codes.max()) <= high
        assert record.bits == (8 if name in ("stem", "depthwise", "fc") else bits)
        weight = floats[f"{name}.weight"].numpy()
        assert mse_scales(weight, True, record.bits, full).tolist() == list(record.scale)  # type: ignore[arg-type]
        nearest = quantize_weights(weight, record.scale, record.bits, full).astype(int)
        step = weight / torch.tensor(record.scale).reshape(-1, *[1] * (weight.ndim - 1)).numpy()
        unclipped = (step > low) & (step < high)
        assert abs(codes.numpy() - nearest)[unclipped].max() <= 1
        assert (codes.numpy() == nearest)[(step < low - 1) | (step > high + 1)].all()
        moved += int((codes.numpy() != nearest).sum())
    assert moved > 50


def test_learning_beats_nearest_rounding_block_by_block_and_at_the_end():
    program = made(weights=3, activations=8, steps=250)
    units = summary(program).units
    assert [u.layers for u in units] == [("stem",), ("conv1", "conv2"), ("depthwise",), ("pointwise",), ("fc",)]
    better = [u.learned < u.nearest for u in units]
    assert sum(better) >= 0.95 * len(better) and [u.kept for u in units] == better
    x = lowbit.images(256, seed=9)  # not those of the calibration
    baselines = [made(weights=3, activations=8, method=method) for method in ("mse", "minmax")]
    errors = [lowbit.float_error(lowbit.program(), p, x) for p in (program, *baselines)]
    assert errors[0] < 0.95 * errors[1] and errors[0] < 0.85 * errors[2]


def test_weights_are_decided_at_the_end():
    """Sum of min(h, 1 - h) below 1 % of the number of weights, with enough weight on deciding."""
    program = made(weights=3, activations=8, steps=200, lr=0.03, regularise=1.0, drop=1.0)
    assert max(u.undecided for u in summary(program).units) < 1e-2


def test_activations_have_only_as_many_values_as_bits_allow():
    program = made(weights=4, activations=3, steps=20)
    seen = lowbit.code_values(program, lowbit.images(64))
    few = {name: codes for name, (codes, record) in seen.items() if record.bits == 3}
    assert len(few) == 3  # what conv1, conv2 and pointwise read
    for codes, record in seen.values():
        assert int(codes.min()) >= record.n and int(codes.max()) <= record.p
    assert all(4 < len(codes.unique()) <= 8 for codes in few.values())


def test_an_input_of_few_bits_is_clamped_behind_its_quantisation():
    program = made(weights=4, activations=4, edges=4, method="mse")
    seen = lowbit.code_values(program, 100 * lowbit.images(8))
    codes, record = seen["x_q_clamp"]
    assert record.bits == 4 and set(codes.unique().tolist()) <= set(range(-8, 8))
    assert int(seen["x_q"][0].max()) > 7


def test_dropping_with_probability_one_is_rounding():
    x, quantizer = torch.randn(7, 5, 3), ActivationQuantizer(affine(-1.0, 1.0, bits=3))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(dropping(1.0, generator)(x, quantizer), rounded(x, quantizer))
    assert torch.equal(dropping(0.0, generator)(x, quantizer), x)
    large = torch.randn(200, 500)
    half = dropping(0.5, generator)(large, quantizer)
    taken = half == quantizer(large)
    assert 0.49 < taken.float().mean() < 0.51 and torch.equal(half[~taken], large[~taken])


def test_drop_one_is_plain_reconstruction_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    options = {"weights": 3, "activations": 3, "steps": 40, "drop": 1.0}
    plain = made(**options)
    monkeypatch.setattr(reconstruct, "rounded", dropping(1.0, torch.Generator()))
    again = Reconstruct(**options).run(lowbit.program(), lowbit.context())  # type: ignore[arg-type]
    assert again.text() == plain.text()
    assert made(**{**options, "drop": 0.5}).text() != plain.text()


@pytest.mark.parametrize("model", ["residual", "concat", "depthwise_separable", "vit_block"])
def test_eight_bits_by_the_extremes_are_quantize_int8(model: str):
    def graph(program: Program) -> list[str]:
        return [line for line in program.text().splitlines() if not line.startswith("  #")]

    context = Context(calibration=zoo.calibration(model))
    ours = Reconstruct(weights=8, activations=8, method="minmax").run(zoo.program(model), context)
    theirs = QuantizeInt8(observer="min-max", rounding="nearest").run(zoo.program(model), context)
    assert graph(ours) == graph(theirs)


def test_stored_bytes_are_counted_as_packed():
    cost = program_cost(made(weights=3, activations=4, method="mse"))
    weights = lowbit.program().weights()
    packed = sum(-(-weights[f"{n}.weight"].numel() * 3 // 8) for n in ("conv1", "conv2", "pointwise"))
    eight = sum(weights[f"{n}.weight"].numel() for n in ("stem", "depthwise", "fc"))
    constants = sum(
        w.numel() * w.element_size()
        for path, w in made(weights=3, activations=4, method="mse").weights().items()
        if not path.endswith(".weight_q")
    )
    assert cost.weight_bytes == packed + eight + constants


def test_layers_alone_and_units_of_a_graph():
    prepared = lowbit.prepared()
    for granularity, count in (("block", 5), ("layer", 6)):
        units = find_units(prepared, granularity)
        assert len(units) == count
        nodes = [n for u in units for n in u.nodes]
        assert nodes == [n for n in prepared.module.graph.nodes if n.op == "call_function"]
        for earlier, unit in zip([None, *units], units, strict=False):
            assert earlier is None or set(unit.inputs) >= set(earlier.outputs) & set(unit.inputs)
    (block,) = [u for u in find_units(prepared, "block") if len(u.layers) == 2]
    assert [n.name for n in block.inputs] == ["relu"] and [n.name for n in block.outputs] == ["relu_2"]
    program = made(weights=3, activations=4, granularity="layer", steps=30)
    assert [u.layers for u in summary(program).units] == [(layer_of(n),) for n in prepared.layers]


def test_what_does_not_improve_stays_nearest():
    context = lowbit.context()
    program = Reconstruct(weights=4, steps=30, lr=30.0).run(lowbit.program(), context)
    lost = [u for u in summary(program).units if not u.kept]
    assert lost and {s.layer for s in context.skipped if s.what == "learned rounding"} == {u.name for u in lost}
    codes = lowbit.weight_codes(program)
    for unit in lost:
        for name in unit.layers:
            got, record = codes[name]
            weight = lowbit.program().weights()[f"{name}.weight"].numpy()
            assert (got.numpy() == quantize_weights(weight, record.scale, record.bits)).all()


def test_seeds_draw_other_samples():
    other = Reconstruct(weights=3, steps=20).run(lowbit.program(), lowbit.context(seed=1))
    assert other.text() != made(weights=3, steps=20).text()


@pytest.mark.parametrize(
    "step", [Reconstruct(weights=3, steps=30), Qat(weights=3, steps=10)], ids=["reconstruct", "qat"]
)
def test_masks_reach_the_integer_weights(step: Pass):
    """conv1 (3x3) and pointwise (1x1) pruned at random."""
    module, annotations = lowbit.program().edit(), {}
    for path in ("conv1.weight", "pointwise.weight"):
        weight = dict(module.named_parameters())[path]
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        weight.data.mul_(mask).add_(0.0)
        annotations[path] = Sparsity("unstructured", (1, 1), mask)
    pruned = lowbit.program().replace(module, annotations)
    done = step.run(pruned, lowbit.context(64))
    weights, records = done.weights(), sparsities(done.annotations)
    assert set(records) == {"conv1.weight_q", "pointwise.weight_q"}
    for path, record in records.items():
        assert torch.equal(record.mask, annotations[path.removesuffix("_q")].mask)
        assert not weights[path][~record.mask].any() and weights[path][record.mask].any()


def test_weakening_ends_at_eight_bits():
    step = Reconstruct(weights=2, activations=4)
    assert step.weaken(0.0) == Reconstruct(weights=8, activations=8)
    assert step.weaken(0.5) == Reconstruct(weights=5, activations=6)


def test_a_rate_that_explodes_is_named():
    with pytest.raises(EdgecError, match="loss is not finite in iteration"):
        Reconstruct(steps=20, lr=1e30, regularise=1e30).run(lowbit.program(), lowbit.context())
