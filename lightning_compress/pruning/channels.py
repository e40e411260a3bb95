"""The channels that pruning may remove: channel groups, seen from the layers whose weights make the channels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import ChannelGroups, Member
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.select import is_transposed_linear, is_weight_layer
from lightning_compress.core.tensors import saved_tensors


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one group. Each channel is a slice of every member.

    Attributes:
        name: The group's name.
        size: The number of channels.
        members: The slices that make the channels; with zeros in all of its slices a channel is silent.
        frozen: The reason why no channel of the group may be removed, in words; None if channels may be removed.
        weights: The members that are weights of layers, from which criteria compute scores; by default the first
            member.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None = None
    weights: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", self.members[:1])


def channel_sums(score: Tensor, member: Member) -> Tensor:
    """Sum, for every channel, the entries of `score` that belong to it: shape (size,).

    `score` has the shape of the member's tensor.

    Example:
        >>> import torch
        >>> score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> channel_sums(score, Member("fc.weight", dim=0, index=torch.tensor([[0], [1]])))
        tensor([3., 7.])
        >>> channel_sums(score, Member("fc.weight", dim=0, index=torch.tensor([[0, 1]])))  # one channel of two rows
        tensor([10.])
    """
    positions = score.movedim(member.dim, 0).flatten(1).sum(1) if score.dim() > 1 else score
    return positions[member.index.to(score.device)].sum(1)


def find_channels(
    model: nn.Module,
    example_inputs: ExampleInputs,
    weights: Collection[str],
    *,
    exclude: Collection[str] = (),
    network: str = "",
    groups: ChannelGroups | None = None,
) -> list[Channels]:
    """Find the channels that the named weights make, with all slices that make them.

    Channels that several layers make together, such as those of a residual stream, are one group. The group is free if
    the weights of all its layers are named, if it is a free group of the network, and if cutting it is exact; else
    `frozen` holds the reason. Buffers, such as those of frozen norms, are masked like parameters. A tensor with several
    names has its first name in the model.

    Args:
        model: The module that the names are relative to.
        example_inputs: As for `channel_groups`.
        weights: Qualified names of parameters.
        exclude: Qualified names of parameters that must not be touched, even if other layers make the same channels.
        network: Dotted path of the submodule that takes the inputs and makes the prediction.
        groups: The channel groups of the network, if the caller has them; else the network is traced.

    Raises:
        ValueError: A name is not that of a parameter, or the network cannot be exported.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> for found in find_channels(net, torch.zeros(2, 1, 4, 4), ["0.weight", "4.weight"]):
        ...     print(found.name, found.size, [member.tensor for member in found.members], found.frozen)
        0 4 ['0.weight', '0.bias', '1.weight', '1.bias'] None
        4 10 ['4.weight', '4.bias'] it is an output of the network
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = saved_tensors(model)
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    for name in weights:
        if name not in parameters:
            raise ValueError(
                f"{name!r} is no parameter of {type(model).__name__}: name the weights that make the channels, such as "
                f"{next(iter(parameters), 'none')!r}."
            )
    named = {first_names[id(parameters[name])] for name in weights}
    if groups is None:
        groups = channel_groups(model.get_submodule(network), example_inputs)
    found = []
    for group in groups.prefixed(network):
        makers = [one for one in group.members if one.produces]
        members = [replace(one, tensor=first_names[id(tensors[one.tensor])]) for one in makers if one.tensor in tensors]
        scored = _scored(model, [one for one in members if one.tensor in parameters])
        unsaved = [one.tensor for one in makers if one.tensor not in tensors]
        others = [one.tensor for one in scored if one.tensor not in named]
        if len(others) == len(scored):
            continue
        frozen = group.frozen
        if frozen is None and not group.exact:
            frozen = f"without them the network computes something else: {group.note}"
        elif frozen is None and unsaved:
            frozen = f"the buffer {unsaved[0]} makes them as well, which is not saved, so that its mask would be lost"
        elif frozen is None and (kept := [one.tensor for one in members if one.tensor in exclude]):
            frozen = f"{kept[0]} makes them as well, which is excluded"
        elif frozen is None and others:
            frozen = f"they are those of {others[0]} as well, which is no target"
        found.append(Channels(group.name, group.size, tuple(members), frozen, tuple(scored)))
    return found


def _scored(model: nn.Module, members: Sequence[Member]) -> list[Member]:
    """Return the members that are weights of layers; if there are none, all matrices, or else the first vector."""
    layers, others = [], []
    for member in members:
        module, _, name = member.tensor.rpartition(".")
        layer = model.get_submodule(module)
        if name != "weight" or not is_weight_layer(layer):
            others.append(member)
        elif member.dim in _output_dims(layer):  # the input side belongs to another layer's channels
            layers.append(member)
    matrices = [one for one in others if model.get_parameter(one.tensor).dim() > 1]
    return layers or matrices or others[:1]


def _output_dims(layer: nn.Module) -> tuple[int, ...]:
    """Return the dimensions of a layer's weight that hold its output channels.

    In a transposed convolution with groups both dimensions do.
    """
    if isinstance(layer, _ConvNd) and layer.transposed:
        return (1,) if layer.groups == 1 else (0, 1)
    return (1,) if is_transposed_linear(layer) else (0,)
