"""Rewrite an annotated graph with int8 operators.

Every int8 node `n` of the float graph gets a node `n_q` that holds its codes, and a record of what the codes mean.
Float nodes that need codes get `n_q` by `edgec::quantize`, int8 nodes with float readers get `n_dq` by
`edgec::dequantize`; where only float nodes read a layer, its `n_q` has a float result. The inputs and outputs of the
graph stay float.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec import integer, qops  # noqa: F401  (registers the operators)
from edgec.errors import EdgecError
from edgec.passes.quantization.annotate import Annotation, operand_nodes
from edgec.passes.quantization.operators import (
    CONV2D,
    IDENTITIES,
    Kind,
    arguments,
    aten,
    clip_limits,
    conv_geometry,
    has_channel_tables,
    operand,
    pair,
    scalar_of,
    spatial_padding,
    upsample_factors,
)
from edgec.program import constant_of, get_weight, is_call, layer_of, origin_of, shape_of, weight_node
from edgec.quantparams import QParams, affine, quantize_weights, symmetric_scales, weight_range
from edgec.sparsity import Carrier

edgec = torch.ops.edgec

# Operators whose last two arguments are their smallest and largest code.
CLIPPING = tuple(
    getattr(edgec, name).default for name in ("qconv2d", "qlinear", "qadd", "qmul", "qmean", "qavg_pool2d", "qrescale")
)

# weights, output channels first -> one scale per output channel
Scales = Callable[[np.ndarray], np.ndarray]
# (weights, scales of axis 0) -> int8 codes
Rounding = Callable[[np.ndarray, np.ndarray], np.ndarray]

# A bias beyond 2^30 steps of its scale makes the weights of its channel coarser instead.
LARGEST_BIAS = 2.0**30


@dataclass(frozen=True)
class WeightRule:
    """How the weights of one layer become codes of `bits` bits; full: code -2^(bits-1) may occur.

    source: where the scales come from, for the QParams record.
    """

    scales: Scales
    rounding: Rounding
    bits: int = 8
    full: bool = False
    source: str = ""

    def codes(self, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Raises AssertionError when the rounding gives a code that does not exist in so many bits."""
        codes = self.rounding(weights, scales)
        low, high = weight_range(self.bits, self.full)
        assert codes.dtype == np.int8 and codes.min(initial=0) >= low and codes.max(initial=0) <= high
        return codes


def int8_rule(per_channel: bool = True, rounding: Rounding = quantize_weights) -> WeightRule:
    """Eight bits that reach the largest weight, of the channel or of the layer."""
    source = "max|w|" if per_channel else "max|w| of the tensor"
    return WeightRule(lambda weights: symmetric_scales(weights, per_channel), rounding, source=source)


class Converter:
    """Rewrites `module` in place.

    observed: the parameters of each node of `Annotation.ranged`; their `n` and `p` limit the codes. rule: how the
    weights of a layer, given by its float node, are rounded.

    Afterwards `records` holds the QParams of every new tensor and weight by name, `layers` the float layer that each
    int8 layer was made from. Sparsity records in `masks` follow their weights: zero has code 0.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        annotation: Annotation,
        observed: Mapping[fx.Node, QParams],
        rule: Callable[[fx.Node], WeightRule] = lambda node: int8_rule(),
        requant: str = "RQ1",
        masks: Carrier | None = None,
    ) -> None:
        self.module, self.graph = module, module.graph
        self.annotation, self.observed = annotation, observed
        self.rule, self.requant = rule, requant
        self.masks = Carrier({}) if masks is None else masks
        self.codes: dict[fx.Node, fx.Node] = {}
        self.meaning: dict[fx.Node, QParams] = {}
        self.reals: dict[fx.Node, fx.Node] = {}
        self.records: dict[str, QParams] = {}
        self.layers: dict[fx.Node, fx.Node] = {}

    def convert(self) -> dict[str, QParams]:
        """Rewrite the graph. Raises EdgecError, naming the layer, for scales that integers cannot express."""
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if node in self.annotation.kinds:
                    self._emit(node)
                elif is_call(node, aten.sym_size.int) and node.args[0] in self.codes:
                    node.args = (self.codes[operand(node)], *node.args[1:])
                else:
                    self._read_reals(node)
        for node in reversed(self.annotation.kinds):  # torch would keep an unused dropout
            self.graph.erase_node(node)
        return self.records

    # -- borders -------------------------------------------------------------------------------------------------------

    def _read_reals(self, node: fx.Node) -> None:
        """Give a float node real numbers instead of the int8 nodes that it reads."""
        for source in node.all_input_nodes:
            if self.annotation.is_int8(source):
                node.replace_input_with(source, self._real(source))

    def _real(self, source: fx.Node) -> fx.Node:
        if source not in self.reals:
            codes = self._codes(source)
            args = (codes, *self.meaning[source].per_tensor)
            self.reals[source] = self._call(edgec.dequantize.default, args, source, f"{source.name}_dq")
        return self.reals[source]

    def _codes(self, source: fx.Node) -> fx.Node:
        """The int8 node for `source`; float nodes are quantised on first use."""
        if source in self.codes:
            return self.codes[source]
        params = self._params(source)
        made = self._quantized(source, params)
        self.codes[source], self.meaning[source] = made, params
        return made

    def _quantized(self, source: fx.Node, params: QParams) -> fx.Node:
        """Codes of a float node or a stored tensor."""
        if is_call(source, edgec.dequantize.default) and source.args[1:] == params.per_tensor:
            return operand(source)
        if source.op == "get_attr":
            stored = integer.quantize(get_weight(self.module, source).numpy(), *params.per_tensor)
            stored = np.clip(stored, params.n, params.p)
            made = self._store(f"{source.target}_q", torch.from_numpy(stored))
            self.records[str(made.target)] = params
        else:
            made = self._call(edgec.quantize.default, (source, *params.per_tensor), source)
            if params.bits < 8:
                self.records[made.name] = dataclasses.replace(params, bits=8, n=integer.QMIN, p=integer.QMAX)
                made = self._call(aten.clamp.default, (made, params.n, params.p), source, f"{source.name}_q_clamp")
            self.records[made.name] = params
        return made

    def _params(self, node: fx.Node) -> QParams:
        """What the codes of `node` mean."""
        if node in self.meaning:
            return self.meaning[node]
        if node.op == "get_attr" and node not in self.observed:
            tensor = get_weight(self.module, node)
            return affine(float(tensor.min()), float(tensor.max()), source=str(node.target))
        return self.observed[node if node.op == "get_attr" else self.annotation.observed(node)]

    # -- int8 nodes ----------------------------------------------------------------------------------------------------

    def _emit(self, node: fx.Node) -> None:
        if self.annotation.producer(node) is not node:
            return  # a clip that its producer contains
        kind = self.annotation.kinds[node]
        emit = {
            Kind.LAYER: self._layer,
            Kind.POOL: self._average,
            Kind.TABLE: self._table,
            Kind.PAIR: self._pair,
            Kind.CONCAT: self._concat,
            Kind.CLIP: self._clip,
            Kind.SHARE: self._share,
            Kind.SCALE: self._scale,
        }[kind]
        try:
            emit(node)
        except EdgecError as error:
            layer = layer_of(node)
            raise EdgecError(error.what, where=f"layer {layer}", hint=f"add keep_float=[{layer}]") from error

    def _finish(self, node: fx.Node, codes: fx.Node, params: QParams) -> None:
        """Declare `codes` to be the int8 form of the value of `node` and of the clip that is part of it."""
        for value in (node, self.annotation.result(node)):
            self.codes[value], self.meaning[value] = codes, params
        self.records[codes.name] = params

    def _output(self, node: fx.Node) -> tuple[QParams, int, int]:
        """(params, lo, hi) of a computing node; lo and hi are the codes of its clip."""
        result = self.annotation.result(node)
        params = self._params(result)
        limits = clip_limits(result) if result is not node else None
        return params, *_limits(params, limits or (-math.inf, math.inf))

    def _layer(self, node: fx.Node) -> None:
        given = arguments(node)
        source, folded = given["input"], [0, 0, 0, 0]
        geometry = None
        if is_call(node, *CONV2D):
            geometry = conv_geometry(node)
            before = spatial_padding(source) if self.annotation.is_int8(source) else None
            if before is not None:
                source, folded = operand(source), before
        x = self._codes(source)
        x_scale, x_zero = self.meaning[source].per_tensor
        if geometry is not None:
            stride, padding, dilation, groups = geometry
            padding = [p + f for p, f in zip(padding, folded, strict=True)]
            geometry = (stride, padding, dilation, groups, x_zero)
        if node in self.annotation.real:
            weights, bias, scales = self._integers(node, x_scale, x_zero)
            path = f"{given['weight'].target}_q_scale"
            scale = self._store(path, torch.from_numpy((x_scale * scales).astype(np.float32)))
            target = edgec.qlinear_float.default if geometry is None else edgec.qconv2d_float.default
            made = self._call(target, (x, weights, bias, scale, *(geometry or ())), node)
            self.layers[made] = node
            self.reals[node] = made
            return
        if self.annotation.channel_axis(node) is None:
            params, lo, hi = self._output(node)
            y_scale, y_zero = params.per_tensor
            constants = self._constants(node, x_scale, x_zero, np.array(y_scale))
        else:
            # A zero point per channel is a bias: codes are (real + scale * zero) / scale.
            params, y_zero = self._params(node), 0
            lo, hi = params.n, params.p
            y_scales, zeros = np.array(params.scale), np.array(params.zero_point)
            constants = self._constants(node, x_scale, x_zero, y_scales, y_scales * zeros)
        target = edgec.qlinear.default if geometry is None else edgec.qconv2d.default
        made = self._call(target, (x, *constants, *(geometry or ()), y_zero, lo, hi), node)
        self.layers[made] = node
        self._finish(node, made, dataclasses.replace(params, requant=self.requant))

    def _constants(
        self, node: fx.Node, x_scale: float, x_zero: int, y_scale: np.ndarray, offset: np.ndarray | float = 0.0
    ) -> tuple[fx.Node, ...]:
        """(weights, bias, m, shift) of a layer whose bias is raised by `offset`, stored beside its float weights."""
        weights, bias, scales = self._integers(node, x_scale, x_zero, offset)
        path = str(arguments(node)["weight"].target)
        values = integer.multipliers(x_scale * scales / y_scale, self.requant)
        names = (f"{path}_q_m", f"{path}_q_shift")
        return weights, bias, *(self._store(n, torch.from_numpy(v)) for n, v in zip(names, values, strict=True))

    def _integers(
        self, node: fx.Node, x_scale: float, x_zero: int, offset: np.ndarray | float = 0.0
    ) -> tuple[fx.Node, fx.Node, np.ndarray]:
        """(weights, bias, scales of the weights) of a layer; the first two are stored."""
        given = arguments(node)
        path = str(given["weight"].target)
        weights = get_weight(self.module, given["weight"]).numpy()
        given_bias = constant_of(self.module, given["bias"])
        bias = offset + (np.zeros(len(weights)) if given_bias is None else given_bias.numpy().astype(np.float64))
        # The bias of a dead or nearly dead channel must still fit int32.
        rule = self.rule(node)
        scales = np.maximum(rule.scales(weights), np.abs(bias) / (x_scale * LARGEST_BIAS))
        codes = rule.codes(weights, scales)
        record = self.masks.records.get(path)
        if record is not None:
            # Learned rounding may round a zero up.
            codes = np.where(record.mask.numpy(), codes, np.int8(0))
        sums = integer.bias_codes(bias, codes, x_scale, x_zero, scales)
        stored = self._store(f"{path}_q", torch.from_numpy(codes))
        self.masks.move(path, str(stored.target))
        biases = self._store(f"{path}_q_bias", torch.from_numpy(sums))
        low, high = weight_range(rule.bits, rule.full)
        self.records[str(stored.target)] = QParams(
            tuple(float(s) for s in scales),
            (0,) * len(scales),
            bits=rule.bits,
            n=low,
            p=high,
            granularity="channel",
            axis=0,
            source=rule.source,
        )
        return stored, biases, scales

    def _average(self, node: fx.Node) -> None:
        source = operand(node)
        x, given, shape = self._codes(source), arguments(node), shape_of(source)
        x_scale, x_zero = self.meaning[source].per_tensor
        params, lo, hi = self._output(node)
        y_scale, y_zero = params.per_tensor
        if is_call(node, aten.mean.dim):
            dims, keep = [d % len(shape) for d in given["dim"]], bool(given["keepdim"])
            count = int(np.prod([shape[d] for d in dims]))
        elif is_call(node, aten.adaptive_avg_pool2d.default):
            dims, keep = [2, 3], True
            kernel = stride = [shape[i] // shape_of(node)[i] for i in (2, 3)]
            padding, count = [0, 0, 0, 0], kernel[0] * kernel[1]
            if shape_of(node)[2:] != (1, 1):
                dims = []
        else:
            dims, keep = [], False
            kernel = list(pair(given["kernel_size"]))
            stride = list(pair(given["stride"] or kernel))
            top, left = pair(given["padding"])
            padding, count = [top, top, left, left], given["divisor_override"] or kernel[0] * kernel[1]
        m, shift = integer.quantize_multiplier(x_scale / (y_scale * count))
        if dims:
            args = (x, dims, keep, m, shift, x_zero, y_zero, lo, hi)
            made = self._call(edgec.qmean.default, args, node)
        else:
            args = (x, kernel, stride, padding, m, shift, x_zero, y_zero, lo, hi)
            made = self._call(edgec.qavg_pool2d.default, args, node)
        self._finish(node, made, params)

    def _table(self, node: fx.Node) -> None:
        (source,) = operand_nodes(node)
        x = self._codes(source)
        params, _, _ = self._output(node)
        channels = shape_of(node)[1] if has_channel_tables(node) else None

        def function(values: np.ndarray) -> np.ndarray:
            reals = torch.from_numpy(values)
            if channels is None:
                return self._evaluate(node, source, reals).numpy()
            return self._evaluate(node, source, reals.expand(1, channels, -1))[0].numpy()

        meaning = self.meaning[source]
        table = integer.lut_table(function, meaning.scale, meaning.zero_point, *params.per_tensor)
        table = np.clip(table, params.n, params.p)
        stored = self._store(f"tables.{node.name}", torch.from_numpy(table))
        args = (x, stored, 0 if channels is None else 1)
        self._finish(node, self._call(edgec.qlut.default, args, node), params)

    def _evaluate(self, node: fx.Node, source: fx.Node, reals: torch.Tensor) -> torch.Tensor:
        """The node's own operator on float64 values in the place of `source`."""

        def value(argument: Any) -> Any:
            if argument is source:
                return reals
            if isinstance(argument, fx.Node):
                tensor = get_weight(self.module, argument).to(torch.float64)
                return tensor.reshape(()) if tensor.numel() == 1 and not is_call(node, aten.prelu.default) else tensor
            return argument

        args = [value(a) for a in node.args]
        kwargs = {k: value(v) for k, v in node.kwargs.items()}
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _pair(self, node: fx.Node) -> None:
        a, b = node.args[0], node.args[1]
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        codes = self._codes(a), self._codes(b)
        (a_scale, a_zero), (b_scale, b_zero) = self.meaning[a].per_tensor, self.meaning[b].per_tensor
        params, lo, hi = self._output(node)
        y_scale, y_zero = params.per_tensor
        if is_call(node, aten.mul.Tensor):
            m, shift = integer.quantize_multiplier(a_scale * b_scale / y_scale)
            args = (*codes, m, shift, a_zero, b_zero, y_zero, lo, hi)
            target = edgec.qmul.default
        else:
            factor = float(arguments(node)["alpha"]) * (-1.0 if is_call(node, aten.sub.Tensor) else 1.0)
            ma, mb, f = integer.add_parameters(a_scale, factor * b_scale, y_scale)
            args = (*codes, ma, mb, f, a_zero, b_zero, y_zero, lo, hi)
            target = edgec.qadd.default
        self._finish(node, self._call(target, args, node), params)

    def _concat(self, node: fx.Node) -> None:
        params, _, _ = self._output(node)
        parts = [self._rescaled(source, params) for source in operand_nodes(node)]
        made = self._call(aten.cat.default, (parts, arguments(node)["dim"]), node)
        self._finish(node, made, params)

    def _rescaled(self, source: fx.Node, params: QParams) -> fx.Node:
        """Codes of `source` with the scale and zero point of `params`."""
        if not self.annotation.is_int8(source):
            return self._quantized(source, params)
        codes = self._codes(source)
        (x_scale, x_zero), (y_scale, y_zero) = self.meaning[source].per_tensor, params.per_tensor
        if (x_scale, x_zero) == (y_scale, y_zero) and self.meaning[source].bits <= params.bits:
            return codes
        m, shift = integer.quantize_multiplier(x_scale / y_scale)
        args = (codes, m, shift, x_zero, y_zero, params.n, params.p)
        made = self._call(edgec.qrescale.default, args, source, f"{source.name}_rescaled")
        self.records[made.name] = params
        return made

    def _clip(self, node: fx.Node) -> None:
        source, limits = operand(node), clip_limits(node)
        assert limits is not None
        codes = self._codes(source)
        params = self.meaning[source]
        lo, hi = _limits(params, limits)
        inside = self._clips_itself(codes)
        if inside:
            # Its last arguments are the limits of its codes.
            codes.args = (*codes.args[:-2], max(lo, codes.args[-2]), min(hi, codes.args[-1]))  # type: ignore[type-var]
        if inside or (lo, hi) == (params.n, params.p):  # limits that all codes keep
            self.codes[node], self.meaning[node] = codes, params
            return
        self._finish(node, self._call(aten.clamp.default, (codes, lo, hi), node), params)

    def _clips_itself(self, codes: fx.Node) -> bool:
        """Whether a kernel that limits its codes made them, and they are for nothing but what is done to them next."""
        alone = all(len(value.users) == 1 for value, made in self.codes.items() if made is codes)
        return is_call(codes, *CLIPPING) and alone and not codes.users

    def _scale(self, node: fx.Node) -> None:
        (source,) = operand_nodes(node)
        codes = self._codes(source)
        numbers = [scalar_of(self.module, a) for a in node.args[:2] if a is not source]
        assert len(numbers) == 1 and numbers[0] is not None
        scale, zero = self.meaning[source].per_tensor
        scale = scale / numbers[0] if is_call(node, aten.div.Tensor) else scale * numbers[0]
        params = dataclasses.replace(self.meaning[source], scale=float(np.float32(scale)), zero_point=zero)
        self.codes[node], self.meaning[node] = codes, params

    def _share(self, node: fx.Node) -> None:
        source = operand(node)
        codes = self._codes(source)
        params = self.meaning[source]
        if is_call(node, *IDENTITIES):
            self.codes[node], self.meaning[node] = codes, params
            return
        self._finish(node, self._moved(node, codes, params.per_tensor[1]), params)

    def _moved(self, node: fx.Node, codes: fx.Node, zero: int) -> fx.Node:
        given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
        if is_call(node, aten.pad.default):
            return self._call(aten.constant_pad_nd.default, (codes, given["pad"], zero), node)
        if is_call(node, aten.max_pool2d.default):
            kernel, dilation = list(pair(given["kernel_size"])), list(pair(given["dilation"]))
            stride = list(pair(given["stride"] or kernel))
            top, left = pair(given["padding"])
            args = (codes, kernel, stride, [top, top, left, left], dilation, bool(given["ceil_mode"]))
            return self._call(edgec.qmax_pool2d.default, args, node)
        if is_call(node, aten.upsample_nearest2d.vec):
            return self._upsampled(node, codes)
        # Codes may lie in memory in another order than the floats that `view` was written for.
        views = (aten.view.default, aten._unsafe_view.default)
        target = aten.reshape.default if is_call(node, *views) else node.target
        return self._call(target, (codes, *node.args[1:]), node, kwargs=node.kwargs)

    def _upsampled(self, node: fx.Node, codes: fx.Node) -> fx.Node:
        """Nearest-neighbour upsampling by whole numbers as two repetitions, which int8 tensors know."""
        factors = upsample_factors(node)
        assert factors is not None
        _, channels, rows, columns = shape_of(node)
        tall = self._call(aten.unsqueeze.default, (codes, 3), node, f"{node.name}_rows")
        wide = self._call(aten.unsqueeze.default, (tall, 5), node, f"{node.name}_columns")
        size = [-1, -1, -1, factors[0], -1, factors[1]]
        repeated = self._call(aten.expand.default, (wide, size), node, f"{node.name}_repeated")
        return self._call(aten.reshape.default, (repeated, [-1, channels, rows, columns]), node)

    # -- making nodes --------------------------------------------------------------------------------------------------

    def _call(
        self, target: Any, args: tuple[Any, ...], origin: fx.Node, name: str | None = None, kwargs: Any = None
    ) -> fx.Node:
        """A call whose value stands for that of `origin`; it belongs to the same layer of the user's model."""
        made = self.graph.create_node("call_function", target, args, kwargs or {}, name or f"{origin.name}_q")
        result = self.annotation.result(origin)
        made.meta.update(edgec_layer=layer_of(origin), edgec_origin=origin_of(result))
        return made

    def _store(self, name: str, tensor: torch.Tensor) -> fx.Node:
        return weight_node(self.module, name, tensor)


def _limits(params: QParams, limits: tuple[float, float]) -> tuple[int, int]:
    """Smallest and largest code of a clip to real numbers, within the codes that `params` has."""
    lo, hi = integer.clip_codes(*limits, *params.per_tensor)
    return min(max(lo, params.n), params.p), min(max(hi, params.n), params.p)
