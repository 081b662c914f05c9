"""Functions that users name as `file.py:function`, and their code run under our control."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgec.errors import EdgecError


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` names.

    A file is run with its own folder on the import path, as Python does for a script.
    Raises EdgecError when there is no such file, module or function, or when the code fails.
    """
    place, _, name = spec.rpartition(":")
    module = _import_file(Path(place), spec) if place.endswith(".py") else _import_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(
            k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        )
        raise EdgecError(
            f"has no function '{name}'", where=place, hint=f"it has {', '.join(found)}" if found else "define it there"
        )
    return function


def _import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise EdgecError("does not exist", where=str(path), hint=f"'{spec}' means a function in that file")
    name = "edgec_user_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    made = importlib.util.spec_from_file_location(name, path)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    folder = str(path.resolve().parent)
    # Registered, because dataclasses and pickling (loader workers) look the module up by name.
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        with user_code(str(path)):
            made.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _import_module(name: str, spec: str) -> ModuleType:
    if not {"", str(Path.cwd())} & set(sys.path):
        # A console script, unlike `python -m`, does not look in the working directory.
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise EdgecError(f"there is no module '{name}'", where=spec, hint="write file.py:function")
    with user_code(name):
        return importlib.import_module(name)


@contextmanager
def user_code(name: str) -> Iterator[None]:
    """Turn an exception of the user's code into one line that says where it was raised."""
    try:
        yield
    except EdgecError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<frozen")]
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
        raise EdgecError(f"raised {type(error).__name__}: {error}{place}", where=name) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and (when loaded) torch, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    state = None if torch is None else torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    if torch is not None:
        torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.random.set_rng_state(state)
