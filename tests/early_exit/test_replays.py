"""Replays of a step keep their own numbers, however the user's module counts: each against a count by hand."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from support.small import CLASSES, FEATURES, SmallModule, dataset, plain, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MetricTracker
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress import EarlyExitHeads
from lightning_compress.early_exit.heads import heads_of

EXITS = ["net.norm", "net.hidden"]
LABELS = ("", "exit1/", "exit2/", "exit3/")


def with_exits(kind: type[SmallModule]) -> EarlyExitHeads:
    seed_everything(1)
    return EarlyExitHeads(kind(), EXITS, num_classes=CLASSES, example_inputs=torch.zeros(2, FEATURES))


def accuracies(wrapped: EarlyExitHeads, batches: Any) -> dict[str, float]:
    """Return the accuracy of each exit, counted by hand."""
    heads, features, hits = heads_of(wrapped), {}, defaultdict(list)
    assert heads is not None
    handles = [
        wrapped.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: features.update({name: out}))
        for name in EXITS
    ]
    wrapped.eval()
    with torch.no_grad():
        for x, y in batches:
            full = wrapped(x)
            exits = [head(features[name]) for name, head in heads.by_layer().items()]
            for label, logits in zip(LABELS, [full, *exits, full], strict=True):
                hits[label].append((logits.argmax(1) == y).double())
    for handle in handles:
        handle.remove()
    return {label: float(torch.cat(some).mean()) for label, some in hits.items()}


def micro() -> MulticlassAccuracy:
    return MulticlassAccuracy(CLASSES, average="micro")


def hits_of(module: SmallModule, batch: Any) -> Tensor:
    return (module(batch[0]).argmax(1) == batch[1]).float()


class Numbers(SmallModule):
    """Starts counting in a hook that logs nothing."""

    def on_validation_epoch_start(self) -> None:
        self.right, self.all = 0, 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.right += int(hits_of(self, batch).sum())
        self.all += len(batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log("acc", self.right / self.all)


class Nested(SmallModule):
    """Has lists in a dict and in a list, and private ones."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[Tensor]] = {"val": [], "test": []}
        self.by_loader: list[list[Tensor]] = [[], []]
        self._private: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        hits = hits_of(self, batch)
        for some in (self.outputs["val"], self.by_loader[0], self._private):
            some.append(hits)

    def on_validation_epoch_end(self) -> None:
        for name, some in (("a", self.outputs["val"]), ("b", self.by_loader[0]), ("c", self._private)):
            self.log(f"acc_{name}", torch.cat(some).mean())
            some.clear()


class Meter:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sum, self.count = np.zeros(()), 0

    def update(self, hits: Tensor) -> None:
        self.sum += float(hits.sum())
        self.count += len(hits)


class Meters(SmallModule):
    """Counts in objects of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.meter, self.meters = Meter(), {"val": Meter()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.meter.update(hits := hits_of(self, batch))
        self.meters["val"].update(hits)

    def on_validation_epoch_end(self) -> None:
        self.log("acc_a", float(self.meter.sum) / self.meter.count)
        self.log("acc_b", float(self.meters["val"].sum) / self.meters["val"].count)
        self.meter.reset()
        self.meters["val"].reset()


class AtBatchEnd(SmallModule):
    """Updates its metric in the hook at a batch's end, from what the step returns."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = micro()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return {"logits": self(batch[0]), "y": batch[1]}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.accuracy.update(outputs["logits"], outputs["y"])

    def on_validation_epoch_end(self) -> None:
        self.log("acc", self.accuracy.compute())
        self.accuracy.reset()


class Tracked(SmallModule):
    """Has a tracker, metrics that are no submodules, and a list of those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker, self.hidden, self.known = MetricTracker(micro()), {"acc": micro()}, micro()
        self.all = [self.known]

    def on_validation_epoch_start(self) -> None:
        self.tracker.increment()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        for one in (self.tracker, self.hidden["acc"], *self.all):
            one.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        for name, one in (("a", self.tracker), ("b", self.hidden["acc"]), ("c", self.known)):
            self.log(f"acc_{name}", one.compute())
        self.hidden["acc"].reset()
        self.known.reset()


@pytest.mark.parametrize("kind", [Numbers, Nested, Meters, AtBatchEnd, Tracked])
def test_every_exit_counts_for_itself_in_every_epoch(kind: type[SmallModule]) -> None:
    wrapped = with_exits(kind)
    for epochs in (2, 1):
        trainer = quiet_trainer(max_epochs=epochs, num_sanity_val_steps=2)
        trainer.fit(wrapped, plain(0), plain(1))
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for label, accuracy in accuracies(wrapped, plain(1)).items():
            found = {name: value for name, value in logged.items() if name.startswith(f"{label}acc")}
            assert found == pytest.approx(dict.fromkeys(found, accuracy))
            assert found


class Pair(NamedTuple):
    hits: list[Tensor]
    name: str


def test_whatever_else_a_module_holds_does_no_harm() -> None:
    """Loops, locks, generators, loggers, the module itself, and large lists; what is counted among it is kept apart."""

    class Odd(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.by_name = Pair([], "a"), defaultdict(list)
            self.loop: list[Any] = []
            self.loop += [self.loop, {"module": self}]
            self.held = [threading.Lock(), logging.getLogger(), (i for i in range(3)), SmallModule, torch.float32]
            self.large = [[str(i)] for i in range(20_000)]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.pair.hits.append(hits := hits_of(self, batch))
            self.by_name["acc"].append(hits)

        def on_validation_epoch_end(self) -> None:
            self.log("a", torch.cat(self.pair.hits).mean())
            self.log("b", torch.cat(self.by_name["acc"]).mean())
            self.pair.hits.clear()
            self.by_name.clear()

    wrapped = with_exits(Odd)
    for _ in range(2):
        found = quiet_trainer().validate(wrapped, plain(1), verbose=False)[0]
        for label, accuracy in accuracies(wrapped, plain(1)).items():
            assert (found[f"{label}a"], found[f"{label}b"]) == pytest.approx((accuracy, accuracy))


def test_an_exit_that_is_never_right_does_not_begin_with_the_full_networks_hits() -> None:
    wrapped = with_exits(Numbers)
    heads = heads_of(wrapped)
    assert heads is not None
    linear: Any = heads.get_submodule("1").linear
    for layer, bias in ((linear, [0.0, 0.0, 1.0]), (wrapped.net.head, [1.0, 0.0, 0.0])):
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(torch.tensor(bias))  # the exit always says class 2, of which there is none
    batches = [(x[y != 2], y[y != 2]) for x, y in plain(1)]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    found = quiet_trainer().validate(wrapped, loader, verbose=False)[0]
    assert {label: found[f"{label}acc"] for label in LABELS} == pytest.approx(accuracies(wrapped, batches))
    assert found["exit1/acc"] == 0.0 < found["acc"]


def test_the_best_so_far_forgets_the_sanity_check() -> None:
    class Best(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy, self.best = micro(), MaxMetric()

        def on_train_start(self) -> None:
            self.accuracy.reset()
            self.best.reset()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.accuracy(self(batch[0]), batch[1])
            self.log("acc", self.accuracy)

        def on_validation_epoch_end(self) -> None:
            self.best(1.0 if self.trainer.sanity_checking else self.accuracy.compute())
            self.log("best", self.best.compute())

    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(with_exits(Best), plain(0), plain(1))
    for label in LABELS:
        assert trainer.callback_metrics[f"{label}best"] == trainer.callback_metrics[f"{label}acc"] < 1.0


def test_training_outputs_of_an_exit_reach_the_hook_at_the_batchs_end() -> None:
    class Module(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return {"loss": loss, "own": loss.detach()}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert not outputs["loss"].requires_grad
            self.log("own", outputs["own"])

    trainer = quiet_trainer(max_steps=1, log_every_n_steps=1)
    trainer.fit(with_exits(Module), plain(0))
    for label in LABELS:
        assert trainer.callback_metrics[f"{label}own"] == trainer.callback_metrics[f"{label}train_loss"]


def test_a_step_may_take_its_batch_apart() -> None:
    class Pops(SmallModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels = batch.pop("labels")
            return F.cross_entropy(self(**batch), labels)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            labels = batch.pop("labels")
            self.log("acc", (self(**batch).argmax(1) == labels).float().mean())

    samples = [{"x": x, "labels": y} for x, y in zip(*dataset(1).tensors, strict=True)]
    wrapped = with_exits(Pops)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(wrapped, DataLoader(samples, batch_size=8), DataLoader(samples, batch_size=8))  # type: ignore[arg-type]
    found = {label: float(trainer.callback_metrics[f"{label}acc"]) for label in LABELS}
    assert found == pytest.approx(accuracies(wrapped, plain(1)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_writes_into_its_batch_is_refused(when: str) -> None:
    class Writes(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            if when == "before":
                x.mul_(2.0)
            logits = self(x)
            if when == "after":
                y.add_(1).remainder_(CLASSES)
            return F.cross_entropy(logits, y)

    with pytest.raises(ValueError, match="changes a tensor of its batch in place"):
        quiet_trainer(max_epochs=1).fit(with_exits(Writes), plain(0))


def test_generators_of_the_modules_own_give_replays_the_same_numbers() -> None:
    drawn: list[tuple[float, float]] = []

    class Module(SmallModule):
        def __init__(self) -> None:
            super().__init__()
            self.of_torch = torch.Generator().manual_seed(3)
            self.of_numpy = np.random.default_rng(3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            drawn.append((float(torch.rand((), generator=self.of_torch)), self.of_numpy.random()))
            return F.cross_entropy(self(batch[0]), batch[1])

    quiet_trainer(max_epochs=1).fit(with_exits(Module), plain(0))
    assert drawn[0::3] == drawn[1::3] == drawn[2::3]
    assert len(set(drawn)) == len(drawn) // 3


def test_a_validation_that_does_not_call_the_network_is_said() -> None:
    class Around(SmallModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    with pytest.warns(UserWarning, match="does not call the network"):
        quiet_trainer().validate(with_exits(Around), plain(1), verbose=False)
