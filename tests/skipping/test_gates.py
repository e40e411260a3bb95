"""Gates of residual blocks: what they decide, what the network then computes, and their gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.gated import ALL, KINDS, MACS, by_hand, gated_net, small_blocks
from support.small import FEATURES, SmallNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.skipping.budget import Measured, budget_loss, measured, most_used
from lightning_compress.skipping.controls import Drawn, Fixed
from lightning_compress.skipping.gate_modules import Features
from lightning_compress.skipping.gates import SkipGates, gates_of, new_gates
from lightning_compress.skipping.record import give_gates, take_gates

X = torch.randn(32, FEATURES, generator=torch.Generator().manual_seed(3))


def decisions(net: nn.Module, gates: SkipGates, x: Tensor = X) -> Tensor:
    with gates.collecting() as found:
        net(x)
    runs = found.runs()
    assert runs is not None
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_all_gates_of_a_new_network_are_open_and_change_nothing(kind: Any) -> None:
    net, gates = gated_net(kind, mixed=False)
    assert bool((decisions(net, gates) == 1).all())
    output = net(X)
    take_gates(net)
    assert torch.equal(output, net(X))
    assert list(net.state_dict()) == list(SmallNet(residual=True).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_gate_leaves_its_block_out_for_a_sample(kind: Any) -> None:
    net, gates = gated_net(kind)
    runs = decisions(net, gates)
    assert bool((runs.sum(0) >= 4).all() and (runs.sum(0) <= 28).all())
    torch.testing.assert_close(net(X), by_hand(net, X, runs))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_draws_nothing_and_training_does(kind: Any) -> None:
    net, gates = gated_net(kind)
    gates.draws = True
    before = torch.get_rng_state()
    assert torch.equal(net(X), net(X))
    assert torch.equal(before, torch.get_rng_state())
    net.train()
    assert not torch.equal(decisions(net, gates), decisions(net, gates))
    gates.draws = False
    assert torch.equal(decisions(net, gates), decisions(net, gates))


def test_a_gate_opens_as_often_as_its_probability_says() -> None:
    gates = SkipGates(small_blocks()[:1], [Features(2, 1, 4)], macs=ALL).train()
    gates.draws = True
    logits = torch.linspace(-3.0, 3.0, 7).repeat_interleave(4000)
    gates.logit = lambda k, x, state=None: (logits, None)  # type: ignore[method-assign]
    torch.manual_seed(0)
    runs = gates.decide(0, torch.zeros(len(logits), 4))
    assert runs is not None
    assert set(runs.tolist()) == {0.0, 1.0}
    torch.testing.assert_close(runs.view(7, -1).mean(1), logits.view(7, -1)[:, 0].sigmoid(), atol=0.02, rtol=0)


def test_decisions_are_hard_and_have_the_gradient_of_probabilities() -> None:
    gates = SkipGates(small_blocks()[:1], [Features(2, 1, 4)], macs=ALL).train().double()
    gates.draws, gates.temperature = True, 0.7
    logits = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64).requires_grad_()
    gates.logit = lambda k, x, state=None: (logits, None)  # type: ignore[method-assign]
    weights = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)
    torch.manual_seed(4)
    (gates.decide(0, torch.zeros(9, 4)) * weights).sum().backward()
    torch.manual_seed(4)
    uniform = torch.rand(9, dtype=torch.float64)
    noise = (uniform / (1 - uniform)).log()

    def soft(shift: float) -> Tensor:
        return weights / (1 + (-(logits.detach() + shift + noise) / 0.7).exp())

    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (soft(1e-6) - soft(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-9)


class Twice(nn.Module):
    """Runs the blocks of a network in checkpoints of activations."""

    def __init__(self, net: SmallNet, **options: Any) -> None:
        super().__init__()
        self.net, self.options = net, options

    def forward(self, x: Tensor) -> Tensor:
        net, hidden = self.net, self.net.norm(self.net.conv(x.unsqueeze(1))).relu()
        for block in (net.block1, net.block2):
            hidden = checkpoint(block, hidden, **self.options) if self.options else block(hidden)
        return net.head(net.hidden(hidden.flatten(1)).relu())


def gradients(net: SmallNet, gates: SkipGates, passes: int = 1, **options: Any) -> dict[str, Tensor]:
    net.zero_grad()
    runner = Twice(net, **options)
    gates.draws = True
    torch.manual_seed(5)
    with gates.collecting() as found:
        outputs = [runner(X * (k + 1)) for k in range(passes)]
    runs = found.runs()
    assert runs is not None
    loss = sum(one.square().mean() for one in outputs) + budget_loss(gates, runs, 0.4, "per_gate")
    loss.backward()
    return {name: one.grad.clone() for name, one in net.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_activations_change_no_gradient(kind: Any) -> None:
    net, gates = gated_net(kind)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # else a block that runs again would count its batch twice
    plain, again = gradients(net, gates), gradients(net, gates, use_reentrant=False)
    assert plain.keys() == again.keys()
    assert sum("skip_gates" in name for name in plain) >= 4
    for name, one in plain.items():
        torch.testing.assert_close(again[name], one)


def test_checkpoints_of_two_passes_work_where_gates_need_no_memory_and_are_refused_elsewhere() -> None:
    net, gates = gated_net("per_block")
    plain, again = gradients(net, gates, 2), gradients(net, gates, 2, use_reentrant=False)
    for name, one in plain.items():
        torch.testing.assert_close(again[name], one)
    net, gates = gated_net("recurrent")
    with pytest.raises(ValueError, match=r"ran twice in one step under activation checkpointing.*per_block"):
        gradients(net, gates, 2, use_reentrant=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_may_drop_blocks_in_training(kind: Any) -> None:
    net, gates = gated_net(kind)
    seen: list[Tensor] = []
    net.block2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def run(x: Tensor, dropped: bool) -> None:
        hidden = net.norm(net.conv(x.unsqueeze(1))).relu()
        net.block2(hidden if dropped else net.block1(hidden))

    run(X, False)  # what is kept of it must not decide in the next pass
    run(-X, True)
    with gates.collecting() as found:
        run(X * 2, True)
        run(X, True)
        run(-X, False)
    logits, runs = found.logits(), found.runs()
    assert logits is not None
    assert runs is not None
    n = len(X)
    expected = [gates.logit(1, one, None)[0] for one in seen[2:4]]
    torch.testing.assert_close(logits[: 2 * n, 1], torch.cat(expected))
    assert bool((runs[: 2 * n, 0] == 1.0).all())
    with gates.collecting() as whole:
        net(-X)
    torch.testing.assert_close(runs[2 * n :], whole.runs())


class Dropping(SmallNet):
    """Leaves out other blocks in each pass."""

    dropped: list[set[int]]

    def forward(self, x: Tensor) -> Tensor:
        hidden, dropped = self.norm(self.conv(x.unsqueeze(1))).relu(), self.dropped.pop(0)
        for number, block in enumerate((self.block1, self.block2)):
            hidden = hidden if number in dropped else block(hidden)
        return self.head(self.hidden(hidden.flatten(1)).relu())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: one])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_that_drop_other_blocks_are_told_apart(kind: Any, copied: Any) -> None:
    passes = [(X, {1}), (-X[:3], {0}), (X[:2], set())]
    net, _ = gated_net(kind)
    net.__class__ = Dropping
    net = copied(net)
    gates = gates_of(net)
    assert gates is not None
    expected = []
    for x, dropped in passes:
        net.dropped = [dropped]
        expected.append(decisions(net, gates, x))
    net.dropped = [dropped for _, dropped in passes]
    with gates.collecting() as found:
        for x, _ in passes:
            net(x)
    runs = found.runs()
    assert runs is not None
    assert torch.equal(runs, torch.cat(expected))
    assert len(runs) == len(X) + 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_has_gates_of_its_own(kind: Any, copied: Any) -> None:
    net, gates = gated_net(kind)
    net.train()(X)  # a pass that a copy must not take along
    other = copied(net).eval()
    assert torch.equal(other(X), net.eval()(X))
    own = gates_of(other)
    assert own is not None
    assert own is not gates
    own.instead = Fixed([True, True])
    assert not torch.equal(other(X), net(X))


def test_bf16_autocast_and_double_networks_decide_alike() -> None:
    net, gates = gated_net()
    runs = decisions(net, gates)
    with torch.autocast("cpu", torch.bfloat16):
        halves = decisions(net, gates)
        assert net(X).dtype == torch.bfloat16
    assert halves.dtype == torch.float32
    assert float((halves != runs).float().mean()) < 0.1  # bf16 has three digits
    assert torch.equal(decisions(net.double(), gates, X.double()).float(), runs)


def test_tokens_vectors_and_maps_are_read_by_their_channels() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)

    block = small_blocks()[0]
    for shape, kind, channels in (((3, 5), "policy", 5), ((3, 7, 5), "per_block", 5), ((3, 2, 4, 5), "policy", 5)):
        net = Tokens()
        named = block.__class__("layer", "identity", "layer", "layer", ("layer",), 25)
        gates = new_gates(net, torch.zeros(shape), [named], macs=50, kind=kind)  # type: ignore[arg-type]
        give_gates(net, gates)
        assert gates.features[0].channels == channels
        assert torch.equal(net(torch.ones(shape)), torch.ones(shape) + net.layer(torch.ones(shape)))
    net, gates = gated_net()
    assert gates.features == (Features(3, 1, 6), Features(3, 1, 6))


def test_the_budget_is_that_of_the_papers() -> None:
    _, gates = gated_net()
    least = 1 - 2 * MACS / ALL
    runs = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    rate = (0.6 - least) / (1 - least)
    assert float(budget_loss(gates, runs, 0.6, "per_gate")) == pytest.approx((0.75 - rate) ** 2 + (0.25 - rate) ** 2)
    used = least + (0.75 + 0.25) * MACS / ALL
    assert float(budget_loss(gates, runs, 0.6, "total")) == pytest.approx((used / 0.6 - 1) ** 2, rel=1e-4)
    assert gates.least == pytest.approx(least)


def test_what_gates_do_is_counted() -> None:
    _, gates = gated_net()
    found = measured(gates, {(True, False): 4, (True, True): 2, (False, False): 2})
    used = 1 - 2 * MACS / ALL + (0.75 + 0.25) * MACS / ALL
    assert found == Measured({"block1": 0.75, "block2": 0.25}, pytest.approx(used), 1.0, 3, pytest.approx(1.5))
    gates.rates = torch.tensor([0.3, 0.75], dtype=torch.float64)
    assert most_used(gates) == (False, True)
    gates.rates = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert most_used(gates) == (True, True)


def test_controls_decide_in_the_place_of_gates() -> None:
    net, gates = gated_net()
    gates.instead = Fixed([True, False])
    torch.testing.assert_close(net(X), by_hand(net, X, torch.tensor([[1, 0]]).expand(32, 2)))
    gates.rates = torch.tensor([0.0, 0.5], dtype=torch.float64)
    gates.instead = Drawn(gates)
    many = gates.instead(1, torch.zeros(4000))
    assert float(many.mean()) == pytest.approx(0.5, abs=0.03)
    assert not gates.instead(0, torch.zeros(4000)).any()
