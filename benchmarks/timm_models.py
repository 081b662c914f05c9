"""Networks of timm with random weights: common architectures whose speed, but not accuracy, can be compared.

timm imports torchvision, and torchvision's wheel for CUDA does not find its own operators beside a CPU build of torch:
`import torchvision` then fails while it registers their fake versions. None of the networks here uses them, so the
names are declared first, without an implementation.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from edgec.errors import EdgecError

MODELS = (
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "resnet18",
    "efficientnet_lite0",
    "deit_tiny_patch16_224",
)
INPUT = (1, 3, 224, 224)
SEED = 0
# Enough for any network here; a failed import names what it misses, one operator at a time.
ATTEMPTS = 32
MISSING = re.compile(r"operator torchvision::(\w+) does not exist")

# Declared operators live as long as their library object.
_library: Any = None


def load(name: str) -> nn.Module:
    """`create` for one of the networks that the speed comparisons know, MODELS. Raises EdgecError for other names."""
    if name not in MODELS:
        raise EdgecError("is not a timm model of the benchmark", where=name, hint=f"use {', '.join(MODELS)}")
    return create(name)


def create(name: str) -> nn.Module:
    """Any network of timm with weights drawn from SEED, in evaluation mode; input float32 [n, 3, 224, 224].

    Batch normalisations get statistics and factors of trained-like spread: with timm's own (mean 0, variance 1, factor
    1) folding them would change nothing, and int8 ranges would be unlike those of any trained network.
    Raises EdgecError when timm is not installed or has no such network.
    """
    timm = import_timm()
    if not timm.is_model(name):
        raise EdgecError("is not a network of timm", where=name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(SEED)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module, generator)
    return network


def randomise(norm: nn.BatchNorm2d, generator: torch.Generator) -> None:
    """Statistics and factors within a factor of two of the neutral ones."""
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.normal_(0.0, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(0.0, 0.1, generator=generator)


def import_timm() -> Any:
    """timm, with the torchvision operators declared that its import asks for. Raises EdgecError."""
    global _library
    for _ in range(ATTEMPTS):
        try:
            import timm

            return timm
        except ImportError as error:
            raise EdgecError(f"cannot be imported ({error})", where="timm", hint="make peers") from error
        except RuntimeError as error:
            missing = MISSING.search(str(error))
            if missing is None:
                raise EdgecError(f"cannot be imported ({error})", where="timm") from error
            _library = _library or torch.library.Library("torchvision", "FRAGMENT")
            _library.define(f"{missing[1]}(Tensor x) -> Tensor")
            _forget("torchvision", "timm")
    raise EdgecError("asks for too many operators of torchvision", where="timm")


def _forget(*packages: str) -> None:
    """Take half-imported packages out of the module table, so that the next import starts anew."""
    import sys

    for name in list(sys.modules):
        if name.split(".")[0] in packages:
            del sys.modules[name]
