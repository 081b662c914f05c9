"""Batch norm folding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from edgec.passbase import Context, Pass
from edgec.program import (
    Program,
    constant_of,
    is_call,
    layer_of,
    origin_of,
    shape_of,
    weight_node,
    weight_paths,
)
from edgec.sparsity import Carrier

aten = torch.ops.aten

# Operator -> output channel axis of its weight.
FOLDABLE: dict[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.linear.default: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
}
# Layers that can take up a batch norm in front of them, if they do not pad.
FORWARD = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)


@dataclass(frozen=True)
class FoldBN(Pass):
    """Fold inference batch norms into the convolution or linear layer before them.

    W' = W * gamma / sqrt(var + eps) per output channel, b' = beta + (b - mean) * gamma / sqrt(var + eps), computed in
    float64. A batch norm folds when the layer before it feeds nothing else. One that follows no such layer folds into
    the layer after it, if it feeds nothing else and that layer pads nothing: the zeros that a convolution pads are not
    what the batch norm makes of zero. Any other stays and is reported. A linear layer on [N, L, C] is left alone,
    because its batch norm runs over axis 1.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    """

    name: ClassVar[str] = "fold-bn"

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program without the batch norms that could be folded; its function is unchanged."""
        module, masks = program.edit(), Carrier(program.annotations)
        for node in list(module.graph.nodes):
            if is_call(node, aten.batch_norm.default):
                reason = fold_back(module, node, masks)
                if reason and not _fold_forward(module, node, masks):
                    context.skip(layer_of(node), "batch norm not folded", reason)
        return program.replace(module, masks.annotations(program.annotations, weight_paths(module)))


def fold_back(module: fx.GraphModule, norm: fx.Node, masks: Carrier) -> str | None:
    """Fold one batch norm into the layer before it, in place; returns why not, or None when done."""
    layer = norm.args[0]
    affine = norm_affine(module, norm)
    if affine is None:
        return "its statistics are computed, not stored"
    if not isinstance(layer, fx.Node) or layer.target not in FOLDABLE:
        return "it does not follow a convolution or linear layer"
    if len(layer.users) > 1:
        return f"layer {layer_of(layer)} also feeds other layers"
    if not _over_channels(layer, norm):
        return "its channel axis is not the linear layer's output axis"
    stored = _stored(module, layer)
    if stored is None:
        return "the weight of the layer before it is computed, not stored"
    weight, bias = stored
    scale, shift = affine
    folded = _scale_outputs(weight.double(), scale, layer)
    _set_weights(module, layer, folded, shift if bias is None else bias.double() * scale + shift, masks)
    layer.meta["edgec_origin"] = origin_of(norm)
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return None


def _fold_forward(module: fx.GraphModule, norm: fx.Node, masks: Carrier) -> bool:
    """Fold one batch norm into the layer after it, W (s x + t) = (W s) x + W t; returns whether that was possible."""
    affine = norm_affine(module, norm)
    layer = next(iter(norm.users))
    if affine is None or len(norm.users) > 1 or layer.target not in FORWARD or layer.args[0] is not norm:
        return False
    stored = _stored(module, layer)
    if stored is None or _pads(layer) or not _over_channels(layer, norm):
        return False
    weight, bias = stored
    rows, per_group, *window = weight.shape
    groups = int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]
    # [groups, 1, inputs of a group, 1, 1] against [groups, outputs of a group, inputs of a group, kh, kw]
    scale, shift = (v.reshape(groups, 1, per_group, *[1] * len(window)) for v in affine)
    grouped = weight.double().reshape(groups, rows // groups, per_group, *window)
    added = (grouped * shift).flatten(2).sum(2).reshape(rows)
    scaled = (grouped * scale).reshape(weight.shape)
    _set_weights(module, layer, scaled, added if bias is None else bias.double() + added, masks)
    layer.replace_input_with(norm, norm.args[0])  # type: ignore[arg-type]
    module.graph.erase_node(norm)
    return True


def norm_affine(module: fx.GraphModule, norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(scale, shift) per channel in float64 of a batch norm, or None when it is not constant."""
    gamma, beta, mean, var = (constant_of(module, a) for a in norm.args[1:5])
    computed = any(
        given is not None and known is None for given, known in zip(norm.args[1:5], (gamma, beta, mean, var))
    )
    if norm.args[5] or computed or mean is None or var is None:
        return None
    scale = torch.rsqrt(var.double() + float(norm.args[7]))  # type: ignore[arg-type]
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def _stored(module: fx.GraphModule, layer: fx.Node) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """(weight, bias) of a layer, or None when one of them is computed."""
    _, kernel, *rest = cast(tuple[Any, ...], layer.args)
    bias_node = rest[0] if rest else layer.kwargs.get("bias")
    weight, bias = constant_of(module, kernel), constant_of(module, bias_node)
    return None if weight is None or (bias_node is not None and bias is None) else (weight, bias)


def _set_weights(
    module: fx.GraphModule, layer: fx.Node, weight: torch.Tensor, bias: torch.Tensor, masks: Carrier
) -> None:
    """Give a layer new float32 weights, next to the ones it had; scaled channels keep their zeros."""
    stored = str(layer.args[1].target)  # type: ignore[union-attr]
    path = stored.removesuffix(".weight")
    weight = weight.float()
    if stored in masks.records:
        weight = weight + 0.0  # a negative factor makes -0.0 of a pruned element
    with module.graph.inserting_before(layer):
        new_weight = weight_node(module, f"{path}.folded.weight", weight)
        masks.move(stored, str(new_weight.target))
        new_bias = weight_node(module, f"{path}.folded.bias", bias.float())
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}


def _over_channels(layer: fx.Node, norm: fx.Node) -> bool:
    """Batch norm runs over axis 1, a linear layer over the last one."""
    return not is_call(layer, aten.linear.default) or len(shape_of(norm)) == 2


def _pads(layer: fx.Node) -> bool:
    padding = layer.args[4] if len(layer.args) > 4 else layer.kwargs.get("padding", 0)
    widths = [padding] if isinstance(padding, int) else list(padding)  # type: ignore[call-overload]
    return not is_call(layer, aten.linear.default) and any(widths)


def _scale_outputs(weight: torch.Tensor, scale: torch.Tensor, layer: fx.Node) -> torch.Tensor:
    """Multiply each output channel; a transposed convolution stores [in, out / groups, ...] per group."""
    if FOLDABLE[layer.target] == 0:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]
    rows, per_group, *window = weight.shape
    grouped = weight.reshape(groups, rows // groups, per_group, *window)
    return (grouped * scale.reshape(groups, 1, per_group, *[1] * len(window))).reshape(weight.shape)
