"""Models in: an nn.Module, a `.pt2` file, `path/to/file.py:factory` or `package.module:factory` becomes a Program."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from edgec import qops as qops  # .pt2 files of quantised Programs need the operators
from edgec.errors import EdgecError
from edgec.program import MAX_BATCH, Program

# What torch's symbolic shape expressions look like; they are parsed with sympy, which evaluates Python.
SHAPE_EXPRESSION = re.compile(r"[A-Za-z0-9_+\-*/%(), .<>=!&|~']*")
SHAPE_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs Eq Ne Ge Gt Le Lt And Or Not Piecewise ceiling floor "
    "FloorDiv CleanDiv CeilDiv PythonMod ModularIndexing Where TruncToInt ToFloat IntTrueDiv FloatTrueDiv".split()
)


def load_model(model: Any, *, input_shape: Sequence[int] | None = None, name: str | None = None) -> Program:
    """Read a model from any of its forms.

    model: nn.Module, ExportedProgram, Program, or a string: a `.pt2` path, `file.py:factory`, `module:factory`. A
        factory takes no arguments and returns an nn.Module or a pair (nn.Module, example inputs).
    input_shape: for modules without example inputs, with the batch, e.g. (1, 3, 224, 224).

    Raises EdgecError that names the file, the dimension, the layer or the source line.
    """
    if isinstance(model, Program):
        program = model
    elif isinstance(model, torch.export.ExportedProgram):
        program = Program.from_exported(model, name or "model")
    elif isinstance(model, nn.Module):
        program = from_module(model, _example(model, input_shape), name or type(model).__name__.lower())
    elif isinstance(model, (str, Path)):
        program = _from_text(str(model), input_shape, name)
    else:
        raise EdgecError(
            f"is a {type(model).__name__}", where="model", hint="give an nn.Module, a .pt2 file or file.py:factory"
        )
    check_weights(program)
    return program


def from_module(module: nn.Module, example_inputs: tuple[torch.Tensor, ...], name: str) -> Program:
    """Export an nn.Module in eval mode, with a dynamic batch where the model allows it."""
    module = module.eval()
    batched = tuple(x.repeat(2, *[1] * (x.dim() - 1)) if x.dim() and x.shape[0] == 1 else x for x in example_inputs)
    dim = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    attempts = [(batched, tuple({0: dim} if x.dim() else {} for x in batched)), (example_inputs, None)]
    failure: Exception | None = None
    for inputs, shapes in attempts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(module, inputs, dynamic_shapes=shapes)
            return Program.from_exported(exported, name)
        except EdgecError:
            raise
        except Exception as error:
            failure = error
    assert failure is not None
    raise EdgecError(
        f"does not export: {_reason(failure)}",
        where=name + _source_line(failure),
        hint="torch.export needs control flow and shapes that do not depend on the data",
    ) from failure


def check_weights(program: Program) -> None:
    """Raise EdgecError when a weight is NaN or infinite, or has a type that no kernel takes."""
    for path, weight in program.weights().items():
        if weight.dtype in (torch.float16, torch.bfloat16, torch.float64) or weight.is_complex():
            raise EdgecError(
                f"is {str(weight.dtype).removeprefix('torch.')}",
                where=f"weight '{path}' of {program.name}",
                hint="convert the model to float32 with model.float() before exporting",
            )
        if weight.dtype.is_floating_point and not bool(torch.isfinite(weight).all()):
            raise EdgecError(
                "has NaN or infinite values", where=f"weight '{path}' of {program.name}", hint="check the checkpoint"
            )
    for spec in program.inputs:
        if spec.dtype in ("float16", "bfloat16", "float64") or spec.dtype.startswith("complex"):
            raise EdgecError(
                f"is {spec.dtype}",
                where=f"input '{spec.name}' of {program.name}",
                hint="convert the model to float32 with model.float() before exporting",
            )


def _from_text(text: str, input_shape: Sequence[int] | None, name: str | None) -> Program:
    path = Path(text)
    if text.endswith(".pt2"):
        if path.is_dir():
            raise EdgecError("is a folder, not a .pt2 file", where=text)
        if not path.exists():
            raise EdgecError("no such file", where=text, hint="give a .pt2 file or file.py:factory")
        return Program.from_exported(load_pt2(path), name or path.stem)
    owner, colon, attribute = text.rpartition(":")
    if not colon or not attribute.isidentifier():
        what = "no such model" if not path.exists() else f"'{path.suffix or 'folder'}' is not a model format"
        raise EdgecError(what, where=text, hint="give a .pt2 file, file.py:factory or package.module:factory")
    factory = getattr(_module(owner), attribute, None)
    if not callable(factory):
        raise EdgecError(f"has no function '{attribute}'", where=owner)
    try:
        made = factory()
    except Exception as error:
        raise EdgecError(f"factory failed: {type(error).__name__}: {_reason(error)}", where=text) from error
    examples: Any = None
    if isinstance(made, tuple) and len(made) == 2:
        made, examples = made
    if not isinstance(made, nn.Module):
        raise EdgecError(
            f"factory returned a {type(made).__name__}", where=text, hint="return an nn.Module or (module, inputs)"
        )
    if examples is None:
        examples = _example(made, input_shape)
    elif isinstance(examples, torch.Tensor):
        examples = (examples,)
    return from_module(made, tuple(examples), name or attribute)


def _example(module: nn.Module, input_shape: Sequence[int] | None) -> tuple[torch.Tensor, ...]:
    if input_shape is None:
        raise EdgecError(
            "has no example input",
            where=type(module).__name__,
            hint="give --input-shape, e.g. 1,3,224,224, or return (module, example inputs) from the factory",
        )
    if not input_shape or min(input_shape) < 1:
        raise EdgecError(f"'{list(input_shape)}' is not a shape", where="--input-shape", hint="give positive numbers")
    return (torch.rand(tuple(input_shape), generator=torch.Generator().manual_seed(0)),)


def _module(owner: str) -> ModuleType:
    """Import `file.py` or `package.module`."""
    try:
        if not owner.endswith(".py"):
            if "" not in sys.path:
                sys.path.insert(0, "")
            return importlib.import_module(owner)
        path = Path(owner)
        if not path.is_file():
            raise EdgecError("no such file", where=owner)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except EdgecError:
        raise
    except Exception as error:
        raise EdgecError(f"does not import: {type(error).__name__}: {_reason(error)}", where=owner) from error


# -- .pt2 files --------------------------------------------------------------------------------------------------------


def load_pt2(path: str | Path) -> torch.export.ExportedProgram:
    """`torch.export.load` for files that need no unpickling of arbitrary objects.

    The graph is JSON and weights are raw bytes, but torch 2.13 falls back to the full unpickler for weights, constants
    and sample inputs that say so, and evaluates shape expressions. The archive is searched for these first: sample
    inputs must load with `weights_only=True`, and shape expressions must be plain arithmetic; anything else is refused.
    Raises EdgecError for those and for files that are not `.pt2` archives.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_pickles(archive, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except EdgecError:
        raise
    except OSError as error:
        raise EdgecError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except Exception as error:
        raise EdgecError(
            f"is not a readable .pt2 file: {_reason(error)}",
            where=str(path),
            hint="write it with torch.export.save of torch 2.13",
        ) from error


def _refuse_pickles(archive: zipfile.ZipFile, path: str | Path) -> None:
    def refuse(what: str) -> EdgecError:
        return EdgecError(
            f"{what}, which can run code when loaded",
            where=str(path),
            hint="if you trust the file, load it in Python with torch.export.load and pass the result",
        )

    for entry in archive.namelist():
        if entry.endswith("_config.json"):
            config = json.loads(archive.read(entry))
            for key, meta in config.get("config", {}).items():
                if meta.get("use_pickle"):
                    raise refuse(f"stores '{key}' as a pickle")
        elif "/models/" in entry and entry.endswith(".json"):
            for text in _expressions(json.loads(archive.read(entry))):
                if not _is_arithmetic(text):
                    raise refuse("has a shape expression that is not arithmetic")
        elif "/sample_inputs/" in entry:
            try:
                torch.load(io.BytesIO(archive.read(entry)), weights_only=True)
            except Exception:
                raise refuse("has pickled objects among its sample inputs") from None


def _is_arithmetic(text: str) -> bool:
    """True for expressions of numbers, symbols and known functions: no attribute, no other call."""
    calls = set(re.findall(r"([A-Za-z_]\w*)\s*\(", text))
    attribute = re.search(r"\.\s*[A-Za-z_]", text)
    return bool(SHAPE_EXPRESSION.fullmatch(text)) and calls <= SHAPE_FUNCTIONS and not attribute and "__" not in text


def _expressions(value: Any) -> list[str]:
    """All `expr_str` texts in a serialised graph."""
    if isinstance(value, dict):
        found = [v for k, v in value.items() if k == "expr_str" and isinstance(v, str)]
        return found + [e for v in value.values() for e in _expressions(v)]
    if isinstance(value, list):
        return [e for v in value for e in _expressions(v)]
    return []


def _reason(error: BaseException) -> str:
    """The line of an error's text that says what is wrong: torch puts it first, after an optional class name."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__


def _source_line(error: BaseException) -> str:
    """` (file:line)` of the innermost user frame, where the traceback has one."""
    site = (str(Path(torch.__file__).parent), str(Path(inspect.__file__).parent), str(Path(__file__).parent))
    found = ""
    for text in re.findall(r'File "([^"]+)", line (\d+)', str(error)):
        if not text[0].startswith(site) and "<" not in text[0]:
            found = f" ({text[0]}:{text[1]})"
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(site) and "<" not in code.co_filename:
            found = f" ({code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found
