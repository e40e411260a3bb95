"""The half of a pruning callback that masks, and lets masked channels leave the network for good."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.channels.costs import Cost
from lightning_compress.core.select import select_parameters
from lightning_compress.core.tensors import Kept, select, sliced
from lightning_compress.pruning.channels import PrunableChannels
from lightning_compress.pruning.criteria.choose import Shrink, make_statistic
from lightning_compress.pruning.criteria.statistic import Statistic
from lightning_compress.pruning.groups import Neurons
from lightning_compress.pruning.masked import MaskedParameters
from lightning_compress.pruning.masks import Scope
from lightning_compress.pruning.watching import WatchingCallback
from lightning_compress.trainer.distributed import gather, on_all_ranks
from lightning_compress.trainer.inputs import resolve_network, traced_network
from lightning_compress.trainer.surgery import (
    check_cuts_in_fit,
    cut_in_fit,
    follow_loads,
    keep_metadata,
)
from lightning_compress.trainer.targets import refuse_average_in_forward
from lightning_compress.trainer.unwrap import innermost


class RemovingCallback(WatchingCallback):
    """A callback that holds masks, over entries or channels, and cuts masked channels out.

    A subclass sets the settings and says when.
    """

    scope: Scope
    shrink: Shrink
    cost: Cost
    target: str | Sequence[str] | None
    exclude: str | Sequence[str]
    regrow: bool
    network: str
    example_inputs: Any

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._targets: list[str] = []
        self._entries: dict[str, int] = {}  # of each targeted tensor, before any channel left
        self._masked: MaskedParameters | None = None
        self._channels: PrunableChannels | None = None
        self._costs: dict[str, float] | None = None
        self._kept: dict[str, Tensor] | None = None  # of the dense network's channels, once some have left for good

    @property
    def removes(self) -> bool:
        """Whether channels leave the network."""
        return self.granularity == "neuron" and self.shrink != "never"

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks in force (True stays), by parameter name."""
        return {} if self._masked is None else self._masked.masks

    @property
    def sparsity(self) -> float:
        """Fraction of the targeted entries, or channels, of the original that has left, or is masked and zero now.

        It is counted in the module.
        """
        if self._keep is None:
            return 0.0
        zeros = {} if self._masked is None else self._masked.count_zeros()
        if self._channels is None:
            total = sum(self._entries.values())
            here = sum(mask.numel() for mask in self._keep.values())
        else:
            total = sum(mask.numel() for mask in self._keep.values())
            here = total if self._kept is None else sum(int(mask.sum()) for mask in self._kept.values())
        return 1.0 - (here - sum(zeros.values())) / total if total else 0.0

    @property
    def _keep(self) -> dict[str, Tensor] | None:
        """What stays of the entries that are there, or of the dense network's channels; None before the first event."""
        return self._kept or (None if self._masked is None else self._masked.keep)

    @property
    def _neurons(self) -> list[Neurons] | None:
        return None if self._channels is None else self._channels.neurons

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.removes:
            follow_loads(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.removes:
            keep_metadata(checkpoint, pl_module)

    # ------------------------------------------------------------------ what may go

    def _find_channels(self, trainer: Trainer, pl_module: LightningModule) -> PrunableChannels:
        refuse_average_in_forward(pl_module, self.network)
        channels = self._trace(trainer, pl_module, self._targets)
        _check_ranks_agree(channels)
        if self.shrink == "during_fit":
            check_cuts_in_fit(trainer, map(innermost(pl_module).get_parameter, channels.cut_parameters))
        if self.scope == "global" and self._costs is None:
            self._costs = channels.costs(self.cost)
        if not channels.neurons:
            warnings.warn(
                "Every group of channels has one channel left, which stays: the fit goes on, and nothing more is "
                "pruned.",
                stacklevel=2,
            )
        elif channels.reasons:
            rank_zero_info(f"Channels that are not pruned: {'; '.join(channels.reasons)}.")
        return channels

    def _trace(self, trainer: Trainer, pl_module: LightningModule, targets: Collection[str]) -> PrunableChannels:
        def found() -> PrunableChannels:
            _, inputs = traced_network(trainer, pl_module, self.network, self.example_inputs)
            return PrunableChannels(
                innermost(pl_module),
                self.network,
                inputs,
                targets,
                exclude=self._excluded(pl_module),
                keep=self._kept,
            )

        return on_all_ranks(found)  # each rank looks at a batch of its own

    def _excluded(self, pl_module: LightningModule) -> list[str]:
        return list(select_parameters(pl_module, self.exclude, warn=False)) if self.exclude else []

    def _watch(self, pl_module: LightningModule) -> Statistic | None:
        """What the criterion needs to see of the targets, as they are now; None where nothing can go any more."""
        if self._neurons == []:
            return None
        return make_statistic(
            self.criterion,
            pl_module,
            self._targets if self._neurons is None else self._neurons,
            granularity=self.granularity,
            network=resolve_network(pl_module, self.network),
            generator=self.generator,
        )

    def _left(self, pl_module: LightningModule) -> dict[str, int]:
        """How many of the original entries have left, with channels that another callback has cut."""
        return {name: count - pl_module.get_parameter(name).numel() for name, count in self._entries.items()}

    # ------------------------------------------------------------------ masks, and what they become

    def _mask(self, keep: dict[str, Tensor] | None, *, latent: dict[str, Tensor] | None = None) -> None:
        assert self._masked is not None
        self._masked.set(keep, latent=latent)
        self.projection = self._masked.projection

    def _unmask_dense(self, pl_module: LightningModule) -> None:
        """Go on with masks where the dense network was loaded back after channels had left."""
        if self._kept is not None and self._channels is not None and self._channels.is_dense(self._kept):
            self._masked = MaskedParameters(pl_module, neurons=self._neurons)
            self._masked.set(self._kept)
            self._kept = None

    def _cut(self, trainer: Trainer, pl_module: LightningModule, keep: dict[str, Tensor]) -> None:
        """Take channels out for good: of the module, the optimizers' state, averages, and the ranks' wrapper."""
        assert self._channels is not None
        self._mask(None)
        cut_in_fit(trainer, self, partial(self._channels.cut, keep), at_end=self.shrink == "on_fit_end")
        self._kept = self._channels.keep
        if self._statistic is not None:
            self._statistic.end()
            self._statistic = self._watch(pl_module)

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule, kept: Kept) -> None:
        if self._masked is None:  # the fit has not begun for this callback
            return
        if self._statistic is not None:
            self._statistic.end()  # before anything else: it may have changed how torch.compile behaves
        keep, latent = self._masked.keep, sliced(self._masked.latent, kept)
        if self._channels is not None:
            if stayed := self._channels.follow(kept):  # channels of its own, at the fit's end
                self._kept, self._statistic = self._channels.keep, None
                keep = keep and {name: mask[stayed[name]] if name in stayed else mask for name, mask in keep.items()}
        elif keep is not None:
            keep = sliced(keep, kept)
        self._masked = MaskedParameters(pl_module, neurons=self._neurons, regrow=self.regrow)
        self._mask(keep, latent=latent)
        if (before := self._statistic) is not None:
            self._statistic = self._watch(pl_module)
            if self._statistic is not None:
                self._statistic.load_state_dict(_followed(before.state_dict(), self._statistic, kept))

    def project_copy(self, module: nn.Module) -> None:
        if self._masked is not None:
            self._masked.mask_copy(module)


def _check_ranks_agree(channels: PrunableChannels) -> None:
    """Raise a ValueError where ranks have found different channels, as each looks at a batch of its own."""
    found = {one.name: (one.size, [(member.tensor, member.dim) for member in one.members]) for one in channels.neurons}
    ranks = gather(found)
    for number, others in enumerate(ranks):
        names = [name for name in {**ranks[0], **others} if ranks[0].get(name) != others.get(name)]
        if names:
            raise ValueError(
                f"Ranks 0 and {number} found different channels that may be pruned, such as those of {names[0]!r}: the "
                f"forward pass depends on the rank or on the batch. Pass example_inputs, the same on all ranks, or "
                f"exclude these layers."
            )


def _followed(seen: dict[str, Any], now: Statistic, kept: Kept) -> dict[str, Any]:
    """What a statistic has seen, in the shapes after a cut. Sums over channels, which keep theirs, stay as they are."""
    sums = {
        name: total if total.shape == now.sums[name].shape else select(total, kept[name])
        for name, total in seen["sums"].items()
    }
    return seen | {"sums": sums} | ({"start": sliced(seen["start"], kept)} if "start" in seen else {})
