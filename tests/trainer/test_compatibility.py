"""What goes with what: every cell of the tables of the card of trainer/, tried in a short fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from support import matrix
from support.matrix import ALONE, CARD, PAIRED, PAIRS, SETTINGS, TECHNIQUES, WORKS
from support.ranks import RankPair
from support.small import SmallModule, plain, quiet_trainer, shuffled

from lightning_compress import BinaryWeightsCallback, IterativePruningCallback, WeightClusteringCallback
from lightning_compress.trainer.compatibility import IncompatibleError
from lightning_compress.trainer.effects import DeclaresEffects, Effects
from lightning_compress.trainer.rules import PAIR_RULES, TRAINER_RULES

TEXT = CARD.read_text()


def noted(found: dict[str, str], corner: str) -> dict[str, str]:
    """The cells of a row as the card has them: with the note in the place of a rule's name."""
    written = {note: number for number, note in matrix.notes(TEXT, corner).items()}
    return {name: WORKS if cell == WORKS else written[matrix._note(cell)] for name, cell in found.items()}


@pytest.mark.parametrize("first", PAIRED)
def test_every_pair_works_or_is_refused_as_the_readme_says(first: str) -> None:
    found = {second: matrix.pair(first, second) for second in PAIRED}
    assert noted(found, PAIRS) == matrix.recorded(TEXT, PAIRS)[first]


@pytest.mark.parametrize("setting", [name for name, one in SETTINGS.items() if one.where == "here"])
def test_every_technique_works_with_a_setting_or_is_refused_as_the_readme_says(setting: str) -> None:
    assert noted(matrix.settings_row(setting), ALONE) == matrix.recorded(TEXT, ALONE)[setting]


@pytest.mark.parametrize("setting", [name for name, one in SETTINGS.items() if one.where == "ranks"])
def test_the_same_on_two_ranks(setting: str, rank_pair: RankPair, tmp_path: Path) -> None:
    for found in rank_pair.run("support.matrix:settings_row", tmp_path, setting=setting, devices=2):
        assert noted(found, ALONE) == matrix.recorded(TEXT, ALONE)[setting]


@pytest.mark.parametrize("setting", [name for name, one in SETTINGS.items() if one.where == "forks"])
def test_the_same_in_forks_of_a_process(setting: str) -> None:
    assert noted(matrix.forked_row(setting), ALONE) == matrix.recorded(TEXT, ALONE)[setting]


def test_the_tables_have_all_techniques_and_settings() -> None:
    assert list(matrix.recorded(TEXT, PAIRS)) == PAIRED
    assert list(matrix.recorded(TEXT, ALONE)) == list(SETTINGS)
    assert list(matrix.recorded(TEXT, ALONE)["ddp"]) == list(TECHNIQUES)


def test_every_rule_has_a_name_of_its_own() -> None:
    names = [rule.name for rule in (*PAIR_RULES, *TRAINER_RULES)]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------- once, at the start, by what is declared


class Counts(Callback):
    """A callback of the user's, with attributes that techniques have too."""

    regrow = proximal = True
    name, settings, strength, amount, steps = "mine", {"amount": 1.0}, 1.0, 1.0, 0

    def effects(self, trainer: Trainer, pl_module: LightningModule) -> Effects:
        raise AssertionError("a callback that is no technique is not asked")

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


def fit(*callbacks: Callback, **options: Any) -> None:
    quiet_trainer(callbacks=list(callbacks), **options).fit(SmallModule(), shuffled(), plain())


def test_a_callback_of_the_users_is_not_asked() -> None:
    counts = Counts()
    fit(counts, BinaryWeightsCallback(), max_epochs=1)
    assert counts.steps > 0


@pytest.mark.parametrize("start", [0.0, 2.5])
def test_a_pair_is_refused_before_the_first_step_however_late_the_second_begins(start: float) -> None:
    counts = Counts()
    stopping = IterativePruningCallback(0.5, stop={"monitor": "val_acc", "max_drop": 0.5}, criterion="taylor")
    with pytest.raises(IncompatibleError, match=r"\(stop=\) still prunes .* and may restore earlier weights"):
        fit(counts, stopping, BinaryWeightsCallback(start_epoch=start))
    assert counts.steps == 0


def test_techniques_that_meet_nowhere_go_together() -> None:
    fit(IterativePruningCallback(0.5, regrow=True, target="net.conv"), WeightClusteringCallback(4, target="net.head"))


def test_a_second_fit_asks_what_is_true_then() -> None:
    """Pruning by magnitude that has ended in an earlier fit ranks no signs in this one."""
    pruning, module = IterativePruningCallback(0.5, end_epoch=1.0), SmallModule()
    quiet_trainer(callbacks=[pruning], max_epochs=2).fit(module, shuffled(), plain())
    again = quiet_trainer(callbacks=[pruning, BinaryWeightsCallback()], max_epochs=1)
    again.fit(module, shuffled(), plain())
    assert (module.net.hidden.weight == 0).any()


def test_two_of_a_class_are_told_apart_by_the_settings_in_which_they_differ() -> None:
    with pytest.raises(IncompatibleError, match=r"\(amount=0\.5\) and IterativePruningCallback\(amount=0\.6\) both"):
        fit(IterativePruningCallback(0.5), IterativePruningCallback(0.6))


def test_every_technique_declares_its_effects() -> None:
    for name, make in TECHNIQUES.items():
        for callback in make().callbacks():
            assert isinstance(callback, DeclaresEffects), name
            assert type(callback).effects is not DeclaresEffects.effects, name
