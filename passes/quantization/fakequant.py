"""The float graph computed as its integer form will compute it, with gradients: what learning passes optimise.

`FakeQuantGraph` evaluates a prepared graph node by node. Tensors that will be codes are rounded to their grid where the
integer graph rounds them (behind a fused clip, not before it; once per concatenation), weights by a `WeightQuantizer`
per layer. What it leaves out is smaller than a code, int32 biases and the rounding of multipliers; all the same,
results are judged on the integer graph, never on this one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec.passes.quantization.annotate import operand_nodes
from edgec.passes.quantization.operators import Kind, arguments
from edgec.passes.quantization.ptq import Prepared
from edgec.program import get_weight
from edgec.quantparams import SMALLEST_SCALE, QParams, quantize_weights, weight_range

# Kinds whose result gets a grid of its own; the others keep that of their operand.
GRIDDED = (Kind.LAYER, Kind.POOL, Kind.TABLE, Kind.PAIR, Kind.CONCAT)


class _FakeQuantize(torch.autograd.Function):
    """Arithmetic instead of `where`, which is ten times slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, x, scale, zero, low: int, high: int, gain: float):  # type: ignore[override]
        steps = x / scale
        lowest, highest = low - zero, high - zero
        codes = steps.round().clamp_(lowest, highest)
        ctx.save_for_backward(steps, codes, scale, lowest, highest)
        ctx.gain = gain
        return codes * scale

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        steps, codes, scale, lowest, highest = ctx.saved_tensors
        inside = (steps.clamp(lowest, highest) == steps).to(grad.dtype)
        of_x = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None, None, None
        # Outside, codes are the limits; inside, they are the rounded steps.
        slope = torch.addcmul(codes, steps, inside, value=-1).mul_(grad)
        return of_x, slope.sum_to_size(scale.shape) * ctx.gain, None, None, None, None


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int, gain: float = 1.0
) -> torch.Tensor:
    """scale * (clamp(rne(x / scale) + zero, low, high) - zero), differentiable in `x` and `scale`.

    scale > 0 and zero broadcast against `x`. With v = x / scale, the gradient passes to x where low <= v + zero <= high
    and is 0 elsewhere; that of scale is rne(v) - v inside, low - zero below, high - zero above, times `gain`.

    Esser et al., "Learned Step Size Quantization".
    """
    return _FakeQuantize.apply(x, scale, zero, low, high, gain)  # type: ignore[return-value]


def step_gain(elements: int, high: int) -> float:
    """1 / sqrt(N p), which makes the gradient of a step as large, relative to it, as that of the weights."""
    return 1.0 / math.sqrt(max(1, elements) * max(1, high))


# -- activations -------------------------------------------------------------------------------------------------------


class ActivationQuantizer:
    """Puts a tensor on the grid of `params`; the step can be learned, the zero point stays.

    The step is `params.scale` times a factor, which starts at 1 and is what the optimizer sees: learning rates then do
    not depend on the size of the values.
    """

    def __init__(self, params: QParams, channels: int | None = None) -> None:
        """channels: axes of the tensor, for a record with one scale per channel."""
        self.params = params
        scale, zero = (torch.tensor(v, dtype=torch.float32) for v in (params.scale, params.zero_point))
        if params.axis is not None:
            shape = [1] * (channels or 4)
            shape[params.axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        self.scale, self.zero = scale, zero
        self.factor = torch.ones_like(scale)

    def learn(self, on: bool) -> None:
        self.factor.requires_grad_(on)

    def reset(self) -> None:
        """Back to the step of `params`."""
        self.factor = torch.ones_like(self.scale)

    @property
    def step(self) -> torch.Tensor:
        return self.scale * self.factor.abs().clamp_min(1e-3)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gain = step_gain(x.numel() // self.factor.numel(), self.params.p - self.params.n)
        return fake_quantize(x, self.step, self.zero, self.params.n, self.params.p, gain)

    def result(self) -> QParams:
        """The record with the step as it is now."""
        step = self.step.detach().clamp_min(SMALLEST_SCALE)
        if torch.equal(self.factor.detach(), torch.ones_like(self.factor)):
            return self.params
        scale = float(step) if self.params.axis is None else tuple(float(s) for s in step.flatten())
        return dataclasses.replace(self.params, scale=scale, source=f"{self.params.source}, learned")


# -- weights -----------------------------------------------------------------------------------------------------------


class WeightQuantizer:
    """Weights of one layer on a symmetric grid with one scale per output channel, rounded to the nearest code.

    mask: pruned elements are False and stay code 0.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scales: np.ndarray,
        bits: int,
        full: bool = False,
        mask: torch.Tensor | None = None,
    ) -> None:
        self.weight, self.bits, self.full, self.mask = weight, bits, full, mask
        self.low, self.high = weight_range(bits, full)
        shape = (-1, *[1] * (weight.dim() - 1))
        self.scale = torch.from_numpy(np.asarray(scales, np.float32)).reshape(shape)
        self._nearest: torch.Tensor | None = None

    def parameters(self) -> list[torch.Tensor]:
        return []

    def __call__(self) -> torch.Tensor:
        """The real weights that the codes stand for."""
        if self._nearest is None:
            codes = quantize_weights(self.weight.numpy(), self.scales(), self.bits, self.full)
            self._nearest = torch.from_numpy(codes).to(torch.float32) * self.scale
        return self._nearest

    def scales(self) -> np.ndarray:
        """One float64 per output channel."""
        return self.scale.detach().flatten().numpy().astype(np.float64)

    def codes(self) -> np.ndarray:
        """int8, shape of the weight."""
        return quantize_weights(self.weight.detach().numpy(), self.scales(), self.bits, self.full)


class LearnedStepWeight(WeightQuantizer):
    """Weights and their steps are both learned: quantisation-aware training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = self.weight.clone().requires_grad_(True)
        self.start = self.scale
        self.factor = torch.ones_like(self.scale).requires_grad_(True)
        self.gain = step_gain(self.weight[0].numel(), self.high)

    def parameters(self) -> list[torch.Tensor]:
        return [self.weight]

    def __call__(self) -> torch.Tensor:
        step = self.start * self.factor.abs().clamp_min(1e-3)
        return fake_quantize(self.weight, step, torch.zeros(()), self.low, self.high, self.gain)

    def scales(self) -> np.ndarray:
        step = (self.start * self.factor.detach().abs().clamp_min(1e-3)).clamp_min(SMALLEST_SCALE)
        return step.flatten().numpy().astype(np.float64)


class RoundingWeight(WeightQuantizer):
    """Each weight is rounded up or down as is learned; scales stay.

    W = s clamp(floor(w / s) + h(V), n, p), h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1), started so that the
    soft weights are the float ones. Weights outside the range have no choice, and pruned ones get none.

    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization".
    """

    ZETA, GAMMA = 1.1, -0.1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        steps = self.weight / self.scale
        self.floor = torch.floor(steps)
        free = (self.floor >= self.low) & (self.floor < self.high)
        self.free = free if self.mask is None else free & self.mask
        if self.mask is not None:
            self.floor = self.floor * self.mask
        span = self.ZETA - self.GAMMA
        fraction = (steps - self.floor).clamp(0.0, 1.0)
        self.v = torch.log(span / (fraction - self.GAMMA) - 1).neg_().requires_grad_(True)

    def parameters(self) -> list[torch.Tensor]:
        return [self.v]

    def soft(self) -> torch.Tensor:
        """h(V): between 0, down, and 1, up."""
        return (torch.sigmoid(self.v) * (self.ZETA - self.GAMMA) + self.GAMMA).clamp(0.0, 1.0)

    def penalty(self, beta: float) -> torch.Tensor:
        """sum of 1 - |2h - 1|^beta over the weights that have a choice: 0 when all are decided."""
        undecided = 1 - (2 * self.soft() - 1).abs().pow(beta)
        return (undecided * self.free).sum()

    def undecided(self) -> float:
        """Mean of min(h, 1 - h) over the weights that have a choice."""
        with torch.no_grad():
            h = self.soft()[self.free]
            return float(torch.minimum(h, 1 - h).mean()) if h.numel() else 0.0

    def __call__(self) -> torch.Tensor:
        return (self.floor + self.soft() * self.free).clamp(self.low, self.high) * self.scale

    def codes(self) -> np.ndarray:
        with torch.no_grad():
            up = (self.v >= 0) & self.free
            return (self.floor + up).clamp(self.low, self.high).to(torch.int8).numpy()


class FixedWeight(WeightQuantizer):
    """Codes that are decided."""

    def __init__(self, like: WeightQuantizer, codes: np.ndarray) -> None:
        super().__init__(like.weight, like.scales(), like.bits, like.full, like.mask)
        self.decided = codes
        self._nearest = torch.from_numpy(codes).to(torch.float32) * self.scale

    def codes(self) -> np.ndarray:
        return self.decided


# -- the graph ---------------------------------------------------------------------------------------------------------

Values = dict[fx.Node, Any]
# (value, quantizer) -> the value as it is read
Rounder = Callable[[torch.Tensor, ActivationQuantizer], torch.Tensor]


def rounded(value: torch.Tensor, quantizer: ActivationQuantizer) -> torch.Tensor:
    return quantizer(value)


class FakeQuantGraph:
    """A prepared graph with a quantizer for each tensor that becomes codes and for each layer's weights.

    observed, weights: tensors and layers that are missing stay float. Stored tensors that a sum or product reads keep
    their exact values: 8 bits always hold them well. stored: tensors that take the place of stored ones, by path.
    """

    def __init__(
        self,
        prepared: Prepared,
        observed: Mapping[fx.Node, QParams],
        weights: Mapping[fx.Node, WeightQuantizer],
    ) -> None:
        self.prepared, self.module = prepared, prepared.module
        self.nodes: list[fx.Node] = list(self.module.graph.nodes)
        self.weights = dict(weights)
        self.stored: dict[str, torch.Tensor] = {}
        annotation = prepared.annotation
        self.activations = {n: ActivationQuantizer(p, len(n.meta["val"].shape)) for n, p in observed.items()}
        self.on_result: dict[fx.Node, ActivationQuantizer] = {}
        for node, kind in annotation.kinds.items():
            quantizer = self.activations.get(annotation.observed(node))
            if kind in GRIDDED and node not in annotation.real and quantizer is not None:
                self.on_result[annotation.result(node)] = quantizer
        self.on_read: dict[fx.Node, ActivationQuantizer] = {
            n: self.activations[n] for n in annotation.boundary(self.module.graph) if n in self.activations
        }
        self._operands = {n: set(operand_nodes(n)) & set(self.on_read) for n in annotation.kinds}

    def run(
        self,
        nodes: Iterable[fx.Node],
        values: Values,
        *,
        quantised: bool = True,
        rounder: Rounder = rounded,
    ) -> None:
        """Evaluate calls, in graph order, into `values`, which holds what they read; stored tensors come by themselves.

        quantised: False gives the float graph. rounder: how tensors are put on their grids, for passes that round only
        a part.
        """
        for node in nodes:
            if node.op == "call_function":
                values[node] = self._call(node, values, quantised, rounder)

    def _call(self, node: fx.Node, values: Values, quantised: bool, rounder: Rounder) -> Any:
        if not quantised:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._read(n, values))
            return node.target(*args, **kwargs)  # type: ignore[operator]
        read = self.reads(node)
        weight = self.weights.get(node)
        stored = arguments(node)["weight"] if weight is not None else None

        def value(n: fx.Node) -> Any:
            if n is stored and weight is not None:
                return weight()
            return rounder(values[n], self.on_read[n]) if n in read else self._read(n, values)

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        quantizer = self.on_result.get(node)
        return result if quantizer is None else rounder(result, quantizer)

    def reads(self, node: fx.Node) -> set[fx.Node]:
        """The float tensors that a node reads as codes."""
        return self._operands.get(node, set())

    def _read(self, node: fx.Node, values: Values) -> Any:
        if node.op != "get_attr":
            return values[node]
        path = str(node.target)
        return self.stored[path] if path in self.stored else get_weight(self.module, node)

    def __call__(self, *inputs: torch.Tensor, quantised: bool = True) -> tuple[torch.Tensor, ...]:
        """The graph's outputs, a tuple."""
        given: Sequence[fx.Node] = [n for n in self.nodes if n.op == "placeholder"]
        values: Values = dict(zip(given, inputs, strict=True))
        remaining = {n: len(n.users) for n in self.nodes}
        for node in self.nodes:
            self.run((node,), values, quantised=quantised)
            if node.op == "call_function":
                for source in node.all_input_nodes:
                    remaining[source] -= 1
                    if remaining[source] == 0:
                        values.pop(source, None)
        (out,) = [n for n in self.nodes if n.op == "output"]
        flat, _ = torch.utils._pytree.tree_flatten(out.args[0])  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(values[n] for n in flat)

    def results(self) -> dict[fx.Node, QParams]:
        """The parameters of every observed tensor, with learned steps."""
        return {node: quantizer.result() for node, quantizer in self.activations.items()}
