"""Binary weights in a training loop: signs for the forward and backward pass, real values for the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.core.select import select_parameters
from lightning_compress.core.slicing import Kept
from lightning_compress.core.swap import Projection
from lightning_compress.quantization.signs import (
    Mode,
    Scaling,
    binarize,
    by_channel,
    channel_scales,
    check_binary,
    draw_positive,
    glorot_coefficient,
    real_gradient,
    transposed_groups,
)

LRScale = Literal["none", "glorot"]


class BinaryWeights(Projection):
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
        latent: The real values, by name; zero where a weight is pruned.
        alive: For parameters with pruned weights: False where they are.
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
        parameters = dict(model.named_parameters())
        super().__init__({name: parameters[name] for name in names}, self._binarize, keep_latent=True)
        self.mode: Mode = mode
        self.scaling: Scaling = scaling
        self.clip = clip
        self.lr_scale: LRScale = lr_scale
        self.generator = generator
        self.alive: dict[str, Tensor] = {}
        self.positive: dict[str, Tensor] = {}
        self._groups = transposed_groups(model)
        self._deterministic = False  # whether the signs are shown in place of a sample
        self.check_finite()
        for name, latent in self.latent.items():
            self._leave_out(name, latent == 0)
            self._draw(name)
        self._rewrite(self.parameters)

    # ------------------------------------------------------------------ around the optimizer's step

    def open(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the real values back, and their gradients in the place of the binary weights'."""
        self.settle()
        self.take_zeros()
        self._deterministic = False
        super().open(optimizer)
        for name, parameter in self._open.items():
            if parameter.grad is not None and (self.scaling == "mean" or name in self.alive):
                parameter.grad.copy_(real_gradient(parameter.grad, self.latent[name], **self._how(name)))

    def _keep(self, name: str, parameter: nn.Parameter) -> None:
        latent = self.latent[name]
        if self.lr_scale == "glorot":
            latent.lerp_(parameter, 1 / glorot_coefficient(parameter.shape))
        else:
            latent.copy_(parameter)
        if self.clip is not None:
            latent.clamp_(-self.clip, self.clip)
        if name in self.alive:
            latent.mul_(self.alive[name])
        parameter.copy_(latent)
        self._draw(name)

    # ------------------------------------------------------------------ what the module holds

    def project(self) -> None:
        """Put the binary weights into the module: in mode="stochastic" the sample in force."""
        self._deterministic = False
        self.take_zeros()
        super().project()

    def show_signs(self) -> None:
        """Put the deterministic binary weights into the module, until `project` or the next step."""
        self.settle()
        self.take_zeros()
        self._deterministic = True
        self._rewrite(self.parameters)

    @torch.no_grad()
    def take_real(self) -> None:
        """Take what the module holds, such as an average, as the real values; the caller then projects."""
        for name, parameter in self.parameters.items():
            self.latent[name].copy_(parameter)
            if name in self.alive:
                self.latent[name].mul_(self.alive[name])

    @contextmanager
    def real(self) -> Iterator[None]:
        """Have the real values in the module, and afterwards again what it held."""
        self.settle()
        self.take_zeros()
        self._restore(self.parameters)
        try:
            yield
        finally:
            self._rewrite(self.parameters)

    def holds(self) -> bool:
        """Whether the module holds these binary weights, the deterministic ones or the sample.

        Signs and zeros tell: scales are older than the real values where channels have been cut since the last step.
        """
        return all(
            torch.equal(parameter.detach().sign(), self._binary(name, self.latent[name]).sign())
            for name, parameter in self.parameters.items()
        )

    def signs(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the deterministic binary weights of the real values, or of other tensors with these names."""
        given = self.latent if tensors is None else tensors
        return {
            name: binarize(value.detach(), **self._how(name, value))
            for name, value in given.items()
            if name in self.parameters
        }

    @torch.no_grad()
    def take_zeros(self) -> None:
        """Let weights that have become exactly zero stay so for good: something has pruned them."""
        for name, parameter in self.parameters.items():
            if name in self._open:
                continue
            known = 0 if name not in self.alive else self.alive[name].numel() - int(self.alive[name].count_nonzero())
            if parameter.numel() - int(parameter.count_nonzero()) == known:
                continue
            gone = parameter == 0
            if self.scaling == "mean":  # a channel of real zeros, which may still train
                alpha = channel_scales(self.latent[name], groups=self._groups.get(name), alive=self.alive.get(name))
                by_channel(gone, self._groups.get(name)).logical_and_(alpha != 0)
            self._leave_out(name, gone)

    def check_finite(self) -> None:
        """Raise a ValueError where a real value is NaN or infinite: its sign would hide that."""
        for name, latent in self.latent.items():
            if not bool(latent.isfinite().all()):
                count = latent.numel() - int(latent.isfinite().sum())
                raise ValueError(f"NaN or infinite: {count} of {latent.numel()} real values of {name} have no sign.")

    def saturated(self) -> float:
        """Return the fraction of the real values that lie at the clip, or beyond 1 without one."""
        bound = 1.0 if self.clip is None else self.clip
        count = sum(int((latent.abs() >= bound).sum()) for latent in self.latent.values())
        return count / sum(latent.numel() for latent in self.latent.values())

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what a resume needs, apart from the generator's state."""
        self.take_zeros()
        return {"latent": self.latent, "alive": self.alive, "positive": self.positive}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from a `state_dict`, and put its binary weights into the module."""
        devices = {name: parameter.device for name, parameter in self.parameters.items()}
        # The state may be that of a callback that goes on, whose tensors another fit must not change.
        self.latent = {name: state["latent"][name].detach().clone().to(devices[name]) for name in self.parameters}
        self.alive = {name: mask.clone().to(devices[name]) for name, mask in state["alive"].items()}
        self.positive = {name: sample.clone().to(devices[name]) for name, sample in state["positive"].items()}
        self._deterministic, self._open = False, {}
        self._rewrite(self.parameters)

    def follow_cut(self, model: nn.Module, kept: Kept) -> None:
        """Slice what belongs to parameters that have been sliced; `kept` has the positions that stayed."""
        for tensors in (self.latent, self.alive, self.positive):
            for name in tensors.keys() & kept.keys():
                for dim, positions in kept[name].items():
                    tensors[name] = tensors[name].index_select(dim, positions.to(tensors[name].device))
        self._groups = transposed_groups(model)

    # ------------------------------------------------------------------ in detail

    def _binarize(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(self._binary(name, tensor))

    def _binary(self, name: str, real: Tensor) -> Tensor:
        sample = None if self._deterministic else self.positive.get(name)
        return binarize(real, positive=sample, **self._how(name))

    def _how(self, name: str, like: Tensor | None = None) -> dict[str, Any]:
        alive = self.alive.get(name)
        if alive is not None and like is not None:
            alive = alive.to(like.device)
        return {"scaling": self.scaling, "groups": self._groups.get(name), "alive": alive}

    def _draw(self, name: str) -> None:
        if self.mode == "stochastic":
            self.positive[name] = draw_positive(self.latent[name], self.generator)

    def _leave_out(self, name: str, gone: Tensor) -> None:
        if bool(gone.any()):
            self.alive[name] = ~gone if name not in self.alive else self.alive[name] & ~gone
            self.latent[name].masked_fill_(gone, 0.0)


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
