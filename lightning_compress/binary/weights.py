"""Binary weights in a training loop: signs for the forward and backward pass, real values for the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.binary.signs import (
    Mode,
    Scaling,
    binarize,
    check_binary,
    draw_positive,
    glorot_coefficient,
    real_gradient,
)
from lightning_compress.core.latent import LatentWeights
from lightning_compress.core.select import select_parameters

LRScale = Literal["none", "glorot"]


class BinaryWeights(LatentWeights):
    """Parameters that hold binary weights between steps, while their real values train.

    Weights that are exactly zero when they come here, or that something else sets to zero later, have been pruned: they
    stay zero.

    Args:
        model: The network that holds the parameters.
        names: The parameters, by qualified name; `binarize_weights` takes patterns.
        mode: "deterministic" for the sign of the real weight, "stochastic" for a sample, drawn anew at every step, in
            which +1 has the probability hard_sigmoid(w).
        scaling: "none" for -1 and +1, "mean" for the mean of |w| over the output channel times that.
        clip: After a step the real weights are clipped to -clip .. clip; None: not.
        lr_scale: "glorot" divides every step of the real weights by `glorot_coefficient`; "none" does not. It works on
            what the optimizer did, so it is the same for SGD and Adam.
        generator: A CPU generator for the samples, by default torch's own.

    Attributes:
        latent: As in `LatentWeights`, and `alive`.
        positive: In mode="stochastic" the sample in force: True for +1.

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
        check_binary(mode, scaling, lr_scale, clip)
        self.mode: Mode = mode
        self.scaling: Scaling = scaling
        self.clip = clip
        self.lr_scale: LRScale = lr_scale
        self.generator = generator
        self.positive: dict[str, Tensor] = {}
        self._deterministic = False  # whether the signs are shown in place of a sample
        super().__init__(model, names)

    def agree(self, held: Tensor, expected: Tensor) -> bool:
        # By signs and zeros: scales are older than the real values where channels have been cut since the last step.
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
        """Return the fraction of the real values that lie at the clip, or beyond 1 without one."""
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
        # A sample that was loaded is what other code wants, where it agrees with the last one as well.
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
    """Make weights of a model binary, in place, for a training loop of one's own.

    Args:
        model: The network.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution.
        exclude: Patterns to leave out.
        mode: As for `BinaryWeights`.
        scaling: Likewise.
        clip: Likewise.
        lr_scale: Likewise.
        generator: Likewise.

    Raises:
        ValueError: As `BinaryWeights`, or the patterns select nothing.

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
