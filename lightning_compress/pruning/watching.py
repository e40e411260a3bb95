"""The half of a pruning callback that feeds its criterion: a statistic, from the hooks of a training step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_compress.pruning.criteria.choose import DIFFERENTIATING, STATIC, Criterion, Granularity
from lightning_compress.pruning.criteria.statistic import Statistic
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.distributed import all_reduce_sum, rank
from lightning_compress.trainer.effects import Sight


class WatchingCallback(CompressionCallback):
    """A callback whose criterion watches the training between two events.

    A subclass sets the attributes, and says with `leads_to_an_event` which steps count.
    """

    criterion: Criterion
    granularity: Granularity
    _statistic: Statistic | None

    @property
    def needs_gradients(self) -> bool:
        return self.criterion not in STATIC

    def leads_to_an_event(self) -> bool:
        """Whether this step lies in an interval that ends in an event."""
        raise NotImplementedError

    def _sights(self) -> frozenset[Sight]:
        """What the criterion decides by."""
        if self.criterion in STATIC:
            return frozenset() if self.criterion == "random" else frozenset({"magnitudes"})
        found: set[Sight] = {"gradients"}
        if self.criterion == "si":
            found.add("magnitudes")
        elif not (self.criterion == "taylor" and self.granularity == "weight"):
            found.add("layers")
        if self.criterion in DIFFERENTIATING:
            found.add("second_backward")
        return frozenset(found)

    def synchronize(self) -> None:
        if self._statistic is not None:
            self._statistic.reduce(all_reduce_sum)
            self._leave_sums_to_rank_zero(self._statistic)

    @staticmethod
    def _leave_sums_to_rank_zero(statistic: Statistic) -> None:
        """A checkpoint holds the sums over all ranks; the first rank goes on from them and the others from nothing."""
        if statistic.rank_local and rank() > 0:
            statistic.reset()

    # ------------------------------------------------------------------ what the criterion watches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if (statistic := self._watching()) is not None:
            statistic.begin()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if (statistic := self._watching()) is not None:
            statistic.before_backward(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if (statistic := self._watching()) is not None:
            statistic.before_step(optimizer if len(trainer.optimizers) > 1 else None)

    def after_optimizer_step(self) -> None:
        if (statistic := self._watching()) is not None:
            statistic.after_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._statistic is not None:
            self._statistic.end()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._statistic is not None:
            self._statistic.end()

    def _watching(self) -> Statistic | None:
        """The statistic, where it has something to see in this step."""
        statistic = self._statistic
        if statistic is None or not (statistic.needs_training or self.leads_to_an_event()):
            return None
        return statistic
