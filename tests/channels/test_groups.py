"""Groups after a cut: by hand, and two cuts must be one."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.reference import randomize, to_double
from support.zoo import ZOO
from torch import Tensor, nn

from lightning_compress.channels.candidates import Plan
from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import channel_groups
from lightning_compress.channels.groups import Attribute, ChannelGroup, ChannelGroups, Member, thinned
from lightning_compress.channels.trial import PlanChecker
from lightning_compress.core.example_inputs import tensors


def member(tensor: str, dim: int, rows: list[list[int]], *, produces: bool = True) -> Member:
    return Member(tensor, dim, torch.tensor(rows), produces)


def mask(*stays: int) -> Tensor:
    return torch.tensor(stays, dtype=torch.bool)


def rows(group: ChannelGroup) -> dict[tuple[str, int], list[list[int]]]:
    return {(one.tensor, one.dim): one.index.tolist() for one in group.members}


def numbers(group: ChannelGroup) -> dict[tuple[str, str, int | None], list[list[int]]]:
    return {(one.module, one.name, one.place): one.index.tolist() for one in group.attributes}


# Two layers concatenated: the second one's channels move up when the first one's leave.
FIRST = ChannelGroup("a", 3, (member("a", 0, [[0], [1], [2]]), member("head", 1, [[0], [1], [2]], produces=False)))
SECOND = ChannelGroup(
    "b",
    2,
    (member("b", 0, [[0], [1]]), member("head", 1, [[3, 5], [4, 6]], produces=False)),
    (Attribute("module", "width", 1, torch.tensor([[0], [1]])),),
    exact=False,
    note="a norm counts it",
)
# A matrix of 2 blocks and 3 columns, laid out in a row; two sorts of them.
COLUMNS = ChannelGroup("columns", 3, (member("w", 0, [[0, 3], [1, 4], [2, 5]]),))
BLOCKS = ChannelGroup(
    "blocks",
    2,
    (member("w", 0, [[0, 1, 2], [3, 4, 5]]),),
    (Attribute("conv", "groups", None, torch.tensor([[0], [1]])),),
)


def test_what_stays_moves_up() -> None:
    first, second = thinned(ChannelGroups([FIRST, SECOND]), {"a": mask(0, 1, 0)})
    assert (first.size, second.size) == (1, 2)
    assert rows(first) == {("a", 0): [[0]], ("head", 1): [[0]]}
    assert rows(second) == {("b", 0): [[0], [1]], ("head", 1): [[1, 3], [2, 4]]}
    assert numbers(second) == {("module", "width", 1): [[0], [1]]}
    assert [one.produces for one in second.members] == [True, False]
    assert (second.exact, second.note, second.frozen) == (False, "a norm counts it", None)


def test_several_groups_at_once() -> None:
    first, second = thinned(ChannelGroups([FIRST, SECOND]), {"b": mask(0, 1), "a": mask(1, 0, 1)})
    assert rows(first) == {("a", 0): [[0], [1]], ("head", 1): [[0], [1]]}
    assert rows(second) == {("b", 0): [[0]], ("head", 1): [[2, 3]]}
    assert numbers(second) == {("module", "width", 1): [[0]]}


def test_groups_that_cross() -> None:
    columns, blocks = thinned(ChannelGroups([COLUMNS, BLOCKS]), {"columns": mask(1, 0, 1)})
    assert rows(columns) == {("w", 0): [[0, 2], [1, 3]]}
    assert rows(blocks) == {("w", 0): [[0, 1], [2, 3]]}
    columns, blocks = thinned(ChannelGroups([COLUMNS, BLOCKS]), {"columns": mask(1, 0, 1), "blocks": mask(0, 1)})
    assert rows(columns) == {("w", 0): [[0], [1]]}
    assert rows(blocks) == {("w", 0): [[0, 1]]}
    assert numbers(blocks) == {("conv", "groups", None): [[0]]}


def test_nothing_leaves() -> None:
    groups = ChannelGroups([FIRST, SECOND, COLUMNS, BLOCKS])
    for keep in ({}, {"a": mask(1, 1, 1), "blocks": mask(1, 1)}):
        after = thinned(groups, keep)
        assert isinstance(after, ChannelGroups)
        assert list(map(rows, after)) == list(map(rows, groups))
        assert list(map(numbers, after)) == list(map(numbers, groups))
        assert [one.size for one in after] == [3, 2, 3, 2]


def test_the_groups_before_are_not_changed() -> None:
    groups = ChannelGroups([FIRST, SECOND])
    before = [rows(copy.deepcopy(one)) for one in groups]
    thinned(groups, {"a": mask(0, 1, 0)})
    assert list(map(rows, groups)) == before


def test_a_frozen_group_keeps_its_reason_and_moves_with_the_others() -> None:
    frozen = replace(SECOND, frozen="it is an output of the network")
    after = thinned(ChannelGroups([FIRST, frozen]), {"a": mask(1, 1, 0)})[1]
    assert after.frozen == "it is an output of the network"
    assert rows(after) == {("b", 0): [[0], [1]], ("head", 1): [[2, 4], [3, 5]]}


def test_a_frozen_group_that_lies_on_the_slices_of_a_free_one_does_not_hinder() -> None:
    """As the columns of a grouped convolution's weight, which every block has alike."""
    frozen = ChannelGroup("a#2", 3, (member("head", 1, [[0], [1], [2]]),), frozen="every group has as many channels")
    first, *_ = thinned(ChannelGroups([FIRST, frozen]), {"a": mask(0, 1, 1)})
    assert rows(first) == {("a", 0): [[0], [1]], ("head", 1): [[0], [1]]}


NETWORKS = [
    "resnet",
    "densenet",
    "mobilenet",
    "grouped",
    "shufflenet v1",
    "shufflenet v2",
    "unet",
    "group norm",
    "bare parameters",
    "glu",
    "attention, packed, by heads",
    "attention, by heads, default scale",
    "multi-head attention of torch",
    "gpt2",
    "llama",
    "regnet",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_three_cuts_are_one(name: str) -> None:
    torch.manual_seed(0)
    dense, inputs = randomize(ZOO[name].make(), seed=1).double().eval(), to_double(ZOO[name].inputs())
    groups = channel_groups(dense, inputs)
    generator = torch.Generator().manual_seed(3)
    left = {group.name: torch.arange(group.size) for group in groups.free()}
    thin, now = copy.deepcopy(dense), groups
    for _ in range(3):
        keep = {}
        for group in now.free():
            stays = torch.randperm(group.size, generator=generator)[: max(1, group.size * 3 // 4)]
            keep[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill(0, stays, True)
        cut(thin, inputs, keep={one: stays.nonzero().squeeze(1) for one, stays in keep.items()}, groups=now)
        now = thinned(now, keep)
        left = {one: units[keep[one]] if one in keep else units for one, units in left.items()}
    assert any(len(units) < group.size for group, units in zip(groups.free(), left.values(), strict=True))
    at_once = cut(copy.deepcopy(dense), inputs, keep=left, groups=groups).state_dict()
    assert {key: tuple(value.shape) for key, value in thin.state_dict().items()} == {
        key: tuple(value.shape) for key, value in at_once.items()
    }
    for key, value in thin.state_dict().items():
        assert torch.equal(value, at_once[key]), key


def plan_of(groups: ChannelGroups) -> Plan:
    assert isinstance(groups.checker, PlanChecker)
    return groups.checker.plan


def test_large_batches_are_planned_with_two_samples() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    groups = channel_groups(net, torch.zeros(500, 3))
    assert [tuple(one.shape) for one in tensors(plan_of(groups).inputs)] == [(2, 3)]
    assert [(group.name, group.size) for group in groups.free()] == [("0", 8)]


def test_groups_without_a_checker_are_cut_exactly_or_not_at_all() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    x = torch.zeros(2, 3)
    groups = channel_groups(net, x).prefixed("")
    assert groups.checker is None
    with pytest.raises(ValueError, match=r"2 of 6 channels of '2' can only be cut with groups that channel_groups"):
        cut(net, x, remove={"2": [0, 1]}, groups=groups, allow_inexact=True)
    assert cut(net, x, remove={"0": [0, 1]}, groups=groups)[0].out_features == 6


class CentredOnTheBatch(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def test_samples_that_a_network_mixes_are_all_kept() -> None:
    groups = channel_groups(CentredOnTheBatch(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(6, 3))
    assert [tuple(one.shape) for one in tensors(plan_of(groups).inputs)] == [(6, 3)]
    assert [(group.name, group.size) for group in groups.free()] == [("0", 8)]


class Scaled(nn.Module):
    """Two buffers that are parts of one tensor, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(16.0).view(2, 8)
        self.register_buffer("scale", table[0])
        self.register_buffer("shift", table[1])
        self.register_buffer("nothing", None)
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) * self.scale + self.shift)


def test_buffers_may_be_parts_of_one_tensor() -> None:
    net = Scaled()
    (group,) = channel_groups(net, torch.zeros(2, 3)).free()
    assert {one.tensor for one in group.members} == {"first.weight", "first.bias", "last.weight", "scale", "shift"}
    assert net.scale.dtype == torch.float32
    cut(net, torch.ones(2, 3), keep={group.name: [1, 4]})
    assert (net.scale.tolist(), net.shift.tolist()) == ([1, 4], [9, 12])


def test_a_plan_that_follows_a_cut_and_a_new_one_list_the_same_free_groups() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(2, 3)
    groups = channel_groups(net, x)
    keep = {"0": mask(0, 0, 1, 0), "2": mask(1, 0, 1, 1, 0, 1, 1, 1)}
    cut(net, x, keep={name: stays.nonzero().squeeze(1) for name, stays in keep.items()}, groups=groups)
    followed, anew = (found.free() for found in (thinned(groups, keep), channel_groups(net, x)))
    assert [(one.name, one.size) for one in followed] == [(one.name, one.size) for one in anew] == [("2", 6)]
