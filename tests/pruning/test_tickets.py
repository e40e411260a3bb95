"""Rounds and rewinding, against a loop by hand in plain PyTorch, and against the numbers of the papers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from support.small import dataset, quiet_trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import IterativePruningCallback, LotteryTicketCallback

EPOCH = 3  # optimizer steps
ROUND, BACK, ROUNDS = 4, 1, 2  # epochs
FIT = ROUND + ROUNDS * (ROUND - BACK)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.hidden(x))))


Scheduler = Callable[[Optimizer, int, int], tuple[Any, str]]  # optimizer, epochs and steps of a round
SCHEDULES: dict[str, Scheduler] = {
    "steps": lambda one, epochs, steps: (lr_scheduler.StepLR(one, 5, 0.5), "step"),
    "epochs": lambda one, epochs, steps: (lr_scheduler.MultiStepLR(one, [epochs // 2, epochs - 1], 0.1), "epoch"),
    "one cycle": lambda one, epochs, steps: (lr_scheduler.OneCycleLR(one, 0.2, total_steps=steps), "step"),
    "warm-up": lambda one, epochs, steps: (
        lr_scheduler.SequentialLR(
            one,
            [
                lr_scheduler.LinearLR(one, 0.1, total_iters=4),
                lr_scheduler.CosineAnnealingLR(one, T_max=steps - 4),
            ],
            milestones=[4],
        ),
        "step",
    ),
    "plateau": lambda one, epochs, steps: (lr_scheduler.ReduceLROnPlateau(one, factor=0.5, patience=0), "epoch"),
}


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=0.01, weight_decay=1e-3)


def momentum_of(group: dict[str, Any]) -> float:
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


class Module(LightningModule):
    def __init__(self, schedule: str | None = "steps", optimizer: Callable[[Any], Optimizer] = sgd) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Net()
        self.schedule, self.optimizer = schedule, optimizer
        self.seen: list[Any] = []
        self.rates: list[tuple[float, float]] = []
        self.validated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        group = self.trainer.optimizers[0].param_groups[0]
        self.rates.append((group["lr"], momentum_of(group)))
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("constant", 1.0)
        self.validated.append(self.net.hidden.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        trainer = self.trainer
        self.seen = [trainer.max_epochs, trainer.max_steps, trainer.estimated_stepping_batches]
        trainer.fit_loop._combined_loader = None
        if self.schedule is None:
            return optimizer
        scheduler, interval = SCHEDULES[self.schedule](optimizer, trainer.max_epochs, self.seen[2])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "constant"},
        }


def loader() -> DataLoader:
    return DataLoader(dataset(), batch_size=96 // EPOCH)


def fit(module: LightningModule, *callbacks: Callback, resume: Path | None = None, **options: Any) -> Any:
    trainer = quiet_trainer(callbacks=list(callbacks), **({"max_epochs": FIT} | options))
    trainer.fit(module, loader(), DataLoader(dataset(1, 8), batch_size=8), ckpt_path=resume, weights_only=True)
    return trainer


def table(schedule: str | None, optimizer: Callable[[Any], Optimizer], epochs: int) -> list[dict[str, Any]]:
    """What a fresh schedule gives the optimizer at each step of a round."""
    one = optimizer([nn.Parameter(torch.zeros(1))])
    scheduler, interval = (None, "") if schedule is None else SCHEDULES[schedule](one, epochs, epochs * EPOCH)
    found = []
    for step in range(epochs * EPOCH):
        found.append(
            {name: value for name, value in one.param_groups[0].items() if name in ("lr", "momentum", "betas")}
        )
        one.step()
        if scheduler is not None and (interval == "step" or (step + 1) % EPOCH == 0):
            scheduler.step(*([1.0] if schedule == "plateau" else []))
    return found


def by_hand(
    rewind: str | None,
    schedule: str | None = "steps",
    optimizer: Callable[[Any], Optimizer] = sgd,
    *,
    rate: float = 0.3,
    back: int = BACK,
    state: str = "clear",
    epochs: int = FIT,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train, prune by magnitude, go back and train, without any of the code under test."""
    net, batches = Module().net, list(loader())
    values = table(schedule, optimizer, ROUND)
    weights = [net.hidden.weight, net.head.weight]
    masks = [torch.ones_like(one) for one in weights]
    stepper = optimizer(net.parameters())
    position, number, used = 0, 0, []
    ends = [(ROUND + one * (ROUND - back)) * EPOCH for one in range(ROUNDS)]
    kept: Any = None
    for step in range(epochs * EPOCH):
        if step == back * EPOCH:
            kept = copy.deepcopy((net.state_dict(), stepper.state_dict()["state"]))
        if step in ends:
            number += 1
            total = sum(one.numel() for one in weights)
            drop = round((1 - (1 - rate) ** number) * total)
            scores = torch.cat([one.detach().abs().flatten() for one in weights])
            gone = torch.zeros(total, dtype=torch.bool)
            gone[scores.argsort()[:drop]] = True
            sizes = [one.numel() for one in weights]
            masks = [(~one).float().view(w.shape) for one, w in zip(gone.split(sizes), weights, strict=True)]
            if rewind is not None:
                position = back * EPOCH
            if rewind in ("weights", "init"):
                net.load_state_dict(kept[0])
                if state == "clear":
                    stepper = optimizer(net.parameters())
                elif state == "rewind":
                    stepper.load_state_dict(stepper.state_dict() | {"state": copy.deepcopy(kept[1])})
            with torch.no_grad():
                for one, mask in zip(weights, masks, strict=True):
                    one *= mask
        now = values[min(position, len(values) - 1)]
        stepper.param_groups[0].update(now)
        used.append(now)
        x, y = batches[step % EPOCH]
        stepper.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for one, mask in zip(weights, masks, strict=True):
            assert one.grad is not None
            one.grad *= mask
        stepper.step()
        with torch.no_grad():
            for one, mask in zip(weights, masks, strict=True):
                one *= mask
        position += 1
    return net.state_dict(), used


def assert_same(module: Module, expected: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> None:
    weights, used = expected
    assert [one[0] for one in module.rates] == pytest.approx([one["lr"] for one in used], rel=1e-12)
    assert [one[1] for one in module.rates] == pytest.approx([momentum_of(one) for one in used], rel=1e-12)
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, weights[name]), name


# ---------------------------------------------------------------------- rounds and rewinding


@pytest.mark.parametrize("rewind", ["learning_rate", "weights", "init", None])
@pytest.mark.parametrize("schedule", [*SCHEDULES, None])
def test_a_fit_is_the_loop_by_hand(rewind: Any, schedule: str | None) -> None:
    back = BACK if rewind in ("learning_rate", "weights") else 0
    epochs = ROUND + ROUNDS * (ROUND - back)
    module = Module(schedule)
    ticket = LotteryTicketCallback(0.3, rounds=ROUNDS, rewind=rewind, rewind_to=back)
    fit(module, ticket, max_epochs=epochs)
    assert module.seen == [ROUND, -1, ROUND * EPOCH]
    assert_same(module, by_hand(rewind, schedule, back=back, epochs=epochs))
    assert ticket.finished
    assert ticket.sparsity == pytest.approx(1 - 0.7**2, abs=1 / 240)


@pytest.mark.parametrize("optimizer_state", ["clear", "keep", "rewind"])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_what_becomes_of_momenta(optimizer: Any, optimizer_state: Any) -> None:
    module = Module("steps", optimizer)
    ticket = LotteryTicketCallback(0.3, rounds=ROUNDS, rewind_to=BACK, optimizer_state=optimizer_state)
    fit(module, ticket)
    assert_same(module, by_hand("weights", "steps", optimizer, state=optimizer_state))


@pytest.mark.parametrize("schedule", ["one cycle", "epochs"])
def test_what_is_left_over_goes_to_the_last_round_whose_last_learning_rate_holds(schedule: str) -> None:
    module = Module(schedule)
    fit(module, LotteryTicketCallback(0.3, rounds=ROUNDS, rewind_to=BACK), max_epochs=FIT + 2)
    assert module.seen[0] == ROUND
    assert_same(module, by_hand("weights", schedule, epochs=FIT + 2))


def test_a_fit_by_steps_is_divided_in_steps() -> None:
    module = Module("one cycle")
    fit(module, LotteryTicketCallback(0.3, rounds=2, rewind_to=1), max_epochs=-1, max_steps=32)
    # (32 + 2 * 3) / 3 = 12.67
    assert module.seen == [-1, 12, 12]
    used = by_hand("weights", "one cycle", epochs=11)[1]
    assert [one[0] for one in module.rates] == pytest.approx([one["lr"] for one in used[:32]])


def test_the_limit_that_ends_the_fit_decides_what_a_round_is() -> None:
    module = Module("epochs")
    fit(module, LotteryTicketCallback(0.3, rounds=ROUNDS, rewind_to=BACK), max_steps=10**6)
    assert module.seen == [ROUND, -1, ROUND * EPOCH]
    assert_same(module, by_hand("weights", "epochs"))
    module = Module("one cycle")
    fit(module, LotteryTicketCallback(0.3, rounds=ROUNDS, rewind_to=BACK), max_epochs=90, max_steps=FIT * EPOCH)
    assert module.seen == [ROUND, ROUND * EPOCH, ROUND * EPOCH]
    assert_same(module, by_hand("weights", "one cycle"))


def test_the_schedule_of_a_round_that_ends_inside_an_epoch_is_as_long_as_the_round() -> None:
    module = Module("one cycle")
    fit(module, LotteryTicketCallback(0.3, rounds=2, round_epochs=1.5), max_epochs=5)  # 4.5 steps
    assert module.rates[module.seen[2]] == module.rates[0]


@pytest.mark.parametrize(("frequency", "rewind_to", "warns"), [(2, 0, True), (2, 1, False), (3, 0, False)])
def test_a_scheduler_that_counts_epochs_of_the_fit_is_named(frequency: int, rewind_to: int, warns: bool) -> None:
    class Seldom(Module):
        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            found["lr_scheduler"]["frequency"] = frequency
            return found

    module, ticket = Seldom("epochs"), LotteryTicketCallback(0.3, rounds=1, round_epochs=3, rewind_to=rewind_to)
    if warns:
        with pytest.warns(UserWarning, match=r"MultiStepLR steps with frequency=2.*multiple of its frequency"):
            fit(module, ticket, max_epochs=6)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*frequency")
        fit(module, ticket, max_epochs=6)
    first = module.rates[rewind_to * EPOCH : 3 * EPOCH]
    assert module.rates[3 * EPOCH : 3 * EPOCH + len(first)] == first


def test_a_pretrained_network_is_pruned_before_the_first_step() -> None:
    module = Module("epochs")
    start = module.net.hidden.weight.detach().clone()
    seen: list[Tensor] = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(module.net.hidden.weight.detach().clone())

    ticket = LotteryTicketCallback(0.3, rounds=2, rewind="learning_rate", pretrained=True, scope="layer")
    fit(module, ticket, Look(), max_epochs=8)
    assert module.seen[0] == 4
    order = start.abs().flatten().argsort()[: round(0.3 * start.numel())]
    assert torch.equal(seen[0].flatten().index_fill(0, order, 0.0), seen[0].flatten())
    assert int((seen[11] == 0).sum()) == round(0.3 * start.numel())
    assert int((seen[12] == 0).sum()) == round(0.51 * start.numel())
    assert [one[0] for one in module.rates[:12]] == [one[0] for one in module.rates[12:]]


def test_a_round_begins_after_the_validation_that_ends_the_one_before() -> None:
    """The network that is validated, and saved, at the end of a round is the trained one."""
    module = Module()
    fit(module, LotteryTicketCallback(0.3, rounds=ROUNDS, rewind_to=BACK))
    dense = Module()
    fit(dense, max_epochs=ROUND)
    validated = module.validated[-FIT:]
    assert torch.equal(validated[ROUND - 1], dense.net.hidden.weight)
    assert not torch.equal(validated[ROUND], dense.net.hidden.weight)
    assert not (validated[ROUND - 1] == 0).any()
    assert (validated[ROUND] == 0).any()


def test_the_ladder_of_the_paper() -> None:
    """LeNet-300-100, 20 % of what is left, 10 % of the output layer: Frankle and Carbin 2019. Nothing trains."""

    class LeNet(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.fc3(self.fc2(self.fc1(batch[0]))).sum()

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.0)

    left: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights = [pl_module.fc1.weight, pl_module.fc2.weight, pl_module.fc3.weight]
            left.append(100 * sum(int((one != 0).sum()) for one in weights) / sum(one.numel() for one in weights))

    data = DataLoader(TensorDataset(torch.zeros(1, 784)))
    ticket = LotteryTicketCallback({"fc3": 0.1, "*": 0.2}, rounds=20, rewind="init")
    quiet_trainer(callbacks=[ticket, Look()], max_epochs=21).fit(LeNet(), data)
    found = [round(left[number], 2) for number in (1, 3, 5, 9, 15, 20)]
    assert found == [80.04, 51.28, 32.87, 13.52, 3.58, 1.19]
    assert ticket.sparsity == pytest.approx(1 - 0.0119, abs=1e-4)


def test_an_amount_is_of_the_original_at_the_end() -> None:
    ticket = LotteryTicketCallback(amount=0.75, rounds=2, rewind="learning_rate")
    module = Module()
    sparsities: list[float] = []

    class Look(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            sparsities.append(ticket.sparsity)

    fit(module, ticket, Look(), max_epochs=3)
    assert sparsities == pytest.approx([0.0, 0.5, 0.75], abs=1 / 240)


def test_a_criterion_compares_with_the_weights_of_rewind_to() -> None:
    kept: list[Tensor] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            kept.append(pl_module.net.hidden.weight.detach().clone())

    module = Module()
    ticket = LotteryTicketCallback(0.3, rounds=1, rewind_to=1, criterion="magnitude_increase", scope="layer")
    fit(module, ticket, Look(), max_epochs=7)
    increase = (kept[3].abs() - kept[0].abs()).flatten()  # after epochs 4 and 1
    gone = increase.argsort()[: round(0.3 * increase.numel())]
    assert not ticket.masks["net.hidden.weight"].flatten()[gone].any()
    assert int(ticket.masks["net.hidden.weight"].sum()) == increase.numel() - len(gone)


def test_two_optimizers_with_schedulers_go_back() -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            groups = [one.param_groups[0] for one in self.trainer.optimizers]
            self.rates.append((groups[0]["lr"], groups[1]["lr"]))
            for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
                scheduler.step()

        def configure_optimizers(self) -> Any:
            optimizers = [
                sgd(self.net.hidden.parameters()),
                adam([*self.net.norm.parameters(), *self.net.head.parameters()]),
            ]
            schedulers = [
                lr_scheduler.OneCycleLR(optimizers[0], 0.2, total_steps=ROUND * EPOCH),
                lr_scheduler.ExponentialLR(optimizers[1], 0.9),
            ]
            return optimizers, schedulers

    module = Manual()
    fit(module, LotteryTicketCallback(0.3, rounds=ROUNDS, rewind="learning_rate", rewind_to=BACK))
    one, other = table("one cycle", sgd, ROUND), [0.01 * 0.9**step for step in range(ROUND * EPOCH)]
    places = [*range(12), *range(3, 12), *range(3, 12)]
    assert [found[0] for found in module.rates] == pytest.approx([one[place]["lr"] for place in places])
    assert [found[1] for found in module.rates] == pytest.approx([other[place] for place in places])


# ---------------------------------------------------------------------- resuming


class Noisy(Module):
    """Data in order, and dropout: the random state counts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        return F.cross_entropy(self(F.dropout(batch[0], 0.1)), batch[1])


class Loader:
    """Batches in order, with a position that a checkpoint holds."""

    def __init__(self) -> None:
        self.batches, self.position = list(loader()), 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Any:
        for place in range(self.position % EPOCH, EPOCH):
            self.position = place + 1
            yield self.batches[place]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("rewind", ["learning_rate", "weights", None])
def test_a_resume_from_any_step_is_exact(rewind: Any, tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> tuple[Noisy, Any]:
        module = Noisy("one cycle")
        torch.manual_seed(5 if resume is None else 99)
        ticket = LotteryTicketCallback(0.3, rounds=2, rewind=rewind, rewind_to=1, optimizer_state="rewind")
        folder = tmp_path / ("whole" if resume is None else "again")
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        # rounds begin inside of epochs
        trainer = quiet_trainer(max_epochs=-1, max_steps=22, enable_checkpointing=True, callbacks=[ticket, save])
        trainer.fit(module, Loader(), ckpt_path=resume, weights_only=True)
        return module, trainer

    whole, trainer = run()
    assert whole.seen == [-1, 9, 9]
    for step in (1, 3, 4, 8, 9, 10, 12, 15, 16, 19, 21):
        again, resumed = run(tmp_path / "whole" / f"step={step}.ckpt")
        assert again.seen == whole.seen
        assert again.rates == whole.rates[step:], step
        for name, value in again.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), (step, name)
        assert str(resumed.optimizers[0].state_dict()) == str(trainer.optimizers[0].state_dict())


def test_a_longer_resume_keeps_the_rounds_and_their_schedule(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Module("one cycle"), LotteryTicketCallback(0.3, rounds=2, rewind_to=1), save, enable_checkpointing=True)
    module, ticket = Module("one cycle"), LotteryTicketCallback(0.3, rounds=2, rewind_to=1)
    trainer = fit(module, ticket, resume=tmp_path / "epoch=4.ckpt", max_epochs=FIT + 10)
    assert module.seen[0] == ROUND
    assert (trainer.max_epochs, trainer.max_steps) == (FIT + 10, -1)


# ---------------------------------------------------------------------- the Trainer around it


def test_the_limits_are_put_back_after_an_error() -> None:
    class Broken(Module):
        def configure_optimizers(self) -> Any:
            self.seen = [self.trainer.max_epochs]
            raise RuntimeError("broken")

    module = Broken()
    trainer = quiet_trainer(callbacks=[LotteryTicketCallback(rounds=2)], max_epochs=9)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module, loader())
    assert module.seen == [3]
    assert trainer.max_epochs == 9
    assert "setup_optimizers" not in vars(trainer.strategy)


def test_a_second_fit_trains_on_with_its_own_schedule() -> None:
    module, ticket = Module("epochs"), LotteryTicketCallback(0.3, rounds=2, rewind=None)
    fit(module, ticket, max_epochs=12)
    masks = {name: mask.clone() for name, mask in ticket.masks.items()}
    fit(module, ticket, max_epochs=4)
    assert module.seen[0] == 4
    assert [one[0] for one in module.rates[-12:]] == pytest.approx([0.1] * 6 + [0.01] * 3 + [0.001] * 3)
    assert all(torch.equal(masks[name], ticket.masks[name]) for name in masks)


def test_early_stopping_counts_anew_at_each_prune() -> None:
    module = Module()
    stopping = EarlyStopping("constant", patience=3)
    # 4 epochs a round; a constant metric would end the fit after 4 validations without a better one
    trainer = fit(
        module, LotteryTicketCallback(0.3, rounds=2, round_epochs=3, rewind="learning_rate"), stopping, max_epochs=20
    )
    assert trainer.current_epoch == 3 + 3 + 4


def test_the_bar_says_the_round() -> None:
    module, ticket = Module(), LotteryTicketCallback(0.3, rounds=2, rewind="learning_rate")
    trainer = fit(module, ticket, max_epochs=3)
    assert float(trainer.progress_bar_metrics["compress/round_of_2"]) == 2.0
    assert float(trainer.logged_metrics["compress/sparsity"]) == pytest.approx(0.51, abs=0.01)


def test_a_rate_of_nothing_changes_nothing() -> None:
    bare, idle = Module("one cycle"), Module("one cycle")
    fit(bare)
    fit(idle, LotteryTicketCallback(0.0))
    assert idle.seen == bare.seen
    assert idle.rates == bare.rates
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in idle.state_dict().items())


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rate": 0.2, "amount": 0.5}, "leave one out"),
        ({"rate": 1.0}, "below 1"),
        ({"rate": {"a": 1.5}}, "for 'a'"),
        ({"rate": {"a": 0.5}, "granularity": "neuron"}, "granularity='weight'"),
        ({"amount": 1.0}, "below 1"),
        ({"rounds": 0}, "1 or more"),
        ({"round_epochs": 0}, "above 0"),
        ({"rewind": "lr"}, "'learning_rate'"),
        ({"optimizer_state": "reset"}, "'clear'"),
        ({"rewind_to": -1}, "0 or later"),
        ({"rewind": "init", "rewind_to": 1}, "rewind='weights'"),
        ({"rewind_to": 3, "round_epochs": 3}, "not before the first prune"),
        ({"pretrained": True}, "no earlier weights"),
        ({"pretrained": True, "rewind": "learning_rate", "rewind_to": 1}, "use 0"),
        ({"pretrained": True, "rewind": None, "criterion": "taylor"}, "before the first step"),
        ({"shrink": "during_fit", "granularity": "neuron"}, "on_fit_end"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LotteryTicketCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"rounds": 5}, {"max_epochs": 5}, "max_epochs=6 at least"),
        ({"rounds": 3, "rewind_to": 2.5}, {"max_epochs": 4}, r"max_epochs=5 at least"),
        ({"rounds": 3, "round_epochs": 4, "rewind_to": 1}, {"max_epochs": 12}, "max_epochs=13 at least"),
        ({"rounds": 4, "pretrained": True, "rewind": None}, {"max_epochs": 3}, "max_epochs=4 at least"),
        ({"rounds": 5}, {"max_epochs": -1, "max_steps": 4}, "max_steps=6 at least"),
        ({"rounds": 5}, {"max_epochs": -1}, "no planned end"),
    ],
)
def test_rounds_that_do_not_fit(settings: dict[str, Any], options: dict[str, Any], says: str) -> None:
    module = Module(None)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=says):
        fit(module, LotteryTicketCallback(**settings), **options)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.seen == []


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_resume_without_the_initial_weights_is_refused(weights_only: bool, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="a", save_weights_only=weights_only)
    writer = [LotteryTicketCallback(rounds=2)] if weights_only else []
    fit(Module(), *writer, save, max_epochs=3, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"no state of LotteryTicketCallback.*save_weights_only=True.*new fit"):
        fit(Module(), LotteryTicketCallback(rounds=2), resume=tmp_path / "a.ckpt", max_epochs=9)


def test_a_scheduler_that_cannot_go_back_is_refused() -> None:
    class Fixed:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None: ...

    class Own(Module):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.parameters())
            return [optimizer], [Fixed(optimizer)]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    with pytest.raises(Exception, match=r"Fixed.*state_dict"):
        fit(Own(), LotteryTicketCallback(rounds=2))


def test_groups_of_parameters_that_come_later_are_refused() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    with pytest.raises(ValueError, match=r"SGD has 2 groups of parameters, and had 1 at rewind_to"):
        fit(Module(None), Unfreeze(), LotteryTicketCallback(rounds=2))


def test_weights_do_not_go_back_beside_an_average() -> None:
    with pytest.raises(ValueError, match=r"rewind='weights'.*EMAWeightAveraging.*rewind='learning_rate'"):
        fit(Module(), EMAWeightAveraging(), LotteryTicketCallback(rounds=2))


def test_two_of_them_do_not_both_take_the_network_back() -> None:
    tickets = [LotteryTicketCallback(rounds=2, target=target) for target in ("net.hidden", "net.head")]
    with pytest.raises(ValueError, match=r"both restore earlier networks.*with all targets"):
        fit(Module(), *tickets)


def test_channels_go_back_and_leave_at_the_end() -> None:
    begun: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step % EPOCH == 0:
                begun.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})

    module, ticket = Module(), LotteryTicketCallback(0.5, rounds=2, granularity="neuron", rewind="init")
    fit(module, ticket, Look(), max_epochs=3)
    dense, last = begun[0], begun[2]
    silent = last["net.norm.weight"] == 0
    assert int(silent.sum()) == 12  # a half of 16, and a half of the rest
    for name in ("net.hidden.weight", "net.hidden.bias", "net.norm.weight", "net.norm.bias"):
        assert not last[name][silent].any()
        assert torch.equal(last[name][~silent], dense[name][~silent])
    assert torch.equal(last["net.head.weight"], dense["net.head.weight"])  # its columns meet channels of zero
    assert module.net.hidden.weight.shape == (4, 12)
    assert module.net.head.weight.shape == (3, 4)


def test_it_does_not_go_with_another_mask() -> None:
    with pytest.raises(ValueError, match="both prune"):
        fit(Module(), IterativePruningCallback(), LotteryTicketCallback(rounds=2))
