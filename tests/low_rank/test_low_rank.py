"""Whole networks: what is replaced, that the budget is kept by torch's own counts, and that errors change nothing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compare import differences
from torch import Tensor, nn

from lightning_compress import substitute_convs
from lightning_compress.low_rank.merge import merge
from lightning_compress.low_rank.replace import lower_rank
from lightning_compress.measure.macs import count_macs
from lightning_compress.replacement.swap import replaced


class Language(nn.Module):
    """A small transformer: an embedding tied to the output matrix, torch's attention, and an MLP."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 48, dropout=0.1, batch_first=True)
        self.output = nn.Linear(16, 60, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, entries: Tensor) -> Tensor:
        return self.output(self.layer(self.embedding(entries)))


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def pictures(samples: int = 4, seed: int = 0) -> Tensor:
    drawn = torch.randn(samples, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(drawn, 3, 1, 1)


def words(samples: int = 4, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, (samples, 7), generator=torch.Generator().manual_seed(seed))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_a_budget_is_kept_by_torchs_own_counts(cost: Any, budget: float) -> None:
    network, x = images(), pictures()
    count = parameters if cost == "parameters" else lambda one: count_macs(one.eval(), x)[0]
    before = count(network)
    report = lower_rank(network, x, budget=budget, cost=cost, batches=[pictures(seed=n) for n in range(3)])
    assert budget - 0.06 <= count(network) / before <= budget + 1e-4
    field = "parameters" if cost == "parameters" else "macs"
    saved = sum(getattr(one.before, field) - getattr(one.after, field) for one in report.choices.values())
    assert before - count(network) == pytest.approx(saved if cost == "parameters" else saved / 4)
    assert set(report.replaced) == set(replaced(network))
    assert set(report.replaced) | set(report.left) == {"0", "3", "5", "9"}


def test_nothing_given_keeps_half_of_the_parameters() -> None:
    network = images()
    before = parameters(network)
    lower_rank(network, pictures())
    assert 0.45 * before < parameters(network) <= 0.5 * before


def test_all_of_the_budget_changes_nothing() -> None:
    network = images()
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    report = lower_rank(network, pictures(), budget=1.0, batches=[pictures()])
    assert not report.replaced
    assert not differences(before, network.state_dict())
    assert list(network.modules()) == modules


@pytest.mark.parametrize("make", [images, Language])
def test_the_higher_the_energy_the_nearer_the_outputs(make: Any) -> None:
    x = words() if make is Language else pictures()
    changes = []
    for energy in (0.5, 0.9, 0.99, 0.99999):
        network = make().eval()
        expected = network(x)
        lower_rank(network, x, energy=energy, batches=[x])
        changes.append(float((network(x) - expected).square().mean() / expected.var()))
    assert all(high >= low for high, low in itertools.pairwise(changes))
    assert changes[0] > 0.005
    assert changes[-1] < 1e-3


def test_data_make_the_outputs_nearer_at_the_same_ranks() -> None:
    x = pictures(16)
    changes = []
    for batches in (None, [pictures(16, seed=n) for n in range(1, 5)]):
        network = images().eval()
        expected = network(x)
        lower_rank(network, x, rank={"3": 12, "5": 3}, method="channel", batches=batches)
        changes.append(float((network(x) - expected).square().mean()))
    assert changes[1] < changes[0]


def test_a_tied_output_matrix_and_its_embedding_are_one() -> None:
    network = Language()
    report = lower_rank(network, words(), rank={"embedding": 4}, batches=[words(seed=n) for n in range(3)])
    assert report.replaced["embedding"].before.parameters == 60 * 16
    assert network.embedding.first.weight is network.output.second.weight  # type: ignore[union-attr]
    assert network.output.first.in_features == 16  # type: ignore[union-attr]
    network.train()(words()).sum().backward()
    assert network.embedding.first.weight.grad is not None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="embedding shares its long factor"):
        merge(network)


def test_what_a_parent_reads_itself_stays_and_the_reason_is_told() -> None:
    network = Language(tied=False).eval()
    expected = network(words())
    report = lower_rank(network, words(), rank=3)
    assert "reads its weight" in report.left["layer.self_attn.out_proj"]
    assert "MultiheadAttention reads it itself" in report.left["layer.self_attn.in_proj_weight"]
    assert set(report.replaced) == {"embedding", "layer.linear1", "layer.linear2", "output"}
    assert network(words()).shape == expected.shape


def test_ranks_by_pattern_and_the_layers_that_no_pattern_names() -> None:
    network = images()
    with pytest.warns(UserWarning, match=r"Not replaced, because no pattern of rank=.* names them: 0.weight, 9.weight"):
        report = lower_rank(network, pictures(), rank={"3": 5, "5": 2}, method="channel")
    assert {path: one.option.numbers for path, one in report.replaced.items()} == {"3": (5,), "5": (2,)}
    assert list(report.choices) == ["3", "5"]


def test_a_method_that_a_kernel_does_not_fit_leaves_the_layer() -> None:
    network = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3))
    report = lower_rank(network, torch.zeros(1, 8, 6, 6), rank=4, method="spatial")
    assert report.left == {"0": "it needs a kernel with two sizes above 1, and this one has 1 x 1"}
    assert report.replaced["1"].option.form == "spatial"
    assert report.rows()[1] == ("1", "spatial, rank 4", "2,320 -> 400", "")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank is a whole number, 1 or more, .* got 0"),
    ({"rank": {"3": 2.5}}, "rank is a whole number, .* got 2.5"),
    ({"rank": True}, "rank is a whole number, .* got True"),
    ({"rank": {}}, "names no layer"),
    ({"rank": 500}, "rank must be from 1 to .* got 500"),
    ({"rank": {"9": 11}}, "rank must be from 1 to 10 for 9; got 11"),
    ({"energy": 0.0}, "energy is the share of the variance that stays, above 0 to 1; got 0.0"),
    ({"energy": 1.5}, "got 1.5"),
    ({"energy": "0.5"}, "got the text '0.5'"),
    ({"budget": 0}, "budget is the share of the cost that stays, above 0 to 1; got 0"),
    ({"budget": 0.02}, "budget=0.02 of the parameters can't be met: the least possible is 0.0"),
    ({"budget": 0.02, "cost": "macs"}, "of the multiply-accumulates can't be met: the least possible is 0.0"),
    ({"rank": 2, "energy": 0.5}, "Pass one of rank, energy and budget; got rank and energy"),
    ({"cost": "flops"}, "cost must be one of parameters, macs, latency; got 'flops'"),
    ({"method": "cp"}, "method must be one of auto, channel, spatial, tucker; got 'cp'"),
    ({"target": "1"}, "names no layer that low rank could replace"),
    ({"exclude": "*"}, "selects no parameter"),
    ({"batches": []}, "no batches"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_is_wrong_is_said_and_the_network_stays(options: dict[str, Any], message: str) -> None:
    network = images()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message):
        lower_rank(network, pictures(), **options)
    assert not replaced(network)
    assert not differences(before, network.state_dict())


def test_a_network_without_such_layers_is_refused_with_reasons() -> None:
    frozen = nn.Sequential(nn.Linear(8, 8), nn.ConvTranspose1d(1, 1, 3)).requires_grad_(False)
    with pytest.raises(ValueError, match="has no layer that low rank could replace: 0: it is frozen"):
        lower_rank(frozen[:1], torch.zeros(1, 8))
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"target='1' .* names no layer .*; 1: it is frozen"):
        lower_rank(network, torch.zeros(1, 8), target="1")


def test_a_network_that_does_not_run_afterwards_is_as_it_was() -> None:
    network = images()
    before = copy.deepcopy(network.state_dict())

    def breaks(module: Any, *_: Any) -> None:
        if replaced(network):
            raise RuntimeError("it reads what is gone")

    network.register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="what is gone"):
        lower_rank(network, pictures(), rank=2)
    assert not replaced(network)
    assert not differences(before, network.state_dict())


def test_a_network_keeps_its_mode_and_draws_nothing() -> None:
    network = images().train()
    network[5].eval()
    state = torch.get_rng_state()
    lower_rank(network, pictures(), batches=[pictures(64)])
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert not any(one.training for one in network[5].modules())
    assert all(one.training for one in network[3].modules())


@pytest.mark.parametrize("rows", [1, 8])
def test_a_budget_is_spent_although_few_rows_were_seen(rows: int) -> None:
    """With so few rows the covariance has few directions, and all others look as if they could be dropped for free."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    by_data, by_svd, dense = (copy.deepcopy(network) for _ in range(3))
    mix = torch.randn(64, 64) * torch.linspace(2, 0.05, 64)
    seen, x = torch.randn(rows, 64) @ mix, torch.randn(500, 64) @ mix
    lower_rank(by_data, seen, budget=0.5, batches=[seen])
    lower_rank(by_svd, seen, budget=0.5)
    parameters = [sum(one.numel() for one in net.parameters()) for net in (by_data, dense)]
    assert 0.47 < parameters[0] / parameters[1] <= 0.5
    assert (by_data(x) - dense(x)).norm() < 1.1 * (by_svd(x) - dense(x)).norm()


def test_a_budget_that_cannot_be_met_says_which_layers_stand_in_its_way() -> None:
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    network[1].requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"may be replaced: 0, 2\. Others may not: 1: it is frozen: its weight has requires_grad=False\.$",
    ):
        lower_rank(network, torch.zeros(1, 16), budget=0.3)


@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_a_budget_is_a_share_of_the_network_before_any_layer_was_replaced(cost: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.randn(2, 8, 6, 6)

    def amount() -> float:
        return count_macs(net, x)[0] if cost == "macs" else sum(one.numel() for one in net.parameters())

    before = amount()
    substitute_convs(net, x, init="svd")
    lower_rank(net, x, budget=0.6, cost=cost)
    assert 0.4 < amount() / before <= 0.6


def test_inputs_with_which_the_network_does_not_run_are_named() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"Sequential does not run with example_inputs of shape \(2, 7\): mat1"):
        lower_rank(net, torch.zeros(2, 7))
