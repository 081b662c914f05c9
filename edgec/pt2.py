"""Reading `.pt2` files without running anything that they contain.

`torch.export.load` of torch 2.13 trusts its file. It unpickles weights and constants that say so, custom objects even
when they do not, and sample inputs when they are not plain tensors. It loads shared libraries from `data/aotinductor`.
Names of tensors and guards become Python source; shape expressions go to sympy, which evaluates Python; and the types
in tree specifications are imported by name. All of these run code of the file's author (`tests/test_pt2.py` does).

So an archive is first held against what `torch.export.save` writes for a model of plain tensors. What passes is copied
to memory, without pickles and guards, and that copy is what torch reads. Everything else is refused: whoever trusts
such a file can call `torch.export.load` in Python and give the result to `edgec.load_model`.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._export.serde.schema import SCHEMA_VERSION

from edgec import qops as qops  # registers the operators of quantised Programs
from edgec import recurrentops as recurrentops  # those of recurrent layers
from edgec import tokenops as tokenops  # and those of token reduction
from edgec.errors import EdgecError
from edgec.importing.library import define
from edgec.origin import first_line
from edgec.quiet import quiet

HINT = "if you trust the file, load it in Python with torch.export.load and pass the result to edgec.load_model"

MODEL = "models/model.json"
CONFIGS = {
    "data/weights/model_weights_config.json": r"weight_\d+",
    "data/constants/model_constants_config.json": r"tensor_\d+",
}
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
KEPT = re.compile(r"archive_format|archive_version|byteorder|\.data/version|data/(weights/weight|constants/tensor)_\d+")
# Written by torch.export.save, of no use here.
DROPPED = re.compile(r"\.data/serialization_id|extra/.*|" + re.escape(SAMPLE_INPUTS))

QUANTIZED = "quantized_decomposed"
NAMESPACES = ("aten", "edgec", QUANTIZED)
HIGHER_ORDER = ("cond", "while_loop", "scan", "map_impl", "wrap_with_set_grad_enabled", "wrap_with_autocast")
# Arithmetic on sizes, and choosing one of several results.
SCALAR_FUNCTIONS = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.sym_(max|min|not|ite|float|int|sum)|math\.(ceil|floor|trunc|sqrt)"
)
SHAPE_FUNCTIONS = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Mod|Max|Min|Abs|Eq|Ne|Equality|Unequality|Ge|Gt|Le|Lt|And|Or|Not|ceiling"
    "|floor|Piecewise|FloorDiv|CleanDiv|CeilDiv|PythonMod|ModularIndexing|Where|TruncToInt|TruncToFloat|CeilToInt"
    "|FloorToInt|RoundToInt|ToFloat|IntTrueDiv|FloatTrueDiv|PowByNatural|FloatPow|Identity"
)
SHAPE_SYNTAX = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.Load,
)
TREES = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")

# Free text that torch keeps as text: it never reaches the generated Python source other than as a quoted literal.
TEXT = (
    *("as_string", "as_strings", "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom"),
    "from_node",
)
VALUE_TABLES = ("tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values")
PLAIN = re.compile(r"[\w .,:/@+\-]*")


def load_pt2(path: str | Path) -> torch.export.ExportedProgram:
    """The ExportedProgram in a file written by `torch.export.save`; its sample inputs are left out.

    Raises EdgecError when the file cannot be read, is no such file, or holds anything but tensors and ATen operators.
    """
    where = str(path)
    entries = _read(Path(path), where)
    kept = {name: data for name, data in entries.items() if KEPT.fullmatch(name)}
    for name, pattern in CONFIGS.items():
        kept[name] = _checked_config(_json(entries, name, where), pattern, kept, where)
    model = _json(entries, MODEL, where)
    _check_version(model, where)
    if QUANTIZED.encode() in entries[MODEL]:
        # Registers them; nothing that torch itself imports does.
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    _check(model, "", where)
    kept[MODEL] = json.dumps({**model, "guards_code": []}).encode()
    kept[SAMPLE_INPUTS] = b""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in kept.items():
            archive.writestr(f"model/{name}", data)
    buffer.seek(0)
    try:
        with quiet():
            return torch.export.load(buffer)
    except Exception as error:
        raise _unreadable(first_line(error), where) from error


def _read(path: Path, where: str) -> dict[str, bytes]:
    """The entries of the archive by name, without the folder that they all are in."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            names = {info.filename.partition("/")[2] for info in archive.infolist()}
            if "serialized_exported_program.json" in archive.namelist():
                raise EdgecError(
                    "was written by torch 2.7 or older", where=where, hint="export the model again with torch 2.13"
                )
            if any(name.startswith("data/aotinductor/") for name in names):
                raise EdgecError(
                    "is a compiled AOTInductor package", where=where, hint="write the model with torch.export.save"
                )
            if MODEL not in names:
                raise _unreadable(f"there is no '{MODEL}' in it", where)
            for info in archive.infolist():
                name = info.filename.partition("/")[2]
                if DROPPED.fullmatch(name):
                    continue
                if not (KEPT.fullmatch(name) or name in CONFIGS or name == MODEL):
                    raise _refuse(f"contains '{info.filename}', which a model of plain tensors does not need", where)
                if info.compress_type != zipfile.ZIP_STORED or name in found:
                    raise _unreadable(f"entry '{name}' is not as torch writes it", where)
                found[name] = archive.read(info)
            return found
    except OSError as error:
        raise EdgecError(f"cannot be read: {error.strerror or error}", where=where) from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise _unreadable(first_line(error), where) from error


def _json(entries: dict[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(entries[name])
        if isinstance(value, dict):
            return value
    except KeyError:
        raise _unreadable(f"there is no '{name}' in it", where) from None
    except (ValueError, RecursionError):
        pass
    raise _unreadable(f"'{name}' is not JSON of a model", where)


def _check_version(model: dict[str, Any], where: str) -> None:
    version = model.get("schema_version")
    major = version.get("major") if isinstance(version, dict) else None
    if major != SCHEMA_VERSION[0]:
        raise _unreadable(
            f"it has version {major} of the format, not {SCHEMA_VERSION[0]} (torch {model.get('torch_version', '?')})",
            where,
        )


def _checked_config(table: dict[str, Any], pattern: str, kept: dict[str, bytes], where: str) -> bytes:
    """The list of stored tensors, when each one is plain bytes in an entry of its own."""
    config = table.get("config")
    if not isinstance(config, dict):
        raise _unreadable("its list of weights is damaged", where)
    for key, entry in config.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("tensor_meta") or {}, dict):
            raise _unreadable("its list of weights is damaged", where)
        file = str(entry.get("path_name"))
        if entry.get("use_pickle") or not entry.get("tensor_meta") or not re.fullmatch(pattern, file):
            raise _refuse(f"stores '{key}' as a pickle", where)
        if not any(name.endswith(f"/{file}") for name in kept):
            raise _unreadable(f"the bytes of '{key}' are missing", where)
        device = (entry["tensor_meta"].get("device") or {}).get("type")
        if device != "cpu":
            raise EdgecError(f"weight '{key}' is on {device}", where=where, hint="export the model after model.cpu()")
    _check(table, "", where)
    return json.dumps(table).encode()


def _check(value: Any, key: str, where: str) -> None:
    """Walk the JSON of a graph; raise EdgecError for anything that torch would take for code."""
    if isinstance(value, dict):
        if value.get("custom_obj_values") or "as_custom_obj" in value or "custom_obj" in value:
            raise _refuse("holds a custom object", where)
        for name, item in value.items():
            if not PLAIN.fullmatch(name) or (key in VALUE_TABLES and not name.isidentifier()):
                raise _refuse(f"has the name {name!r}", where)
            _check(item, name, where)
    elif isinstance(value, list):
        for item in value:
            _check(item, key, where)
    elif isinstance(value, str):
        _check_text(value, key, where)


def _check_text(text: str, key: str, where: str) -> None:
    if key in TEXT or key == "guards_code":
        return
    if key in ("target", "as_operator"):
        if not _is_operator(text):
            raise _refuse(f"calls '{text}', which is not an operator that edgec knows", where)
    elif key == "expr_str":
        if not _is_arithmetic(text):
            raise _refuse(f"has the shape expression {text!r}, which is not arithmetic", where)
    elif key in ("in_spec", "out_spec"):
        if not _is_plain_tree(text):
            raise EdgecError(
                "has inputs or outputs that are not tensors, tuples, lists or dictionaries",
                where=where,
                hint="export a module that takes and returns tensors",
            )
    elif not PLAIN.fullmatch(text) or (key in ("name", "as_name") and text and not text.isidentifier()):
        raise _refuse(f"has the name {text!r}", where)


def _is_operator(name: str) -> bool:
    if SCALAR_FUNCTIONS.fullmatch(name):
        return True
    parts = name.split(".")
    if parts[:3] == ["torch", "ops", "higher_order"]:
        return len(parts) == 4 and parts[3] in HIGHER_ORDER
    if len(parts) != 5 or parts[:2] != ["torch", "ops"] or parts[3] == "from_file":
        return False
    if parts[2] not in NAMESPACES and not define(f"{parts[2]}::{parts[3]}"):
        return False
    found = getattr(getattr(getattr(torch.ops, parts[2]), parts[3], None), parts[4], None)
    # TorchScript's own operators, aten::save among them, have no kernel in the dispatcher.
    return isinstance(found, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(found.name())


def _is_arithmetic(text: str) -> bool:
    """True for expressions of numbers, symbols and the functions of shapes, and nothing else."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_shape_node(node) for node in ast.walk(tree))


def _is_shape_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Constant):
        # The only text in an expression is the name in Symbol('s77'); sympy would evaluate any other.
        return isinstance(node.value, (int, float)) or (isinstance(node.value, str) and node.value.isidentifier())
    if isinstance(node, ast.Call):
        texts = [a for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        return bool(SHAPE_FUNCTIONS.fullmatch(name)) and (not texts or (name == "Symbol" and len(node.args) == 1))
    if isinstance(node, ast.keyword):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool)
    return isinstance(node, SHAPE_SYNTAX)


def _is_plain_tree(text: str) -> bool:
    """True for a tree specification of tuples, lists and dictionaries with plain keys."""
    if not text:
        return True
    try:
        _, root = json.loads(text)
        return _plain_node(root)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _plain_node(node: dict[str, Any]) -> bool:
    if node["type"] is None:
        return True
    context = node["context"]
    keys = json.loads(context) if isinstance(context, str) else context
    plain = keys is None or (isinstance(keys, list) and all(isinstance(k, (str, int)) for k in keys))
    return node["type"] in TREES and plain and all(_plain_node(child) for child in node["children_spec"])


def _refuse(what: str, where: str) -> EdgecError:
    return EdgecError(f"{what}: it could run code when loaded", where=where, hint=HINT)


def _unreadable(why: str, where: str) -> EdgecError:
    return EdgecError(
        f"is not a readable .pt2 file: {why}", where=where, hint="write it with torch.export.save of torch 2.13"
    )
