"""A layer that becomes another module stays itself: its place, its hooks, its mode, and what code reads of it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from support.forms import Mirrored, TwoParts, factored
from torch import nn

from lightning_compress.replacement.layer import UnreplaceableError, linear_map
from lightning_compress.replacement.swap import Replaced, replaced, restore, swap

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "conv": lambda: nn.Conv2d(3, 4, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
    "conv1d": lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular", bias=False),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "embedding": lambda: nn.Embedding(6, 4, padding_idx=1),
}


def inputs(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[0, 1, 5], [2, 3, 4]])
    if isinstance(layer, nn.Linear):
        return torch.randn(5, layer.in_features)
    return torch.randn(2, layer.in_channels, *[5, 6, 7][: layer.weight.dim() - 2])


def full(layer: nn.Module) -> int:
    return min(linear_map(layer).weight.flatten(1).shape)


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_it_computes_the_same_and_comes_back(name: str) -> None:
    layer = LAYERS[name]().double()
    x = inputs(layer)
    x = x.double() if x.is_floating_point() else x
    before, weight = layer(x), linear_map(layer).weight.clone()
    swap(layer, TwoParts, {"rank": full(layer)}, factored(layer, full(layer)))
    torch.testing.assert_close(layer(x), before)
    restore(layer, *layer.dense_weight())
    torch.testing.assert_close(linear_map(layer).weight, weight)
    torch.testing.assert_close(layer(x), before)
    assert type(layer) is type(LAYERS[name]())


def test_the_layer_keeps_its_place_hooks_mode_type_and_attributes() -> None:
    net = nn.Sequential(nn.Linear(6, 4, dtype=torch.bfloat16), nn.ReLU()).eval()
    layer, seen = net[0], list[str]()
    layer.note = "mine"
    layer.register_forward_hook(lambda *_: seen.append("called"))
    layer.requires_grad_(False)
    swap(layer, TwoParts, {"rank": 2}, factored(layer, 2))
    assert net[0] is layer
    assert replaced(net) == {"0": layer}
    net(torch.zeros(1, 6, dtype=torch.bfloat16))
    assert seen == ["called"]
    assert layer.note == "mine"
    assert not any(one.training for one in net.modules())
    assert all(one.dtype == torch.bfloat16 and not one.requires_grad for one in net.parameters())
    assert list(net.state_dict()) == ["0.first.weight", "0.second.weight", "0.second.bias"]
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert layer.weight.shape == (4, 6)
    assert layer.weight.is_meta
    assert layer.bias.dtype == torch.bfloat16
    assert not hasattr(layer, "kernel_size")


def test_a_frozen_bias_stays_frozen_and_the_order_in_memory_stays() -> None:
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    layer.bias.requires_grad_(False)
    swap(layer, TwoParts, {"rank": 2}, factored(layer, 2))
    assert [name for name, one in layer.named_parameters() if not one.requires_grad] == ["second.bias"]
    assert layer.first.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_change_of_the_type_reaches_what_comes_back() -> None:
    layer = nn.Linear(6, 4)
    swap(layer, TwoParts, {"rank": 2}, factored(layer, 2))
    layer.double()
    assert layer.first.weight.dtype == torch.float64
    restore(layer)
    assert layer.weight.dtype == torch.float64
    assert layer.weight.requires_grad
    assert not layer.weight.is_meta


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_it_is_copied_and_pickled(how: str) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    swap(net[0], TwoParts, {"rank": 2}, factored(net[0], 2))
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 6)
    torch.testing.assert_close(other(x), net(x))
    restore(other[0], *other[0].dense_weight())
    torch.testing.assert_close(other(x), net(x))
    assert isinstance(net[0], Replaced)
    assert type(other[0]) is nn.Linear


def test_undo_puts_the_very_same_tensors_back() -> None:
    layer = nn.Linear(6, 4)
    weight, state = layer.weight, dict(vars(layer))
    undo = swap(layer, TwoParts, {"rank": 2}, factored(layer, 2))
    undo()
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    assert vars(layer) == state


def test_undo_follows_a_change_of_the_type_meanwhile() -> None:
    network = nn.Sequential(nn.Linear(6, 4))
    weight, expected = network[0].weight, network[0].weight.detach().double()
    undo = swap(network[0], TwoParts, {"rank": 2}, factored(network[0], 2))
    network.double()
    undo()
    assert network[0].weight is weight
    torch.testing.assert_close(weight.data, expected, rtol=0, atol=0)


def test_values_draw_nothing_and_no_values_draw_from_the_callers_generator() -> None:
    layer, values = nn.Linear(6, 4), factored(nn.Linear(6, 4), 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    undo = swap(layer, TwoParts, {"rank": 2}, values)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(dict(layer.named_parameters())["first.weight"].data, values["first.weight"])
    undo()
    swap(layer, TwoParts, {"rank": 2})  # the generator is where it was seeded
    torch.manual_seed(1)
    assert torch.equal(layer.first.weight, nn.Linear(6, 2, bias=False).weight)


@pytest.mark.parametrize(
    ("numbers", "values", "match"),
    [
        ({"rank": 9}, None, "rank must be from 1 to 4; got 9"),
        ({"rank": 2}, {"first.weight": torch.zeros(2, 6)}, "lacks 'second.(bias|weight)'"),
        ({"rank": 2}, factored(nn.Linear(6, 4), 2) | {"third": torch.zeros(1)}, "has 'third'"),
        ({"rank": 2}, factored(nn.Linear(6, 4), 3), r"shape \(2, 6\), and values= has one of \(3, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(numbers: Any, values: Any, match: str) -> None:
    layer = nn.Linear(6, 4)
    state = dict(vars(layer))
    with pytest.raises(ValueError, match=match):
        swap(layer, TwoParts, numbers, values)
    assert type(layer) is nn.Linear
    assert vars(layer) == state
    with pytest.raises(UnreplaceableError, match="ReLU"):
        swap(nn.ReLU(), TwoParts, {"rank": 1})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("first", ["embed", "out"])
def test_what_was_tied_stays_tied(first: str) -> None:
    net = Tied()
    tall, wide = factored(net.embed, 3).values()
    values = {"embed": {"first.weight": tall, "second.weight": wide}}
    values["out"] = {"first.weight": wide.t(), "second.weight": tall}
    for name in (first, {"embed": "out", "out": "embed"}[first]):
        swap(net.get_submodule(name), TwoParts if name == "embed" else Mirrored, {"rank": 3}, values[name])
    assert net.out.second.weight is net.embed.first.weight
    assert sum(one.numel() for one in net.parameters()) == 3 * 7 + 2 * 3 * 4
    other = copy.deepcopy(net)
    for one in (net, other):
        restore(one.out)
        restore(one.embed, torch.ones(7, 4))
        assert one.out.weight is one.embed.weight
        assert bool((one.out.weight == 1).all())
    assert other.out.weight is not net.out.weight


def test_it_is_compiled_exported_and_traced() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), torch.randn(3, 6)
    swap(net[0], TwoParts, {"rank": 2}, factored(net[0], 2))
    expected = net(x)
    for other in (
        torch.compile(net, backend="eager", fullgraph=True),
        torch.export.export(net, (x,)).module(),
        torch.jit.trace(net, (x,)),
    ):
        torch.testing.assert_close(other(x), expected)


WRITES: dict[str, Any] = {
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(4, 6)),
    "zero_ of data": lambda layer: layer.weight.data.zero_(),
    "an entry of data": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "other data": lambda layer: setattr(layer.weight, "data", torch.zeros(4, 6)),
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", False),
    "an initialisation": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 6))),
    "no bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
@pytest.mark.parametrize("name", WRITES)
def test_nothing_is_written_into_a_weight_that_has_left(name: str, copied: bool) -> None:
    layer = nn.Linear(6, 4)
    swap(layer, TwoParts, {"rank": 2}, factored(layer, 2))
    layer = pickle.loads(pickle.dumps(copy.deepcopy(layer))) if copied else layer
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((RuntimeError, AttributeError), match=r"has left the network|would not use a"):
        WRITES[name](layer)
    assert list(layer.state_dict()) == list(before)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.is_meta) == ((4, 6), torch.float32, True)
    assert isinstance(layer.weight, nn.Parameter)
    layer.first.weight.data.zero_()  # the parts are written as ever
    layer.first.weight = nn.Parameter(torch.ones(2, 6))


class ReadsTheDtype(nn.Module):
    """A network that converts its input to the dtype of a layer's weight, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_a_weight_that_has_left_has_the_dtype_to_which_its_layer_was_converted(copied: bool) -> None:
    net = ReadsTheDtype()
    swap(net.layer, TwoParts, {"rank": 2}, factored(net.layer, 2))
    net = pickle.loads(pickle.dumps(net)) if copied else net
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        net.to(dtype)
        assert {net.layer.weight.dtype, net.layer.bias.dtype, net(torch.zeros(3, 6)).dtype} == {dtype}
    restore(net.bfloat16().layer)
    assert {one.dtype for one in net.parameters()} == {torch.bfloat16}


def test_a_pickled_layer_keeps_the_order_in_memory_of_a_weight_that_has_left() -> None:
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    swap(layer, TwoParts, {"rank": 2}, factored(layer, 2))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        restore(other)
        assert other.weight.is_contiguous(memory_format=torch.channels_last)
