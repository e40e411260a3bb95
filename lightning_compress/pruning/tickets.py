"""Lottery tickets and rewinding as a callback: train, prune, go back, and train again, in one fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_compress.channels.costs import Cost
from lightning_compress.core.distributed import broadcast
from lightning_compress.core.given import flag, real_number, whole_number
from lightning_compress.core.numbers_by_pattern import numbers_by_name
from lightning_compress.core.schedule import checked_epoch
from lightning_compress.core.tensors import Kept, sliced
from lightning_compress.pruning.callback import IterativePruningCallback
from lightning_compress.pruning.criteria.choose import STATIC, Criterion, Granularity, Shrink
from lightning_compress.pruning.criteria.from_start import FROM_START
from lightning_compress.pruning.masks import Amount, Scope
from lightning_compress.pruning.restart import (
    Pruned,
    Restart,
    Signs,
    check_restart,
    frozen_values,
    start_values,
)
from lightning_compress.pruning.rewinder import (
    OptimizerState,
    Rewind,
    Rewinder,
    check_rewind,
    warn_of_frequencies,
)
from lightning_compress.pruning.rounds import Plan, Rounds
from lightning_compress.trainer.before_optimizers import (
    before_optimizers,
    is_resumed,
    keep_limits,
    shorten_while_optimizers_are_made,
)
from lightning_compress.trainer.callback import take_writes
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.monitors import count_anew
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.steps import steps_per_epoch, steps_per_epoch_early


class LotteryTicketCallback(IterativePruningCallback):
    """Trains, prunes a share of what is left, goes back to an earlier step, and trains again, in one fit.

    Round 0 trains the dense network. Then come `rounds` rounds: each prunes the trained network, takes what `rewind`
    names back to `rewind_to`, and trains on from there under the new mask. The last round is never taken back, so that
    the fit returns a trained network. A round begins right before its first batch: after the validation, the
    checkpoint and the scheduler's step that end the round before.

    The learning rate's schedule is meant for ONE round: while the module's `configure_optimizers` runs,
    `trainer.max_epochs`, `trainer.max_steps` and `trainer.estimated_stepping_batches` say the length of round 0. Where
    a schedule has ended, the learning rate of its last step holds: in a last round that is longer than the others, and
    with `rewind=None` in all rounds but the first, which is fine-tuning.

    Args:
        rate: Fraction of the weights that are LEFT which each round prunes: one number, or `{pattern: number}`, of
            which the first pattern that matches a parameter counts; then each tensor is pruned by itself, as with
            scope="layer".
        amount: Fraction of the ORIGINAL entries that is pruned in the end, in place of `rate`: after round i of n,
            (1 - amount)^(i / n) of them are left.
        rounds: How often the network is pruned.
        round_epochs: Length of round 0 in epochs; the later rounds are shorter by `rewind_to`. By default equal parts
            of the fit, in whole epochs, or in steps where `max_steps` ends the fit. What is left over goes to the
            last round.
        pretrained: Whether the network that comes in is trained, so that the first prune comes before the first step.
        rewind: "learning_rate" takes the schedulers and the optimizers' hyperparameters back, and weights stay (Renda
            et al. 2020). "weights" takes parameters and buffers back as well (Frankle et al. 2020). "init" is "weights"
            with `rewind_to=0` (Frankle and Carbin 2019). None takes nothing back.
        rewind_to: The epoch to which rounds go back, which may be a fraction. Schedulers that step once an epoch agree
            with it where it is whole.
        optimizer_state: What becomes of momenta when weights go back: "clear" begins anew, "keep" leaves them, and
            "rewind" takes them back.
        restart: What the survivors of the LAST prune start from, where weights go back; earlier rounds rewind, so that
            all choices have the same masks. "rewind": their values at `rewind_to`, the initial ones. "reinit": values
            that are drawn anew, with replacement, from all initial values of the layer. "reshuffle": the initial values
            of the layer's survivors, permuted. "constant": the standard deviation of the layer's initial values.
        signs: Whether the survivors "keep" the signs of their initial values, or get "random" ones. The control of
            Frankle and Carbin, a random initialization of the same mask, is restart="reinit" with signs="random".
        pruned: What entries are that the masks drop in the last round: "zero", frozen at their "initial" values, or
            "mixed" (Zhou et al. 2019): zero where training has moved them towards zero, else frozen at their initial
            values. In a file only zeros are cheap.
        granularity: As for `IterativePruningCallback`, like all arguments from here on. Criteria that watch training
            steps watch the last epoch before an event; those that compare weights compare with `rewind_to`.
        criterion: Measure of an entry's importance in the trained network.
        scope: "global" compares all entries, "layer" prunes the same fraction of each layer.
        target: Patterns of modules or parameters; by default the linear layers and convolutions that the fit trains.
        exclude: Patterns to leave out.
        shrink: "on_fit_end" cuts masked channels out in the end, for granularity="neuron"; "never" leaves them.
        cost: Divides the scores of channels.
        min_left: Smallest fraction of the entries of each weight that stays.
        min_channels: Smallest number of channels of each group that stay.
        round_to: The number of channels that stay is rounded up to a multiple of this number.
        network: Dotted path of the submodule whose output is the prediction.
        example_inputs: Inputs to trace the network with, for channels.

    Raises:
        ValueError: An argument is out of range, or the combination makes no sense.

    References:
        Frankle and Carbin 2019, "The Lottery Ticket Hypothesis"; Frankle et al. 2020, "Linear Mode Connectivity and
        the Lottery Ticket Hypothesis"; Renda et al. 2020, "Comparing Rewinding and Fine-tuning in Neural Network
        Pruning".

    Example:
        >>> from lightning.pytorch import Trainer
        >>> ticket = LotteryTicketCallback(0.2, rounds=3, rewind="weights", rewind_to=1)
        >>> trainer = Trainer(callbacks=[ticket], max_epochs=13, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rate: float | Mapping[str, float] | None = None,
        *,
        amount: float | None = None,
        rounds: int = 5,
        round_epochs: float | None = None,
        pretrained: bool = False,
        rewind: Rewind | None = "weights",
        rewind_to: float = 0.0,
        optimizer_state: OptimizerState = "clear",
        restart: Restart = "rewind",
        signs: Signs = "keep",
        pruned: Pruned = "zero",
        granularity: Granularity = "weight",
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        shrink: Shrink = "on_fit_end",
        cost: Cost = "parameters",
        min_left: float = 0.01,
        min_channels: int = 1,
        round_to: int = 1,
        network: str = "",
        example_inputs: Any = None,
    ) -> None:
        if rate is None and amount is None:
            rate = 0.2
        settings = settings_of(locals())
        whole_number(rounds, "rounds says how often the network is pruned, 1 or more", least=1)
        if round_epochs is not None:
            real_number(round_epochs, "round_epochs is the length of a round, above 0, or None", above=0)
        flag(pretrained, "pretrained")
        check_rewind(rewind, optimizer_state)
        check_restart(restart, signs, pruned)
        if (restart, signs, pruned) != ("rewind", "keep", "zero") and rewind not in ("weights", "init"):
            raise ValueError(
                f"restart={restart!r}, signs={signs!r} and pruned={pruned!r} say what weights go back to, and with "
                f"rewind={rewind!r} none do: use rewind='weights' or 'init'."
            )
        if pruned != "zero" and granularity == "neuron":
            raise ValueError(f"pruned={pruned!r} keeps values in pruned channels, which then can't be cut: use 'zero'.")
        rewind_to = checked_epoch(rewind_to, "rewind_to")
        _check_rewind_to(rewind, rewind_to, round_epochs, pretrained=pretrained)
        if shrink == "during_fit":
            raise ValueError("shrink='during_fit' cuts channels that a rewound network needs: use 'on_fit_end'.")
        self.rate = _checked_rate(rate, amount, rounds)
        rates = self.rate.values() if isinstance(self.rate, Mapping) else [self.rate]
        if isinstance(self.rate, Mapping):
            if granularity == "neuron":
                raise ValueError("A rate for each pattern prunes weights: it needs granularity='weight', got 'neuron'.")
            scope = "layer"
        now = [one for one in STATIC if one not in FROM_START]
        if pretrained and criterion not in now:
            raise ValueError(
                f"criterion={criterion!r} looks at the training, and pretrained=True prunes before the first step: use "
                f"one of {', '.join(map(repr, now))}, or pretrained=False."
            )
        super().__init__(
            _pruned(max(rates, default=0.0), rounds),
            granularity=granularity,
            criterion=criterion,
            scope=scope,
            schedule="one_shot",
            target=target,
            exclude=exclude,
            shrink=shrink,
            cost=cost,
            min_left=min_left,
            min_channels=min_channels,
            round_to=round_to,
            network=network,
            example_inputs=example_inputs,
        )
        self.settings = settings
        self._state_key = self._generate_state_key(**settings)
        self._plan = Plan(rounds=rounds, round_epochs=round_epochs, rewind_to=rewind_to, pretrained=pretrained)
        self._rewinder = Rewinder(rewind, optimizer_state)
        self.restart: Restart = restart
        self.signs: Signs = signs
        self.pruned: Pruned = pruned
        self._frozen: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ how much

    def selected(self, pl_module: LightningModule, *, warn: bool = True) -> list[str]:
        if isinstance(self.rate, Mapping):
            return list(self._rates_by_name(pl_module))
        return super().selected(pl_module, warn=warn)

    def _rates_by_name(self, pl_module: LightningModule) -> dict[str, float]:
        return numbers_by_name(
            pl_module,
            self.rate,
            target=self.target,
            default=self.patterns(pl_module, named=True),
            exclude=self.exclude,
            argument="rate",
            done="pruned",
            leaving="0",
        )

    def _amount_after(self, pl_module: LightningModule, number: int) -> Amount:
        """Return the fraction of the original entries that is pruned after a number of rounds."""
        if isinstance(self.rate, Mapping):
            return {name: _pruned(rate, number) for name, rate in self._rates_by_name(pl_module).items()}
        return _pruned(self.rate, number)

    @property
    def _rounds(self) -> Rounds:
        assert isinstance(self._ramp, Rounds)
        return self._ramp

    def progress(self) -> Progress:
        rounds = self._ramp if isinstance(self._ramp, Rounds) else None
        numbers = {
            f"round_of_{self._plan.rounds}": lambda: float(rounds.taken if rounds else 0),
            "sparsity": lambda: self.sparsity,
        }
        finished = self.finished or self.amount == 0
        taken = rounds.taken if rounds else 0
        return Progress(fraction=taken / self._plan.rounds, finished=finished, numbers=numbers)

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        found = super().effects(trainer, pl_module)
        if not found.values:
            return found
        options = {**found.options, "rewinds": f"rewind={self._rewinder.rewind!r}"}
        rounds = None if trainer is None else self._planned(trainer, self.loaded_state)
        over = rounds is not None and rounds.finished
        return replace(found, rewinds=self._rewinder.takes_weights and not over, options=options)

    # ------------------------------------------------------------------ the schedule of one round

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.amount > 0:
            keep_limits(trainer)  # left by a fit that was refused
            before_optimizers(trainer, self, before=lambda: None, after=lambda: self._shorten(trainer))

    def _shorten(self, trainer: Trainer) -> None:
        """Make the module plan its learning rates for one round."""
        state = self.loaded_state
        if is_resumed(trainer) and state is None:
            raise ValueError(
                f"The checkpoint {trainer.ckpt_path} has no state of {self.name}, and so neither the weights nor the "
                f"learning rates of rewind_to={self._plan.rewind_to}: it was written by a fit without this callback, "
                f"or with ModelCheckpoint(save_weights_only=True). Resume from a whole checkpoint of a fit with it, or "
                f"load the weights into the module and begin a new fit without ckpt_path."
            )
        if state is not None:
            limits = state["ramp"]["limits"]
        elif isinstance(self._ramp, Rounds):  # of an earlier fit
            if self._ramp.finished:
                return
            limits = self._ramp.limits
        else:
            limits = self._plan.limits(trainer, lambda: steps_per_epoch_early(trainer))
        shorten_while_optimizers_are_made(trainer, limits)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        keep_limits(trainer)

    # ------------------------------------------------------------------ the fit

    def _planned(self, trainer: Trainer, state: dict[str, Any] | None) -> Rounds:
        if state is not None:
            return Rounds(**state["ramp"])
        return self._ramp if isinstance(self._ramp, Rounds) else self._plan.of_fit(trainer)

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        self._ramp = self._rounds.moved(moment, epochs=steps_per_epoch(trainer))

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        super().prepare(trainer, pl_module, state)
        if self.amount == 0:
            return
        if state is None and self.finished:
            self._rewinder.over = True
        if state is not None:
            self._rewinder.load_state_dict(state["rewinder"])
        elif self._rounds.taken == 0 and self._rewinder.rewind is not None:
            rank_zero_info(f"{self.name}: {self._said(trainer)}.")
            if not self._plan.pretrained or len(self._rounds.events) > 1:
                warn_of_frequencies(trainer, self._rounds.length - self._rounds.keep_at, self._rounds.epochs)

    def _said(self, trainer: Trainer) -> str:
        rounds = self._rounds
        said = f"the network is pruned after steps {', '.join(map(str, rounds.events))}"
        said += f", and goes back to step {rounds.keep_at}"
        if not trainer.lr_scheduler_configs and trainer.lightning_module.automatic_optimization:
            said += ". No scheduler changes the learning rate, so that rewinding it changes nothing"
        return said

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Do nothing after a step: rounds begin before a batch."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.amount > 0:
            self._before_batch(trainer, pl_module, self._steps)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _before_batch(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        rounds, rewinder = self._rounds, self._rewinder
        if rewinder.kept is None and step >= rounds.keep_at and not rounds.finished:
            rewinder.keep(trainer, pl_module)
            self.compare_from_here(trainer)
        if rounds.take(step):
            self.event(trainer, pl_module, self._amount_after(pl_module, rounds.taken))
        if not rewinder.over and step >= rounds.schedule_ends(rewinds=rewinder.rewind is not None) - 1:
            rewinder.hold(trainer)

    def event(self, trainer: Trainer, pl_module: LightningModule, amount: Amount) -> None:
        rounds, rewinder = self._rounds, self._rewinder
        last, initial = rounds.finished, rewinder.values
        trained = {}
        if last and self.pruned == "mixed":
            trained = {name: pl_module.get_parameter(name).detach().clone() for name in self._targets}
        super().event(trainer, pl_module, amount)
        rewinder.go_back(trainer, pl_module, last=last)
        if rewinder.takes_weights:
            if last and self._masked.keep is not None:
                self._start_anew(pl_module, initial, trained)
            if self._masked.keep is not None:
                self._mask(self._masked.keep)  # the masks of the trained network, on the weights of before
            take_writes(trainer)
            self._criterion.reset()
        if not rounds.finished:
            count_anew(trainer, f"round {rounds.taken} of {len(rounds.events)} begins", stopping_alone=True)
        rank_zero_info(
            f"{self.name}: round {rounds.taken} of {len(rounds.events)} begins after step {self._steps}, with "
            f"{1 - self.masked_share:.2%} left."
        )

    @torch.no_grad()
    def _start_anew(
        self, pl_module: LightningModule, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor]
    ) -> None:
        """Give the survivors of the last prune the values to start from, and the pruned entries theirs."""
        for name in self._targets:
            if name not in self.masks:  # channels that stay
                continue
            parameter, mask = pl_module.get_parameter(name), self.masks[name]
            before = initial[name].to(parameter.device)
            if (self.restart, self.signs) != ("rewind", "keep"):
                values = start_values(
                    before, mask, restart=self.restart, signs=self.signs, generator=self.generator
                ).contiguous()
                parameter.copy_(broadcast(values))
            if self.pruned != "zero":
                after = trained.get(name, before).to(parameter.device)
                self._frozen[name] = frozen_values(before, after, mask, pruned=self.pruned)

    def _mask(self, keep: dict[str, Tensor] | None, *, latent: dict[str, Tensor] | None = None) -> None:
        self._masked.frozen = self._frozen
        super()._mask(keep, latent=latent)

    def _continue_masks(
        self, pl_module: LightningModule, state: dict[str, Any] | None, left: dict[str, Tensor] | None
    ) -> None:
        if state is not None:
            device = pl_module.device
            self._frozen = {name: values.to(device) for name, values in state["frozen"].items()}
        super()._continue_masks(pl_module, state, left)

    # ------------------------------------------------------------------ checkpoints, and cuts

    def technique_state(self) -> dict[str, Any]:
        return super().technique_state() | {"rewinder": self._rewinder.state_dict(), "frozen": self._frozen}

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        self._frozen = sliced(self._frozen, kept)
        super().follow_cut(trainer, pl_module, kept)
        self._rewinder.follow(kept)


def _checked_rate(rate: Any, amount: Any, rounds: int) -> float | dict[str, float]:
    """Return the share of what is left that each round prunes, or raise a ValueError."""
    says = "rate is the fraction of the weights left that each round prunes, 0 or more and below 1"
    if rate is not None and amount is not None:
        raise ValueError(f"rate={rate!r} says how much each round prunes, and amount={amount!r}, too: leave one out.")
    if amount is not None:
        whole = real_number(
            amount, "amount is the fraction of the original to prune, 0 or more and below 1", least=0, below=1
        )
        return float(1.0 - (1.0 - whole) ** (1 / rounds))
    if isinstance(rate, Mapping):
        return {str(key): real_number(one, f"The {says}, for {key!r}", least=0, below=1) for key, one in rate.items()}
    return real_number(rate, says, least=0, below=1)


def _pruned(rate: float, number: int) -> float:
    """Return the fraction of the original that is pruned after a number of rounds."""
    return 1.0 - (1.0 - rate) ** number


def _check_rewind_to(rewind: str | None, rewind_to: float, round_epochs: float | None, *, pretrained: bool) -> None:
    """Raise a ValueError unless there is something to go back to."""
    if rewind == "init" and rewind_to != 0:
        raise ValueError(f"rewind='init' goes back to the start, and rewind_to={rewind_to}: use rewind='weights'.")
    if round_epochs is not None and rewind_to >= round_epochs:
        raise ValueError(
            f"rewind_to={rewind_to} is not before the first prune, at round_epochs={round_epochs}: rewind to an "
            f"earlier epoch."
        )
    if pretrained and rewind in ("weights", "init"):
        raise ValueError(
            f"pretrained=True prunes before the first step, so that rewind={rewind!r} has no earlier weights to go "
            f"back to: train the network in this fit (pretrained=False), or use rewind='learning_rate'."
        )
    if pretrained and rewind_to != 0:
        raise ValueError(f"pretrained=True prunes before the first step, and rewind_to={rewind_to} is later: use 0.")
