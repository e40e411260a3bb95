"""The channels of a network in training: which of the original ones are left, and how the others leave for good."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.channels.costs import Cost, channel_costs
from lightning_compress.channels.cut import cut, parts_of
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroups, positions_kept, thinned
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.tensors import Kept, named_tensors
from lightning_compress.pruning.groups import Neurons
from lightning_compress.pruning.neurons import find_neurons


class PrunableChannels:
    """The channels that the named weights make, counted as the dense network had them.

    Args:
        model: The module that the names are relative to.
        network: Dotted path of the submodule that makes the prediction.
        example_inputs: What it takes; batch first.
        weights: Qualified names of the weights whose channels may go.
        exclude: Names of parameters that must not be touched.
        keep: What is left of the dense network's channels, where the network has been cut already.

    Attributes:
        neurons: The free ones, as they are in the network now.
        reasons: Why others have to stay, in words.
        keep: By name a mask over the dense network's channels: those that are left.

    Raises:
        ValueError: There are none, or not those that `keep` says.
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
        self._exclude = exclude
        self._model, self._network, self._inputs, self._weights = model, network, example_inputs, weights
        found = self.find_again()
        self.reasons = [f"{layer.name}: {layer.frozen}" for layer in found if layer.frozen is not None]
        met = {one.tensor for layer in found for one in layer.weights}
        self.reasons += [f"{name}: its channels are not used as such" for name in weights if name not in met]
        if not self.neurons and keep is None:
            raise ValueError(f"No targeted layer has channels that may be pruned ({'; '.join(self.reasons)}).")
        self.keep = {layer.name: torch.ones(layer.size, dtype=torch.bool) for layer in self.neurons}
        if keep is not None and not self.is_dense(keep):
            self._resume(keep)

    def find_again(self) -> list[Neurons]:
        """Find the channels anew, after another technique has cut the network."""
        self._groups: ChannelGroups = channel_groups(self._model.get_submodule(self._network), self._inputs)
        return self._find()

    def follow(self, kept: Kept) -> dict[str, Tensor]:
        """Find the channels anew after the cut of another technique, and drop from `keep` those that have left.

        Args:
            kept: By tensor and dimension the positions that stayed.

        Returns:
            By name, for channels of which some have left, a mask over those that were there: those that stayed.
        """
        stayed = {}
        for layer in self.neurons:
            cuts = [(one.index[:, 0], kept.get(one.tensor, {}).get(one.dim)) for one in layer.members]
            index, positions = next(((at, left) for at, left in cuts if left is not None), (None, None))
            if index is not None and positions is not None:
                stayed[layer.name] = torch.isin(index.cpu(), positions.cpu())
                mask = self.keep[layer.name].clone()
                mask[self.keep[layer.name]] = stayed[layer.name]
                self.keep[layer.name] = mask
        self.find_again()
        return stayed

    def _find(self) -> list[Neurons]:
        found = find_neurons(
            self._model,
            self._inputs,
            self._weights,
            exclude=self._exclude,
            network=self._network,
            groups=self._groups,
        )
        self.neurons = [layer for layer in found if layer.frozen is None]
        return found

    @property
    def cut_parameters(self) -> list[str]:
        """The parameters that get thinner where these channels go."""
        mine = {layer.name for layer in self.neurons}
        cut = {
            member.tensor
            for group in self._groups.prefixed(self._network)
            if group.name in mine
            for member in group.members
        }
        return [name for name, _ in self._model.named_parameters() if name in cut]

    def is_dense(self, keep: Mapping[str, Tensor]) -> bool:
        """Whether the network has all the channels that `keep` masks, those that it drops too."""
        return all(layer.size == keep[layer.name].numel() for layer in self.neurons) and len(self.neurons) == len(keep)

    def _resume(self, keep: Mapping[str, Tensor]) -> None:
        sizes = {layer.name: layer.size for layer in self.neurons}
        for name, mask in keep.items():
            left = int(mask.sum())
            if sizes.get(name, 1) != left:  # a group with one channel is no longer free
                raise ValueError(
                    f"The checkpoint has {left} of {mask.numel()} channels of {name!r}, the network {sizes[name]}."
                )
        self.keep = {name: mask.cpu() for name, mask in keep.items()}

    def of_dense(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Lay the scores of the channels that are left out over the dense network's channels; others score zero."""
        laid = {}
        for name, mask in self.keep.items():
            score = scores.get(name)
            laid[name] = torch.zeros(mask.numel()) if score is None else score.new_zeros(mask.numel())
            if score is not None:
                laid[name][mask.to(score.device)] = score
        return laid

    def costs(self, cost: Cost) -> dict[str, float]:
        """Return what one channel of each group costs."""
        start = f"{self._network}." if self._network else ""
        mine = {layer.name.removeprefix(start) for layer in self.neurons}
        groups = [group for group in self._groups if group.name in mine]
        found = channel_costs(self._model.get_submodule(self._network), groups, self._inputs, cost=cost)
        return {start + name: value for name, value in found.items()}

    def cut(
        self,
        keep: Mapping[str, Tensor],
        *,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        copies: Iterable[nn.Module] = (),
    ) -> Kept:
        """Take channels out of the network: `keep` masks the dense network's channels, by name.

        Returns:
            By tensor and dimension the positions that stayed.

        Raises:
            ValueError: As `cut`; the network is as it was then.
        """
        start = f"{self._network}." if self._network else ""
        here = {name.removeprefix(start): mask.cpu()[self.keep[name]] for name, mask in keep.items()}
        here = {name: mask for name, mask in here.items() if not bool(mask.all())}
        groups = self._groups.prefixed(self._network)
        sliced = {start + name: mask for name, mask in here.items()}
        kept = positions_kept(groups, sliced, named_tensors(self._model))
        cut(
            self._model.get_submodule(self._network),
            self._inputs,
            keep={name: mask.nonzero().squeeze(1) for name, mask in here.items()},
            groups=self._groups,
            optimizers=optimizers,
            copies=parts_of(copies, self._network),
            owner=self._model,
        )
        self._groups = thinned(self._groups, here)
        self.keep = {name: keep[name].cpu() if name in keep else mask for name, mask in self.keep.items()}
        self._find()
        return kept
