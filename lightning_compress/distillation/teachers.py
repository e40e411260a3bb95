"""The frozen networks that a student learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
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
        self._device = "cpu"
        self._dtypes = [_dtype(network) for network in self.networks]
        for network in self.networks:
            self._settle(network)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        return self

    def to(self, device: torch.device | str) -> None:
        """Move the networks, and see to their mode."""
        self._device = torch.device(device).type
        for root in self.roots:
            root.to(device)
            self._settle(root)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return what each network returns for these arguments."""
        outputs = []
        with torch.no_grad():
            for network, dtype in zip(self.networks, self._dtypes, strict=True):
                if network.training:  # whoever did that did not mean it
                    self._settle(network)
                versions = [(one, one._version) for one in (*args, *kwargs.values()) if _is_tracked(one)]
                taken = [_cast(one, dtype) for one in args]
                named = {name: _cast(one, dtype) for name, one in kwargs.items()}
                with nullcontext() if self.autocast else _without_autocast(self._device):
                    outputs.append(network(*taken, **named))
                if any(one._version != version for one, version in versions):
                    raise ValueError(
                        f"The teacher {type(network).__name__} changes its inputs in place, which are the student's "
                        f"too: pass a module that gives it a copy (x.clone())."
                    )
        return outputs

    def _settle(self, network: nn.Module) -> None:
        network.eval()
        if self.train_bn:
            for module in network.modules():
                if isinstance(module, _BatchNorm):
                    module.train()


def _dtype(network: nn.Module) -> torch.dtype | None:
    return next((one.dtype for one in network.parameters() if one.is_floating_point()), None)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _is_tracked(argument: Any) -> bool:
    return isinstance(argument, Tensor) and not argument.is_inference()


def _cast(argument: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(argument, Tensor):  # as nearly always
        return argument.to(dtype) if argument.is_floating_point() else argument
    return tree_map_only(Tensor, lambda one: _cast(one, dtype), argument)
