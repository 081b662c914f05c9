"""Token reduction (`edgec.tokenops`) in ONNX: the slots of the operators' definition, and scatters that add by them.

Order is found by counting and by integer sums, as in the definition, so equal scores keep the order of their indices in
any engine. Nothing is written to one place twice, except where it is added. Similarities are products in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from edgec.onnx.emitters import Call, emits
from edgec.onnx.writer import ELEMENTS, _Writer
from edgec.tokenops import LOWEST, NORM_EPS, tome_start

INTEGER, REAL = TensorProto.INT64, TensorProto.FLOAT


@emits("edgec.tome_merge.default")
def _tome_merge(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, size, r, prefix, distilled = w.x(a["x"]), w.x(a["size"]), a["r"], a["prefix"], a["distilled"]
    if r == 0:
        return x, size
    tokens = int(w.meta(a["x"]).shape[1])
    start = tome_start(prefix, distilled)
    first, second = np.arange(start, tokens, 2), np.arange(start + 1, tokens, 2)
    kept = len(first) - r
    metric = w.x(a["metric"])
    sides = [
        w.emit("Slice", [metric, w.ints([s]), w.ints([tokens]), w.ints([1]), w.ints([2])]) for s in (start, start + 1)
    ]
    similarity = _cosines(w, *sides)
    # Rows and columns that may not be chosen are lower than any number.
    barred = np.zeros((1, len(first), len(second)), bool)
    barred[:, 0] |= start == 0 and prefix > 0
    barred[:, :, 0] |= distilled
    if barred.any():
        similarity = w.emit("Where", [w.const(barred), w.const(np.float32(-np.inf)), similarity])
    largest = w.emit("ReduceMax", [similarity, w.ints([2])], keepdims=0)
    target = w.emit("ArgMax", [similarity], axis=2, keepdims=0)
    merged = w.emit("Less", [_ranks(w, largest, len(first)), w.const(np.int64(r))])
    left = _count_before(w, w.emit("Not", [merged]))
    right = np.arange(len(second))
    if distilled:
        # The class token in front of the first set, the distillation token behind it.
        later = w.emit("Greater", [left, w.const(np.int64(0))])
        left = w.emit("Add", [left, w.emit("Cast", [later], to=INTEGER)])
        right = np.where(right > 0, right + kept, 1)
    else:
        left, right = _plus(w, left, start), right + start + kept
    into = w.emit("Gather", [w.const(right), target], axis=0)
    places = [_samples(w, np.arange(start), x), w.emit("Where", [merged, into, left]), _samples(w, right, x)]
    sources = [_samples(w, np.zeros(start, bool), x), merged, _samples(w, np.zeros(len(second), bool), x)]
    # Back into the order of tokens, in which sums are taken.
    order = w.const(np.argsort(np.concatenate([np.arange(start), first, second])))
    place, source = (
        w.emit("Gather", [w.emit("Concat", parts[0 if start else 1 :], axis=1), order], axis=1)
        for parts in (places, sources)
    )
    return _moved(w, node, x, size, place, source, tokens - r, weighted=True)


@emits("edgec.token_reduce.default")
def _token_reduce(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, prefix, keep, merge = w.x(a["x"]), a["prefix"], a["keep"], a["merge"]
    count = int(w.meta(a["score"]).shape[1])
    place = _plus(w, _ranks(w, _numbers(w, w.x(a["score"], torch.float32)), count), prefix)
    stays = w.emit("Less", [place, w.const(np.int64(merge))])
    dropped, source = w.const(np.int64(merge)), None
    if merge < keep:
        tokens = w.emit("Slice", [x, w.ints([prefix]), w.ints([prefix + count]), w.ints([1])])
        similarity = _cosines(w, tokens, tokens)
        allowed = w.emit("Unsqueeze", [stays, w.ints([1])])
        similarity = w.emit("Where", [allowed, similarity, w.const(np.float32(-np.inf))])
        largest = w.emit("ReduceMax", [similarity, w.ints([2])], keepdims=1)
        # Of equal ones the first in the order of the result.
        columns = w.emit("Unsqueeze", [place, w.ints([1])])
        tied = w.emit("Where", [w.emit("Equal", [similarity, largest]), columns, w.const(np.int64(prefix + count))])
        best = w.emit("ReduceMin", [tied, w.ints([2])], keepdims=0)
        within = w.emit("Less", [place, w.const(np.int64(keep))])
        source = w.emit("And", [within, w.emit("Not", [stays])])
        dropped = w.emit("Where", [source, best, dropped])
    place = w.emit("Where", [stays, place, dropped])
    if prefix:
        place = w.emit("Concat", [_samples(w, np.arange(prefix), x), place], axis=1)
        if source is not None:
            source = w.emit("Concat", [_samples(w, np.zeros(prefix, bool), x), source], axis=1)
    return _moved(w, node, x, w.x(a["size"]), place, source, merge, a["weighted_mean"], not a["true_size"])


@emits("edgec.token_keep.default")
def _token_keep(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    x, prefix, keep = w.x(a["x"]), a["prefix"], a["keep"]
    count = int(w.meta(a["score"]).shape[1])
    rank = _ranks(w, _numbers(w, w.x(a["score"], torch.float32)), count)
    kept = w.emit("Less", [rank, w.const(np.int64(keep - prefix))])
    place = w.emit("Where", [kept, _plus(w, _count_before(w, kept), prefix), w.const(np.int64(keep))])
    if prefix:
        place = w.emit("Concat", [_samples(w, np.arange(prefix), x), place], axis=1)
    return _moved(w, node, x, w.x(a["size"]), place, None, keep)


@emits("edgec.class_score.default")
def _class_score(w: _Writer, node: Call) -> Any:
    a = w.args(node)
    kind, prefix, tokens = node.meta["val"].dtype, a["prefix"], int(w.meta(a["k"]).shape[2])
    query = w.emit("Slice", [w.x(a["q"]), w.ints([0]), w.ints([1]), w.ints([2])])
    query = w.emit("Mul", [query, w.x(float(a["scale"]), kind)])
    logits = w.emit("MatMul", [query, w.emit("Transpose", [w.x(a["k"])], perm=[0, 1, 3, 2])])
    if a["size"] is not None:
        # [B, N, 1] -> [B, 1, 1, N]
        rows = w.emit("Transpose", [w.emit("Log", [w.x(a["size"])])], perm=[0, 2, 1])
        logits = w.emit("Add", [logits, w.emit("Unsqueeze", [rows, w.ints([1])])])
    shares = w.emit("Softmax", [logits], axis=3)
    shares = w.emit("Slice", [shares, w.ints([prefix]), w.ints([tokens]), w.ints([3])])
    return w.emit("ReduceMean", [shares, w.ints([1, 2])], keepdims=0)


# -- parts -------------------------------------------------------------------------------------------------------------


def _batch(w: _Writer, x: str) -> str:
    return w.emit("Shape", [x], start=0, end=1)


def _samples(w: _Writer, row: np.ndarray, x: str) -> str:
    """[B, n]: one row for each sample of x."""
    shape = w.emit("Concat", [_batch(w, x), w.ints([len(row)])], axis=0)
    return w.emit("Expand", [w.const(row[None]), shape])


def _zeros(w: _Writer, x: str, rows: int, channels: int, kind: torch.dtype) -> str:
    shape = w.emit("Concat", [_batch(w, x), w.ints([rows, channels])], axis=0)
    return w.emit("Expand", [w.const(np.zeros((1, 1, 1), torch.empty(0, dtype=kind).numpy().dtype)), shape])


def _plus(w: _Writer, x: str, number: int) -> str:
    return w.emit("Add", [x, w.const(np.int64(number))]) if number else x


def _numbers(w: _Writer, score: str) -> str:
    """NaN and -inf as one number below all others."""
    lowest = w.const(np.float32(LOWEST))
    return w.emit("Where", [w.emit("Greater", [score, lowest]), score, lowest])


def _ranks(w: _Writer, score: str, count: int) -> str:
    """int64 [B, n] place of each score in falling order, as `edgec.tokenops.ranks`."""
    mine, other = (w.emit("Unsqueeze", [score, w.ints([dim])]) for dim in (2, 1))
    index = np.arange(count)
    earlier = w.emit("Less", [w.const(index[None, :]), w.const(index[:, None])])
    tied = w.emit("And", [w.emit("Equal", [other, mine]), earlier])
    before = w.emit("Or", [w.emit("Greater", [other, mine]), tied])
    return w.emit("ReduceSum", [w.emit("Cast", [before], to=INTEGER), w.ints([2])], keepdims=0)


def _count_before(w: _Writer, flags: str) -> str:
    """int64 [B, n]: how many are true before each that is true."""
    counts = w.emit("CumSum", [w.emit("Cast", [flags], to=INTEGER), w.const(np.int64(1))])
    return w.emit("Sub", [counts, w.const(np.int64(1))])


def _cosines(w: _Writer, a: str, b: str) -> str:
    """float32 [B, m, n] similarities of [B, m, d] and [B, n, d]: sums in float64, products before norms."""
    left, right = _double(w, a), _double(w, b)
    product = w.emit("MatMul", [left, w.emit("Transpose", [right], perm=[0, 2, 1])])
    norms = [_inverse_norms(w, v) for v in (left, right)]
    product = w.emit("Mul", [w.emit("Cast", [product], to=REAL), norms[0]])
    return _numbers(w, w.emit("Mul", [product, w.emit("Transpose", [norms[1]], perm=[0, 2, 1])]))


def _double(w: _Writer, x: str) -> str:
    return w.emit("Cast", [x], to=TensorProto.DOUBLE)


def _inverse_norms(w: _Writer, x: str) -> str:
    """float32 [B, n, 1] of float64 [B, n, d]."""
    squares = w.emit("ReduceSum", [w.emit("Mul", [x, x]), w.ints([2])], keepdims=1)
    norm = w.emit("Add", [w.emit("Sqrt", [w.emit("Cast", [squares], to=REAL)]), w.const(np.float32(NORM_EPS))])
    return w.emit("Div", [w.const(np.float32(1.0)), norm])


def _moved(
    w: _Writer,
    node: Call,
    x: str,
    size: str,
    place: str,
    source: str | None,
    rows: int,
    weighted: bool = False,
    scaled: bool = False,
) -> dict[int, str]:
    """Both results. place [B, N]: the row that a token goes to, `rows` for none; source: which are added to others.

    As `edgec.tokenops.merge_tokens` and `merge_sizes`; scaled: sizes of sources are times their similarity.
    """
    values = node.meta["val"]
    kind, channels = values[0].dtype, int(values[0].shape[2])
    used = {user.args[1] for user in node.users}
    narrow = w.emit("Unsqueeze", [place, w.ints([2])])
    index = w.emit("Expand", [narrow, w.emit("Shape", [x])])
    blank = w.const(np.int64(rows))
    alone, flags = index, ""
    if source is not None:
        flags = w.emit("Unsqueeze", [source, w.ints([2])])
        alone = w.emit("Where", [flags, blank, index])

    def added(updates: str, to: str, width: int) -> str:
        # A row more, that takes what is dropped. float16 is not added by all engines.
        zeros = _zeros(w, x, rows + 1, width, torch.float32)
        wide = updates if kind == torch.float32 else w.emit("Cast", [updates], to=REAL)
        return w.emit("ScatterElements", [zeros, to, wide], axis=1, reduction="add")

    def finished(result: str) -> str:
        result = w.emit("Slice", [result, w.ints([0]), w.ints([rows]), w.ints([1])])
        return result if kind == torch.float32 else w.emit("Cast", [result], to=ELEMENTS[kind])

    found: dict[int, str] = {}
    kept = added(x, alone, channels) if 0 in used or (scaled and source is not None) else ""
    if 0 in used and source is None:
        found[0] = finished(kept)
    elif 0 in used:
        joined = added(w.emit("Cast", [flags], to=ELEMENTS[kind]), narrow, 1)
        sums = added(w.emit("Mul", [x, size]) if weighted else x, index, channels)
        totals = added(size, narrow, 1) if weighted else w.emit("Add", [joined, w.const(np.float32(1.0))])
        some = w.emit("Greater", [joined, w.const(np.float32(0.0))])
        found[0] = finished(w.emit("Where", [some, w.emit("Div", [sums, totals]), kept]))
    if 1 in used:
        share = size
        if scaled and source is not None:
            here, there = _double(w, x), _double(w, w.emit("GatherElements", [kept, index], axis=1))
            product = w.emit("ReduceSum", [w.emit("Mul", [here, there]), w.ints([2])], keepdims=1)
            product = w.emit("Mul", [w.emit("Cast", [product], to=REAL), _inverse_norms(w, here)])
            product = w.emit("Mul", [product, _inverse_norms(w, there)])
            zero = w.const(np.float32(0.0))
            positive = w.emit("Where", [w.emit("Less", [product, zero]), zero, product])
            wide = size if kind == torch.float32 else w.emit("Cast", [size], to=REAL)
            share = w.emit("Where", [flags, w.emit("Mul", [positive, wide]), wide])
            share = share if kind == torch.float32 else w.emit("Cast", [share], to=ELEMENTS[kind])
        found[1] = finished(added(share, narrow, 1))
    return found
