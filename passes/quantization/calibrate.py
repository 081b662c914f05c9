"""One run of the float graph over the calibration samples, feeding everything that wants statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import fx

from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.program import Program

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
