"""`calibrate` and `deploy`: thresholds from the module's own validation, and a network that keeps their promise."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from support.small import CLASSES, FEATURES, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import EarlyExitHeads
from lightning_compress.early_exit.heads import heads_of

EXITS = ["net.norm", "net.hidden"]


def loader(seed: int, samples: int = 600) -> DataLoader:
    return DataLoader(dataset(seed, samples), batch_size=50)


@pytest.fixture(scope="module")
def trained() -> EarlyExitHeads:
    seed_everything(1)
    wrapped = EarlyExitHeads(SmallModule("adam"), EXITS, num_classes=CLASSES)
    quiet_trainer(max_epochs=4).fit(wrapped, loader(0))
    return wrapped


@pytest.mark.parametrize("settings", [{"budget": 0.6, "unit": "share"}, {"accuracy_drop": 0.02}, {"rule": "entropy"}])
def test_the_deployed_network_does_what_the_calibration_says(trained: EarlyExitHeads, settings: dict[str, Any]) -> None:
    wrapped = copy.deepcopy(trained)
    settings = settings if {"budget", "accuracy_drop"} & settings.keys() else settings | {"budget": 1000.0}
    outcome = wrapped.calibrate(loader(5), **settings)
    early = wrapped.deploy(min_gain=float("-inf"))
    x, y = dataset(5, 600).tensors
    answers, exit_index = early(x)
    assert torch.equal(exit_index, outcome.exit_index)
    assert float((answers.argmax(1) == y).float().mean()) == pytest.approx(outcome.accuracy)
    costs = torch.tensor(heads_of(wrapped).rule.costs)  # type: ignore[union-attr]
    assert float(costs[exit_index].mean()) == pytest.approx(outcome.mean_cost)
    if settings.get("unit") == "share":
        full = sum(heads_of(wrapped).rule.stages)  # type: ignore[union-attr]
        assert outcome.mean_cost <= 0.6 * full


def test_the_rule_knows_what_exits_are_right_about(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained)
    outcome = wrapped.calibrate(loader(5), budget=0.7, unit="share")
    early, y = wrapped.deploy(min_gain=float("-inf")), dataset(5, 600).tensors[1]
    answers, full = (early(dataset(5, 600).tensors[0], **options)[0].argmax(1) == y for options in ({}, {"exit": 3}))
    rule = heads_of(wrapped).rule  # type: ignore[union-attr]
    assert rule is not None
    for k, advantage in enumerate(rule.advantages):
        there = outcome.exit_index == k
        assert advantage == pytest.approx(float((answers[there].float() - full[there].float()).sum()) / 600)


def test_every_sample_gets_the_answer_of_its_exit(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained).eval()
    wrapped.calibrate(loader(5), budget=0.7, unit="share")
    early, heads = wrapped.deploy(min_gain=float("-inf")), heads_of(wrapped)
    assert heads is not None
    x = dataset(7, 40).tensors[0]
    answers, exit_index = early(x)
    assert len(set(exit_index.tolist())) > 1
    found: dict[str, Tensor] = {}
    for layer in EXITS:
        wrapped.get_submodule(layer).register_forward_hook(lambda m, a, out, name=layer: found.__setitem__(name, out))
    with torch.no_grad():
        for sample, answer, number in zip(x, answers, exit_index.tolist(), strict=True):
            full = wrapped(sample[None])
            logits = [*(head(found[layer]) for layer, head in heads.by_layer().items()), full]
            assert torch.allclose(answer, logits[number][0], atol=1e-6)


def test_budgets_in_milliseconds_are_measured_here(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained)
    wrapped.calibrate(loader(5), budget=1e3, unit="ms")
    rule = heads_of(wrapped).rule  # type: ignore[union-attr]
    assert rule is not None
    assert rule.unit == "ms"
    assert all(0 <= cost < 1 for cost in (*rule.stages, *rule.heads))


def test_thresholds_travel_with_copies_and_state_dicts(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained)
    wrapped.calibrate(loader(5), budget=0.7, unit="share")
    x = dataset(7, 40).tensors[0]
    expected = wrapped.deploy(min_gain=float("-inf"))(x)
    fresh = EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES))
    fresh.load_state_dict(wrapped.state_dict())
    for one in (fresh, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        answers, exit_index = one.deploy(min_gain=float("-inf"))(x)
        assert torch.equal(answers, expected[0])
        assert torch.equal(exit_index, expected[1])


def test_calibrating_leaves_the_module_as_it_was(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained)
    was, trainer = copy.deepcopy(wrapped.state_dict()), wrapped._trainer
    random = torch.get_rng_state()
    wrapped.calibrate(loader(5), budget=0.7, unit="share")
    assert wrapped._trainer is trainer
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(one, was[name]) for name, one in wrapped.state_dict().items())


def test_points_of_a_report_are_different_ways_within_the_budgets(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained)
    wrapped.calibrate(loader(5), budget=0.9, unit="share")
    rule = heads_of(wrapped).rule  # type: ignore[union-attr]
    assert rule is not None
    budgets = [one.network.options["budget"] for one in wrapped.operating_points() if "budget" in one.network.options]  # type: ignore[index,operator]
    ways = [rule.within(budget).thresholds for budget in budgets]
    assert budgets == sorted(budgets)
    assert len(set(ways)) == len(ways) > 0


def test_targets_are_those_of_a_batch_that_the_step_takes_apart() -> None:
    class Pops(SmallModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batch.pop("labels")
            self(**batch)

    samples = [{"x": x, "labels": y} for x, y in zip(*dataset(5, 600).tensors, strict=True)]
    wrapped = EarlyExitHeads(Pops(), EXITS, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES))
    wrapped.calibrate(DataLoader(samples, batch_size=50), budget=0.9, unit="share")  # type: ignore[arg-type]


def test_hooks_that_call_the_logger_are_no_hindrance() -> None:
    class Module(SmallModule):
        def on_validation_epoch_end(self) -> None:
            self.logger.experiment.add_scalar("one", 1.0)  # type: ignore[union-attr]
            self.logger.log_metrics({"one": 1.0})  # type: ignore[union-attr]

    wrapped = EarlyExitHeads(Module(), EXITS, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES))
    wrapped.calibrate(loader(5), budget=0.9, unit="share")


def test_samples_of_the_training_are_said(trained: EarlyExitHeads) -> None:
    seed_everything(1)
    wrapped = EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES)
    quiet_trainer(max_epochs=1).fit(wrapped, train := loader(0))
    with pytest.warns(UserWarning, match="samples that the network was trained on"):
        wrapped.calibrate(train, budget=0.7, unit="share")


class Regression(SmallModule):
    """Predicts three numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), nn.functional.one_hot(batch[1], CLASSES).float())


def test_outputs_that_are_no_classes_leave_by_the_users_confidence() -> None:
    seed_everything(1)
    wrapped = EarlyExitHeads(Regression("adam"), EXITS, num_classes=CLASSES)
    quiet_trainer(max_epochs=2).fit(wrapped, loader(0))

    def confidence(output: Tensor) -> Tensor:
        return output.amax(1) - output.mean(1)

    def right(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) == targets).double()

    outcome = wrapped.calibrate(loader(5), budget=0.7, unit="share", confidence=confidence, right=right)
    early = wrapped.deploy(confidence=confidence, min_gain=float("-inf"))
    assert torch.equal(early(dataset(5, 600).tensors[0])[1], outcome.exit_index)


def test_what_can_not_be_calibrated_or_deployed_is_refused(trained: EarlyExitHeads) -> None:
    wrapped = copy.deepcopy(trained)
    with pytest.raises(ValueError, match="no heads yet"):
        EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES).calibrate(loader(5), budget=1.0)
    with pytest.raises(ValueError, match="deploy\\(\\) needs heads"):
        EarlyExitHeads(SmallModule(), EXITS, num_classes=CLASSES).deploy()
    with pytest.raises(ValueError, match="pass exactly one of them"):
        wrapped.calibrate(loader(5))
    with pytest.raises(ValueError, match="they cost"):
        wrapped.calibrate(loader(5), budget=1.0)
    with pytest.raises(ValueError, match="needs right="):
        wrapped.calibrate(loader(5), budget=0.5, unit="share", confidence=lambda output: output[:, 0])
    with pytest.raises(ValueError, match="no thresholds yet"):
        wrapped.deploy()(torch.zeros(2, FEATURES))
    assert wrapped.deploy()(torch.zeros(2, FEATURES), exit=1)[1].tolist() == [0, 0]


def test_heads_that_have_become_nan_are_said_at_the_epochs_end_and_refused_later() -> None:
    class Diverges(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.current_epoch else loss

    seed_everything(1)
    wrapped = EarlyExitHeads(Diverges(), EXITS, num_classes=CLASSES, train="frozen")
    with pytest.warns(UserWarning, match=r"exit_heads\.1\..* no finite numbers since epoch 1.*Adam") as said:
        quiet_trainer(max_epochs=3).fit(wrapped, loader(0))
    assert len([one for one in said if "no finite numbers" in str(one.message)]) == 1
    for act in (wrapped.deploy, lambda: wrapped.calibrate(loader(5), budget=0.7, unit="share")):
        with pytest.raises(ValueError, match=r"head of exit 1, after 'net.norm', has .*smaller learning rate.*Adam"):
            act()


def test_targets_that_can_not_be_told_are_refused() -> None:
    class Bare(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch)

    wrapped = EarlyExitHeads(Bare(), EXITS, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES))
    inputs = DataLoader(dataset(5, 600).tensors[0], batch_size=50)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass targets="):
        wrapped.calibrate(inputs, budget=0.7, unit="share")


def test_a_validation_that_asks_no_network_is_refused() -> None:
    class Module(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    wrapped = EarlyExitHeads(Module(), EXITS, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES))
    with pytest.raises(ValueError, match="did not call the network"):
        wrapped.calibrate(plain(1), budget=0.7, unit="share")
