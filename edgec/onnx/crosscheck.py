"""`--cross-check`: a model by two routes, torch.export and PyTorch's ONNX exporter with our importer, compared.

The two share torch.export's capture and nothing behind it: the exporter decomposes and translates by its own rules, and
ONNX Runtime, where it is installed, is a third opinion on the file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgec.errors import EdgecError
from edgec.origin import first_line
from edgec.program import Program
from edgec.quiet import quiet

# As in `edgec.onnx.importer`: float32 sums in another order.
TOLERANCE = 1e-4


def cross_check(
    model: Any, program: Program, inputs: tuple[torch.Tensor, ...], input_shape: Sequence[int] | None = None
) -> str:
    """Compare `program`, the import of `model`, with its import through ONNX, on `inputs` of the Program's shapes.

    Returns what was found, in one line. A model that the exporter cannot write, or whose file our importer refuses, is
    not an error. Raises EdgecError naming the output, and the first layer found to differ.
    """
    if isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
        return "not cross-checked: the model is an ONNX file"
    with tempfile.TemporaryDirectory(prefix="edgec-cross-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            _write(model, program, path, input_shape)
        except Exception as error:
            return f"not cross-checked: PyTorch's exporter failed ({type(error).__name__}: {first_line(error)})"
        try:
            other = _read(path, program.name)
        except EdgecError as error:
            if "differs from" in error.what:
                raise
            return f"not cross-checked: {error.what}"
    return compare_routes(program, other, inputs)


def _write(model: Any, program: Program, path: Path, input_shape: Sequence[int] | None) -> None:
    from edgec.frontend import original_of

    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError("it needs the package onnxscript") from error
    source = original_of(model, input_shape)
    arguments = program.batch_inputs(1)
    with quiet(), torch.no_grad():
        if isinstance(source, torch.nn.Module):
            written = torch.onnx.export(source.eval(), arguments, dynamo=True, verbose=False)
        else:
            written = torch.onnx.export(source or program.export(1), dynamo=True, verbose=False)
        assert written is not None
        written.save(str(path), external_data=False)


def _read(path: Path, name: str) -> Program:
    from edgec.onnx.importer import import_onnx

    return import_onnx(path, name=name)


def compare_routes(program: Program, other: Program, inputs: tuple[torch.Tensor, ...]) -> str:
    """One line about each output; EdgecError when one differs."""
    from edgec.sensitivity import layer_outputs

    samples = tuple(x[:1] if program.dynamic_batch else x for x in inputs)
    want, got = program(*samples), other(*samples)
    if len(want) != len(got):
        raise EdgecError(f"has {len(want)} outputs, through ONNX {len(got)}", where=program.name)
    lines = []
    for spec, a, b in zip(program.outputs, want, got, strict=True):
        error = _error(b, a)
        if not error <= TOLERANCE:
            layer = _first_difference(layer_outputs(program, samples), layer_outputs(other, samples))
            where = f", first in layer {layer}" if layer else ""
            raise EdgecError(
                f"output '{spec.name}' differs between torch.export and the ONNX exporter (relative error {error:.1e}, "
                f"allowed {TOLERANCE:g}){where}",
                where=program.name,
                hint="one of the two is wrong: compare both with the model itself, and report what you find",
            )
        lines.append(f"{spec.name} {error:.1e}")
    check = next((n for n in other.notes if "ONNX Runtime" in n), "")
    return f"two routes agree (relative error: {', '.join(lines)}){'; file ' + check if check else ''}"


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    return float((got.double() - want.double()).abs().max()) / (float(want.double().abs().max()) or 1.0)


def _first_difference(left: dict[str, Any], right: dict[str, Any]) -> str | None:
    """The first layer, by the user's names, whose last value has the same shape in both and differs."""
    mine, theirs = ({value.layer: value.value for value in side.values()} for side in (left, right))
    for layer, value in mine.items():
        other = theirs.get(layer)
        if layer != "output" and other is not None and other.shape == value.shape and _error(other, value) > TOLERANCE:
            return layer
    return None
