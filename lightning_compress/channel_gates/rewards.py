"""What the gates that choose groups of channels learn from: rewards for right answers from few groups.

For the T gated layers of a sample, with a_t of k groups kept, and the error e of its answer:

    r_t = - price a_t / (k T)        r_T is less e as well
    loss of the agent = mean of (q_t(a_t) - r_t - max q_{t+1})^2

e is half the sum of |N dL/dz| over the sample's outputs z, with the user's loss L, a mean over N samples: for a
cross-entropy that is 1 - p of the right class. The price rises while more than the share is kept, and falls otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.channel_gates.kinds import GroupGate
from lightning_compress.core.distributed import all_reduce_sum, world_size

_STEP = 0.1  # of the price


def errors(loss: Tensor, outputs: Tensor) -> Tensor:
    """Return how wrong the output for each sample is: half of the sum of the loss's gradient in it, times the samples.

    Raises:
        ValueError: The loss does not depend on the outputs.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 100.0]], requires_grad=True)
        >>> errors(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])), logits).round(decimals=4)
        tensor([0.5000, 0.0000])
    """
    gradient = None
    if outputs.requires_grad and loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "The loss of the training_step does not depend on the output of the network, so that there are no rewards "
            "to learn from: pass output= with what picks the logits, or network= with the submodule that returns them, "
            "or use train='gradient'."
        )
    return 0.5 * len(gradient) * gradient.detach().float().abs().flatten(1).sum(1)


class Agent:
    """Learns the values of keeping groups.

    Attributes:
        price: Of keeping all channels.
    """

    def __init__(self) -> None:
        self.price = 0.0

    def loss(self, gates: Sequence[GroupGate], seen: Sequence[tuple[Tensor, Tensor]], wrong: Tensor) -> Tensor:
        """Return the agent's loss.

        Args:
            gates: In the order in which they ran.
            seen: The values and the choices of each.
            wrong: The error of each sample's answer.
        """
        total, following = wrong.new_zeros(()), -wrong
        for gate, (values, kept) in reversed(list(zip(gates, seen, strict=True))):
            chosen = gate.chosen(kept)
            groups = values.shape[1]
            reward = following - self.price * (chosen + 1) / (groups * len(gates))
            mine = values.gather(1, chosen[:, None])[:, 0]
            total = total + (mine - reward).square().mean()
            following = values.detach().amax(1)
        return total / len(gates)

    def pay(self, seen: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
        """Change the price by how much more than the share of the channels all ranks have kept."""
        kept = torch.stack([mask.float().mean() for _, mask in seen]).mean()
        mean = float(all_reduce_sum(kept)) / world_size()
        self.price = max(0.0, self.price + _STEP * (mean - share))
