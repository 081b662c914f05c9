"""The ONNX model of a bundle: written, run by ONNX Runtime where that is installed, and compared with the Program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgec.errors import EdgecError
from edgec.onnx.writer import OPSET, to_onnx
from edgec.origin import first_line
from edgec.program import Program, is_call, output_nodes
from edgec.quiet import quiet
from edgec.stats import sqnr_db

FILE = "model.onnx"
# Largest |difference| / largest |value| of float32 models.
FLOAT_TOLERANCE = 1e-4
# Engines scale sums of codes in floating point, so a code here and there is the next one; behind many layers and float
# islands that leaves 23 dB on ViT-Tiny. A mistake leaves next to none. Sums in float16 leave more than that.
CODES_SQNR_DB = 12.0


def write_onnx(program: Program, folder: Path, inputs: Sequence[np.ndarray], kind: str) -> dict[str, Any]:
    """Write `model.onnx` into `folder`; returns what the manifest says of it.

    inputs: samples to compare on. kind: the Program's arithmetic, "float" or another one (see `edgec.compile`).
    A Program that has no ONNX form, or whose ONNX model gives other results, leaves no file and the key "not_written"
    with the reason; nothing is raised.
    """
    try:
        model = to_onnx(program)
    except EdgecError as error:
        return {"not_written": error.what}
    except Exception as error:  # a file beside the code must not cost the code
        return {"not_written": f"{type(error).__name__}: {first_line(error)}"}
    data = model.SerializeToString(deterministic=True)
    record: dict[str, Any] = {"file": FILE, "opset": OPSET, "nodes": len(model.graph.node), "engine": None}
    try:
        import onnxruntime
    except ImportError:
        (folder / FILE).write_bytes(data)
        return record
    try:
        with quiet():
            got = run_onnx(data, inputs)
        found = compare(program, inputs, got)
    except Exception as error:
        return {"not_written": f"ONNX Runtime does not run it: {first_line(error)}"}
    if why := agrees(found, kind):
        return {"not_written": why}
    (folder / FILE).write_bytes(data)
    return {**record, "engine": f"ONNX Runtime {onnxruntime.__version__}", "samples": len(inputs[0]), **found}


def agrees(found: dict[str, Any], kind: str) -> str:
    """Why results are not the Program's, from what `compare` found; empty where they are. kind: as in `write_onnx`."""
    if kind == "float" and not found["relative_error"] <= FLOAT_TOLERANCE:
        return f"ONNX Runtime gives other results (relative error {found['relative_error']:.1e})"
    if kind != "float" and found["sqnr_db"] is not None and found["sqnr_db"] < CODES_SQNR_DB:
        return f"ONNX Runtime gives other results (SQNR {found['sqnr_db']:.1f} dB)"
    return ""


def run_onnx(data: bytes, inputs: Sequence[np.ndarray], *, fused: bool = False) -> list[np.ndarray]:
    """What ONNX Runtime gives for a model on this machine's CPU, on one thread.

    fused: with its own optimisations, which make QDQ layers integer, and quantise what only weights of codes multiply.
    """
    session = session_of(data, fused=fused)
    feed = {spec.name: x for spec, x in zip(session.get_inputs(), inputs, strict=True)}
    return [np.asarray(y) for y in session.run(None, feed)]


def session_of(data: bytes, *, fused: bool = False) -> Any:
    """ONNX Runtime with a model; see `run_onnx`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def compare(program: Program, inputs: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> dict[str, Any]:
    """How far results are from the Program's.

    relative_error: the largest |difference| / largest |value| over outputs; sqnr_db: the smallest, None where all are
    equal; equal_codes, within_one_code: shares of elements, for outputs that are codes times a scale.
    """
    want = [y.numpy() for y in program(*[torch.from_numpy(x) for x in inputs])]
    errors, ratios, equal, near = [], [], [], []
    for node, a, b in zip(output_nodes(program.module), got, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(f"an output is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}")
        wanted, difference = b.astype(np.float64), np.abs(a.astype(np.float64) - b)
        errors.append(float(difference.max(initial=0.0)) / (float(np.abs(wanted).max(initial=0.0)) or 1.0))
        if difference.any():
            ratios.append(sqnr_db(a, b))
        if is_call(node, torch.ops.edgec.dequantize.default):
            steps = np.rint(difference / float(node.args[1]))  # type: ignore[arg-type]
            equal.append(float((steps == 0).mean()))
            near.append(float((steps <= 1).mean()))
    found: dict[str, Any] = {"relative_error": max(errors), "sqnr_db": min(ratios) if ratios else None}
    if equal:
        found.update(equal_codes=min(equal), within_one_code=min(near))
    return found
