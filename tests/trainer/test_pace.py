"""A resume with other devices, batches or accumulation: what is planned follows the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from support.ranks import RankPair
from support.small import BATCH, SmallModule, dataset, quiet_trainer
from torch.utils.data import DataLoader

from lightning_compress import DistillationModule, IterativePruningCallback, WeightClusteringCallback
from lightning_compress.trainer.resume import ResumableCallback


class ByEpoch(Callback):
    """What stands at every epoch's end."""

    def __init__(self) -> None:
        self.amounts: dict[int, float] = {}
        self.clustered: dict[int, bool] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for one in trainer.callbacks:
            if isinstance(one, IterativePruningCallback):
                self.amounts[trainer.current_epoch] = one.current_amount
            if isinstance(one, WeightClusteringCallback):
                self.clustered[trainer.current_epoch] = one.projection is not None


def fit(
    folder: Path | None,
    callback: ResumableCallback,
    *,
    batch: int = BATCH,
    resume: Path | None = None,
    every_n_train_steps: int | None = None,
    **options: Any,
) -> ByEpoch:
    seed_everything(1, verbose=False)
    seen = ByEpoch()
    callbacks: list[Callback] = [callback, seen]
    if folder is not None:
        often = every_n_train_steps
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=often, save_top_k=-1))
        options["enable_checkpointing"] = True
    trainer = quiet_trainer(callbacks=callbacks, **({"max_epochs": 6} | options))
    loader = DataLoader(dataset(), batch_size=batch, shuffle=True)
    trainer.fit(SmallModule(), loader, ckpt_path=resume, weights_only=True)
    return seen


OTHERS: dict[str, dict[str, Any]] = {
    "half the batch": {"batch": BATCH // 2},
    "twice the batch": {"batch": 2 * BATCH},
    "three times the batch": {"batch": 3 * BATCH},
    "accumulation": {"accumulate_grad_batches": 3},
}


@pytest.mark.parametrize("end_epoch", [4.0, None])
@pytest.mark.parametrize("other", ["half the batch", "three times the batch", "accumulation"])
def test_a_ramp_reaches_in_every_epoch_what_it_would_have(other: str, end_epoch: float | None, tmp_path: Path) -> None:
    def callback() -> IterativePruningCallback:
        return IterativePruningCallback(0.8, schedule="linear", start_epoch=1.0, end_epoch=end_epoch)

    whole = fit(None, callback(), **OTHERS[other])
    fit(tmp_path, callback())
    resumed = callback()
    rest = fit(None, resumed, resume=tmp_path / "step=24.ckpt", **OTHERS[other])
    assert rest.amounts == pytest.approx({epoch: whole.amounts[epoch] for epoch in range(2, 6)}, abs=1e-6)
    assert rest.amounts[3] == pytest.approx(0.8)
    assert resumed.finished


@pytest.mark.parametrize("other", ["half the batch", "twice the batch"])
def test_from_the_middle_of_an_epoch_the_ramp_ends_with_its_epoch(other: str, tmp_path: Path) -> None:
    def callback() -> IterativePruningCallback:
        return IterativePruningCallback(0.8, schedule="linear", start_epoch=1.0, end_epoch=6.0)

    fit(tmp_path, callback(), max_epochs=2, every_n_train_steps=3)
    resumed = callback()
    rest = fit(None, resumed, resume=tmp_path / "step=15.ckpt", **OTHERS[other])
    assert rest.amounts[5] == pytest.approx(0.8)
    assert 0.4 < rest.amounts[4] < 0.8
    assert resumed.finished


def test_two_changes_of_pace(tmp_path: Path) -> None:
    def callback() -> IterativePruningCallback:
        return IterativePruningCallback(0.8, schedule="linear", start_epoch=1.0, end_epoch=5.0)

    fit(tmp_path / "a", callback(), max_epochs=2)
    fit(tmp_path / "b", callback(), max_epochs=3, batch=BATCH // 2, resume=tmp_path / "a" / "step=24.ckpt")
    rest = fit(None, callback(), batch=2 * BATCH, resume=tmp_path / "b" / "step=48.ckpt")
    assert rest.amounts == pytest.approx({3: 0.6, 4: 0.8, 5: 0.8}, abs=1e-6)


def test_a_fit_that_is_limited_in_steps_is_cut_in_time(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 60, "max_epochs": -1}
    fit(tmp_path, IterativePruningCallback(0.8), max_epochs=2)
    resumed = IterativePruningCallback(0.8)
    fit(None, resumed, batch=BATCH // 2, resume=tmp_path / "step=24.ckpt", **options)
    assert resumed.finished
    assert resumed.current_amount == 0.8


def test_a_start_keeps_its_epoch(tmp_path: Path) -> None:
    def callback() -> WeightClusteringCallback:
        return WeightClusteringCallback(4, start_epoch=4.0)

    fit(tmp_path, callback(), max_epochs=2)
    rest = fit(None, callback(), resume=tmp_path / "step=24.ckpt", batch=2 * BATCH)
    assert rest.clustered == {2: False, 3: True, 4: True, 5: True}


def test_a_temperature_keeps_its_epochs(tmp_path: Path) -> None:
    def module() -> LightningModule:
        temperature = {"start": 8.0, "end": 2.0, "schedule": "linear", "start_epoch": 1.0, "end_epoch": 5.0}
        return DistillationModule(SmallModule(), SmallModule(), temperature=temperature)

    saved = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    quiet_trainer(max_epochs=2, enable_checkpointing=True, callbacks=[saved]).fit(
        module(), DataLoader(dataset(), batch_size=BATCH)
    )
    resumed = module()
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(resumed, DataLoader(dataset(), batch_size=BATCH // 2), ckpt_path=tmp_path / "step=24.ckpt")
    objective = next(one for one in trainer.callbacks if isinstance(one, ResumableCallback)).objective
    assert trainer.global_step == 24 + 2 * 24
    assert objective.temperature.at(trainer.global_step) == pytest.approx(3.5)  # at epoch 4 of 1 to 5


def test_a_second_fit_with_other_batches_goes_on_in_epochs() -> None:
    callback = IterativePruningCallback(0.8, schedule="linear", end_epoch=4.0)
    module = SmallModule()
    with pytest.warns(UserWarning, match="The fit ended at step 24, before the pruning ramp did"):
        quiet_trainer(max_epochs=2, callbacks=[callback]).fit(module, DataLoader(dataset(), batch_size=BATCH))
    seen = ByEpoch()
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback, seen])
    trainer.fit(module, DataLoader(dataset(), batch_size=BATCH // 2))
    assert seen.amounts == pytest.approx({0: 0.6, 1: 0.8, 2: 0.8})


def fit_on_ranks(folder: str) -> int:
    callback = IterativePruningCallback(0.8, schedule="linear", end_epoch=4.0)
    fit(Path(folder), callback, batch=BATCH // 2, max_epochs=2, strategy="ddp", devices=2)
    return callback._steps


def test_one_process_goes_on_where_two_ranks_stopped(rank_pair: RankPair, tmp_path: Path) -> None:
    """The ranks' epochs have 12 steps of 8 samples in all; one process alone takes 24 with batches of 4."""
    rank_pair.run("trainer.test_pace:fit_on_ranks", tmp_path, folder=str(tmp_path / "ranks"))
    callback = IterativePruningCallback(0.8, schedule="linear", end_epoch=4.0)
    rest = fit(None, callback, batch=BATCH // 2, resume=tmp_path / "ranks" / "step=24.ckpt")
    assert rest.amounts == pytest.approx({2: 0.6, 3: 0.8, 4: 0.8, 5: 0.8})
