"""The share of REINFORCE in a step of a module: what its network answers, and the reward of the gates for that."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_compress.core.distributed import all_reduce_sum, world_size
from lightning_compress.core.evaluation import evaluating
from lightning_compress.core.outputs import select_output
from lightning_compress.skipping.controls import Fixed
from lightning_compress.skipping.gates import Decisions, SkipGates
from lightning_compress.skipping.reinforce import EXPLORES, PENALTY, PRICE, blockdrop_loss, moved, quality, skipnet_loss
from lightning_compress.trainer.capture import captured
from lightning_compress.trainer.inputs import resolve_network
from lightning_compress.trainer.labels import targets_of


class Rewards:
    """What gates are paid for in the steps of a fit.

    Args:
        network: Dotted path of the network.
        output: What picks its answer.

    Attributes:
        price: Of cost, relative to the papers' numbers; it moves until the target is met.
    """

    def __init__(self, network: str, output: str | int | None) -> None:
        self.network, self.picks = network, output
        self.price = 1.0
        self._called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._output: Any = None
        self._said = False

    def watched(self, module: LightningModule) -> AbstractContextManager[Callable[[], None]]:
        """Return a block that sees what the network is called with, and what it answers."""
        return captured(module, self.network, self._begin, self._end)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._called = (args, kwargs)

    def _end(self, output: Any) -> None:
        self._output = output

    def loss(
        self, module: LightningModule, gates: SkipGates, decisions: Decisions, batch: Any, target: float
    ) -> Tensor:
        """Return the loss of the gates for a batch, and move the price."""
        logits, runs = decisions.logits(), decisions.runs()
        assert logits is not None, "the network ran"
        assert runs is not None, "the network ran"
        runs = runs.detach()
        costs = (gates.shares / gates.shares.sum()).to(runs.device, runs.dtype)
        output = select_output(self._output, self.picks, "The network")
        targets = self._targets(batch, output)
        reference = None
        if targets is None:
            reference, _ = self._again(module, gates, Fixed([True] * len(gates)))
        right, losses = quality(output, targets, reference)
        if gates.kind == "policy":
            answer, chosen = self._again(module, gates, None)
            assert chosen is not None, "the network ran"
            greedy = (chosen, quality(answer, targets, reference)[0])
            penalty = PENALTY / self.price
            loss = blockdrop_loss(logits, runs, costs, right, greedy, penalty, first=gates.first)
        else:
            loss = skipnet_loss(logits, runs, costs, losses, PRICE * self.price)
        used = all_reduce_sum(gates.used((logits.detach() > 0).to(runs).mean(0))) / world_size()  # as in evaluation
        self.price = moved(self.price, float(used), target)
        return loss

    def _targets(self, batch: Any, output: Tensor) -> Tensor | None:
        """Return the classes of a batch; None if there are none that fit the output."""
        try:
            found = targets_of(batch)
        except ValueError:
            found = None
        if found is not None and output.dim() == 2 and found.dim() == 1 and not found.is_floating_point():
            return found
        if not self._said:
            self._said = True
            rank_zero_info(
                "No classes of single samples were found in the batch: gates are paid for the share of answers that "
                "agree with those of the network with all blocks."
            )
        return None

    def _again(self, module: LightningModule, gates: SkipGates, instead: Any) -> tuple[Tensor, Tensor | None]:
        """Return the answers of the network as it evaluates, and the decisions of the gates."""
        args, kwargs = self._called
        network = resolve_network(module, self.network)
        with evaluating(network), gates.apart(instead), gates.collecting() as decisions:
            found = network(*args, **kwargs)
        return select_output(found, self.picks, "The network"), decisions.runs()


def set_drawing(gates: SkipGates, *, rewarded: bool, curriculum: float) -> None:
    """Set how gates decide in training.

    Args:
        gates: The gates.
        rewarded: Whether they learn from rewards alone.
        curriculum: Share of a policy's blocks, from the last one, for which it decides.
    """
    gates.straight_through = not rewarded
    gates.explores = EXPLORES if rewarded and gates.kind == "policy" else 0.0
    gates.first = len(gates) - max(1, math.ceil(curriculum * len(gates))) if rewarded else 0
