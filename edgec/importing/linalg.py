"""Linear algebra on small matrices, written out: inverse, determinant, Cholesky, triangular systems, QR.

Every step works on whole matrices [..., n, n] with masks in place of slices, so a matrix of n rows is n steps of about
a dozen operators. Pivots are chosen as LAPACK chooses them: the largest element of what is left of a column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgec.importing.operators import by_overload

# Rows of a matrix that is written out; larger ones make graphs that take minutes to compile.
MAX_ROWS = 32


def _rows(run: Any, a: torch.Tensor, axis: int = -1) -> int:
    n = a.shape[axis]
    if not isinstance(n, int) or n > MAX_ROWS:
        raise run.error(
            f"{run.node.target} of a matrix of {n} rows is too large to be written out: more than {MAX_ROWS}",
            "compute it outside of the model, or on smaller matrices",
        )
    return n


def _pick(hit: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The row of a [..., n, m] where hit [..., n] is true, as [..., 1, m]."""
    return torch.where(hit.unsqueeze(-1), a, torch.zeros(())).sum(-2, keepdim=True)


def _eliminate(run: Any, a: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Gauss-Jordan elimination with partial pivoting: (a^-1 b, the pivots [..., n], the sign of the permutation)."""
    n = _rows(run, a, -2)
    rows = torch.arange(n)
    wide = a if b is None else torch.cat([a, b], -1)
    sign: Any = torch.ones(a.shape[:-2])
    pivots = []
    for k in range(n):
        size = torch.where(rows >= k, wide.select(-1, k).abs(), torch.full((), -1.0))
        hit = rows == torch.argmax(size, -1, True)
        here = rows == k
        top, old = _pick(hit, wide), wide.narrow(-2, k, 1)
        wide = torch.where(hit.unsqueeze(-1), old, wide)
        wide = torch.where(here.unsqueeze(-1), top, wide)
        sign = sign * torch.where(hit.select(-1, k), torch.ones(()), torch.full((), -1.0))
        pivot = top.select(-1, k).unsqueeze(-1)
        pivots.append(pivot.reshape(a.shape[:-2]))
        # The rows above matter for the solution only; below, the column becomes zero.
        others = rows > k if b is None else rows != k
        factor = torch.where(others, wide.select(-1, k), torch.zeros(())).unsqueeze(-1) / pivot
        wide = wide - factor * top
    diagonal = torch.stack(pivots, -1)
    solution = wide if b is None else wide.narrow(-1, n, b.shape[-1]) / diagonal.unsqueeze(-1)
    return solution, diagonal, sign


def _inverse(run: Any, a: torch.Tensor) -> torch.Tensor:
    n = _rows(run, a)
    return _eliminate(run, a, torch.eye(n).expand(a.shape))[0]


def _solve(run: Any, a: torch.Tensor, b: torch.Tensor, *, left: bool = True) -> torch.Tensor:
    # PyTorch takes b for vectors where its shape is that of a without the last axis.
    vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    if vector:
        return _both(run, a, b.unsqueeze(-1)).squeeze(-1)
    return _both(run, a, b) if left else _both(run, a.mT, b.mT).mT


def _both(run: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return _eliminate(run, a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:]))[0]


def _product(x: torch.Tensor) -> torch.Tensor:
    first, *rest = x.unbind(-1)
    for factor in rest:
        first = first * factor
    return first


def _determinant(run: Any, a: torch.Tensor) -> torch.Tensor:
    _, pivots, sign = _eliminate(run, a, None)
    return sign * _product(pivots)


def _log_determinant(run: Any, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, pivots, sign = _eliminate(run, a, None)
    return sign * _product(torch.sign(pivots)), torch.log(pivots.abs()).sum(-1)


def _plain_log(run: Any, a: torch.Tensor) -> torch.Tensor:
    sign, size = _log_determinant(run, a)
    return torch.where(sign < 0, torch.full((), float("nan")), size)


def _cholesky(run: Any, a: torch.Tensor, *, upper: bool = False) -> torch.Tensor:
    n = _rows(run, a)
    rows, rest, columns = torch.arange(n), a.mT if upper else a, []
    for k in range(n):
        column = rest.select(-1, k)
        column = column / torch.sqrt(column.narrow(-1, k, 1))
        column = torch.where(rows >= k, column, torch.zeros(()))
        columns.append(column)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
    return torch.stack(columns, -2 if upper else -1)


def _triangular(
    run: Any, a: torch.Tensor, b: torch.Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> torch.Tensor:
    """Substitution, from the last row up for upper triangles."""
    if not left:
        return _triangular(run, a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    n = _rows(run, a)
    found: list[Any] = [None] * n
    for i in reversed(range(n)) if upper else range(n):
        rest = b.narrow(-2, i, 1)
        known = range(i + 1, n) if upper else range(i)
        if known:
            row = a.narrow(-2, i, 1).narrow(-1, known[0], len(known))
            rest = rest - row @ torch.cat([found[j] for j in known], -2)
        found[i] = rest if unitriangular else rest / a.narrow(-2, i, 1).narrow(-1, i, 1)
    return torch.cat(found, -2)


def _old_triangular(
    run: Any, b: torch.Tensor, a: torch.Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    own = a.mT if transpose else a
    return _triangular(run, own, b, upper=upper != transpose, unitriangular=unitriangular), a


def _cholesky_solve(run: Any, b: torch.Tensor, a: torch.Tensor, upper: bool = False) -> torch.Tensor:
    lower = a.mT if upper else a
    return _triangular(run, lower.mT, _triangular(run, lower, b, upper=False), upper=True)


def _cholesky_inverse(run: Any, a: torch.Tensor, upper: bool = False) -> torch.Tensor:
    return _cholesky_solve(run, torch.eye(_rows(run, a)).expand(a.shape), a, upper)


def _qr(run: Any, a: torch.Tensor, mode: str = "reduced") -> tuple[torch.Tensor, torch.Tensor]:
    """Householder's reflections, with LAPACK's signs: the first element of what is left decides."""
    m, n = _rows(run, a, -2), a.shape[-1]
    rows, r = torch.arange(m), a
    q = torch.eye(m).expand(*a.shape[:-2], m, m)
    for k in range(min(m - 1, n)):
        column = torch.where(rows >= k, r.select(-1, k), torch.zeros(()))
        size = torch.sqrt((column * column).sum(-1, keepdim=True))
        first = column.narrow(-1, k, 1)
        below = torch.where(rows > k, column, torch.zeros(())).abs().sum(-1, keepdim=True)
        beta = torch.where(first < 0, size, -size)
        v = torch.where(rows == k, first - beta, column)
        square = (v * v).sum(-1, keepdim=True)
        # A column that is zero below its diagonal stays as it is.
        scale = torch.where(below > 0, 2.0 / torch.where(square > 0, square, torch.ones(())), torch.zeros(()))
        v = v.unsqueeze(-1)
        reflected = v * scale.unsqueeze(-1)
        r = r - reflected @ (v.mT @ r)
        q = q - (q @ v) @ reflected.mT
    count = m if mode == "complete" else min(m, n)
    r = torch.triu(r).narrow(-2, 0, count)
    return (torch.zeros(0) if mode == "r" else q.narrow(-1, 0, count)), r


def _with_status(function: Callable[..., Any], extra: int = 0) -> Callable[..., Any]:
    """For operators that return a status too; every matrix is taken as fit."""

    def rule(run: Any, a: torch.Tensor, *args: Any, check_errors: bool = False, **options: Any) -> Any:
        if any(user.args[1] > 0 and user.users for user in run.node.users):
            raise run.error(f"{run.node.target} gives more than its result", "use the result only")
        return (
            function(run, a, *args, **options),
            *[torch.zeros(0)] * extra,
            torch.zeros(a.shape[:-2]).to(torch.int32),
        )

    return rule


def _first(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """For operators that return factors beside their result, of which nothing is used."""

    def rule(run: Any, *args: Any, **options: Any) -> Any:
        result = function(run, *args, **options)
        results = result if isinstance(result, tuple) else (result,)
        if any(user.args[1] >= len(results) and user.users for user in run.node.users):
            raise run.error(f"{run.node.target} gives more than its result", "use the result only")
        return (*results, *[torch.zeros(0)] * (count - len(results)))

    return rule


RULES: dict[Any, Callable[..., Any]] = by_overload(
    {
        "linalg_inv": _inverse,
        "inverse": _inverse,
        "linalg_inv_ex": _with_status(_inverse),
        "linalg_solve": _solve,
        "linalg_solve_ex": _with_status(_solve),
        "_linalg_solve_ex": _with_status(_solve, 2),
        "linalg_det": _determinant,
        "det": _determinant,
        "_linalg_det": _first(_determinant, 3),
        "linalg_slogdet": _log_determinant,
        "slogdet": _log_determinant,
        "_linalg_slogdet": _first(_log_determinant, 4),
        "logdet": _plain_log,
        "cholesky": lambda run, a, upper=False: _cholesky(run, a, upper=upper),
        "linalg_cholesky": _cholesky,
        "linalg_cholesky_ex": _with_status(_cholesky),
        "cholesky_solve": _cholesky_solve,
        "cholesky_inverse": _cholesky_inverse,
        "linalg_solve_triangular": _triangular,
        "triangular_solve": _old_triangular,
        "linalg_qr": _qr,
        "qr": lambda run, a, some=True: _qr(run, a, "reduced" if some else "complete"),
    }
)
