from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from support.ranks import RankPair
from support.small import quiet_trainer

from lightning_compress import IterativePruningCallback
from lightning_compress.baselines import Classifier, Digits, DigitsConvNet
from lightning_compress.report import Report
from lightning_compress.tasks.run import Run
from lightning_compress.trainer.effects import Progress


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
            job.run(modules, callbacks=[], wrap=wrap, dense={})
    return found


def test_the_wrappers_of_every_rank_find_all_dense_networks(rank_pair: RankPair, tmp_path: Path) -> None:
    found = rank_pair.run("tasks.test_run:what_a_wrapper_finds", tmp_path, folder=str(tmp_path / "run"))
    assert found == [["dense-1.ckpt", "dense.ckpt"]] * 2


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"repeats": None}, {"batch_size": -1}])
def test_a_measurement_that_cannot_be_made_is_refused_before_the_training(tmp_path: Path, wrong: Any) -> None:
    job = Run(datamodule=Digits(), make_trainer=quiet_trainer, folder=tmp_path / "run", **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        job.run([Classifier(DigitsConvNet(width=2))], callbacks=[], dense={})
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
        job.run([Diverged(DigitsConvNet(width=2))], callbacks=[], dense={})
    report = Report.load(tmp_path / "report.json")
    assert report.dense.test_metric is report.compressed.test_metric is None
    assert report.history[0].val_metric is not None


class Unclear(IterativePruningCallback):
    def progress(self) -> Progress:
        return replace(super().progress(), numbers={"fine": lambda: 0.5, "unclear": lambda: math.nan})


def test_a_techniques_number_that_is_none_is_said_and_left_out(tmp_path: Path) -> None:
    make_trainer = partial(quiet_trainer, max_epochs=1, limit_train_batches=1)
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, metric=None, repeats=1, batch_size=2)
    with pytest.warns(UserWarning, match="unclear is nan"):
        job.run([Classifier(DigitsConvNet(width=2))], callbacks=[Unclear(0.5)], dense={})
    assert Report.load(tmp_path / "report.json").history[-1].numbers == {"fine": 0.5}


def test_a_dense_network_is_compressed_and_measured_as_often_as_one_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search trains and tests the dense network once, and what it does next leaves that as it was."""
    tested: list[LightningModule] = []
    test = Trainer.test

    def spy(self: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        tested.append(module)
        return test(self, module, *args, **kwargs)

    monkeypatch.setattr(Trainer, "test", spy)
    make_trainer = partial(quiet_trainer, max_epochs=2, limit_train_batches=4, limit_test_batches=1)
    job = Run(datamodule=Digits(), make_trainer=make_trainer, folder=tmp_path, repeats=1, batch_size=2)
    torch.manual_seed(0)
    dense = job.make_dense([Classifier(DigitsConvNet(width=2))], training={"max_epochs": 1})
    before = {name: value.clone() for name, value in dense.modules[0].state_dict().items()}
    tested.clear()
    bytes_ = []
    for amount in (0.5, 0.9):
        callback = IterativePruningCallback(amount, end_epoch=1.0, every_n_steps=2)
        compressed = job.compress(dense, callbacks=[callback])
        costs = job.measure(dense, compressed, tmp_path / f"{amount}.lcz")
        bytes_.append(costs.compressed.file_bytes)
        assert costs.compressed.file_bytes == (tmp_path / f"{amount}.lcz").stat().st_size
        assert [epoch.phase for epoch in compressed.history] == ["dense", "recovery", "recovery"]
    assert bytes_[1] < bytes_[0]
    assert all(one is not dense.modules[0] for one in tested)
    for name, value in dense.modules[0].state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
