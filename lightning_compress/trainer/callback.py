"""The callback that every projection technique extends: refusals, and the moment of the projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.slicing import Kept
from lightning_compress.core.swap import Projection
from lightning_compress.trainer.averages import averaged_modules, check_averages, copies_inside
from lightning_compress.trainer.inside import LOGGED, innermost
from lightning_compress.trainer.targeting import TargetingCallback


class CompressionCallback(TargetingCallback):
    """A technique that changes weights: subclasses say how, this class when.

    A subclass supplies, beside what a `TargetingCallback` wants, `project_copy`, and `prepare` puts its `Projection`
    into `self.projection`.

    Args:
        settings: The constructor arguments, which make up the `state_key`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.projection: Projection | None = None
        self._handles: dict[int, RemovableHandle] = {}  # by the id of the optimizer
        self._copies: list[torch.nn.Module] = []  # averages that the module holds itself

    # ------------------------------------------------------------------ what a technique supplies

    def project_copy(self, module: torch.nn.Module) -> None:
        """Project an averaged copy of the LightningModule, or of a part of it, in place."""
        raise NotImplementedError

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        """Slice whatever is held of the module's tensors: another callback has cut channels out of it.

        `kept` has, by tensor and dimension, the positions that stayed.
        """

    @property
    def latent(self) -> dict[str, Tensor]:
        """The real values that train behind parameters which hold others, by name; empty where there are none."""
        return {}

    @property
    def last_event(self) -> int | None:
        """The optimizer step after which it sets no more weights to zero; None where it sets none, or does not know."""
        return None

    def logged_name(self, trainer: Trainer, name: str) -> str:
        """Return under which name this callback logs a number: the second one of its class adds "_2"."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        others = [one for one in callbacks[: callbacks.index(self)] if isinstance(one, CompressionCallback)]
        number = 1 + sum(isinstance(one, type(self)) or isinstance(self, type(one)) for one in others)
        return f"{LOGGED}{name}_{number}" if number > 1 else f"{LOGGED}{name}"

    def leave_out(self, masks: Mapping[str, Tensor]) -> None:
        """Keep at zero, behind the module too, what another callback has just pruned: False in the masks, by name."""

    # ------------------------------------------------------------------ refusals

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_averages(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            self._check_optimizer(optimizer)

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        name, kind = type(self).__name__, type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{name} does not support LBFGS, which evaluates the loss several times within one step. Use SGD, Adam "
                f"or another first-order optimizer."
            )
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(
                f"{name} does not support {kind}: its train() and eval() exchange the weights where the projection "
                f"does not see it, as schedule-free optimizers do. Use SGD, Adam or another first-order optimizer."
            )
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise ValueError(
                f"{name} needs to act after every step of {kind}, which has no step hooks: its class does not call "
                f"torch.optim.Optimizer.__init__."
            )

    # ------------------------------------------------------------------ the projection, around every optimizer step

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self._hook(optimizer)
        self._copies = list(copies_inside(innermost(pl_module))) if self.follows_averages else []
        super().before_first_step(trainer, pl_module)
        self._project_averages(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._handles:
            self._handles.popitem()[1].remove()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._hook(optimizer)  # one that was exchanged during the fit
        if self.projection is not None:
            self.projection.open(optimizer)

    def _hook(self, optimizer: torch.optim.Optimizer) -> None:
        raw = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps them
        if id(raw) not in self._handles:
            self._handles[id(raw)] = raw.register_step_post_hook(self._after_step)

    def after_optimizer_step(self) -> None:
        """Act when an optimizer has stepped, before its parameters are projected again."""

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.after_optimizer_step()
        if self.projection is not None:
            self.projection.close(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.projection is not None:
            self.projection.settle()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._project_averages(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._say_what_trains_now(trainer, pl_module)
        self._project_averages(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.projection is not None:
            self.projection.settle()  # so that a checkpoint of this moment holds the projected values

    def _project_averages(self, trainer: Trainer) -> None:
        for module in (*averaged_modules(trainer), *self._copies):
            self.project_copy(module)
