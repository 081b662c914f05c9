"""Codes of two and four bits, which are held as bytes, and of sixteen without a sign, which are held as int32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto

from edgec.onnx.module import Node
from edgec.onnx.operators import _op

# (smallest code, largest, type that holds them)
CODES: dict[int, tuple[int, int, torch.dtype]] = {
    TensorProto.UINT4: (0, 15, torch.uint8),
    TensorProto.INT4: (-8, 7, torch.int8),
    TensorProto.UINT2: (0, 3, torch.uint8),
    TensorProto.INT2: (-2, 1, torch.int8),
    TensorProto.UINT16: (0, 65535, torch.int32),
}


def other_codes(node: Node) -> tuple[int, int, torch.dtype] | None:
    """The codes that a QuantizeLinear makes, where PyTorch has no type for them; None for all others."""
    code = node.attr("output_dtype", 0)
    if not code and len(node.proto.input) > 2:
        # Constants have lost the difference between four bits and eight.
        name = node.proto.input[2]
        code = next((t.data_type for t in node.graph.root.initializer if t.name == name), 0)
        if not code and node.is_static(2) and node.value(2).array.dtype == np.uint16:
            code = TensorProto.UINT16
    return CODES.get(code or 0)


@_op("MatMulNBits", domain="com.microsoft")
def _matmul_bits(node: Node) -> Any:
    """x W^T + b, of which W [N, K] comes in blocks of `block_size` codes of 2, 4 or 8 bits, each with a scale."""
    rows, width = node.attr("N"), node.attr("K")
    bits, block = node.attr("bits", 4), node.attr("block_size")
    if bits not in (2, 4, 8):
        raise node.refuse(f"of {bits} bits is not supported", "use 2, 4 or 8")
    if node.has(4):
        raise node.refuse("with columns in another order is not supported", "quantise it without group indices")
    blocks = -(-width // block)
    packed = node.static(1, "weights").reshape(rows, -1)
    codes = _unpacked(packed, bits).reshape(rows, blocks, block).astype(np.float32)
    scales = node.static(2, "scales").reshape(rows, blocks, 1).astype(np.float32)
    zeros: Any = float(2 ** (bits - 1))
    if node.has(3):
        given = node.static(3, "zero points")
        if given.dtype == np.uint8:
            given = _unpacked(given.reshape(rows, -1), bits)[:, :blocks]
        zeros = given.reshape(rows, blocks, 1).astype(np.float32)
    weight = ((codes - zeros) * scales).reshape(rows, -1)[:, :width]
    known = node.graph.known(np.ascontiguousarray(weight), node.value(1).path)
    return F.linear(node.x(0), node.graph.tensor(known, node.path, "weight"), node.optional(5))


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes in bytes, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
