"""Parameters under masks: the module holds w where the mask is True and 0 elsewhere, and the masks may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.masking import bit_mask, keep_
from lightning_compress.core.projection import Projection
from lightning_compress.pruning.channels import Channels, channel_sums
from lightning_compress.pruning.masks import expand


class MaskedParameters:
    """Keeps masked entries of a model's parameters at zero, in place and under the parameters' own names.

    Args:
        model: The module that the names are relative to.
        channels: The channels, if masks are over channels; None if they are over single entries.
        regrow: Whether masked entries keep a latent value that trains on.

    Attributes:
        keep: The masks (True stays) over entries, by parameter, or over channels, by group; None before the first mask.
        masks: The masks over entries that follow from `keep`, by parameter name.
        projection: The projection that masks the module around optimizer steps; None before the first mask.
        frozen: Values of masked entries that are not zero, by parameter name, with zeros for the others.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, -2.0, 3.0]])
        >>> masked = MaskedParameters(layer)
        >>> masked.set({"weight": torch.tensor([[True, False, True]])})
        >>> layer.weight.data
        tensor([[1., 0., 3.]])
    """

    def __init__(self, model: nn.Module, *, channels: Sequence[Channels] | None = None, regrow: bool = False) -> None:
        self._parameters = dict(model.named_parameters()) | dict(model.named_buffers())  # such as those of frozen norms
        self._channels = channels
        self._regrow = regrow
        self.keep: dict[str, Tensor] | None = None
        self.masks: dict[str, Tensor] = {}
        self.projection: Projection | None = None
        self.frozen: dict[str, Tensor] = {}
        self._bits: dict[str, Tensor] = {}

    @property
    def latent(self) -> dict[str, Tensor]:
        """The latent values that the optimizer trains behind the masks, by parameter name; empty without `regrow`."""
        return {} if self.projection is None else self.projection.latent

    def value(self, name: str) -> Tensor:
        """Return the latent value of a parameter, or the parameter where it has none."""
        return self.latent.get(name, self._parameters[name].detach())

    def set(self, keep: Mapping[str, Tensor] | None, *, latent: Mapping[str, Tensor] | None = None) -> None:
        """Put masks in force.

        Args:
            keep: The masks, as `self.keep`; None removes all masks.
            latent: Latent values from a checkpoint or an earlier moment; by default the present ones stay.
        """
        if keep is None:
            self.keep, self.masks, self.projection, self._bits = None, {}, None, {}
            return
        if self.projection is not None and latent is None:
            self.projection.take_writes()  # before the masks change with which the module was written
        self._bits = {}  # frees the old bits before the new ones are made
        self.keep = {name: mask.to(self._device_of(name)) for name, mask in keep.items()}
        self.masks = self.keep if self._channels is None else expand(self._channels, self.keep, self._parameters)
        self._bits = {name: bit_mask(mask, self._parameters[name].dtype) for name, mask in self.masks.items()}
        if self.projection is None or latent is not None:
            masked: Any = {name: self._parameters[name] for name in self.masks}  # buffers too, which no optimizer steps
            self.projection = Projection(masked, self._zero, keep_latent=self._regrow)
            self.projection.load_latent(latent or {})
        self.projection.rewrite()

    def check_masked(self, masks: Mapping[str, Tensor]) -> None:
        """Raise a ValueError if the parameters are not those that the masks were made for.

        Masked weights of an earlier fit are zero, or frozen; others have been trained or loaded since.
        """
        for name, mask in masks.items():
            parameter = self._parameters[name].detach()
            if parameter.shape != mask.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, and an earlier fit with this callback ended with "
                    f"{tuple(mask.shape)}, because channels had left. Load that network, or make a new callback."
                )
            gone = ~mask.to(parameter.device)
            expected = self.frozen[name].to(parameter.device)[gone] if name in self.frozen else 0.0
            if bool((parameter[gone] != expected).any()):
                raise ValueError(
                    f"{name} has weights where an earlier fit with this callback has pruned them. To prune this "
                    f"network from the beginning, make a new callback."
                )

    def count_zeros(self) -> dict[str, int]:
        """Count the entries of each parameter, or channels of each group, that are masked and zero in the module."""
        keep = self.keep or {}
        if self._channels is None:
            held = {name: self._parameters[name].detach() for name in keep}
            return {name: int(((held[name] == 0) & ~mask.to(held[name].device)).sum()) for name, mask in keep.items()}
        counts = {}
        for group in self._channels:
            if group.name in keep:
                live = keep[group.name].cpu()
                for member in group.members:
                    live = live | (channel_sums(self._parameters[member.tensor].detach() != 0, member) > 0).cpu()
                counts[group.name] = int((~live).sum())
        return counts

    def mask_gradients(self) -> None:
        """Zero the gradients of masked entries, unless they train on behind the mask.

        They must not count where clipping or an optimizer takes entries together, as in a norm.
        """
        for name, bits in self._bits.items() if not self._regrow else ():
            gradient = self._parameters[name].grad
            if gradient is not None:
                keep_(gradient, bits)

    def mask_copy(self, model: nn.Module) -> None:
        """Mask another module with the same parameter names, or some of them, such as an average of this one."""
        copies = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, mask in self.masks.items():
            if name in copies:
                copies[name].data.masked_fill_(~mask.to(copies[name].device), 0.0)
                self._freeze(name, copies[name].data)

    def _zero(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            keep_(tensor, self._bits[name])
            self._freeze(name, tensor)

    def _freeze(self, name: str, tensor: Tensor) -> None:
        if name in self.frozen:
            tensor.add_(self.frozen[name].to(tensor.device))

    def _device_of(self, name: str) -> torch.device:
        parameter = self._parameters.get(name)  # None if the name is that of a group
        return next(iter(self._parameters.values())).device if parameter is None else parameter.device
