"""`import_onnx`: a foreign .onnx file as a checked Program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edgec.errors import EdgecError
from edgec.importing.quantized import QUANTIZED_SQNR_DB, remember
from edgec.onnx.check import session_of
from edgec.onnx.module import OnnxModule
from edgec.onnx.quantized import join_tables
from edgec.onnx.reader import OnnxModel, read_onnx
from edgec.origin import first_line
from edgec.program import Program, identify, placeholders
from edgec.quiet import quiet
from edgec.stats import sqnr_db

# Largest |difference| / largest |value| between the Program and ONNX Runtime: float32 sums in another order.
RUNTIME_TOLERANCE = 1e-4
# Of models that hold float16 numbers the runtime rounds every value to ten bits.
HALF_TOLERANCE = 2e-2
# Nodes of a model that ONNX's own evaluator, which is slow, runs in seconds.
REFERENCE_NODES = 200


def import_onnx(
    path: str | Path,
    *,
    input_shape: Sequence[int] | None = None,
    name: str | None = None,
    fixed: Mapping[str, np.ndarray] | None = None,
    check: bool = True,
) -> Program:
    """Read an .onnx file as a Program, compared with ONNX Runtime on random inputs.

    input_shape: of the first input, batch included, where the file leaves sizes open. fixed: inputs that become
    constants. The batch is dynamic where the file says so, or has a batch of one and its samples prove independent.
    What was done to the model, and whether it was compared, is in `Program.notes`.

    Raises EdgecError that names the file, the input, or the node.
    """
    model = read_onnx(path, input_shape, fixed=dict(fixed or {}))
    return import_model(model, name or Path(path).stem, check=check, fixed=fixed)


def import_model(
    model: OnnxModel, name: str, *, check: bool = True, fixed: Mapping[str, np.ndarray] | None = None
) -> Program:
    if model.quantized:
        join_tables(model.proto.graph)
    module = OnnxModule(model).eval()
    examples = tuple(_example(spec.shape, spec.dtype) for spec in model.inputs)
    with quiet(), torch.no_grad():
        module(*examples)
    module.recording = False
    program = _exported(module, examples, name)
    program = remember(_named(program, model), module.stored)
    notes = list(model.notes)
    if check:
        notes.append(_check(program, model, fixed or {}))
    return dataclasses.replace(program, notes=tuple(notes))


def _example(shape: Sequence[int], dtype: np.dtype[Any]) -> torch.Tensor:
    if dtype.kind == "f" or dtype.name == "bfloat16":
        kind = torch.float64 if dtype == np.float64 else torch.float32
        return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0), dtype=kind)
    return torch.zeros(tuple(shape), dtype=getattr(torch, dtype.name))


def _exported(module: OnnxModule, examples: tuple[torch.Tensor, ...], name: str) -> Program:
    """With a dynamic batch where that works, else static."""
    from edgec.frontend import check_weights, export_module, import_check, import_exported

    declared = all(spec.batch for spec in module.model.inputs)
    ones = all(spec.shape and spec.shape[0] == 1 for spec in module.model.inputs)
    if declared or ones:
        module.free_batch = not declared
        # What goes wrong with a dynamic batch may work without.
        why = "a size in the graph is fixed"
        try:
            exported = export_module(module, examples, name)
            program = import_exported(exported, name)
            if program.dynamic_batch:
                check_weights(program)
                import_check(program, _sample_by_sample(module))
                return program
        except EdgecError as error:
            why = error.what
        module.free_batch = False
        if declared:
            module.model.notes.append(f"the batch is fixed at 1: {why}")
    exported = export_module(module, examples, name, dynamic=False)
    program = import_exported(exported, name)
    check_weights(program)
    import_check(program, module)
    return program


def _sample_by_sample(module: OnnxModule) -> Callable[..., Any]:
    """The module for batches, when only one sample at a time is known to be right."""

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = []
        for i in range(inputs[0].shape[0]):
            made = module(*[x[i : i + 1] for x in inputs])
            rows.append(made if isinstance(made, tuple) else (made,))
        return tuple(torch.cat(column) for column in zip(*rows))

    return run


def _named(program: Program, model: OnnxModel) -> Program:
    """The Program with the inputs' and outputs' names of the file, as identifiers."""
    # torch.export takes the names of the module's parameters, unless they are taken.
    module = program.edit()
    for node, spec in zip(placeholders(module), model.inputs, strict=True):
        if node.name != spec.identifier:
            for other in module.graph.nodes:
                if other.name == spec.identifier:
                    other._rename(f"{other.name}_value")
            node.name = node.target = spec.identifier
    taken = {spec.identifier.lower() for spec in model.inputs}
    outputs = tuple(identify(output, taken) for output in model.outputs)
    program = program.replace(module, check_signature=False)
    return dataclasses.replace(program, output_names=outputs)


# -- comparison with another engine ------------------------------------------------------------------------------------


def _check(program: Program, model: OnnxModel, fixed: Mapping[str, np.ndarray]) -> str:
    """Compare with ONNX Runtime on the file as it was; returns what was done, as a note."""
    inputs = _random_inputs(program, model)
    engine, want = _reference(model, inputs, fixed)
    if want is None:
        return engine
    tensors = tuple(torch.from_numpy(x) for x in inputs.values())
    got = [y.numpy() for y in program(*tensors)]
    for name, a, b in zip(model.outputs, got, want, strict=True):
        _compare(name, a, b, model, engine)
    return f"equal to {engine} on random inputs"


def _random_inputs(program: Program, model: OnnxModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for spec, example in zip(model.inputs, program.batch_inputs(1), strict=True):
        shape = tuple(example.shape)
        kind = example.numpy().dtype
        found[spec.name] = rng.random(shape).astype(kind) if kind.kind == "f" else example.numpy()
    return found


def _reference(
    model: OnnxModel, inputs: Mapping[str, np.ndarray], fixed: Mapping[str, np.ndarray]
) -> tuple[str, list[np.ndarray] | None]:
    """(name of the engine, its outputs), or (why there is none, None)."""
    types = {v.name: v.type.tensor_type.elem_type for v in model.proto.graph.input}
    feed = {n: _as_type(x, types.get(n)) for n, x in {**fixed, **inputs}.items()}
    try:
        import onnxruntime as onnxruntime  # whether it is there
    except ImportError:
        if len(model.proto.graph.node) > REFERENCE_NODES:
            return "not compared with another engine: ONNX Runtime is not installed", None
        try:
            with quiet():
                from onnx.reference import ReferenceEvaluator

                proto = onnx.load_model_from_string(model.original)
                return "ONNX's reference evaluator", [np.asarray(y) for y in ReferenceEvaluator(proto).run(None, feed)]
        except Exception as error:
            return f"not compared: ONNX's reference evaluator failed ({first_line(error)})", None
    try:
        # Without fusions: those of quantised models round otherwise.
        session = session_of(model.original)
        feed = {i.name: feed[i.name] for i in session.get_inputs()}
        return "ONNX Runtime", [np.asarray(y) for y in session.run(None, feed)]
    except Exception as error:
        return f"not compared: ONNX Runtime does not run the file ({first_line(error)})", None


def _as_type(x: np.ndarray, code: int | None) -> np.ndarray:
    if code is None:
        return x
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(code))


def _compare(name: str, got: np.ndarray, want: Any, model: OnnxModel, engine: str) -> None:
    want = np.asarray(want)
    what = None
    if got.shape != want.shape:
        what = f"has shape {list(got.shape)}, {engine} gives {list(want.shape)}"
    else:
        a, b = got.astype(np.float64), want.astype(np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(np.where(finite, 0, b), np.where(finite, 0, a), equal_nan=True):
            what = f"differs from {engine} in what is infinite or NaN"
        else:
            error, scale = np.abs(a - b)[finite], np.abs(b)[finite]
            relative = float(error.max(initial=0.0)) / (float(scale.max(initial=0.0)) or 1.0)
            limit = HALF_TOLERANCE if model.half else RUNTIME_TOLERANCE
            if model.quantized and relative > limit:
                sqnr = sqnr_db(a[finite], b[finite])
                if sqnr < QUANTIZED_SQNR_DB:
                    what = f"follows {engine} with {sqnr:.1f} dB only ({QUANTIZED_SQNR_DB:g} dB needed)"
            elif not relative <= limit:
                what = f"differs from {engine} (relative error {relative:.1e}, allowed {limit:g})"
    if what is not None:
        raise EdgecError(
            f"output '{name}' {what}", where=str(model.path), hint="this is a bug in edgec: please report the model"
        )
