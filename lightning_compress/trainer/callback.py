"""Base class of the callbacks that change weights: it calls the projection around every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.projection import Projection
from lightning_compress.core.tensors import Kept
from lightning_compress.trainer.averages import averaged_modules, copies_inside
from lightning_compress.trainer.targeting import TargetingCallback
from lightning_compress.trainer.unwrap import LOGGED, innermost, raw_optimizer


class CompressionCallback(TargetingCallback):
    """A callback that changes weights; this class decides when, and subclasses how.

    A subclass supplies `project_copy` and the methods that `TargetingCallback` wants; its `prepare` sets
    `self.projection`.

    Args:
        settings: The constructor arguments, of which the `state_key` is made.
    """

    compares_values: ClassVar[bool] = (
        True  # whether to compare values at every batch, which finds writes through `.data`
    )

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.projection: Projection | None = None
        self._copies: list[torch.nn.Module] = []  # averages that the module holds itself
        self._handles: list[RemovableHandle] = []
        self._announced: torch.optim.Optimizer | None = (
            None  # the optimizer of on_before_optimizer_step, until it has stepped
        )
        self._stepping: torch.optim.Optimizer | None = None
        self._depth = 0  # how many of its calls of `step` are under way
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()  # optimizers that were stepped by `step`
        self._said_writes = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_known"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_known": WeakSet()})

    # ------------------------------------------------------------------ what a technique supplies

    def project_copy(self, module: torch.nn.Module) -> None:
        """Project an averaged copy of the LightningModule, or of a part of it, in place."""
        raise NotImplementedError(f"{type(self).__name__} must supply project_copy().")

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        """Slice all state of tensors from which another callback has cut channels.

        `kept` has the positions that stayed, by tensor and dimension.
        """

    @property
    def latent(self) -> dict[str, Tensor]:
        """The latent values that train instead of the parameters' own, by name; empty where there are none."""
        return {}

    def logged_name(self, trainer: Trainer, name: str) -> str:
        """Return the name under which this callback logs a number.

        Where earlier callbacks of the Trainer are of its class, or log a number of that name, it adds "_2" and so on.
        """
        others = techniques(trainer)
        before = others[: others.index(self)]
        same = [isinstance(one, type(self)) or isinstance(self, type(one)) for one in before]
        number = 1 + sum(a or name in one.progress().numbers for a, one in zip(same, before, strict=True))
        return f"{LOGGED}{name}_{number}" if number > 1 else f"{LOGGED}{name}"

    def zero_latent(self, masks: Mapping[str, Tensor]) -> None:
        """Zero the latent values of weights that another callback has just pruned, where its masks are False."""

    # ------------------------------------------------------------------ the projection, around every optimizer step

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unhook()
        # Hooks on all optimizers: one may be exchanged during the fit, or be used inside another.
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        self._copies = list(copies_inside(innermost(pl_module))) if self.follows_averages else []
        super().before_first_step(trainer, pl_module)
        self._project_averages(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._copies = []
        self._unhook()

    def _unhook(self) -> None:
        self._announced = self._stepping = None
        while self._handles:
            self._handles.pop().remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._announced = self._stepping = None  # a failed step may have left them set
        if self.projection is not None:
            self.projection.refresh(by_value=self.compares_values)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._announced = raw_optimizer(optimizer)
        self._begin_step(self._announced)
        self._known.add(self._announced)
        if self.projection is not None:
            self.projection.open(optimizer)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self.acts_on(optimizer):
            return None
        if self._stepping is None:
            self._begin_step(optimizer)
        self._depth += self._stepping is optimizer
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": self._projected_again(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._projected_again(optimizer, args[1]), *args[2:]), kwargs
        return None

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._stepping is not optimizer:
            self._stepping, self._depth = optimizer, 0

    def _projected_again(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Project before every further evaluation of the loss, where an optimizer needs several within its step."""
        evaluated = False

        def evaluate() -> Any:
            nonlocal evaluated
            if evaluated and self.projection is not None:
                self.projection.interrupt(optimizer)
            evaluated = True
            return closure()

        return evaluate

    def after_optimizer_step(self) -> None:
        """Act after an optimizer step, before the parameters are projected again."""

    def after_projection(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after an optimizer step, when the parameters are projected again."""

    def acts_on(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this technique acts around the steps of an optimizer."""
        return self.projection is not None and bool(self.projection.share(optimizer))

    def check_announced(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise a RuntimeError if a step without `on_before_optimizer_step` makes this technique wrong."""

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        announced = self._announced is optimizer
        if not announced and not self.acts_on(optimizer):
            return
        self._depth -= self._stepping is optimizer
        if self._depth > 0 or self._stepping not in (None, optimizer):
            return  # a step inside another one, as where `step` calls that of its superclass
        self._stepping = None
        if announced:
            self._announced = None
        else:
            self.check_announced(optimizer)
        self.after_optimizer_step()
        if self.projection is not None:
            self.projection.close(optimizer)
        self.after_projection(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.projection is not None:
            self.projection.settle()
            self._check_steps(trainer, self.projection)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._project_averages(trainer)

    def _check_steps(self, trainer: Trainer, projection: Projection) -> None:
        """Raise a RuntimeError for an optimizer that has changed weights without a call of `step`."""
        if trainer.lightning_module.automatic_optimization or not projection.keep_latent:
            return
        for optimizer in trainer.optimizers:
            if optimizer not in self._known and (names := projection.differing(projection.share(optimizer))):
                raise RuntimeError(
                    f"{names[0]} has changed in a batch in which its optimizer, {type(optimizer).__name__}, has not "
                    f"stepped: {self.name} keeps the real weights outside of the module, and only `step` trains them. "
                    f"Use `self.optimizers()` and its `step`, with a closure where the loss is evaluated several times."
                )

    # ------------------------------------------------------------------ what other code writes between steps

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.projection is not None and self._validates(trainer):
            self.projection.refresh(by_value=True)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.projection is not None and self._validates(trainer):
            self.projection.suspended = any(True for _ in averaged_modules(trainer))  # the average is in the module now

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.projection is not None:
            self.projection.suspended = False

    def _validates(self, trainer: Trainer) -> bool:
        """Whether this is a validation inside a fit, after its sanity check."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_what_trains_now(trainer, pl_module)
        self._project_averages(trainer)
        self._say_writes()
        for place, (name, number) in enumerate(self.progress().numbers.items()):
            pl_module.log(self.logged_name(trainer, name), number(), prog_bar=place == 0, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.projection is not None:
            self.projection.refresh(by_value=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.projection is not None:
            self.projection.follow_device()
            self.projection.refresh(by_value=True)
            self._say_writes()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        began = bool(self._handles)  # otherwise the projection is that of an earlier fit, perhaps with other shapes
        self._unhook()
        if self.projection is not None and began:
            self.projection.settle()  # so that a checkpoint that is saved now holds projected values
            self.projection.refresh(by_value=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        projection = self.projection if self._loaded is None else None
        if projection is None or trainer.state.status == TrainerStatus.FINISHED or not self._validates(trainer):
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        inside = not projection.settled or self._stepping is not None
        if not inside:
            projection.refresh(by_value=True)  # the checkpoint's state dict holds the module's own tensors
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if inside:
            put_values(checkpoint, pl_module, projection.projected())

    def _say_writes(self) -> None:
        """Report, once, that other code has written weights."""
        names = sorted(self.projection.rewritten) if self.projection is not None else []
        if names and not self._said_writes:
            self._said_writes = True
            rank_zero_info(
                f"{self.name}: other code has written {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''} between optimizer steps. These values have "
                f"replaced the real weights there, which are lost."
            )

    def _project_averages(self, trainer: Trainer) -> None:
        for module in (*averaged_modules(trainer), *self._copies):
            self.project_copy(module)


def techniques(trainer: Trainer) -> list[CompressionCallback]:
    """Return the fit's callbacks that change weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [one for one in callbacks if isinstance(one, CompressionCallback)]


def latent_values(found: Iterable[CompressionCallback]) -> dict[str, Tensor]:
    """Return the latent values that techniques train instead of the parameters' own, by name."""
    return {name: value for one in found for name, value in one.latent.items()}


def take_writes(trainer: Trainer) -> None:
    """Make every technique of a fit store the values that other code has written as its latent values."""
    for one in techniques(trainer):
        if one.projection is not None:
            one.projection.take_writes()


def put_values(checkpoint: dict[str, Any], pl_module: LightningModule, values: Mapping[str, Tensor]) -> None:
    """Write values of parameters into a checkpoint's state dict, under all names of each parameter."""
    first_name = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    for name, parameter in pl_module.named_parameters(remove_duplicate=False):
        if first_name[id(parameter)] in values:
            checkpoint["state_dict"][name] = values[first_name[id(parameter)]]
