"""What the user's code writes into weights between optimizer steps stays, whatever trains behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    BinaryWeightsCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
)

LR = 0.05
DATA = TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)))
HIDDEN: dict[str, Callable[[], Any]] = {
    "qat": lambda: QuantizationAwareTrainingCallback(8, None),
    "qat-2bit": lambda: QuantizationAwareTrainingCallback(2, None),
    "qat-tensor": lambda: QuantizationAwareTrainingCallback(3, None, granularity="tensor"),
    "binary": BinaryWeightsCallback,
    "binary-xnor": lambda: BinaryWeightsCallback(scaling="mean"),
    "binary-stochastic": lambda: BinaryWeightsCallback("stochastic"),
    "regrow": lambda: IterativePruningCallback(0.5, regrow=True, schedule="one_shot", start_epoch=1.0),
}
SHARED: dict[str, Callable[[], Any]] = {
    "clustering": lambda: WeightClusteringCallback(4),
    "pruning": lambda: IterativePruningCallback(0.5, schedule="one_shot", start_epoch=1.0),
}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.lr = LR

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[0][:, :3])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR, momentum=0.5)


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **({"max_epochs": 3} | options))
    loader = DataLoader(DATA, batch_size=8)
    trainer.fit(module, loader, loader)
    return trainer


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Reload(Callback):
    """Keeps the weights of step 8 and loads them back later, after which nothing trains."""

    def __init__(self, hook: str, how: str = "load") -> None:
        self.how, self.best = how, {}
        setattr(self, hook, self.reload)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 8:
            self.best = weights(pl_module)

    def reload(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step < 12:
            return
        if self.how == "load":
            pl_module.load_state_dict(self.best)
        else:
            for name, parameter in pl_module.named_parameters():
                parameter.data.copy_(self.best[name])
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0


@pytest.mark.parametrize("how", ["load", "data"])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_end", "on_train_epoch_start", "on_train_end"])
@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_weights_that_are_reloaded_stay(make: Callable[[], Any], hook: str, how: str) -> None:
    torch.manual_seed(0)
    module, technique, user = Net(), make(), Reload(hook, how)
    fit(module, user, technique)
    for name, value in weights(module).items():
        mask = technique.masks.get(name, True) if isinstance(technique, IterativePruningCallback) else True
        assert torch.allclose(value, user.best[name] * mask, atol=1e-6), name


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_weights_that_the_module_reloads_when_the_training_ends_stay(make: Callable[[], Any]) -> None:
    class Restored(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 8:
                self.best = weights(self)

        def on_train_end(self) -> None:
            self.load_state_dict(self.best)

    torch.manual_seed(0)
    module, technique = Restored(), make()
    fit(module, technique)
    for name, value in weights(module).items():
        mask = technique.masks.get(name, True) if isinstance(technique, IterativePruningCallback) else True
        assert torch.allclose(value, module.best[name] * mask, atol=1e-6), name


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_clamp_counts_as_in_a_loop_by_hand(in_place: bool, every: int) -> None:
    """h are the hidden values: what the clamp has changed of the module's becomes hidden, the rest keeps its own."""

    class Clamped(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step % every == 0:
                for layer in (self.net[0], self.net[2]):
                    with torch.no_grad():
                        (layer.weight if in_place else layer.weight.data).clamp_(-0.2, 0.2)

    def grid(w: Tensor) -> Tensor:
        scale = w.abs().amax(1, keepdim=True) / 127
        return (w / scale).round().clamp(-127, 127) * scale

    torch.manual_seed(0)
    module = Clamped()
    hand = copy.deepcopy(module.net)
    technique = QuantizationAwareTrainingCallback(8, None)
    fit(module, technique)

    layers = [hand[0].weight, hand[2].weight]
    hidden = [w.detach().clone() for w in layers]
    optimizer = torch.optim.SGD(hand.parameters(), lr=LR, momentum=0.5)
    step = 0
    for _ in range(3):
        for (x,) in DataLoader(DATA, batch_size=8):
            step += 1
            with torch.no_grad():
                for w, h in zip(layers, hidden, strict=True):
                    w.copy_(grid(h))
            optimizer.zero_grad()
            F.mse_loss(hand(x), x[:, :3]).backward()
            with torch.no_grad():
                for w, h in zip(layers, hidden, strict=True):
                    w.copy_(h)
                optimizer.step()
                for w, h in zip(layers, hidden, strict=True):
                    h.copy_(w)
                    shown = grid(h)
                    written = shown.clamp(-0.2, 0.2) if step % every == 0 else shown
                    h.copy_(torch.where((written - shown).abs() > 1e-6, written, h))
                    w.copy_(written)
    for name, h in zip(("net.0.weight", "net.2.weight"), hidden, strict=True):
        assert torch.allclose(technique.latent[name], h, atol=1e-6)
        assert torch.allclose(module.get_parameter(name).detach(), grid(h), atol=1e-6)


@pytest.mark.parametrize("make", list(HIDDEN.values())[:-1], ids=list(HIDDEN)[:-1])
def test_a_network_that_is_copied_from_another_stays_its_copy(make: Callable[[], Any]) -> None:
    class Twins(Net):
        def __init__(self) -> None:
            super().__init__()
            self.target = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 9:
                for mine, its in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    mine.data.copy_(its.data)
                self.copied = weights(self)

    torch.manual_seed(0)
    module, technique = Twins(), make()
    technique.target = ["net.0", "net.2", "target.0", "target.2"]
    fit(module, technique)
    for name, value in module.target.state_dict().items():
        assert torch.allclose(value, module.copied[f"net.{name}"], atol=1e-6), name


@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("make", (HIDDEN | SHARED).values(), ids=HIDDEN | SHARED)
def test_weights_that_are_moved_and_moved_back_have_not_changed(make: Callable[[], Any], exactly: bool) -> None:
    class Moved(Net):
        moves = True

        @torch.no_grad()
        def on_after_backward(self) -> None:
            if self.moves:
                before = weights(self)
                for parameter in self.parameters():
                    parameter.add_(0.01 * parameter.grad)
                for name, parameter in self.named_parameters():
                    parameter.copy_(before[name]) if exactly else parameter.sub_(0.01 * parameter.grad)

    ends = []
    for moves in (True, False):
        torch.manual_seed(0)
        module = Moved()
        module.moves = moves
        fit(module, make())
        ends.append(weights(module))
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[1][name], atol=0 if exactly else 1e-5), name


def test_clamps_between_two_steps_of_one_batch_count() -> None:
    class Critic(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.largest: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(3):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()
                for parameter in self.parameters():
                    parameter.data.clamp_(-0.1, 0.1)

    torch.manual_seed(0)
    module, technique = Critic(), QuantizationAwareTrainingCallback(8, None)
    fit(module, technique)
    assert max(float(latent.abs().max()) for latent in technique.latent.values()) <= 0.1 + 1e-6
    assert max(float(parameter.detach().abs().max()) for parameter in module.parameters()) <= 0.1 + 1e-6


def test_writes_under_accumulation_count_before_the_step() -> None:
    class Once(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == 0 and trainer.current_epoch == 1:
                with torch.no_grad():
                    pl_module.net[0].weight.fill_(0.25)
                trainer.optimizers[0].param_groups[0]["lr"] = 0.0

    torch.manual_seed(0)
    module, technique = Net(), QuantizationAwareTrainingCallback(8, None)
    fit(module, technique, Once(), accumulate_grad_batches=3)
    assert torch.allclose(module.net[0].weight, torch.full((8, 6), 0.25), atol=1e-6)


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_a_resume_goes_on_from_what_was_written_before_a_checkpoint(make: Callable[[], Any], tmp_path: Path) -> None:
    class Write(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    pl_module.net[0].weight.copy_(torch.linspace(-0.3, 0.5, 48).view(8, 6))
                trainer.save_checkpoint(tmp_path / "written.ckpt")

    torch.manual_seed(0)
    module, technique = Net(), make()
    fit(module, Write(), technique)
    resumed, again = Net(), make()
    trainer = quiet_trainer(callbacks=[again], max_epochs=3)
    loader = DataLoader(DATA, batch_size=8)
    trainer.fit(resumed, loader, loader, ckpt_path=tmp_path / "written.ckpt")
    for name, value in weights(module).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, value in technique.latent.items():
        assert torch.equal(value, again.latent[name]), name


def test_hidden_values_that_are_written_count_as_well() -> None:
    """Whoever writes behind the module means that: the module follows."""

    class Shrink(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            technique.latent["net.0.weight"].fill_(0.5)

    torch.manual_seed(0)
    module, technique = Net(), QuantizationAwareTrainingCallback(8, None)
    fit(module, technique, Shrink())
    assert torch.allclose(module.net[0].weight, torch.full((8, 6), 0.5), atol=1e-6)


def test_zeros_that_are_reloaded_with_other_values_train_on() -> None:
    """Zeros alone have been pruned; a zero of a grid, loaded with its neighbours, is a value like others."""

    class Load(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                with torch.no_grad():
                    pl_module.net[0].weight.copy_(torch.tensor([0.3, 0.0, -0.3]).repeat(16).view(8, 6))
                    pl_module.net[2].weight[0].zero_()

    torch.manual_seed(0)
    module, technique = Net(), QuantizationAwareTrainingCallback(2, None)
    fit(module, technique, Load())
    assert int((technique.latent["net.0.weight"] == 0).sum()) <= 6  # of units that get no gradient
    assert not technique.latent["net.2.weight"][0].any()


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end"])
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_masks_and_clusters_hold_at_the_end_whatever_was_written(make: Callable[[], Any], hook: str) -> None:
    class Dense(Callback):
        def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for parameter in pl_module.parameters():
                parameter.data.add_(torch.rand_like(parameter))

    setattr(Dense, hook, Dense.write)
    torch.manual_seed(0)
    module, technique = Net(), make()
    fit(module, technique, Dense())
    held = [module.net[0].weight, module.net[2].weight]
    if isinstance(technique, WeightClusteringCallback):
        assert [len(w.unique()) for w in held] == [4, 4]
    else:
        assert sum(int((w == 0).sum()) for w in held) == 36
        assert technique.sparsity == 0.5


def test_what_a_validation_sees_is_masked_whatever_was_written_before() -> None:
    class Dense(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.data.add_(1.0)

        def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.seen.append(sum(int((p == 0).sum()) for p in pl_module.parameters()))

    torch.manual_seed(0)
    user = Dense()
    fit(Net(), user, IterativePruningCallback(0.5, schedule="one_shot"), num_sanity_val_steps=0)
    assert set(user.seen) == {36}


def test_sparsity_is_counted_in_the_module() -> None:
    torch.manual_seed(0)
    module, technique = Net(), IterativePruningCallback(0.5, schedule="one_shot", scope="layer")
    fit(module, technique)
    assert technique.sparsity == 0.5
    with torch.no_grad():
        module.net[2].weight.fill_(1.0)
    assert technique.sparsity == pytest.approx(24 / 72)
