"""A small vision transformer in all the forms that the recogniser must see through, and its eager compression."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgec.frontend import load_model
from edgec.passbase import Context, Pass
from edgec.program import Program

# (x, size, k, q, block) -> (x, size): what is done between attention and MLP.
Reduce = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Block(nn.Module):
    """attention: "fused" (one projection, scaled_dot_product_attention), "split" (three), "softmax" (written out)."""

    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if attention == "split":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj, self.scale = nn.Linear(width, width), nn.Parameter(torch.full((width,), 1.0))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        b, n, c = x.shape
        if self.kind == "split":
            return tuple(f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))  # type: ignore[return-value]
        return self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]

    def forward(self, x: torch.Tensor, state: dict[str, Any] | None = None) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.project(self.norm1(x))
        mask = None
        if state is not None and state["proportional"]:
            mask = state["size"].log()[:, None, None, :, 0]
        if self.kind == "softmax":
            scores = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.scale * self.proj(y.transpose(1, 2).reshape(b, n, c))
        if state is not None:
            x, state["size"] = state["reduce"](x, state["size"], q, k, v, state["block"])
            state["block"] += 1
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """prefix: learned tokens (1 class, 2 with distillation, more registers; 0 none). pool: "class", "dist", "mean"."""

    def __init__(
        self,
        blocks: int = 3,
        width: int = 16,
        heads: int = 2,
        prefix: int = 1,
        pool: str = "class",
        kind: str = "fused",
    ) -> None:
        super().__init__()
        self.prefix, self.pool = prefix, pool
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        if prefix:
            self.first = nn.Parameter(torch.randn(1, prefix, width))
        self.position = nn.Parameter(0.3 * torch.randn(1, 16 + prefix, width))
        self.blocks = nn.ModuleList(Block(width, heads, kind) for _ in range(blocks))
        self.norm, self.head, self.head2 = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(width, 10)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.prefix:
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        return x + self.position

    def readout(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
        if self.pool == "class":
            return self.head(self.norm(x[:, 0]))
        x = self.norm(x)
        if self.pool == "dist":
            return (self.head(x[:, 0]) + self.head2(x[:, 1])) / 2
        x, size = x[:, self.prefix :], None if size is None else size[:, self.prefix :]
        return self.head(x.mean(1) if size is None else (x * size).sum(1) / size.sum(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)

    @torch.no_grad()
    def compressed(
        self, x: torch.Tensor, reduce: Reduce, proportional: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The output with `reduce` at each block, and the sizes behind each."""
        x = self.embed(x)
        state = {"size": torch.ones(*x.shape[:2], 1), "proportional": proportional, "block": 0, "reduce": reduce}
        sizes = []
        for block in self.blocks:
            x = block(x, state)
            sizes.append(state["size"])
        return self.readout(x, state["size"]), sizes


def model(seed: int = 0, **options: Any) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ViT(**options).eval()
        for block in made.blocks:
            # Attention that prefers some tokens, as trained models have it.
            for name, value in block.named_parameters():
                if value.dim() > 1 and name.split(".")[0] in ("qkv", "q", "k"):
                    value.data.mul_(2.5)
        return made


def program(vit: nn.Module, dynamic: bool = True) -> Program:
    """dynamic: any batch; else a batch of 2, fixed at export."""
    if dynamic:
        return load_model(vit, input_shape=(1, 3, 16, 16), name="vit")
    example = (images(2),)
    return Program.from_exported(torch.export.export(vit, example), "vit")


@functools.cache
def exported(dynamic: bool = True, **options: Any) -> Program:
    """The Program of `model(**options)`, made once."""
    return program(model(**options), dynamic)


@functools.cache
def applied(step: Pass, dynamic: bool = True, **options: Any) -> Program:
    """The pass on `exported(...)`, run once."""
    return step.run(exported(dynamic, **options), Context())


def values(program: Program, x: torch.Tensor, names: list[str]) -> list[Any]:
    """What the nodes of these names compute for x."""
    found: dict[str, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    with torch.no_grad():
        Keep(program.module).run(x)
    return [found[name] for name in names]


def sizes_of(program: Program, x: torch.Tensor) -> list[torch.Tensor]:
    """Sizes [B, N, 1] behind each reduction."""
    names = [n.name for n in program.graph.nodes if n.op == "call_function" and "edgec.to" in str(n.target)]
    return [sizes for _, sizes in values(program, x, names)]


def images(batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
