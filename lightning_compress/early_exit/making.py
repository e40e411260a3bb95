"""Make the heads of a network, at layers that are named or placed by their share of its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress.core.example_inputs import ExampleInputs, call
from lightning_compress.core.outputs import select_output
from lightning_compress.early_exit.heads import ExitHeads, make_heads, reading
from lightning_compress.early_exit.placing import place_exits
from lightning_compress.stages.split import running

Exits = int | list[float | str]


def new_heads(
    network: nn.Module,
    inputs: ExampleInputs,
    exits: Exits,
    *,
    num_classes: int,
    head: Any,
    output: str | int | None,
) -> ExitHeads:
    """Return heads for a network, which does not have them yet.

    Args:
        network: The network.
        inputs: What it is called with.
        exits: Names of layers, shares of the network's cost, or a number of equal shares; not none.
        num_classes: How many logits it returns.
        head: As in `EarlyExitHeads`.
        output: What picks the logits from its output.

    Raises:
        ValueError: A layer does not exist, does not run, runs twice or returns what no head reads; too few layers to
            choose from; the number of classes is another.
    """
    layers = named(exits)
    if not layers:
        shares = [(number + 1) / (exits + 1) for number in range(exits)] if isinstance(exits, int) else exits
        layers = place_exits(network, inputs, [float(share) for share in shares], output=output)
        rank_zero_info(f"Exits are placed after {', '.join(layers)}.")
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise ValueError(f"exits has {twice!r} twice: name each layer once.")
    features: dict[str, Tensor] = {}
    with running(network), reading(network, layers, features.__setitem__):
        whole = call(network, inputs)
    logits = select_output(whole, output, "The network")
    with torch.random.fork_rng([]):  # the random draws of the fit stay what they are without heads
        return make_heads(
            layers,
            features,
            logits,
            num_classes=num_classes,
            head=head,
            is_1d=lambda layer: type(network.get_submodule(layer)).__name__.endswith("1d"),
        )


def named(exits: Exits | None) -> list[str]:
    """Return the names of layers among exits."""
    return [one for one in exits if isinstance(one, str)] if isinstance(exits, list) else []


def checked_exits(exits: Any) -> Exits | None:
    """Return exits as a number, as names or as shares of the network's cost; None for those that it has already.

    Raises:
        ValueError: They are none of these.

    Example:
        >>> checked_exits(("block1", "block2")), checked_exits(3)
        (['block1', 'block2'], 3)
    """
    if exits is None or (isinstance(exits, int) and not isinstance(exits, bool) and exits >= 0):
        return exits
    given = exits if isinstance(exits, Sequence) and not isinstance(exits, str) else [None]
    names = all(isinstance(one, str) for one in given)
    shares = all(isinstance(one, float) and 0.0 < one < 1.0 for one in given)
    if not (names or shares):
        raise ValueError(
            f"exits is a list of names of layers, a number of exits, 0 or more, or an ascending list of shares of the "
            f"network's cost between 0 and 1, such as [0.25, 0.5, 0.75]; got {exits!r}."
        )
    return [*given]
