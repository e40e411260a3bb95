"""Statistics of batch norms for each width of a network, and their scales and shifts where a width has its own.

width_norms.0_5.layer1.0.bn1.running_mean     of "layer1.0.bn1", in the network of width 0.5
layer1.0.bn1.running_mean                     of the full network, where they have always been
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroups

NORMS = "width_norms"  # name of the child
Norms = Literal["private", "statistics", "recalibrate"]
Held = Mapping[float, Mapping[str, Mapping[str, Tensor]]]  # by width, path of the norm, and name of the tensor


class WidthNorms(nn.Module):
    """What norms hold for each width below 1.0, as the child `width_norms` of a network.

    It returns what it is called with, so that a network that runs its children one after another stays as it was.

    Args:
        widths: Ascending; the last is 1.0.
        norms: "private": statistics, scale and shift per width; "statistics": statistics per width; "recalibrate":
            statistics per width, which training does not track.
        held: The tensors: statistics become buffers, and the others parameters.
        groups: The network's channel groups; None: not known (yet).

    Attributes:
        widths: As given.
        norms: As given.
        groups: The groups; it keeps them without their checker.
    """

    def __init__(self, widths: Iterable[float], norms: Norms, held: Held, groups: ChannelGroups | None = None) -> None:
        super().__init__()
        if norms not in get_args(Norms):
            raise ValueError(f"norms is one of {', '.join(get_args(Norms))}; got {norms!r}.")
        self.widths = tuple(widths)
        self.norms: Norms = norms
        self.groups = None if groups is None else ChannelGroups(groups)
        self._kept: dict[Any, Any] = {}  # thin networks, which no copy or pickle takes along
        self._paths: dict[float, tuple[str, ...]] = {}
        for width, tensors in held.items():
            self.put(width, tensors)

    def put(self, width: float, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hold the norms of a width, in place of those that it had."""
        tree = nn.Module()
        for path, tensors in held.items():
            module = tree
            for part in path.split(".") if path else ():
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            for name, tensor in tensors.items():
                if name in STATISTICS:
                    module.register_buffer(name, tensor)
                else:
                    module.register_parameter(name, nn.Parameter(tensor.detach()))
        self._modules.pop(key_of(width), None)
        self.add_module(key_of(width), tree)
        self._paths[width] = tuple(held)

    def of(self, width: float) -> Mapping[str, nn.Module]:
        """Return what norms hold at a width, by their paths in the network; nothing for the full network."""
        paths = self._paths.get(width, ())
        tree = self._modules.get(key_of(width))
        return {} if tree is None else {path: tree.get_submodule(path) for path in paths}

    def forward(self, unchanged: Tensor) -> Tensor:
        return unchanged

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}, "_compiled_call_impl": None}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def key_of(width: float) -> str:
    """Return the name of a width's child.

    Example:
        >>> key_of(0.25)
        '0_25'
    """
    return f"{width:g}".replace(".", "_")


def give_norms(network: nn.Module, groups: ChannelGroups, widths: Iterable[float], norms: Norms) -> WidthNorms:
    """Give a network norms for each width: slices of its own, as the child `width_norms`.

    Args:
        network: Changed in place: it gets the child, and nothing else.
        groups: Of this network, as `channel_groups` returns them.
        widths: As `checked_widths` returns them.
        norms: As for `WidthNorms`.

    Raises:
        ValueError: The network has something else of this name; the network stays as it was.
    """
    raise NotImplementedError


def norms_of(network: nn.Module) -> WidthNorms | None:
    """Return the norms of a network's widths; None if it has no widths."""
    found = network._modules.get(NORMS)
    return found if isinstance(found, WidthNorms) else None


def take_norms(network: nn.Module) -> None:
    """Take the norms of its widths away from a network, which is then as before `give_norms`."""
    network._modules.pop(NORMS, None)
