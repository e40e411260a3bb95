"""Criteria that score a channel by its activation, its output after the non-linearity.

Shape suffixes: B samples, C channels. Positions are pixels, frames or tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.channels.groups import Member
from lightning_compress.pruning.channels import Channels, channel_sums
from lightning_compress.pruning.criteria.activation_trace import Activation, ActivationTrace
from lightning_compress.pruning.criteria.statistic import Statistic


class ActivationStatistic(Statistic):
    """Watches the activations of layers; a subclass measures each of them in ``observe``.

    Args:
        model: The module that the layers' names are relative to.
        channels: The layers' channels; frozen ones are left out.
    """

    needs: ClassVar[str] = "activations"

    def __init__(self, model: nn.Module, channels: Sequence[Channels]) -> None:
        super().__init__()
        self._channels = [layer for layer in channels if layer.frozen is None]
        sizes = {
            _layer(model, layer, member): int(model.get_parameter(member.tensor).shape[member.dim])
            for layer in self._channels
            for member in layer.weights
        }
        self._trace = ActivationTrace(model, list(sizes), on_activation=self.observe)
        self._batch: list[tuple[str, Tensor, int]] = []  # the sums of this batch, until all of it is known to be finite
        self._limits: list[Tensor] = []  # the extreme values of this batch, and its loss
        for name, size in sizes.items():
            self.track(name, model.get_parameter(f"{name}.weight").new_zeros(size))

    def by_group(self, of_layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum the scores of a channel over the layers of its group, as costs are summed."""
        return {
            layer.name: torch.stack(
                [channel_sums(of_layers[one.tensor.removesuffix(".weight")], one) for one in layer.weights]
            ).sum(0)
            for layer in self._channels
        }

    def observe(self, activation: Activation) -> None:
        """Measure an activation during the forward pass, and call `note`."""
        raise NotImplementedError

    def note(self, layer: str, total: Tensor, count: int, *, of: Tensor) -> None:
        """Note what this batch adds to a layer's sum, and the tensor from which that was computed."""
        self._batch.append((layer, total, count))
        if of.numel() > 0:
            self._limits.append(torch.stack(torch.aminmax(of)))

    def begin(self) -> None:
        self.end()
        self._trace.begin()

    def before_backward(self, loss: Tensor) -> None:
        self._trace.end()
        self._limits.append(loss.detach())

    def end(self) -> None:
        self._trace.discard()
        super().end()
        batch, limits, self._batch, self._limits = self._batch, self._limits, [], []
        for layer, total, count in batch if batch and self.finite(limits) else ():
            self.add(layer, total, count)


class Apoz(ActivationStatistic):
    """Share of a channel's activations that are not zero: one minus the average percentage of zeros (APoZ).

        score_c = 1 - #{(n, p) : a_cnp = 0} / (B P)

    with a_cnp the activation of channel c for sample n at position p, after the non-linearity. The
    score distinguishes channels only after a non-linearity that makes zeros, such as relu; a warning names the layers
    in which no activation was zero.

    Args:
        model: The module that the layers' names are relative to.
        channels: The layers' channels; frozen ones are left out.

    References:
        Hu et al. 2016, "Network Trimming", section 3.1.

    >>> from lightning_compress.pruning.channels import find_channels
    >>> from lightning_compress.pruning.criteria.statistic import estimate
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> x = torch.tensor([[1.0], [2.0], [3.0], [-4.0]])
    >>> estimate(Apoz(net, find_channels(net, x, ["0.weight"])), net, lambda net, x: net(x).mean(), [x])
    {'0': tensor([0.7500, 0.2500])}
    """

    criterion: ClassVar[str] = "apoz"

    def __init__(self, model: nn.Module, channels: Sequence[Channels]) -> None:
        super().__init__(model, channels)
        self._warned = False

    @torch.no_grad()
    def observe(self, activation: Activation) -> None:
        a, others = _batched(activation)
        self.note(activation.layer, a.count_nonzero(others), a.numel() // a.shape[activation.dim], of=a)

    def scores(self) -> dict[str, Tensor]:
        scores = self.means()
        dense = [name for name, score in scores.items() if bool((score == 1).all())]
        if dense and not self._warned:
            self._warned = True
            warnings.warn(
                f"criterion 'apoz' counts zeros, but no activation of {', '.join(dense)} was ever zero, so that all "
                "their channels look equally important: use a criterion such as 'mean_activation' or 'taylor' after "
                "non-linearities that make no zeros",
                stacklevel=2,
            )
        return self.by_group(scores)


class MeanActivation(ActivationStatistic):
    """Mean absolute activation of a channel.

        score_c = sum_np |a_cnp| / (B P)

    with a_cnp the activation of channel c for sample n at position p, after the non-linearity.

    Args:
        model: The module that the layers' names are relative to.
        channels: The layers' channels; frozen ones are left out.

    References:
        Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.

    >>> from lightning_compress.pruning.channels import find_channels
    >>> from lightning_compress.pruning.criteria.statistic import estimate
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> net[0].weight.data = torch.tensor([[1.0], [-1.0]])
    >>> x = torch.tensor([[1.0], [2.0], [3.0], [-4.0]])
    >>> estimate(MeanActivation(net, find_channels(net, x, ["0.weight"])), net, lambda net, x: net(x).mean(), [x])
    {'0': tensor([1.5000, 1.0000])}
    """

    criterion: ClassVar[str] = "mean_activation"

    @torch.no_grad()
    def observe(self, activation: Activation) -> None:
        a, others = _batched(activation)
        total = torch.linalg.vector_norm(a, 1, others, dtype=_wide(a))
        self.note(activation.layer, total, a.numel() // a.shape[activation.dim], of=total)

    def scores(self) -> dict[str, Tensor]:
        return self.by_group(self.means())


class TaylorChannel(ActivationStatistic):
    """First-order estimate of how much the loss changes when a channel is silenced.

        theta_c = 1/B sum_n | 1/P sum_p a_cnp dL/da_cnp |        score_c = theta_c / ||theta||_2, layer by layer

    with a_cnp the activation of channel c for sample n at position p, after the non-linearity, and L the loss as it is
    back-propagated. It stays a mean over the batch, so that batches of different sizes count alike.

    Args:
        model: The module that the layers' names are relative to.
        channels: The layers' channels; frozen ones are left out.

    Raises:
        ValueError: An activation was modified in place after the non-linearity; raised in the backward pass.

    References:
        Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section 2.

    >>> from lightning_compress.pruning.channels import find_channels
    >>> from lightning_compress.pruning.criteria.statistic import estimate
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> net[0].weight.data, net[2].weight.data = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 2.0]])
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> estimate(TaylorChannel(net, find_channels(net, x, ["0.weight"])), net, lambda net, x: net(x).mean(), [x])
    {'0': tensor([0.6000, 0.8000])}
    """

    criterion: ClassVar[str] = "taylor"
    needs: ClassVar[str] = "gradients of activations"

    def observe(self, activation: Activation) -> None:
        if activation.tensor.requires_grad:
            hook = partial(self._add_products, activation)
            self.handles.append(activation.tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _add_products(self, activation: Activation, gradient: Tensor) -> None:
        activation.check_unmodified()
        a, others = _batched(activation)
        products = a.to(_wide(a)) * gradient
        theta_BC = products.mean(others[1:]) if others[1:] else products
        total = theta_BC.abs().sum(0)
        self.note(activation.layer, total, len(theta_BC), of=total)

    def scores(self) -> dict[str, Tensor]:
        tiny = torch.finfo(torch.float32).tiny
        return self.by_group({name: theta / theta.norm().clamp_min(tiny) for name, theta in self.means().items()})


def _layer(model: nn.Module, channels: Channels, member: Member) -> str:
    """Return the name of the layer in whose activation the channels are seen."""
    name = member.tensor.removesuffix(".weight")
    layer = model.get_submodule(name) if name != member.tensor else None
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and not (layer.transposed and layer.groups > 1))
    if not plain:
        raise ValueError(
            f"The channels of {channels.name!r} are made by {member.tensor}, and no activation shows them one by one: "
            f"that is known for linear layers, and for convolutions that are not both transposed and grouped. Choose "
            f"magnitude, l2 or random, or exclude it."
        )
    return name


def _batched(activation: Activation) -> tuple[Tensor, tuple[int, ...]]:
    """Return the activation with at least one dimension besides that of the channels, and those dimensions."""
    a = activation.tensor if activation.tensor.dim() > 1 else activation.tensor.unsqueeze(0)
    return a, tuple(dim for dim in range(a.dim()) if dim != activation.dim % a.dim())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
