"""Which channels form a group, and what makes them, is derived by hand for every network here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from lightning_compress.channels.find import channel_groups
from lightning_compress.pruning import channels as module_under_test
from lightning_compress.pruning.channels import Channels, find_channels


class Plain(nn.Module):
    """Layers by keyword, and a forward pass given as a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def find(net: nn.Module, inputs: Any, weights: Collection[str] | None = None, **options: Any) -> dict[str, Channels]:
    """By name; for all weights of layers if none are named."""
    if weights is None:
        layers = (nn.Linear, nn.modules.conv._ConvNd)
        weights = [f"{name}.weight".lstrip(".") for name, layer in net.named_modules() if isinstance(layer, layers)]
    return {found.name: found for found in find_channels(net, inputs, weights, **options)}


def tensors(found: Channels) -> list[str]:
    return [member.tensor for member in found.members]


def scored(found: Channels) -> list[str]:
    return [member.tensor for member in found.weights]


def free(found: dict[str, Channels]) -> list[str]:
    return [name for name, one in found.items() if one.frozen is None]


def silence(net: nn.Module, found: Channels, unit: int) -> None:
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for member in found.members:
            parameters[member.tensor].index_fill_(member.dim, member.index[unit], 0.0)


def randomize(net: nn.Module, *, size: float = 1.0) -> None:
    """Random values for everything, so that nothing is zero or one by accident."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5 * size, 1.5 * size)


# ------------------------------------------------------------------ members

IMAGE, SEQUENCE = torch.randn(3, 4, 6, 6), torch.randn(3, 5, 4)
SINGLE = [[0], [1], [2], [3], [4], [5]]
WITH_NORM = ["0.bias", "1.weight", "1.bias"]
BEFORE_THE_NONLINEARITY: dict[str, tuple[nn.Module, nn.Module, Tensor, int, list[str], list[list[int]]]] = {
    # layer, what follows, input, dimension of the channels, members besides the weight, the channels of every unit
    "conv": (nn.Conv2d(4, 6, 3), nn.Identity(), IMAGE, 1, ["0.bias"], SINGLE),
    "conv without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.Identity(), IMAGE, 1, [], SINGLE),
    "conv bn": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), IMAGE, 1, WITH_NORM, SINGLE),
    "conv groupnorm, whole groups": (
        nn.Conv2d(4, 6, 3),
        nn.GroupNorm(2, 6),
        IMAGE,
        1,
        WITH_NORM,
        [[0, 1, 2], [3, 4, 5]],
    ),
    "conv instancenorm": (
        nn.Conv2d(4, 6, 3),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        IMAGE,
        1,
        WITH_NORM,
        SINGLE,
    ),
    "conv, instancenorm of nothing but itself": (
        nn.Conv2d(4, 6, 3),
        nn.InstanceNorm2d(6),
        IMAGE,
        1,
        ["0.bias"],
        SINGLE,
    ),
    "conv pool bn": (
        nn.Conv2d(4, 6, 3),
        nn.Sequential(nn.MaxPool2d(2), nn.Dropout(), nn.BatchNorm2d(6)),
        IMAGE,
        1,
        ["0.bias", "1.2.weight", "1.2.bias"],
        SINGLE,
    ),
    # The blocks of the input have to stay, so that the same channels of both blocks go together.
    "grouped conv": (
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        IMAGE,
        1,
        WITH_NORM,
        [[0, 3], [1, 4], [2, 5]],
    ),
    "grouped transposed conv": (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        IMAGE,
        1,
        WITH_NORM,
        [[0, 3], [1, 4], [2, 5]],
    ),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), IMAGE, 1, WITH_NORM, SINGLE),
    "linear": (nn.Linear(4, 6), nn.Identity(), SEQUENCE, 2, ["0.bias"], SINGLE),
    "linear bn": (nn.Linear(4, 6), nn.BatchNorm1d(6), SEQUENCE[:, 0], 1, WITH_NORM, SINGLE),
}


@pytest.mark.parametrize("name", BEFORE_THE_NONLINEARITY)
@pytest.mark.parametrize("training", [False, True])
def test_a_unit_whose_members_are_zero_emits_exactly_zero_and_the_others_do_not_notice(
    name: str, training: bool
) -> None:
    layer, norm, x, dim, more, units = BEFORE_THE_NONLINEARITY[name]
    net = nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).train(training)
    net(x)
    randomize(net)
    groups = find(net, x, ["0.weight"])
    (found,) = (one for one in groups.values() if one.frozen is None)
    assert found.size == len(units)
    assert tensors(found) == ["0.weight", *more]
    assert scored(found) == ["0.weight"]
    for member in found.members[1:]:
        assert member.index.tolist() == units

    def emitted() -> Tensor:
        torch.manual_seed(0)  # for dropout
        return net[:2](x).movedim(dim, 0).flatten(1)

    before, state = emitted(), copy.deepcopy(net.state_dict())
    assert (before != 0).any(1).all()
    for unit, channels in enumerate(units):
        silence(net, found, unit)
        after = emitted()
        others = [channel for channel in range(len(after)) if channel not in channels]
        assert not after[channels].any()
        torch.testing.assert_close(after[others], before[others], rtol=1e-5, atol=1e-5)  # kernels round otherwise
        net.load_state_dict(state)


COUNTED: dict[str, tuple[nn.Module, nn.Module, Tensor, str]] = {
    "layernorm": (nn.Linear(4, 6), nn.LayerNorm(6), SEQUENCE, "layer_norm in '1' averages over channels"),
    "layernorm over everything": (
        nn.Conv2d(4, 6, 3),
        nn.LayerNorm((6, 4, 4)),
        IMAGE,
        "layer_norm in '1' averages over channels",
    ),
    "rmsnorm": (nn.Linear(4, 6), nn.RMSNorm(6), SEQUENCE, "rms_norm in '1' averages over channels"),
    "rmsnorm without scale": (
        nn.Linear(4, 6),
        nn.RMSNorm(6, elementwise_affine=False),
        SEQUENCE,
        "rms_norm in '1' averages over channels",
    ),
    "softmax": (nn.Linear(4, 6), nn.Softmax(-1), SEQUENCE, "softmax in '1' divides by a sum over channels"),
    "channels of every group": (
        nn.Conv2d(4, 6, 3),
        nn.GroupNorm(2, 6),
        IMAGE,
        "group_norm in '1' averages over the channels of a group",
    ),
    "batchnorm without scale, by running statistics": (
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, affine=False),
        IMAGE,
        "linear in '4' reads channels that are not zero when what makes them is",
    ),
    "sigmoid": (
        nn.Conv2d(4, 6, 3),
        nn.Sigmoid(),
        IMAGE,
        "linear in '4' reads channels that are not zero when what makes them is",
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_channels_that_count_although_they_are_zero_are_frozen(name: str) -> None:
    layer, norm, x, why = COUNTED[name]
    net = nn.Sequential(layer, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    net(x)
    found = find(net, x, ["0.weight"])["0"]
    assert found.frozen == f"without them the network computes something else: {why}"
    assert tensors(found)[:2] == ["0.weight", "0.bias"]


# ------------------------------------------------------------------ groups


@dataclass
class Group:
    """What makes the channels, and at which positions channel c is read: (tensor, dimension, c -> positions)."""

    size: int
    made_by: list[str]
    scored: list[str]
    read_by: list[tuple[str, int, Callable[[int], list[int]]]]


def same(channel: int) -> list[int]:
    return [channel]


def residual(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.bn1(self.conv1(x)))
    return self.head(F.relu(self.bn2(self.conv2(x) + x)).flatten(1))


def residual_net() -> nn.Module:
    norms = {"bn1": nn.BatchNorm2d(6), "bn2": nn.BatchNorm2d(6)}
    layers = {"conv1": nn.Conv2d(4, 6, 1), "conv2": nn.Conv2d(6, 6, 1), "head": nn.Linear(6 * 36, 2)}
    return Plain(residual, **layers, **norms)


def two_through_one_norm(self: Any, x: Tensor) -> Tensor:
    return self.head1(F.relu(self.norm(self.a(x)))) + self.head2(F.relu(self.norm(self.b(x))))


def squeeze_and_excite(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
    return self.head((F.relu(x) * gate).mean((2, 3)))


def shared_weight() -> nn.Module:
    net = Plain(
        lambda self, x: self.head(F.relu(self.partner(F.relu(self.tied(F.relu(self.stem(x))))))),
        stem=nn.Linear(4, 6),
        tied=nn.Linear(6, 6),
        partner=nn.Linear(6, 6),
        head=nn.Linear(6, 2),
    )
    net.partner.weight = net.tied.weight
    return net


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Group]]] = {
    "residual": (
        residual_net,
        IMAGE,
        {
            "conv1": Group(
                6,
                [f"{name}.{kind}" for name in ("conv1", "bn1", "conv2", "bn2") for kind in ("weight", "bias")],
                ["conv1.weight", "conv2.weight"],
                [("conv2.weight", 1, same), ("head.weight", 1, lambda c: list(range(36 * c, 36 * c + 36)))],
            )
        },
    ),
    "two layers through one norm": (
        lambda: Plain(
            two_through_one_norm,
            **{name: nn.Linear(4, 6) for name in "ab"},
            norm=nn.BatchNorm1d(6),
            **{f"head{i}": nn.Linear(6, 2) for i in (1, 2)},
        ),
        SEQUENCE[:, 0],
        {
            "a": Group(
                6,
                ["a.weight", "a.bias", "b.weight", "b.bias", "norm.weight", "norm.bias"],
                ["a.weight", "b.weight"],
                [("head1.weight", 1, same), ("head2.weight", 1, same)],
            )
        },
    ),
    "one layer, called twice, through two norms": (
        lambda: Plain(
            lambda self, x: self.head(F.relu(self.norm1(self.fc(x))) + F.relu(self.norm2(self.fc(-x)))),
            fc=nn.Linear(4, 6),
            **{f"norm{i}": nn.BatchNorm1d(6) for i in (1, 2)},
            head=nn.Linear(6, 2),
        ),
        SEQUENCE[:, 0],
        {
            "fc": Group(
                6,
                ["fc.weight", "fc.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"],
                ["fc.weight"],
                [("head.weight", 1, same)],
            )
        },
    ),
    "one layer that follows itself": (
        lambda: Plain(
            lambda self, x: self.head(F.relu(self.fc(F.relu(self.fc(F.relu(self.stem(x))))))),
            stem=nn.Linear(4, 6),
            fc=nn.Linear(6, 6),
            head=nn.Linear(6, 2),
        ),
        SEQUENCE,
        {
            "stem": Group(
                6,
                ["stem.weight", "stem.bias", "fc.weight", "fc.bias"],
                ["stem.weight", "fc.weight"],
                [("fc.weight", 1, same), ("head.weight", 1, same)],
            )
        },
    ),
    "two layers that share a weight": (
        shared_weight,
        SEQUENCE,
        {
            "stem": Group(
                6,
                ["stem.weight", "stem.bias", "tied.weight", "tied.bias", "partner.bias"],
                ["stem.weight", "tied.weight"],
                [("tied.weight", 1, same), ("head.weight", 1, same)],
            )
        },
    ),
    "gated linear unit": (
        lambda: Plain(
            lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)),
            gate=nn.Linear(4, 6),
            up=nn.Linear(4, 6),
            down=nn.Linear(6, 2),
        ),
        SEQUENCE,
        {
            "gate": Group(
                6,
                ["gate.weight", "gate.bias", "up.weight", "up.bias"],
                ["gate.weight", "up.weight"],
                [("down.weight", 1, same)],
            )
        },
    ),
    "squeeze and excite": (
        lambda: Plain(
            squeeze_and_excite,
            conv=nn.Conv2d(4, 6, 3),
            squeeze=nn.Conv2d(6, 3, 1),
            excite=nn.Conv2d(3, 6, 1),
            head=nn.Linear(6, 2),
        ),
        IMAGE,
        {
            "conv": Group(
                6,
                ["conv.weight", "conv.bias", "excite.weight", "excite.bias"],
                ["conv.weight", "excite.weight"],
                [("squeeze.weight", 1, same), ("head.weight", 1, same)],
            ),
            "squeeze": Group(3, ["squeeze.weight", "squeeze.bias"], ["squeeze.weight"], [("excite.weight", 1, same)]),
        },
    ),
    "concatenated": (
        lambda: Plain(
            lambda self, x: self.head(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], -1)),
            a=nn.Linear(4, 6),
            b=nn.Linear(4, 5),
            head=nn.Linear(11, 2),
        ),
        SEQUENCE,
        {
            "a": Group(6, ["a.weight", "a.bias"], ["a.weight"], [("head.weight", 1, same)]),
            "b": Group(5, ["b.weight", "b.bias"], ["b.weight"], [("head.weight", 1, lambda c: [6 + c])]),
        },
    ),
    "depthwise": (
        lambda: Plain(
            lambda self, x: self.head(F.relu(self.depthwise(F.relu(self.conv(x)))).mean((2, 3))),
            conv=nn.Conv2d(4, 6, 1),
            depthwise=nn.Conv2d(6, 6, 3, groups=6),
            head=nn.Linear(6, 2),
        ),
        IMAGE,
        {
            "conv": Group(
                6,
                ["conv.weight", "conv.bias", "depthwise.weight", "depthwise.bias"],
                ["conv.weight", "depthwise.weight"],
                [("head.weight", 1, same)],
            )
        },
    ),
    "depthwise, transposed": (
        lambda: Plain(
            lambda self, x: self.head(F.relu(self.depthwise(F.relu(self.conv(x)))).mean((2, 3))),
            conv=nn.Conv2d(4, 6, 1),
            depthwise=nn.ConvTranspose2d(6, 6, 3, groups=6),
            head=nn.Linear(6, 2),
        ),
        IMAGE,
        {
            "conv": Group(
                6,
                ["conv.weight", "conv.bias", "depthwise.weight", "depthwise.bias"],
                ["conv.weight", "depthwise.weight"],
                [("head.weight", 1, same)],
            )
        },
    ),
    "a stream of embeddings": (
        lambda: Plain(
            lambda self, x: self.head((lambda y: y + self.fc(F.relu(y)))(self.embedding(x))),
            embedding=nn.Embedding(9, 6),
            fc=nn.Linear(6, 6),
            head=nn.Linear(6, 2),
        ),
        torch.tensor([[1, 8, 2], [3, 0, 1]]),
        {
            "embedding": Group(
                6,
                ["embedding.weight", "fc.weight", "fc.bias"],
                ["fc.weight"],
                [("fc.weight", 1, same), ("head.weight", 1, same)],
            )
        },
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_groups_are_those_derived_by_hand(name: str) -> None:
    make, x, groups = NETS[name]
    net = make()
    found = find(net, x)
    assert free(found) == list(groups)
    for group, expected in groups.items():
        assert found[group].size == expected.size
        assert set(tensors(found[group])) == set(expected.made_by)
        assert set(scored(found[group])) == set(expected.scored)


@pytest.mark.parametrize("name", NETS)
def test_of_a_silenced_channel_nothing_depends_on_what_reads_it(name: str) -> None:
    make, x, groups = NETS[name]
    net = make().double().eval()
    randomize(net, size=0.1)  # everything is positive, so that every channel is alive, and no gate is saturated
    x = x.abs().double() if x.is_floating_point() else x
    found = find(net, x)
    state = copy.deepcopy(net.state_dict())
    for group, expected in groups.items():
        for channel in range(expected.size):

            def read_otherwise(expected: Group = expected, channel: int = channel) -> None:
                with torch.no_grad():
                    for tensor, dim, positions in expected.read_by:
                        net.get_parameter(tensor).index_fill_(dim, torch.tensor(positions(channel)), 3.0)

            before = net(x)
            read_otherwise()
            assert not torch.equal(net(x), before)
            net.load_state_dict(state)
            silence(net, found[group], channel)
            before = net(x)
            read_otherwise()
            silence(net, found[group], channel)  # again, for a weight that makes the channel and reads it
            assert torch.equal(net(x), before)
            net.load_state_dict(state)


@pytest.mark.parametrize("named", [["conv2.weight"], ["conv2.weight", "head.weight"]])
def test_a_group_is_frozen_if_one_of_its_layers_is_no_target(named: list[str]) -> None:
    net = residual_net()
    found = find(net, IMAGE, named)
    assert found["conv1"].frozen == "they are those of conv1.weight as well, which is no target"
    assert free(found) == []
    assert free(find(net, IMAGE, ["conv2.weight", "conv1.weight", "conv2.weight"])) == ["conv1"]


def test_a_target_that_only_follows_names_no_channels() -> None:
    assert find(residual_net(), IMAGE, ["conv1.bias", "bn2.weight"]) == {}


def test_rows_and_columns_of_blocks_are_two_groups() -> None:
    """6 channels feed 2 blocks of 3: whole blocks may go, and the same channels of every block."""
    net = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    found = find(net, IMAGE)
    units = {name: {one.tensor: one.index.tolist() for one in found[name].members} for name in free(found)}
    pairs, blocks = [[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]]
    assert units == {
        "0": {"0.weight": pairs, "0.bias": pairs},
        "0#2": {"0.weight": blocks, "0.bias": blocks, "2.weight": blocks, "2.bias": blocks},
        "2": {"2.weight": pairs, "2.bias": pairs},
    }
    assert {name: scored(found[name]) for name in units} == {
        "0": ["0.weight"],
        "0#2": ["0.weight", "2.weight"],
        "2": ["2.weight"],
    }
    assert list(found) == ["0", "0#2", "2", "4"]  # nothing is said of what a layer reads


@pytest.mark.parametrize("layer_comes_first", [False, True])
def test_a_layer_that_reads_by_the_weight_of_an_embedding_makes_none_of_its_channels(layer_comes_first: bool) -> None:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embedding.weight
    parts = {"head": head, "embedding": embedding} if layer_comes_first else {"embedding": embedding, "head": head}
    net = Plain(lambda self, x: self.head(F.relu(self.fc(self.embedding(x)))), **parts, fc=nn.Linear(6, 6))
    weight = f"{next(iter(parts))}.weight"
    found = find_channels(net, torch.tensor([[1, 8, 2], [3, 0, 1]]), [weight, "fc.weight"])
    (stream,) = (one for one in found if one.size == 6)
    assert stream.frozen is None
    assert [(one.tensor, one.dim) for one in stream.members] == [(weight, 1), ("fc.weight", 0), ("fc.bias", 0)]
    assert scored(stream) == ["fc.weight"]
    (words,) = (one for one in found if one.size == 9)
    assert words.frozen == "embedding in 'embedding' looks rows up by their number"


def test_packed_weights_that_are_no_layers_make_channels_when_they_are_named() -> None:
    net = Plain(
        lambda self, x: self.head(self.attention(x, x, x, need_weights=False)[0]),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    assert free(find(net, SEQUENCE)) == ["attention.out_proj"]
    found = find(net, SEQUENCE, ["attention.in_proj_weight", "attention.out_proj.weight"])
    units = {name: one.members[0].index.tolist() for name, one in found.items() if "in_proj" in name}
    heads = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]  # of the query, the key and the value
    widths = [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert sorted(sorted(map(sorted, one)) for one in units.values()) == [heads, widths]
    for name in units:
        assert found[name].frozen is None
        assert tensors(found[name]) == ["attention.in_proj_weight", "attention.in_proj_bias"]
        assert scored(found[name]) == ["attention.in_proj_weight"]


def test_where_no_layer_makes_the_channels_all_matrices_score_them() -> None:
    net = Plain(lambda self, x: self.head(F.relu(self.shift + x @ self.one + x @ self.two)), head=nn.Linear(6, 2))
    for name, shape in {"shift": (6,), "one": (4, 6), "two": (4, 6)}.items():
        net.register_parameter(name, nn.Parameter(torch.randn(shape)))
    (found,) = find_channels(net, SEQUENCE, ["one", "two"])
    assert found.frozen is None
    assert [(one.tensor, one.dim) for one in found.members] == [("shift", 0), ("one", 1), ("two", 1)]
    assert scored(found) == ["one", "two"]
    (found,) = find_channels(net, SEQUENCE, ["two"])
    assert found.frozen == "they are those of one as well, which is no target"


# ------------------------------------------------------------------ names


def test_names_are_those_of_the_model_and_follow_the_networks_order() -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(6, 2))
    net = nn.ModuleDict({"unused": nn.Linear(2, 2), "backbone": inner})
    found = find_channels(
        net,
        SEQUENCE,
        ["backbone.3.weight", "unused.weight", "backbone.0.weight", "backbone.0.weight"],
        network="backbone",
    )
    assert [one.name for one in found] == ["backbone.0", "backbone.3"]
    assert [tensors(one) for one in found] == [[f"backbone.{i}.weight", f"backbone.{i}.bias"] for i in (0, 3)]
    assert [scored(one) for one in found] == [["backbone.0.weight"], ["backbone.3.weight"]]


def test_reasons_are_told_with_the_models_names() -> None:
    net = nn.ModuleDict({"backbone": residual_net()})
    (found,) = find_channels(net, IMAGE, ["backbone.conv2.weight"], network="backbone")
    assert found.frozen == "they are those of backbone.conv1.weight as well, which is no target"


@pytest.mark.parametrize("named", ["trunk.0.weight", "net.0.0.weight"])
def test_a_network_that_shares_parts_with_the_model_has_the_first_name_of_every_parameter(named: str) -> None:
    """As `named_parameters` and so `select_parameters` tell them."""
    trunk = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    net = nn.ModuleDict({"trunk": trunk, "net": nn.Sequential(trunk, nn.Linear(6, 2))})
    (found,) = find_channels(net, SEQUENCE, [named], network="net")
    assert found.name == "net.0.0"
    assert found.frozen is None
    assert tensors(found) == ["trunk.0.weight", "trunk.0.bias"]
    assert set(tensors(found)) <= dict(net.named_parameters()).keys()


# ------------------------------------------------------------------ the output layer

OUTPUTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "as it is": (lambda self, x: self.b(F.relu(self.a(x))), "output"),
    "softmax": (lambda self, x: self.b(F.relu(self.a(x))).softmax(-1), "output"),
    "sigmoid, pooled": (lambda self, x: torch.sigmoid(self.b(F.relu(self.a(x)))).mean(1), "output"),
    "reshaped": (lambda self, x: self.b(F.relu(self.a(x))).transpose(1, 2).flatten(1)[:, 3:], "output"),
    "normalised": (lambda self, x: F.normalize(F.layer_norm(self.b(F.relu(self.a(x))), (4,))), "output"),
    "added to the input": (lambda self, x: x + self.b(F.relu(self.a(x))), "such as an input"),
    "the largest": (lambda self, x: self.b(F.relu(self.a(x))).argmax(-1), "argmax"),
    "in a tuple": (lambda self, x: (x, [self.b(F.relu(self.a(x)))]), "output"),
    "in a dict": (lambda self, x: {"loss": None, "logits": self.b(F.relu(self.a(x)))}, "output"),
    "written into a buffer": (lambda self, x: _into(torch.zeros(3, 9, 4), self.b(F.relu(self.a(x)))), "copy"),
    "written into a view": (
        lambda self, x: _into_view(torch.zeros(3, 9, 4), self.b(F.relu(self.a(x)))),
        "copy",  # in place, or in older programs not
    ),
    "times a fixed matrix": (lambda self, x: self.b(F.relu(self.a(x))) @ torch.eye(4).to(x), "such as an input"),
    "attended to": (lambda self, x: F.scaled_dot_product_attention(x, x, self.b(F.relu(self.a(x)))), "output"),
    "concatenated": (lambda self, x: torch.cat([x, self.b(F.relu(self.a(x)))], 1), "such as an input"),
}


def _into(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[:, 2:7] = x
    return buffer


def _into_view(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[:, 2:7].copy_(x)
    return buffer


def test_a_constant_of_single_precision_in_the_code() -> None:
    net = Plain(lambda self, x: self.b(F.relu(self.a(x))) @ torch.eye(4), a=nn.Linear(4, 6), b=nn.Linear(6, 4))
    assert free(find(net, SEQUENCE)) == ["a"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_layer_that_makes_the_output_is_frozen(name: str) -> None:
    forward, why = OUTPUTS[name]
    net = Plain(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 4))
    found = find(net, SEQUENCE)
    assert list(found) == ["a", "b"]
    assert free(found) == ["a"]
    assert why in str(found["b"].frozen)
    if why == "output":
        assert found["b"].frozen == "it is an output of the network"


INNER: dict[str, tuple[Callable[[Any, Tensor], Any], str | None]] = {
    "a layer that is not asked for": (lambda self, x: self.other(self.a(x)), None),
    "a functional": (lambda self, x: F.linear(self.a(x), self.other.weight), None),
    "a parameter": (lambda self, x: self.a(x) @ self.weight, None),
    "a transposed parameter": (lambda self, x: self.a(x) @ self.other.weight.t(), None),
    "einsum": (lambda self, x: torch.einsum("btc,cd->btd", self.a(x), self.weight), None),
    "attention": (lambda self, x: self.attention(*[self.a(x)] * 3)[0], None),
    "lstm": (lambda self, x: self.lstm(self.a(x))[0], "the operator lstm in 'lstm' is unknown to the planner"),
}


@pytest.mark.parametrize("name", INNER)
def test_a_layer_before_another_weight_is_free(name: str) -> None:
    forward, frozen = INNER[name]
    net = Plain(
        forward,
        a=nn.Linear(4, 6),
        other=nn.Linear(6, 2),
        lstm=nn.LSTM(6, 3),
        attention=nn.MultiheadAttention(6, 2, batch_first=True),
    )
    net.weight = nn.Parameter(torch.randn(6, 2))
    found = find(net, SEQUENCE, ["a.weight"])
    assert found["a"].frozen == frozen
    assert tensors(found["a"]) == ["a.weight", "a.bias"]


def test_all_layers_that_end_in_the_residual_stream_of_a_headless_network_are_output_layers() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.relu(self.up(x)))
        return F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)

    net = Plain(forward, stem=nn.Linear(4, 6), up=nn.Linear(6, 8), down=nn.Linear(8, 6))
    found = find(net, SEQUENCE)
    assert list(found) == ["stem", "up"]
    assert free(found) == ["up"]
    assert found["stem"].frozen == "it is an output of the network"
    assert scored(found["stem"]) == ["stem.weight", "down.weight"]


# ------------------------------------------------------------------ other reasons


def test_a_layer_that_is_not_called_is_frozen() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    net.spare = nn.Linear(2, 3)
    net.forward = lambda x: net[2](net[1](net[0](x)))  # type: ignore[method-assign]
    found = find(net, SEQUENCE)
    assert list(found) == ["0", "2", "spare"]
    assert free(found) == ["0"]
    assert found["spare"].frozen == "it is not used in the forward pass of the example inputs"
    assert found["spare"].size == 3


def test_a_depthwise_convolution_of_the_input_is_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    found = find(net, IMAGE)
    assert found["0"].frozen == "conv2d in '0' has groups of one size"
    assert free(found) == []


def test_a_weight_that_is_computed_from_others_freezes_what_it_touches() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), orthogonal(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    found = find(net, SEQUENCE, [name for name, parameter in net.named_parameters() if parameter.dim() > 1])
    assert free(found) == []
    computed = [one for one in found.values() if "parametrizations" in one.name]
    assert computed
    assert all("in '2.parametrizations.weight.0' tells places apart" in str(one.frozen) for one in computed)


def test_channels_of_a_weight_norm_are_free() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), weight_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2))
    found = find(net, SEQUENCE, [name for name, parameter in net.named_parameters() if parameter.dim() > 1])
    assert free(found) == ["0", "2.parametrizations.weight.original0"]


@pytest.mark.parametrize("function", [torch.mul, torch.add], ids=["scale", "shift"])
def test_a_buffer_is_masked_where_it_lifts_the_channels_and_only_there(function: Any) -> None:
    net = Plain(
        lambda self, x: self.head(F.relu(function(self.fc(x), self.constant))),
        fc=nn.Linear(4, 6),
        head=nn.Linear(6, 2),
    )
    net.register_buffer("constant", torch.rand(6))
    found = find(net, SEQUENCE)
    assert found["fc"].frozen is None
    assert tensors(found["fc"]) == ["fc.weight", "fc.bias"] + (["constant"] if function is torch.add else [])


def test_a_buffer_may_read_channels_as_a_weight_does() -> None:
    net = Plain(lambda self, x: self.fc(x) @ self.matrix, fc=nn.Linear(4, 6))
    net.register_buffer("matrix", torch.rand(6, 2))
    assert free(find(net, SEQUENCE)) == ["fc"]


def test_a_single_channel_is_no_group() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 1))
    assert list(find(net, SEQUENCE)) == ["2"]


# ------------------------------------------------------------------ nothing changes


class Restless(nn.Module):
    """Changes all that it can in a forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.bn = nn.BatchNorm1d(6).eval()
        self.register_buffer("calls", torch.tensor(0))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        x = F.batch_norm(self.fc(x), self.bn.running_mean, self.bn.running_var, training=True)
        x = F.dropout(x, 0.5) + torch.rand(1)
        if self.fail:
            raise RuntimeError("in the user's model")
        return self.head(F.relu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_changed(fail: bool, dtype: torch.dtype) -> None:
    net = Restless().to(dtype)
    net.fail = fail
    net.fc.weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    identities = {name: (id(one), one.data_ptr()) for name, one in [*net.named_parameters(), *net.named_buffers()]}
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match="user's model") if fail else nullcontext():
        find_channels(net, torch.ones(3, 4, dtype=dtype), ["fc.weight"])
    assert torch.equal(torch.get_rng_state(), random_state)
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == one.dtype and torch.equal(after[name], one) for name, one in before.items())
    tensors_now = [*net.named_parameters(), *net.named_buffers()]
    assert {name: (id(one), one.data_ptr()) for name, one in tensors_now} == identities
    assert net.training
    assert net.fc.training
    assert not net.bn.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert {name: parameter.grad is not None for name, parameter in net.named_parameters() if parameter.dim() > 1} == {
        "fc.weight": False,
        "head.weight": True,
    }
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["fc.weight"]


@pytest.mark.parametrize(
    "inputs",
    [(SEQUENCE, torch.ones(3, 5, 4)), {"x": SEQUENCE, "mask": torch.ones(3, 5, 4)}],
    ids=["positional", "by keyword"],
)
def test_example_inputs(inputs: Any) -> None:
    net = Plain(lambda self, x, mask: self.head(F.relu(self.fc(x * mask))), fc=nn.Linear(4, 6), head=nn.Linear(6, 2))
    assert free(find(net, inputs)) == ["fc"]


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_one_sample(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert free(find(net, torch.randn(shape))) == ["0"]


def test_a_masked_transformer_encoder_takes_no_shortcut() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    net = Plain(
        lambda self, x: self.head(self.encoder(x, src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(4, 2),
    )
    found = find(net, SEQUENCE)
    assert free(found) == [f"encoder.layers.{i}.linear1" for i in (0, 1)]
    for i in (0, 1):  # they add to a stream that begins with the input
        for name in ("self_attn.out_proj", "linear2"):
            assert "such as an input" in str(found[f"encoder.layers.{i}.{name}"].frozen)


def test_groups_that_are_known_are_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.ModuleDict({"backbone": residual_net()})
    known = channel_groups(net["backbone"], IMAGE)
    expected = find(net, IMAGE, network="backbone")
    monkeypatch.setattr(module_under_test, "channel_groups", None)
    found = find(net, IMAGE, network="backbone", groups=known)
    assert list(found) == list(expected) == ["backbone.conv1", "backbone.head"]
    for name, one in found.items():
        assert (tensors(one), scored(one), one.frozen) == (
            tensors(expected[name]),
            scored(expected[name]),
            expected[name].frozen,
        )


# ------------------------------------------------------------------ bad input


@dataclass
class Prediction:
    logits: Tensor


def test_bad_input() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    with pytest.raises(ValueError, match=r"'0' is no parameter of Sequential: .* such as '0.weight'"):
        find_channels(net, SEQUENCE, ["0.weight", "0"])
    with pytest.raises(ValueError, match="'backbone' is no parameter of ModuleDict"):
        find_channels(nn.ModuleDict({"backbone": net}), SEQUENCE, ["backbone"], network="backbone")


@pytest.mark.parametrize("output", [lambda y: float(y.sum()), Prediction], ids=["a number", "a class of its own"])
def test_a_network_that_cannot_be_exported(output: Any) -> None:
    net = Plain(lambda self, x: output(self.fc(x)), fc=nn.Linear(4, 6))
    with pytest.raises(ValueError, match="Plain cannot be exported, so its channel groups cannot be found: "):
        find_channels(net, SEQUENCE, ["fc.weight"])
