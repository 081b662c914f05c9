"""Stages computed by tiles give the same codes as layer by layer, whatever their geometry."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import fx, nn

from edgec import regions as regions
from edgec.lowering import tiles
from edgec.lowering.tiles import NotTileable, Part, Stage, patches, strips
from edgec.program import propagate, shape_of

pytestmark = pytest.mark.pure
aten = torch.ops.aten
edgec = torch.ops.edgec

Tiling = Callable[[Stage], list[Part]]


class Builder:
    """A graph in channels-last regions with random weights, written layer by layer."""

    def __init__(self, seed: int, shape: tuple[int, ...], channels_first: bool = False) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.root, self.graph, self.count = nn.Module(), fx.Graph(), 0
        self.x = self.graph.placeholder("x")
        self.example = torch.randint(-128, 128, shape, generator=self.generator, dtype=torch.int8)
        self.x.meta["val"] = self.example
        self.last = self.call(aten.permute.default, self.x, [0, 2, 3, 1]) if channels_first else self.x

    def call(self, target, *args) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda a: a.meta["val"]))
        node.meta["edgec_layer"] = f"layer{self.count}"
        self.last = node
        return node

    def weight(self, tensor: torch.Tensor) -> fx.Node:
        self.count += 1
        self.root.register_buffer(f"w{self.count}", tensor)
        node = self.graph.get_attr(f"w{self.count}")
        node.meta["val"] = tensor
        return node

    def ints(self, low: int, high: int, *shape: int, dtype=torch.int32) -> fx.Node:
        return self.weight(torch.randint(low, high, shape, generator=self.generator, dtype=dtype))

    def conv(self, x: fx.Node, out: int, kernel, stride, padding, dilation, groups: int = 1, residual=None) -> fx.Node:
        c = shape_of(x)[3]
        w = self.ints(-128, 128, out, c // groups, *kernel, dtype=torch.int8)
        reach = 64 * 60 * c // groups * kernel[0] * kernel[1]
        m, shift = self.ints(2**30 // reach, 2**31 // reach, out), self.weight(torch.full((out,), 32 - 9))
        bias = self.ints(-3000, 3000, out)
        zeros = (self.random.randint(-20, 20), self.random.randint(-20, 20), -128, 127)
        rest = (list(stride), list(padding), list(dilation), groups, *zeros)
        if residual is None:
            return self.call(edgec.qconv2d.default, x, w, bias, m, shift, *rest, "NHWC")
        add = [700, 900, 10, 3, -4, 5, -128, 127]
        return self.call(edgec.qconv2d_add.default, x, w, bias, m, shift, residual, *rest, add)

    def module(self) -> fx.GraphModule:
        self.graph.output((self.last,))
        module = fx.GraphModule(self.root, self.graph)
        propagate(module, (self.example,))
        return module


def random_stack(seed: int) -> tuple[fx.GraphModule, torch.Tensor]:
    """Two to six layers of any kernel, stride, padding and dilation, with residuals, pools and element-wise steps."""
    r = random.Random(seed)
    first = r.random() < 0.3
    size = (r.randint(7, 24), r.randint(7, 24))
    b = Builder(seed, (1, 3, *size) if first else (1, *size, 3), first)
    for _ in range(r.randint(2, 6)):
        x = b.last
        _, h, w, c = shape_of(x)
        kind = r.choice(["conv", "conv", "depthwise", "inverted", "max", "average", "add", "cat", "rescale"])
        kernel, stride = (r.randint(1, 3), r.randint(1, 3)), (r.randint(1, 2), r.randint(1, 2))
        dilation = (r.randint(1, 2), r.randint(1, 2))
        reach = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        # At most what keeps every window inside the map in part.
        padding = [r.randint(0, reach[i // 2]) for i in range(4)]
        if h + sum(padding[:2]) <= reach[0] or w + sum(padding[2:]) <= reach[1] or min(h, w) < 4:
            continue
        if kind == "conv":
            b.conv(x, r.randint(1, 4), kernel, stride, padding, dilation)
        elif kind == "depthwise":
            b.conv(x, c, kernel, stride, padding, dilation, groups=c)
        elif kind == "inverted":
            wide = b.conv(x, 2 * c, (1, 1), (1, 1), [0] * 4, (1, 1))
            deep = b.conv(wide, 2 * c, (3, 3), (1, 1), [1] * 4, (1, 1), groups=2 * c)
            b.conv(deep, c, (1, 1), (1, 1), [0] * 4, (1, 1), residual=x)
        elif kind == "max":
            b.call(edgec.qmax_pool2d.default, x, list(kernel), list(stride), padding, list(dilation), False, "NHWC")
        elif kind == "average":
            args = (list(kernel), list(stride), padding, 2**29 // (kernel[0] * kernel[1]), 29, 3, -5, -128, 127)
            b.call(edgec.qavg_pool2d.default, x, *args, "NHWC")
        elif kind == "add":
            other = b.conv(x, c, (3, 3), (1, 1), [1] * 4, (1, 1))
            b.call(edgec.qadd.default, other, x, 600, 500, 10, 1, 2, 3, -128, 127)
        elif kind == "cat":
            other = b.conv(x, 2, (3, 1), (1, 1), [2, 0, 0, 0], (1, 1))
            b.call(aten.cat.default, [x, other], 3)
        else:
            b.call(edgec.qrescale.default, x, 2**29, 29, 3, 4, -100, 100)
    if b.last.op == "placeholder" or len(b.graph.nodes) == 2:
        b.conv(b.last, 4, (3, 3), (1, 1), [1] * 4, (1, 1))
    return b.module(), b.example


def stage_of(module: fx.GraphModule) -> Stage:
    return Stage(module, [n for n in module.graph.nodes if n.op == "call_function"])


def tiled(module: fx.GraphModule, tiling: Tiling) -> tuple[fx.GraphModule, Stage, list[Part]]:
    copied = copy.deepcopy(module)
    for old, new in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        new.meta.update(old.meta)
    stage = stage_of(copied)
    try:
        parts = tiling(stage)
    except NotTileable as reason:
        # Of small tiles at the border, which need nothing of the map.
        assert "lies in the padding" in str(reason)
        reject()
    cost = stage.whole_macs(), tiles.macs(stage, parts)
    tiles.rewrite(stage, parts)
    copied.graph.lint()
    copied.recompile()
    copied.meta["macs"] = cost
    return copied, stage, parts


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_patches_equal_the_whole(seed: int, height: int, width: int) -> None:
    module, x = random_stack(seed)
    want = module(x)[0]
    got, _, parts = tiled(module, lambda stage: patches(stage, height, width))
    assert torch.equal(got(x)[0], want)
    placed = torch.zeros(want.shape[1:3], dtype=torch.int32)
    for part in parts:
        if part.kind == "place":
            assert part.window is not None
            (top, bottom), (left, right) = part.window
            placed[top:bottom, left:right] += 1
    assert bool((placed == 1).all()) or not placed.any()


@given(st.integers(0, 2**32), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_strips_equal_the_whole_and_compute_nothing_twice(seed: int, height: int) -> None:
    module, x = random_stack(seed)
    want = module(x)[0]
    got, _, parts = tiled(module, lambda stage: strips(stage, height))
    assert torch.equal(got(x)[0], want)
    whole, now = got.meta["macs"]
    assert now <= whole
    rows: dict[fx.Node, list[int]] = {}
    for part in parts:
        if part.kind == "compute":
            rows.setdefault(part.node, []).extend(range(*part.rows))
    assert all(len(set(r)) == len(r) for r in rows.values())
