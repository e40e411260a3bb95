from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from support.ranks import RankPair
from support.small import quiet_trainer

from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.report import Report
from lightning_compress.tasks.run import Run


def what_a_wrapper_finds(folder: str) -> list[str]:
    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        save(*args)

    def wrap(module: LightningModule) -> LightningModule:
        found.extend(sorted(path.name for path in Path(folder).glob("*.ckpt")))
        raise InterruptedError

    make_trainer = partial(quiet_trainer, strategy="ddp", devices=2, max_epochs=1, limit_train_batches=1)
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=Path(folder), metric=None)
    modules = [Classifier(DigitsConvNet(width=2)) for _ in range(2)]
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        save = torch.save
        patch.setattr(torch, "save", slowly)
        with pytest.raises(InterruptedError):
            job.compress(modules, callbacks=[], wrap=wrap, dense={})
    return found


def test_the_wrappers_of_every_rank_find_all_dense_networks(rank_pair: RankPair, tmp_path: Path) -> None:
    found = rank_pair.run("tasks.test_run:what_a_wrapper_finds", tmp_path, folder=str(tmp_path / "run"))
    assert found == [["dense-1.ckpt", "dense.ckpt"]] * 2


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"repeats": None}, {"batch_size": -1}])
def test_a_measurement_that_cannot_be_made_is_refused_before_the_training(tmp_path: Path, wrong: Any) -> None:
    job = Run(datamodule=Digits(), make_trainer=quiet_trainer, folder=tmp_path / "run", **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        job.compress([Classifier(DigitsConvNet(width=2))], callbacks=[], dense={})
    assert not (tmp_path / "run").exists()


class Diverged(Classifier):
    def test_step(self, *args: Any) -> None:
        self.log("test_loss", math.nan)


def test_a_metric_that_is_no_number_is_said_and_the_report_is_written(tmp_path: Path) -> None:
    make_trainer = partial(quiet_trainer, max_epochs=1, limit_train_batches=1)
    job = Run(
        datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, metric="test_loss", repeats=1, batch_size=2
    )
    with pytest.warns(UserWarning, match="test_loss is nan"):
        job.compress([Diverged(DigitsConvNet(width=2))], callbacks=[], dense={})
    report = Report.load(tmp_path / "report.json")
    assert report.dense.test_metric is report.compressed.test_metric is None
    assert report.history[0].val_metric is not None
