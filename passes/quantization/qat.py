"""Quantisation-aware training with learned steps and distillation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from edgec.integer import REQUANTS
from edgec.passbase import Context, Needs, Pass, option
from edgec.passes.keep import layer_names
from edgec.passes.quantization.fakequant import FakeQuantGraph, LearnedStepWeight
from edgec.passes.quantization.operators import NONLINEAR, arguments
from edgec.passes.quantization.ptq import (
    RangeFinder,
    activation_bits,
    choose_requant,
    convert,
    observe,
    prepare,
    uniform_bits,
)
from edgec.passes.quantization.reconstruct import given_rule, make_weight
from edgec.program import Program, constant_of, get_weight, layer_of
from edgec.training import FitReport, Recipe, fit

# Passes over the data at most: more would fit the samples and not the model.
MOST_EPOCHS = 50
# Learning rate of steps, relative to each step, for every unit of the weights' rate.
STEP_RATE = 5.0


@dataclass(frozen=True)
class QatSummary:
    """What the pass did. bits: (weights, input) by layer; fit: losses of the fake-quantised graph."""

    samples: int
    bits: dict[str, tuple[int, int]]
    fit: FitReport


@dataclass(frozen=True)
class Qat(Pass):
    """Train weights, biases and the steps of weights and activations for some hundred steps, then write integers.

    The forward pass rounds weights and activations as the integer graph will; gradients pass through the rounding
    (straight-through), and steps have the gradient of LSQ. Loss (1 - a) CE + a T^2 KL(teacher || student), a = 1 where
    there are no labels; AdamW, the rate falling by a cosine. Steps are frozen after `freeze` of the training, so that
    weights settle on a fixed grid. The state with the lowest KL on a held-out tenth is kept, the start included: ranges
    of least squared error, nearest rounding. Run `fold-bn` first; training a graph whose batch norms are folded needs
    rates this small.

    First and last layers and depthwise convolutions have 8 bits; the sum of a residual block reads 8-bit codes.

    Esser et al., "Learned Step Size Quantization"; Hinton et al., "Distilling the Knowledge in a Neural Network".
    """

    name: ClassVar[str] = "qat"
    needs: ClassVar[Needs] = Needs.CALIBRATION
    faithful: ClassVar[bool] = False

    weights: int = option(4, "bits of weights", low=2, high=8)
    activations: int = option(8, "bits of what layers read", low=2, high=8)
    edges: int = option(8, "at least so many bits for the first and last layers", low=2, high=8)
    depthwise: int = option(8, "at least so many bits for depthwise convolutions", low=2, high=8)
    steps: int = option(400, "optimizer steps; no more than 50 passes over the data", low=1)
    batch: int = option(64, "samples in a step", low=1)
    lr: float = option(2e-4, "learning rate of weights at the start (AdamW)", low=0)
    freeze: float = option(0.5, "share of the training after which steps stay", low=0, high=1)
    alpha: float = option(0.9, "weight of the teacher against the labels", low=0, high=1)
    temperature: float = option(4.0, "softens the distributions of teacher and student", low=0.1, high=100)
    labels: bool = option(True, "use labels where the data has some")
    augment: str = option("flip-crop", "for image inputs", choices=("none", "flip", "flip-crop"))
    samples: int = option(512, "at most this many samples give the ranges to start from", low=1)
    requant: str = option("auto", "see quantize-int8", choices=("auto", *REQUANTS))
    nonlinear: str = option("auto", "see quantize-int8", choices=NONLINEAR)
    keep_float: tuple[str, ...] = option((), "layers to leave alone: names, or patterns such as blocks.3.*")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep_float", layer_names(self.keep_float, f"{self.name}{{keep_float}}"))

    def run(self, program: Program, context: Context) -> Program:
        """Returns the integer Program; annotation `qat` holds a QatSummary.

        Raises EdgecError without data or a teacher, with fewer than 8 samples, and when the loss is not finite.
        """
        data, teacher = context.training_data(self), context.teacher_of(self)
        samples = data.limit(self.samples, context.seed)
        where = f"{self.name}{{keep_float}}"
        prepared = prepare(program, context, samples, keep_float=self.keep_float, nonlinear=self.nonlinear, where=where)
        if not prepared.layers:
            return program
        bits = uniform_bits(prepared, self.weights, self.activations, edges=self.edges, depthwise=self.depthwise)
        observed = observe(prepared, samples, context, RangeFinder(), activation_bits(prepared, bits))
        weights = {n: make_weight(LearnedStepWeight, prepared, n, bits[n]) for n in prepared.layers}
        student = Student(FakeQuantGraph(prepared, observed, weights), weights)
        batch = self.batch if program.dynamic_batch else program.example_inputs[0].shape[0]
        steps = min(self.steps, MOST_EPOCHS * math.ceil(len(data) / batch))
        recipe = Recipe(
            steps,
            batch,
            self.lr,
            optimizer="adamw",
            alpha=self.alpha,
            temperature=self.temperature,
            augment=self.augment,
            use_labels=self.labels,
            seed=context.seed,
        )

        def after_step(step: int) -> None:
            if step >= self.freeze * steps:
                student.freeze_steps()

        if self.freeze == 0:
            student.freeze_steps()
        report = fit(student, student.groups(self.lr), teacher, data, recipe, after_step=after_step, log=context.log)
        if report.best_step == 0:
            context.skip(program.name, "training", f"no step was better than the start (held-out {report.before:.3g})")
        student.write_biases()
        integers = convert(
            prepared, student.graph.results(), lambda n: given_rule(weights[n]), choose_requant(self.requant, context)
        )
        summary = QatSummary(len(data), {layer_of(n): (b.weights, b.activations) for n, b in bits.items()}, report)
        return integers.finish({self.name: summary})

    def weaken(self, amount: float) -> Qat | None:
        """More bits: 8 for both at 0."""
        weights, activations = (round(8 - amount * (8 - b)) for b in (self.weights, self.activations))
        return dataclasses.replace(self, weights=weights, activations=activations)


class Student:
    """A fake-quantised graph for `fit`: weights, biases of its layers, and all steps are trained."""

    def __init__(self, graph: FakeQuantGraph, weights: dict[fx.Node, LearnedStepWeight]) -> None:
        self.graph, self.weights = graph, weights
        for layer in weights:
            stored = arguments(layer)["bias"]
            bias = constant_of(graph.module, stored)
            if bias is not None:
                graph.stored.setdefault(str(stored.target), bias.clone().requires_grad_(True))
        self.quantizers = list(dict.fromkeys([*graph.on_result.values(), *graph.on_read.values()]))
        for quantizer in self.quantizers:
            quantizer.learn(True)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.graph(*inputs)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Optimizer groups; no weight decay, because distance from the trained weights is what counts."""
        steps = [q.factor for q in self.quantizers] + [w.factor for w in self.weights.values()]
        values = [w.weight for w in self.weights.values()] + list(self.graph.stored.values())
        return [
            {"params": values, "lr": rate, "weight_decay": 0.0},
            {"params": [p for p in steps if p.requires_grad], "lr": rate * STEP_RATE, "weight_decay": 0.0},
        ]

    def freeze_steps(self) -> None:
        for quantizer in self.quantizers:
            quantizer.learn(False)
        for weight in self.weights.values():
            weight.factor.requires_grad_(False)
            weight.factor.grad = None
        for quantizer in self.quantizers:
            quantizer.factor.grad = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {f"weight {n.name}": w.weight for n, w in self.weights.items()}
        found |= {f"step of weight {n.name}": w.factor for n, w in self.weights.items()}
        found |= {f"step {i}": q.factor for i, q in enumerate(self.quantizers)}
        return found | {f"stored {path}": tensor for path, tensor in self.graph.stored.items()}

    def state(self) -> dict[str, torch.Tensor]:
        return {key: tensor.detach().clone() for key, tensor in self._tensors().items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for key, tensor in self._tensors().items():
                tensor.copy_(state[key])

    def train(self, mode: bool) -> None:
        """The graph is the same in both modes."""

    def project(self) -> None:
        """Put zeros back where weights are pruned."""
        with torch.no_grad():
            for weight in self.weights.values():
                if weight.mask is not None:
                    weight.weight.mul_(weight.mask)

    def write_biases(self) -> None:
        """Put the trained biases into the graph, for the converter."""
        module = self.graph.module
        with torch.no_grad():
            for node in module.graph.nodes:
                if node.op == "get_attr" and str(node.target) in self.graph.stored:
                    get_weight(module, node).copy_(self.graph.stored[str(node.target)])
