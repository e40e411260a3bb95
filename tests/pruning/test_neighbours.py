"""Two pruning callbacks in one fit, of which one takes channels out of tensors that the other has masked."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support.compare import differences
from support.small import SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import IterativePruningCallback
from lightning_compress.channels.cut import shrink
from lightning_compress.channels.find import channel_groups
from lightning_compress.pruning import remover
from lightning_compress.pruning.masks import prune_weights

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).double()
HIDDEN, READ_PER_CHANNEL = 72 * 16, 12 * 16  # weights of net.hidden, and those that read one of the six conv channels


class Exact(SmallModule):
    """In double precision and without dropout or decay: what is silent makes no difference to the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.net.dropout.p = 0.0
        self.double()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0].double()), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def channels(target: str = "net.conv", epoch: float = 1.0, **options: Any) -> IterativePruningCallback:
    settings: dict[str, Any] = {"granularity": "neuron", "target": target, "shrink": "during_fit"} | options
    return IterativePruningCallback(0.5, schedule="one_shot", start_epoch=epoch, example_inputs=X, **settings)


def weights(epoch: float = 2.0, amount: float = 0.8, **options: Any) -> IterativePruningCallback:
    settings: dict[str, Any] = {"schedule": "one_shot", "start_epoch": epoch} | options
    return IterativePruningCallback(amount, **({"target": ["net.hidden", "net.head"]} | settings))


def fit(*callbacks: Callback, module: LightningModule | None = None, **options: Any) -> Any:
    seed_everything(1, verbose=False)
    module = Exact() if module is None else module
    quiet_trainer(callbacks=list(callbacks), **options).fit(module, shuffled(), plain())
    return module


def assert_same_but_thin(thin: nn.Module, masked: nn.Module) -> None:
    shrink(masked, X)
    for (name, one), other in zip(thin.state_dict().items(), masked.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


def check_masks(callback: IterativePruningCallback, module: nn.Module) -> None:
    for name, mask in callback.masks.items():
        assert mask.shape == module.get_parameter(name).shape
        assert not module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("first", ["weights", "channels"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "ewc", "mas"])
def test_what_was_seen_before_the_cut_counts_after_it(
    criterion: Any, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what the statistic sees comes before the cut, and what left counts as dropped."""
    seen: list[dict[str, Tensor]] = []

    def spy(scores: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: score.clone() for name, score in scores.items()})
        return prune_weights(scores, *args, **kwargs)

    monkeypatch.setattr("lightning_compress.pruning.callback.prune_weights", spy)
    modules, pruners = [], []
    for moment in ("never", "during_fit"):
        pair = [weights(criterion=criterion, every_n_steps=18), channels(shrink=moment)]
        modules.append(fit(*(pair if first == "weights" else reversed(pair)), max_steps=24))
        pruners.append(pair[0])
        check_masks(pair[0], modules[-1])
    left = (modules[0].net.conv.weight.flatten(1) != 0).any(1).repeat_interleave(12)
    whole, thin = seen
    whole["net.hidden.weight"][:, ~left] = -1.0  # what has left counts as dropped first
    torch.testing.assert_close(thin["net.hidden.weight"], whole["net.hidden.weight"][:, left], rtol=1e-9, atol=0)
    torch.testing.assert_close(thin["net.head.weight"], whole["net.head.weight"], rtol=1e-9, atol=0)
    together = torch.cat([one.flatten() for one in whole.values()])
    threshold = together.sort().values[round(0.8 * len(together))]
    for name, mask in pruners[1].masks.items():
        assert torch.equal(mask, thin[name] >= threshold)
    assert pruners[1].sparsity == pytest.approx(0.8, abs=1 / HIDDEN)


@pytest.mark.parametrize("regrow", [False, True])
def test_masks_and_latent_values_are_cut_with_their_tensors(regrow: bool) -> None:
    modules, pruners = [], []
    for moment in ("never", "during_fit"):
        pruners.append(weights(1.0, regrow=regrow))
        modules.append(fit(pruners[-1], channels(epoch=2.0, shrink=moment)))
    left = (modules[0].net.conv.weight.flatten(1) != 0).any(1).repeat_interleave(12)
    for part in ("masks", "_latent") if regrow else ("masks",):
        kept, thin = (one.masks if part == "masks" else one._masked.latent for one in pruners)
        torch.testing.assert_close(thin["net.hidden.weight"], kept["net.hidden.weight"][:, left], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(thin["net.head.weight"], kept["net.head.weight"], rtol=1e-9, atol=1e-9)
    assert_same_but_thin(modules[1], modules[0])


def test_the_amount_is_of_the_original() -> None:
    class Count(Callback):
        def __init__(self) -> None:
            self.alive: list[int] = []

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.alive.append(int((pl_module.net.hidden.weight != 0).sum()))

    count = Count()
    ramp: dict[str, Any] = {"schedule": "linear", "start_epoch": 0.0, "end_epoch": 4.0, "target": "net.hidden"}
    pruner = weights(amount=0.8, **ramp)
    fit(channels(epoch=1.0), pruner, count)
    # After epoch 1 a fifth would be gone; half has left instead, and counts until the ramp asks for more.
    expected = [HIDDEN - 3 * READ_PER_CHANNEL, HIDDEN - 3 * READ_PER_CHANNEL, round(0.4 * HIDDEN), round(0.2 * HIDDEN)]
    assert count.alive == pytest.approx(expected, abs=1)
    assert pruner.sparsity == pytest.approx(0.8, abs=1 / HIDDEN)


@pytest.mark.parametrize("criterion", ["magnitude", "obd", "si"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_criterion_goes_on(criterion: Any, scope: Any) -> None:
    ramp: dict[str, Any] = {"schedule": "cubic", "start_epoch": 0.5, "end_epoch": 3.0, "every_n_steps": 5}
    pruner = weights(criterion=criterion, scope=scope, **ramp)
    module = fit(channels(), pruner)
    assert pruner.sparsity == pytest.approx(0.8, abs=2 / HIDDEN)
    check_masks(pruner, module)


def test_a_resume_is_exact(tmp_path: Path) -> None:
    def callbacks() -> list[IterativePruningCallback]:
        ramp: dict[str, Any] = {"schedule": "linear", "start_epoch": 0.0, "end_epoch": 3.0, "every_n_steps": 5}
        return [weights(criterion="taylor", **(ramp | {"start_epoch": 0.5})), channels(epoch=1.25)]

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    whole = fit(*callbacks(), checkpoint, enable_checkpointing=True)
    again, resumed = callbacks(), Exact()
    trainer = quiet_trainer(callbacks=again)
    trainer.fit(resumed, shuffled(), plain(), ckpt_path=tmp_path / "step=24.ckpt", weights_only=True)
    assert resumed.net.hidden.weight.shape == (16, 36)
    assert differences(dict(whole.state_dict()), dict(resumed.state_dict())) == []
    assert again[0].sparsity == pytest.approx(0.8, abs=1 / HIDDEN)


def test_channels_that_leave_at_the_fits_end_leave_the_masks_too(tmp_path: Path) -> None:
    pruner, remover = weights(1.0), channels(epoch=2.0, shrink="on_fit_end")
    average = EMAWeightAveraging(decay=0.5)
    seed_everything(1, verbose=False)
    module, trainer = Exact(), quiet_trainer(callbacks=[average, pruner, remover])
    trainer.fit(module, shuffled(), plain())
    assert pruner.masks["net.hidden.weight"].shape == (16, 36)
    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    quiet_trainer(callbacks=[pruner, remover], max_epochs=1).fit(module, shuffled(), plain())
    check_masks(pruner, module)

    again = weights(1.0)
    resumed = Exact()
    trainer = quiet_trainer(callbacks=[EMAWeightAveraging(decay=0.5), again, channels(epoch=2.0, shrink="on_fit_end")])
    trainer.fit_loop.max_epochs = 5
    trainer.fit(resumed, shuffled(), plain(), ckpt_path=tmp_path / "thin.ckpt", weights_only=True)
    check_masks(again, resumed)
    assert again.masks["net.hidden.weight"].shape == (16, 36)


def test_a_dense_network_that_was_loaded_back_does_not_fit_the_masks() -> None:
    pruner, module = weights(1.0), Exact()
    wide = copy.deepcopy(module.state_dict())
    fit(pruner, channels(epoch=2.0), module=module)
    module.load_state_dict(wide)
    with pytest.raises(ValueError, match=r"net\.hidden\.weight has shape \(16, 72\).*ended with \(16, 36\)"):
        fit(pruner, module=module, max_epochs=1)


# ---------------------------------------------------------------------- two that take channels out


@pytest.mark.parametrize("first", ["conv", "hidden"])
def test_channels_of_neighbouring_layers_leave_by_two_callbacks(first: str) -> None:
    modules = []
    for moments in (("never", "never"), ("during_fit", "during_fit"), ("during_fit", "on_fit_end")):
        pair = [
            channels("net.conv", 1.0, criterion="taylor", shrink=moments[0]),
            channels("net.hidden", 2.0, criterion="taylor", shrink=moments[1], every_n_steps=18),
        ]
        modules.append(fit(*(pair if first == "conv" else reversed(pair))))
    masked, *thin = modules
    counts = torch._dynamo.testing.CompileCounter()
    torch.compile(lambda x: x + 1, backend=counts)(torch.zeros(2))  # code that no other test has compiled
    assert counts.frame_count == 1  # what was watched while the other one cut left torch.compile as it was
    for module in thin:
        assert (module.net.conv.out_channels, module.net.hidden.out_features) == (3, 8)
        assert_same_but_thin(module, copy.deepcopy(masked))


class Branches(nn.Module):
    """Two layers whose channels lie side by side in what the last one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(12, 6), nn.Linear(12, 8), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).relu(), self.right(x).relu()], 1))


@pytest.mark.parametrize("moment", ["during_fit", "on_fit_end"])
def test_channels_that_share_a_dimension_leave_by_two_callbacks(moment: str) -> None:
    modules = []
    for each in ("never", moment):
        module = Exact()
        torch.manual_seed(3)
        module.net = Branches().double()  # type: ignore[assignment]
        pair = [channels(f"net.{side}", 1.0 + i, shrink=each) for i, side in enumerate(("left", "right"))]
        modules.append(fit(*pair, module=module))
    masked, thin = modules
    assert (thin.net.left.out_features, thin.net.right.out_features) == (3, 4)
    assert_same_but_thin(thin, masked)


# ---------------------------------------------------------------------- no way back


@pytest.mark.parametrize("options", [{"shrink": "during_fit"}, {"shrink": "on_fit_end"}])
def test_going_back_past_a_cut_is_refused(options: dict[str, Any]) -> None:
    stopping = weights(1.0, stop={"monitor": "val_acc", "max_drop": 0.5})
    with pytest.raises(ValueError, match=r"may restore an earlier network.*shrink='.*put it after"):
        fit(channels(**options), stopping, module=SmallModule())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_inputs = {"example_inputs": X.float()}
        late = IterativePruningCallback(0.5, granularity="neuron", target="net.conv", end_epoch=2.0, **float_inputs)
        module = fit(weights(1.0, stop={"monitor": "val_acc", "max_drop": 0.9}), late, module=SmallModule())
    assert module.net.conv.out_channels == 3


# ---------------------------------------------------------------------- one channel left


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "obd"])
def test_a_fit_goes_on_when_every_group_has_one_channel_left(criterion: Any, tmp_path: Path) -> None:
    def callback() -> IterativePruningCallback:
        settings: dict[str, Any] = {"schedule": "linear", "start_epoch": 0.5, "end_epoch": 3.0, "every_n_steps": 4}
        return IterativePruningCallback(
            1.0, granularity="neuron", criterion=criterion, shrink="during_fit", example_inputs=X, **settings
        )

    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the amount asks for more than there is
        first = callback()
        trained = fit(first, checkpoint, enable_checkpointing=True)
    assert (trained.net.conv.out_channels, trained.net.hidden.out_features) == (1, 1)
    assert first.finished
    assert first.sparsity == pytest.approx(20 / 22)

    resumed = Exact()
    trainer = quiet_trainer(callbacks=[callback()], max_epochs=5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(resumed, shuffled(), plain(), ckpt_path=tmp_path / "step=36.ckpt", weights_only=True)
    assert sum("one channel left" in str(one.message) for one in said) == 1
    assert (resumed.net.conv.out_channels, resumed.net.hidden.out_features) == (1, 1)
    assert not torch.equal(resumed.net.head.weight, trained.net.head.weight)


def test_the_network_is_planned_once_in_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effects that are declared before the fit need the channels, and so do the fit and the cut at its end."""
    planned: list[Any] = []
    monkeypatch.setattr(remover, "channel_groups", lambda *args: planned.append(args) or channel_groups(*args))
    regrown = channels("net.hidden", 0.0, regrow=True, shrink="on_fit_end")
    module = fit(regrown, weights(0.0, target=["net.head"]), max_epochs=1)
    assert len(planned) == 1
    assert module.net.hidden.out_features == 8
