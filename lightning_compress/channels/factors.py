"""Buffers that multiply a channel do not produce it: where the channel is zero, the product is zero too.

    relu(z) * mask           it is zero where z is
    x * scale + shift        it is zero where x and shift are; with scale = w * rsqrt(v) and shift = b - m * scale,
                             where x, w and b are

The graph ties the buffers to the channel in both cases, so a trial finds those that have to be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_compress.channels.groups import ChannelGroup
from lightning_compress.core.tensors import named_tensors

ErrorOf = Callable[[Sequence[ChannelGroup]], str | None]


def without_factors(
    groups: Sequence[ChannelGroup], model: nn.Module, parameters: Collection[str], error_of: ErrorOf
) -> list[ChannelGroup]:
    """Return the groups, in which buffers that need not be zero for a channel to be zero do not produce it.

    Args:
        groups: Groups that survive a cut together.
        model: The network, in the sandbox.
        parameters: The names of its parameters.
        error_of: Returns the error when some groups are cut, compared with zeros in all slices that produce them.
    """

    def buffers_of(group: ChannelGroup) -> list[str]:
        return [one.tensor for one in group.members if one.produces and one.tensor not in parameters]

    concerned = [group for group in groups if buffers_of(group)]
    if not concerned:
        return list(groups)
    tensors = named_tensors(model)
    before = {name: tensors[name].clone() for group in concerned for name in buffers_of(group)}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, value in before.items():  # a shift that happens to be zero would hide that it has to be
            values = torch.rand(value.shape, generator=generator, dtype=torch.float64).add_(0.5)
            if not bool((value.real > 0).all()):  # a variance stays positive
                values *= torch.rand(value.shape, generator=generator, dtype=torch.float64).sub_(0.5).sign_()
            tensors[name].copy_(values)
        found = concerned
        if error_of(found) is None:
            everything = _consuming(found, before)
            if error_of(everything) is None:
                found = everything
            else:
                lasts = {name.rpartition(".")[2] for name in before}
                for last in sorted(lasts, key=lambda name: (name in ("weight", "bias"), name)):
                    found = _dropped(found, {name for name in before if name.rpartition(".")[2] == last}, error_of)
    finally:
        for name, value in before.items():
            tensors[name].copy_(value)
    changed = dict(zip(map(id, concerned), found, strict=True))
    return [changed.get(id(group), group) for group in groups]


def _dropped(groups: list[ChannelGroup], names: Collection[str], error_of: ErrorOf) -> list[ChannelGroup]:
    """Make buffers of some names no producers: all of them, or else each one with which the trial finds no error."""
    together = _consuming(groups, names)
    if error_of(together) is None:
        return together
    if len(names) == 1:
        return groups
    for name in sorted(names):
        groups = _dropped(groups, {name}, error_of)
    return groups


def _consuming(groups: Sequence[ChannelGroup], names: Collection[str]) -> list[ChannelGroup]:
    def changed(group: ChannelGroup) -> ChannelGroup:
        members = (replace(one, produces=one.produces and one.tensor not in names) for one in group.members)
        return replace(group, members=tuple(members))

    return [changed(group) for group in groups]
