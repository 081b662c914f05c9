"""Reading an .onnx file: weights from its own folder only, checked, shapes fixed, simplified.

Nothing in the file is run, and no file outside its folder is read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import TensorProto, helper, numpy_helper

from edgec.errors import EdgecError
from edgec.origin import first_line
from edgec.program import identify
from edgec.quiet import quiet

OLDEST_OPSET = 7
# A protocol buffer holds no more.
LARGEST_FILE = 2**31 - 1
QUANTIZED = re.compile(r"Quantize|^QLinear|Integer$|^QGemm")
OLDER_CONTAINER = 10
EXPORTS_BATCH = "batch"


@dataclass(frozen=True)
class OnnxInput:
    """name: as in the file; identifier: the same as a C and Python identifier. batch: dimension 0 may be any number;
    `shape` has 1 there then. dtype: of NumPy, as in the file."""

    name: str
    identifier: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    batch: bool


@dataclass
class OnnxModel:
    """A model that is ready to be translated. original: the bytes of the file with its weights, as it was; None when
    they exceed what a protocol buffer holds."""

    path: Path
    proto: onnx.ModelProto
    original: bytes
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    opsets: dict[str, int]
    notes: list[str] = field(default_factory=list)
    quantized: bool = False
    half: bool = False


def read_onnx(
    path: str | Path, input_shape: Sequence[int] | None = None, *, fixed: dict[str, np.ndarray] | None = None
) -> OnnxModel:
    """Read and prepare a model.

    input_shape: of the first input, batch included, where the file leaves dimensions open. fixed: values of inputs that
    become constants. Raises EdgecError, in one line, for what cannot be read.
    """
    path = Path(path)
    proto = _parse(path)
    _load_external(proto, path)
    opsets = _opsets(proto, path)
    # The version of the container says nothing of the operators, and engines refuse newer ones.
    proto.ir_version = min(proto.ir_version, OLDER_CONTAINER)
    original = proto.SerializeToString()
    with contextlib.suppress(Exception), quiet():
        # The checker wants to see shapes of outputs, which files need not have.
        proto = onnx.shape_inference.infer_shapes(proto)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise EdgecError(
            f"is not a valid ONNX model: {first_line(error)}", where=str(path), hint="export the model again"
        ) from error
    if proto.functions:
        with quiet():
            proto = onnx.inliner.inline_local_functions(proto)
    notes: list[str] = []
    for name, value in (fixed or {}).items():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        )
    inputs = _inputs(proto, path, input_shape)
    half = _uses_half(proto)
    if half:
        notes.append("float16 numbers of the file are computed in float32")
    quantized = any(QUANTIZED.search(node.op_type) for node in proto.graph.node)
    outputs = tuple(value.name for value in proto.graph.output)
    if not outputs:
        raise EdgecError("has no outputs", where=str(path), hint="export the model again")
    _fix_shapes(proto, inputs)
    with contextlib.suppress(Exception), quiet():
        # onnxsim wants to know at least the shapes of outputs.
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    proto = _simplified(proto, notes) if not quantized else proto
    return OnnxModel(path, proto, original, inputs, outputs, opsets, notes, quantized, half)


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        what = "is a folder, not a model" if path.is_dir() else "does not exist"
        raise EdgecError(what, where=str(path), hint="give an .onnx file")
    if path.stat().st_size > LARGEST_FILE:
        raise EdgecError("is larger than 2 GB, which no ONNX file is", where=str(path), hint="export the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:
        raise EdgecError(
            f"is not a readable ONNX file: {first_line(error)}", where=str(path), hint="export the model again"
        ) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise EdgecError("is not a readable ONNX file: it has no graph", where=str(path), hint="export the model again")
    return proto


def _opsets(proto: onnx.ModelProto, path: Path) -> dict[str, int]:
    opsets = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}
    newest = onnx.defs.onnx_opset_version()
    version = opsets.get("", newest)
    if not OLDEST_OPSET <= version <= newest:
        raise EdgecError(
            f"uses operator set {version}, edgec reads {OLDEST_OPSET} to {newest}",
            where=str(path),
            hint="convert it with onnx.version_converter, or export it again",
        )
    opsets[""] = version
    return opsets


# -- weights in files of their own -------------------------------------------------------------------------------------


def _load_external(proto: onnx.ModelProto, path: Path) -> None:
    """Read tensors that lie in other files, which must be in the model's folder, and not through links out of it."""
    folder = path.resolve().parent
    total = 0
    for tensor in _tensors(proto.graph, proto.functions):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entries = {e.key: e.value for e in tensor.external_data}
        data = _external_bytes(tensor, entries, folder, path)
        total += len(data)
        if total > LARGEST_FILE:
            raise EdgecError(
                "has more than 2 GB of weights", where=str(path), hint="edge devices hold less: give a smaller model"
            )
        tensor.raw_data = data
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def _external_bytes(tensor: TensorProto, entries: dict[str, str], folder: Path, path: Path) -> bytes:
    where = f"{path} (weight '{tensor.name}')"
    location = entries.get("location", "")
    file = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
        raise EdgecError(
            f"takes its data from '{location}', outside the model's folder",
            where=where,
            hint="put the file beside the model and save it with that location",
        )
    if not file.is_file():
        raise EdgecError(
            f"needs the file '{location}', which is not there", where=where, hint="copy it beside the model"
        )
    try:
        offset, size = int(entries.get("offset", 0)), file.stat().st_size
        length = int(entries.get("length", size - offset))
    except ValueError:
        offset = length = size = -1
    if offset < 0 or length < 0 or offset + length > size:
        raise EdgecError(
            f"reads beyond the end of '{location}'", where=where, hint="the file is damaged: copy it again"
        )
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)


def _tensors(graph: onnx.GraphProto, functions: Sequence[Any] = ()) -> list[TensorProto]:
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in (*graph.node, *(n for f in functions for n in f.node)):
        for attribute in node.attribute:
            found += [attribute.t] if attribute.type == onnx.AttributeProto.TENSOR else list(attribute.tensors)
            graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            for inner in graphs:
                found += _tensors(inner)
    return found


# -- inputs ------------------------------------------------------------------------------------------------------------


def _inputs(proto: onnx.ModelProto, path: Path, given: Sequence[int] | None) -> tuple[OnnxInput, ...]:
    constants = {t.name for t in proto.graph.initializer}
    values = [v for v in proto.graph.input if v.name not in constants]
    if not values:
        raise EdgecError("has no inputs", where=str(path), hint="a model that always gives the same cannot be compiled")
    found: list[OnnxInput] = []
    taken: set[str] = set()
    for number, value in enumerate(values):
        where = f"input '{value.name}' of {path.name}"
        if not value.type.HasField("tensor_type"):
            kind = value.type.WhichOneof("value")
            raise EdgecError(
                f"is a {(kind or 'value').removesuffix('_type')}, not a tensor", where=where, hint="take tensors only"
            )
        kind = value.type.tensor_type
        dtype = _numpy_type(kind.elem_type, where)
        shape, batch = _shape(kind, where, given if number == 0 else None, given is not None)
        identifier = identify(value.name, taken)
        found.append(OnnxInput(value.name, identifier, shape, dtype, batch))
    if len({i.batch for i in found}) > 1:
        # A constant beside batches: only the same batch everywhere is dynamic.
        found = [OnnxInput(i.name, i.identifier, i.shape, i.dtype, False) for i in found]
    return tuple(found)


def _shape(kind: Any, where: str, given: Sequence[int] | None, fixed: bool) -> tuple[tuple[int, ...], bool]:
    """(shape, whether dimension 0 is a batch of any size)."""
    if not kind.HasField("shape"):
        if given is None:
            raise EdgecError("has no shape", where=where, hint="give --input-shape, e.g. 1,3,224,224")
        return tuple(given), False
    sizes: list[int | None] = []
    names: list[str] = []
    for dim in kind.shape.dim:
        known = dim.HasField("dim_value") and dim.dim_value >= 0
        sizes.append(dim.dim_value if known else None)
        names.append(dim.dim_param or "?")
    if given is not None:
        if len(given) != len(sizes):
            raise EdgecError(f"has {len(sizes)} dimensions, not {len(given)}", where=f"--input-shape for {where}")
        for axis, (own, new) in enumerate(zip(sizes, given)):
            if own is not None and own != new:
                raise EdgecError(
                    f"dimension {axis} is {own} in the file, not {new}", where=f"--input-shape for {where}"
                )
        batch = bool(sizes) and sizes[0] is None
        return tuple(given), batch and given[0] == 1
    for axis, size in enumerate(sizes):
        if size is None and axis > 0:
            raise EdgecError(
                f"dimension {axis} ('{names[axis]}') has no size",
                where=where,
                hint="give --input-shape, e.g. 1,3,224,224",
            )
    batch = bool(sizes) and sizes[0] is None
    return tuple(1 if size is None else size for size in sizes), batch


def _numpy_type(code: int, where: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(code))
    except (KeyError, TypeError):
        dtype = np.dtype(object)
    names = ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float64")
    if dtype.name not in names:
        raise EdgecError(
            f"is of type {TensorProto.DataType.Name(code).lower()}",
            where=where,
            hint="take float32, integers or booleans",
        )
    return dtype


def _fix_shapes(proto: onnx.ModelProto, inputs: Sequence[OnnxInput]) -> None:
    """Write the shapes that are known into the model, a batch as a symbol."""
    known = {i.name: i for i in inputs}
    for value in proto.graph.input:
        source = known.get(value.name)
        if source is None:
            continue
        sizes: list[int | str] = list(source.shape)
        if source.batch:
            sizes[0] = EXPORTS_BATCH
        code = value.type.tensor_type.elem_type
        value.type.CopyFrom(helper.make_tensor_type_proto(code, sizes))
    # What the file says of values in between was said of other shapes.
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


def _uses_half(proto: onnx.ModelProto) -> bool:
    half = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if any(t.data_type in half for t in _tensors(proto.graph)):
        return True
    if any(v.type.tensor_type.elem_type in half for v in proto.graph.input):
        return True
    casts = (a.i for n in proto.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to")
    return any(code in half for code in casts)


# -- simplification ----------------------------------------------------------------------------------------------------


def _simplified(proto: onnx.ModelProto, notes: list[str]) -> onnx.ModelProto:
    """What onnxsim makes of it; batch norms stay, because a pass of edgec's own folds them."""
    try:
        with quiet():
            import onnxsim

            simple, _ = onnxsim.simplify(proto, skip_fuse_bn=True, skip_constant_folding=True)
        if [v.name for v in simple.graph.output] != [v.name for v in proto.graph.output]:
            raise ValueError("it renamed outputs")
        _keep_names(simple, proto)
        return simple
    except Exception as error:
        notes.append(f"not simplified: onnxsim failed ({type(error).__name__}: {first_line(error)})")
        return proto


def _keep_names(simple: onnx.ModelProto, proto: onnx.ModelProto) -> None:
    """Give nodes that compute what nodes of the file compute their names and metadata, which name layers."""
    before = {node.output[0]: node for node in proto.graph.node if node.output}
    for node in simple.graph.node:
        source = before.get(node.output[0]) if node.output else None
        if source is not None:
            node.name = source.name
            del node.metadata_props[:]
            node.metadata_props.extend(source.metadata_props)


def array_of(tensor: TensorProto) -> np.ndarray:
    """The values of a tensor; half precision becomes float32, which holds it exactly, 4-bit integers become int8."""
    value = numpy_helper.to_array(tensor)
    if value.dtype.name in ("float16", "bfloat16"):
        return value.astype(np.float32)
    if value.dtype.name in ("int4", "int2"):
        return value.astype(np.int8)
    if value.dtype.name in ("uint4", "uint2"):
        return value.astype(np.uint8)
    return value
