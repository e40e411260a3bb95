"""Which channels go: all ways to drop so many are tried."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.channels.groups import Member
from lightning_compress.pruning.channels import Channels
from lightning_compress.pruning.masks import expand, prune_channels

Scores = dict[str, Tensor]


def cheapest(scores: Scores, amount: float, alive: Scores, costs: dict[str, float], least: int) -> Scores:
    """Of all masks that drop as many channels as asked for, or as the limits allow, the one that loses least."""
    channels = [(name, channel) for name, score in scores.items() for channel in range(len(score))]
    kept_at_least = {name: min(least, int(alive[name].sum())) for name in scores}
    n_drop = min(round(amount * len(channels)), len(channels) - sum(kept_at_least.values()))
    best: tuple[float, set[tuple[str, int]]] = (float("inf"), set())
    for dropped in itertools.combinations(channels, n_drop):
        gone = set(dropped)
        dead_stay_dead = all(bool(alive[name][channel]) or (name, channel) in gone for name, channel in channels)
        left = {name: sum((name, channel) not in gone for channel in range(len(scores[name]))) for name in scores}
        if dead_stay_dead and all(left[name] >= kept_at_least[name] for name in scores):
            loss = sum(float(scores[name][channel]) / costs[name] for name, channel in dropped if alive[name][channel])
            best = min(best, (loss, gone), key=lambda one: one[0])
    return {
        name: torch.tensor([(name, channel) not in best[1] for channel in range(len(score))])
        for name, score in scores.items()
    }


def rounded_up(masks: Scores, scores: Scores, alive: Scores, multiple: int) -> Scores:
    """The best that are alive, as many as the next multiple says, if there are so many."""
    found = {}
    for name, mask in masks.items():
        wanted = -(-int(mask.sum()) // multiple) * multiple
        ranking = sorted(range(len(mask)), key=lambda channel: -float(scores[name][channel]))
        stay = [channel for channel in ranking if alive[name][channel]][:wanted]
        found[name] = torch.tensor([channel in stay for channel in range(len(mask))])
    return found


def draw(seed: int, *, dead: bool) -> tuple[Scores, Scores, dict[str, float]]:
    """Up to eleven channels in three groups, of which some are dead, if wanted, and what a channel costs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(zip("abc", torch.randint(2, 5, (3,), generator=generator).tolist(), strict=True))
    sizes["c"] = min(sizes["c"], 3)
    scores = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    alive = {name: torch.rand(size, generator=generator) > 0.3 * dead for name, size in sizes.items()}
    for mask in alive.values():
        mask[int(torch.randint(len(mask), (), generator=generator))] = True
    return scores, alive, dict(zip("abc", torch.rand(3, generator=generator).add(0.1).tolist(), strict=True))


def pruned(scores: Scores, amount: float, *, warns: bool, **options: Any) -> Scores:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = prune_channels(scores, amount, **options)
    assert bool(caught) == warns
    assert all("some channels of every layer stay" in str(one.message) for one in caught)
    return masks


def asks_too_much(scores: Scores, alive: Scores, amount: float, least: int) -> bool:
    possible = sum(len(score) - min(least, int(alive[name].sum())) for name, score in scores.items())
    return round(amount * sum(map(len, scores.values()))) > possible


def assert_same(masks: Scores, expected: Scores) -> None:
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        name: one.tolist() for name, one in expected.items()
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("least", [1, 2, 4])
def test_channels_of_all_groups_compete(seed: int, amount: float, least: int) -> None:
    scores, alive, costs = draw(seed, dead=False)
    warns = asks_too_much(scores, alive, amount, least)
    free = dict.fromkeys(scores, 1.0)
    expected = cheapest(scores, amount, alive, free, least)
    assert_same(pruned(scores, amount, warns=warns, min_channels=least), expected)
    expected = cheapest(scores, amount, alive, costs, least)
    masks = pruned(scores, amount, warns=warns, min_channels=least, costs=costs)
    assert_same(masks, expected)
    for multiple in (2, 3, 8):
        rounded = rounded_up(masks, scores, alive, multiple)
        assert_same(pruned(scores, amount, warns=warns, min_channels=least, costs=costs, round_to=multiple), rounded)
        for name, mask in rounded.items():
            assert mask.sum() % multiple == 0 or mask.all()
            assert (mask >= masks[name]).all()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("least", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 2])
def test_what_is_dead_stays_dead(seed: int, least: int, multiple: int) -> None:
    scores, alive, costs = draw(seed, dead=True)
    n_dead = sum(int((~mask).sum()) for mask in alive.values())
    total = sum(map(len, scores.values()))
    for amount in (n_dead / total, 0.8):
        if round(amount * total) < n_dead:
            continue
        expected = rounded_up(cheapest(scores, amount, alive, costs, least), scores, alive, multiple)
        masks = pruned(
            scores,
            amount,
            warns=asks_too_much(scores, alive, amount, least),
            alive=alive,
            costs=costs,
            min_channels=least,
            round_to=multiple,
        )
        assert_same(masks, expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("amount", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("least", [1, 3])
def test_channels_of_one_group_compete_with_each_other(seed: int, amount: float, least: int) -> None:
    """What a channel costs does not matter then."""
    scores, alive, costs = draw(seed, dead=False)
    expected = {}
    for name in scores:
        alone = {name: scores[name]}, amount, {name: alive[name]}, {name: 1.0}
        expected |= rounded_up(cheapest(*alone, least), *(alone[0], alone[2]), 2)
    warns = any(asks_too_much({name: scores[name]}, alive, amount, least) for name in scores)
    options = {"scope": "layer", "costs": costs, "min_channels": least, "round_to": 2}
    assert_same(pruned(scores, amount, warns=warns, **options), expected)


def test_the_scores_are_not_changed() -> None:
    scores, alive, costs = draw(0, dead=False)
    before = {name: score.clone() for name, score in scores.items()}
    for scope in ("global", "layer"):
        pruned(scores, 0.5, warns=False, scope=scope, alive=alive, costs=costs, round_to=2)
    assert_same(scores, before)


def test_the_best_channel_stays_whatever_it_scores() -> None:
    scores = {"a": torch.tensor([-3.0, -1.0, -2.0]), "b": torch.tensor([5.0, 7.0, float("inf")])}
    assert_same(
        pruned(scores, 0.5, warns=False),
        {"a": torch.tensor([False, True, False]), "b": torch.tensor([False, True, True])},
    )


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_score_that_is_no_number_is_refused(scope: Any, place: int) -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.rand(3)}
    scores["a"][place] = float("nan")
    with pytest.raises(ValueError, match="Scores are NaN: 1 of 3 in a"):
        prune_channels(scores, 0.4, scope=scope)


def test_masks_of_channels_cover_all_that_makes_them() -> None:
    """Groups that cross share a tensor: what one of them drops is gone."""
    columns = Channels(
        "w", 3, (Member("w", 0, torch.tensor([[0, 3], [1, 4], [2, 5]])), Member("v", 1, torch.tensor([[2], [1], [0]])))
    )
    blocks = Channels("w#2", 2, (Member("w", 0, torch.tensor([[0, 1, 2], [3, 4, 5]])),))
    other = Channels("u", 2, (Member("u", 0, torch.tensor([[0], [1]])),))
    keep = {"w": torch.tensor([True, False, True]), "w#2": torch.tensor([False, True])}
    shapes = {"w": torch.zeros(6, 2), "v": torch.zeros(2, 3), "u": torch.zeros(2)}
    masks = expand([columns, blocks, other], keep, shapes)
    assert masks.keys() == {"w", "v"}
    assert masks["w"].tolist() == [[row in (3, 5)] * 2 for row in range(6)]
    assert masks["v"].tolist() == [[True, False, True]] * 2
