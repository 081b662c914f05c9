"""Other inference engines, as contestants: ONNX Runtime, OpenVINO, and XNNPACK by way of ExecuTorch.

Each engine gets the same float network and, for int8, the calibration data that edgec gets, and quantises it with the
tool and the settings that its documentation recommends for a CPU. What was converted is kept in a cache folder, under a
name made of the network's content, the data and the versions, as quantising takes minutes.

The engines are optional. They are installed by `make peers` into the folder PEERS beside the project, which comes last
in the search path: the project's own versions of shared packages win.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.models import ROOT
from edgec.quiet import quiet

if TYPE_CHECKING:
    from edgec.data import Dataset
    from edgec.program import Program

PEERS = ROOT / ".venv-bench"
KINDS = ("fp32", "int8")


class Absent(Exception):
    """A contestant that cannot take part; the text is the reason, on one line."""

    def __init__(self, reason: object) -> None:
        super().__init__(" ".join(str(reason).split())[:200])


@dataclass(frozen=True)
class Subject:
    """A network with its data.

    program: the float network. calibration: what int8 is calibrated on. evaluation: labelled data, or None for a
    network with random weights. metric: how it is scored, None for the default of the data. attention: whether it is a
    transformer, for which some engines have settings of their own.
    """

    program: Program
    calibration: Dataset
    evaluation: Dataset | None
    metric: str | None
    attention: bool

    @property
    def name(self) -> str:
        return self.program.name


class Loaded(Protocol):
    """A contestant that is ready to run, with a batch of one."""

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs, in order."""
        ...

    def bind(self, *inputs: np.ndarray) -> Callable[[], object]:
        """A function that runs the model on these inputs and does as little else as possible."""
        ...


class Engine(Protocol):
    """name: in tables and on the command line."""

    name: str

    def suits(self, subject: Subject, kind: str) -> bool:
        """Whether this engine is for such networks at all; where it is not, no table names it."""
        ...

    def version(self) -> str:
        """Raises Absent when the engine is not installed."""
        ...

    def prepare(self, subject: Subject, kind: str, cache: Path) -> Path:
        """Convert and, for int8, quantise the network; returns the file to load. Raises Absent."""
        ...

    def load(self, file: Path, threads: int) -> Loaded:
        """Open a prepared file for so many threads. Raises Absent."""
        ...


def add_peers_to_path() -> None:
    """Let packages of the PEERS folder be found, after all others."""
    if PEERS.is_dir() and str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgec" / "benchmarks"


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Drop what is printed meanwhile, also by C++ code; exceptions pass through with all they say."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        with quiet():
            yield
    finally:
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
        for descriptor in (*kept, sink):
            os.close(descriptor)


def place_of_stack(stack: Path) -> str:
    """ ", in FUNCTION of FILE" for the innermost call of ours in a stack that was dumped; empty where there is none."""
    if stack.is_file():
        for file, function in re.findall(r'File "(.*)", line \d+ in (\w+)', stack.read_text()):
            if file.startswith(str(ROOT)):
                return f", in {function} of {Path(file).name}"
    return ""


def engine_version(package: str, module: str) -> str:
    """The installed version of `package`, once `module` has been imported. Raises Absent with the reason."""
    try:
        with hushed():
            importlib.import_module(module)
        return importlib.metadata.version(package)
    # Binary packages that do not fit raise whatever they like on import.
    except Exception as error:
        raise Absent(f"{package} cannot be imported: {error or type(error).__name__}") from error


def cached(cache: Path, parts: tuple[object, ...], suffix: str, make: Callable[[Path], None]) -> Path:
    """The file that `make(path)` writes, from the cache where it is there; files beside it of the same stem stay too.

    Raises Absent with the message of whatever `make` raises.
    """
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]
    folder = cache / digest
    target = folder / f"model{suffix}"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as staging:
        made = Path(staging) / "made"
        made.mkdir()
        try:
            with hushed():
                make(made / target.name)
        except Exception as error:
            raise Absent(f"{type(error).__name__}: {error}") from error
        if folder.is_dir():
            folder.rename(Path(staging) / "old")
        made.rename(folder)
    return target


def export_onnx(subject: Subject, cache: Path) -> Path:
    """The float network as ONNX with a batch of one, as torch.onnx writes it."""
    import torch

    def make(path: Path) -> None:
        program = subject.program
        torch.onnx.export(program.export(batch=1), program.batch_inputs(1), path, dynamo=True, external_data=False)

    parts = ("onnx", subject.program.fingerprint(), torch.__version__, importlib.metadata.version("onnxscript"))
    return cached(cache, parts, ".onnx", make)


def samples(dataset: Dataset) -> Iterator[tuple[np.ndarray, ...]]:
    """The inputs of one sample after the other, each with a batch of one."""
    for i in range(len(dataset)):
        yield dataset.read(slice(i, i + 1))[0]


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


class OnnxRuntime:
    """int8: static quantisation in QDQ form, uint8 activations and int8 weights per channel."""

    name = "onnxruntime"

    def suits(self, subject: Subject, kind: str) -> bool:
        return True

    def version(self) -> str:
        return engine_version("onnxruntime", "onnxruntime")

    def prepare(self, subject: Subject, kind: str, cache: Path) -> Path:
        version, model = self.version(), export_onnx(subject, cache)
        if kind == "fp32":
            return model
        parts = ("ort-int8", model.parent.name, subject.calibration.sha256(), version)
        return cached(cache, parts, ".onnx", lambda path: _ort_quantize(model, path, subject.calibration))

    def load(self, file: Path, threads: int) -> Loaded:
        return OrtSession(file, threads)


class OnnxRuntimeDynamic(OnnxRuntime):
    """int8 for transformers as ONNX Runtime's guide advises: ranges of activations are found at run time."""

    name = "onnxruntime-dynamic"

    def suits(self, subject: Subject, kind: str) -> bool:
        return kind == "int8" and subject.attention

    def prepare(self, subject: Subject, kind: str, cache: Path) -> Path:
        version, model = self.version(), export_onnx(subject, cache)
        parts = ("ort-dynamic", model.parent.name, version)
        return cached(cache, parts, ".onnx", lambda path: _ort_quantize_dynamic(model, path))


def _ort_quantize_dynamic(model: Path, target: Path) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_dynamic(
        str(prepared),
        str(target),
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()


def _ort_quantize(model: Path, target: Path, calibration: Dataset) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    names = _ort_inputs(model)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = samples(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            arrays = next(self.rows, None)
            return None if arrays is None else dict(zip(names, arrays, strict=True))

    quantization.quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )
    prepared.unlink()


def _ort_inputs(model: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(str(model), load_external_data=False).graph.input]


class OrtSession:
    def __init__(self, file: Path, threads: int, profile: str | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(y) for y in self.session.run(None, dict(zip(self.inputs, inputs, strict=True))))

    def bind(self, *inputs: np.ndarray) -> Callable[[], object]:
        binding = self.session.io_binding()
        for name, array in zip(self.inputs, inputs, strict=True):
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            binding.bind_output(name)
        session = self.session
        return lambda: session.run_with_iobinding(binding)


# -- OpenVINO ----------------------------------------------------------------------------------------------------------


class OpenVino:
    """int8: post-training quantisation by NNCF with its default preset, and the transformer scheme for attention."""

    name = "openvino"

    def suits(self, subject: Subject, kind: str) -> bool:
        return True

    def version(self) -> str:
        return engine_version("openvino", "openvino")

    def prepare(self, subject: Subject, kind: str, cache: Path) -> Path:
        version, model = self.version(), export_onnx(subject, cache)
        if kind == "fp32":
            return model
        nncf = engine_version("nncf", "nncf")
        parts = ("openvino-int8", model.parent.name, subject.calibration.sha256(), version, nncf, subject.attention)
        return cached(cache, parts, ".xml", lambda path: _nncf_quantize(model, path, subject))

    def load(self, file: Path, threads: int) -> Loaded:
        return _OvRequest(file, threads)


def _nncf_quantize(model: Path, target: Path, subject: Subject) -> None:
    import nncf
    import openvino

    network = openvino.Core().read_model(str(model))
    names = [port.get_any_name() for port in network.inputs]
    rows = [dict(zip(names, arrays, strict=True)) for arrays in samples(subject.calibration)]
    quantized = nncf.quantize(
        network,
        nncf.Dataset(rows),
        subset_size=len(rows),
        target_device=nncf.TargetDevice.CPU,
        model_type=nncf.ModelType.TRANSFORMER if subject.attention else None,
    )
    openvino.save_model(quantized, str(target), compress_to_fp16=False)


class _OvRequest:
    def __init__(self, file: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            # The benchmark has chosen the cores.
            "ENABLE_CPU_PINNING": False,
        }
        self.request = core.compile_model(core.read_model(str(file)), "CPU", options).create_infer_request()

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        found = self.request.infer(dict(enumerate(inputs)))
        return tuple(np.array(found[i]) for i in range(len(found)))

    def bind(self, *inputs: np.ndarray) -> Callable[[], object]:
        import openvino

        for i, array in enumerate(inputs):
            self.request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
        # The wrapper around this function copies outputs into a dictionary.
        infer = super(type(self.request), self.request).infer
        empty: dict[int, Any] = {}
        return lambda: infer(empty, share_outputs=True, decode_strings=False)


# -- XNNPACK, through ExecuTorch ---------------------------------------------------------------------------------------


class Xnnpack:
    """int8: PT2E quantisation by the XNNPACK quantizer, symmetric and per channel. No ONNX on the way."""

    name = "xnnpack"

    def suits(self, subject: Subject, kind: str) -> bool:
        return True

    def version(self) -> str:
        engine_version("torchao", "torchao.quantization.pt2e.quantize_pt2e")
        engine_version("executorch", "executorch.backends.xnnpack.partition.xnnpack_partitioner")
        return engine_version("executorch", "executorch.extension.pybindings.portable_lib")

    def prepare(self, subject: Subject, kind: str, cache: Path) -> Path:
        import torch

        parts = ("xnnpack", kind, subject.program.fingerprint(), self.version(), torch.__version__)
        data = () if kind == "fp32" else (subject.calibration.sha256(), engine_version("torchao", "torchao"))
        return cached(cache, (*parts, *data), ".pte", lambda path: _xnnpack_lower(subject, kind, path))

    def load(self, file: Path, threads: int) -> Loaded:
        return _XnnpackModule(file, threads)


def _xnnpack_lower(subject: Subject, kind: str, target: Path) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = subject.program.export(batch=1)
    if kind == "int8":
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        observed = prepare_pt2e(exported.module(), quantizer)
        for arrays in samples(subject.calibration):
            observed(*(torch.from_numpy(x) for x in arrays))
        exported = torch.export.export(convert_pt2e(observed), subject.program.batch_inputs(1))
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    target.write_bytes(lowered.to_executorch().buffer)


class _XnnpackModule:
    def __init__(self, file: Path, threads: int) -> None:
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
        self.module = portable_lib._load_for_executorch(str(file))

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(y.numpy().copy() for y in self.bind(*inputs)())

    def bind(self, *inputs: np.ndarray) -> Callable[[], Any]:
        import torch

        tensors = [torch.from_numpy(x) for x in inputs]
        forward = self.module.forward
        return lambda: forward(tensors)


ENGINES: tuple[Engine, ...] = (OnnxRuntime(), OnnxRuntimeDynamic(), OpenVino(), Xnnpack())
