"""Parameters with masks in force: the module holds m * w, and the masks may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.swap import Projection
from lightning_compress.pruning.groups import Neurons
from lightning_compress.pruning.masks import expand


class MaskedParameters:
    """Keeps the parameters of a model at m * w, in place and under their own names.

    Args:
        model: The module that the names are relative to.
        neurons: The layers' channels, where masks are over channels; None where they are over single entries.
        regrow: Whether masked entries keep a latent value that goes on training.

    Attributes:
        keep: What stays (True), per parameter entry or, with neurons, per channel; None before the first mask.
        masks: The masks over parameters that follow from it, by parameter name.
        projection: What holds the module at m * w around optimizer steps; None before the first mask.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, -2.0, 3.0]])
        >>> masked = MaskedParameters(layer)
        >>> masked.set({"weight": torch.tensor([[True, False, True]])})
        >>> layer.weight.data
        tensor([[1., -0., 3.]])
    """

    def __init__(self, model: nn.Module, *, neurons: Sequence[Neurons] | None = None, regrow: bool = False) -> None:
        self._parameters = dict(model.named_parameters()) | dict(model.named_buffers())  # of frozen norms, for one
        self._neurons = neurons
        self._regrow = regrow
        self.keep: dict[str, Tensor] | None = None
        self.masks: dict[str, Tensor] = {}
        self.projection: Projection | None = None
        self._factors: dict[str, Tensor] = {}

    @property
    def latent(self) -> dict[str, Tensor]:
        """What the optimizer trains behind the masks, by parameter name; empty without `regrow`."""
        return {} if self.projection is None else self.projection.latent

    def value(self, name: str) -> Tensor:
        """Return the latent value of a parameter, or the parameter where it has none."""
        return self.latent.get(name, self._parameters[name].detach())

    def set(self, keep: Mapping[str, Tensor] | None, *, latent: Mapping[str, Tensor] | None = None) -> None:
        """Put masks in force.

        Args:
            keep: What stays, as `self.keep`; None takes all masks away.
            latent: Latent values from a checkpoint or an earlier moment; by default those of now go on.
        """
        if keep is None:
            self.keep, self.masks, self.projection = None, {}, None
            return
        self.keep = {name: mask.to(self._device_of(name)) for name, mask in keep.items()}
        self.masks = self.keep if self._neurons is None else expand(self._neurons, self.keep, self._parameters)
        # Multiplying by a mask of floats takes a tenth of the time of a boolean one.
        self._factors = {name: mask.to(self._parameters[name].dtype) for name, mask in self.masks.items()}
        if self.projection is None or latent is not None:
            masked: Any = {name: self._parameters[name] for name in self.masks}  # no optimizer steps the buffers
            self.projection = Projection(masked, self._multiply, keep_latent=self._regrow)
            self.projection.load_latent(latent or {})
        self.projection.project()

    def check_masked(self, masks: Mapping[str, Tensor]) -> None:
        """Raise a ValueError if the parameters are not those that the masks were made for.

        Behind a mask of an earlier fit every weight is zero; anything else was trained or loaded since.
        """
        for name, mask in masks.items():
            parameter = self._parameters[name].detach()
            if parameter.shape != mask.shape:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, and an earlier fit with this callback ended with "
                    f"{tuple(mask.shape)}, because channels had left. Load that network, or make a new callback."
                )
            if bool(parameter[~mask.to(parameter.device)].any()):
                raise ValueError(
                    f"{name} has weights where an earlier fit with this callback has pruned them. To prune this "
                    f"network from the beginning, make a new callback."
                )

    def mask_gradients(self) -> None:
        """Zero the gradients of what is masked."""
        for name, factor in self._factors.items():
            gradient = self._parameters[name].grad
            if gradient is not None:
                gradient.mul_(factor)

    def mask_copy(self, model: nn.Module) -> None:
        """Mask another module with the same parameter names, or some of them, such as an average of this one."""
        copies = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, mask in self.masks.items():
            if name not in copies:
                continue
            copies[name].data.mul_(mask.to(copies[name]))

    def _multiply(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:  # an optimizer may step none of them
            torch._foreach_mul_(list(tensors.values()), [self._factors[name] for name in tensors])

    def _device_of(self, name: str) -> torch.device:
        parameter = self._parameters.get(name)  # a layer's name, with neurons
        return next(iter(self._parameters.values())).device if parameter is None else parameter.device
