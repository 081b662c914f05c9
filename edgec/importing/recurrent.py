"""nn.LSTM, nn.GRU and nn.RNN as one linear layer and one `edgec::` operator per layer and direction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import transformer

from edgec import recurrentops as recurrentops  # registers the operators
from edgec.program import is_call

aten = torch.ops.aten
edgec = torch.ops.edgec

ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
# What leaves zeros what they are.
MOVES = (
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.detach.default,
)

PACKED = (
    "packed sequences are not supported",
    "pass the padded tensor to the recurrent layer and mask what comes behind the end of a sequence",
)
REFUSED: dict[Any, tuple[str, str]] = dict.fromkeys(
    (
        aten.lstm.data,
        aten.gru.data,
        aten.rnn_tanh.data,
        aten.rnn_relu.data,
        aten._pack_padded_sequence.default,
        aten._pad_packed_sequence.default,
    ),
    PACKED,
)


def _is_zero(node: Any) -> bool:
    while is_call(node, *MOVES):
        node = node.args[0]
    full = is_call(node, aten.full.default) and node.args[1] == 0
    return full or is_call(node, *ZEROS)


def _lstm(run: Any, x: Any, hx: Any, params: Any, biases: bool, layers: int, *rest: Any, **options: Any) -> Any:
    node: fx.Node = run.node
    wants_cell = any(user.args[1] == 2 and user.users for user in node.users)
    zero = [_is_zero(state) for state in node.args[1]]  # type: ignore[union-attr]
    states: list[Any] = [None if none else state for none, state in zip(zero, hx, strict=True)]

    def step(gates: Any, w: Any, b: Any, projection: Any, k: int, reverse: bool) -> tuple[Any, Any]:
        h0, c0 = (None if state is None else state[k] for state in states)
        y = edgec.lstm.default(gates, w, b, projection, h0, c0, reverse, wants_cell)
        if not wants_cell:
            return y, None
        samples, steps, size = gates.shape[0], gates.shape[1], w.shape[1]
        return y[:, : steps * size].reshape(samples, steps, size), y[:, steps * size :]

    return _layers(run, x, params, biases, layers, *rest, step=step, **options)


def _gru(run: Any, x: Any, hx: Any, params: Any, biases: bool, layers: int, *rest: Any, **options: Any) -> Any:
    state = None if _is_zero(run.node.args[1]) else hx

    def step(gates: Any, w: Any, b: Any, projection: Any, k: int, reverse: bool) -> tuple[Any, Any]:
        return edgec.gru.default(gates, w, b, None if state is None else state[k], reverse), None

    return _layers(run, x, params, biases, layers, *rest, step=step, **options)[:2]


def _rnn(relu: bool) -> Callable[..., Any]:
    def rule(run: Any, x: Any, hx: Any, params: Any, biases: bool, layers: int, *rest: Any, **options: Any) -> Any:
        state = None if _is_zero(run.node.args[1]) else hx

        def step(gates: Any, w: Any, b: Any, projection: Any, k: int, reverse: bool) -> tuple[Any, Any]:
            return edgec.rnn.default(gates, w, b, None if state is None else state[k], reverse, relu), None

        return _layers(run, x, params, biases, layers, *rest, step=step, **options)[:2]

    return rule


def _layers(
    run: Any,
    x: Any,
    params: Any,
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    step: Callable[..., tuple[Any, Any]],
) -> tuple[Any, Any, Any]:
    """(hidden states of all steps, last hidden states, last cell states or None) of a stack of layers."""
    if train and dropout:
        raise run.error("dropout between recurrent layers gives random values", "call model.eval() before exporting")
    directions = 2 if bidirectional else 1
    each = len(params) // (layers * directions)
    x = x if batch_first else x.transpose(0, 1)
    last, cells = [], []
    for layer in range(layers):
        found = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *more = params[k * each : (k + 1) * each]
            b_ih, b_hh = (more.pop(0), more.pop(0)) if biases else (None, None)
            projection = more[0] if more else None
            part = f"l{layer}" + "_reverse" * direction
            with run.layer(f"ih_{part}"):
                gates = F.linear(x, w_ih, b_ih)
            with run.layer(f"hh_{part}"):
                y, cell = step(gates, w_hh, b_hh, projection, k, direction == 1)
            found.append(y)
            last.append(y[:, 0] if direction else y[:, -1])
            cells.append(cell)
        x = torch.cat(found, 2) if bidirectional else found[0]
    y = x if batch_first else x.transpose(0, 1)
    return y, torch.stack(last), None if cells[0] is None else torch.stack(cells)


@contextlib.contextmanager
def masks_as_given() -> Iterator[None]:
    """While torch.export looks on, nn.Transformer does not ask whether a mask of the graph is a causal one.

    The answer depends on values, which do not exist then, and is a hint to fast kernels only: results are the same.
    """
    own = transformer._detect_is_causal_mask

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal) if isinstance(mask, FakeTensor) else own(mask, is_causal, size)

    transformer._detect_is_causal_mask = detect
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = own


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """While torch.export looks on, layers compute the shapes of their results alone.

    It would run their decomposition for that, operator by operator for each time step: minutes for a long sequence.
    """
    replaced = []
    for operator, kernel in ((aten.lstm.input, _lstm_shapes), *((op, _shapes) for op in LAYERS[1:])):
        for key in (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd):
            own = operator.py_kernels.get(key)
            if own is not None:
                replaced.append((operator, key, own))
                operator.py_kernels[key] = _for_fakes(kernel, own)
        operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, key, own in replaced:
            operator.py_kernels[key] = own
            operator._dispatch_cache.clear()


def _for_fakes(kernel: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *rest: kernel(x, *rest) if isinstance(x, FakeTensor) else own(x, *rest)


def _lstm_shapes(x: Any, hx: Any, *rest: Any) -> tuple[Any, Any, Any]:
    y, h = _shapes(x, hx[0], *rest)
    return y, h, torch.empty_like(hx[1])


def _shapes(
    x: Any, hx: Any, params: Any, biases: Any, layers: Any, dropout: Any, train: Any, both: Any, *_: Any
) -> Any:
    return x.new_empty((*x.shape[:2], hx.shape[2] * (2 if both else 1))), torch.empty_like(hx)


LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)

RULES: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _gru,
    aten.rnn_tanh.input: _rnn(False),
    aten.rnn_relu.input: _rnn(True),
}
