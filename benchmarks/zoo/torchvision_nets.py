"""Networks of torchvision: classification, segmentation, detection up to the suppression of boxes, video, flow."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor, nn

from benchmarks.timm_models import import_timm
from benchmarks.zoo.registry import add

CLASSES = 100
# name:size; with `*` the network is not quantised here.
CLASSIFICATION = """
alexnet:96 squeezenet1_1:64 shufflenet_v2_x0_5:64 mobilenet_v2:64 mobilenet_v3_large:64 mnasnet0_5:64 googlenet:64
inception_v3:96 regnet_y_400mf:64 resnet18:64 resnext50_32x4d:64 wide_resnet50_2:64* vgg11_bn:64 densenet121:64
efficientnet_v2_s:64 convnext_tiny:64 swin_t:64 swin_v2_t:64 vit_b_32:224* maxvit_t:224*
"""
SEGMENTATION = "lraspp_mobilenet_v3_large:64 deeplabv3_mobilenet_v3_large:64 fcn_resnet50:64*"
DETECTION = """
ssdlite320_mobilenet_v3_large:96 ssd300_vgg16:300* fcos_resnet50_fpn:64* retinanet_resnet50_fpn:64*
fasterrcnn_mobilenet_v3_large_fpn:64
"""
VIDEO = "r3d_18:8x32 mc3_18:8x32 r2plus1d_18:8x32 s3d:16x224 swin3d_t:4x64"
FLOW = "raft_small:128"


def _models() -> Any:
    import_timm()
    return importlib.import_module("torchvision.models")


def classifier(name: str) -> nn.Module:
    """A network with random weights. Raises EdgecError without torchvision, as all in this file."""
    # Without the branches of training that take part of the weights only.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return _models().get_model(name, weights=None, num_classes=CLASSES, **options)


class Segmenter(nn.Module):
    """The map of classes alone, out of torchvision's dictionary."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = _models().get_model(name, weights=None, weights_backbone=None, num_classes=21)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["out"]


class Detector(nn.Module):
    """Backbone and heads; what follows in torchvision depends on the values (sizes of images, suppressed boxes)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        whole = _models().get_model(name, weights=None, weights_backbone=None, num_classes=21)
        self.backbone = whole.backbone
        self.head = whole.rpn.head if hasattr(whole, "rpn") else whole.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def video(name: str) -> nn.Module:
    """A classifier of clips."""
    return _models().get_model(name, weights=None, num_classes=CLASSES)


class Flow(nn.Module):
    """Displacements after two updates, of the size of the images."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = _models().get_model(name, weights=None)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.network(a, b, num_flow_updates=2)[-1]


def _register() -> None:
    for text, family, make in (
        (CLASSIFICATION, "torchvision, classification", classifier),
        (SEGMENTATION, "torchvision, segmentation", Segmenter),
        (DETECTION, "torchvision, detection", Detector),
    ):
        for each in text.split():
            name, _, size = each.partition(":")
            pixels = int(size.rstrip("*"))
            made = functools.partial(make, name)
            add(f"tv_{name}", family, made, (1, 3, pixels, pixels), int8=not size.endswith("*"))
    for each in VIDEO.split():
        name, _, size = each.partition(":")
        frames, _, pixels = size.partition("x")
        made = functools.partial(video, name)
        add(f"tv_{name}", "torchvision, video and flow", made, (1, 3, int(frames), int(pixels), int(pixels)))
    for each in FLOW.split():
        name, _, size = each.partition(":")
        shape = (1, 3, int(size), int(size))
        add(f"tv_{name}", "torchvision, video and flow", functools.partial(Flow, name), shape, shape)


_register()
