"""What import writes anew: recurrent layers, complex numbers, loops and branches, weights computed from weights."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fft, nn

from edgec.cost import program_cost
from edgec.data import random_data
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.lowering.lower import kernel_bindings, lower
from edgec.passbase import Context
from edgec.program import Program
from edgec.recurrentops import RECURRENT
from edgec.registry import load_pass, pass_entries
from edgec.targets.device import load_device
from tests.lowering.helpers import compile_host, errors

# -- recurrent layers --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Every kind of recurrent layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.LSTM(6, 9, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(18, 5, bias=False, bidirectional=True)
        self.tanh = nn.RNN(10, 7, batch_first=True)
        self.relu = nn.RNN(7, 8, nonlinearity="relu", batch_first=True, bias=False)
        self.narrow = nn.LSTM(8, 8, proj_size=3, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, (h, c) = self.deep(x)
        z, last = self.gru(y.transpose(0, 1))
        z, _ = self.tanh(z.transpose(0, 1))
        z, _ = self.relu(z)
        z, (_, cell) = self.narrow(z)
        return z, h.transpose(0, 1), c.transpose(0, 1), last.transpose(0, 1), cell.transpose(0, 1)


class Given(nn.Module):
    """States that are inputs of the model, as streaming models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 6), nn.GRU(6, 6)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, (h, c) = self.lstm(x, (h, c))
        y, g = self.gru(y, h)
        return y, h, c, g


class Cells(nn.Module):
    """One layer and its classifier, as keyword spotting has it."""

    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.steps = steps
        self.lstm, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


def operators(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def outputs(got: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.array(g)) for g in (got if isinstance(got, tuple) else (got,)))


@pytest.mark.pure
def test_recurrent_layers_are_one_node_per_layer_and_direction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    program = load_model(model, input_shape=(1, 5, 6))
    assert program.dynamic_batch
    found = operators(program)
    assert (found["edgec.lstm.default"], found["edgec.gru.default"], found["edgec.rnn.default"]) == (5, 2, 2)
    assert found["aten.linear.default"] == 9
    x = torch.rand(4, 5, 6)
    with torch.no_grad():
        assert errors(program(x), model(x)) < 1e-6
    layers = {n.meta["edgec_layer"] for n in program.graph.nodes if n.target in RECURRENT}
    assert {"deep.hh_l1_reverse", "gru.hh_l0", "narrow.hh_l0"} <= layers
    program.save(tmp_path / "model.pt2")
    again = load_model(tmp_path / "model.pt2")
    assert operators(again) == found
    assert all(torch.equal(a, b) for a, b in zip(program(x), again(x), strict=True))


@pytest.mark.pure
def test_long_sequences_import_in_seconds() -> None:
    start = time.process_time()
    program = load_model(Cells().eval(), input_shape=(1, 1000, 8))
    assert time.process_time() - start < 10
    assert len(program.graph.nodes) < 20
    cost = program_cost(program).macs
    assert cost == 1000 * (64 * 8 + 64 * 16) + 16 * 4
    assert cost == sum(binding.spec.macs for binding in kernel_bindings(program))


@pytest.mark.host
def test_recurrent_layers_on_this_machine(tmp_path: Path) -> None:
    torch.manual_seed(1)
    program = load_model(Layers().eval(), input_shape=(1, 5, 6))
    assert compile_host(program, tmp_path / "layers").error() < 1e-5
    inputs = (torch.rand(3, 2, 4), torch.rand(1, 2, 6), torch.rand(1, 2, 6))
    exported = torch.export.export(Given().eval(), inputs)
    assert compile_host(load_model(exported, name="given"), tmp_path / "given").error() < 1e-5


@pytest.mark.pure
@pytest.mark.parametrize("target", ["cortex-a72", "cortex-a7", "cortex-m7", "cortex-m0plus", "rv32imc", "opencl"])
def test_recurrent_layers_lower_for_every_kind_of_target(target: str) -> None:
    plan = lower(load_model(Cells().eval(), input_shape=(1, 4, 8)), load_device(target)).plan
    assert plan.macs == 4 * (64 * 8 + 64 * 16) + 16 * 4


@pytest.mark.pure
def test_gradients_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    module = load_model(model, input_shape=(1, 5, 6)).edit()
    x = torch.rand(2, 5, 6)
    for parameter in module.parameters():
        parameter.requires_grad_()
    sum(y.square().sum() for y in model(x)).backward()
    sum(y.square().sum() for y in module(x)).backward()
    got, want = dict(module.named_parameters()), dict(model.named_parameters())
    assert got.keys() == want.keys()
    for name, parameter in want.items():
        torch.testing.assert_close(got[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.pure
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(pass_entries()))
def test_every_pass_survives_a_recurrent_model(name: str) -> None:
    torch.manual_seed(0)
    program = load_model(Cells().eval(), input_shape=(1, 12, 8))
    cls = load_pass(name)
    fields = getattr(cls, "__dataclass_fields__", {})
    step = cls(**{k: v for k, v in {"steps": 2, "epochs": 1}.items() if k in fields})
    context = Context(calibration=random_data(program.inputs, 16, seed=1), teacher=program, seed=0)
    try:
        after = step.run(program, context)
    except EdgecError as error:
        # A pass may have nothing to do here, which it says in one line.
        assert "\n" not in str(error)
        return
    x = torch.rand(8, 12, 8, generator=torch.Generator().manual_seed(0))
    cosine = F.cosine_similarity(after(x)[0].flatten(), program(x)[0].flatten(), 0)
    assert cosine > 0.9 or not cls.faithful
    assert sum(n.target in RECURRENT for n in after.graph.nodes) == 1


@pytest.mark.pure
def test_int8_leaves_the_recurrence_in_float_and_says_so() -> None:
    program = load_model(Cells().eval(), input_shape=(1, 12, 8))
    context = Context(calibration=random_data(program.inputs, 16, seed=1), teacher=program, seed=0)
    after = load_pass("quantize-int8")().run(program, context)
    assert sum(n.target in RECURRENT for n in after.graph.nodes) == 1
    assert [s.what for s in context.skipped if s.layer == "lstm.hh_l0"] == ["lstm"]


# -- complex numbers, control flow, weights from weights ---------------------------------------------------------------


class Function(nn.Module):
    """A function of one input and, perhaps, a weight."""

    def __init__(self, function: Callable[..., Any], weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def spectral_convolution(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A Fourier neural operator's layer: low frequencies are written into zeros."""
    f = fft.rfft(x)
    y = torch.zeros(x.shape[0], w.shape[1], f.shape[-1], dtype=torch.cfloat)
    y[:, :, :3] = torch.einsum("bik,iok->bok", f[..., :3], w)
    return fft.irfft(y, n=x.shape[-1])


def while_loop(x: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda i, y: i < 5, lambda i, y: (i + 1, torch.tanh(1.1 * y)), (torch.tensor(0), x))[1]


def scan(x: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda h, t: (0.9 * h + t, torch.relu(h)), torch.zeros(8), x[0])[1]


MAP = (1, 3, 6, 7)
CASES: dict[str, tuple[Any, ...]] = {
    "global filter": (
        lambda x, w: fft.irfft2(fft.rfft2(x, norm="ortho") * w, s=(6, 7), norm="ortho"),
        MAP,
        rand(3, 6, 4, dtype=torch.cfloat),
    ),
    "filter of real weights": (
        lambda x, w: fft.irfft2(fft.rfft2(x) * torch.view_as_complex(w), s=(6, 7)),
        MAP,
        rand(3, 6, 4, 2),
    ),
    "mixing of tokens": (lambda x: fft.fft(fft.fft(x, dim=-1), dim=-2).real, (1, 5, 8)),
    "all axes": (lambda x: torch.view_as_real(fft.fftn(x, dim=(1, 2, 3), norm="forward")), MAP),
    "cut and filled": (lambda x: torch.view_as_real(fft.ifft(torch.complex(x, x.flip(-1)), n=9, dim=2)), MAP),
    "hermitian": (lambda x: fft.hfft(torch.complex(x, x + 1), n=9), MAP),
    "magnitude and angle": (lambda x: torch.cat([fft.rfft(x).abs(), fft.rfft(x).angle()], -1), MAP),
    "stft": (lambda x: torch.stft(x, 16, 4, window=torch.hann_window(16), return_complex=True).abs(), (1, 60)),
    "rotary": (
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (4, 2)))
            * torch.polar(torch.ones(5, 4), torch.arange(20.0).view(5, 4))
        ).flatten(2),
        (1, 5, 8),
    ),
    "spectral convolution": (spectral_convolution, (1, 2, 9), rand(2, 4, 3, dtype=torch.cfloat)),
    "quotient": (lambda x: (fft.fft(x) / (fft.fft(x).abs() + 1)).imag, (1, 4, 8)),
    "shifted": (lambda x: fft.fftshift(fft.fft2(x), dim=(-2, -1)).abs(), MAP),
    "while": (while_loop, (1, 8)),
    "early answer": (
        lambda x, w: torch.cond((x @ w).amax() > 0.5, lambda x: x.clone(), lambda x: x.sin() @ w, (x,)),
        (1, 8),
        rand(8, 8),
    ),
    "scan": (scan, (1, 6, 8)),
    "cond": (lambda x: torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,)), (1, 8)),
    "standardised weight": (
        lambda x, w: F.conv2d(x, F.batch_norm(w.flatten(1)[None], None, None, training=True).view_as(w)),
        MAP,
        rand(4, 3, 3, 3),
    ),
    "dilated": (lambda x, w: F.conv2d(x, w, padding=8, dilation=8), (1, 3, 8, 8), rand(4, 3, 3, 3)),
    "weight in another order": (lambda x, w: torch.einsum("bixk,iok->boxk", x, w), MAP, rand(3, 5, 7)),
    "maxima and where they are": (lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), MAP),
    "unpooled": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (1, 3, 6, 6)),
    "antialias": (lambda x: F.interpolate(x, size=(4, 3), mode="bilinear", antialias=True), MAP),
    "antialias, cubic": (lambda x: F.interpolate(x, size=(9, 3), mode="bicubic", antialias=True), MAP),
    "triangles": (
        lambda x: (x[:, *torch.tril_indices(5, 6, -1)], x[:, *torch.triu_indices(5, 6, 2)]),
        (1, 5, 6),
    ),
    "a part of width zero": (lambda x: torch.cat([x[:, :0], x.sin()], 1), (1, 2, 3)),
    "joined to nothing": (lambda x: torch.cat([torch.tensor([]), x.sin()], -1), (1, 2, 3)),
    "padded by nothing": (lambda x, w: F.conv2d(F.pad(x, (0, 0, 0, 0)), w), MAP, rand(4, 3, 3, 3)),
    "a row of functions": (lambda x: x.tanh().tanh().tanh().tanh().tanh().tanh(), (1, 8)),
}


class Both(nn.Module):
    """All cases as one model, so that they are compiled together."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(Function(CASES[n][0], *CASES[n][2:]) for n in names)

    def forward(self, *inputs: torch.Tensor) -> list[Any]:
        return [case(x) for case, x in zip(self.cases, inputs, strict=True)]


@pytest.mark.host
@pytest.mark.slow
def test_rewritten_operators_equal_pytorch(tmp_path: Path) -> None:
    names = list(CASES)
    inputs = tuple(rand(*CASES[n][1]) for n in names)
    model = Both(names).eval()
    with torch.no_grad():
        want = model(*inputs)
        program = load_model(torch.export.export(model, inputs), name="cases")
    compiled = compile_host(program, tmp_path)
    got = iter(outputs(compiled.bundle.run(*[x.numpy() for x in inputs])))
    for name, expected in zip(names, want, strict=True):
        for y in expected if isinstance(expected, tuple) else (expected,):
            assert errors((next(got),), (y,)) < 1e-5, name
    assert not [n for n in program.graph.nodes if "fft" in str(n.target) or "complex" in str(n.target)]


class Causal(nn.Module):
    """A mask and limits with infinities among the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))
        self.register_buffer("most", torch.tensor(math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(self.query(x), x.transpose(1, 2)) + self.mask
        return torch.minimum(torch.softmax(scores, -1) @ x, self.most)


@pytest.mark.host
def test_infinities_of_buffers_are_put_in_by_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Causal().eval(), rand(1, 5, 8)
    program = load_model(model, input_shape=(1, 5, 8), name="causal")
    assert all(bool(w.isfinite().all()) for w in program.weights().values())
    want = model(x)
    assert torch.equal(program(x)[0], want)
    compiled = compile_host(program, tmp_path)
    assert errors(outputs(compiled.bundle.run(x.numpy())), (want,)) < 1e-5
    with torch.no_grad():
        model.query.weight[0, 0] = math.inf
    with pytest.raises(EdgecError, match=r"weight 'query\.weight' of causal: has NaN or infinite values"):
        load_model(model, input_shape=(1, 5, 8), name="causal")


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "a complex result": (lambda x: fft.fft(x), "returns a complex tensor; return torch.view_as_real of it"),
    "complex without a rule": (lambda x: torch.linalg.eigvals(x.view(1, 2, 2)).real, "linalg_eigvals.* has no rule"),
    "a loop until": (
        lambda x: torch._higher_order_ops.while_loop(lambda y: y.sum() < 9, lambda y: (y * 2,), (x,))[0],
        "has no fixed number of turns: when it ends depends on an input",
    ),
    "a long loop": (
        lambda x: torch._higher_order_ops.while_loop(
            lambda i, y: i < 9999, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x)
        )[1],
        "is too long to be written out: more than 2000 operators",
    ),
    "packed": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x.view(1, 2, 2), torch.tensor([2]), True).data,
        "packed sequences are not supported; pass the padded tensor",
    ),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_refused_in_one_line(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(EdgecError, match=message) as caught:
        load_model(Function(function).eval(), input_shape=(1, 4), name="model")
    assert "\n" not in str(caught.value)
    assert "test_importing.py:" in str(caught.value) or name == "a complex result"


@pytest.mark.pure
def test_standardised_weights_are_computed_once() -> None:
    function, shape, weight = CASES["standardised weight"]
    program = load_model(Function(function, weight), input_shape=shape)
    assert not [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    # A transposed weight is read as it is.
    plain = load_model(Function(lambda x, w: x @ w.t(), rand(5, 4)), input_shape=(1, 4))
    assert list(plain.weights()) == ["weight"]


# -- inputs and outputs ------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Inputs by name only, outputs with names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor, *, mask: torch.Tensor, unused: Any = None) -> dict[str, Any]:
        y = self.fc(F.one_hot(ids, 4).float()) * mask.unsqueeze(-1)
        return {"logits": y, "aux": (y.argmax(-1), y > 0), "y-max": y.amax(-1)}


def named() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Named(), {"ids": torch.tensor([[0, 1, 2]]), "mask": torch.ones(1, 3, dtype=torch.uint8)}


def misnamed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return Named(), {"id": torch.tensor([[0, 1, 2]])}


@pytest.mark.host
def test_names_reach_the_bundle(tmp_path: Path) -> None:
    program = load_model(f"{__file__}:named", name="model")
    assert [s.name for s in program.inputs] == ["ids", "mask"]
    assert [s.name for s in program.outputs] == ["logits", "aux_0", "aux_1", "y_max"]
    assert [s.dtype for s in program.outputs] == ["float32", "int64", "bool", "float32"]
    assert list(program.weights()) == ["fc.weight", "fc.bias"]
    program.save(tmp_path / "model.pt2")
    again = load_model(tmp_path / "model.pt2")
    assert (again.inputs, again.outputs) == (program.inputs, program.outputs)
    bundle = compile_host(again, tmp_path).bundle
    header = next(bundle.path.glob("include/*.h")).read_text()
    assert (
        "(const int64_t *ids, const uint8_t *mask, float *logits, int64_t *aux_0, uint8_t *aux_1, float *y_max"
        in header
    )
    # Any batch: one sample after the other.
    ids, mask = torch.tensor([[0, 1, 2], [3, 2, 1], [1, 1, 0]]), torch.tensor([[1, 1, 0]] * 3, dtype=torch.uint8)
    assert errors(outputs(bundle.run(ids.numpy(), mask.numpy())), program(ids, mask)) < 1e-6


class Taken(nn.Module):
    """Names that torch's graph modules have for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.rand(4, 4))
        self.code, self.meta = nn.Parameter(torch.rand(4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.meta(x @ self.graph + self.code)


@pytest.mark.pure
def test_weights_may_have_any_name(tmp_path: Path) -> None:
    model, x = Taken(), torch.rand(1, 4)
    exported = torch.export.export(model, (x,))
    torch.export.save(exported, tmp_path / "model.pt2")
    for form in (model, exported, str(tmp_path / "model.pt2")):
        program = load_model(form, input_shape=(1, 4) if form is model else None)
        assert torch.equal(program(x)[0], model(x))
        assert {"graph_", "code_"} <= set(program.weights())


@pytest.mark.pure
def test_a_wrong_input_name_is_refused() -> None:
    with pytest.raises(EdgecError, match="example input 'id', which forward does not take; it takes ids, mask, unused"):
        load_model(f"{__file__}:misnamed")


@pytest.mark.pure
@pytest.mark.parametrize("limits", [(2, 8), (3, 5000)])
def test_a_file_of_any_dynamic_batch(limits: tuple[int, int], tmp_path: Path) -> None:
    low, high = limits
    model, x = nn.Linear(4, 3), torch.rand(7, 4)
    shapes = ({0: torch.export.Dim("n", min=low, max=high)},)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), tmp_path / "model.pt2")
    program = load_model(tmp_path / "model.pt2")
    assert program.dynamic_batch
    assert all(torch.equal(program(x[:n])[0], model(x[:n])) for n in (1, 2, 7))
