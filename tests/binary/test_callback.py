from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from support.compare import differences
from support.jobs import fit
from support.ranks import RankPair
from support.small import BATCH, SAMPLES, ManualModule, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import (
    BinaryWeightsCallback,
    GroupLassoCallback,
    IterativePruningCallback,
    WeightClusteringCallback,
)
from lightning_compress.binary.inputs import binarize_inputs, has_binary_inputs

EPOCH = SAMPLES // BATCH
LAYERS = ("net.conv.weight", "net.hidden.weight", "net.head.weight")


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: module.get_parameter(name).detach().clone() for name in LAYERS}


class Record(Callback):
    """Looks at the module as a user's own callback would, after batches and in validations."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.trained.append(weights(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(weights(pl_module))


def run(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = module or SmallModule(activation=F.hardtanh)
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, shuffled(), plain())
    return module


def is_signs(tensors: dict[str, Tensor]) -> bool:
    return all(set(tensor.unique().tolist()) <= {-1.0, 1.0} for tensor in tensors.values())


# ---------------------------------------------------------------------- what the network computes with


class Line(LightningModule):
    """A linear model, for which BinaryConnect is written out by hand."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.make_optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.05),
}


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaling", ["none", "mean"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_against_training_real_weights_by_autograd(
    optimizer: str, scaling: Any, accumulate: int, clip_norm: float | None
) -> None:
    """The oracle's parameter is the real weight; autograd goes through the binary one as written out here.

    In float64, so that sums in another order flip no sign of a real weight near 0, which would part the two for good.
    """
    torch.manual_seed(3)
    module = Line(OPTIMIZERS[optimizer]).double()
    real = nn.Parameter(module.layer.weight.detach().clone())
    bias = nn.Parameter(module.layer.bias.detach().clone())
    binary = BinaryWeightsCallback(scaling=scaling, lr_scale="glorot")
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip_norm}
    quiet_trainer(callbacks=[binary], max_epochs=2, precision="64-true", **options).fit(module, plain(0))

    by_hand = OPTIMIZERS[optimizer]([real, bias])
    for _ in range(2):
        for batch, (x, y) in enumerate(plain(0), start=1):
            x = x.double()
            weight = real + (torch.where(real >= 0, 1.0, -1.0) - real).detach()  # |real| <= 1
            if scaling == "mean":
                weight = weight * real.abs().mean(1, keepdim=True)
            (F.cross_entropy(F.linear(x, weight, bias), y) / accumulate).backward()
            if batch % accumulate == 0:
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_([real, bias], clip_norm)
                before = real.detach().clone()
                by_hand.step()
                by_hand.zero_grad()
                real.data = (before + (real.data - before) * (15 / 1.5) ** 0.5).clamp(-1, 1)
    assert torch.allclose(binary.latent["layer.weight"], real, rtol=0, atol=1e-10)
    assert torch.allclose(module.layer.bias, bias, rtol=0, atol=1e-10)
    assert torch.equal(module.layer.weight.sign(), torch.where(real >= 0, 1.0, -1.0))


@pytest.mark.parametrize("start_epoch", [0.0, 1.5])
@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_weights_are_binary_from_the_start_epoch_on(mode: Any, start_epoch: float) -> None:
    record = Record()
    module = run(BinaryWeightsCallback(mode, start_epoch=start_epoch), record)
    start = round(start_epoch * EPOCH)
    assert [is_signs(seen) for seen in record.trained] == [step >= start for step in range(4 * EPOCH)]
    assert not is_signs({"bias": module.net.hidden.bias})
    assert differences(record.trained[start], record.trained[-1]) != []  # they train on


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 4, "accumulate_grad_batches": 3}], ids=str)
def test_samples_train_and_signs_are_validated_and_saved(options: dict[str, Any], tmp_path: Path) -> None:
    record, checkpoint = Record(), ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    binary = BinaryWeightsCallback("stochastic")
    torch.manual_seed(0)
    module = SmallModule()
    trainer = quiet_trainer(callbacks=[binary, record, checkpoint], enable_checkpointing=True, **options)
    trainer.fit(module, shuffled(), plain())
    steps = 4 * EPOCH // options.get("accumulate_grad_batches", 1)
    different = [differences(a, b) != [] for a, b in zip(record.trained, record.trained[1:], strict=False)]
    assert sum(different) == steps - 1  # a new sample for every step, and the old one after a validation

    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == steps // 5
    for path in saved:
        content = torch.load(path, weights_only=True)
        state = next(state for key, state in content["callbacks"].items() if "Binary" in key)["technique"]["weights"]
        for name in LAYERS:
            assert torch.equal(content["state_dict"][name], torch.where(state["latent"][name] >= 0, 1.0, -1.0))
    signs = {name: torch.where(value >= 0, 1.0, -1.0) for name, value in binary.latent.items()}
    assert differences(record.validated[-1], signs) == []
    assert differences(weights(module), signs) == []
    assert differences(record.trained[-1], signs) != []


class KeepsTheBest(SmallModule):
    """Keeps the weights that did best in a validation, by hand, and loads them at the fit's end."""

    best, loss = None, float("inf")

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking and self.trainer.callback_metrics["val_loss"] < self.loss:
            self.loss = float(self.trainer.callback_metrics["val_loss"])
            self.best = copy.deepcopy(self.state_dict())

    def on_train_end(self) -> None:
        self.load_state_dict(self.best)


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_what_other_code_keeps_after_a_validation_is_what_was_validated(mode: Any) -> None:
    torch.manual_seed(0)
    module = KeepsTheBest()
    trainer = quiet_trainer(callbacks=[BinaryWeightsCallback(mode)])
    trainer.fit(module, shuffled(), plain())
    assert trainer.validate(module, plain(), verbose=False)[0]["val_loss"] == pytest.approx(module.loss)


def test_the_network_draws_what_it_drew_without_us() -> None:
    """Samples come from a generator of their own, so that dropout and shuffling stay what they were."""
    states = []
    for callbacks in ([], [BinaryWeightsCallback("stochastic")]):
        run(*callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_real_weights_can_be_tested_apart_from_binary_ones() -> None:
    binary = BinaryWeightsCallback("stochastic")
    module = run(binary)
    before = weights(module)
    trainer = quiet_trainer(callbacks=[binary])
    with binary.real_weights(module):
        assert differences(weights(module), binary.latent) == []
        real = trainer.test(module, plain(), verbose=False)[0]["test_acc"]
    assert differences(weights(module), before) == []
    one_bit = trainer.test(module, plain(), verbose=False)[0]["test_acc"]
    assert real != one_bit

    with (
        pytest.raises(ValueError, match="has not made the weights of this module binary"),
        binary.real_weights(SmallModule()),
    ):
        pass
    module.net.head.weight.data *= -1
    with (
        pytest.raises(ValueError, match="no longer holds the values of this fit's real weights"),
        binary.real_weights(module),
    ):
        pass


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_precisions(mode: Any, precision: Any) -> None:
    assert is_signs(weights(run(BinaryWeightsCallback(mode), precision=precision, max_epochs=2)))


def test_a_parameter_without_gradient_keeps_its_signs() -> None:
    module = SmallModule()
    module.net.hidden.weight.requires_grad_(False)
    signs = module.net.hidden.weight.detach().sign()
    run(BinaryWeightsCallback(target="net.*"), module=module)
    assert torch.equal(module.net.hidden.weight.detach(), signs)


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    class Tied(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(16, 3)
            self.other.weight = self.net.head.weight

    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=5)
    run(BinaryWeightsCallback("stochastic"), checkpoint, module=Tied(), enable_checkpointing=True)
    state = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert torch.equal(state["other.weight"], state["net.head.weight"])
    assert is_signs({"other": state["other.weight"]})


# ---------------------------------------------------------------------- binary inputs


class Seen(Callback):
    """How many different inputs each layer got."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for name in ("conv", "hidden", "head"):
            getattr(pl_module.net, name).register_forward_hook(
                lambda _, args, __, name=name: self.counts.update({name: len(args[0].unique())})
            )


def test_inputs_are_binary_in_the_fit_and_after_it_and_in_another_process(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    settings: dict[str, Any] = {"scaling": "mean", "activations": True, "start_epoch": 1.0}
    module = run(BinaryWeightsCallback(**settings), Seen(), checkpoint, enable_checkpointing=True)
    keys = list(SmallModule().state_dict())
    assert list(module.state_dict()) == keys
    x = next(iter(plain()))[0]
    expected = module.eval()(x)

    loaded = SmallModule(activation=F.hardtanh).eval()
    loaded.load_state_dict(torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"])
    assert not torch.equal(loaded(x), expected)
    seen = Seen()
    trainer = quiet_trainer(callbacks=[BinaryWeightsCallback(**settings), seen])
    trainer.test(loaded, plain(), verbose=False)  # what a later process does with the callback
    assert {name: count <= 2 for name, count in seen.counts.items()} == {"conv": False, "hidden": True, "head": True}
    assert torch.equal(loaded.eval()(x), expected)

    loaded = SmallModule(activation=F.hardtanh).eval()
    loaded.load_state_dict(torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"])
    binarize_inputs(loaded, scale=True)  # and without one
    assert torch.equal(loaded(x), expected)

    real = SmallModule(activation=F.hardtanh)
    with pytest.warns(UserWarning, match=r"The weights of net\.conv\.weight, .* are not all binary"):
        trainer.test(real, plain(), verbose=False)
    assert not any(map(has_binary_inputs, real.modules()))


def test_a_relu_before_a_binary_layer_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"The inputs of net\.hidden are never negative"):
        run(BinaryWeightsCallback(activations=True), module=SmallModule())


def test_inputs_of_a_compiled_module_are_refused() -> None:
    module = SmallModule(activation=F.hardtanh)
    module.net.head = torch.compile(module.net.head, backend="eager")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"\(activations=True\) works by hooks.* torch\.compile hides"):
        run(BinaryWeightsCallback(activations=True), module=module)


# ---------------------------------------------------------------------- with other techniques


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_pruned_weights_stay_zero_and_the_others_are_binary(criterion: Any, mode: Any, order: int) -> None:
    pruning = IterativePruningCallback(0.6, criterion=criterion, end_epoch=1.5, every_n_steps=3)
    binary = BinaryWeightsCallback(mode, start_epoch=2.0 if criterion == "magnitude" else 0.5)
    record, zeros = Record(), []

    class Count(Callback):
        def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            masked = sum(int((~mask).sum()) for mask in pruning.masks.values())
            zeros.append((masked, sum(int((value == 0).sum()) for value in weights(pl_module).values())))

    module = run(*[pruning, binary][::order], record, Count())
    assert all(masked == zero for masked, zero in zeros)  # right after an event too, before the next step
    total = sum(module.get_parameter(name).numel() for name in LAYERS)
    for seen in [*record.trained[2 * EPOCH :], record.validated[-1], weights(module)]:
        assert sum(int((value == 0).sum()) for value in seen.values()) == round(0.6 * total)
        assert all(set(value.unique().tolist()) <= {-1, 0, 1} for value in seen.values())
    for name in LAYERS:
        assert torch.equal(pruning.masks[name], module.get_parameter(name) != 0)
        assert not binary.latent[name][~pruning.masks[name]].any()


def test_a_network_pruned_before_becomes_ternary() -> None:
    module = SmallModule()
    module.net.hidden.weight.data[:, ::2] = 0.0
    run(BinaryWeightsCallback(), module=module)
    assert not module.net.hidden.weight[:, ::2].any()
    assert is_signs({"rest": module.net.hidden.weight.detach()[:, 1::2]})


@pytest.mark.parametrize("order", [1, -1])
def test_pruning_by_values_that_are_all_the_same_is_refused(order: int) -> None:
    callbacks = [IterativePruningCallback(0.5, end_epoch=2.0), BinaryWeightsCallback(start_epoch=1.0)]
    with pytest.raises(ValueError, match=r"IterativePruningCallback\(criterion='magnitude'\) still prunes net\.conv\."):
        run(*callbacks[::order])
    run(IterativePruningCallback(0.5, target="net.head"), BinaryWeightsCallback(exclude="net.head"))
    stop = {"monitor": "val_acc", "max_drop": 0.5}
    with pytest.raises(ValueError, match=r"IterativePruningCallback\(stop=\) still prunes"):
        run(IterativePruningCallback(0.5, criterion="taylor", stop=stop), BinaryWeightsCallback())


def test_what_does_not_go_with_binary_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"IterativePruningCallback\(regrow=True\) trains latent values"):
        run(IterativePruningCallback(0.5, regrow=True), BinaryWeightsCallback())
    with pytest.raises(ValueError, match=r"GroupLassoCallback pulls groups of net\.conv\.weight"):
        run(BinaryWeightsCallback(), GroupLassoCallback(0.1, proximal=True))
    with pytest.raises(ValueError, match=r"GroupLassoCallback pulls groups of net\.conv\.weight.* to zero"):
        run(BinaryWeightsCallback(), GroupLassoCallback(0.1))
    run(BinaryWeightsCallback(target="net.head"), GroupLassoCallback(0.1, target="net.hidden"), max_epochs=1)


@pytest.mark.parametrize("order", [1, -1])
def test_clustering_the_same_weights_is_refused_and_others_are_not(order: int) -> None:
    with pytest.raises(
        ValueError, match=r"\w+Callback and \w+Callback both set the values of net\.head\.weight: use one of them"
    ):
        run(*[WeightClusteringCallback(3, target="net.head"), BinaryWeightsCallback()][::order])
    callbacks = [
        WeightClusteringCallback(3, target="net.head"),
        BinaryWeightsCallback(target="net.hidden"),
    ]
    module = run(*callbacks[::order])
    assert len(module.net.head.weight.unique()) <= 3
    assert is_signs({"hidden": module.net.hidden.weight})


# ---------------------------------------------------------------------- ranks


def test_ranks_that_resume_from_one_process_draw_the_same_samples(rank_pair: RankPair, tmp_path: Path) -> None:
    """The checkpoint has the random states of rank 0 alone."""
    fit("binary-stochastic", folder=tmp_path)
    resume = str(tmp_path / f"step={2 * EPOCH}.ckpt")
    first, second = rank_pair.run("support.jobs:fit_on_ranks", tmp_path, entry="binary-stochastic", resume=resume)
    for part in ("latent", "positive"):
        assert differences(first["techniques"][0]["weights"][part], second["techniques"][0]["weights"][part]) == []


# ---------------------------------------------------------------------- averages


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_averages_are_made_of_signs_and_validated_and_saved_as_signs(mode: Any, tmp_path: Path) -> None:
    record, checkpoint = Record(), ModelCheckpoint(tmp_path, save_last=True)
    average, binary = EMAWeightAveraging(decay=0.8), BinaryWeightsCallback(mode)
    averages: list[dict[str, Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            expected = weights(pl_module)
            for name in LAYERS if averages else ():
                expected[name] = 0.8 * averages[-1][name] + 0.2 * expected[name]
            averages.append(expected)

    module = run(average, binary, Watch(), record, checkpoint, enable_checkpointing=True)
    signs = {name: torch.where(value >= 0, 1.0, -1.0) for name, value in averages[-1].items()}
    far = {name: averages[-1][name].abs() > 1e-4 for name in LAYERS}
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    for result in (weights(module), record.validated[-1], saved):
        for name in LAYERS:
            assert torch.equal(result[name][far[name]], signs[name][far[name]])
    assert differences(record.trained[-1], record.validated[-1]) != []
    assert sum(int((~mask).sum()) for mask in far.values()) < 20
    with pytest.raises(ValueError, match="StochasticWeightAveraging"):
        run(StochasticWeightAveraging(swa_lrs=0.1), BinaryWeightsCallback())


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_a_resume_with_averages_is_exact(mode: Any, tmp_path: Path) -> None:
    results = []
    for resume in (None, tmp_path / "step=24.ckpt"):
        torch.manual_seed(1)
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        module, binary = SmallModule(), BinaryWeightsCallback(mode)
        callbacks = [EMAWeightAveraging(decay=0.8), binary, checkpoint]
        trainer = quiet_trainer(callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, plain(0), plain(), ckpt_path=resume, weights_only=True)
        results.append({"module": dict(module.state_dict()), "latent": binary.latent})
    assert differences(*results) == []


# ---------------------------------------------------------------------- fits, checkpoints


def test_a_second_fit_goes_on_from_the_real_weights() -> None:
    binary = BinaryWeightsCallback()
    module = run(binary, max_epochs=1)
    before = {name: value.clone() for name, value in binary.latent.items()}
    record = Record()
    quiet_trainer(callbacks=[binary, record], max_epochs=1).fit(module, plain(0))
    assert is_signs(record.trained[0])
    moved = torch.cat([(binary.latent[name] - before[name]).abs().flatten() for name in LAYERS]).median()
    assert 0 < moved < 0.5  # signs taken for real weights, which are small, would move most by nearly 1
    assert not is_signs(binary.latent)
    module.load_state_dict(SmallModule().state_dict())
    with pytest.raises(ValueError, match="no longer holds the binary weights of an earlier fit"):
        quiet_trainer(callbacks=[binary], max_epochs=1).fit(module, plain(0))


def test_one_callback_goes_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    binary = BinaryWeightsCallback("stochastic", start_epoch=2.0)
    module = run(binary, save, enable_checkpointing=True)
    whole = {"module": weights(module), "latent": {name: value.clone() for name, value in binary.latent.items()}}
    for epoch in (0, 2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        quiet_trainer(callbacks=[binary]).fit(module, shuffled(), plain(), ckpt_path=path, weights_only=True)
        assert differences(whole, {"module": weights(module), "latent": binary.latent}) == []


def test_a_dense_epoch_does_not_win_best(tmp_path: Path) -> None:
    class Dense(SmallModule):
        def on_validation_epoch_end(self) -> None:
            self.log("values", float(len(self.net.hidden.weight.unique())))

    checkpoint = ModelCheckpoint(tmp_path, monitor="values", mode="max")
    run(BinaryWeightsCallback(start_epoch=2.0), checkpoint, module=Dense(), enable_checkpointing=True)
    assert float(checkpoint.best_model_score) == 2


def test_other_weights_loaded_after_a_fit_are_saved_as_they_are(tmp_path: Path) -> None:
    binary = BinaryWeightsCallback("stochastic")
    torch.manual_seed(0)
    module, trainer = SmallModule(), quiet_trainer(callbacks=[binary], max_epochs=1)
    trainer.fit(module, shuffled())
    module.net.head.weight.data.fill_(0.5)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    saved = torch.load(tmp_path / "mine.ckpt", weights_only=True)["state_dict"]
    assert (saved["net.head.weight"] == 0.5).all()


def test_an_interrupted_fit_leaves_signs_behind() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("the lights went out")

    binary, module = BinaryWeightsCallback("stochastic"), SmallModule()
    with pytest.raises(RuntimeError, match="lights"):
        run(binary, Stop(), module=module)
    assert differences(weights(module), {n: torch.where(v >= 0, 1.0, -1.0) for n, v in binary.latent.items()}) == []


def test_a_callback_that_has_fitted_can_be_sent_to_another_process() -> None:
    binary = BinaryWeightsCallback("stochastic")
    run(binary, max_epochs=1)
    assert differences(pickle.loads(pickle.dumps(binary)).latent, binary.latent) == []


def test_progress_is_logged() -> None:
    logged: dict[str, float] = {}

    class Metrics(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    first, second = BinaryWeightsCallback(target="net.hidden", clip=0.05), BinaryWeightsCallback(target="net.head")
    run(first, second, Metrics(), max_epochs=1)
    bound = first.latent["net.hidden.weight"].abs()
    assert bound.max() == pytest.approx(0.05)
    assert logged["compress/saturated"] == pytest.approx(float((bound >= 0.05).float().mean()))
    assert logged["compress/saturated"] > 0 == logged["compress/saturated_2"]


def test_real_weights_that_are_no_numbers_stop_the_fit() -> None:
    class Broken(SmallModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 3:
                for group in self.trainer.optimizers[0].param_groups:
                    group["lr"] = float("nan")

    with pytest.raises(ValueError, match=r"NaN or infinite: 18 of 18 real values of net\.conv\.weight\. Look"):
        run(BinaryWeightsCallback(), module=Broken())


def test_a_fit_that_ends_before_the_start_says_so() -> None:
    with pytest.warns(
        UserWarning,
        match=r"ended at step 12, before weights were binary at step 24: use an earlier start_epoch than 2\.0",
    ):
        run(BinaryWeightsCallback(start_epoch=2.0), max_epochs=1)


def test_unannounced_steps_are_refused() -> None:
    class Raw(ManualModule):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    with pytest.raises(RuntimeError, match="use_pl_optimizer=True"):
        run(BinaryWeightsCallback(), module=Raw())


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ternary"}, "mode must be 'deterministic' or 'stochastic'; got 'ternary'"),
        ({"scaling": "max"}, r"scaling must be 'none' or 'mean' \(of \|w\|, per output channel\); got 'max'"),
        ({"lr_scale": "he"}, "lr_scale must be 'none' or 'glorot'; got 'he'"),
        ({"clip": 0.0}, "clip must be a number above 0, or None; got 0.0"),
        ({"clip": float("nan")}, "got nan"),
        ({"start_epoch": -1.0}, "start_epoch must be 0 or later; got -1.0"),
        ({"mode": "stochastic", "scaling": "mean"}, "scaling='mean' does not go with mode='stochastic'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryWeightsCallback(**options)


def test_binarizing_the_same_weights_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Binary.* and Binary.* both set the values of net\.head\.weight: use"):
        run(BinaryWeightsCallback(target="net.head"), BinaryWeightsCallback())
