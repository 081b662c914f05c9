"""Dependency groups: what is tied together, reordering, removal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passes.pruning.groups import ChannelGroup, Channels, channel_groups, permute, remove
from edgec.program import Program, get_weight
from tests import zoo
from tests.passes.pruning import structures

pytestmark = pytest.mark.pure

# (units, channels of a unit) of the groups that may be pruned, by the first layer that makes them
FREE = {
    "plain": {"body.0.0": (16, 1), "body.2.0": (8, 1)},
    "residual": {"body.stem.0": (16, 1), "body.a.0": (8, 1)},
    "padded_shortcut": {"body.stem.0": (8, 1), "body.a.0": (16, 1), "body.b.0": (8, 1)},
    "dense": {"body.stem.0": (8, 1), "body.a.0": (4, 1), "body.b.0": (4, 1), "body.c.0": (16, 1)},
    "inverted": {"body.stem.0": (8, 1), "body.expand.0": (24, 1), "body.reduce": (8, 1)},
    "ghost": {"body.stem.0": (8, 1), "body.out.0": (8, 1)},
    "shuffle": {"body.stem.0": (8, 1), "body.out.0": (8, 1)},
    "unet": {"body.down.0": (8, 1), "body.deep.0": (16, 1), "body.up": (8, 1), "body.out.0": (8, 1)},
    "pixel_shuffle": {"body.stem.0": (8, 1), "body.up": (8, 4), "body.out.0": (8, 1)},
    "flatten": {"conv.0": (8, 1), "fc1": (16, 1)},
    "two_groups": {"body.0.0": (8, 2), "body.1.0": (8, 2), "body.2.0": (8, 1)},
    "many_groups": {"body.0.0": (8, 2), "body.2.0": (8, 1)},
    "norm_groups": {"body.0": (4, 4), "body.3": (8, 1)},
    "attention": {"patch": (16, 1), "qkv.0": (4, 12), "fc1": (32, 1)},
    "attention_separate": {"patch": (16, 1), "qkv.0": (4, 4), "fc1": (32, 1)},
    "mixer": {"patch": (16, 1), "fc1": (32, 1)},
}


def free(program: Program) -> list[ChannelGroup]:
    return [g for g in channel_groups(program) if g.locked is None]


def relative(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", structures.MAKE)
class TestStructures:
    def test_the_groups_are_those_of_the_structure(self, name: str) -> None:
        assert {g.name: (g.channels, g.unit) for g in free(structures.program(name))} == FREE[name]

    def test_the_classifier_is_locked_with_its_reason(self, name: str) -> None:
        locked = {g.layers[0]: g.locked or "" for g in channel_groups(structures.program(name)) if g.locked}
        assert any("output of the model" in reason for reason in locked.values())

    def test_reordering_leaves_the_function(self, name: str) -> None:
        program, rng = structures.program(name), np.random.default_rng(0)
        module, x = program.edit(), structures.example()
        for group in free(program):
            permute(module, group, rng.permutation(group.channels))
        changed = program.replace(module)
        assert relative(changed(x), program(x)) < 1e-5
        moved = [p for p, w in changed.weights().items() if not torch.equal(w, program.weights()[p])]
        assert len(moved) >= len(free(program))

    def test_removal_equals_zeros_where_the_channels_are_read(self, name: str) -> None:
        program, x = structures.program(name), structures.example()
        channels = Channels(program)
        groups = [g for g in channels.groups if g.locked is None and not _normalised(program, g)]
        assert groups
        removed, masked = program.edit(), program.edit()
        weights = {str(n.target): get_weight(masked, n) for n in masked.graph.nodes if n.op == "get_attr"}
        for group in groups:
            for member in group.members:
                if member.role == "in":
                    index = torch.from_numpy(member.index[1::2].ravel())
                    with torch.no_grad():
                        weights[member.weight].index_fill_(member.axis, index, 0.0)
        channels.remove(removed, {g: np.arange(0, g.channels, 2) for g in groups})
        small = program.replace(removed)
        assert sum(w.numel() for w in small.weights().values()) < sum(w.numel() for w in program.weights().values())
        assert relative(small(x), program.replace(masked)(x)) < 1e-5

    def test_any_subset_can_be_removed(self, name: str) -> None:
        program, rng = structures.program(name), np.random.default_rng(1)
        channels = Channels(program)
        for _ in range(3):
            module, keep = program.edit(), {}
            for group in channels.groups:
                if group.locked is None:
                    keep[group] = rng.permutation(group.channels)[: rng.integers(1, group.channels + 1)]
            channels.remove(module, keep)
            small = program.replace(module)
            assert all(bool(torch.isfinite(y).all()) for y in small(structures.example()))


def _normalised(program: Program, group: ChannelGroup) -> bool:
    """Read by a LayerNorm, whose statistics change with the channels."""
    norms = [n for n in program.graph.nodes if n.target is torch.ops.aten.layer_norm.default]
    weights = {str(a.target) for n in norms for a in n.all_input_nodes if a.op == "get_attr"}
    return any(m.weight in weights for m in group.members)


@pytest.mark.parametrize("name", zoo.names())
def test_reordering_leaves_the_function_of_the_zoo(name: str) -> None:
    program, rng = zoo.program(name), np.random.default_rng(0)
    module, x = program.edit(), zoo.example(name)
    for group in free(program):
        permute(module, group, rng.permutation(group.channels))
    assert relative(program.replace(module)(x), program(x)) < 1e-5


def test_heads_go_with_their_queries_keys_values_and_columns() -> None:
    program = structures.program("attention")
    (heads,) = [g for g in free(program) if g.name == "qkv.0"]
    found = {(m.weight, m.axis): m.index for m in heads.members}
    rows = np.arange(48).reshape(3, 4, 4)[:, 1].ravel()
    assert np.array_equal(found["qkv.0.weight", 0][1], rows)
    assert np.array_equal(found["qkv.0.bias", 0][1], rows)
    assert np.array_equal(found["proj.weight", 1][1], np.arange(4, 8))


def test_flattened_channels_own_their_columns() -> None:
    (group,) = [g for g in free(structures.program("flatten")) if g.name == "conv.0"]
    (columns,) = [m.index for m in group.members if m.weight == "fc1.weight"]
    assert np.array_equal(columns, np.arange(128).reshape(8, 16))


def test_one_group_can_be_removed_by_itself() -> None:
    program = structures.program("plain")
    module = program.edit()
    remove(module, free(program)[0], [0, 3, 5])
    assert program.replace(module).weights()["body.0.0.weight"].shape == (3, 3, 3, 3)


def _program(layer: nn.Module) -> Program:
    return load_model(nn.Sequential(nn.Conv2d(3, 8, 3), layer).eval(), input_shape=structures.IMAGE)


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sort(1).values.mean((1, 2, 3))


class Softmax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(1).square().sum((1, 2, 3))


class First(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0].mean((1, 2))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [(Sorted(), "operator sort of layer '1'"), (Softmax(), "softmax runs over the channels"), (First(), "picks")],
)
def test_what_cannot_be_pruned_says_why(layer: nn.Module, reason: str) -> None:
    program = _program(layer)
    (group,) = channel_groups(program)
    assert group.locked and reason in group.locked
    with pytest.raises(EdgecError, match="cannot be removed"):
        remove(program.edit(), group, [0])
    with pytest.raises(EdgecError, match="cannot be reordered"):
        permute(program.edit(), group, np.arange(8))


def test_wrong_orders_are_refused() -> None:
    program = structures.program("plain")
    group = free(program)[0]
    with pytest.raises(EdgecError, match="not a permutation"):
        permute(program.edit(), group, [0] * 16)
    with pytest.raises(EdgecError, match="no channel would be left"):
        remove(program.edit(), group, [])
