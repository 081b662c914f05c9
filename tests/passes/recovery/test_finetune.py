"""Fine-tuning with distillation: masks hold, nothing gets worse, every kind of model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgec import tokenops  # noqa: F401  (registers the operators)
from edgec.data import Preprocess, load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.recovery.finetune import Finetune
from edgec.sparsity import sparsities
from tests import zoo
from tests.passes.recovery.cases import context, distance, network, run, samples

pytestmark = pytest.mark.pure
SHORT = Finetune(steps=30, batch=16, lr=0.05)


@pytest.mark.parametrize(
    "mask", ["prune{sparsity=0.5}", "prune-1xn{n=4 sparsity=0.5}", "prune{grain=filter sparsity=0.5}"]
)
def test_a_pruned_model_comes_back_with_its_mask(mask: str) -> None:
    dense = network()
    given = context(dense)
    pruned = run(mask, dense, given)
    tuned = SHORT.run(pruned, given)
    assert distance(tuned, dense) < 0.6 * distance(pruned, dense)
    records = sparsities(tuned.annotations)
    assert records == sparsities(pruned.annotations) and records
    for path, record in records.items():
        removed = tuned.weights()[path][~record.mask]
        assert bool((removed == 0).all()) and not bool(torch.signbit(removed).any())
    assert tuned.annotations["finetune"].after < tuned.annotations["finetune"].before


def test_the_model_itself_stays_as_it_is() -> None:
    dense = network()
    given = context(dense)
    assert Finetune(steps=2, batch=16, augment="none", lr=0.0).run(dense, given) is dense
    assert [s.what for s in given.skipped] == ["fine-tuning"]


def test_labels_are_an_option() -> None:
    dense = network()
    labels = np.arange(128) % 4
    x = samples(dense).inputs().numpy()
    with_labels = Context(calibration=load_data((x, labels), dense.inputs), teacher=dense)
    pruned = run("prune{sparsity=0.7}", dense, with_labels)
    used = Finetune(steps=4, batch=16, alpha=0.5).run(pruned, with_labels)
    ignored = Finetune(steps=4, batch=16, alpha=0.5, labels=False).run(pruned, with_labels)
    without = Finetune(steps=4, batch=16, alpha=0.5).run(pruned, context(dense))
    assert torch.equal(ignored.weights()["fc.weight"], without.weights()["fc.weight"])
    assert not torch.equal(used.weights()["fc.weight"], ignored.weights()["fc.weight"])


@pytest.mark.parametrize("model", ["super_resolution", "two_outputs", "mlp", "vit_block"])
def test_models_of_every_kind_come_closer_to_their_teacher(model: str) -> None:
    # the zoo's batch norms have statistics of no data, which training would not leave
    dense = run("recalibrate-bn", zoo.program(model), Context(calibration=zoo.calibration(model)))
    given = Context(calibration=zoo.calibration(model), teacher=dense)
    pruned = run("prune{sparsity=0.5}", dense, given)
    tuned = Finetune(steps=30, batch=16, lr=3e-3, optimizer="adamw").run(pruned, given)
    report = tuned.annotations["finetune"]
    assert report.after < report.before
    assert sparsities(tuned.annotations).keys() == sparsities(pruned.annotations).keys() != set()


def test_a_fixed_batch_of_one_keeps_its_statistics() -> None:
    fixed = network(fixed=True)
    given = context(fixed, 24)
    pruned = run("prune{sparsity=0.5}", fixed, given)
    tuned = Finetune(steps=6, batch=8, lr=0.02).run(pruned, given)
    assert tuned.annotations["finetune"].best_step > 0
    assert torch.equal(tuned.weights()["bn.running_mean"], fixed.weights()["bn.running_mean"])


@pytest.mark.parametrize("r", [1, 2])
def test_gradients_pass_through_merged_and_dropped_tokens(r: int) -> None:
    """The choice of tokens is a constant; the gradient is that of the tokens that stay and of those in means."""
    generator = torch.Generator().manual_seed(r)
    x = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64).float().requires_grad_(True)
    size, score = torch.ones(2, 7, 1), torch.rand(2, 6, generator=generator)
    ops = torch.ops.edgec
    for call in (
        lambda x: ops.tome_merge(x, size, x.detach(), r, 1, False)[0],
        lambda x: ops.token_reduce(x, size, score, 1, 6, 6 - r, False, False)[0],
        lambda x: ops.token_keep(x, size, score, 1, 7 - r)[0],
    ):
        want = torch.randn(2, 5, generator=generator)
        (got,) = torch.autograd.grad((call(x).sum(1) * want).sum(), x)
        step = 1e-2 * torch.randn(2, 7, 5, generator=generator)
        with torch.no_grad():
            base = call(x).sum(1)
            # linear in x as long as the choice is the same
            moved = x.detach() + 1e-3 * step
            change = ((call(moved).sum(1) - base) * want).sum() / 1e-3
        assert float(change) == pytest.approx(float((got * step).sum()), rel=0.05, abs=2e-3)


def test_integer_weights_are_refused() -> None:
    dense = network()
    given = context(dense)
    with pytest.raises(EdgecError, match="train before quantising"):
        SHORT.run(run("fold-bn, quantize-int8", dense, given), given)


def test_a_teacher_is_needed() -> None:
    dense = network()
    with pytest.raises(EdgecError, match="needs a teacher"):
        SHORT.run(dense, Context(calibration=samples(dense)))


def test_a_vision_transformer_of_batch_1(shared: Path) -> None:
    """The ViT is exported with its batch written into reshapes; gradients of a step come from single samples."""
    model = torch.export.load(shared / "data" / "models" / "cifar10_vit_d128l4.pt2").module()
    exported = torch.export.export(model, (torch.rand(1, 3, 32, 32),))
    path = shared / "data" / "datasets" / "cifar10_train5k.npz[0:16]"
    from edgec.program import Program

    vit = Program.from_exported(exported, "vit")
    assert not vit.dynamic_batch
    data = load_data(str(path), vit.inputs, Preprocess((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))
    given = Context(calibration=data, teacher=vit)
    pruned = run("prune{sparsity=0.6}", vit, given)
    tuned = Finetune(steps=3, batch=4, lr=3e-4, optimizer="adamw").run(pruned, given)
    report = tuned.annotations["finetune"]
    assert report.best_step > 0 and report.after < report.before


def test_a_shared_model_trains(shared: Path) -> None:
    """One real network, a few steps: KL at 50 % falls to less than half."""
    program = load_model(str(shared / "data" / "models" / "mlperftiny_ic_resnet8.pt2"))
    data = load_data(
        str(shared / "data" / "datasets" / "cifar10_train5k.npz[0:256]"), program.inputs, Preprocess(scale=1.0)
    )
    given = Context(calibration=data, teacher=program)
    pruned = run("prune{sparsity=0.6}, recalibrate-bn", program, given)
    report = Finetune(steps=12, batch=48).run(pruned, given).annotations["finetune"]
    assert report.after < 0.7 * report.before
