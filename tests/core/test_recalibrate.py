"""Recalibrated statistics against sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ranks import RankPair
from torch import Tensor, nn

from lightning_compress.core.recalibrate import recalibrate


class Net(nn.Module):
    """Norms before and after a layer that is switched to evaluation inside, dropout, a norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.linear = nn.Linear(3, 4)
        self.second, self.unused = nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.eval()  # which must not undo anything
        self.calls += 1
        return self.second(self.linear(self.drop(self.first(x))))


def by_hand(net: Net, batches: list[Tensor]) -> list[Tensor]:
    """The statistics of both norms: of the raw inputs, and of what the linear layer makes of them, normalized."""
    means, variances = [], []
    for batch in batches:
        normal = (batch - batch.mean(0)) / (batch.var(0, unbiased=False) + net.first.eps).sqrt()
        hidden = (normal * net.first.weight + net.first.bias) @ net.linear.weight.T + net.linear.bias
        means.append(torch.cat([batch.mean(0), hidden.mean(0)]))
        variances.append(torch.cat([batch.var(0), hidden.var(0)]))
    return [torch.stack(means).mean(0), torch.stack(variances).mean(0)]


def statistics(net: Net) -> list[Tensor]:
    pairs = [(norm.running_mean, norm.running_var) for norm in (net.first, net.second)]
    return [torch.cat(one) for one in zip(*pairs, strict=True)]


def drawn(seed: int) -> tuple[Net, list[Tensor]]:
    torch.manual_seed(seed)
    net = Net()
    net.first.running_mean += 7
    net.unused.running_mean += 7
    return net, [torch.randn(16, 3, dtype=torch.double) * scale + scale for scale in (1, 2, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_those_by_hand(training: bool) -> None:
    net, batches = drawn(0)
    net.train(training)
    net.drop.train(not training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    assert recalibrate(net, batches) == ["first", "second"]
    for got, expected in zip(statistics(net), by_hand(net, batches[:5]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net.first.running_mean, torch.cat(batches[:5]).mean(0), rtol=1e-12, atol=1e-12)
    assert [net.training, net.drop.training, net.second.training] == [training, not training, training]
    assert (net.first.momentum, net.second.momentum, int(net.second.num_batches_tracked)) == (0.1, 0.3, 5)
    assert "train" not in vars(net.first)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    norms = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{norm}.{name}" for norm in ("first", "second") for name in norms}
    assert torch.equal(torch.get_rng_state(), random)


def test_instance_norms_and_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(2, track_running_stats=True)
            self.free, self.layer = nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(5)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.layer(self.free(self.norm(x)))

    torch.manual_seed(0)
    net, batches = Named().double(), [torch.randn(4, 2, 5, dtype=torch.double) for _ in range(3)]
    assert recalibrate(net, ({"x": batch} for batch in batches)) == ["norm"]
    expected = torch.stack([batch.var(2).mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(net.norm.running_var, expected, rtol=1e-12, atol=1e-12)
    expected = torch.stack([batch.mean((0, 2)) for batch in batches]).mean(0)
    torch.testing.assert_close(net.norm.running_mean, expected, rtol=1e-12, atol=1e-12)
    assert recalibrate(nn.Linear(2, 2), []) == []


def test_refusals_leave_the_network_as_it_was() -> None:
    net, batches = drawn(0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="There is no batch from which the norms of Net"):
        recalibrate(net, [])
    with pytest.raises(ValueError, match=r"batches is the number of batches .* got 0"):
        recalibrate(net, batches, batches=0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        recalibrate(net, [*batches[:2], batches[2][:1]])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (net.first.training, net.first.momentum, "train" in vars(net.first)) == (True, 0.1, False)


def on_rank(counts: list[int]) -> list[Tensor]:
    """A job of the pair of ranks: the first rank takes the first batches, the second one those after them."""
    import torch.distributed as dist

    started = dist.is_initialized()
    if not started:
        dist.init_process_group("gloo")
    try:
        net, batches = drawn(0)
        rank = dist.get_rank()
        mine = batches[: counts[0]] if rank == 0 else batches[counts[0] :][: counts[1]]
        recalibrate(net, mine)
        return [*statistics(net), net.second.num_batches_tracked]
    finally:
        if not started:
            dist.destroy_process_group()


def test_ranks_share_their_batches(rank_pair: RankPair, tmp_path: Path) -> None:
    for counts in ([3, 4], [2, 0]):
        first, second = rank_pair.run("core.test_recalibrate:on_rank", tmp_path, counts=counts)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        net, batches = drawn(0)
        for got, expected in zip(first, by_hand(net, batches[: sum(counts)]), strict=False):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert int(first[-1]) == sum(counts)
