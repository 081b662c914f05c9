"""`edgec::lstm`, `gru` and `rnn` in ONNX, with the product of the input that stands before them taken in again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec.onnx.emitters import Call, emits
from edgec.onnx.writer import ELEMENTS, _Writer

# Where ONNX's gates stand among PyTorch's.
LSTM_GATES = (0, 3, 1, 2)
GRU_GATES = (1, 0, 2)


@emits("edgec.lstm.default")
def _lstm(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    if a["projection"] is not None:
        raise w.refuse(node, "it has a projection")
    y, _, c = _layer(w, node, "LSTM", LSTM_GATES, [a["h0"], a["c0"]], outputs=3)
    if not a["cell"]:
        return y
    last = w.emit("Squeeze", [_as(w, c, node.meta["val"].dtype), w.ints([0])])
    return w.emit("Concat", [w.emit("Flatten", [y], axis=1), last], axis=1)


@emits("edgec.gru.default")
def _gru(w: _Writer, node: Call) -> Any:
    return _layer(w, node, "GRU", GRU_GATES, [w.args(node)["h0"]], outputs=2, linear_before_reset=1)[0]


@emits("edgec.rnn.default")
def _rnn(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    return _layer(w, node, "RNN", (0,), [a["h0"]], outputs=2, activations=["Relu" if a["relu"] else "Tanh"])[0]


def _layer(
    w: _Writer, node: Call, op: str, gates: Sequence[int], states: Sequence[Any], outputs: int, **attributes: Any
) -> tuple[str, ...]:
    """The results of an ONNX layer, the first as [N, T, H]. gates: PyTorch's blocks of rows in ONNX's order."""
    a = w.args(node)
    recurrent = w.array(a["weight"]).astype(np.float32)
    wide, hidden = recurrent.shape
    rows = np.arange(wide).reshape(len(gates), hidden)[list(gates)].reshape(-1)
    zeros = np.zeros(wide, np.float32)
    x, product, offset = _product(w, a["x"], wide)
    own = zeros if a["bias"] is None else w.array(a["bias"]).astype(np.float32)
    name = str(a["weight"].target)
    operands = [
        w.emit("Transpose", [w.x(x, torch.float32)], perm=[1, 0, 2]),
        w.const(product[rows][None], name=f"{name}.input"),
        w.const(recurrent[rows][None], name=name),
        w.const(np.concatenate([offset[rows], own[rows]])[None], name=f"{name}.bias"),
    ]
    given = [s is not None for s in states]
    if any(given):
        # No lengths of sequences.
        operands.append("")
        operands += [w.emit("Unsqueeze", [w.x(s, torch.float32), w.ints([0])]) if s is not None else "" for s in states]
        while not operands[-1]:
            operands.pop()
    direction = "reverse" if a["reverse"] else "forward"
    found = w.emit(op, operands, outputs, hidden_size=hidden, direction=direction, **attributes)
    # [T, 1, N, H]
    y = w.emit("Transpose", [w.emit("Squeeze", [found[0], w.ints([1])])], perm=[1, 0, 2])
    return _as(w, y, node.meta["val"].dtype), *found[1:]


def _product(w: _Writer, x: Call, wide: int) -> tuple[fx.Node, np.ndarray, np.ndarray]:
    """(input, weight, bias) of the linear layer that gives x, where only this layer reads it; else those of a copy."""
    zeros = np.zeros(wide, np.float32)
    if str(x.target) == "aten.linear.default" and len(x.users) == 1:
        a = w.args(x)
        weight, bias = a["weight"], a["bias"]
        constant = all(v is None or v.op == "get_attr" for v in (weight, bias))
        if constant and w.meta(a["input"]).dim() == 3:
            return a["input"], w.array(weight).astype(np.float32), zeros if bias is None else w.array(bias)
    return x, np.eye(wide, dtype=np.float32), zeros


def _as(w: _Writer, name: str, kind: torch.dtype) -> str:
    return name if kind == torch.float32 else w.emit("Cast", [name], to=ELEMENTS[kind])
