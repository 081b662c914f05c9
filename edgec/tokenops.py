"""Token reduction as PyTorch custom operators `edgec::*`: merging, pruning and their scores, with static shapes.

Importing this module registers them; they can be exported, re-exported and saved in `.pt2` files (import this module
before loading such a file). The operators are the meaning of the schemes of `passes/tokens`; generated kernels choose
the same tokens and give the same values up to rounding.

x is [B, N, C], size [B, N, 1]: how many input patches a token stands for. The first `prefix` tokens (class,
distillation, registers) are never merged or pruned. Counts are fixed, only the choice of tokens depends on data, and it
is made for each sample of a batch alone. Larger comes first and equal ones in the order of their indices, found by
counting (`ranks`), so that no device needs to sort; NaN and -inf count as one number below all others. Indices are
int32.
"""

from __future__ import annotations

import torch

from edgec.gradients import recompute, remember

# Added to norms: a token of zeros has no direction, but must not make NaN.
NORM_EPS = 1e-6
# What NaN and -inf in scores count as. Tokens that may not be chosen have -inf, which is still lower.
LOWEST = -3.0e38

# What becomes of a token, in slot form: 0..rows - 1 is its place in the result, DROPPED nothing, and MERGED - t that it
# is added to the token at place t.
DROPPED = -1
MERGED = -2


# -- schemes -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "edgec::tome_merge",
    mutates_args=(),
    schema="(Tensor x, Tensor size, Tensor metric, int r, int prefix, bool distilled) -> (Tensor, Tensor)",
)
def tome_merge(
    x: torch.Tensor, size: torch.Tensor, metric: torch.Tensor, r: int, prefix: int, distilled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge r tokens into similar ones (Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023).

    x [B, N, C], size [B, N, 1], metric [B, N, d]: what similarity is measured on (the mean of keys over heads).
    Returns x' [B, N - r, C] and size' [B, N - r, 1]. Tokens 0, 2, 4... may be merged, each into the most similar one
    (by cosine) of 1, 3, 5...; the r largest similarities are, by the mean weighted with sizes. The result holds what is
    left of the first set in its order, then the second set. A class token (prefix 1) is never merged and stays first;
    of `distilled` models neither class nor distillation token (prefix 2), and both stay first. Any other prefix is left
    out, and the alternation starts behind it. 0 <= r <= (N - prefix) // 2; with r = 0 the result is the input.
    Raises ValueError for shapes and numbers that do not fit.
    """
    _check_tome(x, size, metric, r, prefix, distilled)
    return _plain_tome(x, size, metric, r, prefix, distilled)


@tome_merge.register_fake
def _(x, size, metric, r, prefix, distilled):
    _check_tome(x, size, metric, r, prefix, distilled)
    batch, tokens, channels = x.shape
    return x.new_empty((batch, tokens - r, channels)), size.new_empty((batch, tokens - r, 1))


@torch.library.custom_op(
    "edgec::token_reduce",
    mutates_args=(),
    schema="(Tensor x, Tensor size, Tensor score, int prefix, int keep, int merge, bool weighted_mean, bool true_size) "
    "-> (Tensor, Tensor)",
)
def token_reduce(
    x: torch.Tensor,
    size: torch.Tensor,
    score: torch.Tensor,
    prefix: int,
    keep: int,
    merge: int,
    weighted_mean: bool,
    true_size: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune to `keep` tokens, then merge to `merge` (Chen et al., DiffRate, ICCV 2023).

    x [B, N, C], size [B, N, 1], score [B, N - prefix]: importance of the tokens behind the prefix. Returns
    x' [B, merge, C] and size' [B, merge, 1]: the prefix, then the others by falling score. Both counts include the
    prefix; prefix <= merge <= keep <= N, and merge > prefix where anything is merged. Tokens merge .. keep - 1 of that
    order each join the token before them, prefix left out, of largest cosine similarity in x. The result is the plain
    mean of a token and its sources, or the mean weighted with sizes (`weighted_mean`); a source adds to the size its
    own times its similarity (negative ones count as 0), as the paper's code does, or all of it (`true_size`).
    merge = keep only prunes. Raises ValueError for shapes and numbers that do not fit.
    """
    _check_reduce(x, size, score, prefix, keep, merge)
    return _plain_reduce(x, size, score, prefix, keep, merge, weighted_mean, true_size)


@token_reduce.register_fake
def _(x, size, score, prefix, keep, merge, weighted_mean, true_size):
    _check_reduce(x, size, score, prefix, keep, merge)
    return x.new_empty((x.shape[0], merge, x.shape[2])), size.new_empty((x.shape[0], merge, 1))


@torch.library.custom_op(
    "edgec::token_keep",
    mutates_args=(),
    schema="(Tensor x, Tensor size, Tensor score, int prefix, int keep) -> (Tensor, Tensor)",
)
def token_keep(
    x: torch.Tensor, size: torch.Tensor, score: torch.Tensor, prefix: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the prefix and the tokens of largest score, `keep` in all, in their order.

    x [B, N, C], size [B, N, 1], score [B, N - prefix]. Returns x' [B, keep, C] and size' [B, keep, 1].
    prefix <= keep <= N. Raises ValueError for shapes and numbers that do not fit.
    """
    _check_reduce(x, size, score, prefix, keep, keep)
    return _plain_keep(x, size, score, prefix, keep)


@token_keep.register_fake
def _(x, size, score, prefix, keep):
    _check_reduce(x, size, score, prefix, keep, keep)
    return x.new_empty((x.shape[0], keep, x.shape[2])), size.new_empty((x.shape[0], keep, 1))


@torch.library.custom_op(
    "edgec::class_score",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? size, float scale, int prefix) -> Tensor",
)
def class_score(q: torch.Tensor, k: torch.Tensor, size: torch.Tensor | None, scale: float, prefix: int) -> torch.Tensor:
    """How much the class token, which is token 0, attends to the tokens behind the prefix: their importance.

    q and k [B, H, N, d] as the attention takes them (only row 0 of q is read), size [B, N, 1] or None, prefix >= 1.
    Returns [B, N - prefix], the mean over heads of softmax(scale q_0 k^T + log size) without the prefix columns.
    Raises ValueError for shapes that do not fit.
    """
    _check_score(q, k, size, prefix)
    return _plain_score(q, k, size, scale, prefix)


@class_score.register_fake
def _(q, k, size, scale, prefix):
    _check_score(q, k, size, prefix)
    return k.new_empty((k.shape[0], k.shape[2] - prefix))


# -- gradients: the choice of tokens has none ------------------------------------------------------------------------


def _plain_tome(x, size, metric, r, prefix, distilled):
    slots = tome_slots(metric.detach(), r, prefix, distilled)
    return merge_tokens(x, size, slots, x.shape[1] - r, True), merge_sizes(size, slots, x.shape[1] - r, None)


def _plain_reduce(x, size, score, prefix, keep, merge, weighted_mean, true_size):
    slots = reduce_slots(x.detach(), score.detach(), prefix, keep, merge)
    return (
        merge_tokens(x, size, slots, merge, weighted_mean),
        merge_sizes(size, slots, merge, None if true_size else x),
    )


def _plain_keep(x, size, score, prefix, keep):
    slots = keep_slots(score.detach(), prefix, keep)
    return merge_tokens(x, size, slots, keep, False), merge_sizes(size, slots, keep, None)


def _plain_score(q, k, size, scale, prefix):
    logits = (q[:, :, :1] * scale) @ k.transpose(2, 3)
    if size is not None:
        logits = logits + size.log()[:, None, None, :, 0]
    return torch.softmax(logits, -1)[:, :, 0, prefix:].mean(1).contiguous()


for _operator, _plain, _count in (
    (tome_merge, _plain_tome, 2),
    (token_reduce, _plain_reduce, 2),
    (token_keep, _plain_keep, 2),
    (class_score, _plain_score, 3),
):
    _operator.register_autograd(recompute(_plain, _count), setup_context=remember)


# -- their parts, each one kernel --------------------------------------------------------------------------------------


def ranks(score: torch.Tensor) -> torch.Tensor:
    """int32 place of each element of the last axis in falling order; equal ones in the order of their indices.

    Equals argsort of a stable descending argsort. Scores must not be NaN.
    """
    mine, other = score.unsqueeze(-1), score.unsqueeze(-2)
    index = torch.arange(score.shape[-1], device=score.device)
    before = (other > mine) | ((other == mine) & (index < index.unsqueeze(-1)))
    return before.sum(-1, dtype=torch.int32)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Similarities [B, m, n] of a [B, m, d] and b [B, n, d].

    Sums are taken in float64, and products before norms: equal rows have equal similarities wherever they stand.
    """
    product = (a.double() @ b.double().transpose(1, 2)).float()
    return _numbers(product * _inverse_norms(a).unsqueeze(2) * _inverse_norms(b).unsqueeze(1))


def _numbers(score: torch.Tensor) -> torch.Tensor:
    return torch.where(score > LOWEST, score, LOWEST)


def _inverse_norms(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / (x.double().square().sum(-1).float().sqrt() + NORM_EPS)


def _best(similarity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest of the last axis, int64 index of the first such element)."""
    largest = similarity.amax(-1)
    count = similarity.shape[-1]
    index = torch.arange(count, device=similarity.device)
    return largest, torch.where(similarity == largest.unsqueeze(-1), index, count).amin(-1)


def tome_slots(metric: torch.Tensor, r: int, prefix: int, distilled: bool) -> torch.Tensor:
    """int32 [B, N]: what becomes of each token in `tome_merge`, in slot form (see `DROPPED`, `MERGED`)."""
    batch, tokens, _ = metric.shape
    index = torch.arange(tokens, dtype=torch.int32, device=metric.device)
    if r == 0:
        return index.expand(batch, tokens).contiguous()
    start = tome_start(prefix, distilled)
    first, second = index[start::2].long(), index[start + 1 :: 2].long()
    similarity = cosines(metric[:, first], metric[:, second])
    if start == 0 and prefix > 0:
        similarity[:, 0] = -torch.inf
    if distilled:
        similarity[:, :, 0] = -torch.inf
    largest, target = _best(similarity)
    merged = ranks(largest) < r
    # In front: the prefix that was left out; of distilled models class and distillation token, ahead of their sets.
    left = (~merged).int().cumsum(1).int() - 1
    right = torch.arange(len(second), dtype=torch.int32, device=metric.device).expand(batch, -1)
    kept = len(first) - r
    if distilled:
        left = torch.where(left > 0, left + 1, left)
        right = torch.where(right > 0, right + kept, 1)
    else:
        left, right = left + start, right + (start + kept)
    slots = index.repeat(batch, 1)
    slots[:, first] = torch.where(merged, MERGED - right.gather(1, target), left).int()
    slots[:, second] = right.int()
    return slots


def tome_start(prefix: int, distilled: bool) -> int:
    """The token at which the alternation of `tome_merge` starts: behind any prefix but those that ToMe knows."""
    return 0 if prefix <= 1 or distilled else prefix


def reduce_slots(x: torch.Tensor, score: torch.Tensor, prefix: int, keep: int, merge: int) -> torch.Tensor:
    """int32 [B, N]: what becomes of each token in `token_reduce`, in slot form (see `DROPPED`, `MERGED`)."""
    batch = x.shape[0]
    place = ranks(_numbers(score)) + prefix
    slots = torch.where(place < merge, place, DROPPED).int()
    if merge < keep:
        similarity = cosines(x[:, prefix:], x[:, prefix:])
        # Columns in the order of the result, so that of equal ones the first is the more important.
        order = (place - prefix).argsort(1)[:, : merge - prefix]
        _, best = _best(similarity.gather(2, order.unsqueeze(1).expand(-1, similarity.shape[1], -1)))
        source = (place >= merge) & (place < keep)
        slots = torch.where(source, MERGED - (best + prefix), slots).int()
    front = torch.arange(prefix, dtype=torch.int32, device=x.device).expand(batch, prefix)
    return torch.cat([front, slots], 1)


def keep_slots(score: torch.Tensor, prefix: int, keep: int) -> torch.Tensor:
    """int32 [B, N]: what becomes of each token in `token_keep`, in slot form (see `DROPPED`)."""
    kept = ranks(_numbers(score)) < keep - prefix
    place = kept.int().cumsum(1).int() + (prefix - 1)
    front = torch.arange(prefix, dtype=torch.int32, device=score.device).expand(score.shape[0], prefix)
    return torch.cat([front, torch.where(kept, place, DROPPED).int()], 1)


def merge_tokens(x: torch.Tensor, size: torch.Tensor, slots: torch.Tensor, rows: int, weighted: bool) -> torch.Tensor:
    """[B, rows, C]: tokens moved to their slots, and the mean of those that others are added to.

    weighted: by sizes; else the plain mean. Tokens that nothing is added to are bit for bit what they were.
    """
    weight = size if weighted else torch.ones_like(size)
    owner, source = slots >= 0, slots <= MERGED
    # A row more, that takes what is dropped.
    place = torch.where(owner, slots, torch.where(source, MERGED - slots, rows)).long().unsqueeze(2)
    alone = torch.where(owner, slots, rows).long().unsqueeze(2).expand_as(x)
    kept = x.new_zeros((x.shape[0], rows + 1, x.shape[2])).scatter_(1, alone, x)
    sums = torch.zeros_like(kept).scatter_add_(1, place.expand_as(x), x * weight)
    totals = size.new_zeros((x.shape[0], rows + 1, 1)).scatter_add_(1, place, weight)
    added = size.new_zeros((x.shape[0], rows + 1, 1)).scatter_add_(1, place, source.unsqueeze(2).to(size.dtype))
    return torch.where(added > 0, sums / totals, kept)[:, :rows].contiguous()


def merge_sizes(size: torch.Tensor, slots: torch.Tensor, rows: int, x: torch.Tensor | None) -> torch.Tensor:
    """[B, rows, 1]: sizes of the tokens in their slots, and what sources add to them.

    A source adds its size; with x, its size times the cosine similarity in x to the token it is added to (at least 0).
    """
    owner, source = slots >= 0, slots <= MERGED
    place = torch.where(owner, slots, torch.where(source, MERGED - slots, rows)).long()
    share = size
    if x is not None:
        alone = torch.where(owner, slots, rows).long().unsqueeze(2).expand_as(x)
        kept = x.new_zeros((x.shape[0], rows + 1, x.shape[2])).scatter_(1, alone, x)
        target = kept.gather(1, place.unsqueeze(2).expand_as(x))
        product = (x.double() * target.double()).sum(-1).float() * _inverse_norms(x) * _inverse_norms(target)
        share = torch.where(source.unsqueeze(2), product.unsqueeze(2).clamp_min(0.0) * size, size)
    result = size.new_zeros((size.shape[0], rows + 1, 1)).scatter_add_(1, place.unsqueeze(2), share)
    return result[:, :rows].contiguous()


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_tokens(x: torch.Tensor, size: torch.Tensor) -> None:
    if x.dim() != 3 or size.dim() != 3 or size.shape[1] != x.shape[1] or size.shape[2] != 1:
        raise ValueError(f"tokens must be [B, N, C] and sizes [B, N, 1], not {list(x.shape)} and {list(size.shape)}")


def _check_tome(x, size, metric, r: int, prefix: int, distilled: bool) -> None:
    _check_tokens(x, size)
    if metric.dim() != 3 or metric.shape[1] != x.shape[1]:
        raise ValueError(f"the metric of {x.shape[1]} tokens must be [B, {x.shape[1]}, d], not {list(metric.shape)}")
    if distilled and prefix != 2:
        raise ValueError(f"a distilled model has a prefix of 2 tokens, not {prefix}")
    if prefix < 0 or not 0 <= r <= (x.shape[1] - prefix) // 2:
        raise ValueError(f"of {x.shape[1]} tokens with a prefix of {prefix}, {r} cannot be merged (at most half)")


def _check_reduce(x, size, score, prefix: int, keep: int, merge: int) -> None:
    _check_tokens(x, size)
    tokens = x.shape[1]
    if score.dim() != 2 or score.shape[1] != tokens - prefix:
        raise ValueError(
            f"scores of {tokens} tokens behind {prefix} must be [B, {tokens - prefix}], not {list(score.shape)}"
        )
    if not 0 <= prefix <= merge <= keep <= tokens or keep == 0 or (merge < keep and merge == prefix):
        raise ValueError(f"{tokens} tokens with a prefix of {prefix} cannot become {keep}, then {merge}")


def _check_score(q, k, size, prefix: int) -> None:
    if k.dim() != 4 or q.dim() != 4 or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must be [B, H, N, d], not {list(q.shape)} and {list(k.shape)}")
    if size is not None and (size.dim() != 3 or size.shape[1] != k.shape[2] or size.shape[2] != 1):
        raise ValueError(f"sizes of {k.shape[2]} tokens must be [B, {k.shape[2]}, 1], not {list(size.shape)}")
    if not 1 <= prefix < k.shape[2]:
        raise ValueError(f"{k.shape[2]} tokens with a prefix of {prefix} have no class token to others")
