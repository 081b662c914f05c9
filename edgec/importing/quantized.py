"""Models that come quantised: the codes of their weights, and PyTorch's quantised operators in edgec's form.

A Program of such a model computes in floating point. Activations go through pairs of `edgec::quantize` and
`edgec::dequantize`; weights are real numbers, each a scale times a whole number, and `StoredCodes` has the scales. The
pass `adopt-qdq` turns both into integers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec import qops as qops  # registers edgec::quantize
from edgec.integer import QMAX, QMIN
from edgec.program import Program, add_weight, constant_of, get_weight, is_call, layer_of

aten = torch.ops.aten
edgec = torch.ops.edgec

# Where a Program has the codes of its weights: a tuple of StoredCodes among its annotations.
KEY = "stored-codes"
# Codes next to a rounding boundary fall on either side of it, and layer after layer adds to that: 29 dB are left of
# MobileNetV2, 23 dB of ViT-Tiny. A mistake leaves next to no signal.
QUANTIZED_SQNR_DB = 20.0
# What uint8 codes are more than the int8 codes that stand for them.
UNSIGNED = 128
NAMESPACE = "quantized_decomposed"

PAIRED = ("quantize_per_tensor", "dequantize_per_tensor")
STORED = (*PAIRED, "quantize_per_channel", "dequantize_per_channel", "dequantize_per_channel_group")
FAKE = (aten.fake_quantize_per_tensor_affine.default, aten.fake_quantize_per_tensor_affine.tensor_qparams)
FAKE_CHANNELS = (aten.fake_quantize_per_channel_affine.default,)


@dataclass(frozen=True)
class StoredCodes:
    """The scales of one weight of a file, whose real numbers are scale * (code - zero point), rounded to float32.

    scale: of shape `shape`: one number, one per index of an axis, or one per block of `block` neighbours. zeros: the
    zero points, as those of int8 codes: one, or one per scale. digest: of the sorted codes less their zero points, so
    that it stays what it is when the weight is transposed or reshaped.
    """

    scale: tuple[float, ...] = field(repr=False)
    shape: tuple[int, ...]
    zeros: tuple[int, ...] = field(repr=False)
    block: int
    digest: str

    @staticmethod
    def of(steps: np.ndarray, scale: np.ndarray, zeros: Any = 0, block: int = 0) -> StoredCodes:
        """steps: codes less their zero points."""
        scale, zeros = np.asarray(scale, np.float32), np.asarray(zeros, np.int64).reshape(-1)
        zeros = zeros[:1] if (zeros == zeros[0]).all() else zeros
        content = scale.tobytes() + zeros.tobytes() + bytes.fromhex(digest_of(steps))
        both = hashlib.sha256(content).hexdigest()[:8]
        numbers = tuple(float(s) for s in scale.reshape(-1))
        return StoredCodes(numbers, scale.shape, tuple(int(z) for z in zeros), block, f"{digest_of(steps)}-{both}")

    def holds(self, steps: np.ndarray) -> bool:
        """Whether these are the codes that the record was made of, in any order."""
        return self.digest.partition("-")[0] == digest_of(steps)


def digest_of(steps: np.ndarray) -> str:
    return hashlib.sha256(np.sort(np.asarray(steps, np.int32), axis=None).tobytes()).hexdigest()[:16]


def stored_codes(program: Program) -> tuple[StoredCodes, ...]:
    return tuple(program.annotations.get(KEY, ()))


def remember(program: Program, found: Iterable[StoredCodes]) -> Program:
    """The Program with what is known of the codes of its weights; equal records once."""
    records = tuple(dict.fromkeys((*stored_codes(program), *found)))
    if not records:
        return program
    return dataclasses.replace(program, annotations={**program.annotations, KEY: records})


def comes_quantised(program: Program) -> bool:
    """Whether a Program has scales of its own that no kernel makes use of yet."""
    if stored_codes(program):
        return True
    return any(
        is_call(n, edgec.dequantize.default) and is_call(unlimited(n.args[0]), edgec.quantize.default)
        for n in program.graph.nodes
    )


def unlimited(codes: Any) -> Any:
    """What made codes, before they were limited to fewer than 256."""
    return codes.args[0] if is_call(codes, aten.clamp.default) else codes


# -- PyTorch's operators -----------------------------------------------------------------------------------------------


def edgec_form(program: Program) -> Program:
    """The Program with `quantized_decomposed` operators and fake quantisation of 8 bits and fewer as edgec's own.

    Stored weights become the real numbers that they stand for. What has no such form (16 bits, scales that are computed
    from the input) stays, 16-bit pairs as arithmetic on real numbers.
    """
    if not any(_wanted(node) for node in program.graph.nodes):
        return program
    module = program.edit()
    found: list[StoredCodes] = []
    for node in list(module.graph.nodes):
        if _wanted(node) and node.users:
            with module.graph.inserting_before(node):
                new = _stored(module, node, found) or _rewritten(module, node)
            if new is not None:
                new.meta.setdefault("val", node.meta["val"])
                new.meta.setdefault("edgec_layer", layer_of(node))
                node.replace_all_uses_with(new)
                module.graph.erase_node(node)
    return remember(program.replace(module), found)


def _wanted(node: fx.Node) -> bool:
    return node.op == "call_function" and (_decomposed(node) in STORED or node.target in (*FAKE, *FAKE_CHANNELS))


def _decomposed(node: Any) -> str:
    """The name of an operator of `quantized_decomposed`, empty for all others."""
    target = node.target if isinstance(node, fx.Node) and node.op == "call_function" else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return ""
    return target._schema.name.partition("::")[2]


def _arguments(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments}
    found.update(zip(found, node.args))
    found.update(node.kwargs)
    return found


def _stored(module: fx.GraphModule, node: fx.Node, found: list[StoredCodes]) -> fx.Node | None:
    """The weight that a node makes of stored tensors; None where it reads anything else."""
    if any(constant_of(module, n) is None for n in node.all_input_nodes):
        return None
    given = _arguments(node)
    values = fx.map_arg((node.args, node.kwargs), lambda n: get_weight(module, n))
    with torch.no_grad():
        result = node.target(*values[0], **values[1])  # type: ignore[operator]
    source = node.all_input_nodes[0]
    if result.dtype == torch.float32:
        record = _record(module, node, given, result)
        if record is not None:
            found.append(record)
    new = module.graph.get_attr(add_weight(module, f"{source.target}_real", result.contiguous()))
    new.meta["val"] = result
    return new


def _record(module: fx.GraphModule, node: fx.Node, given: dict[str, Any], result: torch.Tensor) -> StoredCodes | None:
    """What is known of the codes of `result`, unless they have more than 8 bits."""
    low, high = (given.get(n) for n in ("quant_min", "quant_max"))
    if low is None or high is None or high - low > QMAX - QMIN:
        return None
    scale, zero = (
        _number(module, given[s if s in given else p]) for s, p in (("scale", "scales"), ("zero_point", "zero_points"))
    )
    axis, block = given.get("axis", 0), int(given.get("group_size", 0))
    wide = np.asarray(scale, np.float64)
    if block:
        wide = np.repeat(wide, block, axis=1)[:, : result.shape[1]]
    elif wide.ndim:
        wide = wide.reshape([-1 if i == axis % result.dim() else 1 for i in range(result.dim())])
    steps = np.rint(result.numpy().astype(np.float64) / np.where(wide == 0, 1, wide)).astype(np.int32)
    zeros = np.zeros(1, np.int64) if zero is None else np.asarray(zero, np.int64)
    return StoredCodes.of(steps, np.asarray(scale, np.float32), zeros - (UNSIGNED if high > QMAX else 0), block)


def _number(module: fx.GraphModule, value: Any) -> Any:
    """A number or stored tensor as an array; None where it is missing or computed."""
    if isinstance(value, fx.Node):
        tensor = constant_of(module, value)
        return None if tensor is None else tensor.numpy()
    return None if value is None else np.asarray(value)


def _rewritten(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    if node.target in FAKE_CHANNELS or (node.target not in FAKE and _decomposed(node) not in PAIRED):
        return None
    given = _arguments(node)
    x = next(iter(given.values()))
    scale, zero = _number(module, given["scale"]), _number(module, given["zero_point"])
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or not isinstance(x, fx.Node):
        return None
    low, high = (_number(module, given[n]) for n in ("quant_min", "quant_max"))
    if low is None or high is None:
        return None
    grid = (float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0]), int(low), int(high))
    call = module.graph.call_function
    if node.target in FAKE:
        return _real(call, _codes(call, x, *grid), *grid) if _fits(grid) else None
    if not _fits(grid):
        whole = _decomposed(node) == "dequantize_per_tensor" and _decomposed(x) == "quantize_per_tensor"
        return _wide(call, x.args[0], *grid) if whole and x.args[1:6] == node.args[1:6] else None
    if node.meta["val"].dtype not in (torch.int8, torch.uint8) and _decomposed(node) == "quantize_per_tensor":
        return None
    if _decomposed(node) == "quantize_per_tensor":
        # Other readers of the codes than dequantisations want them in their own type.
        if any(_decomposed(u) != "dequantize_per_tensor" for u in node.users):
            return None
        return _codes(call, x, *grid)
    made = is_call(unlimited(x), edgec.quantize.default)
    if not made and (high > QMAX or x.meta["val"].dtype is not torch.int8):
        return None
    return _real(call, x, *grid)


def _wide(call: Callable[..., fx.Node], x: Any, scale: float, zero: int, low: int, high: int) -> fx.Node:
    """Quantisation and dequantisation of codes that no kernel has, as torch defines them."""
    steps = call(aten.add.Scalar, (call(aten.round.default, (call(aten.mul.Scalar, (x, 1.0 / scale)),)), zero))
    steps = call(aten.sub.Scalar, (call(aten.clamp.default, (steps, low, high)), zero))
    return call(aten.mul.Scalar, (steps, scale))


def _fits(grid: tuple[float, int, int, int]) -> bool:
    """Whether codes are int8 or uint8 codes."""
    _, zero, low, high = grid
    return -128 <= low <= zero <= high <= 255 and high - low <= QMAX - QMIN and (high <= QMAX or low >= 0)


def _codes(call: Callable[..., fx.Node], x: fx.Node, scale: float, zero: int, low: int, high: int) -> fx.Node:
    shift = UNSIGNED if high > QMAX else 0
    codes = call(edgec.quantize.default, (x, scale, zero - shift))
    codes.meta["edgec_layer"] = layer_of(x)
    if (low - shift, high - shift) != (QMIN, QMAX):
        codes = call(aten.clamp.default, (codes, low - shift, high - shift))
        codes.meta["edgec_layer"] = layer_of(x)
    return codes


def _real(call: Callable[..., fx.Node], codes: fx.Node, scale: float, zero: int, low: int, high: int) -> fx.Node:
    shift = UNSIGNED if high > QMAX else 0
    return call(edgec.dequantize.default, (codes, scale, zero - shift))
