"""`Program`: the model between two passes.

A Program is a `torch.export` graph in its editable form, an FX GraphModule of ATen operators, with its weights,
example inputs and annotations. Passes never change a Program; they take a copy of its graph with `edit()`, change
the copy, and hand it to `replace()`, which checks it: the graph is linted, run, re-exported (the re-export is the
verifier) and its inputs and outputs are compared with those of the Program it came from.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import hashlib
import keyword
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from edgec.errors import EdgecError
from edgec.origin import source_line
from edgec.sparsity import Sparsity, check_sparsity, sparsities

MAX_BATCH = 1024


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a graph input or output; dimension 0 of `shape` is 1 when the batch is dynamic."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, eq=False)
class Program:
    """A model as an editable ATen graph.

    module: FX GraphModule; nodes are placeholders, `get_attr` of weights, ATen or `edgec::` calls and one output.
    example_inputs: one tensor per input; dimension 0 is at least 2 when `dynamic_batch` is set.
    annotations: what passes record about tensors (keyed by node name) or weights (keyed by attribute path).
    output_names: one per output, different identifiers; empty for y, or y0, y1 and so on. notes: what was done to the
    model when it was read, for the report.
    """

    name: str
    module: fx.GraphModule
    example_inputs: tuple[torch.Tensor, ...]
    dynamic_batch: bool = False
    annotations: Mapping[str, Any] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @staticmethod
    def from_exported(
        exported: torch.export.ExportedProgram,
        name: str,
        prepare: Callable[[fx.GraphModule], None] | None = None,
        *,
        reexport: bool = True,
    ) -> Program:
        """Take over an ExportedProgram whose shapes are static or dynamic in dimension 0 only.

        prepare: edits the graph in place before it is verified. reexport: verify by another export too; of a graph that
        torch.export has just made for a batch of any size, that would be the same again.

        Raises EdgecError when a dimension other than the batch is dynamic.
        """
        module = _flat(exported.module(check_guards=False))
        dynamic = False
        examples = []
        generator = torch.Generator().manual_seed(0)
        for position, node in enumerate(placeholders(module)):
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor):
                raise EdgecError(
                    f"input is a {type(value).__name__}, not a tensor",
                    where=f"input '{node.name}' of {name}",
                    hint="export the model with tensor inputs only",
                )
            shape = []
            for axis, size in enumerate(value.shape):
                if isinstance(size, int):
                    shape.append(size)
                elif axis == 0:
                    dynamic = True
                    shape.append(2)
                else:
                    raise EdgecError(
                        f"dimension {axis} is dynamic ({size})",
                        where=f"input '{node.name}' of {name}",
                        hint="only the batch (dimension 0) may be dynamic; export with a fixed size",
                    )
            if value.dtype.is_floating_point:
                examples.append(torch.rand(shape, generator=generator, dtype=value.dtype))
            else:
                examples.append(integer_example(exported, position, shape, value.dtype))
        for node in module.graph.nodes:
            if node.op not in ("placeholder", "output", "get_attr"):
                node.meta["edgec_layer"] = node.meta.get("custom", {}).get("edgec_layer") or _layer_from_origin(node)
        if prepare is not None:
            prepare(module)
        program = Program(
            name=name,
            module=module,
            example_inputs=tuple(examples),
            dynamic_batch=dynamic,
            output_names=_stored_names(module) or output_names(exported.call_spec.out_spec),
        )
        return program.replace(module, _stored_masks(module), check_signature=False, reexport=reexport)

    # -- reading ---------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph without gradients; the result is always a tuple, one tensor per output."""
        with torch.no_grad():
            out = self.module(*inputs)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self._spec(n, n.name) for n in placeholders(self.module))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        nodes = output_nodes(self.module)
        names = self.output_names or (["y"] if len(nodes) == 1 else [f"y{i}" for i in range(len(nodes))])
        return tuple(self._spec(n, name) for n, name in zip(nodes, names, strict=True))

    def _spec(self, node: fx.Node, name: str) -> TensorSpec:
        value = node.meta["val"]
        shape = tuple(int(d) for d in value.shape)
        if self.dynamic_batch and shape and shape[0] == self.example_inputs[0].shape[0]:
            shape = (1, *shape[1:])
        return TensorSpec(name, shape, str(value.dtype).removeprefix("torch."))

    def weights(self) -> dict[str, torch.Tensor]:
        """The tensors that the graph reads, by attribute path, each once and in graph order."""
        found: dict[str, torch.Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                found.setdefault(str(node.target), get_weight(self.module, node))
        return found

    def text(self) -> str:
        """A stable text form: one line per node with shape and dtype, weights by path and content hash."""
        lines = [f"program {self.name}"]
        for node in self.graph.nodes:
            lines.append("  " + _print_node(self.module, node))
        for key in sorted(self.annotations):
            lines.append(f"  # {key}: {self.annotations[key]}")
        return "\n".join(lines) + "\n"

    def fingerprint(self) -> str:
        """SHA-256 of the text form; equal for equal graphs, weights and annotations."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    # -- editing ---------------------------------------------------------------------------------------------------

    def edit(self) -> fx.GraphModule:
        """A deep copy of the graph and its weights, free to change."""
        return copy.deepcopy(self.module)

    def replace(
        self,
        module: fx.GraphModule | None = None,
        annotations: Mapping[str, Any] | None = None,
        *,
        check_signature: bool = True,
        reexport: bool = True,
    ) -> Program:
        """A new Program with the edited graph, after verification.

        Dead nodes and unused weights are dropped, the graph is linted, recompiled, run on the example inputs and
        re-exported. Raises EdgecError when any of it fails, when inputs or outputs changed shape or dtype, or when a
        pruned weight is gone or got values in pruned places.
        """
        kept = MappingProxyType(dict(self.annotations if annotations is None else annotations))
        if module is None:
            check_sparsity(self.weights(), kept, self.name)
            return dataclasses.replace(self, annotations=kept)
        try:
            module.graph.eliminate_dead_code()
            module.delete_all_unused_submodules()
            _drop_unused_weights(module)
            module.graph.lint()
            module.recompile()
            propagate(module, self.example_inputs)
        except Exception as error:
            raise EdgecError(f"edited graph does not run: {_first_line(error)}", where=self.name) from error
        program = dataclasses.replace(self, module=module, annotations=kept)
        check_sparsity(program.weights(), kept, self.name)
        if check_signature:
            _same_signature(self, program)
        if reexport:
            program.export()
        return program

    def export(self, batch: int | None = None, *, masks: bool = False) -> torch.export.ExportedProgram:
        """Re-export the graph. `batch` fixes the batch size; by default the batch stays as it is.

        masks: write the sparsity records into the nodes, so that `from_exported` finds them.

        Raises EdgecError when torch.export refuses the graph.
        """
        inputs = self.example_inputs if batch is None else self.batch_inputs(batch)
        shapes = None
        if batch is None and self.dynamic_batch:
            dim = torch.export.Dim("batch", min=1, max=MAX_BATCH)
            shapes = tuple({0: dim} for _ in inputs)
        records = sparsities(self.annotations) if masks else {}
        for node in self.graph.nodes:
            # torch.export copies this field, and no other of ours, to the new graph and into .pt2 files.
            node.meta["custom"] = {
                "edgec_layer": layer_of(node),
                "edgec_origin": origin_of(node),
                **self._grid(node),
            }
            sparse = {i: records[str(a.target)].to_json() for i, a in _weights_of(node) if str(a.target) in records}
            if sparse:
                node.meta["custom"]["edgec_sparsity"] = sparse
            source = source_line(node)
            if source:
                node.meta["custom"]["edgec_source"] = source
        if self.output_names:
            for node, name in zip(output_nodes(self.module), self.output_names, strict=True):
                node.meta.setdefault("custom", {}).setdefault("edgec_outputs", []).append(name)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                return torch.export.export(self.module, inputs, dynamic_shapes=shapes)
        except Exception as error:
            raise EdgecError(f"graph does not re-export: {_first_line(error)}", where=self.name) from error

    def _grid(self, node: fx.Node) -> dict[str, Any]:
        """Scale and zero point of a node's codes, so that a reloaded Program can be read in real numbers."""
        scale, zero = code_grid(self, node) or (None, None)
        return {} if scale is None else {"scale": scale, "zero_point": zero}

    def batch_inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        """The example inputs with `batch` samples (repeated or cut) where the batch is dynamic."""
        if not self.dynamic_batch:
            return self.example_inputs
        return tuple(x[:1].expand(batch, *x.shape[1:]).contiguous() for x in self.example_inputs)

    def save(self, path: str | Path) -> None:
        """Write the Program as a `.pt2` file that `torch.export.load` reads; masks of pruned weights come along."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = self.export(masks=True)
            for node in exported.graph.nodes:
                # Addresses of graphs in this process: they differ between equal files.
                node.meta.pop("from_node", None)
            torch.export.save(exported, path)


# -- helpers for passes ------------------------------------------------------------------------------------------------


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def output_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that the graph returns, flattened."""
    (out,) = [n for n in module.graph.nodes if n.op == "output"]
    flat, _ = torch.utils._pytree.tree_flatten(out.args[0])
    for value in flat:
        if not isinstance(value, fx.Node):
            raise EdgecError(
                f"graph returns the constant {value!r}", where="output", hint="return tensors that depend on the input"
            )
    return flat


def integer_example(
    exported: torch.export.ExportedProgram, position: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """What a model was exported with: indices and lengths that it can take. Zeros where that is not stored."""
    given = torch.utils._pytree.tree_leaves(exported.example_inputs or ())
    found = given[position] if position < len(given) else None
    if not isinstance(found, torch.Tensor) or found.dtype != dtype or found.shape[1:] != torch.Size(shape)[1:]:
        return torch.zeros(tuple(shape), dtype=dtype)
    return (found if found.shape == torch.Size(shape) else found[:1].expand(tuple(shape))).clone()


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor for the Program's example inputs."""
    return tuple(int(d) for d in node.meta["val"].shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def layer_of(node: fx.Node) -> str:
    """The user's name of the layer a node came from: module path, else the node's own name."""
    return node.meta.get("edgec_layer") or node.meta.get("custom", {}).get("edgec_layer") or node.name


def code_grid(program: Program, node: fx.Node) -> tuple[float, int] | None:
    """(scale, zero_point) of the int8 codes that a node computes, or None when it is not known."""
    record = program.annotations.get(node.name)
    if record is not None and isinstance(getattr(record, "scale", None), float):
        return record.scale, record.zero_point
    kept = node.meta.get("custom", {})
    return (kept["scale"], kept["zero_point"]) if "scale" in kept else None


def origin_of(node: fx.Node) -> str:
    """The node of the original Program whose value this node stands for, by name.

    A pass that puts one node in the place of several (a folded batch norm, a convolution with its activation) sets
    `meta["edgec_origin"]` of the new node to the origin of the last of them, so that equal things are compared.
    """
    return node.meta.get("edgec_origin") or node.meta.get("custom", {}).get("edgec_origin") or node.name


def is_call(node: Any, *targets: Any) -> bool:
    """True when `node` is a call of one of the operators `targets` (OpOverload objects)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def get_weight(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The tensor behind a `get_attr` node."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, torch.Tensor) else value


def constant_of(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The weight tensor behind an argument, or None when the argument is computed or missing."""
    return get_weight(module, node) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def add_weight(module: fx.GraphModule, name: str, tensor: torch.Tensor) -> str:
    """Store `tensor` under the dotted path `name` and return the path; a path in use gets a numeric suffix.

    Floating-point tensors become parameters (so that training passes find them), others buffers.
    """
    owner: torch.nn.Module = module
    *parents, leaf = name.split(".")
    path = []
    for part in parents:
        # A weight in the way of a module gets out of it by the same suffix.
        free, count = part, 0
        while hasattr(owner, free) and not isinstance(getattr(owner, free), torch.nn.Module):
            count += 1
            free = f"{part}_{count}"
        if not hasattr(owner, free):
            owner.add_module(free, torch.nn.Module())
        owner = getattr(owner, free)
        path.append(free)
    part, count = leaf, 0
    while hasattr(owner, leaf):
        count += 1
        leaf = f"{part}_{count}"
    path.append(leaf)
    tensor = tensor.detach().clone()
    if tensor.dtype.is_floating_point:
        owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(leaf, tensor)
    return ".".join(path)


def weight_node(module: fx.GraphModule, name: str, tensor: torch.Tensor) -> fx.Node:
    """Store a weight and return a `get_attr` node for it at the current insertion point of the graph."""
    path = add_weight(module, name, tensor)
    node = module.graph.get_attr(path)
    node.meta["val"] = tensor.detach()
    return node


def weight_paths(module: fx.GraphModule) -> set[str]:
    """Paths of the weights that something in the graph reads."""
    return {str(n.target) for n in module.graph.nodes if n.op == "get_attr" and n.users}


def propagate(module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
    """Set meta["val"] of every node to a fake tensor of the shape it has for `inputs`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        FakeTensorProp(module, mode).propagate(*inputs)


def _flat(exported: torch.nn.Module) -> fx.GraphModule:
    """The graph with positional inputs and a flat tuple of outputs, free of export's run-time checks and gradients.

    torch's hook compares inputs with the placeholders' metadata, which `propagate` overwrites.
    """
    assert isinstance(exported, fx.GraphModule)
    for parameter in exported.parameters():
        parameter.requires_grad_(False)
    graph = exported.graph
    graph.set_codegen(fx.graph.CodeGen())
    (out,) = [n for n in graph.nodes if n.op == "output"]
    out.args = (tuple(torch.utils._pytree.tree_leaves(out.args[0])),)
    return fx.GraphModule(exported, graph)


def _drop_unused_weights(module: fx.GraphModule) -> None:
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
    names += [n for n, _ in module.named_buffers(remove_duplicate=False)]
    for name in names:
        if name not in used:
            *parents, leaf = name.split(".")
            owner: Any = module
            for part in parents:
                owner = getattr(owner, part)
            delattr(owner, leaf)


def _weights_of(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """The weights among a call's positional arguments, with their position as text."""
    if node.op != "call_function":
        return []
    return [(str(i), a) for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"]


def output_names(spec: Any) -> tuple[str, ...]:
    """Names for the leaves of what a model returns: the keys of dictionaries and fields of data classes on the way.

    Empty where there are none, as in a tuple.
    """
    if spec is None:
        return ()
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(
        torch.utils._pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    )
    found: list[str] = []
    named = False
    for path, _ in leaves:
        parts = []
        for key in path:
            value = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
            named = named or isinstance(value, str)
            parts.append(str(value))
        found.append("_".join(parts))
    taken: set[str] = set()
    return tuple(identify(name, taken) for name in found) if named else ()


def identify(name: str, taken: set[str]) -> str:
    """`name` as a Python identifier that is not in `taken`, to which it is added; targets make theirs of it."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_") or "x"
    plain = f"x_{plain}" if plain[0].isdigit() else plain
    # FX gives other names to nodes that are called like something built in.
    plain = f"{plain}_" if keyword.iskeyword(plain) or hasattr(builtins, plain) else plain
    unique, count = plain, 1
    while unique.lower() in taken:
        count += 1
        unique = f"{plain}_{count}"
    taken.add(unique.lower())
    return unique


def _stored_names(module: fx.GraphModule) -> tuple[str, ...]:
    """The names of outputs that `export` wrote into the nodes, in their order; empty where there are none."""
    names = []
    for node in output_nodes(module):
        stored = node.meta.get("custom", {}).get("edgec_outputs", [])
        if not stored:
            return ()
        names.append(stored[0] if len(stored) == 1 else stored.pop(0))
    for node in module.graph.nodes:
        node.meta.get("custom", {}).pop("edgec_outputs", None)
    return tuple(names)


def _stored_masks(module: fx.GraphModule) -> dict[str, Sparsity]:
    """The sparsity records that `save` wrote into the nodes, by weight path."""
    found: dict[str, Sparsity] = {}
    for node in module.graph.nodes:
        stored = node.meta.get("custom", {}).pop("edgec_sparsity", {})
        for position, weight in _weights_of(node):
            if position in stored:
                found[str(weight.target)] = Sparsity.from_json(stored[position])
    return found


def _layer_from_origin(node: fx.Node) -> str:
    """Module path from export's metadata; for functional calls on a weight, the weight's path without its leaf."""
    stack = node.meta.get("nn_module_stack")
    path = ""
    if stack:
        path = str(next(reversed(stack.values()))[0])
    for argument in node.args:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            owner = str(argument.target).rpartition(".")[0]
            if owner.startswith(path):
                return owner or path or node.name
    return path or node.name


def _same_signature(before: Program, after: Program) -> None:
    for kind in ("inputs", "outputs"):
        old = [(s.shape, s.dtype) for s in getattr(before, kind)]
        new = [(s.shape, s.dtype) for s in getattr(after, kind)]
        if old != new:
            raise EdgecError(f"pass changed the {kind}: {old} became {new}", where=before.name)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _print_node(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"%{node.name} = input : {_type(node)}"
    if node.op == "get_attr":
        tensor = get_weight(module, node).contiguous()
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:8]
        return f"%{node.name} = weight {node.target} #{digest} : {_type(node)}"
    args = ", ".join([_print_arg(a) for a in node.args] + [f"{k}={_print_arg(v)}" for k, v in node.kwargs.items()])
    if node.op == "output":
        return f"return {args}"
    target = (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )
    return f"%{node.name} = {target}({args}) : {_type(node)} @{layer_of(node)}"


def _print_arg(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_print_arg(v) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.9g}"
    return str(value)


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(int(d)) for d in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_type_of(v) for v in value) + ")"
    return type(value).__name__


def _type_of(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else str(value)
    )
