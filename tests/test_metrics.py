"""Metrics, evaluation of torch and NumPy models, and paired comparison."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgec.data import Dataset, Preprocess, load_data
from edgec.errors import EdgecError
from edgec.metrics import (
    PSNR,
    SQNR,
    Agreement,
    Cosine,
    Evaluation,
    FunctionMetric,
    TopK,
    compare,
    default_metric,
    evaluate,
    parse_metric,
)
from edgec.program import Program, TensorSpec
from edgec.stats import CAP_DB

pytestmark = pytest.mark.pure

VECTOR = (TensorSpec("x", (1, 4), "float32"),)
SCORES = hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(2, 9)), elements=st.floats(-5, 5, width=32))
EXAMPLE = Path(__file__).parents[1] / "examples" / "super_resolution.py"


def raises(message: str):
    return pytest.raises(EdgecError, match=re.escape(message))


def vectors(n: int = 10, seed: int = 0, labels: bool = True) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    return load_data((x, x.argmax(axis=1)) if labels else x, VECTOR)


# -- metrics -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SCORES, st.data())
def test_top1_is_argmax_and_top5_is_a_stable_sort(scores, data):
    n, classes = scores.shape
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    np.testing.assert_array_equal(TopK(1).per_sample((scores,), labels), scores.argmax(axis=1) == labels)
    if classes > 5:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(TopK(5).per_sample((scores,), labels), (best == labels[:, None]).any(axis=1))


def test_topk_counts_nan_as_wrong_and_takes_unit_axes():
    scores = np.array([[0.0, 1.0], [np.nan, 1.0], [1.0, np.nan]], np.float32)
    assert TopK(1).per_sample((scores,), np.array([1, 1, 0])).tolist() == [1, 0, 0]
    assert TopK(1).per_sample((scores[:1, :, None, None],), np.array([1])).tolist() == [1]


def test_topk_refuses_what_has_no_classes():
    with raises("metric top1: output has shape (3, 4) per sample, not one score per class; use another metric"):
        TopK(1).per_sample((np.zeros((2, 3, 4)),), np.zeros(2, int))
    with raises("metric top1: output has shape (1,) per sample"):
        TopK(1).per_sample((np.zeros((2, 1)),), np.zeros(2, int))
    with raises("metric top5: is always 1 with 5 classes; use top1"):
        TopK(5).per_sample((np.zeros((2, 5)),), np.zeros(2, int))
    with raises("metric top1: labels are in 0..7, the model has 5 classes"):
        TopK(1).per_sample((np.zeros((2, 5)),), np.array([0, 7]))
    with raises("metric top1: labels are float32 of shape (2,)"):
        TopK(1).per_sample((np.zeros((2, 5)),), np.zeros(2, np.float32))


def test_psnr_of_known_errors():
    target = np.full((2, 1, 6, 6), 0.5, np.float32)
    output = target.copy()
    output[0] += 0.1
    output[1, 0, 0, 0] = 9.0  # in the border only
    assert PSNR(border=1).per_sample((output,), target) == pytest.approx([20.0, CAP_DB], abs=1e-5)
    assert PSNR(peak=255).per_sample((output * 255,), target * 255)[0] == pytest.approx(20.0, abs=1e-4)
    assert PSNR(peak=2).per_sample((output,), target)[0] == pytest.approx(20 + 20 * math.log10(2), abs=1e-5)
    output[0, 0, 3, 3] = np.nan
    assert np.isnan(PSNR().per_sample((output,), target)).tolist() == [True, False]


def test_psnr_mistakes():
    with raises("metric psnr: output has shape (1, 6, 6), targets have (1, 3, 3)"):
        PSNR().per_sample((np.zeros((2, 1, 6, 6)),), np.zeros((2, 1, 3, 3)))
    with raises("metric psnr{border=3}: border 3 leaves nothing of (1, 6, 6)"):
        PSNR(border=3).per_sample((np.zeros((2, 1, 6, 6)),), np.zeros((2, 1, 6, 6)))
    for wrong in ({"peak": 0.0}, {"peak": math.inf}, {"border": -1}, {"border": 1.5}):
        with raises("psnr{"):
            PSNR(**wrong)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (2, 5, 3), elements=st.floats(-10, 10, width=32)))
def test_fidelity_metrics_are_perfect_against_themselves(pair):
    a, b = (pair[0],), (pair[1],)
    for metric, best in ((Agreement(), 1.0), (Cosine(), 1.0), (SQNR(), CAP_DB)):
        np.testing.assert_allclose(metric.per_sample(a, a), best)
        assert (metric.per_sample(b, a) <= best).all()
    np.testing.assert_array_equal(Agreement().per_sample(b, a), pair[0].argmax(1) == pair[1].argmax(1))


def test_specs_round_trip():
    for spec in ("top1", "top5", "agreement", "cosine", "sqnr", "psnr", "psnr{border=2}", "psnr{peak=255 border=2}"):
        metric = parse_metric(spec)
        assert metric.name == spec and parse_metric(metric.name) == metric and parse_metric(metric) is metric
    assert parse_metric(" psnr { border=2  peak=1 } ").name == "psnr{border=2}"
    assert (parse_metric("psnr").unit, parse_metric("top1").unit) == ("dB", "fraction")


def test_mistakes_in_specs():
    for spec, message in [
        ("f1", "there is no metric 'f1'; use top1, top5, psnr, agreement, cosine, sqnr or file.py:function"),
        ("psnr{border}", "metric psnr: 'border' is not an option; options are peak=…, border=…"),
        ("psnr{edge=2}", "metric psnr: 'edge=2' is not an option"),
        ("psnr{peak=high}", "psnr{peak}: 'high' is not a number"),
        ("psnr{border=1.5}", "psnr{border}: 1.5 is not a number of pixels"),
        ("top1{k=2}", "metric top1: 'k=2' is not an option; top1 has no options"),
        ("psnr{peak=1", "cannot read 'psnr{peak=1'; write name or name{option=value"),
        ("", "cannot read ''"),
    ]:
        with raises(message):
            parse_metric(spec)


# -- metrics of the user -----------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "def hit(outputs, targets):\n    return outputs.argmax(axis=1) == targets\n"
        "def mean_hit(outputs, targets):\n    return float((outputs.argmax(axis=1) == targets).mean())\n"
        "def error(outputs, targets):\n    return np.abs(outputs).sum(axis=1) * 7\n"
        "def second(outputs, targets):\n    return outputs[1][:, 0]\n"
        "def short(outputs, targets):\n    return np.zeros(2)\n"
        "def bad(outputs, targets):\n    return np.full(len(targets), np.nan)\n"
        "def crash(outputs, targets):\n    return outputs.nothing\n"
    )
    return path


def test_function_metrics_per_batch_and_per_sample(mine):
    data = vectors(11)
    for name in ("hit", "mean_hit"):
        result = evaluate(lambda x: x * [1, 1, 1, -1], data, f"{mine}:{name}", batch=4)
        want = evaluate(lambda x: x * [1, 1, 1, -1], data, "top1", batch=4)
        np.testing.assert_array_equal(result.per_sample, want.per_sample)
        assert 0 < result.value < 1


def test_function_metrics_with_units(mine):
    data = vectors()
    metric = parse_metric(f"{mine}:error{{unit=mm better=lower}}")
    assert metric.unit == "mm" and not metric.higher_better and metric.name == f"{mine}:error{{unit=mm better=lower}}"
    small, large = evaluate(lambda x: x, data, metric), evaluate(lambda x: 2 * x, data, metric)
    worse = compare(small, large)
    assert worse.drop == pytest.approx(small.value) and worse.value == pytest.approx(2 * worse.reference)
    assert compare(large, small).drop == pytest.approx(-worse.drop)


def test_function_metrics_get_all_outputs(mine):
    two = (np.zeros((3, 2)), np.full((3, 1), 0.25))
    metric = parse_metric(f"{mine}:second")
    assert metric.per_sample(two, np.zeros(3)).tolist() == [0.25] * 3


def test_function_metrics_mistakes(mine):
    data = vectors()
    for name, message in [
        ("error", "which is not a fraction 0..1; declare a unit"),
        ("short", "returned (2,) for 1 samples; return one number per sample"),
        ("bad", "returned nan for finite outputs (sample 0 of the batch)"),
        ("crash", "raised AttributeError: 'numpy.ndarray' object has no attribute 'nothing' (mine.py, line 15)"),
        ("nothing", "has no function 'nothing'"),
    ]:
        with raises(message):
            evaluate(lambda x: x, data, f"{mine}:{name}")
    with raises("'upper' is not a choice; higher or lower"):
        parse_metric(f"{mine}:hit{{better=upper}}")
    with raises("'k=1' is not an option; options are unit=…, better=…"):
        parse_metric(f"{mine}:hit{{k=1}}")


def test_function_metrics_leave_nonfinite_outputs_to_the_check(mine):
    metric = parse_metric(f"{mine}:error{{unit=mm}}")
    outputs = np.array([[1.0], [np.nan]])
    assert np.isnan(metric.per_sample((outputs,), np.zeros(2))).tolist() == [False, True]


# -- evaluation --------------------------------------------------------------------------------------------------------


class Scale(torch.nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def program(batch: int | None) -> Program:
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},) if batch is None else None
    exported = torch.export.export(Scale(2.0), (torch.zeros(batch or 2, 4),), dynamic_shapes=shapes)
    return Program.from_exported(exported, "scale")


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_programs_modules_and_functions_agree(n):
    data = vectors(n)
    want = data.inputs().numpy() * 2
    for function, batch in [
        (program(None), None),
        (program(None), 7),
        (program(1), None),
        (program(3), None),
        (Scale(2.0), None),
        (lambda x: 2 * x, None),
        (lambda x: [2 * x], 7),
    ]:
        result = evaluate(function, data, "top1", batch=batch)
        np.testing.assert_array_equal(result.outputs[0], want)
        assert result.n == n and result.value == 1.0 and result.nonfinite == 0


def test_calls_always_have_the_batch_that_was_asked_for():
    sizes = []

    def function(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return x

    assert evaluate(function, vectors(10), "top1", batch=4).n == 10
    assert sizes == [4, 4, 4]
    with raises("evaluate(batch): 0 is not a batch size"):
        evaluate(function, vectors(10), "top1", batch=0)


def test_progress_ends_at_one():
    seen = []
    evaluate(lambda x: x, vectors(10), "top1", batch=4, progress=seen.append)
    assert seen == [0.4, 0.8, 1.0]


def test_outputs_of_a_reused_buffer_are_kept():
    buffer = np.zeros((1, 4), np.float32)

    def function(x: np.ndarray) -> np.ndarray:
        buffer[:] = x
        return buffer

    data = vectors()
    np.testing.assert_array_equal(evaluate(function, data, "top1").outputs[0], data.inputs().numpy())


def test_several_outputs_and_missing_batch_axes():
    data = vectors(5)
    result = evaluate(lambda x: (x, x[0, :2], x.sum()), data, "top1")
    assert [o.shape for o in result.outputs] == [(5, 4), (5, 2), (5,)]
    with raises("model: output 1 has shape (2,) for a batch of 5; the first dimension of every output must be the"):
        evaluate(lambda x: (x, x[0, :2]), data, "top1", batch=5)
    with raises("model: output 0 is a dict; return a tensor or a tuple of tensors"):
        evaluate(lambda x: {"y": x}, data, "top1")


def test_labels_are_needed_or_not():
    data = vectors(labels=False)
    with raises("metric top1: arrays has no labels; add an array 'labels', or use agreement, cosine or sqnr"):
        evaluate(lambda x: x, data, "top1")
    result = evaluate(lambda x: x, data, "agreement")
    assert result.per_sample is None and result.value is None


def test_gradients_are_not_recorded():
    module = Scale()
    module.forward = lambda x: torch.full_like(x, float(torch.is_grad_enabled()))  # type: ignore[method-assign]
    assert evaluate(module, vectors(), "top1").outputs[0].max() == 0


def test_a_part_of_an_evaluation():
    data = vectors(20)
    weights = np.array([1, 1, 1, -1])
    whole = evaluate(lambda x: x * weights, data, "top1")
    rows = [3, 17, 4]
    part = evaluate(lambda x: x * weights, data.take(rows), "top1")
    np.testing.assert_array_equal(whole.take(rows).per_sample, part.per_sample)
    assert compare(whole.take(rows), part).cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("shape", "targets", "want"),
    [
        ((1, 4), np.arange(6) % 4, "top1"),
        ((1, 4, 1, 1), np.arange(6) % 4, "top1"),
        ((1, 5), None, "agreement"),
        ((1, 4), None, "cosine"),  # an autoencoder: outputs like inputs
        ((1, 3, 8, 8), None, "cosine"),
        ((1, 1), np.zeros(6), "cosine"),
        ((1, 5), np.zeros((6, 5)), "agreement"),
        ((1,), None, "cosine"),
    ],
)
def test_default_metric(shape, targets, want):
    x = np.zeros((6, 4), np.float32)
    data = load_data(x if targets is None else (x, targets), VECTOR)
    assert default_metric(data, [TensorSpec("y", shape, "float32")]).name == want


def test_default_metric_checks_all_labels():
    data = load_data((np.zeros((6, 4), np.float32), np.arange(6)), VECTOR)
    with raises("arrays: labels are in 0..5, the model has 5 classes (0..4)"):
        default_metric(data, [TensorSpec("y", (1, 5), "float32")])


# -- comparison --------------------------------------------------------------------------------------------------------


def evaluation(outputs, targets=None, metric=None) -> Evaluation:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    metric = metric or TopK(1)
    scores = metric.per_sample(outputs, targets) if metric.needs_labels else None
    nonfinite = int((~np.isfinite(outputs[0].reshape(len(outputs[0]), -1)).all(axis=1)).sum())
    return Evaluation(metric, outputs, scores, nonfinite)


def test_drop_in_points_with_a_paired_interval():
    labels = np.zeros(200, int)
    before, after = np.zeros((2, 200, 3), np.float32)
    before[:, 0] = 1
    after[:, 0] = 1
    before[:10] = [0, 1, 0]  # wrong before,
    after[:4] = [0, 1, 0]  # 6 of them right now
    after[100:109] = [0, 1, 0]  # 9 wrong now
    result = compare(evaluation(before, labels), evaluation(after, labels))
    assert (result.reference, result.value, result.n) == (0.95, 0.935, 200)
    assert result.drop == 1.5
    assert result.ci95 is not None and result.ci95[0] < 0 < 1.5 < result.ci95[1] < 6
    assert result.agreement == pytest.approx(185 / 200)
    back = compare(evaluation(after, labels), evaluation(before, labels))
    assert back.drop == -1.5 and back.ci95 == (pytest.approx(-result.ci95[1]), pytest.approx(-result.ci95[0]))


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_drop_is_the_difference_of_the_values(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    before, after = rng.normal(size=(2, n, 3)).astype(np.float32)
    result = compare(evaluation(before, labels), evaluation(after, labels))
    assert result.drop == pytest.approx(100 * (result.reference - result.value), abs=1e-9)
    assert result.ci95 is not None and result.ci95[0] <= result.drop <= result.ci95[1]


def test_equal_outputs_lose_nothing_but_keep_their_uncertainty():
    labels, scores = np.arange(50) % 3, np.eye(3, dtype=np.float32)[np.arange(50) % 3]
    reference = evaluation(scores, labels)
    again = compare(reference, evaluation(scores.copy(), labels))
    assert (again.drop, again.cosine, again.sqnr_db, again.agreement) == (0, pytest.approx(1), CAP_DB, 1)
    assert again.ci95 is not None and again.ci95[0] == -again.ci95[1] < -3
    assert compare(reference, reference).ci95 is None


def test_psnr_drops_in_decibel():
    target = np.zeros((5, 1, 4, 4), np.float32)
    noise = np.linspace(0.1, 0.3, 5, dtype=np.float32)[:, None, None, None] * np.ones_like(target)
    result = compare(evaluation(noise, target, PSNR()), evaluation(noise * np.float32(2), target, PSNR()))
    assert result.drop == pytest.approx(20 * math.log10(2), abs=1e-5)
    assert result.ci95 == (pytest.approx(result.drop, abs=1e-4), pytest.approx(result.drop, abs=1e-4))
    assert result.agreement is None
    one = compare(evaluation(noise[:1], target[:1], PSNR()), evaluation(noise[:1] * 2, target[:1], PSNR()))
    assert one.ci95 is None


def test_metrics_without_labels_compare_with_the_reference():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 5)).astype(np.float32)
    other = scores + rng.normal(size=scores.shape).astype(np.float32)
    same = scores.argmax(1) == other.argmax(1)
    result = compare(evaluation(scores, metric=Agreement()), evaluation(other, metric=Agreement()))
    assert (result.reference, result.value) == (1.0, same.mean())
    assert result.drop == pytest.approx(100 * (~same).mean()) and 0 < result.drop < 100
    sqnr = compare(evaluation(scores, metric=SQNR()), evaluation(other, metric=SQNR()))
    assert sqnr.reference == CAP_DB and sqnr.drop == pytest.approx(CAP_DB - sqnr.value)


def test_fidelity_is_that_of_the_worst_output():
    good, bad = np.ones((3, 4)), np.array([[1.0, 0.0]] * 3)
    off = np.array([[1.0, 0.1]] * 3)
    result = compare(
        evaluation((good, bad), metric=Cosine()),
        evaluation((good.copy(), off), metric=Cosine()),
    )
    assert result.sqnr_db == pytest.approx(20.0)
    assert result.cosine == pytest.approx(1 / math.hypot(1, 0.1))
    assert result.value == pytest.approx(1.0)  # the metric reads the first output


def test_nonfinite_outputs_are_counted_and_give_nan_fidelity():
    scores = np.eye(3, dtype=np.float32)
    broken = scores.copy()
    broken[1, 2] = np.nan
    result = compare(evaluation(scores, np.arange(3)), evaluation(broken, np.arange(3)))
    assert result.nonfinite == 1 and result.reference_nonfinite == 0
    assert result.value == pytest.approx(2 / 3)
    assert math.isnan(result.cosine) and math.isnan(result.sqnr_db)
    assert evaluate(lambda x: x * np.inf, vectors(3), "top1").nonfinite == 3


def test_comparisons_that_make_no_sense():
    a, b = np.zeros((2, 3)), np.zeros((2, 4))
    with raises("compare: outputs have shapes [(2, 4)], those of the reference [(2, 3)]"):
        compare(evaluation(a, np.zeros(2, int)), evaluation(b, np.zeros(2, int)))
    with raises("compare: cosine cannot be compared with agreement"):
        compare(evaluation(a, metric=Cosine()), evaluation(a, metric=Agreement()))


def test_a_binary_function_metric_is_compared_as_proportions():
    metric = FunctionMetric("m.py:hit", lambda outputs, targets: outputs[:, 0] > 0)
    labels = np.zeros(30)
    result = compare(evaluation(np.ones((30, 1)), labels, metric), evaluation(np.ones((30, 1)), labels, metric))
    assert result.ci95 is not None and result.ci95[1] > 5  # not the zero width of Student's interval


# -- figures of the shared data ----------------------------------------------------------------------------------------


def shared_program(shared: Path, name: str) -> torch.nn.Module:
    return torch.export.load(shared / "data" / "models" / f"{name}.pt2").module(check_guards=False)


CIFAR = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("model", "data", "shape", "preprocess", "value"),
    [
        ("cifar10_resnet20", "cifar10_test", (1, 3, 32, 32), CIFAR, 459 / 502),
        ("mlperftiny_ic_resnet8", "cifar10_test", (1, 3, 32, 32), Preprocess(scale=1.0), 446 / 502),
        ("mlperftiny_kws_dscnn", "mlperftiny_kws_mfcc", (1, 1, 49, 10), None, 453 / 500),
    ],
)
def test_published_accuracy(shared, model, data, shape, preprocess, value):
    dataset = load_data(
        str(shared / "data" / "datasets" / f"{data}.npz"), (TensorSpec("x", shape, "float32"),), preprocess
    )
    result = evaluate(shared_program(shared, model), dataset, "top1")
    assert result.value == value  # 91.43 %, 88.84 % and 90.6 % in data/README.md


@pytest.mark.parametrize(
    ("model", "factory", "size", "samples", "value"),
    [
        ("sr_fsrcnn_x2_y112", "fsrcnn_eval", 112, 5, 36.598),
        pytest.param("sr_vdsr_x2_y224", "vdsr_eval", 224, 5, 38.446, marks=pytest.mark.slow),
    ],
)
def test_published_psnr(shared, monkeypatch, model, factory, size, samples, value):
    monkeypatch.setenv("EDGEC_SHARED", os.fspath(shared))
    dataset = load_data(f"{EXAMPLE}:{factory}", (TensorSpec("x", (1, 1, size, size), "float32"),))
    assert len(dataset) == samples
    result = evaluate(shared_program(shared, model), dataset, "psnr{peak=1 border=2}", batch=1)
    assert result.value == pytest.approx(value, abs=5e-4)
