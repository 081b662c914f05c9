"""Graph networks, vision graphs and networks on sets of points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.dense import conv, conv_bn
from benchmarks.zoo.registry import Draw, ids, model

FAMILY = "graphs and points"
NODES, EDGES = 10, 24


def adjacency(n: int) -> Draw:
    """A symmetric matrix of ones and zeros with ones on the diagonal, [1, n, n]."""

    def draw(generator: torch.Generator) -> Tensor:
        a = (torch.rand(1, n, n, generator=generator) < 0.3).float()
        return ((a + a.mT + torch.eye(n)) > 0).float()

    return draw


@model(FAMILY, (1, NODES, 8), adjacency(NODES), small=True)
class Gcn(nn.Module):
    """Kipf and Welling 2017, with a dense adjacency matrix as an input that is normalised on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        d = adjacency.sum(-1).rsqrt()
        a = d.unsqueeze(-1) * adjacency * d.unsqueeze(-2)
        return self.b(a @ F.relu(self.a(a @ x))).log_softmax(-1)


@model(FAMILY, (1, NODES, 8), adjacency(NODES))
class Gat(nn.Module):
    """Velickovic et al. 2018: attention over neighbours, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.left, self.right = (
            nn.Linear(8, 16, bias=False),
            nn.Parameter(torch.randn(2, 8)),
            nn.Parameter(torch.randn(2, 8)),
        )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.w(x).unflatten(-1, (2, 8))
        e = (h * self.left).sum(-1).unsqueeze(2) + (h * self.right).sum(-1).unsqueeze(1)
        e = F.leaky_relu(e, 0.2).masked_fill(adjacency.unsqueeze(-1) == 0, -1e9)
        return F.elu(torch.einsum("bijh,bjhd->bihd", e.softmax(2), h).flatten(2))


@model(FAMILY, (NODES, 8), ids(NODES, 2, EDGES))
class GraphSage(nn.Module):
    """Hamilton et al. 2017: edges as an input, messages added by index_add, divided by degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.near = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        src, dst = edges[0], edges[1]
        total = torch.zeros_like(x).index_add(0, dst, x[src])
        degree = torch.zeros(x.shape[0]).index_add(0, dst, torch.ones(src.shape[0])).clamp(min=1)
        return F.normalize(F.relu(self.own(x) + self.near(total / degree[:, None])), dim=-1)


@model(FAMILY, (NODES, 8), ids(NODES, 2, EDGES), (EDGES, 3))
class MessagePassing(nn.Module):
    """Gilmer et al. 2017: messages from features of edges, scatter_add, a GRU cell for the nodes, two rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.out = nn.Linear(19, 8), nn.GRUCell(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        src, dst = edges.unbind(0)
        for _ in range(2):
            m = F.relu(self.message(torch.cat([x.index_select(0, src), x.index_select(0, dst), features], -1)))
            total = torch.zeros_like(x).scatter_add(0, dst.unsqueeze(-1).expand_as(m), m)
            x = self.update(total, x)
        return self.out(x).sum(0, keepdim=True)


@model(FAMILY, (NODES, 8), ids(NODES, 2, EDGES))
class ScatterMax(nn.Module):
    """Aggregation by the maximum and the mean of neighbours: scatter_reduce with amax and mean."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(24, 6)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        at = edges[1].unsqueeze(-1).expand(-1, x.shape[-1])
        most = torch.full_like(x, -10.0).scatter_reduce(0, at, x[edges[0]], "amax")
        mean = torch.zeros_like(x).scatter_reduce(0, at, x[edges[0]], "mean", include_self=False)
        return self.out(torch.cat([x, most, mean], -1))


@model(FAMILY, (NODES, 8), ids(NODES, 2, EDGES))
class SparseGat(nn.Module):
    """A softmax over the edges that end in each node: exp, scatter_add, gather."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = nn.Linear(8, 12), nn.Linear(24, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.w(x)
        src, dst = edges[0], edges[1]
        e = F.leaky_relu(self.a(torch.cat([h[src], h[dst]], -1)), 0.2).squeeze(-1)
        e = torch.exp(e - e.max())
        total = torch.zeros(x.shape[0]).scatter_add_(0, dst, e) + 1e-16
        return F.elu(torch.zeros_like(h).index_add_(0, dst, (e / total[dst]).unsqueeze(-1) * h[src]))


@model(FAMILY, (1, 3, 20, 5))
class StGcn(nn.Module):
    """Yan et al. 2018: skeletons; a fixed graph of joints, convolution over time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.rand(3, 5, 5))
        self.edge, self.conv = nn.Parameter(torch.ones(3, 5, 5)), nn.Conv2d(3, 24, 1)
        self.time = nn.Sequential(
            nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, (9, 1), (2, 1), (4, 0)), nn.BatchNorm2d(8)
        )
        self.norm, self.out = nn.BatchNorm1d(15), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, v = x.size()
        x = self.norm(x.permute(0, 3, 1, 2).contiguous().view(n, v * c, t)).view(n, v, c, t).permute(0, 2, 3, 1)
        y = self.conv(x).view(n, 3, 8, t, v)
        y = torch.einsum("nkctv,kvw->nctw", y, self.graph * self.edge)
        return self.out(F.relu(self.time(y)).mean((2, 3)))


def knn(x: Tensor, k: int) -> Tensor:
    """Indices [n, p, k] of the nearest of [n, c, p] points."""
    inner = -2 * torch.matmul(x.transpose(2, 1), x)
    square = torch.sum(x**2, dim=1, keepdim=True)
    return (-square - inner - square.transpose(2, 1)).topk(k=k, dim=-1)[1]


@model(FAMILY, (1, 3, 24))
class EdgeConv(nn.Module):
    """DGCNN (Wang et al. 2019): neighbours by flat indices, as its authors write it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2))
        self.out = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        n, c, p = x.shape
        index = (knn(x, 4) + torch.arange(0, n).view(-1, 1, 1) * p).view(-1)
        x = x.transpose(2, 1).contiguous()
        near = x.view(n * p, -1)[index, :].view(n, p, 4, c)
        x = x.view(n, p, 1, c).repeat(1, 1, 4, 1)
        y = self.a(torch.cat((near - x, x), dim=3).permute(0, 3, 1, 2)).max(dim=-1, keepdim=False)[0]
        return self.out(
            torch.cat((F.adaptive_max_pool1d(y, 1).view(n, -1), F.adaptive_avg_pool1d(y, 1).view(n, -1)), 1)
        )


@model(FAMILY, (1, 3, 32, 32))
class VigKnn(nn.Module):
    """Vision GNN (Han et al. 2022): a graph of nearest patches, max-relative aggregation."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.join, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x).flatten(2).transpose(1, 2)
        d = ((t.unsqueeze(2) - t.unsqueeze(1)) ** 2).sum(-1)
        i = d.topk(5, dim=-1, largest=False).indices
        b, n, c = t.shape
        near = torch.gather(t.unsqueeze(1).expand(b, n, n, c), 2, i.unsqueeze(-1).expand(b, n, 5, c))
        return self.head(F.gelu(self.join(torch.cat([t, (near - t.unsqueeze(2)).amax(2)], -1))).mean(1))


@model(FAMILY, (1, 3, 32, 32), int8=True)
class MobileVig(nn.Module):
    """Munir et al. 2023: a static graph by rolling rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.join = conv_bn(3, 16, stride=4), nn.Sequential(conv(32, 16, 1), nn.BatchNorm2d(16), nn.GELU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        most = torch.zeros_like(x)
        for shift in range(2, x.shape[2], 2):
            most = torch.max(most, torch.roll(x, -shift, 2) - x)
            most = torch.max(most, torch.cat([x[..., -shift:], x[..., :-shift]], 3) - x)
        return self.head(self.join(torch.cat([x, most], 1)).mean((2, 3)))


@model(FAMILY, (1, 3, 40), int8=True)
class PointNet(nn.Module):
    """Qi et al. 2017: a learned transform of the input, shared MLPs, a maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 9)
        self.body = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 48, 1), nn.BatchNorm1d(48)
        )
        self.out = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        t = self.t2(torch.max(self.t1(x), 2, keepdim=True)[0].view(-1, 16)) + torch.eye(3).view(1, 9).repeat(
            x.size(0), 1
        )
        x = torch.bmm(x.transpose(2, 1), t.view(-1, 3, 3)).transpose(2, 1)
        return F.log_softmax(self.out(torch.max(self.body(x), 2)[0]), dim=1)


def take(points: Tensor, index: Tensor) -> Tensor:
    """Rows of [n, p, c] by indices [n, ...], as PointNet++ writes it."""
    n = points.shape[0]
    shape = [n] + [1] * (index.dim() - 1)
    rows = torch.arange(n, dtype=torch.long).view(shape).expand_as(index)
    return points[rows, index, :]


@model(FAMILY, (1, 24, 3))
class PointNet2(nn.Module):
    """Qi et al. 2017: farthest-point sampling in a loop, balls of fixed size, shared MLP, maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.out = (
            nn.Sequential(conv(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 24, 1)),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, p, _ = x.shape
        distance, farthest, chosen = torch.full((n, p), 1e10), torch.zeros(n, dtype=torch.long), []
        for _ in range(6):
            chosen.append(farthest)
            centre = take(x, farthest.unsqueeze(1))
            distance = torch.minimum(distance, ((x - centre) ** 2).sum(-1))
            farthest = distance.max(-1)[1]
        centres = take(x, torch.stack(chosen, 1))
        square = ((centres.unsqueeze(2) - x.unsqueeze(1)) ** 2).sum(-1)
        index = torch.arange(p).view(1, 1, p).repeat(n, 6, 1)
        index = torch.where(square > 4.0, torch.full_like(index, p), index).sort(-1)[0][:, :, :8]
        first = index[:, :, :1].expand(-1, -1, 8)
        index = torch.where(index == p, first, index)
        local = take(x, index) - centres.unsqueeze(2)
        y = self.mlp(local.permute(0, 3, 2, 1)).max(2)[0]
        return self.out(y.max(-1)[0])


@model(FAMILY, (1, 20, 4))
class Pillars(nn.Module):
    """PointPillars (Lang et al. 2019): points encoded, scattered onto a grid by their cell, a 2-D network."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.conv = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), conv_bn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        cell = (torch.sigmoid(x[0, :, :2]) * 8).floor().long().clamp(0, 7)
        index = cell[:, 1] * 8 + cell[:, 0]
        y = self.point(x[0])
        canvas = torch.zeros(64, 8).index_reduce(0, index, y, "amax")
        return self.conv(canvas.t().reshape(1, 8, 8, 8))


@model(FAMILY, (1, 12, 3), ids(6, 1, 12))
class SchNet(nn.Module):
    """Schuett et al. 2017: distances of all pairs, radial basis functions, continuous filters; atoms as codes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.filter, self.out = (
            nn.Embedding(6, 12),
            nn.Sequential(nn.Linear(8, 12), nn.Softplus(), nn.Linear(12, 12)),
            nn.Linear(12, 1),
        )
        self.register_buffer("centres", torch.linspace(0, 5, 8))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        d = (x.unsqueeze(1) - x.unsqueeze(2)).square().sum(-1).add(1e-9).sqrt()
        w = self.filter(torch.exp(-2 * (d.unsqueeze(-1) - self.centres) ** 2))
        cut = 0.5 * (torch.cos(d * torch.pi / 5) + 1) * (d < 5)
        h = self.embed(kind)
        h = h + torch.einsum("bijc,bij,bjc->bic", w, cut, h)
        return self.out(F.softplus(h) - 0.6931).sum(1)


@model(FAMILY, (1, 10, 4), (1, 10, 3))
class Equivariant(nn.Module):
    """EGNN (Satorras et al. 2021): features and places, both changed by messages of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node = nn.Sequential(nn.Linear(9, 12), nn.SiLU()), nn.Linear(16, 4)
        self.place = nn.Linear(12, 1, bias=False)
        self.register_buffer("other", 1 - torch.eye(10))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n = h.shape[1]
        d = x[:, :, None] - x[:, None]
        pairs = [h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1), (d**2).sum(-1, keepdim=True)]
        m = self.edge(torch.cat(pairs, -1)) * self.other[..., None]
        return h + self.node(torch.cat([h, m.sum(2)], -1)), x + (d * self.place(m).tanh()).mean(2)
