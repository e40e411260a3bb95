"""Group lasso: a penalty that drives whole groups of weights to zero together.

    R(w) = strength * sum over groups g of ||w_g||_2

    gradient    strength * w_g / ||w_g||                               at ||w_g|| = 0 the subgradient 0
    proximal    w_g <- w_g * max(0, 1 - lr * strength / ||w_g||)       exact zeros

The norms are summed without weights, as in structured sparsity learning (Wen et al. 2016, section 3.1). Regression
weights them with the square root of the group's size (Yuan and Lin 2006); but torch initializes weights so that a
filter's norm does not depend on its size, and the same strength then has the same effect on the filters of all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroup, Member
from lightning_compress.core.select import output_blocks, select_parameters

WeightGranularity = Literal["filter", "channel", "shape"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Part:
    """The slices of one parameter that belong to some groups.

    Attributes:
        parameter: The parameter.
        blocks: The number of equal blocks along the first dimension, in a view of the parameter: (blocks, ..., ...).
        along: The dimensions of that view along which the groups differ.
        index: The k positions of each group along these dimensions, shape (size, k); None if every position is a
            group.
        shape: The parameter's shape when the groups were found.
    """

    parameter: nn.Parameter
    blocks: int
    along: tuple[int, ...]
    index: Tensor | None
    shape: torch.Size

    def view(self, tensor: Tensor) -> Tensor:
        """Return the view in blocks of a tensor of the parameter's shape."""
        shape = (self.blocks, tensor.shape[0] // self.blocks, *tensor.shape[1:])
        return tensor.view(shape)

    def squares(self) -> Tensor:
        """Return the sum of squares within every group: shape (size,)."""
        w = self.view(self.parameter)
        w = w.float() if w.dtype in (torch.float16, torch.bfloat16) else w
        others = [dim for dim in range(w.dim()) if dim not in self.along]
        positions = (w.square().sum(others) if others else w.square()).flatten()
        return positions if self.index is None else positions[self.index].sum(1)

    def spread(self, factors: Tensor, *, elsewhere: float) -> Tensor:
        """Return every entry's factor, that of its group or `elsewhere`, in a shape that broadcasts over the view."""
        view = self.view(self.parameter)
        shape = [size if dim in self.along else 1 for dim, size in enumerate(view.shape)]
        if self.index is not None:
            positions = factors.new_full((view.shape[self.along[0]],), elsewhere)
            positions[self.index.flatten()] = factors.repeat_interleave(self.index.shape[1])
            factors = positions
        return factors.view(shape)


@dataclass(frozen=True, eq=False)
class WeightGroups:
    """Groups of weights of one kind, such as the filters of a layer. Each group is a slice of every part."""

    name: str
    parts: tuple[Part, ...]

    def squares(self) -> Tensor:
        """Return the squared norm of every group: shape (size,)."""
        total = self.parts[0].squares()
        for part in self.parts[1:]:
            total = total + part.squares()
        return total

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the norm of every group: shape (size,)."""
        return self.squares().sqrt()

    @property
    def stale(self) -> bool:
        """Whether a parameter has changed its shape since the groups were found."""
        return any(part.parameter.shape != part.shape for part in self.parts)


def weight_groups(
    model: nn.Module,
    granularity: WeightGranularity = "filter",
    *,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> list[WeightGroups]:
    """Divide every targeted weight, by itself, into groups.

    The layer's output is the weight's dimension 0 and its input dimension 1; in transposed convolutions it is the other
    way round. In a convolution with `groups=`, each block of filters has input channels and shapes of its own.

    Args:
        model: The network.
        granularity: "filter" groups all weights of an output channel, "channel" all weights that read an input channel,
            "shape" all weights at one position (input channel, row, column) of the filters; for a linear layer, a
            column.
        target: Patterns of modules (their `weight`) or parameters; by default every linear layer and convolution.
        exclude: Patterns to leave out.

    Raises:
        ValueError: The granularity is unknown, no parameter is left, or one is a vector, which has no slices.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(32, 10))
        >>> for granularity in ("filter", "channel", "shape"):
        ...     print(granularity, [len(one.norms()) for one in weight_groups(net, granularity)])
        filter [8, 10]
        channel [3, 32]
        shape [75, 32]
    """
    if granularity not in get_args(WeightGranularity):
        raise ValueError(f"granularity must be 'filter', 'channel' or 'shape'; got {granularity!r}.")
    owners = {id(p): module for module in model.modules() for p in module._parameters.values() if p is not None}
    found = []
    for name, parameter in select_parameters(model, target, exclude=exclude).items():
        if parameter.dim() < 2:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}: a vector has no filters, channels or shapes. Leave it out "
                f"of target={target!r}, or take granularity='group', where biases and norms belong to their channel."
            )
        owner = owners[id(parameter)]
        transposed = output_blocks(owner)
        output, inputs = (1, 2) if transposed is None else (2, 1)
        along = {
            "filter": (0, output),
            "channel": (0, inputs),
            "shape": tuple(dim for dim in range(parameter.dim() + 1) if dim != output),
        }[granularity]
        blocks = transposed or (owner.groups if isinstance(owner, _CONVOLUTIONS) else 1)
        found.append(WeightGroups(name, (Part(parameter, blocks, along, None, parameter.shape),)))
    return found


def producer_groups(
    model: nn.Module,
    channels: Iterable[ChannelGroup],
    *,
    target: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> tuple[list[WeightGroups], dict[str, str]]:
    """Make one group of all slices, in all tensors, that produce a channel; a channel of zeros can be cut out.

    A channel group is taken if `target` names one of the tensors that produce it and `exclude` names none of them.

    Args:
        model: The module that the tensors' names are relative to.
        channels: The groups that `lightning_compress.channel_groups` has found.
        target: As for `weight_groups`.
        exclude: As for `weight_groups`.

    Returns:
        The groups, and by name the reasons why other targeted channel groups are not among them.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> groups, left_out = producer_groups(net, channel_groups(net, torch.zeros(2, 1, 4, 4)))
        >>> [(one.name, len(one.parts), len(one.norms())) for one in groups], left_out
        ([('0', 4, 4)], {'4': 'it is an output of the network'})
    """
    chosen = {id(parameter) for parameter in select_parameters(model, target, exclude=exclude).values()}
    named = {id(parameter) for parameter in select_parameters(model, target, warn=False).values()}  # warned above
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, left_out = [], {}
    for group in channels:
        producers = [member for member in group.members if member.produces]
        ids = {id(parameters.get(member.tensor)) for member in producers}
        if not ids & chosen or ids & (named - chosen):
            continue
        fixed = [member.tensor for member in producers if member.tensor not in parameters]
        if group.frozen is not None:
            left_out[group.name] = group.frozen
        elif not group.exact:
            left_out[group.name] = f"cutting it is inexact, because {group.note}"
        elif fixed:
            left_out[group.name] = f"{fixed[0]} produces it and is not trained"
        else:
            found.append(WeightGroups(group.name, tuple(_slices(parameters[one.tensor], one) for one in producers)))
    return found, left_out


def _slices(parameter: nn.Parameter, member: Member) -> Part:
    return Part(parameter, 1, (1 + member.dim,), member.index.to(parameter.device), parameter.shape)


def penalty(groups: Iterable[WeightGroups], strength: float) -> Tensor:
    """Compute R(w) = strength * sum_g ||w_g||_2, to be added to a loss.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> value = penalty(weight_groups(layer), 0.1)
        >>> value.backward(); value.item(), layer.weight.grad
        (0.5, tensor([[0.0600, 0.0800],
                [0.0000, 0.0000]]))
    """
    squares = torch.cat([one.squares() for one in groups])
    positive = squares > 0
    roots = squares.where(positive, torch.ones_like(squares)).sqrt()  # sqrt has no gradient at 0
    return strength * roots.where(positive, torch.zeros_like(roots)).sum()


@torch.no_grad()
def add_gradient(
    groups: Iterable[WeightGroups], strength: float, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Add the penalty's gradient, strength * w_g / ||w_g||, to the gradients of the loss.

    Call it between the last backward pass and the optimizer's step. A parameter without a gradient gets none, because
    no optimizer steps it.

    Args:
        groups: From `weight_groups` or `producer_groups`.
        strength: Factor of the penalty.
        optimizer: The optimizer whose parameters get the gradient; by default all parameters do.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> layer(torch.zeros(1, 2)).sum().backward()
        >>> add_gradient(weight_groups(layer), 0.1); layer.weight.grad
        tensor([[0.0600, 0.0800],
                [0.0000, 0.0000]])
        >>> optimizer.step()
    """
    if strength == 0:
        return
    mine = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    for one in groups:
        norms = one.norms()
        factors = torch.where(norms > 0, strength / norms, 0.0)
        for part in one.parts:
            parameter = part.parameter
            if parameter.grad is not None and (mine is None or id(parameter) in mine):
                part.view(parameter.grad).add_(part.view(parameter) * part.spread(factors, elsewhere=0.0))


@torch.no_grad()
def shrink_groups(groups: Iterable[WeightGroups], strength: float, optimizer: torch.optim.Optimizer) -> None:
    """Shrink every group by the proximal step, w_g <- w_g * max(0, 1 - lr * strength / ||w_g||).

    Call it after the optimizer's step, before the gradients are cleared: a parameter without a gradient was not
    stepped, and is not shrunk. lr is the learning rate of the parameter's group in the optimizer, independent of how
    the optimizer scales gradients. The new group is the minimiser v of 0.5 ||v - w_g||^2 + lr * strength * ||v||, which
    is exactly zero if ||w_g|| <= lr * strength.

    Args:
        groups: From `weight_groups` or `producer_groups`. Groups that share weights shrink one after the other.
        strength: Factor of the penalty.
        optimizer: The optimizer that has stepped; only its parameters are shrunk.

    Raises:
        ValueError: The optimizer has no `lr`.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.tensor([[3.0, 4.0], [0.03, 0.04]])
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> layer(torch.zeros(1, 2)).sum().backward()
        >>> optimizer.step(); shrink_groups(weight_groups(layer), 1.0, optimizer); layer.weight.data
        tensor([[2.9400, 3.9200],
                [0.0000, 0.0000]])
    """
    if strength == 0:
        return
    rates: dict[int, float | Tensor] = {}
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise ValueError(f"The proximal step needs a learning rate, and {type(optimizer).__name__} has no 'lr'.")
        rates |= {id(p): group["lr"] for p in group["params"]}
    for one in groups:
        stepped = [part for part in one.parts if part.parameter.grad is not None and id(part.parameter) in rates]
        if stepped:
            norms = one.norms()
        for part in stepped:
            step = rates[id(part.parameter)] * strength
            factors = torch.where(norms > step, 1 - step / norms, 0.0)
            part.view(part.parameter).mul_(part.spread(factors, elsewhere=1.0))
