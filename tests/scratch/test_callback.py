"""Scratch: the structure of a file, new weights for it, the length of the fit, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.registry import structure_file
from support.small import CLASSES, FEATURES, SmallModule, plain, quiet_trainer, shuffled
from torch import Tensor, nn

from lightning_compress import ScratchCallback, load_compressed, lower_rank, save_compressed
from lightning_compress.measure.macs import count_macs
from lightning_compress.scratch import masks_of, new_weights, random_masks


class Begin(Callback):
    """Keeps the state at the first step, and the schedule that the module planned."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = {name: one.detach().clone() for name, one in pl_module.state_dict().items()}


def fit(callback: Callback, *others: Callback, module: SmallModule | None = None, **options: Any) -> SmallModule:
    torch.manual_seed(0)
    module = module or SmallModule()
    quiet_trainer(callbacks=[callback, *others], **({"max_epochs": 1} | options)).fit(module, shuffled(), plain())
    return module


def test_a_mask_is_that_of_the_file_and_the_weights_are_new() -> None:
    file = load_compressed(structure_file(thin=False))
    begin = Begin()
    module = fit(ScratchCallback(structure_file(thin=False)), begin)
    for layer in ("conv", "hidden", "head"):
        zeros = file[f"net.{layer}.weight"] == 0
        new = begin.state[f"net.{layer}.weight"]
        assert 0.5 < zeros.float().mean() < 0.7
        assert torch.equal(new == 0, zeros)
        assert not (new[~zeros] == file[f"net.{layer}.weight"][~zeros]).any()
        assert torch.equal(module.get_parameter(f"net.{layer}.weight") == 0, zeros)  # the fit's end
        bound = 1 / math.sqrt(new[0].numel())
        assert bound * 0.9 < new.abs().max() < bound  # torch's initialization
    assert begin.state["net.norm.weight"].tolist() == [1.0] * 6
    assert begin.state["net.norm.running_mean"].tolist() == [0.0] * 6


def test_a_thin_layer_begins_by_the_inputs_that_it_has() -> None:
    begin = Begin()
    module = fit(ScratchCallback(structure_file(thin=True)), begin)
    assert module.net.hidden.out_features == module.net.head.in_features == 8
    head = begin.state["net.head.weight"]
    assert head.shape == (CLASSES, 8)
    assert 1 / math.sqrt(16) < head.abs().max() < 1 / math.sqrt(8)  # torch's bound for 8 inputs, not for 16
    again = load_compressed(structure_file(thin=True))
    assert not (head == again["net.head.weight"]).any()


def test_layers_of_low_rank_are_taken_as_well(tmp_path: Path) -> None:
    torch.manual_seed(5)
    factored = SmallModule()
    lower_rank(factored, torch.zeros(2, FEATURES), rank={"net.hidden": 3})
    save_compressed(factored, tmp_path / "factored.lcz")
    module = fit(ScratchCallback(tmp_path / "factored.lcz"))
    assert module.state_dict()["net.hidden.first.weight"].shape[0] == 3


def test_random_masks_keep_as_many_in_each_layer() -> None:
    file = load_compressed(structure_file(thin=False))
    module = fit(ScratchCallback(structure_file(thin=False), mask="random"))
    for layer in ("conv", "hidden", "head"):
        zeros = module.get_parameter(f"net.{layer}.weight") == 0
        assert int(zeros.sum()) == int((file[f"net.{layer}.weight"] == 0).sum())
        assert not torch.equal(zeros, file[f"net.{layer}.weight"] == 0)
    mask = torch.arange(10_000).view(100, 100) < 3000
    drawn = random_masks({"w": mask}, torch.Generator().manual_seed(0))["w"]
    assert (drawn.float().mean(0) - 0.3).abs().max() < 0.2  # all over the matrix; 4 standard deviations


class Planned(SmallModule):
    """Plans a schedule by the fit's length."""

    def configure_optimizers(self) -> Any:
        self.planned = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs
        return super().configure_optimizers()


@pytest.mark.parametrize("thin", [True, False])
def test_the_computation_of_the_dense_network_is_spent(thin: bool) -> None:
    callback, module = ScratchCallback(structure_file(thin=thin), budget="computation"), Planned()
    dense = count_macs(module.eval(), torch.zeros(2, FEATURES))[0]
    torch.manual_seed(0)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=3)
    trainer.fit(module.train(), shuffled(), plain())
    times = dense / count_macs(module.eval(), torch.zeros(2, FEATURES))[0] if thin else 2.0
    assert times > 1.2
    assert trainer.max_epochs == trainer.current_epoch == round(3 * times)
    assert module.planned == (12 * round(3 * times), round(3 * times))


def test_a_resume_is_as_long_and_keeps_a_random_mask(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(**options: Any) -> tuple[SmallModule, int]:
        callback = ScratchCallback(structure_file(thin=False), budget="computation", mask="random")
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        torch.manual_seed(0)
        module = SmallModule()
        trainer = quiet_trainer(callbacks=[callback, saved], max_epochs=2, enable_checkpointing=True)
        trainer.fit(module, plain(0), plain(), **options)
        return module, trainer.current_epoch

    whole, epochs = run()
    resumed, again = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert epochs == again == 4
    assert all(torch.equal(one, resumed.state_dict()[name]) for name, one in whole.state_dict().items())


def test_a_fit_that_the_same_trainer_resumes_is_not_longer_again(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Stops(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.callbacks.remove(self)
                raise RuntimeError("stopped")

    scratch = ScratchCallback(structure_file(thin=False), budget="computation")
    callbacks = [scratch, ModelCheckpoint(tmp_path, save_last=True), Stops()]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True)
    module = SmallModule()
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.fit(module, plain(0), plain())
    assert trainer.max_epochs == 4
    trainer.fit(module, plain(0), plain(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.max_epochs == trainer.current_epoch == 4


def test_what_cannot_be_is_refused_and_the_module_stays_as_it_was(tmp_path: Path) -> None:
    thin = structure_file(thin=True)
    with pytest.raises(FileNotFoundError, match="no weights at missing"):
        fit(ScratchCallback("missing.ckpt"))
    with pytest.raises(ValueError, match="budget must be one of epochs, computation"):
        ScratchCallback(thin, budget="time")  # type: ignore[arg-type]
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt does not fit SmallModule"):
        fit(ScratchCallback(tmp_path / "other.ckpt"))
    torch.save(SmallModule().state_dict(), tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match="there is no structure to train from scratch"):
        fit(ScratchCallback(tmp_path / "dense.ckpt"))
    with pytest.raises(ValueError, match=r"holds none: use mask='same'"):
        fit(ScratchCallback(thin, mask="random"))
    with pytest.raises(ValueError, match="it has none: max_epochs=-1"):
        fit(ScratchCallback(thin, budget="computation"), max_epochs=-1)
    module = SmallModule()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    with pytest.raises(ValueError, match="reset='anew' is no method of SmallModule"):
        fit(ScratchCallback(thin, reset="anew"), module=module)
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    fit(ScratchCallback(thin), module=module)  # it fits still


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forget(self) -> None:
        nn.init.constant_(self.scale, 2.0)
        self.inner.reset_parameters()


def test_a_parameter_that_nothing_draws_anew_is_named() -> None:
    net = Own()
    with pytest.raises(ValueError, match=r"scale would keep its trained values: Own has no reset_parameters\(\)"):
        new_weights(net)
    before = net.inner.weight.clone()
    new_weights(net, "forget")
    assert net.scale.tolist() == [2.0] * 3
    assert not (net.inner.weight == before).any()
    frozen = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    held = [one.clone() for one in frozen.parameters()]
    new_weights(frozen)
    assert [bool((a == b).all()) for a, b in zip(held, frozen.parameters(), strict=True)] == [True, True, False, False]
    attention = nn.MultiheadAttention(4, 2)
    attention.in_proj_weight.data.zero_()
    new_weights(attention)
    assert attention.in_proj_weight.any()


def test_zeros_of_vectors_count_where_a_channel_is_silent() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].weight.data[1], net[0].bias.data[:2] = 0.0, 0.0
    net[1].weight.data[1] = 0.0  # and its bias is zero as all others are
    masks = masks_of(net)
    assert masks["0.bias"].tolist() == [True, False, True, True]  # the first entry is zero by chance
    assert masks["1.weight"].tolist() == masks["1.bias"].tolist() == [True, False, True, True]
    assert set(masks) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_the_row_of_an_embedding_that_pads_is_no_mask() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 2))
    assert masks_of(net) == {}
    net[0].weight.data[2, 0] = 0.0
    assert int((~masks_of(net)["0.weight"]).sum()) == 1
