"""Switch a network to another width, in place, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Width = float | Mapping[str, float]


def set_width(
    network: nn.Module, width: Width, *, norms: Mapping[str, nn.Module] | None = None, allow_inexact: bool = False
) -> None:
    """Have a network run at a width from now on; 1.0: as it is.

    Args:
        network: Has `width_norms` (see `give_norms`), whose groups are known.
        width: Of every free group, or by group name.
        norms: Statistics for a width that has none, by path of the norm.
        allow_inexact: Whether groups get thinner that a norm or a softmax counts.

    Raises:
        ValueError: The network has no widths, or the width has no statistics; the network stays as it was.
    """
    raise NotImplementedError


def width_of(network: nn.Module) -> Width:
    """Return the width at which a network runs now."""
    raise NotImplementedError


def thin_of(network: nn.Module, width: Width, *, norms: Mapping[str, nn.Module] | None = None) -> Any:
    """Return the thin network of a width, which is kept, and made when it is first asked for."""
    raise NotImplementedError
