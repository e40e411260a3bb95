"""Rewards of gates whose decisions are drawn, and the losses whose gradients are those of REINFORCE.

loss = - mean over samples of sum over k of A_k log p(g_k)        A the advantage of what was drawn
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PRICE = 0.1  # SkipNet's alpha: what skipping all blocks is worth, in units of the loss
PENALTY = 5.0  # BlockDrop's gamma: what a wrong answer costs
EXPLORES = 0.2  # BlockDrop's share of exploration
_ENTROPY = 0.01  # weight of the entropy of BlockDrop's decisions
_FASTEST = 0.05  # the most by which a price moves in one step, as a share of it


def skipnet_loss(logits: Tensor, runs: Tensor, costs: Tensor, losses: Tensor, price: float) -> Tensor:
    """Return the loss of gates before blocks, each of which decides by what it has seen so far.

    The advantage of gate k is R_k less its mean over the batch, with R_k = a sum over j >= k of (1 - g_j) c_j - l: what
    skipping saves from there on, and the sample's loss l at the end.

    Args:
        logits: Of each gate, (N, K).
        runs: What was drawn, (N, K).
        costs: c, the share of the blocks' cost that each has, (K,).
        losses: l, (N,).
        price: a.

    Paper:
        Wang et al., SkipNet (1711.09485), section 3.2, equation 4; the mean as a baseline is ours.
    """
    saved = price * (1.0 - runs) * costs
    returns = saved.flip(1).cumsum(1).flip(1) - losses[:, None]
    advantage = (returns - returns.mean(0)).detach()
    return -(advantage * _log_chance(logits, runs, 0.0)).sum(1).mean()


def blockdrop_loss(
    logits: Tensor,
    runs: Tensor,
    costs: Tensor,
    right: Tensor,
    greedy: tuple[Tensor, Tensor],
    penalty: float,
    *,
    first: int = 0,
) -> Tensor:
    """Return the loss of a policy that decides for all blocks at once.

    The reward is 1 - u^2 where the answer is right and - gamma where it is wrong, with u the share of the blocks' cost
    that is used. The advantage is the reward of what was drawn less that of the policy's own choice, without noise.

    Args:
        logits: Of each gate, (N, K); decisions were drawn with the share `EXPLORES` of exploration.
        runs: What was drawn, (N, K).
        costs: The share of the blocks' cost that each has, (K,).
        right: How good the answer to each sample was, 0 to 1, (N,).
        greedy: The runs and the quality of the answers without noise.
        penalty: gamma.
        first: The first block for which the policy decides, as in a curriculum; those before it run.

    Paper:
        Wu et al., BlockDrop (1711.08393), section 3.2, equations 3 to 6.
    """

    def reward(chosen: Tensor, good: Tensor) -> Tensor:
        used = (chosen * costs).sum(1)
        return good * (1.0 - used.square()) - (1.0 - good) * penalty

    advantage = (reward(runs, right) - reward(*greedy)).detach()
    logits, runs = logits[:, first:], runs[:, first:]
    entropy = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none").sum(1).mean()
    return -(advantage[:, None] * _log_chance(logits, runs, EXPLORES)).sum(1).mean() - _ENTROPY * entropy


def _log_chance(logits: Tensor, runs: Tensor, explores: float) -> Tensor:
    """Return the logarithm of the probability with which each decision was drawn."""
    if explores == 0.0:
        return -F.binary_cross_entropy_with_logits(logits, runs, reduction="none")
    chance = logits.sigmoid()
    chance = (1.0 - explores) * chance + explores * (1.0 - chance)
    return torch.where(runs > 0.5, chance, 1.0 - chance).log()


def moved(price: float, used: float, target: float) -> float:
    """Return the price of cost after a batch: it rises while the share of the MACs is above the target.

    Example:
        >>> moved(1.0, 0.8, 0.6) > 1.0 > moved(1.0, 0.5, 0.6)
        True
    """
    change = max(-_FASTEST, min(_FASTEST, used / target - 1.0))
    return min(max(price * (1.0 + change), 1e-2), 1e2)


def quality(output: Tensor, targets: Tensor | None, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return how good each sample's answer is, 0 to 1, and its loss, both (N,).

    Args:
        output: The network's, for N samples.
        targets: Classes (N,), for outputs (N, C).
        reference: Without targets: the output of the network with all blocks, with which the answers should agree.
    """
    output = output.detach().float()
    if targets is not None:
        return (output.argmax(1) == targets).float(), F.cross_entropy(output, targets, reduction="none")
    assert reference is not None, "there are targets or a reference"
    classes = 1 if output.dim() > 3 else -1
    agree = (output.argmax(classes) == reference.argmax(classes)).float().flatten(1 if output.dim() > 2 else 0)
    right = agree if agree.dim() == 1 else agree.mean(1)
    return right, 1.0 - right
