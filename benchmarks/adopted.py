"""Models that come quantised, as edgec's integer code and in ONNX Runtime: accuracy, integer layers, sizes, exactness.

    python -m benchmarks.adopted [--model NAME ...] [--form FORM ...] [--samples N] [--calibration N]
        [--passes LIST] [--json FILE]

Each float model is written as ONNX with its batch norms folded and quantised: by edgec itself (`edgec`: model.onnx of
`quantize-int8`), or by ONNX Runtime's static quantiser in four forms. What comes out is compiled for this machine
without a pass list, or with the one given. `file` is the metric of the file computed in floating point as ONNX defines
it, `program` that of the integer Program, `runtime` that of ONNX Runtime with its own optimisations, on the same
samples; `same` is the share of samples for which the last two have the same top class.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.models import CASES, Case, shared_folder

MODELS = ("mlperftiny_ic_resnet8", "mlperftiny_kws_dscnn", "cifar10_resnet20", "imagenet_mobilenetv2_100_224_dq")
# Options of onnxruntime.quantization.quantize_static.
FORMS: dict[str, dict[str, Any]] = {
    "edgec": {},
    "qdq-s8": {"activation_type": "QInt8", "weight_type": "QInt8", "per_channel": True},
    "qdq-u8": {"activation_type": "QUInt8", "weight_type": "QInt8", "per_channel": True},
    "qdq-u8-u8": {"activation_type": "QUInt8", "weight_type": "QUInt8"},
    "qoperator": {
        "activation_type": "QUInt8",
        "weight_type": "QInt8",
        "per_channel": True,
        "quant_format": "QOperator",
    },
}


def write_quantised(case: Case, form: str, folder: Path, shared: Path, calibration: int) -> Path:
    """The quantised model as an .onnx file."""
    from edgec.data import Preprocess, load_data
    from edgec.frontend import load_model
    from edgec.onnx.writer import to_onnx
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline
    from edgec.targets.device import load_device

    program = load_model(case.path(shared))
    data = load_data(case.source(shared, case.data), program.inputs, Preprocess(case.mean, case.std, case.input_scale))
    data = data.limit(calibration, 0)
    context = Context(device=load_device("host"), calibration=data, training=data, teacher=program)
    for step in Pipeline.of("fold-bn, quantize-int8" if form == "edgec" else "fold-bn").passes:
        program = step.run(program, context)
    path = folder / "float.onnx"
    path.write_bytes(to_onnx(program).SerializeToString())
    if form == "edgec":
        return path.rename(folder / f"{case.model}.onnx")
    return quantise_static(path, folder / f"{case.model}.onnx", data, FORMS[form])


def quantise_static(source: Path, target: Path, data: Any, options: dict[str, Any]) -> Path:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    names = _inputs(prepared)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows: Iterator[Any] = iter(data.batches(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.rows, None)
            return None if found is None else {n: x.numpy() for n, x in zip(names, found[0], strict=True)}

    kinds = {k: getattr(quantization.QuantType, v) for k, v in options.items() if k.endswith("_type")}
    form = getattr(quantization.QuantFormat, options.get("quant_format", "QDQ"))
    channels = options.get("per_channel", False)
    quantization.quantize_static(str(prepared), str(target), Reader(), quant_format=form, per_channel=channels, **kinds)
    return target


def _inputs(path: Path) -> list[str]:
    import onnx

    graph = onnx.load(path).graph
    constants = {t.name for t in graph.initializer}
    return [i.name for i in graph.input if i.name not in constants]


def measure(
    case: Case, form: str, shared: Path, samples: int | None, calibration: int, passes: str = ""
) -> dict[str, Any]:
    """One row of the table."""
    from edgec.compile import compile_model
    from edgec.data import Preprocess, load_data
    from edgec.frontend import load_model
    from edgec.metrics import default_metric, evaluate, parse_metric
    from edgec.onnx.check import session_of

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_quantised(case, form, folder, shared, calibration)
        session = session_of(path.read_bytes(), fused=True)
        names = [i.name for i in session.get_inputs()]

        def runtime(*inputs: Any) -> Any:
            return session.run(None, dict(zip(names, (np.asarray(x) for x in inputs), strict=True)))[0]

        preprocess = Preprocess(case.mean, case.std, case.input_scale)
        program = load_model(str(path))
        dataset = load_data(case.source(shared, case.evaluation), program.inputs, preprocess)
        dataset = dataset if samples is None else dataset.limit(samples, 0)
        result = compile_model(
            program, passes=passes, eval=dataset, output=folder / "out", metric=case.metric, onnx=False
        )
        assert result.program is not None and result.ledger.device is not None
        metric = parse_metric(case.metric) if case.metric else default_metric(dataset, program.outputs)
        ours, theirs = evaluate(result.program, dataset, metric), evaluate(runtime, dataset, metric)
        summary = result.program.annotations.get("adopt-qdq")
        device, stages = result.ledger.device, result.ledger.stages
        return {
            "model": case.model,
            "form": form,
            "n": len(dataset),
            "metric": metric.name,
            "file": stages[0].metric.value,
            "program": ours.value,
            "runtime": theirs.value,
            "same": float(np.mean(ours.outputs[0].argmax(-1) == theirs.outputs[0].argmax(-1))),
            "sqnr_db": stages[-1].sqnr_db,
            "layers": f"{len(summary.quantised)}/{len(summary.quantised) + len(summary.kept_float)}"
            if summary
            else "0",
            "weights": stages[-1].cost["weight_bytes"],
            "float_weights": stages[0].cost["weight_bytes"],
            "bit_exact": device.bit_exact,
            "left": sorted({(s.what, s.reason) for s in result.ledger.skipped}),
        }


def main(
    model: Annotated[list[str] | None, typer.Option()] = None,
    form: Annotated[list[str] | None, typer.Option()] = None,
    samples: int | None = None,
    calibration: int = 128,
    passes: str = "",
    output: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    rows = []
    for name in model or MODELS:
        (case,) = (c for c in CASES if c.model == name)
        for each in form or FORMS:
            row = measure(case, each, shared_folder(), samples, calibration, passes)
            rows.append(row)
            print(" ".join(f"{k}={v}" for k, v in row.items() if k != "left"), flush=True)
            for what in row["left"]:
                print("     ", *what, flush=True)
    if output is not None:
        output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
