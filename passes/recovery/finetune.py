"""Fine-tuning with distillation from the model before the first pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgec.errors import EdgecError
from edgec.passbase import Context, Needs, Pass, option
from edgec.program import Program
from edgec.training import AUGMENT, FEWEST_FOR_STATISTICS, FitReport, Recipe, Trainable, fit, fixed_batch


@dataclass(frozen=True)
class Finetune(Pass):
    """Train the weights for some hundred steps to follow the original model; pruned elements stay zero.

    Loss (1 - a) CE + a T^2 KL(teacher || student), a = 1 where there are no labels; for outputs that are no class
    scores, squared error relative to the teacher's energy. SGD with Nesterov momentum 0.9, or AdamW, the rate falling
    by a cosine. The state with the lowest KL on a held-out tenth is kept, the start included, so that the pass never
    returns something worse, on these samples, than what it got.

    Batch norms are trained with the statistics of the batch, and with their stored ones where the batch is smaller than
    8. A step is made of several calls for models of a fixed batch.

    Hinton et al., "Distilling the Knowledge in a Neural Network".
    """

    name: ClassVar[str] = "finetune"
    needs: ClassVar[Needs] = Needs.CALIBRATION

    steps: int = option(300, "optimizer steps", low=1)
    batch: int = option(128, "samples in a step, at most a quarter of all", low=1)
    lr: float = option(0.01, "learning rate at the start; for adamw use about 1e-4", low=0)
    weight_decay: float = option(1e-4, "on kernels and matrices; none on biases and norms", low=0)
    optimizer: str = option("sgd", "SGD with Nesterov momentum, or AdamW", choices=("sgd", "adamw"))
    alpha: float = option(0.9, "weight of the teacher against the labels", low=0, high=1)
    temperature: float = option(4.0, "softens the distributions of teacher and student", low=0.1, high=100)
    labels: bool = option(True, "use class labels where the data has some")
    augment: str = option("auto", "for image inputs; auto is flip-crop for colour images", choices=AUGMENT)

    def run(self, program: Program, context: Context) -> Program:
        """Returns the Program with trained weights; annotation `finetune` holds the FitReport.

        Raises EdgecError without data or a teacher, with fewer than 8 samples, when nothing is trainable (integer
        weights), when labels do not fit the classes, and when the loss is not finite.
        """
        data, teacher = context.training_data(self), context.teacher_of(self)
        batch = min(fixed_batch(program) or self.batch, self.batch)
        student = Trainable(program, frozen_norms=batch < FEWEST_FOR_STATISTICS)
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
