"""The table of rules about techniques that do not go together, checked once when a fit starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_compress.trainer.effects import FEW_VALUES, DeclaresEffects, Effects, Sight
from lightning_compress.trainer.surroundings import Surroundings

_SHOWN = 3  # names, or settings, in a message


@dataclass(frozen=True, kw_only=True)
class Technique:
    """A technique of a fit.

    Attributes:
        name: The name of its class, or of its wrapper.
        settings: The arguments of its constructor.
        place: Its position in Trainer(callbacks=[...]), from 0.
        effects: What it declares for this fit.
    """

    name: str
    settings: Mapping[str, Any]
    place: int
    effects: Effects

    def label(self, *effects: str) -> str:
        """Return its name with the arguments that have these effects."""
        options = [self.effects.options[one] for one in effects if one in self.effects.options]
        return f"{self.name}({', '.join(options)})" if options else self.name

    def label_beside(self, other: Technique, *effects: str) -> str:
        """Return its label, with the settings in which it differs from another technique of its class."""
        if other.name != self.name:
            return self.label(*effects)
        differing = [name for name in self.settings if self.settings[name] != other.settings.get(name)]
        shown = ", ".join(f"{name}={self.settings[name]!r}" for name in differing[:_SHOWN])
        return f"{self.name}({shown})" if shown else self.name


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A reason to refuse a fit.

    Attributes:
        name: A short name, which no other rule has.
        reason: Why it is refused, with `{one}` for the technique.
        remedy: What to do.
        shows: Effects whose options stand in the message.
    """

    name: str
    reason: str
    remedy: str
    shows: tuple[str, ...] = ()

    def said(self, words: Mapping[str, str]) -> str:
        """Return reason and remedy, with words for what stands in braces."""
        return f"{self.reason.format(**words)}: {self.remedy.format(**words)}"


@dataclass(frozen=True, kw_only=True)
class PairRule(Rule):
    """Two techniques that do not go together: `{one}` and `{other}`, which meet at `{names}`.

    Attributes:
        meets: The parameters or layers at which the first technique meets the second, or whether they meet at all;
            and, as a third argument, whether the first one stands before the second in Trainer(callbacks=[...]).
        shows: One effect of the first technique and one of the second.
    """

    meets: Callable[[Effects, Effects, bool], Collection[str] | bool]
    shows: tuple[str, str] = ("", "")


@dataclass(frozen=True, kw_only=True)
class TrainerRule(Rule):
    """A technique that does not go with `{what}` it meets in the Trainer, its callbacks, or the optimizers.

    Attributes:
        meets: What it meets, in words, or whether it meets it at all.
    """

    meets: Callable[[Technique, Surroundings], str | bool]


def _few_values_twice(one: Effects, other: Effects, first: bool) -> set[str]:
    both = one.named(*FEW_VALUES) & other.named(*FEW_VALUES)
    return {name for name in both if {one.values[name], other.values[name]} != {"codebook", "grid"}}


def _clusters_on_a_grid(one: Effects, other: Effects) -> set[str]:
    return one.named("codebook") & other.named("grid")


def _outlasts(one: Effects, other: Effects, first: bool) -> bool:
    """Whether the first technique still decides when the second one begins."""
    if other.begins is None:
        return False
    return one.final is None or one.final > other.begins or (one.final == other.begins and not first)


PAIR_RULES = (
    PairRule(
        name="two masks",
        meets=lambda one, other, first: one.named("zeros") & other.named("zeros"),
        reason="{one} and {other} both prune {names}, and each would undo what the other counts",
        remedy="choose one of them, or give them targets that share nothing",
    ),
    PairRule(
        name="values set twice",
        meets=_few_values_twice,
        reason="{one} and {other} both set the values of {names}",
        remedy="give them targets that share nothing",
    ),
    PairRule(
        name="inputs set twice",
        meets=lambda one, other, first: one.inputs & other.inputs,
        reason="{one} and {other} both set the inputs of {names}",
        remedy="give them targets that share nothing",
    ),
    PairRule(
        name="clusters on a grid per channel",
        meets=lambda one, other, first: _clusters_on_a_grid(one, other) if other.span == "channel" else False,
        shows=("", "span"),
        reason="{one} clusters {names}, and {other} puts them on a grid with another scale in each channel, so that "
        "the values of a cluster would no longer be equal",
        remedy="use granularity='tensor', or give them targets that share nothing",
    ),
    PairRule(
        name="one codebook on several grids",
        meets=lambda one, other, first: _clusters_on_a_grid(one, other) if one.span == "network" else False,
        shows=("span", ""),
        reason="{one} has one codebook for all layers, and {other} puts {names} on grids with a scale of their own",
        remedy="cluster with scope='layer', or give them targets that share nothing",
    ),
    PairRule(
        name="clusters of grid values",
        meets=lambda one, other, first: (
            _clusters_on_a_grid(one, other) if not first or (one.begins or 0) > (other.begins or 0) else False
        ),
        reason="{one} clusters the real values of {names}, which {other} has put on a grid before",
        remedy="put {one} before it in Trainer(callbacks=[...]), with a start_epoch that is no later",
    ),
    PairRule(
        name="a penalty on signs",
        meets=lambda one, other, first: one.named("penalty") & other.named("signs"),
        reason="{one} pulls groups of {names} to zero, where {other} has none but -1 and +1",
        remedy="give them targets that share nothing, or prune in an earlier fit",
    ),
    PairRule(
        name="hidden weights twice",
        meets=lambda one, other, first: one.named("zeros") & other.named(*FEW_VALUES) if one.revives else False,
        shows=("revives", ""),
        reason="{one} trains hidden weights behind its mask, and {other} gives {names} values of its own",
        remedy="use regrow=False, or the second technique in a later fit",
    ),
    PairRule(
        name="proximal steps on few values",
        meets=lambda one, other, first: one.named("penalty") & other.named(*FEW_VALUES) if one.proximal else False,
        shows=("proximal", ""),
        reason="{one} shrinks {names} after every step, off the values that {other} gives them",
        remedy="use proximal=False, or the second technique in a later fit",
    ),
    PairRule(
        name="proximal steps before hidden weights",
        meets=lambda one, other, first: bool(
            one.proximal and other.revives and one.named("penalty") & other.named("zeros")
        ),
        shows=("proximal", "revives"),
        reason="{other} trains hidden weights, which {one} would not shrink",
        remedy="use regrow=False or proximal=False",
    ),
    PairRule(
        name="a penalty stands last",
        meets=lambda one, other, first: bool(
            first and one.named("penalty") and other.changes_weights and not other.named("penalty")
        ),
        reason="{other} must stand before {one} in Trainer(callbacks=[...]), because it watches the loss's gradients, "
        "and the penalty is for the weights that it leaves",
        remedy="change their order",
    ),
    PairRule(
        name="pruning signs by magnitude",
        meets=lambda one, other, first: (
            one.named("zeros") & other.named("signs")
            if "magnitudes" in one.looks_at and _outlasts(one, other, first)
            else False
        ),
        shows=("looks_at", ""),
        reason="{one} still prunes {names} when {other} begins, after which all of them have the same magnitude",
        remedy="end the pruning sooner (end_epoch), start the other later (start_epoch), or use another criterion, "
        "such as 'taylor'",
    ),
    PairRule(
        name="going back to real weights",
        meets=lambda one, other, first: (
            one.named("zeros") & other.named("grid", "signs") if one.rewinds and _outlasts(one, other, first) else False
        ),
        shows=("rewinds", ""),
        reason="{one} still prunes {names}, and may want pruned weights back, when {other} begins",
        remedy="prune without stop=, or quantize in a later fit",
    ),
    PairRule(
        name="going back past a cut",
        meets=lambda one, other, first: (
            one.rewinds and (other.shapes == "during_fit" or (other.shapes == "on_fit_end" and not first))
        ),
        shows=("rewinds", "shapes"),
        reason="{one} goes back to an earlier network, out of which {other} may have cut channels since",
        remedy="give the latter shrink='never', or shrink='on_fit_end' and a place after the one that stops in "
        "Trainer(callbacks=[...])",
    ),
)


def _looks_at(one: Technique, sight: Sight) -> bool:
    return sight in one.effects.looks_at


TRAINER_RULES = (
    TrainerRule(
        name="float16 weights",
        meets=lambda one, fit: fit.float16_weight,
        reason="{one} does not train float16 weights, such as {what}, because Adam's eps and the squares of small "
        "gradients are 0 in float16, and large sums infinite, so that networks end as NaN",
        remedy="use precision='bf16-true', or '16-mixed' or 'bf16-mixed', which keep float32 weights",
    ),
    TrainerRule(
        name="stochastic weight averaging",
        meets=lambda one, fit: fit.swaps_averages and one.effects.changes_weights,
        reason="StochasticWeightAveraging replaces the weights by an average that {one} does not see",
        remedy="use Lightning's WeightAveraging or EMAWeightAveraging",
    ),
    TrainerRule(
        name="averages stand first",
        meets=lambda one, fit: one.effects.changes_weights and fit.average_after(one.place),
        reason="{what} must stand before {one} in Trainer(callbacks=[...]), so that every average is projected right "
        "after it was made",
        remedy="change their order",
    ),
    TrainerRule(
        name="LBFGS",
        meets=lambda one, fit: one.effects.changes_weights and fit.lbfgs,
        reason="{one} does not support LBFGS, which evaluates the loss several times within one step",
        remedy="use SGD, Adam or another first-order optimizer",
    ),
    TrainerRule(
        name="schedule-free optimizers",
        meets=lambda one, fit: one.effects.changes_weights and fit.schedule_free,
        reason="{one} does not support {what}, because its train() and eval() exchange the weights where the "
        "projection does not see it, as schedule-free optimizers do",
        remedy="use SGD, Adam or another first-order optimizer",
    ),
    TrainerRule(
        name="optimizers without step hooks",
        meets=lambda one, fit: one.effects.changes_weights and fit.unhookable,
        reason="{one} needs to act after every step of {what}, which has no step hooks, because its class does not "
        "call torch.optim.Optimizer.__init__",
        remedy="let it call that, or use another optimizer",
    ),
    TrainerRule(
        name="gradients under fp16-mixed",
        meets=lambda one, fit: fit.precision == "16-mixed" and _looks_at(one, "gradients"),
        shows=("looks_at",),
        reason="{one} watches gradients, which are infinite whenever precision='16-mixed' skips a step",
        remedy="use precision='bf16-mixed' or '32-true', or criterion='magnitude'",
    ),
    TrainerRule(
        name="fused optimizers under fp16-mixed",
        meets=lambda one, fit: (
            fit.precision == "16-mixed"
            and bool(one.effects.named("penalty"))
            and not one.effects.proximal
            and fit.fused
        ),
        reason="with precision='16-mixed', a fused {what} unscales the gradients inside its step, where {one} cannot "
        "add to them",
        remedy="use fused=False, or precision='bf16-mixed'",
    ),
    TrainerRule(
        name="a second backward pass under static_graph",
        meets=lambda one, fit: bool(fit.ddp.get("static_graph")) and _looks_at(one, "second_backward"),
        shows=("looks_at",),
        reason="{one} goes back from the loss once more in every step, which DDPStrategy(static_graph=True) takes for "
        "the first step of the training, so that it never averages the gradients",
        remedy="leave static_graph out, or use another criterion, such as 'taylor'",
    ),
    TrainerRule(
        name="a cut under static_graph",
        meets=lambda one, fit: bool(fit.ddp.get("static_graph")) and one.effects.shapes == "during_fit",
        shows=("shapes",),
        reason="{one} changes the network's shapes during the fit, which DDPStrategy(static_graph=...) does not "
        "survive, because it averages by what the first step was",
        remedy="leave static_graph out, or use shrink='on_fit_end'",
    ),
    TrainerRule(
        name="a cut under PowerSGD",
        meets=lambda one, fit: "powerSGD" in fit.comm_hook and one.effects.shapes == "during_fit",
        shows=("shapes",),
        reason="{one} changes the network's shapes during the fit, which DDPStrategy(ddp_comm_hook=...) does not "
        "survive, because PowerSGD's errors of earlier steps have the old shapes",
        remedy="leave ddp_comm_hook out, or use shrink='on_fit_end'",
    ),
    TrainerRule(
        name="shapes under spawn and fork",
        meets=lambda one, fit: fit.forks and one.effects.shapes != "never" and f"ddp_{fit.start_method}",
        shows=("shapes",),
        reason="{one} changes the network's shapes, which strategy='{what}' can't bring back to the main process",
        remedy="use strategy='ddp', or shrink='never'",
    ),
    TrainerRule(
        name="own parameters under spawn and fork",
        meets=lambda one, fit: fit.forks and bool(one.effects.modules) and f"ddp_{fit.start_method}",
        shows=("modules",),
        reason="{one} trains parameters beside the network, which strategy='{what}' can't bring back to the main "
        "process",
        remedy="use strategy='ddp'",
    ),
    TrainerRule(
        name="torch.compile",
        meets=lambda one, fit: fit.compiled and (_looks_at(one, "layers") or bool(one.effects.inputs)),
        shows=("looks_at", "inputs"),
        reason="{one} works by hooks on layers inside the forward pass, which torch.compile hides",
        remedy="fit the module itself and compile it afterwards, or use what needs no hooks (of criteria 'magnitude', "
        "or 'taylor' or 'si' for weights)",
    ),
    TrainerRule(
        name="going back with averages",
        meets=lambda one, fit: one.effects.rewinds and bool(fit.averages),
        shows=("rewinds",),
        reason="{one} judges the metric of the averaged weights but would go back to the others",
        remedy="use one of stop= and a WeightAveraging callback",
    ),
    TrainerRule(
        name="going back without a validation",
        meets=lambda one, fit: one.effects.rewinds and not fit.validates,
        shows=("rewinds",),
        reason="{one} monitors a metric, but this fit has no validation",
        remedy="pass val_dataloaders",
    ),
    TrainerRule(
        name="exact zeros in averages",
        meets=lambda one, fit: (
            one.effects.shapes != "never" and bool(one.effects.named("penalty")) and bool(fit.averages)
        ),
        shows=("shapes",),
        reason="{one} cuts channels out that are exactly zero, which an average over steps is not",
        remedy="use shrink='never', or leave the WeightAveraging callback out",
    ),
    TrainerRule(
        name="one codebook in several optimizers",
        meets=lambda one, fit: one.effects.span == "network" and fit.trained_apart(list(one.effects.values)),
        shows=("span",),
        reason="{one} moves all weights of a cluster together, but {what} is frozen, or in another optimizer or in "
        "none",
        remedy="exclude it, or use scope='layer'",
    ),
)


class IncompatibleError(ValueError):
    """Techniques that do not go with one another, or with their fit.

    Attributes:
        rule: The name of the rule that refuses them.
    """

    def __init__(self, rule: PairRule | TrainerRule, words: Mapping[str, str]) -> None:
        super().__init__(f"{rule.said(words)}.")
        self.rule = rule.name


def techniques(trainer: Trainer | None, pl_module: LightningModule, callbacks: Sequence[Any]) -> list[Technique]:
    """Return the techniques among callbacks, with what they say they do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each technique says itself, when it prepares, what its patterns leave out
        return [
            Technique(name=one.name, settings=one.settings, place=place, effects=one.declared(trainer, pl_module))
            for place, one in enumerate(callbacks)
            if isinstance(one, DeclaresEffects)
        ]


def check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, when a fit starts, techniques that do not go with one another or with the fit.

    Raises:
        IncompatibleError: The first rule that refuses, with both sides, the reason and what to do.
    """
    found = techniques(trainer, pl_module, trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector
    surroundings = Surroundings(trainer, pl_module)
    for error in (*_refused_by_the_trainer(found, surroundings), *_refused_pairs(found)):
        raise error


def check_together(pl_module: LightningModule, callbacks: Sequence[Any]) -> None:
    """Refuse, before any fit, techniques that do not go with one another whatever the fit is.

    Raises:
        IncompatibleError: As `check`.
    """
    for error in _refused_pairs(techniques(None, pl_module, callbacks)):
        raise error


def _refused_by_the_trainer(found: Sequence[Technique], surroundings: Surroundings) -> Iterator[IncompatibleError]:
    for one in found:
        for rule in TRAINER_RULES:
            if what := rule.meets(one, surroundings):
                words = {"one": one.label(*rule.shows), "what": str(what)}
                yield IncompatibleError(rule, words)


def _refused_pairs(found: Sequence[Technique]) -> Iterator[IncompatibleError]:
    for one, other in permutations(found, 2):
        for rule in PAIR_RULES:
            if names := rule.meets(one.effects, other.effects, one.place < other.place):
                words = {
                    "one": one.label_beside(other, rule.shows[0]),
                    "other": other.label_beside(one, rule.shows[1]),
                    "names": "" if names is True else _listed(names),
                }
                yield IncompatibleError(rule, words)


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)
    more = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
