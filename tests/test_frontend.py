"""Models in: every form, functional graphs, the import check, and every mistake by its message."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.data import random_data
from edgec.errors import EdgecError
from edgec.frontend import export_module, import_check, import_exported, load_model
from edgec.program import Program, is_call, layer_of
from tests import zoo

pytestmark = pytest.mark.pure

aten = torch.ops.aten


def refused(model: Any, **options: Any) -> str:
    with pytest.raises(EdgecError) as caught:
        load_model(model, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def calls(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


# -- forms of a model --------------------------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)


class Sum(nn.Module):
    def forward(self, left, right):
        return left + 2 * right


def tiny():
    torch.manual_seed(0)
    return Tiny()


def with_example():
    return tiny(), torch.rand(1, 4)


def with_examples():
    return Sum(), (torch.rand(1, 4), torch.rand(1, 4))


def wrong():
    return 17


def wrong_example():
    return tiny(), [1, 2]


def failing():
    raise ValueError("no weights here")


number = 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(FACTORY)
    return path


def test_a_module_from_python() -> None:
    program = load_model(zoo.module("residual"), input_shape=(1, 4, 8, 8))
    assert program.name == "residual" and program.dynamic_batch
    assert program.text() == zoo.program("residual").text()


def test_a_file_with_a_factory(factory: Path) -> None:
    program = load_model(f"{factory}:tiny", input_shape=(1, 4))
    assert program.name == "tiny"
    again = load_model(f"{factory}:with_example", name="tiny")
    assert again.text() == program.text()


def test_a_factory_with_several_inputs(factory: Path) -> None:
    program = load_model(f"{factory}:with_examples")
    assert [s.name for s in program.inputs] == ["left", "right"] and program.dynamic_batch


def test_a_module_with_a_factory(factory: Path) -> None:
    """In another process, because the package must be importable there."""
    code = "from edgec.frontend import load_model; print(load_model('models:with_example').name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=factory.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "with_example"


def test_an_exported_program_is_left_as_it_was() -> None:
    exported = torch.export.export(zoo.module("conv_bn_relu"), (torch.rand(1, 3, 8, 8),))
    text, weights = str(exported.graph), copy.deepcopy(exported.state_dict)
    program = load_model(exported, name="conv_bn_relu")
    assert str(exported.graph) == text
    assert not program.dynamic_batch
    assert all(
        torch.equal(v, weights[k]) and v.requires_grad == weights[k].requires_grad
        for k, v in exported.state_dict.items()
    )


def test_a_program_is_taken_as_it_is() -> None:
    assert load_model(zoo.program("mlp")) is zoo.program("mlp")


def test_a_pt2_file(tmp_path: Path) -> None:
    dim = torch.export.Dim("b", min=1, max=16)
    exported = torch.export.export(zoo.module("pools"), (torch.rand(2, 4, 9, 9),), dynamic_shapes=({0: dim},))
    torch.export.save(exported, tmp_path / "net.pt2")
    program = load_model(tmp_path / "net.pt2")
    assert program.name == "net" and program.dynamic_batch
    assert load_model(str(tmp_path / "net.pt2"), name="pools").text() == zoo.program("pools").text()


def test_the_module_of_the_user_stays_as_it_was() -> None:
    """Mode, gradients and weights: training goes on after a compile."""
    module = zoo.module("conv_bn_relu").train()
    module.conv.weight.requires_grad_(False)
    program = load_model(module, input_shape=(1, 3, 8, 8))
    assert module.training and module.bn.training
    assert not module.conv.weight.requires_grad and module.bn.weight.requires_grad
    text = program.text()
    with torch.no_grad():
        module.conv.weight.zero_()
    assert program.text() == text


# -- shapes ------------------------------------------------------------------------------------------------------------


class FixedBatch(nn.Module):
    """Exports with any batch, but the batch is not in its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, -1)


class Gram(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x.mean()


class Scalar(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * t


@pytest.mark.parametrize("module", [FixedBatch(), Gram()])
def test_a_batch_that_an_output_does_not_keep_is_static(module: nn.Module) -> None:
    program = load_model(module, input_shape=(1, 6))
    assert not program.dynamic_batch and program.example_inputs[0].shape == (1, 6)


def test_inputs_of_different_batches_are_static() -> None:
    exported = export_module(Scalar(), (torch.rand(2, 3), torch.rand(1)), "scalar")
    program = import_exported(exported, "scalar")
    assert [s.shape for s in program.inputs] == [(2, 3), (1,)]


def test_only_the_batch_may_be_dynamic() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    height = torch.export.Dim("height", min=4, max=64)
    exported = torch.export.export(Conv(), (torch.rand(1, 3, 8, 8),), dynamic_shapes=({2: height},))
    message = refused(exported, name="net")
    assert message.startswith("input 'x' of net: dimension 2 is dynamic (") and "fixed size" in message


def test_a_file_whose_output_loses_the_batch(tmp_path: Path) -> None:
    dim = torch.export.Dim("b", min=1, max=16)
    exported = torch.export.export(FixedBatch(), (torch.rand(2, 6),), dynamic_shapes=({0: dim},))
    torch.export.save(exported, tmp_path / "net.pt2")
    assert "an output does not have it as dimension 0" in refused(tmp_path / "net.pt2")


def test_a_batch_norm_over_the_batch_cannot_have_a_dynamic_one() -> None:
    class Centre(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(0, keepdim=True)

    message = refused(Centre(), input_shape=(1, 6))
    assert "output 'y' of a sample depends on the other samples of its batch" in message


@pytest.mark.parametrize("shape", [(), (0, 3), (-1, 3), (1.5, 3)])
def test_input_shapes_that_are_none(shape: tuple[int, ...]) -> None:
    assert "is not a shape; give positive whole numbers" in refused(nn.Linear(3, 3), input_shape=shape)


# -- functional graphs -------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """What torchvision models are full of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn(self.conv(x)))
        y += self.act(y * 2)
        return F.hardtanh_(y, 0.0, 2.0)


class Alias(nn.Module):
    """Every name of the tensor sees the activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        view = y.view(-1, 2, 3)
        F.relu_(y)
        return view.flatten(1) + y


class ReadBefore(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        kept = y + 1
        y.relu_()
        return y * kept


class Assign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.fc(x))
        y[:, 0] = 1.0
        y[:, 2:4] *= 3.0
        return y


class OnInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.sub_(0.5)
        x[:, 1:].mul_(2.0)
        return x.relu()


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.fc(x)
        with torch.autocast("cpu", enabled=False):
            return y * x


class IntegerInPlace(nn.Module):
    """In place the sum stays int64, out of place it would become float."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(6)
        places += 1
        return x * places


FUNCTIONAL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "activations and sums": (InPlace, (1, 3, 6, 6)),
    "views": (Alias, (1, 6)),
    "read before": (ReadBefore, (1, 6)),
    "assignment to slices": (Assign, (1, 6)),
    "the input": (OnInput, (1, 6)),
    "regions without gradients": (NoGrad, (1, 6)),
    "integers": (IntegerInPlace, (1, 6)),
}


@pytest.mark.parametrize("case", FUNCTIONAL)
def test_graphs_become_functional_and_stay_right(case: str) -> None:
    make, shape = FUNCTIONAL[case]
    module = make()
    zoo.set_weights(module, seed=0)
    module.eval()
    program = load_model(module, input_shape=shape)
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
        assert not isinstance(node.target, torch._ops.HigherOrderOperator)
    x = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(0))
    given = x.clone()
    with torch.no_grad():
        want = module(x.clone())
    torch.testing.assert_close(program(given)[0], want)
    assert torch.equal(given, x)


def test_simple_in_place_operators_need_no_retrace() -> None:
    """Names, layers and composite operators stay what torch.export made of them."""
    module = InPlace()
    program = load_model(module, input_shape=(1, 3, 6, 6))
    norm = next(n for n in program.graph.nodes if is_call(n, aten.batch_norm.default))
    assert layer_of(norm) == "bn"
    assert calls(program).count("aten.relu.default") == 2 and "aten.add.Tensor" in calls(program)


def test_batch_norms_survive_a_retrace() -> None:
    program = load_model(Assign(), input_shape=(1, 6))
    norm = next(n for n in program.graph.nodes if is_call(n, aten.batch_norm.default))
    assert layer_of(norm) == "bn"


# -- the import check --------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Its result depends on how often it ran; torch.export records the first time."""

    runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.runs += 1
        return x * Counting.runs


def test_a_model_that_export_records_wrongly_is_refused() -> None:
    message = refused(Counting(), input_shape=(1, 4))
    assert message.startswith("counting: output 'y' of the exported graph differs from the model's (relative error ")


def test_import_check_measures_every_output() -> None:
    program = zoo.program("two_outputs")
    module = zoo.module("two_outputs")
    import_check(program, module)

    def second_is_off(x: torch.Tensor) -> list[torch.Tensor]:
        first, second = module(x)
        return [first, second + 1e-4]

    with pytest.raises(EdgecError, match="output 'y1' of the exported graph differs"):
        import_check(program, second_is_off)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.double(),
        lambda y: y[:, :3],
        lambda y: torch.where(y == y.max(), torch.nan, y),
        lambda y: torch.where(y == y.max(), torch.inf, y),
    ],
)
def test_import_check_sees_types_shapes_and_values_that_are_not_finite(change: Callable[..., torch.Tensor]) -> None:
    module = zoo.module("mlp")
    with pytest.raises(EdgecError, match="relative error inf"):
        import_check(zoo.program("mlp"), lambda x: change(module(x)))


def test_equal_infinities_pass() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.relu(x - 0.5))

    assert load_model(Log(), input_shape=(1, 8)).dynamic_batch


# -- what is refused ---------------------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Select(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


class While(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(lambda y: y.sum() < 9, lambda y: (y * 2 + 1,), (x,))[0]


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Dropout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=True)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return x + self.seen


class TrainNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)


class Half(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Weight(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, value]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.sum()


class Returns(nn.Module):
    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


class TwoInputs(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + right


class Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "branch on data": (Branch, "branch \\(.*test_frontend.py:\\d+\\): does not export: .*data-dependent"),
    "leaves torch": (Numpy, "numpy.*: does not export: .*numpy"),
    "shape of the data": (Select, "shape of the result of aten.index.Tensor depends on the values of its input"),
    "while": (While, "while.*test_frontend.py:.*while_loop .* has no fixed number of turns.* an input; give the loop"),
    "noise": (Noise, "aten.randn_like.default gives random values; give the model its noise as an input"),
    "dropout": (Dropout, "aten.dropout.default gives random values; call model.eval\\(\\)"),
    "state": (Stateful, "stateful \\(.*test_frontend.*\\): changes its buffer 'seen' when it runs"),
    "batch statistics": (TrainNorm, "batch norm uses statistics of the batch: the model is in training mode"),
    "half": (lambda: Half(torch.float16), "weight 'fc.weight' of half: is torch.float16, .* model.float\\(\\)"),
    "bfloat16": (lambda: Half(torch.bfloat16), "weight 'fc.weight' of half: is torch.bfloat16"),
    "double": (lambda: Half(torch.float64), "weight 'fc.weight' of half: is torch.float64"),
    "complex": (lambda: Half(torch.complex128), "weight 'fc.weight' of half: is torch.complex128; .*real numbers"),
    "NaN": (lambda: Weight(torch.nan), "weight 'scale' of weight: has NaN or infinite values"),
    "infinity": (lambda: Weight(torch.inf), "weight 'scale' of weight: has NaN or infinite values"),
    "None": (lambda: Returns(lambda x: (x, None)), "returns: returns None beside tensors"),
    "a number": (lambda: Returns(lambda x: (x, 3)), "returns: returns 3 beside tensors"),
    "nothing": (lambda: Returns(lambda x: ()), "returns: returns nothing; return at least one tensor"),
    "another input": (TwoInputs, "twoinputs.*: does not run on an input of shape \\[1, 4\\]: TypeError: .*'right'"),
    "wrong shape": (lambda: nn.Linear(5, 2), "linear.*: does not run on an input of shape \\[1, 4\\]: .*1x4 and 5x2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_refused(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[case]
    assert re.search(message, refused(make(), input_shape=(1, 4)))
    # Nothing but the message: torch logs whole graphs on the way.
    assert capfd.readouterr() == ("", "")


class Standardised(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias)


@pytest.mark.parametrize("tail", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_batch_norm_over_a_weight_is_no_training(tail: nn.Module) -> None:
    program = load_model(nn.Sequential(Standardised(3, 4, 3), tail), input_shape=(1, 3, 6, 6))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        aten.conv2d.default,
        aten.relu.default,
    ]
    stored = program.weights()["0.standardised"]
    assert torch.allclose(stored.flatten(1).mean(1), torch.zeros(4), atol=1e-6)


def test_the_place_of_a_problem_is_the_layer_and_the_line() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity(), Noise()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x))

    message = refused(Outer(), input_shape=(1, 4))
    assert re.match(r"outer \(layer blocks\.1, .*test_frontend\.py:\d+\): aten\.randn_like", message)


class Swapped(nn.Module):
    """A dropout that training mode leaves in an exported file."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc(x))


def test_a_file_exported_in_training_mode(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Swapped().train(), (torch.rand(1, 4),)), tmp_path / "net.pt2")
    message = refused(tmp_path / "net.pt2")
    assert re.match(
        r"net \(layer drop, .*\): aten\.dropout\.default gives random values; call model\.eval\(\)", message
    )


def test_integer_inputs_are_fine_and_half_inputs_are_not() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x).mean(1)

    exported = export_module(Embed().eval(), (torch.randint(0, 7, (1, 5)),), "embed")
    program = import_exported(exported, "embed")
    assert program.inputs[0].dtype == "int64" and program.dynamic_batch
    plain = torch.export.export(Returns(lambda x: x * 2), (torch.rand(1, 4, dtype=torch.float64),))
    assert "input 'x' of net: is torch.float64, kernels compute in torch.float32" in refused(plain, name="net")


class Last(nn.Module):
    """The last of `length` steps: a length of zero has none."""

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return x.gather(1, (length - 1).view(-1, 1)) * 2


def test_integers_of_the_example_are_kept(tmp_path: Path) -> None:
    example = (torch.rand(1, 5), torch.tensor([4]))
    exported = torch.export.export(Last(), example)
    program = load_model(exported, name="last")
    assert program.example_inputs[1].tolist() == [4]
    noise = random_data(program.inputs, 8, examples=program.example_inputs).read()[0]
    assert noise[1].tolist() == [4] * 8
    torch.export.save(exported, tmp_path / "last.pt2")
    message = refused(tmp_path / "last.pt2")
    assert "last: does not run on its example inputs: RuntimeError: index -1 is out of bounds" in message


PATHS: dict[str, str] = {
    "gone.pt2": "does not exist; give a .pt2 or .onnx file, file.py:factory or package.module:factory",
    "gone": "does not exist; give a .pt2 or .onnx file",
    "gone.py:make": "does not exist",
    ".": "is a folder, not a model",
    "folder.pt2": "is a folder, not a model",
    "models.py": "is not a model that can be read; name the function that makes the model: ",
    "models.py:": "does not exist",
    "weights.pth": "is not a model that can be read; a checkpoint has no graph",
    "net.onnx": "is not a readable ONNX file: ",
    "net.tflite": "is not a model that can be read; give a .pt2 or .onnx file",
    "models.py:gone": "has no function 'gone'; it has ",
    "models.py:number": "has no function 'number'",
    "models.py:wrong": "returned a int; return an nn.Module or (module, example inputs)",
    "models.py:wrong_example": "returned example inputs that are not tensors",
    "models.py:failing": "raised ValueError: no weights here",
    "models.py:tiny": "has no example input; pass --input-shape, e.g. 1,3,224,224, or return (module, example inputs)",
    "broken.py:make": "raised SyntaxError",
    "no.such.module:make": "there is no module 'no.such.module'",
}


@pytest.mark.parametrize("text", PATHS)
def test_paths_that_are_no_models(text: str, factory: Path) -> None:
    folder = factory.parent
    (folder / "folder.pt2").mkdir()
    (folder / "broken.py").write_text("def make(:\n")
    for name in ("weights.pth", "net.onnx", "net.tflite"):
        (folder / name).write_bytes(b"x")
    model = text if text.startswith("no.such") else f"{folder}/{text}"
    assert PATHS[text] in refused(model)


def test_an_input_shape_for_a_file_that_has_one(tmp_path: Path) -> None:
    zoo.program("mlp").save(tmp_path / "mlp.pt2")
    assert "--input-shape: a .pt2 file has fixed input shapes" in refused(tmp_path / "mlp.pt2", input_shape=(1, 16))


@pytest.mark.parametrize("value", [17, None, nn.Linear, torch.rand(2)])
def test_values_that_are_no_models(value: Any) -> None:
    assert "give an nn.Module or a .pt2 or .onnx file" in refused(value)
