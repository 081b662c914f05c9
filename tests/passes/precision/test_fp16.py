"""cast-fp16: what becomes float16, what stays float32 and why, and the errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import load_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.precision.fp16 import CastFP16
from edgec.program import Program, is_call
from edgec.targets.device import load_device
from tests import zoo

pytestmark = pytest.mark.pure

aten = torch.ops.aten
# Rounding of one float16 operation.
UNIT = 2.0**-11


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(3, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x)) + self.second(x)
        a, b = y.chunk(2, 1)
        y = torch.cat([a * 2.0, b], 1).mean((2, 3))
        return torch.softmax(self.head(self.norm(y)), -1)


def small() -> Program:
    torch.manual_seed(0)
    return load_model(Small(), input_shape=(1, 3, 8, 8))


def cast(program: Program, context: Context | None = None, **options: tuple[str, ...]) -> Program:
    return CastFP16(**options).run(program, context or Context())


def types(program: Program) -> dict[str, str]:
    """Type of every call's result by the operator's name; of several calls, of all."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta["val"], torch.Tensor):
            name = node.target.__name__.partition(".")[0]
            kinds = {str(node.meta["val"].dtype).removeprefix("torch."), *found.get(name, "").split()}
            found[name] = " ".join(sorted(kinds))
    return found


def test_what_is_half_and_what_is_not() -> None:
    before, context = small(), Context()
    after = cast(before, context)
    found = types(after)
    half = ("conv2d", "relu", "add", "mul", "cat", "mean", "linear")
    assert {k: v for k, v in found.items() if k in half} == dict.fromkeys(half, "float16")
    assert found["layer_norm"] == found["softmax"] == "float32"
    assert {(s.layer, s.what) for s in context.skipped} == {("norm", "layer_norm"), ("softmax", "softmax")}
    assert [(o.shape, o.dtype) for o in after.outputs] == [((1, 5), "float32")]
    weights = {path: w.dtype for path, w in after.weights().items()}
    assert weights["first.fp16.weight"] == weights["head.fp16.bias"] == torch.float16
    assert weights["norm.weight"] == torch.float32 and "first.weight" not in weights
    assert after.annotations["cast-fp16"].half == ("first", "second", "head")


def test_every_tensor_is_cast_once() -> None:
    """The input feeds two layers; input, layer norm's two sides and the two sides of softmax are cast."""
    casts = [n for n in cast(small()).graph.nodes if is_call(n, aten.to.dtype)]
    assert len(casts) == 4 and len({n.args[0] for n in casts}) == 4
    assert casts[0].args[0].op == "placeholder" and len(casts[0].users) == 2


def test_results_are_those_of_half_precision() -> None:
    before = small()
    after = cast(before)
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    want, got = before(x)[0], after(x)[0]
    error = float((want - got).norm() / want.norm())
    assert UNIT / 100 < error < 8 * UNIT


def test_layers_are_kept() -> None:
    context = Context()
    after = cast(small(), context, keep_float=("first",))
    conv = {n.meta["edgec_layer"]: n.meta["val"].dtype for n in after.graph.nodes if is_call(n, aten.conv2d.default)}
    assert conv == {"first": torch.float32, "second": torch.float16}
    assert ("first", "conv2d") in {(s.layer, s.what) for s in context.skipped}
    assert after.annotations["cast-fp16"].kept_float == ("first",)
    with pytest.raises(EdgecError, match=r"no layer is called 'frist'; did you mean 'first'\?"):
        cast(small(), keep_float=("frist",))
    with pytest.raises(EdgecError, match="is not a list of layer names"):
        CastFP16(keep_float="first")  # type: ignore[arg-type]
    everything = small()
    assert cast(everything, keep_float=("*",)) is everything


def test_weights_beyond_half_are_an_error() -> None:
    model = Small()
    with torch.no_grad():
        model.second.weight[3, 1] = -7e4
    program = load_model(model, input_shape=(1, 3, 8, 8))
    with pytest.raises(
        EdgecError, match=r"layer second: weight 'second.weight' reaches 7e\+04, .*keep_float=\[second\]"
    ):
        cast(program)
    assert cast(program, keep_float=("second",)).annotations["cast-fp16"].half == ("first", "head")


def test_activations_beyond_half_stay_float_and_are_reported() -> None:
    """With calibration data: the layer that makes them, and every layer that would read them."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.fill_(1e4)  # type: ignore[operator,union-attr]
        model[2].weight.fill_(1e-5)  # type: ignore[operator,union-attr]
    program = load_model(model, input_shape=(1, 1, 4, 4))
    x = torch.full((4, 1, 4, 4), 30.0)
    assert not bool(torch.isfinite(cast(program)(x)[0]).all())
    context = Context(calibration=load_data(x.numpy(), program.inputs))
    after = cast(program, context)
    assert after.annotations["cast-fp16"].half == ("3",)
    assert bool(torch.isfinite(after(x)[0]).all())
    reasons = {s.layer: s.reason for s in context.skipped}
    assert "reaches 3e+05 on the calibration samples" in reasons["0"] and "reads values up to 3e+05" in reasons["2"]


def test_only_cores_with_half_arithmetic() -> None:
    message = "pass cast-fp16: cortex-a72 has no float16 arithmetic; use it for .*cortex-a55.*neoverse-n1"
    with pytest.raises(EdgecError, match=message) as raised:
        cast(small(), Context(device=load_device("cortex-a72")))
    assert raised.value.exit_code == 2
    assert cast(small(), Context(device=load_device("cortex-a76"))).annotations["cast-fp16"].half


class Awkward(nn.Module):
    """A computed weight, a constant that no half holds, a pool with unequal windows, and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        y = F.conv2d(x, self.scale * 0.5)
        z = F.avg_pool2d(x * 1e6, 3, 2, 1, count_include_pad=False)
        return y.sum((2, 3)) + z.mean((2, 3)) + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False).mean((2, 3))


def test_reasons() -> None:
    context = Context()
    program = load_model(Awkward(), input_shape=(1, 2, 6, 6))
    after = cast(program, context)
    reasons = {s.what: s.reason for s in context.skipped}
    assert "computed" in reasons["conv2d"] and "beyond float16" in reasons["mul"]
    assert "sums" in reasons["avg_pool2d"] and all(reasons.values())
    x = torch.rand(2, 2, 6, 6)
    assert torch.allclose(after(x)[0], program(x)[0], rtol=16 * UNIT)


def test_files_keep_half_weights(tmp_path: Path) -> None:
    after = cast(zoo.program("depthwise_separable"))
    after.save(tmp_path / "half.pt2")
    again = load_model(str(tmp_path / "half.pt2"))
    x = torch.rand(2, *zoo.ZOO["depthwise_separable"].shape[1:])
    assert torch.equal(again(x)[0], after(x)[0])


def test_a_second_run_changes_nothing() -> None:
    once = cast(small())
    context = Context()
    assert types(cast(once, context)) == types(once)
    assert not any(s.what in ("conv2d", "linear") for s in context.skipped)
