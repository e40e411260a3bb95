"""Which layers can have gates, where their channels are gated, and who reads these channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.odd_layers import Odd
from support.small import FEATURES, SmallNet
from torch import Tensor, nn

from lightning_compress.baselines import DigitsConvNet, ResNet20
from lightning_compress.channel_gates.find import find_layers

IMAGES = torch.zeros(2, 1, 8, 8)


def found(network: nn.Module, x: Tensor = IMAGES, names: Any = None) -> dict[str, str]:
    return {layer.name: layer.end for layer in find_layers(network, x, names).layers}


def test_layers_end_behind_the_norm_that_reads_them_as_they_are() -> None:
    assert found(SmallNet(), torch.zeros(2, FEATURES)) == {"conv": "norm", "hidden": "hidden"}
    assert found(DigitsConvNet(width=4)) == {f"conv{i}": f"bn{i}" for i in range(1, 5)}
    first = [f"stages.{stage}.{block}" for stage in range(3) for block in range(3)]
    assert found(ResNet20(width=4, in_channels=1)) == {f"{one}.conv1": f"{one}.bn1" for one in first}


def test_readers_are_known_through_pooling_and_flattening() -> None:
    readers = find_layers(DigitsConvNet(width=4), IMAGES).readers
    assert {name: [one.name for one in some] for name, some in readers.items()} == {
        "conv1": ["conv2"],
        "conv2": ["conv3"],
        "conv3": ["conv4"],
        "conv4": ["fc"],
    }
    (reader,) = readers["conv4"]
    assert torch.equal(reader.index, torch.arange(8 * 4).view(8, 4))


def test_what_gets_no_gates_has_a_reason_and_may_be_named_where_it_can() -> None:
    with pytest.raises(ValueError, match=r"Odd has no layer whose channels go to other layers alone .*: name layers"):
        find_layers(Odd(), IMAGES)
    for name, reason in {
        "twice": "it runs several times in one forward pass",
        "depthwise": "it is a convolution of groups",
        "by_pixel": "the first dimension of what it reads does not count the samples",
    }.items():
        with pytest.raises(ValueError, match=f"The channels of '{name}' can't be chosen for each sample: {reason}"):
            find_layers(Odd(), IMAGES, [name])
    with pytest.raises(ValueError, match="layers has 'tiwce', which is no convolution or linear layer"):
        find_layers(Odd(), IMAGES, ["tiwce"])
    named = find_layers(Odd(), IMAGES, ["late", "branch", "head"])
    assert {layer.name: layer.end for layer in named.layers} == {"late": "late", "branch": "branch", "head": "head"}
    assert named.readers == {}
    assert named.refused["head"] == "it is an output of the network"


def test_a_norm_over_tokens_is_no_norm_over_channels() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.hidden(x)))

    tokens = find_layers(Tokens(), torch.zeros(2, 6, 5), ["hidden"])  # six tokens, and six channels
    assert [layer.end for layer in tokens.layers] == ["hidden"]


def test_a_network_that_was_compiled_in_place_has_the_same_layers() -> None:
    network = DigitsConvNet(width=4)
    expected = found(network)
    network.compile(backend="eager")
    network(IMAGES)
    assert found(network) == expected
