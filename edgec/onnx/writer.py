"""`write_onnx`: a Program as an ONNX model that other engines run, quantised layers in QDQ form.

The graph is written node by node from the table in `edgec.onnx.emitters`; weights keep their paths, layers their names.
Equal Programs give equal bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from edgec.errors import EdgecError
from edgec.onnx.expand import Expander
from edgec.origin import first_line
from edgec.program import Program, code_grid, get_weight, layer_of, output_nodes, placeholders

# Block-wise and 4-bit DequantizeLinear are of 21.
OPSET = 21
IR_VERSION = 10
BATCH = "batch"
# A protocol buffer holds no more.
LARGEST_FILE = 2**31 - 1
# Scales that are the same but for the rounding of multipliers.
SAME_SCALE = 1e-3

ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int16: TensorProto.INT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


class NoOnnxForm(Exception):
    """An operator, as text, that has no ONNX form here."""

    def __init__(self, operator: str, layer: str, why: str = "") -> None:
        super().__init__(f"{operator} of layer {layer} has no ONNX form{': ' + why if why else ''}")


@dataclass(frozen=True)
class Sym:
    """A whole number that the model computes: a tensor of one element, by name."""

    name: str


def to_onnx(program: Program) -> onnx.ModelProto:
    """The Program as an ONNX model. Raises EdgecError naming the operator when one has no ONNX form."""
    # For what they register.
    from edgec.onnx import recurrent_emitters, token_emitters  # noqa: F401
    from edgec.onnx.emitters import EMITTERS

    # The graph may change, the weights are shared.
    module = fx.GraphModule(program.module, copy.deepcopy(program.graph))
    try:
        return _Writer(program, module).run(EMITTERS)
    except NoOnnxForm as error:
        raise EdgecError(str(error), where=program.name) from error


def _constant(node: fx.Node) -> np.ndarray | None:
    """What a call without operands makes; None where it has some, or makes something else every time."""
    target = node.target
    if node.all_input_nodes or not isinstance(target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    value = target(*node.args, **node.kwargs)
    return value.contiguous().numpy() if isinstance(value, torch.Tensor) else None


ARITHMETIC = {operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div"}

Emitter = Callable[["_Writer", fx.Node], Any]


@dataclass
class _Writer:
    """Collects nodes and constants; `names` has what each node of the Program became."""

    program: Program
    module: fx.GraphModule
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    names: dict[fx.Node, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    layer: str = ""
    reals: dict[tuple[str, float, int], str] = field(default_factory=dict)

    # -- graph ---------------------------------------------------------------------------------------------------------

    def run(self, emitters: Mapping[str, Emitter]) -> onnx.ModelProto:
        self.module.recompile()
        inputs = [self._input(n, s) for n, s in zip(placeholders(self.module), self.program.inputs, strict=True)]
        # An output that is called like an input gets the number that it has in C, too.
        results = [self._unique(spec.name) for spec in self.program.outputs]
        expander = Expander(self.program, self.module)
        node = next(iter(self.module.graph.nodes))
        while node.op != "output":
            following = node.next
            if node.op == "get_attr":
                self.names[node] = node
            elif node.op == "call_function" and node.users:
                self.layer = layer_of(node)
                try:
                    self.names[node] = self._call(node, emitters)
                except NoOnnxForm as refusal:
                    following = self._expanded(expander, node, refusal)
            node = following
        outputs = []
        for node, spec, title in zip(output_nodes(self.module), self.program.outputs, results, strict=True):
            outputs.append(self._output(self.x(node), dataclasses.replace(spec, name=title), results))
        self._prune(results)
        used = {name for n in self.nodes for name in n.input}
        constants = [t for name, t in self.constants.items() if name in used]
        graph = helper.make_graph(self.nodes, self.program.name, inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="edgec", ir_version=IR_VERSION)
        if model.ByteSize() > LARGEST_FILE:
            raise NoOnnxForm("the model", self.program.name, "it is larger than 2 GB")
        onnx.checker.check_model(model)
        return model

    def _call(self, node: fx.Node, emitters: Mapping[str, Emitter]) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return self.names[source][index]  # type: ignore[index]
        if node.target in ARITHMETIC:
            a, b = (self.size(v) for v in node.args[:2])
            return Sym(self.emit(ARITHMETIC[node.target], [a, b]))  # type: ignore[index]
        emitter = emitters.get(str(node.target))
        if emitter is None:
            constant = _constant(node)
            if constant is not None:
                return self.const(constant)
            raise NoOnnxForm(str(node.target), layer_of(node))
        return emitter(self, node)

    def _expanded(self, expander: Expander, node: fx.Node, refusal: NoOnnxForm) -> fx.Node:
        try:
            first = expander.expand(node)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise NoOnnxForm(str(node.target), layer_of(node), why) from error
        if first is None:
            raise refusal
        return first

    def _prune(self, results: Sequence[str]) -> None:
        """Drop nodes whose results nothing reads."""
        wanted = set(results)
        kept = []
        for made in reversed(self.nodes):
            if wanted.intersection(made.output):
                kept.append(made)
                wanted.update(made.input)
        self.nodes = kept[::-1]

    def _input(self, node: fx.Node, spec: Any) -> onnx.ValueInfoProto:
        self.names[node] = spec.name
        self.taken.add(spec.name)
        return helper.make_tensor_value_info(spec.name, ELEMENTS[getattr(torch, spec.dtype)], self._shape(spec))

    def _shape(self, spec: Any) -> list[int | str]:
        shape: list[int | str] = list(spec.shape)
        if self.program.dynamic_batch and shape:
            shape[0] = BATCH
        return shape

    def _output(self, name: str, spec: Any, results: Sequence[str]) -> onnx.ValueInfoProto:
        """Give a value the name of an output: its maker writes it under that name, or a copy does."""
        maker = next((n for n in self.nodes if name in n.output), None)
        if maker is None or name in results:
            self.nodes.append(helper.make_node("Identity", [name], [spec.name], name=f"{spec.name}/Identity"))
        else:
            for other in self.nodes:
                for place in (other.input, other.output):
                    for i, value in enumerate(place):
                        if value == name:
                            place[i] = spec.name
            self.names = {k: spec.name if v == name else v for k, v in self.names.items()}
        return helper.make_tensor_value_info(spec.name, ELEMENTS[getattr(torch, spec.dtype)], self._shape(spec))

    # -- pieces --------------------------------------------------------------------------------------------------------

    def emit(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; the name of its output, or a tuple of them."""
        title = self._unique(f"{self.layer}/{op}")
        names = [title if outputs == 1 else f"{title}:{i}" for i in range(outputs)]
        self.taken.update(names)
        given = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, list(inputs), names, name=title, **given))
        return names[0] if outputs == 1 else tuple(names)

    def _unique(self, wanted: str) -> str:
        name, count = wanted, 1
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name

    def const(self, value: Any, dtype: Any = None, name: str | None = None) -> str:
        """An initialiser; equal ones are one."""
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        key = f"{array.dtype.str}{array.shape}{array.tobytes().hex() if array.nbytes < 256 else ''}"
        if array.nbytes < 256 and key in self.weights:
            return self.weights[key]
        if name is None and array.nbytes < 256:
            name = f"const_{len(self.constants)}"
        title = self._unique(name or f"{self.layer}/constant")
        self.constants[title] = numpy_helper.from_array(array, title)
        if array.nbytes < 256:
            self.weights[key] = title
        return title

    def ints(self, values: Sequence[int]) -> str:
        return self.const(np.array(values, np.int64).reshape(len(values)))

    def x(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """The name of an operand, cast to `dtype`; numbers become constants of it."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self._weight(value, dtype)
            name = self.names[value]
            if isinstance(name, Sym):
                return self.cast(name.name, dtype) if dtype not in (None, torch.int64) else name.name
            if not isinstance(name, str):
                raise NoOnnxForm(str(value.target), layer_of(value), "it has several results")
            return name if dtype in (None, value.meta["val"].dtype) else self.cast(name, dtype)
        kind = dtype or (torch.float32 if isinstance(value, float) else torch.int64)
        return self.const(np.array(value, torch.empty(0, dtype=kind).numpy().dtype))

    def _weight(self, node: fx.Node, dtype: torch.dtype | None) -> str:
        tensor = self.tensor(node)
        key = f"{node.target}:{dtype or tensor.dtype}"
        if key not in self.weights:
            array = (tensor if dtype is None else tensor.to(dtype)).contiguous().numpy()
            title = self._unique(str(node.target))
            self.constants[title] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), title)
            self.weights[key] = title
        return self.weights[key]

    def tensor(self, node: fx.Node) -> torch.Tensor:
        return get_weight(self.module, node)

    def array(self, value: Any) -> np.ndarray:
        """A weight as an array; anything that is computed has no ONNX form here."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            raise NoOnnxForm("a computed weight", self.layer)
        return self.tensor(value).contiguous().numpy()

    def weight(self, node: Any, array: np.ndarray) -> str:
        """An array made from the weight of a node, under a name like its own."""
        return self.const(array, name=str(node.target))

    def cast(self, name: str, dtype: torch.dtype | None) -> str:
        return name if dtype is None else self.emit("Cast", [name], to=ELEMENTS[dtype])

    def size(self, value: Any) -> str:
        """A size as a tensor of one element."""
        if isinstance(value, fx.Node):
            name = self.names[value]
            return name.name if isinstance(name, Sym) else name
        return value.name if isinstance(value, Sym) else self.ints([value])

    def shape(self, sizes: Sequence[Any], infer: bool = True) -> str:
        """Sizes as a tensor. infer: one symbolic size may be left for the operator to find."""
        plain = [s if isinstance(s, int) else None for s in sizes]
        if None not in plain:
            return self.ints([s for s in plain if s is not None])
        if infer and plain.count(None) == 1 and -1 not in plain:
            return self.ints([-1 if s is None else s for s in plain])
        return self.emit("Concat", [self.size(s) for s in sizes], axis=0)

    def args(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of a call by the names of its schema, defaults included."""
        schema = node.target._schema  # type: ignore[union-attr]
        found = {a.name: a.default_value for a in schema.arguments}
        found.update(zip((a.name for a in schema.arguments), node.args))
        found.update(node.kwargs)
        return found

    def meta(self, value: Any) -> torch.Tensor:
        return self.tensor(value) if value.op == "get_attr" else value.meta["val"]

    def refuse(self, node: fx.Node, why: str) -> NoOnnxForm:
        return NoOnnxForm(str(node.target), layer_of(node), why)

    # -- codes ---------------------------------------------------------------------------------------------------------

    def scale(self, node: fx.Node, wanted: float | None = None) -> float:
        """The scale of a node's codes, as the Program has it; `wanted` where that is another one, or is not known."""
        grid = code_grid(self.program, node)
        if wanted is None:
            return grid[0] if grid is not None else 1.0
        return grid[0] if grid is not None and abs(grid[0] / wanted - 1) < SAME_SCALE else wanted

    def grid(self, node: fx.Node) -> tuple[float, int]:
        """(scale, zero point) of a node's codes; those of the number line where they are not known, which is as right:
        whoever multiplies them has their scales in its multipliers."""
        return code_grid(self.program, node) or (1.0, 0)

    def real(self, node: fx.Node, scale: float, zero: int) -> str:
        """Codes as real numbers."""
        name = self.x(node)
        key = (name, scale, zero)
        if key not in self.reals:
            operands = [name, self.const(np.float32(scale)), self.const(np.int8(zero))]
            self.reals[key] = self.emit("DequantizeLinear", operands)
        return self.reals[key]

    def codes(self, name: str, scale: float, zero: int, lo: int = -128, hi: int = 127) -> str:
        """Real numbers as codes between lo and hi."""
        if lo > -128 or hi < 127:
            limits = [self.const(np.float32((v - zero) * np.float32(scale))) for v in (lo, hi)]
            name = self.emit("Clip", [name, *limits])
        return self.emit("QuantizeLinear", [name, self.const(np.float32(scale)), self.const(np.int8(zero))])
