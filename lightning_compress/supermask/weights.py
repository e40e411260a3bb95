"""Supermasks for a training loop: the passes use masked weights that never change, and the optimizer steps scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_compress.core.by_channel import by_channel
from lightning_compress.core.latent import LatentWeights
from lightning_compress.core.masking import keep_
from lightning_compress.core.seeded import masked
from lightning_compress.supermask.masks import (
    GAIN,
    Method,
    below,
    check_method,
    entries_kept,
    first_scores,
    largest,
    sampled,
    score_gradient_,
)

_SURE = 1e-3  # probabilities are at least this far from 0 and 1 when scores are made from an average of samples


class SupermaskWeights(LatentWeights):
    """Parameters that hold masked weights between steps, while the optimizer trains the scores of their mask.

    The weights from before never change. Weights that are exactly zero at the start, or that other code sets to zero
    later, never remain. Other nonzero values that other code writes replace the weights, not the scores.

    Args:
        model: The network that holds the parameters.
        amounts: For each parameter, by name, the fraction to remove; of "bernoulli" it is the fraction at the start.
        method: "edge_popup", "bernoulli" or "signed".
        per_kept: Whether the remaining weights are multiplied by (entries / remaining entries) of their layer.
        frozen: Names of parameters that keep their values: their gradients are discarded before every step.
        generator: A CPU generator for the first scores and the samples; by default torch's own.

    Attributes:
        latent: The scores, by name.
        initial: The weights, by name.
        masks: The int8 masks, by name: 1 for a weight that remains, -1 for one that is inverted, else 0.
        thresholds: Of "bernoulli", a random number for each entry, by name: the fixed mask has the entries whose
            probability is above it, which makes it one sample that changes only with the scores.
        alive: For each parameter with pruned weights, a boolean tensor that is False at these.

    Raises:
        ValueError: The method is unknown, a parameter is a vector, or every entry of a parameter is zero.

    Example:
        >>> net = nn.Linear(4, 1, bias=False)
        >>> net.weight.data = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        >>> supermask = SupermaskWeights(net, {"weight": 0.5})
        >>> int(net.weight.count_nonzero())
        2
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     (net(torch.tensor([1.0, 2.0, 3.0, 4.0])) + 6.0).square().mean().backward()
        ...     supermask.open(); optimizer.step(); supermask.close()
        >>> net.weight.data  # the sum of two weighted inputs that is nearest to -6
        tensor([[ 0., -1.,  0., -1.]])
    """

    def __init__(
        self,
        model: nn.Module,
        amounts: Mapping[str, float],
        *,
        method: Method = "edge_popup",
        per_kept: bool = False,
        frozen: Collection[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        check_method(method)
        self.amounts = dict(amounts)
        self.method: Method = method
        self.per_kept = per_kept
        self.generator = generator
        self.initial: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.thresholds: dict[str, Tensor] = {}
        self._fixed = False  # whether the module holds the fixed masks of Bernoulli scores instead of samples
        parameters = dict(model.named_parameters())
        self.frozen = [parameters[name] for name in frozen]
        for name in amounts:
            if parameters[name].dim() < 2:
                raise ValueError(
                    f"{name} has the shape {tuple(parameters[name].shape)}: a supermask is for the weights of linear "
                    f"layers and convolutions. Leave it out of target."
                )
            if not bool(parameters[name].any()):
                raise ValueError(
                    f"Every entry of {name} is zero, so that no mask makes it compute anything: exclude it, or use "
                    f"init='signed_constant'."
                )
        super().__init__(model, list(amounts))

    # ------------------------------------------------------------------ masks

    def mask(self, name: str, scores: Tensor, *, fixed: bool = False) -> Tensor:
        """Return the mask of some scores; a fixed one instead of a sample if `fixed`."""
        alive = self._alive(name, scores)
        if self.method == "bernoulli":
            found = below(scores, self._thresholds(name, scores)) if fixed else sampled(scores, self.generator)
        else:
            kept = entries_kept(self.amounts[name], scores.numel())
            found = largest(scores, kept, signs=self.method == "signed", alive=alive)
        if alive is not None:
            keep_(found, alive)
        return found

    def left(self) -> float:
        """Return the fraction of the weights that remains."""
        masks = [self.mask(name, one, fixed=True) for name, one in self.latent.items()]
        return sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)

    def inverted(self) -> float:
        """Return the fraction of the remaining weights that is inverted."""
        left = sum(int(mask.count_nonzero()) for mask in self.masks.values())
        return sum(int((mask < 0).sum()) for mask in self.masks.values()) / max(1, left)

    # ------------------------------------------------------------------ what the base class asks for

    def value(self, name: str, real: Tensor) -> Tensor:
        if self._fixed:
            return self.shown_value(name, self.latent[name])
        return self._masked(name, self.masks[name], real)

    def shown_value(self, name: str, real: Tensor) -> Tensor:
        return self._masked(name, self.mask(name, real, fixed=True), real)

    def shown(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if tensors is None:
            return super().shown()
        known = {name: value.detach() for name, value in tensors.items() if name in self.latent}
        return {name: self.shown_value(name, self._scores_of(name, value)) for name, value in known.items()}

    def real_gradient(self, name: str, gradient: Tensor) -> None:
        weights = self.initial[name].to(gradient)
        score_gradient_(self.method, gradient, weights, self.latent[name])
        if self.per_kept:
            gradient.mul_(gradient.numel() / max(1, int(self.masks[name].count_nonzero())))
        super().real_gradient(name, gradient)

    def open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Restore the scores, and turn gradients into those of the scores; discard those of frozen parameters."""
        super().open(optimizer)
        self._fixed = False
        groups = [] if optimizer is None else optimizer.param_groups
        stepped = {id(one) for group in groups for one in group["params"]}
        for parameter in self.frozen:
            if optimizer is None or id(parameter) in stepped:
                parameter.grad = None

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._fixed = False
        super().load_state_dict(state)

    @property
    def is_shown(self) -> bool:
        return self.method == "bernoulli" and self._fixed

    @torch.no_grad()
    def take_real(self) -> None:
        """Store scores with whose fixed mask the module holds what is nearest to its present values, an average."""
        for name, parameter in self.parameters.items():
            self.latent[name].copy_(self._scores_of(name, parameter.detach()))
            self._renew(name)
        self.rewrite()

    @contextmanager
    def real(self) -> Iterator[None]:
        """Temporarily put all weights that the masks choose from into the module."""
        self.settle()
        self.take_writes()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.initial[name])
        try:
            yield
        finally:
            self.rewrite()

    def _begin(self, name: str) -> None:
        weights = self.latent[name].clone()
        self.initial[name] = weights
        channels = by_channel(weights.contiguous(), self._groups.get(name))
        fan_in = channels.shape[1] * channels.shape[3]
        scores = first_scores(self.method, weights, amount=self.amounts[name], fan_in=fan_in, generator=self.generator)
        self.latent[name].copy_(scores)
        if self.method == "bernoulli":
            drawn = torch.rand(weights.shape, dtype=torch.float32, generator=self.generator)
            self.thresholds[name] = drawn.to(weights.device)
        if name in self.alive:
            keep_(self.latent[name], self.alive[name])

    def _renew(self, name: str) -> None:
        self.masks[name] = self.mask(name, self.latent[name])

    def _take(self, name: str, held: Tensor, expected: Tensor, changed: Tensor) -> None:
        if name in self.alive:
            changed = changed & self.alive[name]
        written = changed & (held != 0)
        if bool(written.any()):
            self.initial[name] = torch.where(written, held, self.initial[name])
        else:
            self.zero_latent(name, changed)

    def _show_samples(self, shown: bool) -> None:
        self._fixed = not shown

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        return {"initial": self.initial, "masks": self.masks, "thresholds": self.thresholds}

    def _thresholds(self, name: str, like: Tensor) -> Tensor:
        return self.thresholds[name].to(like.device)

    def _masked(self, name: str, mask: Tensor, like: Tensor) -> Tensor:
        weights, alive = self.initial[name].to(like.device), self._alive(name, like)
        values = masked(weights, mask.to(like.device), per_kept=self.per_kept)
        if alive is not None:
            keep_(values, alive)
        return values

    def _scores_of(self, name: str, average: Tensor) -> Tensor:
        """Return scores for an average of masked weights: the share of the time that each weight remained."""
        weights = self.initial[name].to(average.device)
        shares = torch.where(weights == 0, 0.0, average / weights)
        if self.per_kept and name in self.masks:  # the average has the factor of the remaining weights
            shares = shares * (int(self.masks[name].count_nonzero()) / self.masks[name].numel())
        if self.method != "bernoulli":
            return shares
        return torch.logit(shares.float().clamp(_SURE, 1 - _SURE)).div_(GAIN).to(average.dtype)
