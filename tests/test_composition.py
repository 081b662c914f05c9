"""Whole pipelines of compression, from a PyTorch model to checked code: every step gated, the device code equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.compile import CompileResult, compile_model
from edgec.sparsity import sparsities
from tests.passes.reparam import networks as nets

CLASSES = 4
SEED = 0


class Branched(nn.Module):
    """A small RepVGG: what every scheme for convolutions finds something to do in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nets.ConvNorm(3, 16, 3)
        self.blocks = nn.Sequential(nets.RepVGGBlock(16, 32, 2), nets.RepVGGBlock(32, 32), nets.RepVGGBlock(32, 64, 2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A vision transformer whose patch embedding has branches."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.stem = nets.RepVGGBlock(3, 16, 2)
        self.patch = nn.Conv2d(16, width, 2, 2)
        generator = torch.Generator().manual_seed(3)
        self.token = nn.Parameter(torch.randn(1, 1, width, generator=generator))
        self.place = nn.Parameter(torch.randn(1, 26, width, generator=generator))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(self.stem(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


def samples(n: int = 96) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(SEED)
    return generator.random((n, 3, 20, 20), dtype=np.float32), generator.integers(0, CLASSES, n)


def compiled(network: nn.Module, passes: str, target: str, folder: Path) -> CompileResult:
    return compile_model(
        nets.trained_like(network),
        target=target,
        output=folder / "out",
        passes=passes,
        data=samples(),
        input_shape=(1, 3, 20, 20),
        device_samples=8,
        seed=SEED,
    )


CONVOLUTIONS = (
    "collapse, prune-channels{macs=0.7}, prune-1xn{n=4 sparsity=0.25 force=true}, recalibrate-bn, "
    "finetune{steps=6 batch=32}, fold-bn"
)
FEW_BITS = "reconstruct{weights=4 activations=8 steps=10 samples=32}"


@pytest.mark.parametrize(
    ("target", "last"),
    [
        pytest.param("host", FEW_BITS, marks=pytest.mark.host),
        pytest.param("cortex-a72", FEW_BITS, marks=pytest.mark.qemu),
        pytest.param("neoverse-n1", "quantize-int8", marks=pytest.mark.qemu),
    ],
)
def test_convolutions_are_bit_equal_on_the_device(target: str, last: str, tmp_path: Path) -> None:
    result = compiled(Branched(), f"{CONVOLUTIONS}, {last}", target, tmp_path)
    stages = [s.name for s in result.ledger.stages]
    before = ["collapse", "prune-channels", "prune-1xn", "recalibrate-bn", "finetune", "fold-bn"]
    assert stages[2:] == [*before, last.partition("{")[0]]
    assert result.ledger.device is not None and result.ledger.device.bit_exact
    assert result.program is not None
    masks = sparsities(result.program.annotations)
    assert masks and all(0 < record.density < 1 for record in masks.values())
    for path, record in masks.items():
        weight = result.program.weights()[path]
        assert weight.dtype == torch.int8 and not bool(weight[~record.mask].any())


@pytest.mark.host
def test_a_transformer_through_all_families(tmp_path: Path) -> None:
    passes = (
        "collapse, tome{r=3}, prune-channels{macs=0.85}, prune-1xn{n=4 sparsity=0.25 force=true}, "
        "finetune{steps=4 batch=16}, fold-bn, quantize-int8"
    )
    result = compiled(Transformer(), passes, "host", tmp_path)
    assert len(result.ledger.stages) == 9
    assert result.ledger.device is not None and np.isfinite(result.ledger.device.max_abs_error)
    costs = {s.name: s.cost["macs"] for s in result.ledger.stages}
    assert costs["original"] > costs["collapse"] > costs["tome"] > costs["prune-channels"]
