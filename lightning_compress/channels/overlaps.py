"""Compare channel groups with each other: which overlap, which are alike, and which can be cut together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_compress.channels.groups import ChannelGroup


def compatible(groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return those of overlapping groups that can be cut in any combination, finer ones first."""
    chosen: list[ChannelGroup] = []
    for group in sorted(groups, key=lambda one: -one.size):
        if all(_crosses(group, other) for other in chosen):
            chosen.append(group)
    return chosen


def _crosses(a: ChannelGroup, b: ChannelGroup) -> bool:
    """Return whether two groups are disjoint, or the rows and the columns of the same positions."""
    others = {(one.tensor, one.dim): one for one in b.members}
    for one in a.members:
        other = others.get((one.tensor, one.dim))
        if other is None:
            continue
        size = int(max(one.index.max(), other.index.max())) + 1
        row, column = torch.full((size,), -1), torch.full((size,), -1)
        row[one.index] = torch.arange(a.size)[:, None].expand_as(one.index)
        column[other.index] = torch.arange(b.size)[:, None].expand_as(other.index)
        if not bool(((row >= 0) & (column >= 0)).any()):
            continue
        if not torch.equal(row >= 0, column >= 0):
            return False
        both = (row * b.size + column)[row >= 0].bincount(minlength=a.size * b.size)
        if int(both.min()) == 0 or int(both.min()) != int(both.max()):
            return False
    return True


def overlap(a: ChannelGroup, b: ChannelGroup) -> bool:
    """Return whether two groups have a position of a tensor in common."""
    others = {(one.tensor, one.dim): one.index for one in b.members}
    return any(
        bool(torch.isin(one.index, others[one.tensor, one.dim]).any())
        for one in a.members
        if (one.tensor, one.dim) in others
    )


def needed_to_cover(frozen: Sequence[ChannelGroup], free: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the frozen groups that cover slices which no other group covers, larger ones first."""
    found: list[ChannelGroup] = []
    covered = {place for group in free for place in _made(group)}
    for group in sorted(frozen, key=lambda one: -one.size):
        if not _made(group) <= covered:
            found.append(group)
            covered |= _made(group)
    return found


def _made(group: ChannelGroup) -> set[tuple[str, int, int]]:
    """Return all positions of the slices that produce a group's channels."""
    makers = (one for one in group.members if one.produces)
    return {(one.tensor, one.dim, at) for one in makers for at in one.index.reshape(-1).tolist()}


def kinds_of(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Sort groups by kind: those of one kind have tensors of the same names and shapes, in other blocks."""
    kinds: dict[tuple[object, ...], list[ChannelGroup]] = {}
    for group in groups:
        kinds.setdefault(kind_of(group), []).append(group)
    return list(kinds.values())


def kind_of(group: ChannelGroup) -> tuple[object, ...]:
    """Return the kind of a group: its tensors' names without numbers, and the shapes of its slices."""
    slices = (("".join(x for x in one.tensor if not x.isdigit()), one.dim, one.index.shape) for one in group.members)
    return group.size, *slices
