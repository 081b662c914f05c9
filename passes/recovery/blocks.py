"""A graph as consecutive blocks with few tensors between them, each of which can be run and trained alone.

    for block in find_blocks(program.module):
        block.run(module, values)            # values: {node name: tensor} of block.inputs; adds block.outputs

Nodes are named, so that a block of one graph is also one of its copies with other weights.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgec.program import is_call, layer_of, output_nodes

aten = torch.ops.aten

LAYERS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.linear.default,
)
# What belongs to the layer before it.
FOLLOWERS = (
    aten.batch_norm.default,
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.silu.default,
    aten.gelu.default,
    aten.sigmoid.default,
    aten.leaky_relu.default,
    aten.prelu.default,
)


@dataclass(frozen=True)
class Block:
    """nodes: calls in graph order. inputs: values made before that it reads. outputs: values that it makes and others
    read, or that the graph returns. weights: attribute paths that it reads. layers: user's names of its layers.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    layers: tuple[str, ...]

    def run(self, module: fx.GraphModule, values: MutableMapping[str, Any]) -> None:
        """Compute the block with the weights of `module`; `values` must hold its inputs and gets all that it computes.

        Gradients flow to the weights and the inputs that require them.
        """
        inside, known = set(self.nodes), values

        def fetch(node: fx.Node) -> Any:
            return _attribute(module, node) if node.op == "get_attr" else known[node.name]

        for node in module.graph.nodes:
            if node.name in inside:
                args, kwargs = fx.map_arg((node.args, node.kwargs), fetch)
                values[node.name] = node.target(*args, **kwargs)


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """The stored tensor itself, with its gradient: `get_weight` detaches."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def find_blocks(module: fx.GraphModule, least: int = 2, most: int = 8) -> list[Block]:
    """The blocks of a graph; together they hold every call.

    A block ends where only one tensor flows on: behind the sum of a residual block, or between layers where nothing
    branches. Blocks of a chain hold `least` layers; norms and activation functions belong to the layer before them.
    Where more than `most` layers have no such place (dense connections, U-Nets), the block is cut behind a layer and
    several tensors pass.
    """
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    ends = _cuts(nodes, module)
    runs: list[list[fx.Node]] = [[]]
    for node in nodes:
        run = runs[-1]
        layers = sum(_is_layer(n) for n in run)
        if run and not is_call(node, *FOLLOWERS):
            branched = layers and any(n not in ends for n in run if _is_layer(n))
            if (run[-1] in ends and (layers >= least or branched)) or (layers >= most and _is_layer(node)):
                runs.append([])
        runs[-1].append(node)
    if len(runs) > 1 and not any(_is_layer(n) for n in runs[-1]):
        runs[-2:] = [runs[-2] + runs[-1]]
    returned = set(output_nodes(module))
    return [_block(run, returned) for run in runs if run]


def _is_layer(node: fx.Node) -> bool:
    return is_call(node, *LAYERS)


def _cuts(nodes: list[fx.Node], module: fx.GraphModule) -> set[fx.Node]:
    """The nodes behind which only their own value is still needed."""
    place = {n: i for i, n in enumerate(nodes)}

    def last_reader(node: fx.Node) -> int:
        return max((place.get(u, len(nodes)) for u in node.users), default=-1)

    inputs = max((last_reader(n) for n in module.graph.nodes if n.op == "placeholder"), default=-1)
    found: set[fx.Node] = set()
    reach = inputs
    for index, node in enumerate(nodes):
        if reach <= index:
            found.add(node)
        reach = max(reach, last_reader(node))
    return found


def _block(run: list[fx.Node], returned: set[fx.Node]) -> Block:
    inside = set(run)
    sources = dict.fromkeys(s for n in run for s in n.all_input_nodes if s not in inside)
    outputs = [n for n in run if n in returned or any(u not in inside for u in n.users)]
    layers = list(dict.fromkeys(layer_of(n) for n in run if _is_layer(n)))
    return Block(
        _name(layers) or layer_of(run[0]),
        tuple(n.name for n in run),
        tuple(s.name for s in sources if s.op != "get_attr"),
        tuple(n.name for n in outputs),
        tuple(dict.fromkeys(str(s.target) for s in sources if s.op == "get_attr")),
        tuple(layers),
    )


def _name(layers: list[str]) -> str:
    """What the layers' names share, or the first and the last."""
    if len(layers) < 2:
        return layers[0] if layers else ""
    common = []
    for parts in zip(*(name.split(".") for name in layers), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or f"{layers[0]}..{layers[-1]}"
