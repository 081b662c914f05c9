"""Half precision: float16 weights and activations."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.keep import check_patterns, fits, layer_names
from edgec.passes.quantization.calibrate import batches, calibrate
from edgec.passes.quantization.operators import (
    CONV2D,
    IDENTITIES,
    LAYERS,
    MOVES,
    SPLITTERS,
    arguments,
    is_float,
    op_name,
    pair,
)
from edgec.program import Program, get_weight, is_call, layer_of, origin_of, shape_of, weight_node, weight_paths
from edgec.sparsity import Carrier
from edgec.targets.device import Device, device_names, load_device

aten = torch.ops.aten

LARGEST = torch.finfo(torch.float16).max
SMALLEST = torch.finfo(torch.float16).smallest_normal

ARITHMETIC = (
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.maximum.default,
    aten.minimum.default,
)
# One rounding each; the curved ones are computed in float32 within their kernel.
FUNCTIONS = (
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.neg.default,
    aten.abs.default,
)
COPIES = (
    *MOVES,
    *SPLITTERS,
    *IDENTITIES,
    aten.cat.default,
    aten.stack.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.max_pool2d.default,
    aten.upsample_nearest2d.vec,
)
# Their kernels read and write float16 and add up in float32.
MEANS = (aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default)
CASTS = (aten.to.dtype, aten._to_copy.default)

_STATISTICS = "mean and variance of many elements have more digits than float16"
_PRODUCTS = "products of two activations have a float32 kernel only"
_EXPONENTIALS = "sums of exponentials have more digits than float16"
_RANGE = "its results leave the range of float16 easily"
_SUMS = "sums of many elements leave the range of float16"
REASONS: dict[Any, str] = {
    **dict.fromkeys((aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.logsumexp), _EXPONENTIALS),
    **dict.fromkeys((aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten.group_norm), _STATISTICS),
    **dict.fromkeys((aten.instance_norm, aten.var, aten.var_mean, aten.std), _STATISTICS),
    aten.batch_norm: "it is not folded: run fold-bn before",
    **dict.fromkeys((aten.matmul, aten.bmm, aten.mm, aten.scaled_dot_product_attention), _PRODUCTS),
    **dict.fromkeys((aten.sum, aten.prod, aten.cumsum, aten.norm, aten.linalg_vector_norm), _SUMS),
    **dict.fromkeys((aten.exp, aten.pow, aten.rsqrt, aten.reciprocal, aten.log), _RANGE),
}


@dataclass(frozen=True)
class HalfSummary:
    """What the pass did: layers (convolutions and linear) by name. accumulate: the type of sums on GPUs."""

    half: tuple[str, ...]
    kept_float: tuple[str, ...]
    accumulate: str = "fp32"


@dataclass(frozen=True)
class CastFP16(Pass):
    """float16 weights and activations, for cores that compute in it.

    IEEE 754 binary16: 11 significant bits, magnitudes up to 65504. 2-D convolutions and linear layers are summed in
    float16 as well on CPUs (as in XNNPACK), and in float32 on GPUs unless `accumulate` says otherwise; averages in
    float32; normalisations, softmax, products of activations and what has no kernel stay float32, with casts around
    them. Inputs and outputs of the model stay float32. Run `fold-bn` first.

    Weights beyond 65504 are an error. Calibration data is not needed; where it is given, what exceeds 65504 on it stays
    float32 and is reported.
    """

    name: ClassVar[str] = "cast-fp16"

    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")
    accumulate: str = option(
        "fp32", "type of the sums of layers on GPUs; CPUs sum in float16 always", choices=("fp32", "fp16")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep_float", layer_names(self.keep_float, f"{self.name}{{keep_float}}"))

    def run(self, program: Program, context: Context) -> Program:
        """Raises EdgecError for a device without float16 arithmetic, an unknown layer, and weights beyond float16."""
        if context.device is not None and not context.device.has_fp16:
            raise EdgecError(
                f"{context.device.name} has no float16 arithmetic",
                where=f"pass {self.name}",
                hint=f"use it for {', '.join(d.name for d in _fp16_devices())}",
            )
        module = program.edit()
        module.graph.eliminate_dead_code()
        check_patterns(module, self.keep_float, f"{self.name}{{keep_float}}")
        largest = {} if context.calibration is None else _largest(module, batches(program, context.calibration))
        half = self._choose(module, largest, context)
        layers = [n for n in module.graph.nodes if is_call(n, *LAYERS) and is_float(n)]
        summary = HalfSummary(
            tuple(layer_of(n) for n in layers if n in half),
            tuple(layer_of(n) for n in layers if n not in half),
            self.accumulate,
        )
        if not summary.half:
            return program
        masks = Carrier(program.annotations)
        _Caster(module, half, masks).convert()
        kept = masks.annotations(program.annotations, weight_paths(module))
        return program.replace(module, {**kept, self.name: summary})

    def _choose(self, module: fx.GraphModule, largest: dict[fx.Node, float], context: Context) -> set[fx.Node]:
        """The calls that are computed in float16. A layer always is where it may be, other calls behind one that is."""
        half: set[fx.Node] = set()
        for node in module.graph.nodes:
            if node.op != "call_function" or not (is_float(node) or is_call(node, *SPLITTERS)):
                continue
            layer = layer_of(node)
            if is_call(node, operator.getitem):
                # One of a list, which has one type.
                half |= {node} if node.args[0] in half else set()
                continue
            if not is_call(node, *LAYERS) and not any(x in half for x in node.all_input_nodes):
                continue
            reason = "is kept in float32 by option" if fits(layer, self.keep_float) else _reason(module, node)
            reason = reason or _overflow(node, largest)
            if reason is None:
                half.add(node)
            elif not is_call(node, *CASTS):
                context.skip(layer, op_name(node), reason)
        return half


def _fp16_devices() -> Iterator[Device]:
    # What the host has depends on the machine.
    return (d for d in (load_device(name) for name in device_names() if name != "host") if d.has_fp16)


def _largest(module: fx.GraphModule, inputs: Any) -> dict[fx.Node, float]:
    """The largest magnitude of every float tensor on the calibration samples."""
    watched = {n: _Magnitude() for n in module.graph.nodes if is_float(n) and n.op in ("call_function", "placeholder")}
    calibrate(module, inputs, {n: [w] for n, w in watched.items()})
    return {n: w.largest for n, w in watched.items()}


class _Magnitude:
    def __init__(self) -> None:
        self.largest = 0.0

    def update(self, values: torch.Tensor) -> None:
        self.largest = max(self.largest, float(values.abs().max())) if values.numel() else self.largest


def _overflow(node: fx.Node, largest: dict[fx.Node, float]) -> str | None:
    """Why the calibration samples do not let a call be float16: its result or an operand is too large."""
    for what, value in (("reaches", node), *(("reads values up to", x) for x in node.all_input_nodes)):
        reached = largest.get(value, 0.0)
        if not reached <= LARGEST:
            return f"{what} {reached:.4g} on the calibration samples, float16 ends at {LARGEST:.0f}"
    return None


def _reason(module: fx.GraphModule, node: fx.Node) -> str | None:
    """Why a call stays float32, or None for one that can be float16."""
    if is_call(node, *LAYERS):
        weights = [x for x in node.all_input_nodes if x is not node.args[0]]
        if any(w.op != "get_attr" for w in weights):
            return "its weight is computed, not stored"
        return "has no batch" if is_call(node, *CONV2D) and len(shape_of(node)) != 4 else None
    if is_call(node, *ARITHMETIC):
        numbers = [v for v in (*node.args, *node.kwargs.values()) if isinstance(v, (int, float))]
        if any(v and not SMALLEST <= abs(v) <= LARGEST for v in numbers):
            return "its constant is beyond float16"
        return None
    if is_call(node, *MEANS):
        return _mean_reason(node)
    if is_call(node, *FUNCTIONS, *COPIES):
        return None
    return REASONS.get(getattr(node.target, "overloadpacket", None), "has no float16 kernel")


def _mean_reason(node: fx.Node) -> str | None:
    """Averages have a kernel that adds up in float32, but for windows of different sizes."""
    given = arguments(node)
    if is_call(node, aten.mean.dim):
        return None if given["dtype"] is None else "asks for its own type"
    if is_call(node, aten.adaptive_avg_pool2d.default):
        return None if pair(given["output_size"]) == (1, 1) else _SUMS
    plain = given["count_include_pad"] or not any(pair(given["padding"]))
    return None if plain and not given["ceil_mode"] and given["divisor_override"] is None else _SUMS


class _Caster:
    """Rewrites a graph so that the nodes of `half` are computed in float16, in place."""

    def __init__(self, module: fx.GraphModule, half: set[fx.Node], masks: Carrier) -> None:
        self.module, self.graph, self.half, self.masks = module, module.graph, half, masks
        # Everything cast to the other type, by its original.
        self.casts: dict[fx.Node, fx.Node] = {}

    def convert(self) -> None:
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            operands = [x for x in node.all_input_nodes if is_float(x) and (x in self.half) != (node in self.half)]
            for operand in operands:
                node.replace_input_with(operand, self._cast(operand, node))

    def _cast(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """`node` in the other type, right behind it, so that all its users may share it."""
        if node not in self.casts:
            kind = torch.float32 if node in self.half else torch.float16
            following = node.next
            # Inputs stay together in front.
            while following.op == "placeholder":
                following = following.next
            with self.graph.inserting_before(following):
                new = self._weight(node, user) if node.op == "get_attr" else self._call(node, kind)
            self.casts[node] = new
        return self.casts[node]

    def _call(self, node: fx.Node, kind: torch.dtype) -> fx.Node:
        new = self.graph.call_function(aten.to.dtype, (node, kind))
        new.meta.update(val=node.meta["val"].to(kind), edgec_layer=layer_of(node), edgec_origin=origin_of(node))
        return new

    def _weight(self, node: fx.Node, user: fx.Node) -> fx.Node:
        """A float16 copy of a weight. Raises EdgecError when it does not fit."""
        weight = get_weight(self.module, node)
        reached = float(weight.abs().max()) if weight.numel() else 0.0
        if reached > LARGEST:
            raise EdgecError(
                f"weight '{node.target}' reaches {reached:.4g}, float16 ends at {LARGEST:.0f}",
                where=f"layer {layer_of(user)}",
                hint=f"keep it in float32: keep_float=[{layer_of(user)}]",
            )
        owner, _, leaf = str(node.target).rpartition(".")
        made = weight_node(self.module, f"{owner}.fp16.{leaf}" if owner else f"fp16.{leaf}", weight.half())
        self.masks.move(str(node.target), str(made.target))
        return made
