"""Make up for the validation or the epoch's end that Lightning leaves out in a resume from inside an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage

from lightning_compress.trainer.peek import training_loaders

_END = object()


class EpochEnd:
    """Makes a resumed run do what the uninterrupted run did between a checkpoint and its next batch.

    After a checkpoint from an epoch's last batch, Lightning goes straight to the next epoch and does not count its
    start: neither the validation nor the hooks at the epoch's end run, and with the counters in checkpoints of the next
    epoch, batches train twice. Lightning also leaves out a validation that follows the checkpoint's batch in an epoch.

    Args:
        loops: The checkpoint's state of the fit's loops, which is changed so that Lightning ends the epoch.
        lacks: Names of what the epoch's end may need and the checkpoint does not hold: logged metrics, as in a
            checkpoint that Lightning alone has written, or lists that the module fills. If any is missing, the epoch's
            end does not take place, because hooks that use it may raise an error.
    """

    def __init__(self, loops: dict[str, Any], *, lacks: Sequence[str] = ()) -> None:
        self._loader_states = loops["state_dict"].get("combined_loader", [])
        batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
        total = batches["total"]
        after_batch = total["ready"] == total["processed"] == total["completed"] + 1
        self._last_batch = after_batch and batches["is_last_batch"]
        self._leaves_out_end = self._last_batch and bool(lacks)
        if self._leaves_out_end:
            self._last_batch = False
            warnings.warn(
                f"The checkpoint is from an epoch's last batch and does not hold {', '.join(lacks)}: neither the "
                f"epoch's validation nor its end takes place, as in Lightning alone. A module can save what it "
                f"gathers over an epoch in on_save_checkpoint, and restore it in on_load_checkpoint.",
                stacklevel=2,
            )
        if self._last_batch:
            for counter in (total, batches["current"]):
                counter["completed"] += 1
        if (
            epochs["total"]["started"] == epochs["total"]["processed"] and after_batch
        ):  # the epoch's start was not counted
            for counter in epochs.values():
                counter["ready"] += 1
                counter["started"] += 1

    def before_training(self, trainer: Trainer, *, metrics_known: bool) -> None:
        """Arrange the loops before the first batch, and before the random states of the checkpoint are restored.

        Args:
            trainer: The Trainer that resumes.
            metrics_known: Whether the metrics that the checkpoint's run had logged are restored.
        """
        fit_loop = trainer.fit_loop
        loop = fit_loop.epoch_loop
        if fit_loop.restarted_mid_epoch:
            self._check_accumulation(trainer)
            if metrics_known:
                fit_loop._restarting = False  # otherwise Lightning skips ReduceLROnPlateau at this epoch's end
        ends = fit_loop.restarted_on_epoch_end or fit_loop.resumed_on_epoch_end
        if ends:
            metrics_known = self._step_plateaus(trainer, "epoch", metrics_known)
        elif fit_loop.restarted_mid_epoch and (self._last_batch or loop.restarted_on_train_batch_end):
            metrics_known = self._step_plateaus(trainer, "step", metrics_known)
        plateaus = any(one.reduce_on_plateau for one in trainer.lr_scheduler_configs)
        if plateaus and not metrics_known and (ends or fit_loop.restarted_mid_epoch):
            warnings.warn(
                "Resumed with ReduceLROnPlateau and without the metrics of the checkpoint's epoch: it is not stepped "
                "for them, and learning rates may differ from the uninterrupted run's, as in Lightning alone.",
                stacklevel=2,
            )
        if not fit_loop.restarted_mid_epoch:
            self._begin_epoch(trainer)
        elif (self._last_batch or loop.restarted_on_train_batch_end) and not self._leaves_out_end:
            self._validate_and_end(trainer)
        if not fit_loop.restarted_mid_epoch or loop.batch_progress.is_last_batch:
            self._leave_loaders(trainer)

    def _step_plateaus(self, trainer: Trainer, interval: str, metrics_known: bool) -> bool:
        """Step ReduceLROnPlateau as the uninterrupted run did then; return whether all its metrics are known."""
        loop, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
        plateaus = [one for one in trainer.lr_scheduler_configs if one.reduce_on_plateau and one.interval == interval]
        if not (metrics_known and all(one.monitor in trainer.callback_metrics for one in plateaus)):
            return False
        assert trainer.fit_loop._data_fetcher is not None
        if interval == "step" and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return True  # the validation, which will run, steps it
        completed = progress.completed
        if interval == "epoch":
            progress.completed = progress.processed - 1  # type: ignore[attr-defined]  # as at that step
        loop.update_lr_schedulers(interval, update_plateau_schedulers=True)
        progress.completed = completed
        return True

    def _check_accumulation(self, trainer: Trainer) -> None:
        """Warn where the first steps after the resume accumulate other batches than the uninterrupted run."""
        batches, factor = trainer.fit_loop.epoch_loop.batch_progress, trainer.accumulate_grad_batches
        if batches.is_last_batch:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, GradientAccumulationScheduler):
                factor = callback.get_accumulate_grad_batches(trainer.current_epoch)
                if factor > 1:
                    warnings.warn(
                        f"Resumed inside an epoch with GradientAccumulationScheduler, which acts where an epoch "
                        f"begins: until the next one every batch is a step, and not every {factor} batches. The run "
                        f"is not exactly the uninterrupted one: resume from the end of an epoch.",
                        stacklevel=2,
                    )
        if batches.current.ready % factor:
            warnings.warn(
                f"Resumed between two of the {factor} batches that one optimizer step accumulates: Lightning saves "
                f"no gradients, so the first step lacks those of the batches before the checkpoint, and the run is "
                f"not exactly the uninterrupted one. Save checkpoints after whole steps (every_n_train_steps).",
                stacklevel=2,
            )

    def _begin_epoch(self, trainer: Trainer) -> None:
        """Make a run that is limited by max_steps begin an epoch: Lightning would end the finished one again."""
        fit_loop = trainer.fit_loop
        for counter in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
            counter.completed = counter.processed  # type: ignore[attr-defined]
        fit_loop.reset_restart_stage()
        fit_loop.epoch_loop.restarting = False
        fit_loop.epoch_loop.reset_restart_stage()

    def _validate_and_end(self, trainer: Trainer) -> None:
        """Make Lightning run the validation that is due, or end the epoch, before it trains."""
        fit_loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
        loop = fit_loop.epoch_loop
        assert fetcher is not None
        if loop._should_check_val_fx(fetcher):
            if not self._last_batch:
                loop.batch_progress.increment_completed()
                loop._restart_stage = RestartStage.RESTARTED_ON_LAST
            loop.val_loop.batch_progress.reset()
            loop.val_loop._restart_stage = ValidationStage.RESTARTED_MID_EVALUATION
        elif self._last_batch:  # without a batch left, the loop ends the epoch
            fetcher.reset()
            fetcher.iterator, fetcher.done = iter(()), True
            loop._batches_that_stepped += 1

    def _leave_loaders(self, trainer: Trainer) -> None:
        """Move stateful loaders to the position that those of the uninterrupted run had at the end of the epoch."""
        if not self._loader_states:
            return
        loaders = [loader for loader in training_loaders(trainer) if hasattr(loader, "load_state_dict")]
        if len(loaders) != len(self._loader_states):
            warnings.warn(
                f"The checkpoint holds states of {len(self._loader_states)} training loader(s), and this fit has "
                f"{len(loaders)} with a load_state_dict: the next epoch may have other batches than the uninterrupted "
                f"run. Resume with the loaders of the run that wrote the checkpoint.",
                stacklevel=2,
            )
            return
        for loader, state in zip(loaders, self._loader_states, strict=True):
            loader.load_state_dict(state)  # Lightning does not load it after an epoch's end
            if next(iter(loader), _END) is _END:
                continue  # the iterator was at the end of the finished epoch: the next one begins anew
            begins_anew = sized_len(loader) != trainer.num_training_batches and _begins_anew(loader)
            loader.load_state_dict(state)
            if begins_anew:
                next(iter(loader), _END)  # an iterator consumes the loaded position


def match_batches(trainer: Trainer) -> None:
    """Make a resumed run draw the same batches as the uninterrupted one, or warn where it can't."""
    fit_loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    lacks = ""
    if not fit_loop.restarted_mid_epoch:
        # The uninterrupted run would draw the seeds of the next epoch's shuffling now. Lightning has made the iterator
        # of the resumed run before the random state was restored.
        iter(fetcher)
    elif fit_loop.epoch_loop.batch_progress.is_last_batch:
        return
    elif not all(hasattr(loader, "load_state_dict") for loader in training_loaders(trainer)):
        lacks = "no state_dict/load_state_dict"
    elif fetcher.length is None:
        lacks = "no length, from which Lightning fetches a batch ahead that the loader's state counts as trained"
    if lacks:
        warnings.warn(
            f"Resumed in the middle of an epoch with a training loader that has {lacks}: the rest of this epoch "
            f"has other batches than the uninterrupted run. Weights, masks and random states are exact. Use a loader "
            f"that has it, or resume from the end of an epoch.",
            stacklevel=2,
        )


def _begins_anew(loader: Any) -> bool:
    """Whether a new iterator of a loader in the middle of its data begins at their start."""
    position = loader.state_dict()
    next(iter(loader), _END)
    left = repr(loader.state_dict())
    loader.load_state_dict(position)
    next(iter(loader), _END)
    return repr(loader.state_dict()) != left
