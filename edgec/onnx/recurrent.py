"""RNN, GRU and LSTM of ONNX as PyTorch's recurrent operators, whose gates stand in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgec.onnx.module import Many, Node
from edgec.onnx.operators import MAX_STEPS, _op

# PyTorch's order of gates, as places in ONNX's.
ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@_op("LSTM", "GRU", "RNN")
def _recurrent(node: Node) -> Any:
    directions = {"forward": 1, "reverse": 1, "bidirectional": 2}[node.attr("direction", "forward")]
    reverse, hidden = node.attr("direction", "forward") == "reverse", node.attr("hidden_size")
    activations = _check(node, directions)
    x, layout = node.x(0), node.attr("layout", 0)
    x = x.transpose(0, 1) if layout else x
    w, r = node.static(1, "weights"), node.static(2, "weights")
    hidden = r.shape[-1] if hidden is None else hidden
    gates = len(ORDER[node.op])
    biases = node.static(3, "bias") if node.has(3) else np.zeros((directions, 2 * gates * hidden), np.float32)
    if reverse:
        x = torch.flip(x, [0])
    initial = [_initial(node, i, x, directions, hidden, layout) for i in ((5, 6) if node.op == "LSTM" else (5,))]
    if node.op == "GRU" and not node.attr("linear_before_reset", 0):
        y, states = _gru(node, x, w, r, biases, initial[0], hidden)
    else:
        flat = []
        for d in range(directions):
            suffix = "_reverse" if d or reverse else ""
            for name, matrix in (("weight_ih", w[d]), ("weight_hh", r[d])):
                flat.append(node.weight(_reordered(matrix, node.op), f"{name}_l0{suffix}"))
            for name, vector in zip(("bias_ih", "bias_hh"), np.split(biases[d], 2)):
                flat.append(node.weight(_reordered(vector, node.op), f"{name}_l0{suffix}"))
        both = directions == 2
        if node.op == "LSTM":
            y, h, c = torch.ops.aten.lstm.input(x, initial, flat, True, 1, 0.0, False, both, False)
            states = [h, c]
        else:
            run = torch.ops.aten.gru.input if node.op == "GRU" else _plain(activations)
            y, h = run(x, initial[0], flat, True, 1, 0.0, False, both, False)
            states = [h]
    if reverse:
        y = torch.flip(y, [0])
    # ONNX keeps directions apart: [steps, directions, batch, hidden].
    y = y.reshape(y.shape[0], y.shape[1], directions, hidden)
    y = y.permute(1, 0, 2, 3) if layout else y.permute(0, 2, 1, 3)
    return Many([y, *[s.transpose(0, 1) if layout else s for s in states]])


def _plain(activations: list[str]) -> Any:
    return torch.ops.aten.rnn_relu.input if activations[0] == "Relu" else torch.ops.aten.rnn_tanh.input


def _check(node: Node, directions: int) -> list[str]:
    given = node.attr("activations") or DEFAULTS[node.op] * directions
    known = [DEFAULTS[node.op] * directions]
    if node.op == "RNN":
        known.append(["Relu"] * directions)
    if given not in known or node.attr("activation_alpha") or node.attr("activation_beta"):
        raise node.refuse(f"with activations {', '.join(given)}", "use the default ones")
    if node.attr("clip") is not None or node.attr("input_forget", 0) or (node.op == "LSTM" and node.has(7)):
        raise node.refuse("with clip, peepholes or coupled gates", "export the layer without them")
    if node.has(4):
        steps = node.value(0).shape[1 if node.attr("layout", 0) else 0]
        lengths = node.static(4, "sequence lengths")
        if not np.all(lengths == steps):
            raise node.refuse("with sequences of several lengths", "pad them, and take the last step outside the layer")
    return given


def _reordered(array: np.ndarray, op: str) -> np.ndarray:
    gates = np.split(array, len(ORDER[op]))
    return np.concatenate([gates[i] for i in ORDER[op]])


def _initial(node: Node, index: int, x: torch.Tensor, directions: int, hidden: int, layout: int) -> torch.Tensor:
    if not node.has(index):
        return x.new_zeros((directions, x.shape[1], hidden))
    state = node.x(index)
    return state.transpose(0, 1) if layout else state


def _gru(
    node: Node, x: torch.Tensor, w: np.ndarray, r: np.ndarray, biases: np.ndarray, start: torch.Tensor, hidden: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The GRU that resets the state before the product, step by step: PyTorch only has the one that does it after."""
    steps = x.shape[0]
    if not isinstance(steps, int) or steps > MAX_STEPS:
        raise node.refuse(f"with linear_before_reset=0 over {steps} steps", "export it with linear_before_reset=1")
    results, states = [], []
    for d in range(w.shape[0]):
        suffix = "_reverse" if d else ""
        wx, rx = (node.weight(m[d], f"{n}_l0{suffix}") for m, n in ((w, "weight_ih"), (r, "weight_hh")))
        bw, br = (node.weight(v, f"{n}_l0{suffix}") for v, n in zip(np.split(biases[d], 2), ("bias_ih", "bias_hh")))
        projected = torch.nn.functional.linear(x, wx, bw)
        h, outputs = start[d], []
        for t in range(steps) if not d else reversed(range(steps)):
            z_x, r_x, n_x = projected[t].chunk(3, -1)
            gates = torch.nn.functional.linear(h, rx[: 2 * hidden], br[: 2 * hidden])
            z_h, r_h = gates.chunk(2, -1)
            update, reset = torch.sigmoid(z_x + z_h), torch.sigmoid(r_x + r_h)
            new = torch.tanh(n_x + torch.nn.functional.linear(reset * h, rx[2 * hidden :], br[2 * hidden :]))
            h = (1 - update) * new + update * h
            outputs.append(h)
        results.append(torch.stack(outputs if not d else outputs[::-1]))
        states.append(h)
    return torch.cat(results, -1), [torch.stack(states)]
