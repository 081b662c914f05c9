"""Block-wise fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.passbase import Context
from edgec.passes.recovery.ebft import Ebft
from edgec.sparsity import sparsities
from tests import zoo
from tests.passes.recovery.cases import context, distance, network, run, samples

pytestmark = pytest.mark.pure
SHORT = Ebft(epochs=4, batch=16, lr=5e-3)


@pytest.mark.parametrize("mask", ["prune{sparsity=0.6}", "prune-1xn{n=4 sparsity=0.5}"])
def test_every_block_comes_closer_and_masks_stay(mask: str) -> None:
    dense = network()
    given = context(dense)
    pruned = run(f"{mask}, recalibrate-bn", dense, given)
    tuned = SHORT.run(pruned, given)
    reports = tuned.annotations["ebft"]
    assert [r.name for r in reports] == ["stem..convs.1", "convs", "fc"]
    assert all(r.after < r.before and r.epochs > 0 for r in reports[:2])
    assert distance(tuned, dense) < distance(pruned, dense)
    records = sparsities(tuned.annotations)
    assert records == sparsities(pruned.annotations)
    for path, record in records.items():
        removed = tuned.weights()[path][~record.mask]
        assert bool((removed == 0).all()) and not bool(torch.signbit(removed).any())
    for path, weight in tuned.weights().items():
        if "running" in path:
            assert torch.equal(weight, pruned.weights()[path])


def test_a_worse_block_is_put_back() -> None:
    dense = network()
    given = context(dense)
    pruned = run("prune{sparsity=0.5}", dense, given)
    wild = Ebft(epochs=1, batch=64, lr=100.0).run(pruned, given)
    assert wild is pruned
    assert {s.reason for s in given.skipped if s.what == "block not trained"} >= {"no epoch was better"}


def test_labels_are_not_used() -> None:
    dense = network()
    x, labels = samples(dense).inputs().numpy(), np.arange(128) % 4
    pruned = run("prune{sparsity=0.5}", dense, context(dense))
    with_labels = Context(calibration=load_data((x, labels), dense.inputs), teacher=dense)
    assert SHORT.run(pruned, with_labels).text() == SHORT.run(pruned, context(dense)).text()


def test_a_fixed_batch_works() -> None:
    fixed = network(fixed=True)
    given = context(fixed, 32)
    pruned = run("prune{sparsity=0.5}", fixed, given)
    assert distance_of(SHORT.run(pruned, given), fixed) < distance_of(pruned, fixed)


def distance_of(program, original) -> float:
    x = samples(original, 16).inputs()
    return float(sum((program(v[None])[0] - original(v[None])[0]).square().sum() for v in x))


@pytest.mark.parametrize("model", ["vit_block", "squeeze_excite", "two_outputs", "super_resolution"])
def test_other_architectures(model: str) -> None:
    dense = zoo.program(model)
    given = Context(calibration=zoo.calibration(model), teacher=dense)
    pruned = run("prune{sparsity=0.4}", dense, given)
    tuned = Ebft(epochs=3, batch=16, layers=1).run(pruned, given)
    reports = tuned.annotations["ebft"]
    assert all(r.after <= r.before for r in reports) and any(r.epochs for r in reports)


def test_it_stands_before_other_training() -> None:
    dense = network()
    given = context(dense)
    with pytest.raises(EdgecError, match="directly behind the pruning pass"):
        SHORT.run(run("prune{sparsity=0.5}, finetune{steps=3 batch=16}", dense, given), given)
    with pytest.raises(EdgecError, match="directly behind the pruning pass"):
        SHORT.run(run("fold-bn, quantize-int8", dense, given), given)
