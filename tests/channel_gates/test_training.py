"""What `ChannelGates` computes, trains, logs and leaves alone, against networks and loops written by hand."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from support.registry import pruning, widths
from support.small import FEATURES, SmallModule, SmallNet, plain, quiet_trainer
from torch import Tensor, nn

from lightning_compress import ChannelGates
from lightning_compress.channel_gates.gates import LayerGates, gates_of
from lightning_compress.channel_gates.objective import GatedChannels
from lightning_compress.trainer.compatibility import IncompatibleError
from lightning_compress.trainer.unwrap import objective_of

X = torch.zeros(2, FEATURES)


def gated(module: Any = None, **options: Any) -> ChannelGates:
    return ChannelGates(module or SmallModule(), **({"example_inputs": X} | options))


def held(module: nn.Module) -> LayerGates:
    gates = gates_of(module)
    assert gates is not None
    return gates


def shaken(module: Any) -> Any:
    """Give the gates weights with which samples choose different channels."""
    for gate in held(module).by_layer().values():
        nn.init.normal_(gate.weight, std=0.5)
        nn.init.uniform_(gate.bias, 0.5, 1.5)
    return module


def factors_by_hand(s: Tensor, gate: Any, share: float) -> tuple[Tensor, Tensor]:
    """The gains of each sample with zeros for those that are not kept, and all gains; sample by sample."""
    rows, every, weight, bias = [], [], gate.weight, gate.bias
    for one in s:
        gains = [
            max(0.0 * b, sum(w * v for w, v in zip(row, one, strict=True)) + b)
            for row, b in zip(weight, bias, strict=True)
        ]
        ranked = sorted(range(len(gains)), key=lambda i: (-float(gains[i] * gate.magnitude[i]), i))
        kept = set(ranked[: math.ceil(round(share * len(gains), 6))])
        rows.append(torch.stack([gain if i in kept else 0.0 * gain for i, gain in enumerate(gains)]))
        every.append(torch.stack(gains))
    return torch.stack(rows), torch.stack(every)


def by_hand(net: SmallNet, gates: LayerGates, x: Tensor, share: float) -> tuple[Tensor, list[Tensor]]:
    """The output of a small network with gates, and all gains."""
    first, second = gates.by_layer().values()
    x = x.unsqueeze(1)
    f1, g1 = factors_by_hand(x.abs().mean(2), first, share)
    x = F.relu(net.norm(net.conv(x)) * f1[:, :, None]).flatten(1)
    f2, g2 = factors_by_hand(x.abs(), second, share)
    return net.head(net.dropout(F.relu(net.hidden(x) * f2))), [g1, g2]


def without_hooks(module: SmallModule) -> SmallNet:
    net = SmallNet().to(module.net.head.weight.dtype)
    net.load_state_dict(module.net.state_dict())
    return net.train(module.net.training)


def test_at_first_and_with_all_channels_the_network_is_what_it_was() -> None:
    torch.manual_seed(0)
    module = SmallModule().eval()
    x = torch.randn(5, FEATURES)
    before = module(x)
    wrapped = gated(module)
    held(wrapped).share = 1.0
    assert torch.equal(wrapped(x), before)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_outputs_are_those_of_a_network_by_hand(share: float) -> None:
    torch.manual_seed(0)
    module = shaken(gated(SmallModule().double(), share=share, example_inputs=X.double())).eval()
    x = torch.randn(7, FEATURES, dtype=torch.double)
    expected, _ = by_hand(without_hooks(module), held(module), x, share)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)
    one_by_one = torch.cat([module(one[None]) for one in x])
    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-12)


def test_a_sample_keeps_exactly_its_channels_and_ties_are_broken_by_their_order() -> None:
    torch.manual_seed(0)
    module = gated(share=0.4).eval()
    seen = []
    module.net.norm.register_forward_hook(lambda *args: seen.append(args[-1]))
    module.net.norm.bias.data.fill_(1.0)
    gate = held(module).by_layer()["net.conv"]
    read = module.net.hidden.weight.abs().reshape(16, 6, 12).sum((0, 2))  # scales of the norm are 1
    torch.testing.assert_close(gate.magnitude, read / read.mean())
    gate.magnitude.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 2.0]))
    module(torch.randn(4, FEATURES))
    assert (seen[0].abs().amax(2) > 0).tolist() == [[True, True, False, False, False, True]] * 4  # all gains are 1
    gate.magnitude.fill_(1.0)
    gate.weight.data.copy_(torch.tensor([[-3.0], [3.0], [-3.0], [3.0], [-3.0], [3.0]]))
    gate.bias.data.copy_(torch.tensor([4.0, 0.0, 4.0, 0.0, 4.0, 0.0]))  # crosses where the mean |x| is 2 / 3
    module(torch.randn(64, FEATURES))
    kept = seen[1].abs().amax(2) > 0
    assert kept.sum(1).max() <= 3
    assert kept.unique(dim=0).int().tolist() == [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]]


class Watched(SmallModule):
    """Has no dropout, and keeps its batch, and its weights from before a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.dropout.p = 0.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batch, self.before = batch, copy.deepcopy(self.state_dict())

    def on_after_backward(self) -> None:
        self.gradients = {name: one.grad.clone() for name, one in self.named_parameters() if one.grad is not None}


class Steps(Callback):
    """Compares the gradients of each step with those by hand."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty
        self.shares: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        share = held(module).training_share
        assert share is not None
        self.shares.append(share)
        alone = ChannelGates(SmallModule(), share=0.5, example_inputs=X)
        alone.load_state_dict(module.before)
        net = without_hooks(alone).train()
        net.dropout.p = 0.0
        logits, gains = by_hand(net, held(alone), module.batch[0], share)
        loss = F.cross_entropy(logits, module.batch[1]) + self.penalty * sum(one.sum(1).mean() for one in gains)
        loss.backward()
        mine = dict(net.named_parameters(prefix="net")) | dict(held(alone).named_parameters(prefix="channel_gates"))
        assert mine.keys() == module.gradients.keys()
        for name, one in mine.items():
            torch.testing.assert_close(module.gradients[name], one.grad, rtol=1e-4, atol=1e-5)


def test_a_step_trains_the_own_loss_through_the_kept_channels_and_the_share_falls() -> None:
    seed_everything(0, verbose=False)
    steps = Steps(penalty=0.01)
    module = gated(Watched(), penalty=0.01, network="", example_inputs=X)
    quiet_trainer(max_epochs=1, callbacks=[steps]).fit(module, plain(0))
    ends = round(12 * 2 / 3)
    assert steps.shares == pytest.approx([max(0.5, 1.0 - 0.5 * step / ends) for step in range(12)])
    assert held(module).training_share is None


def test_validation_is_of_the_network_at_its_share_from_the_first_epoch() -> None:
    module = gated()
    shares = []

    class Look(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            shares.append((held(module).training, held(module).share))

    trainer = quiet_trainer(max_epochs=2, callbacks=[Look()])
    trainer.fit(module, plain(0), plain(1))
    assert set(shares) == {(False, 0.5)}
    assert {"val_acc", "train_loss"} <= trainer.callback_metrics.keys()


def test_the_share_and_how_much_the_choice_varies_are_logged() -> None:
    module = gated()
    trainer = quiet_trainer(max_epochs=2, log_every_n_steps=1, logger=True, enable_progress_bar=False)
    trainer.fit(module, plain(0))
    assert float(trainer.callback_metrics["compress/channels"]) == 0.5
    assert 0.0 <= float(trainer.callback_metrics["compress/varying"]) <= 1.0


def test_gates_that_choose_the_same_for_all_are_said_once() -> None:
    class Frozen(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = gated(Frozen())
    for gate in held(module).by_layer().values():
        gate.used.zero_()
        gate.used[: len(gate.used) // 2] = 1.0
    with pytest.warns(UserWarning, match="the gates choose the same channels for all") as said:
        quiet_trainer().fit(module, plain(0), plain(1))
    assert sum("choose the same channels" in str(one.message) for one in said) == 1


def test_copies_and_pickles_have_gates_of_their_own() -> None:
    torch.manual_seed(0)
    module = shaken(gated()).eval()
    x = torch.randn(5, FEATURES)
    before = module(x)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for one in held(copied).parameters():
            one.zero_()
    assert torch.equal(module(x), before)
    assert not torch.equal(copied(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), before)


def test_checkpointed_layers_choose_the_same_again() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            def part(x: Tensor) -> Tensor:
                return F.relu(self.norm(self.conv(x.unsqueeze(1))))

            x = checkpoint(part, x, use_reentrant=False) if self.training and torch.is_grad_enabled() else part(x)
            return self.head(F.relu(self.hidden(x.flatten(1))))

    torch.manual_seed(0)
    module = SmallModule()
    module.net = Checkpointed()
    other = copy.deepcopy(module)
    other.net.__class__ = SmallNet
    other.net.dropout.p = 0.0
    x = torch.randn(8, FEATURES)
    found = []
    for one in (module, other):
        wrapped = gated(one)
        torch.manual_seed(3)
        shaken(wrapped).train()
        wrapped(x).square().sum().backward()
        found.append([p.grad for p in wrapped.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_operating_points_are_controls_with_as_many_channels() -> None:
    torch.manual_seed(0)
    module = shaken(gated()).eval()
    for gate in held(module).by_layer().values():
        gate.used.copy_(torch.linspace(0, 1, len(gate.used)))  # the last ones were kept most often
    x = torch.randn(16, FEATURES)
    module.net.norm.bias.data.fill_(1.0)
    points = module.operating_points()
    assert [one.name for one in points] == ["chosen channels", "random channels", "the same channels for all"]
    seen: list[Tensor] = []
    answers = []
    module.net.norm.register_forward_hook(lambda *args: seen.append(args[-1].abs().amax(2) > 0))
    for point in points:
        with point.answering():
            answers.append(module(x))
        torch.testing.assert_close(point.network(x), answers[-1])
    expected = module(x)
    assert held(module).way == "gates"
    assert [torch.equal(found, expected) for found in answers] == [True, False, False]
    assert len(seen[1].unique(dim=0)) > 2
    assert not (seen[2] & torch.tensor([[True] * 3 + [False] * 3])).any()
    assert all(one.sum(1).max() <= 3 for one in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share says how many channels each sample keeps, above 0 and at most 1; got 0.0"),
        ({"share": 1.5}, "got 1.5"),
        ({"penalty": -1.0}, "penalty is the weight of the sum of all gains, 0 or more; got -1.0"),
        ({"start_epoch": 2.0, "end_epoch": 1.0}, "end_epoch=1.0 must be later than start_epoch=2.0"),
        ({"start_epoch": -1.0}, "start_epoch must be 0 or later; got -1.0"),
        ({"layers": ["net.cnov"]}, "layers has 'net.cnov', which is no convolution or linear layer"),
        ({"network": "nte"}, "network='nte' is no submodule of SmallModule"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated(**options)


def test_no_layers_mean_no_gates_and_a_network_with_gates_says_which_it_has() -> None:
    module = gated(layers=[])
    assert gates_of(module) is None
    quiet_trainer(max_epochs=1).fit(module, plain(0))
    assert gates_of(module) is None
    with pytest.raises(ValueError, match=r"has gates at net\.\w+.* already, and layers= says none: pass layers=None"):
        gated(gated(), layers=[])


def test_a_cut_and_widths_beside_gates_are_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"IterativePruningCallback.* cuts channels for all samples"):
        quiet_trainer(callbacks=pruning(granularity="neuron").callbacks()).fit(gated(), plain(0), plain(1))
    with pytest.raises(IncompatibleError, match=r"SlimmableWidth.* runs the network with fewer channels"):
        gated(widths().wrap(SmallModule()))
    with pytest.raises(ValueError, match=r"No channel of the network may leave.*argsort in 'net.conv'"):
        widths().wrap(gated())


def test_a_second_fit_goes_on_with_the_share_that_was_reached() -> None:
    module = gated()
    quiet_trainer(max_epochs=1).fit(module, plain(0))
    objective = objective_of(module, GatedChannels)
    quiet_trainer(max_epochs=1).fit(module, plain(0))
    assert objective.training_share.at(objective._step) == 0.5
