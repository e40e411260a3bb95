"""Several pruning callbacks in one Trainer: what they must not share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule

from lightning_compress.core.select import select_parameters
from lightning_compress.pruning.removing import RemovingCallback


def check_disjoint(module: LightningModule, callbacks: Iterable[Any]) -> None:
    """Refuse pruning callbacks that share a parameter: each would undo what the other counts.

    Raises:
        ValueError: Two of them do.
    """
    owners: dict[str, RemovingCallback] = {}
    for callback in callbacks:
        if isinstance(callback, RemovingCallback):
            # each callback says itself which of its patterns match nothing
            for name in select_parameters(module, callback.patterns(module), exclude=callback.exclude, warn=False):
                if name in owners:
                    raise ValueError(
                        f"Two {type(callback).__name__}s prune {name}: {owners[name].state_key} and "
                        f"{callback.state_key}. Choose one of them, or give them targets that share nothing."
                    )
                owners[name] = callback


def check_way_back(callback: RemovingCallback, callbacks: Iterable[Any]) -> None:
    """Refuse a callback that goes back to an earlier network beside one that may have cut this network since.

    Raises:
        ValueError: There is such a one.
    """
    others = [one for one in callbacks if isinstance(one, RemovingCallback)]
    before = others[: others.index(callback)]
    for other in others:
        if other is not callback and other.removes and (other.shrink == "during_fit" or other in before):
            raise ValueError(
                f"stop= goes back to an earlier network, out of which {other.state_key} may have cut channels since: "
                f"give that callback shrink='never', or shrink='on_fit_end' and a place after the one that stops in "
                f"Trainer(callbacks=[...])."
            )
