"""Operators of token reduction against a plain reading of the papers, with ties, any prefix, and a symbolic batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec import tokenops
from edgec.cost import program_cost
from edgec.errors import EdgecError
from edgec.frontend import load_model
from edgec.program import Program

pytestmark = pytest.mark.pure
edgec = torch.ops.edgec
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)

# [(x, size)] of one sample, in the order of the result.
Tokens = list[tuple[np.ndarray, float]]


# -- the plain reading -------------------------------------------------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> np.float32:
    """Rounded as the operators say; with small integers everything before the norms is exact."""
    one, eps = np.float32(1.0), np.float32(1e-6)
    left, right = (one / (np.sqrt(np.float32(sum(float(v) ** 2 for v in row))) + eps) for row in (a, b))
    return np.float32(sum(float(u) * float(v) for u, v in zip(a, b, strict=True))) * left * right


def mean(group: list[tuple[np.ndarray, float]]) -> np.ndarray:
    return np.sum([x * w for x, w in group], 0) / sum(w for _, w in group)


def plain_tome(x: np.ndarray, s: Any, metric: np.ndarray, r: int, prefix: int, distilled: bool) -> Tokens:
    out_of_it = list(range(prefix)) if prefix > 1 and not distilled else []
    a, b = (list(range(len(out_of_it) + side, len(x), 2)) for side in (0, 1))
    best = {}
    for i in a:
        if i < prefix:
            continue
        targets = [j for j in b if j >= prefix]
        best[i] = max(targets, key=lambda j: (cosine(metric[i], metric[j]), -j))
    chosen = sorted(best, key=lambda i: (-cosine(metric[i], metric[best[i]]), i))[:r]
    into = {j: [j, *(i for i in chosen if best[i] == j)] for j in b}
    left = [i for i in a if i not in chosen]
    order = out_of_it + ([left[0], b[0], *left[1:], *b[1:]] if distilled else left + b)
    groups = [into.get(i, [i]) for i in order]
    return [(mean([(x[i], s[i]) for i in g]), sum(s[i] for i in g)) for g in groups]


def plain_order(score: np.ndarray, prefix: int) -> list[int]:
    return [prefix + i for i in sorted(range(len(score)), key=lambda i: (-score[i], i))]


def plain_reduce(
    x: np.ndarray, s: Any, score: np.ndarray, prefix: int, keep: int, merge: int, weighted: bool, true_size: bool
) -> Tokens:
    order = [*range(prefix), *plain_order(score, prefix)][:keep]
    groups: dict[int, list[int]] = {i: [] for i in order[:merge]}
    for u in order[merge:]:
        place = max(range(prefix, merge), key=lambda t: (cosine(x[u], x[order[t]]), -t))
        groups[order[place]].append(u)
    result = []
    for i, sources in groups.items():
        weights: Any = s if weighted else np.ones_like(s)
        shares = [s[u] if true_size else s[u] * max(float(cosine(x[u], x[i])), 0.0) for u in sources]
        result.append((mean([(x[j], weights[j]) for j in [i, *sources]]), s[i] + sum(shares)))
    return result


def plain_keep(x: np.ndarray, s: Any, score: np.ndarray, prefix: int, keep: int) -> Tokens:
    kept = sorted([*range(prefix), *plain_order(score, prefix)[: keep - prefix]])
    return [(x[i], s[i]) for i in kept]


# -- values ------------------------------------------------------------------------------------------------------------


@st.composite
def tokens(draw: Any) -> tuple[int, int, int, bool, np.random.Generator]:
    """(batch, N, prefix, whether values are small integers, generator)."""
    prefix = draw(st.sampled_from((0, 1, 1, 2, 5)))
    count = draw(st.integers(prefix + 2, prefix + 17))
    batch, ties, seed = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(0, 2**20))
    return batch, count, prefix, ties, np.random.default_rng(seed)


def values(rng: np.random.Generator, ties: bool, *shape: int) -> np.ndarray:
    """Normal, or from -1, 0, 1 with equal tokens and tokens of zeros among them."""
    if not ties:
        return rng.standard_normal(shape).astype(np.float32)
    found = rng.integers(-1, 2, shape).astype(np.float32)
    if len(shape) == 3:
        found[:, rng.integers(shape[1])] = found[:, rng.integers(shape[1])]
    return found


def sizes(rng: np.random.Generator, batch: int, count: int) -> np.ndarray:
    return rng.integers(1, 6, (batch, count, 1)).astype(np.float32)


def same(got: tuple[torch.Tensor, torch.Tensor], plain: list[Tokens]) -> None:
    rows = np.stack([[x for x, _ in sample] for sample in plain])
    counts = np.array([[s for _, s in sample] for sample in plain])[:, :, None]
    assert got[0].is_contiguous() and got[1].is_contiguous()
    assert got[0].shape == rows.shape and got[1].shape == counts.shape
    np.testing.assert_allclose(got[0].numpy(), rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1].numpy(), counts, rtol=1e-5, atol=1e-5)


def torched(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


@EXAMPLES
@given(tokens(), st.integers(0, 16), st.integers(1, 5), st.booleans())
def test_tome_merge(sample: Any, wanted: int, depth: int, distilled: bool) -> None:
    batch, count, prefix, ties, rng = sample
    distilled = distilled and prefix == 2
    r = max(1, wanted % ((count - prefix) // 2 + 1))
    x, s, metric = values(rng, False, batch, count, 6), sizes(rng, batch, count), values(rng, ties, batch, count, depth)
    got = edgec.tome_merge(*torched(x, s, metric), r, prefix, distilled)
    plain = [plain_tome(x[b], s[b, :, 0], metric[b], r, prefix, distilled) for b in range(batch)]
    same(got, plain)
    assert torch.equal(got[1].sum((1, 2)), torch.from_numpy(s).sum((1, 2)))
    assert torch.equal(got[0][:, :prefix], torch.from_numpy(x)[:, :prefix])
    assert torch.equal(got[1][:, :prefix], torch.from_numpy(s)[:, :prefix])


@EXAMPLES
@given(tokens(), st.integers(0, 99), st.integers(0, 99), st.booleans(), st.booleans())
def test_token_reduce(sample: Any, kept: int, merged: int, weighted: bool, true_size: bool) -> None:
    batch, count, prefix, ties, rng = sample
    keep = prefix + 1 + kept % (count - prefix)
    merge = prefix + 1 + merged % (keep - prefix)
    x, s, score = values(rng, ties, batch, count, 4), sizes(rng, batch, count), values(rng, ties, batch, count - prefix)
    got = edgec.token_reduce(*torched(x, s, score), prefix, keep, merge, weighted, true_size)
    options = (prefix, keep, merge, weighted, true_size)
    same(got, [plain_reduce(x[b], s[b, :, 0], score[b], *options) for b in range(batch)])
    assert torch.equal(got[0][:, :prefix], torch.from_numpy(x)[:, :prefix])
    if true_size and keep == count:
        assert torch.equal(got[1].sum((1, 2)), torch.from_numpy(s).sum((1, 2)))


@EXAMPLES
@given(tokens(), st.integers(0, 99))
def test_token_keep(sample: Any, kept: int) -> None:
    batch, count, prefix, ties, rng = sample
    keep = max(1, prefix + kept % (count - prefix + 1))
    x, s, score = (
        values(rng, False, batch, count, 3),
        sizes(rng, batch, count),
        values(rng, ties, batch, count - prefix),
    )
    got = edgec.token_keep(*torched(x, s, score), prefix, keep)
    same(got, [plain_keep(x[b], s[b, :, 0], score[b], prefix, keep) for b in range(batch)])


@pytest.mark.parametrize("prefix", (1, 2, 5))
@pytest.mark.parametrize("sized", (True, False))
def test_class_score(prefix: int, sized: bool) -> None:
    """The row of the class token of softmax(scale q k^T + log size)."""
    rng = np.random.default_rng(0)
    q, k, s = values(rng, False, 2, 3, 11, 8), values(rng, False, 2, 3, 11, 8), sizes(rng, 2, 11)
    logits = np.einsum("bhnd,bhmd->bhnm", q.astype(float), k.astype(float)) * 0.3
    weights = np.exp(logits) * (s[:, None, None, :, 0] if sized else 1.0)
    expected = (weights / weights.sum(-1, keepdims=True))[:, :, 0].mean(1)[:, prefix:]
    got = edgec.class_score(*torched(q, k), torch.from_numpy(s) if sized else None, 0.3, prefix)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_scores_below_all_numbers() -> None:
    """NaN and -inf stand behind all numbers, in the order of their indices; the result has no holes."""
    score = torch.tensor([[torch.nan, 1.0, -torch.inf, torch.inf, -1e30, torch.nan, 1.0]])
    x, s = torch.arange(7.0).reshape(1, 7, 1), torch.ones(1, 7, 1)
    ordered, _ = edgec.token_reduce(x, s, score, 0, 7, 7, False, False)
    assert ordered.flatten().tolist() == [3, 1, 6, 4, 0, 2, 5]
    kept, _ = edgec.token_keep(x, s, score, 0, 5)
    assert kept.flatten().tolist() == [0, 1, 3, 4, 6]
    merged, size = edgec.tome_merge(x, s, torch.full((1, 7, 2), torch.nan), 2, 1, False)
    assert torch.isfinite(merged).all() and size.sum() == 7


def test_nothing_to_merge_is_the_input() -> None:
    x, s = torch.randn(2, 9, 4), torch.ones(2, 9, 1)
    got = edgec.tome_merge(x, s, x, 0, 1, False)
    assert torch.equal(got[0], x) and torch.equal(got[1], s)
    assert got[0].data_ptr() != x.data_ptr()


def test_each_sample_chooses_for_itself() -> None:
    rng = np.random.default_rng(3)
    x, s, score = torched(values(rng, False, 3, 12, 5), sizes(rng, 3, 12), values(rng, False, 3, 11))
    for call in (
        lambda *a: edgec.tome_merge(a[0], a[1], a[0], 4, 1, False),
        lambda *a: edgec.token_reduce(*a, 1, 9, 6, True, False),
        lambda *a: edgec.token_keep(*a, 1, 5),
    ):
        together = call(x, s, score)
        for b in range(3):
            alone = call(x[b : b + 1], s[b : b + 1], score[b : b + 1])
            assert all(torch.equal(t[b : b + 1], a) for t, a in zip(together, alone, strict=True))


def test_gradients() -> None:
    """Those of merging with the tokens chosen: passes that train reduced models need them."""
    rng = np.random.default_rng(4)
    x, metric, q, k = torched(*(values(rng, False, *s) for s in ((2, 9, 3), (2, 9, 4), (2, 2, 9, 3), (2, 2, 9, 3))))
    s, score = torch.from_numpy(sizes(rng, 2, 9)), torch.from_numpy(values(rng, False, 2, 8))
    x, s, q, k = (v.double().requires_grad_() for v in (x, s, q, k))
    cases = (
        (lambda x, s: edgec.tome_merge(x, s, metric, 3, 1, False), (x, s)),
        (lambda x, s: edgec.token_reduce(x, s, score, 1, 8, 5, True, True), (x, s)),
        (lambda x, s: edgec.token_keep(x, s, score, 1, 5), (x, s)),
        (lambda q, k, s: edgec.class_score(q, k, s, 0.3, 1), (q, k, s)),
    )
    for call, operands in cases:
        assert torch.autograd.gradcheck(call, operands)


def test_what_does_not_fit() -> None:
    x, s, score = torch.zeros(1, 9, 4), torch.ones(1, 9, 1), torch.zeros(1, 8)
    for arguments, message in (
        ((x, s, x, 5, 1, False), "cannot be merged"),
        ((x, s, x, 2, 1, True), "prefix of 2"),
        ((x, s[:, :8], x, 2, 1, False), "sizes"),
        ((x, s, x[:, :8], 2, 1, False), "metric"),
    ):
        with pytest.raises(ValueError, match=message):
            edgec.tome_merge(*arguments)
    for arguments, message in (
        ((1, 10, 8), "cannot become"),
        ((1, 5, 6), "cannot become"),
        ((1, 5, 1), "cannot become"),
        ((2, 5, 5), "scores of 9"),
    ):
        with pytest.raises(ValueError, match=message):
            edgec.token_reduce(x, s, score, *arguments, False, False)
    with pytest.raises(ValueError, match="no class token"):
        edgec.class_score(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), None, 1.0, 0)


# -- Programs ----------------------------------------------------------------------------------------------------------


class Reductions(torch.nn.Module):
    """Each operator once, on [B, 20, 8]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.reshape(-1, 20, 2, 4).transpose(1, 2)
        y, s = edgec.tome_merge(x, torch.ones_like(x[:, :, :1]), heads.mean(1), 5, 1, False)
        heads = y.reshape(-1, 15, 2, 4).transpose(1, 2)
        score = edgec.class_score(heads, heads, s, 0.5, 1)
        z, t = edgec.token_reduce(y, s, score, 1, 12, 9, False, False)
        w, u = edgec.token_keep(z, t, z[:, 1:, 0], 1, 5)
        return w * u


def test_programs_are_exported_saved_and_read(tmp_path: Path) -> None:
    program = load_model(Reductions(), input_shape=(1, 20, 8))
    assert program.dynamic_batch
    program.save(tmp_path / "model.pt2")
    read = load_model(tmp_path / "model.pt2")
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    want = Reductions()(x)
    assert torch.equal(program(x)[0], want) and torch.equal(read(x)[0], want)
    assert [s.shape for s in read.outputs] == [(1, 5, 8)]
    assert program_cost(read).macs == 10 * 10 * 4 + 15 * 8 + 3 * 8 * 8
    module = program.edit()
    (node,) = (n for n in module.graph.nodes if n.target is edgec.tome_merge.default)
    node.args = (*node.args[:3], 50, *node.args[4:])
    with pytest.raises(EdgecError, match="50 cannot be merged"):
        program.replace(module)
    assert isinstance(read, Program) and tokenops.tome_start(5, False) == 5
