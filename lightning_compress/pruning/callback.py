"""Iterative pruning as a callback: score, remove a little, train on, repeat."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_compress.channels.costs import Cost
from lightning_compress.core.distributed import broadcast
from lightning_compress.core.given import flag
from lightning_compress.core.schedule import (
    Schedule,
    amount_at,
    check_interval,
    check_schedule,
    checked_amount,
    checked_epochs,
)
from lightning_compress.core.select import refuse_complex, select_parameters
from lightning_compress.core.tensors import Kept, sliced
from lightning_compress.pruning.backtracker import Backtracker
from lightning_compress.pruning.channels import Channels
from lightning_compress.pruning.criteria.choose import (
    STATIC,
    Criterion,
    Granularity,
    Shrink,
    check_criterion,
    check_shrink,
    check_widths,
    checked_min_left,
)
from lightning_compress.pruning.criterion_hooks import CriterionHooks
from lightning_compress.pruning.limits import warn_of_rounding, warn_of_thin_layers
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.masks import Amount, Scope, least_left, prune_channels, prune_weights
from lightning_compress.pruning.remover import ChannelRemover
from lightning_compress.pruning.stopping import StopRule
from lightning_compress.trainer.callback import latent_values, take_writes, techniques
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.monitors import count_anew
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.step_window import Events, Ramp
from lightning_compress.trainer.surgery import CuttingCallback


class IterativePruningCallback(CuttingCallback):
    """Prunes a growing fraction of the weights or channels while the network trains, and keeps them at zero.

    At every event the entries with the lowest scores are masked, so that a fraction a(p) of the ORIGINAL entries is
    zero, where p is the progress from `start_epoch` to `end_epoch` and a is the schedule. After every optimizer step
    w <- m * w, where m is the mask. After `end_epoch` the network recovers with the final mask.

    Args:
        amount: Fraction of the targeted entries (weights), or of the channels of the targeted layers, that is removed
            in the end; 0 to 1.
        granularity: "weight" masks single weights; "neuron" masks, and then removes, whole channels with everything
            that makes them (weights, biases, scale and shift of norms). The output layer's channels always stay.
        criterion: Measure of an entry's importance; the method card has the formulas. Some criteria watch the training
            steps since the previous event, and some compare with the weights of the fit's start.
        scope: "global" compares all entries, "layer" removes the same fraction of each layer.
        schedule: Shape of the ramp.
        start_epoch: Begin of the ramp, in epochs, which may be fractions.
        end_epoch: End of the ramp; by default after two thirds of the planned steps, so that recovery follows.
        every_n_steps: Optimizer steps between events; by default one epoch.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` (or `network`) reaches. Packed
            weights that are no layer of their own, such as `in_proj_weight` of `nn.MultiheadAttention`, are pruned when
            a pattern names them.
        exclude: Patterns to leave out.
        regrow: Whether pruned entries train on behind the mask and come back when they have grown, until the ramp ends
            (dynamic network surgery, Guo et al. 2016).
        stop: `{"monitor": "val_acc", "max_drop": 0.01}` prunes on only while the metric stays that close to the dense
            network's; then the fit returns to the largest amount that kept the metric, and ends. The dense network is
            the one that the fit begins with, validated before the first step, or a better one of before `start_epoch`;
            amount 0 restores it. Further keys: `mode` ("max" or "min"), `baseline` (the dense metric, if it is known)
            and `recovery` (how many more validations an amount gets before its failure counts, 1).
        shrink: When masked channels leave the network for good, for granularity="neuron": "on_fit_end"; "during_fit",
            at once, so that the rest of the training gets faster; or "never". Only channels are cut whose removal
            changes nothing. Masks that another callback holds on the same tensors are cut with them. A loss that was
            computed before a cut cannot be back-propagated after it.
        cost: Divides the scores of channels before groups are compared (scope="global"): the "parameters", "macs" or
            "latency" (measured) of one channel.
        min_left: Smallest fraction of the entries of each weight that stays, so that scope="global" empties no layer;
            it is at most half of the fraction that stays of all weights. A warning names the weights that it protects.
        min_channels: Smallest number of channels of each group that stay.
        round_to: The number of channels that stay is rounded up to a multiple of this number, such as 8 for tensor
            cores.
        network: Dotted path of the submodule whose output is the prediction, for channels and for ewc and mas.
        example_inputs: Inputs to trace the network with, for channels: a tensor, a tuple of positional arguments, or a
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
        amount, min_left = checked_amount(amount), checked_min_left(min_left)
        start_epoch, end_epoch = checked_epochs(start_epoch, end_epoch, at_once=schedule == "one_shot")
        super().__init__(**settings_of(locals()))
        check_schedule(schedule, amount)
        flag(regrow, "regrow")
        check_criterion(criterion, granularity, scope, regrow=regrow)
        check_interval(every_n_steps)
        check_shrink(shrink, granularity, criterion, regrow=regrow, stop=stop is not None)
        check_widths(cost, min_channels, round_to)
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
        self.network = network
        self.example_inputs = example_inputs
        self.needs_gradients = criterion not in STATIC
        self.removes = granularity == "neuron" and shrink != "never"

        self._criterion = CriterionHooks(criterion, granularity, scope)
        self._masked = MaskedParameters(nn.Module())  # without parameters, until a fit begins
        self._remover: ChannelRemover | None = None  # for channels, once a fit has begun
        self._traced: ChannelRemover | None = None  # found by `effects`, which needs it before `prepare` does
        rule = None if stop is None else StopRule.from_dict(stop)
        self._backtracker: Backtracker | None = None  # also None when an earlier fit has decided the amount
        if rule is not None and amount > 0:
            self._backtracker = Backtracker(rule, trains_densely=start_epoch > 0)

        self.current_amount = 0.0
        self._stopped = False
        self._ramp: Events | None = None
        self._targets: list[str] = []
        self._entries: dict[str, int] = {}  # of each targeted weight, before any channel left
        self._costs: dict[str, float] | None = None  # of a channel of each group, in the dense network
        self._emptied: set[str] = set()

    # ------------------------------------------------------------------ what has been reached

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks in force (True stays), by parameter name."""
        return self._masked.masks

    @property
    def sparsity(self) -> float:
        """Fraction of the original entries, or channels, that has left, or is masked and zero in the module now."""
        keep = self._keep
        if keep is None:
            return 0.0
        there = sum(mask.numel() if self._left is None else int(mask.sum()) for mask in keep.values())
        total = sum(self._entries.values()) or sum(mask.numel() for mask in keep.values())
        zeros = sum(self._masked.count_zeros().values())
        return 1.0 - (there - zeros) / total if total else 0.0

    @property
    def masked_share(self) -> float:
        """Fraction of the original entries, or channels, that has left or is masked."""
        keep = self._keep or {}
        total = sum(self._entries.values()) or sum(mask.numel() for mask in keep.values())
        return 1.0 - sum(int(mask.sum()) for mask in keep.values()) / total if keep and total else 0.0

    @property
    def _channels(self) -> list[Channels] | None:
        """The channels that may be removed; None where single weights are pruned."""
        return None if self._remover is None else self._remover.channels

    @property
    def _left(self) -> dict[str, Tensor] | None:
        """The dense network's channels that are left, once some have been removed; else None."""
        return None if self._remover is None else self._remover.left

    @property
    def _keep(self) -> dict[str, Tensor] | None:
        """The entries, or the dense network's channels, that stay; None before the first event."""
        return self._left or self._masked.keep

    @property
    def finished(self) -> bool:
        """Whether the mask is final, so that the rest of the fit is recovery."""
        return self._stopped or (self._ramp is not None and self._ramp.finished)

    def progress(self) -> Progress:
        fraction = self.current_amount / self.amount if self.amount > 0 else 0.0
        finished = self.finished or self.amount == 0
        return Progress(fraction=fraction, finished=finished, ramp=True, numbers={"sparsity": lambda: self.sparsity})

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        self._traced = None
        if self.amount == 0:
            return Effects()
        state = self.loaded_state
        targets = self.selected(pl_module, warn=False)
        names = set(targets)
        if self.granularity == "neuron" and self.regrow and trainer is not None and len(techniques(trainer)) > 1:
            # The hidden values of biases and norms come back with the channel's weights.
            self._traced = self._trace(trainer, pl_module, targets, state)
            names |= {member.tensor for group in self._traced.channels for member in group.members}
        ramp = None if trainer is None else self._planned(trainer, state)
        stopped = self._stopped if state is None else state["stopped"]
        finished = stopped or (ramp is not None and ramp.finished)
        rewinds = self._backtracker is not None and not self._has_decided(state)
        return Effects(
            values=dict.fromkeys(names, "zeros"),
            revives=self.regrow,
            rewinds=rewinds,
            judges=rewinds,
            shapes=self.shrink if self.removes else "never",
            looks_at=frozenset() if finished else self._criterion.looks_at,
            begins=None if ramp is None else ramp.start,
            final=None if ramp is None or rewinds else ramp.last if finished else ramp.end,
            options={
                "revives": "regrow=True",
                "rewinds": "stop=",
                "judges": "stop=",
                "looks_at": f"criterion={self.criterion!r}",
                "shapes": f"shrink={self.shrink!r}",
            },
        )

    # ------------------------------------------------------------------ the fit

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._targets = self.selected(pl_module)
        if self.granularity == "weight":
            refuse_complex(pl_module, self._targets, f"{self.name}(granularity='weight')")
        resolve_network(pl_module, self.network)  # raises an error where there is none
        if state is not None:
            self._entries, self._costs = dict(state["entries"]), state["costs"]
            self.current_amount, self._stopped = state["amount"], state["stopped"]
            if self._backtracker is not None and state["stop"] is not None:
                self._backtracker.load_state_dict(state["stop"])
        left = self._left
        if self.granularity == "neuron":
            traced, self._traced = self._traced, None
            self._remover = traced or self._trace(trainer, pl_module, self._targets, state)
            self._remover.check(trainer, during_fit=self.shrink == "during_fit")
            if self.scope == "global" and self._costs is None:
                self._costs = self._remover.costs(self.cost)
        elif not self._entries:
            self._entries = {name: pl_module.get_parameter(name).numel() for name in self._targets}
        if self._has_decided(state):
            self._backtracker = None  # so that later fits keep what they train
        self._ramp = self._planned(trainer, state)
        self._continue_masks(pl_module, state, left)
        if self.amount > 0 and not self.finished:
            self._watch(pl_module)
        else:
            self._criterion.finish()
        if state is not None:
            self._criterion.resume(state["statistic"])

    def selected(self, pl_module: LightningModule, *, warn: bool = True) -> list[str]:
        """Return the names of the targeted parameters."""
        return list(select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude, warn=warn))

    def _trace(
        self, trainer: Trainer, pl_module: LightningModule, weights: list[str], state: dict[str, Any] | None
    ) -> ChannelRemover:
        """Find the channels of the network; a checkpoint, or an earlier fit, knows which of them have left."""
        keep = self._left if state is None else state["keep"] if state["thin"] else None
        return ChannelRemover.in_fit(
            trainer,
            pl_module,
            weights,
            network=self.network,
            exclude=self.exclude,
            example_inputs=self.example_inputs,
            keep=keep,
        )

    def _continue_masks(
        self, pl_module: LightningModule, state: dict[str, Any] | None, left: dict[str, Tensor] | None
    ) -> None:
        """Put the masks of a checkpoint, or of an earlier fit that ended with the channels `left`, in force again."""
        earlier = self._masked  # perhaps on another device
        self._masked = MaskedParameters(pl_module, channels=self._channels, regrow=self.regrow)
        self._masked.frozen = earlier.frozen
        if state is not None:
            self._mask(None if self._left is not None else state["keep"], latent=state["latent"])
        elif left is not None and self._left is None:  # the dense network has been loaded back
            self._mask(left)
        else:
            self._masked.check_masked(earlier.masks)
            self._mask(earlier.keep, latent=earlier.latent)

    def _has_decided(self, state: dict[str, Any] | None) -> bool:
        """Whether an earlier fit has decided the amount that `stop` asks for."""
        return self.finished if state is None else state["stop"] is None

    def _planned(self, trainer: Trainer, state: dict[str, Any] | None) -> Events:
        """Return the ramp of a resumed fit, of an earlier fit, or of this one."""
        kept, earlier = (None, self._ramp) if state is None else (state["ramp"], None)
        assert earlier is None or isinstance(earlier, Ramp)
        return Ramp.of_fit(
            trainer,
            kept,
            earlier,
            start_epoch=self.start_epoch,
            end_epoch=self.start_epoch if self.schedule == "one_shot" else self.end_epoch,
            every_n_steps=self.every_n_steps,
        )

    def follow_epochs(self, trainer: Trainer, moment: Callable[[int], int]) -> None:
        assert isinstance(self._ramp, Ramp)
        self._ramp = self._ramp.followed(trainer, moment, end_epoch=self.end_epoch, every_n_steps=self.every_n_steps)

    def at_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self._ramp is not None
        waits = self._backtracker is not None and self._backtracker.awaits_validation
        if self.amount == 0 or self._stopped or waits or not self._ramp.take(step):
            return
        self.event(trainer, pl_module, amount_at(self._ramp.progress(step), self.amount, schedule=self.schedule))

    def event(self, trainer: Trainer, pl_module: LightningModule, amount: Amount) -> None:
        """Prune the network, so that an amount of the original entries is zero."""
        assert self._ramp is not None
        self._prune(trainer, pl_module, amount)
        if self._ramp.finished:
            if self._remover is not None and self._keep is not None:
                warn_of_rounding(self._keep, self.amount, self.round_to)
            self._criterion.finish()
            if self._backtracker is None:
                count_anew(trainer, f"the final sparsity of {self.sparsity:.4g} is reached")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert self._ramp is not None
        backtracker = self._backtracker
        if backtracker is not None and (self._stopped or backtracker.must_go_back(self.current_amount)):
            # A fit that has stopped may have trained on because of min_epochs or min_steps, so it goes back again.
            self._go_back(backtracker, pl_module)
        elif self.amount > 0 and not self.finished:
            warnings.warn(
                f"The fit ended at step {self._steps}, before the pruning ramp did at step {self._ramp.end}: sparsity "
                f"is {self.sparsity:.4g}, not {self.amount}.",
                stacklevel=2,
            )
        masks = self._masked.keep if self._left is None else None
        if self.granularity == "neuron" and self.shrink == "on_fit_end" and self.finished and masks is not None:
            self._criterion.stop()
            self._cut(trainer, pl_module, masks)

    # ------------------------------------------------------------------ until the metric drops

    def before_first_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._backtracker is not None and not self._stopped:
            self._backtracker.begin(trainer, pl_module, self._masked, self.current_amount)
        if self.amount > 0 and not self.finished and not self._criterion.start:
            self.compare_from_here(trainer)
        super().before_first_step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before_fit = trainer.sanity_checking and self._ramp is None  # Lightning's own sanity check of a first fit
        if self._backtracker is None or self._stopped or trainer.state.fn != "fit" or before_fit:
            return
        outcome = self._backtracker.judge(trainer, pl_module, self._masked, self.current_amount)
        if outcome == "failed":
            self._go_back(self._backtracker, pl_module)
            trainer.should_stop = True
        elif outcome == "grew":
            monitor = self._backtracker.rule.monitor
            count_anew(trainer, f"sparsity {self.sparsity:.4g} keeps {monitor}")

    def _go_back(self, backtracker: Backtracker, pl_module: LightningModule) -> None:
        """Restore the newest network that kept the metric; its amount is final."""
        kept = backtracker.go_back(pl_module, again=self._stopped)
        self._stopped = True
        self.current_amount = kept["amount"]
        self._mask(kept["keep"], latent=kept["latent"])

    # ------------------------------------------------------------------ an event

    def _prune(self, trainer: Trainer, pl_module: LightningModule, amount: Amount) -> None:
        if amount:
            if self._backtracker is not None:
                self._backtracker.pruned()
            if self._channels != []:  # else one channel is left of every group
                keep = self._decide(trainer, pl_module, amount)
                if self.granularity == "neuron" and self.shrink == "during_fit":
                    self._cut(trainer, pl_module, keep)
                else:
                    self._mask(keep)
                    for other in techniques(trainer):
                        other.zero_latent(self.masks)
            self.current_amount = amount if isinstance(amount, float) else self.masked_share
            limited = self.granularity == "weight" and self.scope == "global"
            least = least_left(self._entries, self.current_amount, self.min_left) if limited else {}
            warn_of_thin_layers(self.masks, least, self.min_left, self._emptied)
        self._criterion.reset()

    def compare_from_here(self, trainer: Trainer) -> None:
        """Make the present weights those that later ones are compared with, where the criterion compares."""
        if self._criterion.compares:
            self._criterion.compare_from(self._real_weights(trainer))

    def _real_weights(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the values of all weights to be scored; where they are rounded, the real ones behind them."""
        weights = {name: self._masked.value(name) for name in self._targets}
        latent = latent_values(techniques(trainer))  # values of few bits rank nothing
        return weights | {name: latent[name] for name in weights.keys() & latent.keys()}

    @torch.no_grad()
    def _decide(self, trainer: Trainer, pl_module: LightningModule, amount: Amount) -> dict[str, Tensor]:
        """Return the masks of this event, the same on all ranks: over weights, or over the dense network's channels."""
        alive = None if self.regrow else self._keep
        take_writes(trainer)
        weights = self._real_weights(trainer)
        if self.projection is not None:
            self.projection.open()  # so that the latent values of masked entries are scored
        living = alive if self._channels is None else None
        scores, absolute = self._criterion.score(weights, self._channels, self.generator, alive=living)
        if self.projection is not None:
            self.projection.settle()
        if self._remover is not None:
            assert isinstance(amount, float), "channels have one amount"
            device = next(iter(scores.values())).device
            keep = prune_channels(
                self._remover.of_dense(scores),
                amount,
                scope=self.scope,
                alive=None if alive is None else {name: mask.to(device) for name, mask in alive.items()},
                costs=self._costs,
                min_channels=self.min_channels,
                round_to=self.round_to,
            )
        else:
            keep = prune_weights(
                scores,
                amount,
                scope=self.scope,
                alive=alive,
                absolute=absolute,
                left={name: n - pl_module.get_parameter(name).numel() for name, n in self._entries.items()},
                min_left=self.min_left,
            )
        device = next(iter(weights.values())).device
        return {name: broadcast(mask.to(device).contiguous()) for name, mask in keep.items()}

    # ------------------------------------------------------------------ checkpoints

    def technique_state(self) -> dict[str, Any]:
        return {
            "keep": self._keep,
            "thin": self._left is not None,
            "entries": self._entries,
            "costs": self._costs,
            "latent": self._masked.latent,
            "amount": self.current_amount,
            "ramp": None if self._ramp is None else self._ramp.state_dict(),
            "statistic": self._criterion.state_dict(),
            "stop": None if self._backtracker is None else self._backtracker.state_dict(),
            "stopped": self._stopped,
        }

    def synchronize(self) -> None:
        self._criterion.synchronize()

    # ------------------------------------------------------------------ masks, and cuts

    def _mask(self, keep: dict[str, Tensor] | None, *, latent: dict[str, Tensor] | None = None) -> None:
        self._masked.set(keep, latent=latent)
        self.projection = self._masked.projection

    def project_copy(self, module: nn.Module) -> None:
        self._masked.mask_copy(module)

    def _cut(self, trainer: Trainer, pl_module: LightningModule, keep: dict[str, Tensor]) -> None:
        """Remove channels for good: from the module, the optimizers' state, averages, and the ranks' wrapper."""
        assert self._remover is not None
        self._mask(None)
        self.cut_in_fit(trainer, partial(self._remover.cut, keep), at_end=self.shrink == "on_fit_end")
        if self._criterion.statistic is not None:
            self._watch(pl_module)

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        if self._ramp is None:  # the fit has not begun for this callback
            return
        self._criterion.end()  # before anything else: it may have changed how torch.compile behaves
        keep, latent = self._masked.keep, sliced(self._masked.latent, kept)
        if self._remover is None:
            keep = keep and sliced(keep, kept)
        elif stayed := self._remover.follow(kept):  # channels of its own, at the fit's end
            keep = keep and {name: mask[stayed[name]] if name in stayed else mask for name, mask in keep.items()}
            self._criterion.stop()
        self._masked = MaskedParameters(pl_module, channels=self._channels, regrow=self.regrow)
        self._mask(keep, latent=latent)
        if (seen := self._criterion.state_dict()) is not None:
            self._watch(pl_module)
            self._criterion.follow(seen, kept)

    # ------------------------------------------------------------------ a training step

    def _watch(self, pl_module: LightningModule) -> None:
        targets = self._targets if self._channels is None else self._channels
        network = resolve_network(pl_module, self.network)
        self._criterion.watch(pl_module, targets, network=network, generator=self.generator)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._ramp is not None
        self._criterion.begin(counts=self._ramp.counts(self._steps))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._criterion.step.before_backward(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.precision == "16-mixed":
            self._masked.mask_gradients()  # before the scaler looks for infinite gradients, and skips the step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._criterion.step.before_step(optimizer if len(trainer.optimizers) > 1 else None)
        self._masked.mask_gradients()

    def after_optimizer_step(self) -> None:
        self._criterion.step.after_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._criterion.end()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._criterion.end()
