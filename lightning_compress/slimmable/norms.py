"""Statistics of batch norms for each width of a network, and their scales and shifts where a width has its own.

width_norms.0_5.layer1.0.bn1.running_mean     of "layer1.0.bn1", in the network of width 0.5
layer1.0.bn1.running_mean                     of the full network, where they have always been
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroups, positions_kept
from lightning_compress.core.input_hooks import settle_inputs
from lightning_compress.core.recalibrate import tracks
from lightning_compress.core.structure import detach, structures
from lightning_compress.core.tensors import named_tensors, select
from lightning_compress.slimmable.widths import Width, checked_widths, counts_at, masks_of

NORMS = "width_norms"  # name of the child
KIND = "widths"  # of its record
Norms = Literal["private", "statistics", "recalibrate"]
Held = Mapping[str, Mapping[str, Tensor | None]]  # by path of the norm, and name of the tensor
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")


class WidthNorms(nn.Module):
    """What norms hold for each width below 1.0, as the child `width_norms` of a network.

    It returns what it is called with, so that a network that runs its children one after another stays as it was.

    Args:
        widths: Ascending; the last is 1.0.
        norms: "private": statistics, scale and shift per width; "statistics": statistics per width; "recalibrate":
            statistics per width, which training does not change.
        held: By width the tensors: statistics become buffers, and the others parameters.
        groups: The network's channel groups; None: not known.
        allow_inexact: Whether groups get thinner that a norm or a softmax counts.

    Attributes:
        widths: As given.
        norms: As given.
        groups: As given, without their checker.
        allow_inexact: As given.
        contiguous: As for `ThinNetwork`.

    Raises:
        ValueError: There is no such `norms`.
    """

    def __init__(
        self,
        widths: Iterable[float],
        norms: Norms,
        held: Mapping[float, Held],
        groups: ChannelGroups | None = None,
        *,
        allow_inexact: bool = False,
    ) -> None:
        super().__init__()
        if norms not in get_args(Norms):
            raise ValueError(f"norms is one of {', '.join(get_args(Norms))}; got {norms!r}.")
        self.widths = tuple(widths)
        self.norms: Norms = norms
        self.groups = None if groups is None else ChannelGroups(groups)
        self.allow_inexact = allow_inexact
        self.contiguous = False
        self._kept: dict[str, Any] = {}  # thin networks by key of a width; `slimmable.switch` makes them
        self._paths: dict[str, tuple[str, ...]] = {}
        for width, tensors in held.items():
            self.put(width, tensors)

    def put(self, width: Width, held: Held, *, persistent: bool = True) -> None:
        """Hold the norms of a width, in place of those that it had.

        Args:
            width: Any width; `widths` stays as it is.
            held: As for the constructor.
            persistent: Whether a state dict has the statistics.
        """
        tree = nn.Module()
        for path, tensors in held.items():
            module = _made(tree, path)
            for name, tensor in tensors.items():
                if name in _AFFINE:
                    grows = tensor is not None and tensor.requires_grad
                    value = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=grows)
                    module.register_parameter(name, value)
                else:
                    module.register_buffer(name, None if tensor is None else tensor.detach(), persistent=persistent)
        tree.train(self.training)
        key = key_of(width)
        self._modules.pop(key, None)
        self._kept.pop(key, None)
        self.add_module(key, tree)
        self._paths[key] = tuple(held)

    def of(self, width: Width) -> dict[str, nn.Module]:
        """Return what norms hold at a width, by their paths in the network; nothing at a width that is not known."""
        key = key_of(width)
        return {path: self.get_submodule(f"{key}.{path}".rstrip(".")) for path in self._paths.get(key, ())}

    def is_tracked(self, width: Width) -> bool:
        """Return whether training measures what the network computes at a width, for its statistics."""
        return self.norms != "recalibrate" and not isinstance(width, Mapping) and width in self.widths[:-1]

    def forward(self, unchanged: Tensor) -> Tensor:
        return unchanged

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}, "_compiled_call_impl": None}


def key_of(width: Width) -> str:
    """Return the name of a width's child.

    Example:
        >>> key_of(0.25), key_of({"layer1.conv": 0.5, "fc": 1})
        ('0_25', 'by_group fc=1_0, layer1/conv=0_5')
    """
    if not isinstance(width, Mapping):
        return f"{float(width)!r}".replace(".", "_")
    shares = (f"{name.replace('.', '/')}={key_of(share)}" for name, share in sorted(width.items()))
    return f"by_group {', '.join(shares)}"


def way_at(width: Width) -> str:
    """Return the name of the way in which a network runs at a width, as for `core.answering.way_of`.

    Example:
        >>> way_at(0.25)
        'width 0.25'
    """
    return f"width {dict(width) if isinstance(width, Mapping) else float(width)}"


def _made(tree: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    return tree


def norm_paths(network: nn.Module) -> list[str]:
    """Return the paths of the norms whose statistics depend on the width."""
    return [path for path, one in network.named_modules() if tracks(one)]


@torch.no_grad()
def sliced_norms(
    network: nn.Module, groups: ChannelGroups, counts: Mapping[str, int], *, affine: bool = False
) -> dict[str, dict[str, Tensor | None]]:
    """Return copies of what a network's norms hold, with the channels that a width keeps, as for `WidthNorms.put`.

    Args:
        network: Stays as it is.
        groups: Of the network.
        counts: By group how many of its first channels stay.
        affine: Whether to return scales and shifts, too.
    """
    tensors = named_tensors(network)
    kept = positions_kept(groups, masks_of(groups, counts), tensors)
    found: dict[str, dict[str, Tensor | None]] = {}
    for path in norm_paths(network):
        norm = network.get_submodule(path)
        tables = norm._buffers | (norm._parameters if affine else {})
        found[path] = {}
        for name, tensor in tables.items():
            dims = kept.get(f"{path}.{name}".lstrip("."), {})
            found[path][name] = None if tensor is None else _copied(tensor, dims)
    return found


def _copied(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    return select(tensor, dims).clone().requires_grad_(tensor.requires_grad)


def give_norms(
    network: nn.Module,
    groups: ChannelGroups,
    widths: Iterable[float],
    norms: Norms = "private",
    *,
    allow_inexact: bool = False,
) -> WidthNorms:
    """Give a network what its norms hold at each width: slices of what they hold now, as its child `width_norms`.

    Args:
        network: Changed in place: it gets the child, and nothing else. Widths that it had are replaced.
        groups: Of this network, as `channel_groups` returns them.
        widths: Above 0 and at most 1, in any order; 1.0 is added.
        norms: As for `WidthNorms`.
        allow_inexact: As for `counts_at`.

    Returns:
        The child.

    Raises:
        ValueError: The widths are wrong, no group may be cut, or the network has something else of this name; the
            network is then as it was.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = give_norms(net, channel_groups(net, torch.zeros(2, 3)), [0.5])
        >>> [name for name, _ in found.named_parameters()], found.of(0.5)["1"].running_var.shape
        (['0_5.1.weight', '0_5.1.bias'], torch.Size([4]))
    """
    if norms_of(network) is None and hasattr(network, NORMS):
        raise ValueError(f"{type(network).__name__} has a {NORMS} of its own already: rename yours.")
    before = network._modules.pop(NORMS, None)
    try:
        ascending = checked_widths(widths, groups if groups.free(inexact=allow_inexact) else None)
        held = {
            width: sliced_norms(
                network,
                groups,
                counts_at(groups, width, allow_inexact=allow_inexact),
                affine=norms == "private",
            )
            for width in ascending[:-1]
        }
        found = WidthNorms(ascending, norms, held, groups, allow_inexact=allow_inexact)
    except BaseException:
        if before is not None:
            network.add_module(NORMS, before)
        raise
    network.add_module(NORMS, found.train(network.training))
    return found


def norms_of(network: nn.Module) -> WidthNorms | None:
    """Return the norms of a network's widths; None if it has no widths."""
    found = network._modules.get(NORMS)
    return found if isinstance(found, WidthNorms) else None


def norms_or_raise(network: nn.Module) -> WidthNorms:
    """Return the norms of a network's widths.

    Raises:
        ValueError: It has no widths.
    """
    found = norms_of(network)
    if found is None:
        raise ValueError(
            f"{type(network).__name__} has no widths: wrap its module in SlimmableWidth, or call give_norms(network, "
            f"channel_groups(network, example_inputs), widths) first."
        )
    return found


def take_norms(network: nn.Module) -> None:
    """Take its widths away from a network, with their record; it is then as before `give_norms`."""
    settle_inputs(network, "")
    network._modules.pop(NORMS, None)
    for one in structures(network):
        if one.kind == KIND:
            detach(network, one)
