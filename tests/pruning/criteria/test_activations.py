"""The oracles count and differentiate by hand, layer by layer, without hooks of the package."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RankPair
from torch import Tensor, nn

from lightning_compress.channels.groups import Member
from lightning_compress.core.distributed import all_reduce_sum
from lightning_compress.pruning.channels import Channels, find_channels
from lightning_compress.pruning.criteria.activations import ActivationStatistic, Apoz, MeanActivation, TaylorChannel
from lightning_compress.pruning.criteria.statistic import estimate

Batch = tuple[Tensor, Tensor]


class ConvNet(nn.Module):
    """conv-bn-relu, functional relu, a shared nn.ReLU, an in-place relu, pooling and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.conv2, self.conv3 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc, self.head = nn.Linear(16, 5), nn.Linear(5, 3)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)

    def activations(self, x: Tensor, touch: Callable[[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The forward pass once more, by hand; ``touch`` may replace an activation. Returns them and the logits."""
        found = {}
        found["conv1"] = x = touch("conv1", self.bn1(self.conv1(x)).clamp(min=0))
        found["conv2"] = x = touch("conv2", self.conv2(F.max_pool2d(x, 2)).clamp(min=0))
        found["conv3"] = touch("conv3", (self.conv3(x) + x).clamp(min=0))
        found["fc"] = touch("fc", self.fc(found["conv3"].flatten(1)).clamp(min=0))
        return found, self.head(found["fc"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(F.max_pool2d(x, 2)))
        x = self.relu_(self.conv3(x) + x)
        return self.head(F.relu(self.fc(x.flatten(1))))


class Block(nn.Module):
    """A transformer block in the manner of BERT: attention, sums, layer norms, and a GELU in the middle."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)
        self.head = nn.Linear(width, 3)

    def activations(self, x: Tensor, touch: Callable[[str, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        found = {}
        found["query"], found["key"], found["value"] = (
            touch(name, getattr(self, name)(x)) for name in ("query", "key", "value")
        )
        weights = (found["query"] @ found["key"].transpose(1, 2) / 2).softmax(-1)
        found["mix"] = x = touch("mix", self.norm1(self.mix(weights @ found["value"]) + x))
        found["up"] = touch("up", F.gelu(self.up(x)))
        return found, self.head(self.norm2(self.down(found["up"]) + x)[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.mix(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))) + x)
        return self.head(self.norm2(self.down(F.gelu(self.up(x))) + x)[:, 0])


Net = ConvNet | Block


def untouched(name: str, activation: Tensor) -> Tensor:
    return activation


def of_layer(net: nn.Module, name: str) -> Channels:
    """The channels of one layer alone, each a unit."""
    size = net.get_submodule(name).weight.shape[0]
    return Channels(name, size, (Member(f"{name}.weight", 0, torch.arange(size)[:, None]),))


def make(kind: type[Net], dtype: torch.dtype = torch.float32) -> tuple[Net, list[Channels], list[Batch]]:
    """A network, the channels of every layer whose activation the hand-written pass knows, and unequal batches."""
    torch.manual_seed(0)
    net = kind().to(dtype)
    shape = (2, 6, 6) if kind is ConvNet else (5, 4)
    batches = [(torch.randn(n, *shape, dtype=dtype), torch.randint(0, 3, (n,))) for n in (4, 7, 2)]
    return net, [of_layer(net, name) for name in net.activations(batches[0][0], untouched)[0]], batches


def loss_fn(net: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def channels_last(name: str, tensor: Tensor) -> Tensor:
    """(samples, positions, channels)"""
    return tensor.flatten(2).transpose(1, 2) if "conv" in name else tensor.reshape(len(tensor), -1, tensor.shape[-1])


def pooled(net: Net, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """All activations of all batches: (samples x positions, channels) by layer."""
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for x, _ in batches:
            for name, tensor in net.activations(x, untouched)[0].items():
                rows.setdefault(name, []).append(channels_last(name, tensor).flatten(0, 1))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def statistics(net: nn.Module, channels: list[Channels]) -> list[ActivationStatistic]:
    return [Apoz(net, channels), MeanActivation(net, channels), TaylorChannel(net, channels)]


# ------------------------------------------------------------------ formulas


def test_apoz_counts_zeros_behind_the_nonlinearity() -> None:
    net, channels, batches = make(ConvNet)
    scores = estimate(Apoz(net, channels), net, loss_fn, batches)
    for name, rows in pooled(net, batches).items():
        zeros = torch.zeros(rows.shape[1])
        for row in rows.tolist():
            for channel, value in enumerate(row):
                zeros[channel] += value == 0.0
        torch.testing.assert_close(scores[name], 1 - zeros / len(rows))
        assert ((scores[name] > 0.05) & (scores[name] < 0.95)).any()
    with torch.no_grad():
        assert all((net.conv1(x) != 0).all() for x, _ in batches)  # counting there would find nothing


def test_apoz_with_running_statistics_of_a_batch_norm() -> None:
    net, channels, batches = make(ConvNet)
    net.bn1.running_mean.normal_()
    net.bn1.running_var.uniform_(0.5, 2.0)
    net.eval()
    before = net.bn1.running_mean.clone()
    scores = estimate(Apoz(net, channels), net, loss_fn, batches)
    torch.testing.assert_close(scores["conv1"], (pooled(net, batches)["conv1"] != 0).float().mean(0))
    assert torch.equal(net.bn1.running_mean, before)


@pytest.mark.parametrize("kind", [ConvNet, Block])
def test_mean_activation(kind: type[Net]) -> None:
    net, channels, batches = make(kind)
    scores = estimate(MeanActivation(net, channels), net, loss_fn, batches)
    expected = {name: rows.abs().mean(0) for name, rows in pooled(net, batches).items()}
    torch.testing.assert_close(scores, expected)


def slope_of_loss(net: Net, x: Tensor, y: Tensor, layer: str, sample: int, channel: int) -> float:
    """How the loss changes when the channel of one sample is scaled by 1 + s, at s = 0."""

    def loss(scale: float) -> Tensor:
        def touch(name: str, activation: Tensor) -> Tensor:
            if name != layer:
                return activation
            scaled = activation.clone()
            scaled[(sample, channel) if "conv" in layer else (sample, ..., channel)] *= scale
            return scaled

        return F.cross_entropy(net.activations(x, touch)[1], y)

    step = 1e-6
    return float(loss(1 + step) - loss(1 - step)) / (2 * step)


@pytest.mark.parametrize("kind", [ConvNet, Block])
def test_taylor_is_the_derivative_with_respect_to_a_channels_size(kind: type[Net]) -> None:
    """sum_p a_ncp dL/da_ncp is dL/ds, where channel c of sample n is scaled by 1 + s: central differences."""
    net, channels, batches = make(kind, torch.float64)
    net.eval()
    expected = {layer.name: torch.zeros(layer.size, dtype=torch.float64) for layer in channels}
    samples = sum(len(x) for x, _ in batches)
    with torch.no_grad():
        for x, y in batches:
            found = net.activations(x, untouched)[0]
            for layer in channels:
                positions = channels_last(layer.name, found[layer.name]).shape[1]
                for n in range(len(x)):
                    for c in range(layer.size):
                        slope = slope_of_loss(net, x, y, layer.name, n, c)
                        expected[layer.name][c] += abs(slope) / positions / samples
    expected = {name: theta / theta.square().sum().sqrt() for name, theta in expected.items()}
    scores = estimate(TaylorChannel(net, channels), net, loss_fn, batches)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)


def test_taylor_of_a_layer_without_influence_is_zero() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(net[2].weight)
    x = torch.randn(5, 3)
    scores = estimate(TaylorChannel(net, find_channels(net, x, ["0.weight"])), net, lambda net, x: net(x).sum(), [x])
    torch.testing.assert_close(scores, {"0": torch.zeros(4)})


def test_all_calls_of_a_layer_in_one_step_are_pooled() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 1))
    a, b = torch.randn(4, 3), torch.randn(2, 3)
    channels = [of_layer(net, "0")]

    def both(net: nn.Module, batch: Any) -> Tensor:
        return net(a).sum() + net(b).sum()

    outputs = torch.cat([net[:2](a), net[:2](b)])
    torch.testing.assert_close(
        estimate(MeanActivation(net, channels), net, both, [0])["0"], outputs.mean(0).detach(), check_dtype=False
    )
    products = (outputs * net[2].weight).abs().mean(0).detach()
    torch.testing.assert_close(estimate(TaylorChannel(net, channels), net, both, [0])["0"], products / products.norm())


def test_one_sample_without_a_batch_dimension() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3)
    channels = find_channels(net, x, ["0.weight"])
    for statistic in statistics(net, channels):
        alone = estimate(statistic, net, lambda net, x: net(x).sum(), [x])
        batched = estimate(type(statistic)(net, channels), net, lambda net, x: net(x).sum(), [x[None]])
        torch.testing.assert_close(alone, batched)


def test_frozen_layers_have_no_score() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    for statistic in statistics(net, find_channels(net, x, ["0.weight", "2.weight"])):
        assert list(estimate(statistic, net, lambda net, x: net(x).sum(), [x])) == ["0"]


# ------------------------------------------------------------------ groups


def of_groups(scores: dict[str, Tensor], groups: dict[str, list[tuple[str, list[list[int]]]]]) -> dict[str, Tensor]:
    """The sum of what the layers' channels score; `groups` has the channels of every unit, layer by layer."""
    expected = {}
    for name, layers in groups.items():
        units = [
            [float(scores[layer][c]) for layer, of in layers for c in of[unit]] for unit in range(len(layers[0][1]))
        ]
        expected[name] = torch.tensor([sum(unit) for unit in units], dtype=next(iter(scores.values())).dtype)
    return expected


KINDS = [Apoz, MeanActivation, TaylorChannel]


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_group_is_the_sum_over_its_layers(kind: type[ActivationStatistic]) -> None:
    net, by_layer, batches = make(ConvNet)
    net.eval()
    found = find_channels(net, batches[0][0], [f"{name}.weight" for name in ("conv1", "conv2", "conv3", "fc", "head")])
    each = [[channel] for channel in range(5)]
    # conv2 and conv3 meet in a sum
    groups = {"conv1": [("conv1", each[:3])], "conv2": [("conv2", each[:4]), ("conv3", each[:4])], "fc": [("fc", each)]}
    expected = of_groups(estimate(kind(net, by_layer), net, loss_fn, batches), groups)
    torch.testing.assert_close(estimate(kind(net, found), net, loss_fn, batches), expected)


class Blocks(nn.Module):
    """Two grouped convolutions: what feeds the second consists of columns and of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3, groups=2)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_of_a_unit_is_the_sum_over_its_channels(kind: type[ActivationStatistic]) -> None:
    torch.manual_seed(0)
    net = Blocks()
    batches = [(torch.randn(n, 2, 5, 5), torch.randint(0, 3, (n,))) for n in (4, 3)]
    found = find_channels(net, batches[0][0], ["a.weight", "b.weight"])
    groups = {
        "a": [("a", [[0, 3], [1, 4], [2, 5]])],
        "a#2": [("a", [[0, 1, 2], [3, 4, 5]]), ("b", [[0, 1], [2, 3]])],
        "b": [("b", [[0, 2], [1, 3]])],
    }
    by_layer = estimate(kind(net, [of_layer(net, "a"), of_layer(net, "b")]), net, loss_fn, batches)
    torch.testing.assert_close(estimate(kind(net, found), net, loss_fn, batches), of_groups(by_layer, groups))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_weight_that_an_embedding_shares_with_the_head_is_not_watched(head_first: bool) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {"head": nn.Linear(4, 9, bias=False), "embedding": nn.Embedding(9, 4)}
            for name in parts if head_first else reversed(parts):
                self.add_module(name, parts[name])
            self.fc = nn.Linear(4, 4)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.fc(self.embedding(x))).mean(1))

    torch.manual_seed(0)
    net, batch = Words(), (torch.randint(0, 9, (5, 3)), torch.randint(0, 9, (5,)))
    weight = "head.weight" if head_first else "embedding.weight"
    (group,) = (one for one in find_channels(net, batch[0], [weight, "fc.weight"]) if one.frozen is None)
    for kind in KINDS:
        (found,) = estimate(kind(net, [group]), net, loss_fn, [batch]).values()
        torch.testing.assert_close(found, estimate(kind(net, [of_layer(net, "fc")]), net, loss_fn, [batch])["fc"])


UNWATCHED: dict[str, tuple[nn.Module, Tensor, str]] = {
    "grouped and transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        torch.randn(3, 4, 5, 5),
        "0.weight",
    ),
    "an embedding": (nn.Sequential(nn.Embedding(9, 4), nn.ReLU(), nn.Linear(4, 2)), torch.tensor([[1, 2]]), "0.weight"),
    "packed weights": (
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        torch.randn(3, 5, 4),
        "self_attn.in_proj_weight",
    ),
}


@pytest.mark.parametrize("name", UNWATCHED)
@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_no_activation_shows_are_refused(kind: type[ActivationStatistic], name: str) -> None:
    net, x, weight = UNWATCHED[name]
    found = [one for one in find_channels(net, x, [weight]) if one.frozen is None]
    assert found
    with pytest.raises(ValueError, match=rf"channels of .* are made by {weight}, and no activation .*magnitude, l2"):
        kind(net, found)


# ------------------------------------------------------------------ over batches, ranks and checkpoints


@pytest.mark.parametrize("kind", [Apoz, MeanActivation, TaylorChannel])
def test_two_halves_together_are_the_whole(kind: type[ActivationStatistic]) -> None:
    net, channels, batches = make(ConvNet)
    net.eval()
    whole = estimate(kind(net, channels), net, loss_fn, batches)

    ranks = [kind(net, channels) for _ in range(2)]
    estimate(ranks[0], net, loss_fn, batches[:1])
    estimate(ranks[1], net, loss_fn, batches[1:])
    other = iter([*ranks[1].sums.values(), torch.tensor(list(ranks[1].counts.values()))])
    ranks[0].reduce(lambda tensor: tensor + next(other))
    torch.testing.assert_close(ranks[0].scores(), whole)
    assert any((ranks[1].scores()[name] - score).abs().max() > 1e-4 for name, score in whole.items())


def scores_on_a_rank(kind: str) -> dict[str, Tensor]:
    """Score on this rank's half of a batch, with the network wrapped for distributed training."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    net, channels, batches = make(ConvNet)
    net.eval()
    statistic: ActivationStatistic = {k.__name__: k for k in (Apoz, MeanActivation, TaylorChannel)}[kind](net, channels)
    wrapped = nn.parallel.DistributedDataParallel(net)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    x, y = (tensor[half] for tensor in batches[0])
    for _ in range(2):  # from the second step on the reducer's buckets are rebuilt
        statistic.begin()
        loss = F.cross_entropy(wrapped(x), y)
        statistic.before_backward(loss)
        loss.backward()
        statistic.end()
    statistic.reduce(all_reduce_sum)
    return statistic.scores()


@pytest.mark.parametrize("kind", [Apoz, MeanActivation, TaylorChannel])
def test_two_ranks_score_as_one_process(kind: type[ActivationStatistic], rank_pair: RankPair, tmp_path: Path) -> None:
    net, channels, batches = make(ConvNet)
    net.eval()
    expected = estimate(kind(net, channels), net, loss_fn, batches[:1])
    for scores in rank_pair.run("pruning.criteria.test_activations:scores_on_a_rank", tmp_path, kind=kind.__name__):
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("kind", [Apoz, MeanActivation, TaylorChannel])
def test_saved_and_continued_is_uninterrupted(kind: type[ActivationStatistic]) -> None:
    net, channels, batches = make(ConvNet)
    net.eval()
    whole = estimate(kind(net, channels), net, loss_fn, batches)
    first, second = kind(net, channels), kind(net, channels)
    estimate(first, net, loss_fn, batches[:2])
    second.load_state_dict(first.state_dict())
    continued = estimate(second, net, loss_fn, batches[2:])
    assert all(torch.equal(continued[name], score) for name, score in whole.items())
    second.reset()
    torch.testing.assert_close(
        estimate(second, net, loss_fn, batches[:1]), estimate(kind(net, channels), net, loss_fn, batches[:1])
    )


def test_the_models_gradients_are_not_touched() -> None:
    net, channels, batches = make(ConvNet)
    net.eval()
    loss_fn(net, batches[0]).backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    for statistic in statistics(net, channels):
        net.zero_grad()
        statistic.begin()
        loss = loss_fn(net, batches[0])
        statistic.before_backward(loss)
        loss.backward()
        statistic.end()
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_autocast_sums_in_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(4096, 8)
    channels = find_channels(net, x, ["0.weight"])

    def autocast_loss(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).float().mean()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = net[:2](x)
    assert a.dtype is torch.bfloat16
    mean = estimate(MeanActivation(net, channels), net, autocast_loss, [x])["0"]
    torch.testing.assert_close(mean, a.float().mean(0).detach(), rtol=1e-5, atol=0)
    apoz = estimate(Apoz(net, channels), net, autocast_loss, [x])["0"]
    torch.testing.assert_close(apoz, (a != 0).float().mean(0), rtol=1e-6, atol=0)
    taylor = estimate(TaylorChannel(net, channels), net, autocast_loss, [x])["0"]
    products = a.float().mean(0) * net[2].weight.bfloat16().float().sum(0).abs()
    torch.testing.assert_close(taylor, (products / products.norm()).detach(), rtol=1e-2, atol=1e-3)


def test_nothing_is_kept_after_the_step() -> None:
    net, channels, batches = make(ConvNet)
    seen: list[weakref.ref[Tensor]] = []
    net.relu.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    for statistic in statistics(net, channels):
        estimate(statistic, net, loss_fn, batches[:1])
        statistic.begin()
        loss = loss_fn(net, batches[0])
        statistic.before_backward(loss)
        statistic.end()  # as after an exception: no backward pass
        del loss
        gc.collect()
        assert [ref() for ref in seen] == [None] * 4
        assert not any(module._forward_hooks for module in net.modules() if module is not net.relu)

        statistic.begin()
        loss_fn(net, batches[0])
        statistic.before_backward(torch.zeros(()))
        statistic.begin()  # the step before was given up
        gc.collect()
        assert [ref() for ref in seen] == [None] * 6
        statistic.end()
        seen.clear()


# ------------------------------------------------------------------ warnings and errors


def test_apoz_says_once_which_layers_make_no_zeros() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    x = torch.randn(20, 3)
    apoz = Apoz(net, find_channels(net, x, ["0.weight", "2.weight", "4.weight"]))
    with pytest.warns(UserWarning, match="no activation of 0, 4 was ever zero"):
        estimate(apoz, net, lambda net, x: net(x).sum(), [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apoz.scores()


@pytest.mark.parametrize("kind", [Apoz, MeanActivation, TaylorChannel])
def test_without_data_the_error_says_what_is_missing(kind: type[ActivationStatistic]) -> None:
    net, channels, _ = make(ConvNet)
    with pytest.raises(ValueError, match=rf"'{kind.criterion}' needs .*activations.* 'conv1' and 3 more"):
        kind(net, channels).scores()


def test_taylor_without_gradients_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)

    def detached(net: nn.Sequential, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = net[:2](x)
        return net[2](hidden).sum()

    with pytest.raises(ValueError, match="'taylor' needs gradients of activations, and has seen none of '0'"):
        estimate(TaylorChannel(net, find_channels(net, x, ["0.weight"])), net, detached, [x])


def test_taylor_of_an_activation_that_is_overwritten_is_an_error() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.fc(x))
            y *= 2
            return self.head(y)

    net, x = Overwrites(), torch.randn(5, 3)
    channels = find_channels(net, x, ["fc.weight"])
    with pytest.raises(ValueError, match=r"activation of 'fc', a tensor of shape \(5, 4\), was modified in place"):
        estimate(TaylorChannel(net, channels), net, lambda net, x: net(x).sum(), [x])
    assert all(parameter.grad is None for parameter in net.parameters())
    mean = estimate(MeanActivation(net, channels), net, lambda net, x: net(x).sum(), [x])
    torch.testing.assert_close(mean["fc"], F.gelu(net.fc(x)).abs().mean(0).detach())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Apoz, MeanActivation, TaylorChannel])
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(kind: type[ActivationStatistic], value: float) -> None:
    net, channels, batches = make(ConvNet)
    expected = estimate(kind(net, channels), net, loss_fn, batches)
    bad = (torch.full_like(batches[0][0], value), *batches[0][1:])
    statistic = kind(net, channels)
    with pytest.warns(UserWarning, match="leaves out what it sees of a batch"):
        scores = estimate(statistic, net, loss_fn, [batches[0], bad, *batches[1:]])
    assert statistic.n_left_out == 1
    for name, score in expected.items():
        assert torch.equal(scores[name], score)
