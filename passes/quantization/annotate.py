"""Decide which nodes of a graph become int8, and which node's range each of them needs.

Convolutions and linear layers multiply int8 numbers wherever they can. Any other tensor is put on a grid of 256 values
only if that pays, because grids are where accuracy is lost:

* Averages, clips and data movement behind an int8 tensor, because they shrink it or are free.
* Element-wise calls and concatenations when int8 tensors come in and their result reaches a layer. So the box decoding
  of a detector and the like, which lead to no layer, stay float.
* Data movement in front of layers, so that the smaller int8 tensor is moved.
* Results of layers that one of these reads. A layer that only float calls read gives real numbers: its accumulators
  are scaled and not rounded.

In a transformer that leaves the inputs of the linear layers. Sums that a norm reads stay float, because the residual
stream has a few channels of much larger range, which one scale per tensor cannot serve; so do sums with a float result,
and GELU and its like behind linear layers.

A pass that knows from elsewhere which tensors have codes decides for itself (`Decide`).

That is nonlinear="auto". With "integer", for cores without floating point, functions become tables wherever one comes
directly behind a layer, sums at the end of the graph are int8, and every layer gives codes. With "float" no curved
function becomes a table.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import fx

from edgec import tokenops as tokenops
from edgec.passes.quantization.operators import (
    CONV2D,
    CURVED,
    FLOAT_BEHIND_LINEAR,
    IDENTITIES,
    MOVES,
    SPLITTERS,
    Kind,
    aten,
    changes_in_place,
    classify,
    has_channel_tables,
    is_float,
    op_name,
    operand,
)
from edgec.program import is_call, layer_of, shape_of

edgec = torch.ops.edgec
NORMS = (aten.layer_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.rms_norm.default)
# What norms that are written out begin with.
NORM_PARTS = (aten.pow.Tensor_Scalar, aten.var.correction, aten.var.dim, aten.var_mean.correction, aten.std.correction)

# Operators that compare numbers: codes would make ties, and the layers in front would round for nobody else.
CHOOSING = (edgec.tome_merge.default, edgec.token_reduce.default, edgec.token_keep.default, edgec.class_score.default)


@dataclass
class Annotation:
    """kinds: the int8 nodes. real: those layers among them whose result is float. fused: producer -> the clip that is
    part of it. tied: producer -> the concatenation whose scale it takes over. skipped: (layer, operator, reason) of
    what stays float.
    """

    kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    real: set[fx.Node] = field(default_factory=set)
    fused: dict[fx.Node, fx.Node] = field(default_factory=dict)
    tied: dict[fx.Node, fx.Node] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def is_int8(self, node: object) -> bool:
        return node in self.kinds

    def result(self, node: fx.Node) -> fx.Node:
        """The node whose value the int8 kernel of `node` produces: the clip that is part of it, or itself."""
        return self.fused.get(node, node)

    def producer(self, node: fx.Node) -> fx.Node:
        """The inverse of `result`."""
        first = node.args[0] if node.args else None
        return first if isinstance(first, fx.Node) and self.fused.get(first) is node else node

    def observed(self, node: fx.Node) -> fx.Node:
        """The node whose range gives `node` its codes; itself for float nodes that are quantised for a consumer."""
        node = self.producer(node)
        kind = self.kinds.get(node)
        if kind in (Kind.SHARE, Kind.CLIP, Kind.SCALE):
            return self.observed(operand_nodes(node)[0])
        if node in self.tied:
            return self.observed(self.tied[node])
        return self.result(node)

    def channel_axis(self, node: fx.Node) -> int | None:
        """1 when every channel of a layer's result may have its own scale, else None.

        That is so when its only reader looks its codes up in a table per channel (PReLU): the table then undoes the
        scales, and the layer has a multiplier per channel anyway.
        """
        readers = list(node.users)
        alone = self.kinds.get(node) is Kind.LAYER and node not in self.fused and len(readers) == 1
        if not alone or self.kinds.get(readers[0]) is not Kind.TABLE or not has_channel_tables(readers[0]):
            return None
        return 1 if is_call(node, *CONV2D) or len(shape_of(node)) == 2 else None

    def ranged(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes whose ranges give codes their meaning, in graph order."""
        found = {self.observed(n) for n in self.kinds if n not in self.real} | set(self.boundary(graph))
        return [n for n in graph.nodes if n in found and n.op != "get_attr"]

    def boundary(self, graph: fx.Graph) -> list[fx.Node]:
        """The float nodes that int8 nodes read, in graph order."""
        read = {x for node in self.kinds for x in operand_nodes(node) if not self.is_int8(x) and x.op != "get_attr"}
        return [n for n in graph.nodes if n in read]


# (what could become int8 and how, why the others cannot, which the function completes) -> an Annotation with `kinds`
# and `real` filled in
Decide = Callable[[dict[fx.Node, Kind], dict[fx.Node, str]], Annotation]


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensors that an int8 form of `node` reads as codes: for layers and tables only the first argument."""
    first = node.args[0]
    if isinstance(first, (list, tuple)):
        return [x for x in first if isinstance(x, fx.Node)]
    if is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        return [x for x in node.args[:2] if isinstance(x, fx.Node) and is_float(x) and not _is_stored_number(x)]
    return [first] if isinstance(first, fx.Node) else []


def _is_stored_number(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.meta["val"].numel() == 1


def annotate(
    module: fx.GraphModule,
    keep_float: Callable[[str], bool],
    nonlinear: str = "auto",
    held: Mapping[fx.Node, str] = MappingProxyType({}),
    decide: Decide | None = None,
) -> Annotation:
    """Annotate a graph. `keep_float(layer name)` tells which layers the user wants left alone; nonlinear: one of
    `operators.NONLINEAR`, see above; held: other nodes to leave alone, with the reason; decide: chooses instead of
    `nonlinear`.
    """
    candidates, reasons = _candidates(module, keep_float, nonlinear, held, decide is not None)
    found = _chosen(module, candidates, nonlinear) if decide is None else decide(candidates, reasons)
    _fuse_clips(found)
    _tie_concatenations(found)
    for node in module.graph.nodes:
        if is_float(node) and node.op == "call_function" and not found.is_int8(node):
            if is_call(node, *MOVES, *IDENTITIES):
                continue  # computes nothing
            reason = reasons.get(node, "no int8 layer on both sides: int8 would only add conversions")
            if reason:
                found.skipped.append((layer_of(node), op_name(node), reason))
    return found


def _chosen(module: fx.GraphModule, candidates: dict[fx.Node, Kind], nonlinear: str) -> Annotation:
    reaches = _reaching_layers(module, candidates)
    pays = _pays_integer if nonlinear == "integer" else _pays
    found = Annotation()
    for node in module.graph.nodes:
        kind = candidates.get(node)
        if kind is not None and pays(node, kind, candidates, reaches, found):
            found.kinds[node] = kind
    if nonlinear != "integer":
        _find_real(module, found)
    return found


def _candidates(
    module: fx.GraphModule,
    keep_float: Callable[[str], bool],
    nonlinear: str,
    held: Mapping[fx.Node, str],
    decided: bool = False,
) -> tuple[dict[fx.Node, Kind], dict[fx.Node, str]]:
    """decided: what is left float for the sake of accuracy is a candidate too."""
    kinds: dict[fx.Node, Kind] = {}
    reasons: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        kind, reason = classify(module, node)
        if is_call(node, *CONV2D) and any(is_call(u, aten.batch_norm.default) for u in node.users):
            kind, reason = None, "a batch norm follows: run fold-bn first"
        if kind is not None and any(changes_in_place(user, node) for user in node.users):
            kind, reason = None, "is changed in place"
        if kind in (Kind.PAIR, Kind.CONCAT) and not decided and _is_normalised(node):
            kind, reason = None, "is normalised afterwards: one scale does not serve a residual stream"
        if kind is Kind.TABLE and not decided and _stays_curved(node, nonlinear):
            kind, reason = None, "is computed in float before the result is rounded"
        if kind is not None and not decided and node.users and all(is_call(u, *CHOOSING) for u in node.users):
            kind, reason = None, "tokens are chosen by it, in float"
        if node in held:
            kind, reason = None, held[node]
        moves = is_call(node, *MOVES, *IDENTITIES, *SPLITTERS)
        if kind is not None and not moves and keep_float(layer_of(node)):
            kind, reason = None, "kept float by keep_float"
        if kind is None:
            reasons[node] = reason
        else:
            kinds[node] = kind
    for node in list(kinds):
        if is_call(node, *SPLITTERS) and any(user not in kinds for user in node.users):
            del kinds[node]  # a list of codes cannot be read as a list of reals
    return kinds, reasons


def _is_normalised(node: fx.Node) -> bool:
    """True when a norm over features reads `node`, directly or after data movement; it may be written out."""
    norms = (*NORMS, *NORM_PARTS)
    return any(is_call(u, *norms) or (is_call(u, *MOVES) and _is_normalised(u)) for u in node.users)


def _stays_curved(node: fx.Node, nonlinear: str) -> bool:
    """True for a function that is computed in float although it could be a table."""
    if nonlinear == "float":
        return is_call(node, *CURVED)
    return (
        nonlinear == "auto"
        and is_call(node, *FLOAT_BEHIND_LINEAR)
        and is_call(_unmoved(operand(node)), aten.linear.default)
    )


def _unmoved(node: fx.Node) -> fx.Node:
    """The node that computed the elements of `node`: the start of a chain of data movement."""
    while is_call(node, *MOVES, *SPLITTERS, *IDENTITIES):
        node = operand(node)
    return node


def _reaching_layers(module: fx.GraphModule, candidates: dict[fx.Node, Kind]) -> set[fx.Node]:
    """Nodes from which a path of int8 candidates leads into a layer."""
    reaching: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        for user in node.users:
            kind = candidates.get(user)
            if kind is not None and node in operand_nodes(user) and (kind is Kind.LAYER or user in reaching):
                reaching.add(node)
    return reaching


def _pays(node: fx.Node, kind: Kind, candidates: dict[fx.Node, Kind], reaches: set[fx.Node], found: Annotation) -> bool:
    coded = [found.is_int8(x) for x in operand_nodes(node)]
    if kind is Kind.LAYER:
        return True
    if kind is Kind.SHARE:
        if any(coded) or is_call(node, operator.getitem):
            return any(coded)
        return _only_feeds_layers(node, candidates) and not _drops(node)
    if kind in (Kind.POOL, Kind.CLIP, Kind.SCALE):
        return any(coded)
    if kind is Kind.PAIR and any(_is_computed(x, found) for x in operand_nodes(node)):
        return False  # in float the operands need no grid, and no conversion
    return any(coded) and node in reaches


def _drops(node: fx.Node) -> bool:
    """True for a move that leaves elements out: better before rounding, which then does less and fits the rest."""
    return is_float(node) and math.prod(shape_of(node)) < math.prod(shape_of(operand(node)))


def _is_computed(node: fx.Node, found: Annotation) -> bool:
    """True for a float result that no int8 node reads; inputs of the graph and stored tensors are none."""
    computed = _unmoved(node).op == "call_function"
    return computed and not found.is_int8(node) and not _has_int8_reader(node, found)


def _find_real(module: fx.GraphModule, found: Annotation) -> None:
    """Find the layers whose codes nobody would read. What moves, clips or scales their results becomes float."""
    read: set[fx.Node] = set()
    passing = (Kind.SHARE, Kind.CLIP, Kind.SCALE)
    for node in reversed(module.graph.nodes):
        if any(found.kinds.get(u) not in (None, *passing) or u in read for u in _code_readers(node, found)):
            read.add(node)
    for node in list(found.kinds):
        kind = found.kinds[node]
        if node in read or not (kind is Kind.LAYER or kind in passing):
            continue
        if kind is Kind.LAYER:
            found.real.add(node)
        elif all(x in found.real or not found.is_int8(x) for x in operand_nodes(node)):
            del found.kinds[node]


def _code_readers(node: fx.Node, found: Annotation) -> list[fx.Node]:
    return [u for u in node.users if found.is_int8(u) and node in operand_nodes(u)]


def _pays_integer(
    node: fx.Node, kind: Kind, candidates: dict[fx.Node, Kind], reaches: set[fx.Node], found: Annotation
) -> bool:
    operands = operand_nodes(node)
    coded = [x for x in operands if found.is_int8(x)]
    if kind is Kind.LAYER:
        return True
    if kind is Kind.SHARE:
        return bool(coded) or (not is_call(node, operator.getitem) and _only_feeds_layers(node, candidates))
    if not coded:
        return False
    if kind in (Kind.POOL, Kind.CLIP, Kind.SCALE) or node in reaches:
        return True
    behind_layer = any(_is_lone_layer(x, found) for x in coded)
    if kind is Kind.TABLE:
        return behind_layer
    if kind is Kind.PAIR:
        return behind_layer and all(found.is_int8(x) or _has_int8_reader(x, found) for x in operands)
    return False


def _only_feeds_layers(node: fx.Node, candidates: dict[fx.Node, Kind]) -> bool:
    """True when every reader of `node` reads codes: layers, at the end of data movements or directly."""
    for user in node.users:
        kind = candidates.get(user)
        if kind is Kind.LAYER and node in operand_nodes(user):
            continue
        if kind is Kind.SHARE and _only_feeds_layers(user, candidates):
            continue
        return False
    return bool(node.users)


def _is_lone_layer(node: fx.Node, found: Annotation) -> bool:
    """True for a layer's result, clipped or not, with one reader."""
    if len(node.users) != 1:
        return False
    kind = found.kinds.get(node)
    if kind is Kind.CLIP:
        return _is_lone_layer(operand_nodes(node)[0], found)
    return kind is Kind.LAYER


def _has_int8_reader(node: fx.Node, found: Annotation) -> bool:
    return bool(_code_readers(node, found))


def _fuse_clips(found: Annotation) -> None:
    """Clips whose operand nobody else reads become part of the kernel that computes the operand."""
    computed = (Kind.LAYER, Kind.POOL, Kind.PAIR)
    for node, kind in found.kinds.items():
        before = operand_nodes(node)[0] if kind is Kind.CLIP else None
        if (
            before is not None
            and before not in found.real
            and len(before.users) == 1
            and found.kinds.get(before) in computed
        ):
            found.fused[before] = node


def _tie_concatenations(found: Annotation) -> None:
    """Operands that only a concatenation reads are produced with its scale, so that it only copies."""
    computed = (Kind.LAYER, Kind.POOL, Kind.PAIR, Kind.TABLE, Kind.CONCAT)
    for node, kind in found.kinds.items():
        if kind is not Kind.CONCAT:
            continue
        for before in operand_nodes(node):
            producer = found.producer(before)
            if len(before.users) == 1 and found.kinds.get(producer) in computed:
                found.tied[producer] = node
