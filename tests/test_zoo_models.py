"""Exotic models of the zoo, compiled for this machine, give what PyTorch gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.zoo import measure, registry
from edgec.bundle import build_bundle
from edgec.frontend import load_model
from edgec.lowering.lower import lower
from edgec.targets.device import load_device

MODELS = [name for name, entry in registry.entries(libraries=False).items() if entry.small]


@pytest.mark.host
@pytest.mark.parametrize("name", MODELS)
def test_compiled_is_pytorch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On inputs that the model was not exported with, two samples where the batch is dynamic."""
    entry = registry.entries(libraries=False)[name]
    network, examples = registry.build(name)
    monkeypatch.setattr(measure, "_current", (network, examples))
    program = load_model("benchmarks.zoo.measure:current", name=name)
    inputs, wanted = measure.samples(entry, network, program)
    device = load_device("host")
    bundle = build_bundle(lower(program, device), device, tmp_path / "bundle")
    results = bundle.run(*inputs)
    got = list(results) if isinstance(results, tuple) else [results]
    assert measure.largest_error(got, wanted) < 1e-4


def test_weights_that_say_nothing_are_randomised() -> None:
    """A fold that forgets a norm, or an importer that forgets a layer scale, would not show otherwise."""
    norm, scale = torch.nn.BatchNorm2d(4), torch.nn.Module()
    scale.gamma = torch.nn.Parameter(torch.full((4,), 1e-6))
    scale.temperature = torch.nn.Parameter(torch.ones(1))
    network = torch.nn.ModuleList([norm, scale])
    registry.randomise(network)
    for values in (norm.running_mean, norm.running_var, norm.weight, norm.bias, scale.gamma):
        assert values is not None and values.unique().numel() == 4
    assert scale.gamma.min() > 0.04
    assert scale.temperature.item() == 1


def test_errors_that_are_no_numbers() -> None:
    one = np.ones((2, 3), np.float32)
    assert measure.largest_error([one * 2], [one]) == 1.0
    for other in (one[:1], one.astype(np.float64), one * np.inf):
        assert measure.largest_error([other], [one]) == np.inf
    assert measure.largest_error([one, one], [one]) == np.inf


def test_time_limit_and_crash_are_outcomes() -> None:
    """A model that hangs is killed, one that dies is a row, and neither takes the benchmark with it."""

    def hang() -> torch.nn.Module:
        while True:
            pass

    def die() -> torch.nn.Module:
        import os

        os.abort()

    outcomes = []
    for make in (hang, die):
        registry._entries["tried"] = entry = registry.Entry("tried", "none", make, (), False, False, __name__)
        try:
            outcomes.append(measure._forked(entry, "import", 2.0))
        finally:
            del registry._entries["tried"]
    assert [found["outcome"] for found in outcomes] == ["timeout", "crashed"]
    assert "SIGABRT" in outcomes[1]["reason"] and outcomes[1]["step"] == "build"


def test_only_known_models_and_families() -> None:
    from edgec.errors import EdgecError

    with pytest.raises(EdgecError, match="--model nothing: is not in the zoo"):
        measure.known(["nothing"], [])
    with pytest.raises(EdgecError, match="is no family; use"):
        measure.known([], ["nothing"])
    assert [e.name for e in measure.known(["espcn"], [])] == ["espcn"]
