"""TIR to objects: operators of TVM's library, scratch parameters, symbols, and properties of the machine code."""

from __future__ import annotations

import hashlib
import io
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from elftools.elf.elffile import ELFFile
from tvm import relax, tirx
from tvm.relax import op as R
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from edgec.errors import EdgecError
from edgec.targets import codegen
from edgec.targets.cache import ObjectCache
from edgec.targets.codegen import build_objects, lower_kernels, text_bytes, undefined_symbols
from edgec.targets.device import Device, load_device
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.eltwise import QAdd
from tests.targets.kernel_runner import Call, assert_close, require, run_calls

HOST = load_device("host")
CROSS = ("cortex-a53", "cortex-a55", "cortex-x2", "cortex-a7")
# What a bare C library offers; 32-bit Arm has its run-time helpers beside it.
LIBRARY = {
    "memcpy",
    "memset",
    "memmove",
    "expf",
    "exp",
    "erf",
    "logf",
    "powf",
    "sinf",
    "floorf",
    "roundf",
    "nearbyintf",
}
CONV = Conv2D(8, 8, 13, 24, (3, 3), (1, 1), (1, 1, 1, 1), dtype="int8", epilogue=Epilogue(lo=-128, hi=127))

# One C function: no padding and whole blocks of channels.
POINT = Conv2D(4, 4, 8, 32, dtype="int8", epilogue=Epilogue(lo=-128, hi=127))


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * gamma + beta


def doubled_linear(x: np.ndarray) -> np.ndarray:
    """Bilinear resize by two with half-pixel centres: weights 3/4 and 1/4, edges repeated."""
    for axis in (2, 3):
        near = np.repeat(x, 2, axis)
        before, after = np.roll(near, 1, axis), np.roll(near, -1, axis)
        far = np.where(
            np.arange(near.shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)]) % 2, after, before
        )
        first, last = [slice(None)] * 4, [slice(None)] * 4
        first[axis], last[axis] = slice(0, 1), slice(-1, None)
        far[tuple(first)], far[tuple(last)] = near[tuple(first)], near[tuple(last)]
        x = 0.75 * near + 0.25 * far
    return x


def doubled(x: relax.Var, method: str) -> Any:
    return R.image.resize2d(
        x,
        (2 * int(x.ty.shape[2]), 2 * int(x.ty.shape[3])),
        layout="NCHW",
        method=method,
        coordinate_transformation_mode="asymmetric" if method == "nearest_neighbor" else "half_pixel",
        rounding_method="floor" if method == "nearest_neighbor" else "",
    )


def thirds(x: relax.Var) -> Any:
    """Integer arithmetic in 64 bits, which 32-bit machines do in helper functions."""
    return R.astype(
        R.floor_divide(R.astype(R.multiply(x, relax.const(100.0)), "int64"), relax.const(3, "int64")), "float32"
    )


# name: (operator, its meaning in NumPy, input shapes)
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., np.ndarray], tuple[tuple[int, ...], ...]]] = {
    "softmax": (lambda x: R.nn.softmax(x, -1), softmax, ((2, 7, 33),)),
    "layer_norm": (lambda x, g, b: R.nn.layer_norm(x, g, b, axes=[-1]), layer_norm, ((2, 7, 33), (33,), (33,))),
    "matmul": (R.matmul, np.matmul, ((3, 17, 33), (3, 33, 9))),
    "gelu": (R.nn.gelu, lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))), ((3, 17),)),
    "erf": (R.erf, erf, ((3, 17),)),
    "erf64": (lambda x: R.astype(R.erf(R.astype(x, "float64")), "float32"), erf, ((3, 17),)),
    "tanh": (R.tanh, np.tanh, ((3, 17),)),
    "slice": (
        lambda x: R.strided_slice(x, [1, 2], [1, 0], [15, 30], [2, 3]),
        lambda x: x[:, 1:15:2, 0:30:3],
        ((3, 17, 33),),
    ),
    "concat": (lambda x, y: R.concat([x, y], 1), lambda x, y: np.concatenate([x, y], 1), ((3, 17, 33), (3, 2, 33))),
    "transpose": (lambda x: R.permute_dims(x, [0, 2, 1]), lambda x: x.transpose(0, 2, 1), ((3, 17, 33),)),
    "nearest": (
        lambda x: doubled(x, "nearest_neighbor"),
        lambda x: x.repeat(2, 2).repeat(2, 3),
        ((1, 3, 6, 7),),
    ),
    "linear": (lambda x: doubled(x, "linear"), doubled_linear, ((1, 3, 6, 7),)),
    "std": (lambda x: R.std(x, [1]), lambda x: x.std(1), ((3, 17, 33),)),
    "power": (lambda x: R.power(R.abs(x), relax.const(2.5)), lambda x: np.abs(x) ** 2.5, ((3, 17),)),
    "half": (
        lambda x: R.astype(R.astype(x, "float16"), "float32"),
        lambda x: x.astype(np.float16).astype(np.float32),
        ((3, 17),),
    ),
    "int64": (thirds, lambda x: np.floor(np.trunc(x * np.float32(100)) / 3), ((3, 17),)),
}


def tir(build: Callable[..., Any], *shapes: tuple[int, ...]) -> tirx.PrimFunc:
    """The one kernel that TVM's operator library makes of a Relax expression."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(build(*inputs)))
        builder.emit_func_output(result)
    transform = relax.transform
    steps = [transform.LegalizeOps(), transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR()]
    with tvm.target.Target("llvm"):
        module = tvm.ir.transform.Sequential([*steps, transform.DeadCodeElimination(["main"])])(builder.get())
    (function,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    return function


def library_calls() -> tuple[list[Call], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    calls, results = [], []
    for build, meaning, shapes in OPERATORS.values():
        inputs = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        results.append(np.ascontiguousarray(meaning(*inputs)).astype(np.float32))
        calls.append(Call(tir(build, *shapes), inputs, ((results[-1].shape, "float32"),)))
    return calls, results


@pytest.mark.host
def test_operator_library_on_the_host() -> None:
    calls, results = library_calls()
    for (got,), expected in zip(run_calls(calls, HOST), results, strict=True):
        assert_close(got, expected)


@pytest.mark.qemu
@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a7"))
def test_operator_library_emulated(name: str) -> None:
    """32-bit Arm calls helpers for 64-bit integers, which needs the right calling convention."""
    calls, results = library_calls()
    for (got,), expected in zip(run_calls(calls, load_device(name)), results, strict=True):
        assert_close(got, expected)


@pytest.mark.host
def test_scatter_with_parallel_loops_and_open_offsets() -> None:
    """TVM writes this operator with parallel loops, a pragma and buffers with symbolic offsets."""
    builder = relax.BlockBuilder()
    kinds = (((5, 7), "float32"), ((2, 7), "int64"), ((2, 7), "float32"))
    x, index, update = (relax.Var(f"x{i}", relax.TensorType(*kind)) for i, kind in enumerate(kinds))
    with builder.function("main", [x, index, update]):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(R.scatter_elements(x, index, update, 0)))
        builder.emit_func_output(result)
    with tvm.target.Target("llvm"):
        module = relax.transform.LegalizeOps()(builder.get())
    (function,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(5)[:2] for _ in range(7)], 1).astype(np.int64)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (2, 7)))
    expected = a.copy()
    np.put_along_axis(expected, rows, b, 0)
    call = Call(function, (a, rows, b), (((5, 7), "float32"),))
    np.testing.assert_array_equal(run_calls([call], HOST)[0][0], expected)


def kernels(device: Device) -> dict[str, tirx.PrimFunc]:
    functions = {f"k_{name}": tir(build, *shapes) for name, (build, _, shapes) in OPERATORS.items()}
    return {**functions, "k_conv": CONV.prim_func(device)}


def objects(device_name: str, **options: Any) -> tuple[dict[str, bytes], Any]:
    device = load_device(device_name)
    lowered = lower_kernels(tvm.IRModule(kernels(device)), device)
    return build_objects(lowered, device, **options), lowered


@pytest.mark.pure
@pytest.mark.parametrize("name", ("host", *CROSS))
def test_symbols(name: str) -> None:
    """Only the kernels are defined, hidden; only the C library is needed."""
    found, lowered = objects(name)
    for symbol, data in found.items():
        extra = {
            s
            for s in undefined_symbols(data) - LIBRARY
            if not s.startswith(("__aeabi_", "__gnu_", "__extendhf", "__trunc"))
        }
        assert not extra
        table = ELFFile(io.BytesIO(data)).get_section_by_name(".symtab")
        defined = {
            s.name: s["st_other"]["visibility"]
            for s in table.iter_symbols()
            if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["bind"] != "STB_LOCAL"
        }
        assert defined == {symbol: "STV_HIDDEN"}
    names = {f"k_{n}" for n in (*OPERATORS, "conv")}
    assert names == set(lowered.signature) == set(lowered.scratch) == set(lowered.readonly) == set(lowered.phases)
    assert list(found) == sorted(symbol for phases in lowered.phases.values() for symbol, _ in phases)


@pytest.mark.pure
def test_sizes() -> None:
    """Code size counts what is loaded, not symbols and notes."""
    data = objects("cortex-a72")[0]["k_matmul"]
    assert 100 < text_bytes(data) < len(data)


@pytest.mark.cross
@pytest.mark.parametrize("name", ("host", *CROSS))
def test_links_into_a_shared_library_without_text_relocations(name: str, tmp_path: Path) -> None:
    device = load_device(name)
    if shutil.which(device.cc) is None:
        pytest.skip(f"{device.cc} is not installed")
    files = []
    for symbol, data in objects(name)[0].items():
        files.append(tmp_path / f"{symbol}.o")
        files[-1].write_bytes(data)
    library = tmp_path / "k.so"
    command = [device.cc, *device.cflags, "-shared", "-Wl,-z,text", "-Wl,-z,defs", *map(str, files), "-o"]
    done = subprocess.run([*command, str(library), "-lm", "-lc"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = ELFFile(io.BytesIO(library.read_bytes())).get_section_by_name(".dynsym").iter_symbols()
    assert not [s.name for s in exported if s.name.startswith("k_")], "kernels of two bundles must not meet"


def digest(device_name: str) -> str:
    """Hash of freshly compiled kernels and of the keys they are cached under."""
    with tempfile.TemporaryDirectory() as folder:
        found, _ = objects(device_name, cache=ObjectCache(Path(folder)))
        keys = sorted(path.name for path in Path(folder).iterdir())
    assert len(keys) == len(found)
    return hashlib.sha256(repr((keys, found)).encode()).hexdigest()


@pytest.mark.pure
def test_same_kernels_give_the_same_bytes() -> None:
    """Also in another process, where hashes and addresses differ."""
    script = "from tests.targets.test_codegen import digest; print(digest('cortex-a72'))"
    here = digest("cortex-a72")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split()[-1] == here


@pytest.mark.pure
@pytest.mark.parametrize("name", ("cortex-a72", "cortex-a7"))
def test_cache_and_workers_change_no_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ObjectCache(tmp_path / "cache")
    one, _ = objects(name, cache=ObjectCache(None), workers=1)
    assert objects(name, cache=cache, workers=3)[0] == one
    compiled: list[Any] = []
    monkeypatch.setattr(codegen, "_compile", lambda *a: compiled.append(a))
    assert objects(name, cache=cache)[0] == one
    assert not compiled, "all are in the cache"
    # The name is no part of the key.
    again = {f"other_{symbol}": f for symbol, f in kernels(load_device(name)).items()}
    found = build_objects(lower_kernels(tvm.IRModule(again), load_device(name)), load_device(name), cache=cache)
    assert not compiled and list(found) == sorted(f"other_{symbol}" for symbol in one)
    for symbol, data in one.items():
        assert (
            ELFFile(io.BytesIO(found[f"other_{symbol}"]))
            .get_section_by_name(".symtab")
            .get_symbol_by_name(f"other_{symbol}")
        )
        assert text_bytes(found[f"other_{symbol}"]) == text_bytes(data)


@pytest.mark.pure
def test_what_the_cache_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other TIR, another device or another version of code generation is another file."""

    def compile_for(device: Device, spec: Conv2D) -> int:
        module = tvm.IRModule({"k": spec.prim_func(device)})
        build_objects(lower_kernels(module, device), device, cache=ObjectCache(tmp_path))
        return len(list(tmp_path.iterdir()))

    assert compile_for(HOST, POINT) == compile_for(HOST, POINT) == 1
    assert compile_for(load_device("cortex-a72"), POINT) == 2
    assert compile_for(load_device("cortex-a76"), POINT) == 3
    # The least difference that a float32 can have.
    limit = np.float32(6)
    for number, hi in enumerate((limit, np.nextafter(limit, np.float32(7))), start=4):
        spec = Conv2D(4, 4, 8, 32, epilogue=Epilogue("clip", lo=0.0, hi=float(hi)))
        assert compile_for(HOST, spec) == number
    monkeypatch.setattr(codegen, "GENERATION", codegen.GENERATION + 1)
    assert compile_for(HOST, POINT) == 6


@pytest.mark.pure
def test_a_failing_kernel_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(EdgecError, match="TVM runtime"):
        build_objects(lower_kernels(runtime_call(), HOST), HOST, cache=ObjectCache(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.pure
@pytest.mark.parametrize(("limit", "scratch"), [(256, (1600,)), (1600, (1600,)), (1601, (1600,))])
def test_large_buffers_become_parameters(limit: int, scratch: tuple[int, ...]) -> None:
    """SDOT takes four input channels: a padded copy of an 8 x 8 x 13 map has 10 * 10 * 16 bytes.

    One phase of the kernel leaves it to the next, so that it cannot lie on a thread's stack, however small it is.
    """
    device = load_device("cortex-a76")
    lowered = lower_kernels(tvm.IRModule({"k": CONV.prim_func(device)}), device, min_scratch=limit)
    assert lowered.scratch["k"] == scratch
    declared = ("int8", "int8", "int32", "int32", "int32", "int8")
    assert lowered.signature["k"] == declared + ("int8",) * len(scratch)
    assert lowered.readonly["k"] == {0, 1, 2, 3, 4}


@pytest.mark.pure
def test_only_kernels_that_work_in_place_may_alias() -> None:
    add = QAdd((64,), (64,), AddEpilogue(1, 1, 1, 0, 0, 0, -128, 127))
    lowered = lower_kernels(tvm.IRModule({"add": add.prim_func(HOST), "conv": CONV.prim_func(HOST)}), HOST)
    aliased = {(v.name_hint[:3], "tirx.noalias" not in f.attrs) for v, f in lowered.module.functions.items()}
    assert aliased == {("add", True), ("con", False)}


def runtime_call() -> tvm.IRModule:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("k")
        y = T.arg("y", T.buffer((1,), "int32"))
        T.buffer_store(y, T.call_extern("int32", "TVMBackendGetFuncFromEnv"), [0])
    return tvm.IRModule({"k": builder.get()})


@pytest.mark.pure
def test_runtime_calls_are_refused() -> None:
    with pytest.raises(EdgecError, match="kernels need the TVM runtime: TVMBackendGetFuncFromEnv"):
        build_objects(lower_kernels(runtime_call(), HOST), HOST)


@pytest.mark.cross
@pytest.mark.parametrize("name", ("cortex-a53", "cortex-a72", "cortex-a7"))
def test_integer_convolution_uses_vector_instructions(name: str, tmp_path: Path) -> None:
    """Multiply-add long in the inner loop; requantisation in vectors, without a call for its 64-bit arithmetic."""
    device = load_device(name)
    tool = device.cc.replace("gcc", "objdump")
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    lowered = lower_kernels(tvm.IRModule({"k": CONV.prim_func(device)}), device)
    symbol, _ = lowered.phases["k"][-1]
    data = build_objects(lowered, device)[symbol]
    assert {s.replace("__aeabi_", "") for s in undefined_symbols(data)} <= {"memcpy", "memset", "memclr"}
    (tmp_path / "k.o").write_bytes(data)
    text = subprocess.run([tool, "-d", str(tmp_path / "k.o")], capture_output=True, text=True, check=True).stdout
    operations = {line.split("\t")[2] for line in text.splitlines() if line.count("\t") >= 2}
    arm32 = {"vmlal.s16", "vmull.s32", "vrshl.s64", "vqmovn.s64"}
    assert (arm32 if device.is_arm32 else {"smlal", "smlal2", "sshl", "sqxtn"}) <= operations


@pytest.mark.pure
def test_require_names_the_missing_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(pytest.skip.Exception, match="cc is not installed"):
        require(HOST)
