"""From a Program to a plan and a running bundle: what is stored, where it lives, what is reported."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.bundle import build_bundle
from edgec.data import random_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.lowering import importer
from edgec.lowering.lower import STEPS, Lowered, lower
from edgec.passbase import Context
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.quantize_int8 import QuantizeInt8
from edgec.plan import Step
from edgec.program import Program, layer_of
from edgec.targets.device import load_device
from tests import zoo
from tests.lowering.helpers import compile_host, load
from tests.lowering.networks import CASES, MAP, Net, chain, conv

HOST = load_device("host")


def quantized(program: Program) -> Program:
    context = Context(device=HOST, calibration=random_data(program.inputs, 8, seed=1))
    for step in (FoldBN(), QuantizeInt8()):
        program = step.run(program, context)
    return program


# -- constants ---------------------------------------------------------------------------------------------------------


@pytest.mark.host
@pytest.mark.parametrize("name", ["residual", "depthwise_separable", "squeeze_excite", "mlp"])
def test_int8_weights_are_stored_as_int8_only(name: str, tmp_path: Path) -> None:
    program = quantized(zoo.program(name))
    compiled = compile_host(program, tmp_path)
    stored = [c.array for c in compiled.lowered.plan.constants.values()]
    weights = [w for w in program.weights().values() if w.dtype == torch.int8]
    # Padding is zero: equal sums mean that every code is there, and only once.
    for layer in weights:
        assert any(a.dtype == np.int8 and int(a.sum()) == int(layer.sum()) for a in stored)
    assert sum(a.size for a in stored if a.dtype == np.int8) >= sum(w.numel() for w in weights) > 0
    # Beside the codes, vectors with a value per channel: of bias, and of the factors of requantisation.
    assert {str(a.dtype) for a in stored} <= {"int8", "int32", "float32"}
    assert all(math.prod(a.shape[:-1]) <= 9 for a in stored if a.dtype != np.int8)
    # Integer code computes what the Program says, bit for bit.
    assert compiled.error() == 0.0


INTEGER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "patches": CASES["patches"][:2],
    "mean of columns": (lambda: Net(lambda m, x: m.fc(m.conv(x).mean(-1)), conv=conv(3, 4), fc=nn.Linear(9, 5)), MAP),
    "mean of rows and channels": (lambda: Net(lambda m, x: m.conv(x).mean((1, 2), keepdim=True), conv=conv(3, 4)), MAP),
    "mean of tokens": (lambda: Net(lambda m, x: m.fc(m.fc(x).mean(1)), fc=nn.Linear(6, 6)), (1, 5, 6)),
    "pool": (
        lambda: chain(conv(3, 4), nn.MaxPool2d(2, ceil_mode=True), nn.Hardswish(), nn.AvgPool2d(2), conv(4, 4)),
        MAP,
    ),
    "concat": (lambda: Net(lambda m, x: m.b(torch.cat([x, F.silu(m.a(x))], 1)), a=conv(3, 4), b=conv(7, 4)), MAP),
    "dilated": (lambda: chain(conv(3, 4, dilation=2, padding="same"), nn.ReLU6(), conv(4, 4, groups=2, stride=2)), MAP),
}


@pytest.mark.host
@pytest.mark.parametrize("name", INTEGER)
def test_integer_code_is_exact(name: str, tmp_path: Path) -> None:
    make, shape = INTEGER[name]
    program = quantized(load(make(), shape))
    assert [n for n in program.graph.nodes if str(n.target).startswith("edgec.q")]
    compiled = compile_host(program, tmp_path)
    assert compiled.error() == 0.0
    assert compiled.error(seed=2) == 0.0


def test_float_weights_are_stored_once() -> None:
    program = FoldBN().run(zoo.program("residual"), Context())
    plan = lower(program, HOST).plan
    stored = [c.array for c in plan.constants.values()]
    assert {str(a.dtype) for a in stored} == {"float32"}
    assert len(stored) == len(program.weights())
    for weight in program.weights().values():
        matches = [a for a in stored if np.isclose(a.sum(dtype=np.float64), weight.double().sum().item(), atol=1e-6)]
        assert len(matches) == 1
        assert np.count_nonzero(matches[0]) == np.count_nonzero(weight.numpy())
    assert plan.weight_bytes == sum(a.nbytes for a in stored)


def test_layers_that_share_weights_share_the_constants() -> None:
    net = Net(lambda m, x: m.body(F.relu(m.body(m.stem(x))) * 0.5), stem=conv(3, 4), body=conv(4, 4))
    plan = lower(load(net, MAP), HOST).plan
    first, second = (
        [a for a in s.args if a in plan.constants] for s in plan.steps if s.op == "conv2d_f32" and s.layer == "body"
    )
    assert first == second and len(first) == 2


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.names())
def test_zoo_plans(name: str) -> None:
    program = zoo.program(name)
    lowered = lower(program, HOST)
    plan = lowered.plan
    assert plan.arena_bytes >= plan.arena_lower_bound > 0
    # What no template computes is reported, kernel by kernel.
    untuned = [s for s in plan.steps if not s.tuned and s.op != "copy"]
    assert [f.layer for f in lowered.fallbacks] == [s.layer for s in untuned] and all(s.layer for s in untuned)
    layers = {layer_of(n) for n in program.graph.nodes}
    assert all(s.layer in layers for s in untuned)
    convolutions = [n for n in program.graph.nodes if "conv2d" in str(n.target) or "linear" in str(n.target)]
    tuned = [s for s in plan.steps if s.tuned and s.macs]
    assert len(tuned) >= len(convolutions)


def in_place(lowered: Lowered, layer: str) -> bool:
    """True when the last step of a layer writes its result over an operand."""
    plan = lowered.plan
    step = [s for s in plan.steps if s.layer == layer][-1]
    places = [
        plan.buffers[a].alias_of or a for a in step.args if a in plan.buffers and plan.buffers[a].kind != "scratch"
    ]
    return places[-1] in places[:-1]


def block(keep: bool, direct: bool = False) -> Program:
    """A residual block; with `keep` its input is read again, with `direct` the last convolution reads it as well."""

    def forward(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = F.relu(m.body(x if direct else F.relu(m.mid(x))) + x)
        return m.last(y) * x if keep else m.last(y)

    layers = {"stem": conv(3, 4), "mid": conv(4, 4), "body": conv(4, 4), "last": conv(4, 4)}
    return load(Net(forward, **layers), MAP)


@pytest.mark.parametrize("integer", [False, True])
def test_the_residual_is_overwritten(integer: bool) -> None:
    program = block(keep=False)
    assert in_place(lower(quantized(program) if integer else program, HOST), "body")


@pytest.mark.parametrize(("keep", "direct"), [(True, False), (False, True)])
def test_a_residual_that_is_needed_is_kept(keep: bool, direct: bool) -> None:
    assert not in_place(lower(block(keep, direct), HOST), "body")


# -- names and texts ---------------------------------------------------------------------------------------------------


def test_layer_names_arrive_in_the_steps() -> None:
    steps = lower(zoo.program("residual"), HOST).plan.steps
    assert layers(steps) == ["conv1", "conv2", "conv3", "fc", "shortcut.0"]
    assert layers(lower(quantized(zoo.program("residual")), HOST).plan.steps) == layers(steps)


def layers(steps: Sequence[Step]) -> list[str]:
    return sorted(s.layer for s in steps if "conv2d" in s.op)


def test_dump_receives_every_step() -> None:
    texts: dict[str, str] = {}
    lowered = lower(zoo.program("conv_bn_relu"), HOST, dump=texts.__setitem__)
    assert tuple(texts) == STEPS
    assert "edgec.conv2d_nhwc" in texts["regions"] and "edgec.conv2d_nhwc" in texts["layout"]
    assert "call_tir" in texts["import"]
    assert texts["plan"] == lowered.plan.text()
    assert "@T.prim_func" in texts["kernels"]


def test_lowering_is_deterministic() -> None:
    first, second = (lower(zoo.program("squeeze_excite"), HOST).plan for _ in range(2))
    assert first.text() == second.text()


@pytest.mark.host
def test_the_bundle_does_not_depend_on_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = lower(zoo.program("squeeze_excite"), HOST)
    found = []
    for number, cache in enumerate(("0", "kernels", "kernels")):
        monkeypatch.setenv("EDGEC_CACHE", cache if cache == "0" else str(tmp_path / cache))
        folder = build_bundle(lowered, HOST, tmp_path / f"bundle{number}").path
        found.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
    assert list((tmp_path / "kernels").iterdir())
    assert found[0] == found[1] == found[2]


def test_fallbacks_name_the_kernel() -> None:
    lowered = lower(
        load(Net(lambda m, x: m.up(m.conv(x)), conv=conv(3, 4), up=nn.ConvTranspose2d(4, 2, 2, 2, dilation=2)), MAP),
        HOST,
    )
    (entry,) = (f for f in lowered.fallbacks if f.layer == "up")
    assert entry.what == "untuned kernel" and "transpose" in entry.reason
    assert lower(load(conv(3, 4), MAP), HOST).fallbacks == ()


# -- inputs and outputs ------------------------------------------------------------------------------------------------


def two_inputs(m: Net, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return m.conv(a) + m.fc(b).unsqueeze(-1).unsqueeze(-1)


def static_batch(m: Net, x: torch.Tensor) -> torch.Tensor:
    """Samples of a batch that is fixed see each other."""
    y = F.relu(m.conv(x))
    return m.fc(F.max_pool2d(y, 3).flatten(1)) + y.mean()


PORTS: dict[str, tuple[Any, tuple[tuple[int, ...], ...], int]] = {
    "several outputs": (
        lambda: Net(lambda m, x: (m.a(x), F.relu(m.a(x)), m.b(x).mean((2, 3))), a=conv(3, 4), b=conv(3, 5)),
        (MAP,),
        3,
    ),
    "input returned": (lambda: Net(lambda m, x: (x, m.conv(x)), conv=conv(3, 4)), (MAP,), 2),
    "only the input": (lambda: Net(lambda m, x: x.flatten(1)), (MAP,), 1),
    "view returned": (
        lambda: Net(lambda m, x: (lambda y: (y, y.flatten(1)))(m.fc(x) * 2.0), fc=nn.Linear(7, 5)),
        (MAP,),
        2,
    ),
    "returned and read on": (
        lambda: Net(lambda m, x: (lambda y: (y, m.b(F.relu(y))))(m.a(x)), a=conv(3, 4), b=conv(4, 2)),
        (MAP,),
        2,
    ),
    "returned twice": (lambda: Net(lambda m, x: (lambda y: (y, y))(m.conv(x)), conv=conv(3, 4)), (MAP,), 2),
    "two inputs": (lambda: Net(two_inputs, conv=conv(3, 4), fc=nn.Linear(6, 4)), (MAP, (1, 6)), 1),
    "static batch": (lambda: Net(static_batch, conv=conv(3, 4), fc=nn.Linear(24, 2)), ((2, 3, 9, 7),), 1),
    "one dimension": (lambda: Net(lambda m, x: m.fc(x) * 0.5, fc=nn.Linear(6, 4)), ((1, 6),), 1),
}


@pytest.mark.host
@pytest.mark.parametrize("name", PORTS)
def test_ports(name: str, tmp_path: Path) -> None:
    make, shapes, outputs = PORTS[name]
    module = make()
    if name == "static batch":
        zoo.set_weights(module, 0)
        program = load_model(torch.export.export(module.eval(), (torch.rand(shapes[0]),)), name="static")
        assert program.inputs[0].shape[0] == 2
    else:
        program = load(module, *shapes)
    compiled = compile_host(program, tmp_path)
    assert len(compiled.lowered.plan.outputs) == outputs
    assert compiled.error() < 1e-5
    assert compiled.error(seed=2) < 1e-5


@pytest.mark.host
def test_a_batch_is_run_sample_by_sample(tmp_path: Path) -> None:
    compiled = compile_host(zoo.program("residual"), tmp_path)
    x = zoo.example("residual", batch=3)
    (want,) = compiled.program(x)
    assert np.abs(compiled.bundle.run(x.numpy()) - want.numpy()).max() < 1e-5


# -- errors ------------------------------------------------------------------------------------------------------------


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.i0(x.abs() + 1)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.mixer = nn.Sequential(nn.ReLU(), Bessel())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mixer(self.stem(x))
        return x + torch.linalg.matrix_exp(x @ x.transpose(1, 2)).sum(-1, keepdim=True)


def lines(obj: Any, text: str) -> int:
    """The line of this file that has `text` in the source of `obj`."""
    source, first = inspect.getsourcelines(obj)
    (found,) = [first + i for i, line in enumerate(source) if text in line]
    return found


def test_every_unsupported_operator_is_reported_at_once() -> None:
    program = load(Unsupported(), (1, 4, 8))
    with pytest.raises(EdgecError) as caught:
        lower(program, HOST)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"aten\.i0\.default \(layer mixer\.1, \S*test_lower\.py:(\d+)\)", message), message
    assert f"test_lower.py:{lines(Bessel.forward, 'i0')}" in message
    assert "matrix_exp" in message and f"test_lower.py:{lines(Unsupported.forward, 'matrix_exp')}" in message


def test_importer_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise ValueError("first line\n  details\n\n  the reason  \n")

    monkeypatch.setattr(importer._Importer, "from_exported_program", refuse)
    with pytest.raises(EdgecError, match=r"^import: TVM's importer refused the graph: the reason$"):
        lower(zoo.program("conv_bn_relu"), HOST)


class ComputedWeights(nn.Module):
    """Weights that are computed, and a convolution and pools on maps without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.plain = nn.Conv2d(4, 4, 3)
        self.linear = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.conv2d(x, self.conv * x.mean(), padding=1)
        z = nn.functional.avg_pool2d(nn.functional.max_pool2d(self.plain(y[0]), 2), 2)
        return nn.functional.linear(z.mean((1, 2))[None], self.linear * x.sum())


@pytest.mark.host
def test_computed_weights_and_maps_without_a_batch_run_on_the_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ComputedWeights()
    x = torch.rand(1, 3, 12, 12)
    program = load_model(model, input_shape=(1, 3, 12, 12), name="computed")
    device = load_device("host")
    got = build_bundle(lower(program, device), device, tmp_path / "bundle").run(x.numpy())
    with torch.no_grad():
        want = model(x).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
