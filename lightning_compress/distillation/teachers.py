"""The frozen networks that a student learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only


class Teachers:
    """Run networks without gradients, in evaluation mode and in their own dtype.

    A copy shares the networks, for they don't change.

    Args:
        networks: One, or the members of an ensemble.
        roots: What the networks are submodules of, for the names of layers; None: the networks themselves.
        train_bn: Whether their batch norms use the statistics of the batch, as in training.
        autocast: Whether an autocast that is on (bf16-mixed) holds for them too.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
        >>> teachers = Teachers([network])
        >>> (logits,) = teachers((torch.ones(4, 2),), {})
        >>> logits.requires_grad, network.training
        (False, False)
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        roots: Sequence[nn.Module] | None = None,
        train_bn: bool = False,
        autocast: bool = False,
    ) -> None:
        self.networks = list(networks)
        self.roots = self.networks if roots is None else list(roots)
        self.train_bn = train_bn
        self.autocast = autocast
        self._dtypes = [_dtype(network) for network in self.networks]
        for network in self.networks:
            self._settle(network)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        return self

    def to(self, device: torch.device | str) -> None:
        """Move the networks."""
        for network in self.networks:
            network.to(device)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return what each network returns for these arguments."""
        outputs = []
        with torch.no_grad():
            for network, dtype in zip(self.networks, self._dtypes, strict=True):
                if network.training:  # whoever did that did not mean it
                    self._settle(network)
                taken, named = (args, dict(kwargs)) if dtype is None else _cast((args, dict(kwargs)), dtype)
                with torch.autocast(_device(network), enabled=False) if not self.autocast else nullcontext():
                    outputs.append(network(*taken, **named))
        return outputs

    def _settle(self, network: nn.Module) -> None:
        network.eval()
        if self.train_bn:
            for module in network.modules():
                if isinstance(module, _BatchNorm):
                    module.train()


def _dtype(network: nn.Module) -> torch.dtype | None:
    return next((one.dtype for one in network.parameters() if one.is_floating_point()), None)


def _device(network: nn.Module) -> str:
    return next((one.device.type for one in network.parameters()), "cpu")


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, arguments)
