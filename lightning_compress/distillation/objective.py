"""What a distilled module is trained to: its own loss, its teachers' outputs, and their layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.inputs import ExampleInputs, call, to_device
from lightning_compress.distillation.cache import OutputCache
from lightning_compress.distillation.hinting import Hint, features, watching
from lightning_compress.distillation.losses import cosine_loss, logit_regression_loss, soft_target_loss
from lightning_compress.distillation.teachers import Teachers
from lightning_compress.trainer.capture import captured, select_output
from lightning_compress.trainer.inputs import given_or_peeked, resolve_network
from lightning_compress.trainer.inside import innermost
from lightning_compress.trainer.scheduled import Scheduled
from lightning_compress.trainer.wrapper import Objective

Loss = Literal["soft_target", "logit_regression", "cosine"]


class Distillation(Objective):
    """The objective of `DistillationModule`, whose arguments these are.

    Raises:
        ValueError: A number out of range, an unknown loss, hints or a cache with what they can't go with.
    """

    def __init__(
        self,
        teachers: Teachers,
        *,
        temperature: Scheduled,
        alpha: Scheduled,
        loss: Loss,
        hints: Sequence[Hint],
        network: str,
        output: str | int | None,
        weights: Sequence[float] | None,
        class_dim: int | None,
        mask: str | None,
        cache: str | int | None,
        example_inputs: ExampleInputs | None,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(**settings)
        for one in (alpha.start, alpha.end):
            if not 0.0 <= one <= 1.0:
                raise ValueError(f"alpha is the share of the teacher, 0 to 1; got {one!r}.")
        for one in (temperature.start, temperature.end):
            if not 0.0 < one < float("inf"):
                raise ValueError(f"temperature is a number above 0; got {one!r}.")
        if loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}; got {loss!r}.")
        if weights is not None and len(weights) != len(teachers.networks):
            raise ValueError(f"teacher_weights has {len(weights)} numbers for {len(teachers.networks)} teachers.")
        if hints and len(teachers.networks) > 1:
            raise ValueError("Hints come from one teacher: wrap the student once for each, one wrapper in the other.")
        if cache is not None and (hints or teachers.train_bn):
            what = "hints" if hints else "teacher_train_bn=True"
            raise ValueError(f"cache= keeps outputs only, which {what} can't do with: leave one of them out.")
        self.teachers = teachers
        self.temperature = temperature
        self.alpha = alpha
        self.loss = loss
        self.hints = list(hints)
        self.network = network
        self.output = output
        self.weights = weights
        self.class_dim = class_dim
        self.mask = mask
        self.index = cache
        self.cache = None if cache is None else OutputCache()
        self.example_inputs = example_inputs
        self._step = 0

    # ------------------------------------------------------------------ the fit

    def configure(self, module: LightningModule) -> None:
        wanted = {str(i): hint for i, hint in enumerate(self.hints) if hint.regressor}
        if wanted.keys() <= self.extra.keys():
            return
        network = resolve_network(module, self.network)
        device = next((one.device for one in network.parameters()), torch.device("cpu"))
        self.teachers.to(device)
        inputs = to_device(given_or_peeked(module.trainer, module, network, self.example_inputs), device)
        with (
            evaluating(innermost(module)),
            features(innermost(module), [hint.student for hint in self.hints], self.hints, "student") as mine,
            self.teachers_features() as theirs,
        ):
            call(network, inputs)
            call(lambda *args, **kwargs: self.teachers(args, kwargs), inputs)
        with torch.random.fork_rng([]):  # the student's random draws stay what they are without regressors
            for key, hint in wanted.items():
                if hint not in mine or hint not in theirs:
                    who = "student" if hint not in mine else "teacher"
                    raise ValueError(f"{hint}: the layer of the {who} does not run in the forward pass of its network.")
                self.extra[key] = hint.make_regressor(mine[hint], theirs[hint]).to(device)

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        self.teachers.to(module.device)
        for name, number in (("alpha", self.alpha), ("temperature", self.temperature)):
            number.plan(trainer, None if state is None else state[name])
        if state is not None:
            self.extra.load_state_dict(state["regressors"])

    def at_step(self, step: int) -> None:
        self._step = step

    def state(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha.state(),
            "temperature": self.temperature.state(),
            "regressors": dict(self.extra.state_dict()),
        }

    # ------------------------------------------------------------------ a step

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = None
        if self.index is not None:
            batch, index = without_index(args[0], self.index)
            args = (batch, *args[1:])
        alpha, temperature = self.alpha.at(self._step), self.temperature.at(self._step)
        self._log(module, alpha=alpha, temperature=temperature)
        if alpha == 0.0 and not self.hints:
            return run(*args, **kwargs)
        lesson = _Lesson(self, alpha, temperature, index)
        with (
            watching(
                innermost(module), [hint.student for hint in self.hints], self.hints, "student", lesson.compare_layer
            ),
            captured(module, self.network, lesson.begin, lesson.compare_output) as was_called,
        ):
            output = run(*args, **kwargs)
        own = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(own, Tensor):  # a step that is skipped; Lightning tells of anything else
            return output
        was_called()
        self._log(module, distillation_loss=lesson.output_loss, hint_loss=lesson.hint_loss)
        total = lesson.added_to(own)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def ask(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor | None) -> list[Tensor]:
        """Return the teachers' outputs, from the cache where they are there."""
        if self.cache is None or index is None:
            return [self._picked(found) for found in self.teachers(args, kwargs)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = self.cache.lookup(index, inputs)
        if known is None:
            known = torch.stack([self._picked(found) for found in self.teachers(args, kwargs)], dim=1)
            self.cache.store(index, inputs, known)
        return list(known.to(inputs[0].device).unbind(1))

    def _picked(self, found: Any) -> Tensor:
        return found if isinstance(found, Tensor) else select_output(found, self.output, "The teacher")

    def teachers_features(self) -> AbstractContextManager[dict[Hint, Tensor]]:
        """Collect what the hints want of the teacher, while it runs."""
        return features(self.teachers.roots[0], [hint.teacher for hint in self.hints], self.hints, "teacher")

    def compare(self, student: Tensor, teachers: list[Tensor], temperature: float, mask: Tensor | None) -> Tensor:
        """Return the loss between the outputs of a batch."""
        options: dict[str, Any] = {"weights": self.weights, "class_dim": self.class_dim, "mask": mask}
        if self.loss == "soft_target":
            return soft_target_loss(student, teachers, temperature=temperature, **options)
        function = logit_regression_loss if self.loss == "logit_regression" else cosine_loss
        return function(student, teachers, **options)

    def _log(self, module: LightningModule, **values: Tensor | float | None) -> None:
        trainer = module._trainer
        if trainer is None:
            return
        # Only the steps that Lightning writes: logging every one adds a fifth to an epoch of a small network.
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
        if not interval or (module.global_step + 1) % interval:
            return
        for name, value in values.items():
            if isinstance(value, Tensor):
                module.log(name, value.detach(), prog_bar=True)
            elif value is not None and not (self.alpha if name == "alpha" else self.temperature).constant:
                module.log(name, value)


class _Lesson:
    """One step: what the teachers say about its batch, and how far the student is from it."""

    def __init__(self, objective: Distillation, alpha: float, temperature: float, index: Tensor | None) -> None:
        self.objective = objective
        self.alpha = alpha
        self.temperature = temperature
        self.index = index
        self.said: list[Tensor] = []
        self.shown: dict[Hint, Tensor] = {}
        self.mask: Tensor | None = None
        self.output_loss: Tensor | None = None
        self.hint_losses: dict[Hint, Tensor] = {}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ask the teachers, before the student's network can change what it was given."""
        objective = self.objective
        if objective.mask is not None:
            self.mask = kwargs.get(objective.mask)
            if self.mask is None:
                raise ValueError(
                    f"mask={objective.mask!r} is no keyword argument that the network was called with, which are: "
                    f"{', '.join(kwargs) or 'none'}."
                )
        if not objective.hints:
            self.said = objective.ask(args, kwargs, self.index)
            return
        with objective.teachers_features() as self.shown:
            self.said = objective.ask(args, kwargs, None)

    def compare_layer(self, hint: Hint, mine: Tensor) -> None:
        """Compare the output of a layer, at the moment when it is there."""
        if hint not in self.shown:
            raise ValueError(
                f"{hint}: one of them is no layer of its network, which network={self.objective.network!r} names, or "
                f"did not run in its forward pass."
            )
        regressors = dict(self.objective.extra.items())
        mapping = regressors.get(str(self.objective.hints.index(hint)))
        self.hint_losses[hint] = hint.between(mine, self.shown[hint], mapping)

    def compare_output(self, output: Any) -> None:
        """Compare what the network returned, before the caller can change it."""
        missing = [hint for hint in self.objective.hints if hint not in self.hint_losses]
        if missing:
            raise ValueError(f"{missing[0]}: the student's layer did not run in its network's forward pass.")
        if self.alpha > 0.0:
            student = select_output(output, self.objective.output, "The student's network")
            self.output_loss = self.objective.compare(student, self.said, self.temperature, self.mask)

    @property
    def hint_loss(self) -> Tensor | None:
        """The sum over the hints."""
        return torch.stack(list(self.hint_losses.values())).sum() if self.hint_losses else None

    def added_to(self, own: Tensor) -> Tensor:
        """Return the loss to train with, from the student's own."""
        hints, total = self.hint_loss, own
        if self.output_loss is not None:
            total = (1.0 - self.alpha) * own + self.alpha * self.output_loss
        return total if hints is None else total + hints


def without_index(batch: Any, where: str | int) -> tuple[Any, Tensor]:
    """Return a batch without the samples' indices, and these.

    Raises:
        ValueError: There are none at that place.

    Example:
        >>> without_index([torch.zeros(2, 3), torch.tensor([1, 0]), torch.tensor([7, 8])], -1)[1]
        tensor([7, 8])
    """
    rest: Any
    try:
        if isinstance(batch, Mapping):
            rest, index = {key: value for key, value in batch.items() if key != where}, batch[where]
        else:
            rest = list(batch)
            index = rest.pop(where)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"cache={where!r} is where a training batch has the indices of its samples, but this one, a "
            f"{type(batch).__name__}, has nothing there: let the dataset give them, as "
            f"lightning_compress.distillation.Indexed(dataset) does."
        ) from error
    if not isinstance(index, Tensor) or index.dim() != 1 or index.is_floating_point():
        raise ValueError(f"cache={where!r} is no tensor of sample indices in the training batch, but {index!r}.")
    return (rest if isinstance(batch, Mapping | list) else type(batch)(rest)), index
