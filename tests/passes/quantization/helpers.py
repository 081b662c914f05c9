"""Running quantised Programs by their definition in NumPy, and layer by layer against real arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from edgec import integer
from edgec.data import load_data
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.operators import arguments
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.program import Program, get_weight
from edgec.quantparams import QParams

edgec = torch.ops.edgec


def is_layer(node: fx.Node) -> bool:
    """True for an int8 convolution or linear layer, whatever its result is."""
    return node.target in (*_CODE_LAYERS, *_REAL_LAYERS)


@dataclass(frozen=True)
class Result:
    before: Program
    after: Program
    context: Context
    samples: torch.Tensor

    @property
    def operators(self) -> list[str]:
        """Operators in graph order, without namespace and overload: `qconv2d`, `reshape`."""
        calls = [n.target for n in self.after.graph.nodes if n.op == "call_function"]
        return [t.__name__.partition(".")[0] for t in calls]

    @property
    def error(self) -> float:
        """Root mean square of the difference of the outputs, relative to that of the float output."""
        total = sum(float((a - b).square().sum()) for a, b in self._pairs())
        return (total / sum(float(a.square().sum()) for a, _ in self._pairs())) ** 0.5

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.before(self.samples), self.after(self.samples), strict=True)


def quantised(model: nn.Module | Program, samples: torch.Tensor, fold: bool = True, **options: Any) -> Result:
    """Fold batch norms and quantise with `samples` as calibration data."""
    if isinstance(model, nn.Module):
        model = load_model(model.eval(), input_shape=(1, *samples.shape[1:]))
    before = FoldBN().run(model, Context()) if fold else model
    context = Context(calibration=load_data(samples.numpy(), before.inputs))
    return Result(before, QuantizeInt8(**options).run(before, context), context, samples)


def noise(*shape: int, seed: int = 0, low: float = -1.0) -> torch.Tensor:
    return low + (1 - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class ByDefinition(fx.Interpreter):
    """Runs a graph with `edgec.integer` in the place of the torch operators; everything else stays torch."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") != "edgec":
            return super().call_function(target, args, kwargs)
        plain = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
        return torch.from_numpy(getattr(integer, target._schema.name.partition("::")[2])(*plain))


class LayerByLayer(fx.Interpreter):
    """Compares every int8 operator with real arithmetic on the same input codes: |difference| in codes, by node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.records = program.annotations
        self.differences: dict[str, np.ndarray] = {}

    def run_node(self, n: fx.Node) -> Any:
        got = super().run_node(n)
        real = self._real(n)
        if real is not None and n.target in _REAL_LAYERS:
            # In units of what float32 may lose: accumulator, scale and product have 24 bits each.
            self.differences[n.name] = ((got - real).abs() / (2.0**-22 * real.abs().max())).numpy().astype(int)
        elif real is not None:
            record = self.records[n.name]
            scale, zero = (torch.as_tensor(v, dtype=torch.float64) for v in (record.scale, record.zero_point))
            if record.axis is not None:
                scale, zero = (v.view(-1, *[1] * (real.dim() - 1 - record.axis)) for v in (scale, zero))
            given = arguments(n)
            want = (torch.round(real / scale) + zero).clamp(given.get("lo", -128), given.get("hi", 127))
            self.differences[n.name] = (got - want).abs().numpy()
        return got

    def _real(self, n: fx.Node) -> torch.Tensor | None:
        """The real value of an int8 operator, in float64, from the codes that it reads."""
        if getattr(n.target, "namespace", "") != "edgec" or n.target in _BORDERS:
            return None
        given = {k: self.env[v] if isinstance(v, fx.Node) else v for k, v in arguments(n).items()}
        x = n.args[0]
        value = self._reals(x)
        if n.target in (*_CODE_LAYERS, *_REAL_LAYERS):
            _, w, bias = (n.args[i] for i in range(3))
            weights, biases = self._layer(x, w, bias)
            y = self.records.get(n.name)
            if y is not None and y.axis is not None:  # zero points per channel are part of the bias
                biases = biases - torch.tensor(y.scale, dtype=torch.float64) * torch.tensor(y.zero_point)
            if n.target in (edgec.qlinear.default, edgec.qlinear_float.default):
                return F.linear(value, weights, biases)
            top, bottom, left, right = given["padding"]
            padded = F.pad(value, (left, right, top, bottom))
            return F.conv2d(padded, weights, biases, given["stride"], 0, given["dilation"], given["groups"])
        if n.target is edgec.qadd.default:
            # The factor of torch.add(alpha=...) is part of the multiplier.
            alpha = given["mb"] * 2.0 ** -given["f"] * self._scale(n) / self._scale(n.args[1])
            return value + round(alpha, 3) * self._reals(n.args[1])
        if n.target is edgec.qmul.default:
            return value * self._reals(n.args[1])
        if n.target is edgec.qrescale.default:
            return value
        # So is the divisor of an average.
        count = round(self._scale(x) / (self._scale(n) * given["m"] * 2.0 ** -given["shift"]))
        if n.target is edgec.qmean.default:
            return value.sum(given["dim"], given["keepdim"]) / count
        top, bottom, left, right = given["padding"]
        padded = F.pad(value, (left, right, top, bottom))
        return F.avg_pool2d(padded, given["kernel"], given["stride"], divisor_override=count)

    def _scale(self, node: Any) -> float:
        return self.records[str(node.target) if node.op == "get_attr" else node.name].per_tensor[0]

    def _layer(self, x: Any, w: Any, bias: Any) -> tuple[torch.Tensor, torch.Tensor]:
        record = self.records[str(w.target)]
        codes = get_weight(self.module, w).to(torch.float64)
        scales = torch.tensor(record.scale, dtype=torch.float64)
        x_scale, x_zero = self.records[x.name].per_tensor
        unfolded = get_weight(self.module, bias) + x_zero * codes.flatten(1).sum(1)
        return codes * scales.view(-1, *[1] * (codes.dim() - 1)), unfolded * x_scale * scales

    def _reals(self, node: Any) -> torch.Tensor:
        key = str(node.target) if node.op == "get_attr" else node.name
        scale, zero = self.records[key].per_tensor
        return (self.env[node].to(torch.float64) - zero) * scale


_CODE_LAYERS = (edgec.qconv2d.default, edgec.qlinear.default)
_REAL_LAYERS = (edgec.qconv2d_float.default, edgec.qlinear_float.default)
_BORDERS = (edgec.quantize.default, edgec.dequantize.default, edgec.qlut.default, edgec.qmax_pool2d.default)


def by_definition(program: Program, inputs: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(ByDefinition(program.module).run(inputs))


def differences(program: Program, inputs: torch.Tensor) -> dict[str, np.ndarray]:
    checker = LayerByLayer(program)
    with torch.no_grad():
        checker.run(inputs)
    return checker.differences


def records(program: Program) -> dict[str, QParams]:
    return {k: v for k, v in program.annotations.items() if isinstance(v, QParams)}
