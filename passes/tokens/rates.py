"""How many tokens each block keeps: DiffRate's published schedules, and learning the counts by gradient.

Counts include the prefix. Block 0 is never reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from edgec.data import Dataset
from edgec.errors import EdgecError
from edgec.lowering.graph import argument
from edgec.passes.tokens.axes import SDPA
from edgec.passes.tokens.rewrite import Prepared
from edgec.passes.tokens.sites import TokenMap
from edgec.program import Program, is_call, shape_of
from edgec.training import distillation_loss

# (kept by pruning, then by merging) of 197 tokens in 12 blocks, from the authors' repository.
PUBLISHED = {
    "deit-t": (
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ),
    "deit-s": (
        (197, 197, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    "deit-b": (
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
}
WIDTHS = {"deit-t": 192, "deit-s": 384, "deit-b": 768}
# Masked attention must not divide by nothing.
EPS = 1e-6
# Weight of (share of MACs - wanted share)^2 in the loss; 20 per GMAC^2 on ViT-Tiny.
COST_WEIGHT = 31.0


@dataclass(frozen=True)
class Counts:
    """Tokens that pruning keeps at each site, and tokens behind it."""

    prune: tuple[int, ...]
    merge: tuple[int, ...]

    def clipped(self, tokens: int, prefix: int) -> Counts:
        """The same with no count above the tokens that arrive, and at least one token behind the prefix."""
        prune, merge = [], []
        for p, m in zip(self.prune, self.merge, strict=True):
            p = max(min(p, tokens), prefix + 1)
            tokens = max(min(m, p), prefix + 1)
            prune.append(p)
            merge.append(tokens)
        return Counts(tuple(prune), tuple(merge))


# -- published schedules -----------------------------------------------------------------------------------------------


def nearest_profile(width: int) -> str:
    """The published model of the nearest width."""
    return min(WIDTHS, key=lambda name: abs(math.log(WIDTHS[name] / width)))


def published(profile: str, ready: Prepared) -> tuple[list[float], list[float]]:
    """Shares of the patches kept at each site, by pruning and by merging: a schedule stretched over other depths.

    The published last entry (3 of 197) says that the last block needs little but the class token, so it holds for
    last blocks of classifiers alone; others go on as the block before.
    """
    shares = []
    for counts in PUBLISHED[profile]:
        share = [(n - 1) / 196 for n in counts]
        body, last = share[:-1], share[-1]
        places = np.linspace(0, len(body) - 1, max(1, ready.blocks - 1))
        found = [float(f) for f in np.interp(places, np.arange(len(body)), body)]
        found.append(last if ready.map.readout == "class" else found[-1])
        shares.append(found[: len(ready.map.sites)])
    return shares[0], shares[1]


def fitted(prune: Sequence[float], merge: Sequence[float], ready: Prepared, target: float) -> Counts:
    """Counts of the strength whose MACs come nearest to `target` from below.

    Strength 0 keeps all, 1 the shares given, in between linearly; beyond, shares are taken to a power.
    """
    found = ready.map

    def counts(strength: float) -> Counts:
        def of(shares: Sequence[float]) -> tuple[int, ...]:
            scaled = [1 - strength * (1 - f) if strength <= 1 else f**strength for f in shares]
            return tuple(found.prefix + max(1, round(f * (found.tokens - found.prefix))) for f in scaled)

        return Counts(of(prune), of(merge)).clipped(found.tokens, found.prefix)

    low, high = 0.0, 1.0

    def above(strength: float) -> bool:
        return reduced_macs(ready, counts(strength)) > target

    if not above(low):
        return counts(low)
    while above(high) and high < 64:
        high *= 2
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return counts(high)


def reduced_macs(ready: Prepared, counts: Counts) -> float:
    """Multiply-accumulates of one sample with these counts, the choice of tokens included."""
    found, macs, tokens = ready.map, ready.cost.macs(counts.merge), ready.map.tokens
    for site, kept, merged in zip(found.sites, counts.prune, counts.merge, strict=True):
        if merged < tokens:
            channels, heads, depth = shape_of(site.add)[2], shape_of(site.k)[1], shape_of(site.k)[3]
            macs += heads * tokens * depth + (kept - merged) * (merged - found.prefix) * channels
        tokens = merged
    return macs


# -- learned counts ----------------------------------------------------------------------------------------------------


class Rates:
    """Logits over candidate counts for pruning and merging at each site but the first."""

    def __init__(self, tokens: int, prefix: int, sites: int, granularity: int, free: int) -> None:
        """tokens before the first site, prefix included; the first `free` sites keep all."""
        patches = tokens - prefix
        self.tokens, self.prefix, self.sites, self.free = tokens, prefix, sites, free
        self.candidates = torch.arange(patches, 0, -granularity, dtype=torch.float32)
        shape = (sites, 2, len(self.candidates))
        self.logits = torch.zeros(shape, requires_grad=True)
        place = torch.arange(tokens)
        # reaches[k, j]: candidate k keeps sorted place j
        self.reaches = (self.candidates[:, None] + prefix > place[None, :]).float()

    def counts(self) -> torch.Tensor:
        """[sites, 2] expected tokens kept, rounded up; gradients pass through the rounding."""
        expected = (self.logits.softmax(-1) * self.candidates).sum(-1) + self.prefix
        kept = expected + (expected.ceil() - expected).detach()
        free = torch.zeros(self.sites, 1)
        free[: self.free] = 1
        return kept * (1 - free) + self.tokens * free

    def masks(self, counts: torch.Tensor) -> torch.Tensor:
        """[sites, 2, tokens]: 1 for kept places, with the gradient of the probability that a place is kept."""
        probability = self.logits.softmax(-1) @ self.reaches
        hard = (torch.arange(self.tokens) < counts.detach()[..., None]).float()
        masks = hard + probability - probability.detach()
        return torch.cat([torch.ones_like(masks[: self.free]), masks[self.free :]])

    def behind(self, counts: torch.Tensor) -> list[torch.Tensor]:
        """Tokens behind each site: the fewest so far; the gradient goes to both counts of the site."""
        fewest, found = float(self.tokens), []
        for prune, merge in counts:
            fewest = min(fewest, float(prune.detach()), float(merge.detach()))
            found.append(fewest + (prune - prune.detach()) + (merge - merge.detach()))
        return found

    def final(self) -> Counts:
        kept = self.counts().detach().round().int()
        found = Counts(tuple(kept[:, 0].tolist()), tuple(kept[:, 1].tolist()))
        return found.clipped(self.tokens, self.prefix)


class MaskedTokens(fx.Interpreter):
    """Runs a prepared graph with all tokens, those beyond the counts masked out of every attention.

    At each site tokens are sorted by the class token's attention, prefix first. Without merging the outputs are those
    of the compressed graph.
    """

    def __init__(self, found: TokenMap, proportional: bool, weighted: bool, true_size: bool) -> None:
        super().__init__(found.module)
        self.found, self.proportional = found, proportional
        self.weighted, self.true_size = weighted, true_size
        self.attention = {site.attention: site for site in found.sites}
        self.adds = {site.add: number for number, site in enumerate(found.sites)}
        self.readers = {node for site in found.sites for node in site.flow.attentions}
        self.pools = {node: site for site in found.sites for node in site.flow.pools}

    def forward(self, inputs: Sequence[torch.Tensor], counts: torch.Tensor, masks: torch.Tensor) -> tuple[Any, ...]:
        """counts [sites, 2] and masks [sites, 2, tokens] as `Rates` gives them."""
        batch, tokens = inputs[0].shape[0], self.found.tokens
        self.counts, self.masks = counts.detach(), masks
        self.alive = torch.ones(batch, tokens)
        self.size = torch.ones(batch, tokens, 1)
        self.score: torch.Tensor | None = None
        out = self.run(*inputs, enable_io_processing=False)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    def run_node(self, n: fx.Node) -> Any:
        if is_call(n, SDPA) and (n in self.attention or n in self.readers):
            q, k, v = (self.env[a] for a in n.args[:3])  # type: ignore[index]
            weights = self._weights(n, q, k)
            if n in self.attention:
                self.score = weights[:, :, 0, self.found.prefix :].mean(1)
            return weights @ v
        if n in self.pools:
            return self._pool(n)
        value = super().run_node(n)
        if n in self.adds:
            value = self._reduce(value, self.adds[n])
        return value

    def _weights(self, n: fx.Node, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Softmax in which masked keys weigh nothing, except for themselves."""
        scale: Any = n.kwargs.get("scale")
        logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(2, 3)
        if self.proportional:
            logits = logits + self.size.log()[:, None, None, :, 0]
        raised = (logits - logits.amax(-1, keepdim=True).detach()).exp()
        own = torch.eye(q.shape[2], k.shape[2])
        alive = self.alive[:, None, None, :]
        raised = raised * (alive + (1 - alive) * own)
        return (raised + EPS / k.shape[2]) / (raised.sum(-1, keepdim=True) + EPS)

    def _pool(self, n: fx.Node) -> torch.Tensor:
        """A mean over the patches that living tokens stand for."""
        x, tag = self.env[n.args[0]], self.pools[n].flow.tags[n.args[0]]  # type: ignore[index]
        weights = (self.size * self.alive[..., None])[:, tag.start :]
        weights = weights.transpose(1, 2) if tag.axis == 2 else weights
        keep = argument(n, 2, "keepdim", False)
        return (x * weights).sum(tag.axis, keepdim=keep) / weights.sum(tag.axis, keepdim=keep)

    def _reduce(self, x: torch.Tensor, site: int) -> torch.Tensor:
        """Sort, prune and merge at one site; x [B, N, C] keeps its length."""
        prefix, (prune, merge) = self.found.prefix, (int(n) for n in self.counts[site])
        if prune >= x.shape[1] and merge >= x.shape[1]:
            return x
        assert self.score is not None
        # Tokens that are gone already come last, whatever is left of their score.
        score = self.score.detach() + self.alive[:, prefix:].detach().round()
        order = score.argsort(dim=1, descending=True, stable=True) + prefix
        order = torch.cat([torch.arange(prefix).expand(len(x), prefix), order], 1)[..., None]
        x = x.gather(1, order.expand_as(x))
        self.size = self.size.gather(1, order)
        alive = self.alive.gather(1, order[..., 0]) * self.masks[site, 0]
        if merge < prune:
            x = self._merge(x, alive.detach().round(), prefix, merge)
        self.alive = alive * self.masks[site, 1]
        return x

    def _merge(self, x: torch.Tensor, alive: torch.Tensor, prefix: int, merge: int) -> torch.Tensor:
        """Write the mean of each kept token and its sources into the kept rows; sources stay where they are."""
        with torch.no_grad():
            directions = x / (x.norm(dim=-1, keepdim=True) + EPS)
            similarity = directions[:, merge:] @ directions[:, prefix:merge].transpose(1, 2)
            best, target = similarity.max(-1)
            share = torch.zeros(len(x), merge, x.shape[1] - merge)
            share.scatter_(1, (target + prefix)[:, None, :], alive[:, None, merge:])
            sizes = share * self.size[:, None, merge:, 0]
            if not self.true_size:
                sizes = sizes * best.clamp_min(0)[:, None, :]
        kept, tail = x[:, :merge], x[:, merge:]
        own = self.size[:, :merge] if self.weighted else torch.ones(len(x), merge, 1)
        mixed = share * self.size[:, None, merge:, 0] if self.weighted else share
        kept = (kept * own + mixed @ tail) / (own + mixed.sum(-1, keepdim=True))
        self.size = torch.cat([self.size[:, :merge] + sizes.sum(-1, keepdim=True), self.size[:, merge:]], 1).clamp_min(
            1
        )
        return torch.cat([kept, tail], 1)


@dataclass(frozen=True)
class Learning:
    """Options of `learn`: AdamW, the rate falls by a cosine to a tenth."""

    steps: int = 200
    batch: int = 16
    lr: float = 0.05
    granularity: int = 4
    seed: int = 0


def learn(
    ready: Prepared,
    target: float,
    data: Dataset,
    options: Learning,
    *,
    proportional: bool,
    weighted: bool,
    true_size: bool,
    log: Callable[[str], None] = lambda message: None,
) -> Counts:
    """Counts at `target` MACs that keep the outputs nearest to the uncompressed model's; labels are not used.

    Loss: KL(dense || masked) + w (MACs - target)^2, both relative to the dense MACs. Only the logits over counts are
    trained. Raises EdgecError with fewer samples than a batch.
    """
    found, cost = ready.map, ready.cost  # the choice of tokens is counted when the counts are fitted
    if len(data) < options.batch:
        raise EdgecError(f"{len(data)} samples are less than a batch", where=data.name, hint=f"give {options.batch}")
    rates = Rates(found.tokens, found.prefix, len(found.sites), options.granularity, free=1)
    model = MaskedTokens(found, proportional, weighted, true_size)
    optimizer = torch.optim.AdamW([rates.logits], lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, eta_min=options.lr / 10)
    generator = np.random.default_rng(options.seed)
    dense = _dense_outputs(ready.program, data, options.batch)
    whole = cost.macs([found.tokens] * len(found.sites))
    order: np.ndarray = np.array([], dtype=int)
    for step in range(options.steps):
        if len(order) < options.batch:
            order = generator.permutation(len(data))
        rows, order = order[: options.batch], order[options.batch :]
        inputs = tuple(torch.from_numpy(a) for a in data.read(np.sort(rows))[0])
        counts = rates.counts()
        outputs = model.forward(inputs, counts, rates.masks(counts))
        distance = distillation_loss(outputs, [y[np.sort(rows)] for y in dense], alpha=1.0, temperature=1.0)
        over = (cost.macs(rates.behind(counts)) - target) / whole
        loss = distance + COST_WEIGHT * over * over
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, options.steps // 8) == 0:
            now, off = float(distance.detach()), float(over.detach())
            log(f"step {step + 1}/{options.steps}: KL {now:.4f}, {off:+.3f} of the MACs off")
    learned = rates.final()
    patches = found.tokens - found.prefix
    prune, merge = ([(n - found.prefix) / patches for n in kept] for kept in (learned.prune, learned.merge))
    return fitted(prune, merge, ready, target)


def _dense_outputs(program: Program, data: Dataset, batch: int) -> list[torch.Tensor]:
    """The outputs of the uncompressed model for all samples."""
    parts = []
    size = batch if program.dynamic_batch else program.example_inputs[0].shape[0]
    for start in range(0, len(data), size):
        arrays, _ = data.read(slice(start, start + size))
        parts.append(program(*(torch.from_numpy(a) for a in arrays)))
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
