"""Agents that choose groups of channels: their rewards and their loss, against loops by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from support.small import FEATURES, SmallModule, plain, quiet_trainer
from torch import Tensor

from lightning_compress import ChannelGates, load_compressed, save_compressed
from lightning_compress.channel_gates.gates import gates_of
from lightning_compress.channel_gates.kinds import GroupGate
from lightning_compress.channel_gates.objective import GatedChannels
from lightning_compress.channel_gates.rewards import Agent, errors
from lightning_compress.core.records import KEY, RecordError
from lightning_compress.trainer.unwrap import objective_of

X = torch.zeros(2, FEATURES)


def gated(module: Any = None, **options: Any) -> ChannelGates:
    return ChannelGates(module or SmallModule(), **({"train": "q_learning", "example_inputs": X} | options))


def test_groups_are_kept_from_the_first_by_their_order() -> None:
    gate = GroupGate(3, [5, 4, 3, 2, 1, 0])  # four groups of 2, 1, 2 and 1 channels
    values = torch.eye(4)
    kept = gate.choose(values, 0.5, "gates", torch.Generator(), 0.0)
    assert kept.int().tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert gate.chosen(kept).tolist() == [0, 1, 2, 3]
    gate.used.copy_(torch.tensor([0.1, 0.3, 0.3, 0.7, 1.0, 1.0]))
    static = gate.choose(values, 0.5, "static", torch.Generator(), 0.0)
    assert static.int().tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    random = gate.choose(torch.zeros(20_000, 4), 0.5, "random", torch.Generator().manual_seed(0), 0.0)
    torch.testing.assert_close(random.float().mean(0), gate.used, rtol=0, atol=0.02)
    tries = gate.choose(values[-1:].expand(4000, 4), 0.5, "gates", torch.Generator(), 0.4)
    torch.testing.assert_close(tries.float().mean(0)[0], torch.tensor(0.6 + 0.4 / 4), rtol=0, atol=0.03)


def test_a_network_with_agents_begins_as_it_was() -> None:
    torch.manual_seed(0)
    module = SmallModule().eval()
    x = torch.randn(5, FEATURES)
    before, draws = module(x), torch.random.get_rng_state()
    assert torch.equal(gated(module)(x), before)
    assert torch.equal(torch.random.get_rng_state(), draws)


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z))])
def test_errors_are_found_in_any_loss(loss: Any) -> None:
    z, y = torch.randn(6, 3, dtype=torch.double, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    found = errors(loss(z, y), z)
    hot, by_hand = F.one_hot(y, 3), []
    for i in range(6):
        if loss is F.cross_entropy:
            by_hand.append(1 - z[i].softmax(0)[y[i]])
        else:
            by_hand.append(sum(abs(2 * (z[i, c] - hot[i, c]) / 3) for c in range(3)) / 2)
    torch.testing.assert_close(found, torch.stack(by_hand).detach().float())
    with pytest.raises(ValueError, match="does not depend on the output of the network"):
        errors(torch.ones((), requires_grad=True), z)


def test_the_loss_is_that_of_temporal_differences_by_hand() -> None:
    torch.manual_seed(0)
    gates = [GroupGate(2, list(range(8))), GroupGate(3, list(range(8)))]
    values = [torch.randn(5, 4, requires_grad=True) for _ in gates]
    wrong, agent = torch.rand(5), Agent()
    agent.price = 0.3
    actions = torch.randint(4, (2, 5))
    seen = [
        (value, torch.arange(8)[None] // 2 <= action[:, None]) for value, action in zip(values, actions, strict=True)
    ]
    total = torch.zeros(())
    for i in range(5):
        first, second = int(actions[0, i]), int(actions[1, i])
        target = -0.3 * (first + 1) / 8 + values[1][i].max().detach()
        total = total + (values[0][i, first] - target) ** 2 / 10
        target = -0.3 * (second + 1) / 8 - wrong[i]
        total = total + (values[1][i, second] - target) ** 2 / 10
    found = agent.loss(gates, seen, wrong)
    torch.testing.assert_close(found, total)
    for mine, other in zip(torch.autograd.grad(found, values), torch.autograd.grad(total, values), strict=True):
        torch.testing.assert_close(mine, other)


def test_agents_learn_to_keep_few_groups_where_these_suffice() -> None:
    torch.manual_seed(0)
    module = SmallModule(optimizer="adam")
    wrapped = gated(module, share=0.4)
    quiet_trainer(max_epochs=12).fit(wrapped, plain(0), plain(1))
    gates = gates_of(wrapped)
    assert gates is not None
    share = torch.cat([gate.used for gate in gates.by_layer().values()]).mean()
    assert 0.25 <= float(share) < 0.65
    assert objective_of(wrapped, GatedChannels).agent.price > 0.0


def test_the_network_learns_by_its_loss_and_the_agents_by_rewards() -> None:
    """The agents' loss has no gradient in the network, and the user's loss none in the agents."""
    found: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_after_backward(self, trainer: Any, module: Any) -> None:
            found.update({name: one.grad.clone() for name, one in module.named_parameters()})

    runs = []
    for weight in (1.0, 1000.0):
        torch.manual_seed(0)
        module: Any = gated()
        agent = objective_of(module, GatedChannels).agent
        original = agent.loss
        agent.loss = lambda *args, original=original, weight=weight: weight * original(*args)  # type: ignore[method-assign]
        quiet_trainer(max_steps=1, callbacks=[Watch()]).fit(module, plain(0))
        runs.append(dict(found))
    for name in runs[0]:
        factor = 1000.0 if name.startswith("channel_gates") else 1.0
        torch.testing.assert_close(runs[1][name], factor * runs[0][name], rtol=1e-4, atol=1e-6)


def test_agents_come_back_from_files_and_refuse_others(tmp_path: Any) -> None:
    torch.manual_seed(0)
    wrapped = gated(share=0.3)
    quiet_trainer(max_epochs=2).fit(wrapped, plain(0))
    save_compressed(wrapped.eval(), tmp_path / "network.lc")
    loaded: Any = load_compressed(tmp_path / "network.lc", SmallModule()).eval()
    x = torch.randn(8, FEATURES)
    assert torch.equal(loaded(x), wrapped(x))
    with pytest.raises(ValueError, match="has gates already, which learn by train='q_learning'; got 'gradient'"):
        ChannelGates(loaded)
    gated(loaded)
    fresh = gated().eval()  # from another network, whose channels have another order
    fresh.load_state_dict(wrapped.state_dict())
    assert torch.equal(fresh(x), wrapped(x))
    other = ChannelGates(SmallModule(), example_inputs=X)
    with pytest.raises(RecordError, match="choose groups of channels, and those of this one"):
        other.load_state_dict(wrapped.state_dict())
    state = wrapped.state_dict()
    state._metadata[""][KEY]["channel_gates"]["orders"][0] = [0, 0, 1, 2, 3, 4]
    with pytest.raises(RecordError, match="which do not order the channels"):
        ChannelGates(SmallModule(), train="q_learning").load_state_dict(state)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="train is one of gradient, q_learning; got 'reinforce'"):
        gated(train="reinforce")

    class Apart(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self(batch[0])
            return self.net.head.weight.square().sum()

    apart = gated(Apart())
    with pytest.raises(ValueError, match=r"pass output= with what picks the logits"):
        quiet_trainer(max_epochs=1).fit(apart, plain(0))
