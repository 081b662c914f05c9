"""Detection heads without non-maximum suppression, trackers and text recognition."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.dense import Backbone, conv, conv_bn
from benchmarks.zoo.registry import ids, model

FAMILY = "detection and recognition"


@model(FAMILY, (1, 3, 32, 32))
class Ssd(nn.Module):
    """Liu et al. 2016: two scales; the twenty best boxes by score, without suppression."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(conv_bn(3, 16), nn.MaxPool2d(2), conv_bn(16, 32), nn.MaxPool2d(2))
        self.b = nn.Sequential(conv_bn(32, 64), nn.MaxPool2d(2))
        self.classes = nn.ModuleList([conv(32, 4 * 5), conv(64, 6 * 5)])
        self.boxes = nn.ModuleList([conv(32, 4 * 4), conv(64, 6 * 4)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = self.a(x)
        classes, boxes = [], []
        for y, c, b in zip((a, self.b(a)), self.classes, self.boxes):
            classes.append(c(y).permute(0, 2, 3, 1).reshape(y.shape[0], -1, 5))
            boxes.append(b(y).permute(0, 2, 3, 1).reshape(y.shape[0], -1, 4))
        scores, places = torch.cat(classes, 1).softmax(-1), torch.cat(boxes, 1)
        best, index = scores[..., 1:].max(-1).values.topk(20, 1)
        return scores, places, best, torch.gather(places, 1, index.unsqueeze(-1).expand(-1, -1, 4))


@model(FAMILY, (1, 3, 64, 64), int8=True)
class SsdLite(nn.Module):
    """With priors as a constant: boxes decoded from centre and size to corners, and clipped."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleList(nn.Sequential(conv_bn(c, c, groups=c), conv(c, 2 * 8, 1)) for c in (32, 64))
        priors = []
        for s in (8, 4):
            ys, xs = torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")
            centre = torch.stack([(xs + 0.5) / s, (ys + 0.5) / s], -1).reshape(-1, 1, 2).repeat(1, 2, 1)
            priors.append(
                torch.cat([centre, torch.tensor([0.2, 0.4]).view(1, 2, 1).expand(s * s, 2, 2)], -1).view(-1, 4)
            )
        self.register_buffer("priors", torch.cat(priors))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, a, b = self.backbone(x)
        y = torch.cat([h(m).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8) for h, m in zip(self.heads, (a, b))], 1)
        moves, scores = y[..., :4], y[..., 4:]
        centre = self.priors[:, :2] + moves[..., :2] * 0.1 * self.priors[:, 2:]
        size = self.priors[:, 2:] * torch.exp(moves[..., 2:].clamp(max=4.0) * 0.2)
        boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
        return boxes.clamp(0, 1), scores.softmax(-1)


class Fpn(nn.Module):
    """Lin et al. 2017: lateral and top-down connections."""

    def __init__(self, sizes: tuple[int, ...], c: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(conv(s, c, 1) for s in sizes)
        self.smooth = nn.ModuleList(conv(c, c) for _ in sizes)

    def forward(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        found = [layer(m) for layer, m in zip(self.lateral, maps)]
        for i in range(len(found) - 1, 0, -1):
            found[i - 1] = found[i - 1] + F.interpolate(found[i], size=found[i - 1].shape[-2:], mode="nearest")
        return [layer(m) for layer, m in zip(self.smooth, found)]


@model(FAMILY, (1, 3, 64, 64), int8=True)
class RetinaNet(nn.Module):
    """Lin et al. 2017: shared heads over the pyramid's levels."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fpn = Backbone(), Fpn((16, 32, 64), 16)
        self.extra = conv(16, 16, stride=2)
        self.classes = nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 3 * 4))
        self.boxes = nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 3 * 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.fpn(self.backbone(x))
        maps.append(self.extra(maps[-1]))

        def flat(head: nn.Module) -> Tensor:
            found = []
            for m in maps:
                y = head(m)
                n, _, h, w = y.shape
                found.append(y.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4))
            return torch.cat(found, dim=1)

        return {"cls_logits": flat(self.classes).sigmoid(), "bbox_regression": flat(self.boxes)}


class Csp(nn.Module):
    """YOLOv8's C2f block: halves, bottlenecks in a row, all of them joined."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.b = self.cv(i, o, 1), self.cv(o // 2 * 4, o, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(self.cv(o // 2, o // 2, 3), self.cv(o // 2, o // 2, 3)) for _ in range(2)
        )

    @staticmethod
    def cv(i: int, o: int, k: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o, eps=1e-3), nn.SiLU(True))

    def forward(self, x: Tensor) -> Tensor:
        found = list(self.a(x).chunk(2, 1))
        found.extend(found[-1] + block(found[-1]) for block in self.blocks)
        return self.b(torch.cat(found, 1))


class Sppf(nn.Module):
    """Max pools in a row."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = Csp.cv(c, c // 2, 1), Csp.cv(c * 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.a(x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], 5, 1, 2))
        return self.b(torch.cat(found, 1))


class YoloTrunk(nn.Module):
    """Maps at 1/8 and 1/16 after a path-aggregation neck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Csp.cv(3, 8, 3, 2), Csp.cv(8, 16, 3, 2), Csp(16, 16), Csp.cv(16, 32, 3, 2))
        self.c3, self.down, self.c4 = Csp(32, 32), Csp.cv(32, 64, 3, 2), nn.Sequential(Csp(64, 64), Sppf(64))
        self.n3, self.d3, self.n4 = Csp(96, 32), Csp.cv(32, 32, 3, 2), Csp(96, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.c3(self.stem(x))
        b = self.c4(self.down(a))
        a = self.n3(torch.cat([F.interpolate(b, scale_factor=2, mode="nearest"), a], 1))
        return a, self.n4(torch.cat([self.d3(a), b], 1))


@model(FAMILY, (1, 3, 64, 64), int8=True)
class Yolov8(nn.Module):
    """Decoupled heads; distances as expectations over 8 bins, anchors made in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = YoloTrunk()
        self.boxes = nn.ModuleList(nn.Sequential(Csp.cv(c, 16, 3), conv(16, 32, 1)) for c in (32, 64))
        self.classes = nn.ModuleList(nn.Sequential(Csp.cv(c, 16, 3), conv(16, 6, 1)) for c in (32, 64))
        self.register_buffer("bins", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.trunk(x)
        boxes = torch.cat([h(m).flatten(2) for h, m in zip(self.boxes, maps)], 2)
        scores = torch.cat([h(m).flatten(2) for h, m in zip(self.classes, maps)], 2).sigmoid()
        b, _, a = boxes.shape
        reach = F.conv2d(boxes.view(b, 4, 8, a).transpose(2, 1).softmax(1), self.bins).view(b, 4, a)
        anchors, strides = [], []
        for m, s in zip(maps, (8, 16)):
            ys, xs = torch.meshgrid(torch.arange(m.shape[2]) + 0.5, torch.arange(m.shape[3]) + 0.5, indexing="ij")
            anchors.append(torch.stack((xs, ys), -1).view(-1, 2))
            strides.append(torch.full((m.shape[2] * m.shape[3], 1), float(s)))
        centre, stride = torch.cat(anchors).t().unsqueeze(0), torch.cat(strides).t()
        low, high = reach.chunk(2, 1)
        x1y1, x2y2 = centre - low, centre + high
        return torch.cat([torch.cat([(x1y1 + x2y2) / 2, x2y2 - x1y1], 1) * stride, scores], 1)


@model(FAMILY, (1, 3, 64, 64), int8=True)
class Yolov5(nn.Module):
    """Anchor boxes: five-dimensional views, grids, squared sigmoids."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = YoloTrunk()
        self.heads = nn.ModuleList(conv(c, 3 * 9, 1) for c in (32, 64))
        self.register_buffer(
            "anchors", torch.tensor([[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119.0]]).view(2, 1, 3, 1, 1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for i, (head, m, s) in enumerate(zip(self.heads, self.trunk(x), (8, 16))):
            b, _, h, w = m.shape
            y = head(m).view(b, 3, 9, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grid = torch.stack((xs, ys), 2).expand(1, 3, h, w, 2) - 0.5
            y[..., 0:2] = (y[..., 0:2] * 2 + grid) * s
            y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * self.anchors[i]
            found.append(y.view(b, -1, 9))
        return torch.cat(found, 1)


@model(FAMILY, (1, 3, 64, 64), int8=True)
class TinyYolov3(nn.Module):
    """Leaky ReLUs, a max pool of stride 1 after padding on one side."""

    def __init__(self) -> None:
        super().__init__()

        def cbl(i: int, o: int, k: int = 3) -> nn.Sequential:
            return nn.Sequential(conv(i, o, k, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.1))

        self.a = nn.Sequential(
            cbl(3, 8), nn.MaxPool2d(2), cbl(8, 16), nn.MaxPool2d(2), cbl(16, 32), nn.MaxPool2d(2), cbl(32, 32)
        )
        self.b = nn.Sequential(
            nn.MaxPool2d(2), cbl(32, 64), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1), cbl(64, 64)
        )
        self.out1, self.up, self.out2 = conv(64, 18, 1), cbl(64, 16, 1), conv(48, 18, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        b = self.b(a)
        return self.out1(b), self.out2(torch.cat([F.interpolate(self.up(b), scale_factor=2.0), a], 1))


@model(FAMILY, (1, 3, 64, 64), int8=True)
class CenterNet(nn.Module):
    """Zhou et al. 2019: peaks of heat maps by a max pool, the ten highest, their sizes gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.heat, self.size = Backbone(), conv(16, 3), conv(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.backbone(x)[0]
        heat = torch.sigmoid(self.heat(y))
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
        scores, where = peaks.view(x.shape[0], -1).topk(10)
        cells = heat.shape[2] * heat.shape[3]
        index = (where % cells).unsqueeze(2).expand(-1, -1, 2)
        return scores, where // cells, self.size(y).flatten(2).transpose(1, 2).gather(1, index)


@model(FAMILY, (1, 3, 64, 64), int8=True)
class NanoDet(nn.Module):
    """Shuffle units, a depthwise head, and distances from bins by a product with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.fpn = Fpn((32, 64), 16)
        self.heads = nn.ModuleList(
            nn.Sequential(conv(16, 16, 5, groups=16), nn.BatchNorm2d(16), nn.LeakyReLU(0.1), conv(16, 4 + 4 * 8, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for head, m in zip(self.heads, self.fpn(self.backbone(x)[1:])):
            scores, bins = head(m).split([4, 32], dim=1)
            bins = bins.flatten(2).permute(0, 2, 1).reshape(x.shape[0], -1, 4, 8)
            reach = F.linear(F.softmax(bins, dim=-1), torch.linspace(0, 7, 8).unsqueeze(0)).squeeze(-1)
            found.append(torch.cat([scores.sigmoid().flatten(2).permute(0, 2, 1), reach], -1))
        return torch.cat(found, 1)


@model(FAMILY, (1, 3, 64, 64), int8=True)
class EfficientDet(nn.Module):
    """Tan et al. 2020: maps joined with weights that are normalised when the network runs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.enter = nn.ModuleList(conv_bn(c, 16, 1) for c in (16, 32, 64))
        self.w1, self.w2 = nn.Parameter(torch.rand(2) + 0.5), nn.Parameter(torch.rand(3) + 0.5)
        self.mix = nn.ModuleList(
            nn.Sequential(nn.SiLU(), conv(16, 16, groups=16), conv(16, 16, 1), nn.BatchNorm2d(16)) for _ in range(2)
        )
        self.out = nn.Sequential(conv(16, 16, groups=16), conv(16, 9, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c = (f(m) for f, m in zip(self.enter, self.backbone(x)))
        w = F.relu(self.w1)
        w = w / (w.sum() + 1e-4)
        b2 = self.mix[0](w[0] * b + w[1] * F.interpolate(c, scale_factor=2))
        w = F.relu(self.w2)
        w = w / (w.sum() + 1e-4)
        a2 = self.mix[1](w[0] * a + w[1] * F.interpolate(b2, scale_factor=2) + w[2] * F.interpolate(c, scale_factor=4))
        return self.out(a2), self.out(b2)


@model(FAMILY, (1, 3, 64, 64))
class Detr(nn.Module):
    """Carion et al. 2020, after its short form: nn.Transformer over the map, learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.enter = Backbone(), conv(64, 32, 1)
        self.transformer = nn.Transformer(32, 4, 1, 2, 64)
        self.query, self.row, self.column = (nn.Parameter(torch.rand(n, d)) for n, d in ((6, 32), (8, 16), (8, 16)))
        self.classes, self.boxes = nn.Linear(32, 5), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        m = self.enter(self.backbone(x)[2])
        h, w = m.shape[-2:]
        place = torch.cat(
            [self.column[:w].unsqueeze(0).repeat(h, 1, 1), self.row[:h].unsqueeze(1).repeat(1, w, 1)], dim=-1
        )
        y = self.transformer(place.flatten(0, 1).unsqueeze(1) + m.flatten(2).permute(2, 0, 1), self.query.unsqueeze(1))
        return {"logits": self.classes(y).transpose(0, 1), "boxes": self.boxes(y).sigmoid().transpose(0, 1)}


@model(FAMILY, (1, 3, 64, 64), (3, 4))
class RoiPool(nn.Module):
    """Boxes as an input: each is resampled to 4 x 4 by grid sampling, then classified (as RoIAlign does)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.out = Backbone(), nn.Linear(16 * 16, 5)
        self.register_buffer("steps", (torch.arange(4) + 0.5) / 4)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        y = self.backbone(x)[0]
        low, high = torch.sigmoid(boxes[:, :2]), torch.sigmoid(boxes[:, 2:])
        at = low[:, None] + (high - low)[:, None] * self.steps[None, :, None]
        grid = torch.stack([at[:, None, :, 0].expand(-1, 4, -1), at[:, :, None, 1].expand(-1, -1, 4)], -1)
        found = F.grid_sample(y.expand(boxes.shape[0], -1, -1, -1), grid * 2 - 1, align_corners=False)
        return self.out(found.flatten(1))


@model(FAMILY, (1, 3, 16, 16), (1, 3, 32, 32), int8=True)
class SiamFc(nn.Module):
    """Bertinetto et al. 2016: the features of one image are the kernel for those of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8, stride=2), conv(8, 16))

    def forward(self, template: Tensor, search: Tensor) -> Tensor:
        kernel, field = self.features(template), self.features(search)
        n, c, h, w = field.shape
        y = F.conv2d(field.reshape(1, n * c, h, w), kernel, groups=n)
        return y.view(n, 1, y.shape[-2], y.shape[-1]) * 1e-2


@model(FAMILY, (1, 1, 32, 96))
class Crnn(nn.Module):
    """Shi et al. 2015: text in a line; convolutions, bidirectional LSTM over columns, log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(1, 16),
            nn.MaxPool2d(2, 2),
            conv_bn(16, 32),
            nn.MaxPool2d(2, 2),
            conv_bn(32, 32),
            nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            conv_bn(32, 32),
            nn.AvgPool2d((4, 2), (4, 2)),
        )
        self.rnn, self.out = nn.LSTM(32, 24, bidirectional=True), nn.Linear(48, 37)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(self.features(x).squeeze(2).permute(2, 0, 1))
        return self.out(y).log_softmax(2)


@model(FAMILY, (1, 3, 32, 64), ids(20, 1, 7))
class TextDecoder(nn.Module):
    """Recognition with a transformer: sines for places, a causal mask, cross attention."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.embed = nn.Embedding(20, 32)
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")
        self.decoder, self.out = nn.TransformerDecoder(layer, 2), nn.Linear(32, 20)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        memory = self.features(image).mean(2).transpose(1, 2)
        n = text.shape[1]
        angle = torch.arange(n)[:, None] * torch.exp(torch.arange(0, 32, 2) * (-math.log(1e4) / 32))
        place = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        mask = torch.triu(torch.full((n, n), float("-inf")), diagonal=1)
        return self.out(self.decoder(self.embed(text) * 32**0.5 + place, memory, tgt_mask=mask))


@model(FAMILY, (1, 3, 32, 32), int8=True)
class FaceEmbedding(nn.Module):
    """MobileFaceNet's end and ArcFace's scores: global depthwise convolution, unit vectors, cosine with classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16, stride=2), nn.PReLU(16), conv(16, 32, stride=2), nn.BatchNorm2d(32))
        self.whole, self.norm = nn.Conv2d(32, 32, 8, groups=32, bias=False), nn.BatchNorm1d(32)
        self.classes = nn.Parameter(torch.randn(10, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e = F.normalize(self.norm(self.whole(self.features(x)).flatten(1)))
        return e, 30 * F.linear(e, F.normalize(self.classes))


@model(FAMILY, (1, 3, 64, 64), int8=True)
class PatchCore(nn.Module):
    """Anomaly detection: distance of each patch to a bank of normal features, enlarged and blurred to a map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.register_buffer("bank", torch.rand(40, 48))
        g = torch.exp(-(torch.arange(-2.0, 3) ** 2) / 2)
        self.register_buffer("blur", (torch.outer(g, g) / g.sum() ** 2).view(1, 1, 5, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, _ = self.backbone(x)
        a = F.avg_pool2d(a, 3, 1, 1)
        b = F.interpolate(F.avg_pool2d(b, 3, 1, 1), size=a.shape[-2:], mode="bilinear", align_corners=False)
        f = torch.cat([a, b], 1).flatten(2).transpose(1, 2)
        far = torch.cdist(f, self.bank.unsqueeze(0).expand(f.shape[0], -1, -1)).min(2).values
        score = far.amax(1)
        far = F.interpolate(far.view(-1, 1, *a.shape[-2:]), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return F.conv2d(F.pad(far, (2, 2, 2, 2), mode="reflect"), self.blur), score
