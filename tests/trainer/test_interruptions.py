"""Steps that never come, exceptions in the middle of a batch, and checkpoints that are written there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support.ranks import RankPair
from support.small import SmallModule, StatefulLoader, plain, quiet_trainer
from torch import Tensor

from lightning_compress import (
    BinaryWeightsCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)
from lightning_compress.trainer.resume import ResumableCallback

TECHNIQUES: dict[str, Callable[[], Any]] = {
    "pruning": lambda: IterativePruningCallback(0.5, schedule="one_shot"),
    "regrow": lambda: IterativePruningCallback(0.5, schedule="linear", regrow=True, end_epoch=0.5, every_n_steps=3),
    "clustering": lambda: WeightClusteringCallback(4),
    "qat": lambda: QuantizationAwareTrainingCallback(3, None),
    "binary": BinaryWeightsCallback,
    "binary-stochastic": lambda: BinaryWeightsCallback("stochastic"),
}
HIDDEN = {name: make for name, make in TECHNIQUES.items() if name not in ("pruning", "clustering")}


class InterruptionError(Exception):
    pass


class Small(SmallModule):
    """Fails at a moment of step 17."""

    moment = ""

    def fail(self, moment: str) -> None:
        if moment == self.moment and self.global_step == 17:
            raise InterruptionError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.fail("forward")
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, *_: Any) -> None:
        self.fail("backward")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.fail("step")

    def on_train_batch_end(self, *_: Any) -> None:
        self.fail("end")


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    resume = options.pop("ckpt_path", None)
    trainer = quiet_trainer(callbacks=list(callbacks), **({"max_epochs": 3} | options))
    trainer.fit(module, StatefulLoader(), plain(), ckpt_path=resume, weights_only=True)
    return values(module)


def values(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def small(moment: str = "") -> Small:
    torch.manual_seed(0)
    module = Small()
    module.moment = moment
    return module


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


WEIGHTS = [f"net.{name}.weight" for name in ("conv", "hidden", "head")]


def projected(technique: Any, state: dict[str, Tensor]) -> bool:
    """Whether a state dict holds what a technique lets a module hold, judged by the values alone."""
    matrices = [state[name] for name in WEIGHTS]
    if isinstance(technique, BinaryWeightsCallback):
        return all(w.abs().unique().tolist() == [1.0] for w in matrices)
    if isinstance(technique, QuantizationAwareTrainingCallback):
        return all(len(row.abs().unique()) <= 4 for w in matrices for row in w)
    if isinstance(technique, WeightClusteringCallback):
        return all(len(w.unique()) <= 4 for w in matrices)
    return all(not state[name][~mask].any() for name, mask in technique.masks.items())


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_a_step_that_a_scaler_skips_leaves_the_module_projected(make: Callable[[], Any]) -> None:
    class Overflows(Small):
        def on_after_backward(self) -> None:
            if self.global_step % 3 == 2:
                self.net.head.bias.grad.fill_(torch.inf)  # type: ignore[union-attr]

    class Looks(Callback):
        skipped = 0
        right = True

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.before = pl_module.net.head.bias.detach().clone()
            self.hidden = {name: value.clone() for name, value in technique.latent.items()}

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.right &= projected(technique, pl_module.state_dict())
            if torch.equal(self.before, pl_module.net.head.bias):
                self.skipped += 1
                self.right &= all(torch.equal(self.hidden[name], technique.latent[name]) for name in self.hidden)

    torch.manual_seed(0)
    module, technique, looks = Overflows(), make(), Looks()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    fit(module, technique, looks, plugins=[plugin], max_epochs=1)
    assert looks.skipped > 0
    assert looks.right


@pytest.mark.parametrize("moment", ["forward", "backward", "step", "end"])
@pytest.mark.parametrize("make", TECHNIQUES.values(), ids=TECHNIQUES)
def test_an_exception_leaves_the_module_projected_and_a_checkpoint_says_so(
    make: Callable[[], Any], moment: str, tmp_path: Path
) -> None:
    whole = fit(small(), make())
    for first in (True, False):
        module, technique = small(moment), make()
        saves = OnExceptionCheckpoint(tmp_path, filename="exception")
        callbacks = [saves, technique] if first else [technique, saves]
        with pytest.raises(InterruptionError):
            fit(module, *callbacks, enable_checkpointing=True, default_root_dir=tmp_path)
        assert projected(technique, values(module))
        path = tmp_path / "exception.ckpt"
        assert projected(technique, torch.load(path, weights_only=True)["state_dict"])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            resumed = fit(small(), make(), ckpt_path=path)
        told = any("in the middle of a batch" in str(one.message) for one in said)
        assert told == (moment != "end")
        assert told or same(resumed, whole)
        path.unlink()


@pytest.mark.parametrize("make", TECHNIQUES.values(), ids=TECHNIQUES)
def test_a_checkpoint_that_a_signal_writes_inside_a_step_holds_projected_weights(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    """As SLURM's signal to requeue does, at any moment; the run that goes on is not changed by it."""

    class Signalled(torch.optim.SGD):
        trainer: Any = None

        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            here = self.trainer is not None and self.trainer.global_step == 9
            if here:
                self.trainer.save_checkpoint(tmp_path / "before.ckpt")
            super().step()
            if here:
                self.trainer.save_checkpoint(tmp_path / "after.ckpt")
            return loss

    class Signals(Small):
        signals = True

        def configure_optimizers(self) -> Any:
            optimizer = Signalled(self.parameters(), lr=0.05, momentum=0.9)
            optimizer.trainer = self.trainer if self.signals else None
            return optimizer

    ends = []
    for signals in (True, False):
        torch.manual_seed(0)
        module, technique = Signals(), make()
        module.signals = signals
        ends.append(fit(module, technique, max_epochs=1))
    assert same(*ends)
    for name in ("before", "after"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert projected(technique, checkpoint["state_dict"])
        assert checkpoint["callbacks"][technique.state_key]["inside_batch"]


# ---------------------------------------------------------------------- on two ranks


def differently_seeded() -> dict[str, Any]:
    class Seeds(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.manual_seed(100 + trainer.global_rank)

    torch.manual_seed(0)
    technique = BinaryWeightsCallback("stochastic")
    trainer = quiet_trainer(callbacks=[Seeds(), technique], strategy="ddp", devices=2, max_epochs=1)
    trainer.fit(SmallModule(), plain(), plain())
    assert isinstance(technique, ResumableCallback)
    return {"positive": technique.technique_state()["weights"]["positive"]}


def test_ranks_with_different_seeds_draw_the_same_samples(rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("trainer.test_interruptions:differently_seeded", tmp_path)
    assert same(first["positive"], second["positive"])


@pytest.mark.parametrize("entry", ["pruning-fisher", "pruning-obd"])
def test_saving_does_not_change_what_ranks_prune(entry: str, rank_pair: RankPair, tmp_path: Path) -> None:
    job = {"job": "support.jobs:fit_on_ranks", "scratch": tmp_path}
    saved, unsaved = (
        rank_pair.run(*job.values(), entry=entry, stateful=True, max_epochs=3, **options)[0]["weights"]
        for options in ({"folder": str(tmp_path / "saved"), "every_n_train_steps": 1}, {})
    )
    assert same(saved, unsaved)
