"""edgec: a compiler that puts PyTorch models on edge devices and checks accuracy after every step.

    import edgec

    result = edgec.compile_model("model.pt2", target="cortex-a72", passes="fold-bn, quantize-int8",
                                 data="train.npz", eval="test.npz", output="out/")
    outputs = edgec.load_bundle("out/").run(images)

Importing the package loads neither torch nor TVM: the names below are looked up when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Bundle": "edgec.bundle",
    "EdgecError": "edgec.errors",
    "GateFailed": "edgec.errors",
    "Pass": "edgec.passbase",
    "Pipeline": "edgec.pipeline",
    "Program": "edgec.program",
    "ToolchainMissing": "edgec.errors",
    "compile_model": "edgec.compile",
    "load_bundle": "edgec.bundle",
    "load_data": "edgec.data",
    "load_model": "edgec.frontend",
}

__all__ = [
    "Bundle",
    "EdgecError",
    "GateFailed",
    "Pass",
    "Pipeline",
    "Program",
    "ToolchainMissing",
    "__version__",
    "compile_model",
    "load_bundle",
    "load_data",
    "load_model",
]

if TYPE_CHECKING:
    from edgec.bundle import Bundle as Bundle
    from edgec.bundle import load_bundle as load_bundle
    from edgec.compile import compile_model as compile_model
    from edgec.data import load_data as load_data
    from edgec.errors import EdgecError as EdgecError
    from edgec.errors import GateFailed as GateFailed
    from edgec.errors import ToolchainMissing as ToolchainMissing
    from edgec.frontend import load_model as load_model
    from edgec.passbase import Pass as Pass
    from edgec.pipeline import Pipeline as Pipeline
    from edgec.program import Program as Program


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgec' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
