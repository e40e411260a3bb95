"""Gates in a fit: the loss, the schedule, the rates, and what is refused or said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from support.gated import KINDS, gated_net
from support.ranks import RankPair
from support.small import FEATURES, SmallModule, dataset, plain, quiet_trainer, shuffled
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import SkippableBlocks
from lightning_compress.skipping.budget import Measured, budget_loss
from lightning_compress.skipping.gates import SkipGates, gates_of

X = torch.zeros(2, FEATURES)


def wrapped(module: SmallModule | None = None, **options: Any) -> SkippableBlocks:
    torch.manual_seed(2)
    module = SmallModule(residual=True) if module is None else module
    return SkippableBlocks(module.train(), **({"target": 0.6, "network": "net", "example_inputs": X} | options))


def gates_in(module: LightningModule) -> SkipGates:
    gates = gates_of(module.net)
    assert gates is not None
    return gates


class Seen(Callback):
    """Keeps what a callback can see after each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.targets: list[float] = []
        self.draws: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.targets.append(float(pl_module._objective().target_now()))
        self.draws.append(gates_in(pl_module).draws)


@pytest.mark.parametrize(("budget", "noise"), [("per_gate", True), ("total", True), ("total", False)])
def test_the_loss_is_the_users_and_the_budget(budget: Any, noise: bool) -> None:
    module = wrapped(budget=budget, weight=3.0, noise=noise)
    batch = next(iter(plain(0)))
    seen = Seen()
    start = {name: one.clone() for name, one in module.state_dict().items()}
    torch.manual_seed(11)
    quiet_trainer(max_steps=1, callbacks=[seen], num_sanity_val_steps=0).fit(module, plain(0))

    torch.manual_seed(11)
    other = wrapped()
    other.load_state_dict(start)
    gates = gates_in(other)
    gates.draws = noise
    torch.manual_seed(11)
    next(iter(plain(0)))  # the Trainer draws the loader's seed
    losses = []
    for draws in range(4):  # and perhaps more, before the step
        state = torch.get_rng_state()
        with gates.collecting() as found:
            loss = F.cross_entropy(other.train()(batch[0]), batch[1])
        runs = found.runs()
        assert runs is not None
        losses.append(float(loss + 3.0 * budget_loss(gates, runs, 1.0, budget)))
        torch.set_rng_state(state)
        torch.rand(draws + 1)
    assert min(abs(one - seen.losses[0]) for one in losses) < 1e-6


@pytest.mark.parametrize("noise", [True, False])
def test_the_target_falls_and_then_draws_end(noise: bool) -> None:
    seen = Seen()
    quiet_trainer(max_epochs=3, callbacks=[seen]).fit(wrapped(noise=noise), shuffled(), plain())
    assert len(seen.targets) == 36
    expected = [max(0.6, 1.0 - 0.4 * step / 12) for step in range(36)]
    assert seen.targets == pytest.approx(expected)
    assert seen.draws == [noise and step < 24 for step in range(36)]


@pytest.mark.parametrize("kind", KINDS)
def test_rates_are_those_of_the_last_validation(kind: Any) -> None:
    module = SmallModule(residual=True)
    module.net = gated_net(kind)[0]
    with_gates = wrapped(module)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(with_gates, shuffled(), plain())
    gates = gates_in(with_gates)
    with gates.collecting() as found, torch.no_grad():
        with_gates.eval()(plain().dataset.tensors[0])
    runs = found.runs()
    assert runs is not None
    assert gates.rates.tolist() == pytest.approx(runs.mean(0).tolist())
    used = float(gates.least + (gates.rates * gates.shares).sum())
    assert float(trainer.callback_metrics["compress/used"]) == pytest.approx(used)
    assert not gates.draws


def test_measuring_sets_the_rates_and_validating_does_not() -> None:
    module = SmallModule(residual=True)
    module.net = gated_net()[0]
    with_gates = wrapped(module)
    quiet_trainer().validate(with_gates, plain(), verbose=False)
    assert bool(gates_in(with_gates).rates.isnan().all())
    found = with_gates.measure(plain())
    assert gates_in(with_gates).rates.tolist() == list(found.rates.values())
    assert found.policies >= 2
    assert found.varying == 1.0
    assert 0.0 < found.entropy <= 2.0


def rates_on_ranks(kind: str, devices: int) -> dict[str, Any]:
    seed_everything(1)
    module = SmallModule(residual=True)
    module.net = gated_net(kind)[0]
    with_gates = wrapped(module)
    strategy = "ddp" if devices == 2 else "auto"
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2, devices=devices, strategy=strategy)
    trainer.fit(with_gates, DataLoader(dataset(0), batch_size=8), plain())
    gates = gates_in(with_gates)
    return {"rates": gates.rates, "used": trainer.callback_metrics["compress/used"], "state": with_gates.state_dict()}


def test_ranks_have_the_same_gates_and_rates_of_all_samples(rank_pair: RankPair, tmp_path: Path) -> None:
    one, other = rank_pair.run("skipping.test_training:rates_on_ranks", tmp_path, kind="per_block", devices=2)
    assert torch.equal(one["rates"], other["rates"])
    assert torch.equal(one["used"], other["used"])
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
    module = SmallModule(residual=True)
    module.net = gated_net()[0]
    with_gates = wrapped(module)
    with_gates.load_state_dict(one["state"])
    assert with_gates.measure(plain()).rates == pytest.approx(
        dict(zip(("block1", "block2"), one["rates"].tolist(), strict=True))
    )


def test_a_static_choice_is_said_once_with_what_to_do() -> None:
    module = wrapped(weight=1e-6)
    with pytest.warns(UserWarning, match=r"open for all samples at step 24.*Take a larger weight=") as said:
        quiet_trainer(max_epochs=4).fit(module, shuffled(), plain())
    assert len([one for one in said if "static choice" in str(one.message)]) == 1
    for rates, words in (((0.0, 0.02), "closed for all.*larger target="), ((0.0, 1.0), "the same for all.*per_gate")):
        found = Measured(dict(zip("ab", rates, strict=True)), 0.3, 0.0, 1, 0.0)
        with pytest.warns(UserWarning, match=words):
            wrapped()._objective()._warn_of_collapse(found)


class NoGradient(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            hidden = self(batch[0])
        return F.cross_entropy(hidden + self.net.head.bias, batch[1])


class Elsewhere(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net.head.bias.sum()


def test_a_step_that_teaches_gates_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"have no gradient, and would learn nothing.*torch\.no_grad"):
        quiet_trainer().fit(wrapped(NoGradient(residual=True)), plain(0))
    with pytest.raises(ValueError, match="did not run the network 'net', whose blocks have gates"):
        quiet_trainer().fit(wrapped(Elsewhere(residual=True)), plain(0))


class TwoCalls(SmallModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self(batch[0][:4]), self(batch[0][4:])
        return F.cross_entropy(torch.cat([first, second]), batch[1])


class Dropped(nn.Module):
    """A block that is left out in all steps of a training but the first."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.ran = block, False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.ran:
            return x
        self.ran = self.training
        found: Tensor = self.block(x)
        return found


def test_a_step_may_drop_all_blocks() -> None:
    module = SmallModule(residual=True)
    module.net.block1, module.net.block2 = Dropped(module.net.block1), Dropped(module.net.block2)
    seen = Seen()
    quiet_trainer(max_steps=3, callbacks=[seen]).fit(wrapped(module), plain(0))
    assert len(seen.losses) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_may_run_twice_in_a_step(kind: Any) -> None:
    module = wrapped(TwoCalls(residual=True), gate=kind)
    quiet_trainer(max_epochs=1).fit(module, shuffled(), plain())
    assert all(bool(one.isfinite().all()) for one in module.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": 0.0}, r"target is the share of the network's MACs.*got 0\.0"),
        ({"target": 1.0}, r"target is the share"),
        ({"target": 0.2}, r"target=0\.2 is below what is left without the blocks block1, block2: 0\.2\d\d of the MACs"),
        ({"gate": "none"}, "gate is one of per_block, recurrent, policy; got 'none'"),
        ({"budget": "none"}, "budget is one of per_gate, total"),
        ({"train": "none"}, "train is one of straight_through, hybrid, reinforce"),
        ({"weight": 0.0}, "weight is a number above 0"),
        ({"temperature": float("nan")}, "temperature is a number above 0"),
        ({"blocks": ["block3"]}, "block3"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrapped(**options)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no residual"):
        wrapped(SmallModule())


def test_an_optimizer_without_the_gates_is_refused() -> None:
    class Others(SmallModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([one for name, one in self.named_parameters() if "gates" not in name], lr=0.1)

    with pytest.raises(ValueError, match=r"parameters that no optimizer trains: net\.skip_gates"):
        quiet_trainer().fit(wrapped(Others(residual=True)), plain(0))
