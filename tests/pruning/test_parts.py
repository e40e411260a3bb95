"""The parts that the callback holds, each by itself: no fit is needed to see what they do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from support.small import SmallModule, quiet_trainer
from torch import nn

from lightning_compress.pruning.backtracker import Backtracker
from lightning_compress.pruning.criterion_hooks import CriterionHooks
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.remover import ChannelRemover
from lightning_compress.pruning.stopping import StopRule


def test_hooks_see_the_steps_that_count_and_no_others() -> None:
    torch.manual_seed(0)
    net, hooks, generator = nn.Linear(3, 2), CriterionHooks("taylor", "weight"), torch.Generator()
    hooks.watch(net, ["weight"], network=net, generator=generator)
    seen = []
    for counts in (True, False, True):
        net.zero_grad()
        hooks.begin(counts=counts)
        loss = net(torch.randn(4, 3)).square().mean()
        hooks.step.before_backward(loss)
        loss.backward()
        hooks.step.before_step()
        hooks.step.after_step()
        hooks.end()
        assert net.weight.grad is not None
        seen += [(net.weight.grad * net.weight).detach().abs()] if counts else []
    scores, absolute = hooks.score({}, None, generator)
    assert not absolute
    torch.testing.assert_close(scores["weight"], (seen[0] + seen[1]) / 2)
    state = hooks.state_dict()
    hooks.reset()
    with pytest.raises(ValueError, match="has seen none of 'weight'"):
        hooks.score({}, None, generator)
    hooks.resume(state)
    assert torch.equal(hooks.score({}, None, generator)[0]["weight"], scores["weight"])
    hooks.stop()
    assert hooks.state_dict() is None


def test_hooks_of_a_criterion_that_watches_nothing_do_nothing() -> None:
    net, hooks, generator = nn.Linear(3, 2), CriterionHooks("magnitude", "weight"), torch.Generator()
    hooks.watch(net, ["weight"], network=net, generator=generator)
    hooks.begin(counts=True)
    hooks.step.before_backward(net(torch.ones(1, 3)).sum())
    hooks.step.before_step()
    hooks.synchronize()
    hooks.end()
    assert hooks.state_dict() is None
    weights = {"weight": net.weight.detach()}
    assert hooks.score(weights, None, generator) == (weights, True)


def test_sums_of_weights_are_sliced_with_a_cut() -> None:
    hooks, generator, thin = CriterionHooks("taylor", "weight"), torch.Generator(), nn.Linear(2, 2)
    positions = {"weight": {1: torch.tensor([0, 2])}}
    hooks.watch(thin, ["weight"], network=thin, generator=generator)
    state = {"criterion": "taylor", "sums": {"weight": torch.arange(6.0).view(2, 3)}, "counts": {"weight": 1}}
    hooks.follow(state, positions)
    assert hooks.score({}, None, generator)[0]["weight"].tolist() == [[0.0, 2.0], [3.0, 5.0]]


def test_a_backtracker_restores_the_newest_network_that_kept_the_metric() -> None:
    module = LightningModule()
    module.layer = nn.Linear(3, 2)
    masked = MaskedParameters(module)
    backtracker = Backtracker(StopRule(monitor="acc", max_drop=0.1, baseline=0.9, recovery=1), trains_densely=False)

    def validated(acc: float, amount: float) -> str | None:
        trainer: Any = SimpleNamespace(sanity_checking=False, callback_metrics={"acc": torch.tensor(acc)})
        return backtracker.judge(trainer, module, masked, amount)

    backtracker.begin(SimpleNamespace(), module, masked, 0.0)  # type: ignore[arg-type]  # a baseline needs no Trainer
    masked.set({"layer.weight": torch.tensor([[True, False, True], [True, True, True]])})
    backtracker.pruned()
    assert backtracker.awaits_validation
    assert validated(0.85, 1 / 6) == "grew"
    good = {name: value.clone() for name, value in module.state_dict().items()}
    masked.set({"layer.weight": torch.zeros(2, 3, dtype=torch.bool)})
    backtracker.pruned()
    assert validated(0.5, 1.0) is None  # it may recover
    assert backtracker.must_go_back(1.0)
    assert validated(0.5, 1.0) == "failed"
    kept = backtracker.go_back(module, again=False)
    assert kept["amount"] == 1 / 6
    assert kept["keep"]["layer.weight"].tolist() == [[True, False, True], [True, True, True]]
    assert all(torch.equal(value, good[name]) for name, value in module.state_dict().items())


def test_a_remover_remembers_which_of_the_dense_networks_channels_are_left() -> None:
    module, inputs = SmallModule().eval(), torch.randn(4, 12)
    options: dict[str, Any] = {"network": "", "exclude": (), "example_inputs": inputs}
    remover = ChannelRemover.in_fit(quiet_trainer(), module, ["net.hidden.weight"], keep=None, **options)
    remover.check(quiet_trainer(), during_fit=True)
    (name,) = [group.name for group in remover.channels]
    assert remover.costs("parameters") == {name: 6 * 12 + 1 + 3}  # a row, a bias, and a column of the head
    assert remover.left is None
    keep = torch.arange(16) % 4 != 0
    with torch.no_grad():
        module.net.hidden.weight[~keep], module.net.hidden.bias[~keep] = 0.0, 0.0
    x = torch.randn(5, 12)
    dense = {key: value.clone() for key, value in module.state_dict().items()}
    before = module(x)
    positions = remover.cut({name: keep}, optimizers=[], copies=[])
    assert positions["net.head.weight"][1].tolist() == keep.nonzero().flatten().tolist()
    assert remover.left is not None
    assert torch.equal(remover.left[name], keep)
    assert module.net.hidden.out_features == 12
    torch.testing.assert_close(module(x), before)

    again = ChannelRemover(module, "", inputs, ["net.hidden.weight"], keep=remover.left)
    assert again.left is not None  # the network is still thin
    assert torch.equal(again.left[name], keep)
    wide = SmallModule().eval()
    wide.load_state_dict(dense)
    assert ChannelRemover(wide, "", inputs, ["net.hidden.weight"], keep=remover.left).left is None
    with pytest.raises(ValueError, match="The checkpoint has 7 of 16 channels"):
        ChannelRemover(module, "", inputs, ["net.hidden.weight"], keep={name: torch.arange(16) < 7})
