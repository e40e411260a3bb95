"""An oracle for thin networks: a copy of the full one, cut for good, and its gradients at the full shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.channels.cut import cut
from lightning_compress.channels.groups import ChannelGroups, positions_kept
from lightning_compress.core.example_inputs import call
from lightning_compress.core.tensors import named_tensors
from lightning_compress.slimmable.widths import masks_of


def cut_copy(network: nn.Module, groups: ChannelGroups, counts: Mapping[str, int], inputs: Any) -> nn.Module:
    """A copy of the network with the first channels of each group, in the network's mode."""
    made = copy.deepcopy(network)
    keep = {name: mask.nonzero().squeeze(1) for name, mask in masks_of(groups, counts).items()}
    cut(made, inputs, keep=keep, groups=groups, allow_inexact=True)
    return made


def outputs_and_gradients(
    forward: Callable[..., Any], inputs: Any, network: nn.Module
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a forward pass returns, and the gradients of a weighted sum of it for the network's parameters."""
    for parameter in network.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    found = call(forward, inputs)
    found = found.to_tuple() if hasattr(found, "to_tuple") else found
    outputs = [one for one in tree_leaves(found) if isinstance(one, Tensor) and one.is_floating_point()]
    torch.stack([(one * torch.arange(1, one.numel() + 1).view_as(one).cos()).sum() for one in outputs]).sum().backward()
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    return [one.detach() for one in outputs], gradients


def scattered(
    network: nn.Module, groups: ChannelGroups, counts: Mapping[str, int], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of the cut copy at the full shapes, with zeros where channels have left."""
    kept = positions_kept(groups, masks_of(groups, counts), named_tensors(network))
    found = {}
    for name, parameter in network.named_parameters():
        found[name] = full = torch.zeros_like(parameter)
        if name in gradients:
            places = [kept.get(name, {}).get(dim, torch.arange(size)) for dim, size in enumerate(parameter.shape)]
            full[torch.meshgrid(*places, indexing="ij") if places else ()] = gradients[name]
    return found


def largest_difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference between two lists of tensors, relative to the largest entry of the second one."""
    assert [one.shape for one in some] == [one.shape for one in others]
    size = max((float(one.abs().max()) for one in others if one.numel()), default=0.0)
    pairs = zip(some, others, strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0) / max(size, 1e-300)


def thin_differences(
    network: nn.Module, groups: ChannelGroups, counts: Mapping[str, int], inputs: Any, thin: Any
) -> float:
    """The largest difference between a thin network and the cut copy: outputs, gradients, and outputs without them."""
    reference = cut_copy(network, groups, counts, inputs)
    thin.refresh(gradients=True)
    got, gradients = outputs_and_gradients(thin.module, inputs, network)
    expected, theirs = outputs_and_gradients(reference, inputs, reference)
    scattered_ = scattered(network, groups, counts, theirs)
    mine = [gradients.get(name, torch.zeros_like(one)) for name, one in scattered_.items()]
    found = [largest_difference(got, expected), largest_difference(mine, list(scattered_.values()))]
    thin.refresh(gradients=False)
    with torch.no_grad():
        torch.manual_seed(1)
        plain = call(thin.module, inputs)
    plain = plain.to_tuple() if hasattr(plain, "to_tuple") else plain
    again = [one for one in tree_leaves(plain) if isinstance(one, Tensor) and one.is_floating_point()]
    return max(*found, largest_difference(again, expected))
