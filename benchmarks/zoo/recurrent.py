"""Recurrent networks: layers of torch.nn in all their forms, cells in Python loops, and hand-written recurrences."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.registry import add, ids, model

FAMILY = "recurrent"


class Last(nn.Module):
    """A recurrent layer over [n, t, 20] and a classifier of its last step."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        width = options.get("proj_size") or 32
        self.rnn = getattr(nn, kind)(20, 32, batch_first=True, **options)
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 12)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y[:, -1])


def _last(name: str, kind: str, small: bool = False, steps: int = 16, **options: Any) -> None:
    add(name, FAMILY, functools.partial(Last, kind, **options), (1, steps, 20), small=small)


_last("lstm_kws", "LSTM", small=True)
_last("gru_kws", "GRU", small=True)
_last("rnn_kws", "RNN")
_last("rnn_relu", "RNN", nonlinearity="relu")
_last("bilstm2_kws", "LSTM", num_layers=2, bidirectional=True)
_last("bigru", "GRU", bidirectional=True)
_last("lstm_projected", "LSTM", proj_size=12)
_last("lstm_no_bias", "LSTM", bias=False)
_last("gru3", "GRU", num_layers=3, dropout=0.2)
_last("lstm_long", "LSTM", steps=200)
_last("gru_long", "GRU", steps=400)


@model(FAMILY, (10, 1, 8), (2, 1, 16), (2, 1, 16))
class LstmState(nn.Module):
    """Time first; states in and out, as for streaming."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 16, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.rnn(x, (h, c))
        return y, h, c


@model(FAMILY, (1, 10, 8), (2, 1, 16))
class GruState(nn.Module):
    """Bidirectional with an initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 16, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(x, h)


@model(FAMILY, (1, 1, 8), (1, 16), (1, 16), small=True)
class LstmStep(nn.Module):
    """One step of a cell: what a device in a stream calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = self.cell(x.squeeze(1), (h, c))
        return self.head(h), h, c


@model(FAMILY, (1, 12, 8))
class CellLoop(nn.Module):
    """Cells of two kinds in a Python loop; every step is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LSTMCell(8, 12), nn.GRUCell(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        h, c, g = x.new_zeros(x.shape[0], 12), x.new_zeros(x.shape[0], 12), x.new_zeros(x.shape[0], 10)
        found = []
        for t in range(x.shape[1]):
            h, c = self.a(x[:, t], (h, c))
            g = self.b(h, g)
            found.append(g)
        return torch.stack(found, dim=1)


@model(FAMILY, (1, 9, 20), (1, 7))
class RnnCellLoop(nn.Module):
    """nn.RNNCell with relu, backwards in time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(20, 7, nonlinearity="relu")

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for t in reversed(range(x.size(1))):
            h = self.cell(x[:, t, :], h)
        return h


class ConvLstmCell(nn.Module):
    def __init__(self, i: int, h: int) -> None:
        super().__init__()
        self.h, self.conv = h, nn.Conv2d(i + h, 4 * h, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), self.h, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


@model(FAMILY, (1, 5, 2, 12, 12))
class ConvLstm(nn.Module):
    """Shi et al. 2015: the next frame of a video."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = ConvLstmCell(2, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _, h, w = x.shape
        state = (torch.zeros(n, 6, h, w), torch.zeros(n, 6, h, w))
        for i in range(t):
            state = self.cell(x[:, i], state)
        return self.out(state[0])


@model(FAMILY, ids(50, 1, 10))
class CharLm(nn.Module):
    """Embedding, GRU of two layers, tied output weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 16, padding_idx=0), nn.GRU(16, 16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(x))
        return F.linear(y, self.embed.weight)


@model(FAMILY, ids(30, 1, 9), ids(30, 1, 5))
class Seq2Seq(nn.Module):
    """Bahdanau et al. 2015: encoder, attention in a loop over the decoder's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, 12), nn.Embedding(30, 12)
        self.encode, self.cell = nn.GRU(12, 16, batch_first=True), nn.GRUCell(28, 16)
        self.wa, self.ua, self.va, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(32, 30)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        y, h = self.encode(self.source(source))
        h, found = h[0], []
        for t in range(target.shape[1]):
            score = self.va(torch.tanh(self.wa(h).unsqueeze(1) + self.ua(y)))
            context = (score.softmax(1) * y).sum(1)
            h = self.cell(torch.cat([self.target(target[:, t]), context], -1), h)
            found.append(self.out(torch.cat([h, context], -1)))
        return torch.stack(found, 1)


@model(FAMILY, (1, 12, 6))
class LstmAutoencoder(nn.Module):
    """The code is repeated as the decoder's input."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.out = (
            nn.LSTM(6, 10, batch_first=True),
            nn.LSTM(10, 10, batch_first=True),
            nn.Linear(10, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.encode(x)
        y, _ = self.decode(h[-1].unsqueeze(1).repeat(1, x.shape[1], 1))
        return self.out(y)


@model(FAMILY, (1, 10, 8), small=True)
class MinGru(nn.Module):
    """Feng et al. 2024: gates that do not see the state."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.h = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        z, new = torch.sigmoid(self.z(x)), self.h(x)
        state, found = torch.zeros_like(new[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.lerp(state, new[:, t], z[:, t])
            found.append(state)
        return torch.stack(found, 1)


@model(FAMILY, (1, 10, 8))
class IndRnn(nn.Module):
    """Li et al. 2018: an elementwise recurrence; results written into a tensor in place."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(8, 12), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], x.shape[1], 12)
        h = torch.zeros(x.shape[0], 12)
        for t, u in enumerate(self.w(x).unbind(1)):
            h = F.relu(u + self.u * h)
            y[:, t] = h
        return y


@model(FAMILY, (1, 16, 6))
class LiquidTime(nn.Module):
    """Hasani et al. 2022: closed-form continuous time, with steps of time as part of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.f1, self.f2, self.ta, self.tb = nn.Linear(17, 20), *(nn.Linear(20, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), 12)
        for t in range(x.size(1)):
            z = 1.7159 * torch.tanh(0.666 * self.body(torch.cat([x[:, t, :5], h], 1)))
            gate = torch.sigmoid(self.ta(z) * x[:, t, 5:] + self.tb(z))
            h = torch.tanh(self.f1(z)) * (1.0 - gate) + gate * torch.tanh(self.f2(z))
        return h


@model(FAMILY, (1, 12, 10))
class SpikingNet(nn.Module):
    """Leaky integrate-and-fire with a hard threshold and reset; counts of spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        u, v = torch.zeros(x.shape[0], 24), torch.zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            u = 0.9 * u + self.a(x[:, t])
            spike = (u > 0.5).float()
            u = u * (1 - spike)
            v = 0.95 * v + self.b(spike)
        return v


@model(FAMILY, (1, 8, 6))
class EchoState(nn.Module):
    """A fixed reservoir in buffers, a linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inner", torch.randn(20, 20) * 0.15)
        self.register_buffer("outer", torch.randn(20, 6))
        self.out = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros((x.shape[0], 20))
        for step in x.split(1, dim=1):
            h = 0.7 * h + 0.3 * torch.tanh(torch.addmm(step.squeeze(1) @ self.outer.T, h, self.inner.T))
        return self.out(h)


@model(FAMILY, (1, 14, 6))
class Qrnn(nn.Module):
    """Bradbury et al. 2017: convolutions in time, then fo-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        z, f, o = self.conv(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2).tensor_split(3, dim=-1)
        z, f, o = z.tanh(), f.sigmoid(), o.sigmoid()
        c, found = torch.zeros_like(z[:, 0]), []
        for i in range(z.shape[1]):
            c = f[:, i] * c + (1 - f[:, i]) * z[:, i]
            found.append(o[:, i] * c)
        return torch.stack(found, 1)
