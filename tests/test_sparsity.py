"""Sparsity records follow their weights through every pass that moves them, or the pass is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgec.cost import layer_rows, program_cost
from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.inspect import inspect_model
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.precision.fp16 import CastFP16
from edgec.passes.pruning.masks import apply
from edgec.passes.quantization.equalize import Equalize
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.passes.quantization.squant import squant_codes
from edgec.program import Program
from edgec.sparsity import Carrier, Sparsity, carry, sparsities
from tests import zoo

pytestmark = pytest.mark.pure


def random_mask(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Half of the kernels of a weight, all taps alike."""
    kernels = torch.rand(shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.5
    return kernels.reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape).clone()


def pruned(program: Program, *only: str) -> Program:
    """Every convolution and linear weight of a Program, or those named, with half of its kernels gone."""
    chosen = {p: w for p, w in program.weights().items() if w.dim() > 1 and (not only or p in only)}
    return apply(program, {p: Sparsity("block", (1, 1), random_mask(tuple(w.shape))) for p, w in chosen.items()})


def noise(program: Program, n: int = 16) -> Context:
    x = np.random.default_rng(0).normal(size=(n, *program.inputs[0].shape[1:])).astype(np.float32)
    return Context(calibration=load_data(x, program.inputs))


def assert_zeros(program: Program) -> None:
    """All records hold, and what they prune is +0.0 or code 0."""
    weights = program.weights()
    for path, record in sparsities(program.annotations).items():
        gone = weights[path][~record.mask]
        assert gone.numel() and not gone.to(torch.float32).view(torch.int32).any(), path


class Negative(nn.Module):
    """Batch norms whose gamma is negative, behind and, without padding, before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.bn2, self.second = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        for bn in (self.bn1, self.bn2):
            bn.weight.data.uniform_(-2, -0.5)
            bn.running_mean = torch.rand(8) * 2 - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.bn2(F.relu(self.bn1(self.first(x)))))


class Line(nn.Module):
    """1-D convolutions, which int8 sees as maps of height 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(4, 8, 3, padding=1), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)))


class Hidden(nn.Module):
    """An MLP with one hidden unit far above the others: int8 multiplies it in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.norm = nn.Linear(8, 128), nn.Linear(128, 8), nn.LayerNorm(8)
        with torch.no_grad():
            self.fc1.bias[5] = 120.0
            self.fc2.weight[:, 5] *= 0.01

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.fc2(F.gelu(self.fc1(self.norm(x))))).flatten(1)


def test_folding_scales_what_is_kept_and_moves_the_record() -> None:
    before = pruned(load_model(Negative().eval(), input_shape=(1, 4, 6, 6)), "first.weight", "second.weight")
    after = FoldBN().run(before, Context())
    old, new = sparsities(before.annotations), sparsities(after.annotations)
    assert new == {f"{p.removesuffix('.weight')}.folded.weight": r for p, r in old.items()}
    assert_zeros(after)  # negative factors make no -0.0
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(after(x), before(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_two_layers_share_keeps_its_record_and_gives_a_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.conv(F.relu(self.bn(self.conv(x))))

    before = pruned(load_model(Twice().eval(), input_shape=(1, 4, 6, 6)), "conv.weight")
    after = FoldBN().run(before, Context())
    assert set(sparsities(after.annotations)) == {"conv.weight", "conv.folded.weight"}


def test_equalisation_keeps_records_in_their_place() -> None:
    before = pruned(load_model(Line().eval(), input_shape=(1, 4, 6)))
    residual = FoldBN().run(pruned(zoo.program("residual")), Context())
    for program in (before, residual):
        after = Equalize().run(program, Context())
        assert sparsities(after.annotations) == sparsities(program.annotations) != {}
        assert_zeros(after)


@pytest.mark.parametrize("rounding", ["squant", "nearest"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_int8_codes_of_pruned_weights_are_zero(rounding: str, bias_correction: bool) -> None:
    folded = FoldBN().run(pruned(zoo.program("residual")), Context())
    step = QuantizeInt8(rounding=rounding, bias_correction=bias_correction, equalize=True)
    after = step.run(folded, noise(folded))
    old, new = sparsities(folded.annotations), sparsities(after.annotations)
    assert new == {f"{p}_q": r for p, r in old.items()}
    assert_zeros(after)
    for path in new:  # the scales have the path for themselves
        assert after.annotations[path].granularity == "channel"
    assert program_cost(after).kept_macs == program_cost(folded).kept_macs < program_cost(after).macs


def test_layers_kept_float_keep_their_record() -> None:
    folded = FoldBN().run(pruned(zoo.program("residual")), Context())
    after = QuantizeInt8(keep_float=("fc",)).run(folded, noise(folded))
    assert {"fc.weight", "conv1.folded.weight_q"} <= set(sparsities(after.annotations))


def test_masks_of_1d_convolutions_get_the_height_of_their_weights() -> None:
    before = pruned(load_model(Line().eval(), input_shape=(1, 4, 6)))
    after = QuantizeInt8().run(before, noise(before))
    new = sparsities(after.annotations)
    assert {p: tuple(r.mask.shape) for p, r in new.items()} == {
        "a.weight_2d_q": (8, 4, 1, 3),
        "b.weight_2d_q": (4, 8, 1, 3),
    }
    assert torch.equal(new["a.weight_2d_q"].mask[:, :, 0], sparsities(before.annotations)["a.weight"].mask)
    assert_zeros(after)


def test_outlier_channels_take_their_part_of_the_mask_along() -> None:
    before = pruned(load_model(Hidden().eval(), input_shape=(1, 6, 8)))
    after = QuantizeInt8().run(before, noise(before, 32))
    old, new = sparsities(before.annotations), sparsities(after.annotations)
    assert set(new) == {"fc1.weight_q", "fc2.weight_q", "fc1.weight_outliers_q", "fc2.weight_outliers"}
    assert torch.equal(new["fc1.weight_outliers_q"].mask, old["fc1.weight"].mask[5:6])
    assert torch.equal(new["fc2.weight_outliers"].mask, old["fc2.weight"].mask[:, 5:6])
    assert new["fc2.weight_outliers"].pattern == "unstructured"
    assert_zeros(after)


def test_a_pruned_transposed_convolution_is_refused_not_forgotten() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    before = pruned(load_model(model, input_shape=(1, 4, 6, 6)), "0.weight")
    with pytest.raises(EdgecError, match="is gone and its mask was not carried"):
        QuantizeInt8().run(before, noise(before))


def test_half_precision_weights_take_their_record_along() -> None:
    folded = FoldBN().run(pruned(zoo.program("residual")), Context())
    after = CastFP16(keep_float=("fc",)).run(folded, Context())
    assert {"fc.weight", "conv1.folded.fp16.weight"} <= set(sparsities(after.annotations))
    assert len(sparsities(after.annotations)) == len(sparsities(folded.annotations))
    assert_zeros(after)


def test_masks_are_in_the_file_that_save_writes(tmp_path: Path) -> None:
    folded = FoldBN().run(pruned(zoo.program("residual")), Context())
    integer = QuantizeInt8().run(folded, noise(folded))
    for name, program in (("float", folded), ("int8", integer)):
        program.save(tmp_path / f"{name}.pt2")
        again = load_model(str(tmp_path / f"{name}.pt2"))
        assert sparsities(again.annotations) == sparsities(program.annotations) != {}
        second = again.replace(again.edit())
        assert sparsities(second.annotations) == sparsities(program.annotations)


def test_a_file_without_masks_has_none(tmp_path: Path) -> None:
    zoo.program("residual").save(tmp_path / "dense.pt2")
    assert sparsities(load_model(str(tmp_path / "dense.pt2")).annotations) == {}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**31))
def test_records_round_trip_as_plain_data(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    record = Sparsity("nm", (2, 4), mask, seed % 2 == 0)
    assert Sparsity.from_json(record.to_json()) == record


@pytest.mark.parametrize("change", [{"mask": "eA=="}, {"mask": 3}, {"shape": [3]}, {"pattern": "no"}, {"block": [1]}])
def test_damaged_records_are_refused(change: dict) -> None:
    record = Sparsity("block", (4, 1), torch.ones(8, 4, dtype=torch.bool)).to_json()
    with pytest.raises(EdgecError):
        Sparsity.from_json({**record, **change})


def test_carry_and_carrier() -> None:
    record = Sparsity("block", (1, 1), random_mask((4, 2)))
    assert carry({"a": record, "other": 1}, {"a": "b"}) == {"b": record, "other": 1}
    turned = carry({"a": record}, {"a": "b"}, lambda mask: mask.T)
    assert torch.equal(turned["b"].mask, record.mask.T)
    carrier = Carrier({"a": record})
    carrier.move("a", "b")
    carrier.move("dense", "c")
    assert carrier.annotations({"a": record, "b": "scales"}, {"b"}) == {"b": "scales", "b#mask": record}
    assert Carrier({"a": record}).annotations({}, {"b"}) == {"a": record}  # gone, and nothing took it over


@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 9), st.floats(0.02, 0.9))
def test_squant_moves_no_code_of_a_pruned_weight(seed: int, channels: int, taps: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(4, channels, taps)) * (rng.random((4, channels, taps)) < density)
    codes = squant_codes(weights, np.full(4, rng.uniform(0.01, 2.0)))
    assert not codes[weights == 0].any()


def test_costs_say_what_is_kept() -> None:
    dense = zoo.program("residual")
    program = pruned(dense, "conv2.weight")
    record = sparsities(program.annotations)["conv2.weight"]
    gone = int((~record.mask).sum())
    cost, whole = program_cost(program), program_cost(dense)
    assert (cost.params, cost.macs, cost.weight_bytes) == (whole.params, whole.macs, whole.weight_bytes)
    assert (whole.kept_params, whole.kept_macs) == (whole.params, whole.macs)
    assert cost.kept_params == cost.params - gone
    assert cost.kept_macs == cost.macs - gone * 64  # 8x8 positions
    rows = {r.layer: r.density for r in layer_rows(program) if r.op == "conv2d"}
    assert rows["conv2"] == record.density and rows["conv1"] == 1.0
    assert inspect_model(program).to_json()["cost"]["kept_params"] == cost.kept_params
    assert "kept_params" not in inspect_model(dense).to_json()["cost"]


def test_pruning_over_another_mask_is_refused() -> None:
    program = pruned(zoo.program("residual"), "conv2.weight")
    record = sparsities(program.annotations)["conv2.weight"]
    with pytest.raises(EdgecError, match="pruned already"):
        apply(program, {"conv2.weight": dataclasses.replace(record, mask=~record.mask)})
    with pytest.raises(EdgecError, match="no weight"):
        apply(program, {"conv9.weight": record})
