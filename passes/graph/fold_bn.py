"""Batch norm folding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from edgec.passbase import Context, Pass
from edgec.program import Program, constant_of, get_weight, is_call, layer_of, shape_of, weight_node

aten = torch.ops.aten

# Operator -> output channel axis of its weight.
FOLDABLE = {
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.linear.default: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
}


@dataclass(frozen=True)
class FoldBN(Pass):
    """Fold inference batch norms into the convolution or linear layer before them.

    W' = W * gamma / sqrt(var + eps) per output channel, b' = beta + (b - mean) * gamma / sqrt(var + eps), computed in
    float64. A batch norm folds when the layer before it feeds nothing else; any other stays and is reported. A linear
    layer on [N, L, C] is left alone, because its batch norm runs over axis 1.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    """

    name: ClassVar[str] = "fold-bn"

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program without the batch norms that could be folded; its function is unchanged."""
        module = program.edit()
        for node in list(module.graph.nodes):
            if is_call(node, aten.batch_norm.default):
                reason = _fold(module, node)
                if reason:
                    context.skip(layer_of(node), "batch norm not folded", reason)
        return program.replace(module)


def _fold(module: fx.GraphModule, norm: fx.Node) -> str | None:
    """Fold one batch norm; returns why not, or None when done."""
    layer = norm.args[0]
    if norm.args[5]:
        return "it uses batch statistics (the model is in training mode)"
    if not isinstance(layer, fx.Node) or layer.target not in FOLDABLE:
        return "it does not follow a convolution or linear layer"
    if len(layer.users) > 1:
        return f"layer {layer_of(layer)} also feeds other layers"
    if is_call(layer, aten.linear.default) and len(shape_of(layer)) != 2:
        return "its channel axis is not the linear layer's output axis"
    weight = constant_of(module, layer.args[1])
    bias_node = layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")
    bias = constant_of(module, bias_node)
    if weight is None or (bias_node is not None and bias is None):
        return "the weight of the layer before it is computed, not stored"
    gamma, beta, mean, var = (None if a is None else get_weight(module, a).double() for a in norm.args[1:5])  # type: ignore[arg-type]
    assert mean is not None and var is not None
    scale = torch.rsqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
    if gamma is not None:
        scale = scale * gamma
    start = -mean if bias is None else bias.double() - mean
    shift = start * scale + (0.0 if beta is None else beta)
    folded = _scale_outputs(weight.double(), scale, layer)
    path = str(layer.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
    with module.graph.inserting_before(layer):
        new_weight = weight_node(module, f"{path}.folded.weight", folded.to(weight.dtype))
        new_bias = weight_node(module, f"{path}.folded.bias", shift.to(weight.dtype))
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)
    return None


def _scale_outputs(weight: torch.Tensor, scale: torch.Tensor, layer: fx.Node) -> torch.Tensor:
    """Multiply each output channel; a transposed convolution stores [in, out / groups, ...] per group."""
    axis = FOLDABLE[layer.target]
    if axis == 0:
        return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = int(layer.args[6]) if len(layer.args) > 6 else 1  # type: ignore[arg-type]
    rows, per_group, *window = weight.shape
    grouped = weight.reshape(groups, rows // groups, per_group, *window)
    return (grouped * scale.reshape(groups, 1, per_group, *[1] * len(window))).reshape(weight.shape)
