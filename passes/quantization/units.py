"""Cut a graph into consecutive units that are reconstructed one after the other.

A unit is a run of nodes in graph order. With "block" it ends where a single tensor flows on, which is behind the sum of
a residual block, or behind a layer where nothing branches; activation functions belong to the layer before them,
pooling and data movement to the layer behind them. Where a graph does not narrow for a long stretch, and with "layer",
it ends behind each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from edgec.passes.quantization.operators import CLIPS, FUNCTIONS, Kind
from edgec.passes.quantization.ptq import Prepared
from edgec.program import is_call, layer_of

GRANULARITY = ("block", "layer")
# More layers than this are not reconstructed as one unit.
MOST_LAYERS = 8


@dataclass(frozen=True)
class Unit:
    """nodes: calls, in graph order. inputs: computed before and read here, stored tensors left out. outputs: computed
    here and read behind; of the last unit, the outputs of the graph.
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The layers' names: the part that they share, or the first and the last."""
        names = [layer_of(n) for n in self.layers]
        if len(names) < 2:
            return names[0] if names else ""
        parts = [name.split(".") for name in names]
        common = [a for a, *rest in zip(*parts, strict=False) if all(b == a for b in rest)]
        return ".".join(common) or f"{names[0]}..{names[-1]}"


def find_units(prepared: Prepared, granularity: str) -> list[Unit]:
    """The units of a graph; together they hold every call, each at least one layer if the graph has any."""
    nodes = [n for n in prepared.module.graph.nodes if n.op == "call_function"]
    layers = set(prepared.layers)
    narrow = _narrow(nodes)
    runs: list[list[fx.Node]] = [[]]
    for node in nodes:
        run = runs[-1]
        ends = bool(run) and (run[-1] in narrow or granularity == "layer")
        if ends and not is_call(node, *CLIPS, *FUNCTIONS) and any(n in layers for n in run):
            runs.append([])
        runs[-1].append(node)
    runs = [part for run in _with_layers(runs, layers) for part in _split(run, layers, prepared)]
    return [_unit(run, layers) for run in runs]


def _narrow(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes behind which only their own value is still needed."""
    position = {n: i for i, n in enumerate(nodes)}

    def last_read(node: fx.Node) -> int:
        return max((position.get(u, len(nodes)) for u in node.users), default=-1)

    graph = nodes[0].graph if nodes else fx.Graph()
    inputs_read = max((last_read(n) for n in graph.nodes if n.op == "placeholder"), default=-1)
    found: set[fx.Node] = set()
    waiting: set[fx.Node] = set()
    for index, node in enumerate(nodes):
        waiting = {n for n in waiting if last_read(n) > index}
        if not waiting and index >= inputs_read:
            found.add(node)
        if last_read(node) > index:
            waiting.add(node)
    return found


def _with_layers(runs: list[list[fx.Node]], layers: set[fx.Node]) -> list[list[fx.Node]]:
    """Runs without a layer joined to the one behind them; the last such to the one before."""
    joined: list[list[fx.Node]] = []
    waiting: list[fx.Node] = []
    for run in runs:
        waiting += run
        if any(n in layers for n in run):
            joined.append(waiting)
            waiting = []
    if waiting:
        joined = [*joined[:-1], joined[-1] + waiting] if joined else [waiting]
    return joined


def _split(run: list[fx.Node], layers: set[fx.Node], prepared: Prepared) -> list[list[fx.Node]]:
    """A run with too many layers as several of one layer each."""
    if sum(n in layers for n in run) <= MOST_LAYERS:
        return [run]
    parts: list[list[fx.Node]] = [[]]
    for node in run:
        behind = is_call(node, *CLIPS, *FUNCTIONS) or prepared.annotation.kinds.get(node) is Kind.PAIR
        if any(n in layers for n in parts[-1]) and not behind:
            parts.append([])
        parts[-1].append(node)
    return _with_layers(parts, layers)


def _unit(run: list[fx.Node], layers: set[fx.Node]) -> Unit:
    inside = set(run)
    inputs: dict[fx.Node, None] = {}
    for node in run:
        for source in node.all_input_nodes:
            if source not in inside and source.op != "get_attr":
                inputs[source] = None
    outputs = [n for n in run if any(u not in inside for u in n.users)]
    return Unit(tuple(run), tuple(n for n in run if n in layers), tuple(inputs), tuple(outputs))
