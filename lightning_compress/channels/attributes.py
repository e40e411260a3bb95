"""Numbers that a module's own code reads, such as its number of heads, and that must change when channels are cut.

A trial tries an attribute of one of these names if its value is the number of channels, or the length of the dimension
that is cut. The attribute becomes a part of the group only if the thin network then agrees with the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_compress.channels.groups import Attribute, ChannelGroup

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "num_key_value_heads")
_HEAD_WIDTHS = (
    *("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "d_kv"),
    *("key_dim", "qk_dim", "v_dim", "value_dim"),
)
_INNER_WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim", "attention_dim", "proj_dim")
_WIDTHS = (
    *_INNER_WIDTHS,
    *("embed_dim", "hidden_size", "hidden_dim", "intermediate_size", "d_model", "dim", "width", "in_dim", "out_dim"),
    *("channels", "num_channels", "in_channels", "out_channels", "in_features", "out_features", "num_features"),
)

# All attributes that a cut changes. A record that comes with a file may set no others.
MAY_CHANGE = frozenset(
    (*_HEADS, *_HEAD_WIDTHS, *_WIDTHS, "groups", "num_groups", "num_channels", "num_features", "normalized_shape")
)

# sets of names that a trial tries, one after the other
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    _HEADS,
    (*_HEADS, *_INNER_WIDTHS),
    _HEAD_WIDTHS,
    (*_HEAD_WIDTHS, *_INNER_WIDTHS),
    _INNER_WIDTHS,
    _WIDTHS,
)


def with_attributes(group: ChannelGroup, model: nn.Module, names: Sequence[str]) -> ChannelGroup:
    """Add the attributes of some names that count the group's channels, or all positions of one of its dimensions."""
    if not names:
        return group
    modules = dict(model.named_modules(remove_duplicate=False))
    known = {(one.module, one.name) for one in group.attributes}
    added: dict[tuple[str, str], Attribute] = {}
    for member in group.members:
        own = member.tensor.rpartition(".")[0]
        parent = own.rpartition(".")[0]
        for owner in dict.fromkeys((own, parent, parent.rpartition(".")[0])):
            for name in names:
                value = vars(modules[owner]).get(name)
                if not isinstance(value, int) or isinstance(value, bool) or (owner, name) in known:
                    continue
                if value == group.size and (name in _HEADS + _HEAD_WIDTHS or value == member.index.numel()):
                    added.setdefault((owner, name), Attribute(owner, name, None, torch.arange(group.size)[:, None]))
                elif name in _WIDTHS and value == member.index.numel():
                    added.setdefault((owner, name), Attribute(owner, name, None, member.index))
    return replace(group, attributes=(*group.attributes, *added.values())) if added else group
