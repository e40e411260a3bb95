"""Objectives that run the user's own step as it is, and again for each exit or width with another output.

    loss = w_1 e_1 + ... + w_K e_K + w_full e_full        e_k = (1 - a) (the step's loss) + a T^2 KL(full || k)

What the step logs as "val_acc" is logged for replay k as "label_k/val_acc", and for the full network as it is and with
the full network's label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_compress.core.given import real_number
from lightning_compress.core.losses import soft_target_loss
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.loss_weights import LossWeights
from lightning_compress.trainer.one_step import OneStep, also_logged, backbone
from lightning_compress.trainer.replay import replaying
from lightning_compress.trainer.replica import Before, Replica, traces
from lightning_compress.trainer.unwrap import SLOT, innermost
from lightning_compress.trainer.wrapper import Objective


class ReplayingObjective(Objective):
    """An objective that replays the user's step: its subclass supplies `labels`, `full_label` and `one_step`.

    Args:
        settings: The wrapper's plain constructor arguments, with at least the five that are kept under their names:
            `network`, `output`, `weights` (as for `LossWeights`), `distill` (a, the share of the full network's outputs
            in the loss of a replay) and `temperature` (T).

    Attributes:
        serving: Makes the block in which an operating point answers in the place of the network in evaluation, if one
            does; steps are not replayed then.
        trains_full: Whether the loss of the real step is in the sum.
        runs_thinner: Whether replays run the network with fewer channels.
    """

    runs_thinner: ClassVar[bool] = False

    def __init__(self, **settings: Any) -> None:
        what = "distill is the share of the full network's outputs in the loss of a thinner or earlier one, 0 to 1"
        settings["distill"] = real_number(settings["distill"], what, least=0, most=1)
        settings["temperature"] = real_number(settings["temperature"], "temperature is a number above 0", above=0)
        super().__init__(**settings)
        self.network: str = settings["network"]
        self.output: str | int | None = settings["output"]
        self.weights = LossWeights(settings["weights"])
        self.distill: float = settings["distill"]
        self.temperature: float = settings["temperature"]
        self.serving: Callable[[], AbstractContextManager[None]] | None = None
        self.trains_full = True
        self._returned: dict[str, Any] = {}  # by replays of the last batch, with the folder in which they ran
        self._said: set[str] = set()
        self._step = 0

    def labels(self, module: LightningModule) -> Sequence[str]:
        """Return the folders of what the replays log; none where there is nothing to replay."""
        raise NotImplementedError(f"{type(self).__name__} must supply labels().")

    def every_label(self, module: LightningModule) -> Sequence[str]:
        """Return the labels of all replays that may come, where those of now are not all."""
        return self.labels(module)

    def full_label(self, module: LightningModule) -> str:
        """Return the second folder of what the full network logs."""
        raise NotImplementedError(f"{type(self).__name__} must supply full_label().")

    def one_step(self, module: LightningModule, *args: Any, **kwargs: Any) -> OneStep:
        """Return a step that begins; the arguments are those of `OneStep`."""
        raise NotImplementedError(f"{type(self).__name__} must supply one_step().")

    def begin(self, module: LightningModule) -> None:
        """Act before each step."""

    def after_step(self, one: OneStep) -> None:
        """Look at a real step of a training."""

    def as_trained(self, module: LightningModule) -> AbstractContextManager[None]:
        """Return the block in which the real step of a training runs."""
        return nullcontext()

    def sees(self, one: OneStep) -> bool:
        """Look at a real step of an evaluation; return whether that is all, so that nothing is replayed."""
        return False

    # ------------------------------------------------------------------ steps

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        self.weights.follow_epochs(moment)

    def at_step(self, step: int) -> None:
        self._step = step

    def step(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._replays(module):
            return run(*args, **kwargs)
        one = self._begin(module, (args, kwargs))
        with self.as_trained(module), one.real_step():
            result = run(*args, **kwargs)
        own = loss_of(result)
        if own is None:  # a step that is skipped; Lightning refuses anything else
            return result
        one.was_called()
        self.after_step(one)
        weights = self.weights.at(self._step) or [1.0] * (len(one.replicas) + 1)
        total = weights[-1] * own if self.trains_full else torch.zeros_like(own)
        for label, weight in zip(one.replicas, weights, strict=False):
            replayed = one.replayed(label, run)
            loss = loss_of(replayed)
            if loss is None:
                continue
            self._keep(module, label, replayed if isinstance(replayed, Mapping) else {"loss": loss}, "train")
            if self.distill > 0.0:
                logits = one.logits_of(label)
                taught = soft_target_loss(logits, one.logits.detach(), temperature=self.temperature, class_dim=-1)
                loss = (1.0 - self.distill) * loss + self.distill * taught
            total = total + weight * loss
        return with_loss(result, total)

    def evaluate(self, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._replays(module):
            return run(*args, **kwargs)
        if self.serving is not None:
            with self.serving():
                return run(*args, **kwargs)
        one = self._begin(module, (args, kwargs))
        with one.real_step():
            result = run(*args, **kwargs)
        if not one.called:
            self.say(
                f"The {module.trainer.state.stage} step of {type(innermost(module)).__name__} does not call the "
                f"network {self.network!r}: what it logs is of the full network alone."
            )
            return result
        if self.sees(one):
            return result
        for label in one.replicas:
            replayed = one.replayed(label, run)
            self._keep(module, label, replayed, "test" if module.trainer.testing else "validation")
        return result

    def at_hook(self, name: str, module: LightningModule, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._replays(module) or self.serving is not None:
            return run(*args, **kwargs)
        network = backbone(resolve_network(module, self.network))
        replicas = self._replicas_now(module)
        before = Before(module, network, replicas.values(), (args, kwargs))
        was = traces(module, before, replicas.values())
        with also_logged(module, self.full_label(module)):
            result = run(*args, **kwargs)
        if traces(module, before, replicas.values()) == was:
            return result  # it has nothing to do with what the steps have found
        before.after_real_step()
        for label, replica in replicas.items():
            again, by_name = before.batch()
            if name.endswith("batch_end") and again:  # what the step has returned comes first
                again = (self._returned.get(f"{_folder(module)}{label}", again[0]), *again[1:])
            with replaying(module, label, replica, before):
                run(*again, **by_name)
        return result

    def _replays(self, module: LightningModule) -> bool:
        """Whether there is something to replay, and no wrapper around with which a fit will be refused."""
        around = [one for one in self._around(module) if isinstance(one, ReplayingObjective)]
        levels: Any = getattr(module, SLOT).levels
        return (
            bool(self.labels(module))
            and all(one.runs_thinner and not self.runs_thinner for one in around)
            and not any(level.objective.refuses_replays for level in levels)
        )

    def _begin(self, module: LightningModule, batch: Any) -> OneStep:
        self.begin(module)
        replicas = self._replicas_now(module)
        for label in replicas:
            self._returned.pop(f"{_folder(module)}{label}", None)
        names = {"network": self.network, "output": self.output, "full_label": self.full_label(module)}
        return self.one_step(module, replicas, batch, **names)

    def _keep(self, module: LightningModule, label: str, returned: Any, stage: str) -> None:
        """Keep what a replay has returned for the hook at the batch's end, if the module has it."""
        hook = f"on_{stage}_batch_end"
        if getattr(type(innermost(module)), hook) is not getattr(LightningModule, hook):
            self._returned[f"{_folder(module)}{label}"] = tree_map_only(Tensor, Tensor.detach, returned)

    # ------------------------------------------------------------------ replicas

    def renew_replicas(self, module: LightningModule) -> None:
        """Forget what the replays of earlier fits have counted."""
        self.replicas = {name: Replica.of(module) for name in self._all_labels(module)}

    def _replicas_now(self, module: LightningModule) -> dict[str, Replica]:
        """Return the replica of each replay in the folder in which the step runs, by the replay's label."""
        for name in self._all_labels(module):  # all, before Lightning looks for metrics by their names
            if name not in self.replicas:
                self.replicas[name] = Replica.of(module)
        return {label: self.replicas[f"{_folder(module)}{label}"] for label in self.labels(module)}

    def _all_labels(self, module: LightningModule) -> list[str]:
        """Return the labels of all replays, also of those within the replays of a wrapper around."""
        around = [one for one in self._around(module) if isinstance(one, ReplayingObjective)]
        folders = ["", *(f"{label}/" for one in around for label in one.every_label(module))]
        return [f"{folder}{label}" for folder in folders for label in self.every_label(module)]

    def _around(self, module: LightningModule) -> list[Objective]:
        levels: Any = getattr(module, SLOT).levels
        return [level.objective for level in levels[self.depth + 1 :]]

    def values_of_replicas(self) -> dict[str, Any]:
        """Return the plain values that replays have of their own, for a checkpoint."""
        return {
            label: {name: one for name, one in replica.own().items() if isinstance(one, int | float | str | Tensor)}
            for label, replica in self.replicas.items()
        }

    def set_values_of_replicas(self, module: LightningModule, values: Mapping[str, Any]) -> None:
        """Take what `values_of_replicas` has returned."""
        for label, some in values.items():
            self.replicas.setdefault(label, Replica.of(module)).values |= some

    def say(self, message: str) -> None:
        """Warn of something once."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(message)


def loss_of(result: Any) -> Tensor | None:
    """Return the loss of what a step returns; None if there is none."""
    loss = result.get("loss") if isinstance(result, Mapping) else result
    return loss if isinstance(loss, Tensor) else None


def _folder(module: LightningModule) -> str:
    """Return the folder of the step or replay that runs."""
    inside: Any = getattr(module, SLOT)
    return str(inside.folders[0])


def with_loss(result: Any, loss: Tensor) -> Any:
    """Return what a `training_step` has returned, with another loss."""
    return {**result, "loss": loss} if isinstance(result, Mapping) else loss
