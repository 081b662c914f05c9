"""RNN, GRU and LSTM of ONNX as PyTorch's recurrent operators, whose gates stand in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgec.onnx.module import Many, Node
from edgec.onnx.operators import MAX_STEPS, _op

# PyTorch's order of gates, as places in ONNX's.
ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@_op("LSTM", "GRU", "RNN")
def _recurrent(node: Node) -> Any:
    directions = {"forward": 1, "reverse": 1, "bidirectional": 2}[node.attr("direction", "forward")]
    reverse, hidden = node.attr("direction", "forward") == "reverse", node.attr("hidden_size")
    activations = node.attr("activations") or DEFAULTS[node.op] * directions
    if node.attr("input_forget", 0):
        raise node.refuse("with coupled gates", "export the layer without them")
    x, layout = node.x(0), node.attr("layout", 0)
    x = x.transpose(0, 1) if layout else x
    w, r = node.static(1, "weights"), node.static(2, "weights")
    hidden = r.shape[-1] if hidden is None else hidden
    gates = len(ORDER[node.op])
    biases = node.static(3, "bias") if node.has(3) else np.zeros((directions, 2 * gates * hidden), np.float32)
    initial = [_initial(node, i, x, directions, hidden, layout) for i in ((5, 6) if node.op == "LSTM" else (5,))]
    if _has_operator(node, directions, x.shape[0]):
        x = torch.flip(x, [0]) if reverse else x
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
        y = torch.flip(y, [0]) if reverse else y
    else:
        y, states = _written_out(node, x, (w, r, biases), initial, activations, hidden)
    # ONNX keeps directions apart: [steps, directions, batch, hidden].
    y = y.reshape(y.shape[0], y.shape[1], directions, hidden)
    y = y.permute(1, 0, 2, 3) if layout else y.permute(0, 2, 1, 3)
    return Many([y, *[s.transpose(0, 1) if layout else s for s in states]])


def _plain(activations: list[str]) -> Any:
    return torch.ops.aten.rnn_relu.input if activations[0] == "Relu" else torch.ops.aten.rnn_tanh.input


def _has_operator(node: Node, directions: int, steps: Any) -> bool:
    """Whether PyTorch has an operator for the layer as it is."""
    given = node.attr("activations") or DEFAULTS[node.op] * directions
    known = [DEFAULTS[node.op] * directions]
    if node.op == "RNN":
        known.append(["Relu"] * directions)
    if given not in known or node.attr("activation_alpha") or node.attr("activation_beta"):
        return False
    if node.attr("clip") is not None or (node.op == "LSTM" and node.has(7)):
        return False
    if node.op == "GRU" and not node.attr("linear_before_reset", 0):
        return False
    return not node.has(4) or (node.is_static(4) and bool(np.all(node.static(4, "sequence lengths") == steps)))


def _reordered(array: np.ndarray, op: str) -> np.ndarray:
    gates = np.split(array, len(ORDER[op]))
    return np.concatenate([gates[i] for i in ORDER[op]])


def _initial(node: Node, index: int, x: torch.Tensor, directions: int, hidden: int, layout: int) -> torch.Tensor:
    if not node.has(index):
        return x.new_zeros((directions, x.shape[1], hidden))
    state = node.x(index)
    return state.transpose(0, 1) if layout else state


# -- step by step ------------------------------------------------------------------------------------------------------

# (function of a value, alpha and beta; their defaults, where it has any)
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[float, ...]]] = {
    "relu": (torch.relu, ()),
    "tanh": (torch.tanh, ()),
    "sigmoid": (torch.sigmoid, ()),
    "softsign": (F.softsign, ()),
    "softplus": (F.softplus, ()),
    "elu": (lambda x, a: F.elu(x, a), (1.0,)),
    "leakyrelu": (lambda x, a: F.leaky_relu(x, a), (0.01,)),
    "thresholdedrelu": (lambda x, a: torch.where(x > a, x, torch.zeros(())), (1.0,)),
    "affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), (1.0, 1.0)),
    "hardsigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0), (0.2, 0.5)),
}


def _functions(node: Node, names: list[str]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The activations with their numbers, which they take in turn, and the limit of their arguments."""
    alphas, betas = (list(node.attr(f"activation_{n}") or []) for n in ("alpha", "beta"))
    limit = node.attr("clip")
    found = []
    for name in names:
        if name.lower() not in FUNCTIONS:
            raise node.refuse(f"with activation {name}", "use one that ONNX defines")
        function, numbers = FUNCTIONS[name.lower()]
        given = [queue.pop(0) if queue else default for queue, default in zip((alphas, betas), numbers)]

        def run(x: torch.Tensor, function: Callable[..., torch.Tensor] = function, given: list[float] = given) -> Any:
            return function(x if limit is None else torch.clamp(x, -limit, limit), *given)

        found.append(run)
    return found


def _written_out(
    node: Node,
    x: torch.Tensor,
    weights: tuple[np.ndarray, np.ndarray, np.ndarray],
    initial: list[torch.Tensor],
    activations: list[str],
    hidden: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(results [steps, batch, directions * hidden], last states), for layers that PyTorch has no operator for: a GRU
    that resets the state before the product, peepholes, clipping, other activations, sequences of several lengths."""
    steps = x.shape[0]
    if not isinstance(steps, int) or steps > MAX_STEPS:
        hint = "export it with linear_before_reset=1" if node.op == "GRU" else "export the layer as PyTorch defines it"
        raise node.refuse(f"that is written out has {steps} steps, more than {MAX_STEPS}", hint)
    w, r, biases = weights
    functions = _functions(node, activations)
    each = len(functions) // w.shape[0]
    lengths = node.x(4).reshape(-1, 1) if node.has(4) else None
    results, lasts = [], []
    for d in range(w.shape[0]):
        backwards = d == 1 or node.attr("direction", "forward") == "reverse"
        suffix = "_reverse" if backwards else ""
        wx, rx = (node.weight(m[d], f"{n}_l0{suffix}") for m, n in ((w, "weight_ih"), (r, "weight_hh")))
        bw, br = (node.weight(v, f"{n}_l0{suffix}") for v, n in zip(np.split(biases[d], 2), ("bias_ih", "bias_hh")))
        holes = None
        if node.op == "LSTM" and node.has(7):
            holes = node.weight(node.static(7, "peepholes")[d], f"peepholes_l0{suffix}").split(hidden)
        step = _steps(node, functions[d * each : (d + 1) * each], rx, br, holes, hidden)
        projected = F.linear(x, wx, bw)
        state, outputs = [s[d] for s in initial], []
        for t in reversed(range(steps)) if backwards else range(steps):
            new = step(projected[t], *state)
            y = new[0]
            if lengths is not None:
                # Behind the end of a sequence the state stays, and results are zero.
                inside = lengths > t
                y = torch.where(inside, y, torch.zeros(()))
                new = [torch.where(inside, a, b) for a, b in zip(new, state, strict=True)]
            state = new
            outputs.append(y)
        results.append(torch.stack(outputs[::-1] if backwards else outputs))
        lasts.append(state)
    return torch.cat(results, -1), [torch.stack(column) for column in zip(*lasts, strict=True)]


Step = Callable[..., list[torch.Tensor]]


def _steps(node: Node, functions: list[Any], rx: torch.Tensor, br: torch.Tensor, holes: Any, hidden: int) -> Step:
    """One step: (projected input, states) -> new states."""

    def rnn(p: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        return [functions[0](p + F.linear(h, rx, br))]

    def gru(p: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
        f, g = functions
        z_x, r_x, n_x = p.chunk(3, -1)
        z_h, r_h = F.linear(h, rx[: 2 * hidden], br[: 2 * hidden]).chunk(2, -1)
        update, reset = f(z_x + z_h), f(r_x + r_h)
        if node.attr("linear_before_reset", 0):
            new = g(n_x + reset * F.linear(h, rx[2 * hidden :], br[2 * hidden :]))
        else:
            new = g(n_x + F.linear(reset * h, rx[2 * hidden :], br[2 * hidden :]))
        return [(1 - update) * new + update * h]

    def lstm(p: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
        f, g, last = functions
        i, o, forget, new = (p + F.linear(h, rx, br)).chunk(4, -1)
        if holes is not None:
            i, forget = i + holes[0] * c, forget + holes[2] * c
        c = f(forget) * c + f(i) * g(new)
        o = o if holes is None else o + holes[1] * c
        return [f(o) * last(c), c]

    return {"RNN": rnn, "GRU": gru, "LSTM": lstm}[node.op]
