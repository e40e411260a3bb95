"""Run a user's step again with another output of the network: losses, metrics and logged numbers of an exit or width.

    real step             the network runs, and the module logs "val_acc"
    replay "exit1"        the same step, in which the network returns the first exit's logits, logs "exit1/val_acc"

A replay begins with the random states and the batch of the real step, and with the metrics, counters and lists of its
own replica (`trainer.replica`). So it draws the same random numbers as the real step, and no accuracy mixes exits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_compress.core.answering import answering
from lightning_compress.trainer import rng
from lightning_compress.trainer.replica import Before, Replica, exchanged
from lightning_compress.trainer.unwrap import SLOT, innermost


@contextmanager
def replaying(module: LightningModule, label: str, replica: Replica, before: Before) -> Iterator[None]:
    """Give a module the random states of its real step, and a replica's metrics and attributes, for one replay.

    Afterwards all is as it was when the block began, and the replica holds what the replay has changed.

    Args:
        module: A wrapper, whose step the block runs.
        label: What is logged in the block gets it as a folder: "exit1/val_acc".
        replica: Of this label.
        before: What the module held before the real step.
    """
    inside, after = getattr(module, SLOT), rng.capture()
    rng.restore(before.random)
    folders = inside.folders
    inside.folders = tuple(f"{folder}{label}/" for folder in folders)
    try:
        with exchanged(innermost(module), before, replica):
            yield
    finally:
        inside.folders = folders
        rng.restore(after)


@contextmanager
def returning(network: nn.Module, output: Any) -> Iterator[None]:
    """Have calls of a network return `output`, without running it."""
    with answering(network, lambda *args, **kwargs: output):
        yield


def with_output(found: Any, output: str | int | None, new: Tensor, who: str) -> Any:
    """Return what a network returned, with another tensor in the place that `output` picks.

    Args:
        found: A tensor, or a dict, tuple, list or object; it stays as it is.
        output: As in `select_output`.
        new: The tensor to be there.
        who: Whose output it is, for the message.

    Raises:
        ValueError: The network has computed its loss from the other tensor already.

    Example:
        >>> import torch
        >>> with_output({"logits": torch.ones(1), "other": 2}, None, torch.zeros(1), "The network")
        {'logits': tensor([0.]), 'other': 2}
    """
    if isinstance(found, Tensor):
        return new
    loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if isinstance(loss, Tensor):
        raise ValueError(
            f"{who} computes its loss itself, from the full network's logits, as networks of transformers do when they "
            f"get labels=: call it without labels, and compute the loss from its logits in the step."
        )
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    place = "logits" if output is None and isinstance(logits, Tensor) else output
    if isinstance(found, tuple) and isinstance(place, int):
        items = [*found[:place], new, *found[place:][1:]]
        return type(found)(*items) if hasattr(found, "_fields") else type(found)(items)
    made = copy.copy(found)
    if isinstance(made, Mapping | list):
        made[place] = new  # type: ignore[index]  # `select_output` has picked from there
    else:
        setattr(made, str(place), new)
    return made
