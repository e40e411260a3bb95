"""Distillation as a wrapper: the student's own step, and what its teacher says about the same batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec

from lightning.pytorch import LightningModule
from torch import nn
from torch.export import ExportedProgram

from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.distillation.objective import Distillation, Loss
from lightning_compress.distillation.teacher_sources import find_teachers, network_of
from lightning_compress.distillation.teachers import Teachers
from lightning_compress.trainer.wrapper import CompressionModule, check_wrappable

Teacher = nn.Module | ExportedProgram | str | PathLike[str]
P = ParamSpec("P")


def _refuse_cache(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor refuse `cache=`, the earlier name of `index=`."""

    @wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if "cache" in kwargs:
            raise TypeError(f"cache={kwargs['cache']!r} is called index= now: the place of the samples' indices.")
        init(*args, **kwargs)

    return checked


class DistillationModule(CompressionModule):
    """Train a student on its own loss and on the outputs of a teacher, whatever the student's LightningModule is.

    With the student's own loss L, its logits s and the teacher's t, at temperature T:

        loss = (1 - alpha) L + alpha T^2 KL(softmax(t / T) || softmax(s / T)) + sum_h weight_h hint_h

    KL is summed over classes and averaged over samples (and tokens, and pixels). The student's `training_step` runs as
    it is; what `network` was called with goes to the teacher, and what it returned is compared. Use the wrapper in the
    place of the student, `trainer.fit(module)`; the student shares its weights, and checkpoints are the student's own.

    At alpha 1 the student's own loss is left out, so that a batch needs no labels that it could use.

    Logged beside the student's own: `compress/distillation_loss` (before alpha), `compress/hint_loss`, and
    `compress/alpha` and `compress/temperature` where they follow a schedule; all at the steps that the Trainer writes.

    Args:
        student: The LightningModule that trains.
        teacher: A module that maps the same inputs to outputs of the same shape; a LightningModule, whose submodule at
            `network` is taken; a program of `torch.export`; the path of a checkpoint or compressed file, of the
            student's own network or of one that its class can load; or several of these, whose probabilities are
            averaged. It is kept outside the student: without gradients, in no checkpoint, in its own dtype and without
            autocast; in evaluation mode whenever it is called, after which a frozen part that both share is in the
            student's mode again.
        temperature: T > 0; a number, or {"start": 8, "end": 1, "schedule": "linear", "start_epoch": 0, "end_epoch":
            None}, read as the ramp of `IterativePruningCallback`.
        alpha: Share of the teacher, 0 to 1; likewise. With 0 and no hints, the run is the one without a teacher; with 0
            and hints, the outputs of the networks may be anything.
        loss: "soft_target", as above; "logit_regression", half the squared distance of the logits, or of one number per
            sample; "cosine", 1 minus the cosine between them. alpha stands before each, T^2 before the first only.
        hints: Layers to compare as well: {"student": name, "teacher": name, "loss": "fitnet", "attention_transfer" or
            "cosine", "weight": 1.0, "regressor": False, "output": None, "channel_dim": None}. A regressor maps the
            student's features to the shape of the teacher's; it trains with the student, and is kept in the
            Trainer's checkpoints for a resume, not in the `state_dict`.
        network: Dotted path of the submodule whose output is the prediction; empty: the student's own forward.
        output: Key, position or attribute of the logits where a network, of student or teacher, returns more than a
            tensor.
        teacher_network: Dotted path of that submodule in the teacher, where it is another one; None: as `network`, of a
            teacher that is a LightningModule. The names of hints are those of the teacher as it was passed.
        teacher_weights: Of several teachers, in their order; None: equal.
        class_dim: The dimension of the classes, where outputs have more than two: -1 for tokens (N, T, C), 1 for
            pixels (N, C, H, W).
        mask: Name of a keyword argument of the network, such as "attention_mask": an output counts where it is 1 or
            True, and does not where it is 0 or False; any other value is refused. In hints it holds for features that
            have the same positions.
        index: Position or key of the sample's index in the batch: the teacher's outputs are then kept in memory and
            computed once per sample and fit. The student's step gets the batch without the index.
        teacher_train_bn: Whether the teacher's batch norms use the statistics of the batch.
        teacher_autocast: Whether bf16-mixed and the like hold for the teacher too.
        example_inputs: For the shapes of regressors: what the network is called with; None: the student's
            `example_input_array`, or else one peeked batch.

    Raises:
        TypeError: The student is no LightningModule, or a teacher nothing that can teach.
        ValueError: A number out of range, an unknown loss or layer, a teacher that shares parameters with the student,
            a student that no wrapper can hold. In the fit: outputs that don't fit, a network that is not called, or
            called twice, a hint between different shapes without a regressor.

    Paper:
        Hinton, Vinyals, Dean, Distilling the knowledge in a neural network (1503.02531), section 2; Ba and Caruana
        (1312.6184); Romero et al., FitNets (1412.6550); Zagoruyko and Komodakis, attention transfer (1612.03928).

    Example:
        >>> from lightning_compress.baselines import Classifier, DigitsConvNet
        >>> student, teacher = Classifier(DigitsConvNet(width=8)), Classifier(DigitsConvNet(width=24))
        >>> module = DistillationModule(student, teacher, temperature=4.0, alpha=0.9)
        >>> isinstance(module, Classifier), list(module.state_dict()) == list(student.state_dict())
        (True, True)
    """

    __slots__ = ()
    only_trains = True  # what it makes is the student: to read a file, no teacher is wanted

    @_refuse_cache
    def __init__(
        self,
        student: LightningModule,
        teacher: Teacher | Sequence[Teacher],
        *,
        temperature: float | Mapping[str, Any] = 4.0,
        alpha: float | Mapping[str, Any] = 0.9,
        loss: Loss = "soft_target",
        hints: Sequence[Mapping[str, Any]] = (),
        network: str = "",
        output: str | int | None = None,
        teacher_network: str | None = None,
        teacher_weights: Sequence[float] | None = None,
        class_dim: int | None = None,
        mask: str | None = None,
        index: str | int | None = None,
        teacher_train_bn: bool = False,
        teacher_autocast: bool = False,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        check_wrappable(student, type(self))
        roots = find_teachers(list(teacher) if isinstance(teacher, list | tuple) else [teacher], student)
        teachers = Teachers(
            [network_of(root, network, teacher_network) for root in roots],
            roots=roots,
            student=student,
            train_bn=teacher_train_bn,
            autocast=teacher_autocast,
        )
        objective = Distillation(
            teachers,
            temperature=temperature,
            alpha=alpha,
            loss=loss,
            hints=hints,
            network=network,
            output=output,
            teacher_weights=teacher_weights,
            class_dim=class_dim,
            mask=mask,
            index=index,
            example_inputs=example_inputs,
        )
        super().__init__(student, objective)
