"""The command line. Each command is one call of a Python function and a way to print what it returns.

Data goes to stdout, messages and progress to stderr. Exit codes: 0 done, 1 gate failed, 2 bad input or option,
3 tool chain or emulator missing, 70 a bug, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from edgec import console
from edgec.errors import EXIT_INPUT, EdgecError

EXIT_INTERNAL = 70
DEBUG = "EDGEC_DEBUG"

app = typer.Typer(
    name="edgec",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Put PyTorch models on edge devices, and check accuracy after every step.",
)


class OnFail(StrEnum):
    """What happens to a pass that loses more than --max-drop allows."""

    error = "error"
    revert = "revert"
    relax = "relax"


# -- options that several commands have --------------------------------------------------------------------------------


def _numbers(text: str | None, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """`0.5,0.5,0.5` as numbers."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise EdgecError(f"'{text}' is not a list of {what}", where=option, hint="write them as 1,2,3") from None


def _shape(text: str | None) -> tuple[int, ...] | None:
    return _numbers(text, "--input-shape", int)


def _complete_passes(incomplete: str) -> list[str]:
    from edgec.registry import pass_entries

    return [name for name in pass_entries() if name.startswith(incomplete)]


def _complete_targets(incomplete: str) -> list[str]:
    from edgec.registry import device_entries

    return [name for name in device_entries() if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A .pt2 or .onnx file, path/to/file.py:factory or package.module:factory."),
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by `edgec compile -o`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]
Mean = Annotated[str | None, typer.Option(help="Per channel, after the scale: 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(help="Per channel: 0.229,0.224,0.225.")]
InputScale = Annotated[
    float | None, typer.Option(help="Multiplies stored values before the mean (default: 1/255 for uint8, else 1).")
]
InputShape = Annotated[
    str | None,
    typer.Option(help="For factories without example inputs and open .onnx files, batch included: 1,3,224,224."),
]
Metric = Annotated[
    str | None, typer.Option(help="top1, top5, psnr{border=2}, sqnr, cosine, agreement or file.py:function.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


# -- commands ----------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print versions and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        from edgec import __version__

        console.print_line(f"edgec {__version__} (torch {installed('torch')}, TVM {installed('apache-tvm')})")
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print_line(context.get_help())


@app.command("compile")
def compile_command(
    model: Model,
    target: Annotated[
        str, typer.Option(help="Device to compile for; see `edgec targets`.", autocompletion=_complete_targets)
    ] = "host",
    data: Annotated[
        str | None, typer.Option(help="Calibration data: .npz, a folder of images, file.py:factory.")
    ] = None,
    eval: Annotated[str | None, typer.Option(help="Evaluation data, with labels where there are any.")] = None,
    mean: Mean = None,
    std: Std = None,
    input_scale: InputScale = None,
    passes: Annotated[str | None, typer.Option(help='A pipeline: "fold-bn, quantize-int8{observer=mse}".')] = None,
    recipe: Annotated[Path | None, typer.Option(help="A pipeline as a TOML file, instead of --passes.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest drop of the metric allowed, in points.")] = None,
    on_fail: Annotated[OnFail, typer.Option(help="What happens to a pass that drops more.")] = OnFail.error,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the bundle.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    metric: Metric = None,
    seed: Seed = 0,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Samples used for calibration.")] = 256,
    device_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples run through the code (default: all natively, 64 emulated).")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads the bundle is to run on, if its caller does not say otherwise.")
    ] = 1,
    input_shape: InputShape = None,
    stop_after: Annotated[str | None, typer.Option(help="Stop after this pass or lowering step.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Folder for the text form after each step.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in file names and C symbols.")] = None,
    tuning: Annotated[
        Path | None, typer.Option(help="A table of `edgec tune` (default: the file that EDGEC_TUNING names).")
    ] = None,
    sram: Annotated[
        str | None, typer.Option(help="SRAM of a microcontroller, like 320KiB (default: the board's).")
    ] = None,
    flash: Annotated[
        str | None, typer.Option(help="Flash of a microcontroller, like 1MiB (default: the board's).")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Make the model fit into --sram, without changing results.")
    ] = False,
    external_io: Annotated[
        bool, typer.Option("--external-io", help="Inputs and outputs lie in memory that --sram does not count.")
    ] = False,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="Leave model.onnx out of the bundle.")] = False,
    cross_check: Annotated[
        bool, typer.Option("--cross-check", help="Import by way of ONNX too, and compare the two.")
    ] = False,
    json: Json = False,
) -> None:
    """Compile a model, checking accuracy after every step."""
    from edgec.compile import compile_model
    from edgec.pipeline import Pipeline

    if passes is not None and recipe is not None:
        raise EdgecError("given together with --passes", where="--recipe", hint="use one of the two")
    if output is None and stop_after is None and dump is None:
        raise EdgecError("is missing", where="--output", hint="give -o FOLDER for the bundle")
    with console.progress() as progress:
        result = compile_model(
            model,
            target=target,
            output=output,
            passes=Pipeline.from_toml(recipe) if recipe is not None else passes or "",
            data=data,
            eval=eval,
            mean=_numbers(mean, "--mean", float),
            std=_numbers(std, "--std", float),
            input_scale=input_scale,
            metric=metric,
            max_drop=max_drop,
            on_fail=on_fail.value,
            name=name,
            input_shape=_shape(input_shape),
            force=force,
            seed=seed,
            calibration_samples=calibration_samples,
            device_samples=device_samples,
            threads=threads,
            stop_after=stop_after,
            dump=dump,
            tuning=tuning,
            sram=sram,
            flash=flash,
            fit=fit,
            external_io=external_io,
            onnx=not no_onnx,
            cross_check=cross_check,
            progress=progress,
        )
    if json:
        bundle = None if result.bundle is None else str(result.bundle.path)
        console.print_json({"bundle": bundle, **result.ledger.to_json()})
        return
    console.print_ledger(result.ledger)
    if result.bundle is not None:
        console.print_line(f"bundle  {result.bundle.path}")
        console.print_line(f"report  {result.bundle.path / 'report.html'}")
    elif dump is not None:
        console.print_line(f"stages  {dump}")


@app.command("run")
def run_command(
    bundle: BundlePath,
    eval: Annotated[str | None, typer.Option(help="Evaluation data; without it the self-test runs.")] = None,
    metric: Metric = None,
    mean: Mean = None,
    std: Std = None,
    input_scale: InputScale = None,
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many samples.")] = None,
    seed: Seed = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads for each sample (default: what it was compiled for).")
    ] = None,
    on_board: Annotated[
        bool,
        typer.Option("--on-board", help="Run a microcontroller's code on QEMU's board, and count."),
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    json: Json = False,
) -> None:
    """Run a bundle, natively or emulated: accuracy or self-test."""
    from edgec.bundle import load_bundle
    from edgec.execute import run_bundle, save_outputs, selftest

    loaded = load_bundle(bundle)
    if on_board:
        loaded.use_board()
    if threads is not None:
        loaded.use_threads(threads)
    if eval is None:
        if output is not None:
            raise EdgecError("needs --eval", where="--output", hint="give the data to run")
        selftest(loaded)
        if json:
            console.print_json({"bundle": loaded.name, "target": loaded.manifest["target"], "selftest": True})
        else:
            console.print_line(f"{loaded.name} on {loaded.manifest['target']}: self-test passed")
        return
    with console.progress() as progress:
        result = run_bundle(
            loaded,
            eval,
            metric=metric,
            mean=_numbers(mean, "--mean", float),
            std=_numbers(std, "--std", float),
            input_scale=input_scale,
            samples=samples,
            seed=seed,
            progress=progress,
        )
    if output is not None:
        save_outputs(result, output, [port["name"] for port in loaded.manifest["outputs"]])
    if json:
        console.print_json(result.to_json())
    else:
        if result.layers:
            console.print_rows(result.rows())
        console.print_line(result.text())


@app.command("tune")
def tune_command(
    model: Model,
    target: Annotated[
        str, typer.Option(help="Device to tune for; see `edgec targets`.", autocompletion=_complete_targets)
    ] = "host",
    passes: Annotated[str | None, typer.Option(help='A pipeline, as for `edgec compile`: "fold-bn".')] = None,
    data: Annotated[str | None, typer.Option(help="Calibration data (default: noise).")] = None,
    mean: Mean = None,
    std: Std = None,
    input_scale: InputScale = None,
    input_shape: InputShape = None,
    seconds_per_op: Annotated[float, typer.Option(min=0.01, help="Time for one kernel, compiling included.")] = 2.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Table to write; one that is there is extended.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure the register tiles of a model's kernels, for later compiles."""
    from edgec.tune import tune_model

    with console.progress() as progress:
        result = tune_model(
            model,
            target=target,
            passes=passes or "",
            data=data,
            mean=_numbers(mean, "--mean", float),
            std=_numbers(std, "--std", float),
            input_scale=input_scale,
            input_shape=_shape(input_shape),
            seconds_per_op=seconds_per_op,
            output=output,
            seed=seed,
            progress=progress,
        )
    if json:
        console.print_json(result.to_json())
        return
    console.print_rows(result.rows())
    console.print_line(result.text())
    if output is not None:
        console.print_line(f"table   {output}")


@app.command("inspect")
def inspect_command(model: Model, input_shape: InputShape = None, json: Json = False) -> None:
    """List a model's layers, costs and what becomes integer."""
    from edgec.inspect import inspect_model

    summary = inspect_model(model, input_shape=_shape(input_shape))
    if json:
        console.print_json(summary.to_json())
    else:
        console.print_summary(summary.to_json())


@app.command("passes")
def passes_command(
    name: Annotated[str | None, typer.Argument(help="A pass to describe.", autocompletion=_complete_passes)] = None,
    json: Json = False,
) -> None:
    """List the passes, or describe one with its options."""
    from edgec.listing import describe_pass, list_passes

    rows = list_passes() if name is None else describe_pass(name)
    if json:
        console.print_json(rows)
    elif isinstance(rows, list):
        console.print_rows(rows)
    else:
        console.print_pass(rows)


@app.command("targets")
def targets_command(
    name: Annotated[str | None, typer.Argument(help="A target to describe.", autocompletion=_complete_targets)] = None,
    json: Json = False,
) -> None:
    """List the targets, or describe one."""
    from edgec.listing import describe_target, list_targets

    rows = list_targets() if name is None else describe_target(name)
    if json:
        console.print_json(rows)
    elif isinstance(rows, list):
        console.print_rows(rows)
    else:
        console.print_record(rows)


@app.command("diff")
def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help="A model, a stage or a bundle; the reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A model, a stage or a bundle.")],
    data: Annotated[str | None, typer.Option(help="Samples to run both on (default: noise).")] = None,
    mean: Mean = None,
    std: Std = None,
    input_scale: InputScale = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples.")] = 8,
    input_shape: InputShape = None,
    json: Json = False,
) -> None:
    """Show the layers in which two models or bundles differ."""
    from edgec.data import Preprocess
    from edgec.diff import diff

    preprocess = Preprocess(_numbers(mean, "--mean", float), _numbers(std, "--std", float), input_scale)
    rows = diff(a, b, data, preprocess=preprocess, samples=samples, input_shape=_shape(input_shape))
    if json:
        console.print_json([console.finite(row.to_json()) for row in rows])
    else:
        console.print_rows([row.to_json() for row in rows])


@app.command("report")
def report_command(bundle: BundlePath, json: Json = False) -> None:
    """Print the report of a bundle."""
    from edgec.ledger import Ledger
    from edgec.report import read_report

    report = read_report(bundle)
    if json:
        console.print_json(report)
        return
    console.print_ledger(Ledger.from_json(report, str(bundle)))
    worst = sorted((r for r in report.get("sensitivity", []) if r["sqnr_db"] is not None), key=lambda r: r["sqnr_db"])
    if worst:
        console.print_rows(worst[:10], "layers furthest from the original")
    console.print_line(f"report  {Path(bundle) / 'report.html'}")


# -- errors ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code. Never raises, never prints a traceback
    unless EDGEC_DEBUG is set."""
    try:
        with _signals(), warnings.catch_warnings():
            # Deprecations inside torch and TVM say nothing to our users.
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            code = app(args=None if argv is None else list(argv), prog_name="edgec", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
    except _Stopped as stopped:
        return _fail("interrupted, nothing was written", 128 + stopped.number)
    except EdgecError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail("no space left on the disk; free some space", EXIT_INPUT)
        if isinstance(error, (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError)):
            return _fail(f"{error.filename or 'current folder'}: {error.strerror}", EXIT_INPUT)
        return _internal(error)
    except MemoryError:
        return _fail("out of memory; use a smaller model or batch", EXIT_INPUT)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer sees it first, and exits with 1
            return 128 + signal.SIGPIPE
        return error.code if isinstance(error.code, int) else EXIT_INPUT
    except Exception as error:
        # Usage errors of typer: no common class over its versions, but always these two.
        message, code = getattr(error, "format_message", None), getattr(error, "exit_code", EXIT_INPUT)
        if message is None:
            return _internal(error)
        return _fail(f"{_usage(error, message())}", code)


def _usage(error: Exception, message: str) -> str:
    """One line for a wrong option, with the command whose help lists the right ones."""
    line = " ".join(message.split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{line}; see {context.command_path} --help" if context is not None else line


def _fail(message: str, code: int) -> int:
    with suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
        if os.environ.get(DEBUG):
            traceback.print_exc()
    return code


def _internal(error: BaseException) -> int:
    line = " ".join(str(error).split())[:300]
    return _fail(
        f"internal error: {type(error).__name__}: {line}; this is a bug in edgec, {DEBUG}=1 shows where", EXIT_INTERNAL
    )


class _Stopped(BaseException):
    """Ctrl-C or a polite kill: unwinds the stack, so that temporary folders are removed."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `_Stopped`, once; a second one must not interrupt the cleaning up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {each: signal.signal(each, stop) for each in handled}
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
