"""Metrics of training that are logged over an epoch, and what monitors them, after a resume in or at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.ranks import RankPair
from support.small import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.aggregation import MaxMetric
from torchmetrics.classification import BinaryAUROC, BinaryPrecision, BinaryRecall
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running
from trainer.test_epoch_end import BATCHES, Positioned, Recorded, X

from lightning_compress import IterativePruningCallback


class Logs(Recorded):
    """Logs in every way; the last batch of an epoch is smaller in weight."""

    def __init__(self, monitor: str = "loss") -> None:
        super().__init__("step")
        self.monitor, self.shown = monitor, False
        self.metrics = MetricCollection({"a": MeanMetric(), "b": MaxMetric()})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        logged = loss * (1 + self.global_rank)
        self.log("loss", logged, on_epoch=True, on_step=False, batch_size=batch_idx + 1, sync_dist=True)
        self.log("both", loss, on_epoch=True, on_step=True, batch_size=4, prog_bar=self.shown)
        for reduction in ("sum", "min", "max"):
            self.log(reduction, loss.double(), on_epoch=True, on_step=False, reduce_fx=reduction, batch_size=4)
        if batch_idx == 0:
            self.log("first", loss, on_epoch=True, on_step=False, batch_size=4)
        self.metrics.update(loss.detach())
        self.log_dict(self.metrics, on_epoch=True, on_step=False)  # type: ignore[arg-type]
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.log("rate", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": self.monitor}}


class AtEnds(Callback):
    """Notes what monitors see at every end of an epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen[-1] = {key: value.item() for key, value in trainer.callback_metrics.items()}

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen[trainer.current_epoch] = {key: value.item() for key, value in trainer.callback_metrics.items()}


def fit(
    folder: Path, resume: Path | None, *, module: Logs | None = None, callbacks: Sequence[Callback] = (), **options: Any
) -> tuple[Logs, AtEnds]:
    torch.manual_seed(0)
    module, ends = module or Logs(), AtEnds()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    pruning = IterativePruningCallback(0.5, end_epoch=2.0, every_n_steps=4)
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": 3, "enable_checkpointing": True} | options
    trainer = quiet_trainer(callbacks=[pruning, ends, *callbacks, saves], **settings)
    loader, validation = Positioned(), DataLoader(X, 8)  # type: ignore[arg-type]
    trainer.fit(module, loader, validation, ckpt_path=resume, weights_only=True)  # type: ignore[arg-type]
    return module, ends


MONITORS = ("loss", "both", "both_epoch", "sum", "a", "quality", "rate", "first")


@pytest.mark.parametrize("monitor", MONITORS)
def test_what_monitors_see_at_the_end_of_a_resumed_epoch_is_exact(monitor: str, tmp_path: Path) -> None:
    def monitors(folder: Path) -> list[Callback]:
        return [
            EarlyStopping(monitor, patience=9, check_on_train_epoch_end=True),
            ModelCheckpoint(folder, "best", monitor=monitor, save_on_train_epoch_end=True),
        ]

    module, ends = fit(tmp_path, None, module=Logs(monitor), callbacks=monitors(tmp_path / "best"))
    for step in (2, BATCHES, BATCHES + 1, 2 * BATCHES, 3 * BATCHES):
        folder = tmp_path / str(step)
        resumed = fit(folder, tmp_path / f"step={step}.ckpt", module=Logs(monitor), callbacks=monitors(folder))
        assert resumed[1].seen == {key: ends.seen[key] for key in resumed[1].seen}
        assert len(resumed[1].seen) == 4 - (step - 1) // BATCHES
        assert all(torch.equal(value, resumed[0].state_dict()[key]) for key, value in module.state_dict().items())
        rates = [one.trainer.optimizers[0].param_groups[0]["lr"] for one in (module, resumed[0])]
        assert rates[0] == rates[1] < 0.1


def test_monitors_that_look_after_a_validation_see_the_epoch_before(tmp_path: Path) -> None:
    class AtValidations(AtEnds):
        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            self.on_train_epoch_end(trainer)

    whole = AtValidations()
    fit(tmp_path, None, callbacks=[whole])
    for step in (BATCHES + 2, 2 * BATCHES):
        resumed = AtValidations()
        fit(tmp_path / str(step), tmp_path / f"step={step}.ckpt", callbacks=[resumed])
        assert resumed.seen == {key: whole.seen[key] for key in (1, 2, -1)}


def test_a_metric_may_be_logged_in_another_way_after_the_resume(tmp_path: Path) -> None:
    _, ends = fit(tmp_path, None)
    module = Logs()
    module.shown = True
    assert fit(tmp_path / "resumed", tmp_path / "step=8.ckpt", module=module)[1].seen[1] == ends.seen[1]


class Outside(Logs):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [MeanMetric()]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.hidden[0].update(loss.detach())
        self.log("hidden", self.hidden[0], on_epoch=True, on_step=False, metric_attribute="hidden")
        return loss


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    fit(tmp_path, None, module=Outside())
    with pytest.warns(UserWarning, match="training metrics hidden are not in the checkpoint"):
        fit(tmp_path / "resumed", tmp_path / "step=8.ckpt", module=Outside())


class Gathers(Logs):
    """As Lightning's guide says: what steps return is gathered for the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append({"loss": loss.detach()})
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("gathered", torch.stack([one["loss"] for one in self.outputs]).mean())
        self.outputs.clear()


class Keeps(Gathers):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["outputs"] = self.outputs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.outputs = checkpoint["outputs"]


def test_an_epoch_does_not_end_without_what_its_module_has_gathered(tmp_path: Path) -> None:
    _, ends = fit(tmp_path, None, module=Keeps())
    path = tmp_path / f"step={BATCHES}.ckpt"
    assert fit(tmp_path / "kept", path, module=Keeps())[1].seen == ends.seen
    with pytest.warns(UserWarning, match="does not hold outputs"):
        _, resumed = fit(tmp_path / "lost", path, module=Gathers())
    assert resumed.seen.keys() == {1, 2, -1}


class Counts(Logs):
    """Sums by hand: in metrics that it updates and does not log, and in numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = MetricCollection(
            {"precision": BinaryPrecision(), "recall": BinaryRecall(), "auroc": BinaryAUROC()}
        )
        self.kept, self.extremes, self.last = CatMetric(), MinMaxMetric(MeanMetric()), Running(MeanMetric(), 3)
        self.late, self.never_reset = MeanMetric(), MeanMetric()
        self.total, self.count = 0.0, 0
        self.sum = torch.zeros(())

    def on_train_epoch_start(self) -> None:
        self.batches = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        value = loss.detach()
        self.rates.update(torch.sigmoid(batch[:, 1] + value), (batch[:, 0] > 0).long())
        if batch_idx > 0:
            self.log("late", self.late, on_epoch=True, on_step=False)
        for metric in (self.kept, self.extremes, self.last, self.never_reset, self.late):
            metric.update(value)
        self.total, self.count, self.batches = self.total + value.item(), self.count + 1, self.batches + 1
        self.sum = self.sum + value
        return loss

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.rates.compute() | self.extremes.compute())
        self.log("kept", self.kept.compute().sum())
        self.log("last", self.last.compute())
        self.log("never_reset", self.never_reset.compute())
        self.log("mean", self.total / self.count)
        self.log("sum_by_batches", self.sum / self.batches)
        self.rates.reset()
        self.kept.reset()
        self.total, self.count, self.sum = 0.0, 0, torch.zeros(())


def test_what_a_module_counts_itself_goes_on(tmp_path: Path) -> None:
    _, ends = fit(tmp_path, None, module=Counts())
    for step in (2, BATCHES, BATCHES + 1, BATCHES + 3, 2 * BATCHES):
        resumed = fit(tmp_path / str(step), tmp_path / f"step={step}.ckpt", module=Counts())[1]
        assert resumed.seen == {key: ends.seen[key] for key in resumed.seen}
        assert len(resumed.seen) == 4 - (step - 1) // BATCHES


class Evaluates(Logs):
    """One metric for the validation alone, logged, and one that is reset by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.logged, self.by_hand = MeanMetric(), MeanMetric()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.logged.update(batch.mean())
        self.by_hand.update(batch.mean())
        self.log("logged", self.logged)

    def on_validation_epoch_end(self) -> None:
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()


def test_metrics_of_validations_count_no_batch_twice(tmp_path: Path) -> None:
    _, ends = fit(tmp_path, None, module=Evaluates())
    for step in (2, BATCHES, BATCHES + 1, 2 * BATCHES):
        resumed = fit(tmp_path / str(step), tmp_path / f"step={step}.ckpt", module=Evaluates())[1]
        assert resumed.seen == {key: ends.seen[key] for key in resumed.seen}


class Tracks(Logs):
    def __init__(self) -> None:
        super().__init__()
        self.tracker = MetricTracker(MeanMetric(), maximize=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 0:
            self.tracker.increment()
        self.tracker.update(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("tracked", self.tracker.compute())


def test_an_epoch_does_not_end_without_what_its_tracker_has_seen(tmp_path: Path) -> None:
    fit(tmp_path, None, module=Tracks())
    with pytest.warns(UserWarning, match="does not hold tracker"):
        _, resumed = fit(tmp_path / "resumed", tmp_path / f"step={BATCHES}.ckpt", module=Tracks())
    assert resumed.seen.keys() == {1, 2, -1}


def on_ranks(folder: str, resume: str | None) -> dict[int, dict[str, float]]:
    monitor = EarlyStopping("loss", patience=9, check_on_train_epoch_end=True)
    path = None if resume is None else Path(resume)
    return fit(Path(folder), path, callbacks=[monitor], strategy="ddp", devices=2)[1].seen


def test_every_rank_goes_on_with_its_own_sums(rank_pair: RankPair, tmp_path: Path) -> None:
    def run(folder: str, resume: str | None = None) -> list[dict[int, dict[str, float]]]:
        path = None if resume is None else str(tmp_path / "whole" / resume)
        return rank_pair.run("trainer.test_means:on_ranks", tmp_path, folder=str(tmp_path / folder), resume=path)

    whole = run("whole")
    assert whole[0][0]["loss"] == whole[1][0]["loss"]
    for step in (8, 2 * BATCHES):
        for left, right in zip(whole, run("resumed", f"step={step}.ckpt"), strict=True):
            assert right == {key: left[key] for key in (1, 2, -1)}
    monitor = EarlyStopping("loss", patience=9, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match=r"of 2 process\(es\), and 1 train now"):
        fit(tmp_path / "one", tmp_path / "whole" / f"step={2 * BATCHES}.ckpt", callbacks=[monitor])
