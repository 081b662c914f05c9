"""The bundle: a folder with the compiled model, its C interface and a manifest, and how to run it from Python.

Loading and running a bundle needs neither torch nor TVM.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.lowering.lower import Lowered
    from edgec.plan import Form, Plan, Port
    from edgec.targets.cpu.emit import Kernels, SelfTest
    from edgec.targets.device import Device
    from edgec.targets.mcu.runner import Measurement

SCHEMA = 1
MANIFEST = "manifest.json"
# What `Bundle` reads; a manifest without one of these is corrupt.
REQUIRED = ("name", "target", "triple", "cpu", "runner", "inputs", "outputs", "arena_bytes", "arena_align", "files")
SYSTEM_LIBRARIES = ("libc.so.", "libm.so.", "libpthread.so.", "ld-linux")
# More than the C library ever uses, and still an int there.
MAX_THREADS = 1024
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class Bundle:
    """A compiled model on disk. `manifest` is plain data (see docs/guide/bundle.md)."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.threads = int(manifest.get("threads", 1))
        self.emulate = False
        self._function: Callable[..., int] | None = None
        self._library: ctypes.CDLL | None = None
        self._gpu: Any = None
        self._opening = threading.Lock()
        self._thread = threading.local()

    @staticmethod
    def load(path: str | Path) -> Bundle:
        """Open a bundle folder. Raises EdgecError when it is not one, or when a file is missing or was changed."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError as error:
            what = f"is not a bundle (no {MANIFEST})" if folder.is_dir() else "does not exist"
            raise EdgecError(what, where=str(folder), hint="give a folder made by edgec compile") from error
        except NotADirectoryError as error:
            raise EdgecError(
                "is a file, not a bundle", where=str(folder), hint="give a folder made by edgec compile"
            ) from error
        except OSError as error:
            raise EdgecError(f"cannot be read: {error.strerror}", where=str(folder / MANIFEST)) from error
        except ValueError as error:
            raise EdgecError(f"has a corrupt {MANIFEST}", where=str(folder), hint="compile the model again") from error
        if not isinstance(manifest, dict) or "schema" not in manifest:
            raise EdgecError(f"has a corrupt {MANIFEST}", where=str(folder), hint="compile the model again")
        if manifest["schema"] != SCHEMA:
            raise EdgecError(
                f"has schema {manifest['schema']}, this edgec reads {SCHEMA}",
                where=str(folder),
                hint="compile the model again",
            )
        absent = [key for key in REQUIRED if key not in manifest]
        if absent:
            raise EdgecError(
                f"has a corrupt {MANIFEST} (no {absent[0]})", where=str(folder), hint="compile the model again"
            )
        for name, digest in manifest["files"].items():
            file = folder / name
            if not file.is_file() or _digest(file) != digest:
                what = "is missing" if not file.is_file() else "was changed after the compile"
                raise EdgecError(f"file {name} {what}", where=str(folder), hint="compile the model again")
        return Bundle(folder, manifest)

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def runner(self) -> str:
        """Where it runs: "native", or the emulator."""
        return "native" if self.is_mcu and not self.emulate else self.manifest["runner"]

    @property
    def is_mcu(self) -> bool:
        """Whether it is C source for a microcontroller."""
        return "flash_bytes" in self.manifest

    @property
    def is_gpu(self) -> bool:
        """Whether it is for a GPU."""
        return "api" in self.manifest

    def use_board(self) -> None:
        """Run a microcontroller's code in the emulator of its board from now on; EdgecError for other bundles."""
        if not self.is_mcu:
            raise EdgecError("is not for a microcontroller", where=f"bundle {self.name}", hint="leave out --on-board")
        self.emulate = True

    def use_threads(self, threads: int) -> None:
        """Run every sample on so many threads from now on; at first it is the number given to the compile.

        The C library takes no more of them than there are CPUs. Not while another thread runs this Bundle. Raises
        EdgecError for less than 1.
        """
        if threads < 1:
            raise EdgecError(f"cannot run on {threads} threads", where=f"bundle {self.name}")
        self.threads = threads
        if self._library is not None:
            self._set_threads(self._library)

    def run(self, *inputs: np.ndarray) -> Any:
        """Run the model on a batch: one array [n, ...] per input; the result is an array, or a tuple of them.

        Native bundles run in this process, on the arrays' own memory where type and layout fit; others run in the
        emulator named in the manifest. Those of microcontrollers run in this process too, compiled from their sources
        for this machine, unless `emulate` is set: integers are the same bits either way. Those for GPUs run on the
        first OpenCL or Vulkan device of this machine, one thread at a time. Each thread has an arena of its own, so
        threads may share a Bundle. Raises EdgecError for wrong numbers, shapes or types; a type may differ in size only
        (float64 for float32). Raises ToolchainMissing without such a device.
        """
        arrays = self._prepared(inputs)
        here = self.manifest["runner"] == "native" or (self.is_mcu and not self.emulate)
        run = self._run_gpu if self.is_gpu else self._run_native if here else self._run_emulated
        results = run(arrays)
        results = [_converted(r, p, False) for r, p in zip(results, self.manifest["outputs"], strict=True)]
        results = [_joined(r, tuple(o["shape"])) for r, o in zip(results, self.manifest["outputs"], strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    def _prepared(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inputs as the code takes them: [runs, *shape of one run on the device], aligned and contiguous."""
        pairs = zip(self._check(inputs), self.manifest["inputs"], strict=True)
        return [_converted(a, p, True) for a, p in pairs]

    def measure(self, *inputs: np.ndarray) -> Measurement:
        """Exact instruction counts and memory of one inference on QEMU's board, for a microcontroller.

        inputs: as for `run`, of one sample. Raises EdgecError for other bundles, ToolchainMissing without emulator.
        """
        from edgec.targets.mcu.runner import measure

        if not self.is_mcu:
            raise EdgecError("is not for a microcontroller", where=f"bundle {self.name}")
        return measure(self, [a[0] for a in self._prepared(inputs)], self.device())

    def selftest(self) -> bool:
        """Run the built-in sample and compare with the built-in result.

        Raises EdgecError when there is none, or when the program does not run to its end.
        """
        from edgec.targets.cpu.runner import execute

        if self.manifest.get("selftest") is None:
            raise EdgecError("has no self-test", where=f"bundle {self.name}")
        if self.is_mcu:
            from edgec.targets.mcu.runner import program_of, selftest

            return selftest(program_of(self), self.device())
        if self.is_gpu:
            return self._selftest_gpu()
        self._check_machine()
        program = (self.path / "bin" / "runner").absolute()
        command = [*self._prefix(), str(program), "--selftest"]
        if self.threads > 1:
            command.append(str(min(self.threads, MAX_THREADS)))
        status, text = execute(command, self.manifest.get("runner_package"))
        if status not in (0, 3):
            raise EdgecError(f"ended with status {status}: {text}", where=f"self-test of bundle {self.name}")
        return status == 0

    def _check(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The inputs as the model has them: [runs, *shape of one run], aligned and contiguous."""
        specs = self.manifest["inputs"]
        if len(inputs) != len(specs):
            raise EdgecError(f"takes {len(specs)} inputs, got {len(inputs)}", where=f"bundle {self.name}")
        arrays = []
        for value, spec in zip(inputs, specs, strict=True):
            array, wanted, dtype = np.asarray(value), tuple(spec["shape"]), np.dtype(spec["dtype"])
            where = f"input '{spec['name']}' of bundle {self.name}"
            if array.ndim != len(wanted) or array.shape[1:] != wanted[1:]:
                expected = ", ".join(map(str, ("n", *wanted[1:]) if wanted else ()))
                raise EdgecError(f"has shape {array.shape}, expected ({expected})", where=where)
            widened = array.dtype.kind + dtype.kind == "ui" and np.can_cast(array.dtype, dtype)
            if array.dtype.kind != dtype.kind and not widened:
                raise EdgecError(
                    f"has dtype {array.dtype}, expected {dtype}",
                    where=where,
                    hint="prepare the data as for the original model and convert it",
                )
            # The model is compiled for a batch of `wanted[0]`.
            if wanted and array.shape[0] % wanted[0]:
                raise EdgecError(f"has {array.shape[0]} samples, the model takes {wanted[0]} at a time", where=where)
            arrays.append(np.require(array, dtype, ("C", "A")).reshape(-1, *wanted))
        if len({len(a) for a in arrays}) > 1:
            raise EdgecError("inputs have different numbers of samples", where=f"bundle {self.name}")
        return arrays

    def _run_native(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        run = self._open()
        count = len(arrays[0])
        ports = [o.get("device") or o for o in self.manifest["outputs"]]
        outputs = [np.empty((count, *o["shape"]), o["dtype"]) for o in ports]
        arena = self._arena()
        memory = [(a.ctypes.data, a[:1].nbytes) for a in (*arrays, *outputs)]
        for i in range(count):
            status = run(*[start + i * size for start, size in memory], arena)
            if status:
                raise EdgecError(f"{self.name}_run returned {status}", where=f"bundle {self.name}")
        return tuple(outputs)

    def _run_gpu(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        from edgec.targets.gpu import runner

        ports = [o.get("device") or o for o in self.manifest["outputs"]]
        with self._opening:
            if self._gpu is None:
                self._gpu = runner.open_runner(self.path, self.manifest["api"])
            return runner.run_samples(self._gpu, arrays, [(tuple(o["shape"]), o["dtype"]) for o in ports])

    def _selftest_gpu(self) -> bool:
        """OpenCL: by the C host of the bundle. Vulkan: as `run` does it."""
        from edgec.targets.gpu import runner
        from edgec.targets.gpu.emit import SELFTEST

        if self.manifest["api"] == "opencl":
            return runner.host_selftest(self.path, self.name)
        data, at = (self.path / SELFTEST).read_bytes(), 0
        arrays = []
        for port in (*self.manifest["inputs"], *self.manifest["outputs"]):
            form = port.get("device") or port
            size = int(np.prod(form["shape"])) * np.dtype(form["dtype"]).itemsize
            arrays.append(np.frombuffer(data[at : at + size], form["dtype"]).reshape(form["shape"]))
            at += size
        count = len(self.manifest["inputs"])
        results = self._run_gpu([a[None] for a in arrays[:count]])
        tolerance = self.manifest["selftest"]["tolerance"]
        return all(_agree(got[0], want, tolerance) for got, want in zip(results, arrays[count:], strict=True))

    def _arena(self) -> int:
        """Address of this thread's arena."""
        align = self.manifest["arena_align"]
        memory = getattr(self._thread, "memory", None)
        if memory is None:
            memory = self._thread.memory = np.empty(self.manifest["arena_bytes"] + align, np.uint8)
        return -(-memory.ctypes.data // align) * align

    def _open(self) -> Callable[..., int]:
        """The C function."""
        with self._opening:
            if self._function is None:
                self._check_machine()
                self._library, self._function = self._load()
                if self.threads > 1:
                    self._set_threads(self._library)
        return self._function

    def _load(self) -> tuple[ctypes.CDLL, Callable[..., int]]:
        file = (self.path / "lib" / f"lib{self.name}.so").absolute()
        try:
            # The loader takes a path it has seen before for the file it has loaded: go by a new name, so that a bundle
            # that was compiled again in its old place is not the old one.
            with tempfile.TemporaryDirectory(prefix="edgec-load-") as folder:
                link = Path(folder) / file.name
                if self.is_mcu:
                    from edgec.targets.mcu.build import host_library

                    link.write_bytes(host_library(self.path, self.name))
                else:
                    link.symlink_to(file)
                library = ctypes.CDLL(str(link))
                function = library[f"{self.name}_run"]
        except (OSError, AttributeError) as error:
            raise EdgecError(f"does not load: {error}", where=str(file)) from error
        pointers = len(self.manifest["inputs"]) + len(self.manifest["outputs"]) + 1
        function.argtypes, function.restype = [ctypes.c_void_p] * pointers, ctypes.c_int
        return library, function

    def _set_threads(self, library: ctypes.CDLL) -> None:
        status = library[f"{self.name}_set_threads"](min(self.threads, MAX_THREADS))
        if status:
            raise EdgecError(f"{self.name}_set_threads returned {status}", where=f"bundle {self.name}")

    def _check_machine(self) -> None:
        """Raise EdgecError when a native bundle was compiled for another kind of machine."""
        if self.manifest["runner"] != "native":
            return
        here = platform.machine().lower()
        here, built = ARCHITECTURES.get(here, here), self.manifest["triple"].split("-")[0]
        if built != here:
            raise EdgecError(f"is compiled for {built}, this machine is {here}", where=f"bundle {self.name}")
        from edgec.targets.device import load_device

        machine = load_device("host")
        levels = [cpu.removeprefix("x86-64-v") for cpu in (self.manifest["cpu"], machine.mcpu)]
        missing = sorted(set(self.manifest.get("features", ())) - set(machine.features))
        if all(level.isdigit() for level in levels) and int(levels[0]) > int(levels[1]):
            missing.insert(0, self.manifest["cpu"])
        if missing:
            raise EdgecError(
                f"uses instructions of {', '.join(missing)}, which this machine does not have",
                where=f"bundle {self.name}",
                hint="compile the model on this machine",
            )

    def device(self) -> Device:
        """The target it was compiled for. Raises EdgecError when this edgec does not know it."""
        from edgec.registry import get_device

        return get_device(self.manifest["target"])

    def _run_emulated(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        if self.is_mcu:
            from edgec.targets.mcu import runner

            ports = [o.get("device") or o for o in self.manifest["outputs"]]
            results = [(tuple(o["shape"]), o["dtype"]) for o in ports]
            return runner.run_samples(runner.program_of(self), self.device(), arrays, results)
        from edgec.targets.cpu.runner import run_samples

        outputs = [(tuple(o["shape"]), o["dtype"]) for o in self.manifest["outputs"]]
        package = self.manifest.get("runner_package")
        program = self.path / "bin" / "runner"
        return run_samples(program, self._prefix(), arrays, outputs, package, min(self.threads, MAX_THREADS))

    def _prefix(self) -> list[str]:
        from edgec.targets.cpu.runner import command_prefix

        return command_prefix(self.manifest["runner"], self.manifest.get("qemu_cpu"))


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle made by `edgec compile` (see `Bundle.load`)."""
    return Bundle.load(path)


def build_bundle(
    lowered: Lowered,
    device: Device,
    directory: str | Path,
    *,
    selftest: SelfTest | None = None,
    meta: Mapping[str, Any] | None = None,
    threads: int = 1,
    force: bool = False,
) -> Bundle:
    """Emit, compile and lay out the bundle in `directory`, which must not exist or be empty.

    selftest: sample and expected result that are built in; without it there is no self-test. meta: plain data for the
    manifest. threads: what header and manifest advise, and `Bundle.run` uses. force: replace a bundle that is there.
    Raises EdgecError or ToolchainMissing; nothing is left behind then.
    """
    if device.is_mcu:
        return _assemble_mcu(lowered, device, directory, selftest, meta, force)
    if device.is_gpu:
        return _assemble_gpu(lowered, device, directory, selftest, meta, force)
    from edgec.targets.codegen import LoweredKernels, build_objects

    assert isinstance(lowered.kernels, LoweredKernels)
    objects = list(build_objects(lowered.kernels, device).values())
    return assemble(
        lowered.plan, lowered.kernels, objects, device, directory, selftest, meta, threads=threads, force=force
    )


def assemble(
    plan: Plan,
    kernels: Kernels,
    kernel_objects: Sequence[bytes],
    device: Device,
    directory: str | Path,
    selftest: SelfTest | None = None,
    meta: Mapping[str, Any] | None = None,
    *,
    threads: int = 1,
    force: bool = False,
) -> Bundle:
    """`build_bundle` for given objects of kernels, which `kernels` describes (see `LoweredKernels`)."""
    from edgec import __version__
    from edgec.targets.cpu.emit import emit, members
    from edgec.targets.cpu.toolchain import build_library, require_toolchain

    target = Path(directory)
    refuse_existing(target, force)
    require_toolchain(device)
    files = emit(plan, kernels, device, selftest, __version__, threads)
    with staging(target) as folder:
        work, bundle = folder / "build", folder / "bundle"
        (work / "obj").mkdir(parents=True)
        for name, data in files.items():
            (work / name).write_bytes(data)
        for number, data in enumerate(kernel_objects):
            (work / "obj" / f"kernel{number:04}.o").write_bytes(data)
        build_library(work, plan.name, device, members(plan.name, selftest is not None))
        places = {
            f"include/{plan.name}.h": f"{plan.name}.h",
            f"lib/lib{plan.name}.a": f"lib{plan.name}.a",
            f"lib/lib{plan.name}.so": f"lib{plan.name}.so",
            f"cmake/{plan.name}-config.cmake": f"{plan.name}-config.cmake",
            "src/model.c": "model.c",
            "src/threads.c": "threads.c",
            "src/example.c": "example.c",
            "src/runner.c": "runner.c",
            "bin/runner": "runner",
            "weights.bin": "weights.bin",
        }
        for place, source in places.items():
            (bundle / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / source, bundle / place)
        library = bundle / "lib" / f"lib{plan.name}.so"
        facts = {
            "code_bytes": text_bytes(library),
            "threads": threads,
            "symbols": list(verify_freestanding(library)),
        }
        return _installed(bundle, target, _manifest(plan, device, selftest, meta, bundle, facts))


def _assemble_mcu(
    lowered: Lowered,
    device: Device,
    directory: str | Path,
    selftest: SelfTest | None,
    meta: Mapping[str, Any] | None,
    force: bool,
) -> Bundle:
    """The bundle of a microcontroller: sources; `selftest` is in the model's own form."""
    from edgec import __version__
    from edgec.targets.mcu.build import build
    from edgec.targets.mcu.lower import LoweredC

    plan, target = lowered.plan, Path(directory)
    assert isinstance(lowered.kernels, LoweredC)
    refuse_existing(target, force)
    if selftest is not None:
        given = [_to_device(p, a) for p, a in zip(plan.inputs, selftest.inputs, strict=True)]
        wanted = [_to_device(p, a) for p, a in zip(plan.outputs, selftest.outputs, strict=True)]
        selftest = type(selftest)(given, wanted, selftest.tolerance)
    with staging(target) as folder:
        bundle = folder / "bundle"
        bundle.mkdir()
        flash = build(plan, lowered.kernels, device, bundle, selftest, __version__)
        facts = {
            "code_bytes": flash - plan.weight_bytes,
            "flash_bytes": flash,
            "threads": 1,
            "steps": _steps(plan),
        }
        return _installed(bundle, target, _manifest(plan, device, selftest, meta, bundle, facts))


def _assemble_gpu(
    lowered: Lowered,
    device: Device,
    directory: str | Path,
    selftest: SelfTest | None,
    meta: Mapping[str, Any] | None,
    force: bool,
) -> Bundle:
    """The bundle of a GPU: kernels as text, the plan as data and, for OpenCL, a host in C."""
    from edgec import __version__
    from edgec.targets.gpu.document import pooled
    from edgec.targets.gpu.emit import emit
    from edgec.targets.gpu.lower import LoweredGpu

    plan, target = lowered.plan, Path(directory)
    assert isinstance(lowered.kernels, LoweredGpu)
    refuse_existing(target, force)
    files = emit(plan, lowered.kernels, device, selftest, __version__)
    with staging(target) as folder:
        bundle = folder / "bundle"
        for place, data in files.items():
            (bundle / place).parent.mkdir(parents=True, exist_ok=True)
            (bundle / place).write_bytes(data)
        facts = {
            "api": device.api,
            "code_bytes": lowered.kernels.bytes_of_text(device),
            "pool_bytes": sum(pooled(plan)[1]),
            "threads": 1,
            "steps": _steps(plan),
        }
        return _installed(bundle, target, _manifest(plan, device, selftest, meta, bundle, facts))


def _steps(plan: Plan) -> list[dict[str, Any]]:
    """What each call of the plan is, for counts and times by layer."""
    return [{"layer": step.layer, "op": step.op, "macs": step.macs} for step in plan.steps]


def _installed(staged: Path, target: Path, manifest: dict[str, Any]) -> Bundle:
    """The bundle in the folder `staged`, with its manifest, moved to its place."""
    _write_manifest(staged, manifest)
    install(staged, target)
    return Bundle(target, manifest)


def _agree(got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    """Whether a result is as expected: see `SelfTest`."""
    if tolerance == 0 or want.dtype.kind != "f":
        return np.array_equal(got, want)
    scale = float(np.abs(want).max(initial=0.0)) or 1.0
    return bool(np.abs(got.astype(np.float64) - want).max(initial=0.0) <= tolerance * scale)


def _to_device(port: Port, array: np.ndarray) -> np.ndarray:
    return np.asarray(array) if port.form is None else np.ascontiguousarray(port.form.to_device(np.asarray(array)))


def _manifest(
    plan: Plan,
    device: Device,
    selftest: SelfTest | None,
    meta: Mapping[str, Any] | None,
    bundle: Path,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """What is known of a bundle whose files lie in the folder `bundle`. facts: further entries."""
    from edgec import __version__

    files = sorted(str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file())
    return {
        "schema": SCHEMA,
        "edgec": __version__,
        "name": plan.name,
        "target": device.name,
        "triple": device.triple,
        "cpu": device.mcpu,
        "features": list(device.features),
        "runner": device.runner,
        "qemu_cpu": device.qemu_cpu,
        "runner_package": device.runner_package,
        "inputs": [_port(p) for p in plan.inputs],
        "outputs": [_port(p) for p in plan.outputs],
        "arena_bytes": plan.arena_bytes,
        "arena_align": plan.arena_align,
        "arena_lower_bound": plan.arena_lower_bound,
        "weight_bytes": plan.weight_bytes,
        "macs": plan.macs,
        "selftest": None if selftest is None else {"tolerance": float(selftest.tolerance)},
        **facts,
        "meta": dict(meta or {}),
        "files": {place: _digest(bundle / place) for place in files},
    }


def seal(path: str | Path, names: Sequence[str], facts: Mapping[str, Any] | None = None) -> None:
    """Put the digests of further files of a bundle (`names`, relative to it) into its manifest, and `facts`.

    From then on the bundle does not load when one of them is missing or changed.
    """
    folder = Path(path)
    manifest = json.loads((folder / MANIFEST).read_text())
    files = manifest.pop("files")
    manifest.update(facts or {}, files=files)
    manifest["files"] = dict(sorted({**manifest["files"], **{n: _digest(folder / n) for n in names}}.items()))
    _write_manifest(folder, manifest)


def refuse_existing(target: Path, force: bool) -> None:
    """Raise EdgecError unless a bundle may be written to `target`: nothing or an empty folder is there.

    With `force` a bundle may be there; anything else is never replaced.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise EdgecError("output exists", where=str(target), hint="choose another folder or give --force")
    if not (target / MANIFEST).is_file():
        raise EdgecError("output exists and is not a bundle", where=str(target), hint="--force only replaces bundles")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed at the end whatever happens, as are parent folders made for it.

    Turns a full disk into one clear line.
    """
    parent = target.absolute().parent
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    try:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=parent) as folder:
                yield Path(folder)
        except BaseException:
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EdgecError("no space left on the disk", where=str(parent), hint="free some space") from error
        raise EdgecError(f"cannot be written: {error.strerror or error}", where=str(target)) from error


def install(staged: Path, target: Path) -> None:
    """Move a finished bundle from its staging folder to its place; a bundle that is there goes only if that works."""
    old = staged.with_name(f"{staged.name}-replaced")
    if target.is_dir() and any(target.iterdir()):
        target.rename(old)
    try:
        staged.rename(target)
    except BaseException:
        if old.is_dir():
            old.rename(target)
        raise


def text_bytes(path: Path) -> int:
    """Bytes of executable code in an ELF file."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        flag = 0x4  # SHF_EXECINSTR
        return sum(s["sh_size"] for s in ELFFile(file).iter_sections() if s["sh_flags"] & flag)


def verify_freestanding(path: str | Path) -> tuple[str, ...]:
    """The functions that a shared library takes from elsewhere, sorted.

    Raises EdgecError when one of them is not versioned by the C or the mathematics library, so comes from somewhere
    else, or when another library is needed.
    """
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
    from elftools.elf.sections import SymbolTableSection

    with Path(path).open("rb") as file:
        sections = list(ELFFile(file).iter_sections())
        tags = [t for s in sections if isinstance(s, DynamicSection) for t in s.iter_tags()]
        libraries = {t.needed for t in tags if t.entry.d_tag == "DT_NEEDED"}  # type: ignore[attr-defined]
        needs = [s for s in sections if isinstance(s, GNUVerNeedSection)]
        origin = {
            auxiliary["vna_other"]: version.name
            for section in needs
            for version, auxiliaries in section.iter_versions()
            for auxiliary in auxiliaries
        }
        versions = [v["ndx"] for s in sections if isinstance(s, GNUVerSymSection) for v in s.iter_symbols()]
        (table,) = [s for s in sections if isinstance(s, SymbolTableSection) and s.name == ".dynsym"]
        undefined = {
            symbol.name: origin.get(versions[i] if versions else None, "")
            for i, symbol in enumerate(table.iter_symbols())
            if symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_WEAK" and symbol.name
        }
    libraries |= set(undefined.values())
    foreign = sorted(x for x in libraries if x and not x.startswith(SYSTEM_LIBRARIES))
    if foreign:
        raise EdgecError(f"needs {', '.join(foreign)}", where=str(path), hint="this is a bug in edgec")
    unknown = sorted(name for name, library in undefined.items() if not library)
    if unknown:
        raise EdgecError(f"expects {', '.join(unknown)} from nowhere", where=str(path), hint="this is a bug in edgec")
    return tuple(sorted(undefined))


def _converted(array: np.ndarray, port: Mapping[str, Any], to_device: bool) -> np.ndarray:
    """An array [runs, *shape] in the device's form of a port, or back in the model's."""
    form = _form(port)
    if form is None:
        return array
    return np.require(form.to_device(array), None, ("C", "A")) if to_device else form.to_model(array)


def _joined(result: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[runs, *shape] as one batch."""
    if not shape:
        return result.reshape(()) if len(result) == 1 else result
    return result.reshape(len(result) * shape[0], *shape[1:])


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _port(port: Port) -> dict[str, Any]:
    """The port as the model has it; what it is on the device goes under "device" where that is something else."""
    own = {"name": port.name, "shape": list(port.shape), "dtype": port.dtype}
    form = port.form
    if form is None:
        return own
    device = {
        "shape": list(port.shape),
        "dtype": port.dtype,
        "axes": None if form.axes is None else list(form.axes),
        "scale": form.scale,
        "zero_point": form.zero_point,
    }
    return {"name": port.name, "shape": list(form.shape), "dtype": form.dtype, "device": device}


def _form(port: Mapping[str, Any]) -> Form | None:
    """The form of a port of the manifest."""
    from edgec.plan import Form

    device = port.get("device")
    if device is None:
        return None
    axes = None if device["axes"] is None else tuple(device["axes"])
    return Form(tuple(port["shape"]), port["dtype"], axes, device["scale"], device["zero_point"])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
