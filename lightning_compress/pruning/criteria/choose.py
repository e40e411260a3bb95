"""The criteria by name: checks of their settings, and the objects and functions that compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.channels.costs import Cost
from lightning_compress.core.given import real_number, whole_number
from lightning_compress.pruning.channels import Channels
from lightning_compress.pruning.criteria.activations import Apoz, MeanActivation, TaylorChannel
from lightning_compress.pruning.criteria.from_start import BY_TWO_RANKS, FROM_START
from lightning_compress.pruning.criteria.samples import Ewc, Fisher, Mas
from lightning_compress.pruning.criteria.statistic import Statistic
from lightning_compress.pruning.criteria.weights import Obd, Si, Taylor, channel_norm, l2, magnitude, random

Criterion = Literal[
    "magnitude",
    "l2",
    "random",
    "apoz",
    "mean_activation",
    "taylor",
    "obd",
    "fisher",
    "ewc",
    "si",
    "mas",
    "small_final",
    "large_init",
    "small_init",
    "large_init_large_final",
    "small_init_small_final",
    "magnitude_increase",
    "movement",
    "magnitude_increase_same_sign",
    "magnitude_increase_diff_sign",
    "large_final_same_sign",
    "large_final_diff_sign",
]
Shrink = Literal["never", "on_fit_end", "during_fit"]
Granularity = Literal["weight", "neuron"]

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
# These look at no training step. All from the fourth on compare with weights of the fit's start.
STATIC: tuple[Criterion, ...] = ("magnitude", "l2", "random", *(one for one in CRITERIA if one in FROM_START))
DIFFERENTIATING: tuple[Criterion, ...] = ("obd", "fisher")  # they differentiate the loss once more than the training
_CHANNELS_ONLY = ("apoz", "mean_activation")
# These criteria measure zero for a masked channel, which is silent, so that it would never come back.
_BLIND_TO_MASKED_CHANNELS = ("apoz", "mean_activation", "taylor", "fisher")


def check_criterion(criterion: str, granularity: str, scope: str, *, regrow: bool) -> None:
    """Raise a ValueError unless the criterion exists, scores this granularity and, for `regrow`, masked channels."""
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer'; got {scope!r}.")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}; got {criterion!r}.")
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity must be 'weight' or 'neuron'; got {granularity!r}.")
    if granularity == "weight" and criterion in _CHANNELS_ONLY:
        raise ValueError(f"criterion={criterion!r} scores channels: it needs granularity='neuron', got 'weight'.")
    if granularity == "neuron" and criterion in BY_TWO_RANKS:
        raise ValueError(f"criterion={criterion!r} compares ranks of single weights: it needs granularity='weight'.")
    if regrow and granularity == "neuron" and criterion in _BLIND_TO_MASKED_CHANNELS:
        raise ValueError(
            f"criterion={criterion!r} sees nothing of a masked channel, so regrow=True could bring none back: use "
            f"'magnitude', 'l2', 'obd', 'ewc' or 'mas', or regrow=False."
        )


def check_shrink(shrink: Shrink, granularity: Granularity, criterion: Criterion, *, regrow: bool, stop: bool) -> None:
    """Raise a ValueError unless channels may leave the network at that moment."""
    if shrink not in get_args(Shrink):
        raise ValueError(f"shrink must be one of {', '.join(get_args(Shrink))}; got {shrink!r}.")
    if shrink != "during_fit":
        return
    if granularity == "weight":
        raise ValueError("shrink='during_fit' removes channels: it needs granularity='neuron', got 'weight'.")
    if regrow or stop:
        wants = "regrow=True" if regrow else "stop="
        raise ValueError(
            f"shrink='during_fit' removes channels for good, but {wants} wants them back: use shrink='on_fit_end'."
        )
    if criterion == "si" or criterion in FROM_START:
        raise ValueError(f"criterion={criterion!r} looks at a weight's whole training: use shrink='on_fit_end'.")


def checked_min_left(min_left: Any) -> float:
    """Return the fraction of each group that stays, or raise a ValueError."""
    return real_number(min_left, "min_left must be a fraction, 0 or more and below 1", least=0, below=1)


def check_widths(cost: Cost, min_channels: int, round_to: int) -> None:
    """Raise a ValueError unless the limits of widths are in range."""
    if cost not in get_args(Cost):
        raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}; got {cost!r}.")
    for name, value in (("min_channels", min_channels), ("round_to", round_to)):
        whole_number(value, f"{name} must be a whole number, 1 or more", least=1)


def make_statistic(
    criterion: Criterion,
    model: nn.Module,
    targets: Sequence[str] | Sequence[Channels],
    *,
    granularity: Granularity,
    network: nn.Module,
    generator: torch.Generator,
) -> Statistic | None:
    """Return the statistic that a criterion collects during training, or None for one that needs the weights alone."""
    options: dict[str, Any] = {}
    if criterion in ("ewc", "mas"):
        options["network"] = network
    if criterion in ("ewc", "obd"):
        options["generator"] = generator
    kinds: dict[str, Callable[..., Statistic]] = {
        "apoz": Apoz,
        "mean_activation": MeanActivation,
        "taylor": TaylorChannel if granularity == "neuron" else Taylor,
        "obd": Obd,
        "fisher": Fisher,
        "ewc": Ewc,
        "si": Si,
        "mas": Mas,
    }
    return None if criterion in STATIC else kinds[criterion](model, targets, **options)


def static_scores(
    criterion: Criterion, weights: Mapping[str, Tensor], channels: Sequence[Channels] | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Score weights, or channels where they are given, by a criterion that needs the present weights alone."""
    assert criterion in ("magnitude", "l2", "random"), f"{criterion} needs more than the weights"
    if channels is not None:
        if criterion == "random":
            return {group.name: torch.rand(group.size, generator=generator) for group in channels}
        order = 1 if criterion == "magnitude" else 2
        return {group.name: channel_norm(weights, group, order) for group in channels}
    if criterion == "random":
        return {name: random(weight, generator) for name, weight in weights.items()}
    score = magnitude if criterion == "magnitude" else l2
    return {name: score(weight) for name, weight in weights.items()}
