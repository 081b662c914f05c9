"""Fine-tuning with distillation from the model before the first pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgec.errors import EdgecError
from edgec.passbase import Context, Needs, Pass, option
from edgec.program import Program
from edgec.training import FitReport, Recipe, Trainable, fit


@dataclass(frozen=True)
class Finetune(Pass):
    """Train the weights for some hundred steps to follow the original model; pruned elements stay zero.

    Loss (1 - a) CE + a T^2 KL(teacher || student), a = 1 where there are no labels; SGD with Nesterov momentum 0.9, or
    AdamW, the rate falling by a cosine. The state with the lowest KL on a held-out tenth is kept, the start included,
    so that the pass never returns something worse than what it got.

    Hinton et al., "Distilling the Knowledge in a Neural Network".
    """

    name: ClassVar[str] = "finetune"
    needs: ClassVar[Needs] = Needs.CALIBRATION

    steps: int = option(300, "optimizer steps", low=1)
    batch: int = option(128, "samples in a step", low=1)
    lr: float = option(0.01, "learning rate at the start", low=0)
    weight_decay: float = option(1e-4, "on kernels and matrices; none on biases and norms", low=0)
    optimizer: str = option("sgd", "SGD with Nesterov momentum, or AdamW", choices=("sgd", "adamw"))
    alpha: float = option(0.9, "weight of the teacher against the labels", low=0, high=1)
    temperature: float = option(4.0, "softens the distributions of teacher and student", low=0.1, high=100)
    labels: bool = option(True, "use labels where the data has some")
    augment: str = option("flip-crop", "for image inputs", choices=("none", "flip", "flip-crop"))

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with trained weights; annotation `finetune` holds the FitReport.

        Raises EdgecError when nothing is trainable (integer weights) or the loss is not finite.
        """
        data, teacher = context.training_data(self), context.teacher_of(self)
        student = Trainable(program)
        if not student.trainable():
            raise EdgecError(
                "has no floating-point weights to train", where=program.name, hint="train before quantising"
            )
        recipe = Recipe(
            self.steps,
            self.batch,
            self.lr,
            self.weight_decay,
            self.optimizer,
            self.alpha,
            self.temperature,
            self.augment,
            use_labels=self.labels,
            seed=context.seed,
        )
        report: FitReport = fit(student, student.groups(self.weight_decay), teacher, data, recipe, log=context.log)
        if report.best_step == 0:
            context.skip(
                program.name, "fine-tuning", f"no step was better than the start (held-out {report.before:.3g})"
            )
            return program
        trained = student.program()
        return trained.replace(annotations={**trained.annotations, self.name: report})
