"""The channels of a network in training: which of the dense network's are left, and how others leave for good."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.channels.costs import Cost, channel_costs
from lightning_compress.channels.cut import cut_part
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroups, thinned
from lightning_compress.core.distributed import gather, on_all_ranks
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.select import select_parameters
from lightning_compress.core.tensors import Kept
from lightning_compress.pruning.channels import Channels, find_channels
from lightning_compress.trainer.inputs import traced_network
from lightning_compress.trainer.surgery import check_cuts_in_fit
from lightning_compress.trainer.targets import refuse_average_in_forward
from lightning_compress.trainer.unwrap import innermost


class ChannelRemover:
    """Finds the channels that the named weights make, cuts masked ones out, and remembers which have left.

    All masks that it takes and returns are over the channels of the dense network, by group name.

    Args:
        model: The module that the names are relative to.
        network: Dotted path of the submodule that makes the prediction.
        example_inputs: The inputs of that submodule, batch first.
        weights: Qualified names of the weights whose channels may be removed.
        exclude: Names of parameters that must not be touched.
        keep: The channels that are left, where the network has been cut before. If the network has all of them, it is
            the dense one again, and no channel has left it.

    Attributes:
        channels: The channels that may be removed, as they are in the network now.
        reasons: Why other channels have to stay, in words.
        keep: The dense network's channels that are left (True).

    Raises:
        ValueError: No channels may be removed, or the network has other channels than `keep` says.
    """

    def __init__(
        self,
        model: nn.Module,
        network: str,
        example_inputs: ExampleInputs,
        weights: Collection[str],
        *,
        exclude: Collection[str] = (),
        keep: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self._network, self._inputs = model, network, example_inputs
        self._weights, self._exclude = weights, exclude
        self._start = f"{network}." if network else ""
        self._groups, self.channels = ChannelGroups(), list[Channels]()
        found = self._plan()
        self.reasons = [f"{group.name}: {group.frozen}" for group in found if group.frozen is not None]
        scored = {one.tensor for group in found for one in group.weights}
        self.reasons += [f"{name}: its channels are not used as such" for name in weights if name not in scored]
        if not self.channels and keep is None:
            raise ValueError(f"No targeted layer has channels that may be pruned ({'; '.join(self.reasons)}).")
        self.keep = {group.name: torch.ones(group.size, dtype=torch.bool) for group in self.channels}
        sizes = {name: mask.numel() for name, mask in (keep or {}).items()}
        if keep is not None and sizes != {group.name: group.size for group in self.channels}:
            self._resume(keep)

    @classmethod
    def in_fit(
        cls,
        trainer: Trainer,
        pl_module: LightningModule,
        weights: Collection[str],
        *,
        network: str,
        exclude: str | Sequence[str],
        example_inputs: ExampleInputs | None,
        keep: Mapping[str, Tensor] | None,
    ) -> ChannelRemover:
        """Find the channels in the network of a fit.

        Args:
            trainer: The Trainer. Each rank peeks at a batch of its own, where nothing else gives example inputs.
            pl_module: The LightningModule.
            weights: As for the constructor.
            network: As for the constructor.
            exclude: Patterns of parameters that must not be touched.
            example_inputs: What the network is traced with, or None.
            keep: As for the constructor.

        Raises:
            ValueError: As the constructor, on any rank.
        """

        def found() -> ChannelRemover:
            _, inputs = traced_network(trainer, pl_module, network, example_inputs)
            excluded = list(select_parameters(pl_module, exclude, warn=False)) if exclude else []
            return cls(innermost(pl_module), network, inputs, weights, exclude=excluded, keep=keep)

        refuse_average_in_forward(pl_module, network)
        return on_all_ranks(found)

    def check(self, trainer: Trainer, *, during_fit: bool) -> None:
        """Say which channels stay, and refuse a fit in which channels could not be removed.

        Args:
            trainer: The Trainer.
            during_fit: Whether channels are removed while optimizers still step.

        Raises:
            ValueError: Ranks have found different channels, or an optimizer's state cannot be cut.
        """
        self._check_ranks_agree()
        if during_fit:
            check_cuts_in_fit(trainer, self._cut_parameters())
        if not self.channels:
            warnings.warn(
                "Every group of channels has one channel left, which stays: the fit goes on, and nothing more is "
                "pruned.",
                stacklevel=2,
            )
        elif self.reasons:
            rank_zero_info(f"Channels that are not pruned: {'; '.join(self.reasons)}.")

    @property
    def left(self) -> dict[str, Tensor] | None:
        """The channels that are left, once some have been removed; None while the network is dense."""
        return None if all(bool(mask.all()) for mask in self.keep.values()) else self.keep

    def of_dense(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lay the scores of the channels that are left over the dense network's channels; others score zero."""
        laid = {}
        for name, mask in self.keep.items():
            score = scores.get(name)
            laid[name] = torch.zeros(mask.numel()) if score is None else score.new_zeros(mask.numel())
            if score is not None:
                laid[name][mask.to(score.device)] = score
        return laid

    def costs(self, cost: Cost) -> dict[str, float]:
        """Return what one channel of each group costs in the network of now."""
        names = {group.name.removeprefix(self._start) for group in self.channels}
        groups = [group for group in self._groups if group.name in names]
        found = channel_costs(self._model.get_submodule(self._network), groups, self._inputs, cost=cost)
        return {self._start + name: value for name, value in found.items()}

    def cut(
        self,
        keep: Mapping[str, Tensor],
        *,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        copies: Iterable[nn.Module] = (),
    ) -> Kept:
        """Cut the channels that `keep` drops out of the network, the optimizers' states and the copies.

        Returns:
            By tensor and dimension the positions that stayed.

        Raises:
            ValueError: The cut fails, as `cut` says; the network is as it was then.
        """
        here = {name.removeprefix(self._start): mask.cpu()[self.keep[name]] for name, mask in keep.items()}
        here = {name: mask for name, mask in here.items() if not bool(mask.all())}
        kept = cut_part(
            self._model,
            self._network,
            self._inputs,
            here,
            groups=self._groups,
            optimizers=optimizers,
            copies=copies,
        )
        self._groups = thinned(self._groups, here)
        self.keep = {name: keep[name].cpu() if name in keep else mask for name, mask in self.keep.items()}
        self._find()
        return kept

    def follow(self, kept: Kept) -> dict[str, Tensor]:
        """Find the channels anew after the cut of another technique, and drop from `keep` those that have left.

        Args:
            kept: By tensor and dimension the positions that stayed.

        Returns:
            For each group of which some channels have left, a mask over those that were there: True stayed.
        """
        stayed = {}
        for group in self.channels:
            cuts = [(one.index[:, 0], kept.get(one.tensor, {}).get(one.dim)) for one in group.members]
            index, positions = next(((at, left) for at, left in cuts if left is not None), (None, None))
            if index is not None and positions is not None:
                stayed[group.name] = torch.isin(index.cpu(), positions.cpu())
                mask = self.keep[group.name].clone()
                mask[self.keep[group.name]] = stayed[group.name]
                self.keep[group.name] = mask
        self._plan()
        return stayed

    def _plan(self) -> list[Channels]:
        """Trace the network, which takes seconds, and find the channels in its groups."""
        self._groups = channel_groups(self._model.get_submodule(self._network), self._inputs)
        return self._find()

    def _find(self) -> list[Channels]:
        found = find_channels(
            self._model,
            self._inputs,
            self._weights,
            exclude=self._exclude,
            network=self._network,
            groups=self._groups,
        )
        self.channels = [group for group in found if group.frozen is None]
        return found

    def _resume(self, keep: Mapping[str, Tensor]) -> None:
        sizes = {group.name: group.size for group in self.channels}
        for name in {**keep, **sizes}:
            mask = keep[name]  # a KeyError says that the mask is of another network
            left = int(mask.sum())
            if sizes.get(name, 1) != left:  # a group with one channel is no longer free
                raise ValueError(
                    f"The checkpoint has {left} of {mask.numel()} channels of {name!r}, the network {sizes[name]}."
                )
        self.keep = {name: mask.cpu() for name, mask in keep.items()}

    def _cut_parameters(self) -> list[nn.Parameter]:
        """The parameters that get thinner when these channels are removed."""
        names = {group.name for group in self.channels}
        groups = [group for group in self._groups.prefixed(self._network) if group.name in names]
        thinner = {member.tensor for group in groups for member in group.members}
        return [parameter for name, parameter in self._model.named_parameters() if name in thinner]

    def _check_ranks_agree(self) -> None:
        """Raise a ValueError where ranks have found different channels, as each looks at a batch of its own."""
        found = {one.name: (one.size, [(part.tensor, part.dim) for part in one.members]) for one in self.channels}
        ranks = gather(found)
        for number, others in enumerate(ranks):
            names = [name for name in {**ranks[0], **others} if ranks[0].get(name) != others.get(name)]
            if names:
                raise ValueError(
                    f"Ranks 0 and {number} found different channels that may be pruned, such as those of {names[0]!r}: "
                    f"the forward pass depends on the rank or on the batch. Pass example_inputs, the same on all "
                    f"ranks, or exclude these layers."
                )
