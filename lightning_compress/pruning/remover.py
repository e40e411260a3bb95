"""How channels leave a network for good while a Trainer holds it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.channels.costs import Cost
from lightning_compress.core.select import select_parameters
from lightning_compress.core.tensors import Kept
from lightning_compress.pruning.channels import PrunableChannels
from lightning_compress.pruning.groups import Neurons
from lightning_compress.trainer.distributed import gather, on_all_ranks
from lightning_compress.trainer.inputs import traced_network
from lightning_compress.trainer.surgery import check_cuts_in_fit
from lightning_compress.trainer.targets import refuse_average_in_forward
from lightning_compress.trainer.unwrap import innermost


class ChannelRemover:
    """Finds the channels that may leave a network, cuts masked ones out, and remembers which have left.

    `find` comes when a fit begins; then `cut` takes channels out, and `follow` adapts to the cuts of others. All masks
    are over the channels of the dense network.

    Args:
        network: Dotted path of the submodule that makes the prediction.
        exclude: Patterns of parameters that must not be touched.
        example_inputs: What the network is traced with; None peeks at a batch.

    Attributes:
        kept: Which channels are left, by group name, once some have left for good; else None.
        costs: What one channel of each group of the dense network costs; None where costs are not compared.
    """

    def __init__(self, network: str, *, exclude: str | Sequence[str], example_inputs: Any) -> None:
        self._network, self._exclude, self._inputs = network, exclude, example_inputs
        self._channels: PrunableChannels | None = None
        self.kept: dict[str, Tensor] | None = None
        self.costs: dict[str, float] | None = None

    @property
    def channels(self) -> PrunableChannels:
        """The channels of the network as it is now."""
        assert self._channels is not None, "find comes first"
        return self._channels

    @property
    def neurons(self) -> list[Neurons] | None:
        """Those of the channels that may go; None before any are found."""
        return None if self._channels is None else self._channels.neurons

    def trace(self, trainer: Trainer, pl_module: LightningModule, weights: Collection[str]) -> PrunableChannels:
        """Return the channels that the named weights make. Each rank looks at a batch of its own."""

        def found() -> PrunableChannels:
            model = innermost(pl_module)
            _, inputs = traced_network(trainer, pl_module, self._network, self._inputs)
            exclude = list(select_parameters(pl_module, self._exclude, warn=False)) if self._exclude else []
            return PrunableChannels(model, self._network, inputs, weights, exclude=exclude, keep=self.kept)

        return on_all_ranks(found)

    def find(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        weights: Collection[str],
        *,
        cost: Cost | None,
        during_fit: bool,
    ) -> None:
        """Find the channels that the named weights make, in the network of a fit that begins.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule.
            weights: Qualified names of parameters.
            cost: By what channels are compared, or None.
            during_fit: Whether channels leave while optimizers still step.

        Raises:
            ValueError: There are none, ranks find different ones, or an optimizer's state can't be cut.
        """
        refuse_average_in_forward(pl_module, self._network)
        channels = self.trace(trainer, pl_module, weights)
        _check_ranks_agree(channels)
        if during_fit:
            check_cuts_in_fit(trainer, map(innermost(pl_module).get_parameter, channels.cut_parameters))
        if cost is not None and self.costs is None:
            self.costs = channels.costs(cost)
        if not channels.neurons:
            warnings.warn(
                "Every group of channels has one channel left, which stays: the fit goes on, and nothing more is "
                "pruned.",
                stacklevel=2,
            )
        elif channels.reasons:
            rank_zero_info(f"Channels that are not pruned: {'; '.join(channels.reasons)}.")
        self._channels = channels

    def take_back(self) -> dict[str, Tensor] | None:
        """Forget the cuts where the dense network has been loaded back: return the mask that stands for them."""
        if self.kept is None or not self.channels.is_dense(self.kept):
            return None
        mask, self.kept = self.kept, None
        return mask

    def cut(
        self, keep: Mapping[str, Tensor], *, optimizers: Iterable[torch.optim.Optimizer], copies: Iterable[nn.Module]
    ) -> Kept:
        """Cut out what the mask drops, of the network, optimizers' states and copies; return which positions stayed."""
        positions = self.channels.cut(keep, optimizers=optimizers, copies=copies)
        self.kept = self.channels.keep
        return positions

    def follow(self, kept: Kept) -> dict[str, Tensor]:
        """Find the channels of a network that another callback has cut, as `PrunableChannels.follow` does."""
        if stayed := self.channels.follow(kept):
            self.kept = self.channels.keep
        return stayed


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
