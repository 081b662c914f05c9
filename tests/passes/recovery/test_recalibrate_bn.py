"""Batch norm statistics and bias correction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgec.passbase import Context
from edgec.passes.recovery.recalibrate_bn import RecalibrateBN
from edgec.sparsity import sparsities
from tests.passes.recovery.cases import Residual, context, distance, images, network, run, samples

pytestmark = pytest.mark.pure


def torch_module(program) -> Residual:
    model = Residual()
    model.load_state_dict(program.weights(), strict=False)
    return model


def test_the_statistics_are_those_of_pytorch_with_a_cumulative_average() -> None:
    dense = network()
    given = context(dense)
    pruned = run("prune{sparsity=0.5}", dense, given)
    got = RecalibrateBN(batch=64).run(pruned, given).weights()
    model = torch_module(pruned).eval()
    for norm in (model.bn, *model.norms):
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for part in torch.from_numpy(images()).split(64):
            model(part)
    for path, want in model.state_dict().items():
        if "running" in path:
            torch.testing.assert_close(got[path], want, rtol=1e-3, atol=1e-4)


def test_statistics_of_the_original_samples_change_nothing_and_only_they_change() -> None:
    dense = network()
    given = context(dense)
    again = RecalibrateBN(batch=128).run(dense, given)
    for path, weight in dense.weights().items():
        if "running" in path:
            torch.testing.assert_close(again.weights()[path], weight, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(again.weights()[path], weight)
    assert not given.skipped


def test_it_helps_and_keeps_masks() -> None:
    dense = network()
    given = context(dense)
    pruned = run("prune-1xn{n=4 sparsity=0.5}", dense, given)
    better = RecalibrateBN().run(pruned, given)
    assert distance(better, dense) < distance(pruned, dense)
    assert sparsities(better.annotations) == sparsities(pruned.annotations)


def test_a_fixed_batch_of_one_has_the_statistics_of_many() -> None:
    free, fixed = network(), network(fixed=True)
    one = RecalibrateBN(batch=64).run(fixed, context(fixed)).weights()
    many = RecalibrateBN(batch=64).run(free, context(free)).weights()
    for path, weight in many.items():
        torch.testing.assert_close(one[path], weight, rtol=1e-4, atol=1e-5)


def test_few_samples_are_one_batch() -> None:
    dense = network()
    result = RecalibrateBN().run(dense, context(dense, 10))
    x = torch.from_numpy(images(10))
    want = nn.functional.conv2d(x, dense.weights()["stem.weight"], padding=1).mean((0, 2, 3))
    torch.testing.assert_close(result.weights()["bn.running_mean"], want, rtol=1e-4, atol=1e-5)


def test_a_model_without_batch_norms_is_reported() -> None:
    dense = network()
    given = context(dense)
    folded = run("fold-bn", dense, given)
    assert RecalibrateBN().run(folded, given) is folded
    (skip,) = given.skipped
    assert "before fold-bn" in skip.reason


def test_biases_of_a_folded_model_make_the_means_right() -> None:
    dense = network()
    given = context(dense)
    folded = run("prune-1xn{n=4 sparsity=0.5}, fold-bn", dense, given)
    better = RecalibrateBN(bias_correction=True).run(folded, given)
    assert not [s for s in given.skipped if "bias" in s.what]
    x = samples(dense).inputs()
    torch.testing.assert_close(better(x)[0].mean(0), dense(x)[0].mean(0), rtol=1e-4, atol=1e-4)
    assert float((folded(x)[0].mean(0) - dense(x)[0].mean(0)).abs().max()) > 1e-2
    assert distance(better, dense) < distance(folded, dense)


def test_biases_need_the_original_values() -> None:
    dense = network()
    given = context(dense)
    changed = run("prune{sparsity=0.5}, finetune{steps=4 batch=16}, fold-bn", dense, given)
    given.skipped.clear()
    assert RecalibrateBN(bias_correction=True).run(changed, given) is changed
    assert "has changed since it was pruned" in given.skipped[0].reason


def test_it_is_deterministic_and_needs_no_teacher() -> None:
    dense = network()
    given = Context(calibration=samples(dense), seed=3)
    one, two = (RecalibrateBN(samples=100).run(dense, given) for _ in range(2))
    assert one.text() == two.text()
