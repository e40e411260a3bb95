"""What the survivors of a prune start from, and what the pruned entries become: the controls of lottery tickets."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Restart = Literal["rewind", "reinit", "reshuffle", "constant"]
Signs = Literal["keep", "random"]
Pruned = Literal["zero", "initial", "mixed"]


def check_restart(restart: str, signs: str, pruned: str) -> None:
    """Raise a ValueError unless all three are known."""
    for name, value, known in (
        ("restart", restart, get_args(Restart)),
        ("signs", signs, get_args(Signs)),
        ("pruned", pruned, get_args(Pruned)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")


def start_values(
    initial: Tensor, mask: Tensor, *, restart: Restart, signs: Signs, generator: torch.Generator
) -> Tensor:
    """Return what the survivors of a layer start from; other entries are undefined.

    With w the initial weights of the layer, a magnitude is |w| for "rewind"; |w| of a random entry of the layer, drawn
    with replacement, for "reinit"; |w| of another survivor, by a random permutation, for "reshuffle"; and the standard
    deviation of the layer for "constant". The sign is that of w, or drawn anew.

    Args:
        initial: The initial weights of a layer.
        mask: The survivors (True).
        restart: Where magnitudes come from.
        signs: Whether the signs of the initial weights stay.
        generator: The source of random numbers, on the CPU.

    Example:
        >>> initial, mask = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([True, True, False])
        >>> start_values(initial, mask, restart="constant", signs="keep", generator=torch.Generator())[:2]
        tensor([ 2.0548, -2.0548])
    """
    if restart == "rewind" and signs == "keep":
        return initial.clone()
    if restart == "reinit":
        drawn = torch.randint(initial.numel(), (initial.numel(),), generator=generator).to(initial.device)
        magnitudes = initial.flatten()[drawn].view_as(initial).abs()
    elif restart == "reshuffle":
        survivors = initial[mask]
        order = torch.randperm(survivors.numel(), generator=generator).to(initial.device)
        magnitudes = initial.abs().masked_scatter(mask, survivors[order].abs())
    elif restart == "constant":
        magnitudes = torch.full_like(initial, float(initial.float().std(correction=0)))
    else:
        magnitudes = initial.abs()
    if signs == "keep":
        negative = initial < 0
    else:
        negative = (torch.rand(initial.shape, generator=generator) < 0.5).to(initial.device)
    return torch.where(negative, -magnitudes, magnitudes)


def frozen_values(initial: Tensor, trained: Tensor, mask: Tensor, *, pruned: Pruned) -> Tensor:
    """Return the values at which the pruned entries of a layer stay, and zero for survivors.

    For "mixed" (Zhou et al. 2019) it is 0 where training has moved an entry towards zero, |trained| < |initial|, and
    else the initial value.

    Example:
        >>> initial, trained = torch.tensor([1.0, -1.0, 5.0]), torch.tensor([0.5, -2.0, 6.0])
        >>> frozen_values(initial, trained, torch.tensor([False, False, True]), pruned="mixed")
        tensor([ 0., -1.,  0.])
    """
    gone = mask if pruned == "initial" else mask | (trained.abs() < initial.abs())
    return initial.masked_fill(gone, 0.0)
