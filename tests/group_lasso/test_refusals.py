"""What the callback refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import MixedPrecision
from support.small import ManualModule, SmallModule, plain, quiet_trainer
from torch.utils.data import DataLoader, Dataset

from lightning_compress import GroupLassoCallback, IterativePruningCallback


def fit(*callbacks: Callback, module: LightningModule | None = None, data: Any = None, **options: Any) -> Any:
    module = module or SmallModule()
    quiet_trainer(callbacks=list(callbacks), max_epochs=1, **options).fit(module, data or plain())
    return module


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_quoted(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength must be a finite number, 0 or more; got {strength}"):
        GroupLassoCallback(strength)


def test_an_unknown_granularity_is_quoted() -> None:
    with pytest.raises(ValueError, match="'filter', 'channel', 'shape' or 'group'; got 'neuron'"):
        GroupLassoCallback(0.1, granularity="neuron")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": "during_fit"}, "shrink must be 'never' or 'on_fit_end'; got 'during_fit'"),
        ({"shrink": "on_fit_end"}, "only granularity='group' with proximal=True.*got granularity='filter'"),
        ({"shrink": "on_fit_end", "granularity": "group"}, "got granularity='group' and proximal=False"),
    ],
)
def test_only_exact_zeros_can_be_cut_out(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupLassoCallback(0.1, **options)


def test_averages_are_not_zero_and_cannot_be_cut() -> None:
    lasso = GroupLassoCallback(0.1, granularity="group", proximal=True, shrink="on_fit_end")
    with pytest.raises(ValueError, match="in an average over steps they are not"):
        fit(EMAWeightAveraging(decay=0.5), lasso)


def test_patterns_that_match_nothing_are_quoted() -> None:
    with pytest.raises(ValueError, match="target='decoder'"):
        fit(GroupLassoCallback(0.1, target="decoder"))


def test_targets_without_free_channels_are_refused_with_the_reason() -> None:
    callback = GroupLassoCallback(0.1, granularity="group", target="net.head")
    with pytest.raises(ValueError, match=r"target='net\.head'.*net\.head: it is an output of the network"):
        fit(callback)


def test_inputs_that_cannot_be_told_and_a_module_without_forward_are_refused_with_what_to_pass() -> None:
    class Strange(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> str:
            return "text"

    class Faceless(SmallModule):
        forward = LightningModule.forward

    loader = DataLoader(Strange(), collate_fn=lambda rows: "text")
    with pytest.raises(ValueError, match=r"yields str.*pass example_inputs="):
        fit(GroupLassoCallback(0.1, granularity="group"), data=loader)
    with pytest.raises(ValueError, match=r"Faceless has no forward.*pass network="):
        fit(GroupLassoCallback(0.1, granularity="group"), module=Faceless())


def test_the_same_settings_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="two GroupLassoCallback with the same settings"):
        fit(GroupLassoCallback(0.1), GroupLassoCallback(0.1))


def test_pruning_stands_before_the_penalty() -> None:
    with pytest.raises(ValueError, match="put GroupLassoCallback after IterativePruningCallback"):
        fit(GroupLassoCallback(0.1), IterativePruningCallback(0.5))


def test_shrinking_beside_regrowth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(regrow=True\) trains latent values.*use regrow=False or proximal=False"):
        fit(IterativePruningCallback(0.5, regrow=True), GroupLassoCallback(0.1, proximal=True))
    fit(IterativePruningCallback(0.5, regrow=True), GroupLassoCallback(0.1))


def test_a_step_that_lightning_does_not_announce_is_refused() -> None:
    class Raw(ManualModule):
        def optimizers(self, use_pl_optimizer: bool = False) -> Any:
            return super().optimizers(use_pl_optimizer=use_pl_optimizer)

    with pytest.raises(RuntimeError, match=r"gradients lack the penalty. Step it through Lightning"):
        fit(GroupLassoCallback(0.1), module=Raw())


def test_16_mixed_with_a_fused_optimizer_is_refused_by_name() -> None:
    class Fused(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises(ValueError, match=r"precision='16-mixed', a fused SGD.*fused=False, or precision='bf16-mixed'"):
        fit(GroupLassoCallback(0.1), module=Fused(), plugins=plugins)
    fit(GroupLassoCallback(0.1), module=Fused())


def test_the_channels_without_a_penalty_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = GroupLassoCallback(0.1, granularity="group")
    module = fit(callback)
    fit(callback, module=module)
    said = [record.message for record in caplog.records if "without a penalty" in record.message]
    assert said == ["Channels without a penalty: net.head: it is an output of the network."]


def test_lightning_cli_makes_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    options = ["strength=0.01", "granularity=group", "proximal=true", "target=[net.conv, net.hidden]"]
    arguments = ["--trainer.callbacks+=GroupLassoCallback", *(f"--trainer.callbacks.{one}" for one in options)]
    arguments += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    cli = LightningCLI(SmallModule, run=False, save_config_callback=None, args=arguments)
    (found,) = [one for one in cli.trainer.callbacks if isinstance(one, GroupLassoCallback)]
    expected = GroupLassoCallback(0.01, granularity="group", proximal=True, target=["net.conv", "net.hidden"])
    assert found.state_key == expected.state_key
