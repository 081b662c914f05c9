"""Putting token reductions into a graph: shared by all schemes, which only say how many tokens and which.

Everything stays static: the operators of `edgec.tokenops` choose by data, the shapes of views behind them get the new
counts by position.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edgec import tokenops as tokenops  # registers the operators
from edgec.cost import node_macs, program_cost
from edgec.lowering.graph import argument
from edgec.passbase import Context
from edgec.passes.tokens.axes import SDPA, set_length
from edgec.passes.tokens.class_rows import push_rows
from edgec.passes.tokens.sites import Site, TokenMap, find_sites
from edgec.program import Program, is_call, layer_of, origin_of, placeholders, weight_node

aten = torch.ops.aten

ANNOTATION = "tokens"


@dataclass(frozen=True)
class SiteRecord:
    """One reduction. before, kept, after: tokens, prefix included, that came in, survived pruning, and went out.

    size: the node that holds how many patches each token stands for, "" where nothing reads it.
    """

    block: int
    layer: str
    before: int
    kept: int
    after: int
    size: str


@dataclass(frozen=True)
class TokenMeta:
    """Annotation `tokens` of a Program. macs: of one sample, without the choice of tokens itself."""

    scheme: str
    prefix: int
    tokens: int
    sites: tuple[SiteRecord, ...]
    macs_before: int
    macs_after: int
    exact: bool = False


@dataclass(frozen=True, eq=False)
class Prepared:
    """A graph ready for reduction: `map` holds its sites, `blocks` the number of those before class rows moved up."""

    program: Program
    map: TokenMap
    blocks: int

    @functools.cached_property
    def cost(self) -> TokenCost:
        return token_cost(self.program, self.map)


def prepare(program: Program, context: Context, class_rows: bool) -> Prepared:
    """A copy of the graph with its sites, class rows moved up first where asked for.

    The last block of a classifier then is no site any more: it has one row.
    """
    module = program.edit()
    found = find_sites(module, context, program.example_inputs, program.name)
    blocks = len(found.sites)
    if class_rows and blocks and push_rows(module, program, context):
        found = find_sites(module, Context(), program.example_inputs, program.name)
    return Prepared(program, found, blocks)


# -- cost --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCost:
    """Multiply-accumulates of one sample as a function of the tokens behind each site.

    macs = constant + sum over s of linear[s] n_s + quadratic[s] n_s^2, n_0 the tokens before the first site and n_s
    those behind site s; read from the graph, so it holds for any width, MLP ratio and head.
    """

    tokens: int
    constant: float
    linear: tuple[float, ...]
    quadratic: tuple[float, ...]

    def macs(self, after: Sequence[Any]) -> Any:
        """after: tokens behind each site (numbers, or scalar tensors to differentiate)."""
        counts = [self.tokens, *after]
        return self.constant + sum(
            a * n + b * n * n for a, b, n in zip(self.linear, self.quadratic, counts, strict=True)
        )


def token_cost(program: Program, found: TokenMap) -> TokenCost:
    """The cost model of a prepared graph."""
    view = dataclasses.replace(program, module=found.module)
    constant, n = 0.0, max(1, found.tokens)
    linear, quadratic = [0.0] * (len(found.sites) + 1), [0.0] * (len(found.sites) + 1)
    for node in found.module.graph.nodes:
        macs = node_macs(view, node)
        if not macs:
            continue
        reading = [s + 1 for s, site in enumerate(found.sites) if node in site.flow.tags]
        keyed = [s + 1 for s, site in enumerate(found.sites) if node in site.flow.attentions]
        if is_call(node, SDPA) and keyed and reading:
            quadratic[max(keyed)] += macs / n**2
        elif keyed or reading:
            linear[max(keyed + reading)] += macs / n
        else:
            constant += macs
    return TokenCost(found.tokens, constant, tuple(linear), tuple(quadratic))


def formula_macs(
    tokens: int, width: int, patch: int, classes: int, after: Sequence[int], mlp_ratio: float = 4
) -> float:
    """The cost model of the DiffRate paper, for a plain vision transformer of len(after) blocks.

    tokens include the prefix. Norms, softmax, matching and class rows are left out.
    """
    macs, n = float(tokens * width * patch * patch * 3 + width * classes), tokens
    for count in after:
        macs += 4 * n * width**2 + 2 * n**2 * width + 2 * mlp_ratio * count * width**2
        n = count
    return macs


# -- the rewrite -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Emitter:
    """What a scheme builds its nodes with, at a site: `node(...)` appends a call there.

    x [B, N, C] and size [B, N, 1] hold the tokens that come in.
    """

    module: fx.GraphModule
    site: Site
    prefix: int
    distilled: bool
    x: fx.Node
    size: fx.Node
    tokens: int
    batch: Any

    def node(self, target: Any, *args: Any) -> fx.Node:
        """A call at the site; its layer is that of the addition."""
        made = self.module.graph.call_function(target, args)
        made.meta["edgec_layer"] = f"{layer_of(self.site.add)}.tokens"
        return made

    def pair(self, target: Any, *args: Any) -> tuple[fx.Node, fx.Node]:
        """The two results of an operator that gives tokens and sizes."""
        both = self.node(target, *args)
        return self.node(operator.getitem, both, 0), self.node(operator.getitem, both, 1)

    def weight(self, name: str, value: torch.Tensor) -> fx.Node:
        node = weight_node(self.module, f"{layer_of(self.site.add)}.tokens.{name}", value)
        node.meta["edgec_layer"] = f"{layer_of(self.site.add)}.tokens"
        return node

    def rows(self, value: torch.Tensor) -> fx.Node:
        """A stored tensor [1, ...], the same for every sample of the batch."""
        stored = self.weight("constant", value)
        return self.node(aten.expand.default, stored, [self.batch, *[-1] * (value.dim() - 1)])

    def class_score(self, size: bool) -> fx.Node:
        """[B, N - prefix]: how much the class token attends to each other token."""
        q, k = self.site.q, self.site.k
        given = self.size if size else None
        return self.node(torch.ops.edgec.class_score.default, q, k, given, self.site.scale, self.prefix)


# From an emitter at a site to (x', size', tokens kept by pruning), or None to leave the site alone.
Reduce = Callable[[Emitter], tuple[fx.Node, fx.Node, int] | None]


def reduce_tokens(
    prepared: Prepared,
    after: Sequence[int],
    reduce: Reduce,
    *,
    scheme: str,
    sized: bool,
    proportional: bool,
) -> Program:
    """Insert `reduce` at each site where `after` is below the tokens that arrive; returns the verified Program.

    after: tokens behind each site. sized: tokens stand for several patches, so means over tokens are weighted.
    proportional: attentions behind weigh keys by the patches they stand for.
    """
    found, program = prepared.map, prepared.program
    module, graph = found.module, found.module.graph
    batch = _batch(module, program)
    arriving, size = found.tokens, None
    masks: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    records = []
    for site, count in zip(found.sites, after, strict=True):
        if count >= arriving:
            continue
        users = list(site.add.users)
        with graph.inserting_before(site.add.next):
            emitter = Emitter(module, site, found.prefix, found.distilled, site.add, size or site.add, arriving, batch)
            if size is None:
                emitter.size = emitter.rows(torch.ones(1, arriving, 1))
            made = reduce(emitter)
            assert made is not None
            x, size, kept = made
            mask = None
            if proportional:
                logs = emitter.node(aten.transpose.int, emitter.node(aten.log.default, size), 1, 2)
                mask = emitter.node(aten.unsqueeze.default, logs, 1)
        for user in users:
            user.replace_input_with(site.add, x)
        for node, tag in site.flow.tags.items():
            if node is not site.add:
                set_length(node, tag.axis, count - tag.start)
                # Its tokens are others now: nothing of the original model to compare it with.
                node.meta["edgec_origin"] = f"{origin_of(node).removesuffix('.reduced')}.reduced"
        for attention in site.flow.attentions:
            if mask is not None:
                masks[attention] = (mask, size)
        records.append(SiteRecord(site.block, site.layer, arriving, kept, count, size.name))
        arriving = count
    for attention, (mask, _) in masks.items():
        attention.args = (*attention.args[:3], mask, *attention.args[4:])
    if sized and size is not None:
        last = [s for s in found.sites if s.layer == records[-1].layer][-1]
        for pool in last.flow.pools:
            _weigh(graph, pool, last, size)
    before = program_cost(program).macs
    kept_annotations = dict(program.annotations)
    made = program.replace(module)
    alive = {node.name for node in made.graph.nodes}
    records = [dataclasses.replace(r, size=r.size if r.size in alive else "") for r in records]
    meta = TokenMeta(scheme, found.prefix, found.tokens, tuple(records), before, program_cost(made).macs)
    return made.replace(annotations={**kept_annotations, ANNOTATION: meta})


def _batch(module: fx.GraphModule, program: Program) -> Any:
    """The size of the batch: a number, or a node where it is dynamic."""
    first = placeholders(module)[0]
    if not program.dynamic_batch:
        return int(first.meta["val"].shape[0])
    for node in first.users:
        if is_call(node, aten.sym_size.int) and node.args[1] == 0:
            return node
    with module.graph.inserting_after(placeholders(module)[-1]):
        made = module.graph.call_function(aten.sym_size.int, (first, 0))
    made.meta["val"] = int(first.meta["val"].shape[0])
    return made


def _weigh(graph: fx.Graph, pool: fx.Node, site: Site, size: fx.Node) -> None:
    """Make a mean over tokens one over the patches they stand for: sum(s x) / sum(s)."""
    source: Any = pool.args[0]
    tag, keep = site.flow.tags[source], argument(pool, 2, "keepdim", False)
    with graph.inserting_before(pool):

        def node(target: Any, *args: Any) -> fx.Node:
            made = graph.call_function(target, args)
            made.meta["edgec_layer"] = layer_of(pool)
            return made

        weights = size
        if tag.start:
            weights = node(aten.slice.Tensor, weights, 1, tag.start, 2**63 - 1)
        if tag.axis == 2:
            weights = node(aten.transpose.int, weights, 1, 2)
        total = node(aten.sum.dim_IntList, node(aten.mul.Tensor, source, weights), [tag.axis], keep)
        mean = node(aten.div.Tensor, total, node(aten.sum.dim_IntList, weights, [tag.axis], keep))
    pool.replace_all_uses_with(mean)
    graph.erase_node(pool)
