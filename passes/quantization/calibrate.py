"""One run of the float graph over the calibration samples, feeding everything that wants statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.origin import first_line
from edgec.program import Program
from edgec.training import is_classifier

BATCH = 32


class Watcher(Protocol):
    """Anything that sees a tensor batch by batch."""

    def update(self, values: torch.Tensor) -> None: ...


class ChannelMean:
    """Mean of a tensor over everything but one axis, in float64."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.total: torch.Tensor | None = None
        self.count = 0

    def update(self, values: torch.Tensor) -> None:
        rows = values.movedim(self.axis, 0).flatten(1).to(torch.float64)
        total = rows.sum(1)
        self.total = total if self.total is None else self.total + total
        self.count += rows.shape[1]

    @property
    def mean(self) -> torch.Tensor:
        """[channels]. Raises EdgecError when nothing was seen."""
        if self.total is None:
            raise EdgecError("no calibration sample was seen")
        return self.total / self.count


def batches(program: Program, dataset: Dataset, size: int = BATCH) -> Iterable[tuple[torch.Tensor, ...]]:
    """Inputs of the dataset in batches that the program accepts: of `size` samples where the batch is dynamic, else of
    the program's; an incomplete batch of a fixed size is left out.

    Raises EdgecError when there are fewer samples than one fixed batch.
    """
    size = size if program.dynamic_batch else program.example_inputs[0].shape[0]
    found = False
    for inputs, _ in dataset.batches(size):
        if program.dynamic_batch or inputs[0].shape[0] == size:
            found = True
            yield inputs
    if not found:
        raise EdgecError(
            f"{len(dataset)} calibration samples do not fill the model's batch of {size}", where=dataset.name
        )


class _Runner(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watched: dict[fx.Node, list[Watcher]]) -> None:
        super().__init__(module)
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for observer in self.watched.get(n, ()):
            observer.update(value)
        return value


class WeightedWatcher(Protocol):
    """Anything that sees a tensor and, in the same shape, how much its elements matter."""

    def update(self, values: torch.Tensor, weights: torch.Tensor) -> None: ...


class _GradientRunner(fx.Interpreter):
    """Keeps the values of watched nodes, from which gradients are taken."""

    def __init__(self, module: fx.GraphModule, watched: Iterable[fx.Node]) -> None:
        super().__init__(module)
        self.watched = set(watched)
        self.values: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.watched:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.values[n] = value
        return value


def calibrate_by_gradients(
    module: fx.GraphModule,
    inputs: Iterable[tuple[torch.Tensor, ...]],
    watched: Mapping[fx.Node, WeightedWatcher],
    seed: int,
) -> None:
    """Run `module` on every batch and update the watchers with values and squared gradients, element by element.

    In expectation the squared gradients are the diagonal of the second derivative that the divergence of the
    prediction from its present self has there (the divergence's own gradient is zero): for a classifier they are those
    of the log-likelihood of a class drawn from the prediction; else, for the squared error, those of a normal random
    sum of the outputs. Raises EdgecError for a graph with operators that have no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    runner = _GradientRunner(module, watched)
    for batch in inputs:
        with torch.enable_grad():
            results = runner.run(*batch)
            outputs = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
            losses = [_drawn(y, generator) for y in outputs if y.requires_grad]
            if not losses:
                raise _no_gradient("no output depends smoothly on what is quantised")
            nodes = list(runner.values)
            try:
                values = [runner.values[n] for n in nodes]
                found = torch.autograd.grad(torch.stack(losses).sum(), values, allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                raise _no_gradient(first_line(error)) from error
        for node, gradient in zip(nodes, found, strict=True):
            value = runner.values[node].detach()
            watched[node].update(value, torch.zeros_like(value) if gradient is None else gradient.square())
        runner.values.clear()


def _no_gradient(reason: str) -> EdgecError:
    return EdgecError(f"has an operator without gradient: {reason}", where="observer=hessian", hint="use observer=mse")


def _drawn(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random function of an output [B, ...] whose squared gradients have the wanted mean."""
    if is_classifier([y]):
        scores = torch.log_softmax(y.float(), -1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        return scores.gather(1, drawn).sum()
    return (y * torch.randn(y.shape, generator=generator)).sum()


def calibrate(
    module: fx.GraphModule,
    inputs: Iterable[tuple[torch.Tensor, ...]],
    watched: dict[fx.Node, list[Watcher]],
) -> None:
    """Run `module` on every batch of `inputs` and update the observers of each watched node with its values."""
    runner = _Runner(module, watched)
    with torch.no_grad():
        for batch in inputs:
            runner.run(*batch)
