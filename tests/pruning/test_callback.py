from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from support.small import BATCH, CLASSES, SAMPLES, ManualModule, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback

EPOCH = SAMPLES // BATCH


class Record(Callback):
    """Looks at the module after every batch, as a user's own callback would."""

    def __init__(self) -> None:
        self.zeros: list[int] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        flat = torch.cat([p.detach().flatten() for name, p in pl_module.named_parameters() if targeted(name)])
        self.weights.append(flat.clone())
        self.zeros.append(int((flat == 0).sum()))


def targeted(name: str) -> bool:
    return name in ("net.conv.weight", "net.hidden.weight", "net.head.weight")


TARGETED = 6 * 3 + 16 * 72 + 3 * 16


def run(callback: Callback, *others: Callback, module: LightningModule | None = None, **options: Any) -> SmallModule:
    torch.manual_seed(0)
    module = module or SmallModule()
    quiet_trainer(callbacks=[callback, *others], **options).fit(module, shuffled(), plain())
    return module  # type: ignore[return-value]


# ---------------------------------------------------------------------- how much, and when


@pytest.mark.parametrize("schedule", ["one_shot", "linear", "cubic", "exponential", "cosine"])
def test_the_amount_is_of_the_original_and_exact(schedule: str) -> None:
    record = Record()
    callback = IterativePruningCallback(0.83, schedule=schedule, start_epoch=1.0, end_epoch=3.0, every_n_steps=4)
    run(callback, record)
    assert record.zeros[EPOCH - 2] == 0
    assert record.zeros == sorted(record.zeros)
    assert record.zeros[-1] == round(0.83 * TARGETED)
    assert callback.sparsity == pytest.approx(0.83, abs=1 / TARGETED)


def test_layer_scope_is_exact_in_every_layer() -> None:
    module = run(IterativePruningCallback(0.83, scope="layer", end_epoch=2.0))
    for name, parameter in module.named_parameters():
        if targeted(name):
            assert int((parameter == 0).sum()) == round(0.83 * parameter.numel())
        elif "norm" not in name:
            assert not (parameter == 0).any()


def test_events_follow_the_cubic_ramp_written_out_by_hand() -> None:
    record = Record()
    run(IterativePruningCallback(0.8, start_epoch=1.0, end_epoch=3.0, every_n_steps=6), record)
    start, end = EPOCH, 3 * EPOCH
    for step in range(start, end + 1, 6):
        amount = 0.8 * (1 - (1 - (step - start) / (end - start)) ** 3)
        assert record.zeros[step - 1] == round(amount * TARGETED)


def test_global_magnitude_drops_the_smallest_weights_of_all_layers() -> None:
    torch.manual_seed(0)
    module = SmallModule()
    before = torch.cat([p.detach().flatten() for name, p in module.named_parameters() if targeted(name)])
    callback = IterativePruningCallback(0.6, schedule="one_shot")
    quiet_trainer(callbacks=[callback], max_steps=1).fit(module, shuffled())
    kept = torch.cat([callback.masks[name].flatten() for name, p in module.named_parameters() if targeted(name)])
    smallest = before.abs().argsort()[: round(0.6 * TARGETED)]
    assert set(smallest.tolist()) == set((~kept).nonzero().flatten().tolist())


def test_by_default_the_ramp_leaves_a_third_for_recovery() -> None:
    record = Record()
    run(IterativePruningCallback(0.8, schedule="linear", every_n_steps=1), record, max_epochs=3)
    final = round(0.8 * TARGETED)
    assert record.zeros.index(final) + 1 == 2 * EPOCH


def test_a_fit_that_ends_early_says_so() -> None:
    with pytest.warns(UserWarning, match=r"ended at step 24, before the pruning ramp did at step 36"):
        run(IterativePruningCallback(0.8, end_epoch=3.0), max_epochs=2)


# ---------------------------------------------------------------------- masks hold


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str)
def test_masked_weights_are_zero_after_every_step(optimizer: str, options: dict[str, Any]) -> None:
    record = Record()
    callback = IterativePruningCallback(0.8, schedule="one_shot", start_epoch=1.0)
    run(callback, record, module=SmallModule(optimizer), **options)
    gone = record.weights[-1] == 0
    first = next(index for index, zeros in enumerate(record.zeros) if zeros)
    assert gone.sum() == round(0.8 * TARGETED)
    for weights in record.weights[first:]:
        assert not weights[gone].any()


def test_masked_gradients_do_not_count_in_the_clipped_norm() -> None:
    norms = []

    class Norm(SmallModule):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            masked = [p.grad[p == 0] for name, p in self.named_parameters() if targeted(name)]
            norms.append(float(torch.cat(masked).norm()) if masked else 0.0)

    run(IterativePruningCallback(0.8, schedule="one_shot"), module=Norm(), gradient_clip_val=0.1, max_epochs=1)
    assert norms
    assert max(norms) == 0.0


def test_regrow_trains_what_is_masked_and_brings_it_back() -> None:
    """Against dynamic network surgery written out by hand, on a linear model under plain SGD."""
    steps, every, amount = 24, 4, 0.5

    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 3, bias=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    torch.manual_seed(3)
    module = Line()
    w, mask = module.layer.weight.detach().clone(), torch.ones(3, 12)
    callback = IterativePruningCallback(amount, schedule="linear", regrow=True, end_epoch=2.0, every_n_steps=every)
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(module, plain(0))

    seen = []
    for step, (x, y) in enumerate([*plain(0), *plain(0)], start=1):
        weight = (w * mask).requires_grad_()
        F.cross_entropy(F.linear(x, weight), y).backward()
        w = w - 0.3 * weight.grad
        if step % every == 0:
            count = round(amount * step / steps * w.numel())
            order = w.abs().flatten().argsort()
            mask = torch.ones(w.numel()).index_fill_(0, order[:count], 0.0).view_as(w)
            seen.append(mask)
    assert torch.allclose(module.layer.weight.detach(), w * mask, atol=1e-6)
    assert any(((before == 0) & (after == 1)).any() for before, after in itertools.pairwise(seen))


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "obd", "fisher", "ewc"])
def test_regrow_brings_weights_back_under_every_criterion_that_multiplies_by_the_weight(criterion: Any) -> None:
    back = []

    class Watch(Callback):
        before = torch.zeros(0)

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            now = callback.masks.get("net.hidden.weight", torch.ones(16, 72, dtype=torch.bool)).clone()
            back.append(int((now & ~self.before).sum()) if len(self.before) else 0)
            self.before = now

    callback = IterativePruningCallback(0.6, criterion=criterion, regrow=True, end_epoch=3.0, every_n_steps=4)
    run(callback, Watch())
    assert sum(back) > 0


def test_channels_fall_silent_in_everything_they_own() -> None:
    callback = IterativePruningCallback(0.5, granularity="neuron", scope="layer", end_epoch=2.0, shrink="never")
    module = run(callback)
    net = module.net.eval()
    gone = (net.conv.weight == 0).flatten(1).all(1)
    assert gone.sum() == 3
    for tensor in (net.conv.bias, net.norm.weight, net.norm.bias):
        assert not tensor[gone].any()
    after_norm = net.norm(net.conv(torch.randn(4, 1, 12)))
    assert not after_norm[:, gone].any()
    assert after_norm[:, ~gone].any()
    assert (net.hidden.weight == 0).all(1).sum() == 8
    assert not (net.head.weight == 0).any()  # the output's neurons stay


# ---------------------------------------------------------------------- what the user monitors


class Dense(SmallModule):
    """Logs a metric that is best while the network is dense."""

    def on_validation_epoch_end(self) -> None:
        weights = torch.cat([p.flatten() for name, p in self.named_parameters() if targeted(name)])
        self.log("density", (weights != 0).float().mean())


def test_a_dense_epoch_does_not_win_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="density", mode="max")
    stopping = EarlyStopping("density", mode="max", patience=4)
    with caplog.at_level("INFO"):
        run(
            IterativePruningCallback(0.8, end_epoch=3.0),
            checkpoint,
            stopping,
            module=Dense(),
            max_epochs=5,
            enable_checkpointing=True,
        )
    assert float(checkpoint.best_model_score) == pytest.approx(0.2, abs=1e-3)
    weights = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]["net.hidden.weight"]
    assert (weights == 0).float().mean() > 0.7
    assert float(stopping.best_score) == pytest.approx(0.2, abs=1e-3)
    assert "counts anew" in caplog.text


def test_averaged_copies_are_projected(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.9)
    torch.manual_seed(0)
    module = SmallModule()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [average, IterativePruningCallback(0.8, end_epoch=2.0), checkpoint]
    quiet_trainer(callbacks=callbacks, enable_checkpointing=True).fit(module, shuffled(), plain())
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    for source in (saved, module.state_dict()):
        zeros = sum(int((source[name] == 0).sum()) for name in source if targeted(name))
        assert zeros == round(0.8 * TARGETED)


def test_averaging_that_would_be_missed_is_refused() -> None:
    with pytest.raises(ValueError, match="put EMAWeightAveraging before IterativePruningCallback"):
        run(IterativePruningCallback(0.8), EMAWeightAveraging())
    with pytest.raises(ValueError, match="StochasticWeightAveraging"):
        run(StochasticWeightAveraging(swa_lrs=0.1), IterativePruningCallback(0.8))


# ---------------------------------------------------------------------- until the metric drops


class Brittle(SmallModule):
    """Its metric holds until more than `limit` of the weights are gone."""

    limit = 0.5

    def on_validation_epoch_end(self) -> None:
        weights = torch.cat([p.flatten() for name, p in self.named_parameters() if targeted(name)])
        self.log("quality", 0.9 if (weights == 0).float().mean() <= self.limit else 0.7)


def test_stop_ends_at_the_largest_amount_that_keeps_the_metric() -> None:
    module, record = Brittle(), Record()
    callback = IterativePruningCallback(
        0.9, schedule="linear", start_epoch=1.0, end_epoch=10.0, stop={"monitor": "quality", "max_drop": 0.05}
    )
    run(callback, record, module=module, max_epochs=12)
    # amounts after epochs 2, 3, ...: 0.1, 0.2, ...: the sixth is 0.6 and fails, and so it does an epoch later
    assert callback.current_amount == pytest.approx(0.5)
    assert callback.finished
    weights = torch.cat([p.flatten() for name, p in module.named_parameters() if targeted(name)])
    assert int((weights == 0).sum()) == round(0.5 * TARGETED)
    assert max(record.zeros) == round(0.6 * TARGETED)
    assert len(record.zeros) == 8 * EPOCH
    assert torch.equal(weights.detach(), record.weights[6 * EPOCH - 1] * (weights != 0))


def test_stop_reaches_the_end_where_the_metric_holds() -> None:
    module = Brittle()
    module.limit = 1.0
    callback = IterativePruningCallback(
        0.9, start_epoch=1.0, end_epoch=3.0, stop={"monitor": "quality", "max_drop": 0.05}
    )
    run(callback, module=module, max_epochs=5)
    assert callback.current_amount == 0.9


class Scripted(SmallModule):
    """Logs the qualities that it is given, one per validation; the first is that of the network that came in."""

    def __init__(self, *qualities: float, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.qualities = list(qualities)
        self.states: list[dict[str, Tensor]] = []  # as they were validated
        self.sanity: list[bool] = []

    def on_validation_epoch_end(self) -> None:
        self.log("quality", self.qualities[min(len(self.states), len(self.qualities) - 1)])
        self.states.append({name: value.clone() for name, value in self.state_dict().items()})
        self.sanity.append(self.trainer.sanity_checking)


def stopping(amount: float = 0.9, **options: Any) -> IterativePruningCallback:
    rule = {"monitor": "quality", "max_drop": 0.05} | options.pop("rule", {})
    return IterativePruningCallback(amount, **({"schedule": "linear", "end_epoch": 3.0} | options), stop=rule)


def fit_scripted(callback: IterativePruningCallback, *qualities: float, **options: Any) -> Scripted:
    seed_everything(1, verbose=False)
    module = Scripted(*qualities)
    settings: dict[str, Any] = {"num_sanity_val_steps": 0, "max_epochs": 6} | options
    quiet_trainer(callbacks=[callback], **settings).fit(module, shuffled(), plain())
    return module


@pytest.mark.parametrize("min_epochs", [None, 5])
def test_stop_goes_back_to_the_very_network_that_came_in(min_epochs: int | None) -> None:
    seed_everything(1, verbose=False)
    before = {name: value.clone() for name, value in Scripted().state_dict().items()}
    callback = stopping(rule={"recovery": 0})
    module = fit_scripted(callback, 0.9, 0.8, min_epochs=min_epochs)
    assert module.sanity[:2] == [True, False]
    assert callback.current_amount == callback.sparsity == 0.0
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_came_in_is_compared_with_and_not_what_an_epoch_made_of_it() -> None:
    """0.9 came in; 0.82 after an epoch is no baseline, and 0.8 no small drop."""
    callback = stopping(start_epoch=1.0, end_epoch=4.0, rule={"recovery": 0})
    module = fit_scripted(callback, 0.9, 0.82, 0.8)
    assert callback.current_amount == 0.0
    assert all(torch.equal(value, module.states[0][name]) for name, value in module.state_dict().items())


def test_a_dense_network_that_gets_better_before_the_ramp_is_the_baseline() -> None:
    callback = stopping(start_epoch=2.0, end_epoch=4.0, rule={"recovery": 0})
    module = fit_scripted(callback, 0.3, 0.9, 0.88, 0.8)
    assert callback.current_amount == 0.0
    assert all(torch.equal(value, module.states[1][name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(("recovery", "reached"), [(0, 0.0), (1, 0.3), (2, 0.9)])
def test_an_amount_may_recover_before_it_fails(recovery: int, reached: float) -> None:
    """0.3 is removed after the first epoch and needs one more; the jump to 0.9 after the second needs two."""
    callback = stopping(rule={"recovery": recovery})
    module = fit_scripted(callback, 0.9, 0.8, 0.88, 0.7, 0.7, 0.9)
    assert callback.current_amount == pytest.approx(reached)
    assert callback.finished
    zeros = sum(int((module.get_parameter(name) == 0).sum()) for name in callback.masks)
    assert zeros == round(reached * TARGETED)


def test_a_baseline_that_is_given_is_not_measured_and_amount_0_is_what_came_in() -> None:
    seed_everything(1, verbose=False)
    before = {name: value.clone() for name, value in Scripted().state_dict().items()}
    module = fit_scripted(stopping(rule={"baseline": 0.9, "recovery": 0}), 0.8)
    assert module.sanity == [False]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_first_validation_changes_nothing_of_the_training() -> None:
    class Log(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    logs = []
    for rule in ({}, {"baseline": 0.9}):
        logs.append(Log())
        callback = stopping(start_epoch=1.5, end_epoch=3.0, rule=rule)
        seed_everything(1, verbose=False)
        trainer = quiet_trainer(callbacks=[callback, logs[-1]], num_sanity_val_steps=0, max_epochs=2)
        trainer.fit(Scripted(0.9), shuffled(), plain())
    assert logs[0].losses == logs[1].losses


def test_stop_resumes_with_the_baseline_of_the_first_start(tmp_path: Path) -> None:
    def fit(resume: Path | None) -> Scripted:
        seed_everything(1, verbose=False)
        module = Scripted(*([0.9, 0.89, 0.89, 0.8, 0.8] if resume is None else [0.89, 0.8, 0.8]))
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callback = stopping(end_epoch=4.0)
        trainer = quiet_trainer(
            callbacks=[callback, saved], enable_checkpointing=True, max_epochs=6, num_sanity_val_steps=0
        )
        trainer.fit(module, shuffled(), plain(), ckpt_path=resume, weights_only=True)
        assert callback.current_amount == pytest.approx(0.45)
        return module

    whole = fit(None)
    resumed = fit(tmp_path / "epoch=0.ckpt")
    assert len(resumed.states) == len(whole.states) - 2  # the first epoch's, and that of the network that came in
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_stop_without_a_validation_is_an_error() -> None:
    callback = IterativePruningCallback(0.9, stop={"monitor": "val_acc", "max_drop": 0.05})
    with pytest.raises(ValueError, match="this fit has no validation"):
        quiet_trainer(callbacks=[callback]).fit(SmallModule(), shuffled())


def test_stop_names_the_metrics_there_are() -> None:
    callback = IterativePruningCallback(0.9, start_epoch=1.0, stop={"monitor": "val_f1", "max_drop": 0.05})
    with pytest.raises(ValueError, match=r"'val_f1', which validation did not log; it logged \["):
        run(callback)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1.2}, "amount is the fraction of the original to remove, 0 to 1; got 1.2"),
        ({"amount": 90}, "got 90"),
        ({"criterion": "magnitud"}, "criterion must be one of magnitude, .*got 'magnitud'"),
        ({"schedule": "cubik"}, "schedule must be one of .*got 'cubik'"),
        ({"scope": "everywhere"}, "scope must be 'global' or 'layer'; got 'everywhere'"),
        ({"granularity": "filter"}, "granularity must be 'weight' or 'neuron'; got 'filter'"),
        ({"criterion": "apoz"}, "needs granularity='neuron'"),
        ({"criterion": "apoz", "granularity": "neuron", "regrow": True}, "could bring none back"),
        ({"start_epoch": 3.0, "end_epoch": 2.0}, "end_epoch=2.0 must be later than start_epoch=3.0"),
        ({"start_epoch": -1.0}, "start_epoch must be 0 or later; got -1.0"),
        ({"every_n_steps": 0}, "every_n_steps must be a whole number, 1 or more, or None; got 0"),
        ({"stop": {"monitor": "a"}}, r"lacks \['max_drop'\]"),
        ({"stop": {"monitor": "a", "max_drop": 0.1, "patience": 3}}, r"unknown keys \['patience'\]"),
        ({"stop": {"monitor": "a", "max_drop": -0.1}}, "max_drop .*got -0.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IterativePruningCallback(**options)


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"target='decoder\.\*'.* selects no"):
        run(IterativePruningCallback(0.5, target="decoder.*"))


def test_a_network_path_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"network='backbone' is no submodule of SmallModule.*'net'"):
        run(IterativePruningCallback(0.5, granularity="neuron", network="backbone"))


def test_a_criterion_without_the_gradients_it_needs() -> None:
    with pytest.raises(ValueError, match=r"'taylor' needs gradients.*start_epoch must be > 0"):
        run(IterativePruningCallback(0.5, criterion="taylor", schedule="one_shot"))


def test_nan_scores_name_the_parameter() -> None:
    module = SmallModule()
    module.net.hidden.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN: .*net\.hidden\.weight"):
        run(IterativePruningCallback(0.5, schedule="one_shot"), module=module)


def test_a_checkpoint_from_other_settings(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    run(IterativePruningCallback(0.5), checkpoint, enable_checkpointing=True, max_epochs=1)
    trainer = quiet_trainer(callbacks=[IterativePruningCallback(0.8)])
    with pytest.raises(ValueError, match=r"other settings.*'amount': 0.5.*this run has.*'amount': 0.8"):
        trainer.fit(SmallModule(), shuffled(), plain(), ckpt_path=checkpoint.last_model_path, weights_only=True)


def test_two_callbacks_with_different_settings_live_in_one_trainer() -> None:
    first = IterativePruningCallback(0.5, target="net.hidden", end_epoch=1.0)
    second = IterativePruningCallback(0.25, target="net.head", end_epoch=2.0)
    logged: dict[str, float] = {}

    class Metrics(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    module = run(first, second, Metrics())
    assert (logged["compress/sparsity"], logged["compress/sparsity_2"]) == (0.5, 0.25)
    assert int((module.net.hidden.weight == 0).sum()) == 576
    assert int((module.net.head.weight == 0).sum()) == 12


def test_two_callbacks_that_share_a_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(amount=0\.5, .* and .*amount=0\.25, .* both prune net\.hidden"):
        run(IterativePruningCallback(0.5), IterativePruningCallback(0.25, target="net.hidden"))


def test_the_same_callback_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="two IterativePruningCallback with the same settings"):
        run(IterativePruningCallback(0.5), IterativePruningCallback(0.5))


def test_a_callback_that_pruned_another_module_is_refused() -> None:
    callback = IterativePruningCallback(0.5, end_epoch=1.0)
    run(callback, max_epochs=2)
    with pytest.raises(ValueError, match="compressed another module"):
        run(callback, module=SmallModule())


def test_lbfgs_is_refused() -> None:
    class Quasi(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="does not support LBFGS"):
        run(IterativePruningCallback(0.5), module=Quasi())


def test_sharded_strategies_are_refused_by_name() -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class FSDPStrategy(SingleDeviceStrategy):
        """Stands in for a strategy that a machine without several GPUs can't set up."""

    with pytest.raises(ValueError, match="does not support FSDPStrategy: use a single device"):
        run(IterativePruningCallback(0.5), strategy=FSDPStrategy(accelerator=None), accelerator="auto")


def test_the_old_namespace_is_refused_by_name() -> None:
    import pytorch_lightning

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(TypeError, match=r"comes from pytorch_lightning.*from `lightning.pytorch`"):
        IterativePruningCallback(0.5).setup(trainer, SmallModule(), "fit")  # type: ignore[arg-type]


def test_unstepped_raw_optimizers_are_refused_under_regrow() -> None:
    class Raw(ManualModule):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    with pytest.raises(RuntimeError, match="use_pl_optimizer=True"):
        run(IterativePruningCallback(0.5, regrow=True), module=Raw())


# ---------------------------------------------------------------------- fits that follow a fit, and odd ones


class Join(Callback):
    """Lets the hidden layer join the optimizer after two epochs, as BackboneFinetuning does."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net.hidden.parameters()), "lr": 0.05})


@pytest.mark.parametrize("regrow", [False, True])
def test_parameters_that_join_the_optimizer_during_the_fit_stay_masked(regrow: bool) -> None:
    class Late(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.net.conv.parameters(), *self.net.head.parameters()], lr=0.05, momentum=0.9)

    record = Record()
    pruning = IterativePruningCallback(0.8, end_epoch=1.0, regrow=regrow, target="net.*")
    run(pruning, Join(), record, module=Late(), max_epochs=5)
    assert record.zeros[-1] == round(0.8 * TARGETED)
    assert not torch.equal(record.weights[-1], record.weights[2 * EPOCH - 1])


def test_an_optimizer_that_is_exchanged_during_the_fit_is_followed() -> None:
    class Exchange(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                trainer.strategy.optimizers = [torch.optim.Adam(pl_module.parameters(), lr=1e-2)]

    class NoSchedule(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    record = Record()
    run(IterativePruningCallback(0.8, end_epoch=1.0), Exchange(), record, module=NoSchedule())
    assert record.zeros[-1] == round(0.8 * TARGETED)


def test_one_callback_resumes_from_an_earlier_checkpoint_as_a_new_one_does(tmp_path: Path) -> None:
    def save() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)

    options: dict[str, Any] = {"criterion": "taylor", "end_epoch": 3.0, "every_n_steps": 4}
    torch.manual_seed(0)
    callback, module = IterativePruningCallback(0.7, **options), SmallModule()
    quiet_trainer(callbacks=[callback, save()], enable_checkpointing=True).fit(module, shuffled(), plain())
    weights = []
    for resumed in (callback, IterativePruningCallback(0.7, **options)):
        trainer = quiet_trainer(callbacks=[resumed])
        trainer.fit(module, shuffled(), plain(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
        weights.append({name: value.clone() for name, value in module.state_dict().items()})
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])


def test_a_validation_of_a_checkpoint_changes_nothing_of_the_callback(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = IterativePruningCallback(0.8, end_epoch=3.0)
    module = SmallModule()
    trainer = quiet_trainer(callbacks=[callback, checkpoint], enable_checkpointing=True)
    trainer.fit(module, shuffled(), plain())
    final = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.validate(module, plain(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)
    module.load_state_dict(final)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled(), plain())
    assert callback.sparsity == pytest.approx(0.8, abs=1e-3)


def test_weights_that_were_loaded_behind_an_earlier_mask_are_not_cut_silently() -> None:
    callback, module = IterativePruningCallback(0.8, end_epoch=1.0), SmallModule()
    quiet_trainer(callbacks=[callback], max_epochs=2).fit(module, shuffled(), plain())
    module.load_state_dict(SmallModule().state_dict())
    with pytest.raises(ValueError, match="make a new callback"):
        quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, shuffled(), plain())


def test_the_learning_rate_finder_leaves_the_criterion_alone(tmp_path: Path) -> None:
    from lightning.pytorch.tuner import Tuner

    module = SmallModule("adam")
    module.lr = 1e-2
    callback = IterativePruningCallback(0.5, criterion="taylor", end_epoch=2.0, every_n_steps=4)
    trainer = quiet_trainer(callbacks=[callback], default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, shuffled(), plain(), num_training=8)
    trainer.fit(module, shuffled(), plain())  # a criterion without its statistic would fail an assertion
    assert callback.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("options", [{"start_epoch": 1.0}, {"start_epoch": 1.0, "schedule": "one_shot"}], ids=str)
def test_fast_dev_run_takes_ordinary_settings(options: dict[str, Any]) -> None:
    run(IterativePruningCallback(0.9, **options), fast_dev_run=True)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_channels_under_true_precisions(precision: Any) -> None:
    callback = IterativePruningCallback(0.5, granularity="neuron", end_epoch=1.0)
    run(callback, precision=precision, max_epochs=2)
    assert callback.sparsity == pytest.approx(0.5, abs=0.05)


def test_the_default_ramp_of_two_optimizers_ends_within_max_steps() -> None:
    callback = IterativePruningCallback(0.5, every_n_steps=1)
    run(callback, module=ManualModule(), max_steps=24)
    assert callback.finished


def test_taylor_counts_each_step_for_the_parameters_of_its_optimizer_alone() -> None:
    from lightning_compress.pruning.criteria.weights import Taylor

    counts: list[dict[str, int]] = []

    class Count(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            statistic = callback._criterion.statistic
            assert isinstance(statistic, Taylor)
            counts.append(dict(statistic.counts))

    callback = IterativePruningCallback(0.5, criterion="taylor", start_epoch=0.5, end_epoch=3.0, every_n_steps=100)
    run(callback, Count(), module=ManualModule(), max_epochs=2)
    assert set(counts[0].values()) == {2 * EPOCH - EPOCH // 2}  # one per batch since the ramp's start


def test_optimizers_that_exchange_weights_themselves_are_refused() -> None:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    class Free(SmallModule):
        def configure_optimizers(self) -> Any:
            return ScheduleFree(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="does not support ScheduleFree"):
        run(IterativePruningCallback(0.5), module=Free())


def test_a_module_without_forward_needs_the_path_of_its_network() -> None:
    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = SmallModule().net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"Bare has no forward .*network="):
        quiet_trainer(callbacks=[IterativePruningCallback(0.5, granularity="neuron")]).fit(Bare(), shuffled())
    named = IterativePruningCallback(0.5, granularity="neuron", network="net", end_epoch=1.0)
    quiet_trainer(callbacks=[named], max_epochs=2).fit(Bare(), shuffled())
    assert named.sparsity == pytest.approx(0.5, abs=0.05)


def test_a_weight_shared_with_an_embedding_keeps_its_channels() -> None:
    class Tied(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(CLASSES, 8), nn.Linear(12, 8)
            self.head = nn.Linear(8, CLASSES, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.body(x)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Tied()
    callback = IterativePruningCallback(0.5, granularity="neuron", end_epoch=1.0, shrink="never")
    quiet_trainer(callbacks=[callback], max_epochs=2).fit(module, shuffled())
    assert (module.body.weight == 0).all(1).sum() == 4
    assert (module.table.weight != 0).all()


# ---------------------------------------------------------------------- compiled, wrapped, iterated


class Unlogged(SmallModule):
    """Dynamo can't trace `self.log` in this version of Lightning, with or without us."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_a_compiled_module(granularity: Any) -> None:
    torch.manual_seed(0)
    module = Unlogged()
    callback = IterativePruningCallback(0.5, granularity=granularity, end_epoch=1.0)
    quiet_trainer(callbacks=[callback], max_epochs=2).fit(torch.compile(module, backend="eager"), shuffled(), plain())
    compiled = {name: value.clone() for name, value in module.state_dict().items()}

    torch.manual_seed(0)
    module = Unlogged()
    again = IterativePruningCallback(0.5, granularity=granularity, end_epoch=1.0)
    quiet_trainer(callbacks=[again], max_epochs=2).fit(module, shuffled(), plain())
    for name, value in module.state_dict().items():
        assert torch.allclose(value, compiled[name], atol=1e-5)


def test_a_criterion_that_compilation_hides_is_refused() -> None:
    callback = IterativePruningCallback(0.5, granularity="neuron", criterion="apoz", end_epoch=1.0)
    with pytest.raises(ValueError, match=r"\(criterion='apoz'\) works by hooks on layers inside the forward pass"):
        quiet_trainer(callbacks=[callback]).fit(torch.compile(SmallModule(), backend="eager"), shuffled(), plain())


def test_a_loader_without_length_needs_steps() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            data = plain().dataset.tensors
            while True:
                yield data[0][0], data[1][0]

    loader = torch.utils.data.DataLoader(Endless(), batch_size=BATCH)
    torch.manual_seed(0)
    callback = IterativePruningCallback(0.5, every_n_steps=5)
    quiet_trainer(callbacks=[callback], max_epochs=-1, max_steps=30).fit(SmallModule(), loader)
    assert callback.sparsity == pytest.approx(0.5, abs=1e-3)
    late = IterativePruningCallback(0.5, every_n_steps=5, start_epoch=1.0)
    trainer = quiet_trainer(callbacks=[late], max_epochs=-1, max_steps=30)
    with pytest.raises(ValueError, match="loader has no length"):
        trainer.fit(SmallModule(), loader)


def test_no_warning_in_an_ordinary_fit() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(IterativePruningCallback(0.5))
    assert [str(w.message) for w in caught if "lightning_compress" in str(w.filename)] == []
