"""Binary weights for a training loop: the passes use signs, and the optimizer steps latent real weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.binary.signs import (
    LRScale,
    Mode,
    Scaling,
    binarize,
    check_binary,
    checked_clip,
    draw_positive,
    glorot_coefficient,
    real_gradient,
)
from lightning_compress.core.latent import LatentWeights
from lightning_compress.core.select import select_parameters


class BinaryWeights(LatentWeights):
    """Parameters that hold binary weights between steps, while the optimizer trains their latent real values.

    Weights that are exactly zero at the start, or that other code sets to zero later, count as pruned: they stay zero.

    Args:
        model: The network that holds the parameters.
        names: The qualified names of the parameters. (`binarize_weights` takes patterns.)
        mode: "deterministic" for the sign of the real weight; "stochastic" for a sample, drawn anew at every step, in
            which +1 has the probability hard_sigmoid(w).
        scaling: "none" for -1 and +1; "mean" for -a and +a, where a is the mean of |w| over the output channel.
        clip: The real weights are clipped to -clip .. clip after each step; None: they are not clipped.
        lr_scale: "glorot" divides every update of the real weights by `glorot_coefficient`, with any optimizer; "none"
            leaves the updates unchanged.
        generator: A CPU generator for the samples; by default torch's own.

    Attributes:
        latent: The real weights by name; zero where a weight is pruned.
        alive: For each parameter with pruned weights, a boolean tensor that is False at these.
        positive: The current sample of mode="stochastic" by name: True for +1.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> net.weight.data = torch.tensor([[0.3, -0.2, 0.0]])
        >>> binary = BinaryWeights(net, ["weight"])
        >>> net.weight.data  # the zero is a pruned weight
        tensor([[ 1., -1.,  0.]])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.tensor([[1.0, -4.0, 2.0]])).backward()
        >>> binary.open(); optimizer.step(); binary.close()
        >>> net.weight.data, binary.latent["weight"]
        (tensor([[1., 1., 0.]]), tensor([[0.2000, 0.2000, 0.0000]]))
        >>> with binary.real():
        ...     net.weight.data
        tensor([[0.2000, 0.2000, 0.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        mode: Mode = "deterministic",
        scaling: Scaling = "none",
        clip: float | None = 1.0,
        lr_scale: LRScale = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        check_binary(mode, scaling, lr_scale)
        checked_clip(clip)
        self.mode: Mode = mode
        self.scaling: Scaling = scaling
        self.clip = clip
        self.lr_scale: LRScale = lr_scale
        self.generator = generator
        self.positive: dict[str, Tensor] = {}
        self._deterministic = False  # whether the module holds signs instead of a sample
        super().__init__(model, names)

    def agree(self, held: Tensor, expected: Tensor) -> bool:
        # Scales are not compared: after a cut of channels, those in the module are out of date until the next step.
        return torch.equal(held.sign(), expected.sign())

    def value(self, name: str, real: Tensor) -> Tensor:
        sample = None if self._deterministic else self.positive.get(name)
        return binarize(real, positive=sample, **self._how(name, real))

    def shown_value(self, name: str, real: Tensor) -> Tensor:
        return binarize(real, **self._how(name, real))

    def real_gradient(self, name: str, gradient: Tensor) -> None:
        if self.scaling == "mean":
            gradient.copy_(real_gradient(gradient, self.latent[name], **self._how(name, gradient)))
        else:
            super().real_gradient(name, gradient)

    def open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().open(optimizer)
        self._deterministic = False

    def saturated(self) -> float:
        """Return the fraction of the real weights whose magnitude is at least `clip`, or at least 1 without a clip."""
        bound = 1.0 if self.clip is None else self.clip
        count = sum(int((latent.abs() >= bound).sum()) for latent in self.latent.values())
        return count / sum(latent.numel() for latent in self.latent.values())

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._deterministic = False
        super().load_state_dict(state)

    @property
    def is_shown(self) -> bool:
        return self.mode == "stochastic" and self._deterministic

    def _show_samples(self, shown: bool) -> None:
        self._deterministic = not shown

    def _rewritten(self, name: str, changed: Tensor, held: Tensor, expected: Tensor) -> Tensor:
        # Other code may have loaded a sample. Where it equals the current sample but not sign(w), it counts as written.
        return changed | (held.sign() != self.shown_value(name, self.latent[name]).sign())

    def _take_step(self, name: str, stepped: Tensor) -> None:
        latent = self.latent[name]
        if self.lr_scale == "glorot":
            latent.lerp_(stepped, 1 / glorot_coefficient(stepped.shape))
        else:
            latent.copy_(stepped)
        if self.clip is not None:
            latent.clamp_(-self.clip, self.clip)

    def _renew(self, name: str) -> None:
        if self.mode == "stochastic":
            self.positive[name] = draw_positive(self.latent[name], self.generator)

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        return {"positive": self.positive}

    def _how(self, name: str, like: Tensor) -> dict[str, Any]:
        return {"scaling": self.scaling, "groups": self._groups.get(name), "alive": self._alive(name, like)}


def binarize_weights(
    model: nn.Module,
    *,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    mode: Mode = "deterministic",
    scaling: Scaling = "none",
    clip: float | None = 1.0,
    lr_scale: LRScale = "none",
    generator: torch.Generator | None = None,
) -> BinaryWeights:
    """Make weights of a model binary, in place, for a training loop of your own.

    Args:
        model: The network.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution.
        exclude: Patterns of what stays real.
        mode: "deterministic" or "stochastic", as for `BinaryWeights`.
        scaling: "none" or "mean", as for `BinaryWeights`.
        clip: The bound of the real weights, or None, as for `BinaryWeights`.
        lr_scale: "none" or "glorot", as for `BinaryWeights`.
        generator: A CPU generator for the samples; by default torch's own.

    Raises:
        ValueError: An argument is out of range, a weight is NaN or infinite, or the patterns select nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> binary = binarize_weights(net, lr_scale="glorot")
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(16, 4)).square().mean().backward()
        ...     binary.open(); optimizer.step(); binary.close()
        >>> net[0].weight.abs().unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """
    names = list(select_parameters(model, target, exclude=exclude))
    return BinaryWeights(model, names, mode=mode, scaling=scaling, clip=clip, lr_scale=lr_scale, generator=generator)
