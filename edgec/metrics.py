"""Metrics, evaluation and paired comparison.

A metric gives one number per sample; its value is their mean. `evaluate` runs a model over a dataset and keeps the
outputs; `compare` sets a candidate against a reference on the same samples, so that the drop has a *paired*
confidence interval, far narrower than the uncertainty of either value.

Units: fractions are 0..1 and their drops are in percentage points (0.9143 to 0.9003 is a drop of 1.4 points); dB and
other units drop in themselves. A positive drop always means worse.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgec.data import Dataset, check_class_labels
from edgec.errors import EdgecError
from edgec.samples import sample_shape, to_numpy
from edgec.stats import cosine_of, decibel, energy, output_fidelity, paired_mean_ci, paired_proportions_ci, products
from edgec.usercode import load_function, user_code

if TYPE_CHECKING:
    from edgec.program import TensorSpec

FRACTION = "fraction"
DECIBEL = "dB"
TORCH_BATCH = 64

Outputs = tuple[np.ndarray, ...]


# -- metrics -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One number per sample.

    name: its spelling, with the options that are not defaults. unit: "fraction", "dB" or a word of the user's.
    needs_labels: True compares with the targets of the data; False compares with the outputs of the reference model.
    """

    spelled: ClassVar[str] = ""
    needs_labels: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.spelled

    @property
    def unit(self) -> str:
        return FRACTION

    @property
    def higher_better(self) -> bool:
        return True

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        """float64 [n]; NaN only where an output is NaN.

        outputs: one array [n, ...] per output of the model. targets: labels [n, ...], or, for metrics that need no
        labels, the outputs of the reference. Raises EdgecError when shapes or labels do not suit the metric.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TopK(Metric):
    """1 where the labelled class is among the `k` largest outputs, else 0. Outputs are [n, classes].

    Equal outputs rank in the order of their classes, so that k = 1 agrees with argmax. Rows with NaN count as wrong.
    """

    k: int = 1

    @property
    def name(self) -> str:
        return f"top{self.k}"

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        scores = class_scores(outputs[0], self.name)
        if self.k > 1 and scores.shape[1] <= self.k:
            raise EdgecError(
                f"is always 1 with {scores.shape[1]} classes", where=f"metric {self.name}", hint="use top1"
            )
        check_class_labels(targets, scores.shape[1], f"metric {self.name}")
        own = np.take_along_axis(scores, targets[:, None], axis=1)
        earlier = np.arange(scores.shape[1]) < targets[:, None]
        rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
        return ((rank < self.k) & ~np.isnan(scores).any(axis=1)).astype(np.float64)


@dataclass(frozen=True)
class PSNR(Metric):
    """Peak signal-to-noise ratio of the first output against targets of the same shape, in dB: per sample, then mean.

    10 log10(peak^2 / MSE). peak: the value range of the images. border: pixels cut from each edge of the last two
    axes. Outputs are not clipped to the range. Equal images count as CAP_DB.
    """

    spelled: ClassVar[str] = "psnr"
    peak: float = 1.0
    border: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak) and self.peak > 0):
            raise EdgecError(f"{self.peak} is not a positive number", where="psnr{peak}")
        if not isinstance(self.border, int) or self.border < 0:
            raise EdgecError(f"{self.border} is not a number of pixels", where="psnr{border}")

    @property
    def name(self) -> str:
        options = [f"peak={self.peak:g}"] * (self.peak != 1) + [f"border={self.border}"] * (self.border != 0)
        return self.spelled + ("{" + " ".join(options) + "}" if options else "")

    @property
    def unit(self) -> str:
        return DECIBEL

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        images = outputs[0]
        if images.shape != targets.shape:
            raise EdgecError(
                f"output has shape {images.shape[1:]}, targets have {targets.shape[1:]}", where=f"metric {self.name}"
            )
        if self.border:
            if images.ndim < 3 or min(images.shape[-2:]) <= 2 * self.border:
                raise EdgecError(
                    f"border {self.border} leaves nothing of {images.shape[1:]}", where=f"metric {self.name}"
                )
            cut = (..., slice(self.border, -self.border), slice(self.border, -self.border))
            images, targets = images[cut], targets[cut]
        noise = energy(images, targets) / math.prod(images.shape[1:])
        return decibel(np.full(len(noise), self.peak**2), noise)


@dataclass(frozen=True)
class Agreement(Metric):
    """1 where the reference and the candidate have the same largest class, else 0. Needs no labels."""

    spelled: ClassVar[str] = "agreement"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        ours, reference = class_scores(outputs[0], self.name), class_scores(targets[0], self.name)
        same = ours.argmax(axis=1) == reference.argmax(axis=1)
        return (same & ~np.isnan(ours).any(axis=1)).astype(np.float64)


@dataclass(frozen=True)
class Cosine(Metric):
    """Cosine between the first outputs of reference and candidate, per sample. Needs no labels.

    Two outputs of zeros count as 1, one of zeros against another as 0.
    """

    spelled: ClassVar[str] = "cosine"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        dot, ours, theirs = products(outputs[0], targets[0])
        return cosine_of(dot, ours, theirs)


@dataclass(frozen=True)
class SQNR(Metric):
    """Signal to (quantisation) noise of the first output against the reference, per sample, in dB. Needs no labels.

    10 log10(sum r^2 / sum (r - y)^2), cut at +-CAP_DB: the reference itself has CAP_DB, so a drop of 110 dB is an SQNR
    of 40 dB.
    """

    spelled: ClassVar[str] = "sqnr"
    needs_labels: ClassVar[bool] = False

    @property
    def unit(self) -> str:
        return DECIBEL

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        return decibel(energy(targets[0]), energy(targets[0], outputs[0]))


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A metric of the user: `file.py:function{unit=dB better=lower}`.

    The function is called as function(outputs, targets) with NumPy arrays whose first axis is the sample (`outputs` is
    a tuple of arrays when the model has several outputs). It returns one number per sample, as an array [n]; a
    function that returns a single number is called again for every sample alone, with arrays of length 1.

    unit: "fraction" (default, values 0..1, drops in percentage points), "dB", or any word: drops in that unit.
    better: "higher" (default) or "lower".
    """

    spec: str
    function: Callable[[Any, Any], Any] = field(compare=False)
    unit_name: str = FRACTION
    better: str = "higher"

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise EdgecError(f"'{self.better}' is not a choice", where=f"{self.spec}{{better}}", hint="higher or lower")

    @property
    def name(self) -> str:
        options = [f"unit={self.unit_name}"] * (self.unit_name != FRACTION)
        options += [f"better={self.better}"] * (self.better != "higher")
        return self.spec + ("{" + " ".join(options) + "}" if options else "")

    @property
    def unit(self) -> str:
        return self.unit_name

    @property
    def higher_better(self) -> bool:
        return self.better == "higher"

    def per_sample(self, outputs: Outputs, targets: Any) -> np.ndarray:
        n = len(targets)
        values = self._call(outputs, targets)
        if values.ndim == 0:
            rows = [self._call(tuple(o[i : i + 1] for o in outputs), targets[i : i + 1]) for i in range(n)]
            values = np.array([row.reshape(-1)[0] for row in rows if row.size == 1])
        if values.shape != (n,):
            raise EdgecError(
                f"returned {values.shape} for {n} samples", where=self.spec, hint="return one number per sample"
            )
        sound = finite_samples(outputs)
        bad = sound & ~np.isfinite(values)
        if bad.any():
            raise EdgecError(
                f"returned {values[bad][0]} for finite outputs (sample {int(bad.argmax())} of the batch)",
                where=self.spec,
            )
        values = np.where(sound, values, np.nan)
        if self.unit_name == FRACTION and ((values < 0) | (values > 1)).any():
            raise EdgecError(
                f"returned {values[(values < 0) | (values > 1)][0]:g}, which is not a fraction 0..1",
                where=self.spec,
                hint=f"declare a unit: {self.spec}{{unit=dB}}",
            )
        return values

    def _call(self, outputs: Outputs, targets: Any) -> np.ndarray:
        with user_code(self.spec):
            return np.asarray(self.function(outputs[0] if len(outputs) == 1 else outputs, targets), np.float64)


BUILTIN: Mapping[str, Callable[..., Metric]] = {
    "top1": lambda: TopK(1),
    "top5": lambda: TopK(5),
    "psnr": lambda peak=1.0, border=0: PSNR(float(peak), border),
    "agreement": Agreement,
    "cosine": Cosine,
    "sqnr": SQNR,
}
OPTIONS: Mapping[str, tuple[str, ...]] = {"psnr": ("peak", "border")}
FUNCTION_OPTIONS = ("unit", "better")


def parse_metric(spec: str | Metric) -> Metric:
    """`top1`, `top5`, `psnr{peak=1 border=2}`, `agreement`, `cosine`, `sqnr` or `file.py:function{unit=dB}`.

    Raises EdgecError for an unknown name, option or value.
    """
    if isinstance(spec, Metric):
        return spec
    match = re.fullmatch(r"\s*([^{}\s]+)\s*(?:\{([^{}]*)\})?\s*", spec)
    if match is None:
        raise EdgecError(
            f"cannot read '{spec}'", where="--metric", hint="write name or name{option=value option=value}"
        )
    name, inside = match.groups()
    if ":" in name:
        options = _options(inside, FUNCTION_OPTIONS, name)
        named = {"unit": "unit_name"}
        return FunctionMetric(name, load_function(name), **{named.get(k, k): v for k, v in options.items()})
    if name not in BUILTIN:
        known = ", ".join(BUILTIN)
        raise EdgecError(f"there is no metric '{name}'", where="--metric", hint=f"use {known} or file.py:function")
    options = {k: _number(v, f"{name}{{{k}}}") for k, v in _options(inside, OPTIONS.get(name, ()), name).items()}
    return BUILTIN[name](**options)


def _options(inside: str | None, known: Sequence[str], name: str) -> dict[str, str]:
    found = {}
    for part in (inside or "").split():
        key, equals, value = part.partition("=")
        if key not in known or not equals or not value:
            hint = f"options are {', '.join(f'{k}=…' for k in known)}" if known else f"{name} has no options"
            raise EdgecError(f"'{part}' is not an option", where=f"metric {name}", hint=hint)
        found[key] = value
    return found


def _number(text: str, where: str) -> int | float:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise EdgecError(f"'{text}' is not a number", where=where)
    return value


def default_metric(dataset: Dataset, outputs: Sequence[TensorSpec]) -> Metric:
    """What to measure when the user does not say: top1 with class labels, else fidelity to the original model.

    Without class labels, a model with outputs [n, classes] is measured by `agreement`, unless it returns the shape
    that it takes (an autoencoder); every other model by `cosine`.
    Raises EdgecError when there are class labels and they do not fit the outputs.
    """
    shape = _class_shape(tuple(outputs[0].shape))
    if shape is None:
        return Cosine()
    peek = dataset.targets(slice(0, 1))
    if peek is not None and peek.ndim == 1 and peek.dtype.kind == "i":
        dataset.check_labels(shape[1])
        return TopK(1)
    same = any(sample_shape(spec) == sample_shape(outputs[0]) for spec in dataset.specs)
    return Cosine() if same else Agreement()


def _class_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(n, classes) for [n, classes, 1, …] with at least two classes, else None."""
    if len(shape) < 2 or shape[1] < 2 or math.prod(shape[2:]) != 1:
        return None
    return shape[0], shape[1]


def class_scores(output: np.ndarray, metric: str) -> np.ndarray:
    """`output` as [n, classes], trailing axes of length 1 dropped. Raises EdgecError for any other shape."""
    shape = _class_shape(output.shape)
    if shape is None:
        raise EdgecError(
            f"output has shape {output.shape[1:]} per sample, not one score per class",
            where=f"metric {metric}",
            hint="use another metric",
        )
    return output.reshape(shape)


# -- evaluation --------------------------------------------------------------------------------------------------------


def finite_samples(outputs: Outputs) -> np.ndarray:
    """bool [n]: samples without a NaN or an infinity in any output."""
    finite = np.ones(len(outputs[0]), bool)
    for output in outputs:
        if output.dtype.kind in "fc":
            finite &= np.isfinite(output.reshape(len(output), -1)).all(axis=1)
    return finite


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's outputs on a dataset, and the metric of each sample.

    outputs: one array [n, ...] per output of the model. per_sample: float64 [n], or None for a metric that compares
    with a reference (only `compare` can give it). nonfinite: samples with a NaN or an infinity in any output.
    """

    metric: Metric
    outputs: Outputs
    per_sample: np.ndarray | None
    nonfinite: int

    @property
    def n(self) -> int:
        return len(self.outputs[0])

    @property
    def value(self) -> float | None:
        return None if self.per_sample is None else float(self.per_sample.mean())

    def take(self, indices: slice | Sequence[int] | np.ndarray) -> Evaluation:
        """The evaluation of these samples alone."""
        rows = indices if isinstance(indices, slice) else np.asarray(indices)
        outputs = tuple(output[rows] for output in self.outputs)
        per_sample = None if self.per_sample is None else self.per_sample[rows]
        return Evaluation(self.metric, outputs, per_sample, int((~finite_samples(outputs)).sum()))


def evaluate(
    function: Callable[..., Any],
    dataset: Dataset,
    metric: Metric | str,
    *,
    batch: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Run `function` over the dataset.

    function: a Program or a torch module, called with tensors and without gradients; anything else (`Bundle.run`) is
        called with NumPy arrays. It returns one array, or a tuple of them.
    batch: samples per call; default: the batch of a Program with a fixed one, 64 for other torch models, 1 for NumPy
        functions. Unless the model takes any batch, the last call is filled up with copies of the last sample.
    progress: called after each batch with the fraction done, 0..1.

    Raises EdgecError when the metric needs labels that are not there, or does not suit the outputs.
    """
    metric = parse_metric(metric)
    if metric.needs_labels and dataset.targets(slice(0, 1)) is None:
        raise EdgecError(
            f"{dataset.name} has no labels",
            where=f"metric {metric.name}",
            hint="add an array 'labels', or use agreement, cosine or sqnr",
        )
    call, size, fixed = _caller(function, batch)
    collected: list[Outputs] = []
    scores: list[np.ndarray] = []
    for start in range(0, len(dataset), size):
        rows = np.arange(start, min(start + size, len(dataset)))
        arrays, targets = dataset.read(rows)
        missing = size - len(rows) if fixed else 0
        if missing:
            arrays = tuple(np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for x in arrays)
        outputs = tuple(y[: len(rows)] for y in _batched(call(arrays), len(rows) + missing))
        if metric.needs_labels:
            scores.append(metric.per_sample(outputs, targets))
        collected.append(outputs)
        if progress is not None:
            progress((start + len(rows)) / len(dataset))
    joined = tuple(np.concatenate(parts) for parts in zip(*collected, strict=True))
    per_sample = np.concatenate(scores) if metric.needs_labels else None
    return Evaluation(metric, joined, per_sample, int((~finite_samples(joined)).sum()))


def _caller(function: Any, batch: int | None) -> tuple[Callable[[Outputs], Any], int, bool]:
    """(call with a tuple of arrays, batch size, whether every call must have exactly that size)."""
    if batch is not None and batch < 1:
        raise EdgecError(f"{batch} is not a batch size", where="evaluate(batch)")
    torch, program = sys.modules.get("torch"), sys.modules.get("edgec.program")
    is_program = program is not None and isinstance(function, program.Program)
    if not is_program and (torch is None or not isinstance(function, torch.nn.Module)):
        return lambda arrays: function(*arrays), batch or 1, True
    assert torch is not None

    def call(arrays: Outputs) -> Any:
        with torch.no_grad():
            return function(*(torch.from_numpy(x) for x in arrays))

    if is_program and not function.dynamic_batch:
        return call, int(function.example_inputs[0].shape[0]), True
    return call, batch or TORCH_BATCH, False


def _batched(result: Any, n: int) -> Outputs:
    """What a model returned, as arrays [n, ...]; with one sample, an output without a batch axis is given one."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    outputs = []
    for number, part in enumerate(parts):
        if isinstance(part, Mapping) or part is None or isinstance(part, (tuple, list)):
            raise EdgecError(
                f"output {number} is a {type(part).__name__}",
                where="model",
                hint="return a tensor or a tuple of tensors",
            )
        array = to_numpy(part)
        if n == 1 and array.shape[:1] != (1,):
            array = array[None]
        if array.shape[:1] != (n,):
            raise EdgecError(
                f"output {number} has shape {array.shape} for a batch of {n}",
                where="model",
                hint="the first dimension of every output must be the batch",
            )
        # A runner may hand out views of a buffer that the next call overwrites.
        outputs.append(array.copy())
    return tuple(outputs)


# -- comparison --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference on the same samples.

    value, reference: the metric of both, fraction 0..1 or in its unit. drop: in percentage points for fractions, else
    in the unit; positive means worse. ci95: 95 % confidence interval of the drop, None with fewer than two samples,
    with NaN, and for an evaluation compared with itself. cosine and sqnr_db: fidelity over all samples, of the worst
    output; sqnr_db is cut at +-CAP_DB. agreement: fraction of samples with the same largest class, for outputs
    [n, classes], else None. nonfinite: samples of the candidate with NaN or infinite outputs.
    """

    metric: Metric
    value: float
    reference: float
    drop: float
    ci95: tuple[float, float] | None
    n: int
    cosine: float
    sqnr_db: float
    agreement: float | None
    nonfinite: int
    reference_nonfinite: int


def compare(reference: Evaluation, candidate: Evaluation) -> Comparison:
    """Paired comparison of two evaluations on the same samples with the same metric.

    Raises EdgecError when they were made with another metric, on another number of samples, or have other shapes.
    """
    metric = reference.metric
    if metric.name != candidate.metric.name:
        raise EdgecError(f"{metric.name} cannot be compared with {candidate.metric.name}", where="compare")
    shapes = [[output.shape for output in side.outputs] for side in (reference, candidate)]
    if shapes[0] != shapes[1]:
        raise EdgecError(f"outputs have shapes {shapes[1]}, those of the reference {shapes[0]}", where="compare")
    before, after = _scores(reference, candidate)
    percent = 100.0 if metric.unit == FRACTION else 1.0
    losses = (before - after if metric.higher_better else after - before) * percent
    binary = metric.unit == FRACTION and bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    if binary:
        lost, won = int((losses > 0).sum()), int((losses < 0).sum())
        drop = 100.0 * (lost - won) / len(losses)
        low, high = paired_proportions_ci(lost, won, len(losses))
        ci95 = (100 * low, 100 * high)
    else:
        drop, ci95 = float(losses.mean()), paired_mean_ci(losses)
    if candidate is reference or len(losses) < 2:
        ci95 = None
    fidelity = [output_fidelity(a, b) for a, b in zip(reference.outputs, candidate.outputs, strict=True)]
    return Comparison(
        metric=metric,
        value=float(after.mean()),
        reference=float(before.mean()),
        drop=drop,
        ci95=ci95,
        n=candidate.n,
        cosine=float(np.min([cosine for cosine, _ in fidelity])),
        sqnr_db=float(np.min([sqnr for _, sqnr in fidelity])),
        agreement=_agreement(reference.outputs, candidate.outputs),
        nonfinite=candidate.nonfinite,
        reference_nonfinite=reference.nonfinite,
    )


def _scores(reference: Evaluation, candidate: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    if reference.per_sample is not None and candidate.per_sample is not None:
        return reference.per_sample, candidate.per_sample
    score = reference.metric.per_sample
    return score(reference.outputs, reference.outputs), score(candidate.outputs, reference.outputs)


def _agreement(reference: Outputs, candidate: Outputs) -> float | None:
    if _class_shape(reference[0].shape) is None:
        return None
    return float(Agreement().per_sample(candidate, reference).mean())
