"""Which channels of a network a width keeps: the first of every free group.

width 0.25    of a group of 30 channels: the first ceil(7.5) = 8
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroup, ChannelGroups
from lightning_compress.channels.removal import take
from lightning_compress.channels.slicing import Slices
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.given import real_number
from lightning_compress.measure.macs import count_macs

Width = float | Mapping[str, float]  # of every free group, or by group name; a group that is not named stays whole
_ROUNDING = 1e-9  # 0.7 * 10 is a little more than 7
_SHOWN = 4  # reasons in one message


def checked_widths(widths: Iterable[float], groups: ChannelGroups | None = None) -> tuple[float, ...]:
    """Return widths ascending, with 1.0 as the last one, which is added if it is missing.

    Args:
        widths: In any order.
        groups: If given, no two widths may keep the same channels of all groups.

    Raises:
        ValueError: A width is outside (0, 1] or doubled, or two keep the same channels.

    Example:
        >>> checked_widths([0.5, 0.25])
        (0.25, 0.5, 1.0)
    """
    found = [_checked(width, "widths") for width in widths]
    twice = next((width for width in found if found.count(width) > 1), None)
    if twice is not None:
        raise ValueError(f"widths has {twice:g} twice: name each width once.")
    ascending = tuple(sorted({*found, 1.0}))
    if groups is None or len(ascending) == 1:
        return ascending
    every = [counts_at(groups, width, allow_inexact=True) for width in ascending]
    for i in range(1, len(every)):
        if every[i] == every[i - 1]:
            largest = max(group.size for group in groups.free(inexact=True))
            raise ValueError(
                f"The widths {ascending[i - 1]:g} and {ascending[i]:g} keep the same channels, since the largest group "
                f"has {largest}: leave one of them out."
            )
    return ascending


def free_groups(groups: ChannelGroups, *, allow_inexact: bool = False) -> list[ChannelGroup]:
    """Return the groups that a width makes thinner.

    Raises:
        ValueError: There is none; the message has the reasons.
    """
    free = groups.free(inexact=allow_inexact)
    if free:
        return free
    inexact = groups.free(inexact=True)
    if inexact:
        raise ValueError(
            f"Without some channels the network is not what it is with zeros in their place, because {inexact[0].note} "
            f"({_named(inexact)}): pass allow_inexact=True to make these groups thinner nevertheless."
        )
    if not groups:
        raise ValueError("The network has no channels that could leave: it has one width.")
    reasons = dict.fromkeys(f"{group.name}: {group.frozen}" for group in groups)
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    raise ValueError(
        f"No channel of the network may leave, so that it has one width. {'; '.join(list(reasons)[:_SHOWN])}{more}."
    )


def counts_at(groups: ChannelGroups, width: Width, *, allow_inexact: bool = False) -> dict[str, int]:
    """Return by free group how many of its first channels a width keeps: ceil(width * size).

    Args:
        groups: Of a network.
        width: Of every free group, or by group name.
        allow_inexact: Whether groups get thinner that a norm or a softmax counts.

    Raises:
        ValueError: A width is outside (0, 1], a named group may not be cut, or no group may.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> groups = channel_groups(net, torch.zeros(2, 3))
        >>> counts_at(groups, 0.25), counts_at(groups, {"2": 0.7})
        ({'0': 8, '2': 3}, {'0': 30, '2': 7})
    """
    free = free_groups(groups, allow_inexact=allow_inexact)
    if isinstance(width, Mapping):
        _check_names(groups, free, width)
        shares = {name: _checked(share, f"The width of {name!r}") for name, share in width.items()}
    else:
        shares = dict.fromkeys((group.name for group in free), _checked(width, "width"))
    return {group.name: max(1, math.ceil(shares.get(group.name, 1.0) * group.size - _ROUNDING)) for group in free}


def masks_of(groups: ChannelGroups, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return by group a mask of its first channels, for the groups that lose some.

    Raises:
        ValueError: There is no such group, or it has fewer channels, or none would stay.
    """
    sizes = {group.name: group.size for group in groups}
    for name, count in counts.items():
        if name not in sizes:
            raise ValueError(f"There is no channel group {name!r}; there are {', '.join(map(repr, sizes))}.")
        if not 1 <= count <= sizes[name]:
            raise ValueError(f"{name!r} has {sizes[name]} channels, of which 1 to {sizes[name]} stay; got {count}.")
    return {name: torch.arange(sizes[name]) < count for name, count in counts.items() if count < sizes[name]}


def _checked(width: float, what: str) -> float:
    return real_number(width, f"{what} must be above 0 and at most 1, which is the full network", above=0, most=1)


def _check_names(groups: ChannelGroups, free: list[ChannelGroup], width: Mapping[str, float]) -> None:
    known = {group.name: group for group in groups}
    for name in width:
        if name not in known:
            raise ValueError(f"There is no channel group {name!r}; there are {_named(free)}.")
        group = known[name]
        if group.frozen is not None and width[name] != 1.0:
            raise ValueError(f"{name!r} keeps all its channels: {group.frozen}.")
        if group not in free and width[name] != 1.0:
            raise ValueError(f"A smaller {name!r} changes the function, because {group.note}: pass allow_inexact=True.")


def _named(groups: list[ChannelGroup]) -> str:
    return ", ".join(repr(group.name) for group in groups)


@dataclass(frozen=True)
class Shrinkable:
    """How much of a network a width can make smaller.

    Attributes:
        share: Of the multiply-accumulates, those that are gone if each group has one channel.
        frozen: By group that keeps all its channels the reason.
        inexact: By group that keeps them unless asked for, because a norm or a softmax counts them, the reason.
    """

    share: float
    frozen: Mapping[str, str]
    inexact: Mapping[str, str]

    def __str__(self) -> str:
        kept = {**self.frozen, **self.inexact}
        some = "; ".join(f"{name}: {why}" for name, why in list(kept.items())[:_SHOWN])
        more = f"; and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
        return f"{self.share:.0%} of the multiply-accumulates can shrink." + (
            f" These stay: {some}{more}." if kept else ""
        )


def shrinkable(
    network: nn.Module, groups: ChannelGroups, example_inputs: ExampleInputs, *, allow_inexact: bool = False
) -> Shrinkable:
    """Return the share of a network's multiply-accumulates that can shrink, and what can't, with the reasons.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> print(shrinkable(net, channel_groups(net, torch.zeros(2, 3)), torch.zeros(2, 3)))
        88% of the multiply-accumulates can shrink. These stay: 2: it is an output of the network.
    """
    free = groups.free(inexact=allow_inexact)
    slices = Slices()
    with evaluating(network):
        full = count_macs(network, example_inputs)[0]
        try:
            take(slices, network, [(group, torch.arange(1, group.size)) for group in free if group.size > 1])
            least = count_macs(network, example_inputs)[0]
        finally:
            slices.undo()
    return Shrinkable(
        1 - least / full if full else 0.0,
        {group.name: group.frozen for group in groups if group.frozen is not None},
        {group.name: group.note or "" for group in groups if group.frozen is None and group not in free},
    )
