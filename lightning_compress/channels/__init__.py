"""Channel groups: which slices of which tensors must leave together, and the checked cut."""

from __future__ import annotations

from lightning_compress.channels.cut import cut, shrink
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroup, ChannelGroups, Member

__all__ = ["ChannelGroup", "ChannelGroups", "Member", "channel_groups", "cut", "shrink"]
