"""Exact collapse of linear structure: parallel branches, consecutive linear layers and constant scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgec.cost import node_macs
from edgec.errors import EdgecError
from edgec.passbase import Context, Pass, option
from edgec.passes.graph.fold_bn import norm_affine
from edgec.passes.keep import check_patterns, fits, layer_names
from edgec.passes.quantization.operators import IDENTITIES, arguments, make_functional
from edgec.passes.reparam.fold_constants import fold_constants
from edgec.passes.reparam.linear_map import LinearMap, add, compact, compose, convolution, identity, scale
from edgec.program import Program, constant_of, is_call, layer_of, origin_of, propagate, shape_of, weight_node
from edgec.sparsity import Sparsity

aten = torch.ops.aten

CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
EMITTED = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
AVERAGES: dict[Any, int] = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2}
# Merging is exact up to float32 rounding; more than this is a mistake in this file.
TOLERANCE = 1e-4
# A merged kernel this many times larger than the largest it is made of is reported: int8 wants scales per channel then.
NOTABLE_GROWTH = 4.0
# Forms of one node that are followed up, deepest first; chains of linear layers are short.
MOST_FORMS = 8


@dataclass(frozen=True)
class Collapsed:
    """One merged place: layer name, what it was made of, MACs for one sample, and max|W merged| / max|W parts|."""

    layer: str
    merged: tuple[str, ...]
    macs_before: int
    macs_after: int
    range_growth: float


@dataclass(frozen=True)
class Collapse(Pass):
    """Replace linear structure by one convolution or linear layer, wherever that costs no more multiplications.

    Found in the graph, not by class name: sums of convolutions, batch norms, averages and the input itself (RepVGG,
    MobileOne, GhostNetV3, dilated branches of UniRepLKNet), consecutive convolutions or linear layers (SESR, low-rank
    pairs that are not low), constant scales and shifts (layer scale, input normalisation), kernels computed from
    weights (difference convolutions, DCLS). Border pixels are exact: what zero padding forbids is left alone.
    Run it before pruning and quantisation; batch norms inside a merged place are folded, others stay.

    Ding et al., "RepVGG: Making VGG-style ConvNets Great Again"; Vasu et al., "MobileOne: An Improved One millisecond
    Mobile Backbone"; Bhardwaj et al., "Collapsible Linear Blocks for Super-Efficient Super Resolution"; Ding et al.,
    "UniRepLKNet"; Chen et al., "DEA-Net"; Khalfaoui-Hassani et al., "Dilated convolution with learnable spacings".
    """

    name: ClassVar[str] = "collapse"

    branches: bool = option(True, "merge parallel branches that are added")
    sequential: bool = option(True, "merge consecutive linear layers")
    scales: bool = option(True, "merge constant scales and shifts into the layer beside them")
    keep: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", layer_names(self.keep, f"{self.name}{{keep}}"))

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with an annotation `collapse`, a tuple of `Collapsed`; `program` itself if none fits."""
        module = program.edit()
        make_functional(module)
        check_patterns(module, self.keep, f"{self.name}{{keep}}")
        folded = fold_constants(module, program, context)
        propagate(module, program.example_inputs)
        made: list[Collapsed] = []
        while merged := self._sweep(program, module, context):
            made += merged
        if not made and not folded:
            return program
        annotations = {**program.annotations, self.name: tuple(made)} if made else program.annotations
        result = program.replace(module, annotations)
        _check(program, result)
        return result

    def _sweep(self, program: Program, module: fx.GraphModule, context: Context) -> list[Collapsed]:
        """Merge every place once, from the output to the input; the larger of two that overlap."""
        finder = _Finder(self, program, module)
        made = []
        for root in reversed(list(module.graph.nodes)):
            if root in finder.gone:
                continue
            form = next((f for f in finder.forms_of(root) if finder.refusal(f) is None), None)
            if form is not None:
                made.append(_emit(program, module, root, form, context))
                finder.forget(form)
        if not made:
            for layer, reason in finder.reported.items():
                context.skip(layer, "not collapsed", reason)
        return made


@dataclass(frozen=True, eq=False)
class _Form:
    """A node as a linear map of `source`; `consumed` are the nodes between, in graph order from the source on."""

    map: LinearMap
    source: fx.Node
    consumed: tuple[fx.Node, ...]

    def then(self, new: LinearMap | None, node: fx.Node) -> list[_Form]:
        return [] if new is None else [_Form(new, self.source, (*self.consumed, node))]


class _Finder:
    """Finds linear forms of nodes, each through nodes that nothing else reads."""

    def __init__(self, options: Collapse, program: Program, module: fx.GraphModule) -> None:
        self.options, self.program, self.module = options, program, module
        self.masked = {path for path, record in program.annotations.items() if isinstance(record, Sparsity)}
        self.reported: dict[str, str] = {}
        self.gone: set[fx.Node] = set()
        self.known: dict[tuple[fx.Node, int, bool], list[_Form]] = {}

    def forget(self, form: _Form) -> None:
        """`form` was replaced: what was known of the nodes around it is no longer true."""
        self.gone.update(form.consumed)
        self.known.clear()

    def forms_of(self, root: fx.Node) -> list[_Form]:
        """The forms of a node that end in something worth replacing, the one that takes in most first."""
        if _is_layer(root) and not self._continues(root.args[0]):
            return []
        axes = self._axes(root)
        found = [] if axes is None else self._forms(root, axes, root)
        return [f for f in sorted(found, key=lambda f: -len(f.consumed)) if self._is_merge(f)]

    def _continues(self, node: Any) -> bool:
        """Whether a layer's input may be merged into the layer."""
        inner = isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1
        return inner and (_is_layer(node) or node.target in (*_TRANSPARENT, *AVERAGES))

    def _axes(self, node: fx.Node) -> int | None:
        """Spatial axes of the form that this node may end: those of the layers under it; None if there is none."""
        todo = [node]
        while todo:
            seen = todo.pop()
            if seen.target in CONVOLUTIONS:
                return CONVOLUTIONS[seen.target]
            if is_call(seen, aten.linear.default):
                return 0
            if seen.target in (*_TRANSPARENT, *AVERAGES):
                todo += [a for a in seen.all_input_nodes if a.op == "call_function" and len(a.users) == 1]
        return None

    def refusal(self, form: _Form) -> str | None:
        """Why a merge that was found is not made, or None."""
        layer = layer_of(form.consumed[-1])
        if any(fits(layer_of(n), self.options.keep) for n in form.consumed):
            return "kept by option"
        weights = [str(a.target) for n in form.consumed for a in n.all_input_nodes if a.op == "get_attr"]
        if any(w in self.masked for w in weights):
            self.reported[layer] = "it has a pruned weight: collapse before pruning"
            return self.reported[layer]
        before = sum(node_macs(self.program, n) for n in form.consumed)
        after = _macs(self.program, form, form.consumed[-1])
        if after > before:
            return f"one layer would take {after} multiplications, not {before}"
        return None

    def _is_merge(self, form: _Form) -> bool:
        """Whether this replaces more than a layer, or a layer with its batch norm (which is fold-bn's work)."""
        layers = [n for n in form.consumed if n.target in CONVOLUTIONS or is_call(n, aten.linear.default)]
        joins = [n for n in form.consumed if is_call(n, aten.add.Tensor, aten.sub.Tensor) and _joins(n)]
        averages = [n for n in form.consumed if n.target in AVERAGES]
        norms = [n for n in form.consumed if is_call(n, aten.batch_norm.default)]
        if not layers:
            return False
        if joins or len(layers) + len(averages) > 1:
            return True
        constants = [n for n in form.consumed if is_call(n, *ARITHMETIC)]
        return bool(constants) and not norms

    def _forms(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        """Forms of a node, deepest first; the last is the node as it is."""
        key = (node, axes, node is root)
        if key not in self.known:
            self.known[key] = self._new_forms(node, axes, root)
        return self.known[key]

    def _new_forms(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        found: list[_Form] = []
        if node.op == "call_function" and (node is root or len(node.users) == 1):
            found = self._through(node, axes, root)[:MOST_FORMS]
        shape = node.meta["val"].shape if isinstance(node.meta.get("val"), torch.Tensor) else None
        if shape is not None and node.meta["val"].dtype == torch.float32:
            if axes == 0 and len(shape) >= 2:
                found.append(_Form(identity(int(shape[-1]), 0), node, ()))
            elif axes and len(shape) == axes + 2:
                found.append(_Form(identity(int(shape[1]), axes), node, ()))
        return found

    def _through(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        """Forms that take in the node itself."""
        if CONVOLUTIONS.get(node.target) == axes or (axes == 0 and is_call(node, aten.linear.default)):
            return self._layer(node, axes, root)
        if axes and AVERAGES.get(node.target) == axes:
            return self._average(node, axes, root)
        if axes and is_call(node, aten.batch_norm.default):
            affine = norm_affine(self.module, node)
            if affine is None:
                return []
            inner = self._forms(node.args[0], axes, root)  # type: ignore[arg-type]
            return [g for f in inner for g in f.then(scale(f.map, *affine), node)]
        if node.target in IDENTITIES:
            return [g for f in self._forms(node.args[0], axes, root) for g in f.then(f.map, node)]  # type: ignore[arg-type]
        if is_call(node, *ARITHMETIC):
            return self._arithmetic(node, axes, root)
        return []

    def _layer(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        given = arguments(node)
        weight, bias = constant_of(self.module, given["weight"]), constant_of(self.module, given["bias"])
        if weight is None or (given["bias"] is not None and bias is None) or weight.dtype != torch.float32:
            return []
        source = given["input"]
        if axes == 0:
            outer: LinearMap | None = convolution(weight, bias, (), (), (), 1)
        else:
            outer = _convolution(node, given, weight, bias, axes)
        if outer is None:
            return []
        inner = self._forms(source, axes, root)
        if not self.options.sequential:
            inner = [f for f in inner if not any(_is_layer(n) for n in f.consumed)]
        if not self.options.scales:
            inner = [f for f in inner if not f.consumed or any(_is_layer(n) for n in f.consumed)]
        found = []
        for form in inner:
            # A batch norm in front belongs to fold-bn, unless a layer or a branch is merged along with it.
            for made in form.then(outer if not form.consumed else compose(outer, form.map), node):
                if self._pays(made):
                    found.append(made)
        return found

    def _pays(self, form: _Form) -> bool:
        before = sum(node_macs(self.program, n) for n in form.consumed)
        return _macs(self.program, form, form.consumed[-1]) <= before

    def _average(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        given = arguments(node)
        kernel = _tuple(given["kernel_size"], axes)
        stride = _tuple(given["stride"], axes) if given["stride"] else kernel
        pads = _tuple(given["padding"], axes)
        if given["ceil_mode"] or given.get("divisor_override") or (any(pads) and not given["count_include_pad"]):
            return []
        channels = int(node.meta["val"].shape[1])
        weight = torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
        outer = convolution(weight, None, stride, tuple((p, p) for p in pads), (1,) * axes, channels)
        found = []
        for form in self._forms(given["input" if "input" in given else "self"], axes, root):
            if not form.consumed:
                found += form.then(outer, node)
        return found

    def _arithmetic(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        left, right = node.args[0], node.args[1]
        if node.kwargs.get("alpha", 1) != 1:
            return []
        if _joins(node):
            return self._join(node, axes, root)
        product = is_call(node, aten.mul.Tensor, aten.div.Tensor)
        if isinstance(left, fx.Node) and left.op != "get_attr":
            value, tensor, swapped = right, left, False
        else:
            value, tensor, swapped = left, right, True
        if not isinstance(tensor, fx.Node) or tensor.op == "get_attr" or not self.options.scales:
            return []
        shape = node.meta["val"].shape
        if tuple(tensor.meta["val"].shape) != tuple(shape):
            return []
        vector = _per_channel(self.module, value, axes, int(shape[1 if axes else -1]), len(shape))
        if vector is None or (swapped and is_call(node, aten.div.Tensor)):
            return []
        found = []
        for form in self._forms(tensor, axes, root):
            if is_call(node, aten.div.Tensor):
                new = scale(form.map, 1 / vector)
            elif product:
                new = scale(form.map, vector)
            elif is_call(node, aten.add.Tensor):
                new = scale(form.map, 1.0, vector)
            else:
                new = scale(form.map, -1.0, vector) if swapped else scale(form.map, 1.0, -vector)
            found += form.then(new, node)
        return found

    def _join(self, node: fx.Node, axes: int, root: fx.Node) -> list[_Form]:
        """A sum of two maps of one tensor."""
        left, right = node.args[0], node.args[1]
        if not is_call(node, aten.add.Tensor, aten.sub.Tensor) or not self.options.branches:
            return []
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        if shape_of(left) != shape_of(right):
            return []
        found = []
        for a in self._forms(left, axes, root):
            for b in self._forms(right, axes, root):
                if a.source is not b.source:
                    continue
                second = b.map if is_call(node, aten.add.Tensor) else scale(b.map, -1.0)
                joined = add(a.map, second, shape_of(a.source)[2:] if axes else ())
                if joined is None:
                    continue
                form = _Form(joined, a.source, tuple(dict.fromkeys((*a.consumed, *b.consumed, node))))
                # A sum of a tensor with itself or its batch norm becomes part of a layer only together with one.
                if not any(_is_layer(n) for n in form.consumed) or self._pays(form):
                    found.append(form)
        return found


_TRANSPARENT = (*ARITHMETIC, aten.batch_norm.default, *IDENTITIES)


def _is_layer(node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS or is_call(node, aten.linear.default)


def _joins(node: fx.Node) -> bool:
    """Whether an element-wise call has two computed operands."""
    return all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args[:2])


def _macs(program: Program, form: _Form, at: fx.Node) -> int:
    """Multiplications of the form as one layer, for one sample."""
    shape = shape_of(at)
    batch = program.example_inputs[0].shape[0] if program.dynamic_batch else 1
    positions = math.prod(shape) // form.map.outputs // batch
    per_position = form.map.macs if form.map.stride else form.map.outputs * form.map.inputs
    return per_position * positions


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * axes if len(values) == 1 else values))


def _convolution(
    node: fx.Node, given: dict[str, Any], weight: torch.Tensor, bias: torch.Tensor | None, axes: int
) -> LinearMap:
    stride, dilation = _tuple(given["stride"], axes), _tuple(given["dilation"], axes)
    padding = given["padding"]
    if padding == "same":
        # PyTorch puts the odd element at the end.
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, axes))
    return convolution(weight, bias, stride, pads, dilation, int(given["groups"]))


def _per_channel(module: fx.GraphModule, value: Any, axes: int, channels: int, rank: int) -> torch.Tensor | None:
    """A constant as float64 [channels], or None when it is not constant or varies along another axis."""
    if isinstance(value, (int, float)):
        return torch.full((channels,), float(value), dtype=torch.float64)
    tensor = constant_of(module, value)
    if tensor is None or not tensor.dtype.is_floating_point:
        return None
    if tensor.numel() == 1 and tensor.dim() <= rank:
        return tensor.double().reshape(1).expand(channels)
    shape = [1] * (rank - tensor.dim()) + list(tensor.shape)
    axis = 1 if axes else rank - 1
    if len(shape) != rank or shape[axis] != channels or math.prod(shape) != channels:
        return None
    return tensor.double().reshape(-1)


def _emit(program: Program, module: fx.GraphModule, root: fx.Node, form: _Form, context: Context) -> Collapsed:
    """Put one layer in the place of the consumed nodes."""
    layers = [n for n in form.consumed if _is_layer(n)]
    largest = max(float(_weight(module, n).abs().max()) for n in layers)
    before = sum(node_macs(program, n) for n in form.consumed)
    path = str(layers[0].args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    path = f"{path}.collapsed" if path else "collapsed"
    with module.graph.inserting_before(root):
        if form.map.stride:
            merged, dilation = compact(form.map)
            weight = weight_node(module, f"{path}.weight", merged.weight.float())
            bias = weight_node(module, f"{path}.bias", merged.bias.float())
            pads = [first for first, _ in merged.pads]
            args = (form.source, weight, bias, list(merged.stride), pads, list(dilation), merged.groups)
            made = module.graph.call_function(EMITTED[len(merged.stride)], args)
        else:
            merged = form.map
            if merged.groups > 1:  # a sum with the input itself
                zero = LinearMap(torch.zeros(merged.outputs, merged.inputs, dtype=torch.float64), merged.bias * 0)
                merged = add(merged, zero, ()) or merged
            weight = weight_node(module, f"{path}.weight", merged.weight.float())
            bias = weight_node(module, f"{path}.bias", merged.bias.float())
            made = module.graph.call_function(aten.linear.default, (form.source, weight, bias))
    made.meta.update(root.meta)
    made.meta["edgec_layer"] = layer_of(layers[0]) if len(layers) == 1 else _common_owner(form.consumed)
    made.meta["edgec_origin"] = origin_of(root)
    root.replace_all_uses_with(made)
    for node in reversed(form.consumed):
        if not node.users:
            module.graph.erase_node(node)
    growth = float(merged.weight.abs().max()) / largest if largest else 1.0
    layer = layer_of(made)
    if growth > NOTABLE_GROWTH:
        context.skip(
            layer, "weight range grew", f"{growth:.1f} times by the merge: quantise it with a scale per channel"
        )
    names = tuple(dict.fromkeys(layer_of(n) for n in form.consumed))
    return Collapsed(layer, names, before, node_macs(program, made), growth)


def _weight(module: fx.GraphModule, layer: fx.Node) -> torch.Tensor:
    weight = constant_of(module, layer.args[1])
    assert weight is not None
    return weight


def _common_owner(nodes: tuple[fx.Node, ...]) -> str:
    """The module that contains all the layers, or the last layer when they share none."""
    paths = [layer_of(n).split(".") for n in nodes if _is_layer(n)]
    shared = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or layer_of([n for n in nodes if _is_layer(n)][-1])


def _check(before: Program, after: Program) -> None:
    """Both Programs on noise of both signs, borders included."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.dtype.is_floating_point else x
        for x in before.example_inputs
    )
    for want, got in zip(before(*inputs), after(*inputs), strict=True):
        error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))
        if want.dtype.is_floating_point and not error <= TOLERANCE:
            raise EdgecError(
                f"merged graph differs by {error:.2g} of the largest output (allowed {TOLERANCE:g})",
                where=f"pass {Collapse.name}",
                hint="this is a bug in edgec: please report the model; keep=[...] leaves layers alone",
            )
