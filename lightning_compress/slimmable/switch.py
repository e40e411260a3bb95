"""Switch a network to another width, in place, and back.

set_width(network, 0.5)     vars(network)["forward"] runs the thin network of this width, which is kept
set_width(network, 1.0)     the network's own forward answers again
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroups
from lightning_compress.core.answering import Answer, put
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.slimmable.norms import Held, key_of, norm_paths, norms_or_raise, way_at
from lightning_compress.slimmable.thin import ThinNetwork
from lightning_compress.slimmable.widths import Width, counts_at, masks_of


class Switched(Answer):
    """Answers the calls of a network at one width; a copy or pickle of the network has it, and its own thin network.

    Args:
        network: Has widths.
        width: Below 1.0.
    """

    def __init__(self, network: nn.Module, width: Width) -> None:
        self.network, self.width = network, width

    @property
    def by(self) -> nn.Module:
        return thin_of(self.network, self.width).module

    @property
    def name(self) -> str:  # type: ignore[override]  # a width does not change
        return way_at(self.width)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            raise RuntimeError(self._advice("torch.jit.trace"))
        if torch.compiler.is_exporting():
            raise RuntimeError(self._advice("torch.export"))
        return fresh(self.network, self.width).forward(*args, **kwargs)

    @property
    def __code__(self) -> Any:  # by which Lightning sees whether a module has a forward of its own
        return type(self.network).forward.__code__

    def _advice(self, who: str) -> str:
        return (
            f"{who} can't take {type(self.network).__name__} while it is switched to width {_shown(self.width)}: pass "
            f"extract(network, width, example_inputs), or call set_width(network, 1.0) first."
        )


def fresh(network: nn.Module, width: Width) -> nn.Module:
    """Return the thin network of a width with the network's present tensors, for one call."""
    if torch.compiler.is_compiling():
        found: nn.Module = _uncompiled(network, width)
        return found
    thin = thin_of(network, width)
    thin.refresh(gradients=torch.is_grad_enabled())
    return thin.module


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch.compile can't trace what looks for changes
def _uncompiled(network: nn.Module, width: Width) -> nn.Module:
    return fresh(network, width)


def set_width(network: nn.Module, width: Width, *, norms: Held | None = None) -> None:
    """Have a network run at a width from now on, until it gets another; 1.0: as a whole.

    Nothing is copied that is a view, and the thin network of each width is kept, so that a network may switch for each
    batch.

    Args:
        network: Has widths (see `give_norms`), and its groups are known.
        width: Of every free group, or by group name.
        norms: Statistics for a width that has none, as `sliced_norms` makes them and `recalibrate` computes them.

    Raises:
        ValueError: The network has no widths, or its norms have no statistics for this one. The network stays as it
            was.

    Example:
        >>> from lightning_compress.slimmable.norms import give_norms
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = give_norms(net, channel_groups(net, torch.zeros(2, 3)), [0.25, 0.5])
        >>> set_width(net, 0.5); width_of(net), net(torch.zeros(1, 3)).shape
        (0.5, torch.Size([1, 2]))
    """
    held = norms_or_raise(network)
    if norms is not None:
        before = held.of(width)
        if before and not isinstance(width, Mapping) and width in held.widths:
            raise ValueError(f"Width {width:g} has norms of its own already: recalibrate those, and pass no norms=.")
        held.put(width, norms, persistent=False)
    if width == 1.0:
        put(network, None)
        return
    thin_of(network, width).look_again()
    put(network, Switched(network, dict(width) if isinstance(width, Mapping) else float(width)))


def width_of(network: nn.Module) -> Width:
    """Return the width at which a network runs now."""
    answer = vars(network).get("forward")
    return answer.width if isinstance(answer, Switched) else 1.0


def thin_of(network: nn.Module, width: Width) -> ThinNetwork:
    """Return the thin network of a width, which is kept, and made when it is first asked for.

    Raises:
        ValueError: As for `set_width`; or the width is 1.0, whose network is the network itself.
    """
    held = norms_or_raise(network)
    key = key_of(width)
    found: ThinNetwork | None = held._kept.get(key)
    if found is not None and found.network is network:
        return found
    groups = held.groups
    if groups is None:
        raise ValueError(
            f"The channel groups of {type(network).__name__} are not known, because it was loaded from a file: call "
            f"find_groups(network, example_inputs) first."
        )
    counts = counts_at(groups, width, allow_inexact=held.allow_inexact)
    if not masks_of(groups, counts):
        raise ValueError(f"Width {width} keeps every channel: the network of this width is the full network.")
    norms = held.of(width)
    if not norms and (paths := norm_paths(network)):
        known = ", ".join(f"{one:g}" for one in held.widths)
        raise ValueError(
            f"Width {_shown(width)} has no statistics of its own for norms, such as {paths[0]!r}, and those of the "
            f"full network would ruin its outputs: choose one of {known}, or recalibrate this width with data."
        )
    tracked = held.is_tracked(width)
    way = way_at(width) if tracked else ""
    thin = ThinNetwork(network, groups, counts, norms, tracked=tracked, contiguous=held.contiguous, way=way)
    held._kept[key] = thin
    return thin


def find_groups(network: nn.Module, example_inputs: ExampleInputs) -> None:
    """Find the channel groups of a network that has widths, such as one that was loaded from a file.

    Args:
        network: Has widths.
        example_inputs: As for `channel_groups`.
    """
    held = norms_or_raise(network)
    before, width = vars(network).get("forward"), width_of(network)
    put(network, None)
    try:
        found = channel_groups(network, example_inputs)
        counts_at(found, held.widths[0], allow_inexact=held.allow_inexact)
    finally:
        if width != 1.0:
            put(network, before)
    held.groups = ChannelGroups(found)
    held._kept.clear()


def _shown(width: Width) -> str:
    return "by group" if isinstance(width, Mapping) else f"{width:g}"
