"""A model that comes quantised becomes integer, with the scales that it came with.

ONNX files in QDQ form, graphs of PyTorch's PT2E quantisation and models with fake quantisation compute real numbers and
round them, where `edgec::quantize` and `edgec::dequantize` stand one behind the other. Each such pair says what the
codes of a tensor mean. The pass takes the pairs out, hands their scales to the converter that all quantisation passes
use, and gives it the weights' own scales and codes.

    codes of x, weights on a grid -> layer -> (clip, moves) -> pair      an integer layer that gives codes
    codes of x, weights on a grid -> layer -> anything else             an integer layer that gives real numbers
    codes -> function, sum, average, concatenation -> pair              the same on codes
    codes -> clip, or pair with another grid                            a table

Everything else stays float, with weights stored as the codes that they came as. A pair there becomes a clamp: what it
cut off stays cut off, nothing is rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx

from edgec.as_conv2d import as_conv2d
from edgec.importing.quantized import KEY, StoredCodes, comes_quantised, stored_codes
from edgec.integer import CODE_SPAN, QMAX, QMIN, REQUANTS, WEIGHT_MAX
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.graph.fold_bn import fold_back, norm_affine
from edgec.passes.keep import check_patterns, fits, layer_names
from edgec.passes.quantization.annotate import Annotation, annotate, operand_nodes
from edgec.passes.quantization.convert import WeightRule
from edgec.passes.quantization.operators import (
    LAYERS,
    SPLITTERS,
    Kind,
    arguments,
    clip_limits,
    operand,
    scalar_of,
)
from edgec.passes.quantization.ptq import Prepared, choose_requant, convert, editable
from edgec.passes.quantization.quantize_weights import STORAGE, Grouped, refusal, store_codes
from edgec.program import (
    Program,
    constant_of,
    get_weight,
    is_call,
    layer_of,
    origin_of,
    propagate,
    shape_of,
    weight_node,
)
from edgec.quantparams import SMALLEST_SCALE, QParams, code_range, quantize_weights
from edgec.sparsity import Carrier

aten = torch.ops.aten
edgec = torch.ops.edgec

# Where a node has the grid of a pair that stood there.
GRID = "edgec_grid"
# What a weight may differ from a whole number of steps: it was rounded to float32, from a scale that was.
EXACT = 2e-6
# A limit of a clip that is so near a code is that code.
NEAR_CODE = 1e-3
PASSING = (Kind.SHARE, Kind.CLIP, Kind.SCALE)


@dataclass(frozen=True)
class AdoptSummary:
    """What the pass did. quantised, kept_float: convolutions and linear layers by name. grids: pairs that it found.
    packed: those of the float layers whose weights stay codes.
    """

    quantised: tuple[str, ...]
    kept_float: tuple[str, ...]
    grids: int
    packed: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.quantised) + len(self.kept_float)
        stored = f", the weights of {len(self.packed)} more stay codes" if self.packed else ""
        return f"came quantised: its own scales make {len(self.quantised)} of {total} layers integer{stored}"


@dataclass(frozen=True)
class AdoptQdq(Pass):
    """Integer kernels for a model that comes quantised, with its own scales, zero points and weights.

    For ONNX files with QuantizeLinear, DequantizeLinear or QLinear operators, for PyTorch graphs with
    `quantized_decomposed` operators or fake quantisation. No data is needed. `edgec compile` runs it by itself in front
    of the other passes. What has no scale in the file stays float.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    """

    name: ClassVar[str] = "adopt-qdq"
    needs: ClassVar[Needs] = Needs.NOTHING

    requant: str = option(
        "auto",
        "how layers round: RQ1 with integers, RQF with a float32 product; auto: as is fastest on the target",
        choices=("auto", *REQUANTS),
    )
    recode: bool = option(
        False, "round weights whose codes are up to 255 steps from their zero point, as uint8 ones are, to 127 steps"
    )
    pack: bool = option(
        True, "store the weights of layers that stay float as codes; false: in float32, for a pass that quantises them"
    )
    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep_float", layer_names(self.keep_float, f"{self.name}{{keep_float}}"))

    def run(self, program: Program, context: Context) -> Program:
        if not comes_quantised(program):
            context.skip(program.name, self.name, "the model does not come quantised: it has no scales of its own")
            return program
        module, masks = editable(program)
        grids = mark_pairs(module)
        as_conv2d(module, masks)
        check_patterns(module, self.keep_float, f"{self.name}{{keep_float}}")
        stored = _fold_norms(module, masks, stored_codes(program))
        _join_biases(module)
        propagate(module, program.example_inputs)
        adoption = Adoption.of(module, stored, self.recode)
        annotation = annotate(
            module, lambda layer: fits(layer, self.keep_float), held=adoption.held, decide=adoption.decide
        )
        adoption.untie(annotation)
        for layer, what, reason in annotation.skipped:
            context.skip(layer, what, reason)
        prepared = Prepared(program, module, annotation, masks)
        summary = self._summary(prepared, grids)
        records, packed = self._pack(prepared, stored) if self.pack else ({}, [])
        summary = dataclasses.replace(summary, packed=tuple(packed))
        observed = adoption.observed(annotation)
        integers = convert(prepared, observed, adoption.rule, choose_requant(self.requant, context))
        _join_borders(module)
        kept = {k: v for k, v in program.annotations.items() if k != KEY}
        made = dataclasses.replace(program, annotations=kept)
        integers = dataclasses.replace(integers, prepared=dataclasses.replace(prepared, program=made))
        integers.records.update(records)
        return integers.finish({self.name: summary})

    def _pack(self, prepared: Prepared, stored: tuple[StoredCodes, ...]) -> tuple[dict[str, QParams], list[str]]:
        """Store the weights of layers that stay float as the codes that they came as; (records by path, the layers)."""
        module, records, layers = prepared.module, {}, []
        made: dict[str, fx.Node] = {}
        for node in list(module.graph.nodes):
            layer = layer_of(node)
            if not is_call(node, *LAYERS) or prepared.annotation.is_int8(node) or fits(layer, self.keep_float):
                continue
            if refusal(node):
                continue
            path = str(node.args[1].target)  # type: ignore[union-attr]
            if path not in made:
                found = find_groups(get_weight(module, node.args[1]).numpy(), stored)  # type: ignore[arg-type]
                if found is None:
                    continue
                made[path], codes, record = store_codes(module, node, path, *found, "the file")
                records[codes] = record
            node.update_arg(1, made[path])
            layers.append(layer)
        return records, layers

    def _summary(self, prepared: Prepared, grids: int) -> AdoptSummary:
        layers = [n for n in prepared.module.graph.nodes if is_call(n, *LAYERS)]
        integer = set(prepared.layers)
        quantised = tuple(layer_of(n) for n in layers if n in integer)
        return AdoptSummary(quantised, tuple(layer_of(n) for n in layers if n not in integer), grids)


# -- pairs -------------------------------------------------------------------------------------------------------------


def mark_pairs(module: fx.GraphModule) -> int:
    """Replace each pair by a clamp to the range of its codes that knows their grid, in place; returns how many.

    Codes that something else than a dequantisation reads are made behind the clamp; codes that something else than a
    quantisation makes have a grid when they are dequantised.
    """
    graph, made = module.graph, {}
    for node in list(graph.nodes):
        if not is_call(node, edgec.quantize.default):
            continue
        _, scale, zero = node.args
        grid = QParams(float(np.float32(scale)), int(zero), source="the file")
        _mark(graph, node, node, grid, made)
        for user in list(node.users):
            if is_call(user, aten.clamp.default):
                low, high = (int(v) for v in user.args[1:3])
                if QMIN <= low <= high <= QMAX:
                    bits = max(2, (high - low).bit_length())
                    _mark(graph, node, user, dataclasses.replace(grid, n=low, p=high, bits=bits), made)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if is_call(node, aten.view.default, aten._unsafe_view.default):
            # Dequantised numbers lie in memory in order; what they were made of may not.
            node.target = aten.reshape.default
        if is_call(node, edgec.dequantize.default):
            _, scale, zero = node.args
            node.meta[GRID] = QParams(float(np.float32(scale)), int(zero), source="the file")
    return len(made)


def _mark(graph: fx.Graph, quantize: fx.Node, codes: fx.Node, grid: QParams, made: dict[Any, fx.Node]) -> None:
    """Give the dequantisations of `codes` a clamp of what `quantize` reads."""
    x, scale, zero = quantize.args
    assert isinstance(x, fx.Node)
    readers = [u for u in codes.users if is_call(u, edgec.dequantize.default) and u.args[1:] == (scale, zero)]
    limits = codes.users if codes is not quantize else [u for u in codes.users if not is_call(u, aten.clamp.default)]
    others = codes is quantize and any(u not in readers for u in limits)
    if not readers and not others:
        return
    key = (x, grid)
    if key not in made:
        with graph.inserting_before(quantize):
            made[key] = graph.call_function(aten.clamp.default, (x, *grid.range))
        rounded = origin_of(readers[0] if readers else x)
        made[key].meta.update(val=x.meta["val"], edgec_layer=layer_of(x), edgec_origin=rounded, **{GRID: grid})
    for reader in readers:
        reader.replace_all_uses_with(made[key])
        graph.erase_node(reader)
    if others:
        quantize.replace_input_with(x, made[key])


def _fold_norms(module: fx.GraphModule, masks: Carrier, stored: tuple[StoredCodes, ...]) -> tuple[StoredCodes, ...]:
    """Fold the batch norms behind layers whose codes are known, in place; returns the records of all codes.

    The codes stay what they are, or change their sign, and each output channel gets a scale of its own.
    """
    added = []
    for norm in list(module.graph.nodes):
        layer = norm.args[0] if is_call(norm, aten.batch_norm.default) else None
        weight = constant_of(module, layer.args[1]) if is_call(layer, *LAYERS) else None  # type: ignore[union-attr]
        affine = None if weight is None or weight.dtype != torch.float32 else norm_affine(module, norm)
        found = None if weight is None or affine is None else find_codes(weight.numpy(), stored)
        if found is None or affine is None or fold_back(module, norm, masks) is not None:
            continue
        factor = affine[0].numpy()
        signs = np.where(factor < 0, -1, 1).reshape(-1, *[1] * (found.steps.ndim - 1))
        added.append(StoredCodes.of(found.steps * signs, (found.scales * np.abs(factor)).astype(np.float32)))
    return (*stored, *added)


def _join_biases(module: fx.GraphModule) -> None:
    """Give a layer without bias the stored vector that is added to its result, in place."""
    for node in list(module.graph.nodes):
        if not is_call(node, *LAYERS) or arguments(node)["bias"] is not None or len(node.users) != 1:
            continue
        (user,) = node.users
        if not is_call(user, aten.add.Tensor) or arguments(user)["alpha"] != 1:
            continue
        other = next((a for a in user.args[:2] if a is not node), None)
        vector, shape = constant_of(module, other), shape_of(node)
        if vector is None or not isinstance(other, fx.Node) or shape_of(user) != shape or vector.dtype != torch.float32:
            continue
        axis = len(shape) - 1 if is_call(node, aten.linear.default) else 1
        wide = [1] * (len(shape) - vector.dim()) + list(vector.shape)
        if wide != [shape[axis] if i == axis else 1 for i in range(len(shape))]:
            continue
        with module.graph.inserting_before(node):
            bias = weight_node(module, f"{other.target}_joined", vector.reshape(-1))
        node.args = (*node.args[:2], bias, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
        user.replace_all_uses_with(node)
        module.graph.erase_node(user)


def _join_borders(module: fx.GraphModule) -> None:
    """Drop quantisations of codes of the same grid, and clamps to what a quantisation limits itself, in place."""
    for node in list(module.graph.nodes):
        if not is_call(node, edgec.quantize.default):
            continue
        before = operand(node)
        if is_call(before, edgec.dequantize.default) and before.args[1:] == node.args[1:]:
            node.replace_all_uses_with(operand(before))
        grid = before.meta.get(GRID) if is_call(before, aten.clamp.default) else None
        if grid is not None and (grid.n, grid.p) == (QMIN, QMAX) and grid.per_tensor == node.args[1:]:
            node.replace_input_with(before, operand(before))
    module.graph.eliminate_dead_code()


# -- weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundCodes:
    """steps: whole numbers, of the weight's shape; scales: float64, one per output channel. weight = step * scale.

    zeros: what to add to steps for the codes of the file: one number, or one per output channel.
    """

    steps: np.ndarray
    scales: np.ndarray
    zeros: tuple[int, ...] = (0,)


def find_codes(weight: np.ndarray, stored: tuple[StoredCodes, ...]) -> FoundCodes | None:
    """The codes, less their zero point, that a weight [outputs, ...] was made of, if it is one of `stored`.

    A weight that was transposed, reshaped or flipped since is found as well; one that was changed is not.
    """
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    found: FoundCodes | None = None
    for record in stored:
        if record.block or len(record.scale) not in (1, len(weight)):
            continue
        scales = np.broadcast_to(np.asarray(record.scale, np.float64), (len(weight),))
        known = np.where(scales != 0, scales, SMALLEST_SCALE)
        if _steps(rows[:, :8], known) is None:
            continue
        steps = _steps(rows, known)
        if steps is not None:
            match = FoundCodes(steps.reshape(weight.shape), known, record.zeros)
            if record.holds(steps):
                return match
            # Scales of another weight, or of the one that this is a part of.
            found = found or match
    return found


def find_groups(weight: np.ndarray, stored: tuple[StoredCodes, ...]) -> tuple[Grouped, int, int] | None:
    """(codes, group, bits) of a weight [outputs, inputs, ...] in the form of `edgec::dequantize_weight`, if it is one
    of `stored`: with scales for blocks of inputs, for output channels, or for the tensor.
    """
    outputs, inputs = weight.shape[:2]
    found = find_codes(weight, stored)
    if found is not None:
        zeros = np.broadcast_to(np.array(found.zeros), (outputs,) if len(found.zeros) == 1 else (len(found.zeros),))
        if len(zeros) == outputs:
            return _grouped(found.steps, found.scales.reshape(-1, 1), zeros.reshape(-1, 1), inputs)
    for record in stored if weight.ndim == 2 else ():
        groups = -(-inputs // record.block) if record.block else 0
        if not groups or record.shape not in ((outputs, groups), (groups, outputs)) or 0 in record.scale:
            continue
        scale = np.array(record.scale, np.float64).reshape(record.shape)
        zeros = np.broadcast_to(
            np.array(record.zeros).reshape(record.shape if len(record.zeros) > 1 else ()), scale.shape
        )
        for turned in (False, True):
            s, z = (scale.T, zeros.T) if turned else (scale, zeros)
            if s.shape == (outputs, groups):
                exact = weight.astype(np.float64) / np.repeat(s, record.block, 1)[:, :inputs]
                steps = _steps(exact, np.ones(outputs))
                if steps is not None and record.holds(steps):
                    return _grouped(steps, s, z, record.block)
    return None


def _grouped(steps: np.ndarray, scale: np.ndarray, zeros: np.ndarray, group: int) -> tuple[Grouped, int, int] | None:
    """steps: codes less their zero points [outputs, ...]; scale, zeros: [outputs, groups]."""
    spread = np.arange(steps.shape[1]) // group
    codes = steps + zeros[:, spread].reshape(*steps.shape[:2], *[1] * (steps.ndim - 2))
    widths = [b for b in (*sorted(STORAGE), 8) if int(codes.max()) - int(codes.min()) < 1 << b]
    if not widths:
        return None
    n, p = code_range(widths[0])
    # 4-bit codes without sign, for one, are moved to those with.
    move = 0 if n <= codes.min() and codes.max() <= p else n - int(codes.min())
    codes, zeros = codes + move, zeros + move
    if zeros.min() < QMIN or zeros.max() > QMAX:
        return None
    plain = None if not zeros.any() else np.ascontiguousarray(zeros.astype(np.int8))
    return Grouped(np.ascontiguousarray(codes.astype(np.int8)), scale.astype(np.float32), plain), group, widths[0]


def _steps(rows: np.ndarray, scales: np.ndarray) -> np.ndarray | None:
    """rows / scales as whole numbers, or None where they are none that codes less a zero point can be."""
    exact = rows / scales[:, None]
    steps = np.rint(exact)
    fine = np.abs(exact - steps) <= EXACT * np.maximum(np.abs(steps), 1)
    return steps.astype(np.int32) if fine.all() and np.abs(steps).max(initial=0) <= CODE_SPAN else None


def _constant_grid(tensor: torch.Tensor, stored: tuple[StoredCodes, ...]) -> QParams | None:
    """The grid of a stored tensor that is an operand like any other, if it has one scale of the file."""
    values = tensor.numpy().reshape(1, -1)
    for record in stored:
        if len(record.scale) != 1 or len(record.zeros) != 1 or record.scale[0] <= 0:
            continue
        (zero,) = record.zeros
        steps = _steps(values.astype(np.float64), np.asarray(record.scale))
        if steps is not None and record.holds(steps) and QMIN <= zero <= QMAX:
            codes = steps + zero
            if codes.min() >= QMIN and codes.max() <= QMAX:
                return QParams(record.scale[0], zero, source="the file")
    return None


# -- what becomes integer ----------------------------------------------------------------------------------------------


@dataclass
class Adoption:
    """marks: nodes whose values are on a grid, once they are rounded. wanted: nodes in front of a mark that may have
    its grid. weights: the codes of each layer; held: layers that stay float, and why. meaning: grids of int8 nodes."""

    module: fx.GraphModule
    marks: Mapping[fx.Node, QParams]
    stored: tuple[StoredCodes, ...]
    weights: dict[fx.Node, FoundCodes] = field(default_factory=dict)
    held: dict[fx.Node, str] = field(default_factory=dict)
    wanted: dict[fx.Node, QParams] = field(default_factory=dict)
    meaning: dict[fx.Node, QParams] = field(default_factory=dict)

    @staticmethod
    def of(module: fx.GraphModule, stored: tuple[StoredCodes, ...], recode: bool = False) -> Adoption:
        """recode: round weights that have too many steps."""
        marks = {n: n.meta[GRID] for n in module.graph.nodes if GRID in n.meta and n.op == "call_function"}
        made = Adoption(module, marks, stored)
        for node in module.graph.nodes:
            weight = constant_of(module, node.args[1]) if is_call(node, *LAYERS) else None
            if weight is None or weight.dtype != torch.float32 or not weight.numel():
                continue
            found = find_codes(weight.numpy(), stored)
            found = None if found is None else _positive(found)
            found = _recoded(found) if recode and found is not None else found
            reason = _refusal(found)
            if found is None or reason:
                made.held[node] = reason
            else:
                made.weights[node] = found
        return made

    def rule(self, layer: fx.Node) -> WeightRule:
        scales = self.weights[layer].scales
        return WeightRule(lambda weights: scales, quantize_weights, source="the file")

    def decide(self, candidates: dict[fx.Node, Kind], reasons: dict[fx.Node, str]) -> Annotation:
        """int8 is what reads codes and, unless it is a layer, gives codes."""
        self._spread(candidates)
        found = Annotation()
        for node in self.module.graph.nodes:
            kind = candidates.get(node)
            if kind is None:
                reasons.update({node: ""} if node in self.marks else {})
                continue
            given = [self._grid(x, found) for x in operand_nodes(node)]
            if not given or None in given:
                reasons[node] = "" if node in self.marks else "the file gives no scale for what it reads"
                continue
            kind = self._kind(node, kind, [g for g in given if g is not None], found, reasons)
            if kind is not None:
                found.kinds[node] = kind
        self._prune(found, reasons)
        return found

    def _kind(
        self, node: fx.Node, kind: Kind, given: list[QParams], found: Annotation, reasons: dict[fx.Node, str]
    ) -> Kind | None:
        """The kind of a node that reads codes of these grids, None where it stays float."""
        own = self.marks.get(node) or self.wanted.get(node)
        if kind is Kind.SHARE:
            self.meaning[node] = given[0]
            return kind
        if kind is Kind.SCALE:
            scaled = self._scaled(node, given[0])
            self.meaning[node] = own if own is not None else scaled
            return kind if own is None or _same(own, scaled) else Kind.TABLE
        if kind is Kind.CLIP and (own is None or _same(own, given[0])):
            if own is None and not _on_grid(node, given[0]):
                reasons[node] = "its limits lie between codes, and the file gives no scale for its result"
                return None
            self.meaning[node] = given[0]
            return kind
        if own is None:
            if kind is Kind.LAYER:
                found.real.add(node)
                return kind
            reasons[node] = "the file gives no scale for its result"
            return None
        self.meaning[node] = own
        return Kind.TABLE if kind is Kind.CLIP else kind

    def _grid(self, node: fx.Node, found: Annotation) -> QParams | None:
        """What codes of a node mean, if it has codes or can be given them."""
        if node in found.kinds:
            return None if node in found.real else self.meaning[node]
        if node.op == "get_attr":
            if node not in self.meaning:
                grid = _constant_grid(get_weight(self.module, node), self.stored)
                if grid is None:
                    return None
                self.meaning[node] = grid
            return self.meaning[node]
        return self.marks.get(node)

    def _scaled(self, node: fx.Node, grid: QParams) -> QParams:
        number = next(n for n in (scalar_of(self.module, a) for a in node.args[:2]) if n is not None)
        scale, _ = grid.per_tensor
        scale = scale / number if is_call(node, aten.div.Tensor) else scale * number
        return dataclasses.replace(grid, scale=float(np.float32(scale)))

    def _spread(self, candidates: Mapping[fx.Node, Kind]) -> None:
        """Carry the grid of each mark to what it is the only reader of, through clips, moves and concatenations."""

        def carry(node: fx.Node, grid: QParams) -> None:
            kind = candidates.get(node)
            alone = len(node.users) == 1 and node not in self.marks and node.op == "call_function"
            if not alone or kind is None or is_call(node, *SPLITTERS):
                return
            self.wanted[node] = grid
            if kind in (Kind.SHARE, Kind.CLIP, Kind.CONCAT):
                for source in operand_nodes(node):
                    carry(source, grid)

        for mark, grid in self.marks.items():
            if is_call(mark, aten.clamp.default):
                carry(operand(mark), grid)

    def _prune(self, found: Annotation, reasons: dict[fx.Node, str]) -> None:
        """Leave float what only moves or clips numbers that are float on both sides."""
        for node in reversed(list(found.kinds)):
            read = any(found.is_int8(u) and node in operand_nodes(u) for u in node.users)
            if read or found.kinds[node] not in PASSING or is_call(node, *SPLITTERS):
                continue
            if not any(found.is_int8(x) for x in operand_nodes(node)):
                del found.kinds[node]
                reasons.setdefault(node, "")

    def untie(self, annotation: Annotation) -> None:
        """What has a scale of its own in the file is not produced with that of a concatenation."""
        for producer, concat in list(annotation.tied.items()):
            if not _same(self.meaning.get(producer), self.meaning.get(concat)):
                del annotation.tied[producer]

    def observed(self, annotation: Annotation) -> dict[fx.Node, QParams]:
        """The grids that the converter wants to know."""
        ranged = annotation.ranged(self.module.graph)
        stored = {n: g for n, g in self.meaning.items() if n.op == "get_attr"}
        return {**stored, **{n: self.meaning[n] if n in annotation.kinds else self.marks[n] for n in ranged}}


def _same(a: QParams | None, b: QParams | None) -> bool:
    return a is not None and b is not None and (a.per_tensor, a.n, a.p) == (b.per_tensor, b.n, b.p)


def _on_grid(node: fx.Node, grid: QParams) -> bool:
    """Whether the limits of a clip are codes, or beyond them."""
    scale, zero = grid.per_tensor
    low, high = clip_limits(node) or (-math.inf, math.inf)
    steps = [
        v / scale + zero for v, beyond in ((low, low <= grid.range[0]), (high, high >= grid.range[1])) if not beyond
    ]
    return all(abs(s - round(s)) <= NEAR_CODE for s in steps)


def _positive(found: FoundCodes) -> FoundCodes:
    """The same weights with positive scales."""
    signs = np.where(found.scales < 0, -1, 1)
    return FoundCodes(found.steps * signs.reshape(-1, *[1] * (found.steps.ndim - 1)), np.abs(found.scales))


def _recoded(found: FoundCodes) -> FoundCodes:
    """Channels of more than 127 steps with coarser ones."""
    largest = np.abs(found.steps.reshape(len(found.steps), -1)).max(1)
    factor = np.maximum(largest / WEIGHT_MAX, 1.0)
    scales = np.where(factor > 1, (found.scales * factor).astype(np.float32), found.scales)
    spread = (found.scales / scales).reshape(-1, *[1] * (found.steps.ndim - 1))
    return FoundCodes(np.clip(np.rint(found.steps * spread), -WEIGHT_MAX, WEIGHT_MAX).astype(np.int32), scales)


def _refusal(found: FoundCodes | None) -> str:
    """Why a layer with these codes has no integer form; empty where it has."""
    if found is None:
        return "the file gives no scale for its weights"
    if np.abs(found.steps).max() > WEIGHT_MAX:
        return f"its weights are more than {WEIGHT_MAX} steps from their zero point (recode=true rounds them)"
    return ""
