"""The neurons of a network that pruning may remove: channel groups, seen from the layers that a pattern names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import Tensor, nn

from lightning_compress.core.channels import channel_groups
from lightning_compress.core.groups import ChannelGroup, ChannelGroups, Member
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
    if groups is None:
        groups = channel_groups(model.get_submodule(network), example_inputs)
    found = []
    for group in groups:
        neurons = _neurons(model, group, f"{network}." if network else "")
        named = [one.tensor for one in neurons.weights if one.tensor in weights]
        others = [one.tensor for one in neurons.weights if one.tensor not in weights]
        if not named:
            continue
        frozen = group.frozen
        if frozen is None and not group.exact:
            frozen = f"without them the network computes something else: {group.note}"
        elif frozen is None and others:
            frozen = f"they are those of {others[0]} as well, which is no target"
        found.append(replace(neurons, frozen=frozen))
    return found


def _neurons(model: nn.Module, group: ChannelGroup, prefix: str) -> Neurons:
    members = tuple(replace(one, tensor=prefix + one.tensor) for one in group.members if one.produces)
    layers = tuple(one for one in members if _is_layers_weight(model, one))
    matrices = tuple(one for one in members if _dims(model, one) > 1)
    return Neurons(prefix + group.name, group.size, members, group.frozen, layers or matrices or members[:1])


def _is_layers_weight(model: nn.Module, member: Member) -> bool:
    module, _, name = member.tensor.rpartition(".")
    return name == "weight" and isinstance(model.get_submodule(module), WEIGHT_LAYERS)


def _dims(model: nn.Module, member: Member) -> int:
    module, _, name = member.tensor.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), name)
    return tensor.dim()
