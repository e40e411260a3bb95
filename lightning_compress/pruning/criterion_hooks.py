"""Feeds a criterion from the hooks of a training step, at which its statistic collects values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.distributed import all_reduce_sum, rank
from lightning_compress.core.tensors import Kept, select, sliced
from lightning_compress.pruning.channels import Channels
from lightning_compress.pruning.criteria.choose import (
    DIFFERENTIATING,
    STATIC,
    Criterion,
    Granularity,
    make_statistic,
    static_scores,
)
from lightning_compress.pruning.criteria.from_start import FROM_START, channel_scores_from_start, scores_from_start
from lightning_compress.pruning.criteria.statistic import Statistic
from lightning_compress.trainer.effects import Sight

_SEES_NOTHING = Statistic()


class CriterionHooks:
    """Holds what a criterion has seen while a network trains, and scores its targets.

    `watch` makes a statistic of the targets, and `stop` drops it. A micro-batch calls `begin`, then the methods of
    `step` (`before_backward`, `before_step`, `after_step`), and `end`. Criteria that need the weights alone have no
    statistic; for them these methods do nothing. Criteria that compare with the weights of an earlier moment get them
    by `compare_from`, and keep them until `finish`.

    Args:
        criterion: The criterion's name.
        granularity: Whether weights or channels are scored.
        scope: Whether all entries are compared ("global"), or those of one layer ("layer").

    Attributes:
        statistic: The statistic since the last event, or None.
        step: The statistic, if the present step counts, else one that collects nothing.
        start: The weights of an earlier moment, by name; empty where the criterion compares with none.
    """

    def __init__(self, criterion: Criterion, granularity: Granularity, scope: str = "global") -> None:
        self._criterion: Criterion = criterion
        self._granularity: Granularity = granularity
        self._scope = scope
        self.start: dict[str, Tensor] = {}
        self.statistic: Statistic | None = None
        self.step = _SEES_NOTHING

    @property
    def looks_at(self) -> frozenset[Sight]:
        """The values that the criterion depends on, in the words of `Effects`."""
        if self._criterion in STATIC:
            return frozenset() if self._criterion == "random" else frozenset({"magnitudes"})
        found: set[Sight] = {"gradients"}
        if self._criterion == "si":
            found.add("magnitudes")
        elif not (self._criterion == "taylor" and self._granularity == "weight"):
            found.add("layers")
        if self._criterion in DIFFERENTIATING:
            found.add("second_backward")
        return frozenset(found)

    def watch(
        self, model: nn.Module, targets: list[str] | list[Channels], *, network: nn.Module, generator: torch.Generator
    ) -> None:
        """Make a new statistic of the targets as they are now; without targets there is none.

        Args:
            model: The module that the targets' names are relative to.
            targets: Names of parameters, or channels.
            network: The submodule whose output is the prediction.
            generator: The source of random numbers.
        """
        self.stop()
        if targets:
            self.statistic = make_statistic(
                self._criterion, model, targets, granularity=self._granularity, network=network, generator=generator
            )

    @property
    def compares(self) -> bool:
        """Whether the criterion compares with the weights of an earlier moment."""
        return self._criterion in FROM_START

    def compare_from(self, weights: Mapping[str, Tensor]) -> None:
        """Keep copies of the present weights, by name, as those that later ones are compared with."""
        if self.compares:
            self.start = {name: weight.detach().clone() for name, weight in weights.items()}

    def stop(self) -> None:
        """Drop the statistic."""
        self.end()
        self.statistic = None

    def finish(self) -> None:
        """Drop the statistic and the earlier weights, when no more decisions follow."""
        self.stop()
        self.start = {}

    def begin(self, *, counts: bool) -> None:
        """Begin a micro-batch. `counts` says whether an event uses it; some criteria collect from all of them."""
        statistic = self.statistic
        if statistic is not None and (counts or statistic.needs_training):
            self.step = statistic
        self.step.begin()

    def end(self) -> None:
        """Remove the hooks: after a micro-batch or an exception, and before shapes change."""
        self.step = _SEES_NOTHING
        if self.statistic is not None:
            self.statistic.end()

    def score(
        self,
        weights: dict[str, Tensor],
        channels: list[Channels] | None,
        generator: torch.Generator,
        *,
        alive: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], bool]:
        """Score the targets, by the statistics of all ranks or by the weights.

        Args:
            weights: The targeted weights, by name.
            channels: The targeted channels, or None if single weights are scored.
            generator: The source of random numbers.
            alive: Masks (True stays) over the weights; None if none is masked for good.

        Returns:
            The scores, and whether their absolute values are the importance.
        """
        if self.statistic is not None:
            self.statistic.reduce(all_reduce_sum)  # `reset` follows
            return self.statistic.scores(), False
        if self.compares:
            start = {name: self.start[name].to(weight.device) for name, weight in weights.items()}
            if channels is not None:
                return channel_scores_from_start(self._criterion, weights, start, channels), False
            options: dict[str, Any] = {"generator": generator, "scope": self._scope, "alive": alive}
            return scores_from_start(self._criterion, weights, start, **options), False
        if self._criterion in ("magnitude", "l2") and channels is None:
            return weights, True  # |w| and w^2 have the same order, so that no copy of the weights is needed
        return static_scores(self._criterion, weights, channels, generator), False

    def reset(self) -> None:
        """Set the statistic to zero, at the start of a new interval."""
        if self.statistic is not None:
            self.statistic.reset()

    def synchronize(self) -> None:
        """Add the statistics of all ranks for a checkpoint; rank 0 continues from the sum, the others from zero."""
        if self.statistic is not None:
            self.statistic.reduce(all_reduce_sum)
            if self.statistic.rank_local and rank() > 0:
                self.statistic.reset()

    def state_dict(self) -> dict[str, Any] | None:
        """Return the statistic since the last reset, or the earlier weights, as plain data; None without either."""
        if self.start:
            return {"criterion": self._criterion, "start": dict(self.start)}
        return None if self.statistic is None else self.statistic.state_dict()

    def resume(self, state: dict[str, Any] | None) -> None:
        """Continue from the `state_dict` of a checkpoint: sums on rank 0 alone, because they are those of all ranks."""
        if self.compares and state is not None:
            self.start = {name: value.clone() for name, value in state["start"].items()}
        if self.statistic is not None and state is not None:
            self.statistic.load_state_dict(state)
            if self.statistic.rank_local and rank() > 0:
                self.statistic.reset()

    def follow(self, state: dict[str, Any], kept: Kept) -> None:
        """Continue from the `state_dict` of before a cut; `kept` has the positions that stayed."""
        if self.compares:
            self.start = sliced(state["start"], kept)
        if self.statistic is None:
            return
        now = self.statistic.sums  # sums over the channels of other groups keep their shapes
        sums = {
            name: total if total.shape == now[name].shape else select(total, kept[name])
            for name, total in state["sums"].items()
        }
        start = {"start": sliced(state["start"], kept)} if "start" in state else {}
        self.statistic.load_state_dict(state | {"sums": sums} | start)
