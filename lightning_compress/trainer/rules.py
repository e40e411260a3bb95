"""The table of rules: which techniques do not go together, or do not go with a setting of the Trainer.

`compatibility.check` applies it once when a fit starts. Nothing else refuses a combination.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from lightning_compress.trainer.effects import FEW_VALUES, Effects, Sight, Technique
from lightning_compress.trainer.surroundings import Surroundings


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A reason to refuse a fit.

    Attributes:
        name: A short name, unique among all rules.
        reason: Why the fit is refused, with `{one}` for the technique.
        remedy: What the user can do.
        shows: Names of effects; the message contains the constructor arguments that have them.
    """

    name: str
    reason: str
    remedy: str
    shows: tuple[str, ...] = ()

    def said(self, words: Mapping[str, str]) -> str:
        """Return the reason and the remedy, with the words in place of the names in braces."""
        return f"{self.reason.format(**words)}: {self.remedy.format(**words)}"


@dataclass(frozen=True, kw_only=True)
class PairRule(Rule):
    """Two techniques, `{one}` and `{other}`, that do not go together, because both act on `{names}`.

    Attributes:
        meets: Called with the effects of both, and whether the first comes before the second in
            Trainer(callbacks=[...]). Returns the parameters or layers on which they conflict, or whether they conflict.
        shows: One effect of the first technique and one of the second.
        early: Whether it is applied before layers are replaced, too, when nothing is known of steps.
    """

    meets: Callable[[Effects, Effects, bool], Collection[str] | bool]
    shows: tuple[str, str] = ("", "")
    early: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainerRule(Rule):
    """A technique that does not go with `{what}`, found in the Trainer, its callbacks or optimizers.

    Attributes:
        meets: Called with the technique and its surroundings. Returns the name of `{what}`, or whether they conflict.
    """

    meets: Callable[[Technique, Surroundings], str | bool]


def _few_values_twice(one: Effects, other: Effects, first: bool) -> set[str]:
    both = one.named(*FEW_VALUES) & other.named(*FEW_VALUES)
    return {name for name in both if {one.values[name], other.values[name]} != {"codebook", "grid"}}


def _clusters_on_a_grid(one: Effects, other: Effects) -> set[str]:
    return one.named("codebook") & other.named("grid")


def _outlasts(one: Effects, other: Effects, first: bool) -> bool:
    """Whether the first technique still makes decisions when the second one begins."""
    if other.begins is None:
        return False
    return one.final is None or one.final > other.begins or (one.final == other.begins and not first)


PAIR_RULES = (
    PairRule(
        name="two masks",
        meets=lambda one, other, first: one.named("zeros") & other.named("zeros"),
        reason="{one} and {other} both prune {names}, and neither would know of the other's zeros",
        remedy="use one of them, or give them targets that share nothing",
    ),
    PairRule(
        name="scores instead of weights",
        meets=lambda one, other, first: one.named("scores") & set(other.values),
        reason="{one} keeps the weights of {names} fixed and trains scores instead, and {other} changes them too",
        remedy="give them targets that share nothing, or use {other} in a later fit",
    ),
    PairRule(
        name="going back under scores",
        meets=lambda one, other, first: one.rewinds and bool(other.named("scores")),
        shows=("rewinds", ""),
        reason="{one} may restore earlier weights, and {other} keeps scores elsewhere, which would not follow",
        remedy="use {one} in a later fit",
    ),
    PairRule(
        name="values set twice",
        meets=_few_values_twice,
        reason="{one} and {other} both set the values of {names}",
        remedy="use one of them, or give them targets that share nothing",
    ),
    PairRule(
        name="inputs set twice",
        meets=lambda one, other, first: one.inputs & other.inputs,
        reason="{one} and {other} both set the inputs of {names}",
        remedy="use one of them, or give them targets that share nothing",
    ),
    PairRule(
        name="clusters on a grid per channel",
        meets=lambda one, other, first: _clusters_on_a_grid(one, other) if other.span == "channel" else False,
        shows=("", "span"),
        reason="{one} clusters {names}, and {other} puts them on a grid with a scale for each channel, so that "
        "the values of a cluster would no longer be equal",
        remedy="quantize with granularity='tensor', or give them targets that share nothing",
    ),
    PairRule(
        name="one codebook on several grids",
        meets=lambda one, other, first: _clusters_on_a_grid(one, other) if one.span == "network" else False,
        shows=("span", ""),
        reason="{one} has one codebook for all layers, and {other} puts each of {names} on a grid of its own",
        remedy="cluster with scope='layer', or give them targets that share nothing",
    ),
    PairRule(
        name="clusters of grid values",
        meets=lambda one, other, first: (
            _clusters_on_a_grid(one, other) if not first or (one.begins or 0) > (other.begins or 0) else False
        ),
        reason="{one} clusters real values, and would find {names} on the grid of {other}",
        remedy="put {one} before {other} in Trainer(callbacks=[...]), with a start_epoch that is no later, or cluster "
        "in an earlier fit",
    ),
    PairRule(
        name="a penalty on signs",
        meets=lambda one, other, first: one.named("penalty") & other.named("signs"),
        reason="{one} pulls groups of {names} to zero, but {other} gives them no values but signs",
        remedy="give them targets that share nothing, or use the penalty in an earlier fit",
    ),
    PairRule(
        name="hidden weights twice",
        meets=lambda one, other, first: one.named("zeros") & other.named(*FEW_VALUES) if one.revives else False,
        shows=("revives", ""),
        reason="{one} trains latent values of pruned weights in {names}, whose values {other} sets itself",
        remedy="use regrow=False, or use {other} in a later fit",
    ),
    PairRule(
        name="proximal steps on few values",
        meets=lambda one, other, first: one.named("penalty") & other.named(*FEW_VALUES) if one.proximal else False,
        shows=("proximal", ""),
        reason="{one} shrinks {names} after every step, and would change the values that {other} gives them",
        remedy="use proximal=False, or use {other} in a later fit",
    ),
    PairRule(
        name="proximal steps before hidden weights",
        meets=lambda one, other, first: bool(
            one.proximal and other.revives and one.named("penalty") & other.named("zeros")
        ),
        shows=("proximal", "revives"),
        reason="{other} trains latent values of pruned weights, which {one} would not shrink",
        remedy="use regrow=False or proximal=False",
    ),
    PairRule(
        name="ranks of values that others set",
        meets=lambda one, other, first: (
            one.named("rank")
            & (other.named("zeros", "bounds", *FEW_VALUES) | (other.named("penalty") if other.proximal else set()))
        ),
        reason="{one} changes all entries of {names} after a step, also those that {other} has just set",
        remedy="give them targets that share nothing, or use {one} in an earlier fit",
    ),
    PairRule(
        name="a penalty stands last",
        meets=lambda one, other, first: bool(
            first and one.named("penalty") and other.changes_weights and not other.named("penalty")
        ),
        reason="{one} would add its penalty to the gradients before {other} reads them, and for weights that {other} "
        "changes afterwards",
        remedy="put {one} after {other} in Trainer(callbacks=[...])",
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
        remedy="end {one} earlier (end_epoch), start {other} later (start_epoch), or use another criterion, such as "
        "'taylor'",
    ),
    PairRule(
        name="going back to real weights",
        meets=lambda one, other, first: (
            one.named("zeros") & other.named("grid", "signs") if one.rewinds and _outlasts(one, other, first) else False
        ),
        shows=("rewinds", ""),
        reason="{one} still prunes {names} when {other} begins, and may restore earlier weights, which are real",
        remedy="let {one} end before {other} begins, or use {other} in a later fit",
    ),
    PairRule(
        name="going back past a cut",
        meets=lambda one, other, first: (
            one.rewinds and (other.shapes == "during_fit" or (other.shapes == "on_fit_end" and not first))
        ),
        shows=("rewinds", "shapes"),
        reason="{one} may restore an earlier network, after {other} has cut channels out of it",
        remedy="give {other} shrink='never', or give it shrink='on_fit_end' and put it after {one} in "
        "Trainer(callbacks=[...])",
    ),
    PairRule(
        name="going back twice",
        meets=lambda one, other, first: first and one.rewinds and other.rewinds,
        shows=("rewinds", "rewinds"),
        reason="{one} and {other} both restore earlier networks, each without the masks of the other",
        remedy="use one of them, with all targets",
    ),
    PairRule(
        name="two wrappers that replay",
        meets=lambda one, other, first: (
            first and one.replays > 1 and other.replays > 1 and (one.runs_thinner or not other.runs_thinner)
        ),
        shows=("replays", "replays"),
        reason="{one} and {other} around it both run the user's step several times for each batch",
        remedy="use one of them; of exits and widths, the wrapper of widths may be around that of exits",
    ),
    PairRule(
        name="replays inside another wrapper",
        meets=lambda one, other, first: first and one.replays > 1 and other.replays == 1 and "output" in other.looks_at,
        shows=("replays", "looks_at"),
        reason="{one} runs the user's step several times for each batch, and {other} around it expects one output of "
        "the network",
        remedy="put {one} around {other}",
    ),
    PairRule(
        name="blocks leave with weights of others",
        meets=lambda one, other, first: one.takes_blocks and (other.changes_weights or other.shapes != "never"),
        reason="{one} takes blocks out of the network, and {other} keeps masks, codebooks, scales or groups of their "
        "weights",
        remedy="use {one} in an earlier fit",
    ),
    PairRule(
        name="blocks leave under hooks",
        meets=lambda one, other, first: one.takes_blocks and (other.replays > 1 or "layers" in other.looks_at),
        shows=("", "looks_at"),
        reason="{one} takes blocks out of the network, and {other} watches layers that may be in them",
        remedy="use {one} in an earlier fit",
    ),
    PairRule(
        name="a cut of a network with widths",
        meets=lambda one, other, first: one.runs_thinner and other.shapes != "never",
        shows=("replays", "shapes"),
        reason="{other} cuts channels, of which {one} trains fixed shares together with what it keeps for each",
        remedy="use shrink='never', or cut the network in an earlier fit, or use widths alone, which can be extracted",
    ),
    PairRule(
        name="a cut of a network with gates",
        meets=lambda one, other, first: one.chooses_by_sample and other.shapes != "never",
        shows=("", "shapes"),
        reason="{other} cuts channels for all samples, by what it finds in the graph of the network, in which {one} "
        "chooses for each sample",
        remedy="use shrink='never', or cut the network in an earlier fit",
    ),
    PairRule(
        name="widths of a network with gates",
        meets=lambda one, other, first: one.chooses_by_sample and other.runs_thinner,
        reason="{other} runs the network with fewer channels, and {one} makes its choices for all of them",
        remedy="use one of them",
    ),
    PairRule(
        name="layers replaced under widths or gates",
        meets=lambda one, other, first: one.replaces_layers and (other.runs_thinner or other.chooses_by_sample),
        early=True,
        reason="{one} replaces layers of the network in which {other} has chosen layers and channels before",
        remedy="use {one} in an earlier fit, and wrap the module afterwards",
    ),
    PairRule(
        name="modules that change under a structure that is read",
        meets=lambda one, other, first: (
            one.reads_structure and (other.replaces_layers or other.takes_blocks or bool(other.modules))
        ),
        early=True,
        reason="{one} gives the network the structure of a file before the optimizers are made, and {other} changes "
        "the network's modules in the same fit, or has added some",
        remedy="use {other} in a later fit",
    ),
    PairRule(
        name="exits of a network with gates before blocks",
        meets=lambda one, other, first: one.skips and other.replays > 1 and not other.runs_thinner,
        shows=("", "replays"),
        reason="{one} lets each sample skip blocks, and {other} lets it leave the network, which no deployed network "
        "does at once",
        remedy="use one of them",
    ),
    PairRule(
        name="gates before blocks beside other gates",
        meets=lambda one, other, first: one.skips and other.chooses_by_sample and (first or not other.skips),
        reason="{one} has gates before blocks, which are found and deployed in a network without other gates, and "
        "{other} has some as well",
        remedy="use one of them",
    ),
)


def _changes_network(one: Technique) -> bool:
    return one.effects.changes_weights or one.effects.takes_blocks or one.effects.replaces_layers


def _looks_at(one: Technique, sight: Sight) -> bool:
    return sight in one.effects.looks_at


TRAINER_RULES = (
    TrainerRule(
        name="float16 weights",
        meets=lambda one, fit: fit.float16_weight,
        reason="{one} does not train float16 weights, such as {what}: in float16, Adam's eps and the squares of small "
        "gradients are 0, and large sums are infinite, so that weights become NaN",
        remedy="use precision='bf16-true', or '16-mixed' or 'bf16-mixed', which keep float32 weights",
    ),
    TrainerRule(
        name="stochastic weight averaging",
        meets=lambda one, fit: fit.swaps_averages and _changes_network(one),
        reason="StochasticWeightAveraging replaces the weights by an average, which {one} can't change with them",
        remedy="use Lightning's WeightAveraging or EMAWeightAveraging",
    ),
    TrainerRule(
        name="stochastic weight averaging of widths",
        meets=lambda one, fit: fit.swaps_averages and one.effects.runs_thinner,
        reason="StochasticWeightAveraging computes the statistics of norms anew for the full network alone, and {one} "
        "has some for each width",
        remedy="use Lightning's WeightAveraging or EMAWeightAveraging",
    ),
    TrainerRule(
        name="averages stand first",
        meets=lambda one, fit: _changes_network(one) and fit.average_after(one.place),
        reason="{what} makes and updates its average after {one} has changed it",
        remedy="put {what} before {one} in Trainer(callbacks=[...])",
    ),
    TrainerRule(
        name="LBFGS",
        meets=lambda one, fit: (one.effects.changes_weights or one.effects.takes_blocks) and fit.lbfgs,
        reason="{one} does not support LBFGS, which evaluates the loss several times within one step and keeps one "
        "state for all weights",
        remedy="use SGD, Adam or another first-order optimizer",
    ),
    TrainerRule(
        name="schedule-free optimizers",
        meets=lambda one, fit: one.effects.changes_weights and fit.schedule_free,
        reason="{one} does not support {what}, because its train() and eval() exchange the weights outside of "
        "optimizer steps, as schedule-free optimizers do",
        remedy="use SGD, Adam or another first-order optimizer",
    ),
    TrainerRule(
        name="optimizers without step hooks",
        meets=lambda one, fit: one.effects.changes_weights and fit.unhookable,
        reason="{one} needs to act after every step of {what}, which has no step hooks, because its class does not "
        "call torch.optim.Optimizer.__init__",
        remedy="call that in the constructor of {what}, or use another optimizer",
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
        reason="{one} runs a second backward pass in every step, after which DDPStrategy(static_graph=True) no longer "
        "averages the gradients",
        remedy="leave static_graph out, or use another criterion, such as 'taylor'",
    ),
    TrainerRule(
        name="a cut under static_graph",
        meets=lambda one, fit: bool(fit.ddp.get("static_graph")) and one.effects.shapes == "during_fit",
        shows=("shapes",),
        reason="{one} changes the network's shapes during the fit, but DDPStrategy(static_graph=True) keeps "
        "the shapes of the first step",
        remedy="leave static_graph out, or use shrink='on_fit_end'",
    ),
    TrainerRule(
        name="a cut under PowerSGD",
        meets=lambda one, fit: "powerSGD" in fit.comm_hook and one.effects.shapes == "during_fit",
        shows=("shapes",),
        reason="{one} changes the network's shapes during the fit, but PowerSGD, the ddp_comm_hook, keeps "
        "errors of earlier steps in the old shapes",
        remedy="leave ddp_comm_hook out, or use shrink='on_fit_end'",
    ),
    TrainerRule(
        name="shapes under spawn and fork",
        meets=lambda one, fit: (
            fit.forks and (one.effects.shapes != "never" or one.effects.replaces_layers) and f"ddp_{fit.start_method}"
        ),
        shows=("shapes",),
        reason="{one} changes the network's shapes, which strategy='{what}' can't bring back to the main process",
        remedy="use strategy='ddp', or shrink='never'",
    ),
    TrainerRule(
        name="own parameters under spawn and fork",
        meets=lambda one, fit: fit.forks and bool(one.effects.modules) and f"ddp_{fit.start_method}",
        shows=("modules",),
        reason="{one} trains parameters of its own, which strategy='{what}' can't bring back to the main process",
        remedy="use strategy='ddp'",
    ),
    TrainerRule(
        name="torch.compile",
        meets=lambda one, fit: fit.compiled and (_looks_at(one, "layers") or bool(one.effects.inputs)),
        shows=("looks_at", "inputs"),
        reason="{one} works by hooks on layers inside the forward pass, which torch.compile hides",
        remedy="compile the module after the fit, or use settings that need no hooks",
    ),
    TrainerRule(
        name="judging averages",
        meets=lambda one, fit: one.effects.judges and bool(fit.averages),
        shows=("judges",),
        reason="{one} monitors the metric of the averaged weights, but would restore the weights that train",
        remedy="leave stop= or the WeightAveraging callback out",
    ),
    TrainerRule(
        name="averages of weights that go back",
        meets=lambda one, fit: one.effects.rewinds and not one.effects.judges and ", ".join(fit.averages),
        shows=("rewinds",),
        reason="{one} takes the weights back to an earlier step, and {what} would average those of several rounds",
        remedy="use rewind='learning_rate', or leave the average out",
    ),
    TrainerRule(
        name="judging without a validation",
        meets=lambda one, fit: one.effects.judges and not fit.validates,
        shows=("judges",),
        reason="{one} monitors a metric, but this fit has no validation",
        remedy="pass validation data to trainer.fit and let limit_val_batches be above 0, or leave stop= out",
    ),
    TrainerRule(
        name="exact zeros in averages",
        meets=lambda one, fit: (
            one.effects.shapes != "never" and bool(one.effects.named("penalty")) and bool(fit.averages)
        ),
        shows=("shapes",),
        reason="{one} cuts channels that are exactly zero, but in an average over steps they are not",
        remedy="use shrink='never', or leave the WeightAveraging callback out",
    ),
    TrainerRule(
        name="one codebook in several optimizers",
        meets=lambda one, fit: (
            one.effects.span == "network"
            and fit.trained_apart([name for name, kind in one.effects.values.items() if kind == "codebook"])
        ),
        shows=("span",),
        reason="{one} moves all weights of a cluster together, but {what} is frozen, or no optimizer or another one "
        "trains it",
        remedy="exclude {what}, or use scope='layer'",
    ),
)
