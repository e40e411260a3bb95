"""Every technique of the registry: its numbers are in the bar, the record and the logger, under the same names."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from support.registry import REGISTRY
from support.small import SmallModule, plain, quiet_trainer, shuffled

from examples.own_technique import ClippedWeightsCallback
from lightning_compress import IterativePruningCallback
from lightning_compress.tasks.history import Recorder
from lightning_compress.tasks.progress import RunProgress
from lightning_compress.trainer.callback import CompressionCallback
from lightning_compress.trainer.effects import DeclaresEffects, Progress


class Kept(DummyLogger):
    """Keeps the last value of every number that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.last |= metrics


def fit(module: SmallModule, callbacks: list[Callback], **options: Any) -> tuple[Trainer, RunProgress]:
    bar = RunProgress(before=0, total=4)
    bar.disable()
    trainer = quiet_trainer(
        callbacks=[*callbacks, bar], enable_progress_bar=True, log_every_n_steps=1, **({"max_epochs": 3} | options)
    )
    trainer.fit(module, shuffled(), plain())
    return trainer, bar


def progress(trainer: Trainer) -> list[Progress]:
    return [one.progress() for one in trainer.callbacks if isinstance(one, DeclaresEffects)]


class Diary(Callback):
    """Keeps the progress of every technique at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[float, bool]]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append([(one.fraction, one.finished) for one in progress(trainer)])


@pytest.mark.parametrize("name", REGISTRY)
def test_the_bar_shows_the_first_number_of_each_technique_and_the_record_has_all(name: str) -> None:
    entry = REGISTRY[name]
    seed_everything(0, verbose=False)
    recorder, logger = Recorder("val_acc"), Kept()
    module = entry.wrap(SmallModule(**entry.module))
    trainer, bar = fit(module, [*entry.callbacks(), recorder], logger=logger, max_epochs=4)
    techniques = [one for one in trainer.callbacks if isinstance(one, DeclaresEffects)]
    assert techniques
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    named = [one.logged_name(trainer, number) for one in techniques for number in one.progress().numbers]
    first = [one.logged_name(trainer, next(iter(n))) for one in techniques if (n := one.progress().numbers)]
    assert {one.removeprefix("compress/") for one in first} <= shown.keys()
    assert len(set(named)) == len(named)
    record = recorder.history[-1].numbers
    assert {f"compress/{one}" for one in record} == set(named) <= logger.last.keys()
    scheduled = ("alpha", "temperature")  # which are logged before the step
    for one in record.keys() - set(scheduled):
        assert record[one] == pytest.approx(float(logger.last[f"compress/{one}"]), rel=1e-6), one
    for one in techniques:
        if isinstance(one, CompressionCallback) and not isinstance(one, ClippedWeightsCallback):
            assert one.progress().numbers, f"{one.name} has no number to show"


# The others decide something else at the same moments; the example's technique says nothing of its progress.
TIMES = [
    name
    for name in REGISTRY
    if name == "pruning-one-shot"
    or (
        not name.startswith(("pruning-", "own"))
        and not name.endswith(("stochastic", "pattern", "proximal", "sum", "activations", "only"))
    )
]


@pytest.mark.parametrize("name", TIMES)
def test_a_technique_says_how_far_it_has_come(name: str) -> None:
    entry, diary = REGISTRY[name], Diary()
    seed_everything(0, verbose=False)
    trainer, _ = fit(entry.wrap(SmallModule(**entry.module)), [*entry.callbacks(), diary])
    for way in zip(*diary.seen, strict=True):
        fractions = [fraction for fraction, _ in way]
        assert fractions == sorted(fractions)
        assert 0 <= fractions[0] <= fractions[-1] == 1
        assert all(fraction == 1 for fraction, finished in way if finished)
    assert all(one.finished for one in progress(trainer))
    trainer, _ = fit(entry.idle_wrap(SmallModule(**entry.module)), entry.idle(), limit_train_batches=2)
    says = [one for one in progress(trainer) if one != Progress()]
    assert all(one.fraction == 0 for one in says), "settings under which nothing changes"


def test_two_techniques_with_one_name_of_a_number_have_two_in_the_record() -> None:
    class Other(IterativePruningCallback):
        pass

    seed_everything(0, verbose=False)
    recorder = Recorder("val_acc")
    halves = [
        IterativePruningCallback(0.5, schedule="one_shot", target="net.conv", min_left=0.0),
        Other(0.25, schedule="one_shot", target="net.hidden", min_left=0.0),
    ]
    fit(SmallModule(), [*halves, recorder])
    assert recorder.history[-1].numbers == pytest.approx({"sparsity": 0.5, "sparsity_2": 0.25}, abs=0.03)
