"""An ONNX graph as an nn.Module, for torch.export: one module per scope of node names, weights under their names.

Values are tensors, or `Static` arrays where they do not depend on the inputs' values: weights, shapes and what is
computed from them, which may hold symbolic sizes of a dynamic batch. A node whose operands are all static is computed
at once, so shape arithmetic leaves no trace in the exported graph.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, helper
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from edgec.errors import EdgecError
from edgec.importing.quantized import UNSIGNED, StoredCodes
from edgec.onnx import symbolic
from edgec.onnx.reader import OnnxModel, array_of

# Bodies of operators that are functions may use such operators again.
MAX_DEPTH = 8
# What inputs of layers are called as weights.
ROLES: Mapping[str, tuple[str, ...]] = {
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Gemm": ("", "weight", "bias"),
    "MatMul": ("weight", "weight"),
    "Linear": ("", "weight", "bias"),
    "QLinearConv": ("", "", "", "weight", "", "", "", "", "bias"),
    "QLinearMatMul": ("", "", "", "weight"),
    "QGemm": ("", "", "", "weight", "", "", "bias"),
    "PRelu": ("", "weight"),
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "LayerNormalization": ("", "weight", "bias"),
    "InstanceNormalization": ("", "weight", "bias"),
    "GroupNormalization": ("", "weight", "bias"),
    "Gather": ("weight",),
    "Add": ("bias", "bias"),
}
# Bytes of constants that are compared by their contents.
LARGE = 4096
PLAIN_NAME = re.compile(r"[A-Za-z_][\w]*(\.\w+)+", re.ASCII)
# Operators that move elements, or choose among them: on codes they do the same as on the numbers they stand for.
MOVES = {
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Expand", "Tile"),
    *("DepthToSpace", "SpaceToDepth", "MaxPool", "Concat", "Split"),
}


@dataclass(frozen=True, eq=False)
class Static:
    """A value that is known: `array` may be of type object and hold symbolic sizes. path: the weight it comes from."""

    array: np.ndarray
    path: str = ""

    @property
    def concrete(self) -> bool:
        return self.array.dtype != object

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True, eq=False)
class Codes:
    """uint8 codes, held as int8 codes that are less by 128: those that edgec's own operators have."""

    tensor: torch.Tensor

    @property
    def shape(self) -> Any:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def plain(self) -> torch.Tensor:
        return (self.tensor.to(torch.int16) + UNSIGNED).to(torch.uint8)


Value = Any  # torch.Tensor | Static | list of values (an ONNX sequence) | None


class Scope(nn.Module):
    """Holds the weights of the nodes of a scope, and runs them, so that torch.export records where they stand."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Node:
    """One node at work: what handlers of `edgec.onnx.operators` see."""

    def __init__(self, graph: OnnxModule, proto: onnx.NodeProto, name: str, path: str, inputs: Sequence[Value]) -> None:
        self.graph = graph
        self.proto = proto
        self.op = proto.op_type
        self.name = name
        self.path = path
        self.inputs = list(inputs)
        self.opset = graph.opset
        # Whether all inputs are constants, so that results are to be plain tensors.
        self.folding = False
        self.attributes = {a.name: a for a in proto.attribute}

    # -- attributes ----------------------------------------------------------------------------------------------------

    def attr(self, name: str, default: Any = None) -> Any:
        found = self.attributes.get(name)
        if found is None:
            return default
        value = helper.get_attribute_value(found)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return [v.decode(errors="replace") if isinstance(v, bytes) else v for v in value] if _listed(found) else value

    @property
    def outputs(self) -> int:
        """How many outputs the graph uses, counted to the last named one."""
        return len(self.proto.output)

    def wants(self, index: int) -> bool:
        return index < len(self.proto.output) and bool(self.proto.output[index])

    # -- inputs --------------------------------------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        if not self.has(index):
            raise self.refuse(f"lacks input {index}", "the file is not valid: export the model again")
        return self.inputs[index]

    def x(self, index: int) -> torch.Tensor:
        """An input as a tensor."""
        return self.graph.tensor(self.value(index), self.path, self._role(index))

    def optional(self, index: int) -> torch.Tensor | None:
        return self.x(index) if self.has(index) else None

    def static(self, index: int, what: str) -> np.ndarray:
        """An input that must be known when compiling; `what` names it in the message."""
        value = self.value(index)
        if not isinstance(value, Static) or not value.concrete:
            raise self.refuse(
                f"needs a constant for its {what}", "fix it when exporting, so that no shape depends on input values"
            )
        return value.array

    def ints(self, index: int, what: str) -> list[Any]:
        """An input of whole numbers, among which may be symbolic sizes."""
        value = self.value(index)
        if not isinstance(value, Static):
            raise self.refuse(
                f"needs a constant for its {what}", "fix it when exporting, so that no shape depends on input values"
            )
        return [v if isinstance(v, torch.SymInt) else int(v) for v in value.array.reshape(-1).tolist()]

    def is_static(self, index: int) -> bool:
        return self.has(index) and isinstance(self.inputs[index], Static) and self.inputs[index].concrete

    def weight(self, array: np.ndarray, name: str) -> torch.Tensor:
        """An array that was computed from weights, as a weight of this node's layer."""
        return self.graph.constant(Static(np.ascontiguousarray(array)), self.path, name)

    def _role(self, index: int) -> str:
        roles = ROLES.get(self.op, ())
        return roles[index] if index < len(roles) and roles[index] else "value"

    def refuse(self, what: str, hint: str = "") -> EdgecError:
        return EdgecError(
            f"{self.op} {what}", where=self.graph.where(self.name), hint=hint or "export the model without it"
        )


def _with_names(function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """`function`, of which torch.export is told that it takes parameters of these names."""

    def forward(*inputs: torch.Tensor) -> Any:
        return function(*inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    return forward


def _listed(attribute: AttributeProto) -> bool:
    return attribute.type in (AttributeProto.STRINGS, AttributeProto.INTS, AttributeProto.FLOATS)


Handler = Callable[[Node], Any]


class OnnxModule(nn.Module):
    """`forward` takes one tensor per input of the model and returns a tensor, or a tuple of them."""

    def __init__(self, model: OnnxModel) -> None:
        super().__init__()
        self.model = model
        self.file = model.path.name
        self.opset = model.opsets[""]
        self.root = model.proto.graph
        # Weights get their places in the first run, which is before the export.
        self.recording = True
        self.free_batch = False
        self.folded: dict[tuple[Any, ...], list[Value]] = {}
        self.kept: list[Value] = []
        # The codes of weights that were met as such.
        self.stored: list[StoredCodes] = []
        self.places: dict[tuple[Any, ...], str] = {}
        self.scopes: dict[str, list[str]] = {}
        self.weights = {t.name: Static(array_of(t), t.name) for t in self.root.initializer}
        if self.root.sparse_initializer:
            raise EdgecError("has sparse weights", where=self.file, hint="save it with dense ones")
        self.forward = _with_names(self.compute, [spec.identifier for spec in model.inputs])

    def where(self, name: str) -> str:
        return f"node '{name}' of {self.file}"

    def compute(self, *inputs: torch.Tensor) -> Any:
        values: dict[str, Value] = dict(self.weights)
        values.update({spec.name: x for spec, x in zip(self.model.inputs, inputs, strict=True)})
        self.run_graph(self.root, values, "", 0)
        results = []
        for name in self.model.outputs:
            if name not in values:
                raise EdgecError(f"has no node that computes output '{name}'", where=self.file)
            value = values[name]
            value = value.plain() if isinstance(value, Codes) else value
            if isinstance(value, Static):
                # Stored with the model, and returned as a value of its own.
                value = self.tensor(value, "constants", name).clone()
            if not isinstance(value, torch.Tensor):
                raise EdgecError(f"output '{name}' is a sequence", where=self.file, hint="return tensors only")
            # An output that is an input, or another output, is a copy: torch.export wants values of its own.
            if any(value is other for other in (*inputs, *results)):
                value = value.clone()
            results.append(value)
        return results[0] if len(results) == 1 else tuple(results)

    def run_graph(self, graph: onnx.GraphProto, values: dict[str, Value], prefix: str, depth: int) -> None:
        for number, node in enumerate(graph.node):
            name = node.name or f"{prefix}{node.op_type}_{number}"
            self._run_node(node, name, values, prefix, depth)

    def _run_node(self, proto: onnx.NodeProto, name: str, values: dict[str, Value], prefix: str, depth: int) -> None:
        inputs: list[Value] = []
        for source in proto.input:
            if source and source not in values:
                raise EdgecError(f"reads '{source}', which nothing computes", where=self.where(name))
            inputs.append(values[source] if source else None)
        path = self._layer(proto, name, inputs) if not prefix else prefix.rstrip("/")
        node = Node(self, proto, name, path, inputs)
        try:
            results = self._results(node, values, prefix, depth)
        except EdgecError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError, OverflowError) as error:
            if torch.compiler.is_exporting():
                raise
            line = " ".join(str(error).split())[:200]
            raise EdgecError(
                f"{node.op} does not run: {line}", where=self.where(name), hint="check the model with onnx.checker"
            ) from error
        for target, result in zip(proto.output, results):
            if target:
                values[target] = result

    def _layer(self, proto: onnx.NodeProto, name: str, inputs: Sequence[Value]) -> str:
        """Where a node stands: the owner of its weight, if that has the name of one, else what its own name says."""
        for role, value in zip(ROLES.get(proto.op_type, ()), inputs):
            if role == "weight" and isinstance(value, Static) and PLAIN_NAME.fullmatch(value.path):
                return value.path.rpartition(".")[0]
        return scope_of(proto, name)

    def _results(self, node: Node, values: dict[str, Value], prefix: str, depth: int) -> Sequence[Value]:
        from edgec.onnx import control, sequences
        from edgec.onnx.operators import handler_of

        proto = node.proto
        inner = control.results_of(node, values, depth)
        if inner is not None:
            return inner
        handler = handler_of(proto.domain, proto.op_type)
        given = [v for v in node.inputs if v is not None]
        static = all(isinstance(v, Static) for v in given) and proto.op_type not in ("Shape", "Size")
        static = static and proto.op_type not in sequences.NAMES
        if static and any(not v.concrete for v in given):
            computed = symbolic.compute(node)
            if computed is not None:
                return [Static(computed)]
        if handler is None:
            body = _body(node)
            if body is None:
                raise unsupported(node)
            if depth >= MAX_DEPTH:
                raise node.refuse("is defined by itself")
            return self._function(node, body, depth)
        if static and given and all(v.concrete for v in given):
            return self._folded(node, handler)
        coded = proto.op_type in MOVES and proto.domain in ("", "ai.onnx") and _codes_only(node)
        if coded:
            node.inputs = [v.tensor if isinstance(v, Codes) else v for v in node.inputs]
        results = as_results(self._scope(node.path)(handler, node) if node.path else handler(node))
        return (
            [Codes(r) if isinstance(r, torch.Tensor) and r.dtype == torch.int8 else r for r in results]
            if coded
            else results
        )

    def _folded(self, node: Node, handler: Handler) -> list[Value]:
        """The results of a node on constants, computed at once and outside of any tracing."""
        # The run before the export has computed most of them: what does not depend on the batch.
        key = (node.name, *(None if v is None else _content(v.array) for v in node.inputs))
        if key not in self.folded:
            self.folded[key] = self._computed(node, handler)
            # Large arrays are known by their address, so they must stay.
            self.kept += node.inputs
        return self.folded[key]

    def _computed(self, node: Node, handler: Handler) -> list[Value]:
        path = next((v.path for v in node.inputs if v is not None and v.path), "")
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            plain = Node(self, node.proto, node.name, node.path, node.inputs)
            plain.inputs = [None if v is None else torch.from_numpy(_own(v.array)) for v in node.inputs]
            plain.static = lambda index, what: node.value(index).array  # type: ignore[method-assign]
            plain.ints = lambda index, what: [int(i) for i in node.value(index).array.reshape(-1)]  # type: ignore[method-assign]
            plain.is_static = lambda index: node.has(index)  # type: ignore[method-assign]
            plain.x = lambda index: plain.value(index)  # type: ignore[method-assign]
            plain.folding = True
            plain.weight = lambda array, name: torch.from_numpy(_own(array))  # type: ignore[method-assign]
            results = as_results(handler(plain))
        return [Static(r.numpy(), path) if isinstance(r, torch.Tensor) else r for r in results]

    def _function(self, node: Node, body: Any, depth: int) -> list[Value]:
        """Run the body by which ONNX defines an operator."""
        names = dict(zip(body.input, node.inputs))
        values: dict[str, Value] = {name: names.get(name) for name in body.input}
        attributes = {**_defaults(node), **{a.name: a for a in body.attribute_proto}}
        attributes.update(node.attributes)
        outer, self.opset = self.opset, next((o.version for o in body.opset_import if o.domain == ""), self.opset)
        try:
            for number, inner in enumerate(body.node):
                proto = _bound(inner, attributes)
                values.setdefault("", None)
                self._run_node(proto, f"{node.name}/{proto.op_type}_{number}", values, f"{node.path}/", depth + 1)
        finally:
            self.opset = outer
        return [values.get(name) for name in body.output]

    def with_batch(self, x: torch.Tensor, sizes: Sequence[Any]) -> list[Any]:
        """The sizes of a reshape. Files with a batch of one have it in them as a number: where the batch is made
        dynamic all the same, it takes the number's place."""
        sizes = list(sizes)
        batched = self.free_batch and x.dim() > 0 and isinstance(x.shape[0], torch.SymInt)
        if batched and sizes and isinstance(sizes[0], int) and sizes[0] == 1:
            sizes[0] = x.shape[0]
        return sizes

    # -- weights -------------------------------------------------------------------------------------------------------

    def known(self, array: np.ndarray, path: str = "") -> Static:
        return Static(array, path)

    def tensor(self, value: Value, path: str = "", role: str = "value") -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, Codes):
            return value.plain()
        if isinstance(value, Static):
            return self.constant(value, path, role) if value.concrete else _symbolic_tensor(value.array)
        raise TypeError(f"expected a tensor, got a {type(value).__name__}")

    def constant(self, value: Static, path: str, role: str) -> torch.Tensor:
        """The weight for a constant, registered when it is met first: in the run before the export."""
        array = value.array
        if array.dtype == np.uint16:
            # PyTorch computes nothing with it; the codes that it is for are held so.
            array = array.astype(np.int32)
        if array.dtype.kind == "f" and not np.isfinite(array).all() and not np.isnan(array).any():
            return self._infinite(value, path, role)
        content = (array.shape, array.dtype.str, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())
        key = (value.path, *(() if value.path else (path, role)), *content)
        place = self.places.get(key)
        if place is None:
            if not self.recording:
                return torch.tensor(array.tolist(), dtype=_kind(array)).reshape(array.shape)
            wanted = value.path if PLAIN_NAME.fullmatch(value.path) else ".".join(filter(None, (path, role)))
            place = self.places[key] = self._register(wanted, array)
        owner: Any = self
        for part in place.split("."):
            owner = getattr(owner, part)
        return owner

    def _infinite(self, value: Static, path: str, role: str) -> torch.Tensor:
        """A constant with infinities, as masks have them: weights are finite, so they are put in by the graph."""
        array = value.array
        result = self.constant(
            Static(np.where(np.isfinite(array), array, 0).astype(array.dtype), value.path), path, role
        )
        for sign, name in ((-np.inf, "below"), (np.inf, "above")):
            places = array == sign
            if places.any():
                result = result.masked_fill(self.constant(Static(places), path, f"{role}_{name}"), float(sign))
        return result

    def _register(self, wanted: str, array: np.ndarray) -> str:
        *parents, leaf = [_attribute(part) for part in wanted.split(".")]
        owner = self._scope(".".join(parents))
        unique, count = leaf, 1
        while hasattr(owner, unique):
            count += 1
            unique = f"{leaf}_{count}"
        tensor = torch.from_numpy(_own(array))
        if tensor.dtype.is_floating_point:
            owner.register_parameter(unique, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(unique, tensor)
        return ".".join([*self._place(owner), unique])

    def _place(self, owner: nn.Module) -> list[str]:
        return next((parts for parts in self.scopes.values() if self._at(parts) is owner), [])

    def _at(self, parts: Sequence[str]) -> nn.Module:
        owner: nn.Module = self
        for part in parts:
            owner = getattr(owner, part)
        return owner

    def _scope(self, path: str) -> nn.Module:
        """The module of a scope, made when it is met first."""
        known = self.scopes.get(path)
        if known is None:
            owner: nn.Module = self
            known = []
            for part in filter(None, path.split(".")):
                name = _attribute(part)
                while hasattr(owner, name) and not isinstance(getattr(owner, name), Scope):
                    name += "_"
                if not hasattr(owner, name):
                    owner.add_module(name, Scope())
                owner = getattr(owner, name)
                known.append(name)
            if not known:
                known = ["main"]
                if not hasattr(self, "main"):
                    self.add_module("main", Scope())
            self.scopes[path] = known
        return self._at(known)


def _codes_only(node: Node) -> bool:
    """Whether what a node moves are uint8 codes, all of them held as int8."""
    moved = node.inputs if node.op == "Concat" else node.inputs[:1]
    return bool(moved) and all(isinstance(v, Codes) for v in moved)


def _content(array: np.ndarray) -> tuple[Any, ...]:
    """What tells constants apart; large ones are weights and what is made of them, which are kept."""
    if array.nbytes > LARGE:
        return (id(array),)
    return (array.shape, array.dtype.str, array.tobytes())


def _kind(array: np.ndarray) -> torch.dtype:
    return getattr(torch, array.dtype.name)


def _own(array: np.ndarray) -> np.ndarray:
    """Contiguous and writable, as torch wants it, with its shape."""
    return np.array(array, order="C", copy=True)


def _attribute(part: str) -> str:
    """A part of a path as the name of an attribute that torch modules do not have themselves."""
    plain = re.sub(r"\W", "_", part, flags=re.ASCII) or "_"
    return f"{plain}_" if hasattr(nn.Module, plain) else plain


def _symbolic_tensor(array: np.ndarray) -> torch.Tensor:
    """Sizes, of which some are symbolic, as a tensor."""
    parts = [torch.full((), v, dtype=torch.int64) for v in array.reshape(-1).tolist()]
    return torch.stack(parts).reshape(array.shape)


def as_results(value: Any) -> list[Value]:
    """What a handler returned, as a list of outputs; arrays are constants."""
    if isinstance(value, Many):
        return [_as_value(v) for v in value.values]
    return [_as_value(value)]


@dataclass(frozen=True)
class Many:
    """Several outputs of a node."""

    values: Sequence[Any]


def _as_value(value: Any) -> Value:
    return Static(value) if isinstance(value, np.ndarray) else value


def scope_of(proto: onnx.NodeProto, name: str) -> str:
    """The module path that a node's name stands for: `/layer1/layer1.0/conv1/Conv` is in `layer1.0.conv1`.

    Names without scopes are paths themselves. PyTorch's newer exporter writes the path into the metadata.
    """
    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = re.findall(r"'([^']*)'", entry.value)
            if len(scopes) > 1:
                return scopes[-2]
    if "/" not in name:
        return name.replace(":", "_")
    parts: list[str] = []
    for part in [p for p in name.split("/") if p][:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def unsupported(node: Node) -> EdgecError:
    domain = node.proto.domain or "ai.onnx"
    return EdgecError(
        f"operator {node.op} of domain '{domain}' is not supported",
        where=node.graph.where(node.name),
        hint="export the model without it, or with operators of ai.onnx that compute the same",
    )


def _schema(node: Node) -> tuple[Any, int]:
    """(definition of the operator in ONNX, version of its operator set), or (None, 0)."""
    domain = "" if node.proto.domain == "ai.onnx" else node.proto.domain
    version = node.opset if not domain else node.graph.model.opsets.get(domain, 1)
    try:
        return onnx.defs.get_schema(node.op, version, domain), version
    except Exception:
        return None, 0


def _defaults(node: Node) -> dict[str, AttributeProto]:
    """What attributes are that the node does not give."""
    schema, _ = _schema(node)
    attributes = {} if schema is None else schema.attributes
    return {n: a.default_value for n, a in attributes.items() if a.default_value.type != AttributeProto.UNDEFINED}


def _body(node: Node) -> Any:
    """The FunctionProto by which ONNX defines the node's operator, for the types of its inputs; None without one."""
    proto = node.proto
    schema, version = _schema(node)
    if schema is None:
        return None
    if schema.has_function:
        versions = [v for v in schema.function_opset_versions if v <= version]
        text = schema.get_function_with_opset_version(max(versions)) if versions else None
    elif schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= version]
        types = [_type_of(v) for v in node.inputs]
        text = None
        if versions:
            text = schema.get_context_dependent_function_with_opset_version(
                max(versions), proto.SerializeToString(), [t.SerializeToString() for t in types]
            )
    else:
        return None
    if not text:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(text)
    return function


def _type_of(value: Value) -> onnx.TypeProto:
    if value is None:
        return onnx.TypeProto()
    if isinstance(value, Static):
        dtype = np.dtype(np.int64) if not value.concrete else value.array.dtype
    else:
        dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    return helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(dtype), [None] * len(value.shape))


def _bound(proto: onnx.NodeProto, attributes: Mapping[str, AttributeProto]) -> onnx.NodeProto:
    """A node of a function body with the attributes of the call in place of references."""
    if not any(a.ref_attr_name for a in proto.attribute):
        return proto
    copy = onnx.NodeProto()
    copy.CopyFrom(proto)
    del copy.attribute[:]
    for attribute in proto.attribute:
        if not attribute.ref_attr_name:
            copy.attribute.append(attribute)
        elif attribute.ref_attr_name in attributes:
            given = AttributeProto()
            given.CopyFrom(attributes[attribute.ref_attr_name])
            given.name = attribute.name
            copy.attribute.append(given)
    return copy
