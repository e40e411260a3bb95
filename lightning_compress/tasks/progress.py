"""The progress bars of a run: Lightning's bar for the epoch, and one for the whole run."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class RunProgress(TQDMProgressBar):
    """Lightning's bar with short names, and below it a bar that counts the epochs of the whole run.

    Args:
        before: Number of epochs that the run has trained before this fit.
        total: Number of epochs of the whole run.
    """

    def __init__(self, before: int, total: int) -> None:
        super().__init__()
        self.before = before
        self.total = total
        self._whole: Tqdm | None = None

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics that the bar shows, without the logger's version number.

        A name is shortened to its part after the last "/" where no other metric has the same last part.
        """
        metrics = super().get_metrics(trainer, pl_module)
        short = {name: name.rpartition("/")[2] for name in metrics if name != "v_num"}
        often = Counter(short.values())
        return {name if often[end] > 1 else end: metrics[name] for name, end in short.items()}

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        trainer: Trainer = args[0]
        if not self.is_disabled:
            self._whole = Tqdm(
                desc="Whole run",
                initial=self.before + trainer.current_epoch,
                total=self.total,
                unit="epoch",
                position=2 * self.process_position + 1,
                leave=False,
                dynamic_ncols=True,
                file=self.train_progress_bar.fp,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._whole is not None:
            self._whole.update(self.before + trainer.current_epoch + 1 - self._whole.n)

    def on_train_end(self, *args: Any) -> None:
        super().on_train_end(*args)
        self._close()

    def on_exception(self, *args: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._whole is not None:
            self._whole.close()
            self._whole = None
