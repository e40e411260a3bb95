"""The random weights under a supermask: those of the network, or new ones from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import nn

from lightning_compress.core.by_channel import by_channel, transposed_groups
from lightning_compress.core.seeded import Seeded

Start = Literal["as_is", "signed_constant", "uniform"]
Rescale = Literal["none", "fan", "dynamic"]


def check_start(init: str, rescale: str) -> None:
    """Raise a ValueError for an unknown argument."""
    for name, value, known in (("init", init, get_args(Start)), ("rescale", rescale, get_args(Rescale))):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(map(repr, known))}.")


@torch.no_grad()
def start_from(
    model: nn.Module, amounts: Mapping[str, float], init: Start, *, seed: int = 0, rescale: Rescale = "none"
) -> dict[str, Seeded]:
    """Give parameters the weights that a supermask chooses from; return where they come from, by name.

    Args:
        model: The network, which is changed in place.
        amounts: For each parameter, by name, the fraction that will be removed.
        init: "as_is" keeps the weights; "signed_constant" draws -c and +c with c = sqrt(2 / fan_in); "uniform" draws
            from -a to a with a = sqrt(6 / fan_in), which has the same variance.
        seed: The seed of the new weights.
        rescale: "fan" divides all weights by the root of the fraction that remains, as if fan_in were smaller;
            "dynamic" is noted in the origins, because it depends on the mask.

    Example:
        >>> net = nn.Linear(8, 2)
        >>> start_from(net, {"weight": 0.75}, "signed_constant", rescale="fan")["weight"].scale, net.weight.abs().max()
        (1.0, tensor(1., grad_fn=<MaxBackward1>))
    """
    check_start(init, rescale)
    parameters, groups = dict(model.named_parameters()), transposed_groups(model)
    origins = {}
    for stream, (name, amount) in enumerate(amounts.items()):
        weight = parameters[name]
        factor = (1 - amount) ** -0.5 if rescale == "fan" else 1.0
        if init == "as_is":
            weight.mul_(factor)
            continue
        channels = by_channel(weight.detach().contiguous(), groups.get(name))
        scale = math.sqrt((2 if init == "signed_constant" else 6) / (channels.shape[1] * channels.shape[3])) * factor
        origins[name] = Seeded(seed=seed, stream=stream, init=init, scale=scale, per_kept=rescale == "dynamic")
        weight.copy_(origins[name].weights(tuple(weight.shape), weight.dtype))
    return origins
