"""What a calibration works on: outputs of every exit for some samples, and what the parts of the network cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.early_exit.rules import ExitRule, Rule, exit_costs, leaves, score


@dataclass(frozen=True, kw_only=True)
class Table:
    """Outputs of K exits and of the full network for N samples, and the costs of the network's parts.

    Args:
        logits: K + 1 tensors (N, C); left out where `scores` and `right` are given.
        targets: Classes (N,).
        stages: Cost per sample of the K + 1 stages, between the exits and without heads.
        heads: Cost per sample of the K heads, which is paid at open exits alone.
        scores: (K, N), what a user's `confidence=` returned at each exit, for the rule "custom".
        right: (K + 1, N), how good each output is, from 0 to 1; by default whether the likeliest class is the target.

    Raises:
        ValueError: Numbers or shapes do not fit each other.
    """

    stages: Sequence[float]
    heads: Sequence[float]
    logits: Sequence[Tensor] = ()
    targets: Tensor | None = None
    scores: Tensor | None = None
    right: Tensor | None = None

    def __post_init__(self) -> None:
        exits = len(self.heads)
        if not exits or len(self.stages) != exits + 1:
            raise ValueError(f"stages={list(self.stages)}, heads={list(self.heads)}: pass one stage more than heads")
        if not all(0 <= cost < math.inf for cost in (*self.stages, *self.heads)) or not sum(self.stages) > 0:
            raise ValueError(
                f"stages={list(self.stages)}, heads={list(self.heads)}: costs must be finite, none negative, not all 0"
            )
        if self.right is None and self.targets is None:
            raise ValueError("A table needs targets, or right=, how good each output of each sample is")
        if self.scores is None and len(self.logits) != exits + 1:
            raise ValueError(
                f"{len(self.logits)} tensors of logits: pass {exits + 1}, of {exits} exits and the full network"
            )
        for k, logits in enumerate(self.logits):
            if logits.dim() != 2 or len(logits) != self.samples or logits.shape[1] < 2:
                raise ValueError(
                    f"logits[{k}] has shape {tuple(logits.shape)}: expected ({self.samples}, C), with C > 1"
                )
        for name, rows in (("scores", exits), ("right", exits + 1)):
            given = getattr(self, name)
            if given is not None and given.shape != (rows, self.samples):
                raise ValueError(f"{name} has shape {tuple(given.shape)}: expected {(rows, self.samples)}")
        if self.right is not None and not bool(((self.right >= 0) & (self.right <= 1)).all()):
            raise ValueError("right has entries that are not between 0 and 1")
        if self.targets is not None and self.logits:
            classes = self.logits[-1].shape[1]
            if self.targets.dim() != 1 or self.targets.is_floating_point():
                raise ValueError(
                    f"targets: {self.targets.dtype} {tuple(self.targets.shape)}; expected classes (N,), integers"
                )
            if self.samples and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < classes:
                low, high = int(self.targets.min()), int(self.targets.max())
                raise ValueError(f"targets go from {low} to {high}: expected classes from 0 to {classes - 1}")

    @property
    def samples(self) -> int:
        """How many samples the table has."""
        rows = self.targets if self.targets is not None else self.right
        return rows.shape[-1] if rows is not None else 0

    def part(self, samples: Tensor) -> Table:
        """Return the table of some of the samples, given by their numbers."""

        def some(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[..., samples.to(rows.device)]

        logits = [z[samples.to(z.device)] for z in self.logits]
        return replace(
            self, logits=logits, targets=some(self.targets), scores=some(self.scores), right=some(self.right)
        )

    def quality(self) -> Tensor:
        """Return how good each output is, (K + 1, N) on the CPU in float64."""
        if self.right is not None:
            return self.right.detach().double().cpu()
        assert self.targets is not None
        targets = self.targets
        right = [(z.argmax(1) == targets.to(z.device)) & ~z.isnan().any(1) for z in self.logits]
        return torch.stack(right).double().cpu()

    def confidences(self, rule: Rule, temperatures: Sequence[float]) -> Tensor:
        """Return the scores (K, N) of a rule that has a score at each exit, on the CPU in float32."""
        if rule == "custom":
            if self.scores is None:
                raise ValueError('rule="custom": the table has no scores; pass those that your confidence= returned')
            largest = torch.finfo(torch.float32).max  # a threshold of infinity closes an exit
            return self.scores.detach().float().cpu().clamp(-largest, largest)
        pairs = zip(self.logits[:-1], temperatures[:-1], strict=True)
        return torch.stack([score(logits.detach(), rule, temperature) for logits, temperature in pairs]).cpu()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rule does to the samples of a table.

    Args:
        accuracy: Mean quality of the outputs with which samples leave.
        mean_cost: Per sample, in the unit of the table.
        shares: Of the samples, the share that leaves at each exit, and at the full network.
        exit_index: Where each sample leaves (N,), counted from 0; K is the full network.
    """

    accuracy: float
    mean_cost: float
    shares: tuple[float, ...]
    exit_index: Tensor


def evaluate(table: Table, rule: ExitRule) -> Outcome:
    """Return what a rule does to the samples of a table, by simulation: nothing is run.

    Example:
        >>> logits = [torch.tensor([[3.0, 0.0], [0.1, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])]
        >>> table = Table(logits=logits, targets=torch.tensor([0, 1]), stages=(10.0, 10.0), heads=(1.0,))
        >>> outcome = evaluate(table, ExitRule(rule="confidence", thresholds=(0.9,), temperatures=(1.0, 1.0)))
        >>> outcome.accuracy, outcome.mean_cost, outcome.shares
        (1.0, 16.0, (0.5, 0.5))
    """
    if len(rule.thresholds) != len(table.heads):
        raise ValueError(f"The rule is of {len(rule.thresholds)} exits, and the table of {len(table.heads)}")
    if not table.samples:
        raise ValueError("The table has no samples, so that a rule cannot be evaluated")
    left = torch.zeros(len(table.heads), table.samples, dtype=torch.bool)
    if rule.rule == "patience":
        before = None
        for k in rule.open:
            left[k], before = leaves(rule, k, table.logits[k].detach(), before=before)
    else:
        scores = table.confidences(rule.rule, rule.temperatures)
        left[:] = scores >= torch.tensor(rule.thresholds)[:, None]
        left[[k for k in range(len(left)) if k not in rule.open]] = False
    return settle(left, table.quality(), table.stages, table.heads, rule.open)


def settle(
    left: Tensor, right: Tensor, stages: Sequence[float], heads: Sequence[float], open_exits: Sequence[int]
) -> Outcome:
    """Return what follows where samples leave at the first exit that lets them.

    Args:
        left: (K, N), which samples may leave at each exit.
        right: (K + 1, N), how good each output is.
        stages: Cost per sample of the K + 1 stages.
        heads: Cost per sample of the K heads.
        open_exits: The exits whose heads are run.
    """
    exits, samples = left.shape
    index = torch.full((samples,), exits)
    for k in reversed(range(exits)):
        index[left[k]] = k
    counts = index.bincount(minlength=exits + 1).double()
    costs = torch.tensor(exit_costs(stages, heads, open_exits), dtype=torch.double)
    return Outcome(
        accuracy=float(right.gather(0, index[None]).sum()) / samples,
        mean_cost=float(counts @ costs) / samples,
        shares=tuple((counts / samples).tolist()),
        exit_index=index,
    )
