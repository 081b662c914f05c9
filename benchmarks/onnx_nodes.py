"""The node tests that come with the `onnx` package, through our importer: how many are right, refused, or wrong.

    python -m benchmarks.onnx_nodes [--program] [--only NAME] [--every N] [--json FILE]

Each test is a model of one operator (or of the function that defines it) with inputs and results. Inputs that an
operator must know when compiling become constants. With --program, each model also becomes a Program, with its own
checks; without, the module that is exported is run. Wrong ones are the defect; refused ones are listed by reason.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

# An input beside those of a model that are all constants.
UNUSED = "edgec_unused"


def cases(only: str | None = None) -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return sorted((c for c in found if only is None or only in c.name), key=lambda c: c.name)


def run_case(case: Any, *, program: bool = False) -> tuple[str, str]:
    """("right" | "refused" | "wrong" | "crashed", why)."""
    from edgec.errors import EdgecError

    for given, wanted in case.data_sets:
        inputs, outputs = ([_array(x) for x in side] for side in (given, wanted))
        if any(not isinstance(x, np.ndarray) for x in (*inputs, *outputs)):
            return "refused", "takes or returns sequences"
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                path.write_bytes(case.model.SerializeToString())
                got = _run(case, path, inputs, program)
        except EdgecError as error:
            return "refused", error.what
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        for a, b in zip(got, outputs, strict=True):
            why = difference(a, b, case.rtol, case.atol)
            if why:
                return "wrong", why
    return "right", ""


def _array(value: Any) -> Any:
    """A tensor of a test, which has it in one of three forms; anything else as it is."""
    from onnx import TensorProto, numpy_helper

    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _run(case: Any, path: Path, inputs: list[np.ndarray], program: bool) -> list[np.ndarray]:
    """Outputs; every input that the operator wants to know is tried as a constant, the first as the last."""
    from edgec.errors import EdgecError

    names = [v.name for v in case.model.graph.input]
    given = dict(zip(names, inputs))
    last: EdgecError | None = None
    # As inputs all of them, else one of them, else none.
    for kept in (names, *([n] for n in names), []):
        fixed = {n: x for n, x in given.items() if n not in kept}
        if any(x.dtype.kind in "OSU" for x in given.values()):
            raise EdgecError("takes text")
        try:
            return _outputs(path, given, fixed, program)
        except EdgecError as error:
            last = last or error
            if "needs a constant" not in error.what:
                raise
    assert last is not None
    raise last


def _outputs(path: Path, given: dict[str, np.ndarray], fixed: dict[str, np.ndarray], program: bool) -> list[np.ndarray]:
    import torch

    from edgec.errors import EdgecError
    from edgec.onnx.importer import import_model
    from edgec.onnx.module import OnnxModule
    from edgec.onnx.reader import read_onnx

    if len(fixed) == len(given) > 0:
        # A model has an input.
        _add_input(path)
        given = {**given, UNUSED: np.zeros((1, 1), np.float32)}
    model = read_onnx(path, fixed=fixed)
    tensors = []
    for spec in model.inputs:
        x = given[spec.name]
        if tuple(x.shape) != spec.shape and not spec.batch:
            raise EdgecError("has an input of another shape than it declares")
        wide: Any = x.astype(np.float32) if x.dtype.name in ("float16", "bfloat16") else x
        tensors.append(torch.from_numpy(np.array(wide)))
    if program:
        made = import_model(model, "case", check=False)
        return [y.numpy() for y in made(*tensors)]
    with torch.no_grad():
        results = OnnxModule(model).eval()(*tensors)
    return [y.numpy() for y in (results if isinstance(results, tuple) else (results,))]


def _add_input(path: Path) -> None:
    model = onnx.load(path)
    if UNUSED not in [v.name for v in model.graph.input]:
        model.graph.input.append(onnx.helper.make_tensor_value_info(UNUSED, onnx.TensorProto.FLOAT, [1, 1]))
        path.write_bytes(model.SerializeToString())


def difference(got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> str:
    """Why a result is not the wanted one; empty when it is."""
    if got.shape != want.shape:
        return f"shape {got.shape}, wanted {want.shape}"
    half = want.dtype.name in ("float16", "bfloat16")
    if got.dtype != want.dtype and not half:
        return f"type {got.dtype}, wanted {want.dtype}"
    a, b = got.astype(np.float64), want.astype(np.float64)
    if np.allclose(a, b, rtol=1e-2 if half else rtol, atol=1e-2 if half else max(atol, 1e-6), equal_nan=True):
        return ""
    return f"largest difference {np.nanmax(np.abs(a - b)):.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--every", type=int, default=1, help="run one test of so many")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, rows = time.perf_counter(), []
    for case in cases(options.only)[:: options.every]:
        status, why = run_case(case, program=options.program)
        rows.append({"case": case.name, "status": status, "why": why})
        if status in ("wrong", "crashed"):
            print(f"{status:8} {case.name}: {why}", flush=True)
    print(dict(Counter(r["status"] for r in rows)), f"{time.perf_counter() - started:.0f} s")
    reasons = Counter(r["why"] for r in rows if r["status"] == "refused")
    for why, count in reasons.most_common():
        print(f"{count:5} refused: {why}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
