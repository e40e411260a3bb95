"""Searched widths against a greedy search by hand, with `cut` on copies, and against every possible choice."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import RankPair
from torch import Tensor, nn

from lightning_compress import channel_groups, cut
from lightning_compress.baselines import Classifier, DigitsConvNet, TensorLoader
from lightning_compress.core.answering import Answer, put
from lightning_compress.measure.macs import count_macs
from lightning_compress.slimmable import FoundWidths, recalibrate, search_widths
from lightning_compress.slimmable.module import SlimmableWidth
from lightning_compress.slimmable.norms import give_norms, norms_of, sliced_norms
from lightning_compress.slimmable.switch import set_width, thin_of
from lightning_compress.slimmable.widths import counts_at

SIZES = {"0": 4, "3": 6, "6": 4}


def drawn() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A network whose last channels matter less, and batches that it explains."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()),
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
        *(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    ).double()
    for linear in (net[0], net[3], net[6]):
        linear.weight.data *= torch.linspace(2, 0.3, len(linear.weight), dtype=torch.double)[:, None]
    net.eval()
    x = torch.randn(4, 32, 5, dtype=torch.double)
    recalibrate(net, x)
    return net, [(inputs, net(inputs).argmax(1)) for inputs in x]


def by_hand(net: nn.Sequential, batches: list[tuple[Tensor, Tensor]], counts: dict[str, int]) -> tuple[float, float]:
    """The loss with recalibrated norms, and the share of the MACs, of so many first channels."""
    a, b, c = counts.values()
    statistics: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        fresh = not statistics
        for place, (linear, norm) in enumerate([(net[0], net[1]), (net[3], net[4])]):
            n = (a, b)[place]
            x = x @ linear.weight[:n, : x.shape[1]].T + linear.bias[:n]
            found.append(torch.stack([x.mean(0), x.var(0)]))
            if fresh:
                mean, var = x.mean(0), x.var(0, unbiased=False)
            elif counts == SIZES:
                mean, var = norm.running_mean, norm.running_var
            else:
                mean, var = statistics[place]
            x = ((x - mean) / (var + norm.eps).sqrt() * norm.weight[:n] + norm.bias[:n]).relu()
        x = (x @ net[6].weight[:c, :b].T + net[6].bias[:c]).relu()
        return x @ net[8].weight[:, :c].T + net[8].bias

    with torch.no_grad():
        found: list[Tensor] = []
        for inputs, _ in batches:
            forward(inputs)
        statistics = [torch.stack(found[place::2]).mean(0) for place in range(2)]
        loss = sum(float(F.cross_entropy(forward(inputs), targets)) for inputs, targets in batches) / len(batches)
    return loss, (5 * a + a * b + b * c + 3 * c) / (5 * 4 + 4 * 6 + 6 * 4 + 3 * 4)


def search(net: nn.Module, batches: Any, budget: float, **options: Any) -> FoundWidths:
    return search_widths(net, batches, **{"budget": budget, "step": 0.25} | options)


def test_each_decision_is_the_one_by_hand() -> None:
    net, batches = drawn()
    before = copy.deepcopy(net.state_dict())
    found = search(net, batches, 0.4, least=0.2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert found.sizes == SIZES
    counts, now = dict(SIZES), by_hand(net, batches, SIZES)
    assert (found.loss, found.cost) == pytest.approx(now, rel=1e-12)
    for decision in found.decisions:
        less = {"0": 1, "3": 2, "6": 1}  # a quarter
        fewer = {name: count - less[name] for name, count in counts.items() if count > 1}
        table = {name: by_hand(net, batches, counts | {name: count}) for name, count in fewer.items()}
        assert decision.candidates.keys() == table.keys()
        for name, pair in table.items():
            assert decision.candidates[name] == pytest.approx(pair, rel=1e-9)
        best = min(table, key=lambda name: (table[name][0] - now[0]) / (now[1] - table[name][1]))
        counts, now = counts | {best: fewer[best]}, table[best]
        assert (decision.group, decision.channels) == (best, fewer[best])
        assert (decision.loss, decision.cost) == pytest.approx(now, rel=1e-9)
    assert found.counts() == counts


def test_costs_fall_and_the_last_step_meets_the_budget() -> None:
    net, batches = drawn()
    found = search(net, batches, 0.4)
    costs = [found.cost, *(one.cost for one in found.decisions)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] <= 0.4 < costs[-2]
    thin = cut(copy.deepcopy(net), batches[0][0], keep={name: range(n) for name, n in found.counts().items()})
    recalibrate(thin, [inputs for inputs, _ in batches])
    loss = sum(float(F.cross_entropy(thin(inputs), targets)) for inputs, targets in batches) / len(batches)
    assert loss == pytest.approx(found.decisions[-1].loss, rel=1e-9)
    assert count_macs(thin, batches[0][0])[0] / count_macs(net, batches[0][0])[0] == pytest.approx(costs[-1])
    assert found.counts(0.7) == search(net, batches, 0.7).counts()
    assert found.widths(0.4) == {name: count / SIZES[name] for name, count in found.counts().items()}
    assert search(net, batches, 1.0).decisions == []
    macs = search(net, batches, 0.4 * count_macs(net, batches[0][0])[0], unit="macs")
    assert macs.counts() == found.counts()
    with pytest.raises(ValueError, match=r"The search has come to 0\.\d+ share, which is more than 0.1"):
        found.counts(0.1)


def test_among_all_choices_within_the_budget_it_is_one_of_the_best() -> None:
    net, batches = drawn()
    found = search(net, batches, 0.6, step=0.01)  # one channel at a time
    every = [
        by_hand(net, batches, dict(zip(SIZES, counts, strict=True)))
        for counts in itertools.product(*(range(1, size + 1) for size in SIZES.values()))
    ]
    within = sorted(loss for loss, cost in every if cost <= 0.6)
    assert len(within) > 20
    assert found.decisions[-1].loss <= within[len(within) // 10]


@pytest.mark.parametrize("norms", ["recalibrate", "batch"])
def test_a_resumed_search_is_the_uninterrupted_one(norms: str, tmp_path: Path) -> None:
    net, batches = drawn()
    whole = search(net, batches, 0.3, norms=norms)
    calls = itertools.count()

    def interrupted(output: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 35:
            raise KeyboardInterrupt
        return F.cross_entropy(output, targets)

    record = tmp_path / "search.json"
    with pytest.raises(KeyboardInterrupt):
        search(net, batches, 0.3, norms=norms, loss=interrupted, record=record)
    assert 0 < len(FoundWidths.from_json(record.read_text()).decisions) < len(whole.decisions)
    assert search(net, batches, 0.3, norms=norms, record=record) == whole
    calls = itertools.count()

    def counted(output: Tensor, targets: Tensor) -> Tensor:
        next(calls)
        return F.cross_entropy(output, targets)

    assert search(net, batches, 0.3, norms=norms, record=record, loss=counted) == whole
    assert next(calls) == len(batches)  # only the full network's loss is computed, to know the record by it


def test_the_record_of_another_start_is_refused_by_name(tmp_path: Path) -> None:
    net, batches = drawn()
    record = tmp_path / "search.json"
    search(net, batches, 0.7, record=record)
    text = record.read_text()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    starts: list[tuple[Any, Any, dict[str, Any], str]] = [
        (net, batches, {"step": 0.5}, "step=0.25; this one has step=0.5"),
        (net, batches, {"least": 0.3}, "least=0.1; this one has least=0.3"),
        (net, batches, {"norms": "batch"}, "norms='recalibrate'; this one has norms='batch'"),
        (net, batches, {"unit": "macs", "budget": 1e9}, "unit='share', cost=1.0; this one has unit='macs'"),
        (net, batches, {"loss": F.multi_margin_loss}, "loss="),
        (net, batches[:1], {}, "loss="),
        (other, batches, {}, "loss="),
    ]
    for network, held, options, message in starts:
        with pytest.raises(ValueError, match=f"search.json is the record of another search: it has {message}"):
            search(network, held, **{"budget": 0.5, "record": record} | options)
    assert record.read_text() == text
    assert search(net, batches, 0.5, record=record) == search(net, batches, 0.5)  # another budget goes on


def test_milliseconds_and_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(calls: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[float]]:
        return {name: [count_macs(*one.args)[0] / 1000] for name, one in calls.items()}  # as if each took a microsecond

    def wrong(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) != targets).double().mean()

    net, batches = drawn()
    full = count_macs(net, batches[0][0])[0]
    assert search(net, batches, 1e6, unit="ms").cost > 0  # by the clock
    monkeypatch.setattr("lightning_compress.slimmable.search.seconds_in_turns", seconds)
    found = search(net, batches, 0.5 * full, unit="ms", loss=wrong)
    assert found.counts() == search(net, batches, 0.5, loss=wrong).counts()
    assert found.loss == 0.0


def test_refusals() -> None:
    net, batches = drawn()
    with pytest.raises(ValueError, match=r"The budget of 0.01 share can't be met: the narrowest network needs 0\.\d+"):
        search(net, batches, 0.01)
    with pytest.raises(ValueError, match="There is no batch on which candidates"):
        search(net, [], 0.5)
    with pytest.raises(ValueError, match=r"step must be a share above 0.* got 0"):
        search(net, batches, 0.5, step=0)
    with pytest.raises(ValueError, match="unit is share, macs or ms"):
        search(net, batches, 0.5, unit="seconds")
    for budget, unit, most in ((50, "share", "at most 1"), (math.nan, "macs", "finite"), (0.0, "ms", "finite")):
        with pytest.raises(ValueError, match=f"budget must be above 0 and {most}.* '{unit}'; got {budget}"):
            search(net, batches, budget, unit=unit)
    with pytest.raises(ValueError, match=r"held-out loss of Sequential is nan"):
        search(net, batches, 0.5, loss=lambda output, targets: output.mean() * math.nan)
    put(net, Answer(net.forward, nn.Identity()))
    with pytest.raises(ValueError, match="Sequential runs at another width than the full one"):
        search(net, batches, 0.5)


@pytest.mark.parametrize("text", ["", "{}", "[1]"])
def test_a_broken_record_is_refused_before_the_search(text: str, tmp_path: Path) -> None:
    net, batches = drawn()
    record = tmp_path / "search.json"
    record.write_text(text)
    with pytest.raises(ValueError, match=r"search.json is no complete record of a search .*: remove it"):
        search(net, batches, 0.5, record=record)
    assert record.read_text() == text
    with pytest.raises(ValueError, match=r"because .*nowhere is no folder"):
        search(net, batches, 0.5, record=tmp_path / "nowhere" / "search.json")


def on_rank(norms: str) -> FoundWidths:
    """A job of the pair of ranks: each has two of the four batches."""
    import torch.distributed as dist

    started = dist.is_initialized()
    if not started:
        dist.init_process_group("gloo")
    try:
        net, batches = drawn()
        return search(net, batches[dist.get_rank() :: 2], 0.4, norms=norms)
    finally:
        if not started:
            dist.destroy_process_group()


@pytest.mark.parametrize("norms", ["recalibrate", "batch"])
def test_ranks_decide_alike_by_all_batches(norms: str, rank_pair: RankPair, tmp_path: Path) -> None:
    first, second = rank_pair.run("slimmable.test_search:on_rank", tmp_path, norms=norms)
    assert first == second
    net, batches = drawn()
    alone = search(net, batches, 0.4, norms=norms)
    assert first.counts() == alone.counts()
    for one, other in zip(first.decisions, alone.decisions, strict=True):
        assert (one.group, one.loss) == (other.group, pytest.approx(other.loss, rel=1e-9))


def test_groups_of_a_network_are_found_or_given() -> None:
    net, batches = drawn()
    assert search(net, batches, 0.5, groups=channel_groups(net, batches[0][0])) == search(net, batches, 0.5)


def test_what_is_found_can_be_set_on_a_network_with_widths() -> None:
    net, batches = drawn()
    x = batches[0][0]
    give_norms(net, channel_groups(net, x), [0.5], norms="recalibrate")
    before = copy.deepcopy(net.state_dict())
    found = search(net, batches, 0.5)
    plain, _ = drawn()
    assert found == search(plain, batches, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    held, groups = norms_of(net), channel_groups(net, x)
    assert held is not None
    counts = counts_at(groups, found.widths())
    assert counts == found.counts()
    held.put(found.widths(), sliced_norms(net, groups, counts))
    recalibrate(thin_of(net, found.widths()).module, [inputs for inputs, _ in batches])
    set_width(net, found.widths())
    loss = sum(float(F.cross_entropy(net(inputs), targets)) for inputs, targets in batches) / len(batches)
    assert loss == pytest.approx(found.decisions[-1].loss, rel=1e-9)


def test_the_wrapper_sets_and_extracts_what_is_found() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(256, 1, 8, 8), torch.randint(10, (256,))
    plain = Classifier(DigitsConvNet(width=8), input_shape=(1, 8, 8))
    module = SlimmableWidth(plain, (0.5, 1.0), universal=True, network="network").eval()
    loader = TensorLoader(images, labels, batch_size=64)
    found = search_widths(module.network, loader, budget=0.5, step=0.25)
    module.recalibrate(loader, widths=[found.widths()])
    module.set_width(found.widths())
    with torch.no_grad():
        set_loss = F.cross_entropy(module(images), labels)
        thin = module.extract(found.widths()).eval()
        assert float(F.cross_entropy(thin(images), labels)) == pytest.approx(float(set_loss), abs=1e-5)
    assert float(set_loss) == pytest.approx(found.decisions[-1].loss, abs=1e-4)
    with pytest.raises(ValueError, match="runs at another width than the full one"):
        search_widths(module.network, loader, budget=0.5)
