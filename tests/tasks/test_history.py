from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from support.compare import differences
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)
from lightning_compress.tasks.history import Recorder


class Diary(Callback):
    """Keeps the weights after every step, with the number of zeros in them."""

    def __init__(self) -> None:
        self.pages: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        zeros = sum(int((parameter == 0).sum()) for parameter in pl_module.parameters() if parameter.dim() > 1)
        self.pages.append((zeros, state))


def fit(*callbacks: Callback, **options: Any) -> SmallModule:
    seed_everything(0, verbose=False)
    module = SmallModule()
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, shuffled(), plain())
    return module


def test_the_snapshot_is_the_network_of_the_last_pruning() -> None:
    pruning, recorder, diary = (
        IterativePruningCallback(0.7, end_epoch=2.0, every_n_steps=5),
        Recorder("val_acc"),
        Diary(),
    )
    module = fit(pruning, recorder, diary)
    final = max(zeros for zeros, _ in diary.pages)
    first = next(state for zeros, state in diary.pages if zeros == final)
    assert recorder.snapshot is not None
    assert not differences(recorder.snapshot, first)
    assert differences(recorder.snapshot, dict(module.state_dict()))  # recovery has moved on


def test_pruning_at_once_is_seen_before_the_first_step() -> None:
    seed_everything(0, verbose=False)
    untrained = SmallModule().state_dict()
    recorder = Recorder("val_acc")
    fit(IterativePruningCallback(0.5, schedule="one_shot"), recorder)
    assert recorder.snapshot is not None
    kept = recorder.snapshot["net.hidden.weight"] != 0
    assert 0 < kept.float().mean() < 1
    assert torch.equal(recorder.snapshot["net.hidden.weight"][kept], untrained["net.hidden.weight"][kept])


def test_the_history_has_an_entry_per_epoch() -> None:
    recorder = Recorder("val_acc")
    fit(IterativePruningCallback(0.7, end_epoch=2.0), recorder)
    assert [epoch.phase for epoch in recorder.history] == ["compression", "recovery", "recovery", "recovery"]
    assert [epoch.epoch for epoch in recorder.history] == [0, 1, 2, 3]
    assert all(0 < epoch.val_metric <= 1 for epoch in recorder.history if epoch.val_metric is not None)
    assert recorder.history[0].numbers["sparsity"] < recorder.history[-1].numbers["sparsity"]
    nothing = Recorder("other_metric")
    fit(nothing)
    assert [(epoch.phase, epoch.val_metric, epoch.numbers) for epoch in nothing.history] == [("dense", None, {})] * 4


@pytest.mark.parametrize(
    ("make", "phases"),
    [
        (lambda: [IterativePruningCallback(0.0)], "dense dense dense dense"),
        (
            lambda: [IterativePruningCallback(0.5, start_epoch=1.0, end_epoch=3.0)],
            "dense compression recovery recovery",
        ),
        (lambda: [WeightClusteringCallback(4, start_epoch=1.5)], "dense recovery recovery recovery"),
        (lambda: [WeightClusteringCallback(0)], "dense dense dense dense"),
        (lambda: [BinaryWeightsCallback(start_epoch=2.5)], "dense dense recovery recovery"),
        (lambda: [QuantizationAwareTrainingCallback(4, start_epoch=0.5)], "recovery recovery recovery recovery"),
        (lambda: [GroupLassoCallback(0.01)], "compression compression compression compression"),
        (lambda: [GroupLassoCallback(0.0)], "dense dense dense dense"),
        (
            lambda: [IterativePruningCallback(0.5, end_epoch=1.5), WeightClusteringCallback(4, start_epoch=2.5)],
            "compression compression recovery recovery",
        ),
        (
            lambda: [IterativePruningCallback(0.5, end_epoch=1.5), GroupLassoCallback(0.01, target="net.conv")],
            "compression compression compression compression",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:GroupLassoCallback has made no group zero")
def test_the_phase_is_right_for_every_technique(make: Callable[[], list[Callback]], phases: str) -> None:
    """Written down by hand: an epoch is called what the network is at its end."""
    recorder = Recorder("val_acc")
    fit(*make(), recorder)
    assert [epoch.phase for epoch in recorder.history] == phases.split()


@pytest.mark.filterwarnings("ignore:GroupLassoCallback has made no group zero")
def test_a_penalty_that_lasts_the_whole_fit_leaves_the_snapshot_where_pruning_ended() -> None:
    recorder, diary = Recorder("val_acc"), Diary()
    fit(IterativePruningCallback(0.7, end_epoch=2.0), GroupLassoCallback(0.01), recorder, diary)
    final = max(zeros for zeros, _ in diary.pages)
    assert not differences(recorder.snapshot, next(state for zeros, state in diary.pages if zeros == final))
    alone = Recorder("val_acc")
    fit(GroupLassoCallback(0.01), alone)
    assert alone.snapshot is None


def test_no_snapshot_where_pruning_went_back_to_an_earlier_amount() -> None:
    recorder = Recorder("val_acc")
    stop = {"monitor": "val_acc", "max_drop": 0.0, "baseline": 2.0}  # which no network keeps
    fit(IterativePruningCallback(0.7, schedule="one_shot", stop=stop), recorder)
    assert recorder.snapshot is None


def test_no_snapshot_where_the_ramp_did_not_end() -> None:
    recorder = Recorder("val_acc")
    with pytest.warns(UserWarning, match="before the pruning ramp did"):
        fit(IterativePruningCallback(0.5, end_epoch=9.0), recorder)
    assert recorder.snapshot is None


def test_state_comes_back() -> None:
    recorder, other = Recorder("val_acc"), Recorder("val_acc")
    fit(IterativePruningCallback(0.7, end_epoch=2.0), recorder)
    other.load_state_dict(recorder.state_dict())
    assert other.history == recorder.history
    assert not differences(other.snapshot, recorder.snapshot)
