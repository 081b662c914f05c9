"""Lowering step by step on tiny modules, and whole bundles on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from edgec.bundle import Bundle, build_bundle
from edgec.frontend import load_model
from edgec.lowering.layout import channels_last
from edgec.lowering.lower import Lowered, lower, max_relative_error
from edgec.lowering.regions import fuse_regions
from edgec.program import Program, propagate, shape_of
from edgec.targets.device import load_device
from tests.zoo import set_weights


def load(module: nn.Module, *shapes: tuple[int, ...], seed: int = 0) -> Program:
    """The Program of a module with fixed weights."""
    set_weights(module, seed)
    if len(shapes) == 1:
        return load_model(module, input_shape=shapes[0])
    exported = torch.export.export(module.eval(), tuple(torch.rand(s) for s in shapes))
    return load_model(exported, name=type(module).__name__.lower())


def samples(program: Program, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """One random sample in -1..1 per input."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.rand(s.shape, generator=generator) - 1 for s in program.inputs)


def errors(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    """The largest relative error of any output."""
    assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
    return max(max_relative_error(g.float(), w.float()) for g, w in zip(got, want, strict=True))


class Stages:
    """A Program's graph with a batch of one after `fuse_regions` and after `channels_last`, each checked against it."""

    def __init__(self, program: Program) -> None:
        inputs = samples(program)
        want = program(*inputs)
        module = program.edit()
        propagate(module, program.batch_inputs(1))
        self.regions = self._step(program, module, fuse_regions, inputs, want)
        self.layout = self._step(program, module, channels_last, inputs, want)

    @staticmethod
    def _step(
        program: Program,
        module: fx.GraphModule,
        rewrite: Callable[[fx.GraphModule], fx.GraphModule],
        inputs: tuple[torch.Tensor, ...],
        want: tuple[torch.Tensor, ...],
    ) -> fx.GraphModule:
        assert rewrite(module) is module
        recorded = {n: shape_of(n) for n in module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
        propagate(module, program.batch_inputs(1))
        # Rules read the shapes that earlier rules wrote.
        assert recorded == {n: shape_of(n) for n in recorded}
        dead = [n for n in module.graph.nodes if n.op in ("call_function", "get_attr") and not n.users]
        assert dead == []
        with torch.no_grad():
            got = module(*inputs)
        assert errors(tuple(got), want) < 1e-6
        return Program(program.name, module, program.batch_inputs(1)).edit()


def operators(module: fx.GraphModule) -> Counter[str]:
    """How often each operator is called, by its short name."""
    return Counter(_name(n) for n in module.graph.nodes if n.op == "call_function")


def calls(module: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "call_function" and _name(n) == name]


def _name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", None) or node.target.__name__  # type: ignore[union-attr]


@dataclass(frozen=True)
class Compiled:
    program: Program
    lowered: Lowered
    bundle: Bundle

    def error(self, seed: int = 1) -> float:
        """The largest relative error of the compiled code against PyTorch on one random sample."""
        inputs = samples(self.program, seed)
        got = self.bundle.run(*[x.numpy() for x in inputs])
        got = got if isinstance(got, tuple) else (got,)
        return errors(tuple(torch.from_numpy(np.array(g)) for g in got), self.program(*inputs))


def compile_host(program: Program, folder: Path) -> Compiled:
    device = load_device("host")
    lowered = lower(program, device)
    return Compiled(program, lowered, build_bundle(lowered, device, folder / "bundle"))
