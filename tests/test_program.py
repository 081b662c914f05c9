"""Program: reading, printing, editing with verification, saving and loading."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.program import (
    Program,
    TensorSpec,
    add_weight,
    constant_of,
    dtype_of,
    get_weight,
    is_call,
    layer_of,
    output_nodes,
    placeholders,
    shape_of,
    weight_node,
)
from edgec.registry import load_pass
from tests import zoo

pytestmark = pytest.mark.pure

aten = torch.ops.aten

Edit = Callable[[fx.GraphModule], None]


def node_of(module: fx.GraphModule, target: object) -> fx.Node:
    (found,) = [n for n in module.graph.nodes if n.target is target]
    return found


def edited(name: str, edit: Edit) -> Program:
    program = zoo.program(name)
    module = program.edit()
    edit(module)
    return program.replace(module)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.names())
def test_it_computes_what_the_module_computes(name: str) -> None:
    program, module = zoo.program(name), zoo.module(name)
    for batch in (1, 2, 5):
        x = zoo.example(name, batch)
        with torch.no_grad():
            want = module(x)
        got = program(x)
        assert isinstance(got, tuple)
        for a, b in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
            assert a.shape == b.shape and not a.requires_grad
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_specs_show_a_batch_of_one() -> None:
    program = zoo.program("two_outputs")
    assert program.dynamic_batch and program.example_inputs[0].shape[0] == 2
    assert program.inputs == (TensorSpec("x", (1, 3, 8, 8), "float32"),)
    assert program.outputs == (TensorSpec("y0", (1, 16, 4), "float32"), TensorSpec("y1", (1, 4, 4, 2), "float32"))
    assert [s.name for s in zoo.program("mlp").outputs] == ["y"]
    assert str(program.inputs[0]) == "x: float32[1, 3, 8, 8]" and program.inputs[0].elements == 192


def test_weights_are_listed_once_each_under_their_path() -> None:
    weights = zoo.program("residual").weights()
    assert {"conv1.weight", "shortcut.0.weight", "fc.bias", "bn1.running_var"} <= set(weights)
    assert "bn1.num_batches_tracked" not in weights
    assert all(w.dtype == torch.float32 and not w.requires_grad for w in weights.values())


def test_nodes_know_their_layer_shape_and_type() -> None:
    program = zoo.program("residual")
    layers = {layer_of(n) for n in program.graph.nodes if is_call(n, aten.conv2d.default)}
    assert layers == {"conv1", "conv2", "conv3", "shortcut.0"}
    linear = node_of(program.module, aten.linear.default)
    assert (layer_of(linear), shape_of(linear), dtype_of(linear)) == ("fc", (2, 6), torch.float32)
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    assert torch.equal(get_weight(program.module, weight), zoo.module("residual").state_dict()["fc.weight"])
    assert constant_of(program.module, linear.args[0]) is None
    assert constant_of(program.module, None) is None


def test_a_program_is_frozen() -> None:
    program = zoo.program("mlp")
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        program.annotations["x"] = 1  # type: ignore[index]


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "vit_block", "squeeze_excite"])
def test_text(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"program_{name}.txt", zoo.program(name).text())


@pytest.mark.parametrize("name", zoo.names())
def test_equal_models_have_equal_text(name: str) -> None:
    again = load_model(zoo.module(name), input_shape=zoo.ZOO[name].shape, name=name)
    assert again.text() == zoo.program(name).text()
    assert again.fingerprint() == zoo.program(name).fingerprint()


def test_the_text_shows_a_change_of_one_bit_of_a_weight() -> None:
    def flip(module: fx.GraphModule) -> None:
        weight = module.get_parameter("conv.weight")
        weight.view(torch.int32)[0, 0, 0, 0] ^= 1

    before, after = zoo.program("conv_bn_relu"), edited("conv_bn_relu", flip)
    changed = [b for a, b in zip(before.text().splitlines(), after.text().splitlines(), strict=True) if a != b]
    assert len(changed) == 1 and "weight conv.weight" in changed[0]
    assert after.fingerprint() != before.fingerprint()


def test_the_text_shows_annotations_in_order_of_their_keys() -> None:
    program = zoo.program("mlp").replace(annotations={"b": 2, "a": (1, "x")})
    assert program.text().splitlines()[-2:] == ["  # a: (1, 'x')", "  # b: 2"]


# -- editing -----------------------------------------------------------------------------------------------------------


def test_edit_gives_a_copy_of_graph_and_weights() -> None:
    program = zoo.program("conv_bn_relu")
    text, module = program.text(), program.edit()
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    module.graph.erase_node(output_nodes(module)[0].next)
    assert program.text() == text


def test_replace_drops_dead_nodes_and_unused_weights() -> None:
    def leave_dead(module: fx.GraphModule) -> None:
        conv = node_of(module, aten.conv2d.default)
        with module.graph.inserting_after(conv):
            module.graph.call_function(aten.exp.default, (conv,))
        norm = node_of(module, aten.batch_norm.default)
        norm.replace_all_uses_with(conv)

    after = edited("conv_bn_relu", leave_dead)
    assert set(after.weights()) == {"conv.weight"}
    assert {n.target for n in after.graph.nodes if n.op == "call_function"} == {aten.conv2d.default, aten.relu.default}
    assert [n for n, _ in after.module.named_parameters()] == ["conv.weight"]
    assert list(after.module.named_buffers()) == []


def test_replace_keeps_annotations_and_name() -> None:
    program = zoo.program("mlp").replace(annotations={"a": 1})
    again = program.replace(program.edit())
    assert (again.name, dict(again.annotations)) == ("mlp", {"a": 1})
    assert dict(program.replace(annotations={}).annotations) == {}


def other_shape(module: fx.GraphModule) -> None:
    last = output_nodes(module)[0]
    with module.graph.inserting_after(last):
        new = module.graph.call_function(aten.flatten.using_ints, (last, 1))
    last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def other_type(module: fx.GraphModule) -> None:
    last = output_nodes(module)[0]
    with module.graph.inserting_after(last):
        new = module.graph.call_function(aten._to_copy.default, (last,), {"dtype": torch.int32})
    last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def one_more_output(module: fx.GraphModule) -> None:
    (out,) = [n for n in module.graph.nodes if n.op == "output"]
    last = output_nodes(module)[0]
    out.args = ((last, last),)


def wrong_operands(module: fx.GraphModule) -> None:
    conv = node_of(module, aten.conv2d.default)
    conv.update_arg(1, next(n for n in module.graph.nodes if n.target == "bn.weight"))


def use_before_definition(module: fx.GraphModule) -> None:
    conv, last = node_of(module, aten.conv2d.default), output_nodes(module)[0]
    conv.update_arg(0, last)


def shape_of_the_data(module: fx.GraphModule) -> None:
    last = output_nodes(module)[0]
    with module.graph.inserting_after(last):
        places = module.graph.call_function(aten.nonzero.default, (last,))
    with module.graph.inserting_after(places):
        total = module.graph.call_function(aten.sum.default, (places,))
    with module.graph.inserting_after(total):
        new = module.graph.call_function(aten.add.Tensor, (last, total))
    last.replace_all_uses_with(new, delete_user_cb=lambda user: user.op == "output")


REFUSED: dict[str, tuple[Edit, str]] = {
    "another shape": (other_shape, "conv_bn_relu: pass changed the outputs: "),
    "another type": (other_type, "conv_bn_relu: pass changed the outputs: "),
    "one more output": (one_more_output, "conv_bn_relu: pass changed the outputs: "),
    "operands that do not fit": (wrong_operands, "conv_bn_relu: edited graph does not run: "),
    "use before definition": (use_before_definition, "conv_bn_relu: edited graph does not run: "),
    "shape that depends on data": (shape_of_the_data, "conv_bn_relu: edited graph does not run: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_replace_refuses(case: str) -> None:
    edit, message = REFUSED[case]
    with pytest.raises(EdgecError) as caught:
        edited("conv_bn_relu", edit)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_new_weights_get_free_paths_and_the_right_kind() -> None:
    module = zoo.program("conv_bn_relu").edit()
    assert add_weight(module, "conv.weight", torch.ones(1)) == "conv.weight_1"
    assert add_weight(module, "conv.weight", torch.ones(1)) == "conv.weight_2"
    assert add_weight(module, "fresh.path.codes", torch.ones(1, dtype=torch.int8)) == "fresh.path.codes"
    assert "fresh.path.codes" in dict(module.named_buffers())
    assert "conv.weight_1" in dict(module.named_parameters())
    given = torch.ones(1)
    add_weight(module, "mine", given)
    given.zero_()
    assert float(module.get_parameter("mine")) == 1.0


def test_a_weight_put_into_the_graph_is_computed_with() -> None:
    def double(module: fx.GraphModule) -> None:
        last = output_nodes(module)[0]
        with module.graph.inserting_after(last):
            factor = weight_node(module, "factor", torch.tensor(2.0))
        with module.graph.inserting_after(factor):
            new = module.graph.call_function(aten.mul.Tensor, (last, factor))
        last.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    before, after = zoo.program("conv_bn_relu"), edited("conv_bn_relu", double)
    x = zoo.example("conv_bn_relu")
    torch.testing.assert_close(after(x)[0], 2 * before(x)[0])
    assert float(after.weights()["factor"]) == 2.0


# -- export, save, load ------------------------------------------------------------------------------------------------


def test_export_with_the_batch_of_your_choice() -> None:
    program = zoo.program("residual")
    x = zoo.example("residual", 1)
    fixed = program.export(batch=1)
    assert [tuple(n.meta["val"].shape) for n in fixed.graph.nodes if n.op == "placeholder"][-1] == (1, 4, 8, 8)
    torch.testing.assert_close(fixed.module()(x)[0], program(x)[0])
    dynamic = program.export().module()
    for batch in (1, 3):
        x = zoo.example("residual", batch)
        torch.testing.assert_close(dynamic(x)[0], program(x)[0])
    assert program.batch_inputs(1)[0].shape[0] == 1 and program.batch_inputs(7)[0].shape[0] == 7


class Static(nn.Module):
    """Its reshape fixes the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).reshape(1, 12)


def test_a_static_program_keeps_its_batch() -> None:
    program = load_model(Static(), input_shape=(1, 3, 4), name="static")
    assert not program.dynamic_batch
    assert program.batch_inputs(5) is program.example_inputs
    assert program.inputs[0].shape == (1, 3, 4) and program.outputs[0].shape == (1, 12)


def layers(program: Program) -> list[str]:
    """Layers of all calls but those that take one of several results, which torch names anew when it loads a file."""
    return [layer_of(n) for n in program.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


@pytest.mark.parametrize("name", zoo.names())
def test_a_saved_program_loads_again(name: str, tmp_path: Path) -> None:
    program = zoo.program(name)
    program.save(tmp_path / f"{name}.pt2")
    again = load_model(tmp_path / f"{name}.pt2")
    x = zoo.example(name, 3)
    assert (again.inputs, again.outputs, again.dynamic_batch) == (program.inputs, program.outputs, True)
    assert layers(again) == layers(program)
    assert all(torch.equal(a, b) for a, b in zip(again(x), program(x), strict=True))


def test_a_quantised_program_loads_again(tmp_path: Path) -> None:
    program = load_pass("quantize-int8")().run(
        zoo.program("residual"), Context(calibration=zoo.calibration("residual"))
    )
    program.save(tmp_path / "q.pt2")
    again = load_model(tmp_path / "q.pt2")
    x = zoo.example("residual", 3)
    assert torch.equal(again(x)[0], program(x)[0])
    assert torch.int8 in {w.dtype for w in again.weights().values()}


def test_the_inputs_are_the_placeholders_in_order() -> None:
    class Sum(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left + 2 * right

    exported = torch.export.export(Sum(), (torch.rand(2, 3), torch.rand(2, 3)))
    program = load_model(exported, name="sum")
    assert [n.name for n in placeholders(program.module)] == [s.name for s in program.inputs] == ["left", "right"]
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    torch.testing.assert_close(program(a, b)[0], a + 2 * b)


def test_names_of_weights_give_way() -> None:
    """To weights where a module should be, to modules, and to attributes of the graph itself."""
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    names = ("folded", "folded.weight", "folded.weight", "graph", "a.b", "a")
    paths = [add_weight(module, name, torch.full((1,), float(i))) for i, name in enumerate(names)]
    assert paths == ["folded", "folded_1.weight", "folded_1.weight_1", "graph_1", "a.b", "a_1"]
    assert [module.get_parameter(path).item() for path in paths] == list(range(6))
