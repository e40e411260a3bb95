"""A network's convolutions become blocks, in place; what can't become one stays, with the reason."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import load_compressed, save_compressed, substitute_convs
from lightning_compress.conv_substitution.blocks import FORMS
from lightning_compress.conv_substitution.seen import norms_behind

BLOCKS = list(FORMS)


def images(n: int = 16, seed: int = 0) -> Tensor:
    """With large patches of one colour, as images have them."""
    noise = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=(12, 12), mode="bilinear")


class Net(nn.Module):
    def __init__(self, *, norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=bias)
            self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
            self.point = nn.Conv2d(16, 8, 1)
            self.up = nn.ConvTranspose2d(8, 8, 2)
            self.last = nn.Conv2d(8, 1, (1, 3))
            self.frozen = nn.Conv2d(1, 8, 3, padding=1).requires_grad_(False)
            self.unused = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(F.relu(self.stem(x))))
        hidden = self.up(self.point(F.relu(self.grouped(F.relu(hidden)))))
        return self.frozen(self.last(hidden)).mean((2, 3))


def gap(network: nn.Module, other: nn.Module, x: Tensor) -> float:
    """How far the outputs of `conv` are apart, as a share of their variance."""
    a, b = (one.conv(F.relu(one.stem(x))).detach() for one in (network, other))
    return float((a - b).var((0, 2, 3)).sum() / b.var((0, 2, 3)).sum())


@pytest.mark.parametrize("block", BLOCKS)
def test_data_are_nearer_to_the_layer_than_the_weight_alone_which_is_nearer_than_chance(block: str) -> None:
    x, gaps = images(64), {}
    for init in ("data", "svd", "random"):
        network, dense = Net(), Net()
        torch.manual_seed(0)
        report = substitute_convs(network, x[:4], block=block, init=init, batches=[x], target="conv")  # type: ignore[arg-type]
        assert list(report.replaced) == ["conv"]
        assert report.replaced["conv"].after == sum(one.numel() for one in network.conv.parameters())
        assert type(network.conv) is FORMS[block]
        gaps[init] = gap(network, dense, images(64, seed=5))
    assert gaps["data"] < gaps["svd"] < gaps["random"]


def test_what_stays_has_its_reason_and_the_first_convolution_goes_where_it_is_named() -> None:
    network = Net()
    report = substitute_convs(network, images(4))
    assert list(report.replaced) == ["conv"]
    expected = {
        "stem": "3 input channels, too few",
        "grouped": "groups=2",
        "point": "1x1 convolution",
        "up": "transposed",
        "last": "the block would have 33 parameters, and it has 25",
        "frozen": "frozen",
        "unused": "never reach it",
    }
    for path, reason in expected.items():
        assert re.search(reason, report.left[path]), (path, report.left[path])
    assert report.rows()[0] == ("conv", "separable, terms 1", "1,152 -> 200", "")
    named = substitute_convs(Net(), images(4), target=["stem", "conv"], exclude="conv")
    assert list(named.replaced) == ["stem"]
    assert named.left["conv"] == "it is not wanted by target= and exclude="
    again = copy.deepcopy(network)
    with pytest.raises(
        ValueError,
        match=r"No convolution of Net .* conv.depthwise, conv.pointwise: it is a part of 'conv'",
    ):
        substitute_convs(again, images(4))
    with pytest.raises(ValueError, match="block would have"):
        substitute_convs(Net(), images(4), multiplier=8, target="conv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "mobile"}, "block must be one of separable, .*; got 'mobile'"),
        ({"init": "best"}, "init must be one of data, svd, random; got 'best'"),
        ({"multiplier": 0}, "multiplier must be an integer from 1 on; got 0"),
        ({"squeeze": 1.5}, "squeeze must be a share .*; got 1.5"),
        ({"ratio": 1}, "ratio must be an integer from 2 on; got 1"),
        ({"groups": True}, "groups must be an integer from 1 on; got True"),
        ({"squeeze": "0.5"}, "squeeze must be a share .*; got the text '0.5'"),
        ({"target": "nothing.*"}, "selects no parameter"),
        ({"target": "fc"}, "selects no parameter"),
    ],
)
def test_bad_arguments_are_refused_and_the_network_stays(options: dict[str, Any], message: str) -> None:
    network = Net()
    before = {name: one.clone() for name, one in network.state_dict().items()}
    with pytest.warns() if "target" in options else _nothing(), pytest.raises(ValueError, match=message):
        substitute_convs(network, images(4), **options)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], one) for name, one in before.items())


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_what_target_names_besides_convolutions_is_said() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(4, 8, 3, 3)
    with pytest.raises(ValueError, match=r"block 'separable': 0\.bias: it is no weight.*; 3: it is a Linear"):
        substitute_convs(network, x, target=["3", "0.bias"])
    left = substitute_convs(network, x, target=["0", "1", "3"]).left
    assert left == {"1": "it is a BatchNorm2d, and no convolution", "3": "it is a Linear, and no convolution"}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_fit_of_values_that_are_not_finite_names_the_layer(block: str) -> None:
    x = images(4)
    x[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=f"block '{block}' could not be fitted to 'conv'.* must be finite"):
        substitute_convs(Net(), x, block=block, target="conv")  # type: ignore[arg-type]


def test_a_mean_that_nothing_takes_away_counts_in_the_fit() -> None:
    """Without a bias and a norm the block's outputs must have the right mean themselves."""
    x = images(64)
    found = {}
    for norm in (True, False):
        network = Net(norm=norm)
        assert norms_behind(network, ["conv", "stem"], x[:2]) == ({"conv"} if norm else set())
        substitute_convs(network, x[:4], batches=[x], target="conv")
        a, b = (one.conv(F.relu(one.stem(x))).detach() for one in (network, Net(norm=norm)))
        found[norm] = float((a - b).square().mean())
    assert found[False] < found[True]
    network, dense = Net(norm=False, bias=True), Net(norm=False, bias=True)
    substitute_convs(network, x[:4], batches=[x], target="conv")
    a, b = (one.conv(F.relu(one.stem(x))).mean((0, 2, 3)) for one in (network, dense))
    torch.testing.assert_close(a, b, atol=0.02, rtol=0)


def test_norms_are_computed_anew_from_the_batches_and_random_states_stay() -> None:
    network, x = Net(), images(32)
    torch.manual_seed(3)
    substitute_convs(network, x[:4], batches=[x[:16], x[16:]])
    assert torch.equal(torch.rand(1), torch.manual_seed(3) and torch.rand(1))
    hidden = network.conv(F.relu(network.stem(x))).detach()
    torch.testing.assert_close(network.norm.running_mean, hidden.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_file_rebuilds_the_blocks_and_the_network_trains_and_exports(block: str, tmp_path: Any) -> None:
    network, x = Net(), images(4)
    conv = network.conv
    substitute_convs(network, x, block=block)  # type: ignore[arg-type]
    assert network.conv is conv
    network(x).square().sum().backward()
    assert all(one.grad is not None for one in conv.parameters())
    save_compressed(network.eval(), tmp_path / "net.lcz")
    again = load_compressed(tmp_path / "net.lcz", Net()).eval()
    torch.testing.assert_close(again(x), network(x))
    program = torch.export.export(network, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), network(x))
