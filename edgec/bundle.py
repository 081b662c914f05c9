"""The bundle: a folder with the compiled model, its C interface and a manifest, and how to run it from Python.

Loading and running a bundle needs neither torch nor TVM.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgec.errors import EdgecError

if TYPE_CHECKING:
    from edgec.lowering.lower import Lowered
    from edgec.plan import Port
    from edgec.targets.cpu.emit import SelfTest
    from edgec.targets.device import Device

SCHEMA = 1
# Files that are written after the code is checked; the digests of the manifest leave them out.
UNHASHED = ("manifest.json", "report.json", "report.html", "program.pt2")


class Bundle:
    """A compiled model on disk. `manifest` is plain data (see docs/guide/bundle.md)."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._library: ctypes.CDLL | None = None

    @staticmethod
    def load(path: str | Path) -> Bundle:
        """Open a bundle folder. Raises EdgecError when it is not one, or when a file is missing or was changed."""
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except OSError as error:
            raise EdgecError(
                "is not a bundle (no manifest.json)", where=str(folder), hint="give a folder made by edgec compile"
            ) from error
        except ValueError as error:
            raise EdgecError("has a corrupt manifest.json", where=str(folder), hint="compile the model again") from error
        if manifest.get("schema") != SCHEMA:
            raise EdgecError(
                f"has schema {manifest.get('schema')}, this edgec reads {SCHEMA}",
                where=str(folder),
                hint="compile the model again",
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

    def run(self, *inputs: np.ndarray) -> Any:
        """Run the model on a batch: one array [n, ...] per input; the result is an array, or a tuple of them.

        Native bundles run in this process, on the arrays' own memory where type and layout fit; others run in the
        emulator named in the manifest. Raises EdgecError for wrong numbers, shapes or types. Thread-safe.
        """
        arrays = self._check(inputs)
        results = self._run_native(arrays) if self.manifest["runner"] == "native" else self._run_emulated(arrays)
        return results[0] if len(results) == 1 else results

    def selftest(self) -> bool:
        """Run the built-in sample and compare with the built-in result."""
        from edgec.targets.cpu.runner import execute

        try:
            execute([*self._prefix(), str((self.path / "bin" / "runner").absolute()), "--selftest"])
        except EdgecError as error:
            if "ended with status 1" in str(error):
                return False
            raise
        return True

    def _check(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        specs = self.manifest["inputs"]
        if len(inputs) != len(specs):
            raise EdgecError(f"takes {len(specs)} inputs, got {len(inputs)}", where=f"bundle {self.name}")
        arrays = []
        for value, spec in zip(inputs, specs, strict=True):
            array = np.asarray(value)
            wanted = tuple(spec["shape"])
            if array.shape[1:] != wanted[1:] or array.ndim != len(wanted):
                raise EdgecError(
                    f"has shape {array.shape}, expected (n, {', '.join(map(str, wanted[1:]))})",
                    where=f"input '{spec['name']}' of bundle {self.name}",
                )
            if array.dtype != np.dtype(spec["dtype"]) and array.dtype.kind not in "fiu":
                raise EdgecError(
                    f"has dtype {array.dtype}, expected {spec['dtype']}",
                    where=f"input '{spec['name']}' of bundle {self.name}",
                )
            # The model is compiled for a batch of `wanted[0]`.
            if array.shape[0] % wanted[0]:
                raise EdgecError(
                    f"has {array.shape[0]} samples, the model takes {wanted[0]} at a time",
                    where=f"input '{spec['name']}' of bundle {self.name}",
                )
            arrays.append(np.ascontiguousarray(array, dtype=spec["dtype"]))
        if len({len(a) // s["shape"][0] for a, s in zip(arrays, specs, strict=True)}) > 1:
            raise EdgecError("inputs have different numbers of samples", where=f"bundle {self.name}")
        return arrays

    def _run_native(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        library = self._open()
        specs = self.manifest["inputs"]
        steps = [s["shape"][0] for s in specs]
        count = len(arrays[0]) // steps[0]
        outputs = [
            np.empty((count * o["shape"][0], *o["shape"][1:]), o["dtype"]) for o in self.manifest["outputs"]
        ]
        out_steps = [o["shape"][0] for o in self.manifest["outputs"]]
        align = self.manifest["arena_align"]
        memory = np.empty(self.manifest["arena_bytes"] + align, np.uint8)
        arena = -(-memory.ctypes.data // align) * align
        run = getattr(library, f"{self.name}_run")
        for i in range(count):
            pointers = [a[i * n : (i + 1) * n].ctypes.data for a, n in zip(arrays, steps, strict=True)]
            pointers += [o[i * n : (i + 1) * n].ctypes.data for o, n in zip(outputs, out_steps, strict=True)]
            status = run(*[ctypes.c_void_p(p) for p in (*pointers, arena)])
            if status:
                raise EdgecError(f"{self.name}_run returned {status}", where=f"bundle {self.name}")
        return tuple(outputs)

    def _open(self) -> ctypes.CDLL:
        if self._library is None:
            file = (self.path / "lib" / f"lib{self.name}.so").absolute()
            try:
                self._library = ctypes.CDLL(str(file))
            except OSError as error:
                raise EdgecError(f"does not load: {error}", where=str(file)) from error
        return self._library

    def _run_emulated(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        from edgec.targets.cpu.runner import run_samples

        specs = self.manifest["inputs"]
        grouped = [a.reshape(-1, *s["shape"]) for a, s in zip(arrays, specs, strict=True)]
        outputs = [(tuple(o["shape"]), o["dtype"]) for o in self.manifest["outputs"]]
        package = self.manifest.get("runner_package")
        results = run_samples(self.path / "bin" / "runner", self._prefix(), grouped, outputs, package)
        return tuple(r.reshape(-1, *r.shape[2:]) for r in results)

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
) -> Bundle:
    """Emit, compile and lay out the bundle in `directory`, which must not exist.

    selftest: sample and expected result that are built in; by default zeros, with whatever the code gives for them
    not checked. meta: plain data for the manifest. Raises EdgecError; nothing is left behind then.
    """
    from edgec.targets.codegen import build_object

    return assemble(
        lowered.plan, lowered.kernels, build_object(lowered.kernels, device), device, directory, selftest, meta
    )


def assemble(
    plan: Any,
    kernels: Any,
    kernel_object: bytes,
    device: Device,
    directory: str | Path,
    selftest: SelfTest | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Bundle:
    """`build_bundle` for a given kernel object; `kernels` has `signature` and `readonly` (see `LoweredKernels`)."""
    from edgec import __version__
    from edgec.targets.cpu.emit import SelfTest, emit
    from edgec.targets.cpu.toolchain import build_library, require_toolchain

    require_toolchain(device)
    target = Path(directory)
    if selftest is None:
        selftest = SelfTest(tuple(_zeros(p) for p in plan.inputs), tuple(_zeros(p) for p in plan.outputs), 0.0)
    with staging(target) as folder:
        work = folder / "build"
        work.mkdir()
        for name, data in emit(plan, kernels, device, selftest, __version__).items():
            (work / name).write_bytes(data)
        (work / "kernels.o").write_bytes(kernel_object)
        build_library(work, plan.name, device)
        bundle = folder / "bundle"
        places = {
            f"include/{plan.name}.h": f"{plan.name}.h",
            f"lib/lib{plan.name}.a": f"lib{plan.name}.a",
            f"lib/lib{plan.name}.so": f"lib{plan.name}.so",
            f"cmake/{plan.name}-config.cmake": f"{plan.name}-config.cmake",
            "src/example.c": "example.c",
            "src/runner.c": "runner.c",
            "bin/runner": "runner",
        }
        for place, source in places.items():
            (bundle / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(work / source, bundle / place)
        manifest = {
            "schema": SCHEMA,
            "edgec": __version__,
            "name": plan.name,
            "target": device.name,
            "triple": device.triple,
            "cpu": device.mcpu,
            "runner": device.runner,
            "qemu_cpu": device.qemu_cpu,
            "runner_package": device.runner_package,
            "inputs": [_port(p) for p in plan.inputs],
            "outputs": [_port(p) for p in plan.outputs],
            "arena_bytes": plan.arena_bytes,
            "arena_align": plan.arena_align,
            "arena_lower_bound": plan.arena_lower_bound,
            "weight_bytes": plan.weight_bytes,
            "code_bytes": text_bytes(bundle / "lib" / f"lib{plan.name}.so"),
            "macs": plan.macs,
            "meta": dict(meta or {}),
            "files": {place: _digest(bundle / place) for place in sorted(places)},
        }
        (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        bundle.rename(target)
    return Bundle(target, manifest)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, removed at the end whatever happens.

    Turns a full disk into one clear line.
    """
    parent = target.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=parent) as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EdgecError("no space left on the disk", where=str(parent), hint="free some space") from error
        raise EdgecError(f"cannot be written: {error.strerror or error}", where=str(target)) from error


def text_bytes(path: Path) -> int:
    """Bytes of executable code in an ELF file."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        flag = 0x4  # SHF_EXECINSTR
        return sum(s["sh_size"] for s in ELFFile(file).iter_sections() if s["sh_flags"] & flag)


def undefined_symbols(path: str | Path) -> set[str]:
    """Names that a bundle's shared library expects from the C library; TVM's would start with TVM."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    found = set()
    with Path(path).open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if isinstance(section, SymbolTableSection):
                found |= {s.name for s in section.iter_symbols() if s["st_shndx"] == "SHN_UNDEF" and s.name}
    return found


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "shape": list(port.shape), "dtype": port.dtype}


def _zeros(port: Port) -> np.ndarray:
    return np.zeros(port.shape, port.dtype)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
