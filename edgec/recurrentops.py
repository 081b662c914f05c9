"""Recurrent layers as PyTorch custom operators `edgec::lstm`, `edgec::gru` and `edgec::rnn`: one loop over time each.

Importing this module registers them; they can be exported, re-exported and saved in `.pt2` files (import this module
before loading such a file). Each is one layer in one direction, without the product of its input with `weight_ih`: that
has no recurrence, so it is an ordinary `aten.linear` over all time steps before the operator, and passes treat it as
any other linear layer. `edgec.importing.recurrent` writes nn.LSTM, nn.GRU and nn.RNN in this form.

x is [N, T, G H]: the input product with `bias_ih`, gates in PyTorch's order. N samples, T >= 1 steps, H hidden units.
`reverse` walks from the last step to the first; results stand at the step that they belong to. States that are None
start at zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from edgec.gradients import recompute, remember


@torch.library.custom_op(
    "edgec::lstm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? projection, Tensor? h0, Tensor? c0, bool reverse, "
    "bool cell) -> Tensor",
)
def lstm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor | None,
    h0: torch.Tensor | None,
    c0: torch.Tensor | None,
    reverse: bool,
    cell: bool,
) -> torch.Tensor:
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), with PyTorch's gates i, f, g, o.

    x [N, T, 4 H], weight [4 H, P], bias [4 H] or None (`bias_hh`), projection [P, H] or None (then P = H), h0 [N, P],
    c0 [N, H]. Returns the hidden states [N, T, P]; with `cell` [N, T P + H], the hidden states of a sample one after
    the other, then its last cell state. Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, bias, 4, projection, h0, c0)
    return _plain_lstm(x, weight, bias, projection, h0, c0, reverse, cell)


@lstm.register_fake
def _(x, weight, bias, projection, h0, c0, reverse, cell):
    _check(x, weight, bias, 4, projection, h0, c0)
    n, steps, wide = x.shape
    size = weight.shape[1]
    return x.new_empty((n, steps * size + wide // 4) if cell else (n, steps, size))


@torch.library.custom_op(
    "edgec::gru",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? h0, bool reverse) -> Tensor",
)
def gru(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, h0: torch.Tensor | None, reverse: bool
) -> torch.Tensor:
    """Gated recurrent unit (Cho et al., 2014), with PyTorch's gates r, z, n: r scales W h + bias of n.

    x [N, T, 3 H], weight [3 H, H], bias [3 H] or None (`bias_hh`), h0 [N, H]. Returns the hidden states [N, T, H].
    Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, bias, 3, None, h0)
    return _plain_gru(x, weight, bias, h0, reverse)


@gru.register_fake
def _(x, weight, bias, h0, reverse):
    _check(x, weight, bias, 3, None, h0)
    return x.new_empty((*x.shape[:2], weight.shape[1]))


@torch.library.custom_op(
    "edgec::rnn",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? h0, bool reverse, bool relu) -> Tensor",
)
def rnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    h0: torch.Tensor | None,
    reverse: bool,
    relu: bool,
) -> torch.Tensor:
    """h = tanh(x + W h + bias), or max(0, ...) with `relu` (Elman, 1990).

    x [N, T, H], weight [H, H], bias [H] or None (`bias_hh`), h0 [N, H]. Returns the hidden states [N, T, H]. Raises
    ValueError for shapes that do not fit.
    """
    _check(x, weight, bias, 1, None, h0)
    return _plain_rnn(x, weight, bias, h0, reverse, relu)


@rnn.register_fake
def _(x, weight, bias, h0, reverse, relu):
    _check(x, weight, bias, 1, None, h0)
    return x.new_empty((*x.shape[:2], weight.shape[1]))


RECURRENT = tuple(getattr(torch.ops.edgec, name).default for name in ("lstm", "gru", "rnn"))


# -- their meaning, a loop over time -----------------------------------------------------------------------------------


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _stacked(found: list[torch.Tensor], reverse: bool) -> torch.Tensor:
    return torch.stack(found[::-1] if reverse else found, 1)


def _start(state: torch.Tensor | None, x: torch.Tensor, size: int) -> torch.Tensor:
    return x.new_zeros(x.shape[0], size) if state is None else state


def _plain_lstm(x, weight, bias, projection, h0, c0, reverse, cell):
    h, c = _start(h0, x, weight.shape[1]), _start(c0, x, x.shape[2] // 4)
    found = []
    for t in _order(x.shape[1], reverse):
        i, f, g, o = (x[:, t] + F.linear(h, weight, bias)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        h = h if projection is None else F.linear(h, projection)
        found.append(h)
    y = _stacked(found, reverse)
    return torch.cat([y.flatten(1), c], 1) if cell else y


def _plain_gru(x, weight, bias, h0, reverse):
    h = _start(h0, x, weight.shape[1])
    found = []
    for t in _order(x.shape[1], reverse):
        (xr, xz, xn), (hr, hz, hn) = x[:, t].chunk(3, 1), F.linear(h, weight, bias).chunk(3, 1)
        z = torch.sigmoid(xz + hz)
        n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        h = n + z * (h - n)
        found.append(h)
    return _stacked(found, reverse)


def _plain_rnn(x, weight, bias, h0, reverse, relu):
    h = _start(h0, x, weight.shape[1])
    found = []
    for t in _order(x.shape[1], reverse):
        value = x[:, t] + F.linear(h, weight, bias)
        h = torch.relu(value) if relu else torch.tanh(value)
        found.append(h)
    return _stacked(found, reverse)


for _operator, _plain, _count in ((lstm, _plain_lstm, 6), (gru, _plain_gru, 4), (rnn, _plain_rnn, 4)):
    _operator.register_autograd(recompute(_plain, _count), setup_context=remember)


# -- checks ------------------------------------------------------------------------------------------------------------


def _check(x, weight, bias, gates: int, projection: Any = None, h0: Any = None, c0: Any = None) -> None:
    if x.dim() != 3 or x.shape[2] % gates or not x.shape[1]:
        raise ValueError(f"the input product of {gates} gates must be [N, T, {gates} H], not {list(x.shape)}")
    n, _, wide = x.shape
    hidden = wide // gates
    size = hidden if projection is None else projection.shape[0]
    for name, tensor, shape in (
        ("weight", weight, (wide, size)),
        ("bias", bias, (wide,)),
        ("projection", projection, (size, hidden)),
        ("h0", h0, (n, size)),
        ("c0", c0, (n, hidden)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
