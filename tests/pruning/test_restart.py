"""What survivors start from, and what pruned entries become: the same mask, one argument changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from pruning.test_tickets import Module, fit
from torch import Tensor

from lightning_compress import LotteryTicketCallback

WEIGHTS = ("net.hidden.weight", "net.head.weight")


class Look(Callback):
    """The weights as each epoch begins to train, and what the fit ends with."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step % 3 == 0:
            self.begun.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ended.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})


def run(**settings: Any) -> tuple[Look, LotteryTicketCallback]:
    look, ticket = Look(), LotteryTicketCallback(0.4, rounds=2, rewind="init", **settings)
    torch.manual_seed(11)
    fit(Module(), ticket, look, max_epochs=6)
    return look, ticket


@pytest.fixture(scope="module")
def plain() -> tuple[Look, LotteryTicketCallback]:
    return run()


@pytest.mark.parametrize("signs", ["keep", "random"])
@pytest.mark.parametrize("restart", ["rewind", "reinit", "reshuffle", "constant"])
def test_the_same_mask_and_other_values(restart: Any, signs: Any, plain: tuple[Look, LotteryTicketCallback]) -> None:
    look, ticket = run(restart=restart, signs=signs)
    initial, round_1, round_2 = look.begun[0], look.begun[2], look.begun[4]
    for name in WEIGHTS:
        mask = plain[1].masks[name]
        assert torch.equal(ticket.masks[name], mask)
        assert torch.equal(round_1[name][round_1[name] != 0], initial[name][round_1[name] != 0])  # rewinds as usual
        assert not round_2[name][~mask].any()
        survivors, before = round_2[name][mask], initial[name][mask]
        flipped = int((survivors.sign() != before.sign()).sum())
        assert signs == "random" or flipped == 0
        if signs == "random" and name == "net.hidden.weight":  # whose values were the first that the seed drew
            assert 0.3 < flipped / len(before) < 0.7
        magnitudes = survivors.abs()
        if restart == "rewind":
            assert torch.equal(magnitudes, before.abs())
        elif restart == "reshuffle":
            assert torch.equal(magnitudes.sort().values, before.abs().sort().values)
            assert not torch.equal(magnitudes, before.abs())
        elif restart == "constant":
            deviation = float((initial[name] - initial[name].mean()).square().mean().sqrt())
            assert magnitudes.tolist() == pytest.approx([deviation] * len(magnitudes))
        else:
            assert set(magnitudes.tolist()) <= set(initial[name].abs().flatten().tolist())
            assert name == "net.head.weight" or len(set(magnitudes.tolist())) < len(magnitudes)  # with replacement
    for name in ("net.hidden.bias", "net.norm.weight", "net.norm.bias", "net.head.bias"):
        assert torch.equal(round_2[name], initial[name])


@pytest.mark.parametrize("pruned", ["initial", "mixed"])
def test_what_pruned_entries_become(pruned: Any, plain: tuple[Look, LotteryTicketCallback]) -> None:
    look, ticket = run(pruned=pruned)
    initial, trained = look.begun[0], look.ended[3]  # round 1 ends with epoch 3
    for name in WEIGHTS:
        mask = plain[1].masks[name]
        assert torch.equal(ticket.masks[name], mask)
        stays = initial[name]
        if pruned == "mixed":
            stays = torch.where(trained[name].abs() < stays.abs(), 0.0, stays)
        for moment in (look.begun[4], look.begun[5], look.ended[5]):
            assert torch.equal(moment[name][~mask], stays[~mask])
        assert not torch.equal(look.ended[5][name][mask], look.begun[4][name][mask])
    if pruned == "initial":
        assert ticket.sparsity == 0
    assert ticket.masked_share == pytest.approx(0.64, abs=0.01)


@pytest.mark.parametrize("settings", [{"pruned": "mixed"}, {"restart": "reinit", "signs": "random"}])
def test_a_resume_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> dict[str, Tensor]:
        module, ticket = Module(), LotteryTicketCallback(0.4, rounds=2, rewind="init", **settings)
        folder = tmp_path / ("whole" if resume is None else "again")
        save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        torch.manual_seed(11 if resume is None else 99)
        fit(module, ticket, save, max_epochs=6, enable_checkpointing=True, resume=resume)
        return dict(module.state_dict())

    whole = run()
    for epoch in (1, 3, 4):
        again = run(tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert all(torch.equal(value, whole[name]) for name, value in again.items()), epoch


def test_a_second_fit_keeps_frozen_values() -> None:
    ticket, module = LotteryTicketCallback(0.4, rounds=2, pruned="initial"), Module()
    initial = module.net.hidden.weight.detach().clone()
    fit(module, ticket, max_epochs=3)
    fit(module, ticket, max_epochs=2)
    gone = ~ticket.masks["net.hidden.weight"]
    assert torch.equal(module.net.hidden.weight[gone], initial[gone])
    with torch.no_grad():
        module.net.hidden.weight[gone] = 0.5
    with pytest.raises(ValueError, match="has weights where an earlier fit"):
        fit(module, ticket, max_epochs=2)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"restart": "new"}, "reshuffle"),
        ({"signs": "flip"}, "keep, random"),
        ({"pruned": "none"}, "mixed"),
        ({"restart": "reinit", "rewind": "learning_rate"}, "rewind='weights'"),
        ({"signs": "random", "rewind": None}, "rewind='weights'"),
        ({"pruned": "initial", "granularity": "neuron"}, "can't be cut"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LotteryTicketCallback(**settings)
