"""What goes with what in later fits, in resumes, after a refusal, and where techniques reach beyond their targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.small import FEATURES, SmallModule, dataset, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)
from lightning_compress.trainer.compatibility import IncompatibleError


def pruning(amount: float = 0.5, **options: Any) -> IterativePruningCallback:
    return IterativePruningCallback(amount, **({"every_n_steps": 1} | options))


def fit(
    callbacks: Sequence[Callback],
    module: LightningModule | None = None,
    *,
    epochs: int = 2,
    batch: int = 8,
    resume: Path | None = None,
    **options: Any,
) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), max_epochs=epochs, **options)
    loader = DataLoader(dataset(), batch_size=batch, shuffle=True)
    trainer.fit(module or SmallModule(), loader, plain(), ckpt_path=resume, weights_only=True)
    return trainer


class Moments(Callback):
    """Where the sparsity and the number of values of a weight change, by epoch; what the first batch finds."""

    def __init__(self, pruned: IterativePruningCallback) -> None:
        self.pruned = pruned
        self.pruned_at: list[float] = []
        self.signs_at: list[float] = []
        self.first: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.first is None:
            self.first = self.before = self.pruned.sparsity
        now = trainer.current_epoch + batch_idx / trainer.num_training_batches
        if self.pruned.sparsity != self.before:
            self.pruned_at.append(now)
        if len(pl_module.net.hidden.weight.unique()) <= 3:
            self.signs_at.append(now)
        self.before = self.pruned.sparsity


# ---------------------------------------------------------------------- moments, where a callback has fitted before


def test_a_ramp_of_an_earlier_fit_ends_where_this_fit_is_then() -> None:
    """Two thirds of the ramp lie in the first fit, so that it ends an epoch into the second."""
    mine, module = pruning(end_epoch=3.0), SmallModule()
    fit([mine], module)
    seen = Moments(mine)
    fit([mine, BinaryWeightsCallback(start_epoch=1.5), seen], module)
    assert max(seen.pruned_at) <= 1.0 < 1.5 <= min(seen.signs_at)


def test_signs_that_begin_in_a_later_fit_begin_before_its_own_ramp_ends() -> None:
    binary, module = BinaryWeightsCallback(start_epoch=2.5), SmallModule()
    fit([binary], module)  # it begins half an epoch into the next fit
    with pytest.raises(IncompatibleError, match="still prunes"):
        fit([pruning(end_epoch=1.5), binary], module)


def test_signs_of_an_earlier_fit_have_begun() -> None:
    binary, module = BinaryWeightsCallback(start_epoch=1.0), SmallModule()
    fit([binary], module)
    with pytest.raises(IncompatibleError, match="still prunes"):
        fit([pruning(end_epoch=0.5), binary], module)


def test_values_of_a_grid_of_an_earlier_fit_are_not_clustered() -> None:
    grid, module = QuantizationAwareTrainingCallback(4, None, granularity="tensor"), SmallModule()
    fit([grid], module)
    before = module.net.hidden.weight.clone()
    with pytest.raises(IncompatibleError, match="clusters real values"):
        fit([WeightClusteringCallback(3), grid], module)
    assert torch.equal(module.net.hidden.weight, before)


@pytest.mark.parametrize(("batch", "start", "works"), [(16, 3.0, True), (4, 1.25, False)])
def test_a_resume_with_other_batches_compares_moments_as_they_are_then(
    batch: int, start: float, works: bool, tmp_path: Path
) -> None:
    """The ramp ends with the second epoch: at step 24 as planned, at 18 with twice the batch, at 36 with half of it."""
    trainer = fit([pruning(end_epoch=2.0)], epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    mine = pruning(end_epoch=2.0)
    seen = Moments(mine)
    callbacks = [mine, BinaryWeightsCallback(start_epoch=start), seen]
    if not works:
        with pytest.raises(IncompatibleError, match="still prunes"):
            fit(callbacks, epochs=3, batch=batch, resume=tmp_path / "first.ckpt")
        return
    fit(callbacks, epochs=3, batch=batch, resume=tmp_path / "first.ckpt")
    assert max(seen.pruned_at) <= 2.0 <= min(seen.signs_at)


# ---------------------------------------------------------------------- after a refusal


def test_a_refused_resume_leaves_nothing_for_the_next_fit(tmp_path: Path) -> None:
    trainer = fit([pruning(end_epoch=2.0)], epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    mine = pruning(end_epoch=2.0)
    with pytest.raises(IncompatibleError, match="both prune"):
        fit([mine, pruning(0.6)], resume=tmp_path / "first.ckpt")
    seen = Moments(mine)
    fit([mine, seen], epochs=1)
    assert seen.first == 0.0


class OnlyConv(SmallModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.conv.parameters(), lr=0.05)


def test_a_refused_fit_decides_no_targets_for_the_next() -> None:
    mine = pruning(end_epoch=0.5)
    with pytest.raises(IncompatibleError, match=r"both prune net\.conv\.weight, and"):
        fit([mine, pruning(0.6)], OnlyConv())
    fit([mine], epochs=1)
    assert list(mine.masks) == ["net.conv.weight", "net.hidden.weight", "net.head.weight"]


# ---------------------------------------------------------------------- stop=, once it has decided

_FAILS = {"monitor": "val_acc", "max_drop": 0.0, "baseline": 2.0, "recovery": 0}  # no accuracy reaches that


def stopped() -> tuple[IterativePruningCallback, SmallModule]:
    """A network whose first pruning failed, so that the dense one came back."""
    mine, module = pruning(end_epoch=1.5, every_n_steps=None, stop=_FAILS), SmallModule()
    fit([mine], module)
    assert mine.finished
    assert mine.sparsity == 0.0
    return mine, module


def test_a_fit_after_the_one_that_stopped_keeps_what_it_trains() -> None:
    mine, module = stopped()
    before = module.net.hidden.weight.clone()
    fit([mine], module, epochs=1)
    assert not torch.equal(module.net.hidden.weight, before)


def test_a_resume_of_the_fit_after_the_one_that_stopped_keeps_it_too(tmp_path: Path) -> None:
    mine, module = stopped()
    fit([mine], module, epochs=1).save_checkpoint(tmp_path / "second.ckpt")
    before = module.net.hidden.weight.clone()
    again, other = pruning(end_epoch=1.5, every_n_steps=None, stop=_FAILS), SmallModule()
    fit([again], other, epochs=2, resume=tmp_path / "second.ckpt")
    assert again.finished
    assert not torch.equal(other.net.hidden.weight, before)


@pytest.mark.parametrize("behind", [False, True])
def test_signs_begin_in_a_fit_after_the_one_that_stopped(behind: bool) -> None:
    mine, module = stopped()
    fit([BinaryWeightsCallback(), mine] if behind else [mine, BinaryWeightsCallback()], module, epochs=1)
    assert len(module.net.hidden.weight.unique()) == 2


def test_stop_at_amount_zero_does_nothing() -> None:
    found = []
    for callbacks in ([], [pruning(0.0, stop={"monitor": "nothing that is logged", "max_drop": 0.1})]):
        torch.manual_seed(0)
        module = SmallModule()
        quiet_trainer(callbacks=callbacks, max_epochs=1, limit_val_batches=0).fit(module, shuffled())
        found.append(module.net.hidden.weight)
    assert torch.equal(*found)


# ---------------------------------------------------------------------- a channel is more than the targeted weight


class TwoMakers(SmallModule):
    """Two layers make the same channels, so that one penalty is for both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.a, self.b, self.head = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x) + self.b(x)))


@pytest.mark.parametrize("other", [WeightClusteringCallback(3, target="b"), BinaryWeightsCallback(target="b")])
def test_a_penalty_for_channels_meets_what_else_makes_them(other: Callback) -> None:
    lasso = GroupLassoCallback(0.1, granularity="group", proximal=True, target="a")
    with pytest.raises(IncompatibleError, match=r"b\.weight"):
        fit([other, lasso], TwoMakers())


def test_a_penalty_for_channels_meets_values_of_their_norm() -> None:
    lasso = GroupLassoCallback(0.1, granularity="group", proximal=True, target="net.conv")
    with pytest.raises(IncompatibleError, match=r"shrinks net\.norm\.weight after every step"):
        fit([WeightClusteringCallback({"net.norm.weight": 3}), lasso])


def test_channels_that_may_grow_back_meet_values_of_their_norm() -> None:
    neurons = pruning(granularity="neuron", regrow=True, shrink="never", target="net.conv")
    with pytest.raises(IncompatibleError, match=r"in net\.norm\.weight, whose values WeightClustering.* sets"):
        fit([WeightClusteringCallback({"net.norm.weight": 3}), neurons])


def test_channels_that_stay_pruned_go_with_values_of_their_norm() -> None:
    module = SmallModule()
    neurons = pruning(granularity="neuron", shrink="never", target="net.conv", end_epoch=1.0)
    fit([WeightClusteringCallback({"net.norm.weight": 3}), neurons], module)
    alive = module.net.conv.weight.flatten(1).any(1)
    assert alive.sum() == 3
    assert torch.equal(module.net.norm.weight != 0, alive)
    assert len(module.net.norm.weight.unique()) <= 4


def test_a_penalty_for_filters_leaves_the_norm_alone() -> None:
    module = SmallModule()
    lasso = GroupLassoCallback(0.1, proximal=True, target="net.conv")
    fit([WeightClusteringCallback({"net.norm.weight": 3}), lasso], module, epochs=1)
    assert len(module.net.norm.weight.unique()) <= 4


def test_what_may_grow_back_elsewhere_is_shrunk_by_nobody() -> None:
    module = SmallModule()
    fit([pruning(regrow=True, target="net.head"), GroupLassoCallback(9.0, proximal=True, target="net.conv")], module)
    assert not module.net.conv.weight.flatten(1).any(1).all()
    assert module.net.head.weight.any(1).all()
