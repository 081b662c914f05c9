"""How much a model suffers from masks: KL to the dense model on calibration samples, after batch norm recalibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.program import Program, is_call
from edgec.training import distillation_loss

aten = torch.ops.aten

SAMPLES = 512
BATCH = 128
# Rates of the scan: enough to see where a layer breaks.
RATES = (0.25, 0.5, 0.75, 0.9)


class Judge:
    """`judge(masks)` is the mean KL(dense || masked) of the outputs (for what is no classifier, the squared error
    relative to the energy of the dense output), masks being bool tensors by weight path.

    Batch norms get the statistics of the masked model first, from the same samples. Labels are not used.
    """

    def __init__(self, program: Program, data: Dataset, samples: int = SAMPLES, seed: int = 0) -> None:
        """Raises EdgecError when the samples do not fill a batch of a fixed size."""
        self._evaluating = program.edit()
        self._weights = {str(n.target): _tensor(self._evaluating, n) for n in _reads(self._evaluating)}
        self._dense = {path: w.clone() for path, w in self._weights.items()}
        size = BATCH if program.dynamic_batch else program.inputs[0].shape[0]
        drawn = data.limit(samples, seed)
        self._inputs = [x for x, _ in drawn.batches(size) if program.dynamic_batch or len(x[0]) == size]
        # the statistics of a last batch of few samples would count as much as those of a full one
        full = [x for x in self._inputs if len(x[0]) == size]
        self._inputs = full or self._inputs
        if not self._inputs:
            raise EdgecError(f"{len(drawn)} samples do not fill the model's batch of {size}", where=data.name)
        self._norms = [n for n in self._evaluating.graph.nodes if is_call(n, aten.batch_norm.default)]
        self._statistics = sorted({str(a.target) for n in self._norms for a in n.args[3:5] if isinstance(a, fx.Node)})
        self._training = self._in_training()
        self._wanted = [_outputs(self._evaluating, x) for x in self._inputs]

    def __call__(self, masks: Mapping[str, torch.Tensor]) -> float:
        with torch.no_grad():
            for path, weight in self._weights.items():
                weight.copy_(self._dense[path] * masks[path] if path in masks else self._dense[path])
            if self._norms:
                self._recalibrate()
            total = 0.0
            for inputs, wanted in zip(self._inputs, self._wanted, strict=True):
                loss = distillation_loss(_outputs(self._evaluating, inputs), wanted, alpha=1.0, temperature=1.0)
                total += float(loss) * len(inputs[0])
        return total / sum(len(x[0]) for x in self._inputs)

    def _recalibrate(self) -> None:
        """Statistics of the masked model: the mean over all batches of those of a batch."""
        sums = {path: torch.zeros_like(self._weights[path]) for path in self._statistics}
        for inputs in self._inputs:
            _outputs(self._training, inputs)
            for path in self._statistics:
                sums[path] += self._weights[path]
        for path, total in sums.items():
            self._weights[path].copy_(total / len(self._inputs))

    def _in_training(self) -> fx.GraphModule:
        """The same graph on the same weights, whose batch norms replace their statistics by those of the batch."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result: Any = graph.graph_copy(self._evaluating.graph, copies)
        graph.output(result)
        for node in self._norms:
            args = list(node.args)
            args[5], args[6] = True, 1.0
            copies[node].args = tuple(copies[a] if isinstance(a, fx.Node) else a for a in args)
        return fx.GraphModule(self._evaluating, graph)


def scan(
    judge: Judge,
    layers: Sequence[str],
    mask_of: Callable[[str, float], Mapping[str, torch.Tensor]],
    rates: Sequence[float] = RATES,
) -> dict[str, list[float]]:
    """Loss of the model with one layer masked at a time: by layer, one value for each of `rates`.

    mask_of(layer, rate): the masks, by weight path, that prune this layer alone. A rate of 0 costs nothing.
    """
    return {layer: [judge(mask_of(layer, rate)) if rate > 0 else 0.0 for rate in rates] for layer in layers}


def _reads(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "get_attr"]


def _tensor(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _outputs(module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        out = module(*inputs)
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)
