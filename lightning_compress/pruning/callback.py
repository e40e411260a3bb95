"""Iterative pruning as a callback: score, remove a little, train on, repeat."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_compress.channels.costs import Cost
from lightning_compress.core.schedule import Schedule, amount_at, check_schedule
from lightning_compress.core.select import refuse_complex, select_parameters
from lightning_compress.pruning.backtracker import Backtracker
from lightning_compress.pruning.criteria.choose import (
    Criterion,
    Granularity,
    Shrink,
    check_criterion,
    check_shrink,
    check_widths,
    static_scores,
)
from lightning_compress.pruning.criteria.statistic import Statistic
from lightning_compress.pruning.limits import warn_of_rounding, warn_of_thin_layers
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.masks import Scope, least_left, prune_neurons, prune_weights
from lightning_compress.pruning.removing import RemovingCallback
from lightning_compress.pruning.stopping import StopRule
from lightning_compress.trainer.callback import latent_values, take_writes, techniques
from lightning_compress.trainer.distributed import all_reduce_sum, broadcast
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.monitors import count_anew
from lightning_compress.trainer.step_window import Ramp
from lightning_compress.trainer.steps import planned_steps, steps_at


class IterativePruningCallback(RemovingCallback):
    """Prunes a growing fraction of the weights or neurons while the network trains, and keeps them at zero.

    At every event the entries with the lowest score s are masked, so that a fraction a(p) of the ORIGINAL entries is
    zero, with p the progress from `start_epoch` to `end_epoch` and a the schedule; after every optimizer step
    w <- m * w, with m the mask. What follows `end_epoch` is recovery with the final mask.

    Args:
        amount: Final fraction of the targeted entries (weights), or of the channels of the targeted layers (neurons),
            that is removed; 0 to 1.
        granularity: "weight" masks single weights; "neuron" masks, and then removes, whole channels with everything
            that makes them (weights, biases, scale and shift of norms). The output layer's channels always stay.
        criterion: What makes an entry important; the method card has the formulas. All but magnitude, l2 and random
            watch the training since the event before.
        scope: "global" compares all entries, "layer" removes the same fraction of each layer.
        schedule: Shape of the ramp.
        start_epoch: Where the ramp begins, in epochs, which may be fractions.
        end_epoch: Where the ramp ends; by default after two thirds of the planned steps, so that recovery follows.
        every_n_steps: Optimizer steps between events; by default one epoch.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` (or `network`) reaches. Packed
            weights that are no layer of their own, such as `in_proj_weight` of `nn.MultiheadAttention`, are pruned when
            a pattern names them.
        exclude: Patterns to leave out.
        regrow: Pruned entries go on training behind the mask and come back when they have grown (dynamic network
            surgery, Guo et al. 2016) until the ramp ends.
        stop: `{"monitor": "val_acc", "max_drop": 0.01}` prunes on only while the metric stays that close to the dense
            network's, then goes back to the largest amount that kept it and ends the fit. The dense network is the one
            that the fit begins with, validated before the first step, or a better one of before `start_epoch`; amount
            0 gives it back. Further keys: `mode` ("max" or "min"), `baseline` (the dense metric, if it is known) and
            `recovery` (how many more validations an amount gets before its failure counts, 1).
        shrink: When masked neurons leave the network for good, for granularity="neuron": "on_fit_end"; "during_fit", at
            once, so that the rest of the training gets faster; or "never". Only channels are cut whose removal changes
            nothing. Masks that another callback holds on the same tensors are cut with them. A loss that is kept from
            before a cut cannot be back-propagated after it.
        cost: What the scores of neurons are divided by before groups are compared (scope="global"): the "parameters",
            "macs" or "latency" (measured) of one channel.
        min_left: Fraction of the entries of each weight that stays at least, so that scope="global" empties no layer;
            at most half of what stays of all. Where it acts is said.
        min_channels: How many channels of each group stay at least.
        round_to: The number of channels that stay is rounded up to a multiple of it, such as 8 for tensor cores.
        network: Dotted path of the submodule whose output is the prediction, for neurons and for ewc and mas.
        example_inputs: What the network is traced with, for neurons: a tensor, a tuple of positional arguments, or a
            dict of keyword arguments, batch first. By default `example_input_array`, else one peeked batch.

    Raises:
        ValueError: An argument is out of range, or the combination makes no sense.

    References:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3;
        Zhu and Gupta 2017, "To prune, or not to prune", section 3, for the cubic ramp.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> pruning = IterativePruningCallback(0.9, schedule="cubic", end_epoch=6.0)
        >>> trainer = Trainer(callbacks=[pruning], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        amount: float = 0.5,
        *,
        granularity: Granularity = "weight",
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        schedule: Schedule = "cubic",
        start_epoch: float = 0.0,
        end_epoch: float | None = None,
        every_n_steps: int | None = None,
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        regrow: bool = False,
        shrink: Shrink = "on_fit_end",
        cost: Cost = "parameters",
        min_left: float = 0.01,
        min_channels: int = 1,
        round_to: int = 1,
        stop: Mapping[str, Any] | None = None,
        network: str = "",
        example_inputs: Any = None,
    ) -> None:
        start_epoch, end_epoch = float(start_epoch), None if end_epoch is None else float(end_epoch)
        super().__init__(
            amount=float(amount),
            granularity=granularity,
            criterion=criterion,
            scope=scope,
            schedule=schedule,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            every_n_steps=every_n_steps,
            target=target if target is None or isinstance(target, str) else list(target),
            exclude=exclude if isinstance(exclude, str) else list(exclude),
            regrow=regrow,
            shrink=shrink,
            cost=cost,
            min_left=float(min_left),
            min_channels=min_channels,
            round_to=round_to,
            stop=None if stop is None else dict(stop),
            network=network,
        )
        check_schedule(schedule, amount)
        check_criterion(criterion, granularity, regrow=regrow)
        if scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer'; got {scope!r}.")
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be 0 or later; got {start_epoch!r}.")
        if end_epoch is not None and end_epoch <= start_epoch and schedule != "one_shot":
            raise ValueError(f"end_epoch={end_epoch!r} must be later than start_epoch={start_epoch!r}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more; got {every_n_steps!r}.")
        check_shrink(shrink, granularity, criterion, regrow=regrow, stop=stop is not None)
        check_widths(cost, min_left, min_channels, round_to)
        self.amount = amount
        self.granularity: Granularity = granularity
        self.criterion: Criterion = criterion
        self.scope: Scope = scope
        self.schedule: Schedule = schedule
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.every_n_steps = every_n_steps
        self.target = target
        self.exclude = exclude
        self.regrow = regrow
        self.shrink: Shrink = shrink
        self.cost: Cost = cost
        self.min_left = min_left
        self.min_channels = min_channels
        self.round_to = round_to
        rule = None if stop is None else StopRule.from_dict(stop)
        self._backtracker: Backtracker | None = None  # None too when a fit has decided it
        if rule is not None and amount > 0:
            self._backtracker = Backtracker(rule, trains_densely=start_epoch > 0)
        self.network = network
        self.example_inputs = example_inputs

        self.current_amount = 0.0
        self._stopped = False
        self._ramp: Ramp | None = None
        self._statistic: Statistic | None = None
        self._masks_gradients = False
        self._emptied: set[str] = set()

    # ------------------------------------------------------------------ what has been reached

    @property
    def finished(self) -> bool:
        """Whether the mask is final, so that what follows is recovery."""
        return self._stopped or (self._ramp is not None and self._ramp.finished)

    def progress(self) -> Progress:
        fraction = 1.0 if self.amount == 0 else self.current_amount / self.amount
        return Progress(fraction=fraction, finished=self.finished, numbers={"sparsity": lambda: self.sparsity})

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        if self.amount == 0:
            return Effects()
        names = set(select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude, warn=False))
        if self.granularity == "neuron" and self.regrow and trainer is not None and len(techniques(trainer)) > 1:
            # The hidden values of biases and norms come back with the channel's weights.
            channels = self._trace(trainer, pl_module, names)
            names |= {member.tensor for layer in channels.neurons for member in layer.members}
        ramp = None if trainer is None else self._planned(trainer, self.loaded_state)
        stopped = self._stopped if self.loaded_state is None else self.loaded_state["stopped"]
        finished = stopped or (ramp is not None and ramp.finished)
        rewinds = self._backtracker is not None and not self._has_decided(self.loaded_state)
        return Effects(
            values=dict.fromkeys(names, "zeros"),
            revives=self.regrow,
            rewinds=rewinds,
            shapes=self.shrink if self.removes else "never",
            looks_at=frozenset() if finished else self._sights(),
            begins=None if ramp is None else ramp.start,
            final=None if ramp is None or rewinds else ramp.last if finished else ramp.end,
            options={
                "revives": "regrow=True",
                "rewinds": "stop=",
                "looks_at": f"criterion={self.criterion!r}",
                "shapes": f"shrink={self.shrink!r}",
            },
        )

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._targets = list(select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude))
        if self.granularity == "weight":
            refuse_complex(pl_module, self._targets, f"{self.name}(granularity='weight')")
        # What is masked for good must not count where clipping, or an optimizer, takes entries together, as in a norm.
        self._masks_gradients = not self.regrow
        resolve_network(pl_module, self.network)  # or say that there is none
        if state is not None:
            self._costs = state["costs"]  # of the dense network
            self._kept = state["keep"] if state["thin"] else None
            self._entries = dict(state["entries"])
        if self.granularity == "neuron":
            self._channels = self._find_channels(trainer, pl_module)
        elif not self._entries:
            self._entries = {name: pl_module.get_parameter(name).numel() for name in self._targets}
        if state is not None:
            self.current_amount, self._stopped = state["amount"], state["stopped"]
            if self._backtracker is not None and state["stop"] is not None:
                self._backtracker.state.load_state_dict(state["stop"])
        if self._has_decided(state):
            self._backtracker = None  # so that what this fit trains is kept
        self._ramp = self._planned(trainer, state)
        self._unmask_dense(pl_module)
        self._statistic = None
        if self.amount > 0 and not self.finished:
            self._statistic = self._watch(pl_module)
        if state is not None and state["statistic"] is not None and self._statistic is not None:
            self._statistic.load_state_dict(state["statistic"])
            self._leave_sums_to_rank_zero(self._statistic)
        earlier = self._masked  # of a fit before, perhaps on another device
        self._masked = MaskedParameters(pl_module, neurons=self._neurons, regrow=self.regrow)
        if state is not None:
            self._mask(None if self._kept is not None else state["keep"], latent=state["latent"])
        elif earlier is not None:
            self._masked.check_masked(earlier.masks)
            self._mask(earlier.keep, latent=earlier.latent)

    def _has_decided(self, state: dict[str, Any] | None) -> bool:
        """Whether an earlier fit has decided what `stop` asks."""
        return self.finished if state is None else state["stop"] is None

    def _planned(self, trainer: Trainer, state: dict[str, Any] | None) -> Ramp:
        """The ramp of a resumed fit, of an earlier fit, or of this one."""
        if state is not None and state["ramp"] is not None:
            return Ramp(**state["ramp"])
        if state is None and self._ramp is not None:
            return self._ramp
        at_once = self.schedule == "one_shot"
        return Ramp.plan(
            trainer,
            start_epoch=self.start_epoch,
            end_epoch=self.start_epoch if at_once else self.end_epoch,
            every_n_steps=self.every_n_steps,
        )

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        assert self._ramp is not None
        limited = self.end_epoch is None and trainer.max_steps >= 0
        self._ramp = self._ramp.moved(
            moment,
            interval=self.every_n_steps or steps_at(trainer, 1.0),
            limit=planned_steps(trainer) if limited else None,
        )

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self._ramp is not None
        waits = self._backtracker is not None and self._backtracker.state.awaits_validation
        if self.amount == 0 or self._stopped or waits or not self._ramp.take(step):
            return
        self._prune(trainer, pl_module, amount_at(self._ramp.progress(step), self.amount, schedule=self.schedule))
        if self._ramp.finished:
            if self._neurons is not None and self._keep is not None:
                warn_of_rounding(self._keep, self.amount, self.round_to)
            self._statistic = None
            if self._backtracker is None:
                count_anew(trainer, f"the final sparsity of {self.sparsity:.4g} is reached")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert self._ramp is not None
        backtracker = self._backtracker
        if backtracker is not None and (self._stopped or backtracker.state.must_go_back(self.current_amount)):
            self._go_back(backtracker, pl_module)  # even if it has: min_epochs and min_steps let a stopped fit train on
        elif self.amount > 0 and not self.finished:
            warnings.warn(
                f"The fit ended at step {self._steps}, before the pruning ramp did at step {self._ramp.end}: sparsity "
                f"is {self.sparsity:.4g}, not {self.amount}.",
                stacklevel=2,
            )
        masks = None if self._kept is not None else self._keep
        if self.granularity == "neuron" and self.shrink == "on_fit_end" and self.finished and masks is not None:
            self._statistic = None
            self._cut(trainer, pl_module, masks)

    # ------------------------------------------------------------------ until the metric drops

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._backtracker is not None and not self._stopped:
            assert self._masked is not None
            self._backtracker.begin(trainer, pl_module, self._masked, self.current_amount)
        super().before_first_step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._backtracker is None or self._stopped or trainer.state.fn != "fit":
            return
        outcome = self._backtracker.judge(trainer, pl_module, self._masked, self.current_amount)
        if outcome == "failed":
            self._go_back(self._backtracker, pl_module)
            trainer.should_stop = True
        elif outcome == "grew":
            monitor = self._backtracker.state.rule.monitor
            count_anew(trainer, f"sparsity {self.sparsity:.4g} keeps {monitor}")

    def _go_back(self, backtracker: Backtracker, pl_module: LightningModule) -> None:
        """Restore the newest network that kept the metric; it is final."""
        kept = backtracker.go_back(pl_module, again=self._stopped)
        self._stopped = True
        self.current_amount = kept["amount"]
        self._mask(kept["keep"], latent=kept["latent"])

    # ------------------------------------------------------------------ an event

    def _prune(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> None:
        if amount > 0:
            if self._backtracker is not None:
                self._backtracker.state.pruned()
            if self._neurons != []:  # else one channel is left of every group
                keep = self._decide(trainer, pl_module, amount)
                if self.granularity == "neuron" and self.shrink == "during_fit":
                    self._cut(trainer, pl_module, keep)
                else:
                    self._mask(keep)
                    for other in techniques(trainer):
                        other.zero_latent(self.masks)
            self.current_amount = amount
            counted = self._neurons is None and self.scope == "global"
            least = least_left(self._entries, amount, self.min_left) if counted else {}
            warn_of_thin_layers(self.masks, least, self.min_left, self._emptied)
        if self._statistic is not None:
            self._statistic.reset()

    @torch.no_grad()
    def _decide(self, trainer: Trainer, pl_module: LightningModule, amount: float) -> dict[str, Tensor]:
        assert self._masked is not None
        alive = None if self.regrow else self._keep
        take_writes(trainer)
        weights = {name: self._masked.value(name) for name in self._targets}
        latent = latent_values(techniques(trainer))  # values of few bits rank nothing: the real ones behind them do
        weights |= {name: latent[name] for name in weights.keys() & latent.keys()}
        statistic, absolute = self._statistic, False
        if statistic is not None:
            statistic.reduce(all_reduce_sum)
            if self.projection is not None:
                self.projection.open()  # what may grow back is scored by what it has grown to
            scores = statistic.scores()
            if self.projection is not None:
                self.projection.settle()
        elif self.criterion in ("magnitude", "l2") and self._neurons is None:
            scores, absolute = weights, True  # |w| and w^2 have one order: no copy of the weights is made
        else:
            scores = static_scores(self.criterion, weights, self._neurons, self.generator)
        if self._channels is not None:
            device = next(iter(scores.values())).device
            keep = prune_neurons(
                self._channels.of_dense(scores),
                amount,
                scope=self.scope,
                alive=None if alive is None else {name: mask.to(device) for name, mask in alive.items()},
                costs=self._costs,
                min_channels=self.min_channels,
                round_to=self.round_to,
            )
        else:
            left = self._left(pl_module)
            keep = prune_weights(
                scores,
                amount,
                scope=self.scope,
                alive=alive,
                absolute=absolute,
                left=left,
                min_left=self.min_left,
            )
        device = next(iter(weights.values())).device
        return {name: broadcast(mask.to(device).contiguous()) for name, mask in keep.items()}

    # ------------------------------------------------------------------ checkpoints

    def technique_state(self) -> dict[str, Any]:
        return {
            "keep": self._keep,
            "thin": self._kept is not None,
            "entries": self._entries,
            "costs": self._costs,
            "latent": {} if self._masked is None else self._masked.latent,
            "amount": self.current_amount,
            "ramp": None if self._ramp is None else self._ramp.state_dict(),
            "statistic": None if self._statistic is None else self._statistic.state_dict(),
            "stop": None if self._backtracker is None else self._backtracker.state.state_dict(),
            "stopped": self._stopped,
        }

    # ------------------------------------------------------------------ around the optimizer's step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._masks_gradients and self._masked is not None:
            self._masked.mask_gradients()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.precision == "16-mixed" and self._masks_gradients and self._masked is not None:
            self._masked.mask_gradients()  # before the scaler looks for what is not finite, and skips the step

    def leads_to_an_event(self) -> bool:
        return self._ramp is not None and self._steps >= self._ramp.start - self._ramp.interval
