from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from support.ranks import RankPair
from support.small import quiet_trainer
from torch import Tensor, nn

from lightning_compress.baselines import Classifier, Digits, TensorLoader
from lightning_compress.baselines.classifier import lr_factor


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def samples(n: int = 50, **kwargs: Any) -> TensorLoader:
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    return TensorLoader(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long(), **{"batch_size": 8, **kwargs})


class Rates(Callback):
    """The learning rate of every optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def rates(trainer_options: dict[str, Any] | None = None, **kwargs: Any) -> list[float]:
    recorder = Rates()
    trainer = quiet_trainer(max_epochs=3, callbacks=[recorder], **(trainer_options or {}))
    trainer.fit(Classifier(network(), lr=0.5, **kwargs), samples(shuffle=True))
    return recorder.rates


def test_the_cosine_goes_over_all_steps_of_the_fit() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=21)
    expected = []
    for _ in range(21):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    assert rates() == pytest.approx(expected)
    # two batches a step: half the steps, the same curve
    assert rates({"accumulate_grad_batches": 2}) == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * t / 12)) for t in range(12)]
    )


def test_constant_linear_and_warmup() -> None:
    assert rates(lr_schedule="constant") == [0.5] * 21
    assert rates(lr_schedule="linear") == pytest.approx([0.5 * (1 - t / 21) for t in range(21)])
    warm = rates(lr_schedule="constant", warmup=1 / 3)
    assert warm[:7] == pytest.approx([0.5 * (t + 1) / 8 for t in range(7)])
    assert warm[7:] == [0.5] * 14


def test_the_factor_holds_beyond_the_planned_end() -> None:
    assert lr_factor(30, schedule="cosine", steps=20) == 0.0
    assert lr_factor(30, schedule="linear", steps=20) == 0.0


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.7, "weight_decay": 0.01}),
        ("adam", torch.optim.Adam, {"weight_decay": 0.01}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_get_their_settings(name: Any, kind: type, expected: dict[str, float], fused: bool) -> None:
    module = Classifier(
        network(), optimizer=name, lr=0.1, weight_decay=0.01, momentum=0.7, lr_schedule="constant", fused=fused
    )
    optimizer = module.configure_optimizers()
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["fused"] is (True if fused else None)
    assert {key: optimizer.defaults[key] for key in expected} == expected
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == 12 * 16 + 16 + 16 * 3 + 3


def test_logged_values_are_those_of_a_loop_over_all_samples(tmp_path: Path) -> None:
    module = Classifier(network(), label_smoothing=0.1)
    trainer = quiet_trainer(max_epochs=2, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=3)
    trainer.fit(module, samples(shuffle=True), samples(51))
    metrics = trainer.callback_metrics
    module.eval()
    right, loss = 0, 0.0
    data = samples(51)
    for x, y in zip(data.inputs, data.targets, strict=True):  # one by one: the last batch is smaller than the others
        logits = module(x[None])[0].detach()
        right += int(logits.argmax() == y)
        loss -= float(logits.log_softmax(0)[y])
    assert metrics["val_acc"].item() == pytest.approx(right / 51)
    assert metrics["val_loss"].item() == pytest.approx(loss / 51, rel=1e-5)
    assert trainer.test(module, data, verbose=False) == [
        {"test_acc": pytest.approx(right / 51), "test_loss": pytest.approx(loss / 51, rel=1e-5)}
    ]
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    step, loss_column = header.split(",").index("step"), header.split(",").index("train_loss")
    logged = [int(line.split(",")[step]) for line in lines if line.split(",")[loss_column]]
    assert logged == [2, 5, 8, 11], "every third step, counted over the epochs"


def test_a_module_that_was_validated_and_tested_fits_on() -> None:
    module = Classifier(network())
    for _ in range(2):
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(module, samples(shuffle=True), samples())
        trainer.validate(module, samples(), verbose=False)
        trainer.test(module, samples(), verbose=False)


def test_a_diverged_loss_is_shown() -> None:
    module = Classifier(nn.Linear(12, 3))
    nn.init.constant_(module.network.weight, math.nan)
    assert math.isnan(quiet_trainer().validate(module, samples(), verbose=False)[0]["val_loss"])


def test_label_smoothing_is_in_the_training_loss_only() -> None:
    module = Classifier(nn.Identity(), label_smoothing=0.3, lr_schedule="constant")
    module._trainer = SimpleNamespace(log_every_n_steps=0, global_step=0)  # type: ignore[assignment]
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    target_shares = 0.7 * F.one_hot(targets, 3) + 0.1
    expected = -(target_shares * logits.log_softmax(1)).sum(1).mean()
    assert module.training_step((logits, targets), 0).item() == pytest.approx(expected.item())


def test_logits_are_taken_out_of_an_output_object() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=2 * x, hidden=None)

    x = torch.randn(4, 3)
    assert torch.equal(Classifier(Wrapped())(x), 2 * x)


def test_a_transformers_network_trains() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    module = Classifier(transformers.ViTForImageClassification(config), input_shape=(1, 8, 8))
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(module, Digits())
    assert module(module.example_input_array).shape == (1, 10)


def test_a_checkpoint_has_the_settings_and_loads_into_a_new_network(tmp_path: Path) -> None:
    module = Classifier(network(), lr=0.123, input_shape=OmegaConf.create([12]))  # as Hydra passes it
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, samples())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hparams["lr"] == 0.123
    assert "network" not in hparams
    loaded = Classifier.load_from_checkpoint(path, network=network(), weights_only=True)
    assert loaded.hparams["lr"] == 0.123
    assert loaded.example_input_array.shape == (1, 12)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert all(name.startswith("network.") for name in module.state_dict())


@pytest.mark.parametrize("step", [4, 7, 10])
def test_resume_is_exact_in_and_at_the_end_of_an_epoch(tmp_path: Path, step: int) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "a.ckpt")
                torch.save(torch.get_rng_state(), tmp_path / "rng")

    class Restore(Callback):  # dropout draws from the global generator, which Lightning does not save
        def on_train_start(self, *_: Any) -> None:
            torch.set_rng_state(torch.load(tmp_path / "rng"))

    def run(callback: Callback, resume: Path | None = None) -> dict[str, Tensor]:
        seed_everything(0 if resume is None else 99, verbose=False)
        module = Classifier(network(), lr=0.05)
        trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(module, samples(shuffle=True), samples(), ckpt_path=resume)
        return module.state_dict()

    full = run(Save())
    resumed = run(Restore(), tmp_path / "a.ckpt")
    assert all(torch.equal(full[name], resumed[name]) for name in full)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"optimizer": "lion"}, "one of adam, adamw, sgd; got 'lion'"),
        ({"lr_schedule": "steps"}, "one of cosine, linear, step, constant; got 'steps'"),
        ({"warmup": 1.0}, "0 <= warmup < 1; got 1.0"),
        ({"warmup": -0.1}, "got -0.1"),
    ],
)
def test_bad_settings_are_quoted(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(network(), **kwargs)


def test_a_schedule_needs_an_end() -> None:
    with pytest.raises(ValueError, match=r"lr_schedule='cosine' .* Trainer\(max_epochs=\.\.\.\)"):
        quiet_trainer(max_epochs=-1).fit(Classifier(network()), samples())


def test_two_ranks_end_equal_and_measure_what_one_process_measures(tmp_path: Path, rank_pair: RankPair) -> None:
    torch.manual_seed(0)
    module = Classifier(network())
    results = rank_pair.run("baselines.on_ranks:fit_and_test", tmp_path, network=module.network)
    trained, measured, steps = results[0]
    assert steps == 3 * math.ceil(math.ceil(51 / 2) / 8)
    for name, value in trained.items():
        assert torch.equal(results[1][0][name], value)
    module.load_state_dict(trained)
    alone = quiet_trainer().test(module, samples(51), verbose=False)
    for rank in range(2):
        assert results[rank][1] == [pytest.approx(alone[0], rel=1e-5)]
    assert measured[0]["test_acc"] * 51 == pytest.approx(round(measured[0]["test_acc"] * 51), abs=1e-4)
