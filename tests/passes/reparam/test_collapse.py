"""`collapse`: the same function with fewer layers and no more multiplications, on the structures of the papers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.cost import program_cost
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.reparam.collapse import Collapse, Collapsed
from edgec.program import Program
from edgec.sparsity import Sparsity
from tests.passes.reparam import networks as nets

pytestmark = pytest.mark.pure

# Of the largest output, in float32.
TOLERANCE = 1e-5


def load(network: nn.Module, shape: tuple[int, ...]) -> Program:
    return load_model(nets.trained_like(network), input_shape=shape, name="network")


def calls(program: Program, *names: str) -> int:
    def is_one(target: object) -> bool:
        return isinstance(target, torch._ops.OpOverload) and target._schema.name.split("::")[1] in names

    return sum(n.op == "call_function" and (not names or is_one(n.target)) for n in program.graph.nodes)


def relative(a: Program, b: Program, batch: int = 2, seed: int = 1) -> float:
    spec = a.inputs[0]
    x = torch.randn(batch, *spec.shape[1:], generator=torch.Generator().manual_seed(seed))
    want, got = a(x)[0], b(x)[0]
    return float((want - got).abs().max() / want.abs().max())


# network, input shape, convolutions and linear layers left
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "repvgg": (lambda: nn.Sequential(nets.RepVGGBlock(6, 12, 2), nets.RepVGGBlock(12, 12)), (1, 6, 13, 17), 2),
    "mobileone": (lambda: nets.MobileOneBlock(8, 12), (1, 8, 9, 11), 3),
    "ghostnetv3": (lambda: nets.GhostModule(6, 8), (1, 6, 9, 11), 5),
    "dilated": (lambda: nets.DilatedBranches(6), (1, 6, 15, 19), 1),
    "sesr": (lambda: nets.SESR(), (1, 1, 13, 17), 4),
    "difference": (lambda: nets.DifferenceConv(6), (1, 6, 13, 9), 1),
    "spaced": (lambda: nets.SpacedConv(6), (1, 6, 13, 12), 1),
    "linear": (lambda: nets.LinearChain(), (1, 5, 32), 3),
}


@pytest.mark.parametrize("case", CASES)
class TestStructuresOfThePapers:
    def test_the_function_stays_and_the_layers_merge(self, case: str) -> None:
        make, shape, layers = CASES[case]
        before = load(make(), shape)
        after = Collapse().run(before, Context())
        assert relative(before, after) <= TOLERANCE
        assert calls(after, "conv2d", "linear") == layers
        assert calls(after) < calls(before)
        assert program_cost(after).macs <= program_cost(before).macs

    def test_a_second_run_changes_nothing(self, case: str) -> None:
        make, shape, _ = CASES[case]
        once = Collapse().run(load(make(), shape), Context())
        assert Collapse().run(once, Context()) is once

    def test_every_merge_is_recorded(self, case: str) -> None:
        make, shape, _ = CASES[case]
        before = load(make(), shape)
        after = Collapse().run(before, Context())
        records = after.annotations.get("collapse", ())
        if case == "spaced":  # constant folding alone
            assert not records
            return
        assert all(isinstance(r, Collapsed) and r.merged and r.macs_after <= r.macs_before for r in records)
        saved = sum(r.macs_before - r.macs_after for r in records)
        assert saved == program_cost(before).macs - program_cost(after).macs


def test_the_sesr_kernel_is_the_response_to_impulses() -> None:
    """The oracle of the reference code: convolve unit impulses, reverse the taps."""
    block = nets.trained_like(nets.SESR()).get_submodule("blocks.0")
    after = Collapse().run(load(nets.SESR(), (1, 1, 13, 17)), Context())
    found = {path: w for path, w in after.weights().items() if "blocks.0" in path}
    (kernel,) = (w for w in found.values() if w.dim() == 4)
    impulses = F.pad(torch.eye(16)[:, :, None, None], (2, 2, 2, 2))
    bias = F.conv2d(block[0].bias.reshape(1, -1, 1, 1), block[1].weight, block[1].bias).flatten()
    response = block[1](F.conv2d(impulses, block[0].weight, block[0].bias)) - bias[None, :, None, None]
    expected = response.flip(2, 3).transpose(0, 1)
    expected[torch.arange(16), torch.arange(16), 1, 1] += 1  # the short residual
    torch.testing.assert_close(kernel, expected.detach(), rtol=1e-4, atol=1e-5)


def test_integer_positions_of_dcls_give_single_taps() -> None:
    network = nets.SpacedConv(3, size=5, taps=1)
    with torch.no_grad():
        network.place.copy_(torch.tensor([[0, 1, -2], [0, -1, 2]], dtype=torch.float32)[:, :, None, None])
    after = Collapse().run(load(network, (1, 3, 9, 9)), Context())
    (kernel,) = after.weights().values()
    for channel, (row, column) in enumerate([(2, 2), (3, 1), (0, 4)]):
        assert kernel[channel].count_nonzero() == 1
        torch.testing.assert_close(kernel[channel, 0, row, column], network.weight[channel, 0, 0].detach())


class Branched(nn.Module):
    """Two maps of one input, added: `body` and `other` are given."""

    def __init__(self, body: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.body, self.other = body, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.other(x))


class TestWhatMustStay:
    def unchanged(self, network: nn.Module, shape: tuple[int, ...], **options: bool) -> None:
        before = load(network, shape)
        assert Collapse(**options).run(before, Context()) is before

    def test_two_padded_convolutions(self) -> None:
        self.unchanged(nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)), (1, 3, 9, 9))

    def test_a_padded_convolution_behind_a_biased_pointwise_one(self) -> None:
        self.unchanged(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 3, 3, padding=1)), (1, 3, 9, 9))

    def test_a_separable_convolution(self) -> None:
        chain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1))
        self.unchanged(chain, (1, 16, 9, 9))

    def test_a_low_rank_pair(self) -> None:
        self.unchanged(nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32)), (1, 32))

    def test_a_convolution_with_its_batch_norm(self) -> None:
        self.unchanged(nets.ConvNorm(3, 8, 3), (1, 3, 9, 9))

    def test_a_border_dependent_average(self) -> None:
        pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.unchanged(Branched(nn.Conv2d(4, 4, 3, padding=1), pool), (1, 4, 9, 9))

    def test_a_value_that_something_else_reads(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.a(x)
                return self.b(y) + F.relu(y).mean((1, 2, 3), keepdim=True)

        self.unchanged(Shared(), (1, 4, 9, 9))

    @pytest.mark.parametrize("option", ["branches", "sequential", "scales"])
    def test_what_an_option_turns_off(self, option: str) -> None:
        network = {
            "branches": Branched(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)),
            "sequential": nn.Sequential(nn.Conv2d(4, 32, 1), nn.Conv2d(32, 4, 1)),
            "scales": nets.LinearChain(),
        }[option]
        shape = (1, 5, 32) if option == "scales" else (1, 4, 9, 9)
        if option == "scales":
            before = load(network, shape)
            after = Collapse(scales=False).run(before, Context())
            assert calls(after, "mul") == calls(before, "mul") == 1
        else:
            self.unchanged(network, shape, **{option: False})

    def test_a_layer_that_is_named(self) -> None:
        before = load(nets.RepVGGBlock(4, 4), (1, 4, 9, 9))
        assert Collapse(keep=("main.0",)).run(before, Context()) is before
        with pytest.raises(EdgecError, match="no layer is called 'mian'"):
            Collapse(keep=("mian",)).run(before, Context())

    def test_a_pruned_weight_is_named(self) -> None:
        before = load(Branched(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)), (1, 4, 9, 9))
        mask = torch.ones(4, 4, 3, 3, dtype=torch.bool)
        (path,) = (p for p, w in before.weights().items() if w.shape == mask.shape)
        pruned = before.replace(annotations={path: Sparsity("block", (4, 1), mask)})
        context = Context()
        assert Collapse().run(pruned, context) is pruned
        (skip,) = context.skipped
        assert "collapse before pruning" in skip.reason


class TestBranches:
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_kernels_of_any_alignment(self, stride: int, groups: int) -> None:
        body = nn.Conv2d(4, 8, 5, stride, 2, groups=groups)
        other = nn.Conv2d(4, 8, 3, stride, 2, dilation=2, groups=2)
        before = load(Branched(body, other), (1, 4, 13, 10))
        after = Collapse().run(before, Context())
        assert relative(before, after) <= TOLERANCE
        cheaper = calls(after, "conv2d") == 1
        assert cheaper or program_cost(after).macs == program_cost(before).macs

    def test_an_average_that_counts_its_padding(self) -> None:
        before = load(Branched(nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1)), (1, 4, 9, 7))
        after = Collapse().run(before, Context())
        assert relative(before, after) <= TOLERANCE
        assert calls(after, "avg_pool2d") == 0

    def test_same_padding_of_even_kernels(self) -> None:
        body = nn.Conv2d(4, 4, 4, padding="same")
        before = load(Branched(body, nn.Conv2d(4, 4, 2, padding="same")), (1, 4, 9, 8))
        after = Collapse().run(before, Context())
        assert relative(before, after) <= TOLERANCE

    def test_the_normalisation_of_an_image_joins_an_unpadded_stem_only(self) -> None:
        class Normalised(nn.Module):
            def __init__(self, padding: int) -> None:
                super().__init__()
                self.stem = nn.Conv2d(3, 8, 4, 4, padding)
                self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
                self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25])[:, None, None])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.relu(self.stem((x - self.mean) / self.std))

        before = load(Normalised(0), (1, 3, 16, 16))
        after = Collapse().run(before, Context())
        assert calls(after) == 2 and relative(before, after) <= TOLERANCE
        before = load(Normalised(2), (1, 3, 16, 16))
        after = Collapse().run(before, Context())
        assert calls(after, "sub") == 1 and relative(before, after) <= TOLERANCE

    def test_a_one_dimensional_network(self) -> None:
        body = nn.Sequential(nn.Conv1d(4, 32, 5, padding=2), nn.Conv1d(32, 4, 1))
        before = load(Branched(body, nn.Identity()), (1, 4, 21))
        after = Collapse().run(before, Context())
        assert calls(after, "conv1d") == 1 and relative(before, after) <= TOLERANCE

    def test_a_large_growth_of_the_range_is_reported(self) -> None:
        network = nets.RepVGGBlock(4, 4)
        nets.trained_like(network)
        assert network.skip is not None
        with torch.no_grad():
            network.skip.weight.fill_(40)
        before = load_model(network.eval(), input_shape=(1, 4, 9, 9))
        context = Context()
        after = Collapse().run(before, context)
        (record,) = after.annotations["collapse"]
        assert record.range_growth > 4
        assert any("scale per channel" in s.reason for s in context.skipped)
