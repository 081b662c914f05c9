"""GPU code on PoCL and lavapipe: results beside PyTorch, speed beside ncnn and TVM's defaults, and rooflines.

    python -m benchmarks.gpu correct [--model NAME ...] [--device NAME ...] [--kind fp32|fp16|int8 ...] [--samples N]
    python -m benchmarks.gpu ncnn [--model NAME] [--kind fp32|fp16 ...] [--rounds N]
    python -m benchmarks.gpu stock [--model NAME] [--rounds N] [--no-network]
    python -m benchmarks.gpu winograd [--model NAME ...] [--device NAME ...] [--kind fp32|fp16 ...] [--rounds N]
    python -m benchmarks.gpu roofline [--model NAME ...] [--device NAME ...] [--kind fp32|fp16|int8 ...]

`correct` builds and runs the shared models: errors to PyTorch, agreement, whether int8 gives the bits of the program.
`ncnn` times a network on the first Vulkan device here against ncnn's Vulkan back end on the same device. `stock` times
own kernels on the first OpenCL device against those that dlight, TVM's library of schedules, gives by default.
`winograd` times 3x3 convolutions by Winograd's way and the direct one.
`roofline` says for each step how many operations there are for a byte of memory, which needs no device.

Every cell of a table is a process of its own with a time limit, so a crash of a driver is a row. Finished cells are
kept under ~/.cache/edgec/benchmarks/gpu, under a name made of what was asked and of edgec's sources, and are not
measured again; crashes and time-outs are. Times on PoCL and lavapipe, which run on this machine's CPU, say something
about the work in the code and next to nothing about the order of two kernels on a phone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

# Before torch and NumPy are loaded: no threads, as cells are forks of this process.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import typer  # noqa: E402

from benchmarks.models import CASES, ROOT, shared_folder  # noqa: E402
from benchmarks.peers import Absent, add_peers_to_path, default_cache, engine_version, hushed, place_of_stack  # noqa: E402
from benchmarks.timing import Timing, markdown, measure  # noqa: E402
from edgec.errors import EdgecError  # noqa: E402
from edgec.stats import sqnr_db  # noqa: E402

if TYPE_CHECKING:
    from edgec.bundle import Bundle
    from edgec.lowering.lower import Lowered
    from edgec.program import Program

KINDS = {"fp32": "fold-bn", "fp16": "fold-bn, cast-fp16", "int8": "fold-bn, quantize-int8"}
DEVICES = ("mali-g78", "vulkan", "adreno-640")
MOBILENET = "imagenet_mobilenetv2_100_224_dq"
# Smallest first: what is finished when time runs out is the most.
MODELS = (
    "mlperftiny_ad_autoencoder",
    "mlperftiny_ic_resnet8",
    "mlperftiny_kws_dscnn",
    "mlperftiny_vww_mobilenetv1_025_96",
    "cifar10_resnet20",
    "cifar10_vit_d128l4",
    "cifar10_resnet44",
    "sr_fsrcnn_x2_y112",
    "face_slim_320x240",
    "imagenet_mobilenetv1_075_224",
    MOBILENET,
    "imagenet_vit_tiny_p16_224",
    "sr_vdsr_x2_y224",
)
CALIBRATION_SAMPLES = 16
# Sources that decide what a cell gives.
SOURCES = ("edgec", "passes", "targets")
# To be raised when cells measure something else.
SCHEMA = 1
# Of the largest value, in float32; float16 may have so many times that.
LARGEST_ERROR = 1e-3
FP16_ERRORS = 50
# A work item of dlight's schedules waits for others; PoCL takes seconds for one inference.
STOCK_BURST = 0.0

Cell = dict[str, Any]

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


# -- cells in processes of their own -----------------------------------------------------------------------------------


def sources() -> str:
    """A digest of edgec's sources."""
    digest = hashlib.sha256()
    for place in SOURCES:
        root = ROOT / place
        for file in [root] if root.is_file() else sorted(root.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def cell(measured: Callable[..., Cell], arguments: Mapping[str, Any], limit: float, digest: str) -> Cell:
    """What `measured(**arguments)` gives, in a fork of this process that has `limit` seconds.

    Kept in the cache, unless it ended without a result: then the only key is "error", which is also that of an
    EdgecError, which is kept.
    """
    asked = json.dumps([SCHEMA, measured.__name__, dict(arguments), digest], sort_keys=True)
    file = default_cache() / "gpu" / f"{hashlib.sha256(asked.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())["cell"]
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as folder:
        result = Path(folder) / "result.json"
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(measured, dict(arguments), result, limit), daemon=True
        )
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return {"error": f"not done after {limit:.0f} s{place_of_stack(result.with_suffix('.stack'))}"}
        if not result.is_file():
            return {"error": f"ended with status {process.exitcode}"}
        found = json.loads(result.read_text())
    if found.pop("final"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"asked": json.loads(asked), "cell": found}))
    return found


def _child(measured: Callable[..., Cell], arguments: Mapping[str, Any], result: Path, limit: float) -> None:
    """Run a cell and write its result. Compiled code is not taken from drivers' caches: compile times are measured."""
    stack = result.with_suffix(".stack").open("w")
    faulthandler.dump_traceback_later(0.9 * limit, file=stack)
    os.environ["POCL_CACHE_DIR"] = str(result.parent / "pocl")
    os.environ["MESA_SHADER_CACHE_DISABLE"] = "true"
    (result.parent / "pocl").mkdir()
    try:
        with hushed():
            found: Cell = {**measured(**arguments), "final": True}
    except (EdgecError, Absent) as error:
        found = {"error": str(error), "final": isinstance(error, EdgecError)}
    except Exception as error:  # Whatever it is, it is a row of the table.
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}", "final": False}
    made = result.with_suffix(".part")
    made.write_text(json.dumps(found))
    made.replace(result)


def warm() -> None:
    """Import what cells need, once for all of them. No driver may be opened here: it would not survive the fork."""
    for name in ("benchmarks.gpu_stock", "benchmarks.mcu", "edgec.bundle", "edgec.lowering.lower", "edgec.pipeline"):
        importlib.import_module(name)


# -- networks ----------------------------------------------------------------------------------------------------------


def rewritten(name: str, kind: str, device: str) -> tuple[Program, Program]:
    """(a shared model, the same after the passes of `kind` for a device). Raises EdgecError."""
    from benchmarks.mcu import load
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline
    from edgec.targets.device import load_device

    original, data = load(name)
    context = Context(device=load_device(device), calibration=data.limit(CALIBRATION_SAMPLES))
    program = original
    for step in Pipeline.parse(KINDS[kind]):
        program = step.run(program, context)
    return original, program


def images(name: str, program: Program, count: int) -> list[np.ndarray]:
    """The first samples of a model's evaluation data, spread over it: an array [count, ...] for each input.

    Random ones for the model without data.
    """
    from edgec.data import Preprocess, load_data

    case = next(c for c in CASES if c.model == name)
    if case.evaluation is None:
        random = np.random.default_rng(1)
        shape = tuple(program.inputs[0].shape)[1:]
        return [random.normal(size=(count, *shape)).astype(np.float32)]
    preprocess = Preprocess(case.mean, case.std, case.input_scale)
    data = load_data(case.source(shared_folder(), case.evaluation), program.inputs, preprocess)
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    return list(data.read(sorted(set(chosen.tolist())))[0])


def built(program: Program, device: str, folder: Path) -> tuple[Bundle, Lowered]:
    """The bundle of a program in a folder. Raises EdgecError."""
    from edgec.bundle import build_bundle
    from edgec.lowering.lower import lower
    from edgec.targets.device import load_device

    row = load_device(device)
    lowered = lower(program, row)
    return build_bundle(lowered, row, folder / "bundle"), lowered


def _arrays(values: Any) -> list[np.ndarray]:
    """Outputs of a bundle or of a program as arrays."""
    each = values if isinstance(values, (tuple, list)) else [values]
    return [v if isinstance(v, np.ndarray) else v.detach().numpy() for v in each]


# -- correctness -------------------------------------------------------------------------------------------------------

CORRECT = (
    "model",
    "device",
    "type",
    "samples",
    "error to PyTorch",
    "SQNR dB",
    "same top-1",
    "int8: bits of the program",
    "kernels, bytes",
    "weights, bytes",
    "TVM's own operators",
    "compile s",
    "first run s",
    "next s",
)


def correctness(model: str, device: str, kind: str, samples: int) -> Cell:
    """Compile, run on samples and compare with PyTorch's float network, and int8 with the rewritten program.

    error: largest difference by the largest value. sqnr: signal by error in dB, of the output with the lowest. close:
    the same beside the rewritten program, for int8. first:
    seconds of building the kernels, by the driver, and of one run; next: of each further run.
    """
    import torch

    original, program = rewritten(model, kind, device)
    inputs = images(model, original, samples)
    tensors = [torch.from_numpy(a) for a in inputs]
    want = _arrays(original(*tensors))
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as work:
        start = time.perf_counter()
        bundle, lowered = built(program, device, Path(work))
        compiled = time.perf_counter() - start
        texts = [p for p in bundle.path.rglob("*") if p.suffix in (".cl", ".wgsl")]
        sizes = sum(p.stat().st_size for p in texts), (bundle.path / "weights.bin").stat().st_size
        start = time.perf_counter()
        got = [_arrays(bundle.run(*(a[:1] for a in inputs)))]
        first = time.perf_counter() - start
        start = time.perf_counter()
        if len(inputs[0]) > 1:
            got.append(_arrays(bundle.run(*(a[1:] for a in inputs))))
        after = (time.perf_counter() - start) / max(1, len(inputs[0]) - 1)
    outputs = [np.concatenate(each) for each in zip(*got, strict=True)]
    bits, close = None, None
    if kind == "int8":
        meant = _arrays(program(*tensors))
        bits = all(np.array_equal(a, b) for a, b in zip(outputs, meant, strict=True))
        close = min(_sqnr(a, b) for a, b in zip(outputs, meant, strict=True))
    classes = want[0].ndim == 2 and want[0].shape[1] > 1 and next(c for c in CASES if c.model == model).data
    same = int((outputs[0].argmax(-1) == want[0].argmax(-1)).sum()) if classes else None
    return {
        "samples": len(inputs[0]),
        "error": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(outputs, want, strict=True)),
        "sqnr": min(_sqnr(a, b) for a, b in zip(outputs, want, strict=True)),
        "same": same,
        "bits": bits,
        "close": close,
        "texts": sizes[0],
        "weights": sizes[1],
        "library": sorted({f"{f.layer}: {f.reason}" for f in lowered.fallbacks}),
        "compile": compiled,
        "first": first,
        "next": after,
    }


def _sqnr(got: np.ndarray, want: np.ndarray) -> float:
    """Signal by error in dB; 999 without any error. NaN where the result has one."""
    return min(sqnr_db(got, want), 999.0)


def correct_row(model: str, device: str, kind: str, found: Cell) -> list[str]:
    """A line of the table of correctness."""
    if "error" in found and len(found) == 1:
        return [model, device, kind, "", short(found["error"]), *[""] * (len(CORRECT) - 5)]
    n = found["samples"]
    return [
        model,
        device,
        kind,
        str(n),
        f"{found['error']:.2g}",
        f"{found['sqnr']:.1f}",
        "" if found["same"] is None else f"{found['same']} of {n}",
        {None: "", True: "yes", False: _not_bits(found.get("close"))}[found["bits"]],
        f"{found['texts']:,}",
        f"{found['weights']:,}",
        str(len(found["library"])),
        f"{found['compile']:.1f}",
        f"{found['first']:.1f}",
        f"{found['next']:.3f}" if n > 1 else "",
    ]


def _not_bits(close: float | None) -> str:
    """Of integers between float operations, which sum in another order: how close they are to the program."""
    return "**no**" if close is None else f"no, {close:.0f} dB"


def short(text: str) -> str:
    """One line for a cell."""
    return " ".join(text.split()).replace("|", "/")[:200]


@app.command()
def correct(
    model: Annotated[list[str] | None, typer.Option(help="only these models")] = None,
    device: Annotated[list[str] | None, typer.Option(help="only these devices")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="fp32, fp16, int8")] = None,
    samples: Annotated[int, typer.Option(help="samples to run")] = 4,
    limit: Annotated[float, typer.Option(help="seconds for a cell")] = 600,
    deadline: Annotated[float, typer.Option(help="begin no cell after so many seconds; 0: no limit")] = 0,
) -> None:
    """Results of the shared models beside PyTorch's, on the first device of this machine for each API."""
    end = time.monotonic() + (deadline or 1e9)
    with _explained():
        models = _known(model or MODELS, MODELS, "--model")
        kinds = _known(kind or KINDS, tuple(KINDS), "--kind")
        devices = _gpus(device or DEVICES)
        digest = sources()
        warm()
        print(markdown(CORRECT, [], text=3), flush=True)
        for name in models:
            for target in devices:
                for each in kinds:
                    if time.monotonic() > end:
                        print("\nOut of time.", flush=True)
                        return
                    arguments = {"model": name, "device": target, "kind": each, "samples": samples}
                    row = correct_row(name, target, each, cell(correctness, arguments, limit, digest))
                    print(f"| {' | '.join(row)} |", flush=True)


# -- ncnn --------------------------------------------------------------------------------------------------------------

TIMES = ("model", "type", "contestant", "wall ms", "wall min", "CPU ms", "to the other", "error to PyTorch")


def beside_ncnn(model: str, kind: str, rounds: int) -> Cell:
    """Own Vulkan back end and ncnn's in turns in one process, on the same device. Raises Absent."""
    import torch

    from edgec.targets.gpu.runner import open_runner

    add_peers_to_path()
    version = engine_version("ncnn", "ncnn")
    original, program = rewritten(model, kind, "vulkan")
    sample = images(model, original, 1)[0][:1]
    want = _arrays(original(torch.from_numpy(sample)))[0]
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as work:
        net = _ncnn(original, kind, Path(work))
        bundle, _ = built(program, "vulkan", Path(work))
        runner = open_runner(bundle.path, "vulkan")
        result = np.zeros_like(want)
        ncnn: Any = importlib.import_module("ncnn")
        image = np.ascontiguousarray(sample[0])
        theirs: list[np.ndarray] = []

        def own() -> None:
            runner.run([sample], [result])

        def other() -> None:
            with net.create_extractor() as extractor:
                extractor.input("in0", ncnn.Mat(image))
                theirs[:] = [np.array(extractor.extract("out0")[1])]

        times = measure({"edgec": own, "ncnn": other}, rounds, 0.0)
        device = runner.name
    errors = {
        name: float(np.abs(y.reshape(want.shape) - want).max() / np.abs(want).max())
        for name, y in (("edgec", result), ("ncnn", theirs[0]))
    }
    _right({name: errors[name] / (FP16_ERRORS if kind == "fp16" else 1) for name in errors})
    rows = {name: t.to_json() for name, t in times.items()}
    return {"version": version, "device": device, "times": rows, "errors": errors, "load": os.getloadavg()[0]}


def _ncnn(program: Program, kind: str, folder: Path) -> Any:
    """The network as ncnn has it, converted by its own tool from a TorchScript trace. Raises Absent."""
    import torch

    try:
        ncnn: Any = importlib.import_module("ncnn")
        pnnx: Any = importlib.import_module("pnnx")
    except ImportError as error:
        raise Absent(f"{error.name} is not installed (make peers)") from error
    example = torch.zeros(1, *tuple(program.inputs[0].shape)[1:])
    trace = folder / "net.pt"
    traced: Any = torch.jit.trace(program.edit(), example, check_trace=False)
    traced.save(str(trace))
    # Float16 is chosen when the network is loaded, not in its file.
    pnnx.convert(str(trace), [example], fp16=False)
    if not (folder / "net.ncnn.param").is_file():
        raise Absent("pnnx did not convert the network")
    net = ncnn.Net()
    net.opt.use_vulkan_compute = True
    net.opt.num_threads = 1
    if kind == "fp32":
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(folder / "net.ncnn.param")) or net.load_model(str(folder / "net.ncnn.bin")):
        raise Absent("ncnn does not load the network")
    return net


def time_rows(model: str, kind: str, found: Cell) -> Iterator[list[str]]:
    """A line for each contestant of a table of times, or one with what went wrong. The first one is compared with each
    of the others, the others with the first."""
    if "times" not in found:
        yield [model, kind, short(found["error"]), *[""] * (len(TIMES) - 3)]
        return
    times = {name: Timing(**row) for name, row in found["times"].items()}
    first, *others = times
    for name, own in times.items():
        wall = [f"{own.wall / 1e3:.1f}", f"{own.wall_min / 1e3:.1f}", f"{own.cpu / 1e3:.1f}"]
        error = found["errors"].get(name)
        ratio = ", ".join(f"{own.wall / times[o].wall:.2f}" for o in (others if name == first else [first]))
        yield [model, kind, name, *wall, ratio, "" if error is None else f"{error:.2g}"]


@app.command()
def ncnn(
    model: Annotated[str, typer.Option(help="a shared model with one input and one output")] = MOBILENET,
    kind: Annotated[list[str] | None, typer.Option(help="fp32, fp16")] = None,
    rounds: Annotated[int, typer.Option(help="turns of each contestant")] = 25,
    limit: Annotated[float, typer.Option(help="seconds for a cell")] = 600,
) -> None:
    """Beside ncnn's Vulkan back end. ncnn's float16 is that of its defaults: storage and, where the device can,
    arithmetic; ours adds in float32."""
    with _explained():
        _known([model], MODELS, "--model")
        kinds = _known(kind or ("fp32", "fp16"), ("fp32", "fp16"), "--kind")
        digest = sources()
        warm()
        print(markdown(TIMES, [], text=3), flush=True)
        for each in kinds:
            found = cell(beside_ncnn, {"model": model, "kind": each, "rounds": rounds}, limit, digest)
            for row in time_rows(model, each, found):
                print(f"| {' | '.join(row)} |", flush=True)
        if "times" in found:
            print(f"\nncnn {found['version']} on {found['device']}, load {found['load']:.1f} at the end.")


# -- TVM's defaults ----------------------------------------------------------------------------------------------------


def stock_network(model: str, rounds: int) -> Cell:
    """A network with dlight's default schedules, of both recipes, and with own kernels, in turns on the first OpenCL
    device. Nothing is tuned."""
    import torch

    from benchmarks import gpu_stock
    from edgec.targets.gpu.runner import open_runner

    original, program = rewritten(model, "fp32", "opencl")
    sample = images(model, original, 1)[0][:1]
    want = _arrays(original(torch.from_numpy(sample)))[0]
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as work:
        bundle, _ = built(program, "opencl", Path(work))
        runners: dict[str, Any] = {"edgec": open_runner(bundle.path, "opencl")}
        runners |= {f"dlight, {recipe}": gpu_stock.network(program, recipe) for recipe in gpu_stock.DEVICES}
        results = {name: np.zeros_like(want) for name in runners}

        def run(name: str) -> None:
            runners[name].run([sample], [results[name]])

        times = measure({name: functools.partial(run, name) for name in runners}, rounds, STOCK_BURST)
    scale = np.abs(want).max()
    errors = {name: float(np.abs(y - want).max() / scale) for name, y in results.items()}
    _right(errors)
    groups = {name: largest_group(runner) for name, runner in runners.items()}
    return {"times": {name: t.to_json() for name, t in times.items()}, "errors": errors, "groups": groups}


def largest_group(runner: Any) -> list[int]:
    """[work items of the largest work-group of an OpenCL runner's kernels, the smallest limit that the device names for
    any of them]: CL_KERNEL_WORK_GROUP_SIZE."""
    cl = runner.cl
    rows = [(x, k) for x, k in zip(runner.plan["launches"], runner.kernels, strict=True) if k is not None]
    limit = cl.kernel_work_group_info.WORK_GROUP_SIZE
    return [
        max(math.prod(x["group"]) for x, _ in rows),
        min(k.get_work_group_info(limit, runner.device) for _, k in rows),
    ]


def _right(errors: Mapping[str, float]) -> None:
    """Raise Absent when a contestant is wrong: how fast it is means nothing."""
    for name, error in errors.items():
        if not error <= LARGEST_ERROR:
            raise Absent(f"{name} gives a wrong result, {error:.2g} of the largest value from PyTorch's")


def stock_layer(shape: Sequence[int], rounds: int) -> Cell:
    """A 1x1 convolution (inputs, outputs, height, width) with a bias, as `stock_network`: times of its kernels alone,
    by OpenCL's profile. Changes of layout at the borders are no part of the layer in a network."""
    import torch
    from torch import nn

    from benchmarks import gpu_stock
    from edgec.frontend import load_model
    from edgec.targets.gpu.runner import open_runner

    inputs, outputs, height, width = shape
    torch.manual_seed(0)
    module = nn.Conv2d(inputs, outputs, 1).eval()
    program = load_model(module, input_shape=(1, inputs, height, width), name="layer")
    sample = np.random.default_rng(0).standard_normal((1, inputs, height, width)).astype(np.float32)
    want = _arrays(program(torch.from_numpy(sample)))[0]
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as work:
        bundle, _ = built(program, "opencl", Path(work))
        runners: dict[str, Any] = {"edgec": open_runner(bundle.path, "opencl", profile=True)}
        for recipe in gpu_stock.DEVICES:
            runners[f"dlight, {recipe}"] = gpu_stock.network(program, recipe, profile=True)
        results = {name: np.zeros_like(want) for name in runners}
        kernels: dict[str, list[float]] = {name: [] for name in runners}

        def run(name: str) -> None:
            runner = runners[name]
            runner.run([sample], [results[name]])
            kernels[name].append(_of_convolution(runner))

        measure({name: functools.partial(run, name) for name in runners}, rounds, STOCK_BURST)
    scale = np.abs(want).max()
    errors = {name: float(np.abs(y - want).max() / scale) for name, y in results.items()}
    _right(errors)
    return {"kernel_ms": {name: float(np.median(t)) for name, t in kernels.items()}, "errors": errors}


def _of_convolution(runner: Any) -> float:
    """Milliseconds of the launches of a runner's last run that multiply, or that TVM calls convolutions."""
    launches = [x for x in runner.plan["launches"] if x["variant"] == runner.choices[x["step"]]]
    found = 0.0
    for launch, ms in zip(launches, runner.times, strict=True):
        named = launch["function"] >= 0 and "conv2d" in runner.plan["functions"][launch["function"]]
        found += ms if runner.plan["steps"][launch["step"]]["macs"] or named else 0.0
    return found


def pointwise_layers(model: str) -> list[tuple[int, int, int, int]]:
    """The different 1x1 convolutions of a model on maps: (inputs, outputs, height, width)."""
    from benchmarks.mcu import load
    from edgec.lowering.lower import kernel_bindings
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline
    from edgec.targets.kernels.conv2d import Conv2D

    program, _ = load(model)
    for step in Pipeline.parse(KINDS["fp32"]):
        program = step.run(program, Context())
    specs = [b.spec for b in kernel_bindings(program) if isinstance(b.spec, Conv2D)]
    found = [(s.ci, s.co, s.h, s.w) for s in specs if s.kernel == (1, 1) and s.h > 1]
    return list(dict.fromkeys(found))


@app.command()
def stock(
    model: Annotated[str, typer.Option(help="a shared model with one input and one output")] = MOBILENET,
    rounds: Annotated[int, typer.Option(help="turns of each contestant")] = 9,
    limit: Annotated[float, typer.Option(help="seconds for a cell")] = 600,
    network: Annotated[bool, typer.Option(help="the whole network too")] = True,
    layers: Annotated[bool, typer.Option(help="its 1x1 convolutions")] = True,
) -> None:
    """Beside dlight's default schedules; convolutions with groups get its plainest rule, as the default one takes
    thousands of times as long here."""
    with _explained():
        _known([model], MODELS, "--model")
        digest = sources()
        warm()
        if network:
            print(markdown(TIMES, [], text=3), flush=True)
            found = cell(stock_network, {"model": model, "rounds": rounds}, limit, digest)
            for row in time_rows(model, "fp32", found):
                print(f"| {' | '.join(row)} |", flush=True)
            print()
            for name, (items, most) in found.get("groups", {}).items():
                print(f"{name}: work-groups of at most {items} work items; the device allows {most}.")
            print(flush=True)
        if not layers:
            return
        print(markdown(LAYER_TIMES, []), flush=True)
        for shape in pointwise_layers(model):
            found = cell(stock_layer, {"shape": shape, "rounds": rounds}, limit, digest)
            print(f"| {' | '.join(layer_row(shape, found))} |", flush=True)


LAYER_TIMES = ("1x1 convolution", "MMAC", "edgec ms", "dlight, mali ms", "dlight, adreno ms", "ratio to the faster")


def layer_row(shape: Sequence[int], found: Cell) -> list[str]:
    """A line of the table of 1x1 convolutions."""
    inputs, outputs, height, width = shape
    cells = [f"{inputs} to {outputs}, {height}x{width}", f"{inputs * outputs * height * width / 1e6:.1f}"]
    if "kernel_ms" not in found:
        return [*cells, short(found["error"]), *[""] * 3]
    own, *others = found["kernel_ms"].values()
    return [*cells, *(f"{ms:.3f}" for ms in (own, *others)), f"{min(others) / own:.1f}"]


# -- Winograd ----------------------------------------------------------------------------------------------------------

WAYS = ("network or layer", "device", "type", "MMAC", "layers by Winograd", "ms", "direct ms", "ratio", "errors")
# 3x3 convolutions of ResNet-18 at 224, and one on a large map: (channels, height and width).
RESNET = ((64, 56), (128, 28), (256, 14), (512, 7), (64, 224))


def both_ways(model: str | None, shape: Sequence[int], device: str, kind: str, rounds: int) -> Cell:
    """A network, or without one a 3x3 convolution of `shape`, by the first variant of each step and by the direct one
    where that is Winograd's: milliseconds of all launches of a run by the device's profile, and errors to PyTorch."""
    import torch
    from torch import nn

    from edgec.frontend import load_model
    from edgec.passbase import Context
    from edgec.pipeline import Pipeline
    from edgec.targets.device import load_device
    from edgec.targets.gpu.runner import open_runner

    if model:
        original, program = rewritten(model, kind, device)
        sample = images(model, original, 1)[0][:1]
    else:
        channels, size = shape
        torch.manual_seed(0)
        module = nn.Conv2d(channels, channels, 3, padding=1).eval()
        original = program = load_model(module, input_shape=(1, channels, size, size), name="layer")
        for step in Pipeline.parse(KINDS[kind]):
            program = step.run(program, Context(device=load_device(device)))
        sample = np.random.default_rng(0).standard_normal((1, channels, size, size)).astype(np.float32)
    want = _arrays(original(torch.from_numpy(sample)))[0]
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as work:
        bundle, _ = built(program, device, Path(work))
        runner: Any = open_runner(bundle.path, load_device(device).api, profile=True)
    launches = runner.plan["launches"]
    counts = [sum((x["step"], x["variant"]) == (n, 0) for x in launches) for n in range(len(runner.plan["steps"]))]
    transformed = [
        n
        for n, row in enumerate(runner.plan["steps"])
        if row["op"] == "conv2d" and counts[n] == 3 and row["variants"] > 1
    ]
    choices = {"winograd": [0] * len(counts), "direct": [int(n in transformed) for n in range(len(counts))]}
    results = {name: np.zeros_like(want) for name in choices}
    times: dict[str, list[float]] = {name: [] for name in choices}

    def run(name: str) -> None:
        runner.choices = choices[name]
        runner.run([sample], [results[name]])
        times[name].append(sum(runner.times))

    measure({name: functools.partial(run, name) for name in choices}, rounds, STOCK_BURST)
    return {
        "macs": sum(row["macs"] for row in runner.plan["steps"]),
        "layers": len(transformed),
        "ms": {name: float(np.median(t)) for name, t in times.items()},
        "errors": {name: float(np.abs(y - want).max() / np.abs(want).max()) for name, y in results.items()},
    }


def ways_row(name: str, device: str, kind: str, found: Cell) -> list[str]:
    """A line of the table of `winograd`."""
    if "ms" not in found:
        return [name, device, kind, short(found["error"]), *[""] * (len(WAYS) - 4)]
    ms, errors = found["ms"], found["errors"]
    cells = [name, device, kind, f"{found['macs'] / 1e6:,.1f}", str(found["layers"])]
    if not found["layers"]:
        return [*cells, "", f"{ms['direct']:.2f}", "", f"{errors['direct']:.2g}"]
    ratio = f"{ms['direct'] / ms['winograd']:.2f}"
    both = f"{errors['winograd']:.2g}, {errors['direct']:.2g}"
    return [*cells, f"{ms['winograd']:.2f}", f"{ms['direct']:.2f}", ratio, both]


@app.command()
def winograd(
    model: Annotated[list[str] | None, typer.Option(help="shared models with one input and one output")] = None,
    device: Annotated[list[str] | None, typer.Option(help="devices")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="fp32, fp16")] = None,
    rounds: Annotated[int, typer.Option(help="turns of each way")] = 9,
    limit: Annotated[float, typer.Option(help="seconds for a cell")] = 600,
    layers: Annotated[bool, typer.Option(help="convolutions of ResNet-18")] = True,
) -> None:
    """3x3 convolutions by Winograd's way and the direct one, where the device's rates choose the former."""
    with _explained():
        models = _known(["sr_vdsr_x2_y224"] if model is None else model, MODELS, "--model")
        kinds = _known(kind or ["fp32"], ("fp32", "fp16"), "--kind")
        devices = _gpus(device or ("mali-g78", "vulkan"))
        digest = sources()
        warm()
        print(markdown(WAYS, [], text=3), flush=True)
        cells = [(None, shape) for shape in RESNET] if layers else []
        for name, shape in [*cells, *((m, ()) for m in models)]:
            for target in devices:
                for each in kinds:
                    asked = {"model": name, "shape": shape, "device": target, "kind": each, "rounds": rounds}
                    label = name or f"{shape[0]} to {shape[0]}, {shape[1]}x{shape[1]}"
                    row = ways_row(label, target, each, cell(both_ways, asked, limit, digest))
                    print(f"| {' | '.join(row)} |", flush=True)


# -- rooflines ---------------------------------------------------------------------------------------------------------

ROOFLINE = ("step", "launches", "MMAC", "KiB moved", "operations a byte", "bound by", "at best us")


def traffic(model: str, device: str, kind: str) -> Cell:
    """Steps of a network on a device: layer, op, macs, bytes of all buffers that the launches read or write, once for
    each parameter, and launches: of the first variants. Caches can make that less, bad access more."""
    from edgec.lowering.lower import kernel_bindings
    from edgec.targets.device import load_device
    from edgec.targets.gpu.kernels.winograd import Winograd

    _, program = rewritten(model, kind, device)
    with tempfile.TemporaryDirectory(prefix="edgec-gpu-") as work:
        bundle, _ = built(program, device, Path(work))
        plan = json.loads((bundle.path / "plan.json").read_text())
    # What Winograd's way multiplies, where it is the first variant that the bundle has.
    kernels = [(b.layer, b.on(load_device(device)).spec) for b in kernel_bindings(program)]
    fewer = {layer: kernel.products for layer, kernel in kernels if isinstance(kernel, Winograd)}
    return {"steps": moved(plan, fewer)}


def moved(plan: Mapping[str, Any], fewer: Mapping[str, int]) -> list[Cell]:
    """The rows of `traffic` for a plan. fewer: by layer, multiplications of a convolution in three launches."""
    rows = [{"layer": s["layer"], "op": s["op"], "macs": s["macs"], "bytes": 0, "launches": 0} for s in plan["steps"]]
    for launch in plan["launches"]:
        if launch["variant"] == 0:
            row = rows[launch["step"]]
            # A buffer that is overwritten in place is read and written.
            row["bytes"] += sum(plan["buffers"][number]["bytes"] for number in launch["args"])
            row["launches"] += 1
    for row in rows:
        if row["launches"] == 3 and row["layer"] in fewer:
            row["macs"] = fewer[row["layer"]]
    return rows


def roofline_row(row: Mapping[str, Any], gflops: float, gbps: float) -> list[str]:
    """A line of a step. gflops, gbps: of the device in the type of the network, 0 where the table has none."""
    macs, moved = row["macs"], row["bytes"]
    compute = 2 * macs / gflops / 1e3 if gflops else 0.0
    memory = moved / gbps / 1e3 if gbps else 0.0
    known = gflops and gbps
    bound = ("arithmetic" if compute > memory else "memory") if known else ""
    best = f"{max(compute, memory):.1f}" if known else ""
    intensity = f"{2 * macs / moved:.2f}" if moved else ""
    name = f"{row['op']}: {row['layer']}".replace("|", "/")
    return [name, str(row["launches"]), f"{macs / 1e6:.2f}", f"{moved / 1024:.1f}", intensity, bound, best]


@app.command()
def roofline(
    model: Annotated[list[str] | None, typer.Option(help="shared models")] = None,
    device: Annotated[list[str] | None, typer.Option(help="devices")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="fp32, fp16, int8")] = None,
    limit: Annotated[float, typer.Option(help="seconds for a cell")] = 600,
    steps: Annotated[bool, typer.Option(help="every step, not only sums")] = True,
    top: Annotated[int, typer.Option(help="only so many steps, those with the longest times first; 0: all")] = 0,
) -> None:
    """Operations and bytes of every step, against the rates in targets/devices.toml.

    The table has rates of float32 arithmetic alone: what bounds a step is said of float32 only.
    """
    from edgec.targets.device import load_device

    with _explained():
        models = _known(model or [MOBILENET], MODELS, "--model")
        kinds = _known(kind or ["fp32"], tuple(KINDS), "--kind")
        devices = _gpus(device or ("mali-g78", "adreno-640"))
        digest = sources()
        warm()
        for name in models:
            for target in devices:
                for each in kinds:
                    found = cell(traffic, {"model": name, "device": target, "kind": each}, limit, digest)
                    print(f"\n{name}, {target}, {each}", end="")
                    if "steps" not in found:
                        print(f": {short(found['error'])}", flush=True)
                        continue
                    row = load_device(target)
                    rates = (row.gflops, row.gbps) if each == "fp32" else (0.0, 0.0)
                    rated = f": at most {row.gflops:,.0f} GFLOP/s, {row.gbps:,.0f} GB/s" if all(rates) else ""
                    print(f"{rated}\n")
                    total = {"op": "all", "layer": f"{len(found['steps'])} steps"}
                    total |= {key: sum(s[key] for s in found["steps"]) for key in ("macs", "bytes", "launches")}
                    lines = [roofline_row(s, *rates) for s in found["steps"]]
                    last = roofline_row(total, *rates)
                    if all(rates):
                        # The sum of the steps' bounds, which is more than the bound of the sum.
                        last[5:] = ["", f"{sum(float(line[6]) for line in lines):.1f}"]
                    if top:
                        # Without rates by what is moved.
                        lines.sort(key=lambda line: -float(line[6] or line[3]))
                        lines = lines[:top]
                    print(markdown(ROOFLINE, [*(lines if steps else []), last]), flush=True)


# -- the command line --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except EdgecError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def _known(names: Sequence[str] | Mapping[str, Any], known: Sequence[str], option: str) -> list[str]:
    """`names`. Raises EdgecError for one that is not among `known`."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise EdgecError(f"'{unknown[0]}' is not known", where=option, hint=f"use {', '.join(known)}")
    return list(names)


def _gpus(names: Sequence[str]) -> list[str]:
    """`names`. Raises EdgecError for one that is no GPU, or of which only source is made."""
    from edgec.targets.device import load_device

    for name in names:
        if load_device(name).api not in ("opencl", "vulkan"):
            raise EdgecError(f"'{name}' is not a GPU whose code runs here", where="--device")
    return list(names)


if __name__ == "__main__":
    app()
