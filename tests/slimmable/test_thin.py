"""The network of a width computes what a copy that was cut for good computes, forward and backward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.reference import randomize, to_double
from support.widths import cut_copy, outputs_and_gradients, thin_differences
from support.zoo import ZOO
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import ChannelGroups, channel_groups
from lightning_compress.core.tensors import named_tensors
from lightning_compress.slimmable.norms import give_norms, sliced_norms, take_norms
from lightning_compress.slimmable.thin import ThinNetwork
from lightning_compress.slimmable.widths import counts_at

CHOSEN = (
    *("densenet", "shufflenet v2", "grouped", "transposed", "group norm", "lstm", "tied autoencoder"),
    *("multi-head attention of torch", "gpt2", "bare parameters"),
)


@cache
def dense(name: str) -> tuple[nn.Module, Any, ChannelGroups]:
    """The network with random values in double precision, in evaluation mode, inputs for it, and its groups."""
    torch.manual_seed(0)
    network = randomize(ZOO[name].make(), seed=1).double().eval()
    inputs = to_double(ZOO[name].inputs())
    return network, inputs, channel_groups(network, inputs)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("width", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("training", [False, True])
def test_a_thin_network_is_the_cut_copy(name: str, width: float, training: bool) -> None:
    network, inputs, groups = dense(name)
    counts = counts_at(groups, width, allow_inexact=True)
    before = {key: tensor.clone() for key, tensor in named_tensors(network).items()}
    network.train(training)
    try:
        thin = ThinNetwork(network, groups, counts)
        assert thin_differences(network, groups, counts, inputs, thin) < 1e-12
    finally:
        network.eval()
    assert all(torch.equal(tensor, before[key]) for key, tensor in named_tensors(network).items())


def small() -> tuple[nn.Module, Tensor, ChannelGroups]:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )
    network = network.double().eval()
    inputs = torch.randn(2, 3, 6, 6, dtype=torch.double)
    return network, inputs, channel_groups(network, inputs)


def thin_small() -> tuple[nn.Module, Tensor, ChannelGroups, ThinNetwork]:
    network, inputs, groups = small()
    return network, inputs, groups, ThinNetwork(network, groups, counts_at(groups, 0.5))


def load_assigned(network: nn.Module) -> None:
    network.load_state_dict({name: tensor + 0.25 for name, tensor in network.state_dict().items()}, assign=True)


def optimize(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(network.parameters(), lr=0.1).step()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a load": lambda net: net.load_state_dict({name: one * 1.5 for name, one in net.state_dict().items()}),
    "a load that assigns": load_assigned,
    "a step": optimize,
    "another type and back": lambda net: net.float().double(),
    "data": lambda net: [setattr(one, "data", one.data + 1) for one in net.parameters()],
    "another layer": lambda net: net.__setitem__(2, nn.Tanh()),
    "a number": lambda net: setattr(net[1], "eps", 0.5),
    "a hook": lambda net: net[4].register_forward_hook(lambda layer, args, output: output * 2),
    "training": lambda net: [net.train(), setattr(net[3], "p", 0.0)],
    "a frozen norm in training": lambda net: [net.train(), net[3].eval(), net[1].eval()],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["views", "copies", "contiguous"])
def test_a_thin_network_follows_changes(change: str, name: str) -> None:
    network, inputs, groups, thin = thin_small()
    counts = thin.counts
    if name == "copies":  # every second channel after the others
        network[4].weight.data = network[4].weight.data.clone()
        thin = ThinNetwork(network, _scrambled(groups), counts)
    if name == "contiguous":
        thin = ThinNetwork(network, groups, counts, contiguous=True)
        assert thin.module[4].weight.is_contiguous()
    thin.refresh(gradients=False)
    CHANGES[change](network)
    assert thin_differences(network, thin.groups, counts, inputs, thin) < 1e-12
    network.load_state_dict({key: one * 0.5 for key, one in network.state_dict().items()})
    network.eval()
    assert thin_differences(network, thin.groups, counts, inputs, thin) < 1e-12


def _scrambled(groups: ChannelGroups) -> ChannelGroups:
    """The groups with channels in an order of which no view is made; without a checker."""
    found = ChannelGroups()
    for group in groups:
        order = torch.randperm(group.size, generator=torch.Generator().manual_seed(0))
        found.append(
            replace(
                group,
                members=tuple(replace(one, index=one.index[order]) for one in group.members),
                attributes=tuple(replace(one, index=one.index[order]) for one in group.attributes),
            )
        )
    return found


def test_views_are_kept_and_copies_are_made_once() -> None:
    network, _, groups, thin = thin_small()
    first = thin.module[4].weight
    thin.refresh(gradients=False)
    assert thin.module[4].weight is first
    assert first.data_ptr() == network[4].weight.data_ptr()
    assert thin.gathered() == 0
    copies = ThinNetwork(network, _scrambled(groups), thin.counts)
    first = copies.module[4].weight
    copies.refresh(gradients=False)
    assert copies.module[4].weight is first
    assert copies.gathered() > 0.9


def test_gradients_add_up_over_widths() -> None:
    network, inputs, groups = small()
    halves = [ThinNetwork(network, groups, counts_at(groups, width)) for width in (0.25, 0.5)]
    alone = []
    for thin in halves:
        thin.refresh(gradients=True)
        alone.append(outputs_and_gradients(thin.module, inputs, network)[1])

    def both(x: Tensor) -> Tensor:
        for thin in halves:
            thin.refresh(gradients=True)
        return torch.stack([thin.module(x) for thin in halves])

    weights = torch.arange(1, 9).view(2, 4).cos()
    for parameter in network.parameters():
        parameter.grad = None
    sum((one * weights).sum() for one in both(inputs)).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, alone[0][name] + alone[1][name], rtol=1e-12, atol=1e-12)


def test_norms_of_its_own_are_trained_and_those_of_the_network_are_not() -> None:
    network, inputs, groups = small()
    held = give_norms(network, groups, [0.5], "private")
    thin = ThinNetwork(network, groups, counts_at(groups, 0.5), held.of(0.5))
    before = {key: tensor.clone() for key, tensor in named_tensors(network).items()}
    network.train()
    thin.refresh(gradients=True)
    thin.module(inputs).sum().backward()
    changed = {key for key, tensor in named_tensors(network).items() if not torch.equal(tensor, before[key])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"width_norms.0_5.{path}.{name}" for path in (1, 5) for name in names}
    assert network[1].weight.grad is None
    assert network.width_norms.of(0.5)["1"].weight.grad is not None


def test_a_norm_with_two_paths_has_one_set_of_statistics() -> None:
    torch.manual_seed(0)
    first, norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
    network = nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(8, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    inputs = torch.randn(2, 3, 4, 4, dtype=torch.double)
    groups = channel_groups(network, inputs)
    held = give_norms(network, groups, [0.5], "statistics")
    counts = counts_at(groups, 0.5)
    thin = ThinNetwork(network, groups, counts, held.of(0.5))
    reference = copy.deepcopy(network)
    take_norms(reference)
    reference = cut_copy(reference, groups, counts, inputs).train()
    network.train()
    thin.refresh(gradients=True)
    torch.testing.assert_close(thin.module(inputs), reference(inputs), rtol=1e-12, atol=1e-12)
    mine = held.of(0.5)["1"]
    torch.testing.assert_close(mine.running_var, reference[1].running_var, rtol=1e-12, atol=1e-12)
    assert int(mine.num_batches_tracked) == 2


def test_untracked_norms_stay_in_training() -> None:
    network, inputs, groups = small()
    held = give_norms(network, groups, [0.5], "recalibrate")
    thin = ThinNetwork(network, groups, counts_at(groups, 0.5), held.of(0.5), tracked=False)
    before = {key: tensor.clone() for key, tensor in named_tensors(network).items()}
    network.train()
    thin.refresh(gradients=True)
    one = thin.module(inputs)
    network[3].p = 0.0
    thin.refresh(gradients=True)
    one = thin.module(inputs)
    reference = copy.deepcopy(network)
    reference = cut(
        reference,
        inputs,
        keep={name: list(range(count)) for name, count in thin.counts.items()},
        groups=ChannelGroups(groups),
    ).train()
    torch.testing.assert_close(one, reference(inputs), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, before[key]) for key, tensor in named_tensors(network).items())


def test_the_norms_of_a_width_begin_as_slices() -> None:
    network, _, groups = small()
    found = sliced_norms(network, groups, {"0": 3, "4": 5}, affine=True)
    assert {path: {name: one.shape[0] for name, one in held.items() if one.dim()} for path, held in found.items()} == {
        "1": dict.fromkeys(("running_mean", "running_var", "weight", "bias"), 3),
        "5": dict.fromkeys(("running_mean", "running_var", "weight", "bias"), 5),
    }
    assert torch.equal(found["5"]["running_var"], network[5].running_var[:5])


class Stores(nn.Module):
    """Keeps its output, and a reference to itself in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.order = [self.first, self.second]
        self.call = self.first.forward
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.call(x))
        return self.order[1](self.last)


def test_modules_in_lists_and_methods_in_attributes_are_those_of_the_thin_network() -> None:
    network = Stores().double()
    inputs = torch.randn(3, 4, dtype=torch.double)
    groups = channel_groups(network, inputs)
    network(inputs)  # its last output has a graph, which deepcopy refuses
    thin = ThinNetwork(network, groups, {"first": 2})
    hidden = torch.relu(inputs @ network.first.weight[:2].T + network.first.bias[:2])
    expected = hidden @ network.second.weight[:, :2].T + network.second.bias
    torch.testing.assert_close(thin.module(inputs), expected, rtol=1e-12, atol=1e-12)
    assert network.last.shape == (3, 6)


def test_what_cannot_be_a_thin_network_is_refused() -> None:
    network, _, groups = small()
    network[0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"0 \(Conv2d\) has a function in place"):
        ThinNetwork(network, groups, {"0": 4})
    network, _, groups = small()
    network[4] = nn.Conv2d(8, 6, 3)
    with pytest.raises(ValueError, match=r"has shape \(6, 8, 3, 3\), and '4' has channels up to position 11"):
        ThinNetwork(network, groups, {"4": 4})
    with pytest.raises(ValueError, match="no channel group 'x'"):
        ThinNetwork(network, groups, {"x": 4})
    with pytest.raises(ValueError, match="has 8 channels, of which 1 to 8 stay; got 0"):
        ThinNetwork(network, groups, {"0": 0})


def test_a_thin_network_leaves_nothing_in_the_network() -> None:
    network, _, _, thin = thin_small()
    thin.refresh(gradients=True)
    assert not any(isinstance(one, ThinNetwork) for module in network.modules() for one in vars(module).values())
    pickle.dumps(network)
