"""Control flow: loops with a fixed number of rounds, scans, conditions; and iterative solvers inside networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.registry import ids, model

FAMILY = "control flow and solvers"


@model(FAMILY, (1, 8))
class WhileLoop(nn.Module):
    """torch.while_loop with a counter: three rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, torch.tanh(self.body(y))

        _, y = while_loop(lambda i, y: i < 3, step, (torch.zeros((), dtype=torch.int64), x))
        return y


@model(FAMILY, (10, 1, 8))
class ScanRnn(nn.Module):
    """torch's scan over steps: a recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from torch._higher_order_ops.scan import scan

        def step(h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(u + self.u(h))
            return h, h.clone()

        return scan(step, torch.zeros(x.shape[1], 12), self.w(x), dim=0)


@model(FAMILY, (1, 16))
class CondExit(nn.Module):
    """torch.cond: a sure early answer is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.early = nn.Linear(16, 32), nn.Linear(32, 10)
        self.late = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        e = self.early(h)
        return torch.cond(e.softmax(-1).max() > 0.9, lambda h, e: e.clone(), lambda h, e: self.late(h), (h, e))


@model(FAMILY, (1, 12), small=True)
class Hopfield(nn.Module):
    """Ramsauer et al. 2021: five rounds of retrieval from stored patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(20, 12))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = F.softmax(2 * x @ self.patterns.T, -1) @ self.patterns
        return x


@model(FAMILY, (1, 6))
class NeuralOde(nn.Module):
    """Chen et al. 2018: Runge-Kutta of fourth order with eight fixed steps."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 6))

    def rate(self, t: float, y: Tensor) -> Tensor:
        return self.f(torch.cat([y, torch.full_like(y[:, :1], t)], -1))

    def forward(self, y: Tensor) -> Tensor:
        h = 1 / 8
        for i in range(8):
            t = i * h
            k1 = self.rate(t, y)
            k2 = self.rate(t + h / 2, y + h / 2 * k1)
            k3 = self.rate(t + h / 2, y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + self.rate(t + h, y + h * k3))
        return y


@model(FAMILY, (1, 20), small=True)
class Lista(nn.Module):
    """Gregor and LeCun 2010: unrolled iterative shrinkage."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.s, self.t = (
            nn.Linear(20, 32, bias=False),
            nn.Linear(32, 32, bias=False),
            nn.Parameter(torch.rand(32) * 0.2),
        )

    def forward(self, x: Tensor) -> Tensor:
        b = self.w(x)
        z = torch.zeros_like(b)
        for _ in range(4):
            c = b + self.s(z)
            z = torch.sign(c) * F.relu(c.abs() - self.t)
        return z


@model(FAMILY, (1, 6, 8), (1, 7, 8))
class Sinkhorn(nn.Module):
    """SuperGlue's end (Sarlin et al. 2020): optimal transport in logarithms, mutual best matches."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.bin = nn.Linear(8, 8), nn.Parameter(torch.tensor(1.0))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.einsum("bid,bjd->bij", self.project(a), self.project(b))
        n, m = s.shape[1:]
        rows, columns, corner = (self.bin.expand(s.shape[0], *size) for size in ((n, 1), (1, m), (1, 1)))
        z = torch.cat([torch.cat([s, rows], -1), torch.cat([columns, corner], -1)], 1)
        u, v = torch.zeros(s.shape[0], n + 1), torch.zeros(s.shape[0], m + 1)
        for _ in range(6):
            u = -torch.logsumexp(z + v.unsqueeze(1), dim=2)
            v = -torch.logsumexp(z + u.unsqueeze(2), dim=1)
        z = z + u.unsqueeze(2) + v.unsqueeze(1)
        return z, z[:, :-1, :-1].max(2).indices


@model(FAMILY, (1, 8, 8))
class NewtonInverse(nn.Module):
    """Powers and the inverse of a matrix by Newton and Schulz, a determinant-free whitening."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a = x @ x.mT / 8 + torch.eye(8)
        trace = torch.diagonal(a, dim1=-2, dim2=-1).sum(-1)[:, None, None]
        y, z = a / trace, torch.eye(8).expand_as(a)
        for _ in range(5):
            t = 1.5 * torch.eye(8) - 0.5 * z @ y
            y, z = y @ t, t @ z
        return self.out(z / trace.sqrt() @ x)


@model(FAMILY, (1, 10, 5))
class CrfViterbi(nn.Module):
    """The best path through tags: maxima forwards, indices backwards; whole numbers as output."""

    def __init__(self) -> None:
        super().__init__()
        self.emit, self.move = nn.Linear(5, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e = self.emit(x)
        score, back = e[:, 0], []
        for t in range(1, e.shape[1]):
            best, where = (score.unsqueeze(2) + self.move).max(1)
            score = best + e[:, t]
            back.append(where)
        total, tag = score.max(-1)
        path = [tag]
        for where in reversed(back):
            tag = where.gather(1, tag.unsqueeze(1)).squeeze(1)
            path.append(tag)
        return total, torch.stack(path[::-1], 1)


@model(FAMILY, ids(30, 1, 4))
class GreedyDecoder(nn.Module):
    """Text made step by step: the best next token is appended, six times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(30, 12), nn.Linear(24, 12), nn.Linear(12, 30)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).mean(1)
        token = x[:, -1]
        found = []
        for _ in range(6):
            h = torch.tanh(self.cell(torch.cat([h, self.embed(token)], -1)))
            token = self.out(h).argmax(-1)
            found.append(token)
        return torch.stack(found, -1)


@model(FAMILY, (1, 6, 3), (1, 6, 3))
class KalmanStep(nn.Module):
    """Predict and update, with a 2 x 2 inverse written out, over six measurements."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.h = nn.Parameter(torch.eye(3) + 0.1 * torch.randn(3, 3)), nn.Parameter(torch.randn(2, 3))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        x, p, found = torch.zeros(z.shape[0], 3, 1), torch.eye(3).expand(z.shape[0], 3, 3), []
        for t in range(z.shape[1]):
            x, p = self.f @ x + 0.1 * u[:, t, :, None], self.f @ p @ self.f.mT + 0.1 * torch.eye(3)
            s = self.h @ p @ self.h.mT + torch.eye(2)
            a, b, c, d = s[:, 0, 0], s[:, 0, 1], s[:, 1, 0], s[:, 1, 1]
            inverse = (
                torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2) / (a * d - b * c)[:, None, None]
            )
            k = p @ self.h.mT @ inverse
            x = x + k @ (z[:, t, :2, None] - self.h @ x)
            p = p - k @ self.h @ p
            found.append(x.squeeze(-1))
        return torch.stack(found, 1)
