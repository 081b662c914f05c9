"""Gradients of custom operators by running their meaning again: no operator needs a backward formula of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The `setup_context` that belongs to `recompute`."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.places = [isinstance(x, torch.Tensor) for x in inputs]
    ctx.others = [x for x in inputs if not isinstance(x, torch.Tensor)]


def recompute(run: Callable[..., Any], differentiable: int) -> Callable[..., Any]:
    """A backward function that runs the operator again, by `run`, and differentiates it by its first operands."""

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        given = [next(tensors if tensor else others) for tensor in ctx.places]
        with torch.enable_grad():
            leaves = [
                x.detach().requires_grad_() if i < differentiable and isinstance(x, torch.Tensor) else x
                for i, x in enumerate(given)
            ]
            results = run(*leaves)
            results = results if isinstance(results, tuple) else (results,)
            wanted = [x for i, x in enumerate(leaves) if i < differentiable and isinstance(x, torch.Tensor)]
            pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
            ys, gs = ([pair[i] for pair in pairs] for i in (0, 1))
            found = iter(torch.autograd.grad(ys, wanted, gs, allow_unused=True))
        return tuple(
            next(found) if i < differentiable and isinstance(x, torch.Tensor) else None for i, x in enumerate(given)
        )

    return backward
