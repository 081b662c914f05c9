"""Mixed precision: sensitivities are what they say, budgets hold, ties and fixed layers are respected."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest
import torch

from edgec.cost import program_cost
from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.quantization.fakequant import WeightQuantizer
from edgec.passes.quantization.ptq import LayerBits
from edgec.passes.quantization.quantize_mixed import (
    MixedSummary,
    QuantizeMixed,
    bit_operations,
    choose_bits,
    divergence,
    measure_sensitivity,
    weight_bytes,
)
from edgec.passes.quantization.reconstruct import make_weight
from edgec.program import Program, layer_of
from tests.passes.quantization import lowbit

pytestmark = pytest.mark.pure
MSE = QuantizeMixed(method="mse")


@functools.cache
def made(step: QuantizeMixed) -> Program:
    return step.run(lowbit.program(), lowbit.context())


def summary(program: Program) -> MixedSummary:
    return program.annotations["quantize-mixed"]


def test_sensitivity_is_the_divergence_with_only_that_layer_rounded():
    prepared = lowbit.prepared()
    layers = prepared.layers
    widths, inputs = dict.fromkeys(layers, (2, 4)), dict.fromkeys(layers, (3, 8))
    found = measure_sensitivity(prepared, lowbit.data(), Context(), widths, inputs)
    for name in ("conv1", "pointwise"):
        layer = lowbit.layer(prepared, name)
        for bits in (2, 4):
            module = lowbit.program().edit()
            weight = dict(module.named_parameters())[f"{name}.weight"]
            weight.data.copy_(make_weight(WeightQuantizer, prepared, layer, LayerBits(bits))())
            alone = lowbit.program().replace(module)
            want = divergence(lowbit.program(), alone, lowbit.data())
            assert found.weights[layer][bits] == pytest.approx(want, rel=1e-3, abs=1e-9)
        assert found.weights[layer][2] > found.weights[layer][4] > 0
    assert {n.name for n in found.inputs} == {"x", "relu", "relu_1", "relu_2", "relu_3", "mean"}
    for losses in found.inputs.values():
        assert losses[3] > losses[8] >= 0


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_the_bytes_of_the_program_meet_the_budget(share: float):
    program = made(dataclasses.replace(MSE, bytes=share))
    codes = lowbit.weight_codes(program)
    stored = sum(-(-c.numel() * r.bits // 8) for c, r in codes.values())
    eight = sum(c.numel() for c, _ in codes.values())
    assert stored == summary(program).spent <= summary(program).budget == share * eight
    assert stored > 0.8 * share * eight  # something is bought for it
    assert {codes[n][1].bits for n in ("stem", "depthwise", "fc")} == {8}
    everything = program_cost(program).weight_bytes
    constants = sum(w.numel() * w.element_size() for w in program.weights().values()) - eight
    assert everything == stored + constants


def test_more_bytes_harm_less():
    found = [summary(made(dataclasses.replace(MSE, bytes=share))) for share in (0.6, 0.75, 0.9, 1.0)]
    predicted = [s.predicted for s in found]
    assert predicted == sorted(predicted, reverse=True) and predicted[0] > 1.3 * predicted[-1]
    assert found[-1].measured < found[0].measured
    everything = found[-1]
    losses = [min(table.values()) for table in (*everything.weight_loss.values(), *everything.input_loss.values())]
    assert everything.predicted == pytest.approx(sum(losses))


def test_the_choice_is_the_best_there_is():
    """Against all combinations of bits."""
    prepared = lowbit.prepared()
    layers = prepared.layers
    widths, inputs = dict.fromkeys(layers, (2, 4, 8)), dict.fromkeys(layers, (4, 8))
    found = measure_sensitivity(prepared, lowbit.data(), Context(), widths, inputs)
    cost = bit_operations(prepared)
    budget = 0.4 * sum(cost(n, 8, 8) for n in layers)
    bits, total = choose_bits(found, cost, budget)
    assert sum(cost(n, b.weights, b.activations) for n, b in bits.items()) <= budget
    best = float("inf")
    for weights in itertools.product((2, 4, 8), repeat=len(layers)):
        for activations in itertools.product((4, 8), repeat=len(layers)):
            spent = sum(cost(n, w, a) for n, w, a in zip(layers, weights, activations, strict=True))
            if spent <= budget * 0.999:  # costs are rounded up to a ten-thousandth of the budget each
                loss = sum(found.weights[n][w] for n, w in zip(layers, weights, strict=True))
                loss += sum(found.inputs[found.source[n]][a] for n, a in zip(layers, activations, strict=True))
                best = min(best, loss)
    assert total <= best * (1 + 1e-9)


class Branches(torch.nn.Module):
    """Two convolutions read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        conv = torch.nn.Conv2d
        self.stem, self.left, self.right, self.last = conv(2, 6, 3), conv(6, 6, 3), conv(6, 6, 3), conv(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.last((self.left(x) + self.right(x)).relu()).mean((2, 3))


def test_layers_that_share_a_tensor_share_its_width():
    program = load_model(Branches().eval(), input_shape=(1, 2, 9, 7))
    context = Context(calibration=load_data(lowbit.images(64).numpy(), program.inputs))
    seen = set()
    for share in (0.9, 0.6, 0.45, 0.4):
        step = QuantizeMixed(bitops=share, activations=(3, 4, 6, 8), edges=2, method="mse", choices=(3, 4, 8))
        result = step.run(program, context)
        bits = summary(result).bits
        assert bits["left"][1] == bits["right"][1]
        assert summary(result).spent <= summary(result).budget
        seen.add(bits["left"][1])
    assert len(seen) > 1


def test_a_table_of_measured_costs(tmp_path: Path):
    prepared = lowbit.prepared()
    names = [layer_of(n) for n in prepared.layers]
    table = {name: {"8": 10.0, "4x8": 6.0, "3": 5.5, "2": 9.0} for name in names}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(table))
    program = QuantizeMixed(cost=0.8, table=str(path), method="mse").run(lowbit.program(), lowbit.context())
    found = summary(program)
    assert found.budget == pytest.approx(0.8 * 60) and found.spent <= found.budget
    assert found.bits["conv1"][0] in (3, 4) and found.spent == pytest.approx(
        sum(table[n].get(f"{w}x{a}", table[n].get(str(w), 0.0)) for n, (w, a) in found.bits.items())
    )
    del table["conv2"]
    path.write_text(json.dumps(table))
    with pytest.raises(EdgecError, match="has no cost of layer 'conv2'"):
        QuantizeMixed(cost=0.8, table=str(path), method="mse").run(lowbit.program(), lowbit.context())
    with pytest.raises(EdgecError, match="cost and table go together"):
        QuantizeMixed(table=str(path)).run(lowbit.program(), lowbit.context())
    with pytest.raises(EdgecError, match="cannot be read"):
        QuantizeMixed(cost=0.5, table=str(tmp_path / "no")).run(lowbit.program(), lowbit.context())


def test_a_budget_that_cannot_be_met_is_reported_and_the_least_taken():
    context = lowbit.context()
    program = QuantizeMixed(bytes=0.1, method="mse").run(lowbit.program(), context)
    assert {summary(program).bits[n][0] for n in ("conv1", "conv2", "pointwise")} == {2}
    (skip,) = [s for s in context.skipped if s.what == "quantize-mixed"]
    assert "bytes=0.1 cannot be met" in skip.reason


def test_rounding_is_learned_at_the_chosen_bits():
    step = dataclasses.replace(MSE, bytes=0.6, method="learned", steps=40)
    program = made(step)
    assert summary(program).bits == summary(made(dataclasses.replace(MSE, bytes=0.6))).bits
    assert program.annotations["reconstruct"].bits == summary(program).bits
    assert any(u.kept for u in program.annotations["reconstruct"].units)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"choices": (1, 4)}, "are not widths"), ({"activations": ()}, "are not widths"),
     ({"bitops": 0.5, "cost": 0.5}, "two budgets")],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict, message: str):
    with pytest.raises(EdgecError, match=message):
        QuantizeMixed(**options)


def test_bytes_of_a_layer():
    prepared = lowbit.prepared()
    cost, layer = weight_bytes(prepared), lowbit.layer(prepared, "fc")
    assert [cost(layer, b, 8) for b in (2, 3, 4, 8)] == [15, 23, 30, 60]
