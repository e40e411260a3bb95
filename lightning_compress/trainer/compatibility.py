"""Refuse techniques that do not go together, by what they declare and the table of `rules`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.trainer.effects import DeclaresEffects, Technique
from lightning_compress.trainer.rules import PAIR_RULES, TRAINER_RULES, PairRule, TrainerRule
from lightning_compress.trainer.surroundings import Surroundings
from lightning_compress.trainer.unwrap import SLOT

_SHOWN = 3  # names in a message


class IncompatibleError(ValueError):
    """Techniques do not go with one another, or with their fit.

    Attributes:
        rule: The name of the rule that refuses them.
    """

    def __init__(self, rule: PairRule | TrainerRule, words: Mapping[str, str]) -> None:
        super().__init__(f"{rule.said(words)}.")
        self.rule = rule.name


def declared_techniques(
    trainer: Trainer | None, pl_module: LightningModule, callbacks: Sequence[Any]
) -> list[Technique]:
    """Return the techniques among callbacks, with the effects that they declare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each technique warns of its patterns when it prepares
        return [
            Technique(name=one.name, settings=one.settings, place=place, effects=one.declared(trainer, pl_module))
            for place, one in enumerate(callbacks)
            if isinstance(one, DeclaresEffects)
        ]


def added_parameters(trainer: Trainer, pl_module: LightningModule, asks: Any) -> set[str]:
    """Return the names of the parameters that the other techniques of a fit train in addition to the network's.

    Args:
        trainer: The Trainer of the fit.
        pl_module: The LightningModule.
        asks: The callback that asks, whose own effects are not asked for.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    others = declared_techniques(trainer, pl_module, [one for one in callbacks if one is not asks])
    return {name for one in others for name in one.effects.modules}


def check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, when a fit starts, techniques that do not go with one another or with the fit.

    Raises:
        IncompatibleError: A rule refuses; the message names the techniques, the reason and the remedy.
    """
    found = declared_techniques(trainer, pl_module, trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
    surroundings = Surroundings(trainer, pl_module)
    for error in (*_refused_by_the_trainer(found, surroundings), *_refused_pairs(found)):
        raise error


def check_together(pl_module: LightningModule, callbacks: Sequence[Any]) -> None:
    """Refuse, before any fit, techniques that do not go with one another in any fit.

    Raises:
        IncompatibleError: As `check`.
    """
    for error in _refused_pairs(declared_techniques(None, pl_module, callbacks)):
        raise error


def check_early(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse callbacks that replace layers, before they do, beside one another and beside wrappers.

    Raises:
        IncompatibleError: As `check`.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    levels = [level.callback for level in getattr(getattr(pl_module, SLOT, None), "levels", ())]
    found = declared_techniques(None, pl_module, [*levels, *(one for one in callbacks if _replaces_early(one))])
    for error in _refused_pairs(found, [rule for rule in PAIR_RULES if rule.early]):
        raise error


def _replaces_early(callback: Any) -> bool:
    return isinstance(callback, DeclaresEffects) and callback.replaces_early


def _refused_by_the_trainer(found: Sequence[Technique], surroundings: Surroundings) -> Iterator[IncompatibleError]:
    for one in found:
        for rule in TRAINER_RULES:
            if what := rule.meets(one, surroundings):
                words = {"one": one.label(*rule.shows), "what": str(what)}
                yield IncompatibleError(rule, words)


def _refused_pairs(found: Sequence[Technique], rules: Sequence[PairRule] = PAIR_RULES) -> Iterator[IncompatibleError]:
    for one, other in permutations(found, 2):
        for rule in rules:
            if names := rule.meets(one.effects, other.effects, one.place < other.place):
                words = {
                    "one": one.label_next_to(other, rule.shows[0]),
                    "other": other.label_next_to(one, rule.shows[1]),
                    "names": "" if names is True else _listed(names),
                }
                yield IncompatibleError(rule, words)


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
