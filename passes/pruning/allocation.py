"""How much to remove of each layer: pure functions from scores and sizes to rates.

A `LayerGrains` is one layer as allocation sees it. All functions return one rate (fraction of grains removed, 0..1) per
layer, in the order given; `removed` turns a rate into a count, which is always the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgec.errors import EdgecError

# Global rankings leave a layer at least this share of its grains: above about 95 % whole layers would vanish.
LEAST_KEPT = 0.02
# Common differences of ATP that are tried, as shares of the largest legal one.
SLOPES = (-0.5, -0.25, 0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
BISECTIONS = 100


@dataclass(frozen=True, eq=False)
class LayerGrains:
    """name: of the layer. scores: one per grain, [n], e.g. L1 norms. size: weights in a grain. shape: of the weight.

    least: grains that a global ranking leaves at least (one per output filter).
    """

    name: str
    scores: NDArray[np.float64]
    size: int
    shape: tuple[int, ...]
    least: int = 1

    @property
    def count(self) -> int:
        return len(self.scores)

    @property
    def weights(self) -> int:
        return self.count * self.size


def removed(rate: float, count: int) -> int:
    """Grains to remove: floor(rate * count). A rate is a decimal fraction: 0.29 of 100 are 29, not 28."""
    return math.floor(rate * count + 1e-9)


def mean_rate(layers: Sequence[LayerGrains], rates: Sequence[float]) -> float:
    """The share of all weights that these rates remove: the mean weighted by parameters."""
    total = sum(layer.weights for layer in layers)
    return sum(r * layer.weights for r, layer in zip(rates, layers, strict=True)) / max(1, total)


def check_mean(layers: Sequence[LayerGrains], rates: Sequence[float], sparsity: float) -> None:
    """Raise EdgecError unless every rate is in 0..1 and their mean, weighted by parameters, is `sparsity`.

    An unweighted mean silently changes how much is removed in all where layers differ in size.
    """
    for layer, rate in zip(layers, rates, strict=True):
        if not -1e-9 <= rate <= 1 + 1e-9:
            raise EdgecError(f"rate {rate:.4g} is not in 0..1", where=f"layer {layer.name}", hint="use a smaller slope")
    mean = mean_rate(layers, rates)
    if abs(mean - sparsity) > 1e-6:
        raise EdgecError(
            f"the rates remove {mean:.4f} of the weights, not {sparsity:.4f}",
            where="allocation",
            hint="weight their mean by the parameters of the layers",
        )


def uniform(layers: Sequence[LayerGrains], sparsity: float) -> list[float]:
    """The same rate for every layer."""
    return [sparsity] * len(layers)


def global_magnitude(layers: Sequence[LayerGrains], sparsity: float) -> list[float]:
    """One threshold on the mean magnitude of a grain for all layers.

    Every layer keeps at least max(`least`, 2 %) of its grains, the others make up for it.
    """
    return _global(layers, [layer.scores / layer.size for layer in layers], sparsity)


def lamp(layers: Sequence[LayerGrains], sparsity: float) -> list[float]:
    """One threshold on score^2 / (sum of score^2 of all grains of the layer that are not smaller).

    Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning". With grains of one weight exactly that.
    """
    return _global(layers, [lamp_scores(layer.scores) for layer in layers], sparsity)


def lamp_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """LAMP score of each grain, in the order given; the largest grain has 1. Equal grains: the later is larger."""
    order = np.argsort(scores, kind="stable")
    squares = np.square(scores[order])
    above = np.cumsum(squares[::-1])[::-1]
    found = np.empty(len(scores))
    found[order] = np.divide(squares, above, out=np.zeros(len(scores)), where=above > 0)
    return found


def _global(layers: Sequence[LayerGrains], scores: Sequence[NDArray[np.float64]], sparsity: float) -> list[float]:
    """Remove grains in the order of `scores` over all layers until `sparsity` of the weights would be exceeded."""
    budget = sparsity * sum(layer.weights for layer in layers) + 1e-9
    candidates = []
    for number, (layer, values) in enumerate(zip(layers, scores, strict=True)):
        kept = min(layer.count, max(layer.least, math.ceil(LEAST_KEPT * layer.count)))
        lowest = np.sort(values)[: layer.count - kept]
        candidates += [(value, number) for value in lowest.tolist()]
    counts = [0] * len(layers)
    for _, number in sorted(candidates):
        if layers[number].size <= budget:
            budget -= layers[number].size
            counts[number] += 1
    return [n / max(1, layer.count) for n, layer in zip(counts, layers, strict=True)]


def erk(layers: Sequence[LayerGrains], sparsity: float) -> list[float]:
    """Density proportional to (O + I + kh + kw) / (O I kh kw), at most 1 (Erdos-Renyi kernel).

    Evci et al., "Rigging the Lottery: Making All Tickets Winners".
    """
    ratios = [sum(layer.shape) / math.prod(layer.shape) for layer in layers]
    sizes = [layer.weights for layer in layers]
    kept = (1 - sparsity) * sum(sizes)
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(layers)) if i not in dense]
        if not rest:
            return [0.0] * len(layers)
        scale = (kept - sum(sizes[i] for i in dense)) / sum(ratios[i] * sizes[i] for i in rest)
        full = {i for i in rest if scale * ratios[i] > 1}
        if not full:
            return [0.0 if i in dense else 1 - scale * ratios[i] for i in range(len(layers))]
        dense |= full


# -- ATP ---------------------------------------------------------------------------------------------------------------


def atp(layers: Sequence[LayerGrains], sparsity: float, beta: float, units: Sequence[int] | None = None) -> list[float]:
    """Rates that rise by `beta` from one unit to the next, with `sparsity` as their mean weighted by parameters.

    units: number of the unit (residual block) of each layer; by default each layer is one. beta = 0 is `uniform` bit
    for bit. Raises EdgecError for a slope that leads out of 0..1.

    Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective" (ATP);
    there all layers are of one size and the plain mean is taken.
    """
    if beta == 0:
        return uniform(layers, sparsity)
    positions = _centred(layers, units)
    rates = [sparsity + beta * x for x in positions]
    check_mean(layers, rates, sparsity)
    return [min(1.0, max(0.0, r)) for r in rates]


def largest_beta(layers: Sequence[LayerGrains], sparsity: float, units: Sequence[int] | None = None) -> float:
    """The largest legal slope of `atp`; that of equal layers is min(2 S / (L - 1), 2 (1 - S) / (L - 1))."""
    return _reach(_centred(layers, units), sparsity)


def slopes(layers: Sequence[LayerGrains], sparsity: float, units: Sequence[int] | None = None) -> list[float]:
    """The slopes to search, both signs and 0 included."""
    positions = _centred(layers, units)
    up, down = _reach(positions, sparsity), _reach([-x for x in positions], sparsity)
    return sorted({round(share * (up if share > 0 else down), 12) for share in SLOPES})


def best_slope(
    layers: Sequence[LayerGrains],
    sparsity: float,
    loss: Callable[[list[float]], float],
    units: Sequence[int] | None = None,
) -> tuple[float, list[float]]:
    """(beta, rates) of the lowest `loss(rates)`, e.g. the KL to the dense model on calibration data."""
    found = []
    for beta in slopes(layers, sparsity, units):
        # a slope that was rounded up to the limit
        rates = atp(layers, sparsity, beta * (1 - 1e-9), units)
        found.append((loss(rates), abs(beta), beta, rates))
    _, _, beta, rates = min(found, key=lambda entry: entry[:3])
    return beta, rates


def _centred(layers: Sequence[LayerGrains], units: Sequence[int] | None) -> list[float]:
    """Positions of the layers, minus their mean weighted by parameters."""
    places = list(range(len(layers))) if units is None else list(units)
    sizes = [layer.weights for layer in layers]
    middle = sum(n * x for n, x in zip(sizes, places, strict=True)) / max(1, sum(sizes))
    return [x - middle for x in places]


def _reach(positions: Sequence[float], sparsity: float) -> float:
    """The largest factor b with 0 <= sparsity + b x <= 1 for all positions x."""
    limits = [(1 - sparsity) / x if x > 0 else sparsity / -x for x in positions if x]
    return min(limits, default=0.0)


# -- budget ------------------------------------------------------------------------------------------------------------


def lagrangian(
    damage: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], budget: float
) -> tuple[list[int], float]:
    """Choose one candidate for each layer: the least total damage whose total cost is within `budget`.

    damage[l][k], cost[l][k]: of candidate k of layer l, in any unit (MACs, bytes, measured time). Returns the choices
    and the multiplier: argmin of damage + multiplier * cost for each layer, the multiplier found by bisection, then
    single layers raised as far as the budget still allows. Raises EdgecError when the cheapest choice is too much.

    Everett, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources".
    """
    cheapest = sum(min(c) for c in cost)
    if cheapest > budget * (1 + 1e-12):
        raise EdgecError(f"the least possible cost is {cheapest:.4g}, above {budget:.4g}", where="allocation")

    def pick(multiplier: float) -> list[int]:
        return [
            min(range(len(d)), key=lambda k: (d[k] + multiplier * c[k], c[k], k))
            for d, c in zip(damage, cost, strict=True)
        ]

    def total(choice: Sequence[int]) -> float:
        return sum(c[k] for c, k in zip(cost, choice, strict=True))

    low, high = 0.0, 1.0
    best = pick(low)
    if total(best) > budget:
        while total(pick(high)) > budget:
            high *= 2
            if high > 1e300:  # equal damage at different cost needs no multiplier, but a limit
                break
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if total(pick(middle)) <= budget else (middle, high)
        best, low = pick(high), high
        if total(best) > budget:
            best = [min(range(len(c)), key=lambda k: (c[k], d[k])) for d, c in zip(damage, cost, strict=True)]
    return _fill(damage, cost, budget, best), low


def _fill(
    damage: Sequence[Sequence[float]], cost: Sequence[Sequence[float]], budget: float, choice: list[int]
) -> list[int]:
    """Spend what the hull of the curves leaves of the budget on the change that repairs most per cost, repeatedly."""
    left = budget - sum(c[k] for c, k in zip(cost, choice, strict=True))
    while True:
        changes = []
        for number, k in enumerate(choice):
            for other in range(len(damage[number])):
                gain, extra = damage[number][k] - damage[number][other], cost[number][other] - cost[number][k]
                if gain > 0 and extra <= left:
                    changes.append((gain / max(extra, 1e-30), -number, other, extra))
        if not changes:
            return choice
        _, number, other, extra = max(changes)
        choice[-number] = other
        left -= extra
