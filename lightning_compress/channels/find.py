"""Find channel groups: the slices that must leave together with a channel.

    conv.weight[i], bn.weight[i], bn.bias[i], bn.running_mean[i], ..., fc.weight[:, 49 i : 49 i + 49]   one channel
    all 64 of them                                                                                      one group

The exported graphs of the network, in training and in evaluation mode, show which slices are tied to each other. A
trial shows whether the network's own code survives the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_compress.channels.candidates import Plan
from lightning_compress.channels.groups import ChannelGroup, ChannelGroups, Member
from lightning_compress.channels.sandbox import sandbox
from lightning_compress.channels.trial import PlanChecker, Trial
from lightning_compress.core.example_inputs import ExampleInputs
from lightning_compress.core.memory import shared_memory
from lightning_compress.core.side_outputs import side_outputs
from lightning_compress.core.tensors import named_tensors

__all__ = ["ChannelGroup", "ChannelGroups", "Member", "channel_groups"]


def channel_groups(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGroups:
    """Find which slices of which tensors must leave a network together.

    Args:
        model: The network, which stays as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments; batch first.

    Returns:
        The groups in the order of the network's parameters, with the frozen ones and their reasons. Inputs of the
        network, and rows that are looked up by their number, are no channels and are not listed.

    Raises:
        ValueError: The model cannot be exported, is a script, has no values, or returns no tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))
        >>> for group in channel_groups(net, torch.zeros(2, 1, 4, 4)):
        ...     print(group.name, group.size, [one.tensor for one in group.members if one.produces], group.frozen)
        0 4 ['0.weight', '0.bias', '1.weight', '1.bias'] None
        4 10 ['4.weight', '4.bias'] it is an output of the network
    """
    _check(model)
    shared = shared_memory(named_tensors(model))
    with side_outputs(model), sandbox(model):
        plan = Plan.make(model, example_inputs)
        groups = _named(_frozen_by_memory(Trial(model, plan).survivors(), shared))
    groups.checker = PlanChecker(plan)
    return groups


def _check(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{type(model).__name__} is a script of torch.jit: pass the module that it was made from.")
    empty = next((name for name, tensor in named_tensors(model).items() if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(f"{empty} is on the meta device and has no values: materialise the model first.")


def _frozen_by_memory(groups: Sequence[ChannelGroup], shared: Sequence[tuple[str, str]]) -> list[ChannelGroup]:
    """Freeze groups of tensors that share memory, because a cut would give each tensor a memory of its own."""
    partners = {name: f"{' and '.join(pair)} are two tensors over one memory" for pair in shared for name in pair}
    reasons = [
        next((partners[one.tensor] for one in group.members if one.tensor in partners), None) for group in groups
    ]
    return [
        group if reason is None or group.frozen is not None else replace(group, frozen=reason)
        for group, reason in zip(groups, reasons, strict=True)
    ]


def _named(groups: Sequence[ChannelGroup]) -> ChannelGroups:
    named = ChannelGroups()
    taken: dict[str, int] = {}
    for group in groups:
        makers = [one for one in group.members if one.produces]
        first = next((one for one in makers if one.tensor.rpartition(".")[2] not in ("bias",)), makers[0])
        module, _, attribute = first.tensor.rpartition(".")
        name = module if attribute in ("weight", "bias") and module else first.tensor
        taken[name] = taken.get(name, 0) + 1
        named.append(replace(group, name=name if taken[name] == 1 else f"{name}#{taken[name]}"))
    return named
