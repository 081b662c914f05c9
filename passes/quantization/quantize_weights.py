"""Weight-only quantisation: codes of two to eight bits with one scale for each group of input channels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from edgec.integer import dequantize_weight
from edgec.packing import FORMATS
from edgec.passbase import Context, Pass, option
from edgec.passes.keep import check_patterns, fits, layer_names
from edgec.passes.quantization.operators import CONV2D, LAYERS
from edgec.program import Program, get_weight, is_call, layer_of, shape_of, weight_node
from edgec.quantparams import SMALLEST_SCALE, QParams, code_range, weight_range
from edgec.sparsity import carry, sparsities

aten = torch.ops.aten
edgec = torch.ops.edgec

# Ranges tried by the search, as shares of the extremes of a group.
RATIOS = np.linspace(1.0, 0.35, 14)
# Weights that the search looks at together: its work arrays then fit the cache.
CHUNK = 1 << 16
STORAGE = {2: "pack2", 3: "pack3", 4: "pack4"}


@dataclass(frozen=True)
class Grouped:
    """Weights as codes int8 [outputs, inputs, ...]; scale float32, zero int8 or None: [outputs, groups]."""

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero: NDArray[np.int8] | None


@dataclass(frozen=True)
class WeightSummary:
    """What the pass did. bits: by layer; kept_float: layers left alone. error: mean of |w - stored|^2 / |w|^2."""

    group: int
    bits: dict[str, int]
    error: dict[str, float]
    kept_float: tuple[str, ...]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Weights of linear layers and convolutions in few bits, activations in float32: no calibration data needed.

    `group` input channels of an output channel share a scale (and a zero point, if `asymmetric`); for a convolution
    with all their taps. The device stores packed codes and computes with scale * (code - zero).

    Dettmers and Zettlemoyer, "The case for 4-bit precision: k-bit Inference Scaling Laws" (groups); Choukroun et al.,
    "Low-bit Quantization of Neural Networks for Efficient Inference" (ranges of least squared error).
    """

    name: ClassVar[str] = "quantize-weights"
    faithful: ClassVar[bool] = False

    bits: int = option(4, "bits of a code; 5 to 7 take a byte like 8", low=2, high=8)
    group: int = option(128, "input channels that share a scale; 0 or -1: all of an output channel", low=-1)
    asymmetric: bool = option(False, "a zero point for each group beside its scale")
    scales: str = option(
        "mse",
        "extremes of a group, or the range of least squared error (down to 0.35 of the extremes)",
        choices=("mse", "min-max"),
    )
    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")
    keep_int8: tuple[str, ...] = option((), "layers whose weights get 8 bits: names or patterns")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("keep_float", "keep_int8"):
            object.__setattr__(self, field, layer_names(getattr(self, field), f"{self.name}{{{field}}}"))

    def weaken(self, amount: float) -> QuantizeWeights | None:
        """More bits, of those that have a packed form: 8 at 0, `bits` at 1."""
        widths = [self.bits, *(bits for bits in sorted(FORMATS) if bits > self.bits)]
        return dataclasses.replace(self, bits=widths[round((1 - amount) * (len(widths) - 1))])

    def run(self, program: Program, context: Context) -> Program:
        module = program.edit()
        for field in ("keep_float", "keep_int8"):
            check_patterns(module, getattr(self, field), f"{self.name}{{{field}}}")
        masks = sparsities(program.annotations)
        made: dict[str, fx.Node] = {}
        records: dict[str, QParams] = {}
        moves: dict[str, str] = {}
        bits: dict[str, int] = {}
        errors: dict[str, float] = {}
        kept: list[str] = []
        for node in list(module.graph.nodes):
            if not is_call(node, *LAYERS):
                continue
            layer, weight = layer_of(node), node.args[1]
            reason = "kept float by option" if fits(layer, self.keep_float) else refusal(node)
            if reason:
                if not is_call(weight, edgec.dequantize_weight.default):
                    kept.append(layer)
                context.skip(layer, "weights", reason)
                continue
            path = str(weight.target)
            if path not in made:
                width = 8 if fits(layer, self.keep_int8) else self.bits
                values = get_weight(module, weight).numpy()
                group = values.shape[1] if self.group < 1 else min(self.group, values.shape[1])
                found = quantize_groups(
                    values, width, group, self.asymmetric and path not in masks, search=self.scales == "mse"
                )
                made[path], moves[path], record = store_codes(module, node, path, found, group, width, self.scales)
                records[moves[path]] = record
                bits[layer], errors[layer] = width, relative_error(values, found, group)
            node.update_arg(1, made[path])
        if not made:
            return program
        module.graph.eliminate_dead_code()
        summary = WeightSummary(self.group, bits, errors, tuple(kept))
        annotations = {k: v for k, v in carry(program.annotations, moves).items() if k not in moves}
        return program.replace(module, {**annotations, **records, self.name: summary})


def refusal(node: fx.Node) -> str:
    """Why the weights of a layer cannot be stored as codes; empty where they can."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weights are computed"
    if weight.meta["val"].dtype != torch.float32:
        return f"its weights are {str(weight.meta['val'].dtype).removeprefix('torch.')}"
    if is_call(node, *CONV2D) and shape_of(weight)[1] != _channels(node):
        return "a grouped convolution has few weights per channel, and no kernel that reads codes"
    return ""


def _channels(node: fx.Node) -> int:
    """Input channels of a convolution; PyTorch takes maps without a batch as well."""
    return shape_of(node.args[0])[-3]  # type: ignore[arg-type]


def store_codes(
    module: fx.GraphModule, node: fx.Node, path: str, found: Grouped, group: int, bits: int, source: str
) -> tuple[fx.Node, str, QParams]:
    """Store codes, scales and zero points of the weight `path` of a layer.

    Returns the node, in front of the layer's, of the weights they stand for, the path of the codes and their record.
    """
    with module.graph.inserting_before(node):
        codes = weight_node(module, f"{path}_q", torch.from_numpy(found.codes))
        scale = weight_node(module, f"{path}_q_scale", torch.from_numpy(found.scale))
        zero = None if found.zero is None else weight_node(module, f"{path}_q_zero", torch.from_numpy(found.zero))
        args = (codes, scale, zero, group)
        made = module.graph.call_function(edgec.dequantize_weight.default, args)
    made.meta.update(
        val=torch.empty(found.codes.shape, device="meta"), edgec_layer=layer_of(node), edgec_origin=f"{path} stored"
    )
    n, p = code_range(bits)
    storage = STORAGE.get(bits, "i8")
    record = QParams((), bits=bits, n=n, p=p, storage=storage, granularity="group", axis=1, group=group, source=source)
    return made, str(codes.target), record


# -- numbers -----------------------------------------------------------------------------------------------------------


def quantize_groups(
    weights: NDArray[np.float32], bits: int, group: int, asymmetric: bool = False, search: bool = True
) -> Grouped:
    """Codes of weights [outputs, inputs, ...] with a scale for each `group` input channels; the last group may be
    shorter.

    Without `search`: max|w| / (2^(bits-1) - 1), or (max - min) / (2^bits - 1) with a zero point. With it, ranges down
    to 0.35 of that, and for symmetric ones all 2^bits codes with a scale of either sign; the least squared error is
    taken. A symmetric group may also have the scale of its whole output channel, so that smaller groups are never worse
    than larger ones that they divide.
    """
    outputs, inputs = weights.shape[:2]
    rows = np.moveaxis(weights.reshape(outputs, inputs, -1), 1, 2).astype(np.float32)
    count = -(-inputs // group)
    padded = np.zeros((outputs, rows.shape[1], count * group), np.float32)
    padded[..., :inputs] = rows
    # outputs, groups, taps and channels of a group
    values = padded.reshape(outputs, -1, count, group).transpose(0, 2, 1, 3).reshape(outputs, count, -1)
    zero: NDArray[np.int8] | None = None
    step = max(1, CHUNK // max(1, values[0].size))
    parts = [values[first : first + step] for first in range(0, outputs, step)]
    if asymmetric:
        found = [_affine(part, bits, search) for part in parts]
        scale, zero = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    elif search:
        scale = np.concatenate([_searched(part, bits) for part in parts])
    else:
        top = weight_range(bits)[1]
        scale = np.maximum(np.abs(values).max(-1) / np.float64(top), SMALLEST_SCALE).astype(np.float32)
    codes = _codes(values, scale, zero, code_range(bits) if search or asymmetric else weight_range(bits))
    codes = codes.reshape(outputs, count, -1, group).transpose(0, 2, 1, 3).reshape(outputs, -1, count * group)
    codes = np.moveaxis(codes[..., :inputs], 2, 1).reshape(weights.shape)
    return Grouped(np.ascontiguousarray(codes), scale, zero)


def _codes(
    values: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.int8] | None, limits: tuple[int, int]
) -> NDArray[np.int8]:
    """rne(value / scale) + zero, limited; float64 division, as for int8 weights."""
    steps = np.rint(values.astype(np.float64) / scale[..., None].astype(np.float64))
    if zero is not None:
        steps += zero[..., None]
    return np.clip(steps, *limits).astype(np.int8)


def _searched(values: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Symmetric scales [outputs, groups] of least squared error, that of the whole output channel among them."""
    whole = _symmetric(values.reshape(len(values), 1, -1), bits, None)
    return whole if values.shape[1] == 1 else _symmetric(values, bits, whole)


def _symmetric(values: NDArray[np.float32], bits: int, known: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Scales of least squared error, those of `known` among them.

    Either extreme may have the code that its opposite lacks: where the positive one has it, the scale is negative.
    """
    low, high = code_range(bits)
    top, bottom = values.max(-1), values.min(-1)
    largest, extreme = np.maximum(top, -bottom), np.where(top > -bottom, top, bottom)
    candidates = [largest * np.float32(ratio / high) for ratio in RATIOS]
    if bits < 8:
        candidates += [extreme * np.float32(ratio / low) for ratio in RATIOS]
    if known is not None:
        candidates.append(np.broadcast_to(known, largest.shape))
    best, least = np.zeros_like(largest), np.full(largest.shape, np.inf, np.float32)
    for candidate in candidates:
        scale = np.where(np.abs(candidate) < SMALLEST_SCALE, np.float32(SMALLEST_SCALE), candidate).astype(np.float32)
        steps = np.clip(np.rint(values / scale[..., None]), low, high)
        error = np.square(steps * scale[..., None] - values).sum(-1)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def _affine(values: NDArray[np.float32], bits: int, search: bool) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """(scales, zero points) [outputs, groups] of ranges that contain zero."""
    low, high = code_range(bits)
    bottom, top = np.minimum(values.min(-1), 0), np.maximum(values.max(-1), 0)
    best = np.zeros_like(top)
    zero = np.zeros(top.shape, np.int8)
    least = np.full(top.shape, np.inf, np.float32)
    for ratio in RATIOS if search else RATIOS[:1]:
        scale = np.maximum((top - bottom) * np.float32(ratio / (high - low)), SMALLEST_SCALE).astype(np.float32)
        offset = np.clip(low - np.rint(bottom * np.float32(ratio) / scale), low, high)
        steps = np.clip(np.rint(values / scale[..., None]) + offset[..., None], low, high) - offset[..., None]
        error = np.square(steps * scale[..., None] - values).sum(-1)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
        zero = np.where(better, offset, zero).astype(np.int8)
    return best, zero


def relative_error(weights: NDArray[np.float32], found: Grouped, group: int) -> float:
    """|w - stored|^2 / |w|^2 of a whole layer; 0 for weights that are all zero."""
    stored = dequantize_weight(found.codes, found.scale, found.zero, group).astype(np.float64)
    total = float(np.square(weights.astype(np.float64)).sum())
    return float(np.square(weights - stored).sum()) / total if total > 0 else 0.0
