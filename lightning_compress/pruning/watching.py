"""The half of a pruning callback that feeds its criterion: a statistic, from the hooks of a training step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_compress.pruning.scoring import DIFFERENTIATING, STATIC, Criterion, Granularity
from lightning_compress.pruning.statistics import Statistic
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.distributed import all_reduce_sum, rank
from lightning_compress.trainer.inputs import is_compiled


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

    def _check_watching(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what a data-driven criterion could not watch."""
        if self.criterion in STATIC:
            return
        if trainer.precision == "16-mixed":
            raise ValueError(
                f"criterion={self.criterion!r} watches gradients, which are infinite whenever precision='16-mixed' "
                f"skips a step: use precision='bf16-mixed' or '32-true', or criterion='magnitude'."
            )
        strategy = trainer.strategy
        static = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph")
        if static and self.criterion in DIFFERENTIATING:
            raise ValueError(
                f"criterion={self.criterion!r} goes back from the loss once more in every step, which "
                f"DDPStrategy(static_graph=True) takes for the first step of the training, so that it never averages "
                f"the gradients: leave static_graph out, or use another criterion, such as 'taylor'."
            )
        gradients_only = self.criterion == "si" or (self.criterion == "taylor" and self.granularity == "weight")
        if not gradients_only and is_compiled(pl_module):
            raise ValueError(
                f"criterion={self.criterion!r} looks inside the forward pass, which torch.compile hides: fit the "
                f"module itself and compile it afterwards, or use 'magnitude', or 'taylor' or 'si' for weights."
            )

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
