"""The list of models: name, family, how to make it and its inputs; random weights that no fold or scale leaves alone.

@model("super-resolution", (1, 1, 24, 24), int8=True)
class Espcn(nn.Module): ...

made, inputs = build("espcn")
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgec.errors import EdgecError

# Modules of this package that register models when they are imported.
HAND = ("dense", "detection", "classify", "audio", "recurrent", "sequence", "graphs", "sampling", "loops")
# Likewise, with the package that the models come from.
LIBRARIES = {"timm_nets": "timm", "torchvision_nets": "torchvision", "hf": "transformers"}
SEED = 0

# Draws one input; a plain shape stands for normal floats.
Draw = Callable[[torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Entry:
    """One model. `make` is called with torch's generator seeded; int8: also run quantised; source: file it is made in.

    small: compiles within two seconds, for the tests.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: tuple[Draw, ...]
    int8: bool
    small: bool
    source: str

    @property
    def library(self) -> str:
        """The package that it comes from; empty for one written here."""
        return LIBRARIES.get(self.source.rpartition(".")[2], "")

    def draw(self, seed: int = SEED) -> tuple[torch.Tensor, ...]:
        """One set of inputs, with the batch that the model is exported with."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(each(generator) for each in self.inputs)


_entries: dict[str, Entry] = {}


def normal(*shape: int, scale: float = 1.0) -> Draw:
    """Standard normal floats, times `scale`."""
    return lambda generator: scale * torch.randn(shape, generator=generator)


def uniform(*shape: int) -> Draw:
    """Floats in 0..1."""
    return lambda generator: torch.rand(shape, generator=generator)


def ids(below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Draw:
    """Whole numbers in 0..below - 1."""
    return lambda generator: torch.randint(0, below, shape, generator=generator).to(dtype)


def flags(*shape: int) -> Draw:
    """Truth values, the first along the last axis true, the others so in two of three cases."""

    def draw(generator: torch.Generator) -> torch.Tensor:
        drawn = torch.rand(shape, generator=generator) < 2 / 3
        drawn[..., 0] = True
        return drawn

    return draw


def add(
    name: str,
    family: str,
    make: Callable[[], nn.Module],
    *inputs: tuple[int, ...] | Draw,
    int8: bool = False,
    small: bool = False,
) -> None:
    """Register a model. Raises AssertionError for a name that is taken."""
    assert name not in _entries, name
    draws = tuple(each if callable(each) else normal(*each) for each in inputs)
    inner = make.func if isinstance(make, functools.partial) else make
    _entries[name] = Entry(name, family, make, draws, int8, small, inner.__module__)


def model(
    family: str, *inputs: tuple[int, ...] | Draw, name: str | None = None, int8: bool = False, small: bool = False
) -> Callable[[Any], Any]:
    """Register a class under its name in snake case."""

    def register(made: Any) -> Any:
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", made.__name__).lower()
        add(name or snake, family, made, *inputs, int8=int8, small=small)
        return made

    return register


@functools.cache
def entries(libraries: bool = True) -> Mapping[str, Entry]:
    """All models by name; without `libraries` those that need nothing but torch."""
    for each in (*HAND, *(LIBRARIES if libraries else ())):
        importlib.import_module(f"benchmarks.zoo.{each}")
    return dict(_entries)


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """(a model in evaluation mode with weights from SEED, its inputs). Raises EdgecError for names not in the zoo."""
    entry = _entries.get(name) or entries().get(name)
    if entry is None:
        raise EdgecError("is not in the zoo", where=name, hint="list the names with --list")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        made = entry.make().eval()
        randomise(made)
    return made, entry.draw()


def randomise(network: nn.Module) -> None:
    """Give statistics of norms, and weights that were all the same, values of trained-like spread.

    A batch norm with mean 0, variance 1 and factor 1 can be forgotten without a trace, and so can a layer scale of
    1e-6: neither would show in the results. Single numbers stay what they are, as they are often temperatures.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
        for weight in network.parameters():
            if weight.numel() < 2 or not weight.is_floating_point():
                continue
            first = float(weight.flatten()[0])
            if not bool((weight == first).all()):
                continue
            if first == 0:
                weight.normal_(0.0, 0.05, generator=generator)
            else:
                scale = first if abs(first) >= 0.5 else 0.1
                weight.uniform_(0.5, 1.5, generator=generator).mul_(scale)
