"""Which kernel template runs which region operator: the table between the torch graph and `edgec.targets.kernels`.

Each rule reads one node and gives the template, the activations it takes and the weights it packs. Nothing here knows
TVM; `edgec.lowering.importer` turns a `Binding` into a call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec import recurrentops as recurrentops  # registers the operators looked up below
from edgec import regions as regions
from edgec.errors import EdgecError
from edgec.integer import dequantize_weight
from edgec.packing import code_bits
from edgec.program import layer_of, origin_of, shape_of
from edgec.targets.device import Device
from edgec.targets.gpu import kernels as gpu
from edgec.targets.kernels.attention import Attention, View
from edgec.targets.kernels.common import AddEpilogue, Epilogue
from edgec.targets.kernels.conv2d import Conv2D
from edgec.targets.kernels.depthwise import Depthwise
from edgec.targets.kernels.eltwise import Dequantize, QAdd, QLut, QMul, QRescale, Quantize
from edgec.targets.kernels.matmul import MatMul
from edgec.targets.kernels.norm import GroupNorm, LayerNorm, RMSNorm
from edgec.targets.kernels.pool import AvgPool, MaxPool, Mean, Requant
from edgec.targets.kernels.recurrent import GATES, Recurrent
from edgec.targets.kernels.softmax import Softmax
from edgec.targets.kernels.sparse import fastest
from edgec.targets.kernels.tiles import Crop, Place
from edgec.targets.kernels.tokens import ClassScore, LogSizes, MergeSizes, MergeTokens, ReduceSlots, TomeSlots
from edgec.targets.kernels.transpose import Transpose
from edgec.targets.kernels.unpack import weight_bits
from edgec.targets.kernels.weight_only import CodedConv2D
from edgec.targets.mcu.kernels import implement
from edgec.targets.mcu.kernels.layout import concatenated, padded, part, repeated

aten = torch.ops.aten
edgec = torch.ops.edgec

Weights = Mapping[str, np.ndarray]
SUFFIXES = {"float32": "f32", "float16": "f16", "int8": "i8"}


@dataclass(frozen=True)
class Binding:
    """A kernel call. Arguments in order: `before`, the packed `weights`, `after`, and the output.

    origin: the node of the user's model whose value the call computes (see `origin_of`). mask: bool, which weights are
    kept, of the shape of the weights, where a layer is pruned in blocks. dense: why its zeros are multiplied all the
    same, "" where they are not. half_sums: whether a GPU may sum float16 in float16.
    """

    spec: Any
    before: tuple[fx.Node, ...]
    layer: str
    weights: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    after: tuple[fx.Node, ...] = ()
    origin: str = ""
    mask: np.ndarray | None = None
    dense: str = ""
    half_sums: bool = False

    @property
    def symbol(self) -> str:
        dtype = getattr(self.spec, "dtype", None)
        return self.spec.name if dtype is None else f"{self.spec.name}_{SUFFIXES[dtype]}"

    def pack(self, device: Device) -> tuple[np.ndarray, ...]:
        return self.spec.pack(device, **self.weights)

    def on(self, device: Device) -> Binding:
        """The call that `device` makes: of the block-sparse kernel for a pruned layer where that is faster there, of
        the kernel header on a microcontroller, of a GPU's own kernel there. Without one of these the template stays,
        whose loops any target can run."""
        if device.is_mcu or device.is_gpu:
            where = "microcontrollers" if device.is_mcu else "GPUs"
            dense = f"no block-sparse kernel on {where}" if self.mask is not None else self.dense
            rule = implement if device.is_mcu else gpu.implement
            # The kernels are written in two languages, of which Metal takes neither.
            made = None if device.api == "metal" else rule(self.spec, self.weights, device)
            if self.half_sums and device.is_gpu and made is not None:
                made = made.with_half_sums()
            return dataclasses.replace(self, spec=made or self.spec, mask=None, dense=dense)
        if self.mask is None:
            return self
        spec, kept = fastest(self.spec, self.mask, device)
        if kept is None:
            reason = f"{self.mask.mean():.0%} of the weights are kept, in a pattern that the dense kernel beats"
            return dataclasses.replace(self, mask=None, dense=reason)
        return dataclasses.replace(self, spec=spec, weights={**self.weights, "mask": kept}, mask=None)


def bind(
    node: Any,
    constants: Weights,
    masks: Weights | None = None,
    device: Device | None = None,
    half_sums: bool = False,
) -> Binding | None:
    """The kernel for `node`, or None when TVM's own operators implement it. `constants` maps node names to arrays.

    masks: of pruned weights, by the same names. device: `on` which the binding will be asked for. half_sums: see
    `Binding`.
    """
    rule = rules(device).get(node.target) if node.op == "call_function" else None
    if rule is not None and getattr(node.target, "namespace", "") == "aten" and _is_stored(node, constants):
        # Computed at compile time, where a kernel would have to be run that may be of another machine.
        return None
    binding = rule(node, constants) if rule is not None else None
    if binding is None:
        return None
    binding = dataclasses.replace(binding, origin=origin_of(node), half_sums=half_sums)
    mask = (masks or {}).get(getattr(node.args[1], "name", "")) if len(node.args) > 1 else None
    if mask is None:
        return binding
    weight = binding.weights.get("w")
    if not isinstance(binding.spec, Conv2D) or weight is None:
        return dataclasses.replace(binding, dense=f"{binding.spec.name} has no block-sparse kernel")
    return dataclasses.replace(binding, mask=mask.reshape(weight.shape))


def rules(device: Device | None = None) -> Mapping[Any, Rule]:
    """The operators that have kernels of ours; for a microcontroller also those that only move elements."""
    return {**RULES, **MOVES} if device is not None and device.is_mcu else RULES


def _is_stored(node: Any, constants: Weights) -> bool:
    """Whether a value follows from stored tensors alone."""
    waiting, seen = [node], set()
    while waiting:
        found = waiting.pop()
        if found.name in constants or found in seen:
            continue
        seen.add(found)
        if found.op == "placeholder":
            return False
        waiting += found.all_input_nodes
    return True


def _dtype(node: Any) -> str:
    """Element type of a node's result, as NumPy spells it."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _value(constants: Weights, node: Any) -> np.ndarray | None:
    return None if node is None else constants[node.name]


def _stored(constants: Weights, node: Any) -> tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray | None]]:
    """(weight, fields, operands) of a float layer: what `CodedConv2D` adds where the weight is stored as codes."""
    if node.target is not edgec.dequantize_weight.default:
        return constants[node.name], {}, {}
    codes, scale, zero, group = node.args
    operands = {"scale": constants[scale.name], "zero": _value(constants, zero)}
    w = constants[codes.name]
    return w, {"group": int(group), "zeros": zero is not None, "bits": code_bits(w)}, operands


def weight_of(node: Any, constants: Weights) -> np.ndarray:
    """The float32 values that a call of `edgec::dequantize_weight` gives."""
    codes, scale, zero, group = node.args
    return dequantize_weight(constants[codes.name], constants[scale.name], _value(constants, zero), int(group))


def _conv_spec(
    node: Any, w: np.ndarray, geometry: Any, dtype: str, x_zp: int, epilogue: Epilogue
) -> Conv2D | Depthwise:
    stride, padding, dilation, groups = geometry
    _, h, width, channels = shape_of(node.args[0])
    kernel = (w.shape[2], w.shape[3])
    common: dict[str, Any] = {
        "kernel": kernel,
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "dtype": dtype,
        "x_zp": x_zp,
        "epilogue": epilogue,
    }
    if groups == channels == w.shape[0] and channels > 1:
        return Depthwise(h, width, channels, **common)
    return Conv2D(h, width, channels, w.shape[0], groups=groups, bits=_bits(w), **common)


def _conv2d(node: Any, constants: Weights) -> Binding:
    x, w, bias, residual, *geometry, act, lo, hi = node.args
    weight, coded, operands = _stored(constants, w)
    if coded and geometry[3] != 1:
        # No kernel reads codes of grouped convolutions.
        weight, coded, operands = weight_of(w, constants), {}, {}
    weights = {"w": weight, "bias": _value(constants, bias), **operands}
    epilogue = Epilogue(act=act, lo=lo, hi=hi, residual=residual is not None)
    spec = _conv_spec(node, weight, geometry, _dtype(node), 0, epilogue)
    if coded and isinstance(spec, Conv2D):
        spec = CodedConv2D(**{**vars(spec), **coded})
    return Binding(spec, (x,), layer_of(node), weights, () if residual is None else (residual,))


def _linear(node: Any, constants: Weights) -> Binding:
    x, w, bias, residual, act, lo, hi = node.args
    weight, coded, operands = _stored(constants, w)
    rows = int(np.prod(shape_of(node)[:-1]))
    epilogue = Epilogue(act=act, lo=lo, hi=hi, residual=residual is not None)
    kind = CodedConv2D if coded else Conv2D
    spec = kind(1, rows, weight.shape[1], weight.shape[0], dtype=_dtype(node), epilogue=epilogue, **coded)
    weights = {"w": weight[:, :, None, None], "bias": _value(constants, bias), **operands}
    return Binding(spec, (x,), layer_of(node), weights, () if residual is None else (residual,))


def _qconv2d(node: Any, constants: Weights) -> Binding:
    x, w, bias, m, shift, *geometry, x_zp, y_zp, lo, hi = node.args[:13]
    weights = _integer_weights(constants, w, bias, m, shift)
    epilogue = Epilogue(lo=lo, hi=hi, y_zp=y_zp, **_requant(weights))
    return Binding(_conv_spec(node, weights["w"], geometry, "int8", x_zp, epilogue), (x,), layer_of(node), weights)


def _qconv2d_add(node: Any, constants: Weights) -> Binding:
    x, w, bias, m, shift, residual, *geometry, x_zp, y_zp, lo, hi, add = node.args
    weights = _integer_weights(constants, w, bias, m, shift)
    epilogue = Epilogue(lo=lo, hi=hi, y_zp=y_zp, add=AddEpilogue(*add), **_requant(weights))
    spec = _conv_spec(node, weights["w"], geometry, "int8", x_zp, epilogue)
    return Binding(spec, (x,), layer_of(node), weights, (residual,))


def _qlinear(node: Any, constants: Weights) -> Binding:
    x, w, bias, m, shift, y_zp, lo, hi = node.args
    weights = _integer_weights(constants, w, bias, m, shift)
    weight = weights["w"]
    weights["w"] = weight[:, :, None, None]
    rows = int(np.prod(shape_of(node)[:-1]))
    epilogue = Epilogue(lo=lo, hi=hi, y_zp=y_zp, **_requant(weights))
    spec = Conv2D(1, rows, weight.shape[1], weight.shape[0], dtype="int8", epilogue=epilogue, bits=_bits(weight))
    return Binding(spec, (x,), layer_of(node), weights)


def _qconv2d_float(node: Any, constants: Weights) -> Binding:
    x, w, bias, scale, *geometry, x_zp = node.args[:9]
    weights = {k: constants[n.name] for k, n in (("w", w), ("bias", bias), ("m", scale))}
    spec = _conv_spec(node, weights["w"], geometry, "int8", x_zp, Epilogue(requant="float"))
    return Binding(spec, (x,), layer_of(node), weights)


def _qlinear_act(node: Any, constants: Weights) -> Binding:
    x, w, bias, scale, residual, act, lo, hi, y_scale, y_zp = node.args
    weights = {"w": constants[w.name][:, :, None, None], "bias": constants[bias.name], "m": constants[scale.name]}
    epilogue = Epilogue(act, lo, hi, y_zp, residual is not None, requant="float", y_scale=y_scale)
    outputs, inputs = weights["w"].shape[:2]
    rows, bits = int(np.prod(shape_of(node)[:-1])), _bits(weights["w"])
    spec = Conv2D(1, rows, inputs, outputs, dtype="int8", epilogue=epilogue, bits=bits)
    return Binding(spec, (x,), layer_of(node), weights, () if residual is None else (residual,))


def _integer_weights(constants: Weights, w: Any, bias: Any, m: Any, shift: Any) -> dict[str, np.ndarray]:
    return {k: constants[n.name] for k, n in (("w", w), ("bias", bias), ("m", m), ("shift", shift))}


def _bits(w: np.ndarray) -> int:
    """Bits that the weights need, by their values: a record of them may get lost, and packing changes no result."""
    return weight_bits(w) if w.dtype == np.int8 else 8


def _requant(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How a layer rounds: by a float32 product where its multipliers are float32 (see `edgec.integer.requantize`)."""
    if weights["m"].dtype != np.float32:
        return {"requant": "RQ1"}
    # The largest accumulator that codes can make, and some room for the zero point.
    w = weights["w"].astype(np.int64)
    largest = np.abs(w).sum(tuple(range(1, w.ndim))) * 128 + np.abs(weights["bias"].astype(np.int64))
    return {"requant": "RQF", "bounded": bool(np.all(largest * np.abs(weights["m"].astype(np.float64)) < 2**30))}


def _map(node: Any) -> tuple[int, int, int]:
    """(h, w, c) of an NHWC value with one sample."""
    _, h, w, c = shape_of(node)
    return h, w, c


def _max_pool(node: Any, constants: Weights) -> Binding:
    x, kernel, stride, padding, dilation = node.args[:5]
    spec = MaxPool(*_map(x), tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), _dtype(node))
    return Binding(spec, (x,), layer_of(node))


def _avg_pool(node: Any, constants: Weights) -> Binding:
    x, kernel, stride, padding = node.args[:4]
    spec = AvgPool(*_map(x), tuple(kernel), tuple(stride), tuple(padding), dtype=_dtype(node))
    return Binding(spec, (x,), layer_of(node))


def _qavg_pool(node: Any, constants: Weights) -> Binding:
    x, kernel, stride, padding, m, shift, zx, zy, lo, hi = node.args[:10]
    requant = Requant(m, shift, zx, zy, lo, hi)
    geometry = (tuple(kernel), tuple(stride), tuple(padding))
    spec = AvgPool(*_map(x), *geometry, dtype="int8", requant=requant)
    return Binding(spec, (x,), layer_of(node))


def _permute(node: Any, constants: Weights) -> Binding | None:
    """None for stored tensors, which are permuted at compile time, and where only axes of one element move."""
    x, order = node.args
    shape = shape_of(x)
    axes = [int(axis) % len(shape) for axis in order]
    moved = [axis for axis in axes if shape[axis] != 1]
    if x.name in constants or moved == sorted(moved) or _dtype(node) not in SUFFIXES:
        return None
    return Binding(Transpose(shape, tuple(axes), _dtype(node)), (x,), layer_of(node))


def _mean(node: Any, constants: Weights) -> Binding | None:
    """None where the mean is not one over adjacent axes of one sample, which is what the pooling kernel takes."""
    x = node.args[0]
    window = _reduced(shape_of(x), node.args[1])
    if x.name in constants or window is None or _dtype(node) not in ("float32", "float16"):
        return None
    return Binding(Mean(1, *window, _dtype(node)), (x,), layer_of(node))


def _reduced(shape: tuple[int, ...], dims: Any) -> tuple[int, int] | None:
    """(elements averaged, elements behind them) for adjacent axes with nothing but ones before them."""
    axes = sorted(int(d) % len(shape) for d in dims or range(len(shape)))
    if axes != list(range(axes[0], axes[-1] + 1)) or int(np.prod(shape[: axes[0]])) != 1:
        return None
    return int(np.prod(shape[axes[0] : axes[-1] + 1])), int(np.prod(shape[axes[-1] + 1 :]))


def _qmean(node: Any, constants: Weights) -> Binding:
    x, dims, _, m, shift, zx, zy, lo, hi = node.args
    window = _reduced(shape_of(x), dims)
    if window is None:
        raise EdgecError(
            f"int8 mean over axes {list(dims)} of {shape_of(x)} has no kernel",
            where=f"layer {layer_of(node)}",
            hint=f"keep it in float: keep_float=[{layer_of(node)}]",
        )
    return Binding(Mean(1, *window, "int8", Requant(m, shift, zx, zy, lo, hi)), (x,), layer_of(node))


def _qadd(node: Any, constants: Weights) -> Binding:
    a, b, *add = node.args
    spec = QAdd(shape_of(a), shape_of(b), AddEpilogue(*add))
    return Binding(spec, (a, b), layer_of(node))


def _qmul(node: Any, constants: Weights) -> Binding:
    a, b, *rest = node.args
    return Binding(QMul(shape_of(a), shape_of(b), *rest), (a, b), layer_of(node))


def _qrescale(node: Any, constants: Weights) -> Binding:
    x, *rest = node.args
    return Binding(QRescale(shape_of(x), *rest), (x,), layer_of(node))


def _qlut(node: Any, constants: Weights) -> Binding:
    x, table, axis = node.args
    values = constants[table.name]
    shape = shape_of(x)
    spec = QLut(shape, values.ndim == 2, int(axis) % len(shape) if values.ndim == 2 else 0)
    return Binding(spec, (x,), layer_of(node), {"table": values})


def _quantize(node: Any, constants: Weights) -> Binding:
    x, scale, zero_point = node.args
    return Binding(Quantize(shape_of(x), scale, zero_point), (x,), layer_of(node))


def _dequantize(node: Any, constants: Weights) -> Binding:
    x, scale, zero_point = node.args
    return Binding(Dequantize(shape_of(x), scale, zero_point), (x,), layer_of(node))


def _rows(node: Any, columns: int) -> int:
    return int(np.prod(shape_of(node))) // columns


def _grid(scale: float | None, zero_point: int) -> tuple[float, int] | None:
    return None if scale is None else (scale, zero_point)


def _layer_norm(node: Any, constants: Weights) -> Binding:
    x, weight, bias, columns, eps, *grid = node.args
    weights = {"weight": _value(constants, weight), "bias": _value(constants, bias)}
    spec = LayerNorm(_rows(x, columns), columns, eps, _grid(*grid))
    return Binding(spec, (x,), layer_of(node), weights)


def _rms_norm(node: Any, constants: Weights) -> Binding:
    x, weight, columns, eps, *grid = node.args
    spec = RMSNorm(_rows(x, columns), columns, eps, _grid(*grid))
    return Binding(spec, (x,), layer_of(node), {"weight": _value(constants, weight)})


def _group_norm(node: Any, constants: Weights) -> Binding:
    x, weight, bias, groups, eps, act, lo, hi, layout = node.args
    shape = shape_of(x)
    channels = shape[-1] if layout == "NHWC" else shape[1]
    spec = GroupNorm(_rows(x, channels), channels, groups, eps, layout, Epilogue(act=act, lo=lo, hi=hi))
    return Binding(
        spec, (x,), layer_of(node), {k: _value(constants, v) for k, v in (("weight", weight), ("bias", bias))}
    )


def _softmax(node: Any, constants: Weights) -> Binding | None:
    """None over any axis but the last one."""
    x, axis = node.args[:2]
    shape = shape_of(x)
    kinds = {str(n.meta["val"].dtype) for n in (node, x)}
    if x.name in constants or kinds != {"torch.float32"} or not shape or int(axis) % len(shape) != len(shape) - 1:
        return None
    log = node.target is aten._log_softmax.default
    return Binding(Softmax(_rows(x, shape[-1]), shape[-1], log), (x,), layer_of(node))


def _matmul(node: Any, constants: Weights) -> Binding:
    a, b, transposed = node.args
    (a_batch, m, k), (b_batch, *_) = shape_of(a), shape_of(b)
    return Binding(MatMul(a_batch, b_batch, m, k, shape_of(node)[2], transposed), (a, b), layer_of(node))


def _bmm(node: Any, constants: Weights) -> Binding | None:
    """Products that decompositions leave. None for stored operands, which TVM folds, and other types than float32."""
    a, b = node.args[:2]
    stored = any(x.name in constants for x in (a, b))
    if stored or str(node.meta["val"].dtype) != "torch.float32" or 0 in (*shape_of(a), *shape_of(b)):
        return None
    (a_batch, m, k), (b_batch, _, n) = ((1,) * (3 - len(shape_of(x))) + shape_of(x) for x in (a, b))
    return Binding(MatMul(a_batch, b_batch, m, k, n), (a, b), layer_of(node))


def _attention(node: Any, constants: Weights) -> Binding:
    q, k, v, mask, shape, *views, factor, causal, scale, zero_point = node.args
    batch, heads, queries, keys, depth, value_depth, group = shape
    operands = (q, k, v) if mask is None else (q, k, v, mask)
    read = [View(int(np.prod(shape_of(x))), at[0], tuple(at[1:])) for x, at in zip(operands, views, strict=False)]
    spec = Attention(
        batch,
        heads,
        queries,
        keys,
        depth,
        value_depth,
        *read[:3],
        scale=factor,
        mask=None if mask is None else read[3],
        causal=causal,
        group=group,
        grid=_grid(scale, zero_point),
    )
    return Binding(spec, operands, layer_of(node))


def _elements(node: Any) -> int:
    return int(np.prod(shape_of(node)))


def _view(x: Any, view: Sequence[int]) -> View:
    return View(_elements(x), view[0], tuple(view[1:]))  # type: ignore[arg-type]


def _tome_slots(node: Any, constants: Weights) -> Binding:
    metric, shape, view, r, prefix, distilled = node.args
    batch, heads, tokens, depth = shape
    spec = TomeSlots(batch, heads, tokens, depth, _view(metric, view), r, prefix, distilled)
    return Binding(spec, (metric,), layer_of(node))


def _reduce_slots(node: Any, constants: Weights) -> Binding:
    x, score, prefix, keep, merge, ordered = node.args
    batch, tokens = shape_of(node)
    channels = 1 if x is None else shape_of(x)[2]
    spec = ReduceSlots(batch, tokens, channels, prefix, keep, merge, ordered)
    return Binding(spec, (score,) if x is None else (x, score), layer_of(node))


def _merge_tokens(node: Any, constants: Weights) -> Binding:
    x, size, slots, rows, merges = node.args
    batch, tokens, channels = shape_of(x)
    spec = MergeTokens(batch, tokens, channels, rows, merges, size is not None)
    return Binding(spec, (x, size, slots) if spec.sized else (x, slots), layer_of(node))


def _merge_sizes(node: Any, constants: Weights) -> Binding:
    size, slots, x, rows = node.args
    batch, tokens = shape_of(slots)
    spec = MergeSizes(batch, tokens, rows, 0 if x is None else shape_of(x)[2])
    return Binding(spec, (size, slots) if x is None else (size, slots, x), layer_of(node))


def _class_scores(node: Any, constants: Weights) -> Binding:
    q, k, size, shape, q_view, k_view, scale, prefix = node.args
    batch, heads, tokens, depth = shape
    views = _view(q, q_view), _view(k, k_view)
    spec = ClassScore(batch, heads, tokens, depth, *views, scale, prefix, size is not None)
    return Binding(spec, (q, k) if size is None else (q, k, size), layer_of(node))


def _log_sizes(node: Any, constants: Weights) -> Binding:
    return Binding(LogSizes(_elements(node)), (node.args[0],), layer_of(node))


def _recurrent(node: Any, constants: Weights) -> Binding:
    x, w, bias, *rest = node.args
    projection, c0, cell, kind = None, None, False, str(node.target).split(".")[1]
    if node.target is edgec.lstm.default:
        projection, h0, c0, reverse, cell = rest
    elif node.target is edgec.gru.default:
        h0, reverse = rest
    else:
        h0, reverse, relu = rest
        kind = "rnn_relu" if relu else "rnn_tanh"
    batch, steps, columns = shape_of(x)
    weights = {name: _stored_value(node, constants, n) for name, n in (("w", w), ("bias", bias), ("projection", projection))}
    hidden = columns // GATES[kind]
    size = shape_of(w)[1]
    states = {"h0": h0 is not None, "c0": c0 is not None}
    spec = Recurrent(kind, batch, steps, hidden, size, projection is not None, **states, reverse=reverse, cell=cell)
    return Binding(spec, (x,), layer_of(node), weights, tuple(s for s in (h0, c0) if s is not None))


def _stored_value(node: Any, constants: Weights, weight: Any) -> np.ndarray | None:
    """The values of a weight that is stored, as float32 or as codes."""
    if weight is None or weight.name in constants:
        return _value(constants, weight)
    if weight.target is edgec.dequantize_weight.default:
        return weight_of(weight, constants)
    raise EdgecError(
        f"{node.target} has a weight that is computed when the model runs",
        where=f"layer {layer_of(node)}",
        hint="remove the parametrisation of the weight before exporting, e.g. torch.nn.utils.parametrize.remove_parametrizations",
    )


def _crop(node: Any, constants: Weights) -> Binding:
    x, top, left, rows, columns, *rest = node.args
    n, *shape = shape_of(x)
    # A map with channels first is so many maps of one channel.
    planes, h, w, c = (n, *shape) if rest in ([], ["NHWC"]) else (n * shape[0], *shape[1:], 1)
    return Binding(Crop(planes, h, w, c, top, left, rows, columns, _dtype(node)), (x,), layer_of(node))


def _place(node: Any, constants: Weights) -> Binding:
    canvas, tile, top, left = node.args[:4]
    n, h, w, c = shape_of(node)
    _, rows, columns, _ = shape_of(tile)
    spec = Place(n, h, w, c, top, left, rows, columns, _dtype(node), canvas is not None)
    return Binding(spec, (tile,) if canvas is None else (canvas, tile), layer_of(node))


def _moved(node: Any, constants: Weights, sources: Sequence[Any], spec: Any) -> Binding | None:
    """None for stored tensors, which move at compile time, and where the kernels do not do it."""
    if spec is None or any(x.name in constants for x in sources):
        return None
    return Binding(spec, tuple(sources), layer_of(node))


def _expand(node: Any, constants: Weights) -> Binding | None:
    x = node.args[0]
    return _moved(node, constants, [x], repeated(shape_of(x), shape_of(node), _dtype(node)))


def _concat(node: Any, constants: Weights) -> Binding | None:
    sources = list(node.args[0])
    axis = int(node.args[1]) % len(shape_of(node)) if len(node.args) > 1 else 0
    shapes = [shape_of(x) for x in sources]
    if {_dtype(x) for x in sources} != {_dtype(node)} or any(len(s) != len(shape_of(node)) for s in shapes):
        return None
    return _moved(node, constants, sources, concatenated(shapes, axis, _dtype(node)))


def _constant_pad(node: Any, constants: Weights) -> Binding | None:
    x, widths, *value = node.args
    shape = shape_of(x)
    pairs = [tuple(widths[i : i + 2]) for i in range(0, len(widths), 2)]
    before, after = zip(*[(0, 0)] * (len(shape) - len(pairs)), *reversed(pairs), strict=True)
    return _moved(node, constants, [x], padded(shape, before, after, *(value or [0]), dtype=_dtype(node)))


def _slice(node: Any, constants: Weights) -> Binding | None:
    x, rest = node.args[0], list(node.args[1:])
    shape, axis = shape_of(x), int(rest[0] if rest else 0) % len(shape_of(x))
    start, step = int(rest[1] or 0) if len(rest) > 1 else 0, int(rest[3]) if len(rest) > 3 else 1
    first = min(max(start + shape[axis] if start < 0 else start, 0), shape[axis])
    return _moved(node, constants, [x], part(shape, axis, first, shape_of(node)[axis], step, _dtype(node)))


Rule = Callable[[Any, Weights], Binding | None]
MOVES: dict[Any, Rule] = {
    aten.expand.default: _expand,
    aten.cat.default: _concat,
    aten.constant_pad_nd.default: _constant_pad,
    aten.slice.Tensor: _slice,
}
RULES: dict[Any, Rule] = {
    aten.permute.default: _permute,
    aten.mean.dim: _mean,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten.bmm.default: _bmm,
    aten.mm.default: _bmm,
    edgec.layer_norm.default: _layer_norm,
    edgec.rms_norm.default: _rms_norm,
    edgec.group_norm.default: _group_norm,
    edgec.matmul.default: _matmul,
    edgec.attention.default: _attention,
    edgec.tome_slots.default: _tome_slots,
    edgec.reduce_slots.default: _reduce_slots,
    edgec.merge_tokens.default: _merge_tokens,
    edgec.merge_sizes.default: _merge_sizes,
    edgec.class_scores.default: _class_scores,
    edgec.log_sizes.default: _log_sizes,
    edgec.dequantize_weight.default: lambda node, constants: None,
    edgec.lstm.default: _recurrent,
    edgec.gru.default: _recurrent,
    edgec.rnn.default: _recurrent,
    edgec.crop_nhwc.default: _crop,
    edgec.place_nhwc.default: _place,
    edgec.conv2d_nhwc.default: _conv2d,
    edgec.linear_act.default: _linear,
    edgec.max_pool2d_nhwc.default: _max_pool,
    edgec.avg_pool2d_nhwc.default: _avg_pool,
    edgec.qconv2d.default: _qconv2d,
    edgec.qconv2d_add.default: _qconv2d_add,
    edgec.qlinear.default: _qlinear,
    edgec.qconv2d_float.default: _qconv2d_float,
    edgec.qlinear_act.default: _qlinear_act,
    edgec.qmax_pool2d.default: _max_pool,
    edgec.qavg_pool2d.default: _qavg_pool,
    edgec.qmean.default: _qmean,
    edgec.qadd.default: _qadd,
    edgec.qmul.default: _qmul,
    edgec.qrescale.default: _qrescale,
    edgec.qlut.default: _qlut,
    edgec.quantize.default: _quantize,
    edgec.dequantize.default: _dequantize,
}
