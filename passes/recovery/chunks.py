"""A graph run node by node on several chunks of samples at once, so that a layer can be changed before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.program import Program, get_weight

Inputs = tuple[torch.Tensor, ...]


class Chunks:
    """Values of a graph's nodes for a list of inputs, computed in graph order without gradients.

    `step(node)` computes one node for all chunks; `values` holds what is still read later, so that memory is that of
    the widest cut of the graph.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Inputs]) -> None:
        self.module, self.count = module, len(inputs)
        self.values: dict[fx.Node, list[Any]] = {}
        self._remaining = {n: len(n.users) for n in module.graph.nodes}
        self._inputs = list(inputs)
        self._places = {n: i for i, n in enumerate(n for n in module.graph.nodes if n.op == "placeholder")}

    def step(self, node: fx.Node) -> None:
        """Compute a node; the values that nothing reads any more are dropped."""
        if node.op == "placeholder":
            self.values[node] = [inputs[self._places[node]] for inputs in self._inputs]
        elif node.op == "get_attr":
            self.values[node] = [get_weight(self.module, node)] * self.count
        elif node.op == "call_function":
            with torch.no_grad():
                self.values[node] = [self._call(node, i) for i in range(self.count)]
        for source in node.all_input_nodes:
            self._remaining[source] -= 1
            if self._remaining[source] == 0:
                self.values.pop(source, None)

    def _call(self, node: fx.Node, index: int) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n][index])
        return node.target(*args, **kwargs)  # type: ignore[operator]


def chunked(program: Program, data: Dataset, samples: int, batch: int, seed: int) -> list[list[Inputs]]:
    """Batches of at least `batch` samples, each as the calls that the program needs for it, of `samples` in all.

    One call where the batch of the program is dynamic, else as many as give `batch` samples. What does not fill a batch
    is left out, unless there is no full one. Raises EdgecError when the samples do not fill a fixed batch.
    """
    drawn = data.limit(samples, seed)
    size = min(batch, len(drawn)) if program.dynamic_batch else int(program.example_inputs[0].shape[0])
    calls = [x for x, _ in drawn.batches(size) if len(x[0]) == size]
    if not calls:
        raise EdgecError(f"{len(drawn)} samples do not fill the model's batch of {size}", where=data.name)
    each = min(-(-batch // size) if not program.dynamic_batch else 1, len(calls))
    return [calls[i : i + each] for i in range(0, len(calls) - each + 1, each)]
