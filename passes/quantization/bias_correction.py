"""Empirical bias correction: remove the mean error that quantisation leaves in every layer.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (the empirical variant).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import fx

from edgec import qops  # noqa: F401  (registers the operators)
from edgec.integer import check_accumulator
from edgec.passes.quantization.operators import arguments
from edgec.program import get_weight, is_call
from edgec.quantparams import QParams

edgec = torch.ops.edgec
CONVS = (edgec.qconv2d.default, edgec.qconv2d_float.default)
LINEARS = (edgec.qlinear.default, edgec.qlinear_float.default)


def correct_biases(
    module: fx.GraphModule,
    records: Mapping[str, QParams],
    targets: Mapping[str, torch.Tensor],
    inputs: Iterable[tuple[torch.Tensor, ...]],
) -> None:
    """Change the int32 biases of a quantised graph, in place, so that each layer's mean output is the float layer's.

    records: QParams of the graph's tensors by name. targets: the float layer's mean output before any clip, one value
    per output channel, for each int8 layer by node name. inputs: batches of samples, all kept in memory.

    Layers are corrected in graph order, each on the outputs of layers that are corrected already. Since a layer is
    linear before its clip, its mean output follows from its mean input. Raises EdgecError when a bias leaves int32.
    """
    runner = _LayerByLayer(module, list(inputs))
    for node in module.graph.nodes:
        if is_call(node, *CONVS, *LINEARS):
            _correct(module, node, records.get(node.name), targets[node.name], runner.values[node.args[0]])
        runner.run(node)


def _correct(
    module: fx.GraphModule, node: fx.Node, params: QParams | None, target: torch.Tensor, inputs: list[torch.Tensor]
) -> None:
    given = arguments(node)
    weights, bias = get_weight(module, given["w"]), get_weight(module, given["bias"])
    if params is None:
        step = get_weight(module, given["scale"]).to(torch.float64)
    else:
        # The multiplier is scale_x * scale_w / scale_y; where it is zero, no bias would show.
        m, shift = get_weight(module, given["m"]), get_weight(module, given["shift"])
        scale = torch.as_tensor(params.scale, dtype=torch.float64)
        if params.granularity == "channel":  # the bias contains the zero points
            target = target + scale * torch.as_tensor(params.zero_point)
        step = m.to(torch.float64) * torch.exp2(-shift.to(torch.float64)) * scale
    sums = _mean_accumulator(node, weights, inputs) + bias
    exact = torch.where(step > 0, target / torch.where(step > 0, step, 1.0), sums)
    corrected = bias.to(torch.int64) + torch.round(exact - sums).to(torch.int64)
    check_accumulator(weights.numpy(), corrected.numpy())
    bias.copy_(corrected)


def _mean_accumulator(node: fx.Node, weights: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Mean over samples and positions of sum(code * weight), per output channel, in float64."""
    given, exact = arguments(node), weights.to(torch.float64)
    if is_call(node, *LINEARS):
        rows = [x.to(torch.float64).flatten(0, -2) for x in inputs]
        return exact @ torch.cat(rows).mean(0)
    total = torch.stack([x.to(torch.float64).sum(0) for x in inputs]).sum(0)
    mean = total / sum(x.shape[0] for x in inputs)
    top, bottom, left, right = given["padding"]
    padded = F.pad(mean, (left, right, top, bottom), value=given["x_zp"])
    return F.conv2d(padded[None], exact, None, given["stride"], 0, given["dilation"], given["groups"])[0].mean((1, 2))


class _LayerByLayer:
    """Evaluates a graph node by node for several batches at once; results that are not needed any more are dropped."""

    def __init__(self, module: fx.GraphModule, batches: list[tuple[torch.Tensor, ...]]) -> None:
        self.module, self.batches = module, batches
        self.values: dict[fx.Node, list] = {}
        self.remaining = {n: len(n.users) for n in module.graph.nodes}
        self.inputs = [n for n in module.graph.nodes if n.op == "placeholder"]

    def run(self, node: fx.Node) -> None:
        count = len(self.batches)
        if node.op == "placeholder":
            self.values[node] = [batch[self.inputs.index(node)] for batch in self.batches]
        elif node.op == "get_attr":
            self.values[node] = [get_weight(self.module, node)] * count
        elif node.op == "call_function":
            with torch.no_grad():
                self.values[node] = [self._call(node, i) for i in range(count)]
        for source in node.all_input_nodes:
            self.remaining[source] -= 1
            if self.remaining[source] == 0:
                del self.values[source]

    def _call(self, node: fx.Node, index: int):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n][index])
        return node.target(*args, **kwargs)  # type: ignore[operator]
