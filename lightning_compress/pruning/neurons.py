"""The neurons of a network that pruning may remove: channel groups, seen from the layers that a pattern names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_compress.core.channels import channel_groups
from lightning_compress.core.groups import ChannelGroups, Member
from lightning_compress.core.inputs import ExampleInputs
from lightning_compress.core.select import WEIGHT_LAYERS
from lightning_compress.pruning.groups import Neurons


def find_neurons(
    model: nn.Module,
    example_inputs: ExampleInputs,
    weights: Collection[str],
    *,
    network: str = "",
    groups: ChannelGroups | None = None,
) -> list[Neurons]:
    """Find the channels that the named weights make, with all that makes them; frozen ones say why.

    Channels that several layers make together, as those of a residual stream, are one group. It is free if all the
    layers' weights in it are named, if it is a free group of the network, and if cutting it is exact.

    Args:
        model: The module that the names are relative to.
        example_inputs: As for `channel_groups`.
        weights: Qualified names of parameters.
        network: Dotted path of the submodule that takes the inputs and makes the prediction.
        groups: What `channel_groups` says of the network, to save the time of asking again.

    Raises:
        ValueError: The network cannot be exported.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> for found in find_neurons(net, torch.zeros(2, 1, 4, 4), ["0.weight", "4.weight"]):
        ...     print(found.name, found.size, [member.tensor for member in found.members], found.frozen)
        0 4 ['0.weight', '0.bias', '1.weight', '1.bias'] None
        4 10 ['4.weight', '4.bias'] it is an output of the network
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first_name: dict[int, str] = {}
    for name, parameter in parameters.items():
        first_name.setdefault(id(parameter), name)
    unknown = [name for name in weights if name not in parameters]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} is no parameter of {type(model).__name__}: channels are named by the weights that make "
            f"them, such as {next(iter(parameters), 'none')!r}."
        )
    named = {first_name[id(parameters[name])] for name in weights}
    if groups is None:
        groups = channel_groups(model.get_submodule(network), example_inputs)
    prefix = f"{network}." if network else ""
    found = []
    for group in groups:
        makers = [replace(one, tensor=prefix + one.tensor) for one in group.members if one.produces]
        buffers = [one.tensor for one in makers if one.tensor not in parameters]
        members = [
            replace(one, tensor=first_name[id(parameters[one.tensor])]) for one in makers if one.tensor in parameters
        ]
        sides = [_side(model, one) for one in members]
        layers = [one for one, side in zip(members, sides, strict=True) if side == "output"]
        others = [one for one, side in zip(members, sides, strict=True) if side is None]
        matrices = [one for one in others if parameters[one.tensor].dim() > 1]
        scored = layers or matrices or others
        if not any(one.tensor in named for one in scored):
            continue
        frozen = group.frozen
        left_out = [one.tensor for one in scored if one.tensor not in named]
        if frozen is None and not group.exact:
            frozen = f"without them the network computes something else: {group.note}"
        elif frozen is None and buffers:
            frozen = f"the buffer {buffers[0]} makes them as well, and only parameters are pruned"
        elif frozen is None and left_out:
            frozen = f"they are those of {left_out[0]} as well, which is no target"
        found.append(Neurons(prefix + group.name, group.size, tuple(members), frozen, tuple(scored)))
    return found


def _side(model: nn.Module, member: Member) -> Literal["output", "input"] | None:
    """Which side of a layer's weight the slices are; None if the tensor is no layer's weight."""
    module, _, name = member.tensor.rpartition(".")
    layer = model.get_submodule(module)
    if name != "weight" or not isinstance(layer, WEIGHT_LAYERS):
        return None
    output = (0,)
    if isinstance(layer, _ConvNd) and layer.transposed:
        output = (1,) if layer.groups == 1 else (0, 1)
    return "output" if member.dim in output else "input"
