"""Which channels a width keeps, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.channels.find import channel_groups
from lightning_compress.core.tensors import named_tensors
from lightning_compress.slimmable.norms import WidthNorms, give_norms, norms_of
from lightning_compress.slimmable.widths import checked_widths, counts_at, shrinkable


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 2))


def test_a_width_keeps_the_ceiling() -> None:
    groups = channel_groups(mlp(), torch.zeros(2, 3))
    for width in (0.01, 0.1, 0.3, 0.7, 0.75, 0.9, 1.0):
        found = counts_at(groups, width)
        exact = {1: 1, 10: 1, 30: 3, 70: 7, 75: 8, 90: 9, 100: 10}[round(100 * width)]
        assert found["0"] == exact
        assert found["2"] == max(1, -(-round(100 * width) * 5 // 100))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([0.5, 0.25, 0.5], "widths has 0.5 twice"),
        ([0.0, 0.5], "must be above 0 and at most 1, which is the full network; got 0.0"),
        ([1.5], "got 1.5"),
        ([float("nan")], "got nan"),
        ([-0.5], "got -0.5"),
        (["0.5"], "got the text '0.5'"),
        ([True], "got True"),
        ([0.41, 0.45], "0.41 and 0.45 keep the same channels, since the largest group has 10"),
    ],
)
def test_bad_widths(widths: list[float], message: str) -> None:
    network = mlp()
    groups = channel_groups(network, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=message):
        checked_widths(widths, groups)
    with pytest.raises(ValueError, match=message):
        give_norms(network, groups, widths)
    assert norms_of(network) is None


def test_one_width_is_the_full_network() -> None:
    network = mlp()
    assert give_norms(network, channel_groups(network, torch.zeros(2, 3)), [1.0]).widths == (1.0,)


def test_widths_by_group() -> None:
    groups = channel_groups(mlp(), torch.zeros(2, 3))
    assert counts_at(groups, {"0": 0.5, "4": 1.0}) == {"0": 5, "2": 5}
    with pytest.raises(ValueError, match="no channel group 'x'; there are '0', '2'"):
        counts_at(groups, {"x": 0.5})
    with pytest.raises(ValueError, match="'4' keeps all its channels: it is an output of the network"):
        counts_at(groups, {"4": 0.5})
    with pytest.raises(ValueError, match="The width of '0' must be above 0 and at most 1"):
        counts_at(groups, {"0": 0.0})


def test_a_network_whose_channels_all_stay() -> None:
    network = nn.Linear(3, 2)
    groups = channel_groups(network, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"No channel of the network may leave.*weight: it is an output"):
        give_norms(network, groups, [0.5])
    assert shrinkable(network, groups, torch.zeros(2, 3)).share == 0
    assert "0% of the multiply-accumulates can shrink" in str(shrinkable(network, groups, torch.zeros(2, 3)))


def test_a_network_with_inexact_groups_only() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.zeros(2, 3)
    groups = channel_groups(network, inputs)
    with pytest.raises(ValueError, match=r"because .*\('0'\): pass allow_inexact=True"):
        give_norms(network, groups, [0.5])
    assert norms_of(network) is None
    found = shrinkable(network, groups, inputs)
    assert (found.share, list(found.inexact)) == (0, ["0"])
    assert shrinkable(network, groups, inputs, allow_inexact=True).share == 1 - 5 / 40
    assert give_norms(network, groups, [0.5], allow_inexact=True).allow_inexact


def test_the_share_that_can_shrink_leaves_the_network_as_it_was() -> None:
    network = mlp()
    before = {key: (id(one), one.clone()) for key, one in named_tensors(network).items()}
    found = shrinkable(network, channel_groups(network, torch.zeros(2, 3)), torch.zeros(2, 3))
    assert found.share == 1 - (3 + 1 + 2) / (30 + 50 + 10)
    assert all(id(one) == before[key][0] for key, one in named_tensors(network).items())
    assert all(torch.equal(one, before[key][1]) for key, one in named_tensors(network).items())
    assert network[0].out_features == 10


def test_a_tied_parameter_is_one_slice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(6, 9, bias=False), nn.Linear(6, 9, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encode(x).relu() @ self.decode.weight

    from lightning_compress.slimmable.thin import ThinNetwork

    network = Tied()
    thin = ThinNetwork(network, channel_groups(network, torch.zeros(2, 6)), {"encode": 4})
    assert thin.module.encode.weight is thin.module.decode.weight
    assert thin.module.encode.weight.shape == (4, 6)


def test_two_parameters_over_one_memory_stay_whole() -> None:
    network = mlp()
    network[0].weight = nn.Parameter(network[0].weight.data)
    network.other = nn.Parameter(network[0].weight.data.t())
    groups = channel_groups(network, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"'0' keeps all its channels: .* are two tensors over one memory"):
        counts_at(groups, {"0": 0.5})


def test_a_name_that_is_taken() -> None:
    network = mlp()
    network.width_norms = nn.Identity()
    groups = channel_groups(mlp(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Sequential has a width_norms of its own already: rename yours"):
        give_norms(network, groups, [0.5])
    assert type(network.width_norms) is nn.Identity


def test_an_unknown_kind_of_norms() -> None:
    with pytest.raises(ValueError, match="norms is one of private, statistics, recalibrate; got 'own'"):
        WidthNorms([1.0], "own", {})  # type: ignore[arg-type]
