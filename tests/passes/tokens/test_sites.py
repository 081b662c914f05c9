"""Which attentions can lose tokens, and what the recogniser says of those that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgec.frontend import load_model
from edgec.passbase import Context
from edgec.passes.tokens.axes import Opaque, reshaped
from edgec.passes.tokens.sites import TokenMap, find_sites
from edgec.program import shape_of
from tests.passes.tokens import vit

pytestmark = pytest.mark.pure


def sites(module: nn.Module, dynamic: bool = True) -> tuple[TokenMap, Context]:
    program, context = vit.program(module, dynamic), Context()
    return find_sites(program.edit(), context, program.example_inputs, program.name), context


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kind", ["fused", "split", "softmax"])
def test_every_form_of_attention_is_found(kind: str, dynamic: bool) -> None:
    found, context = sites(vit.model(kind=kind), dynamic)
    assert [site.block for site in found.sites] == [0, 1, 2] and not context.skipped
    assert (found.tokens, found.prefix, found.distilled, found.readout) == (17, 1, False, "class")
    for number, site in enumerate(found.sites):
        assert shape_of(site.k)[1:] == (2, 17, 8) and shape_of(site.add)[1:] == (17, 16)
        assert len(site.flow.attentions) == 2 - number


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"prefix": 2, "pool": "dist"}, (2, True, "class")),
        ({"prefix": 5}, (5, False, "class")),
        ({"prefix": 0, "pool": "mean"}, (0, False, "mean")),
        ({"prefix": 1, "pool": "mean"}, (1, False, "mean")),
    ],
)
def test_prefix_and_readout(options: dict[str, Any], want: tuple[int, bool, str]) -> None:
    found, _ = sites(vit.model(**options))
    assert (found.prefix, found.distilled, found.readout) == want


class Changed(vit.ViT):
    """Something behind the first block that tokens do not get through."""

    def __init__(self, change: Any) -> None:
        super().__init__(blocks=2)
        self.change, self.table = change, nn.Parameter(torch.randn(1, 17, 16))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = first = self.embed(x)
        x = self.change(self, self.blocks[0](x), first)
        return self.readout(self.blocks[1](x))


def grid(model: Changed, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    patches = x[:, 1:].transpose(1, 2).reshape(x.shape[0], 16, 4, 4)
    return torch.cat([x[:, :1], model.conv(patches).flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, x, first: x + model.table, "an entry per token"),
        (lambda model, x, first: x + first, "before the reduction"),
        (grid, "splits the tokens"),
        (lambda model, x, first: torch.cat([x, first], 1), "concatenated"),
        (lambda model, x, first: x.softmax(1), "softmax over tokens"),
        (lambda model, x, first: x + x[:, 5:6], "part of the patch tokens"),
        (lambda model, x, first: x + x[:, 3].unsqueeze(1), "patch token 3 is selected"),
    ],
)
def test_what_tokens_do_not_get_through_is_named(change: Any, reason: str) -> None:
    found, context = sites(Changed(change).eval())
    assert any(reason in skip.reason for skip in context.skipped), context.skipped
    assert all(site.layer != "blocks.0" for site in found.sites)


class Attention(vit.ViT):
    """One block whose attention is given."""

    def __init__(self, attend: Any) -> None:
        super().__init__(blocks=1)
        self.attend, self.bias = attend, nn.Parameter(torch.randn(1, 2, 17, 17))
        self.mix = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.blocks[0]
        x = self.embed(x)
        y = self.attend(self, *block.project(block.norm1(x)))
        return self.readout(x + block.proj(y.transpose(1, 2).reshape(x.shape)))


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias), "entry per key"),
        (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "causal"),
        (lambda m, q, k, v: F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2]), "fewer keys"),
        (
            lambda m, q, k, v: F.scaled_dot_product_attention(q.mT.contiguous(), k.mT, v.mT).mT,
            "residual addition|token by token|few",
        ),
    ],
)
def test_attentions_that_cannot_lose_tokens_are_named(attend: Any, reason: str) -> None:
    import re

    found, context = sites(Attention(attend).eval())
    assert not found.sites
    assert any(re.search(reason, skip.reason) for skip in context.skipped), context.skipped


def test_talking_heads_are_named() -> None:
    def attend(model: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("hg,bhij->bgij", model.mix, q @ k.mT)
        return scores.softmax(-1) @ v

    found, context = sites(Attention(attend).eval())
    assert not found.sites and any("talking heads" in skip.reason for skip in context.skipped)


def test_a_model_without_attention_is_named() -> None:
    program, context = load_model(nn.Conv2d(3, 4, 3), input_shape=(1, 3, 8, 8), name="conv"), Context()
    assert not find_sites(program.edit(), context, program.example_inputs, "conv").sites
    assert context.skipped[0].reason == "it has no attention"


def test_reshapes_are_read_by_position() -> None:
    # As many tokens as channels: by value either axis could be meant.
    assert reshaped((2, 16, 16), (2, 16, 4, 4), 1) == 1
    assert reshaped((2, 16, 16), (2, 4, 4, 16), 2) == 3
    with pytest.raises(Opaque):
        reshaped((2, 16, 16), (2, 4, 4, 16), 1)


def test_as_many_tokens_as_channels() -> None:
    from edgec.passes.tokens.tome import ToMe

    made = vit.model(width=16, prefix=0, pool="mean")
    program = vit.program(made)
    smaller = ToMe(r=2).run(program, Context())
    assert [site.after for site in smaller.annotations["tokens"].sites] == [14, 12, 10]
    assert smaller(vit.images())[0].shape == (3, 10)
