"""Group lasso as a callback: structured sparsity learning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_compress.channels.cut import cut_part, live_channels
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroups
from lightning_compress.core.given import flag, real_number
from lightning_compress.core.select import refuse_complex, refuse_sparse_gradients, select_parameters
from lightning_compress.core.tensors import Kept
from lightning_compress.group_lasso.penalty import (
    WeightGroups,
    add_gradient,
    producer_groups,
    shrink_groups,
    weight_groups,
)
from lightning_compress.trainer.callback import techniques
from lightning_compress.trainer.effects import Effects, Progress
from lightning_compress.trainer.inputs import resolve_network, traced_network
from lightning_compress.trainer.settings import settings_of
from lightning_compress.trainer.surgery import CuttingCallback
from lightning_compress.trainer.targets import refuse_average_in_forward

LassoGranularity = Literal["filter", "channel", "shape", "group"]
LassoShrink = Literal["never", "on_fit_end"]

_ZERO = 1e-8  # a group with a norm up to this one counts as zero


class GroupLassoCallback(CuttingCallback):
    """Trains with a penalty that drives whole groups of weights to zero: filters, channels, shapes, or channel groups.

    R(w) = strength * sum over groups g of ||w_g||_2. The gradient of the penalty, strength * w_g / ||w_g||, is added to
    that of the loss once per optimizer step: after accumulation and after the ranks' gradients are averaged, before
    clipping. A stochastic gradient takes groups close to zero, but not to exact zeros. With `proximal=True` no gradient
    is added; after every optimizer step w_g <- w_g * max(0, 1 - lr * strength / ||w_g||), so that groups become exactly
    zero. Here lr is the learning rate of the parameter's group in the optimizer, without the scaling by an optimizer's
    moments: over a fit the steps take at most strength * (sum of lr) from the norm of a group, by which strength can be
    chosen. Adam divides an added gradient by its own size, so that without `proximal` strength has little effect there.

    The norms are summed without weights, as in the paper, and without Yuan and Lin's factor sqrt(size of g).
    `compress/group_sparsity` is logged once an epoch.

    Args:
        strength: Factor of the penalty, 0 or more; 0 changes nothing.
        granularity: "filter" groups all weights of an output channel, "channel" all weights that read an input channel,
            "shape" all weights at one position (input channel, row, column) of the filters; for linear layers these
            are rows, columns, and columns. "group" groups all slices that produce a channel, in all tensors (weights,
            biases, scale and shift of norms), so that channels of zeros can be cut out; it takes only channels whose
            cut is exact.
        target: Patterns of modules (their `weight`) or parameters; by default the linear layers and convolutions that
            an optimizer trains when the fit begins and that the code of `forward` (or `network`) reaches. With "group",
            a channel group is taken if one of the tensors that produce it is named.
        exclude: Patterns to leave out.
        proximal: Whether groups are shrunk after the step, instead of a gradient added before it.
        shrink: When channels that are exactly zero leave the network for good: "never", or "on_fit_end", which needs
            granularity="group" and proximal=True.
        example_inputs: Inputs to trace the network with, for "group": a tensor, a tuple of positional arguments, or a
            dict of keyword arguments, batch first. By default `example_input_array`, else one peeked batch.
        network: Dotted path of the submodule that is traced, for "group"; by default the LightningModule.

    Attributes:
        group_sparsity: Fraction of the groups whose norm was at most 1e-8 when the last epoch ended.

    Raises:
        ValueError: An argument is out of range.

    References:
        Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks", section 3. The paper penalizes filters
        and channels together, which takes two callbacks.
        Parikh and Boyd 2014, "Proximal Algorithms", section 6.5.1, for the proximal step.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> lasso = GroupLassoCallback(1e-3, granularity="group", proximal=True, shrink="on_fit_end")
        >>> trainer = Trainer(callbacks=[lasso], max_epochs=9, logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        strength: float,
        *,
        granularity: LassoGranularity = "filter",
        target: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        proximal: bool = False,
        shrink: LassoShrink = "never",
        example_inputs: Any = None,
        network: str = "",
    ) -> None:
        strength = real_number(strength, "strength must be a finite number, 0 or more", least=0)
        super().__init__(**settings_of(locals()))
        flag(proximal, "proximal")
        if granularity not in get_args(LassoGranularity):
            raise ValueError(f"granularity must be 'filter', 'channel', 'shape' or 'group'; got {granularity!r}.")
        if shrink not in get_args(LassoShrink):
            raise ValueError(f"shrink must be 'never' or 'on_fit_end'; got {shrink!r}.")
        if shrink != "never" and not (granularity == "group" and proximal):
            raise ValueError(
                f"shrink={shrink!r} cuts channels out that are exactly zero, which only granularity='group' with "
                f"proximal=True makes them; got granularity={granularity!r} and proximal={proximal!r}."
            )
        self.strength = strength
        self.granularity: LassoGranularity = granularity
        self.target = target
        self.exclude = exclude
        self.proximal = proximal
        self.shrink: LassoShrink = shrink
        self.example_inputs = example_inputs
        self.network = network
        self.removes = shrink != "never"

        self.group_sparsity = 0.0
        self._begun = self._ended = False
        self._groups: list[WeightGroups] = []
        self._found: list[WeightGroups] | None = None  # by `effects`, which needs the groups before `prepare` does
        self._channels = ChannelGroups()  # of the network, with "group"
        self._inputs: Any = None  # with which the network was traced
        self._left_out: dict[str, str] = {}

    def effects(self, trainer: Trainer | None, pl_module: LightningModule) -> Effects:
        self._found = None
        if self.strength == 0:
            return Effects()
        names = set(select_parameters(pl_module, self.patterns(pl_module), exclude=self.exclude, warn=False))
        if self.granularity == "group" and trainer is not None and len(techniques(trainer)) > 1:
            # A channel's group holds biases and norms as well, and other layers that make the channel.
            self._found = self._find(trainer, pl_module)
            ids = {id(part.parameter) for one in self._found for part in one.parts}
            names |= {name for name, parameter in pl_module.named_parameters() if id(parameter) in ids}
        return Effects(
            values=dict.fromkeys(names, "penalty"),
            proximal=self.proximal,
            shapes=self.shrink,
            options={"proximal": "proximal=True", "shapes": f"shrink={self.shrink!r}"},
        )

    def progress(self) -> Progress:
        acts = self.strength > 0
        numbers = {"group_sparsity": lambda: self.group_sparsity}
        return Progress(fraction=float(acts and self._begun), finished=self._ended or not acts, numbers=numbers)

    # ------------------------------------------------------------------ the groups

    def prepare(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any] | None) -> None:
        self._begun, self._ended = True, False
        found, self._found = self._found, None
        self._groups = found or self._find(trainer, pl_module)
        names = [name for name, one in pl_module.named_parameters() if self._penalizes(one)]
        refuse_complex(pl_module, names, self.name)
        if not self.proximal:
            refuse_sparse_gradients(pl_module, names, f"{self.name}(proximal=False)")
        if not self._groups:
            raise ValueError(
                f"target={self.target!r} with exclude={self.exclude!r} names no channels that can be cut out exactly "
                f"({_listed(self._left_out) or 'the network has none there'}): use granularity='filter' or another "
                f"target."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._refresh(trainer, pl_module)

    def technique_state(self) -> dict[str, Any]:
        return {}  # the penalty depends on the weights alone

    def project_copy(self, module: nn.Module) -> None:
        pass  # an average of shrunk weights stays an average

    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the groups anew if channels have been cut out of the network."""
        if any(one.stale for one in self._groups):
            self._groups = self._find(trainer, pl_module)

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> list[WeightGroups]:
        target = self.patterns(pl_module)
        if self.granularity != "group":
            return weight_groups(pl_module, self.granularity, target=target, exclude=self.exclude)
        refuse_average_in_forward(pl_module, self.network)
        network, self._inputs = traced_network(trainer, pl_module, self.network, self.example_inputs)
        self._channels = channel_groups(network, self._inputs)
        named = self._channels.prefixed(self.network)
        found, left_out = producer_groups(pl_module, named, target=target, exclude=self.exclude)
        if left_out and left_out != self._left_out:
            rank_zero_info(f"Channels without a penalty: {_listed(left_out)}.")
        self._left_out = left_out
        return found

    # ------------------------------------------------------------------ the cut of what is zero

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = True
        self._refresh(trainer, pl_module)
        smallest = min(float(one.norms().min()) for one in self._groups)
        if self.strength > 0 and smallest > _ZERO:
            exactly = "" if self.proximal else ", and proximal=True, without which groups only come close to zero"
            warnings.warn(
                f"GroupLassoCallback has made no group zero (the smallest has a norm of {smallest:.2g}), so that "
                f"nothing can be left out: use a larger strength than {self.strength:g}{exactly}.",
                stacklevel=2,
            )
        if self.shrink == "on_fit_end" and self.strength > 0:
            self.cut_in_fit(trainer, partial(self._cut, pl_module), at_end=True)

    def _cut(
        self, pl_module: LightningModule, *, optimizers: list[torch.optim.Optimizer], copies: list[nn.Module]
    ) -> Kept:
        network, groups = resolve_network(pl_module, self.network), self._channels
        mine = {one.name for one in self._groups}
        here = [one for one, its in zip(groups, groups.prefixed(self.network), strict=True) if its.name in mine]
        keep = live_channels(network, here)
        for name in [name for name, live in keep.items() if not bool(live.any())]:
            del keep[name]
            warnings.warn(
                f"All channels of {name!r} are zero, and nothing passes through it: they stay. Use a smaller strength "
                f"than {self.strength}.",
                stacklevel=2,
            )
        return cut_part(
            pl_module, self.network, self._inputs, keep, groups=groups, optimizers=optimizers, copies=copies
        )

    # ------------------------------------------------------------------ around every optimizer step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if not self.proximal:
            add_gradient(self._groups, self.strength, optimizer)

    def check_announced(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.proximal and self.strength > 0:
            raise RuntimeError(
                "An optimizer stepped without on_before_optimizer_step, so its gradients lack the penalty. Step it "
                "through Lightning: `self.optimizers()` with its default use_pl_optimizer=True."
            )

    def acts_on(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(self._penalizes(one) for group in optimizer.param_groups for one in group["params"])

    def _penalizes(self, parameter: nn.Parameter) -> bool:
        return any(part.parameter is parameter for one in self._groups for part in one.parts)

    def after_projection(self, optimizer: torch.optim.Optimizer) -> None:
        if self.proximal:
            shrink_groups(self._groups, self.strength, optimizer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh(trainer, pl_module)
        zero = [one.norms() <= _ZERO for one in self._groups]
        self.group_sparsity = sum(int(one.sum()) for one in zero) / max(1, sum(one.numel() for one in zero))
        super().on_train_epoch_end(trainer, pl_module)


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
