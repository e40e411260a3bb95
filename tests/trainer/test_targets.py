"""What `target=None` takes in a fit: what trains and what the network uses, for every technique; averages follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from support.small import quiet_trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    QuantizationAwareTrainingCallback,
    WeightClusteringCallback,
    footprint,
    load_compressed,
    save_compressed,
)

WIDTH, CLASSES = 8, 3

TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "weights": lambda: IterativePruningCallback(0.6),
    "taylor": lambda: IterativePruningCallback(0.6, criterion="taylor", start_epoch=1.0),
    "neurons": lambda: IterativePruningCallback(0.5, granularity="neuron", shrink="never"),
    "lasso": lambda: GroupLassoCallback(3.0, proximal=True),
    "lasso-group": lambda: GroupLassoCallback(3.0, granularity="group", proximal=True),
    "clustering": lambda: WeightClusteringCallback(3),
    "clustering-by-pattern": lambda: WeightClusteringCallback({"net*": 3}),
    "binary": lambda: BinaryWeightsCallback(),
    "qat": lambda: QuantizationAwareTrainingCallback(2, 8),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Hardtanh(), nn.Linear(12, WIDTH))


def loader(samples: int = 32) -> DataLoader:
    x = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x), batch_size=8)


class Base(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch[0])

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x), x.roll(1, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class LossNetwork(Base):
    """A frozen network that the loss alone uses; the optimizer has it all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.other = mlp().requires_grad_(False)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.other(self(x)), self.other(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class NotInTheOptimizer(LossNetwork):
    """It requires gradients, but no optimizer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.other.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


class FrozenBackbone(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = mlp().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.other(x))


class Target(Base):
    """A copy that follows slowly, as in BYOL and DQN."""

    def __init__(self) -> None:
        super().__init__()
        self.other = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x), self.other(x).roll(1, 1))


class ProjectionHead(Base):
    """A head that trains and that the loss alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.other = mlp()

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.other(self(x)), x.roll(1, 1))


class Gan(Base):
    """Two optimizers; forward takes noise of another shape than the data, so that no batch could be run through it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.example_input_array = torch.zeros(2, 4)
        self.net = nn.Sequential(nn.Linear(4, 12), nn.Hardtanh(), nn.Linear(12, WIDTH))
        self.other = nn.Sequential(nn.Linear(WIDTH, 12), nn.Hardtanh(), nn.Linear(12, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0]
        for optimizer, fake in zip(self.optimizers(), (True, False), strict=True):
            self.toggle_optimizer(optimizer)
            y = self.other(self(torch.randn(len(x), 4)))
            loss = F.softplus(-y).mean() if fake else (F.softplus(y) + F.softplus(-self.other(x))).mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(one.parameters(), lr=1e-2) for one in (self.net, self.other)]


MODULES: list[type[Base]] = [LossNetwork, NotInTheOptimizer, FrozenBackbone, Target, ProjectionHead, Gan]


def is_changed(technique: str, weight: Tensor) -> bool:
    """Whether a weight of random entries shows the technique's mark."""
    if technique in ("weights", "taylor", "neurons", "lasso", "lasso-group"):
        return bool((weight == 0).any())
    return len(weight.abs().unique()) <= (weight.numel() // 2 if technique == "qat" else 3)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_only_what_trains_and_is_used_is_changed(technique: str, kind: type[Base]) -> None:
    module = kind()
    before = copy.deepcopy(module.other.state_dict())
    quiet_trainer(callbacks=[TECHNIQUES[technique]()], max_epochs=6).fit(module, loader())
    frozen = not any(p.requires_grad for p in module.other.parameters()) or kind is NotInTheOptimizer
    for name, value in module.other.state_dict().items():
        assert not frozen or torch.equal(value, before[name])
        assert not name.endswith("weight") or not is_changed(technique, value), name
    assert is_changed(technique, module.net[0].weight.detach()) or technique == "neurons"


def test_what_is_left_alone_is_said_once_with_the_share_of_the_targets(caplog: pytest.LogCaptureFixture) -> None:
    module = LossNetwork()
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[IterativePruningCallback(0.5)], max_epochs=2).fit(module, loader())
    (said,) = [one for one in caplog.messages if "IterativePruningCallback" in one]
    share = 192 / sum(p.numel() for p in module.parameters())
    assert f"the targets (2) hold {share:.0%} of all parameters" in said
    assert "other (no optimizer trains it)" in said


def test_what_is_no_layer_is_said_by_why_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Words(Base):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.table = nn.Embedding(4, WIDTH), nn.Embedding(4, WIDTH).requires_grad_(False)
            self.rnn = nn.GRU(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            index = torch.zeros(len(x), dtype=torch.long)
            return self.net(self.rnn(x + self.words(index) + self.table(index))[0])

    module = Words()
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[IterativePruningCallback(0.5)], max_epochs=2).fit(module, loader())
    (said,) = [one for one in caplog.messages if "IterativePruningCallback" in one]
    assert "table (no optimizer trains it), words, rnn (no linear layer or convolution)" in said
    assert not any((one == 0).any() for one in (module.rnn.weight_hh_l0, module.words.weight))


def test_patterns_mean_what_they_say() -> None:
    module = LossNetwork()
    quiet_trainer(callbacks=[IterativePruningCallback(0.5, target="other.*")], max_epochs=3).fit(module, loader())
    assert sum(int((module.other[i].weight == 0).sum()) for i in (0, 2)) == 96
    assert not (module.net[0].weight == 0).any()


def test_a_module_without_a_forward_is_taken_as_far_as_it_trains() -> None:
    class NoForward(LightningModule):
        training_step, configure_optimizers = Base.training_step, Base.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net, self.head, self.other = mlp(), mlp(), mlp().requires_grad_(False)

        def loss(self, x: Tensor) -> Tensor:
            return F.mse_loss(self.head(self.net(x)), self.other(x))

    module = NoForward()
    quiet_trainer(callbacks=[IterativePruningCallback(0.5)], max_epochs=3).fit(module, loader())
    zeros = [int((part[i].weight == 0).sum()) for part in (module.net, module.head, module.other) for i in (0, 2)]
    assert sum(zeros[:4]) == 192
    assert zeros[4:] == [0, 0]


def test_without_anything_that_trains_target_must_be_named() -> None:
    class OnlyBias(Base):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([self.net[0].bias], lr=1e-2)

    with pytest.raises(ValueError, match=r"target=None selects no parameter of OnlyBias: no optimizer .* target="):
        quiet_trainer(callbacks=[IterativePruningCallback(0.5)], max_epochs=2).fit(OnlyBias(), loader())


# ---------------------------------------------------------------------- layers that are frozen for a while


class Backbone(Base):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = mlp(), nn.Linear(WIDTH, WIDTH)
        self.net = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.mark.parametrize("technique", ["weights", "taylor", "clustering", "binary"])
def test_a_backbone_that_a_callback_will_unfreeze_is_taken(technique: str, caplog: pytest.LogCaptureFixture) -> None:
    module = Backbone()
    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=2), TECHNIQUES[technique]()]
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=callbacks, max_epochs=4).fit(module, loader())
    taken = technique != "taylor"  # which needs gradients from the beginning
    assert is_changed(technique, module.backbone[0].weight.detach()) == taken
    assert is_changed(technique, module.head.weight.detach())
    words = "backbone: taken, though frozen for now" if taken else "backbone (no optimizer trains it)"
    assert any(words in one for one in caplog.messages)


class Unfreeze(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)


def frozen_at_first() -> Base:
    class AllInTheOptimizer(Backbone):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    module = AllInTheOptimizer()
    module.backbone.requires_grad_(False)
    return module


def test_a_resume_decides_as_the_uninterrupted_run_did(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = frozen_at_first()
    trainer = quiet_trainer(
        callbacks=[Unfreeze(), IterativePruningCallback(0.5), checkpoint], enable_checkpointing=True
    )
    with pytest.warns(UserWarning, match=r"leaves backbone\.0\.weight, backbone\.2\.weight as they are"):
        trainer.fit(whole, loader())
    assert not (whole.backbone[0].weight == 0).any()
    resumed = frozen_at_first()
    resumed.backbone.requires_grad_(True)
    pruning = IterativePruningCallback(0.5)
    quiet_trainer(callbacks=[pruning]).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert set(pruning.masks) == {"head.weight"}
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


# ---------------------------------------------------------------------- averages that the module holds


class Averaging(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9)).requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        self.ema.update_parameters(self.net)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regrow": True},
        {"granularity": "neuron"},
        {"granularity": "neuron", "shrink": "never"},
        {"granularity": "neuron", "shrink": "during_fit"},
        {"granularity": "neuron", "shrink": "during_fit", "network": "net"},
    ],
)
def test_an_average_is_masked_and_cut_along_with_what_it_averages(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Averaging()
    trainer = quiet_trainer(
        callbacks=[IterativePruningCallback(0.5, **options), checkpoint], max_epochs=6, enable_checkpointing=True
    )
    trainer.fit(module, loader())
    for one, other in zip(module.net.parameters(), module.ema.module.parameters(), strict=True):
        assert one.shape == other.shape
        assert torch.equal(one == 0, other == 0)
    resumed = Averaging()
    trainer = quiet_trainer(callbacks=[IterativePruningCallback(0.5, **options)], max_epochs=6)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=4.ckpt", weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_average_is_cut_with_what_group_lasso_makes_zero() -> None:
    module = Averaging()
    lasso = GroupLassoCallback(0.5, granularity="group", proximal=True, shrink="on_fit_end")
    quiet_trainer(callbacks=[lasso], max_epochs=6).fit(module, loader())
    assert module.net[0].out_features < 12
    assert [p.shape for p in module.net.parameters()] == [p.shape for p in module.ema.module.parameters()]
    module.ema(torch.randn(2, WIDTH))


def test_an_average_of_a_clustered_network_has_few_values_too() -> None:
    module = Averaging()
    quiet_trainer(callbacks=[WeightClusteringCallback(3)], max_epochs=2).fit(module, loader())
    assert len(module.ema.module[0].weight.unique()) <= 3


@pytest.mark.parametrize("technique", ["binary", "qat"])
def test_an_average_of_weights_with_hidden_values_stays_an_average(
    technique: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Averaging()
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[TECHNIQUES[technique]()], max_epochs=2).fit(module, loader())
    assert len(module.ema.module[0].weight.abs().unique()) > {"binary": 3, "qat": 24}[technique]
    assert any("ema (an average)" in one for one in caplog.messages)


class AverageInForward(Averaging):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.training else self.ema(x)


@pytest.mark.parametrize(
    "technique",
    [
        lambda **network: IterativePruningCallback(0.5, granularity="neuron", shrink="during_fit", **network),
        lambda **network: GroupLassoCallback(0.5, granularity="group", proximal=True, shrink="on_fit_end", **network),
    ],
)
def test_channels_of_a_forward_that_uses_the_average_are_those_of_what_trains(technique: Any) -> None:
    with pytest.raises(ValueError, match=r"uses ema, which averages net .* pass network='net'"):
        quiet_trainer(callbacks=[technique()], max_epochs=2).fit(AverageInForward(), loader())
    module = AverageInForward()
    quiet_trainer(callbacks=[technique(network="net")], max_epochs=6).fit(module, loader())
    assert module.net[0].out_features == module.ema.module[0].out_features < 12


# ---------------------------------------------------------------------- layers with nothing, zeros or one channel


class Odd(Base):
    """Layers of zeros, of one channel and of none, and a parameter without entries beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, WIDTH))
        nn.init.zeros_(self.net[2].weight)
        self.nothing, self.empty = nn.Parameter(torch.zeros(3, 0, 2)), nn.Linear(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.empty(x[:, :0]).sum()


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_layers_with_nothing_zeros_or_one_channel(technique: str, tmp_path: Path) -> None:
    module = Odd()
    quiet_trainer(callbacks=[TECHNIQUES[technique]()], max_epochs=3).fit(module, loader())
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    footprint(module, torch.zeros(2, WIDTH), repeats=1)
    save_compressed(module, tmp_path / "odd.lcz")
    loaded = Odd()
    load_compressed(tmp_path / "odd.lcz", loaded)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
