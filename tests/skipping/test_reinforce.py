"""Rewards of gates: their gradients against all outcomes written out, and fits that learn from them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.gated import gated_net
from support.small import SmallModule, dataset, plain, quiet_trainer, shuffled
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import SkippableBlocks
from lightning_compress.skipping.gates import gates_of
from lightning_compress.skipping.reinforce import EXPLORES, blockdrop_loss, moved, quality, skipnet_loss

COSTS = torch.tensor([0.2, 0.5, 0.3])
LOGITS = torch.tensor([0.4, -0.3, 0.8])
N = 200_000


def outcomes() -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))


def sample_loss(runs: Tensor) -> Tensor:
    """Some loss that depends on which blocks have run."""
    return 1.0 + 0.7 * (1 - runs[..., 0]) - 0.4 * runs[..., 1] * runs[..., 2]


def drawn(explores: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    chance = LOGITS.sigmoid()
    chance = (1 - explores) * chance + explores * (1 - chance)
    runs = (torch.rand(N, 3, generator=torch.Generator().manual_seed(0)) < chance).float()
    return logits, logits.expand(N, 3), runs


def expected(logits: Tensor, explores: float, reward: Tensor) -> Tensor:
    """The mean reward over all outcomes, with the probabilities of the logits."""
    chance = logits.sigmoid()
    chance = (1 - explores) * chance + explores * (1 - chance)
    return (torch.where(outcomes() > 0.5, chance, 1 - chance).prod(1) * reward).sum()


def test_the_gradient_of_skipnet_is_that_of_the_mean_reward() -> None:
    logits, each, runs = drawn(0.0)
    skipnet_loss(each, runs, COSTS, sample_loss(runs), 0.5).backward()
    exact = LOGITS.clone().requires_grad_()
    reward = 0.5 * ((1 - outcomes()) * COSTS).sum(1) - sample_loss(outcomes())
    (-expected(exact, 0.0, reward)).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad, atol=3e-3, rtol=0)


def test_the_gradient_of_blockdrop_is_that_of_the_mean_reward_with_exploration() -> None:
    logits, each, runs = drawn(EXPLORES)

    def right(chosen: Tensor) -> Tensor:
        return ((chosen[:, 0] > 0) | (chosen[:, 1] + chosen[:, 2] > 1)).float()

    greedy = torch.tensor([1.0, 0.0, 1.0]).expand(N, 3)
    blockdrop_loss(each, runs, COSTS, right(runs), (greedy, right(greedy)), 2.0).backward()
    exact = LOGITS.clone().requires_grad_()
    used = (outcomes() * COSTS).sum(1)
    reward = torch.where(right(outcomes()) > 0, 1 - used.square(), torch.tensor(-2.0))
    entropy = torch.distributions.Bernoulli(logits=exact).entropy().sum()
    (-expected(exact, EXPLORES, reward) - 0.01 * entropy).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad, atol=8e-3, rtol=0)


def test_a_curriculum_leaves_the_first_blocks_alone() -> None:
    logits, each, runs = drawn(EXPLORES)
    runs = torch.cat([torch.ones(N, 1), runs[:, 1:]], dim=1)
    greedy = (torch.ones(N, 3), torch.ones(N))
    blockdrop_loss(each, runs, COSTS, torch.ones(N), greedy, 2.0, first=1).backward()
    assert logits.grad is not None
    assert float(logits.grad[0]) == 0.0
    assert bool((logits.grad[1:] != 0).all())


def test_the_price_rises_above_the_target_only_and_slowly() -> None:
    assert moved(1.0, 0.9, 0.6) == pytest.approx(1.05)
    assert moved(1.0, 0.606, 0.6) == pytest.approx(1.01)
    assert moved(1.0, 0.3, 0.6) == pytest.approx(0.95)


def test_answers_are_right_or_agree() -> None:
    output = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    right, losses = quality(output, torch.tensor([0, 0]), None)
    assert right.tolist() == [1.0, 0.0]
    torch.testing.assert_close(losses, F.cross_entropy(output, torch.tensor([0, 0]), reduction="none"))
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [2.0, 1.0]]])
    right, losses = quality(tokens, None, torch.tensor([2.0, 0.0]).expand(2, 2, 2))
    assert right.tolist() == [0.5, 1.0]
    assert losses.tolist() == [0.5, 0.0]
    assert quality(tokens[..., None], None, tokens[..., None])[0].tolist() == [1.0, 1.0]


def wrapped(kind: Any, module: SmallModule | None = None, **options: Any) -> SkippableBlocks:
    module = SmallModule(residual=True) if module is None else module
    module.net = gated_net(kind)[0].train()
    return SkippableBlocks(module, network="net", target=0.6, **({"train": "reinforce"} | options))


@pytest.mark.parametrize("kind", ["per_block", "recurrent", "policy"])
def test_a_fit_with_rewards_teaches_the_gates_and_leaves_nothing_behind(kind: Any) -> None:
    module = wrapped(kind)
    gates = gates_of(module.net)
    assert gates is not None
    before = {name: one.clone() for name, one in gates.named_parameters()}
    quiet_trainer(max_epochs=2).fit(module, shuffled(), plain())
    assert all(bool(one.isfinite().all()) for one in module.parameters())
    assert any(not torch.equal(before[name], one) for name, one in gates.named_parameters() if "logit" in name)
    assert (gates.draws, gates.straight_through, gates.explores, gates.first) == (False, True, 0.0, 0)
    assert module._objective()._rewards.price != 1.0


class Float(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1][:, 0].long())


def test_without_classes_answers_must_agree_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    x, y = dataset().tensors
    loader = DataLoader(TensorDataset(x, y[:, None].float()), batch_size=8)
    module = wrapped("policy", Float(residual=True))
    with caplog.at_level("INFO"):
        quiet_trainer(max_epochs=1).fit(module, loader)
    assert "agree with those of the network with all blocks" in caplog.text


def test_rewards_close_gates_until_the_target_is_met() -> None:
    module = wrapped("per_block")
    module.net = gated_net(mixed=False)[0].train()
    assert module.measure(plain()).used == pytest.approx(1.0)
    quiet_trainer(max_epochs=10).fit(module, shuffled(), plain())
    assert module.measure(plain()).used < 0.75
