"""Put the important channels of every group first, so that a width keeps them: the same function in another order.

new weight[i] = weight[order[i]]     of everything that makes channel i, reads it, or holds a number of it
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import ChannelGroup, ChannelGroups, Member
from lightning_compress.channels.sandbox import doubles, sandbox
from lightning_compress.core.evaluation import renew_caches
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.outputs import TOLERANCE, compare, run
from lightning_compress.core.side_outputs import side_outputs
from lightning_compress.core.tensors import named_tensors
from lightning_compress.core.undo import as_before_on_error
from lightning_compress.slimmable.norms import norms_of

Criterion = Callable[[nn.Module, Sequence[ChannelGroup]], Mapping[str, Tensor]]
Named = Literal["magnitude"]
Order = Named | Criterion | None
Orders = Mapping[str, Tensor]  # by group: at each place, which channel comes there
log = logging.getLogger(__name__)


@torch.no_grad()
def sort_channels(
    network: nn.Module,
    groups: ChannelGroups,
    example_inputs: ExampleInputs,
    order: Order = "magnitude",
    *,
    allow_inexact: bool = False,
) -> list[str]:
    """Sort the channels of each free group, the most important one first, in place.

    The network computes the same as before; sums are in another order, so that outputs differ by rounding. A group
    whose order the network's code knows, as of channels that it pairs by position, stays as it is, which is logged: a
    trial with random weights in double precision finds out.

    Args:
        network: Its parameters stay the same objects; gradients are sorted too, and states of optimizers are not.
        groups: Of the network.
        example_inputs: As for `channel_groups`.
        order: "magnitude" (see `magnitudes`); a function of the network and its groups that returns scores by group,
            of which larger ones come first; None: nothing is sorted.
        allow_inexact: Whether to sort groups that norms or softmaxes count.

    Returns:
        The names of the groups that stayed as they were.

    Raises:
        ValueError: The network has widths already, or the scores are not one number for each channel. The network stays
            as it was.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> net[0].weight.data, net[2].weight.data = torch.ones(3, 1), torch.tensor([[1.0, -3.0, 2.0]])
        >>> sort_channels(net, channel_groups(net, torch.zeros(2, 1)), torch.zeros(2, 1)); net[2].weight.data
        []
        tensor([[-3.,  2.,  1.]])
    """
    if order is None:
        return []
    if norms_of(network) is not None:
        raise ValueError(
            f"{type(network).__name__} has widths already, which were trained with the order that its channels have: "
            f"pass order=None."
        )
    free = groups.free(inexact=allow_inexact)
    scores = _checked(_criterion(order)(network, free), free)
    orders = {one.name: scores[one.name].argsort(descending=True, stable=True) for one in free}
    moved = [one for one in free if not torch.equal(orders[one.name], torch.arange(one.size))]
    with side_outputs(network), sandbox(network):
        inputs = doubles(example_inputs, noise=True)
        expected = run(network, inputs)
        stuck = _stuck(network, moved, orders, lambda: compare(run(network, inputs), expected, TOLERANCE))
    if stuck:
        log.warning(
            "The channels of %s keep their order, because the network's outputs depend on it.", ", ".join(stuck)
        )
    with as_before_on_error(network, values=True):
        _permute(network, [one for one in moved if one.name not in stuck], orders)
        renew_caches(network)
    return stuck


def magnitudes(network: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Return by group the score of each channel: how large it is, times how much of it is read.

        score_i = (sum of |scales| of the norms on channel i) * (sum of |weights| that read channel i)

    Where no norm scales a channel, the weights that make it stand for its size. Once-for-all networks sort by the
    second factor alone (Cai et al., 1908.09791); networks of half the width, cut without tuning, lost less with both.

    Example:
        >>> from lightning_compress.channels.find import channel_groups
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> net[0].weight.data, net[2].weight.data = torch.tensor([[2.0], [-1.0]]), torch.tensor([[3.0, 5.0]])
        >>> magnitudes(net, channel_groups(net, torch.zeros(2, 1)).free())["0"].tolist()
        [6.0, 5.0]
    """
    tensors = named_tensors(network)
    found = {}
    for group in groups:
        weights = [one for one in group.members if tensors[one.tensor].dim() > 1]
        makes = [one for one in weights if one.produces]
        scales = [one for one in group.members if one.produces and _is_scale(one.tensor, tensors[one.tensor])]
        reads = [one for one in weights if not one.produces]
        found[group.name] = _sums(tensors, group, scales or makes) * _sums(tensors, group, reads)
    return found


def _is_scale(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 1 and name.rpartition(".")[2] == "weight"


def _sums(tensors: Mapping[str, Tensor], group: ChannelGroup, members: Sequence[Member]) -> Tensor:
    """Return by channel the sum of the absolute entries of some slices; ones if there are no slices."""
    if not members:
        return torch.ones(group.size, dtype=torch.double)
    found = torch.zeros(group.size, dtype=torch.double)
    for one in members:
        tensor = tensors[one.tensor].detach()
        positions = tensor.abs().movedim(one.dim, 0).reshape(tensor.shape[one.dim], -1).sum(1, dtype=torch.double)
        found += positions.cpu()[one.index].sum(1)
    return found


def _criterion(order: Named | Criterion) -> Criterion:
    if callable(order):
        return order
    if order not in get_args(Named):
        raise ValueError(f"order is 'magnitude', a function of the network and its groups, or None; got {order!r}.")
    return magnitudes


def _checked(scores: Mapping[str, Tensor], groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    found = {}
    for group in groups:
        score = scores.get(group.name)
        if not isinstance(score, Tensor) or score.shape != (group.size,) or bool(score.isnan().any()):
            shown = "none" if score is None else tuple(score.shape) if isinstance(score, Tensor) else score
            raise ValueError(
                f"order must return {group.size} numbers for {group.name!r}, one for each channel; got {shown}."
            )
        found[group.name] = score.detach().cpu()
    return found


def _stuck(
    network: nn.Module, groups: Sequence[ChannelGroup], orders: Orders, difference: Callable[[], str | None]
) -> list[str]:
    """Return the groups that can't be sorted; the network is as before afterwards."""
    if not groups:
        return []
    _permute(network, groups, orders)
    try:
        wrong = difference()
    finally:
        _permute(network, groups[::-1], {name: order.argsort() for name, order in orders.items()})
    if wrong is None or len(groups) == 1:
        return [] if wrong is None else [groups[0].name]
    middle = len(groups) // 2
    return [
        *_stuck(network, groups[:middle], orders, difference),
        *_stuck(network, groups[middle:], orders, difference),
    ]


def _permute(network: nn.Module, groups: Iterable[ChannelGroup], orders: Orders) -> None:
    tensors = named_tensors(network)
    for group in groups:
        order, done = orders[group.name], set()
        for member in group.members:
            tensor = tensors[member.tensor]
            this = id(tensor), member.dim, tuple(member.index.reshape(-1).tolist())
            if this in done:  # a tied tensor under its other name
                continue
            done.add(this)
            to, of = (index.reshape(-1).to(tensor.device) for index in (member.index, member.index[order]))
            for one in (tensor, tensor.grad):
                if one is not None:
                    one.data.index_copy_(member.dim, to, one.data.index_select(member.dim, of))
