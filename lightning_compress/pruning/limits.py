"""Warnings about tensors that pruning has emptied, and about limits that kept entries or channels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor


def warn_of_thin_layers(
    masks: Mapping[str, Tensor], least: Mapping[str, int], min_left: float, warned: set[str]
) -> None:
    """Warn once of every tensor that is empty, and of every tensor that has no more entries left than `least`.

    Args:
        masks: The masks in force (True stays), by parameter name.
        least: The number of entries of each tensor that `min_left` protects; empty if the setting does not apply.
        min_left: The setting.
        warned: Names of tensors of which a warning was given before; new ones are added.
    """
    counts = {name: int(mask.sum()) for name, mask in masks.items() if name not in warned}
    emptied = [name for name, count in counts.items() if count == 0]
    thin = [name for name, count in counts.items() if 0 < count <= least.get(name, 0)]
    warned |= {*emptied, *thin}
    if emptied:
        warnings.warn(f"Every entry of {', '.join(emptied)} is pruned: nothing passes through it.", stacklevel=3)
    if thin:
        warnings.warn(
            f"min_left={min_left} keeps the last entries of {', '.join(thin)}, the smallest weights of all: with "
            f"scope='global' nothing would be left there. scope='layer' prunes all layers alike.",
            stacklevel=3,
        )


def warn_of_rounding(keep: Mapping[str, Tensor], amount: float, round_to: int) -> None:
    """Warn if fewer channels than `amount` asks for have been pruned, because widths are multiples of `round_to`.

    Args:
        keep: By group the channels that stay (True).
        amount: Fraction of the channels that should be pruned.
        round_to: The setting.
    """
    total = sum(mask.numel() for mask in keep.values())
    removed = total - sum(int(mask.sum()) for mask in keep.values())
    if round_to > 1 and removed < round(amount * total):
        warnings.warn(
            f"round_to={round_to} rounds widths up: {removed} of {total} channels are pruned, where amount={amount} "
            f"asks for {round(amount * total)}. Use a smaller round_to.",
            stacklevel=3,
        )
