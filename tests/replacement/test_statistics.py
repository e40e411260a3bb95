"""Statistics of what layers see: against patches by torch's unfold and by a loop, merged, and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import RankPair
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.replacement.layer import linear_map
from lightning_compress.replacement.statistics import InputStatistics, gather_statistics, patches


def by_hand(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the covariance of rows, by torch's own functions."""
    return rows.mean(0), torch.cov(rows.t(), correction=0)


def by_loop(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of each group that a convolution sees, by a loop over positions, as (groups, rows, size)."""
    of = linear_map(layer).sizes
    both = [size for one in reversed(of.padding) for size in (one, one)]
    x = F.pad(x, both, mode="constant" if of.padding_mode == "zeros" else of.padding_mode)
    counts = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, dilation in zip(x.shape[2:], of.kernel, of.stride, of.dilation, strict=True)
    ]
    rows = []
    for sample in x:
        for place in torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, len(counts)):
            patch = sample
            for d, (at, k, stride, dilation) in enumerate(
                zip(place.tolist(), of.kernel, of.stride, of.dilation, strict=True)
            ):
                patch = patch.index_select(d + 1, at * stride + dilation * torch.arange(k))
            rows.append(patch.reshape(of.groups, -1))
    return torch.stack(rows, 1)


CONVS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 2, 3, padding=2, stride=2), (8,)),
    (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)), (7, 6)),
    (nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="reflect", bias=False), (5, 4)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same", padding_mode="circular"), (5, 4)),
    (nn.Conv3d(1, 2, 2, padding_mode="replicate", padding=1), (3, 4, 3)),
]


@pytest.mark.parametrize(("layer", "size"), CONVS, ids=[str(one) for one, _ in CONVS])
def test_a_convolution_sees_its_patches(layer: Any, size: tuple[int, ...]) -> None:
    layer, x = layer.double(), torch.randn(3, layer.in_channels, *size, dtype=torch.float64)
    found = InputStatistics(linear_map(layer).sizes)
    found.add(x)
    rows = by_loop(layer, x)
    assert found.count == rows.shape[1]
    for g, part in enumerate(rows):
        mean, covariance = by_hand(part)
        torch.testing.assert_close(found.mean if layer.groups == 1 else found.mean[g], mean)
        torch.testing.assert_close(found.covariance if layer.groups == 1 else found.covariance[g], covariance)
    weight = linear_map(layer).weight.flatten(1).unflatten(0, (layer.groups, -1))
    y = torch.einsum("goi,gri->rgo", weight, rows).flatten(1)
    y = y + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(y, layer(x).movedim(1, -1).reshape(-1, layer.out_channels))


def test_patches_are_those_of_torchs_unfold() -> None:
    layer, x = nn.Conv2d(3, 1, (3, 2), stride=2, padding=1, dilation=(1, 2)), torch.randn(2, 3, 6, 7)
    ours = patches(x, linear_map(layer).sizes).flatten(3).flatten(1, 2)
    torch.testing.assert_close(ours, F.unfold(x, (3, 2), (1, 2), 1, 2).mT)


def test_a_linear_layer_sees_rows_of_any_dimension_and_type() -> None:
    x = torch.randn(4, 3, 5).bfloat16()
    found = InputStatistics(linear_map(nn.Linear(5, 2)).sizes)
    found.add(x)
    mean, covariance = by_hand(x.double().view(12, 5))
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance)


def test_an_embedding_sees_how_often_entries_come() -> None:
    found = InputStatistics(linear_map(nn.Embedding(4, 2)).sizes)
    found.add(torch.tensor([[0, 1], [1, 3]]))
    found.add(torch.tensor([1, 1]))
    assert found.mean.tolist() == pytest.approx([1 / 6, 4 / 6, 0, 1 / 6])
    with pytest.raises(ValueError, match="frequencies"):
        _ = found.covariance


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_two_halves_are_the_whole(far: float) -> None:
    of = linear_map(nn.Linear(5, 2)).sizes
    x = torch.randn(40, 5, dtype=torch.float64) + far
    halves = [InputStatistics(of), InputStatistics(of)]
    halves[0].add(x[:7])
    halves[0].add(x[7:20])
    halves[1].add(x[20:])
    halves[0].merge(halves[1])
    mean, covariance = by_hand(x)
    assert halves[0].count == 40
    torch.testing.assert_close(halves[0].mean, mean)
    torch.testing.assert_close(halves[0].covariance, covariance, rtol=1e-6, atol=1e-6)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        return self.layer(input=self.drop(self.norm(self.layer(x))))


def test_all_calls_of_a_layer_count_and_the_network_stays_as_it_is() -> None:
    net, x = Twice().train(), torch.randn(6, 4)
    with torch.no_grad():
        inner = net.eval().norm(net.layer(x))
    net.train()
    state, before = {name: one.clone() for name, one in net.state_dict().items()}, torch.get_rng_state()
    found = gather_statistics(net, ["layer"], [x[:2], x[2:]])["layer"]
    mean, covariance = by_hand(torch.cat([x, inner]).double())
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, covariance)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert not net.layer._forward_pre_hooks
    assert all(torch.equal(state[name], one) for name, one in net.state_dict().items())


def test_positions_are_drawn_by_an_own_generator() -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3)), torch.randn(20, 1, 9, 9)
    before = torch.get_rng_state()
    few = [gather_statistics(net, ["0"], [x, x], limit=100, seed=seed)["0"] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert few[0].count == 200
    assert torch.equal(few[0].mean, few[1].mean)
    assert not torch.equal(few[0].mean, few[2].mean)
    whole = gather_statistics(net, ["0"], [x], limit=None)["0"]
    assert whole.count == 20 * 49
    torch.testing.assert_close(few[0].covariance, whole.covariance, rtol=0, atol=0.3)


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    net.forward = net["used"].forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"used.* saw no inputs"):
        gather_statistics(net, ["used", "unused"], [torch.zeros(1, 2)])


def seen_by(batches: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3))
    found = gather_statistics(net, ["0", "2"], batches, limit=None)
    return {f"{path} {name}": getattr(one, name) for path, one in found.items() for name in ("mean", "covariance")}


def on_rank(batches: list[Tensor]) -> dict[str, Tensor]:
    """A job of the pair of ranks: the second rank takes what the first one leaves."""
    started = dist.is_initialized()
    if not started:
        dist.init_process_group("gloo")
    try:
        return seen_by(batches[:2] if dist.get_rank() == 0 else batches[2:])
    finally:
        if not started:
            dist.destroy_process_group()


def test_two_ranks_together_see_what_one_process_sees(rank_pair: RankPair, tmp_path: Path) -> None:
    batches = list(torch.randn(3, 5, 2, 2, 2))
    for number in (3, 2):  # with two batches the second rank sees nothing
        first, second = rank_pair.run("replacement.test_statistics:on_rank", tmp_path, batches=batches[:number])
        for name, value in seen_by(batches[:number]).items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], value)
