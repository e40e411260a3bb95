"""Attention whose code names the sizes of its reshapes: heads and their width leave all the same."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.reference import absent, relative_difference, run, zeroed
from torch import Tensor, nn

from lightning_compress.channels.cut import cut
from lightning_compress.channels.find import ChannelGroups, channel_groups

WIDTH, HEADS, PLACES = 12, 3, 4


class WindowAttention(nn.Module):
    """As torchvision's Swin has it: every size comes from the width of the input, some of them through a function."""

    def __init__(self, *, masked: bool, packed_last: bool = False) -> None:
        super().__init__()
        self.heads_of_window, self.masked, self.packed_last = HEADS, masked, packed_last
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, PLACES, PLACES))

    def forward(self, x: Tensor) -> Tensor:
        return window_attention(self, x, HEADS)


def window_attention(m: WindowAttention, x: Tensor, heads: int) -> Tensor:
    batch, places, width = x.shape[0], x.shape[1], x.shape[2]
    x = x.reshape(batch * places // PLACES, PLACES, width)
    qkv = m.qkv(x).reshape(len(x), PLACES, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = q * (width // heads) ** -0.5 @ k.transpose(-2, -1) + m.bias
    if m.masked:
        mask = torch.eye(PLACES, dtype=x.dtype).repeat(2, 1, 1)
        scores = scores.view(len(x) // 2, 2, heads, PLACES, PLACES) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, heads, PLACES, PLACES)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), PLACES, width)
    return m.proj(x).reshape(batch, places, width)


class Block(nn.Module):
    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), WindowAttention(masked=masked)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(x)))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.Sequential(Block(masked=False), Block(masked=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def windows() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Windows().double().eval(), torch.randn(2, 8, 5, dtype=torch.float64)


def half(groups: ChannelGroups) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        one.name: torch.randperm(one.size, generator=generator)[: (one.size + 1) // 2].sort().values
        for one in groups.free(inexact=True)
    }


def test_heads_and_their_width_are_free_and_cut_right_on_other_inputs() -> None:
    net, inputs = windows()
    groups = channel_groups(net, inputs)
    assert sorted(one.size for one in groups.free()) == [3, 3, 4, 4, 20, 20]
    keep = half(groups)
    thin = cut(copy.deepcopy(net), inputs, keep=keep, groups=groups)
    others = torch.randn(6, 16, 5, dtype=torch.float64)  # more samples, more windows
    assert relative_difference(run(thin, others), zeroed(net, groups, keep, others, norms=False)) < 1e-9
    assert relative_difference(run(thin, others), absent(net, groups, keep, others)) < 1e-9


def test_a_cut_network_is_cut_again() -> None:
    net, inputs = windows()
    groups = channel_groups(net, inputs)
    thin = cut(copy.deepcopy(net), inputs, keep={one.name: [0, 2] for one in groups.free()}, groups=groups)
    again = channel_groups(thin, inputs)
    assert sorted(one.size for one in again.free()) == [2] * 6
    keep = {one.name: torch.tensor([1]) for one in again.free()}
    thinner = cut(copy.deepcopy(thin), inputs, keep=keep, groups=again)
    assert relative_difference(run(thinner, inputs), zeroed(thin, again, keep, inputs, norms=False)) < 1e-9


def test_state_dict_tells_a_dense_network_what_its_reshapes_find() -> None:
    net, inputs = windows()
    groups = channel_groups(net, inputs)
    thin = cut(copy.deepcopy(net), inputs, keep=half(groups), groups=groups)
    thinner = cut(copy.deepcopy(net), inputs, keep={one.name: [0] for one in groups.free()}, groups=groups)
    thinner.load_state_dict(thin.state_dict())
    assert torch.equal(run(thinner, inputs), run(thin, inputs))
    thinner.load_state_dict(net.state_dict())
    assert torch.equal(run(thinner, inputs), run(net, inputs))


class OneQuery(nn.Module):
    """As CrossViT and CaiT have it: values are reshaped as keys are, but only the keys' width leaves without them."""

    def __init__(self, *, heads: int, width: int, queries: int) -> None:
        super().__init__()
        self.num_heads, self.queries = heads, queries
        self.q, self.k, self.v, self.proj = (nn.Linear(heads * width, heads * width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        q = self.q(x[:, : self.queries]).reshape(batch, -1, self.num_heads, width // self.num_heads).transpose(1, 2)
        k = self.k(x).reshape(batch, places, self.num_heads, width // self.num_heads).transpose(1, 2)
        v = self.v(x).reshape(batch, places, self.num_heads, width // self.num_heads).transpose(1, 2)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, self.queries, width))


@pytest.mark.parametrize(("heads", "width", "queries"), [(4, 6, 1), (4, 6, 5), (3, 6, 1), (2, 5, 1)])
def test_what_is_free_in_a_network_can_be_cut_in_all_sizes_together(heads: int, width: int, queries: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(OneQuery(heads=heads, width=width, queries=queries)).double().eval()
    x = torch.randn(2, 5, heads * width, dtype=torch.float64)
    groups = channel_groups(net, x)
    free = groups.free()
    assert any(one.size == heads for one in free)
    for sizes in itertools.product(*(range(1, one.size + 1) for one in free)):
        keep = {one.name: torch.arange(size) for one, size in zip(free, sizes, strict=True) if size < one.size}
        thin = cut(copy.deepcopy(net), x, keep=keep, groups=groups)
        assert relative_difference(run(thin, x), zeroed(net, groups, keep, x)) < 1e-10


@pytest.mark.parametrize("through", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_cut_as_well(through: Any) -> None:
    net, inputs = windows()
    groups = channel_groups(net, inputs)
    thin = cut(net, inputs, keep=half(groups), groups=groups)
    other = through(thin)
    assert type(other.blocks[0].attention) is type(thin.blocks[0].attention)  # type: ignore[index, union-attr]
    assert torch.equal(run(other, inputs), run(thin, inputs))
    other.blocks[0].attention.qkv.weight.data.zero_()  # it runs on its own weights
    assert not torch.equal(run(other, inputs), run(thin, inputs))


@pytest.mark.parametrize(
    "how",
    [
        torch.fx.symbolic_trace,
        lambda net: torch.jit.trace(net, windows()[1]),
        lambda net: torch.compile(net, backend="eager"),
        lambda net: torch.export.export(net, (windows()[1],), strict=False).module(),
    ],
    ids=["fx", "trace", "compile", "export"],
)
def test_a_cut_network_is_traced_compiled_and_exported(how: Any) -> None:
    net, inputs = windows()
    groups = channel_groups(net, inputs)
    thin = cut(net, inputs, keep=half(groups), groups=groups)
    with torch.no_grad():
        expected = thin(inputs)
        assert torch.allclose(how(thin)(inputs), expected)


def test_a_cut_network_is_no_script_and_says_what_to_use() -> None:
    net, inputs = windows()
    thin = cut(net, inputs, keep=half(channel_groups(net, inputs)))
    with pytest.raises(TypeError, match=r"sizes in the code of WindowAttention.*torch\.export\.export"):
        torch.jit.script(thin)


def test_planning_leaves_classes_as_they_were() -> None:
    net, inputs = windows()
    channel_groups(net, inputs)
    assert {type(one) for one in net.modules()} == {type(one) for one in Windows().modules()}
    assert vars(net.blocks[0].attention).keys() == vars(Windows().blocks[0].attention).keys()  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reshape_3_to_x_x_x_3_x", (1, 1, 1, 4, 1)),
        ("reshape_3_to_x_x_x_3_x", (1, 1)),
        ("reshape_3_to_x_x_x_3_x", 2),
        ("reshape_3_to_", (1,)),
        ("reshape_forward", (1,)),
    ],
)
def test_a_record_that_sets_no_reshape_of_a_cut_is_refused(name: str, value: Any) -> None:
    net, inputs = windows()
    thin = cut(copy.deepcopy(net), inputs, keep={"blocks.0.up": [0]})
    state = thin.state_dict()
    state._metadata[""]["lightning_compress.structure"]["cut"]["numbers"]["blocks.0.attention"] = {name: value}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="record of a cut"):
        thin.load_state_dict(state)
