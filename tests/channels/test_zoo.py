"""Every network of the zoo: the groups are those derived by hand, and cutting them does what it should."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from support.reference import absent, randomize, relative_difference, run, to_double, zeroed
from support.zoo import ZOO
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import ChannelGroup, channel_groups

TOLERANCE = 1e-9
PARTLY_EXACT = [name for name, one in ZOO.items() if one.free_exact and one.free_inexact]


@cache
def dense(name: str) -> tuple[nn.Module, Any]:
    """The network with random values in double precision, in evaluation mode, and inputs for it."""
    torch.manual_seed(0)
    return randomize(ZOO[name].make(), seed=1).double().eval(), to_double(ZOO[name].inputs())


@cache
def planned(name: str) -> tuple[ChannelGroup, ...]:
    model, inputs = dense(name)
    return tuple(channel_groups(copy.deepcopy(model), inputs))


@cache
def thinned(name: str) -> tuple[nn.Module, dict[str, int], dict[str, Tensor]]:
    """A copy with half of every free group cut, the ids of its parameters before, and what was kept."""
    model, inputs = dense(name)
    thin = copy.deepcopy(model)
    before = {key: id(parameter) for key, parameter in thin.named_parameters()}
    keep = halves(free(name))
    assert cut(thin, inputs, keep=keep, allow_inexact=True) is thin
    return thin, before, keep


def free(name: str) -> list[ChannelGroup]:
    return [group for group in planned(name) if group.frozen is None]


def halves(groups: Iterable[ChannelGroup]) -> dict[str, Tensor]:
    """A random half of every group, in a random order of its own."""
    generator = torch.Generator().manual_seed(5)
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, group.size // 2)].sort().values
        for group in groups
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def number_of_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def free_share(model: nn.Module, groups: Iterable[ChannelGroup]) -> float:
    """The share of the parameters that lie in at least one slice of a group."""
    tensors = tensors_of(model)
    covered = {id(parameter): torch.zeros(parameter.shape, dtype=torch.bool) for parameter in model.parameters()}
    for group in groups:
        for member in group.members:
            if id(tensors[member.tensor]) in covered:
                covered[id(tensors[member.tensor])].index_fill_(member.dim, member.index.flatten(), True)
    return sum(int(one.sum()) for one in covered.values()) / number_of_parameters(model)


@pytest.mark.parametrize("name", ZOO)
def test_groups_are_those_derived_by_hand(name: str) -> None:
    model, specimen, groups = dense(name)[0], ZOO[name], free(name)
    counted = (sum(group.exact for group in groups), sum(not group.exact for group in groups))
    found = "\n".join(
        f"{one.name} {one.size} {'exact' if one.exact else 'inexact'} {one.frozen}" for one in planned(name)
    )
    assert counted == (specimen.free_exact, specimen.free_inexact), found
    assert free_share(model, groups) >= specimen.min_free_share, found
    reasons = [str(group.frozen).lower() for group in planned(name) if group.frozen is not None]
    assert any(specimen.frozen_by in reason for reason in reasons), found  # the output, if nothing else


@pytest.mark.parametrize("name", ZOO)
def test_every_position_belongs_to_one_unit_of_a_group(name: str) -> None:
    groups, tensors = planned(name), tensors_of(dense(name)[0])
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        assert group.frozen is None or group.frozen.strip()
        assert group.size > 1 or group.frozen is not None
        assert any(member.produces for member in group.members)
        unit_of: dict[tuple[int, int, int], int] = {}
        for member in group.members:
            tensor = tensors[member.tensor]
            assert member.index.dtype == torch.long
            assert member.index.shape[0] == group.size
            assert 0 <= int(member.index.min()) <= int(member.index.max()) < tensor.shape[member.dim]
            assert len(member.index.unique()) == member.index.numel()
            for unit, positions in enumerate(member.index.tolist()):
                for position in positions:
                    assert unit_of.setdefault((id(tensor), member.dim, position), unit) == unit


@pytest.mark.parametrize("name", ZOO)
def test_thin_network_computes_what_the_dense_one_computes_without_the_dropped_channels(name: str) -> None:
    model, inputs = dense(name)
    thin, before, keep = thinned(name)
    assert {key: id(parameter) for key, parameter in thin.named_parameters()} == before
    assert number_of_parameters(thin) < number_of_parameters(model)
    output = run(thin, inputs)
    assert relative_difference(output, absent(model, free(name), keep, inputs)) <= TOLERANCE
    if not ZOO[name].emits_at_zero:
        assert relative_difference(output, zeroed(model, free(name), keep, inputs)) <= TOLERANCE


@pytest.mark.parametrize("name", PARTLY_EXACT)
def test_cutting_exact_groups_equals_zeros_in_the_network_as_it_is(name: str) -> None:
    model, inputs = dense(name)
    groups = [group for group in free(name) if group.exact]
    keep = halves(groups)
    thin = cut(copy.deepcopy(model), inputs, keep=keep)
    assert relative_difference(run(thin, inputs), zeroed(model, groups, keep, inputs, norms=False)) <= TOLERANCE


@pytest.mark.parametrize("name", ZOO)
def test_thin_network_trains(name: str) -> None:
    thin, inputs = copy.deepcopy(thinned(name)[0]).train(), dense(name)[1]
    output = thin(**inputs) if isinstance(inputs, dict) else thin(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    leaves = tree_flatten(dict(output) if hasattr(output, "keys") else output)[0]
    torch.stack([leaf.sum() for leaf in leaves if isinstance(leaf, Tensor)]).sum().backward()
    assert any(parameter.grad is not None for parameter in thin.parameters())
