"""A module that stands for another one while torch.export looks on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Has the parts of `module` under their names, and runs `run`, with the inputs `names` by position."""

    def __init__(self, module: nn.Module, names: Sequence[str], run: Callable[..., Any]) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training

        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        # torch.export names the inputs of the graph after the parameters of `forward`.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward
