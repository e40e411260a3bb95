"""The objective of distillation: the student's own loss, its teachers' outputs, and their layers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.core.aligned import named_mask
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.given import flag, real_number, whole_number
from lightning_compress.core.losses import cosine_loss, logit_regression_loss, soft_target_loss
from lightning_compress.core.outputs import select_output
from lightning_compress.distillation.cache import OutputCache, checksums, without_index
from lightning_compress.distillation.hint_hooks import Hint, features, watching
from lightning_compress.distillation.hint_losses import left_out
from lightning_compress.distillation.teachers import Teachers
from lightning_compress.trainer.capture import captured
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import inputs_on_device, resolve_network
from lightning_compress.trainer.replaying import loss_of, with_loss
from lightning_compress.trainer.scheduled import Scheduled
from lightning_compress.trainer.steps import is_written
from lightning_compress.trainer.unwrap import innermost
from lightning_compress.trainer.wrapper import Objective

Loss = Literal["soft_target", "logit_regression", "cosine"]


class Distillation(Objective):
    """The objective of `DistillationModule`, whose arguments these are.

    Raises:
        ValueError: A number out of range, an unknown loss, hints or a cache with what they can't go with.
    """

    def __init__(self, teachers: Teachers, *, example_inputs: ExampleInputs | None, **settings: Any) -> None:
        flag(teachers.train_bn, "teacher_train_bn")
        flag(teachers.autocast, "teacher_autocast")
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in settings.items()}
        super().__init__(
            # Checkpoints of runs that called the index `cache` can go on.
            **{"cache" if name == "index" else name: value for name, value in plain.items()},
            teacher_train_bn=teachers.train_bn,
            teacher_autocast=teachers.autocast,
            teachers=len(teachers.networks),
        )
        self.teachers = teachers
        self.example_inputs = example_inputs
        self.temperature = Scheduled.of(settings["temperature"], "temperature")
        self.alpha = Scheduled.of(settings["alpha"], "alpha")
        self.loss: Loss = settings["loss"]
        hints = {str(number): Hint.of(hint) for number, hint in enumerate(settings["hints"])}
        self.hints = {key: hint for key, hint in hints.items() if hint.weight > 0.0}
        self.network: str = settings["network"]
        self.output: str | int | None = settings["output"]
        self.weights: Sequence[float] | None = settings["teacher_weights"]
        self.class_dim: int | None = settings["class_dim"]
        if self.class_dim is not None:
            whole_number(self.class_dim, "class_dim is a dimension, a whole number, or None")
        self.mask: str | None = settings["mask"]
        self.index: str | int | None = settings["index"]
        self.cache = OutputCache()
        self._cached: int | None = None  # the version of the teachers whose outputs are in the cache
        self._step = 0
        self.said: set[str] = set()
        self._check()

    def _check(self) -> None:
        for one in (self.alpha.start, self.alpha.end):
            real_number(one, "alpha is the share of the teacher, 0 to 1", least=0, most=1)
        for one in (self.temperature.start, self.temperature.end):
            real_number(one, "temperature is a number above 0", above=0)
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss must be one of {', '.join(get_args(Loss))}; got {self.loss!r}.")
        several = len(self.teachers.networks)
        if self.weights is not None and len(self.weights) != several:
            raise ValueError(f"teacher_weights has {len(self.weights)} numbers for {several} teachers.")
        for weight in self.weights or ():
            real_number(weight, "teacher_weights are numbers, 0 or more", least=0)
        if self.hints and several > 1:
            raise ValueError("Hints come from one teacher: wrap the student once for each, one wrapper in the other.")
        if self.index is not None and (self.hints or self.teachers.train_bn):
            what = "hints" if self.hints else "teacher_train_bn=True"
            raise ValueError(f"index= keeps outputs only, which {what} can't do with: leave one of them out.")

    # ------------------------------------------------------------------ the fit

    def configure(self, module: LightningModule) -> None:
        wanted = {key: hint for key, hint in self.hints.items() if hint.regressor}
        if wanted.keys() <= self.auxiliary.keys():
            return
        network = resolve_network(module, self.network)
        device = next((one.device for one in network.parameters()), torch.device("cpu"))
        self.teachers.to(device, module)
        inputs = inputs_on_device(module, network, self.example_inputs)
        with (
            evaluating(innermost(module)),
            features(innermost(module), self.hints, "student") as mine,
            features(self.teachers.roots[0], self.hints, "teacher") as theirs,
        ):
            try:
                call(network, inputs)
                call(lambda *args, **kwargs: self.teachers(args, kwargs), inputs)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"The shapes of regressors could not be found, as the networks of student and teacher don't run on "
                    f"the example inputs ({error}): pass example_inputs= with what the network is called with."
                ) from error
        with torch.random.fork_rng([]):  # the student's random draws stay what they are without regressors
            for key, hint in wanted.items():
                if key not in mine or key not in theirs:
                    who = "student" if key not in mine else "teacher"
                    raise ValueError(f"{hint}: the layer of the {who} does not run in the forward pass of its network.")
                self.auxiliary[key] = hint.make_regressor(mine[key], theirs[key]).to(device)

    @property
    def _learns(self) -> bool:
        """Whether the student ever learns from the teacher's outputs."""
        return max(self.alpha.start, self.alpha.end) > 0.0

    def effects(self, trainer: Trainer | None, module: LightningModule) -> Effects:
        return replace(
            super().effects(trainer, module),
            looks_at=frozenset({"layers", "output"} if self.hints else {"output"} if self._learns else ()),
            options=({"looks_at": "hints=..."} if self.hints else {}) | {"modules": "hints=..., with a regressor"},
        )

    def progress(self) -> Progress:
        scheduled = {"alpha": self.alpha, "temperature": self.temperature}
        share = min(number.progress(self._step) for number in scheduled.values())
        acts = bool(self.hints) or not (self.alpha.constant and self.alpha.start == 0.0)
        numbers = {name: partial(number.at, self._step) for name, number in scheduled.items() if not number.constant}
        return Progress(fraction=share if acts else 0.0, finished=share == 1.0, numbers=numbers)

    def prepare(self, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None) -> None:
        self.teachers.to(module.device, module)
        self.cache, self._cached = OutputCache(), None  # the teachers or the data may be others in a second fit
        for name, number in (("alpha", self.alpha), ("temperature", self.temperature)):
            number.plan(trainer, None if state is None else state[name])
        if state is not None:
            self.auxiliary.load_state_dict(state["regressors"])

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        self.alpha.follow_epochs(moment)
        self.temperature.follow_epochs(moment)

    def at_step(self, step: int) -> None:
        self._step = step

    def state(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha.state(),
            "temperature": self.temperature.state(),
            "regressors": dict(self.auxiliary.state_dict()),
        }

    # ------------------------------------------------------------------ a step

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        index = None
        if self.index is not None:
            batch, index = without_index(args[0], self.index)
            args = (batch, *args[1:])
        alpha, temperature = self.alpha.at(self._step), self.temperature.at(self._step)
        logs = is_written(module)
        if logs:
            for place, (name, number) in enumerate(self.progress().numbers.items()):
                module.log(self.logged_name(name), number(), prog_bar=place == 0)
        if alpha == 0.0 and not self.hints:
            return run(*args, **kwargs)
        lesson = _Lesson(self, alpha, temperature, index)
        with (
            watching(innermost(module), self.hints, "student", lesson.compare_layer),
            captured(module, self.network, lesson.begin, lesson.compare_output) as was_called,
        ):
            output = run(*args, **kwargs)
        own = loss_of(output)
        if own is None:  # a step that is skipped; Lightning refuses anything else
            return output
        was_called()
        if own.requires_grad:
            lesson.check_gradients()
        if logs:
            for name, value in lesson.losses().items():
                module.log(self.logged_name(name), value.detach(), prog_bar=True)
        return with_loss(output, lesson.added_to(own))

    def ask(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor | None) -> list[Tensor]:
        """Return the teachers' outputs, from the cache where they are there."""
        if index is None:
            return [select_output(found, self.output, "The teacher") for found in self.teachers(args, kwargs)]
        version = self.teachers.version()
        if self._cached is not None and self._cached != version:
            raise ValueError(
                f"The teacher has changed since its outputs were kept, which index={self.index!r} goes on with: leave "
                f"index= out for a teacher that moves, as an average of the student does."
            )
        self._cached = version
        leaves = tree_leaves((args, kwargs))
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        keys = checksums([leaf for leaf in leaves if isinstance(leaf, Tensor)], len(index))
        keys += zlib.crc32(repr(others).encode())
        try:
            known = self.cache.lookup(index, keys)
            if known is None:
                known = torch.stack(self.ask(args, kwargs, None), dim=1)
                self.cache.store(index, keys, known)
        except ValueError as error:
            raise ValueError(
                f"{error} Or the batch has something else than its samples' indices at index={self.index!r}: "
                f"lightning_compress.distillation.cache.Indexed(dataset) adds them."
            ) from error
        return list(known.unbind(1))

    def say_once(self, message: str) -> None:
        """Print a message for the user, once."""
        if message not in self.said:
            self.said.add(message)
            rank_zero_info(message)

    def compare(self, student: Tensor, teachers: list[Tensor], temperature: float, mask: Tensor | None) -> Tensor:
        """Return the loss between the outputs of a batch."""
        options: dict[str, Any] = {"weights": self.weights, "class_dim": self.class_dim, "mask": mask}
        if self.loss == "soft_target":
            return soft_target_loss(student, teachers, temperature=temperature, **options)
        function = logit_regression_loss if self.loss == "logit_regression" else cosine_loss
        return function(student, teachers, **options)


class _Lesson:
    """One training step: the teachers' outputs for its batch, and the distance of the student's from them."""

    def __init__(self, objective: Distillation, alpha: float, temperature: float, index: Tensor | None) -> None:
        self.objective = objective
        self.alpha = alpha
        self.temperature = temperature
        self.index = index
        self.mask: Tensor | None = None
        self.teachers_outputs: list[Tensor] = []
        self.teachers_features: dict[str, Tensor] = {}
        self.output_loss: Tensor | None = None
        self.hint_losses: dict[str, Tensor] = {}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teachers, before the student's network can change its inputs."""
        objective = self.objective
        if objective.mask is not None:
            self.mask = named_mask(kwargs, objective.mask)
            if self.mask is not None and not objective.said:
                objective.say_once(
                    f"mask={objective.mask!r}: outputs count where it is 1 or True, at {int(self.mask.sum())} of "
                    f"{self.mask.numel()} positions of the first batch."
                )
        with features(objective.teachers.roots[0], objective.hints, "teacher") as self.teachers_features:
            if self.alpha > 0.0:
                self.teachers_outputs = objective.ask(args, kwargs, self.index)
            else:  # outputs that nothing is compared with may be anything
                objective.teachers(args, kwargs)

    def compare_layer(self, key: str, mine: Tensor) -> None:
        """Compare the output of a layer as soon as the layer has returned it."""
        hint = self.objective.hints[key]
        if key not in self.teachers_features:
            raise ValueError(
                f"{hint}: one of them is no layer of its network, which network={self.objective.network!r} names, or "
                f"did not run in its forward pass."
            )
        if self.mask is not None and left_out(self.mask, mine.shape, hint.channel_dim) is None:
            self.objective.say_once(
                f"{hint}: mask={self.objective.mask!r} of shape {tuple(self.mask.shape)} is none of the positions of "
                f"its features of shape {tuple(mine.shape)}, which all count."
            )
        auxiliary = self.objective.auxiliary
        regressor = auxiliary[key] if key in auxiliary else None  # noqa: SIM401 - a ModuleDict has no get
        self.hint_losses[key] = hint.between(mine, self.teachers_features[key], regressor, self.mask)

    def compare_output(self, output: Any) -> None:
        """Compare the output of the network, before the caller can change it."""
        missing = [hint for key, hint in self.objective.hints.items() if key not in self.hint_losses]
        if missing:
            raise ValueError(f"{missing[0]}: the student's layer did not run in its network's forward pass.")
        if self.alpha > 0.0:
            student = select_output(output, self.objective.output, "The student's network")
            self.output_loss = self.objective.compare(student, self.teachers_outputs, self.temperature, self.mask)

    def check_gradients(self) -> None:
        """Refuse outputs of a network that ran without gradients, from which the student could not learn."""
        compared = [] if self.output_loss is None else [("The output of the network", self.output_loss)]
        compared += [(str(self.objective.hints[key]), loss) for key, loss in self.hint_losses.items()]
        for what, loss in compared:
            if not loss.requires_grad:
                raise ValueError(
                    f"{what}: it has no gradient, and would teach the student nothing. It ran under torch.no_grad(), "
                    f"in a reentrant checkpoint, or all before it is frozen."
                )

    def losses(self) -> dict[str, Tensor]:
        """The loss of the outputs, and the sum over the hints."""
        found = {} if self.output_loss is None else {"distillation_loss": self.output_loss}
        hints = {"hint_loss": torch.stack(list(self.hint_losses.values())).sum()} if self.hint_losses else {}
        return found | hints

    def added_to(self, own: Tensor) -> Tensor:
        """Return the loss to train with, from the student's own."""
        losses, total = self.losses(), own
        if self.output_loss is not None:
            taught = self.alpha * self.output_loss
            total = (1.0 - self.alpha) * own + taught if self.alpha < 1.0 else taught  # which may be NaN without labels
        return total + losses["hint_loss"] if self.hint_losses else total
