"""Bias correction: mean outputs meet those of the float layers, and damaged biases are repaired."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from edgec.passes.quantization.bias_correction import correct_biases
from edgec.passes.quantization.calibrate import BATCH
from edgec.program import get_weight, is_call
from tests.passes.quantization.helpers import Result, is_layer, noise, quantised, records

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec


class Net(nn.Module):
    """Dense, PReLU, strided depthwise with a pad, linear on tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense, self.act = nn.Conv2d(1, 6, 3), nn.PReLU(6)
        self.depthwise, self.fc = nn.Conv2d(6, 6, 3, stride=2, groups=6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.act(self.dense(x))
        x = F.relu(self.depthwise(F.pad(x, (0, 1, 1, 0))))
        return self.fc(x.flatten(2).transpose(1, 2))


def mean_error(result: Result) -> torch.Tensor:
    """Per output channel, over all samples and positions."""
    (want,), (got,) = result.before(result.samples), result.after(result.samples)
    return (got - want).mean((0, 1))


def test_the_mean_error_shrinks():
    samples = noise(24, 1, 12, 12, low=0.2)
    plain = quantised(Net(), samples, rounding="nearest", per_channel=False, observer="min-max")
    corrected = quantised(
        Net(), samples, rounding="nearest", per_channel=False, observer="min-max", bias_correction=True
    )
    assert mean_error(corrected).abs().max() < 0.3 * mean_error(plain).abs().max()
    assert corrected.error < plain.error


@pytest.mark.parametrize("fixed", [False, True])
def test_damaged_biases_are_repaired(fixed: bool):
    """All biases off by ten output codes: the correction, in several batches, brings them back to within one."""
    count = 4 if fixed else 2 * BATCH + 5
    result = quantised(Net(), noise(count, 1, 12, 12))
    module, found = result.after.edit(), records(result.after)
    nodes = [n for n in module.graph.nodes if is_layer(n)]
    batches = [(x,) for x in (result.samples.split(1) if fixed else result.samples.split(BATCH))]
    with torch.no_grad():
        runner = Means(module)
        for (batch,) in batches:
            runner.run(batch)
    targets, wanted = {}, {}
    (last,) = [n for n in nodes if n.name not in found]
    for node in nodes:
        w, bias = get_weight(module, node.args[1]), get_weight(module, node.args[2])
        total = runner.totals[node] / runner.counts[node] + bias
        wanted[node.name] = bias.clone()
        if node is last:  # its results are real numbers
            targets[node.name] = total * get_weight(module, node.args[3]).double()
            bias += 1000
            continue
        y, m, shift = found[node.name], get_weight(module, node.args[3]), get_weight(module, node.args[4])
        step = m.double() * torch.exp2(-shift.double()) * torch.tensor(y.scale, dtype=torch.float64)
        zero = 0 if y.axis is None else torch.tensor(y.scale, dtype=torch.float64) * torch.tensor(y.zero_point)
        targets[node.name] = total * step - zero
        bias += (10 * torch.exp2(shift.double()) / m.double()).to(torch.int32)
        assert w.dtype == torch.int8
    correct_biases(module, found, targets, batches)
    assert (get_weight(module, last.args[2]) - wanted[last.name]).abs().max() < 20
    for node in nodes:
        if node is last:
            continue
        bias, m, shift = (get_weight(module, node.args[i]) for i in (2, 3, 4))
        codes = (bias - wanted[node.name]).double() * m.double() * torch.exp2(-shift.double())
        assert codes.abs().max() < 0.1


class Means(fx.Interpreter):
    """Sums of code times weight of every layer, by brute force over all samples and positions."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.totals: dict[fx.Node, torch.Tensor] = {}
        self.counts: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node):
        if is_layer(n):
            x, w = self.env[n.args[0]].double(), self.env[n.args[1]].double()
            if is_call(n, edgec.qlinear.default, edgec.qlinear_float.default):
                sums = (x @ w.T).flatten(0, -2)
            else:
                stride, (top, bottom, left, right), dilation, groups, zero = n.args[5:10]
                padded = F.pad(x, (left, right, top, bottom), value=zero)
                sums = F.conv2d(padded, w, None, stride, 0, dilation, groups).permute(0, 2, 3, 1).flatten(0, 2)
            self.totals[n] = self.totals.get(n, 0) + sums.sum(0)
            self.counts[n] = self.counts.get(n, 0) + len(sums)
        return super().run_node(n)
