"""Fused regions and the channels-last layout: same numbers, the expected operators, as few permutations as possible.

`Stages` compares the graph with PyTorch after each step (relative error below 1e-6), and finds dead nodes and wrong
recorded shapes.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.lowering.lower import lower_torch
from edgec.lowering.regions import TO_NCHW, TO_NHWC
from edgec.program import Program, get_weight, is_call, shape_of
from tests import zoo
from tests.lowering.helpers import Stages, calls, errors, load, operators, samples
from tests.lowering.networks import CASES, MAP, Net, chain, conv

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("name", CASES)
def test_operators_after_the_layout_step(name: str) -> None:
    make, shape, expected = CASES[name]
    stages = Stages(load(make(), shape))
    assert operators(stages.layout) == Counter(expected)
    # Spatial regions work on NHWC: the last axis is the number of channels that the weight says.
    for node in calls(stages.layout, "conv2d_nhwc"):
        weight = shape_of(node.args[1])  # type: ignore[arg-type]
        groups = node.args[7]
        assert shape_of(node.args[0])[3] == weight[1] * groups  # type: ignore[arg-type,operator]
        assert shape_of(node)[3] == weight[0]


@pytest.mark.parametrize("name", zoo.names())
def test_zoo(name: str) -> None:
    stages = Stages(zoo.program(name))
    before, after = operators(stages.regions), operators(stages.layout)
    assert after["permute"] <= before["permute"]
    for operator in ("conv2d_nhwc", "linear_act", "max_pool2d_nhwc", "avg_pool2d_nhwc"):
        assert after[operator] == before[operator]
    assert not {"conv2d", "linear"} & after.keys()


def test_only_the_ends_of_a_network_are_permuted() -> None:
    stages = Stages(load(chain(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4)), MAP))
    first, last = calls(stages.layout, "permute")
    assert first.args[0].op == "placeholder" and first.args[1] == TO_NHWC  # type: ignore[union-attr]
    assert last.args[1] == TO_NCHW and [u.op for u in last.users] == ["output"]


def test_two_branches_share_one_permutation() -> None:
    program = load(Net(lambda m, x: m.a(x) + m.b(x) * m.c(x), a=conv(3, 4), b=conv(3, 4, 1), c=conv(3, 4, 5)), MAP)
    stages = Stages(program)
    assert [n.args[0].op for n in calls(stages.layout, "permute")] == ["placeholder", "call_function"]  # type: ignore[union-attr]
    assert operators(stages.layout) == {"conv2d_nhwc": 3, "mul": 1, "permute": 2}


def test_constants_are_stored_channels_last() -> None:
    """Constants of any rank, also behind unsqueeze and view, are permuted once at compile time."""

    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x) * m.a + m.b.unsqueeze(-1)
        return (y - m.c).maximum(m.d.reshape(1, 4, 1, 1))

    shapes = {"a": (4, 1, 1), "b": (4, 9), "c": (7,), "d": (4,)}
    program = load(Net(forward, conv=conv(3, 4), **{k: nn.Parameter(torch.ones(s)) for k, s in shapes.items()}), MAP)
    module = Stages(program).layout
    assert operators(module) == {"conv2d_nhwc": 1, "mul": 1, "add": 1, "sub": 1, "maximum": 1, "permute": 2}
    stored = {n.target: tuple(get_weight(module, n).shape) for n in module.graph.nodes if n.op == "get_attr"}
    del stored["conv.weight"], stored["conv.bias"]
    assert stored == {
        "a_nhwc": (1, 1, 1, 4),
        "b_nhwc": (1, 9, 1, 4),
        "c_nhwc": (1, 1, 7, 1),
        "d_nhwc": (1, 1, 1, 4),
    }


def test_constant_on_the_left() -> None:
    """Operand order survives where it matters."""
    net = Net(lambda m, x: (m.k - m.conv(x)) / 2.0, conv=conv(3, 4), k=nn.Parameter(torch.ones(4, 1, 1)))
    assert operators(Stages(load(net, MAP)).layout) == {"conv2d_nhwc": 1, "sub": 1, "div": 1, "permute": 2}


@pytest.mark.parametrize(
    ("dims", "keep", "permutes"),
    [((2, 3), True, 2), ((2, 3), False, 1), ((1,), True, 2), ((-1,), True, 2), ((1,), False, 2)],
)
def test_means(dims: tuple[int, ...], keep: bool, permutes: int) -> None:
    """The mean over channels without keepdim keeps the layout that the model asked for."""
    program = load(Net(lambda m, x: m.conv(x).mean(dims, keepdim=keep), conv=conv(3, 4)), MAP)
    assert operators(Stages(program).layout) == {"conv2d_nhwc": 1, "mean": 1, "permute": permutes}


@pytest.mark.parametrize("widths", [(1, 2), (0, 0, 2, 1), (0, 0, 0, 0, 1, 2), (1, 0, -1, 2, 3, 0)])
def test_pads_of_any_axis(widths: tuple[int, ...]) -> None:
    program = load(Net(lambda m, x: F.pad(m.conv(x), widths, value=1.5) * 2.0, conv=conv(3, 4)), MAP)
    assert operators(Stages(program).layout) == {"conv2d_nhwc": 1, "constant_pad_nd": 1, "mul": 1, "permute": 2}


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
def test_slices_of_any_axis(axis: int) -> None:
    index = [slice(None)] * 4
    index[axis] = slice(0, None, 2) if axis == 0 else slice(1, 4, 2)
    program = load(Net(lambda m, x: m.conv(x)[tuple(index)] + 1.0, conv=conv(3, 4)), MAP)
    assert operators(Stages(program).layout)["permute"] == 2


@pytest.mark.parametrize("axis", [1, 2, 3, -2])
def test_concatenations_of_any_axis(axis: int) -> None:
    program = load(Net(lambda m, x: torch.cat((m.conv(x), m.conv(x) * 2.0), axis) * 0.5, conv=conv(3, 4)), MAP)
    assert operators(Stages(program).layout)["permute"] == 2


def test_the_models_own_permutations_cancel() -> None:
    """ConvNeXt: NHWC for the layer norm and the linear layers, back for the convolution."""

    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return x + m.fc(m.norm(m.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    net = Net(forward, stem=conv(3, 8), depthwise=conv(8, 8, groups=8), norm=nn.LayerNorm(8), fc=nn.Linear(8, 8))
    stages = Stages(load(net, MAP))
    counts = operators(stages.layout)
    assert counts["permute"] == 2
    assert not is_call(calls(stages.layout, "layer_norm")[0].args[0], torch.ops.aten.permute.default)


def test_other_permutations_are_kept() -> None:
    program = load(Net(lambda m, x: m.conv(x).permute(0, 1, 3, 2) + 1.0, conv=conv(3, 4)), MAP)
    assert [list(n.args[1]) for n in calls(Stages(program).layout, "permute")] == [TO_NHWC, TO_NCHW, [0, 1, 3, 2]]


def test_flatten_of_a_map_keeps_the_models_order() -> None:
    """A linear layer behind a flattened map has its weight in the order of NCHW: one permutation is right there."""
    stages = Stages(load(CASES["flatten_map"][0](), MAP))
    (flat,) = calls(stages.layout, "flatten")
    assert is_call(flat.args[0], torch.ops.aten.permute.default) and list(flat.args[0].args[1]) == TO_NCHW  # type: ignore[union-attr]


def test_weights_of_the_program_are_left_alone() -> None:
    program = zoo.program("squeeze_excite")
    before = program.fingerprint()
    Stages(program)
    assert program.fingerprint() == before


def test_layer_names_survive() -> None:
    program = load(
        Net(lambda m, x: m.up(m.down(F.relu(m.body(x)) * 0.5)), body=conv(3, 4), down=nn.AvgPool2d(3), up=conv(4, 2)),
        MAP,
    )
    stages = Stages(program)
    named = {n.target._opname: n.meta["edgec_layer"] for n in stages.layout.graph.nodes if n.op == "call_function"}
    assert named["avg_pool2d_nhwc"] == "down"
    assert [n.meta["edgec_layer"] for n in calls(stages.layout, "conv2d_nhwc")] == ["body", "up"]


def test_lower_torch_makes_a_static_program_with_the_same_results() -> None:
    program = zoo.program("residual")
    shown: list[str] = []
    staged = lower_torch(program, lambda step, text: shown.append(step))
    assert shown == ["regions", "layout"]
    assert isinstance(staged, Program) and not staged.dynamic_batch
    inputs = samples(program)
    assert errors(staged(*inputs), program(*inputs)) < 1e-6
