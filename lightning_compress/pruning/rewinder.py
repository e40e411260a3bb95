"""Keep the network, the learning rates and the optimizers of one step of a fit, and go back to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_compress.core.distributed import broadcast
from lightning_compress.core.tensors import Kept, sliced
from lightning_compress.trainer.unwrap import raw_optimizer

Rewind = Literal["learning_rate", "weights", "init"]
OptimizerState = Literal["clear", "keep", "rewind"]


def check_rewind(rewind: str | None, optimizer_state: str) -> None:
    """Raise a ValueError unless both are known."""
    if rewind is not None and rewind not in get_args(Rewind):
        raise ValueError(f"rewind must be {', '.join(map(repr, get_args(Rewind)))} or None; got {rewind!r}.")
    if optimizer_state not in get_args(OptimizerState):
        known = ", ".join(map(repr, get_args(OptimizerState)))
        raise ValueError(f"optimizer_state must be one of {known}; got {optimizer_state!r}.")


class Rewinder:
    """Keeps what later rounds go back to, and the schedule of the last step of a round, which may be held.

    Args:
        rewind: "learning_rate" goes back to the state of the schedulers and the hyperparameters of the optimizers;
            "weights" and "init" also to the module's parameters and buffers; None goes back to nothing.
        optimizer_state: What happens to the optimizers' state when weights go back: "clear" makes them begin anew.

    Attributes:
        kept: What has been kept, as plain data; None before `keep`.
        held: The schedule that `hold` has kept; None before.
        over: Whether the fit of the rounds is over, so that a later fit has a schedule of its own.
    """

    def __init__(self, rewind: Rewind | None, optimizer_state: OptimizerState) -> None:
        self.rewind = rewind
        self.optimizer_state = optimizer_state
        self.kept: dict[str, Any] | None = None
        self.held: dict[str, Any] | None = None
        self.over = False

    @property
    def takes_weights(self) -> bool:
        """Whether weights go back."""
        return self.rewind in ("weights", "init")

    @property
    def values(self) -> dict[str, Tensor]:
        """The parameters and buffers that were kept, by name; empty where weights stay."""
        return {} if self.kept is None else self.kept["values"]

    @torch.no_grad()
    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the present moment; of statistics that differ between ranks, those of rank 0."""
        values: dict[str, Tensor] = {}
        if self.takes_weights:
            values = {name: broadcast(one.clone().contiguous()) for name, one in _tensors(pl_module).items()}
        states = []
        if self.takes_weights and self.optimizer_state == "rewind":
            states = [copy.deepcopy(raw_optimizer(one).state_dict()["state"]) for one in trainer.optimizers]
        self.kept = {"values": values, "optimizers": states, "schedule": _schedule(trainer)}

    @torch.no_grad()
    def go_back(self, trainer: Trainer, pl_module: LightningModule, *, last: bool) -> None:
        """Go back to the moment that `keep` has kept; the `last` time, what was kept is dropped.

        Raises:
            ValueError: An optimizer has other groups of parameters than then.
        """
        assert self.kept is not None
        if self.rewind is not None:
            _restore_schedule(trainer, self.kept["schedule"])
        if self.takes_weights:
            self._restore_weights(trainer, pl_module)
        if last:
            self.kept = None

    def _restore_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.kept is not None
        for name, tensor in _tensors(pl_module).items():
            if name in self.values:
                tensor.copy_(self.values[name])
        for place, optimizer in enumerate(map(raw_optimizer, trainer.optimizers)):
            if self.optimizer_state == "clear":
                optimizer.state.clear()
            elif self.optimizer_state == "rewind":
                state = copy.deepcopy(self.kept["optimizers"][place])
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def hold(self, trainer: Trainer) -> None:
        """Keep the schedule of the present moment, or go back to the one that was kept before."""
        if self.held is None:
            self.held = _schedule(trainer)
        elif trainer.lr_scheduler_configs:
            _restore_schedule(trainer, self.held)

    def follow(self, kept: Kept) -> None:
        """Slice the weights that were kept after a cut; `kept` has the positions that stayed."""
        if self.kept is not None:
            self.kept["values"] = sliced(self.values, kept)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resume needs."""
        return {"kept": self.kept, "held": self.held, "over": self.over}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.kept, self.held, self.over = state["kept"], state["held"], state["over"]


def warn_of_frequencies(trainer: Trainer, distance: int, per_epoch: int | None) -> None:
    """Warn of schedulers that will step at other moments of the later rounds than of round 0.

    Lightning counts a scheduler's `frequency` in epochs of the fit, or in batches of the epoch, which don't go back.

    Args:
        trainer: The Trainer, with its schedulers.
        distance: How many steps the network goes back.
        per_epoch: The number of steps of an epoch; None: it is not known.
    """
    if not per_epoch or not trainer.lightning_module.automatic_optimization:
        return
    epochs, steps = divmod(distance, per_epoch)
    for config in trainer.lr_scheduler_configs:
        rest = steps or epochs % config.frequency if config.interval == "epoch" else steps % config.frequency
        if config.frequency > 1 and rest:
            warnings.warn(
                f"{type(config.scheduler).__name__} steps with frequency={config.frequency}, which counts each "
                f"{config.interval} of the fit, and a rewind goes back by {distance / per_epoch:g} epochs, so that it "
                f"steps at other moments of the later rounds than of round 0. Make it step at each {config.interval} "
                f"(frequency=1), or let round_epochs - rewind_to be a multiple of its frequency.",
                stacklevel=2,
            )


def _tensors(pl_module: LightningModule) -> dict[str, Tensor]:
    return {name: one.detach() for name, one in (*pl_module.named_parameters(), *pl_module.named_buffers())}


def _schedule(trainer: Trainer) -> dict[str, Any]:
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
        for one in map(raw_optimizer, trainer.optimizers)
    ]
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return copy.deepcopy({"groups": groups, "schedulers": schedulers})


def _restore_schedule(trainer: Trainer, kept: Mapping[str, Any]) -> None:
    optimizers = [raw_optimizer(one) for one in trainer.optimizers]
    for optimizer, groups in zip(optimizers, kept["groups"], strict=True):
        if len(optimizer.param_groups) != len(groups):
            raise ValueError(
                f"{type(optimizer).__name__} has {len(optimizer.param_groups)} groups of parameters, and had "
                f"{len(groups)} at rewind_to, so that its learning rates can't go back. Give it all groups from the "
                f"start, or set rewind_to to an epoch at which it has them all."
            )
    kept = copy.deepcopy(kept)
    for config, state in zip(trainer.lr_scheduler_configs, kept["schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    for optimizer, groups in zip(optimizers, kept["groups"], strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            for name, value in values.items():
                if isinstance(group.get(name), Tensor) and isinstance(value, Tensor):
                    group[name].copy_(value)  # such as the learning rate of a captured graph
                else:
                    group[name] = value
