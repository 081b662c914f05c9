"""`.pt2` files: what torch.export.save writes is read, and nothing in a file is run.

The attacks are those that torch 2.13's own loader lets through: each test first states what torch would do.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgec.errors import EdgecError
from edgec.pt2 import _is_arithmetic, load_pt2

pytestmark = pytest.mark.pure

Entries = dict[str, bytes]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.fc(x) + self.table
        return {"all": y, "parts": [y.relu(), (y[:, :1],)]}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    dim = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(Small().eval(), (torch.rand(2, 4),), dynamic_shapes=({0: dim},)), path)
    return path


def entries(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write(path: Path, content: Entries, **options: Any) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", **options) as archive:
        warnings.simplefilter("ignore")
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def edit_model(path: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    content = entries(path)
    (name,) = [n for n in content if n.endswith("models/model.json")]
    model = json.loads(content[name])
    edit(model)
    return write(target, {**content, name: json.dumps(model).encode()})


def refused(path: Path) -> str:
    with pytest.raises(EdgecError) as caught:
        load_pt2(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


# -- what is read ------------------------------------------------------------------------------------------------------


def test_a_file_of_torch_export_loads_to_the_same_function(good: Path) -> None:
    x = torch.rand(5, 4)
    want, got = torch.export.load(good).module()(x), load_pt2(good).module()(x)
    assert torch.equal(got["all"], want["all"])
    assert torch.equal(got["parts"][1][0], want["parts"][1][0])


def test_all_shared_models_load(shared: Path) -> None:
    paths = sorted((shared / "data" / "models").glob("*.pt2"))
    assert paths
    for path in paths:
        exported = load_pt2(path)
        assert exported.example_inputs is None
        assert exported.state_dict


def test_sample_inputs_and_extra_files_are_left_out(good: Path, tmp_path: Path) -> None:
    content = entries(good)
    content["small/data/sample_inputs/model.pt"] = pickle.dumps(Touch(tmp_path / "touched"))
    content["small/extra/readme.txt"] = b"hello"
    path = write(tmp_path / "x.pt2", content)
    assert load_pt2(path).example_inputs is None
    assert not (tmp_path / "touched").exists()


def test_weights_that_share_memory_stay_right(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("view", torch.arange(12.0).reshape(3, 4)[1:, ::2])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + self.view.sum()

    exported = torch.export.export(Tied().eval(), (torch.rand(2, 4),))
    torch.export.save(exported, tmp_path / "tied.pt2")
    x = torch.rand(2, 4)
    assert torch.equal(load_pt2(tmp_path / "tied.pt2").module()(x), exported.module()(x))


# -- what is refused because it could run code -------------------------------------------------------------------------


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def pickled_weight(content: Entries, evil: Touch) -> None:
    name = "small/data/weights/model_weights_config.json"
    config = json.loads(content[name])
    config["config"]["fc.weight"]["use_pickle"] = True
    content[name] = json.dumps(config).encode()
    content["small/data/weights/weight_0"] = saved(evil)


def opaque_constant(content: Entries, evil: Touch) -> None:
    """Loaded with pickle although it is not marked so."""
    weights = json.loads(content["small/data/weights/model_weights_config.json"])["config"]
    entry = {**weights["fc.weight"], "path_name": "opaque_obj_0", "use_pickle": False}
    content["small/data/constants/model_constants_config.json"] = json.dumps({"config": {"c": entry}}).encode()
    data = pickle.dumps(evil)
    content["small/data/constants/opaque_obj_0"] = data + bytes(-len(data) % 4)


def legacy_weights(content: Entries, evil: Touch) -> None:
    content["small/data/weights/model.pt"] = saved(evil)


def legacy_constants(content: Entries, evil: Touch) -> None:
    content["small/data/constants/model.pt"] = saved(evil)


@pytest.mark.parametrize("attack", [pickled_weight, opaque_constant, legacy_weights, legacy_constants])
def test_pickles_are_refused_where_torch_loads_them(
    attack: Callable[[Entries, Touch], None], good: Path, tmp_path: Path
) -> None:
    touched = tmp_path / "touched"
    content = entries(good)
    attack(content, Touch(touched))
    path = write(tmp_path / "evil.pt2", content)
    assert "could run code when loaded; if you trust the file, " in refused(path)
    assert not touched.exists()
    # The attack is real, or this test says nothing.
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(path).module()
    assert touched.exists()


def first_node(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["graph"]["nodes"][0]


OPERATORS = [
    "torch.os.system",
    "torch.hub.load",
    "torch.ops.load_library",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten.save.default",
    "torch.ops.aten.linear.__class__",
    "torch.ops.aten.__class__.__init__",
    "torch.ops.elsewhere.op.default",
    "torch.ops.higher_order.triton_kernel_wrapper_mutation",
    "torch.sym_max.__globals__",
    "_operator.attrgetter",
    "_operator.call",
    "math.__loader__.exec_module",
    "#anything",
    "builtins.exec",
]


@pytest.mark.parametrize("target", OPERATORS)
def test_a_call_of_anything_but_a_known_operator_is_refused(target: str, good: Path, tmp_path: Path) -> None:
    path = edit_model(good, tmp_path / "evil.pt2", lambda model: first_node(model).update(target=target))
    assert f"calls '{target}', which is not an operator that edgec knows" in refused(path)


def replace_text(model: dict[str, Any], old: str, new: str) -> None:
    text = json.dumps(model["graph_module"])
    assert json.dumps(old) in text
    model["graph_module"] = json.loads(text.replace(json.dumps(old), json.dumps(new)))


SYMBOL = "Symbol('s77', positive=True, integer=True)"
CODE: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "in the name of an input": lambda model, code: replace_text(model, "x", f"x={code}"),
    "in a shape expression": lambda model, code: replace_text(model, SYMBOL, code),
    "in a guard": lambda model, code: model.update(guards_code=[f"{code} is None"]),
}


@pytest.mark.parametrize("place", CODE)
def test_source_code_in_a_file_is_never_run(place: str, good: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = edit_model(
        good, tmp_path / "evil.pt2", lambda model: CODE[place](model, f"__import__('os').makedirs('{made}')")
    )
    if place == "in a guard":
        assert load_pt2(path)._guards_code == []
        load_pt2(path).module()(torch.rand(2, 4))
    else:
        refused(path)
    assert not made.exists()
    # torch runs it.
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(path).module()(torch.rand(2, 4))
        raise RuntimeError("the guard ran before")
    assert made.exists()


@pytest.mark.parametrize("name", ["x=__import__('os')", "a b", "x)", "x\ny", "x'"])
def test_names_that_are_no_names_are_refused(name: str, good: Path, tmp_path: Path) -> None:
    def rename(model: dict[str, Any]) -> None:
        replace_text(model, "linear", name)

    assert "has the name " in refused(edit_model(good, tmp_path / "evil.pt2", rename))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('x')",
        "Add('ev' 'al(1)')",
        "Max('exit' '(0)', 1)",
        "Symbol('s0').free_symbols",
        "Symbol('a b')",
        "Symbol('s0', exit)(1)",
        "Symbol('s0', positive=exit())",
        "(lambda: 0)()",
        "[c for c in ()]",
        "f'{1}'",
        "s0[0]",
        "s0 if s0 else 1",
        "_private",
        "1 +",
        "",
    ],
)
def test_shape_expressions_that_are_not_arithmetic(text: str, good: Path, tmp_path: Path) -> None:
    assert not _is_arithmetic(text)

    def plant(model: dict[str, Any]) -> None:
        replace_text(model, SYMBOL, text)

    assert "has the shape expression " in refused(edit_model(good, tmp_path / "evil.pt2", plant))


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "Symbol('s77', positive=True, integer=True)",
        "4*Symbol('s77', positive=True, integer=True) - 1",
        "FloorDiv(Symbol('s0', positive=True, integer=True) + 1, 2)",
        "Max(1, -s0**2)",
        "Eq(s77, 2)",
        "s0 >= 2",
        "2.5",
    ],
)
def test_shape_expressions_that_are_arithmetic(text: str) -> None:
    assert _is_arithmetic(text)


def set_tree(model: dict[str, Any], node: dict[str, Any]) -> None:
    model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, node])


TREES: list[dict[str, Any]] = [
    {
        "type": "collections.defaultdict",
        "context": {"default_factory_module": "sched", "default_factory_name": "gone", "dict_context": []},
        "children_spec": [],
    },
    {"type": "builtins.dict", "context": '{"__enum__": true, "fqn": "sched:Gone", "name": "x"}', "children_spec": []},
    {"type": "builtins.tuple", "context": "not json", "children_spec": []},
    {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "torch.Size"}]},
]


@pytest.mark.parametrize("number", range(len(TREES)))
def test_trees_of_other_types_are_refused(number: int, good: Path, tmp_path: Path) -> None:
    path = edit_model(good, tmp_path / "evil.pt2", lambda model: set_tree(model, TREES[number]))
    assert "has inputs or outputs that are not tensors" in refused(path)


def test_torch_imports_what_a_tree_names(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the test above matters."""
    path = edit_model(good, tmp_path / "evil.pt2", lambda model: set_tree(model, TREES[1]))
    monkeypatch.delitem(sys.modules, "sched", raising=False)
    refused(path)
    assert "sched" not in sys.modules
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(path)
    assert "sched" in sys.modules


def test_custom_objects_are_refused(good: Path, tmp_path: Path) -> None:
    def plant(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["custom_obj_values"] = {"obj": {"name": "obj", "class_fqn": "x.Y"}}

    assert "holds a custom object" in refused(edit_model(good, tmp_path / "evil.pt2", plant))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small/data/aotinductor/model/model.so", "is a compiled AOTInductor package"),
        ("small/data/anything/else", "contains 'small/data/anything/else', which a model of plain tensors"),
        ("small/models/other.json", "contains 'small/models/other.json'"),
        ("serialized_exported_program.json", "was written by torch 2.7 or older"),
    ],
)
def test_entries_that_do_not_belong_are_refused(name: str, message: str, good: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt2", {**entries(good), name: b"{}"})
    assert message in refused(path)


# -- what is refused because it is broken ------------------------------------------------------------------------------


def without(content: Entries, end: str) -> Entries:
    return {name: data for name, data in content.items() if not name.endswith(end)}


def broken_files(good: Path, folder: Path) -> dict[str, Path]:
    content = entries(good)
    empty = folder / "empty.pt2"
    empty.write_bytes(b"")
    text = folder / "text.pt2"
    text.write_text("not a model")
    cut = folder / "cut.pt2"
    cut.write_bytes(good.read_bytes()[:-500])
    flipped = folder / "flipped.pt2"
    with zipfile.ZipFile(good) as archive:
        weight = archive.read("small/data/weights/weight_0")
    flipped.write_bytes(good.read_bytes().replace(weight, bytes(len(weight))))
    model = next(n for n in content if n.endswith("model.json"))
    config = next(n for n in content if n.endswith("model_weights_config.json"))
    return {
        "empty": empty,
        "text": text,
        "cut": cut,
        "flipped": flipped,
        "no model": write(folder / "a.pt2", without(content, "models/model.json")),
        "no weights": write(folder / "b.pt2", without(content, "weight_0")),
        "no list of weights": write(folder / "c.pt2", without(content, "model_weights_config.json")),
        "bad JSON": write(folder / "d.pt2", {**content, model: b"{"}),
        "JSON of something else": write(folder / "e.pt2", {**content, model: b"[]"}),
        "JSON without a graph": write(folder / "f.pt2", {**content, model: b"{}"}),
        "deep JSON": write(folder / "g.pt2", {**content, model: b"[" * 100_000}),
        "bad list of weights": write(folder / "h.pt2", {**content, config: b'{"config": {"a": 1}}'}),
        "compressed": write(folder / "i.pt2", content, compression=zipfile.ZIP_DEFLATED),
    }


@pytest.mark.parametrize(
    "case",
    [
        "empty",
        "text",
        "cut",
        "flipped",
        "no model",
        "no weights",
        "no list of weights",
        "bad JSON",
        "JSON of something else",
        "JSON without a graph",
        "deep JSON",
        "bad list of weights",
        "compressed",
    ],
)
def test_a_broken_file_is_named_in_one_line(
    case: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = refused(broken_files(good, tmp_path)[case])
    assert "is not a readable .pt2 file: " in message
    assert message.endswith("write it with torch.export.save of torch 2.13")
    assert capfd.readouterr() == ("", "")


def test_another_version_of_the_format(good: Path, tmp_path: Path) -> None:
    path = edit_model(good, tmp_path / "v.pt2", lambda model: model["schema_version"].update(major=99))
    assert "it has version 99 of the format, not 8 (torch 2.13.0" in refused(path)


def test_weights_on_another_device(good: Path, tmp_path: Path) -> None:
    content = entries(good)
    name = "small/data/weights/model_weights_config.json"
    path = write(tmp_path / "x.pt2", {**content, name: content[name].replace(b'"cpu"', b'"cuda"')})
    assert "is on cuda; export the model after model.cpu()" in refused(path)


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    assert "cannot be read: Is a directory" in refused(tmp_path / "folder.pt2")
    assert "cannot be read: No such file or directory" in refused(tmp_path / "gone.pt2")
