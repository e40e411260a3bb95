"""How much each loss of a step counts: that of every replay, and that of the full network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from lightning_compress.trainer.scheduled import Scheduled

NAMED = ("equal", "rising")
_FIRST = 0.01  # the weight from which rising weights begin
Weights = str | Sequence[float | Mapping[str, Any]]


class LossWeights:
    """The weights of the losses of K replays, and of the full network's.

    Args:
        weights: "equal": all 1; "rising": that of replay k rises to k / (K + 1), from 0.01, and the full network's is
            1; or a number or a schedule (see `Scheduled`) for each replay, and one for the full network.

    Raises:
        ValueError: `weights` is another name.
    """

    def __init__(self, weights: Weights) -> None:
        self._given = weights
        self._scheduled: list[Scheduled] = []
        if isinstance(weights, str) and weights not in NAMED:
            raise ValueError(
                f"weights is one of {', '.join(NAMED)}, or a list with a number, or a schedule such as {{'start': "
                f"0.01, 'end': 0.5}}, for each loss, the full network's last; got {weights!r}."
            )

    def plan(self, trainer: Trainer, replays: int, state: Sequence[Any] | None) -> None:
        """Plan the schedules for a fit, or go on with those of a checkpoint.

        Args:
            trainer: Of the fit.
            replays: K.
            state: From `state`.

        Raises:
            ValueError: There is another number of weights, or a weight is below 0.
        """
        self._scheduled = self._made(replays)
        for number, weight in enumerate(self._scheduled):
            weight.plan(trainer, None if state is None else state[number])

    def _made(self, replays: int) -> list[Scheduled]:
        weights: Any = self._given
        if weights == "equal":
            weights = [1.0] * (replays + 1)
        elif weights == "rising":
            shares = [(number + 1) / (replays + 1) for number in range(replays)]
            weights = [{"start": min(_FIRST, share), "end": share} for share in shares] + [1.0]
        if not isinstance(weights, Sequence) or len(weights) != replays + 1:
            raise ValueError(
                f"weights={self._given!r} must have {replays + 1} numbers or schedules: one for each of {replays} "
                f"exits or thinner widths, and one for the full network."
            )
        made = [Scheduled.of(weight, f"weights[{number}]") for number, weight in enumerate(weights)]
        for one in made:
            if min(one.start, one.end) < 0:
                raise ValueError(f"weights are 0 or more; got {self._given!r}.")
        return made

    def follow_epochs(self, moment: Callable[[int], int]) -> None:
        """Move planned steps, as `ResumableCallback.follow_epochs` does."""
        for weight in self._scheduled:
            weight.follow_epochs(moment)

    def at(self, step: int) -> list[float]:
        """Return the weights after optimizer step number `step`; none before they were planned."""
        return [weight.at(step) for weight in self._scheduled]

    def state(self) -> list[Any]:
        """Return what `plan` needs to go on."""
        return [weight.state() for weight in self._scheduled]
